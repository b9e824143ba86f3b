"""What is left of a run at its end: `result.json`, plots, the report, the last lines."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from downpour.cluster.config.run import RunConfig
from downpour.cluster.controller.protocol.backend import RunFailed
from downpour.cluster.errors import UserError, one_line
from downpour.cluster.monitoring.display import print_result
from downpour.cluster.monitoring.plots import ReportError, plot_run
from downpour.cluster.monitoring.report.html_report import write_report
from downpour.cluster.monitoring.telemetry import merged_staleness
from downpour.cluster.run.folder import RESULT, RunFolder

if TYPE_CHECKING:
    from downpour.cluster.controller.protocol.instructions import RunOutcome


SKIPPED_SHOWN = 5


def stopped(folder: RunFolder, reason: str, outcome: RunOutcome, console: Any) -> int:
    """Note why the run of `folder` stopped, and say so; returns the exit status."""
    from downpour.cluster.controller.controller import ASKED

    folder.write_status({**folder.status(), "state": "stopped", "reason": reason})
    if reason not in (ASKED, *signal.Signals.__members__):
        raise RunFailed(f"{reason}; then go on with `downpour resume {folder.path}`")
    saved = "without a checkpoint of this session"
    if outcome.checkpoint is not None:
        saved = f"after checkpoint {outcome.checkpoint}"
    console.print(f"stopped by {reason} {saved}: go on with `downpour resume {folder.path}`")
    return 0 if reason == ASKED else 128 + signal.Signals[reason]


def conclude(
    folder: RunFolder, config: RunConfig, outcome: RunOutcome, began_s: float, console: Any
) -> int:
    """Write what a finished run leaves, and show it; returns the exit status.

    `began_s` is when the session began, by the monotonic clock.
    """
    result = make_result(folder, config, outcome, began_s)
    if not console.quiet:
        print_result(result, shown_path(folder.path))
    try:
        folder.write_json(RESULT, result)
        figure = {result["metric"]: result[result["metric"]]}
        folder.write_status({**folder.status(), "state": "finished", **figure})
    except OSError as error:
        raise UserError(
            f"{folder.path / RESULT} cannot be written: {error.strerror or error}; make room, then "
            f"`downpour resume {folder.path}` goes on from the last checkpoint"
        ) from None
    try:
        plot_run(folder.path)
        write_report(folder.path)
    except (OSError, ReportError) as error:
        text = f"no report ({one_line(error)}): `downpour report {folder.path}` makes it"
        console.print(text, style="yellow", markup=False)
    for line in result["skipped"][:SKIPPED_SHOWN]:
        console.print(f"skipped: {line}", style="yellow")
    more = len(result["skipped"]) - SKIPPED_SHOWN
    if more > 0:
        console.print(f"skipped: {more} more; {RESULT} lists them all", style="yellow")
    assert outcome.exactly_once, "a mini-batch was lost or applied twice; see result.json"
    return 0


def make_result(
    folder: RunFolder, config: RunConfig, outcome: RunOutcome, began_s: float
) -> dict[str, Any]:
    """What came out of a finished run, for `result.json`."""
    reports = outcome.reports
    first_s, last_s = outcome.first_update_s, outcome.last_update_s
    updates = min(r.version for r in reports)
    session_updates = updates - outcome.updates_before
    training_s = 0.0 if first_s is None or last_s is None else last_s - first_s
    updates_per_s = session_updates / training_s if training_s else 0.0
    examples = min(r.examples for r in reports)
    staleness = merged_staleness(reports)
    evaluation = outcome.evaluation
    assert evaluation is not None
    best = outcome.best
    moving = None if evaluation.moving is None else evaluation.moving.value
    return {
        "run": folder.name,
        "recipe": config.recipe,
        "seed": config.policy.seed,
        "task": config.model.the_task.name,
        "metric": evaluation.score.metric,
        **evaluation.score.figures,
        **({} if best is None else {f"best_{best.metric}": best.value}),
        "bn_statistics": "recomputed" if evaluation.num_recomputed else "moving",
        f"moving_{evaluation.score.metric}": moving,
        "bn_gap": evaluation.gap,
        "evaluation_loss": evaluation.score.loss,
        "evaluated_examples": evaluation.score.num_examples,
        "evaluation_images_skipped": len(evaluation.skipped),
        "evaluation_skipped": list(evaluation.skipped),
        "updates": updates,
        "examples": examples,
        "epochs": config.policy.epochs,
        "ended_by": outcome.ended.by,
        "ended_because": outcome.ended.reason,
        "unfinished_epochs": {str(e): n for e, n in outcome.unfinished_epochs.items()},
        "reached": {milestone: dict(first) for milestone, first in outcome.reached.items()},
        "replicas": config.replicas.replicas,
        "concurrent_steps": config.replicas.steps.concurrent_steps,
        "batch_size": config.data.batch_size,
        "partitions": len(reports),
        "updates_per_s": round(updates_per_s, 1) if updates_per_s else None,
        "examples_per_s": round(updates_per_s * examples / updates) if updates_per_s else None,
        "time_to_first_update_s": None if first_s is None else round(first_s, 2),
        "time_to_all_replicas_s": (
            None if outcome.all_replicas_s is None else round(outcome.all_replicas_s, 2)
        ),
        "training_s": round(training_s, 2),
        "wall_s": round(time.monotonic() - began_s, 2),
        "elapsed_s": round(outcome.elapsed_s, 2),
        "staleness": {
            **staleness.summary(),
            "histogram": [[low, n] for low, n in staleness.bars],
        },
        "batches_applied": min(r.batches_applied for r in reports),
        "duplicates": sum(r.duplicates for r in reports),
        "refused": outcome.refused,
        "dropped": sum(r.dropped for r in reports),
        "images_skipped": len(outcome.skipped),
        "skipped": [outcome.skipped[row] for row in sorted(outcome.skipped)],
        "exactly_once": outcome.exactly_once,
        "quarantined": list(outcome.quarantined),
        "restarts": dict(outcome.restarts),
        "process_restarts": sum(outcome.restarts.values()),
    }


def shown_path(path: Path) -> str:
    """A path as short as it can be from here."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
