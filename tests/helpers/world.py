"""A run without threads, actors or clocks: the state, and a world that answers its calls.

The world keeps what partitions cover as arrays, and answers one call at a time. `answer_all` does
it in order. `step` takes any of the calls, and things die meanwhile, by the draws of a seed. The
invariants of the state are checked after every event. A member that hangs answers nothing until it
is replaced, which fails what it had been asked.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from downpour.cluster.config.run import RunConfig
from downpour.cluster.controller.departures.notice import Departing
from downpour.cluster.controller.protocol import events
from downpour.cluster.controller.protocol import instructions as do
from downpour.cluster.controller.protocol.backend import (
    FollowerLost,
    PartitionLost,
    ProcessLost,
    ShufflerLost,
)
from downpour.cluster.controller.state import RunState
from downpour.paramserver.actor import PartitionReport
from downpour.paramserver.partition.applied_set import APPLIED, REFUSED, WAITING
from downpour.paramserver.partition.ranges import split
from downpour.paramserver.partition.snapshot import SnapshotFile
from downpour.paramserver.standby.trouble import Trouble
from downpour.paramserver.transport.endpoint import Endpoint, NetworkAddress
from downpour.workers.actor import Evaluation
from downpour.workers.evaluation.evaluator import Score
from downpour.workers.replica.replicas import ReplicaFailed, WindowReport
from tests.helpers import tiny
from tests.helpers.plans import RememberedPlan

PLAN = RememberedPlan(num_rows=43, batch_size=4, seed=5, window_batches=4, past_bound="rekey")
"""11 mini-batches, 3 windows."""
C = TypeVar("C")


def configured(**about: Any) -> RunConfig:
    """A run of two epochs; `about` goes to `ReplicaConfig`, and `policy` and `server` to theirs."""
    policy, server = about.pop("policy", {}), about.pop("server", {})
    plain = tiny.config("nowhere", replicas=about.pop("replicas", 4), checkpoint_every_s=1e9)
    return dataclasses.replace(
        plain,
        replicas=dataclasses.replace(plain.replicas, **about),
        policy=dataclasses.replace(plain.policy, **policy),
        server=dataclasses.replace(plain.server, **server),
    )


class Hangs(Exception):
    """Whoever was asked does not answer."""


class Later(Exception):
    """Whoever was asked answers once something else has happened."""


class PartitionWorld:
    """What one partition covers, by epoch."""

    def __init__(self, index: int, epochs: int) -> None:
        self.index = index
        self.flags = np.full((epochs, PLAN.num_batches), WAITING, np.uint8)
        self.saved: dict[int, NDArray[np.uint8]] = {0: self.flags.copy()}
        """Its snapshots, by the checkpoint's number."""
        self.alive = False
        self.hangs = False
        self.quarantined: tuple[int, ...] = ()
        self.latest_follower = 0
        """The number of the follower that was started last."""
        self.follower: int | None = None
        """Of a follower on another machine that it waits for."""
        self.waits_for_word: int | None = None
        """Of one that it has lost: it answers nobody."""

    def be_another(self) -> None:
        """Be another process, which has no follower."""
        self.alive, self.hangs = True, False
        self.follower = self.waits_for_word = None

    def report(self, has_follower: bool) -> PartitionReport:
        by_epoch = (self.flags == APPLIED).sum(axis=1)
        applied = int(by_epoch.sum())
        return PartitionReport(
            index=self.index,
            version=applied,
            examples=int(np.minimum(PLAN.num_rows, PLAN.batch_size * by_epoch).sum()),
            rate=0.1,
            batches_applied=applied,
            refused=int((self.flags == REFUSED).sum()),
            duplicates=0,
            dropped=0,
            malformed=0,
            staleness={},
            refusals={},
            quarantined=self.quarantined,
            drift=0.0,
            connections=1,
            connections_closed={},
            first_update_age_s=1.0 if applied else None,
            last_update_age_s=0.0 if applied else None,
            updates_before=0,
            has_follower=has_follower,
            waits_for_word=self.waits_for_word,
        )


class World:
    """A run, and all that it talks to."""

    def __init__(
        self,
        config: RunConfig | None = None,
        *,
        num_partitions: int = 2,
        processes: tuple[tuple[int, ...], ...] = ((0, 1), (2, 3)),
        seed: int = 0,
        remote: bool = False,
        **about: Any,
    ) -> None:
        self.remote = remote
        """Whether followers are on other machines."""
        self.words: set[tuple[int, int]] = set()
        """Followers, as (partition, number), that will not take over, as partitions were told."""
        self.promoted: set[tuple[int, int]] = set()
        self.config = config or configured()
        self.rng = random.Random(seed)
        self.now = 0.0
        epochs = self.config.policy.epochs
        self.partitions = [PartitionWorld(i, epochs) for i in range(num_partitions)]
        self.processes = list(processes)
        self.state = RunState(
            config=self.config,
            plan=PLAN,
            num_partitions=num_partitions,
            processes=processes,
            run="runs/a",
            now=0.0,
            **about,
        )
        self.pending: list[do.Call] = []
        self.given: list[do.Instruction] = []
        """Instructions that no call is made by, since `taken` last looked."""
        self.committed: list[int] = []
        self.shufflers_dead = 0
        self.dead_processes: set[int] = set()
        self.hung_processes: set[int] = set()
        self.departing: set[int] = set()
        """Processes whose nodes are to leave."""
        self.leaving = Departing()
        """What else is on such nodes, and how long they stay."""
        self.followers_fail = False
        """A follower that is started, or takes over, dies."""
        self.trained: Counter[tuple[int, int]] = Counter()
        """How often each mini-batch was computed, by (epoch, index)."""
        self.shufflers_hang = self.evaluator_hangs = self.disk_hangs = False
        self.scored = 0
        """Mini-batches that the evaluator has scored."""
        self.unanswered: list[do.Call] = []
        """Asked of members that hang."""
        self.loss: float | None = 1.0
        self.accuracy = 0.5

    # Handing in

    def hand_in(self, event: events.Event) -> None:
        for instruction in self.state.handle(event, self.now):
            if isinstance(instruction, do.Call):
                self._note_standby(instruction)
                self.pending.append(instruction)
            else:
                self._note(instruction)
        self.state.check()

    def _note_standby(self, call: do.Call) -> None:
        """Of one follower, either it takes over or its partition goes on alone, and never both."""
        match call:
            case do.StartFollower():
                self.partitions[call.partition].latest_follower = call.start
            case do.Promote():
                follower = self.partitions[call.partition].latest_follower
                self.promoted.add((call.partition, follower))
            case do.LetAlone():
                self.words.add((call.partition, call.follower))
        assert not self.words & self.promoted

    def _note(self, instruction: do.Instruction) -> None:
        self.given.append(instruction)
        if isinstance(instruction, do.AddProcess):
            assert instruction.process == len(self.processes)
            self.processes.append(instruction.replicas)
        elif isinstance(instruction, do.StopFollower):
            self.cut(instruction.partition)
            followers = tuple(p for p in self.leaving.followers if p != instruction.partition)
            self.leaving = dataclasses.replace(self.leaving, followers=followers)

    def tick(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.hand_in(events.Tick())

    def begin(self) -> None:
        self.hand_in(events.Begin())

    # Looking

    def calls(self, kind: type[C]) -> list[C]:
        """Calls of a kind that have not been answered."""
        return [call for call in self.pending if isinstance(call, kind)]

    def taken(self, kind: type[C]) -> list[C]:
        """Instructions of a kind, and no call, since the last look."""
        found = [given for given in self.given if isinstance(given, kind)]
        self.given = [given for given in self.given if not isinstance(given, kind)]
        return found

    def told(self) -> str:
        """News since the last look."""
        return "\n".join(news.text for news in self.taken(do.Tell))

    @property
    def outcome(self) -> do.RunOutcome | None:
        return next((g.outcome for g in self.given if isinstance(g, do.Finish)), None)

    @property
    def error(self) -> Exception | None:
        return next((g.error for g in self.given if isinstance(g, do.GiveUp)), None)

    def flags(self) -> list[NDArray[np.uint8]]:
        return [p.flags for p in self.partitions]

    # Answering

    def fail(self, call: do.Call, error: Exception) -> None:
        self.pending.remove(call)
        self.hand_in(events.Failed(call=call, error=error))

    def answer(self, call: do.Call) -> None:
        """Do what a call asks for, and answer it."""
        self.pending.remove(call)
        try:
            value = self._done(call)
        except Hangs:
            self.unanswered.append(call)
        except Later:
            self.pending.append(call)
        except (FollowerLost, PartitionLost, ProcessLost, ShufflerLost) as error:
            self.hand_in(events.Failed(call=call, error=error))
        else:
            self.hand_in(events.Answered(call=call, value=value))

    def answer_all(self, kind: type[Any] = object) -> None:
        """Answer all calls of a kind, and those that follow, in their order."""
        while calls := self.calls(kind):
            self.answer(calls[0])

    def answer_present(self) -> None:
        """Answer all that is under way now, in its order."""
        for call in list(self.pending):
            if call in self.pending:  # it may have failed with another's end
                self.answer(call)

    def go_on(self, until: Callable[[], bool], turns: int = 500) -> None:
        """Answer everything, turn by turn."""
        for _ in range(turns):
            if until():
                return
            self.answer_present()
            self.tick(1.0)
        raise AssertionError("it has not come to that")

    def train(self) -> None:
        """Begin, and go on until all replicas have been leased windows."""
        self.begin()
        wanted = len(self.processes)
        self.answer_all(do.StartPartition)
        self.tick()
        self.answer_all(do.StartProcess)
        assert all(p.ready for p in self.state.processes.members), wanted
        self.tick()

    def _done(self, call: do.Call) -> Any:
        match call:
            case do.StartPartition():
                self._restart(call)
                return None
            case do.Promote() | do.LetAlone() | do.AskReport() | do.AskFlags() | do.WriteSnapshot():
                return self._asked(call)
            case do.StartFollower() if self.followers_fail:
                raise FollowerLost("it died")
            case do.StartFollower() if self.remote:
                return self._follow(call)
            case do.WatchPrimary():
                partition = self.partitions[call.partition]
                if partition.alive and not partition.hangs and partition.follower == call.start:
                    raise Later
                return Trouble(kind="silent", why="it is silent")
            case do.RunWindow():
                return self._window(call)
            case do.StartProcess():
                self.dead_processes.discard(call.process)
                self.hung_processes.discard(call.process)
                self.departing.discard(call.process)
                self._kill_unanswered(
                    lambda c: self._is_of_process(c, call.process), ProcessLost("it was killed")
                )
                self._connect(call.process)
                return None
            case do.ReconnectProcess():
                if call.process in self.dead_processes:
                    raise ProcessLost("it is dead")
                if call.process in self.hung_processes:
                    raise Hangs
                self._connect(call.process)
                return None
            case do.AskDepartures():
                return dataclasses.replace(self.leaving, processes=tuple(self.departing))
            case do.MoveShufflers():
                count = self.leaving.shufflers
                self.leaving = dataclasses.replace(self.leaving, shufflers=0)
                return count
            case do.FindLateShufflers():
                return int(self.shufflers_hang and bool(call.windows))
            case do.ReplaceShufflers():
                count, self.shufflers_dead = self.shufflers_dead, 0
                if self.shufflers_hang:
                    count, self.shufflers_hang = 1, False
                    self._kill_unanswered(
                        lambda c: isinstance(c, do.RunWindow) and not self._hung(c.replica),
                        ShufflerLost("it was killed"),
                    )
                return count
            case do.BeginCheckpoint():
                return f"somewhere/{call.number}"
            case do.CommitCheckpoint():
                self.committed.append(call.checkpoint.number)
                return None
            case do.Evaluate():
                if self.evaluator_hangs:
                    raise Hangs
                self.scored += 1
                self._needs_all()
                versions = tuple(p.report(False).version for p in self.partitions)
                score = Score(accuracy=self.accuracy, loss=1.0, num_examples=10)
                return Evaluation(versions=versions, score=score, wall_s=0.1)
            case do.AskProgress():
                if self.evaluator_hangs:
                    raise Hangs
                return self.scored
            case do.StartEvaluator() | do.ReconnectEvaluator() | do.StartFollower():
                if isinstance(call, do.StartEvaluator):
                    self.evaluator_hangs = False
                    self.leaving = dataclasses.replace(self.leaving, evaluator=False)
                    self._kill_unanswered(
                        lambda c: isinstance(c, do.Evaluate | do.AskProgress),
                        ProcessLost("it was killed"),
                    )
                self._needs_all()
                return None
            case do.PruneCheckpoints():
                return None

    def _hung(self, replica: int) -> bool:
        process = next(i for i, of in enumerate(self.processes) if replica in of)
        return process in self.hung_processes

    def _is_of_process(self, call: do.Call, process: int) -> bool:
        match call:
            case do.RunWindow():
                return call.replica in self.processes[process]
            case do.ReconnectProcess():
                return call.process == process
        return False

    def _kill_unanswered(self, killed: Callable[[do.Call], bool], error: Exception) -> None:
        """What was asked of a member that hung fails when it is killed."""
        failed = [call for call in self.unanswered if killed(call)]
        self.unanswered = [call for call in self.unanswered if call not in failed]
        for call in failed:
            self.hand_in(events.Failed(call=call, error=error))

    def _needs_all(self) -> None:
        for partition in self.partitions:
            if not partition.alive:
                raise PartitionLost(f"partition {partition.index} is out of reach")

    def _is_now(self, call: do.PartitionCall) -> bool:
        return self.state.partitions.members[call.partition].incarnation == call.incarnation

    def _restart(self, call: do.StartPartition) -> None:
        partition = self.partitions[call.partition]
        if self._is_now(call):
            number = max([0, *self.committed])
            partition.flags = partition.saved[number].copy()
            partition.be_another()
            self._is_elsewhere(call.partition)
            self._kill_unanswered(
                lambda c: isinstance(c, do.PartitionCall) and c.partition == call.partition,
                PartitionLost("it was killed"),
            )

    def _is_elsewhere(self, index: int) -> None:
        """A partition is on a node that stays, by now."""
        partitions = tuple(p for p in self.leaving.partitions if p != index)
        self.leaving = dataclasses.replace(self.leaving, partitions=partitions)

    def _asked(self, call: do.PartitionCall) -> Any:
        partition = self.partitions[call.partition]
        if isinstance(call, do.Promote):
            if self.followers_fail:
                raise PartitionLost("it died")
            partition.be_another()  # its follower has all of it
            self._is_elsewhere(call.partition)
            return None
        if not partition.alive or not self._is_now(call):
            raise PartitionLost(f"partition {call.partition} is dead")
        if partition.hangs or (isinstance(call, do.WriteSnapshot) and self.disk_hangs):
            raise Hangs
        match call:
            case do.LetAlone():
                if partition.waits_for_word == call.follower:
                    partition.waits_for_word = None
                return None
            case do.AskReport():
                followers = self.state.partitions.followers
                follows = followers.can_take_over(call.partition)
                return partition.report(partition.follower is not None if self.remote else follows)
            case do.AskFlags():
                return {e: partition.flags[e].copy() for e in call.epochs}
            case do.WriteSnapshot():
                partition.saved[call.number] = partition.flags.copy()
                version = partition.report(False).version
                name = f"partition-{call.partition}"
                return SnapshotFile(name=name, num_bytes=1, sha256="", version=version)

    def _follow(self, call: do.StartFollower) -> Endpoint:
        """A follower on another machine joins; that it comes is a word on an earlier one."""
        partition = self.partitions[call.partition]
        if not partition.alive or partition.hangs or call.start != partition.latest_follower:
            raise FollowerLost("it cannot join")
        partition.follower, partition.waits_for_word = call.start, None
        (part,) = split(num_parameters=1, num_features=1, num_decayed=0, num_partitions=1)
        network = NetworkAddress(host="10.0.0.2", port=1)
        return Endpoint(partition=part, machine="b", address="", network=network)

    def cut(self, index: int) -> None:
        """A partition and its follower on another machine do not hear each other any more."""
        partition = self.partitions[index]
        if partition.follower is not None:
            partition.follower, partition.waits_for_word = None, partition.follower

    def _window(self, call: do.RunWindow) -> WindowReport:
        lease = call.lease
        if any(partition.waits_for_word is not None for partition in self.partitions):
            raise Later
        if self.shufflers_dead:
            raise ShufflerLost("a shuffler is dead")
        process = next(i for i, of in enumerate(self.processes) if call.replica in of)
        if process in self.dead_processes:
            raise ProcessLost("it is dead")
        if process in self.hung_processes or self.shufflers_hang:
            raise Hangs
        self._push(lease.epoch, lease.batches)
        self._needs_all()
        self.trained.update((lease.epoch, batch) for batch in lease.batches)
        return WindowReport(
            replica=call.replica,
            epoch=lease.epoch,
            num_batches=len(lease.batches),
            num_examples=4 * len(lease.batches),
            mean_loss=self.loss,
            refused=() if self.loss is not None else lease.batches,
            unsettled=(),
            wall_s=1.0,
        )

    def _push(self, epoch: int, batches: tuple[int, ...]) -> None:
        """Every partition that lives takes the mini-batches, unless it covers them already."""
        for partition in self.partitions:
            if partition.alive:
                waiting = partition.flags[epoch, list(batches)] == WAITING
                fresh = np.array(batches)[waiting]
                partition.flags[epoch, fresh] = APPLIED if self.loss is not None else REFUSED

    def _connect(self, process: int) -> None:
        """A process has dropped the windows of its past; some of them it has pushed by then.

        A window that was on its way to it is run all the same, on the new connections.
        """
        self._needs_all()
        for call in self.calls(do.RunWindow):
            dropped = not self.state.leases.is_live(call.lease) and self.rng.random() < 0.7
            if call.replica in self.processes[process] and dropped:
                self._push_some(call)
                self.fail(call, ReplicaFailed("the replicas were stopped"))

    # Dying

    def kill_partition(self, index: int) -> None:
        """What it has covered since its last snapshot is gone with it."""
        self.partitions[index].alive = False

    def kill_process(self, index: int) -> None:
        """Its windows end somewhere, also between two partitions."""
        self.dead_processes.add(index)
        for call in self.calls(do.RunWindow):
            if call.replica in self.processes[index]:
                self._push_some(call)

    @property
    def hangs(self) -> bool:
        """Whether some member does."""
        partitions = any(p.hangs for p in self.partitions)
        return bool(
            partitions or self.hung_processes or self.shufflers_hang or self.evaluator_hangs
        )

    @property
    def num_recomputed(self) -> int:
        """Mini-batches that were computed more than once, each time but the first."""
        return sum(self.trained.values()) - len(self.trained)

    def hang(self) -> None:
        """Have any member hang from now on."""
        match self.rng.randrange(4):
            case 0:
                self.rng.choice(self.partitions).hangs = True
            case 1:
                self.hung_processes.add(self.rng.randrange(len(self.processes)))
            case 2:
                self.shufflers_hang = True
            case _:
                self.evaluator_hangs = True

    def _push_some(self, call: do.RunWindow) -> None:
        lease, most = call.lease, 0
        for partition in self.partitions:
            done = lease.batches[: self.rng.randint(0, len(lease.batches))]
            most = max(most, len(done))
            if partition.alive:
                fresh = [b for b in done if partition.flags[lease.epoch, b] == WAITING]
                partition.flags[lease.epoch, fresh] = APPLIED
        self.trained.update((lease.epoch, batch) for batch in lease.batches[:most])

    def step(self, deaths: float) -> None:
        """Answer any call, in any order; something dies with the probability `deaths`."""
        if self.rng.random() < deaths:
            match self.rng.randrange(4):
                case 0:
                    self.kill_partition(self.rng.randrange(len(self.partitions)))
                case 1:
                    self.kill_process(self.rng.randrange(len(self.processes)))
                case 2:
                    self.shufflers_dead = 1
                case _:
                    for call in self.calls(do.Evaluate)[:1]:
                        self.fail(call, ProcessLost("the evaluator died"))
        if self.remote and self.rng.random() < deaths:
            self.cut(self.rng.randrange(len(self.partitions)))
        if self.pending and self.rng.random() < 0.8:
            self.answer(self.rng.choice(self.pending))
        else:
            self.tick(self.rng.random())


Made = Callable[..., World]
"""Makes a run."""
