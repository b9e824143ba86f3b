"""What a recipe leaves to the data: classes, splits, and the size and colours of pictures.

Not here: the recipe's other values (`cluster.config.classifier`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from downpour.cluster.config import classifier as recipe
from downpour.cluster.config import recipes
from downpour.cluster.config.options import apply
from downpour.cluster.config.run import RunConfig
from downpour.cluster.config.settings import settings_of
from downpour.cluster.errors import UserError
from downpour.cluster.training.classes import with_classes
from downpour.cluster.training.masks import shaped
from downpour.cluster.training.tasks import with_task
from downpour.shuffler.dataset.encoding import PackedBits
from downpour.shuffler.dataset.own import is_own, open_split
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset, split_names
from downpour.shuffler.errors import DecodeError
from downpour.shuffler.images.augment import AugmentConfig
from downpour.shuffler.images.specs import ImageSpec

Say = Callable[[str], object]

SCORED_FIRST = ("validation", "valid", "val", "dev", "test", "eval")
"""Splits to score, the best choice first."""
SAMPLED_ROWS = 64
LEAST_PHOTO = 24
"""Pixels from which on a colour picture is taken for a photograph, that may be cropped."""
BINARY_THRESHOLD = 127
GREY_MODES = ("1", "L", "LA", "I", "I;16", "F")


@dataclass(frozen=True, kw_only=True)
class _Pictures:
    """What a sample of a split's pictures shows."""

    side: int | None
    """Pixels of both sides, if all have the same; None if not."""
    coloured: bool
    bits: PackedBits | None = None
    """How they are packed, if they are binary."""


def classifier(model: str, data: str, **settings: object) -> RunConfig:
    """The recipe `classifier` for a network and a dataset, complete.

    Args:
        model: `package.module:function`, such as `torchvision.models:resnet18`.
        data: folder or URI of the dataset.
        settings: any others by name, as `downpour train classifier --help` lists them; `model_arg`
            is a dict of the function's keyword arguments.

    Raises:
        UserError: a setting does not exist, or the data lacks something.
    """
    known = {setting.name for setting in settings_of(RunConfig)}
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"there is no setting {name!r}{hint}")
    given = {"model": model, "data": data, **settings}
    return complete(apply(recipe.classifier(), given), given)


def complete(
    config: RunConfig, given: Mapping[str, object], say: Say = lambda _: None
) -> RunConfig:
    """Fill in what the recipe leaves to the data and the user has not given.

    Args:
        config: of any recipe; only that of `classifier` leaves more than the number of classes.
        given: names of the settings that the user has given.
        say: gets a line that says what was filled in.

    Raises:
        UserError: no network is named, there is no split to score, or the number of classes that
            is given is not the data's.
        DatasetError: the data cannot be read.
    """
    if config.recipe != recipe.NAME:
        config = with_task(config, given, say)
        return with_classes(config, chosen="num_classes" in given, say=say)
    if not config.model.model:
        raise UserError(
            "the recipe classifier trains any network: name it with --model, such as --model "
            "torchvision.models:resnet18, or --model timm:create_model --model-arg model_name=dla34"
        )
    if "data" not in given:
        raise UserError("the recipe classifier needs the folder of a dataset: give --data")
    recipes.admit(config)
    source = config.data.data
    eval_split = config.data.eval_split
    if "eval_split" not in given and not is_own(source):
        eval_split = _split_to_score(source, config.data.train_split)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, eval_split=eval_split)
    )
    config = with_task(config, given, say)
    if not isinstance(config.model.image, ImageSpec):
        return with_classes(config, chosen="num_classes" in given, say=say)
    train = open_split(source, config.data.train_split, config.model.columns)
    pictures = _look_at(train)
    image = _image(config, pictures, say)
    augment = _augment(config.data.augment, given, pictures, image)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, augment=augment))
    config = with_classes(config, chosen="num_classes" in given)
    classes = config.model.num_classes
    counted = "" if config.model.columns.kind == "numbers" else f"{classes} classes; "
    say(
        f"{counted}pictures of {image.height}x{image.width} in "
        f"{'RGB' if image.channels > 1 else 'grey'}, {_varied(augment)}; scored on {eval_split!r}"
    )
    model = dataclasses.replace(config.model, image=image, num_classes=classes)
    return dataclasses.replace(config, model=shaped(model))


def _split_to_score(source: str, train_split: str) -> str:
    others = [name for name in split_names(source) if name != train_split]
    for name in SCORED_FIRST:
        if name in others:
            return name
    if len(others) == 1:
        return others[0]
    found = f"has the splits {', '.join(others)}" if others else f"has no split but {train_split!r}"
    raise UserError(
        f"{source} {found}: name the one to score with --eval-split, or ingest one to score"
    )


def _look_at(dataset: Dataset) -> _Pictures:
    """See what some rows, spread over the split, show."""
    if isinstance(dataset.encoding, PackedBits):
        bits = dataset.encoding
        side = bits.height if bits.height == bits.width else None
        return _Pictures(side=side, coloured=False, bits=bits)
    from downpour.shuffler.images import bounds

    count = min(SAMPLED_ROWS, dataset.num_rows)
    rows = np.unique(np.linspace(0, dataset.num_rows - 1, count).astype(np.int64))
    with contextlib.closing(RowReader(dataset, cache_bytes=0)) as reader:
        column = reader.take(rows).column("image").field("bytes")
    sizes, modes = set(), set()
    for data in filter(None, column.to_pylist()):
        # A file that is damaged is told of when the run is checked.
        with contextlib.suppress(DecodeError), bounds.open_image(data) as picture:
            sizes.add(picture.size)
            modes.add(picture.mode)
    (width, height) = sizes.pop() if len(sizes) == 1 else (0, 1)
    return _Pictures(
        side=width if width == height else None,
        coloured=not modes or not modes.issubset(GREY_MODES),
    )


def _image(config: RunConfig, pictures: _Pictures, say: Say) -> ImageSpec:
    """The pictures that the network is given."""
    model = config.model
    if pictures.bits is not None:
        return ImageSpec(
            height=pictures.bits.height,
            width=pictures.bits.width,
            channels=1,
            binary_threshold=BINARY_THRESHOLD,
            fit="any" if pictures.side else "exact",
        )
    channels = 3
    if not pictures.coloured:
        from downpour.models.registry import takes_channels

        channels = 1 if takes_channels(model.model) else 3
        if channels == 3:
            say(f"grey pictures are given to {model.model} as RGB, since it takes no channels")
    side = model.image_size or pictures.side or recipe.LARGEST_SIDE
    return dataclasses.replace(model.pictures, height=side, width=side, channels=channels)


def _augment(
    augment: AugmentConfig, given: Mapping[str, object], pictures: _Pictures, image: ImageSpec
) -> AugmentConfig:
    """Photographs are cropped and mirrored; digits and drawings may mean something else then."""
    photographs = pictures.coloured and min(image.height, image.width) >= LEAST_PHOTO
    wanted = dict.fromkeys(("random_crop", "mirror"), photographs)
    return apply(augment, {k: v for k, v in wanted.items() if k not in given})


def _varied(augment: AugmentConfig) -> str:
    done: Sequence[str] = [
        word
        for word, is_done in (("cropped", augment.random_crop), ("mirrored", augment.mirror))
        if is_done
    ]
    return f"{' and '.join(done)} at random" if done else "as they are"
