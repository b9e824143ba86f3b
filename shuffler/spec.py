"""What a shuffler is told about the run: plain frozen data that travels through Ray."""

from __future__ import annotations

from dataclasses import dataclass

from downpour.shuffler.dataset.columns import Columns
from downpour.shuffler.dataset.encoding import PLAIN
from downpour.shuffler.dataset.reader import DEFAULT_CACHE_BYTES
from downpour.shuffler.holdings import Holding
from downpour.shuffler.images.specs import InputSpec
from downpour.shuffler.plan.plan import Plan


@dataclass(frozen=True, kw_only=True)
class ShufflerSpec:
    """Which rows a shuffler reads, and how."""

    index: int = 0
    """Number of this shuffler, in [0, num_shufflers)."""
    num_shufflers: int = 1
    """Shufflers that the split's shards are divided among; `holding` overrides this."""
    data: str
    """The dataset: a folder or a pyarrow.fs URI."""
    split: str = "train"
    """The split to read."""
    plan: Plan
    """Which rows a window has."""
    num_classes: int
    """Labels must lie in [0, num_classes)."""
    columns: Columns = PLAIN
    """Which columns are the input and the target."""
    cache_bytes: int = DEFAULT_CACHE_BYTES
    """Most bytes of row groups, and of small pictures' pixels, that it keeps in memory."""
    input: InputSpec | None = None
    """What the network takes: of small pictures, it delivers the pixels. None: rows as they are."""
    holding: Holding | None = None
    """The shards that it reads from a folder of its own node; None divides the shards at `data`."""
    prefetch_windows: int = 2
    """Windows that it reads ahead into the cache, in the plan's order."""
