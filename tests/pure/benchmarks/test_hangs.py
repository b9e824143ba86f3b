"""What `bench hangs` makes of its runs."""

import json
import random
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

    def hung(wanted: int, epochs: int, arguments: list[str], *, seed: int, say: object) -> Hung:
        asked.append((wanted, "--hot-standby" in arguments))
        return Hung(seed=seed, hangs=Counter(replicas=min(wanted, 20)), ended_after_s=[1.0])

    monkeypatch.setattr(hangs, "hung", hung)
    hangs.run(Settings(repeat=1), lambda line: None)
    assert asked == [(25, False), (25, True), (10, False)]
    with pytest.raises(BadSettings, match="nothing to choose from"):
        hangs.run(Settings(repeat=1, only=("x",)), lambda line: None)


def test_a_run_trains_again_once_all_are_back_and_train_after_the_last_that_hung(
    tmp_path: Path,
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    training = hangs._Training(metrics)

    def write(*examples: int, alive: int = 2, rest: str = "") -> None:
        about = {"replicas_alive": alive, "replicas_wanted": 2}
        lines = [json.dumps({**about, "examples": n}) for n in examples]
        metrics.write_text("\n".join([*lines, json.dumps({"accuracy": 0.9}), rest]))

    write()
    assert not training.goes_on(repaired=True)
    write(10)
    assert not training.goes_on(repaired=False)
    assert training.examples == 10
    assert not training.goes_on(repaired=True)
    write(10, 5)  # a partition has started again from its checkpoint
    assert not training.goes_on(repaired=True)
    write(10, 5, 6, alive=1)
    assert not training.goes_on(repaired=True)
    write(10, 5, 6, rest='{"replicas_al')
    assert training.goes_on(repaired=True)
    assert not training.goes_on(repaired=False)
    assert not training.goes_on(repaired=True)


@pytest.mark.parametrize("together", [0.0, 1 / 3, 1.0])
def test_hangs_come_at_their_places_and_at_most_two_before_the_run_trains_again(
    together: float,
) -> None:
    pace = hangs.Pace(20, 1000, random.Random(3), together=together)
    groups, examples, now = [], 0, 0.0
    while sum(groups) < 20:
        examples, now = examples + 1, now + 1.0
        assert examples <= 1000, "all of them are in the run"
        if not pace.is_due(now, examples, goes_on=True):
            continue
        pace.hung(now)
        groups.append(1)
        for _ in range(10):  # seconds in which nobody trains
            now += 1.0
            if pace.is_due(now, examples, goes_on=False):
                pace.hung(now)
                groups[-1] += 1
    assert not pace.is_due(now, examples, goes_on=True)
    assert set(groups) == {0.0: {1}, 1 / 3: {1, 2}, 1.0: {2}}[together]


def test_every_benchmark_of_the_suite_has_a_name_for_the_command() -> None:
    assert set(suite.MODULES) | {"all"} == set(BENCHMARKS)
