"""Train the judge of Recog@1 (lib/metrics/judge.py) on emoji stills in several styles, on a CPU.

    python tools/train_judge.py --precision bf16 --data data/emoji --out checkpoints/judge.safetensors
    python tools/train_judge.py --data data/hands --places openmoji noto-v1 emojione-v1 fxemoji --out judge.safetensors

Trained on the concepts of the train split alone, whatever the set held out. At the end it is asked for the concepts of
Fluent stills that it never saw.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import StickerSet  # noqa: E402
from lib.media.sources import split_of  # noqa: E402
from lib.metrics.distances import bootstrap, on_white, to_signed  # noqa: E402
from lib.metrics.judge import Judge, load_judge  # noqa: E402
from lib.nets.cpu import keep_memory  # noqa: E402
from lib.nets.weights import save_model  # noqa: E402
from lib.run.draws import rng_for  # noqa: E402
from lib.run.files import UserError, check_outputs, run_cli  # noqa: E402


class Drawings:
    """Stills of a set by concept and style. of[concept][style]: numbers of records."""

    def __init__(self, folder):
        self.stickers, self.of = StickerSet(folder), {}
        self.first = np.array([record["first"] for record in self.stickers.records])
        for i, record in enumerate(self.stickers.records):
            if "style" not in record:
                raise UserError(f"--data {folder}: stickers without a style; make it with `python data.py emoji`")
            self.of.setdefault(record["concept"], {}).setdefault(record["style"], []).append(i)
        self.trained = sorted(name for name, styles in self.of.items() if split_of(name) == "train" and len(styles) > 1)

    def pictures(self, numbers):
        """(n, S, S, 4) uint8."""
        return self.stickers.frames[self.first[numbers]]

    def draw(self, seed, step, batch):
        """Two arrays of `batch` record numbers: drawings of the same concepts in two different styles."""
        rng = rng_for(seed, step, 0, 0)
        pairs = []
        for i in rng.choice(len(self.trained), min(batch, len(self.trained)), replace=False):
            styles = self.of[self.trained[i]]
            two = rng.choice(sorted(styles), 2, replace=False)
            pairs.append([int(rng.choice(styles[style])) for style in two])
        return np.array(pairs).T


def augment(rgba, generator):
    """(n, S, S, 4) uint8 -> (n, 3, S, S) in about [-1, 1]: moved, recoloured, on a colour, blurred, with noise."""
    def uniform(low, high, *shape):
        return torch.rand(len(rgba), *shape, generator=generator) * (high - low) + low
    x = torch.from_numpy(rgba).permute(0, 3, 1, 2).float() / 255
    x = torch.cat([x[:, :3] * x[:, 3:], x[:, 3:]], 1)                        # premultiplied: grid_sample mixes pixels
    angle, scale = uniform(-0.4, 0.4), uniform(0.85, 1.5)
    flip = torch.where(uniform(0, 1) < 0.3, -1.0, 1.0)
    rows = torch.stack([torch.stack([flip * scale * angle.cos(), -scale * angle.sin(), uniform(-0.25, 0.25)], 1),
                        torch.stack([flip * scale * angle.sin(), scale * angle.cos(), uniform(-0.25, 0.25)], 1)], 1)
    x = F.grid_sample(x, F.affine_grid(rows, list(x.shape), align_corners=False), align_corners=False)
    mix = torch.eye(3) * uniform(0.6, 1.3, 1, 1) + 0.07 * torch.randn(len(x), 3, 3, generator=generator)
    colour = torch.einsum("nij,njhw->nihw", mix, x[:, :3]) + uniform(-0.1, 0.1, 1, 1, 1) * x[:, 3:]
    ground = torch.where(uniform(0, 1, 1, 1, 1) < 0.5, torch.ones(()), uniform(0, 1, 3, 1, 1))
    y = colour + (1 - x[:, 3:]) * ground
    blur = uniform(0, 1, 1, 1, 1) * (uniform(0, 1, 1, 1, 1) < 0.5)           # of every second picture
    y = y.lerp(F.avg_pool2d(y, 5, 1, 2, count_include_pad=False), blur)
    return (y + uniform(0, 0.08, 1, 1, 1) * torch.randn(y.shape, generator=generator)) * 2 - 1


def info_nce(a, b, temperature):
    """Mean cross-entropy of finding each row's partner among all of the other side, both ways."""
    logits, own = a @ b.T / temperature, torch.arange(len(a))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


@torch.no_grad()
def embed(net, drawings, numbers, batch=256):
    """(n, width) of bare pictures on white."""
    parts = [drawings.pictures(numbers[i:i + batch]) for i in range(0, len(numbers), batch)]
    return torch.cat([net(to_signed(np.round(on_white(part) * 255).astype(np.uint8)[:, None])[:, 0]) for part in parts])


def set_places(net, drawings, styles):
    """The mean embedding of each concept's drawings in these styles."""
    for row, name in enumerate(net.concepts):
        numbers = [i for style in styles for i in drawings.of[name].get(style, [])]
        net.places[row] = F.normalize(embed(net, drawings, numbers).mean(0), dim=0)


def report(net, drawings):
    """Top-1 and top-5 of Fluent stills, one of each held-out concept, among those concepts and among all."""
    names = [name for name in net.concepts if split_of(name) == "test" and "fluent" in drawings.of[name]]
    found = embed(net, drawings, [drawings.of[name]["fluent"][0] for name in names]) if names else []
    for among in (names, net.concepts) if names else ():
        rows = [net.concepts.index(name) for name in among]
        order = (found @ net.places[rows].T).argsort(1, descending=True)
        rank = np.array([[among[j] for j in ranks].index(name) for name, ranks in zip(names, order.tolist())])
        top = [f"top-{k} {np.mean(rank < k):.2f} [{low:.2f}, {high:.2f}]"
               for k in (1, 5) for low, high in [bootstrap((rank < k).astype(float))]]
        print(f"{len(names)} Fluent stills of unseen concepts among {len(among)}: {', '.join(top)}; "
              f"chance {1 / len(among):.4f}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="data/emoji", help="a set of `python data.py emoji` (default: %(default)s)")
    add("--places", nargs="+", default=["noto", "twemoji"], metavar="STYLE",
        help="whose drawings are a concept's place (default: noto twemoji)")
    add("--base", help="a judge to start from, with another --seed: the same one draws the same pictures again")
    add("--out", default="checkpoints/judge.safetensors", help="default: %(default)s")
    add("--steps", type=int, default=6000, help="default: %(default)s")
    add("--batch", type=int, default=128, help="concepts a step (default: %(default)s)")
    add("--lr", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    add("--temperature", type=float, default=0.1, help="of InfoNCE (default: %(default)s)")
    add("--precision", choices=("float32", "bf16"), default="float32", help="of the network in training "
        "(default: %(default)s)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    o = parser.parse_args(argv)
    check_outputs([("--out", o.out)], [("--base", o.base)])
    keep_memory()
    drawings = Drawings(o.data)
    torch.manual_seed(o.seed)
    net = Judge(sorted(name for name, styles in drawings.of.items() if set(o.places) & styles.keys()))
    if not net.concepts:
        raise UserError(f"--places {' '.join(o.places)}: {o.data} has no drawing in such a style")
    if o.base:
        net.load_state_dict(dict(load_judge(o.base, "--base").named_parameters()), strict=False)     # not the places
    optimizer = torch.optim.AdamW(net.parameters(), o.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, o.lr, total_steps=o.steps, pct_start=0.1)
    size = sum(p.numel() for p in net.parameters()) / 1e6
    bar = trange(o.steps, desc=f"judge, {size:.2f} M parameters", mininterval=5)
    for step in bar:
        generator = torch.Generator().manual_seed(o.seed * 2 ** 32 + step)
        sides = [augment(drawings.pictures(side), generator) for side in drawings.draw(o.seed, step, o.batch)]
        with torch.autocast("cpu", torch.bfloat16, enabled=o.precision == "bf16"):
            views = [net(side) for side in sides]
        loss = info_nce(*(view.float() for view in views), o.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(), schedule.step()
        bar.set_postfix_str(f"loss {loss:.3f}")
    net.eval()
    set_places(net, drawings, o.places)
    report(net, drawings)
    Path(o.out).parent.mkdir(parents=True, exist_ok=True)
    save_model(o.out, {name: w.half() for name, w in net.state_dict().items()}, kind="judge", concepts=net.concepts,
               made_by=vars(o), trained_on=len(drawings.trained))
    print(f"{o.out}: {Path(o.out).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_cli(main)
