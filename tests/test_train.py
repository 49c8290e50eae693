"""train.py: what a run writes and draws, options of memory and speed that change no number, bad input in one line."""
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TOWER_FIELDS, run_train

import data
import train
from data import TASKS
from lib import loop
from lib.checkpoints import check_same_config, flat, read_config
from lib.files import UserError, file_hash
from lib.media import to_tensor
from lib.towers import load_tower
from lib.weights import save_model
from model import PRESETS, RDTF, Config, load_rdtf, load_vae, preset
from train import TrainConfig

SCRIPT = Path(train.__file__)
RUN_FILES = {"config.json", "log.jsonl", "state.pt", "state.prev.pt", "model.safetensors", "lock"}


def options(argv, **changes):
    """argv with --name value pairs behind it, which win; float32, so that no start is timed."""
    changes = dict(dict(precision="float32"), **changes)
    return [*argv, *(str(x) for k, v in changes.items() for x in ("--" + k.replace("_", "-"), v))]


def state_of(run):
    return torch.load(Path(run) / "state.pt", weights_only=True)


def log_of(run, free=("clips_per_s", "cpu_s", "save_s", "peak_mb")):
    lines = (Path(run) / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in free} for line in lines]


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


# ---- what a run writes

def test_a_run_folder(tiny_dfgn, tiny_vae):
    assert {p.name for p in tiny_dfgn.iterdir()} == RUN_FILES
    config, state = json.loads((tiny_dfgn / "config.json").read_text()), state_of(tiny_dfgn)
    assert config["train"]["steps"] == 7 and Config.from_dict(config["model"]) == PRESETS["tiny"]
    assert config["precision"] in ("float32", "bf16")
    assert state["step"] == 7 and torch.load(tiny_dfgn / "state.prev.pt", weights_only=True)["step"] == 4
    assert set(state) == {"step", "net", "ema", "optimizer", "curriculum", "window"}
    modes = {(tiny_dfgn / name).stat().st_mode for name in ("model.safetensors", "config.json")}
    assert len(modes) == 1                                             # to be shared
    net, meta = load_rdtf(tiny_dfgn / "model.safetensors")
    assert_same(dict(net.state_dict()), state["ema"])
    assert not torch.equal(state["ema"]["dfgn.conv_out.weight"], state["net"]["dfgn.conv_out.weight"])
    assert (meta["step"], meta["vae"]) == (7, file_hash(tiny_vae / "model.safetensors"))


def test_log_lines(tiny_dfgn, tiny_vae):
    lines = [json.loads(line) for line in (tiny_dfgn / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 7]
    for line in lines:
        assert set(line) == {"step", "loss", "grad_norm", "lr", "entropy", "r", "tasks", "deciles", "clips_per_s",
                             "cpu_s", "save_s", "peak_mb"}
        assert line["tasks"] and set(line["tasks"]) <= set(TASKS) and set(line["deciles"]) <= set("0123456789")
        assert line["loss"] > 0 and line["grad_norm"] > 0 and 0.3 < line["entropy"] < 1 and line["clips_per_s"] > 0
        assert min(line["tasks"].values()) <= line["loss"] + 1e-4 <= max(line["tasks"].values()) + 2e-4
    assert [line["save_s"] > 0 for line in lines] == [False, False, True, False]                 # after step 4
    assert [line["step"] for line in log_of(tiny_vae)] == [2, 4]


def test_the_vaes_latents_are_standardised(tiny_vae, stickers16):
    vae, meta = load_vae(tiny_vae / "model.safetensors")
    stickers = data.StickerSet(stickers16, "train")
    z = [vae.encode(to_tensor(stickers.clip(r, range(r["n"])))).double() for r in stickers.records]
    mean, square = (torch.stack([f(x).mean((0, 2, 3)) for x in z]).mean(0) for f in (lambda x: x, torch.square))
    assert (mean / square.sqrt()).abs().max() < 0.15 and square.mean().item() == pytest.approx(1, abs=0.1)
    assert 5 < meta["psnr"] < 60 and vae.latent_std.unique().numel() == 1


def test_a_finished_run_stays_as_it_is(tiny_dfgn, dfgn_argv, capsys):
    def files():
        return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tiny_dfgn.iterdir() if p.name != "lock"}
    before = files()
    run_train(*options(dfgn_argv, steps=7, out=tiny_dfgn, save_every=4, precision="auto", accumulate=2,
                       ema_device="cpu"), "--zero", "--compile", "--checkpointing")
    assert "nothing to do" in capsys.readouterr().out and files() == before


def test_averaged_weights_after_one_step(dfgn_argv, tmp_path):
    torch.manual_seed(0)                                              # of the initial weights, as --seed 0 says
    start = RDTF(PRESETS["tiny"]).state_dict()
    run_train(*options(dfgn_argv, steps=1, out=tmp_path / "run", warmup=0))
    state = state_of(tmp_path / "run")
    for name, w in state["net"].items():
        assert torch.allclose(state["ema"][name], 0.1 * start[name] + 0.9 * w, atol=1e-6), name  # decay (1+0) / (10+0)
    assert max((w - start[name]).abs().max() for name, w in state["net"].items()) > 1e-5


# ---- memory and speed

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


def test_micro_batches_checkpointing_and_compiling_change_no_number(dfgn_argv, tmp_path, monkeypatch):
    """Compiled by aot_eager: traced as ever, but run by torch's own kernels; inductor's take minutes to build."""
    monkeypatch.setattr(train, "COMPILER", "aot_eager")
    argv, runs = options(dfgn_argv, steps=2, log_every=1), {}
    for name, more in dict(plain=[], micro=["--accumulate", 4], again=["--checkpointing"], fast=["--compile"]).items():
        runs[name] = first_gradients([*argv, *more, "--out", tmp_path / name], monkeypatch)
        assert all(torch.allclose(g, runs["plain"][i], rtol=1e-4, atol=1e-6) for i, g in runs[name].items()), name
        for a, b in zip(log_of(tmp_path / "plain"), log_of(tmp_path / name)):
            for key in ("tasks", "deciles"):
                assert a[key] == pytest.approx(b[key], rel=1e-4), name
    assert state_of(tmp_path / "fast")["net"].keys() == state_of(tmp_path / "plain")["net"].keys()


def test_host_averages_and_loader_processes_change_no_bit(dfgn_argv, tmp_path):
    argv = options(dfgn_argv, steps=4, log_every=1)
    run_train(*argv, "--out", tmp_path / "plain")
    run_train(*argv, "--out", tmp_path / "other", "--ema-device", "cpu", "--workers", 2)
    assert_same(state_of(tmp_path / "plain"), state_of(tmp_path / "other"))
    assert log_of(tmp_path / "plain") == log_of(tmp_path / "other")


def test_precision_is_tried_once_and_kept(dfgn_argv, tmp_path, monkeypatch, capsys):
    """The trial changes no draw and no weight; a resumed run keeps its choice without one."""
    argv = options(dfgn_argv, steps=2, log_every=1)
    run_train(*options(argv, precision="auto", steps=1, out=tmp_path / "auto"))
    said = capsys.readouterr().out
    choice = read_config(tmp_path / "auto")["precision"]
    assert f"--precision auto: {choice} (CPU time of a step: " in said and "in bf16" in said
    run_train(*options(argv, precision=choice, steps=1, out=tmp_path / "said"))
    assert_same(state_of(tmp_path / "auto"), state_of(tmp_path / "said"))
    ticks = itertools.accumulate(itertools.cycle([0, 9, 0, 1]))        # float32 takes 9 s, bf16 1 s
    stage = train.DFGNStage(TrainConfig(**read_config(tmp_path / "auto")["train"]), 0, 1, torch.device("cpu"))
    stage.prepare()
    monkeypatch.setattr(loop.time, "process_time", lambda: next(ticks))
    assert loop.pick_precision("auto", stage.network(False), stage) == "bf16"


# ---- draws

def draws(count=4000, p=np.full(6, 1 / 6), real=8, T=8, config=TrainConfig()):  # noqa: B008
    return [train.draw_condition(config, p, 3, n, real, T, 1000) for n in range(count)]


def test_shares_of_dropped_conditions():
    tasks, masks, text, t = (np.array(x) for x in zip(*draws()))
    given, i2v, t2v = masks.any(1), tasks == TASKS.index("i2v"), tasks == TASKS.index("t2v")
    assert not text[i2v].any() and not given[t2v].any()
    free = ~i2v & ~t2v
    assert np.mean(~text[free] & given[free]) == pytest.approx(0.10, abs=0.02)
    assert np.mean(text[free] & ~given[free]) == pytest.approx(0.10, abs=0.02)
    assert np.mean(~text[free] & ~given[free]) == pytest.approx(0.05, abs=0.015)
    assert np.mean(~text[t2v]) == pytest.approx(0.15, abs=0.04) == np.mean(~given[i2v])
    assert masks.shape == (4000, 8) and masks.dtype == np.float32 and masks.sum(1).max() < 8
    assert t.min() < 10 and 989 < t.max() <= 999 and t.mean() == pytest.approx(500, abs=20)


def test_tasks_are_drawn_by_their_probabilities():
    p = np.array([0.4, 0.05, 0.25, 0.0, 0.2, 0.1])
    assert np.bincount([d[0] for d in draws(p=p)], minlength=6) / 4000 == pytest.approx(p, abs=0.03)
    assert {d[0] for d in draws(200, p, real=1)} == {0}
    assert not np.array([d[1] for d in draws(500, real=3)])[:, 3:].any()                # padding is never given


def test_draws_repeat_and_differ():
    a, b, other = draws(50), draws(50), draws(50, config=TrainConfig(seed=1))
    assert all(x[0] == y[0] and (x[1] == y[1]).all() and x[2:] == y[2:] for x, y in zip(a, b))
    assert len({x[3] for x in a}) > 40 and [x[3] for x in a] != [x[3] for x in other]


def test_frames_of_a_step_and_learning_rate():
    plans = [train.step_frames(TrainConfig(), s, 8) for s in range(2000)]
    assert np.mean([plan == (1, 8) for plan in plans]) == pytest.approx(TrainConfig().still_share, abs=0.03)
    assert set(plans) == {(1, 8)} | {(k, 1) for k in range(3, 9)}
    whole = TrainConfig(frames="full", still_share=0)
    assert {train.step_frames(whole, s, 8) for s in range(50)} == {(8, 1)}
    cosine, constant = (TrainConfig(steps=100, warmup=10, lr=2.0, lr_schedule=s) for s in ("cosine", "constant"))
    assert [train.learning_rate(constant, s) for s in (0, 4, 9, 50, 99)] == pytest.approx([0.2, 1, 2, 2, 2])
    assert train.learning_rate(cosine, 50) == pytest.approx(1) and train.learning_rate(cosine, 99) < 0.001


def test_one_task_on_whole_clips(dfgn_argv, tmp_path):
    """The paper's ablation without dual masks."""
    run_train(*options(dfgn_argv, steps=2, out=tmp_path / "run", tasks="it2v", frames="full", still_share=0))
    line, = log_of(tmp_path / "run")
    assert set(line["tasks"]) == {"it2v"} and line["entropy"] == pytest.approx(7 / 8)


# ---- text towers, base

def test_a_towers_features_are_cached_and_read_by_row(tower_argv, tower_dfgn, clip_folder, no_network, monkeypatch):
    folder = Path(tower_argv[tower_argv.index("--clip-weights") - 1])
    cache, = folder.glob("text-*.f16")
    config = TrainConfig(**read_config(tower_dfgn)["train"])
    stage = train.DFGNStage(config, 0, 1, torch.device("cpu"))
    stage.cache()
    assert len(stage.features) == len(stage.texts) == 1 + 4 * len(stage.stickers)
    tower = load_tower(clip_folder, "")
    rows = [0, 1, 7, len(stage.texts) - 1]
    with torch.no_grad():
        wanted = tower(data.tokenize([stage.texts[r] for r in rows]))
    assert np.allclose(stage.features[rows], wanted, atol=2e-3)
    items = [dict(text="unused", text_row=r) for r in rows]
    assert np.array_equal(stage.tokens(items, [True, True, True, False]), stage.features[[0, 1, 7, 0]])
    whole = cache.read_bytes()                                         # killed within a row: the same bytes
    cache.rename(f"{cache}.part")
    os.truncate(f"{cache}.part", len(whole) // 2 + 5)
    stage.cache()
    assert cache.read_bytes() == whole and load_rdtf(tower_dfgn / "model.safetensors")[1]["text"]["hash"]
    config.seed = 1                                                    # other texts, other file; no room for it
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(UserError, match="--text-variants 4: features of .* GB are free"):
        stage.cache()


def test_towers_that_cannot_be_used(dfgn_argv, tower_argv, clip_folder, tmp_path):
    for argv, said in (([*dfgn_argv, "--clip-weights", clip_folder], "--clip-weights .*it is small"),
                       ([*dfgn_argv, "--set", *TOWER_FIELDS], "--clip-weights .*it is open_clip"),
                       ([*tower_argv[:-3], "text.kind=open_clip"], "width 32, .*text.width is 16")):
        with pytest.raises(UserError, match=said):
            run_train(*argv, "--steps", 1, "--out", tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_run_starts_from_anothers_weights(dfgn_argv, tiny_dfgn, tiny_vae, tmp_path):
    base = tmp_path / "base.safetensors"
    shutil.copy(tiny_dfgn / "model.safetensors", base)
    argv = options(dfgn_argv, steps=1, lr=1e-12, warmup=0, weight_decay=0, base=base)
    run_train(*argv, "--out", tmp_path / "run")
    state, weights = state_of(tmp_path / "run"), state_of(tiny_dfgn)["ema"]
    for part in ("net", "ema"):
        assert all(torch.allclose(state[part][k], w, atol=1e-7) for k, w in weights.items())
    assert read_config(tmp_path / "run")["inputs"]["base"] == file_hash(base)
    with pytest.raises(UserError, match=f"--base {base}: trained with temporal sti, the preset has conv3d"):
        run_train(*argv, "--out", tmp_path / "other", "--set", "dfgn.temporal=conv3d")
    with pytest.raises(UserError, match="--base : not what .* was started with"):
        run_train(*options(argv, base="", out=tmp_path / "run"))
    net, meta = load_vae(tiny_vae / "model.safetensors")
    save_model(tmp_path / "vae.safetensors", net.state_dict(), **dict(meta, step=9))
    with pytest.raises(UserError, match="trained with another VAE"):
        run_train(*argv, "--out", tmp_path / "other", "--vae", tmp_path / "vae.safetensors")


# ---- going on with other options, bad input

CHANGES = dict(stage="vae", groups=["animals"], preset="mini", set=["vae.kl_weight=0.5"], text_variants=5, steps=9,
               batch=8, lr=0.5, lr_schedule="constant", warmup=3, weight_decay=0.5, grad_clip=2.0, ema=0.5, seed=3,
               tasks=["t2v"], curriculum="none", how="even", frames="full", still_share=0.25, word_dropout=0.5,
               keywords=0.25, text_drop=0.5, cond_drop=0.5, both_drop=0.5)
HARMLESS = dict(workers=3, log_every=7, save_every=3, accumulate=2, checkpointing=True, zero=True, compile=True,
                ema_device="cpu", data="elsewhere", vae="elsewhere", base="elsewhere", clip_weights="elsewhere",
                clip_model="ViT-B-32")


def test_every_option_may_change_or_may_not(tiny_dfgn):
    assert {*CHANGES, *HARMLESS, "out", "precision"} == asdict(TrainConfig()).keys(), "a new option: may it change?"
    assert flat(dict(a=dict(b=(1, 2)))) == {"a.b": [1, 2]}
    config = read_config(tiny_dfgn)

    def check(**changed):
        now = dict(config, train=dict(config["train"], **changed), precision="auto")
        return check_same_config(tiny_dfgn, now, train.MAY_CHANGE, asdict(TrainConfig()))
    assert check(out="elsewhere") == (config["precision"], [])
    for name, value in HARMLESS.items():
        before = config["train"][name]
        assert check(**{name: value})[1] == [f"--{name.replace('_', '-')} {value} instead of {before}"]
    for name, value in CHANGES.items():
        with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} .* was started with .*; go on with that"):
            check(**{name: value})
    for part, value, said in (("precision", "fp8", "--precision fp8: .* was started in"),
                              ("inputs", dict(config["inputs"], data="0" * 64), "--data .* .hash 000000000000, was "),
                              ("model", replace(preset("tiny"), frames=4).to_dict(), "when frames was 8, it is 4")):
        with pytest.raises(UserError, match=said):
            check_same_config(tiny_dfgn, {**config, part: value}, train.MAY_CHANGE, asdict(TrainConfig()))
    assert check_same_config(tiny_dfgn, dict(config, world=2), train.MAY_CHANGE, {})[1] == ["2 processes instead of 1"]


@pytest.mark.parametrize("what, bad", [("loss", 1), ("gradient", 0)])
def test_values_that_are_not_finite_stop(what, bad, dfgn_argv, tmp_path, monkeypatch):
    """Their samples are named, the last checkpoint stays."""
    plain, norms = train.DFGNStage.collate, iter([1.0, np.inf])

    def poisoned(self, step, items, p):
        batch, tags = plain(self, step, items, p)
        batch["z0"][2] *= np.nan if step == 1 else 1
        return batch, tags
    if what == "loss":
        monkeypatch.setattr(train.DFGNStage, "collate", poisoned)
    else:
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(next(norms)))
    with pytest.raises(UserError, match=f"{what} is not finite at step 1 .{bad} of 4 losses") as stop:
        run_train(*options(dfgn_argv, steps=3, out=tmp_path / "run", still_share=0, save_every=1))
    stage = train.DFGNStage(TrainConfig(**read_config(tmp_path / "run")["train"]), 0, 1, torch.device("cpu"))
    stage.prepare()
    stage.curriculum.load_state_dict(state_of(tmp_path / "run")["curriculum"])
    task, t, index = next(stage.batches(1))[2][2].tolist()
    caption, line = stage.stickers.records[index]["caption"], stage.stickers.records.rows[index] + 1
    assert f"line {line}, {caption!r}, {TASKS[task]} at timestep {t}" in str(stop.value)
    assert str(stop.value).count(" at timestep ") == (bad or 3)
    assert f"the last checkpoint is {tmp_path / 'run/state.pt'}; lower --lr" in str(stop.value)
    assert state_of(tmp_path / "run")["step"] == 1


def test_bad_input_is_refused(dfgn_argv, vae_argv, tiny_dfgn, tmp_path):
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"junk" * 100)
    bad = dict(data=tmp_path / "none", vae=junk, set="vae.layers=2", stage="gan", lr_schedule="step", how="best",
               frames="all", precision="fp8", groups="nothing", steps=0, batch=0, seed=-1, save_every=0, text_drop=-0.1,
               curriculum="fast", tasks="fly", preset="huge", base=junk, accumulate=3)
    for name, value in [*bad.items(), ("vae", tmp_path / "none.safetensors"), ("vae", tiny_dfgn / "model.safetensors")]:
        said = {"accumulate": "--batch 4: not a multiple of the 1 processes times --accumulate 3"}.get(name)
        with pytest.raises(UserError, match=said or f"--{name.replace('_', '-')}|no such model|safetensors|none"):
            run_train(*options(dfgn_argv, **{"steps": 2, "out": tmp_path / "run", name: value}))
    for name, value in (("clip_weights", "x"), ("base", "x")):
        with pytest.raises(UserError, match="for the dfgn stage alone"):
            run_train(*options(vae_argv, steps=2, out=tmp_path / "run", **{name: value}))
    with pytest.raises(UserError, match="--data .* 16 px, preset mini wants 64"):
        run_train(*options(vae_argv, steps=2, out=tmp_path / "run", preset="mini"))
    assert not (tmp_path / "run/state.pt").exists()


@pytest.mark.parametrize("given", [dict(RANK="1"), dict(WORLD_SIZE="2"), dict(RANK="0", WORLD_SIZE="2")])
def test_a_rank_without_torchruns_variables_is_refused(given, dfgn_argv, tmp_path, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="MASTER_ADDR, MASTER_PORT not: start with torchrun"):
        run_train(*options(dfgn_argv, steps=1, out=tmp_path / "run"))


def test_restarts_on_several_nodes_want_a_new_store(dfgn_argv, tmp_path, monkeypatch):
    for name, value in dict(RANK=0, WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=1, GROUP_WORLD_SIZE=2,
                            TORCHELASTIC_USE_AGENT_STORE=True, TORCHELASTIC_MAX_RESTARTS=3).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        run_train(*options(dfgn_argv, out=tmp_path / "run"))


def test_help_and_exit_code(tiny_dfgn, dfgn_argv, capsys):
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    said = capsys.readouterr().out
    assert all("--" + name.replace("_", "-") in said for name in asdict(TrainConfig()))
    argv = options(dfgn_argv, steps=7, out=tiny_dfgn, lr=0.5)
    done = subprocess.run([sys.executable, str(SCRIPT), *map(str, argv)], capture_output=True, text=True)
    line, = done.stderr.strip().splitlines()
    assert done.returncode == 2 and line.startswith("error: --lr 0.5") and str(tiny_dfgn) in line
