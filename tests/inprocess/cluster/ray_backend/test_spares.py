"""Spares: processes that become members of a run when one has died."""

import threading
from pathlib import Path
from typing import Any

import pytest

from downpour.cluster.config.derive import make_decoder, model_spec, step_config
from downpour.cluster.controller.leases.book import Lease
from downpour.cluster.ray_backend.spares import PartitionSpare, ReplicasSpare
from downpour.models.errors import ModelError
from downpour.workers.spec import ReplicasSpec
from tests.helpers import thread_backend, tiny
from tests.helpers.runs import Run
from tests.helpers.thread_backend import ThreadBackend


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.dataset(tmp_path_factory.mktemp("data"))


def test_members_that_were_spares_train_like_others(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are asked to connect before they are what they are to be, as may happen with Ray."""
    asked: list[str] = []

    def in_two_halves(spare: type[Any], first_call: str) -> Any:
        class PendingResult(spare):  # type: ignore[misc]
            def __init__(self, *arguments: Any) -> None:
                super().__init__()
                assert "Spare" in repr(self)
                self._late = arguments

            def __getattribute__(self, name: str) -> Any:
                if name == first_call and "_late" in self.__dict__:
                    late = self.__dict__.pop("_late")
                    asked.append(name)
                    threading.Thread(target=self.assume, args=late).start()
                return super().__getattribute__(name)

        return PendingResult

    monkeypatch.setattr(thread_backend, "ReplicasActor", in_two_halves(ReplicasSpare, "connect"))
    late_partition = in_two_halves(PartitionSpare, "endpoint")

    def reached(*arguments: Any) -> Any:
        partition = late_partition(*arguments)
        partition.endpoint()  # what is asked of a partition first
        return partition

    monkeypatch.setattr(thread_backend, "PartitionActor", reached)
    run = Run(tmp_path / "run", tiny.config(data, partitions=2))
    run.assert_exactly_once(run.go())
    assert set(asked) == {"connect", "endpoint"}
    assert "Spare" not in repr(run.backend.partitions[0])


def test_an_error_of_its_second_half_comes_to_who_waits_for_it(data: str) -> None:
    spare = ReplicasSpare()
    config = tiny.config(data)
    broken = model_spec(config)
    object.__setattr__(broken, "name", "no-such-model")
    spec = ReplicasSpec(
        replicas=(0,), model=broken, steps=step_config(config), decoder=make_decoder(config)
    )
    with pytest.raises(ModelError):
        spare.assume(spec)
    with pytest.raises(ModelError):
        spare.connect((), b"")


def test_spares_are_made_when_all_are_there_and_again_when_one_was_used(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("downpour.cluster.controller.failures.account.SPARES_AFTER_S", 0.0)
    made_before_death: list[int] = []

    def kill_one(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        if not made_before_death and backend.spares_made:
            made_before_death.append(backend.spares_made)
            backend.kill_process(replica % 2)

    run = Run(tmp_path / "run", tiny.config(data, epochs=6))
    run.assert_exactly_once(run.go(kill_one))
    assert made_before_death == [1]
    assert run.backend.spares_made >= 2
