"""A small learnable dataset and run configuration, for tests that run the whole system."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn

from downpour.cluster.config.policy import PolicyConfig
from downpour.cluster.config.run import RunConfig
from downpour.models.mlp import MnistNet
from downpour.paramserver.config import ServerConfig
from downpour.paramserver.rules.schedule import Schedule
from downpour.shuffler.config import DataConfig
from downpour.shuffler.dataset.encoding import EncodedImages, schema_for
from downpour.shuffler.images.specs import ImageSpec
from downpour.workers.config import ModelConfig, ReplicaConfig
from downpour.workers.spec import InFlight, StepConfig

SIDE, CLASSES = 8, 4
IMAGE = ImageSpec(height=SIDE, width=SIDE, channels=1, binary_threshold=127, flatten=True)


def images(num_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy quadrants: the class is the quadrant that is bright."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, num_rows)
    pixels = rng.random((num_rows, SIDE, SIDE)) < 0.2
    for row, label in enumerate(labels):
        top, left = (label // 2) * 4, (label % 2) * 4
        pixels[row, top : top + 4, left : left + 4] |= rng.random((4, 4)) < 0.7
    return (pixels * 255).astype(np.uint8), labels.astype(np.int64)


def write_split(
    folder: Path,
    split: str,
    pixels: np.ndarray,
    labels: np.ndarray,
    shards: int = 2,
    *,
    class_names: Sequence[str] = (),
    spoilt: Sequence[int] = (),
) -> None:
    """Shards in the Hugging Face convention; the images of `spoilt` rows cannot be decoded."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, image in enumerate(pixels):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        data = buffer.getvalue()[:40] if i in spoilt else buffer.getvalue()
        rows.append({"bytes": data, "path": f"{i}.png"})
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows, image_type), "label": pa.array(labels, pa.int64())})
    if class_names:
        table = table.cast(schema_for(EncodedImages(), class_names))
    cuts = np.linspace(0, len(table), shards + 1).astype(int)
    for i in range(shards):
        name = f"{split}-{i:05d}-of-{shards:05d}.parquet"
        pq.write_table(table.slice(cuts[i], cuts[i + 1] - cuts[i]), folder / name)


def dataset(folder: Path, num_rows: int = 1000) -> str:
    """A training and a test split under `folder`."""
    write_split(folder, "train", *images(num_rows, 1))
    write_split(folder, "test", *images(200, 2), shards=1)
    return str(folder)


def config(
    data: str,
    *,
    model: str = "mnist",
    replicas: int = 4,
    concurrent_steps: int = 2,
    epochs: int = 2,
    partitions: int = 3,
    n_push: int = 1,
    n_fetch: int = 1,
    learning_rate: float = 0.05,
    in_flight: InFlight = "all",
    **policy: object,
) -> RunConfig:
    """A run of a second or so; with all its steps in flight, so that staleness is real."""
    arguments = {"batch_norm": True, "hidden": [16, 16], "inputs": SIDE * SIDE, "classes": CLASSES}
    return RunConfig(
        recipe="tiny",
        model=ModelConfig(
            model=model,
            arguments=arguments,
            image=IMAGE,
            num_classes=CLASSES,
        ),
        data=DataConfig(data=data, batch_size=16, window_batches=6, past_bound="rekey"),
        server=ServerConfig(partitions=partitions, schedule=Schedule(learning_rate=learning_rate)),
        replicas=ReplicaConfig(
            replicas=replicas,
            steps=StepConfig(
                concurrent_steps=concurrent_steps,
                n_push=n_push,
                n_fetch=n_fetch,
                in_flight=in_flight,
            ),
        ),
        policy=PolicyConfig(epochs=epochs, evaluate_every_s=0.5, **policy),  # type: ignore[arg-type]
    )


class Poisoned(nn.Module):
    """The MNIST net, whose loss is NaN for mini-batches with a marked example in them."""

    def __init__(self, **arguments: object) -> None:
        super().__init__()
        self.net = MnistNet(**arguments)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Logits; NaN wherever the whole image is white."""
        marked = x.flatten(1).min(1).values > 0
        return torch.where(marked.any(), torch.nan, 1.0) * self.net(x)


def poisoned(seed: int, **arguments: object) -> nn.Module:
    """A factory for `models.registry`."""
    return Poisoned(seed=seed, **arguments)
