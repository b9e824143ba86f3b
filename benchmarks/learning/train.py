"""One training of one peer, in a process of its own."""

from __future__ import annotations

import dataclasses
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from downpour.benchmarks.baselines.common import START_DEADLINE_S
from downpour.benchmarks.learning.curve import Curve, Ended, curve_of_run
from downpour.benchmarks.learning.peers import RECIPE, Bounds, Peer
from downpour.benchmarks.learning.search import Setting
from downpour.benchmarks.processes import BenchmarkFailed, Child, measure_in_child
from downpour.benchmarks.system import LOOK_EVERY_S, STOP_DEADLINE_S, RunFollower
from downpour.cluster.config import recipes
from downpour.cluster.config.run import RunConfig
from downpour.cluster.run.folder import METRICS, STATUS, RunFolder

DEADLINE_S = 900.0
"""Of a baseline, start, scoring and all; its own deadlines are shorter."""


def train(
    peer: Peer,
    setting: Setting,
    *,
    seed: int,
    bounds: Bounds,
    bound_s: float,
    looks_per_epoch: int,
    data: str,
    num_examples: int,
) -> Curve:
    """Train `peer` until it has the last goal, for `bound_s` training seconds at most.

    Args:
        peer: who.
        setting: its rate, decay, workers and mini-batch size.
        seed: of initial weights and order.
        bounds: goals, epochs and the like.
        bound_s: training seconds.
        looks_per_epoch: how often all but this system are scored.
        data: folder with the decoded splits, for all but this system.
        num_examples: of its training split.

    Raises:
        BenchmarkFailed: the training failed, rather than that it did not arrive.
    """
    if peer.module is None:
        config = configure(setting, seed=seed, bounds=bounds)
        return follow(config, goal=bounds.goals[-1], bound_s=bound_s)
    lesson = {
        "data": data,
        "num_examples": num_examples,
        "workers": setting.shape.workers,
        "batch_size": setting.shape.batch_size,
        "learning_rate": setting.learning_rate,
        "momentum": setting.momentum,
        "nesterov": setting.nesterov,
        "fused": True,
        "decay": setting.decay,
        "average": setting.average,
        "step_examples": setting.shape.step_examples,
        "seed": seed,
        "epochs": bounds.epochs,
        "looks_per_epoch": looks_per_epoch,
        "goal": bounds.goals[-1],
        "bound_s": bound_s,
        "recompute_examples": bounds.recompute_examples,
        "asked_s": time.monotonic(),
    }
    module = f"downpour.benchmarks.baselines.{peer.module}"
    plain = measure_in_child(f"{peer.module} that learns", module, lesson, DEADLINE_S)
    return Curve.from_plain(plain)


def configure(setting: Setting, *, seed: int, bounds: Bounds) -> RunConfig:
    """The recipe, but for what `setting` says, its seed, its length and how often it is scored."""
    recipe = recipes.find(RECIPE)
    server, policy = recipe.server, recipe.policy
    schedule = dataclasses.replace(
        server.schedule, learning_rate=setting.learning_rate, decay_factor=setting.decay
    )
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, batch_size=setting.shape.batch_size),
        server=dataclasses.replace(
            server,
            rule="nesterov" if setting.nesterov else "momentum",
            schedule=schedule,
            momentum=setting.momentum,
            ema=setting.average,
        ),
        replicas=dataclasses.replace(recipe.replicas, replicas=setting.shape.workers),
        policy=dataclasses.replace(
            policy, epochs=bounds.epochs, seed=seed, evaluate_every_s=bounds.evaluate_every_s
        ),
    )


def follow(config: RunConfig, *, goal: float, bound_s: float) -> Curve:
    """Run `config` until its evaluations have the accuracy `goal`, and stop it then.

    Raises:
        BenchmarkFailed: the run failed, or has made no update by the deadline of a start.
    """
    with tempfile.TemporaryDirectory(prefix="downpour-bench-") as scratch:
        folder = RunFolder.create(Path(scratch) / "run", config)
        asked_at = time.time()
        arguments: list[str | Path] = ["-m", "downpour.benchmarks.system", folder.path]
        with Child(f"the run of {config.recipe} that learns", [*arguments, "--no-dashboard"]) as c:
            watch = _Watch(RunFollower(c, folder.path / METRICS), asked_at, _rows(config))
            ended: Ended = "out of epochs"
            while c.process.poll() is None:
                curve = watch.curve(ended)
                arrived = curve.arrival(goal) is not None
                # The evaluator is the last to come up; a run without a look would say nothing.
                out_of_time = watch.trained_s() >= bound_s and bool(curve.looks)
                if arrived or out_of_time:
                    ended = "arrived" if arrived else "out of time"
                    c.process.send_signal(signal.SIGTERM)
                    c.end(STOP_DEADLINE_S)
                    break
                if not watch.trains and time.time() - asked_at > START_DEADLINE_S:
                    raise BenchmarkFailed(
                        f"{c.what} has made no update for {START_DEADLINE_S:.0f} s: see {c.log}, "
                        "and try again on a machine that is less busy"
                    )
                time.sleep(LOOK_EVERY_S)
            # While a run writes its result, our signal ends it at once; Ray then exits with 15.
            ours = ended != "out of epochs" and abs(c.process.returncode) == signal.SIGTERM
            status = folder.path / STATUS
            if not ours and (
                not status.exists()
                or folder.read_json(STATUS)["state"] not in ("stopped", "finished")
            ):
                raise c.failed()
            curve = watch.curve(ended, finished=True)
    if curve.arrival(goal) is not None:
        curve = dataclasses.replace(curve, ended="arrived")
    return curve


def _rows(config: RunConfig) -> int:
    """Examples of the training split."""
    from downpour.shuffler.dataset.records import Dataset

    return Dataset.open(config.data.data, config.data.train_split).num_rows


class _Watch:
    """All lines of a run's metrics so far."""

    def __init__(self, follower: RunFollower, asked_at: float, epoch_examples: int) -> None:
        self._follower = follower
        self._asked_at = asked_at
        self._epoch_examples = epoch_examples
        self._lines: list[dict[str, Any]] = []

    def curve(self, ended: Ended, *, finished: bool = False) -> Curve:
        """What they show."""
        self._lines += self._follower.lines()
        return curve_of_run(
            self._lines,
            asked_at=self._asked_at,
            epoch_examples=self._epoch_examples,
            ended=ended,
            finished=finished,
        )

    @property
    def trains(self) -> bool:
        """Whether there was an update."""
        return bool(self._rates())

    def trained_s(self) -> float:
        """Seconds since the first line with an update."""
        rates = self._rates()
        return float(rates[-1]["time"] - rates[0]["time"]) if rates else 0.0

    def _rates(self) -> list[dict[str, Any]]:
        return [x for x in self._lines if "accuracy" not in x and x.get("examples")]
