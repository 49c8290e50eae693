"""What evaluate.py measures with: I3D (FVD), DOVER (VQA), CLIP, stand-ins that need no download, and the numerics.

    python metrics.py      # speed on this machine: I3D against torch.jit.freeze, bf16, DOVER, FD-app and FD-mot of 400 clips

Published weights are read from local files, never downloaded. Without them FD-app, FD-mot, NIQE-local and R@1-local take their
place under names of their own: they order the sets of one table, and are comparable with no published number.
Sources: Carreira and Zisserman, 2017 (I3D); Unterthiner et al., 2018 (FVD); Wu et al., 2023 (DOVER); Radford et al., 2021 (CLIP);
Dowson and Landau, 1982 (Fréchet distance of Gaussians); Chong and Forsyth, 2020 (extrapolation to infinitely many samples);
Efron and Tibshirani, 1993 (bootstrap, jackknife); Video Swin, Liu et al., 2022; ConvNeXt, Liu et al., 2022; FAST-VQA, Wu et al., 2022;
Hotelling, 1936, and Vinod, 1976 (canonical correlations, with a ridge); Mittal et al., 2012 and 2013 (BRISQUE, NIQE).
"""
import functools
import re
import time
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from scipy.special import gammaln

from data import UserError, even_frames, tokenize
from model import count_words
from train import check_fit, differs, file_hash, find_clip, fit_weights, is_torchscript, read_model, read_weights, save_model

PSNR_CAP = 50.0                                  # dB: a frame that is copied and did not move would have an infinite one


# ------------------------------------------------------------------------------------------------ numbers
def factor(x):
    """Features (N, D) -> (mean (D,), A) with A.T @ A the covariance (over N - 1) and at most D rows in A."""
    if len(x) < 2:
        raise ValueError(f"a Fréchet distance needs at least 2 samples a set, not {len(x)}")
    mean = x.mean(0)
    A = (x - mean) / np.sqrt(len(x) - 1)
    return mean, np.linalg.qr(A, mode="r") if len(A) > A.shape[1] else A


def frechet(a, b):
    """|m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2) of features (N, D) and (M, D), in float64.

    With S1 = A.T A and S2 = B.T B the last trace is the sum of the singular values of A B.T: exact for singular covariances
    (N <= D), nothing is added to the diagonal, and the matrices are no larger than the smaller of N and D."""
    (m1, A), (m2, B) = factor(np.asarray(a, np.float64)), factor(np.asarray(b, np.float64))
    return float(((m1 - m2) ** 2).sum() + (A ** 2).sum() + (B ** 2).sum() - 2 * np.linalg.svd(A @ B.T, compute_uv=False).sum())


def standardise(reference, *others):
    """Every set (n, D) less the reference's mean, over its deviation: a list, the reference first.

    A constant feature has deviation 1. One that hardly varies (a channel that one sticker in hundreds wakes) would outweigh
    all others together, so no deviation is less than a tenth of the median one."""
    std = reference.std(0)
    constant = std <= 1e-9 * np.abs(reference).max(0)
    std = np.where(constant, 1, np.maximum(std, 0.1 * np.median(std)))
    return [(x - reference.mean(0)) / std for x in (reference, *others)]


def fd(reference, other):
    """Fréchet distance a feature, (N, D) and (M, D) standardised by the reference: FD-app and FD-mot."""
    return frechet(*standardise(reference, other)) / reference.shape[1]


def bootstrap(values, statistic=np.mean, draws=2000, seed=0):
    """95 % percentile interval (low, high) of statistic(values, axis), values (n,) resampled with replacement."""
    rows = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(statistic(np.asarray(values)[rows], axis=1), (2.5, 97.5))
    return float(low), float(high)


def bootstrap_fd(reference, other, draws=200, seed=0, paired=False, distance=fd):
    """95 % interval (low, high) of a distance at this number of clips; paired: row i of both sets belongs to one concept.

    A resampled set has fewer distinct clips, so its distance is biased upward: the percentiles are moved by as much as puts
    their median on the measured value, and end at 0. Each draw standardises by its own reference, whose deviation is a large
    part of the uncertainty. On 120 times 48 of 526 stickers the interval held the mean distance of 48 clips in 87 to 100 % of
    the cases, plain percentiles in 12 to 93 %, reversed ones (2 fd - percentile: they undo the bias of N, too) in 23 to 79 %."""
    rng, values = np.random.default_rng(seed), []
    for _ in range(draws):
        i = rng.integers(len(reference), size=len(reference))
        j = i if paired else rng.integers(len(other), size=len(other))
        values.append(distance(reference[i], other[j]))
    low, middle, high = np.percentile(values, (2.5, 50, 97.5))
    value = distance(reference, other)
    return max(float(value + low - middle), 0.0), float(value + high - middle)


def line_to_infinity(reference, other, rng, sizes=4, draws=3):
    """Where a straight line in 1/n, through the Fréchet distances of random subsets of half to all clips, ends at 1/n = 0."""
    n, inverse, values = min(len(reference), len(other)), [], []
    for k in np.unique(np.linspace(n / 2, n, sizes).astype(int)):
        for _ in range(draws if k < n else 1):
            inverse.append(1 / k)
            values.append(frechet(*(x[rng.choice(len(x), k, replace=False)] for x in (reference, other))))
    return np.polynomial.polynomial.polyfit(inverse, values, 1)[0]


def extrapolate(reference, other, groups=8, seed=0):
    """(Fréchet distance at infinitely many clips, its standard error by a jackknife over groups); row i of both sets is one concept's.

    Its bias falls like 1/n once there are a few times more clips than features: for 400 features it is right at 1,024 clips (18.6
    for a true 18.4, where the bare distance is 94) and still nine times too large at 256 (168, bare 308)."""
    if (n := min(len(reference), len(other))) < 4 * groups:
        raise ValueError(f"extrapolation to infinitely many clips needs at least {4 * groups} a set, not {n}")
    rng, left = np.random.default_rng(seed), []
    for g in range(groups):
        keep = [np.arange(len(x)) % groups != g for x in (reference, other)]
        left.append(line_to_infinity(reference[keep[0]], other[keep[1]], rng))
    error = np.sqrt((groups - 1) / groups * ((left - np.mean(left)) ** 2).sum())
    return float(line_to_infinity(reference, other, rng)), float(error)


def psnr(x, y):
    """Arrays (N, ...) in 0..1 -> dB of each row (N,), 10 log10 (1 / mean squared error), at most PSNR_CAP."""
    error = ((np.asarray(x, np.float64) - y) ** 2).mean(tuple(range(1, np.ndim(x))))
    return -10 * np.log10(np.maximum(error, 10 ** (-PSNR_CAP / 10)))


# ------------------------------------------------------------------------------------------------ what the networks are shown
def on_white(rgba):
    """(..., 4) uint8 straight RGBA -> (..., 3) float32 in 0..1."""
    x = rgba.astype(np.float32) / 255
    return x[..., :3] * x[..., 3:] + 1 - x[..., 3:]


def to_signed(clips):
    """uint8 (N, T, H, W, 3) -> float32 (N, T, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(clips).movedim(-1, 2).float() / 127.5 - 1


# ------------------------------------------------------------------------------------------------ I3D, for FVD
INCEPTION = {                                    # channels in; of branches 0, 1a, 1b, 2a, 2b, 3b
    "3b": (192, 64, 96, 128, 16, 32, 32), "3c": (256, 128, 128, 192, 32, 96, 64), "4b": (480, 192, 96, 208, 16, 48, 64),
    "4c": (512, 160, 112, 224, 24, 64, 64), "4d": (512, 128, 128, 256, 24, 64, 64), "4e": (512, 112, 144, 288, 32, 64, 64),
    "4f": (528, 256, 160, 320, 32, 128, 128), "5b": (832, 256, 160, 320, 32, 128, 128), "5c": (832, 384, 192, 384, 48, 128, 128)}


def pad_same(x, kernel, stride):
    """Zeros around (..., T, H, W) so that n becomes ceil(n / stride), the odd one behind: TensorFlow's SAME, for the actual n."""
    pads = []
    for n, k, s in zip(x.shape[:-4:-1], kernel[::-1], stride[::-1]):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


class Unit3d(nn.Module):
    """Convolution, batch norm, ReLU. At stride 1 SAME is symmetric, and the convolution pads by itself."""

    def __init__(self, cin, cout, kernel=1, stride=1, eps=1e-3):
        super().__init__()
        self.conv3d = nn.Conv3d(cin, cout, kernel, stride, padding=kernel // 2 if stride == 1 else 0, bias=False)
        self.bn = nn.BatchNorm3d(cout, eps=eps)

    def forward(self, x):
        if self.conv3d.stride != (1, 1, 1):
            x = pad_same(x, self.conv3d.kernel_size, self.conv3d.stride)
        return F.relu(self.bn(self.conv3d(x)), inplace=True)


class MaxPool(nn.Module):
    """SAME max pooling. Zeros do as padding: what is pooled comes from a ReLU."""

    def __init__(self, kernel, stride):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x):
        return F.max_pool3d(pad_same(x, self.kernel, self.stride), self.kernel, self.stride)


class Inception(nn.Module):
    def __init__(self, cin, b0, b1a, b1b, b2a, b2b, b3b, eps):
        super().__init__()
        self.b0 = Unit3d(cin, b0, eps=eps)
        self.b1a, self.b1b = Unit3d(cin, b1a, eps=eps), Unit3d(b1a, b1b, 3, eps=eps)
        self.b2a, self.b2b = Unit3d(cin, b2a, eps=eps), Unit3d(b2a, b2b, 3, eps=eps)
        self.b3b = Unit3d(cin, b3b, eps=eps)

    def forward(self, x):
        pooled = F.max_pool3d(x, 3, stride=1, padding=1)
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], 1)


class I3D(nn.Module):
    """Inception-I3D on RGB, 400 Kinetics classes, 12,697,264 parameters (Carreira and Zisserman, 2017), names as in the
    PyTorch files i3d_pretrained_400.pt and rgb_imagenet.pt. eps: of batch norm; TensorFlow's graph says 1e-3, VideoGPT's port 1e-5."""

    def __init__(self, eps=1e-3):
        super().__init__()
        block = lambda name: Inception(*INCEPTION[name], eps=eps)
        self.Conv3d_1a_7x7 = Unit3d(3, 64, 7, 2, eps)
        self.MaxPool3d_2a_3x3 = MaxPool((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1 = Unit3d(64, 64, eps=eps)
        self.Conv3d_2c_3x3 = Unit3d(64, 192, 3, eps=eps)
        self.MaxPool3d_3a_3x3 = MaxPool((1, 3, 3), (1, 2, 2))
        self.Mixed_3b, self.Mixed_3c = block("3b"), block("3c")
        self.MaxPool3d_4a_3x3 = MaxPool((3, 3, 3), (2, 2, 2))
        self.Mixed_4b, self.Mixed_4c, self.Mixed_4d, self.Mixed_4e, self.Mixed_4f = map(block, ("4b", "4c", "4d", "4e", "4f"))
        self.MaxPool3d_5a_2x2 = MaxPool((2, 2, 2), (2, 2, 2))
        self.Mixed_5b, self.Mixed_5c = block("5b"), block("5c")
        self.avg_pool = nn.AvgPool3d((2, 7, 7), stride=1)
        self.logits = nn.Sequential()
        self.logits.conv3d = nn.Conv3d(1024, 400, 1)

    def forward(self, x):
        """(N, 3, T, 224, 224) in [-1, 1], T at least 9 -> logits (N, 400) before the softmax, averaged over what is left of time."""
        x = x.to(memory_format=torch.channels_last_3d)
        for layer in self.children():
            x = layer(x)
        return x.mean((2, 3, 4))

    def fold(self):
        """Batch norms worked into the convolutions, which then run with channels last: twice as fast on a CPU."""
        for unit in [m for m in self.modules() if isinstance(m, Unit3d)]:
            unit.conv3d = nn.utils.fusion.fuse_conv_bn_eval(unit.conv3d, unit.bn)
            unit.bn = nn.Identity()
        return self.to(memory_format=torch.channels_last_3d)


HASSONY2 = (  # the other naming in use -> ours
    (r"^conv3d_0c_1x1\.", "logits."), (r"\.batch3d\.", ".bn."), (r"^(conv3d|mixed)", lambda m: m[1].capitalize()), (r"\.branch_0\.", ".b0."),
    (r"\.branch_([12])\.0\.", r".b\1a."), (r"\.branch_([12])\.1\.", r".b\1b."), (r"\.branch_3\.1\.", ".b3b."))


def i3d_names(weights):
    """Weights under the names of I3D: as they are, or renamed from those of the port that i3d_torchscript.pt was made from."""
    def name(key):
        for pattern, new in HASSONY2:
            key = re.sub(pattern, new, key)
        return key
    return {name(k): v for k, v in weights.items()} if any(k.startswith("conv3d_") for k in weights) else weights


def extend(T, how="loop", least=16):
    """Frame numbers that make a clip of T frames one of `least`, as I3D needs 9 and its ports pad alike from 16 on.

    loop: again from the start, what one sees of a sticker; pingpong: there and back, the ends twice; hold: each frame as often as the next; pad: the last one."""
    if T >= least:
        return np.arange(least)
    t = np.arange(least)
    return {"loop": t % T, "pingpong": np.minimum(t % (2 * T), 2 * T - 1 - t % (2 * T)), "hold": t * T // least, "pad": np.minimum(t, T - 1)}[how]


def i3d_input(clips, how="loop"):
    """uint8 (N, T, H, W, 3) -> float32 (N, 3, 16, 224, 224) in [-1, 1]: bilinear, no antialiasing, as published FVDs do it."""
    x = F.interpolate(to_signed(clips).flatten(0, 1), (224, 224), mode="bilinear", align_corners=False).unflatten(0, clips.shape[:2])
    return x[:, extend(clips.shape[1], how)].transpose(1, 2)


class I3DRows:
    """Clips -> I3D logits. The file is a state dict in either naming, or with `trust` the TorchScript file i3d_torchscript.pt, which runs as it is
    (fed prepared clips, so that how it would resize them does not matter)."""
    name, width = "i3d", 400

    def __init__(self, path, eps=None, how="loop", device="cpu", trust=False):
        self.how, self.device, self.script = how, device, Path(path).is_file() and is_torchscript(path)
        if self.script and not trust:
            raise UserError(f"--i3d {path}: a TorchScript archive, which holds code; add --i3d-trust where you trust it, or take the weights as a state_dict")
        if self.script and eps:
            raise UserError(f"--i3d-eps {eps}: {path} is TorchScript with its own; leave the option out")
        if self.script:
            self.net = torch.jit.load(path, map_location=device).eval()
        else:
            weights = i3d_names(read_weights(path, "--i3d"))
            self.net = fit_weights(I3D(eps or 1e-3), weights, "--i3d", path).fold().to(device)
        self.path, self.key = path, dict(i3d=file_hash(path), eps=eps or 1e-3, how=how)
        self.batch = 4 if str(device) == "cpu" else 16

    def says(self, T, size):
        frames = f"{T} -> 16 {self.how}" if T < 16 else f"the first 16 of {T} frames" if T > 16 else "16 frames"
        kind = "TorchScript" if self.script else f"batch norm eps {self.key['eps']:g}"
        return f"FVD: I3D logits, {self.path} (SHA-256 {self.key['i3d'][:12]}, {kind}), {frames}, 224 px bilinear"

    @torch.no_grad()
    def __call__(self, clips):
        x = i3d_input(clips, self.how).to(self.device)
        y = self.net(x, False, False, True) if self.script else self.net(x)
        if tuple(y.shape) != (len(clips), 400):
            raise UserError(f"--i3d {self.path}: gives {tuple(y.shape)}, not {len(clips)} times 400 logits")
        return y.float().cpu().numpy()


# ------------------------------------------------------------------------------------------------ DOVER, networks
WINDOW = dict(p=8, q=7, r=7)                     # tokens of an attention window: time, height, width


def chain(**layers):
    """nn.Sequential of named layers."""
    return nn.Sequential(OrderedDict(layers))


class LastConv3d(nn.Conv3d):
    def forward(self, x):                        # channels last as everywhere in DOVER: norms and MLPs need it, depthwise runs 2 to 8 times faster
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


def windows(x):
    """(B, T, H, W, C) -> (B, n windows, 392, C)."""
    return rearrange(x, "b (t p) (y q) (x r) c -> b (t y x) (p q r) c", **WINDOW)


@functools.lru_cache
def window_tables(size, shift, device):
    """Of the windows on a shifted grid (T, H, W), per pair of tokens, (n, 392, 392): gate, uint8, the steps between their fragments
    (see WindowAttention), and apart, bool, where the shift has made neighbours of opposite sides of the clip."""
    t, y, x = torch.meshgrid(*map(torch.arange, size), indexing="ij")
    wrapped = 4 * (t < shift[0]) + 2 * (y < shift[1]) + (x < shift[2])
    tokens = torch.stack([y * 7 // size[1], x * 7 // size[2], wrapped], -1).to(torch.int8)
    tokens = windows(tokens[None].roll([-s for s in shift], (1, 2, 3)))[0]
    dy, dx, crossed = (tokens[:, :, None] - tokens[:, None]).abs().unbind(-1)
    return (dy + dx).byte().to(device), (crossed > 0).to(device)


class WindowAttention(nn.Module):
    """Attention in windows with the gated relative position bias of FAST-VQA.

    The picture is 7 x 7 fragments; a pair of tokens whose fragments are `gate` steps apart has the bias gate * relative +
    (1 - gate) * fragment. The published weights were trained with gates of 2 and more as they are, not cut at 1."""

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

    def forward(self, x, gate, apart):           # (B, n, 392, C), gate and apart (n, 392, 392) -> (B, n, 392, C)
        q, k, v = rearrange(self.qkv(x), "b n i (s h c) -> s n b h i c", s=3, h=self.heads)
        pairs = lambda table: table.T[:, self.relative_position_index].contiguous()      # (heads, 392, 392)
        relative = pairs(self.relative_position_bias_table)
        fragment = pairs(self.fragment_position_bias_table) if self.gated else relative
        difference, out = relative - fragment, []
        for i in range(len(q)):                  # the biases of all windows at once would be 240 MB
            bias = torch.addcmul(fragment, difference, gate[i].to(x.dtype)).sub_(apart[i].to(x.dtype), alpha=100)
            out.append(F.scaled_dot_product_attention(q[i], k[i], v[i], bias[None]))
        return self.proj(rearrange(out, "n b h i c -> b n i (h c)"))


class SwinBlock(nn.Module):
    def __init__(self, width, heads, gated, shifted):
        super().__init__()
        self.shifted = shifted
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), WindowAttention(width, heads, gated), nn.LayerNorm(width)
        self.mlp = chain(fc1=nn.Linear(width, 4 * width), act=nn.GELU(), fc2=nn.Linear(4 * width, width))

    def forward(self, x):                        # (B, T, H, W, C)
        size = tuple(x.shape[1:4])               # an axis that one window covers is not shifted
        shift = tuple(w // 2 if self.shifted and n > w else 0 for n, w in zip(size, WINDOW.values()))
        y = windows(self.norm1(x).roll([-s for s in shift], (1, 2, 3)))
        y = self.attn(y, *window_tables(size, shift, x.device))
        y = rearrange(y, "b (t y x) (p q r) c -> b (t p) (y q) (x r) c", y=size[1] // 7, x=size[2] // 7, **WINDOW)
        x = x + y.roll(shift, (1, 2, 3))
        return x + self.mlp(self.norm2(x))


def video_swin():
    """Video Swin-T, (B, 32, 224, 224, 3) -> (B, 16, 7, 7, 768)."""
    def stage(width, heads, depth, last):
        merge = chain(join=Rearrange("b t (h p) (w q) c -> b t h w (q p c)", p=2, q=2),
                      norm=nn.LayerNorm(4 * width), reduction=nn.Linear(4 * width, 2 * width, bias=False))
        blocks = (SwinBlock(width, heads, gated=not last, shifted=j % 2 == 1) for j in range(depth))
        return chain(blocks=nn.Sequential(*blocks), downsample=nn.Identity() if last else merge)
    stages = (stage(96 * 2 ** i, 3 * 2 ** i, depth, last=i == 3) for i, depth in enumerate((2, 2, 6, 2)))
    embed = chain(proj=LastConv3d(3, 96, (2, 4, 4), (2, 4, 4)), norm=nn.LayerNorm(96))
    return chain(patch_embed=embed, layers=nn.Sequential(*stages), norm=nn.LayerNorm(768))


class ConvNeXtBlock(nn.Module):
    def __init__(self, width, k):
        super().__init__()
        self.gamma, self.norm = nn.Parameter(torch.ones(width)), nn.LayerNorm(width, eps=1e-6)
        self.dwconv = LastConv3d(width, width, (k, 7, 7), padding=(k // 2, 3, 3), groups=width)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):                        # (B, T, H, W, C)
        return x + self.gamma * self.pwconv2(F.gelu(self.pwconv1(self.norm(self.dwconv(x)))))


class ConvNeXt(nn.Module):
    """ConvNeXt-T inflated to clips, (B, 32, 224, 224, 3) -> (B, 16, 7, 7, 768)."""

    def __init__(self, widths=(96, 192, 384, 768), depths=(3, 3, 9, 3)):
        super().__init__()
        norm = functools.partial(nn.LayerNorm, eps=1e-6)
        downsample = [nn.Sequential(norm(a), LastConv3d(a, b, (1, 2, 2), (1, 2, 2))) for a, b in zip(widths, widths[1:])]
        self.downsample_layers = nn.ModuleList([nn.Sequential(LastConv3d(3, widths[0], (2, 4, 4), (2, 4, 4)), norm(widths[0])), *downsample])
        self.stages = nn.ModuleList(nn.Sequential(*(ConvNeXtBlock(c, (1, 3, 1)[j % 3]) for j in range(depth))) for c, depth in zip(widths, depths))
        self.norm = norm(widths[-1])

    def forward(self, x):
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))
        return self.norm(x)


class DOVER(nn.Module):
    """Raw technical and aesthetic quality of a clip's normalised views; load_state_dict takes the published DOVER.pth."""

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

    def forward(self, technical, aesthetic):     # the views of dover_views -> (B,), (B,)
        return self.technical(technical), self.aesthetic(aesthetic)


# ------------------------------------------------------------------------------------------------ DOVER, views and scores
def resize_clip(clip, size):
    """uint8 (T, H, W, 3) -> uint8 (T, *size, 3): bilinear, no antialias, as DOVER was trained with."""
    if clip.shape[1:3] == tuple(size):
        return clip
    x = F.interpolate(torch.from_numpy(clip.astype(np.float32)).permute(0, 3, 1, 2), tuple(size), mode="bilinear")
    return x.round().byte().permute(0, 2, 3, 1).numpy()


def dover_frames(clip):
    """uint8 (T, H, W, 3) -> the clip with at least 32 frames and 224 px on the shorter side, uint8, and what was done, in words.

    Of 8 frames the published sampler would show the aesthetic branch the first 32 times, of small ones the technical branch a corner."""
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or not clip.size:
        raise ValueError(f"DOVER needs a clip of uint8 (T, H, W, 3), not {clip.dtype} {clip.shape}")
    T, *old = clip.shape[:3]
    new, times = [round(n * max(1, 224 / min(old))) for n in old], -(-32 // T)
    side = lambda size: " x ".join(map(str, size if size[0] != size[1] else size[:1]))
    said = f"{T} frames" + (times > 1) * f", each repeated {times} times" + f", {side(old)}" + (new != old) * f" -> {side(new)}" + " px"
    return np.repeat(resize_clip(clip, new), times, axis=0), said


def dover_indices(n, segments, frames):
    """Of an n-frame clip in equal segments: every second frame from the start of each, after the last frame the first, (segments,
    frames); and the number of frames by which a start may be moved, itself excluded."""
    start = np.arange(segments)[:, None] * (n // segments)
    return (start + 2 * np.arange(frames)) % n, max(n // segments - 2 * frames, 0)


def fragments(frames, rng):
    """(T, H, W, 3) -> (T, 224, 224, 3): of each of 7 x 7 cells a patch of 32 px, not resized, the same in all frames."""
    (height, width), patch = (n // 7 for n in frames.shape[1:3]), np.arange(32)
    y = np.arange(7)[:, None] * height + rng.integers(max(height - 32, 1), size=(7, 7))
    x = np.arange(7) * width + rng.integers(max(width - 32, 1), size=(7, 7))
    return frames[:, y[:, None, :, None] + patch[:, None, None], x[:, None, :, None] + patch].reshape(-1, 224, 224, 3)


def dover_views(clip, rng):
    """uint8 (T, H, W, 3) -> technical (3, 3, 32, 224, 224) and aesthetic (1, 3, 32, 224, 224) views, float32, normalised.

    technical: fragments of 3 spells of 63 frames; aesthetic: frames spread over the clip, squeezed to a square."""
    clip, _ = dover_frames(clip)
    spells, moments = ((i + rng.integers(max(room, 1), size=(len(i), 1))) % len(clip)
                       for i, room in (dover_indices(len(clip), 3, 32), dover_indices(len(clip), 32, 1)))
    technical = np.stack([fragments(clip[spell], rng) for spell in spells])
    aesthetic = resize_clip(clip[moments[:, 0]], (224, 224))[None]
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    return tuple(rearrange((torch.from_numpy(x) - mean) / std, "b t h w c -> b c t h w") for x in (technical, aesthetic))


def dover_fuse(technical, aesthetic):
    """Raw scores, numbers or arrays -> dict(overall, technical, aesthetic) in 0..1, by the published mean, deviation and weight of each branch."""
    t, a = (technical - 0.1107) / 0.07355, (aesthetic + 0.08285) / 0.03774
    return {name: 0.5 + 0.5 * np.tanh(z / 2) for name, z in dict(overall=0.6104 * t + 0.3896 * a, technical=t, aesthetic=a).items()}


class DOVERRows:
    """Clips -> raw technical and aesthetic scores of DOVER.pth. The seed places fragments and frames, in every clip alike."""
    name, width, batch = "dover", 2, 1

    def __init__(self, path, seed=0, device="cpu"):
        weights = read_weights(path, "--dover")
        self.net = fit_weights(DOVER(), weights, "--dover", path).to(device)
        self.path, self.seed, self.device, self.key = path, seed, device, dict(dover=file_hash(path), seed=seed)

    def says(self, T, size):
        done = dover_frames(np.zeros((T, size, size, 3), np.uint8))[1]
        return f"VQA: DOVER, {self.path} (SHA-256 {self.key['dover'][:12]}), seed {self.seed}, {done}"

    @torch.inference_mode()
    def __call__(self, clips):                   # a view at a time: three technical ones at once are slower and need twice the memory
        rows = []
        for clip in clips:
            technical, aesthetic = (view.to(self.device) for view in dover_views(clip, np.random.default_rng(self.seed)))
            rows.append((np.mean([self.net.technical(view[None]).item() for view in technical]), self.net.aesthetic(aesthetic).item()))
        return np.array(rows)


# ------------------------------------------------------------------------------------------------ CLIP
class CLIPRows:
    """Clips -> unit image vectors of every frame, and captions -> unit text vectors, by an open_clip model from a local file or folder
    (a folder holds open_clip_config.json beside the weights)."""
    name = "clip"

    def __init__(self, path, model="ViT-H-14", T=8, device="cpu"):
        import open_clip
        self.path, self.model, self.device, self.batch = path, f"local-dir:{path}" if Path(path).is_dir() else model, device, 4
        weights, _ = find_clip(path, model, "--clip")
        read_weights(weights, "--clip")          # refuses code
        try:
            self.net, _, self.prepare = open_clip.create_model_and_transforms(self.model, pretrained=None, load_weights=False, device="cpu")
            open_clip.load_checkpoint(self.net, str(weights), weights_only=True)
        except Exception as error:               # open_clip passes on whatever the reader of the file raises
            lines = [line.strip()[:160] for line in str(error).splitlines()[:4]]
            raise UserError(f"--clip {path}: not the weights of {model}: {' '.join(lines)}") from None
        self.net = self.net.eval().requires_grad_(False).to(device)
        self.tokenize = open_clip.get_tokenizer(self.model)
        self.T, self.dim = T, self.net.encode_text(self.tokenize(["a"]).to(device)).shape[1]
        config = Path(path) / "open_clip_config.json"
        self.width, self.key = T * self.dim, dict(clip=file_hash(weights), model=self.model, config=file_hash(config) if config.is_file() else None)

    def says(self, T, size):
        return f"CLIP: {self.model.split(':')[0]}, {self.path} (SHA-256 {self.key['clip'][:12]}); compare with no other model's"

    @torch.no_grad()
    def __call__(self, clips):
        from PIL import Image
        x = torch.stack([self.prepare(Image.fromarray(frame)) for clip in clips for frame in clip])
        return self.net.encode_image(x.to(self.device), normalize=True).float().cpu().numpy().reshape(len(clips), -1)

    @torch.no_grad()
    def texts(self, captions):
        return self.net.encode_text(self.tokenize(captions).to(self.device), normalize=True).float().cpu().numpy()


def clip_scores(text, frames, first_given=False):
    """Cosines of unit vectors, one a clip: text (N, E), frames (N, T, E) -> {name: (N,)}.

    CLIP: caption and frame, mean over frames; shuffled: with the next clip's caption, the level of chance. R@1: is the caption's own clip the
    nearest of all N. consistency: neighbouring frames (1 for a frozen clip). image: the first frame, if it was given, and the others."""
    cosine = text @ frames.mean(1).T                                       # caption n, clip m
    scores = {"CLIP": cosine.diagonal().copy(), "CLIP shuffled": np.roll(cosine, -1, 0).diagonal().copy(), "CLIP R@1": recall(cosine),
              "CLIP consistency": (frames[:, 1:] * frames[:, :-1]).sum(-1).mean(1)}
    if first_given:
        scores["CLIP image"] = (frames[:, :1] * frames[:, 1:]).sum(-1).mean(1)
    return scores


def recall(similarity):
    """R@1 of captions n among clips (N, N), caption n's own is clip n -> (N,): 1 if none is nearer, a fair share if others are as near, else 0."""
    margin = similarity - similarity.diagonal()[:, None]
    equal = np.abs(margin) < 1e-5                # a clip's vector depends in its last bits on the batch
    return np.where((margin >= 1e-5).any(1), 0, 1 / equal.sum(1))


# ------------------------------------------------------------------------------------------------ FD-app, FD-mot
class LocalFeatures(nn.Module):
    """A fixed random convolutional network a frame; what its maps hold is appearance, how they change is motion.

    Weights are a function of `seed`: normal, half of the first kernels' spatial mean removed (or brightness would drown
    edges), every filter rescaled to the standard deviation sqrt(2 / fan_in) that keeps ReLU maps of equal size. Of the first
    seeds, 1 has the fewest channels that hardly any sticker wakes."""

    def __init__(self, seed=1):
        super().__init__()
        rng = np.random.default_rng(seed)
        self.convs = nn.ModuleList(nn.Conv2d(cin, cout, k, stride=2, padding=k // 2, bias=False)
                                   for cin, cout, k in ((3, 32, 5), (32, 48, 3), (48, 64, 3)))
        for i, conv in enumerate(self.convs):
            w = rng.standard_normal(conv.weight.shape)
            if i == 0:
                w -= 0.5 * w.mean((2, 3), keepdims=True)
            w *= np.sqrt(2 / w[0].size) / w.std((1, 2, 3), keepdims=True)
            conv.weight = nn.Parameter(torch.from_numpy(w).float(), requires_grad=False)

    def maps(self, clips):
        """(N, T, 3, H, W) in [-1, 1], on white -> (N, T, 64, 8, 8); frames of other sizes are resized to 64 first."""
        x = clips.flatten(0, 1)
        if x.shape[-2:] != (64, 64):
            x = F.interpolate(x, (64, 64), mode="bilinear", antialias=True)
        for conv in self.convs:
            x = F.relu(conv(x))
        return x.unflatten(0, clips.shape[:2])

    @torch.no_grad()
    def forward(self, clips, batch=16):
        """float32 (N, T, 3, H, W) in [-1, 1] -> dict(appearance (N, 128), motion (N, 256)), float64 numpy arrays.

        appearance: mean and deviation of every map over the clip; blind to the order of frames. motion: logarithms of the
        mean change from frame to frame, and of the changes over 4 and 2 frames and the second difference relative to it."""
        if clips.shape[1] < 5:
            raise ValueError(f"clips of {clips.shape[1]} frames; the change over 4 frames needs at least 5")
        parts = [clip_features(self.maps(part.to(self.convs[0].weight.device)).double()) for part in clips.split(batch)]
        return {name: torch.cat([p[name] for p in parts]).cpu().numpy() for name in ("appearance", "motion")}


def clip_features(h, e=1e-3):
    """Maps (N, T, C, h, w) -> dict(appearance (N, 2C), motion (N, 4C))."""
    change = lambda d: d.abs().mean((1, 3, 4))
    one, two, four = (change(h[:, k:] - h[:, :-k]) + e for k in (1, 2, 4))
    second = change(h[:, 2:] - 2 * h[:, 1:-1] + h[:, :-2]) + e
    return dict(appearance=torch.cat([h.mean((1, 3, 4)), h.std((1, 3, 4), correction=0)], 1),
                motion=torch.cat([one.log(), (four / one).log(), (two / one).log(), (second / one).log()], 1))


class LocalRows:
    """Clips -> features of LocalFeatures: 128 of appearance, 256 of motion."""
    name, width, batch = "local", 384, 64

    def __init__(self, device="cpu"):
        self.net, self.key = LocalFeatures().to(device), dict(seed=1)

    def says(self, T, size):
        return "FD-app, FD-mot: Fréchet distance a feature, a fixed random network on 64 px; not FVD"

    def __call__(self, clips):
        f = self.net(to_signed(clips))
        return np.concatenate([f["appearance"], f["motion"]], 1)


def fd_app(reference, other):
    return fd(reference[:, :128], other[:, :128])


def fd_mot(reference, other):
    return fd(reference[:, 128:], other[:, 128:])


# ------------------------------------------------------------------------------------------------ R@1-local
class Judge(nn.Module):
    """Two linear towers into a space of canonical correlations: captions' words on one side, fixed features of frames on the other.

    Words: hashed counts (model.count_words), rare ones with more weight. Frames: a thumbnail of 8x8, a soft colour histogram of
    4x4x4 and LocalFeatures' maps in 2x2 fields, means over the frames: blind to motion, and nearly to fine detail. Pictures that a
    regression draws from the same captions suit it better than real stickers do (R@1 0.83 against 0.29): more than real is no merit."""

    def __init__(self, buckets=8192, width=128):
        super().__init__()
        self.net = LocalFeatures()
        self.register_buffer("word_weight", torch.ones(buckets))
        self.register_buffer("words", torch.zeros(buckets, width))
        self.register_buffer("word_mean", torch.zeros(width))
        self.register_buffer("sights", torch.zeros(512, width))      # 192 of the thumbnail, 64 colours, 256 of the maps
        self.register_buffer("sight_mean", torch.zeros(512))

    def weigh(self, texts):
        """B strings -> (B, buckets) unit vectors."""
        return F.normalize(count_words(tokenize(texts), len(self.word_weight)).log1p() * self.word_weight, dim=1)

    def look(self, clips):
        """(N, T, 3, H, W) in [-1, 1], on white -> (N, 512)."""
        x = clips.flatten(0, 1)
        x = (x if x.shape[-2:] == (64, 64) else F.interpolate(x, (64, 64), mode="bilinear", antialias=True)).clamp(-1, 1)
        levels = torch.linspace(-1, 1, 4)
        r, g, b = (1 - (x.flatten(2)[..., None] - levels).abs() * 1.5).clamp_min(0).unbind(1)        # (N*T, H*W, 4) each
        colours = torch.einsum("npr,npq->nrq", r, (g[..., None] * b[..., None, :]).flatten(2)).flatten(1) / r.shape[1]
        maps = F.adaptive_avg_pool2d(self.net.maps(x[:, None])[:, 0], 2).flatten(1)
        mean = lambda v: v.unflatten(0, clips.shape[:2]).mean(1)
        return torch.cat([mean(F.adaptive_avg_pool2d(x, 8).flatten(1)), mean(colours).sqrt(), mean(maps)], 1)

    @torch.no_grad()
    def encode_clips(self, clips, batch=16):
        """float32 (N, T, 3, H, W) in [-1, 1], on white, any size, T >= 1 -> (N, E) unit vectors."""
        return torch.cat([F.normalize((self.look(part) - self.sight_mean) @ self.sights, dim=1) for part in clips.split(batch)])

    @torch.no_grad()
    def encode_texts(self, texts):
        """B captions -> (B, E) unit vectors; captions of unknown words are all the same."""
        return F.normalize(self.weigh(list(texts)) @ self.words - self.word_mean, dim=1)


def judge_records(stickers, seed, most=3):
    """Up to `most` variants of every concept, drawn by the seed: their records, and weights (n,) of sum 1."""
    rng, chosen = np.random.default_rng(seed), []
    for members in stickers.members:
        picked = rng.permutation(len(members))[:most]
        chosen += [(stickers.records[members[i]], len(picked) ** -0.5) for i in picked]     # twins say less than new concepts
    weights = torch.tensor([w for _, w in chosen], dtype=torch.float64)
    return [r for r, _ in chosen], weights / weights.sum()


@torch.no_grad()
def fit_judge(stickers, seed=0, T=8, text_ridge=1e-3, sight_ridge=0.1):
    """Regularised canonical correlation of captions and looks, in closed form -> (Judge, report). stickers: the training split.

    text_ridge: share of the words' variance added to the diagonal of their Gram matrix; sight_ridge: of the mean variance of a look's
    features. Directions are weighted with their correlations, so what words cannot predict counts for nothing."""
    began, judge = time.perf_counter(), Judge().eval()
    records, share = judge_records(stickers, seed)
    looks = torch.cat([judge.look(torch.from_numpy(on_white(stickers.clip(r, even_frames(r["n"], T))[None])).movedim(-1, 2) * 2 - 1) for r in records]).double()
    stands = share @ (count_words(tokenize([r["caption"] for r in records]), len(judge.word_weight)) > 0).double()
    judge.word_weight.copy_(torch.where(stands > 0, -stands.clamp_min(1e-9).log() + 0.1, 0))
    words = judge.weigh([r["caption"] for r in records]).double()
    word_mean, sight_mean = share @ words, share @ looks
    words, looks = ((x - m) * share.sqrt()[:, None] for x, m in ((words, word_mean), (looks, sight_mean)))
    scale = torch.cat([(block.square().sum() * block.shape[1]).rsqrt().expand(block.shape[1]) for block in looks.split((192, 64, 256), 1)])
    correlations, text, sight = correlate(words, looks * scale, text_ridge, sight_ridge, judge.words.shape[1])
    for name, value in dict(words=text, word_mean=word_mean @ text, sights=sight * scale[:, None], sight_mean=sight_mean).items():
        getattr(judge, name)[..., :value.shape[-1]] = value
    return judge, dict(seconds=round(time.perf_counter() - began, 1), concepts=len(stickers.concepts), stickers=len(records),
                       correlations=[round(float(c), 3) for c in correlations[:8]])


def correlate(a, b, ridge_a, ridge_b, width):
    """Canonical directions of centred rows a (n, A) and b (n, B), A > n: correlations (E,), and maps (A, E), (B, E), scaled by them."""
    gram, inner = a @ a.T, b.T @ b
    gram.diagonal().add_(ridge_a * gram.trace())
    inner.diagonal().add_(ridge_b * inner.trace() / len(inner))
    predict = a.T @ torch.cholesky_solve(b, torch.linalg.cholesky(gram))       # the ridge regression of b on a, (A, B)
    lower = torch.linalg.cholesky(inner)
    whiten = lambda m: torch.linalg.solve_triangular(lower, m, upper=False)
    square, v = torch.linalg.eigh(whiten(whiten(b.T @ (a @ predict)).T))
    square, v = square.flip(0)[:width].clamp(1e-9, 1), v.flip(1)[:, :width]
    directions = torch.linalg.solve_triangular(lower.T, v, upper=True)
    return square.sqrt(), predict @ directions, directions * square.sqrt()


def save_judge(path, judge, **metadata):
    """Judge as safetensors; metadata: the set's hash, the seed, fit_judge's report; values must be JSON-able."""
    save_model(path, judge.state_dict(), kind="judge", buckets=len(judge.word_weight), width=judge.words.shape[1], **metadata)


def load_judge(path):
    """(Judge in eval mode, metadata). UserError for any other file."""
    weights, metadata = read_model(path, "judge", "no such judge; make one with `python evaluate.py --fit-judge`")
    wanted = dict(buckets=0, width=0, set="", seed=0)
    if reason := differs({k: v for k, v in metadata.items() if k in wanted}, wanted, "metadata"):
        raise UserError(f"{path}: not a judge of this version of metrics.py ({reason})")
    sizes = metadata["buckets"], metadata["width"]
    if not all(0 < size < 2 ** 31 for size in sizes):
        raise UserError(f"{path}: not a judge of this version of metrics.py (sizes {sizes})")
    with torch.device("meta"):
        check_fit(Judge(*sizes), weights, "", path)
    return fit_weights(Judge(*sizes), weights, "", path), metadata


class JudgeRows:
    """Clips and captions -> unit vectors of a fitted judge; `set`: the hash of the stickers that it was fitted to."""
    name, width, dim, batch = "judge", 128, 128, 64

    def __init__(self, path, device="cpu"):
        self.net, self.meta = load_judge(path)
        self.net, self.set, self.key = self.net.to(device), self.meta["set"], dict(judge=file_hash(path))

    def says(self, T, size):
        return (f"R@1-local: retrieval by two linear towers, fitted to {self.meta.get('concepts')} training concepts with seed {self.meta['seed']} (SHA-256 "
                f"{self.key['judge'][:12]}); not CLIP; what a regression from words draws suits it better than real stickers do")

    def __call__(self, clips):
        return self.net.encode_clips(to_signed(clips)).cpu().numpy()

    def texts(self, captions):
        return self.net.encode_texts(captions).cpu().numpy()


# ------------------------------------------------------------------------------------------------ NIQE-local
SHAPES = np.arange(0.2, 10, 0.001)               # of generalised Gaussians: 1 is Laplace's, 2 is Gauss's
RATIOS = np.exp(2 * gammaln(2 / SHAPES) - gammaln(1 / SHAPES) - gammaln(3 / SHAPES))   # E|x|^2 / E x^2 of each


def asymmetric(x, seen):
    """x, bool seen (N, H, W) -> (N, 4) of the seen pixels: shape, mean, left and right variance of an asymmetric generalised Gaussian.

    Nothing seen: Gauss's shape and zeros."""
    x = (x * seen).flatten(1)
    right, left, mean = x.clamp_min(0), x.clamp_max(0), lambda v, of: (v.sum(1) / of.sum(1).clamp_min(1)).double().numpy()
    low, high = mean(left.square(), left < 0), mean(right.square(), right > 0)
    size, square = mean(right - left, seen.flatten(1)), mean(x.square(), seen.flatten(1))
    lean = np.sqrt((low + 1e-12) / (high + 1e-12))
    ratio = size ** 2 / np.maximum(square, 1e-12) * (lean ** 3 + 1) * (lean + 1) / (lean ** 2 + 1) ** 2
    shape = np.where(square > 1e-12, np.interp(ratio, RATIOS, SHAPES), 2.0)
    middle = (np.sqrt(high) - np.sqrt(low)) * np.exp(gammaln(2 / shape) - (gammaln(1 / shape) + gammaln(3 / shape)) / 2)
    return np.stack([shape, middle, low, high], 1)


def scene_statistics(y, threshold=4.0):
    """Luminance (N, 1, H, W) in 0..255 -> (N, 18): of the MSCN coefficients shape and variance, of 4 neighbours' products all four."""
    taps = F.normalize(torch.exp(-0.5 * (torch.arange(-3, 4) / (7 / 6)) ** 2), p=1, dim=0)
    blur = lambda v: F.conv2d(F.conv2d(F.pad(v, [3] * 4, mode="replicate"), taps.view(1, 1, 7, 1)), taps.view(1, 1, 1, 7))
    centred = y - y.mean((2, 3), keepdim=True)   # or float32 cannot tell small deviations in bright frames
    mean = blur(centred)
    deviation = (blur(centred ** 2) - mean ** 2).clamp_min(0).sqrt()
    x, seen = ((centred - mean) / (deviation + 1))[:, 0], (deviation > threshold)[:, 0]
    shape, _, low, high = asymmetric(x, seen).T
    parts = [np.stack([shape, (low + high) / 2], 1)]
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        rows, columns = x.shape[1] - dy, slice(max(-dx, 0), x.shape[2] - max(dx, 0))
        a, b = (v[:, :rows, columns] for v in (x, seen))
        c, d = (v.roll((-dy, -dx), (1, 2))[:, :rows, columns] for v in (x, seen))          # nothing of what wraps is kept
        parts.append(asymmetric(a * c, b & d))
    return np.concatenate(parts, 1)


def niqe_features(frames, batch=8):
    """uint8 (N, T, H, W, 3), on white -> (N, 36) float64: 18 at full and at half resolution, means over the frames.

    Only where the deviation in a window of 7 exceeds 4 of 255: most of a sticker is flat, and flat says nothing."""
    rows = []
    for part in np.array_split(frames, range(batch, len(frames), batch)):
        y = (torch.from_numpy(part).flatten(0, 1).float() @ torch.tensor([0.299, 0.587, 0.114]))[:, None]
        x = np.concatenate([scene_statistics(y), scene_statistics(F.avg_pool2d(y, 2))], 1)
        rows.append(x.reshape(*part.shape[:2], 36).mean(1))
    return np.concatenate(rows)


class NIQE:
    """Mahalanobis distance to real stickers' features (N, 36). Half of the rows are fitted, the others are what `score` compares with.

    A hundredth of each feature's variance is added to the diagonal: some features nearly repeat others. It is a detector: scores
    of damaged clips soon are all 0, and by how much they are worse is in `distance`, which is no scale of quality either."""

    least = 74                                   # stickers to be fitted to: more than 36, one for each feature, and as many kept back

    def __init__(self, features, seed=0, ridge=0.01):
        half, rest = np.array_split(np.random.default_rng(seed).permutation(len(features)), 2)
        self.mean, covariance = features[half].mean(0), np.cov(features[half].T)
        self.inverse = np.linalg.inv(covariance + np.diag(ridge * np.diag(covariance) + 1e-9))
        self.held_out = self.distance(features[rest])

    def distance(self, features):
        """(M, 36) -> (M,)"""
        d = features - self.mean
        return np.sqrt(np.einsum("mi,ij,mj->m", d, self.inverse, d))

    def score(self, features):
        """(M, 36) -> (M,) in 0..1: the share of held-out real stickers that are farther; 0.5 on average for real ones."""
        return percentile(self.distance(features), self.held_out)


def percentile(distances, held_out):
    """(M,), (K,) -> (M,): the share of held_out that is larger than each; of equals, half."""
    held_out = np.sort(held_out)
    return 1 - (np.searchsorted(held_out, distances, "left") + np.searchsorted(held_out, distances, "right")) / (2 * len(held_out))


class NIQERows:
    """Clips -> features of niqe_features."""
    name, width, batch, key = "niqe", 36, 64, {}

    def says(self, T, size):
        return "NIQE-local: share of real stickers of other concepts that are farther from the usual statistics; a detector of damage that soon saturates at 0"

    def __call__(self, clips):
        return niqe_features(clips)


# ------------------------------------------------------------------------------------------------ how fast is it here?
def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.no_grad()
def bench(rounds=5):
    """Print clips/s of I3D beside torch.jit.freeze of the same network in the same rounds, of DOVER, and the time of FD-app and FD-mot. Random weights."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    plain, x = I3D().eval(), torch.rand(2, 3, 16, 224, 224) * 2 - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")          # deprecated, and still the mark to beat
        frozen = torch.jit.freeze(torch.jit.trace(plain, x[:1]))
        folded = fit_weights(I3D(), plain.state_dict(), "", "").fold()
        for _ in range(2):
            difference = float((folded(x) - frozen(x)).abs().max())
        ours, theirs = np.array([(seconds(lambda: folded(x)), seconds(lambda: frozen(x))) for _ in range(rounds)]).T
    print(f"I3D, 16x224x224: {2 / np.median(ours):.2f} clips/s, torch.jit.freeze {2 / np.median(theirs):.2f}; ratio, median of {rounds} rounds: "
          f"{np.median(theirs / ours):.2f} ({(theirs / ours).min():.2f} to {(theirs / ours).max():.2f}); largest difference of a logit {difference:.1e}")
    sets = [rng.integers(0, 256, (400, 8, 64, 64, 3), np.uint8) for _ in range(2)]
    look, net = LocalRows(), DOVER().eval()
    rows = []
    took = seconds(lambda: rows.extend(np.concatenate([look(x[i:i + 64]) for i in range(0, 400, 64)]) for x in sets))
    took += seconds(lambda: [f(*rows) for f in (fd_app, fd_mot)])
    print(f"FD-app and FD-mot of 400 against 400 clips of 8 frames: {took:.1f} s; their intervals {seconds(lambda: [bootstrap_fd(*rows, distance=f) for f in (fd_app, fd_mot)]):.1f} s more")
    technical, aesthetic = dover_views(sets[0][0], rng)
    print(f"DOVER: {seconds(lambda: [net.technical(v[None]) for v in technical]):.1f} s of technical, {seconds(lambda: net.aesthetic(aesthetic)):.1f} s of aesthetic views a clip")
    print(f"{torch.get_num_threads()} threads")


if __name__ == "__main__":
    bench()
