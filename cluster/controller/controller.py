"""The controller: the loop of a run. It decides nothing.

It hands events to the run's state (`state`), carries the instructions out against the `Backend`,
the checkpoint store and the run's folder, and lets a listener look on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from downpour.cluster.config.run import RunConfig
from downpour.cluster.controller.protocol import events
from downpour.cluster.controller.protocol import instructions as do
from downpour.cluster.controller.protocol.backend import Backend, Done, PendingCall, RunFailed
from downpour.cluster.controller.state import RunState
from downpour.cluster.run.checkpoint import Checkpoint, CheckpointStore
from downpour.cluster.run.folder import ANSWERS, BEST, MODEL, RunFolder
from downpour.shuffler.plan.plan import Plan
from downpour.workers.messages import Keeping

ASKED = "downpour stop"
"""The reason of a stop that was asked for through the run's folder."""
TURN_S = 0.25
"""Something may be due after so long, even if no call is answered."""
HURRY_S = 0.05
"""The same while it is to be decided whether a partition is lost: everybody waits for that."""
STILL_S = 2.0
"""A turn that takes longer than this is one in which the driver stood still."""


class RunListener(Protocol):
    """Looks on at a run. It may read the state, and must not change it."""

    def note(self, note: do.Note, state: RunState, now: float) -> None:
        """Something has happened, and the state has been changed by it."""

    def look(self, state: RunState, now: float) -> None:
        """All that has happened until `now` is in the state. Called at every turn."""


class Controller:
    """Runs one training run on a backend."""

    def __init__(
        self,
        *,
        config: RunConfig,
        plan: Plan,
        backend: Backend,
        folder: RunFolder,
        store: CheckpointStore,
        listener: RunListener,
        resumed: Checkpoint | None = None,
        followers_before: Sequence[int] = (),
        clock: Callable[[], float] = time.monotonic,
        began_s: float | None = None,
    ) -> None:
        """Make the run's state; nothing is started.

        Args:
            config: the run's configuration.
            plan: its mini-batches.
            backend: what runs the actors.
            folder: the run's folder.
            store: its checkpoints.
            listener: is told what happens.
            resumed: the checkpoint that the partitions start from, if any.
            followers_before: see `Followers`.
            clock: seconds from some moment on.
            began_s: when the command began, by `clock`; now if None.
        """
        self._backend = backend
        self._folder = folder
        self._store = store
        self._keep = (config.policy.keep_checkpoints, config.policy.keep_best_checkpoints)
        self._listener = listener
        self._resumed = resumed
        self._clock = clock
        self._stop_requested: str | None = None
        self._pending: dict[PendingCall, do.Call] = {}
        """What the backend has been asked and has not answered yet."""
        self._events: deque[events.Event] = deque()
        """Events that have yet to be handed in."""
        self.state = RunState(
            config=config,
            plan=plan,
            num_partitions=backend.num_partitions,
            processes=backend.processes,
            run=str(folder.path),
            now=clock(),
            began_s=began_s,
            resumed=resumed,
            followers_before=followers_before,
            newest_checkpoint=max([0, *store.numbers()]),
        )

    def request_stop(self, reason: str) -> None:
        """Ask `run` to write a checkpoint and return. Safe to call from a signal handler."""
        self._stop_requested = reason

    def request_end(self, reason: str) -> None:
        """Ask `run` to finish the run as it stands, as if its last epoch were over.

        The listener may ask, too: it happens before anything else.
        """
        self._events.appendleft(events.EndRequested(reason=reason))

    @property
    def stop_reason(self) -> str | None:
        """Why the run was asked to stop, if it was."""
        return self.state.stop_reason

    def run(self) -> do.RunOutcome:
        """Train until every epoch is complete, the run has arrived, or it is asked to stop.

        Raises:
            RunFailed: the run cannot go on by itself.
            Exception: an error of the user's that an actor met.
        """
        self._events.append(events.Begin())
        turn_s = self._clock()
        while True:
            outcome = self._hand_in_all()
            if outcome is not None:
                return outcome
            self._listener.look(self.state, self._clock())
            for done in self._wait(turn_s):
                call = self._pending.pop(done.call)
                if done.error is None:
                    self._events.append(events.Answered(call=call, value=done.value))
                else:
                    self._events.append(events.Failed(call=call, error=done.error))
            if self._stop_requested is not None:
                self._events.append(events.StopRequested(reason=self._stop_requested))
            self._events.append(events.Tick())
            turn_s = self._clock()

    def _wait(self, turn_s: float) -> list[Done]:
        """Wait for answers, at most one turn; `turn_s` is when this turn began."""
        most_s = HURRY_S if self.state.partitions.followers.suspected else TURN_S
        found = self._backend.wait(list(self._pending), most_s)
        took_s = self._clock() - turn_s
        if took_s > STILL_S:
            self._events.appendleft(events.StoodStill(seconds=took_s - TURN_S))
        return found

    def _hand_in_all(self) -> do.RunOutcome | None:
        """Hand all events in, and carry out what comes of them, until nothing more does."""
        while self._events:
            event, now = self._events.popleft(), self._clock()
            for instruction in self.state.handle(event, now):
                match instruction:
                    case do.Finish():
                        return instruction.outcome
                    case do.GiveUp():
                        raise instruction.error from instruction.cause
                    case (
                        do.Tell()
                        | do.WindowTrained()
                        | do.AllReported()
                        | do.WeightsScored()
                        | do.CheckpointFinished()
                    ):
                        self._listener.note(instruction, self.state, now)
                    case _:
                        self._carry_out(instruction)
        return None

    def _carry_out(self, instruction: do.Instruction) -> None:
        backend = self._backend
        match instruction:
            case do.StartPartition() as call:
                self._start_partition(call)
            case do.Promote() as call:
                self._expect(call, backend.promote(call.partition))
            case do.LetAlone() as call:
                self._expect(call, backend.let_alone(call.partition, call.follower))
            case do.AskReport() as call:
                self._expect(call, backend.report(call.partition))
            case do.AskFlags() as call:
                self._expect(call, backend.flags(call.partition, call.epochs))
            case do.WriteSnapshot() as call:
                self._expect(call, backend.snapshot(call.partition, call.folder_uri))
            case do.StartFollower() as call:
                self._expect(call, backend.start_follower(call.partition, call.start))
            case do.WatchPrimary() as call:
                self._expect(call, backend.watch_primary(call.partition))
            case do.StartProcess() as call:
                self._expect(call, backend.start_process(call.process))
            case do.ReconnectProcess() as call:
                self._expect(call, backend.reconnect_process(call.process))
            case do.RunWindow() as call:
                self._expect(call, backend.run_window(call.replica, call.lease))
            case do.AskDepartures() as call:
                self._events.append(events.Answered(call=call, value=backend.departing()))
            case do.FindLateShufflers() as call:
                self._events.append(events.Answered(call=call, value=self._find_late(call)))
            case do.ReplaceShufflers() as call:
                self._events.append(events.Answered(call=call, value=backend.replace_shufflers()))
            case do.MoveShufflers() as call:
                try:
                    self._expect(call, backend.move_shufflers())
                except RunFailed as error:
                    self._events.append(events.Failed(call=call, error=error))
            case do.StartEvaluator() as call:
                self._expect(call, backend.start_evaluator())
            case do.ReconnectEvaluator() as call:
                self._expect(call, backend.reconnect_evaluator())
            case do.Evaluate() as call:
                self._expect(call, backend.evaluate(self._keeping(call)))
            case do.AskProgress() as call:
                self._expect(call, backend.evaluator_progress())
            case do.BeginCheckpoint() as call:
                self._try(call, self._store.begin, call.number)
            case do.CommitCheckpoint() as call:
                self._try(call, self._store.commit, call.checkpoint)
            case do.PruneCheckpoints() as call:
                self._try(call, self._store.prune, *self._keep)
            case do.DiscardCheckpoint():
                self._store.discard(instruction.number)
            case do.StopFollower():
                backend.stop_follower(instruction.partition)
            case do.AddProcess():
                index = backend.add_process(instruction.replicas)
                assert index == instruction.process, "the backend counts processes otherwise"
            case do.StopProcess():
                backend.stop_process(instruction.process)
            case do.MakeSpares():
                backend.make_spares()
            case do.ReadRequests():
                self._read_requests()

    def _expect(self, call: do.Call, pending: PendingCall) -> None:
        self._pending[pending] = call

    def _try(self, call: do.Call, work: Callable[..., Any], *arguments: object) -> None:
        """Do what is done at once, and fails if the disk is full or gone."""
        try:
            self._events.append(events.Answered(call=call, value=work(*arguments)))
        except OSError as error:
            self._events.append(events.Failed(call=call, error=error))

    def _find_late(self, call: do.FindLateShufflers) -> int:
        late = [pending for pending, of in self._pending.items() if of in call.windows]
        return sum(self._backend.find_late_shufflers(pending) for pending in late)

    def _start_partition(self, call: do.StartPartition) -> None:
        checkpoint = self._resumed
        if call.again:
            checkpoint, passed = self._store.latest_for(call.partition)
            for problem in passed:
                self._tell(f"{problem}; taking the one before")
            start = f"checkpoint {checkpoint.number}" if checkpoint else "the initial weights"
            self._tell(f"partition {call.partition} starts again from {start}")
        self._expect(call, self._backend.start_partition(call.partition, checkpoint))

    def _keeping(self, call: do.Evaluate) -> Keeping:
        return Keeping(
            best_path=str(self._folder.path / BEST),
            best=call.best,
            model_path=str(self._folder.path / MODEL),
            answers_path=str(self._folder.path / ANSWERS),
            goal=call.goal,
        )

    def _tell(self, text: str) -> None:
        self._listener.note(do.Tell(text=text), self.state, self._clock())

    def _read_requests(self) -> None:
        wanted = self._folder.replicas_asked_for()
        if wanted is not None:
            self._events.append(events.ReplicasRequested(replicas=wanted))
        if self._folder.stop_requested():
            self._events.append(events.StopRequested(reason=ASKED))
