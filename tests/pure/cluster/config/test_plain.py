"""Configurations as JSON: what is written comes back, and so do files of older versions."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from downpour.cluster.config import recipes
from downpour.cluster.config.options import apply
from downpour.cluster.config.plain import from_plain, to_plain
from downpour.cluster.config.policy import PolicyConfig
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.cluster.run.folder import CONFIG, RunFolder
from downpour.paramserver.config import ServerConfig

OLD = Path(__file__).with_name("config_before_rooms.json")
"""Written by the code from when each package was one flat folder."""


def test_json_and_back() -> None:
    config = dataclasses.replace(
        recipes.find("mnist-bn"),
        server=ServerConfig(rule="adagrad", clip_norm=None),
        policy=PolicyConfig(max_refused=None),
    )
    assert from_plain(RunConfig, to_plain(config)) == config


def test_a_configuration_of_before_the_rooms_is_the_same_run(tmp_path: Path) -> None:
    given = {
        "partitions": 3,
        "staleness_policy": "bounded",
        "staleness_bound": 64,
        "clip_norm": 5.0,
        "transport": "network",
        "wire_dtype": "bfloat16",
        "warm_start_epochs": 0.5,
        "node_folder": "/data/{node}",
        "partitions_on": "disk=fast",
        "max_refused": None,
        "in_flight": "all",  # which is how it trained
        "steps_together": None,
        "past_bound": "error",
        "data": str(Path("data/imagenet").absolute()),  # the paths are as they are from here
    }
    shutil.copy(OLD, tmp_path / CONFIG)
    config = RunFolder.open(tmp_path).config()
    as_stored = {"orientation": "ignore", "transparency": "drop"}  # which is how it saw images
    begun = recipes.find("bn-x5")
    image = dataclasses.replace(begun.model.image, **as_stored)  # type: ignore[arg-type]
    begun = dataclasses.replace(begun, model=dataclasses.replace(begun.model, image=image))
    data = dataclasses.replace(
        begun.data, plan_version=1
    )  # which is how its rows were put together
    begun = dataclasses.replace(begun, data=data)
    assert config == apply(begun, given)
    assert (config.model.input.orientation, config.model.input.transparency) == ("ignore", "drop")
    following = apply(config, {"orientation": "follow"})
    assert following.model.input.orientation == "follow"


def test_what_an_old_configuration_lacks_has_its_default() -> None:
    plain = json.loads(OLD.read_text())
    del plain["placement"], plain["policy"]["max_refused"], plain["server"]["network"]["encrypt"]
    config = from_plain(RunConfig, plain)
    assert config.policy.max_refused == PolicyConfig().max_refused
    assert config.server.network.encrypt


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("colour",), "blue", "has colour, which this version does not know"),
        (("server", "colour"), "blue", "has colour, which this version does not know"),
        (("policy", "epochs"), 0, "is not usable: epochs is 0: give at least 1"),
        (("replicas", "steps", "n_push"), 2, "is not usable: staleness policy is bounded"),
    ],
)
def test_what_cannot_be_used_is_a_line(path: tuple[str, ...], value: object, words: str) -> None:
    plain = json.loads(OLD.read_text())
    inner = plain
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    with pytest.raises(UserError, match=words) as caught:
        from_plain(RunConfig, plain)
    assert "\n" not in str(caught.value)
