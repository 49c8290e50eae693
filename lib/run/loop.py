"""What a training loop needs whatever it trains: signals, loaders, precision, optimiser, EMA, log window, state."""
import contextlib
import math
import multiprocessing
import os
import signal
import tempfile
import time

import numpy as np
import torch
import torch.distributed as dist

from lib.nets.cpu import peak_memory
from lib.run.checkpoints import read_state, states
from lib.run.distributed import gather, on_all_ranks
from lib.run.files import UserError, atomic_write, first_line

# Save, then end: what a terminal, a scheduler or a limit sends. BREAK: a closed console of Windows.
STOPPING = tuple(signal.Signals[f"SIG{name}"] for name in
                 "TERM INT HUP QUIT USR1 USR2 XCPU PWR BREAK".split() if hasattr(signal, f"SIG{name}"))
MAY_BE_IGNORED = "SIGHUP", "SIGQUIT"      # by nohup and shells, and then they stay so; torchrun hands them on itself
PATIENCE = 600                            # seconds that a batch of loading processes is waited for
FORKS = "fork" in multiprocessing.get_all_start_methods()  # not on Windows


def check_launch():
    """UserError for a RANK or WORLD_SIZE without torchrun's other variables: a process that nobody waits for."""
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing and ("RANK" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1"):
        raise UserError(f"RANK or WORLD_SIZE is set, {', '.join(missing)} not: start with torchrun, or unset it")


def check_batch(batch, accumulate, world):
    if batch % (world * accumulate):
        times = f" times --accumulate {accumulate}" if accumulate > 1 else ""
        raise UserError(f"--batch {batch}: not a multiple of the {world} processes{times}")


def note_signals(stack):
    """List of the signals to stop that come until the ExitStack is closed. After one, Ctrl-C ends the process."""
    came = []

    def note(number, _):
        came.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for number in STOPPING:
        ignored = signal.getsignal(number) == signal.SIG_IGN and "TORCHELASTIC_RUN_ID" not in os.environ
        if not (ignored and number.name in MAY_BE_IGNORED):
            stack.callback(signal.signal, number, signal.signal(number, note))
    return came


def ignore_signals(_):
    """In loader processes: a signal to the whole process group is for the main process, which saves first."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def check_workers(workers):
    """UserError where loading processes could not hand their batches over, which would be waited for in vain."""
    if not workers:
        return
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > 70:        # of 103 to 107 characters that a socket's name may have
        raise UserError(f"--workers {workers}: the folder of temporary files, {folder}, has a name too long for "
                        "sockets; export TMPDIR=/tmp, or give --workers 0")
    try:
        torch.zeros(workers).share_memory_()
    except RuntimeError as error:
        raise UserError(f"--workers {workers}: no shared memory here ({first_line(error)}); give --workers 0") from None


def load_batches(dataset, sampler, workers, device):
    """Yield batches, stacked in the loader's processes, whose UserError comes without torch's traceback before it.

    For a GPU they lie in pinned memory, put there by a thread while the loop computes. RuntimeError: none came."""
    check_workers(workers)
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=sampler, num_workers=workers,
                                         pin_memory=device.type == "cuda", timeout=PATIENCE if workers else 0,
                                         multiprocessing_context="fork" if workers and FORKS else None,
                                         worker_init_fn=ignore_signals)
    batches = iter(loader)
    try:
        yield from batches
    except UserError as error:
        raise UserError(str(error).strip().rpartition("UserError: ")[2]) from None
    finally:
        if workers:
            batches._shutdown_workers()          # they ignore SIGTERM, so Python's exit would wait for ever,
            for worker in batches._workers:      # also for one that is stuck
                worker.kill()


def micro_batches(batch, count):
    """{name: tensor} -> `count` of them."""
    return [dict(zip(batch, part)) for part in zip(*(v.chunk(count) for v in batch.values()))]


def compute_losses(net, batch, precision, device):
    """net(**batch), losses (b,); from pinned memory the copies to a GPU wait for nothing."""
    if device.type == "cuda":
        batch = {k: v if v.is_cuda else v.pin_memory().to(device, non_blocking=True) for k, v in batch.items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        return net(**batch)


def pick_precision(asked, net, stage):
    """float32 or bf16. auto: bf16 on a GPU that has it; on a CPU the faster one, as rank 0 finds.

    It computes the first micro-batch forward and backward; nothing is drawn and no weight changes. bf16 must be a tenth
    faster than float32: where they are alike, the choice is to be the same on every start."""
    if asked != "auto":
        return asked
    if stage.device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    choice = ["float32"]
    if stage.rank == 0:
        batch, _ = next(stage.batches(0))
        part, seconds = micro_batches(batch, stage.config.accumulate)[0], {}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)                 # several would spend processor time waiting for each other
        for precision in ("float32", "bf16") * 3:
            began = time.process_time()          # of this process alone: others may keep the machine busy
            compute_losses(net, part, precision, stage.device).mean().backward()
            net.zero_grad(set_to_none=True)
            seconds[precision] = min(time.process_time() - began, seconds.get(precision, math.inf))
        torch.set_num_threads(threads)
        choice = ["bf16" if seconds["bf16"] < 0.9 * seconds["float32"] else "float32"]
        times = " and ".join(f"{s:.2f} s in {precision}" for precision, s in seconds.items())
        print(f"--precision auto: {choice[0]} (CPU time of a step: {times})")
    if stage.world > 1:
        dist.broadcast_object_list(choice, device=torch.device("cpu"))
    return choice[0]


def own_rates(net, c):
    """{name: learning rate / --lr} of the parameters whose rate is their own."""
    return {**{name: c.text_lr for name, _ in net.named_parameters() if name.startswith("text.")},
            "text.token.weight": c.embedding_lr}


def make_optimizer(net, lr, weight_decay, zero, scales):
    """AdamW. zero: each process keeps the moments of its share of the parameters (ZeRO-1).

    scales: {name: factor of the learning rate} of some parameters, which do not decay; 1 for all others."""
    groups = {}
    for name, p in net.named_parameters():
        if p.requires_grad:
            groups.setdefault(scales.get(name, 1.0), []).append(p)
    parameters = [dict(params=members, scale=scale, weight_decay=weight_decay if scale == 1 else 0.0)
                  for scale, members in groups.items()]
    options = dict(lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99), fused=True)
    if zero:
        from torch.distributed.optim import ZeroRedundancyOptimizer
        return ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, **options)
    return torch.optim.AdamW(parameters, **options)


def load_optimizer(optimizer, state):
    """Load what AdamW, or ZeRO's rank 0, wrote. ValueError for moments of another shape: torch does not look."""
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if any(state["state"][i][name].shape != p.shape for name in ("exp_avg", "exp_avg_sq")):
            raise ValueError(f"optimiser: moments of another shape than parameter {i}")
    optimizer.load_state_dict(state)
    if local := getattr(optimizer, "optim", None):
        local.load_state_dict(local.state_dict())  # ZeRO leaves step counts on the host, where the fused kernel fails,
        optimizer.state.clear()                    # and a second copy of the moments


def complete_state(optimizer):
    """On all ranks before a checkpoint: ZeRO's shares come to rank 0, copies into host memory arrive."""
    if hasattr(optimizer, "consolidate_state_dict"):
        optimizer.consolidate_state_dict()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def check_finite(stage, run, step, losses, tags, norm, tasks):
    """Stop all ranks at a loss or gradient that is not finite; rank 0 names the samples. The last checkpoint stays.

    losses (B,), tags (B, 4) as a stage's batches have them; tasks: names of the tasks."""
    bad = tags[~np.isfinite(losses)]
    if not len(bad) and math.isfinite(norm):
        return
    what, samples = ("loss", bad) if len(bad) else ("gradient", tags)
    records, named = stage.stickers.records, []
    for task, t, i, _ in samples[:3]:
        condition = f", {tasks[task]} at timestep {t}" if stage.curriculum else ""
        named.append(f"line {records.rows[i] + 1}, {records[i].get('caption', '')!r}{condition}")
    last = f"the last checkpoint is {run / 'state.pt'}" if states(run) else "no checkpoint was saved yet"

    def stop():
        if stage.rank == 0:
            raise UserError(f"{run}: {what} is not finite at step {step} ({len(bad)} of {len(losses)} losses; "
                            f"{records.path}: {'; '.join(named)}); {last}; lower --lr in another --out or look at them")
    on_all_ranks(stop, stage.world)


class EMA:
    """Averaged weights. host: kept in host memory, pinned, so that copies from a GPU wait for nothing."""

    def __init__(self, net, decay, host=False):
        self.net, self.decay, self.host, self.weights = net, decay, host, {}
        for k, v in net.state_dict().items():
            empty = torch.empty_like(v, device="cpu", pin_memory=v.is_cuda) if host else torch.empty_like(v)
            self.weights[k] = empty.copy_(v.detach())

    @torch.no_grad()
    def update(self, step):
        """Move towards the network's weights; the decay rises over the first steps."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        named = {k: p for k, p in self.net.named_parameters() if p.requires_grad}
        if not self.host:
            torch._foreach_lerp_([self.weights[k] for k in named], list(named.values()), share)
            return
        for k, w in named.items():               # one by one on the network's device: the sums are the same
            mean = self.weights[k]
            mean.copy_(mean.to(w.device, non_blocking=True).lerp_(w, share), non_blocking=True)

    def state_dict(self):
        return self.weights

    def load_state_dict(self, state):
        for k, v in self.weights.items():
            v.copy_(state[k])


class Window:
    """Means and rates since the last log line. The sums are in checkpoints: a resumed run writes the same lines."""

    def __init__(self):
        self.restart()

    def restart(self):
        self.sums, self.seen, self.saving = {}, 0, 0.0
        self.began, self.cpu = time.perf_counter(), time.process_time()

    def add(self, key, value):
        total, count = self.sums.get(key, (0.0, 0))
        self.sums[key] = (total + value, count + 1)

    def means(self, prefix):
        found = {k[len(prefix):]: s / n for k, (s, n) in sorted(self.sums.items()) if k.startswith(prefix)}
        return {k: float(f"{mean:.7g}") for k, mean in found.items()}

    def totals(self, prefix):
        return {k[len(prefix):]: int(s) for k, (s, _) in sorted(self.sums.items()) if k.startswith(prefix)}

    @contextlib.contextmanager
    def pause(self):
        """What is done inside is no training: its seconds are counted by themselves."""
        began = time.perf_counter()
        yield
        self.saving += time.perf_counter() - began

    def rates(self, device, world):
        """Samples a second without the time of saving, CPU seconds of all ranks, seconds of saving, memory at most
        (MiB)."""
        memory = torch.cuda.max_memory_allocated() / 2 ** 20 if device.type == "cuda" else peak_memory()
        rate = self.seen / (time.perf_counter() - self.began - self.saving)
        cpu = float(gather(torch.tensor([time.process_time() - self.cpu]), world).sum())
        return dict(clips_per_s=round(rate, 2), cpu_s=round(cpu, 2), save_s=round(self.saving, 3),
                    peak_mb=round(memory))

    def state_dict(self):
        return self.sums

    def load_state_dict(self, state):
        self.sums = {k: tuple(v) for k, v in state.items()}


def restore(run, parts, remove_damaged):
    """Load the newest checkpoint of a run into its parts {name: object}. -> its step, 0 where there is none."""
    state = read_state(run, remove_damaged)
    if state is None:
        return 0
    try:
        for name, part in parts.items():
            load_optimizer(part, state[name]) if name == "optimizer" else part.load_state_dict(state[name])
        return int(state["step"])
    except Exception as error:                   # that of another network or version may raise nearly anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"
        raise UserError(f"{run}: its checkpoint is not one of this run ({reason}); put the right state.pt there, "
                        "or name another --out") from None


def save_state(run, step, parts):
    """Write state.pt; the one before becomes state.prev.pt."""
    def write(path):
        with open(path, "wb") as file:           # a Python file: torch's own hides the reason why writing failed
            torch.save(dict(step=step, **{name: part.state_dict() for name, part in parts.items()}), file)
    atomic_write(run / "state.pt", write, run / "state.prev.pt")
