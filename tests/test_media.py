"""lib/media/pictures.py: animations written and read back, files that are refused, sheets, platforms, tensors."""
import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from test_animation import CASES

from lib.media import pictures, writing
from lib.run.files import UserError

RED, GREEN, BLUE = (255, 0, 0, 255), (0, 255, 0, 255), (0, 0, 255, 255)
NOISE = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 4), np.uint8)


def moving_square(n=6, size=(20, 30)):
    frames = np.zeros((n, *size, 4), np.uint8)
    for i in range(n):
        frames[i, 4:12, 2 * i:2 * i + 8] = (200, 30, 60, 255)
    return frames


def black_dots(width, height, n):
    """A GIF of n pictures of one pixel on a large canvas."""
    dot = b"!\xf9\x04\0\x0a\0\0\0" + struct.pack("<c4HB", b",", 0, 0, 1, 1, 0) + b"\x07\x03\x80\0\x81\0"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 1, 0) + n * dot + b";"


def test_thinning_keeps_the_total_duration_and_the_asked_frames(tmp_path):
    whole = moving_square(10, (20, 40))
    pictures.write_animation(tmp_path / "a.webp", whole, list(range(10, 110, 10)))
    frames, times = pictures.read_animation(tmp_path / "a.webp", max_frames=4)
    assert times == [10 + 20, 30 + 40 + 50, 60 + 70, 80 + 90 + 100] and np.array_equal(frames, whole[[0, 2, 5, 7]])
    chosen = pictures.thin(50, 24, (7, 33, 49, 99))
    assert chosen == sorted(set(chosen)) and len(chosen) == 24 and {7, 33, 49} <= set(chosen) <= set(range(50))
    assert pictures.durations_of_kept([10, 20, 30, 40], [1, 3]) == [10 + 20 + 30, 40]
    assert len(pictures.thin(90, 24, range(60))) == 24 and pictures.thin(5, 24) == list(range(5))


def test_square_pads_in_the_middle_and_has_no_dark_fringe():
    frames = np.zeros((1, 40, 80, 4), np.uint8)
    frames[:, :, :37] = RED
    small = pictures.square(frames, 16)[0]
    assert small.shape == (16, 16, 4) and not small[[0, 1, 2, -3, -2, -1], :, 3].any() and small[8, 2, 3] == 255
    soft = (small[..., 3] > 8) & (small[..., 3] < 255)
    assert soft.any() and (small[soft][:, 0] > 245).all()             # a half-covered pixel is still red


@pytest.mark.parametrize("content, words", [
    (b"not an image", "no GIF, WebP, PNG or JPEG"), (bytes(pictures.MAX_BYTES + 1), "more than"),
    (black_dots(20000, 20000, 1), "20000x20000"), (black_dots(3, 3, 1)[:-4], "cannot be read"),
    (black_dots(3, 3, 0), "no picture"), (black_dots(5000, 3, 1), "5000x3"), (black_dots(1, 1, 2001), "2001 frames"),
    (black_dots(4000, 4000, 70), "70 frames")], ids=range(8))
def test_unreadable_and_oversized_files_are_refused(content, words):
    with pytest.raises(UserError, match="^<bytes>: .*" + words):
        pictures.read_animation(content)


def test_pipes_devices_and_huge_files_are_refused_before_they_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.gif")
    (tmp_path / "huge.gif").touch()
    os.truncate(tmp_path / "huge.gif", pictures.MAX_BYTES + 1)
    for source, reason in ((tmp_path / "pipe.gif", "no regular file"), ("/dev/zero", "no regular file"),
                           ("a\0b", "null byte"), (tmp_path / "huge.gif", "more than"), ("gone.webp", "No such")):
        with pytest.raises(UserError, match=f"^{source}: cannot be read as an image .*{reason}"):
            pictures.read_animation(source)


@pytest.mark.parametrize("extension", ["gif", "webp", "png"])
def test_round_trip(tmp_path, extension):
    path, frames, durations = tmp_path / f"a.{extension}", moving_square(6, (21, 33)), [100, 50, 40, 30, 70, 20]
    pictures.write_animation(path, frames, durations)
    back, times = pictures.read_animation(path)
    assert np.array_equal(back * (back[..., 3:] > 0), frames) and times == durations
    frames[3] = frames[2]                                             # equal neighbours are merged
    pictures.write_animation(path, frames, durations)
    back, times = pictures.read_animation(path)
    assert sum(times) == sum(durations) and tuple(back[-1][6, 11]) == tuple(frames[5][6, 11])
    pictures.write_animation(path, frames[:1], [70])
    assert len(pictures.read_animation(path)[0]) == getattr(Image.open(path), "n_frames", 1) == 1
    with pytest.raises(UserError, match="a.mp4: unknown animation type"):
        pictures.write_animation("a.mp4", frames, 100)


def test_webp_whose_boxes_are_all_opaque_stays_transparent_around(tmp_path):
    frames = moving_square(3)                                         # libwebp crops to it and omits the alpha flag
    pictures.write_animation(tmp_path / "a.webp", frames, 50)
    content = bytearray((tmp_path / "a.webp").read_bytes())
    assert content[20] & 16                                           # for other viewers
    content[20] &= ~16                                                # as other programs write it
    assert np.array_equal(pictures.read_animation(bytes(content))[0][..., 3], frames[..., 3])


def test_gif_alpha_is_cut_at_half_and_many_colours_survive(tmp_path):
    pictures.write_animation(tmp_path / "a.gif", NOISE, 100)
    back, opaque = pictures.read_animation(tmp_path / "a.gif")[0], NOISE[..., 3] >= 128
    assert np.array_equal(back[..., 3] == 255, opaque) and sum(pictures.gif_durations([33] * 30)) == 990
    assert np.abs(back[opaque][:, :3].astype(int) - NOISE[opaque][:, :3]).mean() < 25


def test_a_gif_with_room_for_all_colours_keeps_them(tmp_path):
    """255 greys and near blues, one step apart, and transparent ones."""
    frames = np.zeros((2, 16, 16, 4), np.uint8)
    frames[..., 3] = 255
    frames[0, ..., :3] = np.arange(256).reshape(16, 16, 1) // 2
    frames[1, ..., 2], frames[1, ..., 1] = np.arange(256).reshape(16, 16), 7
    frames[:, 15, 15, 3] = 0
    pictures.write_animation(tmp_path / "a.gif", frames, 50)
    back = pictures.read_animation(tmp_path / "a.gif")[0]
    assert np.array_equal(back * (back[..., 3:] > 0), frames * (frames[..., 3:] > 0))


def test_words_of_the_program_are_no_reasons():
    """Damage that makes Python stumble, and a JPEG of more passes over the picture than anybody needs."""
    png = (CASES / "r9_rgba16.png").read_bytes()
    header = png[16:29]
    short = png[:8] + struct.pack(">I4s", 5, b"IHDR") + header[:5]
    short += struct.pack(">I", zlib.crc32(b"IHDR" + header[:5])) + png[33:]
    with pytest.raises(UserError, match=r"cannot be read as an image \(damaged\)"):
        pictures.read_animation(short)
    Image.new("RGB", (8, 8)).save(file := io.BytesIO(), "JPEG")
    with pytest.raises(UserError, match="a JPEG of 602 scans; at most 500 can be read"):
        pictures.read_animation(file.getvalue() + b"\xff\xda" * 601)


@pytest.mark.parametrize("platform, kind, side, limit, seconds", [
    ("whatsapp", "WEBP", 512, 450_000, 10), ("signal", "PNG", 512, 300_000, 3), ("discord", "PNG", 320, 512_000, 5)])
def test_platforms(platform, kind, side, limit, seconds, monkeypatch):
    content, sentence = writing.encode_for(moving_square(4, (30, 30)), 2000, platform)
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.size, image.mode, image.info["loop"]) == (kind, (side, side), "RGBA", 0)
    frames, durations = pictures.read_animation(content)
    assert len(content) <= limit and platform in sentence and sum(durations) == 1000 * min(seconds, 8)
    assert not frames[:, :side // 10, :side // 10, 3].any() and frames[0, side // 4, side // 8, 3] > 250

    def size(limit):
        rules = writing.PLATFORMS[platform]
        monkeypatch.setitem(writing.PLATFORMS, platform, rules._replace(side=64, most_bytes=limit))
        return len(writing.encode_for(NOISE[:, :16, :16], 100, platform)[0])
    smaller = int(0.6 * size(10**9))
    assert size(smaller) <= smaller                                   # quality falls until it fits
    with pytest.raises(UserError, match=f"--for {platform}: the clip does not fit"):
        size(100)


def test_few_colours_tear_no_holes_and_fill_no_ground():
    """A speckled sticker with faint pixels around it, too large for Signal at full quality."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:64, :64] - 31.5
    frames = rng.integers(150, 250, (8, 64, 64, 4), np.uint8)
    disc, far = np.hypot(x, y) < 24, np.hypot(x, y) > 28
    frames[..., 3] = np.where(disc, 255, rng.integers(0, 6, (8, 64, 64)))
    made = pictures.read_animation(writing.encode_for(frames, 125, "signal")[0])[0]
    inner, outer = (np.kron(part, np.ones((8, 8))) > 0 for part in (np.hypot(x, y) < 21, far))
    assert made[:, inner, 3].min() == 255 and not made[:, outer, 3].any()
    large = [Image.fromarray(f[..., :3]).resize((512, 512), Image.Resampling.BICUBIC) for f in frames]
    assert np.abs(made[:, inner, :3].astype(int) - np.stack(large)[:, inner]).mean() < 12


def strict_gif(content):
    """(images, hundredths of a second in all) of a GIF read block by block; any byte out of place is an error."""
    assert content[:6] == b"GIF89a" and content.count(b"GIF89a") == 1
    at, images, time = 13 + (3 * 2 ** ((content[10] & 7) + 1) if content[10] & 0x80 else 0), 0, 0
    while content[at] != 0x3B:
        assert content[at] in (0x21, 0x2C)
        if content[at] == 0x2C:
            images, at = images + 1, at + 11 + (3 * 2 ** ((content[at + 9] & 7) + 1) if content[at + 9] & 0x80 else 0)
        else:
            time += int.from_bytes(content[at + 4:at + 6], "little") if content[at + 1] == 0xF9 else 0
            at += 2
        while content[at]:
            at += 1 + content[at]
        at += 1
    assert at == len(content) - 1
    return images, time


def plain(colour):
    return np.tile(np.array(colour, np.uint8), (9, 9, 1))


def test_gifs_whose_frames_are_empty_or_equal(tmp_path):
    blinks, durations = pictures.read_animation(CASES / "blinks.webp")
    full, empty = plain(RED), plain((0, 0, 0, 0))
    for frames in (blinks, np.stack([empty, full, empty]), np.stack([full] * 3), np.stack([empty] * 2)):
        pictures.write_animation(tmp_path / "a.gif", frames, durations[0])
        content = (tmp_path / "a.gif").read_bytes()
        back, times = pictures.read_animation(content)
        images, time = strict_gif(content)
        assert images == len(frames) == len(back) and abs(10 * time - durations[0] * len(frames)) <= 5
        assert sum(times) == 10 * time and np.array_equal(back[..., 3], np.where(frames[..., 3] < 128, 0, 255))


def test_a_finished_file_obeys_its_platform():
    still = np.stack([plain(RED)] * 4)
    with pytest.raises(UserError, match="--for whatsapp: it takes animations, and this clip stands still"):
        writing.encode_for(still, 100, "whatsapp")
    assert "discord" in writing.encode_for(still, 100, "discord")[1]
    for platform, duration, wanted in (("discord", 1000, 625), ("whatsapp", 5, 8), ("signal", 5000, 375)):
        content, _ = writing.encode_for(moving_square(8), duration, platform)
        assert pictures.read_animation(content)[1] == [wanted] * 8


def test_contact_sheet(tmp_path):
    rows = [np.full((8, 16, 16, 4), (90, 90, 90, 255), np.uint8), np.zeros((3, 16, 16, 4), np.uint8)]
    marks = [[True] + [False] * 7, [False] * 3]
    pictures.contact_sheet(rows, tmp_path / "s.png", ["long label " * 30, "絵文字"], 2, marks)
    sheet = np.array(Image.open(tmp_path / "s.png"))
    assert sheet.shape == (4 + 2 * (32 + 14 + 4), 4 + 8 * (32 + 4), 3)
    assert tuple(sheet[30, 30]) == (90, 90, 90) and tuple(sheet[80, 20]) == (255, 255, 255)    # transparent is white
    blue = (sheet == (0, 0, 255)).all(-1)
    assert blue[18:52, 2:4].any() and not blue[:, 40:].any()


def test_premultiplied_tensors_come_back_exactly():
    rgba = NOISE[:, :30] | np.array([0, 0, 0, 0xC0], np.uint8)        # of low alpha, colours cannot be told exactly
    x = pictures.to_tensor(rgba)
    assert x.shape == (3, 4, 30, 40) and x.dtype == torch.float32 and x.min() >= -1 and x.max() <= 1
    assert np.array_equal(pictures.to_rgba(x), rgba) and np.array_equal(pictures.to_rgba(x.numpy()), rgba)
    assert pictures.premultiply(np.array([200, 100, 50, 0], np.uint8)).tolist() == [-1, -1, -1, -1]
    assert pictures.to_rgba(torch.tensor([3.0, 0, -3, 1]).view(4, 1, 1)).tolist() == [[[255, 128, 0, 255]]]
    assert pictures.to_rgba(torch.ones(3, 1, 1)).tolist() == [[[255, 255, 255, 255]]]             # no alpha: opaque
    assert pictures.to_rgba(torch.tensor([1.0, 1, 1, 0]).view(4, 1, 1)).tolist() == [[[255, 255, 255, 128]]]
