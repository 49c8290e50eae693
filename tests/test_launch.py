"""lib/run/launch.py: trainings one after another or several at a time, and what their logs say."""
import json
import threading

import pytest

from lib.run import launch
from lib.run.files import UserError


@pytest.fixture
def run(tmp_path):
    lines = [dict(step=20, cpu_s=1.5, shown=dict(stills=16, clips=2, frames=11, whole=1)),
             dict(step=40, cpu_s=2.25, shown=dict(stills=0, clips=4, frames=32, whole=4))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_what_a_log_says(run):
    assert launch.logged(run, "step") == [20, 40]
    assert launch.core_seconds(run) == 3.75
    assert launch.shown(run) == dict(stills=16, clips=6, frames=43, whole=5)


def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
    calls = []

    def train(*arguments):
        calls.append(arguments)
        (tmp_path / "run").mkdir(exist_ok=True)
    monkeypatch.setattr(launch, "run", train)
    for _ in range(2):
        assert launch.train(tmp_path / "run", "--lr", 1e-3) == tmp_path / "run"
    assert calls == [("train.py", "--lr", 1e-3, "--out", tmp_path / "run")]


def test_an_unfinished_run_goes_on(tmp_path, monkeypatch):
    def fail(*_):
        raise UserError("train.py failed")
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(launch, "run", fail)
    with pytest.raises(UserError, match="train.py failed"):
        launch.train(tmp_path / "run")
    assert not (tmp_path / "run/done").exists()


def test_several_run_at_a_time_and_keep_their_order():
    both = threading.Barrier(2, timeout=30)

    def work(a, b):
        both.wait()                          # passes only if two are there
        return a * b
    assert launch.several(work, [(1, 2), (3, 4), (5, 6), (7, 8)], jobs=2) == [2, 12, 30, 56]


def test_one_at_a_time_takes_the_arguments_in_turn():
    seen = []
    assert launch.several(lambda a: seen.append(a) or -a, [(1,), (2,), (3,)], jobs=1) == [-1, -2, -3]
    assert seen == [1, 2, 3]


def test_after_one_that_failed_no_other_begins():
    begun, more = [], threading.Event()

    def work(k):
        begun.append(k)
        if k == 1:
            raise UserError("it failed")
        if k > 1:
            more.set()
        more.wait(1)                         # the first is still at work while the second's worker looks for another
    with pytest.raises(UserError, match="it failed"):
        launch.several(work, [(k,) for k in range(20)], jobs=2)
    assert sorted(begun) == [0, 1]


def test_a_script_that_fails_is_said(capfd):
    with pytest.raises(UserError, match="train.py failed; the same command goes on from here"):
        launch.run("train.py", "--steps", 0)
    assert "--steps 0" in capfd.readouterr().err
