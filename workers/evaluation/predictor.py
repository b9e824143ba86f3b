"""Class probabilities from trained weights: one crop or many, one network or several averaged.

Here: `Network`, a run's weights ready for inference, and `Predictor`, which turns rows into class
probabilities. Not here: where weights and rows come from (`cluster.serving.inference`), and scoring
while a run trains (`evaluator`).

Ioffe & Szegedy 2015, section 4.2.3: probabilities are averaged over the crops of an image and over
the networks of an ensemble.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from downpour.models.flat import FlatModel, flatten
from downpour.models.fold import fold
from downpour.shuffler.dataset.encoding import PackedBits, encoding_of
from downpour.shuffler.errors import DecodeError
from downpour.shuffler.images.decode import decode, decode_views
from downpour.workers.errors import InferenceError
from downpour.workers.spec import ModelSpec

FORWARD_BYTES = 16 << 20
"""Most bytes of inputs in one forward pass; activations take many times that."""
ROWS = 256
"""Most rows that are decoded at a time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """A run's network with its weights and BN statistics."""

    spec: ModelSpec
    model: FlatModel
    """Bound to buffers of its own, in inference mode."""

    @classmethod
    def load(cls, spec: ModelSpec, path: str) -> Network:
        """The network with the weights in a safetensors file of `Evaluator.save`.

        Raises `InferenceError` for a file that cannot be read, `ModelError` for one of another
        model.
        """
        model = spec.build_flat()
        try:
            state = safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise InferenceError(f"the weights {path} cannot be read: {error}") from None
        weights, statistics = flatten(state, model.layout)
        model.bind(weights, statistics=statistics)
        model.module.eval()
        return cls(spec=spec, model=model)

    def folded(self) -> torch.nn.Module:
        """A copy in inference mode whose batch normalization is in the layers before it."""
        return fold(self.model.module)


class Predictor:
    """An ensemble of one network or more."""

    def __init__(self, networks: Sequence[Network], *, crops: int = 1) -> None:
        """`crops` is 1, 10 or 144.

        With 1, rows are seen as the networks' evaluation split was; images of another size than
        the network's are resized and cut at the centre. Raises `InferenceError` where the networks
        do not tell the same number of classes apart.
        """
        if not networks:
            raise InferenceError("an ensemble of no networks has no answer: give at least one")
        counts = {network.spec.num_classes for network in networks}
        if len(counts) > 1:
            raise InferenceError(
                f"the networks tell {sorted(counts)} classes apart: an ensemble's are the same"
            )
        self._networks = tuple(networks)
        self._modules = [network.folded() for network in networks]
        self._crops = crops
        self.num_classes = counts.pop()

    def probabilities(self, rows: pa.RecordBatch) -> Tensor:
        """Class probabilities, float32 `[n, classes]`, of n rows with an image each.

        Raises `DecodeError` for an image that cannot be decoded.
        """
        total = torch.zeros(len(rows), self.num_classes)
        seen: dict[object, Tensor] = {}
        for network, module in zip(self._networks, self._modules, strict=True):
            image = network.spec.image
            if image not in seen:
                seen[image] = self._inputs(rows, network.spec)
            total += _mean_over_views(module, seen[image])
        return total / len(self._networks)

    def _inputs(self, rows: pa.RecordBatch, spec: ModelSpec) -> Tensor:
        """What a network is shown: `[n, views, ...]`."""
        if self._crops != 1:
            return torch.from_numpy(decode_views(rows, spec.image, self._crops)[0])
        return torch.from_numpy(decode_any_size(rows, spec))[:, None]

    def score(self, batches: Iterable[pa.RecordBatch]) -> EnsembleScore:
        """How well the ensemble does on labelled rows."""
        count = top1 = top5 = 0
        loss = 0.0
        for rows in batches:
            labels = torch.from_numpy(rows.column("label").to_numpy(zero_copy_only=False).copy())
            probabilities = self.probabilities(rows)
            best = probabilities.topk(min(5, self.num_classes), dim=1).indices
            hits = best == labels[:, None]
            top1 += int(hits[:, 0].sum())
            top5 += int(hits.any(1).sum())
            chosen = probabilities.gather(1, labels[:, None].long())
            loss -= float(chosen.clamp(min=1e-30).log().sum())
            count += len(labels)
        if not count:
            raise InferenceError("there are no rows to score")
        return EnsembleScore(
            accuracy=top1 / count, top5_accuracy=top5 / count, loss=loss / count, num_examples=count
        )


@dataclass(frozen=True, kw_only=True)
class EnsembleScore:
    """How well averaged probabilities do on a split."""

    accuracy: float
    """Share of rows whose most probable class is their own, in [0, 1]."""
    top5_accuracy: float
    """Share of rows whose class is among the five most probable, in [0, 1]."""
    loss: float
    """Mean cross-entropy of the averaged probabilities, nats."""
    num_examples: int


def decode_any_size(rows: pa.RecordBatch, spec: ModelSpec) -> npt.NDArray[np.float32]:
    """Inputs `[n, ...]` of rows; an image of another size is cut as single crops are."""
    image = spec.image
    try:
        return decode(rows, image)[0]
    except DecodeError:
        if isinstance(encoding_of(rows.schema, "the rows"), PackedBits) or image.fit == "crop":
            raise
    if image.height != image.width:
        return decode(rows, image)[0]
    cut = dataclasses.replace(image, fit="crop")
    inputs = []
    for i in range(len(rows)):
        row = rows.slice(i, 1)
        try:
            inputs.append(decode(row, image)[0])
        except DecodeError:
            inputs.append(decode(row, cut)[0])
    return np.concatenate(inputs)


def rows_of(images: Sequence[bytes], names: Sequence[str] = ()) -> pa.RecordBatch:
    """Image files as rows with label 0, for `Predictor.probabilities`."""
    paths = names or [str(i) for i in range(len(images))]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": data, "path": path} for data, path in zip(images, paths, strict=True)]
    labels = pa.array(np.zeros(len(images), np.int64))
    return pa.record_batch({"image": pa.array(rows, kind), "label": labels})


def _mean_over_views(module: torch.nn.Module, inputs: Tensor) -> Tensor:
    """Mean class probabilities `[n, classes]` of `[n, views, ...]`."""
    flat = inputs.flatten(0, 1)
    row_bytes = flat[0].nbytes if len(flat) else 1
    step = max(1, FORWARD_BYTES // row_bytes)
    with torch.inference_mode():
        parts = [module(part).softmax(1) for part in torch.split(flat, step)]
    return torch.cat(parts).unflatten(0, inputs.shape[:2]).mean(1)  # type: ignore[no-any-return, no-untyped-call]
