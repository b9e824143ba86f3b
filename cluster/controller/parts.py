"""The data of a run's state: its parts, what belongs to none of them alone, and the invariants.

What changes it is in `reactions` and the modules it calls (to what is heard) and in `stages` (as
time passes). Its door is `state.RunState`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from downpour.cluster.config.derive import step_config
from downpour.cluster.config.run import RunConfig
from downpour.cluster.controller.departures.notice import Notice
from downpour.cluster.controller.failures.account import Failures
from downpour.cluster.controller.failures.policy import FailurePolicy
from downpour.cluster.controller.hangs.patience import Patience, Watch, limits
from downpour.cluster.controller.leases.coverage import Flags
from downpour.cluster.controller.leases.manager import LeaseManager
from downpour.cluster.controller.leases.warm_start import WarmStart
from downpour.cluster.controller.members.checkpointing import CheckpointSchedule
from downpour.cluster.controller.members.evaluation import EvaluationSchedule
from downpour.cluster.controller.members.partitions import Partitions
from downpour.cluster.controller.members.replica_processes import ReplicaProcesses
from downpour.cluster.controller.protocol.instructions import Instruction
from downpour.cluster.run.checkpoint import Checkpoint
from downpour.cluster.run.early_stopping import EarlyStopping, Ended, Scoring, examples_at
from downpour.shuffler.plan.plan import Plan

if TYPE_CHECKING:
    from downpour.workers.actor import Evaluation

LEAST_TRAINING_S = 0.001
"""Training of weights that an update was applied to, if the clocks tell of less."""

Stage = Literal[
    "starting", "resuming", "training", "saving", "reporting", "scoring", "verifying", "ended"
]
"""What the run goes through, in this order. From "saving" on it winds up: a last checkpoint, last
reports and, of a finished run, last scores and a last look at what the partitions cover. If a
partition is lost while a finished run winds up, the run trains again."""


class RunParts:
    """The parts of one session of a run."""

    def __init__(
        self,
        *,
        config: RunConfig,
        plan: Plan,
        num_partitions: int,
        processes: Sequence[tuple[int, ...]],
        run: str,
        now: float,
        began_s: float | None = None,
        resumed: Checkpoint | None = None,
        newest_checkpoint: int = 0,
        followers_before: Sequence[int] = (),
        failure_policy: FailurePolicy | None = None,
        warm_start: WarmStart | None = None,
        early_stopping: EarlyStopping | None = None,
        patience: Patience | None = None,
    ) -> None:
        """Nothing has been started.

        Args:
            config: the run's configuration.
            plan: its mini-batches.
            num_partitions: partitions of the parameter server.
            processes: the replicas of each process.
            run: the path of the run's folder, for messages.
            now: seconds by the run's clock.
            began_s: when the session began, by the same clock; now if None.
            resumed: the checkpoint that the partitions start from, if any.
            newest_checkpoint: the highest number that a checkpoint of the run has had.
            followers_before: see `Followers`.
            failure_policy: decides about failures; by default with the configured bound.
            warm_start: decides how many replicas train; by default as configured.
            early_stopping: decides whether a score ends the run; by default as configured.
            patience: decides whether a wait lasts too long; by default from what waits have taken.
        """
        self.config = config
        self.plan = plan
        self._batches_per_push = step_config(config).batches_per_push
        self.resumed = resumed
        self.began_s = now if began_s is None else began_s
        self.out: list[Instruction] = []
        """What is to be done about the event that is being handled."""
        self.stage: Stage = "starting"
        self.stop_reason: str | None = None
        """Why the run was asked to stop, if it was."""
        self.replicas_wanted = config.replicas.replicas
        """How many there are to be, which people may change."""
        self.quarantined: set[int] = set()
        """Replicas that get no more leases."""
        self.refused: set[tuple[int, int]] = set()
        """Mini-batches, as (epoch, index), that some partition refused."""
        self.num_windows_out = 0
        """Windows that have been sent to replicas, whose calls have not been answered."""
        self.skipped: dict[int, str] = {}
        """Training rows whose image was left out in this session, each with a line on why."""
        self.all_replicas_s: float | None = None
        """When the last process of replicas was ready for the first time."""
        self.look_for_departures_s = now
        """When nodes that are to leave are looked for next."""
        self.notice = Notice()
        """Until when what is out there may be finished."""
        self.shufflers_move = False
        """Shufflers are being started in place of those on such nodes."""
        self.shufflers_stay = False
        """They cannot be: their rows are nowhere else."""
        self.finished = False
        """While the run winds up: it is finished. Otherwise it was asked to stop."""
        self.last_checkpoint_begun = False
        """While the run winds up: so it is."""
        self.covered_before: Sequence[Flags] | None = None
        """While a run that ends early winds up: what its partitions covered before the last
        checkpoint."""
        self.exactly_once = False
        """At the end of a finished run: every partition covers every mini-batch, each once."""
        self.unfinished_epochs: dict[int, int] = {}
        """At the end of a run that ends early: see `RunOutcome`."""
        self.end_wanted: str | None = None
        """Why somebody wants the run to be finished as it stands, if so."""
        self.ended: Ended | None = None
        """Why the run ends early, once it does."""
        self.early_stopping = early_stopping or EarlyStopping(
            config.policy, resumed.scores if resumed else None, config.model.the_task.metric
        )
        policy = failure_policy or FailurePolicy(max_restarts=config.replicas.max_restarts)
        self.patience = patience or Patience(limits(config.policy.hang_after_s))
        self.watch = Watch(self.patience)
        """The calls that are under way."""
        self.failures = Failures(policy, run=run, out=self.out)
        self.leases = LeaseManager(
            plan,
            epochs=config.policy.epochs,
            unit=self._batches_per_push,
            queued_windows=config.replicas.queued_windows,
            warm_start=warm_start or WarmStart(config.replicas, resumed.ramp if resumed else None),
        )
        self.partitions = Partitions(
            num_partitions,
            hot_standby=config.server.hot_standby,
            followers_before=followers_before,
            joins_quietly=bool(config.server.policy.versions_kept),
            failures=self.failures,
            out=self.out,
            now=now,
        )
        self.processes = ReplicaProcesses(
            processes,
            config=config.replicas,
            failures=self.failures,
            partitions=self.partitions,
            leases=self.leases,
            patience=self.patience,
            out=self.out,
        )
        self.evaluation = EvaluationSchedule(
            config.policy,
            failures=self.failures,
            partitions=self.partitions,
            patience=self.patience,
            out=self.out,
            now=now,
            best=self.early_stopping.best,
            metric=config.model.the_task.metric,
        )
        self.checkpoints = CheckpointSchedule(
            config.policy, newest=newest_checkpoint, out=self.out, now=now
        )

    @property
    def winds_up(self) -> bool:
        """Whether the run has stopped training, and has not ended."""
        return self.stage in ("saving", "reporting", "scoring", "verifying")

    @property
    def quiet(self) -> bool:
        """Whether nobody may still push from a window that was lost.

        A process that has lost its connections may. So may one whose window was on its way to it
        when it connected again.
        """
        return self.processes.quiet and not self.num_windows_out

    @property
    def phase(self) -> str:
        """What the run is busy with, for people."""
        if self.stage in ("scoring", "verifying"):
            return "evaluating"
        if self.winds_up:
            return "finishing" if self.finished else "stopping"
        for partition in self.partitions.members:
            if not partition.up and partition.incarnation > 1:
                what = "moving" if partition.index in self.partitions.moving else "replacing"
                return f"{what} {partition.name}"
        some = self.all_replicas_s is not None or self.processes.num_alive(self.replicas_wanted)
        return "training" if some else "starting the replicas"

    def elapsed_s(self, now: float) -> float:
        """Return the seconds since the run began, over all of its sessions."""
        return (self.resumed.elapsed_s if self.resumed else 0.0) + self.wall_s(now)

    def wall_s(self, now: float) -> float:
        """Return the seconds since this session began."""
        return now - self.began_s

    def since_began_s(self, moment_s: float | None) -> float | None:
        """Return the seconds from the session's begin to a moment, if there was one."""
        return None if moment_s is None else self.wall_s(moment_s)

    def training_s(self, now: float) -> float:
        """Return the seconds since the first update, over all sessions of the run."""
        first_s, before_s = self.partitions.first_update_s, self.early_stopping.trained_before_s
        return before_s if first_s is None else before_s + now - first_s

    def scoring(self, evaluation: Evaluation, now: float) -> Scoring:
        """Return what the weights that have just been scored had cost when they were pulled.

        Partitions tell their examples once a second; see `examples_at`.
        """
        version = min(evaluation.versions)
        points = self.partitions.points.get(evaluation.versions.index(version), ((0, 0), (0, 0)))
        per_update = self.plan.batch_size * self._batches_per_push
        examples = examples_at(version, *points, per_update)
        age_s = evaluation.wall_s if evaluation.age_s is None else evaluation.age_s
        # The first update may not have been reported yet, but it was before these weights.
        least_s = self.early_stopping.trained_before_s + (LEAST_TRAINING_S if version else 0.0)
        return Scoring(
            value=evaluation.score.value,
            metric=evaluation.score.metric,
            training_s=round(max(least_s, self.training_s(now) - age_s), 3),
            examples=examples,
            epochs=round(examples / self.plan.num_rows, 4),
        )

    def check(self) -> None:
        """Assert the invariants of all parts, and those between them."""
        self.leases.check()
        self.partitions.check()
        self.processes.check()
        self.evaluation.check()
        self.checkpoints.check()
        if self.stage != "ended":  # a run that is given up ends in the middle of an event
            assert self.num_windows_out >= self.leases.leases.outstanding
        if self.winds_up and self.finished:
            assert self.leases.finished, "a run that is not finished winds up as if it were"
            assert self.partitions.all_up, "a finished run winds up without a partition"
        if not self.partitions.all_up:
            assert not self.checkpoints.in_the_making, "a partition that is lost writes no snapshot"
