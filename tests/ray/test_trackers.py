"""A run that tells Weights & Biases and MLflow, as they are: what is in their files afterwards."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import commands, tiny

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]

SCRIPT = """
import sys
import downpour
from downpour.callbacks import MLflow, WandB
from tests.helpers import tiny

config = tiny.config(sys.argv[1], epochs=2, partitions=1)
callbacks = []
if "wandb" in sys.argv[2:]:
    callbacks.append(WandB("mine", mode="offline", log_model=True))
if "mlflow" in sys.argv[2:]:
    callbacks.append(MLflow("mine", tracking_uri="sqlite:///runs.db", log_model=True))
downpour.Trainer(config=config, callbacks=callbacks, name="told", progress=False).fit()
"""
MLFLOW = """
import json
from pathlib import Path
import mlflow

client = mlflow.MlflowClient(tracking_uri="sqlite:///runs.db")
(run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
history = client.get_metric_history(run.info.run_id, "accuracy")
found = {
    "status": run.info.status, "name": run.info.run_name,
    "params": run.data.params, "metrics": run.data.metrics,
    "history": [(each.step, each.value) for each in history],
    "files": [each.path for each in client.list_artifacts(run.info.run_id)],
}
Path("mlflow.json").write_text(json.dumps(found))
"""
WANDB = """
import json, sys
from pathlib import Path
from wandb.proto import wandb_internal_pb2
from tests.ray.test_trackers import records

found = []
for data in records(Path(sys.argv[1]).read_bytes()):
    record = wandb_internal_pb2.Record.FromString(data)
    kind = record.WhichOneof("record_type")
    about = getattr(record, kind)
    if kind == "run":
        found.append([kind, about.display_name, {u.key: json.loads(u.value_json)
                                                 for u in about.config.update}])
    elif kind in ("history", "summary"):
        items = about.item if kind == "history" else about.update
        found.append([kind, "", {(i.key or ".".join(i.nested_key)): json.loads(i.value_json)
                                 for i in items}])
    elif kind == "artifact":
        found.append([kind, about.name, {}])
    elif kind == "exit":
        found.append([kind, "", {"code": about.exit_code}])
Path("wandb.json").write_text(json.dumps(found))
"""


def records(data: bytes, block: int = 1 << 15) -> Iterator[bytes]:
    """The records in an offline run's file: LevelDB's log format, after a header of 7 bytes."""
    at, part = 7, b""
    while at + 7 <= len(data):
        if (left := block - at % block) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield part
            part = b""


def python(folder: Path, script: str, *arguments: str | Path) -> None:
    """Run a script in `folder`; it must succeed."""
    variables = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=folder,
        env={**variables, "PYTHONPATH": str(commands.ROOT), "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def test_programs_that_track_experiments_have_the_run(tmp_path: Path) -> None:
    needs = {"wandb": ["wandb"], "mlflow": ["mlflow", "sqlalchemy"]}
    there = [n for n, parts in needs.items() if all(map(importlib.util.find_spec, parts))]
    if not there:
        pytest.skip("neither is installed: pip install 'downpour[wandb,mlflow]'")
    python(tmp_path, SCRIPT, tiny.dataset(tmp_path / "data"), *there)
    run = tmp_path / "runs" / "told"
    events = (run / "events.jsonl").read_text()
    assert "raised" not in events, events
    result = commands.result(run)
    scored = [line for line in commands.metrics(run) if "accuracy" in line]
    if "wandb" in there:
        check_wandb(tmp_path, run, result, scored)
    if "mlflow" in there:
        check_mlflow(tmp_path, result, scored)


def check_wandb(folder: Path, run: Path, result: dict[str, Any], scored: list[Any]) -> None:
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    python(folder, WANDB, file)
    found = json.loads((folder / "wandb.json").read_text())
    (begun,) = [each for each in found if each[0] == "run"]
    assert begun[1] == "told"
    assert begun[2]["learning_rate"] > 0
    rows = [each[2] for each in found if each[0] == "history"]
    assert [(r["updates"], r["accuracy"]) for r in rows] == steps(scored)
    summary: dict[str, Any] = {}
    for each in found:
        summary |= each[2] if each[0] == "summary" else {}
    assert summary["accuracy"] == result["accuracy"]
    assert summary["best_accuracy"] == result["best_accuracy"]
    assert ["artifact", "told"] in [each[:2] for each in found]
    assert [each[2] for each in found if each[0] == "exit"] == [{"code": 0}]


def check_mlflow(folder: Path, result: dict[str, Any], scored: list[Any]) -> None:
    python(folder, MLFLOW)
    found = json.loads((folder / "mlflow.json").read_text())
    assert (found["status"], found["name"]) == ("FINISHED", "told")
    assert float(found["params"]["learning_rate"]) > 0
    assert list(map(tuple, found["history"])) == steps(scored)
    assert found["metrics"]["result.accuracy"] == result["accuracy"]
    assert found["files"] == ["model.safetensors"]


def steps(scored: list[Any]) -> list[tuple[int, float]]:
    """Updates and accuracy of each scoring."""
    return [(line["updates"], line["accuracy"]) for line in scored]
