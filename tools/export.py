"""A trained model in bfloat16, to share: half the bytes of model.safetensors, read by everything that reads that.

    python tools/export.py runs/vae/model.safetensors checkpoints/mini-vae.safetensors
    python tools/export.py runs/dfgn/model.safetensors checkpoints/mini.safetensors
    python tools/export.py ... --set sampling.text_scale=2      # as chosen on the val split after the training

Matrices and kernels become bfloat16; biases, norms and the latents' statistics, the small rest, stay float32.
Export the VAE before the DFGN is trained: a DFGN knows its VAE by the file's hash.
"""
import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib.nets.weights import is_own, model_file, read_metadata, save_model  # noqa: E402
from lib.run.files import UserError, check_outputs, run_cli  # noqa: E402
from lib.run.options import apply_changes  # noqa: E402
from model import Config  # noqa: E402


def halve(weights):
    """{name: tensor} with bfloat16 in the place of float32 where a tensor has two dimensions or more."""
    return {name: w.bfloat16() if w.is_floating_point() and w.dim() > 1 else w for name, w in weights.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model.safetensors of a run")
    parser.add_argument("out", help="file to write")
    parser.add_argument("--set", nargs="+", default=[], metavar="sampling.FIELD=VALUE", help="change how it is sampled")
    args = parser.parse_args(argv)
    args.model = model_file(args.model)
    if not is_own(args.model):
        raise UserError(f"{args.model}: not a model.safetensors that train.py wrote")
    check_outputs([("OUT", args.out)], [("MODEL", args.model)])
    metadata = read_metadata(args.model)
    if args.set:
        sampling = asdict(Config.from_dict(metadata["config"]).sampling)
        metadata["config"].update(apply_changes(dict(sampling=sampling), args.set))
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        save_model(args.out, halve(load_file(args.model)), **metadata)
    print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_cli(main)
