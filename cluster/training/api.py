"""Training from Python: `downpour.train` and `downpour.resume`.

Not here: what training does (`launch`), and the command line (`cluster.cli`).
"""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from downpour.cluster.config import recipes
from downpour.cluster.config.run import RunConfig
from downpour.cluster.run.folder import RunFolder
from downpour.cluster.training import inputs, launch


def train(
    config: RunConfig | str,
    *,
    name: str | None = None,
    runs: str | Path = "runs",
    address: str | None = None,
    dashboard: bool = False,
) -> Path:
    """Train a run from its beginning to its end, as `downpour train` does.

    Args:
        config: a configuration, or the name of a recipe (`"mnist-bn"`, `"mine:recipe"`).
        name: the run's name; None makes one of the recipe, the date and the time.
        runs: the folder that the run's folder is made in.
        address: the Ray cluster to run on; None takes RAY_ADDRESS, or starts Ray here.
        dashboard: start Ray's dashboard with a cluster of our own.

    Returns:
        The run's folder; `result.json` and `checkpoints/` are in it.

    Raises:
        UserError: a value that cannot be trained with. The text names the value and the remedy.
    """
    resolved = recipes.find(config) if isinstance(config, str) else recipes.admit(config)
    folder = create(resolved, name=name, runs=Path(runs))
    _run(folder, resume=False, address=address, dashboard=dashboard)
    return folder.path


def resume(run: str | Path, *, address: str | None = None, dashboard: bool = False) -> Path:
    """Go on with the run whose folder is `run`, as `downpour resume` does; returns the folder.

    Raises:
        UserError: a folder that holds no run, or one that cannot be gone on with.
    """
    folder = RunFolder.open(Path(run))
    recipes.admit(folder.config())
    _run(folder, resume=True, address=address, dashboard=dashboard)
    return folder.path


def create(config: RunConfig, *, name: str | None, runs: Path) -> RunFolder:
    """The folder of a new run; its name is the recipe's with date and time if `name` is None."""
    return RunFolder.create(
        runs / (name or f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"), config
    )


def _run(folder: RunFolder, *, resume: bool, address: str | None, dashboard: bool) -> None:
    try:
        launch.train(
            folder,
            inputs.check_data(folder.config()),
            resume=resume,
            address=address,
            dashboard=dashboard,
            console=Console(stderr=True),
            age_s=0.0,
        )
    except Exception:
        folder.discard_if_unused()
        raise
