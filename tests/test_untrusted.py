"""Files from others are data: bad ones are refused with the reason, whoever reads them; code in them is not run, nothing is written over."""
import copy
import json
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import evaluate
import metrics
import train
from conftest import run_train
from data import UserError
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


def clip_of(path):
    metrics.CLIPRows(str(path), "RN50")          # small to build


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
               "--replay": lambda: run_train("--replay", bad), "neither state.pt nor state.prev.pt": lambda: resumed([*dfgn_argv, "--steps", 7], run, bad)}
    said = dict(pickle="objects too, which could run code", legacy="objects too, which could run code",
                script="TorchScript", bomb="holds less than it says", cut="cannot be read|not a step", none="no weights|holds nothing")[kind]
    for option, read in readers.items():
        with pytest.raises(UserError, match=f"{option}" if "state" in option else f"{option} .*({said})"):
            read()
    assert not canary.exists() and not (tmp_path / "other").exists()
    assert {p.name: p.read_bytes() for p in run.iterdir() if "state" not in p.name} == before
    assert {(run / name).read_bytes() for name in ("state.pt", "state.prev.pt")} == {bad.read_bytes()}


def test_the_canary_sings(tmp_path):
    """Without weights_only the payloads of this file would run."""
    CODE["pickle"](tmp_path / "w", tmp_path / "canary")
    torch.load(tmp_path / "w", weights_only=False)
    assert (tmp_path / "canary").exists()
