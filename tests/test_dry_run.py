"""tools/dry_run.py: what it counts without memory is what a real step keeps and computes."""
import resource

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lib.run.files import UserError
from model import PRESETS
from tools import dry_run


def real(stage, checkpointing):
    """(bytes that a real forward pass on the CPU keeps for the backward pass, operations of both)."""
    net, loss = dry_run.example(stage, PRESETS["tiny"], 2, checkpointing)
    own, seen = {p.data_ptr() for p in (*net.parameters(), *net.buffers())}, {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.size()
        return x
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            root = loss()
        root.backward()
    return sum(seen.values()), counter.get_total_flops()


@pytest.mark.parametrize("stage, checkpointing", [("vae", False), ("dfgn", False), ("dfgn", True)])
def test_a_dry_run_counts_what_a_step_does(stage, checkpointing):
    options = dry_run.Options(stage=stage, preset="tiny", checkpointing=checkpointing)
    saved, flops = real(stage, checkpointing)
    assert dry_run.step_flops(options, PRESETS["tiny"], 2) == flops
    with dry_run.fake_tensors():
        counted, layer = dry_run.saved_bytes(*dry_run.example(stage, PRESETS["tiny"], 2, checkpointing))
    assert counted == saved and layer < counted


def test_the_papers_preset_takes_no_memory(capsys):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dry_run.main("--preset paper --batch 32 --world 8 --accumulate 2 --zero --ema-device cpu".split())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000     # kB: a tenth of the weights
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows, notes = {words[0]: float(words[1]) for words in lines}, {words[0]: " ".join(words[3:]) for words in lines}
    assert rows["parameters"] == pytest.approx(960, abs=2) and rows["weights"] == pytest.approx(3.84, abs=0.01)
    assert rows["optimiser"] == pytest.approx(0.96, abs=0.01) and rows["averages"] == 0
    assert rows["activations"] == pytest.approx(12.9, abs=0.01)
    parts = sum(rows[name] for name in ("weights", "gradients", "optimiser", "averages", "activations"))
    assert rows["sum"] == pytest.approx(parts, abs=0.01)
    assert "micro-batch of 2 clips" in notes["activations"] and "on each of 8 GPUs" in notes["FLOPs"]


@pytest.mark.parametrize("argv, reason", [
    ("--batch 12 --world 8", "--batch 12: not a multiple of --world 8"), ("--ema-device disk", "--ema-device disk"),
    ("--stage vae --checkpointing", "--checkpointing")])
def test_what_a_run_refuses_is_refused(argv, reason):
    with pytest.raises(UserError, match=reason):
        dry_run.main(argv.split())
