"""model.py: sizes as published, names as Stable Diffusion's, and no frame that is padding can be felt."""
import copy

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import model
from data import tokenize
from model import (DFGN, PRESETS, RDTF, SD_SCALE, SD_VAE, VAE, Clip, Config, Conv, Diffusion, DiffusionConfig, Linear, TemporalConv, TextEncoder, VAEConfig,
                   count_words, lean, sd_vae_weights)


def tiny(**fields):
    """The tiny preset for latents of 4 x 4 cells, with part__field=value changes."""
    config = PRESETS["tiny"].to_dict()
    config["vae"]["size"] = 32
    for name, value in fields.items():
        part, key = name.split("__")
        assert key in config[part]
        config[part][key] = value
    return Config.from_dict(config)


def randomise(net, seed=0):
    """Give every parameter that starts at zero (or, in norms, at one) a random value: nothing hides behind a zero branch."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            if p.std(unbiased=False) == 0:
                p.add_(torch.randn(p.shape, generator=g) * 0.3)
        for name, buffer in net.named_buffers():
            if name in ("word_pictures", "mean_picture"):
                buffer.copy_(torch.randn(buffer.shape, generator=g))
    return net


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def latents(B, T, seed=0, side=4):
    return normal(B, T, PRESETS["tiny"].dfgn.channels, side, side, seed=seed)


def clip_inputs(T, B=2, seed=0):
    """z_t, t, context, known, cond_mask for DFGN.forward, without the loss mask."""
    return dict(z_t=torch.cat([latents(B, T, seed), latents(B, T, seed + 4)], 2), t=torch.tensor([500, 20])[:B], context=normal(B, 5, PRESETS["tiny"].dfgn.text_width, seed=seed + 1),
                known=latents(B, T, seed + 2), cond_mask=(normal(B, T, seed=seed + 3) > 0).float())


# ---- sizes and names

@pytest.fixture(scope="module")
def paper():
    with torch.device("meta"):
        return RDTF(PRESETS["paper"]), VAE(PRESETS["paper"].vae)


def test_the_paper_preset_has_the_published_size(paper):
    net, vae = paper
    parts = model.breakdown(net)
    assert model.count(net.dfgn) == pytest.approx(0.960e9, rel=0.01)
    for part, millions in {"resnets": 467.5, "spatial attention": 212.0, "temporal attention": 213.5, "samplers": 41.9}.items():
        assert parts[part] == pytest.approx(millions * 1e6, rel=0.01), part
    assert sum(parts.values()) == model.count(net.dfgn) and all(n > 0 for n in parts.values())
    assert model.count(vae) == pytest.approx(83.65e6, rel=1e-3)


@pytest.mark.parametrize("name, shape", {
    "encoder.conv_in.weight": (128, 3, 3, 3),
    "encoder.down_blocks.0.resnets.0.norm1.weight": (128,),
    "encoder.down_blocks.0.downsamplers.0.conv.weight": (128, 128, 3, 3),
    "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": (256, 128, 1, 1),
    "encoder.down_blocks.3.resnets.1.conv2.bias": (512,),
    "encoder.mid_block.attentions.0.group_norm.weight": (512,),
    "encoder.mid_block.attentions.0.to_q.weight": (512, 512),
    "encoder.mid_block.attentions.0.to_out.0.weight": (512, 512),
    "encoder.mid_block.resnets.1.norm2.bias": (512,),
    "encoder.conv_norm_out.weight": (512,),
    "encoder.conv_out.weight": (8, 512, 3, 3),
    "decoder.conv_in.weight": (512, 4, 3, 3),
    "decoder.up_blocks.0.upsamplers.0.conv.weight": (512, 512, 3, 3),
    "decoder.up_blocks.2.resnets.0.conv_shortcut.weight": (256, 512, 1, 1),
    "decoder.up_blocks.3.resnets.2.conv1.weight": (128, 128, 3, 3),
    "decoder.conv_norm_out.bias": (128,),
    "decoder.conv_out.weight": (3, 128, 3, 3),
    "quant_conv.weight": (8, 8, 1, 1),
    "post_quant_conv.weight": (4, 4, 1, 1)}.items())
def test_the_paper_vae_has_stable_diffusions_names(paper, name, shape):
    assert tuple(paper[1].state_dict()[name].shape) == shape


def test_stable_diffusions_vae_has_248_tensors_and_no_shortcut(paper):
    names = set(paper[1].state_dict()) - {"latent_mean", "latent_std"}
    assert len(names) == 248 and not any("shortcut_" in name for name in names)
    assert "decoder.up_blocks.3.upsamplers.0.conv.weight" not in names and "encoder.down_blocks.3.downsamplers.0.conv.weight" not in names


def test_every_naming_of_stable_diffusions_vae_gives_the_same_weights(sd_vae):
    assert [len(weights) for weights in sd_vae.values()] == [248] * 3 and sum(w.numel() for w in sd_vae["compvis"].values()) == 83_653_863
    assert len(set(sd_vae["diffusers"]) | set(sd_vae["old"])) == 248 + 16 and len(set(sd_vae["diffusers"]) & set(sd_vae["compvis"])) == 12
    full = {f"first_stage_model.{name}": w for name, w in sd_vae["compvis"].items()}
    others = {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2), "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": torch.ones(2),
              "encoder.conv_in.weight": torch.ones(3), "betas": torch.ones(4)}
    own = {"loss.logvar": torch.ones(1), "loss.discriminator.main.0.weight": torch.ones(4), "model_ema.decay": torch.ones(1)}
    for weights in (*sd_vae.values(), {**full, **others}, {**sd_vae["compvis"], **own}):
        named = sd_vae_weights(weights)
        assert named.keys() == sd_vae["diffusers"].keys()
        assert all(w.shape == sd_vae["diffusers"][name].shape and torch.equal(w, sd_vae["diffusers"][name]) for name, w in named.items())
    with pytest.raises(ValueError, match="a second tensor for decoder.mid_block.attentions.0.to_k.bias"):
        sd_vae_weights({**sd_vae["diffusers"], **sd_vae["old"]})
    assert not sd_vae_weights({"decoder.up.4.block.0.norm1.weight": torch.ones(1)}).keys() & sd_vae["diffusers"].keys()               # a level too many: refused as unknown


def test_stable_diffusions_vae_gives_the_values_of_a_public_implementation(sd_vae):
    """diffusers' AutoencoderKL (0.42.1, configured as Stable Diffusion's) with the same weights, on a CPU in float32. On 32 to 256 px ours was
    within 5e-7 of its mean and log-variance, and within 2e-4 of its decoded image, whose deviation is 0.24."""
    vae = VAE(SD_VAE)
    assert model.count(vae) == 83_653_863
    vae.load_state_dict({**sd_vae["diffusers"], "latent_mean": torch.zeros(4), "latent_std": torch.full((4,), 1 / SD_SCALE)})
    wave = lambda n, step: np.arange(n) * step
    x = torch.from_numpy(np.sin(wave(3 * 32 * 32, 0.37)).reshape(1, 3, 32, 32).astype(np.float32))
    z = torch.from_numpy(np.cos(wave(64, 0.9)).reshape(1, 4, 4, 4).astype(np.float32))
    with torch.no_grad():
        mean, logvar = vae.moments(x)
        encoded, y = vae.encode(x), vae.decode(z)
    assert torch.allclose(encoded, mean * 0.18215, rtol=1e-5) and torch.allclose(y, vae.reconstruct(z / 0.18215), atol=5e-4)
    assert mean.flatten()[::7].tolist() == pytest.approx([0.1506026, -0.0755204, 0.1732279, -0.0154245, -0.0415172, -0.2545789, -0.1621788, 0.1305034, 0.0405937, 0.2568151], abs=2e-5)
    assert logvar.flatten()[::7].tolist() == pytest.approx([-0.0203289, -0.1601184, -0.0125576, 0.0208985, -0.0325096, -0.1857248, -0.2180948, 0.2870014, 0.2348690, 0.3636192], abs=2e-5)
    assert y.flatten()[::311].tolist() == pytest.approx([-0.2844947, -0.1123932, -0.1006181, -0.0927867, 0.1890227, 0.0019724, 0.0119006, 0.2136911, 0.0400833, 0.0720766], abs=1e-3)


def test_a_config_survives_json():
    import json
    for config in PRESETS.values():
        assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_main_prints_every_preset(capsys):
    model.main()
    said = capsys.readouterr().out
    assert all(f"{name}: DFGN" in said for name in PRESETS) and "VAE 83.65 M" in said


# ---- VAE

@pytest.mark.parametrize("config", [PRESETS["tiny"].vae, VAEConfig(size=16, patch=2, widths=(8, 16), groups=4),
                                    VAEConfig(size=16, image_channels=3, patch=1, widths=(8, 8, 8, 16), groups=4, shortcut=False, fold=1)])
def test_vae_shapes(config):
    vae = randomise(VAE(config))
    x, side = normal(2, config.image_channels, 16, 16), 16 // config.factor
    mean, logvar = vae.moments(x)
    assert config.factor in (4, 8) and mean.shape == logvar.shape == (2, config.latent_channels, side, side)
    assert vae.encode(x).shape == (2, config.channels, config.side, config.side) and config.channels * config.side ** 2 == mean[0].numel()
    assert vae.decode(vae.encode(x)).shape == x.shape
    y, mean_again, _ = vae(x, torch.zeros_like(mean))
    assert torch.equal(mean, mean_again) and torch.allclose(y, vae.reconstruct(mean), atol=1e-5)
    assert (vae(x, torch.ones_like(mean))[0] - y).abs().max() > 1e-4            # the noise is used


def test_latents_are_standardised_and_back():
    vae = randomise(VAE(tiny(vae__fold=1).vae)).double()                       # float32 convolutions may round otherwise at another address
    channels = len(vae.latent_mean)
    vae.latent_mean.copy_(torch.linspace(-2, 3, channels)), vae.latent_std.copy_(torch.linspace(0.5, 4, channels))
    x = normal(2, 4, 16, 16).double()
    mean = vae.moments(x)[0]
    by_hand = torch.stack([(mean[:, i] - vae.latent_mean[i]) / vae.latent_std[i] for i in range(channels)], 1)
    assert torch.allclose(vae.encode(x), by_hand, atol=1e-6)
    assert torch.allclose(vae.decode(vae.encode(x)), vae.reconstruct(mean), atol=1e-5)


def test_folded_latents_are_turned_and_back():
    vae = randomise(VAE(PRESETS["tiny"].vae))
    vae.latent_mean.copy_(torch.linspace(-2, 3, 16)), vae.latent_std.fill_(2.0)
    vae.latent_axes.copy_(torch.linalg.qr(normal(16, 16)).Q)
    x = normal(2, 4, 16, 16)
    mean = vae.moments(x)[0]
    cell = torch.stack([mean[1, c, 2 + i, j] for c in range(4) for i in (0, 1) for j in (0, 1)])        # the folded cell at row 1, column 0
    assert torch.allclose(vae.encode(x)[1, :, 1, 0], vae.latent_axes @ (cell - vae.latent_mean) / 2, atol=1e-5)
    assert torch.allclose(vae.decode(vae.encode(x)), vae.reconstruct(mean), atol=1e-4)


def test_the_downsampler_pads_right_and_below_alone():
    down = model.Sampler(1, up=False)
    nn.init.zeros_(down.conv.weight), nn.init.zeros_(down.conv.bias)
    down.conv.weight.data[0, 0, 0, 0] = 1                                        # looks at the window's first pixel
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(down(x), x[:, :, ::2, ::2])


def test_the_shortcut_starts_as_principal_components():
    vae = VAE(tiny(vae__latent_channels=4).vae)
    g = torch.Generator().manual_seed(1)
    x = F.interpolate(torch.randn(32, 4, 4, 4, generator=g), size=(16, 16), mode="bilinear") + 0.3      # smooth images
    x[:, 0] = x[:, 1] = x[:, 2]
    error = lambda: ((vae.decode(vae.encode(x)) - x) ** 2).mean().item()
    random = error()
    vae.start_shortcut(x)
    assert error() < 0.5 * x.var().item() and error() < 0.5 * random
    assert vae.moments(x)[0].var((0, 2, 3)).mean().item() == pytest.approx(1, abs=0.02)                   # unit variance
    other = F.interpolate(torch.randn(32, 4, 4, 4, generator=g), size=(16, 16), mode="bilinear") + 0.3
    other[:, 0] = other[:, 1] = other[:, 2]
    assert ((vae.decode(vae.encode(other)) - other) ** 2).mean() < 0.6 * other.var()                     # other images, too


# ---- padding

PATHS = {"explicit": None, "sdpa": lambda q, k, v, mask=None: F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None])}


@pytest.mark.parametrize("temporal", ["sti", "conv3d"])
@pytest.mark.parametrize("path", PATHS)
def test_padded_frames_change_no_bit_of_real_ones(temporal, path, monkeypatch):
    if PATHS[path]:
        monkeypatch.setattr(model, "attend", PATHS[path])
    net = randomise(DFGN(tiny(dfgn__temporal=temporal).dfgn))
    a, b = clip_inputs(6), clip_inputs(6, seed=50)
    loss_mask = torch.tensor([[1.0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    mixed = dict(a)
    for name in ("z_t", "known", "cond_mask"):
        real = loss_mask.bool().view(2, 6, *[1] * (a[name].dim() - 2))
        mixed[name] = torch.where(real, a[name], 1 - b[name] if name == "cond_mask" else 100 * b[name])
    mixed["cond_mask"][1, 2:] = 1 - a["cond_mask"][1, 2:]
    with torch.no_grad():
        one, two = net(**a, loss_mask=loss_mask), net(**mixed, loss_mask=loss_mask)
    real = loss_mask.bool()
    assert torch.equal(one[real], two[real]) and one[real].std() > 0.01 and not torch.equal(one[~real], two[~real])


@pytest.mark.parametrize("temporal", ["sti", "conv3d"])
@pytest.mark.parametrize("base", ["zeros", "nearest", "loop"])
def test_padding_cannot_change_the_loss(temporal, base):
    """Nor can what a loader may have left in padded frames."""
    net = randomise(RDTF(tiny(dfgn__temporal=temporal, dfgn__base=base)))
    z0, noise, tokens, t = latents(2, 3), latents(2, 3, 1), tokenize(["a red cat", "fire"]), torch.tensor([300, 700])
    cond = torch.tensor([[1.0, 0, 0], [0, 0, 0]])
    with torch.no_grad():
        want = net(z0, tokens, t, noise, cond, torch.ones(2, 3))
        assert want.shape == (2,) and want.min() > 0.01
        for T in (4, 8):
            fill = lambda x, value: torch.cat([x, torch.full((2, T - 3, *x.shape[2:]), value)], 1)
            mask = fill(torch.ones(2, 3), 0.0)
            assert torch.allclose(net(fill(z0, 0.0), tokens, t, fill(noise, 0.5), fill(cond, 0.0), mask), want, rtol=1e-5)
            assert torch.allclose(net(fill(z0, 9.0), tokens, t, fill(noise, -5.0), fill(cond, 0.0), mask), want, rtol=1e-5)


def test_a_mark_on_a_padded_frame_is_ignored():
    """A condition mask that gives a padded frame must not hand its latents to the real ones, neither in training nor in sampling."""
    net = randomise(RDTF(tiny()))
    z0, noise, tokens, t = latents(1, 4), latents(1, 4, 1), tokenize(["a red cat"]), torch.tensor([300])
    clean, stray, mask = torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[1.0, 0, 0, 1]]), torch.tensor([[1.0, 1, 1, 0]])
    text = net.encode_text(tokens)
    with torch.no_grad():
        assert torch.equal(net(z0, tokens, t, noise, clean, mask), net(z0, tokens, t, noise, stray, mask))
        one, two = (net.eps(noise, t, *text, z0 * c[:, :, None, None, None], c, mask) for c in (clean, stray))
        assert torch.equal(one[:, :3], two[:, :3])


def test_the_loss_is_a_mean_over_real_frames():
    net = RDTF(tiny(diffusion__prediction="eps", dfgn__gate=False))              # conv_out starts at zero: the prediction is 0
    noise, mask = latents(2, 4), torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0]])
    loss = net(latents(2, 4, 1), tokenize(["a", "b"]), torch.tensor([10, 20]), noise, torch.zeros(2, 4), mask)
    by_hand = torch.stack([(noise[0] ** 2).mean(), (noise[1, :2] ** 2).mean()])
    assert torch.allclose(loss, by_hand, rtol=1e-6)


@pytest.mark.parametrize("temporal", ["sti", "conv3d"])
def test_frames_are_mixed(temporal):
    net, a = randomise(DFGN(tiny(dfgn__temporal=temporal).dfgn)), clip_inputs(4)
    b = dict(a, z_t=a["z_t"].clone())
    b["z_t"][:, 2] += 1
    with torch.no_grad():
        change = (net(**a, loss_mask=torch.ones(2, 4)) - net(**b, loss_mask=torch.ones(2, 4))).abs().amax((0, 2, 3, 4))
    assert change.min() > 1e-4


@pytest.mark.parametrize("side", [4, 1])
def test_sti_alone_mixes_all_frames(side):
    """Both branches by themselves: attention reaches every frame; two convolutions of three, two frames far."""
    sti = randomise(model.STI(8, tiny(dfgn__widths=(8,)).dfgn))
    clip = Clip(torch.ones(1, 6), None, None, None)
    x = normal(6, 8, side, side)
    y = x.clone()
    y[5] += normal(8, side, side, seed=3)
    with torch.no_grad():
        semantic = (sti.semantic(x, clip) - sti.semantic(y, clip)).abs().amax((1, 2, 3))
        detail = [sti.detail[1](sti.detail[0](v, clip), clip) for v in (x, y)]
        detail = (detail[0] - detail[1]).abs().amax((1, 2, 3))
    assert semantic.min() > 1e-5 and (detail[:3] == 0).all() and (detail[3:] > 1e-7).all()


# ---- parts

@pytest.mark.parametrize("depthwise", [True, False])
def test_temporal_convolution_is_conv3d(depthwise):
    layer = randomise(TemporalConv(8, 4, depthwise))
    x, mask = normal(10, 8, 3, 2), torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    h = F.silu(layer.norm(x)).unflatten(0, (2, 5)) * mask[:, :, None, None, None]
    want = F.conv3d(h.transpose(1, 2), layer.conv.weight, layer.conv.bias, padding=(1, 0, 0), groups=8 if depthwise else 1).transpose(1, 2)
    with torch.no_grad():
        assert torch.allclose(layer(x, Clip(mask, None, None, None)), want.flatten(0, 1), atol=1e-6)


@pytest.mark.parametrize("keys", [7, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_scaled_dot_product_attention(keys, masked):
    q, k, v = normal(3, 2, 5, 8), normal(3, 2, keys, 8, seed=1), normal(3, 2, keys, 8, seed=2)
    mask = (normal(3, keys, seed=3) > 0) if masked else None
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :].expand(3, 2, 5, keys))
    assert torch.allclose(model.attend(q, k, v, mask), want, atol=1e-5)


def test_attention_module_by_hand():
    attn = model.Attention(6, 2, 4, 5)
    x, context = normal(2, 3, 6), normal(2, 7, 5, seed=1)
    k, v = attn.to_kv(context)[..., :8], attn.to_kv(context)[..., 8:]
    heads = []
    for i in (slice(0, 4), slice(4, 8)):
        heads.append(((attn.to_q(x)[..., i] @ k[..., i].transpose(1, 2)) / 2).softmax(-1) @ v[..., i])
    assert torch.allclose(attn(x, context), attn.to_out(torch.cat(heads, -1)), atol=1e-6)


def test_fill_by_hand():
    z = torch.arange(6.0).view(1, 6, 1, 1, 1).expand(3, 6, 2, 1, 1) ** 2 + 10
    z = torch.where(torch.tensor([0, 1, 0, 0, 1, 0]).view(1, 6, 1, 1, 1) + torch.tensor([0, 1, 1]).view(3, 1, 1, 1, 1) > 0, z, torch.nan)  # not given: not read
    cond = torch.tensor([[0.0, 1, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]])
    hand = dict(zeros=[[0, 11, 0, 0, 26, 0], [0, 0, 0, 19, 0, 0]], nearest=[[11, 11, 11, 26, 26, 26], [19] * 6], blend=[[11, 11, 16, 21, 26, 26], [19] * 6],
                loop=[[16, 11, 16, 21, 26, 21], [19] * 6])
    for how, want in hand.items():
        out = model.fill(z, cond, how)
        assert torch.allclose(out[:, :, 0, 0, 0], torch.tensor(want + [[0.0] * 6])), how
        assert torch.equal(out[:, :, 0], out[:, :, 1])
    assert model.fill(z[1:2, :3], torch.tensor([[1.0, 0, 1]]), "nearest")[0, 1, 0, 0, 0] == 10             # a tie: the earlier
    padded = model.fill(z[:1], torch.tensor([[0.0, 1, 0, 0, 1, 0]]), "loop", torch.tensor([5.0]))[0, :5, 0, 0, 0]           # five real frames: 4, 0, 1
    assert torch.allclose(padded, torch.tensor([18.5, 11, 16, 21, 26]))
    with pytest.raises(ValueError, match="'ones'"):
        model.fill(z, cond, "ones")


def test_text_padding_changes_no_feature():
    text = randomise(TextEncoder(PRESETS["tiny"].text))
    short, long = tokenize(["a red cat"]), tokenize(["a red cat", "a very long caption about nothing at all, twice over"])
    with torch.no_grad():
        (alone, mask), (beside, mask_beside) = text(short), text(long)
        cut = text(short[:, :9])[0]
    n = int((short != 0).sum())
    assert alone.shape == (1, n, 16) and mask.all() and mask_beside[0].sum() == n and beside.shape[1] > n
    assert torch.allclose(alone[0], beside[0, :n], atol=1e-5) and torch.equal(alone, cut)


def test_text_padding_changes_no_prediction():
    net = randomise(RDTF(tiny()))
    z, t, ones, zeros = latents(1, 3), torch.tensor([400]), torch.ones(1, 3), torch.zeros(1, 3)
    both = net.encode_text(tokenize(["a red cat", "a very long caption about nothing at all, twice over"]))
    with torch.no_grad():
        alone = net.eps(z, t, *net.encode_text(tokenize(["a red cat"])), z * 0, zeros, ones)
        beside = net.eps(z, t, *(x[:1] for x in both), z * 0, zeros, ones)
        other = net.eps(z, t, *(x[1:] for x in both), z * 0, zeros, ones)
    assert torch.allclose(alone, beside, atol=1e-5) and (alone - other).abs().max() > 1e-3


# ---- diffusion

@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_schedule(schedule):
    a = Diffusion(DiffusionConfig(schedule=schedule, terminal=0.0)).alphas_cumprod
    assert a.dtype == torch.float64 and a.shape == (1000,) and (a[1:] < a[:-1]).all()
    betas = 1 - a[1:] / a[:-1]
    assert 1 - a[0].item() == pytest.approx(0.00085, abs=1e-12) and betas[-1].item() == pytest.approx(0.0120, abs=1e-12)
    step = torch.diff(betas if schedule == "linear" else betas.sqrt())
    assert torch.allclose(step, step[:1].expand_as(step), rtol=1e-6)


def test_the_linear_schedules_end():
    betas = np.linspace(0.00085, 0.0120, 1000)
    a = Diffusion(DiffusionConfig(schedule="linear", terminal=0.0)).alphas_cumprod
    assert a[-1].item() == pytest.approx(np.prod(1 - betas), rel=1e-9)
    end = Diffusion(DiffusionConfig(schedule="linear", terminal=1e-4)).alphas_cumprod                 # as much left as wanted
    assert end[-1].item() == pytest.approx(1e-4, rel=1e-9) and end[0].item() == pytest.approx(a[0].item(), rel=1e-12)
    ratio = (end.sqrt() - 0.01) / (a.sqrt() - a[-1].sqrt())
    assert (end[1:] < end[:-1]).all() and torch.allclose(ratio[:-1], ratio[:1].expand(999))


@pytest.mark.parametrize("bad", [dict(schedule="cosin"), dict(prediction="x0")])
def test_unknown_words_of_the_schedule_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad.values()))):
        Diffusion(DiffusionConfig(**bad))


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_noise_and_back(prediction):
    diffusion = Diffusion(DiffusionConfig(prediction=prediction))
    z0, noise, t = normal(3, 2, 4, 2, 2).double(), normal(3, 2, 4, 2, 2, seed=1).double(), torch.tensor([0, 500, 999])
    a = diffusion.alphas_cumprod[t].view(3, 1, 1, 1, 1)
    z_t = diffusion.add_noise(z0, noise, t)
    assert torch.allclose(z_t, a.sqrt() * z0 + (1 - a).sqrt() * noise, atol=1e-12)
    target = diffusion.target(z0, noise, t)
    assert torch.allclose(target, noise if prediction == "eps" else a.sqrt() * noise - (1 - a).sqrt() * z0, atol=1e-12)
    assert torch.allclose(diffusion.to_eps(target, z_t, t), noise, atol=1e-9)


@pytest.mark.parametrize("prediction, limit", [("v", 5.0), ("v", 0.0), ("eps", 5.0)])
def test_the_weight_of_low_noise_is_cut(prediction, limit):
    """For v, the squared error of z0 weighs 1 / sigma^2, but at most `limit`; that of v is sigma^2 times as much."""
    diffusion = Diffusion(DiffusionConfig(prediction=prediction, max_weight=limit))
    t = torch.tensor([0, 50, 300, 999])
    sigma2 = 1 - diffusion.alphas_cumprod[t]
    want = sigma2 * torch.minimum(1 / sigma2, torch.tensor(limit)) if prediction == "v" and limit else torch.ones(4)
    assert torch.allclose(diffusion.weight(t).double(), want.double(), rtol=1e-5) and diffusion.weight(t).dtype == torch.float32


class Oracle(nn.Module):
    """In DFGN's place: knows the noise and the clip, and gives what makes the target; checks what it is given."""

    def __init__(self, net, z0, noise, base, a, rows, spread):
        super().__init__()
        config = net.config
        r0, self.signal, self.sigma = z0 - base, a.sqrt(), (1 - a).sqrt()
        self.input = self.signal * r0 + self.sigma * noise
        self.output = noise if config.diffusion.prediction == "eps" else self.signal * noise - self.sigma * r0
        if config.dfgn.gate:
            std = spread.view(-1, 1, 1, 1, 1) * net.data_std[rows].square().sum(1).mean((2, 3)).sqrt()[:, None, :, None, None]
            scale = (a * std ** 2 + 1 - a).sqrt()
            self.input = self.input / scale
            self.output = torch.cat([r0 / std, torch.full_like(r0, -100.0)], 2)                  # gate shut: the correction is all

    def forward(self, x, t, context, known, cond_mask, loss_mask, context_mask=None):
        assert torch.allclose(x[:, :, :self.input.shape[2]], self.input, atol=1e-5) and x.shape[2] == self.output.shape[2]
        self.known = known
        return self.output


@pytest.mark.parametrize("prediction, gate", [("eps", False), ("v", False), ("v", True)])
@pytest.mark.parametrize("base", ["blend", "zeros"])
@pytest.mark.parametrize("known_fill", ["nearest", "zeros"])
def test_eps_agrees_with_the_loss(prediction, gate, base, known_fill):
    net = RDTF(tiny(dfgn__base=base, dfgn__known_fill=known_fill, diffusion__prediction=prediction, dfgn__gate=gate))
    z0, noise, t, mask = latents(2, 4), latents(2, 4, 1), torch.tensor([300, 800]), torch.ones(2, 4)
    cond = torch.tensor([[0.0, 1, 0, 1], [0, 0, 0, 0]])
    if gate:
        net.data_std.copy_(torch.linspace(0.5, 2, net.data_std.numel()).view_as(net.data_std))
    torch.nn.init.normal_(net.word_pictures), torch.nn.init.normal_(net.mean_picture)
    rows = [int(base == "blend"), 0]                                                                    # the second clip has nothing given
    picture = net.picture(tokenize(["a", "b"]))[1].expand_as(z0[1])
    a = net.diffusion.alphas_cumprod[t].float().view(2, 1, 1, 1, 1)
    x = z0[0]
    nearest, blend = (torch.stack([torch.stack([x[1], x[1], between, x[3]]), picture]) for between in (x[1], (x[1] + x[3]) / 2))
    spread = torch.ones(2) if base == "zeros" or not gate else torch.stack([net.spread(z0[:1], cond[:1])[0], torch.tensor(1.0)])
    bases = blend if base == "blend" else torch.stack([torch.zeros_like(picture), picture])
    oracle = net.dfgn = Oracle(net, z0, noise, bases, a, rows, spread)
    assert net(z0, tokenize(["a", "b"]), t, noise, cond, mask).max() < 1e-9
    given = z0 * cond[:, :, None, None, None]
    known = nearest if known_fill == "nearest" else torch.stack([given[0], picture])
    assert torch.equal(oracle.known, known)
    z_t = a.sqrt() * z0 + (1 - a).sqrt() * noise
    eps = net.eps(z_t, t, *net.encode_text(tokenize(["a", "b"])), given, cond, mask)
    assert torch.equal(oracle.known, known) and torch.allclose(eps, noise, atol=2e-5)


@pytest.mark.parametrize("gate", [True, False])
def test_the_loss_is_the_weighted_error(gate):
    """A network whose prediction is off by delta costs weight * delta^2."""
    net = RDTF(tiny(dfgn__gate=gate))
    t, z0, noise = torch.tensor([20, 800]), latents(2, 3), latents(2, 3, 1)
    net.predict = lambda *_: net.diffusion.target(z0, noise, t) + 0.5
    got = net(z0, tokenize(["a", "b"]), t, noise, torch.zeros(2, 3), torch.ones(2, 3))
    assert torch.allclose(got, 0.25 * net.diffusion.weight(t), rtol=1e-4) and got[0] < 0.2 * got[1]


def test_a_gate_starts_as_the_posterior_mean():
    """An untrained network with gate is right for Gaussian clips: eps as by dense covariances over frames and cells, given frames exact."""
    net = RDTF(tiny(dfgn__base="nearest"))
    net.data_std.copy_(torch.linspace(0.2, 3, net.data_std.numel()).view_as(net.data_std))
    t, z_t, noise, known = torch.tensor([300, 300]), latents(2, 4), latents(2, 4, 1), latents(2, 4, 2)
    cond, loss = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0]]), torch.tensor([[1.0, 1, 1, 0], [1, 1, 1, 1]])
    a = net.diffusion.alphas_cumprod[300].float()
    base = known[1, :1]
    z_t[1, 0] = (a.sqrt() * base + (1 - a).sqrt() * noise[1, :1])[0]
    with torch.no_grad():
        eps = net.eps(z_t, t, *net.encode_text(tokenize(["a", "b"])), known, cond, loss)
    assert torch.allclose(eps[1, 0], noise[1, 0], atol=1e-5)
    side = z_t.shape[-1]
    dct = torch.kron(net.cosines, net.cosines)                                                          # (h*w, h*w)
    for clip, frames, r_t in ((0, slice(0, 3), z_t[0]), (1, slice(1, 4), z_t[1] - a.sqrt() * base)):
        for c in (0, 5):
            mean, rest = (dct.T @ (s[c].flatten() ** 2)[:, None].mul(dct) for s in net.data_std[clip])
            covariance = torch.kron(torch.ones(3, 3), mean) + torch.kron(torch.eye(3) - torch.ones(3, 3) / 3, rest)
            r = r_t[frames, c].flatten()
            z0 = a.sqrt() * covariance @ torch.linalg.solve(a * covariance + (1 - a) * torch.eye(len(r)), r)
            want = ((r - a.sqrt() * z0) / (1 - a).sqrt()).view(3, side, side)
            assert torch.allclose(eps[clip, frames, c], want, atol=2e-4)


def test_autocast_leaves_the_closed_form_exact():
    net, z, cond = RDTF(tiny()), latents(1, 4), torch.tensor([[1.0, 0, 1, 0]])
    with torch.autocast("cpu", torch.bfloat16):
        base = net.bases(z, cond, torch.ones(1, 4))[1]
        mean, rest = net.spectrum(z, torch.ones(1, 4))
        estimate = net.linear_estimate(z, torch.tensor(1.0), torch.tensor(0.0), torch.ones(1, 2, 16, 4, 4), torch.ones(1, 4))
    assert base.dtype == mean.dtype == rest.dtype == torch.float32 and torch.equal(base[:, ::2], z[:, ::2])
    assert torch.allclose(estimate, z, atol=1e-5)                                                      # there and back, with no noise


def test_spread_tells_still_clips_from_lively_ones():
    net, g = RDTF(tiny()), torch.Generator().manual_seed(0)
    net.data_std[0, 1] = 0.5                                                                           # frames lie 0.5 from their mean
    z = 3 + 0.5 * torch.randn(5, 4, 16, 4, 4, generator=g)
    z[1] = z[1, :1]                                                                                    # nothing moves
    z[2] = 3 + 2 * (z[2] - 3)
    cond = torch.tensor([[1.0, 1, 0, 1]] * 3 + [[0, 0, 1, 0], [0, 0, 0, 0]])
    usual, still, lively, one, none = net.spread(z, cond).tolist()
    assert usual == pytest.approx(1, abs=0.05) and lively == pytest.approx((8.3 / 2.3) ** 0.5, rel=0.05)    # 0.3 frames of the usual variance
    assert still == pytest.approx((0.3 / 2.3) ** 0.5, rel=1e-5) and one == none == 1
    hidden = z.masked_fill(cond[:, :, None, None, None] == 0, torch.nan)                               # frames that are not given
    assert torch.equal(net.spread(hidden, cond), net.spread(z, cond))
    assert net.spread(1e3 * z[2:3], cond[2:3]).item() == 4


def test_words_are_counted_alone_and_in_pairs():
    one, other, order, empty = (count_words(tokenize([text]), 2048, hashes=1)[0] for text in ("red heart", "blue heart", "heart red", ""))
    assert one.sum() == 3 and other.sum() == 3 and empty.sum() == 0                                    # two words and their pair
    assert (one * other).sum() == 1 and (one * order).sum() == 2                                       # heart alone; both words, another pair
    assert torch.equal(count_words(tokenize(["red heart"])[:, :5], 2048, hashes=1)[0], one)            # padding does not count
    assert count_words(tokenize(["red red red"]), 2048, hashes=1).max() == 3
    many = count_words(torch.cat([torch.full((2000, 1), 49406), torch.arange(1, 2001)[:, None]], 1), 256)
    assert (many.sum(1) == 3).all() and len(many.unique(dim=0)) > 1990                                 # 2,000 words in 256 buckets, told apart
    assert many.sum(0).std() < 1.3 * many.sum(0).mean() ** 0.5                                         # spread as by chance


def test_pictures_are_learned_from_words():
    net = RDTF(tiny(text__buckets=512))
    z = latents(5, 1)[:, 0]
    z[4] = z[3] + 1                                                                                    # twins of one caption, one weighs more
    texts = ["red heart", "blue heart", "crying cat", "angry face", "angry face"]
    tokens = torch.stack([tokenize([t, t]) for t in texts])
    halves = torch.tensor([0.5, 0.5])
    net.fit_pictures(z, tokens, torch.tensor([1.0, 1, 1, 0.75, 0.25]), halves, ridge=1e-4)
    with torch.no_grad():
        got, none = net.picture(tokenize(texts)), net.picture(tokenize([""]))[0]
    assert torch.allclose(none, (z[:3].sum(0) + 0.75 * z[3] + 0.25 * z[4]) / 4, atol=1e-5)             # no words: the mean of all
    assert torch.allclose(got[:3], z[:3], atol=0.01) and torch.allclose(got[3], z[3] + 0.25, atol=0.01)
    net.fit_pictures(z, torch.stack([tokenize([t, "a dog"]) for t in texts]), torch.ones(5), torch.tensor([1.0, 1e-6]), ridge=1e-4)
    assert torch.allclose(net.picture(tokenize(texts[:3])), z[:3], atol=0.01)                          # next to no share counts for next to nothing
    net.fit_pictures(z, tokens, torch.ones(5), halves, ridge=1e4)
    assert torch.allclose(net.picture(tokenize(texts)), z.mean(0).expand(5, -1, -1, -1), atol=1e-2)


def test_the_data_is_measured_by_frames_and_cosines():
    net = RDTF(tiny(dfgn__base="nearest"))
    g = torch.Generator().manual_seed(0)
    z0 = torch.randn(4000, 1, 16, 1, 1, generator=g) * 2 + torch.randn(4000, 3, 16, 4, 4, generator=g) * 0.5     # flat and still, and all else
    cond = torch.tensor([[1.0, 0, 0], [0, 0, 0]]).repeat(2000, 1)
    net.measure(z0, cond, torch.ones(4000, 3))
    mean = net.data_std[0, 0].mean(0)
    assert mean[0, 0].item() == pytest.approx((16 * 4 + 0.25 / 3) ** 0.5, rel=0.03)                      # 4 x 4 equal cells: four times the value
    assert torch.allclose(mean.flatten()[1:], torch.tensor(0.5 / 3 ** 0.5), rtol=0.03)
    assert torch.allclose(net.data_std[0, 1], torch.tensor(0.5), rtol=0.06)
    assert torch.allclose(net.data_std[1, 0].mean(0), torch.tensor((0.25 + 0.25 / 2) ** 0.5), rtol=0.03)  # two unknown frames less the first
    assert torch.allclose(net.data_std[1, 1], torch.tensor(0.5), rtol=0.1)
    picture = torch.full((4000, 16, 4, 4), 1.5)
    net.measure(z0 + picture[:, None], cond, torch.ones(4000, 3), picture)                             # a picture is taken off where nothing is given
    assert torch.allclose(net.data_std[0, 0].mean(0), mean, rtol=1e-4)
    lively = torch.cat([z0[:2000, :1], z0[:2000, :1] + 3 * (z0[:2000, 1:] - z0[:2000, :1])], 1)       # and two given frames set the unit
    net.measure(lively, torch.tensor([[1.0, 1, 0]]).repeat(2000, 1), torch.ones(2000, 3))
    unit = net.spread(lively, torch.tensor([[1.0, 1, 0]]).repeat(2000, 1))[:, None, None, None]
    by_hand = (torch.einsum("ui,vj,bcij->bcuv", net.cosines, net.cosines, lively[:, 2] - lively[:, 1]) / unit).square().mean(0).sqrt()
    assert torch.allclose(net.data_std[1, 0], by_hand, rtol=1e-3)
    net.measure(z0[:100, :1] * torch.tensor([0.0, 1.0]).repeat(8)[:, None, None], torch.zeros(100, 1), torch.ones(100, 1))      # stills; dead channels
    assert torch.equal(net.data_std[1], net.data_std[0]) and (net.data_std[0, :, ::2] == 1e-3).all() and (net.data_std[0, 0, 1::2] > 0.1).all()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mixed_noise_has_unit_variance_and_the_named_correlation(share):
    diffusion = Diffusion(DiffusionConfig(shared_noise=share))
    x = diffusion.mix_noise(normal(4000, 3, 5, 2, 2), normal(4000, 1, 5, 2, 2, seed=1))
    frames = x.transpose(0, 1).flatten(1)                                        # (T, samples)
    assert frames.var(1) == pytest.approx(torch.ones(3), abs=0.03)
    assert torch.corrcoef(frames)[0, 1:] == pytest.approx(torch.full((2,), share), abs=0.02)


# ---- nothing dead

@pytest.mark.parametrize("temporal", ["sti", "conv3d"])
def test_gradient_reaches_every_parameter(temporal):
    """The last convolution starts at zero, then the branches, then what is behind them: three steps wake the last one."""
    torch.manual_seed(0)
    net = RDTF(tiny(dfgn__temporal=temporal, vae__size=64))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    cond = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0]])
    for step in range(4):
        optimizer.zero_grad()
        net(latents(2, 4, side=8), tokenize(["a red cat", "two dogs"]), torch.tensor([100, 800]), latents(2, 4, step, 8), cond, torch.ones(2, 4)).sum().backward()
        optimizer.step()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


@pytest.mark.parametrize("shortcut", [True, False])
def test_gradient_reaches_every_parameter_of_the_vae(shortcut):
    torch.manual_seed(0)
    vae = VAE(tiny(vae__shortcut=shortcut).vae)
    optimizer, x = torch.optim.AdamW(vae.parameters(), lr=1e-3), normal(2, 4, 16, 16)
    for step in range(2):
        optimizer.zero_grad()
        y, mean, logvar = vae(x, normal(2, vae.config.latent_channels, 4, 4))
        ((y - x) ** 2 + (mean ** 2 + logvar.exp() - logvar).mean()).mean().backward()
        optimizer.step()
    dead = [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert [name for name in dead if not name.endswith("to_k.bias")] == []       # a softmax does not feel the bias of its keys


def test_the_start_predicts_nothing_and_does_not_depend_on_frames():
    net = DFGN(PRESETS["tiny"].dfgn)
    assert not net(**clip_inputs(4), loss_mask=torch.ones(2, 4)).any()
    assert all(not p.any() for m in net.modules() if isinstance(m, model.TemporalTransformer) for p in m.proj_out.parameters())


def test_the_net_takes_odd_sizes_of_clips_and_batches():
    net = copy.deepcopy(randomise(DFGN(PRESETS["tiny"].dfgn)))
    for T in (1, 3, 8):
        assert net(**clip_inputs(T, B=1), loss_mask=torch.ones(1, T)).shape == (1, T, net.conv_out.out_channels // net.config.patch ** 2, 4, 4)


# ---- memory

def kept_bytes(net, batch):
    """Bytes that autograd keeps for the backward pass beside parameters and inputs, and the gradients that it gives."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()} | {x.untyped_storage().data_ptr() for x in batch.values()}
    kept = {}
    pack = lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) and x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = net(**batch).square().mean()
    total = sum(n for storage, n in kept.items() if storage not in own)
    return total, torch.autograd.grad(loss, [p for p in net.parameters()])


@pytest.fixture
def tiny_net_and_batch():
    torch.manual_seed(0)
    c = PRESETS["tiny"].dfgn
    net = DFGN(c).double()
    for p in net.parameters():                    # projections that start at zero would hide most of the gradients
        torch.nn.init.normal_(p, std=0.1)
    z = torch.randn(2, 4, c.channels * (1 + c.gate), 8, 8, dtype=torch.float64)
    loss_mask = torch.ones(2, 4, dtype=torch.float64)
    loss_mask[1, 3] = 0
    return net, dict(z_t=z, t=torch.tensor([3, 700]), context=torch.randn(2, 5, c.text_width, dtype=torch.float64),
                     known=torch.randn_like(z[:, :, :c.channels]), cond_mask=loss_mask * torch.tensor([1., 0, 0, 0]), loss_mask=loss_mask)


def test_gradient_checkpointing_gives_the_same_gradients_for_less_memory(tiny_net_and_batch, monkeypatch):
    net, batch = tiny_net_and_batch
    plain, wanted = kept_bytes(net, batch)
    assert all(g.abs().max() > 0 for g in wanted)
    net.checkpointing = True
    few, gradients = kept_bytes(net, batch)
    assert few < 0.4 * plain
    monkeypatch.setattr("model.LEAN", 1)
    net.checkpointing = False
    lean, lean_gradients = kept_bytes(net, batch)
    assert few < lean < 0.8 * plain
    net.checkpointing = True
    _, both_gradients = kept_bytes(net, batch)
    for a, b, c, d in zip(wanted, gradients, lean_gradients, both_gradients):
        for other in (b, c, d):
            torch.testing.assert_close(other, a, rtol=1e-10, atol=1e-12)


def test_what_lean_ends_with_is_not_worked_out_again(monkeypatch):
    monkeypatch.setattr("model.LEAN", 1)
    calls, last = [], torch.nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)
    y = lean(lambda x: last(calls.append(1) or F.silu(x)), x)
    with FlopCounterMode(display=False) as flops:
        y.sum().backward()
    assert len(calls) == 2 and flops.get_total_flops() == 2 * 2 * 4 * 8 * 8   # the gradients of the input and of the weight alone


@pytest.mark.parametrize("rows", [4, 300])
def test_wide_linear_layers_and_small_images_take_a_faster_way_to_the_same_result(rows):
    torch.manual_seed(0)
    linear, conv = Linear(256, 48).double(), Conv(rows, 24, stride=2).double()
    x, image = torch.randn(2, rows, 256, dtype=torch.float64, requires_grad=True), torch.randn(2, rows, 7, 6, dtype=torch.float64, requires_grad=True)
    for layer, x, plain in ((linear, x, F.linear(x, linear.weight, linear.bias)), (conv, image, F.conv2d(image, conv.weight, conv.bias, 2, 1))):
        wanted = torch.autograd.grad(plain.sin().sum(), [x, *layer.parameters()])
        y = layer(x)
        torch.testing.assert_close(y, plain)
        for got, want in zip(torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()]), wanted):
            torch.testing.assert_close(got, want)
