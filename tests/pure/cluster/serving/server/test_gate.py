"""What the gate of a server lets in, and what it says to whom it does not."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from downpour.cluster.serving.server import gate, key
from downpour.cluster.serving.server.batches import Answer, Asked

RULES = gate.GateRules(
    digest=key.digest(key.header("the key")),
    most_bytes=1000,
    at_once=2,
    most_waiting=3,
    longest_wait_s=0.05,
    max_batch=1,
    batch_wait_s=0.0,
    under_way=2,
)
KEY = (b"Authorization", b"Bearer the key")


class Caller:
    """A request by ASGI, and what is sent in answer."""

    def __init__(self, *headers: tuple[bytes, bytes], kind: str = "http", parts: int = 1) -> None:
        self.scope = {
            "type": kind,
            "method": "POST",
            "path": "/predict",
            "query_string": b"",
            "headers": list(headers),
        }
        self.unread = parts
        self.sent: list[Any] = []

    async def receive(self) -> Any:
        self.unread -= 1
        return {"type": "http.request", "body": b"x" * 100, "more_body": self.unread > 0}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    @property
    def error(self) -> str:
        return str(json.loads(self.sent[1]["body"])["error"])


async def _behind(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "in", "status": 200, "scope": scope})


async def _answered(batch: Sequence[Asked]) -> list[Answer]:
    return [Answer(status=200, body=asked.body) for asked in batch]


def _through(caller: Caller, send: Any = _answered, rules: gate.GateRules = RULES) -> Caller:
    asyncio.run(gate.Gate(_behind, rules, send)(caller.scope, caller.receive, caller.send))
    return caller


def test_the_gate_opens_to_the_key_alone() -> None:
    assert _through(Caller(KEY)).status == 200
    assert _through(Caller(kind="lifespan")).sent[0]["type"] == "in"
    name = KEY[0]
    for shown in ((), (b"Bearer the kez",), (b"the key",), (b"",), (b"Bearer the key", b"x")):
        headers = [(name, value) for value in shown]
        refused = _through(Caller(*headers))
        assert (refused.status, refused.headers[b"www-authenticate"]) == (401, b"Bearer")
        assert "key is missing or wrong" in refused.error
        closed = _through(Caller(*headers, kind="websocket"))
        assert closed.sent == [{"type": "websocket.close", "code": 1008}]


def test_a_body_that_says_it_is_too_large_is_refused_and_drained() -> None:
    """Or its caller, who is still sending, could not read why."""
    caller = _through(Caller(KEY, (b"Content-Length", b"100000"), parts=40))
    assert (caller.status, caller.unread) == (413, 0)
    assert "100,000 bytes, more than 1,000" in caller.error
    assert [message.get("more_body", False) for message in caller.sent[1:]] == [True, False]
    assert caller.headers[b"connection"] == b"close"
    asking = _through(Caller(KEY, (b"Content-Length", b"100000"), (b"Expect", b"100-continue")))
    assert (asking.status, asking.unread) == (413, 1)
    assert _through(Caller(KEY, (b"Content-Length", b"1000"))).status == 200


def test_what_is_not_an_image_goes_to_what_lies_behind() -> None:
    for method, path in (("GET", "/stats"), ("GET", "/predict"), ("POST", "/stats")):
        caller = Caller(KEY)
        caller.scope |= {"method": method, "path": path}
        assert _through(caller).sent[0]["type"] == "in"


def test_a_replica_is_told_of_the_body_and_what_it_is() -> None:
    told: list[Asked] = []

    async def send(batch: Sequence[Asked]) -> list[Answer]:
        told.extend(batch)
        return [Answer(status=200, body=b"{}", headers={"x": "y"})]

    caller = Caller(KEY, (b"Content-Type", b"image/png"), (b"Cookie", b"secret"), parts=3)
    caller.scope["query_string"] = b"top=3"
    assert _through(caller, send).status == 200
    (asked,) = told
    assert (asked.body, asked.query) == (b"x" * 300, "top=3")
    assert asked.headers == {"content-type": "image/png"}
    assert 0 <= asked.left_s <= RULES.longest_wait_s
    assert (caller.headers[b"x"], caller.headers[b"content-length"]) == (b"y", b"2")
    assert caller.sent[1]["body"] == b"{}"


def test_a_body_that_does_not_say_that_it_is_too_large() -> None:
    caller = _through(Caller(KEY, parts=40))
    assert (caller.status, caller.unread) == (413, 0)
    assert "more than 1,000" in caller.error


def test_a_body_that_does_not_come_frees_its_place() -> None:
    class Silent(Caller):
        async def receive(self) -> Any:
            await asyncio.Event().wait()

    silent = _through(Silent(KEY))
    assert (silent.status, silent.headers[b"retry-after"]) == (503, b"1")
    assert "has not come within 0.05 s" in silent.error


def test_a_batch_that_fails_is_an_error_of_the_server(caplog: Any) -> None:
    async def fails(batch: Sequence[Asked]) -> list[Answer]:
        raise RuntimeError("broken")

    failed = _through(Caller(KEY), fails)
    assert (failed.status, "defect" in failed.error) == (500, True)
    assert "broken" in caplog.text


def test_a_short_body_is_left_to_the_web_server() -> None:
    length = (b"Content-Length", b"1000")
    caller = _through(Caller(length, parts=3))
    assert (caller.status, caller.unread, b"connection" in caller.headers) == (401, 3, False)
    closing = _through(Caller(length, (b"Connection", b"close"), parts=3))
    assert (closing.status, closing.unread) == (401, 0)


def test_a_line_that_is_full_or_too_slow_is_a_503() -> None:
    """Two are answered at once, three wait, the others are sent away at once; in order."""

    async def play() -> tuple[list[Caller], list[int]]:
        entered: list[int] = []
        leave = asyncio.Event()

        async def slow(batch: Sequence[Asked]) -> list[Answer]:
            entered.extend(int(asked.query) for asked in batch)
            await leave.wait()
            return await _answered(batch)

        door = gate.Gate(_behind, RULES, slow)
        callers = [Caller(KEY) for _ in range(7)]
        tasks = []
        for number, caller in enumerate(callers):
            caller.scope["query_string"] = b"%d" % number
            going = door(caller.scope, caller.receive, caller.send)
            tasks.append(asyncio.create_task(going))
        await asyncio.wait(tasks[5:])  # which are sent away while the others wait
        assert (door.line.num_begun, door.line.num_waiting) == (2, 3)
        await asyncio.wait(tasks[2:])  # whose time is over
        assert (door.line.num_begun, door.line.num_waiting) == (2, 0)
        late = Caller(KEY)
        late.scope["query_string"] = b"7"
        following = asyncio.create_task(door(late.scope, late.receive, late.send))
        await asyncio.sleep(0)
        assert (door.line.num_begun, door.line.num_waiting) == (2, 1)
        leave.set()
        await asyncio.gather(*tasks, following)
        assert (door.line.num_begun, door.line.num_waiting) == (0, 0)
        return [*callers, late], entered

    callers, entered = asyncio.run(play())
    assert [caller.status for caller in callers] == [200, 200, *[503] * 5, 200]
    assert entered == [0, 1, 7]
    for caller in callers[2:7]:
        assert caller.headers[b"retry-after"] == b"1"
        assert "too many requests wait" in caller.error


def test_one_whose_turn_comes_as_it_is_cancelled_lets_the_next_in() -> None:
    async def play() -> None:
        leave = asyncio.Event()

        async def slow(batch: Sequence[Asked]) -> list[Answer]:
            await leave.wait()
            return await _answered(batch)

        door = gate.Gate(_behind, RULES, slow)
        callers = [Caller(KEY) for _ in range(5)]
        tasks = [asyncio.create_task(door(c.scope, c.receive, c.send)) for c in callers]
        await asyncio.sleep(0)
        leave.set()
        tasks[2].cancel()
        await asyncio.wait(tasks)
        assert (door.line.num_begun, door.line.num_waiting) == (0, 0)

    asyncio.run(play())


def test_the_rules_travel_in_the_environment(monkeypatch: Any) -> None:
    for name, value in gate.environment(RULES).items():
        monkeypatch.setenv(name, value)
    (middleware,) = gate.gate()
    assert middleware.args[0] == RULES
