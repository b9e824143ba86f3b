"""What is told of an ingest beside its result: what was assumed, and what was left out and why."""

from __future__ import annotations

from typing import Final

MOST_REASONS: Final = 20
"""Reasons that are told one by one."""


class Report:
    """Collects lines, and counts what is left out by reason."""

    def __init__(self) -> None:
        self._notes: dict[str, None] = {}
        self._counts: dict[str, int] = {}
        self._examples: dict[str, str] = {}

    def note(self, line: str) -> None:
        """Keep a line that is told as it is; once if it comes again."""
        self._notes[line] = None

    def leave_out(self, reason: str, path: str, count: int = 1) -> None:
        """Count something that is left out; `path` is an example of it."""
        self._counts[reason] = self._counts.get(reason, 0) + count
        self._examples.setdefault(reason, path)

    @property
    def lines(self) -> tuple[str, ...]:
        """What is to be told, the most frequent reasons first."""
        reasons = sorted(self._counts, key=lambda reason: -self._counts[reason])
        left_out = [
            f"left out: {self._counts[reason]:,} {reason} (such as {self._examples[reason]!r})"
            for reason in reasons[:MOST_REASONS]
        ]
        if len(reasons) > MOST_REASONS:
            rest = sum(self._counts[reason] for reason in reasons[MOST_REASONS:])
            left_out.append(f"left out: {rest:,} more, for {len(reasons) - MOST_REASONS} reasons")
        return (*self._notes, *left_out)
