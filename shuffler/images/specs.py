"""What a network takes: images of one size, or numbers. How they come to be that is `decode`'s."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final, Literal

from downpour.shuffler.errors import DecodeError
from downpour.shuffler.images.reading import Orientation, Reading, Transparency

Fit = Literal["exact", "crop", "any", "whole"]

_MODES: Final = {1: "grey", 3: "RGB"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSpec:
    """The images that a network takes."""

    height: int
    """Pixels from top to bottom."""

    width: int
    """Pixels from left to right."""

    channels: int = 3
    """1: grey, 3: RGB. Images are converted to it."""

    binary_threshold: int | None = None
    """Grey values above it become 1, others 0 (section 4.1: 127). None: values / 255."""

    flatten: bool = False
    """Whether inputs are vectors [n, c*h*w] for fully connected layers, or [n, c, h, w]."""

    fit: Fit = "exact"
    """How images come to that size where no random crop does it. `exact`: they have it, and others
    are refused. `crop`: the shorter side is resized to 256/224 of it, and the centre is cut.
    `any`: those that have it are taken as they are, and others are cut as by `crop`. `whole`: all
    of an image is resized to it, whatever its shape, as masks want it."""

    orientation: Orientation = "follow"
    """Whether photos are turned upright as their EXIF orientation says."""

    transparency: Transparency = "white"
    """What is seen of transparent pixels: they are blended with white, or their hidden colours."""

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise DecodeError(
                f"an image of {self.height}x{self.width} has no pixels; give 1 or more"
            )
        if self.channels not in _MODES:
            raise DecodeError(
                f"channels={self.channels} is not supported; give 1 (grey) or 3 (RGB)"
            )
        for name, known in (
            ("fit", ("exact", "crop", "any", "whole")),
            ("orientation", ("follow", "ignore")),
            ("transparency", ("white", "drop")),
        ):
            if getattr(self, name) not in known:
                raise DecodeError(
                    f"{name}={getattr(self, name)!r} is unknown; choose {' or '.join(known)}"
                )
        if self.fit in ("crop", "any") and self.height != self.width:
            raise DecodeError(
                f"crops are square, and {self.height}x{self.width} is not; give a square size, or "
                "fit='exact'"
            )
        if self.binary_threshold is not None and not 0 <= self.binary_threshold <= 254:
            raise DecodeError(
                f"binary_threshold={self.binary_threshold} splits no grey values; give 0 to 254"
            )

    @property
    def reading(self) -> Reading:
        """How the pixels of a file are read."""
        return Reading(orientation=self.orientation, transparency=self.transparency)

    @property
    def of_any_size(self) -> ImageSpec:
        """The same, for images of any size: others are cut, if the network's input is square."""
        if self.fit == "exact" and self.height == self.width:
            return dataclasses.replace(self, fit="any")
        return self

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        if self.flatten:
            return (self.channels * self.height * self.width,)
        return (self.channels, self.height, self.width)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """The numbers that a network takes."""

    shape: tuple[int, ...]
    """Shape of one input."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return self.shape

    @property
    def of_any_size(self) -> TensorSpec:
        """The same: numbers are taken as they are."""
        return self


InputSpec = ImageSpec | TensorSpec
