"""Bad options and broken files: every script ends with one line on stderr and status 2, and writes over nothing."""
import importlib
import re
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.media.pictures import write_animation
from lib.nets.autoencoder import load_vae
from lib.nets.weights import save_model
from lib.run.files import run_cli


@pytest.fixture(scope="module")
def places(stickers16, tiny_vae, tiny_dfgn, tmp_path_factory):
    """A folder of copies and broken files, by the names that the table below writes in braces."""
    root = tmp_path_factory.mktemp("places")
    copies = dict(set=stickers16, cutset=stickers16, noset=stickers16, oldset=stickers16, vae=tiny_vae, run=tiny_dfgn,
                  norun=tiny_dfgn, damaged=tiny_dfgn)
    for name, source in copies.items():
        shutil.copytree(source, root / name)
    (root / "empty").mkdir(), (root / "stickers").mkdir()
    files = {"cut.safetensors": (root / "run/model.safetensors").read_bytes()[:-1], "text.bin": b"no weights",
             "cutset/frames-00000.bin": b"x", "noset/meta.json": b"{", "oldset/meta.json": b'{"version": 1}',
             "norun/config.json": b"{}", "damaged/state.pt": b"PK\3\4", "damaged/state.prev.pt": b"PK\3\4",
             "bad.webp": b"RIFF", "blank.txt": b"\n \n", "long.txt": b"star\n" * 2 ** 18, "none.jsonl": b"{}\n",
             "bad.jsonl": b'{"step": 1, "entropy": 0.5}\n{"step"\n', "list.jsonl": b"[1]\n",
             "up.jsonl": b'{"visual_path": "../x.gif", "eng_cap": "x"}\n', "stickers/captions.jsonl": b'{"file": 1}\n'}
    for name, content in files.items():
        (root / name).write_bytes(content)
    write_animation(root / "good.webp", np.full((3, 16, 16, 4), 200, np.uint8), [100] * 3)
    torch.save(dict(a=SimpleNamespace()), root / "code.bin")
    net, meta = load_vae(root / "vae/model.safetensors")
    save_model(root / "other.safetensors", net.state_dict(), **dict(meta, step=9, latents="other"))
    return root


GO_ON = "train --preset tiny --data {r}/set --vae {r}/vae/model.safetensors --batch 4 --warmup 2 --steps 7"
TRAIN = GO_ON + " --out {r}/new"
SAMPLE = "sample --model {r}/run/model.safetensors --out {r}/good.webp --prompt star"
EVALUATE = "evaluate --run {r}/run --data {r}/set --n 2"
SYNTHETIC, FOLDER = "data synthetic --out {r}/newset", "data folder --out {r}/newset"
VSD2M = "data vsd2m --root {r} --out {r}/newset"
PLOT = "curriculum --plot {r}/x.png"


def values(command, *options):
    """Cases whose message begins with the option as it was given."""
    return [(command, option, f"{option}: ") for option in options]


CASES = [                                        # (command, input, message)
    *values(TRAIN, "--stage gan", "--curriculum fast", "--how odd", "--lengths some", "--precision int8", "--steps 0",
            "--lr-schedule step", "--set dfgn.layers=0", "--set diffusion.beta_end=9", "--batch 0",
            "--save-every 0", "--seed -1", "--preset big", "--groups ghost",
            "--set dfgn.colour=1", "--set dfgn.layers=two", "--set vae.size=17"),
    (TRAIN, "--tasks t2v fly", "--tasks fly: choose from t2v"),
    *values(TRAIN, "--lr -0.5", "--lr nan", "--lr inf", "--warmup -1", "--grad-clip -0.5", "--ema 1.5",
            "--seed 99999999999", "--text-noise -0.5", "--text-noise nan"),
    (TRAIN, "--text-drop 0.9 --cond-drop 0.9", "--text-drop, --cond-drop and --both-drop: more than 1"),
    (TRAIN, "--out {r}/stickers", "--out .*stickers: holds other files .captions.jsonl"),
    (TRAIN, "--out {r}/blank.txt", "blank.txt: a file is in the way"),
    (TRAIN, "--base {r}/nowhere", "nowhere: no such model"),
    (TRAIN, "--data", "--data: name a prepared set"),
    (TRAIN, "--shortest 2", "--shortest 2: clips of fewer than 3 frames are padded"),
    (TRAIN, "--lengths sample --shortest 99", "no sticker of this split has 99 frames"),
    (TRAIN, "--preset tiny-base --set dfgn.temporal=still", "dfgn.temporal=still: .*--still-share 1"),
    (TRAIN, "--still-share -1", "--still-share -1.0: a share is 0 to 1"),
    (TRAIN, "--given-text-drop 0.9", "--given-text-drop, --other-text, --cond-drop and --both-drop: more than 1"),
    (TRAIN, "--other-text 0.4", "--given-text-drop, --other-text, --cond-drop and --both-drop: more than 1 in all"),
    (TRAIN, "--backwards 1.5", "--backwards 1.5: a share is 0 to 1"),
    (TRAIN, "--sample-every 5", "--sample-every and --prompts: give both"),
    (TRAIN, "--sample-every 5 --prompts {r}/blank.txt", "--prompts .*blank.txt: no captions in it"),
    (TRAIN, "--sample-every 5 --prompts {r}/long.txt", "long.txt: more than 1048576 bytes of captions"),
    (TRAIN, "--text-drop 1.5", "--text-drop 1.5: a share is 0 to 1"),
    (TRAIN, "--batch 3 --accumulate 2", "--batch 3: not a multiple of the 1 processes times --accumulate 2"),
    (TRAIN, "--stage vae --checkpointing", "--checkpointing: for the dfgn stage alone"),
    (TRAIN, "--stage vae --base x", "x: no such model; train one with"),
    (TRAIN, "--stage vae --base {r}/vae/model.safetensors --set vae.layers=2", "--base .*: trained with layers 1, the"),
    (TRAIN, "--clip-weights {r}/text.bin", "--clip-weights .*text.bin: .*it is small"),
    (TRAIN, "--set text.kind=open_clip", "--clip-weights : .*it is open_clip"),
    (TRAIN, "--preset mini", "--data .*set: 16 px, preset mini wants 64"),
    (TRAIN, "--data {r}/nowhere", "nowhere/meta.json: no prepared set"),
    (TRAIN, "--data {r}/noset", "noset/meta.json: corrupt"),
    (TRAIN, "--data {r}/cutset", "cutset: frames-00000.bin is of the wrong length"),
    (TRAIN, "--data {r}/oldset", "oldset/meta.json: of version 1"),
    (TRAIN, "--vae {r}/nowhere", "nowhere: no such model; train one with"),
    (TRAIN, "--vae {r}/run/model.safetensors", "holds 'dfgn', 'vae' is needed"),
    (TRAIN, "--vae {r}/text.bin", "text.bin: cannot be read as weights .*not a file that torch.save wrote"),
    (TRAIN, "--vae {r}/code.bin", "code.bin: .*could run code"),
    (TRAIN, "--base {r}/vae/model.safetensors", "holds 'vae', 'dfgn' is needed"),
    (TRAIN, "--base {r}/cut.safetensors", "not a readable .safetensors"),
    (TRAIN, "--base {r}/run/model.safetensors --set dfgn.temporal=conv3d", "--base .*: trained with temporal sti, the"),
    (GO_ON, "--out {r}/run --seed 5", "--seed 5: .*run was started with 0"),
    (GO_ON, "--out {r}/norun", "norun/config.json: missing or damaged"),
    (GO_ON, "--out {r}/damaged", "state.pt and state.prev.pt cannot be read"),

    *values(SAMPLE, "--num 0", "--steps 2000", "--eta 2.5", "--sheet x.jpg"),
    *values(SAMPLE, "--text-scale inf", "--image-scale nan"),
    (SAMPLE, "--prompt ''", "--prompt: empty"),
    ("sample", "--out {r}/good.webp", "--prompt: say what to draw"),
    (SAMPLE, "--out {r}/x.mp4", "x.mp4: write .webp, .gif or .png"),
    (SAMPLE, "--duration 70000 --out {r}/x.png", "--duration 70000: a frame of a .png file lasts at most 65535 ms"),
    (SAMPLE, "--task i2v", "--task i2v needs --image"),
    ("sample", "--task interpolation", "--task interpolation needs --frames"),
    (SAMPLE, "--task t2v --image {r}/good.webp", "--task t2v takes no --image"),
    (SAMPLE, "--image {r}/good.webp --frames {r}/good.webp", "--image and --frames: give one"),
    (SAMPLE, "--image {r}/bad.webp", "bad.webp: cannot be read as an image"),
    (SAMPLE, "--vae {r}/other.safetensors", "--vae .*other.safetensors: not the VAE that"),
    (SAMPLE, "--clip-weights {r}/text.bin", "has a text encoder; leave the option out"),

    *values(EVALUATE, "--n 1", "--steps 0", "--eta -0.5", "--image-scale inf", "--sheet x.gif"),
    (EVALUATE, "--run {r}/empty", "--run .*empty: no model.safetensors"),
    (EVALUATE, "--table 1", "--rows \"NAME=PATTERN\" ...: names the runs"),
    ("evaluate", "--table 1 --rows nothing", "--rows nothing: write"),
    ("evaluate", "--compare {r}/run {r}/empty", "--compare .*: config.json and eval.json"),
    (EVALUATE, "--i3d-eps 0.1", "--i3d-eps, --i3d-trust and --i3d-frames: name the weights"),
    (EVALUATE, "--i3d {r}/text.bin", "--i3d .*text.bin: cannot be read as weights"),
    (EVALUATE, "--dover {r}/code.bin", "--dover .*code.bin: .*could run code"),
    (EVALUATE, "--clip {r}/empty", "--clip .*empty: .*a folder without"),

    *values(SYNTHETIC, "--size 0", "--n 0", "--size 99999"),
    ("data synthetic --n 2", "--out ''", "--out : name the folder"),
    ("data synthetic --n 2", "--out /proc/x", "/proc/.x.lock: No such file"),
    ("data synthetic --n 2 --size 16", "--out {r}/set", "set exists and holds something else"),
    ("data long-tail --out {r}/newset", "{r}/nowhere", "nowhere/meta.json: no prepared set"),
    (FOLDER, "{r}/nowhere", "nowhere: no such folder"),
    (FOLDER, "{r}/empty", "no GIF, WebP, PNG or JPEG in it, but no file"),
    (FOLDER, "{r}/stickers", "captions.jsonl, line 1: needs \"file\" and \"caption\""),
    (VSD2M, "{r}/nowhere", "nowhere: no such file"),
    (VSD2M, "{r}/list.jsonl", "list.jsonl, line 1: not a JSON object"),
    (VSD2M, "{r}/up.jsonl", "up.jsonl, line 1: visual_path must be"),
    ("curriculum", "--plot {r}/x.txt", "--plot .*x.txt: a plot is a .png"),
    (PLOT, "--log {r}/bad.jsonl", "bad.jsonl, line 2: not JSON"),
    (PLOT, "--log {r}/none.jsonl", "none.jsonl: no line with a step")]


def content_of(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and not path.name.endswith("lock")}


@pytest.mark.parametrize("command, given, message", CASES, ids=[f"{c.split()[0]} {given}" for c, given, _ in CASES])
def test_bad_input(command, given, message, places, capsys, monkeypatch):
    monkeypatch.chdir(places / "empty")
    before = content_of(places)
    script, *argv = shlex.split(f"{command} {given}".format(r=places))
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: importlib.import_module(script).main(argv))
    *notes, last = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and re.match(f"error: .*({message})", last), last
    assert not any("error:" in note or "Traceback" in note for note in notes)
    assert content_of(places) == before
