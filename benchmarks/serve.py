"""Claim: `downpour serve` keeps its rate however many requests come at once.

A server of section 4.1's net, with weights as they are at the start, is flooded: so many requests
at once, each on a connection of its own, until `REQUESTS` have been answered. Past the knee the
rate stays, each answer comes in time or is a 503, and no other status is seen. Clients run in this
process, on one thread, and share the machine with the server.
"""

from __future__ import annotations

import contextlib
import io
import re
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from downpour.benchmarks.harness import BadSettings, Report, Say, Settings, median
from downpour.benchmarks.processes import BenchmarkFailed

AT_ONCE = (32, 128, 600, 1500)
REQUESTS = 3000
START_S = 180.0
DEADLINE_S = 120.0
"""Longest that an answer is waited for."""


@dataclass(frozen=True, kw_only=True)
class Flood:
    """What came of one flood."""

    statuses: dict[str, int]
    """How many answers of each status; what was no answer has the name of its error."""
    seconds: float
    """From the first request to the last answer."""
    answered_per_s: float
    """Answers of status 200."""
    median_s: float
    """Of the answers of status 200."""
    worst_s: float
    """Of all answers."""


def run(settings: Settings, say: Say) -> Report:
    """Flood a server with each number of requests at once, in every round."""
    unknown = [name for name in settings.only if not name.isdigit()]
    if unknown:
        raise BadSettings(f"serve has no size {unknown[0]!r}: give requests at once, say 600")
    sizes = [int(name) for name in settings.only] or list((8, 64) if settings.quick else AT_ONCE)
    requests = 100 if settings.quick else REQUESTS
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="downpour-bench-") as folder:
        net = Path(folder) / "net"
        make_run(net)
        with served(net, Path(folder) / "log") as (port, header):
            say("warming up")
            flood(port, header, 16, 100)
            for number in range(settings.repeat):
                found = {}
                for size in sizes:
                    say(f"round {number + 1}: {size} at once")
                    found[str(size)] = vars(flood(port, header, size, requests))
                rounds.append(found)
    return _report(settings, sizes, requests, rounds)


def _report(
    settings: Settings, sizes: list[int], requests: int, rounds: list[dict[str, Any]]
) -> Report:
    rates = {size: median([r[str(size)]["answered_per_s"] for r in rounds]) for size in sizes}
    best = max(rates.values())
    rows = []
    for size in sizes:
        floods = [each[str(size)] for each in rounds]
        statuses: Counter[str] = Counter()
        for each in floods:
            statuses.update(each["statuses"])
        rows.append(
            (
                str(size),
                f"{rates[size]:.0f}",
                f"{rates[size] / best:.2f}",
                f"{median([each['median_s'] for each in floods]):.2f} s",
                f"{max(each['worst_s'] for each in floods):.2f} s",
                ", ".join(f"{status}: {count:,}" for status, count in sorted(statuses.items())),
            )
        )
    return Report(
        name="serve",
        title=f"a server flooded with {requests:,} requests",
        columns=("at once", "answers/s", "of the best", "median", "worst", "statuses"),
        rows=tuple(rows),
        notes=(
            f"medians of {settings.repeat} round(s), worst of all; answers are those of status 200",
        ),
        configuration={"sizes": sizes, "requests": requests, "recipe": "mnist-bn"},
        result={
            "answers_per_s": {str(size): round(rate, 1) for size, rate in rates.items()},
            "of_the_best": {str(size): round(rate / best, 3) for size, rate in rates.items()},
        },
        rounds=rounds,
    )


def make_run(path: Path) -> None:
    """Make the folder of a run whose weights are those that it would begin with."""
    from downpour.cluster.config import recipes
    from downpour.cluster.config.derive import model_spec
    from downpour.cluster.run.folder import MODEL, RunFolder
    from downpour.workers.evaluation.evaluator import Evaluator, Score

    config = recipes.find("mnist-bn")
    RunFolder.create(path, config)
    spec = model_spec(config)
    evaluator = Evaluator(spec, lambda: ())
    evaluator.weights.copy_(spec.build_flat("cpu").weights)
    evaluator.statistics[1] = 1.0
    score = Score(accuracy=0.0, loss=0.0, num_examples=0)
    evaluator.save(str(path / MODEL), versions=[0], score=score)


@contextlib.contextmanager
def served(net: Path, log: Path) -> Iterator[tuple[int, bytes]]:
    """Serve a run while the context lasts; yields the port, and the header that callers show."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "downpour.cluster.cli.main", "serve", str(net)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=out, stderr=subprocess.STDOUT
        )
    try:
        deadline_s = time.monotonic() + START_S
        while (found := re.search(r"-H @(\S+)", log.read_text())) is None:
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise BenchmarkFailed(f"the server did not start: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield port, Path(found[1]).read_bytes().strip()
    finally:
        process.terminate()
        process.wait(60)


@dataclass(kw_only=True, slots=True)
class _Call:
    """One request on a connection of its own."""

    connection: socket.socket
    began_s: float
    unsent: bytes
    heard: bytes = b""

    @property
    def status(self) -> str | None:
        """Of the answer; None while it is not whole."""
        head, blank, body = self.heard.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower()) if blank else None
        if length is None or len(body) < int(length[1]):
            return None
        return head.split(b" ", 2)[1].decode()


def flood(port: int, header: bytes, at_once: int, requests: int) -> Flood:
    """Send so many requests, so many of them at once; the next when one has been answered.

    One thread and one epoll object: the client shares its processors with the server.
    """
    body = _image()
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\n%s\r\n" % header
    request = head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    answers: list[tuple[str, float]] = []
    calls: dict[int, _Call] = {}
    left = requests
    began_s = time.monotonic()
    with select.epoll() as poll:
        while left or calls:
            while left and len(calls) < at_once:
                left -= 1
                call = _call(port, request)
                calls[call.connection.fileno()] = call
                poll.register(call.connection, select.EPOLLIN | select.EPOLLOUT)
            ready = poll.poll(DEADLINE_S)
            late = time.monotonic() - DEADLINE_S
            found = [(number, _go_on(calls[number], poll)) for number, _ in ready]
            if not ready:
                found = [(n, "TimeoutError") for n, call in calls.items() if call.began_s <= late]
            for number, status in found:
                if status is not None:
                    call = calls.pop(number)
                    call.connection.close()
                    answers.append((status, time.monotonic() - call.began_s))
    seconds = time.monotonic() - began_s
    good = [took_s for status, took_s in answers if status == "200"]
    return Flood(
        statuses=dict(Counter(status for status, _ in answers)),
        seconds=round(seconds, 3),
        answered_per_s=round(len(good) / seconds, 1),
        median_s=round(statistics.median(good), 3) if good else 0.0,
        worst_s=round(max(took_s for _, took_s in answers), 3),
    )


def _call(port: int, request: bytes) -> _Call:
    connection = socket.socket()
    connection.setblocking(False)
    connection.connect_ex(("127.0.0.1", port))
    return _Call(connection=connection, began_s=time.monotonic(), unsent=request)


def _go_on(call: _Call, poll: select.epoll) -> str | None:
    """Send or hear more; returns the status, or what failed, once there is one."""
    try:
        if call.unsent:
            call.unsent = call.unsent[call.connection.send(call.unsent) :]
            if not call.unsent:
                poll.modify(call.connection, select.EPOLLIN)
            return None
        more = call.connection.recv(1 << 16)
    except BlockingIOError:
        return None
    except OSError as error:
        return type(error).__name__
    call.heard += more
    return call.status or (None if more else "cut short")


def _image() -> bytes:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
