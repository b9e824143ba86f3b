"""A recipe in full: its network with all parameters counted, and every value."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich.table import Table

from downpour.cluster.config.derive import model_spec
from downpour.cluster.config.run import RunConfig
from downpour.cluster.config.settings import settings_of

if TYPE_CHECKING:
    from rich.console import Console

    from downpour.models.flat import Layout


def describe(config: RunConfig, console: Console) -> None:
    """Print the network's parts, its parameter count, and every setting."""
    import torch

    from downpour.models.inception import Inception

    spec = model_spec(config)
    model = spec.build_flat()
    console.print(f"[bold]{config.recipe}[/bold]: {config.model.model}")
    table = Table(box=None, pad_edge=False)
    table.add_column("part")
    if isinstance(model.module, Inception):
        table.add_column("output", justify="right")
    table.add_column("parameters", justify="right")
    shapes = {}
    if isinstance(model.module, Inception):
        shapes = {p.stage.name: f"{p.size}x{p.size}x{p.channels}" for p in model.module.plan}
    for part, count in parameters_by_part(model.layout).items():
        cells = [part.rpartition(".")[2]]
        if shapes:
            cells.append(shapes.get(cells[0], "–"))
        table.add_row(*cells, f"{count:,}")
    console.print(table)
    layout = model.layout
    console.print(
        f"{layout.num_parameters:,} parameters ({4 * layout.num_parameters / 2**20:.1f} MiB as "
        f"{str(torch.float32).removeprefix('torch.')}), {layout.num_features:,} normalised features"
    )
    values = Table(box=None, pad_edge=False, show_header=False)
    for setting in settings_of(RunConfig):
        if setting.is_mapping:
            continue
        value = setting.value_in(config)
        values.add_row(setting.option, "none" if value is None else str(value))
    for name, value in config.model.all_arguments.items():
        values.add_row(f"[dim]network[/dim] {name}", str(value))
    console.print()
    console.print(values)


def parameters_by_part(layout: Layout) -> dict[str, int]:
    """Parameters of each part of a network: of each stage, or by the first word of their names."""
    counts: Counter[str] = Counter()
    for entry in layout.entries:
        names = entry.name.split(".")
        depth = 2 if names[0] == "stages" else 1
        counts[".".join(names[:depth])] += entry.stop - entry.start
    order = dict.fromkeys(_stage_order(layout))
    return {name: counts[name] for name in order}


def _stage_order(layout: Layout) -> list[str]:
    """Parts in the order that the network has them; the layout puts decayed entries first."""
    parts = [
        ".".join(e.name.split(".")[: 2 if e.name.startswith("stages.") else 1])
        for e in layout.entries
    ]
    return [*(p for p in parts if p != "output"), "output"] if "output" in parts else parts
