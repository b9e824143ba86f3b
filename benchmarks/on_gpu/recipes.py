"""Accuracy against steps of section 4.2's recipes, on one device, without Ray or a controller.

Windows go to the replicas in the plan's order, with the recipe's warm start and ramp. Scores are
with the server's moving averages of the BN statistics. Besides what the rest of the script needs,
this part needs click, OpenCV, simplejpeg and Pillow.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from downpour.benchmarks.on_gpu.without_ray import KEY, Child, Here, Server, Workers, check_once
from downpour.paramserver.client import ParameterClient
from downpour.shuffler.processors import processors
from downpour.workers.spec import DeviceName, ModelSpec, Precision

if TYPE_CHECKING:
    from downpour.cluster.config.run import RunConfig
    from downpour.shuffler.plan.plan import Plan
    from downpour.workers.evaluation.split import SplitBatches

PACKAGES = {
    "click": "click",
    "cv2": "opencv-python-headless",
    "PIL": "pillow",
    "simplejpeg": "simplejpeg",
}
SCORE_EVERY = 200
"""Mini-batches between two scorings."""
WAIT_S = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lesson:
    """What is learnt, and on what."""

    data: str
    """A folder with Parquet files of the splits `train` and `validation`."""
    device: DeviceName
    """What it is computed on."""
    precision: Precision = "bfloat16"
    """Of the steps."""
    pixels: int = 64
    """Height and width that the network takes."""
    classes: int = 50
    """Of the images."""
    width: float = 1.0
    """Of the networks."""
    score_every: int = SCORE_EVERY
    """Mini-batches between two scorings."""
    in_this_process: bool = False
    """Whether all runs on threads of this process."""


def problem(data: str | None) -> str | None:
    """Why the recipes cannot be trained here; None if they can."""
    if data is None:
        return "no --data was given: a folder with Parquet files of train and validation"
    if not list(Path(data).glob("**/train*.parquet")):
        return f"{data} has no train*.parquet"
    missing = [pip for name, pip in PACKAGES.items() if importlib.util.find_spec(name) is None]
    if missing:
        return f"packages are missing: pip install {' '.join(missing)}"
    return None


def learn(
    name: str, lesson: Lesson, seconds: float, note: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Train a recipe for so many seconds, and score it now and then.

    Args:
        name: of the recipe.
        lesson: on what.
        seconds: to train, scoring left out.
        note: is told of each scoring: mini-batches, seconds of training, accuracy, loss.

    Returns:
        What came of the mini-batches.

    Raises:
        RuntimeError: a mini-batch was lost, or applied twice.
    """
    from downpour.cluster.config.derive import model_spec
    from downpour.cluster.config.resolve import Facts, resolve
    from downpour.shuffler.actor import ShufflerActor
    from downpour.shuffler.dataset.own import open_split
    from downpour.workers.evaluation.split import SplitBatches

    config = _config(name, lesson)
    dataset = open_split(lesson.data, config.data.train_split, config.model.columns)
    spec = model_spec(config)
    model = spec.build_flat("cpu")
    layout = model.layout
    specs = resolve(
        config,
        Facts(
            num_rows=dataset.num_rows,
            shard_rows=dataset.shard_rows,
            num_parameters=layout.num_parameters,
            num_features=layout.num_features,
            num_decayed=layout.decayed,
            num_partitions=1 if lesson.in_this_process else min(4, processors()),
            num_processors=1,
        ),
    )
    actor = Here if lesson.in_this_process else Child
    shuffler = ShufflerActor(specs.shufflers[0])
    split = SplitBatches(spec, lesson.data, config.data.eval_split)
    update = specs.partitions[0].update
    replicas = dataclasses.replace(
        specs.processes[0], num_threads=1 if lesson.in_this_process else processors()
    )
    server = Server(actor, model, update, len(specs.partitions))
    try:
        workers = Workers(actor, replicas, 1, server.endpoints())
        try:
            scorer = _Scorer(spec, split, server, lesson.device)
            course = _Course(config, specs.plan, shuffler, workers)
            try:
                course.run(seconds, lesson.score_every, lambda about: note(about | scorer.score()))
            finally:
                scorer.close()
        finally:
            workers.end()
        reports = server.reports()
    finally:
        server.end()
    check_once(reports, course.settled, may_refuse=True)
    return {"batches": course.settled, "refused": reports[0].refused, "training_s": course.spent_s}


def _config(name: str, lesson: Lesson) -> RunConfig:
    """The recipe, on these images and this device."""
    from downpour.cluster.config import recipes

    config = recipes.find(name)
    steps = dataclasses.replace(
        config.replicas.steps, device=lesson.device, precision=lesson.precision
    )
    replicas = dataclasses.replace(config.replicas, steps=steps)
    if lesson.in_this_process:
        steps = dataclasses.replace(steps, concurrent_steps=1, record_steps="off")
        replicas = dataclasses.replace(replicas, steps=steps, replicas=2)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model,
            num_classes=lesson.classes,
            image_size=lesson.pixels,
            width=lesson.width,
        ),
        data=dataclasses.replace(config.data, data=lesson.data, past_bound="rekey"),
        replicas=replicas,
        policy=dataclasses.replace(config.policy, epochs=10_000),
    )


class _Course:
    """Hands windows to the replicas that have begun, in the plan's order."""

    def __init__(self, config: RunConfig, plan: Plan, shuffler: Any, workers: Workers) -> None:
        self._config, self._plan, self._shuffler = config.replicas, plan, shuffler
        self._workers = workers
        self._windows = self._all_windows()
        self._under_way: dict[Future[Any], int] = {}
        self.settled = 0
        """Mini-batches."""
        self.spent_s = 0.0
        """Seconds of training."""

    def _all_windows(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        for epoch in range(self._config.replicas * 10**6):
            for turn in range(self._plan.num_windows):
                window = self._plan.window_at(epoch, turn)
                yield epoch, tuple(self._plan.window_batches_order(epoch, window))

    def _active(self) -> int:
        """Replicas that train by now: one, then more of them evenly."""
        config = self._config
        epochs = self.settled / self._plan.num_batches - config.warm_start_epochs
        if epochs < 0:
            return 1
        share = epochs / config.ramp_epochs if config.ramp_epochs else 1.0
        return min(config.replicas, 1 + int(share * (config.replicas - 1)))

    def _give(self) -> None:
        counts = [0] * self._config.replicas
        for replica in self._under_way.values():
            counts[replica] += 1
        for replica in range(self._active()):
            while counts[replica] < self._config.queued_windows:
                epoch, batches = next(self._windows)
                part = self._shuffler.deliver(epoch, batches)
                call = self._workers.of(replica).call("run_window", replica, epoch, batches, part)
                self._under_way[call] = replica
                counts[replica] += 1

    def _collect(self) -> None:
        done, _ = wait(self._under_way, WAIT_S, FIRST_COMPLETED)
        for call in done:
            self._under_way.pop(call)
            self.settled += call.result().num_batches

    def run(self, seconds: float, every: int, score: Callable[[dict[str, Any]], None]) -> None:
        """Train; nothing is under way while `score` is called."""
        due = every
        while self.spent_s < seconds:
            began_s = time.monotonic()
            while self.settled < due and self.spent_s + time.monotonic() - began_s < seconds:
                self._give()
                self._collect()
            while self._under_way:
                self._collect()
            self.spent_s += time.monotonic() - began_s
            due = self.settled + every
            score({"batches": self.settled, "training_s": self.spent_s})


class _Scorer:
    """Scores the server's weights, with its averages of the BN statistics, on the device."""

    def __init__(
        self, spec: ModelSpec, split: SplitBatches, server: Server, device: DeviceName
    ) -> None:
        self._split, self._device = split, torch.device(device)
        self._model = spec.build_flat("cpu")
        self._model.module.eval()
        self._client = ParameterClient(server.endpoints(), key=KEY)

    def score(self) -> dict[str, float]:
        """Accuracy and mean loss over the split."""
        client, layout = self._client, self._model.layout
        weights, statistics = (
            torch.zeros(layout.num_parameters),
            torch.zeros(2, layout.num_features),
        )
        client.pull_statistics(weights.numpy(), statistics.numpy(), [0] * client.num_partitions)
        self._model.bind(weights.to(self._device), statistics=statistics.to(self._device))
        right = rows = 0
        loss = 0.0
        with torch.inference_mode():
            for x, y in self._split():
                targets = y.to(self._device)
                outputs = self._model.module(x.to(self._device))
                loss += float(torch.nn.functional.cross_entropy(outputs, targets, reduction="sum"))
                right += int((outputs.argmax(1) == targets).sum())
                rows += len(y)
        return {"accuracy": right / rows, "loss": loss / rows}

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
