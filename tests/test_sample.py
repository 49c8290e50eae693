"""sample.py: DDIM in closed form, guidance by its definition, given frames untouched, files that other programs open."""
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import sample
import train
from data import UserError, read_animation, tokenize
from model import Diffusion, DiffusionConfig
from sample import Sampler, branches, ddim, ddim_step, guided_eps, keep_given, place_frames, timesteps

SCRIPT = Path(sample.__file__)


@pytest.fixture(scope="module")
def sampler(tiny_dfgn):
    """The trained tiny net with noise on its weights: after 7 steps from zero it would hardly look at its input."""
    s = Sampler(tiny_dfgn / "model.safetensors", device="cpu")
    g = torch.Generator().manual_seed(0)
    for p in s.net.parameters():
        p += torch.randn(p.shape, generator=g) * 0.1
    return s


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    """A 20 x 12 picture with all kinds of alpha."""
    path = tmp_path_factory.mktemp("still") / "red face.png"
    rgba = np.random.default_rng(0).integers(0, 256, (12, 20, 4), np.uint8)
    Image.fromarray(rgba).save(path)
    return path


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    """Five frames of a square that moves."""
    path = tmp_path_factory.mktemp("moving") / "moving.png"
    frames = np.zeros((5, 16, 16, 4), np.uint8)
    for i in range(5):
        frames[i, 4:10, 2 * i:2 * i + 6] = (200, 30 * i, 60, 255)
    data.write_animation(path, frames, 100)
    return path, frames


@pytest.fixture
def run(tiny_dfgn, tmp_path, monkeypatch):
    """sample.main in an empty folder -> the files that are in it afterwards, by name."""
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        sample.main(["--model", str(tiny_dfgn / "model.safetensors"), "--steps", "2", *map(str, argv)])
        return sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    return call


def clip_of(frames, T=8, given=(0,)):
    """frames (T, 16, 16, 4) and cond_mask (T,) for Sampler.sample."""
    mask = np.zeros(T, np.float32)
    mask[list(given)] = 1
    return np.resize(frames, (T, 16, 16, 4)), mask


# ---- DDIM

class GaussianNet:
    """In RDTF's place: data is N(0, s^2), so that eps is known exactly."""

    def __init__(self, s, beta_start=0.0001):
        config = DiffusionConfig(beta_start=beta_start)                  # a finer end: less is lost to the 1000 steps' length
        self.diffusion, self.s, self.config = Diffusion(config), s, SimpleNamespace(diffusion=config)

    def encode_text(self, tokens):
        return torch.zeros(len(tokens), 1, 1), None

    def eps(self, z_t, t, *_):
        a = self.diffusion.alphas_cumprod[t][:, None, None, None, None].float()
        return (1 - a).sqrt() * z_t / (a * self.s ** 2 + 1 - a)


def test_quadratic_steps_keep_fine_detail():
    """A channel of deviation 0.2 keeps most of its variance in 25 steps; evenly spaced, it loses more than half."""
    def variance(spacing):
        rngs = [np.random.default_rng((7, k)) for k in range(2)]
        net = GaussianNet(0.2, beta_start=0.00085)
        return ddim(net, tokenize([""] * 2), torch.zeros(2, 8, 4, 32, 32), torch.zeros(2, 8), rngs, 25, 0.0, 1.0, 1.0, spacing).var().item() / 0.04
    assert 0.35 < variance("uniform") < 0.5 and 0.75 < variance("quadratic") < 0.9


@pytest.mark.parametrize("s, eta", [(0.5, 0.0), (0.7, 1.0), (1.5, 1.0)])
def test_ddim_returns_the_variance_of_gaussian_data(s, eta):
    rngs = [np.random.default_rng((7, k)) for k in range(2)]
    z = ddim(GaussianNet(s), tokenize([""] * 2), torch.zeros(2, 8, 4, 32, 32), torch.zeros(2, 8), rngs, steps=1000, eta=eta, text_scale=1.0, image_scale=1.0)
    assert z.var().item() == pytest.approx(s ** 2, rel=0.02) and abs(z.mean().item()) < 0.02 * s


def test_one_step_by_hand():
    diffusion = Diffusion(DiffusionConfig())
    a, a_next = diffusion.alphas_cumprod[700].item(), diffusion.alphas_cumprod[600].item()
    z0, eps = torch.full((1,), 0.3), torch.full((1,), -1.2)
    z_t = a ** 0.5 * z0 + (1 - a) ** 0.5 * eps
    assert ddim_step(diffusion, z_t, eps, 700, 600, 0.0, 0.0).item() == pytest.approx(a_next ** 0.5 * 0.3 + (1 - a_next) ** 0.5 * -1.2, abs=1e-5)
    assert ddim_step(diffusion, z_t, eps, 700, -1, 1.0, torch.ones(1)).item() == pytest.approx(0.3, abs=1e-5)          # the end: no noise
    beta, a, before = 1 - (diffusion.alphas_cumprod[500] / diffusion.alphas_cumprod[499]).item(), diffusion.alphas_cumprod[500].item(), diffusion.alphas_cumprod[499].item()
    quiet, loud = (ddim_step(diffusion, z_t, eps, 500, 499, 1.0, torch.full((1,), n)).item() for n in (0.0, 1.0))
    assert (loud - quiet) ** 2 == pytest.approx((1 - before) / (1 - a) * beta, rel=1e-3)                                # DDPM's posterior variance


def test_timesteps():
    assert timesteps(1000, 1000).tolist() == list(range(999, -1, -1)) and timesteps(1000, 1).tolist() == [999]
    for steps in (2, 25, 50, 333):
        t = timesteps(1000, steps)
        assert len(t) == steps and t[0] == 999 and t[-1] >= 0 and (np.diff(t) < 0).all() and np.ptp(np.diff(t)) <= 1
    quadratic = timesteps(1000, 25, "quadratic")
    assert len(quadratic) == 25 and quadratic[0] == 999 and quadratic[12] == round(1000 * (13 / 25) ** 2) - 1
    for steps in (25, 500, 1000):
        t = timesteps(1000, steps, "quadratic")
        assert (np.diff(t) < 0).all() and t[0] == 999 and t[-1] <= 1 and np.median(t) < 400 + 100 * (steps == 1000)
    for steps in (0, 1001, -3):
        with pytest.raises(UserError, match=f"--steps {steps}"):
            timesteps(1000, steps)


def test_sample_k_is_the_same_at_any_batch_size(sampler, moving):
    frames, mask = clip_of(moving[1], given=(0, 3))
    prompts, seeds = ["red heart", "a long caption about a dog that runs and runs", "fire", "cat"], [(3, k) for k in range(4)]
    for given in ({}, dict(frames=np.stack([frames] * 4), cond_mask=np.stack([mask] * 4))):
        options = dict(steps=4, eta=1.0, text_scale=3.0, image_scale=2.0)
        together = sampler.sample(prompts, seeds, **given, **options)
        alone = np.concatenate([sampler.sample(prompts[k:k + 1], seeds[k:k + 1], **{name: v[k:k + 1] for name, v in given.items()}, **options) for k in range(4)])
        assert together.shape == (4, 8, 16, 16, 4) and together.dtype == np.uint8
        opaque = np.minimum(together[..., 3:], alone[..., 3:]) >= 64   # straight colour under little alpha magnifies any rounding
        assert (np.abs(together.astype(int) - alone) * (opaque | (np.arange(4) == 3))).max() <= 1
        assert not np.array_equal(together[0], together[2])


def test_latents_are_the_same_at_any_batch_size(sampler):
    side, c = sampler.config.vae.side, sampler.config.dfgn.channels
    tokens = tokenize(["red heart", "a long caption about a dog that runs and runs", "fire", ""])

    def latents(ks):
        with torch.no_grad():
            return ddim(sampler.net, tokens[ks], torch.zeros(len(ks), 8, c, side, side), torch.zeros(len(ks), 8), [np.random.default_rng((0, k)) for k in ks],
                        steps=5, eta=1.0, text_scale=3.0, image_scale=1.0)
    together = latents([0, 1, 2, 3])
    for k in range(4):
        assert torch.allclose(latents([k])[0], together[k], atol=1e-4 * together.abs().max().item())
    assert torch.equal(latents([2]), latents([2])) and (together[0] - together[2]).abs().max() > 0.1


def test_seed_prompt_and_given_frames_matter(sampler, moving):
    frames, mask = clip_of(moving[1])
    make = lambda prompt="fire", seed=(0, 0), **more: sampler.sample([prompt], [seed], steps=3, eta=0.0, text_scale=4.0, **more)
    base = make()
    assert np.array_equal(base, make()) and not np.array_equal(base, make(seed=(0, 1))) and not np.array_equal(base, make(seed=(1, 0)))
    assert not np.array_equal(base, make("ice")) and not np.array_equal(base[:, 1:], make(frames=frames[None], cond_mask=mask[None])[:, 1:])


# ---- guidance

@pytest.fixture(scope="module")
def guidance_inputs(sampler):
    g = torch.Generator().manual_seed(3)
    side, c = sampler.config.vae.side, sampler.config.dfgn.channels
    z, known = torch.randn(2, 8, c, side, side, generator=g), torch.randn(2, 8, c, side, side, generator=g)
    mask = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0, 0, 0]])
    with torch.no_grad():
        both = sampler.net.encode_text(tokenize(["red heart", "a dog", "", ""]))
    return z, torch.tensor([800, 800]), tuple(x[:2] for x in both), tuple(x[2:] for x in both), known * mask[:, :, None, None, None], mask


@pytest.mark.parametrize("text_scale, image_scale", [(7.5, 7.5), (3.0, 1.0), (2.0, 5.0), (1.0, 1.0), (0.0, 1.0), (4.0, 0.0)])
def test_guidance_is_the_three_term_formula(sampler, guidance_inputs, text_scale, image_scale):
    z, t, text, empty, known, mask = guidance_inputs
    real = torch.ones_like(mask)
    with torch.no_grad():
        e00 = sampler.net.eps(z, t, *empty, known * 0, mask * 0, real)
        e0i = sampler.net.eps(z, t, *empty, known, mask, real)
        eci = sampler.net.eps(z, t, *text, known, mask, real)
        want = e00 + image_scale * (e0i - e00) + text_scale * (eci - e0i)
        got = guided_eps(sampler.net, z, t, text, empty, known, mask, branches(text_scale, image_scale, True, True))
    assert torch.allclose(got, want, atol=1e-4 * want.abs().max().item())
    assert (e00 - e0i).abs().max() > 1e-2 and (e0i - eci).abs().max() > 1e-2


def test_branches_that_fall_away():
    count = lambda *a: len(branches(*a))
    assert count(7.5, 3.0, True, True) == 3
    assert count(7.5, 1.0, True, True) == 2 and count(3.0, 3.0, True, True) == 2 and count(0.0, 3.0, True, True) == 2
    assert count(7.5, 3.0, False, True) == 2 and count(7.5, 3.0, True, False) == 2
    assert count(1.0, 1.0, True, True) == 1 and count(7.5, 3.0, False, False) == 1 and count(1.0, 3.0, True, False) == 1


@pytest.mark.parametrize("any_text, any_image", [(True, True), (True, False), (False, True), (False, False)])
def test_absent_conditions_fold_together(any_text, any_image):
    e = {(False, False): 0.3, (False, True): -1.1, (True, False): 0.7, (True, True): 2.0}
    value = lambda text, image: e[bool(text and any_text), bool(image and any_image)]
    got = sum(w * e[text, image] for text, image, w in branches(6.0, 2.5, any_text, any_image))
    assert got == pytest.approx(value(0, 0) + 2.5 * (value(0, 1) - value(0, 0)) + 6.0 * (value(1, 1) - value(0, 1)))


# ---- given frames

def test_given_frames_come_back_to_the_last_bit(sampler, still, moving):
    noisy = np.random.default_rng(1).integers(0, 256, (8, 16, 16, 4), np.uint8)
    for frames, given in ((noisy, (0,)), (noisy, (1, 4, 7)), (np.resize(moving[1], (8, 16, 16, 4)), (0, 1, 2, 3, 4))):
        frames, mask = clip_of(frames, given=given)
        for detail in (True, False):
            out = sampler.sample(["x", "y"], [(0, 0), (0, 1)], np.stack([frames] * 2), np.stack([mask] * 2), steps=2, detail=detail)
            assert (out[:, list(given)] == frames[list(given)]).all()


def test_frames_that_are_not_given_are_not_looked_at(sampler, moving):
    frames, mask = clip_of(moving[1], given=(2,))
    other = frames.copy()
    other[mask == 0] = 255 - other[mask == 0]
    a, b = (sampler.sample(["x"], [(0, 0)], f[None], mask[None], steps=2) for f in (frames, other))
    assert np.array_equal(a, b)


def test_what_did_not_change_takes_the_given_frames_pixels():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 4, 12, 12, generator=g) * 2 - 1
    blurred = x + 0.05 * torch.randn(x.shape, generator=g)
    mask = torch.tensor([[0.0, 1, 0], [0, 0, 0]])
    y = blurred[:, 1:2].repeat(1, 3, 1, 1, 1)                         # nothing moves but the right half of frame 2
    y[:, 2, :, :, 6:] += 1.5
    out = keep_given(y, x, blurred, mask)
    assert torch.allclose(out[0, 0], x[0, 1], atol=1e-6) and torch.allclose(out[0, 2, :, :, :5], x[0, 1, :, :, :5], atol=1e-6)
    assert torch.allclose(out[0, 2, :, :, 7:], y[0, 2, :, :, 7:], atol=1e-6)
    assert torch.equal(out[1], y[1]) and torch.equal(keep_given(y, x, blurred, mask, detail=False), y)                 # none given; switched off


def frame_numbers(n, T, task):
    """Which of n frames lie where: {place: frame}."""
    frames = np.zeros((n, 2, 2, 4), np.uint8) + np.arange(1, n + 1, dtype=np.uint8)[:, None, None, None]
    out, mask = place_frames(frames, task, T)
    assert out.shape == (T, 2, 2, 4) and mask.shape == (T,) and mask.dtype == np.float32
    assert not out[mask == 0].any() and set(mask.tolist()) <= {0, 1}
    return {int(i): int(out[i, 0, 0, 0]) - 1 for i in np.flatnonzero(mask)}


def test_places_of_given_frames():
    assert frame_numbers(2, 8, "interpolation") == {0: 0, 3: 1} and frame_numbers(3, 8, "interpolation") == {0: 0, 3: 1, 6: 2}
    assert frame_numbers(4, 8, "interpolation") == {0: 0, 2: 1, 4: 2, 6: 3} and frame_numbers(8, 8, "interpolation") == {0: 0, 2: 2, 4: 4, 6: 6}
    assert frame_numbers(1, 8, "prediction_forward") == {0: 0} and frame_numbers(5, 8, "prediction_forward") == {i: i for i in range(5)}
    assert frame_numbers(8, 8, "prediction_forward") == {i: i + 3 for i in range(5)}
    assert frame_numbers(1, 8, "prediction_backward") == {7: 0} and frame_numbers(6, 8, "prediction_backward") == {i + 2: i for i in range(6)}
    assert frame_numbers(20, 8, "prediction_backward") == {i + 2: i for i in range(6)}
    assert frame_numbers(1, 8, "it2v") == frame_numbers(5, 8, "it2v") == frame_numbers(5, 8, "i2v") == {0: 0}
    for T in (4, 8, 16):
        for n in (2, 3, 9, 30):
            for task in ("interpolation", "prediction_forward", "prediction_backward"):
                assert 1 <= len(frame_numbers(n, T, task)) < T        # one to see, one to draw
    with pytest.raises(UserError, match="--frames.*two"):
        frame_numbers(1, 8, "interpolation")


# ---- the command

def test_a_prompt_becomes_a_file_of_its_name(run, capsys):
    assert run("--prompt", "Clapping  hands!") == ["clapping-hands.webp"] and "clapping-hands.webp" in capsys.readouterr().out
    frames, durations = read_animation("clapping-hands.webp")
    assert frames.shape == (8, 16, 16, 4) and durations == [125] * 8 and len({f.tobytes() for f in frames}) > 1


def test_prompts_numbers_and_a_sheet(run):
    files = run("--prompt", "fire", "red heart", "--num", 4, "--batch", 3, "--sheet", "sheets/all.png")
    assert files == sorted([f"{name}-{i}.webp" for name in ("fire", "red-heart") for i in range(1, 5)] + ["sheets/all.png"])
    assert len({Path(f).read_bytes() for f in files}) == 9
    with Image.open("sheets/all.png") as image:
        assert image.format == "PNG" and image.width > 8 * 32 and image.height > 8 * 32


def test_the_same_sticker_twice_and_at_another_batch_size(run):
    run("--prompt", "fire", "--num", 3, "--out", "a.png")
    run("--prompt", "fire", "--num", 3, "--out", "b.png", "--batch", 1)
    run("--prompt", "fire", "--num", 3, "--out", "c.png", "--seed", 1)
    read = lambda name: read_animation(name)[0].astype(int)
    for i in (1, 2, 3):
        a, b = read(f"a-{i}.png"), read(f"b-{i}.png")
        assert np.abs(a[..., 3] - b[..., 3]).max() <= 1 and not np.array_equal(a, read(f"c-{i}.png"))


def test_prompts_whose_names_collide_overwrite_nothing(run):
    assert len(run("--prompt", "fire", "fire", "Fire!", "fire 1")) == 4


def test_a_folder_to_write_to(run):
    assert run("--prompt", "fire", "ice", "--out", "made/here") == ["made/here/fire.webp", "made/here/ice.webp"]


def test_a_very_long_prompt(run):
    name, = run("--prompt", "a cat that " + "runs and jumps and " * 60)
    assert len(name) <= 70 and len(read_animation(name)[0]) == 8


@pytest.mark.parametrize("suffix", [".webp", ".gif", ".png", ".apng"])
def test_outputs_reopen_with_their_alpha(run, suffix, moving):
    path, frames = moving
    run("--frames", path, "--task", "prediction_forward", "--out", f"deep/out{suffix}", "--duration", 80)
    out, durations = read_animation(f"deep/out{suffix}")
    assert out.shape == (8, 16, 16, 4) and sum(durations) == 640 and {0, 255} <= set(out[:5, ..., 3].ravel().tolist())
    if suffix != ".gif":
        assert np.array_equal(out[:5], frames)
    else:
        assert np.array_equal(out[:5, ..., 3], frames[..., 3]) and np.abs(out[:5].astype(int) - frames)[frames[..., 3] > 0].max() <= 8


def test_tasks_are_chosen_by_what_is_given(run, still, moving, capsys):
    said = {}
    for name, argv in {"it2v": ["--prompt", "x", "--image", still], "i2v": ["--image", still], "interpolation": ["--frames", moving[0]], "t2v": ["--prompt", "x"],
                       "prediction_backward": ["--prompt", "x", "--frames", moving[0], "--task", "prediction_backward"]}.items():
        run(*argv, "--out", f"{name}.png")
        said[name] = capsys.readouterr().err
        assert f"{name}, 1 stickers" in said[name]
    first = data.square(read_animation(still)[0], 16)[0]
    assert (read_animation("it2v.png")[0][0] == first).all() and (read_animation("i2v.png")[0][0] == first).all()
    back = read_animation("prediction_backward.png")[0]
    assert np.array_equal(back[-5:], moving[1])


def test_default_name_without_a_prompt(run, still):
    assert run("--image", still) == ["red face-sticker.webp"]


def test_i2v_does_not_see_the_text(run, still):
    run("--prompt", "fire", "--image", still, "--task", "i2v", "--out", "a.png")
    run("--image", still, "--task", "i2v", "--out", "b.png")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


@pytest.mark.parametrize("platform, kind, side, most, seconds", [("whatsapp", "WEBP", 512, 450_000, 10), ("signal", "PNG", 512, 300_000, 3), ("discord", "PNG", 320, 512_000, 60)])
def test_platforms(run, capsys, platform, kind, side, most, seconds, moving):
    name, = run("--prompt", "fire", "--frames", moving[0], "--task", "prediction_forward", "--for", platform, "--duration", 2000)
    assert Path(name).stat().st_size <= most and platform in capsys.readouterr().out
    with Image.open(name) as image:
        assert image.format == kind and image.size == (side, side) and image.is_animated and image.mode == "RGBA"
    frames, durations = read_animation(name)
    assert sum(durations) <= 1000 * seconds and sum(durations) >= 1000 * min(seconds, 16) - 100


def test_quality_falls_until_it_fits(monkeypatch):
    clip = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 4), np.uint8)
    for platform, suffix in (("whatsapp", ".webp"), ("signal", ".png")):
        sizes = []
        for limit in (10 ** 9, 0.6):
            monkeypatch.setitem(sample.PLATFORMS, platform, (suffix, 64, limit if limit > 1 else int(sizes[0] * limit), 3))
            content, said = sample.encode_for(clip, 100, platform)
            sizes.append(len(content))
            assert read_animation(content)[0].shape == (3, 64, 64, 4)
        assert sizes[1] <= 0.6 * sizes[0]
        monkeypatch.setitem(sample.PLATFORMS, platform, (suffix, 64, 100, 3))
        with pytest.raises(UserError, match=f"--for {platform}"):
            sample.encode_for(clip, 100, platform)


def test_transparency_survives_the_platforms(monkeypatch):
    clip = np.zeros((3, 16, 16, 4), np.uint8)
    clip[0, 4:12, 4:12] = clip[1, 4:12, 5:13] = clip[2, 4:12, 6:14] = (255, 0, 0, 255)
    for platform in sample.PLATFORMS:
        suffix = sample.PLATFORMS[platform][0]
        monkeypatch.setitem(sample.PLATFORMS, platform, (suffix, 64, 10 ** 6, 3))
        frames, _ = read_animation(sample.encode_for(clip, 100, platform)[0])
        assert not frames[:, :8, :8, 3].any() and frames[:, 30:34, 30:34, 3].min() > 250 and frames[:, 30:34, 30:34, 0].min() > 240


def test_a_vae_of_opaque_images_gives_opaque_stickers(tmp_path, stickers16, moving):
    """The paper's preset has three image channels."""
    from model import RDTF, VAE
    config = train.resolve_config("tiny", ["vae.image_channels=3"])
    train.save_model(tmp_path / "vae.safetensors", VAE(config.vae).state_dict(), kind="vae", config=config.to_dict(), step=0)
    train.save_model(tmp_path / "dfgn.safetensors", RDTF(config).state_dict(), kind="dfgn", config=config.to_dict(), step=0,
                     vae=train.file_hash(tmp_path / "vae.safetensors"), vae_file=str(tmp_path / "vae.safetensors"))
    s = Sampler(tmp_path / "dfgn.safetensors")
    frames, mask = clip_of(moving[1])
    for given in ({}, dict(frames=frames[None], cond_mask=mask[None])):
        out = s.sample(["x"], [(0, 0)], steps=2, **given)
        assert out.shape == (1, 8, 16, 16, 4) and (out[:, 1:, ..., 3] == 255).all()
    assert np.array_equal(out[0, 0], frames[0])


# ---- a frozen text tower

def test_a_tower_reads_the_prompts(tower_dfgn, tiny_dfgn, clip_folder, tmp_path, run, no_network):
    s = Sampler(tower_dfgn / "model.safetensors", device="cpu")
    made = lambda s, *prompts: s.sample(prompts, [(0, 0)] * len(prompts), steps=2)
    red, dog, red_again = made(s, "red heart", "a dog", "red heart")
    assert np.array_equal(red, red_again) and not np.array_equal(red, dog)
    moved = Path(shutil.copytree(clip_folder, tmp_path / "moved"))
    assert np.array_equal(made(Sampler(tower_dfgn / "model.safetensors", device="cpu", clip_weights=moved), "red heart", "a dog", "red heart"), [red, dog, red])

    context, _, picture = s.net.encode_text(s.tower(tokenize(["red heart", ""])))
    assert context.shape == (2, 77, 32) and picture is None                    # what training reads from its cache
    asked = []
    s.net.encode_text = lambda features: asked.append(features) or type(s.net).encode_text(s.net, features)
    made(s, "red heart")
    assert torch.allclose(asked[0], context, atol=1e-5)                        # the prompt, and no text beside it

    assert "red-heart.webp" in run("--model", tower_dfgn / "model.safetensors", "--prompt", "red heart", "--clip-weights", moved)
    args = evaluate.parse(["--run", str(tower_dfgn), "--steps", "2", "--clip-weights", str(moved)])
    assert evaluate.Run(tower_dfgn, args).made_for(["red heart", "a dog"]).shape == (2, 8, 16, 16, 4)
    weights = torch.load(moved / "open_clip_pytorch_model.bin", weights_only=True)
    torch.save({k: v * 1.01 for k, v in weights.items()}, moved / "open_clip_pytorch_model.bin")
    net, meta = train.load_model(tower_dfgn / "model.safetensors", "dfgn")
    meta["text"]["file"] = "gone.bin"
    train.save_model(tmp_path / "lost.safetensors", net.state_dict(), **meta)
    cases = [(tower_dfgn / "model.safetensors", moved, "--clip-weights .*moved: not the text tower that .* was trained with"),
             (tower_dfgn / "model.safetensors", tmp_path / "none", "--clip-weights .*none: no such file"),
             (tmp_path / "lost.safetensors", None, "lost.safetensors: trained with the text tower in gone.bin, which is not there; .*--clip-weights"),
             (tiny_dfgn / "model.safetensors", moved, "--clip-weights .*moved: .* has a text encoder of its own")]
    for model, path, said in cases:
        with pytest.raises(UserError, match=said):
            run("--model", model, "--prompt", "x", *(["--clip-weights", path] if path else []))


# ---- what is refused

def test_what_is_refused(run, tmp_path, still, moving, tiny_vae):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/broken.png").write_bytes(b"no image")
    net, meta = train.load_model(tiny_vae / "model.safetensors", "vae")
    train.save_model(tmp_path / "in/other.safetensors", {k: v + 1 for k, v in net.state_dict().items()}, **meta)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    cases = [
        ([], "--prompt"), (["--prompt", ""], "--prompt.*empty"), (["--prompt", "fire", "  "], "--prompt.*empty"),
        (["--image", "in/broken.png"], "broken.png: cannot be read as an image .no GIF"), (["--image", "none.png"], "none.png"), (["--frames", "in/broken.png"], "broken.png"),
        (["--prompt", "x", "--model", "none.safetensors"], "none.safetensors.*train.py"), (["--prompt", "x", "--model", "in/broken.png"], "broken.png"),
        (["--prompt", "x", "--model", tiny_vae / "model.safetensors"], "'vae'.*'dfgn'"),
        (["--prompt", "x", "--vae", "in/other.safetensors"], "--vae in/other.safetensors"), (["--prompt", "x", "--vae", "none.safetensors"], "none.safetensors"),
        (["--prompt", "x", "--sheet", "a.txt"], "--sheet a.txt.*png"), (["--prompt", "x", "--out", "a.mp4"], "--out a.mp4"), (["--prompt", "x", "--out", "a.gif", "--for", "signal"], "--out a.gif.*png"),
        (["--prompt", "x", "--task", "interpolation"], "--task interpolation.*--frames"), (["--prompt", "x", "--task", "prediction_forward", "--image", still], "--frames"),
        (["--prompt", "x", "--task", "it2v"], "--task it2v.*--image"), (["--frames", moving[0], "--image", still], "--image.*--frames"),
        (["--image", still, "--task", "t2v"], "--task t2v"), (["--frames", still], "--frames.*two"),
        (["--prompt", "x", "--num", 0], "--num 0"), (["--prompt", "x", "--batch", 0], "--batch 0"), (["--prompt", "x", "--duration", 0], "--duration 0"),
        (["--prompt", "x", "--steps", 0], "--steps 0"), (["--prompt", "x", "--steps", 5000], "--steps 5000"), (["--prompt", "x", "--eta", 1.5], "--eta 1.5"),
        (["--prompt", "x", "--eta", -0.5], "--eta -0.5"), (["--prompt", "x", "--seed", -1], "--seed -1")]
    for argv, said in cases:
        with pytest.raises(UserError, match=said):
            run(*argv)
        assert sorted(p.name for p in tmp_path.rglob("*")) == before, argv


def test_exit_code(tiny_dfgn, tmp_path):
    argv = ["--model", str(tiny_dfgn / "model.safetensors"), "--image", str(tmp_path / "gone.png")]
    done = subprocess.run([sys.executable, str(SCRIPT), *argv], capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ))
    line, = done.stderr.strip().splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and "gone.png" in line and not list(tmp_path.iterdir())
