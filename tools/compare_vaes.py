"""Two VAEs on the same held-out stickers, prepared at two sizes: the smaller pictures are enlarged and then measured.

    python tools/compare_vaes.py --data data/demo128 data/fluent --vae runs/vae128 checkpoints/mini-vae.safetensors
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import StickerSet  # noqa: E402
from lib.media.pictures import check_sheet, contact_sheet, square, to_rgba, to_tensor  # noqa: E402
from lib.metrics.distances import bootstrap, on_white  # noqa: E402
from lib.metrics.tables import markdown, with_interval  # noqa: E402
from lib.nets.autoencoder import load_vae  # noqa: E402
from lib.run.files import UserError, run_cli  # noqa: E402


def shared_frames(large, small):
    """Numbers (n, 2) of the first and the middle frames that two StickerSets have of the same files, in order."""
    there = {record["file"]: record for record in small.records}
    pairs = [(a, there[a["file"]]) for a in large.records if a["file"] in there and there[a["file"]]["n"] == a["n"]]
    return np.array([(a["first"] + i, b["first"] + i) for a, b in pairs for i in sorted({0, a["n"] // 2})], int)


@torch.no_grad()
def round_trip(vae, frames, batch=16):
    """(n, S, S, 4) uint8 -> the same by mean latents."""
    images = vae.images(to_tensor(frames)).split(batch)
    return to_rgba(torch.cat([vae.decode(vae.encode(x)).clamp(-1, 1) for x in images]))


def decibels(frames, white):
    """PSNR of each of (n, S, S, 4) uint8 to (n, S, S, 3) in 0..1, on white."""
    return -10 * np.log10(((on_white(frames) - white) ** 2).mean((1, 2, 3)).clip(1e-10))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs=2, required=True, metavar="DIR", help="prepared sets, the larger first")
    parser.add_argument("--vae", nargs=2, required=True, metavar="FILE", help="a VAE for each")
    parser.add_argument("--sheet", help="PNG of eight of them, the real ones first")
    args = parser.parse_args(argv)
    check_sheet(args.sheet)
    sets, vaes = [StickerSet(folder, "test") for folder in args.data], [load_vae(file)[0] for file in args.vae]
    for s, vae, file in zip(sets, vaes, args.vae, strict=True):
        if s.size != vae.config.size:
            raise UserError(f"--vae {file}: of {vae.config.size} px, and {s.folder} has {s.size}")
    numbers = shared_frames(*sets)
    if not len(numbers):
        raise UserError(f"--data {' '.join(args.data)}: no held-out sticker is in both")
    size = sets[0].size
    real, small = (s.frames[n] for s, n in zip(sets, numbers.T, strict=True))
    found = {f"{size} px": real, f"{size} px by its VAE": round_trip(vaes[0], real),
             f"{sets[1].size} px, enlarged": square(small, size),
             f"{sets[1].size} px by its VAE, enlarged": square(round_trip(vaes[1], small), size)}
    names = list(found)[1:]
    white = on_white(real)
    values = {name: decibels(found[name], white) for name in names}
    gains = {name: v - values[names[0]] for name, v in values.items()}
    rows = [[name, *(with_interval(x.mean(), bootstrap(x)) for x in (values[name], gains[name]))] for name in names]
    rows[0][2] = "-"
    print(markdown([f"{len(numbers)} held-out frames on white", "PSNR, dB", "minus the first"], rows))
    if args.sheet:
        shown = np.linspace(0, len(numbers) - 1, min(8, len(numbers))).astype(int)
        contact_sheet([clip[shown] for clip in found.values()], args.sheet, labels=list(found), scale=1)


if __name__ == "__main__":
    run_cli(main)
