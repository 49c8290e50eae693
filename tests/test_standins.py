"""lib/metrics/standins.py: features are fixed, appearance is blind to order, motion is not; damage is distance."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from lib.media.sources import COLOURS, MOTIONS, SHAPES, draw_shape
from lib.metrics.distances import on_white, to_signed
from lib.metrics.standins import APPEARANCE, RandomFeatures, StandinExtractor, fd_app, fd_mot, looped


def shape_clips(n, seed, side=64):
    """n clips of moving shapes on white, (n, 8, side, side, 3) uint8."""
    rng, clips = np.random.default_rng(seed), []
    for _ in range(n):
        shape, colour, motion = (names[rng.integers(len(names))] for names in (SHAPES, COLOURS, MOTIONS))
        clips.append([draw_shape(shape, colour, motion, t / 8, side) for t in range(8)])
    return np.round(on_white(np.array(clips)) * 255).astype(np.uint8)


def test_features_are_fixed_and_appearance_is_blind_to_order():
    x, extract = shape_clips(3, 0), StandinExtractor()
    rows, shuffled = extract(x), extract(x[:, [3, 1, 6, 0, 7, 2, 5, 4]])
    assert rows.shape == (3, extract.width) and rows.dtype == np.float32 and np.isfinite(rows).all()
    assert np.allclose(rows, RandomFeatures()(to_signed(x), batch=2), atol=1e-5)
    published = [0.561745, 0.624714, 0.229212, -2.319324, -0.007235, 0.185566, 0.565572]   # behind all FD-app, FD-mot
    assert np.allclose(rows[1, ::60], published, atol=1e-4)
    assert np.allclose(rows[:, :APPEARANCE], shuffled[:, :APPEARANCE], atol=1e-5)
    assert abs(rows[:, APPEARANCE:] - shuffled[:, APPEARANCE:]).max() > 0.1
    motion = extract(x[:, [0] * 8])[:, APPEARANCE:]
    assert np.allclose(motion[:, :64], np.log(1e-3)) and np.allclose(motion[:, 64:], 0)


def test_a_few_frames_are_shown_over_and_over():
    """Appearance is that of the frames, however often each is shown."""
    x, extract = shape_clips(2, 0), StandinExtractor()
    assert [looped(x[:, :n]).shape[1] for n in (1, 2, 3, 5, 7)] == [5, 6, 6, 5, 7]
    twice = np.concatenate([x[:, :5]] * 2, 1)
    assert np.allclose(extract(twice)[:, :APPEARANCE], extract(x[:, :5])[:, :APPEARANCE], atol=1e-5)
    assert (looped(x[:, :2])[:, 2:4] == x[:, :2]).all()


def test_other_sizes_are_resized_and_short_clips_refused():
    net, large = RandomFeatures(), to_signed(shape_clips(2, 0, 128))
    small = F.interpolate(large.flatten(0, 1), (64, 64), mode="bilinear", antialias=True).unflatten(0, (2, 8))
    assert torch.allclose(net(large), net(small)) and net(small[:, :5]).isfinite().all()
    with pytest.raises(ValueError, match="at least 5"):
        net(small[:, :4])


def test_distances_grow_with_damage():
    x, extract = shape_clips(40, 2), lambda clips: StandinExtractor()(clips).astype(float)
    noise = np.random.default_rng(0).standard_normal(x.shape, np.float32)
    noisy = [(x + s * noise).clip(0, 255).astype(np.uint8) for s in (13, 50)]
    blurred = [gaussian_filter(x, (0, 0, s, s, 0)) for s in (1, 4)]
    reference, rows = extract(shape_clips(40, 1)), extract(x)
    for little, much in (noisy, blurred):
        little, much = extract(little), extract(much)
        for distance in (fd_app, fd_mot):
            assert distance(reference, rows) < distance(reference, little) < distance(reference, much)
    assert fd_mot(reference, extract(x[:, [0] * 8])) > 5 * fd_mot(reference, rows)
