"""The evaluator of a run: when it scores the weights, and bringing it back when it is lost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from downpour.cluster.config.policy import PolicyConfig, next_evaluation_s
from downpour.cluster.controller.failures.account import Failures, GaveUp, detail_of
from downpour.cluster.controller.failures.policy import Cause, Failure, Recovery
from downpour.cluster.controller.hangs.patience import Patience
from downpour.cluster.controller.members.partitions import Partitions
from downpour.cluster.controller.protocol.backend import PartitionLost, ProcessLost, WriteFailed
from downpour.cluster.controller.protocol.instructions import (
    AskProgress,
    Evaluate,
    Instruction,
    ReconnectEvaluator,
    StartEvaluator,
    Tell,
    WeightsScored,
)
from downpour.cluster.errors import user_message
from downpour.workers.tasks import ACCURACY, Figure, goodness

if TYPE_CHECKING:
    from downpour.workers.actor import Evaluation

LOOK_EVERY_S = 5.0
"""How often an evaluator that scores is asked how far it is."""
TRY_AGAIN_S = 10.0
"""After so long, the run's last weights are scored again if they could not be written."""
MAX_TRIES = 60
"""So often, which is ten minutes: somebody may make room."""


class EvaluationSchedule:
    """The evaluator, the scoring that is under way, and the scores so far."""

    def __init__(
        self,
        policy: PolicyConfig,
        *,
        metric: str = ACCURACY,
        failures: Failures,
        partitions: Partitions,
        patience: Patience,
        out: list[Instruction],
        now: float,
        best: Figure | None,
    ) -> None:
        """The evaluator has not been started. It reads the weights of `partitions`.

        `metric` is the figure that the policy's goal is of.

        `best` is that of earlier sessions.
        """
        self._policy = policy
        goal = policy.goal
        self._goal = math.inf if goal is None else goodness(metric, goal)
        self._failures = failures
        self._partitions = partitions
        self._patience = patience
        self._out = out
        self._started = self._runs = False
        self._next_s = now
        self._shortest_s = math.inf
        self._began_s: float | None = None
        """When the scoring under way began."""
        self.life = 0
        """How often it has hung or moved."""
        self._progress = 0
        self._alive_s = now
        """When the scoring under way was last seen to get on."""
        self._late_looks = 0
        self._asked = False
        """It has been asked how far it is, and has not answered."""
        self._next_look_s = now
        self._leaving = False
        """Its node is to leave."""
        self._final_due = False
        """The run's last weights have yet to be scored."""
        self._final_tries = 0
        """How often they could not be written."""
        self._next_final_s = now
        self.ready = False
        """It is connected."""
        self.newest: Evaluation | None = None
        """The newest evaluation."""
        self.best = best
        """The best figure so far: the accuracy, or that of the task."""

    @property
    def figure(self) -> Figure | None:
        """The figure of the newest evaluation."""
        return self.newest.score.figure if self.newest else None

    @property
    def is_starting(self) -> bool:
        """Whether it is being started, or connected again."""
        return self._started and not self._runs

    @property
    def cut_off(self) -> bool:
        """Whether the evaluator runs without its connections."""
        return self._runs and not self.ready

    def start(self) -> None:
        """Start the evaluator, unless that has been done."""
        if not self._started:
            self._started = True
            self._connect(StartEvaluator(life=self.life))

    def connected(self) -> None:
        """The evaluator can read the weights."""
        self.ready = self._runs = True

    def disconnected(self) -> None:
        """A partition is lost, and with it the evaluator's connections."""
        self.ready = False

    def reconnect(self) -> None:
        """Connect the evaluator again, if it runs and lacks its connections."""
        if self.cut_off:
            self._connect(ReconnectEvaluator(life=self.life))

    def _connect(self, call: StartEvaluator | ReconnectEvaluator) -> None:
        self._runs = self.ready = False
        self._out.append(call)

    # Scoring

    def score_if_due(self, now: float) -> None:
        """Score the current weights now and then. Those that end the run are its model."""
        due = now >= self._next_s and self._began_s is None
        if self.ready and due and not self._leaving:
            self._score(self._goal, now, final=False)

    def begin_final(self) -> None:
        """The weights are the run's last: score them, and keep them as its model."""
        self._final_due = True
        self.start()  # the run may be over before all of its replicas were up

    def score_final(self, now: float) -> bool:
        """Go on with scoring the last weights; return whether that has been done."""
        due = self._final_due and now >= self._next_final_s
        if due and self.ready and self._began_s is None:
            self._score(-math.inf, now, final=True)
        return not self._final_due

    def scored(self, call: Evaluate, evaluation: Evaluation, now: float) -> None:
        """The weights were scored."""
        began_s = self._end_scoring(now)
        self._shortest_s = min(self._shortest_s, now - began_s)
        self._failures.policy.progressed("evaluator")
        self.newest = evaluation
        if evaluation.score.figure.beats(self.best):
            self.best = evaluation.score.figure
        if call.final:
            self._final_due = False
        self._out.append(WeightsScored(evaluation=evaluation))

    def score_failed(self, call: Evaluate, error: Exception, now: float) -> None:
        """The weights could not be scored, or not be kept.

        Raises:
            GaveUp: The run's last weights cannot be written.
        """
        self._end_scoring(now)
        if call.final and isinstance(error, WriteFailed):
            self._wait_for_room(error, now)
        else:
            self.failed(error, now)

    def _wait_for_room(self, error: WriteFailed, now: float) -> None:
        """The run's last weights were scored, and could not be written: try again later."""
        self._final_tries += 1
        self._next_final_s = now + TRY_AGAIN_S
        what = f"the run's last weights could not be written ({error})"
        if self._final_tries == MAX_TRIES:
            raise self._failures.given_up(f"{what}, {MAX_TRIES} times", error)
        if self._final_tries == 1:
            minutes = MAX_TRIES * TRY_AGAIN_S / 60
            text = f"{what}: make room; trying every {TRY_AGAIN_S:.0f} s for {minutes:.0f} minutes"
            self._out.append(Tell(text=text))

    def _score(self, goal: float, now: float, *, final: bool) -> None:
        self._began_s = self._alive_s = now
        self._late_looks = 0
        best = None if self.best is None else self.best.goodness
        self._out.append(Evaluate(best=best, goal=goal, final=final, life=self.life))

    def _end_scoring(self, now: float) -> float:
        assert self._began_s is not None, "no scoring is under way"
        began_s, self._began_s = self._began_s, None
        self._next_s = next_evaluation_s(self._policy, began_s, now, self._shortest_s)
        return began_s

    # Departures

    def depart(self, departing: bool) -> None:
        """Note whether its node is to leave."""
        self._leaving = departing

    def move(self, now: float, *, over: bool) -> None:
        """Start it elsewhere if its node is to leave, once it has scored what it scores.

        If the time for that is `over`, the other scores the weights from the beginning.
        """
        if not self._leaving or not self._runs or (self._began_s is not None and not over):
            return
        self._leaving = False
        self.life += 1
        self._asked = False
        if self._began_s is not None:
            self._end_scoring(now)
            self._next_s = now
        self._out.append(Tell(text="the evaluator moves: its node is to leave"))
        self._connect(StartEvaluator(life=self.life))

    # Hangs

    def look_for_hang(self, now: float) -> None:
        """While weights are scored: ask how far that is, and replace an evaluator that hangs.

        Raises:
            GaveUp: it has hung too often.
        """
        if self._began_s is None or now < self._next_look_s:
            return
        self._next_look_s = now + LOOK_EVERY_S
        why = self._patience.lost("scoring", now - self._alive_s, now)
        self._late_looks = 0 if why is None else self._late_looks + 1
        if why is not None and self._late_looks > 1:  # an answer that was there has been heard
            self._patience.gave_up("scoring")
            self.hung(why, now)
        elif not self._asked:
            self._asked = True
            self._out.append(AskProgress(life=self.life))

    def progressed(self, progress: int, now: float) -> None:
        """The evaluator says how far it is."""
        self._asked = False
        if progress != self._progress:
            self._progress = progress
            waited_s = now - self._alive_s - LOOK_EVERY_S  # nobody waits between two looks
            self._patience.took("scoring", max(0.0, waited_s), now)
            self._alive_s, self._late_looks = now, 0

    def forgive(self, seconds: float) -> None:
        """Nobody has looked for progress for so long."""
        self._alive_s += seconds

    def progress_failed(self) -> None:
        """It cannot say so: what it was asked to do will tell why."""
        self._asked = False

    def hung(self, why: str, now: float) -> None:
        """The evaluator hangs: it is ended, and another takes its place.

        Raises:
            GaveUp: it has hung too often.
        """
        self.life += 1
        self._asked = False
        if self._began_s is not None:
            self._end_scoring(now)
        self._recover("silent", now, detail=why)
        self._connect(StartEvaluator(life=self.life))

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
                recovery = self._recover("disconnected", now, detail=str(error))
                if recovery.action != "reconnect":
                    self._connect(StartEvaluator(life=self.life))
        elif isinstance(error, ProcessLost):
            self._recover("died", now)
            self._connect(StartEvaluator(life=self.life))
        elif user_message(error) is not None:
            raise GaveUp(error)
        else:
            self._recover("failed", now, detail=detail_of(error), error=error)
            self._connect(StartEvaluator(life=self.life))

    def _recover(
        self, cause: Cause, now: float, *, detail: str = "", error: Exception | None = None
    ) -> Recovery:
        failure = Failure(part="evaluator", name="the evaluator", cause=cause, detail=detail)
        return self._failures.recover(failure, now, error=error)

    def check(self) -> None:
        """Assert that an evaluator that is connected runs."""
        assert self._started or not (self.ready or self._runs or self._began_s is not None)
        assert self._runs or not self.ready
