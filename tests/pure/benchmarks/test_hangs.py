"""What `bench hangs` makes of its runs."""

import json
from collections import Counter
from pathlib import Path

import pytest

from downpour.benchmarks import hangs, suite
from downpour.benchmarks.hangs import Hung
from downpour.benchmarks.harness import BadSettings, Settings
from downpour.cluster.cli.bench import BENCHMARKS


def test_a_record_counts_who_was_ended_and_who_hung_when_all_was_done() -> None:
    runs = [
        Hung(
            seed=0, hangs=Counter(replicas=2, partition=1), ended_after_s=[3.0, 5.0], at_the_end=1
        ),
        Hung(seed=1, hangs=Counter(evaluator=1), ended_after_s=[10.0], told=1, accuracy=0.9),
    ]
    found = hangs.report(runs, epochs=4)
    assert found.title.startswith("4 processes hang for good in 2 runs")
    assert found.result == {
        "hangs": {"replicas": 2, "partition": 1, "evaluator": 1},
        "num_hangs": 4,
        "ended": 3,
        "at_the_end": 1,
        "median_s": 5.0,
        "longest_s": 10.0,
    }
    assert found.rows[1] == ("1", "1 evaluator", "1", "10.0", "10.0", "0", "90.00%")


def test_runs_are_made_until_all_hangs_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, bool]] = []

    def hung(wanted: int, arguments: list[str], *, seed: int, say: object) -> Hung:
        asked.append((wanted, "--hot-standby" in arguments))
        return Hung(seed=seed, hangs=Counter(replicas=min(wanted, 20)), ended_after_s=[1.0])

    monkeypatch.setattr(hangs, "hung", hung)
    hangs.run(Settings(repeat=1), lambda line: None)
    assert asked == [(25, False), (25, True), (10, False)]
    with pytest.raises(BadSettings, match="nothing to choose from"):
        hangs.run(Settings(repeat=1, only=("x",)), lambda line: None)


def test_a_run_trains_again_once_updates_come_after_the_last_that_hung(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    training = hangs._Training(metrics)

    def write(*updates: int, rest: str = "") -> None:
        lines = [json.dumps({"replicas_alive": 2, "updates": n}) for n in updates]
        metrics.write_text("\n".join([*lines, json.dumps({"accuracy": 0.9}), rest]))

    write(10)
    assert not training.goes_on(repaired=False)
    assert not training.goes_on(repaired=True)
    write(10, 5)  # a partition has started again from its checkpoint
    assert not training.goes_on(repaired=True)
    write(10, 5, 6, rest='{"replicas_al')
    assert training.goes_on(repaired=True)
    assert not training.goes_on(repaired=False)
    assert not training.goes_on(repaired=True)


def test_every_benchmark_of_the_suite_has_a_name_for_the_command() -> None:
    assert set(suite.MODULES) | {"all"} == set(BENCHMARKS)
