"""Errors of networks on held-out stickers, by which tools/ablations.py and tools/claim.py choose and compare."""
import numpy as np
import torch

from data import StickerSet, eval_mask
from evaluate import filled, pick, read_clips
from lib.metrics.standins import denoising_loss, timesteps_of, z0_errors
from lib.nets.weights import identity
from lib.run import launch
from lib.run.files import UserError, json_hash, read_json, write_json
from sample import Sampler

T, BATCH = 8, 16                                 # frames of a clip, clips at once
MORE_RATES = 3                                   # by which a grid of learning rates may grow


class HeldOut:
    """One sticker of each of up to n concepts of a split (of some groups); clip k's noise is seeded by (seed, k)."""

    def __init__(self, data, split, n, seed=0, groups=None):
        stickers = StickerSet(data, split, groups or None)
        records = pick(stickers, n, T, seed)
        if len(records) < 2:
            raise UserError(f"--data {data}: {len(records)} concepts of its {split} split have {T} frames; at least 2 "
                            "are needed")
        self.clips, self.captions = read_clips(stickers, records, T), [r["caption"] for r in records]
        self.split, self.seed = split, seed
        self.made_of = [stickers.meta["hash"], split, seed, [r["file"] for r in records]]

    def copying(self, sampler):
        """(N,) squared error of the latents of a copied first frame, those of the others."""
        with torch.no_grad():
            z = sampler.known_latents(self.clips, torch.ones(self.clips.shape[:2])).cpu().numpy()
        return ((filled(z, eval_mask("it2v", T, T), "nearest") - z) ** 2)[:, 1:].mean((1, 2, 3, 4))

    def errors(self, sampler, task, text=True):
        """(2, N) of frames that are not given: denoising loss, mean of timesteps, and error in one step from noise."""
        mask, at = eval_mask(task, T, T), timesteps_of(sampler)
        captions = self.captions if text and task != "i2v" else [""] * len(self.clips)
        found = z0_errors(sampler, self.clips, captions, mask, self.seed, BATCH, at)[:, :, mask == 0].mean(2)
        return np.stack([denoising_loss(sampler, found), found[:, -1]])

    def measure(self, model, *names):
        """{name: errors} of a model.safetensors; names: of tasks, or "it2v, no text". They are kept beside it."""
        made_of, sampler = [identity(model), *self.made_of], None
        path = model.with_name(f"{model.stem}-{self.split}-{json_hash(made_of)[:8]}.json")
        found = read_json(path).get("found", {})
        for name in [name for name in names if name not in found]:
            sampler = sampler or Sampler(model)
            task, _, rest = name.partition(", ")
            found[name] = self.errors(sampler, task, text=not rest).tolist()
            write_json(path, dict(made_of=made_of, found=found))
        return {name: np.array(found[name]) for name in names}

    def loss(self, model, *names):
        """Denoising loss, mean of these."""
        return float(np.mean([losses for losses, _ in self.measure(model, *names).values()]))


def best_of(models, val, *names):
    """The key of {step: model} whose loss on val, mean of these tasks, is lowest."""
    return min(models, key=lambda step: val.loss(models[step], *names))


def choose_rates(trial, rows, lrs, jobs):
    """{row: the learning rate at which trial(row, lr) is lowest}, which is said; of one alone nothing is tried.

    lrs: increasing. A row's grid grows by the ratio of its first two where its best is an end, MORE_RATES times at
    most."""
    if len(lrs) == 1:
        return dict.fromkeys(rows, lrs[0])
    grids, losses, ratio = {row: list(lrs) for row in rows}, {}, lrs[1] / lrs[0]
    for left in range(MORE_RATES, -1, -1):
        pairs = [(row, lr) for row, grid in grids.items() for lr in grid if (row, lr) not in losses]
        losses.update(zip(pairs, launch.several(trial, pairs, jobs)))
        rates = {row: min(grid, key=lambda lr: losses[row, lr]) for row, grid in grids.items()}  # noqa: B023
        for row, grid in grids.items() if left else ():
            if rates[row] == grid[0]:
                grid.insert(0, float(f"{grid[0] / ratio:.1g}"))
            elif rates[row] == grid[-1]:
                grid.append(float(f"{grid[-1] * ratio:.1g}"))
    for row, grid in grids.items():
        print(f"{row}: --lr {rates[row]:g} ({', '.join(f'{lr:g}: {losses[row, lr]:.4f}' for lr in grid)})", flush=True)
    return rates
