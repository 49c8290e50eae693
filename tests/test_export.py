"""tools/export.py: half the bytes, nearly the same weights, read by everything that reads a model."""
import numpy as np
import pytest
import torch
from conftest import run_train
from safetensors.torch import load_file

from lib.nets.autoencoder import load_vae
from lib.nets.weights import identity, read_metadata, save_model
from lib.run.files import UserError
from model import load_rdtf
from sample import Sampler
from tools import export


def test_an_exported_model_samples_like_the_run(tiny_dfgn, tiny_vae, tmp_path):
    for run, name in ((tiny_dfgn, "net"), (tiny_vae, "vae")):
        export.main([str(run / "model.safetensors"), str(tmp_path / f"shared/{name}.safetensors")])
        whole, half = run / "model.safetensors", tmp_path / f"shared/{name}.safetensors"
        assert half.stat().st_size < 0.75 * whole.stat().st_size
    (a, meta), (b, same) = load_rdtf(tiny_dfgn / "model.safetensors"), load_rdtf(tmp_path / "shared/net.safetensors")
    assert meta == same and meta["vae"] == identity(tiny_vae / "model.safetensors")
    for (key, w), v in zip(a.state_dict().items(), b.state_dict().values()):
        assert w.dtype == v.dtype and torch.allclose(w, v, rtol=2 ** -8), key
        assert torch.equal(w, v) == (w.dim() < 2 or torch.equal(w, w.bfloat16().to(w.dtype))), key
    a, b = (load_vae(path)[0] for path in (tiny_vae / "model.safetensors", tmp_path / "shared/vae.safetensors"))
    assert torch.equal(a.latent_std, b.latent_std) and torch.equal(a.latent_mean, b.latent_mean)
    made = [Sampler(path, tiny_vae / "model.safetensors").sample(["star"], [(0, 0)], steps=3).astype(int)
            for path in (tiny_dfgn / "model.safetensors", tmp_path / "shared/net.safetensors")]
    assert 0 < np.abs(made[0] - made[1]).max() < 40


def test_how_it_is_sampled_can_be_chosen_later(tiny_dfgn, tiny_vae, tmp_path):
    export.main([str(tiny_dfgn / "model.safetensors"), str(tmp_path / "x.safetensors"),
                 "--set", "sampling.text_scale=2", "sampling.steps=9"])
    (_, before), (net, after) = load_rdtf(tiny_dfgn / "model.safetensors"), load_rdtf(tmp_path / "x.safetensors")
    assert (net.config.sampling.text_scale, net.config.sampling.steps) == (2.0, 9)
    del before["config"]["sampling"], after["config"]["sampling"]
    assert before == after
    for run, change, reason in ((tiny_dfgn, "dfgn.layers=3", "no field"), (tiny_dfgn, "sampling.order=3", "is unknown"),
                                (tiny_vae, "sampling.order=1", "holds no DFGN")):
        with pytest.raises(UserError, match=f"--set {change}: .*{reason}"):
            export.main([str(run / "model.safetensors"), str(tmp_path / "y.safetensors"), "--set", change])
    assert not (tmp_path / "y.safetensors").exists()


def test_the_mean_of_a_tuned_model_and_its_base(tiny_dfgn, tiny_vae, dfgn_argv, tmp_path):
    base, tuned = tiny_dfgn / "model.safetensors", tmp_path / "tuned/model.safetensors"
    mean = tmp_path / "mean.safetensors"
    run_train(*dfgn_argv, "--steps", 3, "--warmup", 0, "--base", base, "--out", tuned.parent)
    export.main([str(tuned), str(mean), "--average", str(base)])
    a, b, (c, meta) = (load_rdtf(path) for path in (base, tuned, mean))
    assert meta == b[1]
    a, b, c = a[0].state_dict(), b[0].state_dict(), c.state_dict()
    assert not torch.equal(a["dfgn.stem.conv.weight"], b["dfgn.stem.conv.weight"])
    for name, w in c.items():
        assert torch.allclose(w, (a[name] + b[name]) / 2 if w.is_floating_point() else b[name], rtol=2 ** -8), name
    for other in (tiny_vae / "model.safetensors", tmp_path / "words.safetensors"):
        words = load_file(base)
        words["text.vocabulary"] += 1                                            # other words of as many
        save_model(tmp_path / "words.safetensors", words, **read_metadata(base))
        with pytest.raises(UserError, match=f"--average .*{other.name}: not a model of the same layers, VAE and words"):
            export.main([str(tuned), str(tmp_path / "no.safetensors"), "--average", str(other)])
    assert not (tmp_path / "no.safetensors").exists()


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="x.safetensors: not a model.safetensors that train.py wrote"):
        export.main([str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors")])
    assert not (tmp_path / "y.safetensors").exists()
