"""Settings that come from a record in place of a search."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from downpour.benchmarks.harness import BadSettings
from downpour.benchmarks.learning.benchmark import plain_setting
from downpour.benchmarks.learning.peers import FULL, LIMIT, SYSTEM, peers
from downpour.benchmarks.learning.reuse import found_before


def record(path: Path, settings: dict[str, Any], benchmark: str = "learning") -> str:
    result = {name: {"setting": setting} for name, setting in settings.items()}
    whole = {"benchmark": benchmark, "date": "2026-11-30T12:00:00+00:00", "result": result}
    path.write_text(json.dumps(whole))
    return str(path)


def test_a_setting_comes_back_as_it_was(tmp_path: Path) -> None:
    everybody = peers(2)
    settings = {
        name: FULL.grid(everybody[name]).settings(everybody[name].shapes[-1])[-1]
        for name in (LIMIT, SYSTEM, "ddp")
    }
    path = record(tmp_path / "a.json", {n: plain_setting(s) for n, s in settings.items()})
    found = found_before(path, everybody)
    for name, one in found.items():
        assert one.best.base_rate == pytest.approx(settings[name].base_rate)
        assert dataclasses.replace(settings[name], base_rate=one.best.base_rate) == one.best
    assert all(one.source == "a.json of 2026-11-30" and not one.trials for one in found.values())


def test_a_record_from_before_there_were_averages_has_none(tmp_path: Path) -> None:
    plain = {"workers": 1, "batch_size": 64, "learning_rate": 0.2, "decay": 0.75}
    found = found_before(record(tmp_path / "a.json", {LIMIT: plain}), peers(2))
    best = found[LIMIT].best
    assert (best.average, best.momentum, best.nesterov) == (None, 0.9, False)
    assert found[LIMIT].best.learning_rate == pytest.approx(0.2)


def test_what_is_no_such_record_is_refused(tmp_path: Path) -> None:
    everybody = peers(2)
    other = record(tmp_path / "b.json", {}, "peers")
    with pytest.raises(BadSettings, match="is a record of bench peers"):
        found_before(other, everybody)
    with pytest.raises(BadSettings, match="cannot be read"):
        found_before(str(tmp_path / "none.json"), everybody)
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(BadSettings, match="is no record"):
        found_before(str(tmp_path / "c.json"), everybody)
    large = {"workers": 1, "batch_size": 4096, "learning_rate": 0.2, "decay": 0.75}
    with pytest.raises(BadSettings, match="has none of plain"):
        found_before(record(tmp_path / "d.json", {LIMIT: large}), everybody)
