"""train.py: what a run writes and draws, options of memory and speed that change no number, what it refuses."""
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
from conftest import run_train

import data
import train
from data import TASKS
from lib.media.pictures import to_tensor, write_animation
from lib.nets.autoencoder import load_vae
from lib.nets.towers import load_tower
from lib.nets.weights import identity, load_fitting, read_metadata, save_model
from lib.run import loop
from lib.run.checkpoints import check_same_config, flat, read_config, shown
from lib.run.files import UserError, file_hash
from lib.run.stages import load_base
from model import PRESETS, RDTF, Config, load_rdtf, preset
from sample import Sampler
from train import TrainConfig

SCRIPT = Path(train.__file__)
RUN_FILES = {"config.json", "log.jsonl", "state.pt", "state.prev.pt", "model.safetensors", "lock"}


def options(argv, **changes):
    """argv with --name value pairs behind it, which win."""
    return [*argv, *(str(x) for k, v in changes.items() for x in ("--" + k.replace("_", "-"), v))]


def state_of(run, name="state.pt"):
    return torch.load(Path(run) / name, weights_only=True)


def log_of(run, free=("clips_per_s", "cpu_s", "save_s", "peak_mb")):
    lines = (Path(run) / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in free} for line in lines]


def stage_of(run):
    """The DFGN stage of a run, prepared."""
    stage = make_stage(TrainConfig(**read_config(run)["train"]))
    stage.prepare()
    return stage


def make_stage(config):
    """The stage of a configuration, on one process of a CPU."""
    stickers = data.StickerSet(config.data, "train")
    return train.STAGES[config.stage](config, preset(config.preset, config.set), stickers, 0, 1, torch.device("cpu"))


def initial_weights(folder):
    """Of a run of the preset tiny on a set, with --seed 0."""
    torch.manual_seed(0)
    words = len(data.vocabulary(data.StickerSet(folder, "train").records))
    return RDTF(preset("tiny", [f"text.vocab={words}"])).state_dict()


def assert_same(a, b):
    """Equal to the last bit, all the way down."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# ---- what a run writes
def test_a_run_folder(tiny_dfgn, tiny_vae):
    assert {p.name for p in tiny_dfgn.iterdir()} == RUN_FILES
    config, state = read_config(tiny_dfgn), state_of(tiny_dfgn)
    words = data.vocabulary(data.StickerSet(config["train"]["data"], "train").records)
    known = replace(PRESETS["tiny"], text=replace(PRESETS["tiny"].text, vocab=len(words)))
    assert config["train"]["steps"] == 7 and Config.from_dict(config["model"]) == known
    assert state["net"]["text.vocabulary"].tolist() == words
    assert state["step"] == 7 and state_of(tiny_dfgn, "state.prev.pt")["step"] == 4
    net, meta = load_rdtf(tiny_dfgn / "model.safetensors")
    assert_same(dict(net.state_dict()), state["ema"])
    assert not torch.equal(state["ema"]["dfgn.conv_out.weight"], state["net"]["dfgn.conv_out.weight"])
    assert (meta["step"], meta["vae"]) == (7, identity(tiny_vae / "model.safetensors"))


def test_log_lines(tiny_dfgn, tiny_vae):
    lines = log_of(tiny_dfgn, free=())
    assert [line["step"] for line in lines] == [2, 4, 6, 7]
    for line in lines:
        assert line["tasks"] and set(line["tasks"]) <= set(TASKS) and set(line["deciles"]) <= set("0123456789")
        assert min(line[name] for name in ("loss", "grad_norm", "lr", "clips_per_s", "cpu_s", "peak_mb")) > 0
        assert 0.3 < line["entropy"] < line["entropy_all"] + 1e-6 and line["entropy_all"] <= 1 and line["r"] == 0
        seen = line["shown"]
        assert 3 * seen["clips"] <= seen["frames"] <= 8 * seen["clips"] and seen["whole"] <= seen["clips"]
        assert min(line["tasks"].values()) <= line["loss"] + 1e-4 <= max(line["tasks"].values()) + 2e-4
    assert sum(line["shown"]["clips"] + line["shown"]["stills"] / 8 for line in lines) == 7 * 4
    assert sum(line["shown"]["whole"] for line in lines) > 0 < sum(line["shown"]["stills"] for line in lines)
    assert [line["save_s"] > 0 for line in lines] == [False, False, True, False]                 # after step 4
    assert [line["step"] for line in log_of(tiny_vae)] == [2, 4]


def test_seconds_of_the_log_are_those_of_all_ranks(monkeypatch):
    monkeypatch.setattr(loop, "gather", lambda mine, world: torch.cat([mine * 0 + 2.5] * world))
    assert loop.Window().rates(torch.device("cpu"), 3)["cpu_s"] == 7.5


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


def test_averaged_weights_after_one_step(dfgn_argv, stickers16, tmp_path):
    start = initial_weights(stickers16)
    run_train(*options(dfgn_argv, steps=1, out=tmp_path / "run", warmup=0))
    state = state_of(tmp_path / "run")
    del state["net"]["text.vocabulary"]
    for name, w in state["net"].items():
        assert torch.allclose(state["ema"][name], 0.1 * start[name] + 0.9 * w, atol=1e-6), name  # decay (1+0) / (10+0)
    assert max((w - start[name]).abs().max() for name, w in state["net"].items()) > 1e-5


def test_the_text_encoder_and_its_tokens_have_rates_of_their_own(dfgn_argv, stickers16, tmp_path):
    start = initial_weights(stickers16)
    run_train(*options(dfgn_argv, steps=3, out=tmp_path / "run", warmup=0, text_lr=0, embedding_lr=1))
    net, token = state_of(tmp_path / "run")["net"], "text.token.weight"
    moved = {name for name in start if name != "text.vocabulary" and not torch.equal(net[name], start[name])}
    assert {name for name in moved if name.startswith("text.")} == {token} and len(moved) > 100


# ---- memory and speed
def test_micro_batches_checkpointing_and_compiling_change_no_number(dfgn_argv, tmp_path, monkeypatch):
    """Compiled by aot_eager: traced as ever, but run by torch's own kernels; inductor's take minutes to build."""
    monkeypatch.setattr(train, "COMPILER", "aot_eager")
    found = []
    for i, more in enumerate(([], ["--accumulate", 4], ["--checkpointing"], ["--compile"])):
        run = tmp_path / str(i)
        run_train(*options(dfgn_argv, steps=2, log_every=1, save_every=1, out=run), *more)
        moments = state_of(run, "state.prev.pt")["optimizer"]["state"]  # 0.1 times the first step's gradients, clipped
        found.append({name: moment["exp_avg"] for name, moment in moments.items()})
        torch.testing.assert_close(found[i], found[0], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(log_of(run), log_of(tmp_path / "0"), rtol=1e-4, atol=1e-6)
        assert state_of(run)["net"].keys() == state_of(tmp_path / "0")["net"].keys()
    assert stage_of(tmp_path / "2").network(False).dfgn.checkpointing  # it was


def test_host_averages_and_loader_processes_change_no_bit(dfgn_argv, tmp_path):
    argv = options(dfgn_argv, steps=4, log_every=1)
    run_train(*argv, "--out", tmp_path / "plain")
    run_train(*argv, "--out", tmp_path / "other", "--ema-device", "cpu", "--workers", 2)
    assert_same(state_of(tmp_path / "plain"), state_of(tmp_path / "other"))
    assert log_of(tmp_path / "plain") == log_of(tmp_path / "other")


def test_precision_is_tried_once(dfgn_argv, tmp_path, monkeypatch, capsys):
    """The trial changes no draw and no weight."""
    auto, said = tmp_path / "auto", tmp_path / "said"
    run_train(*options(dfgn_argv, steps=1, precision="auto", out=auto))
    choice = read_config(auto)["precision"]
    assert f"--precision auto: {choice} (CPU time of a step: " in capsys.readouterr().out
    run_train(*options(dfgn_argv, steps=1, precision=choice, out=said))
    assert_same(state_of(auto), state_of(said))
    stage = stage_of(auto)
    for seconds, faster in ((1, "bf16"), (8.5, "float32")):           # of bf16; float32 takes 9 s
        ticks = itertools.accumulate(itertools.cycle([0, 9, 0, seconds]))
        monkeypatch.setattr(loop.time, "process_time", lambda: next(ticks))  # noqa: B023
        assert loop.pick_precision("auto", stage.network(False), stage) == faster


# ---- draws
def draws(count=4000, p=np.full(6, 1 / 6), real=8, config=TrainConfig()):  # noqa: B008
    chances = data.rng_for(config.seed, 3, 0, 1).random((count, 4))
    return [data.draw_condition(config, p, u, real, 8, 1000) for u in chances]


def test_shares_of_dropped_conditions():
    """Where frames are given the text is dropped far more often, or captions known by heart would override them."""
    tasks, masks, text, t, *_ = (np.array(x) for x in zip(*draws()))
    given, i2v, t2v = masks.any(1), tasks == TASKS.index("i2v"), tasks == TASKS.index("t2v")
    assert not text[i2v].any() and not given[t2v].any()
    free = ~i2v & ~t2v
    assert np.mean(~text[free] & given[free]) == pytest.approx(0.5, abs=0.03)
    assert np.mean(text[free] & ~given[free]) == pytest.approx(0.10, abs=0.02)
    assert np.mean(~text[free] & ~given[free]) == pytest.approx(0.05, abs=0.015)
    assert np.mean(~text[t2v]) == pytest.approx(0.15, abs=0.04) == np.mean(~given[i2v])
    rarely = [np.array(x) for x in zip(*draws(config=TrainConfig(given_text_drop=0.2)))]
    assert np.mean(~rarely[2][free] & rarely[1].any(1)[free]) == pytest.approx(0.2, abs=0.03)
    assert masks.shape == (4000, 8) and masks.dtype == np.float32 and masks.sum(1).max() < 8
    assert t.min() < 10 and 989 < t.max() <= 999 and t.mean() == pytest.approx(500, abs=20)
    assert (t[:50] != [d[3] for d in draws(50, config=TrainConfig(seed=1))]).any()


def test_some_clips_of_frames_without_a_text_run_backwards(tiny_dfgn):
    """A caption may say which way time goes ("melting"), and where no frame is given there is nothing to go on from."""
    assert not np.any([d[4] for d in draws()])                                          # nor ever by default
    tasks, masks, text, _, backwards, _ = (np.array(x) for x in zip(*draws(config=TrainConfig(backwards=0.5))))
    given, dropped = masks.any(1) & ~text, tasks != TASKS.index("i2v")                  # which never has a text
    assert not backwards[~given].any() and np.mean(backwards[given & dropped]) == pytest.approx(0.5, abs=0.04)
    assert not np.any([d[4] for d in draws(real=5, config=TrainConfig(backwards=1))])   # padding stays at the end
    trained = dict(read_config(tiny_dfgn)["train"], still_share=0, steps=8, given_text_drop=0.9, cond_drop=0.05)
    stages = [make_stage(TrainConfig(**dict(trained, backwards=share))) for share in (0, 1)]
    turned, empty = 0, data.tokenize([""])[0]
    for stage in stages:
        stage.prepare()
    for (one, _), (other, _) in zip(*(stage.batches(0) for stage in stages)):
        for k in range(len(one["z0"])):
            back = one["cond_mask"][k].any() and one["loss_mask"][k].all() and torch.equal(one["text"][k], empty)
            assert torch.equal(other["z0"][k], one["z0"][k].flip(0) if back else one["z0"][k])
            turned += back
        for name in ("noise", "cond_mask", "t", "loss_mask", "text"):
            assert torch.equal(one[name], other[name])
    assert turned > 3


def test_wordless_clips_have_given_frames_and_no_text(tiny_dfgn, tmp_path):
    """t2v would have nothing to go by; the other tasks keep their shares of what is left."""
    p, config = np.array([0.5, 0, 0.2, 0.1, 0.1, 0.1]), TrainConfig(other_text=0.2)
    chances = data.rng_for(0, 3, 0, 1).random((4000, 4))
    tasks, masks, text, _, _, others = zip(*(data.draw_condition(config, p, u, 8, 8, 1000, True) for u in chances))
    assert np.bincount(tasks, minlength=6) / 4000 == pytest.approx([0, 0, 0.4, 0.2, 0.2, 0.2], abs=0.03)
    assert not any(text) and set(others) == {None}
    assert np.mean(np.array(masks).any(1)) == pytest.approx(0.85, abs=0.02)      # but for the dropped conditions
    only = np.eye(6)[0]
    assert data.draw_condition(config, only, chances[0], 8, 8, 1000, True)[0] == TASKS.index("t2v")
    trained = read_config(tiny_dfgn)["train"]
    data.main(["varied", trained["data"][0], "--out", str(tmp_path / "varied"), "--workers", "1"])
    changes = dict(data=[*trained["data"], str(tmp_path / "varied")], still_share=0.3, steps=12, text_drop=0.0)
    stage = make_stage(TrainConfig(**dict(trained, **changes)))
    stage.prepare()
    empty, seen = data.tokenize([""])[0], 0
    for batch, tags in stage.batches(0):
        wordless = stage.stickers.wordless[tags[:, 2]]
        seen += wordless.sum()
        assert all(torch.equal(row, empty) for row in batch["text"][wordless])
        assert (tags[wordless, 0] > 0).all() and (tags[wordless, 3] > 1).all()
    assert seen > 3


def test_some_texts_beside_given_frames_are_another_stickers(tiny_dfgn):
    """So that a caption known by heart does not override frames that say something else."""
    assert {d[5] for d in draws()} == {None}
    tasks, masks, text, _, _, others = zip(*draws(config=TrainConfig(other_text=0.2)))
    given, i2v = np.array(masks).any(1), np.array(tasks) == TASKS.index("i2v")
    swapped = np.array([u is not None for u in others])
    assert not swapped[~given | i2v].any() and np.array(text)[swapped].all()
    assert np.mean(swapped[(np.array(tasks) != TASKS.index("t2v")) & ~i2v]) == pytest.approx(0.2, abs=0.03)
    places = np.array([u for u in others if u is not None])
    assert 0 <= places.min() < 0.02 and 0.98 < places.max() < 1 and places.mean() == pytest.approx(0.5, abs=0.04)
    trained = dict(read_config(tiny_dfgn)["train"], still_share=0, steps=8, word_dropout=0, keywords=0, tasks=["it2v"])
    own, other = (make_stage(TrainConfig(**dict(trained, other_text=share))) for share in (0, 0.6))
    captions = {tuple(data.tokenize([r["caption"]])[0].tolist()) for r in own.stickers.records}
    strange = 0
    for stage in (own, other):
        stage.prepare()
    for (one, tags), (two, _) in zip(own.batches(0), other.batches(0)):
        for k, u in enumerate(tags[:, 2]):
            caption = data.tokenize([own.stickers.records[u]["caption"]])[0]
            if torch.equal(one["text"][k], caption):
                assert tuple(two["text"][k].tolist()) in captions
                strange += not torch.equal(two["text"][k], caption)
            else:
                assert torch.equal(one["text"][k], two["text"][k])
    assert strange > 5


def test_tasks_are_drawn_by_their_probabilities():
    p = np.array([0.4, 0.05, 0.25, 0.0, 0.2, 0.1])
    assert np.bincount([d[0] for d in draws(p=p)], minlength=6) / 4000 == pytest.approx(p, abs=0.03)
    assert {d[0] for d in draws(200, p, real=1)} == {0}
    assert not np.array([d[1] for d in draws(500, real=3)])[:, 3:].any()                # padding is never given


def test_frames_of_a_step_and_learning_rate():
    plans = [data.draw_frames(TrainConfig(still_share=0.3), s, 8) for s in range(8000)]
    frames, times = np.array(plans).T
    assert (times == np.where(frames == 1, 8, 1)).all() and set(frames) == {1, *range(3, 9)}
    assert [part.mean() for part in np.split(frames == 1, 4)] == pytest.approx([0.3] * 4, abs=0.04)
    assert np.mean(frames[frames > 1] == 8) == pytest.approx(0.5, abs=0.03)
    assert [np.mean(frames[frames > 1] == k) for k in range(3, 8)] == pytest.approx([0.1] * 5, abs=0.02)
    for policy in ("full", "sample"):
        whole = TrainConfig(lengths=policy, still_share=0)
        assert {data.draw_frames(whole, s, 8) for s in range(50)} == {(8, 1)}
    cosine, constant = (TrainConfig(steps=100, warmup=10, lr=2.0, lr_schedule=s) for s in ("cosine", "constant"))
    assert [train.learning_rate(constant, s) for s in (0, 4, 9, 50, 99)] == pytest.approx([0.2, 1, 2, 2, 2])
    assert train.learning_rate(cosine, 50) == pytest.approx(1) and train.learning_rate(cosine, 99) < 0.001


def test_the_curriculum_sees_clips_alone(dfgn_argv, tmp_path, monkeypatch):
    """A step of stills says nothing of r, of mixed batches the clips are taken; entropy of all samples counts both."""
    seen, observe = [], train.Curriculum.observe
    monkeypatch.setattr(train.Curriculum, "observe", lambda *a: seen.append(len(a[1])) or observe(*a))
    run_train(*options(dfgn_argv, steps=2, out=tmp_path / "stills", still_share=1))
    line, = log_of(tmp_path / "stills")
    assert seen == [] and line["entropy_all"] == 1 and 0.3 < line["entropy"] < 0.9
    monkeypatch.setattr(data.ClipDataset, "variants", lambda self, *_: [0] if _[1] else [1])     # sample 0, the others
    stickers = data.StickerSet(dfgn_argv[dfgn_argv.index("--data") + 1], "train")
    run_train(*options(dfgn_argv, steps=2, out=tmp_path / "mixed", lengths="sample", still_share=0,
                       tasks="interpolation"))
    clips = sum(min(int(n), 3) > 1 for n in stickers.lengths[[1, 0, 0, 0]])
    assert seen == ([clips] * 2 if clips else [])
    line, = log_of(tmp_path / "mixed")
    assert line["entropy_all"] == pytest.approx(1 - clips / 4 * (1 - data.unknown_share("interpolation")), abs=1e-6)


def test_frames_that_are_padding_in_all_clips_are_left_out(tiny_dfgn):
    lengths = set()
    trained = read_config(tiny_dfgn)["train"]
    stage = make_stage(TrainConfig(**dict(trained, lengths="sample", still_share=0.1, steps=40)))
    stage.prepare()
    for batch, tags in stage.batches(0):
        length = batch["z0"].shape[1]
        assert length == tags[:, 3].max() and (batch["loss_mask"].sum(1) == tags[:, 3]).all()
        assert {batch[name].shape[1] for name in ("loss_mask", "noise", "cond_mask")} == {length}
        lengths.add(length)
    assert {1, 8} < lengths


def test_models_on_the_way_stay(dfgn_argv, tmp_path):
    """Each is the averages of its step: of a run that ended there, the learning rate being constant."""
    run_train(*options(dfgn_argv, steps=4, out=tmp_path / "a", keep_every=2, lr_schedule="constant", curriculum="none"))
    run_train(*options(dfgn_argv, steps=2, out=tmp_path / "b", lr_schedule="constant", curriculum="none"))
    assert sorted(p.name for p in (tmp_path / "a").glob("model*")) == ["model-000002.safetensors",
                                                                       "model-000004.safetensors", "model.safetensors"]
    (two, meta), (short, _) = (load_rdtf(tmp_path / name) for name in ("a/model-000002.safetensors",
                                                                       "b/model.safetensors"))
    assert meta["step"] == 2
    assert_same(dict(two.state_dict()), dict(short.state_dict()))
    last = (tmp_path / "a/model-000004.safetensors").read_bytes()
    assert last == (tmp_path / "a/model.safetensors").read_bytes()


def test_one_task_on_whole_clips(dfgn_argv, tmp_path):
    """The paper's ablation without dual masks."""
    run_train(*options(dfgn_argv, steps=2, out=tmp_path / "run", tasks="it2v", lengths="full", still_share=0))
    line, = log_of(tmp_path / "run")
    assert set(line["tasks"]) == {"it2v"} and line["entropy"] == pytest.approx(7 / 8)


# ---- text towers, base
def test_a_towers_features_are_cached_and_read_by_row(tower_dfgn, stickers16, clip_folder, no_network, monkeypatch):
    stage = stage_of(tower_dfgn)
    cache, = (file for file in stickers16.glob("text-*.bin") if file.stat().st_size == stage.features.nbytes)
    rows = [0, 1, 7, len(stage.texts) - 1]
    assert len(stage.features) == len(stage.texts) == 1 + 4 * len(stage.stickers)
    with torch.no_grad():
        wanted = load_tower(clip_folder, "")(data.tokenize([stage.texts[r] for r in rows]))
    assert np.allclose(stage.features[rows], wanted, atol=2e-3)
    clips, has_text = dict(text_row=torch.tensor(rows)), torch.tensor([True, True, True, False])
    assert np.array_equal(stage.read_texts(clips, has_text, [None] * 4), stage.features[[0, 1, 7, 0]])
    assert np.array_equal(stage.read_texts(clips, has_text, [None, None, 0.999, None]),
                          stage.features[[0, 1, stage.texts.rows(len(stage.stickers) - 1)[0], 0]])
    assert clips["text_row"].tolist() == rows
    whole = cache.read_bytes()                                         # killed within a row: the same bytes
    cache.rename(f"{cache}.part")
    os.truncate(f"{cache}.part", len(whole) // 2 + 5)
    stage.cache()
    assert cache.read_bytes() == whole and load_rdtf(tower_dfgn / "model.safetensors")[1]["text"]["hash"]
    stage.config.seed = 1                                              # other texts, other file; no room for it
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(UserError, match="--text-variants: features of .* GB are free"):
        stage.cache()


def test_two_sets_sheets_on_the_way_and_words_that_were_not_trained(dfgn_argv, stickers16, tmp_path):
    more, run, prompts = tmp_path / "more", tmp_path / "run", tmp_path / "prompts.txt"
    frames = np.full((4, 16, 16, 4), 255, np.uint8)
    (tmp_path / "in").mkdir()
    for name in ("purple aardvark", "sleepy aardvark", "green aardvark"):
        write_animation(tmp_path / "in" / f"{name}.gif", frames, [80] * 4)
    data.main(["folder", str(tmp_path / "in"), "--size", "16", "--out", str(more), "--workers", "1"])
    prompts.write_text("a red star\n\npurple aardvark\n")
    argv = [*dfgn_argv, "--data", stickers16, more, "--still-share", "0.5"]
    run_train(*options(argv, steps=6, out=run, sample_every=4, prompts=prompts, save_every=100))
    sheets = sorted(run.glob("samples-*.png"))
    assert [path.name for path in sheets] == ["samples-000004.png", "samples-000006.png"]
    assert sheets[0].read_bytes() != sheets[1].read_bytes()
    stage = stage_of(run)
    seen = {stage.stickers.records[i]["file"] for step in stage.batches(0) for i in step[1][:, 2].tolist()}
    assert any(file.endswith(".gif") for file in seen) and any(file.startswith("synthetic") for file in seen)
    net, _ = load_rdtf(run / "model.safetensors")
    with torch.no_grad():
        known, word, hashes = (net.text(data.tokenize([f"{w} star"]))[0] for w in ("red", "zebra", "#"))
    assert torch.equal(word, hashes) and not torch.allclose(known, word)


def test_a_run_starts_from_anothers_weights(dfgn_argv, tiny_dfgn, tmp_path):
    base, run = tiny_dfgn / "model.safetensors", tmp_path / "run"
    run_train(*options(dfgn_argv, steps=1, lr=1e-12, warmup=0, weight_decay=0, base=base, out=run))
    for part in ("net", "ema"):
        torch.testing.assert_close(state_of(run)[part], state_of(tiny_dfgn)["ema"], rtol=0, atol=1e-7)
    assert read_config(run)["inputs"]["base"] == identity(base)
    with pytest.raises(UserError, match=f"--base {base}: trained with another VAE"):
        load_base(TrainConfig(base=str(base)), PRESETS["tiny"], dict(names=["another"]), None)


def test_a_run_starts_from_weights_of_another_size(tiny_dfgn):
    """As mini-128 from mini: latents of other channels, so what meets them starts anew and the rest does not."""
    base = str(tiny_dfgn / "model.safetensors")
    config = preset("tiny", ["vae.size=32", "vae.patch=4", "vae.latent_channels=32", "dfgn.channels=32"])
    weights, grows = load_base(TrainConfig(base=base), config, dict(names=["another"]), None)
    assert not grows
    net = RDTF(replace(config, text=load_rdtf(base)[0].config.text))
    before = {key: w.clone() for key, w in net.state_dict().items()}
    new = set(load_fitting(net, weights, base, True))
    assert {key.split(".")[1] for key in new} == {"stem", "conv_out", "gate"}
    for key, w in net.state_dict().items():
        assert torch.equal(w, before[key] if key in new else weights[key]), key
    with pytest.raises(UserError, match=f"--base {base}: trained with another VAE"):
        load_base(TrainConfig(base=base, method="simda"), config, dict(names=["another"]), None)


def test_a_run_starts_from_weights_without_a_gate_but_not_the_other_way(tiny_dfgn, tmp_path):
    base, gated, plain = str(tiny_dfgn / "model.safetensors"), PRESETS["tiny"], preset("tiny", ["dfgn.gate=false"])
    meta, weights = read_metadata(base), load_rdtf(base)[0].state_dict()
    meta["config"]["dfgn"].pop("gate")                                         # as in files from before there was one
    old = str(tmp_path / "old.safetensors")
    save_model(old, {k: w for k, w in weights.items() if ".gate." not in k}, **meta)
    assert load_rdtf(old)[0].dfgn.gate is None
    started, _ = load_base(TrainConfig(base=old), gated, dict(names=[meta["vae"]]), None)
    net = RDTF(replace(gated, text=load_rdtf(base)[0].config.text))
    assert set(load_fitting(net, started, old, False)) == {"dfgn.gate.weight", "dfgn.gate.bias"}
    assert not net.dfgn.gate.weight.any() and not net.dfgn.gate.bias.any()
    with pytest.raises(UserError, match="trained with gate True, the preset has False"):
        load_base(TrainConfig(base=base), plain, dict(names=[meta["vae"]]), None)


def test_what_does_not_fit_starts_anew(tiny_dfgn, capsys):
    """As the known frames' encoder of weights from before it was widened."""
    net, other = (load_rdtf(tiny_dfgn / "model.safetensors")[0] for _ in range(2))
    theirs = {k: w + 1 for k, w in net.state_dict().items() if not k.startswith("dfgn.stem.known.attn.")}
    theirs["dfgn.stem.known.widen.weight"] = torch.zeros(3, 3)
    load_fitting(other, theirs, "old.safetensors", True)
    for name, w in other.state_dict().items():
        new = name.startswith("dfgn.stem.known.attn.") or name == "dfgn.stem.known.widen.weight"
        assert torch.equal(w, net.state_dict()[name] if new else theirs[name])
    said = capsys.readouterr().out
    assert "--base old.safetensors: " in said and "anew: dfgn.stem.known.widen, dfgn.stem.known.attn.to_q, " in said
    with pytest.raises(UserError, match="--base x: only .* of the parameters are there"):
        load_fitting(other, {"dfgn.stem.conv.bias": theirs["dfgn.stem.conv.bias"]}, "x", True)


def test_a_tuned_decoder_keeps_the_latents(vae_argv, dfgn_argv, tiny_vae, tiny_dfgn, stickers16, tmp_path):
    """--stage vae --base: the decoder learns under noise; encoder, statistics and the DFGNs that know them stay."""
    base, run, caches = tiny_vae / "model.safetensors", tmp_path / "vae", set(stickers16.glob("latents-*"))
    run_train(*options([*vae_argv, "--set", "vae.latent_noise=0.5"], steps=2, base=base, out=run))
    (before, meta), (after, tuned) = load_vae(base), load_vae(run / "model.safetensors")
    changed = {name for (name, w), v in zip(before.state_dict().items(), after.state_dict().values())
               if not torch.equal(w, v)}
    assert changed and {name.partition(".")[0] for name in changed} == {"decoder", "post_quant_conv", "shortcut_out"}
    assert tuned["latents"] == meta["latents"] == identity(base) and 5 < tuned["psnr"] < 60
    net = tiny_dfgn / "model.safetensors"
    clips = [Sampler(net, path).sample(["star"], [(0, 0)], steps=2) for path in (base, run / "model.safetensors")]
    assert (clips[0] != clips[1]).any()
    again, dfgn = tmp_path / "again", tmp_path / "dfgn"                 # a tuned one tuned, a DFGN on it
    run_train(*options(vae_argv, steps=1, base=run / "model.safetensors", out=again))
    run_train(*options(dfgn_argv, steps=1, vae=again / "model.safetensors", base=net, out=dfgn))
    assert load_rdtf(dfgn / "model.safetensors")[1]["vae"] == identity(base)
    assert set(stickers16.glob("latents-*")) <= caches


def test_the_decoders_noise_is_half_normal(vae_argv):
    c = TrainConfig(stage="vae", preset="tiny", data=[str(vae_argv[vae_argv.index("--data") + 1])], batch=400, steps=1)
    scales = []
    for fields in ([], ["vae.latent_noise=0.5"]):
        stage = make_stage(replace(c, set=fields))
        stage.network(fresh=False)
        (batch, _), = stage.batches(0)
        scales.append(batch["noise_std"])
        assert batch["noise_std"].shape == (400, 1, 1, 1) and batch["noise"].std().item() == pytest.approx(1, abs=0.02)
    assert not scales[0].any() and scales[1].min() >= 0
    assert scales[1].mean().item() == pytest.approx(0.5 * (2 / np.pi) ** 0.5, abs=0.04)


# ---- going on with other options, what is refused (more is in test_bad_input.py)
MAY_CHANGE = {"workers", "log_every", "save_every", "keep_every", "accumulate", "checkpointing", "zero", "compile",
              "ema_device", "sample_every", "prompts",
              "data", "vae", "base", "absorber", "clip_weights", "clip_model"}  # the last six: of equal hashes


def test_every_option_may_change_or_may_not(tiny_dfgn):
    config = read_config(tiny_dfgn)
    assert config["train"].keys() == asdict(TrainConfig()).keys() and flat(dict(a=dict(b=(1, 2)))) == {"a.b": [1, 2]}

    def check(part="train", **changed):
        now = dict(config, precision="auto", **{part: dict(config[part], **changed)})
        return check_same_config(tiny_dfgn, now, train.MAY_CHANGE, asdict(TrainConfig()))
    assert check(out="another") == (config["precision"], [])
    for name in config["train"].keys() - {"out", "precision"}:
        before, option = shown(config["train"][name]), "--" + name.replace("_", "-")
        if name in MAY_CHANGE:
            assert check(**{name: "another"})[1] == [f"{option} another instead of {before}"]
        else:
            with pytest.raises(UserError, match=f"^{option} another: .* was started with .*; go on with that"):
                check(**{name: "another"})
    for part, changed, said in (
            ("inputs", dict(data="0" * 64), "--data .* was started with .hash 000000000000, was "),
            ("inputs", dict(base="0" * 64), "--base .* was started with .hash 000000000000, was none"),
            ("model", replace(preset("tiny"), frames=4).to_dict(), "when frames was 8, it is 4")):
        with pytest.raises(UserError, match=said):
            check(part, **changed)
    assert check("model", text=dict(config["model"]["text"], concepts=7))[1] == []      # of a run before it was a limit
    with pytest.raises(UserError, match="when text.width was 16, it is 7"):
        check("model", text=dict(config["model"]["text"], width=7))
    with pytest.raises(UserError, match="--precision fp8: .* was started in"):
        check_same_config(tiny_dfgn, dict(config, precision="fp8"), train.MAY_CHANGE, {})
    assert check_same_config(tiny_dfgn, dict(config, world=2), train.MAY_CHANGE, {})[1] == ["2 processes instead of 1"]


@pytest.mark.parametrize("what, bad", [("loss", 1), ("gradient", 0)])
def test_values_that_are_not_finite_stop(what, bad, dfgn_argv, tmp_path):
    """Their samples are named, the last checkpoint stays."""
    run = tmp_path / "run"

    def poison(step, net, losses):
        if step == 1 and what == "loss":
            losses[2] = np.nan
        elif step == 1:
            net.dfgn.conv_out.bias.grad[0] = np.inf
    with pytest.raises(UserError, match=f"{what} is not finite at step 1 .{bad} of 4 losses") as stop:
        run_train(*options(dfgn_argv, steps=3, out=run, still_share=0, save_every=1), after_backward=poison)
    stage = stage_of(run)
    stage.curriculum.load_state_dict(state_of(run)["curriculum"])
    task, t, index, _ = next(stage.batches(1))[1][2].tolist()
    caption, line = stage.stickers.records[index]["caption"], stage.stickers.records.rows[index] + 1
    assert f"line {line}, {caption!r}, {TASKS[task]} at timestep {t}" in str(stop.value)
    assert str(stop.value).count(" at timestep ") == (bad or 3)
    assert f"the last checkpoint is {run / 'state.pt'}; lower --lr" in str(stop.value)
    assert state_of(run)["step"] == 1


RENDEZVOUS = dict(MASTER_ADDR="localhost", MASTER_PORT="1", RANK="0", WORLD_SIZE="2", GROUP_WORLD_SIZE="2",
                  TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_MAX_RESTARTS="3")


@pytest.mark.parametrize("given, said", [
    (dict(RANK="1"), "WORLD_SIZE, MASTER_ADDR, MASTER_PORT not: start with torchrun"),
    (dict(WORLD_SIZE="2"), "RANK, MASTER_ADDR, MASTER_PORT not: start with torchrun"),
    (RENDEZVOUS, "several nodes: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")])
def test_ranks_that_would_not_find_each_other_are_refused(given, said, dfgn_argv, tmp_path, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        run_train(*options(dfgn_argv, steps=1, out=tmp_path / "run"))


def test_the_script_ends_with_a_line_and_a_status(tiny_dfgn, dfgn_argv):
    argv = options(dfgn_argv, steps=7, out=tiny_dfgn, lr=0.5)
    done = subprocess.run([sys.executable, str(SCRIPT), *map(str, argv)], capture_output=True, text=True)
    line, = done.stderr.strip().splitlines()
    assert done.returncode == 2 and line.startswith("error: --lr 0.5") and str(tiny_dfgn) in line


def test_a_vae_made_again_by_its_command_takes_its_place(vae_argv, dfgn_argv, tiny_vae, tiny_dfgn, tmp_path):
    """The same file to the byte; runs and files that knew it by its file's hash, as was done once, go on."""
    again, run = tmp_path / "vae", tmp_path / "run"
    run_train(*vae_argv, "--steps", 4, "--out", again)
    model = again / "model.safetensors"
    assert model.read_bytes() == (tiny_vae / "model.safetensors").read_bytes()
    shutil.copytree(tiny_dfgn, run)
    old = read_config(run)
    old["inputs"]["vae"] = file_hash(model)
    (run / "config.json").write_text(json.dumps(old))
    run_train(*options(dfgn_argv, steps=7, out=run, save_every=4, vae=model))
    assert read_config(run)["inputs"]["vae"] == file_hash(model)          # done: nothing was written
    net, meta = load_rdtf(run / "model.safetensors")
    save_model(tmp_path / "old.safetensors", net.state_dict(), **dict(meta, vae=file_hash(model)))
    for path in (run / "model.safetensors", tmp_path / "old.safetensors"):
        assert Sampler(path, model).T == 8
