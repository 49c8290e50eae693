"""Signals, kills, full disks and second processes lose nothing of a run; two ranks are one. tools/soak.py does more."""
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import run_train
from test_train import RUN_FILES, SCRIPT, assert_same, log_of, options, state_of

import train
from lib import checkpoints, files
from lib.files import UserError, run_cli

needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks' processes in /proc")


@pytest.fixture(scope="module")
def argv(dfgn_argv):
    return options(dfgn_argv, steps=8, save_every=4, log_every=1, ema=0.5)


@pytest.fixture(scope="module")
def whole(argv, tmp_path_factory):
    """A run that nobody disturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    run_train(*argv, "--out", run)
    return run


def assert_same_runs(a, b):
    """All that a checkpoint holds and the log are equal bit for bit; nothing else lies about."""
    assert_same(state_of(a), state_of(b))
    assert log_of(a) == log_of(b)
    for run in (a, b):
        steps = [line["step"] for line in log_of(run)]
        assert steps == sorted(set(steps)) and {p.name for p in run.iterdir()} <= RUN_FILES


def half_of(run, folder):
    """A copy of a run at the checkpoint before its last."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("state.pt"))
    (folder / "state.prev.pt").replace(folder / "state.pt")
    return folder


def at_step(monkeypatch, step, do):
    """do() once, behind the backward pass of that step, so that a signal is seen in the next one."""
    plain, done = train.learning_rate, []

    def hooked(config, now):
        if now == step and not done:
            done.append(now)
            do()
        return plain(config, now)
    monkeypatch.setattr(train, "learning_rate", hooked)


# ---- one process

@pytest.mark.parametrize("stage, number, more", [
    ("vae", signal.SIGTERM, {}), ("dfgn", signal.SIGINT, {}),
    ("dfgn", signal.SIGTERM, dict(frames="sample", still_share=0, workers=1))])
def test_a_signal_saves_and_the_run_goes_on(stage, number, more, vae_argv, argv, tmp_path, monkeypatch, capsys):
    """Within a log window; the status is 128 + the signal's number; bit for bit what an uninterrupted run does."""
    argv = options(vae_argv if stage == "vae" else argv, steps=6, log_every=4, save_every=100, **more)
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    run_train(*argv, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=str(128 + number)):
        at_step(patch, 1, lambda: signal.raise_signal(number))
        run_train(*argv, "--out", tmp_path / "run")
    assert state_of(tmp_path / "run")["step"] == 3
    assert f"stopped by {number.name} after step 3, which is saved" in capsys.readouterr().out
    run_train(*argv, "--out", tmp_path / "run")
    assert_same_runs(tmp_path / "run", tmp_path / "whole")
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_a_sigterm_to_the_whole_group_saves(argv, whole, tmp_path):
    """As job schedulers send it: the loader processes get it, too."""
    command = [sys.executable, SCRIPT, *argv, "--out", tmp_path / "run", "--workers", 1, "--save-every", 100]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    assert wait_until(process, (tmp_path / "run/log.jsonl").exists)
    os.killpg(process.pid, signal.SIGTERM)
    out, error = process.communicate(timeout=600)
    assert process.returncode in (0, 143), error                       # 0: it was at its last step
    assert process.returncode == 0 or "stopped by SIGTERM" in out
    run_train(*argv, "--out", tmp_path / "run")
    assert_same_runs(tmp_path / "run", whole)


def forked(work):
    """(exit status of work() in a copy of this process, negative for a signal; what it wrote)."""
    read, write = os.pipe()
    if not (pid := os.fork()):
        os.dup2(write, 1), os.dup2(write, 2)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
        status = 1
        try:
            run_cli(work)
            status = 0
        except SystemExit as stop:
            status = stop.code
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    os.close(write)
    with open(read) as pipe:
        output = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("moment", ["save", "between the renames", "model", "log line", "start"])
def test_a_kill_at_any_moment_loses_nothing(moment, argv, whole, tmp_path, monkeypatch):
    run, replace = half_of(whole, tmp_path / "run"), os.replace

    def killed():
        if moment == "save":                                           # while state.pt.tmp is written
            plain = torch.save
            torch.save = lambda value, file: (plain(value, file), file.truncate(5000), die())
        elif moment == "between the renames":
            os.replace = lambda a, b: (replace(a, b), die() if Path(b).name == "state.prev.pt" else None)
        elif moment == "model":
            os.replace = lambda a, b: die() if Path(b).name == "model.safetensors" else replace(a, b)
        elif moment == "log line":
            def cut(log, line=None, durably=False):
                with open(log, "a") as file:
                    file.write(json.dumps(line)[:40])
                die()
            train.append = cut
        elif moment == "start":
            os.replace = lambda a, b: die() if Path(b).name == "config.json" else replace(a, b)
        run_train(*argv, "--out", run)
    assert forked(killed)[0] == -signal.SIGKILL
    run_train(*argv, "--out", run)
    assert_same_runs(run, whole)


def test_a_kill_while_the_latents_are_encoded(argv, whole, stickers16, tmp_path):
    copy = Path(shutil.copytree(stickers16, tmp_path / "set", ignore=shutil.ignore_patterns("latents-*")))
    moved = options(argv, data=copy, out=tmp_path / "run")

    def killed():
        plain, count = train.VAE.moments, iter(range(3))
        train.VAE.moments = lambda self, x: plain(self, x) if next(count) < 2 else die()
        run_train(*moved)
    assert forked(killed)[0] == -signal.SIGKILL
    part, = copy.glob("latents-*.part")
    assert part.stat().st_size > 0
    os.truncate(part, part.stat().st_size - 7)                         # within a row
    run_train(*moved)
    assert_same_runs(tmp_path / "run", whole)
    assert not list(copy.glob("*.part"))


def test_a_damaged_checkpoint_falls_back_to_the_one_before(argv, whole, tmp_path, capsys):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    os.truncate(run / "state.pt", 5000)
    (run / "log.jsonl").write_text((run / "log.jsonl").read_text() + '{"step": 9')
    run_train(*argv, "--out", run)
    assert f"{run / 'state.pt'}: not readable" in capsys.readouterr().err
    assert_same_runs(run, whole)
    for name in ("state.pt", "state.prev.pt"):
        (run / name).write_bytes(b"broken")
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    with pytest.raises(UserError, match="state.pt and state.prev.pt cannot be read"):
        run_train(*argv, "--out", run)
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before
    state = state_of(whole)
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    for wrong, said in ((dict(state, step=4), "moments of another shape than parameter 0"),
                        (dict(state, net={}), "Missing key"), (dict(step=1), "KeyError: 'net'"), ([1], "TypeError")):
        torch.save(wrong, run / "state.pt")
        with pytest.raises(UserError, match=f"{run}: its checkpoint is not one of this run .*{said}"):
            run_train(*argv, "--out", run)


@pytest.mark.parametrize("name", ["state.pt", "model.safetensors", "log.jsonl"])
def test_a_full_disk_ends_in_a_sentence_and_spoils_nothing(name, argv, whole, tmp_path):
    run = half_of(whole, tmp_path / "run")
    before = (run / "state.pt").read_bytes()
    size = (run if name == "log.jsonl" else whole).joinpath(name).stat().st_size
    if name == "log.jsonl":                                            # cut to the checkpoint before
        size = sum(len(line) + 1 for line in (run / name).read_text().splitlines()[:4]) + 10

    def full():
        plain = train.write_config
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, resource.RLIM_INFINITY))
        train.write_config = lambda *a: (plain(*a), limit())
        run_train(*argv, "--out", run)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    status, output = forked(full)
    errors = [line for line in output.splitlines() if "error: " in line]
    assert status == 2 and len(errors) == 1, output
    assert re.search(rf"error: {run / name}: cannot be written \(.*File too large", errors[0])
    assert (run / "state.pt").read_bytes() == before and {p.name for p in run.iterdir()} <= RUN_FILES
    run_train(*argv, "--out", run)
    assert_same_runs(run, whole)


def test_a_second_process_is_refused(argv, whole, tmp_path):
    run = half_of(whole, tmp_path / "run")
    with checkpoints.lock_run(run), pytest.raises(UserError, match=f"--out {run} is being written by another process"):
        run_train(*argv, "--out", run)
    assert log_of(run) == log_of(whole)
    run_train(*argv, "--out", run)
    assert_same_runs(run, whole)


@needs_proc
def test_a_killed_run_leaves_no_lock_to_its_loaders(argv, tmp_path):
    """The loader processes outlive it by seconds; the same command may go on at once."""
    process = start([*argv, "--steps", 4000, "--workers", 1, "--out", tmp_path / "run"])
    assert wait_until(process, (tmp_path / "run/log.jsonl").exists)
    process.kill()
    process.communicate()
    with files.lock(tmp_path / "run/lock", "the run"):
        pass


def test_a_killed_loader_is_told_in_a_sentence(argv, tmp_path, monkeypatch):
    at_step(monkeypatch, 2, lambda: (os.kill(children(os.getpid())[-1], signal.SIGKILL), time.sleep(0.2)))
    with pytest.raises(UserError, match="--workers: DataLoader worker .* The same command goes on from the last"):
        run_train(*options(argv, steps=40, save_every=2, out=tmp_path / "run", workers=1))
    assert state_of(tmp_path / "run")["step"] == 2


# ---- several processes

def start(arguments, ranks=1, restarts=0):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                f"--max-restarts={restarts}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), SCRIPT, *arguments]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(*launchers):
    try:
        errors = [launcher.communicate(timeout=600)[1] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.terminate()                                       # takes its ranks along; kill() would leave them
    assert all(launcher.returncode == 0 for launcher in launchers), "\n".join(e[-3000:] for e in errors)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(process, happened, seconds=300):
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end and not happened():
        time.sleep(0.001)
    return process.poll() is None


@contextmanager
def environment(**values):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def two_ranks(argv, tmp_path_factory):
    run = tmp_path_factory.mktemp("two") / "run"
    wait_for(start([*argv, "--out", run], 2))
    return run


def test_two_ranks_see_what_one_sees(two_ranks, whole):
    one, two = log_of(whole), log_of(two_ranks)
    assert [line["step"] for line in two] == list(range(1, 9))
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-6)
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    assert [line["tasks"].keys() for line in two] == [line["tasks"].keys() for line in one]
    a, b = state_of(two_ranks)["ema"], state_of(whole)["ema"]
    assert all(torch.allclose(a[k], b[k], atol=2e-3) for k in a)


@needs_proc
def test_a_killed_rank_is_started_again_by_torchrun(two_ranks, argv, tmp_path):
    """With --zero, which changes no bit: moments and files are those of a run without it."""
    run = tmp_path / "run"
    launcher = start([*argv, "--zero", "--out", run], 2, restarts=1)
    assert wait_until(launcher, (run / "state.pt").exists)
    os.kill(children(launcher.pid)[-1], signal.SIGKILL)
    wait_for(launcher)
    assert_same_runs(run, two_ranks)


@needs_proc
def test_two_agents_meet_again_after_a_kill(two_ranks, argv, tmp_path):
    """Two torchrun agents of one rank each, as on two nodes: bit for bit what one agent's two ranks do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    meet = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint={address}", "--rdzv_id=run",
            "--local_addr=127.0.0.1", "--max-restarts=1"]
    command = [sys.executable, "-m", "torch.distributed.run", *meet, SCRIPT, *argv, "--out", tmp_path / "run"]
    with environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"):
        agents = [subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                  for _ in range(2)]
    assert wait_until(agents[0], (tmp_path / "run/state.pt").exists)
    os.kill(children(agents[1].pid)[-1], signal.SIGKILL)
    wait_for(*agents)
    assert_same_runs(tmp_path / "run", two_ranks)


@needs_proc
def test_ctrl_c_under_torchrun_saves_and_one_rank_goes_on(argv, whole, tmp_path):
    run = tmp_path / "run"
    launcher = start([*argv, "--out", run, "--save-every", 100], 2)
    assert wait_until(launcher, (run / "log.jsonl").exists)
    launcher.send_signal(signal.SIGINT)
    assert "[rank" not in launcher.communicate(timeout=300)[1]         # no traceback of a rank
    step = state_of(run)["step"]
    assert 1 <= step and [line["step"] for line in log_of(run)] == list(range(1, step + 1))
    run_train(*argv, "--out", run)
    assert [x["loss"] for x in log_of(run)] == pytest.approx([x["loss"] for x in log_of(whole)], rel=1e-4)


@needs_proc
def test_all_ranks_end_when_one_cannot_save(argv, tmp_path):
    launcher = start([*argv, "--out", tmp_path / "run", "--steps", 4000], 2)
    assert wait_until(launcher, (tmp_path / "run/log.jsonl").exists)
    ranks = children(launcher.pid)
    for pid in ranks:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    error = launcher.communicate(timeout=300)[1]
    assert launcher.returncode and not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert re.search(r"error: .*cannot be written \(.*File too large", error), error[-3000:]
