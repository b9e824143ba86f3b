"""What comes out of a training run, as an object: figures, curves, weights, a network."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from downpour.cluster.config import recipes
from downpour.cluster.config.run import RunConfig
from downpour.cluster.errors import UserError
from downpour.cluster.run.folder import BEST, METRICS, MODEL, RESULT, RunFolder

if TYPE_CHECKING:
    import pandas
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished run. All of it is read from the run's folder, so it is there the next day too."""

    path: Path
    """The run's folder."""
    metrics: Mapping[str, Any] = field(repr=False)
    """What came out: `accuracy` (or the figure that `metric` names), `best_accuracy`,
    `evaluation_loss`, `updates`, `examples`, `staleness` and more; all that `result.json` holds."""

    @classmethod
    def open(cls, path: str | Path) -> Result:
        """The result of a run that is finished.

        Raises:
            UserError: the folder holds no run, or one that is not finished.
        """
        folder = RunFolder.open(Path(path))
        if not (folder.path / RESULT).exists():
            raise UserError(
                f"{folder.path} has no result yet: go on with downpour.resume({str(path)!r})"
            )
        metrics = types.MappingProxyType(folder.read_json(RESULT))
        return cls(path=folder.path, metrics=metrics)

    @property
    def config(self) -> RunConfig:
        """The run's configuration, with every value."""
        return RunFolder.open(self.path).config()

    @property
    def accuracy(self) -> float:
        """Accuracy of the last weights, in [0, 1].

        Raises:
            UserError: the task has another figure; `metrics` has it under its name.
        """
        if "accuracy" not in self.metrics:
            metric = self.metrics["metric"]
            raise UserError(
                f"{self.path} has no accuracy: its figure is {metric}, result.metrics[{metric!r}]"
            )
        return float(self.metrics["accuracy"])

    @property
    def reached(self) -> Mapping[str, Mapping[str, float]]:
        """By milestone, the first scoring at or above it: `accuracy`, `training_s`, `examples` and
        `epochs`.
        """
        found: Mapping[str, Mapping[str, float]] = self.metrics["reached"]
        return found

    @property
    def exactly_once(self) -> bool:
        """Whether every partition applied every mini-batch once."""
        return bool(self.metrics["exactly_once"])

    @property
    def last_checkpoint(self) -> Path:
        """The file with the last weights and their BN statistics (safetensors, PyTorch's names)."""
        return self.path / MODEL

    @property
    def best_checkpoint(self) -> Path:
        """The file with the weights that scored highest, and their BN statistics."""
        path = self.path / BEST
        return path if path.exists() else self.last_checkpoint

    @property
    def history(self) -> pandas.DataFrame:
        """The run's curves: a row a second, and a row for each evaluation, which has `accuracy`.

        Columns are the names of `metrics.jsonl`; what a row lacks is NaN.

        Raises:
            UserError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise UserError(
                "the history is a pandas frame, and pandas is not installed: pip install pandas, "
                f"or read {self.path / METRICS}, a JSON object a line"
            ) from None
        rows = []
        for line in (self.path / METRICS).read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:  # cut off when the disk was full
                continue
        return pd.DataFrame(rows)

    def model(self, *, best: bool = False) -> nn.Module:
        """The trained network as a plain PyTorch module, in inference mode.

        It is what the run's factory makes, with the run's weights and BN statistics. Its batch
        normalization is PyTorch's own, so it can be saved, exported and trained on by anything.

        Args:
            best: the weights that scored highest, instead of the last.

        Raises:
            UserError: the factory cannot be used here.
        """
        from downpour.cluster.trainer.plain_model import plain_model

        config = recipes.admit(self.config)
        return plain_model(config, self.best_checkpoint if best else self.last_checkpoint)
