"""What the stages of train.py share, the VAE's stage, and what a run starts from."""
import numpy as np
import torch

from lib.media.pictures import to_tensor
from lib.nets.autoencoder import VAE, held_out_psnr, load_vae, measure_latents
from lib.nets.grow import fits, grow_vae
from lib.nets.layers import zero_
from lib.nets.weights import identity, names_of, read_own
from lib.run.checkpoints import check_equal
from lib.run.draws import StepSampler, rng_for
from lib.run.files import UserError


class Stage:
    """What the loop asks of a stage. __init__ refuses bad input; what is slow comes in prepare.

    preset: model.Config. stickers: the training split, a data.StickerSet. inputs: hashes that a resumed run must have,
    under these or other `names` of theirs."""
    curriculum = None

    def __init__(self, config, preset, stickers, rank, world, device):
        self.config, self.preset, self.stickers = config, preset, stickers
        self.rank, self.world, self.device = rank, world, device
        where = " ".join(config.data)
        if stickers.size != preset.vae.size:
            raise UserError(f"--data {where}: {stickers.size} px, preset {config.preset} wants {preset.vae.size}")
        if not len(stickers):
            raise UserError(f"--data {where}: no sticker (of --groups, if named) is in its train split; splits "
                            "are drawn by concept, so prepare more captions")
        self.inputs, self.names, self.base = dict(data=stickers.meta["hash"]), {}, None

    def add_input(self, name, path):
        self.inputs[name], self.names[name] = identity(path), names_of(path)

    def prepare(self):
        """Nothing slow here."""


class VAEStage(Stage):
    """Images of stickers under the VAE's own loss; with --base, which may be of half the size, the decoder alone."""

    def __init__(self, config, preset, stickers, rank, world, device):
        super().__init__(config, preset, stickers, rank, world, device)
        self.facts = {}
        if config.base:
            self.base, meta = load_vae(config.base)
            self.facts = {name: meta[name] for name in ("latents", "grown_from") if name in meta}
            if fits(self.base.config, preset.vae):
                self.facts = dict(grown_from=meta["latents"])
            else:
                check_vae("--base", config.base, self.base, meta, preset.vae)
            self.add_input("base", config.base)

    def network(self, fresh):
        self.net = VAE(self.preset.vae)
        if fresh and self.base:
            small = fits(self.base.config, self.preset.vae)
            base = grow_vae(self.base, self.preset.vae, self.first_images()) if small else self.base
            self.net.load_state_dict(base.state_dict())
        elif fresh and self.preset.vae.shortcut:
            self.net.start_shortcut(self.first_images())
        if self.base:                         # the encoder stays, and so do the latents that a DFGN is trained on
            self.net.freeze_encoder()
        return self.net.to(self.device)

    def first_images(self):
        """Images (256, C, S, S) whose principal components a network starts with."""
        images = [draw_image(self.stickers, self.config.seed, 0, n)[0] for n in range(256)]
        return self.net.images(torch.stack(images))

    def batches(self, start, workers=0):
        """Yield (arguments of VAE.forward, tags (b, 4)): no task, no timestep, number of the sticker, frames."""
        c, v = self.config, self.preset.vae
        for step, keys in enumerate(StepSampler(c.batch, start, c.steps, self.rank, self.world), start):
            share = [n for _, n, *_ in keys]
            images, background, index = zip(*(draw_image(self.stickers, c.seed, step, n) for n in share))
            shape = (v.latent_channels, v.side, v.side)
            rngs = [rng_for(c.seed, step, n, 2) for n in share]
            noise = torch.from_numpy(np.stack([rng.standard_normal(shape, np.float32) for rng in rngs]))
            std = torch.tensor([abs(rng.standard_normal()) * v.latent_noise for rng in rngs])[:, None, None, None]
            batch = dict(x=self.net.images(torch.stack(images)), background=torch.stack(background), noise=noise,
                         noise_std=std)
            yield batch, torch.tensor([[0, 0, i, 1] for i in index])

    def export(self, weights):
        """(EMA weights with the latents' statistics, metadata, a line on the held-out PSNR)."""
        vae = VAE(self.preset.vae).to(self.device).eval()
        vae.load_state_dict(weights)
        if not self.base:
            measure_latents(vae, self.stickers, rng_for(self.config.seed, 0, 0, 9))
        psnr, line = held_out_psnr(vae, self.stickers.other("test"))
        return vae.state_dict(), self.facts | psnr, line


def draw_image(stickers, seed, step, n):
    """A random frame of a random concept (4, S, S), premultiplied in [-1, 1], its background (3,), its sticker."""
    rng = rng_for(seed, step, n, 0)
    index = int(rng.choice(stickers.members[rng.integers(len(stickers.members))]))
    record = stickers.records[index]
    frame = stickers.clip(record, [rng.integers(record["n"])])
    return to_tensor(frame)[0], torch.from_numpy(rng.uniform(-1, 1, 3).astype(np.float32)), index


# ---- what a run starts from
def load_like(option, path, wanted):
    """(VAE, metadata) of a file, which must be of the wanted VAEConfig but in what only its training reads."""
    vae, meta = load_vae(path)
    check_vae(option, path, vae, meta, wanted)
    return vae, meta


def check_vae(option, path, vae, meta, wanted):
    """UserError for a VAE of another VAEConfig than is wanted, but in what only its training reads."""
    free = ("kl_weight", "latent_noise", *(("size",) if meta.get("any_size") else ()))  # size: Stable Diffusion's
    check_equal(f"{option} {path}", vae.config, wanted, free)


READS_TEXT = "text.", ".cross.to_kv.", ".text_pool."  # in the names of what makes or takes a text's features


def load_base(c, config, vae, tower):
    """(weights of the run --base, its vocabulary too; whether its VAE is the one that this VAE, by its metadata, was
    grown from). It must be of the same configuration and VAE.

    Where it has another text encoder or tower, all that reads the text starts anew; where its latents have other
    channels, what meets them, or, where the VAE was grown from its VAE, what meets the channels that it lacks; but not
    of what is tuned."""
    meta, weights = read_own(c.base, "dfgn", "train one with `python train.py`")
    theirs = type(config).from_dict(meta["config"])
    same = (theirs.text.kind, meta.get("text", {}).get("hash")) == (config.text.kind, (tower or {}).get("hash"))
    known = meta["vae"] in vae["names"] or (c.method == "rdtf" and theirs.dfgn.channels != config.dfgn.channels)
    if not known or not (same or c.method == "rdtf"):
        raise UserError(f"--base {c.base}: trained with another VAE or text tower than --vae or --clip-weights")
    for part in ("dfgn", "diffusion", *(["text"] if same else [])):
        check_equal(f"--base {c.base}", getattr(theirs, part), getattr(config, part),
                    free=("channels", "known_width", "vocab", "concepts", "given", *(("gate",) * config.dfgn.gate),
                          *(() if same else ("text_width",))))
    if not same:
        weights = {k: w for k, w in weights.items() if not any(part in k for part in READS_TEXT)}
    return weights, meta["vae"] == vae.get("grown_from")


def silence(dfgn, new):
    """A base's layers are deaf to inputs that are new to them: what these add begins at zero. new: names of weights."""
    for name, module in dfgn.named_modules():
        if f"dfgn.{name}.to_kv.weight" in new and name.endswith(".cross"):
            module.to_kv.weight.data.chunk(2)[1].zero_()
    if "dfgn.text_pool.weight" in new:
        zero_(dfgn.text_pool)
    if any(name.startswith("dfgn.stem.known.") for name in new):
        dfgn.stem.conv.weight.data[:, dfgn.config.channels:] = 0
