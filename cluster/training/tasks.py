"""What a network is for, settled from the options and the data: task, loss, inputs and targets.

A dataset of pictures with labels is for classification, and nothing is done for it here. Columns of
numbers (`--target-column`, `--input-columns`) make it another task, or one on a table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import pyarrow as pa

from downpour.cluster.config import classifier
from downpour.cluster.config.options import apply
from downpour.cluster.config.run import RunConfig
from downpour.cluster.config.settings import settings_of
from downpour.cluster.errors import UserError
from downpour.cluster.training.masks import has_masks, with_masks
from downpour.shuffler.config import DataConfig
from downpour.shuffler.dataset.columns import LABEL, TARGET, Columns, TargetKind, is_list, width_of
from downpour.shuffler.dataset.numbers import first_width, highest_index
from downpour.shuffler.dataset.own import is_own, open_own
from downpour.shuffler.dataset.records import schema_of_split
from downpour.shuffler.images.augment import AugmentConfig
from downpour.shuffler.images.specs import ImageSpec, TensorSpec
from downpour.workers.tasks import TASKS, TaskName

Say = Callable[[str], object]

PICTURES = ("image", "bits")
OF_PICTURES = ("image_size", "orientation", "transparency", "on_bad_image")
"""Settings that say nothing about rows of numbers."""
NAMED_LOSSES: Mapping[str, TaskName] = {
    "cross_entropy": "classification",
    "mse": "regression",
    "l1": "regression",
    "huber": "regression",
    "bce": "multilabel",
    "pixel_cross_entropy": "segmentation",
}
SHOWN = 5
SHARDED = ("within_shard",)


def with_task(
    config: RunConfig, given: Mapping[str, object], say: Say = lambda _: None
) -> RunConfig:
    """Return the configuration with its task, its loss, and the columns of its data.

    Args:
        config: of a run that has not begun.
        given: names of the settings that the user has given.
        say: gets a line about what was settled.

    Raises:
        UserError: the options contradict each other or the data.
        DatasetError: the data cannot be read, or lacks a column, or has one that is no number.
    """
    data = config.data
    if is_own(data.data):
        return _of_own(config, given, say)
    settled = config.model.columns
    if settled.kind == "mask" and data.target_column in ((), settled.targets):
        return _checked_goal(config)
    silent = not (data.target_column or data.input_columns or config.model.task)
    if silent and config.recipe != classifier.NAME:
        _check_loss(config, "classification")
        return _checked_goal(config)
    schema, where = schema_of_split(
        data.data, data.train_split if data.node_folder is None else data.eval_split
    )
    if has_masks(config, schema):
        config = with_masks(_with_loss(config, "segmentation", given), schema, where, given, say)
        return _checked_goal(config)
    if silent:
        _check_loss(config, "classification")
        return _checked_goal(config)
    inputs = _inputs(data, schema, where)
    targets = data.target_column or (LABEL,)
    task = config.model.task or _guessed(schema, targets, where)
    columns = _columns(config, schema, where, inputs, targets, task, given)
    config = _with_loss(config, task, given)
    model = dataclasses.replace(config.model, task=task, columns=columns)
    if inputs:
        model = dataclasses.replace(model, image=TensorSpec(shape=(columns.input_width,)))
        config = _without_pictures(config, given)
    if columns.kind == "indices":
        model = dataclasses.replace(model, num_classes=columns.target_width)
    config = dataclasses.replace(config, model=model)
    say(_told(config, schema))
    return _checked_goal(config)


def _of_own(config: RunConfig, given: Mapping[str, object], say: Say) -> RunConfig:
    """As the items of a dataset of the user's own are."""
    data = config.data
    if data.target_column or data.input_columns or data.node_folder or data.strategy in SHARDED:
        raise UserError(
            f"{data.data} has neither columns nor shards: leave --target-column, --input-columns "
            "and --node-folder out, and take another --strategy than within_shard"
        )
    train, scored = (open_own(data.data, split) for split in (data.train_split, data.eval_split))
    columns = train.columns
    if scored.columns != columns:
        raise UserError(
            f"{data.data} gives items of {_item(columns)} for {data.train_split!r}, and of "
            f"{_item(scored.columns)} for {data.eval_split!r}: make them alike"
        )
    whole, several = columns.target_type == "int64", len(columns.target_shape) > 1
    task: TaskName = config.model.task or (
        "classification" if columns.kind == LABEL else "segmentation" if whole else "regression"
    )
    if columns.kind == LABEL and task == "regression":
        columns = dataclasses.replace(
            columns, kind="numbers", targets=(TARGET,), target_type="float32"
        )
    fits = {
        "classification": columns.kind == LABEL,
        "segmentation": whole and several,
        "multilabel": not whole and columns.target_width > 1,
        "regression": columns.target_type == "float32",
    }
    if not fits[task]:
        raise UserError(
            f"the task is {task}, and items of {data.data} are {_item(columns)}: return other "
            "targets, or give another --task"
        )
    classes = len(train.class_names)
    if task in ("classification", "segmentation") and not classes and "num_classes" not in given:
        raise UserError(
            f"{data.data} does not say how many classes there are: give --num-classes, or the "
            "dataset an attribute 'classes' with their names"
        )
    config = _without_pictures(_with_loss(config, task, given), given)
    model = dataclasses.replace(
        config.model, task=task, columns=columns, image=TensorSpec(shape=columns.input_shape)
    )
    if classes and "num_classes" not in given:
        model = dataclasses.replace(model, num_classes=classes)
    say(f"task {task} with the loss {model.loss}; items are {_item(columns)}")
    return _checked_goal(dataclasses.replace(config, model=model))


def _item(columns: Columns) -> str:
    target = "a class"
    if columns.kind != LABEL:
        target = f"{columns.target_type} {list(columns.target_shape)}"
    return f"{columns.input_type} {list(columns.input_shape)} and {target}"


def _inputs(data: DataConfig, schema: pa.Schema, where: str) -> tuple[str, ...]:
    """The columns of an input; none if it is a picture."""
    targets = data.target_column or (LABEL,)
    for option, names in (("--target-column", targets), ("--input-columns", data.input_columns)):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"{option} names {twice[0]!r} twice: name each column once")
    if both := sorted(set(targets) & set(data.input_columns)):
        raise UserError(
            f"column {both[0]!r} is named as input and as target: the network would be told what "
            "it is to find; take it out of one of the two"
        )
    if data.input_columns or not set(PICTURES).isdisjoint(schema.names):
        return data.input_columns
    found = tuple(name for name in schema.names if name not in targets)
    if not found:
        raise UserError(f"{where} has no column but {', '.join(targets)}: there are no inputs")
    return found


def _guessed(schema: pa.Schema, targets: Sequence[str], where: str) -> TaskName:
    """The task that targets are for, if that can be told from them."""
    for name in targets:
        width_of(schema, name, where)  # which says so if it is no column of numbers
    kinds = [schema.field(name).type for name in targets]
    whole = [pa.types.is_integer(kind) or pa.types.is_boolean(kind) for kind in kinds]
    if targets == (LABEL,) and whole == [True]:
        return "classification"
    if pa.types.is_list(kinds[0]) and pa.types.is_integer(kinds[0].value_type):
        return "multilabel"
    if all(whole):
        raise UserError(
            f"column {targets[0]!r} has whole numbers, which may be classes or amounts: say which "
            "with --task classification, --task regression or --task multilabel"
        )
    return "regression"


def _columns(
    config: RunConfig,
    schema: pa.Schema,
    where: str,
    inputs: tuple[str, ...],
    targets: tuple[str, ...],
    task: TaskName,
    given: Mapping[str, object],
) -> Columns:
    if task == "classification" and len(targets) > 1:
        raise UserError(
            f"the task classification has one class a row, and there are {len(targets)} target "
            "columns: name one, or give --task multilabel"
        )
    kind: TargetKind = "label" if task == "classification" else "numbers"
    if task == "multilabel" and is_list(schema.field(targets[0]).type):
        kind = "indices" if _holds_indices(config, schema, targets) else "numbers"
    widths: tuple[int, ...] = (1,)
    if kind == "numbers":
        widths = tuple(_width(config.data, schema, name, where) for name in targets)
    elif kind == "indices":
        widths = (_num_classes(config, targets[0], given),)
    columns = Columns(
        inputs=inputs,
        input_widths=tuple(_width(config.data, schema, name, where) for name in inputs),
        targets=targets,
        target_widths=widths,
        kind=kind,
    )
    columns.check(schema, where)
    return columns


def _holds_indices(config: RunConfig, schema: pa.Schema, targets: tuple[str, ...]) -> bool:
    """Whether a column has lists of classes; lists of one length are 0 and 1 for each class."""
    kind = schema.field(targets[0]).type
    if len(targets) > 1 or pa.types.is_fixed_size_list(kind):
        return False
    return bool(pa.types.is_integer(kind.value_type))


def _num_classes(config: RunConfig, name: str, given: Mapping[str, object]) -> int:
    if "num_classes" in given:
        return config.model.num_classes
    data = config.data
    splits = [data.eval_split] if data.node_folder else [data.train_split, data.eval_split]
    return max(2, 1 + max(highest_index(data.data, split, name) for split in splits))


def _width(data: DataConfig, schema: pa.Schema, name: str, where: str) -> int:
    width = width_of(schema, name, where)
    split = data.train_split if data.node_folder is None else data.eval_split
    return first_width(data.data, split, name) if width is None else width


def _with_loss(config: RunConfig, task: TaskName, given: Mapping[str, object]) -> RunConfig:
    """With the task's loss, unless one is given."""
    if "loss" not in given and config.model.loss == "cross_entropy":
        model = dataclasses.replace(config.model, loss=TASKS[task].loss)
        return dataclasses.replace(config, model=model)
    _check_loss(config, task)
    return config


def _check_loss(config: RunConfig, task: TaskName) -> None:
    meant = NAMED_LOSSES.get(config.model.loss)
    if meant is not None and meant != task:
        raise UserError(
            f"the loss {config.model.loss} is for {meant}, and the task is {task}: leave --loss "
            f"out for {TASKS[task].loss}, or name your own as module:function"
        )


def _without_pictures(config: RunConfig, given: Mapping[str, object]) -> RunConfig:
    """Without what a recipe does to pictures; what the user wants done to them is refused."""
    for name in OF_PICTURES:
        if name in given:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} is of pictures, and the inputs are numbers: leave it out")
    own = {setting.name for setting in settings_of(AugmentConfig)}
    augment = apply(AugmentConfig(), {k: v for k, v in given.items() if k in own})
    if not augment.changes_nothing:
        raise UserError(
            "pictures can be cropped, mirrored and distorted, and the inputs are numbers: leave "
            "augmentation out"
        )
    return dataclasses.replace(config, data=dataclasses.replace(config.data, augment=augment))


def _checked_goal(config: RunConfig) -> RunConfig:
    policy, task = config.policy, config.model.the_task
    if policy.stop_at_metric is not None and task.name == "classification":
        raise UserError(
            f"stop at metric is {policy.stop_at_metric}, and the task is classification: give "
            "--stop-at-accuracy"
        )
    return config


def _told(config: RunConfig, schema: pa.Schema) -> str:
    model, columns = config.model, config.model.columns
    pictures = isinstance(model.image, ImageSpec)
    inputs = "pictures" if pictures else f"{columns.input_width} numbers ({_few(columns.inputs)})"
    what = f"task {model.the_task.name} with the loss {model.loss}; inputs are {inputs}"
    targets = f"targets {_few(columns.targets)}"
    if columns.kind == "indices":
        targets += f", of {columns.target_width} classes"
    names = (*columns.inputs, *(columns.targets if columns.kind == "numbers" else ()))
    doubles = [name for name in names if _is_double(schema.field(name).type)]
    rounded = f"; {_few(doubles)} rounded from float64 to float32" if doubles else ""
    return f"{what}, {targets}{rounded}"


def _is_double(kind: pa.DataType) -> bool:
    return bool(pa.types.is_float64(kind.value_type if is_list(kind) else kind))


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
