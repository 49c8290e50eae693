"""Tables 1 and 2: does RDTF from scratch beat tuning a larger base? Trains every row and prints both tables.

    python data.py fluent && python data.py emoji --hold-out all --moving --out data/source
    python tools/claim.py --vae runs/vae/model.safetensors                       # -> runs/claim: days of two cores
    make claim                                                                   # fewer concepts and steps: hours
    python tools/claim.py --rows RDTF SimDA --tables 1 --jobs 2                  # some of it, two trainings at a time

The base (1.3 times RDTF's parameters) is trained on text alone, on stills of other styles moved by named motions; no
concept of the target's val and test splits is in it. Every row then has the same number of steps on the target set, the
same VAE, batch, averages and sampler, and serves both tables. The compared methods are trained on whole clips and the
tables' tasks; one of them also gets our masks, stills and curriculum. Learning rates are chosen for each row on the val
split, with the same number of trials of a third of the steps. "RDTF, equal seconds" is RDTF for as many core-seconds as
base and SimDA took together. The same command goes on where it was stopped; what is done is kept.
"""
import argparse
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data import TASKS, StickerSet  # noqa: E402
from lib.metrics.tables import markdown  # noqa: E402
from lib.run.files import UserError, read_json, read_jsonl, run_cli  # noqa: E402
from lib.run.options import check_least  # noqa: E402
from model import PRESETS  # noqa: E402

TASKS_OF = {"1": ["it2v"], "2": ["interpolation", "prediction_forward", "prediction_backward"]}
BASES = {"tiny": "tiny-base", "mini": "base", "paper": "paper-base"}
TUNED = {"full fine-tuning": "full", "I2V-Adapter": "i2v_adapter", "SimDA": "simda",
         "Customize-A-Video, T": "customize_a_video", "Customize-A-Video, S + T": "customize_a_video_st",
         "SimDA, dual masks, curriculum": "simda"}
UNTUNED = "base, untuned"
ROWS = ["RDTF", "RDTF, equal seconds", "base's width from scratch", *TUNED, UNTUNED]


def run(script, *arguments, processes=1):
    """Run a script of the repository to its end. UserError: it failed, and has said why."""
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    if subprocess.run([sys.executable, *many, ROOT / script, *map(str, arguments)]).returncode:
        raise UserError(f"{script} failed; the same command goes on from here")


def absorber_of(folder):
    """Where the first stage of a run of Customize-A-Video lies."""
    return folder.with_name(folder.name + "-absorber")


def logged(folder, name):
    """A number of every line of a run's log."""
    return [line[name] for _, line in read_jsonl(folder / "log.jsonl")]


def core_seconds(folder):
    """Of a run, and of its first stage if it has one."""
    return sum(sum(logged(part, "cpu_s")) for part in (folder, absorber_of(folder)) if part.is_dir())


def train(folder, *options, processes=1):
    """A finished run: its folder."""
    if not (folder / "done").is_file():
        run("train.py", *options, "--out", folder, processes=processes)
        (folder / "done").touch()
    return folder


def train_two_stages(folder, first_steps, steps, *options):
    """A run of Customize-A-Video: its first stage, on stills, then the second beside it."""
    first = ["--method", "appearance_lora", "--tasks", *TASKS, "--still-share", 1, "--steps", first_steps]
    absorber = train(absorber_of(folder), *options, *first)
    return train(folder, *options, "--absorber", absorber / "model.safetensors", "--steps", steps)


class Claim:
    def __init__(self, args):
        self.args, self.out, self.base = args, Path(args.out), Path(args.out) / "base"
        self.tasks = [task for tasks in TASKS_OF.values() for task in tasks]
        self.common = ["--vae", args.vae, "--batch", args.batch, "--precision", args.precision, "--log-every", 20]
        groups = ["--groups", *args.groups] if args.groups else []
        self.target, self.source = (["--data", folder, *groups] for folder in (args.data, args.source))

    def options(self, row):
        """Options of train.py for a row, without learning rate, seed and steps."""
        masks = row.startswith("RDTF") or row.endswith("curriculum")     # ours, with stills and curriculum
        whole = ["--tasks", *self.tasks, "--lengths", "full", "--curriculum", "none", "--still-share", "0"]
        options, larger = [*self.common, *self.target, *([] if masks else whole)], BASES[self.args.preset]
        if row in TUNED:
            return [*options, "--preset", larger, "--base", self.base / "model.safetensors", "--method", TUNED[row]]
        wide = PRESETS[larger].dfgn
        width = ["--set", f"dfgn.widths={','.join(map(str, wide.widths))}", f"dfgn.ff_mult={wide.ff_mult}"]
        return [*options, "--preset", self.args.preset, *(width if "width" in row else [])]

    def train_row(self, folder, row, steps, *more):
        """A run of a row; Customize-A-Video's first stage, of stills, takes 30 % of the steps."""
        options, first = [*self.options(row), *more], steps * 3 // 10
        if TUNED.get(row, "").startswith("customize"):
            return train_two_stages(folder, max(1, first), max(1, steps - first), *options)
        return train(folder, *options, "--steps", steps)

    def place(self, row):
        return self.out / "".join(c if c.isalnum() else "-" for c in row.lower())

    def loss(self, folder, name, tasks, *options):
        """Denoising loss of a run, mean of tasks; the report is kept in its folder."""
        report = folder / f"{name}.json"
        if not report.is_file():
            run("evaluate.py", "--run", folder, "--steps", 2, "--tasks", *tasks, "--out", report, *options)
        measured = read_json(report)["tasks"].values()
        return sum(task["scores"]["loss"]["mean"] for task in measured) / len(measured)

    def measure(self, folder):
        """Make a run's clips, losses and features, which the tables read: here --jobs runs are measured at a time."""
        if not (folder / "eval.json").is_file():
            tasks = [task for table in self.args.tables for task in TASKS_OF[table]]
            run("evaluate.py", "--run", folder, *self.target, "--tasks", *tasks, "--n", self.args.n)

    def trial(self, row, lr):
        """Loss on the val split after a third of the steps."""
        folder = self.train_row(self.place(row) / f"trial-{lr:g}", row, max(1, self.args.steps // 3),
                                "--lr", lr, "--seed", 0)
        return self.loss(folder, "val", self.tasks, *self.target, "--split", "val", "--n", 32)

    def gate(self):
        """Print what the base must show before anything is claimed: it has converged, knows its source, LoRA reaches
        it there, and what it knows is of use on the target."""
        a = self.args
        source = [*self.common, *self.source, "--preset", BASES[a.preset]]
        tuned = train_two_stages(self.out / "gate/lora", max(1, a.steps * 3 // 10), a.steps, *source,
                                 "--base", self.base / "model.safetensors", "--method", "customize_a_video_st",
                                 "--still-share", 0, "--tasks", "t2v")
        untrained = train(self.out / "gate/untrained", *source, "--lr", 1e-12, "--steps", 1)
        rows = []
        for name, folder in {"untrained": untrained, "base": self.base, "base, LoRA on the source": tuned}.items():
            losses = (self.loss(folder, f"gate-{where}", ["t2v"], *options, "--n", a.n)
                      for where, options in (("source", self.source), ("target", self.target)))
            rows.append([name, *(f"{loss:.4f}" for loss in losses)])
        losses = logged(self.base, "loss")
        n = len(losses)
        third, last = np.mean(losses[n // 2:max(n * 3 // 4, n // 2 + 1)]), np.mean(losses[n * 3 // 4:])
        print(f"\n{markdown(['t2v denoising loss, held out', 'source', 'target'], rows)}\n"
              f"training loss of the base, third and last quarter: {third:.4f}, {last:.4f}\n", flush=True)

    def several(self, work, arguments):
        """[work(*a) for a in arguments], --jobs at a time. After one that failed no other begins."""
        failed = []

        def one(a):
            try:
                return None if failed else work(*a)
            except BaseException:
                failed.append(a)
                raise
        with ThreadPoolExecutor(self.args.jobs) as pool:
            return list(pool.map(one, arguments))

    def choose_rates(self, rows):
        """{row: the one of --lrs whose trial has the lowest loss}."""
        lrs = self.args.lrs
        if len(lrs) == 1:
            return dict.fromkeys(rows, lrs[0])
        pairs, rates = list(itertools.product(rows, lrs)), {}
        losses = dict(zip(pairs, self.several(self.trial, pairs)))
        for row in rows:
            rates[row] = min(lrs, key=lambda lr: losses[row, lr])        # noqa: B023
            said = ", ".join(f"{lr:g}: {losses[row, lr]:.4f}" for lr in lrs)
            print(f"{row}: --lr {rates[row]:g} ({said})", flush=True)
        return rates

    def train_rows(self):
        """{row: run folders, one for each seed}."""
        a, long = self.args, "RDTF, equal seconds"
        needed = {"RDTF", "SimDA"} if long in a.rows else set()
        rows = [row for row in ROWS if row in needed | set(a.rows) and row not in (long, UNTUNED)]

        def train_seed(row, seed, steps=a.steps):
            of = "RDTF" if row == long else row
            self.measure(self.train_row(self.place(row) / f"seed-{seed}", of, steps, "--lr", rates[of], "--seed", seed))
        rates = self.choose_rates(rows)
        self.several(train_seed, itertools.product(rows, a.seeds))
        if long in a.rows:
            rdtf, simda = (core_seconds(self.place(row) / f"seed-{a.seeds[0]}") for row in ("RDTF", "SimDA"))
            steps = max(1, round(a.steps * (core_seconds(self.base) + simda) / rdtf))
            self.several(train_seed, [(long, seed, steps) for seed in a.seeds])
        return {row: [self.base] if row == UNTUNED else [self.place(row) / f"seed-{seed}" for seed in a.seeds]
                for row in a.rows}

    def tables(self):
        a = self.args
        train(self.base, *self.common, *self.source, "--preset", BASES[a.preset], "--tasks", "t2v",
              "--batch", a.base_batch, "--steps", a.base_steps, processes=a.jobs)
        self.gate()
        found = self.train_rows()
        costs = [[row, str(len(folders)), f"{core_seconds(folders[0]):.0f}"] for row, folders in found.items()]
        print(f"\n{markdown(['row', 'runs', 'core-seconds of the first on the target'], costs)}\n"
              f"base: {core_seconds(self.base):.0f} core-seconds on the source\n", flush=True)
        rows = [f"{row}={folders[0] if row == UNTUNED else folders[0].parent / 'seed-*[0-9]'}"
                for row, folders in found.items()]
        reports = [self.out / f"table-{table}.json" for table in a.tables]
        for table, report in zip(a.tables, reports):
            run("evaluate.py", "--table", table, "--rows", *rows, *self.target, "--n", a.n, "--out", report)
        if len(found) > 1:
            plot(self.out / "differences.png", reports)
            print(self.out / "differences.png")


def plot(path, reports):
    """A PNG of the differences to the first row with their 95 % intervals, a panel for each task and metric."""
    from matplotlib.figure import Figure
    tasks = {task: numbers["differences"] for report in reports
             for task, numbers in read_json(report)["tasks"].items()}
    metrics = ("loss", "FD-app", "FD-mot")
    rows = list(next(iter(tasks.values())))
    fig = Figure(figsize=(4 * len(metrics), (1 + 0.3 * len(rows)) * len(tasks)), layout="constrained")
    for line, (task, differences) in zip(fig.subplots(len(tasks), len(metrics), squeeze=False), tasks.items()):
        for axis, metric in zip(line, metrics):
            for place, row in enumerate(rows):
                d = differences[row][metric]
                axis.plot(d["interval"], [place, place], "k")
                axis.plot(d["value"], place, "ok")
            axis.axvline(0, color="grey", linewidth=0.8)
            axis.set_yticks(range(len(rows)), rows if axis is line[0] else [""] * len(rows), fontsize=7)
            axis.set_title(f"{task}: {metric}, below 0 is better", fontsize=8)
            axis.invert_yaxis()
    fig.savefig(path, dpi=110)


def check_apart(source, target):
    """UserError if a concept that the target holds out is among those that the base is trained on."""
    held_out = {r["concept"] for r in StickerSet(target).records if r["split"] != "train"}
    both = held_out & {r["concept"] for r in StickerSet(source, "train").records}
    if both:
        raise UserError(f"--source {source}: trains on {len(both)} concepts that {target} holds out, such as "
                        f"{min(both)!r}; prepare it with --hold-out all")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="data/fluent", help="the target set (default: %(default)s)")
    add("--source", default="data/source", help="what the base is trained on (default: %(default)s)")
    add("--groups", nargs="+", default=[], help="emoji groups of target and source; default: all")
    add("--vae", default="runs/vae/model.safetensors", help="VAE of all rows (default: %(default)s)")
    add("--preset", default="mini", choices=sorted(BASES), help="of RDTF (default: %(default)s)")
    add("--steps", type=int, default=3000, help="steps of every row on the target (default: %(default)s)")
    add("--base-steps", type=int, default=20000, help="steps of the base on the source (default: %(default)s)")
    add("--batch", type=int, default=4, help="clips of a row's step (default: %(default)s)")
    add("--base-batch", type=int, default=16, help="clips of the base's step (default: %(default)s)")
    add("--precision", default="auto", choices=("auto", "bf16", "float32"))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--lrs", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3], help="learning rates that each row tries")
    add("--tables", nargs="+", choices=sorted(TASKS_OF), default=sorted(TASKS_OF))
    add("--rows", nargs="+", choices=ROWS, default=ROWS, help="default: all; differences are to the first")
    add("--n", type=int, default=256, help="test concepts (default: %(default)s)")
    add("--jobs", type=int, default=1, help="trainings at a time, of one thread each where there is more than one")
    add("--out", default="runs/claim", help="folder of all runs (default: %(default)s)")
    args = parser.parse_args(argv)
    check_least(args, steps=3, base_steps=1, batch=1, base_batch=1, n=2, jobs=1)
    check_apart(args.source, args.data)
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    Claim(args).tables()


if __name__ == "__main__":
    run_cli(main)
