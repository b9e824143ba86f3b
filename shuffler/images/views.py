"""Several crops of each image, for evaluation: from rows to inputs.

Which crops these are is in `crops`; one crop is `decode`'s.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from downpour.shuffler.dataset.columns import Columns
from downpour.shuffler.dataset.encoding import PLAIN, PackedBits, image_encoding
from downpour.shuffler.errors import DecodeError
from downpour.shuffler.images.bounds import check_views
from downpour.shuffler.images.crops import views_of
from downpour.shuffler.images.decode import BadImage, Decoded, Decoder, notes_of, targets_of
from downpour.shuffler.images.rows import undecodable
from downpour.shuffler.images.specs import ImageSpec


def decode_views(
    batch: pa.RecordBatch,
    spec: ImageSpec,
    crops: int,
    *,
    rows: NDArray[np.int64] | None = None,
    on_bad_image: BadImage = "stop",
    columns: Columns = PLAIN,
) -> Decoded:
    """Return several crops of each image, and the labels.

    Args:
        batch: n rows of encoded images, of any size.
        spec: the images that the network takes, which are square.
        crops: 1, 10 or 144; see `crops`.
        rows: int64 [n], the rows' numbers: for messages only.
        on_bad_image: what an image does that cannot be decoded.
        columns: what the targets are.

    Returns:
        The m images that were decoded. Their inputs are float32 [m, crops, *spec.input_shape], in
        [0, 1]; the crops' order is that of `crops.views_of`.

    Raises:
        DecodeError: an image cannot be decoded, `crops` is not one of the three, or the network's
            input is not square; packed bits have no crops.
    """
    if isinstance(image_encoding(batch.schema, "the record batch"), PackedBits):
        raise DecodeError("packed bits have no crops; ingest without a binary threshold")
    from downpour.shuffler.images import pixels

    if spec.height != spec.width:
        raise DecodeError(f"crops are square, and {spec.height}x{spec.width} is not; give 1 crop")
    size = spec.height
    views_of(crops, size, size, size)  # raises where there is no such way
    decoder = Decoder(spec=spec, on_bad_image=on_bad_image)
    planes = np.empty((len(batch), crops, spec.channels, size, size), dtype=np.uint8)
    kept: list[int] = []
    files, problems = decoder.opened(batch, rows)
    for position, file in enumerate(files):
        if file is None:
            continue
        try:
            views = views_of(crops, file.height, file.width, size)
            check_views(views)
            image = pixels.decode_file(
                file,
                spec.channels,
                min_height=max(view.image_height for view in views),
                min_width=max(view.image_width for view in views),
            )
        except DecodeError as error:
            problems[position] = undecodable(batch, position, rows, error)
            continue
        planes[len(kept)] = pixels.render(image, views, size)
        kept.append(position)
    lines, notes = decoder.told(problems), notes_of(files, batch, rows)
    inputs = decoder.scaled(planes[: len(kept)])
    found = np.array(kept, dtype=np.int64)
    return Decoded(
        inputs=inputs.reshape(len(kept), crops, *spec.input_shape),
        labels=targets_of(batch, columns)[found],
        kept=found,
        problems=lines,
        notes=notes,
    )
