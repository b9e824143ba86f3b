"""Whether networks and data are about the same classes. Pure.

A label is a number, and numbers fit any data: a network of digits would score animals. So names are
compared wherever two things name their classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from downpour.cluster.errors import UserError

SHOWN = 4


def check_same_classes(named: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Check that all that name their classes name the same ones, in the same order.

    Args:
        named: what it is, for the message, and the names of its labels 0, 1, ...; no names say
            nothing.

    Raises:
        UserError: two of them contradict each other.
    """
    known = [(what, tuple(names)) for what, names in named if names]
    for (one, names), (other, others) in itertools.pairwise(known):
        if names == others:
            continue
        if sorted(names) == sorted(others):
            label = next(i for i in range(len(names)) if names[i] != others[i])
            raise UserError(
                f"label {label} is {names[label]!r} in {one} and {others[label]!r} in {other}: the "
                "same classes in another order; ingest the data with the run's order of classes"
            )
        raise UserError(
            f"{one} tells {_listed(names)} apart, and {other} {_listed(others)}: give what has the "
            "same classes"
        )


def _listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:SHOWN])
    return f"{shown}, … ({len(names)} classes)" if len(names) > SHOWN else shown
