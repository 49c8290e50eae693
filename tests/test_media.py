"""lib/media.py: animations made byte by byte and read, written and read back; sheets, platforms, tensors."""
import io
import itertools
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from lib import media
from lib.files import UserError

RED, GREEN, BLUE, NONE = (255, 0, 0, 255), (0, 255, 0, 255), (0, 0, 255, 255), (0, 0, 0, 0)
HALF, DOT = (0, 255, 0, 128), (0, 0, [[0]], 1, 1, None)
NOISE = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 4), np.uint8)


def moving_square(n=6, size=(20, 30)):
    frames = np.zeros((n, *size, 4), np.uint8)
    for i in range(n):
        frames[i, 4:12, 2 * i:2 * i + 8] = (200, 30, 60, 255)
    return frames


def gif_bytes(width, height, frames):
    """Palette: red, green, blue, black. Frames: (x, y, rows of colour numbers, centiseconds, disposal, transparent)."""
    palette = bytes([255, 0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0]) + bytes(3 * 124)
    out = b"GIF89a" + struct.pack("<HHBBB", width, height, 0xF6, 3, 0) + palette
    for x, y, rows, delay, disposal, transparent in frames:
        out += b"!\xf9\x04" + struct.pack("<BHBx", disposal << 2 | (transparent is not None), delay, transparent or 0)
        codes = bytes([0x80, *sum(rows, []), 0x81])                   # LZW codes stay 8 bits wide for 100 pixels
        out += b"," + struct.pack("<HHHHBBB", x, y, len(rows[0]), len(rows), 0, 7, len(codes)) + codes + b"\0"
    return out + b";"


def apng_bytes(size, frames, fallback=None):
    """RGBA. Frames: (x, y, array (h, w, 4), milliseconds, dispose, blend); fallback: a picture that is no frame."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    pixels = lambda array: zlib.compress(b"".join(b"\0" + row.tobytes() for row in array))
    out = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 6, 0, 0, 0))
    out += chunk(b"acTL", struct.pack(">II", len(frames), 0))
    out += chunk(b"IDAT", pixels(fallback)) if fallback is not None else b""
    number = itertools.count()
    for i, (x, y, array, ms, dispose, blend) in enumerate(frames):
        out += chunk(b"fcTL", struct.pack(">5I2H2B", next(number), *array.shape[1::-1], x, y, ms, 1000, dispose, blend))
        if i or fallback is not None:
            out += chunk(b"fdAT", struct.pack(">I", next(number)) + pixels(array))
        else:
            out += chunk(b"IDAT", pixels(array))
    return out + chunk(b"IEND", b"")


def plate(colour, height=4, width=4):
    return np.tile(np.array(colour, np.uint8), (height, width, 1))


def test_gif_offsets_disposal_and_transparency():
    full, dot = [[0] * 5] * 3, [[1, 1], [1, 3]]                       # 3 is transparent where the frame says so
    frames, durations = media.read_animation(gif_bytes(5, 3, [
        (0, 0, full, 7, 1, 3), (1, 1, dot, 0, 2, 3), (3, 0, [[2]], 20, 3, None), (0, 0, [[1]], 5, 1, 3)]))
    red, second, third, fourth = (plate(RED, 3, 5) for _ in range(4))
    second[1, 1:3], second[2, 1] = GREEN, GREEN                       # the transparent corner keeps red
    third[1:3, 1:3] = fourth[1:3, 1:3] = NONE                         # disposal 2 clears the frame's box
    third[0, 3] = BLUE
    fourth[0, 0] = GREEN                                              # disposal 3 took the blue dot back
    assert np.array_equal(frames * (frames[..., 3:] > 0), np.stack([red, second, third, fourth]))
    assert durations == [70, 100, 200, 50]                            # no duration: 100 ms
    frames, _ = media.read_animation(gif_bytes(3, 3, [                # disposed without a transparent colour
        (0, 0, [[0, 3, 3]] * 3, 10, 1, 3), (1, 1, [[1]], 10, 2, None), (0, 0, [[2]], 10, 1, 3)]))
    assert tuple(frames[1][1, 1]) == GREEN and frames[2][1, 1, 3] == 0


def test_apng_blending_disposal_and_fallback():
    frames, durations = media.read_animation(apng_bytes((4, 4), [
        (0, 0, plate(RED), 50, 0, 0), (1, 1, plate(HALF, 2, 2), 60, 0, 1), (0, 0, plate(HALF, 1, 1), 70, 1, 0),
        (3, 3, plate(BLUE, 1, 1), 80, 2, 1), (3, 0, plate(BLUE, 1, 1), 90, 0, 1)]))
    assert durations == [50, 60, 70, 80, 90]
    assert frames[1][1, 1].tolist() == [127, 128, 0, 255]             # over: mixed, still opaque
    assert tuple(frames[2][0, 0]) == HALF                             # source: replaced, alpha and all
    assert frames[3][0, 0, 3] == 0 and tuple(frames[3][3, 3]) == BLUE  # background disposal cleared it
    assert tuple(frames[4][3, 3]) == RED and tuple(frames[4][0, 3]) == BLUE   # previous disposal
    content = apng_bytes((4, 4), [(0, 0, plate(NONE), 50, 0, 0), (1, 1, plate(HALF, 2, 2), 50, 0, 1)])
    frames, _ = media.read_animation(content)
    assert tuple(frames[1][2, 2]) == HALF and frames[1][0, 0, 3] == 0  # over nothing: its alpha stays
    for first, blend in ((GREEN, 0), (HALF, 1)):                      # a fallback picture is no frame and no background
        content = apng_bytes((4, 4), [(0, 0, plate(first), 50, 0, blend), (0, 0, plate(BLUE), 60, 0, 0)], plate(RED))
        frames, durations = media.read_animation(content)
        assert [tuple(f[0, 0]) for f in frames] == [first, BLUE] and durations == [50, 60]


def test_thinning_keeps_the_total_duration_and_the_asked_frames(tmp_path):
    whole = moving_square(10, (20, 40))
    media.write_animation(tmp_path / "a.webp", whole, list(range(10, 110, 10)))
    frames, times = media.read_animation(tmp_path / "a.webp", max_frames=4)
    assert times == [10 + 20, 30 + 40 + 50, 60 + 70, 80 + 90 + 100] and np.array_equal(frames, whole[[0, 2, 5, 7]])
    chosen = media.thin(50, 24, (7, 33, 49, 99))
    assert chosen == sorted(set(chosen)) and len(chosen) == 24 and {7, 33, 49} <= set(chosen)
    assert len(media.thin(90, 24, range(60))) == 24 and media.thin(5, 24) == list(range(5))


def test_square_pads_in_the_middle_and_has_no_dark_fringe():
    frames = np.zeros((1, 40, 80, 4), np.uint8)
    frames[:, :, :37] = RED
    small = media.square(frames, 16)[0]
    assert small.shape == (16, 16, 4) and not small[[0, 1, 2, -3, -2, -1], :, 3].any() and small[8, 2, 3] == 255
    soft = (small[..., 3] > 8) & (small[..., 3] < 255)
    assert soft.any() and (small[soft][:, 0] > 245).all()             # a half-covered pixel is still red


@pytest.mark.parametrize("content, words", [
    (b"not an image", "no GIF, WebP, PNG or JPEG"), (bytes(media.MAX_BYTES + 1), "more than"),
    (gif_bytes(20000, 20000, [DOT]), "cannot be read"), (gif_bytes(3, 3, [DOT])[:400], "cannot be read"),
    (gif_bytes(5000, 3, [DOT]), "5000x3"), (gif_bytes(1, 1, [DOT] * 2001), "2001 frames"),
    (gif_bytes(4000, 4000, [DOT] * 70), "70 frames")], ids=range(7))
def test_unreadable_and_oversized_files_are_refused(content, words):
    with pytest.raises(UserError, match="^<bytes>: .*" + words):
        media.read_animation(content)


def test_pipes_devices_and_huge_files_are_refused_before_they_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.gif")
    (tmp_path / "huge.gif").touch()
    os.truncate(tmp_path / "huge.gif", media.MAX_BYTES + 1)
    for source, reason in ((tmp_path / "pipe.gif", "no regular file"), ("/dev/zero", "no regular file"),
                           ("a\0b", "null byte"), (tmp_path / "huge.gif", "more than"), ("gone.webp", "No such")):
        with pytest.raises(UserError, match=f"^{source}: cannot be read as an image .*{reason}"):
            media.read_animation(source)


@pytest.mark.parametrize("extension", ["gif", "webp", "png"])
def test_round_trip(tmp_path, extension):
    path, frames, durations = tmp_path / f"a.{extension}", moving_square(6, (21, 33)), [100, 50, 40, 30, 70, 20]
    media.write_animation(path, frames, durations)
    back, times = media.read_animation(path)
    assert np.array_equal(back * (back[..., 3:] > 0), frames) and times == durations
    frames[3] = frames[2]                                             # equal neighbours are merged
    media.write_animation(path, frames, durations)
    back, times = media.read_animation(path)
    assert sum(times) == sum(durations) and tuple(back[-1][6, 11]) == tuple(frames[5][6, 11])
    media.write_animation(path, frames[:1], [70])
    assert len(media.read_animation(path)[0]) == getattr(Image.open(path), "n_frames", 1) == 1
    with pytest.raises(UserError, match="a.mp4: unknown animation type"):
        media.write_animation("a.mp4", frames, 100)


def test_webp_whose_boxes_are_all_opaque_stays_transparent_around(tmp_path):
    frames = moving_square(3)                                         # libwebp crops to it and omits the alpha flag
    media.write_animation(tmp_path / "a.webp", frames, 50)
    content = bytearray((tmp_path / "a.webp").read_bytes())
    assert content[20] & 16                                           # for other viewers
    content[20] &= ~16                                                # as other programs write it
    assert np.array_equal(media.read_animation(bytes(content))[0][..., 3], frames[..., 3])


def test_gif_alpha_is_cut_at_half_and_many_colours_survive(tmp_path):
    media.write_animation(tmp_path / "a.gif", NOISE, 100)
    back, opaque = media.read_animation(tmp_path / "a.gif")[0], NOISE[..., 3] >= 128
    assert np.array_equal(back[..., 3] == 255, opaque) and sum(media.gif_durations([33] * 30)) == 990
    assert np.abs(back[opaque][:, :3].astype(int) - NOISE[opaque][:, :3]).mean() < 25


@pytest.mark.parametrize("platform, kind, side, limit, seconds", [
    ("whatsapp", "WEBP", 512, 450_000, 10), ("signal", "PNG", 512, 300_000, 3), ("discord", "PNG", 320, 512_000, 60)])
def test_platforms(platform, kind, side, limit, seconds, monkeypatch):
    content, sentence = media.encode_for(moving_square(4, (30, 30)), 2000, platform)
    with Image.open(io.BytesIO(content)) as image:
        assert (image.format, image.size, image.mode, image.info["loop"]) == (kind, (side, side), "RGBA", 0)
    frames, durations = media.read_animation(content)
    assert len(content) <= limit and platform in sentence and sum(durations) == 1000 * min(seconds, 8)
    assert not frames[:, :side // 10, :side // 10, 3].any() and frames[0, side // 4, side // 8, 3] > 250

    def size(limit):
        monkeypatch.setitem(media.PLATFORMS, platform, (media.PLATFORMS[platform][0], 64, limit, 3))
        return len(media.encode_for(NOISE[:, :16, :16], 100, platform)[0])
    smaller = int(0.6 * size(10**9))
    assert size(smaller) <= smaller                                   # quality falls until it fits
    with pytest.raises(UserError, match=f"--for {platform}: the clip does not fit"):
        size(100)


def test_contact_sheet(tmp_path):
    rows = [np.full((8, 16, 16, 4), (90, 90, 90, 255), np.uint8), np.zeros((3, 16, 16, 4), np.uint8)]
    marks = [[True] + [False] * 7, [False] * 3]
    media.contact_sheet(rows, tmp_path / "s.png", ["long label " * 30, "絵文字"], 2, marks)
    sheet = np.array(Image.open(tmp_path / "s.png"))
    assert sheet.shape == (4 + 2 * (32 + 14 + 4), 4 + 8 * (32 + 4), 3)
    assert tuple(sheet[30, 30]) == (90, 90, 90) and tuple(sheet[80, 20]) == (255, 255, 255)    # transparent is white
    blue = (sheet == (0, 0, 255)).all(-1)
    assert blue[18:52, 2:4].any() and not blue[:, 40:].any()


def test_premultiplied_tensors_come_back_exactly():
    rgba = NOISE[:, :30] | np.array([0, 0, 0, 0xC0], np.uint8)        # of low alpha, colours cannot be told exactly
    x = media.to_tensor(rgba)
    assert x.shape == (3, 4, 30, 40) and x.dtype == torch.float32 and x.min() >= -1 and x.max() <= 1
    assert np.array_equal(media.to_rgba(x), rgba) and np.array_equal(media.to_rgba(x.numpy()), rgba)
    assert media.premultiply(np.array([200, 100, 50, 0], np.uint8)).tolist() == [-1, -1, -1, -1]
    assert media.to_rgba(torch.tensor([3.0, 0, -3, 1]).view(4, 1, 1)).tolist() == [[[255, 128, 0, 255]]]
    assert media.to_rgba(torch.ones(3, 1, 1)).tolist() == [[[255, 255, 255, 255]]]             # no alpha: opaque
    assert media.to_rgba(torch.tensor([1.0, 1, 1, 0]).view(4, 1, 1)).tolist() == [[[255, 255, 255, 128]]]
