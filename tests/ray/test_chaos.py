"""Kill -9 at random times, of anything: every mini-batch is applied once all the same."""

import pytest

from downpour.benchmarks import chaos

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]

EACH = ("replicas", "partition", "evaluator", "driver", "shuffler")
TWICE = (
    *("replicas", "partition", "replicas", "shuffler", "partition"),
    *("driver", "partition", "evaluator", "replicas", "shuffler"),
)


@pytest.mark.parametrize(
    ("kinds", "epochs", "accuracy"),
    [(EACH, 4, 0.85), pytest.param(TWICE, 7, 0.9, marks=pytest.mark.soak)],
    ids=["one of each", "ten"],
)
def test_faults_cost_nothing_but_time(kinds: tuple[str, ...], epochs: int, accuracy: float) -> None:
    said: list[str] = []
    arguments = [
        *("--epochs", str(epochs), "--replicas", "4", "--warm-start-epochs", "0"),
        *("--ramp-epochs", "0", "--learning-rate", "0.02"),
    ]
    found = chaos.disturbed(
        len(kinds), arguments, seed=5, say=said.append, pause_s=(0.1, 0.8), kinds=kinds
    )
    assert found.faults.total() == len(kinds), said
    assert found.resumed == 1
    assert found.accuracy > accuracy
