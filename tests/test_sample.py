"""sample.py: DDIM in closed form, guidance by its definition, given frames untouched, files that others open."""
import functools
import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from data import TASKS, tokenize
from lib.media import pictures
from lib.media.pictures import read_animation, square, write_animation
from lib.nets.weights import save_model
from lib.run.files import UserError, file_hash
from model import PRESETS, RDTF, VAE, Diffusion, DiffusionConfig, SamplingConfig, load_rdtf, preset
from sample import Sampler, branches, ddim, ddim_step, extrapolated, guided_eps, place_frames, timesteps


def make_model(folder, config=PRESETS["tiny"]):
    """Model files of random weights, as train.py writes them after 7 steps -> path of the DFGN."""
    torch.manual_seed(0)
    net, vae, file = RDTF(config), VAE(config.vae), folder / "vae.safetensors"
    for name, p in net.named_parameters():
        if not name.startswith("text."):
            p.data += torch.randn(p.shape) * 0.1     # after the zeros of a start it would not look at its input
    save_model(file, vae.state_dict(), kind="vae", config=config.to_dict(), step=7)
    save_model(folder / "model.safetensors", net.state_dict(), kind="dfgn", config=config.to_dict(), step=7,
               vae=file_hash(file), vae_file=str(file))
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    return Sampler(make_model(tmp_path_factory.mktemp("model")), device="cpu")


@pytest.fixture
def run(tiny_dfgn, tmp_path, monkeypatch):
    """sample.main in an empty folder -> the files that are in it afterwards, by name."""
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        sample.main(["--model", str(tiny_dfgn / "model.safetensors"), "--steps", "2", *map(str, argv)])
        return sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    return call


# ---- DDIM
def sampled_variance(s, steps, order, eta):
    """(variance, mean) of what the best network would draw where the data are N(0, s^2)."""
    config = DiffusionConfig(beta_start=0.0001)                              # a fine end, for 1000 steps
    diffusion, known = Diffusion(config), torch.zeros(2, 8, 4, 32, 32)

    def posterior_mean(z_t, t, *_):
        """Of the noise."""
        a = diffusion.alphas_cumprod[t][:, None, None, None, None].to(z_t.dtype)
        return (1 - a).sqrt() * z_t / (a * s ** 2 + 1 - a)
    net = SimpleNamespace(diffusion=diffusion, config=SimpleNamespace(diffusion=config), eps=posterior_mean)
    rngs = [np.random.default_rng((7, k)) for k in range(2)]
    z = ddim(net, None, (torch.zeros(2, 1, 1), None), known, torch.zeros(2, 8), rngs, steps, order, eta, 1.0, 1.0)
    return z.var().item(), z.mean().item()


@pytest.mark.parametrize("s, order, eta", [(0.5, 1, 0.0), (1.5, 1, 1.0), (0.5, 2, 0.0), (1.5, 2, 1.0)])
def test_steps_return_the_variance_of_gaussian_data(s, order, eta):
    variance, mean = sampled_variance(s, 1000, order, eta)
    assert variance == pytest.approx(s ** 2, rel=0.02) and abs(mean) < 0.02 * s


def test_steps_of_second_order_lose_less_variance():
    for s in (0.5, 2.0):
        (first, _), (second, _) = (sampled_variance(s, 10, order, 0.0) for order in (1, 2))
        assert first < 0.9 * s ** 2 and abs(second - s ** 2) < 0.7 * abs(first - s ** 2)


def test_first_and_last_step_are_of_first_order():
    assert sampled_variance(0.5, 2, 2, 0.0) == sampled_variance(0.5, 2, 1, 0.0)
    assert sampled_variance(0.5, 3, 2, 0.0) != sampled_variance(0.5, 3, 1, 0.0)


def test_a_step_of_second_order_by_hand():
    """z0 moves from 1 to 2 over the last step, a distance of 1.5 in log(signal / sigma); half of the next is 0.5."""
    places = torch.tensor([0.5, -0.5, -2.0], dtype=torch.float64)
    diffusion = SimpleNamespace(alphas_cumprod=torch.sigmoid(2 * places))
    found = extrapolated(diffusion, torch.ones(1), torch.full((1,), 2.0), 2, 1, 0)
    assert found.item() == pytest.approx(2 + 0.5 / 1.5)


def test_one_step_by_hand():
    diffusion = Diffusion(DiffusionConfig())
    a, after = diffusion.alphas_cumprod[700].item(), diffusion.alphas_cumprod[600].item()
    z0, eps = torch.full((1,), 0.3), torch.full((1,), -1.2)
    z_t = a ** 0.5 * z0 + (1 - a) ** 0.5 * eps
    want = after ** 0.5 * 0.3 + (1 - after) ** 0.5 * -1.2
    assert ddim_step(diffusion, z_t, z0, 700, 600, 0.0, 0.0).item() == pytest.approx(want, abs=1e-5)
    assert ddim_step(diffusion, z_t, z0, 700, -1, 1.0, torch.ones(1)).item() == pytest.approx(0.3, abs=1e-5)
    before, a = diffusion.alphas_cumprod[499:501].tolist()
    quiet, loud = (ddim_step(diffusion, z_t, z0, 500, 499, 1.0, torch.full((1,), n)).item() for n in (0.0, 1.0))
    assert (loud - quiet) ** 2 == pytest.approx((1 - before) / (1 - a) * (1 - a / before), rel=1e-3)  # DDPM's


def test_timesteps():
    assert timesteps(1000, 1000).tolist() == list(range(999, -1, -1))
    assert timesteps(1000, 3).tolist() == [999, 666, 332] and timesteps(1000, 1).tolist() == [999]
    with pytest.raises(UserError, match="--steps 1001"):
        timesteps(1000, 1001)


def test_sample_k_is_the_same_at_any_batch_size(sampler):
    """Whatever the others of its batch are given: here two have no frames, and one has no text."""
    side, c = sampler.config.vae.side, sampler.config.dfgn.channels
    prompts = "red heart", "a long caption about a dog that runs and runs", "fire", ""
    mask = torch.zeros(4, 8)
    mask[2:, [0, 3]] = 1
    known = torch.randn(4, 8, c, side, side, generator=torch.Generator().manual_seed(1)) * mask[:, :, None, None, None]

    def latents(ks, seed=0):
        rngs = [np.random.default_rng((seed, k)) for k in ks]
        with torch.no_grad():
            texts = sampler.read([prompts[k] for k in ks])
            return ddim(sampler.net, *texts, known[ks], mask[ks], rngs, 5, 2, 1.0, 3.0, 2.0)
    batch = latents([0, 1, 2, 3])
    for k in range(4):
        assert torch.allclose(latents([k])[0], batch[k], atol=1e-4 * batch.abs().max().item())
    assert torch.equal(latents([2]), latents([2])) and (batch[0] - batch[1]).abs().max() > 0.1
    assert (latents([2], seed=1) - batch[2]).abs().max() > 0.1


# ---- guidance
@pytest.mark.parametrize("text_scale, image_scale, any_text, any_image, terms", [
    (7.5, 4.0, True, True, 3), (7.5, 7.5, True, True, 2), (0.0, 3.0, True, True, 2), (1.0, 1.0, True, True, 1),
    (6.0, 2.5, True, False, 2), (6.0, 2.5, False, True, 2), (6.0, 2.5, False, False, 1)])
def test_terms_without_weight_or_condition_are_left_out(text_scale, image_scale, any_text, any_image, terms):
    e = {(False, False): 0.3, (False, True): -1.1, (True, False): 0.7, (True, True): 2.0}
    none, image, both = e[False, False], e[False, any_image], e[any_text, any_image]
    want = none + image_scale * (image - none) + text_scale * (both - image)
    chosen = branches(text_scale, image_scale, any_text, any_image)
    assert sum(w * e[text, image] for text, image, w in chosen) == pytest.approx(want) and len(chosen) == terms


def test_guidance_is_the_three_term_formula(sampler):
    g, net, side = torch.Generator().manual_seed(3), sampler.net, sampler.config.vae.side
    z, known = torch.randn(2, 2, 8, sampler.config.dfgn.channels, side, side, generator=g)
    mask = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0, 0, 0]])
    t, real = torch.tensor([800, 800]), torch.ones_like(mask)
    with torch.no_grad():
        both = net.encode_text(tokenize(["red heart", "a dog", "", ""]))
        text, empty = zip(*(x.chunk(2) for x in both))
        e00 = net.eps(z, t, *empty, known, mask * 0, real)
        e0i, eci = (net.eps(z, t, *x, known, mask, real) for x in (empty, text))
        want = e00 + 4.0 * (e0i - e00) + 7.5 * (eci - e0i)
        got = guided_eps(net, z, t, text, empty, known, mask, branches(7.5, 4.0, True, True))
    assert torch.allclose(got, want, atol=1e-4 * want.abs().max().item())
    assert (e00 - e0i).abs().max() > 1e-2 and (e0i - eci).abs().max() > 1e-2


def test_settings_are_the_models_by_what_is_given():
    config = replace(PRESETS["tiny"], sampling=SamplingConfig(7, 2, 0.5, 2.0, 1.5, 1.25))
    settings = functools.partial(Sampler.settings, SimpleNamespace(config=config))
    assert settings(False) == dict(steps=7, order=2, eta=0.5, text_scale=2.0, image_scale=1.25)
    assert settings(True) == dict(steps=7, order=2, eta=0.5, text_scale=1.5, image_scale=1.25)
    assert settings(True, text_scale=0, eta=None, steps=3, order=1) == dict(steps=3, order=1, eta=0.5, text_scale=0,
                                                                            image_scale=1.25)
    paper = Sampler.settings(SimpleNamespace(config=PRESETS["paper"]), True)             # Table 6
    assert paper == dict(steps=50, order=1, eta=1.0, text_scale=7.5, image_scale=7.5)


# ---- given frames
@pytest.mark.parametrize("channels", [4, 3])
def test_given_frames_come_back_exactly_and_others_do_not_count(channels, sampler, tmp_path):
    if channels == 3:                            # as in the paper's preset: opaque stickers
        sampler = Sampler(make_model(tmp_path, preset("tiny", ["vae.image_channels=3"])), device="cpu")
    frames, given = np.random.default_rng(1).integers(0, 256, (8, 16, 16, 4), np.uint8), [1, 4, 7]
    mask = np.isin(np.arange(8), given).astype(np.float32)
    others = np.where(mask[:, None, None, None] > 0, frames, 255 - frames)
    a, b, c = (sampler.sample(["x"], [(0, 0)], f[None], mask[None], steps=2) for f in (frames, others, 255 - frames))
    assert a.dtype == np.uint8 and a.shape == (1, 8, 16, 16, 4) and np.array_equal(a, b)
    assert (a[0, given] == frames[given]).all() and (channels == 4 or (a[0, mask == 0, ..., 3] == 255).all())
    assert not np.array_equal(a[0, mask == 0], c[0, mask == 0])


def frame_numbers(n, T, task):
    """Which of n frames lie where: {place: frame}."""
    frames = np.zeros((n, 2, 2, 4), np.uint8) + np.arange(1, n + 1, dtype=np.uint8)[:, None, None, None]
    out, mask, _ = place_frames(frames, task, T)
    assert out.shape == (T, 2, 2, 4) and mask.dtype == np.float32 and not out[mask == 0].any()
    return {int(i): int(out[i, 0, 0, 0]) - 1 for i in np.flatnonzero(mask)}


def test_places_of_given_frames():
    assert frame_numbers(3, 8, "interpolation") == {0: 0, 3: 1, 6: 2}
    assert frame_numbers(4, 8, "interpolation") == {0: 0, 2: 1, 4: 2, 6: 3}
    assert frame_numbers(8, 8, "interpolation") == {0: 0, 2: 2, 4: 4, 6: 6}
    assert frame_numbers(1, 8, "prediction_forward") == {0: 0} and frame_numbers(1, 8, "prediction_backward") == {7: 0}
    assert frame_numbers(8, 8, "prediction_forward") == {i: i + 3 for i in range(5)}
    assert frame_numbers(20, 8, "prediction_forward") == {0: 11, 1: 13, 2: 15, 3: 17, 4: 19}    # every second
    assert frame_numbers(20, 8, "prediction_backward") == {i + 2: 2 * i for i in range(6)}
    assert frame_numbers(9, 8, "prediction_backward") == {i + 2: i for i in range(6)}
    strides = {(n, task): place_frames(np.zeros((n, 1, 1, 4), np.uint8), task, 8)[2]
               for n in (3, 4, 16, 20) for task in TASKS[3:5]}
    assert strides == {(3, TASKS[3]): 1 / 3, (3, TASKS[4]): 1, (4, TASKS[3]): 1 / 2, (4, TASKS[4]): 1,
                       (16, TASKS[3]): 2, (16, TASKS[4]): 2, (20, TASKS[3]): 2.5, (20, TASKS[4]): 2}
    assert frame_numbers(1, 8, "it2v") == frame_numbers(5, 8, "i2v") == {0: 0}
    for T, n, task in itertools.product((4, 16), (2, 30), TASKS[3:]):
        assert 1 <= len(frame_numbers(n, T, task)) < T       # one to see, one to draw
    with pytest.raises(UserError, match="--frames.*two"):
        frame_numbers(1, 8, "interpolation")


# ---- the command
def test_six_tasks_of_a_trained_model(run, capsys):
    alpha, frames = np.random.default_rng(0).integers(0, 256, (12, 20, 4), np.uint8), np.zeros((5, 16, 16, 4), np.uint8)
    for i in range(5):
        frames[i, 4:10, 2 * i:2 * i + 6] = (200, 30 * i, 60, 255)            # a square that moves
    Image.fromarray(alpha).save("red face.png")
    write_animation("moving.png", frames, 100)
    still, moving = ["--image", "red face.png"], ["--frames", "moving.png"]
    options = dict(t2v=["--prompt", "star"], i2v=still, it2v=["--prompt", "x", *still], interpolation=moving,
                   prediction_forward=["--task", "prediction_forward", "--prompt", "x", *moving],
                   prediction_backward=["--task", "prediction_backward", *moving])
    made = {}
    for task in TASKS:
        run(*options[task], "--duration", 80, "--out", f"{task}.png")
        assert f"{task}, 1 stickers" in capsys.readouterr().err
        made[task], durations = read_animation(f"{task}.png")
        assert made[task].shape == (8, 16, 16, 4) and sum(durations) == 640
    first = square(read_animation("red face.png")[0], 16)[0]
    assert (made["it2v"][0] == first).all() and (made["i2v"][0] == first).all()
    assert (made["interpolation"][::2] == frames[:4]).all()
    run(*moving, "--task", "prediction_forward", "--out", "y.png")           # as fast as the file, 100 ms a frame
    assert sum(read_animation("y.png")[1]) == 800
    run(*moving, "--out", "y.png")                # its 5 frames, 500 ms, are spread over 8 places
    assert sum(read_animation("y.png")[1]) == 8 * round(500 / 8)
    assert (made["prediction_forward"][:5] == frames).all() and (made["prediction_backward"][3:] == frames).all()
    run(*options["it2v"], "--task", "i2v", "--duration", 80, "--out", "x.png")
    assert Path("x.png").read_bytes() == Path("i2v.png").read_bytes()        # i2v does not see the text
    assert "red-face-sticker.webp" in run(*still)


@pytest.mark.parametrize("argv, files", [
    (["--prompt", "Star  now!", "red", "--num", 2, "--batch", 3, "--sheet", "sheets/all.png"],
     ["star-now.webp", "star-now-2.webp", "red.webp", "red-2.webp", "sheets/all.png"]),
    (["--prompt", "star", "Star!", "star 2", "star"], ["star.webp", "star-2.webp", "star-2-2.webp", "star-3.webp"]),
    (["--prompt", "star " * 200, "ice", "--out", "made/here"],
     [f"made/here/{'star-' * 12}.webp", "made/here/ice.webp"]),
    (["--prompt", "star", "--out", "stickers.v1/"], ["stickers.v1/star.webp"]),
    (["--prompt", "star", "--for", "signal", "--num", "2", "--out", "x.png"], ["x.png", "x-2.png"])])
def test_output_paths(run, argv, files):
    assert run(*argv) == sorted(files) and len({Path(f).read_bytes() for f in files}) == len(files)


def test_an_output_never_replaces_an_input(run, monkeypatch):
    monkeypatch.setattr(sample.Sampler, "sample", lambda *_, **__: pytest.fail("sampled first"))
    for name in ("red-heart.webp", "stickers/red-heart.webp", "a.gif", "face.png"):
        Path(name).parent.mkdir(exist_ok=True)
        write_animation(name, np.random.default_rng(0).integers(0, 256, (3, 16, 16, 4), np.uint8), 100)
    before = {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()}
    heart, face = ["--prompt", "red heart", "--image"], ["--prompt", "x", "--image", "face.png"]
    for option, argv in (("--image", [*heart, "red-heart.webp"]),
                         ("--image", [*heart, "stickers/red-heart.webp", "--out", "stickers/"]),
                         ("--frames", ["--frames", "a.gif", "--out", "./a.gif"]),
                         ("--image", [*face, "--sheet", "face.png"]),
                         ("--image", [*face, "--num", "2", "--out", "stickers/../face.png"])):
        with pytest.raises(UserError, match=f"is the file of {option}, which it would replace"):
            run(*argv)
    for argv in (["--out", "face.png/"], ["--sheet", "face.png/s.png"], ["--out", "face.png/a.webp"]):
        with pytest.raises(UserError, match="face.png is no folder"):
            run("--prompt", "star", *argv)
    Path("made/star.webp").mkdir(parents=True)
    with pytest.raises(UserError, match="made/star.webp: a folder is there"):
        run("--prompt", "red circle", "star", "--out", "made/")
    assert {path: path.read_bytes() for path in before} == before


def test_what_is_made_is_written_as_it_is_made(run, monkeypatch, capsys):
    """One that cannot be written does not take the others; what interrupts, those that are there."""
    plain = pictures.write_bytes
    monkeypatch.setattr(pictures, "write_bytes", lambda path, content: plain(path, content)
                        if "blue" not in str(path) else (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="1 of 4 stickers could not be written: .*blue-square.webp: .*No space left"):
        run("--prompt", "red circle", "star", "blue square", "green star", "--batch", 3, "--sheet", "s.png")
    assert sorted(p.name for p in Path().iterdir()) == ["green-star.webp", "red-circle.webp", "s.png", "star.webp"]
    calls, make = [], sample.Sampler.sample

    def interrupted(self, prompts, *more, **settings):
        calls.append(prompts)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return make(self, prompts, *more, **settings)
    monkeypatch.setattr(sample.Sampler, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("--prompt", "star", "--num", 9, "--batch", 2, "--out", "many/")
    assert len(list(Path("many").iterdir())) == 4


def test_words_that_the_network_does_not_know_are_said(run, capsys):
    run("--prompt", "a red zebra", "--out", "a.webp")
    assert '--prompt "a red zebra": the network knows nothing of zebra\n' in capsys.readouterr().err
    run("--prompt", "\u0440\u0430\u043a\u0435\u0442\u0430", "star", "--out", "many/")
    assert "the network knows none of its words: \u0440\u0430\u043a\u0435\u0442\u0430\n" in capsys.readouterr().err
    with pytest.raises(UserError, match="--prompt .*: the network knows none of these words"):
        run("--prompt", "\U0001f600", "zizzleberry", "--out", "none/")
    Image.new("RGB", (16, 16)).save("face.png")
    run("--prompt", "zizzleberry", "--image", "face.png", "--out", "c.webp")             # the picture says something
    capsys.readouterr()
    assert not Path("none").exists()
    run("--prompt", "a red star that blinks", "--out", "b.webp")
    assert "knows" not in capsys.readouterr().err


def test_the_vae_is_found_from_another_folder(tmp_path, monkeypatch):
    """A training names its files from where it ran; sampling may run elsewhere."""
    run, vae = tmp_path / "work" / "runs" / "dfgn", tmp_path / "work" / "runs" / "vae.safetensors"
    run.mkdir(parents=True)
    model = make_model(run)
    (run / "vae.safetensors").rename(vae)
    net, meta = load_rdtf(model)
    meta = {**{k: v for k, v in meta.items() if k != "config"}, "vae_file": "runs/vae.safetensors"}
    save_model(model, net.state_dict(), config=net.config.to_dict(), **meta)
    monkeypatch.chdir(tmp_path)
    assert Sampler(model, device="cpu").T == 8
    vae.unlink()
    with pytest.raises(UserError, match="its VAE, runs/vae.safetensors, is not there; name it with --vae"):
        Sampler(model, device="cpu")


def test_a_tower_reads_the_prompts(tower_dfgn, clip_folder, tmp_path, run, no_network):
    path = tower_dfgn / "model.safetensors"
    moved = Path(shutil.copytree(clip_folder, tmp_path / "moved"))
    made = [Sampler(path, device="cpu", clip_weights=where).sample(["red", "a dog", "red"], [(0, 0)] * 3, steps=2)
            for where in (None, moved)]
    assert np.array_equal(*made) and np.array_equal(made[0][0], made[0][2]) and not np.array_equal(*made[0][:2])
    assert "a.png" in run("--model", path, "--prompt", "red", "--clip-weights", moved, "--out", "a.png")


def test_a_platform_wants_its_suffix(run):
    with pytest.raises(UserError, match="--out a.gif: signal takes .png"):
        run("--prompt", "x", "--out", "a.gif", "--for", "signal")
