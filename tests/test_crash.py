"""Kills, full disks, second processes and changed options lose nothing of a run.

    python tests/test_crash.py --kills 50 --seed 0     # the soak: kills at random moments, on one process and two; some ten minutes
"""
import argparse
import fcntl
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from conftest import run_train                                         # puts the scripts' folder on the path, too
import data
import train
from data import UserError
from test_train import SCRIPT, assert_same, children, kill, log_of, needs_proc, options, state_of, stop_at, torchrun, tree, wait_for, wait_until

RUN_FILES = {"config.json", "log.jsonl", "state.pt", "state.prev.pt", "model.safetensors"}


def assert_same_runs(a, b):
    """Weights, averages, optimiser, curriculum and log are equal bit for bit; no line is lost or there twice; nothing else lies about."""
    assert_same(state_of(a), state_of(b))
    assert_same(*(train.read_model(run / "model.safetensors", train.read_metadata(run / "model.safetensors")["kind"], "") for run in (a, b)))
    assert log_of(a) == log_of(b)
    for run in (a, b):
        steps = [line["step"] for line in log_of(run)]
        assert steps == sorted(set(steps)) and {p.name for p in run.iterdir()} <= RUN_FILES


# ---- dying at a file operation

def sizes(folders):
    found = (path.stat() for folder in folders for path in Path(folder).rglob("*") if path.is_file())
    return {s.st_ino: s.st_size for s in found}


def on_operations(folders, do):
    """From now on, until the process ends, call do(operation, path) before each change of a file in these folders and before each fsync."""
    folders, fsync = tuple(map(str, folders)), os.fsync

    def operation(name, path):
        if str(path).startswith(folders):
            do(name, Path(str(path)))

    def audit(event, args):
        if event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            operation("open", args[0])
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            operation(event[3:], args[0])

    def noted(file):
        operation("fsync", os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}"))
        fsync(file)
    sys.addaudithook(audit)
    os.fsync = noted


def die_at(k, folders):
    """This process is to die by SIGKILL before its k-th operation on files there. The power fails, too: half of what was not fsynced is lost."""
    kept, count = sizes(folders), itertools.count()

    def do(name, path):
        if next(count) == k:
            for folder in folders:
                for file in Path(folder).rglob("*"):
                    if file.is_file() and file.stat().st_size > kept.get(file.stat().st_ino, 0):
                        with open(file, "ab") as f:
                            f.truncate((file.stat().st_size + kept.get(file.stat().st_ino, 0)) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "fsync":
            kept[path.stat().st_ino] = path.stat().st_size
    on_operations(folders, do)


def forked(work, output=os.devnull):
    """Exit status of work() in a copy of this process, negative for a signal; what it says goes to the file, by a pipe that no limit of files is for."""
    said, end = os.pipe()
    if not (pid := os.fork()):
        status = 1
        try:
            os.close(said), os.dup2(end, 1), os.dup2(end, 2)
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
            data.run_cli(work)
            status = 0
        except SystemExit as stop:
            status = stop.code
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    os.close(end)
    with open(said, "rb") as pipe, open(output, "wb", 0) as file:
        while part := pipe.read1():
            file.write(part)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(scope="module")
def crash_argv(dfgn_argv):
    return options(dfgn_argv, steps=2, save_every=1, log_every=1)


@pytest.fixture(scope="module")
def others(stickers16, tiny_vae):
    """For copytree: the caches of latents that other tests wrote stay behind."""
    own = data.latents_folder(stickers16, train.file_hash(tiny_vae / "model.safetensors")).name
    return lambda folder, names: [name for name in names if "latents-" in name and name != own]


@pytest.fixture(scope="module")
def whole(crash_argv, tmp_path_factory):
    """A run of two steps that nobody disturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    run_train(*options(crash_argv, out=run))
    return run


def at_first_step(whole, run):
    """A copy of it as it was after its first step."""
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("state.pt"))
    (run / "state.prev.pt").replace(run / "state.pt")
    return run


def test_any_file_operation_may_be_the_last(whole, crash_argv, tmp_path):
    """The second half of a run dies before its first file operation, goes on and dies before its second, and so on."""
    run, steps = at_first_step(whole, tmp_path / "run"), []
    for k in itertools.count():
        status = forked(lambda: (die_at(k, [run]), run_train(*options(crash_argv, out=run))))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        steps.append(check_killed(run))
        if steps[-1] == 2:
            run_train(*options(crash_argv, out=run))
            assert_same_runs(run, whole)
            shutil.rmtree(run)
            at_first_step(whole, run)
    assert_same_runs(run, whole)
    assert len(steps) > 15 and steps.count(1) > 15 and steps.count(2) >= 2


def test_a_checkpoint_is_on_the_disk_before_the_next_file_says_so(whole, crash_argv, tmp_path):
    run, noted = at_first_step(whole, tmp_path / "run"), tmp_path / "noted"

    def work():
        on_operations([run], lambda name, path: print(name, path.name, flush=True))
        run_train(*options(crash_argv, out=run))
    assert forked(work, noted) == 0
    fsyncs = [line for line in noted.read_text().splitlines() if line.startswith(("fsync", "rename"))]
    save = fsyncs[fsyncs.index("rename config.json.tmp") + 2:]
    assert save == ["fsync log.jsonl", "fsync model.safetensors.tmp", "rename model.safetensors.tmp", "fsync run",
                    "fsync state.pt.tmp", "rename state.pt", "rename state.pt.tmp", "fsync run"]


def test_a_fresh_run_may_die_while_it_encodes(stickers16, whole, crash_argv, tmp_path):
    """Kills spread over encoding latents, the first lines and the first checkpoint of one run, each by the same command."""
    copy, run = Path(shutil.copytree(stickers16, tmp_path / "set")), tmp_path / "run"
    for cache in copy.glob("latents-*"):
        shutil.rmtree(cache)
    argv, deaths = options(crash_argv, data=copy, out=run), 0
    for k in (2, 6, 9, 11, 13, 17, 19, 24, 27):
        status = forked(lambda: (die_at(k, [copy, run]), run_train(*argv)))
        assert status in (0, -signal.SIGKILL)
        deaths += status != 0
    run_train(*argv)
    assert deaths >= 6
    assert_same_runs(run, whole)
    assert not [*copy.rglob("*.tmp"), *copy.glob(".*.part")]


def test_half_written_texts_are_removed_unless_somebody_writes(tmp_path):
    cache = data.TextCache(tmp_path, "a" * 64, 4)
    write = lambda text: cache.write([text], [torch.zeros(1, 77, 4)])
    write("one")
    (cache.folder / "tmpkilled").mkdir()
    with open(cache.folder / "lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        write("two")
    assert (cache.folder / "tmpkilled").is_dir()
    write("three")
    assert not list(cache.folder.glob("tmp*")) and len(list(cache.folder.glob("*.bin"))) == 3


@pytest.mark.parametrize("end", ['"tasks": {"t2v": 0.5}', '"tas', "\0\0\0"])
def test_a_line_cut_anywhere_is_dropped(end, whole, crash_argv, tmp_path):
    run = at_first_step(whole, tmp_path / "run")
    with open(run / "log.jsonl", "a") as log:
        log.write('{"step": 3, ' + end)
    run_train(*options(crash_argv, out=run))
    assert_same_runs(run, whole)


# ---- processes

def start(argv, ranks=1, script=SCRIPT):
    if ranks > 1:
        return torchrun("--standalone", f"--nproc_per_node={ranks}", script, *argv)
    return subprocess.Popen([sys.executable, *map(str, (script, *argv))], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def lines_in(run):
    return (run / "log.jsonl").read_text().count("\n") if (run / "log.jsonl").is_file() else 0


def test_a_killed_run_leaves_no_lock_to_its_loaders(dfgn_argv, tmp_path):
    """The loader processes outlive it by seconds; the same command goes on at once."""
    argv, run = options(dfgn_argv, steps=400, log_every=1, out=tmp_path / "run", workers=1), tmp_path / "run"
    process = start(argv)
    assert wait_until(process, lambda: lines_in(run))
    loader, = children(process.pid)
    process.kill()
    process.wait()
    with ExitStack() as held:
        train.own(run, held)
        assert Path(f"/proc/{loader}").exists()
    process.communicate()


@needs_proc
def test_ctrl_c_under_torchrun_saves(crash_argv, tmp_path):
    run = tmp_path / "run"
    process = start(options(crash_argv, out=run, steps=4000, save_every=4000, workers=1), 2)
    assert wait_until(process, lambda: lines_in(run))
    ranks = children(process.pid)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and len(ranks) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    step = state_of(run)["step"]
    assert 1 <= step < 4000 and [line["step"] for line in log_of(run)] == list(range(1, step + 1)) and "KeyboardInterrupt" not in error
    assert {p.name for p in run.iterdir()} == RUN_FILES - {"state.prev.pt"}


def test_ctrl_c_saves_and_a_second_one_ends_at_once(dfgn_argv, tmp_path, monkeypatch, capsys):
    argv, handlers = options(dfgn_argv, steps=6, save_every=2, log_every=1), list(map(signal.getsignal, train.STOPPING))
    run_train(*options(argv, out=tmp_path / "whole"))
    with stop_at(monkeypatch, 2, signal.SIGINT):
        run_train(*options(argv, out=tmp_path / "run"))
    assert f"{tmp_path / 'run'}: stopped by SIGINT after step 3, which is saved; the same command goes on" in capsys.readouterr().out

    def twice(*_, **__):                                               # the first comes within step 4, the second while it is saved
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("goes on")
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_pt", twice)
        assert forked(lambda: stopped(monkeypatch, 4, options(argv, out=tmp_path / "run", save_every=100))) == -signal.SIGINT
    assert state_of(tmp_path / "run")["step"] == 3
    run_train(*options(argv, out=tmp_path / "run"))
    assert_same_runs(tmp_path / "run", tmp_path / "whole")
    assert list(map(signal.getsignal, train.STOPPING)) == handlers


def stopped(monkeypatch, step, argv):
    with stop_at(monkeypatch, step, signal.SIGINT):
        run_train(*argv)


def test_ctrl_c_before_the_first_step(crash_argv, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "RDTF", interrupt)
    with pytest.raises(SystemExit, match="130"):
        data.run_cli(lambda: run_train(*options(crash_argv, out=tmp_path / "run")))
    assert capsys.readouterr().err == "error: interrupted\n" and not (tmp_path / "run").exists()


def test_a_killed_loader_is_told_in_a_sentence(dfgn_argv, tmp_path, monkeypatch):
    at_step(monkeypatch, 3, lambda: (os.kill(children(os.getpid())[-1], signal.SIGKILL), time.sleep(0.2)))
    with pytest.raises(UserError, match=r"--workers: DataLoader worker .* is killed by signal: Killed.* The same command goes on from the last checkpoint"):
        run_train(*options(dfgn_argv, steps=40, save_every=2, out=tmp_path / "run", workers=1))
    assert state_of(tmp_path / "run")["step"] == 2


def test_a_damaged_checkpoint_never_takes_the_place_of_the_one_before(dfgn_argv, tmp_path, capsys):
    """The first save after it dies between the two renames."""
    run, argv = tmp_path / "run", options(dfgn_argv, steps=6, save_every=2, log_every=1)
    run_train(*options(argv, out=tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", run)
    (run / "state.pt").write_bytes((run / "state.pt").read_bytes()[:-1000])

    def die(source, path, plain=os.rename):
        plain(source, path) if Path(path).name != "state.pt" else os.kill(os.getpid(), signal.SIGKILL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", die)
        assert forked(lambda: run_train(*options(argv, out=run))) == -signal.SIGKILL
    run_train(*options(argv, out=run))
    assert "trying the one before" not in capsys.readouterr().err
    assert_same_runs(run, tmp_path / "whole")


# ---- disks, folders, clocks

def at_step(monkeypatch, step, do):
    plain, done = train.learning_rate, []
    monkeypatch.setattr(train, "learning_rate", lambda config, now: (now == step and not done and (done.append(now), do()), plain(config, now))[1])


def limit_files(size):
    """No file of this process may become longer."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("name", ["state.pt", "model.safetensors", "log.jsonl"])
def test_a_file_that_cannot_be_written_ends_the_run_in_a_sentence(name, whole, crash_argv, tmp_path, monkeypatch):
    run, said = at_first_step(whole, tmp_path / "run"), tmp_path / "said"
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: limit_files((run if name == "log.jsonl" else whole).joinpath(name).stat().st_size - 1))
        assert forked(lambda: run_train(*options(crash_argv, out=run)), said) == 2
    error, = [line for line in said.read_text().splitlines() if "error: " in line]
    assert re.search(rf"error: {run / name}: cannot be written \(.*File too large.*\); what was there before stays, the same command goes on from it$", error)
    assert state_of(run)["step"] == 1 and {p.name for p in run.iterdir()} <= RUN_FILES
    assert {p.name: p.read_bytes() for p in run.iterdir()}["state.pt"] == before["state.pt"]
    run_train(*options(crash_argv, out=run))
    assert_same_runs(run, whole)


@contextmanager
def mounted(folder, *how):
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", *how, "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk(whole, crash_argv, tmp_path, monkeypatch):
    size = {p.name: p.stat().st_size for p in whole.iterdir()}        # room for another model, not for another state
    with mounted(tmp_path / "disk", "-o", f"size={sum(size.values()) - size['state.pt'] // 2 + size['model.safetensors']}") as disk:
        run, said = at_first_step(whole, disk / "run"), tmp_path / "said"
        assert forked(lambda: run_train(*options(crash_argv, out=run)), said) == 2
        assert "cannot be written (No space left on device)" in said.read_text() and "Traceback" not in said.read_text()
        assert state_of(run)["step"] == 1 and {p.name for p in run.iterdir()} <= RUN_FILES
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        run_train(*options(crash_argv, out=run))
        assert_same_runs(run, whole)


def test_a_folder_that_cannot_be_written_is_refused_first(whole, crash_argv, tmp_path, monkeypatch):
    monkeypatch.setattr(train.DFGNStage, "prepare", lambda *_, **__: pytest.fail("slow things came first"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out .*file/run: cannot be written .Not a directory"):
        run_train(*options(crash_argv, out=tmp_path / "file/run"))
    with mounted(tmp_path / "disk", "-o", "size=1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(UserError, match="--out .*disk/run: cannot be written .Read-only file system"):
            run_train(*options(crash_argv, out=disk / "run"))


@needs_proc
def test_all_ranks_end_when_one_cannot_save(crash_argv, tmp_path):
    run = tmp_path / "run"
    process = start(options(crash_argv, out=run, steps=4000, save_every=20), 2)
    assert wait_until(process, lambda: lines_in(run))
    ranks = children(process.pid)
    for pid in ranks:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    began = time.monotonic()
    error = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and not any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() - began < 30
    assert re.search(r"model.safetensors: cannot be written \(.*File too large", error) and "Connection" not in error, error[-3000:]


def test_a_run_folder_removed_under_a_job(crash_argv, tmp_path, monkeypatch):
    at_step(monkeypatch, 1, lambda: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(UserError, match="log.jsonl: cannot be written .No such file or directory"):
        run_train(*options(crash_argv, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_removed_under_a_job_is_not_missed(whole, crash_argv, tmp_path, monkeypatch):
    at_step(monkeypatch, 1, lambda: (tmp_path / "run/state.pt").unlink())
    run_train(*options(crash_argv, out=tmp_path / "run"))
    assert_same_runs(tmp_path / "run", whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_removed_under_a_job(workers, stickers16, others, whole, crash_argv, tmp_path, monkeypatch):
    """What is mapped stays; of what is not the name is told, by a loader process too."""
    copy = Path(shutil.copytree(stickers16, tmp_path / "set", ignore=others))
    argv = options(crash_argv, data=copy, workers=workers)
    if not workers:
        with monkeypatch.context() as patch:
            at_step(patch, 1, lambda: shutil.rmtree(copy))
            run_train(*options(argv, out=tmp_path / "mapped"))
        assert_same_runs(tmp_path / "mapped", whole)
        shutil.copytree(stickers16, copy, ignore=others)
    plain = data.open_latents

    def gone(*a):
        maps = plain(*a)
        shutil.rmtree(next(copy.glob("latents-*")))
        return maps
    run_train(*options(argv, out=tmp_path / "run", steps=1))           # what is measured at the start
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr(train.DFGNStage, "measure_data", lambda self: monkeypatch.setattr(train, "open_latents", gone))
    with pytest.raises(UserError, match="^[^ ]*latents-.*mean-00000.bin: was there and is not any more.*put it back or prepare it again$"):
        run_train(*options(argv, out=tmp_path / "run"))


def test_a_set_removed_under_the_vae_stage(stickers16, vae_argv, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(stickers16, tmp_path / "set"))
    at_step(monkeypatch, 1, lambda: shutil.rmtree(copy))
    monkeypatch.setattr(train, "measure_latents", lambda *_: None)     # takes long; what it reads is mapped
    with pytest.raises(UserError, match="meta.json: no prepared set here"):
        run_train(*options(vae_argv, data=copy, steps=2, out=tmp_path / "run"))


def test_no_clock_matters(whole, crash_argv, tmp_path, monkeypatch):
    draw = random.Random(0)
    for name in ("time", "time_ns"):
        monkeypatch.setattr(time, name, lambda: draw.randrange(4 * 10 ** 9))
    run_train(*options(crash_argv, out=tmp_path / "run"))
    assert_same_runs(tmp_path / "run", whole)


# ---- two jobs

def test_a_second_job_is_refused(whole, crash_argv, tmp_path):
    run, argv = at_first_step(whole, tmp_path / "run"), options(crash_argv, out=tmp_path / "run")
    with ExitStack() as held:
        train.own(run, held)
        with pytest.raises(UserError, match=rf"--out {run} is being written by process {os.getpid()} on \S+; wait until it is done"):
            run_train(*argv)
        assert log_of(run) == log_of(whole) and (run / "lock").is_file()
    assert not (run / "lock").exists()
    run_train(*argv)
    assert_same_runs(run, whole)


def test_a_lock_that_is_a_link_is_not_followed(crash_argv, tmp_path):
    (tmp_path / "run").mkdir()
    for target in ("mine.txt", "nowhere/x"):
        (tmp_path / "mine.txt").write_text("mine")
        (tmp_path / "run/lock").symlink_to(tmp_path / target)
        with pytest.raises(UserError, match=f"^--out {tmp_path / 'run'}: cannot be written .Too many levels of symbolic links"):
            run_train(*options(crash_argv, out=tmp_path / "run"))
        (tmp_path / "run/lock").unlink()
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_the_lock_of_another_stays(tmp_path):
    """The folder is removed under a job, and another begins there before it ends."""
    with ExitStack() as first, ExitStack() as second:
        train.own(tmp_path / "run", first)
        shutil.rmtree(tmp_path / "run")
        train.own(tmp_path / "run", second)
        first.close()
        with pytest.raises(UserError, match="is being written by process"), ExitStack() as third:
            train.own(tmp_path / "run", third)


def test_a_run_that_began_meanwhile_is_not_written_over(whole, crash_argv, tmp_path, monkeypatch):
    plain = train.own
    monkeypatch.setattr(train, "own", lambda run, held: (shutil.copytree(whole, run), plain(run, held)))
    with pytest.raises(UserError, match="another process wrote there meanwhile; start again"):
        run_train(*options(crash_argv, out=tmp_path / "run"))
    assert_same_runs(tmp_path / "run", whole)


def test_a_file_system_without_locks(whole, crash_argv, tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(37, "No locks available")
    monkeypatch.setattr(fcntl, "flock", flock)
    run_train(*options(crash_argv, out=tmp_path / "run"))
    assert f"{tmp_path / 'run/lock'}: cannot be locked (No locks available), so that nothing keeps a second process out" in capsys.readouterr().err
    assert_same_runs(tmp_path / "run", whole)


def test_two_jobs_write_one_cache_of_latents(stickers16, others, whole, crash_argv, tmp_path):
    """The second waits, says for whom, and finds it made."""
    copy, said = Path(shutil.copytree(stickers16, tmp_path / "set", ignore=others)), tmp_path / "said"
    cache, = copy.glob("latents-*")
    shutil.rmtree(cache)
    with data.hold(copy / f".{cache.name}.lock", cache):
        if not (pid := os.fork()):
            os._exit(forked(lambda: run_train(*options(crash_argv, data=copy, out=tmp_path / "second")), said))
        while not said.is_file() or "waiting" not in said.read_text():
            time.sleep(0.01)
        assert f"{cache} is being written by process {os.getpid()} on " in said.read_text() and not cache.exists()
    assert forked(lambda: run_train(*options(crash_argv, data=copy, out=tmp_path / "first"))) == 0
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert_same_runs(tmp_path / "first", whole)
    assert_same_runs(tmp_path / "second", whole)
    assert len(list(copy.glob("*latents-*/mean-*.bin"))) == 1


# ---- options when a run goes on

CHANGES = dict(stage="vae", groups=["animals"], preset="mini", set=["vae.kl_weight=0.5"], text_variants=5, steps=9, batch=8, lr=0.5, lr_schedule="constant", warmup=3,
               weight_decay=0.5, grad_clip=2.0, ema=0.5, seed=3, tasks=["t2v"], curriculum="none", pid_raw=True, how="even", frames="full", still_share=0.25,
               still_first=0.5, word_dropout=0.5, keywords=0.25, text_drop=0.5, cond_drop=0.5, both_drop=0.5)
HARMLESS = dict(workers=3, log_every=7, save_every=3, accumulate=2, checkpointing=True, zero=True, compile=True, ema_device="cpu", data="elsewhere", vae="elsewhere",
                clip_weights="elsewhere", clip_model="ViT-B-32")
UNSAID = {"out", "precision", "dry_run", "replay"}                               # precision: what it stands for is compared


def config_of(run, **changes):
    return train.TrainConfig(**{**json.loads((run / "config.json").read_text())["train"], **changes})


def check(run, config, **how):
    how = {**dict(precision=json.loads((run / "config.json").read_text())["precision"], world=1), **how}
    return train.check_same_config(run, config, train.resolve_config("tiny", []), **how)[1]


def test_every_option_may_change_or_may_not(whole):
    names = [*CHANGES, *HARMLESS, *UNSAID]
    assert Counter(names) == Counter(asdict(train.TrainConfig()).keys()), "a new option: may it change when a run goes on?"
    assert check(whole, config_of(whole)) == [] == check(whole, config_of(whole, out="elsewhere", precision="float32"))
    for name, value in HARMLESS.items():
        before = getattr(config_of(whole), name)
        assert check(whole, config_of(whole, **{name: value})) == [f"--{name.replace('_', '-')} {value} instead of {before}"]
    for name, value in CHANGES.items():
        before = getattr(config_of(whole), name)
        with pytest.raises(UserError) as refusal:
            check(whole, config_of(whole, **{name: value}))
        assert str(refusal.value) == f"--{name.replace('_', '-')} {value}: {whole} was started with {before}; go on with that, or name another --out"


def test_numbers_of_processes_and_precision(whole, tmp_path):
    assert check(whole, config_of(whole), world=2) == ["2 processes instead of 1"]
    here, there = ["bf16", "float32"][:: 1 if json.loads((whole / "config.json").read_text())["precision"] == "bf16" else -1]
    with pytest.raises(UserError) as refusal:
        check(whole, config_of(whole, precision="auto"), precision=there)
    assert str(refusal.value) == f"--precision auto: {there} here, {whole} was started in {here}; go on with --precision {here}, or name another --out"
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    for text in (None, "{", "[]", "{}"):
        (run / "config.json").unlink() if text is None else (run / "config.json").write_text(text)
        with pytest.raises(UserError, match="config.json: missing or corrupt .*, so that nobody knows what was trained here"):
            train.check_same_config(run, config_of(whole), train.resolve_config("tiny", []), here, 1)


def test_a_moved_set_goes_on_and_another_is_refused_before_anything_slow(stickers16, whole, crash_argv, tmp_path, monkeypatch, capsys):
    run, copy = at_first_step(whole, tmp_path / "run"), Path(shutil.copytree(stickers16, tmp_path / "moved"))
    data.main(["synthetic", "--n", "20", "--size", "16", "--out", str(tmp_path / "other"), "--workers", "1"])
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"--data .*other: not what .* was started with \(hash \w{12}, was \w{12}\)"):
        patch.setattr(train, "cache_latents", lambda *_: pytest.fail("encoded first"))
        run_train(*options(crash_argv, out=run, data=tmp_path / "other"))
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before
    run_train(*options(crash_argv, out=run, data=copy))
    assert f"{run}: goes on behind step 1 with --data {copy} instead of {stickers16}\n" in capsys.readouterr().out
    assert_same_runs(run, whole)


# ---- the soak

def prepare_soak(folder):
    """{stage: argv} and the set that they train on."""
    data.main(["synthetic", "--n", "48", "--size", "16", "--out", str(folder / "set"), "--workers", "1"])
    common = ["--preset", "tiny", "--steps", 30, "--save-every", 5, "--log-every", 1, "--warmup", 2]
    run_train(*common, "--stage", "vae", "--batch", 8, "--data", folder / "set", "--out", folder / "vae", "--steps", 4)
    return dict(vae=[*common, "--stage", "vae", "--batch", 8], dfgn=[*common, "--batch", 4, "--ema", 0.5, "--vae", folder / "vae/model.safetensors"])


def changed_at(path):
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def until_file(pattern):
    """Such a file is written: not what the last kill has left."""
    began = time.time_ns()
    return lambda run, copy, _: any(changed_at(path) > began for place in (run, copy) for path in place.glob(pattern))


def until_line(draw):
    more, later = draw.randrange(1, 12), draw.uniform(0, 0.2)
    return lambda run, copy, before: lines_in(run) >= min(before + more, 29) and (time.sleep(later) or True)


def until_time(draw):
    end = time.monotonic() + draw.uniform(1, 12)
    return lambda *_: time.monotonic() > end


MOMENTS = dict(checkpoint=lambda draw: until_file("state.pt.tmp"), model=lambda draw: until_file("model.safetensors.tmp"), log=lambda draw: until_file("log.jsonl.tmp"),
               config=lambda draw: until_file("config.json.tmp"), latents=lambda draw: until_file(".latents-*.part/*.tmp"), lock=lambda draw: until_file("lock"),
               line=until_line, time=until_time, operation=None, rank=until_line, agent=until_line)


def one_kill(draw, moment, argv, ranks, run, copy):
    """Start the job and kill it at this moment; False if it came to its end before."""
    script, before = SCRIPT, lines_in(run)
    if moment == "operation":
        script, argv = Path(__file__), ["--victim", draw.randrange(60), run, copy, *argv]
    happened = MOMENTS[moment] and MOMENTS[moment](draw)
    process = start(argv, ranks, script)
    if moment == "operation":
        error = process.communicate(timeout=300)[1]
        assert process.returncode == 0 or (process.returncode == -signal.SIGKILL if ranks == 1 else "SIGKILL" in error), error[-3000:]
        return process.returncode != 0
    if not wait_until(process, lambda: happened(run, copy, before)):
        error = process.communicate()[1]
        assert process.returncode == 0, error[-3000:]
        return False
    below = tree(process.pid)[1:]
    if moment == "rank" and ranks > 1:
        if not below:                                                       # about to end
            assert process.wait(120) == 0
            return False
        os.kill(draw.choice(below[:ranks]), signal.SIGKILL)
        process.communicate(timeout=120)
    elif moment == "agent" and ranks > 1:
        kill(process, everything=False)
        second = start(argv, ranks)                                         # the ranks live on, and keep others out
        error = second.communicate(timeout=300)[1]
        assert second.returncode == 0 or "is being written by process" in error, error[-3000:]
        for pid in below:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
        while any(Path(f"/proc/{pid}").exists() for pid in below):
            time.sleep(0.01)
    else:
        kill(process)
    return True


def check_killed(run):
    """What is there can be read, and the log has all lines of the checkpoint. -> its step."""
    if run.is_dir() and train.states(run):
        step = train.read_state(run)["step"]
        train.read_model(run / "model.safetensors", train.read_metadata(run / "model.safetensors")["kind"], "")
        steps = [line for line in map(train.step_of, (run / "log.jsonl").read_text(errors="replace").splitlines()) if line and line <= step]
        assert steps == list(range(1, step + 1)), (step, steps)
        return step


def soak(kills, seed):
    began, draw, killed, runs = time.monotonic(), random.Random(seed), Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        folder, references = Path(folder), {}
        argvs = prepare_soak(folder)
        for runs, (stage, ranks) in enumerate(itertools.cycle([("dfgn", 2), ("dfgn", 1), ("vae", 1), ("dfgn", 2), ("vae", 2)])):
            if sum(killed.values()) >= kills:
                break
            argv, run, copy = argvs[stage], folder / f"{stage}-{ranks}-{runs}", folder / f"set-{runs}"
            if (stage, ranks) not in references:
                references[stage, ranks] = folder / f"{stage}-{ranks}-whole"
                wait_for(start([*argv, "--data", folder / "set", "--out", references[stage, ranks]], ranks))
            shutil.copytree(folder / "set", copy, ignore=shutil.ignore_patterns("*latents-*"))
            argv = [*argv, "--data", copy, "--out", run, *(["--workers", 1] if stage == "dfgn" else [])]
            for _ in range(8):
                moment = draw.choice(list(MOMENTS))
                if not one_kill(draw, moment, argv, ranks, run, copy):
                    break
                check_killed(run)
                killed[f"{moment}, {ranks}"] += 1
                print(f"{time.monotonic() - began:6.0f} s: kill {sum(killed.values())}: {stage} on {ranks}, {moment}, {lines_in(run)} lines", flush=True)
            else:
                wait_for(start(argv, ranks))
            assert_same_runs(run, references[stage, ranks])
            assert not [*copy.rglob("*.tmp"), *copy.glob(".*.part")]
            shutil.rmtree(run), shutil.rmtree(copy)
    print(f"{sum(killed.values())} kills in {runs} runs survived, no line lost, in {(time.monotonic() - began) / 60:.1f} minutes: {dict(sorted(killed.items()))}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--victim"]:                                  # K RUN SET, and train.py's options
        if os.environ.get("RANK", "0") == "0":
            die_at(int(sys.argv[2]), sys.argv[3:5])
        data.run_cli(lambda: train.main(sys.argv[5:]))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--kills", type=int, default=50)
        parser.add_argument("--seed", type=int, default=0)
        soak(**vars(parser.parse_args()))
