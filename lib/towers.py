"""The frozen text transformer of an open_clip model, from a local file; it is not trained and no network is used."""
import functools
import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from lib.files import UserError, cache_path, file_hash, first_line, json_hash, rows
from lib.weights import load_strict, read_weights

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
    return module.SimpleTokenizer(context_length=LENGTH)


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


def load_tower(path, name):
    """The TextTower in an open_clip model's weights, float32; the model's other parts are not read."""
    file, config = find_clip(path, name, "--clip-weights")
    weights = read_weights(file, "--clip-weights", TOWER_PREFIXES)
    if sum(w.numel() * w.element_size() for w in weights.values()) > os.path.getsize(file):
        raise UserError(f"--clip-weights {path}: its tensors are larger than the file")  # expanded ones
    return load_strict(TextTower(config), tower_weights(weights), "--clip-weights", path, assign=True)


@torch.no_grad()
def cache_features(folder, made_of, tower, width, texts, tokenize, device, batch=64):
    """Features (n, 77, width) float16 of n texts by a tower as name_tower names it, cached in a set's folder.

    made_of: all else that the texts depend on. UserError: the disk has no room for them."""
    net = functools.cache(lambda: load_tower(tower["file"], tower["model"]).to(device))   # if anything is missing
    path = cache_path(folder, "text", [tower["hash"], *made_of])
    need, free, part = len(texts) * LENGTH * width * 2, shutil.disk_usage(folder).free, Path(f"{path}.part")
    free += part.stat().st_size if part.is_file() else 0     # of an interrupted run
    if not path.is_file() and need > free:
        raise UserError(f"--text-variants: features of {len(texts)} texts are {need / 1e9:.1f} GB, "
                        f"{free / 1e9:.1f} GB are free in {folder}; fewer variants need less")

    def encode(part):
        tokens = tokenize([texts[k] for k in range(part.start, part.stop)])
        return net()(tokens.to(device)).half().cpu().numpy()
    return rows(path, len(texts), (LENGTH, width), np.float16, batch, encode, "encoding texts")


def tower_for(model_path, metadata, clip_weights, width):
    """The TextTower that a DFGN was trained with, from clip_weights or from its place at that time; None if without."""
    trained = metadata.get("text")
    if not trained:
        if clip_weights:
            raise UserError(f"--clip-weights {clip_weights}: {model_path} has a text encoder; leave the option out")
        return None
    if not isinstance(trained, dict) or not all(isinstance(trained.get(k), str) for k in ("file", "model", "hash")):
        raise UserError(f"{model_path}: not what train.py writes (metadata.text is of another type)")
    path = clip_weights or trained["file"]
    if not clip_weights and not Path(path).exists():
        raise UserError(f"{model_path}: trained with the text tower in {path}, now gone; name it by --clip-weights")
    if name_tower(path, trained["model"], width)["hash"] != trained["hash"]:
        raise UserError(f"--clip-weights {path}: not the text tower that {model_path} was trained with")
    return load_tower(path, trained["model"])
