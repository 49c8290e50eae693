"""Emoji drawn as vectors, by nine hands: the SVG sets of Iconify, rendered by resvg at any size.

Drawing hands may train a generator; judging hands (two of them share-alike) are for measuring alone, so that what is
drawn is compared with hands that no generator has seen."""
import io
import json
import re
import tarfile
import unicodedata

import numpy as np
import resvg_py
from PIL import Image

from lib.run.files import UserError

HANDS = {  # style: npm package of the set
    "noto": ("@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    "fluent-color": ("@iconify-json/fluent-emoji", "1.2.7",
                     "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"),
    "fluent-flat": ("@iconify-json/fluent-emoji-flat", "1.2.6",
                    "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
    "emojione": ("@iconify-json/emojione", "1.2.3",
                 "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    "openmoji": ("@iconify-json/openmoji", "1.2.29",
                 "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
    "noto-v1": ("@iconify-json/noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "emojione-v1": ("@iconify-json/emojione-v1", "1.2.3",
                    "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3"),
    "fxemoji": ("@iconify-json/fxemoji", "1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef")}
JUDGING = "openmoji", "noto-v1", "emojione-v1", "fxemoji"
LICENCES = {"fluent-color": "Fluent Emoji, Microsoft: MIT", "fluent-flat": "Fluent Emoji, Microsoft: MIT",
            "emojione": "EmojiOne 2, Ranks.com Inc.: CC-BY-4.0", "openmoji": "OpenMoji: CC-BY-SA-4.0",
            "noto-v1": "Noto Emoji (version 1), Google: Apache-2.0",
            "emojione-v1": "EmojiOne 1, Ranks.com Inc.: CC-BY-SA-4.0", "fxemoji": "FxEmojis, Mozilla: Apache-2.0"}


def name_key(name):
    """What an emoji's label and its name in a set have in common: its letters and digits."""
    plain = unicodedata.normalize("NFKD", name.lower().replace("#", "hash").replace("*", "asterisk"))
    return re.sub("[^a-z0-9]", "", plain)


def read_hand(path):
    """{name_key: (left, top, width, height, body of the SVG)} of a set's tarball. UserError: it is broken."""
    try:
        with tarfile.open(path, "r:gz") as tar:
            icons = json.load(tar.extractfile("package/icons.json"))
        box = [icons.get(name, default) for name, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))]
        found = {name: (*(icon.get(side, whole) for side, whole in zip(("left", "top", "width", "height"), box)),
                        icon["body"]) for name, icon in icons["icons"].items()}
        same = {name: found[alias["parent"]] for name, alias in icons.get("aliases", {}).items()
                if set(alias) == {"parent"} and alias["parent"] in found}
    except (tarfile.TarError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: a broken set of icons ({error}); remove it and fetch it again") from None
    return {name_key(name): icon for name, icon in {**same, **found}.items()}


def draw(icon, size, turn=0.0, scale=1.0, right=0.0, down=0.0):
    """An icon as PNG of size x size: turned by degrees, scaled and shifted by shares of its longer side."""
    left, top, width, height, body = icon
    side, x, y = max(width, height), left + width / 2, top + height / 2
    move = f"translate({x + right * side} {y + down * side}) rotate({turn}) scale({scale}) translate({-x} {-y})"
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = (f'<svg {names} width="{size}" height="{size}" viewBox="{x - side / 2} {y - side / 2} {side} {side}">'
           f'<g transform="{move}">{body}</g></svg>')
    try:
        return resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    except ValueError as error:
        raise UserError(f"cannot be drawn ({error})") from None


def drawn(icon, size, path=None, n=8):
    """Source of a job: the bytes of a picture; of a path (as in sources.STILL_MOTIONS) frames and durations."""
    if path is None:
        return draw(icon, size)
    files = (io.BytesIO(draw(icon, size, *path(i / n))) for i in range(n))
    return np.stack([np.asarray(Image.open(file).convert("RGBA")) for file in files]), [100] * n
