"""Pixels: from rows as they are kept to the arrays that a network takes.

Packed bits are unpacked all at once; encoded images are decoded one after the other, cropped and
distorted as `augment` says. A `Decoder` works on the thread that calls it; several threads may use
one at once, and run side by side, because what takes time releases Python's lock. What is done to
a single image is in `pixels`, which is imported only when there are images, because OpenCV takes
its time to load. What a network takes is in `specs`; several crops of each image are in `views`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from downpour.shuffler.dataset.columns import INPUT, LABEL, TARGET, Columns, from_bytes
from downpour.shuffler.dataset.encoding import PLAIN, PackedBits, image_encoding, label_values
from downpour.shuffler.errors import DecodeError
from downpour.shuffler.images.augment import AugmentConfig, Variations, vary
from downpour.shuffler.images.bits import unpack
from downpour.shuffler.images.bounds import check_views
from downpour.shuffler.images.crops import views_of
from downpour.shuffler.images.rows import (
    REMEDY,
    describe,
    image_buffers,
    pixel_block,
    row_pixels,
    undecodable,
)
from downpour.shuffler.images.specs import ImageSpec, InputSpec, TensorSpec

if TYPE_CHECKING:
    from downpour.shuffler.images.any_format import Pixels
    from downpour.shuffler.images.crops import View
    from downpour.shuffler.images.masks import RowMasks
    from downpour.shuffler.images.pixels import ImageFile

BadImage = Literal["stop", "skip"]

_BLOCK_BYTES: Final = 1 << 19
_DECODED_BYTES: Final = 256 << 20
"""Most pixels of a batch that are kept from when its images' sizes are read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """Rows as a network takes them."""

    inputs: NDArray[Any]
    """[m, *spec.input_shape]; of images, float32 in [0, 1]."""

    labels: NDArray[Any]
    """The targets: classes, int64 [m], or numbers, float32 [m, numbers of a target]; of masks,
    int64 [m, height, width]."""

    kept: NDArray[np.int64]
    """Positions of these m among the n rows that were asked for, ascending; all of them but for
    images that were skipped."""

    problems: tuple[str, ...] = ()
    """A line for each image that was skipped; it names the row."""

    notes: Mapping[int, str] = field(default_factory=dict)
    """A line for each image that was decoded and yet may not be what it should, by its position
    among the n rows; it names the row."""

    sizes: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    """Height and width of each of these m images as it is seen in its file, int64 [m, 2]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """Images of rows as a network sees them, and what they leave to be told."""

    planes: Pixels
    """uint8 [m, c, h, w]."""

    masks: NDArray[np.int64] | None
    """int64 [m, h, w], if the rows have masks."""

    kept: NDArray[np.int64]
    sizes: NDArray[np.int64]
    problems: tuple[str, ...]
    notes: Mapping[int, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoder:
    """How rows become inputs."""

    spec: InputSpec
    """The images, or the numbers, wanted."""

    columns: Columns = PLAIN
    """What the targets are."""

    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How they are varied."""

    seed: int = 0
    """Of the run: names the random streams."""

    on_bad_image: BadImage = "stop"
    """What an image does that cannot be decoded: `stop` raises, `skip` leaves it out."""

    def __post_init__(self) -> None:
        if isinstance(self.spec, TensorSpec) and not self.augment.changes_nothing:
            raise DecodeError(
                "numbers cannot be cropped, mirrored or distorted; leave augmentation out"
            )
        if self.on_bad_image not in ("stop", "skip"):
            raise DecodeError(
                f"on_bad_image={self.on_bad_image!r} is unknown; choose 'stop' or 'skip'"
            )

    def decode(
        self, batch: pa.RecordBatch, *, epoch: int = 0, rows: NDArray[np.int64] | None = None
    ) -> Decoded:
        """Return the inputs and the targets of rows.

        Args:
            batch: n rows as `reader` returns them, of either encoding, or with pixels in place of
                files (`rows.with_pixels`).
            epoch: names the random streams, with the seed and each row's number.
            rows: int64 [n], the rows' numbers in the dataset; needed where images are varied,
                otherwise for messages only.

        Raises:
            DecodeError: an image cannot be decoded or has another size; it names the row.
            DatasetError: the batch has no image column.
        """
        labels = targets_of(batch, self.columns)
        if isinstance(self.spec, TensorSpec):
            inputs = from_bytes(batch.column(INPUT), self.spec.shape, self.columns.input_type)
            whole = np.arange(len(batch), dtype=np.int64)
            return Decoded(inputs=inputs, labels=labels, kept=whole)
        encoding = image_encoding(batch.schema, "the record batch")
        if isinstance(encoding, PackedBits):
            if not self.augment.changes_nothing:
                raise DecodeError(
                    "packed bits cannot be cropped, mirrored or distorted; leave augmentation out, "
                    "or ingest without a binary threshold"
                )
            spec = self.spec
            inputs = unpack(batch.column("bits"), encoding, spec.height, spec.width, spec.channels)
            kept = np.arange(len(batch), dtype=np.int64)
            return Decoded(
                inputs=inputs.reshape(len(batch), *spec.input_shape), labels=labels, kept=kept
            )
        seen = self._seen(batch, epoch, rows)
        inputs = self.scaled(seen.planes)
        return Decoded(
            inputs=inputs.reshape(len(seen.kept), *self.spec.input_shape),
            labels=labels[seen.kept] if seen.masks is None else seen.masks,
            kept=seen.kept,
            problems=seen.problems,
            notes=seen.notes,
            sizes=seen.sizes,
        )

    @property
    def _images(self) -> ImageSpec:
        """The images wanted, where they are images."""
        assert isinstance(self.spec, ImageSpec), "numbers are no images"
        return self.spec

    def opened(
        self, batch: pa.RecordBatch, rows: NDArray[np.int64] | None
    ) -> tuple[list[ImageFile | None], dict[int, str]]:
        """Return the image file of each row, None for what is none, and what is wrong with those.

        Args:
            batch: n rows of encoded images.
            rows: int64 [n], the rows' numbers: for messages only.
        """
        from downpour.shuffler.images import pixels

        spec = self._images
        channels, reading = spec.channels, spec.reading
        problems: dict[int, str] = {}
        files: list[ImageFile | None] = []
        room = _DECODED_BYTES
        ready = row_pixels(batch, channels)
        for position, data in enumerate(image_buffers(batch.column("image"))):
            file = None
            if (there := ready[position]) is not None:
                height, width = there.shape[:2]
                file = pixels.ImageFile(b"", height, width, reading, decoded=there)
            elif data is None:
                problems[position] = f"{describe(batch, position, rows)} has no bytes"
            else:
                try:
                    file = pixels.open_image(data, channels, reading)
                    room -= 0 if file.decoded is None else file.decoded.nbytes
                    if room < 0:
                        file.decoded = None  # it is decoded again when its turn comes
                except DecodeError as error:
                    problems[position] = undecodable(batch, position, rows, error)
            files.append(file)
        return files, problems

    def told(self, problems: dict[int, str]) -> tuple[str, ...]:
        """Return the lines about images that are skipped, in the order of their rows.

        Raises:
            DecodeError: there are some, and they are not to be skipped.
        """
        if problems and self.on_bad_image == "stop":
            raise DecodeError(f"{problems[min(problems)]}; {REMEDY}")
        return tuple(problems[position] for position in sorted(problems))

    def _seen(self, batch: pa.RecordBatch, epoch: int, rows: NDArray[np.int64] | None) -> _Seen:
        """Return the images, and the masks if rows have some."""
        from downpour.shuffler.images import pixels

        spec, channels = self._images, self._images.channels
        if (taken := self._taken(batch)) is not None:
            return taken
        kept: list[int] = []
        files, problems = self.opened(batch, rows)
        masks = self._masks(batch, files, problems, rows)
        variations = self._variations(files, epoch, rows)
        boxes = [None] * len(batch) if variations.boxes is None else variations.boxes.tolist()
        planes = np.empty((len(batch), channels, spec.height, spec.width), dtype=np.uint8)
        for position, file in enumerate(files):
            if file is not None:
                try:
                    image = self._image(file, boxes[position], variations, position)
                except DecodeError as error:
                    problems[position] = undecodable(batch, position, rows, error)
                    continue
                if image.shape[:2] != (spec.height, spec.width):
                    raise DecodeError(
                        f"{describe(batch, position, rows)} has "
                        f"{image.shape[0]}x{image.shape[1]} pixels, and "
                        f"{spec.height}x{spec.width} are wanted; resize the images, choose a "
                        "recipe for their size, or let them be cropped (fit='crop')"
                    )
                pixels.put_planes(image, planes[len(kept)])
                if masks is not None:
                    mirror = variations.mirrored is not None and bool(variations.mirrored[position])
                    box = boxes[position]
                    masks.put(position, len(kept), box=box, view=self._view(file), mirror=mirror)
                kept.append(position)
        lines, notes = self.told(problems), notes_of(files, batch, rows)
        sizes = [(file.height, file.width) for p in kept if (file := files[p]) is not None]
        return _Seen(
            planes=planes[: len(kept)],
            masks=None if masks is None else masks.seen[: len(kept)],
            kept=np.array(kept, dtype=np.int64),
            sizes=np.array(sizes, dtype=np.int64).reshape(-1, 2),
            problems=lines,
            notes=notes,
        )

    def _taken(self, batch: pa.RecordBatch) -> _Seen | None:
        """Return images that come as pixels and are taken as they are; None if some are not."""
        spec = self._images
        if self.columns.kind == "mask" or spec.fit == "crop" or not self.augment.changes_nothing:
            return None
        block = pixel_block(batch, spec.height, spec.width, spec.channels)
        if block is None:
            return None
        return _Seen(
            planes=np.moveaxis(block, 3, 1),
            masks=None,
            kept=np.arange(len(block), dtype=np.int64),
            sizes=np.tile(np.array([spec.height, spec.width], np.int64), (len(block), 1)),
            problems=(),
            notes={},
        )

    def _masks(
        self,
        batch: pa.RecordBatch,
        files: list[ImageFile | None],
        problems: dict[int, str],
        rows: NDArray[np.int64] | None,
    ) -> RowMasks | None:
        """Return the masks of rows, if they have some; what is wrong with one is the image's."""
        if self.columns.kind != "mask" or TARGET not in batch.schema.names:
            return None
        from downpour.shuffler.images.masks import RowMasks

        spec = self._images
        masks = RowMasks(batch, rows, spec.reading, (spec.height, spec.width), self.columns)
        sizes = [None if file is None else (file.height, file.width) for file in files]
        for position, line in masks.unusable(sizes).items():
            files[position] = None
            problems[position] = line
        return masks

    def _view(self, file: ImageFile) -> View | None:
        """Return how an image is resized and cut; None if it is taken whole."""
        spec = self._images
        if spec.fit == "crop" or (
            spec.fit == "any" and (file.height, file.width) != (spec.height, spec.width)
        ):
            return views_of(1, file.height, file.width, spec.height)[0]
        return None

    def _variations(
        self, files: list[ImageFile | None], epoch: int, rows: NDArray[np.int64] | None
    ) -> Variations:
        if self.augment.changes_nothing:
            return Variations(boxes=None, mirrored=None, colours=None)
        if rows is None:
            raise DecodeError("images can be varied by the numbers of their rows only; give rows")
        heights = np.array([1 if file is None else file.height for file in files], dtype=np.int64)
        widths = np.array([1 if file is None else file.width for file in files], dtype=np.int64)
        return vary(self.augment, self.seed, epoch, rows, heights, widths)

    def _image(
        self, file: ImageFile, box: list[int] | None, variations: Variations, position: int
    ) -> Pixels:
        """Return one image, cropped and varied."""
        from downpour.shuffler.images import pixels

        spec = self._images
        if box is not None:
            image = pixels.crop_file(file, spec.channels, box, spec.height, spec.width)
        elif spec.fit == "whole":
            image = pixels.decode_file(
                file, spec.channels, min_height=spec.height, min_width=spec.width
            )
            image = pixels.resize(image, spec.height, spec.width)
        elif (view := self._view(file)) is not None:
            check_views((view,))
            whole = pixels.decode_file(
                file, spec.channels, min_height=view.image_height, min_width=view.image_width
            )
            whole = pixels.resize(whole, view.image_height, view.image_width)
            image = whole[view.top : view.top + view.side, view.left : view.left + view.side]
        else:
            image = pixels.decode_file(file, spec.channels)
        if variations.colours is not None:
            affine = variations.colours.affine(position, pixels.channel_means(image))
            image = pixels.distort(image, affine)
        if variations.mirrored is not None and variations.mirrored[position]:
            image = pixels.mirror(image)
        return image

    def scaled(self, planes: Pixels) -> NDArray[np.float32]:
        """Return pixels uint8 [m, ...] as a network takes them: in [0, 1], or 0 and 1."""
        inputs = np.empty(planes.shape, dtype=np.float32)
        threshold = self._images.binary_threshold
        if threshold is not None:
            np.greater(planes, threshold, out=inputs, casting="unsafe")
            return inputs
        # A block at a time stays in the processor's cache; to divide after it is faster than to do
        # both at once.
        block = max(1, _BLOCK_BYTES // max(1, inputs[:1].nbytes))
        for start in range(0, len(inputs), block):
            some = inputs[start : start + block]
            np.copyto(some, planes[start : start + block])
            np.divide(some, np.float32(255), out=some)
        return inputs


def targets_of(batch: pa.RecordBatch, columns: Columns) -> NDArray[Any]:
    """Return the targets of n rows: classes, int64 [n], or numbers, float32 [n, t].

    Rows to predict for have none: their classes are -1, and their numbers 0. So are masks, which
    are decoded with their images.
    """
    if columns.kind == "label":
        if LABEL not in batch.schema.names:
            return np.full(len(batch), -1, dtype=np.int64)
        return label_values(batch.column(LABEL)).copy()
    shape = columns.target_shape or (columns.target_width,)
    if columns.kind == "mask" or TARGET not in batch.schema.names:
        return np.zeros((len(batch), *shape), dtype=columns.target_type)
    return from_bytes(batch.column(TARGET), shape, columns.target_type)


def decode(
    batch: pa.RecordBatch, spec: ImageSpec, *, rows: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the inputs [n, *spec.input_shape] and the labels [n] of rows, not varied.

    Raises:
        DecodeError: see `Decoder.decode`.
    """
    decoded = Decoder(spec=spec).decode(batch, rows=rows)
    return decoded.inputs, decoded.labels


def notes_of(
    files: list[ImageFile | None], batch: pa.RecordBatch, rows: NDArray[np.int64] | None
) -> Mapping[int, str]:
    """Return a line for each image of which something is to be told, by its position."""
    found = ((position, file.note) for position, file in enumerate(files) if file is not None)
    return {
        position: f"{describe(batch, position, rows)}: {note}" for position, note in found if note
    }


def decode_image(data: bytes, channels: int) -> NDArray[np.uint8]:
    """Return the pixels of an image file of any size, as people see it: uint8 [h, w, channels].

    Raises:
        DecodeError: the bytes are not an image, or are cut short.
    """
    from downpour.shuffler.images import pixels

    return pixels.decode_file(pixels.open_image(data, channels), channels)
