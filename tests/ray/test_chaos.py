"""Kill -9 at random times, of anything: every mini-batch is applied once all the same.

Every day `test_train`, `test_train_nodes`, `test_train_hot_standby` and `test_resume` kill one of
each kind but an evaluator.
"""

import pytest

from downpour.benchmarks import chaos

pytestmark = [pytest.mark.ray, pytest.mark.soak, pytest.mark.timeout(480)]

KINDS = (
    *("replicas", "partition", "replicas", "shuffler", "partition"),
    *("driver", "partition", "evaluator", "replicas", "shuffler"),
)


def test_faults_cost_nothing_but_time() -> None:
    said: list[str] = []
    arguments = [
        *("--epochs", "7", "--replicas", "4", "--warm-start-epochs", "0"),
        *("--ramp-epochs", "0", "--learning-rate", "0.02"),
    ]
    found = chaos.disturbed(
        len(KINDS), arguments, seed=5, say=said.append, pause_s=(0.1, 0.8), kinds=KINDS
    )
    assert found.faults.total() == len(KINDS), said
    assert found.resumed == 1
    assert found.accuracy > 0.9
