"""model.py; lib/nets/autoencoder.py, cpu.py: published sizes and values, and no frame that is padding can be felt."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lib.nets.cpu
import model
from data import tokenize
from lib.nets.autoencoder import VAE, VAEConfig, compose, load_vae
from lib.nets.cpu import Conv3x3, Linear, attend
from lib.nets.layers import sinusoid
from lib.nets.text import END, TextEncoder
from lib.nets.weights import SD_SCALE
from lib.run.files import UserError
from model import DFGN, PRESETS, RDTF, ClipContext, Config, Diffusion, DiffusionConfig

TINY, TINY_VAE = PRESETS["tiny"].dfgn, PRESETS["tiny"].vae
BOTH = pytest.mark.parametrize("temporal", ["sti", "conv3d"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny(*changes):
    """The tiny preset for latents of 4 x 4 cells."""
    return model.preset("tiny", ["vae.size=32", *changes])


def randomise(net):
    """Random values for parameters that start at zero (in norms, at one), so that no branch is silent."""
    for p in net.parameters():
        if p.std(unbiased=False) == 0:
            p.data += 0.3 * torch.randn_like(p)
    return net


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def latents(B, T, seed=0, side=4):
    return normal(B, T, TINY.channels, side, side, seed=seed)


def dfgn_inputs(T):
    """Arguments of DFGN.forward without the loss mask."""
    return dict(z_t=latents(2, T), t=torch.tensor([500, 20]), known=latents(2, T, 2),
                context=normal(2, 5, TINY.text_width, seed=1), cond_mask=(normal(2, T, seed=3) > 0).float())


# ---- sizes, names, values
def test_the_paper_preset_has_the_published_size(capsys):
    with torch.device("meta"):
        net, vae = RDTF(PRESETS["paper"]), VAE(PRESETS["paper"].vae)
    assert model.count(net.dfgn) == 959_078_840 == pytest.approx(0.960e9, rel=0.01)
    assert model.count(vae) == 83_653_863 and len(vae.state_dict()) == 248 + 2
    model.main()
    assert "paper: DFGN 959.1 M, text of a frozen tower, not counted, VAE 83.65 M" in capsys.readouterr().out


def test_stable_diffusions_vae_gives_the_values_of_a_public_implementation(sd_vae, tmp_path):
    """diffusers' AutoencoderKL (0.42.1, configured as Stable Diffusion's) with these weights, CPU, float32."""
    weights = {f"first_stage_model.{name}": w for name, w in sd_vae["compvis"].items()}
    others = {name: torch.ones(2) for name in ("model.diffusion_model.out.0.weight", "encoder.conv_in.weight")}
    torch.save(dict(state_dict={**weights, **others}), tmp_path / "sd.ckpt")
    vae, metadata = load_vae(tmp_path / "sd.ckpt")
    assert metadata["any_size"] and not any(p.requires_grad for p in vae.parameters())
    x = torch.from_numpy(np.sin(np.arange(3 * 32 * 32) * 0.37).reshape(1, 3, 32, 32).astype(np.float32))
    z = torch.from_numpy(np.cos(np.arange(64) * 0.9).reshape(1, 4, 4, 4).astype(np.float32))
    with torch.no_grad():
        mean, logvar = vae.moments(x)
        encoded, y = vae.encode(x), vae.decode(z)
    assert torch.allclose(encoded, mean * SD_SCALE, rtol=1e-5)
    assert mean.flatten()[::7].tolist() == pytest.approx([
        0.1506026, -0.0755204, 0.1732279, -0.0154245, -0.0415172, -0.2545789, -0.1621788, 0.1305034, 0.0405937,
        0.2568151], abs=2e-5)
    assert logvar.flatten()[::7].tolist() == pytest.approx([
        -0.0203289, -0.1601184, -0.0125576, 0.0208985, -0.0325096, -0.1857248, -0.2180948, 0.2870014, 0.2348690,
        0.3636192], abs=2e-5)
    assert y.flatten()[::311].tolist() == pytest.approx([
        -0.2844947, -0.1123932, -0.1006181, -0.0927867, 0.1890227, 0.0019724, 0.0119006, 0.2136911, 0.0400833,
        0.0720766], abs=1e-3)


def test_128_px_change_nothing_but_what_meets_latents():
    """So that --preset mini-128 can start from weights of 64 px, and costs about as much."""
    small, large = PRESETS["mini"], PRESETS["mini-128"]
    assert (large.vae.size, large.vae.side) == (128, small.vae.side)
    with torch.device("meta"):
        old, new = RDTF(small).state_dict(), RDTF(large).state_dict()
    changed = {key for key in new if key not in old or new[key].shape != old[key].shape}
    layers = {key.rsplit(".", 1)[0] for key in changed if ".known." not in key}
    assert layers == {"dfgn.stem.conv", "dfgn.conv_out", "dfgn.gate"}
    assert new.keys() - old.keys() == {"dfgn.gate.weight", "dfgn.gate.bias"} and not old.keys() - new.keys()
    assert any(".stem.known." in key for key in changed)


def test_presets_and_changes_of_them():
    for config in PRESETS.values():
        assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    changed = model.preset("tiny", ["dfgn.widths=8,16,32", "dfgn.widths=8,16", "diffusion.prediction=v",
                                    "dfgn.pool_text=false"])
    assert changed.dfgn.widths == (8, 16) and changed.diffusion.prediction == "v" and not changed.dfgn.pool_text
    refused = {"dfgn.width=3": "no field", "vae.size=20": "not a multiple", "dfgn.channels=8": "must be equal",
               "dfgn.layers=two": "is not a int", "dfgn.temporal=x": "not go together", "text.kind=big": "big",
               "diffusion.schedule=cosin": "cosin", "dfgn.given=nothing": "difference or zeros",
               "sampling.order=3": r"order 3 is unknown: 1 \(DDIM\) or 2", "sampling.eta=1.5": "from 0 to 1",
               "sampling.steps=0": "from 1 to", "sampling.steps=1001": "from 1 to diffusion.steps, 1000"}
    for change, reason in refused.items():
        with pytest.raises(UserError, match=f"--set {change}.*{reason}"):
            model.preset("tiny", [change])


# ---- VAE
@pytest.mark.parametrize("config", [
    TINY_VAE, VAEConfig(size=16, image_channels=3, patch=1, widths=(8, 8, 8, 16), groups=4, shortcut=False)])
def test_latents_are_standardised_and_back(config):
    vae = randomise(VAE(config)).double()
    vae.latent_mean.copy_(torch.linspace(-2, 3, config.latent_channels)), vae.latent_std.fill_(2.5)
    x = vae.images(normal(2, 4, 16, 16).double())
    mean, logvar = vae.moments(x)
    assert mean.shape == logvar.shape == (2, config.latent_channels, config.side, config.side)
    by_hand = (mean - torch.linspace(-2, 3, config.latent_channels)[:, None, None]) / 2.5
    assert torch.allclose(vae.encode(x), by_hand, atol=1e-6) and vae.decode(vae.encode(x)).shape == x.shape
    assert torch.allclose(vae.decode(vae.encode(x)), vae.reconstruct(mean), atol=1e-6)


def test_the_loss_of_the_vae_by_hand():
    vae = randomise(VAE(replace(TINY_VAE, kl_weight=0.01)))
    x, noise, black, white = normal(2, 4, 16, 16).tanh(), normal(2, 16, 2, 2), -torch.ones(2, 3), torch.ones(2, 3)
    mean, logvar = vae.moments(x)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (0.5 * logvar).exp()),
                                           torch.distributions.Normal(0, 1)).sum((1, 2, 3))

    def by_hand(further):
        y = vae.reconstruct(mean + ((0.5 * logvar).exp() + further) * noise)
        error, alpha = y[:, :3] - x[:, :3], (y[:, 3] - x[:, 3]).abs().mean((1, 2))   # premultiplied: as on black
        return (error ** 2 + 0.1 * error.abs()).mean((1, 2, 3)) + 0.01 * kl + 0.1 * alpha
    want = by_hand(0)
    assert torch.allclose(vae(x, black, noise), want, rtol=1e-5)
    vae.latent_std.fill_(2.5)
    further = torch.tensor([0.4, 0])[:, None, None, None]
    assert torch.allclose(vae(x, black, noise, further), by_hand(2.5 * further), rtol=1e-5)
    assert abs(by_hand(2.5 * further) - want)[0] > 1e-4
    assert (vae(x, white, noise) - want).abs().min() > 1e-4
    clear = torch.full((1, 4, 4, 4), -1.0)
    assert torch.equal(compose(clear, white[:1]), torch.ones(1, 3, 4, 4))
    assert torch.equal(VAE(replace(TINY_VAE, image_channels=3)).images(clear), torch.ones(1, 3, 4, 4))


def test_the_shortcut_starts_as_principal_components():
    vae = VAE(replace(TINY_VAE, latent_channels=4))
    x, other = F.interpolate(normal(64, 4, 4, 4), size=(16, 16), mode="bilinear").add(0.3).split(32)  # smooth images
    x[:, 0] = x[:, 2] = x[:, 1]
    other[:, 0] = other[:, 2] = other[:, 1]
    vae.start_shortcut(x)
    for images in (x, other):
        assert ((vae.decode(vae.encode(images)) - images) ** 2).mean() < 0.6 * images.var()
    assert vae.moments(x)[0].var((0, 2, 3)).mean().item() == pytest.approx(1, abs=0.02)


# ---- padding
@BOTH
@pytest.mark.parametrize("fast", [True, False])
def test_padding_of_clips_and_captions_cannot_change_the_loss(temporal, fast, monkeypatch):
    """Clips of 3 and 2 frames give alone, as if there were no padding, what they give together."""
    monkeypatch.setattr(lib.nets.cpu, "ENABLED", fast)
    net = randomise(RDTF(tiny(f"dfgn.temporal={temporal}")))
    captions, t = ["a red cat", "a very long caption about nothing at all, twice over"], torch.tensor([300, 700])
    z0, noise, cond = latents(2, 8), latents(2, 8, 1), torch.tensor([[1.0] + [0] * 7] * 2)

    def losses(which, T, lengths, filling=0.0):
        padding = (torch.arange(T) >= torch.tensor(lengths)[:, None]).float()
        z, e = (x[which, :T] + filling * padding[:, :, None, None, None] for x in (z0, noise))
        return net(z, tokenize(captions[which]), t[which], e, cond[which, :T] + filling * padding, 1 - padding)
    with torch.no_grad():
        alone = torch.cat([losses(slice(0, 1), 3, [3]), losses(slice(1, 2), 2, [2])])
        for T in (4, 8):
            together, other = (losses(slice(0, 2), T, [3, 2], filling) for filling in (0.0, 90.0))
            assert torch.allclose(together, alone, rtol=1e-5) and torch.equal(together, other) and alone.min() > 0.01


@BOTH
def test_frames_are_mixed(temporal):
    net, a = randomise(DFGN(replace(TINY, temporal=temporal))), dfgn_inputs(4)
    b = dict(a, z_t=a["z_t"] + torch.tensor([0.0, 0, 1, 0])[:, None, None, None])
    with torch.no_grad():
        change = net(**a, loss_mask=torch.ones(2, 4)) - net(**b, loss_mask=torch.ones(2, 4))
    assert change.abs().amax((0, 2, 3, 4)).min() > 1e-4
    assert any(isinstance(m, model.STI) for m in net.modules()) == (temporal == "sti")


# ---- parts
def test_sines_and_cosines_of_a_number():
    want = [np.cos(3), np.cos(0.03), np.sin(3), np.sin(0.03), 0]                # 1 and 1 / 100: from 1 to 1 / 10,000
    assert sinusoid(torch.tensor([0, 3]), 5)[1].tolist() == pytest.approx(want, abs=1e-6)


def test_sti_by_hand():
    sti = model.STI(8, TINY)
    x, clip = normal(6, 8, 4, 4), ClipContext(torch.ones(1, 6), None, None, None)
    with torch.no_grad():
        assert torch.allclose(sti(x, clip), sti.norm_out(x), atol=1e-6)         # both branches start as nothing
        randomise(sti)
        detail = x + sti.detail[1](sti.detail[0](x, clip), clip)
        tokens = F.avg_pool2d(sti.norm(x), 2).permute(0, 2, 3, 1).reshape(1, -1, 8)
        attended = sti.attn(tokens).view(6, 2, 2, 8).permute(0, 3, 1, 2)
        semantic = x + attended.repeat_interleave(2, 2).repeat_interleave(2, 3)
        means = torch.cat([detail.mean((0, 2, 3)), semantic.mean((0, 2, 3))])
        a, b = sti.fuse(means).softmax(-1)
        assert torch.allclose(sti(x, clip), sti.norm_out(a * detail + b * semantic), atol=1e-5)


@pytest.mark.parametrize("depthwise", [True, False])
def test_temporal_convolution_is_conv3d(depthwise):
    layer = randomise(model.TemporalConv(8, 4, depthwise))
    x, mask = normal(10, 8, 3, 2), torch.tensor([[1.0] * 5, [1, 1, 1, 0, 0]])
    h = F.silu(layer.norm(x)).unflatten(0, (2, 5)) * mask[:, :, None, None, None]
    want = F.conv3d(h.transpose(1, 2), layer.conv.weight, layer.conv.bias, padding=(1, 0, 0), groups=layer.conv.groups)
    with torch.no_grad():
        got = layer(x, ClipContext(mask, None, None, None))
        assert torch.allclose(got, want.transpose(1, 2).flatten(0, 1), atol=1e-6)


# ---- diffusion
@pytest.mark.parametrize("schedule, power", [("linear", 1), ("scaled_linear", 2)])
def test_schedule(schedule, power):
    betas = np.linspace(0.00085 ** (1 / power), 0.0120 ** (1 / power), 1000) ** power
    a = Diffusion(DiffusionConfig(schedule=schedule, terminal=0.0)).alphas_cumprod
    assert a.dtype == torch.float64 and np.allclose(a, np.cumprod(1 - betas), rtol=1e-9)
    end = Diffusion(DiffusionConfig(schedule=schedule, terminal=1e-4)).alphas_cumprod
    assert end[-1].item() == pytest.approx(1e-4, rel=1e-9) and end[0].item() == pytest.approx(a[0].item(), rel=1e-12)
    ratio = (end.sqrt() - 0.01) / (a.sqrt() - a[-1].sqrt())                     # the square roots shift and stretch
    assert (end[1:] < end[:-1]).all() and torch.allclose(ratio[:-1], ratio[:1].expand(999))


@pytest.mark.parametrize("prediction", ["eps", "v", "z0"])
def test_the_three_predictions_say_the_same(prediction):
    diffusion = Diffusion(DiffusionConfig(prediction=prediction))
    z0, noise, t = normal(3, 2, 4, 2, 2).double(), normal(3, 2, 4, 2, 2, seed=1).double(), torch.tensor([9, 500, 999])
    a = diffusion.alphas_cumprod[t].view(3, 1, 1, 1, 1)
    z_t, target = diffusion.add_noise(z0, noise, t), diffusion.target(z0, noise, t)
    assert torch.allclose(z_t, a.sqrt() * z0 + (1 - a).sqrt() * noise, atol=1e-12)
    assert torch.allclose(target, dict(eps=noise, v=a.sqrt() * noise - (1 - a).sqrt() * z0, z0=z0)[prediction])
    assert torch.allclose(diffusion.to_eps(target, z_t, t), noise, atol=1e-9)
    off = diffusion.to_eps(target + 0.1, z_t, t)                                # a wrong prediction, as an error of z0
    of_z0 = (((z_t - (1 - a).sqrt() * off) / a.sqrt() - z0) ** 2).mean((1, 2, 3, 4))
    limit = torch.ones(3).double() if prediction == "eps" else (1 / (1 - a.flatten())).clamp(max=5.0)
    want = torch.tensor(0.01).double() if prediction == "eps" else limit * of_z0  # v and z0 weigh alike
    assert torch.allclose(0.01 * diffusion.weight(t).double(), want.expand(3), rtol=1e-4)


# ---- given frames
def test_frames_are_filled_from_the_given_ones_around_them_in_a_loop():
    mask = torch.tensor([[0.0, 1, 0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0, 0, 0], [0] * 8])
    weights = model.fill_weights(mask, torch.tensor([8.0, 8, 5, 8]))
    numbers = weights @ torch.arange(8.0)
    assert numbers[0].tolist() == pytest.approx([1.6, 1, 2, 3, 4, 3.4, 2.8, 2.2])
    assert numbers[1].tolist() == [2] * 8 and not weights[3].any()
    assert numbers[2, :5].tolist() == pytest.approx([0, 1, 2, 3, 1.5])         # of 5 frames the first follows frame 4
    assert torch.allclose(weights[:3].sum(2), torch.ones(3, 8)) and not (weights * (mask[:, None] == 0)).any()


COND = torch.tensor([[0.0, 1, 0, 1], [0, 0, 0, 1]])                            # of the second clip padding: not given
MASK = torch.tensor([[1.0] * 4, [1, 1, 0, 0]])


def says(net, answer, seen):
    """Put `answer(arguments of DFGN.forward)` in the DFGN's place; what it saw is appended to `seen`."""
    def forward(x_t, t, context, known, cond_mask, *masks):
        seen.append((x_t, known, cond_mask))
        return answer(x_t)
    net.dfgn.forward = forward


@pytest.mark.parametrize("prediction", ["eps", "v", "z0"])
@pytest.mark.parametrize("given", ["difference", "zeros"])
def test_the_loss_is_the_weighted_error_and_eps_and_z0_agree(prediction, given):
    net = RDTF(tiny(f"diffusion.prediction={prediction}", f"dfgn.given={given}"))
    z0, noise, t, seen = latents(2, 4), latents(2, 4, 1), torch.tensor([300, 800]), []
    signal, sigma = net.diffusion.coefficients(t)
    known = z0 * (COND * MASK)[:, :, None, None, None]                         # no padded frame is given
    if given == "difference":                                                  # in a loop of 4: halves of 1 and 3
        known[0, 0] = known[0, 2] = (z0[0, 1] + z0[0, 3]) / 2
    base = sigma ** 16 * known if given == "difference" else 0 * known
    target = net.diffusion.target(z0 - base, noise, t)
    wrong = torch.tensor([0.5] * 6 + [7] * 2).view(2, 4, 1, 1, 1)              # padded frames count for nothing
    if given == "difference":
        wrong[0, [1, 3]] = 9                                                   # nor do given ones
    says(net, lambda _: target + wrong, seen)
    tokens = tokenize(["a", "b"])
    assert torch.allclose(net(z0, tokens, t, noise, COND, MASK), 0.25 * net.diffusion.weight(t), rtol=1e-4)
    x_t, found, cond = seen[0]
    assert torch.allclose(found, known, atol=1e-6) and torch.equal(cond, COND * MASK)
    free = torch.ones(2, 4, dtype=torch.bool)
    if given == "difference":
        free[0, [1, 3]] = False
        assert torch.allclose(x_t[~free], (signal * (known - base))[~free], atol=1e-6)        # clean
    want = net.diffusion.add_noise(z0 - base, noise, t)
    assert torch.allclose(x_t[free], want[free], atol=1e-5)
    wrong = 0
    z_t = net.diffusion.add_noise(z0, noise, t)
    only_given = z0.where((COND * MASK)[:, :, None, None, None] > 0, torch.nan)
    arguments = z_t, t, *net.encode_text(tokens), only_given, COND, MASK
    assert torch.allclose(net.eps(*arguments), noise, atol=2e-4)
    assert torch.allclose(net.z0(*arguments)[free], z0[free], atol=1e-3)


def test_given_frames_are_clean_and_enough_where_all_else_is_noise():
    """At the last timestep the network's input says nothing of the others, and all of the given ones; a clip that
    stands still has nothing to be drawn."""
    net, seen, z0 = RDTF(tiny()), [], latents(1, 4)
    says(net, torch.zeros_like, seen)
    t, cond, real = torch.tensor([999]), torch.tensor([[1.0, 0, 0, 0]]), torch.ones(1, 4)
    tokens = tokenize(["a"])
    for noise in (latents(1, 4, 1), latents(1, 4, 2)):
        net(z0, tokens, t, noise, cond, real)
    (x, known, _), (other, again, _) = seen
    assert torch.equal(known, again) and torch.equal(known, z0[:, :1].expand(-1, 4, -1, -1, -1))
    assert torch.equal(x[:, 0], other[:, 0]) and (x[:, 1:] - latents(1, 4, 1)[:, 1:]).abs().max() < 0.03
    still = z0[:, :1].expand(-1, 4, -1, -1, -1)
    assert net(still, tokens, t, latents(1, 4, 1), cond, real) < 1e-6 < 1e-2 < net(z0, tokens, t, noise, cond, real)


def test_a_fill_that_does_not_fade_is_subtracted_whole():
    net, seen, z0, noise = RDTF(tiny("dfgn.fade=0")), [], latents(1, 4), latents(1, 4, 1)
    says(net, torch.zeros_like, seen)
    t, cond = torch.tensor([100]), torch.tensor([[1.0, 0, 0, 0]])
    loss = net(z0, tokenize(["a"]), t, noise, cond, torch.ones(1, 4))
    x_t, known, _ = seen[0]
    assert not x_t[:, 0].any() and torch.allclose(x_t, net.diffusion.add_noise(z0 - known, noise, t).where(
        cond[:, :, None, None, None] == 0, 0), atol=1e-5)
    want = net.diffusion.weight(t) * ((z0 - known)[:, 1:] ** 2).mean()
    assert torch.allclose(loss, want, rtol=1e-5)


def test_text_alone_is_what_it_was():
    """Without given frames the two ways are one, bit for bit."""
    nets = [randomise(RDTF(tiny(f"dfgn.given={given}"))) for given in ("difference", "zeros")]
    nets[1].load_state_dict(nets[0].state_dict())
    x = dict(z0=latents(2, 4), noise=latents(2, 4, 1), t=torch.tensor([300, 999]), text=tokenize(["a", "b"]))
    z_t = nets[0].diffusion.add_noise(x["z0"], x["noise"], x["t"])
    with torch.no_grad():
        for masks in (dict(cond_mask=torch.zeros(2, 4), loss_mask=MASK), dict(cond_mask=1 - MASK, loss_mask=MASK)):
            losses = [net(**x, **masks) for net in nets]
            eps = [net.eps(z_t, x["t"], *net.encode_text(x["text"]), x["z0"], *masks.values()) for net in nets]
            assert torch.equal(*losses) and torch.equal(*eps)
        given = [net(**x, cond_mask=COND, loss_mask=MASK) for net in nets]
    assert given[0][0] != given[1][0] and given[0][1] == given[1][1]           # of the second only padding is given


def test_the_gate_makes_of_a_picture_a_difference_to_the_fill():
    gated, plain = randomise(RDTF(tiny())), RDTF(tiny("dfgn.gate=false"))
    state = {k: w for k, w in gated.state_dict().items() if ".gate." not in k}
    assert gated.state_dict().keys() - state.keys() == {"dfgn.gate.weight", "dfgn.gate.bias"}
    plain.load_state_dict(state)
    t, tokens, real = torch.tensor([999, 999]), tokenize(["a", "b"]), torch.ones(2, 4)
    one = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])
    x = latents(2, 4, 1), t, *gated.encode_text(tokens), latents(2, 4), one, real
    with torch.no_grad():
        by_cell = gated.z0(*x) - plain.z0(*x)
        assert not by_cell[1].any() and by_cell[0].std() > 0.01                # of no frames there is no fill
        gated.dfgn.gate.weight.zero_(), gated.dfgn.gate.bias.fill_(-1)
        difference, picture = gated.z0(*x), plain.z0(*x)
    assert torch.allclose(difference[0], picture[0] - x[4][0, :1], atol=1e-5)
    assert torch.equal(difference[1], picture[1])
    with torch.no_grad():
        gated.dfgn.gate.bias.zero_()
        assert torch.equal(gated.z0(*x), picture)                              # as at first


def test_the_known_frames_encoder_has_a_skip_and_both_its_branches_live():
    encoder, clip = model.KnownEncoder(16), ClipContext(torch.ones(1, 4), None, None, None)
    known, cond = latents(1, 4), torch.tensor([[1.0, 0, 0, 0]])
    with torch.no_grad():
        out = encoder(known, cond, clip)
        assert encoder.width == 64 and torch.nn.functional.cosine_similarity(
            out.flatten(), known.flatten(), dim=0) > 0.8
        moved = known.clone()
        moved[:, 3] += 1
        assert (encoder(moved, cond, clip) - out)[:3].abs().max() > 1e-3       # one frame reaches the others
        assert (encoder(known, 1 - cond, clip) - out).abs().max() > 1e-3


# ---- gradients and speed
@BOTH
def test_gradient_reaches_every_parameter(temporal):
    """The last convolution starts at zero, then the branches, then what is behind them: three steps wake the last."""
    config = tiny(f"dfgn.temporal={temporal}", "vae.size=64")
    net, vae = RDTF(config), VAE(config.vae)
    assert not net.dfgn(**dfgn_inputs(4), loss_mask=torch.ones(2, 4)).any()     # the start predicts nothing
    optimizer = torch.optim.AdamW([*net.parameters(), *vae.parameters()], lr=1e-3)
    cond, tokens = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0]]), tokenize(["a red cat", "two dogs"])
    for step in range(4):
        optimizer.zero_grad()
        z0, noise, t = latents(2, 4, side=8), latents(2, 4, step, 8), torch.tensor([100, 800])
        loss = net(z0, tokens, t, noise, cond, torch.ones(2, 4)).sum()
        (loss + vae(normal(2, 4, 16, 16), torch.zeros(2, 3), normal(2, 16, 2, 2)).sum()).backward()
        optimizer.step()
    silent = [name for part in (net, vae) for name, p in part.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in silent if not name.endswith("to_k.bias")] == []    # a softmax does not feel its keys' bias


def kept_bytes(net, batch):
    """Bytes that autograd keeps for the backward pass beside parameters and inputs, and the gradients."""
    given = {x.untyped_storage().data_ptr() for x in (*net.parameters(), *batch.values())}
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = net(**batch).square().mean()
    total = sum(n for storage, n in kept.items() if storage not in given)
    return total, torch.autograd.grad(loss, list(net.parameters()))


def test_gradient_checkpointing_gives_the_same_gradients_for_less_memory():
    net = DFGN(TINY).double()
    for i, p in enumerate(net.parameters()):
        p.data = 0.1 * normal(*p.shape, seed=i).double()
    loss_mask = torch.tensor([[1.0] * 4, [1, 1, 1, 0]]).double()
    batch = dict(dfgn_inputs(4), z_t=latents(2, 4, 7, side=8), known=latents(2, 4, 8, side=8), loss_mask=loss_mask)
    batch = {k: x.double() if x.is_floating_point() else x for k, x in batch.items()}
    plain, wanted = kept_bytes(net, batch)
    net.checkpointing = True
    layers, by_layer = kept_bytes(net, batch)
    assert layers < 0.4 * plain and all(g.abs().max() > 0 for g in wanted)
    torch.testing.assert_close(by_layer, wanted, rtol=1e-10, atol=1e-12)


def test_the_fast_ways_of_a_cpu_give_the_plain_results(monkeypatch):
    """Outputs and gradients of lib.nets.cpu's layers."""
    wide, many = (normal(2, 300, *size).double().requires_grad_() for size in ((256,), (7, 6)))
    heads = [normal(2, 3, n, 8, seed=i).double().requires_grad_() for i, n in enumerate((6, 5, 5))]
    mask = torch.tensor([[1, 0, 0, 1, 1], [0, 1, 0, 0, 0]]).bool()
    cases = [(Linear(256, 48).double(), [wide]), (Conv3x3(300, 24, stride=2).double(), [many]), (attend, heads),
             (lambda q, k, v: attend(q, k, v, mask), heads), (attend, [x[:, :, :n] for x, n in zip(heads, (6, 1, 1))])]
    for layer, inputs in cases:
        found = []
        for fast in (True, False):
            monkeypatch.setattr(lib.nets.cpu, "ENABLED", fast)
            monkeypatch.setattr(lib.nets.cpu, "MOST", 1)                   # of two sequences
            y = layer(*inputs)
            found.append([y, *torch.autograd.grad(y.sin().sum(), inputs)])
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_captions_end_with_their_end_token():
    """Token 0 is "!" in a caption and padding behind it; how long others are changes nothing."""
    encoder = randomise(TextEncoder(tiny().text))
    tokens = tokenize(["wow!\u2728", "a little red robot that waves", "!", ""])
    assert 0 in tokens[0, :5] and (tokens[:, 0] != 0).all()
    features, mask = encoder(tokens)
    assert mask.sum(1).tolist() == [int((row == END).nonzero()[0]) + 1 for row in tokens]
    for row, want, real in zip(tokens, features, mask):
        alone, all_real = encoder(row[None])
        assert all_real.all() and torch.allclose(alone[0], want[real], atol=1e-5)


def test_a_configuration_without_a_newer_field_has_its_default():
    config = PRESETS["tiny"].to_dict()
    del config["dfgn"]["known"]
    assert Config.from_dict(config) == PRESETS["tiny"]
    with pytest.raises(TypeError, match="unknown_field"):
        Config.from_dict(dict(config, dfgn=dict(config["dfgn"], unknown_field=1)))
