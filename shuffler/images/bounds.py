"""What an image may cost, judged by its header before its pixels take memory.

A small file can declare a large image. So every file is looked at here before it is decoded,
wherever it enters: in training, scoring, prediction and serving. Three things are bounded:

* **Memory.** A decoder takes so many bytes a pixel (`_DECODER_BYTES`, measured), and what is made
  of the pixels takes some more. The sum may be `MAX_BYTES`.
* **Sides and pixels**, to `MAX_SIDE` and `MAX_PIXELS`.
* **The resized image**, which is what makes a thin image large: to `MAX_RESIZED_PIXELS`.

Formats that hide work behind a small header are looked into: how many scans a JPEG has, how JPEG
2000 and TIFF are tiled (`headers`). Pixels are decoded elsewhere.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from downpour.shuffler.dataset.files import one_line
from downpour.shuffler.errors import DecodeError, ImageTooLarge, UnknownFormat
from downpour.shuffler.images import headers
from downpour.shuffler.images.headers import Buffer

if TYPE_CHECKING:
    from downpour.shuffler.images.crops import View

MAX_SIDE: Final = 1 << 16
"""Most pixels in a row or in a column."""

MAX_PIXELS: Final = 48 << 20
"""Most pixels of an image: 50 million, as the largest photos of phones have."""

MAX_BYTES: Final = 768 << 20
"""Most memory that decoding one image may take, by the estimate here."""

MAX_RESIZED_PIXELS: Final = 48 << 20
"""Most pixels of an image once it is resized, over all sizes that are made of it at a time."""

MAX_SCANNED_PIXELS: Final = 1 << 30
"""Most pixels times scans of a progressive JPEG: each scan goes over the whole image."""

_LEAST_SCAN_BYTES: Final = 10
"""Fewest bytes of a scan: its header."""

FORMATS: Final = (
    *("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "TGA", "ICO", "JPEG2000", "AVIF"),
)
"""What is read, by Pillow's names. Others are not: some start programs or have no bound."""

_DECODER_BYTES: Final = {"WEBP": 16, "AVIF": 16, "JPEG2000": 40}
"""Bytes a pixel that a decoder takes besides the pixels themselves; none for other formats."""

_RUN_LENGTH_BYTES: Final = 24
"""The same for BMP in run lengths, which Pillow decodes in Python: its time is what is bounded."""

_OPAQUE_BYTES, _TRANSPARENT_BYTES, _DEEP_BYTES = 10, 24, 20
"""Bytes a pixel of what is made of decoded pixels: an array, one blended with white, one of 16 bits
brought to 8."""

_PIXEL_BYTES: Final = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2, "LA": 4}
"""Bytes that Pillow keeps of a pixel, by its mode; 4 for others."""


def check_size(height: int, width: int) -> None:
    """Check sides and pixels that a file declares.

    Raises:
        DecodeError: there are none.
        ImageTooLarge: there are too many.
    """
    if height < 1 or width < 1:
        raise DecodeError(f"its header says {height}x{width} pixels")
    if max(height, width) > MAX_SIDE:
        raise ImageTooLarge(
            f"its header says {height}x{width} pixels, and a side may have {MAX_SIDE:,}; resize it"
        )
    if height * width > MAX_PIXELS:
        raise ImageTooLarge(
            f"its header says {height}x{width} pixels, and an image may have {MAX_PIXELS:,}; "
            "resize it"
        )


def check_resized(sizes: Iterable[tuple[int, int]]) -> None:
    """Check the sizes (height, width) that an image is resized to, all of which are kept at a time.

    Raises:
        ImageTooLarge: they have too many pixels together.
    """
    found = set(sizes)
    if sum(height * width for height, width in found) > MAX_RESIZED_PIXELS:
        height, width = max(found, key=lambda size: size[0] * size[1])
        raise ImageTooLarge(
            f"it is so thin that it would be resized to {height}x{width} pixels, and there may be "
            f"{MAX_RESIZED_PIXELS:,}; crop it"
        )


def check_views(views: Iterable[View]) -> None:
    """Check the sizes to which an image is resized for its views (`crops`).

    Raises:
        ImageTooLarge: they have too many pixels together.
    """
    check_resized((view.image_height, view.image_width) for view in views)


def check_jpeg(data: Buffer, height: int, width: int) -> None:
    """Check a JPEG file of a size that is known, before it is decoded to one or three channels.

    Raises:
        ImageTooLarge: it has too many pixels, or too many scans for its size.
    """
    check_size(height, width)
    if height * width * len(data) <= MAX_SCANNED_PIXELS * _LEAST_SCAN_BYTES:
        return
    scans = headers.jpeg_scans(data)
    if scans * height * width > MAX_SCANNED_PIXELS:
        raise ImageTooLarge(
            f"it goes over its {height}x{width} pixels in {scans:,} scans; save it again as a "
            "baseline JPEG"
        )


def open_image(data: Buffer) -> Any:
    """Return an image as Pillow opens it, checked and not yet decoded.

    Raises:
        UnknownFormat: it is not an image of a format that is read.
        DecodeError: it is damaged.
        ImageTooLarge: it would take too much memory or time.
    """
    from PIL import Image, UnidentifiedImageError

    _silence()
    declared = headers.declared_size(data)
    if declared is not None:  # some decoders take memory as soon as a file is opened
        check_size(*declared)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise UnknownFormat(f"it is not an image of a format that is read ({known})") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageTooLarge(
            f"its header says more pixels than an image may have, {MAX_PIXELS:,}; resize it"
        ) from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        raise DecodeError(one_line(error)) from error
    try:
        _check_opened(image, data, declared or (0, 0))
    except BaseException:
        image.close()
        raise
    return image


@functools.cache
def _silence() -> None:
    """Have Pillow say nothing of images that are large: what may be is decided here."""
    from PIL import Image

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def _check_opened(image: Any, data: Buffer, declared: tuple[int, int]) -> None:
    width, height = image.size
    if image.format == "ICO":  # its directory may say less than its images do
        height, width = max(height, declared[0]), max(width, declared[1])
    if image.format in ("JPEG", "MPO"):
        check_jpeg(data, height, width)
    else:
        check_size(height, width)
    if image.format == "TIFF":
        headers.check_tiff(image, MAX_BYTES)
    needed = height * width * _bytes_a_pixel(image, data)
    if needed > MAX_BYTES:
        raise ImageTooLarge(
            f"its {height}x{width} pixels would take {needed >> 20} MB to decode as "
            f"{image.format} of mode {image.mode}, and an image may take {MAX_BYTES >> 20} MB; "
            "resize it"
        )


def _bytes_a_pixel(image: Any, data: Buffer) -> int:
    decoder = _DECODER_BYTES.get(image.format, 0)
    if image.format in ("JPEG", "MPO") and headers.jpeg_scans(data) > 1:
        decoder = 2 * len(image.getbands())  # every coefficient is kept
    if image.tile and image.tile[0][0] == "bmp_rle":
        decoder = _RUN_LENGTH_BYTES
    made = _OPAQUE_BYTES
    if image.mode.startswith(("I", "F")):
        made = _DEEP_BYTES
    elif image.has_transparency_data:
        made = _TRANSPARENT_BYTES
    return decoder + _PIXEL_BYTES.get(image.mode, 4) + made
