"""Claim: on processors, this system at 10 x 5 trains a conv net faster than plain loops do.

BN-Inception, mini-batches of 32: images a second of plain PyTorch loops (one for each processor,
which share nothing and have their images decoded in memory) and of this system with everything on,
each in float32 and in bfloat16, one after the other in every round. Beside them stands the floor of
this machine for such a step: its multiply-adds at the speed of a large matrix product, and the
bytes that it cannot but move at the speed of a copy.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from downpour.benchmarks import system
from downpour.benchmarks.baselines.shuffling import make_rows
from downpour.benchmarks.harness import BadSettings, Report, Say, Settings, median
from downpour.benchmarks.inception.plain import PlainSetup
from downpour.benchmarks.processes import measure_in_child
from downpour.cluster.config.run import RunConfig
from downpour.shuffler.images.specs import ImageSpec
from downpour.shuffler.processors import processors
from downpour.workers.config import ModelConfig
from downpour.workers.spec import Precision

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
BATCH_SIZE = 32
DEADLINE_S = 600.0
WINDOW_BATCHES = 10
JPEG_BYTES = 1_500
BASE = "plain loops, float32"


@dataclass(frozen=True, kw_only=True)
class Size:
    """A network and its images, and how much longer than others it is measured."""

    width: float
    """Of every layer, 1 being Figure 5's."""
    pixels: int
    """Height and width of an image."""
    rows: int
    """Images of the dataset that is made."""
    warmup_s: float
    """How long a run goes on until it has found its way of computing steps."""
    times: float = 1.0
    """How many times as long it is measured, since a push comes once in some seconds."""


SIZES = {
    "0.25x32": Size(width=0.25, pixels=32, rows=20_000, warmup_s=12.0),
    "1x64": Size(width=1.0, pixels=64, rows=4_000, warmup_s=30.0, times=3.0),
    "1x128": Size(width=1.0, pixels=128, rows=4_000, warmup_s=70.0, times=6.0),
}
"""By name: width, and pixels."""


def run(settings: Settings, say: Say) -> Report:
    """Measure every size asked for in every round; of a quick one, a tiny network."""
    if unknown := set(settings.only) - SIZES.keys():
        raise BadSettings(f"--only {min(unknown)}: give one of {', '.join(SIZES)}")
    sizes = {name: size for name, size in SIZES.items() if name in (settings.only or SIZES)}
    if settings.quick:
        sizes = {"0.05x32": Size(width=0.05, pixels=32, rows=640, warmup_s=settings.warmup_s)}
    rounds: list[dict[str, Any]] = [{} for _ in range(settings.repeat)]
    with tempfile.TemporaryDirectory(prefix="downpour-bench-") as scratch:
        for name, size in sizes.items():
            data = str(Path(scratch) / name)
            make_rows(data, count=size.rows, row_bytes=JPEG_BYTES, side=size.pixels)
            make_rows(data, count=BATCH_SIZE, row_bytes=JPEG_BYTES, side=size.pixels, split="test")
            for number, found in enumerate(rounds):
                prefix = f"inception, round {number + 1} of {settings.repeat}: {name}"
                found[name] = _measure(size, data, settings, lambda s, p=prefix: say(f"{p}, {s}"))
    return report(rounds, sizes, settings)


def _measure(size: Size, data: str, settings: Settings, say: Say) -> dict[str, Any]:
    """Images a second of everybody, by name, and the floors in milliseconds a mini-batch."""
    seconds = settings.seconds * (1.0 if settings.quick else size.times)
    longer = dataclasses.replace(settings, seconds=seconds, warmup_s=size.warmup_s)
    precisions = PRECISIONS[:1] if settings.quick else PRECISIONS
    found: dict[str, Any] = {"images_per_s": {}, "formats": {}, "floor": {}}
    for precision in precisions:
        setup = PlainSetup(
            width=size.width,
            pixels=size.pixels,
            precision=precision,
            workers=processors(),
            seconds=seconds,
            warmup_s=settings.warmup_s,
            batch_size=BATCH_SIZE,
        )
        what = f"plain loops, {precision}"
        say(what)
        plain = _child(what, "plain", setup)
        found["images_per_s"][what] = plain["images_per_s"]
        found["formats"][what] = plain["format"]
    for precision in precisions:
        what = f"10 x 5, {precision}"
        say(what)
        measured = system.measure(convolutional(size, data, precision, settings), longer)
        found["images_per_s"][what] = BATCH_SIZE * measured.updates_per_s
        found[what] = dataclasses.asdict(measured)
    for precision in precisions:
        say(f"floor, {precision}")
        floor = dataclasses.replace(setup, precision=precision, seconds=min(seconds, 3.0))
        found["floor"][precision] = _child("the floor", "floor", floor)
    return found


def _child(what: str, module: str, setup: PlainSetup) -> dict[str, Any]:
    name = f"downpour.benchmarks.inception.{module}"
    return measure_in_child(what, name, dataclasses.asdict(setup), DEADLINE_S)


def convolutional(size: Size, data: str, precision: Precision, settings: Settings) -> RunConfig:
    """The configuration of `system.mnist` with BN-Inception on images of a size.

    Its split to score is tiny: plain loops score nothing.
    """
    config = system.mnist(replicas=4 if settings.quick else 10)
    steps = dataclasses.replace(config.replicas.steps, precision=precision)
    return dataclasses.replace(
        config,
        recipe="bench-inception",
        model=ModelConfig(
            model="inception",
            arguments={"width": size.width},
            image=ImageSpec(height=size.pixels, width=size.pixels, fit="any"),
        ),
        data=dataclasses.replace(config.data, data=data, window_batches=WINDOW_BATCHES),
        replicas=dataclasses.replace(config.replicas, steps=steps),
        policy=dataclasses.replace(config.policy, evaluate_every_s=600.0, evaluation_share=0.1),
    )


def report(rounds: list[dict[str, Any]], sizes: dict[str, Size], settings: Settings) -> Report:
    """Medians of the rates, and of the ratios within each round."""
    result: dict[str, Any] = {}
    rows: list[tuple[str, ...]] = []
    for name in sizes:
        found = [each[name] for each in rounds]
        result[name] = {}
        for what in found[0]["images_per_s"]:
            precision = what.rpartition(" ")[2]
            about = {
                "images_per_s": median([f["images_per_s"][what] for f in found]),
                "ratio_to_plain_float32": median([_ratio(f, what, BASE) for f in found]),
                "ratio_to_plain": median(
                    [_ratio(f, what, f"plain loops, {precision}") for f in found]
                ),
                "share_of_floor": median(
                    [f["images_per_s"][what] / f["floor"][precision]["images_per_s"] for f in found]
                ),
            }
            result[name][what] = about
            rows.append(
                (
                    f"{name}, {what}",
                    f"{about['images_per_s']:,.1f}",
                    f"{about['ratio_to_plain_float32']:.2f}",
                    f"{about['ratio_to_plain']:.2f}",
                    f"{about['share_of_floor']:.2f}",
                )
            )
        result[name]["floor"] = {p: found[0]["floor"][p] for p in found[0]["floor"]}
        for precision, floor in result[name]["floor"].items():
            rows.append(
                (f"{name}, floor, {precision}", f"{floor['images_per_s']:,.1f}", "", "", "")
            )
    return Report(
        name="inception",
        title="images a second of BN-Inception, width x pixels, mini-batches of 32",
        columns=("", "images/s", "of plain float32", "of plain, same precision", "of the floor"),
        rows=tuple(rows),
        notes=(
            f"medians of {len(rounds)} round(s); ratios are within a round.",
            "the floor: multiply-adds at the speed of a matrix product, bytes at that of a copy.",
        ),
        configuration={
            "sizes": {name: dataclasses.asdict(size) for name, size in sizes.items()},
            "plain_processes": processors(),
            "system": system.as_plain(
                convolutional(next(iter(sizes.values())), "made", "float32", settings)
            ),
        },
        result=result,
        rounds=rounds,
    )


def _ratio(found: dict[str, Any], what: str, base: str) -> float:
    rates = found["images_per_s"]
    return float(rates[what] / rates[base])
