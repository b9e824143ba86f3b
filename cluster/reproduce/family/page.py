"""The page of section 4.2.2: Figures 2 and 3, the findings, and how rates were chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from downpour.cluster.config import inception_recipes
from downpour.cluster.config.plain import to_plain
from downpour.cluster.config.run import RunConfig
from downpour.cluster.reproduce.family.experiment import (
    ALL_IN_FLIGHT,
    FLAT,
    by_variant,
    figure_3,
    findings,
    late_gain,
    spread,
)
from downpour.cluster.reproduce.report import (
    heading,
    new_figure,
    paragraph,
    picture,
    save_figure,
    table,
    write_report,
)
from downpour.cluster.reproduce.runs import Curve, curve_as_data

_POINTS = 200
"""Of a mean curve over several runs."""


def make_report(
    folder: Path,
    runs: Mapping[str, RunConfig],
    curves: Mapping[str, Curve],
    command: str,
    *,
    tried: Mapping[float, Curve] | None = None,
) -> Path:
    """Write Figures 2 and 3; return the page's path.

    `tried` has the short runs by which Inception's rate was chosen; it is empty if the rate was
    given.
    """
    rows = figure_3(curves)
    config = runs["inception"]
    plain = by_variant(curves)["inception"]
    seeds = len(plain)
    chance = 1 / config.model.num_classes
    _figure_2(folder / "figure-2.png", curves)
    told = findings(rows, chance)
    cells = [
        [
            row["variant"],
            row["runs"],
            runs[row["variant"]].server.schedule.learning_rate,
            row["steps"],
            _range(row["share_of_inceptions"], row["shares"], "{:.2f}"),
            _range(row["best"], row["bests"], "{:.1%}"),
            f"{row['final']:.1%}",
            row["paper_share"],
            "–" if row["paper_best"] is None else f"{row['paper_best']:.1%}",
        ]
        for row in rows
    ]
    header = ["", "runs", "rate", "steps to Inception's best", "share", "best", "at the end"]
    header += ["paper: share", "paper: best"]
    model = config.model
    hours = sum(c.seconds for c in (*curves.values(), *(tried or {}).values())) / 3600
    parts = [
        paragraph(
            f"{config.data.data}, {model.num_classes} classes, {model.pictures.height} pixels, "
            f"width {model.width or 1:g}, {config.policy.epochs} epochs, "
            f"seeds from {config.policy.seed} on; "
            f"{config.replicas.replicas} replicas with {config.replicas.steps.concurrent_steps} "
            f"steps each, mini-batches of {config.data.batch_size}. {hours:.2f} hours in all."
        ),
        paragraph(
            "Accuracy was looked at every "
            f"{max(curve.interval for curve in curves.values()):,} updates or more often; steps "
            "are those at the first look that shows the accuracy. "
            + (
                f"Numbers are medians over up to {seeds} runs, with the least and the most in "
                "brackets; the goal of a run is the best accuracy of Inception's with its seed."
                if seeds > 1
                else ""
            )
        ),
        paragraph(_told_of_the_end(plain)),
        picture("figure-2.png", "Figure 2: accuracy on the evaluation split against updates"),
        table(header, cells),
        table(
            ["the paper found", "here", "agrees"],
            [[claim, found, "yes" if agrees else "no"] for claim, found, agrees in told],
        ),
        *_told_of_rates(tried or {}, runs),
    ]
    data = {
        "figure_3": rows,
        "findings": [{"paper": c, "here": f, "agrees": a} for c, f, a in told],
        "hours": hours,
        "curves": {name: curve_as_data(curve) for name, curve in curves.items()},
        "tried_rates": {f"{rate:g}": curve_as_data(c) for rate, c in (tried or {}).items()},
        "configurations": {name: to_plain(run) for name, run in runs.items()},
    }
    title = "Section 4.2: Inception and its batch-normalised variants (Figures 2 and 3)"
    return write_report(folder, title, parts, command=command, data=data)


def _told_of_rates(tried: Mapping[float, Curve], runs: Mapping[str, RunConfig]) -> list[str]:
    """Say how rates and decay were chosen."""
    schedule = runs["inception"].server.schedule
    parts = [
        heading("Rates"),
        paragraph(
            f"Inception's rate is {schedule.learning_rate:g} (the paper's, for its network on "
            f"ImageNet: {inception_recipes.RATE:g}), times {schedule.decay_factor:g} every "
            f"{schedule.decay_epochs:.3g} epochs; where the paper modifies the training (x5, x30), "
            "6 times as often. The variants' rates are as many times Inception's as in the "
            "paper."
        ),
    ]
    if tried:
        others = [
            [f"{rate:g}", f"{curve.best:.2%}", curve.updates[-1] if curve.updates else None]
            for rate, curve in tried.items()
        ]
        edge = schedule.learning_rate in (min(tried), max(tried))
        parts += [
            paragraph(
                "It was chosen by short runs of plain Inception, for the highest accuracy"
                + (": it lies at the edge of what was tried." if edge else ".")
            ),
            table(["Inception's rate", "best accuracy", "updates"], others),
        ]
    return parts


def _told_of_the_end(curves: Sequence[Curve]) -> str:
    """Say whether Inception had stopped getting better, and by what rule."""
    rule = (
        "The rule: the mean accuracy of the last quarter of its updates is at most "
        f"{FLAT:.1%} above that of the quarter before"
    )
    gains = [late_gain(curve) for curve in curves]
    known = [gain for gain in gains if gain is not None]
    if len(known) < len(gains):
        return (
            f"There are too few looks to say whether Inception had stopped getting better. {rule}."
        )
    stopped = sum(gain <= FLAT for gain in known)
    told = ", ".join(f"{gain:+.2%}" for gain in known)
    if stopped == len(known):
        verdict = "Inception had stopped getting better"
    else:
        verdict = (
            f"Inception was still getting better in {len(known) - stopped} of {len(known)} runs, "
            "so its best is where they were ended and shares are too high"
        )
    return f"{verdict}. {rule} (here {told})."


def _range(middle: float | None, values: Sequence[float | None], form: str) -> str:
    """Return a median, with the least and the most if there are several values."""
    text = "–" if middle is None else form.format(middle)
    return text + spread(values, form, "–")


def _figure_2(path: Path, curves: Mapping[str, Curve]) -> None:
    figure, (axes,) = new_figure(1, width=9, height=5)
    variants = by_variant(curves)
    trained = [name for name in variants if not name.endswith(ALL_IN_FLIGHT)]
    colours = {name: f"C{number}" for number, name in enumerate(trained)}
    for name, runs in variants.items():
        style = "--" if name in inception_recipes.FAILURES else "-"
        if name.endswith(ALL_IN_FLIGHT):
            style = ":"
        colour = colours[name.removesuffix(ALL_IN_FLIGHT)]
        updates, low, mean, high = _band(runs)
        axes.plot(updates, mean, style, label=_label(name, len(runs)), color=colour, linewidth=1.2)
        if len(runs) > 1:
            axes.fill_between(updates, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(max(c.best for c in variants["inception"]), color="#8a8f98", linewidth=0.7)
    axes.set_xlabel("updates")
    axes.set_ylabel("accuracy@1")
    axes.legend(frameon=False)
    save_figure(figure, path)


def _label(name: str, runs: int) -> str:
    told = name.removesuffix(ALL_IN_FLIGHT)
    if told != name:
        return f"{told}, every step in flight"
    return f"{name} ({runs} runs)" if runs > 1 else name


def _band(runs: Sequence[Curve]) -> tuple[Any, Any, Any, Any]:
    """Return updates, and the least, the mean and the most accuracy at them.

    Runs are looked at after different updates, so between looks they are taken as straight.
    """
    import numpy as np

    if len(runs) == 1:
        (run,) = runs
        return run.updates, run.accuracy, run.accuracy, run.accuracy
    looked = [run for run in runs if run.updates]
    begin = max((run.updates[0] for run in looked), default=0)
    end = min((run.updates[-1] for run in looked), default=0)
    updates = np.linspace(begin, end, _POINTS)
    values = np.array([np.interp(updates, run.updates, run.accuracy) for run in looked])
    return updates, values.min(axis=0), values.mean(axis=0), values.max(axis=0)
