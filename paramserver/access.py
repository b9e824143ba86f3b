"""Which way a process reaches a partition: shared memory on one machine, TCP between machines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from downpour.paramserver.errors import NotColocated
from downpour.paramserver.messages import WireDtype
from downpour.paramserver.transport.endpoint import Endpoint, machine
from downpour.paramserver.transport.link import Link
from downpour.paramserver.transport.names import TransportName, WireName
from downpour.paramserver.transport.network.client import NetworkConnection
from downpour.paramserver.transport.network.compress import wire_dtype
from downpour.paramserver.transport.network.link_speed import is_small, measure, wire_for
from downpour.paramserver.transport.network.security import Credentials
from downpour.paramserver.transport.shared.client import SharedConnection
from downpour.paramserver.transport.shared.mailboxes import Mailboxes


@dataclass(frozen=True, kw_only=True)
class Access:
    """How a process is to reach the partitions."""

    transport: TransportName = "auto"
    """`auto` goes by where a partition is; the other two are used in any case."""
    wire: WireName = "float32"
    """How gradients and weights travel over the network."""
    credentials: Credentials | None = None
    """The clients'; without them nothing that goes over the network is encrypted."""


def way(endpoint: Endpoint, transport: TransportName, here: str) -> Literal["shared", "network"]:
    """Return which way a process on the machine `here` reaches a partition.

    Raises:
        NotColocated: There is no way.
    """
    index = endpoint.partition.index
    if transport == "shared" or (transport == "auto" and endpoint.machine == here):
        if endpoint.machine != here:
            raise NotColocated(
                f"partition {index} is on another machine, out of reach of shared memory: give "
                "--transport auto"
            )
        return "shared"
    if endpoint.network is None:
        raise NotColocated(
            f"partition {index} is out of reach, it does not listen on a network: give "
            "--transport network"
        )
    return "network"


def connect(
    endpoint: Endpoint,
    *,
    key: bytes,
    access: Access,
    mailboxes: Mailboxes,
    deadline_s: float,
    bell_every: int = 1,
) -> Link:
    """Connect a process to a partition. See `ParameterClient` for the arguments.

    Raises:
        ServerError: The partition is out of reach, or does not let us in.
    """
    if way(endpoint, access.transport, machine()) == "shared":
        return SharedConnection(
            endpoint, key=key, mailboxes=mailboxes, deadline_s=deadline_s, bell_every=bell_every
        )
    credentials, mb_per_s = access.credentials, None
    if access.wire != "auto":
        wire = wire_dtype(access.wire)
    elif endpoint.machine == machine() or not mailboxes.num or is_small(endpoint.partition):
        wire = WireDtype.FLOAT32
    else:
        mb_per_s = measure(endpoint, key=key, credentials=credentials, deadline_s=deadline_s)
        wire = wire_for(mb_per_s)
    link = NetworkConnection(
        endpoint,
        key=key,
        credentials=credentials,
        mailboxes=mailboxes,
        wire=wire,
        deadline_s=deadline_s,
    )
    if mb_per_s is not None:
        link.choice = f"{wire.name.lower()}, at {mb_per_s:.0f} MB/s"
    return link
