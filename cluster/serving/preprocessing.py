"""What is done to an image before the network: in words and numbers for other programs.

The same as an ONNX graph is in `preprocessing_graph`; what Downpour itself does is in
`shuffler/images`.
"""

from __future__ import annotations

from typing import Any

from downpour.shuffler.images.crops import single_view
from downpour.shuffler.images.specs import ImageSpec
from downpour.workers.spec import ModelSpec

RESIZING = (
    "bilinear with half-pixel centres and without antialiasing; means of areas if both sides "
    "shrink to a half or less; rounded to whole values"
)
LUMINANCE = (0.299, 0.587, 0.114)


def describe_input(spec: ModelSpec) -> dict[str, Any]:
    """Return what a network takes, as plain data: pictures (`describe`), or a row's numbers.

    Args:
        spec: of the network.
    """
    if isinstance(spec.image, ImageSpec):
        return describe(spec.image)
    columns = spec.columns
    return {
        "input_shape": ["batch", *spec.image.input_shape],
        "dtype": "float32",
        "columns": list(columns.inputs),
        "numbers_of_each_column": list(columns.input_widths),
        "steps": ["the columns' numbers one after the other, in this order, as float32"],
    }


def describe(image: ImageSpec) -> dict[str, Any]:
    """Return what another program has to do to an image, as plain data.

    Args:
        image: the images that the network takes.
    """
    shape = ["batch", *image.input_shape]
    grey = image.channels == 1
    told: dict[str, Any] = {
        "height": image.height,
        "width": image.width,
        "channels": "grey" if grey else "RGB",
        "input_shape": shape,
        "layout": "vectors, channel by channel and row by row" if image.flatten else "NCHW",
        "dtype": "float32",
        "scale": None if image.binary_threshold is not None else 1 / 255,
        "mean": [0.0] * image.channels,
        "std": [1.0] * image.channels,
        "threshold": image.binary_threshold,
        "orientation": image.orientation,
        "transparency": image.transparency,
        "resize": None,
        "crop": None,
    }
    if image.fit == "whole":
        told["resize"] = {"height": image.height, "width": image.width, "method": RESIZING}
    elif image.height == image.width:
        told["resize"] = {
            "shorter_side": shorter_side(image),
            "longer_side": "in proportion, rounded",
            "method": RESIZING,
            "unless": None
            if image.fit == "crop"
            else f"the image has {image.height}x{image.width} pixels",
        }
        told["crop"] = {"height": image.height, "width": image.width, "place": "centre"}
    return told | {"steps": _steps(image)}


def shorter_side(image: ImageSpec) -> int:
    """Return the shorter side that an image is resized to before its centre is cut."""
    return single_view(image.height, image.height, image.height)[0].image_height


def _steps(image: ImageSpec) -> list[str]:
    steps = []
    if image.orientation == "follow":
        steps.append("turn the image upright as its EXIF orientation says")
    if image.transparency == "white":
        steps.append("blend transparent pixels with white")
    if image.channels == 1:
        red, green, blue = LUMINANCE
        steps.append(f"make it grey: {red} red + {green} green + {blue} blue, rounded, 0 to 255")
    else:
        steps.append("make it red, green, blue, 0 to 255")
    size = f"{image.height}x{image.width}"
    if image.fit == "whole":
        steps.append(f"resize all of it to {size}, whatever its shape ({RESIZING})")
    elif image.height != image.width:
        steps.append(f"it has to have {size} pixels")
    else:
        other = "" if image.fit == "crop" else f"if it has not {size} pixels, "
        steps.append(
            f"{other}resize its shorter side to {shorter_side(image)}, the longer one in "
            f"proportion ({RESIZING}), and cut the central {size}"
        )
    if image.binary_threshold is not None:
        steps.append(f"values above {image.binary_threshold} become 1, others 0")
    else:
        steps.append("divide by 255")
    order = "one vector, channel by channel and row by row" if image.flatten else "channel, row"
    return [*steps, f"order as {order}"]
