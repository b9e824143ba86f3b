"""Claim: whatever hangs for good is noticed and replaced, and every mini-batch is applied once.

Real runs of `mnist-bn`, in which processes are stopped (kill -STOP) at random times and never
continued: those of replicas, partitions, shuffler and evaluator. One in three hangs while another
does, or is being replaced; the others once the run trains again, or its members would hang faster
than anybody could notice. Nobody helps: the run has to notice each, to end it, and to come to its
end. Every second run has `--hot-standby`, and followers hang, too. `--hang-after-s` is short, or a
quarter of an hour would be spent on waiting. As in `chaos`, what is checked comes from the last
checkpoint.
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
PAUSE_S = (0.5, 6.0)
"""Between two hangs, and at least as long after the run trains again."""
TOGETHER = 1 / 3
"""How often one does not wait for that."""
EPOCHS, QUICK_EPOCHS = 120, 20
OPTIONS = ("--hang-after-s", "2", "--checkpoint-every-s", "1", "--no-dashboard")
RUN_DEADLINE_S = 900.0
LOOK_EVERY_S = 0.05
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
        arguments = ["--epochs", str(epochs), *(["--hot-standby"] if len(runs) % 2 else [])]
        wanted = min(HANGS_A_RUN, total - done)
        runs.append(hung(wanted, arguments, seed=len(runs), say=say))
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
    arguments: Sequence[str],
    *,
    seed: int,
    say: Say,
    pause_s: tuple[float, float] = PAUSE_S,
    kinds: Sequence[str] = (),
    together: float = TOGETHER,
) -> Hung:
    """One run of `mnist-bn` to its end, in which up to so many processes hang.

    Args:
        hangs: how many. The run may be over before.
        arguments: further ones of `downpour train mnist-bn`.
        seed: what times and victims are drawn from.
        say: is told of each.
        pause_s: bounds of the time between two.
        kinds: whom to hit, in this order; without it they are drawn by `WEIGHTS`.
        together: how often one does not wait until the run trains again.

    Raises:
        BenchmarkFailed: the run failed, left a process behind, or did not apply each mini-batch
            once.
    """
    began_s, rng = time.monotonic(), random.Random(seed)
    found = Hung(seed=seed)
    with tempfile.TemporaryDirectory(prefix="downpour-hangs-") as scratch:
        log, folder = Path(scratch) / "log", Path(scratch) / "runs" / "a"
        command = ["train", "mnist-bn", "--runs", str(folder.parent), "--name", "a"]
        driver = chaos.start_driver([*command, *OPTIONS, *arguments], log)
        family: dict[int, tuple[str, str]] = {}
        stopped, training = _Stopped(found), _Training(folder / METRICS)
        waits = False
        try:
            chaos.until((folder / "metrics.jsonl").exists, driver, log)
            next_s = time.monotonic() + rng.uniform(*pause_s)
            while driver.poll() is None:
                if time.monotonic() > began_s + RUN_DEADLINE_S:
                    raise BenchmarkFailed(_story(found, stopped, "it does not end", log))
                over = (folder / RESULT).exists()
                stopped.look(over=over)
                if waits and not training.goes_on(repaired=not stopped.since_s):
                    next_s = max(next_s, time.monotonic() + pause_s[0])
                if found.hangs.total() < hangs and time.monotonic() >= next_s and not over:
                    kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
                    kind = kinds[found.hangs.total()] if kinds else kind
                    family = chaos.family_of(driver.pid)
                    idle = chaos.idle_spares(driver.pid)  # nobody would notice
                    busy = {pid: about for pid, about in family.items() if pid not in idle}
                    if stopped.stop_one(busy, kind, rng):
                        say(f"hangs: stopped {kind}")
                        next_s = time.monotonic() + rng.uniform(*pause_s)
                        waits = rng.random() >= together
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
    """Whether a run trains again after its latest loss, by its metrics."""

    def __init__(self, metrics: Path) -> None:
        self._metrics = metrics
        self._from: int | None = None
        """Updates that there were when everybody had been replaced."""

    def goes_on(self, *, repaired: bool) -> bool:
        """Whether there have been updates since nobody hangs any more.

        Args:
            repaired: whether nobody does.
        """
        if not repaired:
            self._from = None
            return False
        lines = self._metrics.read_text().splitlines()
        whole = (json.loads(line) for line in reversed(lines) if line.endswith("}"))
        now = next((line["updates"] for line in whole if "replicas_alive" in line), 0)
        if self._from is None or now < self._from:  # it has gone back to a checkpoint
            self._from = now
        return bool(now > self._from)


def _story(found: Hung, stopped: _Stopped, what: str, log: Path) -> str:
    left = [round(time.monotonic() - s) for s in stopped.since_s.values()]
    return f"{what}; {found}; stopped for so long: {left}:\n{log.read_text()[-3000:]}"
