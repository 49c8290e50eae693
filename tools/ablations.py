"""Tables 3 and 4 where data are scarce: what each mask, the curriculum and STI are worth, and from which step on.

    python data.py long-tail data/fluent                  # training stickers keep 2 to 8 frames, most of them few
    python tools/ablations.py --jobs 2                    # -> runs/ablations: tables, curves.png, numbers.json

Each arm adds one thing to the one before: A whole clips of 8 frames alone, it2v; B with the loss mask clips of any
length, it2v; C with the condition mask all six tasks (the paper's DDU); D = C with the linear curriculum (LCL); E = C
with the adaptive one (DCL); conv3d = C with 3-D convolutions in the place of STI. All have the same number of steps and
of clips, and the same stills. On the val split each arm's learning rate is chosen, by seed 0 and --trial-steps, until
the best is no end of the grid, and for each run the best of four checkpoints. All that is reported is of the test
split. The same command goes on where it was stopped; what is done is kept.
"""
import argparse
import itertools
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib.metrics.distances import differences, scores_by_clips  # noqa: E402
from lib.metrics.tables import markdown, over_seeds, with_interval  # noqa: E402
from lib.run import launch  # noqa: E402
from lib.run.files import UserError, run_cli, write_json  # noqa: E402
from lib.run.options import check_least  # noqa: E402
from sample import Sampler  # noqa: E402
from tools.held_out import HeldOut, best_of, choose_rates  # noqa: E402

MASKED = ["--lengths", "sample", "--shortest", "2"]      # clips of any length, padded and masked
ARMS = {"A": ["--lengths", "full", "--shortest", "8", "--tasks", "it2v", "--curriculum", "none"],
        "B": [*MASKED, "--tasks", "it2v", "--curriculum", "none"],
        "C": [*MASKED, "--curriculum", "none"], "D": [*MASKED, "--curriculum", "linear"],
        "E": [*MASKED, "--curriculum", "adaptive"], "conv3d": [*MASKED, "--curriculum", "none"]}
SETS = {"conv3d": ["dfgn.temporal=conv3d"]}
NAMES = {"A": "A: whole clips, it2v", "B": "B: A + loss mask", "C": "C: B + condition masks (DDU)",
         "D": "D: C + LCL", "E": "E: C + DCL", "conv3d": "C with 3D-Conv"}
PAIRS = [("B", "A"), ("C", "B"), ("D", "C"), ("E", "C"), ("conv3d", "C")]
CURVES = "loss", "prediction error"                      # of it2v, at every checkpoint
OTHERS = "it2v, no text", "t2v", "interpolation", "prediction_forward"   # loss, at the best one
METRICS = *CURVES, *OTHERS
CHECKPOINTS = 4


class Ablations:
    def __init__(self, args):
        self.args, self.out = args, Path(args.out)
        self.val, self.test = (HeldOut(args.data, split, args.n) for split in ("val", "test"))

    def train(self, folder, arm, steps, *more):
        a = self.args
        return launch.train(folder, "--data", a.data, "--vae", a.vae, "--preset", a.preset, "--batch", a.batch,
                            "--still-share", a.still_share, "--text-lr", a.text_lr, "--precision", a.precision,
                            "--steps", steps, "--keep-every", steps // CHECKPOINTS, *ARMS[arm], *more,
                            "--set", *a.set, *SETS.get(arm, []))

    def trial(self, arm, lr):
        """Loss on val of a short run."""
        steps = self.args.trial_steps
        folder = self.train(self.out / f"trials/{arm}-{lr:g}", arm, steps, "--lr", lr, "--seed", 0)
        return self.val.loss(folder / "model.safetensors", "it2v")

    def choose_rates(self):
        """{arm: the learning rate whose trial has the lowest loss on val}: of --lrs, or beyond where that is an end."""
        return choose_rates(self.trial, self.args.arms, self.args.lrs, self.args.jobs)

    def one(self, arm, seed, lr):
        """A run: dict(best step, curve {step: {metric: (N,)}}, found {metric: (N,)}, core-seconds, what it saw)."""
        steps = self.args.steps
        folder = self.train(self.out / f"{arm}-{seed}", arm, steps, "--lr", lr, "--seed", seed)
        at = {steps * i // CHECKPOINTS: folder / f"model-{steps * i // CHECKPOINTS:06}.safetensors"
              for i in range(1, CHECKPOINTS + 1)}
        best = best_of(at, self.val, "it2v")
        curve = {step: dict(zip(CURVES, self.test.measure(model, "it2v")["it2v"])) for step, model in at.items()}
        more = {name: loss for name, (loss, _) in self.test.measure(at[best], *OTHERS).items()}
        return dict(lr=lr, best=best, curve=curve, found={**curve[best], **more}, model=at[best],
                    core_seconds=launch.core_seconds(folder), shown=dict(launch.shown(folder)))

    def go(self):
        a, rates = self.args, self.choose_rates()
        keys = list(itertools.product(a.seeds, a.arms))          # a seed of all arms before the next
        found = dict(zip(keys, launch.several(lambda seed, arm: self.one(arm, seed, rates[arm]), keys, a.jobs)))
        report = summary({arm: [found[seed, arm] for seed in a.seeds] for arm in a.arms}, len(self.test.clips),
                         float(self.test.copying(Sampler(found[keys[0]]["model"])).mean()))
        protocol = (f"test split of {a.data}, n = {len(self.test.clips)} concepts; {a.preset} {' '.join(a.set)}, "
                    f"{a.steps} steps of {a.batch} clips, seeds {' '.join(map(str, a.seeds))}; loss and prediction "
                    "error of it2v's unknown frames; 95 % intervals: of an arm Student's t over seeds, of a difference "
                    "a bootstrap over concepts and seeds, paired; below zero is better")
        write_json(self.out / "numbers.json", dict(protocol=protocol, **report))
        plot(self.out / "curves.png", report)
        print(f"\n{protocol}\n\n{tables(report)}\n\n{self.out / 'numbers.json'}\n{self.out / 'curves.png'}")


# ---- numbers
def difference(a, b, n, runs_of):
    """{metric: value, interval} of arm a less arm b, paired. runs_of(arm): {metric: (N,)} of each of its runs."""
    return differences({arm: list(map(scores_by_clips, runs_of(arm))) for arm in (b, a)}, n, 0)[f"{a} - {b}"]


def summary(runs, n, copying):
    """{arms, differences, curves} as JSON has them. runs: {arm: what Ablations.one made of each seed}. copying: error
    of copied frames."""
    arms, changes, curves = {}, {}, {}
    for arm, mine in runs.items():
        values = {metric: [float(run["found"][metric].mean()) for run in mine] for metric in METRICS}
        arms[arm] = dict(lr=mine[0]["lr"], best=[run["best"] for run in mine], values=values,
                         core_seconds=[run["core_seconds"] for run in mine], shown=[run["shown"] for run in mine])
        curves[arm] = {step: {metric: [float(run["curve"][step][metric].mean()) for run in mine] for metric in CURVES}
                       for step in mine[0]["curve"]}
    for a, b in PAIRS:
        if a in runs and b in runs:
            at = {step: difference(a, b, n, lambda arm: [run["curve"][step] for run in runs[arm]])  # noqa: B023
                  for step in curves[a]}
            best = difference(a, b, n, lambda arm: [run["found"] for run in runs[arm]])             # noqa: B023
            changes[f"{a} - {b}"] = dict(best=best, at=at)
    return dict(arms=arms, differences=changes, curves=curves, copying=copying)


def tables(report):
    """Markdown: the arms, the differences, and those of the loss at each of the checkpoints."""
    def cell(values):
        return with_interval(**over_seeds(values), digits=3)
    arms = report["arms"]
    rows = [[NAMES[arm], f"{x['lr']:g}", " ".join(map(str, x["best"])), cell(x["values"]["loss"]),
             cell([v / report["copying"] for v in x["values"]["prediction error"]]),
             f"{np.std(x['values']['loss'], ddof=1):.4f}" if len(x["best"]) > 1 else "-",
             *(f"{np.mean([s[k] for s in x['shown']]):.0f}" for k in ("clips", "whole", "frames", "stills")),
             f"{np.mean(x['core_seconds']):.0f}"] for arm, x in arms.items()]
    head = ["arm", "lr", "best step", "loss", "prediction error / copying's", "loss's deviation of seeds",
            "clips", "of 8 frames", "frames", "stills", "core-seconds"]
    losses = [[NAMES[arm], *(cell(x["values"][task]) for task in OTHERS)] for arm, x in arms.items()]
    changes = [[pair, *(with_interval(**d["best"][name], digits=3) for name in METRICS)]
               for pair, d in report["differences"].items()]
    steps = list(next(iter(report["curves"].values())))
    by_step = [[pair, *(with_interval(**d["at"][step]["loss"], digits=3) for step in steps)]
               for pair, d in report["differences"].items()]
    return "\n\n".join([markdown(head, rows), markdown(["loss", *OTHERS], losses),
                        markdown(["difference", *METRICS], changes),
                        markdown(["difference of loss after", *map(str, steps)], by_step)])


def plot(path, report):
    """A PNG: each metric against steps, the arms above, their differences with intervals below."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(6 * len(CURVES), 7), layout="constrained")
    axes = fig.subplots(2, len(CURVES))
    for metric, above, below in zip(CURVES, *axes):
        for arm, curve in report["curves"].items():
            values = np.array([at[metric] for at in curve.values()])
            line, = above.plot(list(curve), values.mean(1), "o-", label=NAMES[arm])
            above.fill_between(list(curve), values.min(1), values.max(1), color=line.get_color(), alpha=0.15)
        for i, (pair, d) in enumerate(report["differences"].items()):
            middle = np.array([at[metric]["value"] for at in d["at"].values()])
            low, high = np.array([at[metric]["interval"] for at in d["at"].values()]).T
            steps = np.array(list(d["at"])) * (1 + 0.012 * i)             # beside each other
            below.errorbar(steps, middle, [middle - low, high - middle], fmt="o-", capsize=2, label=pair)
        below.axhline(0, color="grey", linewidth=0.8)
        above.set(title=f"{metric}, it2v, held out", xlabel="steps; shaded: all seeds")
        below.set(title="differences, below 0 is better", xlabel="steps")
    for axis in axes[:, 0] if report["differences"] else axes[:1, 0]:
        axis.legend(fontsize=7)
    fig.savefig(path, dpi=110)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="data/long-tail", help="prepared set (default: %(default)s)")
    add("--vae", default="checkpoints/mini-vae.safetensors", help="VAE of all runs (default: %(default)s)")
    add("--preset", default="mini", help="default: %(default)s")
    add("--set", nargs="+", default=[], metavar="PART.FIELD=VALUE", help="changes to the preset of all arms")
    add("--steps", type=int, default=3800, help="steps of every run, a multiple of 4 (default: %(default)s)")
    add("--trial-steps", type=int, default=800, help="of a learning rate's trial (default: %(default)s)")
    add("--batch", type=int, default=4, help="clips of a step (default: %(default)s)")
    add("--still-share", type=float, default=0.07, help="share of the steps on stills, 8 for a clip; 0.07 makes 0.38 "
        "of the samples stills, as many as the Fluent set has (default: %(default)s)")
    add("--precision", default="float32", choices=("bf16", "float32"), help="of all runs (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--lrs", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3], help="learning rates that each arm tries")
    add("--text-lr", type=float, default=0.1, help="of the text encoder, times the learning rate: by the "
        "whole of it all captions come to be read alike (default: %(default)s)")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    add("--n", type=int, default=48, help="concepts of val and of test (default: %(default)s)")
    add("--jobs", type=int, default=1, help="trainings at a time, of one thread each where there is more than one")
    add("--out", default="runs/ablations", help="folder of all runs (default: %(default)s)")
    args = parser.parse_args(argv)
    check_least(args, steps=4, trial_steps=4, batch=1, n=2, jobs=1)
    for name in ("steps", "trial_steps"):
        if getattr(args, name) % CHECKPOINTS:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: no multiple of {CHECKPOINTS}, the "
                            "checkpoints that are compared")
    return args


def main(argv=None):
    args = parse(argv)
    launch.share_cores(args.jobs)
    Ablations(args).go()


if __name__ == "__main__":
    run_cli(main)
