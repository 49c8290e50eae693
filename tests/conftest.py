"""The scripts lie beside this folder; the tests import them by name. Here: one tiny prepared set, VAE and DFGN for all of them."""
import json
import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"                                   # of the processes that tests start, too: sums come out alike


def run_train(*argv):
    """train.main in this process; gives SIGTERM back afterwards."""
    import torch
    import train
    torch.set_num_threads(1)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        train.main([str(a) for a in argv])
    finally:
        signal.signal(signal.SIGTERM, handler)


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
