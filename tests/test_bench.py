"""The figures of bench.py and of Table 8 are of what they say; their speed is not tested."""
import argparse
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import evaluate
from data import UserError
from model import DFGN, PRESETS, count

TINY = PRESETS["tiny"].dfgn


def test_gflop_are_those_of_a_real_forward_pass():
    net, batch = DFGN(TINY), bench.clip_batch(TINY, 2, 4, 8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(**batch)
    assert bench.gflop(TINY, 2, 4, 8) == pytest.approx(counter.get_total_flops() / 1e9, rel=0.05)   # SDPA on a CPU is not counted


def test_the_paper_preset_needs_at_most_1900_gflop():
    assert 1800 < bench.gflop(PRESETS["paper"].dfgn, 1, 8, 32) <= 1900


def test_a_training_step_leaves_no_gradient_and_no_switch():
    net = DFGN(TINY)
    bench.train_step(net, bench.clip_batch(TINY, 1, 3, 4), checkpointing=True)
    assert not net.checkpointing and all(p.grad is None for p in net.parameters())


def test_all_compared_takes_its_turn_in_every_round(monkeypatch):
    calls = []
    monkeypatch.setattr(bench, "linear_rate", lambda device: 100 + len(calls))
    taken, linear = bench.compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4 and list(taken) == ["a", "b"] and linear == 104


def test_measure_prints_rates_and_ratios(capsys):
    bench.measure(TINY, 1, 3, 4, 1, ("forward, float32", "forward and backward, float32", "the same with checkpointing, float32"))
    said = capsys.readouterr().out
    assert f"{count(DFGN(TINY)) / 1e6:.1f} M parameters" in said and said.count("| forward") == 2 and said.count(" / ") == 3


def test_an_unknown_measurement_is_refused():
    with pytest.raises(UserError, match="speed: nothing to measure by this name; choose from forward"):
        bench.main(["speed"])


def test_table_8_has_the_papers_rows_and_ours():
    rows = evaluate.table8(argparse.Namespace(steps=2, seed=0), PRESETS["tiny"], rounds=1)
    paper = json.loads(evaluate.PAPER.read_text())["table8_cost"]["rows"]
    assert [r[0] for r in rows[1:]] == [*(f"{m} (paper)" for m in paper), "RDTF here, float32", "RDTF here, bf16"]
    assert rows[4][2:4] == ["0.96", "0.39"] and all("(2 measured)" in r[-1] for r in rows[5:])
    assert float(rows[5][2]) == pytest.approx(count(DFGN(TINY)) / 1e9, abs=1e-3)
