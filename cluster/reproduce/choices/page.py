"""The page on section 4.1's open choices, from the records of their nets."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from downpour.cluster.reproduce.choices.choice import ChoicesConfig
from downpour.cluster.reproduce.choices.training import TRAINING_ROWS, NetRecord
from downpour.cluster.reproduce.report import (
    new_figure,
    paragraph,
    picture,
    save_figure,
    table,
    write_report,
)
from downpour.shuffler.dataset.bundled import BUNDLED_MNIST

PAPER = 0.98
"""Where Figure 1(a) has the net with BN at the end, or a little above, read off the figure."""
_SCORES = ("population", "moving", "by_batch", "best_look", "training")


def summary(config: ChoicesConfig, records: Sequence[NetRecord]) -> list[dict[str, Any]]:
    """Return the scores of each choice: those of its nets, their mean and standard deviation.

    `best_look` is the highest test accuracy at a look, with moving averages.
    """
    rows = []
    for choice in config.chosen:
        nets = [record for record in records if record.choice == choice.name]
        values = {
            score: [max(net.looks) if score == "best_look" else getattr(net, score) for net in nets]
            for score in _SCORES
        }
        rows.append(
            {
                "choice": choice.name,
                "told": choice.told,
                "seeds": [net.seed for net in nets],
                **{
                    score: {
                        "mean": statistics.fmean(found),
                        "deviation": statistics.stdev(found) if len(found) > 1 else None,
                        "nets": found,
                    }
                    for score, found in values.items()
                },
            }
        )
    return rows


def make_report(
    folder: Path, config: ChoicesConfig, records: Sequence[NetRecord], command: str
) -> Path:
    """Write the figure and the report; return the page's path."""
    rows = summary(config, records)
    _figure(folder / "choices.png", rows)
    cells = [
        [
            row["choice"],
            row["told"],
            _told(row["population"]),
            _told(row["moving"]),
            _told(row["by_batch"]),
            _told(row["best_look"]),
            f"{row['training']['mean']:.2%}",
        ]
        for row in rows
    ]
    header = ["choice", "what it changes", "Algorithm 2", "moving averages", "test mini-batches"]
    header += ["best look", "on training images"]
    above = [row["choice"] for row in rows if row["population"]["mean"] > PAPER]
    mean, spread = "", ""
    if config.seeds > 1:
        mean = " in the mean over seeds"
        spread = "Mean over seeds, with the least and the most in brackets. "
    parts = [
        paragraph(
            "What section 4.1 leaves open, one choice at a time: the net with BN of `reproduce "
            f"mnist` and others that differ from it in one thing. {config.steps:,} steps on "
            f"mini-batches of {config.batch_size}, {_seeds(config.seeds)}. Nets of one seed "
            "have the same mini-batches and the same random numbers for their weights."
        ),
        paragraph(
            f"Test accuracy is above {PAPER:.0%}{mean} with "
            f"{', '.join(above) if above else 'none of them'}. The test split has 10,000 images, "
            "so an accuracy of 98% has a standard error of 0.14% beside the spread over seeds."
        ),
        picture("choices.png", "Test accuracy at the end, each net a dot, their mean a line"),
        table(header, cells),
        paragraph(
            f"{spread}Accuracy at the end by three kinds of BN statistics: recomputed by Algorithm "
            "2, the moving averages of section 3.1, and those of test mini-batches, as in "
            "training. The best look is chosen "
            "on the test images, by moving averages, so it is too high. The last column is "
            f"accuracy on {TRAINING_ROWS:,} training images."
        ),
    ]
    if config.left_out:
        names = ", ".join(choice.name for choice in config.left_out)
        parts.append(
            paragraph(f"Left out, because they need MNIST's grey images (--grey): {names}.")
        )
    data = {
        "config": _shown(config),
        "choices": rows,
        "nets": [dataclasses.asdict(record) for record in records],
    }
    title = "Section 4.1: what the text leaves open"
    return write_report(folder, title, parts, command=command, data=data)


def _told(score: Mapping[str, Any]) -> str:
    nets = score["nets"]
    mean = f"{score['mean']:.2%}"
    return mean if len(nets) < 2 else f"{mean} ({min(nets):.2%} to {max(nets):.2%})"


def _seeds(count: int) -> str:
    return f"seeds 0 to {count - 1}" if count > 1 else "one seed"


def _shown(config: ChoicesConfig) -> dict[str, Any]:
    """Return the configuration without paths of this machine."""
    values = dataclasses.asdict(config)
    values["chosen"] = [dataclasses.asdict(choice) for choice in config.chosen]
    return values | ({"data": "bundled"} if config.data == BUNDLED_MNIST else {})


def _figure(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    figure, (axes,) = new_figure(1, width=8, height=1.2 + 0.28 * len(rows))
    for place, row in enumerate(rows):
        nets = row["population"]["nets"]
        axes.plot(nets, [place] * len(nets), "o", color="#2a9d5c", markersize=4, alpha=0.8)
        axes.plot([row["population"]["mean"]], [place], "|", color="#1b1b1b", markersize=12)
    axes.axvline(PAPER, color="#8a8f98", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["choice"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy at the end, by Algorithm 2's statistics")
    save_figure(figure, path)
