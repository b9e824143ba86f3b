"""The pixels of an image file of any format that Pillow reads.

Transparent pixels are blended with white, as if the image lay on paper:
`alpha * colour + (1 - alpha) * 255`. What colours a file hides under full transparency depends on
the program that wrote it, so they are not seen, unless `Reading` asks for them.

Grey values of 16 bits are brought to 8 by leaving out the lower ones. If a file says that it uses
fewer bits than that, its own highest ones are kept.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from downpour.shuffler.dataset.files import one_line
from downpour.shuffler.errors import DecodeError
from downpour.shuffler.images.bounds import open_image
from downpour.shuffler.images.orientation import UPRIGHT, opened_orientation
from downpour.shuffler.images.reading import Reading

Pixels = NDArray[np.uint8]
"""[height, width, channels]."""

Buffer = bytes | memoryview

_MODES: Final = {1: "L", 3: "RGB"}
_BITS_PER_SAMPLE: Final = 258
"""Tag of TIFF."""
_DARK_BITS: Final = 14
"""Values of 16 bits that use no more than the lower 14, as cameras and scanners give them, reach
a quarter of white at most; that is told."""


def decode(data: Buffer, channels: int, reading: Reading) -> tuple[Pixels, int, str | None]:
    """Return the pixels of an image file as they are stored, and what else is to be known.

    Returns:
        pixels: uint8 [h, w, channels].
        orientation: how they have yet to be turned, 1 to 8 as in EXIF.
        note: what is to be told of them, if anything.

    Raises:
        DecodeError: the bytes are not an image, are cut short, would take too much memory
            (`bounds`), or hold values of a range that is not known.
    """
    try:
        with open_image(data) as image:
            deep = any(";16" in str(tile[3]) for tile in image.tile)
            image.load()  # some formats keep their EXIF behind the pixels
            follow = reading.orientation == "follow"
            orientation = opened_orientation(image) if follow else UPRIGHT
            if image.mode.startswith(("I", "F")):
                grey, note = _deep_grey(image)
                return np.repeat(grey[:, :, None], channels, axis=2), orientation, note
            blend = reading.transparency == "white" and image.has_transparency_data
            shown = _on_white(image) if blend else image
            pixels = np.asarray(shown.convert(_MODES[channels]))
    except DecodeError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        raise DecodeError(one_line(error)) from error
    pixels = pixels.reshape(*pixels.shape[:2], channels)
    # Pillow has left out the lower 8 bits of colours of 16.
    note = _note(int(pixels.max(initial=0)) << 8) if deep else None
    return pixels, orientation, note


def _on_white(image: Any) -> Any:
    """Return an image blended with white, without transparency."""
    from PIL import Image

    paper = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")


def _deep_grey(image: Any) -> tuple[NDArray[np.uint8], str | None]:
    """Return grey values of more than 8 bits as uint8 [h, w], and what is to be told of them."""
    if image.mode == "F":
        raise DecodeError("its values are floats, whose range is not known: save it with 8 bits")
    if image.mode == "I" and image.format not in ("PPM", "PNG"):  # these two are known to have 16
        raise DecodeError(
            "its values are integers of 32 bits, whose range is not known: save it with 8 or 16"
        )
    values = np.asarray(image)
    bits = _bits(image)
    grey: NDArray[np.uint8] = np.minimum(values >> (bits - 8), 255).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return grey, _note(int(values.max(initial=0))) if bits == 16 else None


def _note(most: int) -> str | None:
    """Return what is to be told of values of 16 bits, the largest of which is `most`."""
    used = most.bit_length()
    if not 0 < used <= _DARK_BITS:
        return None
    return (
        f"its values of 16 bits use the lower {used} only, so it is seen nearly black: scale them"
    )


def _bits(image: Any) -> int:
    """Return how many bits the values of an image of up to 16 bits have."""
    if image.format == "TIFF":
        found = max(image.tag_v2.get(_BITS_PER_SAMPLE, (16,)))
        return int(found) if 8 < found < 16 else 16
    return 16
