"""lib/metrics/distances.py: Fréchet distances by independent values, intervals that cover, the extrapolation, PSNR."""
import numpy as np
import pytest
from test_i3d import hash01

from lib.metrics import distances
from lib.metrics.distances import bootstrap, bootstrap_fd, extrapolate, fd, frechet


def golden_features(n, d, key, shift=0.0):
    k = np.arange(d)
    noise = np.sqrt(12) * (hash01(n * d, key).reshape(n, d) - 0.5)
    return noise * (1 + 0.5 * np.sin(0.1 * k)) + shift * np.cos(0.05 * k)


@pytest.mark.parametrize("n, m, d, expected", [
    (500, 500, 64, 6.978903834329), (64, 64, 400, 607.3882363534), (60, 90, 400, 594.8342215425),
    (256, 256, 400, 307.5384180609), (2048, 2048, 400, 55.7314352660)])
def test_frechet_golden(n, m, d, expected):
    """Computed independently as sqrtm, by eigenvalues and as a nuclear norm, which agree to 1e-7 (singular: 3e-8)."""
    a, b = golden_features(n, d, "A"), golden_features(m, d, "B", 0.3)
    assert [frechet(a, b), frechet(b, a)] == pytest.approx([expected] * 2, rel=1e-9)
    assert frechet(a, a) == pytest.approx(0, abs=1e-8)


def test_frechet_by_hand():
    a = np.random.default_rng(0).standard_normal((50, 8))
    assert frechet(a, a + 2) == pytest.approx(8 * 4)
    assert frechet(a, np.stack([a.mean(0)] * 9)) == pytest.approx(a.var(0, ddof=1).sum())
    with pytest.raises(ValueError, match="at least 2"):
        frechet(a, a[:1])


def test_standardise_keeps_constant_and_nearly_constant_features_small():
    a = np.random.default_rng(0).standard_normal((40, 6))
    a[:, 0], a[:, 1] = 0.1, 1e-7 * a[:, 1]
    x, y = distances.standardise(a, a + [1, 1e-3, 1, 0, 0, 0])
    assert np.allclose(x.mean(0), 0) and np.allclose(x[:, 2:].std(0), 1)
    assert y[0, 0] == pytest.approx(1) and abs(y[:, 1]).max() < 0.1
    assert fd(a, a) == pytest.approx(0, abs=1e-9)


def test_bootstrap_covers_the_known_mean():
    sets = np.random.default_rng(0).normal(3, 2, (200, 40))
    low, high = np.array([bootstrap(x, draws=500, seed=i) for i, x in enumerate(sets)]).T
    assert 0.88 < ((low < 3) & (3 < high)).mean() < 0.99
    assert (high - low).mean() == pytest.approx(2 * 1.96 * 2 / 40**0.5, rel=0.1)
    assert bootstrap(sets[0], seed=1) == bootstrap(sets[0], seed=1) != bootstrap(sets[0], seed=2)


def test_bootstrap_of_distances_is_of_this_n():
    """The interval holds the mean distance of sets of this size, which resampled sets overshoot."""
    pairs = np.random.default_rng(0).standard_normal((40, 2, 20, 30))
    expected = np.mean([fd(*pair) for pair in pairs])
    low, high = np.array([bootstrap_fd(*pair, draws=60) for pair in pairs]).T
    assert ((low < expected) & (expected < high)).mean() > 0.85
    x = pairs[0, 0]
    assert bootstrap_fd(x, x, draws=20, paired=True) == pytest.approx((0, 0), abs=1e-9)


def test_extrapolation_is_near_the_truth_and_knows_its_error():
    rng, results = np.random.default_rng(0), []
    for _ in range(6):
        a, b = rng.standard_normal((2, 256, 16))
        results.append((frechet(a, b + 0.3), *extrapolate(a, b + 0.3)))
    bare, value, error = np.array(results).T
    truth = 16 * 0.3**2                                                      # the bare distance is half as large again
    assert bare.mean() > 1.9 and value.mean() == pytest.approx(truth, abs=0.25)
    assert abs(value - truth).max() < 3 * error.mean() and 0.1 < error.mean() < 1
    with pytest.raises(ValueError, match="at least 32"):
        extrapolate(a[:31], b)


def test_psnr_and_what_networks_see_by_hand():
    x = np.zeros((3, 2, 4, 4, 3), np.float32)
    y = x + np.array([0.1, 0.5, 0], np.float32).reshape(3, 1, 1, 1, 1)
    assert distances.psnr((x - y) ** 2) == pytest.approx(-10 * np.log10(0.26 / 3), abs=1e-4)
    assert distances.psnr(0 * x) == distances.PSNR_CAP
    rgba = np.array([[[0, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 51]]], np.uint8)
    assert distances.on_white(rgba)[0].ravel().tolist() == pytest.approx([1, 1, 1, 1, 0, 0, 0.8, 0.8, 0.8])
    x = distances.to_signed(np.array([0, 255, 102], np.uint8).reshape(1, 1, 1, 1, 3))
    assert x.shape == (1, 1, 3, 1, 1) and x.flatten().tolist() == pytest.approx([-1, 1, -0.2])


def test_differences_are_paired_by_clip_and_over_runs():
    rng = np.random.default_rng(0)
    hard = rng.standard_normal(40)                                           # how hard each concept is

    def row(*offsets):
        return [distances.by_clips(dict(scores=dict(loss=dict(clips=hard + x + 0.01 * rng.standard_normal(40)),
                                                    known=dict(clips=hard[:37] + x),  # the judge lacks three concepts
                                                    same=dict(clips=-hard))), {}) for x in offsets]
    found = distances.differences({"A": row(0), "B": row(0.3), "C": row(0, 0.6)}, 40, 0)
    assert set(found) == {"B - A", "C - A"}
    for name, least, most in (("B - A", 0, 0.02), ("C - A", 0.5, 0.7)):      # runs that differ widen it
        low, high = found[name]["loss"]["interval"]
        assert found[name]["loss"]["value"] == pytest.approx(0.3, abs=0.02)
        assert low < 0.3 < high and least < high - low < most
    assert found["B - A"]["known"]["value"] == pytest.approx(0.3)
    assert found["B - A"]["same"] == dict(value=0, interval=(0, 0))
    seeds = distances.differences({"A": row(0, 1, 2), "B": row(0.3, 1.3, 2.3)}, 40, 0)["B - A"]["loss"]
    assert seeds["value"] == pytest.approx(0.3, abs=0.02) and np.ptp(seeds["interval"]) < 0.05   # seed by seed


def test_distances_of_many_draws_are_those_of_each():
    a, b = np.random.default_rng(0).standard_normal((2, 3, 12, 8)) + 0.5
    for few in (slice(None), slice(5)):                                      # more samples than features, and fewer
        for distance in (frechet, fd):
            assert distance(a[:, few], b[:, few]) == pytest.approx([distance(*x) for x in zip(a[:, few], b[:, few])])


def test_difference_of_distances():
    rng = np.random.default_rng(0)
    real = rng.standard_normal((60, 4))
    near, far = ([distances.by_clips(dict(scores={}), {"FD": (fd, real, real + x)})] for x in (0.1, 1.0))
    found = distances.differences({"near": near, "far": far}, 60, 0)["far - near"]["FD"]
    assert found["value"] == pytest.approx(fd(real, real + 1) - fd(real, real + 0.1))
    assert found["interval"][0] > 0.5 * found["value"]


def test_intervals_of_ratios_are_paired():
    rng = np.random.default_rng(0)
    hard = rng.gamma(2, 1, 50)
    found = distances.paired_interval(distances.ratio, 0.8 * hard + 0.01 * rng.standard_normal(50), hard)
    assert found["value"] == pytest.approx(0.8, abs=0.01) and found["interval"][0] < 0.8 < found["interval"][1]
    assert np.ptp(found["interval"]) < 0.02                                  # the means alone vary by a tenth
    assert np.ptp(distances.paired_interval(np.mean, hard)["interval"]) == pytest.approx(
        2 * 1.96 * hard.std() / 50 ** 0.5, rel=0.1)
