"""evaluate.py: baselines made by hand, a whole run of a tiny model, caches, runs side by side, the paper's tables."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
from data import TASKS, eval_mask
from lib import extractors, tables
from lib.distances import PSNR_CAP
from lib.dover import DOVER
from lib.files import UserError, file_hash, run_cli
from lib.i3d import I3D
from lib.weights import save_model
from model import PRESETS, RDTF, VAE

# ---- baselines and numbers

def test_copy_and_blend_by_hand():
    clips = np.arange(8, dtype=np.float32).reshape(1, 8, 1, 1, 1)
    values = lambda x: x.ravel().tolist()
    mask = eval_mask("interpolation", 8, 8)
    assert values(evaluate.copy_nearest(clips, mask)) == [0, 0, 2, 2, 4, 4, 6, 6]
    assert values(evaluate.blend(clips, mask)) == [0, 1, 2, 3, 4, 5, 6, 3]        # the first follows the last
    assert values(evaluate.copy_nearest(clips, eval_mask("prediction_forward", 8, 8))) == [0, 1, 2, 3, 4, 4, 4, 4]
    third = np.array([0, 1, 0, 0, 1, 0, 0, 0], np.float32)
    assert values(evaluate.blend(clips, third)) == pytest.approx([1.6, 1, 2, 3, 4, 3.4, 2.8, 2.2])


def test_psnr_is_of_unknown_frames_only():
    real = np.random.default_rng(0).random((4, 8, 5, 5, 3)).astype(np.float32)
    mask = eval_mask("prediction_forward", 8, 8)
    made = real.copy()
    made[:, mask == 0] += 0.1
    values = evaluate.psnr_of(made, real, real, mask, 0)
    assert values["model"]["mean"] == pytest.approx(20, abs=1e-3) and values["vae"]["mean"] == PSNR_CAP
    assert values["model - copy"]["mean"] == pytest.approx(values["model"]["mean"] - values["copy"]["mean"])
    assert "blend" in values and "blend" not in evaluate.psnr_of(made, real, real, eval_mask("it2v", 8, 8), 0)
    assert evaluate.psnr_of(made, real, real, eval_mask("t2v", 8, 8), 0) is None


def test_unequal_sets_are_refused():
    rng = np.random.default_rng(0)
    a, b = dict(local=rng.standard_normal((12, 384))), dict(local=rng.standard_normal((8, 384)))
    with pytest.raises(UserError, match="12 real clips against 8 others.*--n 8"):
        evaluate.distances(a, b, 0)


def test_fvd_is_of_bare_logits_and_extrapolated(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = (dict(i3d=rng.standard_normal((800, 400)).astype(np.float32) * 3) for _ in range(2))
    monkeypatch.setattr(evaluate, "bootstrap_fd", lambda *_, **__: [0, 1])       # a minute at this size
    monkeypatch.setattr(evaluate, "extrapolate", lambda a, b, seed: (7.0, 2.0))  # likewise; see test_distances.py
    result = evaluate.distances(a, b, 0)
    assert result["FVD"]["value"] == pytest.approx(evaluate.frechet(a["i3d"], b["i3d"]))
    assert "7.0 +- 2.0" in tables.distance_table({}, result, None)
    few = evaluate.distances({"i3d": a["i3d"][:799]}, {"i3d": b["i3d"][:799]}, 0)
    assert "FVD-inf" not in few


# ---- a whole run

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A synthetic set of 16 px and a tiny model of random weights: (set folder, run folder)."""
    root = tmp_path_factory.mktemp("evaluate")
    data.main(["synthetic", "--n", "200", "--size", "16", "--out", str(root / "set")])
    torch.manual_seed(0)
    preset, run = PRESETS["tiny"], root / "run"
    run.mkdir()
    vae, model = VAE(preset.vae), RDTF(preset)
    torch.nn.init.normal_(model.dfgn.conv_out.weight, std=0.05)  # it begins as zero, blind to text and frames
    save_model(root / "vae.safetensors", vae.state_dict(), kind="vae", config=preset.to_dict(), step=0, psnr=20.0)
    save_model(run / "model.safetensors", model.state_dict(), kind="dfgn", config=preset.to_dict(), step=7,
               vae=file_hash(root / "vae.safetensors"), vae_file=str(root / "vae.safetensors"))
    return root / "set", run


def command(world, *more):
    return ["--data", str(world[0]), "--run", str(world[1]), "--steps", "2", "--n", "6", *map(str, more)]


def test_records_are_one_a_concept_and_seeded(world):
    stickers = data.StickerSet(world[0])
    chosen = evaluate.pick(stickers, 20, 8, 0)
    assert len({r["concept"] for r in chosen}) == 20 and min(r["n"] for r in chosen) >= 8
    assert chosen[:5] == evaluate.pick(stickers, 5, 8, 0) != evaluate.pick(stickers, 5, 8, 1)
    test = evaluate.EvalSet(evaluate.parse(command(world)))
    assert {r["split"] for r in stickers.records if r["file"] in test.files} == {"test"} and test.floor["n"] == 6


def test_whole_run_and_cached_second_run(world, capsys, monkeypatch):
    sheet = world[1] / "sheets" / "a.png"
    evaluate.main(command(world, "--sheet", sheet, "--sheet-rows", "2"))
    first, report = capsys.readouterr().out, json.loads((world[1] / "eval.json").read_text())
    assert list(report["tasks"]) == list(TASKS) and report["n"] == 6 and report["step"] == 7
    assert report["sampler"] == dict(steps=2, eta=1.0, text_scale=7.5, image_scale=7.5)
    for word in ("step 7", "n = 6 concepts", "seed 0", "8 evenly spaced frames, 16 px, on white", "FD-app", "floor"):
        assert word in first
    assert not any(word in first.replace("not FVD", "") for word in ("FVD", "VQA", "CLIP", "R@1"))
    assert report["tasks"]["i2v"]["psnr"]["model"] != report["tasks"]["it2v"]["psnr"]["model"]
    task = report["tasks"]["interpolation"]
    assert task["given"] == [0, 2, 4, 6] and set(task["psnr"]) == {"model", "copy", "blend", "vae", "model - copy"}
    assert report["tasks"]["t2v"]["psnr"] is None and report["tasks"]["t2v"]["fd_copy"] is None
    for value in (*(t["fd"]["FD-mot"] for t in report["tasks"].values()), report["floor"]["FD-app"]):
        assert value["interval"][0] <= value["value"] <= value["interval"][1]
    with Image.open(sheet) as image:
        assert image.height > 6 * 2 * 2 * 32

    monkeypatch.setattr(evaluate.Sampler, "sample", lambda *_, **__: pytest.fail("sampled again"))
    monkeypatch.setattr(extractors.StandinExtractor, "__call__", lambda *_: pytest.fail("extracted again"))
    evaluate.main(command(world, "--out", world[1] / "again.json"))
    assert json.loads((world[1] / "again.json").read_text()) == report


def test_given_frames_come_back_and_seeds_matter(world):
    args = evaluate.parse(command(world, "--seed", "3"))
    run, test = evaluate.Run(world[1], args), evaluate.EvalSet(args)
    assert (run.clips("prediction_forward", test)[:, :5] == test.clips[:, :5]).all()
    files = evaluate.EvalSet(evaluate.parse(command(world))).files
    assert files != test.files


def test_clips_do_not_depend_on_the_batch(world):
    def clips(batch):
        args = evaluate.parse(command(world, "--seed", "5", "--batch", batch))
        found = np.array(evaluate.Run(world[1], args).clips("it2v", evaluate.EvalSet(args)))
        for path in (world[1] / "eval").glob("it2v-*"):
            path.unlink()
        return found.astype(int)
    assert abs(clips(2) - clips(6)).max() <= 1


def test_killed_evaluation_goes_on(world, monkeypatch):
    made, sample = [], evaluate.Sampler.sample

    def killed(self, prompts, seeds, **more):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(seeds)
        return sample(self, prompts, seeds, **more)
    args = evaluate.parse(command(world, "--seed", "9", "--batch", "2"))
    run, test = evaluate.Run(world[1], args), evaluate.EvalSet(args)
    monkeypatch.setattr(evaluate.Sampler, "sample", killed)
    with pytest.raises(KeyboardInterrupt):
        run.clips("t2v", test)
    monkeypatch.setattr(evaluate.Sampler, "sample", lambda *a, **more: made.append(a[2]) or sample(*a, **more))
    assert len(run.clips("t2v", test)) == 6 and made == [[(9, k), (9, k + 1)] for k in (0, 2, 4)]


def test_sheet_of_fixed_prompts(world, tmp_path, capsys):
    (tmp_path / "prompts").write_text("a red star\n\na blue circle that grows\n")
    evaluate.main(command(world, "--prompts", tmp_path / "prompts", "--sheet", tmp_path / "a.png"))
    assert capsys.readouterr().out.strip() == str(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.height == 4 + 2 * (16 * 2 + 14 + 4)


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
    assert report["floor"]["FVD"]["value"] > 0 and len(report["metrics"]) == 4


# ---- runs side by side, the paper's tables

def evaluated(folder, steps, margin, seed=0, sampler=2, **train):
    """A run folder with a configuration and an evaluation."""
    folder.mkdir()
    config = dict(train=dict(steps=steps, seed=0, out=str(folder), **train), model=dict(frames=8, dfgn=dict(groups=4)))
    (folder / "config.json").write_text(json.dumps(config))
    fd = {k: dict(value=v, interval=[0, 9]) for k, v in (("FD-app", 0.5), ("FD-mot", 0.25))}
    margin = {"model - copy": dict(mean=margin, interval=[margin - 1, margin + 1])}
    report = dict(step=steps, split="val", set="s", n=2, seed=seed, files=["a", "b"], protocol="p", sampler=sampler,
                  tasks=dict(t2v=dict(psnr=None, fd=fd), it2v=dict(psnr=margin, fd=fd)))
    (folder / "eval.json").write_text(json.dumps(report))
    return str(folder)


def test_runs_are_compared_by_what_differs(tmp_path, capsys):
    a, b = (evaluated(tmp_path / name, steps, margin, frames=frames)
            for name, steps, margin, frames in (("a", 10, -1.0, "step"), ("b", 12, 2.0, "sample")))
    evaluate.main(["--compare", a, b])
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert rows == ["| a | - | 10 | -1.00 [-2.00, 0.00] | 0.50, 0.25 | 0.50, 0.25 |",
                    '| b | steps=12, frames="sample" | 12 | 2.00 [1.00, 3.00] | 0.50, 0.25 | 0.50, 0.25 |']
    for name, change in (("seed", dict(seed=1)), ("sampler", dict(sampler=4))):
        with pytest.raises(UserError, match=f"{name}: evaluated with another {name} than"):
            evaluate.main(["--compare", a, evaluated(tmp_path / name, 10, 0.0, **change)])
    with pytest.raises(UserError, match="--compare nowhere: config.json and eval.json"):
        evaluate.main(["--compare", a, "nowhere"])


def test_table_of_named_rows_averages_seeds(world, tmp_path, capsys, monkeypatch):
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
    assert ours["RDTF w/ DCL"][0] == ours["RDTF w/o CL"][0] and ours["copy nearest"][0]["dB over copying"] == 0
    assert len(ours["RDTF w/ DCL"]) == 2 and ours["real, other concepts"][0]["FD-app"] > 0
    with pytest.raises(UserError, match=r"--rows DFGN=nowhere-\*: no run folder matches"):
        evaluate.main(command(world, "--table", "3", "--rows", "DFGN=nowhere-*"))
    with pytest.raises(UserError, match="--rows"):
        evaluate.main(command(world, "--table", "3"))


def test_interval_over_seeds_is_students():
    assert tables.over_seeds([2.0]) == dict(value=2.0, interval=None)
    low, high = tables.over_seeds([1.0, 2.0, 3.0])["interval"]      # t(0.975, 2) = 4.303
    assert (low, high) == pytest.approx((2 - 4.303 / 3 ** 0.5, 2 + 4.303 / 3 ** 0.5), abs=1e-3)


# ---- bad input

@pytest.mark.parametrize("more, culprit", [
    (["--run", "nowhere"], "--run nowhere"), (["--data", "nowhere"], "nowhere"), (["--n", "1"], "--n 1"),
    (["--batch", "0"], "--batch 0"), (["--groups", "no-such"], "--groups no-such"), (["--seed", "-1"], "--seed -1"),
    (["--steps", "5000"], "--steps 5000"), (["--prompts", "x.txt"], "--prompts"), (["--sheet", "s.txt"], "s.txt"),
    (["--prompts", "nowhere.txt", "--sheet", "s.png"], "nowhere.txt"), (["--vae", "nowhere.st"], "nowhere.st"),
    (["--split", "train", "--n", "90"], "so choose --n"), (["--i3d-eps", "1e-5"], "--i3d FILE")])
def test_bad_input_is_refused_in_one_line(world, capsys, more, culprit):
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: evaluate.main(command(world, *more)))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and line.startswith("error: ") and culprit in line


def test_set_of_another_size_is_refused(world, tmp_path):
    data.main(["synthetic", "--n", "8", "--size", "20", "--out", str(tmp_path / "set")])
    with pytest.raises(UserError, match="20 px, the model makes 16"):
        evaluate.main(["--run", str(world[1]), "--data", str(tmp_path / "set")])
