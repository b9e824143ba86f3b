"""What people and files are told of a run: progress, metrics, status, events.

Telemetry only looks on (it is a `RunListener` of the controller). It reads the run's state, is told
what happens, and makes rates, percentiles and sums of that. Nothing is decided from what it holds.
"""

from __future__ import annotations

import functools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from downpour.cluster.config.run import RunConfig
from downpour.cluster.controller.failures.policy import Part
from downpour.cluster.controller.parts import RunParts
from downpour.cluster.controller.protocol.instructions import (
    AllReported,
    CheckpointFinished,
    Note,
    Tell,
    WeightsScored,
    WindowTrained,
)
from downpour.cluster.monitoring.cpu_usage import CpuTotals
from downpour.cluster.monitoring.learning import Learning
from downpour.cluster.monitoring.observation import Observation, Sink
from downpour.cluster.monitoring.progress import Progress, goal_of
from downpour.cluster.run.folder import RunFolder
from downpour.paramserver.partition.staleness import Histogram
from downpour.shuffler.plan.plan import Plan
from downpour.workers.tasks import Figure

if TYPE_CHECKING:
    from downpour.paramserver.actor import PartitionReport
    from downpour.workers.actor import Evaluation
    from downpour.workers.replica.replicas import WindowReport

RATE_WINDOW_S = 10.0
"""Rates are over this long."""


class Telemetry:
    """The figures of one run, and their way to people, the run's folder and the sinks."""

    def __init__(
        self,
        *,
        config: RunConfig,
        plan: Plan,
        folder: RunFolder,
        show: Callable[[Progress], None],
        say: Callable[[str], None] = lambda _: None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        """Look on at a run, from its beginning.

        Args:
            config: the run's configuration.
            plan: its mini-batches.
            folder: the run's folder.
            show: shows people where the run stands.
            say: shows people a line of news.
            sinks: take figures.
        """
        self._config = config
        self._plan = plan
        self._folder = folder
        self._show = show
        self._say = say
        self._sinks = sinks
        self._can_write = True
        self._loss: float | None = None
        self._history: deque[tuple[float, int, int]] = deque()
        """Time, updates and examples of the latest reports."""
        self._reports: list[PartitionReport] = []
        """The reports that the latest line of metrics was made from."""
        self._staleness: dict[str, float] = {}
        self._cpu = CpuTotals()
        self._learning = Learning(
            num_classes=config.model.num_classes,
            epochs=config.policy.epochs,
            in_flight=config.replicas.slots,
            data=config.data.data,
            from_start=not folder.has_trained(),
        )
        self._said: str | None = None
        """What the evaluator has said of its BN statistics."""

    def look(self, run: RunParts, now: float) -> None:
        """See `RunListener`: show people where the run stands."""
        self._show(self.progress(run, now))

    def note(self, note: Note, run: RunParts, now: float) -> None:
        """See `RunListener`: tell people and files what has happened."""
        match note:
            case Tell():
                self.tell(note.text)
            case WindowTrained():
                self._trained(note.report)
            case AllReported():
                self._reported(run, now)
            case WeightsScored():
                self._scored(note.evaluation, run, now)
            case CheckpointFinished():
                for sink in self._sinks:
                    self._write(functools.partial(sink.saved, note.checkpoint))

    def tell(self, text: str) -> None:
        """Tell people a line, and keep it among the run's events."""
        self._say(text)
        self._write(lambda: self._folder.append_event(text))

    def progress(self, run: RunParts, now: float) -> Progress:
        """Return where a run stands."""
        policy = self._config.policy
        updates_per_s, examples_per_s = self._rates()
        return Progress(
            elapsed_s=run.elapsed_s(now),
            phase=run.phase,
            epoch=min(policy.epochs, int(self._epochs_done) + 1),
            epochs=policy.epochs,
            examples=min((r.examples for r in self._reports), default=0),
            total_examples=policy.epochs * self._plan.num_rows,
            updates=min((r.version for r in self._reports), default=0),
            updates_per_s=updates_per_s,
            examples_per_s=examples_per_s,
            loss=self._loss,
            metric=self._config.model.the_task.metric,
            figure=run.evaluation.figure,
            best=run.evaluation.best,
            goal=goal_of(self._config),
            staleness_mean=self._staleness.get("mean"),
            staleness_p99=self._staleness.get("p99"),
            replicas_alive=run.processes.num_alive(run.replicas_wanted),
            replicas_wanted=run.replicas_wanted,
            replicas_held=run.leases.warm_start.held,
            duplicates=sum(r.duplicates for r in self._reports),
            refused=len(run.refused),
        )

    @property
    def _epochs_done(self) -> float:
        """Epochs of examples applied by the partition that is furthest behind."""
        if not self._reports:
            return 0.0
        return round(min(r.examples for r in self._reports) / self._plan.num_rows, 4)

    def _trained(self, report: WindowReport) -> None:
        if report.choices:
            self.tell(
                f"replica {report.replica} and its process reach {report.choices} (wire auto)"
            )
        self._cpu.trained(report)
        if report.mean_loss is not None:
            self._loss = report.mean_loss
            self._tell_once(self._learning.trained(report.mean_loss, self._epochs_done))
        for sink in self._sinks:
            self._write(functools.partial(sink.trained, report))

    def _reported(self, run: RunParts, now: float) -> None:
        """Work out rates, and write metrics and status."""
        history = self._history
        reports = self._reports = run.partitions.latest_reports
        history.append((now, min(r.version for r in reports), min(r.examples for r in reports)))
        while len(history) > 2 and now - history[0][0] > RATE_WINDOW_S:
            history.popleft()
        self._staleness = merged_staleness(reports).summary()
        self._learning.rate = reports[0].rate
        values = self._values(run, now)
        self._write(lambda: self._folder.append_metrics(values))
        status = {"state": run.phase, "time": time.time(), **values}
        if (figure := run.evaluation.figure) is not None:
            status |= {figure.metric: figure.value, **_best(run.evaluation.best)}
        self._write(lambda: self._folder.write_status(status))
        restarts = run.failures.policy.restarts
        observation = Observation(
            values=values,
            reports=reports,
            replicas=self._replicas(run),
            leases=run.leases.leases,
            restarts={str(part): restarts[part] for part in get_args(Part)},
        )
        for sink in self._sinks:
            self._write(functools.partial(sink.observed, observation))

    def _values(self, run: RunParts, now: float) -> dict[str, Any]:
        """Return a line of metrics."""
        reports = self._reports
        held = run.leases.warm_start.held
        values: dict[str, Any] = {
            "elapsed_s": round(run.elapsed_s(now), 3),
            "updates": min(r.version for r in reports),
            "examples": min(r.examples for r in reports),
            "epoch": self._epochs_done,
            "updates_per_s": self._rates()[0],
            "learning_rate": reports[0].rate,
            "staleness_mean": round(self._staleness["mean"], 2),
            "staleness_p99": self._staleness["p99"],
            "replicas_alive": run.processes.num_alive(run.replicas_wanted),
            "replicas_wanted": run.replicas_wanted,
            **({} if held is None else {"replicas_held": held}),
            "duplicates": sum(r.duplicates for r in reports),
            "dropped": sum(r.dropped for r in reports),
            "refused": len(run.refused),
            "images_skipped": len(run.skipped),
            **self._cpu.values(reports),
        }
        if self._loss is not None and math.isfinite(self._loss):
            values["loss"] = round(self._loss, 6)
        return values

    def _replicas(self, run: RunParts) -> Mapping[str, int]:
        """Return the number of replicas by state, see `Observation`."""
        wanted, held = run.replicas_wanted, run.leases.warm_start.held
        alive, working = run.processes.num_alive(wanted), run.processes.num_working()
        kept_back = 0 if held is None else max(0, wanted - held)
        return {
            "training": working,
            "waiting": max(0, alive - working - kept_back),
            "held": kept_back,
            "starting": wanted - alive,
        }

    def _scored(self, evaluation: Evaluation, run: RunParts, now: float) -> None:
        """Write the score to the metrics."""
        self._cpu.evaluated(evaluation.wall_s)
        values = {
            "elapsed_s": round(run.elapsed_s(now), 3),
            "updates": min(evaluation.versions),
            "epoch": self._epochs_done,
            **evaluation.score.figures,
            "evaluation_loss": evaluation.score.loss,
        }
        if evaluation.moving is not None:
            values[f"moving_{evaluation.moving.metric}"] = evaluation.moving.value
            if evaluation.gap is not None:
                values["bn_gap"] = round(evaluation.gap, 6)
        if evaluation.note != self._said:
            self._said = evaluation.note
            if self._said is not None:
                self.tell(self._said)
        score = evaluation.score
        if score.of_classes:
            line = self._learning.scored(score.accuracy, score.num_examples, self._epochs_done)
            self._tell_once(line)
        self._write(lambda: self._folder.append_metrics(values))
        scored = {**values, **_best(run.evaluation.best)}
        for sink in self._sinks:
            self._write(functools.partial(sink.evaluated, scored))

    def _tell_once(self, line: str | None) -> None:
        if line is not None:
            self.tell(line)

    def _write(self, write: Callable[[], None]) -> None:
        """Write something; a full disk must not end the training, and is told once."""
        try:
            write()
        except OSError as error:
            if self._can_write:
                self._say(f"the run folder cannot be written ({error.strerror}): going on")
            self._can_write = False
        else:
            self._can_write = True

    def _rates(self) -> tuple[float | None, float | None]:
        """Return updates and examples a second of late."""
        history = self._history
        if len(history) < 2 or history[-1][0] <= history[0][0]:
            return None, None
        seconds = history[-1][0] - history[0][0]
        return (
            round((history[-1][1] - history[0][1]) / seconds, 1),
            round((history[-1][2] - history[0][2]) / seconds, 1),
        )


def _best(best: Figure | None) -> dict[str, float]:
    """Return the best figure under its name."""
    return {} if best is None else {f"best_{best.metric}": best.value}


def merged_staleness(reports: Iterable[PartitionReport]) -> Histogram:
    """Return the staleness of every push applied on every partition."""
    whole = Histogram()
    for report in reports:
        for counts in report.staleness.values():
            whole = whole.merge(Histogram(counts))
    return whole
