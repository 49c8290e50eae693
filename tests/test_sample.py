"""sample.py: DDIM in closed form, guidance by its definition, given frames untouched, files that others open."""
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from data import TASKS, tokenize
from lib.files import UserError, file_hash
from lib.media import read_animation, square, write_animation
from lib.towers import load_tower
from lib.weights import save_model
from model import PRESETS, RDTF, VAE, Diffusion, DiffusionConfig, load_rdtf, preset
from sample import Sampler, branches, ddim, ddim_step, guided_eps, place_frames, timesteps


def make_model(folder, config):
    """Model files of random weights, as train.py writes them -> path of the DFGN."""
    torch.manual_seed(0)
    net, vae, file = RDTF(config), VAE(config.vae), folder / "vae.safetensors"
    for name, p in net.named_parameters():
        if not name.startswith("text."):
            p.data += torch.randn(p.shape) * 0.1     # after the zeros of a start it would not look at its input
    save_model(file, vae.state_dict(), kind="vae", config=config.to_dict(), step=0)
    save_model(folder / "dfgn.safetensors", net.state_dict(), kind="dfgn", config=config.to_dict(), step=0,
               vae=file_hash(file), vae_file=str(file))
    return folder / "dfgn.safetensors"


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), PRESETS["tiny"])


@pytest.fixture(scope="module")
def sampler(model_file):
    return Sampler(model_file, device="cpu")


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    """A 20 x 12 picture with all kinds of alpha."""
    path = tmp_path_factory.mktemp("still") / "red face.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 4), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    """Five frames of a square that moves: (path, frames)."""
    path, frames = tmp_path_factory.mktemp("moving") / "moving.png", np.zeros((5, 16, 16, 4), np.uint8)
    for i in range(5):
        frames[i, 4:10, 2 * i:2 * i + 6] = (200, 30 * i, 60, 255)
    write_animation(path, frames, 100)
    return path, frames


@pytest.fixture
def run(model_file, tmp_path, monkeypatch):
    """sample.main in an empty folder -> the files that are in it afterwards, by name."""
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        sample.main(["--model", str(model_file), "--steps", "2", *map(str, argv)])
        return sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    return call


# ---- DDIM

class GaussianNet:
    """In RDTF's place: the data are N(0, s^2), so that the right prediction is known, whatever is predicted."""

    def __init__(self, s, prediction):
        config = DiffusionConfig(beta_start=0.0001, prediction=prediction)  # a fine end, for 1000 steps
        self.diffusion, self.s, self.config = Diffusion(config), s, SimpleNamespace(diffusion=config)

    def encode_text(self, tokens):
        return torch.zeros(len(tokens), 1, 1), None

    def eps(self, z_t, t, *_):
        a = self.diffusion.alphas_cumprod[t][:, None, None, None, None].to(z_t.dtype)
        eps = (1 - a).sqrt() * z_t / (a * self.s ** 2 + 1 - a)              # posterior means
        z0 = a.sqrt() * self.s ** 2 * z_t / (a * self.s ** 2 + 1 - a)
        return self.diffusion.to_eps(self.diffusion.target(z0, eps, t), z_t, t)


def from_gaussian_data(s, eta, prediction, steps, side):
    rngs = [np.random.default_rng((7, k)) for k in range(2)]
    known, tokens = torch.zeros(2, 8, 4, side, side), tokenize([""] * 2)
    return ddim(GaussianNet(s, prediction), tokens, known, torch.zeros(2, 8), rngs, steps, eta, 1.0, 1.0)


@pytest.mark.parametrize("s, eta", [(0.5, 0.0), (0.7, 1.0), (1.5, 1.0)])
def test_ddim_returns_the_variance_of_gaussian_data(s, eta):
    z = from_gaussian_data(s, eta, "eps", 1000, 32)
    assert z.var().item() == pytest.approx(s ** 2, rel=0.02) and abs(z.mean().item()) < 0.02 * s
    eps, v, z0 = (from_gaussian_data(s, eta, prediction, 50, 4) for prediction in ("eps", "v", "z0"))
    assert torch.allclose(v, eps, atol=1e-3) and torch.allclose(z0, eps, atol=1e-3)


def test_one_step_by_hand():
    diffusion = Diffusion(DiffusionConfig())
    a, after = diffusion.alphas_cumprod[700].item(), diffusion.alphas_cumprod[600].item()
    z0, eps = torch.full((1,), 0.3), torch.full((1,), -1.2)
    z_t = a ** 0.5 * z0 + (1 - a) ** 0.5 * eps
    want = after ** 0.5 * 0.3 + (1 - after) ** 0.5 * -1.2
    assert ddim_step(diffusion, z_t, eps, 700, 600, 0.0, 0.0).item() == pytest.approx(want, abs=1e-5)
    assert ddim_step(diffusion, z_t, eps, 700, -1, 1.0, torch.ones(1)).item() == pytest.approx(0.3, abs=1e-5)
    before, a = diffusion.alphas_cumprod[499:501].tolist()
    quiet, loud = (ddim_step(diffusion, z_t, eps, 500, 499, 1.0, torch.full((1,), n)).item() for n in (0.0, 1.0))
    assert (loud - quiet) ** 2 == pytest.approx((1 - before) / (1 - a) * (1 - a / before), rel=1e-3)  # DDPM's


def test_timesteps():
    assert timesteps(1000, 1000).tolist() == list(range(999, -1, -1)) and timesteps(1000, 1).tolist() == [999]
    for steps in (2, 25, 50, 333):
        t = timesteps(1000, steps)
        assert len(t) == steps and t[0] == 999 and t[-1] >= 0 and (np.diff(t) < 0).all() and np.ptp(np.diff(t)) <= 1
    for steps in (0, 1001):
        with pytest.raises(UserError, match=f"--steps {steps}"):
            timesteps(1000, steps)


@pytest.mark.parametrize("given", [(), (0, 3)])
def test_sample_k_is_the_same_at_any_batch_size(sampler, moving, given):
    side, c = sampler.config.vae.side, sampler.config.dfgn.channels
    tokens = tokenize(["red heart", "a long caption about a dog that runs and runs", "fire", ""])
    mask = torch.zeros(4, 8)
    mask[:, list(given)] = 1
    known = torch.randn(4, 8, c, side, side, generator=torch.Generator().manual_seed(1)) * mask[:, :, None, None, None]

    def latents(ks, seed=0):
        rngs = [np.random.default_rng((seed, k)) for k in ks]
        with torch.no_grad():
            return ddim(sampler.net, tokens[ks], known[ks], mask[ks], rngs, 5, 1.0, 3.0, 2.0)
    batch = latents([0, 1, 2, 3])
    for k in range(4):
        assert torch.allclose(latents([k])[0], batch[k], atol=1e-4 * batch.abs().max().item())
    assert torch.equal(latents([2]), latents([2])) and (batch[0] - batch[2]).abs().max() > 0.1
    assert (latents([2], seed=1) - batch[2]).abs().max() > 0.1


# ---- guidance

@pytest.mark.parametrize("text_scale, image_scale, terms", [
    (7.5, 4.0, 3), (7.5, 7.5, 2), (3.0, 1.0, 2), (1.0, 1.0, 1), (0.0, 3.0, 2), (4.0, 0.0, 3)])
def test_guidance_is_the_three_term_formula(sampler, text_scale, image_scale, terms):
    g, net, side = torch.Generator().manual_seed(3), sampler.net, sampler.config.vae.side
    z, known = torch.randn(2, 2, 8, sampler.config.dfgn.channels, side, side, generator=g)
    mask = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0, 0, 0]])
    t, real = torch.tensor([800, 800]), torch.ones_like(mask)
    with torch.no_grad():
        both = net.encode_text(tokenize(["red heart", "a dog", "", ""]))
        text, empty = zip(*(x.chunk(2) for x in both))
        e00 = net.eps(z, t, *empty, known, mask * 0, real)
        e0i, eci = (net.eps(z, t, *x, known, mask, real) for x in (empty, text))
        want = e00 + image_scale * (e0i - e00) + text_scale * (eci - e0i)
        chosen = branches(text_scale, image_scale, True, True)
        got = guided_eps(net, z, t, text, empty, known, mask, chosen)
    assert len(chosen) == terms and torch.allclose(got, want, atol=1e-4 * want.abs().max().item())
    assert (e00 - e0i).abs().max() > 1e-2 and (e0i - eci).abs().max() > 1e-2


@pytest.mark.parametrize("any_text, any_image, terms", [(True, True, 3), (True, False, 2), (False, True, 2),
                                                        (False, False, 1)])
def test_absent_conditions_fold_their_terms(any_text, any_image, terms):
    e = {(False, False): 0.3, (False, True): -1.1, (True, False): 0.7, (True, True): 2.0}

    def value(text, image):
        return e[bool(text and any_text), bool(image and any_image)]
    chosen = branches(6.0, 2.5, any_text, any_image)
    want = value(0, 0) + 2.5 * (value(0, 1) - value(0, 0)) + 6.0 * (value(1, 1) - value(0, 1))
    assert sum(w * e[text, image] for text, image, w in chosen) == pytest.approx(want) and len(chosen) == terms


# ---- given frames

@pytest.mark.parametrize("channels", [4, 3])
def test_given_frames_come_back_exactly_and_others_do_not_count(channels, sampler, tmp_path):
    if channels == 3:                            # as in the paper's preset: opaque stickers
        sampler = Sampler(make_model(tmp_path, preset("tiny", ["vae.image_channels=3"])), device="cpu")
    frames = np.random.default_rng(1).integers(0, 256, (8, 16, 16, 4), np.uint8)
    for given in ([0], [1, 4, 7]):
        mask = np.isin(np.arange(8), given).astype(np.float32)
        other = np.where(mask[:, None, None, None] > 0, frames, 255 - frames)
        a, b = (sampler.sample(["x"], [(0, 0)], f[None], mask[None], steps=2) for f in (frames, other))
        assert a.dtype == np.uint8 and a.shape == (1, 8, 16, 16, 4) and np.array_equal(a, b)
        assert (a[0, given] == frames[given]).all() and (channels == 4 or (a[0, mask == 0, ..., 3] == 255).all())
        without = sampler.sample(["x"], [(0, 0)], steps=2)
        assert not np.array_equal(a[0, mask == 0], without[0, mask == 0])


def frame_numbers(n, T, task):
    """Which of n frames lie where: {place: frame}."""
    frames = np.zeros((n, 2, 2, 4), np.uint8) + np.arange(1, n + 1, dtype=np.uint8)[:, None, None, None]
    out, mask = place_frames(frames, task, T)
    assert out.shape == (T, 2, 2, 4) and mask.dtype == np.float32 and not out[mask == 0].any()
    return {int(i): int(out[i, 0, 0, 0]) - 1 for i in np.flatnonzero(mask)}


def test_places_of_given_frames():
    for n, want in {2: {0: 0, 3: 1}, 3: {0: 0, 3: 1, 6: 2}, 4: {0: 0, 2: 1, 4: 2, 6: 3},
                    8: {0: 0, 2: 2, 4: 4, 6: 6}}.items():
        assert frame_numbers(n, 8, "interpolation") == want
    assert frame_numbers(1, 8, "prediction_forward") == {0: 0} and frame_numbers(1, 8, "prediction_backward") == {7: 0}
    assert frame_numbers(8, 8, "prediction_forward") == {i: i + 3 for i in range(5)}
    assert frame_numbers(20, 8, "prediction_backward") == {i + 2: i for i in range(6)}
    assert frame_numbers(1, 8, "it2v") == frame_numbers(5, 8, "i2v") == {0: 0}
    for T, n, task in [(T, n, task) for T in (4, 8, 16) for n in (2, 3, 9, 30) for task in TASKS[3:]]:
        assert 1 <= len(frame_numbers(n, T, task)) < T       # one to see, one to draw
    with pytest.raises(UserError, match="--frames.*two"):
        frame_numbers(1, 8, "interpolation")


# ---- the command

def test_six_tasks_of_a_trained_model(run, tiny_dfgn, still, moving, capsys):
    given = {"t2v": ["--prompt", "x"], "i2v": ["--image", still], "it2v": ["--prompt", "x", "--image", still],
             "interpolation": ["--frames", moving[0]], "prediction_forward": ["--prompt", "x", "--frames", moving[0]],
             "prediction_backward": ["--frames", moving[0]]}
    assert given.keys() == set(TASKS)
    made = {}
    for task, argv in given.items():
        named = ["--task", task] if "prediction" in task else []             # the others follow from what is given
        run("--model", tiny_dfgn / "model.safetensors", *argv, *named, "--out", f"{task}.png", "--duration", 80)
        assert f"{task}, 1 stickers" in capsys.readouterr().err
        made[task], durations = read_animation(f"{task}.png")
        assert made[task].shape == (8, 16, 16, 4) and sum(durations) == 640
    first = square(read_animation(still)[0], 16)[0]
    assert (made["it2v"][0] == first).all() and (made["i2v"][0] == first).all()
    assert (made["interpolation"][::2] == moving[1][:4]).all()
    assert (made["prediction_forward"][:5] == moving[1]).all() and (made["prediction_backward"][3:] == moving[1]).all()
    run("--model", tiny_dfgn / "model.safetensors", *given["it2v"], "--task", "i2v", "--out", "i.png", "--duration", 80)
    assert Path("i.png").read_bytes() == Path("i2v.png").read_bytes()         # i2v does not see the text


@pytest.mark.parametrize("argv, files", [
    (["--prompt", "Fire  now!", "red", "--num", 2, "--batch", 3, "--sheet", "sheets/all.png"],
     ["fire-now-1.webp", "fire-now-2.webp", "red-1.webp", "red-2.webp", "sheets/all.png"]),
    (["--prompt", "fire", "fire", "Fire!", "fire 1"], ["fire-1.webp", "fire-2.webp", "fire-3.webp", "fire-4.webp"]),
    (["--prompt", "fire", "ice", "--out", "made/here"], ["made/here/fire.webp", "made/here/ice.webp"]),
    (["--prompt", "fire " * 200], ["fire-" * 11 + "fire-.webp"]), (["--image", "STILL"], ["red face-sticker.webp"]),
    (["--prompt", "x", "--for", "signal", "--num", "2", "--out", "x.png"], ["x-1.png", "x-2.png"])])
def test_output_paths(run, argv, files, still):
    assert run(*[still if word == "STILL" else word for word in argv]) == sorted(files)
    assert len({Path(f).read_bytes() for f in files}) == len(files)


def test_a_tower_reads_the_prompts(tower_dfgn, clip_folder, tmp_path, run, no_network):
    path = tower_dfgn / "model.safetensors"
    moved = Path(shutil.copytree(clip_folder, tmp_path / "moved"))
    made = [Sampler(path, device="cpu", clip_weights=where).sample(["red", "a dog", "red"], [(0, 0)] * 3, steps=2)
            for where in (None, moved)]
    assert np.array_equal(*made) and np.array_equal(made[0][0], made[0][2]) and not np.array_equal(*made[0][:2])
    net, features = load_rdtf(path)[0], load_tower(clip_folder, "")(tokenize(["red", ""]))
    context, mask = net.encode_text(features)
    assert context.shape == (2, 77, 32) and mask is None and torch.equal(context, features)
    assert "a.png" in run("--model", path, "--prompt", "red", "--clip-weights", moved, "--out", "a.png")


def test_what_is_refused(run, still, moving):
    """More is in test_bad_input.py."""
    for argv, reason in (
            (["--prompt", "fire", "  "], "--prompt.*empty"), (["--frames", still], "--frames.*two"),
            (["--prompt", "x", "--out", "a.gif", "--for", "signal"], "--out a.gif.*png"),
            (["--prompt", "x", "--task", "interpolation"], "--task interpolation.*--frames"),
            (["--prompt", "x", "--steps", 5000], "--steps 5000"), (["--prompt", "x", "--eta", 1.5], "--eta 1.5")):
        with pytest.raises(UserError, match=reason):
            run(*argv)
    assert not list(Path().iterdir())
