"""What `bench standby` makes of its runs."""

from typing import Any

import pytest

from downpour.benchmarks import standby, suite, system
from downpour.benchmarks.harness import BadSettings, Settings
from downpour.benchmarks.system import SystemMeasurement
from downpour.cluster.config.run import RunConfig
from tests.helpers.measurements import measured


def test_each_way_is_compared_with_the_same_without_a_follower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates = iter([1000.0, 600.0, 500.0, 400.0])
    asked: list[tuple[str, bool]] = []

    def measure(config: RunConfig, settings: Settings, **_: Any) -> SystemMeasurement:
        asked.append((config.server.network.transport, config.server.hot_standby))
        return measured(next(rates), replicas=4)

    monkeypatch.setattr(system, "measure", measure)
    found = standby.run(Settings(repeat=1), lambda line: None)
    assert asked == list(standby.WAYS.values())
    shares = {way: about["share"] for way, about in found.result.items()}
    assert shares == {
        "shared": 1.0,
        "shared, followed": 0.6,
        "network": 1.0,
        "network, followed": 0.8,
    }
    assert [row[2] for row in found.rows] == ["1.00", "0.60", "1.00", "0.80"]


def test_a_way_that_there_is_not_is_a_line() -> None:
    with pytest.raises(BadSettings, match="--only magic: give one of shared"):
        standby.run(Settings(repeat=1, only=("magic",)), lambda line: None)
    assert suite.MODULES["standby"] == "downpour.benchmarks.standby"
