"""What a network starts from besides its own initialization: `--init`, and `--freeze`.

A file is looked at before the run's folder is made and before Ray starts. What was taken from it is
kept in the folder, so resuming and replaying do not need the file again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from downpour.cluster.config.derive import model_spec
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError, one_line
from downpour.cluster.run.folder import BEST, INITIAL, MODEL, RunFolder
from downpour.paramserver import durable
from downpour.workers.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from downpour.models.flat import FlatModel

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training programs keep a state_dict among other things."""
COUNTER = "num_batches_tracked"
SHOWN = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class InitialState:
    """Weights and BN statistics to start from, under PyTorch's names."""

    tensors: Mapping[str, Tensor]
    """float32; what is not among them is the network's own."""
    notes: tuple[str, ...] = ()
    """What people are told, a line each."""


def look(config: RunConfig) -> InitialState | None:
    """Check what a run starts from; None if that is the network's own initialization.

    Raises:
        UserError: the file cannot be read, or is of another network.
        ModelError: the network cannot be built, or a pattern of `--freeze` matches nothing.
    """
    model = config.model
    if model.init is None and not model.freeze:
        return None
    flat = model_spec(config).build_flat("cpu")
    return None if model.init is None else read(model, flat)


def write(folder: RunFolder, state: InitialState) -> None:
    """Keep the state in the run's folder, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    try:
        durable.save_tensors(state.tensors, folder.path / INITIAL)
    except OSError as error:
        folder.discard_if_unused()
        raise UserError(f"{folder.path / INITIAL} cannot be written: {error.strerror}") from None


def read(config: ModelConfig, model: FlatModel) -> InitialState:
    """Read what `config.init` has for a network.

    Args:
        config: names the file, and says what of it is taken.
        model: the network, with its own initial weights.

    Returns:
        Weights and statistics for every name of the network: those that the file lacks are the
        network's own, which happens only if the configuration asks for it.

    Raises:
        UserError: the file cannot be read, or has not what the network needs.
    """
    import torch

    from downpour.models.layout import state_dict

    assert config.init is not None
    path = _path(config.init)
    notes: list[str] = []
    found = _tensors(path)
    if config.init_prefix is not None:
        found = _below(found, config.init_prefix, path, notes)
    wanted = state_dict(model.weights, model.statistics, model.layout)
    known = wanted.keys() | model.module.state_dict().keys()
    fits = {n for n, t in found.items() if n in wanted and t.shape == wanted[n].shape}
    missing = [n for n in wanted if n not in found]
    other = [n for n in wanted if n in found and n not in fits]
    unknown = [n for n in found if n not in known and n.rpartition(".")[2] != COUNTER]
    if not config.init_matching:
        _check_all(path, found, wanted, missing=missing, other=other, unknown=unknown)
    elif not fits:
        raise UserError(
            f"init is {path}, of which nothing fits the network: it has {_some(found)}, and the "
            f"network {_some(wanted)}; give --init-prefix if only the beginning differs"
        )
    taken = {name: found[name].detach().to(torch.float32) for name in fits}
    for name, tensor in taken.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"init is {path}, whose {name!r} is not finite: give another file")
    if config.init_matching:
        notes.append(f"init: {len(fits)} of the network's {len(wanted)} tensors are from {path}")
        fresh = [*missing, *(f"{n} ({_shapes(found[n], wanted[n])})" for n in other)]
        if fresh:
            notes.append(f"init: fresh, and not from the file: {', '.join(fresh)}")
        if unknown:
            notes.append(f"init: not taken from the file: {', '.join(unknown)}")
    tensors = {n: taken.get(n, t).clone().contiguous() for n, t in wanted.items()}
    return InitialState(tensors=tensors, notes=tuple(notes))


def _check_all(
    path: Path,
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    *,
    missing: list[str],
    other: list[str],
    unknown: list[str],
) -> None:
    """Refuse a file that is not of exactly this network."""
    remedy = "give --init-matching to take what fits and leave the rest fresh"
    if other:
        name = other[0]
        more = f" ({len(other) - 1} more differ, too)" if len(other) > 1 else ""
        shapes = _shapes(found[name], wanted[name])
        raise UserError(f"init is {path}, whose {name!r} is {shapes}{more}: {remedy}")
    if missing:
        prefix = _common_prefix(found, wanted)
        if prefix:
            remedy = f"give --init-prefix {prefix}, with which all of its names begin"
        raise UserError(f"init is {path}, which lacks {_some(missing)}: {remedy}")
    if unknown:
        raise UserError(f"init is {path}, which has the unknown {_some(unknown)}: {remedy}")


def _common_prefix(found: Iterable[str], wanted: Iterable[str]) -> str:
    """What all of the file's names have before the network's; empty if there is no such thing."""
    names, first = list(found), next(iter(wanted))
    prefixes = {name[: -len(first)] for name in names if name.endswith(f".{first}")}
    return next((p for p in prefixes if all(name.startswith(p) for name in names)), "")


def _below(
    found: Mapping[str, Tensor], prefix: str, path: Path, notes: list[str]
) -> dict[str, Tensor]:
    """What begins with a prefix, without it."""
    below = {name[len(prefix) :]: t for name, t in found.items() if name.startswith(prefix)}
    if not below:
        raise UserError(
            f"init prefix is {prefix!r}, with which no name in {path} begins: it has {_some(found)}"
        )
    rest = len(found) - len(below)
    if rest:
        notes.append(f"init: {rest} tensors of {path} do not begin with {prefix!r}, and are left")
    return below


def _path(name: str) -> Path:
    """The file; of a run's folder, its model."""
    path = Path(name).expanduser()
    if not path.is_dir():
        return path
    for file in (MODEL, BEST):
        if (path / file).is_file():
            return path / file
    raise UserError(
        f"init is {name}, a folder without {MODEL}: give a run's folder, or a file of weights"
    )


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file by name; nothing in it is executed.

    Raises:
        UserError: it cannot be read, or has no tensors by name.
    """
    try:
        loaded = _load(path)
    except FileNotFoundError:
        raise UserError(f"init is {path}, which does not exist: give a file of weights") from None
    except Exception as error:
        raise UserError(
            f"init is {path}, which cannot be read ({type(error).__name__}: "
            f"{one_line(error)[:200]}): give a safetensors file, or a state_dict that torch.save "
            "wrote"
        ) from None
    import torch

    for key in WRAPPERS:
        inner = loaded.get(key) if isinstance(loaded, Mapping) else None
        if isinstance(inner, Mapping):
            loaded = inner
            break
    if not isinstance(loaded, Mapping) or not all(isinstance(name, str) for name in loaded):
        raise UserError(f"init is {path}, which holds no tensors by name: give a state_dict")
    tensors = {n: t for n, t in loaded.items() if isinstance(t, torch.Tensor)}
    if not tensors:
        raise UserError(f"init is {path}, which holds no tensors by name: give a state_dict")
    return tensors


def _load(path: Path) -> Any:
    import safetensors.torch
    import torch

    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(str(path))
    return torch.load(path, map_location="cpu", weights_only=True)


def _shapes(found: Tensor, wanted: Tensor) -> str:
    return f"{list(found.shape)} in the file and {list(wanted.shape)} in the network"


def _some(names: Iterable[str]) -> str:
    """The first few of some names, quoted, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name) for name in names[:SHOWN]) + more
