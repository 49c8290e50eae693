"""Networks of RDTF (arXiv 2503.17735): STI, DFGN, text encoder, noise schedule and loss (VAE: lib/nets/autoencoder.py).

    python model.py                      # parameters of every preset, part by part

Sources: the paper's Fig. 1 and Table 6 (network), Table 7 (masks); latent diffusion / Stable Diffusion (UNet);
DDPM (schedule); progressive distillation (v); Lin et al. 2024 (terminal).

Shapes: a clip is (B, T, C, H, W); inside the networks frames are folded into the batch, (B*T, C, h, w), by
`flatten(0, 1)`. `loss_mask (B, T)` is 1 where a frame is real. Every layer that mixes frames masks the others out.
"""
from dataclasses import asdict, dataclass, field, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint

from lib.nets.autoencoder import SD_VAE, VAE, VAEConfig
from lib.nets.cpu import Conv3x3, Linear
from lib.nets.layers import GEGLU, Attention, Skip, masked_mean, sinusoid, zero_
from lib.nets.text import SentenceEncoder, TextEncoder
from lib.nets.weights import load_model
from lib.run.files import UserError
from lib.run.options import apply_changes, check_config, check_value, dataclass_from_dict


# ---- configs
@dataclass
class TextConfig:
    kind: str = "minilm"                  # minilm, open_clip (paper): features of frozen towers are read; small: tokens
    width: int = 256                      # of the features that the DFGN reads; open_clip: the tower's
    layers: int = 2                       # of the transformer, trained with the DFGN, that makes them; open_clip: none
    tokens: int = 8                       # minilm: tokens that are made of a sentence
    concepts: int = 8192                  # minilm: most concepts with which it is compared; train.py takes its set's
    vocab: int = 49408                    # small: tokens with an embedding; train.py takes those of its texts
    length: int = 77                      # small: tokens of a text


@dataclass
class DFGNConfig:
    channels: int = 48                    # channels of the latents; the input has twice as many (noisy + known)
    widths: tuple = (96, 192)             # channels a level
    layers: int = 1                       # layers a level on the way down (one more on the way up)
    head_dim: int = 32                    # width of an attention head
    stem_heads: int = 2                   # heads of the temporal transformer after the stem
    ff_mult: int = 2                      # expansion of the GEGLU feed-forward
    text_width: int = 256
    groups: int = 16                      # groups of GroupNorm
    sti_heads: int = 2                    # heads of the semantic branch
    sti_head_dim: int = 32
    temporal: str = "sti"                 # sti: the paper's layer; conv3d: DFGN(3D-Conv); none, still: bases
    known: bool = True                    # given frames are an input; False: of text to video alone
    known_width: int = 0                  # of the attention over them; 0: 4 x channels
    given: str = "difference"             # to a fill from given frames is diffused; zeros: other frames' input (paper)
    fade: int = 16                        # power of sigma by which the fill's share in z_t fades; 0: it is always whole
    gate: bool = False                    # of the fill in the output, learnt: a picture becomes a difference to it
    pool_text: bool = True                # add the mean text feature to the time embedding


@dataclass
class DiffusionConfig:
    steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.0120
    schedule: str = "linear"              # linear (paper), scaled_linear
    prediction: str = "z0"                # eps (paper), v, z0
    terminal: float = 2e-5                # alphas_cumprod at the last step; 0: as the betas give it (paper)
    max_weight: float = 5.0               # v and z0: largest weight of z0's squared error (low noise); 0: no limit


@dataclass
class SamplingConfig:                     # what sample.py does unless it is told otherwise
    steps: int = 10                       # of DDIM
    order: int = 2                        # 2: steps of second order (DPM-Solver++, 2M); 1: DDIM's (paper)
    eta: float = 0.0                      # fresh noise: 0 none, 1 as much as DDPM
    text_scale: float = 3.0               # text guidance where no frame is given
    given_text_scale: float = 1.0         # text guidance where frames are given
    image_scale: float = 1.5              # guidance by the given frames


@dataclass
class Config:
    name: str = "mini"
    frames: int = 8                       # T
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)
    dfgn: DFGNConfig = field(default_factory=DFGNConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    @staticmethod
    def from_dict(d):
        """The inverse of to_dict; a missing part has its defaults. KeyError, TypeError, ValueError: it does not fit."""
        parts = dict(vae=VAEConfig, text=TextConfig, dfgn=DFGNConfig, diffusion=DiffusionConfig,
                     sampling=SamplingConfig)
        made = {part: dataclass_from_dict(kind, d[part], part) for part, kind in parts.items() if part in d}
        for name in ("name", "frames"):
            check_value(name, d.get(name, getattr(Config, name)), getattr(Config, name))
        return Config(**{**d, **made})

    to_dict = asdict


# ---- layers of the DFGN
class ClipContext:
    """What every layer of one forward pass shares: the sizes, the mask of real frames, time and text."""

    def __init__(self, loss_mask, time, context, context_mask):
        self.frames = loss_mask.shape[1]
        self.count = loss_mask.sum(1, keepdim=True)               # (B, 1) real frames
        self.padded = not (loss_mask.is_meta or bool(loss_mask.all()))  # nothing needs masking where no clip is padded
        self.real = loss_mask.bool()                              # (B, T)
        self.scale = loss_mask.flatten()[:, None, None, None]     # (B*T, 1, 1, 1)
        self.time = time                                          # (B, time width), after SiLU
        self.context, self.context_mask = context, context_mask   # (B, L, D), (B, L) or None

    def token_mask(self, cells):
        """Mask of the tokens of real frames, `cells` a frame (B, T * cells); None where all are real."""
        return self.real.repeat_interleave(cells, 1) if self.padded else None

    def cell_mask(self, cells):
        """Mask of real frames for each of a clip's cells (B * cells, T); None where all are real."""
        return self.real.repeat_interleave(cells, 0) if self.padded else None

    def zero_padding(self, x):
        """x (B*T, C, h, w) with zeros in padded frames."""
        return x * self.scale.to(x.dtype) if self.padded else x

    def per_frame(self, x):
        """One value a clip (B, ...) -> one a frame (B*T, ..., 1, 1)."""
        return x.repeat_interleave(self.frames, 0)[..., None, None]


class Resnet(nn.Module):
    def __init__(self, cin, cout, time_width, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, cin), Conv3x3(cin, cout)
        self.time = nn.Linear(time_width, cout)
        self.norm2, self.conv2 = nn.GroupNorm(groups, cout), Conv3x3(cout, cout)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x, clip):
        h = self.conv1(F.silu(self.norm1(x))) + clip.per_frame(self.time(clip.time))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class TemporalConv(nn.Module):
    """GroupNorm, SiLU, then a (3, 1, 1) convolution over the frames; padded frames count as zeros."""

    def __init__(self, width, groups, depthwise):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width)  # on single frames: no statistics over time
        self.conv = nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0), groups=width if depthwise else 1)
        self.depthwise = depthwise

    def forward(self, x, clip):
        h = clip.zero_padding(F.silu(self.norm(x))).unflatten(0, (-1, clip.frames))  # (B, T, C, h, w)
        if not self.depthwise:
            return rearrange(self.conv(h.transpose(1, 2)), "b c t h w -> (b t) c h w")
        # Three scaled shifts: much faster than a depthwise Conv3d on a CPU.
        before, here, after = self.conv.weight.to(h.dtype).view(-1, 1, 1, 3).unbind(-1)
        out = torch.addcmul(self.conv.bias.to(h.dtype)[:, None, None], h, here)
        out[:, 1:].addcmul_(h[:, :-1], before)
        out[:, :-1].addcmul_(h[:, 1:], after)
        return out.flatten(0, 1)


class STI(nn.Module):
    """Spatial-temporal interaction (paper Fig. 1, Table 6) of x (B*T, C, h, w), a clip at a time:

        detail      d = x + conv(conv(x)),  conv: GroupNorm, SiLU, depthwise (3, 1, 1) convolution
        semantic    s = x + up(attention(down(GroupNorm(x)))),  one attention over the clip's T * h/2 * w/2 tokens
        fusion      (a, b) = softmax(MLP([mean(d), mean(s)])),  means over the clip's real frames and cells; a + b = 1
        output      y = GroupNorm(a d + b s)

    down: 2 x 2 means; up: nearest. Both branches add nothing to x at first."""

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
        small = F.avg_pool2d(self.norm(x), pool, ceil_mode=True)
        tokens = rearrange(small, "(b t) c h w -> b (t h w) c", t=clip.frames)
        out = self.attn(tokens, mask=clip.token_mask(small.shape[2] * small.shape[3]))  # (B, T*h*w, C)
        return rearrange(out, "b (t h w) c -> (b t) c h w", t=clip.frames, h=small.shape[2])

    def pooled(self, x, clip):
        """Mean over the cells of real frames of x (B*T, C, h, w) -> (B, C)."""
        means = clip.zero_padding(x.mean((2, 3), keepdim=True)).flatten(1)  # (B*T, C)
        return means.unflatten(0, (-1, clip.frames)).sum(1) / clip.count

    def forward(self, x, clip):
        """x (B*T, C, h, w) -> the same shape."""
        detail = self.detail[1](self.detail[0](x, clip), clip)
        semantic = F.interpolate(self.semantic(x, clip), size=x.shape[2:])
        mean = self.pooled(x, clip)
        both = torch.cat([mean + self.pooled(detail, clip), mean + self.pooled(semantic, clip)], 1)  # (B, 2C)
        weights = self.fuse(both).softmax(-1)  # (B, 2)
        a, b = clip.per_frame(weights.to(x.dtype)[..., None]).unbind(1)
        return self.norm_out(x + a * detail + b * semantic)  # d = x + detail, s = x + semantic, a + b = 1


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

    def enter(self, x):
        return self.proj_in(self.norm_in(x).flatten(2).transpose(1, 2))  # (B*T, h*w, C)

    def read_text(self, h, clip):
        h = h.unflatten(0, (-1, clip.frames)).flatten(1, 2)  # (B, T*h*w, C): one K, V a clip
        return h + self.cross(self.norms[1](h), clip.context, clip.context_mask)

    def leave(self, x, h):
        return x + self.proj_out(h).view(len(x), -1, x.shape[1]).transpose(1, 2).unflatten(2, x.shape[2:])

    def forward(self, x, clip):
        h = self.enter(x)
        h = self.read_text(h + self.attn(self.norms[0](h)), clip)
        return self.leave(x, h + self.ff(self.norms[2](h)))


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
        h = self.proj_in(rearrange(self.norm_in(x), "(b t) c h w -> (b h w) t c", t=clip.frames))
        h = h + sinusoid(torch.arange(clip.frames, device=x.device), h.shape[-1]).to(h.dtype)
        mask = clip.cell_mask(x.shape[2] * x.shape[3])
        for norm, attn in zip(self.norms, self.attns):
            h = h + attn(norm(h), mask=mask)
        h = self.proj_out(h + self.ff(self.norms[2](h)))
        return x + rearrange(h, "(b h w) t c -> (b t) c h w", h=x.shape[2], w=x.shape[3])


class Layer(nn.Module):
    """resnet -> STI -> spatial transformer -> temporal transformer; the lowest level stops after STI.

    The bases of the compared methods have no STI: it normalises at its end, so that none is an identity at first."""

    def __init__(self, cin, cout, time_width, c, transformers):
        super().__init__()
        self.resnet = Resnet(cin, cout, time_width, c.groups)
        kind = {"sti": STI, "conv3d": Conv3D, "none": None, "still": None}[c.temporal]
        self.sti = kind(cout, c) if kind else None
        if transformers:
            self.spatial = SpatialTransformer(cout, c)
            self.temporal = (TemporalTransformer(cout, cout // c.head_dim, c.head_dim, c) if c.temporal != "still" else
                             Skip())
        self.has_transformers = transformers

    def forward(self, x, clip):
        x = self.resnet(x, clip)
        x = self.sti(x, clip) if self.sti else x
        return self.temporal(self.spatial(x, clip), clip) if self.has_transformers else x


def fill_weights(cond_mask, count):
    """(B, T) condition mask, (B,) real frames -> (B, T, T): how much of each given frame every frame is filled with.

    Linear between the given frames around it, in a loop of the clip's real frames, as stickers are: a given frame is
    filled with itself. Rows of a clip without given frames are zero."""
    T, n = cond_mask.shape[1], count[:, None, None].long()
    places = torch.arange(T, device=n.device)
    back = (places[:, None] - places) % n + 2 * T * (cond_mask[:, None] == 0)    # (B, T, T) steps to each given one
    forth = (places - places[:, None]) % n + 2 * T * (cond_mask[:, None] == 0)
    (back, before), (forth, after) = back.min(2), forth.min(2)
    share = (forth / (back + forth).clamp(min=1)).where(back > 0, 1.0)[..., None]
    filled = share * F.one_hot(before, T) + (1 - share) * F.one_hot(after, T)
    return filled * cond_mask.amax(1)[:, None, None]


class KnownEncoder(nn.Module):
    """Filled frames and the mask of given ones -> features as wide as a latent, beside what they are made of:
    per-frame convolutions, then attention over time."""

    def __init__(self, channels, width=0):
        super().__init__()
        hidden, self.width = max(16, channels), width or 4 * channels
        self.convs = nn.Sequential(nn.Conv2d(channels + 1, hidden, 3, padding=1), nn.SiLU(),
                                   nn.Conv2d(hidden, hidden, 3, padding=1), nn.SiLU(),
                                   nn.Conv2d(hidden, channels, 3, padding=1))
        self.widen, self.norm = nn.Linear(channels + 1, self.width), nn.LayerNorm(self.width)
        self.attn = Attention(self.width, 4, self.width // 4)
        self.narrow = nn.Linear(self.width, channels)

    def forward(self, known, cond_mask, clip):
        """known (B, T, c, h, w), cond_mask (B, T) -> (B*T, c, h, w)."""
        given = cond_mask[:, :, None, None, None].expand(-1, -1, 1, *known.shape[3:])
        known = torch.cat([known, given], 2).flatten(0, 1)
        h = self.widen(rearrange(known, "(b t) c h w -> (b h w) t c", t=clip.frames))
        h = self.norm(h + sinusoid(torch.arange(clip.frames, device=h.device), self.width).to(h.dtype))
        h = self.narrow(self.attn(h, mask=clip.cell_mask(known.shape[2] * known.shape[3])))
        h = rearrange(h, "(b h w) t c -> (b t) c h w", h=known.shape[2], w=known.shape[3])
        return known[:, :-1] + self.convs(known) + h


class Stem(nn.Module):
    """The UNet's first features: of noisy latents and, encoded, of the given frames'; a base takes the former alone."""

    def __init__(self, c):
        super().__init__()
        self.known = KnownEncoder(c.channels, c.known_width) if c.known else None
        self.conv = nn.Conv2d((1 + c.known) * c.channels, c.widths[0], 3, padding=1)

    def forward(self, z_t, known, cond_mask, clip):
        """z_t and known (B, T, c, h, w), cond_mask (B, T) -> (B*T, C, h, w)."""
        x = z_t.flatten(0, 1)
        return self.conv(torch.cat([x, self.known(known, cond_mask, clip)], 1) if self.known else x)


class DFGN(nn.Module):
    """Discrete Frame Generation Network (paper Fig. 1): a UNet over the latents of a clip.

    forward: z_t (B, T, c, h, w) noisy latents, t (B,) int64, context (B, L, D) text features, known (B, T, c, h, w)
    latents of the given frames, cond_mask and loss_mask (B, T) -> prediction (B, T, c, h, w). Level i is (B*T,
    widths[i], h / 2**i, w / 2**i); what stem, layers and halvings give on the way down is a skip on the way up.
    A gate multiplies `known` in the output: -1 makes of a picture a difference to the fill, zero, as at first, nothing.

    checkpointing: keep each layer's input alone for the backward pass, which computes the rest again."""

    def __init__(self, c, checkpointing=False):
        super().__init__()
        self.config, self.checkpointing = c, checkpointing
        w, n = c.widths, len(c.widths)
        self.time_width = wide = 4 * w[0]
        self.stem = Stem(c)
        self.time = nn.Sequential(nn.Linear(w[0], wide), nn.SiLU(), nn.Linear(wide, wide))
        self.text_pool = nn.Linear(c.text_width, wide) if c.pool_text else None
        self.stem_temporal = TemporalTransformer(w[0], c.stem_heads, c.head_dim, c) if c.temporal != "still" else Skip()

        def make(cin, cout, level):
            return Layer(cin, cout, wide, c, transformers=level < n - 1)
        self.down, self.downsamplers = nn.ModuleList(), nn.ModuleList()
        skips, width = [w[0]], w[0]
        for level in range(n):
            inputs = [width] + [w[level]] * (c.layers - 1)
            self.down.append(nn.ModuleList(make(cin, w[level], level) for cin in inputs))
            width = w[level]
            skips += [width] * c.layers
            if level < n - 1:
                self.downsamplers.append(Conv3x3(width, width, stride=2))
                skips.append(width)
        self.mid = nn.ModuleList(Layer(width, width, wide, c, transformers=has) for has in (True, False))
        self.up, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(n)):
            layers = []
            for _ in range(c.layers + 1):
                layers.append(make(width + skips.pop(), w[level], level))
                width = w[level]
            self.up.append(nn.ModuleList(layers))
            if level > 0:
                up = nn.Upsample(scale_factor=2.0), nn.Conv2d(width, width, 3, padding=1)
                self.upsamplers.append(nn.Sequential(*up))
        self.norm_out = nn.GroupNorm(c.groups, width)
        self.conv_out = zero_(nn.Conv2d(width, c.channels, 3, padding=1))
        self.gate = zero_(nn.Conv2d(width, c.channels, 3, padding=1)) if c.gate else None

    def embed_time(self, t, context, context_mask):
        emb = self.time(sinusoid(t, self.config.widths[0]).to(context.dtype))
        if self.text_pool is not None:
            mask = torch.ones_like(context[..., 0]) if context_mask is None else context_mask
            emb = emb + self.text_pool(masked_mean(context, mask))
        return F.silu(emb)

    def run(self, layer, x, clip):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, x, clip, use_reentrant=False, preserve_rng_state=False)
        return layer(x, clip)

    def forward(self, z_t, t, context, known, cond_mask, loss_mask, context_mask=None):
        clip = ClipContext(loss_mask, self.embed_time(t, context, context_mask), context, context_mask)
        x = self.run(self.stem_temporal, self.stem(z_t, known, cond_mask, clip), clip)
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
        x = F.silu(self.norm_out(x))
        out = self.conv_out(x) if self.gate is None else self.conv_out(x) + self.gate(x) * known.flatten(0, 1)
        return out.unflatten(0, (-1, clip.frames))


# ---- diffusion
class Diffusion(nn.Module):
    """Noise schedule in float64 (paper Table 6) and the change of variables between eps, v and z0."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        if c.schedule not in ("linear", "scaled_linear"):
            raise ValueError(f"schedule {c.schedule!r} is unknown: linear or scaled_linear")
        if c.prediction not in ("eps", "v", "z0"):
            raise ValueError(f"prediction {c.prediction!r} is unknown: eps, v or z0")
        if not 0 < c.beta_start <= c.beta_end < 1:
            raise ValueError(f"betas from {c.beta_start} to {c.beta_end}: between 0 and 1, in this order")
        power = 1.0 if c.schedule == "linear" else 0.5
        betas = torch.linspace(c.beta_start ** power, c.beta_end ** power, c.steps, dtype=torch.float64) ** (1 / power)
        alphas = (1 - betas).cumprod(0)
        if c.terminal:  # shift and scale the square roots: the first stays, the last becomes sqrt(terminal)
            root, last = alphas.sqrt(), c.terminal ** 0.5
            alphas = ((root - root[-1]) * (root[0] - last) / (root[0] - root[-1]) + last) ** 2
        self.register_buffer("alphas_cumprod", alphas, persistent=False)

    def coefficients(self, t, dtype=torch.float32):
        """sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod) at t (B,), each (B, 1, 1, 1, 1)."""
        a = self.alphas_cumprod[t][:, None, None, None, None]
        return a.sqrt().to(dtype), (1 - a).sqrt().to(dtype)

    def add_noise(self, z0, noise, t):
        signal, sigma = self.coefficients(t, z0.dtype)
        return signal * z0 + sigma * noise

    def target(self, z0, noise, t):
        """What the network is asked for."""
        signal, sigma = self.coefficients(t, z0.dtype)
        return {"eps": noise, "v": signal * noise - sigma * z0, "z0": z0}[self.config.prediction]

    def weight(self, t):
        """Loss weight (B,). A squared error of v is one of z0 times 1 / sigma^2: both weigh alike, max_weight at most.

        The limit is that of min-SNR (Hang et al. 2023), in units of z0's error."""
        noise = 1 - self.alphas_cumprod[t]
        of_z0 = self.z0_weight(t)
        return (of_z0 * {"eps": noise / (1 - noise), "v": noise, "z0": 1}[self.config.prediction]).float()

    def z0_weight(self, t):
        """The same (B,) for a squared error of z0, float64."""
        noise = 1 - self.alphas_cumprod[t]
        if self.config.prediction == "eps":
            return (1 - noise) / noise
        return (1 / noise).clamp(max=self.config.max_weight) if self.config.max_weight else 1 / noise

    def to_eps(self, pred, z_t, t):
        """The network's output at z_t as predicted noise."""
        signal, sigma = self.coefficients(t, z_t.dtype)
        if self.config.prediction == "z0":
            return (z_t - signal * pred) / sigma
        return pred if self.config.prediction == "eps" else signal * pred + sigma * z_t

    def to_z0(self, pred, z_t, t):
        """The network's output at z_t as predicted latents."""
        signal, sigma = self.coefficients(t, z_t.dtype)
        if self.config.prediction == "eps":
            return (z_t - sigma * pred) / signal
        return pred if self.config.prediction == "z0" else signal * z_t - sigma * pred


class RDTF(nn.Module):
    """Text encoder, DFGN and schedule: what train.py trains and sample.py asks for eps."""

    def __init__(self, config):
        super().__init__()
        check_config(config)
        self.config = config
        kinds = dict(minilm=SentenceEncoder, small=TextEncoder)
        self.text = kinds[config.text.kind](config.text) if config.text.kind in kinds else None
        self.dfgn = DFGN(config.dfgn)
        self.diffusion = Diffusion(config.diffusion)

    def encode_text(self, text):
        """text: tokens (B, L), or features (B, ...) of the frozen tower -> features (B, L', D), mask (B, L') or None.
        open_clip's pass."""
        return self.text(text) if self.text is not None else (text, None)

    def predict(self, z_t, t, context, context_mask, z_known, cond_mask, loss_mask):
        """(output, x_t, base), each (B, T, c, h, w): what the network says at x_t, of the difference to base.

        z_known: the given frames' latents where cond_mask is 1. Every frame is filled from them; the network sees the
        fill, and in the place of z_t the noisy difference to it, in which given frames are clean. The paper's way
        (zeros) has z_t as it is, zeros in frames that are not given, and no base."""
        cond_mask = cond_mask * loss_mask  # padding is never given
        given = cond_mask[:, :, None, None, None] > 0
        known, x_t, base = z_known.where(given, 0), z_t, torch.zeros_like(z_t)
        if self.config.dfgn.given == "difference":
            weights = fill_weights(cond_mask, loss_mask.sum(1)).to(known.dtype)
            known = torch.einsum("bts,bschw->btchw", weights, known)
            signal, sigma = self.diffusion.coefficients(t, z_t.dtype)
            base = sigma ** self.config.dfgn.fade * known
            x_t = (signal * (known - base)).where(given, z_t - signal * base)
        return self.dfgn(x_t, t, context, known, cond_mask, loss_mask, context_mask).float(), x_t, base

    def eps(self, z_t, t, context, context_mask, z_known, cond_mask, loss_mask):
        """Predicted noise (B, T, c, h, w) at z_t; context and its mask as encode_text gives them."""
        pred, x_t, base = self.predict(z_t, t, context, context_mask, z_known, cond_mask, loss_mask)
        eps = self.diffusion.to_eps(pred, x_t, t)
        if self.config.dfgn.given == "difference":  # the noise of given frames is known
            signal, sigma = self.diffusion.coefficients(t, z_t.dtype)
            eps = ((z_t - signal * z_known) / sigma).where((cond_mask * loss_mask)[:, :, None, None, None] > 0, eps)
        return eps

    def z0(self, z_t, t, context, context_mask, z_known, cond_mask, loss_mask):
        """Predicted latents (B, T, c, h, w) at z_t, arguments as of eps."""
        pred, x_t, base = self.predict(z_t, t, context, context_mask, z_known, cond_mask, loss_mask)
        return base + self.diffusion.to_z0(pred, x_t, t)

    def forward(self, z0, text, t, noise, cond_mask, loss_mask):
        """Loss of each clip (B,): the weighted squared error, mean over the real frames that are asked for, all in t2v;
        with given = zeros (paper) over all real frames."""
        z_t = self.diffusion.add_noise(z0, noise, t)
        pred, _, base = self.predict(z_t, t, *self.encode_text(text), z0, cond_mask, loss_mask)
        error = ((pred - self.diffusion.target(z0 - base, noise, t)) ** 2).mean((2, 3, 4))  # (B, T)
        counted = loss_mask if self.config.dfgn.given == "zeros" else loss_mask * (1 - cond_mask)
        return self.diffusion.weight(t) * (error * counted).sum(1) / counted.sum(1)


# ---- presets, files
TABLE6 = SamplingConfig(steps=50, order=1, eta=1.0, text_scale=7.5, given_text_scale=7.5, image_scale=7.5)

PRESETS = {
    "tiny": Config(  # tests: seconds
        name="tiny", vae=VAEConfig(size=16, patch=2, widths=(8, 16, 16), latent_channels=16, groups=4),
        text=TextConfig(kind="small", width=16, layers=1),
        dfgn=DFGNConfig(channels=16, widths=(16, 32), head_dim=8, text_width=16, groups=4, sti_head_dim=8, gate=True),
        sampling=TABLE6),
    "mini": Config(),  # 2 CPU cores, 64 px
    "mini-128": Config(  # 128 px; grows from mini, see lib/nets/grow.py, and has a gate
        name="mini-128", vae=VAEConfig(size=128, patch=8, latent_channels=96),
        dfgn=DFGNConfig(channels=96, known_width=192, gate=True)),
    "paper": Config(  # Table 6: 0.960 B parameters, 256 px, the VAE of Stable Diffusion
        name="paper",
        vae=SD_VAE,
        text=TextConfig(kind="open_clip", width=1024, layers=24),
        dfgn=DFGNConfig(channels=4, widths=(320, 640, 1024, 1280), layers=2, head_dim=64, stem_heads=8, ff_mult=4,
                        text_width=1024, groups=32, sti_heads=8, sti_head_dim=32, pool_text=False, given="zeros"),
        diffusion=DiffusionConfig(prediction="eps", terminal=0.0, max_weight=0.0), sampling=TABLE6),
}
# Larger networks of text to video alone, 1.3 times the parameters of RDTF, for others to tune (lib/nets/peft.py).
BASE = dict(temporal="none", known=False, given="difference", gate=False)
for name, of, changes in (("tiny-base", "tiny", {}), ("base", "mini", dict(widths=(112, 224), ff_mult=3)),
                          ("paper-base", "paper", dict(widths=(384, 768, 1280, 1280)))):
    PRESETS[name] = replace(PRESETS[of], name=name, dfgn=replace(PRESETS[of].dfgn, **BASE, **changes))


def preset(name, changes=()):
    """The preset with `part.field=value` changes. UserError: unknown names or values that do not fit."""
    if name not in PRESETS:
        raise UserError(f"--preset {name}: choose one of {', '.join(PRESETS)}")
    try:
        config = Config.from_dict(apply_changes(PRESETS[name].to_dict(), changes))
        with torch.device("meta"):
            RDTF(config), VAE(config.vae)
    except (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError) as error:
        raise UserError(f"--set {' '.join(changes)}: these do not go together ({error})") from None
    return config


def load_rdtf(path):
    """(RDTF in eval mode, metadata) of a model.safetensors that train.py wrote, or of its run's folder. UserError for
    any other."""
    return load_model(path, "dfgn", lambda config: RDTF(Config.from_dict(config)), "train one with `python train.py`")


def count(module):
    return sum(p.numel() for p in module.parameters())


def main():
    kinds = {"resnets": Resnet, "STI": (STI, Conv3D), "spatial": SpatialTransformer, "temporal": TemporalTransformer}
    for name, config in PRESETS.items():
        with torch.device("meta"):
            model, vae = RDTF(config), VAE(config.vae)
        text = f"{count(model.text) / 1e6:.1f} M" if model.text else "of a frozen tower, not counted"
        print(f"{name}: DFGN {count(model.dfgn) / 1e6:.1f} M, text {text}, VAE {count(vae) / 1e6:.2f} M")
        for part, kind in kinds.items():
            print(f"    {part:9}{sum(count(m) for m in model.dfgn.modules() if isinstance(m, kind)) / 1e6:8.2f} M")


if __name__ == "__main__":
    main()
