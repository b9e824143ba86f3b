"""What becomes of every kind of source in `foreign`, from `ingest` to `predict`, as a table.

    python -m tests.helpers.outcomes docs/data.md [ingest]

runs each kind through `ingest`, `train --epochs 1`, `evaluate` and `predict` on one Ray, and writes
the table between the markers of the page. With `ingest` it has no column for the last three.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from pathlib import Path

from torch import nn

import downpour
from downpour.cluster.cli.commands import downpour as command
from downpour.cluster.errors import run_cli
from downpour.cluster.training.session import on_ray
from downpour.shuffler.dataset.records import split_names
from tests.helpers.foreign import KINDS
from tests.helpers.source_makers import FILES

BEGIN, END = "<!-- outcomes -->", "<!-- end of outcomes -->"
NET = f"{__name__.replace('__main__', 'tests.helpers.outcomes')}:net"


def net(num_classes: int) -> nn.Module:
    """A small net."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4),
        downpour.BatchNorm(4),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )


def run(*arguments: object) -> tuple[int, list[str]]:
    """Run a command; return its exit status and the last lines that it printed."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        status = run_cli(command, [str(a) for a in arguments])
    return status, [line for line in told.getvalue().splitlines() if line.strip()]


def _check_told(status: int, lines: list[str]) -> None:
    """Check that a refusal is one line, and the last."""
    errors = [number for number, line in enumerate(lines) if "error: " in line]
    assert errors == ([len(lines) - 1] if status else []), lines


def outcome(name: str, root: Path, *, ingest_only: bool) -> tuple[str, ...]:
    """Return a kind's cells: what it is, `ingest`, and what the other commands do."""
    kind = KINDS[name]
    source, data = root / "source", root / "data"
    kind.make(source)
    options = [
        word
        for option, value in kind.options.items()
        for entry in (value.items() if isinstance(value, dict) else [(None, value)])
        for word in (
            f"--{option.replace('_', '-')}",
            entry[1] if entry[0] is None else f"{entry[0]}={entry[1]}",
        )
    ]
    status, lines = run("ingest", source, data, *options)
    shown = kind.says.replace("|", "/")
    _check_told(status, lines)
    if status:
        return (kind.words, "refused", shown, *(() if ingest_only else ("",)))
    if ingest_only:
        return (kind.words, "taken", shown)
    train = ("train", "classifier", "--model", NET, "--data", data, "--runs", root / "runs")
    splits = split_names(data)
    small = (
        "--name",
        "a",
        "--epochs",
        1,
        "--warmup-epochs",
        0,
        "--batch-size",
        4,
        "--replicas",
        1,
        "--image-size",
        16,
    )
    scored = ("--eval-split", next((s for s in splits if s != "train"), "train"))
    status, lines = run(*train, *small, *scored)
    _check_told(status, lines)
    if status:
        return (kind.words, "taken", shown, "`train`: " + lines[-1].partition("error: ")[2])
    (root / "one.png").write_bytes(FILES[0])
    for more in (("evaluate", root / "runs/a"), ("predict", root / "runs/a", root / "one.png")):
        status, lines = run(*more)
        _check_told(status, lines)
        if status:
            return (kind.words, "taken", shown, f"`{more[0]}`: {lines[-1]}")
    return (kind.words, "taken", shown, "trains, is scored, predicts")


def table(*, ingest_only: bool) -> list[str]:
    """Return the table's lines."""
    heads = ("source", "`ingest`", "what is told", "`train`, `evaluate`, `predict`")
    heads = heads[:3] if ingest_only else heads
    rows: list[tuple[str, ...]] = [heads, ("---",) * len(heads)]
    for name in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(
                tuple(
                    c.replace(folder, "")
                    for c in outcome(name, Path(folder), ingest_only=ingest_only)
                )
            )
            print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)  # noqa: T201
    return [f"| {' | '.join(row)} |" for row in rows]


def main() -> None:
    """Write the table into the page that is named."""
    page = Path(sys.argv[1])
    ingest_only = "ingest" in sys.argv[2:]
    with contextlib.nullcontext() if ingest_only else on_ray(address=None, dashboard=False):
        lines = table(ingest_only=ingest_only)
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text("\n".join([before + BEGIN, "", *lines, "", END]) + after)


if __name__ == "__main__":
    main()
