"""lib/nets/peft.py: the compared methods begin as their base, train what they should alone, and travel as files."""
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import run_train

from lib.nets import peft
from lib.nets.text import END
from lib.nets.weights import identity, read_metadata, read_weights
from lib.run import loop
from lib.run.files import UserError
from model import PRESETS, RDTF, ClipContext, Config, load_rdtf
from sample import Sampler

BASE = replace(PRESETS["tiny-base"], text=replace(PRESETS["tiny-base"].text, vocab=600),
               vae=replace(PRESETS["tiny-base"].vae, size=32))              # 4 x 4 cells, and 2 x 2 in the middle
TUNED = [method for method in peft.METHODS if method != "full"]
GIVEN = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 1]])


def base_net():
    """A base whose zero layers are not zero, as after training."""
    torch.manual_seed(0)
    net = RDTF(BASE)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1) if p.dim() < 2 or not p.any() else None
    return net.eval()


def tuned(method, **options):
    net = base_net()
    peft.inject(net, method, rank=4, **options)
    return net.eval()


def inputs(T=4, given=GIVEN, real=None):
    g = torch.Generator().manual_seed(1)
    z0, noise = torch.randn(2, 2, 4, BASE.dfgn.channels, BASE.vae.side, BASE.vae.side, generator=g)[:, :, :T]
    mask = torch.ones(2, T) if real is None else real
    return dict(z0=z0, noise=noise.clone(), t=torch.tensor([300, 800]),
                text=torch.tensor([[5, 9, END], [7, 2, END]]), cond_mask=given[:, :T] * mask, loss_mask=mask)


def output(net, z_known=None, **of):
    """Prediction (2, T, c, h, w) at the noisy latents of `inputs`."""
    x = inputs(**of)
    z_t = net.diffusion.add_noise(x["z0"], x["noise"], x["t"])
    with torch.no_grad():
        return net.predict(z_t, x["t"], *net.encode_text(x["text"]), x["z0"] if z_known is None else z_known,
                           x["cond_mask"], x["loss_mask"])[0]


def without_temporal():
    net = base_net()
    peft.skip_temporal(net.dfgn)
    return net


def moved(net):
    """A network whose added parameters are no longer at their start."""
    torch.manual_seed(2)
    for name, p in net.named_parameters():
        if name in net.adapter:
            torch.nn.init.normal_(p, std=0.2)
    return net


# ---- the start
@pytest.mark.parametrize("method", ["full", "customize_a_video", "customize_a_video_st", "i2v_adapter",
                                    "appearance_lora"])
def test_the_start_is_the_base(method):
    """Both frozen: torch multiplies by a trained weight in another layout, and may round otherwise."""
    base = without_temporal() if method == "appearance_lora" else base_net()
    start, base = (output(net.requires_grad_(False)) for net in (tuned(method), base))
    torch.testing.assert_close(start, base, rtol=0, atol=0)


def test_simda_starts_as_the_base_on_clips_that_stand_still():
    nets, x = (tuned("simda"), without_temporal()), inputs()
    with torch.no_grad():
        for T in (1, 4):
            z = x["z0"][:, :1].expand(-1, T, -1, -1, -1)                 # frames that are all the first
            got = [net.predict(z, x["t"], *net.encode_text(x["text"]), z, torch.zeros(2, T), torch.ones(2, T))[0]
                   for net in nets]
            torch.testing.assert_close(*got, rtol=1e-4, atol=1e-5)
    assert (output(nets[0]) - output(nets[1])).abs().max() > 1e-3        # elsewhere the shift is seen


def test_a_base_of_stills_has_no_temporal_layers():
    """SimDA starts from it as from a base whose temporal layers are left out; the others have nothing to tune."""
    base = base_net()
    still = RDTF(replace(BASE, dfgn=replace(BASE.dfgn, temporal="still"))).eval()
    still.load_state_dict({name: w for name, w in base.state_dict().items() if "temporal" not in name})
    torch.testing.assert_close(output(still), output(without_temporal()), rtol=0, atol=0)
    peft.inject(still, "simda", rank=4)
    torch.testing.assert_close(output(still.eval()), output(tuned("simda")), rtol=0, atol=0)
    for method in (method for method in peft.METHODS if method != "simda"):
        with pytest.raises(ValueError, match="temporal=still. is for simda"):
            peft.inject(RDTF(replace(BASE, dfgn=replace(BASE.dfgn, temporal="still"))), method)


def test_a_base_is_needed():
    with pytest.raises(ValueError, match="known=false"):
        peft.inject(RDTF(PRESETS["tiny"]), "simda")


# ---- what is trained
BEFORE_ZEROS = tuple(f"{name}.{kind}" for kind in ("weight", "bias")
                     for name in ("attention.0", "feed_forward.0", "resnet.down", "resnet.conv"))
ZERO_AT_FIRST = {"i2v_adapter": "to_q.weight", "simda": BEFORE_ZEROS}  # ends of names; of LoRA: ".down"


@pytest.mark.parametrize("method", TUNED)
def test_all_that_is_trained_moves_and_nothing_else(method):
    net = tuned(method)
    optimizer = loop.make_optimizer(net, 1e-2, 0.5, False, {})
    named = {p: name for name, p in net.named_parameters()}
    assert {named[p] for group in optimizer.param_groups for p in group["params"]} == set(net.adapter)
    before, ema = {k: v.clone() for k, v in net.state_dict().items()}, loop.EMA(net, 0.9)
    for step in range(3):
        net(**inputs()).mean().backward()
        still = {name for name in net.adapter if not net.get_parameter(name).grad.any()}
        if step == 0:
            assert still == {name for name in net.adapter if name.endswith(ZERO_AT_FIRST.get(method, ".down"))}
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step)
    for weights in (net.state_dict(), ema.weights):
        assert {name for name, w in weights.items() if not torch.equal(w, before[name])} == set(net.adapter)
    left_out = method in ("simda", "appearance_lora")                    # the temporal layers
    of_base = [name for name in base_net().state_dict() if not (left_out and "temporal" in name)]
    assert len(net.state_dict()) == len(net.adapter) + len(of_base)


@pytest.mark.parametrize("method", TUNED)
def test_counts_are_those_of_the_formulas(method):
    net, w0, c, text = tuned(method), BASE.dfgn.widths[0], BASE.dfgn.channels, BASE.dfgn.text_width
    every, attended = peft.layers(net.dfgn)
    resnets = [getattr(layer.resnet, "base", layer.resnet).conv2.out_channels for layer in every]
    blocks = [getattr(layer.spatial, "base", layer.spatial).proj_in.in_features for layer in attended]
    inner = {w: w // BASE.dfgn.head_dim * BASE.dfgn.head_dim for w in {*blocks, w0}}
    condition = (c + 1) * 9 * w0 + w0

    def lora(width, context, rank=4):                                    # q, k, v, out
        return rank * (2 * (width + inner[width]) + 2 * (context + inner[width]))
    stem = BASE.dfgn.stem_heads * BASE.dfgn.head_dim
    temporal = sum(2 * 4 * 4 * (w + inner[w]) for w in map(inner.get, blocks)) + 2 * 4 * 4 * 2 * stem
    spatial = sum(lora(w, w) + lora(w, text) for w in blocks)
    want = {"i2v_adapter": sum(2 * d * d + d for d in blocks) + condition,
            "simda": sum(d * d + 2.5 * d for d in blocks) + sum(d * d + 3.5 * d for d in resnets) + condition,
            "appearance_lora": spatial, "customize_a_video": temporal + condition,
            "customize_a_video_st": spatial + temporal + condition}[method]
    assert sum(net.get_parameter(name).numel() for name in net.adapter) == want


def test_lora_merged_is_lora():
    torch.manual_seed(0)
    layer = peft.LoRA(torch.nn.Linear(8, 12), 3, parts=2)
    torch.nn.init.normal_(layer.up)
    x, merged = torch.randn(5, 8), torch.nn.Linear(8, 12)
    merged.weight.data, merged.bias.data = layer.base.weight + layer.change(), layer.base.bias
    torch.testing.assert_close(layer(x), merged(x))
    key = layer.up[0] @ layer.down[0]                                    # the first half is the key's alone
    torch.testing.assert_close(layer.change()[:6], key)


# ---- what a network does
@pytest.mark.parametrize("method", TUNED)
def test_padding_is_not_seen_and_checkpointing_changes_no_gradient(method):
    net = moved(tuned(method))
    real = torch.tensor([[1.0, 1, 0, 0]]).expand(2, -1)
    padded = output(net, given=torch.cat([GIVEN[:, :2], torch.ones(2, 2)], 1), real=real)
    torch.testing.assert_close(padded[:, :2], output(net, T=2), rtol=1e-4, atol=1e-4)
    gradients = []
    for net.dfgn.checkpointing in (False, True):
        net.zero_grad()
        net(**inputs()).mean().backward()
        gradients.append([net.get_parameter(name).grad.clone() for name in net.adapter])
    torch.testing.assert_close(*gradients)
    assert all(g.any() for g in gradients[0])


def test_i2v_adapter_reads_the_nearest_given_frame():
    masks = torch.tensor([[1, 0, 0, 0, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
    assert peft.nearest_given(masks).tolist() == [[0, 0, 0, 4, 4], [2] * 5, [0, 1, 2, 3, 4]]   # a tie: the earlier
    net, clip = moved(tuned("i2v_adapter")), ClipContext(torch.ones(2, 4), None, None, None)
    assert all("spatial" in name or "stem.condition" in name for name in net.adapter)
    layer = next(m for m in net.modules() if isinstance(m, peft.CrossFrame))
    h = torch.randn(8, 16, BASE.dfgn.widths[0], generator=torch.Generator().manual_seed(3))
    changed = h.clone()
    changed[2] += 1                                                      # nearest of the frames 2 and 3 of clip 0
    net.dfgn.stem.cond_mask = GIVEN
    with torch.no_grad():
        difference = (layer.branch(h, clip) - layer.branch(changed, clip)).abs().amax((1, 2))
    assert (difference > 1e-4).tolist() == [False, False, True, True] + [False] * 4


# ---- files
@pytest.fixture(scope="module")
def runs(tmp_path_factory, stickers16, tiny_vae):
    """{method: run folder}, and of their base."""
    root = tmp_path_factory.mktemp("peft")
    common = ["--preset", "tiny-base", "--data", str(stickers16), "--vae", str(tiny_vae / "model.safetensors"),
              "--precision", "float32", "--batch", "2", "--log-every", "1", "--lr", "1e-2"]
    found = {"base": root / "base"}
    run_train(*common, "--out", str(root / "base"), "--steps", "3", "--still-share", "0", "--tasks", "t2v")
    base = str(root / "base/model.safetensors")
    for method in peft.METHODS:
        share = "1" if method in peft.ON_STILLS else "0"
        absorber = ["--absorber", str(root / "appearance_lora/model.safetensors")] if method in peft.ON_CLIPS else []
        found[method] = root / method
        found["argv", method] = [*common, "--method", method, "--base", base, "--rank", "4", "--still-share", share,
                                 *absorber]
        run_train(*found["argv", method], "--steps", "3", "--out", str(root / method))
    return found


@pytest.mark.parametrize("method", peft.METHODS)
def test_a_file_and_its_base_are_the_trained_network(runs, method):
    path = runs[method] / "model.safetensors"
    state = torch.load(runs[method] / "state.pt", weights_only=True)
    net, meta = peft.load_tuned(path, load_rdtf)
    base, _ = peft.load_tuned(runs["base"] / "model.safetensors", load_rdtf)
    dropped = "spatial" if method == "customize_a_video" else "nothing"  # the first stage's LoRA
    of_state = {k.replace(".base.", "."): v for k, v in state["ema"].items()}
    for name, w in net.state_dict().items():
        if not (dropped in name and name.endswith((".down", ".up"))):
            assert torch.equal(w, of_state[name.replace(".base.", ".")])
    if method != "full":
        plain = {k.replace(".base.", "."): v for k, v in net.state_dict().items() if k not in net.adapter}
        assert all(torch.equal(w, base.state_dict()[name]) for name, w in plain.items())
        assert set(read_weights(path, "--model")) == set(net.adapter)
    assert meta["method"] == method and meta["base"] == identity(runs["base"] / "model.safetensors")
    keeps_first = method in ("appearance_lora", "customize_a_video_st")
    assert any("spatial" in name and name.endswith(".down") for name in net.adapter) == keeps_first
    clips = Sampler(path).sample(["a square"], [(0, 0)], steps=2)
    assert clips.shape == (1, 8, 16, 16, 4)


def test_the_second_stage_is_trained_beside_the_first_and_goes_on(runs, tmp_path):
    first = read_weights(runs["appearance_lora"] / "model.safetensors", "--absorber")
    second = torch.load(runs["customize_a_video"] / "state.pt", weights_only=True)["net"]
    assert all(torch.equal(second[name], w) for name, w in first.items())
    assert any(w.any() for name, w in first.items() if name.endswith(".up"))
    argv, part = [*runs["argv", "customize_a_video_st"], "--steps", "3", "--save-every", "2"], tmp_path / "part"
    run_train(*argv, "--out", str(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", part)
    (part / "state.prev.pt").replace(part / "state.pt")                  # of step 2
    run_train(*argv, "--out", str(part))
    whole, again = (read_weights(tmp_path / name / "model.safetensors", "--model") for name in ("whole", "part"))
    assert all(torch.equal(w, again[name]) for name, w in whole.items())
    assert read_metadata(part / "model.safetensors")["step"] == 3


def test_another_base_is_refused(runs, tmp_path):
    path, base = runs["simda"] / "model.safetensors", runs["base"] / "model.safetensors"
    held = base.replace(tmp_path / "base")
    try:
        with pytest.raises(UserError, match="which is not there; put the base at that place"):
            peft.load_tuned(path, load_rdtf)
        base.write_bytes(path.read_bytes())
        with pytest.raises(UserError, match="tunes another base than .*base.*, which has changed"):
            peft.load_tuned(path, load_rdtf)
    finally:
        held.replace(base)


@pytest.mark.parametrize("method, changes, message", [
    ("simda", ["--preset", "tiny"], "--method simda: tunes a base; name its --preset, such as base"),
    ("simda", ["--base", ""], "--method simda: name the model.safetensors that it tunes by --base"),
    ("simda", ["--method", "lora"], "--method lora: choose from rdtf, full, i2v_adapter"),
    ("simda", ["--absorber", "x"], "--absorber x: a run of appearance_lora, which customize_a_video and"),
    ("customize_a_video", ["--absorber", ""], "--absorber : a run of appearance_lora, which customize_a_video and"),
    ("customize_a_video", ["--still-share", "0.5"], "attention over one frame learns nothing; give --still-share 0"),
    ("appearance_lora", ["--still-share", "0.5"], "trained on single frames alone; give --still-share 1"),
    ("customize_a_video", ["--rank", "3"], "appearance_lora of rank 4; appearance_lora of --rank 3 on the same --base"),
    ("i2v_adapter", ["--set", "dfgn.temporal=still"], "--method i2v_adapter: has temporal layers to tune; a base of"),
    ("simda", ["--rank", "0"], "--rank 0: must be at least 1")])
def test_what_does_not_go_together_is_refused(runs, tmp_path, method, changes, message):
    with pytest.raises(UserError) as error:
        run_train(*runs["argv", method], *changes, "--out", str(tmp_path / "run"))
    assert message in str(error.value) and not (tmp_path / "run").exists()


def test_presets_of_the_bases():
    """1.3 times the parameters of RDTF, as the paper's compared models have about 1.2 to 1.4 times."""
    for name, of in (("base", "mini"), ("paper-base", "paper")):
        with torch.device("meta"):
            counts = [sum(p.numel() for p in RDTF(PRESETS[n]).dfgn.parameters()) for n in (name, of)]
        assert 1.25 < counts[0] / counts[1] < 1.35
    assert Config.from_dict(PRESETS["base"].to_dict()) == PRESETS["base"]
