"""What connects the parts of a simulated run: connections near and far, and queues of work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from downpour.cluster.simulate.clock import Body, Processors, Thread, Wire
from downpour.cluster.simulate.partition import Message, VirtualPartition
from downpour.cluster.simulate.process import VirtualProcess
from downpour.paramserver.messages import Outcome
from downpour.workers.replica.rotation import PulledWeights

if TYPE_CHECKING:
    from torch import Tensor


class Local:
    """A connection within one machine."""

    nearby = True

    def __init__(self, partition: VirtualPartition, process: VirtualProcess) -> None:
        """Connect the two."""
        self._partition = partition
        index = partition.index
        self.line = partition.connect(
            lambda answers: process.answered(index, answers),
            lambda versions, version, weights: None,
        )

    def version(self) -> int:
        """What a pull would get now."""
        return self._partition.version

    def weights(self) -> Tensor | None:
        """Its weights, float32 [n]; none without arithmetic."""
        return self._partition.weights

    def send(self, packet: list[Message]) -> None:
        """Send a packet."""
        self._partition.come(self.line, packet)

    def ask_weights(self, pulled: PulledWeights, process: VirtualProcess) -> None:
        """Ask for weights; `process.pulled` is told of them."""
        raise AssertionError("weights nearby are copied")


class Remote:
    """A connection between machines: gradients follow their messages, weights come when asked."""

    nearby = False

    def __init__(
        self,
        partition: VirtualPartition,
        process: VirtualProcess,
        here: Wire,
        there: Wire,
        gradient_bytes: float,
        weights_bytes: float,
    ) -> None:
        """Connect the two, the process by the wire `here`, the partition by the one `there`."""
        self._partition = partition
        self._here, self._there, self._bytes = here, there, gradient_bytes
        self._came_s = self._sent_s = 0.0
        """When the last gradient or weights of this connection are there."""
        self._asked: deque[PulledWeights] = deque()
        """Pulls whose weights are on their way: they come in the order in which they were asked."""
        index = partition.index

        def answer(answers: list[tuple[int, Outcome]]) -> None:
            there.send(here, 0, lambda: process.answered(index, answers), self._sent_s)

        def send_weights(versions: list[int], version: int, weights: Tensor | None) -> None:
            pulled = self._asked.popleft()

            def arrived() -> None:
                versions[index] = version
                pulled.holder[index] = weights
                process.pulled(pulled.pull)

            self._sent_s = there.send(here, weights_bytes, arrived)

        self.line = partition.connect(answer, send_weights)

    def version(self) -> int:
        """What a pull would get now."""
        raise AssertionError("weights over the network are asked for")

    def weights(self) -> Tensor | None:
        """Its weights."""
        raise AssertionError("weights over the network are asked for")

    def send(self, packet: list[Message]) -> None:
        """Send a packet."""
        partition, line = self._partition, self.line
        self._came_s = self._here.send(
            self._there, self._bytes * len(packet), lambda: partition.come(line, packet)
        )

    def ask_weights(self, pulled: PulledWeights, process: VirtualProcess) -> None:
        """Ask for weights; `process.pulled` is told of them."""
        partition, line, versions = self._partition, self.line, pulled.pull.versions
        self._asked.append(pulled)
        self._here.send(self._there, 0, lambda: partition.come(line, pull=versions), self._came_s)


class Queue:
    """A thread that does one job after another: a shuffler, the decoding of a process."""

    def __init__(self, processors: Processors) -> None:
        """It has nothing to do."""
        self._jobs: deque[tuple[float, Callable[[], None]]] = deque()
        self._thread = Thread(processors, self._body())

    def add(self, seconds: float, then: Callable[[], None]) -> None:
        """Have it work for so long, after what it has to do already, and then call `then`."""
        self._jobs.append((seconds, then))
        self._thread.wake()

    def _body(self) -> Body:
        while True:
            while self._jobs:
                seconds, then = self._jobs.popleft()
                yield seconds
                then()
            yield None
