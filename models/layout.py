"""Where each parameter of a model lies in its flat buffers, and checkpoints by name.

Here: `Layout`, a plain description that outlives the process (JSON), and the way between flat
buffers and tensors under PyTorch's names. Not here: modules, which `flat` points at buffers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor

from downpour.models.errors import LayoutError


@dataclass(frozen=True, kw_only=True)
class ParameterEntry:
    """One parameter: elements `[start, stop)` of the weights and of the gradient."""

    name: str
    """Dotted, as `nn.Module.named_parameters` gives it."""
    shape: tuple[int, ...]
    """Row-major within the range."""
    start: int
    """First element."""
    stop: int
    """One past the last element."""
    decays: bool
    """Whether weight decay applies to it."""
    trained: bool = True
    """Whether updates change it."""


@dataclass(frozen=True, kw_only=True)
class FeatureEntry:
    """One batch normalization layer: columns `[start, stop)` of moments and statistics."""

    name: str
    """The layer's dotted name; empty if it is the model itself."""
    start: int
    """First column."""
    stop: int
    """One past the last column."""

    def named(self, part: str) -> str:
        """The name of a buffer of the layer in a `state_dict`."""
        return f"{self.name}.{part}" if self.name else part


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A model's P parameters and F normalized features, laid end to end without gaps.

    Parameters that decay come first, so that decay applies to the range `[0, decayed)`, and those
    that are frozen come last, so that `[0, trained)` is all that updates change. Raises
    `LayoutError` for entries that overlap, leave a gap or are out of order.
    """

    entries: tuple[ParameterEntry, ...]
    """The parameters, in the order in which they lie."""
    features: tuple[FeatureEntry, ...]
    """The batch normalization layers, in the order in which they lie."""

    def __post_init__(self) -> None:
        _check_contiguous(self.entries)
        _check_contiguous(self.features)
        for entry in self.entries:
            if math.prod(entry.shape) != entry.stop - entry.start:
                raise LayoutError(
                    f"layout: '{entry.name}' has shape {list(entry.shape)} "
                    f"but the range [{entry.start}, {entry.stop})"
                )
        for before, after in pairwise(self.entries):
            if after.decays and not before.decays:
                raise LayoutError(
                    f"layout: '{after.name}' decays and comes after '{before.name}', "
                    "which does not: those that decay go first"
                )
            if after.trained and not before.trained:
                raise LayoutError(
                    f"layout: '{after.name}' is trained and comes after '{before.name}', "
                    "which is not: those that are frozen go last"
                )

    @property
    def num_parameters(self) -> int:
        """P, the elements of the weights."""
        return self.entries[-1].stop if self.entries else 0

    @property
    def num_features(self) -> int:
        """F, the columns of moments and statistics."""
        return self.features[-1].stop if self.features else 0

    @property
    def decayed(self) -> int:
        """How many leading elements take weight decay."""
        return max((entry.stop for entry in self.entries if entry.decays), default=0)

    @property
    def trained(self) -> int:
        """How many leading elements updates change."""
        return max((entry.stop for entry in self.entries if entry.trained), default=0)

    def moment_columns(self, together: int) -> Tensor:
        """Where each mini-batch's moments are, of k that a model took `together`.

        Returns:
            int64 `[k, F]`: column j, f of mini-batch j's feature f in moments `[3, k*F]`, which
            lie layer by layer and, within a layer, mini-batch by mini-batch.
        """
        columns = torch.empty(together, self.num_features, dtype=torch.int64)
        for feature in self.features:
            start, stop = together * feature.start, together * feature.stop
            size = feature.stop - feature.start
            columns[:, feature.start : feature.stop] = torch.arange(start, stop).view(-1, size)
        return columns

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON. The totals are for readers."""
        return {
            "num_parameters": self.num_parameters,
            "num_features": self.num_features,
            "decayed": self.decayed,
            "entries": [asdict(entry) | {"shape": list(entry.shape)} for entry in self.entries],
            "features": [asdict(feature) for feature in self.features],
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """The layout that `to_dict` described. Raises `LayoutError` if it does not hold together.

        The totals are checked where they are given.
        """
        try:
            layout = cls(
                entries=tuple(
                    ParameterEntry(**{**entry, "shape": tuple(entry["shape"])})
                    for entry in plain["entries"]
                ),
                features=tuple(FeatureEntry(**feature) for feature in plain["features"]),
            )
        except (KeyError, TypeError) as error:
            raise LayoutError(
                f"layout: not as written by this program ({error!r}): "
                "take it from an intact checkpoint"
            ) from error
        for total in ("num_parameters", "num_features", "decayed"):
            if plain.get(total, getattr(layout, total)) != getattr(layout, total):
                raise LayoutError(
                    f"layout: {total} is {plain[total]} but the entries make "
                    f"{getattr(layout, total)}: take it from an intact checkpoint"
                )
        return layout


def _check_contiguous(ranges: Sequence[ParameterEntry | FeatureEntry]) -> None:
    end = 0
    names = set()
    for entry in ranges:
        if entry.start != end or entry.stop < entry.start:
            raise LayoutError(
                f"layout: '{entry.name}' has the range [{entry.start}, {entry.stop}), "
                f"which does not begin at {end}"
            )
        if entry.name in names:
            raise LayoutError(f"layout: '{entry.name}' is there twice")
        names.add(entry.name)
        end = entry.stop


def check_buffer(what: str, buffer: Tensor, *shape: int) -> None:
    """Raises `LayoutError` unless `buffer` is contiguous float32 of `shape` outside autograd."""
    if buffer.dtype != torch.float32 or buffer.shape != shape:
        raise LayoutError(
            f"{what} is {buffer.dtype} {list(buffer.shape)}: "
            f"this layout takes torch.float32 {list(shape)}"
        )
    if not buffer.is_contiguous() or buffer.requires_grad:
        raise LayoutError(f"{what} must be contiguous and not require a gradient")


def state_dict(weights: Tensor, statistics: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Views of the flat buffers under PyTorch's names; no copying, so clone what must last.

    `weights` is float32 `[P]`, `statistics` float32 `[2, F]` (mean, unbiased variance), which
    become `<layer>.running_mean` and `<layer>.running_var`. The model's own `load_state_dict`
    takes the result, and so does the same network made of PyTorch's layers, but for
    `num_batches_tracked`.
    """
    check_buffer("weights", weights, layout.num_parameters)
    check_buffer("statistics", statistics, 2, layout.num_features)
    state = {e.name: weights[e.start : e.stop].view(e.shape) for e in layout.entries}
    for feature in layout.features:
        mean, variance = statistics[:, feature.start : feature.stop]
        state[feature.named("running_mean")] = mean
        state[feature.named("running_var")] = variance
    return state


def flatten(state: Mapping[str, Tensor], layout: Layout) -> tuple[Tensor, Tensor]:
    """`(weights, statistics)`, new float32 `[P]` and `[2, F]`: the inverse of `state_dict`.

    Raises `LayoutError` for a name that is missing or unknown and for another shape or dtype.
    The `num_batches_tracked` of PyTorch's layers is passed over: nothing here depends on it.
    """
    weights = torch.empty(layout.num_parameters)
    statistics = torch.empty(2, layout.num_features)
    wanted = state_dict(weights, statistics, layout)
    passed_over = {feature.named("num_batches_tracked") for feature in layout.features}
    missing, unknown = wanted.keys() - state.keys(), state.keys() - wanted.keys() - passed_over
    if missing or unknown:
        which, names = ("lacks", missing) if missing else ("has the unknown", unknown)
        raise LayoutError(
            f"the checkpoint {which} {_listed(names)}: use one of the same model and options"
        )
    for name, into in wanted.items():
        tensor = state[name]
        if tensor.shape != into.shape or tensor.dtype != into.dtype:
            raise LayoutError(
                f"the checkpoint's '{name}' is {tensor.dtype} {list(tensor.shape)}, the model's "
                f"{into.dtype} {list(into.shape)}: use one of the same model and options"
            )
        into.copy_(tensor)
    return weights, statistics


def _listed(names: set[str]) -> str:
    """Up to three of the names, quoted, and how many more there are."""
    first = ", ".join(f"'{name}'" for name in sorted(names)[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"
