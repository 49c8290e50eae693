"""Jobs of lib/media/sources.py -> a prepared set, and reading one.

A set is a folder: frames-NNNNN.bin (uint8 RGBA, frame-major, of consecutive stickers), index.jsonl (a line a sticker),
index.npy (COLUMNS of each line), skipped.jsonl (files that could not be used, and why) and meta.json.
"""
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, parent_process

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from lib.media.index import COLUMNS, SPLITS, VERSION, read_meta
from lib.media.pictures import decode_frames, durations_of_kept, square, thin
from lib.media.sources import MAX_CAPTION, STILL_MOTIONS, lies_in, move, split_of
from lib.media.vectors import drawn
from lib.run.files import UserError, clutter, lock, read_json, read_jsonl, real_folder, rename_durably, write_json

SHARD_JOBS, SHARD_BYTES = 256, 2 * 10**9         # at most, of a shard
MAX_SKIPPED = 0.05


def prepare(out, size, source, jobs, describe, workers=2, most=24, total=None, read=dict, licences=None):
    """Decode what `jobs()` yields, `total` of them if that is known, into the prepared set `out`.

    Workers call read(job) -> dict(file, source, caption, keywords, concept, group) and describe(frames) -> more of the
    index record. One worker writes a shard of consecutive jobs, so the set is the same at any number of workers. Shards
    gather in `.NAME.part` beside `out`, which is renamed at the end; a killed run goes on behind its whole shards.
    licences: of the stickers, for meta.json. UserError: `out` holds something else or is being written, a worker died,
    more than 5 % cannot be used."""
    out = real_folder(out)                       # beside it, on its disk, the shards gather
    part = out.with_name(f".{out.name}.part")
    wanted = dict(size=size, version=VERSION, source=source, most_frames=most)
    with lock(out.with_name(f".{out.name}.lock"), out):
        if already_prepared(out, wanted):
            return
        # Frames of a shard fit its file; a small set has enough shards to keep several workers busy.
        length = max(1, min(SHARD_BYTES // (4 * size * size * most), SHARD_JOBS, max(16, (total or 2048) // 32)))
        items, done = iter(jobs()), finished_shards(part, wanted)
        if done:
            print(f"{out}: going on behind {count(done, 'jobs')} stickers of an interrupted run", flush=True)
        work = functools.partial(write_shard, part, size, most, read, describe)
        try:
            write_shards(work, items, length, workers, done, total)
        except BrokenProcessPool:
            raise UserError(f"{out}: a worker died (out of memory?); the same command goes on from here") from None
        refuse_skipped(part, done)
        write_index(part, [done[number] for number in sorted(done)], dict(wanted, licences=licences or []))
        publish(part, out)
    stickers, frames, skipped = (count(done, key) for key in ("stickers", "frames", "skipped"))
    print(f"{out}: {stickers} stickers, {frames} frames; {skipped} skipped", flush=True)


def already_prepared(out, wanted):
    """True if `out` holds what is wanted, False if nothing is there. UserError: anything else."""
    if not out.exists() or out.is_dir() and all(clutter(path.name) for path in out.iterdir()):
        return False
    found = read_meta(out) if (out / "meta.json").is_file() else {}
    if {k: found.get(k) for k in wanted} != wanted:
        found = found.get("source", "no prepared set")
        raise UserError(f"{out} exists and holds something else ({found}); remove it or give another --out")
    print(f"{out}: already prepared ({found['stickers']} stickers, {found['frames']} frames)")
    return True


def publish(part, out):
    """Give a finished set its name. Into a folder that cannot be replaced (not empty, or another disk's) its files go
    one by one, meta.json last."""
    with contextlib.suppress(OSError):
        if out.exists():
            out.rmdir()
        part.rename(out)
    if part.exists():
        for path in sorted(part.iterdir(), key=lambda path: path.name == "meta.json"):
            if path.name != "parts":
                shutil.move(path, out / path.name)
        shutil.rmtree(part)
    else:
        shutil.rmtree(out / "parts")


def finished_shards(part, wanted):
    """{number: summary} of the shards that an interrupted run finished. UserError: it was a run of something else."""
    (part / "parts").mkdir(parents=True, exist_ok=True)
    found, finished = read_json(part / "meta.json"), sorted(part.glob("parts/*.jsonl"))
    changed = ", ".join(f"{k} {found.get(k)} there, {wanted[k]} here" for k in wanted if found.get(k) != wanted[k])
    if finished and changed:
        raise UserError(f"{part} holds an interrupted run of something else ({changed}); "
                        "remove it, or give another --out")
    write_json(part / "meta.json", wanted)
    for path in part.rglob("*.tmp"):
        path.unlink()
    return {int(path.stem): next(read_jsonl(path))[1] for path in finished}


def count(shards, key):
    return sum(summary[key] for summary in shards.values())


def write_shards(work, jobs, length, workers, done, total):
    """work(number, chunk of jobs) of shards that are not done; summaries go to `done`. Stops if too much is skipped."""
    chunks = enumerate(iter(lambda: list(itertools.islice(jobs, length)), []))
    quiet = {} if sys.stderr.isatty() else dict(mininterval=60, delay=60)
    bar = tqdm(desc="stickers", total=total, initial=count(done, "jobs"), **quiet)

    def record(future):
        summary = future.result()
        done[summary["number"]] = summary
        bar.update(summary["jobs"])
    pool, running = ProcessPoolExecutor(workers, initializer=start_worker), deque()
    try:
        for number, chunk in chunks:
            if number in done:
                continue
            if len(running) == 2 * workers:      # no more at a time: jobs may hold the files' bytes
                record(running.popleft())
            if bar.n >= 1000 and too_many_skipped(done):
                while running:                   # they count too: fewer than 5 % after all, and the rest must be read
                    record(running.popleft())
                if too_many_skipped(done):
                    break
            running.append(pool.submit(work, number, chunk))
        for future in running:
            record(future)
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()


def start_worker():
    """Worker: Ctrl-C ends it without a traceback, and it ends with the main process however that ends.

    Products of one thread: as many threads a worker as there are cores wait for each other most of the time."""
    threadpool_limits(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    wait = lambda: (connection.wait([parent_process().sentinel]), os._exit(1))
    threading.Thread(target=wait, daemon=True).start()


def write_shard(part, size, most, read, describe, number, jobs):
    """Worker: write a shard's frames, then its lines: a summary, index records, what was skipped. -> summary."""
    temporary, room = part / f"{number}-{os.getpid()}.tmp", np.empty((most, size, size, 4), np.uint8)
    lines, skipped, pixels, frames_before, digest = [], [], [], 0, hashlib.sha256()
    with open(temporary, "wb") as file:
        for job in map(read, jobs):
            try:
                record, frames = decode(job, size, most, room)
            except UserError as error:
                skipped.append(dict(file=job["file"], reason=str(error)))
                continue
            lines.append(dict(record, **describe(frames)))
            file.write(frames)
            digest.update(frames)
            digest.update(json.dumps(lines[-1]).encode())
            pixels.append(hashlib.sha256(frames).hexdigest()[:20])
            frames_before += len(frames)
    summary = dict(number=number, jobs=len(jobs), stickers=len(lines), skipped=len(skipped), frames=frames_before,
                   pixels=pixels, reasons=[s["reason"] for s in skipped[:3]], sha256=digest.hexdigest())
    rename_durably(temporary, part / f"frames-{number:05}.bin")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in [summary, *lines, *skipped]))
    rename_durably(temporary, part / f"parts/{number:05}.jsonl")             # last: where it is, the frames are
    return summary


def decode(job, size, most, room):
    """Job -> index record without `first`, frames (n, size, size, 4). UserError: the reason why it is skipped."""
    check_job(job)
    source = drawn(job["icon"], size, STILL_MOTIONS.get(job.get("motion"))) if "icon" in job else job["source"]
    keep = job.get("keep", ())
    if isinstance(source, tuple):                # frames and durations, drawn in the worker
        kept = thin(len(source[0]), most)
        frames, durations = square(source[0][kept], size), durations_of_kept(source[1], kept)
    else:
        frames, durations, kept = decode_frames(source, job["file"], most, size, keep, room)
    if "motion" in job and "icon" not in job:    # whose frames are drawn as they move
        frames = move(frames[0], job["motion"])
        durations = [100] * len(frames)
    record = {name: job[name] for name in ("file", "caption", "keywords", "concept", "group")}
    record.update(split=job.get("split") or split_of(job["concept"]), n=len(frames), durations=durations)
    if "style" in job:
        record["style"] = job["style"]
    if keep:
        record["keyframe_idx"] = [i for i, frame in enumerate(kept) if frame in keep]
    return record, frames


def check_job(job):
    """UserError for what can be refused before the file is opened. job["root"]: the folder that it must not leave."""
    file, caption, root = job["file"], job["caption"], job.get("root")
    if not caption.strip():
        raise UserError(f"{file}: no caption")
    if len(caption) > MAX_CAPTION:
        raise UserError(f"{file}: a caption of {len(caption)} characters; at most {MAX_CAPTION} can be used")
    if re.search("[\0\ud800-\udfff]", caption + file):
        raise UserError(f"{file}: a NUL or half a surrogate pair in the caption or the name")
    if root and not lies_in(root, job["source"]):
        raise UserError(f"{file}: a link out of {root}; --allow-outside follows it")


def too_many_skipped(done):
    return count(done, "skipped") > MAX_SKIPPED * count(done, "jobs")


def refuse_skipped(part, done):
    """UserError where too much was skipped, or nothing remains. The next run tries shards with skipped files again."""
    if count(done, "stickers") and not too_many_skipped(done):
        return
    bad = [number for number in sorted(done) if done[number]["skipped"]]
    for number in bad:
        (part / f"parts/{number:05}.jsonl").unlink()
    if len(bad) == len(done):
        shutil.rmtree(part)
    reasons = [reason for number in bad for reason in done[number]["reasons"]][:3]
    raise UserError(f"{count(done, 'skipped')} of {count(done, 'jobs')} stickers cannot be used "
                    f"(at most {100 * MAX_SKIPPED:.0f} % may be skipped): {'; '.join(reasons)}")


def join_concepts(part, shards):
    """{concept: the first of all that share a picture with it, directly or through others}, of those that share any.

    A picture with several captions would otherwise be trained on under one and held out under another. Drawings of
    emoji (with a style) have concepts of their own."""
    first, parent = {}, {}

    def root(name):
        while parent.get(name, name) != name:
            name = parent[name]
        return name
    for shard in shards:
        lines = read_jsonl(part / f"parts/{shard['number']:05}.jsonl")
        pixels = next(lines)[1].get("pixels", [])
        for key, (_, record) in zip(pixels, lines):
            if "style" not in record:
                a, b = sorted((root(record["concept"]), root(first.setdefault(key, record["concept"]))))
                if a != b:
                    parent[b] = a
    return {name: root(name) for name in parent}


def write_index(part, shards, wanted):
    """Write index.jsonl, index.npy, skipped.jsonl and at last meta.json from the lines of the shards."""
    table, groups, concepts = np.zeros(sum(s["stickers"] for s in shards), COLUMNS), {}, {}
    row, first, joined = 0, 0, join_concepts(part, shards)
    files = [part / f"{name}.tmp" for name in ("index.jsonl", "index.npy", "skipped.jsonl")]
    with open(files[0], "wb") as index, open(files[1], "wb") as columns, open(files[2], "w") as skipped:
        for shard in shards:
            lines = [line for _, line in read_jsonl(part / f"parts/{shard['number']:05}.jsonl")][1:]
            for record in lines[:shard["stickers"]]:
                if record["concept"] in joined and "style" not in record:
                    record["concept"] = joined[record["concept"]]
                    record["split"] = split_of(record["concept"])
                index.write(json.dumps(dict(record, first=first)).encode() + b"\n")
                group = groups.setdefault(record["group"], len(groups))
                concept = concepts.setdefault(record["concept"], len(concepts))
                table[row] = index.tell(), record["n"], SPLITS.index(record["split"]), group, concept
                row, first = row + 1, first + record["n"]
            skipped.writelines(json.dumps(line) + "\n" for line in lines[shard["stickers"]:])
        rank = np.empty(len(concepts), np.uint32)
        rank[[concepts[name] for name in sorted(concepts)]] = np.arange(len(concepts))
        table["concept"] = rank[table["concept"]]
        np.save(columns, table)
    for file in files:
        rename_durably(file, file.with_suffix(""))
    digest = hashlib.sha256("".join(s["sha256"] for s in shards).encode()).hexdigest()
    lengths = [s["frames"] for s in shards]
    meta = dict(wanted, frames=first, stickers=row, hash=digest, groups=list(groups), shards=lengths)
    write_json(part / "meta.json", meta)
