"""The soak: kill a training at random moments until it is done; it must end bit for bit like an undisturbed one.

    python tools/soak.py --kills 50 --seed 1     # one process and two ranks in turn, a minute or so for a kill on two cores

A kill is SIGKILL to all processes of a run, to one rank of two (torchrun then starts both again), or SIGTERM, which saves.
Moments: some time after a log line, while a checkpoint, the model, the log or the latents are written, or at any time.
"""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
STEPS = 30
MOMENTS = {"checkpoint": "state.pt.tmp", "model": "model.safetensors.tmp", "log": "log.jsonl.tmp", "config": "config.json.tmp",
           "latents": "latents-*.part", "line": None, "time": None}
FREE = ("clips_per_s", "cpu_s", "save_s", "peak_mb")


def start(arguments, ranks=1, script="train.py"):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--max-restarts=3"]
    command = [sys.executable, *(launcher if ranks > 1 else []), ROOT / script, *arguments]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, env=dict(os.environ, OMP_NUM_THREADS="1"))


def finish(process):
    error = process.communicate()[1]
    if process.returncode:
        sys.exit(f"a run ended with status {process.returncode}:\n{error[-3000:]}")


def children(pid):
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def tree(pid):
    return [pid, *(p for child in children(pid) for p in tree(child))]


def lines_in(run):
    return (run / "log.jsonl").read_text(errors="replace").count("\n") if (run / "log.jsonl").is_file() else 0


def wait_for(moment, draw, process, run, folder):
    """Wait until the moment has come; False if the run ended before."""
    wanted, end = lines_in(run) + draw.randrange(1, 8), time.monotonic() + draw.uniform(3, 30)
    while process.poll() is None:
        if moment == "time":
            come = time.monotonic() > end
        elif moment == "line":
            come = lines_in(run) >= min(wanted, STEPS - 1)
        else:
            come = [*run.glob(MOMENTS[moment]), *folder.glob(MOMENTS[moment])]
        if come:
            time.sleep(draw.uniform(0, 0.2 if moment == "line" else 0.01))
            return process.poll() is None
        time.sleep(0.001)
    return False


def kill(how, draw, process, ranks):
    """Kill all of a run, or one rank of it, or ask it to stop; then wait until it has ended."""
    pids = tree(process.pid)
    if how == "rank" and ranks > 1:
        pids = draw.sample(pids[1:ranks + 1], min(1, len(pids) - 1))
    for pid in [process.pid] if how == "term" else pids:
        try:
            os.kill(pid, signal.SIGTERM if how == "term" else signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.communicate()
    while how == "all" and any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.01)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def check(run, whole):
    """Exit unless two finished runs have the same checkpoint and log, each line once, and nothing half-written."""
    states = [torch.load(folder / "state.pt", weights_only=True) for folder in (run, whole)]
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (run, whole)]
    logs = [[{key: value for key, value in line.items() if key not in FREE} for line in log] for log in logs]
    if not same(*states) or not same(*logs) or len(logs[0]) != STEPS or list(run.glob("*.tmp")):
        sys.exit(f"{run} is not the same as {whole}")


def soak(kills, seed, folder):
    draw, counts, began, runs = random.Random(seed), Counter(), time.monotonic(), 0
    common = ["--preset", "tiny", "--steps", STEPS, "--save-every", 5, "--log-every", 1, "--warmup", 2, "--precision", "float32"]
    finish(start(["synthetic", "--n", 48, "--size", 16, "--out", folder / "set", "--workers", 1], script="data.py"))
    finish(start([*common, "--stage", "vae", "--batch", 8, "--data", folder / "set", "--out", folder / "vae", "--steps", 4]))
    argv = [*common, "--batch", 4, "--ema", 0.5, "--vae", folder / "vae/model.safetensors"]
    for ranks in (1, 2):
        finish(start([*argv, "--data", folder / "set", "--out", folder / f"whole-{ranks}"], ranks))
    while counts.total() < kills:
        runs, ranks, run, copy = runs + 1, 1 + runs % 2, folder / f"run-{runs}", folder / f"set-{runs}"
        shutil.copytree(folder / "set", copy, ignore=shutil.ignore_patterns("latents-*"))
        command = [*argv, "--data", copy, "--out", run, "--workers", ranks - 1]
        for _ in range(10):
            process, moment, how = start(command, ranks), draw.choice([*MOMENTS]), draw.choice(["all", "all", "rank", "term"])
            if not wait_for(moment, draw, process, run, copy):
                finish(process)
                break
            kill(how, draw, process, ranks)
            counts[f"{moment}, {how}, {ranks}"] += 1
            print(f"{time.monotonic() - began:6.0f} s: kill {counts.total()}: {moment}, {how}, {ranks} ranks, "
                  f"{lines_in(run)} lines", flush=True)
        else:
            finish(start(command, ranks))
        check(run, folder / f"whole-{ranks}")
        shutil.rmtree(run), shutil.rmtree(copy)
    print(f"{counts.total()} kills in {runs} runs, all equal to undisturbed ones, in {(time.monotonic() - began) / 60:.1f} "
          f"minutes: {dict(sorted(counts.items()))}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        soak(options.kills, options.seed, Path(temporary))
