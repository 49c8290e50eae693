"""A trained model in bfloat16, to share: half the bytes of model.safetensors, read by everything that reads that.

    python tools/export.py runs/vae/model.safetensors checkpoints/mini-vae.safetensors
    python tools/export.py runs/dfgn/model.safetensors checkpoints/mini.safetensors

Matrices and kernels become bfloat16; biases, norms and the latents' statistics, the small rest, stay float32.
Export the VAE before the DFGN is trained: a DFGN knows its VAE by the file's hash.
"""
import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib.files import UserError, run_cli  # noqa: E402
from lib.weights import is_own, read_metadata, save_model  # noqa: E402


def halve(weights):
    """{name: tensor} with bfloat16 in the place of float32 where a tensor has two dimensions or more."""
    return {name: w.bfloat16() if w.is_floating_point() and w.dim() > 1 else w for name, w in weights.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model.safetensors of a run")
    parser.add_argument("out", help="file to write")
    args = parser.parse_args(argv)
    if not is_own(args.model):
        raise UserError(f"{args.model}: not a model.safetensors that train.py wrote")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        save_model(args.out, halve(load_file(args.model)), **read_metadata(args.model))
    print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_cli(main)
