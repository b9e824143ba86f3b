"""Jobs on a Ray cluster: submitting one, and following its output.

What a job runs is a command of `downpour`. What travels with it is `upload`'s.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from downpour.cluster.config.paths import PACKAGE
from downpour.cluster.deploy import upload
from downpour.cluster.errors import EXIT_ERROR, UserError, one_line

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
TOKEN_FILE = Path("~/.ray/auth_token")
LOOK_AGAIN_S = 1.0
_TALKATIVE = (
    *("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"),
    "ray._private.runtime_env.packaging",
)
"""Loggers of Ray that tell of each package; `downpour submit` has said what it sends."""


def use_token() -> None:
    """Have Ray show the user's token, if there is one. Ray looks when it is imported, and once."""
    if TOKEN_FILE.expanduser().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def connect(address: str | None) -> Any:
    """A client of the cluster's job API.

    Args:
        address: URL of the cluster's dashboard; None takes RAY_API_SERVER_ADDRESS, or else
            `DEFAULT_ADDRESS`.

    Raises:
        UserError: the cluster does not answer, or refuses the token.
    """
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    use_token()
    from ray.job_submission import JobSubmissionClient

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        client = JobSubmissionClient(address)
        client.list_jobs()  # the first word is what tells whether the token is right
    except Exception as error:  # whatever requests, Ray's client and its token loader raise
        raise UserError(
            f"the cluster at {address} cannot be used: {_reason(error)}; is the tunnel up "
            "(`ray dashboard FILE`), and ~/.ray/auth_token the cluster's?"
        ) from None
    return client


def submit(
    client: Any, arguments: Sequence[str], job_id: str | None, travels: upload.Upload
) -> str:
    """Submit `downpour ARGUMENTS` with what `travels` along; return the job's id.

    This installation of Downpour travels as well, so the nodes need only its dependencies.

    Raises:
        UserError: the cluster refuses the job.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="downpour-modules-") as staging:
            submitted: str = client.submit_job(
                entrypoint=shlex.join(["python", "-m", "downpour", *arguments]),
                submission_id=job_id,
                runtime_env=runtime_env(travels, Path(staging)),
                metadata={"program": "downpour", "command": shlex.join(arguments)},
            )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the cluster refused the job: {_reason(error)}") from None
    return submitted


def runtime_env(travels: upload.Upload, staging: Path) -> dict[str, Any]:
    """Ray's runtime environment of a job that gets `travels`.

    Ray's job client takes folders only, so a module that is a single file travels as a package of
    the same name, made in `staging`.
    """
    modules = []
    for path in travels.modules:
        folder = path
        if path.is_file():
            folder = staging / path.stem
            folder.mkdir()
            shutil.copyfile(path, folder / "__init__.py")
        modules.append(str(folder))
    return {
        "working_dir": str(travels.folder),
        "py_modules": [str(PACKAGE), *modules],
        "excludes": upload.excludes(travels.folder, travels.data),
    }


def follow(client: Any, job_id: str) -> int:
    """Print a job's output until it ends; return the exit status for this command.

    Raises:
        UserError: the cluster knows no such job, or the connection is lost.
    """
    try:
        asyncio.run(_print(client, job_id))
        status, message = _ended(client, job_id)
    except KeyboardInterrupt:
        sys.stderr.write(
            f"\nthe job goes on: `downpour submit --follow --id {job_id}` takes it up, "
            f"`ray job stop {job_id}` ends it\n"
        )
        return 130
    except RuntimeError as error:
        raise UserError(f"job {job_id} cannot be followed: {_reason(error)}") from None
    if status == "SUCCEEDED":
        return 0
    sys.stderr.write(f"job {job_id} {status.lower()}: {message}\n")
    return EXIT_ERROR


async def _print(client: Any, job_id: str) -> None:
    async for lines in client.tail_job_logs(job_id):
        sys.stdout.write(lines)
        sys.stdout.flush()


def _ended(client: Any, job_id: str) -> tuple[str, str]:
    """How a job ended, once it has: its output may stop a moment before."""
    import time

    while not (status := client.get_job_status(job_id)).is_terminal():
        time.sleep(LOOK_AGAIN_S)
    info = client.get_job_info(job_id)
    return str(status.value), one_line(Exception(info.message or "no reason given"))


def _reason(error: BaseException) -> str:
    text = one_line(error)
    return text if len(text) < 300 else f"{text[:300]}..."
