"""What is done to an image before the network, as an ONNX graph that stands before the network's.

    image         uint8 [n, h, w, c]: n images of one size, c is 1 or 3; as a decoder gives them
    orientation   int64, optional: how they are stored, 1 to 8 as in EXIF; 1 is upright

A resized image is R X C: the rows of X are weighted by the matrix R, its columns by C. Weights of
bilinear interpolation and of means of areas are two formulas for the same two matrices, so there is
one way for both, and only the part that is cut out is computed. Flips exchange columns of the
matrices. The result is that of `shuffler/images` to one of 255 levels.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from downpour.cluster.serving.preprocessing import LUMINANCE, shorter_side
from downpour.shuffler.images.specs import ImageSpec

INPUT, ORIENTATION, OUTPUT = "image", "orientation", "images"
PREFIX = "preprocessing/"

# Of orientations 0 (none) to 8: whether rows and columns are exchanged, and then flipped.
_EXCHANGED = (0, 0, 0, 0, 0, 1, 1, 1, 1)
_ROWS_FLIPPED = (0, 0, 0, 1, 1, 0, 0, 1, 1)
_COLUMNS_FLIPPED = (0, 0, 1, 1, 0, 0, 1, 1, 0)


def graph(image: ImageSpec, *, opset: int, ir_version: int) -> onnx.ModelProto:
    """Return the graph from `image` to what the network takes.

    Args:
        image: the images that the network takes, which are square.
        opset: version of ONNX's operators, 18 or later.
        ir_version: version of ONNX's format.
    """
    build = _Builder()
    pixels = _upright(build)
    pixels = _coloured(build, pixels, image.channels)
    pixels = _cut(build, pixels, image)
    if image.binary_threshold is not None:
        above = build("Greater", pixels, build.constant(np.float32(image.binary_threshold)))
        values = build("Cast", above, to=onnx.TensorProto.FLOAT)
    else:
        values = build("Div", pixels, build.constant(np.float32(255)))
    planes = build("Transpose", values, perm=[0, 3, 1, 2])
    build("Flatten" if image.flatten else "Identity", planes, output=OUTPUT)
    helper, kinds = onnx.helper, onnx.TensorProto
    upright = onnx.numpy_helper.from_array(np.array(1, np.int64), ORIENTATION)
    made = helper.make_graph(
        build.nodes,
        "preprocessing",
        [
            helper.make_tensor_value_info(
                INPUT, kinds.UINT8, ["batch", "height", "width", "channels"]
            ),
            helper.make_tensor_value_info(ORIENTATION, kinds.INT64, []),
        ],
        [helper.make_tensor_value_info(OUTPUT, kinds.FLOAT, ["batch", *image.input_shape])],
        [*build.constants, upright],
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(made, opset_imports=opsets, ir_version=ir_version)


def before(network: onnx.ModelProto, image: ImageSpec) -> onnx.ModelProto:
    """Return a network that takes images as decoders give them.

    Args:
        network: takes `images`, gives `logits`.
        image: the images that it takes, which are square.
    """
    versions = {each.domain: each.version for each in network.opset_import}
    first = graph(image, opset=versions[""], ir_version=network.ir_version)
    ours = {each.domain for each in first.opset_import}
    first.opset_import.extend(each for each in network.opset_import if each.domain not in ours)
    return onnx.compose.merge_models(first, network, io_map=[(OUTPUT, OUTPUT)])


class _Builder:
    """Nodes and constants of a graph. Called with an operator and its inputs, it adds a node."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._numbers = itertools.count()

    def __call__(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"{PREFIX}{next(self._numbers)}"
        self.nodes.append(
            onnx.helper.make_node(
                operator, list(inputs), [output], name=f"{PREFIX}{output}", **attributes
            )
        )
        return output

    def constant(self, value: np.generic | NDArray[Any]) -> str:
        """Return the name of a constant."""
        name = f"{PREFIX}{next(self._numbers)}"
        self.constants.append(onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    def whole(self, value: int) -> str:
        """Return the name of a whole number, int64 []."""
        return self.constant(np.int64(value))

    def table(self, values: tuple[int, ...], index: str) -> str:
        """Return whether an entry of a table is 1, bool []."""
        found = self("Gather", self.constant(np.array(values, np.int64)), index)
        return self("Equal", found, self.whole(1))

    def size(self, tensor: str, axis: int) -> str:
        """Return the length of an axis, int64 []."""
        return self("Gather", self("Shape", tensor), self.whole(axis))

    def real(self, tensor: str) -> str:
        """Return a tensor as float32."""
        return self("Cast", tensor, to=onnx.TensorProto.FLOAT)


def _upright(build: _Builder) -> str:
    """Exchange rows and columns if the orientation says so; flips are `_weights`'."""
    helper = onnx.helper
    info = helper.make_tensor_value_info("turned", onnx.TensorProto.UINT8, None)
    ways = {
        "then_branch": helper.make_node("Transpose", [INPUT], ["turned"], perm=[0, 2, 1, 3]),
        "else_branch": helper.make_node("Identity", [INPUT], ["turned"]),
    }
    branches = {}
    for name, node in ways.items():
        own = f"{PREFIX}{name}"
        node.output[0] = info.name = own
        branches[name] = helper.make_graph([node], name, [], [info])
    return build("If", build.table(_EXCHANGED, ORIENTATION), **branches)


def _coloured(build: _Builder, pixels: str, channels: int) -> str:
    """Return float32 [n, h, w, channels], values 0 to 255, of uint8 [n, h, w, 1 or 3]."""
    values = build.real(pixels)
    if channels == 3:
        ends = build.constant(np.array([0])), build.constant(np.array([3]))
        sizes = build("Slice", build("Shape", values), *ends)
        shape = build("Concat", sizes, build.constant(np.array([3])), axis=0)
        return build("Expand", values, shape)
    count = build.size(values, 3)
    shares = build.constant(np.array([[1, 0, 0], LUMINANCE], np.float32))
    is_coloured = build("Cast", build("Equal", count, build.whole(3)), to=onnx.TensorProto.INT64)
    row = build("Gather", shares, is_coloured)
    ends = build.constant(np.array([0])), build("Reshape", count, build.constant(np.array([1])))
    column = build("Unsqueeze", build("Slice", row, *ends), build.constant(np.array([1])))
    return _rounded(build, build("MatMul", values, column))


def _cut(build: _Builder, pixels: str, image: ImageSpec) -> str:
    """Return the central square of the resized images, float32 [n, size, size, c]."""
    side, size = build.whole(shorter_side(image)), image.height
    height, width = build.size(pixels, 1), build.size(pixels, 2)
    short, long = build("Min", height, width), build("Max", height, width)
    # The longer side in proportion, rounded: (2 long side + short) / (2 short).
    twice = build("Mul", build.whole(2), short)
    above = build("Add", build("Mul", build("Mul", build.whole(2), long), side), short)
    longer = build("Div", above, twice)
    is_wide = build("LessOrEqual", height, width)
    tall = build("Where", is_wide, side, longer)
    wide = build("Where", is_wide, longer, side)
    if image.fit != "crop":
        fits = build(
            "And",
            build("Equal", height, build.whole(size)),
            build("Equal", width, build.whole(size)),
        )
        tall, wide = build("Where", fits, height, tall), build("Where", fits, width, wide)
    shrinks = build(
        "And",
        build("GreaterOrEqual", height, build("Mul", build.whole(2), tall)),
        build("GreaterOrEqual", width, build("Mul", build.whole(2), wide)),
    )
    rows_flipped = build.table(_ROWS_FLIPPED, ORIENTATION)
    columns_flipped = build.table(_COLUMNS_FLIPPED, ORIENTATION)
    rows = _weights(build, height, tall, size, shrinks, rows_flipped)
    columns = _weights(build, width, wide, size, shrinks, columns_flipped)
    flat = build("Reshape", pixels, build.constant(np.array([0, 0, -1])))  # [n, h, w c]
    kept = build("MatMul", rows, flat)  # [n, size, w c]
    channels = build.constant(np.array([0, size, -1, image.channels]))
    kept = build("MatMul", columns, build("Reshape", kept, channels))
    return _rounded(build, kept)


def _weights(
    build: _Builder, length: str, resized: str, size: int, shrinks: str, flipped: str
) -> str:
    """Return what of each of `length` pixels is in each of the central `size` of `resized`.

    Bilinear: pixel i is at x = (i + 1/2) s - 1/2 with s = length / resized, clipped to the image,
    and takes max(0, 1 - |x - j|) of pixel j. Areas: it covers [i s, (i + 1) s), and takes of pixel
    j the share of that which lies in [j, j + 1).

    Returns:
        float32 [size, length].
    """
    one, zero, half = (build.constant(np.float32(value)) for value in (1, 0, 0.5))
    step = build("Div", build.real(length), build.real(resized))
    begin = build("Div", build("Sub", resized, build.whole(size)), build.whole(2))
    count = build.whole(1)
    inside = build("Range", begin, build("Add", begin, build.whole(size)), count)
    i = build("Unsqueeze", build.real(inside), build.constant(np.array([1])))
    place = build("Range", build.whole(0), length, count)
    last = build("Sub", length, count)
    j = build.real(build("Where", flipped, build("Sub", last, place), place))

    centre = build("Sub", build("Mul", build("Add", i, half), step), half)
    x = build("Min", build("Max", centre, zero), build.real(last))
    near = build("Max", build("Sub", one, build("Abs", build("Sub", x, j))), zero)

    low = build("Mul", i, step)
    high = build("Add", low, step)
    ends = build("Min", high, build("Add", j, one)), build("Max", low, j)
    covered = build("Div", build("Max", build("Sub", *ends), zero), step)
    return build("Where", shrinks, covered, near)


def _rounded(build: _Builder, values: str) -> str:
    return build("Floor", build("Add", values, build.constant(np.float32(0.5))))
