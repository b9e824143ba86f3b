"""The words by which configurations choose a transport; apart, because they need nothing else."""

from __future__ import annotations

from typing import Literal

TransportName = Literal["auto", "shared", "network"]
"""Shared memory within a machine and the network between machines, or one of the two always."""

WireName = Literal["float32", "bfloat16", "float16", "int8", "int4", "auto"]
"""How gradients travel over the network, and with `int8` and `int4` weights, too. `auto` goes by
the measured link."""

BYTES_AN_ELEMENT: dict[WireName, tuple[float, float]] = {
    "float32": (4.0, 4.0),
    "bfloat16": (2.0, 4.0),
    "float16": (2.0, 4.0),
    "int8": (1.0, 0.3),
    "int4": (0.5, 0.3),
    "auto": (4.0, 4.0),
}
"""Bytes of a gradient's element and of a weight over the network, by wire. With `int8` and `int4`
those of weights depend on how far they move: 0.25 to 2. `auto` takes as many at the most."""

NODE = "node"
"""As a host, stands for the address by which Ray knows the node that an actor runs on."""
