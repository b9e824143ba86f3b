"""The partitions of a run: which are up, what they report, and inquiries to all of them.

What else is lost with a partition, and who has to know, is decided in `state`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from downpour.cluster.controller.departures.notice import Departing
from downpour.cluster.controller.failures.account import Failures, detail_of
from downpour.cluster.controller.failures.policy import Cause, Failure
from downpour.cluster.controller.leases.manager import Census
from downpour.cluster.controller.members.followers import Followers
from downpour.cluster.controller.protocol.instructions import (
    AskFlags,
    AskReport,
    Instruction,
    PartitionCall,
    Promote,
    StartPartition,
    Tell,
)

if TYPE_CHECKING:
    from downpour.cluster.run.early_stopping import Point
    from downpour.paramserver.actor import PartitionReport

REPORT_EVERY_S = 1.0
CUT_S = 2.0
"""For so long it counts that replicas lost a connection to a partition."""
TARDY_S = 3.0
"""A partition that has not answered for so long may be what others wait for."""

Purpose = Literal["resume", "probe", "census", "first flags", "last reports", "last flags"]
"""What an inquiry is for."""


@dataclass(kw_only=True)
class PartitionMember:
    """A partition as the controller sees it."""

    index: int
    up: bool = False
    """It can be reached, as far as is known."""
    incarnation: int = 0
    """Counts its starts: what an earlier one still has to say is of no interest."""
    asked_s: float | None = None
    """When it was asked for a report that has not come."""
    cut_s: float | None = None
    """When a process of replicas last lost a connection to it."""
    version: int | None = None
    """In its first report since it started."""
    settled: int = 0
    """Mini-batches that it had settled at its newest report since it started."""

    @property
    def name(self) -> str:
        """What people call it."""
        return f"partition {self.index}"


@dataclass(kw_only=True)
class Inquiry:
    """A question to all partitions, which all have to answer before one of them is lost."""

    purpose: Purpose
    census: Census | None = None
    """What is asked, if this is a census."""
    answers: dict[int, Any] = field(default_factory=dict)
    """By partition."""

    @property
    def in_order(self) -> Sequence[Any]:
        """The answers in the order of the partitions."""
        return [self.answers[index] for index in sorted(self.answers)]


class Partitions:
    """All partitions of one run, with their followers."""

    def __init__(
        self,
        num_partitions: int,
        *,
        hot_standby: bool,
        followers_before: Sequence[int] = (),
        joins_quietly: bool = False,
        failures: Failures,
        out: list[Instruction],
        now: float,
    ) -> None:
        """None is up; for `followers_before` see `Followers`.

        If followers join `quietly`, they do not take pushes that were computed before they came.
        """
        self._failures = failures
        self._out = out
        self._next_report_s = now
        self._numbers = itertools.count()
        self.members = [PartitionMember(index=i) for i in range(num_partitions)]
        self.reports: dict[int, PartitionReport] = {}
        """The newest report of each."""
        self.points: dict[int, tuple[Point, Point]] = {}
        """Of each: where it was at its last report but one, and at its last."""
        self.first_update_s: float | None = None
        """When this session's first update was, by the run's clock, as far as is known."""
        self.last_update_s: float | None = None
        """When its latest update was."""
        self.inquiries: dict[int, Inquiry] = {}
        """Inquiries under way, by number."""
        self.followers = Followers(
            num_partitions, wanted=hot_standby, failures=failures, out=out, before=followers_before
        )
        self._joins_quietly = joins_quietly
        self.leaving: set[int] = set()
        """Those whose nodes are to leave, and whose followers are to take their places."""
        self.moving: set[int] = set()
        """Those whose followers do so just now."""

    @property
    def all_up(self) -> bool:
        """Whether every partition can be reached, as far as is known."""
        return all(p.up for p in self.members)

    @property
    def all_reported(self) -> bool:
        """Whether there is a report of each, and none is being waited for."""
        asked = any(p.asked_s is not None for p in self.members)
        return len(self.reports) == len(self.members) and not asked

    @property
    def latest_reports(self) -> list[PartitionReport]:
        """The newest report of each partition that has reported, in their order."""
        return [self.reports[index] for index in sorted(self.reports)]

    def is_current(self, call: PartitionCall) -> bool:
        """Return whether a call was made to the incarnation that is there now."""
        return self.members[call.partition].incarnation == call.incarnation

    # Starting

    def start(self) -> None:
        """Start all of them from where the run starts."""
        for partition in self.members:
            self._renew(partition)
            self._out.append(self._start_call(partition, again=False))

    def replace(self, index: int, *, promoted: bool, now: float) -> None:
        """Start a partition that is lost again, or promote its follower."""
        partition = self.members[index]
        self._renew(partition)
        if promoted:
            self._out.append(Promote(partition=index, incarnation=partition.incarnation))
        else:
            self._out.append(self._start_call(partition, again=True))

    def arrived(self, index: int) -> None:
        """A new incarnation can be reached."""
        self.members[index].up, self.members[index].asked_s = True, None
        if index in self.moving:
            self.moving.discard(index)
            self._out.append(Tell(text=f"partition {index} has moved, with all that it had"))

    def _renew(self, partition: PartitionMember) -> None:
        partition.up, partition.asked_s, partition.version = False, None, None
        partition.cut_s = None
        partition.settled = 0
        partition.incarnation += 1

    def _start_call(self, partition: PartitionMember, *, again: bool) -> StartPartition:
        return StartPartition(
            partition=partition.index, incarnation=partition.incarnation, again=again
        )

    # Failures

    def fail(
        self,
        index: int,
        cause: Cause,
        now: float,
        *,
        error: Exception | None = None,
        detail: str = "",
    ) -> bool:
        """A partition is lost, and all inquiries with it.

        Returns:
            Whether its follower is to take its place.

        Raises:
            GaveUp: the run is given up.
        """
        partition = self.members[index]
        detail = detail if error is None else detail_of(error)
        failure = Failure(
            part="partition", index=index, name=partition.name, cause=cause, detail=detail
        )
        followed = self.followers.can_take_over(index)
        recovery = self._failures.recover(failure, now, error=error, followed=followed)
        partition.up = False
        self.leaving.discard(index)
        self.moving.discard(index)
        self.followers.partition_replaced(index)
        self.inquiries.clear()
        return recovery.action == "promote"

    # Departures

    def depart(self, departing: Departing, now: float) -> None:
        """Have followers elsewhere for partitions whose nodes are to leave.

        A follower that is on such a node itself is started anew elsewhere.
        """
        for index in departing.followers:
            self.followers.depart(index, self.members[index].incarnation, now)
        for index in sorted(self.leaving.difference(departing.partitions)):
            self.leaving.discard(index)
            self.followers.release(index, self.members[index].incarnation)
            self._out.append(Tell(text=f"partition {index} stays after all"))
        for index in departing.partitions:
            if self.members[index].up and index not in self.leaving:
                self.leaving.add(index)
                self._out.append(Tell(text=f"partition {index} moves: its node is to leave"))
        if not self._joins_quietly:
            self.let_successors_join()

    def let_successors_join(self) -> None:
        """Start followers of partitions whose nodes are to leave, if they have none."""
        for index in sorted(self.leaving):
            self.followers.start_successor(index)

    @property
    def need_quiet(self) -> bool:
        """Whether followers are there that take no pushes of their past, and are to move."""
        return self._joins_quietly and any(map(self.followers.has_some, self.leaving))

    def wait_for_quiet(self, *, over: bool) -> bool:
        """Return whether some wait until nothing is on its way to them, to be followed or to move.

        Followers that are still being started are waited for before, unless the time is `over`.
        """
        hopeful = [index for index in self.leaving if not self.followers.gave_up(index)]
        ready = [index for index in hopeful if self.followers.can_take_over(index)]
        if over:
            return bool(ready)
        return bool(hopeful) and (self._joins_quietly or len(ready) == len(hopeful))

    def hand_over(self, now: float) -> bool:
        """Have followers take the places of their partitions whose nodes are to leave.

        Returns:
            Whether there are such, all of them or, if time is short, some.
        """
        ready = [index for index in sorted(self.leaving) if self.followers.can_take_over(index)]
        for index in ready:
            self.leaving.discard(index)
            self.moving.add(index)
            self.followers.partition_replaced(index)
            self.replace(index, promoted=True, now=now)
        if ready:
            self.inquiries.clear()
            self._failures.reserve_soon(now)
        return bool(ready)

    def silent(self, now: float) -> dict[int, str]:
        """Partitions that neither their followers hear nor somebody else, and why."""
        found = {}
        for index, suspicion in self.followers.suspected.items():
            member = self.members[index]
            cut_s = member.cut_s
            if cut_s is not None and now - cut_s > CUT_S:
                cut_s = None
            if (why := suspicion.confirmed(member.asked_s, cut_s, now)) is not None:
                found[index] = why
        return found

    def cut(self, index: int, now: float) -> None:
        """A process of replicas has lost a connection to a partition."""
        self.members[index].cut_s = now

    def all_answer(self, now: float) -> bool:
        """Whether all are up, and none has been asked for a report and not answered for long."""
        return all(p.up and (p.asked_s is None or now - p.asked_s < TARDY_S) for p in self.members)

    def forgive(self, seconds: float) -> None:
        """Nobody has waited for so long for a report."""
        for partition in self.members:
            if partition.asked_s is not None:
                partition.asked_s += seconds

    # Reports

    def ask_reports(self, now: float) -> bool:
        """Ask all that are up for a report, once a second; return whether it was time for it."""
        if now < self._next_report_s:
            return False
        self._next_report_s = now + REPORT_EVERY_S
        for partition in self.members:
            if partition.up and partition.asked_s is None:
                partition.asked_s = now
                index, incarnation = partition.index, partition.incarnation
                self._out.append(AskReport(partition=index, incarnation=incarnation))
        return True

    def ask_reports_now(self, now: float) -> None:
        """Have the next reports asked for at once: one of the partitions may be lost."""
        self._next_report_s = now

    def reported(self, report: PartitionReport, now: float) -> None:
        """A partition has answered the regular question for its report."""
        partition = self.members[report.index]
        partition.asked_s = None
        if partition.version is None:
            partition.version = report.version
        elif report.version > partition.version:
            self._failures.policy.progressed("partition", partition.index)
        self.note_report(report, now)
        self.followers.reported(report, partition.incarnation, now)

    def num_pushes_of(self, replicas: Sequence[int]) -> int:
        """Return the pushes of some replicas that the first partition has applied or refused.

        Pushes that it ignored are of nobody in particular, so all of them count.
        """
        report = self.reports.get(0)
        if report is None:
            return 0
        applied = sum(sum(report.staleness.get(r, ())) for r in replicas)
        refused = sum(report.refusals.get(r, 0) for r in replicas)
        return applied + refused + report.duplicates + report.dropped + report.malformed

    def note_report(self, report: PartitionReport, now: float) -> None:
        """Keep a report as the newest of its partition.

        Answers may arrive in another order than that in which they were given: one that was given
        before another that is here already says nothing new.
        """
        member, settled = self.members[report.index], report.batches_applied + report.refused
        if settled < member.settled:
            return
        member.settled = settled
        self.reports[report.index] = report
        last = self.points.get(report.index, ((0, 0), (0, 0)))[1]
        if report.version < last[0]:  # it has gone back in time
            last = (0, 0)
        if report.version > last[0]:
            self.points[report.index] = (last, (report.version, report.examples))
        # A partition that starts again forgets its first update, and all of them may.
        if report.first_update_age_s is not None:
            first_s = now - report.first_update_age_s
            known_s = self.first_update_s
            self.first_update_s = first_s if known_s is None else min(known_s, first_s)
        if report.last_update_age_s is not None:
            last_s = now - report.last_update_age_s
            known_s = self.last_update_s
            self.last_update_s = last_s if known_s is None else max(known_s, last_s)

    # Inquiries

    def is_asked(self, purpose: Purpose) -> bool:
        """Return whether an inquiry for this purpose is under way."""
        return any(inquiry.purpose == purpose for inquiry in self.inquiries.values())

    def ask_all_reports(self, purpose: Purpose) -> None:
        """Ask all partitions, which are up, for a report."""
        number = self._inquire(Inquiry(purpose=purpose))
        self._out.extend(
            AskReport(partition=p.index, incarnation=p.incarnation, inquiry=number)
            for p in self.members
        )

    def ask_all_flags(
        self, purpose: Purpose, epochs: Sequence[int], *, census: Census | None = None
    ) -> None:
        """Ask all partitions, which are up, which mini-batches of `epochs` they cover."""
        number = self._inquire(Inquiry(purpose=purpose, census=census))
        self._out.extend(
            AskFlags(
                partition=p.index, incarnation=p.incarnation, inquiry=number, epochs=tuple(epochs)
            )
            for p in self.members
        )

    def take_answer(self, number: int, index: int, value: Any) -> Inquiry | None:
        """Note an answer; return the inquiry if this was the last one, and end it."""
        inquiry = self.inquiries.get(number)
        if inquiry is None:
            return None  # a partition was lost meanwhile
        inquiry.answers[index] = value
        if len(inquiry.answers) < len(self.members):
            return None
        return self.inquiries.pop(number)

    def _inquire(self, inquiry: Inquiry) -> int:
        assert self.all_up, "not every partition can be asked"
        number = next(self._numbers)
        self.inquiries[number] = inquiry
        return number

    def check(self) -> None:
        """Assert that inquiries and reports are of partitions that can be reached."""
        assert self.all_up or not self.inquiries
        everybody = set(range(len(self.members)))
        assert self.reports.keys() <= everybody
        assert all(i.answers.keys() < everybody for i in self.inquiries.values())
        up = {p.index for p in self.members if p.up}
        assert self.leaving <= up, "a partition that is lost moves"
        assert not self.moving & up, "a partition that can be reached is on its way"
        for number in self.inquiries:
            purpose = self.inquiries[number].purpose
            assert sum(i.purpose == purpose for i in self.inquiries.values()) == 1, purpose
