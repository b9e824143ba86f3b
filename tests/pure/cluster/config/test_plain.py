"""Configurations as JSON: what is written comes back, and so do files of older versions."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from downpour.cluster.config import recipes
from downpour.cluster.config.options import apply
from downpour.cluster.config.plain import from_plain, to_plain, upgraded
from downpour.cluster.config.policy import PolicyConfig
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.cluster.run.folder import CONFIG, RunFolder
from downpour.paramserver.config import ServerConfig
from downpour.paramserver.rules.schedule import Schedule

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
        "wire": "bfloat16",
        "warm_start_epochs": 0.5,
        "node_folder": "/data/{node}",
        "partitions_on": "disk=fast",
        "max_refused": None,
        "in_flight": "all",  # which is how it trained
        "steps_together": None,
        "spares": "none",
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
    config = from_plain(RunConfig, upgraded(plain))
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
        from_plain(RunConfig, upgraded(plain))
    assert "\n" not in str(caught.value)


class Halving(Schedule):
    """A schedule without fields of its own."""

    def rate(self, examples: int, epoch_examples: int) -> float:
        return super().rate(examples, epoch_examples) * 0.5 ** (examples // epoch_examples)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stepping(Schedule):
    """A schedule with one."""

    every: int = 2


class Remembering(Schedule):
    """A schedule with a value that is no field."""

    def __init__(self) -> None:
        super().__init__(learning_rate=0.1)
        object.__setattr__(self, "steps", 3)


def with_schedule(schedule: Schedule) -> RunConfig:
    config = recipes.find("mnist")
    return dataclasses.replace(config, server=dataclasses.replace(config.server, schedule=schedule))


@pytest.mark.parametrize("schedule", [Halving(learning_rate=0.3), Stepping(every=5)])
def test_a_class_of_the_users_own_is_kept(schedule: Schedule) -> None:
    config = with_schedule(schedule)
    saved = json.loads(json.dumps(to_plain(config)))
    found = from_plain(RunConfig, saved)
    assert found == config
    assert type(found.server.schedule) is type(schedule)
    rates = found.server.schedule.over(3).rates(100)
    assert [rates(n) for n in (0, 100, 250)] == [schedule.rate(n, 100) for n in (0, 100, 250)]


def test_what_cannot_be_kept_is_refused() -> None:
    with pytest.raises(UserError, match="Remembering keeps steps, which is no field"):
        to_plain(with_schedule(Remembering()))

    class Local(Schedule):
        pass

    with pytest.raises(UserError, match=r"<locals>.Local.*put it into a module"):
        to_plain(with_schedule(Local()))


@pytest.mark.parametrize("name", ["no_such_module:Halving", f"{__name__}:Nothing", "json:loads"])
def test_a_class_that_is_gone_is_named(name: str) -> None:
    saved = to_plain(with_schedule(Halving()))
    saved["server"]["schedule"]["class"] = name
    with pytest.raises(UserError, match=name):
        from_plain(RunConfig, saved)
