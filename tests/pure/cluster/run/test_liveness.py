"""Whether a run is trained, by lock, process and beats; no clock but the looker's counts."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from downpour.cluster.run import liveness
from downpour.cluster.run.liveness import SILENT_S, Held, Holder, Life, Pulse, decide, held

ELSEWHERE = Holder(host="far", boot="other", processes="pid:[1]", pid=7, started="5")


@pytest.mark.parametrize(
    ("locked", "exists", "quiet_s", "life"),
    [
        (True, None, 1e9, "lives"),
        (True, False, 1e9, "lives"),  # a child of the holder has the lock
        (False, True, None, "died"),  # the process went on, and the training did not
        (False, False, None, "died"),
        (None, False, None, "died"),
        (None, True, None, "lives"),
        (None, True, SILENT_S, "died"),
        (False, None, None, "lives"),
        (False, None, 1.0, "unknown"),
        (False, None, SILENT_S, "died"),
    ],
)
def test_decisions(
    locked: bool | None, exists: bool | None, quiet_s: float | None, life: Life
) -> None:
    assert decide(locked=locked, exists=exists, quiet_s=quiet_s) == life


class Clock:
    """Seconds that pass when the test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("behind_s", [-180.0, 0.0, 180.0])
def test_beats_from_elsewhere_count_whatever_the_clock_there_says(
    tmp_path: Path, behind_s: float
) -> None:
    """The lock is not seen from here, and each write bears a time three minutes off."""
    (tmp_path / liveness.LOCK).write_text(json.dumps(asdict(ELSEWHERE)))
    status, clock = tmp_path / "status.json", Clock()
    status.write_text("{}")
    pulse = Pulse(tmp_path, ("status.json",), clock)
    assert pulse.life() == "unknown"
    for beat in range(1, 30):
        clock.now += 20.0
        os.utime(status, ns=(0, int((1e9 + 2 * beat - behind_s) * 1e9)))
        assert pulse.life() == "lives"
    clock.now += SILENT_S - 1
    assert pulse.life() == "lives"
    clock.now += 1
    assert pulse.life() == "died"


def test_a_run_of_which_nothing_moves_is_dead_after_a_while(tmp_path: Path) -> None:
    (tmp_path / liveness.LOCK).write_text(json.dumps(asdict(ELSEWHERE)))
    clock = Clock()
    pulse = Pulse(tmp_path, (), clock)
    clock.now = SILENT_S - 1
    assert pulse.life() == "unknown"
    clock.now = SILENT_S
    assert pulse.life() == "died"
    (tmp_path / liveness.LOCK).unlink()
    assert Pulse(tmp_path, (), clock).life() == "died", "nobody has ever held it"


def test_the_holder_is_known_on_its_machine(tmp_path: Path) -> None:
    me = Holder.here()
    assert me.exists() is True
    assert dataclasses.replace(me, started="1").exists() is False, "a number that came again"
    assert ELSEWHERE.exists() is None
    with held(tmp_path):
        assert Holder(**json.loads((tmp_path / liveness.LOCK).read_text())) == me
        assert Pulse(tmp_path, ()).life() == "lives"
        with pytest.raises(Held), held(tmp_path):
            pass
    assert Pulse(tmp_path, ()).life() == "died"


def test_who_holds_a_run_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "BEAT_S", 0.001)
    with held(tmp_path):
        path = tmp_path / liveness.LOCK
        os.utime(path, ns=(0, 0))
        while path.stat().st_mtime_ns == 0:  # the test's own deadline ends this
            pass


def test_somebody_who_looks_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    looker = os.open(tmp_path / liveness.LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(looker, fcntl.LOCK_SH)
    monkeypatch.setattr(liveness.time, "sleep", lambda _: fcntl.flock(looker, fcntl.LOCK_UN))
    with held(tmp_path):
        assert liveness.is_locked(tmp_path) is True
    os.close(looker)
    assert liveness.is_locked(tmp_path) is False
