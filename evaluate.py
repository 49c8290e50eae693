"""Evaluate trained DFGNs: the paper's metrics, stand-ins under other names where their weights are not at hand, the paper's tables.

    python evaluate.py --run runs/dfgn                                  # six tasks: tables on stdout, RUN/eval.json
    python evaluate.py --run runs/dfgn --tasks t2v it2v --sheet out.png # and the first clips of each task, not picked
    python evaluate.py --run runs/dfgn --i3d i3d_pretrained_400.pt --dover DOVER.pth --clip open_clip_pytorch_model.bin
    python evaluate.py --run runs/dfgn --prompts captions.txt --sheet out.png   # fixed captions, nothing measured
    python evaluate.py --fit-judge                                      # the two-tower network of R@1-local, once a set
    python evaluate.py --check-metrics                                  # how every metric reacts to damaged stickers
    python evaluate.py --table 3 --runs runs/ablations                  # Table 1, 2, 3, 4, 6 or 7: the paper's numbers beside ours
    python evaluate.py --compare runs/a runs/b                          # a row for each run that was evaluated
    python evaluate.py --study runs/a runs/b --out out/study.html       # Table 5: a blind ranking in the browser, and its results:
    python evaluate.py --study-results study-*.json --key out/study.key.json

One sticker a concept, evenly spaced frames, on white, the masks of data.eval_mask. PSNR is of the frames that were not given,
beside copying the nearest given frame, blending the two around (stickers loop: the first follows the last) and the VAE's own round
trip. Distances (FVD, FD-app, FD-mot) compare whole clips, given frames included, with the real ones; their floor is as many real
clips of other concepts. Distances fall with n: compare at equal n. Intervals are 95 % bootstrap intervals over concepts.
Clips and features are kept in RUN/eval and DATA/eval: a second run makes none again, a killed one goes on where it was.
"""
import argparse
import base64
import fcntl
import functools
import hashlib
import io
import itertools
import json
import os
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

import bench
from curriculum import KD, KI, KP
from data import (TASKS, Members, StickerSet, UserError, check_sheet, contact_sheet, eval_mask, even_frames, flock, given_frames, mask_of,
                  nearest_given, read_jsonl, read_npy, run_cli, tokenize, to_rgba, to_tensor, write_animation)
from metrics import (CLIPRows, DOVERRows, I3DRows, JudgeRows, LocalRows, NIQE, NIQERows, bootstrap, bootstrap_fd, clip_scores, dover_fuse, extrapolate,
                     fd_app, fd_mot, fit_judge, frechet, on_white, psnr, recall, save_judge)
from model import PRESETS, RDTF, STI, Config, count, fill
from sample import DEFAULTS, Sampler, ddim, defaults
from train import TrainConfig, file_hash, flat, keep_memory, read_metadata, write_atomically

DISTANCES = {"FVD": ("i3d", frechet), "FD-app": ("local", fd_app), "FD-mot": ("local", fd_mot)}  # features, and the distance of two sets of them
JUDGE = "runs/judge.safetensors"
DISTANT = {kind for kind, _ in DISTANCES.values()}
PAPER = Path(__file__).with_name("assets") / "paper_tables.json"


# ------------------------------------------------------------------------------------------------ clips
def pick(stickers, n, T, seed, among=True):
    """Up to n records of at least T frames, one a concept: which variant, and the order of the concepts, by the seed.

    among: (records,) bool, True for those that may be picked."""
    members, rng = Members(stickers.concept, np.flatnonzero((stickers.lengths >= T) & among)), np.random.default_rng(seed)
    chosen = [variants[int(rng.integers(len(variants)))] for variants in members]
    return [stickers.records[chosen[i]] for i in rng.permutation(len(chosen))[:n]]


def read_clips(stickers, records, T):
    """(N, T, S, S, 4) uint8 straight RGBA."""
    return np.stack([stickers.clip(r, even_frames(r["n"], T)) for r in records])


def copy_nearest(clips, mask):
    """Each frame of clips (N, T, ...) replaced by the nearest given one; mask (T,)."""
    return clips[:, nearest_given(mask)]


def blend(clips, mask):
    """Unknown frames of float clips (N, T, ...) mixed linearly from the given ones around them; after the last frame comes the first."""
    return fill(torch.from_numpy(clips), torch.from_numpy(mask).expand(len(clips), -1), "loop").numpy()


@torch.no_grad()
def round_trip(sampler, clips, batch):
    """Clips encoded and decoded: as good as any output of this VAE can be."""
    out = []
    for part in np.split(clips, range(batch, len(clips), batch)):
        x = sampler.vae.images(to_tensor(part.reshape(-1, *part.shape[2:])))
        out.append(to_rgba(sampler.vae.decode(sampler.vae.encode(x))).reshape(part.shape))
    return np.concatenate(out)


def hash_of(made_of):
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def code_of(*names):
    """{name: hash} of scripts that a kept result depends on."""
    return {name: file_hash(Path(__file__).with_name(name)) for name in names}


def kept(folder, name, made_of, shape, dtype, batch, make):
    """An array of this shape whose rows make(slice) gives, kept as folder/name-HASH.npy.

    Rows are appended to a .part file as they come, so that a killed process goes on behind its last whole one; a second process waits."""
    path = Path(folder) / f"{name}-{hash_of(made_of)}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    read = functools.partial(read_npy, path, dtype, shape, "remove it, and it is made again")
    if path.is_file():
        return read()
    part, size = path.with_suffix(".part"), int(np.prod(shape[1:])) * np.dtype(dtype).itemsize
    with open(part, "ab") as file:
        flock(file, fcntl.LOCK_EX)
        if path.is_file():                       # the other process made it meanwhile
            return read()
        done = min(file.seek(0, os.SEEK_END) // size, shape[0])
        file.truncate(done * size)
        with tqdm(total=shape[0], initial=done, desc=name, unit="clip", delay=1) as bar:
            for i in range(done, shape[0], batch):
                rows = np.ascontiguousarray(make(slice(i, min(i + batch, shape[0]))), dtype)
                if rows.shape != (min(batch, shape[0] - i), *shape[1:]):
                    raise ValueError(f"{name}: {rows.shape} came where {(min(batch, shape[0] - i), *shape[1:])} belongs")
                file.write(rows.tobytes())
                file.flush()
                bar.update(len(rows))
        rows = np.fromfile(part, dtype).reshape(shape)
        np.save(temporary := path.with_suffix(".tmp.npy"), rows)
        os.replace(temporary, path)
        part.unlink()
    return rows


class Run:
    """A trained run: its network, and the clips it makes for a task, made once for a model, code, stickers and settings."""

    def __init__(self, folder, args):
        self.folder, self.args, self.model = Path(folder), args, Path(folder) / "model.safetensors"
        if not self.model.is_file():
            raise UserError(f"--run {folder}: no model.safetensors there; train one with `python train.py --out {folder}`")
        self.sampler = Sampler(self.model, args.vae, clip_weights=args.clip_weights)
        self.sources = code_of("data.py", "model.py", "sample.py")
        self.sources["model"] = file_hash(self.model)

    def settings(self, given):
        return {**self.sampler.settings(given, **{name: getattr(self.args, name) for name in DEFAULTS}), "detail": self.args.detail}

    def clips(self, task, test):
        """(clips (N, T, S, S, 4) uint8, what they were made of); clip k is seeded by (--seed, k)."""
        settings, seed, n = self.settings(task != "t2v"), self.args.seed, len(test.records)
        made_of = dict(self.sources, set=test.set_hash, task=task, mask=eval_mask(task, test.T, test.T).tolist(), files=test.files, seed=seed, **settings)
        prompts = ["" if task == "i2v" else caption for caption in test.captions]
        mask = np.stack([eval_mask(task, self.sampler.T, self.sampler.T)] * n)
        given = lambda part: dict(frames=test.real[part], cond_mask=mask[part]) if mask.any() else {}
        make = lambda part: self.sampler.sample(prompts[part], [(seed, k) for k in range(n)[part]], **given(part), **settings)
        return kept(self.folder / "eval", task, made_of, test.real.shape, np.uint8, self.args.batch, make), made_of

    def made_for(self, prompts):
        """t2v clips for captions of the user."""
        parts = range(0, len(prompts), self.args.batch)
        return np.concatenate([self.sampler.sample(prompts[i:i + self.args.batch], [(self.args.seed, k) for k in range(len(prompts))[i:i + self.args.batch]],
                                                   **self.settings(False)) for i in tqdm(parts, "t2v")])


# ------------------------------------------------------------------------------------------------ the test
def to_white(rgba):
    """(..., 4) uint8 straight RGBA -> (..., 3) uint8: what the networks that measure are shown."""
    return np.round(on_white(rgba) * 255).astype(np.uint8)


class Test:
    """What runs are measured with: one sticker a concept of a split, as many real ones of other concepts, and all that looks at clips.

    rows are dicts of arrays, a row a clip: what each extractor of metrics.py made of them."""

    def __init__(self, args, T=8, size=None):
        self.args, self.T, self.stickers = args, T, StickerSet(args.data, groups=args.groups)
        if size not in (None, self.stickers.size):
            raise UserError(f"--data {args.data}: {self.stickers.size} px, the model makes {size}")
        own = self.stickers.split == args.split
        self.records = pick(self.stickers, args.n, T, args.seed, own)
        if len(self.records) < 2:
            where = f" in --groups {' '.join(args.groups)}" if args.groups else ""
            raise UserError(f"--split {args.split}: {len(self.records)} concepts with {T} frames{where} in {args.data}; at least 2 are needed")
        self.strangers = pick(self.stickers, max(512, len(self.records)), T, args.seed, ~own)
        self.captions, self.files = ([r[key] for r in self.records] for key in ("caption", "file"))
        self.set_hash, self.real = self.stickers.meta["hash"], read_clips(self.stickers, self.records, T)
        self.folder = Path(args.data) / "eval"
        self.extractors, self.code = extractors(args, T, self.set_hash), code_of("metrics.py", "data.py", "model.py")

    def rows(self, folder, made_of, n, read, names=None):
        """{extractor: (n, width) float32} of the clips that read(slice) gives, uint8 straight RGBA."""
        return {x.name: kept(folder, x.name, dict(clips=made_of, by=x.key, code=self.code), (n, x.width), np.float32, x.batch, lambda part: x(to_white(read(part))))
                for x in self.extractors if names is None or x.name in names}

    def rows_of(self, records, names=None):
        """Of real stickers."""
        made_of = dict(set=self.set_hash, files=[r["file"] for r in records], T=self.T)
        return self.rows(self.folder, made_of, len(records), lambda part: read_clips(self.stickers, records[part], self.T), names)

    def rows_of_copies(self, mask, names=None):
        """Of the real clips, unknown frames replaced by the nearest given one."""
        copies = copy_nearest(self.real, mask)
        return self.rows(self.folder, dict(copy=mask.tolist(), of=self.files, set=self.set_hash), len(copies), copies.__getitem__, names)

    def measure_real(self):
        """Rows of the real clips and of the strangers', scores of the real ones, the floor of the distances."""
        self.real_rows, n = self.rows_of(self.records), len(self.records)
        self.niqe = NIQE(self.rows_of(self.strangers, {"niqe"})["niqe"].astype(float)) if len(self.strangers) >= NIQE.least else None
        self.floor = None
        if len(self.strangers) > 1:
            self.floor = distances(self.real_rows, self.rows_of(self.strangers[:n], DISTANT), self.args, paired=False)

    def scores(self, rows, task):
        """One value a clip of every metric that has one: {name: (N,)}."""
        scores = {}
        if "dover" in rows:
            scores.update({f"VQA {k}".replace(" overall", ""): v for k, v in dover_fuse(*rows["dover"].astype(float).T).items()})
        if "clip" in rows:
            frames = rows["clip"].reshape(len(rows["clip"]), self.T, -1)
            scores.update(clip_scores(self.text("clip"), frames, first_given=task in ("i2v", "it2v")))
        if self.niqe:
            scores["NIQE-local"] = self.niqe.score(rows["niqe"].astype(float))
        if "judge" in rows:
            similarity = self.text("judge") @ rows["judge"].T
            scores.update({"R@1-local": recall(similarity), "R@1-local shuffled": recall(np.roll(similarity, -1, 0))})
        return scores

    def text(self, name):
        """Unit vectors of the captions by an extractor."""
        x = next(x for x in self.extractors if x.name == name)
        made_of = dict(captions=self.captions, by=x.key, code=self.code)
        return kept(self.folder, f"{name}-text", made_of, (len(self.captions), x.dim), np.float32, 64, lambda part: x.texts(self.captions[part]))

    def says(self):
        return [x.says(self.T, self.stickers.size) for x in self.extractors]


def extractors(args, T, set_hash):
    """All that can look at clips here: the stand-ins, the judge if one was fitted to this set, and what weights were named."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (args.i3d_eps or args.i3d_trust or args.i3d_frames != "loop") and not args.i3d:
        raise UserError("--i3d-eps, --i3d-trust and --i3d-frames: name the weights with --i3d FILE")
    found = [LocalRows(device), NIQERows()]
    if args.judge or Path(JUDGE).is_file():
        judge = JudgeRows(args.judge or JUDGE, device)
        if judge.set == set_hash:
            found.append(judge)
        elif args.judge:
            raise UserError(f"--judge {args.judge}: fitted to another set than {args.data}; `python evaluate.py --fit-judge --data {args.data}` fits one")
    if args.i3d:
        found.append(I3DRows(args.i3d, args.i3d_eps, args.i3d_frames, device, args.i3d_trust))
    if args.dover:
        found.append(DOVERRows(args.dover, args.seed, device))
    if args.clip:
        found.append(CLIPRows(args.clip, args.clip_model, T, device))
    return found


def fit(args):
    """Fit the judge of R@1-local; a few seconds."""
    stickers = StickerSet(args.data, "train")
    judge, report = fit_judge(stickers, args.seed)
    save_judge(args.judge or JUDGE, judge, set=stickers.meta["hash"], seed=args.seed, **report)
    print(f"{args.judge or JUDGE}: {report['stickers']} stickers of {report['concepts']} concepts, {report['seconds']} s")


# ------------------------------------------------------------------------------------------------ numbers
def mean_of(values, seed):
    return dict(mean=float(np.mean(values)), interval=bootstrap(values, seed=seed), clips=[round(float(v), 4) for v in values])


def unknown_psnr(clips, real, mask):
    """dB of each clip (N,), over the frames that are not given."""
    return psnr(clips[:, mask == 0], real[:, mask == 0])


def psnr_of(task, clips, real, decoded, mask, seed):
    """PSNR of the unknown frames, in dB: {model, copy, blend, vae, model - copy: mean, interval, clips}. White RGB clips."""
    if not mask.any():
        return None
    others = dict(model=clips, copy=copy_nearest(real, mask), vae=decoded)
    if mask.sum() > 1:                           # of one given frame it is the copy
        others["blend"] = blend(real, mask)
    values = {name: unknown_psnr(x, real, mask) for name, x in others.items()}
    values["model - copy"] = values["model"] - values["copy"]
    return {name: mean_of(v, seed) for name, v in values.items()}


def distances(reference, other, args, paired=True):
    """{n, m; FVD, FD-app, FD-mot (those whose features are there): value, interval; FVD at infinitely many clips and its error}."""
    n, m = (len(next(iter(x.values()))) for x in (reference, other))
    if n != m and not args.allow_unequal_n:
        raise UserError(f"{n} real clips against {m} others: a distance depends on n; choose --n {min(n, m)}, or --allow-unequal-n")
    result = dict(n=n, m=m)
    for name, (kind, distance) in DISTANCES.items():
        if kind in reference and kind in other:
            a, b = reference[kind].astype(float), other[kind].astype(float)
            result[name] = dict(value=distance(a, b), interval=bootstrap_fd(a, b, seed=args.seed, paired=paired and n == m, distance=distance))
            if name == "FVD" and min(n, m) >= 2 * a.shape[1]:   # of fewer clips than twice the features a line in 1/n says nothing
                result["FVD-inf"] = extrapolate(a, b, seed=args.seed)
    return result


def measure(run, test):
    """All numbers of a run: ({task: given, psnr, fd, fd of copying, scores}, distances of the VAE's round trip, {task: clips})."""
    args, real, T = run.args, test.real, test.T
    white, decoded = on_white(real), round_trip(run.sampler, real, args.batch)
    tasks, made = {}, {}
    for task in args.tasks:
        mask, (clips, made_of) = eval_mask(task, T, T), run.clips(task, test)
        rows = test.rows(run.folder / "eval", made_of, len(clips), clips.__getitem__)
        copied = distances(test.real_rows, test.rows_of_copies(mask, DISTANT), args) if mask.any() else None
        made[task] = clips
        tasks[task] = dict(given=np.flatnonzero(mask).tolist(), psnr=psnr_of(task, on_white(clips), white, on_white(decoded), mask, args.seed),
                           fd=distances(test.real_rows, rows, args), fd_copy=copied,
                           scores={name: mean_of(v, args.seed) for name, v in test.scores(rows, task).items()})
    trip = test.rows(run.folder / "eval", dict(vae=run.sampler.meta["vae"], of=test.files, set=test.set_hash), len(real), decoded.__getitem__, DISTANT)
    return tasks, distances(test.real_rows, trip, args), made


# ------------------------------------------------------------------------------------------------ output
def with_interval(value, interval, digits=2):
    return f"{value:.{digits}f} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def markdown(head, rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def psnr_table(tasks):
    def row(task, values):
        cell = lambda name: "-" if not values or name not in values else f"{values[name]['mean']:.2f}"
        full = lambda name: with_interval(values[name]["mean"], values[name]["interval"]) if values else "-"
        return [task, full("model"), cell("copy"), cell("blend"), cell("vae"), full("model - copy")]
    head = ["PSNR of unknown frames, dB", "model", "copy nearest", "blend in a loop", "VAE round trip", "model - copy"]
    return markdown(head, [row(task, t["psnr"]) for task, t in tasks.items()])


def fd_cells(d):
    names = [name for name in DISTANCES if name in d]
    infinite = [f"{d['FVD-inf'][0]:.1f} +- {d['FVD-inf'][1]:.1f}" if "FVD-inf" in d else "-"] if "FVD" in d else []
    n = str(d["n"]) if d["n"] == d["m"] else f"{d['n']} against {d['m']}"
    return [n, *(with_interval(**d[k], digits=1 if k == "FVD" else 2) for k in names[:1]), *infinite, *(with_interval(**d[k]) for k in names[1:])]


def fd_table(tasks, sets):
    fvd = ["FVD", "FVD-inf"] if "FVD" in sets["vae"] else []
    rows = [(name, d) for task, t in tasks.items() for name, d in ((task, t["fd"]), (f"copy nearest, {task}", t["fd_copy"])) if d]
    rows += [("VAE round trip", sets["vae"]), ("floor: real, other concepts", sets["floor"])]
    head = ["distance to the real clips", "n", *fvd, "FD-app", "FD-mot"]
    return markdown(head, [[name, *(fd_cells(d) if d else ["-"] * (len(head) - 1))] for name, d in rows])


def score_table(tasks, real):
    """Mean of every score a clip, of the tasks and of the real stickers."""
    rows = [*((task, t["scores"]) for task, t in tasks.items()), ("real stickers", real)]
    names = list(dict.fromkeys(name for _, scores in rows for name in scores))
    cell = lambda scores, name: with_interval(scores[name]["mean"], scores[name]["interval"], 3) if name in scores else "-"
    return markdown(["mean of a clip", *names], [[row, *(cell(scores, name) for name in names)] for row, scores in rows]) if names else ""


def first_line(report):
    settings = "; ".join(f"{name}: " + ", ".join(f"{k} {v}" for k, v in of.items()) for name, of in report["sampler"].items())
    groups = f" ({', '.join(report['groups'])})" if report["groups"] else ""
    return (f"{report['model']} (SHA-256 {report['sha256'][:12]}, step {report['step']}); {report['split']} split of {report['data']}{groups}, "
            f"n = {report['n']} concepts, seed {report['seed']}; {settings}; {report['protocol']}; 95 % intervals")


def write_sheet(path, generated, real, records, rows):
    """The first clips of each task, given frames framed, each above its ground truth."""
    clips, labels, marks = [], [], []
    for task, made in generated.items():
        mask = eval_mask(task, real.shape[1], real.shape[1]) > 0
        for k in range(min(rows, len(made))):
            clips += [made[k], real[k]]
            labels += [f"{task}: {records[k]['caption']}", "ground truth"]
            marks += [mask, np.zeros_like(mask)]
    save_sheet(path, clips, labels, marks)


def save_sheet(path, clips, labels, marks=None):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(clips, path, labels=labels, marks=marks)
    print(path)


def changes(trained, first):
    """["field=value"] of flat configurations where `trained` differs from `first`."""
    return [f"{k.split('.', 1)[-1]}={json.dumps(v)}" for k, v in trained.items() if first.get(k) != v]


def read_run(run):
    """What a run was trained with, flat; its evaluation; and as cells of a table its last step, core-seconds of all steps (rank 0, without loaders), margins, distances."""
    try:
        config = json.loads((Path(run) / "config.json").read_text())
        trained = flat(dict(train={k: v for k, v in config["train"].items() if k not in ("set", "out")}, model=config["model"]))
        log = [line for _, line in read_jsonl(Path(run) / "log.jsonl")]
        report = json.loads((Path(run) / "eval.json").read_text())
        margins = [with_interval(m["mean"], m["interval"]) for m in (t["psnr"]["model - copy"] for t in report["tasks"].values() if t["psnr"])]
        distances = [f"{t['fd']['FD-app']['value']:.2f}, {t['fd']['FD-mot']['value']:.2f}" for t in report["tasks"].values()]
        trained["train.seed"], [report[key] for key in ("split", "n", "seed", "protocol")]   # named in the head
        return trained, report, [str(log[-1]["step"]), f"{sum(line['cpu_s'] for line in log):.0f}", *margins, *distances]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"--compare {run}: config.json, log.jsonl and eval.json of a dfgn run are needed ({error}); `python evaluate.py --run {run}` makes the last") from None


def compare(runs):
    """A table with a row for each run: how it differs from the first, its core-seconds, and what evaluate.py measured."""
    reports = {run: read_run(run) for run in runs}
    first, report, _ = reports[runs[0]]
    for run, (_, other, _) in reports.items():
        for key in ("set", "split", "files", "seed", "protocol", "sampler", "metrics"):
            if other.get(key) != report.get(key):
                raise UserError(f"--compare {run}: evaluated with another {key} than {runs[0]}; evaluate both alike")
        if list(other["tasks"]) != list(report["tasks"]):
            raise UserError(f"--compare {run}: evaluated on other --tasks than {runs[0]}; evaluate both alike")
    rows = [[Path(run).name, ", ".join(changes(trained, first)) or "-", *cells] for run, (trained, _, cells) in reports.items()]
    given = [f"{task}, dB over copying" for task, t in report["tasks"].items() if t["psnr"]]
    head = ["run", "differs in", "steps", "core-s of the steps", *given, *(f"{task}, FD-app, FD-mot" for task in report["tasks"])]
    return (f"{report['split']} split, n = {report['n']} concepts, trained with seed {first['train.seed']}, evaluated with {report['seed']}; "
            f"{report['protocol']}; 95 % intervals of the differences\n\n{markdown(head, rows)}")


# ------------------------------------------------------------------------------------------------ the paper's tables
SPEC = dict(temporal="sti", ddu=True, curriculum="adaptive")   # RDTF: every part of the paper
TABLES = {  # tasks with the key of the paper's numbers, and what a row's runs are trained with; methods that are not of this repository have none
    "1": (dict(it2v="table1_it2v"), {"RDTF": SPEC}),
    "2": (dict(interpolation="table2_interpolation", prediction_forward="table2_prediction", prediction_backward="table2_prediction"), {"RDTF": SPEC}),
    "3": (dict(it2v="table3_modules_it2v"), {"DFGN(3D-Conv)": dict(temporal="conv3d", ddu=False, curriculum="none"), "DFGN": dict(SPEC, ddu=False, curriculum="none"),
                                             "DFGN + DDU": dict(SPEC, curriculum="none"), "DFGN + DDU + DCL": SPEC}),
    "4": (dict(it2v="table4_curriculum_it2v"), {"RDTF w/o CL": dict(SPEC, curriculum="none"), "RDTF w/ LCL": dict(SPEC, curriculum="linear"), "RDTF w/ DCL": SPEC})}
WITHOUT_DDU = dict(tasks=["it2v"], frames="full", still_share=0.0)   # one task on whole clips: no use of dual masks
WATCHED = ("seed", "out", "workers", "log_every", "save_every", "set", "data", "vae", "clip_weights", "stage")   # no choice of a method; what data and VAE hold is in "inputs"


def find_runs(folders):
    """Run folders with a DFGN that is trained to its end, among the folders and all below them: {folder: config.json, newer fields at their defaults}."""
    found = {}
    for path in sorted(path for folder in folders for path in Path(folder).rglob("config.json")):
        try:
            config = json.loads(path.read_text())
            config["train"] = {**vars(TrainConfig()), **config["train"]}
            if config["train"]["stage"] == "dfgn" and config["model"] and last_step(path.parent) == config["train"]["steps"] and describe(config):
                found[path.parent] = config
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            print(f"{path}: left out, not a run of train.py ({type(error).__name__})", file=sys.stderr)
    if not found:
        raise UserError(f"--runs {' '.join(folders) or '(none named)'}: no folder with config.json and model.safetensors of a DFGN that is trained to its end")
    return found


def last_step(folder):
    """The step of a run's model; None without one."""
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        return None
    try:
        return read_metadata(path)["step"]
    except SafetensorError as error:
        raise ValueError(error) from None


def describe(config):
    """(what a row of a table asks for, how dual masks are used, all else that matters) of a run, as JSON text."""
    trained = flat(dict(train={k: v for k, v in config["train"].items() if k not in WATCHED}, model=config["model"], inputs=config.get("inputs", {})))
    masks = {k: trained.pop(f"train.{k}") for k in WITHOUT_DDU}
    whole = not masks["tasks"] and masks["frames"] != "full"
    ddu = False if masks == WITHOUT_DDU else True if whole else "in part"
    spec = dict(temporal=trained.pop("model.dfgn.temporal"), ddu=ddu, curriculum=trained.pop("train.curriculum"))
    return spec, json.dumps(masks), json.dumps(trained, sort_keys=True)


def choose(found, specs):
    """({row: runs of different seeds}, {run left out: why}): the runs that fill most rows and are alike in all but what the rows are about."""
    described = {folder: describe(config) for folder, config in found.items()}

    def alike(like):
        _, masks, rest = like
        members = [f for f, (spec, m, r) in described.items() if r == rest and (m == masks or not spec["ddu"])]
        rows = {row: {found[f]["train"]["seed"]: f for f in reversed(members) if described[f][0] == spec} for row, spec in specs.items()}
        return {row: sorted(runs.values()) for row, runs in rows.items() if runs}
    best = max((alike(like) for like in described.values()), key=lambda rows: (len(rows), sum(map(len, rows.values()))))
    if not best:
        raise UserError(f"--runs: none of {len(found)} runs is a row of this table: {'; '.join(f'{row}: {spec}' for row, spec in specs.items())}")
    used = [f for runs in best.values() for f in runs]
    seen = {f: {k: v for k, v in flat(config).items() if k.split(".")[-1] not in WATCHED} for f, config in found.items()}
    why = lambda f: ", ".join(min((changes(seen[f], seen[g]) for g in used), key=len))
    return best, {str(f): why(f) or "the same as another" for f in found if f not in used}


class Cell:
    """What a row holds for a task: for every metric a function of which clips (array of numbers) are looked at, the mean over runs."""

    def __init__(self, test, task, measured):
        self.metrics, n = {}, len(test.records)
        for name, (kind, distance) in DISTANCES.items():
            if kind in test.real_rows:
                self.metrics[name] = lambda i, kind=kind, distance=distance: np.mean([distance(test.real_rows[kind][i].astype(float), rows[kind][i].astype(float)) for rows, _ in measured])
        for name in measured[0][1]:
            values = np.mean([scores[name] for _, scores in measured], 0)
            self.metrics[name] = lambda i, values=values: values[i].mean()
        self.points = {name: float(of(np.arange(n))) for name, of in self.metrics.items()}

    def resample(self, draws):
        """Every metric on every draw of clips (draws, n), moved so that their median is the value: resampled distances are biased."""
        values = {name: np.array([of(i) for i in draws]) for name, of in self.metrics.items()}
        self.draws = {name: v - np.median(v) + self.points[name] for name, v in values.items()}
        return self


def between(draws):
    return [float(x) for x in np.percentile(draws, (2.5, 97.5))]


def cells_of(test, task, rows, args):
    """{row: Cell} with one paired set of draws for all rows, {row: {metric: difference to the last row, interval}}."""
    draws = np.random.default_rng(args.seed).integers(len(test.records), size=(200, len(test.records)))
    cells = {row: Cell(test, task, measured).resample(draws) for row, measured in tqdm(rows.items(), f"{task}, intervals")}
    last = list(cells.values())[-1]
    less = {row: {m: (c.points[m] - last.points[m], between(c.draws[m] - last.draws[m])) for m in c.points if m in last.points}
            for row, c in cells.items() if c is not last}
    return cells, less


def measured(run, test, task):
    """(rows, scores) of a run for a task; PSNR is in dB over copying the nearest given frame."""
    clips, made_of = run.clips(task, test)
    rows, mask, real = test.rows(run.folder / "eval", made_of, len(clips), clips.__getitem__), eval_mask(task, test.T, test.T), on_white(test.real)
    margin = unknown_psnr(on_white(clips), real, mask) - unknown_psnr(copy_nearest(real, mask), real, mask)
    return rows, {**test.scores(rows, task), "dB over copying": margin}


COLUMNS = ("FVD", "VQA", "CLIP", "FD-app", "FD-mot", "NIQE-local", "R@1-local", "dB over copying")   # of tables; the JSON has all


def table_markdown(paper, cells, less, runs, seeds):
    """One task: the paper's numbers, ours with intervals, and the paired differences to the last row."""
    published = list(dict.fromkeys(k for row in paper.values() for k in row))
    names = [m for m in COLUMNS if m in published or any(m in c.points for c in cells.values())]
    full = lambda c, m: with_interval(c.points[m], between(c.draws[m])) if c and m in c.points else "-"
    rows = [[row, *(f"{paper[row][m]:g}" if m in paper.get(row, {}) else "-" for m in published), seeds.get(row, "-"), *(full(cells.get(row), m) for m in names)]
            for row in dict.fromkeys((*paper, *cells))]
    text = markdown(["method", *(f"{m}, paper" for m in published), "our runs, seeds", *(f"{m}, ours" if m in published else m for m in names)], rows)
    if less:
        rows = [[row, *(with_interval(*values[m]) if m in values else "-" for m in names)] for row, values in less.items()]
        text += "\n\n" + markdown([f"less {list(runs)[-1]}, paired", *names], rows)
    return text


def table(args):
    """A table of the paper: markdown on stdout, JSON and a plot beside it."""
    out = Path(args.out or f"out/table-{args.table}.json")
    if args.table in ("6", "7", "8"):
        rows = table6(args) if args.table == "6" else table7() if args.table == "7" else table8(args)
        write_json(out, rows)
        return print(markdown(rows[0], rows[1:]), out, sep="\n\n")
    keys, specs = TABLES[args.table]
    found = find_runs(args.runs)
    runs, left_out = choose(found, specs)
    model = found[next(iter(runs.values()))[0]]["model"]
    test, paper = Test(args, model["frames"], model["vae"]["size"]), json.loads(PAPER.read_text())
    test.measure_real()
    seeds = {row: f"{len(folders)}: {', '.join(str(found[f]['train']['seed']) for f in folders)}" for row, folders in runs.items()}
    first, looks = found[next(iter(runs.values()))[0]]["train"], {}
    for folder in itertools.chain(*runs.values()):                # each network is in memory once, and alone
        run = Run(folder, args)
        settings = run.settings(True)                             # alike in all of them, as the presets are
        looks[folder] = {task: measured(run, test, task) for task in keys}
    head = (f"Table {args.table}: {args.split} split of {args.data}, n = {len(test.records)} concepts, clips of seed {args.seed}; {first['preset']} preset, {first['steps']} steps of "
            f"batch {first['batch']}; {test.T} evenly spaced frames, {test.stickers.size} px, on white; {', '.join(f'{k} {v}' for k, v in settings.items())}; "
            f"95 % paired bootstrap intervals over concepts of the mean over seeds. The paper's numbers are of VSD2M at 256 px: compare orders, not values")
    report, plots, text = dict(table=args.table, head=head, metrics=test.says(), left_out=left_out, floor=test.floor, tasks={}), {}, [head, "\n".join(test.says())]
    for task, key in keys.items():
        copied = test.rows_of_copies(eval_mask(task, test.T, test.T))
        rows = {"copy nearest": [(copied, {**test.scores(copied, task), "dB over copying": np.zeros(len(test.records))})],
                **{row: [looks[f][task] for f in folders] for row, folders in runs.items()}}
        cells, less = cells_of(test, task, rows, args)
        of_paper = paper[key]["rows"]
        plots[task] = cells, of_paper
        report["tasks"][task] = dict(paper=of_paper, runs={row: list(map(str, f)) for row, f in runs.items()}, difference=less,
                                     ours={row: {m: dict(value=c.points[m], interval=between(c.draws[m])) for m in c.points} for row, c in cells.items()})
        note = "; the paper has one number for both directions" if key == "table2_prediction" else ""
        text += [f"**{task}**{note}", table_markdown(of_paper, cells, less, runs, seeds)]
    if test.floor:
        text.append("Floor, real clips of other concepts: " + ", ".join(f"{m} {with_interval(**test.floor[m])}" for m in DISTANCES if m in test.floor))
    text += [f"Left out: {folder} ({why})" for folder, why in left_out.items()]
    write_json(out, report)
    plot_table(out.with_suffix(".png"), plots)
    print(*text, f"{out}, {out.with_suffix('.png')}", sep="\n\n")


def plot_table(path, plots):
    """A row of panels a task: ours as points with intervals, the paper's as diamonds on an axis of their own."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    panels = [[(m, False) for m in COLUMNS if any(m in c.points for c in cells.values())] + [(m, True) for m in next(iter(paper.values()))] for cells, paper in plots.values()]
    wide = max(map(len, panels))
    fig, axes = plt.subplots(len(plots), wide, figsize=(2.6 * wide + 1.5, 1.2 + 1.8 * len(plots)), constrained_layout=True, squeeze=False)
    for (task, (cells, paper)), line, row in zip(plots.items(), panels, axes):
        names = list(dict.fromkeys((*paper, *cells)))[::-1]
        for axis, (metric, published) in itertools.zip_longest(row, line, fillvalue=(None, None)):
            if metric is None:
                axis.axis("off")
                continue
            for y, name in enumerate(names):
                if published and name in paper:
                    axis.plot(paper[name][metric], y, "kD", fillstyle="none")
                elif not published and name in cells and metric in cells[name].points:
                    low, high = between(cells[name].draws[metric])
                    axis.plot([low, high], [y, y], "C0-")
                    axis.plot(cells[name].points[metric], y, "C0o")
            axis.set(yticks=range(len(names)), yticklabels=names if axis is row[0] else [], ylim=(-0.5, len(names) - 0.5), title=f"{metric}, {'paper' if published else 'ours'}")
            axis.title.set_fontsize(9)
        row[0].set_ylabel(task)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def hyper_parameters(config, trained, sampling):
    """What a configuration really uses of the paper's Table 6, read off the network where it is built in: {part.name: value}."""
    with torch.device("meta"):
        net = RDTF(config)
    sti = next((m for m in net.dfgn.modules() if isinstance(m, STI)), None)
    v, c, d, side = config.vae, config.dfgn, config.diffusion, config.vae.size // config.vae.factor
    return {"vae.f": v.factor, "vae.latent": f"{side}x{side}x{v.latent_channels}", "unet.in_channels": 2 * c.channels, "unet.out_channels": c.channels,
            "unet.layers_per_block": c.layers, "unet.head_channels": c.head_dim, "unet.text_width": c.text_width, "unet.text_length": config.text.length,
            "sti.conv_kernel": list(sti.detail[0].conv.kernel_size) if sti else "-", "sti.conv_layers": len(sti.detail) if sti else "-",
            "sti.attention_layers": 1 if sti else "-", "sti.heads": c.sti_heads if sti else "-", "sti.head_dim": c.sti_head_dim if sti else "-",
            "dual_mask.k": [config.frames] * 2 if trained["frames"] == "full" else [3, config.frames], "curriculum.Kp": KP, "curriculum.Ki": KI, "curriculum.Kd": KD,
            "training.parameterization": d.prediction, "training.learnable": "full", "training.steps": trained["steps"], "training.lr": trained["lr"],
            "training.batch_per_gpu": f"{trained['batch']} over all processes", "training.gpus": "-", "training.gpu": "-",
            "diffusion.steps": d.steps, "diffusion.schedule": d.schedule, "diffusion.beta_0": d.beta_start, "diffusion.beta_T": d.beta_end,
            "sampling.sampler": "DDIM", **{f"sampling.{k}": sampling[k] for k in ("steps", "eta", "text_scale", "image_scale")}}


def table6(args):
    """Rows of Table 6: name, paper, and what the presets and the named runs use."""
    use = lambda config, trained: hyper_parameters(config, trained, defaults(config.name, True))
    used = {f"preset {name}": use(PRESETS[name], vars(TrainConfig())) for name in ("paper", "mini")}
    for folder, config in (find_runs(args.runs) if args.runs else {}).items():
        used[str(folder)] = use(Config.from_dict(config["model"]), config["train"])
    paper = flat(json.loads(PAPER.read_text())["table6_hyperparameters"])
    return [["hyper-parameter", "paper", *used]] + [[k, str(v), *(str(u[k]) for u in used.values())] for k, v in paper.items()]


def table7():
    """Rows of Table 7: the paper's condition masks, those that training draws at 8 frames, and the one that evaluation uses."""
    paper = json.loads(PAPER.read_text())["table7_condition_masks"]
    text = lambda mask: "".join(str(int(m)) for m in mask)
    kind = dict(interpolation="interpolation", prediction_forward="prediction", prediction_backward="prediction")
    rows = []
    for task in TASKS:
        entries = paper[kind.get(task, "generation")]
        own = [e if isinstance(e, str) else e["mask"] for e in entries if isinstance(e, str) or e["text"] == (task == "it2v")] if task != "t2v" else []
        drawn = [text(mask_of(given, 8)) for given in given_frames(task, 8)]
        rows.append([task, ", ".join(own) or "-", ", ".join(drawn), text(eval_mask(task, 8, 8))])
    return [["task", "paper", "training draws one of", "evaluation"]] + rows


@torch.no_grad()
def table8(args, preset=PRESETS["paper"], rounds=3):
    """Rows of Table 8: parameters and seconds of the paper's methods, and ours on this machine: a forward pass, and 50 DDIM steps under both
    guidances without the VAE (on a CPU --steps of them, one if not said, and 50 / steps times as long). Random weights: they change no speed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, T, side = RDTF(preset).to(device).eval(), preset.frames, preset.vae.side
    batch = bench.clip_batch(preset.dfgn, 1, T, side, device)
    works = {name: functools.partial(bench.forward, net.dfgn, batch, bf16) for name, bf16 in (("float32", False), ("bf16", True))}
    taken, linear = bench.compare(works, rounds, device)
    gflop, steps = bench.gflop(preset.dfgn, 1, T, side), args.steps or (50 if device.type == "cuda" else 1)
    mask = torch.zeros(1, T, device=device)
    mask[:, 0] = 1
    given = dict(known=batch["known"], cond_mask=mask, rngs=[np.random.default_rng(args.seed)],
                 tower=None if net.text else lambda tokens: torch.zeros(len(tokens), 77, preset.dfgn.text_width, device=device))
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    rows = [["method", "on", "parameters, B", "forward, s", "GFLOP/s", f"of linear's {linear:.0f} GFLOP/s", "50 DDIM steps, s"]]
    rows += [[f"{method} (paper)", "V100", f"{r['params_B']}", f"{r['seconds']}", "-", "-", "-"] for method, r in json.loads(PAPER.read_text())["table8_cost"]["rows"].items()]
    for precision, t in taken.items():
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            sample = bench.seconds(lambda: ddim(net, tokenize(["a cat"]), **given, **{**DEFAULTS, "steps": steps}))
        rows.append([f"RDTF here, {precision}", name, f"{count(net.dfgn) / 1e9:.3f}", f"{t:.2f}", f"{gflop / t:.0f}", f"{gflop / t / linear:.2f}",
                     f"{sample:.1f}" if steps == 50 else f"{50 / steps * sample:.0f} ({steps} measured)"])
    return rows


# ------------------------------------------------------------------------------------------------ do the metrics see damage?
DAMAGES = {  # strengths, mild to strong
    "blur, sigma in px": (0.5, 1, 2), "noise, of 255": (4, 10, 25), "JPEG quality": (60, 30, 12), "shuffled frames, at most so far": (1, 3, 7),
    "frozen frames at the end": (2, 4, 6), "repeats, each of": (2, 5, 20), "wrong captions, %": (25, 50, 100)}


def damage(clips, kind, strength, rng):
    """White clips (n, T, S, S, 3) uint8, damaged; wrong captions leave them as they are."""
    n, T = clips.shape[:2]
    if kind.startswith("blur"):
        return np.stack([gaussian_filter(clip.astype(np.float32), (0, strength, strength, 0), mode="nearest").round().astype(np.uint8) for clip in clips])
    if kind.startswith("noise"):
        return np.stack([(clip + strength * rng.standard_normal(clip.shape, np.float32)).round().clip(0, 255).astype(np.uint8) for clip in clips])
    if kind.startswith("JPEG"):
        return np.stack([jpeg(frame, strength) for frame in clips.reshape(-1, *clips.shape[2:])]).reshape(clips.shape)
    if kind.startswith("shuffled"):              # sorting t + noise moves no frame farther than the noise reaches
        order = np.argsort(np.arange(T) + rng.uniform(0, strength + 1, (n, T)), 1, kind="stable")
        return np.take_along_axis(clips, order[:, :, None, None, None], 1)
    if kind.startswith("frozen"):
        return clips[:, np.minimum(np.arange(T), T - 1 - strength)]
    if kind.startswith("repeats"):
        return clips[rng.permutation(n)[np.arange(n) % max(n // strength, 1)]]
    return clips


def jpeg(frame, quality):
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def wrong_captions(n, percent, rng):
    """Which caption each of n clips has when this share of them are passed around among themselves."""
    order, chosen = np.arange(n), rng.permutation(n)[:max(2, round(n * percent / 100))]
    order[chosen] = np.roll(chosen, 1)
    return order


def split_concepts(stickers, n, T, rng):
    """Two lists of up to n animated stickers of the training split with no concept in common, all variants allowed, of equal length."""
    rows = np.flatnonzero((stickers.split == "train") & (stickers.lengths >= T))
    concepts = np.unique(stickers.concept[rows])
    first = np.isin(stickers.concept[rows], concepts[rng.permutation(len(concepts))[:len(concepts) // 2]])
    halves = [rows[first], rows[~first]]
    n = min(n, *map(len, halves))
    if n < 2:
        raise UserError("--check-metrics: the training split has too few concepts with an animation for two halves")
    return [[stickers.records[half[i]] for i in rng.permutation(len(half))[:n]] for half in halves]


def react(test, seed, args):
    """{metric: {"real": value, damage: [values]}} of one seed. Distances: of damaged stickers to others of other concepts; the rest: of held-out ones."""
    rng, values = np.random.default_rng(seed), defaultdict(lambda: defaultdict(list))
    reference, others = (to_white(read_clips(test.stickers, half, test.T)) for half in split_concepts(test.stickers, args.n, test.T, rng))
    held = pick(test.stickers, 512, test.T, seed, test.stickers.split != "train")
    shown, captions = to_white(read_clips(test.stickers, held, test.T)), np.array([r["caption"] for r in held])
    look = lambda clips, kinds: {x.name: np.concatenate([x(clips[i:i + x.batch]) for i in range(0, len(clips), x.batch)]).astype(float) for x in test.extractors if x.name in kinds}
    single = {"niqe", "judge", "clip", "dover"}
    rows = look(reference, DISTANT)
    one_each = pick(test.stickers, 512, test.T, seed, test.stickers.split == "train")    # twins on both sides would look alike
    test.niqe = NIQE(look(to_white(read_clips(test.stickers, one_each, test.T)), {"niqe"})["niqe"]) if len(one_each) >= NIQE.least else None

    def record(key, clips, shown, captions):
        test.captions = captions.tolist()
        seen = look(clips, DISTANT)
        for name, (kind, distance) in DISTANCES.items():
            if kind in seen:
                values[name][key].append(distance(rows[kind], seen[kind]))
        for name, scores in test.scores(look(shown, single), "t2v").items():
            values[name][key].append(float(scores.mean()))
    record("real", others, shown, captions)
    for kind, strengths in tqdm(DAMAGES.items(), f"seed {seed}"):
        for strength in strengths:
            order = wrong_captions(len(held), strength, rng) if kind.startswith("wrong") else np.arange(len(held))
            record(kind, damage(others, kind, strength, rng), damage(shown, kind, strength, rng), captions[order])
    return values, len(reference), len(held)


def check_metrics(args, seeds=3):
    """Print and keep, for every metric that can be computed here, what damage does to it: factors over the undamaged value."""
    args.split = "test"
    test = Test(args)
    results = [react(test, args.seed + s, args) for s in range(seeds)]
    values, names = [r[0] for r in results], [m for m in (*DISTANCES, "VQA", "CLIP", "CLIP R@1", "NIQE-local", "R@1-local") if m in results[0][0] and all(v[m]["real"][0] for v, *_ in results)]
    report, rows = {}, []
    for kind, strengths in DAMAGES.items():
        cells = []
        for name in names:
            factors = np.array([np.array(v[name][kind]) / v[name]["real"][0] for v in values])       # (seeds, strengths)
            mean, step = factors.mean(0), np.diff(np.r_[1, factors.mean(0)])
            worse = step >= 0 if name in DISTANCES else step <= 0
            verdict = " blind" if abs(mean - 1).max() < 0.1 else "" if worse.all() else " not monotone"
            cells.append(" ".join(f"{m:.2f}" if m < 10 else f"{m:.0f}" for m in mean) + verdict)
            report.setdefault(name, {})[kind] = dict(strengths=strengths, factors=factors.tolist(), verdict=verdict.strip() or "monotone")
        rows.append([f"{kind}: {', '.join(map(str, strengths))}", *cells])
    real = [" ".join(f"{v[name]['real'][0]:.3g}" for v in values) for name in names]
    head = (f"Factors over the undamaged value, mean of {seeds} seeds. Distances: {results[0][1]} stickers of the training split against as many of other concepts, the undamaged "
            f"value is the real-versus-real floor, above 1 is worse. The others: {results[0][2]} stickers of held-out concepts, below 1 is worse. {args.data}, seeds {args.seed} to {args.seed + seeds - 1}")
    out = args.out or "out/check-metrics.json"
    write_json(out, dict(head=head, metrics=test.says(), undamaged={name: [v[name]["real"][0] for v in values] for name in names}, damaged=report))
    print(head, "\n".join(test.says()), markdown(["damage", *names], [["none: value, by seed", *real], *rows]), out, sep="\n\n")


# ------------------------------------------------------------------------------------------------ user study, Table 5
CRITERIA = dict(text="Which fits the text best?", interest="Which is the most interesting?", motion="Which moves best?")


def require(fact, message):
    if not fact:
        raise UserError(message)


def data_uri(frames, duration):
    """(T, S, S, 4) uint8 straight RGBA -> data URI of a lossless WebP; one frame: a still."""
    with tempfile.TemporaryDirectory() as folder:
        write_animation(file := Path(folder) / "sticker.webp", frames, duration)
        return "data:image/webp;base64," + base64.b64encode(file.read_bytes()).decode()


def check_methods(methods):
    require(2 <= len(set(methods)) == len(methods) <= 26, f"--study {' '.join(methods)}: 2 to 26 methods of different names can be ranked")


def check_study(inputs, methods):
    check_methods(methods)
    require(inputs, "--study: no input with a sticker of each method")
    for k, x in enumerate(inputs, 1):
        require(x["caption"].strip(), f"--study: input {k} has no caption, so nobody can say how well its stickers fit the text")
        require(set(methods) <= set(x["clips"]), f"--study: input {k}, \"{x['caption']}\", lacks a sticker of some method")


def blind(k, x, methods, seed, duration):
    """Input k as the page shows it, methods hidden by codes and shuffled, and as the key has it."""
    order = np.random.default_rng((seed, k)).permutation(len(methods))
    codes = {hash_of([seed, k, x["caption"], methods[i]]): methods[i] for i in order}
    stickers = [dict(code=code, image=data_uri(x["clips"][method], duration)) for code, method in codes.items()]
    given = [data_uri(frame[None], duration) for frame in x["given"]]
    return dict(caption=x["caption"], given=given, stickers=stickers), dict(caption=x["caption"], codes=codes)


def write_study(path, inputs, methods, seed, duration=125):
    """Write the page, and beside it PATH.key.json, which alone tells the methods. The same arguments write the same bytes.

    inputs: [{caption, given: stills (S, S, 4) or empty, clips: {method: (T, S, S, 4)}}], uint8 straight RGBA; duration: ms a frame.
    UserError: not 2 to 26 methods of different names, no input, a blank caption, a sticker missing."""
    check_study(inputs, methods)
    shown, key = zip(*(blind(k, x, methods, seed, duration) for k, x in enumerate(inputs)))
    page = dict(id=hash_of([CRITERIA, shown]), criteria=[dict(name=n, question=q) for n, q in CRITERIA.items()], inputs=shown)
    content = json.dumps(page).replace("<", "\\u003c")          # a caption may hold </script>
    html = Path(__file__).with_name("assets").joinpath("study.html").read_text("utf-8").replace("__STUDY__", content)
    secret = dict(study=page["id"], seed=seed, criteria=list(CRITERIA), methods=list(methods), inputs=key)
    write_atomically(Path(path).with_suffix(".key.json"), lambda p: p.write_text(json.dumps(secret, indent=1)))
    write_atomically(path, lambda p: p.write_text(html, "utf-8"))


def read_object(path, *fields):
    try:
        value = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({getattr(error, 'strerror', None) or error})") from None
    require(isinstance(value, dict) and set(fields) <= set(value), f"{path}: not a JSON object with {', '.join(fields)}")
    return value


def read_answers(path, key):
    """A participant's file -> participant, scores (inputs, criteria, methods): of m methods the best has m, the worst 1."""
    result, methods, criteria, n = read_object(path, "study", "participant", "answers"), key["methods"], key["criteria"], len(key["inputs"])
    require(result["study"] == key["study"], f"{path}: answers to another study than {key['study']}")
    require(isinstance(participant := result["participant"], str) and participant, f"{path}: does not say who the participant is")
    whole = isinstance(answers := result["answers"], list) and all(isinstance(a, dict) and set(a) == set(criteria) for a in answers)
    require(whole and len(answers) == n, f"{path}: does not answer {', '.join(criteria)} for each of the {n} inputs")
    scores = np.zeros((n, len(criteria), len(methods)))
    for k, (answer, codes) in enumerate(zip(answers, (x["codes"] for x in key["inputs"]))):
        for c, ranking in enumerate(answer[criterion] for criterion in criteria):
            once = isinstance(ranking, list) and len(ranking) == len(codes) and all(code in ranking for code in codes)
            require(once, f"{path}: input {k + 1}, {criteria[c]}, does not rank each sticker exactly once")
            scores[k, c, [methods.index(codes[code]) for code in ranking]] = range(len(methods), 0, -1)
    return participant, scores


def two_way_bootstrap(scores, draws=2000, seed=0):
    """95 % intervals (2, ...) of the mean of scores (participants, inputs, ...), both resampled; rather too wide than too narrow."""
    rng = np.random.default_rng(seed)
    people, inputs = (rng.multinomial(n, np.full(n, 1 / n), size=draws) / n for n in scores.shape[:2])
    return np.percentile(np.einsum("dp,di,pi...->d...", people, inputs, scores, optimize=True), (2.5, 97.5), axis=0)


def study_results(key_path, result_paths):
    """-> {participants, inputs, scores: {method: {criterion: {value, interval}}}}: mean rank scores, the higher the better.

    UserError, naming the file: not JSON, of another study, a ranking missing or not of each sticker once, a participant twice."""
    key, files, scores = read_object(key_path, "study", "criteria", "methods", "inputs"), {}, []
    require(result_paths, f"--study-results: no answers to the study of {key_path}")
    for path in result_paths:
        participant, of_one = read_answers(path, key)
        require(participant not in files, f"{path}: participant {participant} is in {files.get(participant)} already")
        files[participant] = path
        scores.append(of_one)
    scores = np.stack(scores)                    # (participants, inputs, criteria, methods)
    cells = np.transpose([scores.mean((0, 1)), *two_way_bootstrap(scores)]).tolist()    # of methods, criteria; value, low, high
    row = lambda of_method: {criterion: dict(value=value, interval=ends) for criterion, (value, *ends) in zip(key["criteria"], of_method)}
    return dict(participants=len(scores), inputs=scores.shape[1], scores=dict(zip(key["methods"], map(row, cells))))


def study_table(results):
    """Markdown: who was asked, a row for each method of the study or of the paper, and why the two scales differ."""
    scores, m, missing = results["scores"], len(results["scores"]), ["-"] * len(CRITERIA)
    ours = lambda method: [with_interval(**scores[method][c]) for c in CRITERIA] if method in scores else missing
    published = json.loads(PAPER.read_text())["table5_user_study"]["rows"]
    paper = lambda method: [f"{published[method][c]:.2f}" for c in CRITERIA] if method in published else missing
    rows = [[method, *ours(method), *paper(method)] for method in dict.fromkeys([*scores, *published])]
    said = f"participants: {results['participants']}, inputs: {results['inputs']}; mean rank, best of {m} = {m}, worst = 1; 95 % intervals over both"
    note = (f"Each column of ours sums to {m * (m + 1) // 2}, of the paper's to 8.0 (motion: 7.99) over 4 methods, where ranks 1 to 4 would sum to 10: its scale "
            "differs by something that the paper does not say. Compare the order of the methods, not the numbers.")
    return "\n\n".join([said, markdown(["method", *CRITERIA, *(f"{c}, paper" for c in CRITERIA)], rows), note])


def study(args):
    """A page on which runs are compared, for a task of --tasks with the first of the test's concepts."""
    methods = [Path(folder).resolve().name for folder in args.study]
    check_methods(methods)                       # before the sampling, which takes minutes
    runs, out = [Run(folder, args) for folder in args.study], Path(args.out or "out/study.html")
    sizes = {(run.sampler.T, run.sampler.size) for run in runs}
    if len(sizes) > 1:
        raise UserError(f"--study {' '.join(args.study)}: frames and pixels differ, {sorted(sizes)}; compare runs of one size")
    test = Test(args, *sizes.pop())
    inputs = []
    for task in args.tasks:
        made, given = [run.clips(task, test)[0] for run in runs], np.flatnonzero(eval_mask(task, test.T, test.T))
        inputs += [dict(caption=caption, given=list(test.real[k][given]), clips={m: clips[k] for m, clips in zip(methods, made)}) for k, caption in enumerate(test.captions)]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_study(out, inputs, methods, args.seed)
    print(f"{out}: {len(inputs)} inputs, {len(methods)} methods; give this file to participants", f"{out.with_suffix('.key.json')}: which sticker is whose; keep it", sep="\n")


def print_study(args):
    """The table of what participants downloaded."""
    if not args.key:
        raise UserError("--study-results: name the page's .key.json with --key")
    results = study_results(args.key, [path for path in args.study_results if not path.endswith(".key.json")])
    if args.out:
        write_json(args.out, results)
    print(study_table(results))


# ------------------------------------------------------------------------------------------------ command line
def read_prompts(path):
    """Captions: one a line, or a JSON list of strings."""
    if not Path(path).is_file():
        raise UserError(f"--prompts {path}: no such file")
    text = Path(path).read_text()
    try:
        prompts = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except ValueError as error:
        raise UserError(f"--prompts {path}: not a JSON list ({error})") from None
    if not all(isinstance(p, str) for p in prompts) or not (prompts := [p.strip() for p in prompts if p.strip()]):
        raise UserError(f"--prompts {path}: write one caption a line, or a JSON list of them")
    return prompts


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to do (default: evaluate --run)").add_mutually_exclusive_group()
    what.add_argument("--table", choices=("1", "2", "3", "4", "6", "7", "8"), help="print a table of the paper with the numbers of --runs beside its own")
    what.add_argument("--compare", nargs="+", metavar="RUN", help="runs that were evaluated: print a row for each")
    what.add_argument("--prompts", help="file of captions: write a t2v --sheet of all of them")
    what.add_argument("--fit-judge", action="store_true", help="fit the network of R@1-local to the training split of --data -> --judge")
    what.add_argument("--check-metrics", action="store_true", help="table of how every metric reacts to damaged stickers")
    what.add_argument("--study", nargs="+", metavar="RUN", help="write a page for a user study that compares runs")
    what.add_argument("--study-results", nargs="+", metavar="JSON", help="what participants downloaded: print the table")
    parser.add_argument("--run", default="runs/dfgn", help="folder with model.safetensors (default: %(default)s)")
    parser.add_argument("--runs", nargs="+", default=[], metavar="DIR", help="of --table: run folders, or folders of run folders")
    parser.add_argument("--vae", help="default: the file that the model was trained with")
    parser.add_argument("--clip-weights", metavar="FILE", help="text tower that the model was trained with, if it was with one (default: the file of then); not the --clip of the CLIP metric")
    parser.add_argument("--data", default="data/fluent", help="prepared set (default: %(default)s)")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test", help="default: %(default)s")
    parser.add_argument("--groups", nargs="+", help="emoji groups to evaluate on; default: all")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="default: all six; of --study: it2v")
    parser.add_argument("--n", type=int, help="concepts, one clip each, fewer if the split has fewer (default: 256; --study: 20; --check-metrics: 400)")
    parser.add_argument("--allow-unequal-n", action="store_true", help="compute distances of sets of unequal size, which are biased unequally")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=16, help="clips made at once; changes nothing but speed and memory (default: %(default)s)")
    weights = parser.add_argument_group("published weights, local files; without them their metrics are left out")
    weights.add_argument("--i3d", metavar="FILE", help="I3D for FVD: i3d_pretrained_400.pt, rgb_imagenet.pt, or i3d_torchscript.pt")
    weights.add_argument("--i3d-trust", action="store_true", help="run the code that a TorchScript file holds")
    weights.add_argument("--i3d-eps", type=float, help="of its batch norm (default: 1e-3, as in TensorFlow; 1e-5: comparable with VideoGPT's port)")
    weights.add_argument("--i3d-frames", choices=("loop", "pingpong", "hold", "pad"), default="loop", help="how 8 frames become 16 (default: %(default)s)")
    weights.add_argument("--dover", metavar="FILE", help="DOVER.pth, for VQA")
    weights.add_argument("--clip", metavar="FILE", help="open_clip weights, or a folder with open_clip_config.json, for the CLIP metric; of the model's own text tower: --clip-weights")
    weights.add_argument("--clip-model", default="ViT-H-14", help="open_clip's name of that model (default: %(default)s)")
    weights.add_argument("--judge", metavar="FILE", help=f"of R@1-local (default: {JUDGE} where it is there and was fitted to --data)")
    sampling = parser.add_argument_group("sampling; defaults as in sample.py: the paper's, or the mini preset's own")
    sampling.add_argument("--steps", type=int, help="DDIM steps (paper 50; mini 25, with given frames 2)")
    sampling.add_argument("--spacing", choices=("uniform", "quadratic"), help="of the DDIM steps (uniform)")
    sampling.add_argument("--eta", type=float, help="fresh noise of DDIM, 0..1 (paper 1; mini 0)")
    sampling.add_argument("--text-scale", type=float, help="text guidance (paper 7.5; mini 1.5, with given frames 1)")
    sampling.add_argument("--image-scale", type=float, help="guidance of the given frames (paper 7.5; mini 1)")
    sampling.add_argument("--detail", action=argparse.BooleanOptionalAction, default=True, help="take what did not move from the given frames' own pixels")
    parser.add_argument("--sheet", help="PNG contact sheet to write")
    parser.add_argument("--rows", type=int, default=8, help="clips of each task on the sheet (default: %(default)s)")
    parser.add_argument("--key", help="of --study-results: the .key.json that --study wrote beside the page")
    parser.add_argument("--out", help="JSON with all numbers (default: RUN/eval.json, out/table-N.json, out/check-metrics.json), or the page (out/study.html)")
    args = parser.parse_args(argv)
    args.n = args.n if args.n is not None else 20 if args.study else 400 if args.check_metrics else 256
    args.tasks = args.tasks or (["it2v"] if args.study else list(TASKS))
    return args


def check(args):
    for name, least in (("n", 2), ("batch", 1), ("rows", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least {least}")
    if args.prompts and not args.sheet:
        raise UserError("--prompts: say with --sheet FILE.png where the stickers go")
    if args.runs and not args.table:
        raise UserError("--runs: is of --table; evaluate one run with --run")
    if args.key and not args.study_results:
        raise UserError("--key: is of --study-results")
    if args.table and args.out and Path(args.out).suffix != ".json":
        raise UserError(f"--out {args.out}: a table's numbers go to a .json file, its plot beside it")
    if args.i3d_eps is not None and args.i3d_eps <= 0:
        raise UserError(f"--i3d-eps {args.i3d_eps}: must be above 0")
    check_sheet(args.sheet)


def write_json(path, value):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=1)))


def evaluate(args):
    """Everything about --run."""
    run = Run(args.run, args)
    test = Test(args, run.sampler.T, run.sampler.size)
    test.measure_real()
    tasks, vae, made = measure(run, test)
    real = {name: mean_of(v, args.seed) for name, v in test.scores(test.real_rows, "t2v").items()}
    report = dict(model=str(run.model), sha256=run.sources["model"], step=run.sampler.meta["step"], data=args.data, set=test.set_hash, split=args.split,
                  groups=args.groups, n=len(test.records), seed=args.seed, sampler=dict(t2v=run.settings(False), others=run.settings(True)),
                  protocol=f"{test.T} evenly spaced frames, {test.stickers.size} px, on white", metrics=test.says(), files=test.files, tasks=tasks, vae=vae, floor=test.floor, real=real)
    out = Path(args.out or run.folder / "eval.json")
    write_json(out, report)
    print(first_line(report), "\n".join(report["metrics"]), psnr_table(tasks), fd_table(tasks, report), score_table(tasks, real), out, sep="\n\n")
    if args.sheet:
        write_sheet(args.sheet, made, test.real, test.records, args.rows)


def main(argv=None):
    args = parse(argv)
    check(args)
    keep_memory()
    if args.compare:
        print(compare(args.compare))
    elif args.table:
        table(args)
    elif args.fit_judge:
        fit(args)
    elif args.check_metrics:
        check_metrics(args)
    elif args.study:
        study(args)
    elif args.study_results:
        print_study(args)
    elif args.prompts:
        prompts, run = read_prompts(args.prompts), Run(args.run, args)
        save_sheet(args.sheet, run.made_for(prompts), prompts)
    else:
        evaluate(args)


if __name__ == "__main__":
    run_cli(main)
