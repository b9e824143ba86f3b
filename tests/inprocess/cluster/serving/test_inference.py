"""Runs put to use: evaluate, recalibrate, predict, export, and what answers over HTTP.

The run is made here: a small Inception fitted for a few steps to images of four colours.
"""

import asyncio
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from downpour.cluster.cli.commands import downpour
from downpour.cluster.config import recipes
from downpour.cluster.config.derive import model_spec
from downpour.cluster.config.options import apply
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError, run_cli
from downpour.cluster.run.folder import RunFolder
from downpour.cluster.serving import inference, key
from downpour.cluster.serving.app import Classifier, ServeConfig
from downpour.cluster.serving.export import export
from downpour.shuffler.dataset.reader import RowReader
from downpour.shuffler.dataset.records import Dataset
from downpour.workers.evaluation.disagreement import disagreement
from downpour.workers.evaluation.evaluator import Evaluator, Score, population_statistics
from downpour.workers.evaluation.predictor import Predictor, decode_any_size, rows_of
from tests.helpers.tiny import write_split

NAMES = ("red", "green", "blue", "grey")
SIDE = 32
torch.set_num_threads(1)


def _pixels(count: int, seed: int, side: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    pixels = rng.integers(0, 90, (count, side, side, 3))
    for row, label in enumerate(labels):
        bright = rng.integers(40, 150)
        if label < 3:
            pixels[row, :, :, label] += bright
        else:
            pixels[row] += bright // 2
    return pixels.astype(np.uint8), labels.astype(np.int64)


def _config(data: Path, **given: object) -> RunConfig:
    options = {"width": 0.0625, "image_size": 28, "stem_stride": 2, "num_classes": 4}
    options |= {"data": str(data), "eval_split": "test"}
    return apply(recipes.find("bn-x5"), options | given)


def _file(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset and two runs on it."""
    folder = tmp_path_factory.mktemp("inference")
    write_split(folder / "data", "train", *_pixels(320, 1))
    write_split(folder / "data", "test", *_pixels(90, 2), shards=1)
    for name, seed in (("one", 1), ("two", 2)):
        _make_run(folder / name, _config(folder / "data", seed=seed))
    return folder


def _make_run(path: Path, config: RunConfig) -> None:
    folder = RunFolder.create(path, config)
    folder.write_json("data.json", {"train_fingerprint": "", "class_names": list(NAMES)})
    spec = model_spec(config)
    flat = spec.build_flat("cpu")
    rows, labels = _training_rows(config)
    inputs = torch.from_numpy(decode_any_size(rows, spec))
    gradient = flat.gradient
    assert gradient is not None
    flat.module.train()
    for step in range(24):
        part = slice(step % 10 * 32, step % 10 * 32 + 32)
        gradient.zero_()
        functional.cross_entropy(flat.module(inputs[part]), labels[part]).backward()  # type: ignore[no-untyped-call]
        flat.weights.add_(gradient, alpha=-0.05)
    parts = list(zip(inputs.split(32), labels.split(32), strict=True))  # type: ignore[no-untyped-call]
    evaluator = Evaluator(spec, lambda: parts)
    evaluator.weights.copy_(flat.weights)
    evaluator.statistics.copy_(population_statistics(flat, parts))
    evaluator.save(
        str(path / "model.safetensors"),
        versions=[24],
        score=Score(accuracy=0, loss=0, num_examples=0),
    )


def _training_rows(config: RunConfig) -> tuple[Any, torch.Tensor]:
    dataset = Dataset.open(config.data.data, "train")
    reader = RowReader(dataset, num_classes=4)
    rows = reader.take(np.arange(dataset.num_rows))
    reader.close()
    return rows, torch.from_numpy(rows.column("label").to_numpy().copy())


def _run(*arguments: object, capsys: pytest.CaptureFixture[str]) -> Any:
    status = run_cli(downpour, [str(a) for a in arguments])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out)


def _failure(*arguments: object, capsys: pytest.CaptureFixture[str]) -> str:
    status = run_cli(downpour, [str(a) for a in arguments])
    captured = capsys.readouterr()
    assert (status, captured.out) == (2, "")
    assert captured.err.startswith("downpour: error: ")
    assert len(captured.err.splitlines()) == 1
    return captured.err


class TestEvaluate:
    def test_crops_and_ensembles(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        one = _run("evaluate", place / "one", capsys=capsys)
        assert one["accuracy"] > 0.5
        assert one["top5_accuracy"] == 1, "there are but four classes"
        assert one["examples"] == 90
        ten = _run("evaluate", place / "one", "--crops", 10, capsys=capsys)
        both = _run("evaluate", place / "one", place / "two", "--crops", 10, capsys=capsys)
        assert ten["crops"] == 10
        assert ten["loss"] != one["loss"]
        assert both["loss"] != ten["loss"]
        assert len(both["run"]) == 2

    def test_one_crop_is_what_training_scores(
        self, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from downpour.workers.evaluation.split import SplitBatches

        config = RunFolder.open(place / "one").config()
        spec = model_spec(config)
        evaluator = Evaluator(spec, SplitBatches(spec, config.data.data, "test"))
        evaluator.load(str(place / "one" / "model.safetensors"))
        score = evaluator.score()
        told = _run("evaluate", place / "one", capsys=capsys)
        assert told["accuracy"] == score.accuracy
        assert told["loss"] == pytest.approx(score.loss, abs=1e-4)

    def test_an_ensemble_averages_probabilities(self, place: Path) -> None:
        networks = [inference.load(place / name).network for name in ("one", "two")]
        rows = rows_of([_file(image) for image in _pixels(5, 9)[0]])
        alone = [Predictor([network]).probabilities(rows) for network in networks]
        together = Predictor(networks).probabilities(rows)
        torch.testing.assert_close(together, (alone[0] + alone[1]) / 2)
        torch.testing.assert_close(together.sum(1), torch.ones(5))

    def test_crops_of_an_image_are_averaged(self, place: Path) -> None:
        network = inference.load(place / "one").network
        rows = rows_of([_file(image) for image in _pixels(2, 9, side=50)[0]])
        from downpour.shuffler.images.decode import decode_views

        views, _ = decode_views(rows, network.spec.image, 144)
        assert views.shape[:2] == (2, 144)
        with torch.inference_mode():
            each = network.model.module(torch.from_numpy(views[1])).softmax(1)
        found = Predictor([network], crops=144).probabilities(rows)[1]
        torch.testing.assert_close(found, each.mean(0), rtol=1e-4, atol=1e-5)

    def test_what_cannot_be_an_ensemble(
        self, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(place / "one", tmp_path / "other")
        config = json.loads((tmp_path / "other" / "config.json").read_text())
        config["model"]["num_classes"] = 5
        (tmp_path / "other" / "config.json").write_text(json.dumps(config))
        error = _failure("evaluate", place / "one", tmp_path / "other", capsys=capsys)
        assert "use one of the same model and options" in error


class TestRecalibrate:
    def test_statistics_of_other_data(
        self, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pixels, labels = _pixels(160, 5)
        write_split(tmp_path, "train", 255 - pixels, labels)
        output = tmp_path / "new.safetensors"
        told = _run(
            "recalibrate", place / "one", "--data", tmp_path, "--output", output, capsys=capsys
        )
        assert told["mini_batches"] == 5
        assert told["disagreement"] > 0.1, "the images were inverted"
        before, after = (
            inference.load(place / "one", weights=weights).network.model
            for weights in (None, str(output))
        )
        assert torch.equal(before.weights, after.weights)
        assert not torch.equal(before.statistics, after.statistics)

    def test_on_the_training_split_it_agrees(
        self, place: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        told = _run("recalibrate", place / "two", capsys=capsys)
        assert told["disagreement"] < 0.05
        assert (place / "two" / "recalibrated.safetensors").is_file()
        scored = _run(
            "evaluate", place / "two", "--weights", "recalibrated.safetensors", capsys=capsys
        )
        assert scored["weights"] == "recalibrated.safetensors"

    def test_disagreement_by_hand(self) -> None:
        kept = torch.tensor([[0.0, 1.0], [4.0, 1.0]])
        recomputed = torch.tensor([[2.0, 1.0], [4.0, 9.0]])
        assert disagreement(kept, kept) == 0
        # Feature 0 shifts by 1 standard deviation, feature 1 is 3 times as wide: (1 + 4)/2.
        assert disagreement(kept, recomputed, eps=0) == pytest.approx(2.5**0.5)


class TestPredict:
    def test_is_what_evaluate_finds(
        self, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pixels, labels = _pixels(10, 7)
        write_split(tmp_path / "data", "test", pixels, labels, shards=1)
        paths = []
        for i, image in enumerate(pixels):
            paths.append(tmp_path / f"{i}.png")
            paths[-1].write_bytes(_file(image))
        told = _run("predict", place / "one", *paths, "--top", 4, "--json", capsys=capsys)
        hits = [
            t["predictions"][0]["label"] == label for t, label in zip(told, labels, strict=True)
        ]
        scored = _run("evaluate", place / "one", "--data", tmp_path / "data", capsys=capsys)
        assert scored["accuracy"] == sum(hits) / 10
        nats = [
            -np.log(next(p["probability"] for p in t["predictions"] if p["label"] == label))
            for t, label in zip(told, labels, strict=True)
        ]
        assert scored["loss"] == pytest.approx(np.mean(nats), abs=1e-4)
        assert {p["class"] for p in told[0]["predictions"]} == set(NAMES)

    def test_any_size_and_format(self, place: Path, tmp_path: Path) -> None:
        big = tmp_path / "big.jpg"
        big.write_bytes(_file(_pixels(1, 3, side=120)[0][0], "JPEG"))
        assert run_cli(downpour, ["predict", str(place / "one"), str(big)]) == 0

    @pytest.mark.parametrize("content", [b"no image at all", b"\xff\xd8\xff\xe0 cut short"])
    def test_what_is_no_image(
        self, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
    ) -> None:
        bad = tmp_path / "bad.jpg"
        bad.write_bytes(content)
        assert "bad.jpg" in _failure("predict", place / "one", bad, capsys=capsys)

    def test_wrong_words(
        self, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        one = place / "one"
        assert "nothing.png" in _failure("predict", one, tmp_path / "nothing.png", capsys=capsys)
        assert "there are no weights x" in _failure(
            "evaluate", one, "--weights", "x", capsys=capsys
        )
        assert "best.safetensors does not exist" in _failure(
            "evaluate", one, "--best", capsys=capsys
        )


class TestExport:
    @pytest.mark.parametrize("kind", ["onnx", "torch"])
    def test_agrees_with_the_checkpoint(self, place: Path, tmp_path: Path, kind: Any) -> None:
        run = inference.load(place / "one")
        path = tmp_path / "model"
        told = export(run, path, format=kind, batches=5)
        assert told["largest_difference"] <= 1e-4
        assert 0 <= told["disagreement"] < 0.25
        inputs = torch.rand(7, 3, 28, 28)
        with torch.inference_mode():
            expected = run.network.model.module(inputs)
        if kind == "onnx":
            import onnxruntime

            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            found = torch.from_numpy(session.run(None, {"images": inputs.numpy()})[0])
            assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == [*NAMES]
            operators = {node.op_type for node in _onnx(path).graph.node}
            assert "BatchNormalization" not in operators
        else:
            program = torch.export.load(io.BytesIO(path.read_bytes()))
            found = program.module()(inputs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert [p.name for p in tmp_path.iterdir()] == ["model"]

    def test_refused_where_the_statistics_are_not_the_weights(
        self, place: Path, tmp_path: Path
    ) -> None:
        run = inference.load(place / "one")
        run.network.model.statistics[0].add_(1.0)
        with pytest.raises(UserError, match="recalibrate the run"):
            export(run, tmp_path / "model.onnx", format="onnx", batches=5)
        assert not list(tmp_path.iterdir())

    def test_a_file_that_disagrees_is_not_kept(
        self, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = inference.load(place / "one")
        wrong = run.network.folded()
        with torch.no_grad():
            next(wrong.parameters()).mul_(1.1)
        monkeypatch.setattr(type(run.network), "folded", lambda _self: wrong)
        with pytest.raises(UserError, match="was not kept"):
            export(run, tmp_path / "model.pt2", format="torch", batches=5)
        assert not list(tmp_path.iterdir())


def _onnx(path: Path) -> Any:
    import onnx

    return onnx.load(str(path))


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
        image = _file(_pixels(1, 3)[0][0])
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
        monkeypatch.setattr("downpour.cluster.serving.app.MAX_PIXELS", 100)
        assert self._ask(classifier, ok)[0] == 413
        status, stats = self._ask(classifier, _Request("GET", "/stats", key="k"))
        assert (status, stats["requests"]) == (200, 1)

    def test_refused_settings(self) -> None:
        for values in ({"host": "everywhere"}, {"port": 0}, {"crops": 3}, {"max_batch": 0}):
            with pytest.raises(ValueError, match=next(iter(values)).split("_")[0]):
                ServeConfig(**values)  # type: ignore[arg-type]
