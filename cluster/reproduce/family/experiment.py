"""Section 4.2.2: Inception and its batch-normalised variants, Figures 2 and 3.

The paper chose its rates for Inception on ImageNet. At another scale, the rate with which plain
Inception learns best is chosen first, by short runs (`trials`). The rates of the other variants are
derived from it as in the paper: x1, x1, x5, x30, x5.

Here: the runs, and what their curves say. Not here: the page (`page`).
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from downpour.cluster.config import inception_recipes, recipes
from downpour.cluster.config.options import apply
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.cluster.reproduce.runs import Curve, fitted, with_network

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


ALL_IN_FLIGHT = "-all-in-flight"
"""Ends the name of a variant that is trained with every step in flight besides."""
_SEED = re.compile(r"-seed-\d+$")
FLAT = 0.005
"""Inception has stopped getting better if its gain (`late_gain`) is at most this."""


def family(
    given: Mapping[str, object],
    only: Sequence[str] = (),
    *,
    seeds: int = 1,
    all_in_flight: Sequence[str] = (),
) -> dict[str, RunConfig]:
    """Return the five variants and the two failures, with the user's options.

    Args:
        given: the user's options. Those in `_IN_PROPORTION` are Inception's, and each variant has
            a multiple of them as in the paper. All others are the same for all.
        only: variants to keep besides Inception, which the others are compared with; empty keeps
            all.
        seeds: runs of each variant, with the seeds from the configuration's own on. The failures
            have one.
        all_in_flight: variants to train with every step in flight besides, one run of each.

    Returns:
        Configurations by the run's name. `variant_of` gives the variant of a name.
    """
    one = _one_of_each(given, only)
    runs = dict(one)
    for number in range(1, seeds):
        for name, config in one.items():
            if name not in inception_recipes.FAILURES:
                runs[f"{name}-seed-{number}"] = _seeded(config, number)
    for name in all_in_flight:
        if name not in one:
            raise UserError(f"--all-in-flight {name}: --only leaves it out; give --only {name} too")
        runs[name + ALL_IN_FLIGHT] = apply(one[name], {"in_flight": "all"})
    return runs


def variant_of(run: str) -> str:
    """Return the variant that a run is of, by the run's name."""
    return _SEED.sub("", run)


def by_variant(curves: Mapping[str, Curve]) -> dict[str, list[Curve]]:
    """Return the curves of each variant, in the order of their seeds."""
    found: dict[str, list[Curve]] = {}
    for name, curve in curves.items():
        found.setdefault(variant_of(name), []).append(curve)
    return found


def _seeded(config: RunConfig, number: int) -> RunConfig:
    policy = dataclasses.replace(config.policy, seed=config.policy.seed + number)
    return dataclasses.replace(config, policy=policy)


def _one_of_each(given: Mapping[str, object], only: Sequence[str]) -> dict[str, RunConfig]:
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


def late_gain(curve: Curve) -> float | None:
    """Return the mean accuracy of a run's last quarter less that of the quarter before.

    None if either quarter of the updates has no look.
    """
    end = curve.updates[-1] if curve.updates else 0
    quarters = [
        [
            accuracy
            for updates, accuracy in zip(curve.updates, curve.accuracy, strict=True)
            if begin * end < updates <= stop * end
        ]
        for begin, stop in ((0.5, 0.75), (0.75, 1.0))
    ]
    if not all(quarters):
        return None
    before, last = (statistics.fmean(quarter) for quarter in quarters)
    return last - before


def figure_3(curves: Mapping[str, Curve]) -> list[dict[str, Any]]:
    """Return the rows: steps to Inception's best accuracy, best accuracy, the paper's values.

    A run is compared with the run of Inception that has its seed: the best accuracy of that is its
    goal. A row has medians over a variant's runs, and the least and the most of each; a run that
    never reaches its goal counts as endless.
    """
    variants = by_variant(curves)
    plain = variants["inception"]
    goals = [curve.best for curve in plain]
    bases = [_endless(curve.first_at(goal)) for curve, goal in zip(plain, goals, strict=True)]
    rows = []
    for name, runs in variants.items():
        steps = [_endless(run.first_at(goal)) for run, goal in zip(runs, goals, strict=False)]
        shares = [_share(own, base) for own, base in zip(steps, bases, strict=False)]
        paper_steps, paper_best = PAPER.get(name, (None, None))
        bests = [run.best for run in runs]
        rows.append(
            {
                "variant": name,
                "runs": len(runs),
                "steps": _ended(statistics.median(steps)),
                "share_of_inceptions": _ended(statistics.median(shares)),
                "shares": [_ended(share) for share in shares],
                "best": statistics.median(bests),
                "bests": bests,
                "final": statistics.median(run.final for run in runs),
                "paper_steps": paper_steps,
                "paper_share": paper_steps / 31.0e6 if paper_steps else None,
                "paper_best": paper_best,
                "failure": next((run.failure for run in runs if run.failure), None),
            }
        )
    return rows


def _endless(steps: int | None) -> float:
    return math.inf if steps is None else steps


def _ended(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _share(steps: float, base: float) -> float:
    return steps / base if base and math.isfinite(base) else math.inf


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
        if share is None:
            return "never reached it", False
        told = f"{share:.2f} of Inception's steps{spread(by_name[name]['shares'])}"
        return told, share <= bound

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


def spread(values: Sequence[float | None], form: str = "{:.2f}", never: str = "never") -> str:
    """Say the least and the most, if there are several values; `never` stands for None."""
    if len(values) < 2:
        return ""
    reached = [value for value in values if value is not None]
    least = form.format(min(reached)) if reached else never
    most = form.format(max(reached)) if len(reached) == len(values) else never
    return f" ({least} to {most})"
