"""Photos that are stored turned, with an EXIF orientation that says so; and rows of image files."""

import io
from collections.abc import Sequence
from types import MappingProxyType

import numpy as np
import pyarrow as pa
from PIL import Image

from downpour.shuffler.dataset.encoding import EncodedImages, schema_for

STORED = MappingProxyType(
    {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
)
"""What a camera that is held so does to the upright image."""


def oriented(pixels: np.ndarray, orientation: int, format: str = "JPEG") -> bytes:
    """An image file of `pixels`, stored as a camera does that is held so."""
    image, way = Image.fromarray(pixels), STORED[orientation]
    image = image if way is None else image.transpose(way)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    if format == "TIFF":
        image.save(buffer, format, tiffinfo={0x0112: orientation})
    elif format == "WEBP":
        image.save(buffer, format, exif=exif, lossless=True, exact=True)
    else:
        image.save(buffer, format, exif=exif, **({} if format == "PNG" else {"quality": 95}))
    return buffer.getvalue()


def rows_with_images(files: Sequence[bytes]) -> pa.RecordBatch:
    """Rows of these image files, labelled 0, 1, ..."""
    rows = [{"bytes": data, "path": None} for data in files]
    columns = {"image": rows, "label": list(range(len(files)))}
    return pa.RecordBatch.from_pydict(columns, schema=schema_for(EncodedImages(), ()))
