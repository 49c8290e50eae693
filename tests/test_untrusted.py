"""Files from others are data: bad ones are refused with the reason, whoever reads them; code in them is not run, nothing is written over."""
import json
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import metrics
import train
from conftest import run_train
from curriculum import Curriculum
import data
from data import UserError
from model import PRESETS, RDTF
from sample import Sampler


class Code:
    """Writes a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return Path.write_text, (self.canary, "code was run")


def archive(path, members, kind=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", kind) as file:
        for name, content in members.items():
            file.writestr(f"w/{name}", content)


def script(path, canary):
    """What torch.jit.load would compile and run; only the pickle beside it does harm."""
    torch.save(Code(canary), path)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("w/code/__torch__.py", "class M: pass")


def bomb(path, canary):
    """64 MB of zeros in 64 kB."""
    archive(path, {"data.pkl": b"\0" * 2 ** 26, "version": b"3"}, zipfile.ZIP_DEFLATED)


CODE = {"pickle": lambda path, canary: torch.save(dict(a=Code(canary)), path), "legacy": lambda path, canary: torch.save(Code(canary), path, _use_new_zipfile_serialization=False),
        "script": script, "bomb": bomb, "cut": lambda path, canary: path.write_bytes(b"PK\3\4 no more"), "none": lambda path, canary: torch.save(None, path)}


def resumed(argv, run, path):
    for name in ("state.pt", "state.prev.pt"):
        shutil.copy(path, run / name)
    run_train(*argv, "--out", run)


@pytest.mark.parametrize("kind", CODE)
def test_code_in_a_file_is_not_run(kind, dfgn_argv, tiny_dfgn, clip_folder, tmp_path):
    run = Path(shutil.copytree(tiny_dfgn, tmp_path / "run"))
    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    bad, canary = folder / "open_clip_pytorch_model.bin", tmp_path / "canary"
    CODE[kind](bad, canary)
    before = {p.name: p.read_bytes() for p in run.iterdir() if "state" not in p.name}
    readers = {"--vae": lambda: run_train(*dfgn_argv, "--steps", 1, "--out", tmp_path / "other", "--vae", bad), "--clip-weights": lambda: train.load_tower(folder, ""),
               "--i3d": lambda: metrics.I3DRows(str(bad)), "--dover": lambda: metrics.DOVERRows(str(bad)), "--clip": lambda: metrics.CLIPRows(str(folder)),
               "--replay": lambda: run_train("--replay", bad), "state.pt and state.prev.pt cannot be read": lambda: resumed([*dfgn_argv, "--steps", 7], run, bad)}
    said = dict(pickle="objects too, which could run code", legacy="objects too, which could run code",
                script="TorchScript", bomb="unpacks to more than the file is long", cut="cannot be read|not a step", none="no weights|holds nothing")[kind]
    for option, read in readers.items():
        with pytest.raises(UserError, match=f"{option}" if "state" in option else f"{option} .*({said})"):
            read()
    assert not canary.exists() and not (tmp_path / "other").exists()
    assert {p.name: p.read_bytes() for p in run.iterdir() if "state" not in p.name} == before
    assert {(run / name).read_bytes() for name in ("state.pt", "state.prev.pt")} == {bad.read_bytes()}


def test_keys_of_texts_that_are_none(tmp_path):
    (tmp_path / "text-aaaaaaaaaaaa").mkdir()
    for content in (b"no array", b"\x93NUMPY\1\0v\0{'descr': '<u8', 'fortran_order': False, 'shape': (1000000000000,), }" + b" " * 40 + b"\n"):
        (tmp_path / "text-aaaaaaaaaaaa/x.npy").write_bytes(content)
        with pytest.raises(UserError, match="x.npy: missing or corrupt .*; remove it and let train.py write it again"):
            data.TextCache(tmp_path, "a" * 12, 4)


def test_tensors_larger_than_their_file(clip_folder, tmp_path):
    """One number, expanded: float32 of it would be 4 MB, or terabytes."""
    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    torch.save({"token_embedding.weight": torch.zeros(1, dtype=torch.float16).expand(1000, 1000)}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match="--clip-weights .*clip: its tensors are larger than the file"):
        train.load_tower(folder, "")


def test_the_canary_sings(tmp_path):
    """Without weights_only the payloads of this file would run."""
    CODE["pickle"](tmp_path / "w", tmp_path / "canary")
    torch.load(tmp_path / "w", weights_only=False)
    assert (tmp_path / "canary").exists()


# ---- files that say what they are not

def edited(tree, path, value):
    """A copy of nested dictionaries with one value changed, or without it (value ...)."""
    key, *below = path
    if below:
        return {**tree, key: edited(tree[key], below, value)}
    return {k: v for k, v in {**tree, key: value}.items() if v is not ...}


METADATA = [("kind", "vae", "holds 'vae', 'dfgn' is needed"), ("kind", ..., "'dfgn' is needed"), ("step", ..., "missing 1 .step"), ("step", "7", "metadata.step is str instead of int"),
            ("vae", 5, "metadata.vae is int instead of str"), ("vae_file", ..., "missing 1 .vae_file"), ("text", [], "metadata.text is list instead of dict"),
            ("config", [], "metadata.config is list"), ("config.dfgn", [], "dfgn.channels is missing"), ("config.dfgn", None, "configuration is not"), ("config.colour", 1, "colour"),
            ("config.dfgn.widths", ..., "dfgn.widths is missing"), ("config.dfgn.widths", [10 ** 9, 32], r"dfgn.widths is \[1000000000, 32\]"), ("config.dfgn.widths", "wide", "dfgn.widths is wide"),
            ("config.dfgn.widths", [60000, 60000], "configuration is not|not the weights of RDTF: .*another shape"), ("config.dfgn.layers", 60000, "more layers than the file has weights"),
            ("config.dfgn.layers", 2, "not the weights of RDTF: missing"), ("config.text.vocab", 60000, r"text.token.weight \(49408, 16\) instead of \(60000, 16\)"),
            ("config.text.buckets", 32, "word_pictures"), ("config.text.length", 10 ** 12, "text.length is 1000000000000"), ("config.frames", 10 ** 9, "frames is 1000000000"),
            ("config.diffusion.steps", 10 ** 12, "diffusion.steps is"), ("config.diffusion.steps", True, "diffusion.steps is True"), ("config.diffusion.beta_end", float("nan"), "beta_end is nan"),
            ("config.dfgn.gate", 1, "dfgn.gate is 1"), ("config.dfgn.temporal", "lstm", "lstm"), ("config.vae.size", 2 ** 40, "vae.size is"), ("config.vae.size", 65535, "vae.size is 65535, not a multiple")]


@pytest.mark.parametrize("path, value, said", METADATA)
def test_metadata_that_was_edited(path, value, said, tiny_dfgn, tmp_path):
    weights, metadata = train.read_model(tiny_dfgn / "model.safetensors", "dfgn", "")
    train.save_model(tmp_path / "m.safetensors", weights, **edited(metadata, path.split("."), value))
    with pytest.raises(UserError, match=f"m.safetensors: .*({said})"):
        Sampler(tmp_path / "m.safetensors", device="cpu")


def rewritten(path, change):
    """A .safetensors file whose header is changed and whose tensors are not."""
    content = path.read_bytes()
    length, = struct.unpack("<Q", content[:8])
    header = json.dumps(change(json.loads(content[8:8 + length]))).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + length:]


BIAS = "dfgn.conv_out.bias"
WEIGHTS = {"empty": (lambda p: b"", "not a readable"), "cut": (lambda p: p.read_bytes()[:-1], "not a readable"), "half a header": (lambda p: p.read_bytes()[:500], "not a readable"),
           "header of 2 ** 62 bytes": (lambda p: struct.pack("<Q", 2 ** 62) + p.read_bytes()[8:], "not a readable"),
           "tensor outside": (lambda p: rewritten(p, lambda h: {**h, BIAS: {**h[BIAS], "data_offsets": [0, 10 ** 15]}}), "not a readable"),
           "petabytes": (lambda p: rewritten(p, lambda h: {**h, BIAS: {**h[BIAS], "shape": [10 ** 15]}}), "not a readable"),
           "no metadata": (lambda p: rewritten(p, lambda h: {k: v for k, v in h.items() if k != "__metadata__"}), "something else"),
           "metadata no JSON": (lambda p: rewritten(p, lambda h: edited(h, ("__metadata__", "step"), "{")), "not a readable"),
           "deep metadata": (lambda p: rewritten(p, lambda h: edited(h, ("__metadata__", "step"), "[" * 100_000)), "not a readable"),
           "renamed": (lambda p: rewritten(p, lambda h: {("other" if k == BIAS else k): v for k, v in h.items()}), f"missing 1 .{BIAS}.; unknown 1 .other.")}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_not_what_they_say(kind, tiny_dfgn, tmp_path):
    make, said = WEIGHTS[kind]
    (tmp_path / "m.safetensors").write_bytes(make(tiny_dfgn / "model.safetensors"))
    with pytest.raises(UserError, match=f"m.safetensors: .*{said}"):
        train.load_model(tmp_path / "m.safetensors", "dfgn")


HALF = torch.zeros(1, dtype=torch.float16)
STATE = [("step", -1, "it is of step -1 of 7"), ("step", 8, "it is of step 8 of 7"), ("step", 4.0, "state.step is float instead of int"), ("ema", ..., "missing 1 .ema"), ("more", 1, "unknown 1 .more"),
         (("net", BIAS), ..., f"state.net: missing 1 .{BIAS}"), (("net", BIAS), HALF, r"torch.float16 \(1,\) instead of torch.float32"), (("ema", BIAS), torch.zeros(32, device="meta"), f"state.ema.{BIAS} is"),
         (("ema", BIAS), torch.zeros(32).to_sparse(), f"state.ema.{BIAS} is"), ("optimizer state", {}, "state.optimizer.state: missing"), (("optimizer", "state", 0, "exp_avg"), HALF, "state.0.exp_avg is"),
         (("optimizer", "state", 0, "exp_avg_sq"), ..., "missing 1 .exp_avg_sq"), ("optimizer param_groups", [], "param_groups: missing 1"), ("window", {"loss": ("x", 1)}, "window.loss.0 is str instead of float"),
         ("window", {"loss": 1}, "window.loss is int instead of tuple"), ("curriculum", None, "curriculum is NoneType instead of dict"), ("curriculum sums", [[0.0]], "curriculum.sums: missing 5"),
         ("curriculum scores", ["x"], "curriculum.scores.0 is str"), ("curriculum r", ..., "missing 1 .r")]


def test_a_checkpoint_of_something_else(dfgn_argv, tiny_dfgn, tmp_path):
    run, config = Path(shutil.copytree(tiny_dfgn, tmp_path / "run")), train.TrainConfig(steps=7)
    state, net, curriculum = torch.load(run / "state.prev.pt", weights_only=True), RDTF(PRESETS["tiny"]), Curriculum(steps=7)
    optimizer = train.make_optimizer(config, net, 1)
    train.check_state(run, config, state, net, optimizer, curriculum)
    for path, value, said in STATE:
        bad = edited(state, path.split() if isinstance(path, str) else path, value)
        with pytest.raises(UserError, match=f"run: its checkpoint is not one of this run .*{said}"):
            train.check_state(run, config, bad, net, optimizer, curriculum)
    torch.save(bad, run / "state.pt")
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    with pytest.raises(UserError, match="missing 1 .r"):
        run_train(*dfgn_argv, "--steps", 7, "--out", run)
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


def test_a_log_that_is_damaged_stops_no_run(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\n{"step": 2, "tasks": {"t2v": 1}\n[1]\n{}\n' + b"[" * 100_000 + b'\n{"step": "3"}\n{"step": 4}\n{"step": 5}\n')
    train.cut_log(tmp_path / "log.jsonl", 4)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"step": 4}\n'


def fake_run(folder, config, log, report):
    folder.mkdir(exist_ok=True)
    for name, content in {"config.json": config, "log.jsonl": log, "eval.json": report}.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


def test_runs_whose_files_were_edited(tiny_dfgn, tmp_path, capsys):
    config, log = json.loads((tiny_dfgn / "config.json").read_text()), '{"step": 7, "cpu_s": 1}\n'
    fd = {name: dict(value=0.5, interval=[0, 9]) for name in ("FD-app", "FD-mot")}
    report = dict(split="val", n=2, seed=0, protocol="p", tasks=dict(it2v=dict(fd=fd, psnr={"model - copy": dict(mean=1, interval=[0, 2])})))
    good, words = (config, log, report), ("{", "[1]", "7", "null", "[" * 100_000)
    cases = [(word, log, report) for word in words] + [(config, log, word) for word in words] + [(config, word, report) for word in ("", '{"step": 7}', '{"cpu_s": 1}')]
    cases += [(edited(config, path, value), log, report) for path, value in ((["train"], []), (["train", "seed"], ...), (["model"], ...))]
    psnr = ["tasks", "it2v", "psnr", "model - copy"]
    cases += [(config, log, edited(report, path, value)) for path, value in ((["tasks"], []), (["tasks", "it2v"], 1), (psnr, {}), ([*psnr, "mean"], "1"), ([*psnr, "interval"], 1),
                                                                              (["tasks", "it2v", "fd", "FD-app"], None), (["split"], ...))]
    first = fake_run(tmp_path / "first", *good)
    assert "| first | - | 7 | 1 | 1.00 [0.00, 2.00] | 0.50, 0.50 |" in evaluate.compare([first])
    for case in cases:
        with pytest.raises(UserError, match="--compare .*bad: config.json, log.jsonl and eval.json of a dfgn run are needed"):
            evaluate.compare([first, fake_run(tmp_path / "bad", *case)])
    for bad in (*words, edited(config, ["train"], []), edited(config, ["train", "frames"], {}), edited(config, ["model", "dfgn"], 3), edited(config, ["model", "dfgn", "temporal"], ...)):
        shutil.copy(tiny_dfgn / "model.safetensors", fake_run(tmp_path / "bad", bad, log, report))
        with pytest.raises(UserError, match="--runs .*bad: no folder"):
            evaluate.find_runs([str(tmp_path / "bad")])
        assert "config.json: left out, not a run" in capsys.readouterr().err


KEPT = {"empty": b"", "cut": b"\x93NUMPY\x01\x00v\x00{'descr'", "shape": np.zeros((3, 3), np.float32), "type": np.zeros((4, 3)), "objects": np.array([Code("c")], object), "archive": None}


@pytest.mark.parametrize("kind", KEPT)
def test_kept_arrays_that_were_edited(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keep = lambda: evaluate.kept(tmp_path, "x", {}, (4, 3), np.float32, 4, lambda part: np.ones((4, 3)))
    assert (keep() == 1).all() and (keep() == 1).all()
    path, = tmp_path.glob("x-*.npy")
    with open(path, "wb") as file:
        if kind == "archive":
            np.savez(file, np.zeros(3))
        elif isinstance(KEPT[kind], bytes):
            file.write(KEPT[kind])
        else:
            np.save(file, KEPT[kind])
    with pytest.raises(UserError, match=f"{path.name}: missing or corrupt .*; remove it, and it is made again"):
        keep()
    assert not Path("c").exists()


def test_open_clips_configuration_that_was_edited(clip_folder, tmp_path):
    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    config = json.loads((folder / "open_clip_config.json").read_text())
    for path, value in (["model_cfg"], []), (["model_cfg", "text_cfg"], 1), (["model_cfg", "vision_cfg"], ...), (["model_cfg", "vision_cfg", "width"], 10 ** 9), (["model_cfg", "text_cfg", "layers"], 10 ** 5):
        (folder / "open_clip_config.json").write_text(json.dumps(edited(config, path, value)))
        with pytest.raises(UserError, match="--clip-weights .*no open_clip_config.json with a model_cfg"):
            train.name_tower(folder, "", 32)
        with pytest.raises(UserError, match="--clip .*no open_clip_config.json with a model_cfg"):
            metrics.CLIPRows(str(folder))
    (folder / "open_clip_config.json").write_text(json.dumps(edited(config, ["model_cfg", "text_cfg", "heads"], 0)))
    with pytest.raises(UserError, match="--clip-weights .*text tower cannot be used"):
        train.name_tower(folder, "", 32)


def test_a_judge_whose_sizes_were_edited(tmp_path):
    for buckets in (10 ** 15, -1, "8"):
        train.save_model(tmp_path / "judge", dict(a=torch.zeros(1)), kind="judge", buckets=buckets, width=4, set="", seed=0)
        with pytest.raises(UserError, match="judge: not (a judge of this version|the weights of Judge)"):
            metrics.load_judge(tmp_path / "judge")


def test_steps_that_were_edited(dfgn_argv, tiny_dfgn, tmp_path, monkeypatch):
    plain = train.DFGNStage.collate
    monkeypatch.setattr(train.DFGNStage, "collate", lambda *a: {k: v * torch.nan if k == "z0" else v for k, v in plain(*a).items()})
    with pytest.raises(UserError, match="not finite at step 0"):
        run_train(*dfgn_argv, "--steps", 1, "--out", tmp_path / "run")
    step = torch.load(tmp_path / "run/bad-step-000000.pt", weights_only=True)
    cases = [("step", "0", "step is str"), ("train", {}, "missing"), ("train stage", "gan", "--stage gan"), ("train lr", "x", "train.lr is str"), ("model", {}, "not a step|not of this version|not the weights"),
             ("net", {}, "more layers|not the weights"), ("batch t", torch.zeros(1), "not equally many"), ("batch noise", torch.zeros(len(step["samples"]), 1), "cannot be computed here"),
             ("batch z0", ..., "cannot be computed here"), ("samples", [], "not equally many"), ("samples", [{}] * len(step["samples"]), "samples.0: missing"), ("world", 0, "of no process"), ("batch z0", [], "not tensors alone"), ("more", 1, "unknown 1 .more")]
    for path, value, said in cases:
        torch.save(edited(step, path.split(), value), tmp_path / "bad.pt")
        with pytest.raises(UserError, match=said):
            run_train("--replay", tmp_path / "bad.pt")
    with pytest.raises(UserError, match="--replay .*state.pt: not a step that train.py kept .the file: missing"):
        run_train("--replay", tiny_dfgn / "state.pt")
