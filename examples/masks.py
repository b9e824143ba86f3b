"""A segmentation: pictures with masks as images in Parquet files, and a network with BN.

    python examples/masks.py

It makes pictures of discs and squares, trains on them, and prints how well the network finds them.
"""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import nn

import downpour

SIDE = 48
COLOURS = np.array([[90, 90, 90], [180, 120, 60], [60, 120, 180]])


def block(inputs: int, outputs: int) -> nn.Sequential:
    """A convolution with batch normalization."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def network(num_classes: int) -> nn.Module:
    """A network that looks around each pixel: `[m, 3, h, w] -> [m, classes, h, w]`."""
    return nn.Sequential(
        block(3, 16),
        nn.MaxPool2d(2),
        block(16, 32),
        block(32, 32),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(32, num_classes, 1),
    )


def png(pixels: np.ndarray) -> dict[str, bytes]:
    """An image as Hugging Face keeps it."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue()}


def picture(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A picture `[h, w, 3]` and its mask `[h, w]`: 0 is ground, 1 a disc, 2 a square."""
    y, x = np.mgrid[:SIDE, :SIDE]
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for kind in (1, 2):
        top, left, size = *rng.integers(8, SIDE - 8, 2), rng.integers(5, 10)
        away = np.hypot(y - top, x - left) if kind == 1 else np.maximum(abs(y - top), abs(x - left))
        mask[away < size] = kind
    colours = COLOURS + rng.integers(-30, 30, (3, 3))
    pixels = colours[mask] + rng.normal(0, 15, (SIDE, SIDE, 3))
    return pixels.clip(0, 255).astype(np.uint8), mask


def write_pictures(folder: Path) -> None:
    """A training and a test split."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 1000), ("test", 200)):
        pairs = [picture(rng) for _ in range(count)]
        table = pa.table(
            {
                "image": [png(pixels) for pixels, _ in pairs],
                "mask": [png(mask) for _, mask in pairs],
            }
        )
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")


def main() -> None:
    """Train, and show the figures."""
    write_pictures(Path("data/shapes"))
    result = downpour.Trainer(
        model=network, data="data/shapes", epochs=6, learning_rate=0.1, random_crop=False
    ).fit()
    print(
        f"mean IoU {result.metrics['miou']:.1%}, {result.metrics['pixel_accuracy']:.1%} of pixels"
    )


if __name__ == "__main__":
    main()
