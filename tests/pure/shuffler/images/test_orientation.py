"""A photo is seen upright however it is stored: eight orientations, in the formats that have EXIF.

The oracle is Pillow's `ImageOps.exif_transpose`.
"""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from downpour.shuffler.images.augment import AugmentConfig
from downpour.shuffler.images.decode import Decoder, decode_image
from downpour.shuffler.images.orientation import exif_orientation, jpeg_orientation
from downpour.shuffler.images.pixels import decode_file, open_image, turn
from downpour.shuffler.images.reading import Reading
from downpour.shuffler.images.specs import ImageSpec
from downpour.shuffler.images.views import decode_views
from tests.helpers.oriented import STORED, oriented, rows_with_images

AS_STORED = Reading(orientation="ignore")


def scene(height: int = 48, width: int = 64) -> np.ndarray:
    """Colours that no turning leaves as they are, smooth enough for JPEG."""
    y, x = np.mgrid[:height, :width].astype(float)
    planes = [255 * x / width, 255 * y / height, 255 * (x + 2 * y) / (width + 2 * height)]
    return np.stack(planes, axis=2).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_lossless_formats_are_turned_to_the_pixel(format: str, orientation: int) -> None:
    data = oriented(scene(), orientation, format)
    assert (decode_image(data, 3) == scene()).all()
    grey = np.asarray(Image.fromarray(scene()).convert("L"))
    assert (decode_image(data, 1)[:, :, 0] == grey).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "AVIF"])
def test_others_are_turned_as_pillow_turns_them(format: str, orientation: int) -> None:
    data = oriented(scene(), orientation, format)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert (decode_image(data, 3) == np.asarray(upright)).all()
    assert np.abs(decode_image(data, 3).astype(int) - scene()).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_decoded_at_less_than_its_size(orientation: int) -> None:
    """Large ones are: its size, its least size and its crops are those of the upright image."""
    data = oriented(scene(96, 160), orientation, "JPEG")
    file = open_image(data, 3)
    assert (file.height, file.width) == (96, 160)
    half = decode_file(file, 3, min_height=40, min_width=70)
    assert half.shape[:2] == (48, 80)
    whole = decode_file(file, 3).reshape(48, 2, 80, 2, 3).mean((1, 3))
    assert np.abs(half - whole).max() < 8
    stored = open_image(data, 3, AS_STORED)
    assert (stored.height, stored.width) == ((160, 96) if orientation > 4 else (96, 160))
    assert decode_file(stored, 3).shape[:2] == (stored.height, stored.width)


def test_everywhere_that_rows_are_decoded() -> None:
    """Training crops, one crop, ten crops, and the exact size."""
    files = [oriented(scene(), turned, "PNG") for turned in range(1, 9)]
    rows = rows_with_images(files)
    varied = AugmentConfig(random_crop=True, mirror=True, distortion="full")
    same_row = np.full(8, 5)
    for spec in (
        ImageSpec(height=24, width=24, fit="crop"),
        ImageSpec(height=24, width=24, fit="any"),
        ImageSpec(height=48, width=64),
        ImageSpec(height=48, width=64, flatten=True, channels=1, binary_threshold=99),
    ):
        seen = Decoder(spec=spec).decode(rows).inputs
        assert (seen == seen[0]).all()
        seen = Decoder(spec=spec, augment=varied, seed=3).decode(rows, rows=same_row).inputs
        assert (seen == seen[0]).all()
    seen = decode_views(rows, ImageSpec(height=24, width=24, fit="crop"), 10).inputs
    assert (seen == seen[0]).all()
    ignoring = ImageSpec(height=24, width=24, fit="crop", orientation="ignore")
    seen = Decoder(spec=ignoring).decode(rows).inputs
    assert len({image.tobytes() for image in seen}) == 8


def test_pixels_are_turned_as_the_standard_says() -> None:
    """EXIF 2.32, table 6, by hand: which edges of the image row 0 and column 0 are."""
    stored = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)[:, :, None]
    upright = {
        1: [[1, 2, 3], [4, 5, 6]],  # top, left
        2: [[3, 2, 1], [6, 5, 4]],  # top, right
        3: [[6, 5, 4], [3, 2, 1]],  # bottom, right
        4: [[4, 5, 6], [1, 2, 3]],  # bottom, left
        5: [[1, 4], [2, 5], [3, 6]],  # left, top
        6: [[4, 1], [5, 2], [6, 3]],  # right, top
        7: [[6, 3], [5, 2], [4, 1]],  # right, bottom
        8: [[3, 6], [2, 5], [1, 4]],  # left, bottom
    }
    for orientation, pixels in upright.items():
        assert turn(stored, orientation)[:, :, 0].tolist() == pixels
        assert (turn(np.repeat(stored, 3, 2), orientation)[:, :, 1] == pixels).all()
    assert set(STORED) == set(upright)


def exif(value: int, order: str = "<", kind: int = 3, tag: int = 0x0112) -> bytes:
    packed = struct.pack(f"{order}{'H' if kind == 3 else 'I'}", value).ljust(4, b"\0")
    head = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, 1)
    return head + struct.pack(f"{order}HHI", tag, kind, 1) + packed + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
def test_what_exif_says(order: str) -> None:
    for value in range(1, 9):
        assert exif_orientation(exif(value, order)) == value
        assert exif_orientation(b"Exif\0\0" + exif(value, order, kind=4)) == value
    for nonsense in (exif(0, order), exif(9, order), exif(6, order, tag=0x010F)):
        assert exif_orientation(nonsense) == 1
    whole = exif(6, order)
    assert {exif_orientation(whole[:length]) for length in range(20)} == {1}
    assert exif_orientation(bytes(range(256))) == 1


def segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload


def test_where_a_jpeg_keeps_its_exif() -> None:
    """First, behind other segments however long, behind tables; and what only looks like it."""
    buffer = io.BytesIO()
    Image.fromarray(scene()).save(buffer, "JPEG")
    plain = buffer.getvalue()
    start, rest = plain[:2], plain[2:]
    turned = segment(0xE1, b"Exif\0\0" + exif(6))
    xmp = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation='3'>\xff\xfe")
    profile = segment(0xE2, b"ICC_PROFILE\0" + bytes(60_000))
    tables = rest[: rest.index(b"\xff\xc4")]  # all before the Huffman tables
    for data, found in (
        (plain, 1),
        (start + turned + rest, 6),
        (start + xmp + profile + profile + b"\xff\xff" + turned + rest, 6),
        (start + tables + turned + rest[len(tables) :], 6),
        (start + xmp + rest, 1),
        (start + segment(0xFE, turned) + rest, 1),  # a comment that quotes one
        (plain + turned, 1),  # behind the image
        (start + segment(0xE1, b"Exif\0\0" + bytes(range(256))) + rest, 1),
        (start + segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff") + rest, 1),
        (start + turned[:20], 1),
        (start, 1),
    ):
        assert jpeg_orientation(data) == found
        assert jpeg_orientation(memoryview(data)) == found
        padded = data[:2] + profile + data[2:]  # too long to be searched whole
        assert jpeg_orientation(padded) == found
    for end in range(2, len(start + turned) + 1):
        jpeg_orientation((start + turned)[:end])


def test_exif_as_text_in_png() -> None:
    """As ImageMagick writes it."""
    block = b"Exif\0\0" + exif(8)
    about = PngImagePlugin.PngInfo()
    about.add_text("Raw profile type exif", f"\nexif\n{len(block):8d}\n{block.hex()}\n", zip=True)
    buffer = io.BytesIO()
    Image.fromarray(scene()).transpose(STORED[8]).save(buffer, "PNG", pnginfo=about)
    assert (decode_image(buffer.getvalue(), 3) == scene()).all()
