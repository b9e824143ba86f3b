"""Watching a run and stopping it, from any machine that sees its folder.

The process that trains writes status and metrics to the folder, and looks there for a request to
stop. There is no other connection.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console

from downpour.cluster.errors import UserError
from downpour.cluster.monitoring.display import TrainingDisplay
from downpour.cluster.monitoring.progress import Progress, plain_line
from downpour.cluster.run.folder import METRICS, RESULT, RunFolder

EVERY_S = 0.5
SILENT_S = 30.0
"""If a run's status is older, nothing trains it."""
STOP_DEADLINE_S = 180.0


def watch(
    folder: RunFolder,
    *,
    once: bool,
    console: Console,
    pause: Callable[[float], None] = time.sleep,
) -> int:
    """Show a run's progress until it ends, or once; return the exit status."""
    if once:
        console.print(plain_line(progress(folder)), markup=False, highlight=False, soft_wrap=True)
        return 0
    with TrainingDisplay(folder.name, console=console) as display:
        while True:
            ended = end(folder)
            display.update(progress(folder))
            if ended:
                break
            pause(EVERY_S)
    console.print(f"{folder.name}: {ended}", markup=False, highlight=False)
    return 0


def stop(
    folder: RunFolder,
    *,
    wait: bool,
    console: Console,
    pause: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Ask a run to stop after a checkpoint; return the exit status.

    Raises:
        UserError: the run does not train, or has not stopped in time.
    """
    if ended := end(folder):
        raise UserError(f"{folder.path} does not train: {ended}")
    folder.request_stop()
    console.print(f"{folder.name}: asked to write a checkpoint and stop", highlight=False)
    give_up_s = clock() + STOP_DEADLINE_S
    while wait and not (ended := end(folder)):
        if clock() > give_up_s:
            raise UserError(
                f"{folder.path} has not stopped within {STOP_DEADLINE_S:.0f} s: look at its "
                "output, or end its process"
            )
        pause(EVERY_S)
    if wait:
        console.print(f"{folder.name}: {ended}", markup=False, highlight=False)
    return 0


def end(folder: RunFolder) -> str | None:
    """Return how a run ended, in words; None while it goes on."""
    if (folder.path / RESULT).exists():
        result = folder.read_json(RESULT)
        early = result.get("ended_by", "epochs") != "epochs"
        why = f": {result['ended_because']}" if early else ""
        return f"finished with an accuracy of {result['accuracy']:.2%}{why}"
    status = _status(folder)
    if status.get("state") == "stopped":
        return f"stopped ({status.get('reason')}): `downpour resume {folder.path}` goes on"
    if folder.held():
        return None
    # On a network disk without locks the age of the status tells.
    if time.time() - status.get("time", 0.0) < SILENT_S:
        return None
    return f"died: `downpour resume {folder.path}` goes on with it"


def progress(folder: RunFolder) -> Progress:
    """Return where a run stands, from the files in its folder."""
    config, status = folder.config(), _status(folder)
    lines = _metrics(folder)
    accuracies = [line["accuracy"] for line in lines if "accuracy" in line]
    examples = status.get("examples")
    epochs = config.policy.epochs
    done = status.get("epoch")
    return Progress(
        elapsed_s=status.get("elapsed_s", 0.0),
        phase=status.get("state", "starting"),
        epoch=None if done is None else min(epochs, int(done) + 1),
        epochs=epochs,
        examples=examples,
        total_examples=round(examples * epochs / done) if examples and done else None,
        updates=status.get("updates"),
        updates_per_s=status.get("updates_per_s"),
        examples_per_s=status.get("examples_per_s"),
        loss=status.get("loss"),
        accuracy=accuracies[-1] if accuracies else None,
        best_accuracy=max(accuracies, default=None),
        stop_at_accuracy=config.policy.stop_at_accuracy,
        staleness_mean=status.get("staleness_mean"),
        staleness_p99=status.get("staleness_p99"),
        replicas_alive=status.get("replicas_alive"),
        replicas_wanted=status.get("replicas_wanted", config.replicas.replicas),
        replicas_held=status.get("replicas_held"),
        duplicates=status.get("duplicates"),
        refused=status.get("refused"),
    )


def _status(folder: RunFolder) -> dict[str, Any]:
    return folder.status()


def _metrics(folder: RunFolder) -> list[dict[str, Any]]:
    path = folder.path / METRICS
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # the last line, while it is written
            continue
    return found
