"""The actors of the parameter server: a partition, and its follower.

Plain classes, which a test can construct; `cluster.ray_backend` makes Ray actors of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.fs
import torch

from downpour.paramserver.errors import DeadlineExceeded
from downpour.paramserver.partition import snapshot
from downpour.paramserver.partition.snapshot import Snapshot, SnapshotFile
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.server.server import PartitionServer
from downpour.paramserver.spec import (
    Average,
    Papers,
    PartitionSpec,
    PartitionStart,
    Restore,
)
from downpour.paramserver.standby.trouble import Trouble
from downpour.paramserver.transport.endpoint import Endpoint
from downpour.paramserver.transport.names import NODE
from downpour.paramserver.transport.network.acceptor import NetworkListen
from downpour.paramserver.transport.network.security import Credentials

LEVEL_DEADLINE_S = 300.0
"""How long a follower may take to catch up with its partition, from the state on."""


@dataclass(frozen=True, kw_only=True)
class PartitionReport:
    """Where a partition stands. Plain data, for progress and metrics."""

    index: int
    version: int
    examples: int
    rate: float
    batches_applied: int
    refused: int
    duplicates: int
    dropped: int
    malformed: int
    staleness: dict[int, list[int]]
    """Counts of each bin of staleness, see `paramserver.partition.staleness`, by replica."""
    refusals: dict[int, int]
    """Pushes refused, by replica."""
    quarantined: tuple[int, ...]
    """Replicas whose pushes are not taken any more."""
    drift: float
    """How far the BN moving averages are from the moments of late; see `BatchStatistics.drift`."""
    connections: int
    connections_closed: dict[str, int]
    """Connections that the partition closed, by reason."""
    first_update_age_s: float | None
    """Seconds since the first update since the session began. No time of day: clocks of machines
    differ, and are set."""
    last_update_age_s: float | None
    """Seconds since the latest update since the session began."""
    updates_before: int
    """The version that the session, or the actor in it, began with."""
    has_follower: bool = False
    """Whether a second process has all that this one answers."""
    waits_for_word: int | None = None
    """The follower on another machine whose loss keeps this one from answering."""
    witness: tuple[int, int] | None = None
    """What the weights say of the mini-batches that went into them, see `Witness.dump`."""
    cpu_s: float = 0.0
    """Processor seconds of the thread that serves, since the actor started."""


class PartitionActor:
    """One partition of the parameter server as a process of its own."""

    def __init__(self, spec: PartitionSpec, start: PartitionStart) -> None:
        """Serve from the initial weights or the snapshot that `start` names.

        Raises:
            BadSnapshot: the snapshot is damaged, or it is another partition's.
        """
        weights, restore = None, None
        if isinstance(start.origin, Restore):
            filesystem, path = pyarrow.fs.FileSystem.from_uri(start.origin.uri)
            restore = snapshot.read(filesystem, path, start.origin.sha256)
        else:
            assert isinstance(start.origin, np.ndarray), "a follower has an endpoint, no partition"
            weights = torch.from_numpy(start.origin.copy())
        server = PartitionServer(
            partition=spec.partition,
            config=spec.update,
            key=start.key,
            weights=weights,
            statistics=start.statistics,
            restore=restore,
            network=_listen(spec.listen, start.credentials),
            waits_for_follower=spec.standby_wait,
        )
        self._start(server, spec, start)

    def _start(self, server: PartitionServer, spec: PartitionSpec, start: PartitionStart) -> None:
        self._papers = start.key, start.credentials, start.client_credentials
        if spec.record is not None:
            server.record(Path(spec.record))
        self._server = server.start()
        self._updates_before = server.call(lambda state: state.version)
        self._snapshots = threading.Lock()
        self._copies: dict[str, torch.Tensor] = {}
        """Memory that snapshots are copied to."""

    def __repr__(self) -> str:
        """What Ray's dashboard and log prefixes show."""
        partition = self._server.partition
        return f"Partition {partition.index + 1} of {partition.num_partitions}"

    def endpoint(self) -> Endpoint:
        """The endpoint for replicas."""
        return self._server.endpoint

    def begin_session(self) -> Papers:
        """Go on for another driver, whose session begins now."""
        version = self._updates_before = self._server.begin_session()
        key, credentials, clients = self._papers
        return Papers(version=version, key=key, credentials=credentials, client_credentials=clients)

    def report(self) -> PartitionReport:
        """Where this partition stands."""
        server = self._server

        def look(state: PartitionState) -> PartitionReport:
            return PartitionReport(
                index=server.partition.index,
                version=state.version,
                examples=state.ledger.examples,
                rate=state.ledger.rate(),
                staleness=state.ledger.staleness.dump(),
                refusals=dict(state.ledger.refusals),
                quarantined=tuple(sorted(state.ledger.quarantined)),
                drift=state.vectors.statistics.drift(state.current.statistics),
                connections=server.num_connections,
                connections_closed=server.dropped(),
                first_update_age_s=server.first_update_age_s,
                last_update_age_s=server.last_update_age_s,
                updates_before=self._updates_before,
                has_follower=server.has_follower,
                waits_for_word=server.waits_for_word,
                witness=state.vectors.witness.dump(),
                cpu_s=time.thread_time(),  # this is run by the thread that serves
                **state.ledger.counts(),
            )

        return server.call(look)

    def let_alone(self, follower: int) -> None:
        """Answer without this follower, which is lost and will not be promoted any more."""
        self._server.let_alone(follower)

    def average(self) -> Average:
        """What is to be scored of this partition, if that is not the latest weights."""

        def look(state: PartitionState) -> Average:
            scored = state.vectors.scored
            return Average(
                version=state.weights_version,
                weights=scored.weights.numpy(),
                statistics=scored.statistics.numpy(),
            )

        return self._server.call(look)

    def flags(self, epochs: Sequence[int]) -> dict[int, npt.NDArray[np.uint8]]:
        """What became of each mini-batch of these epochs: waiting, applied or refused."""
        return self._server.call(lambda state: {e: state.ledger.applied.flags(e) for e in epochs})

    def snapshot(self, folder_uri: str) -> SnapshotFile:
        """Write a snapshot into a folder; pushes wait only while the state is copied.

        Raises:
            OSError: it cannot be written.
        """
        filesystem, folder = pyarrow.fs.FileSystem.from_uri(folder_uri)
        with self._snapshots:
            copies = self._copies
            if not copies:  # touched for the first time here, and not while pushes wait
                copies = self._server.call(lambda state: state.room())
                for copy in copies.values():
                    copy.zero_()
            meta, tensors = self._server.call(lambda state: state.dump(copies))
            self._copies = copies
            taken = Snapshot(partition=self._server.partition, meta=meta, tensors=tensors)
            return snapshot.write(filesystem, folder, taken)

    def stop(self) -> None:
        """Stop serving."""
        self._server.stop()


class FollowerActor(PartitionActor):
    """A second process that applies what a partition does, and can take its place."""

    def __init__(self, spec: PartitionSpec, start: PartitionStart) -> None:
        """Follow the partition whose endpoint `start` gives, here or over the network."""
        assert isinstance(start.origin, Endpoint), "a follower starts from its primary"
        server = PartitionServer(
            partition=spec.partition,
            config=spec.update,
            key=start.key,
            network=_listen(spec.listen, start.credentials),
            waits_for_follower=spec.standby_wait,
            follow=start.origin,
            generation=start.follower,
            client_credentials=start.client_credentials,
        )
        self._start(server, spec, start)

    def __repr__(self) -> str:
        """What Ray's dashboard and log prefixes show, of one that has been promoted, too."""
        partition = self._server.partition
        return f"Follower of partition {partition.index + 1} of {partition.num_partitions}"

    def endpoint(self) -> Endpoint:
        """The endpoint for replicas, once this has all that the partition answers.

        Raises:
            DeadlineExceeded: The partition does not say that it waits for this follower.
            ConnectionLost: It is gone, or this follower has failed.
        """
        if not self._server.await_level(LEVEL_DEADLINE_S):
            raise DeadlineExceeded(f"it has not caught up for {LEVEL_DEADLINE_S:.0f} s")
        return super().endpoint()

    def watch_primary(self) -> Trouble | None:
        """Return what is known of a partition that is gone or silent, once that is so."""
        return self._server.await_trouble()

    def promote(self) -> Endpoint:
        """Become the partition; gives the endpoint for replicas.

        Raises:
            Fenced: another process is the partition already.
        """
        self._server.promote()
        return self._server.endpoint


def _listen(host: str | None, credentials: Credentials | None) -> NetworkListen | None:
    """Where a partition listens; the node's own address replaces `NODE` and a wildcard."""
    if host is None:
        return None
    if host not in (NODE, "0.0.0.0", "::"):
        return NetworkListen(host=host, credentials=credentials)
    import ray

    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    bound = address if host == NODE else host
    return NetworkListen(host=bound, advertise=address, credentials=credentials)
