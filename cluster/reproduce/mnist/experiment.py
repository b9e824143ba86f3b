"""Section 4.1: the MNIST net with and without batch normalization, and its Figure 1.

Two nets start with the same weights. Plain SGD trains them on the same mini-batches at the same
rate, one after the other. A net's progress is kept in a file, and an experiment that was stopped
goes on from there.

Here: training, the records, and the numbers. Not here: the report.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import torch
from torch import Tensor
from torch.nn import functional

from downpour.cluster.config.recipes import BINARY_MNIST
from downpour.cluster.errors import UserError
from downpour.models.flat import FlatModel
from downpour.models.mlp import MnistNet
from downpour.paramserver import durable
from downpour.shuffler.dataset.bundled import BUNDLED_MNIST
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.images.decode import decode
from downpour.shuffler.images.specs import ImageSpec
from downpour.shuffler.plan.keys import stream_key
from downpour.shuffler.plan.plan import Plan

VARIANTS = {"with BN": True, "without BN": False}
PERCENTILES = (15, 50, 85)
STATISTICS_DECAY = 0.99
PROBE_ROWS = 1000
"""Training images for which the inputs of the last sigmoids are recorded."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class MnistConfig:
    """Section 4.1's experiment."""

    data: str = BUNDLED_MNIST
    """Folder or pyarrow.fs URI with the shards."""
    steps: int = 50_000
    """Steps that each net is trained for."""
    batch_size: int = 60
    """Examples in a mini-batch."""
    learning_rate: float = 0.3
    """The rate, the same for both nets; the paper does not give it."""
    final_rate: float = 1.0
    """Share of the rate at the end, after exponential decay; the paper mentions no decay."""
    init_std: float = 0.05
    """Standard deviation of all initial weights; the paper says "small random Gaussian values"."""
    seed: int = 0
    """Seed of weights and mini-batches."""
    record_every: int = 100
    """Steps between two looks at accuracy and percentiles."""
    save_every: int = 2_500
    """Steps between two saves of the progress."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "record_every", "save_every"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name.replace('_', ' ')} is {value}: give at least 1")
        if self.batch_size < 2:
            raise ValueError("batch size is 1: batch normalization takes 2 examples or more")
        if self.steps % self.record_every:
            raise ValueError(
                f"record every is {self.record_every}: give a divisor of the {self.steps} steps"
            )
        if not 0 < self.final_rate <= 1:
            raise ValueError(f"final rate is {self.final_rate}: give a share above 0, at most 1")
        for name in ("learning_rate", "init_std"):
            if not 0 < getattr(self, name) < math.inf:
                value = getattr(self, name)
                raise ValueError(f"{name.replace('_', ' ')} is {value}: give a number above 0")


@dataclass(frozen=True, kw_only=True, eq=False)
class Curves:
    """The records of one net."""

    steps: npt.NDArray[np.int64]
    """int64 `[n]`: steps taken at each look."""
    accuracy: Floats
    """float64 `[n]`: on the test split, with moving averages of the statistics."""
    percentiles: Floats
    """float64 `[n, 3, units]`: of the inputs of the last hidden layer's sigmoids."""
    seconds: float
    """Time of its training, over all sessions."""


def train(
    config: MnistConfig,
    folder: Path,
    *,
    show: Callable[[str, int], None],
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Curves]:
    """Train both nets, or go on with them; `show(variant, steps)` gets the progress of each."""
    inputs, labels = read_split(config.data, "train")
    test = read_split(config.data, "test")
    found = {}
    for variant, batch_norm in VARIANTS.items():
        net = _Net(config, batch_norm, len(labels))
        path = folder / f"{variant.replace(' ', '-')}.safetensors"
        if path.exists():
            net.load(path)
        began_s, before_s = clock(), net.seconds
        while net.step < config.steps:
            net.train_piece(inputs, labels, test)
            net.seconds = before_s + clock() - began_s
            show(variant, net.step)
            if net.step % config.save_every < config.record_every or net.step == config.steps:
                net.save(path)
        show(variant, net.step)
        found[variant] = net.curves()
    return found


def read_split(data: str, split: str, spec: ImageSpec = BINARY_MNIST) -> tuple[Tensor, Tensor]:
    """Return a split's images, float32 `[n, 784]` in [0, 1], and labels, int64 `[n]`."""
    dataset = Dataset.open(data, split)
    reader = RowReader(dataset, num_classes=10)
    inputs, labels = decode(reader.take(np.arange(dataset.num_rows)), spec)
    reader.close()
    return torch.from_numpy(inputs), torch.from_numpy(labels)


def newest_share(step: int) -> float:
    """Return the weight of step `step`'s statistics in the moving averages, without a bias at
    the start: until it falls to 1 - `STATISTICS_DECAY`, the average is the plain mean.
    """
    return max(1 - STATISTICS_DECAY, 1 / (step + 1))


class MiniBatches:
    """The plan's mini-batches, one after the other."""

    def __init__(self, num_rows: int, batch_size: int, seed: int) -> None:
        self._plan = Plan(num_rows=num_rows, batch_size=batch_size, seed=seed, past_bound="rekey")
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def rows(self, step: int) -> Tensor:
        """Return the rows of mini-batch `step`, counted from 0 over all epochs, int64 `[m]`."""
        epoch, place = divmod(step, self._plan.num_batches)
        if epoch != self._epoch:
            windows = self._plan.window_order(epoch)
            self._epoch = epoch
            self._order = np.concatenate(
                [self._plan.window_batches_order(epoch, int(w)) for w in windows]
            )
        return torch.from_numpy(self._plan.rows_of(epoch, self._order[place : place + 1])[0])


class _Net:
    """One of the two nets, and its records."""

    def __init__(self, config: MnistConfig, batch_norm: bool, num_rows: int) -> None:
        self._config = config
        self._mini_batches = MiniBatches(num_rows, config.batch_size, config.seed)
        seed = stream_key(config.seed, "initial weights")
        self._flat = FlatModel(MnistNet(batch_norm=batch_norm, seed=seed, init_std=config.init_std))
        self._net = self._flat.module
        probe = np.random.default_rng(stream_key(config.seed, "probe")).permutation(num_rows)
        self._probe = torch.from_numpy(np.sort(probe[:PROBE_ROWS]))
        self.step = 0
        self.seconds = 0.0
        self._accuracy: list[float] = []
        self._percentiles: list[npt.NDArray[np.float32]] = []

    def train_piece(self, inputs: Tensor, labels: Tensor, test: tuple[Tensor, Tensor]) -> None:
        """Take the steps up to the next look, and look."""
        if not self._accuracy:
            self._look(inputs, test)
        gradient = self._flat.gradient
        assert gradient is not None
        self._net.train()
        for _ in range(self._config.record_every):
            rows = self._mini_batches.rows(self.step)
            gradient.zero_()
            functional.cross_entropy(self._net(inputs[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
            self._flat.weights.add_(gradient, alpha=-self._rate())
            self._average()
            self.step += 1
        self._look(inputs, test)

    def _rate(self) -> float:
        config = self._config
        return float(config.learning_rate * config.final_rate ** (self.step / config.steps))

    def _average(self) -> None:
        """Update the moving averages of section 3.1."""
        self._flat.statistics.lerp_(self._flat.moments[1:], newest_share(self.step))

    def _look(self, inputs: Tensor, test: tuple[Tensor, Tensor]) -> None:
        """Record accuracy as in inference, percentiles of the sigmoids' inputs as in training."""
        net = self._net
        assert isinstance(net, MnistNet)
        with torch.no_grad():
            net.eval()
            images, labels = test
            hits = int((net(images).argmax(1) == labels).sum())
            self._accuracy.append(hits / len(labels))
            net.train()
            values = net.preactivation(inputs[self._probe])
            shares = torch.tensor(PERCENTILES) / 100
            self._percentiles.append(torch.quantile(values, shares, dim=0).numpy())

    def curves(self) -> Curves:
        """Return the records."""
        every = self._config.record_every
        return Curves(
            steps=np.arange(len(self._accuracy), dtype=np.int64) * every,
            accuracy=np.array(self._accuracy),
            percentiles=np.stack(self._percentiles).astype(np.float64),
            seconds=self.seconds,
        )

    def save(self, path: Path) -> None:
        """Write the net and the records to a file, whole or not at all."""
        tensors = {
            "weights": self._flat.weights.clone(),
            "statistics": self._flat.statistics.clone(),
            "accuracy": torch.tensor(self._accuracy, dtype=torch.float64),
            "percentiles": torch.from_numpy(np.ascontiguousarray(np.stack(self._percentiles))),
        }
        about = {
            "step": self.step,
            "seconds": self.seconds,
            "config": dataclasses.asdict(self._config),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.save_tensors(
            tensors,
            path,
            partial=str(path.with_name(f".{path.name}.partial")),
            metadata={"about": json.dumps(about)},
        )

    def load(self, path: Path) -> None:
        """Go on from the file that `save` wrote.

        Raises:
            UserError: it is of an experiment with other options.
        """
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                about = json.loads(file.metadata()["about"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}): remove it to begin anew") from None
        mine = dataclasses.asdict(self._config)
        other = {k: v for k, v in about["config"].items() if v != mine.get(k)}
        if set(other) - {"save_every"}:
            told = ", ".join(f"{k}={v}" for k, v in other.items())
            raise UserError(
                f"{path} is of another experiment ({told}): give those options, or another --output"
            )
        self._flat.weights.copy_(tensors["weights"])
        self._flat.statistics.copy_(tensors["statistics"])
        self._accuracy = tensors["accuracy"].tolist()
        self._percentiles = list(tensors["percentiles"].numpy())
        self.step, self.seconds = about["step"], about["seconds"]


@dataclass(frozen=True, kw_only=True)
class Steadiness:
    """How much a sigmoid's inputs wander over training, in units of their usual width."""

    median_wander: float
    """Standard deviation over time of the median, divided by the mean width of the band."""
    band_wander: float
    """Distance of each percentile from its mean over time, as a root mean square over time and the
    three percentiles, divided by the mean width of the band from the 15th to the 85th."""
    width_ratio: float
    """Largest width of the band over its smallest."""


def steadiness(percentiles: Floats, skip: int = 1) -> list[Steadiness]:
    """Return how steady the inputs of each unit are.

    Args:
        percentiles: `[n, 3, units]`, see `Curves`.
        skip: looks to leave out. The first one is before any step: it shows where training begins,
            not how the inputs wander.
    """
    bands = percentiles[skip:]
    width = bands[:, 2] - bands[:, 0]
    mean_width = width.mean(0)
    wander = bands - bands.mean(0)
    median = wander[:, 1].std(0) / mean_width
    band = np.sqrt((wander**2).mean((0, 1))) / mean_width
    ratio = width.max(0) / np.maximum(width.min(0), 1e-12)
    return [
        Steadiness(median_wander=float(m), band_wander=float(b), width_ratio=float(r))
        for m, b, r in zip(median, band, ratio, strict=True)
    ]


def typical_unit(percentiles: Floats) -> int:
    """Return the unit whose band wanders as much as that of the median unit."""
    wander = [s.band_wander for s in steadiness(percentiles)]
    return int(np.argsort(wander)[len(wander) // 2])


def first_step_at(curves: Curves, accuracy: float) -> int | None:
    """Return the steps at the first look with `accuracy`; None if there is none."""
    reached = np.flatnonzero(curves.accuracy >= accuracy)
    return int(curves.steps[reached[0]]) if len(reached) else None


def summary(config: MnistConfig, found: dict[str, Curves]) -> dict[str, Any]:
    """Return the numbers of the report."""
    variants = {}
    for name, curves in found.items():
        every = steadiness(curves.percentiles)
        unit = typical_unit(curves.percentiles)
        variants[name] = {
            "final_accuracy": float(curves.accuracy[-1]),
            "best_accuracy": float(curves.accuracy.max()),
            "steps_to": {str(a): first_step_at(curves, a) for a in (0.8, 0.9, 0.95, 0.97, 0.98)},
            "typical_unit": unit,
            "typical": dataclasses.asdict(every[unit]),
            "median_of_units": {
                field: float(np.median([getattr(s, field) for s in every]))
                for field in ("median_wander", "band_wander", "width_ratio")
            },
            "seconds": round(curves.seconds, 1),
        }
    bn, plain = found["with BN"], found["without BN"]
    early = slice(1, len(bn.steps) // 5 + 1)
    return {
        "config": dataclasses.asdict(config),
        "variants": variants,
        "bn_above_plain_in_first_fifth": bool((bn.accuracy[early] > plain.accuracy[early]).all()),
        "share_of_looks_with_bn_above": float((bn.accuracy[1:] > plain.accuracy[1:]).mean()),
    }
