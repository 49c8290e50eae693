"""Train the VAE, then the DFGN, on one process or many. The same command again resumes.

    python train.py --stage vae --data data/fluent --out runs/vae
    python train.py --data data/fluent --vae runs/vae/model.safetensors --out runs/dfgn
    torchrun --nproc_per_node=2 train.py ...                      # CPU (gloo) or CUDA (nccl)
    python train.py --set dfgn.temporal=conv3d --out runs/conv3d  # any field of model.Config
    python train.py --base other.safetensors --out runs/tuned     # start from another run of this preset and VAE
    python train.py --stage vae --base vae.safetensors --set vae.latent_noise=0.2 --out runs/decoder  # decoder alone
    python train.py --stage vae --preset mini-128 --data data/fluent128 --base checkpoints/mini-vae.safetensors  # grows
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
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from curriculum import MODES, Curriculum
from data import TASKS
from lib.media.pictures import contact_sheet
from lib.nets import peft
from lib.nets.grow import grow_dfgn
from lib.nets.text import learnt_concepts
from lib.nets.towers import cache_features, name_minilm, name_tower
from lib.nets.weights import load_fitting
from lib.run import loop
from lib.run.checkpoints import check_same_config, lock_run, states
from lib.run.distributed import gather, on_rank_0, setup
from lib.run.draws import StepSampler
from lib.run.files import UserError, first_line, real_folder, run_cli
from lib.run.folder import Run
from lib.run.options import parse_fields
from lib.run.stages import Stage, VAEStage, load_base, load_like, silence
from lib.run.train_options import check_method, check_options, load_absorber, read_prompts
from model import RDTF, preset
from sample import Sampler

COMPILER = "inductor"                     # torch.compile's backend; the tests take a faster one
MAY_CHANGE = {"workers", "log_every", "save_every", "keep_every", "sample_every", "prompts", "out", "accumulate",
              "checkpointing", "zero", "compile", "ema_device", "precision",  # when a run goes on
              "data", "vae", "base", "absorber", "clip_weights", "clip_model",  # to files of the same hashes
              "text.concepts"}            # a limit; in older runs the number that the data gave


@dataclass
class TrainConfig:
    stage: str = "dfgn"                   # vae, or dfgn (which needs a trained vae)
    data: list = field(default_factory=lambda: ["data/fluent"])  # prepared sets (python data.py), trained on together
    groups: list = field(default_factory=list)  # emoji groups to train on; none named: all
    out: str = ""                         # run folder; default runs/<stage>
    preset: str = "mini"                  # tiny, mini, mini-128, paper
    set: list = field(default_factory=list)  # fields of the preset to change, as part.field=value
    vae: str = "runs/vae/model.safetensors"  # VAE of the dfgn stage: of the vae stage, or Stable Diffusion's weights
    base: str = ""                        # weights to start from, of this VAE or another size; vae: tunes its decoder
    method: str = "rdtf"                  # rdtf (all is trained), or what tunes --base: see lib/nets/peft.py
    rank: int = 16                        # of LoRA
    absorber: str = ""                    # customize_a_video: model.safetensors of --method appearance_lora
    clip_weights: str = ""                # text.kind=open_clip: its weights, a file or a folder with a configuration
    clip_model: str = "ViT-H-14"          # open_clip's name of the model of that file; a folder says it itself
    text_variants: int = 4                # of a sticker, drawn once, where a frozen tower reads them
    steps: int = 3000                     # optimiser steps
    batch: int = 4                        # global batch: clips (dfgn) or images (vae); for stills T times as many
    accumulate: int = 1                   # micro-batches of each process's share of the batch, to save memory
    checkpointing: bool = False           # dfgn: compute the layers again in the backward pass, to save memory
    zero: bool = False                    # ZeRO-1: each of several processes keeps its share of the optimiser's state
    compile: bool = False                 # torch.compile the network: minutes at the start, faster steps on a GPU
    lr: float = 1e-3                      # peak learning rate
    embedding_lr: float = 10.0            # text.kind=small: learning rate of the token embeddings, times --lr
    text_lr: float = 1.0                  # of the text encoder, times --lr, which may empty it; not 1: no weight decay
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
    lengths: str = "step"                 # k of 3..T frames is drawn per step, or per sample (paper); full: always T
    shortest: int = 0                     # frames of a sticker that gives clips; 0: 3, or 1 with --lengths sample
    still_share: float = 0.5              # share of the steps on single frames, T of them for a clip
    word_dropout: float = 0.2             # a word of a caption becomes "#"
    keywords: float = 0.5                 # keywords are appended to a caption
    text_noise: float = 1.0               # deviation of what is added to a MiniLM's sentence, whose own is about one
    text_drop: float = 0.10               # the text alone is dropped where no frame is given
    given_text_drop: float = 0.5          # the text alone is dropped where frames are given
    backwards: float = 0.0                # share of the clips of frames and no text that run backwards
    other_text: float = 0.0               # the text is another sticker's, where frames are given
    timestep_shift: float = 1.0           # above 1: more timesteps of high noise, where text counts; 1: uniform (paper)
    cond_drop: float = 0.10               # the given frames alone are dropped
    both_drop: float = 0.05               # both are dropped
    workers: int = 0                      # data loading processes; changes nothing but the speed
    log_every: int = 20                   # steps
    save_every: int = 500                 # steps
    keep_every: int = 0                   # steps between models that stay, as model-STEP.safetensors; 0: the last alone
    sample_every: int = 0                 # dfgn: steps between contact sheets of --prompts; 0: none
    prompts: str = ""                     # dfgn: file of captions to draw on them, one a line


# ---- DFGN stage
class DFGNStage(Stage):
    """Clips of stickers under RDTF's loss: what the curriculum, the masks and the dropped conditions make of them."""

    def __init__(self, config, preset, stickers, rank, world, device):
        super().__init__(config, preset, stickers, rank, world, device)
        clips = round(config.steps * config.batch * (1 - config.still_share))
        self.curriculum = Curriculum(config.curriculum, config.steps, config.tasks, losses=clips)
        self.tower = self.texts = self.absorber = None
        if (self.preset.text.kind == "open_clip") != bool(config.clip_weights):
            raise UserError(f"--clip-weights {config.clip_weights}: a local file where text.kind is open_clip, nothing "
                            f"elsewhere; with these options it is {self.preset.text.kind}")
        if config.clip_weights:
            self.tower = name_tower(config.clip_weights, config.clip_model, self.preset.text.width)
            self.inputs["clip_weights"] = self.tower["hash"]
        elif self.preset.text.kind == "minilm":
            self.tower = name_minilm()
            self.inputs["minilm"] = self.tower["hash"]
        self.vae, meta = load_like("--vae", config.vae, self.preset.vae)
        self.inputs["vae"], self.names["vae"] = meta["latents"], meta["names"]
        self.grown_from = dict(grown_from=meta["grown_from"]) if "grown_from" in meta else {}
        if config.base:
            self.base, self.grows = load_base(config, self.preset, meta, self.tower)
            self.add_input("base", config.base)
        if config.absorber:
            self.absorber = load_absorber(config.absorber, config.rank, self.names["base"])
            self.add_input("absorber", config.absorber)
        if self.preset.text.kind == "small":
            words = (self.base or {}).get("text.vocabulary")
            self.vocabulary = torch.as_tensor(data.vocabulary(self.stickers.records) if words is None else words)
            self.preset.text.vocab = len(self.vocabulary)
        self.prompts = read_prompts(config.prompts) if config.sample_every else []

    def prepare(self):
        """Encode all frames, and all texts of a frozen tower, unless an earlier run did; map them on all ranks."""
        on_rank_0(self.cache, self.rank, self.world)
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
            self.features = cache_features(c.data[0], self.tower, self.preset.text.width, self.texts, self.device)

    def concepts(self):
        """The learnt concepts' sentences: the base's, then, unless it is tuned, those of the set that it has not."""
        known = (self.base or {}).get("text.concepts")
        if self.config.method != "rdtf":
            return known.float()
        return learnt_concepts(self.features, self.texts, self.preset.text.concepts, known)

    def network(self, fresh):
        net = RDTF(self.preset)
        if self.preset.text.kind == "minilm":
            net.text.concepts = self.concepts()
            self.preset.text.concepts = len(net.text.concepts)
            if self.base:
                self.base["text.concepts"] = net.text.concepts
        if fresh and self.base:
            if self.grows:
                self.base = grow_dfgn(self.base, net.state_dict())
            new = load_fitting(net, self.base, self.config.base, self.rank == 0)
            silence(net.dfgn, new)
        if self.preset.text.kind == "small":
            net.text.vocabulary.copy_(self.vocabulary)
        self.base = None                      # as large as the network
        if self.config.method != "rdtf":
            peft.inject(net, self.config.method, self.config.rank, self.absorber)
            self.adapter = net.adapter
        net.dfgn.checkpointing = self.config.checkpointing
        return net.to(self.device)

    def batches(self, start, workers=0):
        """Yield (arguments of RDTF.forward, tags (b, 4)): task, timestep, number of the sticker, real frames."""
        c, T = self.config, self.preset.frames
        clips = data.ClipDataset(self.stickers, self.latents, c.seed, c.batch, T, c.how,
                                 "sample" if c.lengths == "sample" else "step", c.word_dropout, c.keywords, self.texts,
                                 self.features.shape[1:] if self.preset.text.kind == "minilm" else (),
                                 c.shortest or None)
        sampler = StepSampler(c.batch, start, c.steps, self.rank, self.world, lambda step: data.draw_frames(c, step, T))
        for step, batch in enumerate(loop.load_batches(clips, sampler, workers, self.device), start):
            # Here, behind the loaders, and not a step early: the step before has to be observed first.
            yield self.draw(batch, self.curriculum.probabilities(step))

    def draw(self, clips, p):
        """Draw task (with probabilities p), mask, text and timestep of each of the clips, a batch of ClipDataset.

        Frames that are padding in all of them are left out."""
        T, timesteps = int(clips["n"].max()), self.preset.diffusion.steps
        z, loss_mask = (clips[name][:, :T].to(self.device, non_blocking=True) for name in ("z", "loss_mask"))
        wordless = self.stickers.wordless[clips["index"].numpy()]
        drawn = [data.draw_condition(self.config, p, u, n, T, timesteps, untold)
                 for u, n, untold in zip(clips["draws"].tolist(), clips["n"].tolist(), wordless.tolist())]
        task, masks, has_text, t, backwards, others = zip(*drawn)
        z = self.vae.standardise(z.flatten(0, 1)).unflatten(0, (-1, T))
        for i in np.flatnonzero(backwards):
            z[i] = z[i].flip(0)
        batch = dict(z0=z * loss_mask[:, :, None, None, None], t=torch.tensor(t), noise=clips["noise"][:, :T],
                     text=self.read_texts(clips, torch.tensor(has_text), others),
                     cond_mask=torch.from_numpy(np.stack(masks)), loss_mask=loss_mask)
        return batch, torch.stack([torch.tensor(task), batch["t"], clips["index"], clips["n"]], 1)

    def read_texts(self, clips, has_text, others):
        """Tokens (B, L), or a tower's features (B, ...), of which row 0 is the empty text's."""
        swapped = {i: int(u * len(self.stickers)) for i, u in enumerate(others) if u is not None}
        if not self.tower:
            tokens = clips["tokens"].where(has_text[:, None], data.tokenize([""]))
            for i, other in swapped.items():
                tokens[i] = data.tokenize([self.stickers.records[other]["caption"]])[0]
            return tokens
        rows = clips["text_row"] * has_text
        for i, other in swapped.items():
            rows[i] = self.texts.rows(other)[0]
        features = torch.from_numpy(self.features[rows].astype(np.float32))
        if "text_noise" in clips:             # an empty text is one alone, not a place among others
            features += self.config.text_noise * clips["text_noise"] * has_text[:, None]
        return features

    def export(self, weights):
        c, tower = self.config, dict(text=self.tower) if self.tower else {}
        facts = dict(vae=self.inputs["vae"], vae_file=str(c.vae), **self.grown_from, **tower)
        if c.method != "rdtf":
            facts.update(kind="adapter", method=c.method, rank=c.rank, base=self.inputs["base"], base_file=str(c.base))
            weights = {name: weights[name] for name in self.adapter}
        return weights, facts, ""


STAGES = {"vae": VAEStage, "dfgn": DFGNStage}


# ---- the road
def learning_rate(c, step):
    ramp = min(1.0, (step + 1) / max(c.warmup, 1))
    return c.lr * ramp * (0.5 * (1 + math.cos(math.pi * step / c.steps)) if c.lr_schedule == "cosine" else 1.0)


def backward(net, batch, c, precision, device):
    """Losses (b,) of this rank's samples, whose gradients are in the network's parameters."""
    parts, losses = loop.micro_batches(batch, c.accumulate), []
    for i, part in enumerate(parts, 1):           # of several the gradients are summed over processes once
        with net.no_sync() if i < len(parts) and hasattr(net, "no_sync") else nullcontext():
            each = loop.compute_losses(net, part, precision, device)
            (each.mean() / len(parts)).backward()
        losses.append(each.detach())
    return torch.cat(losses).cpu()


def draw_sheet(run, stage, step):
    """A contact sheet of the prompts by the averaged weights, as saved; the noise is the same each time."""
    c = stage.config
    sampler = Sampler(run.folder / "model.safetensors", c.vae, stage.device, c.clip_weights)
    clips = sampler.sample(stage.prompts, [(c.seed, k) for k in range(len(stage.prompts))])
    contact_sheet(clips, run.folder / f"samples-{step:06}.png", labels=stage.prompts)


def train(config, stack, after_backward=None):
    """Train a stage to its end, or to a signal. stack: ExitStack of what ends with the run.

    after_backward(step, net, losses): called with this rank's samples' losses when their gradients are there."""
    loop.check_launch()
    check_options(config, stage=STAGES, curriculum=MODES, tasks=TASKS)
    wanted = preset(config.preset, config.set)
    check_method(config, wanted.dfgn)
    rank, world, device = setup()
    loop.check_batch(config.batch, config.accumulate, world)
    stickers = data.StickerSet(config.data, "train", config.groups or None)
    stage = STAGES[config.stage](config, wanted, stickers, rank, world, device)
    folder = real_folder(config.out or f"runs/{config.stage}")
    on_rank_0(lambda: stack.enter_context(lock_run(folder)), rank, world)
    facts = dict(train=asdict(config), model=stage.preset.to_dict(), inputs=stage.inputs,
                 precision=config.precision, world=world)
    fresh, changed = not states(folder), []
    if not fresh:
        facts["precision"], changed = check_same_config(folder, facts, MAY_CHANGE, asdict(TrainConfig()), stage.names)
    stage.prepare()

    torch.manual_seed(config.seed)  # initial weights; nothing else draws from torch's generator
    net = stage.network(fresh)
    facts["precision"] = precision = loop.pick_precision(facts["precision"], net, stage)
    optimizer = loop.make_optimizer(net, config.lr, config.weight_decay, config.zero and world > 1,
                                    loop.own_rates(net, config))
    ema = loop.EMA(net, config.ema, config.ema_device == "cpu") if rank == 0 else None  # who alone writes them
    curriculum, parts = stage.curriculum, dict(net=net, optimizer=optimizer, ema=ema, curriculum=stage.curriculum)
    run = Run(folder, config, stage, {name: part for name, part in parts.items() if part is not None},
              TASKS if curriculum else ())
    step = run.restore()
    if step >= config.steps:
        return run.on_rank_0(run.finished, step)
    if config.compile:
        net.compile(backend=COMPILER)        # in place: the names of its weights stay
    ddp = DistributedDataParallel(net, forward_sync_buffers=False, gradient_as_bucket_view=True) if world > 1 else net
    if changed and rank == 0:
        print(f"{folder}: goes on behind step {step} with {', '.join(changed)}")
    run.write_config(facts, step)
    signals = loop.note_signals(stack)
    bar = tqdm(total=config.steps, initial=step, disable=rank > 0, mininterval=5,
               desc=f"{config.stage} ({precision}, {world} x {torch.get_num_threads()} threads)")
    batches = stage.batches(step, config.workers)
    stack.callback(batches.close)  # ends its loader processes

    for batch, tags in batches:
        losses = backward(ddp, batch, config, precision, device)
        if after_backward:
            after_backward(step, net, losses)
        norm = float(torch.nn.utils.clip_grad_norm_(net.parameters(), config.grad_clip))
        losses, tags = (gather(x, world).numpy() for x in (losses.double(), tags))  # all ranks', in their order
        stopping = int(gather(torch.tensor([max(signals, default=0)]), world).max())
        loop.check_finite(stage, folder, step, losses, tags, norm, TASKS)
        rate = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            ema.update(step)
        tasks, timesteps, _, frames = tags.T
        deciles, clips, state = timesteps * 10 // stage.preset.diffusion.steps, frames > 1, {}
        if curriculum:
            state["entropy"] = round(curriculum.entropy(step), 6)
            if clips.any():                  # a still has no task to choose: it says nothing of r
                curriculum.observe(losses[clips], tasks[clips], deciles[clips])
            state["r"] = round(curriculum.r, 6)
        run.record(losses, norm, tasks, deciles, np.where(clips, data.UNKNOWN[tasks], 1), frames)
        step += 1
        bar.update()

        done = step == config.steps
        if done or step % config.log_every == 0:
            line = run.log(step, rate, **state)
            bar.set_postfix_str(f"loss {line['loss']:.4f}, {line['clips_per_s']} clips/s")
        sheet = config.sample_every and (done or step % config.sample_every == 0)
        kept = config.keep_every and step % config.keep_every == 0
        if done or stopping or sheet or kept or step % config.save_every == 0:
            run.save(step)
        if sheet:
            run.on_rank_0(draw_sheet, run, stage, step)
        if stopping and not done:
            if rank == 0:
                print(f"{folder}: stopped by {signal.Signals(stopping).name} after step {step}, which is saved; "
                      "the same command goes on")
            raise SystemExit(128 + stopping)


def main(argv=None, after_backward=None):
    config = parse_fields(TrainConfig, __doc__, argv)
    try:
        with ExitStack() as stack:
            train(config, stack, after_backward)
    except RuntimeError as error:                # comes from a signal handler of torch's, anywhere
        if "DataLoader" not in str(error):
            raise
        raise UserError(f"--workers: {first_line(error)} The same command goes on from the last checkpoint") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_cli(main)
