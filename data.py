"""Stickers in, training clips out: masks, key frames, texts, prepared sets and the draws of training clips.

    python data.py fluent                        3,391 Fluent Emoji stickers (about 730 MB by npm) -> data/fluent
    python data.py emoji                         9,357 stills in the styles Noto, Twemoji, Fluent  -> data/emoji
    python data.py emoji --styles emojione ...   those of other hands, vectors at any --size
    python data.py vsd2m MANIFEST --root DIR     the VSD2M manifest as its authors publish it      -> data/vsd2m
    python data.py folder DIR                    any folder of GIF, WebP, APNG, PNG, JPEG files    -> data/folder
    python data.py long-tail SET                 a set whose training stickers keep few frames     -> data/long-tail
    python data.py mirrored SET                  its moving training stickers, left for right      -> data/mirrored
    python data.py varied SET                    they in other places, sizes, hues; with no text   -> data/varied
    python data.py synthetic                     captioned moving shapes, no network needed        -> data/synthetic

Key frames: paper Fig. 3 and Table 6. Condition masks: paper Table 7. Every draw is a function of (seed, step, n).
"""
import functools
import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from lib.media import sources
from lib.media.index import SPLITS, WORDLESS, Chain, Index, JoinedIndex, Members
from lib.media.pictures import even_frames, to_tensor
from lib.media.prepare import prepare
from lib.nets.towers import clip_tokenizer
from lib.run.data_options import parse_options
from lib.run.draws import rng_for
from lib.run.files import UserError, cache_path, rows, run_cli

TASKS = ("t2v", "i2v", "it2v", "interpolation", "prediction_forward", "prediction_backward")
MAX_KEYS = 8                                     # paper Table 6: k = 3..8


# ---- the two masks
def loss_mask(n, T):
    """(T,) float32: 1 = real frame, 0 = padding."""
    return (np.arange(T) < n).astype(np.float32)


def cond_mask(task, n, T, u):
    """(T,) float32: 1 = frame given, over the n real frames for the task that fits them; u in [0, 1) is the draw."""
    sets = given_frames(fit_task(task, n), n)
    return mask_of(sets[int(u * len(sets))], T)


def eval_mask(task, n, T):
    """(T,) float32: the one mask of a task in evaluation; at n = T = 8 the paper's (Table 7)."""
    task = fit_task(task, n)
    forward, backward = (min(max(round(n * q / 8), 1), n - 1) for q in (5, 6))
    return mask_of({"t2v": range(0), "i2v": range(1), "it2v": range(1), "interpolation": range(0, n, 2),
                    "prediction_forward": range(forward), "prediction_backward": range(n - backward, n)}[task], T)


def fit_task(task, n):
    """The nearest task that fits n real frames: at least one to predict and, except for t2v, one given."""
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; one of {', '.join(TASKS)}")
    if n == 1:
        return "t2v"
    return "prediction_forward" if n == 2 and task == "interpolation" else task


def given_frames(task, n):
    """The equally likely sets of given frames of a task with n real frames (paper Table 7)."""
    if task == "t2v":
        return [range(0)]
    if task in ("i2v", "it2v"):
        return [range(i, i + 1) for i in range(n)]
    if task == "interpolation":
        return [range(0, n, 2), range(1, n, 2), range(0, n, 3)]
    return [range(q) if task == "prediction_forward" else range(n - q, n) for q in range(1, n)]


def mask_of(given, T):
    """Frame numbers -> (T,) float32."""
    mask = np.zeros(T, np.float32)
    mask[list(given)] = 1
    return mask


def unknown_share(task, T=8):
    """Expected share of unknown frames of a full clip under the masks that cond_mask draws from."""
    return float(np.mean([1 - len(given) / T for given in given_frames(fit_task(task, T), T)]))


UNKNOWN = np.array([unknown_share(task) for task in TASKS])


# ---- the draws of a training sample
def draw_frames(c, step, T):
    """(frames of a clip in this step, clips a batch slot stands for): T stills for a clip, or clips, half of which have
    all T frames and the others 3 to T - 1. c: train.TrainConfig."""
    rng = rng_for(c.seed, step, 0, 3)
    if rng.random() < c.still_share:
        return 1, T
    whole = c.lengths != "step" or T < 4 or rng.random() < 0.5
    return (T if whole else int(rng.integers(3, T))), 1


def draw_condition(c, p, u, n, T, timesteps, wordless=False):
    """(task number, condition mask (T,), whether the text is kept, timestep, whether it runs backwards, which other
    sticker's text it has: a place in [0, 1), or None) of a clip of n frames.

    c: train.TrainConfig. p: probabilities of TASKS. u (4,) in [0, 1): the draws of each of these, in this order.
    wordless: the clip's text is not read, so some frames are given where any task but t2v has a chance."""
    for_task, for_mask, for_drop, for_timestep = u
    if wordless and p[1:].any():
        p = np.array([0, *p[1:]]) / p[1:].sum()
    task = fit_task(TASKS[min(int(np.searchsorted(p.cumsum(), for_task)), len(TASKS) - 1)], n)
    mask = cond_mask(task, n, T, for_mask)
    text_drop = c.given_text_drop if mask.any() else c.text_drop
    no_text = wordless or task == "i2v" or for_drop < text_drop + c.both_drop
    backwards = n == T and mask.any() and for_drop < c.backwards * text_drop
    if text_drop <= for_drop < text_drop + c.both_drop + c.cond_drop:
        mask = np.zeros_like(mask)
    other = (for_drop - 1) / c.other_text + 1 if mask.any() and for_drop >= 1 - c.other_text and not no_text else None
    shifted = c.timestep_shift * for_timestep / (1 + (c.timestep_shift - 1) * for_timestep)  # as Stable Diffusion 3's
    return TASKS.index(task), mask, not no_text, int(shifted * timesteps), backwards, other


# ---- key frames
def features(frames):
    """(n, S, S, 4) -> (n, 1536): 16x16 RGB means over grey, and their difference to the next frame.

    Of more than 64 pixels a side every (S // 64)-th counts, to spare time. The frames are shrunk as one tall picture,
    whose boxes end where frames do; first across, or Pillow's rounding would depend on n."""
    step = max(1, frames.shape[1] // 64)
    sample = np.ascontiguousarray(frames.view(np.uint32)[:, ::step, ::step]).view(np.uint8)   # whole pixels copy faster
    n, side = sample.shape[:2]
    tall = Image.fromarray(sample.reshape(n * side, -1, 4)).convert("RGBa")
    small = tall.resize((16, n * side), Image.Resampling.BOX).resize((16, 16 * n), Image.Resampling.BOX).convert("RGBA")
    small = np.asarray(small).reshape(-1, 16, 16, 4).astype(np.float32) / 255
    rgb = (small[..., :3] - 0.5) * small[..., 3:]
    return np.concatenate([rgb, np.diff(rgb, axis=0, append=rgb[-1:])], -1).reshape(n, -1)


def first_equal(x):
    """(n, F) -> (n,) number of the first row that equals each row."""
    seen = {}
    return np.array([seen.setdefault(row.tobytes(), i) for i, row in enumerate(x)])


def key_frames(x, k):
    """First frame of each of k clusters of the features x (n, F), in time order; exactly k, also of fewer clusters."""
    from scipy.cluster.vq import kmeans2
    label = first_equal(x)
    if len(np.unique(label)) > k:
        _, label = kmeans2(x, k, minit="++", rng=0, check_finite=False)
    first = np.unique(label, return_index=True)[1].tolist()
    fill = [i for i in even_frames(len(x), k) + list(range(len(x))) if i not in first]
    return sorted(first + list(dict.fromkeys(fill))[:k - len(first)])


def key_table(frames):
    """What preparing adds to an index record: the key frames for each k."""
    x = features(frames)                         # -> (n, n) of the same distances: k-means takes a third of the time
    x = np.linalg.qr((x - x.mean(0)).T.astype(np.float64), mode="r").T[first_equal(x)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")          # of empty clusters
        return dict(keys={str(k): key_frames(x, k) for k in range(3, min(MAX_KEYS, len(frames)) + 1)})


def choose_frames(record, rng, T, how="kmeans", k=None):
    """Increasing frame numbers of a training clip: k of them, or as many as there are; None draws k from 3..min(T, n).

    kmeans: the stored key frames for k, after those that a manifest names. even: evenly spaced from a random phase.
    mixed: one of the two by a coin."""
    n = record["n"]
    if how == "mixed":
        how = "kmeans" if rng.random() < 0.5 else "even"
    if k is None:
        k = int(rng.integers(3, min(T, n) + 1)) if min(T, n) > 3 else T
    k = min(k, n)
    if how == "even" or not 3 <= k <= MAX_KEYS:
        return random_phase(range(n), k, rng)
    given, keys = record.get("keyframe_idx", []), record["keys"][str(k)]
    if len(given) >= k:
        return random_phase(given, k, rng)
    return sorted(given + [i for i in keys if i not in given][:k - len(given)])


def random_phase(candidates, k, rng):
    """k of the candidates, evenly spaced from a random phase, in order."""
    places = (np.arange(k) + rng.random()) * len(candidates) / k
    return [candidates[int(i)] for i in places]


# ---- texts
def text_for(record, rng, word_dropout=0.2, keywords=0.5):
    """Caption; with chance `keywords` they follow it, or (as often) some of them stand alone, as people type them.
    Each word turns into "#" by chance (the paper's "Text Aug")."""
    parts, u = [record["caption"]], rng.random()
    if u < keywords and record["keywords"]:
        parts += record["keywords"]
        if u < keywords / 2:
            some = rng.permutation(record["keywords"])[:1 + rng.integers(len(record["keywords"]))]
            parts = [*some, f"{record['style']} style"] if "style" in record else some
    words = ", ".join(parts).split()
    return " ".join("#" if u < word_dropout else word for u, word in zip(rng.random(len(words)), words))


def tokenize(texts):
    """List of B strings -> (B, 77) int64, open_clip's tokens."""
    return clip_tokenizer()(list(texts))


def vocabulary(records):
    """Sorted tokens of all captions and keywords, of "#", of the ends of a text and of padding."""
    texts = {", ".join([r["caption"], *r["keywords"]]) for r in records} | {"#"}
    return sorted(set().union(*(tokenize([text]).unique().tolist() for text in texts)))


class StickerTexts(Sequence):
    """All texts that training shows of a set: row 0 is "", row 1 + i * variants + v is variant v of sticker i.

    Variant 0 is the bare caption, others are drawn by text_for: so few that a frozen tower's features can be cached."""
    def __init__(self, stickers, variants, seed, word_dropout, keywords):
        self.stickers, self.variants, self.seed, self.chances = stickers, variants, seed, (word_dropout, keywords)

    @property
    def made_of(self):
        """All that the texts depend on, as JSON has it."""
        groups = self.stickers.arguments[2] or []
        return [self.stickers.meta["hash"], sorted(groups), self.variants, self.seed, *self.chances]

    def rows(self, i):
        """The rows of sticker i's variants."""
        return range(1 + i * self.variants, 1 + (i + 1) * self.variants)

    def row(self, i, rng):
        """The row of a variant of sticker i, drawn."""
        return self.rows(i)[int(rng.integers(self.variants))]

    def __len__(self):
        return 1 + len(self.stickers) * self.variants

    def __getitem__(self, row):
        if row == 0:
            return ""
        i, v = divmod(range(len(self))[row] - 1, self.variants)
        record = self.stickers.records[i]
        return text_for(record, rng_for(self.seed, i, v, 5), *self.chances) if v else record["caption"]


# ---- prepared sets
class StickerSet:
    """A prepared set, or its stickers of one split or of some groups; a list of folders: several sets as one.

    records: index records, parsed when asked for; lengths, split, concept, wordless (data.py varied): arrays, an entry
    a record; members: record numbers of each concept, by name; frames: all of the folder, (n, S, S, 4) uint8. It
    pickles as its arguments."""
    def __init__(self, folder, split=None, groups=None):
        folders = folder if isinstance(folder, list) else [folder]
        index = JoinedIndex(folders) if len(folders) > 1 else Index(folders[0])
        self.arguments, self.folder = (folder, split, groups), index.folder
        self.meta, self.size, self.frames = index.meta, index.meta["size"], index.frames
        chosen = np.full(len(index), True) if split is None else index.columns["split"] == SPLITS.index(split)
        if groups is not None:
            known = self.meta["groups"]
            if unknown := [name for name in groups if name not in known]:
                raise UserError(f"--groups {' '.join(unknown)}: {self.folder} has {', '.join(known)}")
            chosen &= np.isin(index.columns["group"], [known.index(name) for name in groups])
        self.records = index.select(np.flatnonzero(chosen))
        columns = index.columns[chosen]
        self.lengths, self.concept = columns["n"].copy(), columns["concept"].astype(np.int64)
        self.split = np.array(SPLITS)[columns["split"]]
        self.wordless = np.array([name == WORDLESS for name in self.meta["groups"]], bool)[columns["group"]]
        self.members = Members(self.concept)

    def __reduce__(self):
        return StickerSet, self.arguments

    def other(self, split):
        """The same set's stickers of another split."""
        folder, _, groups = self.arguments
        return StickerSet(folder, split, groups)

    def __len__(self):
        return len(self.records)

    @functools.cached_property
    def concepts(self):
        """Sorted names of the concepts."""
        return [self.records[ids[0]]["concept"] for ids in self.members]

    def clip(self, record, idx):
        """(len(idx), S, S, 4) uint8 straight RGBA."""
        return self.frames[record["first"] + np.asarray(idx, int)]


def latents_path(stickers, vae_hash):
    """Where the latents of a set under a VAE lie."""
    return cache_path(stickers.folder, "latents", [vae_hash, stickers.meta["hash"]])


@torch.no_grad()
def cache_latents(folder, vae, vae_hash):
    """Encode what is missing -> map (frames, 2, c, h, w) float16: mean and log-variance, not standardised."""
    if isinstance(folder, list):
        return Chain([cache_latents(part, vae, vae_hash) for part in folder])
    stickers = StickerSet(folder)
    n, side = len(stickers.frames), stickers.size // vae.config.factor
    pixels = 2 ** (21 if vae.latent_mean.is_cuda else 18)        # at once; the widest layers are as large as the image
    batch = min(max(pixels // stickers.size ** 2, 1), 64)

    def encode(part):
        moments = torch.stack(vae.moments(vae.images(to_tensor(stickers.frames[part]))), 1)
        return moments.float().clamp(-65504, 65504).half().cpu().numpy()
    shape, path = (2, vae.config.latent_channels, side, side), latents_path(stickers, vae_hash)
    return rows(path, n, shape, np.float16, batch, encode, "encoding latents")


# ---- training clips
@functools.lru_cache(8)
def permutation(seed, epoch, kind, count):
    return np.random.default_rng([seed, epoch, kind, count]).permutation(count)


class ClipDataset(torch.utils.data.Dataset):
    """Training clips by (step, n, T, turn): dict(z (T, C, h, w), noise, loss_mask (T,), draws (4,), n, index, ...).

    All functions of (seed, step, n). draws: uniform, for task, condition mask, dropped conditions and timestep; n: real
    frames; index: the sticker; tokens (77,) of its text or, where there are `texts`, text_row: its row there; where
    `feature`, a shape, is not empty, text_noise: as many standard normal values.
    turn: earlier steps of this kind, whole clips or single frames; a function of the step (StepSampler).
    latents: (frames, 2, C, h, w), mean and log-variance. texts: StickerTexts to draw from, if texts must be finite.
    Concepts are visited in permuted order, equally often; which of its variants (skin tone, gender) is drawn, so that
    twins do not crowd out the rest. T = 1: single frames of any sticker that is not wordless. k "step": clips have T
    frames; "sample" (paper): 3..T, or all of a shorter sticker's, padded to T. shortest: frames of a sticker that gives
    clips; None: 3, and 1 where k is drawn for each sample."""
    def __init__(self, sticker_set, latents, seed, batch, T=8, how="kmeans", k="sample", word_dropout=0.2, keywords=0.5,
                 texts=None, feature=(), shortest=None):
        self.set, self.latents, self.texts, self.chances = sticker_set, latents, texts, (word_dropout, keywords)
        self.feature = feature
        self.seed, self.batch, self.T, self.how, self.k = seed, batch, T, how, k
        if not len(sticker_set):
            raise UserError(f"{sticker_set.folder}: no stickers in this split")
        if len(latents) != sticker_set.meta["frames"]:
            raise UserError(f"{sticker_set.folder}: {sticker_set.meta['frames']} frames but {len(latents)} latents")
        self.everything = Members(sticker_set.concept, np.flatnonzero(~sticker_set.wordless))
        if not len(self.everything):
            raise UserError(f"{sticker_set.folder}: a varied set is trained on beside the one that it was made of")
        least = shortest or (1 if k == "sample" else 3)
        self.clips = Members(sticker_set.concept, np.flatnonzero(sticker_set.lengths >= least))
        if not len(self.clips):
            raise UserError(f"{sticker_set.folder}: no sticker of this split has {least} frames or more; "
                            "--lengths sample trains on shorter ones")

    def __len__(self):
        return len(self.everything)

    def variants(self, turn, n, T):
        """The record numbers among which sample n of a step draws."""
        pool = self.clips if T > 1 else self.everything
        place = turn * self.batch * (1 if T > 1 else self.T) + n
        epoch, place = divmod(place, len(pool))
        return pool[permutation(self.seed, epoch, T > 1, len(pool))[place]]

    def __getitem__(self, key):
        step, n, T, turn = key
        rng = rng_for(self.seed, step, n, 0)
        ids = self.variants(turn, n, T)
        index = int(ids[int(rng.integers(len(ids)))])
        record = self.set.records[index]
        idx = choose_frames(record, rng, T, self.how, T if T == 1 or self.k == "step" else None)
        words = (dict(text_row=self.texts.row(index, rng)) if self.texts else
                 dict(tokens=tokenize([text_for(record, rng, *self.chances)])[0]))
        mean, logvar = np.asarray(self.latents[record["first"] + np.asarray(idx)], np.float32).swapaxes(0, 1)
        z = np.zeros((T, *mean.shape[1:]), np.float32)
        z[:len(idx)] = mean + np.exp(0.5 * logvar) * rng.standard_normal(mean.shape, np.float32)
        later = rng_for(self.seed, step, n, 1)
        draws, noise = later.random(4), torch.from_numpy(later.standard_normal(z.shape, np.float32))
        if self.feature:
            words["text_noise"] = later.standard_normal(self.feature, np.float32)
        return dict(z=torch.from_numpy(z), noise=noise, loss_mask=torch.from_numpy(loss_mask(len(idx), T)), draws=draws,
                    n=len(idx), index=index, **words)


def main(argv=None):
    o = parse_options(__doc__, argv)
    source, jobs, more = sources.source_of(o)
    import scipy.cluster.vq  # noqa: F401        here once, before workers are forked
    prepare(o.out, o.size, source, jobs, key_table, o.workers, o.most_frames, **more)
    if o.command == "emoji":
        counts = Counter((r["style"], r["split"]) for r in StickerSet(o.out).records)
        for style in sorted({style for style, _ in counts}):
            print(f"{style}: " + ", ".join(f"{counts[style, split]} {split}" for split in SPLITS))


if __name__ == "__main__":
    run_cli(main)
