"""Rows of numbers over HTTP: what a replica answers, by task, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from downpour.cluster.config.derive import model_spec
from downpour.cluster.config.options import apply
from downpour.cluster.config.run import RunConfig
from downpour.cluster.run.folder import RunFolder
from downpour.cluster.serving import inference
from downpour.cluster.serving.server import app, key
from downpour.cluster.serving.server.batches import Answer, Asked
from downpour.cluster.serving.server.classifier import Classifier
from downpour.cluster.serving.settings import ServeConfig
from downpour.cluster.training.tasks import with_task
from downpour.workers.evaluation.evaluator import Evaluator, Score
from tests.helpers import tables

INPUTS = {"input_columns": ("a", "b", "k", "pair")}
ROWS = [[0.5, -1, 2, [0.25, 1.5]], [1, 2.5, -3, [0, 0]], [0, 0, 0, [1e-3, -4]]]


def fresh(path: Path, config: RunConfig) -> Path:
    """A run's folder with the network's initial weights."""
    folder = RunFolder.create(path, config)
    folder.write_json("data.json", {"train_fingerprint": "", "class_names": []})
    spec = model_spec(config)
    evaluator = Evaluator(spec, lambda: ())
    flat = spec.build_flat("cpu")
    evaluator.weights.copy_(flat.weights)
    evaluator.statistics.copy_(flat.statistics)
    score = Score(accuracy=0, loss=0, num_examples=0)
    evaluator.save(str(path / "model.safetensors"), versions=[0], score=score)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tables.dataset(tmp_path_factory.mktemp("table"))


def serving(path: Path, data: str, given: dict[str, Any]) -> Classifier:
    given = INPUTS | given
    config = with_task(apply(tables.config(data), given), given)
    runs = [str(fresh(path, config))]
    return Classifier(runs, best=False, weights=None, config=ServeConfig(), digest=key.digest("k"))


def asked(value: Any, **headers: str) -> Asked:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return Asked(query="", headers=headers, body=body, left_s=60)


def said(answer: Answer) -> Any:
    assert answer.status == 200, answer.body
    return json.loads(answer.body)["rows"]


def test_each_task_answers_rows_as_its_network_does(tmp_path: Path, data: str) -> None:
    named = [dict(zip(("a", "b", "k", "pair"), row, strict=True)) for row in ROWS]
    flat = [[*row[:3], *row[3]] for row in ROWS]
    inputs = torch.tensor(flat, dtype=torch.float32)
    tasks: tuple[dict[str, Any], ...] = (
        {"target_column": ("y",)},
        {"target_column": ("y", "z"), "task": "regression"},
        {"target_column": ("z",), "task": "classification"},
        {"target_column": ("tags",), "num_classes": 3},
    )
    for number, given in enumerate(tasks):
        server = serving(tmp_path / str(number), data, given)
        # Each by itself, since sums in a batch may be rounded otherwise by the place in it.
        first, *others = (
            said(server.answer_all([asked({"rows": rows})])[0]) for rows in (ROWS, flat, named)
        )
        assert others == [first, first]
        both = server.answer_all([asked({"rows": ROWS[:count]}) for count in (2, 1)])
        sizes = [len(said(answer)) for answer in both]
        assert sizes == [2, 1]
        assert server.stats() == {"requests": 5, "batches": 4, "largest_batch": 2}
        run = inference.load(tmp_path / str(number))
        with torch.no_grad():
            expected = run.network.model.module(inputs)
        task = run.network.spec.task
        if task == "regression":
            found = [list(row["outputs"].values()) for row in first]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
            assert list(first[0]["outputs"]) == list(given["target_column"])
        elif task == "classification":
            probabilities = expected.softmax(1)
            for row, wanted in zip(first, probabilities, strict=True):
                best = row["predictions"][0]
                assert best["label"] == int(wanted.argmax())
                assert best["probability"] == pytest.approx(float(wanted.max()), abs=1e-4)
        else:
            for row, wanted in zip(first, expected, strict=True):
                assert {p["label"] for p in row["predictions"]} == set(
                    torch.nonzero(wanted > 0)[:, 0].tolist()
                )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, data: str) -> Classifier:
    return serving(tmp_path_factory.mktemp("runs") / "a", data, {"target_column": ("y",)})


GOOD = {"a": 1, "b": 2, "k": 3, "pair": [4, 5]}


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        (b"\xff\xd8\xff", 400, "the body is no JSON"),
        (b"[" * 100_000, 400, "the body is no JSON"),
        (b"", 400, "the body is empty"),
        ([[1, 2]], 400, "the body has no list 'rows'"),
        ({"rows": {"a": [1]}}, 400, "the body has no list 'rows'"),
        ({"rows": []}, 400, "'rows' is empty"),
        ({"rows": [GOOD], "top": 3}, 400, "'top' is not known here"),
        ({"rows": [GOOD, {"a": 1}]}, 400, "row 1 has no column 'b': give all of a, b, k, pair"),
        ({"rows": [GOOD | {"y": 1}]}, 400, "row 0 has a column 'y', which the network does not"),
        ({"rows": [[1, 2, 3]]}, 400, "row 0 has 3 numbers, and the network takes 5"),
        ({"rows": [GOOD | {"k": "red"}]}, 400, "row 0, column 'k' has text, not a number: \"red\""),
        ({"rows": [GOOD | {"k": None}]}, 400, "row 0, column 'k' has nothing (null)"),
        ({"rows": [GOOD | {"b": [1, 2]}]}, 400, "row 0, column 'b' has 2 numbers, and the netw"),
        ({"rows": [GOOD | {"pair": [1]}]}, 400, "row 0, column 'pair' has 1 numbers"),
        (b'{"rows": [[1, NaN, 3, 4, 5]]}', 400, "row 0 at place 1 has nan, which is no finite"),
        (b'{"rows": [[1, 1e39, 3, 4, 5]]}', 400, "has 1e+39, which is no finite number of float"),
        ({"rows": [GOOD | {"k": 1 << 25}]}, 400, "has 33554432, which float32 does not hold"),
        ({"rows": [7]}, 400, "row 0 is a number: give a list of numbers"),
        ({"rows": [[0] * 5] * 4097}, 413, "there are 4,097 rows: send at most 4,096"),
    ],
)
def test_what_is_no_row_is_told_and_costs_others_nothing(
    server: Classifier, body: Any, status: int, why: str
) -> None:
    bad, good = server.answer_all([asked(body), asked({"rows": [GOOD]})])
    told = json.loads(bad.body)["error"]
    assert (bad.status, why in told) == (status, True), told
    assert "\n" not in told
    assert len(said(good)) == 1


def test_headers_of_rows(server: Classifier) -> None:
    rows = {"rows": [GOOD]}
    kinds = ("application/json; charset=utf-8", "application/x-www-form-urlencoded", "text/plain")
    for kind in kinds:
        assert server.answer_all([asked(rows, **{"content-type": kind})])[0].status == 200
    for headers in ({"content-type": "image/png"}, {"content-encoding": "gzip"}):
        (found,) = server.answer_all([asked(rows, **headers)])
        assert found.status == 415
    late = Asked(query="", headers={}, body=json.dumps(rows).encode(), left_s=-1)
    assert server.answer_all([late])[0].status == 503


def test_what_the_command_says_to_try(server: Classifier, data: str) -> None:
    columns = with_task(
        apply(tables.config(data), INPUTS | {"target_column": ("y",)}),
        INPUTS | {"target_column": ("y",)},
    ).model.columns
    text = app.example(columns)
    body = text.removeprefix("--data-binary '").removesuffix("'")
    assert len(said(server.answer_all([asked(body.encode())])[0])) == 1
