"""Section 4.2.2: Inception and its batch-normalised variants, Figures 2 and 3."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster import inception_recipes, recipes
from cluster.config import RunConfig, to_plain
from cluster.options import apply
from cluster.reproduce.report import (
    new_figure,
    paragraph,
    picture,
    save_figure,
    table,
    write_report,
)
from cluster.reproduce.runs import Curve, fitted, with_network

PAPER: dict[str, tuple[float | None, float | None]] = {
    "inception": (31.0e6, 0.722),
    "bn-baseline": (13.3e6, 0.727),
    "bn-x5": (2.1e6, 0.730),
    "bn-x30": (2.7e6, 0.748),
    "bn-x5-sigmoid": (None, 0.698),
}
"""Figure 3: steps to 72.2%, and the highest accuracy."""
FAILURES = ("inception-x5", "inception-sigmoid")
"""What the paper tells of without figures: one blows up, the other stays at chance."""


def family(given: Mapping[str, object]) -> dict[str, RunConfig]:
    """The five variants and the two failures, with the user's options."""
    runs = {name: fitted(recipes.find(name), given) for name in PAPER}
    fast = apply(runs["inception"], {"learning_rate": 5 * inception_recipes.RATE})
    fast = apply(fast, {"max_refused": None})
    runs["inception-x5"] = with_network(fast, "inception-x5")
    slow = apply(runs["inception"], {"max_refused": None})
    runs["inception-sigmoid"] = with_network(slow, "inception-sigmoid", activation="sigmoid")
    return runs


def figure_3(curves: Mapping[str, Curve]) -> list[dict[str, Any]]:
    """The table: steps to Inception's best accuracy, and the best accuracy, beside the paper's."""
    goal = curves["inception"].best
    base = curves["inception"].first_at(goal)
    rows = []
    for name, curve in curves.items():
        steps, (paper_steps, paper_best) = curve.first_at(goal), PAPER.get(name, (None, None))
        rows.append(
            {
                "variant": name,
                "steps": steps,
                "share_of_inceptions": steps / base if steps and base else None,
                "best": curve.best,
                "paper_steps": paper_steps,
                "paper_share": paper_steps / 31.0e6 if paper_steps else None,
                "paper_best": paper_best,
                "failure": curve.failure,
            }
        )
    return rows


def findings(rows: list[dict[str, Any]], chance: float) -> list[tuple[str, str, bool]]:
    """What the paper found, what was found here, and whether the two agree."""
    by_name = {row["variant"]: row for row in rows}

    def within(name: str, bound: float) -> tuple[str, bool]:
        share = by_name[name]["share_of_inceptions"]
        told = "never reached it" if share is None else f"{share:.2f} of Inception's steps"
        return told, share is not None and share <= bound

    best = max((row for row in rows if row["variant"] in PAPER), key=lambda row: row["best"])
    sigmoid, plain = (by_name[n]["best"] for n in ("bn-x5-sigmoid", "inception-sigmoid"))
    fast = by_name["inception-x5"]
    found = [
        ("BN-Baseline needs less than half the steps", *within("bn-baseline", 0.5)),
        ("BN-x5 needs a fourteenth of the steps (here: at most a tenth)", *within("bn-x5", 0.1)),
        (
            "BN-x30 ends highest",
            f"{best['variant']} does, at {best['best']:.2%}",
            best["variant"] == "bn-x30",
        ),
        (
            "with sigmoids it learns with BN and stays at chance without",
            f"{sigmoid:.2%} with, {plain:.2%} without; chance is {chance:.2%}",
            sigmoid > 3 * chance and plain < 2 * chance,
        ),
        (
            "Inception at 5 times the rate blows up",
            fast["failure"] or f"it reached {fast['best']:.2%}",
            fast["failure"] is not None or fast["best"] < 2 * chance,
        ),
    ]
    return [(claim, told, agrees) for claim, told, agrees in found]


def make_report(
    folder: Path, runs: Mapping[str, RunConfig], curves: Mapping[str, Curve], command: str
) -> Path:
    """Write Figures 2 and 3; returns the page's path."""
    rows = figure_3(curves)
    config = runs["inception"]
    chance = 1 / config.model.num_classes
    _figure_2(folder / "figure-2.png", curves)
    told = findings(rows, chance)
    cells = [
        [
            row["variant"],
            row["steps"],
            row["share_of_inceptions"],
            f"{row['best']:.2%}",
            row["paper_share"],
            "–" if row["paper_best"] is None else f"{row['paper_best']:.1%}",
        ]
        for row in rows
    ]
    header = ["", "steps to Inception's best", "share", "best", "paper: share", "paper: best"]
    model = config.model
    hours = sum(c.seconds or 0 for c in curves.values()) / 3600
    parts = [
        paragraph(
            f"{config.data.data}, {model.num_classes} classes, {model.input.height} pixels, width "
            f"{model.width or 1:g}, {config.policy.epochs} epochs, seed {config.policy.seed}; "
            f"{config.replicas.replicas} replicas with {config.replicas.steps.concurrent_steps} "
            f"steps each, mini-batches of {config.data.batch_size}. {hours:.2f} hours in all."
        ),
        picture("figure-2.png", "Figure 2: accuracy on the evaluation split against updates"),
        table(header, cells),
        table(
            ["the paper found", "here", "agrees"],
            [[claim, found, "yes" if agrees else "no"] for claim, found, agrees in told],
        ),
    ]
    data = {
        "figure_3": rows,
        "findings": [{"paper": c, "here": f, "agrees": a} for c, f, a in told],
        "hours": hours,
        "curves": {
            name: {"updates": curve.updates, "accuracy": curve.accuracy, "seconds": curve.seconds}
            for name, curve in curves.items()
        },
        "configurations": {name: to_plain(run) for name, run in runs.items()},
    }
    title = "Section 4.2: Inception and its batch-normalised variants (Figures 2 and 3)"
    return write_report(folder, title, parts, command=command, data=data)


def _figure_2(path: Path, curves: Mapping[str, Curve]) -> None:
    figure, (axes,) = new_figure(1, width=9, height=5)
    for name, curve in curves.items():
        style = "--" if name in FAILURES else "-"
        axes.plot(curve.updates, curve.accuracy, style, label=name, linewidth=1.2)
    axes.axhline(curves["inception"].best, color="#8a8f98", linewidth=0.7)
    axes.set_xlabel("updates")
    axes.set_ylabel("accuracy@1")
    axes.legend(frameon=False)
    save_figure(figure, path)
