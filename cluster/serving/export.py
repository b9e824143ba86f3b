"""A run's network as a file for other programs: ONNX or torch.export, BN folded.

A file is kept only if it can be read back and its outputs agree with those of the checkpoint, whose
BN is not folded, on images of the evaluation split. The export is refused if the moving statistics
differ from those that Algorithm 2 computes for the weights: the network would then do in use
something else than in training.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from downpour.cluster.errors import UserError
from downpour.cluster.serving.inference import Trained, recomputed_statistics, rows_of_split
from downpour.models.outputs import MainOutput, main_output
from downpour.paramserver import durable
from downpour.shuffler.dataset.records import Dataset
from downpour.workers.evaluation.disagreement import disagreement
from downpour.workers.evaluation.predictor import decode_any_size

Format = Literal["onnx", "torch"]
SUFFIX = {"onnx": ".onnx", "torch": ".pt2"}
TOLERANCE = 1e-4
"""Most that outputs may differ by, as a share of the largest output, or of 1 if that is more."""
CHECKED_ROWS = 64


def export(
    run: Trained,
    output: Path,
    *,
    format: Format,
    data: str | None = None,
    batches: int = 100,
    max_disagreement: float | None = 0.25,
) -> dict[str, Any]:
    """Write the folded network to `output`, whole and checked, or not at all.

    Args:
        run: the weights to export.
        output: the file to write.
        format: `onnx`, or `torch` for torch.export.
        data: folder or URI with the shards; None takes the run's.
        batches: mini-batches that Algorithm 2 is given.
        max_disagreement: most that moving and recomputed statistics may differ, in standard
            deviations; None does not compare them.

    Returns:
        What was written and how well it agrees, as plain data.

    Raises:
        UserError: the statistics disagree, the file's outputs do not agree with the checkpoint's,
            or the file cannot be written.
    """
    if not output.parent.is_dir():
        raise UserError(f"the folder of {output} does not exist: make it, or give another --output")
    apart = None
    if max_disagreement is not None and run.network.model.layout.num_features:
        statistics, _ = recomputed_statistics(run, data=data, split=None, batches=batches)
        apart = disagreement(run.network.model.statistics, statistics)
        if apart > max_disagreement:
            raise UserError(
                f"the BN statistics that training kept and those of Algorithm 2 differ by "
                f"{apart:.3g} of a standard deviation, more than --max-disagreement "
                f"{max_disagreement:g}: recalibrate the run and export the result with --weights"
            )
    inputs, expected = _examples(run, data)
    partial = output.with_name(f".partial.{output.name}")  # PyTorch looks at the ending
    try:
        _write(run, inputs, partial, format)
        difference = _difference(_read_back(partial, inputs, format), expected)
        if not difference <= TOLERANCE:
            raise UserError(
                f"the exported network's outputs differ by {difference:.2g} of the checkpoint's, "
                f"more than {TOLERANCE:g}: the file was not kept"
            )
        with durable.replacing(output, str(partial)):
            pass  # the file is there, and has been read back
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
    return {
        "written": str(output),
        "format": format,
        "bytes": output.stat().st_size,
        "checked_on": len(inputs),
        "largest_difference": difference,
        "disagreement": apart,
    }


def _examples(run: Trained, data: str | None) -> tuple[Tensor, Tensor]:
    """Return inputs of the evaluation split, and the outputs of the network that is not folded."""
    config, network = run.config, run.network
    source = data or config.data.data
    count = config.model.num_classes
    dataset = Dataset.open(source, config.data.eval_split)
    with rows_of_split(dataset, count, rows=CHECKED_ROWS) as rows:
        decoded = decode_any_size(next(rows), network.spec.image, on_bad_image="skip")
    if not len(decoded.kept):
        raise UserError(f"there is no image to check the export on: {decoded.problems[0]}")
    inputs = torch.from_numpy(decoded.inputs)
    with torch.inference_mode():
        outputs = main_output(network.model.module(inputs))
    return inputs, outputs


def _write(run: Trained, inputs: Tensor, path: Path, format: Format) -> None:
    folded = run.network.folded()
    with torch.inference_mode():
        if not isinstance(folded(inputs[:2]), Tensor):
            folded = MainOutput(folded).eval()
    labels = json.dumps(list(run.class_names))
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    # Two examples: a single one would make the batch's length a constant.
    arguments = (inputs[:2].clone(),)
    if format == "torch":
        with _quiet():
            program = torch.export.export(folded, arguments, dynamic_shapes=({0: batch},))
            torch.export.save(program, str(path), extra_files={"classes.json": labels})
        return
    with _quiet():
        made = torch.onnx.export(
            folded,
            arguments,
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: batch},),
            external_data=False,
            verbose=False,
        )
    assert made is not None
    model = made.model_proto
    entry = model.metadata_props.add()
    entry.key, entry.value = "classes", labels
    path.write_bytes(model.SerializeToString())


def _read_back(path: Path, inputs: Tensor, format: Format) -> Tensor:
    """Return the outputs for `inputs` of the network in the file that was written."""
    if format == "torch":
        # By its bytes: the loader goes by a file's ending, and `output` may have any.
        program = torch.export.load(io.BytesIO(path.read_bytes()))
        with torch.inference_mode():
            outputs: Tensor = program.module()(inputs)
        return outputs
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        path.read_bytes(), options, providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"images": inputs.numpy()})
    return torch.from_numpy(found)


def _difference(found: Tensor, expected: Tensor) -> float:
    scale = max(1.0, float(expected.abs().max()))
    return float((found - expected).abs().max()) / scale


@contextlib.contextmanager
def _quiet() -> Any:
    """Silence PyTorch's exporter, which prints its progress and warns of its own future."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
