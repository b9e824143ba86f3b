"""A real run whose partition is killed (kill -9) while it has a follower."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.helpers import commands
from tests.helpers.small_run import SMALL

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
REPLAY_DEADLINE_S = 200.0
"""It computes again, with one processor, what two have done meanwhile."""


def told(run: Path, what: str) -> int:
    """How many lines of `events.jsonl` have this in them."""
    path = run / "events.jsonl"
    if not path.exists():
        return 0
    return sum(what in json.loads(line)["event"] for line in path.read_text().splitlines())


def process_of(driver: int, title: str) -> int:
    """The one process below the driver whose title begins with this."""
    found = [p for p, c in commands.descendants(driver).items() if c.startswith(title)]
    assert len(found) == 1, commands.descendants(driver)
    return found[0]


def test_a_partition_that_is_killed_costs_no_update_and_the_run_is_the_same_to_the_bit(
    tmp_path: Path,
) -> None:
    """Its first follower hangs and is given up; the next one takes its place.

    The rule has two moments and a count, and the weights are averaged: a follower has all of it.
    Its process of replicas hangs, too, and is ended and replaced without anybody asking for it.
    """
    log, run = tmp_path / "log", tmp_path / "runs" / "a"
    process = commands.start(
        *("train", "mnist-bn", "--runs", tmp_path / "runs", "--name", "a", "--epochs", "70"),
        *("--hot-standby", "--record-pushes", "--checkpoint-every-s", "1000", "--no-dashboard"),
        *("--spares", "none"),  # one more import of PyTorch
        *(*SMALL, "--replicas", "2", "--concurrent-steps", "3"),
        *("--rule", "adamw", "--learning-rate", "0.002", "--schedule", "cosine", "--ema", "0.99"),
        log=log,
        module="tests.helpers.impatient",
    )
    try:
        commands.wait_for(lambda: told(run, "has a follower") == 1, "the first follower")
        hung = process_of(process.pid, "ray::Follower")
        os.kill(hung, signal.SIGSTOP)
        commands.wait_for(lambda: told(run, "has a follower") == 2, "the second follower")
        before = commands.updates(run)
        commands.kill(process_of(process.pid, "ray::Partition"))
        commands.wait_for(lambda: commands.updates(run) > before + 100, "updates after the death")
        found = commands.descendants(process.pid).items()
        stopped = min(pid for pid, title in found if title.startswith("ray::Replicas"))
        os.kill(stopped, signal.SIGSTOP)
        commands.wait_for(
            lambda: told(run, "does not answer (nothing for"), "a word on the process that hangs"
        )
        before = commands.updates(run)
        commands.wait_for(lambda: commands.updates(run) > before + 100, "updates after the hang")
        commands.wait_for(lambda: not commands.alive({stopped}), "the end of the process that hung")
        process.send_signal(signal.SIGTERM)
        assert process.wait(commands.DEADLINE_S) == 143, log.read_text()
    finally:
        process.kill()
    assert told(run, "its partition goes on without it") == 1
    assert told(run, "its follower takes its place") == 1
    assert told(run, "0 mini-batches are run again") == 1
    assert told(run, "starts again from") == 0
    updates = [m["updates"] for m in commands.metrics(run) if "replicas_alive" in m]
    assert updates == sorted(updates)
    replay = tmp_path / "replay"
    assert commands.run("replay", run, log=replay, deadline_s=REPLAY_DEADLINE_S) == 0, (
        replay.read_text()
    )
