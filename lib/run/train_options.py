"""What train.py refuses: options, and small files that they name."""
from pathlib import Path

from lib.media.sources import read_caption
from lib.nets import peft
from lib.nets.weights import read_own
from lib.run.files import UserError
from lib.run.options import check_least, check_most, check_shares, check_words, flag

MAX_PROMPTS = 2**20                              # bytes of a file of captions to draw


def check_options(c, **words):
    """Refuse unknown words and numbers that make no sense, before anything slow. words: those that options may be."""
    check_words(c, **words, method=("rdtf", *peft.METHODS),
                how=("kmeans", "even", "mixed"), lengths=("step", "sample", "full"), ema_device=("same", "cpu"),
                precision=("auto", "bf16", "float32"), lr_schedule=("cosine", "constant"))
    if not c.data:
        raise UserError("--data: name a prepared set, or several")
    check_shares(c, "still_share", "word_dropout", "keywords", "text_drop", "given_text_drop", "other_text",
                 "backwards", "cond_drop", "both_drop", "ema")
    for names in (("text_drop",), ("given_text_drop", "other_text")):
        if sum(getattr(c, name) for name in (*names, "cond_drop", "both_drop")) > 1 + 1e-9:
            raise UserError(f"{', '.join(map(flag, names))}, --cond-drop and --both-drop: more than 1 in all")
    check_least(c, steps=1, batch=1, accumulate=1, text_variants=1, log_every=1, save_every=1, keep_every=0, shortest=0,
                seed=0, workers=0, sample_every=0, warmup=0, rank=1, weight_decay=0, lr=1e-12, timestep_shift=1e-3,
                embedding_lr=0, text_lr=0, grad_clip=1e-12, text_noise=0)
    check_most(c, seed=2 ** 32)
    if c.lengths != "sample" and 0 < c.shortest < 3:
        raise UserError(f"--shortest {c.shortest}: clips of fewer than 3 frames are padded, by --lengths sample")
    if bool(c.sample_every) != bool(c.prompts):
        raise UserError("--sample-every and --prompts: give both, steps and a file of captions, or neither")
    for name in ("checkpointing", "clip_weights", "prompts"):
        if getattr(c, name) and c.stage == "vae":
            raise UserError(f"{flag(name)}: for the dfgn stage alone; leave it out")


def check_method(c, dfgn):
    """Refuse what does not go with --method. dfgn: the preset's part."""
    if c.method != "rdtf" and (dfgn.known or dfgn.temporal not in peft.BASES):
        raise UserError(f"--method {c.method}: tunes a base; name its --preset, such as base")
    if dfgn.temporal == "still" and c.method not in ("rdtf", "simda"):
        raise UserError(f"--method {c.method}: has temporal layers to tune; a base of stills is for simda")
    if dfgn.temporal == "still" and c.method == "rdtf" and c.still_share != 1:
        raise UserError("--set dfgn.temporal=still: no layer mixes frames; train it with --still-share 1")
    if c.method != "rdtf" and not c.base:
        raise UserError(f"--method {c.method}: name the model.safetensors that it tunes by --base")
    if (c.method in peft.ON_CLIPS) != bool(c.absorber):
        raise UserError(f"--absorber {c.absorber}: a run of appearance_lora, which {' and '.join(peft.ON_CLIPS)} need "
                        "and no other --method takes")
    if c.method in peft.ON_STILLS and c.still_share != 1:
        raise UserError(f"--method {c.method}: trained on single frames alone; give --still-share 1")
    if c.method in peft.ON_CLIPS and c.still_share != 0:
        raise UserError(f"--method {c.method}: attention over one frame learns nothing; give --still-share 0")


def load_absorber(path, rank, base):
    """Weights of a run of appearance_lora, which must be of this rank and base (its names)."""
    meta, weights = read_own(path, "adapter", "train one with --method appearance_lora")
    if (meta["method"], meta["rank"]) != ("appearance_lora", rank) or meta["base"] not in base:
        raise UserError(f"--absorber {path}: {meta['method']} of rank {meta['rank']}; appearance_lora of --rank {rank} "
                        "on the same --base is needed")
    return weights


def read_prompts(path):
    """The captions of a file, one a line."""
    prompts = [line.strip() for line in read_caption(Path(path), MAX_PROMPTS).splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"--prompts {path}: no captions in it; write one a line")
    return prompts
