"""This system under measurement: real runs of a configuration, as `downpour train` does them.

A run is started in a process of its own, on a Ray of its own, with everything on. Once all
replicas train and the warm-up is over, its own metrics and the kernel's processor times are read
for some seconds; then it is asked to stop. As a main module (`python -m downpour.benchmarks.system
RUN`) it is that process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from downpour.benchmarks.harness import Settings
from downpour.benchmarks.processes import BenchmarkFailed, Child, descendants
from downpour.cluster.config import recipes
from downpour.cluster.config.paths import ROOT
from downpour.cluster.config.plain import to_plain
from downpour.cluster.config.run import RunConfig
from downpour.cluster.run.folder import EVENTS, METRICS, STATUS, RunFolder
from downpour.paramserver.rules.schedule import Schedule
from downpour.workers.config import ModelConfig

START_DEADLINE_S = 180.0
STOP_DEADLINE_S = 60.0
LINE_DEADLINE_S = 60.0
LOOK_EVERY_S = 0.02

ROLES = {
    "ray::Replica": "replicas",
    "ray::Partition": "partitions",
    "ray::Shuffler": "shufflers",
    "ray::Evaluator": "evaluator",
    "downpour.benchmarks.system": "driver",
}
"""What a command line begins with or has in it -> the role of that process; others are Ray's."""


@dataclass(frozen=True, kw_only=True)
class SystemMeasurement:
    """What a run showed in steady state."""

    updates_per_s: float
    """Mini-batches that the parameter server applied, which is what peers call updates. Several
    of them may be one push."""
    updates: int
    """Mini-batches in the time measured."""
    seconds: float
    """The time measured."""
    cpu_ms_per_update: float
    """Processor time of all processes of the run, the driver's and Ray's own included."""
    cpu_ms_by_role: Mapping[str, float]
    """The same by role, milliseconds an update."""
    staleness_mean: float
    """Mean staleness since the run began."""
    duplicates: int
    """Pushes of mini-batches that had been applied before."""
    refused: int
    """Mini-batches that were refused."""
    replicas: int
    """Replicas that trained."""


def mnist(*, replicas: int, concurrent_steps: int = 5) -> RunConfig:
    """The recipe `mnist-bn` with all replicas on from the start, and momentum SGD alone.

    Ramp, rate, weight decay and average make no difference to what is measured, or would make one
    that the plain loops do not have. The rate is one that hundreds of steps in flight bear.
    """
    recipe = recipes.find("mnist-bn")
    return dataclasses.replace(
        recipe,
        recipe="bench-mnist-bn",
        data=dataclasses.replace(recipe.data, past_bound="rekey"),
        server=dataclasses.replace(
            recipe.server, weight_decay=0.0, ema=None, schedule=Schedule(learning_rate=0.002)
        ),
        replicas=dataclasses.replace(
            recipe.replicas,
            replicas=replicas,
            steps=dataclasses.replace(recipe.replicas.steps, concurrent_steps=concurrent_steps),
            warm_start_epochs=0.0,
            ramp_epochs=0.0,
        ),
        policy=dataclasses.replace(recipe.policy, epochs=10_000),
    )


def convnet(*, replicas: int, concurrent_steps: int = 5) -> RunConfig:
    """The same for `benchmarks.models.convnet`, on the same images.

    Scoring 10,000 images costs seconds here, which plain loops do not spend; so it is done once,
    before the measurement begins.
    """
    config = mnist(replicas=replicas, concurrent_steps=concurrent_steps)
    image = dataclasses.replace(config.model.image, flatten=False)
    return dataclasses.replace(
        config,
        recipe="bench-convnet",
        model=ModelConfig(model="downpour.benchmarks.models:convnet", image=image),
        policy=dataclasses.replace(config.policy, evaluate_every_s=600.0),
    )


def as_plain(config: RunConfig) -> dict[str, Any]:
    """The configuration, for a record; paths from the root."""
    plain = to_plain(config)
    plain["data"]["data"] = plain["data"]["data"].removeprefix(f"{ROOT}/")
    return plain


def measure(
    config: RunConfig, settings: Settings, look: Callable[[RunFolder], None] = lambda _: None
) -> SystemMeasurement:
    """Run `config`, and measure it for at least `settings.seconds` once it is warm.

    `look` is given the run's folder when all is over. Raises `BenchmarkFailed` where the run fails,
    or refuses a mini-batch or applies one twice.
    """
    with tempfile.TemporaryDirectory(prefix="downpour-bench-") as scratch:
        folder = RunFolder.create(Path(scratch) / "run", config)
        what = f"the run of {config.recipe} with {config.replicas.replicas} replicas"
        flag = "--no-dashboard" if settings.quick else "--dashboard"
        with Child(what, ["-m", "downpour.benchmarks.system", folder.path, flag]) as child:
            follower = RunFollower(child, folder.path / METRICS)
            # The evaluator is the last to come up, after all replicas train.
            sign = "updates_per_s" if settings.quick else "accuracy"
            everybody = {None, config.replicas.replicas}  # lines of evaluations do not count them
            warm = follower.next(
                lambda line: line.get(sign) is not None and line.get("replicas_alive") in everybody,
                START_DEADLINE_S,
            )
            if config.server.hot_standby:
                await_follower(folder, child)
                warm = {"time": time.time()}
            begin = follower.rates(warm["time"] + settings.warmup_s)
            before = _cpu_by_pid()
            end = follower.rates(begin["time"] + settings.seconds)
            after = _cpu_by_pid()
            child.process.send_signal(signal.SIGTERM)
            child.end(STOP_DEADLINE_S)
            status = folder.read_json(STATUS)
            if end["replicas_alive"] != config.replicas.replicas:
                raise BenchmarkFailed(
                    f"{what} was left with {end['replicas']} of them: see {child.log}"
                )
            if status.get("state") != "stopped" or status["duplicates"] or status["refused"]:
                raise BenchmarkFailed(
                    f"{what} ended as {status.get('state')} with {status.get('duplicates')} "
                    f"duplicates and {status.get('refused')} refused: see {child.log}"
                )
        look(folder)
    return _summary(begin, end, before, after, config.data.batch_size)


def await_follower(folder: RunFolder, child: Child) -> None:
    """Wait until a partition of a run has its follower. Raises `BenchmarkFailed` if none comes."""
    path, give_up_s = folder.path / EVENTS, time.monotonic() + START_DEADLINE_S
    while not (path.exists() and "has a follower" in path.read_text()):
        if child.process.poll() is not None or time.monotonic() > give_up_s:
            raise BenchmarkFailed(f"the partition has no follower: see {child.log}")
        time.sleep(LOOK_EVERY_S)  # how often to look


def _summary(
    begin: dict[str, Any],
    end: dict[str, Any],
    before: Mapping[int, tuple[str, float]],
    after: Mapping[int, tuple[str, float]],
    batch_size: int,
) -> SystemMeasurement:
    updates = round((end["examples"] - begin["examples"]) / batch_size)
    seconds = end["time"] - begin["time"]
    by_role: dict[str, float] = {}
    for pid, (role, cpu_s) in after.items():
        used_s = cpu_s - before.get(pid, (role, 0.0))[1]
        by_role[role] = by_role.get(role, 0.0) + 1e3 * used_s / max(updates, 1)
    return SystemMeasurement(
        updates_per_s=updates / seconds,
        updates=updates,
        seconds=seconds,
        cpu_ms_per_update=sum(by_role.values()),
        cpu_ms_by_role=by_role,
        staleness_mean=end["staleness_mean"],
        duplicates=end["duplicates"],
        refused=end["refused"],
        replicas=end["replicas_alive"],
    )


class RunFollower:
    """Reads a run's metrics as they are written."""

    def __init__(self, child: Child, path: Path) -> None:
        self._child = child
        self._path = path
        self._read = 0

    def next(self, wanted: Callable[[dict[str, Any]], bool], deadline_s: float) -> dict[str, Any]:
        """The next line that is wanted, soon after it is written."""
        give_up_s = time.monotonic() + deadline_s
        while time.monotonic() < give_up_s:
            for line in self.lines():
                if wanted(line):
                    return line
            if self._child.process.poll() is not None:
                raise self._child.failed()
            time.sleep(LOOK_EVERY_S)
        raise BenchmarkFailed(
            f"{self._child.what} has not come so far within {deadline_s:.0f} s: see "
            f"{self._child.log}, and try again on a machine that is less busy"
        )

    def rates(self, at_s: float) -> dict[str, Any]:
        """The first line of rates that is written at this time (Unix) or later."""
        deadline_s = max(0.0, at_s - time.time()) + LINE_DEADLINE_S
        return self.next(lambda line: "replicas_alive" in line and line["time"] >= at_s, deadline_s)

    def lines(self) -> list[dict[str, Any]]:
        """The lines that were written since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + len(newline)
        return [json.loads(line) for line in whole.splitlines()]


def _cpu_by_pid() -> dict[int, tuple[str, float]]:
    """Role and processor seconds of every process of the run: all that are below this one."""
    found = {}
    for process in descendants(os.getpid()).values():
        role = next((r for mark, r in ROLES.items() if mark in process.command), "ray")
        found[process.pid] = (role, process.cpu_s)
    return found


def main() -> int:
    """Train the run whose folder is given, as `downpour train` does."""
    from rich.console import Console

    from downpour.cluster.training import inputs, launch

    folder = RunFolder.open(Path(sys.argv[1]))
    dashboard = "--dashboard" in sys.argv
    data = inputs.check_data(folder.config())
    return launch.train(
        folder, data, resume=False, address=None, dashboard=dashboard, console=Console(stderr=True)
    )


if __name__ == "__main__":
    raise SystemExit(main())
