"""The feed alone: the plan's mini-batches, all of them, from any place, on any number of ranks."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from downpour.shuffler.errors import DecodeError, PlanError
from downpour.shuffler.feed import Feed
from downpour.shuffler.images.augment import AugmentConfig
from downpour.shuffler.images.decode import Decoder
from downpour.shuffler.images.specs import ImageSpec
from downpour.shuffler.plan.plan import Plan
from downpour.workers.torch_feed import TorchFeed
from tests.helpers import tiny

SPEC = ImageSpec(height=6, width=6, channels=1)
VARIED = AugmentConfig(random_crop=True, mirror=True)
ROWS, BATCH, WINDOW = 300, 16, 5
OPTIONS = {"batch_size": BATCH, "window_batches": WINDOW, "seed": 3, "epochs": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny.write_split(folder, "train", *tiny.images(ROWS, 1), shards=3)
    return str(folder)


def order(plan: Plan, epochs: int) -> list[tuple[int, int]]:
    """The mini-batches as the plan says that they run."""
    return [
        (epoch, batch)
        for epoch in range(epochs)
        for window in plan.window_order(epoch).tolist()
        for batch in plan.window_batches_order(epoch, window).tolist()
    ]


def kept(feed: Feed) -> list[list[str]]:
    """The rows of each mini-batch, by the path that each has in the dataset."""
    return [[row["path"] for row in batch.column("image").to_pylist()] for batch in feed]


@pytest.mark.parametrize("strategy", ["pairwise", "random", "within_shard", "buffer", "none"])
def test_a_feed_is_the_plan(data, strategy):
    feed = Feed(data, strategy=strategy, past_bound="rekey", **OPTIONS)
    wanted = [
        [f"{row}.png" for row in feed.plan.rows(epoch, batch)]
        for epoch, batch in order(feed.plan, 2)
    ]
    assert kept(feed) == wanted
    assert len(wanted) == 2 * len(feed)
    feed.close()


def test_locate_is_the_order():
    for num_batches in (1, 4, 5, 6, 14, 15, 16, 37):
        plan = Plan(num_rows=num_batches * 2, batch_size=2, window_batches=5, past_bound="rekey")
        for epoch in (0, 1):
            found = []
            for place in range(num_batches):
                turn, number = plan.locate(epoch, place)
                window = plan.window_at(epoch, turn)
                assert plan.turn_of(epoch, window) == turn
                found.append((epoch, int(plan.window_batches_order(epoch, window)[number])))
            assert found == [at for at in order(plan, 2) if at[0] == epoch]


def test_decoded_inputs_are_the_decoders(data):
    feed = Feed(data, image=SPEC, augment=VARIED, num_threads=3, **OPTIONS)
    rows = Feed(data, **OPTIONS)
    decoder = Decoder(spec=SPEC, augment=VARIED, seed=3)
    for (inputs, labels), batch, at in zip(feed, rows, order(feed.plan, 2), strict=True):
        wanted = decoder.decode(batch, epoch=at[0], rows=feed.plan.rows(*at))
        assert (inputs == wanted.inputs).all()
        assert (labels == wanted.labels).all()


@pytest.mark.parametrize("taken", [0, 1, 4, 5, 18, 19, 20, 30, 37, 38])
@pytest.mark.parametrize("image", [None, SPEC])
def test_a_feed_goes_on_from_any_place(data, taken, image):
    whole = Feed(data, image=image, augment=VARIED, **OPTIONS)
    batches = list(whole)
    first = Feed(data, image=image, augment=VARIED, **OPTIONS)
    begun = iter(first)
    for _ in range(taken):
        next(begun)
    state = pickle.loads(pickle.dumps(first.state_dict()))  # noqa: S301
    second = Feed(data, image=image, augment=VARIED, **OPTIONS)
    second.load_state_dict(state)
    rest = list(second)
    assert len(rest) == len(batches) - taken
    for mine, wanted in zip(rest, batches[taken:], strict=True):
        if image is None:
            assert mine.equals(wanted)
        else:
            assert (mine[0] == wanted[0]).all()
    assert list(second) == []
    begun.close()


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (3, 2), (2, 5)])
def test_ranks_share_the_mini_batches_and_their_number_may_change(data, before, after):
    wanted = sorted(map(tuple, kept(Feed(data, **OPTIONS))))
    rounds, found, states = 4, [], []
    for rank in range(before):
        feed = Feed(data, rank=rank, world_size=before, **OPTIONS)
        begun = iter(feed)
        for _ in range(rounds):
            batch = next(begun)
            found.append(tuple(row["path"] for row in batch.column("image").to_pylist()))
        states.append(feed.state_dict())
        begun.close()
    assert all(state == states[0] for state in states)
    for rank in range(after):
        feed = Feed(data, rank=rank, world_size=after, **OPTIONS)
        feed.load_state_dict(states[0])
        found += [tuple(paths) for paths in kept(feed)]
    assert sorted(found) == wanted


def test_a_state_of_another_feed_is_refused(data):
    state = Feed(data, **OPTIONS).state_dict()
    with pytest.raises(PlanError, match="seed=3, and this feed 4"):
        Feed(data, **{**OPTIONS, "seed": 4}).load_state_dict(state)
    with pytest.raises(PlanError, match="fingerprint="):
        Feed(data, **OPTIONS).load_state_dict({**state, "fingerprint": "other"})
    with pytest.raises(PlanError, match="rank=2"):
        Feed(data, rank=2, world_size=2)
    with pytest.raises(PlanError, match="passes the bound"):
        Feed(data, batch_size=100, epochs=9, past_bound="error")


def test_a_state_of_an_older_version_goes_on_with_its_mini_batches(data):
    before = Feed(data, **OPTIONS)
    before.plan = dataclasses.replace(before.plan, version=1)
    wanted = [tuple(paths) for paths in kept(before)]
    state = Feed(data, **OPTIONS).state_dict()
    del state["plan_version"]
    after = Feed(data, **OPTIONS)
    after.load_state_dict(state)
    assert after.plan.version == 1
    assert [tuple(paths) for paths in kept(after)] == wanted


def test_torch_takes_it_as_a_dataset(data):
    options = {**OPTIONS, "image": SPEC, "augment": VARIED}
    wanted = list(Feed(data, **options))
    dataset = TorchFeed(data, **options)
    assert isinstance(dataset, torch.utils.data.IterableDataset)
    loader = DataLoader(dataset, batch_size=None)
    assert len(loader) == len(dataset) == len(wanted) == 38
    assert [labels.tolist() for _, labels in loader] == [y.tolist() for _, y in wanted]
    dataset = TorchFeed(data, **options)
    begun = iter(dataset)
    for _ in range(7):
        next(begun)
    other = TorchFeed(data, **options)
    other.load_state_dict(dataset.state_dict())
    for (inputs, labels), (pixels, classes) in zip(other, wanted[7:], strict=True):
        assert (inputs.numpy() == pixels).all()
        assert (labels.numpy() == classes).all()
        assert labels.dtype == torch.int64
    begun.close()
    with pytest.raises(TypeError, match="needs image="):
        TorchFeed(data)


def test_torchs_workers_share_the_mini_batches(data):
    options = {**OPTIONS, "image": SPEC, "augment": VARIED, "epochs": 1, "num_threads": 1}
    dataset = TorchFeed(data, **options)
    loader = DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context="forkserver"
    )
    found = {inputs.numpy().tobytes() for inputs, _ in loader}
    assert found == {inputs.tobytes() for inputs, _ in Feed(data, **options)}
    assert len(found) == 19


def test_a_feed_skips_or_stops(tmp_path):
    pixels, labels = tiny.images(64, 1)
    tiny.write_split(tmp_path, "train", pixels, labels)
    big = ImageSpec(height=6, width=6, channels=1)
    assert Feed(tmp_path, image=big, augment=VARIED).num_skipped == 0
    with pytest.raises(DecodeError, match="8x8 pixels, and 6x6 are wanted"):
        list(Feed(tmp_path, image=big))
    assert np.isclose(sum(len(y) for _, y in Feed(tmp_path, image=big, augment=VARIED)), 64)
