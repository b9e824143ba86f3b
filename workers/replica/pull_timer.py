"""How far ahead of a step its weights are asked for, if they come over a network."""

from __future__ import annotations

import math

LEAD_EVERY = 256
"""Turns after which the way of weights over the network is measured again."""


class PullTimer:
    """How far ahead weights have to be asked for, from how long they take to come.

    That is their way's time over a turn's: bandwidth times delay, in turns. It is measured with
    nothing asked for ahead, at the beginning and then every `LEAD_EVERY` turns.
    """

    SHORT = 0.05
    """A way that takes less than this share of a turn is not worth older weights."""
    SAMPLES = 4

    def __init__(self) -> None:
        self._asked_s = self._came_s = math.nan
        self._way_s: list[float] = []
        self._turn_s: list[float] = []
        self._turns = 0
        self._lead = 0

    def asked(self, now_s: float, lead: int) -> None:
        """Weights have been asked for, `lead` turns ahead of their step."""
        if not lead:
            if self._came_s == self._came_s:
                self._turn_s.append(now_s - self._came_s)
            self._asked_s = now_s

    def come(self, now_s: float, most: int) -> int:
        """They have come; returns how many turns ahead to ask from now on, `most` at the most."""
        self._turns += 1
        if self._lead:
            if self._turns % LEAD_EVERY:
                return self._lead
            self._lead, self._came_s = 0, math.nan
            self._way_s, self._turn_s = [], []
            return 0
        self._way_s.append(now_s - self._asked_s)
        self._came_s = now_s
        if len(self._turn_s) >= self.SAMPLES:
            way_s, turn_s = min(self._way_s), min(self._turn_s)
            self._lead = turns_ahead(way_s, turn_s, most)
            self._way_s, self._turn_s = [], []
        return self._lead


def turns_ahead(way_s: float, turn_s: float, most: int) -> int:
    """How many turns ahead to ask for weights that take `way_s`, if a turn takes `turn_s`."""
    if way_s <= PullTimer.SHORT * turn_s:
        return 0
    return min(most, math.ceil(way_s / max(turn_s, 1e-9)))
