"""What a user does with a published network, for one after the other in a process: `python -m`.

Each is trained by a `Trainer` with the recipe `classifier`, then scored, predicted with, exported
and served. All share a Ray, the data and Serve. Arguments are Ray's address and a folder; each line
of the input is the number of a network in `library_nets.ALL`, and each line of the output says in
JSON what came out.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
import traceback
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.helpers import commands, library_nets

SIDE = 64
TRAINED, FEW, SCORED = 8, 2, 2
"""Pictures of a class; few for a network whose inputs are large."""
LARGE = 128
"""Pixels of such inputs."""


class Course:
    """What all networks share."""

    def __init__(self, folder: Path) -> None:
        from ray import serve

        self.folder = folder
        self.port = commands.free_port()
        self._deployer = ThreadPoolExecutor(1)
        for name, count in (("data", TRAINED), ("few", FEW)):
            pictures = folder / f"{name}-pictures"
            write_pictures(pictures, "train", count, seed=1)
            write_pictures(pictures, "validation", SCORED, seed=2)
            command("ingest", pictures, folder / name)
        self.shown = sorted((folder / "data-pictures" / "validation").rglob("*.png"))
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": "127.0.0.1", "port": self.port},
            logging_config={"log_level": "ERROR", "enable_access_log": False},
        )

    def run(self, net: library_nets.LibraryNet) -> dict[str, Any]:
        """Put a network through everything; gives figures."""
        from ray import serve

        found: dict[str, Any] = {"seconds": {}}
        with timed(found, "train"):
            run, found["result"] = self._train(net)
        header, ready = self._deploy(run)
        try:
            self._use(run, found)
            with timed(found, "serve"):
                ready.result()
                found["served"] = self._answered(header)
        finally:
            ready.exception()
            serve.delete("downpour")
        with timed(found, "check"):
            found["differences"] = self._check(run, found)
        return found

    def _train(self, net: library_nets.LibraryNet) -> tuple[Path, dict[str, Any]]:
        import downpour

        large = net.size > LARGE
        trained = downpour.Trainer(
            model=net.spec.name,
            arguments=net.spec.arguments,
            data=self.folder / ("few" if large else "data"),
            image_size=net.size,
            epochs=1,
            batch_size=5 if large else 8,
            learning_rate=0.001,
            warmup_epochs=0.0,
            replicas=2,
            replicas_per_process=2,
            concurrent_steps=1 if large else 2,
            partitions=1,
            runs=self.folder / "runs",
            name=f"{net.library}-{net.name}",
            progress=False,
        ).fit()
        return trained.path, dict(trained.metrics)

    def _deploy(self, run: Path) -> tuple[str, Future[Any]]:
        """Begin to deploy a run; gives the header that callers show, and what waits for it."""
        from ray import serve

        from downpour.cluster.serving.server import app, key
        from downpour.cluster.serving.settings import ServeConfig

        header = key.header(key.make())
        config = ServeConfig(port=self.port)
        deployed = app.application(
            [run], best=False, weights=None, config=config, digest=key.digest(header)
        )
        place = {"name": "downpour", "route_prefix": "/"}
        return header, self._deployer.submit(serve.run, deployed, **place)

    def _use(self, run: Path, found: dict[str, Any]) -> None:
        """The commands that need no cluster."""
        with timed(found, "evaluate"):
            found["evaluated"] = command("evaluate", run)
        with timed(found, "predict"):
            found["predicted"] = command("predict", run, *self.shown, "--json")
        with timed(found, "export"):
            options = ("--batches", "1", "--max-disagreement", "none")
            found["exported"] = command("export", run, *options)

    def _answered(self, header: str) -> Any:
        """The answer to the first picture."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/predict",
            data=self.shown[0].read_bytes(),
            headers={"Authorization": header},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["predictions"]

    def _check(self, run: Path, found: dict[str, Any]) -> dict[str, float]:
        """By how much each answer differs from the network's own, its BN not folded."""
        import torch

        from downpour.cluster.serving import export as exporting
        from downpour.cluster.serving import inference
        from downpour.models.outputs import main_output
        from downpour.workers.evaluation.predictor import decode_any_size, rows_of

        network = inference.load(run).network
        files = [path.read_bytes() for path in self.shown]
        inputs = torch.from_numpy(decode_any_size(rows_of(files), network.spec.image).inputs)
        module = network.model.module
        with torch.inference_mode():
            expected = main_output(module(inputs))
        logarithms = library_nets.logarithms(expected.softmax(1))
        predicted = torch.stack([by_label(each["predictions"]) for each in found["predicted"]])
        onnx = exporting._read_back(run / "model.onnx", inputs, "onnx")
        differences = {
            "predicted": exporting.difference_of(predicted, logarithms),
            "served": exporting.difference_of(by_label(found["served"]), predicted[0]),
            "onnx": exporting.difference_of(onnx, expected),
        }
        allowed = exporting.tolerance(module, inputs, max(differences.values()))
        return {**differences, "allowed": allowed}


def by_label(predictions: list[dict[str, Any]]) -> Any:
    """Logarithms of an answer's probabilities, in the order of the labels."""
    import torch

    found = {each["label"]: each["probability"] for each in predictions}
    assert sorted(found) == list(range(library_nets.CLASSES)), predictions
    return library_nets.logarithms(torch.tensor([found[label] for label in sorted(found)]))


def write_pictures(folder: Path, split: str, count: int, *, seed: int) -> None:
    """Folders of PNG files: patches of colours, those of each class about a colour of its own."""
    rng = np.random.default_rng(seed)
    for label in range(library_nets.CLASSES):
        place = folder / split / f"class {label}"
        place.mkdir(parents=True)
        own = np.random.default_rng(label).integers(40, 215, 3)
        for number in range(count):
            patches = np.clip(own + rng.integers(-60, 60, (4, 4, 3)), 0, 255).astype(np.uint8)
            smooth = Image.fromarray(patches).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            noisy = np.asarray(smooth) + rng.integers(-20, 20, (SIDE, SIDE, 3))
            pixels = np.clip(noisy, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.png")


def command(*arguments: object) -> Any:
    """What a command says that must succeed, from JSON if it is."""
    from downpour.cluster.cli.commands import downpour
    from downpour.cluster.errors import run_cli

    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        status = run_cli(downpour, [str(each) for each in arguments])
    assert status == 0, (arguments, errors.getvalue())
    lines = said.getvalue().splitlines()
    return json.loads(lines[-1]) if lines and lines[-1][:1] in "{[" else said.getvalue()


@contextlib.contextmanager
def timed(found: dict[str, Any], stage: str) -> Iterator[None]:
    """Keep how long a stage took."""
    began_s = time.monotonic()
    yield
    found["seconds"][stage] = round(time.monotonic() - began_s, 1)


def main(address: str, folder: Path) -> None:
    """Answer each line."""
    import torch

    from downpour.cluster.training.session import on_ray

    torch.set_num_threads(1)
    with on_ray(address=address, dashboard=False):
        from ray import serve

        course = Course(folder)
        say({"ready": True})
        for line in sys.stdin:
            try:
                found = course.run(library_nets.ALL[int(line)])
            except Exception:
                found = {"error": traceback.format_exc()}
            say(found)
        serve.shutdown()


def say(what: dict[str, Any]) -> None:
    """Write a line."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
