"""tools/ablations.py: every arm is trained as it says, chosen on val, measured on test, compared in pairs."""
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import run_train
from PIL import Image

import data
from evaluate import TIMESTEPS
from lib.media.prepare import prepare
from lib.metrics.standins import z0_errors
from lib.run import launch
from lib.run.files import UserError
from lib.run.options import parse_fields
from sample import Sampler
from tools import ablations
from tools.held_out import HeldOut
from train import TrainConfig


@pytest.fixture(scope="module")
def scarce(tmp_path_factory):
    """A set of 36 moving squares at 16 px, some of them short, three of each 12 held out."""
    def job(i):
        split = ["val", "test", "test", *["train"] * 9][i % 12]
        frames = np.zeros((8 if split != "train" else 2 + i % 7, 16, 16, 4), np.uint8)
        for t, frame in enumerate(frames):
            frame[t:t + 8, 4:12] = (7 * i, 255 - 7 * i, 90, 255)
        return dict(file=f"square {i}", source=(frames, [80] * len(frames)), caption=f"square {i}", keywords=[],
                    concept=f"square {i}", group="squares", split=split, style="flat")
    out = tmp_path_factory.mktemp("scarce") / "set"
    prepare(out, 16, "test", lambda: map(job, range(36)), data.key_table, 1)
    return out


@pytest.fixture
def argv(scarce, tiny_vae, tmp_path):
    return list(map(str, ["--data", scarce, "--vae", tiny_vae / "model.safetensors", "--preset", "tiny", "--steps", 8,
                          "--trial-steps", 4, "--still-share", 0.2, "--out", tmp_path / "runs"]))


def test_arms_are_trained_chosen_and_compared(argv, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launch, "run", lambda script, *options: run_train(*options))
    ablations.main([*argv, "--arms", "A", "B", "--seeds", "0", "1", "--lrs", "1e-3", "1e-2"])
    said, runs = capsys.readouterr().out, tmp_path / "runs"
    report = json.loads((runs / "numbers.json").read_text())
    assert "n = 6 concepts" in report["protocol"] and "| B: A + loss mask |" in said
    val, test = (HeldOut(argv[1], split, 48) for split in ("val", "test"))
    for arm in "AB":
        config = json.loads((runs / f"{arm}-1/config.json").read_text())["train"]
        assert (config["tasks"], config["steps"], config["seed"]) == (["it2v"], 8, 1)
        assert (config["text_lr"], config["precision"]) == (0.1, "float32")
        assert (config["lengths"], config["shortest"]) == (("full", 8) if arm == "A" else ("sample", 2))
        trials = {float(path.name.partition("-")[2]): Sampler(path / "model.safetensors")
                  for path in runs.glob(f"trials/{arm}-*")}
        assert config["lr"] == min(trials, key=lambda lr: val.errors(trials[lr], "it2v")[0].mean())  # noqa: B023
        assert {1e-3, 1e-2} < set(trials)                                # the best of two is an end: more were tried
    shown, short = (report["arms"][arm]["shown"][0] for arm in "AB")
    assert shown["whole"] == shown["clips"] and shown["frames"] == 8 * shown["clips"]
    assert short["frames"] < 8 * short["clips"] == 8 * shown["clips"] and short["stills"] == shown["stills"]
    assert list(report["differences"]) == ["B - A"]

    values = report["arms"]["B"]["values"]["loss"]                       # of the best of four on val, on test
    models = {step: runs / f"B-0/model-{step:06}.safetensors" for step in (2, 4, 6, 8)}
    on_val = {step: val.errors(Sampler(model), "it2v")[0].mean() for step, model in models.items()}
    assert report["arms"]["B"]["best"][0] == min(on_val, key=on_val.get)
    sampler = Sampler(models[report["arms"]["B"]["best"][0]])
    assert values[0] == pytest.approx(test.errors(sampler, "it2v")[0].mean(), rel=1e-5)
    found = report["differences"]["B - A"]["best"]["loss"]
    assert found["value"] == pytest.approx(np.mean(values) - np.mean(report["arms"]["A"]["values"]["loss"]), rel=1e-4)
    assert found["interval"][0] <= found["value"] <= found["interval"][1]
    assert Image.open(runs / "curves.png").width == 1320

    monkeypatch.setattr(launch, "run", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(HeldOut, "errors", lambda *_, **__: pytest.fail("measured again"))
    ablations.main([*argv, "--arms", "B", "--seeds", "0", "1", "--lrs", "1e-3", "1e-2"])
    again = json.loads((runs / "numbers.json").read_text())
    assert again["arms"]["B"] == report["arms"]["B"] and again["differences"] == {}


@pytest.mark.parametrize(("arm", "changed"), [("D", dict(curriculum="linear")), ("E", dict(curriculum="adaptive")),
                                              ("conv3d", dict(set=["dfgn.widths=8,16", "dfgn.temporal=conv3d"]))])
def test_arms_differ_from_c_in_one_thing(argv, monkeypatch, arm, changed):
    asked = []
    monkeypatch.setattr(launch, "train", lambda folder, *options: asked.append(options))
    tool = ablations.Ablations(ablations.parse([*argv, "--set", "dfgn.widths=8,16"]))
    for name in ("C", arm):
        tool.train(None, name, 8)
    c, other = (asdict(parse_fields(TrainConfig, "", list(map(str, options)))) for options in asked)
    assert other == {**c, **changed} and c["set"] == ["dfgn.widths=8,16"] and c["keep_every"] == 2


def test_losses_are_of_frames_that_are_not_given(scarce, tiny_dfgn):
    held, sampler = HeldOut(scarce, "test", 48), Sampler(tiny_dfgn / "model.safetensors")
    loss, last = held.errors(sampler, "prediction_forward", text=False)
    mask = data.eval_mask("prediction_forward", 8, 8)
    errors = z0_errors(sampler, held.clips, [""] * 6, mask, 0, 16, [*TIMESTEPS[:-1], 999])[:, :, 5:].mean(2)
    weights = sampler.net.diffusion.z0_weight(np.array(TIMESTEPS[:-1])).numpy()
    np.testing.assert_allclose(last, errors[:, -1], rtol=1e-5)
    np.testing.assert_allclose(loss, (errors[:, :-1] * weights).mean(1), rtol=1e-5)
    z = sampler.known_latents(held.clips, torch.ones(6, 8)).numpy()
    np.testing.assert_allclose(held.copying(sampler), ((z[:, 1:] - z[:, :1]) ** 2).mean((1, 2, 3, 4)), rtol=1e-5)


@pytest.mark.parametrize(("option", "value", "reason"), [("--steps", "6", "--steps 6: no multiple of 4"),
                                                        ("--trial-steps", "10", "--trial-steps 10: no multiple")])
def test_refuses_steps_without_four_checkpoints(argv, option, value, reason):
    with pytest.raises(UserError, match=reason):
        ablations.main([*argv, option, value])


def test_refuses_a_set_without_held_out_concepts(scarce):
    with pytest.raises(UserError, match="1 concepts of its val split have 8 frames; at least 2 are needed"):
        HeldOut(scarce, "val", 1)
