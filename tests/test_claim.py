"""tools/claim.py: every row of Tables 1 and 2 is trained as it says, on any folder of captioned clips."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import run_train
from PIL import Image

import data
import evaluate
from lib.media.pictures import write_animation
from lib.media.prepare import prepare
from lib.run import launch
from lib.run.files import UserError
from model import preset
from tools import claim
from tools.held_out import HeldOut
from train import TrainConfig


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """60 clips of a square that grows, of another kind than the synthetic set: a folder with captions in file names."""
    root = tmp_path_factory.mktemp("claim")
    (root / "files").mkdir()
    for i in range(60):
        clip = np.zeros((8, 16, 16, 4), np.uint8)
        for t in range(8):
            clip[t, 7 - t:9 + t, 7 - t:9 + t] = (4 * i, 255 - 4 * i, 90, 255)
        write_animation(root / f"files/square {i}.png", clip, [80] * 8)
    data.main(["folder", str(root / "files"), "--size", "16", "--out", str(root / "set"), "--workers", "1"])
    return root / "set"


@pytest.fixture
def argv(target, stickers16, tiny_vae, tmp_path):
    options = ["--data", target, "--source", stickers16, "--vae", tiny_vae / "model.safetensors", "--preset", "tiny",
               "--steps", 4, "--base-steps", 4, "--batch", 1, "--base-batch", 2, "--n", 3, "--seeds", 0,
               "--out", tmp_path / "claim"]
    return list(map(str, options))


def in_process(script, *options):
    """launch.run without the start of a process."""
    options = list(map(str, options))
    run_train(*options) if script == "train.py" else evaluate.main(options)


def test_two_rows_are_trained_and_compared(argv, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launch, "run", in_process)
    rows = "RDTF", "SimDA"
    claim.main([*argv, "--lrs", "1e-3", "--tables", "1", "--rows", *rows])
    said = capsys.readouterr().out
    assert re.search(r"\| SimDA - RDTF \| -?\d\.\d+ \[", said)
    for row in ("untrained", "base", "base, LoRA on the source", "base of stills"):
        assert re.search(rf"\| {row} \| \d+\.\d+ \| \d+\.\d+ \|", said)
    shown = {row: launch.shown(tmp_path / f"claim/{row.lower()}/seed-0") for row in rows}
    for row, seen in shown.items():                                      # A: equal clips of 8 frames, printed
        numbers = " | ".join(str(seen[name]) for name in ("whole", "clips", "frames", "stills"))
        assert f"| {row} | 1 | {numbers} | " in said and seen["whole"] == 4
    assert shown["RDTF"]["clips"] > shown["SimDA"]["clips"] == 4 and shown["SimDA"]["stills"] == 0
    assert Image.open(tmp_path / "claim/differences.png").width == 1320


def test_every_row_is_trained_as_it_says(argv, tmp_path, monkeypatch):
    measured, claimed = [], tmp_path / "claim"
    monkeypatch.setattr(launch, "run", lambda script, *options: (
        in_process(script, *options) if script == "train.py" else measured.append(options)))
    monkeypatch.setattr(HeldOut, "loss", lambda *_: 0.5)
    plots = []
    monkeypatch.setattr(claim, "plot", lambda path, _: plots.append(path.name))
    seconds = {"base": 10, "rdtf": 10, "full-fine-tuning": 5}
    monkeypatch.setattr(claim, "core_seconds", lambda run: seconds.get(run.name) or seconds.get(run.parent.name, 0))
    claim.main([*argv, "--lrs", "1e-3", "--tables", "2", "--set", "dfgn.widths=8,16", "--base-set", "dfgn.widths=8,24"])
    table, seconds_table = measured[-2:]
    del measured[-2:]
    assert len(measured) == len(claim.ROWS) - 1 and table[:2] == ("--table", "2")      # the untuned base's are there
    rows = [option.split("=")[0] for option in map(str, seconds_table) if "seed-" in option]
    assert rows == [*claim.EQUAL_SECONDS, *claim.TUNED] and seconds_table[-1].name == "table-2-equal-seconds.json"
    assert table[-1].name == "table-2.json" and plots == ["differences.png", "differences-equal-seconds.png"]
    runs = {str(path.parent.relative_to(claimed)): json.loads(path.read_text())["train"]
            for path in claimed.rglob("config.json") if path.parent.name != "best"}
    base, stills = runs.pop("base"), runs.pop("base-stills")
    assert runs.pop("gate/lora")["data"] == runs.pop("gate/lora-absorber")["data"] == base["data"] == stills["data"]
    assert runs.pop("gate/untrained")["lr"] == 1e-12
    assert len(runs) == len(claim.ROWS) - 1 + 2                          # the base is a row; two first stages
    assert base["tasks"] == ["t2v"] and base["data"] != runs["rdtf/seed-0"]["data"] and base["steps"] == 4
    assert (stills["still_share"], stills["set"]) == (1, ["dfgn.widths=8,24", "dfgn.temporal=still"])
    assert base["set"] == ["dfgn.widths=8,24"] and base["lr"] == stills["lr"] == 3e-3
    compared = ["it2v", "interpolation", "prediction_forward", "prediction_backward"]
    for place, options in runs.items():
        masks, first = place.startswith("rdtf") or "curriculum" in place, place.endswith("absorber")
        assert options["tasks"] == ([] if masks else list(data.TASKS) if first else compared)
        assert (options["curriculum"], options["lengths"]) == (("adaptive", "step") if masks else ("none", "full"))
        assert options["still_share"] == (0.5 if masks else 1.0 if first else 0.0)
        assert bool(options["base"]) == (options["method"] != "rdtf")
        assert (options["text_lr"], options["warmup"]) == (0.1, 0)           # a tenth of --steps
        assert ("base-stills" in options["base"]) == place.startswith("simda") == ("still" in str(options["set"]))
        large = options["base"] or "width" in place
        assert preset("tiny", options["set"]).dfgn.widths == ((8, 24) if large else (8, 16))
        assert ("dfgn.ff_mult=2" in options["set"]) == ("width" in place)
        if place.split("/")[0] not in ("rdtf--equal-seconds", *LONGER) and not first:
            assert launch.shown(claimed / place)["whole"] == 4           # A: equal clips of 8 frames
    steps = {place.split("/")[0]: options["steps"] for place, options in runs.items()}
    assert steps["simda"] == steps["full-fine-tuning"] == 4 and steps["rdtf"] == claim.steps_with(4, 0, 8)
    assert [options["steps"] for place, options in sorted(runs.items()) if "video--t/" in place] == [4, 1]
    assert steps["rdtf--equal-seconds"] == round(1.5 * steps["rdtf"])    # B: 10 + 5 seconds, as base and full
    half, long = (runs[f"{place}/seed-0"] for place in LONGER)
    assert half["base"].endswith("base/model-000002.safetensors") and long["base"].endswith("base/model.safetensors")
    assert (half["steps"], long["steps"]) == (4 * 10 / 5, 4 * 15 / 5)


LONGER = "full-fine-tuning--half-of-the-seconds", "full-fine-tuning--as-long-as-rdtf"


def test_bases_of_another_claim_are_taken(argv, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launch, "run", in_process)
    first = claim.Claim(claim.parse(argv))
    first.train_bases()
    monkeypatch.setattr(launch, "run", lambda script, *options: (
        in_process(script, *options) if options[-1].parent.name == "gate" else pytest.fail("trained again")))
    other = claim.Claim(claim.parse([*argv, "--bases", str(tmp_path / "claim"), "--out", str(tmp_path / "other")]))
    other.train_bases()
    assert tmp_path / "claim/base-stills/model.safetensors" in other.options("SimDA")
    capsys.readouterr()
    other.gate()                                                         # what they know of the source was asked there
    said = capsys.readouterr().out
    assert [path.name for path in (tmp_path / "other/gate").iterdir()] == ["untrained"]
    assert re.search(r"\| t2v denoising loss, held out \| target \|", said)
    assert re.search(r"\| base of stills \| \d+\.\d+ \|\n", said)


def test_steps_that_hold_equal_clips_of_all_frames():
    for seed in (0, 3):
        steps = claim.steps_with(25, seed, 8)
        drawn = [data.draw_frames(TrainConfig(seed=seed), step, 8) for step in range(steps)]
        assert drawn.count((8, 1)) == 25 and drawn[-1] == (8, 1)
    assert claim.steps_with(0, 0, 8) == 0


def test_the_best_of_four_checkpoints_is_measured(argv, tmp_path, monkeypatch):
    tool, folder = claim.Claim(claim.parse(argv)), tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(train=dict(steps=7))))
    for name in ("model-000002", "model-000004", "model-000006", "model"):
        (folder / f"{name}.safetensors").write_text(name)
    losses = {"model-000002": 3, "model-000004": 1, "model-000006": 2, "model": 4}
    monkeypatch.setattr(HeldOut, "loss", lambda self, model, *tasks: losses[model.stem] + 10 * (len(tasks) != 4))
    assert (tool.best(folder) / "model.safetensors").read_text() == "model-000004"
    losses["model"] = 0                                                  # what is chosen stays
    assert (tool.best(folder) / "model.safetensors").read_text() == "model-000004"
    assert (folder / "best/config.json").read_text() == (folder / "config.json").read_text()


@pytest.mark.parametrize(("best", "tried"), [(3e-4, [1e-4, 3e-4, 1e-3, 3e-3]),
                                             (1e-2, [1e-4, 3e-4, 1e-3, 3e-3, 9e-3, 0.03]),
                                             (1e-9, [1e-4, 3e-4, 1e-3, 3e-3, 3e-5, 1e-5, 3e-6])])
def test_learning_rates_are_tried_until_the_best_is_inside(argv, monkeypatch, best, tried):
    asked = []

    def trial(row, lr):
        asked.append(lr)
        return abs(np.log(lr / best))
    tool = claim.Claim(claim.parse(argv))
    monkeypatch.setattr(tool, "trial", trial)
    rates = tool.choose_rates(["SimDA"])
    assert asked == pytest.approx(tried) and rates == {"SimDA": min(asked, key=lambda lr: abs(np.log(lr / best)))}


def test_no_training_begins_after_one_that_failed(argv, monkeypatch):
    begun = []

    def run(script, *options):
        begun.append(Path(options[-1]).parent.name)
        if begun[-1] == "rdtf":
            raise UserError("train.py failed")
        Path(options[-1]).mkdir(parents=True)
    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(claim.Claim, "gate", lambda self: None)
    with pytest.raises(UserError, match="train.py failed"):
        claim.main([*argv, "--lrs", "1e-3", "--rows", "RDTF", "SimDA", "I2V-Adapter"])
    assert begun == ["claim", "claim", "rdtf"]                           # two bases before it


def test_a_source_with_held_out_concepts_is_refused(target, tmp_path):
    """As the emoji set is without --hold-out all: what is held out of one style is trained on in another."""
    source = tmp_path / "source"
    jobs = [dict(file=r["file"], source=(np.full((1, 16, 16, 4), i, np.uint8), [100]), caption=r["caption"],
                 keywords=[], concept=r["concept"], group="a", split="train")
            for i, r in enumerate(data.StickerSet(target).records)]
    prepare(source, 16, "test", lambda: jobs, data.key_table, 1)
    held_out = sum(r["split"] != "train" for r in data.StickerSet(target).records)
    with pytest.raises(UserError, match=f"source: trains on {held_out} concepts that .* holds out, such as 'square"):
        claim.check_apart(source, target)
    claim.check_apart(target, target)                                    # of one set the splits are apart
