"""Every benchmark runs to its end in small, gives whole JSON, and leaves nothing behind.

They start several Rays or systems of others, which makes them tests for the soak.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from downpour.benchmarks.policies import POLICIES
from tests.helpers import commands

pytestmark = [pytest.mark.ray, pytest.mark.soak, pytest.mark.timeout(480)]


def bench(*arguments: str, tmp_path: Path) -> dict[str, Any]:
    """What `downpour bench ... --quick --json` prints."""
    with (tmp_path / "log").open("wb") as log:
        done = subprocess.run(
            [sys.executable, "-m", "downpour", "bench", *arguments, "--quick", "--json"],
            cwd=commands.ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            timeout=commands.DEADLINE_S,
            check=False,
        )
    assert done.returncode == 0, (tmp_path / "log").read_text()
    record: dict[str, Any] = json.loads(done.stdout)
    assert record["benchmark"] == arguments[0]
    assert {"command", "date", "machine", "settings", "configuration", "rounds"} <= set(record)
    assert record["machine"]["processors"] >= 1
    assert len(record["rounds"]) == 1
    return record


def test_peers(tmp_path: Path) -> None:
    chosen = ("rpc", "ddp")  # the system itself is measured below, and Ray's server much alike
    options = [word for name in chosen for word in ("--only", name)]
    result = bench("peers", *options, tmp_path=tmp_path)["result"]
    assert set(result) == {"plain", *chosen}
    for found in result.values():
        assert found["updates_per_s"] > 0
        assert found["ratio_to_plain"] > 0
    assert result["plain"]["ratio_to_plain"] == 1
    assert result["plain"]["cpu_ms_per_update"] > 0


def test_replicas(tmp_path: Path) -> None:
    record = bench("replicas", tmp_path=tmp_path)
    (found,) = record["result"]["mnist"].values()
    assert found["updates_per_s"] > 0
    assert found["cpu_ms_per_update"] > 0
    (measured,) = record["rounds"][0]["mnist"].values()
    assert {"replicas", "partitions", "driver", "ray"} <= set(measured["cpu_ms_by_role"])
    assert measured["staleness_mean"] > 0


def test_inception(tmp_path: Path) -> None:
    (found,) = bench("inception", tmp_path=tmp_path)["result"].values()
    assert found["10 x 5, float32"]["images_per_s"] > 0
    assert found["plain loops, float32"]["ratio_to_plain"] == 1
    assert found["floor"]["float32"]["move_ms"] > 0


@pytest.mark.parametrize("chosen", [("ddp", "rpc"), ("ray",), ("downpour",)])
def test_learning(chosen: tuple[str, ...], tmp_path: Path) -> None:
    options = [word for name in chosen for word in ("--only", name)]
    record = bench("learning", *options, tmp_path=tmp_path)
    assert set(record["result"]) == {"plain", "plain-averaged", *chosen}
    for name, found in record["result"].items():
        (curve,) = [round_[name] for round_ in record["rounds"]]
        assert found["best_accuracy"] > 0.3, name
        assert found["goals"]["0.3"]["arrived"] == 1
        assert found["goals"]["0.3"]["training_s"] > 0
        assert curve["startup_s"] > 0
        examples = [look["examples"] for look in curve["looks"]]
        assert examples[0] > 0
        assert examples == sorted(examples)
    assert record["result"]["plain"]["goals"]["0.3"]["ratio_to_plain"] == 1
    assert record["result"]["plain-averaged"]["goals"]["0.3"]["ratio_to_averaged"] == 1


def test_startup(tmp_path: Path) -> None:
    result = bench("startup", tmp_path=tmp_path)["result"]
    assert result["ray_init_and_actor_s"] > 0
    assert result["time_to_first_update_multiple"] > 0
    assert result["time_to_all_replicas_multiple"] > 0


def test_push_pull(tmp_path: Path) -> None:
    result = bench("push-pull", "--only", "0.4", tmp_path=tmp_path)["result"]["0.4"]
    assert all(value > 0 for value in result["ms"].values())
    assert result["floor"]["ratio"] == result["ms"]["echo"] / result["floor"]["ms"]


def test_shuffle(tmp_path: Path) -> None:
    parts = ("rows", "small", "pairs", "memory")  # "images" is "small" with larger ones
    options = [word for name in parts for word in ("--only", name)]
    result = bench("shuffle", *options, tmp_path=tmp_path)["result"]
    assert result["rows"]["ratio_to_ray_data"] > 0
    assert result["small"]["ratio_to_torch_dataloader"] > 0
    assert result["small"]["ratio_to_plain_loop_per_core"] > 0
    assert result["pairs_cifar10"]["repeats"] == 0
    assert result["planning"]["peak_mb"] < 10
    assert result["resume_cifar10"]["first_batch_ms"] > 0
    assert result["resume_many"]["rows"] == 20_000
    assert result["resident_1x"]["complete"]
    assert result["resident_4x"]["complete"]


def test_policies(tmp_path: Path) -> None:
    (result,) = bench("policies", tmp_path=tmp_path)["result"].values()
    assert set(result) == set(POLICIES)
    assert all(ms > 0 for ms in result.values())


def test_simulate(tmp_path: Path) -> None:
    record = bench("simulate", tmp_path=tmp_path)
    assert record["rounds"][0]["2"]["measured"]["step_s"] > 0
    # A machine that does other things meanwhile is no measure; nonsense is another matter.
    for key in ("updates_per_s", "staleness_mean"):
        assert 0.3 < record["result"]["2"][key]["predicted_ratio"] < 3


def test_recovery(tmp_path: Path) -> None:
    result = bench("recovery", "--only", "hot", tmp_path=tmp_path)["result"]
    assert result["actor_s"] > 0
    assert result["hot"]["spare_memory_mb"] > 0
    assert result["hot"]["updates_lost"] == 0
    for kind in ("replicas", "partition"):
        assert result["hot"][kind]["rate_before"] > 0


def test_one_that_is_stopped_leaves_no_process(tmp_path: Path) -> None:
    process = commands.start("bench", "replicas", "--quick", log=tmp_path / "log")
    try:
        commands.wait_for(
            lambda: any("gcs_server" in c for c in commands.descendants(process.pid).values()),
            "Ray",
        )
        family = set(commands.descendants(process.pid))
        process.send_signal(signal.SIGTERM)
        assert process.wait(commands.DEADLINE_S) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert not commands.alive(family)
    assert "Traceback" not in (tmp_path / "log").read_text()
