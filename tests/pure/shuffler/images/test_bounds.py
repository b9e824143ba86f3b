"""What an image would cost is known from its header, and nothing is taken before it is judged."""

from __future__ import annotations

import pytest

from downpour.shuffler.errors import DecodeError
from downpour.shuffler.images import bounds, headers
from downpour.shuffler.images.crops import views_of
from tests.helpers import odd_headers


@pytest.mark.parametrize("kind", odd_headers.FORMATS)
def test_images_of_ten_formats_open_and_huge_ones_do_not(kind):
    with bounds.open_image(bytes(odd_headers.small(kind))) as image:
        assert image.size == ((24, 14) if kind == "ICO" else (40, 24))
    for height, width in ((60_000, 60_000), (9_000, 9_000)):
        with pytest.raises(DecodeError) as caught:
            bounds.open_image(odd_headers.patched(kind, height, width))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "WEBP", "JPEG", "JPEG2000", "ICO"])
def test_a_size_is_read_from_the_header(kind):
    assert headers.declared_size(odd_headers.patched(kind, 4097, 513)) == (4097, 513)


def test_icons_are_as_large_as_the_images_in_them():
    icon = odd_headers.patched("ICO", 20_000, 20_000)
    with pytest.raises(DecodeError, match="20000x20000"):
        bounds.open_image(icon)


@pytest.mark.parametrize(
    ("height", "width", "depth", "colour", "opens"),
    [
        (7000, 7000, 8, 2, True),  # 49 million pixels, 14 bytes each
        (7300, 7300, 8, 2, False),  # more than any image may have
        (5000, 5000, 8, 6, True),
        (6000, 6000, 8, 6, False),  # blended with white, a pixel takes twice as much
        (5000, 5000, 16, 0, True),
        (7000, 7000, 16, 0, False),
    ],
)
def test_what_a_pixel_takes_depends_on_its_mode(height, width, depth, colour, opens):
    data = bytearray(odd_headers.png(1, 1, depth, colour))
    data = odd_headers.resized_png(data, height, width)
    if opens:
        bounds.open_image(data).close()
    else:
        with pytest.raises(DecodeError, match=f"{height}x{width}.*resize it"):
            bounds.open_image(data)


def test_scans_of_a_progressive_jpeg_are_counted():
    few, many = odd_headers.scans(4000, 4000, 2), odd_headers.scans(4000, 4000, 900)
    bounds.check_jpeg(few, 4000, 4000)
    with pytest.raises(DecodeError, match="scans; save it again as a baseline JPEG"):
        bounds.check_jpeg(many, 4000, 4000)
    bounds.check_jpeg(odd_headers.scans(64, 64, 900), 64, 64)
    assert headers.jpeg_scans(bytes(odd_headers.small("JPEG"))) == 1
    assert headers.jpeg_scans(few[:20]) == 1


def test_jpeg_2000_in_small_pieces_is_refused():
    data = odd_headers.small("JPEG2000")
    at = data.index(b"\xff\x52")
    blocks = bytes(data[: at + 10]) + b"\0\0" + bytes(data[at + 12 :])
    with pytest.raises(DecodeError, match="pieces have 16 pixels"):
        bounds.open_image(blocks)
    layers = bytes(data[: at + 6]) + b"\xff\xff" + bytes(data[at + 8 :])
    with pytest.raises(DecodeError, match="65535 layers"):
        bounds.open_image(layers)
    tiled = odd_headers.patched("JPEG2000", 3000, 3000).replace(
        b"\x00\x00\x0b\xb8" * 2 + b"\0" * 8 + b"\x00\x00\x0b\xb8" * 2,
        b"\x00\x00\x0b\xb8" * 2 + b"\0" * 8 + b"\x00\x00\x00\x08" * 2,
    )
    with pytest.raises(DecodeError, match="tiles have 8x8 pixels"):
        bounds.open_image(tiled)


def test_tiff_may_not_have_tiles_that_are_larger_than_memory():
    data = odd_headers.tiled_tiff(64, 64, 40_000)
    with pytest.raises(DecodeError, match="tiles have 40000x40000 pixels"):
        bounds.open_image(data)
    bounds.open_image(odd_headers.tiled_tiff(64, 64, 64)).close()


def test_a_thin_image_is_judged_by_its_resized_size():
    bounds.check_views(views_of(1, 100, 2000, 224))
    with pytest.raises(DecodeError, match=r"resized to 256x16776960 pixels.*crop it"):
        bounds.check_views(views_of(1, 1, 65535, 224))
    # All four sizes of 144 crops are kept at a time.
    views = views_of(144, 3, 400, 224)
    bounds.check_views(views_of(1, 3, 400, 224))
    with pytest.raises(DecodeError, match="so thin"):
        bounds.check_views(views_of(144, 1, 400, 224))
    bounds.check_views(views)


@pytest.mark.parametrize("size", [(0, 5), (70_000, 1), (1, 70_000), (8000, 8000)])
def test_sides_and_pixels_are_bounded(size):
    with pytest.raises(DecodeError, match=f"{size[0]}x{size[1]} pixels"):
        bounds.check_size(*size)


def test_what_is_no_image_is_named_so():
    for data in (b"", b"<!doctype html><html></html>", b"%PDF-1.4\n1 0 obj", bytes(64)):
        with pytest.raises(DecodeError, match="not an image of a format that is read"):
            bounds.open_image(data)
