"""Pictures with masks as images in Parquet, and a network that finds them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import nn

from downpour.shuffler.dataset.image_columns import IMAGE_TYPE

SIDE, ROWS, CLASSES = 16, 96, 3


def pair(index: int, height: int = SIDE, width: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """A bright square on a dark ground, whose class is its colour; the first row does not count.

    Returns:
        uint8 [height, width, 3], and uint8 [height, width].
    """
    rng = np.random.default_rng(index)
    pixels = rng.integers(0, 80, (height, width, 3))
    mask = np.zeros((height, width), np.uint8)
    kind = index % 2
    top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
    place = (slice(top, top + height // 2), slice(left, left + width // 2))
    pixels[(*place, kind)] += 150
    mask[place] = 1 + kind
    mask[0] = 255
    return pixels.astype(np.uint8), mask


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    """An image as a PNG file; `P` gives it a palette."""
    image = Image.fromarray(pixels)
    if mode == "P":
        image.putpalette([v for i in range(256) for v in (i, 255 - i, 7)])
    elif mode is not None:
        image = image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write(
    folder: Path,
    split: str,
    pictures: Sequence[bytes],
    masks: Sequence[bytes | None],
    *,
    column: str = "mask",
    kind: pa.DataType = IMAGE_TYPE,
    shards: int = 1,
) -> str:
    """A split of a dataset, in row groups of 32."""
    folder.mkdir(parents=True, exist_ok=True)

    def values(files: Sequence[bytes | None], name: str, kind: pa.DataType) -> pa.Array:
        if not pa.types.is_struct(kind):
            return pa.array(files, kind)
        rows = [{"bytes": data, "path": f"{i}{name}.png"} for i, data in enumerate(files)]
        return pa.array(rows, kind)

    table = pa.table({column: values(masks, "m", kind), "image": values(pictures, "", IMAGE_TYPE)})
    cuts = np.linspace(0, len(table), shards + 1).astype(int)
    for i in range(shards):
        name = f"{split}-{i:05d}-of-{shards:05d}.parquet"
        part = table.slice(cuts[i], cuts[i + 1] - cuts[i])
        pq.write_table(part, folder / name, row_group_size=32)
    return str(folder)


def dataset(
    folder: Path,
    *,
    rows: int = ROWS,
    masked: Callable[[np.ndarray], bytes] = png,
    sides: tuple[int, int] = (SIDE, SIDE),
    **how: Any,
) -> str:
    """A training and a test split."""
    for split, count, first in (("train", rows, 0), ("test", 32, 10_000)):
        pairs = [pair(first + i, *sides) for i in range(count)]
        write(folder, split, [png(x) for x, _ in pairs], [masked(m) for _, m in pairs], **how)
    return str(folder)


class MaskNet(nn.Sequential):
    """A class for each pixel, `[m, 3, h, w] -> [m, classes, h, w]`."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, num_outputs, 1),
        )
