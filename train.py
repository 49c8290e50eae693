"""Train the VAE, then the DFGN, on one process or many. The same command again resumes.

    python train.py --stage vae --data data/fluent --out runs/vae
    python train.py --data data/fluent --vae runs/vae/model.safetensors --out runs/dfgn
    torchrun --nproc_per_node=2 train.py ...                      # CPU (gloo) or CUDA (nccl)
    python train.py --set dfgn.temporal=conv3d --out runs/conv3d  # any field of model.Config
    python train.py --base other.safetensors --out runs/tuned     # start from another run of this preset and VAE
    python train.py --stage vae --base vae.safetensors --set vae.latent_noise=0.2 --out runs/decoder  # decoder alone
    python train.py --preset base --method simda --base base.safetensors --out runs/simda  # a compared method
    torchrun --nproc_per_node=8 train.py --preset paper --data data/vsd2m --vae sd-vae.safetensors \\
        --clip-weights open_clip_pytorch_model.bin

A run folder holds config.json, log.jsonl, state.pt (all that resuming needs), state.prev.pt (the one before), lock and
model.safetensors (EMA weights and configuration: what one shares). SIGTERM, Ctrl-C, a closed terminal (unless nohup has
it ignored), USR1, USR2 and XCPU, as schedulers and limits send them, save and end with status 128 + their number; a
second Ctrl-C ends at once. Bad input, a full disk and values that are not finite end with one line and status 2.

Every random draw of global sample n of step s is a function of (seed, s, n) alone: a resumed run equals an
uninterrupted one bit for bit, and N ranks see exactly the draws of one. Another number of threads or ranks sums in
another order: the same draws, other last digits.
"""
import math
import signal
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from curriculum import MODES, Curriculum
from data import TASKS, rng_for
from lib import loop, peft
from lib.autoencoder import held_out_psnr, measure_latents
from lib.checkpoints import append, check_equal, check_same_config, lock_run, states, write_config
from lib.distributed import gather, on_all_ranks, setup
from lib.files import UserError, first_line, real_folder, run_cli
from lib.media import contact_sheet, to_tensor
from lib.options import parse_fields
from lib.towers import cache_features, name_tower
from lib.train_options import check_method, check_options, load_absorber, read_prompts
from lib.weights import identity, is_own, load_fitting, names_of, read_own, save_model
from model import RDTF, VAE, Config, load_vae, preset
from sample import Sampler

UNKNOWN = np.array([data.unknown_share(task) for task in TASKS])
COMPILER = "inductor"                     # torch.compile's backend; the tests take a faster one
MAY_CHANGE = {"workers", "log_every", "save_every", "sample_every", "prompts", "out", "accumulate", "checkpointing",
              "zero", "compile",
              "ema_device", "precision",  # when a run goes on; and these, whose hashes must be the same:
              "data", "vae", "base", "absorber", "clip_weights", "clip_model"}


@dataclass
class TrainConfig:
    stage: str = "dfgn"                   # vae, or dfgn (which needs a trained vae)
    data: list = field(default_factory=lambda: ["data/fluent"])  # prepared sets (python data.py), trained on together
    groups: list = field(default_factory=list)  # emoji groups to train on; none named: all
    out: str = ""                         # run folder; default runs/<stage>
    preset: str = "mini"                  # tiny, mini, paper
    set: list = field(default_factory=list)  # fields of the preset to change, as part.field=value
    vae: str = "runs/vae/model.safetensors"  # VAE of the dfgn stage: of the vae stage, or Stable Diffusion's weights
    base: str = ""                        # weights to start from, of this preset and VAE; vae stage: tunes the decoder
    method: str = "rdtf"                  # rdtf (all is trained), or what tunes --base: see lib/peft.py
    rank: int = 16                        # of LoRA
    absorber: str = ""                    # customize_a_video: model.safetensors of --method appearance_lora
    clip_weights: str = ""                # text.kind=open_clip: its weights, a file or a folder with a configuration
    clip_model: str = "ViT-H-14"          # open_clip's name of the model of that file; a folder says it itself
    text_variants: int = 4                # text.kind=open_clip: texts of a sticker, drawn once
    steps: int = 3000                     # optimiser steps
    batch: int = 4                        # global batch: clips (dfgn) or images (vae); for stills T times as many
    accumulate: int = 1                   # micro-batches of each process's share of the batch, to save memory
    checkpointing: bool = False           # dfgn: compute the layers again in the backward pass, to save memory
    zero: bool = False                    # ZeRO-1: each of several processes keeps its share of the optimiser's state
    compile: bool = False                 # torch.compile the network: minutes at the start, faster steps on a GPU
    lr: float = 1e-3                      # peak learning rate
    embedding_lr: float = 10.0            # text.kind=small: learning rate of the token embeddings, times --lr
    lr_schedule: str = "cosine"           # cosine (to zero), constant
    warmup: int = 100                     # steps of linear warm-up
    weight_decay: float = 0.01            # AdamW
    grad_clip: float = 1.0                # largest gradient norm
    ema: float = 0.999                    # decay of the averaged weights; rises to it over the first steps
    ema_device: str = "same"              # where the averaged weights are kept: same (as the network), cpu
    precision: str = "auto"               # float32, bf16 (autocast), auto: bf16 where it is faster
    seed: int = 0                         # of all draws and of the initial weights
    tasks: list = field(default_factory=list)  # tasks to train on; none named: all six
    curriculum: str = "adaptive"          # none, linear, adaptive
    how: str = "mixed"                    # frames of a clip: kmeans (paper), even, mixed (a coin decides)
    frames: str = "step"                  # k of 3..T frames is drawn per step, or per sample (paper); full: always T
    still_share: float = 0.5              # share of the steps on single frames, T of them for a clip
    word_dropout: float = 0.2             # a word of a caption becomes "#"
    keywords: float = 0.5                 # keywords are appended to a caption
    text_drop: float = 0.10               # the text alone is dropped where no frame is given
    given_text_drop: float = 0.5          # the text alone is dropped where frames are given
    cond_drop: float = 0.10               # the given frames alone are dropped
    both_drop: float = 0.05               # both are dropped
    workers: int = 0                      # data loading processes; changes nothing but the speed
    log_every: int = 20                   # steps
    save_every: int = 500                 # steps
    sample_every: int = 0                 # dfgn: steps between contact sheets of --prompts; 0: none
    prompts: str = ""                     # dfgn: file of captions to draw on them, one a line


# ---- VAE stage
class VAEStage:
    """What the loop asks of a stage. __init__ refuses bad input; what is slow comes in prepare."""
    curriculum = None

    def __init__(self, config, rank, world, device):
        self.config, self.rank, self.world, self.device = config, rank, world, device
        self.preset = preset(config.preset, config.set)
        self.stickers, where = data.StickerSet(config.data, "train", config.groups or None), " ".join(config.data)
        if self.stickers.size != self.preset.vae.size:
            raise UserError(f"--data {where}: {self.stickers.size} px, "
                            f"preset {config.preset} wants {self.preset.vae.size}")
        if not len(self.stickers):
            raise UserError(f"--data {where}: no sticker (of --groups, if named) is in its train split; splits "
                            "are drawn by concept, so prepare more captions")
        self.inputs = dict(data=self.stickers.meta["hash"])  # a resumed run must have the same,
        self.names = {}                       # under these or other names of theirs
        self.base, self.facts = None, {}
        if config.base and config.stage == "vae":
            vae, meta = load_like("--base", config.base, self.preset.vae)
            self.base, self.facts = vae.state_dict(), dict(latents=meta["latents"])
            self.add_input("base", config.base)

    def add_input(self, name, path):
        self.inputs[name], self.names[name] = identity(path), names_of(path)

    def prepare(self):
        """Nothing slow here."""

    def network(self, fresh):
        self.net = VAE(self.preset.vae)
        if self.base:                         # the encoder stays, and so do the latents that a DFGN is trained on
            self.net.load_state_dict(self.base)
            self.net.freeze_encoder()
        elif fresh and self.preset.vae.shortcut:
            images = [draw_image(self.stickers, self.config.seed, 0, n)[0] for n in range(256)]
            self.net.start_shortcut(self.net.images(torch.stack(images)))
        return self.net.to(self.device)

    def batches(self, start, workers=0):
        """Yield (step, arguments of VAE.forward, tags (b, 4)): no task, no timestep, number of the sticker, frames."""
        c, v = self.config, self.preset.vae
        for step, keys in enumerate(data.StepSampler(c.batch, start, c.steps, self.rank, self.world), start):
            share = [n for _, n, *_ in keys]
            images, background, index = zip(*(draw_image(self.stickers, c.seed, step, n) for n in share))
            shape = (v.latent_channels, v.side, v.side)
            rngs = [rng_for(c.seed, step, n, 2) for n in share]
            noise = torch.from_numpy(np.stack([rng.standard_normal(shape, np.float32) for rng in rngs]))
            std = torch.tensor([abs(rng.standard_normal()) * v.latent_noise for rng in rngs])[:, None, None, None]
            batch = dict(x=self.net.images(torch.stack(images)), background=torch.stack(background), noise=noise,
                         noise_std=std)
            yield step, batch, torch.tensor([[0, 0, i, 1] for i in index])

    def finish(self, weights):
        """(EMA weights with the latents' statistics, metadata, a line on the held-out PSNR)."""
        vae = VAE(self.preset.vae).to(self.device).eval()
        vae.load_state_dict(weights)
        if not self.base:
            measure_latents(vae, self.stickers, rng_for(self.config.seed, 0, 0, 9))
        held_out = data.StickerSet(self.config.data, "test", self.config.groups or None)
        psnr, line = held_out_psnr(vae, held_out)
        return vae.state_dict(), self.facts | psnr, line


def draw_image(stickers, seed, step, n):
    """A random frame of a random concept (4, S, S), premultiplied in [-1, 1], its background (3,), its sticker."""
    rng = rng_for(seed, step, n, 0)
    index = int(rng.choice(stickers.members[rng.integers(len(stickers.members))]))
    record = stickers.records[index]
    frame = stickers.clip(record, [rng.integers(record["n"])])
    return to_tensor(frame)[0], torch.from_numpy(rng.uniform(-1, 1, 3).astype(np.float32)), index


# ---- DFGN stage
class DFGNStage(VAEStage):
    def __init__(self, config, rank, world, device):
        super().__init__(config, rank, world, device)
        clips = round(config.steps * config.batch * (1 - config.still_share))
        self.curriculum = Curriculum(config.curriculum, config.steps, config.tasks, losses=clips)
        self.tower = self.texts = self.base = self.absorber = None
        if (self.preset.text.kind == "open_clip") != bool(config.clip_weights):
            raise UserError(f"--clip-weights {config.clip_weights}: a local file where text.kind is open_clip, nothing "
                            f"elsewhere; with these options it is {self.preset.text.kind}")
        if config.clip_weights:
            self.tower = name_tower(config.clip_weights, config.clip_model, self.preset.text.width)
            self.inputs["clip_weights"] = self.tower["hash"]
        self.vae, meta = load_like("--vae", config.vae, self.preset.vae)
        self.inputs["vae"], self.names["vae"] = meta["latents"], meta["names"]
        if config.base:
            self.base = load_base(config.base, self.preset, meta["names"], self.inputs.get("clip_weights"))
            self.add_input("base", config.base)
        if config.absorber:
            self.absorber = load_absorber(config.absorber, config.rank, self.names["base"])
            self.add_input("absorber", config.absorber)
        if not self.tower:
            words = self.base["text.vocabulary"] if self.base else data.vocabulary(self.stickers.records)
            self.vocabulary = torch.as_tensor(words)
            self.preset.text.vocab = len(self.vocabulary)
        self.prompts = read_prompts(config.prompts) if config.sample_every else []

    def prepare(self):
        """Encode all frames, and all texts of a frozen tower, unless an earlier run did; map them on all ranks."""
        on_all_ranks(lambda: self.rank == 0 and self.cache(), self.world)
        for folder in self.config.data:
            if not data.latents_path(data.StickerSet(folder), self.inputs["vae"]).is_file():
                raise UserError(f"--data {folder}: rank {self.rank} does not see the latents that rank 0 wrote; "
                                "all nodes must share this folder")
        self.cache()
        self.vae.encoder = self.vae.decoder = None  # it standardises latents from here on

    def cache(self):
        c = self.config
        self.latents = data.cache_latents(c.data, self.vae.to(self.device), self.inputs["vae"])
        if self.tower:
            self.texts = data.StickerTexts(self.stickers, c.text_variants, c.seed, c.word_dropout, c.keywords)
            made_of = [self.inputs["data"], sorted(c.groups), c.text_variants, c.seed, c.word_dropout, c.keywords]
            width = self.preset.text.width
            self.features = cache_features(c.data[0], made_of, self.tower, width, self.texts, data.tokenize,
                                           self.device)

    def network(self, fresh):
        net = RDTF(self.preset)
        if fresh and self.base:
            new = load_fitting(net, self.base, self.config.base, self.rank == 0)
            if any(name.startswith("dfgn.known.") for name in new):  # what read the old encoder is deaf to the new one
                net.dfgn.stem.weight.data[:, net.config.dfgn.channels:] = 0
        elif net.text:
            net.text.vocabulary.copy_(self.vocabulary)
        self.base = None                      # as large as the network
        if self.config.method != "rdtf":
            peft.inject(net, self.config.method, self.config.rank, self.absorber)
            self.adapter = net.adapter
        net.dfgn.checkpointing = self.config.checkpointing
        return net.to(self.device)

    def batches(self, start, workers=0):
        """Yield (step, arguments of RDTF.forward, tags (b, 4)): task, timestep, number of the sticker, real frames."""
        c, T = self.config, self.preset.frames
        clips = data.ClipDataset(self.stickers, self.latents, c.seed, c.batch, T, c.how,
                                 "sample" if c.frames == "sample" else "step", c.word_dropout, c.keywords, self.texts)
        sampler = data.StepSampler(c.batch, start, c.steps, self.rank, self.world, lambda step: step_frames(c, step, T))
        for step, batch in enumerate(loop.load_batches(clips, sampler, workers, self.device), start):
            yield step, *self.condition(batch, self.curriculum.probabilities(step))

    def condition(self, clips, p):
        """Choose task (with probabilities p), mask, text and timestep of each of the clips, a batch of ClipDataset."""
        T, timesteps = clips["z"].shape[1], self.preset.diffusion.steps
        z, loss_mask = (clips[name].to(self.device, non_blocking=True) for name in ("z", "loss_mask"))
        drawn = [draw_condition(self.config, p, u, n, T, timesteps)
                 for u, n in zip(clips["draws"].tolist(), clips["n"].tolist())]
        task, masks, has_text, t = zip(*drawn)
        z = self.vae.standardise(z.flatten(0, 1)).unflatten(0, (-1, T))
        batch = dict(z0=z * loss_mask[:, :, None, None, None], tokens=self.tokens(clips, torch.tensor(has_text)),
                     t=torch.tensor(t), noise=clips["noise"], cond_mask=torch.from_numpy(np.stack(masks)),
                     loss_mask=loss_mask)
        return batch, torch.stack([torch.tensor(task), batch["t"], clips["index"], clips["n"]], 1)

    def tokens(self, clips, has_text):
        """Tokens (B, L), or a tower's features (B, L, D), of which row 0 is the empty text's."""
        if not self.tower:
            return clips["tokens"].where(has_text[:, None], data.tokenize([""]))
        return torch.from_numpy(self.features[clips["text_row"] * has_text].astype(np.float32))

    def finish(self, weights):
        c, tower = self.config, dict(text=self.tower) if self.tower else {}
        facts = dict(vae=self.inputs["vae"], vae_file=str(c.vae), **tower)
        if c.method != "rdtf":
            facts.update(kind="adapter", method=c.method, rank=c.rank, base=self.inputs["base"], base_file=str(c.base))
            weights = {name: weights[name] for name in self.adapter}
        return weights, facts, ""


STAGES = {"vae": VAEStage, "dfgn": DFGNStage}


def load_like(option, path, wanted):
    """(VAE, metadata) of a file, which must be of the wanted VAEConfig but in what only its training reads."""
    vae, meta = load_vae(path)
    free = ("kl_weight", "latent_noise", *(("size",) if meta.get("any_size") else ()))  # size: Stable Diffusion's
    check_equal(f"{option} {path}", vae.config, wanted, free)
    return vae, meta


def load_base(path, config, vae, tower):
    """Weights of another run, its vocabulary too; it must be of the same configuration, VAE (its names) and tower."""
    meta, weights = read_own(path, "dfgn", "train one with `python train.py`")
    theirs = Config.from_dict(meta["config"])
    for part in ("text", "dfgn", "diffusion"):
        check_equal(f"--base {path}", getattr(theirs, part), getattr(config, part), free=("vocab", "given"))
    if meta["vae"] not in vae or meta.get("text", {}).get("hash") != tower:
        raise UserError(f"--base {path}: trained with another VAE or text tower than --vae or --clip-weights")
    return weights


def draw_condition(c, p, u, n, T, timesteps):
    """(task number, condition mask (T,), whether the text is kept, timestep) of n real frames; u (4,): the draws."""
    task = data.fit_task(TASKS[min(int(np.searchsorted(p.cumsum(), u[0])), len(TASKS) - 1)], n)
    mask, drop, t = data.cond_mask(task, n, T, u[1]), u[2], int(u[3] * timesteps)
    text_drop = c.given_text_drop if mask.any() else c.text_drop
    no_text = task == "i2v" or drop < text_drop + c.both_drop
    if text_drop <= drop < text_drop + c.both_drop + c.cond_drop:
        mask = np.zeros_like(mask)
    return TASKS.index(task), mask, not no_text, t


def step_frames(c, step, T):
    """(frames of a clip in this step, clips a batch slot stands for): T stills for a clip, or clips, half of which have
    all T frames and the others 3 to T - 1."""
    rng = rng_for(c.seed, step, 0, 3)
    if rng.random() < c.still_share:
        return 1, T
    whole = c.frames != "step" or T < 4 or rng.random() < 0.5
    return (T if whole else int(rng.integers(3, T))), 1


# ---- one step, one log line, one checkpoint
def learning_rate(c, step):
    ramp = min(1.0, (step + 1) / max(c.warmup, 1))
    return c.lr * ramp * (0.5 * (1 + math.cos(math.pi * step / c.steps)) if c.lr_schedule == "cosine" else 1.0)


class Trainer:
    """A run's network, optimiser, averages, curriculum and log window: `parts`, which a checkpoint holds; its step."""

    def __init__(self, config, stage, run, net, precision):
        self.config, self.stage, self.run, self.net, self.ddp = config, stage, run, net, net
        self.rank, self.world, self.device, self.precision = stage.rank, stage.world, stage.device, precision
        zero = config.zero and self.world > 1
        scales = {"text.token.weight": config.embedding_lr}
        self.optimizer = loop.make_optimizer(net, config.lr, config.weight_decay, zero, scales)
        self.parts = dict(net=net, optimizer=self.optimizer, window=loop.Window())
        if self.rank == 0:                       # who alone writes them
            self.parts["ema"] = loop.EMA(net, config.ema, config.ema_device == "cpu")
        if stage.curriculum:
            self.parts["curriculum"] = stage.curriculum
        self.window, self.step = self.parts["window"], loop.restore(run, self.parts, remove_damaged=self.rank == 0)
        if len(set(gather(torch.tensor([self.step]), self.world).tolist())) > 1:
            raise UserError(f"--out {run}: the processes do not see the same checkpoint; all nodes must share it")
        if config.compile:
            net.compile(backend=COMPILER)        # in place: the names of its weights stay
        if self.world > 1:
            self.ddp = DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)

    def backward(self, batch):
        """Losses (b,) of this rank's samples and the gradients' norm; they are clipped, and equal on all ranks."""
        parts, losses = loop.micro_batches(batch, self.config.accumulate), []
        for i, part in enumerate(parts, 1):
            last = i == len(parts)               # the gradients are summed over processes once
            with nullcontext() if last or self.world == 1 else self.ddp.no_sync():
                each = loop.compute_losses(self.ddp, part, self.precision, self.device)
                (each.mean() / len(parts)).backward()
            losses.append(each.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.config.grad_clip)
        return torch.cat(losses).cpu(), float(norm)

    def apply(self):
        """Take the step: weights and averages."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step) * group["scale"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if "ema" in self.parts:
            self.parts["ema"].update(self.step)

    def observe(self, table, norm):
        """Take all ranks' losses and tags, table (B, 5 and more), into log window and curriculum."""
        losses, tasks = table[:, 0], table[:, 1].astype(int)
        deciles = (table[:, 2] * 10 // self.stage.preset.diffusion.steps).astype(int)
        self.window.seen += len(losses)
        self.window.add("loss", float(losses.mean()))
        self.window.add("norm", norm)
        self.extra = {}
        if curriculum := self.stage.curriculum:
            for loss, task, decile in zip(losses.tolist(), tasks, deciles):
                self.window.add(f"task {TASKS[task]}", loss)
                self.window.add(f"decile {decile}", loss)
            entropy, clips = round(curriculum.entropy(self.step), 6), table[:, 4] > 1
            self.window.add("entropy_all", float(np.where(clips, UNKNOWN[tasks], 1).mean()))
            if clips.any():                      # a still has no task to choose: it says nothing of r
                curriculum.observe(losses[clips], tasks[clips], deciles[clips])
            self.extra = dict(entropy=entropy, r=round(curriculum.r, 6))
        self.step += 1

    def log(self):
        """Write a line and begin a new window. -> the line."""
        means = self.window.means
        if self.stage.curriculum:
            self.extra["entropy_all"] = means("entropy_all")[""]
        line = dict(step=self.step, loss=means("loss")[""], grad_norm=means("norm")[""],
                    lr=learning_rate(self.config, self.step - 1), **self.extra,
                    tasks=means("task "), deciles=means("decile "), **self.window.rates(self.device, self.world))
        on_all_ranks(lambda: self.rank == 0 and append(self.run / "log.jsonl", line), self.world)
        self.window.restart()
        return line

    def save(self):
        began = time.perf_counter()
        loop.complete_state(self.optimizer)
        on_all_ranks(lambda: self.rank == 0 and self.write(), self.world)
        self.window.saving += time.perf_counter() - began

    def draw(self):
        """A contact sheet of the prompts by the averaged weights, as saved; the noise is the same each time."""
        sampler = Sampler(self.run / "model.safetensors", self.config.vae, self.device, self.config.clip_weights)
        prompts = self.stage.prompts
        clips = sampler.sample(prompts, [(self.config.seed, k) for k in range(len(prompts))])
        contact_sheet(clips, self.run / f"samples-{self.step:06}.png", labels=prompts)

    def write(self):
        append(self.run / "log.jsonl", durably=True)  # the checkpoint says that its lines are there
        line = self.write_model()
        loop.save_state(self.run, self.step, self.parts)  # its step says what is done
        if line:
            print(line)

    def write_model(self):
        """Write model.safetensors. -> a line on it."""
        weights, extra, line = self.stage.finish(self.parts["ema"].weights)
        facts = dict(kind=self.config.stage, step=self.step, config=self.stage.preset.to_dict())
        save_model(self.run / "model.safetensors", weights, **{**facts, **extra})
        return line

    def finished(self):
        """Of a run that is done: say so, and write its model again where that is gone or damaged."""
        model = self.run / "model.safetensors"
        if is_own(model):
            print(f"{self.run}: done, {self.step} steps; nothing to do")
        else:
            self.write_model()
            print(f"{self.run}: done, {self.step} steps; {model} was gone or damaged and is written again")


# ---- the road
def train(config, stack):
    """Train a stage to its end, or to a SIGTERM or Ctrl-C. stack: ExitStack of what ends with the run."""
    loop.check_launch()
    check_options(config, stage=STAGES, curriculum=MODES, tasks=TASKS)
    check_method(config, preset(config.preset, config.set).dfgn)
    rank, world, device = setup()
    loop.check_batch(config.batch, config.accumulate, world)
    stage = STAGES[config.stage](config, rank, world, device)
    run = real_folder(config.out or f"runs/{config.stage}")
    on_all_ranks(lambda: rank == 0 and stack.enter_context(lock_run(run)), world)
    facts = dict(train=asdict(config), model=stage.preset.to_dict(), inputs=stage.inputs,
                 precision=config.precision, world=world)
    fresh, changed = not states(run), []
    if not fresh:
        facts["precision"], changed = check_same_config(run, facts, MAY_CHANGE, asdict(TrainConfig()), stage.names)
    stage.prepare()
    torch.manual_seed(config.seed)  # initial weights; nothing else draws from torch's generator
    net = stage.network(fresh)
    facts["precision"] = loop.pick_precision(facts["precision"], net, stage)
    trainer = Trainer(config, stage, run, net, facts["precision"])
    if trainer.step >= config.steps:
        return on_all_ranks(lambda: rank == 0 and trainer.finished(), world)
    if changed and rank == 0:
        print(f"{run}: goes on behind step {trainer.step} with {', '.join(changed)}")
    on_all_ranks(lambda: rank == 0 and write_config(run, facts, trainer.step), world)

    signals = loop.note_signals(stack)
    bar = tqdm(total=config.steps, initial=trainer.step, disable=rank > 0, mininterval=5,
               desc=f"{config.stage} ({trainer.precision}, {world} x {torch.get_num_threads()} threads)")
    batches = stage.batches(trainer.step, config.workers)
    stack.callback(batches.close)  # ends its loader processes
    for step, batch, tags in batches:
        losses, norm = trainer.backward(batch)
        signalled = torch.full((len(losses), 1), max(signals, default=0))
        table = gather(torch.cat([losses[:, None].double(), tags, signalled], 1), world).numpy()  # (B, 6), all ranks'
        loop.check_finite(stage, run, step, table, norm, TASKS)
        trainer.apply()
        trainer.observe(table, norm)
        bar.update()
        done = trainer.step == config.steps
        if done or trainer.step % config.log_every == 0:
            line = trainer.log()
            bar.set_postfix_str(f"loss {line['loss']:.4f}, {line['clips_per_s']} clips/s")
        stopping = 0 if done else int(table[:, 5].max())
        draw = config.sample_every and (done or trainer.step % config.sample_every == 0)
        if done or trainer.step % config.save_every == 0 or stopping or draw:
            trainer.save()
        if draw:
            on_all_ranks(lambda: rank == 0 and trainer.draw(), world)
        if stopping:
            if rank == 0:
                print(f"{run}: stopped by {signal.Signals(stopping).name} after step {trainer.step}, which is saved; "
                      "the same command goes on")
            raise SystemExit(128 + stopping)


def main(argv=None):
    config = parse_fields(TrainConfig, __doc__, argv)
    try:
        with ExitStack() as stack:
            train(config, stack)
    except RuntimeError as error:                # comes from a signal handler of torch's, anywhere
        if "DataLoader" not in str(error):
            raise
        raise UserError(f"--workers: {first_line(error)} The same command goes on from the last checkpoint") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_cli(main)
