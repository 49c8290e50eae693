"""Teach a DFGN that knows captions by heart to read by MiniLM: a start for `train.py --base`, and no training of it.

    python tools/refit_text.py checkpoints/mini.safetensors --data data/fluent data/emoji --out start.safetensors

The DFGN keeps its weights but for those that read the text. These, and the text encoder on MiniLM's features, are
fitted so that the cross-attentions and the pooled text say of any text of a sticker (its caption, its keywords, some of
them) what they said of its caption before: squared error on the queries of noisy stills, Adam. What a text looks like
is then learnt in training."""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import data  # noqa: E402
from lib.nets.autoencoder import load_vae  # noqa: E402
from lib.nets.layers import masked_mean  # noqa: E402
from lib.nets.text import learnt_concepts  # noqa: E402
from lib.nets.towers import MiniLM, cache_features, name_minilm  # noqa: E402
from lib.nets.weights import find_file, save_model  # noqa: E402
from lib.run.draws import rng_for  # noqa: E402
from lib.run.files import UserError, check_outputs, run_cli  # noqa: E402
from model import RDTF, TextConfig, load_rdtf  # noqa: E402

QUERIES = 16                              # cells of a still whose queries are kept
FITTED = 64                               # stills a step
NOISE = 300                               # least timestep of the stills: below it the text hardly matters


@torch.no_grad()
def record(net, vae, stickers, latents, stills, batch, seed):
    """What the text did to noisy stills under their captions, a batch an entry: {layer: [(query inputs, output)]},
    additions to the time embedding, numbers of the stickers (-1: no text)."""
    crosses, seen = {name: m for name, m in net.named_modules() if name.endswith(".cross")}, {}

    def note(name):
        def hook(module, inputs, output):
            cells = torch.randperm(output.shape[1])[:QUERIES]
            seen.setdefault(name, []).append((inputs[0][:, cells].clone(), output[:, cells].clone()))
        return hook
    hooks = [module.register_forward_hook(note(name)) for name, module in crosses.items()]
    pooled, chosen, ones = [], [], torch.ones(batch, 1)
    for step in tqdm(range(stills // batch), "what captions did"):
        rng = rng_for(seed, step, 0, 0)
        concepts = rng.integers(len(stickers.members), size=batch)
        numbers = np.array([rng.choice(stickers.members[c]) for c in concepts])
        records = [stickers.records[int(i)] for i in numbers]
        numbers[rng.random(batch) < 0.1] = -1
        frames = [r["first"] + int(rng.integers(r["n"])) for r in records]
        z0 = vae.standardise(torch.from_numpy(np.stack([latents[i][0] for i in frames]).astype(np.float32)))[:, None]
        t = torch.from_numpy(rng.integers(NOISE, net.config.diffusion.steps, size=batch))
        z_t = net.diffusion.add_noise(z0, torch.from_numpy(rng.standard_normal(z0.shape, np.float32)), t)
        texts = [r["caption"] if i >= 0 else "" for r, i in zip(records, numbers)]
        context, mask = net.encode_text(data.tokenize(texts))
        net.predict(z_t, t, context, mask, torch.zeros_like(z0), 0 * ones, ones)
        pooled.append(net.dfgn.text_pool(masked_mean(context, mask)))
        chosen.append(numbers)
    for hook in hooks:
        hook.remove()
    return seen, pooled, chosen


def fit(net, seen, pooled, chosen, texts, features, noise, steps, lr, seed):
    """Adam on all that reads the text; the rate falls to zero. Prints the share of the variance that is unexplained."""
    layers = {name: module for name, module in net.named_modules() if name in seen}
    trained = [*net.text.parameters(), *net.dfgn.text_pool.parameters(), *(m.to_kv.weight for m in layers.values())]
    net.requires_grad_(False)
    for p in trained:
        p.requires_grad_(True)
    optimizer, shares = torch.optim.Adam(trained, lr, betas=(0.9, 0.98)), []
    variance = {name: float(torch.stack([y.var() for _, y in parts]).mean()) for name, parts in seen.items()}
    of_pool = float(torch.cat(pooled).var())
    for step in tqdm(range(steps), "fitting"):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 50) * (1 - step / steps)
        rng, i = rng_for(seed, step, 0, 1), step % len(chosen)
        some = rng.permutation(len(chosen[i]))[:FITTED]
        rows = [texts.row(int(k), rng) if k >= 0 else 0 for k in chosen[i][some]]
        sentences = features[rows] + noise * rng.standard_normal((FITTED, MiniLM.width)) * (np.array(rows) > 0)[:, None]
        context, _ = net.encode_text(torch.from_numpy(sentences.astype(np.float32)))
        errors = {}
        for name, module in layers.items():
            x, wanted = (part[some] for part in seen[name][i])
            errors[name] = ((module(x, context) - wanted) ** 2).mean() / variance[name]
        found = net.dfgn.text_pool(context.mean(1))
        errors["pooled"] = ((found - pooled[i][some]) ** 2).mean() / of_pool
        optimizer.zero_grad()
        sum(errors.values()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        shares.append([float(e.detach()) for e in errors.values()])
        if (step + 1) % 200 == 0 or step + 1 == steps:
            last = dict(zip(errors, np.mean(shares[-20:], 0).round(3).tolist()))
            tqdm.write(f"step {step + 1}: unexplained {last}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", nargs="+", default=["data/fluent"])
    parser.add_argument("--out", required=True)
    parser.add_argument("--stills", type=int, default=12800, help="noisy stills whose queries are recorded")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--concepts", type=int, default=TextConfig().concepts, help="most that a text is compared with")
    parser.add_argument("--text-noise", type=float, default=1.0, help="as train.py's, like the next three")
    parser.add_argument("--keywords", type=float, default=0.6)
    parser.add_argument("--word-dropout", type=float, default=0.1)
    parser.add_argument("--text-variants", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    check_outputs([("--out", args.out)], [("model", args.model)])
    old, meta = load_rdtf(args.model)
    if old.config.text.kind != "small":
        raise UserError(f"{args.model}: has no text encoder of its own to be replaced")
    vae, found = load_vae(find_file(args.model, meta["vae_file"]))
    stickers = data.StickerSet(args.data, "train")
    latents = data.cache_latents(args.data, vae, found["latents"])
    texts = data.StickerTexts(stickers, args.text_variants, args.seed, args.word_dropout, args.keywords)
    tower = name_minilm()
    features = cache_features(args.data[0], tower, MiniLM.width, texts, torch.device("cpu"))
    torch.manual_seed(args.seed)
    seen, pooled, chosen = record(old, vae, stickers, latents, args.stills, 128, args.seed)

    concepts = learnt_concepts(features, texts, args.concepts)
    text = TextConfig(concepts=len(concepts))
    new = RDTF(replace(old.config, text=text, dfgn=replace(old.config.dfgn, text_width=text.width)))
    wanted = new.state_dict()
    new.load_state_dict({k: w for k, w in old.state_dict().items() if k in wanted and w.shape == wanted[k].shape},
                        strict=False)
    new.text.concepts.copy_(concepts)
    fit(new, seen, pooled, chosen, texts, features, args.text_noise, args.steps, args.lr, args.seed)
    facts = {k: v for k, v in meta.items() if k not in ("config", "text")}
    save_model(args.out, new.state_dict(), **facts, config=new.config.to_dict(), text=tower)
    print(args.out)


if __name__ == "__main__":
    run_cli(main)
