"""The words by which configurations choose a transport; apart, because they need nothing else."""

from __future__ import annotations

from typing import Literal

TransportName = Literal["auto", "shared", "network"]
"""Shared memory within a machine and the network between machines, or one of the two always."""

WireDtypeName = Literal["float32", "bfloat16", "float16"]
"""How gradients travel over the network."""

NODE = "node"
"""As a host, stands for the address by which Ray knows the node that an actor runs on."""
