"""`downpour serve` in a process of its own: the answers of `predict`, refusals, and batches."""

import json
import socket
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster import inference
from tests.inprocess.test_inference import _config, _file, _make_run, _pixels
from tests.inprocess.tiny import write_split
from tests.ray import commands
from workers.predictor import Predictor

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ask(url: str, body: bytes | None = None) -> tuple[int, Any]:
    request = urllib.request.Request(url, data=body)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_images_over_http(tmp_path: Path) -> None:
    write_split(tmp_path / "data", "train", *_pixels(320, 1))
    write_split(tmp_path / "data", "test", *_pixels(40, 2), shards=1)
    _make_run(tmp_path / "run", _config(tmp_path / "data"))
    port = _free_port()
    log = tmp_path / "log"
    process = commands.start(
        "serve", tmp_path / "run", "--port", str(port), "--batch-wait-s", "0.05", log=log
    )
    try:
        commands.wait_for(
            lambda: "try: curl" in log.read_text() or process.poll() is not None, "the server"
        )
        assert process.poll() is None, log.read_text()
        url = f"http://127.0.0.1:{port}"
        files = [_file(image) for image in _pixels(10, 7)[0]]
        trained = inference.load(tmp_path / "run")
        names = [str(i) for i in range(10)]
        expected = inference.predict(
            Predictor([trained.network]), trained.class_names, files, names, top=5
        )
        for data, wanted in zip(files, expected, strict=True):
            status, answer = _ask(f"{url}/predict", data)
            assert status == 200
            found = answer["predictions"]
            assert [p["class"] for p in found] == [p["class"] for p in wanted]
            for mine, other in zip(found, wanted, strict=True):
                assert mine["probability"] == pytest.approx(other["probability"], abs=1e-5)
        status, answer = _ask(f"{url}/predict", files[0][:150])
        assert status == 400
        assert "cannot be decoded" in answer["error"]
        before = _ask(f"{url}/stats")[1]
        with ThreadPoolExecutor(100) as pool:
            burst = list(pool.map(lambda i: _ask(f"{url}/predict", files[i % 10]), range(100)))
        assert {status for status, _ in burst} == {200}
        for i, (_, answer) in enumerate(burst):
            assert answer["predictions"][0]["class"] == expected[i % 10][0]["class"]
        after = _ask(f"{url}/stats")[1]
        assert after["requests"] - before["requests"] == 100
        assert after["batches"] - before["batches"] <= 50
        assert after["largest_batch"] > 1
    finally:
        process.terminate()
        assert process.wait(60) == 0, log.read_text()
