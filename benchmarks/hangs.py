"""Claim: whatever hangs for good is noticed and replaced, and every mini-batch is applied once.

Real runs of `mnist-bn`, in which processes are stopped (kill -STOP) at random places of the run and
never continued: those of replicas, partitions, shuffler and evaluator. One in four hangs while
another does, or is being replaced. The next after that comes once whoever hung is gone, and all
replicas are back and train: members that hang faster than they can start again end a run, and
rightly. So a busy machine has longer runs, and not fewer hangs. Nobody helps: the run has to notice
each, to end it, and to come to its end. Every second run has `--hot-standby`, and followers hang,
too. `--hang-after-s` is short, or a quarter of an hour would be spent on waiting. As in `chaos`,
what is checked comes from the last checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from downpour.benchmarks import chaos
from downpour.benchmarks.harness import BadSettings, Report, Say, Settings
from downpour.benchmarks.processes import BenchmarkFailed
from downpour.cluster.run.folder import EVENTS, METRICS, RESULT

HANGS, QUICK_HANGS = 50, 4
HANGS_A_RUN = 25
WEIGHTS = {"replicas": 6, "partition": 6, "shuffler": 3, "evaluator": 3}
"""How often each is hit, relatively: as in `chaos`, less the driver, which is who notices."""
PLACES = (0.02, 0.9)
"""What the places of hangs are drawn between, as shares of the run's examples."""
TOGETHER = 1 / 3
"""How often a hang is followed by another that waits for nothing, at most one at a time."""
PAUSE_S = (0.0, 3.0)
"""How soon that one comes."""
EPOCHS, QUICK_EPOCHS = 120, 20
OPTIONS = ("--hang-after-s", "2", "--checkpoint-every-s", "1", "--no-dashboard")
RUN_DEADLINE_S = 1800.0
LOOK_EVERY_S = 0.1
TOLD = ("does not answer (", "goes on without it")
"""What a line on a member that hangs has in it."""


@dataclass(kw_only=True)
class Hung:
    """What became of one run, and of those that hung in it."""

    seed: int
    hangs: Counter[str] = field(default_factory=Counter)
    ended_after_s: list[float] = field(default_factory=list)
    """Of each that was ended while the run lasted: how long it had hung."""
    at_the_end: int = 0
    """Those that hung when the run was over, and that nobody waited for."""
    told: int = 0
    """Lines about members that do not answer."""
    accuracy: float = 0.0
    run_s: float = 0.0


def run(settings: Settings, say: Say) -> Report:
    """`HANGS` hangs over as many runs as that takes."""
    if settings.only:
        raise BadSettings(f"--only {settings.only[0]}: hangs has nothing to choose from")
    total = QUICK_HANGS if settings.quick else HANGS
    epochs = QUICK_EPOCHS if settings.quick else EPOCHS
    runs: list[Hung] = []
    while (done := sum(r.hangs.total() for r in runs)) < total:
        wanted = min(HANGS_A_RUN, total - done)
        arguments = ["--hot-standby"] if len(runs) % 2 else []
        runs.append(hung(wanted, epochs, arguments, seed=len(runs), say=say))
        say(f"hangs: {done + runs[-1].hangs.total()} of {total}, {runs[-1]}")
    return report(runs, epochs)


def report(runs: Sequence[Hung], epochs: int) -> Report:
    """A row for each run."""
    hangs: Counter[str] = sum((r.hangs for r in runs), Counter())
    ended = [s for r in runs for s in r.ended_after_s]
    return Report(
        name="hangs",
        title=f"{hangs.total()} processes hang for good in {len(runs)} runs of mnist-bn",
        columns=("run", "hangs", "ended", "median s", "longest s", "at the end", "accuracy"),
        rows=tuple(
            (
                str(r.seed),
                ", ".join(f"{n} {kind}" for kind, n in sorted(r.hangs.items())),
                str(len(r.ended_after_s)),
                f"{statistics.median(r.ended_after_s):.1f}" if r.ended_after_s else "",
                f"{max(r.ended_after_s):.1f}" if r.ended_after_s else "",
                str(r.at_the_end),
                f"{r.accuracy:.2%}",
            )
            for r in runs
        ),
        notes=(
            "seconds are from the stop of a process until it was gone.",
            "at the end: hung when all was done already, so nobody waited for them.",
            "every mini-batch was applied exactly once on every partition in every run.",
        ),
        configuration={"epochs": epochs, "options": list(OPTIONS), "weights": WEIGHTS},
        result={
            "hangs": dict(hangs),
            "num_hangs": hangs.total(),
            "ended": len(ended),
            "at_the_end": sum(r.at_the_end for r in runs),
            "median_s": statistics.median(ended) if ended else None,
            "longest_s": max(ended, default=None),
        },
        rounds=[{**vars(r), "hangs": dict(r.hangs)} for r in runs],
    )


def hung(
    hangs: int,
    epochs: int,
    arguments: Sequence[str],
    *,
    seed: int,
    say: Say,
    kinds: Sequence[str] = (),
    together: float = TOGETHER,
) -> Hung:
    """One run of `mnist-bn` to its end, in which up to so many processes hang.

    Args:
        hangs: how many. The run may be over before.
        epochs: of the run.
        arguments: further ones of `downpour train mnist-bn`.
        seed: what places and victims are drawn from.
        say: is told of each.
        kinds: whom to hit, in this order; without it they are drawn by `WEIGHTS`.
        together: how often a hang is followed by one that does not wait until the run trains again.

    Raises:
        BenchmarkFailed: the run failed, left a process behind, or did not apply each mini-batch
            once.
    """
    began_s, rng = time.monotonic(), random.Random(seed)
    found = Hung(seed=seed)
    with tempfile.TemporaryDirectory(prefix="downpour-hangs-") as scratch:
        log, folder = Path(scratch) / "log", Path(scratch) / "runs" / "a"
        command = ["train", "mnist-bn", "--runs", str(folder.parent), "--name", "a"]
        command += ["--epochs", str(epochs)]
        driver = chaos.start_driver([*command, *OPTIONS, *arguments], log)
        family: dict[int, tuple[str, str]] = {}
        stopped, training = _Stopped(found), _Training(folder / METRICS)
        pace = Pace(hangs, epochs * chaos.EXAMPLES_AN_EPOCH, rng, together=together)
        try:
            chaos.until((folder / METRICS).exists, driver, log)
            while driver.poll() is None:
                if time.monotonic() > began_s + RUN_DEADLINE_S:
                    raise BenchmarkFailed(_story(found, stopped, "it does not end", log))
                over = (folder / RESULT).exists()
                stopped.look(over=over)
                goes_on = training.goes_on(repaired=not stopped.since_s)
                now = time.monotonic()
                if not over and pace.is_due(now, training.examples, goes_on=goes_on):
                    kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
                    kind = kinds[found.hangs.total()] if kinds else kind
                    family = chaos.family_of(driver.pid)
                    idle = chaos.idle_spares(driver.pid)  # nobody would notice
                    busy = {pid: about for pid, about in family.items() if pid not in idle}
                    if stopped.stop_one(busy, kind, rng):
                        say(f"hangs: stopped {kind}")
                        pace.hung(now)
                time.sleep(LOOK_EVERY_S)  # how often to look
            found.run_s = time.monotonic() - began_s
        finally:
            driver.kill()
        stopped.look(over=True)
        if not (folder / RESULT).exists():
            raise BenchmarkFailed(_story(found, stopped, f"it ended: {driver.returncode}", log))
        chaos.await_end(chaos.ours(family), "the run", chaos.END_DEADLINE_S)
        chaos.await_end(family, "the run", chaos.RAY_END_DEADLINE_S)
        result = json.loads((folder / RESULT).read_text())
        chaos.check_exactly_once(folder, result["epochs"])
        found.accuracy = result["accuracy"]
        told = [json.loads(line)["event"] for line in (folder / EVENTS).read_text().splitlines()]
        found.told = sum(any(words in line for words in TOLD) for line in told)
    return found


class Pace:
    """When the next process is to hang: pure, but for its random numbers."""

    def __init__(self, hangs: int, examples: int, rng: random.Random, *, together: float) -> None:
        """None has. `examples` are those of the whole run."""
        self._places = sorted((rng.uniform(*PLACES) * examples for _ in range(hangs)), reverse=True)
        """Where the others come, the next last."""
        self._rng = rng
        self._together = together
        self._at_once_s: float | None = None
        """When the next comes, if it waits for nothing."""
        self._alone = True
        """The latest one was not such."""

    def is_due(self, now: float, examples: int, *, goes_on: bool) -> bool:
        """Return whether the next is to hang.

        Args:
            now: seconds of some clock.
            examples: that the run has trained.
            goes_on: whether it trains, and nobody hangs or is being replaced.
        """
        if not self._places:
            return False
        if self._at_once_s is not None:
            return now >= self._at_once_s
        return goes_on and examples >= self._places[-1]

    def hung(self, now: float) -> None:
        """One hangs."""
        self._places.pop()
        self._alone = self._at_once_s is None
        self._at_once_s = None
        if self._alone and self._rng.random() < self._together:
            self._at_once_s = now + self._rng.uniform(*PAUSE_S)


class _Stopped:
    """The processes that were stopped, until they are gone."""

    def __init__(self, found: Hung) -> None:
        self._found = found
        self.since_s: dict[int, float] = {}
        """When each was stopped that is still there."""

    def stop_one(self, family: dict[int, tuple[str, str]], kind: str, rng: random.Random) -> bool:
        """Stop one of a kind that runs; whether there was one."""
        titles = chaos.titles_of(kind)
        victims = sorted(
            pid
            for pid, (_, command) in family.items()
            if command.startswith(titles) and pid not in self.since_s
        )
        if not victims:
            return False
        victim = rng.choice(victims)
        try:
            os.kill(victim, signal.SIGSTOP)
        except ProcessLookupError:
            return False
        self.since_s[victim] = time.monotonic()
        self._found.hangs[kind] += 1
        return True

    def look(self, *, over: bool) -> None:
        """Note who is gone; once the run is over, nobody waits for the others any more."""
        for pid, since_s in list(self.since_s.items()):
            gone = not chaos.started_at(pid)
            if gone and not over:
                self._found.ended_after_s.append(time.monotonic() - since_s)
            if gone or over:
                del self.since_s[pid]
                self._found.at_the_end += over


class _Training:
    """How far a run is, and whether it trains again after its latest loss, by its metrics."""

    def __init__(self, metrics: Path) -> None:
        self._metrics = metrics
        self.examples = 0
        """That have been trained."""
        self._from: int | None = None
        """Those that there were when whoever hung was gone."""

    def goes_on(self, *, repaired: bool) -> bool:
        """Whether all replicas are back and have trained since nobody hangs any more.

        Args:
            repaired: whether nobody does.
        """
        lines = self._metrics.read_text().splitlines()
        whole = (json.loads(line) for line in reversed(lines) if line.endswith("}"))
        newest = next((line for line in whole if "replicas_alive" in line), None)
        if newest is None:
            return False
        self.examples = newest["examples"]
        if not repaired:
            self._from = None
            return False
        if self._from is None or self.examples < self._from:  # back at a checkpoint
            self._from = self.examples
        all_back: bool = newest["replicas_alive"] == newest["replicas_wanted"]
        return all_back and self.examples > self._from


def _story(found: Hung, stopped: _Stopped, what: str, log: Path) -> str:
    left = [round(time.monotonic() - s) for s in stopped.since_s.values()]
    return f"{what}; {found}; stopped for so long: {left}:\n{log.read_text()[-3000:]}"
