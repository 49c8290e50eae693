"""lib/metrics/i3d.py: golden values at every length, preprocessing, the three forms of its weights.

Golden networks are filled by a hash of their parameters' names, so that no published weights are needed; the values are
those of public implementations with the same filling."""
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lib.metrics.i3d import I3D, I3DExtractor, extend, i3d_input
from lib.nets.weights import load_strict
from lib.run.files import UserError

GOLDEN = json.loads((Path(__file__).with_name("golden") / "i3d.json").read_text())


def hash01(n, key):
    """n numbers in [0, 1) by a 32-bit integer hash, the same on every machine."""
    x = (np.arange(n, dtype=np.uint64) * 0x9E3779B1 + zlib.crc32(key.encode())) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ x >> shift) * factor) & 0xFFFFFFFF
    return (x ^ x >> 16) / 2**32


def fill(key, old):
    """One tensor of a state dict by the recipe of the golden values."""
    if not old.is_floating_point():
        return old
    u, shape = hash01(old.numel(), key).reshape(old.shape), old.shape
    values = dict(running_var=0.5 + u, running_mean=0.2 * (u - 0.5), gamma=0.1 + 0.2 * u, position_bias_table=u - 0.5,
                  bias=0.2 * (u - 0.5))
    weight = 0.75 + 0.5 * u if len(shape) == 1 else (2 * u - 1) * np.sqrt(6 / np.prod(shape[1:]))
    value = next((v for ending, v in values.items() if key.endswith(ending)), weight)
    return torch.from_numpy(np.asarray(value)).float()


def filled(net):
    return {key: fill(key, value) for key, value in net.state_dict().items()}


def golden_input(T, S=224):
    """(1, 3, T, S, S) float32: a wave that moves, and noise."""
    _, c, t, h, w = np.ogrid[:1, :3, :T, :S, :S]
    wave = np.sin(0.11 * h + 0.7 * c + 0.3 * t) * np.cos(0.07 * w - 0.2 * t)
    u = hash01(3 * T * S * S, "input").reshape(1, 3, T, S, S)
    return torch.from_numpy(0.6 * wave + 0.4 * (2 * u - 1)).float()


CLIP = np.floor(256 * hash01(8 * 64 * 64 * 3, "u8")).astype(np.uint8).reshape(1, 8, 64, 64, 3)


def near(expected):
    return pytest.approx(expected, rel=1e-3, abs=2e-3)


@pytest.fixture(scope="module")
def weights():
    return filled(I3D())


@pytest.fixture(scope="module")
def net(weights):
    return load_strict(I3D(), weights, "--i3d", "golden")


@torch.no_grad()
def test_golden_size_names_end_points_and_logits(weights):
    net, seen = load_strict(I3D(), weights, "--i3d", "golden"), {}
    assert sum(p.numel() for p in net.parameters()) == GOLDEN["counts"]["parameters"] == 12_697_264
    assert len(net.state_dict()) == GOLDEN["counts"]["state_dict_entries"] == 344
    assert set(net.state_dict()) == set(GOLDEN["hassony2_key_map"].values())
    for name, module in net.named_children():
        module.register_forward_hook(lambda _, __, y, name=name: seen.update({name: y.clone()}))
    y = net(golden_input(16))
    seen["logits_map"] = seen.pop("logits")
    assert y[0].tolist() == near(GOLDEN["logits_16_eps1e-3"])
    assert seen["avg_pool"].flatten()[:32].tolist() == near(GOLDEN["pooled1024_16_eps1e-3_first32"])
    for name, (shape, mean, std) in GOLDEN["endpoints"].items():
        x = seen[name].double()
        assert list(x.shape) == shape, name
        assert [float(x.mean()), float(x.std(correction=0))] == pytest.approx([mean, std], rel=1e-4), name
    assert abs(net.fold()(golden_input(16)) - y).max() < 1e-4


EXTENDED = dict(loop_twice_to_16=extend(8), pingpong_to_16=extend(8, "pingpong"),
                each_frame_twice_to_16=extend(8, "hold"), repeat_last_to_16=extend(8, "pad"),
                repeat_last_to_9=extend(8, "pad", 9))


@torch.no_grad()
@pytest.mark.parametrize("name", ["T9", "T10", "T12", "trilinear_to_16", *EXTENDED])
def test_golden_lengths_and_eight_frames(net, name):
    x = golden_input(int(name[1:]) if name[0] == "T" else 8)
    if name == "trilinear_to_16":
        x = F.interpolate(x, (16, 224, 224), mode="trilinear")
    assert net(x[:, :, EXTENDED.get(name, slice(None))])[0, :16].tolist() == near(GOLDEN["logits"][name])


def test_preprocessing():
    expected, x = GOLDEN["preprocess_64_to_224"], i3d_input(CLIP)
    assert CLIP.ravel()[:12].tolist() == expected["u8_first12"]
    assert x.shape == (1, 3, 16, 224, 224) and torch.equal(x[:, :, :8], x[:, :, 8:])
    assert [float(x.mean()), float(x.std())] == pytest.approx([expected["mean"], expected["std"]], rel=1e-4, abs=1e-6)
    assert x[0, 0, 0, 0, :8].tolist() == pytest.approx(expected["c0t0_row0_first8"], abs=1e-5)
    assert x[0, 2, 7, 223, -4:].tolist() == pytest.approx(expected["c2t7_row223_last4"], abs=1e-5)


@pytest.mark.parametrize("naming", ["ours", "hassony2"])
def test_files_of_both_namings_agree_and_eps_matters(weights, naming, tmp_path):
    if naming == "hassony2":
        weights = {new: weights[old].clone() for new, old in GOLDEN["hassony2_key_map"].items()}
    save_file(weights, tmp_path / "i3d.safetensors")
    plain, other = (I3DExtractor(str(tmp_path / "i3d.safetensors"), eps) for eps in (None, 1e-5))
    a, b = plain(CLIP), other(CLIP)
    assert a.shape == (1, plain.width) and a.dtype == np.float32
    assert a[0, :16].tolist() == near(GOLDEN["logits"]["preprocess_then_loop16"])
    assert 1e-3 < np.linalg.norm(a - b) / np.linalg.norm(a) < 0.05 and plain.key != other.key
    assert all(word in plain.describe(8, 64) for word in ("eps 0.001", "8 -> 16 loop"))


class Script(torch.nn.Module):
    """Called like i3d_torchscript.pt; in place of logits, its input."""

    def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = False):
        assert return_features and not rescale and not resize
        return x.flatten(1)[:, :400]


@pytest.mark.filterwarnings("ignore")            # torch.jit is deprecated, and the published file is in its format
def test_torchscript_is_run_where_it_is_trusted(tmp_path):
    file = str(tmp_path / "script.pt")
    torch.jit.script(Script()).save(file)
    trusted = I3DExtractor(file, trust=True)
    assert np.array_equal(trusted(CLIP), i3d_input(CLIP).flatten(1)[:, :400])
    assert "TorchScript" in trusted.describe(8, 64)
    with pytest.raises(UserError, match="holds code; add --i3d-trust"):
        I3DExtractor(file)
    with pytest.raises(UserError, match="--i3d-eps 1e-05: .*TorchScript"):
        I3DExtractor(file, eps=1e-5, trust=True)
