"""Files and neighbours that are not to be trusted: mutated media, bad archives and manifests, damaged sets, two jobs on one folder.

    python tests/test_hostile.py --files 2000 --seed 0 --source data/npm/lobehub-fluent-emoji-anim-3-1.0.0.tgz

fuzzes so many files made from real stickers (an archive, or a folder of WebP files) and prints a table; `make test` fuzzes fewer, made from drawn ones.
"""
import argparse
import functools
import io
import itertools
import json
import os
import random
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pytest
from PIL import Image

import data
from data import UserError

MB_LIMIT, SECONDS_LIMIT = 1200, 30               # a file may take so much memory beside Python and torch, and so much processor time


def script(code, *argv):
    """Start a process of its own that runs the code."""
    return subprocess.Popen([sys.executable, "-c", f"import data, os, sys, time\n{code}", *map(str, argv)], cwd=Path(data.__file__).parent,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# ---- mutated files: every mutation a function of (content, random generator)

SIZES = (0, 1, 2, 255, 4096, 4097, 16384, 65535, 2**24 - 1, 2**31 - 1, 2**32 - 1)


@functools.lru_cache
def bomb(megabytes):
    deflate = zlib.compressobj(9)
    return b"".join(deflate.compress(bytes(1 << 20)) for _ in range(megabytes)) + deflate.flush()


def flip(content, rng):
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 20, 200))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def truncate(content, rng):
    return content[:rng.randrange(len(content))]


def repeat(content, rng):
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return content[:b] + content[a:b] * rng.choice((1, 2, 50)) + content[b:]


def overwrite(content, rng):
    a = rng.randrange(len(content))
    filling = rng.choice((b"\0", b"\xff", rng.randbytes(1))) * rng.choice((1, 4, 100))
    return content[:a] + filling + content[a + len(filling):]


def put(body, at, size, value, order):
    """The bytes with an integer written over, cut to its size."""
    return body[:at] + (value % 256**size).to_bytes(size, order) + body[at + size:]


def png_chunks(content):
    at, chunks = 8, []
    while at + 8 <= len(content):
        length = int.from_bytes(content[at:at + 4], "big")
        chunks.append((content[at + 4:at + 8], content[at + 8:at + 8 + length]))
        at += length + 12
    return chunks


def png_of(chunks):
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks)


def disorder(chunks, kind, fields, order, rng):
    """Change chunks in place: a wrong header field, a chunk twice, missing or elsewhere. -> where; any other kind changes nothing."""
    i = rng.randrange(len(chunks))
    if kind == "field":
        i, known = rng.choice([(i, fields[name]) for i, (name, _) in enumerate(chunks) if name in fields])
        at, size = rng.choice(known)
        chunks[i] = chunks[i][0], put(chunks[i][1], at, size, rng.choice(SIZES), order)
    elif kind == "double":
        chunks.insert(i, rng.choice(chunks))
    elif kind == "drop":
        del chunks[i]
    elif kind == "swap":
        j = rng.randrange(len(chunks))
        chunks[i], chunks[j] = chunks[j], chunks[i]
    return i


PNG_FIELDS = {b"IHDR": ((0, 4), (4, 4), (8, 1), (9, 1), (12, 1)), b"acTL": ((0, 4), (4, 4)),
              b"fcTL": ((0, 4), (4, 4), (8, 4), (12, 4), (16, 4), (20, 2), (22, 2), (24, 1), (25, 1)), b"fdAT": ((0, 4),), b"PLTE": ((0, 1),)}


def png_lie(content, rng):
    """A wrong header field, chunks out of order, twice, missing, or compressed bombs: all with a right checksum."""
    chunks = png_chunks(content)
    kind = rng.choice(("field",) * 6 + ("double", "drop", "swap", "iCCP", "zTXt", "IDAT", "many", "fcTL"))
    i = disorder(chunks, kind, PNG_FIELDS, "big", rng)
    if kind == "many":                                              # frames that the header does not count
        chunks[i:i] = [c for c in chunks if c[0] in (b"fcTL", b"fdAT")] * 300
    elif kind == "fcTL":
        chunks[1:1] = [(b"fcTL", struct.pack(">IIIIIHHBB", i, *(rng.choice(SIZES) for _ in range(4)), 1, 0, 9, 9)) for i in range(100)]
    elif kind == "IDAT":
        chunks = [(name, bomb(70) if name == b"IDAT" else body) for name, body in chunks]
        chunks[0] = b"IHDR", struct.pack(">II", *rng.choice(((4096, 4096), (8, 8), (65535, 65535)))) + chunks[0][1][8:]
    elif kind in ("iCCP", "zTXt"):
        chunks[1:1] = [(kind.encode(), b"name\0\0" + bomb(rng.choice((1, 100))))] * rng.choice((1, 90))
    return png_of(chunks)


def webp_chunks(content):
    at, chunks = 12, []
    while at + 8 <= len(content):
        length = int.from_bytes(content[at + 4:at + 8], "little")
        chunks.append((content[at:at + 4], content[at + 8:at + 8 + length]))
        at += 8 + length + length % 2
    return chunks


def webp_of(chunks, lie=0):
    body = b"WEBP" + b"".join(name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2) for name, body in chunks)
    return b"RIFF" + struct.pack("<I", (len(body) + lie) % 2**32) + body


WEBP_FIELDS = {b"VP8X": ((0, 1), (4, 3), (7, 3)), b"ANIM": ((0, 4), (4, 2)), b"ANMF": ((0, 3), (3, 3), (6, 3), (9, 3), (12, 3), (15, 1), (20, 4), (24, 4)),
               b"VP8L": ((0, 4), (1, 2)), b"VP8 ": ((0, 3), (6, 2), (8, 2))}


def webp_lie(content, rng):
    chunks = webp_chunks(content)
    kind = rng.choice(("field",) * 6 + ("double", "drop", "swap", "many", "length", "canvas"))
    disorder(chunks, kind, WEBP_FIELDS, "little", rng)
    if kind == "many":                                              # frames of the smallest kind
        chunks += [min((c for c in chunks if c[0] == b"ANMF"), key=lambda c: len(c[1]), default=chunks[0])] * rng.choice((500, 2500, 25_000))
    elif kind == "canvas" and chunks[0][0] == b"VP8X":
        side = rng.choice((4095, 4096, 16383))
        chunks[0] = b"VP8X", chunks[0][1][:4] + (side.to_bytes(3, "little")) * 2
    return webp_of(chunks, rng.choice(SIZES) if kind == "length" else 0)


def gif_parts(content):
    """-> (head, blocks): each block is an extension or a picture, sub-blocks and all."""
    at = 13 + (3 << (content[10] & 7) + 1 if content[10] & 128 else 0)
    head, blocks = content[:at], []
    while content[at:at + 1] in (b"!", b","):
        start, at = at, at + 2
        if content[start:start + 1] == b",":
            at = start + 11 + (3 << (content[start + 9] & 7) + 1 if content[start + 9] & 128 else 0)
        while content[at]:
            at += 1 + content[at]
        at += 1
        blocks.append(content[start:at])
    return head, blocks


def gif_lie(content, rng):
    head, blocks = gif_parts(content)
    kind = rng.choice(("screen", "colours", "frame", "frame", "code", "delay", "endless", "many", "drop", "comment"))
    pictures = [i for i, b in enumerate(blocks) if b[:1] == b","]
    i = rng.choice(pictures)
    if kind == "screen":
        head = put(head, rng.choice((6, 8)), 2, rng.choice(SIZES), "little")
    elif kind == "colours":
        head = put(head, 10, 1, rng.randrange(256), "little")
    elif kind == "frame":
        blocks[i] = put(blocks[i], rng.choice((1, 3, 5, 7)), 2, rng.choice(SIZES), "little")
    elif kind == "code":
        at = 10 + (3 << (blocks[i][9] & 7) + 1 if blocks[i][9] & 128 else 0)
        blocks[i] = put(blocks[i], at, 1, rng.choice((0, 1, 2, 9, 12, 13, 255)), "little")
    elif kind == "delay":
        blocks = [put(put(b, 4, 2, rng.choice(SIZES), "little"), 3, 1, rng.randrange(256), "little") if b[:2] == b"!\xf9" else b for b in blocks]
    elif kind == "endless":
        return head + b"".join(blocks[:i]) + blocks[i][:-1] + b"\1" * rng.choice((1, 10**6))
    elif kind == "many":
        blocks = blocks[:i] + blocks[i:i + 1] * min(rng.choice((1000, 100_000)), 10**7 // len(blocks[i])) + blocks[i:]
    elif kind == "drop":
        del blocks[i]
    else:
        blocks[i:i] = [b"!\xfe" + (b"\xff" + bytes([65] * 255)) * rng.choice((1, 10**5)) + b"\0"] * rng.choice((1, 3))
    return head + b"".join(blocks) + b";"


ANY = (flip, flip, truncate, repeat, overwrite)
LIES = dict(gif=gif_lie, webp=webp_lie, apng=png_lie, png=png_lie)


def originals(source, count=8):
    """[(kind, content)] of good files of each kind, from the stickers of an archive or a folder, or drawn ones."""
    if source is None:
        pictures = [data.synthetic_job(plan)["source"] for plan in itertools.islice(data.synthetic_plans(4 * count), 0, None, 4)]
    else:
        path = Path(source)
        contents = (p.read_bytes() for p in sorted(path.glob("*.webp"))) if path.is_dir() else (content for _, content in data.tar_stickers(path))
        contents = list(itertools.islice(contents, count))
        pictures = [data.read_animation(content, 10, 96) for content in contents]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for i, (frames, durations) in enumerate(pictures):
            for kind, frames, durations in (("gif", frames[:10, ::2, ::2], durations[:10]), ("apng", frames[:10, ::2, ::2], durations[:10]), ("png", frames[:1], durations[:1]),
                                            ("webp", frames[:10], durations[:10])):
                path = Path(folder) / f"{i}.{'png' if kind == 'apng' else kind}"
                data.write_animation(path, frames, durations)
                found.append((kind, path.read_bytes()))
    return found + ([("webp", content) for content in contents] if source else [])


def write_mutants(folder, count, seed, source=None):
    """Write so many files, and the originals -> names of the good ones. Kinds take turns."""
    rng, good = random.Random(seed), originals(source)
    for i, (kind, content) in enumerate(good):
        (folder / f"good-{i:05}.{kind}").write_bytes(content)
    by_kind = {kind: [content for k, content in good if k == kind] for kind in LIES}
    for i, kind in zip(range(count), itertools.cycle(by_kind)):
        content = rng.choice(by_kind[kind])
        mutate = LIES[kind] if rng.random() < 0.6 else rng.choice(ANY)
        (folder / f"bad-{i:05}.{kind}").write_bytes(mutate(content, rng))
    return [p.name for p in sorted(folder.glob("good-*"))]


# ---- reading them in a process of its own

READER = """import json
from pathlib import Path
def memory(line):
    return int(Path('/proc/self/status').read_text().split(line + ':')[1].split()[0]) // 1024
for name in sys.stdin:
    path = Path(name.strip())
    Path('/proc/self/clear_refs').write_text('5')                     # the peak begins anew
    began, base, said = time.process_time(), memory('VmRSS'), []
    for more in ((), (24, 64)):
        try:
            frames, durations = data.read_animation(path, *more)
            assert len(frames) == len(durations) > 0 and frames.dtype == 'uint8' and min(durations) > 0
            said.append('')
        except data.UserError as error:
            said.append(str(error))
    print(json.dumps(dict(file=path.name, reasons=said, seconds=time.process_time() - began, mb=memory('VmHWM') - base)), flush=True)
"""


class Reader:
    """A process that reads the files given to it, in full and thinned; started anew where it dies or takes too long."""
    def __init__(self):
        self.process = script(READER)

    def read(self, path):
        """-> what the process says of the file, or dict(file, crash or hang)."""
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        ready = select.select([self.process.stdout], [], [], 20 * SECONDS_LIMIT)[0]                  # a stopped machine is no hang
        line = self.process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        self.process.kill()
        noise = self.process.communicate()[1]
        self.__init__()
        return dict(file=path.name, **{"crash" if ready else "hang": noise[-300:]})

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        return self.process.stderr.read()


def fuzz(folder, count, seed, source=None):
    """-> (list of what was said of each file, what came on stderr, names of the good ones)."""
    good = write_mutants(folder, count, seed, source)
    reader = Reader()
    said = [reader.read(path) for path in sorted(folder.iterdir())]
    return said, reader.close(), good


def check_fuzz(said, noise, good):
    """Every file was read or refused with its name and a reason, in the limits, and no good one was refused."""
    broken = [s for s in said if "reasons" not in s]
    assert not broken, broken[:3]
    assert not noise, noise[:300]
    for s in said:
        assert s["seconds"] <= SECONDS_LIMIT and s["mb"] <= MB_LIMIT, s
        assert all(r == "" or s["file"] in r and len(r) < 500 and "\n" not in r and not r.endswith("()") and "Memory" not in r.replace("Too much memory", "") for r in s["reasons"]), s
    assert not [s for s in said if s["file"] in good and any(s["reasons"])]


SKIP_ALL = "data.too_many_skipped = lambda done: False\ndata.run_cli(lambda: data.main(sys.argv[1:]))"


def prepare_all(folder, out, size=16):
    """Prepare the folder, however much is skipped -> ({file: reason}, files that are in the set)."""
    process = script(SKIP_ALL, "folder", folder, "--out", out, "--size", size, "--workers", 1)
    noise = process.communicate()[1]
    assert process.returncode == 0, noise[-500:]
    skipped = {s["file"]: s["reason"] for _, s in data.read_jsonl(out / "skipped.jsonl")}
    return skipped, {r["file"] for r in data.StickerSet(out).records}


def check_prepared(said, skipped, kept, good):
    assert skipped.keys() | kept == {s["file"] for s in said} and not skipped.keys() & kept and all(skipped.values())
    assert skipped.keys() == {s["file"] for s in said if s["reasons"][1]} and set(good) <= kept


def test_mutated_files_are_read_or_refused_with_a_reason(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    said, noise, good = fuzz(folder, 120, 0)
    check_fuzz(said, noise, good)
    refused = Counter(s["file"].split(".")[1] for s in said if any(s["reasons"]))
    assert all(8 <= refused[kind] < 30 for kind in LIES), refused                              # neither all nor none
    assert max(s["mb"] for s in said) > 60                            # a bomb was among them, or the measure is broken
    check_prepared(said, *prepare_all(folder, tmp_path / "set"), good)


def test_the_largest_allowed_file_stays_in_the_limits(tmp_path):
    dot = io.BytesIO()
    Image.new("RGBA", (1, 1), "red").save(dot, "WEBP", lossless=True)
    frame = b"ANMF", bytes(12) + (10).to_bytes(3, "little") + b"\0" + dot.getvalue()[12:]                 # of each frame one pixel changes
    for frames in (14, 15):
        (tmp_path / f"{frames}.webp").write_bytes(webp_of([(b"VP8X", bytes([18, 0, 0, 0]) + (4095).to_bytes(3, "little") * 2), (b"ANIM", bytes(6)), *[frame] * frames]))
    reader = Reader()
    fits, over = (reader.read(tmp_path / f"{frames}.webp") for frames in (14, 15))
    reader.close()
    assert fits["reasons"] == ["", ""] and fits["seconds"] <= SECONDS_LIMIT and 900 <= fits["mb"] <= MB_LIMIT, fits
    assert all("15 frames of 4096x4096" in reason for reason in over["reasons"]) and over["mb"] < 100, over


def test_pipes_devices_and_huge_files_are_refused_before_they_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.gif")
    with open(tmp_path / "huge.gif", "wb") as file:
        file.truncate(data.MOST_BYTES + 1)
    for path, reason in ((tmp_path / "pipe.gif", "no regular file"), ("/dev/zero", "no regular file"), (tmp_path, "no regular file"),
                         (tmp_path / "huge.gif", f"more than {data.MOST_BYTES} bytes"), ("a\0b", "null byte")):
        with pytest.raises(UserError, match=reason):
            data.read_animation(path)
    with pytest.raises(UserError, match="more than"):
        data.read_animation(bytes(data.MOST_BYTES + 1))


def test_a_worker_that_dies_names_its_file(tmp_path):
    for i in range(40):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"p{i:02}.png")
    fatal = "plain = data.decode\ndata.decode = lambda job, *a: os.kill(os.getpid(), 9) if job['file'] == 'p33.png' else plain(job, *a)\n"
    process = script(fatal + "data.run_cli(lambda: data.main(sys.argv[1:]))", "folder", tmp_path, "--out", tmp_path / "set", "--size", 8, "--workers", 2)
    noise = process.communicate(timeout=60)[1].strip().splitlines()[-1]
    assert process.returncode == 2 and "a worker died (out of memory?) while it read p33.png;" in noise, noise


# ---- archives, manifests, folders

def archive(path, members):
    """members: (name, bytes, or the kind of a link or device)."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes) and len(content) > 1:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content, "/etc/passwd"
                tar.addfile(info)
    return path


def test_archives_give_regular_stickers_alone(tmp_path):
    name = "package/assets/{}.webp"
    escapes = [("../1f600.webp", b"xx"), ("/package/assets/1f601.webp", b"xx"), ("package/assets/../1f602.webp", b"xx"), (name.format("a/../../1f603"), b"xx")]
    others = [(name.format(i), kind) for i, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE))]
    path = archive(tmp_path / "a.tgz", [*escapes, *others, (name.format("1f604"), b"good")])
    assert list(data.tar_stickers(path)) == [("1f604", b"good")] and [p.name for p in tmp_path.iterdir()] == ["a.tgz"]
    with pytest.raises(UserError, match="a.tgz: holds package/assets/1f604.webp twice"):
        list(data.tar_stickers(archive(path, [(name.format("1f604"), b"good"), (name.format("1f604"), b"evil")])))
    (stem, content), = data.tar_stickers(archive(path, [(name.format("1f605"), bytes(data.MOST_BYTES + 10**7))]))     # 77 MB in 75 kB
    assert stem == "1f605" and len(content) == data.MOST_BYTES + 1
    for broken in (path.read_bytes()[:-5000], b"no archive", b""):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="a.tgz: a broken archive .*fetch it again"):
            list(data.tar_stickers(path))


def refusal(*argv):
    with pytest.raises(UserError) as error:
        data.main([str(a) for a in argv])
    return str(error.value)


@pytest.fixture
def stickers(tmp_path):
    """A folder of 30 stickers beside a secret one."""
    folder = tmp_path / "stickers"
    folder.mkdir()
    for i in range(30):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(folder / f"p{i:02}.png")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "secret.png")
    return folder


LINE = dict(visual_path="p00.png", eng_cap="a cat", keyframe_idx=None)


@pytest.mark.parametrize("bad, reason", [
    (b'{"visual_path": "\xff"}', "not JSON"), (b"[" * 100_000, "not JSON"), (b'{"visual_path": ' + b"1" * 5000 + b"}", "not JSON"), (b"\0", "not JSON"),
    (b'{"visual_path": "p00.png", "eng_cap": "' + b"a" * 2**20 + b'"}', "longer than 1048576 bytes"), (b"[1]", "not a JSON object"),
    (b'{"visual_path": "/etc/passwd"}', "--allow-outside"), (b'{"visual_path": "a/../../secret.png"}', "--allow-outside"), (b'{"eng_cap": "x"}', "visual_path")],
    ids=range(9))
def test_bad_lines_of_a_manifest_are_refused_by_number_before_anything_slow(stickers, bad, reason):
    manifest, out = stickers.parent / "m.jsonl", stickers.parent / "set"
    manifest.write_bytes(json.dumps(LINE).encode() + b"\n" + bad + b"\n")
    line = refusal("vsd2m", manifest, "--root", stickers, "--out", out)
    assert "m.jsonl, line 2: " in line and reason in line and len(line) < 400 and not list(stickers.parent.glob(".set.part"))


def test_a_line_without_end_takes_no_memory(tmp_path):
    with open(tmp_path / "m.jsonl", "wb") as file:
        file.truncate(2**34)
    with pytest.raises(UserError, match="m.jsonl, line 1: longer than"):
        next(data.read_jsonl(tmp_path / "m.jsonl"))


def test_unusable_captions_names_and_links_are_skipped_with_a_reason(stickers):
    """They are properties of one sticker, which a manifest of millions survives; duplicates are two stickers."""
    (stickers / "link.png").symlink_to(stickers.parent / "secret.png")
    (stickers / "inside.png").symlink_to(stickers / "p01.png")
    (stickers / "up").symlink_to(stickers.parent)
    bad = [dict(eng_cap=""), dict(eng_cap="a" * 2001), dict(eng_cap="half \ud800"), dict(visual_path="p\0.png"), dict(visual_path="link.png"), dict(visual_path="up/secret.png")]
    lines = [dict(LINE, **more) for more in bad] + [dict(LINE, visual_path="inside.png"), dict(LINE, keyframe_idx=[10**30, -5, 0])] * 60
    (stickers.parent / "m.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    argv = ["vsd2m", stickers.parent / "m.jsonl", "--root", stickers, "--size", 8, "--workers", 1]
    data.main([*map(str, argv), "--out", str(stickers.parent / "set")])
    reasons = [s["reason"] for _, s in data.read_jsonl(stickers.parent / "set/skipped.jsonl")]
    for reason, words in zip(reasons, ("no caption", "a caption of 2001 characters", "surrogate", "a NUL", "--allow-outside follows it", "--allow-outside follows it"), strict=True):
        assert words in reason
    assert len(data.StickerSet(stickers.parent / "set")) == 120
    data.main([*map(str, argv), "--out", str(stickers.parent / "open"), "--allow-outside"])
    assert len(data.StickerSet(stickers.parent / "open")) == 122


def test_folders_do_not_lead_outside(stickers):
    out, captions, note = stickers.parent / "set", stickers / "captions.jsonl", stickers / "p00.txt"
    (stickers.parent / "secret.txt").write_text("secret")
    note.symlink_to(stickers.parent / "secret.txt")
    assert "p00.txt: a link out of" in refusal("folder", stickers, "--out", out)
    note.unlink()
    note.write_text("long " * 10**6)
    (stickers / "link.png").symlink_to(stickers.parent / "secret.png")
    assert "2 of 31 stickers cannot be used" in refusal("folder", stickers, "--out", stickers.parent / "new")
    note.unlink()
    data.main(["folder", str(stickers), "--out", str(out), "--size", "8"])
    assert ["link.png"] == [s["file"] for _, s in data.read_jsonl(out / "skipped.jsonl")]
    for path in ("/etc/passwd", "../secret.png"):
        captions.write_text(json.dumps(dict(file=path, caption="x")) + "\n")
        line = refusal("folder", stickers, "--out", stickers.parent / "other")
        assert "captions.jsonl, line 1:" in line and "--allow-outside" in line
    data.main(["folder", str(stickers), "--allow-outside", "--out", str(stickers.parent / "open"), "--size", "8"])
    assert [r["file"] for r in data.StickerSet(stickers.parent / "open").records] == ["../secret.png"]


# ---- prepared sets

def edit_meta(**more):
    return lambda folder: (folder / "meta.json").write_text(json.dumps(dict(json.loads((folder / "meta.json").read_text()), **more)))


def edit_table(column, row, value):
    def edit(folder):
        table = np.load(folder / "index.npy")
        table[column][row] = value
        np.save(folder / "index.npy", table)
    return edit


def lie_of_length(folder):
    (folder / "index.npy").write_bytes((folder / "index.npy").read_bytes().replace(b"(4,)", b"(9" + b"9" * 11 + b",)", 1))


@pytest.mark.parametrize("damage, culprit", [
    (edit_meta(size=float("inf")), "meta.json"), (edit_meta(size=-8), "meta.json"), (edit_meta(shards=[-1, 1]), "meta.json"), (edit_meta(groups=None), "meta.json"),
    (edit_meta(stickers=10**12), "index.npy"), (edit_meta(size=9), "frames-00000.bin"), (lambda f: (f / "meta.json").write_text("[" * 10**5), "meta.json"),
    (lambda f: (f / "meta.json").write_bytes(b"\xff"), "meta.json"), (edit_table("n", 1, 1000), "index.npy"), (edit_table("end", 1, 10**15), "index.npy"),
    (edit_table("split", 0, 3), "index.npy"), (edit_table("group", 0, 99), "index.npy"), (edit_table("n", 1, 0), "index.npy"), (lie_of_length, "index.npy"),
    (lambda f: (f / "frames-00000.bin").write_bytes((f / "frames-00000.bin").read_bytes()[:-1]), "frames-00000.bin")], ids=range(15))
def test_damaged_sets_are_refused_when_they_are_opened(tmp_path, damage, culprit):
    data.main(["synthetic", "--n", "4", "--out", str(tmp_path / "set"), "--size", "8", "--workers", "1"])
    damage(tmp_path / "set")
    with pytest.raises(UserError, match=f"{culprit}: .*prepare it again"):
        data.StickerSet(tmp_path / "set", groups=["star"])


def test_a_line_of_the_index_with_wrong_frames_is_named_when_it_is_read(tmp_path):
    data.main(["synthetic", "--n", "4", "--out", str(tmp_path / "set"), "--size", "8", "--workers", "1"])
    index = tmp_path / "set/index.jsonl"
    index.write_text(index.read_text().replace('"first": 0}', '"first": 9}'))
    with pytest.raises(UserError, match="index.jsonl, line 1: its frames are not those of index.npy"):
        data.StickerSet(tmp_path / "set").records[0]


@pytest.mark.parametrize("more", [dict(lengths=None), dict(lengths=[1]), dict(shape=["x"]), dict(lengths=[-1])])
def test_damaged_latents_are_refused_when_they_are_opened(tmp_path, more):
    data.main(["synthetic", "--n", "4", "--out", str(tmp_path / "set"), "--size", "8", "--workers", "1"])
    n = data.read_meta(tmp_path / "set")["frames"]
    data.write_latents(tmp_path / "set", "a" * 64, n, (1, 2, 2), lambda _: [(np.zeros((n, 1, 2, 2)),) * 2])
    edit_meta(**more)(tmp_path / f"set/latents-{'a' * 12}")
    with pytest.raises(UserError, match="latents-a.* let train.py write it again"):
        data.open_latents(tmp_path / "set", "a" * 64)


# ---- two jobs on one folder

TAKE = "lock = data.hold(sys.argv[1], 'the run', wait=True)\n"


def test_a_lock_names_its_owner_and_ends_with_it_though_its_worker_lives(tmp_path):
    path = tmp_path / "run/lock"
    owner = script(TAKE + "worker = os.fork()\nif worker:\n    print(worker, flush=True)\ntime.sleep(60)", path)
    worker = int(owner.stdout.readline())
    try:
        for _ in range(2):
            with pytest.raises(UserError, match=rf"^the run is being written by process {owner.pid} on \S+; wait"):
                data.hold(path, "the run")
        waiting = script(TAKE + "print('mine')", path)
        assert waiting.stderr.readline() == f"the run is being written by process {owner.pid} on {socket.gethostname()}: waiting for it\n"
        owner.kill()
        owner.wait()
        assert waiting.communicate(timeout=30)[0] == "mine\n"
        lock = data.hold(path, "the run")
        assert path.read_text() == f"{os.getpid()} on {socket.gethostname()}"
        lock.close()
        data.hold(path, "the run").close()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_lock_whose_folder_was_removed_is_taken_anew(tmp_path):
    path = tmp_path / "run/lock"
    lock = data.hold(path, "the run")
    waiting = script(TAKE + "print('mine', flush=True)\ntime.sleep(60)", path)
    waiting.stderr.readline()
    shutil.rmtree(path.parent)
    lock.close()
    assert waiting.stdout.readline() == "mine\n"
    with pytest.raises(UserError, match=f"written by process {waiting.pid} on "):
        data.hold(path, "the run")
    waiting.kill()


PREPARE = "plain = data.decode\ndata.decode = lambda *a: time.sleep(0.05) or plain(*a)\ndata.run_cli(lambda: data.main(sys.argv[1:]))"


def test_two_processes_on_one_set(tmp_path, capsys):
    """The second is refused while the first lives, goes on where it was killed, and finds the set finished where it was not."""
    argv = ["synthetic", "--n", "64", "--size", "8", "--workers", "1", "--out", str(tmp_path / "set")]
    data.main([*argv[:-1], str(tmp_path / "alone")])
    first = script(PREPARE, *argv)
    while not list(tmp_path.glob(".set.part/blocks/block-*.jsonl")):
        assert first.poll() is None
        time.sleep(0.01)
    with pytest.raises(UserError, match=f"set is being written by process {first.pid} on "):
        data.main(argv)
    first.kill()
    first.wait()
    second = script(PREPARE, *argv)
    assert "going on behind" in second.stdout.readline()
    hold = data.hold

    def late(path, *more):                                            # asks for the lock when the other has just finished
        assert second.wait(60) == 0
        return hold(path, *more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "hold", late)
        capsys.readouterr()
        data.main(argv)
    assert "set: already prepared (64 stickers" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "set"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "set").iterdir()} == {p.name: p.read_bytes() for p in (tmp_path / "alone").iterdir()}


ENCODE = """import numpy as np
def batches(start):
    print(start, flush=True)
    for i in range(start, 60):
        time.sleep(60 * (i == int(sys.argv[2])))
        yield np.full((2, 1, 1, 2, 2), i)                             # mean and logvar of a frame
data.LATENT_ROWS = 10
data.write_latents(sys.argv[1], "a" * 64, 60, (1, 2, 2), batches)"""


def test_two_processes_on_one_cache_of_latents(stickers16, tmp_path):
    """The second waits, goes on behind what a killed one wrote, and encodes nothing where another has finished."""
    shutil.copytree(stickers16, tmp_path / "set", ignore=shutil.ignore_patterns("latents-*", ".latents-*"))
    first = script(ENCODE, tmp_path / "set", 25)
    assert first.stdout.readline() == "0\n"
    others = [script(ENCODE, tmp_path / "set", -1) for _ in range(2)]
    for other in others:
        assert f"is being written by process {first.pid} on {socket.gethostname()}: waiting" in other.stderr.readline()
    while len(list(tmp_path.glob("set/.latents-*.part/logvar-*.bin"))) < 2:
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    first.wait()
    said = [other.communicate(timeout=60)[0] for other in others]
    assert sorted(said) == ["", "20\n"]
    mean, logvar = data.open_latents(tmp_path / "set", "a" * 64)
    assert np.asarray(mean)[:, 0, 0, 0].tolist() == list(range(60)) and np.array_equal(mean, logvar)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source", help="an archive of stickers as `python data.py fluent` fetches it, or a folder of WebP files; default: drawn ones")
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "files"
        folder.mkdir()
        said, noise, good = fuzz(folder, o.files, o.seed, o.source)
        print(f"{o.files} mutated files of {len(good)} good ones: {sum('crash' in s for s in said)} crashes, {sum('hang' in s for s in said)} hangs, "
              f"{len(noise.splitlines())} lines on stderr")
        whole = [s for s in said if "reasons" in s]
        for kind in LIES:
            mutants = [s for s in whole if s["file"].startswith("bad") and s["file"].endswith("." + kind)]
            slowest = max(mutants, key=lambda s: s["seconds"])
            print(f"{kind:5} {sum(any(s['reasons']) for s in mutants):4} refused {sum(not any(s['reasons']) for s in mutants):4} read, "
                  f"slowest {slowest['seconds']:.1f} s ({slowest['file']})")
        print(f"peak {max(s['mb'] for s in whole)} MB beside Python and torch, in full and thinned", flush=True)
        check_fuzz(said, noise, good)
        skipped, kept = prepare_all(folder, Path(temporary) / "set")
        check_prepared(said, skipped, kept, good)
        print(f"data.py folder: {len(skipped)} skipped with a reason, {len(kept)} in the set, {len(good)} good ones among them")


if __name__ == "__main__":
    main()
