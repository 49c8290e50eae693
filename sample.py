"""Make stickers with a trained DFGN: DDIM under two guidances (RDTF, arXiv 2503.17735, Table 6), GIF / WebP / APNG out.

    python sample.py --prompt "rocket"                                      # rocket.webp
    python sample.py --prompt "red heart" "frog" --num 4 --sheet out.png    # four of each, and a contact sheet
    python sample.py --prompt "crying face" --image face.png                # it2v; without --prompt: i2v
    python sample.py --frames a.gif --task interpolation                    # or prediction_forward, prediction_backward
    python sample.py --prompt "frog" --for signal                           # as that platform wants it

Given frames come back exactly (in .webp and .png, at the preset's size). Sample k depends on (--seed, k) alone, not on
the batch size.
"""
import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import TASKS, tokenize
from lib import media
from lib.cpu import keep_memory
from lib.files import UserError, check_outputs, run_cli
from lib.options import check_least, flag
from lib.towers import tower_for
from lib.weights import find_file
from model import END, load_rdtf, load_vae

SHIPPED = Path(__file__).parent / "checkpoints/mini.safetensors"
SETTINGS = "steps", "eta", "text_scale", "image_scale"  # options; their defaults are the model's, see SamplingConfig


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


def ddim_step(diffusion, z_t, eps, t, t_next, eta, noise):
    """One DDIM step from t to t_next (-1: the end; Song et al. 2021, eq. 12). eta 1: as much fresh noise as DDPM."""
    a = diffusion.alphas_cumprod
    a_t, a_next = float(a[t]), float(a[t_next]) if t_next >= 0 else 1.0
    z0 = (z_t - (1 - a_t) ** 0.5 * eps) / a_t ** 0.5
    sigma = eta * ((1 - a_next) / (1 - a_t) * (1 - a_t / a_next)) ** 0.5
    return a_next ** 0.5 * z0 + max(1 - a_next - sigma ** 2, 0.0) ** 0.5 * eps + sigma * noise


def ddim(net, tokens, known, cond_mask, rngs, steps, eta, text_scale, image_scale, tower=None):
    """Latents (B, T, c, h, w) from noise. known, cond_mask as in RDTF.eps; rngs: one numpy Generator a sample.

    tower: the TextTower whose features the network was trained on."""
    device, shape = known.device, tuple(known.shape[1:])

    def draw():
        return torch.from_numpy(np.stack([g.standard_normal(shape, np.float32) for g in rngs])).to(device)
    any_text = bool((tokens[:, 1] != END).any())  # more than start and end
    terms = branches(text_scale, image_scale, any_text, bool(cond_mask.any()))
    both = torch.cat([tokens, tokenize([""] * len(tokens))]).to(device)  # one call: one length
    encoded = net.encode_text(tower(both) if tower else both)
    text, empty = zip(*((None, None) if x is None else x.chunk(2) for x in encoded))
    z, order = draw(), timesteps(net.config.diffusion.steps, steps)
    for t, t_next in zip(order, [*order[1:], -1]):
        at = torch.full((len(z),), int(t), device=device)
        eps = guided_eps(net, z, at, text, empty, known, cond_mask, terms)
        z = ddim_step(net.diffusion, z, eps, int(t), int(t_next), eta, draw() if eta > 0 else 0.0)
    return z


class Sampler:
    """A trained network with its VAE and, if it was trained with one, its text tower."""

    def __init__(self, model, vae=None, device=None, clip_weights=None):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        net, self.meta = load_rdtf(model)
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
        """Steps, eta and guidance scales of the model, given: where frames are given; None changes nothing."""
        defaults = asdict(self.config.sampling)
        with_frames = defaults.pop("given_text_scale")
        if given:
            defaults["text_scale"] = with_frames
        if changes.get("eta") is not None and not 0 <= changes["eta"] <= 1:
            raise UserError(f"--eta {changes['eta']}: choose 0 (no fresh noise) to 1 (as much as DDPM)")
        return {k: defaults[k] if changes.get(k) is None else changes[k] for k in defaults}

    def tokens(self, prompts):
        """Tokens of prompts, or a tower's features of them, on the device: what RDTF.encode_text takes."""
        tokens = tokenize(prompts).to(self.device)
        return self.tower(tokens) if self.tower else tokens

    def known_latents(self, frames, mask):
        """Latents (B, T, c, h, w) of the given ones of frames (B, T, S, S, 4); zeros elsewhere."""
        side = self.config.vae.side
        known = torch.zeros(*mask.shape, self.config.dfgn.channels, side, side)
        if mask.any():
            x = media.to_tensor(np.asarray(frames)[mask.numpy() > 0])    # (given, 4, S, S)
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
        z = ddim(self.net, tokenize(prompts), known, mask.to(self.device), rngs, tower=self.tower, **settings)
        out = media.to_rgba(self.vae.decode(z.flatten(0, 1)).unflatten(0, (B, self.T)))
        if mask.any():
            given = mask.numpy() > 0
            out[given] = np.asarray(frames)[given]                       # to the last bit
        return out


def unknown_words(net, prompt):
    """The words of a prompt that a text encoder was not trained on, and whether it knows any piece of one. A frozen
    tower knows all."""
    def known(text):
        tokens = tokenize([text])[0]
        return net.text.knows(tokens[1:int((tokens == END).int().argmax())])
    if net.text is None or not prompt:
        return [], True
    return [word for word in prompt.split() if not known(word).all()], bool(known(prompt).any())


def report_unknown(net, prompts, alone):
    """Say which words of the prompts the network does not know. UserError: none of any prompt's, where text is given
    alone."""
    found = {prompt: unknown_words(net, prompt) for prompt in prompts}
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
        chosen, stride = frames[media.even_frames(n, len(places))], n / (len(places) * spacing)
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
    frames, durations = media.read_animation(args.image if task in ("i2v", "it2v") else args.frames)
    *placed, stride = place_frames(media.square(frames, sampler.size), task, sampler.T)
    if args.duration is None and args.frames and len(frames) > 1:
        args.duration = max(1, min(round(stride * sum(durations) / len(frames)), min(media.LONGEST.values())))
    return task, *placed


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", nargs="+", default=[], help="captions, one or more stickers each")
    parser.add_argument("--image", help="first frame (it2v with --prompt, i2v without)")
    parser.add_argument("--frames", help="animation whose frames are given")
    parser.add_argument("--task", choices=TASKS, help="default: it2v, i2v with --image, interpolation with --frames")
    parser.add_argument("--model", help="model.safetensors of a run; default: the one in checkpoints/")
    parser.add_argument("--vae", help="default: the file that the model was trained with")
    parser.add_argument("--clip-weights", help="open_clip weights of the text tower; default: the training's")
    parser.add_argument("--num", type=int, default=1, help="stickers per prompt")
    parser.add_argument("--batch", type=int, default=8, help="stickers made at once; changes speed and memory alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="DDIM steps; this and the next three are the model's by default "
                        "(paper 50; mini 10)")
    parser.add_argument("--eta", type=float, help="fresh noise of DDIM, 0..1 (paper 1; mini 0)")
    parser.add_argument("--text-scale", type=float, help="text guidance (paper 7.5; mini 3, 1 where frames are given)")
    parser.add_argument("--image-scale", type=float, help="guidance of the given frames (paper 7.5; mini 2)")
    parser.add_argument("--duration", type=int, help="milliseconds a frame; default: as in --frames, or else 125")
    parser.add_argument("--out", help="file (.webp, .gif, .png) or folder to write; default: PROMPT.webp")
    parser.add_argument("--sheet", help="PNG contact sheet of all stickers")
    parser.add_argument("--for", dest="platform", choices=sorted(media.PLATFORMS), help="obey a platform's limits")
    return parser.parse_args(argv)


def check(args):
    if any(not p.strip() for p in args.prompt):
        raise UserError("--prompt: empty; describe a sticker, or leave the option out where frames are given")
    if not args.prompt and not (args.image or args.frames or args.task not in (None, "t2v")):
        raise UserError("--prompt: say what to draw, as in --prompt \"rocket\"")
    if args.image and args.frames:
        raise UserError("--image and --frames: give one of them")
    if args.task == "t2v" and (args.image or args.frames):
        raise UserError("--task t2v takes no --image and no --frames")
    needed = {None: None, "t2v": None, "i2v": "image", "it2v": "image"}.get(args.task, "frames")
    if needed and not getattr(args, needed):
        raise UserError(f"--task {args.task} needs --{needed}")
    for name in ("text_scale", "image_scale"):
        if not abs(getattr(args, name) or 0) < 1000:
            raise UserError(f"{flag(name)} {getattr(args, name)}: choose a number such as 3")
    check_least(args, num=1, batch=1, duration=1, steps=1, seed=0)
    media.check_sheet(args.sheet)


def write(clip, path, args):
    if args.platform:
        content, summary = media.encode_for(clip, args.duration, args.platform)
        media.write_bytes(path, content)
        print(f"{path}: {summary}")
    else:
        media.write_animation(path, clip, [args.duration] * len(clip))
        print(path)


def write_all(clips, paths, args):
    """Write what was made; -> the errors of what could not be, which do not take the others."""
    failed = []
    for clip, path in zip(clips, paths):
        try:
            write(clip, path, args)
        except (UserError, OSError) as error:
            failed.append(f"{path}: {error}" if str(path) not in str(error) else str(error))
    return failed


def main(argv=None):
    args = parse(argv)
    check(args)
    names = args.prompt or [Path(args.image or args.frames).stem + " sticker"]
    paths = media.output_paths(args.out, [name for name in names for _ in range(args.num)], args.platform)
    media.check_duration(None if args.platform else args.duration, paths[0])
    given = [(f"--{name}", getattr(args, name)) for name in ("image", "frames", "model", "vae")]
    check_outputs([*(("--out", path) for path in paths), ("--sheet", args.sheet)], given)
    keep_memory()
    if args.model is None:
        print(f"model: {SHIPPED.name} of checkpoints/, trained as checkpoints/README.md says (--model names another)")
    sampler = Sampler(args.model or SHIPPED, args.vae, clip_weights=args.clip_weights)
    task, frames, mask = read_given(args, sampler)
    report_unknown(sampler.net, args.prompt, frames is None)
    args.duration = args.duration or 125
    prompts = ["" if task == "i2v" else p for p in args.prompt or [""] for _ in range(args.num)]
    settings = sampler.settings(mask is not None, **{name: getattr(args, name) for name in SETTINGS})
    timesteps(sampler.config.diffusion.steps, settings["steps"])  # refuses too many
    clips, failed = [], []
    for i in tqdm(range(0, len(prompts), args.batch), f"{task}, {len(prompts)} stickers"):
        part = range(i, min(i + args.batch, len(prompts)))
        given = {} if frames is None else dict(frames=[frames] * len(part), cond_mask=[mask] * len(part))
        clips += list(sampler.sample([prompts[k] for k in part], [(args.seed, k) for k in part], **given, **settings))
        failed += write_all(clips[i:], paths[i:], args)
    if args.sheet:
        marks = None if mask is None else [mask > 0] * len(clips)
        media.contact_sheet(clips, args.sheet, labels=prompts, marks=marks)
        print(args.sheet)
    if failed:
        raise UserError(f"{len(failed)} of {len(paths)} stickers could not be written: {'; '.join(failed[:3])}")


if __name__ == "__main__":
    run_cli(main)
