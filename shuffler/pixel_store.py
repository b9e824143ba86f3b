"""Pixels of small pictures, kept by the shuffler: each is decoded once, not in every epoch.

To decode a picture of 28x28 or 32x32 pixels takes longer than to copy its pixels, and a network
for such pictures may take no longer for its step. So the first time that a row is delivered, its
picture is decoded and kept; from then on its pixels are delivered in place of its file. Replicas
see the same pixels either way, to the bit: what they would have decoded.

A row keeps its file if it is large, cannot be decoded, or something is to be told of it: whoever
decodes it tells that, as without a store. How rows carry pixels is in `images.rows`.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from downpour.shuffler.errors import DecodeError
from downpour.shuffler.images import headers
from downpour.shuffler.images.rows import SIZE, Buffer, image_buffers, with_pixels
from downpour.shuffler.images.specs import ImageSpec

if TYPE_CHECKING:
    from downpour.shuffler.images.pixels import ImageFile

ALWAYS_BYTES: Final = 4 << 10
"""Pictures of so many bytes of pixels are kept, whatever their files take."""

MOST_BYTES: Final = 16 << 10
"""Most bytes of the pixels of a picture that is kept, and of its file."""

MOST_RATIO: Final = 2
"""Larger pictures than `ALWAYS_BYTES` are kept if their pixels take at most so many times what the
file takes: it is their decoding that takes long, and nodes are not to be sent much more."""

ENTRY_BYTES: Final = 150
"""What Python takes for a picture that is kept, besides its pixels."""

_UNKNOWN, _KEPT, _LEFT = 0, 1, 2


class PixelStore:
    """The pixels of some rows of a dataset, in bounded memory; threads may use one at once.

    Nothing is put out to make room: an epoch needs every row once, so those that came first are
    as good as any.
    """

    def __init__(self, spec: ImageSpec, *, num_rows: int, room_bytes: int) -> None:
        """Begin with no row.

        Args:
            spec: the images that the network takes.
            num_rows: of the dataset.
            room_bytes: bound of what is kept, with what Python takes for it.
        """
        self._spec = spec
        self._pixels: dict[int, bytes] = {}
        self._state = np.full(num_rows, _UNKNOWN, dtype=np.uint8)
        self._room = max(0, room_bytes)
        self._lock = threading.Lock()
        self.num_bytes = 0
        """Bytes that are kept now, with what Python takes for them."""
        self.is_full = self._room == 0
        """Whether a picture was met that there was no room for; no more are decoded then."""

    def __len__(self) -> int:
        """Rows whose pixels are kept."""
        return len(self._pixels)

    def deliver(
        self, batch: pa.RecordBatch, rows: NDArray[np.int64], most_bytes: int
    ) -> pa.RecordBatch:
        """Return rows with their pixels in place of their files, as far as they are kept.

        Args:
            batch: n rows of image files.
            rows: their numbers, int64 [n].
            most_bytes: that the rows may take; those that would go beyond keep their files.
        """
        if self.is_full and not self._pixels:
            return with_pixels(batch, [None] * len(batch))
        room = most_bytes - batch.nbytes
        found: list[bytes | None] = []
        files = image_buffers(batch.column("image"))
        for row, state, data in zip(rows.tolist(), self._state[rows].tolist(), files, strict=True):
            pixels = self._pixels.get(row) if state else self._first(row, data)
            if pixels is not None:
                room -= len(pixels)
            found.append(None if room < 0 else pixels)
        return with_pixels(batch, found)

    def _first(self, row: int, data: Buffer | None) -> bytes | None:
        """Decode the picture of a row for the first time; returns its pixels if they are kept."""
        if self.is_full:
            return None
        pixels = None if data is None else decoded(data, self._spec)
        with self._lock:
            if self._state[row]:  # by another thread
                return self._pixels.get(row)
            if pixels is None:
                self._state[row] = _LEFT
                return None
            size = len(pixels) + ENTRY_BYTES
            if self.num_bytes + size > self._room:
                self.is_full = True
                return None
            self.num_bytes += size
            self._pixels[row] = pixels
            self._state[row] = _KEPT
        return pixels


def decoded(data: Buffer, spec: ImageSpec) -> bytes | None:
    """Return the pixels of a picture, with their size before them; None if its file is to stay."""
    if len(data) > MOST_BYTES:
        return None
    from downpour.shuffler.images import pixels

    try:
        declared = headers.declared_size(data)
        if declared is not None and not is_small(*declared, spec.channels, len(data)):
            return None
        file = pixels.open_image(data, spec.channels, spec.reading)
        if not is_small(file.height, file.width, spec.channels, len(data)):
            return None
        if file.note is not None or may_shrink(file, spec):
            return None
        image = pixels.decode_file(file, spec.channels)
    except DecodeError:
        return None
    return SIZE.pack(*image.shape[:2]) + image.tobytes()


def is_small(height: int, width: int, channels: int, file_bytes: int) -> bool:
    """Whether pixels are kept of a picture of this size, whose file has so many bytes."""
    num_bytes = height * width * channels
    return num_bytes <= max(ALWAYS_BYTES, min(MOST_BYTES, MOST_RATIO * file_bytes))


def may_shrink(file: ImageFile, spec: ImageSpec) -> bool:
    """Whether a crop of an image may be decoded from it at less than its size.

    The pixels of such a crop are others than those of the whole image made smaller. A JPEG is
    decoded at a half or less if it has about twice the rows and columns that the network takes
    (`pixels.decode_file`); crops ask for at least as many as that.
    """
    if file.decoded is not None:
        return False
    return file.height + 1 >= 2 * spec.height and file.width + 1 >= 2 * spec.width
