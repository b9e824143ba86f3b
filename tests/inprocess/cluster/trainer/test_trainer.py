"""`downpour.Trainer`: what it makes of its arguments; training is played."""

from __future__ import annotations

import dataclasses
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import downpour
from downpour.cluster.config.run import RunConfig
from downpour.cluster.monitoring.observation import Handle
from downpour.cluster.run.folder import INITIAL, RESULT, STATUS, RunFolder
from downpour.cluster.training import inputs, launch
from downpour.models import by_value
from tests.helpers import tiny


class Played:
    """Stands in for `launch.train`; tells onlookers of an evaluation."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.error: BaseException | None = None
        self.finishes: list[str] = []
        self.told: list[str] = []

    def __call__(self, folder: RunFolder, data: Any, *, onlookers: Any, **options: Any) -> int:
        self.calls.append({"folder": folder, "config": folder.config(), **options})
        handle = Handle(
            folder=folder.path,
            config=folder.config(),
            finish=self.finishes.append,
            tell=self.told.append,
        )
        for sink in [onlooker(handle) for onlooker in onlookers]:
            sink.evaluated({"accuracy": 0.5, "updates": 3})
        if self.error is not None:
            folder.write_json(STATUS, {"state": "stopped", "reason": "SIGTERM"})
            if not isinstance(self.error, downpour.RunStopped):
                raise self.error
            return 143
        folder.write_json(RESULT, {"accuracy": 0.5, "reached": {}, "exactly_once": True})
        return 0


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    played = Played()
    monkeypatch.setattr(launch, "train", played)
    return played


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny.config(tiny.dataset(tmp_path_factory.mktemp("data")))


class Net(nn.Module):
    """As a user's: it has layers of its own, and names what it takes."""

    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Linear(tiny.SIDE**2, width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        y: torch.Tensor = self.head(torch.relu(self.body(x)))
        return y


def test_a_run_has_the_configuration_with_everything_that_overrides_it(
    tmp_path: Path, config: RunConfig, played: Played
) -> None:
    trainer = downpour.Trainer(
        model=lambda num_classes: Net(num_classes),
        loss=nn.CrossEntropyLoss(label_smoothing=0.1),
        config=config,
        scaling=downpour.ScalingConfig(num_workers=3),
        runs=tmp_path,
        epochs=7,
        learning_rate=np.float64(0.25),
        patience="none",
        seed=np.int64(4),
    )
    result = trainer.fit()
    found = played.calls[0]["config"]
    assert found == trainer.config
    assert (found.policy.epochs, found.policy.patience, found.policy.seed) == (7, None, 4)
    assert found.server.schedule.learning_rate == 0.25
    assert found.replicas.replicas == 3
    assert found.model.arguments == {}, "the recipe's arguments are for the recipe's network"
    assert found.model.image == config.model.image
    assert set(found.model.carried) == {found.model.model, found.model.loss}
    assert all(map(by_value.is_by_value, found.model.carried))
    assert result.path.parent == tmp_path
    assert (result.accuracy, result.exactly_once, result.reached) == (0.5, True, {})
    assert trainer.fit().path != result.path, "each fit is a run of its own"


def test_without_a_configuration_the_data_says_the_rest(
    tmp_path: Path, config: RunConfig, played: Played
) -> None:
    found = downpour.Trainer(model=Net, data=config.data.data, runs=tmp_path, epochs=2).config
    assert found.recipe == "Net"
    assert (found.model.num_classes, found.data.eval_split) == (tiny.CLASSES, "test")
    assert (found.model.image.height, found.model.image.width) == (tiny.SIDE, tiny.SIDE)
    assert found.policy.epochs == 2
    chosen = downpour.Trainer(
        model=lambda num_classes, in_chans: Net(num_classes * in_chans),
        data=downpour.DataConfig(data=config.data.data, eval_split="train"),
        num_classes=5,
    ).config
    assert (chosen.model.num_classes, chosen.data.eval_split) == (5, "train")
    assert chosen.model.image.channels == 1


def test_a_factory_gets_its_arguments_and_the_rest_stays_as_configured(
    tmp_path: Path, config: RunConfig, played: Played
) -> None:
    data = dataclasses.replace(config.data, batch_size=8)
    trainer = downpour.Trainer(
        model=Net, arguments={"width": 5}, config=config, data=data, runs=tmp_path, name="mine"
    )
    assert trainer.config.data == data
    assert trainer.config.model.model == f"{__name__}:Net"
    assert trainer.fit().path == tmp_path / "mine"
    assert inputs.build_model(trainer.config).num_parameters == 64 * 5 + 5 + 5 * 4 + 4
    plain = downpour.Trainer(config="mnist-bn", data=tmp_path)
    assert plain.config.data.data == str(tmp_path)
    assert plain.config.model.arguments == {"batch_norm": True}


def test_a_modules_weights_are_the_initial_ones(
    tmp_path: Path, config: RunConfig, played: Played
) -> None:
    net = nn.Sequential(nn.Linear(tiny.SIDE**2, 8), downpour.BatchNorm(8), nn.Linear(8, 4))
    net[1].running_mean += 3  # type: ignore[union-attr, operator]
    folder = downpour.Trainer(model=net, config=config, runs=tmp_path).fit().path
    kept = safetensors.torch.load_file(folder / INITIAL)
    floats = {k: v for k, v in net.state_dict().items() if v.is_floating_point()}
    assert all(torch.equal(kept[name], tensor) for name, tensor in floats.items())
    run = RunFolder.open(folder)
    found = torch.from_numpy(inputs.build_model(run.config(), run.initial).weights)
    own = {float(p.detach().sum()) for p in net.parameters()}
    parts = run.config().model
    assert len(found) == sum(p.numel() for p in net.parameters())
    assert parts.model.startswith("by-value:Sequential.")
    assert abs(float(found.sum()) - sum(own)) < 1e-4
    assert not (downpour.Trainer(config=config, runs=tmp_path).fit().path / INITIAL).exists()


class Seen(downpour.callbacks.Callback):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_start(self, run: Any) -> None:
        self.events.append(("start", run.name, run.config.recipe))

    def on_evaluation(self, run: Any, metrics: Any) -> None:
        self.events.append(("evaluation", metrics["accuracy"]))
        run.finish("enough")

    def on_end(self, run: Any, result: Any) -> None:
        self.events.append(("end", result and result.path, run.error))


def test_callbacks_hear_of_the_run_in_the_thread_that_called(
    tmp_path: Path, config: RunConfig, played: Played
) -> None:
    seen = Seen()
    trainer = downpour.Trainer(config=config, runs=tmp_path, name="a", callbacks=[seen])
    thread = threading.Thread(target=trainer.fit)
    thread.start()
    thread.join()
    assert seen.events == [
        ("start", "a", "tiny"),
        ("evaluation", 0.5),
        ("end", tmp_path / "a", None),
    ]
    assert played.finishes == ["enough"]
    played.error = downpour.RunStopped()
    with pytest.raises(downpour.RunStopped, match=r"SIGTERM.*downpour\.resume\('"):
        trainer.with_settings(name="b").fit()
    assert seen.events[-1][:2] == ("end", None)
    assert "was stopped by SIGTERM" in seen.events[-1][2]
    played.error = None
    assert trainer.resume(tmp_path / "b").path == tmp_path / "b"
    assert played.calls[-1]["resume"] is True


def test_an_error_of_the_users_is_a_user_error_whatever_raised_it(
    tmp_path: Path, config: RunConfig, played: Played
) -> None:
    with pytest.raises(downpour.UserError, match=r"/none") as caught:
        downpour.Trainer(config=config, data=tmp_path / "none", runs=tmp_path / "runs").fit()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()
    played.error = ValueError("a defect")
    with pytest.raises(ValueError, match="a defect"):
        downpour.Trainer(config=config, runs=tmp_path / "runs").fit()


class Misspelt:
    def on_evaluate(self, run: Any, metrics: Any) -> None: ...


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"config": None}, "there is no network to train: give model=, or config="),
        ({"config": None, "model": Net}, "there is no data to train on: give data="),
        ({"model": nn.Linear(2, 2), "init": "a.safetensors"}, "init is a.safetensors, and model"),
        ({"config": 3}, "config is 3: give a downpour.RunConfig"),
        ({"model_arg": {"width": 3}}, "give arguments={...}"),
        ({"config": "mnist_bn"}, "did you mean mnist-bn"),
        ({"epoch": 3}, "there is no setting 'epoch': did you mean epochs"),
        ({"scaling_config": 3}, "there is no setting 'scaling_config': give scaling="),
        ({"lr": 0.1}, "there is no setting 'lr': give learning_rate="),
        ({"epochs": "three"}, "epochs is 'three': 'three' is not a valid integer"),
        ({"epochs": 2.5}, "epochs is 2.5: give an integer"),
        ({"epochs": None}, "epochs is None: give a value"),
        ({"epochs": True}, "epochs is True: give a value of another type"),
        ({"epochs": 0}, "--epochs 0: epochs is 0: give at least 1"),
        ({"epochs": [1, 2]}, "epochs is"),
        ({"hot_standby": 1}, "hot_standby is 1: give True or False"),
        ({"rule": "adamm"}, "rule is 'adamm'"),
        ({"data": 3}, "data is 3: give a folder or URI"),
        ({"model": 3}, "model is 3: give a torch.nn.Module"),
        ({"scaling": 3}, "scaling is 3: give a downpour.ScalingConfig"),
        ({"callbacks": Seen()}, "give a list of them"),
        ({"callbacks": [Seen]}, r"Seen is a class: give an instance, Seen\(\)"),
        ({"callbacks": [3]}, "has none of on_start"),
        ({"callbacks": [Misspelt()]}, "has on_evaluate, which nothing calls: did you mean on_eva"),
    ],
)
def test_a_wrong_argument_is_a_line_before_anything_is_done(
    tmp_path: Path, config: RunConfig, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(downpour.UserError, match=words) as caught:
        downpour.Trainer(**{"config": config, "runs": tmp_path / "runs", **given})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_ray_trains_scaling_is_understood_or_refused(config: RunConfig) -> None:
    def rays(**values: Any) -> Any:
        kind = type("ScalingConfig", (types.SimpleNamespace,), {})
        return kind(**{"num_workers": 2, "use_gpu": False, **values})

    assert downpour.Trainer(config=config, scaling=rays()).config.replicas.replicas == 2
    with pytest.raises(downpour.UserError, match="scaling has resources_per_worker"):
        downpour.Trainer(config=config, scaling=rays(resources_per_worker={"CPU": 2}))
    with pytest.raises(downpour.UserError, match="num_workers is 0: give at least 1"):
        downpour.ScalingConfig(num_workers=0)
    on_gpus = downpour.Trainer(config=config, scaling=rays(use_gpu=True)).config
    assert on_gpus.replicas.steps.device == "cuda"
