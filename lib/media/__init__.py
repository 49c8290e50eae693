"""Sticker files as browsers show and platforms take them; sources of stickers; prepared sets."""
from lib.media.pictures import contact_sheet, read_animation, write_animation  # noqa: F401
