"""Values of a run's configuration that are good by themselves, but not together.

Each check names the values and the remedy in one line, and says in a few words why.
"""

from __future__ import annotations

from downpour.cluster.config.policy import PolicyConfig
from downpour.paramserver.config import ServerConfig
from downpour.workers.config import ModelConfig, ReplicaConfig
from downpour.workers.tasks import ACCURACY


def check(server: ServerConfig, replicas: ReplicaConfig, policy: PolicyConfig) -> None:
    """Check values against each other.

    Raises:
        ValueError: two values cannot go together; the text names both and the remedy.
    """
    name, steps = server.policy.staleness_policy, replicas.steps
    server.schedule.over(policy.epochs)  # which refuses a warm-up that is as long
    if name in ("bounded", "compensate") and steps.n_fetch != steps.n_push:
        raise ValueError(
            f"staleness policy is {name}, n fetch {steps.n_fetch} and n push {steps.n_push}: "
            "give both the same value, so that a push is computed on one version"
        )
    if name == "compensate":
        _check_compensation(server, replicas)
    if name == "synchronous":
        _check_rounds(server, replicas, policy)
    if policy.record_pushes:
        _check_record(server, replicas)
    if steps.device != "cpu":
        _check_device(replicas, policy)
    elif steps.precision == "float16":
        raise ValueError(
            "precision is float16, and replica device is cpu, which gains nothing by it: give "
            "precision bfloat16 or float32, or replica device cuda"
        )


def check_goal(model: ModelConfig, policy: PolicyConfig) -> None:
    """Check that the run ends at a figure that its task has.

    Raises:
        ValueError: it does not; the text names both and the remedy.
    """
    task = model.the_task
    if policy.stop_at_accuracy is not None and task.metric != ACCURACY:
        raise ValueError(
            f"stop at accuracy is {policy.stop_at_accuracy}, and the task {task.name} has no "
            f"accuracy: give stop at metric, which is of {task.metric}"
        )
    if policy.stop_at_metric is not None and model.task == "classification":
        raise ValueError(
            f"stop at metric is {policy.stop_at_metric}, and the task is classification: give "
            "stop at accuracy"
        )


def _check_record(server: ServerConfig, replicas: ReplicaConfig) -> None:
    n_push, wire = replicas.steps.n_push, server.network.wire
    if n_push != 1:
        raise ValueError(f"record pushes is on, and n push is {n_push}: give n push 1")
    threads = replicas.threads_per_process
    if threads is not None and threads > 1:
        raise ValueError(
            f"record pushes is on, and threads per process is {threads}, on which sums do not "
            "round the same way each time: give threads per process 1, or none"
        )
    together = replicas.steps.steps_together
    if together is not None and together > 1:
        raise ValueError(
            f"record pushes is on, and steps together is {together}: a record names one mini-batch "
            "a push; give steps together 1, or none"
        )
    if wire in ("bfloat16", "float16"):
        raise ValueError(
            f"record pushes is on, and wire is {wire}, which adds what earlier "
            "rounding left out: give wire float32, int8 or int4"
        )


def _check_device(replicas: ReplicaConfig, policy: PolicyConfig) -> None:
    steps, spares = replicas.steps, replicas.spares
    if policy.record_pushes:
        raise ValueError(
            f"record pushes is on, and replica device is {steps.device}, which does not round the "
            "same way each time, so that a replay would find other bits: give replica device cpu"
        )
    if spares not in ("auto", "none"):
        raise ValueError(
            f"spares is {spares}, and replica device is {steps.device}, of which a spare would "
            "hold a share: give spares none"
        )


def _check_compensation(server: ServerConfig, replicas: ReplicaConfig) -> None:
    wire, slots = server.network.wire, replicas.slots
    if wire in ("bfloat16", "float16"):
        raise ValueError(
            f"staleness policy is compensate, and wire is {wire}, which adds what "
            "rounding left out of gradients on other weights: give wire float32"
        )
    if wire in ("int8", "int4", "auto"):
        raise ValueError(
            f"staleness policy is compensate, and wire is {wire}, whose gradients may be on "
            "rounded weights, which no partition keeps: give wire float32"
        )
    bound = server.policy.staleness_bound
    if bound < slots:
        raise ValueError(
            f"staleness policy is compensate, and staleness bound is {bound}, with {slots} steps "
            "in flight: give at least as many, or most pushes would be dropped"
        )


def _check_rounds(server: ServerConfig, replicas: ReplicaConfig, policy: PolicyConfig) -> None:
    steps, slots = replicas.steps, replicas.slots
    if (steps.n_fetch, steps.n_push) != (1, 1):
        raise ValueError(
            f"staleness policy is synchronous, n fetch {steps.n_fetch} and n push "
            f"{steps.n_push}: give 1 for both, and as many more round pushes"
        )
    pushes = server.policy.round_pushes
    if pushes is None and policy.record_pushes:
        raise ValueError(
            "record pushes is on, and round pushes is none, which is another number when the "
            f"run is resumed with other replicas: give round pushes {slots}"
        )
    if pushes is not None and pushes > slots:
        raise ValueError(
            f"round pushes is {pushes}, and there are {slots} steps in flight: give at most as "
            "many; the others are backup workers"
        )
