"""The command line of sample.py."""
import argparse

from lib.media.pictures import check_sheet
from lib.media.writing import PLATFORMS
from lib.run.files import UserError
from lib.run.options import check_least, flag


def parse_options(doc, tasks, argv=None):
    """The options, checked. doc: of the script. tasks: those of --task."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", nargs="+", default=[], help="captions, one or more stickers each")
    parser.add_argument("--image", help="first frame (it2v with --prompt, i2v without)")
    parser.add_argument("--frames", help="animation whose frames are given")
    parser.add_argument("--task", choices=tasks, help="default: it2v, i2v with --image, interpolation with --frames")
    parser.add_argument("--model", help="model.safetensors of a run; default: the one in checkpoints/")
    parser.add_argument("--vae", help="default: the file that the model was trained with")
    parser.add_argument("--clip-weights", help="open_clip weights of the text tower; default: the training's")
    parser.add_argument("--num", type=int, default=1, help="stickers per prompt")
    parser.add_argument("--batch", type=int, default=8, help="stickers made at once; changes speed and memory alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="DDIM steps; this and the next four are the model's by default "
                        "(paper 50; mini 10)")
    parser.add_argument("--order", type=int, choices=(1, 2), help="of the steps (paper 1; mini 2)")
    parser.add_argument("--eta", type=float, help="fresh noise of DDIM, 0..1 (paper 1; mini 0)")
    parser.add_argument("--text-scale", type=float, help="text guidance (paper 7.5; mini 3, 1 where frames are given)")
    parser.add_argument("--image-scale", type=float, help="guidance of the given frames (paper 7.5; mini 1.5)")
    parser.add_argument("--duration", type=int, help="milliseconds a frame; default: as in --frames, or else 125")
    parser.add_argument("--out", help="file (.webp, .gif, .png) or folder to write; default: PROMPT.webp")
    parser.add_argument("--sheet", help="PNG contact sheet of all stickers")
    parser.add_argument("--for", dest="platform", choices=sorted(PLATFORMS), help="obey a platform's limits")
    args = parser.parse_args(argv)
    check(args)
    return args


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
    check_least(args, num=1, batch=1, duration=1, seed=0)
    check_sampling(args)
    check_sheet(args.sheet)


def check_sampling(args):
    """UserError for steps, eta or guidance scales, of sample.py or evaluate.py, that no sampler could take."""
    check_least(args, steps=1)
    if not 0 <= (args.eta or 0) <= 1:
        raise UserError(f"--eta {args.eta}: choose 0 (no fresh noise) to 1 (as much as DDPM)")
    for name in ("text_scale", "image_scale"):
        if not abs(getattr(args, name) or 0) < 1000:
            raise UserError(f"{flag(name)} {getattr(args, name)}: choose a number such as 3")
