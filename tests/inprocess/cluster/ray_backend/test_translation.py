"""What Ray's exceptions mean to the controller."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError, RayTaskError

from downpour.cluster.controller.protocol.backend import (
    PartitionLost,
    ProcessLost,
    RunFailed,
    WriteFailed,
)
from downpour.cluster.errors import UserError
from downpour.cluster.ray_backend.translation import translated
from downpour.paramserver.errors import ConnectionLost, DeadlineExceeded


def raised_in_actor(cause: Exception) -> RayTaskError:
    return RayTaskError("call", "trace", cause)


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (raised_in_actor(ConnectionLost("partition 1")), PartitionLost, "partition 1"),
        (raised_in_actor(DeadlineExceeded("partition 2")), PartitionLost, "partition 2"),
        (raised_in_actor(ActorDiedError()), ProcessLost, "the evaluator died"),
        (raised_in_actor(OSError(28, "No space left")), WriteFailed, "the evaluator: .*No space"),
        (ActorDiedError(), ProcessLost, "the evaluator died"),
        (ActorUnavailableError("gone", None), ProcessLost, "the evaluator died"),
        (NodeDiedError("gone"), ProcessLost, "the evaluator died"),
    ],
)
def test_each_kind_of_loss(error: Any, expected: type[Exception], words: str) -> None:
    found = translated(error, ProcessLost, "the evaluator")
    assert type(found) is expected
    with pytest.raises(expected, match=words):
        raise found


def test_a_users_error_that_kept_an_actor_from_starting_ends_the_run() -> None:
    error = ActorDiedError()
    error.__cause__ = raised_in_actor(UserError("num classes is 3: give 4"))
    found = translated(error, ProcessLost, "the evaluator")
    assert type(found) is RunFailed
    assert str(found) == "num classes is 3: give 4"


def test_a_defect_stays_what_it_is() -> None:
    for error in (raised_in_actor(ZeroDivisionError("0")), KeyError("x")):
        assert translated(error, ProcessLost, "the evaluator") is error
