"""What a follower on another machine can know of its primary that has fallen silent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["closed", "unreachable", "silent"]
"""The connection has ended; or the primary's machine acknowledges nothing, as if it had lost its
power; or it does, and the primary says nothing."""


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """Why a follower does not hear its primary any more.

    None of it is proof: the primary may have given its follower up, or the network between the two
    may have failed. The controller decides, see `cluster.controller.followers`.
    """

    kind: Kind
    why: str
    """The same for people."""

    def __str__(self) -> str:
        """Return it in words."""
        return self.why
