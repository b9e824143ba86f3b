"""How a run is served: the settings of `downpour serve`."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from downpour.shuffler.images.reading import Orientation

MAX_BODY_BYTES = 32 << 20
"""Of a request."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How a run is served."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on."""
    crops: int = 1
    """Crops of each image: 1, 10 or 144."""
    top: int = 5
    """Classes in an answer."""
    max_batch: int = 32
    """Most images that go through the network together."""
    batch_wait_s: float = 0.01
    """Longest that a request waits for others to join its batch."""
    copies: int = 1
    """Processes that answer."""
    max_waiting: int = 2048
    """Most requests that wait to be answered; more get a 503."""
    longest_wait_s: float = 5.0
    """Longest that a request waits before it is answered: one that would wait longer gets a 503."""
    orientation: Orientation | None = None
    """Whether photos are turned upright as their EXIF orientation says; none is as the run was
    trained."""
    key_file: str | None = None
    """File with the key that callers show, readable by its owner alone; default: a new key."""

    def __post_init__(self) -> None:
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            raise ValueError(f"host is {self.host!r}: give an IP address of the machine") from None
        if not 1 <= self.port < 65536:
            raise ValueError(f"port is {self.port}: give 1 to 65535")
        if self.crops not in (1, 10, 144):
            raise ValueError(f"crops is {self.crops}: give 1, 10 or 144")
        for name in ("top", "max_batch", "copies", "max_waiting"):
            if getattr(self, name) < 1:
                value = getattr(self, name)
                raise ValueError(f"{name.replace('_', ' ')} is {value}: give at least 1")
        if not 0 <= self.batch_wait_s <= 10:
            raise ValueError(f"batch wait is {self.batch_wait_s}: give 0 to 10 seconds")

        if not 0.1 <= self.longest_wait_s <= 3600:
            raise ValueError(f"longest wait is {self.longest_wait_s}: give 0.1 to 3600 seconds")

    @property
    def at_once(self) -> int:
        """Requests that are being answered at a time: one batch in each copy, and the next."""
        return 2 * self.max_batch * self.copies

    @property
    def url(self) -> str:
        """Where it listens."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"
