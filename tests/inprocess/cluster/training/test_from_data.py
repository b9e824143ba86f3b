"""The recipe `classifier` takes from the data what the user has not given."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

import downpour
from downpour.cluster.cli.commands import downpour as command
from downpour.cluster.config import classifier as recipe
from downpour.cluster.errors import UserError, run_cli
from downpour.cluster.training import from_data
from downpour.shuffler.dataset.bundled import BUNDLED_MNIST
from tests.helpers.tiny import write_split

NET = f"{__name__}:net"
TELLS_CHANNELS = f"{__name__}:net_of_channels"


def net(num_classes: int) -> nn.Module:
    return nn.Linear(4, num_classes)


def net_of_channels(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Linear(in_channels, num_classes)


def pictures(folder: Path, *splits: str, side: int = 32, grey: bool = False) -> str:
    rng = np.random.default_rng(5)
    shape = (6, side, side) if grey else (6, side, side, 3)
    for split in splits:
        pixels = rng.integers(0, 256, shape).astype(np.uint8)
        write_split(folder, split, pixels, np.array([0, 4, 2, 1, 3, 0]), shards=1)
    return str(folder)


def test_classes_splits_and_sizes_are_the_datas(tmp_path: Path) -> None:
    data = pictures(tmp_path, "train", "test", "validation")
    config = downpour.classifier(NET, data)
    assert config.model.num_classes == 5
    assert config.data.eval_split == "validation"
    assert config.model.input.input_shape == (3, 32, 32)
    assert config.model.input.fit == "any"
    assert config.data.augment.random_crop
    assert config.data.augment.mirror
    template = recipe.classifier()
    assert (config.server, config.policy) == (template.server, template.policy)


def test_what_is_given_stays(tmp_path: Path) -> None:
    data = pictures(tmp_path, "train", "test", "validation")
    config = downpour.classifier(
        NET,
        data,
        eval_split="test",
        num_classes=9,
        image_size=64,
        mirror=False,
        epochs=2,
        model_arg={"width": 3},
    )
    assert (config.model.num_classes, config.data.eval_split) == (9, "test")
    assert config.model.input.input_shape == (3, 64, 64)
    assert config.data.augment.random_crop
    assert not config.data.augment.mirror
    assert (config.policy.epochs, config.model.arguments) == (2, {"width": 3})


def test_a_run_of_one_epoch_is_long_enough(tmp_path: Path) -> None:
    data = pictures(tmp_path, "train", "test")
    schedule = downpour.classifier(NET, data, epochs=1).server.schedule.over(1)
    assert schedule.rate(500, 1000) == schedule.learning_rate > schedule.rate(250, 1000) > 0


def test_grey_pictures_are_not_mirrored_and_in_the_channels_that_the_network_takes(
    tmp_path: Path,
) -> None:
    data = pictures(tmp_path, "train", "dev", side=28, grey=True)
    told = list[str]()
    given = {"model": NET, "data": data}
    begun = from_data.apply(recipe.classifier(), given)
    config = from_data.complete(begun, given, told.append)
    assert config.model.input.input_shape == (3, 28, 28)
    assert not config.data.augment.mirror
    assert not config.data.augment.random_crop
    assert "as RGB" in told[0]
    assert downpour.classifier(TELLS_CHANNELS, data).model.input.channels == 1


def test_binary_pictures() -> None:
    config = downpour.classifier(TELLS_CHANNELS, BUNDLED_MNIST)
    image = config.model.input
    assert (image.input_shape, image.binary_threshold) == ((1, 28, 28), 127)
    assert (config.model.num_classes, config.data.eval_split) == (10, "test")
    assert config.data.augment.changes_nothing


def test_pictures_of_many_sizes_are_cut(tmp_path: Path) -> None:
    pictures(tmp_path, "test")
    data = pictures(tmp_path, "train", side=40)
    wide = io.BytesIO()
    Image.new("RGB", (60, 40)).save(wide, "PNG")
    mixed = np.zeros((2, 30, 50, 3), np.uint8)
    write_split(tmp_path, "train", mixed, np.array([0, 1]), shards=1)
    assert downpour.classifier(NET, data).model.input.input_shape == (3, 224, 224)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "{data}"], "name it with --model"),
        (["--model", NET], "give --data"),
        (["--model", NET, "--data", "{data}"], "has no split but 'train'"),
        (["--model", NET, "--data", "{data}", "--model-arg", "depth"], "is no name=value"),
        (["--model", "mien:net", "--data", "{data}", "--eval-split", "train"], "mien"),
    ],
)
def test_what_is_missing_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    data = pictures(tmp_path, "train", grey=True)
    line = ["train", "classifier", *(a.format(data=data) for a in arguments)]
    assert run_cli(command, line) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert words in error[0]


def test_a_setting_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'epoch'; did you mean epochs"):
        downpour.classifier(NET, str(tmp_path), epoch=3)


def test_the_help_shows_what_comes_from_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(command, ["train", "classifier", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "[default: the data's]" in text
    assert "[default: 0.008]" in text
