"""The page with Figure 1 and its numbers, from the records of `experiment.train`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from downpour.cluster.reproduce.mnist.experiment import (
    PERCENTILES,
    Curves,
    MnistConfig,
    summary,
    typical_unit,
)
from downpour.cluster.reproduce.report import (
    new_figure,
    paragraph,
    picture,
    save_figure,
    table,
    write_report,
)
from downpour.shuffler.dataset.bundled import BUNDLED_MNIST

_COLOURS = {"with BN": "#2a9d5c", "without BN": "#3b6fb6"}


def make_report(
    folder: Path, config: MnistConfig, found: Mapping[str, Curves], command: str
) -> Path:
    """Write Figure 1 and the report; return the page's path."""
    numbers = summary(config, dict(found))
    _accuracy_figure(folder / "figure-1a.png", found)
    _bands_figure(folder / "figure-1bc.png", found)
    variants = numbers["variants"]
    bn, plain = variants["with BN"], variants["without BN"]
    rows: list[list[Any]] = [
        ["final accuracy", f"{bn['final_accuracy']:.2%}", f"{plain['final_accuracy']:.2%}"],
        ["best accuracy", f"{bn['best_accuracy']:.2%}", f"{plain['best_accuracy']:.2%}"],
    ]
    rows += [
        [f"steps to {float(a):.0%}", bn["steps_to"][a], plain["steps_to"][a]]
        for a in bn["steps_to"]
    ]
    labels = {
        "band_wander": "wander of the three percentiles, in band widths (median unit)",
        "median_wander": "wander of the median, in band widths (median unit)",
        "width_ratio": "widest band over narrowest (median unit)",
    }
    rows += [
        [label, bn["median_of_units"][field], plain["median_of_units"][field]]
        for field, label in labels.items()
    ]
    rows.append(["minutes", bn["seconds"] / 60, plain["seconds"] / 60])
    steadier = plain["median_of_units"]["band_wander"] / bn["median_of_units"]["band_wander"]
    rate = f"{config.learning_rate:g}"
    if config.final_rate != 1:
        rate += f", decayed exponentially to {config.learning_rate * config.final_rate:g}"
    above = "at every look" if numbers["bn_above_plain_in_first_fifth"] else "not at every look"
    parts = [
        paragraph(
            f"Three layers of 100 sigmoids on binary MNIST, {config.steps:,} steps of plain SGD on "
            f"mini-batches of {config.batch_size}, seed {config.seed}: the same initial weights "
            f"(Gaussian, standard deviation {config.init_std:g}), mini-batches and rate ({rate}) "
            "with batch normalization and without. The paper gives neither of the two numbers."
        ),
        table(["", "with BN", "without BN"], rows),
        paragraph(
            f"In the first fifth of training the net with BN is above the other {above}; over all "
            f"of it at {numbers['share_of_looks_with_bn_above']:.0%} of the looks. The inputs of "
            f"its last sigmoids wander {steadier:.2f} times less."
        ),
        picture("figure-1a.png", "Figure 1(a): test accuracy against steps"),
        picture(
            "figure-1bc.png",
            "Figure 1(b, c): the 15th, 50th and 85th percentiles of the inputs of a typical "
            "sigmoid of the last hidden layer",
        ),
        paragraph(
            "The typical sigmoid is the one whose wander is the median of the layer's 100. Wander "
            "is the standard deviation over time of the percentiles about their own means, divided "
            "by the mean distance of the 15th from the 85th; the first look, before any step, is "
            "left out. The inputs are those that training makes (BN by the mini-batch) of 1,000 "
            "fixed training images; accuracy is by the moving averages."
        ),
    ]
    data = numbers | {
        "curves": {
            name: {
                "steps": curves.steps.tolist(),
                "accuracy": curves.accuracy.tolist(),
                "percentiles_of_typical_unit": curves.percentiles[
                    :, :, typical_unit(curves.percentiles)
                ]
                .round(4)
                .tolist(),
            }
            for name, curves in found.items()
        },
        "percentiles": list(PERCENTILES),
        "config": _shown(config),
    }
    title = "Section 4.1: MNIST with and without batch normalization (Figure 1)"
    return write_report(folder, title, parts, command=command, data=data)


def _shown(config: MnistConfig) -> dict[str, Any]:
    """Return the configuration without paths of this machine."""
    values = dataclasses.asdict(config)
    return values | ({"data": "bundled"} if config.data == BUNDLED_MNIST else {})


def _accuracy_figure(path: Path, found: Mapping[str, Curves]) -> None:
    figure, (axes,) = new_figure(1, width=7)
    for name, curves in found.items():
        axes.plot(curves.steps, curves.accuracy, label=name, color=_COLOURS[name], linewidth=1.2)
    axes.set_ylim(0.7, 1.0)
    axes.set_xlabel("steps")
    axes.set_ylabel("test accuracy")
    axes.legend(frameon=False)
    save_figure(figure, path)


def _bands_figure(path: Path, found: Mapping[str, Curves]) -> None:
    figure, both = new_figure(2)
    for axes, (name, letter) in zip(both, (("without BN", "b"), ("with BN", "c")), strict=True):
        curves = found[name]
        bands = curves.percentiles[:, :, typical_unit(curves.percentiles)]
        axes.fill_between(
            curves.steps, bands[:, 0], bands[:, 2], color=_COLOURS[name], alpha=0.2, linewidth=0
        )
        for i, percentile in enumerate(PERCENTILES):
            axes.plot(
                curves.steps,
                bands[:, i],
                color=_COLOURS[name],
                linewidth=0.9,
                label=f"{percentile}th percentile",
            )
        axes.set_title(f"({letter}) {name}", loc="left")
        axes.set_xlabel("steps")
        axes.set_ylabel("input of the sigmoid")
    save_figure(figure, path)
