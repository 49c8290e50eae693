"""Bad options and broken files: every script ends with one line on stderr and status 2, and writes over nothing."""
import importlib
import json
import re
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.files import run_cli
from lib.media import write_animation


@pytest.fixture(scope="module")
def places(stickers16, tiny_vae, tiny_dfgn, tmp_path_factory):
    """A folder of copies and broken files, by the names that the table below writes in braces."""
    root = tmp_path_factory.mktemp("places")
    for name, source in dict(set=stickers16, vae=tiny_vae, run=tiny_dfgn).items():
        shutil.copytree(source, root / name)
    model = (root / "run/model.safetensors").read_bytes()
    write_animation(root / "good.webp", np.full((3, 16, 16, 4), 200, np.uint8), [100] * 3)
    (root / "empty").mkdir(), (root / "stickers").mkdir()
    shutil.copy(root / "good.webp", root / "stickers")
    files = {"cut.safetensors": model[:-1], "text.bin": b"no weights", "blank.txt": b"\n \n", "bad.webp": b"RIFF",
             "long.txt": b"x" * 2 ** 21, "bad.jsonl": b'{"step": 1, "entropy": 0.5}\n{"step"\n', "none.jsonl": b"{}\n",
             "list.jsonl": b"[1]\n", "up.jsonl": b'{"visual_path": "../x.gif", "eng_cap": "x"}\n',
             "stickers/captions.jsonl": b'{"file": 1}\n'}
    for name, content in files.items():
        (root / name).write_bytes(content)
    torch.save(dict(a=SimpleNamespace()), root / "code.bin")
    for name, edit in dict(otherrun=lambda c: c["train"].update(lr=1.0), norun=lambda c: c.clear()).items():
        shutil.copytree(root / "run", root / name)
        config = json.loads((root / name / "config.json").read_text())
        edit(config)
        (root / name / "config.json").write_text(json.dumps(config))
    shutil.copytree(root / "run", root / "damaged")
    for name in ("state.pt", "state.prev.pt"):
        (root / "damaged" / name).write_bytes(b"PK\3\4")
    for name, file, content in (("cutset", "frames", b"x"), ("noset", "meta.json", b"{"),
                                ("oldset", "meta.json", b'{"version": 1}')):
        shutil.copytree(root / "set", root / name)
        path = next(p for p in sorted((root / name).rglob("*")) if p.is_file() and file in p.name)
        path.write_bytes(content)
    return root


TRAIN = "--preset tiny --data {r}/set --vae {r}/vae/model.safetensors --out {r}/new --batch 4 --steps 2 "
SAME_RUN = "--preset tiny --data {r}/set --vae {r}/vae/model.safetensors --batch 4 --warmup 2 --steps 7 "
SAMPLE = "--model {r}/run/model.safetensors --out {r}/good.webp --prompt star "
EVALUATE = "--run {r}/run --data {r}/set --n 2 "

CASES = [
    # train.py: words, numbers, options that do not go together
    ("train", TRAIN + "--stage gan", "--stage gan: choose from"),
    ("train", TRAIN + "--curriculum fast", "--curriculum fast"),
    ("train", TRAIN + "--tasks t2v fly", "--tasks fly: choose from t2v"), ("train", TRAIN + "--how odd", "--how odd"),
    ("train", TRAIN + "--frames some", "--frames some"), ("train", TRAIN + "--precision int8", "--precision int8"),
    ("train", TRAIN + "--batch 0", "--batch 0: must be at least 1"), ("train", TRAIN + "--steps 0", "--steps 0"),
    ("train", TRAIN + "--seed -1", "--seed -1"),
    ("train", TRAIN + "--text-drop 1.5", "--text-drop 1.5: a share is 0 to 1"),
    ("train", TRAIN + "--batch 3 --accumulate 2", "--batch 3: not a multiple"),
    ("train", TRAIN + "--preset big", "--preset big"),
    ("train", TRAIN + "--stage vae --checkpointing", "--checkpointing: for the dfgn stage"),
    ("train", TRAIN + "--groups ghost", "--groups ghost"),
    ("train", TRAIN + "--clip-weights {r}/text.bin", "--clip-weights"),
    ("train", TRAIN + "--set dfgn.colour=1", "--set dfgn.colour=1"),
    ("train", TRAIN + "--set dfgn.layers=two", "--set"),
    ("train", TRAIN + "--set text.kind=open_clip", "--clip-weights"),
    ("train", TRAIN + "--set vae.size=17", "vae.size|--set"),
    # train.py: files
    ("train", TRAIN + "--data {r}/nowhere", "nowhere/meta.json: no prepared set"),
    ("train", TRAIN + "--data {r}/noset", "noset"),
    ("train", TRAIN + "--data {r}/cutset", "cutset"), ("train", TRAIN + "--data {r}/oldset", "oldset"),
    ("train", TRAIN + "--vae {r}/nowhere", "nowhere: no such model; train one with"),
    ("train", TRAIN + "--vae {r}/run/model.safetensors", "holds 'dfgn', 'vae' is needed"),
    ("train", TRAIN + "--vae {r}/cut.safetensors", "cut.safetensors: cannot be read as weights"),
    ("train", TRAIN + "--vae {r}/text.bin", "text.bin: cannot be read as weights"),
    ("train", TRAIN + "--vae {r}/code.bin", "code.bin: .*could run code"),
    ("train", TRAIN + "--base {r}/vae/model.safetensors", "holds 'vae', 'dfgn' is needed"),
    ("train", TRAIN + "--base {r}/cut.safetensors", "not a readable .safetensors"),
    ("train", SAME_RUN + "--out {r}/otherrun", "--lr 0.001: .*was started with 1.0"),
    ("train", SAME_RUN + "--out {r}/run --seed 5", "--seed 5: .*run was started with 0"),
    ("train", SAME_RUN + "--out {r}/norun", "norun/config.json: missing or damaged"),
    ("train", SAME_RUN + "--out {r}/damaged", "state.pt and state.prev.pt cannot be read"),
    ("train", SAME_RUN + "--out {r}/vae", "was started with"),
    # sample.py
    ("sample", SAMPLE + "--num 0", "--num 0"), ("sample", SAMPLE + "--steps 2000", "--steps 2000"),
    ("sample", SAMPLE + "--eta 2", "--eta 2"),
    ("sample", SAMPLE + "--out {r}/x.mp4", "x.mp4: write .webp, .gif or .png"),
    ("sample", SAMPLE + "--sheet {r}/x.jpg", "--sheet .*x.jpg"),
    ("sample", SAMPLE + "--task i2v", "--task i2v needs --image"),
    ("sample", SAMPLE + "--prompt ''", "--prompt: empty"),
    ("sample", "--out {r}/good.webp", "--prompt: say what to draw"),
    ("sample", SAMPLE + "--task t2v --image {r}/good.webp", "--task t2v takes no --image"),
    ("sample", SAMPLE + "--image {r}/good.webp --frames {r}/good.webp", "--image and --frames: give one"),
    ("sample", SAMPLE + "--image {r}/nowhere.png", "nowhere.png: cannot be read as an image"),
    ("sample", SAMPLE + "--image {r}/bad.webp", "bad.webp: cannot be read as an image"),
    ("sample", SAMPLE + "--model {r}/nowhere", "nowhere: no such model; train one with"),
    ("sample", SAMPLE + "--model {r}/cut.safetensors", "not a readable .safetensors"),
    ("sample", SAMPLE + "--model {r}/vae/model.safetensors", "holds 'vae', 'dfgn' is needed"),
    ("sample", SAMPLE + "--vae {r}/run/model.safetensors", "--vae .*: not the VAE that|holds 'dfgn'"),
    ("sample", SAMPLE + "--clip-weights {r}/text.bin", "has a text encoder; leave the option out"),
    # evaluate.py
    ("evaluate", EVALUATE + "--n 1", "--n 1"), ("evaluate", EVALUATE + "--steps 0", "--steps 0"),
    ("evaluate", EVALUATE + "--data {r}/nowhere", "nowhere/meta.json: no prepared set"),
    ("evaluate", EVALUATE + "--sheet x.gif", "--sheet x.gif"),
    ("evaluate", EVALUATE + "--run {r}/empty", "--run .*empty: no model.safetensors"),
    ("evaluate", EVALUATE + "--table 1", "--rows"), ("evaluate", "--rows a=b", "--rows"),
    ("evaluate", "--table 1 --rows nothing", "--rows nothing: write"),
    ("evaluate", "--prompts {r}/blank.txt", "--sheet"),
    ("evaluate", EVALUATE + "--prompts {r}/blank.txt --sheet {r}/x.png", "one caption a line"),
    ("evaluate", EVALUATE + "--prompts {r}/long.txt --sheet {r}/x.png", "long.txt, line 1: longer than"),
    ("evaluate", "--compare {r}/run {r}/empty", "--compare .*: .*eval.json"),
    ("evaluate", EVALUATE + "--i3d-eps 0.1", "--i3d-eps"),
    ("evaluate", EVALUATE + "--i3d {r}/text.bin", "--i3d .*text.bin"),
    ("evaluate", EVALUATE + "--dover {r}/code.bin", "--dover .*code.bin: .*could run code"),
    ("evaluate", EVALUATE + "--clip {r}/empty", "--clip .*empty: .*a folder without"),
    # data.py, curriculum.py
    ("data", "synthetic --size 0 --out {r}/newset", "--size 0: must be at least 1"),
    ("data", "synthetic --n 0 --out {r}/newset", "--n 0"),
    ("data", "synthetic --n 2 --size 16 --out {r}/set", "set exists and holds something else"),
    ("data", "folder {r}/nowhere --out {r}/newset", "nowhere: no such folder"),
    ("data", "folder {r}/empty --out {r}/newset", "stickers"),
    ("data", "folder {r}/stickers --out {r}/newset", "captions.jsonl, line 1: needs \"file\" and \"caption\""),
    ("data", "vsd2m {r}/nowhere --root {r} --out {r}/newset", "nowhere: no such file"),
    ("data", "vsd2m {r}/bad.jsonl --root {r} --out {r}/newset", "bad.jsonl, line "),
    ("data", "vsd2m {r}/list.jsonl --root {r} --out {r}/newset", "list.jsonl, line 1: not a JSON object"),
    ("data", "vsd2m {r}/up.jsonl --root {r} --out {r}/newset", "up.jsonl, line 1: visual_path must be"),
    ("curriculum", "--plot {r}/x.png --log {r}/nowhere", "nowhere: no such file"),
    ("curriculum", "--plot {r}/x.png --log {r}/bad.jsonl", "bad.jsonl, line 2: not JSON"),
    ("curriculum", "--plot {r}/x.png --log {r}/list.jsonl", "list.jsonl, line 1: not a JSON object"),
    ("curriculum", "--plot {r}/x.png --log {r}/none.jsonl", "none.jsonl: no line with a step")]


def content_of(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and not path.name.endswith("lock")}


@pytest.mark.parametrize("script, argv, message", CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_bad_input(script, argv, message, places, capsys, monkeypatch):
    monkeypatch.chdir(places / "empty")
    before = content_of(places)
    argv = [word.format(r=places) for word in shlex.split(argv)]
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: importlib.import_module(script).main(argv))
    *notes, last = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and re.match(f"error: .*({message})", last), last
    assert not any("error:" in note or "Traceback" in note for note in notes)
    assert content_of(places) == before
