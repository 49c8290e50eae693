"""Reading and writing GIF, WebP and APNG as browsers show them; contact sheets, frames as tensors.

Frames are (n, H, W, 4) uint8, straight (not premultiplied) RGBA; durations are milliseconds, one a frame.
"""
import contextlib
import io
import itertools
import os
import stat
import struct
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from lib.media import animation
from lib.media.colours import SIDEWAYS, colour_change, orientation
from lib.run.files import UserError, write_bytes

FORMATS = {".gif": "GIF", ".png": "PNG", ".apng": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG",
           ".jfif": "JPEG", ".jpe": "JPEG"}
MAX_FRAMES = 24                                  # kept of a long clip in a prepared set
# What a file may ask for: reading one then takes at most 1.2 GB and about half a minute on a slow core.
MAX_SIDE, MAX_DECODED, MAX_PIXELS = 4096, 2000, 2.5e8    # of a canvas, frames of a file, pixels of all of them
MAX_BYTES = 2**26                                # of a file: the largest canvas, uncompressed
MAX_SCANS = 500                                  # of a progressive JPEG: each goes over the whole picture


Image.MAX_IMAGE_PIXELS = MAX_SIDE**2 // 2        # Pillow refuses twice as many, also in later frames of a GIF
warnings.simplefilter("ignore", Image.DecompressionBombWarning)          # check_canvas refuses them
warnings.filterwarnings("ignore", module=r"PIL\.")                       # one for each damaged file of millions


def even_frames(n, T):
    """min(n, T) evenly spaced frame numbers of n, from 0; the gap after the last is like the others: stickers loop."""
    return [i * n // min(n, T) for i in range(min(n, T))]


def thin(n, most, keep=()):
    """At most `most` frame numbers of n, increasing: those in `keep` first, the rest evenly spaced."""
    keep = sorted({i for i in keep if 0 <= i < n})
    if len(keep) >= most:
        return [keep[i] for i in even_frames(len(keep), most)]
    fill = [i for i in even_frames(n, most) if i not in keep]
    return sorted(keep + [fill[i] for i in even_frames(len(fill), most - len(keep))])


def durations_of_kept(durations, indices):
    """Durations of the frames `indices` (at least 1 ms): each includes those of the frames dropped after it."""
    starts, ends = [0, *indices[1:]], [*indices[1:], len(durations)]
    return [max(1, round(sum(durations[a:b]))) for a, b in zip(starts, ends)]


def square_image(image, size):
    """An RGBA image resized once, so that its longer side is `size`, in the middle of a transparent square."""
    longer = max(image.size)
    inner = tuple(max(1, round(side * size / longer)) for side in image.size)
    small = image.resize(inner, Image.Resampling.BICUBIC)        # Pillow filters RGBA premultiplied: no dark fringes
    if inner == (size, size):
        return small
    out = Image.new("RGBA", (size, size))
    out.paste(small, ((size - inner[0]) // 2, (size - inner[1]) // 2))
    return out


def square(frames, size):
    """(n, H, W, 4) -> (n, size, size, 4): padded to a square, no aspect change."""
    return np.stack([square_image(Image.fromarray(f), size) for f in frames])


# ---- reading
def read_source(source, name):
    """The bytes of a path, or bytes as they are. UserError: unreadable, no regular file, more than MAX_BYTES."""
    try:
        found = None if isinstance(source, bytes) else os.stat(source)       # first, as opening a pipe would wait
        if found and not stat.S_ISREG(found.st_mode):
            reason = "no regular file"
        elif (found.st_size if found else len(source)) > MAX_BYTES:
            reason = f"more than {MAX_BYTES} bytes"
        else:
            return Path(source).read_bytes() if found else source
    except (OSError, ValueError) as error:       # ValueError: a name with a NUL
        reason = getattr(error, "strerror", None) or error
    raise UserError(f"{name}: cannot be read as an image ({reason})")


def check_canvas(name, width, height, n):
    """UserError for a file that holds no picture, or asks for more than the limits above."""
    if not n:
        raise UserError(f"{name}: cannot be read as an image (there is no picture in it)")
    sides_fit = 0 < min(width, height) and max(width, height) <= MAX_SIDE
    if not sides_fit or n > MAX_DECODED or n * width * height > MAX_PIXELS:
        raise UserError(f"{name}: {n} frames of {width}x{height} pixels; 1 to {MAX_DECODED} frames of 1x1 to "
                        f"{MAX_SIDE}x{MAX_SIDE} and at most {MAX_PIXELS:g} pixels in all can be read")


def webp_alpha(content):
    """Set an animated WebP's alpha flag: libwebp omits it where each frame's box is opaque; the rest turns black."""
    if content[8:16] == b"WEBPVP8X" and content[20] & 2:
        content = content[:20] + bytes([content[20] | 16]) + content[21:]
    return content


def webp_durations(content):
    """Milliseconds of each frame of an animated WebP, from its ANMF chunks; none of a still."""
    found, at = [], 12
    while at + 24 <= len(content) and len(found) <= MAX_DECODED:
        size = int.from_bytes(content[at + 4:at + 8], "little")
        if content[at:at + 4] == b"ANMF":
            found.append(int.from_bytes(content[at + 20:at + 23], "little"))
        at += 8 + size + size % 2
    return found


def open_frames(content, name):
    """(width, height), milliseconds of each frame and an iterator of images, checked against the limits."""
    if found := animation.parse(content, MAX_DECODED):           # GIF, PNG
        canvas, pictures, look = found
        sizes = [canvas, *((p.width, p.height) for p in pictures)]           # a picture may reach over the canvas
        check_canvas(name, *map(max, zip(*sizes)), len(pictures))
        turn, colours = orientation(look.exif), colour_change(look.icc, look.gamma)
        seen = (colours(Image.fromarray(frame)) for frame in animation.composed(canvas, pictures))
        turned = canvas[::-1] if turn in SIDEWAYS else canvas
        return turned, [p.milliseconds for p in pictures], seen if turn is None else (im.transpose(turn) for im in seen)
    if content[:2] == b"\xff\xd8" and (scans := content.count(b"\xff\xda")) > MAX_SCANS:
        raise UserError(f"{name}: a JPEG of {scans} scans; at most {MAX_SCANS} can be read")
    image = Image.open(io.BytesIO(webp_alpha(content)), formats=[*set(FORMATS.values())])
    n = image.n_frames if image.format == "WEBP" else 1          # a phone's JPEG may hold a second picture
    check_canvas(name, *image.size, n)
    colours = colour_change(image.info.get("icc_profile"))
    if n == 1:
        with contextlib.suppress(Exception):     # damaged EXIF does not cost the picture
            image = ImageOps.exif_transpose(image)

    def frames():
        for i in range(n):
            image.seek(i)
            yield colours(image)
    return image.size, (webp_durations(content) + [0] * n)[:n], frames()


def compose(content, name, most, size, keep, room):
    """What decode_frames returns, of a file's bytes. Frames behind the last that is kept are not decoded."""
    canvas, milliseconds, seen = open_frames(content, name)
    indices = thin(len(milliseconds), most or len(milliseconds), keep)
    height, width = (size, size) if size else canvas[::-1]
    frames = room[:len(indices)] if room is not None else np.empty((len(indices), height, width, 4), np.uint8)
    for i, frame in zip(range(indices[-1] + 1), seen):
        frame.load()
        if i in indices:
            frame = frame if frame.mode == "RGBA" else frame.convert("RGBA")
            frames[indices.index(i)] = square_image(frame, size) if size else frame
    return frames, durations_of_kept([x or 100 for x in milliseconds], indices), indices


def decode_frames(source, name, most=None, size=None, keep=(), room=None):
    """A path or bytes -> frames, durations, their numbers in the file. Only these frames are converted and resized.

    most, keep: as in `thin`. room: an array (most, size, size, 4) for the frames: new memory for each file costs time.
    UserError: unreadable, empty, or beyond the limits."""
    content = read_source(source, name)
    try:
        return compose(content, name, most, size, keep, room)
    except UserError:
        raise
    except UnidentifiedImageError:
        reason = "no GIF, WebP, PNG or JPEG, or cut off at once"
    except (struct.error, IndexError, KeyError, TypeError, AttributeError, OverflowError):
        reason = "damaged"                       # their own words are of the program, not of the file
    except Exception as error:                   # a broken file can make Pillow raise nearly anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    raise UserError(f"{name}: cannot be read as an image ({reason})")


def read_animation(source, max_frames=None, size=None):
    """Read a GIF, WebP, APNG or still: a path or bytes -> (frames, durations).

    `max_frames` keeps so many evenly spaced ones, whose durations include those dropped; `size` pads and resizes to
    (size, size). A still has one frame; no duration is 100 ms. UserError: unreadable, empty, or beyond the limits."""
    return decode_frames(source, "<bytes>" if isinstance(source, bytes) else str(source), max_frames, size)[:2]


# ---- writing
def gif_frame(frame):
    """(H, W, 4) -> a GIF: at most 255 colours of the opaque pixels, all if there are no more, index 255 where it is
    transparent."""
    opaque = frame[..., 3] >= 128
    shown = np.ascontiguousarray(frame[opaque][:, :3]) if opaque.any() else np.zeros((1, 3), np.uint8)
    keys, place = np.unique(shown.astype(np.uint32) @ np.uint32([65536, 256, 1]), return_inverse=True)
    if len(keys) <= 255:                         # Pillow would take near colours for one
        indices = np.full(opaque.shape, 255, np.uint8)
        indices[opaque] = place[:opaque.sum()]
        image = Image.frombytes("P", opaque.shape[::-1], indices.tobytes())
        palette = np.stack([keys >> 16, keys >> 8 & 255, keys & 255], 1).astype(np.uint8).tobytes()
    else:
        palette = Image.fromarray(shown[None]).quantize(255)
        image = Image.fromarray(np.ascontiguousarray(frame[..., :3]))
        image = image.quantize(palette=palette, dither=Image.Dither.NONE)
        image.paste(255, mask=Image.fromarray(~opaque))
        palette = bytes(image.getpalette())
    image.putpalette(palette.ljust(768, b"\0"))
    file = io.BytesIO()
    image.save(file, "GIF", optimize=False)
    return file.getvalue()


def gif_durations(durations):
    """GIF counts in 10 ms: round the running total, so that errors do not add up; players slow down below 20 ms."""
    ends = np.round(np.cumsum([0, *durations]) / 10) * 10
    return [max(20, int(d)) for d in np.diff(ends)]


def save(images, kind, durations, **options):
    """The bytes of images as a file of `kind` that loops for ever; one image: a still."""
    if len(images) > 1:
        options.update(save_all=True, append_images=images[1:], duration=durations, loop=0)
    file = io.BytesIO()
    images[0].save(file, kind, **options)
    return webp_alpha(file.getvalue())


def write_animation(path, frames, durations):
    """Write frames by extension: .webp (lossless), .png (APNG), .gif (1-bit alpha). One frame: a still.

    durations: one a frame, or one number. In WebP and APNG equal neighbours become one frame; the total stays, but of a
    clip that stands still, which becomes a still."""
    kind = FORMATS.get(Path(path).suffix.lower())
    if kind not in ("GIF", "PNG", "WEBP"):
        raise UserError(f"{path}: unknown animation type; use .webp, .gif or .png")
    durations = [int(d) for d in np.broadcast_to(durations, len(frames))]
    if kind == "GIF":
        content = animation.join_gifs(map(gif_frame, frames), gif_durations(durations), 255)
    else:
        options = dict(lossless=True, quality=80, exact=True) if kind == "WEBP" else {}
        content = save([Image.fromarray(f) for f in frames], kind, durations, **options)
    write_bytes(path, content)


def check_sheet(path):
    """UserError for a --sheet whose name is not that of a PNG."""
    if path and Path(path).suffix.lower() != ".png":
        raise UserError(f"--sheet {path}: a sheet is a .png file")


def contact_sheet(rows, path, labels=None, scale=2, marks=None):
    """Write a PNG on white: one row a clip (T, H, W, 4), its label above; a blue border where `marks` is true."""
    gap, text = 4, 14 if labels else 0
    heights = [r.shape[1] * scale + text + gap for r in rows]
    width = gap + max(len(r) * (r.shape[2] * scale + gap) for r in rows)
    sheet = Image.new("RGB", (width, gap + sum(heights)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for i, (row, y) in enumerate(zip(rows, itertools.accumulate(heights, initial=gap))):
        w, h = row.shape[2] * scale, row.shape[1] * scale
        if labels:
            fits = max(c for c in range(len(labels[i]) + 1) if font.getlength(labels[i][:c]) <= width - 2 * gap)
            draw.text((gap, y), labels[i][:fits], "black", font)
        for j, frame in enumerate(row):
            image = Image.fromarray(frame).resize((w, h), Image.Resampling.NEAREST)
            x = gap + j * (w + gap)
            sheet.paste(image, (x, y + text), image)
            if marks is not None and marks[i][j]:
                draw.rectangle((x - 2, y + text - 2, x + w + 1, y + text + h + 1), outline="blue", width=2)
    sheet.save(file := io.BytesIO(), "PNG")
    write_bytes(path, file.getvalue())


# ---- tensors
def premultiply(rgba):
    """(..., 4) uint8 straight -> (..., 4) float32 premultiplied, all four channels in [-1, 1]."""
    x = np.asarray(rgba, np.float32) / 255
    x[..., :3] *= x[..., 3:]
    return x * 2 - 1


def to_tensor(rgba):
    """(n, H, W, 4) uint8 straight -> (n, 4, H, W) float32 torch, premultiplied, in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(premultiply(rgba), -1, -3)))


def to_rgba(x):
    """(..., 4, H, W) float premultiplied, or (..., 3, H, W) opaque, in [-1, 1] -> (..., H, W, 4) uint8 straight."""
    x = x.detach().float().cpu().numpy() if torch.is_tensor(x) else np.asarray(x, np.float32)
    x = np.clip(np.moveaxis(x, -3, -1) / 2 + 0.5, 0, 1)
    if x.shape[-1] == 3:
        x = np.concatenate([x, np.ones_like(x[..., :1])], -1)
    alpha = x[..., 3:] * (x[..., 3:] >= 0.5 / 255)
    rgb = np.divide(x[..., :3], alpha, out=np.zeros_like(x[..., :3]), where=alpha > 0)
    return np.round(np.concatenate([rgb.clip(0, 1), alpha], -1) * 255).astype(np.uint8)
