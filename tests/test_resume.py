"""Signals, kills, full disks and second processes lose nothing of a run; two ranks are one. tools/soak.py does more."""
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import run_train
from test_train import RUN_FILES, SCRIPT, assert_same, log_of, options, state_of

import train
from lib.nets.autoencoder import VAE
from lib.run import checkpoints, loop
from lib.run import folder as run_folder
from lib.run.files import UserError, run_cli
from model import load_rdtf


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
    shutil.copytree(run, folder)
    (folder / "state.prev.pt").replace(folder / "state.pt")
    return folder


def forked(work):
    """(exit status of work() in a copy of this process, negative for a signal; what it wrote)."""
    with tempfile.NamedTemporaryFile("r") as output:
        def child():
            os.setsid()                                                # a process group of its own
            sys.stdout = sys.stderr = open(output.name, "w", buffering=1)
            run_cli(work)
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join()
        return process.exitcode, output.read()


def at_step(step, do):
    """A hook behind the backward pass that does do() in that step, once; a signal is seen in the same step."""
    done = []

    def hook(now, net, losses):
        if now == step and not done:
            done.append(now)
            do()
    return hook


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


# ---- one process
@pytest.mark.parametrize("stage, number, more", [
    ("vae", signal.SIGTERM, {}), ("dfgn", signal.SIGINT, {}), ("dfgn", signal.SIGHUP, {}), ("vae", signal.SIGUSR1, {}),
    ("dfgn", signal.SIGUSR2, {}), ("dfgn", signal.SIGXCPU, dict(workers=1)), ("dfgn", signal.SIGQUIT, {}),
    ("dfgn", signal.SIGTERM, dict(lengths="sample", still_share=0, workers=1))])
def test_a_signal_saves_and_the_run_goes_on(stage, number, more, vae_argv, argv, tmp_path):
    """To the whole process group, so to its loaders, too, as job schedulers send it; within a log window."""
    argv = options(vae_argv if stage == "vae" else argv, steps=6, log_every=4, save_every=100, **more)
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    run_train(*argv, "--out", tmp_path / "whole")
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers

    def signalled():
        signal.signal(number, signal.SIG_DFL)    # the tests themselves may run under nohup
        run_train(*argv, "--out", tmp_path / "run", after_backward=at_step(2, lambda: os.killpg(0, number)))
    status, output = forked(signalled)
    assert status == 128 + number and f"stopped by {number.name} after step 3, which is saved" in output, output
    assert state_of(tmp_path / "run")["step"] == 3
    run_train(*argv, "--out", tmp_path / "run")
    assert_same_runs(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("torchrun, saved", [(False, 4), (True, 3)])
def test_a_closed_terminal_is_ignored_where_nohup_said_so(torchrun, saved, argv, tmp_path, monkeypatch):
    """But not under torchrun, which passes it on and then ends what goes on."""
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")

    def signalled():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        run_train(*options(argv, steps=4, save_every=100, out=tmp_path / "run"),
                  after_backward=at_step(2, lambda: os.killpg(0, signal.SIGHUP)))
    status, output = forked(signalled)
    assert (status, state_of(tmp_path / "run")["step"]) == (128 + signal.SIGHUP if torchrun else 0, saved), output


@pytest.mark.parametrize("stage", ["vae", "dfgn"])
def test_a_run_goes_on_without_its_terminal(stage, vae_argv, argv, tmp_path):
    """Its other end is closed: the bar and the lines are lost, the run is not."""
    argv = options(vae_argv if stage == "vae" else argv, steps=4, save_every=2, log_every=1)

    def blind():
        reader, writer = os.pipe()
        os.close(reader)
        sys.stdout = sys.stderr = open(writer, "w", buffering=1)
        run_cli(lambda: run_train(*argv, "--out", tmp_path / "run"))
    status, _ = forked(blind)
    assert status == 0 and state_of(tmp_path / "run")["step"] == 4


@pytest.mark.parametrize("content", [None, b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_finished_run_writes_its_model_again(content, argv, whole, tmp_path, capsys):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    model = run / "model.safetensors"
    model.unlink()
    if content:
        model.write_bytes(content)
        with pytest.raises(UserError, match="a pointer of git-lfs; `git lfs pull` fetches the file"):
            load_rdtf(model)
    else:
        with pytest.raises(UserError, match="no such model; the command that trained it writes it again"):
            load_rdtf(model)
    run_train(*argv, "--out", run)
    assert f"done, 8 steps; {model} was gone or damaged and is written again" in capsys.readouterr().out
    assert model.read_bytes() == (whole / "model.safetensors").read_bytes()


def test_loaders_that_could_deliver_nothing_are_refused(argv, tmp_path, monkeypatch):
    """Or are not waited for without end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 120)))
    with pytest.raises(UserError, match="--workers 2: the folder of temporary files, .*too long for sockets"):
        run_train(*options(argv, workers=2, out=tmp_path / "run"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(torch.Tensor, "share_memory_", lambda _: (_ for _ in ()).throw(RuntimeError("unable to open")))
    with pytest.raises(UserError, match="--workers 1: no shared memory here .unable to open.; give --workers 0"):
        run_train(*options(argv, workers=1, out=tmp_path / "run"))
    monkeypatch.undo()
    monkeypatch.setattr(loop, "PATIENCE", 1)
    monkeypatch.setattr(train.data.ClipDataset, "__getitem__", lambda *_: time.sleep(60))
    with pytest.raises(UserError, match="--workers: DataLoader timed out after 1 seconds"):
        run_train(*options(argv, workers=1, out=tmp_path / "run"))


def test_logs_and_hidden_files_are_no_run(argv, tmp_path):
    for name in ("train.log", "slurm-123.out", ".DS_Store", ".nfs0001", "Thumbs.db", "log.txt"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere/later")               # not there yet
    for run in (tmp_path / "run", tmp_path / "link"):
        run_train(*options(argv, steps=1, out=run))
    assert (tmp_path / "elsewhere/later/model.safetensors").is_file()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").touch()
    with pytest.raises(UserError, match="holds other files .thesis.tex.; name a new folder"):
        run_train(*options(argv, steps=1, out=tmp_path / "other"))


@pytest.mark.parametrize("moment", ["latents", "config.json", "step", "log line", "checkpoint", "model.safetensors",
                                    "state.pt"])
def test_a_kill_at_any_moment_loses_nothing(moment, argv, whole, stickers16, tmp_path):
    """Within what is written, or before it gets its name; in a step, where a loader lives on for seconds."""
    run, save, replace, moments = half_of(whole, tmp_path / "run"), torch.save, os.replace, VAE.moments
    if moment == "latents":
        without = shutil.ignore_patterns("latents-*")
        argv = options(argv, data=shutil.copytree(stickers16, tmp_path / "set", ignore=without))

    def cut_line(log, *_, **__):
        with open(log, "a") as file:
            file.write('{"step": 5, "lo')
        die()

    def killed():
        hook = None
        if moment == "latents":
            batches = [1, 2]
            VAE.moments = lambda vae, x: moments(vae, x) if batches and batches.pop() else die()
        elif moment == "step":
            hook = at_step(6, die)
        elif moment == "log line":
            run_folder.append = cut_line
        elif moment == "checkpoint":
            torch.save = lambda state, file: (save(state, file), file.truncate(5000), die())
        else:
            os.replace = lambda a, b: die() if Path(b).name == moment else replace(a, b)
        run_train(*options(argv, out=run, workers=int(moment == "step")), after_backward=hook)
    assert forked(killed)[0] == -signal.SIGKILL
    parts = list(tmp_path.glob("set/latents-*.part"))
    assert len(parts) == (moment == "latents")
    for part in parts:
        os.truncate(part, part.stat().st_size - 7)                     # within a row
    run_train(*argv, "--out", run)
    assert_same_runs(run, whole)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(argv, whole, tmp_path, capsys):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    os.truncate(run / "state.pt", 5000)
    run_train(*argv, "--out", run)
    assert f"{run / 'state.pt'}: not readable" in capsys.readouterr().err
    assert_same_runs(run, whole)
    assert state_of(run, "state.prev.pt")["step"] == 4                 # not the damaged one
    state = state_of(whole)
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    for wrong, said in ((state, "moments of another shape than parameter 0"), (dict(state, net={}), "Missing key"),
                        (dict(step=1), "KeyError: 'net'"), ([1], "TypeError")):
        torch.save(wrong, run / "state.pt")
        with pytest.raises(UserError, match=f"{run}: its checkpoint is not one of this run .*{said}"):
            run_train(*argv, "--out", run)


def limit_files(size):
    """Longer files cannot be written by this process, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("name", ["state.pt", "model.safetensors", "log.jsonl"])
def test_a_full_disk_ends_in_a_sentence_and_spoils_nothing(name, argv, whole, tmp_path):
    run = half_of(whole, tmp_path / "run")
    before, content = (run / "state.pt").read_bytes(), (whole / name).read_bytes()
    if name == "log.jsonl":                                            # cut to four lines before the first step
        content = b"".join(content.splitlines(keepends=True)[:4]) + b"12 bytes more"

    def full():
        run_train(*argv, "--out", run, after_backward=at_step(4, lambda: limit_files(len(content) - 1)))
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


def test_a_killed_loader_is_told_in_a_sentence(argv, tmp_path):
    def kill_loader():
        loader, = multiprocessing.active_children()
        loader.kill()
        os.waitid(os.P_PID, loader.pid, os.WEXITED | os.WNOWAIT)       # until torch hears of it

    def killed():
        run_train(*options(argv, save_every=2, out=tmp_path / "run", workers=1),
                  after_backward=at_step(2, kill_loader))
    status, output = forked(killed)
    assert status == 2 and re.search("error: --workers: DataLoader worker .* The same command goes on from the", output)
    assert state_of(tmp_path / "run")["step"] == 2


# ---- two ranks
def torchrun(folder, *argv, do=None, agents=1, restarts=0):
    """(exit statuses of its agents, what all wrote on stderr) of two ranks of a training, which do() in step 5.

    Two agents have a rank each, as on two nodes."""
    script, here = folder / "script.py", [str(SCRIPT.parent), str(Path(__file__).parent)]
    hook = f"test_resume.at_step(5, test_resume.{do.__name__})" if do else None
    script.write_text(f"import sys\nsys.path[:0] = {here}\nimport test_resume, train\n"
                      f"train.run_cli(lambda: train.main(after_backward={hook}))\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={agents}", f"--nproc_per_node={2 // agents}",
               "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=run", "--local_addr=127.0.0.1",
               f"--max-restarts={restarts}", script, *argv]
    environment = dict(os.environ, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=str(agents - 1))
    launchers = [subprocess.Popen([*map(str, command)], env=environment, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.PIPE, text=True) for _ in range(agents)]
    try:
        errors = [launcher.communicate(timeout=600)[1] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.terminate()                                       # takes its ranks along; kill() would leave them
    return [launcher.returncode for launcher in launchers], "\n".join(errors)


@pytest.fixture(scope="module")
def two_ranks(argv, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    status, errors = torchrun(folder, *argv, "--out", folder / "run")
    assert status == [0] and "FutureWarning" not in errors, errors[-3000:]
    return folder / "run"


def test_two_ranks_see_what_one_sees(two_ranks, whole):
    one, two = log_of(whole), log_of(two_ranks)
    assert [line["step"] for line in two] == list(range(1, 9))
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-6)
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    assert [line["tasks"].keys() for line in two] == [line["tasks"].keys() for line in one]
    a, b = state_of(two_ranks)["ema"], state_of(whole)["ema"]
    assert all(torch.allclose(a[k], b[k], atol=2e-3) for k in a)


def kill_rank_1_once():
    mark = Path(sys.argv[0]).with_suffix(".killed")
    if os.environ["RANK"] == "1" and not mark.exists():
        mark.touch()
        die()


@pytest.mark.parametrize("agents", [1, 2])
def test_a_killed_rank_is_started_again_by_torchrun(agents, two_ranks, argv, tmp_path):
    """With --zero, which changes no bit: moments and files are those of a run without it."""
    run = tmp_path / "run"
    status, errors = torchrun(tmp_path, *argv, "--zero", "--out", run, do=kill_rank_1_once, agents=agents, restarts=1)
    assert status == [0] * agents and (tmp_path / "script.killed").exists(), errors[-3000:]
    assert_same_runs(run, two_ranks)


def press_ctrl_c():
    """To torchrun, which passes it on to both ranks; wait until this one has seen it."""
    if os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGINT)
    while signal.getsignal(signal.SIGINT) != signal.SIG_DFL:
        time.sleep(0.01)


def test_ctrl_c_under_torchrun_saves_and_one_rank_goes_on(argv, whole, tmp_path):
    run = tmp_path / "run"
    _, errors = torchrun(tmp_path, *argv, "--out", run, "--save-every", 100, do=press_ctrl_c)
    assert "[rank" not in errors                                       # no traceback of a rank
    assert state_of(run)["step"] == 6 and [line["step"] for line in log_of(run)] == list(range(1, 7))
    run_train(*argv, "--out", run)
    assert [x["loss"] for x in log_of(run)] == pytest.approx([x["loss"] for x in log_of(whole)], rel=1e-4)


def fill_the_disk():
    limit_files(100_000)


def test_all_ranks_end_when_one_cannot_save(argv, tmp_path):
    status, errors = torchrun(tmp_path, *argv, "--out", tmp_path / "run", do=fill_the_disk)
    assert status != [0] and re.search(r"error: .*cannot be written \(.*File too large", errors), errors[-3000:]
