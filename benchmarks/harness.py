"""What a benchmark is asked for and what it gives: settings, a report, how it is shown and kept.

Not here: any measurement.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from downpour.benchmarks.baselines.common import INPUTS, LABELS, TEST
from downpour.cluster.config.paths import checkout
from downpour.cluster.errors import UserError
from downpour.shuffler.dataset.bundled import BUNDLED_MNIST
from downpour.shuffler.processors import processors

RESULTS = Path("benchmarks", "results")
"""Where records are kept, in a checkout; otherwise in the working directory."""

Say = Callable[[str], None]
"""Tells people what is going on."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much to measure. Frozen, so that it can be kept beside what was measured."""

    repeat: int = 3
    """Rounds; in each, everything that is compared runs once, one after the other."""
    seconds: float = 10.0
    """How long each is measured in steady state, in a round."""
    warmup_s: float = 4.0
    """How long each runs before that."""
    quick: bool = False
    """Only show that it works: one short round with few workers and no dashboard."""
    only: tuple[str, ...] = ()
    """Peers or sizes to run, besides the limit; all if empty."""
    seeds: int = 3
    """Seeds with which each setting learns, where learning is compared."""
    settings_from: str | None = None
    """A record whose settings are taken in place of a search, where learning is compared."""

    def __post_init__(self) -> None:
        if self.repeat < 1:
            raise BadSettings(f"repeat is {self.repeat}: give at least 1")
        if self.seeds < 1:
            raise BadSettings(f"seeds is {self.seeds}: give at least 1")
        if not 0 < self.seconds < float("inf"):
            raise BadSettings(f"seconds is {self.seconds}: give a number above 0")

    def arguments(self) -> list[str]:
        """The options of `downpour bench` that give these settings."""
        if self.quick:
            return ["--quick", *self._only()]
        seeds = [] if self.seeds == Settings.seeds else ["--seeds", str(self.seeds)]
        times = ["--repeat", str(self.repeat), "--seconds", f"{self.seconds:g}"]
        source = [] if self.settings_from is None else ["--settings-from", self.settings_from]
        return [*times, *seeds, *source, *self._only()]

    def _only(self) -> list[str]:
        return [word for name in self.only for word in ("--only", name)]

    @classmethod
    def quickly(cls, only: tuple[str, ...] = ()) -> Settings:
        """Enough to show that everything works."""
        return cls(repeat=1, seconds=0.5, warmup_s=0.2, quick=True, only=only, seeds=1)


class BadSettings(UserError, ValueError):
    """A setting of a benchmark is out of range."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What came out of one benchmark."""

    name: str
    """As `downpour bench` calls it."""
    title: str
    """What was measured, on one line."""
    columns: tuple[str, ...]
    """Of the table for people; the first is text."""
    rows: tuple[tuple[str, ...], ...]
    """Of the same table."""
    notes: tuple[str, ...] = ()
    """Lines below it."""
    configuration: dict[str, Any]
    """What decides the numbers, apart from code and machine."""
    result: dict[str, Any]
    """The numbers: medians over the rounds."""
    rounds: list[Any] = field(default_factory=list)
    """Raw output, round by round."""


def median(values: Sequence[float]) -> float:
    """The median, which one bad round does not move."""
    return float(statistics.median(values))


def machine() -> dict[str, Any]:
    """The machine and the versions, as far as they matter to speed."""
    return {
        "processor": _first("/proc/cpuinfo", "model name") or platform.processor(),
        "processors": processors(),
        "memory": _first("/proc/meminfo", "MemTotal"),
        "kernel": platform.release(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "ray", "numpy")},
        "commit": _commit(),
    }


def _first(path: str, key: str) -> str | None:
    with contextlib.suppress(OSError):
        for line in Path(path).read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return None


def _commit() -> str | None:
    """The commit that was measured, with `-dirty` if files differ from it; None from a wheel."""
    root = checkout()
    if root is None:
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            command, cwd=root, capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()
    return None


def record(report: Report, settings: Settings, about: dict[str, Any]) -> dict[str, Any]:
    """All of a report as plain data, with command, date, machine and configuration."""
    return {
        "benchmark": report.name,
        "title": report.title,
        "command": shlex.join(["downpour", "bench", report.name, *settings.arguments()]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": about,
        "settings": dataclasses.asdict(settings),
        "configuration": report.configuration,
        "result": report.result,
        "rounds": report.rounds,
    }


def save(plain: dict[str, Any]) -> Path:
    """Keep a record in `RESULTS`, whole or not at all; return its path.

    Raises:
        UserError: it cannot be written.
    """
    date = datetime.datetime.fromisoformat(plain["date"]).strftime("%Y%m%d-%H%M%S")
    folder = (checkout() or Path.cwd()) / RESULTS
    path = folder / f"{plain['benchmark']}-{date}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(plain, indent=2) + "\n")
        partial.rename(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}; leave out --save and use --json"
        ) from None
    return path


def show(report: Report, console: Console) -> None:
    """Print the table."""
    table = Table(title=report.title, title_justify="left", title_style="bold", box=box.SIMPLE)
    for index, column in enumerate(report.columns):
        table.add_column(column, justify="right" if index else "left")
    for row in report.rows:
        table.add_row(*row)
    console.print(table)
    for note in report.notes:
        console.print(note, style="dim", highlight=False)


@contextlib.contextmanager
def decoded_mnist(quick: bool, *, test: bool = False) -> Iterator[str]:
    """A folder with the bundled training split, decoded once for all plain loops.

    With `test` the test split is there too, in files whose names begin with `TEST`. `quick` leaves
    the first few thousand examples.
    """
    with tempfile.TemporaryDirectory(prefix="downpour-bench-") as folder:
        _decode_mnist("train", 4096 if quick else None, Path(folder), "")
        if test:
            _decode_mnist("test", 1000 if quick else None, Path(folder), TEST)
        yield folder


def _decode_mnist(split: str, limit: int | None, folder: Path, prefix: str) -> None:
    from downpour.cluster.config.recipes import BINARY_MNIST
    from downpour.shuffler.dataset.reader import RowReader
    from downpour.shuffler.dataset.records import Dataset
    from downpour.shuffler.images.decode import decode

    dataset = Dataset.open(BUNDLED_MNIST, split)
    rows = np.arange(min(dataset.num_rows, limit or dataset.num_rows), dtype=np.int64)
    with contextlib.closing(RowReader(dataset)) as reader:
        inputs, labels = decode(reader.take(rows), BINARY_MNIST, rows=rows)
    np.save(folder / f"{prefix}{INPUTS}", inputs)
    np.save(folder / f"{prefix}{LABELS}", labels)
