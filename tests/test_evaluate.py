"""metrics.py and evaluate.py: golden Fréchet distances, what the features see, baselines made by hand, a whole run of a tiny model."""
import json
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import evaluate
import metrics
from data import TASKS, eval_mask
from model import PRESETS, RDTF, VAE
from train import file_hash, save_model


# ---- Fréchet distance

def hash01(n, key):
    """n numbers in [0, 1) by a 32-bit integer hash, the same on every machine."""
    x = (np.arange(n, dtype=np.uint64) * 0x9E3779B1 + zlib.crc32(key.encode())) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ x >> shift) * factor) & 0xFFFFFFFF
    return (x ^ x >> 16) / 2**32


def golden_features(n, d, key, shift=0.0):
    k = np.arange(d)
    return np.sqrt(12) * (hash01(n * d, key).reshape(n, d) - 0.5) * (1 + 0.5 * np.sin(0.1 * k)) + shift * np.cos(0.05 * k)


@pytest.mark.parametrize("n, m, d, expected", [(500, 500, 64, 6.978903834329), (64, 64, 400, 607.3882363534), (60, 90, 400, 594.8342215425),
                                               (256, 256, 400, 307.5384180609), (2048, 2048, 400, 55.7314352660)])
def test_frechet_golden(n, m, d, expected):
    """Computed independently as sqrtm, by eigenvalues and as a nuclear norm, which agree to 1e-7 (singular: 3e-8)."""
    a, b = golden_features(n, d, "A"), golden_features(m, d, "B", 0.3)
    assert metrics.frechet(a, b) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet(b, a) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-8)


def test_frechet_of_shifted_and_scaled_sets():
    a = np.random.default_rng(0).standard_normal((50, 8))
    variance = a.var(0, ddof=1).sum()
    assert metrics.frechet(a, a + 2) == pytest.approx(8 * 4)
    assert metrics.frechet(a - a.mean(0), 3 * (a - a.mean(0))) == pytest.approx(4 * variance)     # (3 - 1)^2 tr S
    assert metrics.frechet(a, np.stack([a.mean(0)] * 9)) == pytest.approx(variance)
    with pytest.raises(ValueError, match="at least 2"):
        metrics.frechet(a, a[:1])


def test_standardise_keeps_constant_and_sleeping_features_small():
    a = np.random.default_rng(0).standard_normal((40, 6))
    a[:, 0], a[:, 1] = 0.1, 1e-7 * a[:, 1]
    b = a + [1, 1e-3, 1, 0, 0, 0]
    x, y = metrics.standardise(a, b)
    assert np.allclose(x.mean(0), 0) and np.allclose(x[:, 2:].std(0), 1)
    assert y[0, 0] == pytest.approx(1) and abs(y[:, 1]).max() < 0.1
    assert metrics.fd(a, a) == pytest.approx(0, abs=1e-9)


# ---- features

def shape_clips(n, seed, side=64):
    """n clips of moving shapes, RGB on white in [-1, 1]: (n, 8, 3, side, side)."""
    rng = np.random.default_rng(seed)
    draw = lambda shape, colour, motion: np.stack([data.draw_shape(shape, colour, motion, t / 8, side) for t in range(8)])
    clips = [draw(*(names[rng.integers(len(names))] for names in (data.SHAPES, data.COLOURS, data.MOTIONS))) for _ in range(n)]
    return torch.from_numpy(np.moveaxis(evaluate.on_white(np.stack(clips)), -1, 2) * 2 - 1)


@pytest.fixture(scope="module")
def net():
    return metrics.LocalFeatures()


def test_features_shape_type_and_order(net):
    x = shape_clips(3, 0)
    f = net(x, batch=2)
    assert {k: v.shape for k, v in f.items()} == dict(appearance=(3, 128), motion=(3, 256))
    assert all(v.dtype == np.float64 and np.isfinite(v).all() for v in f.values())
    again, shuffled, frozen = metrics.LocalFeatures()(x), net(x[:, [3, 1, 6, 0, 7, 2, 5, 4]]), net(x[:, [0] * 8])
    assert np.allclose(f["motion"], again["motion"], atol=1e-5)
    assert np.allclose(f["appearance"], shuffled["appearance"], atol=1e-6)
    assert abs(f["motion"] - shuffled["motion"]).max() > 0.1
    assert np.allclose(frozen["motion"][:, :64], np.log(1e-3)) and np.allclose(frozen["motion"][:, 64:], 0)


def test_features_resize_and_refuse_short_clips(net):
    large = shape_clips(2, 0, 128)
    small = F.interpolate(large.flatten(0, 1), (64, 64), mode="bilinear", antialias=True).unflatten(0, (2, 8))
    assert np.allclose(net(large)["appearance"], net(small)["appearance"])
    assert np.isfinite(net(shape_clips(2, 0, 16))["motion"]).all() and np.isfinite(net(small[:, :5])["motion"]).all()
    with pytest.raises(ValueError, match="at least 5"):
        net(small[:, :4])


def test_distances_grow_with_damage(net):
    reference, x = net(shape_clips(40, 1)), shape_clips(40, 2)
    floor = {k: metrics.fd(reference[k], v) for k, v in net(x).items()}
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(x.shape, np.float32))
    blur = lambda k: F.avg_pool2d(F.pad(x.flatten(0, 1), [k] * 4, value=1), 2 * k + 1, 1).unflatten(0, x.shape[:2])
    for damaged in ([(x + s * noise).clamp(-1, 1) for s in (0.1, 0.4)], [blur(1), blur(4)]):
        weak, strong = ({k: metrics.fd(reference[k], v) for k, v in net(d).items()} for d in damaged)
        for kind in floor:
            assert floor[kind] < weak[kind] < strong[kind]
    frozen = net(x[:, [0] * 8])
    assert metrics.fd(reference["motion"], frozen["motion"]) > 5 * floor["motion"]


# ---- PSNR, baselines, intervals

def test_psnr_values_and_cap():
    x = np.zeros((3, 2, 4, 4, 3), np.float32)
    y = x + np.array([0.1, 0.5, 0], np.float32).reshape(3, 1, 1, 1, 1)
    assert metrics.psnr(x, y) == pytest.approx([20, 6.0206, metrics.PSNR_CAP], abs=1e-4)


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


def test_bootstrap_covers_the_known_mean():
    sets = np.random.default_rng(0).normal(3, 2, (200, 40))
    intervals = np.array([metrics.bootstrap(x, draws=500, seed=i) for i, x in enumerate(sets)])
    assert 0.88 < ((intervals[:, 0] < 3) & (3 < intervals[:, 1])).mean() < 0.99
    assert np.diff(intervals).mean() == pytest.approx(2 * 1.96 * 2 / 40**0.5, rel=0.1)
    assert metrics.bootstrap(sets[0], seed=1) == metrics.bootstrap(sets[0], seed=1) != metrics.bootstrap(sets[0], seed=2)


def test_bootstrap_of_distances_is_of_this_n():
    """The interval holds the mean distance of sets of this size, which resampled sets overshoot."""
    rng = np.random.default_rng(0)
    pairs = rng.standard_normal((40, 2, 20, 30))
    expected = np.mean([metrics.fd(*pair) for pair in pairs])
    intervals = np.array([metrics.bootstrap_fd(*pair, draws=60) for pair in pairs])
    assert ((intervals[:, 0] < expected) & (expected < intervals[:, 1])).mean() > 0.85
    x = pairs[0, 0]
    assert metrics.bootstrap_fd(x, x, draws=20, paired=True) == pytest.approx((0, 0), abs=1e-9)


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
    chosen = evaluate.pick(stickers.records, 20, 8, 0)
    assert len({r["concept"] for r in chosen}) == 20 and min(r["n"] for r in chosen) >= 8
    assert chosen[:5] == evaluate.pick(stickers.records, 5, 8, 0) != evaluate.pick(stickers.records, 5, 8, 1)
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
    assert not any(word in first for word in ("FVD", "VQA", "CLIP"))
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
    records = evaluate.pick([r for r in stickers.records if r["split"] == "test"], 6, 8, 3)
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
