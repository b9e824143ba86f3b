"""Callbacks for `downpour.Trainer`: the base class, and those for programs that track experiments.

from downpour.callbacks import Callback, MLflow, TensorBoard, WandB
"""

from downpour.cluster.trainer.callbacks import Callback, CurrentRun
from downpour.cluster.trainer.trackers import MLflow, TensorBoard, WandB

__all__ = ["Callback", "CurrentRun", "MLflow", "TensorBoard", "WandB"]
