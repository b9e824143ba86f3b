"""Question: do 144 crops of an image add more to ten if a network was trained on random crops?

The first network of `reproduce ensemble`, by a plain loop of momentum SGD in one process: once
without random crops, once on crops of 40% to 100% of an image's area, once of 8% to 100%. Nothing
else differs. Each is scored by 1, 10 and 144 crops of the first test images. What is trained and
scored stays in `--output`, and is not trained again:

    python -m downpour.benchmarks.random_crops --data data/cifar10 --output runs/random-crops
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from downpour.benchmarks.harness import machine
from downpour.cluster.config.derive import model_spec
from downpour.cluster.config.plain import to_plain
from downpour.cluster.config.run import RunConfig
from downpour.cluster.reproduce import ensemble
from downpour.cluster.reproduce.report import write_text
from downpour.cluster.run.folder import MODEL, RunFolder
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.images.decode import Decoder
from downpour.shuffler.plan.keys import stream_key
from downpour.workers.evaluation.evaluator import Evaluator, Score, population_statistics
from downpour.workers.evaluation.predictor import decode_any_size

CASES: Mapping[str, Mapping[str, object]] = {
    "without": {"random_crop": False},
    "from-0.08": {"random_crop": True},
    "from-0.4": {"random_crop": True, "min_area": 0.4},
}
"""Options of the three trainings."""
SIZE: Mapping[str, object] = {"width": 0.25, "image_size": 32, "stem_stride": 4, "batch_size": 128}
STATISTICS_BATCHES = 100
"""Mini-batches of Algorithm 2's statistics, seen as in inference."""
SAY_EVERY = 50
END = 0.06
"""Share of the rate at the end."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, score and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder with CIFAR-10's shards")
    parser.add_argument("--output", type=Path, required=True, help="folder of runs and scores")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rows", type=int, default=2000, help="test images to score")
    parser.add_argument("--learning-rate", type=float, default=0.15)
    parser.add_argument("--case", action="append", choices=list(CASES), help="of these only")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for case in given.case or CASES:
        options = {**SIZE, **CASES[case], "data": given.data, "epochs": given.epochs}
        options["learning_rate"] = given.learning_rate
        (config,) = ensemble.members(options, 1).values()
        path = given.output / case
        if not (path / MODEL).exists():
            _train(config, path)
        scores = given.output / f"{case}.json"
        if scores.exists():
            continue
        found = ensemble.errors([path], crops=(1, 10, 144), rows=given.rows, show=print)
        about = {
            "case": case,
            "errors": [row for row in found if row["who"] == "best"],
            "training": json.loads((path / "training.json").read_text()),
            "machine": machine(),
            "configuration": to_plain(config),
        }
        write_text(scores, json.dumps(about, indent=1) + "\n")
    for case in CASES:
        scores = given.output / f"{case}.json"
        if scores.exists():
            errors = json.loads(scores.read_text())["errors"]
            print(case, *(f"{error['top1_error']:.2%}" for error in errors))


def _train(config: RunConfig, path: Path) -> None:
    """Train by momentum SGD, v = mu v + gradient; weights -= rate v, and keep the run."""
    torch.manual_seed(stream_key(config.policy.seed, "dropout") % 2**63)
    spec = model_spec(config)
    flat = spec.build_flat("cpu")
    gradient = flat.gradient
    assert gradient is not None
    velocity = torch.zeros_like(gradient)
    began, losses = time.thread_time(), []
    dataset = Dataset.open(config.data.data, config.data.train_split)
    steps = config.policy.epochs * (dataset.num_rows // config.data.batch_size)
    flat.module.train()
    with contextlib.closing(RowReader(dataset, num_classes=spec.num_classes)) as reader:
        rows = reader.take(np.arange(dataset.num_rows))
        for step, (inputs, labels) in enumerate(_mini_batches(config, rows)):
            gradient.zero_()
            loss = functional.cross_entropy(flat.module(inputs), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            gradient.add_(flat.weights, alpha=config.server.weight_decay)
            velocity.mul_(config.server.momentum).add_(gradient)
            rate = config.server.schedule.learning_rate * END ** (step / steps)
            flat.weights.add_(velocity, alpha=-rate)
            losses.append(float(loss.detach()))
            if (step + 1) % SAY_EVERY == 0:
                mean = sum(losses[-SAY_EVERY:]) / SAY_EVERY
                print(f"{path.name}: {step + 1} of {steps} steps, loss {mean:.3f}", flush=True)
        parts = list(_as_in_inference(config, rows))
    evaluator = Evaluator(spec, lambda: parts)
    evaluator.weights.copy_(flat.weights)
    evaluator.statistics.copy_(population_statistics(flat, parts))
    folder = RunFolder.create(path, config)
    folder.write_json("data.json", {"class_names": list(dataset.class_names)})
    training = {
        "steps": steps,
        "cpu_seconds": round(time.thread_time() - began, 1),
        "last_loss": sum(losses[-SAY_EVERY:]) / SAY_EVERY,
    }
    folder.write_json("training.json", training)
    nothing = Score(accuracy=0, loss=0, num_examples=0)
    evaluator.save(str(path / MODEL), versions=[steps], score=nothing)


def _mini_batches(config: RunConfig, rows: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the mini-batches of all epochs, varied as the configuration says."""
    size = config.data.batch_size
    decoder = Decoder(
        spec=model_spec(config).image, augment=config.data.augment, seed=config.policy.seed
    )
    for epoch in range(config.policy.epochs):
        key = stream_key(config.policy.seed, "mini-batches", epoch)
        order = np.random.default_rng(key).permutation(len(rows))
        for start in range(0, len(rows) - size + 1, size):
            chosen = order[start : start + size]
            decoded = decoder.decode(rows.take(chosen), epoch=epoch, rows=chosen)
            yield torch.from_numpy(decoded.inputs), torch.from_numpy(decoded.labels)


def _as_in_inference(config: RunConfig, rows: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield mini-batches of the first training rows, cut as in inference."""
    size = config.data.batch_size
    for start in range(0, min(len(rows), STATISTICS_BATCHES * size), size):
        decoded = decode_any_size(rows.slice(start, size), model_spec(config).image)
        yield torch.from_numpy(decoded.inputs), torch.from_numpy(decoded.labels)


if __name__ == "__main__":
    main()
