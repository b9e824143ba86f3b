"""One step of a user's network and loss, here, before Ray starts: what would end the run later.

It takes a mini-batch of the real data through the network as in training, and some rows of the
split to score as in inference. What a replica or the evaluator would fail on after a minute is then
one line in a second. Not here: the data by itself (`inputs`), and networks of this package, which
need no trial.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from downpour.cluster.config.derive import make_decoder, model_spec
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.models.conversion.history import check_repeats, check_state
from downpour.models.outputs import LOSSES, OutputsError, main_output, tells_classes
from downpour.models.registry import described
from downpour.shuffler.dataset.own import open_split
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.images.decode import Decoder
from downpour.shuffler.images.specs import ImageSpec
from downpour.shuffler.plan.plan import Plan
from downpour.workers.spec import ModelSpec
from downpour.workers.step.eager import gradients
from downpour.workers.step.precision import computing_in

TRIAL_BYTES = 2 << 20
"""Most bytes of inputs in the trial; activations take many times that. At least two rows go in."""
TRIES = 3
"""Mini-batches whose loss may be not finite before the network is blamed, and not an example."""

Batch = tuple[Tensor, Tensor]


def check_step(config: RunConfig, plan: Plan) -> str | None:
    """Train one step and score some rows; nothing of it is kept.

    Args:
        config: of the run.
        plan: of its mini-batches.

    Returns:
        Lines to tell, if the network's outputs are no classes or it counts its forwards; else
        None.

    Raises:
        UserError: the network or the loss does not do on these data what a run needs.
        ModelError: the network cannot be built, or changes state that the server does not keep.
        ShufflerError: rows cannot be read or decoded.
    """
    spec = model_spec(config)
    if spec.is_ours:
        return None
    with torch.random.fork_rng(devices=[]):
        return _Trial(config, spec, plan).run()


class _Trial:
    """A network, its loss, and what they are tried on."""

    def __init__(self, config: RunConfig, spec: ModelSpec, plan: Plan) -> None:
        self._config, self._spec, self._plan = config, spec, plan
        self._model = spec.build_flat("cpu")
        self._loss = spec.build_loss()
        row_bytes = 4 * math.prod(spec.image.input_shape)
        self._most_rows = max(2, TRIAL_BYTES // row_bytes)

    def run(self) -> str | None:
        """Raise the first error there is; give what is to be told."""
        check_repeats(self._model.module, lambda: self._spec.build_flat("cpu").module)
        lines: list[str | None] = []
        if self._plan.batch_size > 1:
            lines.append(self._train())
        self._check_smallest()
        if self._plan.batch_size == 1:
            lines.append(self._train())
        lines.append(self._score())
        return "\n".join(filter(None, lines)) or None

    def _train(self) -> str | None:
        plan = self._plan
        for index in range(min(TRIES, plan.num_batches)):
            batch = self._training_rows(plan.rows(0, index))
            if batch is None:
                continue
            # First, since a step may leave something in the network.
            line = check_state(self._model.module, batch[0])
            with computing_in(self._config.replicas.steps.precision):
                loss = self._step(*batch)
            if math.isfinite(loss):
                return line
        raise UserError(
            f"the loss of {self._spec.name} is {loss} on the first mini-batches, with its initial "
            f"weights: look at these and at the loss {self._spec.loss}"
        )

    def _step(self, inputs: Tensor, targets: Tensor) -> float:
        """One step as in training; gives the loss."""
        module = self._model.module.train()
        outputs = self._forward(module, inputs)
        self._check_width(outputs, len(inputs))
        loss = self._loss_of(outputs, targets)
        if not loss.requires_grad:
            raise UserError(
                f"the loss {self._spec.loss} does not depend on the weights: return it as the "
                "tensor that it is computed as, without item() or detach()"
            )
        parameters = [p for p in self._model.parameters if p.requires_grad]
        with self._blamed("the gradient of", self._spec.name, inputs):
            gradients(loss, parameters)
        return float(loss.detach())

    def _check_smallest(self) -> None:
        """A mini-batch of as few rows as there will be, if that is one."""
        plan = self._plan
        if smallest_batch(plan) > 1:
            return
        batch = self._training_rows(plan.rows(0, 0)[:1])
        if batch is None:
            return
        try:
            self._model.module.train()(batch[0])
        except Exception as error:
            why = "mini-batches have one row"
            if plan.batch_size > 1:
                why = f"{plan.num_rows:,} rows in mini-batches of {plan.batch_size} leave one row"
            raise UserError(
                f"{why}, on which {self._spec.name} fails "
                f"({described(error)}): give --batch-size "
                f"{next_batch_size(plan)}"
            ) from error

    def _score(self) -> str | None:
        """Some rows of the split to score, as the evaluator sees them."""
        rows = np.arange(min(self._most_rows, 32), dtype=np.int64)
        batch = self._rows(self._config.data.eval_split, self._plain_decoder, rows)
        if batch is None:
            return None
        inputs, targets = batch
        module = self._model.module.eval()
        spec = self._spec
        with torch.inference_mode():
            outputs = self._forward(module, inputs, "in inference ")
            self._check_width(outputs, len(inputs))
            try:
                answer = main_output(outputs)
            except OutputsError as error:
                raise UserError(f"{spec.name}: {error}") from error
            self._loss_of(answer if spec.loss in LOSSES else outputs, targets, "in inference ")
        if spec.task != "classification" or tells_classes(answer, spec.num_classes):
            return None
        return (
            f"{spec.name} gives {_shape(answer)} for {len(inputs)} rows, no number for each of "
            f"{spec.num_classes} classes: the loss {spec.loss} is shown in place of accuracy, and "
            "the best weights are those with the least"
        )

    @property
    def _plain_decoder(self) -> Decoder:
        """What makes inputs of rows as they are."""
        return Decoder(spec=self._spec.image, columns=self._spec.columns)

    def _training_rows(self, rows: npt.NDArray[np.int64]) -> Batch | None:
        """Rows of the training split; of the other one if these are on other nodes' disks."""
        data, rows = self._config.data, rows[: self._most_rows]
        if data.node_folder is not None:
            here = np.arange(len(rows), dtype=np.int64)
            return self._rows(data.eval_split, self._plain_decoder, here)
        return self._rows(data.train_split, make_decoder(self._config), rows)

    def _rows(self, split: str, decoder: Decoder, rows: npt.NDArray[np.int64]) -> Batch | None:
        """Rows as the network gets them; None if none of them can be decoded."""
        dataset = open_split(self._config.data.data, split, self._spec.columns)
        rows = rows[rows < dataset.num_rows]
        reader = RowReader(dataset, cache_bytes=0, num_classes=self._spec.num_classes)
        with contextlib.closing(reader):
            decoded = decoder.decode(reader.take(rows), rows=rows)
        if not len(decoded.kept):
            return None
        return torch.from_numpy(decoded.inputs), torch.from_numpy(decoded.labels)

    def _forward(self, module: Callable[[Tensor], Any], inputs: Tensor, when: str = "") -> Any:
        with self._blamed("", f"{self._spec.name} {when}".rstrip(), inputs):
            return module(inputs)

    @contextlib.contextmanager
    def _blamed(self, what: str, name: str, inputs: Tensor) -> Any:
        """Say on what inputs the network failed, and what may be done."""
        try:
            yield
        except Exception as error:
            shape = list(inputs.shape)
            remedy = "give inputs that it takes (--image-size), or another --model-arg"
            if not isinstance(self._spec.image, ImageSpec):
                remedy = f"give a network that takes {shape[1:]} for a row, or another --model-arg"
            raise UserError(
                f"{f'{what} {name}'.strip()} fails on a mini-batch {shape}: {described(error)}: "
                f"{remedy}"
            ) from error

    def _check_width(self, outputs: Any, num_rows: int) -> None:
        """With a loss over classes, the answer has a number for each of them."""
        spec = self._spec
        if spec.loss not in LOSSES:
            return
        try:
            shape = list(main_output(outputs).shape)
        except OutputsError as error:
            raise UserError(f"{spec.name}: {error}") from error
        if spec.task != "classification":
            self._check_numbers(shape, num_rows)
            return
        if shape == [num_rows, spec.num_classes]:
            return
        if len(shape) == 2 and shape[0] == num_rows:
            raise UserError(
                f"{spec.name} gives {shape[1]} outputs, and there are {spec.num_classes} classes: "
                f"give --model-arg num_classes={spec.num_classes} or what the network calls it, or "
                f"--num-classes {shape[1]}"
            )
        raise UserError(
            f"{spec.name} gives {shape} for {num_rows} rows, and the loss {spec.loss} takes "
            f"{[num_rows, spec.num_classes]}: give a network that tells {spec.num_classes} classes "
            "apart, or a --loss of your own"
        )

    def _check_numbers(self, shape: list[int], num_rows: int) -> None:
        """With a loss over numbers, the answer has one for each of the target's."""
        wanted = self._spec.num_outputs
        if self._spec.task == "segmentation":
            expected = [num_rows, wanted, *self._spec.columns.target_shape]
            if shape != expected:
                raise UserError(
                    f"{self._spec.name} gives {shape} for {num_rows} rows, and masks of "
                    f"{list(self._spec.columns.target_shape)} with {wanted} classes take "
                    f"{expected}: give another network, --num-classes, or a --loss of your own"
                )
            return
        if math.prod(shape) != num_rows * wanted or shape[:1] != [num_rows]:
            raise UserError(
                f"{self._spec.name} gives {shape} for {num_rows} rows, and a target has {wanted} "
                f"number{'s' * (wanted > 1)}: give --model-arg num_outputs={wanted} or what the "
                "network calls it, or a --loss of your own"
            )

    def _loss_of(self, outputs: Any, targets: Tensor, when: str = "") -> Tensor:
        name = self._spec.loss
        try:
            loss: Any = self._loss(outputs, targets)
        except Exception as error:
            raise UserError(
                f"the loss {name} fails {when}on outputs {_shape(outputs)} and labels "
                f"{_shape(targets)}: {described(error)}"
            ) from error
        if not isinstance(loss, Tensor) or loss.shape:
            raise UserError(
                f"the loss {name} returns {_shape(loss)} {when}for a mini-batch: return the mean "
                "over its rows, a tensor without dimensions"
            )
        return loss


def smallest_batch(plan: Plan) -> int:
    """Rows of the smallest mini-batch of an epoch, from which the others differ by one at most."""
    return plan.num_rows // plan.num_batches


def next_batch_size(plan: Plan) -> int:
    """The next size from the plan's up at which no mini-batch has one row."""
    sizes = range(plan.batch_size + 1, plan.num_rows + 1)
    larger = (dataclasses.replace(plan, batch_size=size) for size in sizes)
    return next((each.batch_size for each in larger if smallest_batch(each) > 1), plan.num_rows)


def _shape(value: Any) -> str:
    """What a value is, in a few words: `float32 [32, 10]`."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_shape(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_shape, value))})"
    return type(value).__name__
