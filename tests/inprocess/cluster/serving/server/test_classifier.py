"""What the server answers, and what it refuses."""

import asyncio
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from downpour.cluster.serving import inference
from downpour.cluster.serving.prediction import predict
from downpour.cluster.serving.server import key
from downpour.cluster.serving.server.batches import Asked
from downpour.cluster.serving.server.body import Refused
from downpour.cluster.serving.server.classifier import Classifier, Item
from downpour.cluster.serving.settings import ServeConfig
from downpour.workers.evaluation.predictor import Predictor
from tests.helpers.odd_headers import patched
from tests.helpers.oriented import oriented
from tests.helpers.trained import NAMES, as_file, coloured

IMAGE = as_file(coloured(1, 3)[0][0])


class _Request:
    """What Starlette hands over, as far as it is used."""

    def __init__(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        key: str = "k",
        query: Mapping[str, str] | None = None,
        **headers: str,
    ) -> None:
        self.method = method
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.headers = ({"authorization": f"Bearer {key}"} if key else {}) | named
        self.url = type("Url", (), {"path": path})
        self.query_params = dict(query or {})
        self._body = body

    async def stream(self) -> Any:
        for start in range(0, len(self._body), 1000):
            yield self._body[start : start + 1000]


def _post(body: bytes = IMAGE, **more: Any) -> _Request:
    return _Request("POST", "/predict", body, **more)


@pytest.fixture(scope="module")
def classifier(place: Path) -> Classifier:
    digest, config = key.digest("Bearer k"), ServeConfig(top=2)
    runs = [str(place / "one")]
    return Classifier(runs, best=False, weights=None, config=config, digest=digest)


def _ask(
    classifier: Classifier, request: _Request
) -> tuple[int, dict[str, Any], Mapping[str, str]]:
    async def predict_alone(item: Item) -> Any:
        return classifier.predict([item])[0]

    return asyncio.run(classifier.answer(request, predict_alone))


def test_answers_as_predict_does(classifier: Classifier, place: Path) -> None:
    status, answer, _ = _ask(classifier, _post())
    assert status == 200
    trained = inference.load(place / "one")
    (expected,) = predict(
        Predictor([trained.network]), trained.class_names, [IMAGE], ["a.png"], top=2
    )
    assert answer["predictions"] == expected.classes
    assert answer["predictions"][0]["class"] in NAMES
    upright = coloured(1, 3, side=40)[0][0]
    upright[:20] = 255
    answers = [_ask(classifier, _post(oriented(upright, turned, "PNG"))) for turned in range(1, 9)]
    assert all(found == answers[0] for found in answers)


def test_as_many_classes_as_a_caller_asks_for(classifier: Classifier) -> None:
    for top, count in (("1", 1), ("3", 3), ("99", len(NAMES))):
        status, answer, _ = _ask(classifier, _post(query={"top": top}))
        assert (status, len(answer["predictions"])) == (200, count)
    for top in ("0", "-1", "x", "1.5", "", "9" * 400):
        status, answer, _ = _ask(classifier, _post(query={"top": top}))
        assert (status, "give a number of classes" in answer["error"]) == (400, True)
    status, answer, _ = _ask(classifier, _post(query={"pot": "1"}))
    assert (status, "'pot' is not known" in answer["error"]) == (400, True)


def test_a_form_is_answered_like_its_file(classifier: Classifier) -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n%s\r\n'
    top = b'--b\r\nContent-Disposition: form-data; name="top"\r\n\r\n1\r\n'
    kind = "multipart/form-data; boundary=b"
    plain = _ask(classifier, _post())
    assert _ask(classifier, _post(form % IMAGE + b"--b--", content_type=kind)) == plain
    one = _ask(classifier, _post(form % IMAGE + top + b"--b--", content_type=kind))
    assert one[1]["predictions"] == plain[1]["predictions"][:1]


@pytest.mark.parametrize(
    ("request_", "status", "words", "header"),
    [
        (_post(key=""), 401, "key is missing", ("www-authenticate", "Bearer")),
        (_post(key="other"), 401, "key is missing", ("www-authenticate", "Bearer")),
        (_post(IMAGE[:200]), 400, "the image cannot be decoded", None),
        (_post(b"hello"), 415, "not an image of a format", ("accept-post", "image/*")),
        (_post(b"{}", content_type="application/json"), 415, "json", ("accept-post", "image/*")),
        (_post(b""), 400, "empty", None),
        (_post(patched("PNG", 9000, 9000)), 413, "9000x9000", None),
        (_Request("GET", "/predict"), 405, "POST an image", ("allow", "POST")),
        (_Request("POST", "/stats"), 405, "GET it", ("allow", "GET")),
        (_Request("GET", "/"), 404, "POST an image to /predict", None),
    ],
)
def test_refusals(
    classifier: Classifier,
    request_: _Request,
    status: int,
    words: str,
    header: tuple[str, str] | None,
) -> None:
    found, answer, headers = _ask(classifier, request_)
    assert (found, words in answer["error"]) == (status, True)
    if header is not None:
        assert headers[header[0]].startswith(header[1])


def test_a_body_that_is_too_large(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("downpour.cluster.serving.server.classifier.MAX_BODY_BYTES", 100)
    assert _ask(classifier, _post())[0] == 413


def test_a_batch_answers_each_by_itself(classifier: Classifier) -> None:
    """One that has waited too long and one that is damaged cost the others nothing."""
    before = classifier.stats()["requests"]
    later = time.monotonic() + 60
    bad, late = IMAGE[:200], time.monotonic() - 1
    items = [
        Item(content=image, give_up_s=until)
        for image, until in ((IMAGE, later), (bad, later), (IMAGE, late), (IMAGE, later))
    ]
    first, damaged, waited, last = classifier.predict(items)
    (answer, one), (same, other) = first, last
    assert same is answer
    torch.testing.assert_close(answer.probabilities[one], answer.probabilities[other])
    assert isinstance(damaged, Refused)
    assert isinstance(waited, Refused)
    assert (damaged.status, waited.status) == (400, 503)
    assert waited.headers["retry-after"] == "1"
    assert classifier.stats()["requests"] == before + 3
    with pytest.raises(ValueError, match="longest wait"):
        ServeConfig(longest_wait_s=0)


def test_a_batch_from_the_gate_is_answered_as_each_alone(classifier: Classifier) -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n%s\r\n--b--'
    multipart = {"content-type": "multipart/form-data; boundary=b"}
    kinds: list[tuple[str, dict[str, str], bytes]] = [
        ("", {}, IMAGE),
        ("top=1", {}, IMAGE),
        ("", {}, b"hello"),
        ("top=x", {}, IMAGE),
        ("", multipart, form % IMAGE),
        ("", {"content-type": "application/json"}, b"{}"),
        ("", {}, IMAGE[:200]),
    ]
    batch = [Asked(query=q, headers=h, body=body, left_s=60) for q, h, body in kinds]
    late = Asked(query="", headers={}, body=IMAGE, left_s=-1)
    *found, waited = classifier.answer_all([*batch, late])
    for (query, headers, body), answer in zip(kinds, found, strict=True):
        named = {name.replace("-", "_"): value for name, value in headers.items()}
        asked = dict(part.split("=") for part in query.split("&") if part)
        status, told, more = _ask(classifier, _post(body, query=asked, **named))
        assert (answer.status, dict(answer.headers)) == (status, dict(more))
        mine = json.loads(answer.body)
        assert list(mine) == list(told)
        for one, other in zip(
            mine.get("predictions", ()), told.get("predictions", ()), strict=True
        ):
            assert one["class"] == other["class"]
            assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)
    assert [answer.status for answer in found] == [200, 200, 415, 400, 200, 415, 400]
    assert (waited.status, waited.headers["retry-after"]) == (503, "1")


def test_refused_settings() -> None:
    for values in ({"host": "everywhere"}, {"port": 0}, {"crops": 3}, {"max_batch": 0}):
        with pytest.raises(ValueError, match=next(iter(values)).split("_")[0]):
            ServeConfig(**values)  # type: ignore[arg-type]
