"""Evaluate a trained DFGN on the six tasks of the paper's Table 7, with stickers of held-out concepts.

    python evaluate.py --run runs/dfgn                                  # tables on stdout, RUN/eval.json
    python evaluate.py --run runs/dfgn --tasks t2v it2v --sheet out.png # and the first clips of each task, not picked
    python evaluate.py --run runs/dfgn --prompts captions.txt --sheet out.png   # fixed captions, nothing measured
    python evaluate.py --compare runs/a runs/b                          # a row for each run that was evaluated

One sticker a concept, evenly spaced frames, on white, the masks of data.eval_mask. PSNR is of the frames that were not given,
beside copying the nearest given frame, blending the two around (stickers loop: the first follows the last) and the VAE's own round
trip. FD-app and FD-mot (metrics.py) compare whole clips, given frames included, with the real ones; their floor is as many real
clips of other concepts. Distances fall with n: compare at equal n. Intervals are 95 % bootstrap intervals over concepts.
Clips are kept in RUN/eval: a second run makes none again.
"""
import argparse
import hashlib
import json
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from tqdm import tqdm

from data import TASKS, StickerSet, UserError, check_sheet, contact_sheet, eval_mask, even_frames, nearest_given, read_jsonl, run_cli, to_rgba, to_tensor
from metrics import LocalFeatures, bootstrap, bootstrap_fd, fd, psnr
from model import fill
from sample import DEFAULTS, Sampler
from train import file_hash, flat, write_atomically


# ------------------------------------------------------------------------------------------------ clips
def pick(records, n, T, seed):
    """Up to n records of at least T frames, one a concept: which variant, and the order of the concepts, by the seed."""
    variants = defaultdict(list)
    for record in records:
        if record["n"] >= T:
            variants[record["concept"]].append(record)
    rng = np.random.default_rng(seed)
    chosen = [variants[c][int(rng.integers(len(variants[c])))] for c in sorted(variants)]
    return [chosen[i] for i in rng.permutation(len(chosen))[:n]]


def read_clips(stickers, records, T):
    """(N, T, S, S, 4) uint8 straight RGBA."""
    return np.stack([stickers.clip(r, even_frames(r["n"], T)) for r in records])


def on_white(rgba):
    """(..., 4) uint8 straight RGBA -> (..., 3) float32 in 0..1."""
    x = rgba.astype(np.float32) / 255
    return x[..., :3] * x[..., 3:] + 1 - x[..., 3:]


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


def sample_all(sampler, prompts, args, settings, name, **given):
    """Clips (N, T, S, S, 4) uint8 for N prompts, sample k seeded by (--seed, k); given: frames and cond_mask, (N, T, ...)."""
    clips = []
    with tqdm(total=len(prompts), desc=name, unit="clip") as bar:
        for i in range(0, len(prompts), args.batch):
            part = slice(i, i + args.batch)
            seeds = [(args.seed, k) for k in range(len(prompts))[part]]
            clips.append(sampler.sample(prompts[part], seeds, **{k: v[part] for k, v in given.items()}, **settings))
            bar.update(len(seeds))
    return np.concatenate(clips)


def generate(sampler, task, real, records, args, settings, sources):
    """The model's clips for a task, from RUN/eval if the same model, code, stickers and settings made them before."""
    made_of = dict(sources, task=task, files=[r["file"] for r in records], seed=args.seed, **settings)
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(args.run) / "eval" / f"{task}-{key}.npy"
    if path.is_file():
        return np.load(path)
    prompts = ["" if task == "i2v" else r["caption"] for r in records]
    mask = np.stack([eval_mask(task, sampler.T, sampler.T)] * len(records))
    given = dict(frames=real, cond_mask=mask) if mask.any() else {}
    clips = sample_all(sampler, prompts, args, settings, task, **given)
    path.parent.mkdir(exist_ok=True)
    np.save(temporary := path.with_suffix(".tmp.npy"), clips)
    os.replace(temporary, path)
    return clips


# ------------------------------------------------------------------------------------------------ numbers
def mean_of(values, seed):
    return dict(mean=float(np.mean(values)), interval=bootstrap(values, seed=seed), clips=[round(float(v), 4) for v in values])


def psnr_of(task, clips, real, decoded, mask, seed):
    """PSNR of the unknown frames, in dB: {model, copy, blend, vae, model - copy: mean, interval, clips}. White RGB clips."""
    if not mask.any():
        return None
    unknown = mask == 0
    others = dict(model=clips, copy=copy_nearest(real, mask), vae=decoded)
    if mask.sum() > 1:                           # of one given frame it is the copy
        others["blend"] = blend(real, mask)
    values = {name: psnr(x[:, unknown], real[:, unknown]) for name, x in others.items()}
    values["model - copy"] = values["model"] - values["copy"]
    return {name: mean_of(v, seed) for name, v in values.items()}


def features_of(net, clips):
    """White RGB clips (N, T, S, S, 3) in 0..1 -> features of LocalFeatures."""
    return net(torch.from_numpy(np.moveaxis(clips, -1, 2) * 2 - 1))


def distances(reference, other, seed, paired):
    """FD-app and FD-mot of two feature sets, cut to equal n: {name: value, interval; n}."""
    n = min(len(reference["motion"]), len(other["motion"]))
    result = dict(n=n)
    for name, kind in (("FD-app", "appearance"), ("FD-mot", "motion")):
        a, b = reference[kind][:n], other[kind][:n]
        result[name] = dict(value=fd(a, b), interval=bootstrap_fd(a, b, seed=seed, paired=paired))
    return result


def measure(generated, real, others, decoded, net, seed):
    """All numbers. generated: {task: clips}; real, others, decoded: clips. uint8 straight RGBA -> {task: psnr, fd, copy fd}, {set: fd}."""
    T, white = real.shape[1], on_white(real)
    decoded, reference = on_white(decoded), features_of(net, white)
    distance = lambda clips, paired=True: distances(reference, features_of(net, clips), seed, paired)
    tasks = {}
    for task, clips in tqdm(generated.items(), "measuring"):
        mask, clips = eval_mask(task, T, T), on_white(clips)
        tasks[task] = dict(given=np.flatnonzero(mask).tolist(), psnr=psnr_of(task, clips, white, decoded, mask, seed),
                           fd=distance(clips), fd_copy=distance(copy_nearest(white, mask)) if mask.any() else None)
    floor = distance(on_white(others), paired=False) if len(others) > 1 else None
    return tasks, dict(vae=distance(decoded), floor=floor)


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


def fd_table(tasks, sets):
    def row(name, d):
        return [name, *(["-"] * 3 if d is None else [str(d["n"]), *(with_interval(**d[k]) for k in ("FD-app", "FD-mot"))])]
    rows = [row(name, d) for task, t in tasks.items() for name, d in ((task, t["fd"]), (f"copy nearest, {task}", t["fd_copy"])) if d]
    rows += [row("VAE round trip", sets["vae"]), row("floor: real, other concepts", sets["floor"])]
    return markdown(["distance to the real clips", "n", "FD-app", "FD-mot"], rows)


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


def read_run(run):
    """What a run was trained with, flat; its last step; core-seconds of all steps (rank 0, without loaders); its evaluation."""
    try:
        config = json.loads((Path(run) / "config.json").read_text())
        trained = flat(dict(train={k: v for k, v in config["train"].items() if k not in ("set", "out")}, model=config["model"]))
        log = [line for _, line in read_jsonl(Path(run) / "log.jsonl")]
        return trained, log[-1]["step"], sum(line["cpu_s"] for line in log), json.loads((Path(run) / "eval.json").read_text())
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"--compare {run}: config.json, log.jsonl and eval.json of a dfgn run are needed ({error}); `python evaluate.py --run {run}` makes the last") from None


def compare(runs):
    """A table with a row for each run: how it differs from the first, its core-seconds, and what evaluate.py measured."""
    reports = {run: read_run(run) for run in runs}
    first, _, _, report = reports[runs[0]]
    for run, (*_, other) in reports.items():
        for key in ("set", "split", "files", "seed", "protocol", "sampler"):
            if other[key] != report[key]:
                raise UserError(f"--compare {run}: evaluated with another {key} than {runs[0]}; evaluate both alike")
        if list(other["tasks"]) != list(report["tasks"]):
            raise UserError(f"--compare {run}: evaluated on other --tasks than {runs[0]}; evaluate both alike")
    rows = []
    for run, (trained, step, cpu, other) in reports.items():
        changed = ", ".join(f"{k.split('.', 1)[1]}={json.dumps(v)}" for k, v in trained.items() if first.get(k) != v)
        margins = [t["psnr"]["model - copy"] for t in other["tasks"].values() if t["psnr"]]
        distances = [f"{t['fd']['FD-app']['value']:.2f}, {t['fd']['FD-mot']['value']:.2f}" for t in other["tasks"].values()]
        rows.append([Path(run).name, changed or "-", str(step), f"{cpu:.0f}", *(with_interval(m["mean"], m["interval"]) for m in margins), *distances])
    given = [f"{task}, dB over copying" for task, t in report["tasks"].items() if t["psnr"]]
    head = ["run", "differs in", "steps", "core-s of the steps", *given, *(f"{task}, FD-app, FD-mot" for task in report["tasks"])]
    return (f"{report['split']} split, n = {report['n']} concepts, trained with seed {first['train.seed']}, evaluated with {report['seed']}; "
            f"{report['protocol']}; 95 % intervals of the differences\n\n{markdown(head, rows)}")


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
    parser.add_argument("--run", default="runs/dfgn", help="folder with model.safetensors")
    parser.add_argument("--vae", help="default: the file that the model was trained with")
    parser.add_argument("--data", default="data/fluent", help="prepared set")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test")
    parser.add_argument("--groups", nargs="+", help="emoji groups to evaluate on; default: all")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--n", type=int, default=256, help="concepts, one clip each; fewer if the split has fewer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16, help="clips made at once; changes nothing but speed and memory")
    parser.add_argument("--steps", type=int, help="DDIM steps; default of this and the next four: as sample.py")
    parser.add_argument("--spacing", choices=("uniform", "quadratic"), help="of the DDIM steps")
    parser.add_argument("--eta", type=float, help="fresh noise of DDIM, 0..1")
    parser.add_argument("--text-scale", type=float, help="text guidance")
    parser.add_argument("--image-scale", type=float, help="guidance of the given frames")
    parser.add_argument("--detail", action=argparse.BooleanOptionalAction, default=True, help="as in sample.py")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="runs that were evaluated: print a row for each and stop")
    parser.add_argument("--prompts", help="file of captions: write a t2v --sheet of all of them and stop")
    parser.add_argument("--sheet", help="PNG contact sheet to write")
    parser.add_argument("--rows", type=int, default=8, help="clips of each task on the sheet")
    parser.add_argument("--out", help="JSON with all numbers; default RUN/eval.json")
    return parser.parse_args(argv)


def check(args):
    for name, least in (("n", 2), ("batch", 1), ("rows", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least {least}")
    if args.prompts and not args.sheet:
        raise UserError("--prompts: say with --sheet FILE.png where the stickers go")
    check_sheet(args.sheet)
    if not (Path(args.run) / "model.safetensors").is_file():
        raise UserError(f"--run {args.run}: no model.safetensors there; train one with `python train.py --out {args.run}`")


def main(argv=None):
    args = parse(argv)
    if args.compare:
        return print(compare(args.compare))
    check(args)
    model = Path(args.run) / "model.safetensors"
    sampler = Sampler(model, args.vae)
    chosen = {name: getattr(args, name) for name in DEFAULTS}
    settings = lambda given: {**sampler.settings(given, **chosen), "detail": args.detail}
    if args.prompts:
        prompts = read_prompts(args.prompts)
        return save_sheet(args.sheet, sample_all(sampler, prompts, args, settings(False), "t2v"), prompts)

    stickers, T = StickerSet(args.data, groups=args.groups), sampler.T
    if stickers.size != sampler.size:
        raise UserError(f"--data {args.data}: {stickers.size} px, {model} makes {sampler.size}")
    records = pick([r for r in stickers.records if r["split"] == args.split], args.n, T, args.seed)
    if len(records) < 2:
        where = f" in --groups {' '.join(args.groups)}" if args.groups else ""
        raise UserError(f"--split {args.split}: {len(records)} concepts with {T} frames{where} in {args.data}; at least 2 are needed")
    strangers = pick([r for r in stickers.records if r["split"] != args.split], len(records), T, args.seed)
    real = read_clips(stickers, records, T)
    others = read_clips(stickers, strangers, T) if strangers else real[:0]
    sources = {name: file_hash(Path(__file__).with_name(name)) for name in ("model.py", "sample.py")}
    sources.update(model=file_hash(model), set=stickers.meta["hash"])
    generated = {task: generate(sampler, task, real, records, args, settings(task != "t2v"), sources) for task in args.tasks}
    net = LocalFeatures().to(sampler.device)
    tasks, sets = measure(generated, real, others, round_trip(sampler, real, args.batch), net, args.seed)

    with safe_open(str(model), "pt") as file:
        step = int(file.metadata()["step"])
    report = dict(model=str(model), sha256=sources["model"], step=step, data=args.data, set=stickers.meta["hash"], split=args.split,
                  groups=args.groups, n=len(records), seed=args.seed, sampler=dict(t2v=settings(False), others=settings(True)),
                  protocol=f"{T} evenly spaced frames, {sampler.size} px, on white", files=[r["file"] for r in records], tasks=tasks, **sets)
    out = Path(args.out or Path(args.run) / "eval.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda p: p.write_text(json.dumps(report, indent=1)))
    print(first_line(report), psnr_table(tasks), fd_table(tasks, sets), out, sep="\n\n")
    if args.sheet:
        write_sheet(args.sheet, generated, real, records, args.rows)


if __name__ == "__main__":
    run_cli(main)
