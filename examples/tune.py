"""Eight learning rates with Ray Tune, two at a time, and ASHA to end those that do not do well.

    python -m examples.tune

It needs the extra `tune` (`pip install 'downpour[tune]'`). Each trial is a run with a folder of its
own in `runs/rates/`. One that ASHA has ended can be resumed, since it has checkpoints. Network and
data are those of the recipe `mnist-bn`, whose data comes with Downpour.
"""

from __future__ import annotations

import argparse

from ray import tune
from ray.tune.schedulers import ASHAScheduler

import downpour

RATES = (0.4, 1.2, 0.12, 4.0, 0.04, 0.012, 0.004, 0.0012)
"""The recipe's own first, then from there outwards. ASHA judges a trial by those that came before
it: if good rates come early, the others end soon. Rates that grow steadily would each seem the best
so far."""
EPOCHS = 8


def trainer(**settings: object) -> downpour.Trainer:
    """What all trials have in common: 4 replicas, two scorings a second."""
    given = {"epochs": EPOCHS, "replicas": 4, "evaluate_every_s": 0.5, **settings}
    return downpour.Trainer(config="mnist-bn", **given)


def rates(of: downpour.Trainer, *, asha: bool = True, at_a_time: int = 2) -> tune.ResultGrid:
    """Train with each rate.

    With ASHA the best third goes on after one epoch and after three, as its accuracy compares with
    those that got there before. With this data it takes about a third of the examples of eight
    runs to the end.
    """
    scheduler = ASHAScheduler(
        time_attr="epoch",
        max_t=of.config.policy.epochs,
        grace_period=1,
        reduction_factor=3,
        stop_last_trials=False,  # who is at the end writes a result
    )
    tuner = tune.Tuner(
        of.as_trainable(),
        param_space={"learning_rate": tune.grid_search(list(RATES))},
        tune_config=tune.TuneConfig(
            metric="accuracy",
            mode="max",
            scheduler=scheduler if asha else None,
            max_concurrent_trials=at_a_time,
        ),
        run_config=tune.RunConfig(name="rates" if asha else "rates-grid", verbose=1),
    )
    return tuner.fit()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Eight learning rates with Ray Tune.")
    parser.add_argument("--grid", action="store_true", help="train with every rate to the end")
    found = rates(trainer(), asha=not parser.parse_args().grid)
    frame = found.get_dataframe()
    columns = ["config/learning_rate", "accuracy", "epoch", "updates", "examples"]
    print(frame[columns].sort_values("accuracy", ascending=False).to_string(index=False))
    print(f"{frame['examples'].sum():,.0f} examples in all")
