"""lib/metrics/judge.py, tools/train_judge.py: pairs across styles, who is recognised, what is read and refused."""
import numpy as np
import pytest
import torch

from lib.media.prepare import prepare
from lib.media.sources import draw_shape, split_of
from lib.media.vectors import JUDGING
from lib.metrics import judge
from lib.metrics.judge import Judge, JudgeExtractor, load_judge, same_sticker
from lib.nets.weights import read_metadata, save_model
from lib.run.files import UserError
from tools import train_judge

COLOURS = ("red", "orange", "gold", "green", "blue", "purple", "black", "pink")


def jobs():
    """Eight shapes in three styles: plain, turned, small. Of one concept there is one style alone."""
    for style, motion, u in (("noto", None, 0), ("twemoji", "spins", 0.1), ("fluent", "grows", 0.6)):
        for colour in COLOURS[:7 if style != "noto" else 8]:
            frames = draw_shape("star", colour, motion, u)[None]
            yield dict(file=f"{style}/{colour}", source=(frames, [100]), style=style,
                       caption=colour, keywords=[], concept=f"{colour} star", group="", split="train")


def nothing(frames):
    """Stands for data.key_table."""
    return {}


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    out = tmp_path_factory.mktemp("judge") / "set"
    prepare(out, 64, "test", jobs, nothing, workers=1)
    return out


def test_pairs_are_of_one_concept_in_two_styles_and_of_no_held_out_concept(drawings):
    found = train_judge.Drawings(drawings)
    concepts = [f"{colour} star" for colour in COLOURS]
    assert found.trained == sorted(c for c in concepts[:7] if split_of(c) == "train") and 0 < len(found.trained) < 8
    records, seen = found.stickers.records, set()
    for step in range(40):
        for a, b in found.draw(3, step, 128).T:
            assert records[a]["concept"] == records[b]["concept"] and records[a]["style"] != records[b]["style"]
            seen |= {(records[i]["concept"], records[i]["style"]) for i in (a, b)}
    assert seen == {(c, style) for c in found.trained for style in ("noto", "twemoji", "fluent")}
    assert np.array_equal(found.draw(3, 5, 4), train_judge.Drawings(drawings).draw(3, 5, 4))
    assert not np.array_equal(found.draw(3, 5, 4), found.draw(3, 6, 4))


def test_info_nce_by_hand():
    a = torch.eye(3)
    assert train_judge.info_nce(a, a, 0.5) == pytest.approx(-2 + np.log(np.e ** 2 + 2), abs=1e-5)
    assert train_judge.info_nce(a, a.roll(1, 0), 0.5) == pytest.approx(np.log(np.e ** 2 + 2), abs=1e-5)


def test_training_makes_a_judge_that_knows_shapes_of_other_styles(drawings, tmp_path, capsys):
    argv = ["--data", str(drawings), "--steps", "30", "--batch", "8", "--lr", "5e-4", "--out"]
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for file in files:
        train_judge.main([*argv, str(file)])
    train_judge.main([*argv, str(tmp_path / "bf16.safetensors"), "--precision", "bf16"])
    rounded = load_judge(tmp_path / "bf16.safetensors").state_dict()["out.weight"]
    net, again = map(load_judge, files)
    assert all(map(torch.equal, net.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(rounded, net.out.weight) and torch.allclose(rounded, net.out.weight, atol=0.05)
    assert net.concepts == sorted(f"{colour} star" for colour in COLOURS) and not net.training
    found, extractor = train_judge.Drawings(drawings), JudgeExtractor(files[0])
    fluent = [i for i, r in enumerate(found.stickers.records) if r["style"] == "fluent"]
    concepts = [found.stickers.records[i]["concept"] for i in fluent]
    rgba = found.pictures(fluent)[:, None]
    white = np.where(rgba[..., 3:] > 127, rgba[..., :3], 255).repeat(2, 1)                # clips of two equal frames
    embeddings = extractor(white)
    assert embeddings.shape == (7, 128) and np.allclose((embeddings ** 2).sum(1), 1, atol=1e-5)
    scores = extractor.scores(embeddings, concepts)
    assert set(scores) == {"Recog@1", "Recog@1 of 7"} and scores["Recog@1 of 7"].mean() >= 4 / 7      # chance: 1 / 7
    assert extractor.knows(["x", "red star"]) and not extractor.knows(["x"])
    assert "nearest of 8 concepts" in extractor.describe(8, 64) and "0.1250" in extractor.describe(8, 64)


def test_places_are_by_the_hands_that_are_named(drawings, tmp_path):
    argv = ["--data", str(drawings), "--steps", "1", "--batch", "4", "--out", str(tmp_path / "judge.safetensors")]
    train_judge.main([*argv, "--places", "fluent"])
    net, found = load_judge(tmp_path / "judge.safetensors"), train_judge.Drawings(drawings)
    assert net.concepts == sorted(f"{colour} star" for colour in COLOURS[:7])             # pink is Noto's alone
    numbers = [found.of[name]["fluent"][0] for name in net.concepts]
    assert torch.allclose(net.places, train_judge.embed(net, found, numbers), atol=1e-2)
    assert not torch.allclose(net.places, train_judge.embed(net, found, [n - 14 for n in numbers]), atol=1e-2)
    with pytest.raises(UserError, match="--places openmoji: .* has no drawing in such a style"):
        train_judge.main([*argv, "--places", "openmoji"])


def test_a_judge_goes_on_from_another(drawings, tmp_path):
    """All but the places, which are of the concepts and hands that are asked for."""
    files = [tmp_path / name for name in ("base.safetensors", "on.safetensors")]
    argv = ["--data", str(drawings), "--steps", "1", "--batch", "4", "--out"]
    train_judge.main([*argv, str(files[0]), "--places", "noto"])
    train_judge.main([*argv, str(files[1]), "--places", "fluent", "--base", str(files[0]), "--lr", "1e-9"])
    base, on = map(load_judge, files)
    assert all(torch.allclose(w, dict(on.named_parameters())[name], atol=1e-6) for name, w in base.named_parameters())
    assert (len(base.places), len(on.places)) == (8, 7)
    with pytest.raises(UserError, match="--base .*none: no such file"):
        train_judge.main([*argv, str(files[1]), "--base", str(tmp_path / "none")])


def test_the_other_shipped_judge_asks_hands_that_no_generator_sees():
    other = judge.SHIPPED.with_name("judge-ten.safetensors")
    for file in (judge.SHIPPED, other):
        net = load_judge(file)
        assert len(net.concepts) > 1300 and torch.allclose(net.places.float().norm(dim=1), torch.ones(1), atol=1e-2)
    assert set(read_metadata(other)["made_by"]["places"]) == set(JUDGING)


def test_who_is_recognised_by_hand():
    net = Judge(["cat", "dog", "owl"], width=2)
    net.places.copy_(torch.tensor([[1., 0.], [0., 1.], [-1., 0.]]))
    views = np.array([[0.9, 0.1], [0.2, 0.3], [-0.5, 0.6], [1.0, 0.0]])
    hits = net.recognised(views, ["cat", "owl", "owl", "eel"])
    assert hits[:3].tolist() == [1, 0, 0] and np.isnan(hits[3])               # eel: the judge does not know it
    assert net.recognised(views, ["cat", "owl", "owl", "dog"], ["owl", "cat", "eel"]).tolist() == [1, 0, 1, 0]


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"x")
    save_model(tmp_path / "y.safetensors", dict(a=torch.zeros(1)), kind="vae")
    for name, reason in (("x", "cannot be read"), ("y.safetensors", "not a file that tools/train_judge.py wrote"),
                         ("none", "no such file")):
        with pytest.raises(UserError, match=f"--judge .*{name}: {reason}"):
            load_judge(tmp_path / name)
    assert judge.SHIPPED.name == "judge.safetensors"


def test_same_sticker_by_hand():
    given = np.eye(4)
    unknown = np.array([[1, 0, 0, 0], [0.5, 0.8, 0, 0], [0, 0.6, 0.5, 0], [0.1, 0, 0, 0.1]])   # the third's: the second
    assert same_sticker(unknown, given).tolist() == [1, 1, 0, 1]
