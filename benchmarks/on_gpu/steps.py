"""Images a second of one network on one device: plain PyTorch loops, and replicas of this system.

A plain loop is a process with PyTorch's own batch normalization, `torch.optim.SGD` and a
mini-batch that is copied up from page-locked memory at each step; also with its whole step as a
CUDA graph. Not here: reading and decoding, which would be the limit on most machines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from downpour.benchmarks.models import with_pytorchs_norms
from downpour.benchmarks.on_gpu.without_ray import (
    DEADLINE_S,
    KEPT,
    Child,
    Here,
    Server,
    SyntheticReplicas,
    Workers,
    check_once,
)
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.rules.schedule import Schedule
from downpour.paramserver.rules.update import Momentum
from downpour.shuffler.images.decode import Decoder
from downpour.shuffler.images.specs import ImageSpec
from downpour.shuffler.processors import processors
from downpour.workers.spec import (
    DeviceName,
    ModelSpec,
    Precision,
    Recorded,
    ReplicasSpec,
    StepConfig,
)

RATE = 1e-4
"""Small enough that random labels lead nowhere."""
EPOCH_BATCHES = 1 << 16
WARM_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained."""

    device: DeviceName
    """What it is computed on."""
    pixels: int = 224
    """Height and width of the images."""
    width: float = 1.0
    """Of BN-Inception."""
    classes: int = 1000
    """Of the images."""
    batch_size: int = 32
    """Images in a mini-batch."""
    replicas: int = 10
    """Model replicas."""
    concurrent_steps: int = 5
    """Of each."""
    window: int = 8
    """Mini-batches that a replica is given at a time."""
    windows: int = 2
    """Of these, for each replica, that are under way."""
    warmup_s: float = 2.0
    """After the first steps of everybody."""
    seconds: float = 5.0
    """How long it is measured."""
    record_steps: Recorded = "auto"
    """Whether steps are captured, unless a measurement says otherwise."""
    in_this_process: bool = False
    """Whether all run on threads of this process: for a test of the code."""

    @property
    def model(self) -> ModelSpec:
        """BN-Inception."""
        return ModelSpec(
            name="inception",
            arguments={"width": self.width},
            seed=1,
            image=ImageSpec(height=self.pixels, width=self.pixels),
            num_classes=self.classes,
        )

    @property
    def actor(self) -> type[Here | Child]:
        """Where partitions, replicas and loops are."""
        return Here if self.in_this_process else Child


class PlainLoop:
    """One training loop as people write it."""

    def __init__(self, load: Workload, precision: Precision, graph: bool) -> None:
        """Build the model and a few mini-batches; `graph` captures the whole step."""
        self._device = torch.device(load.device)
        self._precision, self._load = precision, load
        module = with_pytorchs_norms(load.model.build()).to(self._device).train()
        self._module = module.to(memory_format=torch.channels_last)
        self._optimizer = torch.optim.SGD(module.parameters(), lr=RATE, momentum=0.9)
        scaled = precision == "float16"
        self._scaler = torch.amp.GradScaler(load.device, enabled=scaled)
        generator = torch.Generator().manual_seed(1)
        on_gpu = self._device.type == "cuda"
        shape, count = (load.batch_size, 3, load.pixels, load.pixels), load.batch_size
        self._batches = [
            (
                torch.rand(shape, generator=generator),
                torch.randint(load.classes, (count,), generator=generator),
            )
            for _ in range(KEPT)
        ]
        if on_gpu:
            self._batches = [(x.pin_memory(), y.pin_memory()) for x, y in self._batches]
        self._inputs, self._targets = (part.to(self._device) for part in self._batches[0])
        self._step = self._graph() if graph else self._one_step

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._precision == "float32":
            return nullcontext()
        return torch.autocast(self._device.type, dtype=getattr(torch, self._precision))

    def _one_step(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss = functional.cross_entropy(self._module(self._inputs), self._targets)
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self._scaler.step(self._optimizer)
        self._scaler.update()

    def _graph(self) -> Callable[[], object]:
        """The step as a CUDA graph, after some ordinary ones beside the default stream."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_STEPS):
                self._one_step()
        torch.cuda.current_stream().wait_stream(stream)
        self._optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._one_step()
        return graph.replay

    def _steps(self, seconds: float, at_least: int) -> tuple[int, float]:
        began_s, count = time.monotonic(), 0
        while count < at_least or time.monotonic() - began_s < seconds:
            x, y = self._batches[count % KEPT]
            self._inputs.copy_(x, non_blocking=True)
            self._targets.copy_(y, non_blocking=True)
            self._step()
            count += 1
            if count % KEPT == 0 and self._device.type == "cuda":
                torch.cuda.synchronize()  # or the queue would hide what is still to be done
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return count, time.monotonic() - began_s

    def measure(self) -> dict[str, Any]:
        """Images a second, and memory."""
        self._steps(self._load.warmup_s, WARM_STEPS)
        count, seconds = self._steps(self._load.seconds, KEPT)
        found: dict[str, Any] = {"images_per_s": count * self._load.batch_size / seconds}
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            found["memory"] = {
                "tensors": torch.cuda.max_memory_allocated(),
                "reserved": torch.cuda.max_memory_reserved(),
                "used_on_gpu": total - free,
            }
        return found

    def stop(self) -> None:
        """Nothing is under way."""


def measure_plain(load: Workload, precision: Precision, *, graph: bool = False) -> dict[str, Any]:
    """What one plain loop reaches, in a process of its own."""
    loop = load.actor(PlainLoop, load, precision, graph)
    try:
        found: dict[str, Any] = loop.call("measure").result(DEADLINE_S)
    finally:
        loop.end()
    return found


def measure_replicas(
    load: Workload, precision: Precision, *, processes: int = 1, **steps: Any
) -> dict[str, Any]:
    """What the replicas reach, in so many processes; `steps` are more of `StepConfig`.

    Raises:
        RuntimeError: a mini-batch was lost, refused or applied twice.
    """
    model = load.model.build_flat("cpu")
    update = UpdateConfig(
        rule=Momentum(momentum=0.9),
        schedule=Schedule(learning_rate=RATE),
        batches_per_epoch=EPOCH_BATCHES,
        epoch_examples=EPOCH_BATCHES * load.batch_size,
    )
    steps = {"record_steps": load.record_steps, **steps}
    config = StepConfig(
        concurrent_steps=load.concurrent_steps, device=load.device, precision=precision, **steps
    )
    spec = ReplicasSpec(
        replicas=tuple(range(load.replicas)),
        model=load.model,
        steps=config,
        decoder=Decoder(spec=load.model.image),
        num_threads=1 if load.in_this_process else max(1, processors() // processes),
    )
    server = Server(load.actor, model, update, 1 if load.in_this_process else None)
    try:
        workers = Workers(
            load.actor, spec, processes, server.endpoints(), SyntheticReplicas, load.batch_size
        )
        try:
            found = _drive(load, workers)
        finally:
            workers.end()
        reports = server.reports()
    finally:
        server.end()
    check_once(reports, found["batches"])
    return {**found, "partitions": len(reports)}


def _drive(load: Workload, workers: Workers) -> dict[str, Any]:
    """Keep windows with every replica; count what is computed once all have begun."""
    windows = iter(range(0, EPOCH_BATCHES, load.window))
    under_way: dict[Future[Any], int] = {}
    begun: set[int] = set()

    def give(replica: int) -> None:
        first = next(windows)
        batches = tuple(range(first, first + load.window))
        under_way[workers.of(replica).call("train", replica, batches)] = replica

    def computed() -> tuple[int, float]:
        counts = [actor.call("computed") for actor in workers.actors]
        return sum(call.result(DEADLINE_S) for call in counts), time.monotonic()

    for replica in [*range(load.replicas)] * load.windows:
        give(replica)
    total, start, end, measure_at = 0, None, None, float("inf")
    give_up_s = time.monotonic() + load.warmup_s + load.seconds + DEADLINE_S
    while under_way:
        done, _ = wait(under_way, 0.05, FIRST_COMPLETED)
        if time.monotonic() > give_up_s:
            raise RuntimeError(f"{len(under_way)} windows are not done: a step hangs, or is slow")
        for call in done:
            replica, report = under_way.pop(call), call.result()
            total += report.num_batches
            begun.add(replica)
            if end is None:
                give(replica)
        now_s = time.monotonic()
        if len(begun) == load.replicas and measure_at == float("inf"):
            measure_at = now_s + load.warmup_s
        if start is None and now_s >= measure_at:
            start = computed()
        if start is not None and end is None and now_s >= start[1] + load.seconds:
            latest = computed()
            end = latest if latest[0] > start[0] else None
    assert start is not None
    assert end is not None
    memory = [actor.call("memory").result(DEADLINE_S) for actor in workers.actors]
    rate = (end[0] - start[0]) / (end[1] - start[1])
    return {"images_per_s": rate * load.batch_size, "batches": total, "memory": memory}


def compared(results: dict[str, Any], base: str) -> Sequence[str]:
    """Lines for people: images a second of each, and the share of `base`, in its precision."""
    lines = []
    for name, found in results.items():
        if "images_per_s" not in found:
            continue
        precision = name.split(", ")[0]
        whole = results.get(f"{precision}, {base}", {}).get("images_per_s")
        share = f", {found['images_per_s'] / whole:.2f} of the {base}" if whole else ""
        lines.append(f"{name}: {found['images_per_s']:,.0f} images/s{share}")
    return lines
