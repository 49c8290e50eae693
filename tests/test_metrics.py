"""metrics.py: golden values of I3D, DOVER and the Fréchet distance, what the features see, refused weights, intervals.

Golden networks are filled by a hash of their parameters' names, so that no published weights are needed; the values come from public
implementations with the same filling."""
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import metrics
import train

GOLDEN = Path(__file__).with_name("golden")


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

def signed(rgba):
    """(N, T, S, S, 4) uint8 -> (N, T, 3, S, S) in [-1, 1], on white."""
    return torch.from_numpy(np.moveaxis(metrics.on_white(rgba), -1, 2) * 2 - 1)


def shape_clips(n, seed, side=64):
    """n clips of moving shapes, RGB on white in [-1, 1]: (n, 8, 3, side, side)."""
    rng = np.random.default_rng(seed)
    draw = lambda shape, colour, motion: np.stack([data.draw_shape(shape, colour, motion, t / 8, side) for t in range(8)])
    clips = [draw(*(names[rng.integers(len(names))] for names in (data.SHAPES, data.COLOURS, data.MOTIONS))) for _ in range(n)]
    return signed(np.stack(clips))


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


# ---- PSNR, intervals

def test_psnr_values_and_cap():
    x = np.zeros((3, 2, 4, 4, 3), np.float32)
    y = x + np.array([0.1, 0.5, 0], np.float32).reshape(3, 1, 1, 1, 1)
    assert metrics.psnr(x, y) == pytest.approx([20, 6.0206, metrics.PSNR_CAP], abs=1e-4)


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


# ---- extrapolation to infinitely many clips

def test_extrapolation_is_near_the_truth_and_knows_its_error():
    rng, results = np.random.default_rng(0), []
    for _ in range(6):
        a, b = rng.standard_normal((2, 256, 16))
        results.append((metrics.frechet(a, b + 0.3), *metrics.extrapolate(a, b + 0.3)))
    bare, value, error = np.array(results).T
    assert bare.mean() > 1.9 and value.mean() == pytest.approx(16 * 0.09, abs=0.25)            # the bare distance is half as large again
    assert abs(value - 1.44).max() < 3 * error.mean() and 0.1 < error.mean() < 1
    with pytest.raises(ValueError, match="at least 32"):
        metrics.extrapolate(a[:31], b)


# ---- golden networks

def filled(net):
    """A state dict by the recipe of the golden values."""
    def value(key, old):
        if not old.is_floating_point():
            return old
        u, shape = hash01(old.numel(), key).reshape(old.shape), tuple(old.shape)
        for ending, x in (("running_var", 0.5 + u), ("running_mean", 0.2 * (u - 0.5)), ("gamma", 0.1 + 0.2 * u), ("position_bias_table", u - 0.5),
                          ("bias", 0.2 * (u - 0.5))):
            if key.endswith(ending):
                return torch.from_numpy(np.asarray(x)).float()
        x = 0.75 + 0.5 * u if len(shape) == 1 else (2 * u - 1) * np.sqrt(6 / np.prod(shape[1:]))
        return torch.from_numpy(x).float()
    return {k: value(k, v) for k, v in net.state_dict().items()}


def golden_input(T, S=224):
    """(1, 3, T, S, S) float32: a wave that moves, and noise."""
    _, c, t, h, w = np.ogrid[:1, :3, :T, :S, :S]
    u = hash01(3 * T * S * S, "input").reshape(1, 3, T, S, S)
    return torch.from_numpy(0.6 * np.sin(0.11 * h + 0.7 * c + 0.3 * t) * np.cos(0.07 * w - 0.2 * t) + 0.4 * (2 * u - 1)).float()


def golden_clip():
    """(1, 8, 64, 64, 3) uint8."""
    return np.floor(256 * hash01(8 * 64 * 64 * 3, "u8")).astype(np.uint8).reshape(1, 8, 64, 64, 3)


@pytest.fixture(scope="module")
def i3d_golden():
    return json.loads((GOLDEN / "i3d.json").read_text())


@pytest.fixture(scope="module")
def i3d_weights():
    return filled(metrics.I3D())


@pytest.fixture(scope="module")
def i3d(i3d_weights):
    return metrics.fit_weights(metrics.I3D(), i3d_weights, "--i3d", "golden")


close = dict(rel=1e-3, abs=2e-3)


def test_i3d_size_and_names(i3d_golden):
    net = metrics.I3D()
    assert sum(p.numel() for p in net.parameters()) == i3d_golden["counts"]["parameters"] == 12_697_264
    assert len(net.state_dict()) == i3d_golden["counts"]["state_dict_entries"] == 344
    assert set(net.state_dict()) == set(i3d_golden["hassony2_key_map"].values())


@torch.no_grad()
def test_i3d_golden_end_points_and_logits(i3d, i3d_golden):
    seen = {}
    hooks = [module.register_forward_hook(lambda _, __, y, name=name: seen.update({name: y.clone()})) for name, module in i3d.named_children()]
    y = i3d(golden_input(16))
    for hook in hooks:
        hook.remove()
    seen["logits_map"] = seen.pop("logits")
    assert y[0].tolist() == pytest.approx(i3d_golden["logits_16_eps1e-3"], **close)
    assert seen["avg_pool"].flatten()[:32].tolist() == pytest.approx(i3d_golden["pooled1024_16_eps1e-3_first32"], **close)
    for name, (shape, mean, std) in i3d_golden["endpoints"].items():
        x = seen[name].double()
        assert list(x.shape) == shape and float(x.mean()) == pytest.approx(mean, rel=1e-4) and float(x.std(correction=0)) == pytest.approx(std, rel=1e-4), name
    folded = metrics.fit_weights(metrics.I3D(), i3d.state_dict(), "--i3d", "golden").fold()
    assert abs(folded(golden_input(16)) - y).max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", ["T9", "T10", "T12"])
def test_i3d_golden_lengths(i3d, i3d_golden, name):
    assert i3d(golden_input(int(name[1:])))[0, :16].tolist() == pytest.approx(i3d_golden["logits"][name], **close)


@torch.no_grad()
@pytest.mark.parametrize("how, name", [("loop", "loop_twice_to_16"), ("pingpong", "pingpong_to_16"), ("hold", "each_frame_twice_to_16"), ("pad", "repeat_last_to_16")])
def test_i3d_golden_eight_frames(i3d, i3d_golden, how, name):
    x = golden_input(8)[:, :, metrics.extend(8, how)]
    assert i3d(x)[0, :16].tolist() == pytest.approx(i3d_golden["logits"][name], **close)


@torch.no_grad()
def test_i3d_golden_other_eight_frames(i3d, i3d_golden):
    x = golden_input(8)
    assert i3d(x[:, :, metrics.extend(8, "pad", 9)])[0, :16].tolist() == pytest.approx(i3d_golden["logits"]["repeat_last_to_9"], **close)
    stretched = F.interpolate(x, (16, 224, 224), mode="trilinear", align_corners=False)
    assert i3d(stretched)[0, :16].tolist() == pytest.approx(i3d_golden["logits"]["trilinear_to_16"], **close)
    with pytest.raises(RuntimeError, match="kernel size"):
        i3d(x)


def test_i3d_preprocessing(i3d_golden):
    expected, clip = i3d_golden["preprocess_64_to_224"], golden_clip()
    x = metrics.i3d_input(clip)
    assert clip.ravel()[:12].tolist() == expected["u8_first12"] and x.shape == (1, 3, 16, 224, 224)
    assert torch.equal(x[:, :, :8], x[:, :, 8:])
    assert [float(x.mean()), float(x.std())] == pytest.approx([expected["mean"], expected["std"]], rel=1e-4, abs=1e-6)
    assert x[0, 0, 0, 0, :8].tolist() == pytest.approx(expected["c0t0_row0_first8"], abs=1e-5)
    assert x[0, 2, 7, 223, -4:].tolist() == pytest.approx(expected["c2t7_row223_last4"], abs=1e-5)


def test_extend():
    assert metrics.extend(8).tolist() == [*range(8)] * 2 and metrics.extend(16).tolist() == metrics.extend(20).tolist() == [*range(16)]
    assert metrics.extend(12).tolist() == [*range(12), 0, 1, 2, 3] and metrics.extend(1, "pingpong").tolist() == [0] * 16
    assert metrics.extend(3, "pingpong", 7).tolist() == [0, 1, 2, 2, 1, 0, 0]


@pytest.fixture(scope="module")
def i3d_files(i3d_weights, i3d_golden, tmp_path_factory):
    """The same network in three forms: ours, the other naming (as safetensors), TorchScript with the call of i3d_torchscript.pt."""
    folder = tmp_path_factory.mktemp("i3d")
    torch.save(i3d_weights, folder / "ours.pt")
    theirs = {new: i3d_weights[old].clone() for new, old in i3d_golden["hassony2_key_map"].items()}
    from safetensors.torch import save_file
    save_file(theirs, folder / "other.safetensors")

    class Script(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.jit.trace(metrics.fit_weights(metrics.I3D(), i3d_weights, "", "").float(), torch.zeros(1, 3, 16, 224, 224))

        def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = False):
            assert return_features and not rescale and not resize
            return self.net(x)
    torch.jit.script(Script()).save(str(folder / "script.pt"))
    return folder


@pytest.mark.filterwarnings("ignore")            # torch.jit is deprecated, and the published file is in its format
def test_i3d_rows_of_every_file_agree(i3d_files, i3d_golden):
    for name, says in (("ours.pt", "eps 0.001"), ("other.safetensors", "eps 0.001"), ("script.pt", "TorchScript")):
        extractor = metrics.I3DRows(str(i3d_files / name), trust=name == "script.pt")
        rows = extractor(golden_clip())
        assert rows.shape == (1, 400) and rows[0, :16].tolist() == pytest.approx(i3d_golden["logits"]["preprocess_then_loop16"], **close)
        assert says in extractor.says(8, 64) and "8 -> 16 loop" in extractor.says(8, 64)
    other = metrics.I3DRows(str(i3d_files / "ours.pt"), eps=1e-5)
    change = np.linalg.norm(other(golden_clip()) - rows) / np.linalg.norm(rows)
    assert 1e-3 < change < 0.05 and other.key != metrics.I3DRows(str(i3d_files / "ours.pt")).key
    with pytest.raises(data.UserError, match="--i3d-eps 1e-05: .*TorchScript"):
        metrics.I3DRows(str(i3d_files / "script.pt"), eps=1e-5, trust=True)
    with pytest.raises(data.UserError, match="holds code; add --i3d-trust"):
        metrics.I3DRows(str(i3d_files / "script.pt"))


def test_wrong_weights_are_refused_with_keys_and_shapes(tmp_path, i3d_weights):
    def refused(weights, *words, name="w.pt"):
        torch.save(weights, tmp_path / name)
        with pytest.raises(data.UserError) as error:
            metrics.I3DRows(str(tmp_path / name))
        for word in ("--i3d", name, *words):
            assert word in str(error.value)
    refused({"a": torch.zeros(2), "b": torch.zeros(3)}, "not the weights of I3D", "missing 287", "unknown 2 (a, b)")
    refused({k: v for k, v in i3d_weights.items() if k != "logits.conv3d.bias"}, "missing 1 (logits.conv3d.bias)")
    refused({**i3d_weights, "logits.conv3d.bias": torch.zeros(600)}, "of another shape 1 (logits.conv3d.bias (600,) instead of (400,))")
    refused([1, 2], "holds no weights by name")
    refused({"step": 3}, "holds no weights by name")
    refused(Path("x"), "cannot be read as weights", "UnpicklingError")           # code is not executed
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(data.UserError, match="--i3d .*text.pt: cannot be read as weights"):
        metrics.I3DRows(str(tmp_path / "text.pt"))
    with pytest.raises(data.UserError, match="--i3d nowhere.pt: no such file"):
        metrics.I3DRows("nowhere.pt")
    without_counters = {k: v for k, v in i3d_weights.items() if "num_batches" not in k}
    torch.save({"state_dict": without_counters}, tmp_path / "nested.pt")
    metrics.I3DRows(str(tmp_path / "nested.pt"))


# ---- CLIP

def test_clip_rows(clip_folder):
    import open_clip
    extractor = metrics.CLIPRows(str(clip_folder), T=3)
    clips = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16, 3), np.uint8)
    rows, texts = extractor(clips), extractor.texts(["a red star", "a frog"])
    assert rows.shape == (2, 3 * 32) and texts.shape == (2, 32) and extractor.width == 96
    assert np.allclose(np.linalg.norm(rows.reshape(2, 3, 32), axis=-1), 1, atol=1e-5) and np.allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-5)
    net, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}", weights_only=True)
    expected = net.eval().encode_image(prepare(data.Image.fromarray(clips[1, 2]))[None], normalize=True).detach().numpy()[0]
    assert np.allclose(rows[1, 64:], expected, atol=1e-5)
    assert metrics.file_hash(clip_folder / "open_clip_pytorch_model.bin")[:12] in extractor.says(3, 16)


def test_clip_refuses_other_files(clip_folder, tmp_path, i3d_weights):
    torch.save(i3d_weights, tmp_path / "i3d.pt")
    for path, name, culprit in ((tmp_path / "i3d.pt", "ViT-B-32", "(?s)not the weights of ViT-B-32.*Missing key"), (tmp_path / "i3d.pt", "ViT-X", "--clip-model ViT-X"),
                                (tmp_path, "ViT-B-32", "without open_clip_config"), ("nowhere.bin", "ViT-B-32", "no such file")):
        with pytest.raises(data.UserError, match=culprit):
            metrics.CLIPRows(str(path), name)


def test_clip_scores_by_hand():
    text = np.eye(4)[:3]
    frames = np.stack([np.eye(4)[[0, 0]], np.eye(4)[[1, 3]], np.eye(4)[[0, 0]]])               # right and still; half right; another's
    scores = metrics.clip_scores(text, frames, first_given=True)
    assert scores["CLIP"].tolist() == [1, 0.5, 0] and scores["CLIP shuffled"].tolist() == [0, 0, 1]
    assert scores["CLIP R@1"].tolist() == [0.5, 1, 1 / 3] and scores["CLIP consistency"].tolist() == scores["CLIP image"].tolist() == [1, 0, 1]
    assert "CLIP image" not in metrics.clip_scores(text, frames)


def test_recall_shares_ties():
    assert metrics.recall(np.array([[3, 1, 0], [2, 2, 2], [0, 5, 4]])).tolist() == [1, 1 / 3, 0]
    assert metrics.recall(np.ones((4, 4)) + 1e-8 * np.arange(4)).tolist() == [0.25] * 4            # rounding is no rank


# ---- DOVER

DOVER_GOLDEN = json.loads((GOLDEN / "dover.json").read_text())


@pytest.fixture(scope="module")
def dover():
    net = metrics.DOVER()
    return metrics.fit_weights(net, filled(net), "--dover", "golden")


@pytest.fixture(scope="module")
def golden_run(dover):
    """Both scores on the golden input, and the mean and deviation of what the golden stages put out."""
    stages, modules, x = {}, dict(dover.named_modules()), golden_input(32)
    def keep(name):
        return lambda module, given, out: stages.update({name: (out.double().mean().item(), out.double().std(correction=0).item())})
    hooks = [modules[name].register_forward_hook(keep(name)) for name in DOVER_GOLDEN["stages"]]
    with torch.inference_mode():
        scores = dover(x, x)
    for hook in hooks:
        hook.remove()
    return scores, stages


def test_dover_has_the_published_names_and_shapes(dover):
    state = dover.state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == DOVER_GOLDEN["state_dict"] and len(state) == 381
    assert all(v.dtype == (torch.int64 if k.endswith("relative_position_index") else torch.float32) for k, v in state.items())
    assert sum(p.numel() for p in dover.parameters()) == DOVER_GOLDEN["total_params"] == 56218302


def test_dover_golden_scores(golden_run):
    assert all(score.shape == (1,) for score in golden_run[0])
    assert [score.item() for score in golden_run[0]] == pytest.approx(DOVER_GOLDEN["scores"], abs=1e-4)


@pytest.mark.parametrize("name", DOVER_GOLDEN["stages"])
def test_dover_golden_stages(golden_run, name):
    """A mean is small beside the deviation and is compared relative to itself all the same."""
    assert golden_run[1][name] == pytest.approx(DOVER_GOLDEN["stages"][name], rel=1e-4)


def test_window_tables_by_hand():
    """56 x 56 tokens: fragments of 8 and windows of 7 tokens; windows of the last row and column hold both ends after a shift."""
    gate, apart = metrics.window_tables((16, 56, 56), (0, 0, 0), torch.device("cpu"))
    assert gate.shape == apart.shape == (128, 392, 392) and not apart.any()
    assert gate[0].max() == 0 and gate[9, 0, -1] == 2 and gate.max() == 2      # window (0, 1, 1) holds tokens 7..13 of both axes
    gate, apart = metrics.window_tables((16, 56, 56), (4, 3, 3), torch.device("cpu"))
    assert gate.max() == 12 and not apart[0].any() and not apart[54].any()     # (0, 6, 6): nothing wrapped
    assert apart[64].any() and apart[7].any() and apart[56].any() and (gate[7] == 6).any()
    assert metrics.window_tables((16, 7, 7), (4, 0, 0), torch.device("cpu"))[1].sum() == 2 * 196 * 196


# ---- frames and views

@pytest.mark.parametrize("name", DOVER_GOLDEN["sampler"])
def test_sampler_golden(name):
    for branch, segments, frames in (("technical", 3, 32), ("aesthetic", 32, 1)):
        indices, room = metrics.dover_indices(int(name[1:]), segments, frames)
        expected = DOVER_GOLDEN["sampler"][name][branch]
        assert indices.shape == (segments, frames) and indices.ravel().tolist() == expected["indices"]
        assert (room, len(np.unique(indices))) == (expected["room"], expected["distinct"])


@pytest.mark.parametrize("shape, after, said", [
    ((8, 64, 64), (32, 224, 224), "8 frames, each repeated 4 times, 64 -> 224 px"),
    ((16, 224, 224), (32, 224, 224), "16 frames, each repeated 2 times, 224 px"),
    ((20, 48, 64), (40, 224, 299), "20 frames, each repeated 2 times, 48 x 64 -> 224 x 299 px"),
    ((3, 300, 256), (33, 300, 256), "3 frames, each repeated 11 times, 300 x 256 px"),
    ((33, 256, 256), (33, 256, 256), "33 frames, 256 px")])
def test_frames_are_repeated_and_enlarged(shape, after, said):
    clip = np.random.default_rng(0).integers(256, size=(*shape, 3), dtype=np.uint8)
    frames, words = metrics.dover_frames(clip)
    times = after[0] // shape[0]
    assert frames.shape == (*after, 3) and frames.dtype == np.uint8 and words == said
    assert all((frames[k * times + j] == frames[k * times]).all() for k in range(shape[0]) for j in range(times))
    assert after[1:] != shape[1:] or (frames[::times] == clip).all()
    assert (metrics.dover_frames(frames)[0] == frames).all()


def test_enlarged_pixels_are_bilinear_and_rounded():
    row = np.array([0, 100], np.uint8).reshape(1, 1, 2, 1).repeat(3, -1)
    assert metrics.resize_clip(row, (1, 8))[0, 0, :, 0].tolist() == [0, 0, 12, 38, 62, 88, 100, 100]      # 12.5, 37.5, 62.5, 87.5 to even
    ramp = np.array([0, 10, 20, 90, 0, 50, 60, 0], np.uint8).reshape(1, 1, 8, 1)
    assert metrics.resize_clip(ramp, (1, 2))[0, 0, :, 0].tolist() == [15, 55]       # no antialias: of 4 pixels the middle two


@pytest.mark.parametrize("clip", [np.zeros((8, 64, 64, 3), np.float32), np.zeros((8, 64, 64, 4), np.uint8), np.zeros((64, 64, 3), np.uint8),
                                  np.zeros((0, 64, 64, 3), np.uint8)])
def test_bad_clips_are_refused(clip):
    with pytest.raises(ValueError, match="uint8"):
        metrics.dover_frames(clip)


def test_fragments_are_whole_patches_of_their_cells():
    place = np.stack(np.meshgrid(np.arange(4), np.arange(350), np.arange(434), indexing="ij"), -1)
    cut = metrics.fragments(place, np.random.default_rng(0))
    patches = cut.reshape(4, 7, 32, 7, 32, 3).transpose(1, 3, 0, 2, 4, 5)      # cell row, cell column, t, y, x
    corners = patches[:, :, 0, 0, 0]
    for i, j in np.ndindex(7, 7):
        _, y, x = corners[i, j]
        assert (patches[i, j] == place[:, y:y + 32, x:x + 32]).all() and 50 * i <= y < 50 * i + 18 and 62 * j <= x < 62 * j + 30
    assert len(np.unique(corners[..., 1] - 50 * np.arange(7)[:, None])) > 5


def test_views_are_normalised_and_seeded():
    clip = np.random.default_rng(0).integers(256, size=(200, 260, 240, 3), dtype=np.uint8)
    views = [metrics.dover_views(clip, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert [v.shape for v in views[0]] == [(3, 3, 32, 224, 224), (1, 3, 32, 224, 224)] and all(v.dtype == torch.float32 for v in views[0])
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in zip(*views))
    small = np.full((8, 64, 64, 3), (0, 128, 255), np.uint8)
    for view in metrics.dover_views(small, np.random.default_rng(0)):
        for extreme in (view.amin, view.amax):
            assert extreme((0, 2, 3, 4)).tolist() == pytest.approx([-2.117904, 0.205182, 2.64], abs=1e-4)


def test_all_frames_of_a_short_clip_are_seen():
    clip = np.repeat(np.arange(8, dtype=np.uint8) * 10, 64 * 64 * 3).reshape(8, 64, 64, 3)
    technical, aesthetic = metrics.dover_views(clip, np.random.default_rng(0))
    frames = lambda view: (view[:, 0, :, 0, 0] * 58.395 + 123.675).div(10).round().int().tolist()
    assert frames(aesthetic) == [np.repeat(range(8), 4).tolist()] and frames(technical)[0] == np.repeat(range(8), 2).tolist() * 2
    assert technical.var((-2, -1)).max() == 0                                  # patches of the whole frame, and none of padding


# ---- scores

@pytest.mark.parametrize("technical, aesthetic, expected", [(t, a, rest) for t, a, *rest in DOVER_GOLDEN["fusion"]])
def test_fusion_golden(technical, aesthetic, expected):
    assert list(metrics.dover_fuse(technical, aesthetic).values()) == pytest.approx(expected, abs=1e-9)
    assert list(metrics.dover_fuse(1e3, -1e3).values())[1:] == [1, 0]          # no overflow


def test_dover_rows_are_the_mean_of_three_views_and_seeded(dover, tmp_path, monkeypatch):
    torch.save(dover.state_dict(), tmp_path / "DOVER.pth")
    monkeypatch.setattr(metrics.DOVER, "technical", lambda self, x: x[:, :, :, ::7, ::7].mean((1, 2, 3, 4)))    # seconds of work, tested above
    monkeypatch.setattr(metrics.DOVER, "aesthetic", lambda self, x: x[:, :, ::5].mean((1, 2, 3, 4)))
    rows = {seed: metrics.DOVERRows(str(tmp_path / "DOVER.pth"), seed) for seed in (5, 6)}
    clip = np.random.default_rng(0).integers(256, size=(100, 300, 300, 3), dtype=np.uint8)
    technical, aesthetic = metrics.dover_views(clip, np.random.default_rng(5))
    got = rows[5](clip[None])
    assert got.shape == (1, 2) and got[0] == pytest.approx([technical[:, :, :, ::7, ::7].mean().item(), aesthetic[:, :, ::5].mean().item()], abs=1e-6)
    assert (got == rows[5](clip[None])).all() and (got != rows[6](clip[None])).any() and rows[5].key != rows[6].key
    assert "8 frames, each repeated 4 times, 64 -> 224 px" in rows[5].says(8, 64)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(data.UserError, match="--dover .*other.pth: not the weights of DOVER: missing 381 .*unknown 1"):
        metrics.DOVERRows(str(tmp_path / "other.pth"))


# ---- R@1-local

@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """240 synthetic stickers of 32 px, a judge fitted to the training split, and (captions, clips) of combinations that it never saw."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("judge") / "set"
    data.main(["synthetic", "--n", "240", "--size", "32", "--out", str(out), "--workers", "1"])
    train = data.StickerSet(out, "train")
    judge, report = metrics.fit_judge(train)
    held = [data.StickerSet(out, split) for split in ("val", "test")]
    records = {r["caption"].split(" that")[0]: (s, r) for s in held for r in s.records if r["n"] >= 4}
    clips = torch.cat([signed(s.clip(r, data.even_frames(r["n"], 4))[None]) for s, r in records.values()])
    return train, judge, report, [r["caption"] for _, r in records.values()], clips


def hits(judge, texts, clips):
    return metrics.recall((judge.encode_texts(texts) @ judge.encode_clips(clips).T).numpy()).mean()


def test_judge_tells_new_combinations_and_falls_with_swapped_captions(judged):
    _, judge, report, texts, clips = judged
    n = len(texts)
    assert n >= 10 and report["concepts"] == len(judged[0].concepts) and 0.5 < report["correlations"][0] <= 1
    swapped = [texts[: int(n * s)][1:] + texts[:1] + texts[int(n * s):] if s else texts for s in (0, 0.25, 0.5, 1)]
    values = [hits(judge, t, clips) for t in swapped]
    assert values[0] > 5 / n and values[3] < 0.5 * values[0] and values == sorted(values, reverse=True)


def test_judge_is_a_function_of_set_and_seed(judged):
    train, judge = judged[:2]
    again, _ = metrics.fit_judge(train)
    assert all(torch.equal(a, b) for a, b in zip(judge.state_dict().values(), again.state_dict().values()))


def test_vectors_are_unit_whatever_the_batch_length_and_size(judged):
    _, judge, _, texts, clips = judged
    v, t = judge.encode_clips(clips), judge.encode_texts(texts)
    assert v.shape == (len(clips), 128) and t.shape == (len(texts), 128) and v.dtype == t.dtype == torch.float32
    assert all(torch.allclose(x.norm(dim=1), torch.ones(len(x)), atol=1e-5) for x in (v, t))
    assert torch.allclose(v, judge.encode_clips(clips, batch=3), atol=1e-5)
    assert torch.allclose(v, judge.encode_clips(clips[:, [2, 0, 1, 3]]), atol=1e-5)          # blind to order
    large = F.interpolate(clips[:3].flatten(0, 1), (64, 64), mode="bilinear", antialias=True).unflatten(0, (3, 4))
    assert torch.allclose(v[:3], judge.encode_clips(large), atol=1e-5)
    assert judge.encode_clips(clips[:2, :1]).shape == (2, 128) and torch.isfinite(judge.encode_texts(["", "qwxz"])).all()


def test_judge_comes_back_from_its_file_and_others_are_refused(judged, tmp_path):
    _, judge, report, texts, clips = judged
    path = tmp_path / "judge.safetensors"
    metrics.save_judge(path, judge, set="abc", seed=0, report=report)
    again, metadata = metrics.load_judge(path)
    assert metadata["kind"] == "judge" and metadata["set"] == "abc" and metadata["report"] == report
    assert torch.equal(again.encode_texts(texts), judge.encode_texts(texts)) and torch.equal(again.encode_clips(clips), judge.encode_clips(clips))
    (tmp_path / "text").write_text("no model")
    train.save_model(tmp_path / "vae", dict(a=torch.zeros(1)), kind="vae")
    train.save_model(tmp_path / "old", dict(a=torch.zeros(1)), kind="judge", buckets=8, width=4)
    for name, says in (("nowhere", "no such judge"), ("text", "not a readable"), ("vae", "holds 'vae'"), ("old", "not a judge of this version")):
        with pytest.raises(data.UserError, match=f"{name}: {says}"):
            metrics.load_judge(tmp_path / name)


# ---- NIQE-local

def drawn(kind, n=20, side=96):
    """n images of known noise of deviation 1, (n, side, side)."""
    rng = np.random.default_rng(0)
    draw = dict(gauss=rng.standard_normal, laplace=lambda size: rng.laplace(0, 0.5 ** 0.5, size))[kind]
    return torch.from_numpy(draw((n, side, side)).astype(np.float32))


@pytest.mark.parametrize("kind, shape", [("gauss", 2), ("laplace", 1)])
def test_shape_of_known_noise_is_recovered(kind, shape):
    x = drawn(kind)
    got, middle, low, high = metrics.asymmetric(x, torch.ones_like(x, dtype=torch.bool)).mean(0)
    assert got == pytest.approx(shape, rel=0.05) and abs(middle) < 0.02 and (low, high) == pytest.approx((1, 1), rel=0.05)
    skew = torch.where(x > 0, 2 * x, x)
    got, middle, low, high = metrics.asymmetric(skew, torch.ones_like(x, dtype=torch.bool)).mean(0)
    assert middle > 0.3 and (low, high) == pytest.approx((1, 4), rel=0.05)
    assert metrics.asymmetric(x, x.abs() < 100 + 0 * x)[:, 0] == pytest.approx(metrics.asymmetric(7 * x, x.abs() < 100)[:, 0], rel=1e-3)


def test_white_noise_stays_gaussian_and_flat_frames_are_finite():
    noise = (128 + 25 * drawn("gauss", 4)).clamp(0, 255)
    frames = noise.byte()[:, None, ..., None].expand(-1, -1, -1, -1, 3).numpy()
    f = metrics.niqe_features(frames)
    assert f.shape == (4, 36) and f.dtype == np.float64
    assert 2.5 < f[:, [0, 18]].min() < f[:, [0, 18]].max() < 3.6     # lighter tails than Gauss's: a pixel is part of its own deviation
    flat = metrics.niqe_features(np.full((2, 3, 40, 40, 3), 255, np.uint8))
    assert np.isfinite(flat).all() and set(np.unique(flat)) == {0, 2}
    assert np.allclose(metrics.niqe_features(np.concatenate([frames, frames]), batch=3)[4:], f)


def test_niqe_scores_real_ones_in_the_middle_and_damage_low(judged):
    stickers = judged[0]
    records = [r for r in stickers.records if r["n"] >= 4]
    x = np.stack([stickers.clip(r, data.even_frames(r["n"], 4)) for r in records])
    white = signed(x).movedim(2, -1)
    white = ((white + 1) * 127.5).round().byte().numpy()
    niqe = metrics.NIQE(metrics.niqe_features(white[::2]))
    held = white[1::2]
    rng = np.random.default_rng(0)
    noisy = [np.clip(held + s * rng.standard_normal(held.shape), 0, 255).astype(np.uint8) for s in (4, 10, 25, 60)]
    scores = [niqe.score(metrics.niqe_features(v)).mean() for v in (held, *noisy)]
    distances = [np.median(niqe.distance(metrics.niqe_features(v))) for v in (held, *noisy)]
    assert 0.35 < scores[0] < 0.65 and scores[2] < 0.1 and distances == sorted(distances)


def test_percentile_by_hand():
    assert metrics.percentile(np.array([0, 2, 2.5, 9]), np.array([4.0, 1, 2, 3])).tolist() == [1, 0.625, 0.5, 0]
