"""Random crops, mirrors and colours: what the papers ask for, the same to the bit each time."""

from __future__ import annotations

import io
import math

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageEnhance

from downpour.shuffler.dataset.encoding import EncodedImages, PackedBits, schema_for
from downpour.shuffler.errors import DecodeError
from downpour.shuffler.images.augment import AugmentConfig, random_boxes, vary
from downpour.shuffler.images.decode import Decoder
from downpour.shuffler.images.pixels import (
    channel_means,
    crop_file,
    decode_file,
    distort,
    open_image,
)
from downpour.shuffler.images.specs import ImageSpec
from downpour.shuffler.images.views import decode_views
from downpour.shuffler.plan.draws import normals, uniforms

ALL = AugmentConfig(random_crop=True, mirror=True, distortion="full")
SPEC = ImageSpec(height=24, width=24)


def photo(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    """Smooth colours, as a photograph has them; JPEG keeps those."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(60, 190, (5, 6, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray, format: str = "JPEG") -> bytes:
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, format=format, quality=95)
    return target.getvalue()


def batch_of(images: list[bytes]) -> pa.RecordBatch:
    rows = [{"bytes": data, "path": None} for data in images]
    columns = {"image": rows, "label": list(range(len(images)))}
    return pa.RecordBatch.from_pydict(columns, schema=schema_for(EncodedImages(), ()))


FILES = [encoded(photo(i, 50 + i, 90 - 2 * i), "PNG" if i % 4 == 0 else "JPEG") for i in range(12)]
BATCH = batch_of(FILES)
ROWS = np.arange(100, 112)


def test_draws_are_each_examples_own():
    rows = np.array([5, 9, 2**40, 0])
    numbers = uniforms(7, rows, 6)
    for at, row in enumerate(rows):
        assert (uniforms(7, np.array([row]), 3)[0] == numbers[at, :3]).all()
    assert len({*numbers.ravel().tolist(), *uniforms(8, rows, 6).ravel().tolist()}) == 48
    assert numbers[0, :2].tolist() == [0.4685871030292975, 0.1186343835431527]  # pinned


def test_draws_are_uniform_and_independent():
    numbers = uniforms(3, np.arange(20_000), 8)
    counts = np.apply_along_axis(np.bincount, 0, (numbers * 20).astype(int), minlength=20)
    chi_squared = ((counts - 1000) ** 2 / 1000).sum(axis=0)
    assert (chi_squared < 49).all()  # 19 degrees of freedom: 0.9998 of the distribution
    correlations = np.corrcoef(np.concatenate([numbers, np.roll(numbers, 1, axis=0)], 1).T)
    assert np.abs(correlations - np.eye(16)).max() < 4.5 / math.sqrt(20_000)
    normal = normals(numbers)
    assert np.abs(normal.mean(axis=0)).max() < 4.5 / math.sqrt(20_000)
    assert np.abs(normal.std(axis=0) - 1).max() < 0.03


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (64, 64), (1, 1), (3, 900)])
def test_random_crops_are_googlenets(height, width):
    config = AugmentConfig(random_crop=True)
    n = 4000
    boxes = random_boxes(
        config,
        uniforms(1, np.arange(n), 20),
        uniforms(2, np.arange(n), 2),
        np.full(n, height),
        np.full(n, width),
    )
    top, left, tall, wide = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (tall >= 1).all()
    assert (wide >= 1).all()
    assert (top + tall <= height).all()
    assert (left + wide <= width).all()
    if min(height, width) < 10:
        return
    slack = 1.5 / np.minimum(tall, wide)  # of rounding to whole pixels
    assert (tall * wide / (height * width) > 0.08 - slack).all()
    assert (np.abs(np.log(wide / tall)) < math.log(4 / 3) + slack).all()
    area = tall * wide / (height * width)
    assert area.min() < 0.09
    assert area.max() > 0.7 if height == width else area.max() > 0.6
    assert 0.47 < np.mean(wide > tall) < 0.53 if height == width else True


def test_colours_are_pillows_enhancers():
    pixels = photo(1)
    factors = {"Brightness": 1.2, "Contrast": 0.8, "Color": 1.3}
    expected = Image.fromarray(pixels)
    for name, factor in factors.items():
        expected = getattr(ImageEnhance, name)(expected).enhance(factor)
    found = vary(
        AugmentConfig(distortion="full"), 0, 0, np.array([1]), np.array([60]), np.array([80])
    ).colours
    brightness, contrast, colour = factors.values()
    grey = np.broadcast_to([0.299, 0.587, 0.114], (3, 3))
    found.maps[0, :, :3] = brightness * contrast * (colour * np.eye(3) + (1 - colour) * grey)
    found.maps[0, :, 3] = 0
    found.mean_shares[0] = brightness * (1 - contrast)
    mine = distort(pixels, found.affine(0, channel_means(pixels)))
    assert np.abs(mine.astype(int) - np.asarray(expected)).max() <= 3  # it rounds thrice


@pytest.mark.parametrize(("distortion", "reach"), [("full", 0.5), ("reduced", 0.2)])
def test_factors_lie_evenly_in_their_range(distortion, reach):
    n = 5000
    ones = np.ones(n, dtype=np.int64)
    colours = vary(AugmentConfig(distortion=distortion), 0, 0, np.arange(n), ones, ones).colours
    gain = colours.maps[:, :, :3].sum(axis=2)  # of grey: brightness times contrast
    brightness = colours.mean_shares + gain[:, 0]
    assert np.ptp(gain, axis=1).max() < 1e-12  # a change of colour leaves grey alone
    assert abs(brightness.min() - (1 - reach)) < 0.01
    assert abs(brightness.max() - (1 + reach)) < 0.01
    assert abs(brightness.mean() - 1) < 0.02
    light = colours.maps[:, :, 3]
    assert np.abs(light.mean(axis=0)).max() < 0.5
    spread = 2 * reach * 0.1 * 255 * math.hypot(0.5675 * 0.2175, 0.7192 * 0.0188, 0.4009 * 0.0045)
    assert light.std(axis=0)[0] == pytest.approx(spread, rel=0.05)


def test_a_repeated_mini_batch_is_identical_to_the_bit():
    decoder = Decoder(spec=SPEC, augment=ALL, seed=3)
    whole = decoder.decode(BATCH, epoch=2, rows=ROWS)
    assert whole.inputs.shape == (12, 3, 24, 24)
    order = np.array([7, 0, 11, 3])
    again = decoder.decode(BATCH.take(pa.array(order)), epoch=2, rows=ROWS[order])
    assert (again.inputs == whole.inputs[order]).all()
    assert again.labels.tolist() == order.tolist()
    for other in (
        decoder.decode(BATCH, epoch=3, rows=ROWS),
        decoder.decode(BATCH, epoch=2, rows=ROWS + 1),
        Decoder(spec=SPEC, augment=ALL, seed=4).decode(BATCH, epoch=2, rows=ROWS),
    ):
        assert (other.inputs != whole.inputs).any(axis=(1, 2, 3)).all()


def test_switching_one_thing_off_leaves_the_others_alone():
    ones = np.full(50, 90)
    everything = vary(ALL, 1, 2, np.arange(50), ones, ones)
    crops = vary(AugmentConfig(random_crop=True), 1, 2, np.arange(50), ones, ones)
    assert (crops.boxes == everything.boxes).all()
    assert crops.mirrored is None
    assert crops.colours is None
    mirrors = vary(AugmentConfig(mirror=True), 1, 2, np.arange(50), ones, ones)
    assert (mirrors.mirrored == everything.mirrored).all()
    assert 10 < mirrors.mirrored.sum() < 40


def test_mirrors_are_mirrors():
    spec = ImageSpec(height=60, width=80)
    batch = batch_of([encoded(photo(0))] * 9)
    rows = np.arange(9)
    plain = Decoder(spec=spec).decode(batch, rows=rows).inputs
    varied = Decoder(spec=spec, augment=AugmentConfig(mirror=True)).decode(batch, rows=rows)
    ones = np.ones(9, dtype=np.int64)
    mirrored = vary(AugmentConfig(mirror=True), 0, 0, rows, ones, ones).mirrored
    assert 0 < mirrored.sum() < 9
    for image, before, flipped in zip(varied.inputs, plain, mirrored, strict=True):
        assert (image == (before[:, :, ::-1] if flipped else before)).all()


@pytest.mark.parametrize("box", [[0, 0, 400, 600], [33, 57, 301, 410], [100, 7, 290, 300]])
def test_decoding_at_half_size_shows_the_same_crop(box):
    file = open_image(encoded(photo(2, 400, 600)), 3)
    small = crop_file(file, 3, box, 48, 48)
    top, left, tall, wide = box
    whole = Image.fromarray(decode_file(file, 3)[top : top + tall, left : left + wide])
    expected = np.asarray(whole.resize((48, 48), Image.Resampling.BOX))
    assert np.abs(small.astype(int) - expected).mean() < 1.5


def test_images_are_fitted_by_a_central_crop():
    spec = ImageSpec(height=56, width=56, fit="crop")
    image = photo(3, 64, 100)
    found = Decoder(spec=spec).decode(batch_of([encoded(image, "PNG")])).inputs[0]
    assert (found == image[4:60, 22:78].transpose(2, 0, 1) / np.float32(255)).all()
    assert Decoder(spec=spec).decode(BATCH).inputs.shape == (12, 3, 56, 56)


def test_144_views_of_a_batch():
    seen = decode_views(BATCH, SPEC, 144)
    inputs, labels = seen.inputs, seen.labels
    assert inputs.shape == (12, 144, 3, 24, 24)
    assert labels.tolist() == list(range(12))
    assert (inputs[:, 72:] == inputs[:, :72, :, :, ::-1]).all()
    single = Decoder(spec=ImageSpec(height=24, width=24, fit="crop")).decode(BATCH).inputs
    assert (decode_views(BATCH, SPEC, 1).inputs[:, 0] == single).all()
    whole = slice(0, 8, 4)  # PNG, which is not decoded at half its size; halves do not round
    assert (inputs[whole, 6 + 4] == single[whole]).all()  # smallest scale, middle square, centre
    with pytest.raises(DecodeError, match="crops=3"):
        decode_views(BATCH, SPEC, 3)


def test_odd_files_are_read_all_the_same():
    cmyk = io.BytesIO()
    Image.fromarray(photo(4)).convert("CMYK").save(cmyk, "JPEG")
    deep = np.arange(60 * 80, dtype=np.uint16).reshape(60, 80) * 13
    grey = encoded(photo(4)[:, :, 0])
    trailing = encoded(photo(4)) + b"garbage"
    mended = Decoder(spec=ImageSpec(height=60, width=80)).decode(
        batch_of([cmyk.getvalue(), encoded(deep, "PNG"), grey, trailing])
    )
    pixels = (mended.inputs * 255).round().astype(np.uint8)
    assert (pixels[1] == (deep >> 8)).all()
    assert (pixels[2, 0] == pixels[2, 1]).all()
    assert np.abs(pixels[3].transpose(1, 2, 0).astype(int) - photo(4)).mean() < 2


def test_what_cannot_be_decoded_stops_or_is_skipped():
    images = list(FILES)
    images[4], images[9] = b"no image", FILES[9][:200]
    batch = batch_of(images)
    with pytest.raises(
        DecodeError, match=r"row 104 .*cannot be decoded.*; replace it, remove the row, or "
    ):
        Decoder(spec=SPEC, augment=ALL).decode(batch, rows=ROWS)
    kept = Decoder(spec=SPEC, augment=ALL, on_bad_image="skip").decode(batch, rows=ROWS)
    expected = [i for i in range(12) if i not in (4, 9)]
    assert kept.kept.tolist() == kept.labels.tolist() == expected
    whole = Decoder(spec=SPEC, augment=ALL).decode(BATCH, rows=ROWS)
    assert (kept.inputs == whole.inputs[expected]).all()
    assert [line.split(" (")[0] for line in kept.problems] == [
        "the image of row 104",
        "the image of row 109",
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_area": 0}, "min_area=0"),
        ({"max_aspect": 0.5}, "max_aspect=0.5"),
        ({"distortion": "some"}, "distortion='some'"),
    ],
)
def test_config_errors_name_the_value(fields, message):
    with pytest.raises(DecodeError, match=message):
        AugmentConfig(**fields)


def test_packed_bits_and_unnumbered_rows_cannot_be_varied():
    bits = pa.RecordBatch.from_arrays(
        [pa.array([b"\x00"], pa.binary(1)), pa.array([0])],
        schema=schema_for(PackedBits(2, 4), ()),
    )
    spec = ImageSpec(height=2, width=4, channels=1)
    with pytest.raises(DecodeError, match="packed bits cannot be cropped"):
        Decoder(spec=spec, augment=ALL).decode(bits, rows=np.array([0]))
    with pytest.raises(DecodeError, match="give rows"):
        Decoder(spec=SPEC, augment=ALL).decode(BATCH)
    with pytest.raises(DecodeError, match="on_bad_image='hide'"):
        Decoder(spec=SPEC, on_bad_image="hide")
    with pytest.raises(DecodeError, match="crops are square"):
        ImageSpec(height=2, width=4, fit="crop")
