"""Masks: image files that have a class in each pixel, from bytes to the classes that a network is
given.

A mask goes where its picture goes: it is cut, mirrored and resized alike, and of the pixels that
a resized one falls on it takes the nearest, since classes have no mean. Not here: pictures
(`decode`), all masks of a split (`mask_survey`), and which columns are masks
(`cluster.training.masks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from downpour.shuffler.dataset import files
from downpour.shuffler.dataset.columns import TARGET, Columns
from downpour.shuffler.dataset.reader import NOT_COUNTED
from downpour.shuffler.errors import DatasetError, DecodeError
from downpour.shuffler.images.bounds import open_image
from downpour.shuffler.images.crops import View
from downpour.shuffler.images.orientation import UPRIGHT, opened_orientation
from downpour.shuffler.images.reading import Reading
from downpour.shuffler.images.rows import Buffer, image_buffers, unusable_mask

Mask = NDArray[np.integer[Any]]
"""A class for each pixel, [height, width]."""

MODES: Final = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B")
"""Pillow's modes in which a pixel is a whole number: grey, or an index of a palette."""
_SPREAD: Final = {"L;2": 85, "L;4": 17}
"""What Pillow multiplies grey values of 2 and 4 bits by, so that the highest is white."""
_TRANSPOSED: Final = (5, 6, 7, 8)


def read(data: Buffer, reading: Reading) -> Mask:
    """Return the classes in a mask's file: grey values, or the indices of a palette.

    Args:
        data: the file.
        reading: whether it is turned as its EXIF orientation says, if it has one.

    Raises:
        DecodeError: the bytes are no image, or one whose pixels are no classes.
    """
    try:
        with open_image(data) as image:
            if image.format in ("JPEG", "MPO"):
                raise DecodeError("it is a JPEG, which changes classes: save masks as PNG")
            stored = _stored_mode(image)
            image.load()
            if image.mode not in MODES:
                raise DecodeError(
                    f"its pixels are colours ({image.mode}), and a mask has one number for each: "
                    "save the classes as a grey or a palette PNG"
                )
            if reading.orientation == "follow" and opened_orientation(image) != UPRIGHT:
                image = _upright(image)  # noqa: PLW2901
            values: Any = np.asarray(image)
    except DecodeError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        raise DecodeError(files.one_line(error)) from error
    if stored in _SPREAD:
        values = values // _SPREAD[stored]
    return values.astype(np.uint8) if values.dtype == np.bool_ else values  # type: ignore[no-any-return]


def _stored_mode(image: Any) -> str:
    """How the pixels are stored, in Pillow's words."""
    if not image.tile:
        return str(image.mode)
    told = image.tile[0][3]
    return str(told[0] if isinstance(told, tuple) else told)


def _upright(image: Any) -> Any:
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def size_of(data: Buffer, reading: Reading) -> tuple[int, int]:
    """Return the height and the width of a picture as it is seen, by its header.

    Raises:
        DecodeError: the bytes are no image, or a header that is damaged.
    """
    try:
        with open_image(data) as image:
            turned = reading.orientation == "follow" and opened_orientation(image) in _TRANSPOSED
            width, height = image.size
    except DecodeError:
        raise
    except Exception as error:
        raise DecodeError(files.one_line(error)) from error
    return (width, height) if turned else (height, width)


def check_size(mask: Mask, height: int, width: int) -> None:
    """Check that a mask has the size of its picture.

    Raises:
        DecodeError: it has not.
    """
    if mask.shape == (height, width):
        return
    turned = mask.shape == (width, height)
    remedy = "with --orientation ignore pictures are not turned" if turned else "make them alike"
    raise DecodeError(
        f"it has {mask.shape[0]}x{mask.shape[1]} pixels, and its picture {height}x{width}: {remedy}"
    )


def check_classes(mask: Mask, num_classes: int, what: str) -> None:
    """Check that all classes of a mask are in [0, num_classes), or do not count.

    Raises:
        DatasetError: one is not; names `what`.
    """
    outside = (mask < 0) | (mask >= num_classes)
    if not outside.any():
        return
    outside &= mask != NOT_COUNTED
    if outside.any():
        raise DatasetError(
            f"class {int(mask[outside][0])} out of range: the mask of {what} must have classes in "
            f"[0, {num_classes}), or {NOT_COUNTED} for what does not count; correct it or the "
            "number of classes"
        )


def resize(mask: Mask, height: int, width: int) -> Mask:
    """Return a mask at another size: of each pixel the class at its centre.

    Pixel i of n is at `(i + 1/2) m / n` of m, as in `pixels.resize` and in PyTorch's
    `nearest-exact`.
    """
    if mask.shape == (height, width):
        return mask
    rows = (np.arange(height) + 0.5) * (mask.shape[0] / height)
    columns = (np.arange(width) + 0.5) * (mask.shape[1] / width)
    found: Mask = mask[rows.astype(np.int64)[:, None], columns.astype(np.int64)]
    return found


def cut(
    mask: Mask,
    height: int,
    width: int,
    *,
    box: list[int] | None = None,
    view: View | None = None,
    mirror: bool = False,
) -> Mask:
    """Return a mask as its picture is seen: `[height, width]`.

    Args:
        mask: of the size of its picture.
        height: of what is seen.
        width: of what is seen.
        box: a part (top, left, height, width) that is resized.
        view: how the whole picture is resized and cut.
        mirror: whether left and right are exchanged.
    """
    if box is not None:
        top, left, tall, wide = box
        mask = mask[top : top + tall, left : left + wide]
    elif view is not None:
        mask = resize(mask, view.image_height, view.image_width)
        mask = mask[view.top : view.top + view.side, view.left : view.left + view.side]
    mask = resize(mask, height, width)
    return mask[:, ::-1] if mirror else mask


class RowMasks:
    """The masks of some rows, on their way to a network."""

    def __init__(
        self,
        batch: pa.RecordBatch,
        rows: NDArray[np.int64] | None,
        reading: Reading,
        size: tuple[int, int],
        columns: Columns,
    ) -> None:
        """Open the masks.

        Args:
            batch: n rows with encoded masks.
            rows: int64 [n], the rows' numbers: for messages only.
            reading: whether masks are turned as their EXIF orientation says.
            size: height and width that the network takes.
            columns: what the targets are.
        """
        self._batch, self._rows, self._columns = batch, rows, columns
        self._masks, self._wrong = opened(batch, reading)
        self.seen = np.empty((len(batch), *size), dtype=np.int64)
        """What the network is given, int64 [n, height, width]; filled by `put`."""

    def unusable(self, sizes: Sequence[tuple[int, int] | None]) -> dict[int, str]:
        """Return a line for each row whose mask cannot be used, by its position.

        Args:
            sizes: height and width of each row's picture; None if it has none, and is told of.
        """
        lines = {}
        for position, (mask, size) in enumerate(zip(self._masks, sizes, strict=True)):
            if size is None:
                continue
            error = self._wrong.get(position)
            try:
                if error is not None:
                    raise error
                if mask is not None:
                    check_size(mask, *size)
            except DecodeError as found:
                lines[position] = unusable_mask(self._batch, position, self._rows, found)
        return lines

    def put(
        self,
        position: int,
        place: int,
        *,
        box: list[int] | None = None,
        view: View | None = None,
        mirror: bool = False,
    ) -> None:
        """Put the mask of the row at `position` into `seen` at `place`; see `cut`.

        Raises:
            DatasetError: a class is out of range.
        """
        mask = self._masks[position]
        assert mask is not None, "a row without a mask is left out"
        height, width = self.seen.shape[1:]
        found = cut(mask, height, width, box=box, view=view, mirror=mirror)
        row = position if self._rows is None else self._rows[position]
        check_classes(found, self._columns.target_width, f"row {row}")
        self.seen[place] = found


def opened(
    batch: pa.RecordBatch, reading: Reading
) -> tuple[list[Mask | None], dict[int, DecodeError]]:
    """Return the mask of each row, None for what is none, and what is wrong with those.

    Args:
        batch: n rows with encoded masks.
        reading: whether masks are turned as their EXIF orientation says.
    """
    masks: list[Mask | None] = []
    wrong: dict[int, DecodeError] = {}
    for position, data in enumerate(image_buffers(batch.column(TARGET))):
        try:
            if data is None:
                raise DecodeError("it has no bytes")
            masks.append(read(data, reading))
        except DecodeError as error:
            masks.append(None)
            wrong[position] = error
    return masks, wrong
