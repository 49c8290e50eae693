"""Speed and memory of the DFGN on this machine, beside what products reach on it in the same run.

    python bench.py                          # all but ranks: about 15 minutes on two cores, 13 GB of memory
    python bench.py forward train memory     # paper preset, 1 clip of 8 x 32 x 32 latents
    python bench.py small scale              # widths 64 to 256, 16 x 16 latents
    python bench.py ranks                    # one gloo rank against two, mini preset (wants data/fluent and runs/vae)

Every figure is a median over rounds in which all that is compared takes its turn; GFLOP are counted by torch.utils.flop_counter, a
forward and backward pass as three forwards (recomputation is no work done). "linear" is a 1024 x 1024 layer on 4,096 rows, float32.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from data import UserError, run_cli
from model import DFGN, PRESETS, count
from train import keep_memory, kept_bytes

SMALL = replace(PRESETS["paper"].dfgn, widths=(64, 128, 192, 256))


def clip_batch(c, B, T, side, device="cpu"):
    """Arguments of DFGN.forward for B clips of T frames of side x side latents, 77 tokens, no frame given, none padded."""
    z = torch.randn(B, T, c.channels, side, side, device=device)
    ones = torch.ones(B, T, device=device)
    return dict(z_t=torch.cat([z] * (1 + c.gate), 2), t=torch.full((B,), 500, device=device), context=torch.randn(B, 77, c.text_width, device=device),
                known=torch.zeros_like(z), cond_mask=0 * ones, loss_mask=ones)


def gflop(c, B, T, side):
    """GFLOP of one forward pass."""
    with torch.device("meta"):
        net = DFGN(c)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(**clip_batch(c, B, T, side, "meta"))
    return counter.get_total_flops() / 1e9


def forward(net, batch, bf16=False):
    with torch.no_grad(), torch.autocast(batch["z_t"].device.type, torch.bfloat16, enabled=bf16):
        net(**batch)


def train_step(net, batch, bf16=False, checkpointing=False):
    """Forward and backward pass; the gradients are thrown away."""
    net.checkpointing = checkpointing
    with torch.autocast(batch["z_t"].device.type, torch.bfloat16, enabled=bf16):
        loss = net(**batch).float().square().mean()
    loss.backward()
    net.zero_grad(set_to_none=True)
    net.checkpointing = False


def seconds(work):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def linear_rate(device="cpu", calls=10):
    """GFLOP/s of a 1024 x 1024 linear layer on 4,096 rows, float32."""
    layer, x = torch.nn.Linear(1024, 1024, device=device), torch.randn(4096, 1024, device=device)
    with torch.no_grad():
        layer(x)
        return calls * 2 * 4096 * 1024 ** 2 / 1e9 / seconds(lambda: [layer(x) for _ in range(calls)])


def compare(works, rounds, device="cpu"):
    """Median seconds of each of {name: work}, and the median linear_rate, all in turn in every round, after one call to warm up."""
    taken, rates = {name: [] for name in works}, []
    for work in works.values():
        work()
    for _ in range(rounds):
        rates.append(linear_rate(device))
        for name, work in works.items():
            taken[name].append(seconds(work))
    return {name: statistics.median(t) for name, t in taken.items()}, statistics.median(rates)


def show(title, rows):
    print(f"\n{title}\n\n| | seconds | GFLOP/s | of linear |\n| --- | --- | --- | --- |")
    for name, t, rate, linear in rows:
        print(f"| {name} | {t:.2f} | {rate:.0f} | {rate / linear:.2f} |", flush=True)


def measure(c, B, T, side, rounds, kinds):
    """Print seconds and rates of some of the kinds of pass."""
    work = gflop(c, B, T, side)
    net, batch = DFGN(c), clip_batch(c, B, T, side)
    every = {"forward, float32": lambda: forward(net, batch), "forward, bf16": lambda: forward(net, batch, True),
             "forward and backward, float32": lambda: train_step(net, batch), "forward and backward, bf16": lambda: train_step(net, batch, True),
             "the same with checkpointing, float32": lambda: train_step(net, batch, checkpointing=True)}
    taken, linear = compare({k: every[k] for k in kinds}, rounds)
    show(f"{count(net) / 1e6:.1f} M parameters, {B} x {T} x {side} x {side}: {work:.0f} GFLOP a forward; linear {linear:.0f} GFLOP/s",
         [(k, t, work * (3 if "backward" in k or "checkpointing" in k else 1) / t, linear) for k, t in taken.items()])
    names = list(taken)
    for a in names:
        for b in names[names.index(a) + 1:]:
            print(f"{b} / {a}: {taken[b] / taken[a]:.2f}")


def peak(checkpointing, bf16):
    """Print the peak resident set (GB) of one forward and backward pass of the paper preset, gradients kept, and what autograd keeps."""
    keep_memory()
    c = PRESETS["paper"].dfgn
    net, batch = DFGN(c, checkpointing), clip_batch(c, 1, 8, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        kept, _, loss = kept_bytes(net, lambda: net(**batch).float().square().mean())
    loss.backward()
    print(json.dumps(dict(peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
                          weights=count(net) * 4 / 1e9, kept=kept / 1e9)))


def memory():
    """Each case in a process of its own."""
    print("\npaper preset, 1 clip, forward and backward\n\n| | peak, GB | weights + gradients, GB | kept for the backward pass, GB |\n| --- | --- | --- | --- |")
    for name, checkpointing, bf16 in (("float32", False, False), ("float32, checkpointing", True, False), ("bf16", False, True)):
        done = subprocess.run([sys.executable, "-c", f"import bench; bench.peak({checkpointing}, {bf16})"], cwd=Path(__file__).parent, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"memory, {name}: the process ended with {done.returncode} {done.stderr[-200:]}")
        r = json.loads(done.stdout)
        print(f"| {name} | {r['peak']:.1f} | {2 * r['weights']:.1f} | {r['kept']:.2f} |", flush=True)


def scale(rounds=3):
    """How the time of forward and backward grows with clips and frames; from how many frames on folded attention is most of the work."""
    net = DFGN(SMALL)
    for name, sizes in (("clips of 8 frames", [(B, 8) for B in (1, 2, 4)]), ("frames of 1 clip", [(1, T) for T in (8, 16, 32)])):
        works = {size: (lambda batch: lambda: train_step(net, batch))(clip_batch(SMALL, *size, 16)) for size in sizes}
        taken, _ = compare(works, rounds)
        times = list(taken.values())
        print(f"\n{name}: " + ", ".join(f"{B * T // 8 if 'clips' in name else T}: {t:.2f} s" for (B, T), t in taken.items())
              + f"; time grows as their number to the power {torch.log(torch.tensor(times[-1] / times[0])) / torch.log(torch.tensor(4.)):.2f}")
    a, b = (gflop(SMALL, 1, T, 16) / T for T in (8, 32))
    square = (b - a) / 24                        # GFLOP = linear * T + square * T ** 2: attention over folded frames, and over time
    print(f"work: {a - 8 * square:.2f} T + {square:.4f} T^2 GFLOP, so attention over time and folded frames is {100 * 8 * square / a:.1f} % of it at 8 frames, "
          f"{100 * 32 * square / b:.1f} % at 32, and half of it from {(a - 8 * square) / square:.0f} frames on")


def ranks(data, vae, steps=40, rounds=2):
    """Clips a second of train.py, mini preset, one thread a rank: one rank with 8 clips a step, two with 8 each, and two that share the 8."""
    rates = {(1, 8): [], (2, 16): [], (2, 8): []}        # (ranks, batch)
    for _ in range(rounds):
        for (n, batch), found in rates.items():
            with tempfile.TemporaryDirectory() as run:
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), "train.py", "--data", data, "--vae", vae,
                           "--batch", str(batch), "--steps", str(steps), "--log-every", str(steps // 4), "--out", run]
                done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
                if done.returncode:
                    raise UserError(f"ranks: train.py ended with {done.returncode}: {done.stderr[-300:]}")
                log = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
                found += [line["clips_per_s"] for line in log[1:]]
    one, more, same = (statistics.median(found) for found in rates.values())
    print(f"\nmini preset: 1 rank {one:.1f} clips/s with 8 clips a step; 2 ranks {more:.1f} with 8 each, {more / one:.2f} times as many; "
          f"2 ranks {same:.1f} with 4 each, {same / one:.2f} times")


def main(argv=None):
    cases = dict(forward=lambda: measure(PRESETS["paper"].dfgn, 1, 8, 32, 3, ("forward, float32", "forward, bf16")),
                 train=lambda: measure(PRESETS["paper"].dfgn, 1, 8, 32, 1, ("forward, float32", "forward and backward, float32", "forward and backward, bf16",
                                                                           "the same with checkpointing, float32")),
                 memory=memory, small=lambda: measure(SMALL, 2, 8, 16, 7, ("forward, float32", "forward and backward, float32")), scale=scale, ranks=lambda: ranks(args.data, args.vae))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=f"some of {', '.join(cases)}; none: all but ranks")
    parser.add_argument("--data", default="data/fluent", help="of ranks: a prepared set of 64 px (default: %(default)s)")
    parser.add_argument("--vae", default="runs/vae/model.safetensors", help="of ranks (default: %(default)s)")
    args = parser.parse_args(argv)
    what = args.what or [name for name in cases if name != "ranks"]
    for name in what:
        if name not in cases:
            raise UserError(f"{name}: nothing to measure by this name; choose from {', '.join(cases)}")
    keep_memory()
    for name in what:
        cases[name]()


if __name__ == "__main__":
    run_cli(main)
