"""The command line of evaluate.py."""
import argparse

from lib.media.pictures import check_sheet
from lib.metrics.judge import SHIPPED
from lib.run.files import UserError
from lib.run.options import check_least
from lib.run.sample_options import check_sampling


def parse_options(doc, tasks, numbers, argv=None):
    """The options, checked. doc: of the script. tasks, numbers: those of --tasks and --table."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--compare", nargs="+", metavar="RUN", help="print a row for each of these evaluated runs")
    add("--table", choices=numbers, help="print a table of the paper, its numbers beside ours")
    add = parser.add_argument
    add("--run", default="runs/dfgn", help="folder with model.safetensors, or such a file (default: %(default)s)")
    add("--rows", nargs="+", default=[], metavar="NAME=PATTERN", help="of --table: run folders, one for each seed")
    add("--data", help="prepared set; default: that of the run, or of the first of --rows")
    add("--split", choices=("train", "val", "test"), default="test", help="default: %(default)s")
    add("--groups", nargs="+", help="emoji groups to evaluate on; default: the run's, of another --data all")
    add("--tasks", nargs="+", choices=tasks, default=list(tasks), help="default: all six")
    add("--n", type=int, default=256, help="concepts, one clip each, or as many as there are (default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--batch", type=int, default=16, help="clips made at once; changes no clip (default: %(default)s)")
    add("--vae", help="default: the file that the model was trained with")
    add("--clip-weights", help="text tower that the model was trained with; not of the CLIP metric")
    add("--steps", type=int, help="DDIM steps; this and the next four are the preset's by default, as in sample.py")
    add("--order", type=int, choices=(1, 2), help="of the steps")
    add("--eta", type=float, help="fresh noise of DDIM, 0..1")
    add("--text-scale", type=float, help="text guidance")
    add("--image-scale", type=float, help="guidance of the given frames")
    add("--sheet", help="PNG contact sheet to write")
    add("--sheet-rows", type=int, default=8, help="clips of each task on it (default: %(default)s)")
    add("--out", help="JSON with all numbers (default: RUN/eval.json, out/table-N.json)")
    add("--judge", default=str(SHIPPED), help="network of Recog@1, of tools/train_judge.py (default: %(default)s)")
    add = parser.add_argument_group("published weights, local files; each brings its metric").add_argument
    add("--i3d", metavar="FILE", help="I3D for FVD: i3d_pretrained_400.pt, rgb_imagenet.pt, or i3d_torchscript.pt")
    add("--i3d-trust", action="store_true", help="run the code that a TorchScript file holds")
    add("--i3d-eps", type=float, help="of its batch norm (default: 1e-3, as TensorFlow's; VideoGPT's port: 1e-5)")
    add("--i3d-frames", choices=("loop", "pingpong", "hold", "pad"), default="loop",
        help="how 8 frames become 16 (default: %(default)s)")
    add("--dover", metavar="FILE", help="DOVER.pth, for VQA")
    add("--clip", metavar="FILE", help="open_clip weights, or a folder with open_clip_config.json, for the CLIP metric")
    add("--clip-model", default="ViT-H-14", help="open_clip's name of that model (default: %(default)s)")
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args):
    check_least(args, n=2, batch=1, sheet_rows=1, seed=0)
    check_sampling(args)
    if bool(args.rows) != bool(args.table):
        raise UserError("--rows \"NAME=PATTERN\" ...: names the runs of --table 1, 2, 3 or 4")
    if args.i3d_eps is not None and args.i3d_eps <= 0:
        raise UserError(f"--i3d-eps {args.i3d_eps}: must be above 0")
    check_sheet(args.sheet)
