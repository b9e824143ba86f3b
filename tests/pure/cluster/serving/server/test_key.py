"""The key of `downpour serve`: where it comes from, where it is kept, who is let in."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from downpour.cluster.errors import UserError
from downpour.cluster.serving.server import key


def test_keys_are_long_and_differ() -> None:
    first, second = key.make(), key.make()
    assert first != second
    assert len(first) >= 43  # 256 bits, six to a character


def test_the_users_own_key_is_read(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("0123456789abcdef\n")
    path.chmod(0o600)
    assert key.read(path) == "0123456789abcdef"


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("0123456789abcdef", 0o640, "can be read by others: chmod 600"),
        ("0123456789abcde", 0o600, "holds no key: give one line of at least 16"),
        ("Bearer 0123456789abcdef", 0o600, "holds no key"),
        ("0123456789abcdef\n0123456789abcdef", 0o600, "holds no key"),
        ("0123456789abcdéf", 0o600, "holds no key"),
        (None, 0, "cannot be read"),
    ],
)
def test_a_key_that_is_none_is_refused(
    text: str | None, mode: int, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "key"
    if text is not None:
        path.write_text(text)
        path.chmod(mode)
    with pytest.raises(UserError, match=said) as error:
        key.read(path)
    assert str(path) in str(error.value)
    if text:
        assert text not in str(error.value)


def test_the_header_is_kept_for_its_owner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    stale = tmp_path / ".downpour" / "serve-8000"
    stale.parent.mkdir()
    stale.write_text("of a server that was killed")
    stale.chmod(0o644)
    with key.kept("k" * 43, "serve-8000") as path:
        assert path == stale
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.read_text() == f"Authorization: Bearer {'k' * 43}\n"
    assert not path.exists()
