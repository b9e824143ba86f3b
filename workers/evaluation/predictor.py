"""Class probabilities from trained weights: one crop or many, one network or several averaged.

Here: `Network`, a run's weights ready for inference, and `Predictor`, which turns rows into class
probabilities. Not here: where weights and rows come from (`cluster.serving.inference`), and scoring
while a run trains (`evaluator`).

Ioffe & Szegedy 2015, section 4.2.3: probabilities are averaged over the crops of an image and over
the networks of an ensemble.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from downpour.models.conversion.copies import detached_copy
from downpour.models.conversion.randomness import seeded
from downpour.models.flat import FlatModel
from downpour.models.fold import fold
from downpour.models.outputs import LOSSES, Loss, main_output, tells_classes
from downpour.shuffler.dataset.columns import Columns
from downpour.shuffler.dataset.encoding import PLAIN
from downpour.shuffler.images.decode import BadImage, Decoded, Decoder
from downpour.shuffler.images.specs import ImageSpec, InputSpec
from downpour.shuffler.images.views import decode_views
from downpour.workers.errors import InferenceError
from downpour.workers.evaluation.metrics import metrics_of
from downpour.workers.spec import ModelSpec

log = logging.getLogger(__name__)

FOLD_TOLERANCE = 5e-5
"""Largest difference of a folded network's outputs, as a share of the largest output or of 1: half
of what an export may differ by."""
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
        weights, statistics = model.split(state)
        model.bind(weights, statistics=statistics)
        model.module.eval()
        return cls(spec=spec, model=model)

    def folded(self) -> torch.nn.Module:
        """A copy in inference mode whose batch normalization is in the layers before it.

        A user's network may use a layer in ways that a trace does not show, or have variances so
        small that rounding grows. If the folded copy does not compute what the network does, its
        batch normalization is left as linear maps, and if that does not either, as it is.
        """
        folded = fold(self.model.module)
        if not self.spec.is_users or self._agrees_with(folded):
            return folded
        log.info("batch normalization is not folded: the outputs would differ too much")
        maps = fold(self.model.module, pairs=False)
        return maps if self._agrees_with(maps) else detached_copy(self.model.module).eval()

    def _agrees_with(self, folded: torch.nn.Module) -> bool:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.rand(2, *self.spec.image.input_shape, generator=generator)
        try:
            with torch.inference_mode():
                with seeded(0):
                    expected = _tensors(self.model.module(inputs))
                with seeded(0):
                    found = _tensors(folded(inputs))
        except Exception as error:  # a network may look at layers that are not there any more
            log.info("a folded network fails: %s: %s", type(error).__name__, error)
            return False
        return len(found) == len(expected) and all(map(_close, expected, found))


def _tensors(outputs: object) -> list[Tensor]:
    """The tensors in what a network gives."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs differ by rounding alone."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    return bool((a - b).abs().max() <= FOLD_TOLERANCE * a.abs().max().clamp(min=1))


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
        tasks = {network.spec.task for network in networks}
        if len(tasks) > 1:
            raise InferenceError(
                f"the networks are for {' and '.join(sorted(tasks))}: an ensemble's task is one"
            )
        self.task = tasks.pop()
        if crops != 1 and not all(isinstance(n.spec.image, ImageSpec) for n in networks):
            raise InferenceError(f"crops is {crops}, and rows of numbers have none: give 1")
        if crops != 1 and self.task == "segmentation":
            raise InferenceError(f"crops is {crops}, and masks are of whole pictures: give 1")
        counts = {network.spec.num_outputs for network in networks}
        if len(counts) > 1:
            raise InferenceError(
                f"the networks tell {sorted(counts)} classes apart: an ensemble's are the same"
            )
        self._networks = tuple(networks)
        self._modules = [network.folded() for network in networks]
        self._crops = crops
        self._own_loss: Loss | None = None
        self.num_classes = counts.pop()

    def probabilities(self, rows: pa.RecordBatch) -> Tensor:
        """Class probabilities, float32 `[n, classes]`, of n rows with an image each.

        Raises `DecodeError` for an image that cannot be decoded.
        """
        return self.answer(rows).probabilities

    def answer(
        self, rows: pa.RecordBatch, *, first_row: int | None = None, on_bad_image: BadImage = "stop"
    ) -> Answer:
        """Class probabilities of n rows with an image each, and which of them there are none of.

        `first_row` is the number of the first of them in their split, for messages. Raises
        `DecodeError` for an image that cannot be decoded, unless those are to be skipped.
        """
        numbers = None if first_row is None else np.arange(first_row, first_row + len(rows))
        seen: dict[InputSpec, Decoded] = {}
        for network in self._networks:
            image = network.spec.image
            if image not in seen:
                seen[image] = self._decoded(rows, image, numbers, on_bad_image)
        first = seen[self._networks[0].spec.image]
        found: list[_Found] = []
        for network, module in zip(self._networks, self._modules, strict=True):
            decoded = seen[network.spec.image]
            assert len(decoded.kept) == len(first.kept), "an image is bad for all networks or none"
            inputs = torch.from_numpy(decoded.inputs)
            views = inputs if self._crops != 1 else inputs[:, None]
            found.append(_mean_over_views(module, views, self.num_classes, self.task))
        if len({(each.of_classes, each.mean.shape) for each in found}) > 1:
            raise InferenceError("the networks answer differently: an ensemble's give the same")
        by_network = torch.stack([each.mean for each in found])
        return Answer(
            probabilities=by_network.mean(0),
            by_network=by_network,
            of_classes=found[0].of_classes,
            parts=found[0].parts if len(found) == 1 and self._crops == 1 else (),
            labels=torch.from_numpy(first.labels),
            kept=first.kept,
            problems=first.problems,
            notes=first.notes,
            sizes=first.sizes,
        )

    def _decoded(
        self,
        rows: pa.RecordBatch,
        image: InputSpec,
        numbers: npt.NDArray[np.int64] | None,
        on_bad_image: BadImage,
    ) -> Decoded:
        """What a network is shown: inputs `[m, ...]`, or `[m, views, ...]` of several crops."""
        columns = self._networks[0].spec.columns
        if isinstance(image, ImageSpec) and self._crops != 1:
            return decode_views(
                rows, image, self._crops, rows=numbers, on_bad_image=on_bad_image, columns=columns
            )
        return decode_any_size(
            rows, image, numbers=numbers, on_bad_image=on_bad_image, columns=columns
        )

    def score(
        self, batches: Iterable[pa.RecordBatch], *, on_bad_image: BadImage = "stop"
    ) -> EnsembleScore:
        """How well the ensemble does on labelled rows, which are those of a split from its first.

        Raises `InferenceError` if there are none, and `DecodeError` for an image that cannot be
        decoded, unless those are to be skipped.
        """
        first_row = count = top1 = top5 = 0
        metrics = metrics_of(self.task)
        loss, of_classes = 0.0, True
        skipped: list[str] = []
        for rows in batches:
            found = self.answer(rows, first_row=first_row, on_bad_image=on_bad_image)
            first_row += len(rows)
            labels, probabilities = found.labels, found.probabilities
            skipped += found.problems
            if not len(labels):
                continue
            of_classes = found.of_classes
            if metrics is not None:
                means = found.probabilities
                metrics.add(means - 0.5 if self.task == "multilabel" else means, labels)
            if of_classes:
                best = probabilities.topk(min(5, self.num_classes), dim=1).indices
                hits = best == labels[:, None]
                top1 += int(hits[:, 0].sum())
                top5 += int(hits.any(1).sum())
            loss += self._loss(found)
            count += len(labels)
        if not count:
            none = f" whose image can be decoded: {skipped[0]}" if skipped else ""
            raise InferenceError(f"there are no rows to score{none}")
        return EnsembleScore(
            accuracy=top1 / count if of_classes else None,
            top5_accuracy=top5 / count if of_classes else None,
            loss=loss / count,
            num_examples=count,
            skipped=tuple(skipped),
            metrics={} if metrics is None else metrics.compute(),
        )

    def _loss(self, found: Answer) -> float:
        """The sum of the first network's loss over the rows of an answer.

        A loss of the user's own gets what the network gives, part by part. From several networks or
        crops there are only means, as logits if they are of classes: `softmax(log(p))` is p.
        """
        means = found.probabilities
        if self.task == "multilabel":
            means = means.logit(eps=1e-7)
        if found.of_classes:
            means = means.clamp(min=1e-30).log()
        if self._networks[0].spec.loss == "cross_entropy" and found.of_classes:
            return -float(means.gather(1, found.labels[:, None].long()).sum())
        if self._own_loss is None:
            self._own_loss = self._networks[0].spec.build_loss()
        total, start = 0.0, 0
        with torch.inference_mode():
            named = self._networks[0].spec.loss in LOSSES  # auxiliary heads are for training
            for given, size in found.parts or ((means, len(means)),):
                outputs = main_output(given) if named else given
                labels = found.labels[start : start + size]
                total += float(self._own_loss(outputs, labels)) * size
                start += size
        return total


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What an ensemble says about n rows, m of which have an image that can be decoded."""

    probabilities: Tensor
    """Of classes, float32 `[m, classes]`; or the numbers that the network gives, `[m, ...]`."""
    by_network: Tensor
    """The same of each network, `[networks, m, ...]`; `probabilities` is their mean."""
    of_classes: bool
    """Whether they are of classes: the network gives a number for each."""
    parts: tuple[tuple[Any, int], ...]
    """What a single network gave, some rows at a time, and how many; empty of an ensemble."""
    labels: Tensor
    """The rows' own targets: classes, int64 `[m]`, or what the task has."""
    kept: npt.NDArray[np.int64]
    """Positions of the m among the n rows, ascending."""
    problems: tuple[str, ...]
    """A line for each of the others."""
    notes: Mapping[int, str]
    """A line for each image that may not be what it should, by its position among the n rows."""
    sizes: npt.NDArray[np.int64]
    """Height and width of each of the m images as it is seen in its file, `[m, 2]`."""


@dataclass(frozen=True, kw_only=True)
class EnsembleScore:
    """How well averaged probabilities do on a split."""

    accuracy: float | None
    """Share of rows whose most probable class is their own, in [0, 1]; None if the network does not
    tell classes apart."""
    top5_accuracy: float | None
    """Share of rows whose class is among the five most probable, likewise."""
    loss: float
    """Mean of the run's loss; of cross-entropy, of the averaged probabilities and in nats."""
    num_examples: int
    """Rows that were scored."""
    skipped: tuple[str, ...] = ()
    """A line for each row that was not, because its image cannot be decoded."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The figures of a task other than classification."""


def decode_any_size(
    rows: pa.RecordBatch,
    image: InputSpec,
    *,
    numbers: npt.NDArray[np.int64] | None = None,
    on_bad_image: BadImage = "stop",
    columns: Columns = PLAIN,
) -> Decoded:
    """Inputs `[m, ...]` of rows; an image of another size is cut as single crops are.

    `numbers` are the rows' own, int64 `[n]`, for messages. Raises `DecodeError` for an image that
    cannot be decoded, unless those are to be skipped, and for one of another size if the network's
    input is not square.
    """
    decoder = Decoder(spec=image.of_any_size, columns=columns, on_bad_image=on_bad_image)
    return decoder.decode(rows, rows=numbers)


def rows_of(images: Sequence[bytes], names: Sequence[str] = ()) -> pa.RecordBatch:
    """Image files as rows without labels, for `Predictor.answer`."""
    paths = names or [str(i) for i in range(len(images))]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": data, "path": path} for data, path in zip(images, paths, strict=True)]
    labels = pa.nulls(len(images), pa.int64())
    return pa.record_batch({"image": pa.array(rows, kind), "label": labels})


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What one network gives for some rows."""

    mean: Tensor
    """Over its views: class probabilities `[n, classes]`, or numbers `[n, ...]`."""
    of_classes: bool
    parts: tuple[tuple[Any, int], ...]


def _mean_over_views(
    module: torch.nn.Module, inputs: Tensor, num_classes: int, task: str
) -> _Found:
    """Mean class probabilities, or numbers, of `[n, views, ...]`.

    Of several classes at once, each one's probability is that of its logit.
    """
    flat = inputs.flatten(0, 1)
    row_bytes = flat[0].nbytes if len(flat) else 1
    step = max(1, FORWARD_BYTES // row_bytes)
    with torch.inference_mode():
        parts = tuple((module(part), len(part)) for part in torch.split(flat, step))
        answers = [main_output(outputs) for outputs, _ in parts]
        of_classes = task == "classification" and all(
            tells_classes(each, num_classes) for each in answers
        )
        if task == "multilabel":
            answers = [each.sigmoid() for each in answers]
        answer = torch.cat([each.softmax(1) for each in answers] if of_classes else answers)
    mean = answer.unflatten(0, inputs.shape[:2]).mean(1)  # type: ignore[no-untyped-call]
    return _Found(mean=mean, of_classes=of_classes, parts=parts)
