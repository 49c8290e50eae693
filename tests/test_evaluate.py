"""evaluate.py: baselines made by hand, a whole run of a tiny model, the paper's tables, the user study."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import metrics
from data import TASKS, eval_mask
from model import PRESETS, RDTF, VAE
from train import file_hash, save_model


# ---- baselines

def test_copy_and_blend_by_hand():
    clips = np.arange(8, dtype=np.float32).reshape(1, 8, 1, 1, 1)
    values = lambda x: x.ravel().tolist()
    mask = eval_mask("interpolation", 8, 8)
    assert values(evaluate.copy_nearest(clips, mask)) == [0, 0, 2, 2, 4, 4, 6, 6]
    assert values(evaluate.blend(clips, mask)) == [0, 1, 2, 3, 4, 5, 6, 3]
    assert values(evaluate.copy_nearest(clips, eval_mask("prediction_forward", 8, 8))) == [0, 1, 2, 3, 4, 4, 4, 4]
    third = np.array([0, 1, 0, 0, 1, 0, 0, 0], np.float32)
    assert values(evaluate.blend(clips, third)) == pytest.approx([1.6, 1, 2, 3, 4, 3.4, 2.8, 2.2])


def test_psnr_is_of_unknown_frames_only():
    real = np.random.default_rng(0).random((4, 8, 5, 5, 3)).astype(np.float32)
    mask = eval_mask("prediction_forward", 8, 8)
    made = real.copy()
    made[:, mask == 0] += 0.1
    values = evaluate.psnr_of("prediction_forward", made, real, real, mask, 0)
    assert values["model"]["mean"] == pytest.approx(20, abs=1e-3) and values["vae"]["mean"] == metrics.PSNR_CAP
    assert "blend" in values and len(values["copy"]["clips"]) == 4
    assert "blend" not in evaluate.psnr_of("it2v", made, real, real, eval_mask("it2v", 8, 8), 0)
    assert values["model - copy"]["mean"] == pytest.approx(values["model"]["mean"] - values["copy"]["mean"])
    assert evaluate.psnr_of("t2v", made, real, real, eval_mask("t2v", 8, 8), 0) is None


def test_on_white():
    rgba = np.array([[255, 0, 0, 255], [0, 0, 255, 0], [0, 0, 0, 51]], np.uint8)
    assert np.allclose(evaluate.on_white(rgba), [[1, 0, 0], [1, 1, 1], [0.8, 0.8, 0.8]])


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
    save_model(root / "vae.safetensors", vae.state_dict(), kind="vae", config=preset.to_dict(), step=0)
    save_model(run / "model.safetensors", model.state_dict(), kind="dfgn", config=preset.to_dict(), step=7,
               vae=file_hash(root / "vae.safetensors"), vae_file=str(root / "vae.safetensors"))
    return root / "set", run


def command(world, *more):
    return ["--data", str(world[0]), "--run", str(world[1]), "--steps", "2", "--n", "6", *more]


def test_records_are_one_a_concept_and_seeded(world):
    stickers = data.StickerSet(world[0])
    chosen = evaluate.pick(stickers, 20, 8, 0)
    assert len({r["concept"] for r in chosen}) == 20 and min(r["n"] for r in chosen) >= 8
    assert chosen[:5] == evaluate.pick(stickers, 5, 8, 0) != evaluate.pick(stickers, 5, 8, 1)
    assert evaluate.read_clips(stickers, chosen, 8).shape == (20, 8, 16, 16, 4)


def test_whole_run_and_cached_second_run(world, capsys, monkeypatch):
    sheet = world[1] / "sheets" / "a.png"
    evaluate.main(command(world, "--sheet", str(sheet), "--rows", "2"))
    first = capsys.readouterr().out
    report = json.loads((world[1] / "eval.json").read_text())
    assert list(report["tasks"]) == list(TASKS) and report["n"] == 6 and report["step"] == 7
    assert report["sampler"]["t2v"] == report["sampler"]["others"] == dict(steps=2, spacing="uniform", eta=1.0, text_scale=7.5, image_scale=7.5, detail=True)
    for word in ("step 7", "n = 6 concepts", "seed 0", "8 evenly spaced frames, 16 px, on white", "FD-app", "FD-mot", "floor", "blend"):
        assert word in first
    assert not any(word in first.replace("not FVD", "") for word in ("FVD", "VQA", "CLIP", "R@1")) and "NIQE-local" in first
    assert report["tasks"]["i2v"]["psnr"]["model"] != report["tasks"]["it2v"]["psnr"]["model"]
    task = report["tasks"]["interpolation"]
    assert task["given"] == [0, 2, 4, 6] and set(task["psnr"]) == {"model", "copy", "blend", "vae", "model - copy"}
    assert report["tasks"]["t2v"]["psnr"] is None and report["tasks"]["t2v"]["fd_copy"] is None
    for value in (*(t["fd"]["FD-mot"] for t in report["tasks"].values()), report["floor"]["FD-app"]):
        assert value["interval"][0] <= value["value"] <= value["interval"][1]
    with Image.open(sheet) as image:
        assert image.height > 6 * 2 * 2 * 32

    monkeypatch.setattr(evaluate.Sampler, "sample", lambda *_, **__: pytest.fail("sampled again"))
    evaluate.main(command(world, "--out", str(world[1] / "again.json")))
    again = json.loads((world[1] / "again.json").read_text())
    assert capsys.readouterr().out.splitlines()[0] == first.splitlines()[0]
    assert all(again[k] == report[k] for k in report if k not in ("tasks", "vae", "floor"))
    for task in TASKS:
        one, two = again["tasks"][task], report["tasks"][task]
        assert task == "t2v" or one["psnr"]["model - copy"] == two["psnr"]["model - copy"]
        for name in ("FD-app", "FD-mot"):        # convolutions may round otherwise at another address
            assert one["fd"][name]["value"] == pytest.approx(two["fd"][name]["value"], rel=1e-4)
            assert one["fd"][name]["interval"] == pytest.approx(two["fd"][name]["interval"], rel=1e-3, abs=1e-3)


def test_given_frames_come_back_and_seeds_matter(world):
    evaluate.main(command(world, "--tasks", "prediction_forward", "--seed", "3"))
    stickers = data.StickerSet(world[0])
    records = evaluate.pick(stickers, 6, 8, 3, stickers.split == "test")
    newest = max((world[1] / "eval").glob("prediction_forward-*.npy"), key=lambda p: p.stat().st_mtime_ns)
    assert (np.load(newest)[:, :5] == evaluate.read_clips(stickers, records, 8)[:, :5]).all()


@pytest.mark.parametrize("text", ["a red star\n\na blue circle that grows\n", '["a red star", "a blue circle that grows"]'])
def test_sheet_of_fixed_prompts(world, tmp_path, text, capsys):
    (tmp_path / "prompts").write_text(text)
    evaluate.main(command(world, "--prompts", str(tmp_path / "prompts"), "--sheet", str(tmp_path / "a.png")))
    assert capsys.readouterr().out.strip() == str(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.height == 4 + 2 * (16 * 2 + 14 + 4)


def test_runs_are_compared_by_what_differs(tmp_path, capsys):
    def run(name, steps, margin, seed=0, sampler=2, **train):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(dict(train=dict(steps=steps, seed=0, out=name, **train), model=dict(frames=8, dfgn=dict(base="loop")))))
        (folder / "log.jsonl").write_text("".join(json.dumps(dict(step=s, cpu_s=1.5)) + "\n" for s in (1, 2, steps)))
        fd = {k: dict(value=v, interval=[0, 9]) for k, v in (("FD-app", 0.5), ("FD-mot", 0.25))}
        given = dict(psnr={"model - copy": dict(mean=margin, interval=[margin - 1, margin + 1])}, fd=fd)
        (folder / "eval.json").write_text(json.dumps(dict(split="val", set="s", n=2, seed=seed, files=["a", "b"], protocol="p", sampler=sampler, tasks=dict(t2v=dict(psnr=None, fd=fd), it2v=given))))
        return str(folder)
    a, b = run("a", 10, -1.0, frames="step"), run("b", 12, 2.0, frames="sample")
    other, another = run("other", 10, 0.0, seed=1), run("another", 10, 0.0, sampler=4)
    evaluate.main(["--compare", a, b])
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert rows[0] == "| a | - | 10 | 4 | -1.00 [-2.00, 0.00] | 0.50, 0.25 | 0.50, 0.25 |"
    assert rows[1] == '| b | steps=12, frames="sample" | 12 | 4 | 2.00 [1.00, 3.00] | 0.50, 0.25 | 0.50, 0.25 |'
    with pytest.raises(data.UserError, match="other: evaluated with another seed"):
        evaluate.main(["--compare", a, other])
    with pytest.raises(data.UserError, match="another sampler than"):
        evaluate.main(["--compare", a, another])
    (tmp_path / "b" / "log.jsonl").write_text("")
    with pytest.raises(data.UserError, match="--compare .*b:.*needed"):
        evaluate.main(["--compare", a, b])
    with pytest.raises(data.UserError, match="--compare nowhere"):
        evaluate.main(["--compare", a, "nowhere"])


@pytest.mark.parametrize("more, culprit", [
    (["--run", "nowhere"], "--run nowhere"), (["--data", "nowhere"], "nowhere"), (["--n", "1"], "--n 1"), (["--batch", "0"], "--batch 0"),
    (["--groups", "no-such"], "--groups no-such"), (["--seed", "-1"], "--seed -1"), (["--steps", "5000"], "--steps 5000"),
    (["--prompts", "x.txt"], "--prompts"), (["--prompts", "nowhere.txt", "--sheet", "s.png"], "nowhere.txt"),
    (["--vae", "nowhere.st"], "nowhere.st"), (["--sheet", "s.txt"], "--sheet s.txt")])
def test_bad_input_is_refused_in_one_line(world, capsys, more, culprit):
    with pytest.raises(SystemExit) as stop:
        data.run_cli(lambda: evaluate.main(command(world, *more)))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and line.startswith("error: ") and culprit in line


def test_set_of_another_size_is_refused(world, tmp_path, capsys):
    data.main(["synthetic", "--n", "8", "--size", "20", "--out", str(tmp_path / "set")])
    with pytest.raises(data.UserError, match="20 px"):
        evaluate.main(["--run", str(world[1]), "--data", str(tmp_path / "set")])


# ---- what is kept, unequal sets

def test_kept_rows_survive_a_kill(tmp_path):
    calls = []
    def make(stop):
        def rows(part):
            if part.start >= stop:
                raise KeyboardInterrupt
            calls.append((part.start, part.stop))
            return np.arange(10)[part, None] * np.ones((1, 3))
        return rows
    what = (tmp_path, "x", dict(a=1), (10, 3), np.float32, 4)
    with pytest.raises(KeyboardInterrupt):
        evaluate.kept(*what, make(4))
    part, = tmp_path.glob("x-*.part")
    with open(part, "ab") as file:
        file.write(b"half a row")
    rows = evaluate.kept(*what, make(99))
    assert calls == [(0, 4), (4, 8), (8, 10)] and rows.tolist() == [[i] * 3 for i in range(10)] and not part.exists()
    assert (evaluate.kept(*what, make(0)) == rows).all()
    with pytest.raises(ValueError, match="came where"):
        evaluate.kept(tmp_path, "x", dict(a=3), (10, 4), *what[4:], make(99))
    next(tmp_path.glob("*.part")).unlink()
    assert (evaluate.kept(tmp_path, "x", dict(a=2), *what[3:], make(99)) == rows).all() and len(list(tmp_path.iterdir())) == 2


def test_unequal_sets_are_refused_unless_allowed():
    rng = np.random.default_rng(0)
    a, b = dict(local=rng.standard_normal((12, 384))), dict(local=rng.standard_normal((8, 384)))
    args = evaluate.parse([])
    with pytest.raises(data.UserError, match="12 real clips against 8 others.*--n 8, or --allow-unequal-n"):
        evaluate.distances(a, b, args)
    args = evaluate.parse(["--allow-unequal-n"])
    result = evaluate.distances(a, b, args)
    assert (result["n"], result["m"]) == (12, 8) and evaluate.fd_cells(result)[0] == "12 against 8"


def test_fvd_is_of_bare_logits_and_extrapolated(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = (dict(i3d=rng.standard_normal((800, 400)).astype(np.float32) * 3) for _ in range(2))
    monkeypatch.setattr(evaluate, "bootstrap_fd", lambda *_, **__: [0, 1])          # a minute at this size
    monkeypatch.setattr(evaluate, "extrapolate", lambda a, b, seed: (7.0, 2.0))     # likewise; tested in test_metrics.py
    result = evaluate.distances(a, b, evaluate.parse([]))
    assert result["FVD"]["value"] == pytest.approx(evaluate.frechet(a["i3d"], b["i3d"])) and len(result["FVD-inf"]) == 2
    assert len(evaluate.fd_cells(result)) == 3 and "+-" in evaluate.fd_cells(result)[2]
    few = evaluate.distances({k: v[:799] for k, v in a.items()}, {k: v[:799] for k, v in b.items()}, evaluate.parse([]))
    assert evaluate.fd_cells(few)[2] == "-"


# ---- the published networks in a whole run

def test_whole_run_with_weights(world, clip_folder, tmp_path, capsys, monkeypatch):
    """I3D and CLIP of random weights, DOVER's network replaced (it takes minutes): every number has its column and its protocol."""
    torch.manual_seed(0)
    torch.save(metrics.I3D().state_dict(), tmp_path / "i3d.pt")
    torch.save(metrics.DOVER().state_dict(), tmp_path / "DOVER.pth")
    monkeypatch.setattr(evaluate.DOVERRows, "__call__", lambda self, clips: np.tile([0.1107, -0.08285], (len(clips), 1)))
    evaluate.main(command(world, "--tasks", "it2v", "--n", "4", "--i3d", str(tmp_path / "i3d.pt"), "--dover", str(tmp_path / "DOVER.pth"),
                          "--clip", str(clip_folder), "--i3d-eps", "1e-5", "--i3d-frames", "hold", "--out", str(tmp_path / "all.json")))
    text, report = capsys.readouterr().out, json.loads((tmp_path / "all.json").read_text())
    for word in ("| distance to the real clips | n | FVD | FVD-inf | FD-app | FD-mot |", "8 -> 16 hold", "eps 1e-05", "each repeated 4 times", "local-dir", "CLIP shuffled"):
        assert word in text
    scores = report["tasks"]["it2v"]["scores"]
    assert scores["VQA"]["mean"] == pytest.approx(0.5, abs=1e-4) and 0 <= scores["CLIP R@1"]["mean"] <= 1 and scores["CLIP image"]["mean"] <= 1.0001
    assert report["floor"]["FVD"]["value"] > 0 and len(report["metrics"]) == 5


# ---- the paper's tables

def ablation(world, folder, seed, **changes):
    """A run folder with the model of `world` and a configuration of its own."""
    run = folder / f"{'-'.join(map(str, changes.values())) or 'rdtf'}-{seed}"
    run.mkdir(parents=True)
    (run / "model.safetensors").write_bytes((world[1] / "model.safetensors").read_bytes())
    changes = dict(steps=7, **changes)             # what the model says that it was trained for
    model = json.loads(json.dumps(PRESETS["tiny"].to_dict()))
    model["dfgn"]["temporal"] = changes.pop("temporal", "sti")
    ddu = changes.pop("ddu", True)
    masks = {} if ddu else json.loads(json.dumps(evaluate.WITHOUT_DDU))
    trained = {**vars(evaluate.TrainConfig()), **masks, "preset": "tiny", "seed": seed, **changes}
    (run / "config.json").write_text(json.dumps(dict(train=trained, model=model, inputs=dict(data="d", vae="v"), precision="bf16" if seed else "float32")))
    return run


@pytest.fixture
def ablations(world, tmp_path):
    """Two seeds of RDTF, one of each other row of Tables 3 and 4, and one that belongs to none."""
    runs = [ablation(world, tmp_path / "runs", 0), ablation(world, tmp_path / "runs", 1), ablation(world, tmp_path / "runs", 0, curriculum="none"),
            ablation(world, tmp_path / "runs", 0, curriculum="linear"), ablation(world, tmp_path / "runs", 0, ddu=False, curriculum="none"),
            ablation(world, tmp_path / "runs", 0, ddu=False, curriculum="none", temporal="conv3d"), ablation(world, tmp_path / "runs", 0, lr=0.5)]
    return tmp_path / "runs", runs


def test_runs_are_found_by_their_configuration(ablations):
    folder, runs = ablations
    for name, change in (("twin", {}), ("othervae", dict(inputs=dict(data="d", vae="w"))), ("unfinished", dict(steps=9)), ("part", dict(tasks=["it2v"]))):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes((runs[0] / "model.safetensors").read_bytes())
        config = json.loads((runs[0] / "config.json").read_text())
        config["train"].update({k: v for k, v in change.items() if k != "inputs"})
        (folder / name / "config.json").write_text(json.dumps({**config, **{k: v for k, v in change.items() if k == "inputs"}}))
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    old = json.loads((runs[1] / "config.json").read_text())
    del old["train"]["still_first"]                # a run from before this field
    (runs[1] / "config.json").write_text(json.dumps(old))
    found = evaluate.find_runs([str(folder)])
    others = {name: folder / name for name in ("twin", "othervae", "part")}
    assert set(found) == {*runs, *others.values()}
    rows, left_out = evaluate.choose(found, evaluate.TABLES["3"][1])
    assert rows == {"DFGN(3D-Conv)": [runs[5]], "DFGN": [runs[4]], "DFGN + DDU": [runs[2]], "DFGN + DDU + DCL": runs[:2]}
    assert set(left_out) == {str(runs[3]), str(runs[6]), *map(str, others.values())} and left_out[str(others["twin"])] == "the same as another" and "lr=0.5" in left_out[str(runs[6])]
    rows, _ = evaluate.choose(found, evaluate.TABLES["4"][1])
    assert rows == {"RDTF w/o CL": [runs[2]], "RDTF w/ LCL": [runs[3]], "RDTF w/ DCL": runs[:2]}
    with pytest.raises(data.UserError, match="--runs nowhere"):
        evaluate.find_runs(["nowhere"])
    with pytest.raises(data.UserError, match="none of 1 runs is a row"):
        evaluate.choose({runs[5]: found[runs[5]]}, evaluate.TABLES["4"][1])


def test_table_4(world, ablations, tmp_path, capsys):
    out = tmp_path / "t.json"
    evaluate.main(["--table", "4", "--runs", str(ablations[0]), "--data", str(world[0]), "--steps", "2", "--n", "6", "--out", str(out)])
    text, report = capsys.readouterr().out, json.loads(out.read_text())
    assert "n = 6 concepts" in text and "8 evenly spaced frames" in text and "Left out: " in text
    row = next(line for line in text.splitlines() if line.startswith("| RDTF w/ DCL |"))
    assert row.startswith("| RDTF w/ DCL | 442.18 | 0.502 | 2: 0, 1 | - | - |")
    ours, less = report["tasks"]["it2v"]["ours"], report["tasks"]["it2v"]["difference"]
    for name in ("FD-app", "FD-mot", "dB over copying", "NIQE-local"):           # all rows are the same network here
        assert ours["RDTF w/o CL"][name]["value"] == pytest.approx(ours["RDTF w/ DCL"][name]["value"], rel=1e-6)
        assert np.hstack(less["RDTF w/o CL"][name]) == pytest.approx([0, 0, 0], abs=1e-6)
    assert ours["copy nearest"]["dB over copying"]["value"] == 0 and less["copy nearest"]["FD-mot"][0] != 0
    with Image.open(out.with_suffix(".png")) as image:
        assert image.width > 500


def test_paired_difference_is_narrower_than_its_parts():
    rng = np.random.default_rng(0)
    hard = rng.standard_normal(40) * 3
    made = lambda shift: [({}, dict(score=hard + shift + 0.1 * rng.standard_normal(40)))]
    test = type("Test", (), dict(records=[0] * 40, real_rows={}))
    cells, less = evaluate.cells_of(test, "it2v", dict(a=made(1), b=made(0)), evaluate.parse([]))
    value, (low, high) = less["a"]["score"]
    assert 0.9 < low < value < high < 1.1 and np.ptp(evaluate.between(cells["a"].draws["score"])) > 1


def test_tables_6_and_7_say_what_the_code_uses(tmp_path, capsys):
    out = str(tmp_path / "t.json")
    evaluate.main(["--table", "6", "--out", out])
    rows = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:4]] for line in capsys.readouterr().out.splitlines() if line.startswith("|")}
    same = [name for name, (paper, ours) in rows.items() if paper == ours]
    assert len(rows) > 30 and {"unet.in_channels", "sti.conv_kernel", "curriculum.Ki", "sampling.eta", "diffusion.beta_T", "vae.latent"} < set(same)
    assert set(rows) - set(same) == {"hyper-parameter", "training.steps", "training.lr", "training.batch_per_gpu", "training.gpus", "training.gpu"}
    evaluate.main(["--table", "7", "--out", out])
    text = capsys.readouterr().out
    assert "| interpolation | 01010101, 10101010, 10010010 | 10101010, 01010101, 10010010 | 10101010 |" in text and "| it2v | 10000000, 00100000 |" in text


# ---- damage

def test_damages_by_hand():
    rng, clips = np.random.default_rng(0), np.random.default_rng(1).integers(0, 256, (20, 8, 16, 16, 3), np.uint8)
    for kind, strengths in evaluate.DAMAGES.items():
        for strength in strengths:
            assert evaluate.damage(clips, kind, strength, rng).shape == clips.shape
    kinds = {kind.split()[0].strip(","): kind for kind in evaluate.DAMAGES}
    marked = np.arange(8, dtype=np.uint8)[None, :, None, None, None] * np.ones((20, 8, 1, 1, 3), np.uint8)
    frozen = evaluate.damage(marked, kinds["frozen"], 6, rng)[0, :, 0, 0, 0]
    assert frozen.tolist() == [0, 1, 1, 1, 1, 1, 1, 1]
    for strength in (1, 3):
        order = evaluate.damage(marked, kinds["shuffled"], strength, rng)[..., 0, 0, 0].astype(int)
        assert (np.sort(order, 1) == np.arange(8)).all() and 0 < abs(order - np.arange(8)).max() <= strength
    assert len(np.unique(evaluate.damage(clips, kinds["repeats"], 5, rng).reshape(20, -1), axis=0)) == 4
    assert (evaluate.wrong_captions(20, 25, rng) != np.arange(20)).sum() == 5 and (evaluate.wrong_captions(20, 100, rng) != np.arange(20)).all()


def test_check_metrics_prints_a_table(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "DAMAGES", {k: v for k, v in evaluate.DAMAGES.items() if k.startswith(("noise", "frozen"))})
    evaluate.main(["--check-metrics", "--data", str(world[0]), "--n", "30", "--out", str(tmp_path / "c.json")])
    report = json.loads((tmp_path / "c.json").read_text())
    assert "| noise, of 255: 4, 10, 25 |" in capsys.readouterr().out
    frozen = np.array(next(v for k, v in report["damaged"]["FD-mot"].items() if k.startswith("frozen"))["factors"])
    assert frozen.shape == (3, 3) and (frozen.mean(0)[2] > 3)
    halves = evaluate.split_concepts(data.StickerSet(world[0]), 30, 8, np.random.default_rng(0))
    assert len(halves[0]) == len(halves[1]) and not {r["concept"] for r in halves[0]} & {r["concept"] for r in halves[1]}


# ---- judge and study by command

def test_judge_is_fitted_and_used(world, tmp_path, capsys):
    judge = str(tmp_path / "judge.safetensors")
    evaluate.main(["--fit-judge", "--data", str(world[0]), "--judge", judge])
    evaluate.main(command(world, "--tasks", "t2v", "--judge", judge))
    assert "| mean of a clip | NIQE-local | R@1-local | R@1-local shuffled |" in capsys.readouterr().out
    data.main(["synthetic", "--n", "60", "--size", "16", "--out", str(tmp_path / "set")])
    with pytest.raises(data.UserError, match="fitted to another set"):
        evaluate.main(["--run", str(world[1]), "--data", str(tmp_path / "set"), "--judge", judge])


def test_study_of_two_runs(world, ablations, tmp_path, capsys):
    page = tmp_path / "study.html"
    evaluate.main(["--study", *map(str, ablations[1][:2]), "--data", str(world[0]), "--steps", "2", "--n", "2", "--out", str(page)])
    key = json.loads(page.with_suffix(".key.json").read_text())
    assert key["methods"] == [run.name for run in ablations[1][:2]] and len(key["inputs"]) == 2
    answers = [{c: list(x["codes"]) for c in key["criteria"]} for x in key["inputs"]]
    (tmp_path / "a.json").write_text(json.dumps(dict(study=key["study"], participant="p", answers=answers)))
    evaluate.main(["--study-results", str(tmp_path / "a.json"), str(page.with_suffix(".key.json")), "--key", str(page.with_suffix(".key.json"))])
    assert "participants: 1, inputs: 2" in capsys.readouterr().out
    with pytest.raises(data.UserError, match="--key"):
        evaluate.main(["--study-results", str(tmp_path / "a.json")])
