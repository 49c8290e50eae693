"""tools/claim.py: every row of Tables 1 and 2 is trained as it says, on any folder of captioned clips."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from lib.media.pictures import write_animation
from lib.media.prepare import prepare
from lib.run.files import UserError
from tools import claim


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
               "--precision", "float32", "--steps", 4, "--base-steps", 2, "--batch", 1, "--base-batch", 2, "--n", 3,
               "--seeds", 0, "--out", tmp_path / "claim"]
    return list(map(str, options))


def test_every_row_is_trained_and_compared(argv, tmp_path, capfd):
    claim.main([*argv, "--lrs", "1e-3", "--tables", "2", "--jobs", "2"])
    said, runs = capfd.readouterr().out, {}
    for row in claim.ROWS:
        assert f"| {row} | 1 |" in said and (row == "RDTF" or f"| {row} - RDTF | " in said)
    for path in (tmp_path / "claim").rglob("config.json"):
        runs[str(path.parent.relative_to(tmp_path / "claim"))] = json.loads(path.read_text())["train"]
    assert runs.pop("gate/lora")["data"] == runs.pop("gate/lora-absorber")["data"] == runs["base"]["data"]
    assert runs.pop("gate/untrained")["lr"] == 1e-12
    assert re.search(r"\| base, LoRA on the source \| \d+\.\d+ \| \d+\.\d+ \|", said)
    assert len(runs) == len(claim.ROWS) + 2                              # the base is a row; two first stages
    assert Image.open(tmp_path / "claim/differences.png").width == 1320
    base = runs.pop("base")
    assert base["tasks"] == ["t2v"] and base["data"] != runs["rdtf/seed-0"]["data"] and base["steps"] == 2
    compared = ["it2v", "interpolation", "prediction_forward", "prediction_backward"]
    for place, options in runs.items():
        masks, first = place.startswith("rdtf") or "curriculum" in place, place.endswith("absorber")
        assert options["tasks"] == ([] if masks else list(data.TASKS) if first else compared)
        assert (options["curriculum"], options["lengths"]) == (("adaptive", "step") if masks else ("none", "full"))
        assert options["still_share"] == (0.5 if masks else 1.0 if first else 0.0)
        assert bool(options["base"]) == (options["method"] != "rdtf")
        assert ("dfgn.ff_mult=2" in options["set"]) == ("width" in place)
    steps = {place.split("/")[0]: options["steps"] for place, options in runs.items()}
    assert steps["simda"] == steps["rdtf"] == 4 and steps["rdtf--equal-seconds"] > 4
    assert [options["steps"] for place, options in sorted(runs.items()) if "video--t/" in place] == [3, 1]


def test_learning_rates_are_chosen_on_val(argv, tmp_path, monkeypatch):
    calls = []

    def run(script, *options, processes=1):
        options = list(map(str, options))
        calls.append((script, options))
        if "--run" in options:
            _, _, lr = options[options.index("--run") + 1].partition("trial-")
            assert "val" in options or not lr
            loss = dict(mean={"0.0001": 0.3, "0.001": 0.2, "0.0003": 0.25}.get(lr, 0.5))
            report = dict(tasks=dict(it2v=dict(scores=dict(loss=loss))))
            default = Path(options[options.index("--run") + 1]) / "eval.json"
            Path(options[options.index("--out") + 1] if "--out" in options else default).write_text(json.dumps(report))
        elif script == "train.py":
            folder = Path(options[-1])
            folder.mkdir(parents=True)
            (folder / "log.jsonl").write_text('{"loss": 1.0}\n' * 4)
    monkeypatch.setattr(claim, "run", run)
    monkeypatch.setattr(claim, "core_seconds", lambda folder: 1)
    claim.main([*argv, "--tables", "1", "--rows", "SimDA"])
    trained = [options for script, options in calls if script == "train.py" and "--seed" in options]
    assert [(o[o.index("--lr") + 1], o[o.index("--steps") + 1]) for o in trained] == [
        ("0.0001", "1"), ("0.0003", "1"), ("0.001", "1"), ("0.003", "1"), ("0.001", "4")]
    done = len(calls)
    assert [script for script, _ in calls[-3:]] == ["train.py", "evaluate.py", "evaluate.py"]   # row, its clips, table
    claim.main([*argv, "--tables", "1", "--rows", "SimDA"])              # goes on: the table alone is made again
    assert [script for script, _ in calls[done:]] == ["evaluate.py"]


def test_no_training_begins_after_one_that_failed(argv, monkeypatch):
    begun = []

    def run(script, *options, processes=1):
        begun.append(Path(options[-1]).parent.name)
        if begun[-1] == "rdtf":
            raise UserError("train.py failed")
        Path(options[-1]).mkdir(parents=True)
    monkeypatch.setattr(claim, "run", run)
    monkeypatch.setattr(claim.Claim, "gate", lambda self: None)
    with pytest.raises(UserError, match="train.py failed"):
        claim.main([*argv, "--lrs", "1e-3", "--rows", "RDTF", "SimDA", "I2V-Adapter"])
    assert begun == ["claim", "rdtf"]


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
