"""The key that callers of `downpour serve` have to show, whatever the address.

    Authorization: Bearer KEY

The key is made anew for each deployment, or read from a file of the user's. It stays in this
process and in a file that only its owner can read. Ray's processes, and so Ray's tables, get the
SHA-256 of the header, which is enough to compare with.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from downpour.cluster.errors import UserError

FOLDER = Path("~/.downpour")
MIN_CHARACTERS = 16
"""Shortest key of the user's own, in characters."""
REFUSED = "the key is missing or wrong: send it as 'Authorization: Bearer KEY'"


def make() -> str:
    """A new key, of 256 random bits."""
    return secrets.token_urlsafe(32)


def read(path: Path) -> str:
    """Return the key in a file of the user's, which holds nothing else.

    Raises:
        UserError: the file cannot be read, others can read it, or the key is too weak.
    """
    try:
        mode, text = path.stat().st_mode, path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--key-file {path} cannot be read ({error}): give a file that holds the key"
        ) from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"--key-file {path} can be read by others: chmod 600 {path}")
    if len(text) < MIN_CHARACTERS or not (text.isascii() and text.isprintable()) or " " in text:
        raise UserError(
            f"--key-file {path} holds no key: give one line of at least {MIN_CHARACTERS} printable "
            "ASCII characters without spaces, such as `openssl rand -hex 32` writes"
        )
    return text


def header(key: str) -> str:
    """Return the header that a caller sends."""
    return f"Bearer {key}"


def digest(authorization: str) -> str:
    """Return the SHA-256 of a header in hexadecimal, for places where the key should not be."""
    return hashlib.sha256(authorization.encode()).hexdigest()


def admits(expected: str, authorization: str) -> bool:
    """Whether a caller's header is the one whose digest is `expected`."""
    return hmac.compare_digest(expected, digest(authorization))


@contextlib.contextmanager
def kept(key: str, name: str) -> Iterator[Path]:
    """Keep the whole header in a file, for `curl -H @FILE`, while the context lasts."""
    folder = FOLDER.expanduser()
    path = folder / name
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        path.unlink(missing_ok=True)  # of a server that was killed
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise UserError(
            f"the key cannot be kept in {path} ({error.strerror}): set HOME to a folder that can "
            "be written to"
        ) from None
    with os.fdopen(fd, "w") as file:
        file.write(f"Authorization: {header(key)}\n")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
