"""lib/metrics/dover.py: golden scores, stages, sampler and fusion; frames, fragments and views."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_i3d import filled, golden_input

from lib.metrics import dover
from lib.metrics.dover import DOVER, DOVERExtractor
from lib.nets.weights import load_strict

GOLDEN = json.loads((Path(__file__).with_name("golden") / "dover.json").read_text())


@pytest.fixture(scope="module")
def net():
    return load_strict(DOVER(), filled(DOVER()), "--dover", "golden")


def test_golden_names_scores_and_stages(net):
    """A mean is small beside the deviation and is compared relative to itself all the same."""
    state, stages, modules, x = net.state_dict(), {}, dict(net.named_modules()), golden_input(32)
    assert {k: list(v.shape) for k, v in state.items()} == GOLDEN["state_dict"] and len(state) == 381
    assert all(k.endswith("relative_position_index") == (v.dtype == torch.int64) for k, v in state.items())
    assert sum(p.numel() for p in net.parameters()) == GOLDEN["total_params"] == 56218302

    def keep(name):
        return lambda _, __, y: stages.update({name: (y.double().mean().item(), y.double().std(correction=0).item())})
    for name in GOLDEN["stages"]:
        modules[name].register_forward_hook(keep(name))
    with torch.inference_mode():
        scores = torch.stack([net.technical(x), net.aesthetic(x)])
    assert scores.flatten().tolist() == pytest.approx(GOLDEN["scores"], abs=1e-4) and scores.shape == (2, 1)
    for name, expected in GOLDEN["stages"].items():
        assert stages[name] == pytest.approx(expected, rel=1e-4), name


@pytest.mark.parametrize("name", GOLDEN["sampler"])
def test_sampler_golden(name):
    for branch, segments, frames in (("technical", 3, 32), ("aesthetic", 32, 1)):
        indices, room = dover.dover_indices(int(name[1:]), segments, frames)
        expected = GOLDEN["sampler"][name][branch]
        assert indices.shape == (segments, frames) and indices.ravel().tolist() == expected["indices"]
        assert (room, len(np.unique(indices))) == (expected["room"], expected["distinct"])


@pytest.mark.parametrize("shape, after, expected", [
    ((8, 64, 64), (32, 224, 224), "8 frames, each repeated 4 times, 64 -> 224 px"),
    ((20, 48, 64), (40, 224, 299), "20 frames, each repeated 2 times, 48 x 64 -> 224 x 299 px"),
    ((3, 300, 256), (33, 300, 256), "3 frames, each repeated 11 times, 300 x 256 px"),
    ((33, 256, 256), (33, 256, 256), "33 frames, 256 px")])
def test_frames_are_repeated_and_enlarged(shape, after, expected):
    clip = np.random.default_rng(0).integers(256, size=(*shape, 3), dtype=np.uint8)
    frames, words = dover.dover_frames(clip)
    times = after[0] // shape[0]
    assert frames.shape == (*after, 3) and frames.dtype == np.uint8 and words == expected
    assert (frames == np.repeat(frames[::times], times, 0)).all()
    assert after[1:] != shape[1:] or (frames[::times] == clip).all()
    with pytest.raises(ValueError, match="uint8"):
        dover.dover_frames(clip.astype(np.float32))


def test_enlarged_pixels_are_bilinear_and_rounded():
    row = np.array([0, 100], np.uint8).reshape(1, 1, 2, 1).repeat(3, -1)     # 12.5, 37.5, 62.5, 87.5 go to the even one
    assert dover.resize_clip(row, (1, 8))[0, 0, :, 0].tolist() == [0, 0, 12, 38, 62, 88, 100, 100]
    ramp = np.array([0, 10, 20, 90, 0, 50, 60, 0], np.uint8).reshape(1, 1, 8, 1)
    assert dover.resize_clip(ramp, (1, 2))[0, 0, :, 0].tolist() == [15, 55]  # no antialias: of 4 pixels the middle two


def test_fragments_are_whole_patches_of_their_cells():
    place = np.stack(np.meshgrid(np.arange(4), np.arange(350), np.arange(434), indexing="ij"), -1)
    cut = dover.fragments(place, np.random.default_rng(0))
    patches = cut.reshape(4, 7, 32, 7, 32, 3).transpose(1, 3, 0, 2, 4, 5)    # cell row, cell column, t, y, x
    corners = patches[:, :, 0, 0, 0]
    for i, j in np.ndindex(7, 7):
        _, y, x = corners[i, j]
        assert (patches[i, j] == place[:, y:y + 32, x:x + 32]).all()
        assert 50 * i <= y < 50 * i + 18 and 62 * j <= x < 62 * j + 30
    assert len(np.unique(corners[..., 1] - 50 * np.arange(7)[:, None])) > 5


def test_views_are_normalised_and_show_all_frames_of_a_short_clip():
    for view in dover.dover_views(np.full((8, 64, 64, 3), (0, 128, 255), np.uint8), np.random.default_rng(0)):
        for extreme in (view.amin, view.amax):
            assert extreme((0, 2, 3, 4)).tolist() == pytest.approx([-2.117904, 0.205182, 2.64], abs=1e-4)
    clip = np.repeat(np.arange(8, dtype=np.uint8) * 10, 64 * 64 * 3).reshape(8, 64, 64, 3)
    technical, aesthetic = dover.dover_views(clip, np.random.default_rng(0))
    frames = lambda view: (view[:, 0, :, 0, 0] * 58.395 + 123.675).div(10).round().int().tolist()
    assert frames(aesthetic) == [np.repeat(range(8), 4).tolist()]
    assert frames(technical)[0] == np.repeat(range(8), 2).tolist() * 2
    assert technical.var((-2, -1)).max() == 0    # patches of the whole frame, and none of padding


@pytest.mark.parametrize("technical, aesthetic, expected", [(t, a, scores) for t, a, *scores in GOLDEN["fusion"]])
def test_fusion_golden(technical, aesthetic, expected):
    assert list(dover.dover_fuse(technical, aesthetic).values()) == pytest.approx(expected, abs=1e-9)
    assert list(dover.dover_fuse(1e3, -1e3).values())[1:] == [1, 0]          # no overflow


def test_rows_are_the_mean_of_three_views_and_seeded(net, tmp_path, monkeypatch):
    torch.save(net.state_dict(), tmp_path / "DOVER.pth")
    branches = dict(technical=lambda self, x: x[:, :, :, ::7, ::7].mean((1, 2, 3, 4)),
                    aesthetic=lambda self, x: x[:, :, ::5].mean((1, 2, 3, 4)))
    for name, branch in branches.items():        # the networks take seconds and are tested above
        monkeypatch.setattr(DOVER, name, branch)
    five, six = (DOVERExtractor(str(tmp_path / "DOVER.pth"), seed) for seed in (5, 6))
    clip = np.random.default_rng(0).integers(256, size=(200, 260, 260, 3), dtype=np.uint8)
    technical, aesthetic = dover.dover_views(clip, np.random.default_rng(5))
    assert (technical.shape, aesthetic.shape) == ((3, 3, 32, 224, 224), (1, 3, 32, 224, 224))
    rows, means = five(clip[None]), [technical[:, :, :, ::7, ::7].mean().item(), aesthetic[:, :, ::5].mean().item()]
    assert rows.shape == (1, 2) and rows[0] == pytest.approx(means, abs=1e-6)
    assert (rows == five(clip[None])).all() and (rows != six(clip[None])).all() and five.key != six.key
    assert "8 frames, each repeated 4 times, 64 -> 224 px" in five.describe(8, 64)
