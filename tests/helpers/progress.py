"""States of a run to show: one with every number, and one with none."""

from downpour.cluster.monitoring.progress import Progress
from downpour.workers.tasks import Figure

FULL = Progress(
    elapsed_s=83.2,
    phase="training",
    epoch=3,
    epochs=10,
    examples=250_000,
    total_examples=600_000,
    updates=7812,
    updates_per_s=1204.3,
    examples_per_s=38_500.0,
    loss=0.08123456,
    figure=Figure(metric="accuracy", value=0.9781),
    best=Figure(metric="accuracy", value=0.979),
    staleness_mean=48.91,
    staleness_p99=71.0,
    replicas_alive=9,
    replicas_wanted=10,
    duplicates=0,
    refused=3,
)
EMPTY = Progress(elapsed_s=0.0, phase="starting Ray")
