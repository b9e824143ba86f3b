"""What is told of a run, and how it is watched and stopped through its folder."""

from __future__ import annotations

import html.parser
import re
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console

from downpour.cluster.config import recipes
from downpour.cluster.config.paths import ROOT
from downpour.cluster.errors import UserError
from downpour.cluster.monitoring import dashboard
from downpour.cluster.monitoring.html_report import write_report
from downpour.cluster.monitoring.observation import Leases, Observation
from downpour.cluster.monitoring.prometheus import METRICS, Metric, PrometheusSink, cumulative
from downpour.cluster.monitoring.tensorboard import TensorBoardSink
from downpour.cluster.monitoring.watch import end, progress, stop, watch
from downpour.cluster.run.folder import RunFolder
from downpour.shuffler.delivery import Reading

ALERTS = ROOT / "cluster" / "monitoring" / "alerts.yaml"
VALUES = {
    "elapsed_s": 3.0,
    "updates": 100,
    "examples": 3200,
    "epoch": 0.05,
    "updates_per_s": 50.0,
    "learning_rate": 0.1,
    "staleness_mean": 4.0,
    "staleness_p99": 9.0,
    "replicas_alive": 2,
    "duplicates": 0,
    "refused": 0,
    "loss": 1.5,
}


def queries() -> list[str]:
    """Every expression of the dashboard and of the alerts."""
    panels = dashboard.dashboard()["panels"]
    rules = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    shown = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    return shown + [rule["expr"] for rule in rules]


def test_the_dashboards_file_is_the_dashboard() -> None:
    assert dashboard.FILE.read_text() == dashboard.text(), (
        "run `python -m downpour.cluster.monitoring.dashboard`"
    )


def test_the_dashboard_is_well_formed() -> None:
    board = dashboard.dashboard()
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        columns, rows = range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])
        cells = {(x, y) for x in columns for y in rows}
        assert not cells & places, f"{panel['title']} lies over another panel"
        places |= cells
        for target in panel.get("targets", ()):
            assert "$run" in target["expr"]
            assert target["datasource"] == dashboard.DATASOURCE
    assert {v["name"] for v in board["templating"]["list"]} == {"datasource", "run"}


def test_queries_ask_for_metrics_that_there_are() -> None:
    suffixes = {"gauge": [""], "counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    names = {
        f"ray_{name}{suffix}": {"run", "le", *metric.tags}
        for name, metric in METRICS.items()
        for suffix in suffixes[metric.kind]
    }
    asked = set()
    for query in queries():
        found = re.findall(r"(ray_downpour_\w+)(?:\{([^}]*)\})?", query)
        assert found, query
        for name, labels in found:
            assert name in names, query
            asked.add(name)
            assert set(re.findall(r"(\w+)=", labels)) <= names[name], query
    unasked = {
        name
        for name, metric in METRICS.items()
        for s in suffixes[metric.kind]
        if f"ray_{name}{s}" in asked
    } ^ set(METRICS)
    assert unasked <= {"downpour_restarts"}


class FakeMetric:
    """Remembers what Ray would be told."""

    def __init__(self, name: str, definition: Metric) -> None:
        self.values: dict[tuple[str, ...], float] = {}
        self.tags = ("run", *definition.tags)

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.tags)
        self.values[tuple(tags.values())] = value

    observe = set

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0
        self.set(self.values.get(tuple(tags.values()), 0.0) + value, tags)


def partition(index: int, version: int) -> Any:
    """A report of a partition, as far as metrics look at it."""
    return SimpleNamespace(
        index=index,
        version=version,
        connections=2,
        drift=0.1,
        duplicates=1,
        refused=0,
        dropped=2,
        malformed=0,
        staleness={0: [3, 4], 1: [1, 0, 5]},
    )


def test_a_partition_that_is_replaced_goes_on_under_its_tags() -> None:
    made: dict[str, FakeMetric] = {}

    def make(name: str, definition: Metric) -> FakeMetric:
        return made.setdefault(name, FakeMetric(name, definition))

    sink = PrometheusSink(
        run="a",
        push_bytes=8,
        pull_bytes=4,
        steps_per_push=2,
        steps_per_pull=1,
        staleness_bound=200,
        make=make,
    )
    for version in (100, 130, 110, 150):  # the third comes from a snapshot
        sink.observed(
            Observation(
                values=VALUES,
                reports=[partition(0, version)],
                replicas={"training": 2},
                leases=Leases(outstanding=4, queued=2),
                restarts={"partition": 1},
            )
        )
    assert made["downpour_updates"].values["a", "0"] == 100 + 30 + 40
    assert made["downpour_partition_version"].values["a", "0"] == 150
    assert made["downpour_staleness_pushes"].values["a", "0", "1"] == 8
    assert made["downpour_staleness_pushes"].values["a", "0", "+Inf"] == 13
    assert made["downpour_refusals"].values["a", "0", "too stale"] == 2
    assert made["downpour_refusals"].values["a", "0", "malformed"] < 1e-6
    assert made["downpour_queue_depth"].values["a",] == 2
    reading = Reading(shuffler=1, rows=64, seconds=0.5, hits=3, misses=1)
    window = SimpleNamespace(
        replica=7,
        push_s=0.01,
        pull_s=0.0,
        wall_s=1.0,
        num_batches=10,
        mean_loss=2.0,
        readings=(reading,),
    )
    sink.trained(window)  # type: ignore[arg-type]
    window.mean_loss = None
    sink.trained(window)  # type: ignore[arg-type]
    assert made["downpour_push_bytes"].values["a",] == 2 * 10 * 4
    assert made["downpour_loss"].values["a",] == 2.0
    assert made["downpour_steps"].values["a", "7"] == 2 * 10
    assert made["downpour_loss_not_finite"].values["a",] == 1
    assert made["downpour_shuffler_cache"].values["a", "1", "hit"] == 3


def test_buckets_of_staleness_are_cumulative() -> None:
    found = cumulative({0: [1, 2], 1: [0, 0, 0, 7]})
    assert (found["0"], found["1"], found["2"], found["5"], found["+Inf"]) == (1, 3, 3, 10, 10)


def test_tensorboard_reads_the_curves(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    sink = TensorBoardSink(tmp_path)
    sink.observed(Observation(values=VALUES, reports=[partition(0, 100)], replicas={}))
    sink.evaluated({"updates": 120, "accuracy": 0.5, "evaluation_loss": 1.0, "elapsed_s": 1.0})
    sink.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, found = file.read_bytes(), {}
    while data:  # length, its checksum, a record, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
        found |= {v.tag: (event.step, v.simple_value) for v in event.summary.value}
    assert found["training/loss"] == (100, 1.5)
    assert found["evaluation/accuracy"] == (120, 0.5)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that has come some way."""
    folder = RunFolder.create(tmp_path / "a<b>", recipes.find("mnist-bn"))
    for n in range(1, 40):
        folder.append_metrics({**VALUES, "updates": 10 * n, "loss": 2.0 / n})
    folder.append_metrics({"updates": 400, "accuracy": 0.9, "evaluation_loss": 0.3})
    folder.append_metrics({"updates": 420, "accuracy": 0.8, "evaluation_loss": 0.4})
    folder.append_event("a <b>replica</b> was lost")
    folder.write_json("status.json", {"state": "training", "time": 0.0, **VALUES})
    return folder


class Page(html.parser.HTMLParser):
    """What a page refers to, and what it says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elsewhere: list[str] = []
        self.tags: list[str] = []
        self.said = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.elsewhere += [v or "" for k, v in attrs if k in ("src", "href", "action")]

    def handle_data(self, data: str) -> None:
        self.said += data


def test_the_report_needs_nothing_besides_itself(folder: RunFolder) -> None:
    staleness = {"mean": 4.0, "histogram": [[0, 5], [7, 9]]}
    result = {"accuracy": 0.9, "exactly_once": True, "staleness": staleness}
    folder.write_json("result.json", result)
    text = write_report(folder.path).read_text()
    page = Page(text)
    assert page.elsewhere == []
    assert "script" not in page.tags
    assert "url(" not in text
    assert page.tags.count("svg") == 7
    assert "a <b>replica</b> was lost" in page.said
    assert "90.00%" in page.said


def test_a_run_without_metrics_has_no_report(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "a", recipes.find("mnist-bn"))
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        write_report(tmp_path / "a")


def test_a_run_is_watched_until_it_ends(folder: RunFolder) -> None:
    console = Console(record=True, width=200, force_terminal=False)
    seen = progress(folder)
    assert (seen.accuracy, seen.best_accuracy, seen.total_examples) == (0.8, 0.9, 3200 * 20 * 20)
    with folder.locked():
        assert end(folder) is None
        pauses = []

        def pause(_: float) -> None:
            pauses.append(1)
            folder.write_json("result.json", {"accuracy": 0.9})

        assert watch(folder, once=False, console=console, pause=pause) == 0
    assert pauses == [1]
    assert "finished with an accuracy of 90.00%" in console.export_text()


def test_a_run_that_nobody_trains_has_died(folder: RunFolder) -> None:
    assert end(folder) == f"died: `downpour resume {folder.path}` goes on with it"
    with pytest.raises(UserError, match="does not train: died"):
        stop(folder, wait=True, console=Console())


def test_a_run_is_asked_to_stop_through_its_folder(folder: RunFolder) -> None:
    console = Console(record=True, width=200)

    def pause(_: float) -> None:
        assert folder.stop_requested()
        status = folder.read_json("status.json")
        folder.write_json("status.json", {**status, "state": "stopped", "reason": "downpour stop"})

    with folder.locked():
        assert stop(folder, wait=True, console=console, pause=pause) == 0
        assert "stopped (downpour stop)" in console.export_text()
        folder.clear_stop()
        folder.write_json("status.json", {"state": "training", **VALUES})
        times = iter(range(0, 10_000, 100))
        with pytest.raises(UserError, match="has not stopped within"):
            stop(
                folder, wait=True, console=console, pause=lambda _: None, clock=lambda: next(times)
            )
