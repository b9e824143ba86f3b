"""The nets of section 4.1's open choices: training them, and what is kept of each.

Nets with the same images and seed are trained together, some at a time (`joint_nets`). A net's
records are written once it is trained. An experiment that was stopped goes on with the nets that
are left, from the state that those under way were saved in.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from downpour.cluster.config.recipes import BINARY_MNIST
from downpour.cluster.errors import UserError
from downpour.cluster.reproduce.choices.choice import Choice, ChoicesConfig, Pixels
from downpour.cluster.reproduce.choices.joint_nets import JointNets
from downpour.cluster.reproduce.mnist.experiment import MiniBatches, newest_share, read_split
from downpour.cluster.reproduce.report import write_text
from downpour.paramserver import durable
from downpour.shuffler.plan.keys import stream_key

TOGETHER = 8
"""Most nets that are trained together: their weights fit a processor's cache."""
POPULATION_BATCHES = 200
"""Mini-batches of Algorithm 2's statistics."""
SAVE_EVERY = 5_000
"""Steps between two saves of the nets that are being trained, at least."""
TRAINING_ROWS = 10_000
"""Training images that are scored at the end."""
_THRESHOLDS: dict[Pixels, int | None] = {"any": 0, "grey": None}


@dataclass(frozen=True, kw_only=True)
class NetRecord:
    """What is kept of one net."""

    choice: str
    """Name of its choice."""
    seed: int
    """Of its weights and mini-batches."""
    looks: tuple[float, ...]
    """Test accuracy with moving averages, at each look."""
    moving: float
    """Test accuracy at the end with moving averages (section 3.1)."""
    population: float
    """The same with Algorithm 2's statistics."""
    by_batch: float
    """The same with the statistics of test mini-batches, of the size of those in training."""
    training: float
    """Accuracy on `TRAINING_ROWS` training images, with Algorithm 2's statistics."""
    seconds: float
    """Time that it took: its share of that of the nets that were trained together."""


def train(
    config: ChoicesConfig,
    folder: Path,
    *,
    show: Callable[[int, int], None],
    clock: Callable[[], float] = time.monotonic,
) -> list[NetRecord]:
    """Train the nets that are not trained yet; return the records of all of them.

    Args:
        config: which nets.
        folder: of the records, a file each.
        show: is told the steps done and the steps in all.
        clock: seconds, monotonic.

    Raises:
        UserError: a record in `folder` is of a net with other options.
    """
    chosen = config.chosen
    found: dict[tuple[str, int], NetRecord] = {}
    for choice, seed in itertools.product(chosen, range(config.seeds)):
        record = _read(_path(folder, choice, seed), _identity(config, choice, seed))
        if record is not None:
            found[choice.name, seed] = record
    total = len(chosen) * config.seeds * config.steps
    for pixels in dict.fromkeys(choice.pixels for choice in chosen):
        images: _Images | None = None
        for seed in range(config.seeds):
            left = [
                choice
                for choice in chosen
                if choice.pixels == pixels and (choice.name, seed) not in found
            ]
            for group in _groups(left):
                images = images or _Images.read(config, pixels)
                before = len(found) * config.steps
                size = len(group)

                def told(step: int, before: int = before, size: int = size) -> None:
                    show(before + size * step, total)

                state = _State(folder, [_identity(config, choice, seed) for choice in group])
                records = _train_group(config, group, seed, images, state, told, clock)
                for choice, record in zip(group, records, strict=True):
                    found[choice.name, seed] = record
                    about = _identity(config, choice, seed) | {"record": dataclasses.asdict(record)}
                    write_text(_path(folder, choice, seed), json.dumps(about) + "\n")
                state.remove()
    show(total, total)
    return [found[choice.name, seed] for choice in chosen for seed in range(config.seeds)]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Images:
    """Both splits with one kind of pixels: images float32 `[n, 784]`, labels int64 `[n]`."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def read(cls, config: ChoicesConfig, pixels: Pixels) -> _Images:
        if pixels == "half":
            data, spec = config.data, BINARY_MNIST
        else:
            assert config.grey is not None
            data = config.grey
            spec = dataclasses.replace(BINARY_MNIST, binary_threshold=_THRESHOLDS[pixels])
        return cls(train=read_split(data, "train", spec), test=read_split(data, "test", spec))


def _groups(choices: Sequence[Choice]) -> Iterator[list[Choice]]:
    """Yield the choices, some at a time, those with one place of BN one after another."""
    ordered = sorted(choices, key=lambda choice: choice.normalized)
    count = -(-len(ordered) // TOGETHER)
    for number in range(count):
        start, end = (len(ordered) * i // count for i in (number, number + 1))
        yield ordered[start:end]


class _State:
    """The file that nets under way are saved in. One of other nets is not gone on from."""

    def __init__(self, folder: Path, identities: Sequence[dict[str, Any]]) -> None:
        self._path = folder / "under-way.safetensors"
        self._identities = json.dumps(list(identities))

    def save(self, nets: JointNets, looks: Sequence[Tensor], step: int, seconds: float) -> None:
        """Write the nets, their looks, the steps taken and the time, whole or not at all."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        durable.save_tensors(
            {name: tensor.clone() for name, tensor in nets.tensors().items()}
            | {"looks": torch.stack(list(looks))},
            self._path,
            partial=str(self._path.with_name(f".{self._path.name}.partial")),
            metadata={"of": self._identities, "step": str(step), "seconds": str(seconds)},
        )

    def load(self, nets: JointNets) -> tuple[list[Tensor], int, float]:
        """Put the nets where they were saved; return their looks, steps and time."""
        try:
            with safetensors.safe_open(str(self._path), framework="pt") as file:
                about = file.metadata() or {}
                if about.get("of") != self._identities:
                    return [], 0, 0.0
                for name, tensor in nets.tensors().items():
                    tensor.copy_(file.get_tensor(name))
                looks = list(file.get_tensor("looks"))
                return looks, int(about["step"]), float(about["seconds"])
        except FileNotFoundError:
            return [], 0, 0.0
        except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
            raise UserError(
                f"{self._path} cannot be read ({error}): remove it to train those nets anew"
            ) from None

    def remove(self) -> None:
        """Remove the file, if there is one."""
        self._path.unlink(missing_ok=True)


def _train_group(
    config: ChoicesConfig,
    group: Sequence[Choice],
    seed: int,
    images: _Images,
    state: _State,
    show: Callable[[int], None],
    clock: Callable[[], float],
) -> list[NetRecord]:
    """Train some nets on the same mini-batches."""
    began_s = clock()
    (inputs, labels), (test_inputs, test_labels) = images.train, images.test
    nets = JointNets(group, stream_key(seed, "initial weights"))
    mini_batches = MiniBatches(len(labels), config.batch_size, seed)
    rates = torch.tensor([choice.learning_rate for choice in group])
    finals = torch.tensor([choice.final_rate for choice in group])
    looks, begin, before_s = state.load(nets)
    saved = begin
    for step in range(begin, config.steps):
        rows = mini_batches.rows(step)
        now = rates * finals ** (step / config.steps)
        nets.step(inputs[rows], labels[rows], now, newest_share(step))
        if (step + 1) % config.record_every == 0:
            looks.append(nets.hits(test_inputs, test_labels, nets.statistics, None))
            show(step + 1)
            if step + 1 - saved >= SAVE_EVERY:
                state.save(nets, looks, step + 1, before_s + clock() - began_s)
                saved = step + 1
    batches = min(POPULATION_BATCHES, config.steps)
    population = nets.population(inputs[mini_batches.rows(i)] for i in range(batches))
    drawn = np.random.default_rng(stream_key(seed, "training rows")).permutation(len(labels))
    sample = torch.from_numpy(np.sort(drawn[:TRAINING_ROWS]))
    by_population = nets.hits(test_inputs, test_labels, population, None)
    by_batch = nets.hits(test_inputs, test_labels, population, config.batch_size)
    training = nets.hits(inputs[sample], labels[sample], population, None)
    seconds = (before_s + clock() - began_s) / len(group)
    return [
        NetRecord(
            choice=choice.name,
            seed=seed,
            looks=tuple(int(look[net]) / len(test_labels) for look in looks),
            moving=int(looks[-1][net]) / len(test_labels),
            population=int(by_population[net]) / len(test_labels),
            by_batch=int(by_batch[net]) / len(test_labels),
            training=int(training[net]) / len(sample),
            seconds=round(seconds, 1),
        )
        for net, choice in enumerate(group)
    ]


def _path(folder: Path, choice: Choice, seed: int) -> Path:
    return folder / f"{choice.name}-seed-{seed}.json"


def _identity(config: ChoicesConfig, choice: Choice, seed: int) -> dict[str, Any]:
    """Return what a net's records depend on, as JSON has it."""
    return {
        "choice": dataclasses.asdict(choice),
        "seed": seed,
        "data": config.data if choice.pixels == "half" else config.grey,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "record_every": config.record_every,
    }


def _read(path: Path, identity: dict[str, Any]) -> NetRecord | None:
    """Return a net's records, None if there are none yet."""
    if not path.exists():
        return None
    try:
        about = json.loads(path.read_text())
        values = about.pop("record")
        record = NetRecord(**values | {"looks": tuple(values["looks"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it to train that net") from None
    other = {name: value for name, value in about.items() if identity.get(name) != value}
    if other:
        told = ", ".join(f"{name}={value}" for name, value in other.items())
        raise UserError(
            f"{path} is of another experiment ({told}): give those options, or another --output"
        )
    return record
