"""What one replica of a server answers: from requests to statuses and JSON.

Plain Python; `app` makes a Serve deployment of it.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from downpour.cluster.serving.server import key
from downpour.cluster.serving.server.batches import Answer, Asked, refusal
from downpour.cluster.serving.server.body import Refused, Sent
from downpour.cluster.serving.server.gate import FULL
from downpour.cluster.serving.server.pictures import Pictures
from downpour.cluster.serving.server.replicas import RETRY_S
from downpour.cluster.serving.server.rows import Rows
from downpour.cluster.serving.settings import MAX_BODY_BYTES, ServeConfig


@dataclass(frozen=True, kw_only=True)
class Item:
    """A request that waits for its batch."""

    content: Any
    """What was sent: an image file, or rows."""
    give_up_s: float
    """When it has waited too long, by the monotonic clock."""


PredictBatch = Callable[[Item], Awaitable[Any]]
"""What is found for a request, computed together with others; or why there is nothing."""


class Requests(Protocol):
    """What the requests to a network are about."""

    wanted: str
    """What a caller posts."""

    def read(self, headers: Mapping[str, str], body: bytes) -> Sent:
        """Return what was sent; raises `Refused`."""

    def check(self, content: Any) -> None:
        """Look at it before it waits for its batch; raises `Refused`."""

    def together(self, several: Sequence[Any]) -> Sequence[Any]:
        """Return what is found for each of several, or why there is nothing."""

    def told(self, found: Any, top: int) -> dict[str, Any]:
        """Return the answer as plain data."""


class Classifier:
    """Answers requests with the networks of some runs, as an ensemble."""

    def __init__(
        self,
        runs: Sequence[str],
        *,
        best: bool,
        weights: str | None,
        config: ServeConfig,
        digest: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Load the runs' weights. `digest` is of the header that callers have to show."""
        import torch

        from downpour.cluster.serving import inference
        from downpour.workers.evaluation.predictor import Predictor

        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        loaded = inference.load_all(
            [Path(run) for run in runs],
            best=best,
            weights=weights,
            orientation=config.orientation,
        )
        predictor = Predictor([run.network for run in loaded], crops=config.crops)
        columns, names = loaded[0].network.spec.columns, loaded[0].class_names
        self._requests_of: Requests = (
            Rows(predictor, columns, names) if columns.inputs else Pictures(predictor, names)
        )
        self._config = config
        self._digest = digest
        self._clock = clock
        self._requests = self._batches = self._largest = 0

    async def answer(
        self, request: Any, predict_batch: PredictBatch
    ) -> tuple[int, dict[str, Any], Mapping[str, str]]:
        """Return the status, the JSON and further headers for a request that Serve hands on.

        `predict_batch` gets what has been checked.
        """
        try:
            return 200, await self._answer(request, predict_batch), {}
        except Refused as error:
            return error.status, {"error": str(error)}, error.headers

    def answer_all(self, batch: Sequence[Asked]) -> list[Answer]:
        """Return the answers to requests that the gate has let in, each by itself."""
        now = self._clock()
        found: dict[int, Answer] = {}
        items: dict[int, tuple[Item, int]] = {}
        for place, asked in enumerate(batch):
            try:
                query = dict(urllib.parse.parse_qsl(asked.query, keep_blank_values=True))
                content, top = self._read(query, asked.headers, asked.body)
                items[place] = Item(content=content, give_up_s=now + asked.left_s), top
            except Refused as error:
                found[place] = refusal(error.status, str(error), error.headers)
        answers = self.predict([item for item, _ in items.values()])
        for (place, (_, top)), answer in zip(items.items(), answers, strict=True):
            if isinstance(answer, Refused):
                found[place] = refusal(answer.status, str(answer), answer.headers)
            else:
                told = self._requests_of.told(answer, top)
                body = json.dumps(told, separators=(",", ":"))
                found[place] = Answer(status=200, body=body.encode())
        return [found[place] for place in range(len(batch))]

    def _read(
        self, query: Mapping[str, str], headers: Mapping[str, str], body: bytes
    ) -> tuple[Any, int]:
        """Return what was sent, looked at, and how many classes are asked for."""
        asked = _top(query)
        sent = self._requests_of.read(headers, body)
        top = asked or _top(sent.fields) or self._config.top
        self._requests_of.check(sent.content)
        return sent.content, top

    async def _answer(self, request: Any, predict_batch: PredictBatch) -> dict[str, Any]:
        began_s = self._clock()
        # Serve's proxy has checked the key already, unless it ran before this deployment.
        if not key.admits(self._digest, request.headers.get("authorization", "")):
            raise Refused(401, key.REFUSED, {"www-authenticate": "Bearer"})
        path, method, wanted = request.url.path, request.method, self._requests_of.wanted
        if path not in ("/predict", "/stats"):
            raise Refused(404, f"there is nothing at {path}: POST {wanted} to /predict")
        allowed = "POST" if path == "/predict" else "GET"
        if method != allowed:
            what = f"POST {wanted} to it" if path == "/predict" else "GET it"
            raise Refused(405, f"{method} is not for {path}: {what}", {"allow": allowed})
        if path == "/stats":
            return dict(self.stats())
        body = await self._body(request)
        content, top = await asyncio.to_thread(
            self._read, request.query_params, request.headers, body
        )
        give_up_s = began_s + self._config.longest_wait_s
        found = await predict_batch(Item(content=content, give_up_s=give_up_s))
        if isinstance(found, Refused):
            raise found
        return await asyncio.to_thread(self._requests_of.told, found, top)

    async def _body(self, request: Any) -> bytes:
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > MAX_BODY_BYTES:
                raise Refused(413, f"the body has more than {MAX_BODY_BYTES:,} bytes")
        return bytes(data)

    def predict(self, items: Sequence[Item]) -> list[Any]:
        """Return what is found for each request, or why there is nothing."""
        now = self._clock()
        late = Refused(503, FULL.format(RETRY_S), {"retry-after": str(RETRY_S)})
        found: list[Any] = [late] * len(items)
        places = [i for i, item in enumerate(items) if now <= item.give_up_s]
        if not places:
            return found
        self._requests += len(places)
        self._batches += 1
        self._largest = max(self._largest, len(places))
        answers = self._requests_of.together([items[place].content for place in places])
        for place, answer in zip(places, answers, strict=True):
            found[place] = answer
        return found

    def stats(self) -> Mapping[str, int]:
        """Return the images and batches so far, and the largest batch."""
        return {
            "requests": self._requests,
            "batches": self._batches,
            "largest_batch": self._largest,
        }


def _top(values: Mapping[str, str]) -> int | None:
    """Return how many classes a caller asks for; None if it does not say."""
    unknown = sorted(set(values) - {"top"})
    if unknown:
        raise Refused(400, f"{unknown[0]!r} is not known here: only 'top' can be given")
    if "top" not in values:
        return None
    text = values["top"]
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= 10**6):
        raise Refused(400, f"top is {text[:20]!r}: give a number of classes, 1 or more")
    return int(text[:9])
