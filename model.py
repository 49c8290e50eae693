"""Networks of RDTF (arXiv 2503.17735): VAE, text encoder, DFGN with STI layers, noise schedule.

    python model.py                      # parameters of every preset, part by part

Sources: the paper's Fig. 1 and Table 6 (network), Table 7 (masks); latent diffusion / Stable Diffusion (VAE and
UNet, whose state-dict names the VAE keeps); DDPM (schedule); progressive distillation (v-prediction).

Shapes: a clip is (B, T, C, H, W); inside the networks frames are folded into the batch, (B*T, C, h, w), by `flatten(0, 1)`.
`loss_mask (B, T)` is 1 where a frame is real. Every layer that mixes frames masks the others out.
"""
import functools
import re
from dataclasses import asdict, dataclass, field, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint


END = 49407                               # open_clip's token after a caption
LEAN = 2 ** 19                            # elements of a tensor from which on memory counts for more than time


# ------------------------------------------------------------------------------------------------ configs
@dataclass
class VAEConfig:
    size: int = 64                        # pixels a side that the preset trains at
    image_channels: int = 4               # premultiplied RGBA in [-1, 1]; 3 for Stable Diffusion's weights
    patch: int = 2                        # pixels folded into channels before the first convolution; 1: none
    widths: tuple = (32, 64)              # channels a level; f = patch * 2 ** (levels - 1)
    layers: int = 1                       # residual blocks a level (the decoder has one more)
    latent_channels: int = 12
    groups: int = 16                      # groups of GroupNorm
    shortcut: bool = True                 # linear path beside encoder and decoder, begun as principal components; SD has none
    kl_weight: float = 1e-7
    fold: int = 2                         # fold x fold latent cells become one cell of `channels` principal components; 1: as they are

    @property
    def factor(self):
        """Pixels a side of a latent cell."""
        return self.patch * 2 ** (len(self.widths) - 1)

    @property
    def channels(self):
        """Channels of standardised latents, what the DFGN works on."""
        return self.latent_channels * self.fold ** 2

    @property
    def side(self):
        """Cells a side of standardised latents."""
        return self.size // (self.factor * self.fold)


@dataclass
class TextConfig:
    kind: str = "small"                   # small: transformer trained jointly; open_clip: frozen tower, features given
    width: int = 128                      # width of the token features
    layers: int = 2
    vocab: int = 49408                    # open_clip's byte-pair vocabulary
    length: int = 77
    buckets: int = 2048                   # hashed words that the linear guess of a caption's picture reads (RDTF.fit_pictures); 0: no guess


@dataclass
class DFGNConfig:
    channels: int = 48                    # channels of standardised latents; the input has twice as many (noisy + known)
    patch: int = 1                        # latent cells folded into channels before the stem; 1: none
    widths: tuple = (96, 192)             # channels a level
    layers: int = 1                       # layers a level on the way down (one more on the way up)
    head_dim: int = 32                    # width of an attention head
    stem_heads: int = 2                   # heads of the temporal transformer after the stem
    ff_mult: int = 2                      # expansion of the GEGLU feed-forward
    text_width: int = 128
    groups: int = 16                      # groups of GroupNorm
    sti_heads: int = 2                    # heads of the semantic branch
    sti_head_dim: int = 32
    temporal: str = "sti"                 # sti: the paper's layer; conv3d: its ablation DFGN(3D-Conv)
    known_fill: str = "nearest"           # what unknown frames are told of the given ones: zeros, nearest, blend, loop (see `fill`)
    base: str = "loop"                    # what the network diffuses the difference to, where frames are given: likewise, but zeros is nothing
    pool_text: bool = True                # add the mean text feature to the time embedding
    gate: bool = True                     # network beside the linear estimate of z0 from z_t: two outputs, a gate on it and what to add (v only)


@dataclass
class DiffusionConfig:
    steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.0120
    schedule: str = "linear"              # linear (paper), scaled_linear
    prediction: str = "v"                 # eps (paper), v
    shared_noise: float = 0.0             # share of the noise's variance that all frames of a clip have in common
    terminal: float = 2e-5                # alphas_cumprod at the last step: next to nothing of the clip is left there; 0: as it comes
    max_weight: float = 5.0               # v only: largest weight of z0's squared error (low noise); 0: as it comes


def check_value(name, value, like):
    """ValueError unless value is of the type of `like`: whole numbers up to 65,535, a few of them for a tuple, any finite number for a float."""
    whole = lambda x: type(x) is int and 0 <= x < 2 ** 16
    fits = {bool: lambda x: type(x) is bool, str: lambda x: type(x) is str, int: whole, float: lambda x: type(x) in (int, float) and abs(x) < 2 ** 16,
            tuple: lambda x: isinstance(x, (list, tuple)) and 0 < len(x) <= 16 and all(map(whole, x))}
    if not fits[type(like)](value):
        raise ValueError(f"{name} is {str(value)[:40]}, not such as {like}")


@dataclass
class Config:
    name: str = "mini"
    frames: int = 8                       # T
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)
    dfgn: DFGNConfig = field(default_factory=DFGNConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)

    @staticmethod
    def from_dict(d):
        """The inverse of to_dict; parts that d lacks are the defaults. KeyError for a part that lacks a field: its default may have changed.

        d may come from a file: ValueError for a value of another type, or a number that no network has."""
        parts = {"vae": VAEConfig, "text": TextConfig, "dfgn": DFGNConfig, "diffusion": DiffusionConfig}
        for part, kind in parts.items():
            for f in fields(kind):
                if part in d and f.name not in d[part]:
                    raise KeyError(f"{part}.{f.name} is missing")
                if part in d:
                    check_value(f"{part}.{f.name}", d[part][f.name], f.default)
        for name in ("name", "frames"):
            check_value(name, d.get(name, getattr(Config, name)), getattr(Config, name))
        tup = lambda part: {k: tuple(v) if isinstance(v, list) else v for k, v in part.items()}
        return Config(**{k: parts[k](**tup(v)) if k in parts else v for k, v in d.items()})

    to_dict = asdict


# ------------------------------------------------------------------------------------------------ small parts
def zero_(module):
    """Zero a layer's parameters: the residual branch it ends starts as nothing."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def lean(function, *inputs):
    """function(*inputs), of which autograd keeps the inputs alone. What the function works out before its last product is worked out
    again in the backward pass, the last product itself is not: norms and activations are cheap, and most of the memory. Small tensors are
    kept as they come."""
    if not torch.is_grad_enabled() or inputs[0].numel() < LEAN:
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Linear(nn.Linear):
    """nn.Linear. On a CPU a wide one goes as a 1 x 1 convolution over rows: oneDNN's is 1.1 to 1.2 times as fast as the BLAS product."""

    def forward(self, x):
        if x.device.type != "cpu" or self.in_features < 256 or x.numel() < 64 * self.in_features:
            return super().forward(x)
        rows = x.reshape(1, -1, 1, self.in_features).permute(0, 3, 1, 2)  # (1, C, rows, 1), channels last
        return F.conv2d(rows, self.weight[:, :, None, None], self.bias).permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class Conv(nn.Conv2d):
    """3 x 3 convolution, padded by 1. On a CPU, where an image has fewer cells than channels (the weights are most of what is read), it
    goes as one product: up to 2.5 times as fast there."""

    def __init__(self, cin, cout, stride=1):
        super().__init__(cin, cout, 3, stride=stride, padding=1)

    def forward(self, x):
        if x.device.type != "cpu" or x[:, 0].numel() >= self.in_channels:
            return super().forward(x)
        step = self.stride[0]
        patches = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).unfold(1, 3, step).unfold(2, 3, step)  # (N, h, w, C, 3, 3)
        return F.linear(patches.flatten(3), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2).contiguous()


def attend(q, k, v, mask=None):
    """Attention of q (N, heads, Lq, d) over k, v (N, heads, Lk, d); mask (N, Lk) bool, True = may be seen.

    Short sequences on a CPU go through an explicit softmax (about 1.4 times faster in training there)."""
    if mask is not None:
        mask = mask[:, None, None, :]
    if q.device.type == "cpu" and k.shape[2] <= 256:
        heads = q.shape[1]
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
        if mask is not None:
            scores = scores.masked_fill(~mask.expand(-1, heads, -1, -1).flatten(0, 1), -torch.inf)
        return torch.bmm(scores.softmax(-1), v).unflatten(0, (-1, heads))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    """Multi-head attention; `context` None means self-attention."""

    def __init__(self, width, heads, head_dim, context_width=None):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.to_q = Linear(width, inner, bias=False)
        self.to_kv = Linear(context_width or width, 2 * inner, bias=False)
        self.to_out = Linear(inner, width)

    def forward(self, x, context=None, mask=None, norm=nn.Identity()):
        """x (N, L, width), seen through `norm`, context (N, Lk, context_width), mask (N, Lk) -> (N, L, width)."""
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (N, heads, L, d)
        q = lean(lambda x: self.to_q(norm(x)), x)
        k, v = (self.to_kv(context) if context is not None else lean(lambda x: self.to_kv(norm(x)), x)).chunk(2, dim=-1)
        return self.to_out(attend(split(q), split(k), split(v), mask).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, width, mult):
        super().__init__()
        self.up = Linear(width, 2 * mult * width)
        self.down = Linear(mult * width, width)

    def gated(self, x):
        value, gate = x.chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))

    def forward(self, x, norm=nn.Identity()):
        """x (..., width), seen through `norm` -> the same shape."""
        return lean(self.gated, lean(lambda x: self.up(norm(x)), x))


def sinusoid(positions, width):
    """Sines and cosines of positions (N,) -> (N, width), as in DDPM."""
    half = width // 2
    freqs = torch.exp(torch.arange(half, device=positions.device) * (-9.210340371976184 / half))  # ln 10,000
    args = positions.float()[:, None] * freqs
    return F.pad(torch.cat([args.cos(), args.sin()], dim=-1), (0, width % 2))


def dct_matrix(n):
    """Orthonormal cosine transform (n, n): row k holds the k-th cosine, DCT-II."""
    k, i = torch.arange(n)[:, None], torch.arange(n)[None]
    return torch.cos(torch.pi / n * (i + 0.5) * k) * torch.where(k == 0, 1.0, 2.0 ** 0.5) / n ** 0.5


def fill(z, cond_mask, how, frames=None):
    """Every frame replaced by what the given ones say of it; zeros where none is given.

    z (B, T, C, h, w), cond_mask (B, T), frames (B,) real frames of each clip (default T) -> (B, T, C, h, w). how:
    zeros    the given frames alone
    nearest  the nearest given one (the earlier of two)
    blend    the given ones before and after, mixed linearly by distance; the nearest at the ends
    loop     likewise, and after the last frame comes the first"""
    if how not in ("zeros", "nearest", "blend", "loop"):
        raise ValueError(f"fill {how!r} is unknown: zeros, nearest, blend or loop")
    given, T = z.where(cond_mask[:, :, None, None, None] > 0, 0), z.shape[1]
    if how == "zeros":
        return given
    places = torch.arange(T, device=z.device)
    ahead = places - places[:, None]                            # (T, T): how far the second frame lies after the first
    absent = (1 - cond_mask)[:, None, :] * 3 * T                # (B, 1, T)
    pick = lambda distance: F.one_hot((distance + absent).argmin(-1), T).to(z)
    weights = pick(ahead.abs())                                 # the nearest
    if how != "nearest":
        if how == "loop":
            n = torch.full_like(cond_mask[:, 0], T) if frames is None else frames
            back, forth = -ahead % n[:, None, None], ahead % n[:, None, None]
        else:                                                   # the wrong way is far; both ways far at the ends: the nearest
            back, forth = (torch.where(way < 0, 2 * T, way) for way in (-ahead, ahead))
        before, after = pick(back), pick(forth)
        gaps = [(chosen * distance).sum(-1, keepdim=True) for chosen, distance in ((before, back), (after, forth))]  # (B, T, 1)
        share = gaps[0] / (gaps[0] + gaps[1]).clamp_min(1)
        weights = torch.where(torch.maximum(*gaps) < 2 * T, (1 - share) * before + share * after, weights)
    return torch.einsum("bts,bschw->btchw", weights, given)


# ------------------------------------------------------------------------------------------------ VAE
class VAEResnet(nn.Module):
    def __init__(self, cin, cout, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, cin, eps=1e-6)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, cout, eps=1e-6)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        if cin != cout:
            self.conv_shortcut = nn.Conv2d(cin, cout, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x) + h


class VAEAttention(nn.Module):
    """One head over all cells of an image."""

    def __init__(self, width, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x):
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (N, h*w, C)
        q, k, v = (f(tokens)[:, None] for f in (self.to_q, self.to_k, self.to_v))
        out = self.to_out[0](attend(q, k, v)[:, 0])
        return x + out.transpose(1, 2).unflatten(2, x.shape[2:])


class VAEMid(nn.Module):
    def __init__(self, width, groups):
        super().__init__()
        self.resnets = nn.ModuleList(VAEResnet(width, width, groups) for _ in range(2))
        self.attentions = nn.ModuleList([VAEAttention(width, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Sampler(nn.Module):
    """Stride-2 convolution down (padded right and below alone, as latent diffusion does), or nearest and convolution up."""

    def __init__(self, width, up):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(width, width, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


class VAELevel(nn.Module):
    """Residual blocks, then a sampler; named as in Stable Diffusion's weights."""

    def __init__(self, cin, cout, layers, groups, sampler=None):
        super().__init__()
        self.resnets = nn.ModuleList(VAEResnet(cin if i == 0 else cout, cout, groups) for i in range(layers))
        if sampler:
            setattr(self, sampler, nn.ModuleList([Sampler(cout, up=sampler == "upsamplers")]))
        self.sampler = sampler

    def forward(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        return getattr(self, self.sampler)[0](x) if self.sampler else x


def visible(x, channels):
    """Premultiplied RGBA (..., 4, H, W) in [-1, 1] for a VAE of so many channels: as it is, or on white where that is 3."""
    return x if channels == 4 else x[..., :3, :, :] + 1 - x[..., 3:, :, :]


class Encoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        w, last = c.widths, len(c.widths) - 1
        self.conv_in = nn.Conv2d(c.image_channels * c.patch ** 2, w[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            VAELevel(w[max(i - 1, 0)], w[i], c.layers, c.groups, "downsamplers" if i < last else None) for i in range(len(w)))
        self.mid_block = VAEMid(w[-1], c.groups)
        self.conv_norm_out = nn.GroupNorm(c.groups, w[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(w[-1], 2 * c.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        w = c.widths[::-1]
        self.conv_in = nn.Conv2d(c.latent_channels, w[0], 3, padding=1)
        self.mid_block = VAEMid(w[0], c.groups)
        self.up_blocks = nn.ModuleList(
            VAELevel(w[max(i - 1, 0)], w[i], c.layers + 1, c.groups, "upsamplers" if i < len(w) - 1 else None) for i in range(len(w)))
        self.conv_norm_out = nn.GroupNorm(c.groups, w[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(w[-1], c.image_channels * c.patch ** 2, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """AutoencoderKL of latent diffusion. Images (N, C, H, W) in [-1, 1]; latents (N, c, H/f, W/f).

    `latent_mean` and `latent_std` standardise latents; train.py measures them when the training ends. The deviation is one
    number for all channels, as Stable Diffusion's scaling factor is (its weights: mean 0, std 1 / 0.18215), so that channels
    keep the weight that they have in pixels. With `fold`, p x p cells become one first, turned then by `latent_axes` to their principal
    components: an orthogonal map, after which neighbouring cells' common part and their differences are channels of their own."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        if config.shortcut:
            c, f = config, config.factor
            self.shortcut_in = nn.Conv2d(c.image_channels, c.latent_channels, f, stride=f)
            self.shortcut_out = nn.ConvTranspose2d(c.latent_channels, c.image_channels, f, stride=f)
            zero_(self.quant_conv), zero_(self.decoder.conv_out)
        self.register_buffer("latent_mean", torch.zeros(config.channels))
        self.register_buffer("latent_std", torch.ones(config.channels))
        if config.fold > 1:
            self.register_buffer("latent_axes", torch.eye(config.channels))

    def images(self, x):
        """Images (..., 4, H, W), premultiplied RGBA in [-1, 1], as this VAE takes them: on its device, and on white where it knows no alpha."""
        return visible(x.to(self.latent_mean.device), self.config.image_channels)

    def moments(self, x):
        """Images (N, C, H, W) -> mean and log-variance, each (N, c, h, w), not standardised."""
        mean, logvar = self.quant_conv(self.encoder(F.pixel_unshuffle(x, self.config.patch))).chunk(2, dim=1)
        if self.config.shortcut:
            mean, logvar = mean + self.shortcut_in(x), logvar - 8  # starts near-deterministic: sd 0.02
        return mean, logvar.clamp(-30, 20)

    def reconstruct(self, z):
        """Latents as `moments` gives them -> images."""
        x = F.pixel_shuffle(self.decoder(self.post_quant_conv(z)), self.config.patch)
        return x + self.shortcut_out(z) if self.config.shortcut else x

    @torch.no_grad()
    def start_shortcut(self, x):
        """Set the linear path to the principal components of the f x f patches of images x (N, C, H, W)."""
        c, f = self.config.latent_channels, self.config.factor
        patches = F.unfold(x, f, stride=f).transpose(1, 2).flatten(0, 1)  # (N*h*w, C*f*f)
        mean = patches.mean(0)
        _, scale, axes = torch.linalg.svd(patches - mean, full_matrices=False)
        axes, scale = axes[:c].view(c, -1, f, f), scale[:c].square().mean().sqrt() / len(patches) ** 0.5
        self.shortcut_in.weight.copy_(axes / scale), self.shortcut_out.weight.copy_(axes * scale)
        self.shortcut_in.bias.copy_(-(axes / scale * mean.view_as(axes[0])).sum((1, 2, 3)))
        self.shortcut_out.bias.copy_(mean.view_as(axes[0]).mean((1, 2)))

    def standardise(self, z):
        """Latents (N, c, h, w) as `moments` gives them -> what the DFGN works on (N, c * p * p, h / p, w / p), p = fold."""
        z = (F.pixel_unshuffle(z, self.config.fold) - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]
        return torch.einsum("dc,nchw->ndhw", self.latent_axes, z) if self.config.fold > 1 else z

    def encode(self, x):
        """Images (N, C, H, W) -> standardised mean latents."""
        return self.standardise(self.moments(x)[0])

    def decode(self, z):
        """Standardised latents -> images (N, C, H, W), not clamped."""
        z = torch.einsum("dc,ndhw->nchw", self.latent_axes, z) if self.config.fold > 1 else z
        return self.reconstruct(F.pixel_shuffle(z * self.latent_std[:, None, None] + self.latent_mean[:, None, None], self.config.fold))

    def forward(self, x, noise):
        """One training pass: reconstruction (N, C, H, W), mean and log-variance. noise like the latents."""
        mean, logvar = self.moments(x)
        return self.reconstruct(mean + torch.exp(0.5 * logvar) * noise), mean, logvar


# ------------------------------------------------------------------------------------------------ Stable Diffusion's VAE
SD_VAE = VAEConfig(size=256, image_channels=3, patch=1, widths=(128, 256, 512, 512), latent_channels=4, layers=2, groups=32, shortcut=False, kl_weight=1e-6, fold=1)
SD_SCALE = 0.18215                        # scaling factor of Stable Diffusion 1 and 2: latents times it have a deviation near 1
SD_PARTS = ("first_stage_model.", "encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
SD_NAMES = (                              # names of CompVis, and of diffusers before its attention was renamed, turned into ours one after another
    (r"\.down\.(\d+)\.", r".down_blocks.\1."), (r"\.up\.(\d+)\.", lambda m: f".up_blocks.{len(SD_VAE.widths) - 1 - int(m[1])}."),
    (r"_blocks\.(\d+)\.block\.", r"_blocks.\1.resnets."), (r"\.(up|down)sample\.", r".\1samplers.0."), (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.mid\.block_(\d+)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}."), (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.attentions\.0\.norm\.", ".attentions.0.group_norm."), (r"\.attentions\.0\.([qkv])(uery|ey|alue)?\.", r".attentions.0.to_\1."),
    (r"\.attentions\.0\.proj_(out|attn)\.", ".attentions.0.to_out.0."), (r"\.norm_out\.", ".conv_norm_out."))


def sd_vae_weights(weights):
    """{name: tensor} of VAE(SD_VAE) from Stable Diffusion's, named as in diffusers (autoencoder_kl.py) or as in CompVis's latent diffusion
    (model.py, autoencoder.py): the VAE alone, or in a full checkpoint, whose other parts are left out. ValueError for two tensors of one name."""
    full, named = {k.removeprefix(SD_PARTS[0]): v for k, v in weights.items() if k.startswith(SD_PARTS[0])}, {}
    for theirs, w in (full or weights).items():
        if theirs.startswith(("loss.", "model_ema.")):  # of the VAE's own training
            continue
        ours = theirs
        for pattern, new in SD_NAMES:
            ours = re.sub(pattern, new, ours)
        if ours in named:
            raise ValueError(f"{theirs}: a second tensor for {ours}")
        named[ours] = w.flatten(1) if ".attentions." in ours and w.shape[2:] == (1, 1) else w  # CompVis has 1x1 convolutions there
    return named


# ------------------------------------------------------------------------------------------------ text
class TextEncoder(nn.Module):
    """Small transformer on open_clip's tokens, trained with the DFGN: for machines without published weights."""

    def __init__(self, c):
        super().__init__()
        self.token = nn.Embedding(c.vocab, c.width)
        self.position = nn.Parameter(torch.randn(c.length, c.width) * 0.02)
        nn.init.normal_(self.token.weight, std=0.3)  # captions are told apart by their words from the first step
        self.norms = nn.ModuleList(nn.LayerNorm(c.width) for _ in range(2 * c.layers))
        self.attns = nn.ModuleList(Attention(c.width, max(c.width // 32, 1), 32) for _ in range(c.layers))
        self.ffs = nn.ModuleList(GEGLU(c.width, 2) for _ in range(c.layers))
        self.norm_out = nn.LayerNorm(c.width)

    def forward(self, tokens):
        """tokens (B, L) int64, 0 = padding -> features (B, L', width) and mask (B, L'), cut to the longest caption."""
        tokens = tokens[:, : int((tokens != 0).sum(1).max())]
        mask = tokens != 0
        x = self.token(tokens) + self.position[: tokens.shape[1]]
        for i, (attn, ff) in enumerate(zip(self.attns, self.ffs)):
            x = x + attn(x, mask=mask, norm=self.norms[2 * i])
            x = x + ff(x, self.norms[2 * i + 1])
        return self.norm_out(x), mask


TOWER_PARTS = ("text.", "positional_embedding", "token_embedding.", "transformer.", "ln_final.")


class TextTower(nn.Module):
    """The text transformer of an open_clip model, frozen: its last block at all positions, normalised, not projected.

    config: open_clip's of the model; ValueError for one with another tokenizer than data.tokenize. The weights are to be loaded with
    assign=True, named as tower_weights names them: until then the parameters are on the meta device and cost no memory."""

    def __init__(self, config):
        super().__init__()
        from open_clip.model import _build_text_tower
        text = config["text_cfg"]
        for name in ("hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs", "embed_cls"):
            if text.get(name):
                raise ValueError(f"its text_cfg has {name}={text[name]!r}; towers on CLIP's own tokens can be used")
        if text.get("context_length", 77) != 77 or text.get("vocab_size", END + 1) != END + 1:
            raise ValueError(f"it reads {text.get('context_length', 77)} tokens of {text.get('vocab_size', END + 1)}, not 77 of {END + 1}")
        with torch.device("meta"):
            self.text = _build_text_tower(config["embed_dim"], text, config.get("quick_gelu", False))
        self.text.text_projection, self.width = None, self.text.width
        if self.text.attn_mask is not None:
            self.text.attn_mask = torch.full((77, 77), -torch.inf).triu(1)

    def forward(self, tokens):
        """tokens (B, 77) int64 -> features (B, 77, width)."""
        x = self.text.token_embedding(tokens) + self.text.positional_embedding
        return self.text.ln_final(self.text.transformer(x, attn_mask=self.text.attn_mask))


def tower_weights(weights):
    """{name: float32 tensor} of a TextTower from an open_clip model's weights, whose text part has names of its own or lies under "text."."""
    custom = {k: v for k, v in weights.items() if k.startswith("text.")}
    named = custom or {f"text.{k}": v for k, v in weights.items()}
    return {k: v.float() for k, v in named.items() if not k.startswith(("text.text_projection", "text.attn_mask"))}


def count_words(tokens, buckets, hashes=3):
    """How often each word (token), and each pair of neighbouring words, stands in captions (B, L) -> (B, buckets) float32.

    A word counts in as many buckets as there are hashes (MurmurHash3's finaliser): hardly two words then have all in common."""
    words = tokens[:, 1:]
    real = (words != 0) & (words != END)
    names = torch.cat([words, END + 1 + words[:, :-1] * (END + 1) + words[:, 1:]], 1)
    counted = torch.cat([real, real[:, :-1] & real[:, 1:]], 1).float()
    counts, low = torch.zeros(len(tokens), buckets, device=tokens.device), 2 ** 32 - 1
    for k in range(hashes):
        x = (names + k * 0x9E3779B1) & low
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = ((x ^ x >> shift) * factor) & low
        counts.scatter_add_(1, (x ^ x >> 16) % buckets, counted)
    return counts


# ------------------------------------------------------------------------------------------------ DFGN
class Clip:
    """What every layer of one forward pass shares: the sizes, the mask of real frames, time and text."""

    def __init__(self, loss_mask, time, context, context_mask):
        self.frames = loss_mask.shape[1]
        self.count = loss_mask.sum(1, keepdim=True)               # (B, 1) real frames
        self.padded = not (loss_mask.is_meta or bool(loss_mask.all()))  # nothing needs masking where no clip is padded
        self.real = loss_mask.bool()                              # (B, T)
        self.scale = loss_mask.flatten()[:, None, None, None]     # (B*T, 1, 1, 1)
        self.time = time                                          # (B, time width), after SiLU
        self.context, self.context_mask = context, context_mask   # (B, L, D), (B, L) or None

    def seen(self, cells):
        """Mask of real frames, each `cells` times (B, T * cells); None where all are real."""
        return self.real.repeat_interleave(cells, 1) if self.padded else None

    def hide(self, x):
        """x (B*T, C, h, w) with zeros in padded frames."""
        return x * self.scale.to(x.dtype) if self.padded else x

    def per_frame(self, x):
        """One value a clip (B, ...) -> one a frame (B*T, ..., 1, 1)."""
        return x.repeat_interleave(self.frames, 0)[..., None, None]


class Resnet(nn.Module):
    def __init__(self, cin, cout, time_width, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, cin), Conv(cin, cout)
        self.time = nn.Linear(time_width, cout)
        self.norm2, self.conv2 = nn.GroupNorm(groups, cout), Conv(cout, cout)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x, clip):
        h = lean(lambda x: self.conv1(F.silu(self.norm1(x))), x) + clip.per_frame(self.time(clip.time))
        return self.skip(x) + lean(lambda h: self.conv2(F.silu(self.norm2(h))), h)


class TemporalConv(nn.Module):
    """GroupNorm, SiLU, then a (3, 1, 1) convolution over the frames of a clip, zero-padded; padded frames count as zeros."""

    def __init__(self, width, groups, depthwise):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width)  # on single frames: no statistics over time
        self.conv = nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0), groups=width if depthwise else 1)
        self.depthwise = depthwise

    def forward(self, x, clip):
        h = clip.hide(F.silu(self.norm(x))).unflatten(0, (-1, clip.frames))  # (B, T, C, h, w)
        if not self.depthwise:
            return rearrange(self.conv(h.transpose(1, 2)), "b c t h w -> (b t) c h w")
        before, here, after = self.conv.weight.to(h.dtype).view(-1, 1, 1, 3).unbind(-1)  # three scaled shifts: much faster on a CPU
        out = torch.addcmul(self.conv.bias.to(h.dtype)[:, None, None], h, here)
        out[:, 1:].addcmul_(h[:, :-1], before)
        out[:, :-1].addcmul_(h[:, 1:], after)
        return out.flatten(0, 1)


class STI(nn.Module):
    """Spatial-temporal interaction (paper Fig. 1, Table 6): detail and semantic branches, fused by weights of their own."""

    def __init__(self, width, c):
        super().__init__()
        self.detail = nn.ModuleList(TemporalConv(width, c.groups, depthwise=True) for _ in range(2))
        zero_(self.detail[1].conv)
        self.norm = nn.GroupNorm(c.groups, width)
        self.attn = Attention(width, c.sti_heads, c.sti_head_dim)
        zero_(self.attn.to_out)
        self.fuse = nn.Sequential(nn.Linear(2 * width, 64), nn.SiLU(), nn.Linear(64, 2))
        self.norm_out = nn.GroupNorm(c.groups, width)

    def semantic(self, x, clip):
        """What the semantic branch adds to x (B*T, C, h, w): (B*T, C, h/2, w/2)."""
        pool = (2 if x.shape[2] > 1 else 1, 2 if x.shape[3] > 1 else 1)
        small = lean(lambda x: F.avg_pool2d(self.norm(x), pool, ceil_mode=True), x)
        tokens = rearrange(small, "(b t) c h w -> b (t h w) c", t=clip.frames)
        out = self.attn(tokens, mask=clip.seen(small.shape[2] * small.shape[3]))  # (B, T*h*w, C)
        return rearrange(out, "b (t h w) c -> (b t) c h w", t=clip.frames, h=small.shape[2])

    def pooled(self, x, clip):
        """Mean over the cells of real frames of x (B*T, C, h, w) -> (B, C)."""
        per_frame = clip.hide(x.mean((2, 3), keepdim=True)).flatten(1).unflatten(0, (-1, clip.frames))  # (B, T, C)
        return per_frame.sum(1) / clip.count

    def forward(self, x, clip):
        """x (B*T, C, h, w) -> the same shape."""
        detail = lean(lambda x: self.detail[1](self.detail[0](x, clip), clip), x)
        semantic = F.interpolate(self.semantic(x, clip), size=x.shape[2:])
        mean = self.pooled(x, clip)
        weights = self.fuse(torch.cat([mean + self.pooled(detail, clip), mean + self.pooled(semantic, clip)], 1)).softmax(-1)  # (B, 2)
        a, b = clip.per_frame(weights.to(x.dtype)[..., None]).unbind(1)
        return self.norm_out(x + a * detail + b * semantic)  # a (x + detail) + b (x + semantic), as a + b = 1


class Conv3D(nn.Module):
    """The ablation DFGN(3D-Conv): two full (3, 1, 1) convolutions and nothing else."""

    def __init__(self, width, c):
        super().__init__()
        self.convs = nn.ModuleList(TemporalConv(width, c.groups, depthwise=False) for _ in range(2))
        zero_(self.convs[1].conv)

    def forward(self, x, clip):
        return x + self.convs[1](self.convs[0](x, clip), clip)


class SpatialTransformer(nn.Module):
    """Self-attention in a frame, cross-attention to the text, GEGLU."""

    def __init__(self, width, c):
        super().__init__()
        heads = width // c.head_dim
        self.norm_in, self.proj_in = nn.GroupNorm(c.groups, width), Linear(width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.attn = Attention(width, heads, c.head_dim)
        self.cross = Attention(width, heads, c.head_dim, c.text_width)
        self.ff = GEGLU(width, c.ff_mult)
        self.proj_out = zero_(Linear(width, width))

    def forward(self, x, clip):
        h = lean(lambda x: self.proj_in(self.norm_in(x).flatten(2).transpose(1, 2)), x)  # (B*T, h*w, C)
        h = h + self.attn(h, norm=self.norms[0])
        h = h.unflatten(0, (-1, clip.frames)).flatten(1, 2)  # (B, T*h*w, C): one K, V a clip
        h = h + self.cross(h, clip.context, clip.context_mask, self.norms[1])
        h = self.proj_out(h + self.ff(h, self.norms[2])).view(*x.shape[:1], -1, x.shape[1])
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class TemporalTransformer(nn.Module):
    """Per cell over the frames: two self-attentions and GEGLU; frame numbers enter as sines and cosines."""

    def __init__(self, width, heads, head_dim, c):
        super().__init__()
        inner = heads * head_dim
        self.norm_in, self.proj_in = nn.GroupNorm(c.groups, width), Linear(width, inner)
        self.norms = nn.ModuleList(nn.LayerNorm(inner) for _ in range(3))
        self.attns = nn.ModuleList(Attention(inner, heads, head_dim) for _ in range(2))
        self.ff = GEGLU(inner, c.ff_mult)
        self.proj_out = zero_(Linear(inner, width))

    def forward(self, x, clip):
        cells = x.shape[2] * x.shape[3]
        h = lean(lambda x: self.proj_in(rearrange(self.norm_in(x), "(b t) c h w -> (b h w) t c", t=clip.frames)), x)
        h = h + sinusoid(torch.arange(clip.frames, device=x.device), h.shape[-1]).to(h.dtype)
        seen = clip.real.repeat_interleave(cells, 0) if clip.padded else None  # (B*h*w, T)
        for norm, attn in zip(self.norms, self.attns):
            h = h + attn(h, mask=seen, norm=norm)
        h = self.proj_out(h + self.ff(h, self.norms[2]))
        return x + rearrange(h, "(b h w) t c -> (b t) c h w", h=x.shape[2], w=x.shape[3])


class Layer(nn.Module):
    """resnet -> STI -> spatial transformer -> temporal transformer; the lowest level stops after STI."""

    def __init__(self, cin, cout, time_width, c, attend):
        super().__init__()
        self.resnet = Resnet(cin, cout, time_width, c.groups)
        self.sti = {"sti": STI, "conv3d": Conv3D}[c.temporal](cout, c)
        if attend:
            self.spatial = SpatialTransformer(cout, c)
            self.temporal = TemporalTransformer(cout, cout // c.head_dim, c.head_dim, c)
        self.attend = attend

    def forward(self, x, clip):
        x = self.sti(self.resnet(x, clip), clip)
        return self.temporal(self.spatial(x, clip), clip) if self.attend else x


class KnownEncoder(nn.Module):
    """Known frames and their mask -> features as wide as a latent: per-frame convolutions, then attention over time."""

    def __init__(self, channels):
        super().__init__()
        self.width = width = max(16, channels)
        self.convs = nn.Sequential(nn.Conv2d(channels + 1, width, 3, padding=1), nn.SiLU(),
                                   nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1))
        self.widen = nn.Linear(channels, width)
        self.attn = Attention(width, 1, width)
        self.narrow = zero_(nn.Linear(width, channels))

    def forward(self, known, cond_mask, clip):
        """known (B, T, c, h, w), cond_mask (B, T) -> (B*T, c, h, w)."""
        given = cond_mask[:, :, None, None, None].expand(-1, -1, 1, *known.shape[3:])
        x = self.convs(torch.cat([known, given], 2).flatten(0, 1))
        cells = x.shape[2] * x.shape[3]
        h = self.widen(rearrange(x, "(b t) c h w -> (b h w) t c", t=clip.frames))
        h = h + sinusoid(torch.arange(clip.frames, device=x.device), self.width).to(h.dtype)
        h = self.narrow(self.attn(h, mask=clip.real.repeat_interleave(cells, 0) if clip.padded else None))
        return x + rearrange(h, "(b h w) t c -> (b t) c h w", h=x.shape[2], w=x.shape[3])


class DFGN(nn.Module):
    """Discrete Frame Generation Network (paper Fig. 1): a UNet over the latents of a clip.

    forward: z_t (B, T, c, h, w) noisy latents, t (B,) int64, context (B, L, D) text features, known (B, T, c, h, w)
    latents of the given frames, cond_mask and loss_mask (B, T) -> prediction (B, T, c, h, w). With `gate` z_t has 2c channels
    (beside the noisy latents their linear estimate, see RDTF), and so has the prediction.

    checkpointing: keep the input of each layer alone for the backward pass, which works out the rest again (gradient checkpointing)."""

    def __init__(self, c, checkpointing=False):
        super().__init__()
        self.config, self.checkpointing = c, checkpointing
        w, n, folded = c.widths, len(c.widths), c.channels * c.patch ** 2
        self.time_width = 4 * w[0]
        self.known = KnownEncoder(c.channels)
        self.time = nn.Sequential(nn.Linear(w[0], self.time_width), nn.SiLU(), nn.Linear(self.time_width, self.time_width))
        self.text_pool = nn.Linear(c.text_width, self.time_width) if c.pool_text else None
        self.stem = nn.Conv2d((2 + c.gate) * folded, w[0], 3, padding=1)
        self.stem_temporal = TemporalTransformer(w[0], c.stem_heads, c.head_dim, c)

        make = lambda cin, cout, level: Layer(cin, cout, self.time_width, c, attend=level < n - 1)
        self.down, self.downsamplers = nn.ModuleList(), nn.ModuleList()
        skips, width = [w[0]], w[0]
        for level in range(n):
            self.down.append(nn.ModuleList(make(width if i == 0 else w[level], w[level], level) for i in range(c.layers)))
            width = w[level]
            skips += [width] * c.layers
            if level < n - 1:
                self.downsamplers.append(Conv(width, width, stride=2))
                skips.append(width)
        self.mid = nn.ModuleList([Layer(width, width, self.time_width, c, attend=True),
                                  Layer(width, width, self.time_width, c, attend=False)])
        self.up, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(n)):
            layers = []
            for _ in range(c.layers + 1):
                layers.append(make(width + skips.pop(), w[level], level))
                width = w[level]
            self.up.append(nn.ModuleList(layers))
            if level > 0:
                self.upsamplers.append(Sampler(width, up=True))
        self.norm_out = nn.GroupNorm(c.groups, width)
        self.conv_out = zero_(nn.Conv2d(width, folded * (1 + c.gate), 3, padding=1))

    def embed_time(self, t, context, context_mask):
        emb = self.time(sinusoid(t, self.config.widths[0]).to(context.dtype))
        if self.text_pool is not None:
            seen = torch.ones_like(context[..., 0]) if context_mask is None else context_mask.to(context.dtype)
            emb = emb + self.text_pool((context * seen[..., None]).sum(1) / seen.sum(1, keepdim=True))
        return F.silu(emb)

    def run(self, layer, x, clip):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, x, clip, use_reentrant=False, preserve_rng_state=False)
        return layer(x, clip)

    def forward(self, z_t, t, context, known, cond_mask, loss_mask, context_mask=None):
        clip = Clip(loss_mask, self.embed_time(t, context, context_mask), context, context_mask)
        known = self.known(known, cond_mask, clip)
        x = torch.cat([z_t.flatten(0, 1), known], 1)  # (B*T, 2c or 3c, h, w)
        x = self.run(self.stem_temporal, self.stem(F.pixel_unshuffle(x, self.config.patch)), clip)
        skips = [x]
        for level, layers in enumerate(self.down):
            for layer in layers:
                x = self.run(layer, x, clip)
                skips.append(x)
            if level < len(self.downsamplers):
                x = self.downsamplers[level](x)
                skips.append(x)
        for layer in self.mid:
            x = self.run(layer, x, clip)
        for level, layers in enumerate(self.up):
            for layer in layers:
                x = self.run(layer, torch.cat([x, skips.pop()], 1), clip)
            if level < len(self.upsamplers):
                x = self.upsamplers[level](x)
        x = F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.config.patch)
        return x.unflatten(0, (-1, clip.frames))


# ------------------------------------------------------------------------------------------------ diffusion
class Diffusion(nn.Module):
    """Noise schedule in float64 (paper Table 6; `terminal` after Lin et al. 2024) and the change of variables between eps, v and z0."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        if c.schedule not in ("linear", "scaled_linear") or c.prediction not in ("eps", "v"):
            raise ValueError(f"schedule {c.schedule!r} or prediction {c.prediction!r} is unknown")
        power = 1.0 if c.schedule == "linear" else 0.5
        betas = torch.linspace(c.beta_start ** power, c.beta_end ** power, c.steps, dtype=torch.float64) ** (1 / power)
        alphas = (1 - betas).cumprod(0)
        if c.terminal:  # shift and scale the square roots: the first stays, the last becomes sqrt(terminal)
            root = alphas.sqrt()
            alphas = ((root - root[-1]) * (root[0] - c.terminal ** 0.5) / (root[0] - root[-1]) + c.terminal ** 0.5) ** 2
        self.register_buffer("alphas_cumprod", alphas, persistent=False)

    def coefficients(self, t, dtype=torch.float32):
        """sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod) at t (B,), each (B, 1, 1, 1, 1)."""
        a = self.alphas_cumprod[t][:, None, None, None, None]
        return a.sqrt().to(dtype), (1 - a).sqrt().to(dtype)

    def add_noise(self, z0, noise, t):
        signal, sigma = self.coefficients(t, z0.dtype)
        return signal * z0 + sigma * noise

    def target(self, z0, noise, t):
        signal, sigma = self.coefficients(t, z0.dtype)
        return noise if self.config.prediction == "eps" else signal * noise - sigma * z0

    def weight(self, t):
        """Loss weight (B,). A squared error of v is one of z0 times 1 / sigma ** 2; that factor is cut at max_weight (as in min-SNR)."""
        limit = self.config.max_weight
        if self.config.prediction == "eps" or limit == 0:
            return torch.ones_like(t, dtype=torch.float32)
        return ((1 - self.alphas_cumprod[t]) * limit).clamp(max=1).float()

    def to_eps(self, pred, z_t, t):
        signal, sigma = self.coefficients(t, z_t.dtype)
        return pred if self.config.prediction == "eps" else signal * pred + sigma * z_t

    def mix_noise(self, noise, shared):
        """Noise (B, T, ...) whose frames have `shared_noise` of their variance from shared (B, 1, ...); still N(0, 1)."""
        a = self.config.shared_noise
        return noise if a == 0 else (1 - a) ** 0.5 * noise + a ** 0.5 * shared


def exact(method):
    """A method whose matrix products autocast must leave in float32."""
    @functools.wraps(method)
    def wrapped(self, x, *args):
        with torch.autocast(x.device.type, enabled=False):
            return method(self, x, *args)
    return wrapped


class RDTF(nn.Module):
    """Text encoder, DFGN and schedule: what train.py trains and sample.py asks for eps.

    With a `base`, the network works on the difference to what the given frames say, r_t = z_t - sqrt(alphas_cumprod) * base
    = sqrt(alphas_cumprod) (z0 - base) + sigma * noise: the noise, and so eps, is that of z_t, and samplers need not know.

    With `gate`, z0 is what the network makes of the best linear estimate from r_t (`linear_estimate`): a gate times it plus a
    correction in units of the data's deviation (after Karras et al. 2022). What is alike in all frames and smooth in a frame is then
    taken from the noise in closed form, and the network starts from there. `data_std` (2, 2, c, h, w) are the deviations of z0 - picture
    and of z0 - base in units of `spread`, each of a clip's mean and of the frames' differences from it, per coefficient of the cosine
    transform over cells.

    With `text.buckets`, where no frame is given the base is the picture that ridge regression from the caption's words to the mean
    frame of the training stickers gives (a prior that depends on the condition, as in PriorGrad, Lee et al. 2022). train.py measures the
    deviations and fits the pictures before the first step."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.text = TextEncoder(config.text) if config.text.kind == "small" else None
        self.dfgn = DFGN(config.dfgn)
        self.diffusion = Diffusion(config.diffusion)
        if config.dfgn.gate and config.diffusion.prediction != "v":
            raise ValueError("dfgn.gate needs diffusion.prediction=v")
        if config.text.kind not in ("small", "open_clip"):
            raise ValueError(f"text kind {config.text.kind!r} is unknown")
        if config.text.kind == "open_clip" and config.text.buckets:
            raise ValueError(f"text.buckets is {config.text.buckets}; with text.kind=open_clip captions have no pictures, it must be 0")
        for ours, a, theirs, b in (("vae.channels", config.vae.channels, "dfgn.channels", config.dfgn.channels),
                                   ("text.width", config.text.width, "dfgn.text_width", config.dfgn.text_width)):
            if a != b:
                raise ValueError(f"{ours} is {a}, {theirs} is {b}; they must be equal")
        side, unit = config.vae.side, config.vae.factor * config.vae.fold * config.dfgn.patch * 2 ** (len(config.dfgn.widths) - 1)
        if config.vae.size % unit:
            raise ValueError(f"vae.size is {config.vae.size}, not a multiple of {unit}, as its factor and fold, dfgn.patch and dfgn.widths need")
        if min(config.dfgn.widths) < config.dfgn.head_dim:
            raise ValueError(f"dfgn.head_dim is {config.dfgn.head_dim}, dfgn.widths {config.dfgn.widths} are too narrow for one head")
        for how in (config.dfgn.known_fill, config.dfgn.base):
            fill(torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1), how)  # refuses an unknown word
        if config.dfgn.gate:
            self.register_buffer("data_std", torch.ones(2, 2, config.dfgn.channels, side, side))
            self.register_buffer("cosines", dct_matrix(side), persistent=False)
        if self.text is not None and config.text.buckets:
            self.register_buffer("word_weight", torch.ones(config.text.buckets))
            self.register_buffer("word_pictures", torch.zeros(config.text.buckets, config.dfgn.channels, side, side))
            self.register_buffer("mean_picture", torch.zeros(config.dfgn.channels, side, side))

    def encode_text(self, tokens):
        """tokens (B, L) -> features (B, L', D), mask (B, L'), picture (B, c, h, w) or None.

        Features of a frozen tower (B, L, D) pass as they are, mask and picture None."""
        return (*self.text(tokens), self.picture(tokens)) if self.text is not None else (tokens, None, None)

    @exact
    def weigh_words(self, tokens):
        """Unit vectors (B, buckets) of the words of captions (B, L), rare words with more weight (tf-idf); zeros for no words."""
        return F.normalize(count_words(tokens, len(self.word_weight)) * self.word_weight, dim=1)

    @exact
    def picture(self, tokens):
        """What the words of captions (B, L) say of a clip's mean frame (B, c, h, w), the mean of all stickers for none; None without `buckets`."""
        if self.text is None or not self.config.text.buckets:
            return None
        return torch.einsum("bn,nchw->bchw", self.weigh_words(tokens), self.word_pictures) + self.mean_picture

    @torch.no_grad()
    def fit_pictures(self, z, tokens, weights, shares, ridge=0.05):
        """Fit `picture` to stickers' mean frames z (N, c, h, w) and D captions of each, tokens (N, D, L).

        weights (N,) of the stickers; shares (D,), of sum 1, of the captions."""
        self.mean_picture.copy_(torch.einsum("n,nchw->chw", weights / weights.sum(), z))
        captions = list(zip(tokens.unbind(1), shares))
        stands = sum(share * (count_words(t, len(self.word_weight)) > 0).float().sum(0) for t, share in captions)
        self.word_weight.copy_((len(z) / stands.clamp_min(shares.min())).log() + 0.1)
        gram, cross = ridge * torch.eye(len(self.word_weight), device=z.device), torch.zeros_like(self.word_pictures).flatten(1)
        wanted = (z - self.mean_picture).flatten(1)
        for t, share in captions:
            words = self.weigh_words(t)
            scaled = (words * (share * weights)[:, None]).T
            gram, cross = gram + scaled @ words, cross + scaled @ wanted
        self.word_pictures.copy_(torch.linalg.solve(gram, cross).view_as(self.word_pictures))

    @exact
    def bases(self, z, cond_mask, loss_mask, picture=None):
        """What the network is told of the given frames (known), and what it is asked the difference to (base): the picture where none is given."""
        c, frames = self.config.dfgn, loss_mask.sum(1)
        known, base = fill(z, cond_mask, c.known_fill, frames), torch.zeros_like(z) if c.base == "zeros" else fill(z, cond_mask, c.base, frames)
        if picture is None:
            return known, base
        alone = ((1 - cond_mask.amax(1))[:, None, None, None] * picture)[:, None]  # (B, 1, c, h, w)
        return known + alone, base + alone

    @exact
    def spread(self, z, cond_mask, prior=0.3):
        """How far the given frames of clips z (B, T, c, h, w) lie apart, 1 for as far as frames of the training set do -> (B,), at most 4.

        A clip that hardly moves has a small one, and what the network adds to its base is as much smaller. The variance is mixed with
        that of the training set, which counts as `prior` frames: 1 where fewer than two are given."""
        given, n = cond_mask[:, :, None, None, None], cond_mask.sum(1)
        if not self.config.dfgn.gate:
            return torch.ones_like(n)
        z = z.where(given > 0, 0)
        mean = z.sum(1, keepdim=True) / n.clamp_min(1)[:, None, None, None, None]
        apart = ((z - mean) * given).square().sum((1, 2, 3, 4)) / self.data_std[0, 1].square().sum()
        return ((prior + apart) / (prior + (n - 1).clamp_min(0))).sqrt().clamp(max=4)

    @exact
    def spectrum(self, x, weights):
        """Cosine transform over cells of x (B, T, c, h, w) -> its weighted mean over frames (B, 1, c, h, w), and what is left of each frame.

        weights (B, T): frames of weight 0 are not looked at."""
        w = weights[:, :, None, None, None]
        spectrum = torch.einsum("ui,vj,btcij->btcuv", self.cosines, self.cosines, x.where(w > 0, 0))
        mean = (spectrum * w).sum(1, keepdim=True) / w.sum(1, keepdim=True).clamp_min(1)
        return mean, (spectrum - mean) * w

    @exact
    def linear_estimate(self, r_t, signal, sigma, std, weights):
        """Posterior mean of z0 (B, T, c, h, w), were it Gaussian with deviations std (B, 2, c, h, w); zero in frames of weight 0."""
        n = weights.sum(1).clamp_min(1)[:, None, None, None, None]
        mean, rest = self.spectrum(r_t, weights)
        shrink = lambda s, noise: signal * s ** 2 / (signal ** 2 * s ** 2 + noise)
        estimate = shrink(std[:, :1], sigma ** 2 / n) * mean + shrink(std[:, 1:], sigma ** 2) * rest
        return torch.einsum("ui,vj,btcuv->btcij", self.cosines, self.cosines, estimate * weights[:, :, None, None, None])

    @torch.no_grad()
    def measure(self, z0, cond_mask, loss_mask, picture=None):
        """Set data_std from clips (B, T, c, h, w) under the masks of all tasks, and their captions' pictures (B, c, h, w).

        In a set of stills nothing is ever given: the deviations of z0 - picture then stand for those of z0 - base."""
        given = cond_mask.amax(1) > 0
        if not given.any():
            given, cond_mask = given | True, cond_mask * 0

        def deviations(x, weights):
            mean, rest = self.spectrum(x, weights)
            rest = rest.square().sum((0, 1)) / (weights.sum(1) - 1).clamp_min(0).sum().clamp_min(1)
            return torch.stack([mean[:, 0].square().mean(0), rest]).sqrt().clamp_min(1e-3)  # a channel may never change
        left = lambda mask: z0 - self.bases(z0, mask, loss_mask, picture)[1]
        self.data_std[0] = deviations(left(cond_mask * 0), loss_mask)
        left_over = left(cond_mask) / self.spread(z0, cond_mask)[:, None, None, None, None]  # in units that row 0 sets
        self.data_std[1] = deviations(left_over[given], (loss_mask * (1 - cond_mask))[given])

    def predict(self, r_t, t, context, context_mask, known, cond_mask, loss_mask, spread):
        """eps or v of r_t (B, T, c, h, w), float32; spread (B,) of the given frames."""
        net = lambda x: self.dfgn(x, t, context, known, cond_mask, loss_mask, context_mask).float()
        if not self.config.dfgn.gate:
            return net(r_t)
        signal, sigma = self.diffusion.coefficients(t, r_t.dtype)
        relative = cond_mask.amax(1) * (self.config.dfgn.base != "zeros")
        unknown = loss_mask * (1 - cond_mask * relative[:, None])  # elsewhere z0 - base is nothing
        std = self.data_std[relative.long()] * torch.where(relative > 0, spread, 1)[:, None, None, None, None]
        estimate = self.linear_estimate(r_t, signal, sigma, std, unknown)
        each = std.square().sum(1, keepdim=True).mean((3, 4), keepdim=True).sqrt()  # (B, 1, c, 1, 1): deviation of a cell
        value, gate = net(torch.cat([r_t / (signal ** 2 * each ** 2 + sigma ** 2).sqrt(), estimate / each], 2)).chunk(2, dim=2)
        z0 = (2 * gate.sigmoid() * estimate + each * value) * unknown[:, :, None, None, None]
        return (signal * r_t - z0) / sigma

    def eps(self, z_t, t, context, context_mask, picture, z_known, cond_mask, loss_mask):
        """Predicted noise (B, T, c, h, w) at z_t; text as encode_text gives it, z_known holds the given frames' latents where cond_mask is 1."""
        cond_mask = cond_mask * loss_mask  # padding is never given
        known, base = self.bases(z_known, cond_mask, loss_mask, picture)
        r_t = z_t - self.diffusion.coefficients(t, z_t.dtype)[0] * base
        pred = self.predict(r_t, t, context, context_mask, known, cond_mask, loss_mask, self.spread(z_known, cond_mask))
        return self.diffusion.to_eps(pred, r_t, t)

    def forward(self, z0, tokens, t, noise, cond_mask, loss_mask):
        """Loss of each clip (B,): the weighted squared error, mean over its real frames alone, whatever T is."""
        cond_mask = cond_mask * loss_mask
        context, context_mask, picture = self.encode_text(tokens)
        known, base = self.bases(z0, cond_mask, loss_mask, picture)
        r_t = self.diffusion.add_noise(z0 - base, noise, t)
        pred = self.predict(r_t, t, context, context_mask, known, cond_mask, loss_mask, self.spread(z0, cond_mask))
        error = ((pred - self.diffusion.target(z0 - base, noise, t)) ** 2).mean((2, 3, 4))  # (B, T)
        return self.diffusion.weight(t) * (error * loss_mask).sum(1) / loss_mask.sum(1)


# ------------------------------------------------------------------------------------------------ presets
PRESETS = {
    "tiny": Config(  # tests: seconds
        name="tiny", vae=VAEConfig(size=16, patch=1, widths=(8, 16, 16), latent_channels=4, groups=4),
        text=TextConfig(width=16, layers=1, buckets=64),
        dfgn=DFGNConfig(channels=16, widths=(16, 32), head_dim=8, text_width=16, groups=4, sti_heads=2, sti_head_dim=8)),
    "mini": Config(),  # 2 CPU cores, 64 px
    "paper": Config(  # Table 6: 0.960 B parameters, 256 px, the VAE of Stable Diffusion
        name="paper",
        vae=SD_VAE,
        text=TextConfig(kind="open_clip", width=1024, layers=24, buckets=0),
        dfgn=DFGNConfig(channels=4, patch=1, widths=(320, 640, 1024, 1280), layers=2, head_dim=64, stem_heads=8, ff_mult=4, text_width=1024, groups=32,
                        sti_heads=8, sti_head_dim=32, known_fill="zeros", base="zeros", pool_text=False, gate=False),
        diffusion=DiffusionConfig(prediction="eps", terminal=0.0, max_weight=0.0)),
}


def count(module):
    return sum(p.numel() for p in module.parameters())


def breakdown(model):
    """Parameters of an RDTF by part: {part: count}."""
    kinds = {"resnets": Resnet, "STI": (STI, Conv3D), "spatial attention": SpatialTransformer, "temporal attention": TemporalTransformer}
    parts = {name: sum(count(m) for m in model.dfgn.modules() if isinstance(m, kind)) for name, kind in kinds.items()}
    parts["samplers"] = count(model.dfgn.downsamplers) + count(model.dfgn.upsamplers)
    parts["the rest"] = count(model.dfgn) - sum(parts.values())
    return parts


def main():
    for name, config in PRESETS.items():
        with torch.device("meta"):
            model, vae = RDTF(config), VAE(config.vae)
        print(f"{name}: DFGN {count(model.dfgn) / 1e6:.1f} M, text {f'{count(model.text) / 1e6:.1f} M' if model.text else 'of a frozen tower, not counted'}, VAE {count(vae) / 1e6:.2f} M")
        print("   " + ", ".join(f"{part} {n / 1e6:.2f} M" for part, n in breakdown(model).items()))
        if config.text.buckets:
            print(f"   and {model.word_pictures.numel() / 1e6:.2f} M numbers that are solved for, not trained: the pictures of words")


if __name__ == "__main__":
    main()
