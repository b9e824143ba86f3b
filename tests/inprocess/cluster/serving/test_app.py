"""What the server answers, and what it refuses."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from downpour.cluster.serving import key
from downpour.cluster.serving.app import Classifier, ServeConfig
from tests.helpers.odd_headers import patched
from tests.helpers.trained import (
    NAMES,
    as_file,
    coloured,
)


class _Request:
    """What Starlette hands over, as far as it is used."""

    def __init__(self, method: str, path: str, body: bytes = b"", key: str = "") -> None:
        self.method = method
        self.headers = {"authorization": f"Bearer {key}"} if key else {}
        self.url = type("Url", (), {"path": path})
        self._body = body

    async def stream(self) -> Any:
        for start in range(0, len(self._body), 1000):
            yield self._body[start : start + 1000]


class TestClassifier:
    def _ask(self, classifier: Classifier, request: _Request) -> tuple[int, dict[str, Any]]:
        async def predict(data: bytes) -> Any:
            return classifier.predict([data])[0]

        return asyncio.run(classifier.answer(request, predict))

    def test_answers_and_refusals(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        digest, config = key.digest("Bearer k"), ServeConfig(top=2)
        classifier = Classifier(
            [str(place / "one")], best=False, weights=None, config=config, digest=digest
        )
        image = as_file(coloured(1, 3)[0][0])
        ok = _Request("POST", "/predict", image, "k")
        status, answer = self._ask(classifier, ok)
        assert status == 200
        assert len(answer["predictions"]) == 2
        assert answer["predictions"][0]["class"] in NAMES
        for request, status, words in (
            (_Request("POST", "/predict", image), 401, "key is missing"),
            (_Request("POST", "/predict", image, "other"), 401, "key is missing"),
            (_Request("POST", "/predict", image[:200], "k"), 400, "cannot be decoded"),
            (_Request("POST", "/predict", b"hello", "k"), 400, "not an image"),
            (_Request("POST", "/predict", b"", "k"), 400, "empty"),
            (_Request("GET", "/predict", b"", "k"), 405, "POST an image"),
            (_Request("GET", "/", b"", "k"), 404, "POST an image to /predict"),
        ):
            found, answer = self._ask(classifier, request)
            assert found == status
            assert words in answer["error"]
        monkeypatch.setattr("downpour.cluster.serving.app.MAX_BODY_BYTES", 100)
        assert self._ask(classifier, ok)[0] == 413
        monkeypatch.undo()
        huge = _Request("POST", "/predict", patched("PNG", 9000, 9000), "k")
        status, answer = self._ask(classifier, huge)
        assert (status, "9000x9000" in answer["error"]) == (413, True)
        status, stats = self._ask(classifier, _Request("GET", "/stats", key="k"))
        assert (status, stats["requests"]) == (200, 1)

    def test_refused_settings(self) -> None:
        for values in ({"host": "everywhere"}, {"port": 0}, {"crops": 3}, {"max_batch": 0}):
            with pytest.raises(ValueError, match=next(iter(values)).split("_")[0]):
                ServeConfig(**values)  # type: ignore[arg-type]
