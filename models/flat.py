"""A module whose parameters are views into one buffer, and whose gradients are into another.

Here: `FlatModel`, which takes a module's parameters apart from their own memory and points them,
and its batch normalization layers, at buffers of the caller's choice, shared memory included.
Not here: the description of where things lie and checkpoints by name (`layout`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from downpour.models.batchnorm import BatchNorm, Pass
from downpour.models.conversion.copies import detached_copy
from downpour.models.conversion.initial import initial_statistics
from downpour.models.errors import LayoutError
from downpour.models.layout import (
    FeatureEntry,
    Layout,
    ParameterEntry,
    check_buffer,
    flatten,
    state_dict,
)

__all__ = [
    "DecayPredicate",
    "FeatureEntry",
    "FlatModel",
    "Layout",
    "ParameterEntry",
    "flatten",
    "is_linear_weight",
    "layout_of",
    "state_dict",
]

DecayPredicate = Callable[[nn.Module, str], bool]
"""`(owner, dotted name of the parameter) -> whether it takes weight decay`."""


def is_linear_weight(owner: nn.Module, name: str) -> bool:
    """True of the weights of linear and convolutional layers: the usual choice for L2 weight loss.

    Biases, gamma and beta are left alone. (L2 on a weight that BN follows changes only its scale,
    which BN takes out again, and so in effect the learning rate.)
    """
    return isinstance(owner, (nn.Linear, _ConvNd)) and name.rpartition(".")[2] == "weight"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Place:
    """A parameter's slot in the module that owns it."""

    owner: nn.Module
    local_name: str
    name: str
    others: tuple[tuple[nn.Module, str], ...] = ()
    """Further slots that hold the same parameter, if it is tied: owners and local names."""

    @property
    def parameter(self) -> nn.Parameter:
        parameter = self.owner._parameters[self.local_name]
        assert parameter is not None
        return parameter


def _places(module: nn.Module) -> list[_Place]:
    """Every parameter by the first slot that holds it."""
    found: dict[int, _Place] = {}
    for path, owner in module.named_modules():
        for local_name, parameter in owner._parameters.items():
            if parameter is None:
                continue
            first = found.get(id(parameter))
            if first is None:
                name = f"{path}.{local_name}" if path else local_name
                found[id(parameter)] = _Place(owner=owner, local_name=local_name, name=name)
            else:
                others = (*first.others, (owner, local_name))
                found[id(parameter)] = replace(first, others=others)
    return list(found.values())


def _check_parameters(places: list[_Place]) -> None:
    seen: dict[int, str] = {}
    for place in places:
        parameter = place.parameter
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise LayoutError(
                f"parameter '{place.name}' has no shape yet: give the layer its input size"
            )
        if parameter.numel() and not parameter.is_meta:
            first = seen.setdefault(parameter.data_ptr(), place.name)
            if first != place.name:
                raise LayoutError(
                    f"parameters '{first}' and '{place.name}' are two over the same memory: make "
                    "them one, as in `b.weight = a.weight`, or give each memory of its own"
                )
        if parameter.dtype != torch.float32:
            raise LayoutError(
                f"parameter '{place.name}' is {parameter.dtype}: make the model float32"
            )


def _norm_layers(module: nn.Module) -> list[tuple[str, BatchNorm]]:
    layers = []
    for name, layer in module.named_modules():
        if isinstance(layer, BatchNorm):
            layers.append((name, layer))
        elif isinstance(layer, _NormBase) and layer.track_running_stats:
            raise LayoutError(
                f"layer '{name}' is {type(layer).__name__}, which keeps running averages of its "
                "own: give it track_running_stats=False, or use batch normalization"
            )
    return layers


def _ordered(places: list[_Place], decay: DecayPredicate) -> list[tuple[_Place, bool]]:
    """Those that decay first, frozen ones last; within each part, in the module's order.

    A frozen parameter does not decay, so that nothing moves it.
    """
    marked = [(p, p.parameter.requires_grad and decay(p.owner, p.name)) for p in places]
    return sorted(marked, key=lambda pair: (not pair[1], not pair[0].parameter.requires_grad))


def _layout(ordered: list[tuple[_Place, bool]], norms: list[tuple[str, BatchNorm]]) -> Layout:
    entries, features, start = [], [], 0
    for place, decays in ordered:
        shape = tuple(place.parameter.shape)
        stop = start + place.parameter.numel()
        entries.append(
            ParameterEntry(
                name=place.name,
                shape=shape,
                start=start,
                stop=stop,
                decays=decays,
                trained=place.parameter.requires_grad,
            )
        )
        start = stop
    start = 0
    for name, layer in norms:
        stop = start + layer.num_features
        features.append(FeatureEntry(name=name, start=start, stop=stop))
        start = stop
    return Layout(entries=tuple(entries), features=tuple(features))


def _analyse(
    module: nn.Module, decay: DecayPredicate
) -> tuple[Layout, list[_Place], list[BatchNorm]]:
    places = _places(module)
    if not places:
        raise LayoutError(f"{type(module).__name__} has no parameters: there is nothing to train")
    _check_parameters(places)
    norms = _norm_layers(module)
    ordered = _ordered(places, decay)
    return _layout(ordered, norms), [p for p, _ in ordered], [layer for _, layer in norms]


def layout_of(module: nn.Module, *, decay: DecayPredicate = is_linear_weight) -> Layout:
    """The layout that `FlatModel` would give `module`; allocates nothing and changes nothing.

    Works on a module built under `torch.device("meta")` as well. Raises `LayoutError` as
    `FlatModel` does.
    """
    return _analyse(module, decay)[0]


class FlatModel:
    """`module` with its P parameters in one buffer, ready for a training or inference step.

    Construction moves the parameters' values into a new buffer of their own and makes one for the
    gradient; `bind` then moves the whole model to other buffers by changing pointers. A module
    built under `torch.device("meta")` has no values to move: for it nothing is allocated until
    `bind` names the buffers.

    One step, once bound::

        flat.zero_gradient()
        loss(flat.module(x), y).backward()    # accumulates straight into flat.gradient

    Gradients must stay views, so the module's `zero_grad()` and optimizers that set gradients
    to None are not for it; `check` finds out. One thread at a time: a slot with concurrent steps
    beside it needs a `FlatModel` of its own.

    A parameter that several layers share (tied weights, or a layer under two names) is one entry,
    under the first of its names.

    Raises `LayoutError` for a model without parameters, two parameters over the same memory (names
    both), a parameter that is not float32, and PyTorch's own normalization layers with running
    averages.
    """

    module: nn.Module
    """The module itself, its parameters now views."""
    layout: Layout
    """Where everything lies."""

    def __init__(self, module: nn.Module, *, decay: DecayPredicate = is_linear_weight) -> None:
        self.module = module
        self._decay = decay
        self.layout, self._places, self._norms = _analyse(module, decay)
        self._weights: Tensor | None = None
        self._gradient: Tensor | None = None
        self._moments: Tensor | None = None
        self._statistics: Tensor | None = None
        self._pass = Pass()
        module.register_forward_pre_hook(self._pass)
        self.initial = initial_statistics(list(zip(self.layout.features, self._norms, strict=True)))
        """The BN statistics that the module was made with."""
        on_meta = {place.parameter.is_meta for place in self._places}
        if on_meta == {True, False}:
            raise LayoutError("some parameters are on the meta device and some are not")
        if on_meta == {False}:
            self._take_over()

    def _take_over(self) -> None:
        """Moves the values that the module has into buffers made for them."""
        devices = {place.parameter.device for place in self._places}
        if len(devices) > 1:
            raise LayoutError(f"the parameters are on {sorted(map(str, devices))}: use one device")
        device = devices.pop()
        weights = torch.empty(self.layout.num_parameters, device=device)
        for entry, place in zip(self.layout.entries, self._places, strict=True):
            weights[entry.start : entry.stop].copy_(place.parameter.detach().reshape(-1))
        statistics = self.initial.statistics.to(device, copy=True)
        self.bind(weights, gradient=torch.zeros_like(weights), statistics=statistics)

    def bind(
        self,
        weights: Tensor,
        gradient: Tensor | None = None,
        moments: Tensor | None = None,
        statistics: Tensor | None = None,
        together: int = 1,
        in_blocks: bool = False,
    ) -> None:
        """Points every parameter and every batch normalization layer at these buffers.

        No copying: the model is from now on whatever the buffers hold. All are contiguous float32
        on one device: `weights` `[P]`; `gradient` `[P]`, or None for a model that only infers;
        `moments` `[3, k*F]` (count, mean, unbiased variance), where training forwards leave those
        of the k mini-batches that they take `together`, interleaved or `in_blocks` (`BatchNorm`;
        `by_batch` tells them apart);
        `statistics` `[2, F]` (mean, unbiased variance of the population), which
        inference uses, and training for layers that are frozen. None for either of the last two
        means memory of this object's own, with the statistics that the module was made with.

        Raises `LayoutError` for a buffer that does not match the layout.
        """
        num_features = self.layout.num_features
        if moments is None:
            moments = torch.zeros(3, together * num_features, device=weights.device)
        if statistics is None:
            statistics = self.initial.statistics.to(weights.device, copy=True)
        check_buffer("weights", weights, self.layout.num_parameters)
        check_buffer("moments", moments, 3, together * num_features)
        check_buffer("statistics", statistics, 2, num_features)
        if gradient is not None:
            check_buffer("gradient", gradient, self.layout.num_parameters)
        for what, buffer in (
            ("gradient", gradient),
            ("moments", moments),
            ("statistics", statistics),
        ):
            if buffer is not None and buffer.device != weights.device:
                raise LayoutError(
                    f"{what} is on {buffer.device} and weights on {weights.device}: use one device"
                )
        for entry, place in zip(self.layout.entries, self._places, strict=True):
            _point(place, entry, weights, gradient)
        for feature, layer in zip(self.layout.features, self._norms, strict=True):
            layer.bind(
                moments=moments[:, together * feature.start : together * feature.stop],
                statistics=statistics[:, feature.start : feature.stop],
                together=together,
                in_blocks=in_blocks,
                within=self._pass,
            )
        self._pass.moments = moments if num_features else None
        self._weights, self._gradient = weights, gradient
        self._moments, self._statistics = moments, statistics

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The module's parameters in the layout's order; `bind` may make new ones."""
        return [place.parameter for place in self._places]

    @property
    def weights(self) -> Tensor:
        """float32 `[P]`: the buffer that the parameters are views of."""
        return _bound(self._weights)

    @property
    def gradient(self) -> Tensor | None:
        """float32 `[P]`: the buffer that autograd accumulates into, if one is bound."""
        return self._gradient

    @property
    def moments(self) -> Tensor:
        """float32 `[3, F]`: count, mean and unbiased variance of the last training mini-batch.

        The count is 0 of a layer that took no part, and of a frozen one.
        """
        return _bound(self._moments)

    def left_out(self) -> list[str]:
        """Names of the layers in training mode that took no part in the last training pass."""
        pairs = zip(self.layout.features, self._norms, strict=True)
        return [f.name for f, layer in pairs if layer.training and not layer.has_run]

    @property
    def has_frozen_norms(self) -> bool:
        """Whether, as the module stands, a BN layer normalizes with its statistics."""
        return any(not layer.training for layer in self._norms)

    def buffers(self) -> dict[str, Tensor]:
        """The module's other buffers that a `state_dict` has, by name: neither BN's nor scratch."""
        own = {e.name for e in self.layout.entries}
        own |= {f.named(part) for f in self.layout.features for part in NORM_BUFFERS}
        state = self.module.state_dict()
        return {k: v for k, v in state.items() if k not in own and isinstance(v, Tensor)}

    def state_dict(self) -> dict[str, Tensor]:
        """All that a checkpoint of the model has, under PyTorch's names; no copying."""
        return self.buffers() | state_dict(self.weights, self.statistics, self.layout)

    def split(self, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """`(weights, statistics)` of a `state_dict`, new float32 `[P]` and `[2, F]`.

        The module's own buffers are loaded; those that the state lacks stay as they are.

        Raises `LayoutError` for a state of another model.
        """
        buffers = self.buffers()
        for name, buffer in buffers.items():
            found = state.get(name, buffer)
            if found.shape != buffer.shape or found.dtype != buffer.dtype:
                raise LayoutError(
                    f"the checkpoint's '{name}' is {found.dtype} {list(found.shape)}, the model's "
                    f"{buffer.dtype} {list(buffer.shape)}: use one of the same model and options"
                )
        rest = {k: v for k, v in state.items() if k not in buffers}
        weights, statistics = flatten(rest, self.layout)
        with torch.no_grad():
            for name in buffers.keys() & state.keys():
                buffers[name].copy_(state[name])
        return weights, statistics

    def another(self) -> "FlatModel":
        """One more model like this, on memory of its own; its weights are not copied."""
        made = FlatModel(detached_copy(self.module, values=False), decay=self._decay)
        made.initial = self.initial
        return made

    @property
    def statistics(self) -> Tensor:
        """float32 `[2, F]`: the population's mean and unbiased variance, for inference."""
        return _bound(self._statistics)

    def zero_gradient(self) -> None:
        """Zeroes the gradient in one pass; autograd adds to what is there."""
        if self._gradient is None:
            raise LayoutError("the model has no gradient buffer: bind one before training")
        self._gradient.zero_()

    def check(self) -> None:
        """Raises `LayoutError` for a parameter or gradient that is no longer where it was bound.

        Something replaced it: `module.to(...)`, `module.zero_grad()`, an optimizer. Costs about a
        microsecond a parameter.
        """
        weights = self.weights
        for entry, place in zip(self.layout.entries, self._places, strict=True):
            pairs: list[tuple[str, Tensor | None, Tensor]] = [("value", place.parameter, weights)]
            if self._gradient is not None and place.parameter.requires_grad:
                pairs.append(("gradient", place.parameter.grad, self._gradient))
            for what, tensor, buffer in pairs:
                address = buffer.data_ptr() + entry.start * buffer.element_size()
                if tensor is None or (tensor.numel() and tensor.data_ptr() != address):
                    raise LayoutError(
                        f"the {what} of '{entry.name}' left the flat buffer: use zero_gradient() "
                        "and bind() in place of the module's zero_grad() and to()"
                    )


NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
"""Buffers of a BN layer that a `state_dict` has."""


def _point(place: _Place, entry: ParameterEntry, weights: Tensor, gradient: Tensor | None) -> None:
    """Makes the parameter, and its gradient, a view of `[start, stop)` of the buffers."""
    parameter = place.parameter
    view = weights[entry.start : entry.stop].view(entry.shape)
    if parameter.is_meta:
        # A meta tensor cannot become a real one in place. `.data`: see `BatchNorm.bind`.
        parameter = nn.Parameter(view.data, requires_grad=parameter.requires_grad)
        for owner, local_name in ((place.owner, place.local_name), *place.others):
            owner._parameters[local_name] = parameter
    else:
        # An old gradient must go first: it may be on another device than the new data.
        parameter.grad = None
        parameter.data = view
    if gradient is not None and parameter.requires_grad:
        parameter.grad = gradient[entry.start : entry.stop].view(entry.shape)


def _bound(buffer: Tensor | None) -> Tensor:
    if buffer is None:
        raise LayoutError("the model was built on the meta device: bind buffers before using it")
    return buffer
