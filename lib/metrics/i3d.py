"""Inception-I3D, the network of FVD (Carreira and Zisserman, 2017; Unterthiner et al., 2018): its 400 Kinetics logits.

Published weights are read from a local file: i3d_pretrained_400.pt, rgb_imagenet.pt, or i3d_torchscript.pt."""
import re
import zipfile

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.metrics.distances import to_signed
from lib.nets.weights import load_strict, read_weights
from lib.run.files import UserError, file_hash

BLOCKS = {                                       # channels in; of branches 0, 1a, 1b, 2a, 2b, 3b
    "3b": (192, 64, 96, 128, 16, 32, 32), "3c": (256, 128, 128, 192, 32, 96, 64),
    "4b": (480, 192, 96, 208, 16, 48, 64), "4c": (512, 160, 112, 224, 24, 64, 64),
    "4d": (512, 128, 128, 256, 24, 64, 64), "4e": (512, 112, 144, 288, 32, 64, 64),
    "4f": (528, 256, 160, 320, 32, 128, 128),
    "5b": (832, 256, 160, 320, 32, 128, 128), "5c": (832, 384, 192, 384, 48, 128, 128)}


def pad_same(x, kernel, stride):
    """Zeros around (..., T, H, W) so that n becomes ceil(n / stride), the odd one behind: TensorFlow's SAME."""
    pads = []
    for n, k, s in zip(x.shape[:-4:-1], kernel[::-1], stride[::-1]):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


class Unit3d(nn.Module):
    """Convolution, batch norm, ReLU. At stride 1 SAME is symmetric, and the convolution pads by itself."""

    def __init__(self, cin, cout, kernel=1, stride=1, eps=1e-3):
        super().__init__()
        padding = kernel // 2 if stride == 1 else 0
        self.conv3d = nn.Conv3d(cin, cout, kernel, stride, padding=padding, bias=False)
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
    """Four branches over the same input, joined on channels."""

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
    """Inception-I3D on RGB, 12,697,264 parameters, names as in i3d_pretrained_400.pt and rgb_imagenet.pt.

    eps: of batch norm; TensorFlow's graph says 1e-3, VideoGPT's port 1e-5."""

    def __init__(self, eps=1e-3):
        super().__init__()
        block = lambda name: Inception(*BLOCKS[name], eps=eps)
        self.Conv3d_1a_7x7 = Unit3d(3, 64, 7, 2, eps)
        self.MaxPool3d_2a_3x3 = MaxPool((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1 = Unit3d(64, 64, eps=eps)
        self.Conv3d_2c_3x3 = Unit3d(64, 192, 3, eps=eps)
        self.MaxPool3d_3a_3x3 = MaxPool((1, 3, 3), (1, 2, 2))
        self.Mixed_3b, self.Mixed_3c = block("3b"), block("3c")
        self.MaxPool3d_4a_3x3 = MaxPool((3, 3, 3), (2, 2, 2))
        self.Mixed_4b, self.Mixed_4c, self.Mixed_4d = block("4b"), block("4c"), block("4d")
        self.Mixed_4e, self.Mixed_4f = block("4e"), block("4f")
        self.MaxPool3d_5a_2x2 = MaxPool((2, 2, 2), (2, 2, 2))
        self.Mixed_5b, self.Mixed_5c = block("5b"), block("5c")
        self.avg_pool = nn.AvgPool3d((2, 7, 7), stride=1)
        self.logits = nn.Sequential()
        self.logits.conv3d = nn.Conv3d(1024, 400, 1)

    def forward(self, x):
        """(N, 3, T, 224, 224) in [-1, 1], T at least 9 -> logits (N, 400) before the softmax, averaged over time."""
        x = x.to(memory_format=torch.channels_last_3d)
        for layer in self.children():
            x = layer(x)
        return x.mean((2, 3, 4))

    def fold(self):
        """Batch norms worked into the convolutions, channels last: twice as fast on a CPU."""
        for unit in [m for m in self.modules() if isinstance(m, Unit3d)]:
            unit.conv3d = nn.utils.fusion.fuse_conv_bn_eval(unit.conv3d, unit.bn)
            unit.bn = nn.Identity()
        return self.to(memory_format=torch.channels_last_3d)


HASSONY2 = (                                     # names of the port that i3d_torchscript.pt was made from -> ours
    (r"^conv3d_0c_1x1\.", "logits."), (r"^conv3d", "Conv3d"), (r"^mixed", "Mixed"), (r"\.batch3d\.", ".bn."),
    (r"\.branch_0\.", ".b0."), (r"\.branch_([12])\.0\.", r".b\1a."), (r"\.branch_([12])\.1\.", r".b\1b."),
    (r"\.branch_3\.1\.", ".b3b."))


def rename(weights):
    """Weights under the names of I3D: as they are, or renamed from HASSONY2's."""
    def new_name(name):
        for pattern, replacement in HASSONY2:
            name = re.sub(pattern, replacement, name)
        return name
    theirs = any(name.startswith("conv3d_") for name in weights)
    return {new_name(k): v for k, v in weights.items()} if theirs else weights


def extend(T, how="loop", least=16):
    """Frame numbers (least,) of a clip of T frames. I3D needs 9, and its ports pad alike from 16 on.

    loop: again from the start, what one sees of a sticker. pingpong: there and back, the ends twice. hold: each frame
    as often as the next. pad: the last one again."""
    t = np.arange(least)
    if T >= least:
        return t
    back_and_forth = np.minimum(t % (2 * T), 2 * T - 1 - t % (2 * T))
    return dict(loop=t % T, pingpong=back_and_forth, hold=t * T // least, pad=np.minimum(t, T - 1))[how]


def i3d_input(clips, how="loop"):
    """uint8 (N, T, H, W, 3) -> float32 (N, 3, 16, 224, 224) in [-1, 1]: bilinear, no antialiasing, as published."""
    x = to_signed(clips).flatten(0, 1)                                       # (N T, 3, H, W)
    x = F.interpolate(x, (224, 224), mode="bilinear", align_corners=False).unflatten(0, clips.shape[:2])
    return x[:, extend(clips.shape[1], how)].transpose(1, 2)


def is_torchscript(path):
    return zipfile.is_zipfile(path) and any("/code/" in name for name in zipfile.ZipFile(path).namelist())


class I3DExtractor:
    """Clips -> I3D logits. frames: how short clips become 16 frames (see `extend`).

    The file is a state dict in either naming, or with `trust` the TorchScript file i3d_torchscript.pt, whose code then
    runs, on prepared clips, so that how it would resize them does not matter."""
    name, width = "i3d", 400

    def __init__(self, file, eps=None, frames="loop", device="cpu", trust=False):
        self.file, self.frames, self.device = file, frames, device
        self.script = is_torchscript(file)
        if self.script and not trust:
            raise UserError(f"--i3d {file}: a TorchScript archive, which holds code; add --i3d-trust where you trust "
                            "it, or take the weights as a state_dict")
        if self.script and eps:
            raise UserError(f"--i3d-eps {eps}: {file} is TorchScript and has its eps; leave the option out")
        if self.script:
            self.net = torch.jit.load(file, map_location=device).eval()
        else:
            net = load_strict(I3D(eps or 1e-3), rename(read_weights(file, "--i3d")), "--i3d", file)
            self.net = net.fold().to(device)
        self.key = dict(i3d=file_hash(file), eps=eps or 1e-3, how=frames)
        self.batch = 4 if str(device) == "cpu" else 16

    def scores(self, features, **_):
        """No number of a single clip: distances are of sets."""
        return {}

    def describe(self, T, size):
        frames = f"{T} -> 16 {self.frames}" if T < 16 else f"the first 16 of {T} frames" if T > 16 else "16 frames"
        kind = "TorchScript" if self.script else f"batch norm eps {self.key['eps']:g}"
        return f"FVD: I3D logits, {self.file} (SHA-256 {self.key['i3d'][:12]}, {kind}), {frames}, 224 px bilinear"

    @torch.no_grad()
    def __call__(self, clips):
        """uint8 (N, T, H, W, 3) on white -> (N, 400) float32."""
        x = i3d_input(clips, self.frames).to(self.device)
        y = self.net(x, False, False, True) if self.script else self.net(x)  # no rescaling, no resizing, logits
        if tuple(y.shape) != (len(clips), 400):
            raise UserError(f"--i3d {self.file}: gives {tuple(y.shape)}, not {len(clips)} times 400 logits")
        return y.float().cpu().numpy()
