"""Credentials that stand in an address, `s3://KEY:SECRET@bucket`, are refused before they spread.

An address goes into the run's `config.json`, into the list of processes, into Ray's metadata of
jobs and into logs. Credentials belong into the environment or into a file that the storage's
library reads by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from downpour.cluster.errors import UserError

_WITH_SECRET = re.compile(
    r"(?P<scheme>[A-Za-z][\w+.-]*)://[^/@:\s]+:(?!\d+(?:/|$))[^@\s]+@(?P<rest>\S*)"
)
"""A name, a colon and something that is no port, before an `@`. A secret may hold a slash."""


def check_no_secrets(values: Iterable[str]) -> None:
    """Check that no text holds an address with credentials.

    Raises:
        UserError: one does; the text of the error does not show them.
    """
    for value in values:
        if (found := _WITH_SECRET.search(value)) is not None:
            raise UserError(
                f"{found['scheme']}://…@{found['rest']} has credentials in it, which would be seen "
                "in lists of processes, in the run's folder and in logs: leave them out, and put "
                "them into the environment of every machine (for S3 AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY) or into the file that its library reads "
                "(~/.aws/credentials); a key that was given so should be replaced"
            )


def texts_of(plain: Any) -> Iterable[str]:
    """Yield every text in plain data."""
    if isinstance(plain, str):
        yield plain
    elif isinstance(plain, Mapping):
        for value in plain.values():
            yield from texts_of(value)
    elif isinstance(plain, list | tuple):
        for value in plain:
            yield from texts_of(value)
