"""Keys of random streams: a hash of what the stream is for, never a sum.

`seed + epoch` makes (seed 1, epoch 0) and (seed 0, epoch 1) the same stream; a hash of the whole
tuple does not. Generators and permutations that use the keys live elsewhere.
"""

from __future__ import annotations

import operator
from hashlib import blake2b

from downpour.shuffler.errors import ShufflerError


def stream_key(seed: int, purpose: str, *parts: int | str) -> int:
    """Return the 64-bit key of the stream `(seed, purpose, *parts)`.

    The tuple is hashed in its `repr`, which is unambiguous for integers and strings: no two
    different tuples are written alike. Integers of any kind (NumPy's too) with one value give
    one key.

    Raises:
        ShufflerError: `purpose` is empty, or a part is neither an integer nor a string.
    """
    if not purpose:
        raise ShufflerError("purpose='' names no stream; give each stream a purpose of its own")
    try:
        canonical = tuple(
            part if isinstance(part, str) else operator.index(part)
            for part in (seed, purpose, *parts)
        )
    except TypeError:
        raise ShufflerError(
            f"stream key {(seed, purpose, *parts)!r} has a part that is neither an integer nor a "
            "string; name streams by integers and strings only"
        ) from None
    digest = blake2b(repr(canonical).encode(), digest_size=8, person=b"downpour").digest()
    return int.from_bytes(digest, "little")
