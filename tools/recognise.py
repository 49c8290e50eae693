"""What the judge of Recog@1 takes stickers for: the nearest concepts of each file, whose name is its caption.

    python sample.py --prompt "rocket" "red heart" --out out/ && python tools/recognise.py out/*.webp
"""
import argparse
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib.media.pictures import read_animation, square  # noqa: E402
from lib.media.writing import slug  # noqa: E402
from lib.metrics.distances import on_white  # noqa: E402
from lib.metrics.judge import SHIPPED, JudgeExtractor  # noqa: E402
from lib.run.files import run_cli  # noqa: E402


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="stickers, as sample.py names them: red-heart.webp")
    parser.add_argument("--judge", default=str(SHIPPED), help="default: %(default)s")
    args = parser.parse_args(argv)
    judge, hits = JudgeExtractor(args.judge), []
    for file in map(Path, args.files):
        clip = square(read_animation(file)[0], 64)
        embedding = judge(np.round(on_white(clip) * 255).astype(np.uint8)[None])
        order = (embedding @ judge.net.places.float().numpy().T)[0].argsort()[::-1]
        nearest = [judge.net.concepts[i] for i in order]
        places = {slug(name): place for place, name in reversed(list(enumerate(nearest, 1)))}
        rank = places.get(slug(file.stem)) or places.get(re.sub(r"-\d+$", "", slug(file.stem)))  # NAME-2: a second one
        hits.append(rank == 1)
        place = f"its caption is number {rank}" if rank else "its caption is no concept that the judge has"
        print(f"{file}: {', '.join(nearest[:3])} ({place})")
    print(f"{sum(hits)} of {len(hits)} recognised among {len(judge.net.concepts)} concepts")


if __name__ == "__main__":
    run_cli(main)
