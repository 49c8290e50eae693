"""train.py: a resumed run, two ranks and loader processes change no number; bad input stops in one line."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import train
from conftest import TOWER_FIELDS, run_train
from data import TASKS, UserError
from model import PRESETS, RDTF, VAE, Config
from train import TrainConfig, load_model, resolve_config

SCRIPT = Path(train.__file__)


def options(argv, **changes):
    """argv with --name value pairs put behind, which win."""
    return [*argv, *(str(x) for k, v in changes.items() for x in ("--" + k.replace("_", "-"), v))]


def state_of(run):
    return torch.load(Path(run) / "state.pt", weights_only=True)


def log_of(run, free=("clips_per_s", "cpu_s", "save_s", "peak_mb")):
    return [{k: v for k, v in json.loads(line).items() if k not in free} for line in (Path(run) / "log.jsonl").read_text().splitlines()]


def assert_same(a, b, where="state"):
    """Equal to the last bit, all the way down."""
    if torch.is_tensor(a):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{where}.{i}")
    else:
        assert a == b, where


def copy_run(source, folder):
    return Path(shutil.copytree(source, folder / "run"))


@contextmanager
def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """This signal comes while that step of the run inside is computed, and ends it."""
    plain, sent = train.learning_rate, []

    def hooked(config, now):
        if now == step and not sent:
            sent.append(number)
            signal.raise_signal(number)
        return plain(config, now)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=str(128 + number)):
        patch.setattr(train, "learning_rate", hooked)
        yield


# ---- what a run leaves

def test_a_run_folder(tiny_dfgn, tiny_vae):
    assert {p.name for p in tiny_dfgn.iterdir()} == {"config.json", "log.jsonl", "state.pt", "state.prev.pt", "model.safetensors"}
    config = json.loads((tiny_dfgn / "config.json").read_text())
    assert config["train"]["steps"] == 7 and Config.from_dict(config["model"]) == PRESETS["tiny"]
    state = state_of(tiny_dfgn)
    assert state["step"] == 7 and torch.load(tiny_dfgn / "state.prev.pt", weights_only=True)["step"] == 4
    assert {"net", "ema", "optimizer", "curriculum", "window"} <= set(state)
    assert (tiny_dfgn / "model.safetensors").stat().st_mode == (tiny_dfgn / "config.json").stat().st_mode                  # to be shared
    assert len(state["optimizer"]["state"]) == len(list(RDTF(PRESETS["tiny"]).parameters()))


def test_log_lines(tiny_dfgn, tiny_vae):
    lines = [json.loads(line) for line in (tiny_dfgn / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 7]
    for line in lines:
        assert set(line) == {"step", "loss", "grad_norm", "lr", "entropy", "r", "tasks", "deciles", "clips_per_s", "cpu_s", "save_s", "peak_mb"}
        assert set(line["tasks"]) <= set(TASKS) and set(line["deciles"]) <= set("0123456789") and line["tasks"] and line["deciles"]
        assert line["loss"] > 0 and line["grad_norm"] > 0 and 0.3 < line["entropy"] < 1 and line["clips_per_s"] > 0 and line["cpu_s"] > 0 and line["peak_mb"] > 50
        assert min(line["tasks"].values()) <= line["loss"] + 1e-4 and max(line["tasks"].values()) >= line["loss"] - 1e-4
    assert [line["save_s"] > 0 for line in lines] == [False, False, True, False]                 # after step 4
    vae = [json.loads(line) for line in (tiny_vae / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in vae] == [2, 4] and {"loss", "grad_norm", "lr", "clips_per_s", "cpu_s", "peak_mb"} <= set(vae[0])


def test_the_model_file_holds_averaged_weights_and_its_configuration(tiny_dfgn, tiny_vae):
    net, meta = load_model(tiny_dfgn / "model.safetensors", "dfgn")
    assert net.config == PRESETS["tiny"] and not net.training and not any(p.requires_grad for p in net.parameters())
    state = state_of(tiny_dfgn)
    assert_same(dict(net.state_dict()), {k: v for k, v in state["ema"].items()})
    assert not torch.equal(state["ema"]["dfgn.conv_out.weight"], state["net"]["dfgn.conv_out.weight"])
    assert meta["kind"] == "dfgn" and meta["step"] == 7 and meta["vae"] == train.file_hash(tiny_vae / "model.safetensors")
    assert Path(meta["vae_file"]) == tiny_vae / "model.safetensors"


def test_the_vaes_latents_are_standardised(tiny_vae, stickers16):
    vae, meta = load_model(tiny_vae / "model.safetensors", "vae")
    stickers = data.StickerSet(stickers16, "train")
    mean, square = 0, 0
    for record in stickers.records:                                    # every sticker weighs the same, a still as much as a clip
        z = vae.encode(data.to_tensor(stickers.clip(record, range(record["n"])))).double()
        mean, square = mean + z.mean((0, 2, 3)) / len(stickers), square + (z ** 2).mean((0, 2, 3)) / len(stickers)
    assert (mean / square.sqrt()).abs().max() < 0.15 and square.mean().item() == pytest.approx(1, abs=0.1)
    assert 5 < meta["psnr"] < 60 and meta["kind"] == "vae"


def test_a_finished_run_is_left_alone(tiny_dfgn, dfgn_argv, capsys):
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tiny_dfgn.iterdir()}
    run_train(*options(dfgn_argv, steps=7, out=tiny_dfgn, save_every=4))
    assert "nothing to do" in capsys.readouterr().out
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tiny_dfgn.iterdir()} == before


def test_averaged_weights_after_one_step(dfgn_argv, tmp_path, monkeypatch):
    start = {}

    def made(config):
        net = RDTF(config)
        start.update({k: v.clone() for k, v in net.state_dict().items()})
        return net
    monkeypatch.setattr(train, "RDTF", made)
    run_train(*options(dfgn_argv, steps=1, out=tmp_path / "run", log_every=100, warmup=0))
    state, moved = state_of(tmp_path / "run"), 0
    for name, w in state["net"].items():
        if name in ("data_std", "word_weight", "word_pictures", "mean_picture"):                       # measured, not trained
            continue
        moved += (w - start[name]).abs().max().item() > 1e-5
        assert torch.allclose(state["ema"][name], 0.1 * start[name] + 0.9 * w, atol=1e-6), name            # decay (1 + 0) / (10 + 0)
    assert moved > 1


# ---- resuming

@pytest.mark.parametrize("stage, more", [("vae", {}), ("dfgn", {}), ("dfgn", dict(frames="sample", still_share=0, workers=1))])
def test_resuming_is_bit_exact(stage, more, vae_argv, dfgn_argv, tmp_path, monkeypatch, capsys):
    argv = options(vae_argv if stage == "vae" else dfgn_argv, steps=8, log_every=3, **more)
    run_train(*options(argv, out=tmp_path / "whole"))
    with stop_at(monkeypatch, 4):
        run_train(*options(argv, out=tmp_path / "parts"))                       # within a log window
    assert state_of(tmp_path / "parts")["step"] == 5 and "SIGTERM" in capsys.readouterr().out
    assert load_model(tmp_path / "parts/model.safetensors", stage)[1]["step"] == 5
    run_train(*options(argv, out=tmp_path / "parts"))
    assert_same(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts") and [line["step"] for line in log_of(tmp_path / "parts")] == [3, 6, 8]
    assert_same(*(dict(load_model(tmp_path / run / "model.safetensors", stage)[0].state_dict()) for run in ("whole", "parts")))


def test_a_process_told_to_stop_saves_and_goes_on_bit_for_bit(dfgn_argv, tmp_path):
    """SIGTERM to the whole group, as torchrun and job schedulers send it: the loader's processes get it, too."""
    argv = options(dfgn_argv, steps=16, log_every=1)
    log = tmp_path / "parts/log.jsonl"
    command = [sys.executable, str(SCRIPT), *map(str, options(argv, out=tmp_path / "parts", workers=1))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not (log.is_file() and log.read_text().count("\n") >= 2):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 143, err
    stopped = state_of(tmp_path / "parts")["step"]
    assert 2 <= stopped < 16 and "SIGTERM" in out
    run_train(*options(argv, out=tmp_path / "parts"))
    run_train(*options(argv, out=tmp_path / "whole"))
    assert_same(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")


def test_a_corrupt_checkpoint_falls_back_to_the_one_before(tiny_dfgn, dfgn_argv, tmp_path, capsys):
    run = copy_run(tiny_dfgn, tmp_path)
    (run / "state.pt").write_bytes((run / "state.pt").read_bytes()[:5000])
    (run / "log.jsonl").write_text((run / "log.jsonl").read_text() + '{"step": 9')                       # cut off while written
    run_train(*options(dfgn_argv, steps=7, out=run, save_every=4))
    assert f"{run / 'state.pt'}: not readable" in capsys.readouterr().err
    assert_same(state_of(run), state_of(tiny_dfgn))
    assert log_of(run) == log_of(tiny_dfgn)


def test_nothing_is_written_over_when_no_checkpoint_can_be_read(tiny_dfgn, dfgn_argv, tmp_path):
    run = copy_run(tiny_dfgn, tmp_path)
    for name in ("state.pt", "state.prev.pt"):
        (run / name).write_bytes(b"broken")
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    with pytest.raises(UserError, match="state.p"):
        run_train(*options(dfgn_argv, steps=7, out=run, save_every=4))
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


def test_a_crash_between_checkpoint_and_model_loses_no_model(dfgn_argv, tmp_path, monkeypatch):
    argv = options(dfgn_argv, steps=2, out=tmp_path / "run")

    def crash(*_, **__):
        raise RuntimeError("pulled the plug")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(train, "save_model", crash)
        run_train(*argv)
    run_train(*argv)
    assert load_model(tmp_path / "run/model.safetensors", "dfgn")[1]["step"] == 2


def test_a_full_disk_spoils_no_checkpoint(tmp_path):
    (tmp_path / "file").write_text("old")

    def half(path):
        path.write_text("ne")
        raise OSError(28, "No space left on device")
    with pytest.raises(UserError, match="file: cannot be written .No space left on device.;"):
        train.write_atomically(tmp_path / "file", half)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_two_processes_write_the_same_run(vae_argv, dfgn_argv, tmp_path):
    """Fresh ones, whose hashes of strings and addresses differ."""
    jobs = {"vae": vae_argv, "dfgn": dfgn_argv}
    for n in "12":
        argvs = [[str(a) for a in options(argv, steps=3, log_every=1, precision="float32", out=tmp_path / (stage + n))] for stage, argv in jobs.items()]
        code = f"import json, sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import train; [train.main(argv) for argv in json.loads(sys.argv[1])]"
        subprocess.run([sys.executable, "-c", code, json.dumps(argvs)], check=True, capture_output=True, env=dict(os.environ, PYTHONHASHSEED=n))
    for stage in jobs:
        assert_same(*(state_of(tmp_path / (stage + n)) for n in "12"))
        one, two = (log_of(tmp_path / (stage + n)) for n in "12")
        assert one == two and len(one) == 3


# ---- ranks and workers

DRIVER = """
import functools, json, sys
sys.path.insert(0, sys.argv[1])
import torch, train
torch.set_num_threads(1)
train.round = lambda x, digits=0: x                     # the log with all its digits
train.setup = functools.cache(train.setup)              # one process group for both stages
train.dist.destroy_process_group = lambda: None
for argv in json.loads(sys.argv[2]):
    train.main(argv)
"""


def test_two_ranks_see_what_one_sees(vae_argv, dfgn_argv, tmp_path, monkeypatch):
    jobs = {"vae": options(vae_argv, steps=20, log_every=1, precision="float32"),
            "dfgn": options(dfgn_argv, steps=20, log_every=1, precision="float32", ema=0.5)}
    (tmp_path / "driver.py").write_text(DRIVER)
    argvs = [[str(a) for a in options(argv, out=tmp_path / f"{stage}-2")] for stage, argv in jobs.items()]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "driver.py", str(SCRIPT.parent), json.dumps(argvs)]
    launcher = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        error = launcher.communicate(timeout=600)[1]
    except subprocess.TimeoutExpired:
        launcher.terminate()                                           # takes its ranks along; kill() would leave them
        error = launcher.communicate()[1]
    assert launcher.returncode == 0, error[-3000:]
    monkeypatch.setattr(train, "round", lambda x, digits=0: x, raising=False)
    for stage, argv in jobs.items():
        run_train(*options(argv, out=tmp_path / f"{stage}-1"))
        one, two = (log_of(tmp_path / f"{stage}-{n}") for n in (1, 2))
        assert [line["step"] for line in two] == list(range(1, 21))
        assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-6) and two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-4)
        assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)
        assert [sorted(line.get("tasks", {})) for line in two] == [sorted(line.get("tasks", {})) for line in one]
        a, b = (load_model(tmp_path / f"{stage}-{n}" / "model.safetensors", stage)[0].state_dict() for n in (1, 2))
        assert all(torch.allclose(a[k], b[k], atol=2e-3) for k in a)


# ---- many processes, little memory

def first_gradients(argv, monkeypatch):
    """{parameter number: gradient} of a run's first step."""
    found, plain = {}, torch.nn.utils.clip_grad_norm_

    def hooked(parameters, most):
        parameters = list(parameters)
        for i, p in enumerate(parameters):
            found.setdefault(i, p.grad.clone())
        return plain(parameters, most)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", hooked)
        run_train(*argv)
    return found


@pytest.mark.parametrize("stage", ["vae", "dfgn"])
def test_micro_batches_add_up(stage, vae_argv, dfgn_argv, tmp_path, monkeypatch):
    argv = options(vae_argv if stage == "vae" else dfgn_argv, steps=3, log_every=1, precision="float32")
    whole, parts = (first_gradients(options(argv, accumulate=n, out=tmp_path / str(n)), monkeypatch) for n in (1, 4))
    assert whole.keys() == parts.keys() and all(torch.allclose(whole[i], parts[i], rtol=1e-4, atol=1e-6) for i in whole)
    for one, four in zip(log_of(tmp_path / "1"), log_of(tmp_path / "4")):
        assert one["loss"] == pytest.approx(four["loss"], rel=1e-5) and one["tasks"] == pytest.approx(four["tasks"], rel=1e-5)
        assert one["deciles"] == pytest.approx(four["deciles"], rel=1e-5)


def test_options_of_memory_and_speed_may_change_on_resuming(tiny_dfgn, dfgn_argv, tmp_path, capsys):
    run = copy_run(tiny_dfgn, tmp_path)
    run_train(*options(dfgn_argv, steps=7, out=run, accumulate=2, ema_device="cpu"), "--zero", "--compile", "--checkpointing")
    assert "nothing to do" in capsys.readouterr().out


def test_averages_in_host_memory(dfgn_argv, tmp_path):
    for place in ("same", "cpu"):
        run_train(*options(dfgn_argv, steps=3, ema_device=place, out=tmp_path / place))
    assert_same(*(state_of(tmp_path / place) for place in ("same", "cpu")))
    assert {v.dtype for v in state_of(tmp_path / "cpu")["ema"].values()} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_averages_in_host_memory_beside_a_gpu():
    net, config = torch.nn.Linear(512, 512, device="cuda"), TrainConfig(ema_device="cpu")
    near, far = (train.averages(c, net.state_dict()) for c in (TrainConfig(), config))
    assert all(v.is_pinned() and not v.is_cuda for v in far.values())
    for _ in range(5):
        with torch.no_grad():
            net.weight += torch.randn_like(net.weight)
        for c, ema in ((TrainConfig(), near), (config, far)):
            train.average(c, ema, dict(net.named_parameters()), 0.1)
    torch.cuda.synchronize()
    assert all(torch.equal(near[k].cpu(), far[k]) for k in near)


@pytest.mark.parametrize("stage", ["vae", "dfgn"])
def test_compiling_changes_no_number_and_no_name(stage, vae_argv, dfgn_argv, tmp_path, monkeypatch):
    """Traced and differentiated ahead of time as ever, but run by torch's own kernels: inductor's take minutes to build on one core."""
    monkeypatch.setattr(train, "COMPILER", "aot_eager")
    argv = options(vae_argv if stage == "vae" else dfgn_argv, steps=2, log_every=1, precision="float32")
    run_train(*options(argv, out=tmp_path / "plain"))
    run_train(*options(argv, out=tmp_path / "fast"), "--compile")
    plain, fast = (log_of(tmp_path / name) for name in ("plain", "fast"))
    assert [x["loss"] for x in fast] == pytest.approx([x["loss"] for x in plain], rel=1e-5)
    assert state_of(tmp_path / "fast")["net"].keys() == state_of(tmp_path / "plain")["net"].keys()


def torchrun(*arguments):
    """Start it."""
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(*launchers):
    try:
        errors = [launcher.communicate(timeout=300)[1] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.terminate()                                       # takes its ranks along; kill() would leave them
    assert all(launcher.returncode == 0 for launcher in launchers), "\n".join(e[-3000:] for e in errors)


def resumable(run, folder):
    """A copy of a run at the checkpoint before its last."""
    shutil.copytree(run, folder)
    os.replace(folder / "state.prev.pt", folder / "state.pt")
    return folder


@pytest.fixture(scope="module")
def shared_argv(dfgn_argv):
    return options(dfgn_argv, steps=16, save_every=8, log_every=1, precision="float32", ema=0.5)


@pytest.fixture(scope="module")
def two_ranks(shared_argv, tmp_path_factory):
    """Runs of two ranks: plain, zero, and zero as the plain one's second half."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "driver.py").write_text(DRIVER.replace('train.main(argv)', '''train.main(argv)
    if argv[-1].endswith("plain") and train.os.environ["RANK"] == "0":
        import pathlib, shutil
        shutil.copytree(argv[-1], half := argv[-1].replace("plain", "half"))
        pathlib.Path(half, "state.prev.pt").replace(pathlib.Path(half, "state.pt"))'''))
    argvs = [[*map(str, shared_argv), *more, "--out", str(folder / name)] for name, more in
             dict(plain=[], zero=["--zero"], half=["--zero"]).items()]
    wait_for(torchrun("--standalone", "--nproc_per_node=2", folder / "driver.py", SCRIPT.parent, json.dumps(argvs)))
    return folder


def test_zero_changes_no_bit_and_no_file(two_ranks):
    plain, zero, half = (state_of(two_ranks / name) for name in ("plain", "zero", "half"))
    assert_same(plain, zero)
    assert_same(plain, half)
    assert log_of(two_ranks / "plain") == log_of(two_ranks / "zero") == log_of(two_ranks / "half")


def test_a_run_goes_on_with_other_processes(two_ranks, shared_argv, tmp_path):
    """Two ranks with --zero to step 8, then one without and with micro-batches, is a run of one all the time."""
    run = resumable(two_ranks / "zero", tmp_path / "run")
    run_train(*options(shared_argv, out=run, accumulate=2))
    run_train(*options(shared_argv, out=tmp_path / "one"))
    a, b = state_of(run), state_of(tmp_path / "one")
    assert all(torch.allclose(a["net"][k], b["net"][k], atol=2e-3) for k in a["net"])
    assert [x["loss"] for x in log_of(run)] == pytest.approx([x["loss"] for x in log_of(tmp_path / "one")], rel=1e-4)
    for i, moments in a["optimizer"]["state"].items():
        assert moments["step"] == 16 and all(torch.allclose(v, b["optimizer"]["state"][i][k], atol=1e-3) for k, v in moments.items())


def test_two_agents_are_one_with_two_ranks_and_survive_a_kill(two_ranks, shared_argv, tmp_path, monkeypatch):
    """Two torchrun agents, as on two nodes, that meet at an address, and again when a process was killed: bit for bit what one agent's two ranks do."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    meet = ["--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "c10d", "--rdzv_endpoint", address, "--rdzv_id", "stickers", "--local_addr", "127.0.0.1"]
    agents = [torchrun(*meet, "--max-restarts", 1, SCRIPT, *shared_argv, "--zero", "--out", tmp_path / "run") for _ in range(2)]
    while agents[0].poll() is None and not (tmp_path / "run/state.pt").is_file():
        time.sleep(0.005)
    os.kill(children(agents[1].pid)[-1], signal.SIGKILL)
    wait_for(*agents)
    assert_same(state_of(two_ranks / "plain"), state_of(tmp_path / "run"))


def test_restarts_on_several_nodes_want_a_new_store(monkeypatch, dfgn_argv, tmp_path):
    for name, value in dict(RANK=0, WORLD_SIZE=2, TORCHELASTIC_USE_AGENT_STORE=True, TORCHELASTIC_MAX_RESTARTS=3, GROUP_WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for it on each"):
        run_train(*options(dfgn_argv, out=tmp_path / "run"))


def test_loader_processes_change_nothing(dfgn_argv, tmp_path):
    for workers in (0, 2):
        run_train(*options(dfgn_argv, steps=6, out=tmp_path / str(workers), workers=workers, log_every=1))
    assert log_of(tmp_path / "0") == log_of(tmp_path / "2")
    assert_same(state_of(tmp_path / "0")["net"], state_of(tmp_path / "2")["net"])


def test_seeds_differ(dfgn_argv, tmp_path):
    for seed in (0, 1):
        run_train(*options(dfgn_argv, steps=1, out=tmp_path / str(seed), seed=seed, log_every=1))
    assert log_of(tmp_path / "0") != log_of(tmp_path / "1")


# ---- draws

def draws(count=4000, p=np.full(6, 1 / 6), real=8, T=8, config=TrainConfig()):
    return [train.draw_condition(config, p, 3, n, real, T, 1000) for n in range(count)]


def test_shares_of_dropped_conditions():
    tasks, masks, text, t = (np.array(x) for x in zip(*draws()))
    given, i2v, t2v = masks.any(1), tasks == TASKS.index("i2v"), tasks == TASKS.index("t2v")
    assert not text[i2v].any() and not given[t2v].any()
    free = ~i2v & ~t2v
    assert np.mean(~text[free] & given[free]) == pytest.approx(0.10, abs=0.02)
    assert np.mean(text[free] & ~given[free]) == pytest.approx(0.10, abs=0.02)
    assert np.mean(~text[free] & ~given[free]) == pytest.approx(0.05, abs=0.015)
    assert np.mean(~text[t2v]) == pytest.approx(0.15, abs=0.04) and np.mean(~given[i2v]) == pytest.approx(0.15, abs=0.04)
    assert masks.shape == (4000, 8) and masks.dtype == np.float32 and masks.sum(1).max() < 8
    assert t.min() < 10 and t.max() > 989 and t.max() <= 999 and t.mean() == pytest.approx(500, abs=20)


def test_tasks_are_drawn_by_their_probabilities():
    p = np.array([0.4, 0.05, 0.25, 0.0, 0.2, 0.1])
    assert np.bincount([d[0] for d in draws(p=p)], minlength=6) / 4000 == pytest.approx(p, abs=0.03)
    assert {d[0] for d in draws(200, p, real=1)} == {0}


def test_padded_frames_are_never_given():
    assert not np.array([d[1] for d in draws(500, real=3)])[:, 3:].any()


def test_draws_repeat_and_differ():
    a, b = draws(50), draws(50)
    assert all(x[0] == y[0] and (x[1] == y[1]).all() and x[2:] == y[2:] for x, y in zip(a, b))
    other = draws(50, config=TrainConfig(seed=1))
    assert len({x[3] for x in a}) > 40 and [x[3] for x in a] != [x[3] for x in other]


def test_frames_of_a_step():
    plans = [train.step_frames(TrainConfig(), s, 8) for s in range(2000)]
    assert np.mean([plan == (1, 8) for plan in plans]) == pytest.approx(TrainConfig().still_share, abs=0.03)
    assert {plan for plan in plans} == {(1, 8)} | {(k, 1) for k in range(3, 9)}
    assert {train.step_frames(TrainConfig(frames="sample", still_share=0), s, 8) for s in range(50)} == {(8, 1)}
    plans = [train.step_frames(TrainConfig(still_share=0, still_first=0.5, steps=60), s, 8) for s in range(60)]
    assert set(plans[:30]) == {(1, 8)} and (1, 8) not in plans[30:]


def test_learning_rate():
    cosine, constant = (TrainConfig(steps=100, warmup=10, lr=2.0, lr_schedule=s) for s in ("cosine", "constant"))
    assert [train.learning_rate(constant, s) for s in (0, 4, 9, 50, 99)] == pytest.approx([0.2, 1, 2, 2, 2])
    assert train.learning_rate(cosine, 50) == pytest.approx(1) and train.learning_rate(cosine, 99) < 0.001
    assert train.learning_rate(cosine, 4) < 1 and train.learning_rate(TrainConfig(warmup=0, lr_schedule="constant"), 0) == TrainConfig().lr


# ---- the VAE's loss and statistics

def test_composing_on_a_colour():
    x = torch.tensor([[1.0, -1, -1, 1], [-1, -1, -1, -1], [0, -1, -1, 0]]).view(3, 4, 1, 1)              # red, nothing, half-transparent red
    background = torch.tensor([[0.5, 0.5, 0.5], [0.2, -0.4, 1], [1, 1, 1]])
    assert train.compose(x, background).flatten(1).tolist() == pytest.approx(np.array([[1, -1, -1], [0.2, -0.4, 1], [1, 0, 0]]))


def test_the_vaes_loss_by_hand():
    config, x = PRESETS["tiny"].vae, torch.zeros(2, 4, 4, 4)
    mean, logvar = torch.full((2, 4, 1, 1), 2.0), torch.zeros(2, 4, 1, 1)
    y = x.clone()
    y[1, 3] = 0.5                                                      # alpha alone is wrong, by 0.5
    loss = train.vae_losses(lambda *_: (y, mean, logvar), x, torch.zeros(2, 3), None, config)
    kl = config.kl_weight * 0.5 * 4 * 4
    colour = 0.25                                                      # (1 - alpha) * (0 + 1) changes by 0.25
    assert loss.tolist() == pytest.approx([kl, colour ** 2 + 0.1 * colour + 0.1 * 0.5 + kl], rel=1e-5)


def test_pictures_are_fitted_to_the_training_split(tiny_dfgn, tiny_vae, stickers16):
    """A caption's picture is nearer to its sticker's mean frame than the mean of all is, and the mean counts concepts alike."""
    (net, _), (vae, _) = load_model(tiny_dfgn / "model.safetensors", "dfgn"), load_model(tiny_vae / "model.safetensors", "vae")
    stickers = data.StickerSet(stickers16, "train")
    clips = [stickers.clip(r, data.even_frames(r["n"], 8)) for r in stickers.records]
    means = torch.stack([vae.standardise(vae.moments(data.to_tensor(c))[0]).mean(0) for c in clips])
    share = torch.tensor([1 / len(stickers.by_concept[r["concept"]]) for r in stickers.records])
    assert torch.allclose(net.mean_picture, (means * share[:, None, None, None]).sum(0) / share.sum(), atol=0.02)     # cached as float16
    pictures = net.picture(data.tokenize([r["caption"] for r in stickers.records]))
    assert (pictures - means).square().mean() < 0.7 * (net.mean_picture - means).square().mean()


def test_measured_latents_are_centred_and_uncorrelated(stickers16, tiny_vae):
    vae, _ = load_model(tiny_vae / "model.safetensors", "vae")
    stickers = data.StickerSet(stickers16, "train")
    train.measure_latents(vae, stickers, 0, 512)
    rng = np.random.default_rng(0)
    records = [stickers.records[i] for i in rng.integers(len(stickers), size=256)]
    z = vae.encode(vae.images(data.to_tensor(np.concatenate([stickers.clip(r, [rng.integers(r["n"])]) for r in records]))))
    z = z.transpose(0, 1).flatten(1).double()
    covariance = z @ z.T / z.shape[1]
    variance = covariance.diag()
    assert torch.allclose(vae.latent_axes @ vae.latent_axes.T, torch.eye(16), atol=1e-5)
    assert variance.mean().item() == pytest.approx(1, abs=0.15) and variance[0] > 2 * variance[4] > 4 * variance[-1]        # the largest first
    assert (covariance - variance.diag()).abs().max() < 0.1 * variance.max()


def test_a_vae_of_opaque_images(stickers16, tmp_path):
    """Three channels, as Stable Diffusion's: every function that meets a prepared set's RGBA must take it."""
    vae = VAE(resolve_config("tiny", ["vae.image_channels=3"]).vae)
    stickers = data.StickerSet(stickers16, "train")
    x = torch.zeros(2, 3, 16, 16)
    assert train.vae_losses(vae, x, torch.zeros(2, 3), torch.zeros(2, vae.config.latent_channels, 4, 4), vae.config).shape == (2,)
    train.measure_latents(vae, stickers, 0, 64)
    assert np.isfinite(train.vae_psnr(vae, stickers, 8)).all()
    rgba = np.array([[[[200, 100, 0, 255], [200, 100, 0, 51], [9, 9, 9, 0]]]], np.uint8)  # opaque, a fifth of it, clear
    assert torch.allclose((vae.images(data.to_tensor(rgba))[0, :, 0].T + 1) * 127.5, torch.tensor([[200., 100, 0], [244, 224, 204], [255, 255, 255]]), atol=1e-3)
    copy = Path(shutil.copytree(stickers16, tmp_path / "set", ignore=shutil.ignore_patterns("latents-*")))
    train.cache_latents(vae, "e" * 64, copy)
    assert data.latents_ready(copy, "e" * 64)


# ---- the latent cache

def other_vae(tiny_vae, path):
    """The same VAE with weights that differ a little."""
    net, meta = load_model(tiny_vae / "model.safetensors", "vae")
    weights = {k: v * 1.5 if k == "shortcut_in.weight" else v for k, v in net.state_dict().items()}
    train.save_model(path, weights, **meta)
    return path


def test_latents_are_made_once_by_each_vae(tiny_dfgn, dfgn_argv, tiny_vae, stickers16, tmp_path, monkeypatch):
    first = data.latents_folder(stickers16, train.file_hash(tiny_vae / "model.safetensors"))
    made = []
    plain = train.cache_latents
    monkeypatch.setattr(train, "cache_latents", lambda *a, **k: made.append(a[1]) or plain(*a, **k))
    run_train(*options(dfgn_argv, steps=1, out=tmp_path / "a"))
    assert made == [] and first.is_dir()
    vae = other_vae(tiny_vae, tmp_path / "other.safetensors")
    run_train(*options(dfgn_argv, steps=1, out=tmp_path / "b", vae=vae))
    run_train(*options(dfgn_argv, steps=1, out=tmp_path / "c", vae=vae))
    second = data.latents_folder(stickers16, train.file_hash(vae))
    assert made == [train.file_hash(vae)] and second.is_dir() and second != first
    assert not np.array_equal(*(np.array(data.open_latents(stickers16, train.file_hash(v))[0]) for v in (vae, tiny_vae / "model.safetensors")))


def test_cached_latents_are_the_vaes(tiny_dfgn, tiny_vae, stickers16):
    vae, _ = load_model(tiny_vae / "model.safetensors", "vae")
    mean, logvar = data.open_latents(stickers16, train.file_hash(tiny_vae / "model.safetensors"))
    stickers = data.StickerSet(stickers16)
    want = vae.moments(data.to_tensor(np.array(stickers.frames[70:75])))
    assert np.allclose(mean[70:75], want[0], atol=2e-2, rtol=2e-3) and np.allclose(logvar[70:75], want[1], atol=2e-2, rtol=2e-3)


# ---- a frozen text tower

def set_of(argv):
    """Where the last --data lies."""
    return Path(argv[len(argv) - argv[::-1].index("--data")])


def full_features(net, texts):
    """Token features by a whole open_clip model's own parts."""
    text = getattr(net, "text", net)
    with torch.no_grad():
        return text.ln_final(text.transformer(text.token_embedding(data.tokenize(texts)) + text.positional_embedding, attn_mask=text.attn_mask))


def test_a_tower_trains_without_network_and_resumes_bit_for_bit(tower_argv, tower_dfgn, clip_folder, tmp_path, monkeypatch, no_network):
    import open_clip
    argv = options(tower_argv[:-1 - len(TOWER_FIELDS)], steps=8) + tower_argv[-1 - len(TOWER_FIELDS):]
    folder, = set_of(tower_argv).glob("text-*")
    shutil.rmtree(folder)                                              # made again, without network
    with stop_at(monkeypatch, 4):
        run_train(*argv, "--out", tmp_path / "parts")
    assert state_of(tmp_path / "parts")["step"] == 5
    run_train(*argv, "--out", tmp_path / "parts", "--workers", 1)
    assert_same(state_of(tower_dfgn), state_of(tmp_path / "parts"))
    assert log_of(tower_dfgn) == log_of(tmp_path / "parts")

    inputs = json.loads((tower_dfgn / "config.json").read_text())["inputs"]
    net, meta = load_model(tower_dfgn / "model.safetensors", "dfgn")
    assert meta["text"] == dict(file=str(clip_folder), model="ViT-H-14", hash=inputs["clip_weights"]) and folder.name == f"text-{inputs['clip_weights'][:12]}"
    assert net.text is None and not any("text." in name for name in net.state_dict())                 # the tower is in no checkpoint
    stickers = data.StickerSet(set_of(tower_argv), "train")
    cache, texts = data.TextCache(set_of(tower_argv), inputs["clip_weights"], 32), data.StickerTexts(stickers, 4, 0, 0.2, 0.5)
    everything = [*texts]
    assert len(everything) == len(texts) == 1 + 4 * len(stickers) and not len(cache.missing(texts)) and len(cache.keys) == len(set(everything))
    whole = open_clip.create_model(f"local-dir:{clip_folder}", weights_only=True).eval()
    for some in (everything[:70], ["", stickers.records[3]["caption"]]):
        assert np.allclose(cache[some], full_features(whole, some), atol=2e-3) and cache[some].dtype == np.float32
    with pytest.raises(UserError, match="text-.*lacks features"):
        cache[["", "a text of nobody"]]


def test_variants_of_texts(stickers16):
    stickers = data.StickerSet(stickers16, "train")
    texts = data.StickerTexts(stickers, 3, 0, 0.2, 0.5)
    everything = [*texts]
    assert everything == [texts[k] for k in range(len(texts))] and everything[0] == ""
    assert everything[1::3] == [r["caption"] for r in stickers.records]
    drawn = everything[2::3] + everything[3::3]
    assert any("#" in t for t in drawn) and any("," in t for t in drawn) and everything[2::3] != everything[3::3]
    assert [*data.StickerTexts(stickers, 3, 1, 0.2, 0.5)] != everything and [*data.StickerTexts(stickers, 2, 0, 0.2, 0.5)][2::2] == everything[2::3]
    rng, record = np.random.default_rng(0), stickers.records[5]
    counts = Counter(texts.draw(record, 5, rng) for _ in range(600))
    assert set(counts) == set(everything[16:19]) and all(n > 150 * everything[16:19].count(t) for t, n in counts.items())
    latents = (np.zeros((stickers.meta["frames"], 4, 2, 2), np.float16),) * 2
    finite, free = (data.ClipDataset(stickers, latents, 0, 4, texts=t) for t in (texts, None))
    for n in range(20):
        item = finite[3, n, 4]
        assert item["text"] in everything[1 + 3 * item["index"]:4 + 3 * item["index"]] and free[3, n, 4]["index"] == item["index"]


class TowerOfOnes(torch.nn.Module):
    """Says what it was asked; stops at batch `last`."""
    def __init__(self, last=100):
        super().__init__()
        self.seen, self.last = [], last

    def forward(self, tokens):
        if len(self.seen) == self.last:
            raise KeyboardInterrupt
        self.seen.append(len(tokens))
        return torch.ones(len(tokens), 77, 8) * tokens[:, 1:2, None] / 1000


def test_a_text_cache_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    texts = ["", *(f"{i} cats" for i in range(60)), "7 cats"]
    monkeypatch.setattr(data.TextCache, "most", 77 * 8 * 2 * 20)
    tower, cache = TowerOfOnes(last=5), data.TextCache(tmp_path, "f" * 64, 8)
    assert cache.missing(texts).tolist() == list(range(61))             # the second "7 cats" is the first
    with pytest.raises(KeyboardInterrupt):
        train.cache_texts(tower, cache, texts, cache.missing(texts), 0, 1, "cpu", batch=8)
    cache.open()
    assert cache.missing(texts).tolist() == list(range(32, 61))          # 16 a file: two whole batches below the limit
    for rank in (1, 0):                                                # a share each of two ranks
        train.cache_texts(tower := TowerOfOnes(), cache, texts, range(32, 61), rank, 2, "cpu", batch=8)
        assert tower.seen == [[8, 8], [8, 5]][rank]
    cache.open()
    assert not len(cache.missing(texts)) and len(cache.starts) == 5 and all(cache.map(s).nbytes <= cache.most for s in range(4))
    want = data.tokenize(texts)[:, 1] / 1000
    assert np.allclose(cache[texts], np.broadcast_to(want[:, None, None], (62, 77, 8)), rtol=1e-3)
    assert np.array_equal(cache[["9 cats", ""]], cache[texts][[10, 0]])
    path = next(cache.folder.glob("*.bin"))
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=f"{path}: missing or of the wrong length"):
        data.TextCache(tmp_path, "f" * 64, 8)


def test_every_layout_of_open_clips_weights_gives_the_same_tower(clip_folder, tmp_path, no_network):
    import open_clip
    from conftest import TINY_CLIP
    from safetensors.torch import save_file
    whole = open_clip.create_model(f"local-dir:{clip_folder}", weights_only=True).eval()
    weights = whole.state_dict()
    text = {k: v for k, v in weights.items() if k.startswith(("token_embedding", "positional", "transformer", "ln_final", "text_projection"))}
    custom = {**{f"text.{k}": v for k, v in text.items()}, **{k: v for k, v in weights.items() if k not in text}}
    assert custom.keys() == open_clip.CustomTextCLIP(**TINY_CLIP).state_dict().keys()
    want, texts = full_features(whole, ["red heart", "", "a # dog"]), data.tokenize(["red heart", "", "a # dog"])
    hashes = set()
    for name, saved in dict(plain=weights, custom=custom, half={k: v.half() for k, v in custom.items()}).items():
        for suffix in (".bin", ".safetensors"):
            folder = tmp_path / (name + suffix)
            folder.mkdir()
            (folder / "open_clip_config.json").write_text((clip_folder / "open_clip_config.json").read_text())
            torch.save(saved, folder / "open_clip_model.bin") if suffix == ".bin" else save_file(saved, folder / "open_clip_model.safetensors")
            tower = train.load_tower(folder, "ViT-H-14")
            assert not any(p.requires_grad or p.is_meta or p.dtype != torch.float32 for p in tower.parameters()) and not tower.training
            assert not any("visual" in k or "projection" in k for k in tower.state_dict())
            with torch.no_grad():
                assert torch.allclose(tower(texts), want, atol=1e-2 if name == "half" else 1e-5)
            hashes.add(train.name_tower(folder, "x", 32)["hash"])
    assert len(hashes) == 6 and train.name_tower(clip_folder, "x", 32)["hash"] not in hashes
    changed = Path(shutil.copytree(clip_folder, tmp_path / "quick"))
    (changed / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=dict(TINY_CLIP, quick_gelu=True))))
    assert train.name_tower(changed, "x", 32)["hash"] != train.name_tower(clip_folder, "x", 32)["hash"]                              # the same file, another network
    with torch.no_grad():
        assert (train.load_tower(changed, "x")(texts) - want).abs().max() > 1e-4


def test_towers_that_cannot_be_used(tower_argv, dfgn_argv, tiny_dfgn, clip_folder, tmp_path, no_network):
    from conftest import TINY_CLIP
    argv, fields = options(tower_argv[:-1 - len(TOWER_FIELDS)], steps=1, out=tmp_path / "run"), list(TOWER_FIELDS)

    def folder(name, weights=None, **text):
        out = tmp_path / name
        out.mkdir()
        (out / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=dict(TINY_CLIP, text_cfg=dict(TINY_CLIP["text_cfg"], **text)))))
        torch.save(weights or torch.load(clip_folder / "open_clip_pytorch_model.bin", weights_only=True), out / "open_clip_pytorch_model.bin")
        return out
    (tmp_path / "empty").mkdir()
    bare = folder("bare")
    (bare / "open_clip_config.json").unlink()
    with zipfile.ZipFile(tmp_path / "ViT-L-14.pt", "w") as archive:
        archive.writestr("ViT-L-14/code/__torch__.py", "")
    cases = [(fields, dict(clip_weights=tmp_path / "none.bin"), "--clip-weights .*none.bin: no such file"),
             (fields, dict(clip_weights=tmp_path / "empty"), "--clip-weights .*empty: no such file, or a folder without open_clip_config.json"),
             (fields, dict(clip_weights=bare), "--clip-weights .*bare: no open_clip_config.json"),
             (fields, dict(clip_weights=clip_folder / "open_clip_pytorch_model.bin", clip_model="hf-hub:some/model"), "--clip-model hf-hub:some/model: not a model"),
             (fields, dict(clip_weights=clip_folder / "open_clip_pytorch_model.bin"), "a text tower of width 1024, the preset's text.width is 32"),
             (fields, dict(clip_weights=folder("hf", hf_model_name="roberta-base")), "cannot be used .*hf_model_name='roberta-base'"),
             (fields, dict(clip_weights=folder("short", context_length=32)), "32 tokens of 49408, not 77"),
             (fields, dict(clip_weights=folder("deep", layers=3)), r"not the weights of TextTower: missing 12 \(text.transformer.resblocks.2"),
             (fields, dict(clip_weights=folder("other", weights={"text_model.embeddings.position_ids": torch.ones(1)})), "no weights by name that begins with text., "),
             (["text.kind=open_clip", "text.width=512", "dfgn.text_width=512", "text.buckets=0"], dict(clip_weights=tmp_path / "ViT-L-14.pt", clip_model="ViT-B-32-quickgelu"), "TorchScript archive"),
             ([*fields[:3], "text.buckets=64"], {}, "text.buckets is 64; with text.kind=open_clip"),
             (fields, dict(clip_weights=""), "--preset tiny: text.kind=open_clip wants .* --clip-weights"),
             (fields, dict(text_variants=0), "--text-variants 0")]
    for sets, change, said in cases:
        with pytest.raises(UserError, match=said):
            run_train(*options(argv, **change), "--set", *sets)
        assert not (tmp_path / "run").exists(), said
    with pytest.raises(UserError, match="--clip-weights .*preset tiny trains a text encoder of its own"):
        run_train(*options(dfgn_argv, steps=1, out=tmp_path / "run", clip_weights=clip_folder))


def test_texts_that_do_not_fit_the_disk(tower_argv, tmp_path, monkeypatch):
    monkeypatch.setattr(train.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 10 ** 5))
    with pytest.raises(UserError, match=r"--text-variants 9: features of \d+ texts are 0.\d GB, 0.0 GB are free"):
        run_train(*tower_argv, "--steps", 1, "--seed", 5, "--text-variants", 9, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_seed_adds_its_texts(tower_argv, tower_dfgn, tmp_path, monkeypatch):
    folder, = set_of(tower_argv).glob("text-*")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    loaded, plain = [], train.load_tower
    monkeypatch.setattr(train, "load_tower", lambda *a: loaded.append(a) or plain(*a))
    run_train(*tower_argv, "--steps", 1, "--out", tmp_path / "same")
    assert not loaded                                                  # nothing to encode: the tower stays on disk
    run_train(*tower_argv, "--steps", 1, "--seed", 9, "--out", tmp_path / "other")
    assert len(loaded) == 1 and before.items() < {p.name: p.read_bytes() for p in folder.iterdir()}.items()


def test_a_run_is_not_resumed_with_another_tower_of_the_same_name(tower_argv, clip_folder, tmp_path, monkeypatch):
    tower = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    argv = [*tower_argv, "--steps", 4, "--out", tmp_path / "run", "--clip-weights", tower]
    with stop_at(monkeypatch, 1):
        run_train(*argv)
    weights = torch.load(tower / "open_clip_pytorch_model.bin", weights_only=True)
    torch.save({k: v * 1.01 for k, v in weights.items()}, tower / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match="--clip-weights .*clip: not what .*run was started with"):
        run_train(*argv)


# ---- Stable Diffusion's VAE

SD_FIELDS = ("vae.size=16", "vae.image_channels=3", "vae.patch=1", "vae.widths=128,256,512,512", "vae.latent_channels=4", "vae.layers=2", "vae.groups=32",
             "vae.shortcut=false", "vae.fold=1", "dfgn.channels=4")


@pytest.fixture(scope="module")
def sd_checkpoint(sd_vae, tmp_path_factory):
    """A whole checkpoint in CompVis's naming and in half precision."""
    path = tmp_path_factory.mktemp("sd") / "sd.ckpt"
    weights = {f"first_stage_model.{name}": w.half() for name, w in sd_vae["compvis"].items()}
    torch.save(dict(state_dict={"model.diffusion_model.out.0.weight": torch.ones(3), **weights, "cond_stage_model.logit_scale": torch.ones(())}, epoch=1), path)
    return path


def test_stable_diffusions_weights_from_files(sd_vae, sd_checkpoint, tmp_path):
    from safetensors.torch import save_file
    vae, meta = load_model(sd_checkpoint, "vae")
    assert vae.config == PRESETS["paper"].vae == Config.from_dict(meta["config"]).vae and not vae.training and not any(p.requires_grad for p in vae.parameters())
    assert not vae.latent_mean.any() and (1 / vae.latent_std).tolist() == pytest.approx([0.18215] * 4, rel=1e-6)
    want = {name: w.half().float() for name, w in sd_vae["diffusers"].items()}
    assert_same({k: v for k, v in vae.state_dict().items() if k in want}, want)                       # float32, whatever the file holds
    x = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    z = vae.encode(x)
    y = vae.decode(z)
    save_file({k: v.half() for k, v in sd_vae["old"].items()}, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    torch.save({**{k: v.half() for k, v in sd_vae["compvis"].items()}, "loss.logvar": torch.zeros(())}, tmp_path / "vae.pt")
    torch.save({k: v.half() for k, v in sd_vae["diffusers"].items()}, tmp_path / "diffusion_pytorch_model.bin")
    for path in sorted(tmp_path.iterdir()):
        other, _ = load_model(path, "vae")
        with torch.no_grad():
            assert torch.equal(other.encode(x), z) and torch.equal(other.decode(z), y), path
        path.unlink()


def test_wrong_weights_of_stable_diffusion_are_named(sd_vae, tmp_path, dfgn_argv):
    small = {k: torch.zeros(()).expand(w.shape) for k, w in sd_vae["compvis"].items()}               # no values: nothing is to be loaded
    gone = {k: w for k, w in small.items() if k != "decoder.up.0.block.2.conv2.bias"}

    class Callback:                                                                                  # as pytorch-lightning leaves them
        pass
    globals()["Callback"], Callback.__qualname__ = Callback, "Callback"
    cases = dict(missing=(gone, r"missing 1 \(decoder.up_blocks.3.resnets.2.conv2.bias\)"),
                 more=({**small, "encoder.mid.attn_2.q.weight": torch.ones(1)}, r"unknown 1 \(encoder.mid.attn_2.q.weight\)"),
                 wide=({**small, "quant_conv.weight": torch.ones(32, 32, 1, 1)}, r"of another shape 1 \(quant_conv.weight \(32, 32, 1, 1\) instead of \(8, 8, 1, 1\)\)"),
                 square=({**small, "encoder.mid.attn_1.q.weight": torch.ones(512, 512, 3, 3)}, r"attentions.0.to_q.weight \(512, 512, 3, 3\) instead of \(512, 512\)"),
                 twice=({"encoder.mid.block_1.conv1.weight": torch.ones(1), "encoder.mid_block.resnets.0.conv1.weight": torch.ones(1)}, "a second tensor for encoder.mid_block.resnets.0"),
                 unet=({"model.diffusion_model.out.0.weight": torch.ones(3)}, "no weights by name that begins with first_stage_model., encoder."),
                 objects=(dict(state_dict=gone, callbacks=Callback()), "other Python objects too.*safetensors"))
    for name, (weights, said) in cases.items():
        torch.save(weights, tmp_path / f"{name}.ckpt")
        with pytest.raises(UserError, match=f"--vae .*{name}.ckpt: .*{said}"):
            run_train(*options(dfgn_argv, steps=1, out=tmp_path / "run", vae=tmp_path / f"{name}.ckpt"))
    with pytest.raises(UserError, match="--vae .*preset tiny wants"):
        torch.save(sd_vae["compvis"], tmp_path / "vae.ckpt")
        run_train(*options(dfgn_argv, steps=1, out=tmp_path / "run", vae=tmp_path / "vae.ckpt"))      # another architecture
    assert not (tmp_path / "run").exists()


def test_a_dfgn_over_stable_diffusions_vae(sd_checkpoint, dfgn_argv, stickers16, tmp_path):
    from sample import Sampler
    copy = Path(shutil.copytree(stickers16, tmp_path / "set", ignore=shutil.ignore_patterns("latents-*")))
    run_train(*options(dfgn_argv, steps=2, out=tmp_path / "run", data=copy, vae=sd_checkpoint), "--set", *SD_FIELDS)
    s = Sampler(tmp_path / "run/model.safetensors", device="cpu")
    assert s.meta["vae"] == train.file_hash(sd_checkpoint) and s.meta["vae_file"] == str(sd_checkpoint)
    out = s.sample(["red heart"], [(0, 0)], steps=2)
    assert out.shape == (1, 8, 16, 16, 4) and (out[..., 3] == 255).all() and out[..., :3].std() > 1


# ---- what is refused

@pytest.mark.parametrize("change, said", [
    (dict(lr=0.5), "--lr 0.5.*0.001"), (dict(steps=9), "--steps 9.*7"), (dict(seed=3), "--seed 3.*0"), (dict(weight_decay=0.5), "--weight-decay 0.5.*0.01"),
    (dict(set="dfgn.temporal=conv3d"), "--set .*conv3d"), (dict(preset="mini"), "--preset mini.*tiny"), (dict(stage="vae"), "--stage vae.*dfgn")])
def test_a_run_is_not_resumed_with_other_options(change, said, tiny_dfgn, dfgn_argv):
    before = {p.name: p.read_bytes() for p in tiny_dfgn.iterdir()}
    with pytest.raises(UserError, match=said):
        run_train(*options(dfgn_argv, **dict(dict(steps=7, out=tiny_dfgn), **change)))
    assert {p.name: p.read_bytes() for p in tiny_dfgn.iterdir()} == before


def test_watching_a_run_may_change(tiny_dfgn, dfgn_argv, capsys):
    run_train(*options(dfgn_argv, steps=7, out=tiny_dfgn, log_every=1, save_every=3, workers=3))
    assert "nothing to do" in capsys.readouterr().out


def test_a_run_is_not_resumed_by_another_version_of_a_preset(tiny_dfgn, dfgn_argv, tmp_path):
    run = Path(shutil.copytree(tiny_dfgn, tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    for value, said in ((0.25, "terminal was 0.25"), (None, "terminal was None")):
        config["model"]["diffusion"]["terminal"] = value
        (run / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=f"diffusion.{said}, it is 2e-05 now"):
            run_train(*options(dfgn_argv, steps=7, out=run, save_every=4))


def test_a_model_that_lacks_a_field_is_refused(tiny_dfgn, tmp_path):
    net, meta = load_model(tiny_dfgn / "model.safetensors", "dfgn")
    del meta["config"]["diffusion"]["terminal"]
    train.save_model(tmp_path / "m.safetensors", net.state_dict(), **meta)
    with pytest.raises(UserError, match="diffusion.terminal is missing"):
        load_model(tmp_path / "m.safetensors", "dfgn")


def test_a_run_is_not_resumed_with_another_vae_of_the_same_name(tiny_dfgn, tiny_vae, dfgn_argv, tmp_path, monkeypatch):
    vae = Path(shutil.copy(tiny_vae / "model.safetensors", tmp_path / "vae.safetensors"))
    argv = options(dfgn_argv, steps=4, out=tmp_path / "run", vae=vae)
    with stop_at(monkeypatch, 1):
        run_train(*argv)
    other_vae(tiny_vae, vae)
    with pytest.raises(UserError, match="--vae"):
        run_train(*argv)


def test_a_loss_that_is_not_finite_stops(dfgn_argv, stickers16, tmp_path, monkeypatch, capsys):
    plain = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda c, step: 1e30 if step == 5 else plain(c, step))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/bad-step-000001.pt").write_text("of an earlier stop")
    said = []
    for _ in range(2):
        with pytest.raises(UserError, match=r"loss is not finite at step 6 .*state\.pt") as stop:
            run_train(*options(dfgn_argv, steps=20, out=tmp_path / "run", save_every=4, weight_decay=0))
        said.append(str(stop.value))
    assert "not finite at step 6 (" in said[0] and "not finite at step 6 again (" in said[1] and "does not help" in said[1]
    state = state_of(tmp_path / "run")
    assert state["step"] == 4 and all(torch.isfinite(v).all() for v in state["net"].values())
    assert [p.name for p in (tmp_path / "run").glob("bad-step*")] == ["bad-step-000006.pt"]
    lines = (stickers16 / "index.jsonl").read_text().splitlines()
    for sample in torch.load(tmp_path / "run/bad-step-000006.pt", weights_only=True)["samples"][:3]:
        assert json.loads(lines[sample["line"] - 1]) == sample["record"] and sample["task"] in TASKS
        assert f"line {sample['line']}, {sample['record']['caption']!r}, {sample['task']} at timestep {sample['t']}" in said[0]
    run_train("--replay", tmp_path / "run/bad-step-000006.pt")
    assert re.search(r"dfgn.mid +nan +\d.*e\+(29|30)\n", capsys.readouterr().out)                      # the weights tell whose fault it is


def poisoned(collate, rank, value, step=2):
    """DFGNStage.collate whose last sample of a step has a latent of this value, on one rank."""
    def hooked(self, now, items, p):
        batch = collate(self, now, items, p)
        if now == step and self.rank == rank:
            batch["z0"][-1, 0, 0, 0, 0] = value
        return batch
    return hooked


def test_a_gradient_that_is_not_finite_stops(dfgn_argv, tmp_path, monkeypatch, capsys):
    """Its loss may well be finite; the weights that it would make must not reach a checkpoint."""
    monkeypatch.setattr(train.DFGNStage, "collate", poisoned(train.DFGNStage.collate, 0, 1e18))
    argv = options(dfgn_argv, steps=3, out=tmp_path / "run", precision="float32", accumulate=2, still_share=0)
    with pytest.raises(UserError, match=r"gradient is not finite at step 2 \(0 of 4 losses;.*no checkpoint"):
        run_train(*argv)
    assert not (tmp_path / "run/state.pt").exists()
    step = tmp_path / "run/bad-step-000002.pt"
    run_train("--replay", step)
    rows = [line for line in capsys.readouterr().out.splitlines() if re.match(" +[0-3] ", line)]
    norms = [re.search("gradient norm (.*)", row) for row in rows]
    assert len(rows) == 4 and norms[:2] == [None, None] and 0 < float(norms[2][1]) < 1e3 and norms[3][1] == "nan"   # of the second micro-batch
    for change in ("--lr", "0.5"), ("--seed", "1"), ("--tasks", "t2v"):
        with pytest.raises(UserError, match=f"{change[0]} .*--replay computes the step that was"):
            run_train("--replay", step, *change)
    with pytest.raises(UserError, match="--batch 4: not a multiple of the 1 processes times --accumulate 3"):
        run_train("--replay", step, "--accumulate", 3)


def test_a_disk_that_is_full_hides_no_bad_step(dfgn_argv, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(train.DFGNStage, "collate", poisoned(train.DFGNStage.collate, 0, torch.nan, step=0))
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"loss is not finite at step 0 .*bad-step-000000.pt: cannot be written \(No space left on device\)"):
        run_train(*options(dfgn_argv, steps=3, out=tmp_path / "run"))


POISONED = """
import sys
sys.path[:0] = sys.argv[1:3]
import data, test_train, torch, train
torch.set_num_threads(1)
train.DFGNStage.collate = test_train.poisoned(train.DFGNStage.collate, 1, torch.nan)
data.run_cli(lambda: train.main(sys.argv[3:]))
"""


def test_ranks_stop_together_and_the_step_is_computed_again_by_one(dfgn_argv, tmp_path, capsys):
    """The loss of one sample on one of two ranks is not finite."""
    (tmp_path / "driver.py").write_text(POISONED)
    argv = options(dfgn_argv, steps=4, out=tmp_path / "run", precision="float32", accumulate=2, still_share=0, batch=8)
    launcher = torchrun("--standalone", "--nproc_per_node=2", tmp_path / "driver.py", SCRIPT.parent, Path(__file__).parent, *argv)
    errors = re.findall("error: (.*)", launcher.communicate(timeout=300)[1])
    path = tmp_path / "run/bad-step-000002.pt"
    step = torch.load(path, weights_only=True)
    errors.sort(key=len)                                               # rank 0 names the file
    assert launcher.returncode and len(errors) == 2 and errors[0] == errors[1].replace(f"`python train.py --replay {path}` computes it alone; ", ""), errors
    assert f"loss is not finite at step 2 (1 of 8 losses; {step['index']}: {train.described(step['samples'][7])}); `python train.py --replay {path}`" in errors[1]
    assert step["world"] == 2 and len(step["samples"]) == 8 and [bool(np.isfinite(x)) for x in step["losses"]] == [True] * 7 + [False]
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    torch.save(step, tmp_path / "step.pt")                             # neither the run nor its data are needed
    step["batch"]["z0"][7] = 1
    torch.save(dict(step, train=dict(step["train"], data="gone", vae="gone")), tmp_path / "mended.pt")
    for name, *more in (["step.pt"], ["step.pt", "--accumulate", "1", "--checkpointing"], ["mended.pt"], ["step.pt", "--precision", "bf16"]):
        run_train("--replay", tmp_path / name, *more)
        said = capsys.readouterr().out
        rows = [line.split()[1:3] for line in said.splitlines() if re.match(" +[0-7] ", line)]
        assert len(rows) == 8 and ("bf16" in more or all(was == now for was, now in rows[:7])) and rows[7][0] == "nan"
        assert (rows[7][1] != "nan", "the step is finite" in said, "inputs that were not finite before the step: 1 (z0)" not in said) == (name == "mended.pt",) * 3
        assert ("first output that is not finite: dfgn." in said) == (name == "step.pt")


def test_poisoned_latents_stop_at_once(dfgn_argv, tiny_vae, tmp_path):
    net, meta = load_model(tiny_vae / "model.safetensors", "vae")
    train.save_model(tmp_path / "vae.safetensors", {k: v * float("nan") if k == "shortcut_in.bias" else v for k, v in net.state_dict().items()}, **meta)
    with pytest.raises(UserError, match="step 0") as stop:
        run_train(*options(dfgn_argv, steps=3, out=tmp_path / "run", vae=tmp_path / "vae.safetensors"))
    assert not (tmp_path / "run/state.pt").exists() and "state.pt" not in str(stop.value)              # no checkpoint: none is named
    run_train(*options(dfgn_argv, steps=1, out=tmp_path / "run", lr=1e-4))                              # nothing is lost: other options may be tried
    assert state_of(tmp_path / "run")["step"] == 1


def test_wrong_files_are_named(dfgn_argv, vae_argv, tiny_dfgn, tiny_vae, tmp_path):
    (tmp_path / "junk.safetensors").write_bytes(b"junk" * 100)
    cases = [(dfgn_argv, dict(data=tmp_path / "none"), "none"), (vae_argv, dict(data=tmp_path / "none"), "none"),
             (dfgn_argv, dict(vae=tmp_path / "none.safetensors"), r"none.safetensors.*--stage vae"),
             (dfgn_argv, dict(vae=tmp_path / "junk.safetensors"), "junk.safetensors"),
             (dfgn_argv, dict(vae=tiny_dfgn / "model.safetensors"), "model.safetensors.*'dfgn'"),
             (dfgn_argv, dict(preset="mini"), "--vae .*mini"),
             (dfgn_argv, dict(set="vae.layers=2"), "--vae ")]
    for argv, change, said in cases:
        with pytest.raises(UserError, match=said):
            run_train(*options(argv, steps=2, out=tmp_path / "run", **change))
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["vae", "dfgn"])
def test_a_set_of_another_size(stage, vae_argv, dfgn_argv, tmp_path):
    data.main(["synthetic", "--n", "8", "--size", "32", "--out", str(tmp_path / "set"), "--workers", "1"])
    with pytest.raises(UserError, match="--data .*32.*16"):
        run_train(*options(vae_argv if stage == "vae" else dfgn_argv, steps=1, out=tmp_path / "run", data=tmp_path / "set"))
    assert not (tmp_path / "run").exists()


def test_a_model_from_other_code_is_named(tiny_vae, tmp_path):
    net, meta = load_model(tiny_vae / "model.safetensors", "vae")
    for part, key in (("vae", "colour"), ("vae", "widths")):
        config = json.loads(json.dumps(meta["config"]))
        config[part][key] = [8, 16]
        train.save_model(tmp_path / "m.safetensors", net.state_dict(), **dict(meta, config=config))
        with pytest.raises(UserError, match="m.safetensors"):
            load_model(tmp_path / "m.safetensors", "vae")


@pytest.mark.parametrize("change, said", [
    ("dfgn.depth=3", "dfgn.depth"), ("colour.layers=3", "colour.layers"), ("frames=4", "part.field"), ("dfgn.layers", "dfgn.layers"),
    ("dfgn.layers=two", "'two' is not a int"), ("dfgn.layers=1.5", "1.5"), ("dfgn.gate=1", "not a bool"), ("dfgn.widths=a,b", "a,b"),
    ("dfgn.temporal=lstm", "lstm"), ("dfgn.known_fill=ones", "ones"), ("dfgn.base=ones", "ones"), ("dfgn.channels=8", "vae.channels is 16, dfgn.channels is 8"), ("dfgn.text_width=8", "text.width is 16"), ("dfgn.patch=4", "multiple of 64"), ("vae.size=20", "vae.size is 20"), ("dfgn.widths=", "do not go together"), ("dfgn.widths=1.5,2", "do not go together"), ("dfgn.head_dim=0", "do not go together"), ("dfgn.head_dim=64", "too narrow"), ("diffusion.prediction=x0", "x0"), ("diffusion.prediction=eps", "dfgn.gate"), ("diffusion.schedule=cosin", "cosin"), ("text.kind=bert", "bert")])
def test_fields_of_the_preset_that_cannot_be_set(change, said, dfgn_argv, tmp_path):
    with pytest.raises(UserError, match=f"--set .*{said}"):
        run_train(*options(dfgn_argv, steps=1, out=tmp_path / "run", set=change))
    assert not (tmp_path / "run").exists()


def test_fields_of_the_preset_are_set():
    config = resolve_config("tiny", ["dfgn.temporal=conv3d", "dfgn.widths=16,48", "dfgn.base=nearest", "diffusion.beta_end=1", "vae.kl_weight=0.5"])
    assert (config.dfgn.temporal, config.dfgn.widths, config.dfgn.base) == ("conv3d", (16, 48), "nearest")
    assert config.diffusion.beta_end == 1 and config.vae.kl_weight == 0.5 and PRESETS["tiny"].dfgn.temporal == "sti"
    with pytest.raises(UserError, match="--preset huge.*tiny, mini, paper"):
        resolve_config("huge", [])


OUT_OF_RANGE = [(dict(stage="gan"), "--stage gan"), (dict(lr_schedule="step"), "--lr-schedule step"), (dict(how="best"), "--how best"), (dict(frames="all"), "--frames all"),
                (dict(precision="fp8"), "--precision fp8"), (dict(groups="nothing"), "--groups|no stickers"), (dict(steps=0), "--steps 0"), (dict(batch=0), "--batch 0"),
                (dict(log_every=0), "--log-every 0"), (dict(save_every=0), "--save-every 0"), (dict(still_first=1.5), "--still-first 1.5"), (dict(text_drop=-0.1), "--text-drop -0.1")]


@pytest.mark.parametrize("stage, change, said", [(stage, *case) for stage in ("vae", "dfgn") for case in OUT_OF_RANGE] + [("dfgn", dict(curriculum="fast"), "--curriculum fast")])
def test_words_and_numbers_out_of_range(stage, change, said, vae_argv, dfgn_argv, tmp_path):
    with pytest.raises(UserError, match=said):
        run_train(*options(vae_argv if stage == "vae" else dfgn_argv, **dict(dict(steps=1, out=tmp_path / "run"), **change)))
    assert not (tmp_path / "run").exists()


def test_a_batch_that_the_ranks_cannot_share(vae_argv, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "setup", lambda: (0, 2, torch.device("cpu")))
    monkeypatch.setattr(train, "DistributedDataParallel", lambda net: net)
    with pytest.raises(UserError, match="--batch 3.*2 processes"):
        run_train(*options(vae_argv, steps=1, batch=3, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()                             # or the right --batch would be refused as another one


def test_every_option_has_help(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and all("--" + name.replace("_", "-") in said for name in asdict(TrainConfig()))
    helps = train.field_help()
    assert not [name for name in asdict(TrainConfig()) if name not in helps and name != "seed"]


def test_exit_code(tiny_dfgn, dfgn_argv):
    argv = options(dfgn_argv, steps=7, out=tiny_dfgn, lr=0.5)
    done = subprocess.run([sys.executable, str(SCRIPT), *map(str, argv)], capture_output=True, text=True, env=dict(os.environ))
    line, = done.stderr.strip().splitlines()
    assert done.returncode == 2 and line.startswith("error: --lr 0.5") and "0.001" in line and str(tiny_dfgn) in line


def test_one_task_on_whole_clips(dfgn_argv, tmp_path):
    """The paper's ablation without dual masks."""
    run_train(*dfgn_argv, "--steps", 4, "--out", tmp_path / "run", "--tasks", "it2v", "--frames", "full", "--still-share", 0)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(set(line["tasks"]) == {"it2v"} for line in lines) and all(line["entropy"] == pytest.approx(7 / 8, abs=1e-5) for line in lines)
    config = train.TrainConfig(frames="full", still_share=0)
    assert {train.step_frames(config, step, 8) for step in range(20)} == {(8, 1)}
    with pytest.raises(UserError, match="--tasks fly: choose from t2v"):
        run_train(*dfgn_argv, "--steps", 4, "--out", tmp_path / "other", "--tasks", "fly")


def test_a_field_newer_than_the_run_had_its_default(dfgn_argv, tmp_path):
    run = tmp_path / "run"
    run_train(*dfgn_argv, "--steps", 2, "--out", run)
    config = json.loads((run / "config.json").read_text())
    del config["train"]["tasks"]
    (run / "config.json").write_text(json.dumps(config))
    run_train(*dfgn_argv, "--steps", 2, "--out", run)
    with pytest.raises(UserError, match="--tasks .*was started with \\[\\]"):
        run_train(*dfgn_argv, "--steps", 2, "--out", run, "--tasks", "t2v")


# ---- dry run

def dry(capsys, *argv):
    """{row: (number, the rest)} that --dry-run prints."""
    run_train(*argv, "--dry-run", "--data", "none", "--vae", "none", "--out", "none")
    return {line.split()[0]: (float(line.split()[1]), " ".join(line.split()[2:])) for line in capsys.readouterr().out.splitlines()}


def really(c, preset, n, checkpointing=False):
    """(bytes that a real forward pass on the CPU leaves for the backward pass, operations of both)."""
    from torch.utils.flop_counter import FlopCounterMode
    torch.manual_seed(0)
    net, loss = train.example(c, preset, n)
    if checkpointing:
        net.dfgn.checkpointing = True
    own, seen = {p.data_ptr() for p in (*net.parameters(), *net.buffers())}, {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().size()
        return x
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            root = loss()
        root.backward()
    return sum(seen.values()), counter.get_total_flops()


@pytest.mark.parametrize("stage, more", [("vae", {}), ("dfgn", {}), ("dfgn", dict(checkpointing=True))])
def test_a_dry_run_counts_what_a_run_does(stage, more):
    config, preset = TrainConfig(stage=stage, **more), PRESETS["tiny"]
    kept, flops = really(config, preset, 2, **more)
    assert train.step_flops(config, preset, 2) == flops
    with train.no_numbers():
        net, loss = train.example(config, preset, 2)
        if more:
            net.dfgn.checkpointing = True
        counted, layer, _ = train.kept_bytes(net, loss)
    assert counted == kept and layer < counted
    assert sum(p.numel() for p in train.example(config, preset, 1)[0].parameters()) == sum(p.numel() for p in net.parameters())


def test_a_dry_run_of_the_papers_preset_allocates_nothing(capsys, monkeypatch):
    import resource
    monkeypatch.setenv("WORLD_SIZE", "8")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = dry(capsys, "--preset", "paper", "--batch", 32, "--accumulate", 2, "--zero", "--checkpointing", "--ema-device", "cpu")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000                       # kB: less than a tenth of the weights
    assert rows["parameters"][0] == pytest.approx(960, abs=2) and rows["weights"][0] == pytest.approx(3.84, abs=0.01)
    assert rows["optimiser"][0] == pytest.approx(0.96, abs=0.01) and rows["averages"][0] == 0
    assert rows["sum"][0] == pytest.approx(sum(rows[k][0] for k in ("weights", "gradients", "optimiser", "averages", "activations")), abs=0.01)
    assert rows["activations"][0] < 6 and "micro-batch of 2 clips" in rows["activations"][1] and "on each of 8 GPUs" in rows["FLOPs"][1]


def test_a_dry_run_refuses_what_a_run_would(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    for argv, said in ((["--batch", 12], "--batch 12: not a multiple of the 8 processes$"), (["--batch", 8, "--accumulate", 2], "processes times --accumulate 2"),
                       (["--batch", 8, "--stage", "vae", "--checkpointing"], "--checkpointing"), (["--batch", 8, "--ema-device", "disk"], "--ema-device disk")):
        with pytest.raises(UserError, match=said):
            run_train("--preset", "tiny", "--dry-run", *argv)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def tree(pid):
    """A process and all below it; a launcher's ranks are in sessions of their own."""
    try:
        return [pid, *(p for child in children(pid) for p in tree(child))]
    except FileNotFoundError:
        return []


def kill(process, everything=True):
    for pid in tree(process.pid) if everything else [process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.communicate()


def wait_until(process, happened, seconds=120):
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end and not happened():
        time.sleep(0.001)
    return process.poll() is None


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks' processes in /proc")


@needs_proc
def test_a_killed_rank_is_started_again_and_nothing_is_lost(two_ranks, shared_argv, tmp_path):
    """All is killed while it saves; the same command starts anew; of that one rank is killed, and torchrun starts all anew by itself."""
    run = tmp_path / "run"
    command = ["--standalone", "--nproc_per_node=2", "--max-restarts=1", SCRIPT, *shared_argv, "--zero", "--out", run]
    launcher = torchrun(*command)
    assert wait_until(launcher, (run / "state.pt.tmp").exists)
    kill(launcher)
    assert not (run / "state.pt").exists() and (run / "lock").exists() and len(log_of(run)) == 8
    launcher = torchrun(*command)
    assert wait_until(launcher, (run / "state.pt").exists)
    os.kill(children(launcher.pid)[-1], signal.SIGKILL)
    assert state_of(run)["step"] == 8                                   # killed before the end
    wait_for(launcher)
    assert_same(state_of(two_ranks / "plain"), state_of(run))
    assert [line["step"] for line in log_of(run)] == list(range(1, 17)) and log_of(run)[-1]["loss"] == pytest.approx(log_of(two_ranks / "plain")[-1]["loss"])
