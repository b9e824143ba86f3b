"""Code in a run's folder: objects that have no importable name, pickled, under the user's seal.

To unpickle is to run code, and a folder may come from anywhere. So the file bears a seal: an HMAC
by a key that is this user's alone, in `~/.downpour/seal.key`. Without a seal of one's own nothing
is unpickled. `trust` puts one's own seal on a folder that one has reason to trust.

    {"format": 1, "python": "3.11", "objects": {name: base64}, "seal": hexadecimal}

The name of an object holds a digest of its bytes (`models.by_value`), and `config.json` holds the
name.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import os
import secrets
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from downpour.cluster.errors import UserError
from downpour.paramserver import durable

CODE = "code.json"
FORMAT = 1
KEY = Path("~/.downpour/seal.key")
KEY_BYTES = 32


def write(folder: Path, carried: Mapping[str, bytes | str]) -> None:
    """Write the objects of a run, sealed, into its folder; only this user can read the file.

    Raises:
        UserError: the key cannot be kept.
        OSError: the folder cannot be written.
    """
    objects = {k: base64.b64encode(v).decode() for k, v in carried.items() if isinstance(v, bytes)}
    _write(folder, {"format": FORMAT, "python": _python(), "objects": objects})


def read(folder: Path) -> dict[str, bytes | str]:
    """The objects in a run's folder, each as its bytes, or as a text why they cannot be used."""
    try:
        plain = _plain(folder)
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    reason = None
    if not hmac.compare_digest(_seal(plain, _key(make=False)), str(plain.get("seal"))):
        reason = (
            f"{folder / CODE} does not bear the seal of this user, and to use it runs the code in "
            f"it; if you trust whoever made it, `downpour trust {folder}`"
        )
    elif plain["python"] != _python():
        reason = f"it was made by Python {plain['python']}, and this is {_python()}: use that one"
    found: dict[str, bytes | str] = {}
    for name, text in plain["objects"].items():
        found[name] = base64.b64decode(text) if reason is None else reason
    return found


def trust(folder: Path) -> list[str]:
    """Put this user's seal on the code in a run's folder; gives the names of what is in it.

    Raises:
        UserError: there is no code, or it cannot be written.
    """
    try:
        plain = _plain(folder)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{folder} holds no code to trust ({error}): only a run whose network or loss has no "
            f"importable name has a {CODE}"
        ) from None
    try:
        _write(folder, plain)
    except OSError as error:
        raise UserError(f"{folder / CODE} cannot be written: {error.strerror}") from None
    return sorted(plain["objects"])


def _plain(folder: Path) -> dict[str, Any]:
    plain = json.loads((folder / CODE).read_text())
    if plain["format"] != FORMAT or not isinstance(plain["objects"], dict):
        raise ValueError("it is of another format")
    return {key: plain[key] for key in ("format", "python", "objects", "seal")}


def _write(folder: Path, plain: Mapping[str, Any]) -> None:
    sealed = {**plain, "seal": _seal(plain, _key(make=True))}
    name = folder / f".{CODE}.{secrets.token_hex(4)}.partial"
    with durable.replacing(folder / CODE, str(name)) as partial:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump(sealed, file, indent=1)


def _seal(plain: Mapping[str, Any], key: bytes) -> str:
    told = {name: plain[name] for name in ("format", "python", "objects")}
    return hmac.new(key, json.dumps(told, sort_keys=True).encode(), hashlib.sha256).hexdigest()


def _key(*, make: bool) -> bytes:
    """This user's key; random bytes that nothing was sealed with if there is none."""
    path = KEY.expanduser()
    try:
        if make and not path.exists():
            path.parent.mkdir(mode=0o700, exist_ok=True)
            fresh = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(secrets.token_bytes(KEY_BYTES))
            durable.sync(fresh)  # what is sealed with a key that is lost is never used again
            with contextlib.suppress(FileExistsError):
                os.link(fresh, path)  # unlike a rename, it leaves a key that was there first
            fresh.unlink()
            durable.sync(path.parent)
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(fd, "rb") as file:
            about = os.fstat(fd)
            key = file.read()
    except OSError as error:
        if not make:
            return secrets.token_bytes(KEY_BYTES)
        raise UserError(
            f"the key that seals a run's code cannot be kept in {path} ({error.strerror}): set "
            "HOME to a folder that can be written to, or put network and loss into a module"
        ) from None
    shared = about.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    if about.st_uid != os.geteuid() or shared or len(key) != KEY_BYTES:
        if make:
            raise UserError(
                f"{path} is not a key of this user's alone: remove it, and a new one is made"
            )
        return secrets.token_bytes(KEY_BYTES)
    return key


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"
