"""The evaluator of a run: when it scores the weights, and bringing it back when it is lost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from downpour.cluster.config.policy import PolicyConfig, next_evaluation_s
from downpour.cluster.controller.backend import PartitionLost, ProcessLost, WriteFailed
from downpour.cluster.controller.failure_policy import Action, Cause, Failure
from downpour.cluster.controller.failures import Failures, GaveUp, detail_of
from downpour.cluster.controller.instructions import (
    Evaluate,
    Instruction,
    ReconnectEvaluator,
    StartEvaluator,
    Tell,
    WeightsScored,
)
from downpour.cluster.controller.partitions import Partitions
from downpour.cluster.errors import user_message

if TYPE_CHECKING:
    from downpour.workers.actor import Evaluation


class EvaluationSchedule:
    """The evaluator, the scoring that is under way, and the scores so far."""

    def __init__(
        self,
        policy: PolicyConfig,
        *,
        failures: Failures,
        partitions: Partitions,
        out: list[Instruction],
        now: float,
        best_accuracy: float | None,
    ) -> None:
        """The evaluator has not been started. It reads the weights of `partitions`.

        `best_accuracy` is that of earlier sessions.
        """
        self._policy = policy
        self._failures = failures
        self._partitions = partitions
        self._out = out
        self._started = self._runs = False
        self._next_s = now
        self._shortest_s = math.inf
        self._began_s: float | None = None
        """When the scoring under way began."""
        self._final_due = False
        """The run's last weights have yet to be scored."""
        self.ready = False
        """It is connected."""
        self.newest: Evaluation | None = None
        """The newest evaluation."""
        self.best_accuracy = best_accuracy
        """The highest accuracy so far."""

    @property
    def accuracy(self) -> float | None:
        """Accuracy of the newest evaluation."""
        return self.newest.score.accuracy if self.newest else None

    @property
    def cut_off(self) -> bool:
        """Whether the evaluator runs without its connections."""
        return self._runs and not self.ready

    def start(self) -> None:
        """Start the evaluator, unless that has been done."""
        if not self._started:
            self._started = True
            self._connect(StartEvaluator())

    def connected(self) -> None:
        """The evaluator can read the weights."""
        self.ready = self._runs = True

    def disconnected(self) -> None:
        """A partition is lost, and with it the evaluator's connections."""
        self.ready = False

    def reconnect(self) -> None:
        """Connect the evaluator again, if it runs and lacks its connections."""
        if self.cut_off:
            self._connect(ReconnectEvaluator())

    def _connect(self, call: StartEvaluator | ReconnectEvaluator) -> None:
        self._runs = self.ready = False
        self._out.append(call)

    # Scoring

    def score_if_due(self, now: float) -> None:
        """Score the current weights now and then. Those that end the run are its model."""
        if self.ready and now >= self._next_s and self._began_s is None:
            goal = self._policy.stop_at_accuracy
            self._score(math.inf if goal is None else goal, now, final=False)

    def begin_final(self) -> None:
        """The weights are the run's last: score them, and keep them as its model."""
        self._final_due = True
        self.start()  # the run may be over before all of its replicas were up

    def score_final(self, now: float) -> bool:
        """Go on with scoring the last weights; return whether that has been done."""
        if self._final_due and self.ready and self._began_s is None:
            self._score(-math.inf, now, final=True)
        return not self._final_due

    def scored(self, call: Evaluate, evaluation: Evaluation, now: float) -> None:
        """The weights were scored."""
        began_s = self._end_scoring(now)
        self._shortest_s = min(self._shortest_s, now - began_s)
        self._failures.policy.progressed("evaluator")
        self.newest = evaluation
        self.best_accuracy = max(self.best_accuracy or 0.0, evaluation.score.accuracy)
        if call.final:
            self._final_due = False
        self._out.append(WeightsScored(evaluation=evaluation))

    def score_failed(self, error: Exception, now: float) -> None:
        """The weights could not be scored, or not be kept."""
        self._end_scoring(now)
        self.failed(error, now)

    def _score(self, goal: float, now: float, *, final: bool) -> None:
        self._began_s = now
        self._out.append(Evaluate(best=self.best_accuracy, goal=goal, final=final))

    def _end_scoring(self, now: float) -> float:
        assert self._began_s is not None, "no scoring is under way"
        began_s, self._began_s = self._began_s, None
        self._next_s = next_evaluation_s(self._policy, began_s, now, self._shortest_s)
        return began_s

    # Failures

    def failed(self, error: Exception, now: float) -> None:
        """The evaluator could not do what it was asked for."""
        self.ready = False
        if isinstance(error, WriteFailed):
            self.ready = True
            text = f"the best weights could not be written ({error}): going on"
            self._out.append(Tell(text=text))
        elif isinstance(error, PartitionLost):
            self._runs = True
            self._partitions.ask_reports_now(now)
            if self._partitions.all_up:
                action = self._recover("disconnected", now, detail=str(error))
                if action != "reconnect":
                    self._connect(StartEvaluator())
        elif isinstance(error, ProcessLost):
            self._recover("died", now)
            self._connect(StartEvaluator())
        elif user_message(error) is not None:
            raise GaveUp(error)
        else:
            self._recover("failed", now, detail=detail_of(error), error=error)
            self._connect(StartEvaluator())

    def _recover(
        self, cause: Cause, now: float, *, detail: str = "", error: Exception | None = None
    ) -> Action:
        failure = Failure(part="evaluator", name="the evaluator", cause=cause, detail=detail)
        return self._failures.recover(failure, now, error=error)

    def check(self) -> None:
        """Assert that an evaluator that is connected runs."""
        assert self._started or not (self.ready or self._runs or self._began_s is not None)
        assert self._runs or not self.ready
