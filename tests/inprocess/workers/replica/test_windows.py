"""Windows come out of the decoder alike, whether decoded whole or ahead, from one part or many."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from downpour.shuffler.actor import ShufflerActor
from downpour.shuffler.ahead import Ahead, map_ahead
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset
from downpour.shuffler.delivery import Part, join
from downpour.shuffler.errors import DatasetError, DecodeError
from downpour.shuffler.images.augment import AugmentConfig
from downpour.shuffler.images.decode import Decoder
from downpour.shuffler.images.rows import PIXELS
from downpour.shuffler.images.specs import ImageSpec
from downpour.shuffler.plan.plan import Plan
from downpour.shuffler.spec import ShufflerSpec
from downpour.workers.replica import windows
from downpour.workers.replica.windows import WindowDecoder
from tests.helpers import tiny

SPEC = ImageSpec(height=tiny.SIDE, width=tiny.SIDE, channels=1)
VARIED = Decoder(spec=SPEC, augment=AugmentConfig(random_crop=True, mirror=True), seed=1)


@pytest.fixture
def data(tmp_path):
    tiny.write_split(tmp_path, "train", *tiny.images(300, 1), shards=5)
    return str(tmp_path)


def shufflers(data: str, plan: Plan, count: int, **options: Any) -> list[ShufflerActor]:
    spec = ShufflerSpec(
        num_shufflers=count, data=data, plan=plan, num_classes=tiny.CLASSES, **options
    )
    return [ShufflerActor(replace(spec, index=i)) for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_shufflers_own_disjoint_shards_and_make_up_every_window(data, count):
    plan = Plan(num_rows=300, batch_size=16, window_batches=5)
    alone = RowReader(Dataset.open(data, "train"))
    shares = [alone.dataset.share(i, count) for i in range(count)]
    assert shares[0][0] == 0
    assert shares[-1][1] == 300
    assert all(a[1] == b[0] for a, b in itertools.pairwise(shares))
    group = shufflers(data, plan, count)
    for window in range(plan.num_windows):
        batches = tuple(plan.window_batches_order(0, window).tolist())
        parts = [s.deliver(0, batches) for s in group]
        for part, (start, stop) in zip(parts, shares, strict=True):
            mine = part.rows[part.positions]
            assert ((mine >= start) & (mine < stop)).all()
        delivery = join(parts)
        rows, lengths = plan.rows_of(0, batches)
        assert (delivery.rows == rows).all()
        assert (delivery.lengths == lengths).all()
        assert delivery.batch.equals(alone.take(rows))
    alone.close()


@pytest.mark.parametrize("decoder", [Decoder(spec=SPEC), VARIED])
@pytest.mark.parametrize("count", [1, 3])
def test_pixels_that_shufflers_keep_change_no_mini_batch(data, count, decoder):
    """To the bit: first and second epoch, a shuffler that begins again, and too little room."""
    plan = Plan(num_rows=300, batch_size=16, window_batches=5, past_bound="rekey")
    files = shufflers(data, plan, count)
    taken = sum(each.deliver(0, tuple(range(plan.num_batches))).batch.nbytes for each in files)
    ample = shufflers(data, plan, count, input=SPEC)
    scarce = shufflers(data, plan, count, input=SPEC, cache_bytes=2 * taken // count)
    anew = shufflers(data, plan, count, input=SPEC)
    without = 0
    for epoch, window in itertools.product((0, 1), range(plan.num_windows)):
        batches = tuple(plan.window_batches_order(epoch, window).tolist())
        wanted = join([each.deliver(epoch, batches) for each in files])
        expected = decoder.decode(wanted.batch, epoch=epoch, rows=wanted.rows)
        for group in (ample, scarce, anew) if epoch else (ample, scarce):
            found = join([each.deliver(epoch, batches) for each in group])
            missing = found.batch.column(PIXELS).null_count
            assert not missing or group is scarce
            without += missing
            decoded = decoder.decode(found.batch, epoch=epoch, rows=found.rows)
            assert np.array_equal(decoded.inputs, expected.inputs)
            assert np.array_equal(decoded.labels, expected.labels)
            assert np.array_equal(found.lengths, wanted.lengths)
    assert 0 < without < 2 * plan.num_rows


def test_parts_that_do_not_make_up_a_window(data):
    plan = Plan(num_rows=300, batch_size=16)
    parts = [s.deliver(0, (1, 2)) for s in shufflers(data, plan, 2)]
    with pytest.raises(DatasetError, match="1 shufflers delivered"):
        join(parts[:1])
    with pytest.raises(DatasetError, match="3 shufflers delivered"):
        join([*parts, parts[0]])


def loaded(window, count: int, order=None) -> list[tuple[np.ndarray, np.ndarray]]:
    found = {place: window.load(place, 1)[0] for place in (order or range(count))}
    return [(found[i].inputs.numpy(), found[i].targets.numpy()) for i in range(count)]


@pytest.mark.parametrize("order", [None, [1, 0, 4, 2, 3], [4, 3, 2, 1, 0]])
def test_decoding_ahead_equals_decoding_whole(data, monkeypatch, order):
    plan = Plan(num_rows=300, batch_size=16)
    (shuffler,) = shufflers(data, plan, 1)
    batches = (3, 9, 0, 18, 7)
    delivery = join([shuffler.deliver(0, batches)])
    decoder = WindowDecoder(VARIED, num_threads=2, num_windows=2)
    whole, _ = decoder.open(0, batches, delivery)
    expected = loaded(whole, 5)
    monkeypatch.setattr(windows, "WHOLE_BYTES", 0)
    monkeypatch.setattr(windows, "AHEAD_BYTES", 4 * 16 * tiny.SIDE**2 * 4)
    ahead, skipped = decoder.open(0, batches, delivery)
    for (inputs, targets), (wanted, labels) in zip(loaded(ahead, 5, order), expected, strict=True):
        assert (inputs == wanted).all()
        assert (targets == labels).all()
    assert skipped() == {}
    decoder.close()


@pytest.mark.parametrize("whole_bytes", [0, 1 << 20])
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_bad_image_in_a_window(data, monkeypatch, whole_bytes, policy):
    monkeypatch.setattr(windows, "WHOLE_BYTES", whole_bytes)
    plan = Plan(num_rows=300, batch_size=16)
    (shuffler,) = shufflers(data, plan, 1)
    part = shuffler.deliver(0, (0, 1))
    bad = 20
    rows = part.batch.to_pylist()
    rows[bad]["image"]["bytes"] = b"no image"
    batch = type(part.batch).from_pylist(rows, schema=part.batch.schema)
    part = Part(batch=batch, positions=part.positions, lengths=part.lengths, rows=part.rows)
    decoder = WindowDecoder(Decoder(spec=SPEC, on_bad_image=policy), num_threads=1, num_windows=1)
    name = f"row {part.rows[bad]} "
    if policy == "stop":
        with pytest.raises(DecodeError, match=name):
            loaded(decoder.open(0, (0, 1), join([part]))[0], 2)
    else:
        window, skipped = decoder.open(0, (0, 1), join([part]))
        first, second = loaded(window, 2)
        assert (len(first[1]), len(second[1])) == (16, 15)
        assert second[0].shape[0] == 15
        ((row, line),) = skipped().items()
        assert row == part.rows[bad]
        assert name in line
    decoder.close()


def test_no_more_than_depth_jobs_are_held():
    begun: list[int] = []
    gate = threading.Event()

    def job(number: int) -> int:
        begun.append(number)
        gate.wait(10)
        return number * number

    with ThreadPoolExecutor(8) as pool:
        ahead = Ahead(pool, 20, job, depth=3)
        gate.set()
        assert [ahead.take(n) for n in (0, 1)] == [0, 1]
        assert max(begun) <= 4
        assert [ahead.take(n) for n in range(2, 20)] == [n * n for n in range(2, 20)]
        assert sorted(begun) == list(range(20))
        held = []
        for number in map_ahead(pool, (lambda n=n: held.append(n) or n for n in range(9)), 2):
            assert len(held) <= number + 2
        assert sorted(held) == list(range(9))


def test_an_error_comes_out_where_its_result_is_taken():
    def job(number: int) -> int:
        if number == 2:
            raise DecodeError("number 2")
        return number

    with ThreadPoolExecutor(2) as pool:
        ahead = Ahead(pool, 4, job, depth=4)
        assert [ahead.take(n) for n in (0, 1, 3)] == [0, 1, 3]
        with pytest.raises(DecodeError):
            ahead.take(2)


@pytest.mark.parametrize("whole_bytes", [0, 1 << 20])
def test_mini_batches_that_go_together_are_interleaved(data, monkeypatch, whole_bytes):
    monkeypatch.setattr(windows, "WHOLE_BYTES", whole_bytes)
    plan = Plan(num_rows=300, batch_size=16)
    (shuffler,) = shufflers(data, plan, 1)
    batches = (3, 9, 0, 18, 7)
    delivery = join([shuffler.deliver(0, batches)])
    alone = WindowDecoder(VARIED, num_threads=1, num_windows=1)
    expected = loaded(alone.open(0, batches, delivery)[0], 5)
    decoder = WindowDecoder(VARIED, num_threads=1, num_windows=1, together=2)
    window, _ = decoder.open(0, batches, delivery)
    found = [part for place in (0, 2, 4) for part in window.load(place, min(2, 5 - place))]
    rows = []
    for part in found:
        for j in range(part.together):
            step = slice(j, None, part.together)
            rows.append((part.inputs[step].numpy(), part.targets[step].numpy()))
    for (inputs, targets), (wanted, labels) in zip(rows, expected, strict=True):
        assert (inputs == wanted).all()
        assert (targets == labels).all()
    lengths = delivery.lengths.tolist()
    joined = [len(set(lengths[i : i + 2])) == 1 for i in (0, 2)]
    assert [part.together for part in found].count(2) == sum(joined) > 0
    decoder.close()
    alone.close()
