"""Does bfloat16 learn as float32 does? Accuracy of both over several seeds, from whole runs.

    python -m downpour.benchmarks.precision [RECIPE] [--seeds 3] [--save] [-- TRAIN OPTIONS]

trains a recipe with each seed in each precision, one run after the other, as `downpour train` does
with the options after `--`. Without any it is the MNIST net for as many epochs as `make demo` takes
to its goal or more. For CIFAR-10:

    python -m downpour.benchmarks.precision bn-baseline -- --data DATA/cifar10 --image-size 32 \
        --num-classes 10 --width 0.25 --epochs 10

Precisions agree if the means of their accuracies differ by no more than the seeds of one of them
do.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from downpour.benchmarks import harness
from downpour.benchmarks.harness import Report, Settings
from downpour.benchmarks.processes import BenchmarkFailed

PRECISIONS = ("float32", "bfloat16")
MNIST_OPTIONS = ("--epochs", "3")
RUN_DEADLINE_S = 24 * 3600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """Accuracies of one precision, by seed."""

    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.accuracies)

    @property
    def range(self) -> float:
        """Between the best and the worst seed."""
        return max(self.accuracies) - min(self.accuracies)


def agree(a: Spread, b: Spread) -> bool:
    """Whether the means differ by no more than the seeds of one of them do."""
    return abs(a.mean - b.mean) <= max(a.range, b.range)


def train(recipe: str, precision: str, seed: int, options: Sequence[str], runs: Path) -> float:
    """The accuracy at the end of a run.

    Raises:
        BenchmarkFailed: the run fails; the text has its last lines.
    """
    name = f"{precision}-{seed}"
    command = [sys.executable, "-m", "downpour", "train", recipe, "--runs", str(runs)]
    command += ["--name", name, "--precision", precision, "--seed", str(seed), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=RUN_DEADLINE_S, check=False
    )
    if done.returncode:
        last = " ".join(done.stderr.strip().splitlines()[-2:])
        raise BenchmarkFailed(f"the run {name} ended with {done.returncode}: {last}")
    result = json.loads((runs / name / "result.json").read_text())
    return float(result["accuracy"])


def run(recipe: str, seeds: int, options: Sequence[str]) -> Report:
    """Train all of them, seed by seed."""
    found: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    with tempfile.TemporaryDirectory(prefix="downpour-precision-") as folder:
        for seed in range(seeds):
            for precision in PRECISIONS:
                accuracy = train(recipe, precision, seed, options, Path(folder))
                found[precision].append(accuracy)
                line = f"{recipe}, seed {seed}, {precision}: {100 * accuracy:.2f}%"
                print(line, file=sys.stderr, flush=True)
    return report(recipe, options, {p: Spread(accuracies=tuple(a)) for p, a in found.items()})


def report(recipe: str, options: Sequence[str], spreads: dict[str, Spread]) -> Report:
    """The table, and whether they agree."""
    first, second = (spreads[p] for p in PRECISIONS)
    verdict = agree(first, second)
    difference = 100 * (second.mean - first.mean)
    return Report(
        name="precision",
        title=f"accuracy of {recipe} {' '.join(options)}, {len(first.accuracies)} seeds each",
        columns=("", "mean", "range of the seeds", "each"),
        rows=tuple(
            (
                precision,
                f"{100 * spread.mean:.2f}%",
                f"{100 * spread.range:.2f}%",
                ", ".join(f"{100 * a:.2f}" for a in spread.accuracies),
            )
            for precision, spread in spreads.items()
        ),
        notes=(
            f"the means differ by {difference:+.2f} points, "
            f"{'within' if verdict else 'beyond'} the range of the seeds.",
        ),
        configuration={"recipe": recipe, "options": list(options)},
        result={
            "agree": verdict,
            **{
                precision: {"mean": spread.mean, "accuracies": list(spread.accuracies)}
                for precision, spread in spreads.items()
            },
        },
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the exit status is 1 if the precisions do not agree."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options: list[str] = []
    if "--" in words:
        cut = words.index("--")
        words, options = words[:cut], words[cut + 1 :]
    parser = argparse.ArgumentParser(
        prog="python -m downpour.benchmarks.precision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", default="mnist-bn")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help=f"keep the record in {harness.RESULTS}")
    given = parser.parse_args(words)
    if given.seeds < 2:
        parser.error(f"seeds is {given.seeds}: give at least 2, whose spread can be seen")
    if given.recipe == "mnist-bn" and not options:
        options = [*MNIST_OPTIONS]
    machine: dict[str, Any] = harness.machine()
    try:
        found = run(given.recipe, given.seeds, options)
    except BenchmarkFailed as error:
        print(error, file=sys.stderr)
        return 2
    from rich.console import Console

    harness.show(found, Console())
    if given.save:
        settings = Settings(repeat=1, seeds=given.seeds)
        plain = harness.record(found, settings, machine)
        plain["command"] = " ".join(
            ["python", "-m", "downpour.benchmarks.precision", *sys.argv[1:]]
        )
        print(f"kept in {harness.save(plain)}", file=sys.stderr)
    return 0 if found.result["agree"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
