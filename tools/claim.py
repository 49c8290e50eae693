"""Tables 1 and 2: does RDTF from scratch beat tuning a larger base? Trains every row and prints both tables.

    python data.py fluent && python data.py emoji --hold-out all --moving --out data/source
    python tools/claim.py --vae runs/vae/model.safetensors                       # -> runs/claim: days of two cores
    make claim                                           # fewer concepts and steps, half of the widths: three hours
    python tools/claim.py --rows RDTF SimDA --tables 1 --jobs 2                  # some of it, two trainings at a time

The base (1.3 times RDTF's parameters) is trained on text alone, on stills of other styles moved by named motions; no
concept of the target's val and test splits is in it. SimDA's base is of text to image: without temporal layers, trained
on single frames of the same. All rows have the same VAE, batch, averages and sampler, and serve both tables. The
compared methods are trained on whole clips and the tables' tasks; one of them also gets our masks, stills and
curriculum. On the val split each row's learning rate is chosen, by trials of a third of the steps until the best is no
end of the grid, and for each run the best of four checkpoints.

A, equal clips: every row sees as many clips of all 8 frames; with our masks shorter clips and stills come on top.
B, equal seconds: as many core-seconds as base and full fine-tuning took together, by RDTF; by full fine-tuning, half of
them on half of the base's steps; and by full fine-tuning of the whole base, as long on the target as RDTF. Those three
and the tuned rows have tables of their own, of differences to the first: table-1-equal-seconds.json and so on.

The same command goes on where it was stopped; what is done is kept. For another domain (Tables 9 and 10) name its set,
the bases that are there and another folder:

    python data.py synthetic --n 400 --out data/shapes
    python tools/claim.py --data data/shapes --bases runs/claim --out runs/claim-shapes
"""
import argparse
import itertools
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import TASKS, StickerSet, draw_frames  # noqa: E402
from lib.metrics.tables import markdown  # noqa: E402
from lib.run import launch  # noqa: E402
from lib.run.files import UserError, read_json, run_cli  # noqa: E402
from lib.run.options import check_least  # noqa: E402
from model import PRESETS, preset  # noqa: E402
from tools.held_out import HeldOut, best_of, choose_rates  # noqa: E402

TASKS_OF = {"1": ["it2v"], "2": ["interpolation", "prediction_forward", "prediction_backward"]}
BASES = {"tiny": "tiny-base", "mini": "base", "paper": "paper-base"}
TUNED = {"full fine-tuning": "full", "I2V-Adapter": "i2v_adapter", "SimDA": "simda",
         "Customize-A-Video, T": "customize_a_video", "Customize-A-Video, S + T": "customize_a_video_st",
         "SimDA, dual masks, curriculum": "simda"}
MASKED = SimpleNamespace(lengths="step", still_share=0.5)   # of rows with our masks, stills and curriculum
STILL = "dfgn.temporal=still"                    # a base of single frames
SHOWN = "whole", "clips", "frames", "stills"     # of a run's log
UNTUNED, FULL = "base, untuned", "full fine-tuning"
LONG = "RDTF, equal seconds"
EQUAL_SECONDS = {LONG: "RDTF", "full fine-tuning, half of the seconds": FULL,
                 "full fine-tuning, as long as RDTF": FULL}
UNGUIDED = ["--text-scale", 1, "--image-scale", 1]    # clips are drawn so: twice as fast, and no row's own scale
ROWS = ["RDTF", "base's width from scratch", *TUNED, UNTUNED, *EQUAL_SECONDS]


def absorber_of(folder):
    """Where the first stage of a run of Customize-A-Video lies."""
    return folder.with_name(folder.name + "-absorber")


def core_seconds(folder):
    """Of a run, and of its first stage if it has one."""
    return sum(launch.core_seconds(part) for part in (folder, absorber_of(folder)) if part.is_dir())


def train(folder, steps, *options):
    """A finished run, of whose way three more models are kept."""
    return launch.train(folder, *options, "--steps", steps, "--keep-every", -(-steps // 4))


def train_two_stages(folder, steps, *options):
    """A run of Customize-A-Video: its first stage, of stills and 30 % of all steps, then the second beside it."""
    first = ["--method", "appearance_lora", "--tasks", *TASKS, "--still-share", 1]
    absorber = train(absorber_of(folder), max(1, steps * 3 // 7), *options, *first)
    return train(folder, steps, *options, "--absorber", absorber / "model.safetensors")


def has_masks(row):
    """Whether a row has our masks, stills and curriculum."""
    return row.startswith("RDTF") or row.endswith("curriculum")


def steps_with(whole, seed, T):
    """Steps of a run with our masks, of which `whole` are on clips of all T frames."""
    config, step = SimpleNamespace(seed=seed, **vars(MASKED)), 0
    while whole:
        whole -= draw_frames(config, step, T) == (T, 1)
        step += 1
    return step


class Claim:
    def __init__(self, args):
        self.args, self.out = args, Path(args.out)
        self.base, self.still_base = (Path(args.bases or args.out) / name for name in ("base", "base-stills"))
        self.tasks = [task for tasks in TASKS_OF.values() for task in tasks]
        self.common = ["--vae", args.vae, "--batch", args.batch, "--precision", args.precision,
                       "--text-lr", args.text_lr, "--warmup", args.steps // 10, "--log-every", 20]
        self.larger = ["--preset", BASES[args.preset], "--set", *args.base_set]  # more changes may follow
        groups = ["--groups", *args.groups] if args.groups else []
        self.target, self.source = (["--data", folder, *groups] for folder in (args.data, args.source))
        self.measured = [*self.target, *UNGUIDED, "--n", args.n]
        self.val = HeldOut(args.data, "val", 32, groups=args.groups)

    def options(self, row):
        """Options of train.py for a row, without learning rate, seed and steps."""
        masks = has_masks(row)
        whole = ["--tasks", *self.tasks, "--lengths", "full", "--curriculum", "none", "--still-share", "0"]
        ours = ["--lengths", MASKED.lengths, "--still-share", MASKED.still_share]
        options = [*self.common, *self.target, *(ours if masks else whole)]
        if row in TUNED:
            stills = TUNED[row] == "simda"
            base = self.still_base if stills else self.base
            return [*options, *self.larger, *([STILL] if stills else []), "--base", base / "model.safetensors",
                    "--method", TUNED[row]]
        wide = preset(BASES[self.args.preset], self.args.base_set).dfgn
        width = [f"dfgn.widths={','.join(map(str, wide.widths))}", f"dfgn.ff_mult={wide.ff_mult}"]
        return [*options, "--preset", self.args.preset, "--set", *self.args.set, *(width if "width" in row else [])]

    def train_row(self, folder, row, steps, *more):
        """A run of a row."""
        stages = train_two_stages if TUNED.get(row, "").startswith("customize") else train
        return stages(folder, steps, *self.options(row), *more)

    def steps(self, row, seed, whole):
        """Steps in which a row sees `whole` steps of whole clips."""
        return steps_with(whole, seed, PRESETS[self.args.preset].frames) if has_masks(row) else whole

    def place(self, row):
        return self.out / "".join(c if c.isalnum() else "-" for c in row.lower())

    def best(self, folder):
        """A folder with the one of a run's four checkpoints whose loss on val is lowest."""
        chosen, last = folder / "best", folder / "model.safetensors"
        if not (chosen / "model.safetensors").is_file():
            steps = read_json(folder / "config.json")["train"]["steps"]
            models = {path.stem: path for path in sorted(folder.glob("model-*.safetensors"))
                      if int(path.stem.rpartition("-")[2]) < steps}
            models["model"] = last
            chosen.mkdir(exist_ok=True)
            shutil.copyfile(folder / "config.json", chosen / "config.json")
            shutil.copyfile(models[best_of(models, self.val, *self.tasks)], chosen / "best.tmp")
            os.replace(chosen / "best.tmp", chosen / "model.safetensors")
        return chosen

    def measure(self, folder):
        """Make a run's clips, losses and features, which the tables read: here --jobs runs are measured at a time."""
        chosen = self.best(folder)
        if not (chosen / "eval.json").is_file():
            tasks = [task for table in self.args.tables for task in TASKS_OF[table]]
            launch.run("evaluate.py", "--run", chosen, *self.measured, "--tasks", *tasks)

    def trial(self, row, lr):
        """Loss on the val split after a third of the steps."""
        steps = self.steps(row, 0, max(1, self.args.steps // 3))
        folder = self.train_row(self.place(row) / f"trial-{lr:g}", row, steps, "--lr", lr, "--seed", 0)
        return self.val.loss(folder / "model.safetensors", *self.tasks)

    def gate(self):
        """Print what the base must show before anything is claimed: it has converged, knows its source, LoRA reaches
        it there, and what it knows is of use on the target. Of another claim's bases: the last alone."""
        a, options = self.args, [*self.common, *self.larger]
        models = {"untrained": launch.train(self.out / "gate/untrained", *options, *self.target, "--lr", 1e-12,
                                            "--steps", 1), "base": self.base, "base of stills": self.still_base}
        sets = {"target": a.data} if a.bases else {"source": a.source, "target": a.data}
        if not a.bases:
            models["base, LoRA on the source"] = train_two_stages(
                self.out / "gate/lora", a.steps, *options, *self.source, "--base", self.base / "model.safetensors",
                "--method", "customize_a_video_st", "--still-share", 0, "--tasks", "t2v")
        held_out = [HeldOut(folder, "test", a.n, groups=a.groups) for folder in sets.values()]
        rows = [[name, *(f"{held.loss(folder / 'model.safetensors', 't2v'):.4f}" for held in held_out)]
                for name, folder in models.items()]
        quarters = [", ".join(f"{np.mean(part):.4f}" for part in np.array_split(launch.logged(base, "loss"), 4)
                              if len(part)) for base in (self.base, self.still_base)]
        print(f"\n{markdown(['t2v denoising loss, held out', *sets], rows)}\ntraining loss of the base by quarters: "
              f"{quarters[0]}; of that of stills: {quarters[1]}\n", flush=True)

    def choose_rates(self, rows):
        """{row: the learning rate whose trial has the lowest loss}: of --lrs, or beyond them where that is an end."""
        return choose_rates(self.trial, rows, self.args.lrs, self.args.jobs)

    def train_rows(self):
        """{row: run folders, one for each seed}."""
        a = self.args
        later = [row for row in a.rows if row in EQUAL_SECONDS]
        needed = {"RDTF", FULL} if later else set()
        rows = [row for row in ROWS if row in needed | set(a.rows) and row not in (*EQUAL_SECONDS, UNTUNED)]
        rates = self.choose_rates(rows)

        def train_seed(seed, row):
            self.measure(self.train_row(self.place(row) / f"seed-{seed}", row, self.steps(row, seed, a.steps),
                                        "--lr", rates[row], "--seed", seed))

        def train_long(seed, row):
            of, base = EQUAL_SECONDS[row], core_seconds(self.base)
            first = self.place(of) / f"seed-{a.seeds[0]}"
            half = "half" in row
            seconds = base + core_seconds(self.place(FULL) / f"seed-{a.seeds[0]}") - (base / 2 if half else 0)
            steps = read_json(first / "config.json")["train"]["steps"] * seconds / core_seconds(first)
            more = ["--base", self.half_base()] if half else []
            self.measure(self.train_row(self.place(row) / f"seed-{seed}", of, max(1, round(steps)), *more,
                                        "--lr", rates[of], "--seed", seed))
        launch.several(train_seed, itertools.product(a.seeds, rows), a.jobs)     # a seed of all rows before the next
        launch.several(train_long, itertools.product(a.seeds, later), a.jobs)
        return {row: [self.base] if row == UNTUNED else [self.place(row) / f"seed-{seed}" for seed in a.seeds]
                for row in a.rows}

    def half_base(self):
        """The base after half of its steps."""
        every = -(-self.args.base_steps // 4)
        return self.base / f"model-{min(2 * every, self.args.base_steps):06}.safetensors"

    def train_bases(self):
        a = self.args
        options = [*self.common, *self.source, "--tasks", "t2v", "--batch", a.base_batch, "--lr", a.base_lr,
                   *self.larger]
        stills = [*options, STILL, "--still-share", 1]
        launch.several(train, [(self.base, a.base_steps, *options), (self.still_base, a.base_steps, *stills)], a.jobs)

    def tables(self):
        self.train_bases()
        self.gate()
        found = self.train_rows()
        rows = [[row, str(len(folders)), *(str(launch.shown(folders[0])[k]) for k in SHOWN),
                 f"{core_seconds(folders[0]):.0f}"] for row, folders in found.items() if row != UNTUNED]
        head = ["row", "runs", "clips of 8 frames of the first", "clips", "frames of clips", "stills", "core-seconds"]
        print(f"\n{markdown(head, rows)}\nbase: {core_seconds(self.base):.0f} core-seconds on the source, base of "
              f"stills: {core_seconds(self.still_base):.0f}\n", flush=True)
        self.compare(found)
        if LONG in found and next(iter(found)) != LONG:
            self.compare({row: found[row] for row in (*EQUAL_SECONDS, *TUNED) if row in found}, "-equal-seconds")

    def compare(self, found, name=""):
        """Print the tables of {row: run folders}, differences to the first; all numbers and a plot go to files."""
        rows = [f"{row}={folders[0] if row == UNTUNED else folders[0].parent / 'seed-*[0-9]/best'}"
                for row, folders in found.items()]
        reports = [self.out / f"table-{table}{name}.json" for table in self.args.tables]
        for table, report in zip(self.args.tables, reports):
            launch.run("evaluate.py", "--table", table, "--rows", *rows, *self.measured, "--out", report)
        if len(found) > 1:
            picture = self.out / f"differences{name}.png"
            plot(picture, reports)
            print(picture)


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


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="data/fluent", help="the target set (default: %(default)s)")
    add("--source", default="data/source", help="what the base is trained on (default: %(default)s)")
    add("--groups", nargs="+", default=[], help="emoji groups of target and source; default: all")
    add("--vae", default="runs/vae/model.safetensors", help="VAE of all rows (default: %(default)s)")
    add("--preset", default="mini", choices=sorted(BASES), help="of RDTF (default: %(default)s)")
    change = dict(nargs="+", default=[], metavar="PART.FIELD=VALUE")
    add("--set", **change, help="changes to the preset, of what is trained from scratch")
    add("--base-set", **change, help="changes to the preset of the bases")
    add("--steps", type=int, default=3000, help="steps of every row on the target (default: %(default)s)")
    add("--base-steps", type=int, default=20000, help="steps of the base on the source (default: %(default)s)")
    add("--batch", type=int, default=4, help="clips of a row's step (default: %(default)s)")
    add("--base-batch", type=int, default=16, help="clips of the base's step (default: %(default)s)")
    add("--base-lr", type=float, default=3e-3, help="learning rate of the bases (default: %(default)s)")
    add("--text-lr", type=float, default=0.1, help="of text encoders, times the learning rate (default: %(default)s)")
    add("--precision", default="float32", choices=("bf16", "float32"), help="of all runs (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--lrs", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3], help="learning rates that each row tries")
    add("--tables", nargs="+", choices=sorted(TASKS_OF), default=sorted(TASKS_OF))
    add("--rows", nargs="+", choices=ROWS, default=ROWS, help="default: all; differences are to the first")
    add("--n", type=int, default=256, help="test concepts (default: %(default)s)")
    add("--jobs", type=int, default=1, help="trainings at a time, of one thread each where there is more than one")
    add("--bases", help="folder of another claim whose bases are tuned here, too (default: that of --out)")
    add("--out", default="runs/claim", help="folder of all runs (default: %(default)s)")
    args = parser.parse_args(argv)
    check_least(args, steps=3, base_steps=1, batch=1, base_batch=1, n=2, jobs=1)
    args.lrs.sort()
    return args


def main(argv=None):
    args = parse(argv)
    check_apart(args.source, args.data)
    launch.share_cores(args.jobs)
    Claim(args).tables()


if __name__ == "__main__":
    run_cli(main)
