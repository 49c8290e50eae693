"""What a GPU would hold and compute in one training step, without a GPU, data or memory.

    python tools/dry_run.py --preset paper --batch 16 --world 8 --checkpointing
    python tools/dry_run.py --stage vae --preset mini --batch 32

The network runs on fake tensors: shapes and devices without numbers, from which torch counts bytes and operations."""
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.nets.text import END  # noqa: E402
from lib.nets.towers import LENGTH, feature_shape  # noqa: E402
from lib.run.files import UserError, run_cli  # noqa: E402
from lib.run.options import check_least, check_words, parse_fields  # noqa: E402
from model import RDTF, VAE, Layer, count, preset  # noqa: E402


@dataclass
class Options:
    stage: str = "dfgn"                   # vae, dfgn
    preset: str = "mini"                  # tiny, mini, paper
    set: list = field(default_factory=list)  # fields of the preset to change, as part.field=value
    batch: int = 4                        # global batch: clips (dfgn) or images (vae)
    world: int = 1                        # processes, one GPU each
    accumulate: int = 1                   # micro-batches that a process cuts its share of the batch into
    checkpointing: bool = False           # dfgn: keep the layers' inputs alone and compute the layers again
    zero: bool = False                    # ZeRO-1: each process keeps its share of the optimiser's state
    ema_device: str = "same"              # where the averaged weights are kept: same (as the network), cpu
    precision: str = "bf16"               # bf16, float32


class Assumed(TorchDispatchMode):
    """Answers what a network asks of fake tensors: the longest caption has all 77 tokens, and no frame is padded."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return LENGTH if args[0].dtype == torch.int64 else True
        return func(*args, **(kwargs or {}))


def fused(q, k, v, attn_mask=None):
    """Attention by a GPU's fused kernel, which keeps no scores; where there is no GPU torch would not choose it."""
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]


@contextmanager
def fake_tensors():
    """Tensors made here have shapes and devices, but no memory."""
    with FakeTensorMode(), Assumed(), patch.object(F, "scaled_dot_product_attention", fused):
        yield


def example(stage, config, n, checkpointing=False):
    """(network, function that computes its mean loss on n samples of zeros), as train.py trains it."""
    v, T = config.vae, config.frames
    if stage == "vae":
        net, x = VAE(v), torch.zeros(n, v.image_channels, v.size, v.size)
        noise = torch.zeros(n, v.latent_channels, v.side, v.side)
        return net, lambda: net(x, torch.zeros(n, 3), noise).mean()
    net, z, mask = RDTF(config), torch.zeros(n, T, v.latent_channels, v.side, v.side), torch.ones(n, T)
    net.dfgn.checkpointing = checkpointing
    if config.text.kind == "small":
        text = torch.full((n, LENGTH), END)
        text[:, :-1] = 1                         # captions as long as they can be
    else:
        text = torch.ones(n, *feature_shape(config.text.kind, config.text.width))
    return net, lambda: net(z, text, torch.zeros(n, dtype=torch.int64), torch.zeros_like(z), mask, mask).mean()


def saved_bytes(net, loss):
    """Bytes that the backward pass of loss() needs beside the network's own: (all, the most that one Layer adds)."""
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
        root = loss()                                     # alive until the sum, so that no storage comes twice
    total = sum(seen.values())
    del root
    return total, max(layers)


def activations(o, config, n):
    """Bytes kept for the backward pass of n samples; with checkpointing also the larger of one layer that is computed
    again and of autocast's copies of the weights, which stay until then."""
    bf16 = o.precision == "bf16"
    with fake_tensors(), torch.device("cuda"):
        torch.set_autocast_enabled("cuda", bf16)          # torch.autocast itself refuses without a GPU
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            saved, layer = saved_bytes(*example(o.stage, config, n))
            if o.checkpointing:
                net, loss = example(o.stage, config, n, True)
                saved = saved_bytes(net, loss)[0] + max(layer, 2 * count(net) * bf16)
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
    return saved


def step_flops(o, config, n):
    """Floating-point operations of forward and backward pass of n samples; a multiplication and an addition are two."""
    with fake_tensors(), FlopCounterMode(display=False) as counter:
        example(o.stage, config, n, o.checkpointing)[1]().backward()
    return counter.get_total_flops()


def main(argv=None):
    o = parse_fields(Options, __doc__, argv)
    check_words(o, stage=("vae", "dfgn"), ema_device=("same", "cpu"), precision=("bf16", "float32"))
    check_least(o, batch=1, world=1, accumulate=1)
    if o.batch % (o.world * o.accumulate):
        raise UserError(f"--batch {o.batch}: not a multiple of --world {o.world} times --accumulate {o.accumulate}")
    if o.checkpointing and o.stage == "vae":
        raise UserError("--checkpointing: the VAE has none; leave it out")
    config, n, shares = preset(o.preset, o.set), o.batch // (o.world * o.accumulate), o.world if o.zero else 1
    kind = f"clips of {config.frames} frames" if o.stage == "dfgn" else "images"
    with torch.device("meta"):
        parameters = count(example(o.stage, config, 1)[0])
    flops = step_flops(o, config, n) * o.accumulate / 1e12
    batch = f"micro-batch of {n} {kind}, {o.precision}, checkpointing {'on' if o.checkpointing else 'off'}"
    moments = "two moments, float32" + (f", 1/{shares} of them" if shares > 1 else "")
    rows = dict(weights=(4 * parameters, "float32"), gradients=(4 * parameters, "float32"),
                optimiser=(8 * parameters // shares, moments),
                averages=(4 * parameters, "of rank 0; float32") if o.ema_device == "same" else (0, "in host memory"),
                activations=(activations(o, config, n), batch))
    rows["sum"] = sum(size for size, _ in rows.values()), "a GPU, without a kernel's own workspace"
    print(f"{'parameters':<12}{parameters / 1e6:9.1f} M     {o.stage}, preset {config.name}")
    for name, (size, note) in rows.items():
        print(f"{name:<12}{size / 1e9:9.3f} GB    {note}")
    print(f"{'FLOPs':<12}{flops:9.3f} T     a step on each of {o.world} GPUs, "
          f"{flops * o.world:.3f} T in all: batch of {o.batch} {kind}")


if __name__ == "__main__":
    run_cli(main)
