"""Masks that a network finds: from its outputs to image files, and to words."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from downpour.cluster.errors import UserError
from downpour.paramserver import durable
from downpour.shuffler.dataset.reader import NOT_COUNTED
from downpour.shuffler.images.masks import resize

Mask = npt.NDArray[np.integer[Any]]

SUFFIX: Final = ".png"


def mask_of(logits: Tensor, size: Sequence[int]) -> Mask:
    """Return the likeliest class of each pixel, at the picture's own size.

    Args:
        logits: float32 `[classes, h, w]`.
        size: height and width of the picture.

    Returns:
        uint8 `[height, width]`, or uint16 if there are more than 255 classes. Each pixel has the
        class at the nearest place that the network saw.
    """
    kind = np.uint8 if len(logits) <= NOT_COUNTED else np.uint16
    classes: Mask = logits.argmax(0).numpy().astype(kind)
    height, width = size
    return resize(classes, int(height), int(width))


def as_png(mask: Mask) -> bytes:
    """Return a mask as a PNG file: with a palette of 256 colours, or grey with 16 bits.

    The indices are the classes, so such a file is a mask to train on, too.
    """
    from PIL import Image

    image = Image.fromarray(mask)
    if mask.dtype == np.uint8:
        image.putpalette(palette())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def palette() -> bytes:
    """Return 256 colours, of which any two that are near in number are unlike.

    Those of the PASCAL VOC challenge: bits 0, 3, 6 of a number make red, 1, 4, 7 green, and 2, 5
    blue, the lowest of them the most significant.
    """
    numbers = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for channel in range(3):
        for place in range(3):
            bit = (numbers >> (3 * place + channel)) & 1
            colours[:, channel] |= (bit << (7 - place)).astype(np.uint8)
    return colours.tobytes()


def shares_of(mask: Mask, class_names: Sequence[str], top: int) -> list[dict[str, Any]]:
    """Return the classes with the most pixels, at most `top`, and each one's share of all."""
    classes, counts = np.unique(mask, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:top]
    return [
        {
            "class": class_names[label],
            "label": label,
            "share": round(count / mask.size, 6),
        }
        for label, count in zip(classes[order].tolist(), counts[order].tolist(), strict=True)
    ]


def file_names(folder: Path, pictures: Sequence[Path]) -> list[Path]:
    """Return the file of each picture's mask.

    Args:
        folder: of the masks.
        pictures: files with names that differ in more than folder and ending.

    Raises:
        UserError: two masks would have one name, or a mask the name of a picture.
    """
    found: dict[Path, Path] = {}
    given = {picture.resolve() for picture in pictures}
    for picture in pictures:
        path = folder / f"{picture.stem}{SUFFIX}"
        if path in found and found[path] != picture:
            raise UserError(
                f"the masks of {found[path]} and {picture} would both be {path}: give them in two "
                "commands, with an --output each"
            )
        if path.resolve() in given:
            raise UserError(f"the mask {path} would replace a picture: give another --output")
        found[path] = picture
    return [folder / f"{picture.stem}{SUFFIX}" for picture in pictures]


def write(path: Path, png: bytes) -> None:
    """Write a mask's file, whole or not at all; its folder is made.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with durable.replacing(path) as partial:
            Path(partial).write_bytes(png)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
