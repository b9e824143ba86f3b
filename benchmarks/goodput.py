"""Claim: a run in which something dies every 15 seconds does nearly what an undisturbed one does.

Two runs of `mnist-bn` of the same length, one after the other in one session. In one of them
something is killed (kill -9) every 15 seconds, in turn: a process of replicas, a partition, a
shuffler, the evaluator, and the driver, which is then resumed. Goodput is the time of the
undisturbed run over that of the other: both do the same updates, so it is useful updates a second
over useful updates a second. That each example was applied once comes from the last checkpoint.
"""

from __future__ import annotations

import itertools
import statistics

from downpour.benchmarks import chaos
from downpour.benchmarks.chaos import Disturbed
from downpour.benchmarks.harness import BadSettings, Report, Say, Settings

EVERY_S, QUICK_EVERY_S = 15.0, 1.0
EPOCHS, QUICK_EPOCHS = 120, 4
"""Of `mnist-bn`: some minutes on two cores."""
IN_TURN = ("replicas", "partition", "shuffler", "evaluator", "driver")
MOST_DEATHS, QUICK_MOST = 1000, 2
RUN_DEADLINE_S = 3600.0
WAYS = {"hot standby": ["--hot-standby"], "checkpoints": []}
"""What a partition that dies starts from."""


def run(settings: Settings, say: Say) -> Report:
    """Each way: `repeat` pairs of an undisturbed run and one with deaths."""
    wanted = settings.only or tuple(WAYS)
    if unknown := set(wanted) - WAYS.keys():
        raise BadSettings(f"--only {min(unknown)}: give one of {', '.join(WAYS)}")
    epochs = QUICK_EPOCHS if settings.quick else EPOCHS
    rounds = []
    for number in range(settings.repeat):
        pairs = {}
        for way in wanted:
            arguments = ["--epochs", str(epochs), *WAYS[way]]
            calm = _run(0, arguments, number, settings, say)
            pairs[way] = (calm, _run(MOST_DEATHS, arguments, number, settings, say))
            say(f"goodput, {way}: {goodput(*pairs[way]):.3f}")
        rounds.append(pairs)
    return report(rounds, epochs, QUICK_EVERY_S if settings.quick else EVERY_S)


def _run(deaths: int, arguments: list[str], seed: int, settings: Settings, say: Say) -> Disturbed:
    every_s = QUICK_EVERY_S if settings.quick else EVERY_S
    most = min(deaths, QUICK_MOST) if settings.quick else deaths
    return chaos.disturbed(
        most,
        arguments,
        seed=seed,
        say=say,
        pause_s=(every_s, every_s),
        kinds=tuple(itertools.islice(itertools.cycle(IN_TURN), most)),
        deadline_s=RUN_DEADLINE_S,
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
            "times are of the whole command, Ray's start included, also that of resumed drivers.",
        ),
        configuration={"epochs": epochs, "every_s": every_s, "in_turn": list(IN_TURN)},
        result=result,
        rounds=[
            {
                way: [{**vars(one), "faults": dict(one.faults)} for one in pair]
                for way, pair in pairs.items()
            }
            for pairs in rounds
        ],
    )
