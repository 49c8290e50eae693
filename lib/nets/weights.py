"""Model files: weights that are not trusted, our own models, Stable Diffusion's VAE, open_clip's text towers.

Nothing in a file is executed (safetensors, torch.load(weights_only=True)); sizes are checked before memory is taken."""
import hashlib
import json
import os
import re
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lib.run.files import UserError, atomic_write, file_hash, first_line


# ---- reading
def read_checkpoint(path, **options):
    """What torch.save wrote: tensors and plain values. ValueError or UnpicklingError for a file of anything else."""
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            if file.read(2)[:1] not in (b"\x80", b"P"):                   # a pickle's first byte, a ZIP archive's
                raise ValueError("not a file that torch.save wrote")
    else:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        if any("/code/" in member.filename for member in members):
            raise ValueError("a TorchScript archive, which holds code; take its .safetensors file or state_dict, or, "
                             "where you trust it, torch.save(torch.jit.load(FILE).state_dict(), OTHER)")
        if sum(member.file_size for member in members) > os.path.getsize(path):
            raise ValueError("unpacks to more than the file is long; torch.save compresses nothing")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, **options)
    except UnpicklingError as error:             # torch's own message advises to load the file without the guard
        objects = "it holds other Python objects too, which could run code; take its .safetensors file or state_dict"
        raise UnpicklingError(objects if "Unsupported" in str(error) else "damaged, or of another kind") from None
    if found is None:
        raise ValueError("holds nothing")
    return found


def read_weights(path, option, prefixes=("",)):
    """{name: tensor} of a .safetensors file, or of one that torch.save wrote, which may be nested as "state_dict".

    prefixes: beginnings of the names that are wanted, a tuple; the file is mapped, so that others cost no memory."""
    if not Path(path).is_file():
        raise UserError(f"{option} {path}: no such file")
    try:
        if Path(path).suffix.lower() == ".safetensors":
            with safe_open(str(path), "pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefixes)}
        else:
            found = read_checkpoint(path, mmap=zipfile.is_zipfile(path))
    except Exception as error:                   # a file of another kind may raise nearly anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{option} {path}: cannot be read as weights ({reason})") from None
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    weights = {k: w for k, w in found.items() if str(k).startswith(prefixes)} if isinstance(found, dict) else {}
    plain = [torch.is_tensor(w) and w.device.type == "cpu" and w.layout == torch.strided for w in weights.values()]
    if not plain or not all(plain):
        wanted = f" that begins with {', '.join(prefixes)}" if any(prefixes) else ""
        raise UserError(f"{option} {path}: holds no weights by name{wanted}")
    return weights


def check_fit(net, weights, option, path):
    """UserError names what is missing, unknown or of another shape. The network may be on the meta device."""
    wanted = net.state_dict()
    wrong = {"missing": wanted.keys() - weights.keys(), "unknown": weights.keys() - wanted.keys(), "of another shape": [
        f"{k} {tuple(v.shape)} instead of {tuple(wanted[k].shape)}"
        for k, v in weights.items() if k in wanted and v.shape != wanted[k].shape]}
    reasons = [f"{what} {len(names)} ({', '.join(sorted(map(str, names))[:3])}{', ...' if len(names) > 3 else ''})"
               for what, names in wrong.items() if names]
    if reasons:
        raise UserError(f"{option} {path}: not the weights of {type(net).__name__}: {'; '.join(reasons)}".lstrip())


def load_strict(net, weights, option, path, assign=False):
    """`net` with the weights, in eval mode and frozen. UserError unless they fit; batch norm's counters may be missing.

    assign: the tensors themselves become the parameters, of a network on the meta device."""
    weights = {**{k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")}, **weights}
    check_fit(net, weights, option, path)
    net.load_state_dict(weights, assign=assign)
    return net.eval().requires_grad_(False)


def load_fitting(net, weights, path, say):
    """Load what fits by name and shape; the rest of `net` stays as it is and is named in a line if `say`. -> its names.

    UserError where it is more than half of the parameters."""
    own = net.state_dict()
    new = [k for k, w in own.items() if k not in weights or weights[k].shape != w.shape]
    share = sum(own[k].numel() for k in new) / sum(w.numel() for w in own.values())
    if share > 0.5:
        raise UserError(f"--base {path}: only {1 - share:.0%} of the parameters are there in this shape")
    if new and say:
        parts = dict.fromkeys(k.rpartition(".")[0] for k in new)
        print(f"--base {path}: {share:.1%} of the parameters start anew: {', '.join(parts)}")
    net.load_state_dict({**own, **{k: weights[k] for k in own.keys() - set(new)}})
    return new


def model_file(path):
    """The file of weights in a folder: a run's, or one of a VAE as diffusers lays it out; a file's path as it is."""
    names = ("model.safetensors", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors",
             "diffusion_pytorch_model.bin")
    if not Path(path).is_dir():
        return path
    found = next((Path(path) / name for name in names if (Path(path) / name).is_file()), None)
    if found is None:
        advice = "; the command that trained it writes it again" if (Path(path) / "state.pt").is_file() else ""
        raise UserError(f"{path}: a folder without {names[0]}{advice}")
    return found


# ---- our own model.safetensors
OURS = "rdtf"                                    # the key of all our metadata


def save_model(path, weights, **metadata):
    """Weights as .safetensors, atomically; metadata values must be JSON-able. Equal contents are equal files."""
    weights = {k: v.detach().cpu().contiguous() for k, v in weights.items()}

    def write(temporary):
        temporary.touch()
        mode = temporary.stat().st_mode          # safetensors itself writes files that nobody else may read
        # One key: safetensors writes several in an order of its own, another one in each process.
        save_file(weights, temporary, metadata={OURS: json.dumps(metadata, sort_keys=True)})
        temporary.chmod(mode)
    atomic_write(path, write)


def read_metadata(path):
    """The metadata that save_model was given. ValueError: of a file that something else wrote."""
    with safe_open(str(path), "pt") as file:
        found = file.metadata() or {}
    if OURS in found:
        return dict(json.loads(found[OURS]))
    return {k: json.loads(v) for k, v in found.items()}          # a key for each, as it was once


def is_own(path, kind=None):
    """True for a file that save_model wrote, of a kind if one is named."""
    try:
        found = read_metadata(path).get("kind")
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError):
        return False
    return found is not None and kind in (None, found)


def identity(path):
    """By what a model is known: the SHA-256 of its tensors and configuration; of a file that is not ours, its bytes'.

    So a file's header, its place and what else it says (where its VAE lay, the step, how it is sampled if nobody says
    otherwise) change nothing."""
    path = model_file(path)
    if not is_own(path):
        return file_hash(path)
    metadata, digest = read_metadata(path), hashlib.sha256()
    config = metadata.get("config", {})
    parts = {k: v for k, v in config.items() if k == "vae" or metadata["kind"] != "vae" and k != "sampling"}
    digest.update(json.dumps([metadata["kind"], parts, metadata.get("base")], sort_keys=True).encode())
    with safe_open(str(path), "pt") as file:
        for name in sorted(file.keys()):
            w = file.get_tensor(name)
            digest.update(f"{name} {w.dtype} {list(w.shape)}".encode())
            digest.update(w.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def names_of(path):
    """All by which a model may be known to others: its identity and, as in files written before there was one, its
    file's hash."""
    return {identity(path), file_hash(model_file(path))}


def check_metadata(path, metadata, kind):
    """UserError for metadata that train.py does not write for this kind of model."""
    if metadata.get("kind") != kind:
        raise UserError(f"{path}: holds {metadata.get('kind', 'something else')!r}, {kind!r} is needed")
    types = dict(vocabulary=str) if kind == "minilm" else dict(
        config=dict, step=int, **(dict(vae=str, vae_file=str) if kind != "vae" else {}),
        **(dict(method=str, rank=int, base=str, base_file=str) if kind == "adapter" else {}))
    wrong = [name for name, wanted in types.items() if type(metadata.get(name)) is not wanted]
    if wrong:
        raise UserError(f"{path}: not what train.py writes (metadata.{wrong[0]} is missing or of another type)")


def what_is_wrong(path, error):
    """Why a file of weights cannot be read."""
    with open(path, "rb") as file:
        pointer = file.read(40).startswith(b"version https://git-lfs")
    return "a pointer of git-lfs; `git lfs pull` fetches the file" if pointer else first_line(error)


def read_own(path, kind, advice):
    """(metadata, weights) of a file that train.py wrote; UserError for any other.

    kind: "vae", "dfgn" or "adapter". advice: end of the message where there is no file."""
    path = model_file(path)
    if not Path(path).is_file():
        state = Path(path).with_name("state.pt").is_file()
        again = "the command that trained it writes it again" if state else advice
        raise UserError(f"{path}: no such model; {again}")
    try:
        metadata, weights = read_metadata(path), load_file(path)
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not a readable .safetensors model ({what_is_wrong(path, error)})") from None
    check_metadata(path, metadata, kind)
    return metadata, {current(name): w for name, w in weights.items()}


def current(name):
    """The name that a weight of a file from before the stem was a module has now."""
    for old, new in (("dfgn.known.", "dfgn.stem.known."), ("dfgn.condition.conv.", "dfgn.stem.condition."),
                     ("dfgn.stem.weight", "dfgn.stem.conv.weight"), ("dfgn.stem.bias", "dfgn.stem.conv.bias")):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def load_model(path, kind, build, advice):
    """(network in eval mode and frozen, metadata) of a file that train.py wrote; UserError for any other.

    build(configuration) -> network; it runs on the meta device first, which takes no memory."""
    metadata, weights = read_own(path, kind, advice)
    config = metadata["config"]
    try:
        parts = [part for part in config.values() if isinstance(part, dict)]
        if any(part.get("layers", 0) * len(part.get("widths", "1")) > len(weights) for part in parts):
            raise ValueError("more layers than the file has weights")     # slow to build even on the meta device
        with torch.device("meta"):
            net = build(config)
    except (TypeError, ValueError, AttributeError, RuntimeError, LookupError, ArithmeticError) as error:
        reason = first_line(error)
        raise UserError(f"{path}: its configuration is not of this version of model.py ({reason})") from None
    check_fit(net, weights, "", path)
    return load_strict(build(config), weights, "", path), metadata


def find_file(model, file):
    """A file that a model names, also where the training's folder is not the current one; None: it is gone."""
    folders = (Path(), *Path(model).resolve().parents)
    return next((model_file(folder / file) for folder in folders if (folder / file).exists()), None)


# ---- Stable Diffusion's VAE
SD_PREFIXES = ("first_stage_model.", "encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
SD_SCALE = 0.18215                               # of Stable Diffusion 1 and 2: latents times it: deviation near 1


def sd_vae_weights(weights, levels=4):
    """{name: tensor} of the VAE in Stable Diffusion's weights: a VAE alone, or a full checkpoint.

    Named as in diffusers (autoencoder_kl.py), before or after its attention was renamed, or as in CompVis's latent
    diffusion (model.py, autoencoder.py). ValueError for two tensors of one name."""
    patterns = (
        (r"\.down\.(\d+)\.", r".down_blocks.\1."),
        (r"\.up\.(\d+)\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}."),
        (r"_blocks\.(\d+)\.block\.", r"_blocks.\1.resnets."), (r"\.(up|down)sample\.", r".\1samplers.0."),
        (r"\.nin_shortcut\.", ".conv_shortcut."), (r"\.norm_out\.", ".conv_norm_out."),
        (r"\.mid\.block_(\d+)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}."),
        (r"\.mid\.attn_1\.", ".mid_block.attentions.0."), (r"\.attentions\.0\.norm\.", ".attentions.0.group_norm."),
        (r"\.attentions\.0\.([qkv])(uery|ey|alue)?\.", r".attentions.0.to_\1."),
        (r"\.attentions\.0\.proj_(out|attn)\.", ".attentions.0.to_out.0."))
    full = {k.removeprefix(SD_PREFIXES[0]): v for k, v in weights.items() if k.startswith(SD_PREFIXES[0])}
    named = {}
    for theirs, w in (full or weights).items():
        if theirs.startswith(("loss.", "model_ema.")):  # of the VAE's own training
            continue
        ours = theirs                                                    # the patterns change it one after another
        for pattern, new in patterns:
            ours = re.sub(pattern, new, ours)
        if ours in named:
            raise ValueError(f"{theirs}: a second tensor for {ours}")
        is_conv = ".attentions." in ours and w.shape[2:] == (1, 1)       # CompVis's attention; ours is linear
        named[ours] = w.flatten(1) if is_conv else w
    return named


def read_sd_vae(path):
    """{name: tensor} of the VAE in a file of Stable Diffusion's weights. UserError for any other."""
    try:
        return sd_vae_weights(read_weights(path, "--vae", SD_PREFIXES))
    except ValueError as error:
        raise UserError(f"--vae {path}: {error}") from None
