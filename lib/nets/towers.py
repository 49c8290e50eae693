"""Frozen text towers, from local files; nothing of them is trained and no network is used.

MiniLM: all-MiniLM-L6-v2 (sentence-transformers; Apache-2.0), for the small presets; it lies in checkpoints/.
TextTower: the text transformer of an open_clip model, for the paper preset.
Both: tower(tower.read(texts)) -> features (B, tower.length, tower.width).
"""
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.nets.layers import masked_mean
from lib.nets.weights import identity, load_strict, read_own, read_weights
from lib.run.files import UserError, cache_path, file_hash, first_line, json_hash, rows

VOCAB, LENGTH = 49408, 77                        # of CLIP's tokenizer
PARTS = "text.", "positional_embedding", "token_embedding.", "transformer.", "ln_final."
TOWER_PREFIXES = *PARTS, *(f"module.{part}" for part in PARTS)   # "module.": as distributed training saves a model


@functools.lru_cache(1)
def clip_tokenizer():
    """open_clip's tokenizer, from its file alone: the package takes 2 s to import, most of it for torchvision."""
    file = Path(importlib.util.find_spec("open_clip").origin).with_name("tokenizer.py")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, "_tokenizer", None) or module.SimpleTokenizer(context_length=LENGTH)


# ---- MiniLM
MINILM = Path(__file__).parents[2] / "checkpoints/minilm.safetensors"
PIECES, WIDTH, LAYERS, HEADS = 30522, 384, 6, 12  # word pieces; sizes of the network
CLS, SEP, UNK = 101, 102, 100                    # word pieces around a text; one that is not in the vocabulary


class Block(nn.Module):
    """A layer of BERT: attention, then a feed-forward part; the sum with what came in is normalised after each."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, 1e-12), nn.LayerNorm(WIDTH, 1e-12)

    def forward(self, x, mask):
        """x (B, L, width), mask (B, 1, 1, L) bool -> (B, L, width)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)       # (B, heads, L, 32)
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
        x = self.norm1(x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class MiniLM(nn.Module):
    """all-MiniLM-L6-v2 and its word pieces. What the DFGN reads of a text is its sentence: the pieces' mean, whitened.

    Whitened by statistics of the training texts (tools/make_minilm.py), in buffers, and in part: directions in which
    these hardly differ stay small. The mean variance of a feature is one. length: pieces at which a text is cut, its
    start and end included."""
    width, length = WIDTH, 32

    def __init__(self, vocabulary):
        super().__init__()
        from tokenizers import BertWordPieceTokenizer
        self.pieces = BertWordPieceTokenizer({piece: i for i, piece in enumerate(vocabulary)}, lowercase=True)
        self.pieces.enable_truncation(self.length)
        self.word, self.position = nn.Embedding(PIECES, WIDTH), nn.Parameter(torch.zeros(self.length, WIDTH))
        self.norm = nn.LayerNorm(WIDTH, 1e-12)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        for name, shape in dict(centre=WIDTH, whiten=(WIDTH, WIDTH)).items():
            self.register_buffer(name, torch.zeros(shape))

    def read(self, texts):
        """List of B strings -> word pieces (B, L) int64, 0 behind the end of each."""
        ids = [torch.tensor(found.ids) for found in self.pieces.encode_batch(list(texts))]
        return nn.utils.rnn.pad_sequence(ids, batch_first=True)

    def hidden(self, tokens):
        """tokens (B, L) -> (B, L, width): the last layer, as the published network has it."""
        x = self.norm(self.word(tokens) + self.position[:tokens.shape[1]])
        for block in self.blocks:
            x = block(x, (tokens > 0)[:, None, None])
        return x

    def sentence(self, hidden, tokens):
        """Mean of a text's pieces (B, width): the direction of it is what the published network was trained for."""
        return masked_mean(hidden, tokens > 0)

    def forward(self, tokens):
        """tokens (B, L) -> features (B, width)."""
        return (self.sentence(self.hidden(tokens), tokens) - self.centre) @ self.whiten

    def unknown(self, text):
        """(words of a text that it does not read: of other letters than Latin ones, of no piece that it has, or behind
        the cut; whether it reads any)."""
        end = max(stop for _, stop in self.pieces.encode(text).offsets)

        def reads(word):
            foreign = any(c.isalpha() and not unicodedata.name(c, "").startswith("LATIN") for c in word)
            return not foreign and set(self.pieces.encode(word).ids) - {CLS, SEP, UNK}
        words = [m[0] for m in re.finditer(r"\S+", text) if m.start() >= end or not reads(m[0])]
        return words, not text or len(words) < len(text.split())


def pack(weights):
    """Matrices in 8 bits, each row with a scale of its own; all else as it is. A quarter of the size."""
    packed = {}
    for name, w in weights.items():
        if w.dim() == 2 and name != "whiten":
            scale = w.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            packed |= {name: (w / scale).round().to(torch.int8), f"{name}.scale": scale}
        else:
            packed[name] = w
    return packed


def unpack(packed):
    """The inverse of pack, but for what 8 bits lose."""
    return {name: w.float() * packed[f"{name}.scale"] if w.dtype == torch.int8 else w
            for name, w in packed.items() if not name.endswith(".scale")}


def load_minilm(path=MINILM):
    """The MiniLM of a file that tools/make_minilm.py wrote, frozen."""
    metadata, packed = read_own(path, "minilm", "`git checkout checkpoints` brings it back")
    return load_strict(MiniLM(metadata["vocabulary"].split("\n")), unpack(packed), "", path)


# ---- open_clip
class TextTower(nn.Module):
    """The text transformer of an open_clip model, frozen: its last block at all positions, normalised, not projected.

    config: open_clip's; ValueError for one with another tokenizer than CLIP's. The parameters stay on the meta device
    until the weights, named as tower_weights names them, are loaded with assign=True."""

    def __init__(self, config):
        super().__init__()
        from open_clip.model import _build_text_tower
        text = config["text_cfg"]
        for name in ("hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs", "embed_cls"):
            if text.get(name):
                raise ValueError(f"its text_cfg has {name}={text[name]!r}; towers on CLIP's own tokens can be used")
        length, vocab = text.get("context_length", LENGTH), text.get("vocab_size", VOCAB)
        if (length, vocab) != (LENGTH, VOCAB):
            raise ValueError(f"it reads {length} tokens of {vocab}, not {LENGTH} of {VOCAB}")
        with torch.device("meta"):
            self.text = _build_text_tower(config["embed_dim"], text, config.get("quick_gelu", False))
        self.text.text_projection, self.width = None, self.text.width
        if self.text.attn_mask is not None:
            self.text.attn_mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)

    def read(self, texts):
        """List of B strings -> tokens (B, 77) int64."""
        return clip_tokenizer()(list(texts))

    def unknown(self, text):
        """As MiniLM.unknown: every text has tokens."""
        return [], True

    def forward(self, tokens):
        """tokens (B, 77) int64 -> features (B, 77, width)."""
        x = self.text.token_embedding(tokens) + self.text.positional_embedding
        return self.text.ln_final(self.text.transformer(x, attn_mask=self.text.attn_mask))


def tower_weights(weights):
    """{name: float32 tensor} of a TextTower from an open_clip model's weights, where it may lie under "text."."""
    weights = {k.removeprefix("module."): v for k, v in weights.items()}
    named = {k: v for k, v in weights.items() if k.startswith("text.")} or {f"text.{k}": v for k, v in weights.items()}
    return {k: v.float() for k, v in named.items() if not k.startswith(("text.text_projection", "text.attn_mask"))}


def read_clip_config(folder):
    """open_clip's configuration in a folder; ValueError for absurd sizes, as open_clip allocates what it reads."""
    config = json.loads((Path(folder) / "open_clip_config.json").read_text())["model_cfg"]
    parts = (config, config["text_cfg"], config["vision_cfg"])
    largest = max(n for part in parts for n in part.values() if isinstance(n, (int, float)))
    if largest >= 2**20 or config["text_cfg"].get("layers", 0) >= 2**10:
        raise ValueError(f"{largest} is no size of a model")
    return config


def find_clip(path, name, option):
    """(file of weights, open_clip's configuration) of a file and its model's name, or of a folder that holds both."""
    import open_clip
    folder, file = Path(path).is_dir(), Path(path)
    if folder:
        files = [f for f in file.glob("open_clip_*") if f.suffix in (".safetensors", ".bin")]
        file = min(files, default=file)
    if not file.is_file():
        raise UserError(f"{option} {path}: no such file, or a folder without open_clip_model.safetensors")
    if not folder and name not in open_clip.list_models():
        raise UserError(f"--clip-model {name}: not a model of open_clip, such as ViT-H-14 or ViT-B-32")
    try:
        return file, read_clip_config(path) if folder else open_clip.get_model_config(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{option} {path}: no open_clip_config.json with a model_cfg ({error!r})") from None


def name_tower(path, name, width):
    """dict(file, model, hash) of an open_clip model's text tower. UserError for another width, before anything slow."""
    weights, config = find_clip(path, name, "--clip-weights")
    try:
        tower = TextTower(config)
    except Exception as error:                   # open_clip passes on whatever a wrong configuration raises
        raise UserError(f"--clip-weights {path}: its text tower cannot be used ({first_line(error)})") from None
    if tower.width != width:
        raise UserError(f"--clip-weights {path}: a text tower of width {tower.width}, text.width is {width}")
    made_of = [file_hash(weights), config["text_cfg"], config.get("quick_gelu", False)]
    return dict(file=str(path), model=name, hash=json_hash(made_of))


def name_minilm():
    """The same of the MiniLM in checkpoints/. UserError: it is not there."""
    if not MINILM.is_file():
        raise UserError(f"{MINILM}: not there; `git checkout checkpoints` brings it back")
    return dict(file=f"checkpoints/{MINILM.name}", model="minilm", hash=identity(MINILM))


def load_tower(path, name):
    """The MiniLM in checkpoints/, or the TextTower in an open_clip model's weights, float32; its other parts are not
    read."""
    if name == "minilm":
        return load_minilm()
    file, config = find_clip(path, name, "--clip-weights")
    weights = read_weights(file, "--clip-weights", TOWER_PREFIXES)
    if sum(w.numel() * w.element_size() for w in weights.values()) > os.path.getsize(file):
        raise UserError(f"--clip-weights {path}: its tensors are larger than the file")  # expanded ones
    return load_strict(TextTower(config), tower_weights(weights), "--clip-weights", path, assign=True)


def feature_shape(model, width):
    """Shape of a text's features: of a MiniLM's, or of another model's tower."""
    return (WIDTH,) if model == "minilm" else (LENGTH, width)


@torch.no_grad()
def cache_features(folder, tower, width, texts, device, batch=64):
    """Features (n, ...) float16 of n texts by a tower as name_tower names it, cached in a set's folder.

    texts: data.StickerTexts. UserError: the disk has no room for the features."""
    net = functools.cache(lambda: load_tower(tower["file"], tower["model"]).to(device))   # if anything is missing
    path = cache_path(folder, "text", [tower["hash"], *texts.made_of])
    shape = feature_shape(tower["model"], width)
    need, free, part = 2 * len(texts) * math.prod(shape), shutil.disk_usage(folder).free, Path(f"{path}.part")
    free += part.stat().st_size if part.is_file() else 0     # of an interrupted run
    if not path.is_file() and need > free:
        raise UserError(f"--text-variants: features of {len(texts)} texts are {need / 1e9:.1f} GB, "
                        f"{free / 1e9:.1f} GB are free in {folder}; fewer variants need less")

    def encode(part):
        tokens = net().read([texts[k] for k in range(part.start, part.stop)])
        return net()(tokens.to(device)).half().cpu().numpy()
    return rows(path, len(texts), shape, np.float16, batch, encode, "encoding texts")


def tower_for(model_path, metadata, clip_weights, width):
    """The tower that a DFGN was trained with, from clip_weights or from its place at that time; None if without."""
    trained = metadata.get("text")
    if not trained:
        if clip_weights:
            raise UserError(f"--clip-weights {clip_weights}: {model_path} has a text encoder; leave the option out")
        return None
    if not isinstance(trained, dict) or not all(isinstance(trained.get(k), str) for k in ("file", "model", "hash")):
        raise UserError(f"{model_path}: not what train.py writes (metadata.text is of another type)")
    if trained["model"] == "minilm":
        if clip_weights:
            raise UserError(f"--clip-weights {clip_weights}: {model_path} reads by MiniLM; leave the option out")
        if name_minilm()["hash"] != trained["hash"]:
            raise UserError(f"{MINILM}: not the MiniLM that {model_path} was trained with")
        return load_minilm()
    path = clip_weights or trained["file"]
    if not clip_weights and not Path(path).exists():
        raise UserError(f"{model_path}: trained with the text tower in {path}, now gone; name it by --clip-weights")
    if name_tower(path, trained["model"], width)["hash"] != trained["hash"]:
        raise UserError(f"--clip-weights {path}: not the text tower that {model_path} was trained with")
    return load_tower(path, trained["model"])
