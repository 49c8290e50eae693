"""Markdown tables of what evaluate.py measured, of runs side by side, and of the paper's numbers beside ours."""
import glob
import json
from pathlib import Path

import numpy as np
from scipy import stats

from lib.run.checkpoints import flat
from lib.run.files import UserError

COLUMNS = ("FVD", "VQA", "CLIP", "loss", "Recog@1", "FD-app", "FD-mot", "prediction error",
           "same sticker")                       # of the paper's tables


def markdown(head, rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def with_interval(value, interval=None, digits=2):
    """"1.23 [1.00, 1.50]", or the number alone."""
    ends = f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else ""
    return f"{value:.{digits}f}{ends}"


def score_cell(scores, name, digits=2):
    return with_interval(scores[name]["mean"], scores[name]["interval"], digits) if scores and name in scores else "-"


def interval_cell(found, name, digits=2):
    return with_interval(**found[name], digits=digits) if found and name in found else "-"


def prediction_table(tasks):
    """A row for each task with given frames: errors in one step from pure noise as shares of the baselines'."""
    names = {"over copying": "error / copying's", "over blending": "error / blending's",
             "no caption, over copying": "without caption / copying's", "caption over none": "with caption / without"}
    rows = {task: t for task, t in tasks.items() if t["prediction"]}
    head = ["prediction of unknown frames", *names.values(), "same sticker", "same sticker, real"]
    cells = [[task, *(interval_cell(t["prediction"], name) for name in names),
              *(score_cell(t["scores"], name) for name in head[-2:])] for task, t in rows.items()]
    return markdown(head, cells) if rows else ""


def timestep_table(tasks):
    """A row for each task with given frames: its error on unknown frames as a share of t2v's on the same frames."""
    rows = {task: t["prediction"]["over t2v"] for task, t in tasks.items() if t["prediction"]}
    if not rows:
        return ""
    steps = list(next(iter(rows.values())))
    return markdown(["error / t2v's on the same frames", *(f"t = {t}" for t in steps)],
                    [[task, *(with_interval(**found[t]) for t in steps)] for task, found in rows.items()])


def psnr_table(tasks):
    """A row for each task: the model and the baselines through the VAE, in dB over the frames that are not given."""
    names = ("model", "copy", "blend", "vae", "model - copy", "model - blend")
    head = ["PSNR of unknown frames, dB", "model", "copy nearest", "blend in a loop", "VAE round trip", *names[-2:]]
    rows = {task: t["psnr"] for task, t in tasks.items() if t["psnr"]}
    return markdown(head, [[task, *(interval_cell(found, name) for name in names)] for task, found in rows.items()])


def distance_cell(d, name):
    if not d or name not in d:
        return "-"
    if name == "FVD-inf":
        return f"{d[name][0]:.1f} +- {d[name][1]:.1f}"
    return with_interval(**d[name], digits=1 if name == "FVD" else 2)


SHOWN = dict(copy="copy nearest", blend="blend in a loop", vae="VAE round trip")


def distance_table(tasks, floor):
    """Rows for each task: the model, the baselines and, paired, the model less each; and as many other real clips."""
    rows, found = {}, [d for t in tasks.values() for d in t["fd"].values()]
    for task, t in tasks.items():
        rows[task] = t["fd"]["model"]
        for name, label in SHOWN.items():
            if name in t["fd"]:
                rows[f"{task}, {label}"] = t["fd"][name]
                if name in t["fd_less"]:
                    rows[f"{task}, model - {label}"] = dict(n=t["fd"][name]["n"], **t["fd_less"][name])
    rows["real, other concepts"] = floor
    names = [*(("FVD", "FVD-inf") if any("FVD" in d for d in found) else ()), "FD-app", "FD-mot"]
    cells = [[label, str(d["n"]) if d else "-", *(distance_cell(d, k) for k in names)] for label, d in rows.items()]
    return markdown(["distance to the real clips", "n", *names], cells)


def all_of(report):
    """The tables of an evaluation that have rows."""
    tasks = report["tasks"]
    return [table for table in (prediction_table(tasks), timestep_table(tasks), distance_table(tasks, report["floor"]),
                                score_table(tasks, report["real"]), psnr_table(tasks)) if table.count("\n") > 1]


def difference_table(rows):
    """rows: {row: {metric: value, interval}}."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    cells = [[row, *(with_interval(**d[name], digits=3) for name in names)] for row, d in rows.items()]
    return markdown(["difference, paired", *names], cells)


def score_table(tasks, real):
    """Mean of every score that each clip has, for the tasks and for the real stickers; "" where there is none."""
    rows = {**{task: t["scores"] for task, t in tasks.items()}, "real stickers": real}
    names = list(dict.fromkeys(name for scores in rows.values() for name in scores))
    cells = [[label, *(score_cell(scores, name, 3) for name in names)] for label, scores in rows.items()]
    return markdown(["mean of a clip", *names], cells) if names else ""


def check_alike(option, reports):
    """UserError unless all reports ({run: report}) measured the same on the same stickers."""
    (first, report), *others = reports.items()
    for run, other in others:
        for key in ("set", "split", "n", "seed", "protocol", "files", "metrics"):
            if other.get(key) != report.get(key):
                raise UserError(f"{option} {run}: evaluated with another {key} than {first}; evaluate both alike")
        if list(other["tasks"]) != list(report["tasks"]):
            raise UserError(f"{option} {run}: evaluated on other --tasks than {first}; evaluate both alike")


def read_run(run):
    """(configuration, flat; what was measured; cells of a table) of a run that was evaluated."""
    try:
        config, report = (json.loads((Path(run) / name).read_text()) for name in ("config.json", "eval.json"))
        trained = {k: v for k, v in config["train"].items() if k not in ("set", "out")}
        trained = flat(dict(train=trained, model=config["model"]))
        margins = [interval_cell(t["prediction"], "over copying") for t in report["tasks"].values() if t["prediction"]]
        distances = [", ".join(f"{t['fd']['model'][name]['value']:.2f}" for name in ("FD-app", "FD-mot"))
                     for t in report["tasks"].values()]
        return trained, report, [str(report["step"]), *margins, *distances]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"--compare {run}: config.json and eval.json of a dfgn run are needed ({error}); "
                        f"`python evaluate.py --run {run}` makes the latter") from None


def compare(runs):
    """A row for each run folder: how its configuration differs from the first one's, and what was measured."""
    found = {run: read_run(run) for run in runs}
    check_alike("--compare", {run: report for run, (_, report, _) in found.items()})
    first, report, _ = found[runs[0]]

    def changes(trained):
        differing = {k.split(".", 1)[1]: json.dumps(v) for k, v in trained.items() if first.get(k) != v}
        return ", ".join(f"{k}={v}" for k, v in differing.items()) or "-"
    given = [f"{task}, error / copying's" for task, t in report["tasks"].items() if t["prediction"]]
    head = ["run", "differs in", "step", *given, *(f"{task}, FD-app, FD-mot" for task in report["tasks"])]
    rows = [[Path(run).name, changes(trained), *cells] for run, (trained, _, cells) in found.items()]
    return f"{report['protocol']}\n\n{markdown(head, rows)}"


def find_rows(options):
    """["NAME=PATTERN", ...] -> {name: run folders}, one for each seed."""
    found = {}
    for option in options:
        name, _, pattern = option.partition("=")
        folders = sorted(path for path in glob.glob(pattern) if Path(path).is_dir())
        if not name.strip() or not pattern:
            raise UserError(f"--rows {option}: write \"NAME=PATTERN\", in quotes, the pattern that of run folders")
        if not folders:
            raise UserError(f"--rows {option}: no run folder matches {pattern}")
        found.setdefault(name.strip(), []).extend(folders)
    return found


def over_seeds(values):
    """Mean over runs and its 95 % interval by Student's t; of one run no interval."""
    mean, k = float(np.mean(values)), len(values)
    reach = float(stats.t.ppf(0.975, k - 1) * np.std(values, ddof=1) / k ** 0.5) if k > 1 else None
    return dict(value=mean, interval=(mean - reach, mean + reach) if k > 1 else None)


def paper_table(paper, ours):
    """A row for each method; paper: {row: {metric: number}}, ours: {row: [{metric: number} of every run]}."""
    published = list(dict.fromkeys(metric for row in paper.values() for metric in row))
    names = [m for m in COLUMNS if m in published or any(m in values for runs in ours.values() for values in runs)]

    def cells(row):
        theirs, runs = paper.get(row, {}), ours.get(row, [])
        means = [with_interval(**over_seeds([v[m] for v in runs]), digits=3 if m == "loss" else 2)
                 if runs and m in runs[0] else "-" for m in names]
        return [row, *(f"{theirs[m]:g}" if m in theirs else "-" for m in published), str(len(runs) or "-"), *means]
    head = ["method", *(f"{m}, paper" for m in published), "our runs",
            *(f"{m}, ours" if m in published else m for m in names)]
    return markdown(head, [cells(row) for row in dict.fromkeys((*paper, *ours))])
