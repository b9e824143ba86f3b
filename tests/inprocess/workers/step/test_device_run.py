"""Whole runs whose replicas compute on a device, with copies that are late, against plain ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from downpour.cluster.config.derive import make_decoder, model_spec, step_config
from downpour.cluster.config.run import RunConfig
from downpour.cluster.controller.leases.book import Lease
from downpour.cluster.errors import UserError
from downpour.cluster.run.folder import RunFolder
from downpour.cluster.simulate.likeness import likeness
from downpour.cluster.training.change import change
from downpour.cluster.training.inputs import check_data, check_data_unchanged
from downpour.cluster.training.launch import train
from downpour.paramserver.config import NetworkConfig
from downpour.paramserver.rules.policy import StalenessPolicy
from downpour.workers import actor
from downpour.workers.errors import DeviceMissing
from downpour.workers.spec import ReplicasSpec
from downpour.workers.step.device import Device, HostDevice
from downpour.workers.step.joining import JoinTrial
from tests.helpers import tiny
from tests.helpers.late import LateDevice
from tests.helpers.runs import Run, assert_replays_to_the_bit, recorded
from tests.helpers.thread_backend import ThreadBackend

Make = Callable[[], Device]

DEVICES: dict[str, Make] = {
    "host": HostDevice,
    "host, staged": lambda: HostDevice(locks=False),
    "late": LateDevice,
    "late, staged": lambda: LateDevice(locks=False),
    "late, now and then": lambda: LateDevice(seed=3),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(params=DEVICES)
def devices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Device]:
    """Every process of replicas computes on such a device; gives those there have been."""
    return install(DEVICES[request.param], monkeypatch)


def install(make: Make, monkeypatch: pytest.MonkeyPatch) -> list[Device]:
    found: list[Device] = []

    def find(name: str) -> Device:
        found.append(make())
        return found[-1]

    monkeypatch.setattr(actor, "find_device", find)
    return found


def assert_let_go(devices: list[Device]) -> None:
    assert devices
    assert not any(device.locked for device in devices if isinstance(device, LateDevice))


@pytest.mark.parametrize(
    ("n_push", "n_fetch"), [(1, 1), pytest.param(3, 1, marks=pytest.mark.soak), (3, 3)]
)
def test_one_step_in_flight_gives_the_weights_of_processors(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch, n_push: int, n_fetch: int
) -> None:
    config = tiny.config(data, replicas=1, concurrent_steps=1, n_push=n_push, n_fetch=n_fetch)
    # One window at a time: of two that a replica holds, either may be ready to run first. All end
    # with a whole push and a fetch, so that it does not matter how soon the next one comes.
    one_window = dataclasses.replace(config.replicas, queued_windows=1)
    config = dataclasses.replace(config, replicas=one_window)
    expected = Run(tmp_path / "cpu", config)
    expected.go()
    for i, make in enumerate(DEVICES.values()):
        devices = install(make, monkeypatch)
        run = Run(tmp_path / str(i), config)
        run.assert_exactly_once(run.go())
        assert torch.equal(run.weights, expected.weights)
        assert_let_go(devices)


def test_a_run_with_many_steps_in_flight_is_computed_again_on_processors(
    tmp_path: Path, data: str, devices: list[Device]
) -> None:
    """Asynchronous, with deaths; what each push was computed on is recorded."""

    def kill(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        if lease.id in (5, 11):
            backend.kill_process(replica % 2)

    run = recorded(tmp_path / "run", tiny.config(data, concurrent_steps=5))
    outcome = run.go(kill)
    run.assert_exactly_once(outcome)
    assert len(devices) == 4
    assert_replays_to_the_bit(tmp_path / "run", outcome)
    assert_let_go(devices)


@pytest.mark.parametrize("devices", ["late", "late, staged"], indirect=True)
@pytest.mark.parametrize("what", ["network", "bounded", "synchronous"])
def test_however_steps_are_pushed_and_pulled(
    tmp_path: Path, data: str, devices: list[Device], what: str
) -> None:
    run = recorded(tmp_path / "run", changed(tiny.config(data), what))

    def cut(backend: ThreadBackend, replica: int, lease: Lease) -> None:
        if lease.id == 7:
            backend.cut_connections(0)

    outcome = run.go(cut)
    run.assert_exactly_once(outcome)
    assert_replays_to_the_bit(tmp_path / "run", outcome)
    assert_let_go(devices)


@pytest.mark.parametrize("devices", ["late", "late, staged"], indirect=True)
def test_steps_that_are_added_up_in_many_slots(
    tmp_path: Path, data: str, devices: list[Device]
) -> None:
    run = Run(tmp_path / "run", tiny.config(data, n_push=4, n_fetch=2, learning_rate=0.01))
    outcome = run.go()
    run.assert_exactly_once(outcome)
    assert_let_go(devices)


def test_steps_that_are_computed_together(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JoinTrial, "next", lambda _: True)
    config = tiny.config(data, replicas=1, concurrent_steps=3, in_flight="auto")
    one_window = dataclasses.replace(config.replicas, queued_windows=1)
    config = dataclasses.replace(config, replicas=one_window)
    expected = Run(tmp_path / "cpu", config)
    expected.go()
    devices = install(LateDevice, monkeypatch)
    run = Run(tmp_path / "late", config)
    run.assert_exactly_once(run.go())
    assert torch.equal(run.weights, expected.weights)
    several = Run(
        tmp_path / "several", tiny.config(data, concurrent_steps=2, in_flight="auto", epochs=1)
    )
    several.assert_exactly_once(several.go())
    assert_let_go(devices)


def changed(config: RunConfig, what: str) -> RunConfig:
    if what == "network":
        network = NetworkConfig(transport="network")
        server = dataclasses.replace(config.server, network=network)
    else:
        pushes = config.replicas.slots if what == "synchronous" else None
        policy = StalenessPolicy(
            staleness_policy=what,  # type: ignore[arg-type]
            staleness_bound=6,
            round_pushes=pushes,
        )
        server = dataclasses.replace(config.server, policy=policy)
    return dataclasses.replace(config, server=server)


def test_a_push_before_its_copy_has_ended_would_be_refused(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(lambda: LateDevice(ignored=frozenset({("host", "down")})), monkeypatch)
    config = tiny.config(data, epochs=1)
    # A capture and its comparisons wait for everything.
    steps = dataclasses.replace(config.replicas.steps, record_steps="off")
    replicas = dataclasses.replace(config.replicas, steps=steps)
    run = Run(tmp_path / "run", dataclasses.replace(config, replicas=replicas))
    outcome = run.go()
    # All but those that were under way when another slot was made, which waits for everything.
    assert outcome.refused >= run.plan.num_batches - run.config.replicas.slots


def test_a_run_goes_on_on_another_device_if_that_can_be(tmp_path: Path, data: str) -> None:
    config = tiny.config(data)
    folder = RunFolder.create(tmp_path / "run", config)
    found = check_data(config)
    check_data_unchanged(folder, found)
    change(folder, found, device="cuda")
    assert folder.config().replicas.steps.device == "cuda"
    with pytest.raises(UserError, match="replica device cuda, whose time its metrics do not tell"):
        likeness(folder, 1, 2)
    change(folder, found, device="cpu")
    assert folder.config() == config
    with_record = recorded(tmp_path / "recorded", config).folder
    with pytest.raises(UserError, match="cannot go on so: record pushes is on, and replica device"):
        change(with_record, found, device="cuda")
    assert with_record.config().replicas.steps.device == "cpu"


def test_without_a_gpu_nothing_is_started(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(
        "downpour.workers.step.device.cuda_problem", lambda where: f"there is no GPU {where}"
    )
    config = tiny.config(data)
    folder = RunFolder.create(tmp_path / "run", config)
    found = check_data(config)
    check_data_unchanged(folder, found)
    change(folder, found, device="cuda")
    with pytest.raises(DeviceMissing, match="there is no GPU here: give --replica-device cpu"):
        train(folder, found, resume=False, address=None, dashboard=False, console=None)
    steps = step_config(folder.config())
    spec = ReplicasSpec(
        replicas=(0,), model=model_spec(config), steps=steps, decoder=make_decoder(config)
    )
    with pytest.raises(DeviceMissing, match="there is no GPU in a process of replicas: give"):
        actor.ReplicasActor(spec)
