"""Files and neighbours that are not to be trusted: mutated media, bad archives and manifests, damaged sets, two jobs on one folder.

    python tests/test_hostile.py --files 2000 --seed 0 --source data/npm/lobehub-fluent-emoji-anim-3-1.0.0.tgz

fuzzes so many files made from real stickers (an archive, or a folder of WebP files) and prints a table; `make test` fuzzes fewer, made from drawn ones.
"""
import argparse
import io
import itertools
import json
import os
import random
import resource
import select
import shutil
import signal
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


PNG_FIELDS = {b"IHDR": ((0, 4), (4, 4), (8, 1), (9, 1), (12, 1)), b"acTL": ((0, 4), (4, 4)),
              b"fcTL": ((0, 4), (4, 4), (8, 4), (12, 4), (16, 4), (20, 2), (22, 2), (24, 1), (25, 1)), b"fdAT": ((0, 4),), b"PLTE": ((0, 1),)}


def png_lie(content, rng):
    """A wrong header field, chunks out of order, twice, missing, or compressed bombs: all with a right checksum."""
    chunks = png_chunks(content)
    kind = rng.choice(("field",) * 6 + ("double", "drop", "swap", "iCCP", "zTXt", "IDAT", "many", "fcTL"))
    i = rng.randrange(len(chunks))
    if kind == "field":
        i, fields = rng.choice([(i, PNG_FIELDS[name]) for i, (name, _) in enumerate(chunks) if name in PNG_FIELDS])
        at, size = rng.choice(fields)
        chunks[i] = chunks[i][0], put(chunks[i][1], at, size, rng.choice(SIZES), "big")
    elif kind == "double":
        chunks.insert(i, rng.choice(chunks))
    elif kind == "drop":
        del chunks[i]
    elif kind == "swap":
        j = rng.randrange(len(chunks))
        chunks[i], chunks[j] = chunks[j], chunks[i]
    elif kind == "many":                                              # frames that the header does not count
        chunks[i:i] = [c for c in chunks if c[0] in (b"fcTL", b"fdAT")] * 300
    elif kind == "fcTL":
        chunks[1:1] = [(b"fcTL", struct.pack(">IIIIIHHBB", i, *(rng.choice(SIZES) for _ in range(4)), 1, 0, 9, 9)) for i in range(100)]
    elif kind == "IDAT":
        chunks = [(name, bomb(70) if name == b"IDAT" else body) for name, body in chunks]
        chunks[0] = b"IHDR", struct.pack(">II", *rng.choice(((4096, 4096), (8, 8), (65535, 65535)))) + chunks[0][1][8:]
    else:
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
    i = rng.randrange(len(chunks))
    if kind == "field":
        i, fields = rng.choice([(i, WEBP_FIELDS[name]) for i, (name, _) in enumerate(chunks) if name in WEBP_FIELDS])
        at, size = rng.choice(fields)
        chunks[i] = chunks[i][0], put(chunks[i][1], at, size, rng.choice(SIZES), "little")
    elif kind == "double":
        chunks.insert(i, rng.choice(chunks))
    elif kind == "drop":
        del chunks[i]
    elif kind == "swap":
        j = rng.randrange(len(chunks))
        chunks[i], chunks[j] = chunks[j], chunks[i]
    elif kind == "many":                                              # frames of the smallest kind, as many as 100,000
        chunks += [min((c for c in chunks if c[0] == b"ANMF"), key=lambda c: len(c[1]), default=chunks[0])] * (1500 if rng.random() < 0.5 else 100_000)
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
        return head + b"".join(blocks[:i]) + blocks[i][:-1] + b"\x01\x00"[:1] * rng.choice((1, 10**6))
    elif kind == "many":
        blocks = blocks[:i] + blocks[i:i + 1] * rng.choice((1000, 100_000 * 1000 // max(1000, len(blocks[i])))) + blocks[i:]
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

READER = """import json, resource
from pathlib import Path
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
print(peak(), flush=True)
for name in sys.stdin:
    size, path = (64, 24), Path(name.strip())
    began, said = time.process_time(), []
    for more in ((), (24, 64)):
        try:
            frames, durations = data.read_animation(path, *more)
            assert len(frames) == len(durations) > 0 and frames.dtype == 'uint8' and min(durations) > 0
            said.append('')
        except data.UserError as error:
            said.append(str(error))
    print(json.dumps(dict(file=path.name, reasons=said, seconds=time.process_time() - began, mb=peak())), flush=True)
"""


class Reader:
    """A process that reads the files given to it, in full and thinned; started anew where it dies or takes too long."""
    def __init__(self):
        self.process = script(READER)
        self.base = int(self.process.stdout.readline())

    def read(self, path):
        """-> what the process says of the file, or dict(file, crash or hang)."""
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        ready = select.select([self.process.stdout], [], [], 20 * SECONDS_LIMIT)[0]                  # a stopped machine is no hang
        line = self.process.stdout.readline() if ready else ""
        if line:
            found = json.loads(line)
            return dict(found, mb=found["mb"] - self.base)
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
    said, noise, good = fuzz(folder, 240, 0)
    check_fuzz(said, noise, good)
    refused = Counter(s["file"].split(".")[1] for s in said if any(s["reasons"]))
    assert all(15 <= refused[kind] < 60 for kind in LIES), refused                              # neither all nor none
    check_prepared(said, *prepare_all(folder, tmp_path / "set"), good)


# ---- two jobs on one folder

TAKE = "lock = data.hold(sys.argv[1], 'the run', wait=True)\n"


def test_a_lock_names_its_owner_and_ends_with_it_though_its_worker_lives(tmp_path):
    path = tmp_path / "run/lock"
    owner = script(TAKE + "worker = os.fork()\nif worker:\n    print(worker, flush=True)\ntime.sleep(60)", path)
    worker = int(owner.stdout.readline())
    try:
        for _ in range(2):
            with pytest.raises(UserError, match=f"^the run is being written by process {owner.pid}; wait"):
                data.hold(path, "the run")
        waiting = script(TAKE + "print('mine')", path)
        assert waiting.stderr.readline() == f"the run is being written by process {owner.pid}: waiting for it\n"
        owner.kill()
        owner.wait()
        assert waiting.communicate(timeout=30)[0] == "mine\n"
        lock = data.hold(path, "the run")
        assert path.read_text() == str(os.getpid())
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
    with pytest.raises(UserError, match=f"written by process {waiting.pid};"):
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
    with pytest.raises(UserError, match=f"set is being written by process {first.pid};"):
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
        assert f"is being written by process {first.pid}: waiting" in other.stderr.readline()
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
        print(f"peak {max(s['mb'] for s in whole)} MB beside Python and torch", flush=True)
        check_fuzz(said, noise, good)
        skipped, kept = prepare_all(folder, Path(temporary) / "set")
        check_prepared(said, skipped, kept, good)
        print(f"data.py folder: {len(skipped)} skipped with a reason, {len(kept)} in the set, {len(good)} good ones among them")


if __name__ == "__main__":
    main()
