"""Claim: a run in which something dies every 15 seconds does nearly what an undisturbed one does.

Runs of `mnist-bn` of the same length, one after the other in one session. In all but the first
something is killed (kill -9) every 15 seconds, in turn: a process of replicas, a partition, a
shuffler, the evaluator, and, unless the driver is spared, the driver, which is then resumed. A run
starts a Ray of its own, which ends with its driver, or is in a cluster, which goes on.
Goodput is the time of the undisturbed run over that of another: both do the same updates, so it is
useful updates a second over useful updates a second. That each example was applied once comes from
the last checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics

from downpour.benchmarks import chaos
from downpour.benchmarks.chaos import Disturbed
from downpour.benchmarks.harness import BadSettings, Report, Say, Settings

EVERY_S, QUICK_EVERY_S = 15.0, 1.0
EPOCHS, QUICK_EPOCHS = 110, 4
"""Of `mnist-bn`: two to three minutes on two cores."""
MEMBERS = ("replicas", "partition", "shuffler", "evaluator")
IN_TURN = (*MEMBERS, "driver")
MOST_DEATHS, QUICK_MOST = 1000, 2
RUN_DEADLINE_S = 3600.0
IN_A_CLUSTER = ", in a cluster"
WAYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "hot standby": (("--hot-standby",), IN_TURN),
    "hot standby, driver spared": (("--hot-standby",), MEMBERS),
    f"hot standby{IN_A_CLUSTER}": (("--hot-standby",), IN_TURN),
    "checkpoints": ((), IN_TURN),
}
"""What a partition that dies starts from, as options; and who dies in turn. The name says so if
Ray goes on when the driver dies."""


def run(settings: Settings, say: Say) -> Report:
    """Each way: `repeat` runs with deaths, beside undisturbed ones with the same options."""
    wanted = settings.only or tuple(WAYS)
    if unknown := set(wanted) - WAYS.keys():
        raise BadSettings(f"--only {min(unknown)}: give one of {', '.join(WAYS)}")
    epochs = QUICK_EPOCHS if settings.quick else EPOCHS
    rounds = []
    for number in range(settings.repeat):
        pairs: dict[str, tuple[Disturbed, Disturbed]] = {}
        calm: dict[tuple[object, ...], Disturbed] = {}
        for way in wanted:
            options, victims = WAYS[way]
            arguments = ["--epochs", str(epochs), *options]
            in_cluster = way.endswith(IN_A_CLUSTER)
            with chaos.ray_cluster() if in_cluster else contextlib.nullcontext() as cluster:
                key = (in_cluster, *options)
                if key not in calm:
                    calm[key] = _run((), arguments, number, settings, say, cluster)
                hit = _run(victims, arguments, number, settings, say, cluster)
            pairs[way] = (calm[key], hit)
            say(f"goodput, {way}: {goodput(*pairs[way]):.3f}")
        rounds.append(pairs)
    return report(rounds, epochs, QUICK_EVERY_S if settings.quick else EVERY_S)


def _run(
    victims: tuple[str, ...],
    arguments: list[str],
    seed: int,
    settings: Settings,
    say: Say,
    cluster: chaos.Cluster | None,
) -> Disturbed:
    """One run in which `victims` die in turn; nobody does if there are none."""
    every_s = QUICK_EVERY_S if settings.quick else EVERY_S
    most = (QUICK_MOST if settings.quick else MOST_DEATHS) if victims else 0
    return chaos.disturbed(
        most,
        arguments,
        seed=seed,
        say=say,
        pause_s=(every_s, every_s),
        kinds=tuple(itertools.islice(itertools.cycle(victims), most)),
        deadline_s=RUN_DEADLINE_S,
        cluster=cluster,
    )


def goodput(calm: Disturbed, disturbed: Disturbed) -> float:
    """Useful updates a second of a disturbed run over those of an undisturbed one."""
    return calm.run_s / disturbed.run_s


def report(
    rounds: list[dict[str, tuple[Disturbed, Disturbed]]], epochs: int, every_s: float
) -> Report:
    """Medians over rounds, by way."""
    rows, result = [], {}
    for way in rounds[0]:
        pairs = [one[way] for one in rounds]
        found = {
            "goodput": statistics.median(goodput(*pair) for pair in pairs),
            "deaths": sum(hit.faults.total() for _, hit in pairs),
            "batches_repeated": sum(hit.duplicates for _, hit in pairs),
            "batches_recomputed": sum(hit.recomputed for _, hit in pairs),
            "undisturbed_s": statistics.median(calm.run_s for calm, _ in pairs),
            "disturbed_s": statistics.median(hit.run_s for _, hit in pairs),
        }
        result[way] = found
        rows.append(
            (
                way,
                f"{found['goodput']:.3f}",
                f"{found['deaths']}",
                f"{found['batches_repeated']:,}",
                f"{found['batches_recomputed']:,}",
                f"{found['undisturbed_s']:.0f}",
                f"{found['disturbed_s']:.0f}",
            )
        )
    return Report(
        name="goodput",
        title=f"something dies every {every_s:.0f} s of {epochs} epochs of mnist-bn",
        columns=("way", "goodput", "deaths", "repeated", "recomputed", "calm s", "disturbed s"),
        rows=tuple(rows),
        notes=(
            "repeated and recomputed are mini-batches; had an example been lost or applied twice, "
            "by the applied sets and sums in the last checkpoint, there would be no record.",
            "times are of the whole command, also of resumed drivers; Ray's start is part of it, "
            "except in a cluster.",
        ),
        configuration={
            "epochs": epochs,
            "every_s": every_s,
            "in_turn": {way: list(WAYS[way][1]) for way in result},
        },
        result=result,
        rounds=[
            {
                way: [{**vars(one), "faults": dict(one.faults)} for one in pair]
                for way, pair in pairs.items()
            }
            for pairs in rounds
        ],
    )
