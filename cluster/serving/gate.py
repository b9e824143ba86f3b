"""What stands before Serve in its HTTP proxy: the key, the size of a body, and the line.

    401   without the key, whatever is asked for, Serve's own routes included
    413   for a body that says that it is too large
    503   if the line of requests is too long (`line`), with Retry-After

It is an ASGI middleware, which Serve's proxy loads by the name in an environment variable. A body
that is refused is read and thrown away, up to a bound: a caller that is still sending it could
not read the answer otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from downpour.cluster.serving import key
from downpour.cluster.serving.line import Arrival, Line, LineBounds, SentAway

LOADED_BY = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Variable of Ray's processes: the function that gives Serve's HTTP proxy its middlewares."""
RULES = "DOWNPOUR_SERVE_GATE"
"""Variable of Ray's processes: the gate's rules, as JSON."""
WAITED = b"x-downpour-waited"
"""Header for the replica: seconds that a request has waited here. Callers cannot send it."""
SHORT_BYTES = 32 << 10
"""Most of a body that is not waited for."""
DRAINED_BYTES = 512 << 20
DRAINED_S = 10.0
"""Most that is read, and for how long, of a body that is refused."""
FULL = "too many requests wait already: send this one again in {} s"


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

    return [Middleware(Gate, GateRules(**json.loads(os.environ[RULES])))]


class Gate:
    """ASGI middleware that lets in callers with the key, as many as can be answered in time."""

    def __init__(
        self, app: Any, rules: GateRules, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`app` is what lies behind it."""
        self._app, self._rules, self._clock = app, rules, clock
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
        if scope["type"] == "http" and scope["method"] == "POST":
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

        async def watched(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        waited = f"{self._clock() - began_s:.3f}".encode()
        others = [(name, value) for name, value in scope["headers"] if name.lower() != WAITED]
        try:
            await self._app({**scope, "headers": [*others, (WAITED, waited)]}, receive, watched)
        finally:
            self._leave(answered=status < 500)

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
