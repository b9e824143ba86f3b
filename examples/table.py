"""A regression on a table: columns of numbers in Parquet files, and a network with BN.

    python examples/table.py

It makes a table, trains on it, and prints how well the network does.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

import downpour


def network(num_inputs: int, num_outputs: int) -> nn.Module:
    """A network that scales its inputs by itself: `[m, inputs] -> [m, outputs]`."""
    return nn.Sequential(
        nn.BatchNorm1d(num_inputs),
        nn.Linear(num_inputs, 64, bias=False),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, num_outputs),
    )


def write_table(folder: Path) -> None:
    """Houses with made-up prices."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 8000), ("test", 2000)):
        area, age = rng.uniform(30, 250, count), rng.integers(0, 120, count)
        rooms = (area / 25).astype(np.int64) + rng.integers(1, 3, count)
        price = 3 * area + 12 * rooms + 0.02 * (age - 60) ** 2 + rng.normal(0, 10, count)
        table = pa.table({"area": area, "age": age, "rooms": rooms, "price": price})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")


def main() -> None:
    """Train, and show the figures."""
    write_table(Path("data/houses"))
    result = downpour.Trainer(
        model=network,
        data="data/houses",
        target_column="price",
        loss="huber",
        epochs=5,
        learning_rate=0.02,
    ).fit()
    print(f"R² {result.metrics['r2']:.3f}, off by {result.metrics['rmse']:.1f} (RMSE)")


if __name__ == "__main__":
    main()
