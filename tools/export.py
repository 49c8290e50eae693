"""A trained model in bfloat16, to share: half the bytes of model.safetensors, read by everything that reads that.

    python tools/export.py runs/vae/model.safetensors checkpoints/mini-vae.safetensors
    python tools/export.py runs/dfgn/model.safetensors checkpoints/mini.safetensors
    python tools/export.py ... --set sampling.text_scale=2      # as chosen on the val split after the training
    python tools/export.py ... --average before.safetensors     # the mean of what was tuned and of what it began from

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

from lib.nets.grow import grow_dfgn  # noqa: E402
from lib.nets.weights import is_own, model_file, read_metadata, save_model  # noqa: E402
from lib.run.files import UserError, check_outputs, run_cli  # noqa: E402
from lib.run.options import apply_changes, check_config  # noqa: E402
from model import Config  # noqa: E402


def halve(weights):
    """{name: tensor} with bfloat16 in the place of float32 where a tensor has two dimensions or more."""
    return {name: w.bfloat16() if w.is_floating_point() and w.dim() > 1 else w for name, w in weights.items()}


def average(weights, metadata, path):
    """The means of these weights and another model's, of which they were tuned, as Wortsman et al. 2022 (WiSE-FT). The
    sentences of the learnt concepts stay these; where these weights were grown from the others (lib/nets/grow.py), what
    those lack stays, too. UserError: another kind, VAE, shape or vocabulary."""
    path = model_file(path)
    other, theirs = (load_file(path), read_metadata(path)) if is_own(path) else ({}, {})
    if metadata["kind"] == theirs.get("kind") == "dfgn" and metadata.get("grown_from") == theirs["vae"]:
        other, theirs = grow_dfgn(other, weights), {**theirs, "vae": metadata["vae"]}
    names = weights.keys() - {"text.concepts"}
    floats = {name for name in names if weights[name].is_floating_point()}
    alike = (all(theirs.get(fact) == metadata.get(fact) for fact in ("kind", "vae")) and
             all(name in other and other[name].shape == weights[name].shape for name in names) and
             all(torch.equal(weights[name], other[name]) for name in names - floats))
    if not alike:
        raise UserError(f"--average {path}: not a model of the same layers, VAE and words")
    return {**weights, **{name: (weights[name].float() + other[name].float()) / 2 for name in floats}}


def resampled(config, changes):
    """A DFGN's configuration {part: {field: value}} with changes of its sampling. UserError: they do not fit."""
    try:
        changed = {**config, **apply_changes(dict(sampling=asdict(Config.from_dict(config).sampling)), changes)}
        check_config(Config.from_dict(changed))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--set {' '.join(changes)}: {error}") from None
    return changed


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model.safetensors of a run")
    parser.add_argument("out", help="file to write")
    parser.add_argument("--set", nargs="+", default=[], metavar="sampling.FIELD=VALUE", help="change how it is sampled")
    parser.add_argument("--average", metavar="FILE", help="take the mean with these weights, of which MODEL was tuned")
    args = parser.parse_args(argv)
    args.model = model_file(args.model)
    if not is_own(args.model):
        raise UserError(f"{args.model}: not a model.safetensors that train.py wrote")
    check_outputs([("OUT", args.out)], [("MODEL", args.model)])
    metadata, weights = read_metadata(args.model), load_file(args.model)
    if args.average:
        weights = average(weights, metadata, args.average)
    if args.set:
        if metadata.get("kind") not in ("dfgn", "adapter"):
            raise UserError(f"--set {' '.join(args.set)}: {args.model} holds no DFGN, nothing of it is sampled")
        metadata["config"] = resampled(metadata["config"], args.set)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        save_model(args.out, halve(weights), **metadata)
    print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_cli(main)
