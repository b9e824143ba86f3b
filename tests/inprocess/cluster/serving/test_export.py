"""Exported networks do what their checkpoints do, or are refused."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from downpour.cluster.errors import UserError
from downpour.cluster.serving import inference
from downpour.cluster.serving.export import export
from tests.helpers.trained import NAMES


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
