"""lib/media/animation.py: files of every colour type, depth, disposal and blend as browsers show them, and broken ones.

Of tests/cases those that begin with r are random: written byte by byte, their frames composed pixel by pixel by another
program and equal to Chromium's."""
import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from composer import random_apng, random_gif
from PIL import Image

from lib.media.pictures import read_animation
from lib.run.files import UserError

CASES = Path(__file__).with_name("cases")
EXPECTED = json.loads((CASES / "expected.json").read_text())


def seen(x):
    """Frames without the colours that lie under alpha 0."""
    return x * (x[..., 3:] > 0)


@pytest.mark.parametrize("name", EXPECTED)
def test_known_files(name):
    facts, (frames, durations) = EXPECTED[name], read_animation(CASES / name)
    wanted = np.asarray(Image.open((CASES / name).with_suffix(".expected.png")).convert("RGBA"))
    wanted = wanted.reshape(facts["frames"], facts["height"], facts["width"], 4)
    assert np.array_equal(seen(frames), seen(wanted)) and durations == [ms or 100 for ms in facts["ms"]]


def test_a_photograph_is_one_upright_still():
    for name, size in (("mpo_preview.jpg", (32, 48)), ("mpo_stripped.jpg", (32, 48)), ("exif6.jpg", (48, 32))):
        frames, durations = read_animation(CASES / name)
        assert frames.shape == (1, *size, 4) and durations == [100]
    assert frames[0, 2, 2, 2] > 200                              # turned, so that blue is at the top left


def png(colour=2, depth=8, pixels=b"", size=(2, 1), chunks=(), tail=()):
    """A PNG of one row a filter byte each; chunks stand before the data, tail behind it."""
    def chunk(kind, data):
        return struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", zlib.crc32(kind + data))
    parts = [(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)), *chunks,
             (b"IDAT", zlib.compress(b"\0" + pixels)), *tail, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(part if isinstance(part, bytes) else chunk(*part) for part in parts)


ROW = bytes([10, 128, 250, 200, 60, 0])
WRONG = struct.pack(">I4s", 3, b"tEXt") + b"abc" + b"\0\0\0\0"              # its checksum


def test_colours_are_those_of_srgb():
    """An exponent of 1 (linear light) and of 1 / 1.8, as Chromium shows them; sRGB, 1 / 2.2, or a profile that is
    damaged, changes nothing."""
    def seen_as(*chunks, **more):
        return read_animation(png(pixels=ROW, chunks=chunks, **more))[0][0, 0, :, :3].tolist()
    plain = [[10, 128, 250], [200, 60, 0]]

    def gamma(g):
        return b"gAMA", round(100_000 * g).to_bytes(4, "big")
    assert seen_as() == seen_as((b"sRGB", b"\0"), gamma(1)) == plain
    assert seen_as(gamma(1), (b"sRGB", b"\0")) == plain
    assert seen_as((b"iCCP", b"x\0\0" + zlib.compress(b"no profile"))) == plain
    assert seen_as((b"iCCP", b"x\0\0" + b"no zlib")) == plain
    assert seen_as(gamma(1)) == [[56, 188, 253], [229, 133, 0]]                # 0.039 of light is 0.219 in sRGB
    darker = np.array(seen_as(gamma(1 / 1.8)))
    assert (darker[0] >= plain[0]).all() and darker[0, 1] == 146
    assert seen_as(gamma(0)) == seen_as(gamma(0.45455)) == plain


def test_profiles_of_jpeg_and_webp_and_of_grey():
    profile = Image.open(CASES / "Display_P3.png").info["icc_profile"]
    wanted = read_animation(CASES / "Display_P3.png")[0][0].astype(int)
    image = Image.open(CASES / "Display_P3.png")
    for kind, options in (("WEBP", dict(lossless=True)), ("JPEG", dict(quality=100, subsampling=0))):
        image.save(file := io.BytesIO(), kind, icc_profile=profile, **options)
        found = read_animation(file.getvalue())[0][0].astype(int)
        assert abs(found - wanted).max() <= (0 if kind == "WEBP" else 12)
    animated = io.BytesIO()
    image.save(animated, "WEBP", lossless=True, icc_profile=profile, save_all=True, append_images=[image.rotate(180)],
               duration=90)
    assert (read_animation(animated.getvalue())[0][0] == wanted).all()
    grey = Image.new("L", (3, 3), 100)
    grey.save(file := io.BytesIO(), "PNG", icc_profile=profile)                # of another kind of picture
    assert (read_animation(file.getvalue())[0][..., 3] == 255).all()


@pytest.mark.parametrize("number, at", [(1, (0, 0)), (2, (0, 2)), (3, (1, 2)), (4, (1, 0)), (5, (0, 0)), (6, (0, 1)),
                                        (7, (2, 1)), (8, (2, 0))])
def test_pictures_are_upright(number, at):
    """PNG as JPEG and WebP; EXIF behind the data, or broken, turns nothing."""
    x = np.zeros((2, 3, 3), np.uint8)
    x[0, 0] = 255                                                              # white at the top left
    exif = Image.Exif()
    exif[0x0112] = number
    block = (b"eXIf", exif.tobytes()[6:])
    rows = x[0].tobytes() + b"\0" + x[1].tobytes()
    for content, turned in ((png(pixels=rows, size=(3, 2), chunks=[block]), True),
                            (png(pixels=rows, size=(3, 2), tail=[block]), False),
                            (png(pixels=rows, size=(3, 2), chunks=[(b"eXIf", b"MM\0*" + b"\xff" * 20)]), False)):
        frame = read_animation(content)[0][0]
        assert frame.shape[:2] == ((3, 2) if turned and number > 4 else (2, 3))
        assert np.argwhere(frame[..., 0] == 255).tolist() == [list(at if turned else (0, 0))]
    image = Image.fromarray(x)
    image.save(file := io.BytesIO(), "WEBP", lossless=True, exif=exif)
    assert np.argwhere(read_animation(file.getvalue())[0][0, ..., 0] == 255).tolist() == [list(at)]


def test_known_orientation_in_a_file():
    frames, _ = read_animation(CASES / "exif3.png")
    assert (frames[0] == np.asarray(Image.open(CASES / "exif3.png").convert("RGBA"))[::-1, ::-1]).all()


def test_damage_beside_the_picture_does_not_cost_it():
    plain = read_animation(png(pixels=ROW))[0]
    whole = png(pixels=ROW, chunks=[WRONG], tail=[WRONG])
    for content in (whole, whole + b"x" * 5, whole[:-12], whole[:-14], png(pixels=ROW) + b"x" * 99):
        assert np.array_equal(read_animation(content)[0], plain)
    flipped = whole.replace(zlib.compress(b"\0" + ROW), zlib.compress(b"\0" + ROW[::-1]))
    for content, reason in ((flipped, "b'IDAT' is cut off or damaged"), (whole[:8] + whole[33:], "no IHDR chunk"),
                            (b"GIF89a\1\0", "cut off in its header")):
        with pytest.raises(UserError, match=f"cannot be read as an image .*{reason}"):
            read_animation(content)


def test_a_gif_screen_grows_with_the_first_picture():
    """Also one of no width; later pictures are cut at it."""
    frames, _ = read_animation(CASES / "zero_width.gif")
    assert frames.shape == (1, 8, 6, 4) and frames[0, :5, :, 3].all() and not frames[0, 5:].any()


HOSTILE = """
import sys, time
import numpy as np
from lib.run.files import UserError
from lib.media.pictures import read_animation
content = sys.stdin.buffer.read()
began = time.process_time()
try:
    read_animation(content, 24, 64)
    said = "read"
except UserError as error:
    said = str(error)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))      # ru_maxrss has the parent's
print(int(peak.split()[1]) // 1024, round(time.process_time() - began, 1), said)
"""


@pytest.mark.parametrize("kind, said", [("layers", "read"), ("empty pictures", "frames of"), ("blocks", "blocks"),
                                        ("chunks", "chunks")])
def test_hostile_files_stay_within_what_is_promised(kind, said):
    """1.2 GB and about half a minute (lib/media/pictures.py): the largest half-transparent canvas, and 40 MB."""
    if kind == "layers":
        x = np.full((4096, 4096, 4), (200, 30, 60, 128), np.uint8)
        other = x.copy()
        other[0, 0] = 9
        Image.fromarray(x).save(file := io.BytesIO(), "PNG", save_all=True, append_images=[Image.fromarray(other)],
                                disposal=0, blend=1, compress_level=1)
        content = file.getvalue()
    else:
        head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0)
        content = {"empty pictures": head + (b"," + bytes(9) + b"\2\0") * 3_000_000,
                   "blocks": head + b"!\xfe\0" * 12_000_000,
                   "chunks": png(chunks=[struct.pack(">I4sI", 0, b"tEXt", zlib.crc32(b"tEXt")) * 3_000_000])}[kind]
    done = subprocess.run([sys.executable, "-c", HOSTILE], input=content, capture_output=True, cwd=CASES.parents[1])
    memory, seconds, words = done.stdout.decode().split(maxsplit=2)
    assert int(memory) < 1200 and float(seconds) < 10 and said in words, done


def test_what_is_cut_off():
    """A missing trailer is no harm; a picture that is cut off, or changed bytes of a PNG, are refused."""
    for name, trailer in (("r11_random.gif", 1), ("r6_rgba8_fallback.png", 12)):
        content = (CASES / name).read_bytes()
        assert np.array_equal(read_animation(content[:-trailer])[0], read_animation(content)[0])
        with pytest.raises(UserError, match="cannot be read as an image"):
            read_animation(content[:-trailer - 20])
    with pytest.raises(UserError, match="chunk b'fdAT' is cut off or damaged"):
        read_animation(content[:-trailer - 10] + b"?" + content[-trailer - 9:])


@pytest.mark.parametrize("draw", [random_gif, random_apng])
def test_random_files_equal_an_independent_composer(draw):
    rng = np.random.default_rng(0)
    for _ in range(600):
        content, want = draw(rng)
        found, _ = read_animation(content)
        assert found.shape == want.shape and np.array_equal(found[..., 3], want[..., 3])
        assert np.array_equal(found * (want[..., 3:] > 0), want * (want[..., 3:] > 0))
