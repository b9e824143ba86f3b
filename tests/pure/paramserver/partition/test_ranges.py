"""Partitions tile the flat axes, evenly, whatever the model's size."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from downpour.paramserver.errors import BadConfiguration
from downpour.paramserver.partition.ranges import ALIGNMENT, split


@st.composite
def models(draw: st.DrawFn) -> dict[str, int]:
    num_parameters = draw(st.integers(1, 100_000) | st.integers(1, 300))
    return {
        "num_parameters": num_parameters,
        "num_features": draw(st.integers(0, 5_000)),
        "num_decayed": draw(st.integers(0, num_parameters)),
        "num_partitions": draw(st.integers(1, min(64, max(1, num_parameters // ALIGNMENT)))),
    }


@given(models())
def test_tiles_balanced_and_consistent(model: dict[str, int]) -> None:
    parts = split(**model)
    n = model["num_partitions"]
    assert [p.index for p in parts] == list(range(n))
    assert {p.num_partitions for p in parts} == {n}
    assert {p.total_parameters for p in parts} == {model["num_parameters"]}
    assert {p.total_features for p in parts} == {model["num_features"]}

    parameters = [i for p in parts for i in (p.start, p.stop)]
    features = [i for p in parts for i in (p.feature_start, p.feature_stop)]
    for bounds, total in ((parameters, model["num_parameters"]), (features, model["num_features"])):
        assert bounds[0] == 0
        assert bounds[-1] == total
        assert bounds[1:-1:2] == bounds[2::2], "a gap or an overlap"
        assert bounds == sorted(bounds)
    assert all(p.start % ALIGNMENT == 0 for p in parts)

    sizes = [p.num_parameters for p in parts]
    assert sum(sizes) == model["num_parameters"]
    assert min(sizes) > 0
    assert max(sizes) - min(sizes) <= ALIGNMENT
    widths = [p.num_features for p in parts]
    assert max(widths) - min(widths) <= 1

    assert sum(p.num_decayed for p in parts) == model["num_decayed"]
    for p in parts:
        expected = len(range(p.start, min(p.stop, model["num_decayed"])))
        assert p.num_decayed == expected


def test_one_partition_is_the_whole_model() -> None:
    (whole,) = split(num_parameters=10, num_features=3, num_decayed=7, num_partitions=1)
    assert (whole.start, whole.stop, whole.feature_start, whole.feature_stop) == (0, 10, 0, 3)
    assert (whole.num_parameters, whole.num_features, whole.num_decayed) == (10, 3, 7)


def test_a_short_tail_is_in_the_larger_partition() -> None:
    # 63 blocks of 16 and 15 elements over: rounding each cut down would give 320 and 351.
    parts = split(num_parameters=1023, num_features=0, num_decayed=0, num_partitions=3)
    assert [p.num_parameters for p in parts] == [336, 336, 351]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_partitions": 0}, "partitions is 0"),
        ({"num_partitions": -2}, "partitions is -2"),
        ({"num_partitions": 7}, "cut into 6"),
        ({"num_parameters": 0, "num_decayed": 0}, "0 parameters"),
        ({"num_features": -1}, "-1 features"),
        ({"num_decayed": 101}, "101 of them"),
        ({"num_decayed": -1}, "-1 of them"),
    ],
)
def test_errors_are_one_line_and_name_the_value(changes: dict[str, int], named: str) -> None:
    good = {"num_parameters": 100, "num_features": 5, "num_decayed": 50, "num_partitions": 2}
    with pytest.raises(BadConfiguration, match=named) as caught:
        split(**good | changes)
    assert "give" in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=40), st.data())
def test_cuts_fall_between_tensors_if_a_rule_needs_whole_ones(
    sizes: list[int], data: st.DataObject
) -> None:
    stops = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    most = min(len(sizes), max(1, stops[-1] // ALIGNMENT))
    n = data.draw(st.integers(1, most))
    decayed = data.draw(st.sampled_from([0, *stops]))
    parts = split(
        num_parameters=stops[-1],
        num_features=0,
        num_decayed=decayed,
        num_partitions=n,
        stops=stops,
    )
    assert len(parts) == n
    assert parts[0].start == 0
    assert parts[-1].stop == stops[-1]
    assert all(a.stop == b.start for a, b in itertools.pairwise(parts))
    assert [p.start + stop for p in parts for stop in p.stops] == stops
    for p in parts:
        assert p.num_parameters > 0
        assert p.stops[-1] == p.num_parameters
        assert p.layers == tuple(s for s in p.stops if p.start + s <= decayed)


def test_fewer_tensors_than_partitions_are_told() -> None:
    with pytest.raises(BadConfiguration, match="partitions is 3, and the rule needs whole") as told:
        split(num_parameters=99, num_features=0, num_decayed=0, num_partitions=3, stops=(50, 99))
    assert "give 2 or fewer" in str(told.value)


@given(st.integers(1, 5000), st.data())
def test_frozen_parameters_are_the_last_ones(num_parameters: int, data: st.DataObject) -> None:
    frozen = data.draw(st.integers(0, num_parameters))
    n = data.draw(st.integers(1, max(1, min(8, num_parameters // ALIGNMENT))))
    parts = split(
        num_parameters=num_parameters,
        num_features=0,
        num_decayed=0,
        num_partitions=n,
        num_frozen=frozen,
    )
    assert sum(p.num_frozen for p in parts) == frozen
    for p in parts:
        trained = len(range(p.start, min(p.stop, num_parameters - frozen)))
        assert p.num_trained == trained
