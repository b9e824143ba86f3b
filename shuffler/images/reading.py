"""How the pixels of an image file are read: as people see them, or as they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Orientation = Literal["follow", "ignore"]
"""`follow`: an image is turned upright as its EXIF orientation says. `ignore`: it is not."""

Transparency = Literal["white", "drop"]
"""`white`: transparent pixels are blended with white. `drop`: their hidden colours are seen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How the pixels of an image file are read."""

    orientation: Orientation = "follow"
    """What the EXIF orientation does."""

    transparency: Transparency = "white"
    """What is seen of transparent pixels."""


AS_SEEN: Final = Reading()
"""As people see images: upright, and on white paper."""
