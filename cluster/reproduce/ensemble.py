"""Section 4.2.3: crops, and the average of six networks; Figure 4."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from downpour.cluster.config import inception_recipes, recipes
from downpour.cluster.config.plain import to_plain
from downpour.cluster.config.run import RunConfig
from downpour.cluster.reproduce.report import paragraph, table, write_report
from downpour.cluster.reproduce.runs import fitted
from downpour.cluster.serving import inference
from downpour.shuffler.dataset.own import open_split
from downpour.shuffler.images.augment import AugmentConfig
from downpour.workers.evaluation.predictor import Predictor

MEMBERS = len(inception_recipes.ENSEMBLE)
PAPER = {("best", 1): (0.252, 0.0782), ("best", 144): (0.2199, 0.0582)}
PAPER_ENSEMBLE = {("average", 144): (0.201, 0.049)}
"""Figure 4: top-1 and top-5 error on ImageNet's validation set, of the best network of a kind and
of six averaged."""


def members(given: Mapping[str, object], count: int = MEMBERS) -> dict[str, RunConfig]:
    """Return the first `count` of the six networks, with the user's options."""
    names = [name for name in recipes.RECIPES if name.startswith("ensemble-")]
    return {name: fitted(recipes.find(name), given) for name in names[:count]}


def unseen_sizes(runs: Mapping[str, RunConfig], crops: int) -> str | None:
    """Return what is to be said before networks are trained that more crops cannot help.

    144 crops show objects at four scales. A network that is trained without random crops has seen
    them at one.
    """
    if crops < 144 or all(run.data.augment.random_crop for run in runs.values()):
        return None
    return (
        "the networks are trained without random crops: 144 crops show objects at sizes that they "
        "have not seen (leave out --no-random-crop, or give --crops 10)"
    )


def errors(
    paths: Sequence[Path],
    *,
    crops: Sequence[int],
    rows: int | None,
    show: Callable[[str], None],
    progress: Callable[[int, int], object] = lambda _done, _total: None,
) -> list[dict[str, Any]]:
    """Score each network and the average of all, for each number of crops.

    The best network is the one with the highest accuracy by one crop, on the rows scored here.

    Args:
        paths: folders of the trained runs.
        crops: numbers of crops, the first of them 1.
        rows: images to score, from the split's first on; None is all.
        show: is told in a line what is scored.
        progress: is told the images done, and all.

    Returns:
        A row for each of `crops` and each of: the best network, the average, every network. It has
        top-1 and top-5 error, the standard error of the first, and how much lower it is than by
        one crop with the standard error of that, which is that of a mean of differences on the
        same images.
    """
    loaded = [inference.load(path) for path in paths]
    hits: dict[int, tuple[Tensor, Tensor]] = {}
    for count in crops:
        show(f"{len(loaded)} networks, {count} {'crop' if count == 1 else 'crops'}")
        hits[count] = _hits(loaded, count, rows, show, progress)
    names = [run.folder.name for run in loaded]
    best = int(hits[crops[0]][0][:-1].sum(1).argmax())
    lines = [("best", best), ("average", len(loaded)), *((n, i) for i, n in enumerate(names))]
    found = []
    for who, place in lines:
        for count in crops:
            top1, top5 = (each[place].double() for each in hits[count])
            gain = top1 - hits[crops[0]][0][place].double()
            found.append(
                {
                    "who": who,
                    "name": "" if who == "average" else names[place],
                    "networks": len(loaded) if who == "average" else 1,
                    "crops": count,
                    "top1_error": 1 - float(top1.mean()),
                    "top5_error": 1 - float(top5.mean()),
                    "standard_error": _standard_error(top1),
                    "gain": float(gain.mean()),
                    "gain_standard_error": _standard_error(gain),
                    "examples": len(top1),
                }
            )
    return found


def _hits(
    loaded: Sequence[inference.Trained],
    crops: int,
    rows: int | None,
    show: Callable[[str], None],
    progress: Callable[[int, int], object],
) -> tuple[Tensor, Tensor]:
    """Return for which images the first answer is right, and one of the first five.

    Both are bool `[networks + 1, n]`. The last line is that of the average.
    """
    first = loaded[0].config
    predictor = Predictor([run.network for run in loaded], crops=crops)
    dataset = open_split(first.data.data, first.data.eval_split, first.model.columns)
    total = min(dataset.num_rows, rows or dataset.num_rows)
    step = max(1, inference.ROWS // crops)
    top1: list[Tensor] = []
    top5: list[Tensor] = []
    problems: list[str] = []
    done = 0
    with inference.rows_of_split(dataset, predictor.num_classes, rows=step, limit=rows) as batches:
        for batch in batches:
            answer = predictor.answer(batch, first_row=done, on_bad_image=first.data.on_bad_image)
            given = torch.cat([answer.by_network, answer.probabilities[None]])
            best = given.topk(min(5, predictor.num_classes), dim=2).indices
            right = best == answer.labels[:, None]
            top1.append(right[..., 0])
            top5.append(right.any(2))
            problems += answer.problems
            done += len(batch)
            progress(done, total)
    if problems:
        show(f"{len(problems)} images cannot be decoded and are skipped: {problems[0]}")
    return torch.cat(top1, 1), torch.cat(top5, 1)


def _standard_error(values: Tensor) -> float:
    """Return that of the mean of float64 `[n]`."""
    return float(values.std(correction=0)) / math.sqrt(len(values))


def training_crops(augment: AugmentConfig) -> str:
    """Return on which parts of their images the networks were trained, as a sentence."""
    if not augment.random_crop:
        return "They were trained without random crops."
    return (
        f"They were trained on random crops of {augment.min_area:.0%} to 100% of an image's area."
    )


def make_report(
    folder: Path, runs: Mapping[str, RunConfig], found: Sequence[Mapping[str, Any]], command: str
) -> Path:
    """Write Figure 4's table; return the page's path."""
    paper = PAPER | PAPER_ENSEMBLE
    cells = []
    for row in found:
        theirs = paper.get((row["who"], row["crops"]))
        gain = f"{row['gain']:+.2%} ± {row['gain_standard_error']:.2%}"
        cells.append(
            [
                _shown(row),
                row["crops"],
                f"{row['top1_error']:.2%} ± {row['standard_error']:.2%}",
                f"{row['top5_error']:.2%}",
                None if row["crops"] == 1 else gain,
                None if theirs is None else f"{theirs[0]:.1%} / {theirs[1]:.2%}",
            ]
        )
    config = next(iter(runs.values()))
    parts = [
        paragraph(
            f"{config.data.data}, {config.model.num_classes} classes, "
            f"{config.model.pictures.height} pixels, width {config.model.width or 1:g}, "
            f"{config.policy.epochs} epochs; "
            f"{found[0]['examples']:,} images. {training_crops(config.data.augment)} The best one "
            "is the one that does best by a single crop on these images, which favours it there."
        ),
        table(
            ["", "crops", "top-1 error", "top-5 error", "gain over one crop", "paper, on ImageNet"],
            cells,
        ),
        paragraph(
            "Behind ± is a standard error. That of a gain is of the differences on the same "
            "images, so it is smaller than those of the two errors."
        ),
    ]
    data = {
        "errors": list(found),
        "configurations": {name: to_plain(run) for name, run in runs.items()},
    }
    title = "Section 4.2.3: crops and an ensemble of six (Figure 4)"
    return write_report(folder, title, parts, command=command, data=data)


def _shown(row: Mapping[str, Any]) -> str:
    if row["who"] == "average":
        return f"{row['networks']} networks averaged"
    return f"the best one ({row['name']})" if row["who"] == "best" else row["name"]
