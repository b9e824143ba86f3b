"""What the headers of image files say of the work behind them: sizes, scans, tiles.

Bytes in, numbers out, in a time that does not follow from what they declare. What may be is
decided in `bounds`.
"""

from __future__ import annotations

import struct
from typing import Any, Final

from downpour.shuffler.errors import DecodeError, ImageTooLarge

Buffer = bytes | memoryview

MAX_TILES: Final = 8192
"""Most tiles of a JPEG 2000 image; its decoder keeps some kilobytes for each."""

MIN_BLOCK_PIXELS: Final = 256
"""Fewest pixels of a code block or a precinct of JPEG 2000; its decoder keeps a record of each."""

MAX_LAYERS: Final = 256
"""Most layers of quality of a JPEG 2000 image."""

_STANDALONE: Final = frozenset((0x01, *range(0xD0, 0xD9)))
_FRAMES: Final = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), 0xCD, 0xCE))
_PROGRESSIVE: Final = frozenset((0xC2, 0xC6, 0xCA, 0xCE))
_START_OF_SCAN: Final = 0xDA
_ICO_ENTRIES: Final = 256

_Size = tuple[int, int]
"""Height and width."""


def declared_size(data: Buffer) -> _Size | None:
    """Return height and width of formats whose header is at the start; None of others.

    Of an icon it is the largest of its images, each of which may be a PNG of any size.

    Raises:
        ImageTooLarge: a JPEG 2000 file is cut into too many pieces.
    """
    head = bytes(data[:32])
    try:
        if head.startswith(b"\x89PNG\r\n\x1a\n"):
            width, height = struct.unpack_from(">II", head, 16)
        elif head.startswith((b"GIF87a", b"GIF89a")):
            width, height = struct.unpack_from("<HH", head, 6)
        elif head.startswith(b"\xff\xd8"):
            return _jpeg_frame(data)[0]
        elif head.startswith(b"BM"):
            width, height = _bitmap_size(head, 14)
        elif head[:4] == b"RIFF" and head[8:12] == b"WEBP":
            return _webp_size(head)
        elif head.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP")):
            return _jpeg2000_size(data)
        elif head.startswith(b"\0\0\1\0"):
            return _icon_size(data)
        else:
            return None
    except struct.error:
        return None  # cut short, which whoever decodes it will say
    return height, width


def jpeg_scans(data: Buffer) -> int:
    """Return in how many scans a JPEG goes over its pixels; 1 if its first scan is all of it.

    Two bytes of compressed data may look like the start of a scan, so it may be a few too many.
    """
    _, first_scan = _jpeg_frame(data)
    return 1 if first_scan is None else bytes(data[first_scan:]).count(b"\xff\xda")


def _jpeg_frame(data: Buffer) -> tuple[_Size | None, int | None]:
    """Return a JPEG's size, and where its first scan begins if others follow it."""
    position, end = 2, len(data) - 9
    size: _Size | None = None
    components, progressive = 0, False
    while position < end and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # a byte of padding
            position += 1
        elif marker in _STANDALONE:
            position += 2
        elif marker == _START_OF_SCAN:
            several = progressive or data[position + 4] < components
            return size, position if several else None
        else:
            if marker in _FRAMES:
                progressive = marker in _PROGRESSIVE
                height, width, components = struct.unpack_from(">HHB", data, position + 5)
                size = height, width
            position += 2 + (data[position + 2] << 8 | data[position + 3])
    return size, None


def check_tiff(image: Any, most_bytes: int) -> None:
    """Check how a TIFF image that Pillow has opened is tiled: tiles may be larger than the image.

    Raises:
        ImageTooLarge: a tile would take more than `most_bytes`.
    """
    tags = image.tag_v2
    width, height = (tags.get(tag, 0) for tag in (322, 323))
    if not (isinstance(width, int) and isinstance(height, int)):
        raise DecodeError("its tiles have no size; save it again")
    bits = tags.get(258, (8,))
    pixel = max(1, tags.get(277, 1)) * max(bits if isinstance(bits, tuple) else (bits,)) // 8
    if width * height * max(1, pixel) > most_bytes:
        raise ImageTooLarge(f"its tiles have {height}x{width} pixels; save it with smaller ones")


def _bitmap_size(head: bytes, at: int) -> _Size:
    """Width and height of a bitmap's header; height is negative if rows go down."""
    (size,) = struct.unpack_from("<I", head, at)
    if size == 12:
        width, height = struct.unpack_from("<HH", head, at + 4)
    else:
        width, height = struct.unpack_from("<ii", head, at + 4)
    return width, abs(height)


def _webp_size(head: bytes) -> _Size | None:
    kind = head[12:16]
    if kind == b"VP8X":
        width = int.from_bytes(head[24:27], "little") + 1
        return int.from_bytes(head[27:30], "little") + 1, width
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", head, 26)
        return height & 0x3FFF, width & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", head, 21)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    return None


def _icon_size(data: Buffer) -> _Size | None:
    (count,) = struct.unpack_from("<H", data, 4)
    if count > _ICO_ENTRIES:
        raise ImageTooLarge(f"it is an icon of {count} images; save one of them")
    found: list[_Size] = []
    for entry in range(count):
        (at,) = struct.unpack_from("<I", data, 6 + 16 * entry + 12)
        head = bytes(data[at : at + 32])
        size = declared_size(head) if head.startswith(b"\x89PNG") else None
        if size is None and len(head) >= 12:
            width, height = _bitmap_size(head, 0)
            size = height // 2, width  # a mask lies below the image
        if size is not None:
            found.append(size)
    return max(found, key=lambda size: size[0] * size[1], default=None)


def _jpeg2000_size(data: Buffer) -> _Size | None:
    """Height and width by the code stream, whose tiles, code blocks and precincts are checked."""
    head = bytes(data[: 1 << 16])
    start = head.find(b"\xff\x4f\xff\x51")
    if start < 0:
        return None
    x1, y1, x0, y0, tile_width, tile_height = struct.unpack_from(">6I", head, start + 8)
    width, height = x1 - x0, y1 - y0
    if min(width, height, tile_width, tile_height) < 1:
        raise DecodeError(f"its header says {height}x{width} pixels in tiles that have none")
    if -(-width // tile_width) * -(-height // tile_height) > MAX_TILES:
        raise ImageTooLarge(
            f"its tiles have {tile_height}x{tile_width} pixels, which makes more than {MAX_TILES:,}"
            "; save it with larger ones"
        )
    _check_blocks(data)
    return height, width


def _check_blocks(data: Buffer) -> None:
    """Check every marker of a JPEG 2000 file that says how small its pieces are.

    Compressed data may look like a marker; one whose values are not as they must be is none.
    """
    whole = bytes(data)
    for marker, values_at in ((b"\xff\x52", 5), (b"\xff\x53", 2)):  # COD, and COC of a component
        at = whole.find(marker)
        while 0 <= at <= len(whole) - 12:
            (length,) = struct.unpack_from(">H", whole, at + 2)
            body = whole[at + 4 : at + 2 + length]
            style = body[values_at - 5] if values_at == 5 else body[1] if len(body) > 1 else 0
            levels = body[values_at] if len(body) > values_at else 255
            precincts = levels + 1 if style & 1 else 0
            if style < 8 and levels <= 32 and len(body) == values_at + 5 + precincts:
                layers = struct.unpack_from(">H", body, 2)[0] if values_at == 5 else 1
                _check_pieces(body[values_at + 1 :], layers)
            at = whole.find(marker, at + 2)


def _check_pieces(values: bytes, layers: int) -> None:
    """Check code blocks [2 bytes], style and transform [2 bytes], and precincts [the others]."""
    wide, high = values[0], values[1]
    if wide > 8 or high > 8 or values[3] > 1:
        return
    sides = [wide + high + 4, *((value & 15) + (value >> 4) for value in values[4:])]
    if 1 << min(sides) < MIN_BLOCK_PIXELS or layers > MAX_LAYERS:
        raise ImageTooLarge(
            f"its pieces have {1 << min(sides)} pixels in {layers} layers, and there may be no "
            f"fewer than {MIN_BLOCK_PIXELS} and no more than {MAX_LAYERS}; save it again"
        )
