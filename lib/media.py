"""Reading and writing GIF, WebP and APNG; contact sheets, files as platforms accept them, frames as tensors.

Frames are (n, H, W, 4) uint8, straight (not premultiplied) RGBA; durations are milliseconds, one a frame.
"""
import io
import itertools
import os
import stat
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError

from lib.files import UserError

FORMATS = {".gif": "GIF", ".png": "PNG", ".apng": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}
MAX_FRAMES = 24                                  # kept of a long clip in a prepared set
# What a file may ask for: reading one then takes at most 1.2 GB and about half a minute on a slow core.
MAX_SIDE, MAX_DECODED, MAX_PIXELS = 4096, 2000, 2.5e8    # of a canvas, frames of a file, pixels of all of them
MAX_BYTES = 2**26                                # of a file: the largest canvas, uncompressed
PLATFORMS = {  # file type, side in pixels, bytes, seconds
    "whatsapp": (".webp", 512, 450_000, 10), "signal": (".png", 512, 300_000, 3), "discord": (".png", 320, 512_000, 60)}

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
    """Centre an RGBA image on a transparent square and resize once, to (size, size)."""
    side = max(image.size)
    left, top = -((side - image.width) // 2), -((side - image.height) // 2)
    image = image.crop((left, top, left + side, top + side))     # transparent outside of the image
    return image.resize((size, size), Image.Resampling.BICUBIC)  # Pillow filters RGBA premultiplied: no dark fringes


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
    """UserError for a file that asks for more than the limits above."""
    sides_fit = 0 < min(width, height) and max(width, height) <= MAX_SIDE
    if not sides_fit or not 0 < n <= MAX_DECODED or n * width * height > MAX_PIXELS:
        raise UserError(f"{name}: {n} frames of {width}x{height} pixels; 1 to {MAX_DECODED} frames of 1x1 to "
                        f"{MAX_SIDE}x{MAX_SIDE} and at most {MAX_PIXELS:g} pixels in all can be read")


def webp_alpha(content):
    """Set an animated WebP's alpha flag: libwebp omits it where each frame's box is opaque; the rest turns black."""
    if content[8:16] == b"WEBPVP8X" and content[20] & 2:
        content = content[:20] + bytes([content[20] | 16]) + content[21:]
    return content


def load_frame(image, i, first):
    """Seek and load frame i, mending two faults of Pillow 13.0. APNG: a half-transparent frame is pasted with its alpha
    squared. GIF: a frame without a transparent colour is disposed to the background colour, browsers show nothing."""
    image.seek(i)
    over = i and image.format == "PNG" and image.mode == "RGBA" and image.blend_op == PngImagePlugin.Blend.OP_OVER
    if over:
        canvas = Image.new("RGBA", image.size) if i == first else image._new(image.im.copy())
        image.blend_op = PngImagePlugin.Blend.OP_SOURCE
    image.load()
    if over:
        box = image.dispose_extent
        image.paste(Image.alpha_composite(canvas.crop(box), image.crop(box)), box)
    if image.format == "GIF" and image.mode == "RGBA" and image.disposal_method == 2:
        left, top, right, bottom = image.dispose_extent
        image.dispose = Image.new("RGBA", (right - left, bottom - top)).im


def compose(image, name, most, size, keep, room):
    """What decode_frames returns, of an open image."""
    first = int(bool(getattr(image, "default_image", False)))   # an APNG's fallback picture is no frame
    n, canvas = getattr(image, "n_frames", 1) - first, image.size
    check_canvas(name, *canvas, n)
    indices, durations = thin(n, most or n, keep), []
    height, width = (size, size) if size else canvas[::-1]
    frames = room[:len(indices)] if room is not None else np.empty((len(indices), height, width, 4), np.uint8)
    for i in range(n):
        load_frame(image, first + i, first)
        if image.size != canvas:
            raise UserError(f"{name}: frame {i} makes the canvas {image.width}x{image.height}")
        durations.append(image.info.get("duration") or 100)
        if i in indices:
            frame = image.convert("RGBA")
            frames[indices.index(i)] = square_image(frame, size) if size else frame
    return frames, durations_of_kept(durations, indices), indices


def decode_frames(source, name, most=None, size=None, keep=(), room=None):
    """A path or bytes -> frames, durations, their numbers in the file. Only these frames are converted and resized.

    most, keep: as in `thin`. room: an array (most, size, size, 4) for the frames: new memory for each file costs time.
    UserError: unreadable, empty, or beyond the limits."""
    content = read_source(source, name)
    try:
        with Image.open(io.BytesIO(webp_alpha(content)), formats=[*set(FORMATS.values())]) as image:
            return compose(image, name, most, size, keep, room)
    except UserError:
        raise
    except UnidentifiedImageError:
        reason = "no GIF, WebP, PNG or JPEG, or cut off at once"
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
    """(H, W, 4) -> palette image: 255 colours chosen from the opaque pixels, index 255 transparent."""
    opaque = frame[..., 3] >= 128
    colours = frame[opaque][None, :, :3] if opaque.any() else np.zeros((1, 1, 3), np.uint8)
    palette = Image.fromarray(np.ascontiguousarray(colours)).quantize(255)
    image = Image.fromarray(np.ascontiguousarray(frame[..., :3])).quantize(palette=palette, dither=Image.Dither.NONE)
    image.paste(255, mask=Image.fromarray(~opaque))
    return image


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

    durations: one a frame, or one number. Pillow merges equal neighbours into one frame; the total duration stays."""
    kind = FORMATS.get(Path(path).suffix.lower())
    if kind not in ("GIF", "PNG", "WEBP"):
        raise UserError(f"{path}: unknown animation type; use .webp, .gif or .png")
    durations = [int(d) for d in np.broadcast_to(durations, len(frames))]
    images = [gif_frame(f) if kind == "GIF" else Image.fromarray(f) for f in frames]
    options = {"GIF": dict(disposal=2, transparency=255, optimize=False), "PNG": {},
               "WEBP": dict(lossless=True, quality=80, exact=True)}[kind]
    Path(path).write_bytes(save(images, kind, gif_durations(durations) if kind == "GIF" else durations, **options))


def encode_for(frames, duration, platform):
    """Frames (T, S, S, 4) of `duration` ms each -> the bytes that a platform accepts, a sentence on what was done.

    Quality (WebP) or the number of colours (APNG) falls until the limit is met. UserError: it never is."""
    suffix, side, limit, seconds = PLATFORMS[platform]
    duration, size = min(duration, int(1000 * seconds / len(frames))), (side, side)
    images = [Image.fromarray(f).convert("RGBa").resize(size, Image.Resampling.BICUBIC).convert("RGBA") for f in frames]
    for level in (95, 85, 75, 60, 45, 30, 15, 5) if suffix == ".webp" else (256, 128, 64, 32, 16, 8, 4):
        if suffix == ".webp":
            what = f"quality {level}"
            content = save(images, "WEBP", duration, quality=level, alpha_quality=100 if level > 45 else level)
        else:                                    # fewer colours, still stored without a palette
            what = f"{level} colours"
            fewer = [im.quantize(level, Image.Quantize.FASTOCTREE).convert("RGBA") for im in images]
            content = save(fewer, "PNG", duration, disposal=0, blend=0)
        if len(content) <= limit:
            return content, (f"{platform}: {suffix[1:]}, {side}x{side}, {what}, {len(content) / 1000:.0f} of "
                             f"{limit / 1000:.0f} kB, {duration * len(frames) / 1000:.1f} s")
    raise UserError(f"--for {platform}: the clip does not fit {limit // 1000} kB at any quality")


def check_sheet(path):
    """UserError for a --sheet whose name is not that of a PNG."""
    if path and Path(path).suffix.lower() != ".png":
        raise UserError(f"--sheet {path}: a sheet is a .png file")


def contact_sheet(rows, path, labels=None, scale=2, marks=None):
    """Write a PNG on white: one row a clip (T, H, W, 4), its label above; a blue border where `marks` is true."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
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
    sheet.save(path, "PNG")


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
