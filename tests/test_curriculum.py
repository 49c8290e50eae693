"""curriculum.py: the weights as documented, the score by hand, and a state that goes on as if never stopped."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import curriculum
from curriculum import MODES, Curriculum, rehearse
from data import TASKS, UserError, unknown_share

GENERATION = ("t2v", "i2v", "it2v")


def feed(c, values, task=0, decile=0):
    for value in values:
        c.observe([value], [task], [decile])


@pytest.mark.parametrize("mode", MODES)
def test_probabilities_sum_to_one(mode):
    c = Curriculum(mode, 100)
    for step in (0, 1, 50, 99, 100, 500):
        p = c.probabilities(step)
        assert p.shape == (len(TASKS),) and p.min() > 0 and p.sum() == pytest.approx(1)
        feed(c, np.linspace(2, 0.1, 20))


def test_no_curriculum_is_uniform():
    assert np.allclose(Curriculum("none", 10).probabilities(7), 1 / 6)


def test_static_weights_at_both_ends_and_between():
    c = Curriculum("linear", 100)
    start = {"interpolation": 0.9, "prediction_forward": 0.7, "prediction_backward": 0.7}
    end = {"interpolation": 0.1, "prediction_forward": 0.3, "prediction_backward": 0.3}
    first, last = ([w.get(task, other) for task in TASKS] for w, other in ((start, 0.1), (end, 0.9)))
    assert np.allclose(c.weights(0), first) and np.allclose(c.weights(100), last) and np.allclose(c.weights(1000), last)
    assert np.allclose(c.weights(25), 0.75 * np.array(first) + 0.25 * np.array(last))
    feed(c, [1, 2, 3] * 20)
    assert np.allclose(c.weights(100), last)                          # the loss does not enter


@pytest.mark.parametrize("r", [0.0, 0.25, 1.0])
def test_adaptive_weights_are_added(r):
    c = Curriculum("adaptive", 100)
    c.r = r
    for task, weight, static in zip(TASKS, c.weights(0), Curriculum("linear", 100).weights(0)):
        want = 0.1 + 0.8 * r if task in GENERATION else 0.9 - 0.8 * r if task == "interpolation" else 0.5
        assert weight == pytest.approx(static + want)


def test_linear_entropy_rises_monotonically():
    c = Curriculum("linear", 200)
    entropy = [c.entropy(step) for step in range(201)]
    assert (np.diff(entropy) > 0).all() and entropy[-1] - entropy[0] > 0.2
    assert entropy[0] == pytest.approx(sum(p * unknown_share(task) for p, task in zip(c.probabilities(0), TASKS)))
    assert Curriculum("none").entropy(0) == pytest.approx(np.mean([unknown_share(task) for task in TASKS]))


def test_falling_loss_raises_r_and_rising_loss_lowers_it():
    c = Curriculum("adaptive", 100, raw=True, smooth=1)
    feed(c, np.linspace(2, 1, 100))
    assert c.r > 0.95 and c.entropy(50) > Curriculum("linear", 100).entropy(0)
    high = c.r
    feed(c, np.linspace(1, 2.5, 100))
    assert c.r < 0.05 < high
    smooth = Curriculum("adaptive", 1000, raw=True)
    for value in np.linspace(2, 1, 200):
        before = smooth.r
        feed(smooth, [value])
        assert 0 <= smooth.r - before <= 1 / smooth.smooth + 1e-12   # no jumps
    assert smooth.r > 0.5


def test_the_first_ten_scores_leave_r_at_zero():
    c = Curriculum("adaptive", 100, raw=True, smooth=1)
    feed(c, np.linspace(2, 1, 10))
    assert c.r == 0
    feed(c, [0.5])
    assert c.r == 1


def test_the_pid_score_by_hand():
    c = Curriculum("adaptive", 100, raw=True)
    feed(c, [1.0, 0.8, 1.2])
    assert list(c.losses) == [1.0, 0.8, 1.2]
    want = [5 * 1.0 + 3 * 1.0 + 1.3 * 0.0,
            5 * 0.8 + 3 * 0.9 + 1.3 * -0.2,
            5 * 1.2 + 3 * 1.0 + 1.3 * 0.4]
    assert list(c.scores) == pytest.approx(want)


def test_r_is_the_share_of_earlier_scores_above():
    c = Curriculum("adaptive", 100, raw=True, smooth=1)
    rng = np.random.default_rng(0)
    for _ in range(50):
        feed(c, [rng.uniform(0.5, 1.5)])
    *before, last = c.scores
    assert c.r == pytest.approx(np.mean(np.array(before) > last)) and 0 < c.r < 1


def test_windows_are_first_in_first_out(monkeypatch):
    monkeypatch.setattr(curriculum, "WINDOW", 12)
    c = Curriculum("adaptive", 100, raw=True, smooth=1)
    feed(c, range(1, 31))
    assert list(c.losses) == list(range(19, 31)) and len(c.scores) == 12
    assert c.scores[-1] == pytest.approx(5 * 30 + 3 * np.mean(range(19, 31)) + 1.3)
    feed(c, [0.0])
    assert c.r == 1                                                   # below all that are remembered
    assert curriculum.Curriculum("adaptive").losses.maxlen == 12


def test_the_window_is_a_thousand():
    c = Curriculum("adaptive", 100)
    assert c.losses.maxlen == c.scores.maxlen == 1000


def test_losses_are_divided_by_the_running_mean_of_their_task_and_decile():
    c = Curriculum("adaptive", 100)
    assert c.normalise(np.array([2.0, 6.0]), np.array([0, 1]), np.array([3, 3])).tolist() == [1, 1]     # new cells
    assert c.normalise(np.array([4.0]), np.array([0]), np.array([3])).tolist() == [2]                   # 4 / 2
    assert c.normalise(np.array([6.0]), np.array([0]), np.array([3])).tolist() == [2]                   # 6 / mean(2, 4)
    assert c.normalise(np.array([6.0]), np.array([1]), np.array([3])).tolist() == [1]                   # another task
    assert c.normalise(np.array([5.0]), np.array([0]), np.array([4])).tolist() == [1]                   # another decile
    twice = c.normalise(np.array([1.0, 3.0]), np.array([2, 2]), np.array([0, 0]))
    assert twice.tolist() == [1, 1] and c.sums[2, 0] == 4 and c.counts[2, 0] == 2                       # both of a cell enter


def test_what_was_drawn_does_not_move_the_score():
    """Tasks of very different loss, drawn in turn: normalised, every step looks the same; raw, it does not."""
    for raw, spread in ((False, 0), (True, 3)):
        c = Curriculum("adaptive", 100, raw=raw)
        for i in range(40):
            c.observe([(0.1, 1.0)[i % 2]], [i % 2], [i % 2 * 5])
        assert np.ptp(list(c.scores)[4:]) == pytest.approx(0, abs=1e-9) if not spread else np.ptp(list(c.scores)[4:]) > spread


@pytest.mark.parametrize("raw", [False, True])
def test_a_state_through_json_goes_on_identically(raw):
    rng = np.random.default_rng(1)
    steps = [(rng.gamma(4, 0.25, 8), rng.integers(0, 6, 8), rng.integers(0, 10, 8)) for _ in range(60)]
    whole, first, second = (Curriculum("adaptive", 60, raw=raw) for _ in range(3))
    for step in steps:
        whole.observe(*step)
    for step in steps[:35]:
        first.observe(*step)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in steps[35:]:
        second.observe(*step)
    assert second.state_dict() == whole.state_dict() and second.r == whole.r > 0
    assert second.losses.maxlen == second.scores.maxlen == 1000
    assert (second.probabilities(59) == whole.probabilities(59)).all()


def test_entropy_rises_smoothly():
    """The paper's claim for DCL (its Fig. 4): no fall of more than 5 % of the range."""
    rows, entropy = rehearse("adaptive")
    assert rows.shape == (2000, len(TASKS)) and np.allclose(rows.sum(1), 1)
    assert (np.maximum.accumulate(entropy) - entropy).max() < 0.05 * np.ptp(entropy) and entropy[-1] - entropy[0] > 0.2


def test_unknown_mode():
    with pytest.raises(UserError, match="--curriculum fast.*none, linear, adaptive"):
        Curriculum("fast")


def test_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(curriculum, "rehearse", lambda mode, steps=60: rehearse(mode, steps))
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(dict(step=s, entropy=0.5)) + "\n" for s in (10, 20)))
    curriculum.main(["--plot", str(tmp_path / "plot.png"), "--log", str(log)])
    assert str(tmp_path / "plot.png") in capsys.readouterr().out
    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG" and image.width > 800 and len(image.convert("RGB").getcolors(1 << 20)) > 20


@pytest.mark.parametrize("content, culprit", [(None, "no.jsonl"), ("{\n", "no.jsonl, line 1"), ("", "no.jsonl"), ('{"step": 1}\n', "no.jsonl")])
def test_a_log_that_cannot_be_read_is_named(tmp_path, content, culprit, monkeypatch):
    monkeypatch.setattr(curriculum, "rehearse", lambda mode, steps=20: rehearse(mode, steps))
    if content is not None:
        (tmp_path / "no.jsonl").write_text(content)
    with pytest.raises(UserError, match=culprit):
        curriculum.main(["--plot", str(tmp_path / "plot.png"), "--log", str(tmp_path / "no.jsonl")])
    assert not (tmp_path / "plot.png").exists()


def test_exit_code(tmp_path):
    script = Path(curriculum.__file__)
    done = subprocess.run([sys.executable, script, "--plot", tmp_path / "a.png", "--log", tmp_path / "none.jsonl"], capture_output=True, text=True)
    assert done.returncode == 2 and "none.jsonl" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("mode", ["none", "linear", "adaptive"])
def test_only_named_tasks_are_drawn(mode):
    p = Curriculum(mode, 100, tasks=["it2v", "interpolation"]).probabilities(30)
    full = Curriculum(mode, 100).probabilities(30)
    named = [TASKS.index(task) for task in ("it2v", "interpolation")]
    assert p.sum() == pytest.approx(1) and set(np.flatnonzero(p)) == set(named)
    assert p[named[0]] / p[named[1]] == pytest.approx(full[named[0]] / full[named[1]])
