"""One step before Ray starts finds what would end a run later, and says it in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import downpour
from downpour.cluster.config.derive import make_plan, model_spec
from downpour.cluster.errors import UserError
from downpour.cluster.training import api
from downpour.cluster.training.inputs import check_data
from downpour.cluster.training.trial import check_step, next_batch_size, smallest_batch
from downpour.models.errors import ModelError
from downpour.shuffler.plan.plan import Plan
from tests.helpers.tiny import write_split

SIDE, CLASSES = 8, 3
PIXELS = 3 * SIDE * SIDE


class Net(nn.Module):
    """A linear map of the pixels, and then whatever is asked for."""

    def __init__(self, classes: int, answer: str = "plain") -> None:
        super().__init__()
        self.map, self.aux = nn.Linear(PIXELS, classes), nn.Linear(PIXELS, classes)
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        main, aux = self.map(x.flatten(1)), self.aux(x.flatten(1))
        if self.answer == "auxiliary":
            return (main, aux) if self.training else main
        return {
            "plain": main,
            "mapping": {"logits": main, "hidden": x},
            "nameless": {"a": main, "b": main + 1},
            "nothing": None,
            "one": main[:, 0],
            "map": x,
            "infinite": main / 0,
        }[self.answer]


def net(num_classes: int, answer: str = "plain") -> nn.Module:
    return Net(num_classes, answer)


def wide(**ignored: object) -> nn.Module:
    del ignored
    return Net(1000)


def one_row_fails(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(PIXELS, 4), downpour.BatchNorm(4), nn.Linear(4, num_classes)
    )


def fails_on_rgb(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, num_classes))


class Forgetful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(PIXELS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            raise KeyError("only for training")
        out: Tensor = self.map(x.flatten(1))
        return out


def forgetful() -> nn.Module:
    return Forgetful()


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.mse_loss(outputs, targets.float())


def by_row(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="none")


def number(outputs: Tensor, targets: Tensor) -> Any:
    return functional.cross_entropy(outputs, targets).item()


def detached(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets).detach()


def of_mapping(outputs: Any, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs["logits"], targets)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(2)
    for split, count in (("train", 21), ("test", 5)):
        pixels = rng.integers(0, 256, (count, SIDE, SIDE, 3)).astype(np.uint8)
        write_split(folder, split, pixels, rng.integers(0, CLASSES, count), shards=1)
    return str(folder)


def config(data: str, model: str, *, loss: str = "", batch: int = 4, **arguments: object) -> Any:
    return downpour.RunConfig(
        recipe="trial",
        model=downpour.ModelConfig(
            model=f"{__name__}:{model}",
            arguments=arguments,
            loss=f"{__name__}:{loss}" if loss else "cross_entropy",
            image=downpour.ImageSpec(height=SIDE, width=SIDE),
            num_classes=CLASSES,
        ),
        data=downpour.DataConfig(data=data, batch_size=batch),
    )


def attempt(data: str, model: str, **options: Any) -> None:
    chosen = config(data, model, **options)
    check_step(chosen, make_plan(chosen, 21))


class TrainFreezes(nn.Module):
    """Says in its `train` what is trained, as detection networks do."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.bn, self.map = nn.BatchNorm2d(3), nn.Linear(PIXELS, classes)

    def train(self, mode: bool = True) -> TrainFreezes:
        super().train(mode)
        self.bn.eval().requires_grad_(False)
        return self

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.map(self.bn(x).flatten(1))
        return out


def train_freezes(num_classes: int) -> nn.Module:
    return TrainFreezes(num_classes)


class Counting(nn.Module):
    """Counts its forwards."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.map, self.calls = nn.Linear(PIXELS, classes), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.map(x.flatten(1))
        return out


def counting(num_classes: int) -> nn.Module:
    return Counting(num_classes)


def test_what_train_freezes_is_frozen_from_the_start(data: str) -> None:
    attempt(data, "train_freezes")
    layout = model_spec(config(data, "train_freezes")).build_flat().layout
    assert [e.name for e in layout.entries if not e.trained] == ["bn.weight", "bn.bias"]


def test_a_network_that_counts_its_forwards_is_told_of(data: str) -> None:
    chosen = config(data, "counting")
    line = check_step(chosen, make_plan(chosen, 21))
    assert line is not None
    assert line.startswith("'calls' of the network changes with each forward")


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("net", {}),
        ("net", {"answer": "auxiliary"}),
        ("net", {"answer": "mapping"}),
        ("net", {"answer": "mapping", "loss": "of_mapping"}),
        ("net", {"answer": "one", "loss": "squares"}),
        ("one_row_fails", {"batch": 4}),
    ],
)
def test_what_can_be_trained_passes(data: str, model: str, options: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    attempt(data, model, **options)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("wide", {}, "gives 1000 outputs, and there are 3 classes.*--num-classes 1000"),
        ("net", {"answer": "nameless"}, "a mapping with 'a' .*'b'.*call its answer 'logits'"),
        ("net", {"answer": "nothing"}, "gives NoneType"),
        ("net", {"answer": "one"}, r"gives \[3\] for 3 rows.*takes \[3, 3\]"),
        ("net", {"answer": "map"}, r"gives \[3, 3, 8, 8\]"),
        ("net", {"answer": "infinite"}, "is (nan|inf) on the first mini-batches"),
        ("net", {"loss": "by_row"}, r"by_row returns float32 \[3\].*return the mean"),
        ("net", {"loss": "number"}, "number returns float"),
        ("net", {"loss": "detached"}, "does not depend on the weights"),
        (
            "net",
            {"loss": "of_mapping"},
            r"of_mapping fails on outputs float32 \[3, 3\]",
        ),
        ("one_row_fails", {"batch": 1}, "have one row, on which.*give --batch-size 3"),
        (
            "one_row_fails",
            {"batch": 2},
            "21 rows in mini-batches of 2 leave one row",
        ),
        ("fails_on_rgb", {}, r"fails on a mini-batch \[3, 3, 8, 8\].*to have 1 channels"),
        ("forgetful", {}, r"in inference fails .*KeyError: 'only for training' \(.*test_trial.py"),
        ("net", {"depth": 3}, "its arguments are num_classes, answer"),
    ],
)
def test_what_cannot_is_one_line(
    data: str, model: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises((UserError, ModelError), match=words) as caught:
        attempt(data, model, **options)
    assert "\n" not in str(caught.value)


def test_nothing_is_left_and_ray_is_not_started(data: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1000 outputs"):
        api.train(config(data, "wide"), runs=tmp_path / "runs", name="wide")
    assert not (tmp_path / "runs" / "wide").exists()


def test_a_label_out_of_range_anywhere_is_found(data: str) -> None:
    chosen = config(data, "net")
    model = dataclasses.replace(chosen.model, num_classes=2)
    with pytest.raises(ValueError, match="label 2 out of range: row"):
        check_data(dataclasses.replace(chosen, model=model))


@pytest.mark.parametrize(
    ("num_rows", "size", "smallest", "following"),
    [(1001, 2, 1, 3), (1000, 2, 2, 3), (21, 1, 1, 3), (20, 1, 1, 2), (3, 2, 1, 3)],
)
def test_the_smallest_mini_batch(num_rows: int, size: int, smallest: int, following: int) -> None:
    plan = Plan(num_rows=num_rows, batch_size=size)
    rows = [len(plan.rows(0, i)) for i in range(plan.num_batches)]
    assert min(rows) == smallest_batch(plan) == smallest
    if smallest == 1:
        assert next_batch_size(plan) == following
