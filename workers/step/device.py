"""What a step needs of the device that it computes on: streams, events, page-locked memory.

A device does what it is given in the order of its *streams*, which run beside each other and
beside the processor: one computes, one copies up (host to device), one down. What has to wait for
another stream's work is told so by an event; the processor waits for an event where it reads what
was copied. Nothing else orders anything, so each wait in `workers.step.device_model_copy` is
there for a reason that docs/devices.md names.

`HostDevice` is the same for plain memory: work is done as it is given, copies are plain copies,
events are over when they are made. What runs on it is the code that runs on CUDA.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from downpour.workers.errors import DeviceMissing
from downpour.workers.spec import DeviceName

cuda: Any = torch.cuda  # much of it has no types
log = logging.getLogger(__name__)


class Event(Protocol):
    """A point in a stream's work."""

    def wait(self) -> None:
        """Return once the stream has come to it; the processor waits."""


class Stream(Protocol):
    """Work of a device, done in the order in which it is given."""

    def run(self, work: Callable[[], object]) -> None:
        """Call `work`, whose kernels become part of the stream. It must not wait for them."""

    def copy(self, destination: Tensor, source: Tensor) -> None:
        """Copy a tensor, without waiting for it; host memory has to be page-locked for that."""

    def record(self) -> Event:
        """What comes once all that was given until now is done."""

    def wait(self, event: Any) -> None:
        """What is given from now on begins after `event`, of another stream of this device."""


class Lock(Protocol):
    """Memory that is page-locked until it is released."""

    def release(self) -> None:
        """Let the pages go, once no copy is under way; may be called again."""


class Graph(Protocol):
    """Kernels that were captured, with the memory that they read and write."""

    def replay(self) -> None:
        """Have all of them done, in one call: part of the work that a stream runs."""


class Device(Protocol):
    """Where a process's replicas compute."""

    where: torch.device
    ahead: int
    """Steps that are begun while an earlier one is still computed."""
    compute: Stream
    up: Stream
    down: Stream

    def page_locked(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Host memory that is copied from and to without waiting; holds anything at first."""

    def lock(self, memory: Tensor) -> Lock | None:
        """Page-lock memory where it is, uint8 [bytes]; None where that is refused."""

    def capture(self, work: Callable[[], object]) -> Graph:
        """Note `work`'s kernels on the compute stream, without running them.

        What `work` reads and writes stays where it is; what it allocates is kept. Graphs share such
        memory: nothing that one of them leaves there may be wanted after it.

        Raises:
            RuntimeError: `work` does what cannot be captured, such as to look at a value.
        """

    def seed(self, number: int) -> None:
        """Begin the random numbers that kernels draw here."""

    def finish(self) -> None:
        """Wait until the device has nothing to do."""


class _Done:
    def wait(self) -> None:
        pass


class _Now:
    """A stream whose work is done when it is given."""

    def run(self, work: Callable[[], object]) -> None:
        work()

    def copy(self, destination: Tensor, source: Tensor) -> None:
        destination.copy_(source)

    def record(self) -> Event:
        return _Done()

    def wait(self, event: Any) -> None:
        pass


class _Unlocked:
    def release(self) -> None:
        pass


class _Again:
    """Work that is done anew, in place of kernels that were captured."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work

    def replay(self) -> None:
        self._work()


class HostDevice:
    """The processor and plain memory, in the shape of a device."""

    def __init__(self, *, ahead: int = 1, locks: bool = True) -> None:
        """`locks` says whether memory can be locked where it is."""
        self.where = torch.device("cpu")
        self.ahead = ahead
        self.compute: Stream = _Now()
        self.up: Stream = _Now()
        self.down: Stream = _Now()
        self._locks = locks

    def page_locked(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Plain memory."""
        return torch.zeros(*shape, dtype=dtype)

    def lock(self, memory: Tensor) -> Lock | None:
        """Nothing to be done."""
        return _Unlocked() if self._locks else None

    def capture(self, work: Callable[[], object]) -> Graph:
        """Plain memory has no graphs: the work itself."""
        return _Again(work)

    def seed(self, number: int) -> None:
        """The process's generator."""
        torch.default_generator.manual_seed(number)

    def finish(self) -> None:
        """Nothing is ever under way."""


class _CudaEvent:
    def __init__(self, stream: Any) -> None:
        # Blocking: the processor belongs to partitions and decoders meanwhile.
        self.event = cuda.Event(blocking=True)
        self.event.record(stream)

    def wait(self) -> None:
        self.event.synchronize()


class _CudaStream:
    def __init__(self, device: torch.device) -> None:
        self.stream = cuda.Stream(device)

    def run(self, work: Callable[[], object]) -> None:
        with cuda.stream(self.stream):
            work()

    def copy(self, destination: Tensor, source: Tensor) -> None:
        with cuda.stream(self.stream):
            destination.copy_(source, non_blocking=True)

    def record(self) -> Event:
        return _CudaEvent(self.stream)

    def wait(self, event: Any) -> None:
        self.stream.wait_event(event.event)


class _CudaLock:
    """A registration; it keeps the mapping alive, so that it never outlives its pages."""

    def __init__(self, memory: Tensor) -> None:
        # Were a mapping gone before its registration, another at the same address would be taken
        # for it, and the device would write to pages that nobody reads.
        self._release = weakref.finalize(self, _unregister, memory)
        self._release.atexit = False

    def release(self) -> None:
        self._release()


def _unregister(memory: Tensor) -> None:
    cuda.synchronize()
    cuda.cudart().cudaHostUnregister(memory.data_ptr())


class CudaDevice:
    """The first GPU that the process may use; Ray chooses which one that is."""

    def __init__(self) -> None:
        self.where = torch.device("cuda", 0)
        self.ahead = 1
        self.compute: Stream = _CudaStream(self.where)
        self.up: Stream = _CudaStream(self.where)
        self.down: Stream = _CudaStream(self.where)
        self._graphs_memory = cuda.graph_pool_handle()

    def page_locked(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory of PyTorch's, pinned."""
        return torch.empty(*shape, dtype=dtype, pin_memory=True)

    def lock(self, memory: Tensor) -> Lock | None:
        """Register it with the driver, which keeps its pages where they are."""
        status = int(cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
        if not status:
            return _CudaLock(memory)
        log.warning(
            "%d bytes of mailboxes are not page-locked (CUDA error %d): gradients take one copy "
            "more",
            memory.numel(),
            status,
        )
        # This thread's next kernel would be blamed for the error: let one that does not matter be.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self.where)
        return None

    def capture(self, work: Callable[[], object]) -> Graph:
        """A CUDA graph. All of them share a pool, since one stream runs them one by one."""
        assert isinstance(self.compute, _CudaStream)
        graph, before = cuda.CUDAGraph(), cuda.current_stream(self.where)
        try:
            with cuda.graph(
                graph,
                pool=self._graphs_memory,
                stream=self.compute.stream,
                capture_error_mode="thread_local",  # other threads may page-lock memory meanwhile
            ):
                work()
        finally:
            cuda.set_stream(before)  # which PyTorch leaves out if the capture fails
        captured: Graph = graph
        return captured

    def seed(self, number: int) -> None:
        """The GPU's generator."""
        cuda.manual_seed(number)

    def finish(self) -> None:
        """Wait for all streams."""
        cuda.synchronize(self.where)


def cuda_problem(where: str = "here") -> str | None:
    """Why this process cannot compute on a GPU; None if it can."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} {where} is built without CUDA"
    if not cuda.is_available():
        return f"PyTorch {where} finds no GPU that it can use"
    return None


def check_device(name: DeviceName, where: str = "here") -> None:
    """Raise `DeviceMissing` where this process cannot compute on such a device."""
    if name == "cuda" and (problem := cuda_problem(where)) is not None:
        raise DeviceMissing(
            f"replica device is cuda, and {problem}: give --replica-device cpu, or train "
            "where there is a GPU and PyTorch's CUDA build"
        )


def find_device(name: DeviceName) -> Device | None:
    """The device of a process of replicas; None where they compute on processors as they are.

    Raises `DeviceMissing` where there is none.
    """
    if name == "cpu":
        return None
    check_device(name, "in a process of replicas")
    return CudaDevice()
