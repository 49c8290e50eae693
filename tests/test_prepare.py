"""lib/media/prepare.py: the same set at any number of workers and after any kill; what is refused; reading a set."""
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_media import moving_square
from threadpoolctl import threadpool_info, threadpool_limits

from lib.media import prepare as prepare_module
from lib.media.index import Index
from lib.media.pictures import read_animation, write_animation
from lib.media.prepare import prepare
from lib.media.sources import plain_job, split_of
from lib.run.files import UserError, read_jsonl

ROOT = Path(__file__).resolve().parent.parent


def sizes(frames):
    """Stands for data.key_table."""
    return dict(mean=int(frames.mean()))


def stall(job):
    """A worker that says so at the 112th job, the last of shard 6, and goes on no more."""
    if job["caption"].startswith("sticker 112 "):
        os.write(1, b"stalled\n")
        signal.pause()
    return job


def die(job):
    if job["file"] == "fatal":
        os.kill(os.getpid(), signal.SIGKILL)
    return job


def count_threads(job):
    return dict(job, keywords=[str(library["num_threads"]) for library in threadpool_info()])


def jobs_of(folder, n=320):
    """Jobs of 12 small files, in turn; every fortieth is broken."""
    files = sorted(p.name for p in folder.glob("*.*") if p.name != "broken.webp")
    names = enumerate((files[i % 12] if i % 40 else "broken.webp" for i in range(1, n + 1)), 1)
    return [plain_job(name, folder / name, f"sticker {i} of {i % 50}", [0, 2] if i % 3 else []) for i, name in names]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    for i in range(12):
        frames = moving_square(1 if i % 2 else 3 + i, (16, 36))
        frames[..., 0] = 20 * i
        write_animation(root / f"{i:02}.{('webp', 'gif', 'png')[i % 3]}", frames, 40)
    (root / "broken.webp").write_bytes(b"RIFF")
    return root


def make(files, out, n=320, source="test", size=8, **options):
    prepare(out, size, source, lambda: jobs_of(files, n), sizes, total=n, **options)
    return out


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    return make(files, tmp_path_factory.mktemp("whole") / "set", workers=1)


def test_the_set_is_the_same_at_any_number_of_workers_and_is_not_written_over(files, whole, tmp_path, capsys):
    out = make(files, tmp_path / "set", workers=3)
    assert contents(out) == contents(whole) and sorted(p.name for p in tmp_path.iterdir()) == [".set.lock", "set"]
    make(files, out)
    assert "already prepared (312 stickers" in capsys.readouterr().out
    for other in (dict(size=12), dict(source="another"), dict(most=5)):
        with pytest.raises(UserError, match=r"holds something else \(test\); remove it or give another"):
            make(files, out, **other)


def test_a_picture_is_in_one_split_whatever_its_captions(files, tmp_path):
    """Captions of one picture are one concept, also through another picture that shares one of them."""
    captions = [[f"picture {i} as {j} see it" for j in range(5)] for i in range(6)]
    captions[5].append(captions[4][0])                                   # the last two share a caption
    prepare(tmp_path / "set", 8, "test", lambda: [
        plain_job(f"{i}-{j}", files / f"{i:02}.{('webp', 'gif', 'png')[i % 3]}", caption)
        for i, group in enumerate(captions) for j, caption in enumerate(group)], sizes)
    found = {}
    for record in Index(tmp_path / "set"):
        found.setdefault(record["file"].split("-")[0], set()).add((record["concept"], record["split"]))
    assert all(len(places) == 1 for places in found.values()) and found["4"] == found["5"] != found["0"]
    (concept, split), = found["4"]
    assert concept == min(captions[4] + captions[5]) and split == split_of(concept)
    assert len({concept for places in found.values() for concept, _ in places}) == 5


def test_links_and_folders_that_are_there(files, whole, tmp_path):
    """A link to another disk's folder, there or not yet; what systems leave in a folder; a folder that stays."""
    places = [tmp_path / "big/empty", tmp_path / "big/later", tmp_path / "clutter"]
    places[0].mkdir(parents=True)
    places[2].mkdir()
    (places[2] / ".DS_Store").touch()
    for i, place in enumerate(places[:2]):
        (tmp_path / f"link{i}").symlink_to(place)
    for out in (tmp_path / "link0", tmp_path / "link1", places[2]):
        make(files, out, workers=1)
    for place in places:
        assert {k: v for k, v in contents(place).items() if k != ".DS_Store"} == contents(whole)
    assert (tmp_path / "link0").is_symlink() and (places[2] / ".DS_Store").exists()
    assert not [p for p in tmp_path.rglob("*.part")]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.tex").touch()
    with pytest.raises(UserError, match="thesis exists and holds something else .no prepared set."):
        make(files, tmp_path / "thesis")


def test_records_and_frames_are_those_of_the_files(files, whole):
    index = Index(whole)
    assert len(index) == index.meta["stickers"] == 312 and len(index.meta["shards"]) == 20     # 320 jobs, 16 a shard
    for record in (index[0], index[150], index[-1]):
        number = int(record["caption"].split()[1])
        frames, durations = read_animation(files / record["file"], 24, 8)
        assert np.array_equal(index.frames[record["first"]:record["first"] + record["n"]], frames)
        assert record["durations"] == durations and record["mean"] == int(frames.mean())
        assert record.get("keyframe_idx") == ([i for i in (0, 2) if i < record["n"]] if number % 3 else None)
    skipped = [line for _, line in read_jsonl(whole / "skipped.jsonl")]
    assert [s["file"] for s in skipped] == ["broken.webp"] * 8 and "cannot be read as an image" in skipped[0]["reason"]
    assert all(s["file"] != "broken.webp" for s in index)             # left out, never swapped for another
    assert list(index.select([5, 2])) == [index[5], index[2]] and index[40:42] == [index[40], index[41]]
    names = sorted({r["concept"] for r in index})
    assert [names[c] for c in index.columns["concept"]] == [r["concept"] for r in index]


def test_a_killed_run_goes_on_behind_its_whole_shards(files, whole, tmp_path, capsys):
    out, part = tmp_path / "set", tmp_path / ".set.part"
    code = "import sys, test_prepare as t, pathlib; t.make(*map(pathlib.Path, sys.argv[1:]), read=t.stall)"
    process = subprocess.Popen([sys.executable, "-c", code, files, out], stdout=subprocess.PIPE,
                               env=dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}"))
    try:
        assert process.stdout.readline() == b"stalled\n"      # of shards 0 to 5 the other worker has one at most
        with pytest.raises(UserError, match="set is being written by another process"):
            make(files, out)
    finally:
        process.kill()
    process.communicate(timeout=60)              # ends when no worker has the pipe any more
    finished = [f"frames-{p.stem}.bin" for p in part.glob("parts/*.jsonl")]
    time_of = {name: (part / name).stat().st_mtime_ns for name in finished}
    assert 5 <= len(time_of) < 20 and not out.exists()
    for other, reason in ((dict(size=12), "size 8 there, 12 here"), (dict(most=5), "most_frames 24 there, 5 here")):
        with pytest.raises(UserError, match=f"interrupted run of something else .{reason}.; remove it"):
            make(files, out, **other)
    make(files, out, workers=1)
    assert contents(out) == contents(whole) and not part.exists()
    assert {name: (out / name).stat().st_mtime_ns for name in time_of} == time_of              # not made again
    assert "going on behind" in capsys.readouterr().out


def test_a_dead_worker_is_a_sentence_and_nothing_is_lost(files, whole, tmp_path):
    fatal = jobs_of(files)
    fatal[300]["file"] = "fatal"
    with pytest.raises(UserError, match=r"set: a worker died \(out of memory\?\); the same command goes on from here"):
        prepare(tmp_path / "set", 8, "test", lambda: fatal, sizes, total=320, read=die)
    assert len(list(tmp_path.glob(".set.part/parts/*.jsonl"))) >= 10
    make(files, tmp_path / "set")
    assert contents(tmp_path / "set") == contents(whole)


def test_workers_compute_with_one_thread(files, tmp_path):
    with threadpool_limits(2):                   # as on a machine of two cores
        make(files, tmp_path / "set", 39, read=count_threads)
    assert {threads for record in Index(tmp_path / "set") for threads in record["keywords"]} == {"1"}


def test_too_much_skipped_is_an_error_with_three_reasons(files, tmp_path):
    bad = [plain_job(f"gone-{i}.webp", tmp_path / f"gone-{i}.webp", "x") for i in range(4)]
    again = functools.partial(prepare, tmp_path / "set", 8, "test", lambda: jobs_of(files, 32) + bad, sizes, total=36)
    with pytest.raises(UserError, match=r"^4 of 36 .*5 %.*: gone-0.webp: .*; gone-1.webp: .*; gone-2.webp: [^;]*$"):
        again()
    assert len(list(tmp_path.glob(".set.part/parts/*"))) == 2
    [shutil.copy(files / "00.webp", job["source"]) for job in bad]    # mended
    again()
    assert len(Index(tmp_path / "set")) == 36
    with pytest.raises(UserError, match="0 of 0"):
        prepare(tmp_path / "none", 8, "test", list, sizes)
    assert not (tmp_path / ".none.part").exists()


def test_bad_files_end_a_set_early_only_if_all_are_counted(files, tmp_path):
    """55 of the first 1,054 are broken, too many there, but not when the shard under way is counted, nor of all."""
    names = ["broken.webp"] * 55 + ["01.gif"] * 1945
    jobs = [plain_job(name, files / name, f"sticker {i}") for i, name in enumerate(names)]
    prepare(tmp_path / "set", 4, "test", lambda: iter(jobs), sizes, workers=1, total=len(jobs))
    assert len(Index(tmp_path / "set")) == 1945
    jobs = (plain_job(f"{i}.webp", tmp_path / f"{i}.webp", "x") for i in range(10000))         # none is there
    with pytest.raises(UserError, match="cannot be used"):
        prepare(tmp_path / "gone", 8, "test", lambda: jobs, sizes, workers=1, total=10000)
    assert len(list(jobs)) > 7000


def test_unusable_jobs_are_skipped_with_a_reason(files, tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root/link.gif").symlink_to(files / "01.gif")
    bad = {"no caption": plain_job("a", "a", " "), "a caption of 2001 characters": plain_job("b", "b", "x" * 2001),
           "surrogate": plain_job("c", "c", "half \ud800"), "a NUL": plain_job("d\0", "d\0", "x"),
           "--allow-outside follows it": plain_job("e", tmp_path / "root/link.gif", "x", root=tmp_path / "root")}
    prepare(tmp_path / "set", 8, "test", lambda: [*bad.values(), *jobs_of(files, 39) * 4], sizes, workers=1)
    lines = [line for _, line in read_jsonl(tmp_path / "set/skipped.jsonl")]
    assert [line["file"] for line in lines] == [job["file"] for job in bad.values()]
    assert all(re.search(reason, line["reason"]) for reason, line in zip(bad, lines, strict=True))


def test_no_file_is_longer_than_the_bound(files, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 5 * 4 * 8 * 8 * 6 + 10)       # five stickers of six frames
    frames = Index(make(files, tmp_path / "set", 39, most=6)).frames
    shards = [np.fromfile(p, np.uint8) for p in sorted((tmp_path / "set").glob("*.bin"))]
    assert len(shards) == 8 and max(map(len, shards)) <= prepare_module.SHARD_BYTES
    every = np.concatenate(shards).reshape(-1, 8, 8, 4)
    for key in (slice(None), slice(3, 90, 7), slice(5, 5), [0, 50, 7], 11, np.int64(-2)):
        assert np.array_equal(frames[key], every[key])
    assert frames.shape == every.shape and frames[[]].shape == (0, 8, 8, 4)
    with pytest.raises(IndexError):
        frames[[0, len(every)]]


def edit(name, old, new):
    return lambda f: (f / name).write_bytes(re.sub(old, new, (f / name).read_bytes(), flags=re.S))


def edit_table(column, value):
    def change(folder):
        table = np.load(folder / "index.npy")
        table[column][1] = value
        np.save(folder / "index.npy", table)
    return change


@pytest.mark.parametrize("damage, reason", [
    (edit("meta.json", b"groups", b"x"), "meta.json: corrupt"),
    (edit("meta.json", b'"version": 3', b'"version": 2'), "meta.json: of version 2, this program writes 3"),
    (edit("meta.json", b'"size": 8', b'"size": 9'), "frames-00000.bin is of the wrong length"),
    (edit("meta.json", b'"stickers": 312', b'"stickers": 999'), "index.npy does not fit"),
    (lambda f: (f / "frames-00001.bin").unlink(), "frames-00001"), (edit("index.npy", rb"\(312,\)", b"(99999,)"), ""),
    (edit("index.jsonl", b".{9}$", b""), "index.jsonl does"), (edit_table("end", 10**15), "index.jsonl does not fit"),
    (edit_table("n", 9), "index.npy"), (edit_table("split", 3), "index.npy"), (edit_table("group", 99), "index.npy"),
    (edit("index.jsonl", b'{"file"', b'?"file"'), "line 1: not JSON"),
    (edit("index.jsonl", b'"first": 3', b'"first": 4'), "line .*: does not fit index.npy")], ids=range(13))
def test_damaged_sets_are_refused(whole, tmp_path, damage, reason):
    shutil.copytree(whole, tmp_path / "set")
    damage(tmp_path / "set")
    with pytest.raises(UserError, match=f"{tmp_path}.*{reason}"):
        list(Index(tmp_path / "set"))
