"""What a dataset holds, how a strategy mixes it, and what a network will see of it.

`downpour inspect` shows it. Rows are read by the code that reads them in training (`shuffler`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from downpour.cluster.errors import UserError
from downpour.shuffler.dataset.encoding import PackedBits
from downpour.shuffler.dataset.image_columns import holds_images
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset, schema_of_split, split_names
from downpour.shuffler.errors import DecodeError
from downpour.shuffler.feed import Feed
from downpour.shuffler.images.augment import AugmentConfig
from downpour.shuffler.images.rows import image_buffers
from downpour.shuffler.images.specs import ImageSpec
from downpour.shuffler.plan.keys import stream_key
from downpour.shuffler.plan.pairs import count_pairs
from downpour.shuffler.plan.permutation import Permutation
from downpour.shuffler.plan.plan import Plan, Strategy

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

SAMPLE_ROWS = 512
"""Rows whose image sizes are looked at. Pairs are counted for eight times as many."""

LEAST_SIDE, CAPTION_HEIGHT = 72, 14
"""Of a contact sheet, in pixels: smaller images are enlarged, so that captions have room."""
MOST_CLASSES = 20
"""Classes that are shown one by one."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """What is looked at."""

    split: str = "train"
    """Split for the counts of pairs and for the contact sheet."""
    batch_size: int = 32
    """Examples in a mini-batch."""
    strategy: Strategy = "pairwise"
    """How examples meet."""
    buffer_rows: int = 1000
    """Examples that the `buffer` strategy shuffles at a time."""
    verify: bool = False
    """Read every shard, and compare it with its checksum in the manifest."""
    epochs: int = 10
    """Epochs over which pairs are counted."""
    seed: int = 0
    """Seed of the order of rows and of the variations of images."""
    image_size: int | None = None
    """Height and width of the images on the contact sheet; default: those of the first image."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How the images on the contact sheet are varied."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or (self.image_size is not None and self.image_size < 1):
            raise ValueError(
                f"epochs is {self.epochs} and image size {self.image_size}: give at least 1"
            )


def inspect(
    data: str, config: InspectConfig, *, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Return what a dataset holds and how the strategy mixes it, as plain data.

    Raises:
        UserError: it has no pictures with labels.
        DatasetError: it cannot be opened.
        PlanError: the plan does not reach so many epochs.
    """
    names = split_names(data)
    if config.split not in names:
        Dataset.open(data, config.split)  # its error lists the splits
    _check_labelled(data, config.split)
    splits = {
        name: Dataset.open(data, name, verify_checksums=config.verify or None) for name in names
    }
    plan = _plan(splits[config.split], config)
    pairs = count_pairs(plan, config.epochs, max_rows=SAMPLE_ROWS * 8, progress=progress)
    bound = plan.max_epochs
    return {
        "data": data,
        "splits": {name: _split(dataset) for name, dataset in splits.items()},
        "pairs": {
            "split": config.split,
            "strategy": config.strategy,
            "batch_size": config.batch_size,
            "mini_batches": plan.num_batches,
            "epochs": config.epochs,
            "rows_counted": pairs.rows,
            "meetings": pairs.meetings,
            "repeats": pairs.repeats,
            "repeats_by_chance": round(pairs.chance, 1),
            "times_chance": round(pairs.times_chance, 3),
            "epochs_without_repeats": bound,
        },
    }


def _plan(dataset: Dataset, config: InspectConfig) -> Plan:
    plan = Plan(
        num_rows=dataset.num_rows,
        batch_size=config.batch_size,
        seed=config.seed,
        strategy=config.strategy,
        shard_rows=dataset.shard_rows if config.strategy == "within_shard" else (),
        buffer_rows=config.buffer_rows,
    )
    plan.check_epochs(config.epochs)
    return plan


def _split(dataset: Dataset) -> dict[str, Any]:
    counts = _label_counts(dataset)
    names = dataset.class_names
    return {
        "rows": dataset.num_rows,
        "shards": len(dataset.shards),
        "bytes": sum(shard.num_bytes for shard in dataset.shards),
        "encoding": dataset.encoding.describe(),
        "fingerprint": dataset.fingerprint,
        "images": _images(dataset),
        "classes": [
            {"label": label, "name": names[label] if label < len(names) else None, "rows": rows}
            for label, rows in sorted(counts.items())
        ],
    }


def _check_labelled(data: str, split: str) -> None:
    """Check that a dataset is what can be shown, and no table and no masks."""
    schema, where = schema_of_split(data, split)
    label = schema.field("label").type if "label" in schema.names else None
    if schema.names and (label is None or holds_images(label)):
        raise UserError(
            f"inspect shows pictures with labels, and {where} has {', '.join(schema.names)}: run "
            "ingest on their source; of a table or masks `downpour train` says what it takes"
        )


def _label_counts(dataset: Dataset) -> dict[int, int]:
    """Count the rows of each label, reading that column only. Rows without a label count as -1."""
    found: dict[int, int] = {}
    for shard in dataset.shards:
        with dataset.filesystem.open_input_file(shard.path) as source:
            labels = pq.read_table(source, columns=["label"]).column("label").fill_null(-1)
        values, counts = np.unique(labels.to_numpy(), return_counts=True)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            found[value] = found.get(value, 0) + count
    return found


def _images(dataset: Dataset) -> dict[str, Any]:
    """Return the sizes of a sample of the images: least, median and most."""
    if isinstance(dataset.encoding, PackedBits):
        bits = dataset.encoding
        return {"sampled": 0, "height": [bits.height] * 3, "width": [bits.width] * 3}
    from downpour.shuffler.images import pixels

    count = min(SAMPLE_ROWS, dataset.num_rows)
    order = Permutation(dataset.num_rows, stream_key(0, "sample"))
    rows = np.sort(order.forward(np.arange(count)))
    with contextlib.closing(RowReader(dataset)) as reader:
        batch = reader.take(rows)
    sizes, unreadable = [], 0
    for data in image_buffers(batch.column("image")):
        try:
            file = pixels.open_image(data or b"", 3)
            sizes.append((file.height, file.width, len(data or b"")))
        except DecodeError:
            unreadable += 1
    columns = np.array(sizes or [(0, 0, 0)]).T
    height, width, num_bytes = ([int(v) for v in (c.min(), np.median(c), c.max())] for c in columns)
    return {
        "sampled": count,
        "unreadable": unreadable,
        "height": height,
        "width": width,
        "bytes": num_bytes,
    }


def contact_sheet(data: str, config: InspectConfig, path: Path) -> int:
    """Save a mini-batch of epoch 0, varied as in training, as one picture; return its images.

    Each has its label below.

    Raises:
        UserError: the picture cannot be written.
        DecodeError: an image cannot be decoded.
    """
    dataset = Dataset.open(data, config.split)
    encoding = dataset.encoding
    if isinstance(encoding, PackedBits):
        spec = ImageSpec(
            height=encoding.height, width=encoding.width, channels=1, binary_threshold=0
        )
    else:
        spec = _sheet_spec(dataset, config)
    options: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed}
    feed = Feed(dataset, image=spec, augment=config.augment, **options)
    with contextlib.closing(feed):
        inputs, labels = next(iter(feed))
    sheet = _sheet(inputs, [_label_text(dataset, int(label)) for label in labels])
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the contact sheet {path} cannot be written: {error}; give a name such as sheet.png"
        ) from None
    return len(inputs)


def _sheet(inputs: NDArray[np.float32], captions: Sequence[str]) -> PilImage:
    """Return images in a grid, each with its caption below.

    Args:
        inputs: in [0, 1], float32 [m, channels, height, width].
        captions: one of each, cut to what fits.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = inputs.shape[2:]
    scale = max(1, -(-LEAST_SIDE // max(height, width)))
    cell_width, cell_height = width * scale + 4, height * scale + CAPTION_HEIGHT + 4
    columns = int(np.ceil(np.sqrt(len(inputs))))
    rows = -(-len(inputs) // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for number, (image, caption) in enumerate(zip(inputs, captions, strict=True)):
        row, column = divmod(number, columns)
        left, top = column * cell_width, row * cell_height
        pixels = np.rint(image.transpose(1, 2, 0) * 255).astype(np.uint8)
        pixels = np.broadcast_to(pixels, (height, width, 3)) if pixels.shape[2] == 1 else pixels
        pixels = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
        sheet.paste(Image.fromarray(pixels), (left + 2, top + 2))
        fits = len(caption)
        while fits and draw.textlength(caption[:fits], font=font) > cell_width - 4:
            fits -= 1
        at = (left + 2, top + height * scale + 3)
        draw.text(at, caption[:fits], fill="black", font=font)
    return sheet


def _label_text(dataset: Dataset, label: int) -> str:
    """The class's name and number in characters that the built-in font has."""
    names = dataset.class_names
    named = names[label] if 0 <= label < len(names) else ""
    text = f"{label} {named}" if named and named != str(label) else str(label)
    return text.encode("latin-1", "replace").decode("latin-1")


def _sheet_spec(dataset: Dataset, config: InspectConfig) -> ImageSpec:
    if config.image_size is not None:
        return ImageSpec(height=config.image_size, width=config.image_size, fit="crop")
    from downpour.shuffler.images import pixels

    with contextlib.closing(RowReader(dataset)) as reader:
        (data,) = image_buffers(reader.take(np.zeros(1, np.int64)).column("image"))
    file = pixels.open_image(data or b"", 3)
    side = min(file.height, file.width)
    return ImageSpec(height=side, width=side, fit="exact" if file.height == file.width else "crop")


def show(found: dict[str, Any], console: Console) -> None:
    """Print what `inspect` found."""
    for name, split in found["splits"].items():
        images = split["images"]
        ends = (0, 2) if _vary(images) else (1,)
        sizes = " to ".join(f"{images['height'][i]}x{images['width'][i]}" for i in ends)
        console.print(
            f"[bold]{name}[/bold]: {split['rows']:,} rows in {split['shards']} shard(s), "
            f"{split['bytes']:,} bytes; {len(split['classes'])} classes; images of {sizes}"
        )
        if images.get("unreadable"):
            console.print(
                f"  {images['unreadable']} of {images['sampled']} images cannot be read",
                style="yellow",
            )
    pairs = found["pairs"]
    table = Table(box=None, pad_edge=False, show_header=False)
    for label, rows in _class_lines(found["splits"][pairs["split"]]["classes"]):
        table.add_row(label, rows)
    console.print(table)
    bound = pairs["epochs_without_repeats"]
    console.print(
        f"pairs by [bold]{pairs['strategy']}[/bold], {pairs['epochs']} epoch(s) of "
        f"{pairs['mini_batches']:,} mini-batches: {pairs['repeats']:,} of "
        f"{pairs['meetings']:,} meetings of {pairs['rows_counted']:,} rows were repeats, "
        f"{pairs['times_chance']:.2f} times chance ({pairs['repeats_by_chance']:,.0f})"
        + (f"; none in {bound:,} epochs" if bound else ""),
        highlight=False,
    )
    if "sheet" in found:
        console.print(f"{found['sheet']['images']} images in {found['sheet']['path']}")


def _vary(images: dict[str, Any]) -> bool:
    return any(images[side][0] != images[side][2] for side in ("height", "width"))


def _class_lines(classes: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the classes by label; if there are many, the first ones and the others' range."""
    named = [(f"  {c['label']} {c['name'] or ''}".rstrip(), f"{c['rows']:,}") for c in classes]
    if len(named) <= MOST_CLASSES:
        return named
    rows = [c["rows"] for c in classes]
    return [
        *named[:MOST_CLASSES],
        (f"  and {len(named) - MOST_CLASSES} more", f"{min(rows):,} to {max(rows):,}"),
    ]
