"""curriculum.py: the weights as documented, the score by hand, and a state that goes on as if never stopped."""
import json

import numpy as np
import pytest
from PIL import Image

import curriculum
from curriculum import Curriculum, simulate
from data import TASKS, unknown_share
from lib.run.files import UserError


def feed(c, values):
    """Make the curriculum see these values: every loss is the first of its cell, or the cell's mean is 1."""
    c.normalise = lambda losses, tasks, deciles: losses
    for value in values:
        c.observe([value], [0], [0])


def test_weights_by_hand():
    easy = np.array([0.1, 0.1, 0.1, 0.9, 0.7, 0.7])       # t2v, i2v, it2v, interpolation, the two predictions
    hard = np.array([0.9, 0.9, 0.9, 0.1, 0.3, 0.3])
    assert np.allclose(Curriculum("none", 10).probabilities(7), 1 / 6)
    named = Curriculum("linear", 100, tasks=["it2v", "interpolation"])
    assert np.allclose(named.probabilities(0), [0, 0, 0.1, 0.9, 0, 0])
    linear, adaptive = Curriculum("linear", 100), Curriculum("adaptive", 100)
    feed(linear, [1, 2, 3] * 20)                          # the loss does not enter
    for step, static in ((0, easy), (25, 0.75 * easy + 0.25 * hard), (100, hard), (1000, hard)):
        assert np.allclose(linear.weights(step), static)
        for r in (0.0, 0.25, 1.0):
            adaptive.r = r
            added = [*[0.1 + 0.8 * r] * 3, 0.9 - 0.8 * r, 0.5, 0.5]
            assert np.allclose(adaptive.weights(step), static + added)
            assert np.allclose(adaptive.probabilities(step), (static + added) / (static + added).sum())


def test_entropy_is_the_expected_share_of_unknown_frames_and_rises():
    """Without a fall of more than 5 % of its range under the adaptive curriculum (the paper's Fig. 4)."""
    c = Curriculum("linear", 100)
    entropy = [c.entropy(step) for step in range(101)]
    assert (np.diff(entropy) > 0).all() and entropy[-1] - entropy[0] > 0.2
    assert entropy[0] == pytest.approx(sum(p * unknown_share(task) for p, task in zip(c.probabilities(0), TASKS)))
    probabilities, entropy = simulate("adaptive")
    assert probabilities.shape == (2000, len(TASKS)) and np.allclose(probabilities.sum(1), 1)
    assert (np.maximum.accumulate(entropy) - entropy).max() < 0.05 * np.ptp(entropy) and np.ptp(entropy) > 0.2


def test_the_pid_score_by_hand():
    c = Curriculum("adaptive", 100)
    feed(c, [1.0, 0.8, 1.2])
    want = [5 * 1.0 + 3 * 1.0 + 1.3 * 0.0, 5 * 0.8 + 3 * 0.9 + 1.3 * -0.2, 5 * 1.2 + 3 * 1.0 + 1.3 * 0.4]
    assert list(c.losses) == [1.0, 0.8, 1.2] and list(c.scores) == pytest.approx(want)


def test_r_is_the_smoothed_share_of_earlier_scores_above():
    c = Curriculum("adaptive", 100, smooth=1)
    feed(c, np.linspace(2, 1, 10))
    assert c.r == 0                                                       # too few scores
    feed(c, np.random.default_rng(0).uniform(0.5, 1.5, 50))
    *before, last = c.scores
    assert c.r == pytest.approx(np.mean(np.array(before) > last)) and 0 < c.r < 1
    feed(c, np.linspace(1, 2.5, 100))
    assert c.r < 0.05                                                     # the loss rises
    smooth = Curriculum("adaptive", 1000)
    for value in np.linspace(2, 1, 200):
        before = smooth.r
        feed(smooth, [value])
        assert 0 <= smooth.r - before <= 1 / 50 + 1e-12
    assert smooth.r > 0.5 and smooth.losses.maxlen == smooth.scores.maxlen == 1000


def test_losses_are_divided_by_the_mean_of_the_first_of_their_task_and_decile():
    """A tenth of a cell's share of all losses; 6 tasks and 10 deciles are 60 cells."""
    assert [Curriculum(losses=n).reference for n in (0, 6000, 60_000, 600_000)] == [5, 10, 100, 1000]
    c = Curriculum("adaptive", 100, losses=60_000)

    def normalised(*losses, tasks, deciles):
        return c.normalise(np.array(losses), np.array(tasks), np.array(deciles)).tolist()
    assert normalised(2.0, 6.0, tasks=[0, 1], deciles=[3, 3]) == [1, 1]  # first of their cells
    assert normalised(4.0, tasks=[0], deciles=[3]) == [4 / 3] and normalised(6.0, tasks=[0], deciles=[4]) == [1]
    for _ in range(98):
        normalised(3.0, tasks=[0], deciles=[3])
    assert c.counts[0, 3] == 100 and c.sums[0, 3] == 300
    assert normalised(1.5, 30.0, tasks=[0, 0], deciles=[3, 3]) == [0.5, 10] and c.counts[0, 3] == 100  # frozen
    assert normalised(9.0, tasks=[1], deciles=[3]) == [9 / 7.5]


@pytest.mark.parametrize("noise, low, high", [(0.0, 0.9, 1.0), (0.3, 0.4, 0.6)])
def test_a_plateau_after_a_fall_does_not_count_as_getting_worse(noise, low, high):
    """A trained network is not sent back to easy tasks: of equal losses most earlier ones were higher."""
    rng, c = np.random.default_rng(0), Curriculum("adaptive", 100, smooth=1 if noise == 0 else 100, losses=60_000)
    for loss in [*np.linspace(2, 1, 100), *np.ones(300 if noise == 0 else 3000)]:
        c.observe([loss * (1 + noise * rng.uniform(-1, 1))], [0], [0])
    assert low <= c.r <= high


def test_a_state_through_json_goes_on_identically():
    rng, (whole, first, second) = np.random.default_rng(1), (Curriculum("adaptive", 60, losses=500) for _ in range(3))
    steps = [(rng.gamma(4, 0.25, 8), rng.integers(0, 6, 8), rng.integers(0, 10, 8)) for _ in range(60)]
    for step in steps[:35]:
        first.observe(*step)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for c, seen in ((whole, steps), (second, steps[35:])):
        for step in seen:
            c.observe(*step)
    assert second.state_dict() == whole.state_dict() and second.r == whole.r > 0
    assert second.losses.maxlen == second.scores.maxlen == 1000


def test_the_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(curriculum, "simulate", lambda mode: simulate(mode, 60))
    plot, log = tmp_path / "plot.png", tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(dict(step=step, entropy=0.5, **more)) + "\n"
                           for step, more in ((10, {}), (20, dict(entropy_all=0.8)))))
    steps, found = curriculum.read_entropy(log)
    assert steps == [10, 20] and found["entropy"] == [0.5, 0.5] and found["entropy_all"][1] == 0.8
    curriculum.main(["--plot", str(plot), "--log", str(log)])
    with Image.open(plot) as image:
        assert image.format == "PNG" and image.width > 800
    with pytest.raises(UserError, match="--curriculum fast.*none, linear, adaptive"):
        Curriculum("fast")
