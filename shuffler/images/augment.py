"""Random crops, mirrors and colours for training: what is done to each image, as numbers.

Every image's numbers come from a stream named by (seed, epoch, example), so a mini-batch that is
made again, on whatever machine and after whichever others, is the same to the bit. Here they are
drawn, for many images at once; `pixels` applies them. Crops for evaluation are in `crops`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from downpour.shuffler.errors import DecodeError
from downpour.shuffler.plan.draws import normals, uniforms
from downpour.shuffler.plan.keys import stream_key

Distortion = Literal["none", "reduced", "full"]

STRENGTH: Final = {"none": 0.0, "reduced": 0.4, "full": 1.0}
"""Of the photometric distortion. Howard (2013) is `full`; by how much section 4.2.1 reduced it the
paper does not say, so `reduced` is this project's choice."""

_ATTEMPTS: Final = 10
_RED, _GREEN, _BLUE = 0.299, 0.587, 0.114
_LUMINANCE: Final = np.array([_RED, _GREEN, _BLUE])
"""ITU-R 601 weights of red, green and blue, as Pillow's `convert("L")`."""

_LIGHTING: Final = 255 * np.array(
    [
        [-0.5675 * 0.2175, 0.7192 * 0.0188, 0.4009 * 0.0045],
        [-0.5808 * 0.2175, -0.0045 * 0.0188, -0.8140 * 0.0045],
        [-0.5836 * 0.2175, -0.6948 * 0.0188, 0.4203 * 0.0045],
    ]
)
"""Principal components of ImageNet's pixels (columns), times their standard deviations."""

_LIGHTING_DEVIATION: Final = 0.1

# Where in an example's stream its numbers stand: fixed, so that switching one thing on or off
# changes nothing else.
_MIRROR, _COLOUR, _LIGHT, _PLACE, _SHAPES = 0, slice(1, 4), slice(4, 8), slice(8, 10), 10
_COUNT: Final = _SHAPES + 2 * _ATTEMPTS


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """How training images are varied."""

    random_crop: bool = False
    """Train on a random crop of each image, resized to the network's input (GoogLeNet's)."""

    min_area: float = 0.08
    """Least share of the image's area that a random crop takes; the most is all of it."""

    max_aspect: float = 4 / 3
    """Most that a random crop is wider than high, or higher than wide."""

    mirror: bool = False
    """Exchange left and right of images at random, half of the time."""

    distortion: Distortion = "none"
    """Photometric distortion after Howard (2013): `full`, or of `reduced` strength."""

    def __post_init__(self) -> None:
        if not 0 < self.min_area <= 1:
            raise DecodeError(f"min_area={self.min_area} is no share; give more than 0, at most 1")
        if not 1 <= self.max_aspect < math.inf:
            raise DecodeError(f"max_aspect={self.max_aspect} is no ratio; give 1 or more")
        if self.distortion not in STRENGTH:
            raise DecodeError(
                f"distortion={self.distortion!r} is unknown; choose 'none', 'reduced' or 'full'"
            )

    @property
    def changes_nothing(self) -> bool:
        """Whether images are left as they are."""
        return not (self.random_crop or self.mirror or self.distortion != "none")


@dataclass(frozen=True, kw_only=True, slots=True)
class Variations:
    """What is done to each of n images."""

    boxes: NDArray[np.int64] | None
    """Crops [n, 4]: top, left, height, width; None for none."""

    mirrored: NDArray[np.bool_] | None
    """Which are mirrored, [n]; None for none."""

    colours: Colours | None
    """What is done to their colours; None for nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Colours:
    """Photometric distortions of n images, each as one affine map of its colours.

    Howard (2013) multiplies brightness, contrast and colour by factors from 0.5 to 1.5 with
    Pillow's enhancers, in random order, and adds Krizhevsky's lighting noise. Each enhancer is an
    affine map: with the image's mean luminance m, and L the luminance of a pixel,

        brightness b:  x -> b x        contrast k:  x -> k x + (1 - k) m
        colour s:      x -> s x + (1 - s) L(x)

    They commute but for rounding and clipping between them, because L(m) = m. So they are composed
    exactly, whatever their order, and rounded and clipped once:
    x -> b k (s x + (1 - s) L(x)) + b (1 - k) m + noise.
    """

    maps: NDArray[np.float64]
    """b k (s I + (1 - s) 1 L^T) and the lighting noise on a scale of 0 to 255, [n, 3, 4]."""

    mean_shares: NDArray[np.float64]
    """b (1 - k), [n]: what of the mean luminance is added."""

    def affine(self, index: int, means: Sequence[float]) -> NDArray[np.float64]:
        """Return the map of image `index` as [channels, channels + 1], given its channels' means.

        A grey image has no colour to change: it takes brightness, contrast and the noise's mean.
        """
        affine: NDArray[np.float64] = self.maps[index].copy()
        if len(means) == 1:
            scale, noise = affine[:, :3].sum() / 3, affine[:, 3].mean()
            return np.array([[scale, noise + self.mean_shares[index] * means[0]]])
        red, green, blue = means
        luminance = _RED * red + _GREEN * green + _BLUE * blue
        affine[:, 3] += self.mean_shares[index] * luminance
        return affine


def vary(
    config: AugmentConfig,
    seed: int,
    epoch: int,
    rows: NDArray[np.integer],
    heights: NDArray[np.integer],
    widths: NDArray[np.integer],
) -> Variations:
    """Return what is done to the images of `rows` in `epoch`: a function of its arguments alone.

    Args:
        config: what may be done.
        seed: of the run.
        epoch: from 0.
        rows: numbers of the rows in their dataset, [n].
        heights: of the images, [n] pixels.
        widths: of the images, [n] pixels.
    """
    draws = uniforms(stream_key(seed, "augment", epoch), rows, _COUNT)
    strength = STRENGTH[config.distortion]
    return Variations(
        boxes=random_boxes(config, draws[:, _SHAPES:], draws[:, _PLACE], heights, widths)
        if config.random_crop
        else None,
        mirrored=draws[:, _MIRROR] < 0.5 if config.mirror else None,
        colours=_colours(strength, draws[:, _COLOUR], normals(draws[:, _LIGHT])[:, :3])
        if strength
        else None,
    )


def random_boxes(
    config: AugmentConfig,
    shapes: NDArray[np.float64],
    places: NDArray[np.float64],
    heights: NDArray[np.integer],
    widths: NDArray[np.integer],
) -> NDArray[np.int64]:
    """Return a random crop of each image, int64 [n, 4]: top, left, height, width.

    Szegedy et al. (2014), section 6: a patch of 8% to 100% of the image's area, with an aspect
    ratio from 3/4 to 4/3 (drawn evenly in its logarithm). One that does not lie in the image is
    drawn again, ten times at most; then it is the largest central one of an allowed ratio.

    Args:
        config: least area and largest ratio.
        shapes: uniform numbers [n, 2 k]: areas and ratios of the k attempts.
        places: uniform numbers [n, 2]: where the crop lies.
        heights: of the images, [n].
        widths: of the images, [n].
    """
    height = np.asarray(heights, dtype=np.float64)[:, None]
    width = np.asarray(widths, dtype=np.float64)[:, None]
    bound = math.log(config.max_aspect)
    share = config.min_area + (1 - config.min_area) * shapes[:, 0::2]
    ratio = np.exp(bound * (2 * shapes[:, 1::2] - 1))
    tall = np.rint(np.sqrt(share * height * width / ratio))
    wide = np.rint(np.sqrt(share * height * width * ratio))
    fits = np.logical_and.reduce([tall >= 1, wide >= 1, tall <= height, wide <= width])
    first = fits.argmax(axis=1)[:, None]
    found = fits.any(axis=1)
    cut = np.concatenate(
        [np.take_along_axis(tall, first, axis=1), np.take_along_axis(wide, first, axis=1)], axis=1
    )
    whole = np.concatenate([height, width], axis=1)
    clipped = np.maximum(1, np.rint(np.minimum(whole, whole[:, ::-1] * config.max_aspect)))
    cut = np.where(found[:, None], cut, clipped)
    spare = whole - cut
    at = np.where(found[:, None], np.floor(places * (spare + 1)), np.floor(spare / 2))
    return np.concatenate([at, cut], axis=1).astype(np.int64)


def _colours(strength: float, factors: NDArray[np.float64], noise: NDArray[np.float64]) -> Colours:
    brightness, contrast, colour = (1 + strength * (factors - 0.5)).T
    to_grey = np.broadcast_to(_LUMINANCE, (3, 3))
    matrices = colour[:, None, None] * np.eye(3) + (1 - colour)[:, None, None] * to_grey
    matrices = (brightness * contrast)[:, None, None] * matrices
    light = (strength * _LIGHTING_DEVIATION) * (noise @ _LIGHTING.T)
    return Colours(
        maps=np.concatenate([matrices, light[:, :, None]], axis=2),
        mean_shares=brightness * (1 - contrast),
    )
