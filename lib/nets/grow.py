"""From a VAE and a DFGN to those of twice the size: the first channels of the larger latents are the smaller ones.

A picture of twice the pixels a side has as many cells, of twice the pixels. Its latents are those that the smaller VAE
makes of the picture at half the size, and behind them channels for what it cannot say: principal components of the
details. So a DFGN of the larger latents begins as the smaller one, to which details are added."""
import torch
import torch.nn.functional as F

from lib.nets.autoencoder import VAE


def twice(weight, patch, dim):
    """A dimension of channels c * patch^2, as pixel_unshuffle makes them of c, for patches of twice the side: each
    pixel's weights are those of the pixel of half the resolution in which it lies."""
    w = weight.movedim(dim, 0)
    w = w.unflatten(0, (-1, patch, patch)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    return w.flatten(0, 2).movedim(0, dim)


def halves(weight, inputs):
    """The halves of a weight's outputs; of its inputs, too: four views."""
    rows = weight.chunk(2, 0)
    return [part for row in rows for part in row.chunk(2, 1)] if inputs else rows


def put(into, weight):
    """`weight` in the leading block of `into`, zeros behind it."""
    into.zero_()
    into[tuple(slice(n) for n in weight.shape)] = weight


def fits(small, large):
    """Is this VAEConfig that of twice the size that `grow_vae` makes of the smaller one?"""
    same = ("image_channels", "widths", "layers", "groups", "shortcut")
    return (large.size, large.patch, large.shortcut) == (2 * small.size, 2 * small.patch, True) and \
        large.latent_channels > small.latent_channels and all(getattr(small, k) == getattr(large, k) for k in same)


@torch.no_grad()
def grow_vae(small, config, x):
    """A VAE of `config` (see `fits`) that makes of images x (N, C, 2S, 2S) what `small` makes of them at half the size,
    enlarged, plus the principal components of the details, measured on x.

    The components are orthogonal to what the linear path of `small` reads. A unit of theirs is as many pixels' worth as
    one of the smaller latents', so the one deviation of all channels holds for them, too."""
    n, f, p = small.config.latent_channels, small.config.factor, small.config.patch
    large, old, more = VAE(config), small.state_dict(), config.latent_channels - n
    own = large.state_dict()
    for name, w in old.items():
        if own[name].shape == w.shape:
            own[name].copy_(w)
    own["encoder.conv_in.weight"].copy_(twice(old["encoder.conv_in.weight"], p, 1) / 4)
    for part in ("weight", "bias"):                          # what is drawn is enlarged
        own[f"decoder.conv_out.{part}"].copy_(twice(old[f"decoder.conv_out.{part}"], p, 0))
    for name in ("encoder.conv_out.weight", "encoder.conv_out.bias", "quant_conv.weight", "quant_conv.bias"):
        inputs = name == "quant_conv.weight"                 # means and log-variances, of outputs and here of inputs
        for into, w in zip(halves(own[name], inputs), halves(old[name], inputs), strict=True):
            put(into, w)
    for name in ("post_quant_conv.weight", "post_quant_conv.bias", "decoder.conv_in.weight", "latent_mean"):
        put(own[name], old[name])
    own["post_quant_conv.weight"][n:, n:, 0, 0] = torch.eye(more)

    enlarged = old["shortcut_in.weight"].repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
    patches = F.unfold(x, 2 * f, stride=2 * f).transpose(1, 2).flatten(0, 1)   # (N*h*w, C*4*f*f)
    mean = patches.mean(0)
    seen = torch.linalg.qr(enlarged.flatten(1).T).Q
    rest = patches - mean
    rest = rest - rest @ seen @ seen.T
    axes = torch.linalg.svd(rest, full_matrices=False)[2][:more]
    drawn = old["shortcut_out.weight"].repeat_interleave(2, 2).repeat_interleave(2, 3)
    unit = drawn.flatten(1).square().sum(1).mean().sqrt()
    own["shortcut_in.weight"].copy_(torch.cat([enlarged, (axes / unit).view(more, *enlarged.shape[1:])]))
    own["shortcut_in.bias"].copy_(torch.cat([old["shortcut_in.bias"], -(axes @ mean) / unit]))
    own["shortcut_out.weight"].copy_(torch.cat([drawn, (axes * unit).view(more, *drawn.shape[1:])]))
    own["latent_std"].fill_(old["latent_std"][0])
    return large


def grow_dfgn(weights, own):
    """Weights of a DFGN for latents of fewer channels than a new network's, `own`, has -> of its sizes.

    What was there reads the new channels with zeros, and what predicts them begins at zero as in a new network: on the
    first channels both are the same function. `weights` of other names stay."""
    c, more = len(weights["dfgn.conv_out.bias"]), len(own["dfgn.conv_out.bias"]) - len(weights["dfgn.conv_out.bias"])

    def columns(name, n):
        if name.startswith("dfgn.stem.conv."):               # noisy latents, then the given frames'
            return [*range(c), *range(c + more, 2 * c + more)]
        if name.startswith(("dfgn.stem.known.convs.0.", "dfgn.stem.known.widen.")):  # and the mask
            return [*range(c), c + more]
        return range(n)

    grown = dict(weights)
    meet_latents = ("dfgn.stem.", "dfgn.conv_out.", "dfgn.gate.")
    for name, w in weights.items():
        if name in own and own[name].shape != w.shape and name.startswith(meet_latents):
            grown[name] = new = own[name].clone()
            new[:len(w)] = 0
            if w.dim() == 1:
                new[:len(w)] = w
            else:
                new[:len(w), list(columns(name, w.shape[1]))] = w.to(new.dtype)
    return grown
