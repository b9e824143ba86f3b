"""The page about statistics and shuffling under asynchronous training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from downpour.cluster.config.plain import to_plain
from downpour.cluster.config.run import RunConfig
from downpour.cluster.reproduce.asynchrony.experiment import (
    AVERAGED,
    BATCHES,
    FLIGHTS,
    NUM_SHARDS,
    ONE,
    RECOMPUTED,
    SERVER,
    SHUFFLES,
    flight_run,
    scores_of,
    shuffle_run,
    summary,
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

KINDS = (ONE, AVERAGED, SERVER, RECOMPUTED)
_COLOURS = {ONE: "#d1495b", AVERAGED: "#edae49", SERVER: "#2a9d5c", RECOMPUTED: "#8a8f98"}


def make_report(
    folder: Path,
    runs: Mapping[str, RunConfig],
    measured: Mapping[str, Mapping[str, Any]],
    curves: Mapping[str, Curve],
    *,
    seeds: int,
    command: str,
) -> Path:
    """Write the figures and the page; return the page's path."""
    ends = {name: curve.final for name, curve in curves.items()}
    numbers = summary(measured, ends, seeds)
    _statistics_figure(folder / "statistics.png", measured, seeds)
    _shuffles_figure(folder / "shuffling.png", curves, seeds)
    config = next(iter(runs.values()))
    schedule = config.server.schedule
    parts = [
        paragraph(
            f"The MNIST net with batch normalization, {config.policy.epochs} epochs, {seeds} "
            f"seeds of each (0 to {seeds - 1}); rate {schedule.learning_rate:g}, times "
            f"{schedule.decay_factor:g} an epoch; one replica for {_epochs(config)}. "
            "Numbers are mean ± standard deviation over seeds; "
            f"{sum(c.seconds for c in curves.values()) / 3600:.2f} hours of training."
        ),
        heading("Whose statistics"),
        paragraph(
            "Every run was computed again, push by push and to the bit, and its weights scored "
            f"with four kinds of statistics at {len(next(iter(measured.values()))['looks'])} "
            "versions. "
            "A replica's own are moving averages by the server's rule over its own mini-batches; "
            f"Algorithm 2 has {BATCHES} training mini-batches, with the weights frozen. The gap "
            "is accuracy less that with Algorithm 2's statistics on the same weights, over all "
            "those versions, the worst that of any replica; the distance is how far normalized "
            "values move from Algorithm 2's, root mean square over features."
        ),
        picture("statistics.png", "Test accuracy with each kind of statistics; shaded: all runs"),
        table(
            ["steps in flight, statistics of", "at the end", "mean gap", "worst gap", "distance"],
            [_row(numbers, flight, kind) for flight in FLIGHTS for kind in KINDS],
        ),
        table(
            ["steps in flight", "mean staleness"],
            [
                [
                    flight,
                    "{:.1f} ± {:.1f}".format(*numbers["flights"][str(flight)]["staleness_mean"]),
                ]
                for flight in FLIGHTS
            ],
        ),
        heading("Shuffling"),
        paragraph(
            "Accuracy at the end with 50 steps in flight and the server's statistics. Shards are "
            f"{NUM_SHARDS} pieces of the data as it is stored, which is in random order, or one "
            "for each class, where within_shard makes mini-batches of one class or two."
        ),
        picture("shuffling.png", "Test accuracy under each way of shuffling; a line is a run"),
        table(
            ["", "at the end"],
            [[name, _percent(numbers["shuffles"][name])] for name in SHUFFLES],
        ),
    ]
    data = {
        **numbers,
        "seeds": list(range(seeds)),
        "measured": dict(measured),
        "curves": {name: curve_as_data(curve) for name, curve in curves.items()},
        "configurations": {name: _shown(run) for name, run in runs.items()},
    }
    title = "Batch normalization with many steps in flight: whose statistics, and which shuffling"
    return write_report(folder, title, parts, command=command, data=data)


def _shown(config: RunConfig) -> dict[str, Any]:
    """Return the configuration without paths of this machine."""
    values = to_plain(config)
    values["data"]["data"] = Path(config.data.data).name
    return values


def _epochs(config: RunConfig) -> str:
    warm, ramp = config.replicas.warm_start_epochs, config.replicas.ramp_epochs
    return f"{warm:g} epochs, then all others over {ramp:g}" if warm or ramp else "no epoch"


def _row(numbers: Mapping[str, Any], flight: int, kind: str) -> list[Any]:
    found = numbers["flights"][str(flight)][kind]
    return [
        f"{flight}, {kind}",
        _percent(found["final_accuracy"]),
        f"{found['mean_gap']:+.2%}",
        f"{found['worst_gap']:+.2%}",
        found["from_algorithm_2"],
    ]


def _percent(pair: Sequence[float]) -> str:
    return f"{pair[0]:.2%} ± {pair[1]:.2%}"


def _statistics_figure(path: Path, measured: Mapping[str, Any], seeds: int) -> None:
    figure, axes = new_figure(len(FLIGHTS), width=12)
    for one, flight in zip(axes, FLIGHTS, strict=True):
        runs = [measured[flight_run(flight, seed)]["looks"] for seed in range(seeds)]
        epochs = [look["epoch"] for look in runs[0]]
        for kind in KINDS:
            values = [
                [s["accuracy"] for looks in runs for s in scores_of(looks[i], kind)]
                for i in range(len(epochs))
            ]
            _band(one, epochs, values, kind, _COLOURS[kind])
        one.set_title(f"{flight} steps in flight" if flight > 1 else "1 step in flight", loc="left")
        one.set_xlabel("epochs")
    axes[0].set_ylabel("test accuracy")
    axes[-1].legend(frameon=False)
    low = min(one.get_ylim()[0] for one in axes)
    for one in axes:
        one.set_ylim(low, 1.0)
    save_figure(figure, path)


def _shuffles_figure(path: Path, curves: Mapping[str, Curve], seeds: int) -> None:
    figure, (axes,) = new_figure(1, width=8)
    colours = ("#2a9d5c", "#3b6fb6", "#edae49", "#d1495b")
    for name, colour in zip(SHUFFLES, colours, strict=True):
        for seed in range(seeds):
            curve = curves[shuffle_run(name, seed)]
            label = name if seed == 0 else None
            axes.plot(curve.updates, curve.accuracy, color=colour, linewidth=0.9, label=label)
    axes.set_xlabel("updates")
    axes.set_ylabel("test accuracy")
    axes.legend(frameon=False)
    save_figure(figure, path)


def _band(axes: Any, xs: Sequence[float], values: Sequence[Any], label: str, colour: str) -> None:
    """Draw the mean of the values at each x, and shade their range."""
    means = [sum(v) / len(v) for v in values]
    axes.plot(xs, means, color=colour, label=label, linewidth=1.3)
    lows, highs = [min(v) for v in values], [max(v) for v in values]
    axes.fill_between(xs, lows, highs, color=colour, alpha=0.15, linewidth=0)
