"""The warm start: how many replicas train while they join, and why. A pure policy.

`WarmStart` follows the schedule (`active_replicas`), which adds replicas by progress alone. If the
learning rate is too high for so many steps in flight, the loss then rises and may never come back.
`RampGuard` watches the loss. If it has clearly risen above its best, the guard puts the replicas
back to the last number that did well, and lets others join again, one by one, once the loss is
back. Progress and losses go in, a number of replicas and a reason come out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from downpour.cluster.config.policy import active_replicas
from downpour.workers.config import ReplicaConfig

WINDOWS = 7
"""Losses of windows in a row whose median is *the* loss: three of them may be anything."""
SPREADS = 6.0
"""Median absolute deviations from the median that are noise, however small that is."""
SPREAD_WEIGHT = 0.1
"""Of a new observation in the moving average of the median absolute deviation."""
FLOOR = 0.05
"""Share of the run's first loss that is no rise, however small the best has become."""
TINY = 1e-9
"""Nats; a loss below it is nothing."""
LEAST_BOUND_EPOCHS = 1.0
"""A hold may last this long, however short the ramp is."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """How many replicas are to train."""

    replicas: int
    reason: str | None = None
    """Why it is another number than the schedule's, or is the schedule's again; None: no news."""


class WarmStart:
    """How many replicas train: the schedule, and its guard if the configuration asks for one."""

    def __init__(self, config: ReplicaConfig, remembered: Mapping[str, Any] | None = None) -> None:
        """Start, or go on from what `dump` gave in an earlier session."""
        self._config = config
        joins = config.warm_start_epochs or config.ramp_epochs
        self._guard: RampGuard | None = None
        if config.ramp_guard is not None and joins:
            self._guard = RampGuard(
                factor=config.ramp_guard,
                replicas=config.replicas,
                ramp_epochs=config.ramp_epochs,
                state=remembered,
            )

    @property
    def held(self) -> int | None:
        """Replicas that train while the others may not join, for the loss; None: all may."""
        return None if self._guard is None else self._guard.held

    @property
    def course(self) -> int:
        """Counts the guard's changes of course."""
        return 0 if self._guard is None else self._guard.course

    def decide(self, wanted: int, epochs: float) -> Course:
        """Decide how many of the `wanted` replicas train after `epochs`."""
        scheduled = active_replicas(replace(self._config, replicas=wanted), epochs)
        if self._guard is None:
            return Course(replicas=scheduled)
        return self._guard.decide(scheduled, wanted, epochs)

    def saw(self, loss: float | None, course: int) -> None:
        """A window that was leased on `course` is done; `loss` is its mean, None: not finite."""
        if self._guard is not None:
            self._guard.saw(loss, course)

    def restarted(self) -> None:
        """A partition has gone back to older weights."""
        if self._guard is not None:
            self._guard.restarted()

    def dump(self) -> dict[str, Any] | None:
        """Return what the guard remembers, as plain JSON; None without a guard."""
        return None if self._guard is None else self._guard.dump()


@dataclass(kw_only=True)
class _State:
    """All that a guard remembers; plain JSON, so that a resumed run goes on with it."""

    losses: list[float | None] = field(default_factory=list)
    """The last `WINDOWS` at most, of windows leased on the present course; None: not finite."""
    here: int = 0
    """How many losses have come since the number of replicas last changed."""
    first: float | None = None
    """The first loss of all."""
    best: float | None = None
    spread: float | None = None
    """Moving average of the median absolute deviation over the median of losses not risen."""
    active: int = 0
    """Replicas by the last decision; 0 before the first."""
    good: int = 1
    """The last number at which the loss did well."""
    cap: int | None = None
    """The most replicas, since a rise; None if there was none, or it is over."""
    held_since: float | None = None
    """Epochs done when replicas were put back, while the loss is not back."""
    holds: int = 0
    """Rises so far."""
    all_since: float | None = None
    """Epochs done when the last replica joined."""
    off: bool = False


class RampGuard:
    """Watches the loss while replicas join. `saw`, `restarted` and `decide` change it.

    *The loss* is the median of the last seven windows' mean losses. A loss that is not finite
    counts as infinite. The loss has *risen* if it exceeds the best such median so far by all of:
    the factor, six times the share of it by which losses usually deviate, and a twentieth of the
    run's first loss. So neither noise, nor a doubling of a small loss, nor single bad windows
    count. Losses of windows that were leased before the last change of course are left out.

    A hold ends when the loss is back. It lasts at least as long as the schedule takes for one
    replica, and twice as long at each further rise. It lasts at most `ramp_epochs`, or one epoch if
    that is more; then the run goes on, and the loss of that time counts as its best. While the loss
    stays up, replicas are halved. One always trains, so progress never stops.
    """

    def __init__(
        self,
        *,
        factor: float,
        replicas: int,
        ramp_epochs: float,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """`replicas` join over `ramp_epochs`; `state` is what `dump` gave, to go on from there."""
        self._factor = factor
        self._bound = max(LEAST_BOUND_EPOCHS, ramp_epochs)
        self._step = ramp_epochs / max(1, replicas - 1)
        self._state = _State() if state is None else _State(**state)
        self.course = 0
        """Counts the changes of course; `saw` is told on which one a window was leased."""

    @property
    def held(self) -> int | None:
        """How many replicas train while the others have to wait; None if none has to."""
        state = self._state
        return state.active if state.cap is not None and not state.off else None

    def dump(self) -> dict[str, Any]:
        """Plain JSON that a guard of the same run can be made from."""
        return asdict(self._state)

    def saw(self, loss: float | None, course: int) -> None:
        """A window that was leased on `course` is done; `loss` is its mean, None: not finite."""
        state = self._state
        if state.off or course != self.course:
            return
        state.losses.append(loss if loss is not None and math.isfinite(loss) else None)
        del state.losses[:-WINDOWS]
        state.here += 1
        now = self._loss()
        if now is not None and now <= self._limit():
            self._learn(now)

    def restarted(self) -> None:
        """A partition has gone back to older weights: the best loss is not what to expect now."""
        state = self._state
        state.best, state.spread, state.here = None, None, 0
        state.losses.clear()
        self.course += 1

    def decide(self, scheduled: int, replicas: int, epochs: float) -> Course:
        """Decide how many train, if the schedule says `scheduled` of `replicas` after `epochs`."""
        state = self._state
        if state.off:
            return Course(replicas=scheduled)
        self._move(min(scheduled, state.cap or scheduled))
        reason = None
        loss = self._loss()
        if state.held_since is not None:
            reason = self._hold(loss, epochs)
        elif loss is not None:
            reason = self._watch(loss, scheduled, epochs)
        if state.cap is not None and state.held_since is None and state.cap >= scheduled:
            state.cap = None
        self._move(min(scheduled, state.cap or scheduled))
        reason = reason or self._finish(replicas, epochs)
        return Course(replicas=state.active, reason=reason)

    def _move(self, active: int) -> None:
        state = self._state
        if active != state.active:
            state.active, state.here = active, 0

    def _steer(self, cap: int) -> None:
        """Take another course: what was leased before says nothing about it."""
        state = self._state
        state.cap = cap
        state.losses.clear()
        state.here = 0
        self.course += 1

    def _loss(self) -> float | None:
        """Median of the last windows; infinite if most are not finite; None: too few yet."""
        losses = self._state.losses
        if len(losses) < WINDOWS:
            return None
        return statistics.median(math.inf if value is None else value for value in losses)

    def _limit(self) -> float:
        """Above this the loss has risen."""
        best, spread = self._state.best, self._state.spread
        if best is None or spread is None:
            return math.nextafter(math.inf, 0)
        share = max(self._factor - 1, SPREADS * spread) * abs(best)
        return best + max(share, FLOOR * abs(self._state.first or 0.0))

    def _learn(self, loss: float) -> None:
        """The loss is as it should be: what is the best, and how far do losses deviate?"""
        state = self._state
        finite = [value for value in state.losses if value is not None]
        spread = statistics.median(abs(value - loss) for value in finite) / max(abs(loss), TINY)
        if state.first is None:
            state.first = loss
        if state.best is None or state.spread is None:
            state.best, state.spread = loss, spread
            return
        state.best = min(state.best, loss)
        state.spread += SPREAD_WEIGHT * (spread - state.spread)

    def _watch(self, loss: float, scheduled: int, epochs: float) -> str | None:
        """No hold is on: let the next one join, or put replicas back if the loss has risen."""
        state, limit = self._state, self._limit()
        if loss <= limit:
            if state.here < WINDOWS:
                return None  # the number is too new to have done well
            state.good = state.active
            if state.cap is None:
                return None
            self._steer(state.cap + 1)
            return (
                f"the loss is {_text(loss)} with {_replicas(state.active)} (best "
                f"{_text(state.best)}): another one joins"
            )
        if scheduled == 1:
            return None  # there is nobody to put back, and nobody wants to join
        before = state.active
        state.holds += 1
        state.held_since = epochs
        self._steer(max(1, min(state.good, before - 1)))
        assert state.cap is not None
        return (
            f"the loss has risen to {_text(loss)} with {_replicas(before)}, above {_text(limit)} "
            f"(best {_text(state.best)}): put back to {_replicas(state.cap)}"
        )

    def _hold(self, loss: float | None, epochs: float) -> str | None:
        """A hold is on: end it, or halve the replicas while the loss stays up."""
        state, limit = self._state, self._limit()
        assert state.held_since is not None
        assert state.cap is not None
        # A partition that goes back to its last checkpoint takes progress with it.
        state.held_since = min(state.held_since, epochs)
        held = epochs - state.held_since
        back = loss is not None and loss <= limit
        if back and held >= min(self._bound, self._step * 2 ** (state.holds - 1)):
            state.held_since = None
            self._steer(state.cap + 1)
            return (
                f"the loss is back at {_text(loss)} with {_replicas(state.active)} (best "
                f"{_text(state.best)}): another one joins"
            )
        if held >= self._bound:
            state.held_since = None
            if loss is not None and math.isfinite(loss):
                state.best = None
                self._learn(loss)
            self._steer(state.cap + 1)
            return (
                f"the loss is not back after {held:.2f} epochs with {_replicas(state.active)}, "
                "which is as long as the guard waits: another one joins all the same"
            )
        if loss is not None and not back and state.cap > 1:
            before = state.cap
            self._steer(before // 2)
            return (
                f"the loss is {_text(loss)} with {_replicas(before)} still, above {_text(limit)}: "
                f"put back to {_replicas(state.cap)}"
            )
        return None

    def _finish(self, replicas: int, epochs: float) -> str | None:
        """End the watch once all have been training for as long as a hold lasts at most."""
        state = self._state
        if state.cap is not None or state.active < replicas:
            state.all_since = None
            return None
        if state.all_since is None:
            state.all_since = epochs
        state.all_since = min(state.all_since, epochs)
        if epochs - state.all_since < self._bound:
            return None
        state.off = True
        return f"the loss has done well with {_replicas(replicas)}: it is not watched any more"


def _replicas(count: int) -> str:
    return f"{count} replica" if count == 1 else f"{count} replicas"


def _text(loss: float | None) -> str:
    return "unknown" if loss is None else f"{loss:.4g}"
