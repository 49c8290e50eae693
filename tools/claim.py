"""Tables 1 and 2: does RDTF from scratch beat tuning a larger base? Trains every row and prints both tables.

    python data.py fluent && python data.py emoji --hold-out all --moving --out data/source
    python tools/claim.py --vae runs/vae/model.safetensors                       # -> runs/claim; days become hours by
    python tools/claim.py --steps 400 --base-steps 3000 --seeds 0 1 2 --n 48     # these
    python tools/claim.py --rows RDTF SimDA --tables 1                           # some of it

The base (1.3 times RDTF's parameters) is trained on text alone, on stills of other styles moved by named motions; no
concept of the target's val and test splits is in it. Every row then has the same number of steps on the target set, the
same VAE, batch, averages and sampler. The compared methods are trained on whole clips and the table's own tasks, as
their papers do; one of them also gets our masks, stills and curriculum. Learning rates are chosen for each row on the
val split, with the same number of trials of a third of the steps. "RDTF, equal seconds" is RDTF for as many
core-seconds as base and SimDA took together. The same command goes on where it was stopped; what is done is kept.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data import StickerSet  # noqa: E402
from lib.files import UserError, run_cli  # noqa: E402
from lib.options import check_least  # noqa: E402
from lib.tables import markdown  # noqa: E402
from model import PRESETS  # noqa: E402

TASKS_OF = {"1": ["it2v"], "2": ["interpolation", "prediction_forward", "prediction_backward"]}
BASES = {"tiny": "tiny-base", "mini": "base", "paper": "paper-base"}
TUNED = {"full fine-tuning": "full", "I2V-Adapter": "i2v_adapter", "SimDA": "simda",
         "Customize-A-Video, T": "customize_a_video", "Customize-A-Video, S + T": "customize_a_video_st",
         "SimDA, dual masks, curriculum": "simda"}
ROWS = ["RDTF", "RDTF, equal seconds", "base's width from scratch", *TUNED, "base, untuned"]


def run(script, *arguments):
    """Run a script of the repository to its end. UserError: it failed, and has said why."""
    if subprocess.run([sys.executable, ROOT / script, *map(str, arguments)]).returncode:
        raise UserError(f"{script} failed; the same command goes on from here")


def core_seconds(folder):
    return sum(json.loads(line)["cpu_s"] for line in (folder / "log.jsonl").read_text().splitlines())


def has_masks(row):
    """Is a row trained with our masks, stills and curriculum, on all tasks? It then serves both tables."""
    return row.startswith("RDTF") or row.endswith("curriculum")


class Claim:
    def __init__(self, args):
        self.args, self.out = args, Path(args.out)
        self.common = ["--vae", args.vae, "--batch", args.batch, "--precision", args.precision, "--log-every", 20]
        self.target = ["--data", args.data, *(["--groups", *args.groups] if args.groups else [])]

    def train(self, folder, steps, *options):
        """A finished run: its folder."""
        model = folder / "model.safetensors"
        if not (model.is_file() and (folder / "done").is_file()):
            run("train.py", *self.common, *options, "--steps", steps, "--out", folder)
            (folder / "done").touch()
        return folder

    def base(self):
        a = self.args
        return self.train(self.out / "base", a.base_steps, "--data", a.source, "--preset", BASES[a.preset],
                          "--tasks", "t2v")

    def options(self, row, table):
        """Options of train.py for a row, without learning rate, seed and steps."""
        single = ["--tasks", *TASKS_OF[table], "--frames", "full", "--curriculum", "none", "--still-share", "0"]
        how = [] if has_masks(row) else single
        if row in TUNED:
            base = self.base() / "model.safetensors"
            return [*self.target, "--preset", BASES[self.args.preset], "--base", base, "--method", TUNED[row], *how]
        wide = PRESETS[BASES[self.args.preset]].dfgn
        width = ["--set", f"dfgn.widths={','.join(map(str, wide.widths))}", f"dfgn.ff_mult={wide.ff_mult}"]
        return [*self.target, "--preset", self.args.preset, *how, *(width if "width" in row else [])]

    def train_row(self, folder, row, table, steps, *more):
        """A run of a row; Customize-A-Video's first stage takes 30 % of the steps."""
        options, method = self.options(row, table), TUNED.get(row, "")
        if method.startswith("customize"):
            first = self.options(row, table)
            first[first.index("--method") + 1] = "appearance_lora"
            first[first.index("--still-share") + 1] = "1"
            first[first.index("--tasks"):first.index("--frames")] = []
            absorber = self.train(folder.with_name(folder.name + "-absorber"), max(1, steps * 3 // 10), *first, *more)
            options += ["--absorber", absorber / "model.safetensors"]
            steps = max(1, steps - steps * 3 // 10)
        return self.train(folder, steps, *options, *more)

    def place(self, row, table):
        """Where the runs of a row lie."""
        slug = "".join(c if c.isalnum() else "-" for c in row.lower())
        return self.out / ("both" if has_masks(row) else f"table-{table}") / slug

    def learning_rate(self, row, table):
        """The one of --lrs whose trial has the lowest denoising loss on the val split."""
        if len(self.args.lrs) == 1:
            return self.args.lrs[0]
        losses, tasks = {}, sum(TASKS_OF.values(), []) if has_masks(row) else TASKS_OF[table]
        for lr in self.args.lrs:
            trial = self.train_row(self.place(row, table) / f"trial-{lr:g}", row, table, max(1, self.args.steps // 3),
                                   "--lr", lr, "--seed", 0)
            report = trial / "val.json"
            if not report.is_file():
                run("evaluate.py", "--run", trial, *self.target, "--split", "val", "--n", 32, "--steps", 2,
                    "--tasks", *tasks, "--out", report)
            measured = json.loads(report.read_text())["tasks"].values()
            losses[lr] = sum(task["scores"]["loss"]["mean"] for task in measured) / len(measured)
        best = min(losses, key=losses.get)
        print(f"{row}: --lr {best:g} ({', '.join(f'{lr:g}: {loss:.4f}' for lr, loss in losses.items())})", flush=True)
        return best

    def runs(self, row, table):
        """Run folders of a row, one for each seed."""
        if row == "base, untuned":
            return [self.base()]
        steps, place, of = self.args.steps, self.place(row, table), row
        if row == "RDTF, equal seconds":
            of, seconds = "RDTF", core_seconds(self.base()) + core_seconds(self.runs("SimDA", table)[0])
            steps = max(1, round(steps * seconds / core_seconds(self.runs("RDTF", table)[0])))
            place = place.with_name(f"{place.name}-{table}")
        lr = self.learning_rate(of, table)
        return [self.train_row(place / f"seed-{seed}", of, table, steps, "--lr", lr, "--seed", seed)
                for seed in self.args.seeds]

    def table(self, table):
        found = {row: self.runs(row, table) for row in self.args.rows}
        costs = [[row, str(len(folders)), f"{core_seconds(folders[0]):.0f}"] for row, folders in found.items()]
        print(f"\n{markdown(['row', 'runs', 'core-seconds of the first on the target'], costs)}\n"
              f"base: {core_seconds(self.base()):.0f} core-seconds on the source\n", flush=True)
        rows = [f"{row}={folders[0] if row == 'base, untuned' else folders[0].parent / 'seed-*[0-9]'}"
                for row, folders in found.items()]
        run("evaluate.py", "--table", table, "--rows", *rows, *self.target, "--n", self.args.n,
            "--out", self.out / f"table-{table}.json")


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
    add("--groups", nargs="+", default=[], help="emoji groups of the target; default: all")
    add("--vae", default="runs/vae/model.safetensors", help="VAE of all rows (default: %(default)s)")
    add("--preset", default="mini", choices=sorted(BASES), help="of RDTF (default: %(default)s)")
    add("--steps", type=int, default=3000, help="steps of every row on the target (default: %(default)s)")
    add("--base-steps", type=int, default=20000, help="steps of the base on the source (default: %(default)s)")
    add("--batch", type=int, default=4)
    add("--precision", default="auto", choices=("auto", "bf16", "float32"))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--lrs", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3], help="learning rates that each row tries")
    add("--tables", nargs="+", choices=sorted(TASKS_OF), default=sorted(TASKS_OF))
    add("--rows", nargs="+", choices=ROWS, default=ROWS, help="default: all; differences are to the first")
    add("--n", type=int, default=256, help="test concepts (default: %(default)s)")
    add("--out", default="runs/claim", help="folder of all runs (default: %(default)s)")
    args = parser.parse_args(argv)
    check_least(args, steps=3, base_steps=1, batch=1, n=2)
    check_apart(args.source, args.data)
    for table in args.tables:
        Claim(args).table(table)


if __name__ == "__main__":
    run_cli(main)
