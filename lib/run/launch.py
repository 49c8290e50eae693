"""Many trainings, one after another or several at a time; each is a run folder that is finished or goes on."""
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lib.nets.cpu import keep_memory
from lib.run.files import UserError, read_jsonl

ROOT = Path(__file__).resolve().parents[2]


def share_cores(jobs):
    """One thread for this process and those it starts, where several run at a time."""
    if jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    keep_memory()


def run(script, *arguments):
    """Run a script of the repository to its end. UserError: it failed, and has said why."""
    if subprocess.run([sys.executable, ROOT / script, *map(str, arguments)]).returncode:
        raise UserError(f"{script} failed; the same command goes on from here")


def train(folder, *options):
    """A finished run: its folder."""
    if not (folder / "done").is_file():
        run("train.py", *options, "--out", folder)
        (folder / "done").touch()
    return folder


def several(work, arguments, jobs):
    """[work(*a) for a in arguments], `jobs` at a time. After one that failed no other begins."""
    if jobs == 1:
        return [work(*a) for a in arguments]
    failed = []

    def one(a):
        try:
            return None if failed else work(*a)
        except BaseException:
            failed.append(a)
            raise
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, arguments))


def logged(folder, name):
    """A value of every line of a run's log."""
    return [line[name] for _, line in read_jsonl(folder / "log.jsonl")]


def core_seconds(folder):
    """What a run's steps took: the CPU time of all ranks."""
    return sum(logged(folder, "cpu_s"))


def shown(folder):
    """Counter of what a run was trained on: stills, clips, whole (clips of all T frames), frames (of the clips)."""
    total = Counter()
    for line in logged(folder, "shown"):
        total.update(line)
    return total
