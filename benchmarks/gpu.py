"""Replicas on a GPU: are they right, how fast are they, what do they learn. At most eight minutes.

    python -m downpour.benchmarks.gpu [--data FOLDER] [--minutes 8] [--out FILE]

from the root of a checkout, on a machine with one NVIDIA GPU, PyTorch's CUDA build, NumPy and
PyArrow. Nothing else is needed: no Ray, no installation of this package. The tests of part (a) need
pytest, the recipes of part (c) click, OpenCV (opencv-python-headless), simplejpeg and Pillow.
Whatever lacks something is skipped, and says why.

Results are written after each measurement, so whatever ends the script loses none of them.
`--device cpu --quick` runs every part at a small size.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import downpour
from downpour.benchmarks.on_gpu import recipes, steps
from downpour.benchmarks.on_gpu.recipes import Lesson
from downpour.benchmarks.on_gpu.steps import Workload
from downpour.shuffler.processors import processors
from downpour.workers.spec import Precision
from downpour.workers.step.device import cuda_problem

ROOT = Path(downpour.__file__).parents[1]
TESTS_S, STEPS_S = 100.0, 260.0
"""At most, of the tests and of the measurements of speed; recipes have what is left."""
START_S = 20.0
"""What one measurement takes to start."""
MIN_LESSON_S = 25.0
LEARNT = ("bn-baseline", "bn-x5", "bn-x30", "inception", "bn-x5-sigmoid")
"""Recipes, in the order in which they are trained."""
BASE = "plain loop"

PYTEST_INI = """[pytest]
addopts = --import-mode=importlib -p no:cacheprovider
pythonpath = {root}
markers =
    gpu: needs an accelerator
    ray: starts Ray
    cluster: needs several hosts
    soak: takes long
"""
"""The project's own configuration asks for plugins that may not be here."""


class Record:
    """The results, on the terminal and in a file that is always whole."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        """Begin with what is known of the machine."""
        self.path = path
        self.plain: dict[str, Any] = {"benchmark": "gpu", "machine": about, "skipped": {}}
        self.plain |= {"tests": {}, "steps": {}, "recipes": {}}

    def say(self, line: str) -> None:
        """Tell people."""
        print(line, flush=True)

    def skip(self, what: str, why: str) -> None:
        """Note that something was not done."""
        self.say(f"skipped: {what}: {why}")
        self.plain["skipped"][what] = why
        self.save()

    def keep(self, part: str, name: str, found: Any) -> None:
        """Note a result."""
        self.plain[part][name] = found
        self.save()

    def save(self) -> None:
        """Write all of it."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.plain, indent=2) + "\n")
        partial.rename(self.path)


class Budget:
    """Seconds that are left, of all and of a part."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin now."""
        self._clock = clock
        self._end_s = clock() + seconds
        self._part_end_s = self._end_s

    def part(self, most_s: float) -> None:
        """Begin a part, which may take so long."""
        self._part_end_s = min(self._end_s, self._clock() + most_s)

    @property
    def left(self) -> float:
        """Seconds left of the part."""
        return self._part_end_s - self._clock()


def about(device: str) -> dict[str, Any]:
    """The machine, the versions and the settings that decide the numbers."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processors": processors(),
        "device": device,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "tf32_matrix_products": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_bytes": properties.total_memory,
            "capability": list(torch.cuda.get_device_capability(0)),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def run_tests(record: Record, budget: Budget, device: str) -> None:
    """Part (a): the tests marked `gpu`."""
    tests = ROOT / "tests" / "inprocess" / "workers" / "step"
    if device == "cpu":
        return record.skip("tests", "they need a GPU")
    if importlib.util.find_spec("pytest") is None:
        return record.skip("tests", "pip install pytest")
    if not tests.exists():
        return record.skip("tests", f"{tests} is not there: run this in a checkout")
    with tempfile.TemporaryDirectory() as folder:
        ini = Path(folder, "pytest.ini")
        ini.write_text(PYTEST_INI.format(root=ROOT))
        command = [sys.executable, "-m", "pytest", "-c", str(ini), "--rootdir", str(ROOT)]
        command += ["--noconftest", "-q", "-ra", "-m", "gpu", str(tests)]
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=budget.left, check=False
            )
            output, status = done.stdout + done.stderr, str(done.returncode)
        except subprocess.TimeoutExpired as error:
            output, status = str(error.stdout), "timeout"
    record.say(output[-4000:])
    return record.keep("tests", "gpu", {"status": status, "output": output[-20_000:]})


def measure_steps(record: Record, budget: Budget, load: Workload) -> None:
    """Part (b): images a second, in the order of what matters most."""
    for precision, what, measure in measurements(load):
        name = f"{precision}, {what}"
        if budget.left < START_S + load.warmup_s + load.seconds and not load.in_this_process:
            record.skip(name, "no time is left for it")
            continue
        if "graph" in what and load.device == "cpu":
            record.skip(name, "a processor has no graphs")
            continue
        try:
            found = measure()
        except Exception as error:  # the next one may well work
            found = {"error": f"{type(error).__name__}: {error}"}
            record.say(f"{name}: {found['error']}")
        record.keep("steps", name, found)
        for line in steps.compared({**record.plain["steps"]}, BASE):
            if line.startswith(f"{name}:"):
                record.say(line)


def measurements(
    load: Workload,
) -> Sequence[tuple[Precision, str, Callable[[], dict[str, Any]]]]:
    """`(precision, what, measure)` of each."""
    several = min(5, load.replicas)
    ours, loop = steps.measure_replicas, steps.measure_plain
    precisions = ("float32",) if load.in_this_process else ("float32", "bfloat16")
    main: list[tuple[Precision, str, Callable[[], dict[str, Any]]]] = []
    more: list[tuple[Precision, str, Callable[[], dict[str, Any]]]] = []
    for p in precisions:
        precision: Precision = p  # type: ignore[assignment]
        main += [
            (precision, BASE, lambda p=precision: loop(load, p)),
            (precision, "replicas in one process", lambda p=precision: ours(load, p)),
        ]
        more += [
            (
                precision,
                "plain loop as a CUDA graph",
                lambda p=precision: loop(load, p, graph=True),
            ),
            (
                precision,
                f"replicas in {several} processes",
                lambda p=precision: ours(load, p, processes=several),
            ),
            (
                precision,
                "replicas, steps together",
                lambda p=precision: ours(load, p, steps_together=load.concurrent_steps),
            ),
        ]
        if load.record_steps != "off":
            what = "replicas, steps not captured"
            more.append((precision, what, lambda p=precision: ours(load, p, record_steps="off")))
    more.sort(key=lambda each: each[0] != "bfloat16")
    if load.device == "cuda":
        more += [
            ("float16", BASE, lambda: loop(load, "float16")),
            ("float16", "replicas in one process", lambda: ours(load, "float16")),
        ]
    return main + more


def learn_recipes(record: Record, budget: Budget, lesson: Lesson, names: Sequence[str]) -> None:
    """Part (c): accuracy against steps, for as long as time is left."""
    if (why := recipes.problem(lesson.data or None)) is not None:
        return record.skip("recipes", why)
    for number, name in enumerate(names):
        seconds = budget.left / (len(names) - number) - START_S
        if lesson.in_this_process:
            seconds = 0.1
        elif seconds < MIN_LESSON_S and budget.left > MIN_LESSON_S + START_S:
            seconds = MIN_LESSON_S
        if seconds <= 0:
            record.skip(name, "no time is left for it")
            continue
        curve: list[dict[str, Any]] = []

        def note(about: dict[str, Any], name: str = name, curve: Any = curve) -> None:
            curve.append(about)
            record.keep("recipes", name, {"curve": curve})
            line = f"{name}: {about['batches']:,} mini-batches, {about['training_s']:.0f} s"
            record.say(f"{line}, accuracy {about['accuracy']:.3f}")

        try:
            found = recipes.learn(name, lesson, seconds, note)
        except Exception as error:  # the next one may well work
            found = {"error": f"{type(error).__name__}: {error}"}
            record.say(f"{name}: {found['error']}")
        record.keep("recipes", name, {"curve": curve, **found})
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts; returns the exit status: 1 if a test or a measurement failed."""
    parser = argparse.ArgumentParser(prog="python -m downpour.benchmarks.gpu")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a small size, in this process")
    parser.add_argument("--data", default="", help="Parquet files of train and validation")
    parser.add_argument("--pixels", type=int, default=64, help="of the images in --data")
    parser.add_argument("--classes", type=int, default=50, help="of the images in --data")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=None, help="where the results are written")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and (why := cuda_problem()) is not None:
        print(f"{why}: run this where there is a GPU, or give --device cpu", file=sys.stderr)
        return 2
    budget = Budget(60 * given.minutes - 5)
    path = given.out or _default_path()
    record = Record(path, about(given.device))
    record.save()
    lesson = Lesson(
        data=given.data,
        device=given.device,
        pixels=given.pixels,
        classes=given.classes,
        precision="bfloat16" if given.device == "cuda" else "float32",
    )
    load, learnt = Workload(device=given.device), LEARNT
    if given.quick:
        load = Workload(
            device=given.device,
            pixels=32,
            width=0.05,
            classes=4,
            batch_size=2,
            replicas=2,
            concurrent_steps=2,
            window=2,
            windows=1,
            warmup_s=0.0,
            seconds=0.05,
            record_steps="off" if given.device == "cpu" else "auto",
            in_this_process=True,
        )
        lesson = Lesson(
            data=given.data,
            device=given.device,
            precision="float32",
            pixels=given.pixels,
            classes=given.classes,
            width=0.05,
            score_every=1,
            in_this_process=True,
        )
        learnt = LEARNT[:1]
    budget.part(TESTS_S)
    run_tests(record, budget, given.device)
    budget.part(STEPS_S)
    measure_steps(record, budget, load)
    budget.part(float("inf"))
    learn_recipes(record, budget, lesson, learnt)
    record.say(f"kept in {path}")
    plain = record.plain
    failed = any("error" in found for p in ("steps", "recipes") for found in plain[p].values())
    return int(failed or any(found["status"] != "0" for found in plain["tests"].values()))


def _default_path() -> Path:
    folder = ROOT / "benchmarks" / "results"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    return (folder if folder.is_dir() else Path.cwd()) / f"gpu-{date}.json"


if __name__ == "__main__":
    raise SystemExit(main())
