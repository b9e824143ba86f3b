"""From image files to their most probable classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from downpour.cluster.serving import masks
from downpour.workers.evaluation.predictor import Answer, Predictor, rows_of

FILES = 64
"""Image files that are read and decoded at a time."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What is said about one image file."""

    name: str
    """Of the file."""
    classes: list[dict[str, Any]]
    """The most probable ones, best first: class, label, probability. A network that tells no
    classes apart gives one entry, its outputs. Of a mask they are the classes with the most pixels,
    and their shares. Empty for a bad file."""
    mask: bytes | None = None
    """The mask that a network for segmentation finds, as a PNG file of the picture's size."""
    problem: str | None = None
    """Why there are none, on one line that names the file."""
    note: str | None = None
    """What else is to be told, on one line that names the file."""


def predict_files(
    predictor: Predictor, class_names: Sequence[str], paths: Iterable[Path], *, top: int
) -> Iterator[Prediction]:
    """Give the most probable classes of image files, in their order, a few files at a time.

    Files that cannot be read or decoded have a problem instead.
    """
    batch: list[Path] = []
    for path in paths:
        batch.append(path)
        if len(batch) == FILES:
            yield from _predict_batch(predictor, class_names, batch, top)
            batch = []
    yield from _predict_batch(predictor, class_names, batch, top)


def _predict_batch(
    predictor: Predictor, class_names: Sequence[str], paths: Sequence[Path], top: int
) -> Iterator[Prediction]:
    unread: dict[int, str] = {}
    images: list[bytes] = []
    for position, path in enumerate(paths):
        try:
            images.append(path.read_bytes())
        except OSError as error:
            unread[position] = f"the image {path} cannot be read: {error.strerror or error}"
    names = [str(path) for position, path in enumerate(paths) if position not in unread]
    found = iter(predict(predictor, class_names, images, names, top=top))
    for position, path in enumerate(paths):
        if position in unread:
            yield Prediction(name=str(path), classes=[], problem=unread[position])
        else:
            yield next(found)


def predict(
    predictor: Predictor,
    class_names: Sequence[str],
    images: Sequence[bytes],
    names: Sequence[str],
    *,
    top: int,
) -> list[Prediction]:
    """Return the most probable classes of each image, or why there are none.

    Args:
        predictor: the network, or several.
        class_names: of its labels.
        images: contents of image files.
        names: of the files, for messages.
        top: classes for each.
    """
    if not images:
        return []
    answer = predictor.answer(rows_of(images, names), on_bad_image="skip")
    problems = iter(answer.problems)
    found = dict(zip(answer.kept.tolist(), range(len(answer.kept)), strict=True))
    predictions = []
    for position, name in enumerate(names):
        note = answer.notes.get(position)
        if position not in found:
            bad = Prediction(name=name, classes=[], problem=next(problems), note=note)
            predictions.append(bad)
            continue
        classes, mask = told(answer, found[position], predictor.task, class_names, top)
        predictions.append(Prediction(name=name, classes=classes, mask=mask, note=note))
    return predictions


def told(
    answer: Answer, place: int, task: str, class_names: Sequence[str], top: int
) -> tuple[list[dict[str, Any]], bytes | None]:
    """Return what is said of a picture, and the mask that was found as a PNG file, if it is one.

    Args:
        answer: about some pictures.
        place: the picture's among those that were decoded.
        task: of the network.
        class_names: of its labels.
        top: most classes to name.
    """
    row = answer.probabilities[place]
    if task == "segmentation":
        mask = masks.mask_of(row, answer.sizes[place].tolist())
        return masks.shares_of(mask, class_names, top), masks.as_png(mask)
    if task == "multilabel":
        return those_there(row, class_names, top), None
    return (best_of if answer.of_classes else numbers_of)(row, class_names, top), None


def best_of(probabilities: Tensor, class_names: Sequence[str], top: int) -> list[dict[str, Any]]:
    """Return the `top` most probable classes, best first."""
    values, labels = probabilities.topk(min(top, len(class_names)))
    return [
        {"class": class_names[label], "label": label, "probability": value}
        for value, label in zip(values.tolist(), labels.tolist(), strict=True)
    ]


def those_there(
    probabilities: Tensor, class_names: Sequence[str], top: int
) -> list[dict[str, Any]]:
    """Return the classes with a probability above one half, at most `top`, the surest first."""
    values, labels = probabilities.sort(descending=True)
    named = len(class_names) == len(values)
    return [
        {"class": class_names[label] if named else str(label), "label": label, "probability": value}
        for value, label in zip(values.tolist(), labels.tolist(), strict=True)
        if value > 0.5
    ][:top]


def numbers_of(outputs: Tensor, class_names: Sequence[str], top: int) -> list[dict[str, Any]]:
    """Return what a network gives that does not tell classes apart, as it is."""
    del class_names, top
    return [{"outputs": outputs.tolist()}]
