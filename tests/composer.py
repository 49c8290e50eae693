"""Random GIFs and APNGs, and what their specifications make of them, by plain assignments; nothing is of lib/."""
import io
import struct
import zlib

import numpy as np
from PIL import Image


def draw_box(rng, width, height, whole):
    if whole:
        return 0, 0, width, height
    w, h = (int(rng.integers(1, side + 1)) for side in (width, height))
    return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h


def gif_picture(indices, palette):
    """(palette, compressed indices) as Pillow writes them."""
    image = Image.fromarray(indices)
    image.putpalette(palette.tobytes())
    image.save(file := io.BytesIO(), "GIF", optimize=False, interlace=0)
    content = file.getvalue()
    at = 13 + 3 * (2 << (content[10] & 7))
    palette = content[13:at]
    while content[at] == 0x21:                   # extensions
        at += 2
        while content[at]:
            at += content[at] + 1
        at += 1
    return palette, content[at + 10:-1]


def random_gif(rng):
    """(bytes, frames (n, H, W, 4)): disposals 0 to 3, transparent pixels, pictures anywhere on the screen."""
    width, height = (int(v) for v in rng.integers(1, 30, 2))
    content = b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0)
    canvas, frames = np.zeros((height, width, 4)), []
    for i in range(rng.integers(1, 7)):
        x, y, w, h = draw_box(rng, width, height, i == 0 and rng.random() < 0.5)
        indices = rng.integers(0, 256, (h, w), dtype=np.uint8)
        indices[rng.random((h, w)) < 0.4] = 7
        clear, disposal = bool(rng.random() < 0.7), int(rng.integers(0, 4))
        palette, data = gif_picture(indices, rng.integers(0, 256, (256, 3), dtype=np.uint8))
        control = struct.pack("<BHB", disposal << 2 | clear, int(rng.integers(2, 40)), 7 if clear else 0)
        size = (len(palette) // 3).bit_length() - 2
        content += b"!\xf9\x04" + control + b"\0," + struct.pack("<HHHHB", x, y, w, h, 0x80 | size) + palette + data
        before, part = canvas.copy(), canvas[y:y + h, x:x + w]
        colours = np.frombuffer(palette, np.uint8).reshape(-1, 3)[indices]
        shown = indices != 7 if clear else np.full((h, w), True)
        part[shown] = np.concatenate([colours, np.full((h, w, 1), 255)], -1)[shown]
        frames.append(canvas.copy())
        if disposal == 2:
            part[:] = 0
        canvas = before if disposal == 3 else canvas
    return content + b";", np.array(frames)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def random_apng(rng):
    """(bytes, frames (n, H, W, 4)): all disposals and blends, alpha of 0 and 255 or of any value."""
    width, height, n = (int(v) for v in rng.integers(1, (30, 30, 7)))
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    content += chunk(b"acTL", struct.pack(">II", n, 0))
    number, canvas, frames = 0, np.zeros((height, width, 4)), []
    for i in range(n):
        x, y, w, h = draw_box(rng, width, height, i == 0)
        pixels = rng.integers(0, 256, (h, w, 4), dtype=np.uint8)
        if rng.random() < 0.6:
            pixels[..., 3] = np.where(rng.random((h, w)) < 0.5, 0, 255)
        dispose, blend = int(rng.integers(0, 3)), int(rng.integers(0, 2))
        control = struct.pack(">IIIIIHHBB", number, w, h, x, y, int(rng.integers(1, 50)), 100, dispose, blend)
        data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))
        content += chunk(b"fcTL", control)
        content += chunk(b"fdAT", struct.pack(">I", number + 1) + data) if i else chunk(b"IDAT", data)
        number += 2 if i else 1
        before, part = canvas.copy(), canvas[y:y + h, x:x + w]
        if blend:
            above, below = pixels[..., 3:] / 255, part[..., 3:] / 255
            alpha = above + below * (1 - above)
            colour = pixels[..., :3] * above + part[..., :3] * below * (1 - above)
            mixed = np.concatenate([colour / np.where(alpha > 0, alpha, 1), 255 * alpha], -1)
            part[:] = np.floor(mixed + 0.5)
        else:
            part[:] = pixels
        frames.append(canvas.copy())
        if dispose == 1 or dispose == 2 and i == 0:
            part[:] = 0
        canvas = before if dispose == 2 and i else canvas
    return content + chunk(b"IEND", b""), np.array(frames)
