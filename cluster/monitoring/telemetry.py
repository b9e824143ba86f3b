"""What is known of a run as it goes: reports in, progress, metrics and status out.

Nothing is decided here. The controller hands over what the actors report; people and files get
rates, percentiles and the newest of everything.
"""

from __future__ import annotations

import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from downpour.cluster.config.run import RunConfig
from downpour.cluster.monitoring.costs import Costs
from downpour.cluster.monitoring.observation import Leases, Observation, Sink
from downpour.cluster.monitoring.progress import Progress
from downpour.cluster.run.early_stopping import Scoring
from downpour.cluster.run.folder import STATUS, RunFolder
from downpour.paramserver.partition.staleness import Histogram
from downpour.shuffler.plan.plan import Plan

if TYPE_CHECKING:
    from downpour.paramserver.actor import PartitionReport
    from downpour.workers.actor import Evaluation
    from downpour.workers.replica.replicas import WindowReport

NO_LEASES = Leases()
RATE_WINDOW_S = 10.0
"""Rates are over this long."""


class Telemetry:
    """The newest figures of one run, and their way to the run folder."""

    def __init__(
        self,
        *,
        config: RunConfig,
        plan: Plan,
        folder: RunFolder,
        clock: Callable[[], float],
        began_s: float,
        elapsed_before_s: float,
        trained_before_s: float = 0.0,
        best_accuracy: float | None = None,
        say: Callable[[str], None] = lambda _: None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        """`began_s` is by `clock`; `elapsed_before_s` are the seconds of earlier sessions, of which
        `trained_before_s` came after the first update; `best_accuracy` is theirs; `say` shows
        people a line of news.
        """
        self._say = say
        self._sinks = sinks
        self._can_write = True
        self._config = config
        self._plan = plan
        self._folder = folder
        self._clock = clock
        self._began_s = began_s
        self._elapsed_before_s = elapsed_before_s
        self._trained_before_s = trained_before_s
        self._first_update_at: float | None = None
        """Unix time of this session's first update."""
        self._loss: float | None = None
        self._history: deque[tuple[float, int, int]] = deque()
        self._staleness: dict[str, float] = {}
        self._costs = Costs()
        self._note: str | None = None
        """What the evaluator has said of its BN statistics."""
        self.reports: list[PartitionReport] = []
        """The newest report of each partition, in their order."""
        self.evaluation: Evaluation | None = None
        """The newest evaluation."""
        self.best_accuracy = best_accuracy
        """The highest accuracy so far."""
        self.num_evaluations = 0
        self.phase = "starting the replicas"
        """What the run is busy with."""
        self.replicas_wanted = config.replicas.replicas
        """How many there are to be, which `downpour scale` may change."""
        self.held: int | None = None
        """Replicas that train while the others may not join, for the loss; None: all may."""
        self.quarantined: set[int] = set()
        """Replicas that are lent nothing any more."""
        self.refused: set[tuple[int, int]] = set()
        """Mini-batches, as (epoch, index), that some partition refused."""
        self.skipped: dict[int, str] = {}
        """Training rows whose image was left out in this session, each with a line on why."""

    @property
    def accuracy(self) -> float | None:
        """Of the newest evaluation."""
        return self.evaluation.score.accuracy if self.evaluation else None

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run began, over all of its sessions."""
        return self._elapsed_before_s + self.wall_s

    @property
    def wall_s(self) -> float:
        """Seconds since this session began."""
        return self._clock() - self._began_s

    @property
    def has_begun(self) -> bool:
        """Whether an update of this session is known of."""
        return self._first_update_at is not None

    @property
    def training_s(self) -> float:
        """Seconds since the first update, over all sessions."""
        if self._first_update_at is None:
            return self._trained_before_s
        return self._trained_before_s + time.time() - self._first_update_at

    def scoring(self, evaluation: Evaluation) -> Scoring:
        """What the weights that have just been scored had cost when they were pulled.

        Partitions tell their examples once a second; between two reports they are taken to grow
        with the versions.
        """
        version, rows = min(evaluation.versions), self._plan.num_rows
        slowest = min(self.reports, key=lambda r: r.version, default=None)
        examples = version * self._plan.batch_size * self._config.replicas.steps.n_push
        if slowest is not None and slowest.version:
            examples = round(version * slowest.examples / slowest.version)
        return Scoring(
            accuracy=evaluation.score.accuracy,
            training_s=round(max(0.0, self.training_s - evaluation.wall_s), 3),
            examples=examples,
            epochs=round(examples / rows, 4),
        )

    @property
    def epochs_done(self) -> float:
        """Epochs of examples applied by the partition that is furthest behind."""
        if not self.reports:
            return 0.0
        return round(min(r.examples for r in self.reports) / self._plan.num_rows, 4)

    def trained(self, report: WindowReport) -> None:
        """A window is done."""
        self._costs.trained(report)
        if report.mean_loss is not None:
            self._loss = report.mean_loss
        self.refused |= {(report.epoch, batch) for batch in report.refused}
        self.skipped.update(report.skipped)
        for sink in self._sinks:
            self._write(functools.partial(sink.trained, report))

    def reported(
        self,
        reports: Iterable[PartitionReport],
        *,
        alive: int,
        replicas: Mapping[str, int] | None = None,
        leases: Leases = NO_LEASES,
        restarts: Mapping[str, int] | None = None,
    ) -> None:
        """All partitions have reported: work out rates, and write metrics and status."""
        self.reports = sorted(reports, key=lambda r: r.index)
        # A partition that starts again forgets its first update, and all of them may.
        seen = [self._first_update_at, *(r.first_update_at for r in self.reports)]
        self._first_update_at = min((at for at in seen if at is not None), default=None)
        updates = min(r.version for r in self.reports)
        examples = min(r.examples for r in self.reports)
        now, history = self._clock(), self._history
        history.append((now, updates, examples))
        while len(history) > 2 and now - history[0][0] > RATE_WINDOW_S:
            history.popleft()
        self._staleness = merged_staleness(self.reports).summary()
        values: dict[str, Any] = {
            "elapsed_s": round(self.elapsed_s, 3),
            "updates": updates,
            "examples": examples,
            "epoch": self.epochs_done,
            "updates_per_s": self._rates()[0],
            "learning_rate": self.reports[0].rate,
            "staleness_mean": round(self._staleness["mean"], 2),
            "staleness_p99": self._staleness["p99"],
            "replicas_alive": alive,
            "replicas_wanted": self.replicas_wanted,
            **({} if self.held is None else {"replicas_held": self.held}),
            "duplicates": sum(r.duplicates for r in self.reports),
            "dropped": sum(r.dropped for r in self.reports),
            "refused": len(self.refused),
            "images_skipped": len(self.skipped),
            **self._costs.values(self.reports),
        }
        if self._loss is not None and math.isfinite(self._loss):
            values["loss"] = round(self._loss, 6)
        self._write(lambda: self._folder.append_metrics(values))
        status = {"state": self.phase, "time": time.time(), **values}
        self._write(lambda: self._folder.write_json(STATUS, status))
        observation = Observation(
            values=values,
            reports=self.reports,
            replicas=replicas or {"training": alive},
            leases=leases,
            restarts=restarts or {},
        )
        for sink in self._sinks:
            self._write(functools.partial(sink.observed, observation))

    def event(self, text: str) -> None:
        """News that people want to hear of at once, and to read later."""
        self._say(text)
        self._write(lambda: self._folder.append_event(text))

    def _write(self, write: Callable[[], None]) -> None:
        """A full disk must not end the training; it is told of once."""
        try:
            write()
        except OSError as error:
            if self._can_write:
                self._say(f"the run folder cannot be written ({error.strerror}): going on")
            self._can_write = False
        else:
            self._can_write = True

    def evaluated(self, evaluation: Evaluation) -> None:
        """Weights were scored: note it, and write it to the metrics."""
        self.evaluation = evaluation
        self._costs.evaluated(evaluation.wall_s)
        self.num_evaluations += 1
        accuracy = evaluation.score.accuracy
        self.best_accuracy = max(self.best_accuracy or 0.0, accuracy)
        values = {
            "elapsed_s": round(self.elapsed_s, 3),
            "updates": min(evaluation.versions),
            "epoch": self.epochs_done,
            "accuracy": accuracy,
            "evaluation_loss": evaluation.score.loss,
        }
        if evaluation.moving is not None:
            values["moving_accuracy"] = evaluation.moving.accuracy
            values["bn_gap"] = round(evaluation.gap or 0.0, 6)
        if evaluation.note != self._note:
            self._note = evaluation.note
            if self._note is not None:
                self.event(self._note)
        self._write(lambda: self._folder.append_metrics(values))
        for sink in self._sinks:
            scored = {**values, "best_accuracy": self.best_accuracy}
            self._write(functools.partial(sink.evaluated, scored))

    def progress(self, *, alive: int) -> Progress:
        """Where the run stands."""
        policy = self._config.policy
        updates_per_s, examples_per_s = self._rates()
        return Progress(
            elapsed_s=self.elapsed_s,
            phase=self.phase,
            epoch=min(policy.epochs, int(self.epochs_done) + 1),
            epochs=policy.epochs,
            examples=min((r.examples for r in self.reports), default=0),
            total_examples=policy.epochs * self._plan.num_rows,
            updates=min((r.version for r in self.reports), default=0),
            updates_per_s=updates_per_s,
            examples_per_s=examples_per_s,
            loss=self._loss,
            accuracy=self.accuracy,
            best_accuracy=self.best_accuracy,
            stop_at_accuracy=policy.stop_at_accuracy,
            staleness_mean=self._staleness.get("mean"),
            staleness_p99=self._staleness.get("p99"),
            replicas_alive=alive,
            replicas_wanted=self.replicas_wanted,
            replicas_held=self.held,
            duplicates=sum(r.duplicates for r in self.reports),
            refused=len(self.refused),
        )

    def _rates(self) -> tuple[float | None, float | None]:
        """Updates and examples a second of late."""
        history = self._history
        if len(history) < 2 or history[-1][0] <= history[0][0]:
            return None, None
        seconds = history[-1][0] - history[0][0]
        return (
            round((history[-1][1] - history[0][1]) / seconds, 1),
            round((history[-1][2] - history[0][2]) / seconds, 1),
        )


def merged_staleness(reports: Iterable[PartitionReport]) -> Histogram:
    """The staleness of every push applied on every partition."""
    whole = Histogram()
    for report in reports:
        for counts in report.staleness.values():
            whole = whole.merge(Histogram(counts))
    return whole
