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
from typing import TYPE_CHECKING, Any

from downpour.cluster.serving.server import key
from downpour.cluster.serving.server.batches import Answer, Asked, refusal
from downpour.cluster.serving.server.body import ACCEPTED, Refused, sent_in
from downpour.cluster.serving.server.gate import FULL
from downpour.cluster.serving.server.replicas import RETRY_S
from downpour.cluster.serving.settings import MAX_BODY_BYTES, ServeConfig
from downpour.shuffler.errors import DecodeError, ImageTooLarge, UnknownFormat

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image that waits for its batch."""

    image: bytes
    give_up_s: float
    """When it has waited too long, by the monotonic clock."""


PredictBatch = Callable[[Item], Awaitable["Tensor | Refused"]]
"""Class probabilities [classes] of an image, computed together with others."""


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
        self._predictor = Predictor([run.network for run in loaded], crops=config.crops)
        self._names = loaded[0].class_names
        self._config = config
        self._digest = digest
        self._clock = clock
        self._tells_classes = True
        self._requests = self._batches = self._largest = 0

    async def answer(
        self, request: Any, predict_batch: PredictBatch
    ) -> tuple[int, dict[str, Any], Mapping[str, str]]:
        """Return the status, the JSON and further headers for a request that Serve hands on.

        `predict_batch` gets images whose headers have been checked.
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
                image, top = self._read(query, asked.headers, asked.body)
                check_image(image)
                items[place] = Item(image=image, give_up_s=now + asked.left_s), top
            except Refused as error:
                found[place] = refusal(error.status, str(error), error.headers)
        answers = self.predict([item for item, _ in items.values()])
        for (place, (_, top)), answer in zip(items.items(), answers, strict=True):
            if isinstance(answer, Refused):
                found[place] = refusal(answer.status, str(answer), answer.headers)
            else:
                body = json.dumps(self._told(answer, top), separators=(",", ":"))
                found[place] = Answer(status=200, body=body.encode())
        return [found[place] for place in range(len(batch))]

    def _read(
        self, query: Mapping[str, str], headers: Mapping[str, str], body: bytes
    ) -> tuple[bytes, int]:
        """Return the image that was sent, and how many classes are asked for."""
        asked = _top(query)
        sent = sent_in(headers, body)
        return sent.image, asked or _top(sent.fields) or self._config.top

    def _told(self, found: Tensor, top: int) -> dict[str, Any]:
        from downpour.cluster.serving.prediction import best_of, numbers_of, those_there

        told = best_of if self._tells_classes else numbers_of
        if self._predictor.task == "multilabel":
            told = those_there
        return {"predictions": told(found, self._names, top)}

    async def _answer(self, request: Any, predict_batch: PredictBatch) -> dict[str, Any]:
        began_s = self._clock()
        # Serve's proxy has checked the key already, unless it ran before this deployment.
        if not key.admits(self._digest, request.headers.get("authorization", "")):
            raise Refused(401, key.REFUSED, {"www-authenticate": "Bearer"})
        path, method = request.url.path, request.method
        if path not in ("/predict", "/stats"):
            raise Refused(404, f"there is nothing at {path}: POST an image to /predict")
        allowed = "POST" if path == "/predict" else "GET"
        if method != allowed:
            what = "POST an image file to it" if path == "/predict" else "GET it"
            raise Refused(405, f"{method} is not for {path}: {what}", {"allow": allowed})
        if path == "/stats":
            return dict(self.stats())
        image, top = self._read(request.query_params, request.headers, await self._body(request))
        await asyncio.to_thread(check_image, image)
        give_up_s = began_s + self._config.longest_wait_s
        found = await predict_batch(Item(image=image, give_up_s=give_up_s))
        if isinstance(found, Refused):
            raise found
        return self._told(found, top)

    async def _body(self, request: Any) -> bytes:
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > MAX_BODY_BYTES:
                raise Refused(413, f"the body has more than {MAX_BODY_BYTES:,} bytes")
        return bytes(data)

    def predict(self, items: Sequence[Item]) -> list[Tensor | Refused]:
        """Return the class probabilities [classes] of each image, or why there are none."""
        now = self._clock()
        late = Refused(503, FULL.format(RETRY_S), {"retry-after": str(RETRY_S)})
        found: list[Tensor | Refused] = [late] * len(items)
        places = [i for i, item in enumerate(items) if now <= item.give_up_s]
        if not places:
            return found
        self._requests += len(places)
        self._batches += 1
        self._largest = max(self._largest, len(places))
        images = [items[place].image for place in places]
        try:
            answers = self._together(images)
        except DecodeError:  # one of them is of a size that the network cannot be shown
            answers = [self._alone(image) for image in images]
        for place, answer in zip(places, answers, strict=True):
            found[place] = answer
        return found

    def _together(self, images: Sequence[bytes]) -> list[Tensor | Refused]:
        from downpour.workers.evaluation.predictor import rows_of

        names = ["the image"] * len(images)
        answer = self._predictor.answer(rows_of(images, names), on_bad_image="skip")
        self._tells_classes = answer.of_classes
        good = dict(zip(answer.kept.tolist(), answer.probabilities, strict=True))
        problems = iter(answer.problems)
        return [good[i] if i in good else Refused(400, next(problems)) for i in range(len(images))]

    def _alone(self, image: bytes) -> Tensor | Refused:
        try:
            return self._together([image])[0]
        except DecodeError as error:
            return Refused(400, str(error))

    def stats(self) -> Mapping[str, int]:
        """Return the images and batches so far, and the largest batch."""
        return {
            "requests": self._requests,
            "batches": self._batches,
            "largest_batch": self._largest,
        }


def check_image(data: bytes) -> None:
    """Check by its header that `data` is an image of a format and a size that are decoded.

    Raises:
        Refused: 415 if it is of no format that is read, 413 if it is too large, 400 if its header
            is damaged.
    """
    from downpour.shuffler.images.bounds import open_image

    try:
        open_image(data).close()
    except UnknownFormat as error:
        raise Refused(415, f"the body cannot be read: {error}", {"accept-post": ACCEPTED}) from None
    except ImageTooLarge as error:
        raise Refused(413, f"the image is too large: {error}") from None
    except DecodeError as error:
        raise Refused(400, f"the image cannot be decoded: {error}") from None


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
