"""Speed and memory on this machine, beside what products reach on it in the same run.

    python tools/bench.py network                  # paper, small, mini, memory: 15 minutes on two cores
    python tools/bench.py table8                   # parameters and seconds of a forward pass, the paper's beside
    python tools/bench.py ranks                    # one gloo rank against two, mini preset; wants --data
    python tools/bench.py data                     # clips/s: decoding on the fly, prepared frames, latent cache
    python tools/bench.py ingest                   # preparing stickers beside decoding them, one worker and two
    python tools/bench.py i3d                      # FVD's network beside torch.jit.freeze of it

Figures are medians over rounds in which all that is compared takes its turn. GFLOP are torch.utils.flop_counter's, a
forward and backward pass counting as three forwards. "linear" is a 1024 x 1024 layer on 4,096 rows, float32.
"""
import argparse
import itertools
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from lib.media.pictures import even_frames, read_animation, to_tensor  # noqa: E402
from lib.media.sources import FLUENT, fetch, tar_stickers  # noqa: E402
from lib.metrics.i3d import I3D  # noqa: E402
from lib.metrics.tables import markdown  # noqa: E402
from lib.nets.cpu import keep_memory  # noqa: E402
from lib.run.files import UserError, run_cli  # noqa: E402
from lib.run.options import flag  # noqa: E402
from model import DFGN, PRESETS, RDTF, count  # noqa: E402

PAPER = PRESETS["paper"].dfgn
SMALL = replace(PAPER, widths=(64, 128, 192, 256))


def clip_batch(c, B, T, side, device="cpu"):
    """Arguments of DFGN.forward for B clips of T frames of side x side latents, 77 tokens, no frame given."""
    z, ones = torch.randn(B, T, c.channels, side, side, device=device), torch.ones(B, T, device=device)
    return dict(z_t=z, t=torch.full((B,), 500, device=device), context=torch.randn(B, 77, c.text_width, device=device),
                known=torch.zeros_like(z), cond_mask=0 * ones, loss_mask=ones)


def seconds(work):
    """Seconds that work() takes, with what it has started on a GPU."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(works, rounds):
    """Median seconds of each of {name: work}, all in turn in every round, after one call to warm up."""
    taken = {name: [] for name in works}
    for round in range(rounds + 1):
        for name, work in works.items():
            taken[name] += [seconds(work)][:round]
    return {name: statistics.median(t) for name, t in taken.items()}


# ---- the network
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


PASSES = {"forward, float32": (forward, {}), "forward, bf16": (forward, dict(bf16=True)),
          "forward and backward, float32": (train_step, {}),
          "forward and backward, bf16": (train_step, dict(bf16=True)),
          "the same with checkpointing, float32": (train_step, dict(checkpointing=True))}


def measure(c, B, T, side, rounds):
    """Print seconds and rates of all PASSES."""
    work, net, batch = gflop(c, B, T, side), DFGN(c), clip_batch(c, B, T, side)
    layer, x = torch.nn.Linear(1024, 1024).requires_grad_(False), torch.randn(4096, 1024)
    works = {name: lambda run=run, how=how: run(net, batch, **how) for name, (run, how) in PASSES.items()}
    taken = compare({"linear": lambda: [layer(x) for _ in range(10)], **works}, rounds)
    reached = 10 * 2 * 4096 * 1024 ** 2 / 1e9 / taken.pop("linear")
    print(f"\n{count(net) / 1e6:.1f} M parameters, {B} x {T} x {side} x {side}: {work:.0f} GFLOP a forward; linear "
          f"{reached:.0f} GFLOP/s\n\n| | seconds | GFLOP/s | of linear |\n| --- | --- | --- | --- |")
    for name, t in taken.items():
        rate = work * (1 if name.startswith("forward,") else 3) / t
        print(f"| {name} | {t:.2f} | {rate:.0f} | {rate / reached:.2f} |", flush=True)


def peak(checkpointing, bf16):
    """GB of memory that one forward and backward pass of the paper preset takes at most."""
    keep_memory()
    net, batch = DFGN(PAPER, checkpointing), clip_batch(PAPER, 1, 8, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        net(**batch).float().square().mean().backward()
    most = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())   # ru_maxrss starts at the parent's
    return int(most[1]) * 1024 / 1e9


def memory():
    for name, *case in (("float32", False, False), ("float32, checkpointing", True, False), ("bf16", False, True)):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            most = process.submit(peak, *case).result()
        print(f"paper preset, 1 clip, forward and backward, {name}: {most:.1f} GB at most", flush=True)


NETWORK = dict(paper=lambda: measure(PAPER, 1, 8, 32, 3), small=lambda: measure(SMALL, 2, 8, 16, 7),
               mini=lambda: measure(PRESETS["mini"].dfgn, 4, 8, 8, 15), memory=memory)


# ---- Table 8
def table8(config=PRESETS["paper"], rounds=3):
    """Print Table 8: parameters and seconds of one forward pass, the paper's methods and ours on this machine.

    Random weights change no speed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, batch = RDTF(config).to(device).eval().dfgn, clip_batch(config.dfgn, 1, config.frames, config.vae.side, device)
    took = compare({"float32": lambda: forward(net, batch), "bf16": lambda: forward(net, batch, bf16=True)}, rounds)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    paper = json.loads((ROOT / "assets/paper_tables.json").read_text())["table8_cost"]["rows"]
    rows = [[f"{method} (paper)", "V100", str(r["params_B"]), str(r["seconds"])] for method, r in paper.items()]
    rows += [[f"RDTF here, {how}", name, f"{count(net) / 1e9:.3f}", f"{t:.2f}"] for how, t in took.items()]
    print(markdown(["method", "on", "parameters, B", "forward, s"], rows))


# ---- training, data, metrics
def ranks(folder, vae, steps=40, rounds=2):
    """Clips/s of train.py, mini preset, a thread a rank: one rank with 8 clips a step, two with 8 and with 4 each."""
    rates = {(1, 8): [], (2, 16): [], (2, 8): []}        # (ranks, batch)
    for (n, batch), found in list(rates.items()) * rounds:
        with tempfile.TemporaryDirectory() as run:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
            options = dict(data=folder, vae=vae, batch=batch, steps=steps, log_every=steps // 4, out=run)
            words = [word for name, value in options.items() for word in (flag(name), str(value))]
            done = subprocess.run([*launch, ROOT / "train.py", *words], env={**os.environ, "OMP_NUM_THREADS": "1"},
                                  capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"ranks: train.py ended with {done.returncode}: {done.stderr[-300:]}")
            lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
            found += [line["clips_per_s"] for line in lines[1:]]
    one, more, same = (statistics.median(found) for found in rates.values())
    print(f"mini preset: 1 rank {one:.1f} clips/s with 8 clips a step; 2 ranks {more:.1f} with 8 each "
          f"({more / one:.2f} times as many), {same:.1f} with 4 each ({same / one:.2f} times)")


def rate(work, least=5):
    """Calls of work(i) a second, i = 0, 1, ..., after one to warm up."""
    work(0)
    start, i = time.perf_counter(), 0
    while time.perf_counter() - start < least:
        i += 1
        work(i)
    return i / (time.perf_counter() - start)


def stickers_of(part, folder, count):
    """[(stem, bytes of a WebP)] of a package of Fluent Emoji, downloaded beside the set where it is missing."""
    return list(itertools.islice(tar_stickers(fetch(*FLUENT[part], Path(folder).parent / "npm")), count))


def feed(folder):
    """Clips/s of three ways to feed a training step, one process."""
    stickers = data.StickerSet(folder)
    if not stickers.meta["source"].startswith("fluent"):
        raise UserError(f"--data {folder}: the stickers of a `fluent` set are decoded")
    animated = {r["file"] for r in stickers.records if r["n"] > 1}
    sources = [x for stem, x in stickers_of(int(stickers.meta["source"].split()[1]), folder, 300)
               if f"{stem}.webp" in animated]
    caches, n = sorted(stickers.folder.glob("latents-*.bin")), stickers.meta["frames"]
    if not caches:
        raise UserError(f"--data {folder}: no latents-*.bin in it; train.py makes one")
    latents = np.memmap(caches[0], np.float16, "r").reshape(n, 2, -1, 1, 1)    # a latent as it lies, in one row
    clips, order = data.ClipDataset(stickers, latents, 0, 1), np.random.default_rng(0).permutation(len(stickers))

    def prepared(i):
        record = stickers.records[int(order[i % len(order)])]
        return to_tensor(stickers.clip(record, even_frames(record["n"], 8)))
    decoding = rate(lambda i: read_animation(sources[i % len(sources)], 8, stickers.size))
    frames, cached = rate(prepared), rate(lambda i: clips[i, 0, 8, i])
    print(f"decoding WebP on the fly {decoding:.1f} clips/s, prepared frames {frames:.1f}, latent cache {cached:.1f}: "
          f"{cached / decoding:.1f} times as many as decoding")


def ingest(folder, count=384, rounds=3):
    """Stickers/s: decoding every frame alone, and data.py by one worker and by two."""
    with tempfile.TemporaryDirectory() as root:
        stickers, sets = stickers_of(3, folder, count), (Path(root) / f"set-{i}" for i in itertools.count())
        source = Path(root) / "stickers"
        source.mkdir()
        for stem, content in stickers:
            (source / f"{stem}.webp").write_bytes(content)

        def run(size, workers):
            command = [sys.executable, ROOT / "data.py", "folder", source, "--size", str(size)]
            subprocess.run([*command, "--workers", str(workers), "--out", next(sets)], check=True, capture_output=True)
        for size in (256, 64):
            works = {n: lambda size=size, n=n: run(size, n) for n in (1, 2)}
            took = compare({"decoding": lambda: [read_animation(x) for _, x in stickers], **works}, rounds)
            each = {name: f"{len(stickers) / t:.1f}" for name, t in took.items()}
            print(f"{size} px: {each['decoding']} stickers/s decoding alone, {each[1]} by 1 worker, {each[2]} by 2, "
                  "the start of the process included", flush=True)


@torch.no_grad()
def i3d(rounds=5):
    """Clips/s of I3D with folded batch norms beside torch.jit.freeze of it, random weights."""
    net, x = I3D().eval(), torch.rand(2, 3, 16, 224, 224) * 2 - 1
    frozen, folded = torch.jit.freeze(torch.jit.trace(net, x[:1])), net.fold()
    took = compare({"folded": lambda: folded(x), "frozen": lambda: frozen(x)}, rounds)
    print(f"I3D, 16 x 224 x 224: {2 / took['folded']:.2f} clips/s, torch.jit.freeze {2 / took['frozen']:.2f}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("network", "table8", "ranks", "data", "ingest", "i3d"))
    parser.add_argument("cases", nargs="*", help=f"of network: {', '.join(NETWORK)} (default: all)")
    parser.add_argument("--data", default="data/fluent", help="prepared set (default: %(default)s)")
    parser.add_argument("--vae", default="checkpoints/mini-vae.safetensors", help="of ranks (default: %(default)s)")
    args = parser.parse_args(argv)
    for name in args.cases:
        if args.what != "network" or name not in NETWORK:
            raise UserError(f"{name}: nothing to measure by this name; network has {', '.join(NETWORK)}")
    keep_memory()
    if args.what == "network":
        for name in args.cases or NETWORK:
            NETWORK[name]()
    else:
        dict(table8=table8, ranks=lambda: ranks(args.data, args.vae), data=lambda: feed(args.data),
             ingest=lambda: ingest(args.data), i3d=i3d)[args.what]()


if __name__ == "__main__":
    run_cli(main)
