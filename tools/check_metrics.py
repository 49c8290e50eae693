"""How every metric reacts to damaged stickers: a table on stdout, a JSON file.

    python tools/check_metrics.py                      # FD-app, FD-mot, Recog@1, 4 minutes; out/check-metrics.json
    python tools/check_metrics.py --dover DOVER.pth    # --data, --n, --seed, --out and weights as for evaluate.py

Distances: stickers of the training split, damaged, to as many whole ones of other concepts. Scores: held-out stickers.
"""
import io
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate  # noqa: E402
from data import StickerSet  # noqa: E402
from evaluate import DISTANCES, DISTANT, pick, read_clips, to_white  # noqa: E402
from lib.metrics.clip import clip_scores  # noqa: E402
from lib.metrics.dover import dover_fuse  # noqa: E402
from lib.metrics.tables import markdown  # noqa: E402
from lib.run.files import UserError, run_cli  # noqa: E402

T, SEEDS, HELD_OUT = 8, 3, 512


# ---- damages: (white clips (n, T, S, S, 3) uint8, strength, generator) -> clips
def blur(clips, sigma, rng):
    blurred = [gaussian_filter(clip.astype(np.float32), (0, sigma, sigma, 0), mode="nearest") for clip in clips]
    return np.round(blurred).astype(np.uint8)


def noise(clips, deviation, rng):
    noisy = [clip + deviation * rng.standard_normal(clip.shape, np.float32) for clip in clips]
    return np.round(noisy).clip(0, 255).astype(np.uint8)


def jpeg(clips, quality, rng):
    out = np.empty_like(clips)
    for frame in np.ndindex(clips.shape[:2]):
        Image.fromarray(clips[frame]).save(file := io.BytesIO(), "JPEG", quality=quality)
        out[frame] = Image.open(file)
    return out


def shuffle(clips, reach, rng):
    order = np.argsort(np.arange(T) + rng.uniform(0, reach + 1, (len(clips), T)), 1, kind="stable")
    return np.take_along_axis(clips, order[:, :, None, None, None], 1)       # no frame moves farther than `reach`


def freeze(clips, frames, rng):
    return clips[:, np.minimum(np.arange(T), T - 1 - frames)]


def repeat(clips, times, rng):
    n = len(clips)
    return clips[rng.permutation(n)[np.arange(n) % max(n // times, 1)]]


def pass_around(captions, percent, rng):
    """Captions (n, ...), this share of them passed around among themselves."""
    out, chosen = captions.copy(), rng.permutation(len(captions))[:max(2, round(len(captions) * percent / 100))]
    out[chosen] = captions[np.roll(chosen, 1)]
    return out


DAMAGES = {                                      # strengths, mild to strong
    "blur, sigma in px": (blur, (0.5, 1, 2)), "noise, of 255": (noise, (4, 10, 25)),
    "JPEG quality": (jpeg, (60, 30, 12)), "shuffled frames, at most so far": (shuffle, (1, 3, 7)),
    "frozen frames at the end": (freeze, (2, 4, 6)), "repeats, each of": (repeat, (2, 5, 20)),
    "wrong captions, %": (pass_around, (25, 50, 100))}


# ---- reactions
def split_concepts(stickers, n, rng):
    """Two lists of up to n records of the training split without a concept in common, equally long; any variants."""
    rows = np.flatnonzero((stickers.split == "train") & (stickers.lengths >= T))
    concepts = np.unique(stickers.concept[rows])
    first = np.isin(stickers.concept[rows], concepts[rng.permutation(len(concepts))[:len(concepts) // 2]])
    halves = [rows[first], rows[~first]]
    n = min(n, *map(len, halves))
    if n < 2:
        raise UserError("--data: the training split has too few concepts with an animation for two halves")
    return [[stickers.records[half[i]] for i in rng.permutation(len(half))[:n]] for half in halves]


def features(extractors, clips):
    """{extractor: (n, width) float64}; nothing is given here, so that unknown frames are all."""
    found = {x.name: np.concatenate([x(clips[i:i + x.batch]) for i in range(0, len(clips), x.batch)]).astype(float)
             for x in extractors}
    return {**found, "unknown": found["local"]} if "local" in found else found


def scores(extractors, clips, captions, concepts):
    """{metric: mean over clips} of the metrics that judge single clips."""
    found, values = features(extractors, clips), {}
    if "judge" in found:
        judge = next(x for x in extractors if x.name == "judge")
        values["Recog@1"] = judge.scores(found["judge"], concepts)["Recog@1"].mean()
    if "dover" in found:
        values["VQA"] = dover_fuse(*found["dover"].T)["overall"].mean()
    if "clip" in found:
        text = next(x for x in extractors if x.name == "clip").texts(list(captions))
        clip = clip_scores(text, found["clip"].reshape(len(clips), T, -1))
        values.update({name: clip[name].mean() for name in ("CLIP", "CLIP R@1")})
    return values


def react(stickers, extractors, n, seed):
    """({metric: {"real" or damage: [values by strength]}}, number of clips of distances, of scores) of one seed."""
    rng, values = np.random.default_rng(seed), defaultdict(lambda: defaultdict(list))
    reference, others = (to_white(read_clips(stickers, half, T))
                         for half in split_concepts(stickers, n, rng))
    held_out = pick(stickers, HELD_OUT, T, seed, stickers.split != "train")
    shown = to_white(read_clips(stickers, held_out, T))
    words = np.array([[r["caption"], r["concept"]] for r in held_out])      # (n, 2): a caption goes with its concept
    distant, single = ([x for x in extractors if (x.name in DISTANT) == wanted] for wanted in (True, False))
    real = features(distant, reference)

    def record(key, others, shown, words):
        other = features(distant, others)
        found = {name: distance(real[x], other[x]) for name, (x, distance) in DISTANCES.items() if x in real}
        for name, value in {**found, **scores(single, shown, *words.T)}.items():
            values[name][key].append(float(value))
    record("real", others, shown, words)
    for kind, (damage, strengths) in tqdm(DAMAGES.items(), f"seed {seed}"):
        for strength in strengths:
            if damage is pass_around:
                record(kind, others, shown, pass_around(words, strength, rng))
            else:
                record(kind, damage(others, strength, rng), damage(shown, strength, rng), words)
    return values, len(reference), len(held_out)


def main():
    args = evaluate.parse(["--n", "400", "--out", "out/check-metrics.json", *sys.argv[1:]])
    args.data = args.data or "data/fluent"
    stickers = StickerSet(args.data, groups=args.groups)
    extractors = evaluate.extractors(args, T, stickers.concepts)
    values, n, held_out = zip(*(react(stickers, extractors, args.n, args.seed + i) for i in range(SEEDS)))
    real = {name: [v[name]["real"][0] for v in values] for name in values[0]}
    names = [name for name in real if all(real[name])]
    damaged = {name: {kind: [(np.array(v[name][kind]) / v[name]["real"][0]).tolist() for v in values]
                      for kind in DAMAGES} for name in names}
    head = (f"{args.data}: factors over the undamaged value, mean of {SEEDS} seeds from {args.seed} on. Distances of "
            f"{n[0]} stickers: above 1 is worse. Scores of {held_out[0]}: below 1 is worse.")
    described = [x.describe(T, stickers.size) for x in extractors]
    evaluate.write_json(args.out, dict(head=head, metrics=described, undamaged=real, damaged=damaged))
    rows = [["none: value, by seed", *(" ".join(f"{v:.3g}" for v in real[name]) for name in names)]]
    for kind, (_, strengths) in DAMAGES.items():
        cells = (" ".join(f"{x:.2f}" for x in np.mean(damaged[name][kind], 0)) for name in names)
        rows.append([f"{kind}: {', '.join(map(str, strengths))}", *cells])
    print(head, "\n".join(described), markdown(["damage", *names], rows), args.out, sep="\n\n")


if __name__ == "__main__":
    run_cli(main)
