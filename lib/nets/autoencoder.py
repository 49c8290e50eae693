"""The VAE: latent diffusion's AutoencoderKL, named so that Stable Diffusion's weights load as they are."""
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.media.pictures import to_tensor
from lib.nets.cpu import attend
from lib.nets.weights import SD_SCALE, identity, is_own, load_model, load_strict, model_file, names_of, read_sd_vae
from lib.run.files import file_hash
from lib.run.options import dataclass_from_dict


@dataclass
class VAEConfig:
    size: int = 64                        # pixels a side that the preset trains at
    image_channels: int = 4               # premultiplied RGBA in [-1, 1]; 3 for Stable Diffusion's weights
    patch: int = 4                        # pixels folded into channels before the first convolution; 1: none
    widths: tuple = (32, 64)              # channels a level; f = patch * 2 ** (levels - 1)
    layers: int = 1                       # residual blocks a level (the decoder has one more)
    latent_channels: int = 48
    groups: int = 16                      # groups of GroupNorm
    shortcut: bool = True                 # linear path beside encoder and decoder, starts as PCA; SD has none
    kl_weight: float = 1e-7
    latent_noise: float = 0.0             # training: scale of the noise that the decoder learns to see through

    @property
    def factor(self):
        """Pixels a side of a latent cell."""
        return self.patch * 2 ** (len(self.widths) - 1)

    @property
    def side(self):
        """Cells a side of the latents."""
        return self.size // self.factor


SD_VAE = VAEConfig(size=256, image_channels=3, patch=1, widths=(128, 256, 512, 512), layers=2, latent_channels=4,
                   groups=32, shortcut=False, kl_weight=1e-6)


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


class Resample(nn.Module):
    """Stride-2 convolution (padded right and below alone, as latent diffusion does), or nearest and convolution."""

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
            setattr(self, sampler, nn.ModuleList([Resample(cout, up=sampler == "upsamplers")]))
        self.sampler = sampler

    def forward(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        return getattr(self, self.sampler)[0](x) if self.sampler else x


class Encoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        w, last = c.widths, len(c.widths) - 1
        self.conv_in = nn.Conv2d(c.image_channels * c.patch ** 2, w[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i in range(len(w)):
            sampler = "downsamplers" if i < last else None
            self.down_blocks.append(VAELevel(w[max(i - 1, 0)], w[i], c.layers, c.groups, sampler))
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
        w, last = c.widths[::-1], len(c.widths) - 1
        self.conv_in = nn.Conv2d(c.latent_channels, w[0], 3, padding=1)
        self.mid_block = VAEMid(w[0], c.groups)
        self.up_blocks = nn.ModuleList()
        for i in range(len(w)):
            sampler = "upsamplers" if i < last else None
            self.up_blocks.append(VAELevel(w[max(i - 1, 0)], w[i], c.layers + 1, c.groups, sampler))
        self.conv_norm_out = nn.GroupNorm(c.groups, w[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(w[-1], c.image_channels * c.patch ** 2, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def compose(x, background):
    """Premultiplied RGBA (N, 4, H, W) in [-1, 1] over background (N, 3) in [-1, 1] -> RGB (N, 3, H, W); RGB stays."""
    if x.shape[1] == 3:
        return x
    alpha = (x[:, 3:] + 1) / 2
    return x[:, :3] + (1 - alpha) * (background[:, :, None, None] + 1)


class VAE(nn.Module):
    """AutoencoderKL of latent diffusion. Images (N, C, H, W) in [-1, 1]; latents (N, c, H/f, W/f).

    `latent_mean` and `latent_std` standardise latents; train.py measures them at the end. The deviation is one number
    for all channels, as Stable Diffusion's scaling factor is: channels keep the weight that they have in pixels."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        self.quant_conv = nn.Conv2d(2 * c.latent_channels, 2 * c.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(c.latent_channels, c.latent_channels, 1)
        if c.shortcut:
            self.shortcut_in = nn.Conv2d(c.image_channels, c.latent_channels, c.factor, stride=c.factor)
            self.shortcut_out = nn.ConvTranspose2d(c.latent_channels, c.image_channels, c.factor, stride=c.factor)
            for p in (*self.quant_conv.parameters(), *self.decoder.conv_out.parameters()):
                nn.init.zeros_(p)
        self.register_buffer("latent_mean", torch.zeros(c.latent_channels))
        self.register_buffer("latent_std", torch.ones(c.latent_channels))

    def images(self, x):
        """Premultiplied RGBA (..., 4, H, W) in [-1, 1] on the VAE's device, on white where it has no alpha."""
        x = x.to(self.latent_mean.device)
        return x if self.config.image_channels == 4 else x[..., :3, :, :] + 1 - x[..., 3:, :, :]

    def moments(self, x):
        """Images (N, C, H, W) -> mean and log-variance, each (N, c, h, w), not standardised."""
        mean, logvar = self.quant_conv(self.encoder(F.pixel_unshuffle(x, self.config.patch))).chunk(2, dim=1)
        if self.config.shortcut:
            mean, logvar = mean + self.shortcut_in(x), logvar - 8  # starts near-deterministic: sd 0.02
        return mean, logvar.clamp(-30, 20)

    def reconstruct(self, z):
        """Latents as `moments` gives them -> images (N, C, H, W), not clamped."""
        x = F.pixel_shuffle(self.decoder(self.post_quant_conv(z)), self.config.patch)
        return x + self.shortcut_out(z) if self.config.shortcut else x

    def freeze_encoder(self):
        """Keep what makes latents of images as it is; what makes images of latents still learns."""
        for part in (self.encoder, self.quant_conv, *([self.shortcut_in] if self.config.shortcut else [])):
            part.requires_grad_(False)

    def standardise(self, z):
        return (z - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def encode(self, x):
        """Images (N, C, H, W) -> standardised mean latents (N, c, h, w)."""
        return self.standardise(self.moments(x)[0])

    def decode(self, z):
        """Standardised latents (N, c, h, w) -> images (N, C, H, W), not clamped."""
        return self.reconstruct(z * self.latent_std[:, None, None] + self.latent_mean[:, None, None])

    def forward(self, x, background, noise, noise_std=0.0):
        """Loss of each image (N,): squared and absolute error on a solid colour, absolute error of alpha, KL.

        x (N, C, H, W) premultiplied, background (N, 3) in [-1, 1], noise like the latents; noise_std (N, 1, 1, 1), in
        units of latent_std, is added to the posterior's deviation. On a solid colour, as what lies under alpha 0 must
        not matter."""
        mean, logvar = self.moments(x)
        std = torch.exp(0.5 * logvar) + noise_std * self.latent_std[:, None, None]
        y = self.reconstruct(mean + std * noise).float()
        error = compose(y, background) - compose(x, background)
        kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).float()
        loss = (error ** 2 + 0.1 * error.abs()).mean((1, 2, 3)) + self.config.kl_weight * kl
        return loss if x.shape[1] == 3 else loss + 0.1 * (y[:, 3:] - x[:, 3:]).abs().mean((1, 2, 3))

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


@torch.no_grad()
def measure_latents(vae, stickers, rng):
    """Set the VAE's latent_mean and latent_std from 2,048 random frames of a data.StickerSet."""
    parts = []
    for _ in range(64):
        records = [stickers.records[i] for i in rng.integers(len(stickers), size=32)]
        numbers = [r["first"] + int(rng.integers(r["n"])) for r in records]
        parts.append(vae.moments(vae.images(to_tensor(stickers.frames[numbers])))[0])
    z = torch.cat(parts).transpose(0, 1).flatten(1).double()  # (c, N*h*w)
    vae.latent_mean.copy_(z.mean(1))
    vae.latent_std.copy_((z - z.mean(1, keepdim=True)).square().mean().sqrt())  # one number for all channels


@torch.no_grad()
def held_out_psnr(vae, stickers, n=256, batch=32):
    """Mean PSNR, on white, through the mean latents, of first and middle frames of a data.StickerSet.

    -> dict(psnr=dB), empty for an empty set, and a line for people."""
    numbers = [f for r in stickers.records[:n] for f in sorted({r["first"], r["first"] + r["n"] // 2})][:n]
    white, values = torch.ones(1, 3, device=vae.latent_mean.device), []
    for i in range(0, len(numbers), batch):
        x = vae.images(to_tensor(stickers.frames[numbers[i:i + batch]]))
        y = vae.decode(vae.encode(x)).clamp(-1, 1)
        mse = (((compose(x, white) - compose(y, white)) / 2) ** 2).mean((1, 2, 3))
        values += (-10 * torch.log10(mse.clamp_min(1e-10))).tolist()
    if not values:
        return {}, "VAE: no sticker is held out, so nothing is measured"
    error = 1.96 * np.std(values) / len(values) ** 0.5
    line = f"VAE: held-out PSNR on white {np.mean(values):.2f} dB (n = {len(values)}, 95 % +- {error:.2f})"
    return dict(psnr=float(np.mean(values))), line


def load_vae(path):
    """(VAE in eval mode, metadata) of a model.safetensors of the VAE stage, or of Stable Diffusion's weights.

    Those, a VAE or a full checkpoint, are standardised by their scaling factor; metadata["any_size"] is then true.
    metadata["latents"]: identity of the VAE whose encoder it has, by which a DFGN knows it; metadata["names"]: all that
    a DFGN may have for it. UserError for others."""
    path = model_file(path)
    if not Path(path).is_file() or is_own(path):
        def build(config):
            return VAE(dataclass_from_dict(VAEConfig, config["vae"], "vae"))
        net, metadata = load_model(path, "vae", build, "train one with `python train.py --stage vae`")
        known = metadata.get("latents")          # of a decoder that was tuned behind another VAE's encoder
        names = [known] if known else sorted(names_of(path))
        return net, {"latents": known or identity(path), **metadata, "names": names}
    weights, net = read_sd_vae(path), VAE(SD_VAE)
    weights.update(latent_mean=net.latent_mean, latent_std=torch.full_like(net.latent_std, 1 / SD_SCALE))
    found = file_hash(path)
    metadata = dict(kind="vae", config=dict(vae=asdict(SD_VAE)), any_size=True, latents=found, names=[found])
    return load_strict(net, weights, "--vae", path), metadata
