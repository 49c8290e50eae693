"""GIF and PNG by their specifications (GIF89a; PNG, third edition): each picture is decoded alone, the rest done here.

Pillow composes animations by rules of its own. Here it only ever decodes a file of one picture, rebuilt from the
animation's own blocks or chunks; palettes, transparency, offsets, disposal and blending follow the specifications.
"""
import functools
import io
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

GIF, PNG = (b"GIF87a", b"GIF89a"), b"\x89PNG\r\n\x1a\n"
MAX_BLOCKS = 100_000                             # of a file: a loop over many more would take minutes
ROWS = 128                                       # composited at once, to save memory
KEEP, CLEAR, RESTORE = "keep", "clear", "restore"                # what becomes of a picture's box before the next one


class Picture(NamedTuple):
    """One frame's picture. A GIF's transparent pixels are not drawn: `over`, with alpha 0 or 255."""
    left: int
    top: int
    width: int
    height: int
    milliseconds: float
    dispose: str
    over: bool                                   # composited with the canvas; else it replaces its box, alpha included
    decode: Callable                             # () -> (height, width, 4) uint8 straight RGBA


class Look(NamedTuple):
    """How a PNG says that its samples are to be seen."""
    icc: bytes = b""                             # colour profile
    gamma: float = 0.0                           # exponent that the samples were encoded with, as 1 / 2.2; 0: none said
    exif: bytes = b""                            # orientation is in it


def parse(content, most=2**31):
    """Bytes of a GIF or PNG -> canvas (width, height), [Picture], of which at most `most` and one more, Look. None: of
    another format. ValueError: damaged."""
    if content[:6] in GIF:
        return *parse_gif(content, most), Look()
    return parse_png(content, most) if content[:8] == PNG else None


def composed(canvas, pictures):
    """Yield what is seen of each picture: (height, width, 4) uint8 straight RGBA, written over by the next one."""
    width, height = canvas
    out = np.zeros((height, width, 4), np.uint8)                 # transparent, whatever colour a file names
    for p in pictures:
        box = out[p.top:p.top + p.height, p.left:p.left + p.width]           # a view, clipped at the canvas's edges
        before, drawn = box.copy() if p.dispose == RESTORE else 0, p.decode()[:box.shape[0], :box.shape[1]]
        for rows in (slice(y, y + ROWS) for y in range(0, len(box), ROWS)):
            box[rows] = over(drawn[rows], box[rows]) if p.over else drawn[rows]
        del drawn
        yield out
        if p.dispose != KEEP:
            box[:] = before


def over(top, under):
    """Straight RGBA (h, w, 4) uint8 composited (PNG, section 13.16: the "over" operator)."""
    out, alpha = np.where(top[..., 3:] > 0, top, under), top[..., 3]
    mixed = (alpha > 0) & (alpha < 255) & (under[..., 3] > 0)
    if mixed.any():                              # in 255ths and whole numbers, rounded half up
        a, b = top[mixed].astype(np.uint32), under[mixed].astype(np.uint32)
        above, below = 255 * a[:, 3:], b[:, 3:] * (255 - a[:, 3:])           # weights
        weight = above + below
        colour = (2 * (a[:, :3] * above + b[:, :3] * below) + weight) // (2 * weight)
        out[mixed] = np.concatenate([colour, (2 * weight + 255) // 510], 1)
    return out


# ---- GIF
def parse_gif(content, most=2**31):
    if len(content) < 13:
        raise ValueError("the GIF is cut off in its header")
    width, height, flags = struct.unpack_from("<HHB", content, 6)
    shared, at = colour_table(content, 13, flags)
    pictures, control = [], (0, 0, None)
    for _ in range(MAX_BLOCKS):
        if at >= len(content) or len(pictures) > most:
            break
        kind = content[at]
        if kind == 0x21:                         # an extension
            data, end = sub_blocks(content, at + 2)
            if content[at + 1:at + 2] == b"\xf9" and len(data) >= 4:
                packed, delay, index = struct.unpack_from("<BHB", data)
                control = packed >> 2 & 7, 10 * delay, index if packed & 1 else None
            at = end
        elif kind == 0x2C and at + 10 < len(content):
            left, top, w, h, flags = struct.unpack_from("<4HB", content, at + 1)
            table, start = colour_table(content, at + 10, flags)
            _, at = sub_blocks(content, start + 1)
            dispose, delay, transparent = control
            decode = functools.partial(gif_pixels, content[start:at], w, h, flags & 0x40, table or shared, transparent)
            # 4 stands for 3 in files of some old programs, and in browsers.
            pictures.append(Picture(left, top, w, h, delay, {2: CLEAR, 3: RESTORE, 4: RESTORE}.get(dispose, KEEP),
                                    True, decode))
            control = 0, 0, None                 # it was for one picture
        else:                                    # the trailer, or what browsers take for it
            break
    else:
        raise ValueError(f"the GIF has more than {MAX_BLOCKS} blocks")
    if pictures:                                 # a screen that is too small for the first one grows, as in browsers
        left, top, w, h, *_ = pictures[0]
        width, height = max(width, left + w), max(height, top + h)
    return (width, height), pictures


def colour_table(content, at, flags):
    """A colour table that begins at `at`, b"" where the flags say that there is none; where it ends."""
    end = at + 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else at
    return content[at:end], end


def sub_blocks(content, at):
    """The data of a row of sub-blocks, where it ends (the file's end if it is cut off)."""
    parts = []
    while at < len(content) and content[at]:
        parts.append(content[at + 1:at + 1 + content[at]])
        at += 1 + content[at]
    return b"".join(parts), at + 1


def gif_pixels(lzw, width, height, interlaced, table, transparent):
    if not width * height:
        return np.zeros((height, width, 4), np.uint8)
    # Black in all 256 entries is no ramp of greys, so that Pillow returns the indices.
    alone = b"".join([GIF[1], struct.pack("<HHBBB", width, height, 0xF7, 0, 0), bytes(768),
                      b",", struct.pack("<4HB", 0, 0, width, height, interlaced), lzw, b";"])
    with Image.open(io.BytesIO(alone), formats=["GIF"]) as image:
        return colours(table, transparent)[np.asarray(image)]


def colours(table, transparent=None):
    """Bytes of a colour table -> (256, 4) uint8 RGBA; what it does not define is black."""
    rgba = np.zeros((256, 4), np.uint8)
    rgb = np.frombuffer(table, np.uint8)[:min(len(table) // 3, 256) * 3].reshape(-1, 3)
    rgba[:len(rgb), :3], rgba[:, 3] = rgb, 255
    if transparent is not None:
        rgba[transparent, 3] = 0
    return rgba


def join_gifs(alone, milliseconds, transparent):
    """GIFs of one picture each, of one size -> one animation that loops for ever, each picture on an empty canvas.

    Every frame has its image: Pillow merges equal ones, and begins a new file in the middle where a frame is empty."""
    out = []
    for content, duration in zip(alone, milliseconds):
        (width, height), [picture] = parse_gif(content)
        lzw, _, _, interlaced, table, _ = picture.decode.args
        out += [b"!\xf9\x04", struct.pack("<BHBx", 2 << 2 | 1, duration // 10, transparent),
                b",", struct.pack("<4HB", 0, 0, width, height, 0x87 | interlaced), table.ljust(768, b"\0"), lzw]
    loop = b"!\xff\x0bNETSCAPE2.0\x03\x01\0\0\0" if len(out) > 5 else b""
    return b"".join([GIF[1], struct.pack("<HHBBB", width, height, 0x70, 0, 0), loop, *out, b";"])


# ---- PNG
PICTURE_CHUNKS = b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"acTL", b"fcTL", b"fdAT"


def chunks(content):
    """Yield (kind, data) of a PNG. One that is not of the picture is left out where it is damaged; behind the data a
    file may be cut off. ValueError: a chunk of the picture is."""
    at = 8
    for _ in range(MAX_BLOCKS):
        if at + 8 > len(content):
            return
        length, kind = struct.unpack_from(">I4s", content, at)
        data, check = content[at + 8:at + 8 + length], content[at + 8 + length:at + 12 + length]
        whole = len(check) == 4 and zlib.crc32(data, zlib.crc32(kind)) == int.from_bytes(check, "big")
        if whole:
            yield kind, data
        elif kind in PICTURE_CHUNKS:
            raise ValueError(f"the PNG's chunk {kind!r} is cut off or damaged")
        if kind == b"IEND":
            return
        at += 12 + length
    raise ValueError(f"the PNG has more than {MAX_BLOCKS} chunks")


def parse_png(content, most=2**31):
    header, table, alpha, animated, look = None, b"", b"", False, Look()
    pictures = [(None, [])]                      # (fcTL's fields, parts of the data): the default image, then frames
    for kind, data in chunks(content):
        before = not any(parts for _, parts in pictures)                     # behind the image they count for nothing
        if kind == b"IHDR":
            header = struct.unpack(">IIBBBBB", data)
        elif kind == b"PLTE":
            table = data
        elif kind == b"tRNS":
            alpha = data
        elif kind == b"acTL":
            animated = before
        elif kind == b"fcTL" and animated:
            if len(pictures) > most + 1:
                break
            pictures.append((struct.unpack(">4xIIIIHHBB", data), []))
        elif kind == b"IDAT":
            pictures[-1][1].append(data)
        elif kind == b"fdAT" and animated:
            pictures[-1][1].append(data[4:])
        elif before:
            look = see(look, kind, data)
    if header is None:
        raise ValueError("the PNG has no IHDR chunk")
    width, height, depth, colour, _, _, interlaced = header
    frames = [(control, parts) for control, parts in pictures if control and parts]
    found = []
    for control, parts in frames or pictures[:1]:
        w, h, left, top, delay, per, dispose, blend = control or (width, height, 0, 0, 0, 1, 0, 0)
        if dispose > 2:
            raise ValueError(f"the PNG has a frame of disposal {dispose}")
        decode = functools.partial(png_pixels, b"".join(parts), w, h, depth, colour, interlaced, table, alpha)
        found.append(Picture(left, top, w, h, 1000 * delay / (per or 100), (KEEP, CLEAR, RESTORE)[dispose], blend == 1,
                             decode))
    return (width, height), found, look


def see(look, kind, data):
    """`look` with what a chunk says of it. sRGB, as no chunk, needs no change, and is above gAMA."""
    if kind == b"iCCP":
        name, _, packed = data.partition(b"\0")
        unpack = zlib.decompressobj()
        try:
            return look._replace(icc=unpack.decompress(packed[1:], 2**22))
        except zlib.error:
            return look
    if kind == b"sRGB":
        return look._replace(gamma=-1.0)
    if kind == b"gAMA" and len(data) == 4 and not look.gamma:
        return look._replace(gamma=int.from_bytes(data, "big") / 100_000)
    return look._replace(exif=data) if kind == b"eXIf" else look


def png_pixels(data, width, height, depth, colour, interlaced, table, alpha):
    def samples(depth, colour, order=None):
        """Samples as Pillow gives them; order: of the bytes of 16-bit ones, of which it gives the first."""
        header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
        parts = [(b"IHDR", header), (b"PLTE", table), (b"IDAT", data), (b"IEND", b"")]
        alone = [struct.pack(">I4s", len(d), k) + d + struct.pack(">I", zlib.crc32(d, zlib.crc32(k))) for k, d in parts
                 if d or k == b"IEND"]
        with Image.open(io.BytesIO(PNG + b"".join(alone)), formats=["PNG"]) as image:
            if order:
                image.tile = [tile._replace(args=tile.args.replace("16B", order)) for tile in image.tile]
            image.load()
            x = np.asarray(image.convert("L") if image.mode == "1" else image)
        return x.reshape(height, width, -1)

    if colour == 3:
        rgba, opacity = colours(table), np.frombuffer(alpha[:256], np.uint8)
        rgba[:len(opacity), 3] = opacity
        return rgba[samples(depth, colour)[..., 0]]
    most = 65535 if depth == 16 else 255
    if depth < 16:
        x = samples(depth, colour)
    elif colour in (0, 4):                       # as pixels of twice as many samples of 8 bits: the bytes are the same
        x = samples(8, 4 if colour == 0 else 6).astype(np.uint16)
        x = x[..., 0::2] * 256 + x[..., 1::2]
    else:
        x = samples(16, colour, "16B").astype(np.uint16) * 256 + samples(16, colour, "16L")
    if colour in (4, 6):
        x, opacity = x[..., :-1], x[..., -1:]
    else:                                        # tRNS names one colour, in samples of the file's depth
        opacity = np.full((height, width, 1), most, np.uint16)
        if alpha:
            key = np.frombuffer(alpha, ">u2").astype(int) & 2 ** depth - 1
            key = key if depth >= 8 else key * (255 // (2 ** depth - 1))
            opacity[(x == key).all(-1)] = 0
    out = np.empty((height, width, 4), np.uint8)
    for rows in (slice(y, y + ROWS) for y in range(0, height, ROWS)):
        out[rows, :, :3], out[rows, :, 3:] = (part[rows] if most == 255 else np.rint(part[rows] / 257)
                                              for part in (x, opacity))
    return out
