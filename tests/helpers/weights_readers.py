"""A writer and readers of published weights, some of which do without the second look at the stamp.

Run as a program it is a reader in a process of its own.
"""

import contextlib
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from downpour.paramserver.partition.vectors import Version
from downpour.paramserver.transport.shared import published as published_weights
from downpour.paramserver.transport.shared.published import PublishedWeights, WeightsReader

READERS_DEADLINE_S = 45.0


class Writer:
    """Publishes versions of which every element says which version it belongs to."""

    def __init__(
        self,
        num_parameters: int,
        num_features: int,
        num_buffers: int,
        pinned: Callable[[], list[int]] | None = None,
    ) -> None:
        self.shape = num_parameters, num_features, num_buffers
        self.pinned = pinned
        """The slots that are being read; None for all, so that the writer goes round."""
        self.published = PublishedWeights(*self.shape, in_place=True)
        self.version = 0

    def write(self) -> None:
        slot = self._begin()
        self.version += 1
        slot.weights.fill_(self.version)
        slot.statistics.fill_(self.version)
        self.published.commit(self.version)

    def _begin(self) -> Version:
        pinned = range(self.published.num_buffers) if self.pinned is None else self.pinned()
        return self.published.versions[self.published.begin(pinned)]

    def half_write(self) -> None:
        """Begin the next version, and die over it."""
        slot = self._begin()
        slot.weights[: len(slot.weights) // 2].fill_(self.version + 1)

    def reader(self, kind: type[WeightsReader] = WeightsReader) -> WeightsReader:
        return kind(os.dup(self.published.fd), *self.shape)


class Careless(WeightsReader):
    """Takes every copy: the second look at the stamp finds what the first one found."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._header = FirstLook(self._header)  # type: ignore[assignment]

    def read(self, *arguments: Any) -> int:
        self._header.found.clear()  # type: ignore[attr-defined]
        return super().read(*arguments)


class FirstLook:
    """The header as each place of it was when it was looked at first."""

    def __init__(self, header: Any) -> None:
        self._header = header
        self.found: dict[int, int] = {}

    def __getitem__(self, place: int) -> int:
        if place not in self.found:
            value = int(self._header[place])
            if value == published_weights._VOID:
                self.found.clear()  # both begin anew
                return value
            self.found[place] = value
        return self.found[place]


BUFFERS = 4


NUM_PARAMETERS, NUM_FEATURES = 1 << 18, 64


ENOUGH = {"reads": 300, "versions": 20, "torn": 20, "careless": 1}
"""What a reader has to live through before it has shown anything."""


def read_with_a_pin(fd: int, pins: int, number: int) -> dict[str, int]:
    """What a reader process does beside a writer that looks at pins."""
    pin = np.frombuffer(mmap.mmap(pins, mmap.PAGESIZE), np.int64, 1, 64 * number)
    reader = WeightsReader(os.dup(fd), NUM_PARAMETERS, NUM_FEATURES, BUFFERS, pin)
    weights = np.empty(NUM_PARAMETERS, np.float32)
    statistics = np.empty((2, NUM_FEATURES), np.float32)
    found = dict.fromkeys(("reads", "versions", "mixed", "backwards"), 0)
    latest, give_up_s = -1, time.monotonic() + READERS_DEADLINE_S
    while found["reads"] < ENOUGH["reads"] or found["versions"] < ENOUGH["versions"]:
        version = reader.read(weights, statistics)
        found["reads"] += 1
        found["mixed"] += not ((weights == version).all() and (statistics == version).all())
        found["backwards"] += version < latest
        found["versions"] += version > latest
        latest = version
        if time.monotonic() > give_up_s:
            break
    return found


def read_in_a_process(fd: int) -> dict[str, int]:
    """What a reader process does: copies and checks, until both kinds have shown what they do."""
    shape = NUM_PARAMETERS, NUM_FEATURES, 2
    careful, careless = WeightsReader(os.dup(fd), *shape), Careless(fd, *shape)
    weights = np.empty(NUM_PARAMETERS, np.float32)
    statistics = np.empty((2, NUM_FEATURES), np.float32)
    found = {**dict.fromkeys(ENOUGH, 0), "mixed": 0, "backwards": 0}
    latest, give_up_s = -1, time.monotonic() + READERS_DEADLINE_S
    while any(found[what] < least for what, least in ENOUGH.items()):
        version = careful.read(weights, statistics)
        whole = (weights == version).all() and (statistics == version).all()
        found["reads"] += 1
        found["mixed"] += not whole
        found["backwards"] += version < latest
        found["versions"] += version > latest
        found["torn"] = careful.torn
        latest = version
        version = careless.read(weights, statistics)
        found["careless"] += not ((weights == version).all() and (statistics == version).all())
        if time.monotonic() > give_up_s:
            break
    return found


def start_reader(stack: contextlib.ExitStack, *arguments: int) -> subprocess.Popen[bytes]:
    """A process that runs this file; the arguments that are descriptors go with it."""
    reader = stack.enter_context(
        subprocess.Popen(
            [sys.executable, __file__, *map(str, arguments)],
            pass_fds=arguments[:2],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
    )
    stack.callback(reader.kill)
    return reader


def told_by(reader: subprocess.Popen[bytes]) -> dict[str, int]:
    assert reader.returncode == 0
    assert reader.stdout is not None
    found: dict[str, int] = json.loads(reader.stdout.read())
    return found


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:]]
    told = read_in_a_process(*given) if len(given) == 1 else read_with_a_pin(*given)
    sys.stdout.write(json.dumps(told, default=int))
