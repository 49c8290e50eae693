"""lib/nets/weights.py: files from others are data; those that do not fit are refused with the reason."""
import json
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import TINY_CLIP
from safetensors.torch import save_file

from data import tokenize
from lib.nets import towers
from lib.nets import weights as W
from lib.nets.autoencoder import SD_VAE, load_vae
from lib.run.files import UserError, file_hash
from model import PRESETS, RDTF, Config, load_rdtf


class Code:
    """Writes a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return Path.write_text, (self.canary, "code was run")


def zipped(path, name, content, kind=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "a", kind) as file:
        file.writestr(name, content)


FILES = {
    "pickle": (lambda p, c: torch.save(dict(a=Code(c)), p), "could run code"),
    "legacy": (lambda p, c: torch.save(Code(c), p, _use_new_zipfile_serialization=False), "could run code"),
    "script": (lambda p, c: zipped(p, "w/code/__torch__.py", "class M: pass"), "TorchScript"),
    "bomb": (lambda p, c: zipped(p, "w/data.pkl", bytes(2**24), zipfile.ZIP_DEFLATED), "unpacks to more"),
    "cut": (lambda p, c: p.write_bytes(b"PK\3\4 no more"), "not a ZIP archive"),
    "none": (lambda p, c: torch.save(None, p), "holds nothing")}


@pytest.mark.parametrize("kind", FILES)
def test_code_in_a_file_is_not_run(kind, tmp_path):
    (make, reason), bad, canary = FILES[kind], tmp_path / "weights.bin", tmp_path / "canary"
    make(bad, canary)
    with pytest.raises(UserError, match=f"--x .*weights.bin: cannot be read as weights .*{reason}"):
        W.read_weights(bad, "--x")
    with pytest.raises(Exception, match=reason):
        W.read_checkpoint(bad)
    assert not canary.exists()
    if kind == "pickle":
        torch.load(bad, weights_only=False)                           # without the guard it would run
        assert canary.exists()


def test_read_weights(tmp_path):
    tensors = {"a.x": torch.arange(3.0), "b.x": torch.ones(2), "a.y": torch.zeros(2, 2)}
    torch.save(dict(state_dict=tensors, epoch=1), tmp_path / "w.ckpt")
    torch.save(tensors, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    save_file(tensors, tmp_path / "w.safetensors")
    for path in sorted(tmp_path.glob("w.*")):
        found = W.read_weights(path, "--x", ("a.", "c."))
        assert found.keys() == {"a.x", "a.y"} and torch.equal(found["a.x"], tensors["a.x"])
        with pytest.raises(UserError, match="--x .*: holds no weights by name that begins with c., d."):
            W.read_weights(path, "--x", ("c.", "d."))
    for bad in ([torch.ones(1)], dict(a=torch.ones(2, device="meta"))):
        torch.save(bad, tmp_path / "bad.pt")
        with pytest.raises(UserError, match="--x .*bad.pt: (holds no weights|cannot be read)"):
            W.read_weights(tmp_path / "bad.pt", "--x")
    with pytest.raises(UserError, match="--x nowhere: no such file"):
        W.read_weights("nowhere", "--x")


def test_load_strict():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    good = {k: torch.full_like(v, 2) for k, v in net.state_dict().items() if "num_batches" not in k}
    W.load_strict(net, good, "--x", "f")
    assert not net.training and all((p == 2).all() and not p.requires_grad for p in net.parameters())
    bad = {**good, "0.weight": torch.ones(3, 9), "more": torch.ones(1)}
    del bad["0.bias"]
    reason = r"missing 1 \(0.bias\); unknown 1 \(more\); of another shape 1 \(0.weight \(3, 9\) instead of \(3, 2\)\)"
    with pytest.raises(UserError, match=f"--x f: not the weights of Sequential: {reason}"):
        W.load_strict(net, bad, "--x", "f")


# ---- our own files
@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(path, weights, metadata) of a model file as train.py writes it."""
    torch.manual_seed(0)
    config = PRESETS["tiny"]
    path, weights = tmp_path_factory.mktemp("saved") / "model.safetensors", RDTF(config).state_dict()
    metadata = dict(kind="dfgn", config=json.loads(json.dumps(config.to_dict())), step=7, vae="ab", vae_file="v")
    W.save_model(path, weights, **metadata)
    return path, weights, metadata


def test_models_come_back(saved, tmp_path):
    path, weights, metadata = saved
    net, found = load_rdtf(path)
    assert found == metadata == W.read_metadata(path) and Config.from_dict(found["config"]) == net.config
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items()) and not net.training
    assert W.is_own(path) and path.stat().st_mode & 0o44 == 0o44
    save_file(dict(a=torch.ones(1)), tmp_path / "other.safetensors", metadata=dict(format="pt"))
    assert not W.is_own(tmp_path / "other.safetensors") and not W.is_own(tmp_path / "none")


def test_a_model_is_known_by_its_content(saved, tmp_path):
    """Not by its file's bytes, place, or what else it says; equal contents are equal files."""
    path, weights, metadata = saved
    W.save_model(tmp_path / "again", dict(reversed(weights.items())), **dict(reversed(metadata.items())))
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    old = {k: json.dumps(v) for k, v in {**metadata, "step": 8, "vae_file": "elsewhere"}.items()}  # a key each, as once
    save_file(weights, tmp_path / "old", metadata=old)
    assert W.read_metadata(tmp_path / "old")["step"] == 8 and W.is_own(tmp_path / "old", "dfgn")
    assert W.identity(tmp_path / "old") == W.identity(path) != file_hash(tmp_path / "old")
    assert W.names_of(path) == {W.identity(path), file_hash(path)}
    name = "dfgn.conv_out.bias"
    for other, more in ((dict(weights, **{name: weights[name] + 1}), {}), (weights, dict(kind="adapter", base="b")),
                        (weights, dict(config=edited(metadata["config"], ["diffusion", "prediction"], "v")))):
        W.save_model(tmp_path / "other", other, **{**metadata, **more})
        assert W.identity(tmp_path / "other") != W.identity(path)
    save_file(weights, tmp_path / "foreign.safetensors", metadata=dict(format="pt"))
    assert W.identity(tmp_path / "foreign.safetensors") == file_hash(tmp_path / "foreign.safetensors")


def test_a_folder_stands_for_the_model_in_it(saved, sd_vae, tmp_path):
    shutil.copy(saved[0], tmp_path / "model.safetensors")
    assert load_rdtf(tmp_path)[1] == saved[2] and W.identity(tmp_path) == W.identity(saved[0])
    diffusers = tmp_path / "sd-vae-ft-mse"
    diffusers.mkdir()
    (diffusers / "config.json").write_text("{}")
    with pytest.raises(UserError, match="sd-vae-ft-mse: a folder without model.safetensors$"):
        load_vae(diffusers)
    save_file(sd_vae["diffusers"], diffusers / "diffusion_pytorch_model.safetensors")
    assert load_vae(diffusers)[1]["any_size"]
    (diffusers / "diffusion_pytorch_model.safetensors").rename(tmp_path / "VAE.SAFETENSORS")
    assert load_vae(tmp_path / "VAE.SAFETENSORS")[1]["any_size"]
    (diffusers / "state.pt").touch()
    with pytest.raises(UserError, match="without model.safetensors; the command that trained it writes it again"):
        load_rdtf(diffusers)


def edited(tree, path, value):
    """A copy of nested dictionaries with one value changed, or without it (value ...)."""
    key, *below = path
    new = edited(tree[key], below, value) if below else value
    return {k: v for k, v in {**tree, key: new}.items() if v is not ...}


METADATA = [
    ("kind", "vae", "holds 'vae', 'dfgn' is needed"), ("step", "7", "metadata.step"),
    ("vae_file", ..., "metadata.vae_file"), ("config.dfgn", [], "configuration is not"), ("config.colour", 1, "colour"),
    ("config.dfgn.widths", [10**9, 32], r"widths is \[1000000000, 32\]"),
    ("config.dfgn.widths", [60000, 60000], "configuration is not|not the weights of RDTF: .*another shape"),
    ("config.dfgn.layers", 60000, "more layers than the file"), ("config.dfgn.layers", "2", "configuration"),
    ("config.dfgn.layers", 2, "not the weights of RDTF: missing"), ("config.dfgn.temporal", "lstm", "lstm"),
    ("config.text.vocab", 60000, r"text.token.weight \(\d+, 16\) instead of \(60000, 16\)"),
    ("config.diffusion.steps", 10**12, "diffusion.steps is"), ("config.diffusion.steps", True, "steps is True"),
    ("config.diffusion.beta_end", float("nan"), "beta_end is nan"), ("config.vae.size", 65535, "65535, not a multiple")]


@pytest.mark.parametrize("path, value, reason", METADATA)
def test_metadata_that_was_edited(path, value, reason, saved, tmp_path):
    W.save_model(tmp_path / "m.safetensors", saved[1], **edited(saved[2], path.split("."), value))
    with pytest.raises(UserError, match=f"m.safetensors: .*({reason})"):
        load_rdtf(tmp_path / "m.safetensors")


def with_header(content, change):
    """A .safetensors file whose header is changed and whose tensors are not."""
    length, = struct.unpack("<Q", content[:8])
    header = json.dumps(change(json.loads(content[8:8 + length]))).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + length:]


BIAS, STEP = ("dfgn.conv_out.bias", "shape"), ("__metadata__", "rdtf")
DAMAGE = {
    "empty": (lambda c: b"", "not a readable"),
    "header": (lambda c: struct.pack("<Q", 2**62) + c[8:], "not a readable"),
    "petabytes": (lambda c: with_header(c, lambda h: edited(h, BIAS, [10**15])), "not a readable"),
    "no metadata": (lambda c: with_header(c, lambda h: edited(h, STEP[:1], ...)), "something else"),
    "deep": (lambda c: with_header(c, lambda h: edited(h, STEP, "[" * 100_000)), "not a readable")}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_file_that_was_damaged(kind, saved, tmp_path):
    change, reason = DAMAGE[kind]
    (tmp_path / "m.safetensors").write_bytes(change(saved[0].read_bytes()))
    with pytest.raises(UserError, match=f"m.safetensors: .*{reason}"):
        load_rdtf(tmp_path / "m.safetensors")


# ---- Stable Diffusion's VAE
def test_every_naming_of_stable_diffusions_vae_gives_the_same_weights(sd_vae, tmp_path):
    """A full checkpoint: test_model.py."""
    published = dict(compvis="decoder.up.3.block.2.conv1.weight", old="encoder.mid_block.attentions.0.proj_attn.bias",
                     diffusers="decoder.up_blocks.0.upsamplers.0.conv.weight")
    assert all(name in sd_vae[naming] for naming, name in published.items())
    wanted, training = sd_vae["diffusers"], {"loss.logvar": torch.ones(1), "model_ema.decay": torch.ones(1)}
    for weights in (wanted, sd_vae["old"], {**sd_vae["compvis"], **training}):
        named = W.sd_vae_weights(weights)
        assert named.keys() == wanted.keys() and len(named) == 248
        assert all(torch.equal(w, wanted[name]) for name, w in named.items())
    with pytest.raises(ValueError, match="a second tensor for decoder.mid_block.attentions.0.to_k.bias"):
        W.sd_vae_weights({**wanted, **sd_vae["old"]})
    save_file({k: v.half() for k, v in sd_vae["old"].items()}, tmp_path / "vae.safetensors", metadata={"format": "pt"})
    vae, metadata = load_vae(tmp_path / "vae.safetensors")
    assert vae.config == SD_VAE and metadata["any_size"] and not vae.training
    assert (1 / vae.latent_std).tolist() == pytest.approx([0.18215] * 4, rel=1e-6) and not vae.latent_mean.any()
    assert all(torch.equal(vae.state_dict()[k], w.half().float()) for k, w in wanted.items())


def test_wrong_weights_of_stable_diffusion_are_named(sd_vae, tmp_path):
    weights = {k: torch.zeros(()).expand(w.shape) for k, w in sd_vae["compvis"].items()}     # no values are needed
    weights["encoder.mid.attn_1.q.weight"] = torch.ones(512, 512, 3, 3)
    weights["decoder.up.4.block.0.norm1.weight"] = torch.ones(1)
    torch.save(weights, tmp_path / "vae.ckpt")
    reason = r"unknown 1 .*of another shape 1 .*to_q.weight \(512, 512, 3, 3\) instead of \(512, 512\)"
    with pytest.raises(UserError, match=f"--vae .*vae.ckpt: .*{reason}"):
        load_vae(tmp_path / "vae.ckpt")


# ---- text towers
def copied(clip_folder, folder, **text):
    """A copy of the tiny open_clip model with fields of its text tower changed."""
    shutil.copytree(clip_folder, folder)
    config = dict(model_cfg=dict(TINY_CLIP, text_cfg=dict(TINY_CLIP["text_cfg"], **text)))
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("layout", ["plain", "custom half", "distributed"])
def test_every_layout_of_open_clips_weights_gives_the_same_tower(layout, clip_folder, tmp_path, no_network):
    import open_clip
    whole = open_clip.create_model(f"local-dir:{clip_folder}", weights_only=True).eval()
    weights, parts = whole.state_dict(), (*towers.PARTS, "text_projection")
    if layout == "custom half":
        weights = {f"text.{k}" if k.startswith(parts) else k: v.half() for k, v in weights.items()}
    if layout == "distributed":
        weights = {f"module.{k}": v for k, v in weights.items()}
    folder = copied(clip_folder, tmp_path / "clip")
    (folder / "open_clip_pytorch_model.bin").unlink()
    save_file(weights, folder / "open_clip_model.safetensors")
    tower, texts = towers.load_tower(folder, "x"), tokenize(["red heart", "", "a # dog"])
    assert not any(p.requires_grad or p.is_meta or p.dtype != torch.float32 for p in tower.parameters())
    with torch.no_grad():
        x = whole.token_embedding(texts) + whole.positional_embedding
        want = whole.ln_final(whole.transformer(x, attn_mask=whole.attn_mask))
        assert torch.allclose(tower(texts), want, atol=1e-2 if layout == "custom half" else 1e-5)
    assert towers.name_tower(folder, "x", 32)["hash"] != towers.name_tower(clip_folder, "x", 32)["hash"]


def test_towers_that_cannot_be_used(clip_folder, tmp_path, no_network):
    file = clip_folder / "open_clip_pytorch_model.bin"
    cases = [(tmp_path / "none.bin", "", "no such file"),
             (file, "hf-hub:some/model", "--clip-model hf-hub:some/model: not a model")]
    for change, reason in [(dict(hf_model_name="roberta"), "cannot be used .*hf_model_name='roberta'"),
                           (dict(context_length=32), "32 tokens of 49408, not 77"), (dict(heads=0), "cannot be used"),
                           (dict(width=10**9), "no open_clip_config"), (dict(layers=10**5), "no open_clip_config")]:
        cases.append((copied(clip_folder, tmp_path / next(iter(change)), **change), "", reason))
    for path, name, reason in cases:
        with pytest.raises(UserError, match=reason):
            towers.name_tower(path, name, 32)
    with pytest.raises(UserError, match=r"not the weights of TextTower: missing 12 \(text.transformer.resblocks.2"):
        towers.load_tower(copied(clip_folder, tmp_path / "deep", layers=3), "")
    wide = copied(clip_folder, tmp_path / "wide")                     # one number, expanded: maybe to terabytes
    torch.save({"token_embedding.weight": torch.zeros(1).half().expand(1000, 1000)}, wide / file.name)
    with pytest.raises(UserError, match="wide: its tensors are larger than the file"):
        towers.load_tower(wide, "")


def test_the_tower_of_a_model(clip_folder, tmp_path):
    moved = copied(clip_folder, tmp_path / "moved")
    meta = dict(text=towers.name_tower(tmp_path / "moved", "x", 32))
    assert towers.tower_for("m", meta, None, 32).width == 32 and towers.tower_for("m", {}, None, 32) is None
    with pytest.raises(UserError, match="m: not what train.py writes"):
        towers.tower_for("m", dict(text=[1]), None, 32)
    (moved / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=dict(TINY_CLIP, quick_gelu=True))))
    with pytest.raises(UserError, match="not the text tower that m was trained with"):  # another network
        towers.tower_for("m", meta, None, 32)
    shutil.rmtree(moved)
    with pytest.raises(UserError, match="m: trained with the text tower in .*moved, now gone"):
        towers.tower_for("m", meta, None, 32)
    assert towers.tower_for("m", meta, clip_folder, 32).width == 32       # the same weights at another place
