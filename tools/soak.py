"""The soak: kill trainings at random moments until they are done; each must end bit for bit like an undisturbed one.

    python tools/soak.py --kills 50 --seed 1     # runs of one process and of two ranks in turn

A kill is SIGKILL to all processes of a run, SIGKILL to one rank (torchrun then starts both again), SIGTERM, SIGHUP or
SIGUSR1, which save, or the end of the terminal that it runs in; some time after a log line, or as soon as a checkpoint,
model, log, configuration or the latents are written.
"""
import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import torch

ROOT, STEPS = Path(__file__).resolve().parent.parent, 30
MOMENTS = "line", "line", "state.pt.tmp", "model.safetensors.tmp", "log.jsonl.tmp", "config.json.tmp", "latents-*.part"
SAVING = dict(term="SIGTERM", hup="SIGHUP", usr1="SIGUSR1")
TIMES = ("clips_per_s", "cpu_s", "save_s", "peak_mb")


def start(script, *arguments, ranks=1):
    """A process in a terminal of its own, whose other end is process.terminal."""
    import fcntl  # these three are of POSIX alone
    import pty
    import termios
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "--max-restarts=3"]
    command = [sys.executable, *(launcher if ranks > 1 else []), ROOT / script, *arguments]
    terminal, inside = pty.openpty()
    process = subprocess.Popen([*map(str, command)], stdin=inside, stdout=inside, stderr=inside,
                               env=dict(os.environ, OMP_NUM_THREADS="1"), start_new_session=True,
                               preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(inside)
    process.terminal, process.said = terminal, bytearray()
    threading.Thread(target=listen, args=(process,), daemon=True).start()    # or a full terminal would stop it
    return process


def listen(process):
    """Keep what a process says, until its terminal ends."""
    with contextlib.suppress(OSError):
        while said := os.read(process.terminal, 4096):
            process.said += said


def finish(process):
    process.wait()
    if process.returncode:
        sys.exit(f"a run ended with status {process.returncode}:\n{process.said[-3000:].decode(errors='replace')}")


def tree(pid):
    """A process and all below it."""
    try:
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(p for child in below for p in tree(int(child)))]


def lines_in(run):
    return (run / "log.jsonl").read_text(errors="replace").count("\n") if (run / "log.jsonl").is_file() else 0


def changed_at(path):
    return path.stat().st_mtime if path.exists() else 0


def wait_for(moment, draw, process, run, folder):
    """Wait until the moment has come; False if the run ended before."""
    wanted, come, began = min(lines_in(run) + draw.randrange(1, 12), STEPS - 1), False, time.time()
    while process.poll() is None and not come:
        time.sleep(0.001)
        found = [*run.glob(moment), *folder.glob(moment)]
        come = lines_in(run) >= wanted if moment == "line" else any(changed_at(path) > began for path in found)
    time.sleep(draw.uniform(0, 0.2 if moment == "line" else 0.01))
    return process.poll() is None


def kill(how, draw, process, ranks):
    """Kill all of a run, or one rank, or ask it to stop; wait until it has ended."""
    pids = tree(process.pid)
    if how == "rank" and ranks > 1:
        pids = draw.sample(pids[1:], min(1, len(pids) - 1))
    if how == "terminal":
        os.close(process.terminal)               # the kernel then sends SIGHUP
    for pid in [] if how == "terminal" else [process.pid] if how in SAVING else pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, getattr(signal, SAVING.get(how, "SIGKILL")))
    process.wait()


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def check(run, whole):
    """Exit unless two finished runs have the same checkpoint and log, each line once, and nothing is half-written."""
    states = [torch.load(folder / "state.pt", weights_only=True) for folder in (run, whole)]
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (run, whole)]
    logs = [[{key: value for key, value in line.items() if key not in TIMES} for line in log] for log in logs]
    if not same(*states) or not same(*logs) or len(logs[0]) != STEPS or list(run.glob("*.tmp")):
        sys.exit(f"{run} is not the same as {whole}")


def soak(kills, seed, folder):
    draw, counts, began, runs = random.Random(seed), Counter(), time.monotonic(), 0
    common = ["train.py", "--preset", "tiny", "--steps", STEPS, "--save-every", 5, "--log-every", 1, "--warmup", 2,
              "--precision", "float32"]
    vae = ["--stage", "vae", "--batch", 8, "--steps", 4, "--data", folder / "set", "--out", folder / "vae"]
    finish(start("data.py", "synthetic", "--n", 48, "--size", 16, "--out", folder / "set", "--workers", 1))
    finish(start(*common, *vae))
    argv = [*common, "--batch", 4, "--ema", 0.5, "--vae", folder / "vae/model.safetensors"]
    for ranks in (1, 2):
        finish(start(*argv, "--data", folder / "set", "--out", folder / f"whole-{ranks}", ranks=ranks))
    while counts.total() < kills:
        runs, ranks, run, copy = runs + 1, 1 + runs % 2, folder / f"run-{runs}", folder / f"set-{runs}"
        shutil.copytree(folder / "set", copy, ignore=shutil.ignore_patterns("latents-*"))
        command = [*argv, "--data", copy, "--out", run, "--workers", draw.randrange(2)]
        process = start(*command, ranks=ranks)
        while wait_for(moment := draw.choice(MOMENTS), draw, process, run, copy):
            how = draw.choice(["all", "all", "rank", "term", "hup", "terminal", *(["usr1"] if ranks == 1 else [])])
            kill(how, draw, process, ranks)
            counts[f"{moment}, {how}, {ranks}"] += 1
            print(f"{time.monotonic() - began:6.0f} s: kill {counts.total()}: at {moment}, {how} of {ranks}, "
                  f"{lines_in(run)} lines", flush=True)
            process = start(*command, ranks=ranks)
        finish(process)
        check(run, folder / f"whole-{ranks}")
        shutil.rmtree(run), shutil.rmtree(copy)
    minutes = (time.monotonic() - began) / 60
    print(f"{counts.total()} kills in {runs} runs, all like undisturbed ones, {minutes:.1f} minutes: {dict(counts)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        soak(options.kills, options.seed, Path(temporary))
