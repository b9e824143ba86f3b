"""The image in a request: the body itself, or a file in a form; anything else is refused."""

from collections.abc import Mapping

import pytest

from downpour.cluster.serving.server.body import Refused, sent_in

IMAGE = bytes(range(256)) + b"\r\n--\r\n\r\n--not it" + bytes(64)
FORM = "multipart/form-data; boundary=XyZ"


def part(about: str, content: bytes, kind: str | None = "image/jpeg") -> bytes:
    typed = f"Content-Type: {kind}\r\n" if kind else ""
    head = f"--XyZ\r\nContent-Disposition: form-data; {about}\r\n{typed}\r\n"
    return head.encode() + content + b"\r\n"


PHOTO = part('name="file"; filename="a b.jpg"', IMAGE)
END = b"--XyZ--\r\n"


@pytest.mark.parametrize(
    "kind",
    [
        *(None, "image/jpeg", "image/x-anything", "IMAGE/PNG", "application/octet-stream; x=1"),
        "application/x-www-form-urlencoded",
    ],
)
def test_the_body_is_the_image(kind: str | None) -> None:
    sent = sent_in({"content-type": kind} if kind else {}, IMAGE)
    assert (sent.content, sent.fields) == (IMAGE, {})


def test_a_file_in_a_form() -> None:
    top = part('name="top"', b"3", None)
    quoted = 'multipart/form-data; charset=utf-8; boundary="XyZ"'
    for kind, body, fields in (
        (FORM, PHOTO + END, {}),
        (FORM, top + PHOTO + END, {"top": "3"}),
        (quoted, b"what comes before it\r\n" + PHOTO + top + END + b"and after", {"top": "3"}),
        (FORM, part('name="file"', IMAGE) + END, {}),  # without a name, but with a type
        (FORM, part('name="f"; filename="x"', IMAGE, None) + END, {}),
    ):
        sent = sent_in({"content-type": kind}, body)
        assert (sent.content, sent.fields) == (IMAGE, fields)


@pytest.mark.parametrize(
    ("headers", "body", "status", "words"),
    [
        ({}, b"", 400, "the body is empty"),
        ({"content-type": "application/json"}, b"{}", 415, "of type 'application/json' is not"),
        ({"content-type": "text/html"}, b"x", 415, "'text/html'"),
        ({"content-encoding": "gzip"}, IMAGE, 415, "in 'gzip' is not read"),
        ({"content-type": "multipart/form-data"}, PHOTO + END, 400, "no boundary"),
        ({"content-type": FORM}, END, 400, "has 0 files"),
        ({"content-type": FORM}, PHOTO + PHOTO + END, 400, "has 2 files"),
        ({"content-type": FORM}, part('name="a"; filename="a"', b"") + END, 400, "is empty"),
        ({"content-type": FORM}, PHOTO, 400, "cut short"),
        ({"content-type": FORM}, PHOTO[:100], 400, "cut short"),
        ({"content-type": FORM}, b"--XyZ\r\nno end of the head\r\n" + END, 400, "cut short"),
        ({"content-type": FORM}, b"hello", 400, "cut short"),
    ],
)
def test_what_is_refused(headers: Mapping[str, str], body: bytes, status: int, words: str) -> None:
    with pytest.raises(Refused, match=words) as refused:
        sent_in(headers, body)
    assert refused.value.status == status
    if words.startswith("of type"):
        assert "multipart/form-data" in refused.value.headers["accept-post"]
