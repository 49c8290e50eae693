"""Processes of one training: joining them, gathering values, doing something on every rank or ending on all."""
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from lib.nets.cpu import keep_memory
from lib.run.files import UserError


def shared_store(rank, world):
    """Arguments of init_process_group under torchrun, whose store outlives a restart of the workers.

    A prefix with the restart's number keeps a dead group's addresses from being read again (torch 2.14's agent adds
    none). Only the node whose process died counts a restart, so several nodes must not share the agent's store."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    if int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) and int(os.environ["GROUP_WORLD_SIZE"]) > 1:
        raise UserError("torchrun --max-restarts on several nodes: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on each of "
                        "them, or the processes would not find each other after a restart")
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, is_master=False)
    prefix = f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    return dict(store=dist.PrefixStore(prefix, store), rank=rank, world_size=world)


def setup():
    """(rank, world, device) of this process; joins the group that torchrun announces."""
    keep_memory()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # An hour: rank 0 may encode latents meanwhile.
        dist.init_process_group(backend, timeout=timedelta(hours=1), **shared_store(rank, world))
    return rank, world, device


def gather(values, world):
    """Concatenate a tensor of equal shape from every rank along its first axis, in rank order."""
    if world == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world)]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def on_rank_0(work, rank, world):
    """work() on rank 0, which the others wait for; where it fails all end."""
    on_all_ranks(lambda: work() if rank == 0 else None, world)


def on_all_ranks(work, world):
    """work() on every rank. Where it fails on one, all end: in the next step the others would wait for it."""
    error = None
    try:
        work()
    except (UserError, OSError) as failure:
        error = failure
        if world > 1:                            # printed at once: torchrun ends all ranks when the first of them ends
            print(f"error: {error}", file=sys.stderr, flush=True)
    if gather(torch.tensor([float(error is not None)]), world).any():
        raise error if world == 1 else SystemExit(2)
