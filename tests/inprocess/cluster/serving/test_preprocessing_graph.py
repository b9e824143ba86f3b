"""The preprocessing in an ONNX file is that of `predict`, to one of 255 levels."""

import io
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from downpour.cluster.serving.preprocessing import describe, shorter_side
from downpour.cluster.serving.preprocessing_graph import graph
from downpour.shuffler.images.decode import Decoder
from downpour.shuffler.images.specs import ImageSpec
from tests.helpers.oriented import STORED, oriented, rows_with_images

SPECS = {
    "cropped": ImageSpec(height=28, width=28, fit="crop"),
    "exact": ImageSpec(height=32, width=32),
    "grey": ImageSpec(height=24, width=24, channels=1),
    "binary": ImageSpec(height=28, width=28, channels=1, binary_threshold=127, flatten=True),
}


def photo(height: int, width: int, channels: int) -> np.ndarray:
    """Smooth colours, uint8 [h, w, 3] or grey [h, w]."""
    coarse = np.random.default_rng(height).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image.convert("L") if channels == 1 else image)


def session_of(spec: ImageSpec) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = graph(spec.of_any_size, opset=18, ir_version=10).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def stored(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What a decoder gives that follows no orientation: uint8 [1, h, w, c]."""
    way, image = STORED[orientation], Image.fromarray(pixels)
    found = np.asarray(image if way is None else image.transpose(way))
    return found.reshape(1, *found.shape[:2], -1)


@pytest.mark.parametrize("name", SPECS)
def test_any_size_and_orientation(name: str) -> None:
    spec, session = SPECS[name], session_of(SPECS[name])
    size = spec.height
    for height, width in ((size, size), (size + 3, 2 * size), (5 * size + 1, 3 * size), (9, 7)):
        pixels = photo(height, width, spec.channels)
        for orientation in range(1, 9):
            rows = rows_with_images([oriented(pixels, orientation, "PNG")])
            ours = Decoder(spec=spec.of_any_size).decode(rows).inputs
            given = {"image": stored(pixels, orientation), "orientation": np.array(orientation)}
            (found,) = session.run(None, given)
            assert found.shape == ours.shape == (1, *spec.input_shape)
            apart = np.abs(found - ours)
            if spec.binary_threshold is None:
                assert apart.max() <= 1.001 / 255
            else:
                assert apart.mean() <= 0.01
                assert 0.1 < ours.mean() < 0.9
            if (height, width) == (size, size) and spec.fit == "exact":
                assert apart.max() == 0, "an image of the network's size is taken as it is"
        (upright,) = session.run(None, {"image": stored(pixels, 1)})  # orientation is optional
        (said,) = session.run(None, {"image": stored(pixels, 1), "orientation": np.array(1)})
        assert (upright == said).all()


def test_colour_becomes_grey_and_grey_becomes_colour() -> None:
    for name, given in (("grey", photo(40, 50, 3)), ("exact", photo(40, 50, 1))):
        spec = SPECS[name]
        buffer = io.BytesIO()
        Image.fromarray(given).save(buffer, "PNG")
        ours = Decoder(spec=spec.of_any_size).decode(rows_with_images([buffer.getvalue()])).inputs
        (found,) = session_of(spec).run(None, {"image": given.reshape(1, 40, 50, -1)})
        assert np.abs(found - ours).max() <= 2.001 / 255  # one level when made grey, one resized


def test_several_images_of_one_size_at_once() -> None:
    session = session_of(SPECS["cropped"])
    images = np.stack([photo(40, 50, 3), 255 - photo(40, 50, 3)])
    (together,) = session.run(None, {"image": images})
    for alone, image in zip(together, images, strict=True):
        np.testing.assert_allclose(session.run(None, {"image": image[None]})[0][0], alone)


def test_what_other_programs_are_told() -> None:
    told = describe(ImageSpec(height=224, width=224, fit="crop"))
    assert told["resize"]["shorter_side"] == shorter_side(SPECS["cropped"]) * 8 == 256
    assert (told["mean"], told["std"], told["scale"]) == ([0.0] * 3, [1.0] * 3, 1 / 255)
    assert told["input_shape"] == ["batch", 3, 224, 224]
    assert told["steps"][0].startswith("turn the image upright")
    binary = describe(SPECS["binary"])
    assert (binary["threshold"], binary["scale"], binary["channels"]) == (127, None, "grey")
    assert "values above 127 become 1, others 0" in binary["steps"]
    narrow = describe(ImageSpec(height=32, width=64, orientation="ignore", transparency="drop"))
    assert (narrow["resize"], narrow["crop"]) == (None, None)
    assert narrow["steps"][:2] == [
        "make it red, green, blue, 0 to 255",
        "it has to have 32x64 pixels",
    ]
