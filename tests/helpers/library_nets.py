"""Published networks, as they are, and what each is put through."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from downpour.cluster.serving import export as exporting
from downpour.models.lookup import import_named
from downpour.models.outputs import main_output
from downpour.shuffler.images.specs import ImageSpec
from downpour.workers.evaluation.evaluator import Evaluator
from downpour.workers.evaluation.predictor import Network, Predictor
from downpour.workers.spec import ModelSpec
from downpour.workers.step.model_copy import Mailbox, ModelCopy, StepContext

CLASSES, ROWS, STEPS = 5, 8, 2


@dataclass(frozen=True)
class LibraryNet:
    """A network of torchvision or timm."""

    name: str
    size: int = 64
    """Pixels of its inputs."""
    options: dict[str, Any] = field(default_factory=dict)
    library: str = "torchvision"

    @property
    def spec(self) -> ModelSpec:
        """The network unchanged, with its own factory."""
        torchvision = self.library == "torchvision"
        return ModelSpec(
            name=f"torchvision.models:{self.name}" if torchvision else "timm:create_model",
            arguments=self.options if torchvision else {"model_name": self.name, **self.options},
            seed=3,
            image=ImageSpec(height=self.size, width=self.size),
            num_classes=CLASSES,
        )


def timm(name: str, size: int = 64, **options: Any) -> LibraryNet:
    return LibraryNet(name, size, options, "timm")


RESNET = LibraryNet("resnet18")
MOBILENET = LibraryNet("mobilenet_v3_small")
UNINITIALIZED = {"init_weights": False}
"""Torchvision's initialization of these takes a minute."""
ALL = [
    RESNET,
    MOBILENET,
    timm("repvgg_a0"),
    LibraryNet("resnet50"),
    LibraryNet("resnext50_32x4d"),
    LibraryNet("wide_resnet50_2"),
    LibraryNet("vgg11_bn"),
    LibraryNet("densenet121"),
    LibraryNet("googlenet", options=UNINITIALIZED),
    LibraryNet("inception_v3", 299, UNINITIALIZED),
    LibraryNet("mobilenet_v2"),
    LibraryNet("efficientnet_b0"),
    LibraryNet("regnet_y_400mf"),
    LibraryNet("shufflenet_v2_x0_5"),
    LibraryNet("mnasnet0_5"),
    timm("resnetv2_50"),
    timm("ghostnet_100"),
    timm("hrnet_w18_small"),
    timm("dla34"),
    timm("legacy_xception"),
    timm("dpn68"),
    timm("seresnet18"),
    timm("ese_vovnet19b_dw"),
    timm("regnetx_002"),
    timm("resnet26t"),
    timm("mixnet_s"),
    timm("selecsls42"),
    timm("skresnet18"),
    timm("tf_efficientnetv2_b0"),
    LibraryNet("squeezenet1_1"),
]
"""The kinds that people take; the last has no batch normalization at all."""


def skip_without_libraries() -> None:
    """Skip where torchvision and timm are not installed, and say how they are."""
    for name in ("torchvision", "timm"):
        try:
            import_named(name)
        except ModuleNotFoundError:
            pytest.skip(f"{name} is not installed: pip install 'downpour[nets]'")


def put_through(net: LibraryNet, folder: Path, *, export: bool = True) -> dict[str, float]:
    """Build a network, train steps, score, load, predict and export it; gives what differed.

    `allowed` is what `export` would allow it.
    """
    spec = net.spec
    start = spec.build_flat("cpu")
    inputs = _pictures(net.size)
    targets = torch.arange(ROWS) % CLASSES
    _train(spec, start, inputs, targets)
    evaluator = Evaluator(spec, lambda: [(inputs, targets)])
    evaluator.weights.copy_(start.weights)
    evaluator.statistics.copy_(start.statistics)
    evaluator.recompute([(inputs, targets)] * 2)
    score = evaluator.score()
    assert np.isfinite(score.loss)
    path = folder / "model.safetensors"
    evaluator.save(str(path), versions=[STEPS], score=score)
    network = Network.load(spec, str(path))
    with torch.inference_mode():
        expected = main_output(network.model.module(inputs))
        folded = main_output(network.folded()(inputs))
    assert expected.shape == (ROWS, CLASSES)
    assert int((expected.argmax(1) == targets).sum()) == round(score.accuracy * ROWS)
    answered = Predictor([network]).probabilities(_as_rows(inputs))
    differences = {
        "folded": exporting.difference_of(folded, expected),
        "predicted": exporting.difference_of(
            logarithms(answered), logarithms(_on_pixels(network, inputs).softmax(1))
        ),
    }
    if export:
        differences["onnx"] = _exported(network, inputs, expected, folder / "model.onnx")
    off = max(differences.values())
    module = network.model.module
    differences["allowed"] = max(
        exporting.tolerance(module, x, off) for x in (inputs, _rounded(inputs))
    )
    return differences


def _pictures(size: int) -> Tensor:
    """Patches of colours that differ from one to the other, and some noise: [rows, 3, h, w].

    Noise alone would look alike to a network, and features of hardly any variance magnify rounding.
    """
    generator = torch.Generator().manual_seed(1)
    patches = torch.rand(ROWS, 3, 4, 4, generator=generator)
    smooth = functional.interpolate(patches, (size, size), mode="bilinear")
    noise = torch.rand(ROWS, 3, size, size, generator=generator)
    return 0.85 * smooth + 0.15 * noise


def _train(spec: ModelSpec, start: Any, inputs: Tensor, targets: Tensor) -> None:
    """A few steps of plain SGD by the product's own step, on `start`'s weights."""
    layout = start.layout
    copy = ModelCopy(spec.build_flat(), StepContext(layout, loss=spec.build_loss(), recorded=False))
    box = Mailbox(
        0,
        layout,
        torch.zeros(layout.num_parameters),
        torch.zeros(1, 3, layout.num_features),
    )
    torch.manual_seed(STEPS)  # for dropout and stochastic depth
    for _ in range(STEPS):
        copy.weights[:] = start.weights.numpy()
        result = copy.step(inputs, targets, box, 0)
        assert np.isfinite(result.loss)
        assert np.isfinite(result.gradient_norm)
        start.weights[: len(box.gradient)].sub_(
            box.gradient, alpha=1e-3 / (1 + result.gradient_norm)
        )


def _as_rows(inputs: Tensor) -> Any:
    from downpour.workers.evaluation.predictor import rows_of
    from tests.helpers.trained import as_file

    pixels = (inputs * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return rows_of([as_file(each) for each in pixels])


def _on_pixels(network: Network, inputs: Tensor) -> Tensor:
    """What the network that is not folded says of inputs rounded as pixels are."""
    with torch.inference_mode():
        return main_output(network.model.module(_rounded(inputs)))


def logarithms(probabilities: Tensor) -> Tensor:
    """Of probabilities that float32 has; a network of random weights may be surer than that."""
    return probabilities.clamp(min=1e-30).log()


def _rounded(inputs: Tensor) -> Tensor:
    return (inputs * 255).round() / 255


def _exported(network: Network, inputs: Tensor, expected: Tensor, path: Path) -> float:
    class Run:
        class_names = tuple(map(str, range(CLASSES)))

    run: Any = Run()
    run.network = network
    exporting._write(run, inputs, path, "onnx")
    found = exporting._read_back(path, inputs, "onnx")
    path.unlink()
    return exporting.difference_of(found, expected)
