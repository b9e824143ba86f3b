"""Which classes a network takes for which, and its worst mistakes with what it saw.

Collected while a split is scored. Not here: how they are shown (`cluster.monitoring`).
"""

from __future__ import annotations

import base64
import heapq
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from downpour.paramserver import durable

MOST_MISTAKES = 12
MOST_SIDE = 160
"""Pictures of larger inputs are made by leaving rows and columns out."""


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """An example of which a network is sure, and wrong."""

    place: int
    """Its number among the examples that were scored."""
    label: int
    answer: int
    probability: float
    """That the network gives its answer."""
    picture: NDArray[np.uint8]
    """What the network saw, [height, width, channels]."""


class Answers:
    """The answers of one scoring."""

    def __init__(self, shape: tuple[int, int, int] | None = None) -> None:
        """No example yet; `shape` is that of an image, (channels, height, width), if it is flat."""
        self.num_examples = 0
        self._shape = shape
        self._counts: dict[tuple[int, int], int] = {}
        self._worst: list[tuple[float, int, Mistake]] = []

    def add(self, inputs: Tensor, outputs: Tensor, targets: Tensor) -> None:
        """Take note of a mini-batch.

        Args:
            inputs: images in [0, 1], float32 [m, channels, height, width]; of other shapes, no
                pictures are kept.
            outputs: a score of each class, float32 [m, C].
            targets: int64 [m].
        """
        if self._shape is not None and inputs.dim() == 2:
            inputs = inputs.reshape(-1, *self._shape)
        given = outputs.argmax(1)
        classes = outputs.shape[1]
        pairs, counts = torch.unique(targets * classes + given, return_counts=True)
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            at = divmod(pair, classes)
            self._counts[at] = self._counts.get(at, 0) + count
        wrong = torch.nonzero(given != targets)[:, 0]
        if len(wrong) and inputs.dim() == 4:
            sure, order = (
                torch.softmax(outputs[wrong].double(), 1)
                .amax(1)
                .topk(min(MOST_MISTAKES, len(wrong)))
            )
            for probability, index in zip(sure.tolist(), wrong[order].tolist(), strict=True):
                self._keep(probability, index, inputs, given, targets)
        self.num_examples += len(targets)

    def confusion(self) -> list[list[int]]:
        """How often each answer was given for each label: [label, answer, examples], in order."""
        return [[label, given, n] for (label, given), n in sorted(self._counts.items())]

    def worst(self) -> list[Mistake]:
        """The mistakes that the network is surest of, the surest first."""
        return [mistake for _, _, mistake in sorted(self._worst, key=lambda kept: -kept[0])]

    def save(self, path: str, rows: Sequence[int]) -> None:
        """Write all as JSON, whole or not at all; pictures are PNG in base 64.

        Args:
            path: the file.
            rows: the row of the split of each example that was scored.
        """
        found: dict[str, Any] = {
            "examples": self.num_examples,
            "confusion": self.confusion(),
            "worst": [
                {
                    "row": int(rows[mistake.place]),
                    "label": mistake.label,
                    "answer": mistake.answer,
                    "probability": round(mistake.probability, 4),
                    "png": base64.b64encode(_png(mistake.picture)).decode(),
                }
                for mistake in self.worst()
            ],
        }
        with durable.replacing(path) as partial, open(partial, "w", encoding="utf-8") as file:
            json.dump(found, file)

    def _keep(
        self, probability: float, index: int, inputs: Tensor, given: Tensor, targets: Tensor
    ) -> None:
        full = len(self._worst) == MOST_MISTAKES
        if not np.isfinite(probability) or (full and probability <= self._worst[0][0]):
            return
        place = self.num_examples + index
        step = -(-max(inputs.shape[2:]) // MOST_SIDE)
        image = inputs[index, :, ::step, ::step].clamp(0, 1).mul(255).round().to(torch.uint8)
        mistake = Mistake(
            place=place,
            label=int(targets[index]),
            answer=int(given[index]),
            probability=probability,
            picture=image.permute(1, 2, 0).contiguous().numpy(),
        )
        entry = (probability, -place, mistake)
        if full:
            heapq.heapreplace(self._worst, entry)
        else:
            heapq.heappush(self._worst, entry)


def _png(picture: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    shown = picture[:, :, 0] if picture.shape[2] != 3 else picture
    buffer = io.BytesIO()
    Image.fromarray(shown).save(buffer, format="PNG")
    return buffer.getvalue()
