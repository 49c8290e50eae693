"""The command line of data.py."""
import argparse
from pathlib import Path

from lib.media import sources
from lib.media.pictures import MAX_DECODED, MAX_FRAMES
from lib.media.vectors import JUDGING
from lib.run.files import UserError
from lib.run.options import check_least, check_most


def parse_options(doc, argv=None):
    """The options, checked. doc: of the script."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    names = "fluent", "emoji", "vsd2m", "folder", "long-tail", "mirrored", "varied", "synthetic"
    add = {name: commands.add_parser(name).add_argument for name in names}
    parts = list(sources.FLUENT)
    add["fluent"]("--parts", type=int, nargs="+", choices=parts, default=parts, help="which packages")
    add["emoji"]("--hold-out", choices=("fluent", "all"), default="fluent", help="styles whose drawings of held-out "
                 "concepts are not trained on (default: %(default)s)")
    add["emoji"]("--styles", nargs="+", choices=sources.STYLES, default=list(sources.STILLS),
                 help=f"for measuring alone: {', '.join(JUDGING)} (default: {' '.join(sources.STILLS)})")
    add["emoji"]("--moving", action="store_true", help="move each still by a motion that its caption names")
    add["vsd2m"]("manifest")
    add["vsd2m"]("--root", required=True, help="folder that visual_path is relative to")
    add["vsd2m"]("--limit", type=int, help="use the first lines alone")
    add["folder"]("folder")
    add["long-tail"]("set", help="prepared set whose training stickers keep 2 to 8 frames, most of them few")
    add["mirrored"]("set", help="prepared set whose moving training stickers are mirrored")
    add["varied"]("set", help="prepared set whose moving training stickers are turned, moved, sized and coloured anew")
    add["varied"]("--seed", type=int, default=0, help="of the changes: another one for another copy")
    add["synthetic"]("--n", type=int, default=64, help="stickers to draw")
    for name in ("vsd2m", "folder"):
        add[name]("--allow-outside", action="store_true", help="read files outside the folder too")
    for name in add:
        add[name]("--out", default=f"data/{name}", help="prepared set to write")
        add[name]("--workers", type=int, default=2, help="decoding processes")
        if name not in sources.OF_A_SET:     # which have those of their set
            add[name]("--size", type=int, default=64, help="pixels a side")
            add[name]("--most-frames", type=int, default=MAX_FRAMES, help="frames of a long clip in the set")
    o = parser.parse_args(argv)
    least = dict(size=1, workers=1, most_frames=1, n=1, limit=1, seed=0)
    check_least(o, **{name: least[name] for name in least if name in o})
    if o.command not in sources.OF_A_SET:
        check_most(o, size=1024, most_frames=MAX_DECODED)
    if not Path(o.out).name:
        raise UserError(f"--out {o.out}: name the folder to write")
    return o
