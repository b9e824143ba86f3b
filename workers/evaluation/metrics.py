"""The figures of tasks other than classification, gathered mini-batch by mini-batch.

Each of them keeps sums alone, so that a split of any size is scored in bounded memory.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from downpour.models.outputs import IGNORED, aligned


class Metrics(Protocol):
    """What gathers the figures of one scoring."""

    def add(self, answer: Tensor, targets: Tensor) -> None:
        """Take note of a mini-batch: what the network gives, and what it should."""

    def compute(self) -> dict[str, float]:
        """The figures so far, the task's first."""


class NumberMetrics:
    """Regression: R², the root of the mean squared error, and the mean absolute error.

    `R² = 1 - sum (y - f)² / sum (y - mean(y))²` of each number of a target, averaged over them. The
    sums of squares around the mean are merged by Chan, Golub & LeVeque 1983, so that a mean far
    from 0 loses no digits. A number that is the same in all targets has R² 1 if it is met exactly,
    and else 0.
    """

    def __init__(self) -> None:
        """No example yet."""
        self._count = 0
        self._mean = self._around = self._squared = self._absolute = torch.zeros(0).double()

    def add(self, answer: Tensor, targets: Tensor) -> None:
        """Take note of `[m, ...]`, and of targets `[m, t]`."""
        y = targets.double()
        off = aligned(answer, targets).double() - y
        count, mean = len(y), y.mean(0)
        around = (y - mean).square().sum(0)
        squared, absolute = off.square().sum(0), off.abs().sum(0)
        if not self._count:
            self._mean, self._around = mean, around
            self._squared, self._absolute = squared, absolute
        else:
            apart, total = mean - self._mean, self._count + count
            self._around = self._around + around + apart.square() * (self._count * count / total)
            self._mean = self._mean + apart * (count / total)
            self._squared, self._absolute = self._squared + squared, self._absolute + absolute
        self._count += count

    def compute(self) -> dict[str, float]:
        """`r2`, `rmse`, `mae`; NaN without examples."""
        if not self._count:
            return dict.fromkeys(("r2", "rmse", "mae"), math.nan)
        exact = torch.where(self._squared == 0, 1.0, 0.0).double()
        r2 = torch.where(self._around > 0, 1 - self._squared / self._around, exact)
        return {
            "r2": float(r2.mean()),
            "rmse": float((self._squared / self._count).mean().sqrt()),
            "mae": float((self._absolute / self._count).mean()),
        }


class SeveralClassesMetrics:
    """Classes of which a row may have several: F1 over all of them, and the mean of each one's.

    A class is taken to be there from a probability of one half on, a logit of 0. With true
    positives tp, false positives fp and false negatives fn, `F1 = 2 tp / (2 tp + fp + fn)`; it is 0
    for a class that is neither there nor found.
    """

    def __init__(self) -> None:
        """No example yet."""
        self._count = self._exact = 0
        self._sums = torch.zeros(3, 0).double()

    def add(self, answer: Tensor, targets: Tensor) -> None:
        """Take note of logits `[m, classes]`, and of 0 and 1 `[m, classes]`."""
        found = aligned(answer, targets) > 0
        there = targets > 0.5
        parts = (found & there, found & ~there, ~found & there)
        sums = torch.stack([part.sum(0) for part in parts]).double()
        self._sums = self._sums + sums if self._count else sums
        self._exact += int((found == there).flatten(1).all(1).sum())
        self._count += len(targets)

    def compute(self) -> dict[str, float]:
        """`f1` over all classes, `macro_f1`, and `exact`, the share of rows with no mistake."""
        if not self._count:
            return dict.fromkeys(("f1", "macro_f1", "exact"), math.nan)
        tp, fp, fn = self._sums
        each = 2 * tp / (2 * tp + fp + fn).clamp(min=1)
        whole = 2 * tp.sum() / (2 * tp + fp + fn).sum().clamp(min=1)
        return {
            "f1": float(whole),
            "macro_f1": float(each.mean()),
            "exact": self._exact / self._count,
        }


class PixelMetrics:
    """Segmentation: the mean over classes of intersection over union, and the share of pixels.

    `IoU = tp / (tp + fp + fn)` of a class, over all pixels that count. A class that is neither
    there nor found is left out of the mean.
    """

    def __init__(self) -> None:
        """No example yet."""
        self._confusion = torch.zeros(0, 0, dtype=torch.int64)

    def add(self, answer: Tensor, targets: Tensor) -> None:
        """Take note of logits `[m, classes, ...]`, and of classes `[m, ...]`."""
        classes = answer.shape[1]
        counts = targets != IGNORED
        pairs = targets[counts] * classes + answer.argmax(1)[counts]
        found = torch.bincount(pairs, minlength=classes * classes).view(classes, classes)
        self._confusion = self._confusion + found if len(self._confusion) else found

    def compute(self) -> dict[str, float]:
        """`miou`, and `pixel_accuracy`; NaN without pixels."""
        confusion = self._confusion.double()
        right = confusion.diagonal()
        union = confusion.sum(0) + confusion.sum(1) - right
        seen = union > 0
        if not bool(seen.any()):
            return dict.fromkeys(("miou", "pixel_accuracy"), math.nan)
        return {
            "miou": float((right[seen] / union[seen]).mean()),
            "pixel_accuracy": float(right.sum() / confusion.sum()),
        }


def metrics_of(task: str) -> Metrics | None:
    """What gathers the figures of a task; None for classification, which the evaluator counts."""
    if task == "regression":
        return NumberMetrics()
    if task == "segmentation":
        return PixelMetrics()
    return SeveralClassesMetrics() if task == "multilabel" else None
