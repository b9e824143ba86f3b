"""What is in a request: an image as the body itself, or as a file in a form. Pure.

Not here: whether its bytes can be decoded, and how large it may be.
"""

from __future__ import annotations

import email.parser
import email.policy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

ACCEPTED = "image/*, application/octet-stream, multipart/form-data"
_PLAIN = ("", "application/octet-stream", "application/x-www-form-urlencoded")
"""Types of a body that may be an image; the last is what `curl --data-binary` says of any body."""
_UNTYPED = ("text/plain", *_PLAIN)
"""Types of a part of a form: a part that says nothing is text by the standard."""


class Refused(Exception):
    """A request that is answered with a status of 4xx or 5xx and a sentence."""

    def __init__(
        self, status: int, sentence: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(sentence)
        self.status = status
        self.headers = dict(headers or {})


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What a caller sent."""

    content: Any
    """An image file, or rows of numbers."""
    fields: Mapping[str, str]
    """Values that stood beside it in a form, by name."""


def sent_in(headers: Mapping[str, str], body: bytes) -> Sent:
    """Return the image in a request's body.

    Args:
        headers: of the request, with names in lower case.
        body: whole.

    Raises:
        Refused: 415 for a type or an encoding that is not read, 400 for a body that is empty or is
            not what it says.
    """
    check_encoding(headers, "the image")
    if not body:
        raise Refused(400, "the body is empty: send an image file")
    declared = headers.get("content-type", "")
    kind = declared.partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return _sent_in_form(declared, body)
    if kind in _PLAIN or kind.startswith("image/"):
        return Sent(content=body, fields={})
    raise Refused(
        415,
        f"a body of type {kind!r} is not read: send an image file, as it is or in a form",
        {"accept-post": ACCEPTED},
    )


def check_encoding(headers: Mapping[str, str], what: str) -> None:
    """Check that a body is sent as it is.

    Args:
        headers: of the request, with names in lower case.
        what: the body has in it, for the message.

    Raises:
        Refused: it is packed.
    """
    encoding = headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise Refused(415, f"a body in {encoding!r} is not read: send {what} as it is")


def _sent_in_form(declared: str, body: bytes) -> Sent:
    header = email.parser.HeaderParser(policy=email.policy.HTTP).parsestr(
        f"content-type: {declared}\r\n\r\n"
    )
    boundary = header.get_boundary("")
    if not boundary:
        raise Refused(400, "the form has no boundary: let the program that sends it make the type")
    images: list[bytes] = []
    fields: dict[str, str] = {}
    for name, is_file, content in _parts(body, boundary.encode("latin-1", "replace")):
        if is_file:
            images.append(content)
        else:
            fields[name] = content.decode(errors="replace")
    if len(images) != 1:
        raise Refused(400, f"the form has {len(images)} files: send one image a request")
    if not images[0]:
        raise Refused(400, "the file in the form is empty: send an image file")
    return Sent(content=images[0], fields=fields)


def _parts(body: bytes, boundary: bytes) -> Iterator[tuple[str, bool, bytes]]:
    """Yield name, whether it is a file, and content of each part (RFC 7578, RFC 2046)."""
    between = b"\r\n--" + boundary
    data = b"\r\n" + body
    at = data.find(between)
    while at >= 0:
        start = at + len(between)
        if data[start : start + 2] == b"--":
            return
        at = data.find(between, start)
        part = data[start:at] if at >= 0 else b""
        head, blank, content = part.partition(b"\r\n\r\n")
        if at < 0 or not blank:
            break
        about = email.parser.HeaderParser(policy=email.policy.HTTP).parsestr(
            head.lstrip().decode(errors="replace") + "\r\n\r\n"
        )
        name = str(about.get_param("name", "", "content-disposition"))
        kind = about.get_content_type()
        is_file = about.get_filename() is not None or kind not in _UNTYPED
        yield name, is_file, content
    raise Refused(400, "the form is cut short: send it whole")
