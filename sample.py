"""Make stickers with a trained DFGN: DDIM under two guidances (RDTF, arXiv 2503.17735, Table 6), GIF / WebP / APNG out.

    python sample.py --prompt "rocket"                                      # rocket.webp
    python sample.py --prompt "red heart" "frog" --num 4 --sheet out.png    # four of each, and a contact sheet
    python sample.py --prompt "crying face" --image face.png                # it2v; without --prompt: i2v
    python sample.py --frames a.gif --task interpolation                    # also prediction_forward, prediction_backward
    python sample.py --prompt "frog" --for signal                           # as that platform wants it

Frames that are given come back exactly (in .webp and .png, at the preset's size). Sample k depends on (--seed, k) alone: not on the batch size.
"""
import argparse
import io
import itertools
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from data import (TASKS, UserError, check_sheet, contact_sheet, even_frames, nearest_given, read_animation, run_cli, square, to_rgba, to_tensor,
                  tokenize, webp_alpha, write_animation)
from train import file_hash, keep_memory, load_model, tower_of

PLATFORMS = {  # file type, side in pixels, bytes, seconds
    "whatsapp": (".webp", 512, 450_000, 10), "signal": (".png", 512, 300_000, 3), "discord": (".png", 320, 512_000, 60)}
DEFAULTS = dict(steps=50, spacing="uniform", eta=1.0, text_scale=7.5, image_scale=7.5)     # paper Table 6
MINI = dict(steps=25, spacing="uniform", eta=0.0, text_scale=1.5, image_scale=1.0)
MINI_GIVEN = dict(MINI, steps=2, text_scale=1.0)   # with given frames: more steps make livelier and less likely motion, captions of new concepts mislead


def defaults(preset, given):
    """Sampling settings of a preset by name, for clips with or without given frames."""
    return {False: MINI, True: MINI_GIVEN}[given] if preset == "mini" else DEFAULTS


class Sampler:
    """A trained network with its VAE and, if it was trained with one, its text tower. `sample` is what evaluate.py calls, too."""

    def __init__(self, model, vae=None, device=None, clip_weights=None):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        net, self.meta = load_model(model, "dfgn")
        vae = vae or self.meta["vae_file"]
        decoder, _ = load_model(vae, "vae")
        if file_hash(vae) != self.meta["vae"]:
            raise UserError(f"--vae {vae}: not the VAE that {model} was trained with (SHA-256 {self.meta['vae'][:12]}...)")
        self.net, self.vae, self.config = net.to(self.device), decoder.to(self.device), net.config
        tower = tower_of(model, self.meta, clip_weights, net.config.text.width)
        self.tower = tower.to(self.device) if tower else None
        self.T, self.size = net.config.frames, net.config.vae.size

    def settings(self, given, **changes):
        """Steps, their spacing, eta and guidance scales of the preset, for clips with or without given frames; None changes nothing."""
        own = defaults(self.config.name, given)
        if changes.get("eta") is not None and not 0 <= changes["eta"] <= 1:
            raise UserError(f"--eta {changes['eta']}: choose 0 (no fresh noise) to 1 (as much as DDPM)")
        return {k: own[k] if changes.get(k) is None else changes[k] for k in own}

    @torch.no_grad()
    def sample(self, prompts, seeds, frames=None, cond_mask=None, steps=None, spacing=None, eta=None, text_scale=None, image_scale=None, detail=True):
        """Clips (B, T, S, S, 4) uint8 for B prompts ("" = no text).

        seeds: B tuples of integers, one generator each. frames (B, T, S, S, 4) uint8 straight RGBA and cond_mask (B, T) give
        the known frames (others are ignored). None for a number takes the preset's default."""
        B, side = len(prompts), self.config.vae.side
        mask = torch.zeros(B, self.T) if cond_mask is None else torch.as_tensor(np.asarray(cond_mask), dtype=torch.float32)
        d = self.settings(bool(mask.any()), steps=steps, spacing=spacing, eta=eta, text_scale=text_scale, image_scale=image_scale)
        known = torch.zeros(B, self.T, self.config.dfgn.channels, side, side)
        if mask.any():
            x = self.vae.images(torch.stack([to_tensor(f) for f in frames]))  # (B, T, C, S, S)
            given = mask.bool()
            known[given] = self.vae.encode(x[given]).cpu()
        rngs = [np.random.default_rng(s) for s in seeds]
        z = ddim(self.net, tokenize(prompts), known.to(self.device), mask.to(self.device), rngs, tower=self.tower, **d)
        y = self.vae.decode(z.flatten(0, 1)).unflatten(0, (B, self.T)).float().cpu()
        if mask.any():
            decoded = torch.zeros_like(y)
            decoded[given] = self.vae.decode(known[given].to(self.device)).float().cpu()
            y = keep_given(y, x.cpu(), decoded, mask, detail)
        if y.shape[2] == 3:  # a VAE without alpha, as Stable Diffusion's: opaque
            y = torch.cat([y, torch.ones_like(y[:, :, :1])], 2)
        out = to_rgba(y)
        if mask.any():
            out[given.numpy()] = np.asarray(frames)[given.numpy()]  # to the last bit, whatever the rounding
        return out


def keep_given(y, x, reconstructed, cond_mask, detail=True, sigma=0.1):
    """Where a frame equals the nearest given one *after* the VAE, take that frame's own pixels: what does not move stays sharp.

    y (B, T, C, H, W) generated, x given frames, reconstructed the given frames through the VAE; sigma in units of [-1, 1]."""
    if not detail:
        return y
    index = torch.from_numpy(nearest_given(cond_mask.numpy()))[:, :, None, None, None].expand_as(y)
    near, near_decoded = x.gather(1, index), reconstructed.gather(1, index)
    change = ((y - near_decoded) ** 2).mean(2)
    change = F.avg_pool2d(change, 3, stride=1, padding=1, count_include_pad=False)  # (B, T, H, W)
    same = torch.exp(-change / (2 * sigma ** 2))[:, :, None] * cond_mask.amax(1)[:, None, None, None, None]
    return same * near + (1 - same) * y


def branches(text_scale, image_scale, any_text, any_image):
    """[(uses text, uses image, weight)] of the guided eps, terms of weight zero left out:

    eps = e(0,0) + image_scale (e(0,I) - e(0,0)) + text_scale (e(c,I) - e(0,I)); conditions that are absent fold together."""
    weights = {}
    for text, image, w in ((0, 0, 1 - image_scale), (0, 1, image_scale - text_scale), (1, 1, text_scale)):
        key = (bool(text and any_text), bool(image and any_image))
        weights[key] = weights.get(key, 0.0) + w
    return [(*key, w) for key, w in weights.items() if abs(w) > 1e-9]


def guided_eps(net, z_t, t, text, empty, known, cond_mask, terms):
    """One batched forward over the guidance terms -> eps (B, T, c, h, w). text, empty: as encode_text gives them."""
    B, n = len(z_t), len(terms)
    texts = (None if x is None else torch.cat([x if use_text else e for use_text, _, _ in terms]) for x, e in zip(text, empty))
    mask = torch.cat([cond_mask * use_image for _, use_image, _ in terms])
    many = lambda x: x.repeat(n, *[1] * (x.dim() - 1))
    eps = net.eps(many(z_t), many(t), *texts, many(known) * mask[:, :, None, None, None], mask, torch.ones_like(mask))
    weights = torch.tensor([w for *_, w in terms], device=eps.device)
    return (eps.unflatten(0, (n, B)) * weights.view(-1, 1, 1, 1, 1, 1)).sum(0)


def timesteps(total, steps, spacing="uniform"):
    """`steps` timesteps from the last down: uniform, or quadratic (denser at low noise, where fine detail is decided)."""
    if not 1 <= steps <= total:
        raise UserError(f"--steps {steps}: choose 1 to {total}")
    left = np.arange(steps, 0, -1)
    share = {"uniform": left / steps, "quadratic": (left / steps) ** 2}[spacing]
    return np.maximum(np.round(total * share).astype(int), left) - 1  # no timestep twice


def ddim_step(diffusion, z_t, eps, t, t_next, eta, noise):
    """One DDIM step from t to t_next (-1: the end), eta 1 with as much fresh noise as DDPM."""
    a = diffusion.alphas_cumprod
    a_t, a_next = float(a[t]), float(a[t_next]) if t_next >= 0 else 1.0
    z0 = (z_t - (1 - a_t) ** 0.5 * eps) / a_t ** 0.5
    sigma = eta * ((1 - a_next) / (1 - a_t) * (1 - a_t / a_next)) ** 0.5
    return a_next ** 0.5 * z0 + max(1 - a_next - sigma ** 2, 0.0) ** 0.5 * eps + sigma * noise


def ddim(net, tokens, known, cond_mask, rngs, steps, eta, text_scale, image_scale, spacing="uniform", tower=None):
    """Latents (B, T, c, h, w) from noise. known, cond_mask as in RDTF.eps; rngs: one numpy Generator a sample; tower: what net's text features are of."""
    device = known.device
    draw = lambda: net.diffusion.mix_noise(*(torch.from_numpy(np.stack([g.standard_normal(s, np.float32) for g in rngs])).to(device)
                                             for s in (tuple(known.shape[1:]), (1, *known.shape[2:]))))
    any_text = bool((tokens[:, 2:] != 0).any())  # more than start and end
    terms = branches(text_scale, image_scale, any_text, bool(cond_mask.any()))
    both = torch.cat([tokens, tokenize([""] * len(tokens))]).to(device)  # one call: one length
    both = net.encode_text(tower(both) if tower else both)
    text, empty = (tuple(x[i * len(tokens):(i + 1) * len(tokens)] if x is not None else None for x in both) for i in (0, 1))
    z, order = draw(), timesteps(net.config.diffusion.steps, steps, spacing)
    for t, t_next in zip(order, [*order[1:], -1]):
        at = torch.full((len(z),), int(t), device=device)
        eps = guided_eps(net, z, at, text, empty, known, cond_mask, terms)
        z = ddim_step(net.diffusion, z, eps, int(t), int(t_next), eta, draw() if eta > 0 else 0.0)
    return z


# ------------------------------------------------------------------------------------------------ given frames
def place_frames(frames, task, T):
    """Spread the frames of a file (n, S, S, 4) over a clip as a task has them -> frames (T, S, S, 4), cond_mask (T,).

    interpolation: up to ceil(T / 2) of them at every 2nd place, or every 3rd if they suffice for no more; prediction_forward:
    the last up to 5/8 T of them first; prediction_backward: the first up to 6/8 T of them last; it2v and i2v: the first alone."""
    n, out, mask = len(frames), np.zeros((T, *frames.shape[1:]), np.uint8), np.zeros(T, np.float32)
    if task == "interpolation":
        if n < 2:
            raise UserError("--frames: interpolation needs at least two frames")
        places = list(range(0, T, 2 if n >= (T + 1) // 2 else 3))[:n]
        chosen = [frames[i] for i in even_frames(n, len(places))]
    elif task == "prediction_forward":
        chosen = frames[-max(T * 5 // 8, 1):]
        places = range(len(chosen))
    elif task == "prediction_backward":
        chosen = frames[:max(T * 6 // 8, 1)]
        places = range(T - len(chosen), T)
    else:
        chosen, places = frames[:1], [0]
    for place, frame in zip(places, chosen):
        out[place], mask[place] = frame, 1
    return out, mask


# ------------------------------------------------------------------------------------------------ files
def slug(text):
    return re.sub(r"[^\w]+", "-", text.lower()).strip("-")[:60] or "sticker"


def encode_for(frames, duration, platform):
    """A clip (T, S, S, 4) as the bytes a platform accepts, and a sentence on what was done. Quality falls until it fits."""
    suffix, side, limit, seconds = PLATFORMS[platform]
    duration = min(duration, int(1000 * seconds / len(frames)))
    images = [Image.fromarray(f).convert("RGBa").resize((side, side), Image.BICUBIC).convert("RGBA") for f in frames]
    for quality in (95, 85, 75, 60, 45, 30, 15, 5) if suffix == ".webp" else (256, 128, 64, 32, 16, 8, 4):
        file = io.BytesIO()
        if suffix == ".webp":
            images[0].save(file, "WEBP", save_all=True, append_images=images[1:], duration=duration, loop=0, quality=quality,
                           alpha_quality=100 if quality > 45 else quality)
        else:  # fewer colours, still stored without a palette
            fewer = [im.quantize(quality, Image.Quantize.FASTOCTREE).convert("RGBA") for im in images]
            fewer[0].save(file, "PNG", save_all=True, append_images=fewer[1:], duration=duration, loop=0, disposal=0, blend=0)
        if file.tell() <= limit:
            what = f"quality {quality}" if suffix == ".webp" else f"{quality} colours"
            content = webp_alpha(file.getvalue()) if suffix == ".webp" else file.getvalue()
            return content, f"{platform}: {suffix[1:]}, {side}x{side}, {what}, {file.tell() / 1000:.0f} of {limit / 1000:.0f} kB, {duration * len(frames) / 1000:.1f} s"
    raise UserError(f"--for {platform}: the clip does not fit {limit // 1000} kB at any quality")


def read_given(args, sampler):
    """(task, frames (T, S, S, 4) or None, cond_mask (T,) or None) from --image, --frames, --task."""
    if args.image and args.frames:
        raise UserError("--image and --frames: give one of them")
    has_text = any(p for p in args.prompt)
    task = args.task or (("it2v" if has_text else "i2v") if args.image else "interpolation" if args.frames else "t2v")
    if task == "t2v":
        if args.image or args.frames:
            raise UserError("--task t2v takes no --image and no --frames")
        return task, None, None
    source = args.image if task in ("i2v", "it2v") else args.frames
    if not source:
        raise UserError(f"--task {task} needs {'--image' if task in ('i2v', 'it2v') else '--frames'}")
    frames, _ = read_animation(source)
    return (task, *place_frames(square(frames, sampler.size), task, sampler.T))


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", nargs="+", default=[], help="captions, one or more stickers each")
    parser.add_argument("--image", help="first frame (it2v with --prompt, i2v without)")
    parser.add_argument("--frames", help="animation whose frames are given")
    parser.add_argument("--task", choices=TASKS, help="default: it2v or i2v with --image, interpolation with --frames, else t2v")
    parser.add_argument("--model", default="runs/dfgn/model.safetensors")
    parser.add_argument("--vae", help="default: the file that the model was trained with")
    parser.add_argument("--clip-weights", help="open_clip weights of the text tower, if the model was trained with one (default: where they were then)")
    parser.add_argument("--num", type=int, default=1, help="stickers per prompt")
    parser.add_argument("--batch", type=int, default=8, help="stickers made at once; changes nothing but speed and memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="DDIM steps (paper 50; mini 25, with given frames 2)")
    parser.add_argument("--spacing", choices=("uniform", "quadratic"), help="of the DDIM steps (default: uniform)")
    parser.add_argument("--eta", type=float, help="fresh noise of DDIM, 0..1 (paper 1; mini 0)")
    parser.add_argument("--text-scale", type=float, help="text guidance (paper 7.5; mini 1.5, with given frames 1)")
    parser.add_argument("--image-scale", type=float, help="guidance of the given frames (paper 7.5; mini 1)")
    parser.add_argument("--detail", action=argparse.BooleanOptionalAction, default=True, help="take what did not move from the given frames' own pixels")
    parser.add_argument("--duration", type=int, default=125, help="milliseconds a frame")
    parser.add_argument("--out", help="file to write (.webp, .gif, .png), or folder; default: the prompt, as .webp, here")
    parser.add_argument("--sheet", help="PNG contact sheet of all stickers")
    parser.add_argument("--for", dest="platform", choices=sorted(PLATFORMS), help="obey a platform's limits")
    return parser.parse_args(argv)


def output_paths(args, names):
    folder = Path(args.out or "") if not Path(args.out or "").suffix else None
    suffix = PLATFORMS[args.platform][0] if args.platform else ".webp" if folder else Path(args.out).suffix
    if suffix.lower() not in (".webp", ".gif", ".png", ".apng"):
        raise UserError(f"--out {args.out}: write .webp, .gif or .png")
    if not folder and Path(args.out).suffix != suffix:
        raise UserError(f"--out {args.out}: {args.platform} takes {suffix}")
    stems = [folder / name if folder else Path(args.out).with_suffix("") for name in names]
    paths, taken = [], {stem for stem in stems if stems.count(stem) == 1}
    for stem in stems:
        numbered = (Path(f"{stem}-{i}") for i in itertools.count(1))
        stem = stem if stems.count(stem) == 1 else next(s for s in numbered if s not in taken)
        taken.add(stem)
        paths.append(Path(f"{stem}{suffix}"))
    return paths


def main(argv=None):
    args = parse(argv)
    if any(not p.strip() for p in args.prompt):
        raise UserError("--prompt: empty; describe a sticker, or leave the option out for i2v, interpolation or prediction")
    if not args.prompt and not (args.image or args.frames):
        raise UserError("--prompt: say what to draw, as in --prompt \"rocket\"")
    for name, least in dict(num=1, batch=1, duration=1, steps=1, seed=0).items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    check_sheet(args.sheet)
    names = [slug(p) for p in args.prompt for _ in range(args.num)] or [Path(args.image or args.frames).stem + "-sticker"] * args.num
    paths = output_paths(args, names)
    keep_memory()
    sampler = Sampler(args.model, args.vae, clip_weights=args.clip_weights)
    task, frames, mask = read_given(args, sampler)
    prompts = ["" if task == "i2v" else p for p in args.prompt for _ in range(args.num)] or [""] * args.num
    clips = []
    for i in tqdm(range(0, len(prompts), args.batch), f"{task}, {len(prompts)} stickers"):
        chunk = range(i, min(i + args.batch, len(prompts)))
        given = {} if frames is None else dict(frames=np.stack([frames] * len(chunk)), cond_mask=np.stack([mask] * len(chunk)))
        clips += list(sampler.sample([prompts[k] for k in chunk], [(args.seed, k) for k in chunk], **given, detail=args.detail,
                                     **{name: getattr(args, name) for name in DEFAULTS}))
    for clip, path in zip(clips, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        if args.platform:
            content, said = encode_for(clip, args.duration, args.platform)
            path.write_bytes(content)
            print(f"{path}: {said}")
        else:
            write_animation(path, clip, [args.duration] * len(clip))
            print(path)
    if args.sheet:
        Path(args.sheet).parent.mkdir(parents=True, exist_ok=True)
        marks = None if mask is None else [[bool(m) for m in mask]] * len(clips)
        contact_sheet(clips, args.sheet, labels=prompts, marks=marks)
        print(args.sheet)


if __name__ == "__main__":
    run_cli(main)
