"""Where a partition is reached. Plain data, which travels through Ray."""

from __future__ import annotations

import os
from dataclasses import dataclass

from downpour.paramserver.partition.ranges import Partition


def machine() -> str:
    """Names the machine (the kernel and network namespace) that this process runs on."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"


@dataclass(frozen=True, kw_only=True)
class NetworkAddress:
    """Where a partition is reached from other machines."""

    host: str
    port: int


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a partition is reached. Plain data, which travels through Ray."""

    partition: Partition
    machine: str
    address: str
    """Name in the abstract socket namespace of `machine`."""
    network: NetworkAddress | None = None
    """None where the partition does not listen on a network."""
