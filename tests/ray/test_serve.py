"""`downpour serve` in a process of its own: the answers of `predict`, refusals, and batches."""

import contextlib
import json
import os
import re
import stat
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from downpour.cluster.serving import inference, prediction
from downpour.workers.evaluation.predictor import Predictor
from tests.helpers import commands
from tests.helpers.strangers import beyond_loopback, kind_of_refusal, listening
from tests.helpers.tiny import write_split
from tests.helpers.trained import as_file, coloured, make_run, small_config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]


class _Server:
    """A server that answers, and a caller of it who may show a key."""

    def __init__(self, process: Any, port: int, header: Path) -> None:
        self.process = process
        self.port = port
        self.header = header
        self.key = header.read_text().partition("Bearer ")[2].strip()

    def ask(
        self, path: str, body: bytes | None = None, shown: str | None = None, kind: str = ""
    ) -> tuple[int, Any]:
        """Status and JSON; `shown` is the Authorization header, the right one by default."""
        shown = f"Bearer {self.key}" if shown is None else shown
        headers = {"Authorization": shown} if shown else {}
        headers |= {"Content-Type": kind} if kind else {}
        url = f"http://127.0.0.1:{self.port}{path}"
        try:
            request = urllib.request.Request(url, data=body, headers=headers)
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)


@contextlib.contextmanager
def _served(run: Path, log: Path, *options: str | Path) -> Iterator[_Server]:
    """`downpour serve` while the context lasts."""
    port = commands.free_port()
    process = commands.start("serve", run, "--port", str(port), *options, log=log)
    try:
        commands.wait_for(
            lambda: "try: curl" in log.read_text() or process.poll() is not None, "the server"
        )
        assert process.poll() is None, log.read_text()
        header = re.search(r"-H @(\S+)", log.read_text())
        assert header is not None
        yield _Server(process, port, Path(header[1]))
    finally:
        process.terminate()
        assert process.wait(60) == 0, log.read_text()


@dataclass(frozen=True)
class _Place:
    """A run that is served, a home where the key is kept, and Ray's folder."""

    run: Path
    home: Path
    ray: Path
    logs: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Place]:
    folder = tmp_path_factory.mktemp("served")
    write_split(folder / "data", "train", *coloured(320, 1))
    write_split(folder / "data", "test", *coloured(40, 2), shards=1)
    make_run(folder / "run", small_config(folder / "data"))
    for name in ("home", "logs"):
        (folder / name).mkdir()
    with (
        commands.folder_for_ray() as short,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("HOME", str(folder / "home"))
        patch.setenv("RAY_TMPDIR", short)
        yield _Place(folder / "run", folder / "home", Path(short), folder / "logs")


@pytest.fixture(scope="module")
def server(place: _Place) -> Iterator[_Server]:
    """A server with the key that is made for it."""
    with _served(place.run, place.logs / "made", "--batch-wait-s", "0.05") as found:
        yield found
    assert not found.header.exists()


def test_images_over_http(place: _Place, server: _Server) -> None:
    files = [as_file(image) for image in coloured(10, 7)[0]]
    trained = inference.load(place.run)
    names = [str(i) for i in range(10)]
    answers = prediction.predict(
        Predictor([trained.network]), trained.class_names, files, names, top=5
    )
    expected = [answer.classes for answer in answers]
    for data, wanted in zip(files, expected, strict=True):
        status, answer = server.ask("/predict", data)
        assert status == 200
        found = answer["predictions"]
        assert [p["class"] for p in found] == [p["class"] for p in wanted]
        for mine, other in zip(found, wanted, strict=True):
            assert mine["probability"] == pytest.approx(other["probability"], abs=1e-5)
    status, answer = server.ask("/predict", files[0][:150])
    assert status == 400
    assert "cannot be decoded" in answer["error"]
    assert len(server.ask("/predict?top=1", files[0])[1]["predictions"]) == 1
    assert server.ask("/predict", b"hello")[0] == 415
    status, answer = server.ask("/predict", b"\xff\xd8" + bytes(33 << 20))
    assert (status, "more than" in answer["error"]) == (413, True)
    assert server.ask("/predict", bytes(33 << 20), shown="")[0] == 401
    form = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    status, answer = server.ask(
        "/predict", form + files[0] + b"\r\n--b--\r\n", kind="multipart/form-data; boundary=b"
    )
    assert (status, answer["predictions"][0]["class"]) == (200, expected[0][0]["class"])
    before = server.ask("/stats")[1]
    with ThreadPoolExecutor(100) as pool:
        burst = list(pool.map(lambda i: server.ask("/predict", files[i % 10]), range(100)))
    assert {status for status, _ in burst} == {200}
    for i, (_, answer) in enumerate(burst):
        assert answer["predictions"][0]["class"] == expected[i % 10][0]["class"]
    after = server.ask("/stats")[1]
    assert after["requests"] - before["requests"] == 100
    assert after["batches"] - before["batches"] <= 50
    assert after["largest_batch"] > 1


def test_the_key_opens_every_path_and_is_written_nowhere(place: _Place, server: _Server) -> None:
    """On loopback, too."""
    assert len(server.key) >= 20
    _check_the_key(place, server)


@pytest.mark.soak
def test_a_key_of_the_users_own_and_a_line_that_is_full(place: _Place) -> None:
    own = place.home / "key"
    own.write_text("0123456789abcdef0123\n")
    own.chmod(0o600)
    short = ("--max-batch", "2", "--max-waiting", "3")
    with _served(place.run, place.logs / "own", "--key-file", own, *short) as server:
        assert server.key == "0123456789abcdef0123"
        _check_the_key(place, server)
        image = as_file(coloured(1, 7)[0][0])
        with ThreadPoolExecutor(60) as pool:
            found = list(pool.map(lambda _: server.ask("/predict", image), range(60)))
        assert {status for status, _ in found} == {200, 503}, "in a line of 4 and 3"
        assert all("too many requests wait" in a["error"] for s, a in found if s == 503)
        assert server.ask("/predict", image)[0] == 200
    assert not server.header.exists()


def _check_the_key(place: _Place, server: _Server) -> None:
    image = as_file(coloured(1, 7)[0][0])
    for path in ("/predict", "/stats", "/", "/-/healthz", "/-/routes"):
        for shown in ("", "Bearer ", f"Bearer {server.key}0", server.key):
            status, answer = server.ask(path, shown=shown)
            assert (status, "key" in answer["error"]) == (401, True), (path, shown)
    assert server.ask("/predict", image, shown="")[0] == 401
    assert server.ask("/predict", image)[0] == 200

    assert server.header.parent == place.home / ".downpour"
    assert stat.S_IMODE(server.header.stat().st_mode) == 0o600
    processes = commands.descendants(server.process.pid)
    texts = _read(place.run, place.logs, place.ray)
    for pid in (server.process.pid, *processes):
        for name in ("cmdline", "environ"):
            with contextlib.suppress(OSError):  # it has ended
                texts[f"{name} of {pid}"] = Path(f"/proc/{pid}/{name}").read_bytes()
    assert len(texts) > 2 * len(processes)
    assert [where for where, text in texts.items() if server.key.encode() in text] == []

    ports = listening({server.process.pid, *processes})
    assert ("127.0.0.1", server.port) in ports
    assert {at for at in ports if beyond_loopback(at[0])} == set()
    assert {kind_of_refusal("127.0.0.1", port) for _, port in ports} == {"grpc", "http"}


def _read(*places: Path) -> dict[str, bytes]:
    """Contents of all files there, but for sockets and the like, and what goes meanwhile."""
    files = [p for p in places if not p.is_dir()]
    for place in places:
        # Not rglob: Ray removes folders of its own, and rglob fails at one that is gone.
        files += [Path(top, name) for top, _, names in os.walk(place) for name in names]
    found = {}
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            if file.is_file() and os.access(file, os.R_OK):
                found[str(file)] = file.read_bytes()
    return found
