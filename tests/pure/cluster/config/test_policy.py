"""What follows from a run's policies and its progress."""

import pytest

from downpour.cluster.config.policy import PolicyConfig, active_replicas, next_evaluation_s
from downpour.workers.config import ReplicaConfig


def test_the_warm_start_ramps_evenly() -> None:
    config = ReplicaConfig(replicas=10, warm_start_epochs=1, ramp_epochs=9)
    assert [active_replicas(config, e) for e in (0, 0.99, 1, 1.99, 2, 5.5, 9.99, 10, 19)] == [
        *(1, 1, 1, 1, 2, 5, 9, 10, 10)
    ]
    assert active_replicas(ReplicaConfig(replicas=10), 0) == 10
    assert active_replicas(ReplicaConfig(replicas=1, warm_start_epochs=1), 0) == 1


def test_scoring_keeps_to_its_share_of_the_time() -> None:
    policy = PolicyConfig(evaluate_every_s=5, evaluation_share=0.1)
    assert next_evaluation_s(policy, 100, 100.2) == 105
    assert next_evaluation_s(policy, 100, 103) == pytest.approx(130)
    # Held up, as by a machine that was suspended: it costs no more than twice the shortest.
    assert next_evaluation_s(policy, 100, 103, 2.0) == pytest.approx(130)
    assert next_evaluation_s(policy, 100, 110, 2.0) == pytest.approx(140)
    assert next_evaluation_s(policy, 100, 190, 2.0) == 190
