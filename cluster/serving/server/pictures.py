"""Requests with a picture: what is sent, and what is answered. Pure but for the network.

Not here: several requests together, and their waits (`classifier`).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from downpour.cluster.serving.server.body import ACCEPTED, Refused, Sent, sent_in
from downpour.shuffler.errors import DecodeError, ImageTooLarge, UnknownFormat

if TYPE_CHECKING:
    from downpour.workers.evaluation.predictor import Answer, Predictor


class Pictures:
    """Answers pictures with their classes, their numbers or their masks."""

    wanted = "an image"
    """What a caller posts."""

    def __init__(self, predictor: Predictor, class_names: Sequence[str]) -> None:
        """`class_names` are of the predictor's labels."""
        self._predictor, self._names = predictor, class_names

    def read(self, headers: Mapping[str, str], body: bytes) -> Sent:
        """Return the picture that was sent, whose header says that it can be decoded.

        Raises:
            Refused: see `sent_in` and `check_image`.
        """
        return sent_in(headers, body)

    def check(self, content: bytes) -> None:
        """See `check_image`."""
        check_image(content)

    def together(self, images: Sequence[bytes]) -> list[tuple[Answer, int] | Refused]:
        """Return for each picture where its answer is, or why there is none."""
        try:
            return self._together(images)
        except DecodeError:  # one of them is of a size that the network cannot be shown
            return [self._alone(image) for image in images]

    def told(self, found: tuple[Answer, int], top: int) -> dict[str, Any]:
        """Return what is said of a picture, as plain data."""
        from downpour.cluster.serving.prediction import told

        answer, place = found
        classes, mask = told(answer, place, self._predictor.task, self._names, top)
        if mask is None:
            return {"predictions": classes}
        return {"predictions": classes, "mask": base64.b64encode(mask).decode()}

    def _together(self, images: Sequence[bytes]) -> list[tuple[Answer, int] | Refused]:
        from downpour.workers.evaluation.predictor import rows_of

        names = ["the image"] * len(images)
        answer = self._predictor.answer(rows_of(images, names), on_bad_image="skip")
        places = {position: place for place, position in enumerate(answer.kept.tolist())}
        problems = iter(answer.problems)
        return [
            (answer, places[i]) if i in places else Refused(400, next(problems))
            for i in range(len(images))
        ]

    def _alone(self, image: bytes) -> tuple[Answer, int] | Refused:
        try:
            return self._together([image])[0]
        except DecodeError as error:
            return Refused(400, str(error))


def check_image(data: bytes) -> None:
    """Check by its header that `data` is an image of a format and a size that are decoded.

    Raises:
        Refused: 415 if it is of no format that is read, 413 if it is too large, 400 if its header
            is damaged.
    """
    from downpour.shuffler.images.bounds import open_image

    try:
        open_image(data).close()
    except UnknownFormat as error:
        raise Refused(415, f"the body cannot be read: {error}", {"accept-post": ACCEPTED}) from None
    except ImageTooLarge as error:
        raise Refused(413, f"the image is too large: {error}") from None
    except DecodeError as error:
        raise Refused(400, f"the image cannot be decoded: {error}") from None
