"""What `bench goodput` makes of its runs."""

from collections import Counter
from contextlib import nullcontext

import pytest

from downpour.benchmarks import goodput, suite
from downpour.benchmarks.chaos import Disturbed
from downpour.benchmarks.harness import BadSettings, Settings


def test_goodput_is_the_time_of_a_calm_run_over_that_of_a_disturbed_one() -> None:
    calm = Disturbed(seed=0, run_s=95.0)
    hit = Disturbed(
        seed=0, run_s=100.0, faults=Counter(replicas=4, driver=2), duplicates=7, recomputed=30
    )
    found = goodput.report([{"hot standby": (calm, hit)}] * 3, epochs=4, every_s=15.0)
    assert found.result["hot standby"] == {
        "goodput": 0.95,
        "deaths": 18,
        "batches_repeated": 21,
        "batches_recomputed": 90,
        "undisturbed_s": 95.0,
        "disturbed_s": 100.0,
    }
    assert found.rows[0][:2] == ("hot standby", "0.950")


def test_everything_dies_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, tuple[str, ...]]] = []
    clusters: list[object] = []

    def disturbed(faults: int, arguments: list[str], **about: object) -> Disturbed:
        kinds = about["kinds"]
        assert isinstance(kinds, tuple)
        asked.append((faults, kinds[:6]))
        clusters.append(about["cluster"])
        return Disturbed(seed=0, run_s=1.0)

    monkeypatch.setattr("downpour.benchmarks.chaos.disturbed", disturbed)
    goodput.run(Settings(repeat=1, only=("hot standby",)), lambda line: None)
    assert asked == [(0, ()), (1000, (*goodput.IN_TURN, "replicas"))]
    asked.clear()
    ways = ("hot standby", "hot standby, driver spared")
    goodput.run(Settings(repeat=1, only=ways), lambda line: None)
    spared = (*goodput.MEMBERS, *goodput.MEMBERS[:2])
    every = (*goodput.IN_TURN, "replicas")
    assert asked == [(0, ()), (1000, every), (1000, spared)], "they share the undisturbed run"
    asked.clear()
    monkeypatch.setattr("downpour.benchmarks.chaos.ray_cluster", lambda: nullcontext("a Ray"))
    goodput.run(Settings(repeat=1, only=(ways[0], "hot standby, in a cluster")), lambda line: None)
    assert asked == [(0, ()), (1000, every), (0, ()), (1000, every)], "it has one of its own"
    assert clusters[-4:] == [None, None, "a Ray", "a Ray"]
    with pytest.raises(BadSettings, match="give one of"):
        goodput.run(Settings(repeat=1, only=("magic",)), lambda line: None)


def test_the_suite_has_it() -> None:
    assert suite.MODULES["goodput"] == "downpour.benchmarks.goodput"
