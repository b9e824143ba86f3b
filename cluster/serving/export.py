"""A run's network as a file for other programs: ONNX or torch.export, BN folded.

A file is kept only if it can be read back and its outputs agree with those of the checkpoint, whose
BN is not folded, on images of the evaluation split. The export is refused if the moving statistics
differ from those that Algorithm 2 computes for the weights: the network would then do in use
something else than in training.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn

from downpour.cluster.errors import UserError
from downpour.cluster.serving import preprocessing_graph
from downpour.cluster.serving.inference import Trained, recomputed_statistics, rows_of_split
from downpour.cluster.serving.preprocessing import describe, describe_input
from downpour.models.outputs import MainOutput, main_output
from downpour.paramserver import durable
from downpour.shuffler.dataset.own import open_split
from downpour.shuffler.images.specs import ImageSpec, InputSpec
from downpour.workers.evaluation.disagreement import disagreement
from downpour.workers.evaluation.predictor import decode_any_size, rows_of
from downpour.workers.spec import ModelSpec

Format = Literal["onnx", "torch"]
SUFFIX = {"onnx": ".onnx", "torch": ".pt2"}
TOLERANCE = 1e-4
"""Most that outputs may differ by, as a share of the largest output, or of 1 if that is more."""
ROUNDINGS = 4.0
"""Or so many times what float32 itself costs the checkpoint's outputs, if that is more: a network
may magnify rounding, for instance by features of hardly any variance."""
CHECKED_ROWS = 64
PIXEL_TOLERANCE = 1.001 / 255
"""Most that values may differ by that the preprocessing in a file makes: one level of 255."""
BINARY_TOLERANCE = 0.01
"""The same of values that are 0 or 1: the share that differs, because it lies at the threshold."""
OPSET = 18


def export(
    run: Trained,
    output: Path,
    *,
    format: Format,
    with_preprocessing: bool = False,
    data: str | None = None,
    batches: int = 100,
    max_disagreement: float | None = 0.25,
) -> dict[str, Any]:
    """Write the folded network to `output`, whole and checked, or not at all.

    Args:
        run: the weights to export.
        output: the file to write.
        format: `onnx`, or `torch` for torch.export.
        with_preprocessing: whether the file takes images as a decoder gives them (ONNX only), or
            what the network takes.
        data: folder or URI with the shards; None takes the run's.
        batches: mini-batches that Algorithm 2 is given.
        max_disagreement: most that moving and recomputed statistics may differ, in standard
            deviations; None does not compare them.

    Returns:
        What was written and how well it agrees, as plain data.

    Raises:
        UserError: preprocessing cannot stand before the network, the statistics disagree, the
            file's outputs do not agree with the checkpoint's,
            or the file cannot be written.
    """
    if not output.parent.is_dir():
        raise UserError(f"the folder of {output} does not exist: make it, or give another --output")
    image = run.network.spec.image
    if with_preprocessing:
        _check_preprocessing(image, format)
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
        difference = difference_of(_read_back(partial, inputs, format), expected)
        allowed = tolerance(run.network.model.module, inputs, difference)
        if not difference <= allowed:
            raise UserError(
                f"the exported network's outputs differ by {difference:.2g} of the checkpoint's, "
                f"more than {allowed:.2g}: the file was not kept"
            )
        inside = None
        if with_preprocessing and isinstance(image, ImageSpec):
            inside = put_before(partial, image)
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
        "preprocessing": "before" if inside is None else "inside",
        "largest_preprocessing_difference": inside,
    }


def _check_preprocessing(image: InputSpec, format: Format) -> None:
    if not isinstance(image, ImageSpec):
        raise UserError(
            "--with-preprocessing is for pictures, and the inputs are numbers: leave it out"
        )
    if image.fit == "whole":
        raise UserError(
            "--with-preprocessing cuts pictures, and masks are of whole ones: leave it out; the "
            "file's metadata say what to do"
        )
    if format != "onnx" or image.height != image.width:
        raise UserError(
            f"--with-preprocessing is for --format onnx and square inputs, and this is {format} of "
            f"{image.height}x{image.width}: leave it out; the file's metadata say what to do"
        )


def tolerance(module: nn.Module, inputs: Tensor, difference: float) -> float:
    """Return how far another computation of a network's outputs may be off, as `TOLERANCE` counts.

    Float64 is asked only if `difference` is above `TOLERANCE`.

    Args:
        module: the network in inference mode, its batch normalization not folded.
        inputs: float32 `[m, ...]`.
        difference: by how much it is off.
    """
    if difference <= TOLERANCE:
        return TOLERANCE
    with torch.inference_mode():
        exact = main_output(copy.deepcopy(module).double()(inputs.double()))
        rounding = difference_of(main_output(module(inputs)).double(), exact)
    return max(TOLERANCE, ROUNDINGS * rounding)


def put_before(path: Path, image: ImageSpec) -> float:
    """Put the preprocessing before the network of an ONNX file, and check it.

    Args:
        path: the file, which is written anew.
        image: the images that the network takes, which are square.

    Returns:
        The largest difference from Downpour's own, in [0, 1]; if values are binary, the share of
        those that differ.

    Raises:
        UserError: it does something else than Downpour's own.
    """
    import onnx

    network = onnx.load(str(path))
    rows, pixels, orientations = made_images(image)
    expected = decode_any_size(rows, image).inputs
    alone = preprocessing_graph.graph(image, opset=OPSET, ir_version=network.ir_version)
    difference = 0.0
    session = _session(alone.SerializeToString())
    for ours, each, orientation in zip(expected, pixels, orientations, strict=True):
        (found,) = session.run(None, {"image": each[None], "orientation": np.array(orientation)})
        apart = np.abs(found[0] - ours)
        binary = image.binary_threshold is not None
        difference = max(difference, float(apart.mean() if binary else apart.max()))
    most = BINARY_TOLERANCE if image.binary_threshold is not None else PIXEL_TOLERANCE
    if not difference <= most:
        raise UserError(
            f"the preprocessing in the file differs by {difference:.3g} from that of `predict`, "
            f"more than {most:.3g}: the file was not kept; export without --with-preprocessing"
        )
    merged = preprocessing_graph.before(network, image)
    del merged.metadata_props[:]
    _describe(merged, {**_described(network), "preprocessing": _inside(image)})
    path.write_bytes(merged.SerializeToString())
    return difference


def made_images(
    image: ImageSpec,
) -> tuple[pa.RecordBatch, list[npt.NDArray[np.uint8]], list[int]]:
    """Make images of several sizes that are stored in several orientations.

    Returns:
        Rows with them as files; the pixels as they are stored, uint8 [h, w, c]; how they lie.
    """
    from PIL import Image

    size, files, pixels, orientations = image.height, [], [], []
    shapes = ((size, size), (size + 9, size * 3 // 2 + 1), (size * 5 + 2, size * 3 + 5), (7, 11))
    for number, (height, width) in enumerate(shapes):
        seed = np.random.default_rng(number)
        coarse = Image.fromarray(seed.integers(0, 256, (5, 4, 3), dtype=np.uint8))
        smooth = coarse.resize((width, height), Image.Resampling.BICUBIC)
        picture = smooth.convert("L" if image.channels == 1 else "RGB")
        follows = image.orientation == "follow"
        orientations.append(number * 2 + 1 if follows else 1)
        exif = Image.Exif()
        exif[0x0112] = orientations[-1]
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", exif=exif)
        files.append(buffer.getvalue())
        pixels.append(np.asarray(picture).reshape(height, width, image.channels))
    return rows_of(files), pixels, orientations


def _examples(run: Trained, data: str | None) -> tuple[Tensor, Tensor]:
    """Return inputs of the evaluation split, and the outputs of the network that is not folded."""
    config, network = run.config, run.network
    source = data or config.data.data
    count = config.model.num_classes
    dataset = open_split(source, config.data.eval_split, config.model.columns)
    with rows_of_split(dataset, count, rows=CHECKED_ROWS) as rows:
        decoded = decode_any_size(
            next(rows),
            network.spec.image,
            on_bad_image="skip",
            columns=network.spec.columns,
        )
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
    spec = run.network.spec
    about = {
        "task": spec.task,
        "classes": list(run.class_names) if _has_classes(spec) else [],
        "preprocessing": describe_input(spec),
    }
    if not _has_classes(spec):
        about["targets"] = list(spec.columns.targets)
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    # Two examples: a single one would make the batch's length a constant.
    arguments = (inputs[:2].clone(),)
    if format == "torch":
        with _quiet():
            extra = {f"{name}.json": json.dumps(value) for name, value in about.items()}
            program = torch.export.export(folded, arguments, dynamic_shapes=({0: batch},))
            torch.export.save(program, str(path), extra_files=extra)
        return
    with _quiet():
        made = torch.onnx.export(
            folded,
            arguments,
            dynamo=True,
            input_names=[_input_name(spec)],
            output_names=["outputs" if spec.task == "regression" else "logits"],
            dynamic_shapes=({0: batch},),
            external_data=False,
            verbose=False,
        )
    assert made is not None
    model = made.model_proto
    _describe(model, about)
    path.write_bytes(model.SerializeToString())


def _has_classes(spec: ModelSpec) -> bool:
    """Whether the network's outputs are of classes."""
    return spec.columns.kind != "numbers" or spec.task == "segmentation"


def _input_name(spec: ModelSpec) -> str:
    """What the file calls the network's input."""
    return "images" if isinstance(spec.image, ImageSpec) else "inputs"


def _read_back(path: Path, inputs: Tensor, format: Format) -> Tensor:
    """Return the outputs for `inputs` of the network in the file that was written."""
    if format == "torch":
        # By its bytes: the loader goes by a file's ending, and `output` may have any.
        program = torch.export.load(io.BytesIO(path.read_bytes()))
        with torch.inference_mode():
            outputs: Tensor = program.module()(inputs)
        return outputs
    session = _session(path.read_bytes())
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    return torch.from_numpy(found)


def _session(model: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # it warns of inputs that may be left out
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _describe(model: Any, about: Mapping[str, Any]) -> None:
    for name, value in about.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = name, json.dumps(value)


def _described(model: Any) -> dict[str, Any]:
    return {entry.key: json.loads(entry.value) for entry in model.metadata_props}


def _inside(image: ImageSpec) -> dict[str, Any]:
    """Describe what is left to do if the preprocessing is in the file."""
    return {
        "inside": describe(image),
        "input": "image: uint8 [batch, height, width, 1 or 3], grey or RGB, images of one size",
        "orientation": "optional, int64: how the images are stored, 1 to 8 as in EXIF; 1 is upright"
        if image.orientation == "follow"
        else "leave it out: the network was trained on images as they are stored",
        "transparency": describe(image)["steps"][image.orientation == "follow"]
        if image.transparency == "white"
        else "hidden colours are seen",
    }


def difference_of(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, as a share of the largest value or of 1 if that is more."""
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
