"""curriculum.py: the weights as documented, the score by hand, and a state that goes on as if never stopped."""
import json

import numpy as np
import pytest
from PIL import Image

import curriculum
from curriculum import MODES, Curriculum, simulate
from data import TASKS, unknown_share
from lib.files import UserError


def feed(c, values):
    """Make the curriculum see these values: every loss is the first of its cell, or the cell's mean is 1."""
    c.normalise = lambda losses, tasks, deciles: losses
    for value in values:
        c.observe([value], [0], [0])


def test_no_curriculum_is_uniform():
    assert np.allclose(Curriculum("none", 10).probabilities(7), 1 / 6)


def test_static_weights_run_from_easy_to_hard():
    c = Curriculum("linear", 100)
    start = {"interpolation": 0.9, "prediction_forward": 0.7, "prediction_backward": 0.7}
    end = {"interpolation": 0.1, "prediction_forward": 0.3, "prediction_backward": 0.3}
    first, last = (np.array([w.get(task, other) for task in TASKS]) for w, other in ((start, 0.1), (end, 0.9)))
    assert np.allclose(c.weights(0), first) and np.allclose(c.weights(25), 0.75 * first + 0.25 * last)
    feed(c, [1, 2, 3] * 20)
    assert np.allclose(c.weights(100), last) and np.allclose(c.weights(1000), last)  # the loss does not enter
    entropy = [c.entropy(step) for step in range(101)]
    assert (np.diff(entropy) > 0).all() and entropy[-1] - entropy[0] > 0.2
    assert entropy[0] == pytest.approx(sum(p * unknown_share(task) for p, task in zip(c.probabilities(0), TASKS)))


@pytest.mark.parametrize("r", [0.0, 0.25, 1.0])
def test_adaptive_weights_are_added(r):
    c = Curriculum("adaptive", 100)
    c.r = r
    adaptive = {"interpolation": 0.9 - 0.8 * r, "prediction_forward": 0.5, "prediction_backward": 0.5}
    for task, weight, static in zip(TASKS, c.weights(0), Curriculum("linear", 100).weights(0)):
        assert weight == pytest.approx(static + adaptive.get(task, 0.1 + 0.8 * r))
    assert c.probabilities(0).sum() == pytest.approx(1)


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


def test_losses_are_divided_by_the_running_mean_of_their_task_and_decile():
    c = Curriculum("adaptive", 100)

    def normalised(*losses, tasks, deciles):
        return c.normalise(np.array(losses), np.array(tasks), np.array(deciles)).tolist()
    assert normalised(2.0, 6.0, tasks=[0, 1], deciles=[3, 3]) == [1, 1]  # first of their cells
    assert normalised(4.0, tasks=[0], deciles=[3]) == [2] and normalised(6.0, tasks=[0], deciles=[3]) == [2]
    assert normalised(6.0, tasks=[1], deciles=[3]) == normalised(5.0, tasks=[0], deciles=[4]) == [1]
    assert normalised(1.0, 3.0, tasks=[2, 2], deciles=[0, 0]) == [1, 1] and c.sums[2, 0] == 4 and c.counts[2, 0] == 2


def test_a_state_through_json_goes_on_identically():
    rng = np.random.default_rng(1)
    steps = [(rng.gamma(4, 0.25, 8), rng.integers(0, 6, 8), rng.integers(0, 10, 8)) for _ in range(60)]
    whole, first, second = (Curriculum("adaptive", 60) for _ in range(3))
    for step in steps:
        whole.observe(*step)
    for step in steps[:35]:
        first.observe(*step)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in steps[35:]:
        second.observe(*step)
    assert second.state_dict() == whole.state_dict() and second.r == whole.r > 0
    assert second.losses.maxlen == second.scores.maxlen == 1000


def test_entropy_rises_smoothly():
    """The paper's claim for DCL (its Fig. 4): no fall of more than 5 % of the range."""
    probabilities, entropy = simulate("adaptive")
    assert probabilities.shape == (2000, len(TASKS)) and np.allclose(probabilities.sum(1), 1)
    assert (np.maximum.accumulate(entropy) - entropy).max() < 0.05 * np.ptp(entropy) and np.ptp(entropy) > 0.2


@pytest.mark.parametrize("mode", MODES)
def test_only_named_tasks_are_drawn(mode):
    p = Curriculum(mode, 100, tasks=["it2v", "interpolation"]).probabilities(30)
    full, named = Curriculum(mode, 100).probabilities(30), [TASKS.index(task) for task in ("it2v", "interpolation")]
    assert p.sum() == pytest.approx(1) and set(np.flatnonzero(p)) == set(named)
    assert p[named[0]] / p[named[1]] == pytest.approx(full[named[0]] / full[named[1]])


def test_the_plot_and_what_it_refuses(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--curriculum fast.*none, linear, adaptive"):
        Curriculum("fast")
    monkeypatch.setattr(curriculum, "simulate", lambda mode: simulate(mode, 60))
    plot, log = tmp_path / "plot.png", tmp_path / "log.jsonl"
    for content, reason in ((None, "no such file"), ("{\n", "line 1"), ('{"step": 1}\n', "no line with a step")):
        if content:
            log.write_text(content)
        with pytest.raises(UserError, match=f"log.jsonl.*{reason}"):
            curriculum.main(["--plot", str(plot), "--log", str(log)])
        assert not plot.exists()
    log.write_text("".join(json.dumps(dict(step=step, entropy=0.5)) + "\n" for step in (10, 20)))
    curriculum.main(["--plot", str(plot), "--log", str(log)])
    with Image.open(plot) as image:
        assert image.format == "PNG" and image.width > 800
