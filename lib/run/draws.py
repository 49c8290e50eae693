"""Which samples a step has and what generator each draws from: functions of (seed, step, n), not of rank or worker."""
import itertools
from collections import Counter

import numpy as np

from lib.run.files import UserError


def rng_for(seed, step, n, stream):
    """The generator of global sample n of a step. Streams: 0, 1 ClipDataset, 2 noise of the VAE, 3 frames of a step,
    5 StickerTexts, 9 statistics of latents."""
    return np.random.default_rng([seed, step, n, stream])


class StepSampler:
    """Batch sampler: for each step of `start` to `stop` the keys of this rank, a contiguous share of all.

    A key is (step, n, T, turn), as ClipDataset takes it. plan(step) -> (frames T of a clip, samples per batch slot)."""
    def __init__(self, batch, start=0, stop=None, rank=0, world=1, plan=lambda step: (8, 1)):
        if batch % world:
            raise UserError(f"--batch {batch}: not a multiple of the {world} processes")
        self.start, self.stop, self.plan = start, stop, plan
        self.share = rank * batch // world, (rank + 1) * batch // world

    def __iter__(self):
        turns = Counter()
        for step in itertools.count() if self.stop is None else range(self.stop):
            T, times = self.plan(step)
            if step >= self.start:
                yield [(step, n, T, turns[T > 1]) for n in range(self.share[0] * times, self.share[1] * times)]
            turns[T > 1] += 1
