"""Image files whose headers say more than the files hold: what a decoder must not believe.

`patched` gives files of ten formats with any size written into the header; `filled` gives files
that really are as large as they say, and small because all of their pixels are equal.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF", "ICO")


def small(kind: str, mode: str = "RGB") -> bytearray:
    """A whole image of 40 x 24 pixels."""
    values = np.arange(24 * 40 * 3, dtype=np.uint32).reshape(24, 40, 3) % 251
    image = Image.fromarray(values.astype(np.uint8)).convert(mode)
    target = io.BytesIO()
    image.save(target, kind)
    return bytearray(target.getvalue())


def patched(kind: str, height: int, width: int) -> bytes:
    """The small image with another size in its header, as far as the format can say it."""
    data = small(kind)
    tall, wide = height & 0xFFFF, width & 0xFFFF
    if kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        struct.pack_into(">HH", data, at, tall, wide)
    elif kind == "PNG":
        return resized_png(data, height, width)
    elif kind == "GIF":
        struct.pack_into("<HH", data, 6, wide, tall)
        at = data.index(b"\x2c", 13 + 3 * 2 ** ((data[10] & 7) + 1))
        struct.pack_into("<HH", data, at + 5, wide, tall)
    elif kind == "BMP":
        struct.pack_into("<ii", data, 18, width, height)
    elif kind == "WEBP":
        data = bytearray(b"RIFF" + struct.pack("<I", len(data) + 10) + b"WEBPVP8X")
        data += struct.pack("<II", 10, 0) + (width - 1 & 0xFFFFFF).to_bytes(3, "little")
        data += (height - 1 & 0xFFFFFF).to_bytes(3, "little") + small(kind)[12:]
    elif kind == "TIFF":
        for tag, value in ((256, width), (257, height), (278, height)):
            _patch_tag(data, tag, value)
    elif kind == "PPM":
        data = data.replace(b"40 24", f"{width} {height}".encode(), 1)
    elif kind == "TGA":
        struct.pack_into("<HH", data, 12, wide, tall)
    elif kind == "JPEG2000":
        at = data.index(b"ihdr") + 4
        struct.pack_into(">II", data, at, height, width)
        at = data.index(b"\xff\x4f\xff\x51") + 8
        struct.pack_into(">II", data, at, width, height)
        struct.pack_into(">II", data, at + 16, width, height)
    elif kind == "AVIF":
        at = data.index(b"ispe") + 8
        struct.pack_into(">II", data, at, width, height)
    elif kind == "ICO":
        (at,) = struct.unpack_from("<I", data, 18)
        struct.pack_into(">II", data, at + 16, width, height)
        struct.pack_into(">I", data, at + 29, zlib.crc32(data[at + 12 : at + 29]))
    return bytes(data)


def _patch_tag(data: bytearray, tag: int, value: int) -> None:
    (directory,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, directory)
    for entry in range(directory + 2, directory + 2 + 12 * count, 12):
        if struct.unpack_from("<H", data, entry)[0] == tag:
            struct.pack_into("<HHII", data, entry, tag, 4, 1, value)


def resized_png(data: bytearray, height: int, width: int) -> bytes:
    """A PNG with another size in its header."""
    struct.pack_into(">II", data, 16, width, height)
    struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    return bytes(data)


def tiled_tiff(height: int, width: int, side: int) -> bytes:
    """The header of a grey TIFF in one tile of side x side."""
    tags = ((256, width), (257, height), (258, 8), (259, 1), (262, 1), (277, 1))
    tags += ((322, side), (323, side), (324, 8), (325, 64))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4 + 4096)


def png(height: int, width: int, depth: int, colour: int, interlaced: bool = False) -> bytes:
    """A PNG of zeros, whole unless it is interlaced."""

    def chunk(name: bytes, body: bytes) -> bytes:
        check = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", check)

    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = bytes(1 + -(-width * samples * depth // 8))
    packer = zlib.compressobj(1)
    body = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    palette = chunk(b"PLTE", bytes(6)) + chunk(b"tRNS", b"\0") if colour == 3 else b""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    parts = (chunk(b"IHDR", header), palette, chunk(b"IDAT", body), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def scans(height: int, width: int, count: int) -> bytes:
    """A progressive JPEG that goes over its pixels `count` times."""
    target = io.BytesIO()
    Image.new("L", (64, 64)).save(target, "JPEG", progressive=True)
    data = bytearray(target.getvalue())
    struct.pack_into(">HH", data, data.index(b"\xff\xc2") + 5, height, width)
    begin = data.rindex(b"\xff\xda")
    end = data.rindex(b"\xff\xd9")
    return bytes(data[:end] + data[begin:end] * (count - 1) + data[end:])


def filled(random: np.random.Generator, count: int) -> Iterator[tuple[str, bytes]]:
    """Files that hold as many pixels as they say, all equal, of sizes about what may be."""
    kinds: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
        ("PNG", "RGB", 48, {"compress_level": 1}),
        ("PNG", "1", 48, {"compress_level": 1}),
        ("PNG", "RGBA", 28, {"compress_level": 1}),
        ("PNG", "I;16", 30, {"compress_level": 1}),
        ("GIF", "P", 48, {}),
        ("TIFF", "RGB", 40, {"compression": "tiff_lzw"}),
        ("TIFF", "CMYK", 40, {"compression": "tiff_lzw"}),
        ("WEBP", "RGB", 20, {"lossless": True, "method": 0}),
        ("WEBP", "RGBA", 16, {"lossless": True, "method": 0}),
        ("JPEG2000", "RGB", 14, {}),
        ("AVIF", "RGB", 20, {"speed": 10}),
        ("JPEG", "RGB", 48, {"progressive": True}),
        ("JPEG", "CMYK", 30, {"progressive": True}),
    )
    for number in random.permutation(len(kinds))[:count].tolist():
        kind, mode, millions, options = kinds[number]
        side = int((millions * 1e6) ** 0.5 * random.uniform(0.8, 1.1))
        target = io.BytesIO()
        Image.new(mode, (side, side)).save(target, kind, **options)
        yield f"{kind} {mode} {side}x{side} filled", target.getvalue()
