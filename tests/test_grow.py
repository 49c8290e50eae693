"""lib/nets/grow.py: the larger VAE and DFGN say of the smaller latents what the smaller ones did."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import run_train

import data
from lib.media.pictures import to_tensor
from lib.nets.autoencoder import VAE, load_vae
from lib.nets.grow import fits, grow_dfgn, grow_vae
from lib.nets.weights import identity, read_metadata
from lib.run.files import UserError
from model import PRESETS, RDTF, load_rdtf
from tools import export

TWICE = ["vae.size=32", "vae.patch=4", "vae.latent_channels=32", "dfgn.channels=32", "dfgn.known_width=64"]
SMALL, LARGE = PRESETS["tiny"].vae, replace(PRESETS["tiny"].vae, size=32, patch=4, latent_channels=32)


@pytest.fixture(scope="module")
def stickers32(tmp_path_factory):
    out = tmp_path_factory.mktemp("stickers32") / "set"
    data.main(["synthetic", "--n", "48", "--size", "32", "--out", str(out), "--workers", "1"])
    return out


def shaken(net):
    """A network none of whose weights is zero, as a trained one's."""
    with torch.no_grad():
        for w in net.state_dict().values():
            w.add_(0.1 * torch.randn(w.shape)) if w.is_floating_point() else w
    return net.eval()


def test_a_grown_vae_begins_as_the_smaller_one(stickers32):
    torch.manual_seed(0)
    small = shaken(VAE(SMALL))
    small.latent_std.fill_(1.7)
    x = to_tensor(data.StickerSet(stickers32).frames[:40])
    large = grow_vae(small, LARGE, x).eval()
    half, n = F.avg_pool2d(x, 2), SMALL.latent_channels
    with torch.no_grad():
        for a, b in zip(small.moments(half), large.moments(x), strict=True):
            torch.testing.assert_close(b[:, :n], a)
        z = large.encode(x)
        torch.testing.assert_close(z[:, :n], small.encode(half))
        coarse = torch.cat([z[:, :n], torch.zeros_like(z[:, n:])], 1)
        torch.testing.assert_close(large.decode(coarse), F.interpolate(small.decode(z[:, :n]), scale_factor=2.0))
        added = large.decode(z) - large.decode(coarse)        # what the new channels say, by the linear path alone
        torch.testing.assert_close(added, F.conv_transpose2d(
            z[:, n:] * 1.7, large.shortcut_out.weight[n:], stride=16))
        linear = F.conv2d(x, large.shortcut_in.weight[:n], stride=16)
        torch.testing.assert_close(F.conv2d(x - added, large.shortcut_in.weight[:n], stride=16), linear)
        torch.testing.assert_close(z[:, n:].mean((0, 2, 3)), torch.zeros(n), rtol=0, atol=1e-4)
        spread = z[:, n:].std((0, 2, 3))
        assert (spread[:-1] > spread[1:] - 1e-4).all() and spread[0] > 5 * spread[-1]   # the largest details first
        axes = large.shortcut_in.weight[n:].flatten(1) @ large.shortcut_out.weight[n:].flatten(1).T
        torch.testing.assert_close(axes, torch.eye(n), rtol=0, atol=1e-4)
        unit = large.shortcut_out.weight.flatten(1).square().sum(1)
        torch.testing.assert_close(unit[n:], unit[:n].mean().expand(n))


def test_what_can_grow():
    assert fits(SMALL, LARGE) and fits(PRESETS["mini"].vae, PRESETS["mini-128"].vae)
    for change in (dict(size=16), dict(patch=2), dict(latent_channels=16), dict(widths=(8, 16, 32)), dict(layers=2),
                   dict(shortcut=False)):
        assert not fits(SMALL, replace(LARGE, **change)), change


def test_a_grown_dfgn_begins_as_the_smaller_one():
    torch.manual_seed(0)
    config = replace(PRESETS["tiny"], text=replace(PRESETS["tiny"].text, vocab=9))
    small = shaken(RDTF(config))
    large = RDTF(replace(config, vae=LARGE, dfgn=replace(config.dfgn, channels=32, known_width=64)))
    large.load_state_dict(grow_dfgn(small.state_dict(), large.state_dict()))
    z, known = torch.randn(2, 3, 4, 32, 2, 2)
    mask, real = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]), torch.ones(3, 4)
    t = torch.tensor([9, 500, 990])
    known = known * mask[:, :, None, None, None]
    context = torch.randn(3, 5, 16)
    coarse = small.dfgn(z[:, :, :16], t, context, known[:, :, :16], mask, real)
    out = large.dfgn(z, t, context, known, mask, real)
    torch.testing.assert_close(out[:, :, :16], coarse)
    assert not out[:, :, 16:].any()
    (out - torch.randn_like(out)).square().sum().backward()   # and all that is new can learn
    stem, last = large.dfgn.stem, large.dfgn.conv_out
    for new in (stem.conv.weight.grad[:, 16:32], stem.conv.weight.grad[:, 48:], last.weight.grad[16:],
                stem.known.convs[0].weight.grad[:16, 16:32], stem.known.widen.weight.grad[:, 16:32]):
        assert new.abs().amax(tuple(range(1, new.dim()))).min() > 0


def test_train_grows_both(vae_argv, dfgn_argv, tiny_vae, tiny_dfgn, stickers32, tmp_path):
    """--base of half the size: the encoder is the smaller one's and stays; the DFGN goes on where it was."""
    base, net, vae = tiny_vae / "model.safetensors", tiny_dfgn / "model.safetensors", tmp_path / "vae"
    large = ["--data", stickers32, "--set", *TWICE]
    run_train(*vae_argv, *large, "--base", base, "--steps", 2, "--out", vae)
    (small, _), (grown, meta) = load_vae(base), load_vae(vae)
    assert meta["grown_from"] == identity(base) and meta["latents"] == identity(vae) != identity(base)
    x = torch.randn(2, 4, 32, 32)
    torch.testing.assert_close(grown.encode(x)[:, :16], small.encode(F.avg_pool2d(x, 2)))

    def stop(step, *_):
        if step == 1:
            raise KeyboardInterrupt
    argv = *vae_argv, *large, "--base", base, "--steps", 2, "--save-every", 1, "--out", tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt):
        run_train(*argv, after_backward=stop)
    run_train(*argv)                                          # it is grown once, and then goes on
    torch.testing.assert_close(load_vae(tmp_path / "resumed")[0].state_dict(), grown.state_dict(), rtol=0, atol=0)
    tuned = tmp_path / "tuned"                                # a grown one's decoder tuned: its latents stay
    run_train(*vae_argv, *large, "--base", vae, "--steps", 1, "--out", tuned)
    assert load_vae(tuned)[1]["latents"] == meta["latents"] and load_vae(tuned)[1]["grown_from"] == identity(base)

    still = "--steps", 1, "--lr", 1e-12, "--warmup", 0, "--weight-decay", 0
    for name, start in (("grown", net), ("again", tmp_path / "grown")):
        run_train(*dfgn_argv, *large, "--vae", tuned, "--base", start, *still, "--out", tmp_path / name)
    (before, _), (after, _), (again, _) = (load_rdtf(path) for path in (net, tmp_path / "grown", tmp_path / "again"))
    for key, w in before.state_dict().items():
        w2, w3 = after.state_dict()[key], again.state_dict()[key]
        torch.testing.assert_close(w2, w3, rtol=0, atol=1e-7)
        if w.shape == w2.shape:
            torch.testing.assert_close(w, w2, rtol=0, atol=1e-7)
    torch.testing.assert_close(after.dfgn.conv_out.weight[:16], before.dfgn.conv_out.weight, rtol=0, atol=1e-7)
    assert read_metadata(tmp_path / "grown" / "model.safetensors")["vae"] == meta["latents"]
    mean, moved = tmp_path / "mean.safetensors", tmp_path / "moved"    # of a grown DFGN and the smaller one
    run_train(*dfgn_argv, *large, "--vae", tuned, "--base", net, "--steps", 3, "--warmup", 0, "--out", moved)
    export.main([str(moved), str(mean), "--average", str(net)])
    (a, _), (b, _), (c, _) = (load_rdtf(path) for path in (net, moved, mean))
    a, b, c = a.dfgn, b.dfgn, c.dfgn
    assert not torch.equal(a.conv_out.weight, b.conv_out.weight[:16]) and b.conv_out.weight[16:].any()
    middle = (a.conv_out.weight + b.conv_out.weight[:16]) / 2
    torch.testing.assert_close(c.conv_out.weight[:16], middle, rtol=0.01, atol=1e-5)
    torch.testing.assert_close(c.conv_out.weight[16:], b.conv_out.weight[16:], rtol=0.01, atol=1e-6)
    torch.testing.assert_close(c.norm_out.weight, (a.norm_out.weight + b.norm_out.weight) / 2)
    with pytest.raises(UserError, match="trained with size 16, the preset has 32"):
        run_train(*vae_argv, *large, "vae.widths=8,16,32", "--base", base, "--steps", 1, "--out", tmp_path / "wide")
