"""Small parts that several networks have: attention, the gated feed-forward layer, sines of positions, the nearest
given frame."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.nets.cpu import Linear, attend


def zero_(module):
    """Zero a layer's parameters: the residual branch it ends starts as nothing."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def masked_mean(x, mask):
    """x (B, L, D), mask (B, L) -> the mean over the places where the mask is true (B, D)."""
    mask = mask.to(x.dtype)
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def nearest_given(cond_mask):
    """(..., T) mask -> (..., T) number of each frame's nearest given frame (ties: the earlier), or its own."""
    places = torch.arange(cond_mask.shape[-1], device=cond_mask.device)
    distance = (places[:, None] - places).abs() + len(places) * (cond_mask[..., None, :] == 0)    # (..., T, T)
    return distance.argmin(-1)


def sinusoid(positions, width):
    """Sines and cosines of positions (N,) -> (N, width), as in DDPM."""
    half = width // 2
    freqs = torch.exp(torch.arange(half, device=positions.device) * (-9.210340371976184 / half))  # ln 10,000
    args = positions.float()[:, None] * freqs
    return F.pad(torch.cat([args.cos(), args.sin()], dim=-1), (0, width % 2))


class Skip(nn.Module):
    """In the place of a layer that is left out."""

    def forward(self, x, clip):
        return x


class Attention(nn.Module):
    """Multi-head attention; `context` None means self-attention."""

    def __init__(self, width, heads, head_dim, context_width=None):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.to_q = Linear(width, inner, bias=False)
        self.to_kv = Linear(context_width or width, 2 * inner, bias=False)
        self.to_out = Linear(inner, width)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (N, heads, L, d)

    def forward(self, x, context=None, mask=None):
        """x (N, L, width), context (N, Lk, context_width), mask (N, Lk) -> (N, L, width)."""
        k, v = self.to_kv(x if context is None else context).chunk(2, dim=-1)
        out = attend(self.split(self.to_q(x)), self.split(k), self.split(v), mask)
        return self.to_out(out.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, width, mult):
        super().__init__()
        self.up = Linear(width, 2 * mult * width)
        self.down = Linear(mult * width, width)

    def forward(self, x):
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))
