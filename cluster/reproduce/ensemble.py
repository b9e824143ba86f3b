"""Section 4.2.3: crops, and the average of six networks; Figure 4."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from downpour.cluster.config import recipes
from downpour.cluster.config.plain import to_plain
from downpour.cluster.config.run import RunConfig
from downpour.cluster.reproduce.report import paragraph, table, write_report
from downpour.cluster.reproduce.runs import fitted
from downpour.cluster.serving import inference

PAPER = {("one network", 1): (0.252, 0.0782), ("one network", 144): (0.2199, 0.0582)}
PAPER_ENSEMBLE = {("six networks", 144): (0.201, 0.049)}
"""Figure 4: top-1 and top-5 error on ImageNet's validation set."""


def members(given: Mapping[str, object]) -> dict[str, RunConfig]:
    """Return the six networks, with the user's options."""
    names = [name for name in recipes.RECIPES if name.startswith("ensemble-")]
    return {name: fitted(recipes.find(name), given) for name in names}


def errors(
    paths: Sequence[Path],
    *,
    crops: Sequence[int],
    rows: int | None,
    show: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Score the best member and all members together, for each number of crops.

    The best member is the one with the highest accuracy by one crop, on the rows scored here.

    Returns:
        Top-1 and top-5 error of both, for each of `crops`.
    """
    loaded = [inference.load(path) for path in paths]
    alone = []
    for run in loaded:
        show(f"{run.folder.name}: 1 crop")
        alone.append(inference.evaluate([run], data=None, split=None, crops=1, rows=rows))
    best = max(range(len(loaded)), key=lambda i: alone[i]["accuracy"])
    found = []
    for who, runs in (("one network", [loaded[best]]), ("six networks", loaded)):
        for count in crops:
            show(f"{who}: {count} crops")
            score = inference.evaluate(runs, data=None, split=None, crops=count, rows=rows)
            found.append(
                {
                    "who": who,
                    "networks": len(runs),
                    "crops": count,
                    "top1_error": 1 - score["accuracy"],
                    "top5_error": 1 - score["top5_accuracy"],
                    "examples": score["examples"],
                }
            )
    for run, score in zip(loaded, alone, strict=True):
        found.append(
            {
                "who": run.folder.name,
                "networks": 1,
                "crops": 1,
                "top1_error": 1 - score["accuracy"],
                "top5_error": 1 - score["top5_accuracy"],
                "examples": score["examples"],
            }
        )
    return found


def make_report(
    folder: Path, runs: Mapping[str, RunConfig], found: Sequence[Mapping[str, Any]], command: str
) -> Path:
    """Write Figure 4's table; return the page's path."""
    paper = {**PAPER, **PAPER_ENSEMBLE}
    cells = []
    for row in found:
        theirs = paper.get((row["who"], row["crops"]))
        cells.append(
            [
                row["who"],
                row["crops"],
                f"{row['top1_error']:.2%}",
                f"{row['top5_error']:.2%}",
                "–" if theirs is None else f"{theirs[0]:.1%} / {theirs[1]:.2%}",
            ]
        )
    config = next(iter(runs.values()))
    parts = [
        paragraph(
            f"{config.data.data}, {config.model.num_classes} classes, "
            f"{config.model.pictures.height} pixels, width {config.model.width or 1:g}, "
            f"{config.policy.epochs} epochs; "
            f"{found[0]['examples']:,} images. The one network is the member that does best by a "
            "single crop on these images."
        ),
        table(["", "crops", "top-1 error", "top-5 error", "paper, on ImageNet"], cells),
    ]
    data = {
        "errors": list(found),
        "configurations": {name: to_plain(run) for name, run in runs.items()},
    }
    title = "Section 4.2.3: crops and an ensemble of six (Figure 4)"
    return write_report(folder, title, parts, command=command, data=data)
