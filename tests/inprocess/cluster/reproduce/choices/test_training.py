"""Section 4.1's open choices at a small size: trained, gone on with, and reported."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from downpour.cluster.cli.commands import downpour
from downpour.cluster.errors import run_cli
from downpour.cluster.reproduce.choices import training as choices_training
from downpour.cluster.reproduce.choices.choice import CHOICES, ChoicesConfig
from downpour.cluster.reproduce.choices.page import summary
from downpour.cluster.reproduce.choices.training import NetRecord
from downpour.cluster.reproduce.mnist import experiment as mnist
from downpour.cluster.reproduce.mnist.experiment import MnistConfig, train

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images that can be told apart, in place of MNIST's."""
    generator = torch.Generator().manual_seed(3)
    likely = torch.rand(10, 784, generator=generator)

    def drawn(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(10, (count,), generator=generator)
        noise = torch.rand(count, 784, generator=generator)
        return (noise < 0.3 + 0.4 * likely[labels]).float(), labels

    splits = {"train": drawn(1200), "test": drawn(500)}
    for module in (choices_training, mnist):
        monkeypatch.setattr(module, "read_split", lambda _data, split, *_spec: splits[split])


def test_the_default_is_the_net_of_figure_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["reproduce", "mnist-choices", "--steps", "40", "--record-every", "20"]
    arguments += ["--seeds", "1", "--output", str(tmp_path / "choices")]
    some = [*arguments, "--only", "default", "--only", "without-bn"]
    assert run_cli(downpour, some) == 0
    data = json.loads((tmp_path / "choices" / "data.json").read_text())
    assert (tmp_path / "choices" / "choices.png").read_bytes().startswith(b"\x89PNG")
    nets = {net["choice"]: net for net in data["nets"]}
    figure_1 = train(
        MnistConfig(steps=40, record_every=20), tmp_path / "figure-1", show=lambda *_: None
    )
    for name, variant in (("default", "with BN"), ("without-bn", "without BN")):
        expected = figure_1[variant].accuracy[1:]
        assert nets[name]["looks"] == pytest.approx(expected, abs=0.005), "but for rounding"
        assert nets[name]["moving"] == nets[name]["looks"][-1]
    assert nets["default"]["looks"][-1] > 0.5
    assert nets["without-bn"]["population"] == nets["without-bn"]["moving"]
    # What is trained is not trained again, and what is of other options is not taken for it.
    monkeypatch.setattr(choices_training, "_train_group", None)
    assert run_cli(downpour, some) == 0
    capsys.readouterr()
    assert run_cli(downpour, [*some, "--batch-size", "30"]) == 2
    assert "of another experiment (batch_size=60)" in capsys.readouterr().err
    assert run_cli(downpour, [*some, "--steps", "41"]) == 2
    assert "record every is 20: give a divisor" in capsys.readouterr().err
    assert run_cli(downpour, [*arguments, "--only", "grey"]) == 2
    assert "grey needs MNIST's grey images" in capsys.readouterr().err


class Stopped(Exception):
    """What stands for an interrupt."""


def test_stopped_and_gone_on_with_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices_training, "SAVE_EVERY", 8)
    config = ChoicesConfig(
        only=("momentum", "bn-after"), seeds=1, steps=24, record_every=4, batch_size=30
    )
    whole = choices_training.train(config, tmp_path / "whole", show=lambda *_: None)

    def stop(done: int, _total: int) -> None:
        if done >= 2 * 20:
            raise Stopped

    with pytest.raises(Stopped):
        choices_training.train(config, tmp_path / "pieces", show=stop)
    told: list[int] = []
    pieces = choices_training.train(
        config, tmp_path / "pieces", show=lambda done, _total: told.append(done)
    )
    assert told[0] == 2 * 20, "16 steps had been saved"
    assert not list((tmp_path / "pieces").glob("*.safetensors"))
    for one, other in zip(whole, pieces, strict=True):
        assert dataclasses.replace(one, seconds=0) == dataclasses.replace(other, seconds=0)


def test_what_is_left_out_without_grey_images() -> None:
    config = ChoicesConfig()
    assert {choice.name for choice in config.left_out} == {"any-ink", "grey"}
    assert len(config.chosen) + 2 == len(CHOICES)
    assert ChoicesConfig(grey="somewhere").left_out == ()
    with pytest.raises(ValueError, match="choose of default, "):
        ChoicesConfig(only=("no-such",))


def test_groups_keep_places_of_bn_together() -> None:
    groups = list(choices_training._groups(CHOICES))
    assert sorted(c.name for group in groups for c in group) == sorted(c.name for c in CHOICES)
    for group in groups:
        assert len(group) <= choices_training.TOGETHER
        places = [choice.normalized for choice in group]
        assert places == sorted(places)


def test_the_summary_by_hand() -> None:
    config = ChoicesConfig(only=("default",), seeds=2)
    records = [
        NetRecord(
            choice="default",
            seed=seed,
            looks=(0.9, 0.95 + seed / 100, 0.94),
            moving=0.94,
            population=0.97 + seed / 50,
            by_batch=0.9,
            training=1.0,
            seconds=1.0,
        )
        for seed in (0, 1)
    ]
    (row,) = summary(config, records)
    assert row["best_look"]["nets"] == [0.95, 0.96]
    assert row["population"]["mean"] == pytest.approx(0.98)
    assert row["population"]["deviation"] == pytest.approx(0.02 / 2**0.5)
