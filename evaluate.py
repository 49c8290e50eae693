"""Measure trained DFGNs: the paper's metrics, stand-ins under other names without their weights, the paper's tables.

    python evaluate.py --run runs/dfgn                                   # six tasks: tables on stdout, RUN/eval.json
    python evaluate.py --run runs/dfgn --tasks t2v it2v --sheet out.png  # and the first clips of each task, not picked
    python evaluate.py --run checkpoints/mini.safetensors --data data/fluent128      # shipped; numbers in out/mini-HASH
    python evaluate.py --i3d i3d_pretrained_400.pt --dover DOVER.pth --clip open_clip_pytorch_model.bin
    python evaluate.py --compare runs/a runs/b                           # a row for each run that was evaluated
    python evaluate.py --table 3 --rows "DFGN=runs/ablations/A-*" "DFGN + DDU=runs/ablations/C-*"  # or 1, 2, 4

One sticker of each concept of a split, evenly spaced frames, on white, the masks of data.eval_mask. Where frames are
given, all is about the others: the prediction error is the squared error of their latents in one step from pure noise,
PSNR is of their pooled errors, FD-app is theirs alone; FD-mot and FVD compare whole clips with the real ones. Beside
the model stand copying the nearest given frame and blending the two around it, with paired intervals, and the VAE's
round trip of the same frames, below which nothing can come; as many real clips of other concepts tell how large a
distance is. A distance depends on n: unequal sets are refused. Intervals are 95 %: bootstrap over concepts, in the
paper's tables Student's t over seeds. Clips, errors and features are cached in RUN/eval and DATA/eval.
"""
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import trange

from data import TASKS, StickerSet, eval_mask
from lib.media.index import SPLITS, Members
from lib.media.pictures import contact_sheet, even_frames, to_rgba, to_tensor
from lib.metrics import tables
from lib.metrics.distances import by_clips, differences, on_white, paired_interval, psnr, ratio
from lib.metrics.extractors import extractors, features_of
from lib.metrics.judge import same_sticker
from lib.metrics.scores import DISTANCES, DISTANT, compare_distances, distances, mean_of
from lib.metrics.standins import TIMESTEPS, denoising_loss, looped, timesteps_of, z0_errors
from lib.nets.cpu import keep_memory
from lib.nets.layers import nearest_given
from lib.nets.weights import identity
from lib.run.evaluate_options import parse_options
from lib.run.files import UserError, cache_path, check_outputs, file_hash, read_json, rows, run_cli, write_json
from model import fill_weights
from sample import SETTINGS, Sampler

ROOT = Path(__file__).parent
PAPER = json.loads((ROOT / "assets/paper_tables.json").read_text())
SAMPLING_CODE = ("data.py", "model.py", "sample.py", "lib/media/pictures.py", "lib/nets/autoencoder.py",
                 "lib/nets/cpu.py", "lib/nets/layers.py", "lib/nets/text.py", "lib/nets/towers.py", "lib/nets/peft.py")
TABLES = {  # the paper's numbers of each task; Table 2 has one number for both predictions
    "1": dict(it2v="table1_it2v"), "3": dict(it2v="table3_modules_it2v"), "4": dict(it2v="table4_curriculum_it2v"),
    "2": dict(interpolation="table2_interpolation", prediction_forward="table2_prediction",
              prediction_backward="table2_prediction")}


# ---- real clips and baselines
def pick(stickers, n, T, seed, among=True):
    """Up to n records of at least T frames, one of each concept; the seed chooses variants and the order of concepts.

    among: (records,) bool, True for those that may be picked."""
    members = Members(stickers.concept, np.flatnonzero((stickers.lengths >= T) & among))
    rng = np.random.default_rng(seed)
    chosen = [int(variants[rng.integers(len(variants))]) for variants in members]
    return [stickers.records[chosen[i]] for i in rng.permutation(len(chosen))[:n]]


def read_clips(stickers, records, T):
    """(N, T, S, S, 4) uint8 straight RGBA."""
    return np.stack([stickers.clip(r, even_frames(r["n"], T)) for r in records])


def to_bytes(white):
    """Floats in 0..1 -> uint8."""
    return np.round(white * 255).astype(np.uint8)


def to_white(rgba):
    """(..., 4) uint8 straight RGBA -> (..., 3) uint8, what extractors look at."""
    return to_bytes(on_white(rgba))


def filled(clips, mask, fill):
    """Float clips (N, T, ...) made of their given frames alone, mask (T,). fill: nearest (each frame is its nearest
    given one) or blend (linear between the two around it; stickers loop: after the last frame comes the first)."""
    if fill == "nearest":
        return clips[:, nearest_given(torch.tensor(mask)).numpy()]
    weights = fill_weights(torch.tensor(mask)[None], torch.tensor([len(mask)]))[0].to(torch.float32).numpy()
    return np.einsum("ts,ns...->nt...", weights, clips)


def baselines(real, decoded, mask):
    """{name: clips} to be compared with a model's: real and decoded (the VAE's round trip), float (N, T, ...)."""
    given = mask.reshape(1, -1, *[1] * (real.ndim - 2)) > 0
    found = dict(vae=np.where(given, real, decoded))
    if mask.any():
        found.update(copy=filled(real, mask, "nearest"))
    if mask.sum() > 1:                           # of one given frame the blend is the copy
        found.update(blend=filled(real, mask, "blend"))
    return found


@torch.no_grad()
def round_trip(vae, clips, batch):
    """Clips (N, T, S, S, 4) uint8 encoded and decoded: the best of frames that are drawn; given ones are copied."""
    out = np.empty_like(clips)
    for i in trange(0, len(clips), batch, desc="VAE", delay=1):
        x = vae.images(to_tensor(clips[i:i + batch])).flatten(0, 1)      # (b * T, C, S, S)
        out[i:i + batch] = to_rgba(vae.decode(vae.encode(x))).reshape(clips[i:i + batch].shape)
    return out


# ---- what is measured
class Run:
    """A trained run, and the clips that it makes."""

    def __init__(self, path, args):
        path = Path(path)
        shared = path.is_file()                  # a model alone, such as checkpoints/mini.safetensors
        self.model = path if shared else path / "model.safetensors"
        if not self.model.is_file():
            raise UserError(f"--run {path}: no model.safetensors there; `python train.py --out {path}` trains one")
        trained = {} if shared else read_json(path / "config.json").get("train", {})
        self.args = args
        if not args.data:
            groups = args.groups or trained.get("groups") or None
            args.data, args.groups = trained.get("data", ["data/fluent"])[0], groups
        self.sampler = Sampler(self.model, args.vae, clip_weights=args.clip_weights)
        self.sha256, self.vae_sha256 = identity(self.model), identity(self.sampler.vae_file)
        self.folder = Path("out") / f"{path.stem}-{self.sha256[:8]}" if shared else path     # of names there are twins
        self.code = {name: file_hash(ROOT / name) for name in SAMPLING_CODE}

    def settings(self, task):
        changes = {name: getattr(self.args, name) for name in SETTINGS}
        return self.sampler.settings(task != "t2v", **changes)

    def cached(self, name, task, test, shape, dtype, batch, make, **more):
        """Rows of the test clips, kept under a hash of all that they depend on."""
        made_of = dict(self.code, model=self.sha256, task=task, mask=eval_mask(task, test.T, test.T).tolist(),
                       set=test.set_hash, files=test.files, seed=self.args.seed, **more)
        path = cache_path(self.folder / "eval", name, made_of)
        return rows(path, len(test.files), shape, dtype, batch, make, name)

    def clips(self, task, test):
        """Clips (N, T, S, S, 4) uint8 for a task; clip k is seeded by (--seed, k)."""
        prompts, mask, settings = test.prompts(task), eval_mask(task, test.T, test.T), self.settings(task)

        def make(part):
            real, seeds = test.clips[part], [(self.args.seed, k) for k in range(part.start, part.stop)]
            given = dict(frames=real, cond_mask=np.stack([mask] * len(real))) if mask.any() else {}
            return self.sampler.sample(prompts[part], seeds, **given, **settings)
        return self.cached(task, task, test, test.clips.shape[1:], np.uint8, self.args.batch, make,
                           vae=self.vae_sha256, **settings)

    def errors(self, task, test, text=True):
        """(N, timesteps, T) squared errors of latents predicted in one step, with the captions or without."""
        prompts, mask = test.prompts(task) if text else [""] * len(test.files), eval_mask(task, test.T, test.T)

        def make(_):
            return z0_errors(self.sampler, test.clips, prompts, mask, self.args.seed, self.args.batch,
                             timesteps_of(self.sampler))
        return self.cached(f"errors-{task}", task, test, (len(TIMESTEPS), test.T), np.float32, len(test.files), make,
                           by=file_hash(ROOT / "lib/metrics/standins.py"), text=text)

    def latents(self, test):
        """(N, T, c, h, w) of the test clips."""
        parts = [test.clips[i:i + self.args.batch] for i in range(0, len(test.files), self.args.batch)]
        with torch.no_grad():
            return torch.cat([self.sampler.known_latents(x, torch.ones(x.shape[:2])) for x in parts]).cpu().numpy()


class EvalSet:
    """One sticker of each concept of a split, as many real ones of concepts of the other splits, and the extractors."""

    def __init__(self, args, T=8, size=None):
        stickers = StickerSet(args.data, groups=args.groups)
        self.T, self.size, self.set_hash = T, stickers.size, stickers.meta["hash"]
        if size not in (None, self.size):
            raise UserError(f"--data {args.data}: {self.size} px, the model makes {size}; "
                            f"`python data.py fluent --size {size} --out DIR` makes a set of that size")
        inside = stickers.split == args.split
        records = pick(stickers, args.n, T, args.seed, inside)
        n, where = len(records), f"--groups {' '.join(args.groups)}, {args.data}" if args.groups else args.data
        if n < 2:
            there = ", ".join(f"{name} {len(pick(stickers, 10, T, 0, stickers.split == name))}" for name in SPLITS)
            raise UserError(f"--split {args.split}: {n} concepts with {T} frames in {where}; at least 2 are needed "
                            f"(up to 10 counted: {there}); name another split or prepare more captions")
        others = pick(stickers, n, T, args.seed, ~inside)
        self.captions, self.files, self.concepts = ([r[key] for r in records] for key in ("caption", "file", "concept"))
        self.folder, self.extractors = Path(args.data) / "eval", extractors(args, T, self.concepts)
        self.clips, self.floor = read_clips(stickers, records, T), None
        self.white = on_white(self.clips)
        nothing = np.zeros(T, np.float32)
        self.real = self.features(self.folder, self.white, nothing)
        if len(others) == n:                     # a distance depends on n; with fewer there is no floor
            other = self.features(self.folder, on_white(read_clips(stickers, others, T)), nothing, DISTANT)
            self.floor = distances(self.real, other, args.seed, paired=False)

    def prompts(self, task):
        """What the network is told of each clip; i2v has no text."""
        return [""] * len(self.captions) if task == "i2v" else self.captions

    def features(self, folder, white, mask, names=None):
        """{extractor: (N, width)} of float clips on white; "unknown": the stand-in's of frames that are not given."""
        white = to_bytes(white)
        found = features_of(self.extractors, folder, white, names)
        others = looped(white[:, mask == 0])
        unknown = features_of(self.extractors, folder, others, {"local"}) if mask.any() else found
        return {**found, "unknown": unknown["local"]}

    def same_sticker(self, folder, white, mask):
        """(N,) 1.0 where the judge puts unknown frames nearest to their own given ones; None without judge or mask."""
        if not mask.any() or not any(x.name == "judge" for x in self.extractors):
            return None
        shown = to_bytes(white[:, mask == 0]), to_bytes(self.white[:, mask > 0])
        return same_sticker(*(features_of(self.extractors, folder, x, {"judge"})["judge"] for x in shown))

    def scores(self, features, task):
        """{metric: (N,)} of all metrics that have a value for each clip. features: {extractor: those of the clips}."""
        told = dict(captions=self.captions, concepts=self.concepts, task=task)
        found = [x.scores(features[x.name], **told) for x in self.extractors if x.name in features]
        return {name: values for scores in found for name, values in scores.items()}


# ---- numbers
def psnr_of(clips, real, decoded, mask, seed):
    """PSNR of the pooled errors of unknown frames, dB: {model, vae, copy, blend, model - copy, model - blend: value,
    interval}; None for t2v. Copies and blends are of frames through the VAE, as the model's are.

    clips, real, decoded (the VAE's round trip): (N, T, S, S, 3) float on white."""
    if not mask.any():
        return None
    shown = dict(model=clips, **baselines(decoded, decoded, mask))
    errors = {name: ((x - real)[:, mask == 0] ** 2).mean((1, 2, 3, 4)) for name, x in shown.items()}
    found = {name: paired_interval(psnr, e, seed=seed) for name, e in errors.items()}
    for name in [name for name in ("copy", "blend") if name in errors]:
        found[f"model - {name}"] = paired_interval(lambda a, b: psnr(a) - psnr(b), errors["model"], errors[name],
                                                   seed=seed)
    return found


def predictions_of(run, test, task, latents):
    """What the network says in one step of frames that are not given; None for t2v. latents: those of the test clips.

    {copy, blend: errors of the baselines; over copying, over blending, no caption, over copying, caption over none:
    ratios of mean errors in one step from pure noise; over t2v: {timestep: ratio to t2v's on the same frames}}."""
    mask, seed = eval_mask(task, test.T, test.T), run.args.seed
    if not mask.any():
        return None
    unknown = mask == 0

    def of_unknown(task, text=True):
        return run.errors(task, test, text)[:, :, unknown].mean(2)               # (N, timesteps)
    with_text, without, t2v = of_unknown(task), of_unknown(task, False), of_unknown("t2v")
    found = {}
    for name, fill in (("copy", "nearest"), ("blend", "blend")):
        found[name] = ((filled(latents, mask, fill) - latents) ** 2).mean((2, 3, 4))[:, unknown].mean(1)
    ratios = {"over copying": (with_text[:, -1], found["copy"]), "over blending": (with_text[:, -1], found["blend"]),
              "no caption, over copying": (without[:, -1], found["copy"]),
              "caption over none": (with_text[:, -1], without[:, -1])}
    at = {t: paired_interval(ratio, with_text[:, i], t2v[:, i], seed=seed)
          for i, t in enumerate(timesteps_of(run.sampler))}
    return {**{name: mean_of(errors, seed) for name, errors in found.items()}, "over t2v": at,
            **{name: paired_interval(ratio, *pair, seed=seed) for name, pair in ratios.items()}}


def measure_task(run, test, task, decoded, latents):
    """(all numbers of a task as eval.json has them, its clips). decoded: the VAE's round trip of the test clips, on
    white; latents: theirs."""
    mask, clips, seed = eval_mask(task, test.T, test.T), run.clips(task, test), run.args.seed
    white, folder = on_white(clips), run.folder / "eval"
    shown = dict(model=white, **baselines(test.white, decoded, mask))
    real = test.features(test.folder, test.white, mask, DISTANT)
    features = {name: test.features(folder, x, mask, *([DISTANT] if name != "model" else []))
                for name, x in shown.items()}
    errors = run.errors(task, test)[:, :, mask == 0].mean(2)
    scores = {"loss": denoising_loss(run.sampler, errors), "prediction error": errors[:, -1],
              **test.scores(features["model"], task)}
    same = {name: test.same_sticker(folder, x, mask) for name, x in (("model", white), ("real", test.white))}
    if same["model"] is not None:
        scores.update({"same sticker": same["model"], "same sticker, real": same["real"]})
    return dict(given=np.flatnonzero(mask).tolist(), sampler=run.settings(task),
                fd={name: distances(real, x, seed) for name, x in features.items()},
                fd_less=compare_distances(real, features, seed), psnr=psnr_of(white, test.white, decoded, mask, seed),
                prediction=predictions_of(run, test, task, latents),
                scores={name: mean_of(v, seed) for name, v in scores.items()}), clips


def measure(run, test):
    """(all numbers of a run as eval.json has them, {task: clips})."""
    args, tasks, made = run.args, {}, {}
    decoded, latents = on_white(round_trip(run.sampler.vae, test.clips, args.batch)), run.latents(test)
    for task in args.tasks:
        tasks[task], made[task] = measure_task(run, test, task, decoded, latents)
    groups = f" ({', '.join(args.groups)})" if args.groups else ""
    kinds = {"text alone": "t2v", "frames given": "it2v"}
    settings = "; ".join(f"{kind}: " + ", ".join(f"{name} {value}" for name, value in run.settings(task).items())
                         for kind, task in kinds.items())
    protocol = (f"{args.split} split of {args.data}{groups}, n = {len(test.files)} concepts, seed {args.seed}; "
                f"{settings}; {test.T} evenly spaced frames, {test.size} px, on white; 95 % intervals")
    report = dict(model=str(run.model), sha256=run.sha256, vae_sha256=run.vae_sha256,
                  step=run.sampler.meta["step"], n=len(test.files), seed=args.seed, split=args.split,
                  data=args.data, groups=args.groups, set=test.set_hash, files=test.files,
                  asked={name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None},
                  protocol=protocol, tasks=tasks,
                  metrics=[x.describe(test.T, test.size) for x in test.extractors],
                  floor=test.floor, real={k: mean_of(v, args.seed) for k, v in test.scores(test.real, "t2v").items()})
    return report, made


def evaluate(args):
    """All about --run: tables on stdout, RUN/eval.json, a sheet of the first clips, each above its ground truth."""
    run = Run(args.run, args)
    out = Path(args.out or run.folder / "eval.json")
    inputs = [("--run", run.model), *((f"--{name}", getattr(args, name)) for name in ("vae", "judge", "i3d", "dover"))]
    check_outputs([("--out", out), ("--sheet", args.sheet)], inputs)
    test = EvalSet(args, run.sampler.T, run.sampler.size)
    if unknown := [caption for caption in test.captions if run.sampler.unknown(caption)[0]]:
        print(f"{len(unknown)} of {len(test.captions)} captions have words that the network does not know, such as "
              f"{unknown[0]!r}")
    report, made = measure(run, test)
    write_json(out, report)
    found = tables.all_of(report)
    hashes = f"SHA-256 {run.sha256[:12]}, VAE's {run.vae_sha256[:12]}"
    print(f"{run.model} ({hashes}, step {report['step']}); {report['protocol']}",
          "\n".join(report["metrics"]), *filter(None, found), out, sep="\n\n")
    if args.sheet:
        first = [(task, k) for task in made for k in range(min(args.sheet_rows, len(test.files)))]
        clips = [clip for task, k in first for clip in (made[task][k], test.clips[k])]
        labels = [label for task, k in first for label in (f"{task}: {test.captions[k]}", "ground truth")]
        marks = [mask for task, _ in first for mask in (eval_mask(task, test.T, test.T) > 0, np.zeros(test.T, bool))]
        contact_sheet(clips, args.sheet, labels=labels, marks=marks)
        print(args.sheet)


# ---- the paper's tables
def numbers_of(task):
    """{metric: number} of a task of a report."""
    found = {name: task["fd"]["model"][name]["value"] for name in DISTANCES if name in task["fd"]["model"]}
    return {**found, **{name: score["mean"] for name, score in task["scores"].items()}}


def table(args):
    """Table 1, 2, 3 or 4: the paper's numbers beside those of the runs of --rows; markdown on stdout, a JSON file."""
    found, keys, reports, features, test = tables.find_rows(args.rows), TABLES[args.table], {}, {}, None
    args.tasks, out = list(keys), args.out or f"out/table-{args.table}.json"
    check_outputs([("--out", out)])
    for folder in (folder for folders in found.values() for folder in folders):
        run = Run(folder, args)                          # one network in memory at a time
        test = test or EvalSet(args, run.sampler.T, run.sampler.size)
        if (run.sampler.T, run.sampler.size) != (test.T, test.size):
            raise UserError(f"--rows {folder}: clips of another length or size than those of the first run")
        reports[folder], made = measure(run, test)
        masks = {task: eval_mask(task, test.T, test.T) for task in made}
        features[folder] = {task: test.features(run.folder / "eval", on_white(clips), masks[task], DISTANT)
                            for task, clips in made.items()}
    tables.check_alike("--rows", reports)
    report = next(iter(reports.values()))
    head = (f"Table {args.table}: {report['protocol']} of means over seeds by Student's t. The paper's numbers are of "
            "VSD2M at 256 px: compare orders, not values")
    text, numbers = [head, *report["metrics"]], {}
    for task, key in keys.items():
        measured = report["tasks"][task]
        real = test.features(test.folder, test.white, eval_mask(task, test.T, test.T), DISTANT)
        copied, vae, floor = ({k: d[k]["value"] for k in DISTANCES if d and k in d}
                              for d in (measured["fd"]["copy"], measured["fd"]["vae"], test.floor))
        ours = {"real, other concepts": [floor], "VAE round trip": [vae],
                "copy nearest": [{**copied, "prediction error": measured["prediction"]["copy"]["mean"]}]}
        for row, folders in found.items():
            ours[row] = [numbers_of(reports[folder]["tasks"][task]) for folder in folders]
        numbers[task] = dict(paper=PAPER[key]["rows"], ours=ours)
        text += [f"**{task}**", tables.paper_table(**numbers[task])]
        if len(found) > 1:
            pairs = {folder: {name: (distance, real[x], made[task][x]) for name, (x, distance) in DISTANCES.items()
                              if x in made[task]} for folder, made in features.items()}
            runs = {row: [by_clips(reports[folder]["tasks"][task], pairs[folder]) for folder in folders]
                    for row, folders in found.items()}
            numbers[task]["differences"] = differences(runs, len(test.files), args.seed)
            text.append(tables.difference_table(numbers[task]["differences"]))
    write_json(out, dict(head=head, metrics=report["metrics"], runs=found, tasks=numbers))
    print(*text, out, sep="\n\n")


# ---- command line
def parse(argv=None):
    return parse_options(__doc__, TASKS, sorted(TABLES), argv)


def main(argv=None):
    args = parse(argv)
    keep_memory()
    if args.compare:
        print(tables.compare(args.compare))
    elif args.table:
        table(args)
    else:
        evaluate(args)


if __name__ == "__main__":
    run_cli(main)
