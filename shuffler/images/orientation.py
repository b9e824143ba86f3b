"""How a photo is turned: its EXIF orientation, read from the first bytes of the file.

A camera stores the pixels as its sensor lies, and says in EXIF (tag 0x0112 of the first directory)
how they are turned for viewing. Only EXIF counts, as in browsers: XMP is not looked at. What
cannot be understood says nothing, and the image is upright. Pixels are turned in `pixels`.
"""

from __future__ import annotations

import struct
from typing import Any, Final

UPRIGHT: Final = 1
"""The orientation of pixels that are stored as they are to be seen."""

EXIF_START: Final = b"Exif\0\0"
_TAG: Final = 0x0112
_FORMATS: Final = {1: "B", 3: "H", 4: "I"}
"""Types of an entry whose value can be a small number: byte, short, long."""

_SMALL: Final = 4096
"""JPEGs of up to so many bytes are searched whole, which is faster than to read their markers."""

_STANDALONE: Final = frozenset((0x01, *range(0xD0, 0xD9)))
_START_OF_SCAN, _END_OF_IMAGE, _APP1 = 0xDA, 0xD9, 0xE1


def jpeg_orientation(data: bytes | memoryview) -> int:
    """Return the EXIF orientation of a JPEG file, 1 to 8; 1 if it has none that is understood."""
    if len(data) <= _SMALL and EXIF_START not in bytes(data):
        return UPRIGHT
    position, end = 2, len(data) - 4
    while position < end:
        if data[position] != 0xFF:
            return UPRIGHT
        marker = data[position + 1]
        if marker == 0xFF:  # a byte of padding
            position += 1
            continue
        if marker in _STANDALONE:
            position += 2
            continue
        if marker in (_START_OF_SCAN, _END_OF_IMAGE):
            return UPRIGHT
        length = data[position + 2] << 8 | data[position + 3]
        if marker == _APP1 and data[position + 4 : position + 10] == EXIF_START:
            return exif_orientation(bytes(data[position + 4 : position + 2 + length]))
        position += 2 + length
    return UPRIGHT


def exif_orientation(exif: bytes) -> int:
    """Return the orientation in a block of EXIF, 1 to 8; 1 if it has none that is understood.

    Args:
        exif: the TIFF structure, with or without the six bytes `EXIF_START` before it.
    """
    tiff = exif.removeprefix(EXIF_START)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return UPRIGHT
    try:
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, directory)
        for entry in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(f"{order}HHI", tiff, entry)
            if tag == _TAG:
                if values != 1 or kind not in _FORMATS:
                    return UPRIGHT
                (found,) = struct.unpack_from(order + _FORMATS[kind], tiff, entry + 8)
                return found if 1 <= found <= 8 else UPRIGHT
    except struct.error:  # it is cut short, or points beyond its end
        pass
    return UPRIGHT


def opened_orientation(image: Any) -> int:
    """Return the EXIF orientation of an image that Pillow has loaded, 1 to 8.

    The orientation of TIFF belongs to the format itself, and Pillow has applied it by then.
    """
    if image.format == "TIFF":
        return UPRIGHT
    exif = image.info.get("exif")
    if exif is None and isinstance(text := image.info.get("Raw profile type exif"), str):
        try:  # as ImageMagick writes it into PNG: a name and a length, then hexadecimal
            exif = bytes.fromhex("".join(text.split("\n")[3:]))
        except ValueError:
            return UPRIGHT
    return exif_orientation(exif) if isinstance(exif, bytes) else UPRIGHT
