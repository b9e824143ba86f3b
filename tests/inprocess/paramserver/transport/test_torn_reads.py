"""A copy of the weights is of one version, whole, whatever the writer does meanwhile.

The writer goes round its slots, or writes over the latest version where no pin tells it not to.
Once by hand, step by step, and once with readers in processes of their own. Either way a reader
without the second look at the stamp does the same beside it, and must be seen to go wrong: these
tests can fail.
"""

import contextlib
import json
import mmap
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from downpour.paramserver.client import ParameterClient
from downpour.paramserver.errors import ConnectionLost, DeadlineExceeded
from downpour.paramserver.messages import KEY_BYTES
from downpour.paramserver.partition.ranges import split
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.partition.vectors import Version
from downpour.paramserver.rules.schedule import Schedule
from downpour.paramserver.rules.update import SGD
from downpour.paramserver.server.server import PartitionServer
from downpour.paramserver.transport.shared import published as published_weights
from downpour.paramserver.transport.shared.published import PublishedWeights, WeightsReader

torch.set_num_threads(1)

DEADLINE_S = 45.0


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


class Hooked:
    """A sequence, some of whose look-ups let the writer in first."""

    def __init__(self, items: Any, hook: Callable[[], None]) -> None:
        self._items, self._hook = items, hook

    def __getitem__(self, index: int) -> Any:
        self._hook()
        return self._items[index]


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


SLOTS = 4


class Interleaved:
    """A reader and a writer in one thread, who take their steps as the test says."""

    def __init__(self, kind: type[WeightsReader]) -> None:
        self.writer = Writer(8, 2, SLOTS)
        for _ in range(5):
            self.writer.write()
        self.reader = self.writer.reader(kind)
        self.weights = np.full(8, -1, np.float32)
        self.statistics = np.full((2, 2), -1, np.float32)

    def before(self, what: str, steps: Callable[[Writer], None], times: int = 1) -> None:
        """Run `steps` once the stamp is known, before `_weights` or `_statistics` is copied."""
        left = [times]

        def hook() -> None:
            if left[0]:
                left[0] -= 1
                steps(self.writer)

        setattr(self.reader, what, Hooked(getattr(self.reader, what), hook))

    def read(self) -> tuple[int, set[float]]:
        """The version that the reader names, and those that its copy is made of."""
        version = self.reader.read(self.weights, self.statistics)
        return version, {*self.weights.tolist(), *self.statistics.flatten().tolist()}


def lap(writer: Writer) -> None:
    for _ in range(SLOTS):
        writer.write()


def nearly_lap(writer: Writer) -> None:
    for _ in range(SLOTS - 1):
        writer.write()


def lap_and_begin(writer: Writer) -> None:
    nearly_lap(writer)
    writer.half_write()


@pytest.mark.parametrize("kind", [WeightsReader, Careless])
def test_nobody_in_between(kind: type[WeightsReader]) -> None:
    scene = Interleaved(kind)
    assert scene.read() == (5, {5})
    scene.writer.write()
    assert scene.read() == (6, {6})
    assert scene.reader.torn == 0


@pytest.mark.parametrize(
    ("what", "steps", "latest", "careless"),
    [
        # Overwritten between the look at the stamp and the copy: whole, but not what it says.
        ("_weights", lap, 9, (5, {9})),
        ("_statistics", lap, 9, (5, {5, 9})),
        # The writer is in the middle of the slot.
        ("_weights", lap_and_begin, 8, (5, {9, 5})),
    ],
)
def test_a_reader_that_is_lapped_copies_again(
    what: str, steps: Callable[[Writer], None], latest: int, careless: tuple[int, set[float]]
) -> None:
    scene = Interleaved(WeightsReader)
    scene.before(what, steps)
    assert scene.read() == (latest, {latest})
    assert scene.reader.torn == 1

    scene = Interleaved(Careless)
    scene.before(what, steps)
    assert scene.read() == careless, "this test could not have failed"


def test_one_version_less_than_a_lap_leaves_the_copy_alone() -> None:
    scene = Interleaved(WeightsReader)
    scene.before("_weights", nearly_lap)
    assert scene.read() == (5, {5})
    assert scene.reader.torn == 0
    assert scene.read() == (8, {8})


def test_a_version_begun_and_never_finished_is_seen_by_nobody() -> None:
    scene = Interleaved(WeightsReader)
    scene.writer.half_write()
    assert scene.reader.version == 5
    assert scene.read() == (5, {5})
    scene.writer.write()  # a push that was refused leaves its slot to the next
    assert scene.read() == (6, {6})
    assert scene.reader.torn == 0


def test_a_reader_that_is_lapped_for_ever_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published_weights, "MAX_TORN", 20)
    scene = Interleaved(WeightsReader)
    scene.before("_weights", lap, times=1000)
    with pytest.raises(DeadlineExceeded, match="20 copies"):
        scene.read()
    assert scene.reader.torn == 20


class InPlace:
    """A reader with a pin, and a writer that looks at it, who take their steps as told."""

    def __init__(self, *, looks: bool = True) -> None:
        self.pin = np.zeros(1, np.int64)
        self.writer = Writer(8, 2, SLOTS, lambda: [int(self.pin[0]) - 1] if looks else [])
        self.writer.write()
        self.reader = WeightsReader(os.dup(self.writer.published.fd), *self.writer.shape, self.pin)
        self.weights = np.full(8, -1, np.float32)

    def finish(self) -> None:
        """What `half_write` began becomes a version."""
        published, self.writer.version = self.writer.published, self.writer.version + 1
        published.versions[published._begun].weights.fill_(self.writer.version)
        published.commit(self.writer.version)


def test_a_version_that_nobody_reads_is_written_over() -> None:
    scene = InPlace()
    slots = {scene.writer.published.current_buffer}
    for version in range(2, 6):
        scene.writer.write()
        assert scene.reader.read(scene.weights) == version
        assert (scene.weights == version).all()
        slots.add(scene.writer.published.current_buffer)
    assert slots == {0}
    assert not scene.pin.any()


def test_a_version_that_is_read_stays_as_it_is() -> None:
    scene = InPlace()

    def write_much() -> None:
        for _ in range(3 * SLOTS):
            scene.writer.write()

    scene.reader._weights = Hooked(scene.reader._weights, write_much)  # type: ignore[assignment]
    assert scene.reader.read(scene.weights) == 1
    assert (scene.weights == 1).all()
    assert scene.reader.torn == 0


def test_a_pin_that_is_not_seen_costs_another_copy_and_no_more() -> None:
    scene = InPlace(looks=False)
    left = [scene.writer.write]

    def write_once() -> None:
        if left:
            left.pop()()

    scene.reader._weights = Hooked(scene.reader._weights, write_once)  # type: ignore[assignment]
    assert scene.reader.read(scene.weights) == 2
    assert (scene.weights == 2).all()
    assert scene.reader.torn == 1


def test_a_reader_does_not_starve_beside_a_writer_that_never_rests() -> None:
    scene = InPlace()
    scene.writer.half_write()  # void, as the reader comes
    pauses = []

    def pause(tries: int) -> None:
        pauses.append(tries)
        scene.finish()
        scene.writer.half_write()

    assert scene.reader.read(scene.weights, None, pause) == 2
    assert (scene.weights == 2).all()
    assert pauses == [0], "the pin is seen by the next update"


def test_whoever_waits_for_a_writer_that_died_lets_go_of_its_pin() -> None:
    scene = InPlace()
    scene.writer.half_write()

    def pause(tries: int) -> None:
        assert scene.pin[0]
        raise ConnectionLost("it died")

    with pytest.raises(ConnectionLost):
        scene.reader.read(scene.weights, None, pause)
    assert not scene.pin.any()


def test_a_slot_is_found_whatever_is_pinned() -> None:
    published = PublishedWeights(8, 0, SLOTS, in_place=True)
    assert published.begin([-1, 1, 2]) == 0, "no one is at the latest"
    assert PublishedWeights(8, 0, SLOTS).begin([]) == 1, "small ones go to and fro"
    assert published.begin([0, 1]) == 2
    published.commit(1)
    assert published.current_buffer == 2
    assert published.begin([2, 3, 7]) == 0
    assert published.begin(range(SLOTS)) == 3, "all are taken: then the next"


def test_readers_cannot_write_nor_shrink_what_they_read() -> None:
    writer = Writer(8, 2, SLOTS)
    reader = writer.reader()
    with pytest.raises(ValueError, match="read-only"):
        reader._weights[0][:] = 1
    for spoil in (
        lambda: os.write(writer.published.fd, b"x"),
        lambda: os.ftruncate(writer.published.fd, 0),
        lambda: mmap.mmap(writer.published.fd, 4096),  # one that could be written to
    ):
        with pytest.raises(PermissionError):
            spoil()
    writer.published.close()
    weights = np.empty(8, np.float32)
    assert reader.read(weights) == 0


# --- In processes of their own ------------------------------------------------------------------

NUM_PARAMETERS, NUM_FEATURES = 1 << 18, 64
ENOUGH = {"reads": 300, "versions": 20, "torn": 20, "careless": 1}
"""What a reader has to live through before it has shown anything."""


def read_with_a_pin(fd: int, pins: int, number: int) -> dict[str, int]:
    """What a reader process does beside a writer that looks at pins."""
    pin = np.frombuffer(mmap.mmap(pins, mmap.PAGESIZE), np.int64, 1, 64 * number)
    reader = WeightsReader(os.dup(fd), NUM_PARAMETERS, NUM_FEATURES, SLOTS, pin)
    weights = np.empty(NUM_PARAMETERS, np.float32)
    statistics = np.empty((2, NUM_FEATURES), np.float32)
    found = dict.fromkeys(("reads", "versions", "mixed", "backwards"), 0)
    latest, give_up_s = -1, time.monotonic() + DEADLINE_S
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


def test_readers_with_pins_in_other_processes() -> None:
    pins = os.memfd_create("pins")
    os.ftruncate(pins, mmap.PAGESIZE)
    words = np.frombuffer(mmap.mmap(pins, mmap.PAGESIZE), np.int64)
    writer = Writer(
        NUM_PARAMETERS, NUM_FEATURES, SLOTS, lambda: [int(words[0]) - 1, int(words[8]) - 1]
    )
    found, slots = Counter[int](), writer.published
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, pins)
        readers = [_start(stack, slots.fd, pins, number) for number in range(2)]
        give_up_s = time.monotonic() + DEADLINE_S + 30
        while any(reader.poll() is None for reader in readers):
            assert time.monotonic() < give_up_s
            for _ in range(50):
                before = slots.current_buffer
                writer.write()
                found[slots.current_buffer == before] += 1
        for reader in readers:
            told = _told(reader)
            assert told["mixed"] == told["backwards"] == 0, told
            assert all(told[what] >= ENOUGH[what] for what in ("reads", "versions")), told
    assert set(found) == {True, False}, "both ways were gone"


def read_in_a_process(fd: int) -> dict[str, int]:
    """What a reader process does: copies and checks, until both kinds have shown what they do."""
    shape = NUM_PARAMETERS, NUM_FEATURES, 2
    careful, careless = WeightsReader(os.dup(fd), *shape), Careless(fd, *shape)
    weights = np.empty(NUM_PARAMETERS, np.float32)
    statistics = np.empty((2, NUM_FEATURES), np.float32)
    found = {**dict.fromkeys(ENOUGH, 0), "mixed": 0, "backwards": 0}
    latest, give_up_s = -1, time.monotonic() + DEADLINE_S
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


def _start(stack: contextlib.ExitStack, *arguments: int) -> subprocess.Popen[bytes]:
    """A process that runs this file; the arguments that are descriptors go with it."""
    reader = stack.enter_context(
        subprocess.Popen(
            [sys.executable, __file__, *map(str, arguments)],
            pass_fds=arguments[:2],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])},
        )
    )
    stack.callback(reader.kill)
    return reader


def _told(reader: subprocess.Popen[bytes]) -> dict[str, int]:
    assert reader.returncode == 0
    assert reader.stdout is not None
    found: dict[str, int] = json.loads(reader.stdout.read())
    return found


def test_readers_in_other_processes() -> None:
    # Two slots are the fewest that work: the next version but one overwrites what is being read.
    writer = Writer(NUM_PARAMETERS, NUM_FEATURES, 2)
    with contextlib.ExitStack() as stack:
        readers = [_start(stack, writer.published.fd) for _ in range(2)]
        give_up_s = time.monotonic() + DEADLINE_S + 30
        while any(reader.poll() is None for reader in readers):
            assert time.monotonic() < give_up_s
            for _ in range(50):
                writer.write()
        for reader in readers:
            found = _told(reader)
            assert found["mixed"] == 0, found
            assert found["backwards"] == 0, found
            assert all(found[what] >= least for what, least in ENOUGH.items()), found


def test_pulls_from_a_server_that_is_being_pushed_to() -> None:
    # Every push takes 1 off every weight, so that a version v is -v everywhere.
    num_parameters, num_partitions, key = 1 << 17, 2, b"k" * KEY_BYTES
    config = UpdateConfig(
        rule=SGD(), schedule=Schedule(learning_rate=1.0), batches_per_epoch=400, epoch_examples=400
    )
    parts = split(
        num_parameters=num_parameters,
        num_features=0,
        num_decayed=0,
        num_partitions=num_partitions,
    )
    with contextlib.ExitStack() as stack:
        servers = [
            PartitionServer(
                partition=part,
                config=config,
                key=key,
                weights=torch.zeros(part.num_parameters),
            ).start()
            for part in parts
        ]
        for server in servers:
            stack.callback(server.stop)
        endpoints = [server.endpoint for server in servers]
        pushing = ParameterClient(endpoints, key=key, num_mailboxes=1)
        pulling = [ParameterClient(endpoints, key=key) for _ in range(2)]
        for client in (pushing, *pulling):
            stack.callback(client.close)
        wrong: list[list[int]] = []
        pulls = [0, 0]

        def pull(me: int) -> None:
            weights, versions = np.empty(num_parameters, np.float32), [0, 0]
            while min(versions) < config.batches_per_epoch and not wrong:
                pulling[me].pull(weights, versions)
                pulls[me] += 1
                for part, version in zip(parts, versions, strict=True):
                    if not (weights[part.start : part.stop] == -version).all():
                        wrong.append([me, *versions])

        threads = [threading.Thread(target=pull, args=(me,), daemon=True) for me in range(2)]
        for thread in threads:
            thread.start()
        for batch in range(config.batches_per_epoch):
            pushing.mailboxes.gradients[0].fill_(1.0)
            pushing.push(
                mailbox=0,
                replica=0,
                epoch=0,
                batches=(batch,),
                examples=1,
                versions=[batch] * num_partitions,
                loss=1.0,
                gradient_norm=float(pushing.mailboxes.gradients[0].norm()),
            )
            while pushing.in_flight(0):
                pushing.wait()
        for thread in threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
        assert wrong == []
        assert min(pulls) > 1


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:]]
    told = read_in_a_process(*given) if len(given) == 1 else read_with_a_pin(*given)
    sys.stdout.write(json.dumps(told, default=int))
