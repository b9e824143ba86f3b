"""The data that comes with Downpour."""

from __future__ import annotations

from pathlib import Path

import downpour

BUNDLED_MNIST = str(Path(downpour.__file__).parent / "data" / "mnist-binary")
"""Section 4.1's data: MNIST, binarized, as Parquet shards."""
