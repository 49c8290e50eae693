"""Train the VAE, then the DFGN, on one process or many. The same command again resumes.

    python train.py --stage vae --data data/fluent --out runs/vae
    python train.py --data data/fluent --vae runs/vae/model.safetensors --out runs/dfgn
    torchrun --nproc_per_node=2 train.py ...                      # CPU (gloo) or CUDA (nccl)
    python train.py --set dfgn.temporal=conv3d --out runs/conv3d  # any field of model.Config
    torchrun --nproc_per_node=8 train.py --preset paper --data data/vsd2m --vae sd-vae.safetensors --clip-weights open_clip_pytorch_model.bin
    python train.py --replay runs/dfgn/bad-step-000123.pt         # a step that stopped a run, alone: no data, no VAE, one process

A run folder holds config.json, log.jsonl, state.pt (all that resuming needs), state.prev.pt (the one before) and
model.safetensors (EMA weights, configuration in the metadata: what one shares). A loss or gradient that is not finite stops the run and
leaves bad-step-N.pt, the weights before step N and all processes' samples as the network got them; there is one such file, the newest.
While a process trains there, `lock` names it. SIGTERM and Ctrl-C save and end with status 143 and 130, a second Ctrl-C ends at once; bad input and
full disks end with one line and 2.

Every random draw of global sample n of step s is a function of (seed, s, n) alone: a resumed run equals an uninterrupted one bit
for bit, as does the same command started again on the same machine, in float32 and in bf16, and N ranks see exactly the draws of one.
Another number of threads or ranks sums in another order: the same draws, other last digits.
"""
import argparse
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import zipfile
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from curriculum import Curriculum
from data import (TASKS, ClipDataset, StepSampler, StickerSet, StickerTexts, TextCache, UserError, cond_mask, even_frames, fit_task, latents_ready,
                  hold, open_latents, rng_for, run_cli, settle, text_for, to_tensor, tokenize, write_latents)
from model import PRESETS, RDTF, SD_PARTS, SD_SCALE, SD_VAE, TOWER_PARTS, VAE, Config, Layer, TextTower, count, sd_vae_weights, tower_weights, visible


COMPILER = "inductor"                     # torch.compile's backend; the tests take a faster one
STOPPING = signal.SIGTERM, signal.SIGINT  # save, then end
MAY_CHANGE = {"workers", "log_every", "save_every", "out", "accumulate", "checkpointing", "zero", "compile", "ema_device", "dry_run", "replay",
              "data", "vae", "clip_weights", "clip_model", "precision"}   # when a run goes on; of the last five what they stand for must be the same


@dataclass
class TrainConfig:
    stage: str = "dfgn"                   # vae, or dfgn (which needs a trained vae)
    data: str = "data/fluent"             # prepared set (python data.py)
    groups: list = field(default_factory=list)  # emoji groups to train on; none named: all
    out: str = ""                         # run folder; default runs/<stage>
    preset: str = "mini"                  # tiny, mini, paper
    set: list = field(default_factory=list)  # fields of the preset to change, as part.field=value
    vae: str = "runs/vae/model.safetensors"  # VAE of the dfgn stage: of the vae stage, or Stable Diffusion's weights
    clip_weights: str = ""                # text.kind=open_clip: open_clip's weights, a file or a folder with open_clip_config.json
    clip_model: str = "ViT-H-14"          # open_clip's name of the model whose weights these are; a folder says it itself
    text_variants: int = 4                # text.kind=open_clip: texts of a sticker, the caption and others as word_dropout and keywords draw them
    steps: int = 3000                     # optimiser steps
    batch: int = 4                        # global batch: clips (dfgn) or images (vae); a step of stills takes T times as many
    accumulate: int = 1                   # micro-batches that a process cuts its share of the batch into, one after another in memory
    checkpointing: bool = False           # dfgn: keep the layers' inputs alone and compute the layers again in the backward pass
    zero: bool = False                    # ZeRO-1: each of several processes keeps its share of the optimiser's state
    compile: bool = False                 # torch.compile the network: minutes at the start, faster steps on a GPU
    lr: float = 1e-3                      # peak learning rate
    lr_schedule: str = "cosine"           # cosine (to zero), constant
    warmup: int = 100                     # steps of linear warm-up
    weight_decay: float = 0.01            # AdamW
    grad_clip: float = 1.0                # largest gradient norm
    ema: float = 0.999                    # decay of the averaged weights; rises to it over the first steps
    ema_device: str = "same"              # where the averaged weights are kept: same (as the network), cpu (host memory)
    precision: str = "auto"               # float32, bf16 (autocast), auto: bf16 where the hardware multiplies it
    seed: int = 0
    tasks: list = field(default_factory=list)  # tasks to train on; none named: all six
    curriculum: str = "adaptive"          # none, linear, adaptive
    pid_raw: bool = False                 # feed the bare loss to the curriculum's PID score
    how: str = "mixed"                    # frames of a clip: kmeans (paper), even, mixed (a coin decides)
    frames: str = "step"                  # k of 3..T is drawn per step (no padding), or per sample (paper); full: always T
    still_share: float = 0.5              # share of the steps that train on single frames
    still_first: float = 0.0              # share of the steps, the first ones, that train on single frames alone
    word_dropout: float = 0.2             # a word of a caption becomes "#"
    keywords: float = 0.5                 # keywords are appended to a caption
    text_drop: float = 0.10               # the text alone is dropped
    cond_drop: float = 0.10               # the given frames alone are dropped
    both_drop: float = 0.05               # both are dropped
    workers: int = 0                      # data loading processes; changes nothing but the speed
    log_every: int = 20                   # steps
    save_every: int = 500                 # steps
    replay: str = ""                      # RUN/bad-step-N.pt: compute that step alone and print where it is not finite; --precision, --accumulate, --checkpointing may change
    dry_run: bool = False                 # print what a GPU would hold and compute, and stop; needs no data and no GPU; WORLD_SIZE=8 before it: on 8


# ------------------------------------------------------------------------------------------------ processes, files
def keep_memory():
    """Let glibc keep freed memory for the next tensors: giving it back at once and taking it anew costs a CPU 5 to 8 % of a training step."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)   # musl has none
        mallopt(-4, 0)                                    # M_MMAP_MAX: no block of its own for a large tensor
        mallopt(-1, 2 ** 31 - 1)                          # M_TRIM_THRESHOLD: freed memory stays


def meeting_place(rank, world):
    """Arguments of init_process_group under torchrun, whose store outlives a restart: the dead group's addresses must not be read again.

    A prefix of the restart's number sees to it; but only the node whose process died counts a restart."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    if int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) and int(os.environ["GROUP_WORLD_SIZE"]) > 1:
        raise UserError("torchrun --max-restarts on several nodes: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for it on each of them, or no restart would find together")
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, is_master=False)
    return dict(store=dist.PrefixStore(f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store), rank=rank, world_size=world)


def setup():
    """(rank, world, device) of this process; joins the group that torchrun announces."""
    keep_memory()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        limit = timedelta(hours=1)  # rank 0 may encode latents meanwhile; killed, it goes on where it was. Processes that miss each other give up
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=limit, **meeting_place(rank, world))
    return rank, world, device


def pick_precision(name, device):
    """bf16 only where the hardware multiplies it: elsewhere it is emulated, some 40 times slower than float32."""
    if name not in ("auto", "bf16", "float32"):
        raise UserError(f"--precision {name}: choose auto, bf16 or float32")
    if name != "auto":
        return name
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if fast else "float32"


def send(batch, device):
    """{name: tensor} on the device. From pinned memory the copies wait for nothing.

    The next batch cannot go ahead of its step: which tasks it draws depends on this step's losses. Loader processes do read its latents."""
    pin = device.type == "cuda"
    return {k: (v.pin_memory() if pin else v).to(device, non_blocking=True) for k, v in batch.items()}


def gather(values, world):
    """Concatenate a tensor of equal shape from every rank along its first axis, in rank order."""
    if world == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world)]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def together(work, world):
    """Every rank does its part of the work. Where one cannot, all end: in the next step the others would wait for it."""
    error = None
    try:
        work()
    except (UserError, OSError) as failure:
        error = failure
        if world > 1:                            # said at once: torchrun ends all ranks when the first of them ends
            print(f"error: {error}", file=sys.stderr, flush=True)
    if gather(torch.tensor([float(error is not None)]), world).any():
        raise error if world == 1 else SystemExit(2)


@contextmanager
def writing(path):
    """What goes wrong in writing a file becomes a sentence."""
    from safetensors import SafetensorError
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:       # a full disk is another error to each library
        if "DataLoader worker" in str(error):                       # comes from a signal handler of torch's, anywhere
            raise
        cause = error.__context__ if isinstance(error.__context__, OSError) else error      # torch.save's own says nothing
        reason = getattr(cause, "strerror", None) or first_line(cause)
        raise UserError(f"{path}: cannot be written ({reason}); what was there before stays, the same command goes on from it") from None


def write_atomically(path, write, before=None):
    """write(temporary path), then settle it: a reader sees the old file, which stays where that fails, or the whole new one. before: the old one's new name."""
    temporary = Path(f"{path}.tmp")
    with writing(path):
        try:
            write(temporary)
            settle(temporary, Path(path), before)
        except BaseException:
            temporary.unlink(missing_ok=True)                       # on a full disk it is in the way
            raise


def save_pt(path, value, before=None):
    """torch.save, atomically. before: what the file that was there is to be called."""
    def write(temporary):
        with open(temporary, "wb") as file:                         # as a Python file: what fails in it has a reason
            torch.save(value, file)
    write_atomically(path, write, before)


def file_hash(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # by blocks: a checkpoint may be larger than memory


def save_model(path, weights, **metadata):
    """EMA weights as safetensors; metadata values must be JSON-able."""
    from safetensors.torch import save_file
    weights = {k: v.detach().cpu().contiguous() for k, v in weights.items()}

    def write(temporary):
        temporary.touch()
        mode = temporary.stat().st_mode          # safetensors' own file is for its owner alone
        save_file(weights, temporary, metadata={k: json.dumps(v) for k, v in metadata.items()})
        temporary.chmod(mode)
    write_atomically(path, write)


def read_metadata(path):
    """What save_model was told beside the weights."""
    from safetensors import safe_open
    with safe_open(str(path), "pt") as file:
        return {k: json.loads(v) for k, v in (file.metadata() or {}).items()}


def first_line(error):
    return str(error).partition("\n")[0][:240]


def is_torchscript(path):
    return zipfile.is_zipfile(path) and any("/code/" in name for name in zipfile.ZipFile(path).namelist())


def read_pt(path, **options):
    """What torch.save wrote: tensors and plain values. Code in it is not run, and it takes no more memory than the file is long."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            inside = archive.infolist()
        if is_torchscript(path):
            raise ValueError("a TorchScript archive, which holds code; take the same weights as a .safetensors file or a state_dict, or, where you trust it, "
                             "torch.save(torch.jit.load(FILE).state_dict(), OTHER)")
        if sum(member.file_size for member in inside) > os.path.getsize(path):
            raise ValueError("unpacks to more than the file is long; torch.save compresses nothing")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, **options)
    except UnpicklingError as error:             # torch's words advise to load it anyway
        raise UnpicklingError("it holds other Python objects too, which could run code; take the model's .safetensors file, or save its state_dict alone with torch.save "
                              "where you trust it" if "Unsupported" in str(error) else "damaged, or of another kind") from None
    if found is None:                            # what read_state calls a run that has not begun
        raise ValueError("holds nothing")
    return found


def read_weights(path, option, parts=("",)):
    """{name: tensor} of a .safetensors file, or of one that torch.save wrote (.ckpt, .pt, .pth, .bin), which may be nested as "state_dict".

    parts: beginnings of the names that are wanted. The file is mapped, so that other tensors cost no memory; nothing in it is executed."""
    if not Path(path).is_file():
        raise UserError(f"{option} {path}: no such file")
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors import safe_open
            with safe_open(str(path), "pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys() if name.startswith(parts)}
        else:
            weights = read_pt(path, mmap=zipfile.is_zipfile(path))
    except Exception as error:                   # a file of another kind may raise nearly anything
        raise UserError(f"{option} {path}: cannot be read as weights ({type(error).__name__}: {first_line(error)})") from None
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else weights
    weights = {name: w for name, w in weights.items() if str(name).startswith(parts)} if isinstance(weights, dict) else weights
    if not isinstance(weights, dict) or not weights or not all(map(is_plain, weights.values())):
        raise UserError(f"{option} {path}: holds no weights by name" + (f" that begins with {', '.join(parts)}" if any(parts) else ""))
    return weights


def some(names, most=3):
    return f"{len(names)} ({', '.join(sorted(map(str, names))[:most])}{', ...' if len(names) > most else ''})"


def is_plain(x):
    """A tensor of numbers in host memory; files may also hold sparse ones, and ones without numbers."""
    return torch.is_tensor(x) and x.device.type == "cpu" and x.layout == torch.strided


def differs(found, wanted, where):
    """Where what a file holds is not built like `wanted`, in words: keys, types, shapes. None where it is.

    wanted: [x, ...] is a list of any length, {str: x} a dictionary of any names, ... anything."""
    said = lambda x: f"{x.dtype} {tuple(x.shape)}" if torch.is_tensor(x) else type(x).__name__
    if wanted is ...:
        return None
    if torch.is_tensor(wanted):
        return None if is_plain(found) and said(found) == said(wanted) else f"{where} is {said(found)} instead of {said(wanted)}"
    if type(found) is not type(wanted) and not (isinstance(found, dict) and isinstance(wanted, dict)):
        return f"{where} is {said(found)} instead of {said(wanted)}"
    if not isinstance(wanted, (dict, list, tuple)):
        return None
    if isinstance(wanted, dict):
        wanted = dict.fromkeys(found, wanted[str]) if str in wanted else wanted
    else:
        wanted = wanted[:1] * len(found) if ... in wanted[1:] else wanted
        found, wanted = dict(enumerate(found)), dict(enumerate(wanted))
    reasons = [f"{what} {some(names)}" for what, names in (("missing", wanted.keys() - found.keys()), ("unknown", found.keys() - wanted.keys())) if names]
    if reasons:
        return f"{where}: {'; '.join(reasons)}"
    return next(filter(None, (differs(found[k], wanted[k], f"{where}.{k}") for k in wanted)), None)


def check_fit(net, weights, option, path):
    """UserError says which names and shapes are not the network's. Nothing is allocated for the weights of a network on the meta device."""
    own = net.state_dict()
    wrong = [f"{k} {tuple(v.shape)} instead of {tuple(own[k].shape)}" for k, v in weights.items() if k in own and v.shape != own[k].shape]
    reasons = [f"{what} {some(names)}" for what, names in (("missing", own.keys() - weights.keys()), ("unknown", weights.keys() - own.keys()),
                                                          ("of another shape", wrong)) if names]
    if reasons:
        raise UserError(f"{option} {path}: not the weights of {type(net).__name__}: {'; '.join(reasons)}".lstrip())


def fit_weights(net, weights, option, path, assign=False):
    """Load strictly, in eval mode and frozen; UserError says which names and shapes are wrong. Counters of batch norm may be missing.

    assign: the tensors themselves become the parameters, of a network on the meta device."""
    weights = {**{k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")}, **weights}
    check_fit(net, weights, option, path)
    net.load_state_dict(weights, assign=assign)
    return net.eval().requires_grad_(False)


def read_model(path, kind, missing):
    """(weights, metadata) of a file that save_model wrote for this kind. UserError for any other; `missing` says what to do without one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    if not Path(path).is_file():
        raise UserError(f"{path}: {missing}")
    try:
        metadata, weights = read_metadata(path), load_file(path)
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not a readable .safetensors model ({error})") from None
    if metadata.get("kind") != kind:
        raise UserError(f"{path}: holds {metadata.get('kind', 'something else')!r}, {kind!r} is needed")
    return weights, metadata


def network(kind, preset):
    return VAE(preset.vae) if kind == "vae" else RDTF(preset)


def made_for(weights, kind, config, option, path):
    """The network of a configuration, as a file says it, with the weights beside it. UserError if they are not of each other, before memory is taken."""
    try:
        config = Config.from_dict(dict(vae=config["vae"]) if kind == "vae" else config)
        if max(part.layers * len(getattr(part, "widths", "1")) for part in ([config.vae] if kind == "vae" else [config.text, config.dfgn])) > len(weights):
            raise ValueError("more layers than the file has weights")
        with torch.device("meta"):
            check_fit(network(kind, config), weights, option, path)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, LookupError, ArithmeticError) as error:
        raise UserError(f"{option} {path}: its configuration is not of this version of model.py ({error})".lstrip()) from None
    net = network(kind, config)
    net.load_state_dict(weights)
    return net


def load_model(path, kind):
    """(network in eval mode, metadata) from a model.safetensors; kind "vae" or "dfgn", "vae" also from Stable Diffusion's weights. UserError for any other file."""
    if kind == "vae" and Path(path).is_file() and not is_saved(path):
        return load_sd_vae(path)
    weights, metadata = read_model(path, kind, f"no such model; train one with `python train.py{' --stage vae' if kind == 'vae' else ''}`")
    wanted = dict(config={str: ...}, step=0, **(dict(vae="", vae_file="") if kind == "dfgn" else {}))
    wanted.update(dict(text=dict(file="", model="", hash="")) if "text" in metadata else {})
    if reason := differs({k: v for k, v in metadata.items() if k in wanted}, wanted, "metadata"):
        raise UserError(f"{path}: not what train.py writes ({reason})")
    return made_for(weights, kind, metadata["config"], "", path).eval().requires_grad_(False), metadata


def is_saved(path):
    """Has save_model written this file?"""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(str(path), "pt") as file:
            return "kind" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def load_sd_vae(path):
    """(VAE in eval mode, metadata) from Stable Diffusion's weights, a VAE or a full checkpoint, in float32. Its latents are standardised by the scaling factor."""
    try:
        weights = sd_vae_weights(read_weights(path, "--vae", SD_PARTS))
    except ValueError as error:
        raise UserError(f"--vae {path}: {error}") from None
    net = VAE(SD_VAE)
    statistics = dict(latent_mean=torch.zeros_like(net.latent_mean), latent_std=torch.full_like(net.latent_std, 1 / SD_SCALE))
    return fit_weights(net, {**weights, **statistics}, "--vae", path), dict(kind="vae", config=dict(vae=asdict(SD_VAE)), any_size=True)


def find_clip(path, name, option):
    """(file of weights, open_clip's configuration) of a local file and open_clip's name of its model, or of a folder that holds both."""
    import open_clip
    folder = Path(path).is_dir()
    weights = next((f for f in sorted(Path(path).glob("open_clip_*")) if f.suffix in (".safetensors", ".bin")), None) if folder else Path(path)
    if weights is None or not weights.is_file():
        raise UserError(f"{option} {path}: no such file, or a folder without open_clip_config.json and open_clip_model.safetensors")
    if folder:
        try:
            config = json.loads((Path(path) / "open_clip_config.json").read_text())["model_cfg"]
            numbers = [n for part in (config, config["text_cfg"], config["vision_cfg"]) for n in part.values() if isinstance(n, (int, float))]
            if max(numbers) >= 2 ** 20 or config["text_cfg"].get("layers", 0) >= 2 ** 10:
                raise ValueError(f"{max(numbers)} is the size of no model")
            return weights, config
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{option} {path}: no open_clip_config.json with a model_cfg ({error!r})") from None
    if name not in open_clip.list_models():
        raise UserError(f"--clip-model {name}: not a model of open_clip, such as ViT-H-14, ViT-B-32 or ViT-L-14-quickgelu")
    return weights, open_clip.get_model_config(name)


def name_tower(path, name, width):
    """dict(file, model, hash) of the text tower in an open_clip model's weights. UserError for one that has not this width, before anything slow."""
    weights, config = find_clip(path, name, "--clip-weights")
    try:
        tower = TextTower(config)
    except Exception as error:                   # open_clip passes on whatever a wrong configuration raises
        raise UserError(f"--clip-weights {path}: this model's text tower cannot be used ({first_line(error)})") from None
    if tower.width != width:
        raise UserError(f"--clip-weights {path}: a text tower of width {tower.width}, the preset's text.width is {width}")
    made_of = json.dumps([file_hash(weights), config["text_cfg"], config.get("quick_gelu", False)], sort_keys=True)
    return dict(file=str(path), model=name, hash=hashlib.sha256(made_of.encode()).hexdigest())


def load_tower(path, name):
    """The TextTower in an open_clip model's weights, float32; the model's other parts are not read."""
    file, config = find_clip(path, name, "--clip-weights")
    weights = read_weights(file, "--clip-weights", TOWER_PARTS)
    if sum(w.numel() * w.element_size() for w in weights.values()) > os.path.getsize(file):
        raise UserError(f"--clip-weights {path}: its tensors are larger than the file")  # expanded ones, which float32 would write out
    return fit_weights(TextTower(config), tower_weights(weights), "--clip-weights", path, assign=True)


def tower_of(model, metadata, path, width):
    """The TextTower that a DFGN was trained with, from `path` or else from where it was then; None if it has a text encoder of its own."""
    trained = metadata.get("text")
    if path and not trained:
        raise UserError(f"--clip-weights {path}: {model} has a text encoder of its own; leave the option out")
    if not trained:
        return None
    if not path and not Path(trained["file"]).exists():
        raise UserError(f"{model}: trained with the text tower in {trained['file']}, which is not there; say with --clip-weights where it is now")
    path = path or trained["file"]
    if name_tower(path, trained["model"], width)["hash"] != trained["hash"]:
        raise UserError(f"--clip-weights {path}: not the text tower that {model} was trained with")
    return load_tower(path, trained["model"])


def resolve_config(preset, changes):
    """The preset with `part.field=value` changes; UserError for an unknown name or a value of another type."""
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: choose one of {', '.join(PRESETS)}")
    config = PRESETS[preset].to_dict()
    for change in changes:
        name, _, text = change.partition("=")
        part, _, key = name.partition(".")
        if not isinstance(config.get(part), dict) or key not in config[part]:
            raise UserError(f"--set {change}: no field {name!r}; write part.field=value with a part of vae, text, dfgn, diffusion")
        old = config[part][key]
        try:
            value = text if isinstance(old, str) else json.loads(f"[{text}]" if isinstance(old, tuple) else text)
        except ValueError:
            raise UserError(f"--set {change}: {text!r} is not a {type(old).__name__}") from None
        if type(old) not in (type(value), tuple) and not (isinstance(old, float) and isinstance(value, int)):
            raise UserError(f"--set {change}: {text!r} is not a {type(old).__name__}")
        config[part][key] = value
    try:
        config = Config.from_dict(config)
        with torch.device("meta"):
            RDTF(config), VAE(config.vae)
    except (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError) as error:
        raise UserError(f"--set {' '.join(changes)}: these do not go together ({error})") from None
    return config


# ------------------------------------------------------------------------------------------------ VAE stage
def draw_image(stickers, config, step, n):
    """One training image (4, S, S), premultiplied in [-1, 1], its random background (3,) and its record's number: a random frame of a random concept."""
    rng = rng_for(config.seed, step, n, 0)
    index = int(rng.choice(stickers.members[rng.integers(len(stickers.members))]))
    record = stickers.records[index]
    frame = stickers.clip(record, [rng.integers(record["n"])])
    return to_tensor(frame)[0], torch.from_numpy(rng.uniform(-1, 1, 3).astype(np.float32)), index


def compose(x, background):
    """Premultiplied RGBA (N, 4, H, W) in [-1, 1] over background (N, 3) in [-1, 1] -> RGB (N, 3, H, W) in [-1, 1]; RGB stays."""
    if x.shape[1] == 3:
        return x
    alpha = (x[:, 3:] + 1) / 2
    return x[:, :3] + (1 - alpha) * (background[:, :, None, None] + 1)


def vae_losses(net, x, background, noise, config):
    """Loss per image (N,): squared and absolute error on the same random colour, absolute error of alpha, KL divergence."""
    y, mean, logvar = net(x, noise)
    if x.shape[1] == 4:
        error = compose(y.float(), background) - compose(x, background)
        alpha = (y[:, 3:].float() - x[:, 3:]).abs().mean((1, 2, 3))
    else:
        error, alpha = y.float() - x, 0
    kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).sum((1, 2, 3))
    return (error ** 2 + 0.1 * error.abs()).mean((1, 2, 3)) + 0.1 * alpha + config.kl_weight * kl.float()


@torch.no_grad()
def vae_psnr(vae, stickers, count=256, batch=32):
    """PSNR (dB, of each image, on white) of up to `count` first-and-middle frames of a split, through the mean latents."""
    frames = [f for r in stickers.records[:count] for f in sorted({r["first"], r["first"] + r["n"] // 2})][:count]
    white, values = torch.ones(1, 3, device=vae.latent_mean.device), []
    for i in range(0, len(frames), batch):
        x = vae.images(to_tensor(np.array(stickers.frames[frames[i:i + batch]])))
        y = vae.decode(vae.encode(x)).clamp(-1, 1)
        mse = (((compose(x, white) - compose(y, white)) / 2) ** 2).mean((1, 2, 3))
        values += (-10 * torch.log10(mse.clamp_min(1e-10))).tolist()
    return np.array(values)


@torch.no_grad()
def measure_latents(vae, stickers, seed, count=2048, batch=32):
    """Set the VAE's latent_mean, latent_std and latent_axes from `count` random frames of the training split."""
    rng, parts = rng_for(seed, 0, 0, 9), []
    for _ in range(0, count, batch):
        records = [stickers.records[i] for i in rng.integers(len(stickers), size=batch)]
        frames = np.concatenate([stickers.clip(r, [rng.integers(r["n"])]) for r in records])
        parts.append(vae.moments(vae.images(to_tensor(frames)))[0])
    z = F.pixel_unshuffle(torch.cat(parts), vae.config.fold).transpose(0, 1).flatten(1).double()  # (c', N*h*w)
    vae.latent_mean.copy_(z.mean(1))
    z -= z.mean(1, keepdim=True)
    vae.latent_std.copy_(z.square().mean().sqrt())
    if vae.config.fold > 1:
        vae.latent_axes.copy_(torch.linalg.eigh(z @ z.T).eigenvectors.flip(1).T)  # the largest variance first


def training_set(config, preset):
    """The training split that --data and --groups name, of the preset's size."""
    stickers = StickerSet(config.data, "train", config.groups or None)
    if stickers.size != preset.vae.size:
        raise UserError(f"--data {config.data}: {stickers.size} px, preset {preset.name} wants {preset.vae.size}")
    if not len(stickers):
        raise UserError(f"--groups {' '.join(config.groups)}: no stickers of these groups in {config.data}")
    return stickers


class VAEStage:
    """What the loop needs: the network, a step's losses, and what is written with a checkpoint. Made quickly, or refused; what is slow comes in prepare.

    fresh: nothing was saved yet, so what the network begins from is worked out; a checkpoint holds it."""
    kind = "vae"

    def __init__(self, config, preset, rank, world, device):
        self.config, self.preset, self.rank, self.world, self.device = config, preset, rank, world, device
        self.stickers = training_set(config, preset)
        self.inputs = dict(data=self.stickers.meta["hash"])

    def prepare(self, fresh):
        config, preset = self.config, self.preset
        self.net = VAE(preset.vae)
        if fresh and preset.vae.shortcut:
            self.net.start_shortcut(self.net.images(torch.stack([draw_image(self.stickers, config, 0, n)[0] for n in range(256)])))
        self.net.to(self.device)

    def batches(self, start):
        for step, keys in enumerate(StepSampler(self.config.batch, start, self.config.steps, self.rank, self.world), start):
            share = [n for _, n, _ in keys]
            images, backgrounds, _ = zip(*(draw_image(self.stickers, self.config, step, n) for n in share))
            size = (self.preset.vae.latent_channels, *(s // self.preset.vae.factor for s in images[0].shape[1:]))
            noise = np.stack([rng_for(self.config.seed, step, n, 2).standard_normal(size, np.float32) for n in share])
            yield step, dict(x=torch.stack(images), background=torch.stack(backgrounds), noise=torch.from_numpy(noise))

    def drawn(self, step):
        """The record number of each sample of a step, of all processes in their order."""
        return [draw_image(self.stickers, self.config, step, n)[2] for n in range(self.config.batch)]

    @staticmethod
    def losses(net, batch, preset, device):
        """-> losses (b,), and per sample a task number and a timestep decile (none here: 0)."""
        batch = send(batch, device)
        losses = vae_losses(net, visible(batch["x"], preset.vae.image_channels), batch["background"], batch["noise"], preset.vae)
        return losses, torch.zeros(2, len(losses))

    def finish(self, weights):
        """The EMA weights with latent statistics measured; prints the held-out PSNR."""
        vae = VAE(self.preset.vae).to(self.device).eval()
        vae.load_state_dict(weights)
        measure_latents(vae, self.stickers, self.config.seed)
        psnr = vae_psnr(vae, StickerSet(self.config.data, "test", self.config.groups or None))
        print(f"VAE: held-out PSNR on white {psnr.mean():.2f} dB (n = {len(psnr)}, 95 % +- {1.96 * psnr.std() / len(psnr) ** 0.5:.2f})")
        return vae.state_dict(), dict(psnr=float(psnr.mean()))


# ------------------------------------------------------------------------------------------------ DFGN stage
@torch.no_grad()
def cache_latents(vae, vae_hash, data, world=1):
    """Encode every frame of a prepared set once: <data>/latents-<hash>/, mean and log-variance, not standardised."""
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads * world, os.cpu_count()))  # the other ranks wait meanwhile
    stickers = StickerSet(data)
    n, side = len(stickers.frames), stickers.size // vae.config.factor
    pixels = 2 ** (21 if vae.latent_mean.is_cuda else 18)  # in memory at once; the VAE's widest layers are as large as the image
    batch = min(max(pixels // stickers.size ** 2, 1), 64)
    bar = lambda start: tqdm(range(start, n, batch), "encoding latents", total=math.ceil(n / batch), initial=start // batch, mininterval=2)
    moments = lambda start: (vae.moments(vae.images(to_tensor(stickers.frames[i:i + batch]))) for i in bar(start))
    write_latents(data, vae_hash, n, (vae.config.latent_channels, side, side), moments)
    torch.set_num_threads(threads)


@torch.no_grad()
def cache_texts(tower, cache, texts, places, rank, world, device, batch=64):
    """Encode the texts at these places, this rank its share of the files."""
    size = max(cache.most // cache.row // batch, 1) * batch  # whole batches: a killed run's are made again alike
    shares = [places[i:i + size] for i in range(0, len(places), size)][rank::world]
    with tqdm(total=sum(map(len, shares)), desc="encoding texts", unit="text", disable=rank > 0, mininterval=2) as bar:
        for share in shares:
            share = [texts[k] for k in share]

            def features():
                for i in range(0, len(share), batch):
                    yield tower(tokenize(share[i:i + batch]).to(device))
                    bar.update(len(share[i:i + batch]))
            cache.write(share, features())


def draw_condition(config, p, step, n, real, T, timesteps):
    """(task number, condition mask (T,), whether the text is kept, timestep) of sample n of a step with `real` frames."""
    rng = rng_for(config.seed, step, n, 1)
    task = fit_task(TASKS[min(int(np.searchsorted(p.cumsum(), rng.random())), len(TASKS) - 1)], real)
    mask, drop, t = cond_mask(task, real, T, rng), rng.random(), int(rng.integers(timesteps))
    no_text = task == "i2v" or drop < config.text_drop + config.both_drop
    if config.text_drop <= drop < config.text_drop + config.both_drop + config.cond_drop:
        mask = np.zeros_like(mask)
    return TASKS.index(task), mask, not no_text, t


def step_frames(config, step, T):
    """(frames a clip has in this step, clips a batch slot stands for): T and 1, fewer frames, or T stills in place of a clip."""
    rng = rng_for(config.seed, step, 0, 3)
    if rng.random() < config.still_share or step < config.still_first * config.steps:
        return 1, T
    return (int(rng.integers(3, T + 1)) if config.frames == "step" else T), 1


def ignore_signals(_):
    """A SIGTERM or Ctrl-C to the whole process group must leave the loaders to the main process, which saves first."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def sentences(loader):
    """What the loader yields. What a loader process could not read is told as in the main process: torch puts a traceback before it."""
    batches = iter(loader)
    try:
        yield from batches
    except UserError as error:
        raise UserError(str(error).strip().rpartition("UserError: ")[2]) from None
    finally:
        if loader.num_workers:
            batches._shutdown_workers()          # the error keeps hold of them, and Python's exit would wait for ever: they ignore SIGTERM


class DFGNStage:
    kind = "dfgn"

    def __init__(self, config, preset, rank, world, device):
        self.config, self.preset, self.rank, self.world, self.device = config, preset, rank, world, device
        self.tower = self.texts = None
        if preset.text.kind == "open_clip":
            if not config.clip_weights:
                raise UserError(f"--preset {preset.name}: text.kind=open_clip wants the weights of an open_clip model; name a local file with --clip-weights")
            self.tower = name_tower(config.clip_weights, config.clip_model, preset.text.width)
        elif config.clip_weights:
            raise UserError(f"--clip-weights {config.clip_weights}: preset {preset.name} trains a text encoder of its own; leave the option out, or add --set text.kind=open_clip")
        self.vae, self.vae_meta = load_model(config.vae, "vae")
        free = dict(size=preset.vae.size, kl_weight=preset.vae.kl_weight) if self.vae_meta.get("any_size") else {}
        if {**asdict(self.vae.config), **free} != asdict(preset.vae):
            raise UserError(f"--vae {config.vae}: trained as {self.vae.config}, preset {preset.name} wants {preset.vae}")
        self.vae_hash = file_hash(config.vae)
        self.stickers = training_set(config, preset)
        self.inputs = dict(data=self.stickers.meta["hash"], vae=self.vae_hash, **(dict(clip_weights=self.tower["hash"]) if self.tower else {}))

    def prepare(self, fresh):
        config, preset = self.config, self.preset
        together(self.prepare_latents, self.world)
        if not latents_ready(config.data, self.vae_hash):
            raise UserError(f"--data {config.data}: rank {self.rank} does not see the latents that rank 0 wrote there; all nodes must share this folder")
        if self.tower:
            self.prepare_texts()
        self.net = RDTF(preset)
        self.curriculum = Curriculum(config.curriculum, config.steps, config.pid_raw, config.tasks)
        if fresh and preset.text.buckets:
            self.fit_pictures()
        if fresh and preset.dfgn.gate:
            self.measure_data()
        self.net.to(self.device)

    def prepare_latents(self):
        if self.rank == 0 and not latents_ready(self.config.data, self.vae_hash):
            cache_latents(self.vae.to(self.device), self.vae_hash, self.config.data, self.world)
            self.vae.cpu()

    def prepare_texts(self):
        """Open the cache of the tower's features; encode what it lacks, after which the tower is not in memory any more."""
        c = self.config
        self.texts = StickerTexts(self.stickers, c.text_variants, c.seed, c.word_dropout, c.keywords)
        self.features = TextCache(c.data, self.tower["hash"], self.preset.text.width)
        found = [self.features.missing(self.texts) if self.rank == 0 else None]
        if self.world > 1:
            dist.broadcast_object_list(found, device=torch.device("cpu"))  # another job may add to the cache between two looks
        places, = found
        need, free = len(places) * self.features.row, shutil.disk_usage(c.data).free
        if need > free:
            raise UserError(f"--text-variants {c.text_variants}: features of {len(places)} texts are {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in {c.data}; "
                            f"fewer variants need less")
        if len(places):
            tower = load_tower(c.clip_weights, c.clip_model).to(self.device)
            together(lambda: cache_texts(tower, self.features, self.texts, places, self.rank, self.world, self.device), self.world)
        self.features.open()

    def read(self, texts):
        """What the network is given of B texts: tokens (B, L), or a tower's features (B, L, D)."""
        return torch.from_numpy(self.features[texts]) if self.tower else tokenize(texts)

    def fit_pictures(self, most=4096, draws=6):
        """Fit the network's guess of a sticker's mean frame from its caption. The bare caption has half of the weight, as it is what users
        write; `draws` captions as training draws them have the other half."""
        stickers, (latents, _) = self.stickers, open_latents(self.config.data, self.vae_hash)
        chosen = np.random.default_rng(self.config.seed).permutation(len(stickers))[:most]
        records = [stickers.records[i] for i in chosen]
        frames = [np.asarray(latents[[r["first"] + i for i in even_frames(r["n"], self.preset.frames)]], np.float32).mean(0) for r in records]
        texts = [[r["caption"], *(text_for(r, rng_for(self.config.seed, d, i, 4), self.config.word_dropout, self.config.keywords) for d in range(draws))]
                 for i, r in zip(chosen.tolist(), records)]
        twins = Counter(r["concept"] for r in records)
        self.net.fit_pictures(self.vae.standardise(torch.from_numpy(np.stack(frames))), torch.stack([tokenize(t) for t in texts]),
                              torch.tensor([1 / twins[r["concept"]] for r in records]), torch.tensor([0.5] + [0.5 / draws] * draws))

    @torch.no_grad()
    def measure_data(self, count=512):
        """Set the network's data_std from clips of the training set under all tasks that are trained."""
        clips, T = self.clips(), self.preset.frames
        items = self.collate(-1, [clips[0, n, T] for n in range(count)], self.curriculum.trained / self.curriculum.trained.sum())
        self.net.measure(items["z0"], items["cond_mask"], items["loss_mask"], self.net.picture(items["tokens"]))

    def clips(self):
        c = self.config
        return ClipDataset(self.stickers, open_latents(c.data, self.vae_hash), c.seed, c.batch, self.preset.frames, c.how,
                           "sample" if c.frames == "sample" else "step", c.word_dropout, c.keywords, self.texts)

    def keys(self, start, stop, rank=0, world=1):
        """(step, n, frames) of this process's samples, for each step; of all processes unless one is named."""
        c, T = self.config, self.preset.frames
        return StepSampler(c.batch, start, stop, rank, world, plan=lambda step: step_frames(c, step, T))

    def batches(self, start):
        c, sampler = self.config, self.keys(start, self.config.steps, self.rank, self.world)
        loader = torch.utils.data.DataLoader(self.clips(), batch_sampler=sampler, num_workers=c.workers, collate_fn=list,
                                             multiprocessing_context="fork" if c.workers else None, worker_init_fn=ignore_signals)
        for step, items in zip(range(start, c.steps), sentences(loader)):
            yield step, self.collate(step, items, self.curriculum.probabilities(step))

    def collate(self, step, items, p):
        """Draw task (with probabilities p), masks, timestep and noise of each sample and stack them."""
        T, step = items[0]["z"].shape[0], step % 2 ** 31
        drawn = [draw_condition(self.config, p, step, it["key"], it["n"], T, self.preset.diffusion.steps) for it in items]
        task, masks, keep, t = zip(*drawn)
        rngs = [rng_for(self.config.seed, step, it["key"], 2) for it in items]
        z = self.vae.standardise(torch.cat([it["z"] for it in items])).unflatten(0, (len(items), T))
        noise, shared = (torch.from_numpy(np.stack([g.standard_normal((frames, *z.shape[2:]), np.float32) for g in rngs])) for frames in (T, 1))
        loss_mask = torch.stack([it["loss_mask"] for it in items])
        return dict(z0=z * loss_mask[:, :, None, None, None], tokens=self.read([it["text"] if k else "" for it, k in zip(items, keep)]),
                    t=torch.tensor(t), noise=self.net.diffusion.mix_noise(noise, shared), cond_mask=torch.from_numpy(np.stack(masks)), loss_mask=loss_mask, task=torch.tensor(task))

    def drawn(self, step):
        clips = self.clips()
        return [clips[key]["index"] for keys in self.keys(step, step + 1) for key in keys]

    @staticmethod
    def losses(net, batch, preset, device):
        task = batch.pop("task")
        tags = torch.stack([task, batch["t"] * 10 // preset.diffusion.steps]).float()
        return net(**send(batch, device)), tags

    def finish(self, weights):
        return weights, dict(vae=self.vae_hash, vae_file=str(self.config.vae), **(dict(text=self.tower) if self.tower else {}))


STAGES = {"vae": VAEStage, "dfgn": DFGNStage}


# ------------------------------------------------------------------------------------------------ the loop
class Window:
    """Running sums since the last log line; part of the checkpoint, so that a resumed run writes the same lines."""

    def __init__(self):
        self.sums = {}

    def add(self, key, value, n=1):
        total, count = self.sums.get(key, (0.0, 0))
        self.sums[key] = (total + value * n, count + n)

    def means(self, prefix):
        return {k[len(prefix):]: float(f"{s / n:.7g}") for k, (s, n) in sorted(self.sums.items()) if k.startswith(prefix)}


def learning_rate(c, step):
    ramp = min(1.0, (step + 1) / max(c.warmup, 1))
    return c.lr * ramp * (0.5 * (1 + math.cos(math.pi * step / c.steps)) if c.lr_schedule == "cosine" else 1.0)


def make_optimizer(c, net, world):
    """AdamW; with --zero on several processes each keeps the moments of its share of the parameters."""
    options = dict(lr=c.lr, weight_decay=c.weight_decay, betas=(0.9, 0.99), fused=True)
    if c.zero and world > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer
        return ZeroRedundancyOptimizer(net.parameters(), torch.optim.AdamW, **options)
    return torch.optim.AdamW(net.parameters(), **options)


def load_optimizer(optimizer, state):
    """Load what AdamW, or ZeRO's rank 0, wrote."""
    optimizer.load_state_dict(state)
    if local := getattr(optimizer, "optim", None):      # ZeRO leaves step counts on the host, where the fused kernel does not look,
        local.load_state_dict(local.state_dict())
        optimizer.state.clear()                         # and a second copy of the moments


def averages(c, weights):
    """The beginning of the averaged weights, where --ema-device wants them; the GPU's own copies reach pinned host memory without waiting."""
    if c.ema_device == "same":
        return {k: v.detach().clone() for k, v in weights.items()}
    return {k: torch.empty_like(v, device="cpu", pin_memory=v.is_cuda).copy_(v.detach()) for k, v in weights.items()}


def average(c, ema, weights, share):
    """Move the averages by `share` of the way to the weights. Those in host memory come to the device one by one: the sums are the same."""
    if c.ema_device == "same":
        return torch._foreach_lerp_([ema[k] for k in weights], [w.detach() for w in weights.values()], share)
    for k, w in weights.items():
        ema[k].copy_(ema[k].to(w.device, non_blocking=True).lerp_(w.detach(), share), non_blocking=True)


def states(run):
    """Paths of the checkpoints that are there, the newest first."""
    return [path for path in (run / "state.pt", run / "state.prev.pt") if path.is_file()]


def read_state(run, mend=False):
    """The newest checkpoint that can be read; None if there is none yet.

    mend: remove one that cannot be, where the one before it can: the next save would put it in the place of that."""
    paths, damaged = states(run), []
    for path in paths:
        try:
            state = read_pt(path)
        except Exception as error:  # a damaged file may raise nearly anything
            print(f"{path}: not readable ({type(error).__name__}); trying the one before", file=sys.stderr)
            damaged.append(path)
            continue
        for old in damaged if mend else ():
            old.unlink(missing_ok=True)
        return state
    if paths:
        raise UserError(f"{run}: {' and '.join(path.name for path in paths)} cannot be read; remove the folder, or name another --out")
    return None


def check_state(run, config, state, net, optimizer, curriculum):
    """UserError for a checkpoint that can be read, but is not one of this network, optimiser and curriculum."""
    weights, sizes = net.state_dict(), list(net.parameters())
    groups = [dict(group, params=[0, ...]) for group in optimizer.param_groups]
    moments = {i: dict(step=torch.tensor(0.0), exp_avg=p, exp_avg_sq=p) for i, p in enumerate(sizes)}
    losses = dict(losses=[0.0, ...], scores=[0.0, ...])
    wanted = dict(step=0, net=weights, ema=weights, optimizer=dict(state=moments, param_groups=groups), window={str: (0.0, 0)},
                  curriculum=dict(curriculum.state_dict(), **losses) if curriculum else None)
    reason = differs(state, wanted, "state")
    if not reason and not 0 <= state["step"] <= config.steps:
        reason = f"it is of step {state['step']} of {config.steps}"
    if reason:
        raise UserError(f"{run}: its checkpoint is not one of this run ({reason}); put the right state.pt there, or name another --out")


def flat(tree, prefix=""):
    """{a: {b: 1}} -> {"a.b": 1}."""
    return {name: v for key, value in tree.items() for name, v in
            (flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}).items()}


def option(name):
    return "--" + name.replace("_", "-")


def check_same_config(run, config, preset, precision, world):
    """Resuming must not change what is trained; how, where and from which copy may change. Returns the hashes of what it was started with, and what changed."""
    try:
        old = json.loads((run / "config.json").read_text())
        started, model, inputs, was = old["train"], flat(old["model"]), old["inputs"], old["precision"]
        if reason := differs(inputs, {str: ""}, "inputs"):
            raise ValueError(reason)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{run / 'config.json'}: missing or corrupt ({error}), so that nobody knows what was trained here; put it back, or name another --out") from None
    if precision != was:
        raise UserError(f"--precision {config.precision}: {precision} here, {run} was started in {was}; go on with --precision {was}, or name another --out")
    started, changed = {**asdict(TrainConfig()), **started}, []  # a field that is newer than the run had its default
    for key, value in asdict(config).items():
        if key not in MAY_CHANGE and started[key] != value:
            raise UserError(f"{option(key)} {value}: {run} was started with {started[key]}; go on with that, or name another --out")
        if started[key] != value and key not in ("out", "precision", "dry_run", "replay"):
            changed.append(f"{option(key)} {value} instead of {started[key]}")
    if old.get("world", world) != world:
        changed.append(f"{world} process{'es' * (world > 1)} instead of {old['world']}")
    for name, value in flat(json.loads(json.dumps(preset.to_dict()))).items():
        if model.get(name) != value:
            raise UserError(f"{run}: started when {name} was {model.get(name)}, it is {value} now; name another --out")
    return inputs, changed


def check_options(config):
    """Refuse words that are not known and numbers that make no sense, before anything slow."""
    words = dict(stage=STAGES, lr_schedule=("cosine", "constant"), how=("kmeans", "even", "mixed"), frames=("step", "sample", "full"),
                 ema_device=("same", "cpu"))
    for name, allowed in words.items():
        if getattr(config, name) not in allowed:
            raise UserError(f"{option(name)} {getattr(config, name)}: choose one of {', '.join(allowed)}")
    for task in config.tasks:
        if task not in TASKS:
            raise UserError(f"--tasks {task}: choose from {', '.join(TASKS)}")
    for name in ("still_share", "still_first", "word_dropout", "keywords", "text_drop", "cond_drop", "both_drop"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"{option(name)} {getattr(config, name)}: a share is 0 to 1")
    for name in ("checkpointing", "clip_weights"):
        if getattr(config, name) and config.stage == "vae":
            raise UserError(f"{option(name)}: for the dfgn stage alone; leave it out")
    for name, least in dict(steps=1, batch=1, accumulate=1, text_variants=1, log_every=1, save_every=1, seed=0).items():
        if getattr(config, name) < least:
            raise UserError(f"{option(name)} {getattr(config, name)}: must be at least {least}")


def check_shares(config, world):
    if config.batch % (world * config.accumulate):
        times = f" times --accumulate {config.accumulate}" if config.accumulate > 1 else ""
        raise UserError(f"--batch {config.batch}: not a multiple of the {world} processes{times}")


def step_of(line):
    """Step of a log line; None for what is none, as a killed process and a broken disk leave it."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def own(run, held):
    """Keep other processes out of the run folder until `held` is closed or this one ends, and remove what a killed one left half-written."""
    try:
        lock = held.enter_context(hold(run / "lock", f"--out {run}"))
    except OSError as error:
        raise UserError(f"--out {run}: cannot be written ({error.strerror})") from None
    held.callback(leave, run, lock)
    for left in run.glob("*.tmp"):
        left.unlink()


def leave(run, lock):
    """Remove the lock while it is held, and the folder if nothing came into it; not those of a process that came when the folder was removed."""
    with suppress(OSError):
        if os.path.samestat(os.stat(run / "lock"), os.fstat(lock.fileno())):
            (run / "lock").unlink()
            run.rmdir()


def cut_log(path, step):
    """Drop log lines after the checkpoint: those steps are run again."""
    if path.is_file():
        lines = [line for line in path.read_text(errors="replace").splitlines() if (step_of(line) or step + 1) <= step]
        write_atomically(path, lambda p: p.write_text("".join(line + "\n" for line in lines)))


def append(path, line):
    with writing(path), open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def note_signals(held):
    """List of the signals to stop that come from now on, until `held` is closed; after one, Ctrl-C ends the process at once."""
    came = []

    def note(number, _):
        came.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for number in STOPPING:
        held.callback(signal.signal, number, signal.signal(number, note))
    return came


def train(config, held):
    """Train a stage to its end, or to a SIGTERM or Ctrl-C, which save first; then the exit status is 143 or 130. held: ExitStack of what ends with the run."""
    check_options(config)
    run = Path(config.out or f"runs/{config.stage}")
    log = run / "log.jsonl"
    preset = resolve_config(config.preset, config.set)
    rank, world, device = setup()
    check_shares(config, world)
    precision = pick_precision(config.precision, device)
    torch.manual_seed(config.seed)  # initial weights; nothing else draws from torch's generator
    started = bool(states(run))
    before, changed = check_same_config(run, config, preset, precision, world) if started else ({}, [])
    stage = STAGES[config.stage](config, preset, rank, world, device)
    for key, value in before.items():
        if (now := stage.inputs.get(key, "none")) != value:
            raise UserError(f"{option(key)} {getattr(config, key, '')}: not what {run} was started with (hash {now[:12]}, was {value[:12]}); name another --out")
    together(lambda: rank == 0 and own(run, held), world)
    if bool(states(run)) != started:
        raise UserError(f"--out {run}: another process wrote there meanwhile; start again")
    stage.prepare(fresh=not started)
    net = stage.net
    if config.checkpointing:
        net.dfgn.checkpointing = True
    if config.compile:
        net.compile(backend=COMPILER)  # in place: the names of its weights stay
    optimizer = make_optimizer(config, net, world)
    curriculum, window, start = getattr(stage, "curriculum", None), Window(), 0

    state = read_state(run, mend=rank == 0)
    if state is not None:
        check_state(run, config, state, net, optimizer, curriculum)
        net.load_state_dict(state["net"])
        load_optimizer(optimizer, state["optimizer"])
        window.sums, start = {k: tuple(v) for k, v in state["window"].items()}, state["step"]
        if curriculum:
            curriculum.load_state_dict(state["curriculum"])
    if len(set(gather(torch.tensor([float(start)]), world).tolist())) > 1:
        raise UserError(f"--out {run}: the processes do not see the same checkpoint there; all nodes must share this folder")
    if start == config.steps:
        return rank == 0 and print(f"{run}: done, {start} steps; nothing to do")
    ema = averages(config, net.state_dict()) if rank == 0 else {}  # who alone writes them
    if state is not None:
        for k, v in ema.items():
            v.copy_(state["ema"][k])
    del state  # four times the weights
    if changed and rank == 0:
        print(f"{run}: goes on behind step {start} with {', '.join(changed)}")

    def begin():
        cut_log(log, start)
        config_text = json.dumps(dict(train=asdict(config), model=preset.to_dict(), inputs=stage.inputs, precision=precision, world=world), indent=1)
        write_atomically(run / "config.json", lambda p: p.write_text(config_text))

    def write(step):
        if log.is_file():
            with writing(log), open(log) as file:
                os.fsync(file.fileno())  # the checkpoint says that these lines are there
        weights, extra = stage.finish(ema)
        save_model(run / "model.safetensors", weights, kind=stage.kind, config=preset.to_dict(), step=step, **extra)
        state = dict(step=step, net=net.state_dict(), ema=ema, optimizer=optimizer.state_dict(), window=window.sums,
                     curriculum=curriculum.state_dict() if curriculum else None)
        save_pt(run / "state.pt", state, before=run / "state.prev.pt")  # last: a run is done when its state says so

    def save(step):
        nonlocal saving
        began = time.perf_counter()
        if hasattr(optimizer, "consolidate_state_dict"):
            optimizer.consolidate_state_dict()
        if device.type == "cuda":
            torch.cuda.synchronize()  # copies into host memory may be on their way
        together(lambda: rank == 0 and write(step), world)
        saving += time.perf_counter() - began

    together(lambda: rank == 0 and begin(), world)
    stop = note_signals(held)
    ddp = DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True) if world > 1 else net  # buffers never change
    bar = tqdm(total=config.steps, initial=start, desc=f"{config.stage} ({precision}, {world} x {torch.get_num_threads()} threads)",
               disable=rank > 0, mininterval=5)
    seen, since, cpu, saving = 0, time.perf_counter(), time.process_time(), 0.0
    batches = stage.batches(start)
    held.callback(batches.close)  # ends its loader processes
    for step, batch in batches:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        micro, parts = micro_batches(batch, config.accumulate), []
        for i, part in enumerate(micro, 1):
            with ddp.no_sync() if world > 1 and i < len(micro) else nullcontext():  # the gradients are summed over processes once
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    losses, tags = stage.losses(ddp, part, preset, device)
                (losses.mean() / len(micro)).backward()
            parts.append((losses.detach(), tags))
        norm = float(torch.nn.utils.clip_grad_norm_(net.parameters(), config.grad_clip))
        losses, tags = torch.cat([a for a, _ in parts]).cpu().float(), torch.cat([b for _, b in parts], 1)
        shared = [gather(row, world) for row in (losses, *tags, torch.tensor([float(max(stop, default=0))]))]
        all_losses, tasks, deciles, stops = (row.numpy() for row in shared)
        if not (math.isfinite(norm) and np.isfinite(all_losses).all()):
            raise bad_step(run, stage, step, batch, all_losses, norm, precision)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            average(config, ema, dict(net.named_parameters()), 1 - min(config.ema, (1 + step) / (10 + step)))

        seen += len(all_losses)
        window.add("loss", float(all_losses.mean()))
        window.add("norm", norm)
        for loss, task, decile in zip(all_losses, tasks, deciles):
            if curriculum:
                window.add(f"task {TASKS[int(task)]}", float(loss))
                window.add(f"decile {int(decile)}", float(loss))
        extra = {}
        if curriculum:
            extra = dict(entropy=round(curriculum.entropy(step), 6))
            curriculum.observe(all_losses, tasks.astype(int), deciles.astype(int))
            extra["r"] = round(curriculum.r, 6)
        bar.update()
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            if rank == 0:
                rate, memory = seen / (time.perf_counter() - since), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                if device.type == "cuda":
                    memory = torch.cuda.max_memory_allocated() / 2 ** 20
                line = dict(step=done, loss=window.means("loss")[""], grad_norm=window.means("norm")[""], lr=learning_rate(config, step), **extra,
                            tasks=window.means("task "), deciles=window.means("decile "), clips_per_s=round(rate, 2), cpu_s=round(time.process_time() - cpu, 2),
                            save_s=round(saving, 3), peak_mb=round(memory))
                bar.set_postfix_str(f"loss {line['loss']:.4f}, {rate:.1f} clips/s")
            together(lambda: rank == 0 and append(log, line), world)
            window, seen, since, cpu, saving = Window(), 0, time.perf_counter(), time.process_time(), 0.0
        stopping = int(stops.max()) if done < config.steps else 0
        if done % config.save_every == 0 or done == config.steps or stopping:
            save(done)
            since = time.perf_counter() if seen == 0 else since
        if stopping:
            if rank == 0:
                print(f"{run}: stopped by {signal.Signals(stopping).name} after step {done}, which is saved; the same command goes on")
            raise SystemExit(128 + stopping)


# ------------------------------------------------------------------------------------------------ steps that are not finite
def described(sample):
    return f"line {sample['line']}, {sample['record'].get('caption', '')!r}" + (f", {sample['task']} at timestep {sample['t']}" if "task" in sample else "")


def samples_of(stage, step, batch):
    """What the index says of each sample of a step, of all processes, and under which condition it was shown."""
    records = stage.stickers.records
    samples = [dict(line=int(records.rows[i]) + 1, record=records[i]) for i in stage.drawn(step)]
    return [dict(s, task=TASKS[int(task)], t=int(t)) for s, task, t in zip(samples, batch["task"], batch["t"])] if "task" in batch else samples


def keep_step(path, **step):
    """Write a step; -> what to say of it. There is one such file in a run: its weights may be gigabytes, and restarts many."""
    try:
        for old in {*path.parent.glob("bad-step-*.pt")} - {path}:
            old.unlink()
        save_pt(path, step)
    except (OSError, UserError) as error:                        # of two misfortunes the first is to be told
        return str(error).partition("; ")[0]
    return f"`python train.py --replay {path}` computes it alone"


def bad_step(run, stage, step, batch, losses, norm, precision):
    """-> the UserError of a step whose loss or gradient is not finite; RUN/bad-step-N.pt then holds what computes it again. All ranks are to call this.

    batch: this rank's; losses: of all samples (numpy). The optimiser's moments are not kept: a step is not finite before they matter."""
    path, index, world = run / f"bad-step-{step:06}.pt", str(stage.stickers.records.path), stage.world
    again = "again " if path.is_file() else ""                   # asked before the gathering, so by all ranks before it is written
    batch = {name: gather(value, world) for name, value in batch.items()}
    samples = samples_of(stage, step, batch)
    said = []
    if stage.rank == 0:
        said = [keep_step(path, step=step, world=world, train=dict(asdict(stage.config), precision=precision), model=stage.preset.to_dict(),
                          net=stage.net.state_dict(), batch=batch, index=index, samples=samples, losses=losses.tolist(), norm=norm)]
    if world > 1:
        dist.barrier()                                           # torchrun ends all when one ends: not while rank 0 writes
    bad = [s for s, loss in zip(samples, losses) if not math.isfinite(loss)]
    what, named = ("loss", bad) if bad else ("gradient", samples)
    names = "; ".join([*map(described, named[:3]), *["..."] * (len(named) > 3)])
    last = f"the last checkpoint is {run / 'state.pt'}" if (run / "state.pt").is_file() else "no checkpoint was saved yet"
    advice = "starting it again does not help; " if again else ""
    return UserError("; ".join([f"{run}: {what} is not finite at step {step} {again}({len(bad)} of {len(samples)} losses; {index}: {names})", *said, last,
                                f"{advice}lower --lr in another --out, or look at these samples"]))


def micro_batches(batch, count):
    return [dict(zip(batch, part)) for part in zip(*(v.chunk(count) for v in batch.values()))]


def finite(*tensors):
    return all(bool(x.isfinite().all()) for x in tensors if torch.is_tensor(x))


def watch(net):
    """[module, gradient]: where a pass forward and backward, from now on, is first not finite; None while nothing is."""
    first = [None, None]

    def note(place, name, *tensors):
        if first[place] is None and not finite(*tensors):
            first[place] = name
    for name, module in net.named_modules():
        module.register_forward_hook(lambda _, __, out, name=name: note(0, name or "the loss", *(out if isinstance(out, tuple) else (out,))))
    for name, p in net.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: note(1, name, p.grad))
    return first


def norm_of(tensors):
    return float(torch.nn.utils.get_total_norm([x for x in tensors if x is not None]))


def by_part(tensors, number):
    """number(tensors) of each part of a network, whose tensors' names have their first two words in common."""
    parts = {}
    for name, x in tensors.items():
        parts.setdefault(".".join(name.split(".")[:2]), []).append(x)
    return {part: number(of_part) for part, of_part in parts.items()}


def compute_step(net, config, step, preset, device):
    """Forward and backward of all processes' micro-batches, one after another. -> losses, {sample: gradient norm} of micro-batches
    whose gradient is not finite though their losses are, the step's gradients {name: tensor}."""
    losses, alone, total, weights = [], {}, {}, dict(net.named_parameters())
    parts = micro_batches(step["batch"], step["world"] * config.accumulate)
    for part in tqdm(parts, "micro-batches", delay=2):
        net.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            each, _ = STAGES[config.stage].losses(net, part, preset, device)
        (each.mean() / len(parts)).backward(retain_graph=True)
        gradients = {name: p.grad for name, p in weights.items() if p.grad is not None}
        if finite(each) and not math.isfinite(norm_of(gradients.values())):
            alone.update({i: norm_of(torch.autograd.grad(loss, weights.values(), retain_graph=True, allow_unused=True)) for i, loss in enumerate(each, len(losses))})
        losses += each.tolist()
        total = {name: g + total.get(name, 0) for name, g in gradients.items()}
    return losses, alone, total


def read_step(path):
    """What bad_step wrote. UserError for any other file."""
    if not Path(path).is_file():
        raise UserError(f"--replay {path}: no such file")
    options = {name: ["", ...] if value == [] else value for name, value in asdict(TrainConfig()).items()}
    wanted = dict(step=0, world=0, train=options, model={str: ...}, net={str: ...}, batch={str: ...}, index="", samples=[{str: ...}, ...], losses=[0.0, ...], norm=0.0)
    try:
        step = read_pt(path)
        reason = differs(step, wanted, "the file")
    except Exception as error:                   # a file of another kind may raise nearly anything
        reason = f"{type(error).__name__}: {first_line(error)}"
    if not reason:
        sample = dict(line=0, record={str: ...}, **(dict(task="", t=0) if "task" in step["batch"] else {}))
        reason = differs(step["samples"], [sample, ...], "samples")
    if not reason and not all(map(is_plain, step["batch"].values())):
        reason = "batch: not tensors alone"
    if not reason and (step["world"] < 1 or {len(step["losses"]), *map(len, step["batch"].values())} != {len(step["samples"]) or -1}):
        reason = "its samples, inputs and losses are not equally many, or of no process"
    if reason:
        raise UserError(f"--replay {path}: not a step that train.py kept ({reason})")
    return step


def report_step(path, step, config, device, first, losses, alone, gradients, net):
    """Print what compute_step and watch found beside what was."""
    print(f"{path}: step {step['step']}, {len(losses)} samples of {step['index']} on {step['world']} processes in {step['train']['precision']}; "
          f"now on one {device.type} in {config.precision}")
    print(f"{'sample':>6} {'loss was':>12} {'is':>12}")
    for i, (was, now, sample) in enumerate(zip(step["losses"], losses, step["samples"])):
        print(f"{i:>6} {was:>12.6g} {now:>12.6g}  {described(sample)}{f', gradient norm {alone[i]:.4g}' if i in alone else ''}")
    norm, largest = norm_of(gradients.values()), by_part(net.state_dict(), lambda weights: max(float(w.abs().max()) for w in weights))
    print(f"gradient norm was {step['norm']:.6g}, is {norm:.6g}")
    print(f"  {'part':<24} {'gradient':>12} {'largest weight':>16}")
    for part, value in by_part(gradients, norm_of).items():
        print(f"  {part:<24} {value:>12.4g} {largest[part]:>16.4g}")
    for what, tensors in (("weights", step["net"]), ("inputs", step["batch"])):
        if names := [name for name, x in tensors.items() if not finite(x)]:
            print(f"{what} that were not finite before the step: {some(names)}")
    for what, name in zip(("output", "gradient"), first):
        if name:
            print(f"first {what} that is not finite: {name}")
    print(f"the step is {'' if math.isfinite(sum(losses) + norm) else 'not '}finite")


def replay(path, argv):
    """Compute the step that a run stopped at, on one process, and print what of it is finite."""
    step = read_step(path)
    config = parse(argv, step["train"])
    for name, value in asdict(config).items():
        if name not in ("replay", "precision", "accumulate", "checkpointing") and value != step["train"].get(name, value):
            raise UserError(f"{option(name)} {value}: --replay computes the step that was; --precision, --accumulate and --checkpointing may change")
    check_options(config)
    _, world, device = setup()
    if world > 1:
        raise UserError("--replay: one process computes the shares of all; start it without torchrun")
    check_shares(config, step["world"])
    config.precision = pick_precision(config.precision, device)
    net, preset = made_for(step["net"], config.stage, step["model"], "--replay", path).to(device), Config.from_dict(step["model"])
    if config.checkpointing:
        net.dfgn.checkpointing = True
    first = watch(net)
    try:
        losses, alone, gradients = compute_step(net, config, step, preset, device)
    except (RuntimeError, TypeError, ValueError, LookupError) as error:
        raise UserError(f"--replay {path}: its samples cannot be computed here ({first_line(error)})") from None
    report_step(path, step, config, device, first, losses, alone, gradients, net)


# ------------------------------------------------------------------------------------------------ dry run
class Assumed(TorchDispatchMode):
    """What a network asks of inputs without numbers: the longest caption has all 77 tokens, and it is true that no frame is padded."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 77 if args[0].dtype == torch.int64 else True
        return func(*args, **(kwargs or {}))


def fused(q, k, v, attn_mask=None):
    """Attention by a GPU's fused kernel, which keeps no scores; where there is no GPU torch would not choose it."""
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]


@contextmanager
def no_numbers():
    """Tensors made here have shapes and devices, but no memory."""
    from unittest.mock import patch

    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode(), Assumed(), patch.object(F, "scaled_dot_product_attention", fused):
        yield


def example(c, preset, n):
    """(network, function that computes its loss on n samples of zeros), as the configuration trains it."""
    v, T = preset.vae, preset.frames
    if c.stage == "vae":
        net, x, noise = VAE(v), torch.zeros(n, v.image_channels, v.size, v.size), torch.zeros(n, v.latent_channels, v.size // v.factor, v.size // v.factor)
        return net, lambda: vae_losses(net, x, torch.zeros(n, 3), noise, v).mean()
    net, z, mask = RDTF(preset), torch.zeros(n, T, v.channels, v.side, v.side), torch.ones(n, T)
    net.dfgn.checkpointing = c.checkpointing
    tokens = torch.ones(n, 77, dtype=torch.int64) if net.text else torch.zeros(n, 77, preset.text.width)
    return net, lambda: net(z, tokens, torch.zeros(n, dtype=torch.int64), torch.zeros_like(z), mask, mask).mean()


def kept_bytes(net, loss):
    """Bytes of the tensors that the backward pass of loss() needs beside the network's own: (all, the most that one Layer adds)."""
    own, seen, layers = {x.untyped_storage()._cdata for x in (*net.parameters(), *net.buffers())}, {}, [0]

    def pack(x):
        storage = x.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage.nbytes()
        return x
    for layer in net.modules():
        if isinstance(layer, Layer):
            layer.register_forward_pre_hook(lambda *_: layers.append(-sum(seen.values())))
            layer.register_forward_hook(lambda *_: layers.append(layers.pop() + sum(seen.values())))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        root = loss()                                                   # keeps them all, so that no storage comes twice
    return sum(seen.values()), max(layers), root


def activations(c, preset, n, bf16):
    """Bytes kept for the backward pass of n samples, on a GPU that need not be there.

    With checkpointing also one layer that is worked out again, or autocast's copies of the weights, which last until the loss."""
    with no_numbers(), torch.device("cuda"):
        torch.set_autocast_enabled("cuda", bf16), torch.set_autocast_dtype("cuda", torch.bfloat16)  # torch.autocast refuses without a GPU
        try:
            kept, layer, _ = kept_bytes(*example(replace(c, checkpointing=False), preset, n))
            if c.checkpointing:
                net, loss = example(c, preset, n)
                kept = kept_bytes(net, loss)[0] + max(layer, 2 * count(net) * bf16)
        finally:
            torch.set_autocast_enabled("cuda", False), torch.clear_autocast_cache()
    return kept


def step_flops(c, preset, n):
    """Floating-point operations of forward and backward pass of n samples, a multiplication and an addition being two."""
    from torch.utils.flop_counter import FlopCounterMode
    with no_numbers(), FlopCounterMode(display=False) as counter:
        example(c, preset, n)[1]().backward()
    return counter.get_total_flops()


def dry_run(config):
    """Print parameters, bytes of one GPU and operations of one step. Nothing of it is allocated."""
    check_options(config)
    preset, world = resolve_config(config.preset, config.set), int(os.environ.get("WORLD_SIZE", 1))
    check_shares(config, world)
    pick_precision(config.precision, torch.device("cpu"))  # refuses an unknown word
    n, bf16 = config.batch // (world * config.accumulate), config.precision != "float32"
    with torch.device("meta"):
        parameters = count(example(config, preset, 1)[0])
    flops = step_flops(config, preset, n) * config.accumulate
    shares = world if config.zero else 1
    kind = f"clips of {preset.frames} frames" if config.stage == "dfgn" else "images"
    rows = dict(weights=(4 * parameters, "float32"), gradients=(4 * parameters, "float32"),
                optimiser=(8 * parameters // shares, f"two moments, float32{f', 1/{shares} of them' if shares > 1 else ''}"),
                averages=(4 * parameters * (config.ema_device == "same"), "of rank 0; float32" if config.ema_device == "same" else "in host memory"),
                activations=(activations(config, preset, n, bf16), f"micro-batch of {n} {kind}, {'bf16' if bf16 else 'float32'}, "
                                                                  f"checkpointing {'on' if config.checkpointing else 'off'}"))
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{'parameters':<12}{parameters / 1e6:9.1f} M     {config.stage}, preset {preset.name}")
        for name, (size, note) in [*rows.items(), ("sum", (sum(size for size, _ in rows.values()), "a GPU, without a kernel's own workspace"))]:
            print(f"{name:<12}{size / 1e9:9.3f} GB    {note}")
        print(f"{'FLOPs':<12}{flops / 1e12:9.3f} T     a step on each of {world} GPUs, {flops * world / 1e12:.3f} T in all: batch of {config.batch} {kind}")


# ------------------------------------------------------------------------------------------------ command line
def field_help():
    """The comment beside each field of TrainConfig."""
    import inspect
    lines = inspect.getsource(TrainConfig).splitlines()
    return {line.split(":")[0].strip(): line.split("# ", 1)[1] for line in lines if "# " in line}


def parse(argv=None, before=()):
    """before: values of fields that stand where argv names none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    helps = field_help()
    for f in dataclasses.fields(TrainConfig):
        default = f.default_factory() if f.default is dataclasses.MISSING else f.default
        kind = dict(nargs="*") if isinstance(default, list) else dict(type=type(default))
        if isinstance(default, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument(option(f.name), default=default, help=f"{helps.get(f.name, '')} (default: {default})".replace("%", "%%"), **kind)
    return TrainConfig(**vars(parser.parse_args(argv, argparse.Namespace(**dict(before)))))


def main(argv=None):
    config = parse(argv)
    try:
        with ExitStack() as held:
            replay(config.replay, argv) if config.replay else dry_run(config) if config.dry_run else train(config, held)
    except RuntimeError as error:                # comes from a signal handler of torch's, anywhere
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(f"--workers: {first_line(error)} The same command goes on from the last checkpoint") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_cli(main)
