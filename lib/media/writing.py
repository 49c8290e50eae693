"""Stickers as files: as platforms accept them, under names of their captions. Frames as in lib/media/pictures.py."""
import itertools
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lib.media.pictures import read_animation, save, write_animation
from lib.run.files import UserError, write_bytes

LONGEST = {".gif": 655_350, ".webp": 2**24 - 1, ".png": 65_535, ".apng": 65_535}     # milliseconds of a frame, at most


class Platform(NamedTuple):
    """What a platform takes: file type, pixels a side, bytes, seconds, milliseconds a frame, frames."""
    suffix: str
    side: int
    most_bytes: int
    most_seconds: float
    least_ms: int = 1
    least_frames: int = 1


PLATFORMS = {
    "whatsapp": Platform(".webp", 512, 450_000, 10, 8, 2),       # WhatsApp/stickers: below 500 kB, several frames
    "signal": Platform(".png", 512, 300_000, 3),                 # Signal's help on sticker packs: APNG
    "discord": Platform(".png", 320, 512_000, 5)}                # Discord's help on stickers: APNG


PNG_LEVELS = ((1, 256), (1, 128), (2, 256), (2, 128), (2, 64), (4, 128), (4, 64), (4, 32), (4, 8))  # block, colours


def few_colours(images, size, block, colours):
    """Premultiplied images -> RGBA ones of `size`: one palette for all, 16 degrees of alpha, blocks of equal pixels.

    An octree of RGBA, as Pillow has it, tore holes and made faint pixels opaque; the frames of 64 px that are enlarged
    here lose less by blocks than by colours."""
    small = [im.resize((size[0] // block, size[1] // block), Image.Resampling.BICUBIC) for im in images]
    x = np.stack([np.asarray(im.convert("RGBA")) for im in small])
    alpha = (np.round(x[..., 3:] / 17) * 17).astype(np.uint8)
    shown = x[alpha[..., 0] > 0][:, :3]
    palette = Image.fromarray(shown[None] if len(shown) else x[:1, 0, :, :3]).quantize(colours)      # median cut
    found = []
    for frame, a in zip(x, alpha):
        rgb = Image.fromarray(np.ascontiguousarray(frame[..., :3])).quantize(palette=palette, dither=Image.Dither.NONE)
        rgba = np.concatenate([np.asarray(rgb.convert("RGB")) * (a > 0), a], -1)
        found.append(Image.fromarray(rgba).resize(size, Image.Resampling.NEAREST))
    return found


def encode_for(frames, duration, platform):
    """Frames (T, S, S, 4) of `duration` ms each -> the bytes that a platform accepts, a sentence on what was done.

    Quality (WebP), or size of blocks and number of colours (APNG), change until the limit is met. UserError: it never
    is, or what was written breaks another rule when it is read again."""
    rules = PLATFORMS[platform]
    duration = max(rules.least_ms, min(duration, int(1000 * rules.most_seconds / len(frames))))
    size, webp = (rules.side, rules.side), rules.suffix == ".webp"
    images = [Image.fromarray(f).convert("RGBa") for f in frames]
    large = [im.resize(size, Image.Resampling.BICUBIC).convert("RGBA") for im in images]
    for level in (95, 85, 75, 60, 45, 30, 15, 5) if webp else PNG_LEVELS:
        if webp:
            content = save(large, "WEBP", duration, quality=level, alpha_quality=100 if level > 45 else level)
            what = f"quality {level}"
        else:                                    # stored without a palette
            content = save(few_colours(images, size, *level), "PNG", duration, disposal=0, blend=0)
            what = f"{level[1]} colours in blocks of {level[0]} px"
        if len(content) <= rules.most_bytes:
            total = check_finished(content, platform)
            return content, (f"{platform}: {rules.suffix[1:]}, {rules.side}x{rules.side}, {what}, "
                             f"{len(content) / 1000:.0f} of {rules.most_bytes / 1000:.0f} kB, {total / 1000:.1f} s")
    raise UserError(f"--for {platform}: the clip does not fit {rules.most_bytes // 1000} kB at any quality")


def check_finished(content, platform):
    """Milliseconds of a file in all. UserError: read again, it breaks a rule of the platform."""
    rules, (frames, durations) = PLATFORMS[platform], read_animation(content)
    if len(frames) < rules.least_frames:
        raise UserError(f"--for {platform}: it takes animations, and this clip stands still; make another (--seed)")
    if len(frames) > 1 and (sum(durations) > 1000 * rules.most_seconds or min(durations) < rules.least_ms):
        raise UserError(f"--for {platform}: {len(frames)} frames of {min(durations)} ms and more, {sum(durations)} ms "
                        f"in all; at least {rules.least_ms} ms and at most {rules.most_seconds} s are taken")
    return sum(durations)


def slug(name):
    """A caption as the name of a file: "Red heart" -> "red-heart"."""
    return re.sub(r"[^\w]+", "-", name.lower()).strip("-")[:60] or "sticker"


def output_paths(out, names, platform=None):
    """A path for each sticker, in a folder or as `out` says: NAME, then NAME-2, NAME-3 where a name comes again."""
    path = Path(out or "")
    folder = path if not path.suffix or path.is_dir() or out.endswith(("/", os.sep)) else None
    suffix = PLATFORMS[platform].suffix if platform else ".webp" if folder else path.suffix
    if suffix.lower() not in LONGEST:
        raise UserError(f"--out {out}: write .webp, .gif or .png")
    if not folder and path.suffix != suffix:
        raise UserError(f"--out {out}: {platform} takes {suffix}")
    paths, numbers = {}, defaultdict(lambda: itertools.count(1))             # paths: a set in order
    for name in names:
        stem = folder / slug(name) if folder else path.with_suffix("")
        numbered = (Path(f"{stem}-{i}{suffix}" if i > 1 else f"{stem}{suffix}") for i in numbers[stem])
        paths[next(path for path in numbered if path not in paths)] = None
    return list(paths)


def check_duration(duration, path):
    """UserError for milliseconds of a frame that a file of this name cannot hold; None passes."""
    longest = LONGEST[Path(path).suffix.lower()]
    if duration is not None and duration > longest:
        raise UserError(f"--duration {duration}: a frame of a {Path(path).suffix} file lasts at most {longest} ms")


def write_sticker(clip, path, duration, platform=None):
    """Write a clip (T, S, S, 4), and a line of it on stdout."""
    if platform:
        content, summary = encode_for(clip, duration, platform)
        write_bytes(path, content)
        print(f"{path}: {summary}")
    else:
        write_animation(path, clip, [duration] * len(clip))
        print(path)


def write_stickers(clips, paths, duration, platform=None):
    """Write what was made; -> the errors of what could not be, which do not take the others."""
    failed = []
    for clip, path in zip(clips, paths):
        try:
            write_sticker(clip, path, duration, platform)
        except (UserError, OSError) as error:
            failed.append(f"{path}: {error}" if str(path) not in str(error) else str(error))
    return failed
