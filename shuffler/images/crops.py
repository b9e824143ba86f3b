"""Which parts of an image a network sees at evaluation: one crop, ten, or GoogLeNet's 144.

Geometry alone, as pure functions of sizes: no pixel is touched here (`pixels.render` cuts what a
`View` says), and random crops for training are `augment`'s.

    single_view     shorter side to 256, the central square of 224    BN paper, section 4.2
    ten_views       of the central 256x256: corners, centre; mirrored    Krizhevsky et al. 2012
    views_144       4 scales x 3 squares x 6 crops x 2 mirrors        Szegedy et al. 2014, section 7

The sizes are those of a 224-pixel network. For a network of another size they are scaled in
proportion (a 56-pixel network sees the shorter side at 64), so that crops cover the same share of
the image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from downpour.shuffler.errors import DecodeError

Crops = Literal[1, 10, 144]
"""How many crops of an image are scored."""

REFERENCE_SIZE: Final = 224
"""The network's input for which `SINGLE_SCALE` and `SCALES` are given."""

SINGLE_SCALE: Final = 256
"""Shorter side of the resized image for one crop and for ten."""

SCALES: Final = (256, 288, 320, 352)
"""Shorter sides of the resized images for 144 crops."""


@dataclass(frozen=True, slots=True)
class View:
    """One crop: resize the whole image, cut a square, resize that if need be, mirror it."""

    image_height: int
    """Pixels from top to bottom that the whole image is resized to."""

    image_width: int
    """Pixels from left to right that the whole image is resized to."""

    top: int
    """First row of the square in the resized image."""

    left: int
    """First column of the square in the resized image."""

    side: int
    """Side of the square; where it is not the network's size, the square is resized to that."""

    mirror: bool = False
    """Whether left and right are exchanged at last."""


def single_view(height: int, width: int, size: int) -> tuple[View, ...]:
    """Return the one view of an image of height x width for a network of size x size.

    The shorter side is resized to 256/224 of `size`, and the centre is cut.
    """
    image = _resized(height, width, _scaled(SINGLE_SCALE, size))
    return (_cut(image, _centre(image, size), size),)


def ten_views(height: int, width: int, size: int) -> tuple[View, ...]:
    """Return ten views: four corners and the centre of the central square, then their mirrors."""
    scale = _scaled(SINGLE_SCALE, size)
    image = _resized(height, width, scale)
    views = tuple(_cut(image, at, size) for at in _five(_centre(image, scale), scale, size))
    return views + tuple(_mirrored(view) for view in views)


def views_144(
    height: int, width: int, size: int, scales: tuple[int, ...] = SCALES
) -> tuple[View, ...]:
    """Return GoogLeNet's views: 36 for each of `scales`, so 144 with its four.

    Of each scale (the shorter side of the resized image) three squares: left, centre and right of
    a wide image, top, centre and bottom of a tall one. Of each square the four corners and the
    centre at `size`, and the square itself resized to `size`. Each of them as it is, then all
    mirrored.

    The order is: scale, square, (top left, top right, bottom left, bottom right, centre, whole),
    for the first half; the second half is the first one mirrored.
    """
    views: list[View] = []
    for given in scales:
        scale = _scaled(given, size)
        image = _resized(height, width, scale)
        spare_rows, spare_columns = image[0] - scale, image[1] - scale
        for third in range(3):
            square = (spare_rows * third // 2, spare_columns * third // 2)
            views += [_cut(image, at, size) for at in _five(square, scale, size)]
            views.append(_cut(image, square, scale))
    return tuple(views) + tuple(_mirrored(view) for view in views)


Views = Callable[[int, int, int], tuple[View, ...]]
"""From height and width of an image and the network's size to what the network sees."""

VIEWS: Final[Mapping[int, Views]] = MappingProxyType(
    {1: single_view, 10: ten_views, 144: views_144}
)
"""The three ways by their number of crops."""


def views_of(crops: int, height: int, width: int, size: int) -> tuple[View, ...]:
    """Return the views of an image by the number of crops: 1, 10 or 144.

    Args:
        crops: how many.
        height: of the image as it is, in pixels.
        width: of the image as it is, in pixels.
        size: side of the network's square input, in pixels.

    Raises:
        DecodeError: there is no way with so many crops, or a size is not positive.
    """
    if crops not in VIEWS:
        known = ", ".join(map(str, VIEWS))
        raise DecodeError(f"crops={crops} is not a way to see an image; choose of {known}")
    if min(height, width, size) < 1:
        raise DecodeError(
            f"an image of {height}x{width} has no crops of {size}x{size}; give sizes of 1 or more"
        )
    return VIEWS[crops](height, width, size)


def _scaled(scale: int, size: int) -> int:
    """Return a shorter side for a network of `size`, given that for one of 224; rounded."""
    return max(size, (2 * scale * size + REFERENCE_SIZE) // (2 * REFERENCE_SIZE))


def _resized(height: int, width: int, scale: int) -> tuple[int, int]:
    """Return height and width with the shorter side at `scale`, the longer one in proportion."""
    short = min(height, width)
    long = (2 * max(height, width) * scale + short) // (2 * short)
    return (scale, long) if height <= width else (long, scale)


def _centre(image: tuple[int, int], side: int) -> tuple[int, int]:
    return (image[0] - side) // 2, (image[1] - side) // 2


def _five(square: tuple[int, int], scale: int, size: int) -> tuple[tuple[int, int], ...]:
    """Return where the corners and the centre of a square of `scale` begin."""
    top, left = square
    spare = scale - size
    corners = tuple((top + row, left + column) for row in (0, spare) for column in (0, spare))
    return (*corners, (top + spare // 2, left + spare // 2))


def _cut(image: tuple[int, int], at: tuple[int, int], side: int) -> View:
    return View(image[0], image[1], at[0], at[1], side)


def _mirrored(view: View) -> View:
    return View(view.image_height, view.image_width, view.top, view.left, view.side, mirror=True)
