"""The scripts lie beside this folder; the tests import them by name. Here: one tiny prepared set, VAE and DFGN for all of them."""
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"                                   # of the processes that tests start, too: sums come out alike


def run_train(*argv):
    """train.main in this process."""
    import torch
    import train
    torch.set_num_threads(1)
    train.main([str(a) for a in argv])


@pytest.fixture(scope="session")
def stickers16(tmp_path_factory):
    """A prepared set of 48 synthetic stickers at 16 pixels; caches of latents gather in it."""
    import data
    out = tmp_path_factory.mktemp("stickers16") / "set"
    data.main(["synthetic", "--n", "48", "--size", "16", "--out", str(out), "--workers", "1"])
    return out


@pytest.fixture(scope="session")
def vae_argv(stickers16):
    return ["--stage", "vae", "--preset", "tiny", "--data", stickers16, "--batch", 8, "--warmup", 2, "--log-every", 2, "--save-every", 100]


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory, vae_argv):
    """A run folder of the VAE stage, 4 steps."""
    run = tmp_path_factory.mktemp("tiny_vae") / "vae"
    run_train(*vae_argv, "--steps", 4, "--out", run)
    return run


@pytest.fixture(scope="session")
def dfgn_argv(stickers16, tiny_vae):
    return ["--preset", "tiny", "--data", stickers16, "--vae", tiny_vae / "model.safetensors", "--batch", 4, "--warmup", 2,
            "--log-every", 2, "--save-every", 100]


@pytest.fixture(scope="session")
def tiny_dfgn(tmp_path_factory, dfgn_argv):
    """A run folder of the DFGN stage, 7 steps, checkpoints after 4 and 7."""
    run = tmp_path_factory.mktemp("tiny_dfgn") / "dfgn"
    run_train(*dfgn_argv, "--steps", 7, "--out", run, "--save-every", 4)
    return run


TINY_CLIP = dict(embed_dim=32, vision_cfg=dict(image_size=32, layers=2, width=32, head_width=16, patch_size=8),
                 text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A tiny open_clip model of random weights in the layout of a published one."""
    import open_clip
    import torch
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    torch.save(open_clip.CLIP(**TINY_CLIP).state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=TINY_CLIP, preprocess_cfg={})))
    return folder


@pytest.fixture
def no_network(monkeypatch):
    """Whoever reaches for the network fails; loader processes may talk to each other."""
    import socket
    connect = socket.socket.connect

    def local(self, address):
        assert self.family == socket.AF_UNIX, f"the network was touched: {address}"
        return connect(self, address)

    def refuse(*address, **_):
        raise AssertionError(f"the network was touched: {address}")
    monkeypatch.setattr(socket.socket, "connect", local)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


TOWER_FIELDS = ("text.kind=open_clip", "text.width=32", "dfgn.text_width=32", "text.buckets=0")


@pytest.fixture(scope="session")
def tower_argv(stickers16, dfgn_argv, clip_folder, tmp_path_factory):
    """A DFGN on the features of the tiny open_clip model; its set is a copy, caches of texts gather in it."""
    copy = tmp_path_factory.mktemp("tower") / "set"
    shutil.copytree(stickers16, copy)
    return [*dfgn_argv, "--data", copy, "--clip-weights", clip_folder, "--log-every", 3, "--set", *TOWER_FIELDS]


@pytest.fixture(scope="session")
def tower_dfgn(tower_argv, tmp_path_factory):
    """A run folder of it, 8 steps."""
    run = tmp_path_factory.mktemp("tower_dfgn") / "dfgn"
    run_train(*tower_argv, "--steps", 8, "--out", run)
    return run


def sd_vae_names():
    """Tensors of Stable Diffusion's VAE as published: [(name in diffusers, in diffusers before, in CompVis, shape)], sorted by the first."""
    rows, widths = [], (128, 256, 512, 512)

    def layer(new, compvis, shape, old=None):
        rows.extend((f"{new}.{w}", f"{old or new}.{w}", f"{compvis}.{w}", s) for w, s in (("weight", shape), ("bias", shape[:1])))

    def resnet(new, compvis, cin, cout):
        for part, shape in dict(norm1=(cin,), conv1=(cout, cin, 3, 3), norm2=(cout,), conv2=(cout, cout, 3, 3)).items():
            layer(f"{new}.{part}", f"{compvis}.{part}", shape)
        if cin != cout:
            layer(f"{new}.conv_shortcut", f"{compvis}.nin_shortcut", (cout, cin, 1, 1))

    for side, order, blocks in (("encoder", widths, 2), ("decoder", widths[::-1], 3)):
        way = dict(encoder="down", decoder="up")[side]
        layer(f"{side}.conv_in", f"{side}.conv_in", (order[0], 3 if side == "encoder" else 4, 3, 3))
        for i, width in enumerate(order):
            n = i if side == "encoder" else 3 - i                     # CompVis counts the decoder's levels from the image
            for j in range(blocks):
                resnet(f"{side}.{way}_blocks.{i}.resnets.{j}", f"{side}.{way}.{n}.block.{j}", order[max(i - 1, 0)] if j == 0 else width, width)
            if i < 3:
                layer(f"{side}.{way}_blocks.{i}.{way}samplers.0.conv", f"{side}.{way}.{n}.{way}sample.conv", (width, width, 3, 3))
        mid = f"{side}.mid_block.attentions.0"
        layer(f"{mid}.group_norm", f"{side}.mid.attn_1.norm", (512,))
        for new, old, compvis in (("to_q", "query", "q"), ("to_k", "key", "k"), ("to_v", "value", "v"), ("to_out.0", "proj_attn", "proj_out")):
            layer(f"{mid}.{new}", f"{side}.mid.attn_1.{compvis}", (512, 512), f"{mid}.{old}")
        for j in (0, 1):
            resnet(f"{side}.mid_block.resnets.{j}", f"{side}.mid.block_{j + 1}", 512, 512)
        layer(f"{side}.conv_norm_out", f"{side}.norm_out", (order[-1],))
        layer(f"{side}.conv_out", f"{side}.conv_out", (8 if side == "encoder" else 3, order[-1], 3, 3))
    layer("quant_conv", "quant_conv", (8, 8, 1, 1)), layer("post_quant_conv", "post_quant_conv", (4, 4, 1, 1))
    return sorted(rows)


@pytest.fixture(scope="session")
def sd_vae():
    """{naming: state dict} of Stable Diffusion's VAE, filled by a formula: every tensor is told from every other."""
    import numpy as np
    import torch
    names, found = sd_vae_names(), dict(diffusers={}, old={}, compvis={})
    for i, (new, old, compvis, shape) in enumerate(names):
        wave = np.sin(np.arange(np.prod(shape), dtype=np.float64) * (1.7 + 0.001 * i) + i).reshape(shape)
        scale = 0.1 * wave if new.endswith("bias") else 1 + 0.2 * wave if len(shape) == 1 else wave * (2 / np.prod(shape[1:])) ** 0.5
        w = torch.from_numpy(scale.astype(np.float32))
        found["diffusers"][new] = found["old"][old] = w
        found["compvis"][compvis] = w[:, :, None, None] if ".attn_1." in compvis and w.dim() == 2 else w  # 1x1 convolutions there
    return found
