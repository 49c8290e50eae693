"""Make stickers with a trained DFGN: DDIM under two guidances (RDTF, arXiv 2503.17735, Table 6), GIF / WebP / APNG out.

    python sample.py --prompt "rocket"                                      # rocket.webp
    python sample.py --prompt "red heart" "frog" --num 4 --sheet out.png    # four of each, and a contact sheet
    python sample.py --prompt "crying face" --image face.png                # it2v; without --prompt: i2v
    python sample.py --frames a.gif --task interpolation                    # or prediction_forward, prediction_backward
    python sample.py --prompt "frog" --for signal                           # as that platform wants it

Given frames come back exactly (in .webp and .png, at the preset's size). Sample k depends on (--seed, k) alone, not on
the batch size.
"""
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import TASKS, tokenize
from lib.media import pictures
from lib.media.writing import LONGEST, check_duration, output_paths, write_stickers
from lib.nets.autoencoder import load_vae
from lib.nets.cpu import keep_memory
from lib.nets.peft import load_tuned
from lib.nets.towers import tower_for
from lib.nets.weights import find_file
from lib.run.files import UserError, check_outputs, run_cli
from lib.run.sample_options import parse_options
from model import load_rdtf

SHIPPED = Path(__file__).parent / "checkpoints/mini.safetensors"
SETTINGS = "steps", "order", "eta", "text_scale", "image_scale"  # options, by default as the model says


# ---- guidance and DDIM
def branches(text_scale, image_scale, any_text, any_image):
    """[(uses text, uses image, weight)] of the guided eps, terms of weight zero left out:

    eps = e(0,0) + image_scale (e(0,I) - e(0,0)) + text_scale (e(c,I) - e(0,I)); absent conditions fold their terms."""
    weights = {}
    for text, image, w in ((0, 0, 1 - image_scale), (0, 1, image_scale - text_scale), (1, 1, text_scale)):
        key = (bool(text and any_text), bool(image and any_image))
        weights[key] = weights.get(key, 0.0) + w
    return [(*key, w) for key, w in weights.items() if abs(w) > 1e-9]


def guided_eps(net, z_t, t, text, empty, known, cond_mask, terms):
    """One batched forward over the guidance terms -> eps (B, T, c, h, w). text, empty: as encode_text gives them."""
    def repeat(x):
        return x.repeat(len(terms), *[1] * (x.dim() - 1))
    texts = [None if x is None else torch.cat([x if use_text else e for use_text, _, _ in terms])
             for x, e in zip(text, empty)]
    mask = torch.cat([cond_mask * use_image for _, use_image, _ in terms])
    eps = net.eps(repeat(z_t), repeat(t), *texts, repeat(known), mask, torch.ones_like(mask))
    weights = torch.tensor([w for *_, w in terms], device=eps.device).view(-1, 1, 1, 1, 1, 1)
    return (eps.unflatten(0, (len(terms), len(z_t))) * weights).sum(0)


def timesteps(total, steps):
    """`steps` evenly spaced timesteps, from the last (total - 1) down."""
    if not 1 <= steps <= total:
        raise UserError(f"--steps {steps}: choose 1 to {total}")
    return np.round(total * np.arange(steps, 0, -1) / steps).astype(int) - 1


def ddim_step(diffusion, z_t, z0, t, t_next, eta, noise):
    """One DDIM step from t to t_next (-1: the end; Song et al. 2021, eq. 12). z0: as predicted at z_t. eta 1: as much
    fresh noise as DDPM."""
    a = diffusion.alphas_cumprod
    a_t, a_next = float(a[t]), float(a[t_next]) if t_next >= 0 else 1.0
    eps = (z_t - a_t ** 0.5 * z0) / (1 - a_t) ** 0.5
    sigma = eta * ((1 - a_next) / (1 - a_t) * (1 - a_t / a_next)) ** 0.5
    return a_next ** 0.5 * z0 + max(1 - a_next - sigma ** 2, 0.0) ** 0.5 * eps + sigma * noise


def extrapolated(diffusion, z0_last, z0, t_last, t, t_next):
    """z0 half-way from t to t_next, on the line through the one at t_last and the one at t in log(signal / sigma): of a
    step of second order, DPM-Solver++(2M) (Lu et al. 2022)."""
    last, here, after = diffusion.alphas_cumprod[[t_last, t, t_next]].logit().tolist()   # twice log(signal / sigma)
    return z0 + (after - here) / (here - last) / 2 * (z0 - z0_last)


def ddim(net, text, empty, known, cond_mask, rngs, steps, order, eta, text_scale, image_scale):
    """Latents (B, T, c, h, w) from noise. known, cond_mask as in RDTF.eps; rngs: one numpy Generator a sample.

    text, empty: the prompts and "", as RDTF.encode_text gives them, of one length; text None: nothing is said."""
    device, shape = known.device, tuple(known.shape[1:])

    def draw():
        return torch.from_numpy(np.stack([g.standard_normal(shape, np.float32) for g in rngs])).to(device)
    terms = branches(text_scale, image_scale, text is not None, bool(cond_mask.any()))
    text = text or empty
    z, path, z0 = draw(), timesteps(net.config.diffusion.steps, steps).tolist(), None
    for t_last, t, t_next in zip([None, *path], path, [*path[1:], -1]):
        at = torch.full((len(z),), t, device=device)
        eps = guided_eps(net, z, at, text, empty, known, cond_mask, terms)
        signal, sigma = net.diffusion.coefficients(at)
        z0_last, z0 = z0, (z - sigma * eps) / signal
        second = order == 2 and t_last is not None and t_next >= 0     # neither the first step nor the last
        ahead = extrapolated(net.diffusion, z0_last, z0, t_last, t, t_next) if second else z0
        z = ddim_step(net.diffusion, z, ahead, t, t_next, eta, draw() if eta > 0 else 0.0)
    return z


class Sampler:
    """A trained network with its VAE and, if it was trained with one, its text tower."""

    def __init__(self, model, vae=None, device=None, clip_weights=None):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        net, self.meta = load_tuned(model, load_rdtf)
        vae = vae or find_file(model, self.meta["vae_file"])
        if not vae:
            raise UserError(f"{model}: its VAE, {self.meta['vae_file']}, is not there; name it with --vae")
        decoder, found = load_vae(vae)
        if self.meta["vae"] not in found["names"]:
            raise UserError(f"--vae {vae}: not the VAE that {model} was trained with")
        self.net, self.vae, self.config = net.to(self.device), decoder.to(self.device), net.config
        self.vae_file = vae
        tower = tower_for(model, self.meta, clip_weights, net.config.text.width)
        self.tower = tower.to(self.device) if tower else None
        self.T, self.size = net.config.frames, net.config.vae.size

    def settings(self, given, **changes):
        """Steps, order, eta and guidance scales of the model, given: where frames are given; None changes nothing."""
        defaults = asdict(self.config.sampling)
        with_frames = defaults.pop("given_text_scale")
        if given:
            defaults["text_scale"] = with_frames
        return {k: defaults[k] if changes.get(k) is None else changes[k] for k in defaults}

    def text(self, prompts):
        """Tokens of prompts, or a tower's features of them, on the device: what RDTF.encode_text takes."""
        if self.tower:
            return self.tower(self.tower.read(prompts).to(self.device))
        return tokenize(prompts).to(self.device)

    def unknown(self, prompt):
        """(words of a prompt that it was not taught to read, whether it reads any of them)."""
        return (self.tower or self.net.text).unknown(prompt)

    def read(self, prompts):
        """(prompts, as many ""), each as RDTF.encode_text gives them; None for prompts that say nothing."""
        encoded = self.net.encode_text(self.text([*prompts, ""]))      # one call: one length
        text, empty = zip(*((None, None) if x is None else (x[:-1], x[-1:].expand_as(x[:-1])) for x in encoded))
        return (text if any(prompts) else None), empty

    def known_latents(self, frames, mask):
        """Latents (B, T, c, h, w) of the given ones of frames (B, T, S, S, 4); zeros elsewhere."""
        side = self.config.vae.side
        known = torch.zeros(*mask.shape, self.config.dfgn.channels, side, side)
        if mask.any():
            x = pictures.to_tensor(np.asarray(frames)[mask.numpy() > 0])    # (given, 4, S, S)
            known[mask > 0] = self.vae.encode(self.vae.images(x)).cpu()
        return known.to(self.device)

    @torch.no_grad()
    def sample(self, prompts, seeds, frames=None, cond_mask=None, **settings):
        """Clips (B, T, S, S, 4) uint8 straight RGBA for B prompts ("" = no text).

        seeds: B tuples of integers, one generator each. frames (B, T, S, S, 4) uint8 and cond_mask (B, T) give the
        known frames (others are ignored). settings: as for `settings`."""
        B = len(prompts)
        mask = torch.zeros(B, self.T) if cond_mask is None else torch.as_tensor(np.asarray(cond_mask)).float()
        known = self.known_latents(frames, mask)
        rngs = [np.random.default_rng(s) for s in seeds]
        settings = self.settings(bool(mask.any()), **settings)
        z = ddim(self.net, *self.read(prompts), known, mask.to(self.device), rngs, **settings)
        out = pictures.to_rgba(self.vae.decode(z.flatten(0, 1)).unflatten(0, (B, self.T)))
        if mask.any():
            given = mask.numpy() > 0
            out[given] = np.asarray(frames)[given]                       # to the last bit
        return out


def report_unknown(sampler, prompts, alone):
    """Say which words of the prompts the network does not know. UserError: none of any prompt's, where text is given
    alone."""
    found = {prompt: sampler.unknown(prompt) for prompt in prompts}
    for prompt, (words, some) in found.items():
        if words:
            print(f"--prompt \"{prompt}\": the network knows {'nothing of ' if some else 'none of its words: '}"
                  f"{', '.join(words)}", file=sys.stderr)
    if alone and found and not any(some for _, some in found.values()):
        raise UserError(f"--prompt {' '.join(found)}: the network knows none of these words; it was trained on English "
                        "captions such as those of assets/captions.txt")


# ---- given frames and files
def place_frames(frames, task, T):
    """Spread the frames of a file (n, S, S, 4) over a clip -> frames (T, S, S, 4), cond_mask (T,), stride.

    stride: frames of the file from one frame of the clip to the next. interpolation: up to ceil(T / 2) of the file at
    every 2nd place, or every 3rd if they suffice for no more. Predictions take them at the stride of training clips,
    which spread over a whole file: prediction_forward up to 5/8 T that end with the last, prediction_backward up to
    6/8 T that begin with the first. it2v and i2v: the first alone."""
    n, out, mask = len(frames), np.zeros((T, *frames.shape[1:]), np.uint8), np.zeros(T, np.float32)
    stride, chosen, places = max(n // T, 1), frames[:1], [0]
    if task == "interpolation":
        if n < 2:
            raise UserError("--frames: interpolation needs at least two frames")
        spacing = 2 if n >= (T + 1) // 2 else 3
        places = list(range(0, T, spacing))[:n]
        chosen, stride = frames[pictures.even_frames(n, len(places))], n / (len(places) * spacing)
    elif task == "prediction_forward":
        chosen = frames[::-1][::stride][:max(T * 5 // 8, 1)][::-1]
        places = range(len(chosen))
    elif task == "prediction_backward":
        chosen = frames[::stride][:max(T * 6 // 8, 1)]
        places = range(T - len(chosen), T)
    for place, frame in zip(places, chosen):
        out[place], mask[place] = frame, 1
    return out, mask, stride


def read_given(args, sampler):
    """(task, frames (T, S, S, 4) or None, cond_mask (T,) or None) from --image, --frames, --task.

    Without --duration the clip keeps the speed of --frames."""
    with_image = "it2v" if args.prompt else "i2v"
    task = args.task or (with_image if args.image else "interpolation" if args.frames else "t2v")
    if task == "t2v":
        return task, None, None
    frames, durations = pictures.read_animation(args.image if task in ("i2v", "it2v") else args.frames)
    *placed, stride = place_frames(pictures.square(frames, sampler.size), task, sampler.T)
    if args.duration is None and args.frames and len(frames) > 1:
        args.duration = max(1, min(round(stride * sum(durations) / len(frames)), min(LONGEST.values())))
    return task, *placed


def main(argv=None):
    args = parse_options(__doc__, TASKS, argv)
    names = args.prompt or [Path(args.image or args.frames).stem + " sticker"]
    paths = output_paths(args.out, [name for name in names for _ in range(args.num)], args.platform)
    check_duration(None if args.platform else args.duration, paths[0])
    given = [(f"--{name}", getattr(args, name)) for name in ("image", "frames", "model", "vae")]
    check_outputs([*(("--out", path) for path in paths), ("--sheet", args.sheet)], given)
    keep_memory()
    if args.model is None:
        print(f"model: {SHIPPED.name} of checkpoints/, trained as checkpoints/README.md says (--model names another)")
    sampler = Sampler(args.model or SHIPPED, args.vae, clip_weights=args.clip_weights)
    task, frames, mask = read_given(args, sampler)
    report_unknown(sampler, args.prompt, frames is None)
    args.duration = args.duration or 125
    prompts = ["" if task == "i2v" else p for p in args.prompt or [""] for _ in range(args.num)]
    settings = sampler.settings(mask is not None, **{name: getattr(args, name) for name in SETTINGS})
    timesteps(sampler.config.diffusion.steps, settings["steps"])  # refuses too many
    clips, failed = [], []
    for i in tqdm(range(0, len(prompts), args.batch), f"{task}, {len(prompts)} stickers"):
        part = range(i, min(i + args.batch, len(prompts)))
        given = {} if frames is None else dict(frames=[frames] * len(part), cond_mask=[mask] * len(part))
        clips += list(sampler.sample([prompts[k] for k in part], [(args.seed, k) for k in part], **given, **settings))
        failed += write_stickers(clips[i:], paths[i:], args.duration, args.platform)
    if args.sheet:
        marks = None if mask is None else [mask > 0] * len(clips)
        pictures.contact_sheet(clips, args.sheet, labels=prompts, marks=marks)
        print(args.sheet)
    if failed:
        raise UserError(f"{len(failed)} of {len(paths)} stickers could not be written: {'; '.join(failed[:3])}")


if __name__ == "__main__":
    run_cli(main)
