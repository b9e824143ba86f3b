"""What the tests of deployment share."""

from __future__ import annotations

from pathlib import Path

import pytest

from downpour.cluster.config.paths import ROOT


@pytest.fixture
def as_a_user_in_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home with a token, and the working directory that the documentation says."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(ROOT)
