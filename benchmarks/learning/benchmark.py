"""Claim: this system at 10 x 5 learns faster than a plain loop, and than what else is distributed.

Section 4.1's net with BN on MNIST: training seconds and examples to stated accuracies on the test
split. Everybody has the same cores, the best setting that the same search finds (or found, see
`reuse`), and the same number of seeds, none of them the search's. An average of the weights is
among the settings of all, and a plain loop stands there with it and without. The rounds take one
training of each, one after the other.

A look counts with the moving BN statistics of training or with those of Algorithm 2, whichever are
better. Beyond that the comparison favours the others: their clock stands still while they are
scored, and their optimizer is torch's fused one. This system is scored beside its training, on the
same cores and on the clock.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from downpour.benchmarks import system
from downpour.benchmarks.harness import BadSettings, Report, Say, Settings, decoded_mnist, median
from downpour.benchmarks.learning import plot as picture
from downpour.benchmarks.learning.curve import Curve, as_plain
from downpour.benchmarks.learning.peers import (
    AVERAGED_LIMIT,
    FULL,
    LIMIT,
    QUICK,
    SYSTEM,
    Bounds,
    Peer,
    peers,
)
from downpour.benchmarks.learning.reuse import found_before
from downpour.benchmarks.learning.search import Found, Setting, search
from downpour.benchmarks.learning.train import configure, train
from downpour.shuffler.processors import processors

SEARCH_SEED = 0
LIMITS = (LIMIT, AVERAGED_LIMIT)
"""Peers that are always there."""
RATIOS = ("ratio_to_plain", "ratio_to_averaged")

plot = picture.plot


def run(settings: Settings, say: Say) -> Report:
    """Find everybody's best setting, then train each with every seed."""
    everybody = peers(processors(), quick=settings.quick)
    unknown = set(settings.only) - set(everybody)
    if unknown:
        known = ", ".join(everybody)
        raise BadSettings(f"there is no peer {min(unknown)!r}: give some of {known}")
    wanted = {
        name: peer
        for name, peer in everybody.items()
        if name in LIMITS or not settings.only or name in settings.only
    }
    bounds = QUICK if settings.quick else FULL
    before = found_before(settings.settings_from, wanted) if settings.settings_from else {}
    with decoded_mnist(settings.quick, test=True) as data:
        bench = _Bench(bounds, data, say)
        found = {
            name: before[name] if name in before else bench.search(name, peer)
            for name, peer in wanted.items()
        }
        rounds = [
            {name: bench.train(peer, found[name], seed) for name, peer in wanted.items()}
            for seed in range(SEARCH_SEED + 1, SEARCH_SEED + 1 + settings.seeds)
        ]
    return report(wanted, found, rounds, bounds, bench.search_s)


class _Bench:
    """Runs trainings, and says what came of them."""

    def __init__(self, bounds: Bounds, data: str, say: Say) -> None:
        self._bounds = bounds
        self._data = data
        self._say = say
        self._num_examples = num_examples(data)
        self.search_s: dict[str, float] = {}

    def search(self, name: str, peer: Peer) -> Found:
        """The best setting of a peer."""
        began_s = time.monotonic()
        found = search(
            self._bounds.grid(peer),
            goal=self._bounds.goals[-1],
            bound_s=self._bounds.run_s,
            budget_s=self._bounds.search_s,
            trial=lambda setting, bound_s: self._once(peer, setting, bound_s, None),
            clock=time.monotonic,
        )
        self.search_s[name] = round(time.monotonic() - began_s, 1)
        if not found.trials:
            return found
        left_out = f", {found.left_out} not tried for want of time" if found.left_out else ""
        self._say(
            f"learning: {title_of(peer, found.best)}: best of {len(found.trials)} is "
            f"{found.best}{left_out}"
        )
        return found

    def train(self, peer: Peer, found: Found, seed: int) -> Curve:
        """A peer at its best setting."""
        goal, bounds = self._bounds.goals[-1], self._bounds
        best_s = min((t.curve.seconds_to(goal) for t in found.trials), default=math.inf)
        bound_s = min(bounds.run_s, bounds.patience * best_s)
        return self._once(peer, found.best, bound_s, seed)

    def _once(self, peer: Peer, setting: Setting, bound_s: float, seed: int | None) -> Curve:
        """One training; without a seed it is one of the search."""
        bounds, searches = self._bounds, seed is None
        curve = train(
            peer,
            setting,
            seed=SEARCH_SEED if seed is None else seed,
            bounds=bounds,
            bound_s=bound_s,
            looks_per_epoch=(bounds.search_looks_per_epoch if searches else bounds.looks_per_epoch),
            data=self._data,
            num_examples=self._num_examples,
        )
        goal = bounds.goals[-1]
        look = curve.arrival(goal)
        came = (
            f"{curve.best:.2%} at best, {curve.ended} after {curve.seconds:.1f} s"
            if look is None
            else f"{goal:.1%} after {look.seconds:.1f} s and {look.epoch:.1f} epochs"
        )
        what = "search" if searches else f"seed {seed}"
        self._say(f"learning, {what}: {title_of(peer, setting)}, {setting}: {came}")
        return curve


def num_examples(data: str) -> int:
    """Examples of the decoded training split."""
    import numpy as np

    from downpour.benchmarks.baselines.common import LABELS

    return len(np.load(Path(data) / LABELS, mmap_mode="r"))


def title_of(peer: Peer, setting: Setting) -> str:
    """The peer with its number of workers."""
    return peer.title.format(workers=setting.shape.workers)


def report(
    wanted: Mapping[str, Peer],
    found: Mapping[str, Found],
    rounds: Sequence[Mapping[str, Curve]],
    bounds: Bounds,
    search_s: Mapping[str, float],
) -> Report:
    """The table, and the record behind it."""
    result: dict[str, Any] = {}
    rows: list[tuple[str, ...]] = []
    for name, peer in wanted.items():
        curves = [round_[name] for round_ in rounds]
        best = found[name].best
        result[name] = {
            "title": title_of(peer, best),
            "setting": plain_setting(best),
            "setting_text": str(best),
            "startup_s": median([curve.startup_s for curve in curves]),
            "best_accuracy": max(curve.best for curve in curves),
            "search": {
                "seconds": search_s.get(name),
                "left_out": found[name].left_out,
                "settings_from": found[name].source,
                "trials": [
                    {
                        **plain_setting(trial.setting),
                        "training_s": _finite(trial.curve.seconds_to(bounds.goals[-1])),
                        "best_accuracy": trial.curve.best,
                        "seconds": round(trial.curve.seconds, 2),
                        "ended": trial.curve.ended,
                    }
                    for trial in found[name].trials
                ],
            },
            "goals": {},
        }
        for goal in bounds.goals:
            limits = [median([r[limit].seconds_to(goal) for r in rounds]) for limit in LIMITS]
            arrived = arrivals(curves, goal, *limits)
            result[name]["goals"][f"{goal:g}"] = arrived
            rows.append(_row(result[name], f"{goal:.1%}", arrived, len(curves)))
    return Report(
        name="learning",
        title="section 4.1's net with BN on MNIST: training to an accuracy on the test split",
        columns=(
            *("", "goal", "epochs", "examples", "training s", "min-max", "wall s"),
            *("ratio", "averaged"),
        ),
        rows=tuple(rows),
        notes=_notes(result, len(rounds)),
        configuration={
            "bounds": dataclasses.asdict(bounds),
            "search_seed": SEARCH_SEED,
            "peers": {name: dataclasses.asdict(peer) for name, peer in wanted.items()},
            **(
                {"system": system.as_plain(configure(found[SYSTEM].best, seed=1, bounds=bounds))}
                if SYSTEM in wanted
                else {}
            ),
        },
        result=result,
        rounds=[{name: as_plain(curve) for name, curve in round_.items()} for round_ in rounds],
    )


def arrivals(
    curves: Sequence[Curve], goal: float, limit_s: float, averaged_s: float
) -> dict[str, Any]:
    """Medians over the curves, one that never arrives counting as later than all.

    None stands for never. `limit_s` is the plain loop's median, and `averaged_s` that of the loop
    that averages its weights, infinite for never.
    """
    looks = [curve.arrival(goal) for curve in curves]
    seconds = [curve.seconds_to(goal) for curve in curves]
    wall = [curve.startup_s + curve.seconds_to(goal) for curve in curves]
    middle = median(seconds)
    return {
        "arrived": sum(look is not None for look in looks),
        "epochs": _finite(median([look.epoch if look else math.inf for look in looks])),
        "examples": _finite(median([look.examples if look else math.inf for look in looks])),
        "training_s": _finite(middle),
        "training_s_min": _finite(min(seconds)),
        "training_s_max": _finite(max(seconds)),
        "wall_s": _finite(median(wall)),
        "ratio_to_plain": _ratio(middle, limit_s),
        "ratio_to_averaged": _ratio(middle, averaged_s),
    }


def _ratio(seconds: float, limit_s: float) -> float | None:
    return seconds / limit_s if math.isfinite(seconds) and math.isfinite(limit_s) else None


def plain_setting(setting: Setting) -> dict[str, Any]:
    """A setting, for a record."""
    return {
        "workers": setting.shape.workers,
        "batch_size": setting.shape.batch_size,
        "learning_rate": setting.learning_rate,
        "decay": setting.decay,
        "average": setting.average,
        "momentum": setting.momentum,
        "nesterov": setting.nesterov,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _row(
    found: Mapping[str, Any], goal: str, arrived: Mapping[str, Any], seeds: int
) -> tuple[str, ...]:
    def number(key: str, form: str) -> str:
        return "never" if arrived[key] is None else format(arrived[key], form)

    about = (found["title"], goal)
    if not arrived["arrived"]:
        return (*about, "", "", "never", "", "", "", "")
    few = "" if arrived["arrived"] == seeds else f", {arrived['arrived']} of {seeds}"
    return (
        *about,
        *(number("epochs", ".1f"), number("examples", ",.0f"), number("training_s", ".1f")),
        f"{number('training_s_min', '.1f')}-{number('training_s_max', '.1f')}{few}",
        number("wall_s", ".1f"),
        *("-" if arrived[key] is None else f"{arrived[key]:.2f}" for key in RATIOS),
    )


def _notes(result: Mapping[str, Any], seeds: int) -> tuple[str, ...]:
    settings = "; ".join(f"{found['title']}: {found['setting_text']}" for found in result.values())
    never = [
        f"{found['title']} never had {float(goal):.1%} within its time, and "
        f"{found['best_accuracy']:.2%} at best."
        for found in result.values()
        for goal, arrived in found["goals"].items()
        if not arrived["arrived"]
    ]
    earlier = [
        f"{found['title']}: no search; the setting is that of {source}."
        for found in result.values()
        if (source := found["search"]["settings_from"]) is not None
    ]
    return (
        *never,
        "mini-batch, rate, decay an epoch, kind and share of momentum, and average of the "
        f"weights (kept at every 32 examples), from the same search for all: {settings}.",
        *earlier,
        f"seconds are medians of {seeds} seed(s); the ratios are those of training seconds to the "
        "plain loop's, and to those of the loop that averages. Wall seconds are from the command "
        "on, scoring left out.",
        "all are scored with the BN statistics of training or Algorithm 2's, whichever are better: "
        "the others off the clock, this system beside its training, on the same cores and on the "
        "clock. Its seconds are those at which the weights that were scored came about.",
    )
