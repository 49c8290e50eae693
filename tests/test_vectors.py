"""lib/media/vectors.py: emoji that are drawn by several hands, at any size, standing or moving."""
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from test_sources import archive, stills  # noqa: F401

import data
from lib.media import sources, vectors
from lib.run.files import UserError

BAR = '<path fill="#c82800" d="M28 16h8v32h-8z"/>'       # upright, of a square of 64


def hand(path, icons, **more):
    """A set's tarball -> its SHA-256."""
    content = json.dumps(dict(width=64, height=64, icons=icons, **more)).encode()
    return archive(path, [("package/icons.json", content)])


@pytest.fixture
def hands(stills, monkeypatch):  # noqa: F811
    """Packages of two hands where `npm pack` would put them; the labels are those of `stills`."""
    bodies = dict(noto={"waving-hand": BAR, "fire": "<path d=", "extra": BAR}, openmoji=dict(heart=BAR, fire=BAR))
    for style, of in bodies.items():
        icons = {name: dict(body=body) for name, body in of.items()}
        name, version, _ = vectors.HANDS[style]
        path = stills / f"{name.strip('@').replace('/', '-')}-{version}.tgz"
        monkeypatch.setitem(vectors.HANDS, style, (name, version, hand(path, icons)))
    return stills


def picture(icon, size, **how):
    return np.asarray(Image.open(io.BytesIO(vectors.draw(icon, size, **how))).convert("RGBA"))


def box(frame):
    rows, columns = np.nonzero(frame[..., 3] > 127)
    return rows.min(), rows.max() + 1, columns.min(), columns.max() + 1


def test_a_drawing_is_as_sharp_as_its_size():
    for size in (16, 64, 128):
        drawn = picture((0, 0, 64, 64, BAR), size)
        assert drawn.shape == (size, size, 4) and box(drawn) == tuple(size * k // 64 for k in (16, 48, 28, 36))
        assert set(np.unique(drawn[..., 3])) == {0, 255} and (drawn[drawn[..., 3] > 0][:, :3] == (200, 40, 0)).all()
    wide = picture((0, 16, 64, 32, BAR), 64)                             # not square: in the middle
    assert box(wide) == (16, 48, 28, 36)


def test_vectors_move_as_pictures_do():
    """Without their blur: the same boxes to a pixel."""
    icon = (0, 0, 64, 64, BAR)
    for motion, path in sources.STILL_MOTIONS.items():
        frames, durations = vectors.drawn(icon, 64, path)
        assert frames.shape == (8, 64, 64, 4) and durations == [100] * 8
        for a, b in zip(frames, sources.move(picture(icon, 64), motion)):
            assert np.abs(np.subtract(box(a), box(b))).max() <= 1
    assert np.abs(frames[2].astype(int) - frames[0]).max() > 100         # the last, sliding, moves


def test_names_of_sets_are_those_of_labels(tmp_path):
    icons = {"1st-place-medal": dict(body="a"), "pinata": dict(body="b", width=32, left=4),
             "keycap-hash": dict(body="c"), "waving-hand-dark-skin-tone": dict(body="d")}
    aliases = {"gold-medal": dict(parent="1st-place-medal"), "turned": dict(parent="pinata", hFlip=True)}
    hand(tmp_path / "set.tgz", icons, aliases=aliases)
    found = vectors.read_hand(tmp_path / "set.tgz")
    assert found[vectors.name_key("1st place medal")] == found["goldmedal"] == (0, 0, 64, 64, "a")
    assert found[vectors.name_key("piñata")] == (4, 0, 32, 64, "b") and "turned" not in found
    assert found[vectors.name_key("keycap: #")][4] == "c"
    assert found[vectors.name_key("waving hand: dark skin tone")][4] == "d"


@pytest.mark.parametrize("content", [b"no tar", None, b"[1]"])
def test_a_broken_set_is_said(tmp_path, content):
    path = tmp_path / "set.tgz"
    if content == b"no tar":
        path.write_bytes(content)
    else:
        with tarfile.open(path, "w:gz") as tar:
            info = tarfile.TarInfo("package/icons.json" if content else "package/other.json")
            info.size = len(content or b"")
            tar.addfile(info, io.BytesIO(content or b""))
    with pytest.raises(UserError, match="set.tgz: a broken set of icons .*remove it and fetch it again"):
        vectors.read_hand(path)


def test_styles_are_vectors_where_pictures_would_not_do(hands):
    """Noto's pictures have 64 px; above that, and moving, its vectors are drawn, whatever the other styles have."""
    def kinds(**options):
        return [(j["file"], j["caption"], "icon" in j) for j in sources.emoji_jobs("all", hands, **options)]
    assert ("noto/1f44b", "waving hand, noto style", False) in kinds(styles=["noto"])
    assert kinds(styles=["noto"], size=128) == [("noto/1f44b", "waving hand, noto style", True),
                                                ("noto/1f525", "fire, noto style", True)]
    (_, caption, vector), _ = kinds(styles=["noto"], moving=True)
    assert vector and caption.split()[2].strip(",") in sources.STILL_MOTIONS
    found = list(sources.emoji_jobs("fluent", hands, styles=["openmoji"]))
    assert [(j["file"], j["split"]) for j in found] == [("openmoji/1f525", "train"), ("openmoji/2764", "train")]
    assert not any(style in vectors.JUDGING for style in sources.STILLS)


def test_a_set_of_vectors(hands, tmp_path, capsys):
    """At the size asked for; what cannot be drawn is too much of two."""
    out = tmp_path / "set"
    data.main(["emoji", "--styles", "openmoji", "--size", "128", "--moving", "--out", str(out), "--workers", "1"])
    found = data.StickerSet(out)
    assert found.size == 128 and found.meta["licences"] == ["OpenMoji: CC-BY-SA-4.0"]
    assert {r["n"] for r in found.records} == {8} and {r["style"] for r in found.records} == {"openmoji"}
    with pytest.raises(UserError, match="cannot be drawn"):
        data.main(["emoji", "--styles", "noto", "--size", "128", "--out", str(tmp_path / "bad"), "--workers", "1"])
