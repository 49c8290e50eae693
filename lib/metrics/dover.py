"""DOVER, the quality of a video in 0..1, written from its description to read DOVER.pth (Wu et al., 2023).

Its parts: Video Swin (Liu et al., 2022) with FAST-VQA's bias (Wu et al., 2022); ConvNeXt (Liu et al., 2022)."""
import functools
from collections import OrderedDict

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange

from lib.nets.weights import load_strict, read_weights
from lib.run.files import file_hash

WINDOW = dict(p=8, q=7, r=7)                     # tokens of an attention window: time, height, width


# ---- networks
def chain(**layers):
    """nn.Sequential of named layers."""
    return nn.Sequential(OrderedDict(layers))


class LastConv3d(nn.Conv3d):
    """Convolution of (B, T, H, W, C): channels last as norms and MLPs need them; depthwise runs 2 to 8 times faster."""

    def forward(self, x):
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


def windows(x):
    """(B, T, H, W, C) -> (B, n windows, 392, C)."""
    return rearrange(x, "b (t p) (y q) (x r) c -> b (t y x) (p q r) c", **WINDOW)


@functools.lru_cache
def window_tables(size, shift, device):
    """Of every pair of tokens in the windows of a grid (T, H, W) rolled by shift: (gate, crossed), (n, 392, 392) each.

    gate, uint8: the steps between their fragments (see WindowAttention). crossed, bool: the roll has made neighbours of
    opposite sides of the clip."""
    t, y, x = torch.meshgrid(*map(torch.arange, size), indexing="ij")
    wrapped = 4 * (t < shift[0]) + 2 * (y < shift[1]) + (x < shift[2])
    tokens = torch.stack([y * 7 // size[1], x * 7 // size[2], wrapped], -1).to(torch.int8)
    tokens = windows(tokens[None].roll([-s for s in shift], (1, 2, 3)))[0]                   # (n, 392, 3)
    dy, dx, crossed = (tokens[:, :, None] - tokens[:, None]).abs().unbind(-1)
    return (dy + dx).byte().to(device), (crossed > 0).to(device)


class WindowAttention(nn.Module):
    """Attention in windows with the gated relative position bias of FAST-VQA.

    The picture is 7 x 7 fragments; a pair of tokens whose fragments are `gate` steps from each other has the bias
    gate * relative + (1 - gate) * fragment. The published weights were trained with gates above 1 as they are."""

    def __init__(self, width, heads, gated):
        super().__init__()
        self.heads, self.gated = heads, gated
        self.relative_position_bias_table = nn.Parameter(torch.zeros(15 * 13 * 13, heads))
        if gated:
            self.fragment_position_bias_table = nn.Parameter(torch.zeros(15 * 13 * 13, heads))
        place = torch.cartesian_prod(*map(torch.arange, WINDOW.values()))
        dt, dy, dx = (place[:, None] - place + place[-1]).unbind(-1)
        self.register_buffer("relative_position_index", (dt * 13 + dy) * 13 + dx)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def pairs(self, table):
        """Bias table (2535, heads) -> (heads, 392, 392)."""
        return table.T[:, self.relative_position_index].contiguous()

    def forward(self, x, gate, crossed):
        """(B, n, 392, C), gate and crossed (n, 392, 392) -> (B, n, 392, C)."""
        q, k, v = rearrange(self.qkv(x), "b n i (s h c) -> s n b h i c", s=3, h=self.heads)
        relative = self.pairs(self.relative_position_bias_table)
        fragment = self.pairs(self.fragment_position_bias_table) if self.gated else relative
        difference, out = relative - fragment, []
        for i in range(len(q)):                  # the biases of all windows at once would be 240 MB
            bias = torch.addcmul(fragment, difference, gate[i].to(x.dtype)).sub_(crossed[i].to(x.dtype), alpha=100)
            out.append(F.scaled_dot_product_attention(q[i], k[i], v[i], bias[None]))
        return self.proj(rearrange(out, "n b h i c -> b n i (h c)"))


class SwinBlock(nn.Module):
    def __init__(self, width, heads, gated, shifted):
        super().__init__()
        self.shifted = shifted
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, gated)
        self.mlp = chain(fc1=nn.Linear(width, 4 * width), act=nn.GELU(), fc2=nn.Linear(4 * width, width))

    def forward(self, x):
        """(B, T, H, W, C) -> the same."""
        size = tuple(x.shape[1:4])               # an axis that one window covers is not shifted
        shift = tuple(w // 2 if self.shifted and n > w else 0 for n, w in zip(size, WINDOW.values()))
        y = windows(self.norm1(x).roll([-s for s in shift], (1, 2, 3)))
        y = self.attn(y, *window_tables(size, shift, x.device))
        grid = dict(y=size[1] // 7, x=size[2] // 7)
        y = rearrange(y, "b (t y x) (p q r) c -> b (t p) (y q) (x r) c", **grid, **WINDOW)
        x = x + y.roll(shift, (1, 2, 3))
        return x + self.mlp(self.norm2(x))


def swin_stage(width, heads, depth, last):
    blocks = (SwinBlock(width, heads, gated=not last, shifted=j % 2 == 1) for j in range(depth))
    merge = chain(join=Rearrange("b t (h p) (w q) c -> b t h w (q p c)", p=2, q=2),
                  norm=nn.LayerNorm(4 * width), reduction=nn.Linear(4 * width, 2 * width, bias=False))
    return chain(blocks=nn.Sequential(*blocks), downsample=nn.Identity() if last else merge)


def video_swin():
    """Video Swin-T, (B, 32, 224, 224, 3) -> (B, 16, 7, 7, 768)."""
    stages = (swin_stage(96 * 2 ** i, 3 * 2 ** i, depth, last=i == 3) for i, depth in enumerate((2, 2, 6, 2)))
    embed = chain(proj=LastConv3d(3, 96, (2, 4, 4), (2, 4, 4)), norm=nn.LayerNorm(96))
    return chain(patch_embed=embed, layers=nn.Sequential(*stages), norm=nn.LayerNorm(768))


class ConvNeXtBlock(nn.Module):
    def __init__(self, width, k):
        super().__init__()
        self.gamma, self.norm = nn.Parameter(torch.ones(width)), nn.LayerNorm(width, eps=1e-6)
        self.dwconv = LastConv3d(width, width, (k, 7, 7), padding=(k // 2, 3, 3), groups=width)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        """(B, T, H, W, C) -> the same."""
        return x + self.gamma * self.pwconv2(F.gelu(self.pwconv1(self.norm(self.dwconv(x)))))


class ConvNeXt(nn.Module):
    """ConvNeXt-T inflated to clips, (B, 32, 224, 224, 3) -> (B, 16, 7, 7, 768)."""

    def __init__(self, widths=(96, 192, 384, 768), depths=(3, 3, 9, 3)):
        super().__init__()
        norm = functools.partial(nn.LayerNorm, eps=1e-6)
        stem = nn.Sequential(LastConv3d(3, widths[0], (2, 4, 4), (2, 4, 4)), norm(widths[0]))
        halvings = [nn.Sequential(norm(a), LastConv3d(a, b, (1, 2, 2), (1, 2, 2))) for a, b in zip(widths, widths[1:])]
        self.downsample_layers = nn.ModuleList([stem, *halvings])
        self.stages = nn.ModuleList(nn.Sequential(*(ConvNeXtBlock(width, (1, 3, 1)[j % 3]) for j in range(depth)))
                                    for width, depth in zip(widths, depths))
        self.norm = norm(widths[-1])

    def forward(self, x):
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))
        return self.norm(x)


class DOVER(nn.Module):
    """Raw technical and aesthetic quality of normalised views, 56,218,302 parameters, names as in DOVER.pth."""

    def __init__(self):
        super().__init__()
        head = lambda: chain(fc_hid=LastConv3d(768, 64, 1), act=nn.GELU(), fc_last=LastConv3d(64, 1, 1))
        self.technical_backbone, self.technical_head = video_swin(), head()
        self.aesthetic_backbone, self.aesthetic_head = ConvNeXt(), head()

    def technical(self, x):
        """Fragments (B, 3, 32, 224, 224) -> (B,), the mean over 16 x 7 x 7 positions."""
        return self.technical_head(self.technical_backbone(x.movedim(1, -1))).mean((1, 2, 3, 4))

    def aesthetic(self, x):
        """Whole frames (B, 3, 32, 224, 224) -> (B,), likewise."""
        return self.aesthetic_head(self.aesthetic_backbone(x.movedim(1, -1))).mean((1, 2, 3, 4))


# ---- views and scores
def resize_clip(clip, size):
    """uint8 (T, H, W, 3) -> uint8 (T, *size, 3): bilinear, no antialias, as DOVER was trained with."""
    if clip.shape[1:3] == tuple(size):
        return clip
    x = torch.from_numpy(clip.astype(np.float32)).permute(0, 3, 1, 2)
    return F.interpolate(x, tuple(size), mode="bilinear").round().byte().permute(0, 2, 3, 1).numpy()


def dover_frames(clip):
    """uint8 (T, H, W, 3) -> (the clip with at least 32 frames and 224 px on the shorter side, what was done in words).

    The published sampler would show the aesthetic branch the first of 8 frames 32 times, the technical branch a
    corner of small ones. ValueError for any other array."""
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or not clip.size:
        raise ValueError(f"DOVER needs a clip of uint8 (T, H, W, 3), not {clip.dtype} {clip.shape}")
    T, *old = clip.shape[:3]
    new, times = [round(n * max(1, 224 / min(old))) for n in old], -(-32 // T)
    words = lambda size: " x ".join(map(str, size if size[0] != size[1] else size[:1]))
    repeated = f", each repeated {times} times" if times > 1 else ""
    resized = f" -> {words(new)}" if new != old else ""
    return np.repeat(resize_clip(clip, new), times, axis=0), f"{T} frames{repeated}, {words(old)}{resized} px"


def dover_indices(n, segments, frames):
    """Every second frame from the start of each of n frames' equal segments, after the last frame the first: (segments,
    frames); and the number of frames by which a start may be moved, itself excluded."""
    start = np.arange(segments)[:, None] * (n // segments)
    return (start + 2 * np.arange(frames)) % n, max(n // segments - 2 * frames, 0)


def fragments(frames, rng):
    """(T, H, W, 3) -> (T, 224, 224, 3): a patch of 32 px of each of 7 x 7 cells, the same in all frames."""
    (height, width), patch = (n // 7 for n in frames.shape[1:3]), np.arange(32)
    y = np.arange(7)[:, None] * height + rng.integers(max(height - 32, 1), size=(7, 7))
    x = np.arange(7) * width + rng.integers(max(width - 32, 1), size=(7, 7))
    rows = y[:, None, :, None] + patch[:, None, None]                        # (7, 32, 7, 1)
    columns = x[:, None, :, None] + patch                                    # (7, 1, 7, 32)
    return frames[:, rows, columns].reshape(-1, 224, 224, 3)


def draw_starts(n, segments, frames, rng):
    """dover_indices with every segment's start moved at random."""
    indices, room = dover_indices(n, segments, frames)
    return (indices + rng.integers(max(room, 1), size=(segments, 1))) % n


def normalise(x):
    """uint8 (B, T, H, W, 3) -> float32 (B, 3, T, H, W) by ImageNet's mean and deviation."""
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    return rearrange((torch.from_numpy(x) - mean) / std, "b t h w c -> b c t h w")


def dover_views(clip, rng):
    """uint8 (T, H, W, 3) -> technical (3, 3, 32, 224, 224) and aesthetic (1, 3, 32, 224, 224) views, normalised.

    technical: fragments of 3 segments of 63 frames; aesthetic: frames spread over the clip, squeezed to a square."""
    clip, _ = dover_frames(clip)
    segments = draw_starts(len(clip), 3, 32, rng)
    spread = draw_starts(len(clip), 32, 1, rng)[:, 0]
    technical = np.stack([fragments(clip[indices], rng) for indices in segments])
    return normalise(technical), normalise(resize_clip(clip[spread], (224, 224))[None])


def dover_fuse(technical, aesthetic):
    """Raw scores, numbers or arrays -> dict(overall, technical, aesthetic) in 0..1, by each branch's published mean,
    deviation and weight."""
    t, a = (technical - 0.1107) / 0.07355, (aesthetic + 0.08285) / 0.03774
    sigmoid = lambda z: 0.5 + 0.5 * np.tanh(z / 2)                           # no overflow
    return dict(overall=sigmoid(0.6104 * t + 0.3896 * a), technical=sigmoid(t), aesthetic=sigmoid(a))


class DOVERExtractor:
    """Clips -> raw technical and aesthetic scores. The seed places fragments and frames, in every clip alike."""
    name, width, batch = "dover", 2, 1

    def __init__(self, file, seed=0, device="cpu"):
        self.file, self.seed, self.device = file, seed, device
        self.net = load_strict(DOVER(), read_weights(file, "--dover"), "--dover", file).to(device)
        self.key = dict(dover=file_hash(file), seed=seed)

    def describe(self, T, size):
        done = dover_frames(np.zeros((T, size, size, 3), np.uint8))[1]
        return f"VQA: DOVER, {self.file} (SHA-256 {self.key['dover'][:12]}), seed {self.seed}, {done}"

    def scores(self, raw, **_):
        """{metric: (N,)} of raw scores (N, 2)."""
        fused = dover_fuse(*raw.astype(float).T)
        return {f"VQA {name}".replace(" overall", ""): values for name, values in fused.items()}

    @torch.inference_mode()
    def __call__(self, clips):
        """uint8 (N, T, H, W, 3) on white -> (N, 2) float32."""
        rows = []
        for clip in clips:                       # three technical views at once are slower and need twice the memory
            views = dover_views(clip, np.random.default_rng(self.seed))
            technical, aesthetic = (view.to(self.device) for view in views)
            technical = np.mean([self.net.technical(view[None]).item() for view in technical])
            rows.append((technical, self.net.aesthetic(aesthetic).item()))
        return np.array(rows, np.float32)
