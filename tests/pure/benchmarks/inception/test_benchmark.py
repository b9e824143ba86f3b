"""What `bench inception` makes of its measurements."""

from typing import Any

import pytest

from downpour.benchmarks import suite, system
from downpour.benchmarks.harness import BadSettings, Settings
from downpour.benchmarks.inception import benchmark
from downpour.cluster.config.run import RunConfig
from tests.helpers.measurements import measured

RATES = {
    "plain loops, float32": 100.0,
    "plain loops, bfloat16": 200.0,
    "10 x 5, float32": 150.0,
    "10 x 5, bfloat16": 220.0,
}


def test_everybody_is_compared_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def child(what: str, *_: Any) -> dict[str, Any]:
        return {"images_per_s": RATES.get(what, 400.0), "format": "channels last"}

    def measure(config: RunConfig, settings: Settings) -> system.SystemMeasurement:
        assert config.replicas.slots == 50
        assert config.model.all_arguments == {"width": 0.25}
        rate = RATES[f"10 x 5, {config.replicas.steps.precision}"]
        return measured(rate / 32, replicas=10)

    monkeypatch.setattr(benchmark, "_child", child)
    monkeypatch.setattr(benchmark, "make_rows", lambda *_, **__: None)
    monkeypatch.setattr(system, "measure", measure)
    found = benchmark.run(Settings(repeat=1, only=("0.25x32",)), lambda line: None)
    rates = found.result["0.25x32"]
    assert {
        name: about["ratio_to_plain_float32"] for name, about in rates.items() if name in RATES
    } == {name: rate / 100.0 for name, rate in RATES.items()}
    assert rates["10 x 5, bfloat16"]["ratio_to_plain"] == 1.1
    assert rates["10 x 5, float32"]["share_of_floor"] == 150.0 / 400.0
    assert [row[1] for row in found.rows] == ["100.0", "200.0", "150.0", "220.0", "400.0", "400.0"]


def test_a_size_that_there_is_not_is_a_line() -> None:
    with pytest.raises(BadSettings, match=r"--only 2x2: give one of 0.25x32"):
        benchmark.run(Settings(repeat=1, only=("2x2",)), lambda line: None)
    assert suite.MODULES["inception"] == "downpour.benchmarks.inception.benchmark"
