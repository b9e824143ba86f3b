"""Where a record of a benchmark is kept, and what it says of the code."""

from pathlib import Path

import pytest

from downpour.benchmarks import harness

RECORD = {"benchmark": "peers", "date": "2026-11-30T12:00:00+00:00", "result": {}}


def test_without_a_checkout_records_are_kept_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "checkout", lambda: None)
    monkeypatch.chdir(tmp_path)
    path = harness.save(RECORD)
    assert path == tmp_path / "benchmarks" / "results" / "peers-20261130-120000.json"
    assert path.read_text().startswith("{")
    assert harness.machine()["commit"] is None, "the commit of another repository around it"


def test_in_a_checkout_they_are_kept_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "checkout", lambda: tmp_path)
    assert harness.save(RECORD).parent == tmp_path / "benchmarks" / "results"
