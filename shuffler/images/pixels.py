"""One image at a time: from the bytes of a file to the pixels that a network sees.

JPEGs go through libjpeg-turbo (simplejpeg), which gave the same pixels as Pillow in 0.72 of its
time for photographs and in 0.11 of it for 32x32 images. Plain PNGs go through OpenCV
(`formats.png`). What neither reads (other formats, CMYK, damaged streams that can be mended) goes
through Pillow (`any_format`). Resizing, turning and colours are OpenCV's. All three release
Python's lock while they work. What is to be cut and changed is decided in `crops` and `augment`;
batches are `decode`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from downpour.shuffler.images import any_format, bounds
from downpour.shuffler.images.any_format import Buffer, Pixels
from downpour.shuffler.images.crops import View
from downpour.shuffler.images.formats.png import decode_plain
from downpour.shuffler.images.orientation import UPRIGHT, jpeg_orientation
from downpour.shuffler.images.reading import AS_SEEN, Reading

_COLOUR_SPACES: Final = {1: "GRAY", 3: "RGB"}
_JPEG_START: Final = b"\xff\xd8"
_TRANSPOSED: Final = frozenset((5, 6, 7, 8))
"""Orientations that exchange height and width."""
_FLIPS: Final = {2: 1, 4: 0, 7: -1}
"""Orientations that end with a flip: 0 of top and bottom, 1 of left and right, -1 of both."""
_ROTATIONS: Final = {
    3: cv2.ROTATE_180,
    6: cv2.ROTATE_90_CLOCKWISE,
    8: cv2.ROTATE_90_COUNTERCLOCKWISE,
}

cv2.setNumThreads(0)  # concurrency is by image, and whoever called decides how much of it


@dataclass(slots=True)
class ImageFile:
    """An image of known size, decoded or yet to be."""

    data: Buffer
    height: int
    """Pixels from top to bottom, as it will be seen: turned upright, if that is asked for."""
    width: int
    """Pixels from left to right, likewise."""
    reading: Reading = AS_SEEN
    orientation: int = UPRIGHT
    """How the pixels have yet to be turned, 1 to 8 as in EXIF."""
    decoded: Pixels | None = None
    """The pixels, turned already; None if they have yet to be decoded."""
    note: str | None = None
    """What is to be told of an image that was decoded."""


def open_image(data: Buffer, channels: int, reading: Reading = AS_SEEN) -> ImageFile:
    """Return the size of an image file; what has no size that is quickly read is decoded at once.

    Raises:
        DecodeError: the bytes are not an image.
    """
    if data[:2] == _JPEG_START:
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            space = ""
        if space in ("RGB", "YCbCr", "Gray"):
            bounds.check_jpeg(data, height, width)
            if reading.orientation == "follow" and (found := jpeg_orientation(data)) != UPRIGHT:
                if found in _TRANSPOSED:
                    height, width = width, height
                return ImageFile(data, height, width, reading, found)
            return ImageFile(data, height, width, reading)
    pixels, note = _any(data, channels, reading)
    height, width = pixels.shape[:2]
    return ImageFile(data, height, width, reading, decoded=pixels, note=note)


def decode_file(file: ImageFile, channels: int, min_height: int = 0, min_width: int = 0) -> Pixels:
    """Return an image's pixels, perhaps at a half or less of its size.

    JPEGs are decoded at the least of the sizes 1/2, 3/8, 1/4 and 1/8 that has `min_height` rows
    and `min_width` columns, which costs less; 0 and 0 ask for the image's own size.

    Raises:
        DecodeError: the bytes are damaged.
    """
    if file.decoded is not None:
        return file.decoded
    smaller = 0 < 2 * min_height <= file.height + 1 and 0 < 2 * min_width <= file.width + 1
    if file.orientation in _TRANSPOSED:
        min_height, min_width = min_width, min_height
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(
            file.data,
            _COLOUR_SPACES[channels],
            min_height=min_height if smaller else 0,
            min_width=min_width if smaller else 0,
            min_factor=2 if smaller else 1,
        )
    except ValueError:  # it is strict; Pillow mends what can be mended, and says what cannot
        return _any(file.data, channels, file.reading)[0]
    return turn(pixels, file.orientation)


def decode_any(data: Buffer, channels: int, reading: Reading = AS_SEEN) -> Pixels:
    """Return the pixels of an image file of any format that is read: [h, w, channels].

    Raises:
        DecodeError: see `any_format.decode`.
    """
    return _any(data, channels, reading)[0]


def _any(data: Buffer, channels: int, reading: Reading) -> tuple[Pixels, str | None]:
    if (plain := decode_plain(data, channels)) is not None:
        return plain, None
    pixels, orientation, note = any_format.decode(data, channels, reading)
    return turn(pixels, orientation), note


def turn(pixels: Pixels, orientation: int) -> Pixels:
    """Return pixels [h, w, c] upright that are stored with an EXIF orientation of 1 to 8."""
    if orientation == UPRIGHT:
        return pixels
    turned: Any = pixels
    if orientation in (5, 7):
        turned = cv2.transpose(turned)
    if orientation in _FLIPS:
        turned = cv2.flip(turned, _FLIPS[orientation])
    if orientation in _ROTATIONS:
        turned = cv2.rotate(turned, _ROTATIONS[orientation])
    return turned.reshape(*turned.shape[:2], pixels.shape[2])  # type: ignore[no-any-return]


def resize(pixels: Pixels, height: int, width: int) -> Pixels:
    """Return the pixels at another size: bilinear, or means of areas from a shrinking by 2 on."""
    if pixels.shape[:2] == (height, width):
        return pixels
    shrinks = pixels.shape[0] >= 2 * height and pixels.shape[1] >= 2 * width
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized: Any = cv2.resize(pixels, (width, height), interpolation=method)
    return resized.reshape(height, width, pixels.shape[2])  # type: ignore[no-any-return]


def crop_file(file: ImageFile, channels: int, box: list[int], height: int, width: int) -> Pixels:
    """Return a box (top, left, height, width) of an image, resized to height x width.

    The image is decoded no larger than the box needs.
    """
    top, left, tall, wide = box
    pixels = decode_file(
        file,
        channels,
        min_height=-(-file.height * height // tall),
        min_width=-(-file.width * width // wide),
    )
    rows, columns = pixels.shape[:2]
    if (rows, columns) != (file.height, file.width):
        bottom, right = top + tall, left + wide
        top, bottom = (round(edge * rows / file.height) for edge in (top, bottom))
        left, right = (round(edge * columns / file.width) for edge in (left, right))
        tall, wide = bottom - top, right - left
    return resize(pixels[top : top + tall, left : left + wide], height, width)


def distort(pixels: Pixels, affine: NDArray[np.float64]) -> Pixels:
    """Return the pixels under an affine map of their colours, rounded and clipped to 0..255."""
    changed: Any = cv2.transform(pixels, affine)
    return changed.reshape(pixels.shape)  # type: ignore[no-any-return]


def channel_means(pixels: Pixels) -> tuple[float, ...]:
    """Return the mean of each channel."""
    return cv2.mean(pixels)[: pixels.shape[2]]


def mirror(pixels: Pixels) -> Pixels:
    """Return the pixels with left and right exchanged."""
    flipped: Any = cv2.flip(pixels, 1)
    return flipped.reshape(pixels.shape)  # type: ignore[no-any-return]


def put_planes(pixels: Pixels, planes: Pixels) -> None:
    """Copy pixels [h, w, channels] to planes [channels, h, w]."""
    if len(planes) == 1:
        planes[0] = pixels[:, :, 0]
    else:
        cv2.split(pixels, list(planes))


def render(pixels: Pixels, views: tuple[View, ...], size: int) -> NDArray[np.uint8]:
    """Return what a network of size x size sees through `views`: [views, channels, size, size].

    Args:
        pixels: the whole image, whose height and width the views were made for.
        views: see `crops`.
        size: side of the network's input.
    """
    seen = np.empty((len(views), pixels.shape[2], size, size), dtype=np.uint8)
    resized: dict[tuple[int, int], Pixels] = {}
    squares: dict[tuple[int, ...], Pixels] = {}
    for number, view in enumerate(views):
        image = (view.image_height, view.image_width)
        if image not in resized:
            resized[image] = resize(pixels, *image)
        place = (*image, view.top, view.left, view.side)
        if place not in squares:
            square = resized[image][
                view.top : view.top + view.side, view.left : view.left + view.side
            ]
            squares[place] = resize(square, size, size)
        square = squares[place]
        put_planes(mirror(square) if view.mirror else square, seen[number])
    return seen
