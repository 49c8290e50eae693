"""One tiny prepared set, VAE, DFGN and open_clip model for all tests; a real browser."""
import http.server
import json
import os
import queue
import re
import shutil
import subprocess
import threading

import pytest

os.environ["OMP_NUM_THREADS"] = "1"              # of the processes that tests start, too: sums come out alike


def run_train(*argv, after_backward=None):
    """train.main in this process."""
    import torch

    import train
    torch.set_num_threads(1)
    train.main([str(a) for a in argv], after_backward)


@pytest.fixture(scope="session")
def stickers16(tmp_path_factory):
    """A prepared set of 48 synthetic stickers at 16 pixels; caches of latents and texts gather in it."""
    import data
    out = tmp_path_factory.mktemp("stickers16") / "set"
    data.main(["synthetic", "--n", "48", "--size", "16", "--out", str(out), "--workers", "1"])
    return out


# float32, so that no start is timed: auto takes what is faster at that moment.
TINY = ["--preset", "tiny", "--warmup", 2, "--log-every", 2, "--save-every", 100, "--precision", "float32"]


@pytest.fixture(scope="session")
def vae_argv(stickers16):
    return [*TINY, "--stage", "vae", "--data", stickers16, "--batch", 8]


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory, vae_argv):
    """A run folder of the VAE stage, 4 steps."""
    run = tmp_path_factory.mktemp("tiny_vae") / "vae"
    run_train(*vae_argv, "--steps", 4, "--out", run)
    return run


@pytest.fixture(scope="session")
def dfgn_argv(stickers16, tiny_vae):
    return [*TINY, "--data", stickers16, "--vae", tiny_vae / "model.safetensors", "--batch", 4]


@pytest.fixture(scope="session")
def tiny_dfgn(tmp_path_factory, dfgn_argv):
    """A run folder of the DFGN stage, 7 steps, checkpoints after 4 and 7."""
    run = tmp_path_factory.mktemp("tiny_dfgn") / "dfgn"
    run_train(*dfgn_argv, "--steps", 7, "--out", run, "--save-every", 4)
    return run


@pytest.fixture
def in_browser(tmp_path):
    """A page's bytes, shown in headless Chromium over HTTP at a width -> what its script posts, as JSON."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not program:
        pytest.skip("no chromium, chromium-browser or google-chrome")

    def show(content, width=800):
        answers = queue.Queue()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200 if self.path == "/" else 404)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.end_headers()
                self.wfile.write(content if self.path == "/" else b"")

            def do_POST(self):
                answers.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(204)
                self.end_headers()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                 "--disable-background-networking", f"--user-data-dir={tmp_path}/profile",
                 f"--window-size={width},900", "--remote-debugging-port=0"]   # or it ends behind the page's load
        with http.server.ThreadingHTTPServer(("localhost", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            browser = subprocess.Popen([program, *flags, f"http://localhost:{server.server_port}/"],
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                return answers.get(timeout=100)
            finally:
                browser.kill()
                browser.wait()
                server.shutdown()
    return show


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
    monkeypatch.setattr(socket.socket, "connect", local)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *name, **_: pytest.fail(f"the network was touched: {name}"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.fixture(scope="session")
def tower_dfgn(dfgn_argv, clip_folder, tmp_path_factory):
    """A run folder of a DFGN on the features of the tiny open_clip model, 8 steps."""
    run = tmp_path_factory.mktemp("tower_dfgn") / "dfgn"
    fields = "text.kind=open_clip", "text.width=32", "dfgn.text_width=32"
    run_train(*dfgn_argv, "--steps", 8, "--out", run, "--clip-weights", clip_folder, "--set", *fields)
    return run


# From diffusers' names to those before its attention was renamed, and to CompVis's.
OLD_NAMES = dict(to_q="query", to_k="key", to_v="value", to_out="proj_attn")
COMPVIS_NAMES = ((r"attentions\.0\.to_(q|k|v)", r"attn_1.\1"), (r"attentions\.0\.to_out\.0", "attn_1.proj_out"),
                 (r"attentions\.0\.group_norm", "attn_1.norm"), ("mid_block", "mid"),
                 (r"mid\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"), (r"down_blocks", "down"),
                 (r"up_blocks\.(\d)", lambda m: f"up.{3 - int(m[1])}"),  # counted from the image
                 (r"resnets", "block"), (r"(up|down)samplers\.0", r"\1sample"), ("conv_shortcut", "nin_shortcut"),
                 ("conv_norm_out", "norm_out"))


@pytest.fixture(scope="session")
def sd_vae():
    """{naming: state dict} of Stable Diffusion's VAE, filled by a formula: every tensor is told from every other."""
    import numpy as np
    import torch

    from lib.nets.autoencoder import SD_VAE, VAE
    with torch.device("meta"):
        shapes = {name: w.shape for name, w in VAE(SD_VAE).state_dict().items() if not name.startswith("latent_")}
    found = dict(diffusers={}, old={}, compvis={})
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        w = np.sin(np.arange(np.prod(shape), dtype=np.float64) * (1.7 + 0.001 * i) + i).reshape(shape)
        if name.endswith("bias"):
            w = 0.1 * w
        else:
            w = 1 + 0.2 * w if len(shape) == 1 else w * (2 / np.prod(shape[1:])) ** 0.5
        w = torch.from_numpy(w.astype(np.float32))
        old = re.sub(r"to_out\.0|to_[qkv]", lambda m: OLD_NAMES[m[0].partition(".")[0]], name)
        compvis = name
        for pattern, new in COMPVIS_NAMES:
            compvis = re.sub(pattern, new, compvis)
        found["diffusers"][name] = found["old"][old] = w
        found["compvis"][compvis] = w[:, :, None, None] if ".attn_1." in compvis and w.dim() == 2 else w  # convolutions
    return found
