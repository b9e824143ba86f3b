"""Masks from their files to classes: what is read, and that they go where their pictures go."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch.nn import functional

from downpour.shuffler.dataset.columns import TARGET, Columns
from downpour.shuffler.dataset.image_columns import IMAGE_TYPE, as_images
from downpour.shuffler.errors import DatasetError, DecodeError
from downpour.shuffler.images import masks
from downpour.shuffler.images.augment import AugmentConfig
from downpour.shuffler.images.decode import Decoder
from downpour.shuffler.images.reading import AS_SEEN
from downpour.shuffler.images.specs import ImageSpec
from tests.helpers.mask_pictures import png

COLUMNS = Columns(targets=("mask",), target_widths=(5,), kind="mask", target_type="int64")


def saved(image: Any, kind: str = "PNG", **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def batch(pictures: list[bytes], found: list[bytes | None]) -> pa.RecordBatch:
    rows = [[{"bytes": b, "path": None} for b in each] for each in (pictures, found)]
    return pa.record_batch(
        [pa.array(rows[0], IMAGE_TYPE), pa.array(rows[1], IMAGE_TYPE)], ["image", TARGET]
    )


def decoder(size: int, augment: AugmentConfig | None = None, **how: Any) -> Decoder:
    spec = ImageSpec(height=size, width=size, fit="whole")
    return Decoder(spec=spec, columns=COLUMNS, augment=augment or AugmentConfig(), **how)


def test_classes_are_read_from_whatever_holds_numbers() -> None:
    classes = np.array([[0, 1, 2], [3, 255, 0]], np.uint8)
    deep = Image.fromarray(classes.astype(np.uint16))
    small = np.array([[0, 3], [1, 2]], np.uint8)
    indexed = Image.fromarray(small)
    indexed.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    files: list[tuple[bytes, np.ndarray]] = [
        (png(classes), classes),
        (png(classes, "P"), classes),
        (saved(deep), classes),
        (saved(Image.fromarray(classes), "TIFF"), classes),
        (saved(Image.fromarray(small == 3)), (small == 3)),
        (saved(indexed, bits=2), small),
    ]
    for data, expected in files:
        np.testing.assert_array_equal(masks.read(data, AS_SEEN), expected)


def test_grey_values_of_few_bits_are_classes() -> None:
    """Pillow spreads them to 255, and a class 3 of 15 would be 51."""
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 2, 1, 4, 0, 0, 0, 0)  # 2x1 pixels of 4 grey bits
    pixels = zlib.compress(b"\0\x3a")
    start = b"\x89PNG\r\n\x1a\n"
    data = start + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    assert np.asarray(Image.open(io.BytesIO(data))).tolist() == [[51, 170]]
    assert masks.read(data, AS_SEEN).tolist() == [[3, 10]]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (png(np.zeros((2, 2, 3), np.uint8)), r"its pixels are colours \(RGB\)"),
        (saved(Image.fromarray(np.zeros((2, 2), np.uint8)), "JPEG"), "JPEG, which changes classes"),
        (b"hello", "not an image of a format"),
        (png(np.arange(99 * 99).reshape(99, 99).astype(np.uint8))[:80], "."),
    ],
    ids=["colours", "JPEG", "text", "cut short"],
)
def test_what_is_no_mask(data: bytes, why: str) -> None:
    with pytest.raises(DecodeError, match=why):
        masks.read(data, AS_SEEN)


@pytest.mark.parametrize("size", [(7, 5), (13, 20), (31, 3), (10, 10)])
def test_resizing_is_pytorch_s_nearest_exact(size: tuple[int, int]) -> None:
    mask = np.random.default_rng(0).integers(0, 9, (10, 13)).astype(np.uint8)
    expected = functional.interpolate(
        torch.from_numpy(mask)[None, None].float(), size, mode="nearest-exact"
    )[0, 0]
    np.testing.assert_array_equal(masks.resize(mask, *size), expected.numpy())


def test_a_mask_goes_where_its_picture_goes() -> None:
    """A picture that shows its own mask still does after crops, mirrors and resizing.

    Beside edges, where a picture's colours are means.
    """
    rng = np.random.default_rng(1)
    pictures, files = [], []
    for _ in range(24):
        classes = rng.integers(0, 5, (4, 5)).astype(np.uint8).repeat(16, 0).repeat(16, 1)
        files.append(png(classes))
        pictures.append(png(np.repeat(classes[:, :, None] * 50, 3, 2)))
    crops = AugmentConfig(random_crop=True, min_area=0.3, mirror=True)
    rows = np.arange(24)
    found = decoder(48, crops, seed=3).decode(batch(pictures, files), rows=rows, epoch=2)
    shown = np.rint(found.inputs[:, 0] * 255 / 50)
    exact = np.abs(found.inputs[:, 0] * 255 - 50 * shown) < 1
    assert exact.mean() > 0.8
    agree = shown == found.labels
    # One pixel of each edge may lie on its other side.
    assert agree[exact].mean() > 0.995
    plain = decoder(48).decode(batch(pictures, files), rows=rows)
    assert (plain.labels != found.labels).any((1, 2)).all()
    assert plain.labels.dtype == np.int64
    np.testing.assert_array_equal(plain.sizes, [[64, 80]] * 24)


def test_a_cut_goes_by_the_same_view() -> None:
    classes = np.arange(5, dtype=np.uint8).repeat(16)[:, None].repeat(64, 1)
    rows = batch([png(np.repeat(classes[:, :, None] * 50, 3, 2))], [png(classes)])
    spec = ImageSpec(height=28, width=28, fit="crop")
    found = Decoder(spec=spec, columns=COLUMNS).decode(rows, rows=np.arange(1))
    shown = np.rint(found.inputs[0, 0] * 255 / 50)
    assert (shown == found.labels[0]).mean() > 0.9
    assert set(np.unique(found.labels)) == {0, 1, 2, 3, 4} & set(np.unique(shown).astype(int))


def test_a_bad_mask_is_told_with_its_row_or_left_out() -> None:
    picture, mask = png(np.zeros((4, 6, 3), np.uint8)), png(np.zeros((4, 6), np.uint8))
    turned = png(np.zeros((6, 4), np.uint8))
    rows = np.array([70, 71])
    for bad, why in (
        (
            png(np.zeros((5, 6), np.uint8)),
            "has 5x6 pixels, and its picture 4x6: make them alike",
        ),
        (turned, "with --orientation ignore pictures are not turned"),
        (png(np.zeros((4, 6, 3), np.uint8)), "its pixels are colours"),
        (None, "it has no bytes"),
    ):
        both = batch([picture, picture], [mask, bad])
        with pytest.raises(DecodeError, match="the mask of row 71 cannot be used") as error:
            decoder(4).decode(both, rows=rows)
        assert why in str(error.value)
        assert "\n" not in str(error.value)
        left = decoder(4, on_bad_image="skip").decode(both, rows=rows)
        assert (left.kept.tolist(), len(left.labels), len(left.problems)) == ([0], 1, 1)
    beyond = batch([picture], [png(np.full((4, 6), 7, np.uint8))])
    with pytest.raises(DatasetError, match=r"class 7 out of range: the mask of row 70 must have"):
        decoder(4).decode(beyond, rows=rows[:1])


def test_columns_of_images_in_all_shapes_become_one() -> None:
    data = [b"ab", None, b"c"]
    expected = [{"bytes": b"ab", "path": None}, None, {"bytes": b"c", "path": None}]
    for kind in (pa.binary(), pa.large_binary(), pa.binary_view()):
        assert as_images(pa.array(data, kind)).to_pylist() == expected
    other = pa.struct([("path", pa.large_string()), ("bytes", pa.large_binary())])
    rows = [{"bytes": b"x", "path": "p"}, None, {"bytes": None, "path": "q"}]
    assert as_images(pa.array([{"bytes": b"0"}, *rows], other)[1:]).to_pylist() == rows
    alone = pa.array([{"bytes": b"x"}], pa.struct([("bytes", pa.binary())]))
    assert as_images(alone).to_pylist() == [{"bytes": b"x", "path": None}]
