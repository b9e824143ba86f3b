"""A copy of the weights is of one version, whole, whatever the writer does meanwhile; step by step.

The writer goes round its buffers, or writes over the latest version if no pin tells it not to. A
reader without the second look at the stamp does the same beside it, and must be seen to go wrong:
these tests can fail.
"""

import mmap
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from downpour.paramserver.errors import ConnectionLost, DeadlineExceeded
from downpour.paramserver.transport.shared import published as published_weights
from downpour.paramserver.transport.shared.published import PublishedWeights, WeightsReader
from tests.helpers.weights_readers import BUFFERS, Careless, Writer


class Hooked:
    """A sequence, some of whose look-ups let the writer in first."""

    def __init__(self, items: Any, hook: Callable[[], None]) -> None:
        self._items, self._hook = items, hook

    def __getitem__(self, index: int) -> Any:
        self._hook()
        return self._items[index]


class Interleaved:
    """A reader and a writer in one thread, who take their steps as the test says."""

    def __init__(self, kind: type[WeightsReader]) -> None:
        self.writer = Writer(8, 2, BUFFERS)
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
    for _ in range(BUFFERS):
        writer.write()


def nearly_lap(writer: Writer) -> None:
    for _ in range(BUFFERS - 1):
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
        self.writer = Writer(8, 2, BUFFERS, lambda: [int(self.pin[0]) - 1] if looks else [])
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
        for _ in range(3 * BUFFERS):
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
    published = PublishedWeights(8, 0, BUFFERS, in_place=True)
    assert published.begin([-1, 1, 2]) == 0, "no one is at the latest"
    assert PublishedWeights(8, 0, BUFFERS).begin([]) == 1, "small ones go to and fro"
    assert published.begin([0, 1]) == 2
    published.commit(1)
    assert published.current_buffer == 2
    assert published.begin([2, 3, 7]) == 0
    assert published.begin(range(BUFFERS)) == 3, "all are taken: then the next"


def test_readers_cannot_write_nor_shrink_what_they_read() -> None:
    writer = Writer(8, 2, BUFFERS)
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


def test_a_thousand_versions_are_kept_and_the_latest_is_read() -> None:
    kept = 1000
    published = PublishedWeights(8, 2, kept=kept)
    reader = WeightsReader(os.dup(published.fd), 8, 2, published.num_buffers)
    weights, statistics = np.empty(8, np.float32), np.empty((2, 2), np.float32)
    past: dict[int, Any] = {0: published.versions[0]}
    for version in range(1, 2 * kept):
        past[version] = published.versions[published.begin()]
        past[version].weights.fill_(version)
        past[version].statistics.fill_(version)
        published.commit(version)
        assert reader.read(weights, statistics) == version
        assert {*weights.tolist(), *statistics.flatten().tolist()} == {version}
    for version in range(kept - 1, 2 * kept):
        assert past[version].weights.tolist() == [version] * 8
    published.close()
