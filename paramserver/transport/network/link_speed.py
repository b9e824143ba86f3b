"""How fast the way to a partition is, and which wire that asks for (`--wire auto`).

The way is measured when a process connects, by pulling the partition's weights as float32. Pulled
on a connection of its own, they cost nobody a push. A link that becomes slower later is noticed
when the process connects again.

Rounding costs 5 to 6 ns a parameter, both ways and both sides together, and saves some 3 bytes a
parameter on each way. So it pays below some 500 MB/s; the bound is lower, since rounding adds noise
and takes time from steps. At 1 Gbit/s and below, half a byte less is worth the noise of `int4`.
"""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Callable

import numpy as np

from downpour.paramserver.errors import DeadlineExceeded
from downpour.paramserver.messages import WireDtype
from downpour.paramserver.partition.ranges import Partition
from downpour.paramserver.transport.endpoint import Endpoint
from downpour.paramserver.transport.link import Pull
from downpour.paramserver.transport.network.client import NetworkConnection
from downpour.paramserver.transport.network.security import Credentials
from downpour.paramserver.transport.shared.mailboxes import Mailboxes

INT8_BELOW_MB_S = 300.0
INT4_BELOW_MB_S = 150.0
SMALLEST = 8192
"""Parameters below which a pull measures the delay and not the bandwidth, and float32 is taken."""
TRIES = 3


def is_small(partition: Partition) -> bool:
    """Whether a partition is too small for its way to matter."""
    return partition.num_parameters < SMALLEST


def wire_for(mb_per_s: float) -> WireDtype:
    """Return the wire for a link that moves so many megabytes a second."""
    if mb_per_s >= INT8_BELOW_MB_S:
        return WireDtype.FLOAT32
    return WireDtype.INT8 if mb_per_s >= INT4_BELOW_MB_S else WireDtype.INT4


def measure(
    endpoint: Endpoint,
    *,
    key: bytes,
    credentials: Credentials | None,
    deadline_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return how many megabytes a second come from a partition, best of a few pulls.

    Args:
        endpoint: The partition's.
        key: The run's key.
        credentials: The clients'.
        deadline_s: How long nothing may come.
        clock: Seconds, monotonic.

    Raises:
        ServerError: The partition is out of reach, or does not let us in.
    """
    part = endpoint.partition
    mailboxes = Mailboxes(part.total_parameters, part.total_features, 0, 1, part.num_partitions)
    try:
        link = NetworkConnection(
            endpoint, key=key, credentials=credentials, mailboxes=mailboxes, deadline_s=deadline_s
        )
    finally:
        mailboxes.close()
    weights = np.empty(part.num_parameters, np.float32)
    with contextlib.closing(link):
        took_s = [_pull_s(link, weights, deadline_s, clock) for _ in range(TRIES)]
    return weights.nbytes / max(min(took_s), 1e-9) / 1e6


def _pull_s(
    link: NetworkConnection,
    weights: np.ndarray[tuple[int], np.dtype[np.float32]],
    deadline_s: float,
    clock: Callable[[], float],
) -> float:
    poll = select.poll()
    poll.register(link.fileno(), select.POLLIN)
    pull, began_s = Pull([0] * link.partition.num_partitions), clock()
    link.start_pull(pull, weights, None)
    while pull.waiting:
        moved = link.moved
        if not poll.poll(1000 * deadline_s) and link.moved == moved:
            raise DeadlineExceeded(
                f"partition {link.partition.index} has sent no weights for {deadline_s:g} s"
            )
        link.service()
    return clock() - began_s
