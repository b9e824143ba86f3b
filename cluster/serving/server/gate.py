"""What stands before Serve in its HTTP proxy: the key, the size of a body, and the line.

    401   without the key, whatever is asked for, Serve's own routes included
    413   for a body that says that it is too large
    503   if the line of requests is too long (`line`), with Retry-After

It is an ASGI middleware, which Serve's proxy loads by the name in an environment variable. Images
whose turn has come go from here to the replicas in batches (`batches`), past Serve's own way of a
request, which costs several times as much. A body that is refused is read and thrown away, up to a
bound: a caller that is still sending it could not read the answer otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from downpour.cluster.serving.server import key
from downpour.cluster.serving.server.batches import (
    Answer,
    Asked,
    BatchBounds,
    Batches,
    Send,
    refusal,
)
from downpour.cluster.serving.server.line import Arrival, Line, LineBounds, SentAway

LOADED_BY = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Variable of Ray's processes: the function that gives Serve's HTTP proxy its middlewares."""
RULES = "DOWNPOUR_SERVE_GATE"
"""Variable of Ray's processes: the gate's rules, as JSON."""
PATH = "/predict"
TOLD = (b"content-type", b"content-encoding")
"""Headers that a replica is told."""
SHORT_BYTES = 32 << 10
"""Most of a body that is not waited for."""
DRAINED_BYTES = 512 << 20
DRAINED_S = 10.0
"""Most that is read, and for how long, of a body that is refused."""
FULL = "too many requests wait already: send this one again in {} s"
SLOW = "the body has not come within {:g} s: send it again when the connection is faster"
DEFECT = "this request met a defect of the server, whose log says more"


@dataclass(frozen=True, kw_only=True)
class GateRules:
    """Whom the gate lets in."""

    digest: str
    """SHA-256 of the header that callers show."""
    most_bytes: int
    """Of a body."""
    at_once: int
    most_waiting: int
    longest_wait_s: float
    max_batch: int
    batch_wait_s: float
    under_way: int
    """Batches that have been sent and are not answered yet."""

    @property
    def batches(self) -> BatchBounds:
        """How requests go together."""
        return BatchBounds(
            max_batch=self.max_batch, batch_wait_s=self.batch_wait_s, under_way=self.under_way
        )

    @property
    def bounds(self) -> LineBounds:
        """How long the line may be."""
        return LineBounds(
            at_once=self.at_once,
            most_waiting=self.most_waiting,
            longest_wait_s=self.longest_wait_s,
        )


def environment(rules: GateRules) -> dict[str, str]:
    """Return variables by which Serve's HTTP proxy has a gate with these rules."""
    return {LOADED_BY: f"{__name__}.gate", RULES: json.dumps(asdict(rules))}


def gate() -> list[Any]:
    """Return the proxy's middlewares. Serve calls this in the proxy's process."""
    from starlette.middleware import Middleware

    from downpour.cluster.serving.server.replicas import send_to_replicas

    return [Middleware(Gate, GateRules(**json.loads(os.environ[RULES])), send_to_replicas())]


class Gate:
    """ASGI middleware that lets in callers with the key, as many as can be answered in time."""

    def __init__(
        self,
        app: Any,
        rules: GateRules,
        send: Send,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`app` is what lies behind it; `send` has a replica answer images together."""
        self._app, self._rules, self._clock = app, rules, clock
        self._batches = Batches(send, rules.batches)
        self.line = Line(rules.bounds)
        self._waiting: dict[int, asyncio.Future[None]] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass on requests that may come in, and events that are no requests."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        shown = _headers(scope, b"authorization")
        if len(shown) != 1 or not key.admits(self._rules.digest, shown[0].decode("latin-1")):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                challenge = {"www-authenticate": "Bearer"}
                await refuse(scope, receive, send, 401, key.REFUSED, challenge)
            return
        if scope["type"] == "http" and (scope["method"], scope["path"]) == ("POST", PATH):
            await self._in_line(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _in_line(self, scope: Any, receive: Any, send: Any) -> None:
        declared = b"".join(_headers(scope, b"content-length"))
        if declared.isdigit() and int(declared) > self._rules.most_bytes:
            sentence = f"the body has {int(declared):,} bytes, more than {self._rules.most_bytes:,}"
            await refuse(scope, receive, send, 413, sentence)
            return
        began_s = self._clock()
        sent_away = await self._wait()
        if sent_away is not None:
            after = sent_away.retry_after_s
            later = {"retry-after": str(after)}
            await refuse(scope, receive, send, 503, FULL.format(after), later)
            return
        status = 500
        try:
            answer = await self._answer(scope, receive, began_s + self._rules.longest_wait_s)
            status = answer.status
        finally:
            self._leave(answered=status < 500)
        told = {"content-type": "application/json", "content-length": str(len(answer.body))}
        pairs = [(n.encode(), v.encode()) for n, v in (told | dict(answer.headers)).items()]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": answer.body})

    async def _answer(self, scope: Any, receive: Any, until_s: float) -> Answer:
        """Have a request answered whose turn has come."""
        try:
            async with asyncio.timeout(max(0.0, until_s - self._clock())):
                body = await _whole(receive, self._rules.most_bytes)
        except TimeoutError:
            return refusal(503, SLOW.format(self._rules.longest_wait_s), {"retry-after": "1"})
        if body is None:
            sentence = f"the body has more than {self._rules.most_bytes:,} bytes"
            return refusal(413, sentence, {"connection": "close"})
        asked = Asked(
            query=scope.get("query_string", b"").decode("latin-1"),
            headers={
                name.lower().decode(): value.decode("latin-1")
                for name, value in scope["headers"]
                if name.lower() in TOLD
            },
            body=body,
            left_s=max(0.0, until_s - self._clock()),
        )
        try:
            return await self._batches.answer(asked)
        except Exception:
            logging.getLogger(__name__).exception("a batch was not answered")
            return refusal(500, DEFECT)

    async def _wait(self) -> SentAway | None:
        """Wait for one's turn; gives what is said if it does not come in time."""
        arrival = self.line.arrive(self._clock())
        if isinstance(arrival, SentAway) or arrival.begins:
            return arrival if isinstance(arrival, SentAway) else None
        return await self._turn_of(arrival)

    async def _turn_of(self, arrival: Arrival) -> SentAway | None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting[arrival.ticket] = turn
        try:
            await asyncio.wait_for(turn, self._rules.longest_wait_s)
        except TimeoutError:
            return self.line.give_up(arrival.ticket)
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave(answered=False)  # its turn had come
            else:
                self.line.give_up(arrival.ticket)
            raise
        finally:
            self._waiting.pop(arrival.ticket, None)
        return None

    def _leave(self, *, answered: bool) -> None:
        ticket = self.line.leave(self._clock(), answered=answered)
        while ticket is not None:
            turn = self._waiting.get(ticket)
            if turn is not None and not turn.done():
                turn.set_result(None)
                return
            ticket = self.line.leave(self._clock(), answered=False)  # it has just given up


async def _whole(receive: Any, most_bytes: int) -> bytes | None:
    """Return a request's body; None if it is too large, of which as much again is thrown away."""
    parts: list[bytes] = []
    num_bytes = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b""  # its caller has gone
        num_bytes += len(message.get("body", b""))
        if num_bytes > most_bytes:
            await _drain(receive)
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


async def refuse(
    scope: Any,
    receive: Any,
    send: Any,
    status: int,
    sentence: str,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Answer a request with an error, at once, then throw away what its caller still sends.

    The web server throws a short body away itself, if the connection stays open.
    """
    body = json.dumps({"error": sentence}).encode()
    declared = b"".join(_headers(scope, b"content-length"))
    closes = scope.get("http_version") == "1.0" or _headers(scope, b"connection")
    short = declared.isdigit() and int(declared) <= SHORT_BYTES and not closes
    told = {"content-type": "application/json", "content-length": str(len(body))}
    told |= headers or {}
    if not short:
        told["connection"] = "close"
    pairs = [(name.encode(), value.encode()) for name, value in told.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    if short:
        await send({"type": "http.response.body", "body": body})
        return
    await send({"type": "http.response.body", "body": body, "more_body": True})
    if not _headers(scope, b"expect"):  # it waits for our word before it sends a body
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_drain(receive), DRAINED_S)
    await send({"type": "http.response.body", "body": b""})


async def _drain(receive: Any) -> None:
    num_bytes = 0
    while num_bytes <= DRAINED_BYTES:
        message = await receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            return
        num_bytes += len(message.get("body", b""))


def _headers(scope: Any, name: bytes) -> list[bytes]:
    return [value for named, value in scope["headers"] if named.lower() == name]
