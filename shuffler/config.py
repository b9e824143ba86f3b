"""Where the examples are, and how they become mini-batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

from downpour.shuffler.dataset.bundled import BUNDLED_MNIST
from downpour.shuffler.images.augment import AugmentConfig
from downpour.shuffler.plan.plan import VERSION, PastBound, Strategy

WINDOW_BYTES: Final = 256 << 20
"""Most bytes of a window's rows, on the average: each replica holds two windows, and Arrow counts
the bytes of a column in 31 bits. Windows of large images have fewer mini-batches for that."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the examples are, and how they are put together into mini-batches."""

    data: str = BUNDLED_MNIST
    """Folder or pyarrow.fs URI with the shards, `<split>-*.parquet`; or `dataset:module:function`,
    a function of a split's name that returns a `torch.utils.data.Dataset` of your own."""
    train_split: str = "train"
    """Split to train on."""
    eval_split: str = "test"
    """Split to score."""
    target_column: tuple[str, ...] = ()
    """Column of the targets in Parquet files, or several with commas between; none is `label`, the
    class, or the masks beside pictures. All other columns of numbers are inputs, unless rows have
    pictures."""
    input_columns: tuple[str, ...] = ()
    """Columns of numbers that make up an input; none is all of them but the targets."""
    batch_size: int = 32
    """Examples in a mini-batch."""
    window_batches: int = 64
    """Most mini-batches that a replica is handed at a time; of large images, so many as take 256
    MiB."""
    strategy: Strategy = "pairwise"
    """How examples meet: `pairwise` lets no pair meet twice. `random`, `within_shard`, `buffer` and
    `none` shuffle as other loaders do."""
    buffer_rows: int = 1000
    """Examples that the `buffer` strategy shuffles at a time."""
    past_bound: PastBound = "auto"
    """Past the epochs in which no pair can meet twice: an `error`, or the rows in a fresh order
    (`rekey`). `auto` takes the fresh order with up to a million rows."""
    plan_version: int = field(default=VERSION, metadata={"cli": False})
    """Arithmetic of the mini-batches, so that a run goes on as it began; see `Plan.version`."""
    shufflers: int = 1
    """Actors that read the training rows; each has shards of its own."""
    shuffler_cache_mb: int = 1024
    """Most megabytes of row groups, and of small pictures' decoded pixels, that each of them
    keeps."""
    node_folder: str | None = None
    """Folder on each node's own disk that has some of the training split's shards; `{node}` in it
    is the node's label downpour-node, or its address. The manifest and the split to score are where
    `data` says. There is a shuffler on each node that has shards."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How training images are varied."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """What a training image does that cannot be decoded: it stops the run, or is skipped and
    counted."""

    def __post_init__(self) -> None:
        if self.shufflers < 1 or self.shuffler_cache_mb < 0:
            raise ValueError(
                f"shufflers is {self.shufflers} and shuffler cache {self.shuffler_cache_mb} MB: "
                "give at least 1 shuffler, and 0 MB or more"
            )
        folder = self.node_folder
        if folder is not None and not folder.startswith("/") and "://" not in folder:
            raise ValueError(
                f"node folder is {folder!r}: give a path from the root, which means the same on "
                "every node, or a URI"
            )
