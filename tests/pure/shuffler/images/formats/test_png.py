"""Plain PNGs have the pixels that Pillow gives them; what Pillow would see otherwise is left alone.

The files are made here chunk by chunk, so that all filters, cuts and faults occur.
"""

from __future__ import annotations

import itertools
import struct
import zlib

import numpy as np
import pytest

from downpour.shuffler.errors import DecodeError
from downpour.shuffler.images import any_format, pixels
from downpour.shuffler.images.formats.png import MAX_SIDE, decode_plain
from downpour.shuffler.images.reading import AS_SEEN

GREY, RGB, PALETTE = 0, 2, 3


def chunk(kind: bytes, body: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + checksum


def png(
    stream: bytes,
    *,
    size: tuple[int, int],
    colour: int,
    before: bytes = b"",
    cuts: tuple[int, ...] = (),
    bits: int = 8,
    interlaced: int = 0,
) -> bytes:
    """A file of a compressed stream that is cut into several chunks."""
    head = struct.pack(">IIBBBBB", size[1], size[0], bits, colour, 0, 0, interlaced)
    edges = [0, *sorted(cuts), len(stream)]
    parts = [stream[a:b] for a, b in itertools.pairwise(edges)]
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + before
        + b"".join(chunk(b"IDAT", part) for part in parts)
        + chunk(b"IEND", b"")
    )


def filtered(rng: np.random.Generator, height: int, width: int, colour: int) -> bytes:
    """Random rows under random filters, which are read as some pixels or other."""
    rows = rng.integers(0, 256, (height, 1 + width * (3 if colour == RGB else 1)), np.uint8)
    rows[:, 0] = rng.integers(0, 5, height)
    return rows.tobytes()


def small(before: bytes = b"", **options: int) -> bytes:
    """A plain file of 2 x 3 pixels, unless `before` or `options` make it another."""
    colour = options.pop("colour", GREY)
    rows = bytes(2 * (1 + 3 * (3 if colour == RGB else 1)))
    return png(zlib.compress(rows), size=(2, 3), colour=colour, before=before, **options)


QUIET = (
    chunk(b"gAMA", struct.pack(">I", 45_455)),
    chunk(b"sRGB", b"\1"),
    chunk(b"pHYs", struct.pack(">IIB", 2835, 2835, 1)),
    chunk(b"cHRM", struct.pack(">8I", *range(31_270, 31_278))),
    chunk(b"tEXt", b"Software\0something"),
)


def test_pixels_are_pillows():
    rng = np.random.default_rng(0)
    for number in range(300):
        height, width = rng.integers(1, 40, 2).tolist()
        colour = (GREY, RGB)[number % 2]
        stream = zlib.compress(filtered(rng, height, width, colour), int(rng.integers(0, 10)))
        cuts = tuple(rng.integers(0, len(stream) + 1, rng.integers(0, 3)).tolist())
        before = b"".join(each for each in QUIET if rng.random() < 0.3)
        data = png(stream, size=(height, width), colour=colour, before=before, cuts=cuts)
        channels = 3 if colour == RGB else int(rng.choice([1, 3]))
        found = decode_plain(memoryview(data), channels)
        assert found is not None
        assert found.shape == (height, width, channels)
        assert (found == any_format.decode(data, channels, AS_SEEN)[0]).all()


def test_what_is_damaged_is_left_to_pillow():
    """Whatever bit is wrong, and wherever a file ends: nothing is decoded here."""
    rng = np.random.default_rng(1)
    data = png(zlib.compress(filtered(rng, 5, 4, RGB)), size=(5, 4), colour=RGB, before=QUIET[0])
    assert decode_plain(data, 3) is not None
    for at in range(len(data)):
        assert decode_plain(data[:at], 3) is None
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(rng.integers(0, 8))
        assert decode_plain(bytes(flipped), 3) is None
    with pytest.raises(DecodeError):
        pixels.decode_any(data[:-30], 3)


def test_streams_that_end_too_early_are_refused_as_pillow_does():
    """Their checksums are right, so OpenCV is asked, and does not decode them."""
    rng = np.random.default_rng(2)
    rows = filtered(rng, 9, 8, GREY)
    for stream in (zlib.compress(rows[:-5]), zlib.compress(rows)[:-12], b""):
        data = png(stream, size=(9, 8), colour=GREY)
        assert decode_plain(data, 1) is None
        with pytest.raises(DecodeError):
            pixels.decode_any(data, 1)


@pytest.mark.parametrize(
    "data",
    [
        small(chunk(b"tRNS", b"\0\0")),
        small(chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\0")),
        small(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 0\n")),
        small(chunk(b"zTXt", b"a\0\0")),
        small(chunk(b"sRGB", b"\x09")),
        small(chunk(b"gAMA", bytes(4))),
        small(bits=16),
        small(bits=4),
        small(interlaced=1),
        small(colour=PALETTE),
        small() + b"more",
        b"\x89PNG\r\n\x1a\n" + chunk(b"IEND", b""),
        png(zlib.compress(bytes(MAX_SIDE + 2)), size=(1, MAX_SIDE + 1), colour=GREY),
        b"\xff\xd8\xff",
        b"",
    ],
)
def test_other_forms_are_left_to_pillow(data):
    assert decode_plain(data, 3) is None


def test_grey_of_colours_is_left_to_pillow():
    data = small(colour=RGB)
    assert decode_plain(data, 1) is None
    assert decode_plain(data, 3) is not None
