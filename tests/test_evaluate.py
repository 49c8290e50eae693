"""evaluate.py: baselines made by hand, a whole run of a tiny model, caches, runs side by side, the paper's tables."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_sample import make_model

import data
import evaluate
from data import TASKS, eval_mask
from lib.metrics import extractors, scores, tables
from lib.metrics.dover import DOVER
from lib.metrics.i3d import I3D
from lib.metrics.standins import z0_errors
from lib.nets.weights import identity
from lib.run.files import UserError
from sample import Sampler


# ---- baselines and numbers
def test_copy_and_blend_by_hand():
    clips, mask = np.arange(8, dtype=np.float32).reshape(1, 8, 1, 1, 1), eval_mask("interpolation", 8, 8)

    def values(mask, fill):
        return evaluate.filled(clips, mask, fill).ravel().tolist()
    assert values(mask, "nearest") == [0, 0, 2, 2, 4, 4, 6, 6]
    assert values(mask, "blend") == [0, 1, 2, 3, 4, 5, 6, 3]                     # the first follows the last
    assert values(eval_mask("prediction_forward", 8, 8), "nearest") == [0, 1, 2, 3, 4, 4, 4, 4]
    third = np.array([0, 1, 0, 0, 1, 0, 0, 0], np.float32)
    assert values(third, "blend") == pytest.approx([1.6, 1, 2, 3, 4, 3.4, 2.8, 2.2])
    assert values(eval_mask("it2v", 8, 8), "blend") == [0] * 8
    shown = evaluate.baselines(clips, clips + 10, mask)
    assert shown["vae"].ravel().tolist() == [0, 11, 2, 13, 4, 15, 6, 17] and set(shown) == {"vae", "copy", "blend"}
    assert set(evaluate.baselines(clips, clips, eval_mask("it2v", 8, 8))) == {"vae", "copy"}
    assert set(evaluate.baselines(clips, clips, eval_mask("t2v", 8, 8))) == {"vae"}


def test_psnr_is_of_the_pooled_errors_of_unknown_frames():
    real = np.random.default_rng(0).random((4, 8, 5, 5, 3)).astype(np.float32)
    mask = eval_mask("prediction_forward", 8, 8)
    made = real.copy()
    made[:2, mask == 0] += 0.1                                                   # of half of the clips
    values = evaluate.psnr_of(made, real, real - 0.01, mask, 0)
    assert values["model"]["value"] == pytest.approx(23.01, abs=0.01)            # 10 log10 (2 / 0.01)
    assert values["vae"]["value"] == pytest.approx(40, abs=0.01)
    through = ((evaluate.filled(real - 0.01, mask, "nearest") - real)[:, mask == 0] ** 2).mean()
    assert values["copy"]["value"] == pytest.approx(-10 * np.log10(through), abs=1e-4)
    less = values["model - copy"]
    assert less["value"] == pytest.approx(values["model"]["value"] - values["copy"]["value"])
    assert less["interval"][0] < less["value"] < less["interval"][1]
    assert "blend" in values and "blend" not in evaluate.psnr_of(made, real, real, eval_mask("it2v", 8, 8), 0)
    assert evaluate.psnr_of(made, real, real, eval_mask("t2v", 8, 8), 0) is None


def test_fvd_is_of_bare_logits_and_extrapolated(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = (dict(i3d=rng.standard_normal((800, 400)).astype(np.float32) * 3) for _ in range(2))
    monkeypatch.setattr(scores, "bootstrap_fd", lambda *_, paired, **__: [0, 1 + paired])   # a minute at this size
    monkeypatch.setattr(scores, "extrapolate", lambda a, b, seed: (7.0, 2.0))  # likewise; see test_distances.py
    result, fewer = evaluate.distances(a, b, 0), {"i3d": a["i3d"][:799]}
    assert result["FVD"]["value"] == pytest.approx(scores.frechet(a["i3d"], b["i3d"]))
    assert result["FVD"]["interval"] == [0, 2]                                   # drawn in pairs
    assert "7.0 +- 2.0" in tables.distance_table(dict(t2v=dict(fd=dict(model=result))), None)
    assert "FVD-inf" not in evaluate.distances(fewer, fewer, 0)
    with pytest.raises(UserError, match="800 real clips against 799 others.*--n 799"):
        evaluate.distances(a, fewer, 0)


# ---- a whole run
@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A synthetic set of 16 px and a tiny model of random weights: (set folder, run folder)."""
    root = tmp_path_factory.mktemp("evaluate")
    data.main(["synthetic", "--n", "200", "--size", "16", "--out", str(root / "set")])
    (root / "run").mkdir()
    make_model(root / "run")
    return root / "set", root / "run"


def command(world, *more):
    return ["--data", str(world[0]), "--run", str(world[1]), "--steps", "2", "--n", "6", *map(str, more)]


@pytest.fixture(scope="module")
def few(world):
    """Sampler, three clips, their captions, latents and the noise that seed 7 gives them."""
    stickers = data.StickerSet(world[0])
    clips = evaluate.read_clips(stickers, [r for r in stickers.records if r["n"] >= 8][:3], 8)
    sampler, captions = Sampler(world[1] / "model.safetensors"), ["a red star", "", "a blue circle"]
    z0 = sampler.known_latents(clips, torch.ones(3, 8))
    noise = np.stack([np.random.default_rng((7, k)).standard_normal(z0.shape[1:], np.float32) for k in range(3)])
    return sampler, clips, captions, z0, torch.from_numpy(noise)


@pytest.mark.parametrize("task", ["t2v", "interpolation"])
def test_errors_are_those_of_the_training_loss(few, task):
    """Weighted, and averaged over the frames that are asked for."""
    sampler, clips, captions, z0, noise = few
    net, mask, steps = sampler.net, eval_mask(task, 8, 8), (200, 600)
    given, real = torch.from_numpy(np.stack([mask] * 3)), torch.ones(3, 8)
    for batch in (1, 2):
        errors = z0_errors(sampler, clips, captions, mask, 7, batch, steps)
        assert errors.shape == (3, 2, 8)
        for i, t in enumerate(torch.full((3,), t) for t in steps):
            with torch.no_grad():
                want = net(z0=z0, text=data.tokenize(captions), t=t, noise=noise, cond_mask=given, loss_mask=real)
            got = net.diffusion.z0_weight(t).numpy() * errors[:, i, mask == 0].mean(1)
            assert got == pytest.approx(want.numpy(), rel=1e-4)


def test_predictions_are_measured_beside_copying_blending_and_t2v(world, few):
    sampler, clips, _, z0, _ = few
    args = evaluate.parse(command(world, "--n", "3", "--seed", "7"))
    run, test = evaluate.Run(world[1], args), evaluate.EvalSet(args)
    z0, mask = run.latents(test), eval_mask("interpolation", 8, 8)
    found = evaluate.predictions_of(run, test, "interpolation", z0)
    copied = ((z0[:, [1, 3, 5, 7]] - z0[:, [0, 2, 4, 6]]) ** 2).mean()
    assert found["copy"]["mean"] == pytest.approx(copied, rel=1e-5)
    blended = ((z0[:, 7] - (z0[:, 0] + z0[:, 6]) / 2) ** 2).mean((1, 2, 3))
    assert 3 * found["blend"]["mean"] > blended.mean() and found["blend"]["mean"] != pytest.approx(copied)

    def error(task, mask, captions, t=999):
        return z0_errors(run.sampler, test.clips, captions, mask, 7, 3, (t,))[:, 0, [1, 3, 5, 7]].mean()
    with_text, without = error("interpolation", mask, test.captions), error("interpolation", mask, [""] * 3)
    assert found["over copying"]["value"] == pytest.approx(with_text / copied, rel=1e-4)
    assert found["over blending"]["value"] == pytest.approx(with_text / found["blend"]["mean"], rel=1e-4)
    assert found["no caption, over copying"]["value"] == pytest.approx(without / copied, rel=1e-4)
    assert found["caption over none"]["value"] == pytest.approx(with_text / without, rel=1e-4)
    t2v = error("t2v", 0 * mask, test.captions, 300)
    assert found["over t2v"][300]["value"] == pytest.approx(error("interpolation", mask, test.captions, 300) / t2v,
                                                            rel=1e-4)
    assert evaluate.predictions_of(run, test, "t2v", z0) is None


def test_records_are_one_a_concept_and_seeded(world):
    stickers = data.StickerSet(world[0])
    chosen = evaluate.pick(stickers, 20, 8, 0)
    assert len({r["concept"] for r in chosen}) == 20 and min(r["n"] for r in chosen) >= 8
    assert chosen[:5] == evaluate.pick(stickers, 5, 8, 0) != evaluate.pick(stickers, 5, 8, 1)
    test, other = (evaluate.EvalSet(evaluate.parse(command(world, "--seed", seed))) for seed in (0, 1))
    assert {r["split"] for r in stickers.records if r["file"] in test.files} == {"test"} and test.floor["n"] == 6
    assert test.files != other.files
    assert test.prompts("i2v") == [""] * 6 and test.prompts("it2v") == test.captions


def test_whole_run_and_cached_second_run(world, capsys, monkeypatch):
    sheet = world[1] / "sheets" / "a.png"
    evaluate.main(command(world, "--sheet", sheet, "--sheet-rows", "2"))
    first, report = capsys.readouterr().out, json.loads((world[1] / "eval.json").read_text())
    assert list(report["tasks"]) == list(TASKS) and report["n"] == 6 and report["step"] == 7
    assert report["asked"] == dict(steps=2)
    assert report["tasks"]["it2v"]["sampler"] == dict(steps=2, order=1, eta=1.0, text_scale=7.5, image_scale=7.5)
    for word in ("step 7", "n = 6 concepts", "seed 0", "8 evenly spaced frames, 16 px, on white", "FD-app",
                 "real, other concepts"):
        assert word in first
    assert not any(word in first.replace("not FVD", "") for word in ("FVD", "VQA", "CLIP", "R@1"))
    assert report["tasks"]["i2v"]["psnr"]["model"] != report["tasks"]["it2v"]["psnr"]["model"]
    task, t2v = report["tasks"]["interpolation"], report["tasks"]["t2v"]
    assert task["given"] == [0, 2, 4, 6] and set(task["fd"]) == {"model", "copy", "blend", "vae"}
    assert t2v["psnr"] is None and t2v["prediction"] is None and set(t2v["fd"]) == {"model", "vae"}
    assert set(task["fd_less"]) == {"copy", "blend"} and t2v["fd_less"] == {}
    for value in (*(t["fd"]["model"]["FD-mot"] for t in report["tasks"].values()), report["floor"]["FD-app"],
                  *task["fd_less"]["copy"].values()):
        assert value["interval"][0] <= value["value"] <= value["interval"][1]
    for name in ("FD-app", "FD-mot"):
        less = task["fd"]["model"][name]["value"] - task["fd"]["blend"][name]["value"]
        assert task["fd_less"]["blend"][name]["value"] == pytest.approx(less)
    run = evaluate.Run(world[1], evaluate.parse(command(world)))
    test = evaluate.EvalSet(run.args)
    for found, clips in ((report["real"], test.clips), (t2v["scores"], run.clips("t2v", test))):
        moved = np.diff(evaluate.on_white(clips)[:, [*range(8), 0]], axis=1)
        assert found["movement"]["clips"] == pytest.approx(np.sqrt((moved ** 2).mean((1, 2, 3, 4))), abs=1e-4)
    assert "| interpolation, model - blend in a loop | 6 |" in first and "| error / t2v's on the same frames |" in first
    with Image.open(sheet) as image:
        assert image.height > 6 * 2 * 2 * 32

    monkeypatch.setattr(evaluate.Sampler, "sample", lambda *_, **__: pytest.fail("sampled again"))
    monkeypatch.setattr(evaluate, "z0_errors", lambda *_: pytest.fail("the errors were computed again"))
    monkeypatch.setattr(extractors.StandinExtractor, "__call__", lambda *_: pytest.fail("extracted again"))
    evaluate.main(command(world, "--out", world[1] / "again.json"))
    assert json.loads((world[1] / "again.json").read_text()) == report
    run.clips("t2v", test)
    run.vae_sha256 = "another decoder"
    with pytest.raises(pytest.fail.Exception, match="sampled again"):
        run.clips("t2v", test)


def test_a_model_file_alone_is_measured(world, tmp_path, monkeypatch):
    """As those of checkpoints/: its numbers come to out/, and nothing is written beside it."""
    monkeypatch.chdir(tmp_path)
    before = sorted(world[1].iterdir())
    evaluate.main(command((world[0], world[1] / "model.safetensors"), "--tasks", "t2v", "--out", "one.json"))
    folder = tmp_path / f"out/model-{identity(world[1] / 'model.safetensors')[:8]}"
    assert (folder / "eval").is_dir() and sorted(world[1].iterdir()) == before
    evaluate.main(command(world, "--tasks", "t2v", "--out", "two.json"))
    one, two = (json.loads(Path(name).read_text()) for name in ("one.json", "two.json"))
    assert {**one, "model": ""} == {**two, "model": ""}


def test_killed_evaluation_goes_on_and_the_batch_changes_no_clip(world, monkeypatch):
    made, sample = [], evaluate.Sampler.sample

    def killed(self, prompts, seeds, **more):
        made.append(seeds)
        if len(made) == 3:
            raise KeyboardInterrupt
        return sample(self, prompts, seeds, **more)
    monkeypatch.setattr(evaluate.Sampler, "sample", killed)
    args = evaluate.parse(command(world, "--seed", "9", "--batch", "2"))
    run, test = evaluate.Run(world[1], args), evaluate.EvalSet(args)
    with pytest.raises(KeyboardInterrupt):
        run.clips("it2v", test)
    clips = np.array(run.clips("it2v", test))
    assert made == [[(9, 0), (9, 1)], [(9, 2), (9, 3)], *[[(9, 4), (9, 5)]] * 2]
    assert (clips[:, 0] == test.clips[:, 0]).all()
    for path in (world[1] / "eval").glob("it2v-*"):
        path.unlink()
    args.batch = 6
    assert abs(run.clips("it2v", test).astype(int) - clips).max() <= 1


def test_whole_run_with_weights(world, clip_folder, tmp_path, capsys, monkeypatch):
    """CLIP of random weights, the networks of I3D and DOVER replaced (minutes): every number has its column."""
    torch.manual_seed(0)
    torch.save(I3D().state_dict(), tmp_path / "i3d.pt")
    torch.save(DOVER().state_dict(), tmp_path / "DOVER.pth")
    logits, scores = np.random.default_rng(0), np.array([0.1107, -0.08285])
    monkeypatch.setattr(extractors.DOVERExtractor, "__call__", lambda self, clips: np.tile(scores, (len(clips), 1)))
    monkeypatch.setattr(extractors.I3DExtractor, "__call__", lambda self, clips: logits.normal(size=(len(clips), 400)))
    evaluate.main(command(world, "--tasks", "it2v", "--n", "4", "--i3d", tmp_path / "i3d.pt", "--clip", clip_folder,
                          "--dover", tmp_path / "DOVER.pth", "--i3d-eps", "1e-5", "--i3d-frames", "hold",
                          "--out", tmp_path / "all.json"))
    text, report = capsys.readouterr().out, json.loads((tmp_path / "all.json").read_text())
    for word in ("| distance to the real clips | n | FVD | FVD-inf | FD-app | FD-mot |", "8 -> 16 hold", "eps 1e-05",
                 "each repeated 4 times", "local-dir", "CLIP shuffled"):
        assert word in text
    scores = report["tasks"]["it2v"]["scores"]
    assert scores["VQA"]["mean"] == pytest.approx(0.5, abs=1e-4) and scores["CLIP image"]["mean"] <= 1.0001
    assert report["floor"]["FVD"]["value"] > 0 and len(report["metrics"]) == 5


# ---- runs side by side, the paper's tables
def test_runs_are_compared_by_what_differs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fd = {name: dict(value=value, interval=[0, 9]) for name, value in (("FD-app", 0.5), ("FD-mot", 0.25))}
    for name, steps, margin, lengths in (("a", 10, 1.5, "step"), ("b", 12, 0.5, "sample")):
        Path(name).mkdir()
        config = dict(train=dict(steps=steps, lengths=lengths, out=name), model=dict(frames=8, dfgn=dict(groups=4)))
        prediction = {"over copying": dict(value=margin, interval=[margin - 0.1, margin + 0.1])}
        report = dict(step=steps, protocol="p", tasks=dict(t2v=dict(prediction=None, fd=dict(model=fd)),
                                                           it2v=dict(prediction=prediction, fd=dict(model=fd))))
        Path(name, "config.json").write_text(json.dumps(config))
        Path(name, "eval.json").write_text(json.dumps(report))
    evaluate.main(["--compare", "a", "b"])
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "| a | - | 10 | 1.50 [1.40, 1.60] | 0.50, 0.25 | 0.50, 0.25 |",
        '| b | steps=12, lengths="sample" | 12 | 0.50 [0.40, 0.60] | 0.50, 0.25 | 0.50, 0.25 |']
    for change, reason in ((dict(seed=1), "with another seed"), (dict(protocol="q"), "with another protocol"),
                           (dict(tasks={}), "on other --tasks")):
        Path("b", "eval.json").write_text(json.dumps({**report, **change}))
        with pytest.raises(UserError, match=f"--compare b: evaluated {reason} than a"):
            evaluate.main(["--compare", "a", "b"])


def test_table_of_named_rows_averages_seeds(world, tmp_path, capsys):
    for name in ("dcl-0", "dcl-1", "none-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes((world[1] / "model.safetensors").read_bytes())
    rows, out = [f"RDTF w/ DCL={tmp_path}/dcl-*", f"RDTF w/o CL={tmp_path}/none-0"], tmp_path / "t.json"
    evaluate.main(command(world, "--table", "4", "--rows", *rows, "--out", out))
    text, report = capsys.readouterr().out, json.loads(out.read_text())
    assert "n = 6 concepts" in text and "8 evenly spaced frames" in text
    lines = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in text.splitlines() if line.startswith("| ")}
    assert lines["RDTF w/ DCL"][:3] == ["442.18", "0.502", "2"] and lines["RDTF w/ LCL"][:3] == ["451.65", "0.484", "-"]
    assert "[" in lines["RDTF w/ DCL"][-1] and "[" not in lines["RDTF w/o CL"][-1]        # of one seed no interval
    ours = report["tasks"]["it2v"]["ours"]
    assert ours["RDTF w/ DCL"][0] == ours["RDTF w/o CL"][0] and ours["copy nearest"][0]["prediction error"] > 0
    assert len(ours["RDTF w/ DCL"]) == 2 and ours["real, other concepts"][0]["FD-app"] > 0
    difference = report["tasks"]["it2v"]["differences"]["RDTF w/o CL - RDTF w/ DCL"]     # of the same weights
    assert set(difference) >= {"loss", "FD-app", "FD-mot", "prediction error"}
    assert all(abs(d["value"]) < 1e-9 for d in difference.values()) and "| RDTF w/o CL - RDTF w/ DCL | 0.000 [" in text
    with pytest.raises(UserError, match=r"--rows DFGN=nowhere-\*: no run folder matches"):
        evaluate.main(command(world, "--table", "3", "--rows", "DFGN=nowhere-*"))


def test_interval_over_seeds_is_students():
    assert tables.over_seeds([2.0]) == dict(value=2.0, interval=None)
    low, high = tables.over_seeds([1.0, 2.0, 3.0])["interval"]      # t(0.975, 2) = 4.303
    assert (low, high) == pytest.approx((2 - 4.303 / 3 ** 0.5, 2 + 4.303 / 3 ** 0.5), abs=1e-3)


def test_what_a_run_was_trained_on_is_what_it_is_measured_on(world, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(world[1] / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(train=dict(data=[str(world[0])], groups=["star", "circle"]))))
    stickers = data.StickerSet(world[0])
    for more, groups in (([], {"star", "circle"}), (["--groups", "square"], {"square"}),
                         (["--data", str(world[0])], set(stickers.meta["groups"]))):
        args = evaluate.parse(["--run", str(folder), "--split", "train", *more])
        evaluate.Run(folder, args)
        test = evaluate.EvalSet(args)
        assert {r["group"] for r in stickers.records if r["file"] in test.files} == groups


def test_sets_that_cannot_be_measured(world, tmp_path, capsys):
    """The floor wants as many clips of other splits; without them the rest is measured."""
    data.main(["synthetic", "--n", "8", "--size", "20", "--out", str(tmp_path / "set")])
    few = r"--split val: 1 concepts with 8 frames in --groups star, .*train 10, val 1, test \d"
    for more, reason in ((["--data", tmp_path / "set"], "20 px, the model makes 16; `python data.py fluent --size 16 "),
                         (["--split", "val", "--groups", "star"], few)):
        with pytest.raises(UserError, match=reason):
            evaluate.main(command(world, *more))
    evaluate.main(["--data", str(world[0]), "--run", str(world[1]), "--steps", "1", "--n", "40", "--split", "train",
                   "--tasks", "t2v"])
    assert "| real, other concepts | - |" in capsys.readouterr().out
