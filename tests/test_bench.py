"""The figures of tools/bench.py and of Table 8 are of what they say; their speed is not tested."""
import pytest
from torch.utils.flop_counter import FlopCounterMode

from lib.run.files import UserError
from model import DFGN, PRESETS, count
from tools import bench

TINY = PRESETS["tiny"].dfgn


def test_passes_have_the_gflop_that_are_counted_and_leave_nothing_behind():
    net, batch = DFGN(TINY), bench.clip_batch(TINY, 2, 4, 8)
    with FlopCounterMode(display=False) as counter:
        bench.forward(net, batch)
    assert bench.gflop(TINY, 2, 4, 8) == pytest.approx(counter.get_total_flops() / 1e9, rel=0.05)  # SDPA is not counted
    bench.train_step(net, batch, checkpointing=True)
    assert not net.checkpointing and all(p.grad is None for p in net.parameters())


def test_all_compared_takes_its_turn_in_every_round(monkeypatch):
    calls = []
    monkeypatch.setattr(bench, "seconds", lambda work: work() or len(calls))
    taken = bench.compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4 and taken == dict(a=5, b=6)     # medians of 3, 5, 7 and 4, 6, 8: not the first


def test_measure_prints_rates_and_unknown_cases_are_refused(capsys):
    bench.measure(TINY, 1, 3, 4, 1)
    text = capsys.readouterr().out
    assert f"{count(DFGN(TINY)) / 1e6:.1f} M parameters" in text and text.count("| forward") == 4
    with pytest.raises(UserError, match="speed: nothing to measure by this name; network has paper"):
        bench.main(["network", "speed"])


def test_table_8_has_the_papers_rows_and_ours(capsys):
    bench.table8(PRESETS["tiny"], rounds=1)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()][2:]
    assert [r[0] for r in rows[3:]] == ["RDTF (paper)", "RDTF here, float32", "RDTF here, bf16"]
    assert rows[3][2:] == ["0.96", "0.39"] and float(rows[4][2]) == pytest.approx(count(DFGN(TINY)) / 1e9, abs=1e-3)
