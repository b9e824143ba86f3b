"""Settings from an earlier record of `bench learning`, in place of a search."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from downpour.benchmarks.harness import BadSettings
from downpour.benchmarks.learning.peers import Peer
from downpour.benchmarks.learning.search import REFERENCE_MOMENTUM, Found, Setting


def found_before(path: str, peers: Mapping[str, Peer]) -> dict[str, Found]:
    """What the searches of a record came to, for those of `peers` that it has.

    A peer is left out if the record has a shape of it that it may not have any more.

    Raises:
        BadSettings: The file is no record of `bench learning`, or has none of the peers.
    """
    try:
        record = json.loads(Path(path).read_text())
        if record["benchmark"] != "learning":
            raise BadSettings(
                f"{path} is a record of bench {record['benchmark']}: give one of bench learning"
            )
        source = f"{Path(path).name} of {record['date'][:10]}"
        settings = {name: about["setting"] for name, about in record["result"].items()}
        found = {
            name: Found(best=setting, trials=(), left_out=0, source=source)
            for name, peer in peers.items()
            if name in settings and (setting := _setting(settings[name], peer)) is not None
        }
    except OSError as error:
        raise BadSettings(
            f"{path} cannot be read ({error.strerror or error}): give a record that --save kept"
        ) from None
    except (ValueError, LookupError, TypeError) as error:
        if isinstance(error, BadSettings):
            raise
        raise BadSettings(f"{path} is no record: give one that --save kept") from None
    if not found:
        raise BadSettings(f"{path} has none of {', '.join(peers)}: leave out --settings-from")
    return found


def _setting(plain: Mapping[str, Any], peer: Peer) -> Setting | None:
    """The inverse of `benchmark.plain_setting`; None if the peer has no such shape."""
    for shape in peer.shapes:
        if (shape.workers, shape.batch_size) == (plain["workers"], plain["batch_size"]):
            return Setting.at_rate(
                shape,
                plain["learning_rate"],
                plain["decay"],
                plain.get("average"),
                plain.get("momentum", REFERENCE_MOMENTUM),
                nesterov=plain.get("nesterov", False),
            )
    return None
