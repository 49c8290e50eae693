"""lib/animation.py: random GIFs and APNGs, written byte by byte, against a composer of single pixels; known files."""
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib.files import UserError
from lib.media import read_animation

CASES = Path(__file__).with_name("cases")
EXPECTED = json.loads((CASES / "expected.json").read_text())
PASSES = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1))  # Adam7
KINDS = [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (3, 1), (3, 2), (3, 4), (3, 8), (4, 8), (4, 16),
         (6, 8), (6, 16)]                        # colour type and depth


def seen(x):
    """Frames without the colours that lie under alpha 0."""
    return x * (x[..., 3:] > 0)


# ---- the independent composer: lists of pixels, one at a time
def over(top, under):
    """One straight RGBA pixel composited over another."""
    a, b = top[3] / 255, under[3] / 255
    alpha = a + b * (1 - a)
    if not alpha:
        return (0, 0, 0, 0)
    mixed = [(t * a + u * b * (1 - a)) / alpha for t, u in zip(top[:3], under[:3])]
    return tuple(int(value + 0.5 + 1e-9) for value in (*mixed, 255 * alpha))


def compose(width, height, frames):
    """Frames: dict(x, y, pixels (rows of RGBA), dispose 0..3, blend) -> (n, height, width, 4)."""
    canvas, out = {}, []
    for f in frames:
        before = dict(canvas)
        box = [(f["y"] + j, f["x"] + i) for j in range(len(f["pixels"])) for i in range(len(f["pixels"][0]))]
        for (j, i), pixel in zip(box, (p for row in f["pixels"] for p in row)):
            canvas[j, i] = over(pixel, canvas.get((j, i), (0, 0, 0, 0))) if f["blend"] else pixel
        out.append([[canvas.get((j, i), (0, 0, 0, 0)) for i in range(width)] for j in range(height)])
        if f["dispose"] == "previous":
            canvas = before
        elif f["dispose"] == "background":
            [canvas.pop(place) for place in box]
    return np.array(out, np.uint8)


# ---- writers
def gif_bytes(width, height, frames, palette=b""):
    """Frames: dict(rows (h, w) of colour numbers below 128, palette, x, y, delay, dispose, transparent, interlace)."""
    def packed(palette):
        return 0x80 | (len(palette) // 3).bit_length() - 2 if palette else 0
    out = b"GIF89a" + struct.pack("<HHBBB", width, height, packed(palette), 1, 0) + palette
    for f in frames:
        rows, transparent = f["rows"], f.get("transparent")
        flags = f.get("dispose", 0) << 2 | (transparent is not None)
        out += b"!\xf9\x04" + struct.pack("<BHBx", flags, f.get("delay", 10), transparent or 0)
        order = range(len(rows))
        if f.get("interlace"):
            order = [j for start, step in ((0, 8), (4, 8), (2, 4), (1, 2)) for j in range(start, len(rows), step)]
        numbers = [int(n) for j in order for n in rows[j]]
        codes = b"".join(bytes([0x80, *numbers[i:i + 100]]) for i in range(0, len(numbers), 100)) + b"\x81"
        blocks = b"".join(bytes([len(codes[i:i + 255])]) + codes[i:i + 255] for i in range(0, len(codes), 255))
        flags = packed(f["palette"]) | (0x40 if f.get("interlace") else 0)
        out += b"," + struct.pack("<4HB", f.get("x", 0), f.get("y", 0), *rows.shape[::-1], flags)
        out += f["palette"] + b"\x07" + blocks + b"\0"
    return out + b";"


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_data(samples, depth, interlace, rng):
    """samples (h, w, c) -> compressed rows, each filtered by none, sub or up."""
    out, step = b"", max(samples.shape[2] * depth // 8, 1)
    for y, dy, x, dx in PASSES if interlace else ((0, 1, 0, 1),):
        part, before = samples[y::dy, x::dx], None
        for row in part if part.size else ():
            bits = "".join(format(int(v), f"0{depth}b") for v in row.ravel())
            line = np.array([int(bits[i:i + 8].ljust(8, "0"), 2) for i in range(0, len(bits), 8)], np.uint8)
            kind = int(rng.integers(3))
            left = np.concatenate([np.zeros(step, np.uint8), line])[:len(line)]
            above = np.zeros_like(line) if before is None else before
            out += bytes([kind]) + (line - (0, left, above)[kind]).astype(np.uint8).tobytes()
            before = line
    return zlib.compress(out)


# ---- random files
def random_gif(rng):
    """(bytes, what is seen, milliseconds)."""
    width, height = (int(n) for n in rng.integers(1, 14, 2))
    shared = rng.integers(0, 256, (2 ** int(rng.integers(1, 8)), 3))
    frames, drawn = [], []
    for _ in range(rng.integers(1, 6)):
        own = rng.integers(0, 256, (2 ** int(rng.integers(1, 8)), 3)) if rng.random() < 0.4 else None
        table = shared if own is None else own
        rows = rng.integers(0, len(table), rng.integers(1, 14, 2))
        transparent = int(rng.integers(len(table))) if rng.random() < 0.6 else None
        x, y, dispose, delay = (int(rng.integers(n)) for n in (8, 8, 5, 30))
        frames.append(dict(rows=rows, palette=b"" if own is None else own.astype(np.uint8).tobytes(), x=x, y=y,
                           delay=delay, dispose=dispose, transparent=transparent, interlace=rng.random() < 0.4))
        pixels = [[(*table[n].tolist(), 0 if n == transparent else 255) for n in row] for row in rows]
        kept = {2: "background", 3: "previous", 4: "previous"}.get(dispose)
        drawn.append(dict(x=x, y=y, pixels=pixels, dispose=kept, blend=1))
    content = gif_bytes(width, height, frames, shared.astype(np.uint8).tobytes())
    return content, compose(width, height, drawn), [10 * f["delay"] or 100 for f in frames]


def random_apng(rng):
    """(bytes, what is seen, milliseconds), of any colour type, depth, tRNS, interlace, dispose, blend and fallback."""
    colour, depth = KINDS[int(rng.integers(len(KINDS)))]
    width, height, n = (int(x) for x in rng.integers(1, (14, 14, 6)))
    interlace, most, channels = rng.random() < 0.4, 2 ** depth - 1, {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    colours = 2 ** min(depth, 8)
    table, opacity = rng.integers(0, 256, (colours, 3)), rng.integers(0, 256, int(rng.integers(1, colours + 1)))
    few = rng.integers(0, most + 1, (3, channels))               # some pixels have the colour that tRNS names
    key = few[0] if colour in (0, 2) and rng.random() < 0.7 else None
    with_alpha = rng.random() < 0.7

    def rgba(sample):
        if colour == 3:
            alpha = int(opacity[sample[0]]) if with_alpha and sample[0] < len(opacity) else 255
            return (*table[sample[0]].tolist(), alpha)
        alpha = sample[-1] if colour in (4, 6) else 0 if key is not None and (sample == key).all() else most
        rgb = sample[:3] if colour in (2, 6) else [sample[0]] * 3
        return tuple((2 * 255 * int(v) + most) // (2 * most) for v in (*rgb, alpha))

    def picture(h, w):
        any_colour = rng.integers(0, most + 1, (h, w, channels))
        return np.where(rng.random((h, w, 1)) < 0.5, few[rng.integers(0, 3, (h, w))], any_colour)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    out = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    out += chunk(b"acTL", struct.pack(">II", n, 0))
    if colour == 3:
        out += chunk(b"PLTE", table.astype(np.uint8).tobytes())
        out += chunk(b"tRNS", opacity.astype(np.uint8).tobytes()) if with_alpha else b""
    if key is not None:
        out += chunk(b"tRNS", b"".join(struct.pack(">H", v) for v in key))
    fallback, drawn, times, number = rng.random() < 0.3, [], [], 0
    if fallback:
        out += chunk(b"IDAT", png_data(picture(height, width), depth, interlace, rng))
    for i in range(n):
        whole = i == 0 and not fallback                          # the default image is a frame: it fills the canvas
        w, h = (width, height) if whole else (int(rng.integers(1, side + 1)) for side in (width, height))
        x, y = (int(rng.integers(side + 1)) for side in (width - w, height - h))
        dispose, blend, delay, per = (int(rng.integers(k)) for k in (3, 2, 9, 20))
        samples = picture(h, w)
        out += chunk(b"fcTL", struct.pack(">5I2H2B", number, w, h, x, y, delay, per, dispose, blend))
        number += 1
        body = png_data(samples, depth, interlace, rng)
        cut = len(body) // 2                                     # in two chunks
        for part in (body[:cut], body[cut:]):
            out += chunk(b"IDAT", part) if whole else chunk(b"fdAT", struct.pack(">I", number) + part)
            number += not whole
        drawn.append(dict(x=x, y=y, pixels=[[rgba(s) for s in row] for row in samples], blend=blend,
                          dispose=(None, "background", "previous")[dispose]))
        times.append(max(1, round(1000 * delay / (per or 100) or 100)))
    return out + chunk(b"IEND", b""), compose(width, height, drawn), times


@pytest.mark.parametrize("make", [random_gif, random_apng])
def test_300_random_files(make):
    for seed in range(300):
        content, wanted, times = make(np.random.default_rng(seed))
        frames, durations = read_animation(content)
        assert np.array_equal(seen(frames), seen(wanted)), seed
        assert durations == times, seed


@pytest.mark.parametrize("name", EXPECTED)
def test_known_files(name):
    """Frames as browsers show them."""
    facts, (frames, durations) = EXPECTED[name], read_animation(CASES / name)
    wanted = np.asarray(Image.open((CASES / name).with_suffix(".expected.png")).convert("RGBA"))
    wanted = wanted.reshape(facts["frames"], facts["height"], facts["width"], 4)
    assert np.array_equal(seen(frames), seen(wanted)) and durations == [ms or 100 for ms in facts["ms"]]


def test_a_photograph_is_one_upright_still():
    for name, size in (("mpo_preview.jpg", (32, 48)), ("mpo_stripped.jpg", (32, 48)), ("exif6.jpg", (48, 32))):
        frames, durations = read_animation(CASES / name)
        assert frames.shape == (1, *size, 4) and durations == [100]
    assert frames[0, 2, 2, 2] > 200                              # turned, so that blue is at the top left


def test_what_is_cut_off():
    """A missing trailer is no harm; a picture that is cut off, or changed bytes of a PNG, are refused."""
    for make, trailer in ((random_gif, 1), (random_apng, 12)):
        content, wanted, _ = make(np.random.default_rng(5))
        assert np.array_equal(seen(read_animation(content[:-trailer])[0]), seen(wanted))
        with pytest.raises(UserError, match="cannot be read as an image"):
            read_animation(content[:-trailer - 20])
    with pytest.raises(UserError, match="chunk b'fdAT' is cut off or damaged"):
        read_animation(content[:-trailer - 10] + b"?" + content[-trailer - 9:])
