"""Rows that come with pixels give what their files give, to the bit; what is kept has a bound."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from downpour.shuffler import pixel_store
from downpour.shuffler.dataset.encoding import EncodedImages, schema_for
from downpour.shuffler.errors import DecodeError
from downpour.shuffler.images.augment import AugmentConfig
from downpour.shuffler.images.decode import Decoded, Decoder
from downpour.shuffler.images.rows import PIXELS, SIZE
from downpour.shuffler.images.specs import ImageSpec
from downpour.shuffler.images.views import decode_views
from downpour.shuffler.pixel_store import ENTRY_BYTES, PixelStore, is_small

AMPLE = 1 << 30
SIDE = 12
SPEC = ImageSpec(height=SIDE, width=SIDE, fit="any")


def picture(seed: int, height: int = SIDE, width: int = SIDE, bands: int = 3) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(values[:, :, 0] if bands == 1 else values)


def saved(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    target = io.BytesIO()
    image.save(target, format, **options)
    return target.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


KEPT = {
    "RGB": saved(picture(1)),
    "grey": saved(picture(2, bands=1)),
    "transparent": saved(picture(3, bands=4)),
    "palette": saved(picture(4).convert("P")),
    "GIF": saved(picture(5), "GIF"),
    "BMP": saved(picture(6), "BMP"),
    "JPEG": saved(picture(7), "JPEG"),
    "turned PNG": saved(picture(8, 12, 17), exif=turned(8)),
    "turned JPEG": saved(picture(9, 13, 17), "JPEG", exif=turned(6)),
    "larger": saved(picture(10, 70, 60)),
}
LEFT: dict[str, bytes | None] = {
    "JPEG of twice the size": saved(picture(11, 2 * SIDE, 2 * SIDE), "JPEG"),
    "photograph": saved(picture(12, 90, 80)),
    "small file of a large picture": saved(Image.new("RGB", (300, 200))),
    "dark": saved(Image.fromarray(np.full((SIDE, SIDE), 4095, np.uint16))),
}
BAD: dict[str, bytes | None] = {
    "cut short": KEPT["RGB"][:-40],
    "no image": b"<html>",
    "none": None,
}


def rows_of(files: list[bytes | None]) -> pa.RecordBatch:
    images = [{"bytes": data, "path": f"{at}.png"} for at, data in enumerate(files)]
    table = {"image": images, "label": list(range(len(files)))}
    return pa.RecordBatch.from_pydict(table, schema=schema_for(EncodedImages(), ()))


def numbers(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int64)


def same(found: Decoded, expected: Decoded) -> None:
    for name in ("inputs", "labels", "kept", "sizes"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        assert mine.dtype == theirs.dtype
        assert np.array_equal(mine, theirs)
    assert found.problems == expected.problems
    assert dict(found.notes) == dict(expected.notes)


def has_pixels(batch: pa.RecordBatch) -> list[bool]:
    return [each is not None for each in batch.column(PIXELS).to_pylist()]


DECODERS = [
    {"spec": SPEC},
    {"spec": ImageSpec(height=SIDE, width=SIDE, channels=1, fit="crop")},
    {"spec": ImageSpec(height=SIDE, width=SIDE + 2, fit="whole", orientation="ignore")},
    {"spec": ImageSpec(height=SIDE, width=SIDE, fit="any", transparency="drop")},
    {"spec": SPEC, "augment": AugmentConfig(mirror=True)},
    {"spec": SPEC, "augment": AugmentConfig(random_crop=True, mirror=True, distortion="full")},
    {"spec": ImageSpec(height=SIDE, width=SIDE, channels=1, fit="any", binary_threshold=127)},
]


@pytest.mark.parametrize("options", DECODERS)
def test_inputs_are_those_of_the_files(options):
    """Of all kinds, at the first delivery and later, in parts, and beside what is skipped."""
    files = [*KEPT.values(), *LEFT.values(), *BAD.values()]
    batch, rows = rows_of(files), numbers(len(files))
    decoder = Decoder(seed=3, on_bad_image="skip", **options)
    expected = decoder.decode(batch, epoch=1, rows=rows)
    assert len(expected.problems) == len(BAD)
    store = PixelStore(options["spec"], num_rows=len(files), room_bytes=AMPLE)
    for _ in range(2):
        delivered = store.deliver(batch, rows, AMPLE)
        assert has_pixels(delivered)[: len(KEPT)] == [True] * len(KEPT)
        same(decoder.decode(delivered, epoch=1, rows=rows), expected)
    some = np.array([14, 3, 0, 16, 8, 3], dtype=np.int64)
    taken = decoder.decode(batch.take(some), epoch=1, rows=some)
    same(decoder.decode(delivered.take(some), epoch=1, rows=some), taken)
    part = decoder.decode(batch[3:15], epoch=1, rows=rows[3:15])
    same(decoder.decode(delivered[3:15], epoch=1, rows=rows[3:15]), part)


def test_what_is_kept_and_what_keeps_its_file():
    files = [*KEPT.values(), *LEFT.values(), *BAD.values()]
    store = PixelStore(SPEC, num_rows=len(files), room_bytes=AMPLE)
    delivered = store.deliver(rows_of(files), numbers(len(files)), AMPLE)
    kept = [True] * len(KEPT) + [False] * (len(LEFT) + len(BAD))
    assert has_pixels(delivered) == kept
    assert len(store) == len(KEPT)
    for there, row, data in zip(kept, delivered.column("image").to_pylist(), files, strict=True):
        assert row["bytes"] == (None if there else data)
        assert row["path"]  # messages name it


def test_pictures_of_the_networks_size_are_taken_all_at_once(monkeypatch):
    """No picture is opened: that is what makes it worth to keep them."""
    files = [saved(picture(seed)) for seed in range(20)]
    batch, rows = rows_of(files), numbers(20)
    for channels in (1, 3):
        spec = ImageSpec(height=SIDE, width=SIDE, channels=channels, flatten=True)
        decoder = Decoder(spec=spec)
        expected = decoder.decode(batch, rows=rows)
        store = PixelStore(spec, num_rows=20, room_bytes=AMPLE)
        delivered = store.deliver(batch, rows, AMPLE)
        with monkeypatch.context() as patch:
            patch.setattr(Decoder, "opened", None)
            same(decoder.decode(delivered, rows=rows), expected)
            part = decoder.decode(delivered[5:9], rows=rows[5:9])
        assert np.array_equal(part.inputs, expected.inputs[5:9])


def test_messages_are_those_of_the_files():
    """A bad image is named, and so is one of another size, whether it has pixels or not."""
    exact = ImageSpec(height=SIDE, width=SIDE)
    for files in ([KEPT["RGB"], BAD["no image"]], [KEPT["RGB"], KEPT["larger"]], [None]):
        batch, rows = rows_of(files), numbers(len(files))
        store = PixelStore(exact, num_rows=len(files), room_bytes=AMPLE)
        with pytest.raises(DecodeError) as expected:
            Decoder(spec=exact).decode(batch, rows=rows)
        with pytest.raises(DecodeError) as found:
            Decoder(spec=exact).decode(store.deliver(batch, rows, AMPLE), rows=rows)
        assert str(found.value) == str(expected.value)


def test_crops_for_scoring_see_the_same():
    files = list(KEPT.values())
    batch, rows = rows_of(files), numbers(len(files))
    store = PixelStore(SPEC, num_rows=len(files), room_bytes=AMPLE)
    expected = decode_views(batch, SPEC, 10, rows=rows)
    same(decode_views(store.deliver(batch, rows, AMPLE), SPEC, 10, rows=rows), expected)


def test_no_more_is_kept_than_there_is_room_for():
    files = [saved(picture(seed)) for seed in range(10)]
    batch, rows = rows_of(files), numbers(10)
    each = SIZE.size + 3 * SIDE * SIDE + ENTRY_BYTES
    store = PixelStore(SPEC, num_rows=10, room_bytes=4 * each + 1)
    assert has_pixels(store.deliver(batch, rows, AMPLE)) == [True] * 4 + [False] * 6
    assert (store.is_full, len(store), store.num_bytes) == (True, 4, 4 * each)
    again = store.deliver(batch.take(rows[::-1]), rows[::-1], AMPLE)
    assert has_pixels(again) == [False] * 6 + [True] * 4
    assert store.num_bytes == 4 * each
    without = PixelStore(SPEC, num_rows=10, room_bytes=-5)
    assert without.is_full
    assert has_pixels(without.deliver(batch, rows, AMPLE)) == [False] * 10


def test_a_window_takes_no_more_bytes_than_it_may():
    files = [saved(picture(seed)) for seed in range(10)]
    batch, rows = rows_of(files), numbers(10)
    store = PixelStore(SPEC, num_rows=10, room_bytes=AMPLE)
    size = SIZE.size + 3 * SIDE * SIDE
    for fitting in (0, 3, 10):
        delivered = store.deliver(batch, rows, batch.nbytes + fitting * size)
        assert has_pixels(delivered) == [True] * fitting + [False] * (10 - fitting)
    assert not any(has_pixels(store.deliver(batch, rows, 0)))


def test_a_dataset_whose_pictures_are_left_is_not_decoded_again(monkeypatch):
    files = [*LEFT.values(), *BAD.values()]
    batch, rows = rows_of(files), numbers(len(files))
    store = PixelStore(SPEC, num_rows=len(files), room_bytes=AMPLE)
    store.deliver(batch, rows, AMPLE)
    monkeypatch.setattr(pixel_store, "decoded", None)
    assert not any(has_pixels(store.deliver(batch, rows, AMPLE)))


def test_small_means_little_more_than_the_file():
    assert is_small(64, 64, 1, 1)
    assert not is_small(64, 65, 1, 1)
    assert not is_small(64, 64, 3, 2_000)
    assert is_small(64, 64, 3, 9_000)
    assert not is_small(80, 80, 3, 16_000)


def test_no_rows():
    store = PixelStore(SPEC, num_rows=3, room_bytes=AMPLE)
    empty = store.deliver(rows_of([]), numbers(0), AMPLE)
    full = store.deliver(rows_of([KEPT["RGB"]]), numbers(1), AMPLE)
    assert empty.schema.equals(full.schema)
    assert pa.concat_batches([empty, full]).equals(full)
