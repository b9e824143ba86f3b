"""The evaluator of a run: when it scores the weights, and bringing it back when it is lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from downpour.cluster.config.policy import PolicyConfig, next_evaluation_s
from downpour.cluster.controller.backend import (
    Backend,
    Done,
    PartitionLost,
    ProcessLost,
    Ticket,
    WriteFailed,
)
from downpour.cluster.controller.failure_policy import Action, Cause
from downpour.cluster.controller.failures import Losses
from downpour.cluster.controller.partitions import Partitions
from downpour.cluster.controller.pending_calls import Tickets
from downpour.cluster.errors import user_message
from downpour.cluster.monitoring.telemetry import Telemetry
from downpour.cluster.run.folder import BEST, MODEL, RunFolder
from downpour.workers.messages import Keeping

if TYPE_CHECKING:
    from downpour.workers.actor import Evaluation


class Evaluating:
    """The evaluator, and the scoring that is under way."""

    def __init__(
        self,
        backend: Backend,
        *,
        policy: PolicyConfig,
        tickets: Tickets,
        losses: Losses,
        telemetry: Telemetry,
        partitions: Partitions,
        folder: RunFolder,
        clock: Callable[[], float],
        scored: Callable[[Evaluation], None],
    ) -> None:
        """It has not been started. It reads the weights of `partitions`, and leaves them in
        `folder`; `scored` is told of each scoring.
        """
        self._backend = backend
        self._policy = policy
        self._tickets = tickets
        self._losses = losses
        self._telemetry = telemetry
        self._partitions = partitions
        self._folder = folder
        self._clock = clock
        self._scored = scored
        self._started = self._runs = self._ready = self._under_way = False
        self._next_s = clock()
        self._shortest_s = math.inf

    @property
    def cut_off(self) -> bool:
        """Whether it runs without its connections."""
        return self._runs and not self._ready

    def disconnected(self) -> None:
        """A partition is lost, and with it the evaluator's connections."""
        self._ready = False

    def start(self) -> None:
        """Start it, unless that has been done."""
        if not self._started:
            self._started = True
            self._connect(self._backend.start_evaluator())

    def reconnect(self) -> None:
        """Connect it again, if it runs and lacks its connections."""
        if self.cut_off:
            self._connect(self._backend.reconnect_evaluator())

    def _connect(self, ticket: Ticket) -> None:
        self._runs = self._ready = False

        def handle(done: Done) -> None:
            if done.error is None:
                self._ready = self._runs = True
            else:
                self._on_error(done.error)

        self._tickets.expect(ticket, handle)

    def _on_error(self, error: Exception) -> None:
        self._ready = False
        if isinstance(error, WriteFailed):
            self._ready = True
            self._telemetry.event(f"the best weights could not be written ({error}): going on")
        elif isinstance(error, PartitionLost):
            self._runs = True
            self._partitions.ask_reports_now()
            if (
                self._partitions.all_up
                and self._recover("disconnected", detail=str(error)) != "reconnect"
            ):
                self._connect(self._backend.start_evaluator())
        elif isinstance(error, ProcessLost):
            self._replace("died")
        elif user_message(error) is not None:
            raise error
        else:
            self._replace("failed", error)

    def _replace(self, cause: Cause, error: Exception | None = None) -> None:
        self._recover(cause, error=error)
        self._connect(self._backend.start_evaluator())

    def _recover(self, cause: Cause, *, detail: str = "", error: Exception | None = None) -> Action:
        return self._losses.recover(
            "evaluator", 0, "the evaluator", cause, detail=detail, error=error
        )

    def score_if_due(self) -> None:
        """Score the current weights now and then. Those that end the run are its model."""
        if self._ready and self._clock() >= self._next_s and not self._under_way:
            goal = self._policy.stop_at_accuracy
            self._score(math.inf if goal is None else goal)

    def score_last(self, look_after: Callable[[], None]) -> bool:
        """Score the last weights, and keep them. False where a partition was lost meanwhile.

        `look_after` is called while the evaluator is not there.
        """
        self._telemetry.phase = "evaluating"
        before = self._partitions.incarnations
        self.start()  # the run may be over before all of its replicas were up
        while self._under_way:  # of weights that were not the last
            self._tickets.turn(1.0)
        wanted = self._telemetry.num_evaluations + 1
        while self._telemetry.num_evaluations < wanted:
            if before != self._partitions.incarnations:
                return False
            if not self._ready:
                look_after()
            elif not self._under_way:
                self._score(-math.inf)
            self._tickets.turn(1.0)
        return True

    def _score(self, goal: float) -> None:
        """Score the current weights; keep the best, and as the model those that reach `goal`."""
        self._under_way = True
        began_s = self._clock()

        def handle(done: Done) -> None:
            self._under_way = False
            ended_s = self._clock()
            self._next_s = next_evaluation_s(self._policy, began_s, ended_s, self._shortest_s)
            if done.error is not None:
                self._on_error(done.error)
            else:
                self._shortest_s = min(self._shortest_s, ended_s - began_s)
                self._losses.progressed("evaluator")
                self._telemetry.evaluated(done.value)
                self._scored(done.value)

        keeping = Keeping(
            best_path=str(self._folder.path / BEST),
            best=self._telemetry.best_accuracy,
            model_path=str(self._folder.path / MODEL),
            goal=goal,
        )
        self._tickets.expect(self._backend.evaluate(keeping), handle)
