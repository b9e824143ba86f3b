"""Section 4.2.2: Inception and its batch-normalised variants, Figures 2 and 3.

The paper chose its rates for Inception on ImageNet. At another scale, the rate with which plain
Inception learns best is chosen first, by short runs (`trials`). The rates of the other variants are
derived from it as in the paper: x1, x1, x5, x30, x5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from downpour.cluster.config import inception_recipes, recipes
from downpour.cluster.config.options import apply
from downpour.cluster.config.plain import to_plain
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.cluster.reproduce.report import (
    heading,
    new_figure,
    paragraph,
    picture,
    save_figure,
    table,
    write_report,
)
from downpour.cluster.reproduce.runs import Curve, curve_as_data, fitted, with_network

PAPER: dict[str, tuple[float | None, float | None]] = {
    "inception": (31.0e6, 0.722),
    "bn-baseline": (13.3e6, 0.727),
    "bn-x5": (2.1e6, 0.730),
    "bn-x30": (2.7e6, 0.748),
    "bn-x5-sigmoid": (None, 0.698),
}
"""Figure 3: steps to 72.2%, and the highest accuracy."""
_IN_PROPORTION: dict[str, Callable[[RunConfig], float]] = {
    "learning_rate": lambda config: config.server.schedule.learning_rate,
    "decay_epochs": lambda config: config.server.schedule.decay_epochs,
    "weight_decay": lambda config: config.server.weight_decay,
}
"""Options in which the variants differ by the paper's factors. A user gives Inception's value."""


def family(given: Mapping[str, object], only: Sequence[str] = ()) -> dict[str, RunConfig]:
    """Return the five variants and the two failures, with the user's options.

    Args:
        given: the user's options. Those in `_IN_PROPORTION` are Inception's, and each variant has
            a multiple of them as in the paper. All others are the same for all.
        only: variants to keep besides Inception, which the others are compared with; empty keeps
            all.
    """
    plain = recipes.find("inception")
    runs = {}
    for name in inception_recipes.VARIANTS:
        recipe = recipes.find(name)
        own = {
            option: given[option] * of(recipe) / of(plain)  # type: ignore[operator]
            for option, of in _IN_PROPORTION.items()
            if option in given
        }
        runs[name] = fitted(recipe, {**given, **own})
    rate = runs["inception"].server.schedule.learning_rate
    fast = apply(runs["inception"], {"learning_rate": 5 * rate})
    runs["inception-x5"] = with_network(fast, "inception-x5")
    sigmoid = with_network(runs["inception"], "inception-sigmoid", activation="sigmoid")
    runs["inception-sigmoid"] = sigmoid
    return {n: run for n, run in runs.items() if not only or n == "inception" or n in only}


def trials(
    given: Mapping[str, object], rates: Sequence[float], epochs: int
) -> dict[float, RunConfig]:
    """Return short runs of plain Inception, one for each rate, with the user's other options."""
    if len(set(rates)) != len(rates):
        raise UserError(f"search rates {', '.join(f'{r:g}' for r in rates)}: give each once")
    plain = fitted(recipes.find("inception"), given)
    return {rate: apply(plain, {"learning_rate": rate, "epochs": epochs}) for rate in sorted(rates)}


def best_rate(curves: Mapping[float, Curve], chance: float) -> float:
    """Return the rate of the highest accuracy.

    Raises:
        UserError: no run got above twice `chance`, so nothing tells them apart.
    """
    best = max(curves, key=lambda rate: curves[rate].best)
    if curves[best].best <= 2 * chance:
        raise UserError(
            f"Inception did not learn at any of {', '.join(f'{rate:g}' for rate in curves)} "
            f"(highest accuracy {curves[best].best:.2%}): give other --search-rates, or more "
            "--search-epochs"
        )
    return best


def figure_3(curves: Mapping[str, Curve]) -> list[dict[str, Any]]:
    """Return the rows: steps to Inception's best accuracy, best accuracy, the paper's values."""
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
                "final": curve.final,
                "paper_steps": paper_steps,
                "paper_share": paper_steps / 31.0e6 if paper_steps else None,
                "paper_best": paper_best,
                "failure": curve.failure,
            }
        )
    return rows


def findings(rows: list[dict[str, Any]], chance: float) -> list[tuple[str, str, bool]]:
    """Return what the paper found, what was found here, and whether the two agree.

    Findings about variants that are not in `rows` are left out.
    """
    by_name = {row["variant"]: row for row in rows}
    learned = by_name["inception"]["best"] > 2 * chance

    def within(name: str, bound: float) -> tuple[str, bool]:
        if not learned:
            return "Inception stayed at chance, so its best accuracy is no goal", False
        share = by_name[name]["share_of_inceptions"]
        told = "never reached it" if share is None else f"{share:.2f} of Inception's steps"
        return told, share is not None and share <= bound

    found = []
    if "bn-baseline" in by_name:
        found.append(("BN-Baseline needs less than half the steps", *within("bn-baseline", 0.5)))
    if "bn-x5" in by_name:
        claim = "BN-x5 needs a fourteenth of the steps (here: at most a tenth)"
        found.append((claim, *within("bn-x5", 0.1)))
    if "bn-x30" in by_name:
        best = max((row for row in rows if row["variant"] in PAPER), key=lambda row: row["best"])
        told = f"{best['variant']} does, at {best['best']:.2%}"
        found.append(("BN-x30 ends highest", told, best["variant"] == "bn-x30"))
    if {"bn-x5-sigmoid", "inception-sigmoid"} <= set(by_name):
        with_bn, without = (by_name[n]["best"] for n in ("bn-x5-sigmoid", "inception-sigmoid"))
        claim = "with sigmoids it learns with BN and stays at chance without"
        told = f"{with_bn:.2%} with, {without:.2%} without; chance is {chance:.2%}"
        found.append((claim, told, with_bn > 3 * chance and without < 2 * chance))
    if "inception-x5" in by_name:
        fast = by_name["inception-x5"]
        told = fast["failure"] or f"it reached {fast['best']:.2%} and ended at {fast['final']:.2%}"
        blew_up = fast["failure"] is not None or fast["final"] < 2 * chance
        found.append(("Inception at 5 times the rate blows up", told, blew_up))
    return found


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
    chance = 1 / config.model.num_classes
    _figure_2(folder / "figure-2.png", curves)
    told = findings(rows, chance)
    cells = [
        [
            row["variant"],
            runs[row["variant"]].server.schedule.learning_rate,
            row["steps"],
            row["share_of_inceptions"],
            f"{row['best']:.2%}",
            f"{row['final']:.2%}",
            row["paper_share"],
            "–" if row["paper_best"] is None else f"{row['paper_best']:.1%}",
        ]
        for row in rows
    ]
    header = ["", "rate", "steps to Inception's best", "share", "best", "at the end"]
    header += ["paper: share", "paper: best"]
    model = config.model
    hours = sum(c.seconds for c in (*curves.values(), *(tried or {}).values())) / 3600
    parts = [
        paragraph(
            f"{config.data.data}, {model.num_classes} classes, {model.pictures.height} pixels, "
            f"width {model.width or 1:g}, {config.policy.epochs} epochs, "
            f"seed {config.policy.seed}; "
            f"{config.replicas.replicas} replicas with {config.replicas.steps.concurrent_steps} "
            f"steps each, mini-batches of {config.data.batch_size}. {hours:.2f} hours in all."
        ),
        paragraph(
            "Accuracy was looked at every "
            f"{max(curve.interval for curve in curves.values()):,} updates or more often; steps "
            "are those at the first look that shows the accuracy."
        ),
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


def _figure_2(path: Path, curves: Mapping[str, Curve]) -> None:
    figure, (axes,) = new_figure(1, width=9, height=5)
    for name, curve in curves.items():
        style = "--" if name in inception_recipes.FAILURES else "-"
        axes.plot(curve.updates, curve.accuracy, style, label=name, linewidth=1.2)
    axes.axhline(curves["inception"].best, color="#8a8f98", linewidth=0.7)
    axes.set_xlabel("updates")
    axes.set_ylabel("accuracy@1")
    axes.legend(frameon=False)
    save_figure(figure, path)
