"""Followers: which partition has one that can take its place, and starting those that are missing.

A follower counts once its partition says that it has it. On one machine a partition fences off a
follower that it goes on without, by a token that both share, so a stale belief here costs a refusal
and no update.

Between machines there is nothing that both share, and this is the token. A partition that has lost
its follower answers nobody until it has our word (`LetAlone`), and a follower takes over only at
ours (`Promote`). Of one follower only one of the two is ever given: the word makes the follower one
that can not take over any more, and after a promotion the partition is another incarnation, so what
the earlier one reports is not heard any more.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from downpour.cluster.controller.failures.account import Failures
from downpour.cluster.controller.failures.policy import Failure
from downpour.cluster.controller.protocol.instructions import (
    Instruction,
    LetAlone,
    StartFollower,
    StopFollower,
    Tell,
    WatchPrimary,
)

if TYPE_CHECKING:
    from downpour.paramserver.actor import PartitionReport
    from downpour.paramserver.standby.trouble import Kind, Trouble
    from downpour.paramserver.transport.endpoint import Endpoint

LATE_S: dict[Kind, float] = {"closed": 0.3, "unreachable": 0.2, "silent": 1.0}
"""A partition that its follower does not hear is lost if a report is late by so long. By what the
follower knows, see `paramserver.standby.trouble`."""
SUCCESSORS = 3
"""Followers that are tried for a partition whose node is to leave."""
REPORTS_TO_FOLLOW = 2
"""Reports without a follower after one has joined: the first may have been on its way before."""


@dataclass(frozen=True, kw_only=True)
class Suspicion:
    """A partition that its follower on another machine does not hear any more."""

    trouble: Trouble
    since_s: float
    """When we heard of it."""

    def confirmed(self, asked_s: float | None, cut_s: float | None, now: float) -> str | None:
        """Return why the partition is lost, if something else than its follower says so, too.

        Args:
            asked_s: when it was asked for a report that has not come, if it was.
            cut_s: when a process of replicas last lost a connection to it, if one did.
            now: seconds by the run's clock.
        """
        if self.trouble.kind == "closed" and cut_s is not None:
            return f"{self.trouble}, and replicas lost their connection, too"
        if asked_s is None:
            return None
        late_s = now - max(asked_s, self.since_s)
        if late_s < LATE_S[self.trouble.kind]:
            return None
        return f"{self.trouble}, and no report for {late_s:.1f} s"


class Standing(enum.Enum):
    """What a partition has of a follower."""

    MISSING = enum.auto()
    STARTING = enum.auto()
    FOLLOWS = enum.auto()
    LEFT_OUT = enum.auto()
    """It is to have none."""


class Followers:
    """The followers of all partitions of one run."""

    def __init__(
        self,
        num_partitions: int,
        *,
        wanted: bool,
        failures: Failures,
        out: list[Instruction],
        before: Sequence[int] = (),
    ) -> None:
        """None has been started. None ever will be, unless they are `wanted`.

        `before` says how many followers each partition has had under an earlier driver, if it has
        outlived that one. An earlier one that comes late is then refused.
        """
        self._failures = failures
        self._out = out
        first = Standing.MISSING if wanted else Standing.LEFT_OUT
        self._standing = [first] * num_partitions
        self._starts = list(before) or [0] * num_partitions
        self._without = [0] * num_partitions
        self._successors: dict[int, int] = {}
        """Partitions that have a follower only to move, and how many of those were lost."""
        self._let_alone = [0] * num_partitions
        """Of each partition, the follower that it was last let alone by."""
        self.suspected: dict[int, Suspicion] = {}
        """Partitions that their followers on other machines do not hear any more."""

    def can_take_over(self, partition: int) -> bool:
        """Return whether a partition has a follower that is to take its place."""
        return self._standing[partition] is Standing.FOLLOWS

    def has_some(self, partition: int) -> bool:
        """Return whether a partition has a follower, or one is being started."""
        return self._standing[partition] in (Standing.STARTING, Standing.FOLLOWS)

    def start_missing(self) -> None:
        """Start the missing followers of partitions, which are all up."""
        for index, standing in enumerate(self._standing):
            if standing is Standing.MISSING:
                self._start(index)

    def _start(self, index: int) -> None:
        self._standing[index] = Standing.STARTING
        self._starts[index] += 1
        self._out.append(StartFollower(partition=index, start=self._starts[index]))

    def started(self, call: StartFollower, endpoint: Endpoint | None) -> None:
        """A follower has its partition's state."""
        index = call.partition
        # It may have been lost, and its partition let alone, before this was heard.
        if not self._is_current(call) or self._standing[index] is not Standing.STARTING:
            return
        self._standing[index], self._without[index] = Standing.FOLLOWS, 0
        where = ""
        if endpoint is not None and endpoint.network is not None:
            where = f" on {endpoint.network.host}"
            self._out.append(WatchPrimary(partition=index, start=call.start))
        self._out.append(Tell(text=f"partition {index} has a follower{where}"))

    def suspects(self, call: WatchPrimary, trouble: Trouble | None, now: float) -> bool:
        """A follower does not hear its partition any more; return whether that is of interest."""
        index = call.partition
        current = self._starts[index] == call.start and self.can_take_over(index)
        if trouble is None or not current:
            return False
        self.suspected[index] = Suspicion(trouble=trouble, since_s=now)
        return True

    def start_failed(self, call: StartFollower, error: Exception, now: float) -> None:
        """A follower could not join its partition."""
        if self._is_current(call) and self._standing[call.partition] is Standing.STARTING:
            self._on_lost(call.partition, str(error), now)

    def partition_replaced(self, partition: int) -> None:
        """A partition is another process from now on, which nobody follows yet."""
        self.suspected.pop(partition, None)
        if self._standing[partition] is not Standing.LEFT_OUT:
            left_out = partition in self._successors
            self._standing[partition] = Standing.LEFT_OUT if left_out else Standing.MISSING
            self._starts[partition] += 1  # a follower that was just being started is none of it
        self._successors.pop(partition, None)

    # Departures

    def start_successor(self, partition: int) -> None:
        """Start the follower that is to take a partition's place, if it has none and may have one.

        This is how a partition moves, whether or not partitions have followers otherwise.
        """
        if self._standing[partition] is Standing.LEFT_OUT:
            self._successors.setdefault(partition, 0)
        if not self.has_some(partition) and not self.gave_up(partition):
            self._start(partition)

    def gave_up(self, partition: int) -> bool:
        """Return whether a partition that was to move stays: its followers were lost."""
        return self._successors.get(partition, 0) >= SUCCESSORS

    def release(self, partition: int, incarnation: int) -> None:
        """A partition need not move any more: end the follower that it has only for that."""
        if partition in self._successors:
            self._dismiss(partition, incarnation)
            self._standing[partition] = Standing.LEFT_OUT
            del self._successors[partition]

    def depart(self, partition: int, incarnation: int, now: float) -> None:
        """The node of a partition's follower is to leave: another one is to come elsewhere."""
        if not self._dismiss(partition, incarnation):
            return
        left_out = partition in self._successors
        self._standing[partition] = Standing.LEFT_OUT if left_out else Standing.MISSING
        self._out.append(
            Tell(text=f"the follower of partition {partition} moves: its node is to leave")
        )
        self._failures.reserve_soon(now)

    def _dismiss(self, index: int, incarnation: int) -> bool:
        """End a follower that lives; its partition, which is let alone first, waits for nothing."""
        if not self.has_some(index):
            return False
        self.suspected.pop(index, None)
        follower = self._starts[index]
        self._starts[index] += 1
        self._out.append(LetAlone(partition=index, incarnation=incarnation, follower=follower))
        self._out.append(StopFollower(partition=index))
        return True

    def reported(self, report: PartitionReport, incarnation: int, now: float) -> None:
        """A partition, as it is now, says whether it has a follower."""
        index = report.index
        if report.has_follower:
            self._failures.policy.progressed("follower", index)
        if self.suspected.pop(index, None) is not None and self.can_take_over(index):
            # It lives: only they do not hear each other.
            self._out.append(WatchPrimary(partition=index, start=self._starts[index]))
        if report.waits_for_word is not None:
            self._give_word(index, incarnation, report.waits_for_word, now)
        if self._standing[index] is not Standing.FOLLOWS:
            return
        self._without[index] = 0 if report.has_follower else self._without[index] + 1
        if self._without[index] == REPORTS_TO_FOLLOW:
            self._on_lost(index, "its partition goes on without it", now)

    def _give_word(self, index: int, incarnation: int, follower: int, now: float) -> None:
        """A partition has lost a follower: that one will not take over, and it goes on alone."""
        if self._let_alone[index] == follower:
            return  # the word is on its way
        self._let_alone[index] = follower
        following = self._standing[index] in (Standing.FOLLOWS, Standing.STARTING)
        if following and self._starts[index] == follower:
            self._on_lost(index, "its partition has lost it", now)
        self._out.append(LetAlone(partition=index, incarnation=incarnation, follower=follower))

    def _is_current(self, call: StartFollower) -> bool:
        return self._starts[call.partition] == call.start

    def _on_lost(self, index: int, detail: str, now: float) -> None:
        self._out.append(StopFollower(partition=index))
        if index in self._successors:
            self._lose_successor(index, detail)
            return
        name = f"the follower of partition {index}"
        failure = Failure(part="follower", index=index, name=name, cause="died", detail=detail)
        another = self._failures.recover(failure, now).action == "restart"
        self._standing[index] = Standing.MISSING if another else Standing.LEFT_OUT

    def _lose_successor(self, index: int, detail: str) -> None:
        """A follower is lost that a partition had only to move. This is no restart."""
        self._successors[index] += 1
        self._standing[index] = Standing.LEFT_OUT
        on = "trying again"
        if self.gave_up(index):
            on = f"it stays until its node is gone, after {SUCCESSORS} tries"
        self._out.append(
            Tell(text=f"partition {index} cannot move: its follower is lost ({detail}): {on}")
        )
