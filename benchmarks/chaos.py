"""Claim: whatever dies, and whenever, every mini-batch is applied once, and nothing is lost.

Real runs of `mnist-bn`, in which processes are killed (kill -9) at random times: those of replicas,
partitions, shuffler and evaluator, and the driver, which is then resumed. What is checked comes
from the last checkpoint's applied sets, and not from anything that the run says of itself.

A hundred faults take a quarter of an hour; they may as well be gathered run by run, each with a
seed of its own (without faults: a run that nobody disturbs), in one record:

    python -m downpour.benchmarks.chaos --seed 3 --faults 25 --into chaos.json
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.fs
from rich.console import Console

from downpour.benchmarks.harness import BadSettings, Report, Say, Settings, machine, record, show
from downpour.benchmarks.processes import BenchmarkFailed, Child, alone, descendants
from downpour.cluster.config.paths import ROOT
from downpour.cluster.run.checkpoint import Checkpoint, CheckpointStore
from downpour.cluster.run.folder import EVENTS, METRICS, RESULT, RunFolder
from downpour.cluster.training.launch import OUTLIVED
from downpour.cluster.training.session import before_ray, on_ray
from downpour.paramserver.partition import snapshot

DEADLINE_S = 240.0
END_DEADLINE_S = 15.0
RAY_END_DEADLINE_S = 120.0
"""Ray's own agents take a minute now and then to see that their raylet is gone."""
LOOK_EVERY_S = 0.02
TRY_AGAIN_S = 0.2
"""After so long, if there was nobody to hit."""
TITLES = {
    "replicas": "ray::Replicas",
    "partition": "ray::Partition",
    "shuffler": "ray::Shuffler",
    "evaluator": "ray::Evaluator",
}
SPARE, IDLE_S = "Spare", 0.2
FOLLOWER = "ray::Follower"
"""The partition too, once it has taken its place."""
WEIGHTS = {"replicas": 6, "partition": 6, "shuffler": 3, "evaluator": 3, "driver": 2}
"""How often each is hit, relatively."""
FAULTS, QUICK_FAULTS = 100, 10
FAULTS_A_RUN = 25
HOLD = "--hold-ray"
"""Has this module start a Ray and hold it, see `ray_cluster`."""
BATCHES_AN_EPOCH, EXAMPLES_AN_EPOCH = 1877, 60_000


@dataclass(kw_only=True)
class Disturbed:
    """What became of one run and its faults."""

    seed: int
    accuracy: float = 0.0
    best_accuracy: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    taken_over: int = 0
    """Of it, with the processes that had outlived their driver."""
    duplicates: int = 0
    recomputed: int = 0
    """Mini-batches that were run again, and examples' worth of them lost with a driver."""
    wall_s: float = 0.0
    run_s: float = 0.0
    """Of it, until the run was over: Ray's own end comes after that."""


def run(settings: Settings, say: Say) -> Report:
    """`FAULTS` faults over as many runs as that takes, beside runs that nobody disturbs."""
    if settings.only:
        raise BadSettings(f"--only {settings.only[0]}: chaos has nothing to choose from")
    arguments = ["--epochs", "4"] if settings.quick else []
    total = QUICK_FAULTS if settings.quick else FAULTS
    runs: list[Disturbed] = []
    calm: list[Disturbed] = []
    while (done := sum(r.faults.total() for r in runs)) < total:
        wanted = min(FAULTS_A_RUN, total - done)
        runs.append(disturbed(wanted, arguments, seed=len(runs), say=say))
        say(f"chaos: {done + runs[-1].faults.total()} of {total} faults, {runs[-1]}")
        if len(calm) < (1 if settings.quick else 2):
            calm.append(disturbed(0, arguments, seed=len(calm), say=say))
            say(f"chaos: undisturbed, {calm[-1]}")
    return _report([*runs, *calm], arguments)


def _report(found: Sequence[Disturbed], arguments: Sequence[str]) -> Report:
    runs = [r for r in found if r.faults]
    calm = [r for r in found if not r.faults]
    faults: Counter[str] = sum((r.faults for r in runs), Counter())
    return Report(
        name="chaos",
        title=f"{faults.total()} random faults (kill -9) over {len(runs)} runs of mnist-bn",
        columns=("run", "faults", "repeated", "accuracy", "best", "wall s"),
        rows=tuple(
            (
                "disturbed" if r.faults else "undisturbed",
                ", ".join(f"{n} {kind}" for kind, n in sorted(r.faults.items())),
                f"{r.duplicates:,}",
                f"{r.accuracy:.2%}",
                f"{r.best_accuracy:.2%}",
                f"{r.wall_s:.0f}",
            )
            for r in (*runs, *calm)
        ),
        notes=("every mini-batch was applied exactly once on every partition in every run.",),
        configuration={"arguments": list(arguments), "weights": WEIGHTS},
        result={
            "faults": dict(faults),
            "num_faults": faults.total(),
            "accuracy_disturbed": [r.accuracy for r in runs],
            "accuracy_undisturbed": [r.accuracy for r in calm],
        },
        rounds=[{**vars(r), "faults": dict(r.faults)} for r in found],
    )


def disturbed(
    faults: int,
    arguments: Sequence[str],
    *,
    seed: int,
    say: Say,
    pause_s: tuple[float, float] = (0.2, 5.0),
    kinds: Sequence[str] = (),
    deadline_s: float = DEADLINE_S,
    cluster: Cluster | None = None,
) -> Disturbed:
    """One run of `mnist-bn` to its end, with up to so many faults; checks what it must show.

    `kinds` are the victims, in this order; without it they are drawn by `WEIGHTS`. With `cluster`
    the run is on that Ray, which outlives its drivers. Raises `BenchmarkFailed` where it does not
    show it. The run may be over before its faults are.
    """
    began_s, rng = time.monotonic(), random.Random(seed)
    found = Disturbed(seed=seed)
    with tempfile.TemporaryDirectory(prefix="downpour-chaos-") as scratch:
        log, folder = Path(scratch) / "log", Path(scratch) / "runs" / "a"
        command = ["train", "mnist-bn", "--runs", str(folder.parent), "--name", "a"]
        options = ["--no-dashboard"] if cluster is None else ["--address", cluster.address]
        driver = start_driver([*command, "--checkpoint-every-s", "1", *arguments, *options], log)
        family: dict[int, tuple[str, str]] = {}
        try:
            until((folder / "metrics.jsonl").exists, driver, log)
            next_s = time.monotonic() + rng.uniform(*pause_s)  # the random time of the fault
            while found.faults.total() < faults and not _ended(driver, next_s):
                next_s = time.monotonic() + TRY_AGAIN_S  # unless somebody is hit now
                root = driver.pid if cluster is None else cluster.pid
                family = family_of(root)
                kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
                if kinds:
                    kind = kinds[found.faults.total()]
                if kind == "driver":
                    # Not while nobody else can be hit, or resuming runs would die most of all.
                    trains = any(c.startswith(TITLES["replicas"]) for _, c in family.values())
                    if not trains or (folder / RESULT).exists() or driver.poll() is not None:
                        continue
                    driver.kill()
                    driver.wait()
                    if cluster is None:
                        await_end(ours(family), "a driver that was killed", END_DEADLINE_S)
                    if (folder / RESULT).exists():
                        break  # it had come to its end just before
                    store = CheckpointStore(RunFolder.open(folder).checkpoints_uri)
                    newest = store.latest()[0]
                    since = _batches_since(folder, store, newest)
                    driver = start_driver(["resume", str(folder), *options], log)
                    if not _until_resumed(newest, driver, log, found.taken_over):
                        found.recomputed += since
                    else:
                        found.taken_over += 1
                    found.resumed += 1
                elif not _kill_one(root, titles_of(kind), rng):
                    continue
                found.faults[kind] += 1
                say(f"chaos: killed {kind}")
                next_s = time.monotonic() + rng.uniform(*pause_s)
            status = driver.wait(deadline_s)
            found.run_s = time.monotonic() - began_s
        finally:
            driver.kill()
        if status != 0 and not (folder / RESULT).exists():
            raise BenchmarkFailed(f"the run ended with {status}:\n{log.read_text()[-3000:]}")
        await_end(ours(family), "the run", END_DEADLINE_S)
        if cluster is None:
            await_end(family, "the run", RAY_END_DEADLINE_S)
        result = json.loads((folder / RESULT).read_text())
        check_exactly_once(folder, result["epochs"])
        found.accuracy, found.best_accuracy = result["accuracy"], result["best_accuracy"]
        found.duplicates = result["duplicates"]
        found.recomputed += _run_again(folder)
    found.wall_s = time.monotonic() - began_s
    return found


def _run_again(folder: Path) -> int:
    """Mini-batches that the run says it leased again."""
    lines = (folder / EVENTS).read_text().splitlines() if (folder / EVENTS).exists() else []
    told = re.compile(r"([\d,]+) mini-batches are run again")
    found = (told.match(json.loads(line)["event"]) for line in lines)
    return sum(int(one[1].replace(",", "")) for one in found if one)


def _batches_since(folder: Path, store: CheckpointStore, newest: Checkpoint | None) -> int:
    """Mini-batches that were trained since a checkpoint, as far as the metrics tell."""
    lines = (folder / METRICS).read_text().splitlines()
    trained = [json.loads(x).get("examples", 0) for x in lines if x.endswith("}")]
    saved = 0
    if newest is not None:
        files, base = pyarrow.fs.LocalFileSystem(), store.folder_uri(newest.number)
        path = f"{base.removeprefix('file://')}/{newest.files[0].name}"
        meta: Any = snapshot.read(files, path).meta
        saved = int(meta["examples"])
    return max(0, (trained[-1] if trained else 0) - saved) * BATCHES_AN_EPOCH // EXAMPLES_AN_EPOCH


def check_exactly_once(folder: Path, epochs: int) -> None:
    """From the last checkpoint: every partition applied every mini-batch of every epoch, once."""
    store = CheckpointStore(RunFolder.open(folder).checkpoints_uri)
    checkpoint, passed = store.latest()
    if checkpoint is None:
        raise BenchmarkFailed(f"no checkpoint is left: {passed}")
    files = pyarrow.fs.LocalFileSystem()
    for file in checkpoint.files:
        path = f"{store.folder_uri(checkpoint.number).removeprefix('file://')}/{file.name}"
        meta: Any = snapshot.read(files, path, file.sha256).meta
        applied = meta["applied"]
        wanted = {str(epoch): [] for epoch in range(epochs)}
        if applied != {"num_batches": BATCHES_AN_EPOCH, "complete": wanted}:
            raise BenchmarkFailed(f"{file.name} holds {applied}")
        # Those of a mini-batch that was applied twice would be too many.
        if meta["witness"][0] != epochs * BATCHES_AN_EPOCH:
            raise BenchmarkFailed(f"{meta['witness'][0]} mini-batches went into {file.name}")
        if meta["examples"] != epochs * EXAMPLES_AN_EPOCH:
            raise BenchmarkFailed(f"{file.name} has applied {meta['examples']} examples")


def start_driver(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    before_ray("local", environment)  # as what holds a cluster has it
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "downpour", *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )


def _ended(driver: subprocess.Popen[bytes], until_s: float) -> bool:
    """Wait until a moment, or for the driver's end if that comes before; whether it did."""
    try:
        driver.wait(max(0.0, until_s - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


def until(ready: Callable[[], bool], driver: subprocess.Popen[bytes], log: Path) -> None:
    give_up_s = time.monotonic() + DEADLINE_S
    while not ready():
        if driver.poll() not in (None, 0) or time.monotonic() > give_up_s:
            raise BenchmarkFailed(f"it did not come so far:\n{log.read_text()[-3000:]}")
        time.sleep(LOOK_EVERY_S)


def _until_resumed(
    newest: Any, driver: subprocess.Popen[bytes], log: Path, taken_over: int
) -> bool:
    """Wait until a run is resumed; returns whether its processes had outlived their driver.

    If not, it has to begin with the newest checkpoint that there was. `taken_over` says how often
    they had before.
    """
    wanted = (
        "starting from the beginning"
        if newest is None
        else f"resuming from checkpoint {newest.number} at {newest.updates:,}"
    )

    def said() -> str:
        return re.sub(r"\s+", " ", log.read_text())

    until(lambda: wanted in said() or said().count(OUTLIVED) > taken_over, driver, log)
    return said().count(OUTLIVED) > taken_over


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A Ray that outlives the drivers of its runs."""

    address: str
    pid: int
    """The process that all of it descends from."""


@contextlib.contextmanager
def ray_cluster() -> Iterator[Cluster]:
    """A Ray on this machine, held by a process of its own."""
    with Child("Ray", ["-m", "downpour.benchmarks.chaos", HOLD]) as child:
        said = re.compile(r"^cluster (\S+)$", re.MULTILINE)
        until(lambda: said.search(child.log.read_text()) is not None, child.process, child.log)
        found = said.search(child.log.read_text())
        assert found is not None
        yield Cluster(address=found[1], pid=child.process.pid)


def _hold_ray() -> None:
    """Start a Ray, say where it is, and hold it until this process is killed."""
    with on_ray(address="local", dashboard=False):
        import ray

        print(f"cluster {ray.get_runtime_context().gcs_address}", flush=True)
        signal.pause()


def titles_of(kind: str) -> tuple[str, ...]:
    return (TITLES[kind], FOLLOWER) if kind == "partition" else (TITLES[kind],)


def idle_spares(driver: int) -> set[int]:
    """The spares below a driver that have not taken anybody's place: they use no processor."""
    before = {p.pid: p.cpu_s for p in descendants(driver).values() if SPARE in p.command}
    if not before:
        return set()
    time.sleep(IDLE_S)  # over which is looked
    after = descendants(driver)
    return {pid for pid, cpu_s in before.items() if pid in after and after[pid].cpu_s == cpu_s}


def _kill_one(driver: int, titles: tuple[str, ...], rng: random.Random) -> bool:
    idle = idle_spares(driver)
    family = descendants(driver).values()
    victims = sorted(p.pid for p in family if p.command.startswith(titles) and p.pid not in idle)
    if not victims:
        return False
    try:
        os.kill(rng.choice(victims), signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def family_of(driver: int) -> dict[int, tuple[str, str]]:
    """What runs below a driver: by number, when it was started (numbers come again) and what."""
    found = {p.pid: (started_at(p.pid), p.command) for p in descendants(driver).values()}
    return {pid: (started, command) for pid, (started, command) in found.items() if started}


def ours(family: dict[int, tuple[str, str]]) -> dict[int, tuple[str, str]]:
    """Those of a family that are this system's actors, and not Ray's own."""
    titles = (*TITLES.values(), FOLLOWER)
    return {pid: about for pid, about in family.items() if about[1].startswith(titles)}


def await_end(family: dict[int, tuple[str, str]], what: str, deadline_s: float) -> None:
    """Nothing that the run started may outlive it; with its processes end memory and sockets."""
    give_up_s = time.monotonic() + deadline_s
    while left := [f"{pid} ({c})" for pid, (s, c) in family.items() if started_at(pid) == s]:
        if time.monotonic() > give_up_s:
            raise BenchmarkFailed(f"{what} left processes behind: {', '.join(left)}")
        time.sleep(LOOK_EVERY_S)


def started_at(pid: int) -> str:
    """When a process was started, as the kernel counts; nothing for one that runs no more."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def main(argv: Sequence[str]) -> int:
    """One run, added to a record of others."""
    if list(argv) == [HOLD]:
        _hold_ray()
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m downpour.benchmarks.chaos", description=__doc__
    )
    parser.add_argument("--seed", type=int, required=True, help="what the faults are drawn from")
    parser.add_argument("--faults", type=int, default=FAULTS_A_RUN, help="most in this run")
    parser.add_argument("--into", type=Path, required=True, help="record that the run is added to")
    parser.add_argument("--epochs", type=int, help="how long the run is; default: the recipe's")
    parser.add_argument(
        "--hot-standby",
        action="store_true",
        help="give the partition a follower, which is hit like it",
    )
    given = parser.parse_args(argv)
    arguments = [] if given.epochs is None else ["--epochs", str(given.epochs)]
    if given.hot_standby:
        arguments.append("--hot-standby")
    progress, about = Console(stderr=True), machine()
    with alone():
        found = disturbed(given.faults, arguments, seed=given.seed, say=progress.print)
    report = add(found, arguments, given.into, about)
    show(report, Console())
    return 0


def add(found: Disturbed, arguments: Sequence[str], into: Path, about: dict[str, Any]) -> Report:
    """Add a run to a record, which others may be adding to at the same time.

    Raises `BadSettings` where the record is of runs of another length.
    """
    with into.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = json.loads(into.read_text()) if into.exists() else None
        if before is not None and before["configuration"]["arguments"] != list(arguments):
            theirs = " ".join(before["configuration"]["arguments"]) or "the recipe as it is"
            raise BadSettings(f"{into} holds runs of {theirs}: give another file")
        plain = [] if before is None else before["rounds"]
        runs = [Disturbed(**r | {"faults": Counter(r["faults"])}) for r in plain]
        report = _report([*runs, found], arguments)
        partial = into.with_suffix(".partial")
        about_all = record(report, Settings(), about)
        del about_all["settings"]
        words = (
            "python -m downpour.benchmarks.chaos --seed SEED --faults FAULTS --into FILE",
            *arguments,
        )
        about_all["command"] = " ".join(words)
        partial.write_text(json.dumps(about_all, indent=2) + "\n")
        partial.rename(into)
    return report


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
