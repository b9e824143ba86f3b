"""Inputs equal what Pillow and NumPy make of the same bytes; bad images are named."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from downpour.shuffler.dataset.encoding import EncodedImages, PackedBits, schema_for
from downpour.shuffler.errors import DecodeError
from downpour.shuffler.images.bits import bits_array, pack_bits
from downpour.shuffler.images.decode import Decoder, decode
from downpour.shuffler.images.pixels import decode_any, open_image
from downpour.shuffler.images.reading import Reading
from downpour.shuffler.images.specs import ImageSpec

GREY = np.random.default_rng(0).integers(0, 256, (9, 6, 5), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)


def encoded(image: np.ndarray | Image.Image, format: str = "PNG") -> bytes:
    target = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(target, format=format)
    return target.getvalue()


def images_batch(images: list[bytes | None], path: str | None = None) -> pa.RecordBatch:
    rows = [{"bytes": data, "path": path} for data in images]
    schema = schema_for(EncodedImages(), ())
    return pa.RecordBatch.from_pydict(
        {"image": rows, "label": list(range(len(images)))}, schema=schema
    )


def bits_batch(pixels: np.ndarray, encoding: PackedBits) -> pa.RecordBatch:
    order = encoding.bit_order
    packed = np.packbits(pixels.reshape(len(pixels), -1) > 127, axis=1, bitorder=order)
    columns = [bits_array(packed), pa.array(np.arange(len(pixels)))]
    return pa.RecordBatch.from_arrays(columns, schema=schema_for(encoding, ()))


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("order", ["big", "little"])
def test_packed_bits(flatten, order):
    batch = bits_batch(GREY, PackedBits(6, 5, order))
    spec = ImageSpec(height=6, width=5, channels=1, binary_threshold=127, flatten=flatten)
    inputs, labels = decode(batch, spec)
    assert inputs.dtype == np.float32
    assert inputs.shape == (9, *spec.input_shape) == ((9, 30) if flatten else (9, 1, 6, 5))
    assert (inputs.reshape(GREY.shape) == (GREY > 127)).all()
    assert labels.tolist() == list(range(9))
    part, labels = decode(batch.slice(2, 4), spec)
    assert (part == inputs[2:6]).all()
    assert labels.tolist() == [2, 3, 4, 5]
    assert decode(batch.slice(0, 0), spec)[0].shape == (0, *spec.input_shape)


def test_pack_bits_is_what_decode_unpacks():
    packed = pack_bits(GREY, 127)
    assert packed.shape == (9, PackedBits(6, 5).num_bytes) == (9, 4)
    assert bits_array(packed).to_pylist() == [row.tobytes() for row in packed]


def test_grey_images():
    batch = images_batch([encoded(image) for image in GREY])
    inputs, _ = decode(batch, ImageSpec(height=6, width=5, channels=1))
    assert (inputs[:, 0] == GREY / np.float32(255)).all()
    binary, _ = decode(batch, ImageSpec(height=6, width=5, channels=1, binary_threshold=127))
    assert (binary[:, 0] == (GREY > 127)).all()
    part, _ = decode(batch.slice(3, 2), ImageSpec(height=6, width=5, channels=1))
    assert (part == inputs[3:5]).all()


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_colour_images_equal_pillow(format):
    files = [encoded(image, format) for image in COLOUR]
    inputs, _ = decode(images_batch(files), ImageSpec(height=6, width=5))
    pillow = np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in files])
    assert inputs.shape == (4, 3, 6, 5)
    assert inputs.flags.c_contiguous
    assert (inputs == pillow.transpose(0, 3, 1, 2) / np.float32(255)).all()
    flat, _ = decode(images_batch(files), ImageSpec(height=6, width=5, flatten=True))
    assert (flat == inputs.reshape(4, -1)).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    picture = Image.fromarray(COLOUR[0]).convert(mode)
    data = encoded(picture, "TIFF" if mode == "CMYK" else "PNG")
    inputs, _ = decode(images_batch([data]), ImageSpec(height=6, width=5))
    assert inputs.shape == (1, 3, 6, 5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no image", "cannot be decoded .it is not an image of a format"),
        (encoded(GREY[0])[:50], "cannot be decoded"),
        (None, "has no bytes"),
        (encoded(GREY[0][:4]), "has 4x5 pixels, and 6x5 are wanted; resize"),
        (encoded(Image.fromarray(np.zeros((6, 5), dtype=np.float32)), "TIFF"), "values are floats"),
        (encoded(Image.fromarray(np.zeros((6, 5), np.int32)), "TIFF"), "integers of 32 bits"),
    ],
)
def test_a_bad_image_is_named(data, message):
    batch = images_batch([encoded(GREY[0]), data], path="n01440764/7.JPEG")
    spec = ImageSpec(height=6, width=5, channels=1)
    with pytest.raises(DecodeError, match=message) as error:
        decode(batch, spec, rows=np.array([40, 41]))
    assert "row 41 (n01440764/7.JPEG, label 1)" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(DecodeError, match="row 1 of the batch"):
        decode(batch, spec)


def test_bits_of_another_size():
    with pytest.raises(DecodeError, match="binary images of 6x5 in 1 channel, not 6x5 in 3"):
        decode(bits_batch(GREY, PackedBits(6, 5)), ImageSpec(height=6, width=5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"height": 0, "width": 5}, "0x5"),
        ({"height": 5, "width": 5, "channels": 2}, "channels=2"),
        ({"height": 5, "width": 5, "binary_threshold": 255}, "binary_threshold=255"),
    ],
)
def test_spec_errors_name_the_value(fields, message):
    with pytest.raises(DecodeError, match=message):
        ImageSpec(**fields)


class TestTransparency:
    """Blended with white; the colours that it hides are not seen."""

    OPACITY = np.array([[0, 255, 128]], np.uint8)
    COLOURS = np.array([[[0, 255, 0], [10, 20, 30], [10, 20, 30]]], np.uint8)
    BLENDED = ([255, 255, 255], [10, 20, 30], [132, 137, 142])  # 255 - (255 - c) * 128 / 255

    def seen(self, data: bytes, **reading: str) -> list[list[int]]:
        return decode_any(data, 3, Reading(**reading))[0].tolist()  # type: ignore[arg-type]

    @pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
    def test_blended_with_white_or_dropped(self, format):
        target = io.BytesIO()
        rgba = Image.fromarray(np.dstack([self.COLOURS, self.OPACITY]))
        options = {"lossless": True, "exact": True} if format == "WEBP" else {}
        rgba.save(target, format, **options)
        assert np.abs(np.subtract(self.seen(target.getvalue()), self.BLENDED)).max() <= 1
        hidden = self.seen(target.getvalue(), transparency="drop")
        assert hidden == self.COLOURS[0].tolist()

    def test_grey_and_palettes(self):
        values = np.array([[7, 200]], np.uint8)
        grey = Image.merge("LA", [Image.fromarray(values), Image.fromarray(np.uint8([[0, 255]]))])
        assert self.seen(encoded(grey)) == [[255] * 3, [200] * 3]
        palette = Image.fromarray(values).convert("P")
        target = io.BytesIO()
        palette.save(target, "PNG", transparency=7)
        assert self.seen(target.getvalue()) == [[255] * 3, [200] * 3]
        assert self.seen(target.getvalue(), transparency="drop") == [[7] * 3, [200] * 3]
        assert decode_any(target.getvalue(), 1)[0].tolist() == [[255], [200]]


class TestDeepValues:
    """Of more than 8 bits: their highest 8 are kept; values that leave those out are told of."""

    VALUES = np.array([[0, 1000, 40_000, 65_535]], np.uint16)

    @pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
    def test_grey_of_16_bits(self, format):
        file = open_image(encoded(self.VALUES, format), 1)
        assert file.decoded[0, :, 0].tolist() == [0, 3, 156, 255]
        assert file.note is None
        assert (open_image(encoded(self.VALUES, format), 3).decoded[0, 2] == 156).all()

    def test_portable_grey_maps_say_what_white_is(self):
        """Binary and plain, of 12 bits and of 16."""
        for header, values in (
            (b"P5 2 1 4095\n", b"\x0f\xff\x08\x00"),
            (b"P2 2 1 4095\n", b"4095 2048"),
        ):
            assert decode_any(header + values, 1)[0, :, 0].tolist() == [255, 128]
        assert decode_any(b"P5 2 1 65535\n\xff\xff\x80\x00", 1)[0, :, 0].tolist() == [255, 128]

    def test_12_bits_in_16_are_told_of(self):
        dark = np.array([[0, 4095]], np.uint16)
        batch = images_batch([encoded(dark), encoded(self.VALUES[:, 2:])])
        decoder = Decoder(spec=ImageSpec(height=1, width=2, channels=1))
        ((position, note),) = decoder.decode(batch).notes.items()
        assert position == 0
        assert note.startswith("the image of row 0 of the batch (label 0): its values of 16 bits")
        assert "use the lower 12 only" in note
        colours = np.repeat(dark[:, :, None], 3, 2).astype(">u2")
        deep = open_image(deep_colours(colours), 3)
        assert deep.decoded.max() == 15
        assert "use the lower 12 only" in (deep.note or "")
        assert open_image(deep_colours(colours * 16), 3).note is None


def deep_colours(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a colour, big-endian [h, w, 3], which Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    height, width = pixels.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
    return start + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
