"""The methods that the paper compares with, on this repository's own UNet: parameter-efficient tuning of a larger base.

I2V-Adapter (arXiv 2312.16693), SimDA (2308.09710) and Customize-A-Video (2402.14780), written from their papers. A base
(presets `base`, `paper-base`) is a text-to-video DFGN without STI and without an input for given frames. `inject` is
called after the base's weights are loaded and before optimiser and averages are made:

    full                  everything is trained: the control that separates few parameters from what the base knows
    i2v_adapter           a second attention in every spatial self-attention, onto the nearest given frame
    simda                 bottlenecks beside frozen blocks, shifted attention; its base is of stills, or its temporal
                          layers are left out
    appearance_lora       Customize-A-Video's first stage, on stills: LoRA of spatial attention, no temporal layers
    customize_a_video     its second: LoRA of temporal attention on clips; the first stage's is dropped afterwards
    customize_a_video_st  the same, the first stage's is kept

Given frames enter as everywhere (model.RDTF.predict), and what they are filled to through a convolution beside the
base's stem that starts at zero. Modules of the base are replaced by others that hold them; model.py knows of none.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.nets.cpu import Linear, attend
from lib.nets.layers import Skip, nearest_given, zero_
from lib.nets.weights import find_file, is_own, load_strict, model_file, names_of, read_own
from lib.run.files import UserError, first_line

METHODS = ("full", "i2v_adapter", "simda", "appearance_lora", "customize_a_video", "customize_a_video_st")
BASES = "none", "still"                   # dfgn.temporal of a base: of clips, or of single frames (of text to image)
ON_STILLS = ("appearance_lora",)          # trained on single frames alone
ON_CLIPS = ("customize_a_video", "customize_a_video_st")  # on clips alone: attention over one frame has no gradient


# ---- given frames
class ConditionedStem(nn.Module):
    """A base's stem, to which is added what frames are filled with and the mask of given ones; nothing at first."""

    def __init__(self, base):
        super().__init__()
        self.base, self.cond_mask = base, None
        self.condition = zero_(nn.Conv2d(base.conv.in_channels + 1, base.conv.out_channels, 3, padding=1))

    def forward(self, z_t, known, cond_mask, clip):
        """Arguments and shapes as of model.Stem; the mask is kept for those who ask for it behind the stem."""
        self.cond_mask = cond_mask
        given = cond_mask[:, :, None, None, None].expand(-1, -1, 1, *known.shape[3:])
        return self.base(z_t, known, cond_mask, clip) + self.condition(torch.cat([known, given], 2).flatten(0, 1))

    def given(self):
        """The condition mask (B, T) of the pass that is under way."""
        return self.cond_mask


# ---- I2V-Adapter
class CrossFrame(nn.Module):
    """A spatial transformer whose self-attention has a second branch: own queries, the frozen keys and values of the
    nearest given frame, own output, which starts at zero. Without given frames the branch is off.

    given() -> (B, T) condition mask; inject sets it."""
    given = None

    def __init__(self, base):
        super().__init__()
        self.base = base
        inner, width = base.attn.to_q.weight.shape
        self.to_q, self.to_out = Linear(width, inner, bias=False), zero_(Linear(inner, width))
        self.to_q.weight.data.copy_(base.attn.to_q.weight)

    def branch(self, h, clip):
        """h (B*T, cells, C), normalised -> the same shape."""
        attn, given = self.base.attn, self.given()
        B, T = given.shape
        rows = nearest_given(given) + T * torch.arange(B, device=h.device)[:, None]
        k, v = attn.to_kv(h[rows.flatten()]).chunk(2, -1)
        out = attend(*(attn.split(x) for x in (self.to_q(h), k, v)))
        on = given.amax(1).repeat_interleave(T)[:, None, None]
        return self.to_out(out.transpose(1, 2).flatten(2)) * on.to(h.dtype)

    def forward(self, x, clip):
        base = self.base
        h = base.enter(x)
        normed = base.norms[0](h)
        h = base.read_text(h + (base.attn(normed) + self.branch(normed, clip)), clip)
        return base.leave(x, h + base.ff(base.norms[2](h)))


# ---- SimDA
class Bottleneck(nn.Sequential):
    """Tokens d -> d / 4 -> d; its output starts at zero."""

    def __init__(self, width):
        super().__init__(Linear(width, width // 4), nn.GELU(), zero_(Linear(width // 4, width)))


class ShiftedSpatial(nn.Module):
    """A spatial transformer whose keys and values are those of a frame and of the one before (of the first, twice its
    own); one bottleneck behind the self-attention, one beside the feed-forward."""

    def __init__(self, base):
        super().__init__()
        self.base, width = base, base.attn.to_q.in_features
        self.attention, self.feed_forward = Bottleneck(width), Bottleneck(width)

    def forward(self, x, clip):
        base = self.base
        h = base.enter(x)
        normed = base.norms[0](h)
        frames = normed.unflatten(0, (-1, clip.frames))                  # (B, T, cells, C)
        before = torch.cat([frames[:, :1], frames[:, :-1]], 1).flatten(0, 1)
        a = base.attn(normed, torch.cat([normed, before], 1))
        h = base.read_text(h + a + self.attention(a), clip)
        return base.leave(x, h + base.ff(base.norms[2](h)) + self.feed_forward(h))


class TemporalAdapter(nn.Module):
    """A resnet, then d -> d / 2, a depthwise (3, 1, 1) convolution, d / 2 -> d, added; zero at first."""

    def __init__(self, base):
        super().__init__()
        self.base, width = base, base.conv2.out_channels
        self.down, self.up = nn.Conv2d(width, width // 2, 1), zero_(nn.Conv2d(width // 2, width, 1))
        self.conv = nn.Conv1d(width // 2, width // 2, 3, padding=1, groups=width // 2)

    def forward(self, x, clip):
        x = self.base(x, clip)
        h = clip.zero_padding(self.down(x))
        h = h.unflatten(0, (-1, clip.frames)).permute(0, 3, 4, 2, 1)     # (B, h, w, d / 2, T)
        h = self.conv(h.flatten(0, 2)).unflatten(0, h.shape[:3]).permute(0, 4, 3, 1, 2)
        return x + self.up(h.flatten(0, 1))


# ---- Customize-A-Video
class LoRA(nn.Module):
    """A frozen linear layer plus the product B A of each of its `parts` (key and value are one layer here); B = 0."""

    def __init__(self, base, rank, parts=1):
        super().__init__()
        self.base, self.rank = base, rank
        self.down = nn.Parameter(torch.empty(parts, rank, base.in_features))
        self.up = nn.Parameter(torch.zeros(parts, base.out_features // parts, rank))
        nn.init.normal_(self.down, std=base.in_features ** -0.5)

    def change(self):
        """What is added to the layer's weight; alpha = rank, so that its scale is 1."""
        return (self.up @ self.down).flatten(0, 1)

    def forward(self, x):
        return self.base(x) + F.linear(x, self.change())


def add_lora(attention, rank):
    for name, parts in (("to_q", 1), ("to_kv", 2), ("to_out", 1)):
        setattr(attention, name, LoRA(getattr(attention, name), rank, parts))


# ---- one option
def layers(dfgn):
    """All layers of a DFGN, and those with transformers: not the ones of the lowest level."""
    found = [layer for level in (*dfgn.down, dfgn.mid, *dfgn.up) for layer in level]
    return found, [layer for layer in found if layer.has_transformers]


def skip_temporal(dfgn):
    """Make a text-to-image network of a base."""
    dfgn.stem_temporal = Skip()
    for layer in layers(dfgn)[1]:
        layer.temporal = Skip()


def add_cross_frame(dfgn, rank):
    for layer in layers(dfgn)[1]:
        layer.spatial = CrossFrame(layer.spatial)


def add_simda(dfgn, rank):
    skip_temporal(dfgn)
    for layer in layers(dfgn)[0]:
        layer.resnet = TemporalAdapter(layer.resnet)
    for layer in layers(dfgn)[1]:
        layer.spatial = ShiftedSpatial(layer.spatial)


def add_spatial_lora(dfgn, rank):
    for layer in layers(dfgn)[1]:
        add_lora(layer.spatial.attn, rank)
        add_lora(layer.spatial.cross, rank)


def add_temporal_lora(dfgn, rank):
    for temporal in (dfgn.stem_temporal, *(layer.temporal for layer in layers(dfgn)[1])):
        for attention in temporal.attns:
            add_lora(attention, rank)


ATTACH = {"full": lambda dfgn, rank: None, "i2v_adapter": add_cross_frame, "simda": add_simda,
          "appearance_lora": lambda dfgn, rank: skip_temporal(dfgn), **dict.fromkeys(ON_CLIPS, add_temporal_lora)}


def inject(net, method, rank=16, absorber=None):
    """Freeze an RDTF that is a base, and attach what a method trains; net.adapter: the names that its file holds.

    absorber: {name: weight} of the first stage's LoRA, frozen here; the second stage is trained beside it.
    ValueError: no base, or an absorber of other shapes."""
    c = net.config.dfgn
    if c.known or c.temporal not in BASES:
        raise ValueError(f"a base has dfgn.known=false and dfgn.temporal={' or '.join(BASES)}")
    if c.temporal == "still" and method != "simda":
        raise ValueError("a base of stills (dfgn.temporal=still) is for simda")
    net.requires_grad_(method == "full")
    base = {id(p): p for p in net.parameters()} if method != "full" else {}  # held, so that no number is used again

    def added():
        return {name: p for name, p in net.named_parameters() if id(p) not in base}
    if absorber or method in ("appearance_lora", "customize_a_video_st"):
        add_spatial_lora(net.dfgn, rank)
    first = added() if method != "full" else {}
    if absorber:
        if {k: w.shape for k, w in absorber.items()} != {k: p.shape for k, p in first.items()}:
            raise ValueError(f"not LoRA of rank {rank} for this base")
        net.load_state_dict(absorber, strict=False)
        for p in first.values():
            p.requires_grad_(False)
    ATTACH[method](net.dfgn, rank)
    if method != "appearance_lora":
        net.dfgn.stem = ConditionedStem(net.dfgn.stem)
        for module in net.modules():
            if isinstance(module, CrossFrame):
                module.given = net.dfgn.stem.given
    net.adapter = [name for name in added() if method != "customize_a_video" or name not in first]


def load_tuned(path, load_rdtf):
    """What load_rdtf gives of a model, (network in eval mode and frozen, metadata), also of an adapter: the base that
    its file names is loaded first. UserError: that is gone or another one."""
    path = model_file(path)
    if not is_own(path, "adapter"):
        return load_rdtf(path)
    metadata, weights = read_own(path, "adapter", "")
    base = find_file(path, metadata["base_file"])
    if not base:
        raise UserError(f"{path}: tunes {metadata['base_file']}, which is not there; put the base at that place")
    if metadata["base"] not in names_of(base):
        raise UserError(f"{path}: tunes another base than {base}, which has changed")
    net, of_base = load_rdtf(base)
    try:
        inject(net, metadata["method"], metadata["rank"])
    except (ValueError, LookupError) as error:
        raise UserError(f"{path}: does not fit {base} ({first_line(error)})") from None
    frozen = {k: w for k, w in net.state_dict().items() if k not in net.adapter}
    return load_strict(net, {**frozen, **weights}, "", path), {**of_base, **metadata}
