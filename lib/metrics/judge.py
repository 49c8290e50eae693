"""Recog@1: is a sticker taken for the concept of its caption? A small network that was trained across drawing styles.

tools/train_judge.py trains it on emoji stills: two drawings of one concept in two styles attract each other (InfoNCE,
van den Oord et al. 2018). A concept's place is the mean embedding of its drawings by some hands, in the shipped file
Noto and Twemoji, so a sticker in Fluent's style is judged by other hands, whether its concept was trained on or not.
The shipped DFGN saw these two, so of a new concept it draws what they show: checkpoints/judge-ten.safetensors, whose
places are by hands that no generator sees, recognises fewer of those (docs/results.md)."""
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.metrics.distances import to_signed
from lib.nets.weights import load_strict, read_metadata, read_weights
from lib.run.files import UserError, file_hash

SHIPPED = Path(__file__).resolve().parents[2] / "checkpoints/judge.safetensors"


class Block(nn.Module):
    """Two 3x3 convolutions, the first with stride 2, beside a pooled skip."""

    def __init__(self, cin, cout):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(16, cin), nn.Conv2d(cin, cout, 3, stride=2, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(16, cout), nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(F.avg_pool2d(x, 2)) + self.conv2(F.silu(self.norm2(h)))


class Judge(nn.Module):
    """Pictures (N, 3, 64, 64) in [-1, 1] -> unit vectors (N, width).

    places (C, width): unit vectors of the concepts, in the order of `concepts`."""

    def __init__(self, concepts, widths=(48, 96, 160, 256), width=128):
        super().__init__()
        self.concepts, self.width = list(concepts), width
        self.stem = nn.Conv2d(3, widths[0], 5, stride=2, padding=2)
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in zip(widths, widths[1:])))
        self.norm, self.out = nn.GroupNorm(16, widths[-1]), nn.Linear(widths[-1], width)
        self.register_buffer("places", torch.zeros(len(self.concepts), width))

    def forward(self, x):
        h = F.silu(self.norm(self.blocks(self.stem(x))))
        return F.normalize(self.out(h.mean((2, 3))), dim=1)

    def recognised(self, embeddings, concepts, among=None):
        """(N,) 1.0 where the nearest place is that of the clip's own concept, 0.0 where it is not, nan where the judge
        has no such concept. embeddings (N, width), concepts: N names; among: names of the places, or all."""
        number = {name: i for i, name in enumerate(self.concepts)}
        rows = [number[name] for name in (self.concepts if among is None else sorted(set(among) & number.keys()))]
        nearest = np.array(rows)[(np.asarray(embeddings) @ self.places[rows].float().numpy().T).argmax(1)]
        own = np.array([number.get(name, -1) for name in concepts])
        return np.where(own < 0, np.nan, (nearest == own).astype(float))


def load_judge(path=SHIPPED, option="--judge"):
    """The Judge in a file of tools/train_judge.py, in eval mode. UserError for any other file; it names the option."""
    weights = read_weights(path, option)
    try:
        metadata = read_metadata(path)
        net = Judge(metadata["concepts"]) if metadata["kind"] == "judge" else None
    except Exception:                            # a file of another kind may raise nearly anything
        net = None
    if net is None:
        raise UserError(f"{option} {path}: not a file that tools/train_judge.py wrote")
    return load_strict(net, weights, option, path)


def same_sticker(unknown, given):
    """(N,) 1.0 where a clip's unknown frames lie nearest to its own given frames among those of all N clips, else 0.0.

    unknown, given (N, width): their embeddings; equal ones of other clips (twins) count as its own."""
    close = np.asarray(unknown, float) @ np.asarray(given, float).T
    return (close.diagonal() >= close.max(1) - 1e-6).astype(float)


class JudgeExtractor:
    """Clips -> a unit vector each, the mean over their frames."""
    name, batch = "judge", 64

    def __init__(self, path=SHIPPED, device="cpu"):
        self.net, self.key = load_judge(path).to(device), dict(file=file_hash(path))
        self.width = self.net.width

    def describe(self, T, size):
        count = len(self.net.concepts)
        return (f"Recog@1: share of stickers whose nearest of {count} concepts is that of their caption (chance "
                f"{1 / count:.4f}), or of N, those that are asked for (chance 1 / N); by drawings in other styles")

    def knows(self, concepts):
        return bool(set(self.net.concepts) & set(concepts))

    def scores(self, embeddings, concepts, **_):
        """{metric: (n,)}: 1 where a clip is recognised, among all concepts and among those that are asked for; of the n
        clips whose concept the judge has."""
        asked = sorted(set(self.net.concepts) & set(concepts))
        found = {"Recog@1": self.net.recognised(embeddings, concepts),
                 f"Recog@1 of {len(asked)}": self.net.recognised(embeddings, concepts, asked)}
        return {name: hits[~np.isnan(hits)] for name, hits in found.items()}

    @torch.no_grad()
    def __call__(self, clips):
        """uint8 (N, T, H, W, 3) on white -> (N, width) float32."""
        x = to_signed(clips).flatten(0, 1).to(self.net.places.device)
        if x.shape[-1] != 64:
            x = F.interpolate(x, (64, 64), mode="bilinear", antialias=True)
        mean = self.net(x).unflatten(0, clips.shape[:2]).mean(1)
        return F.normalize(mean, dim=1).cpu().numpy()
