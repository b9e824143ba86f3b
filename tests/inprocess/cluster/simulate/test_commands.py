"""`downpour simulate`, as it is typed."""

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from downpour.cluster.cli.commands import downpour
from downpour.cluster.config import recipes
from downpour.cluster.run.folder import METRICS, RESOLVED, RunFolder
from downpour.shuffler.dataset.bundled import BUNDLED_MNIST
from tests.helpers import tiny
from tests.pure.cluster.simulate.test_likeness import line


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(downpour, ["simulate", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_recipe_with_costs_that_are_given(tmp_path: Path) -> None:
    picture = tmp_path / "staleness.png"
    costs = ("--step-ms", "1", "--apply-ms", "0.2", "--processors", "4", "--in-flight", "all")
    plain = json.loads(invoke("mnist-bn", *costs, "--json", "--plot", str(picture)))
    assert plain["replicas"] == 10
    assert plain["processes"] == 4
    # 4 processors, a step and a push of an update.
    assert plain["updates_per_s"] == pytest.approx(4 / 1.2e-3, rel=0.05)
    assert plain["staleness"]["mean"] > 49
    counts = [count for _, count in plain["staleness"]["histogram"]]
    assert sum(counts) == pytest.approx(plain["updates"], abs=50)
    assert picture.stat().st_size > 0
    table = invoke("mnist-bn", *costs, "--replicas", "2")
    assert "2 replicas x 5 steps, 2 processes, 1 partition" in table


def test_a_run_like_another(tmp_path: Path) -> None:
    recipe = recipes.find("mnist-bn")
    policy = dataclasses.replace(recipe.policy, evaluation_share=0.02)
    folder = RunFolder.create(tmp_path / "measured", dataclasses.replace(recipe, policy=policy))
    rows = "".join(json.dumps(line(s)) + "\n" for s in range(12))
    (folder.path / METRICS).write_text(rows)
    assert str(BUNDLED_MNIST) == folder.config().data.data
    run, every_step = str(folder.path), ("--processors", "2", "--in-flight", "all")
    plain = json.loads(invoke("--like", run, *every_step, "--json"))
    assert plain["like"]["step_s"] == pytest.approx(0.004)
    # 4 ms of a step, 5 ms beside it (one thread computes a step), 2 ms of a push, 1 ms of reading;
    # of 2 processors 0.25 are taken and scoring has a little.
    assert plain["updates_per_s"] == pytest.approx((2 - 0.25) / 12e-3, rel=0.05)
    assert "run it is like" in invoke("--like", run)
    folder.write_json(RESOLVED, {"partitions": 3})
    assert json.loads(invoke("--like", run, *every_step, "--json"))["partitions"] == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name a recipe or a run with --like"),
        (("mnist-bn",), "--step-ms and --apply-ms"),
        (("mnist-bn", "--replicas", "0"), "--replicas 0"),
        (("mnist-bn", "--slow-share", "2"), "give a number from 0 to 1"),
        (("--like", "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_simulated_is_one_line(arguments: tuple[str, ...], said: str) -> None:
    from downpour.cluster.errors import UserError

    with pytest.raises(UserError) as caught:
        CliRunner().invoke(downpour, ["simulate", *arguments], catch_exceptions=False)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


RECIPE = """
import dataclasses
from tests.helpers import tiny
def small():
    return dataclasses.replace(tiny.config({data!r}, epochs=1), recipe="virtual_recipe:small")
"""
"""A recipe of the user's own."""


def test_settings_that_learn_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny.dataset(tmp_path / "data")
    (tmp_path / "virtual_recipe.py").write_text(RECIPE.format(data=data))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    costs = ("--step-ms", "10", "--apply-ms", "1", "--processors", "4", "--partitions", "1")
    learn = ("--learn", "--until", "epochs", "--goal", "0.5,0.999", "--score-every-epochs", "0.5")
    compare = ("--compare", "asynchronous,synchronous:6@0.1", "--speed-spread", "4")
    picture = tmp_path / "accuracy.png"
    everything = ("virtual_recipe:small", *costs, *learn, *compare)
    found = json.loads(invoke(*everything, "--json", "--plot", str(picture)))
    assert [curve["setting"] for curve in found] == ["asynchronous", "synchronous:6@0.1"]
    for curve in found:
        assert curve["finished"]
        assert curve["batches_applied"] == 67
        reached, missed = curve["goals"]
        first = next(p for p in curve["scorings"] if p["accuracy"] >= 0.5)
        assert reached["seconds"] == first["seconds"]
        assert missed["seconds"] is None
    assert found[0]["staleness"]["mean"] > 0
    assert found[1]["staleness"]["max"] == 0
    assert picture.stat().st_size > 0
    table = invoke(*everything)
    assert "synchronous:6@0.1" in table
    assert "never" in table


def test_options_of_learning_need_it() -> None:
    from downpour.cluster.errors import UserError

    with pytest.raises(UserError, match="--score-every-epochs is of a run that learns"):
        invoke("mnist-bn", "--score-every-epochs", "1")
