"""Exported networks do what their checkpoints do, or are refused."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from downpour.cluster.errors import UserError
from downpour.cluster.serving import inference
from downpour.cluster.serving.export import export, put_before
from downpour.cluster.serving.prediction import predict
from downpour.cluster.serving.preprocessing import describe
from downpour.workers.evaluation.predictor import Predictor
from tests.helpers.oriented import STORED, oriented
from tests.helpers.trained import NAMES, coloured


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
            assert told["preprocessing"] == "before"
            about = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
            assert about == describe(run.network.spec.image)
            _check_eight_orientations(run, path)
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

    def test_preprocessing_that_cannot_stand_before_a_network(
        self, place: Path, tmp_path: Path
    ) -> None:
        run = inference.load(place / "one")
        with pytest.raises(UserError, match="--with-preprocessing is for --format onnx"):
            export(run, tmp_path / "a", format="torch", with_preprocessing=True)

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


def _check_eight_orientations(run: inference.Trained, path: Path) -> None:
    """With its preprocessing inside, the file answers one photo alike however it is stored, and as
    `predict` does.
    """
    import onnxruntime

    assert put_before(path, run.network.spec.image) <= 1.001 / 255
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    photo = coloured(1, 7, side=90)[0][0][:, :70]
    photo[:30] //= 2
    files = [oriented(photo, turned, "PNG") for turned in range(1, 9)]
    names = [f"{turned}.png" for turned in range(1, 9)]
    predictor = Predictor([run.network])
    found = predict(predictor, run.class_names, files, names, top=4)
    assert all(one.classes == found[0].classes for one in found)
    expected = {p["label"]: p["probability"] for p in found[0].classes}
    for turned in range(1, 9):
        way, image = STORED[turned], Image.fromarray(photo)
        stored = np.asarray(image if way is None else image.transpose(way))
        (logits,) = session.run(None, {"image": stored[None], "orientation": np.array(turned)})
        probabilities = torch.from_numpy(logits[0]).softmax(0)
        for label, probability in expected.items():
            assert float(probabilities[label]) == pytest.approx(probability, abs=0.01)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == [*NAMES]
    assert json.loads(about["preprocessing"])["inside"] == describe(run.network.spec.image)


def _onnx(path: Path) -> Any:
    import onnx

    return onnx.load(str(path))
