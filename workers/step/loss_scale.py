"""The factor on a loss that is differentiated in float16. Pure.

Micikevicius et al., "Mixed Precision Training", 2018, section 3.2: gradients of activations that
float16 has no numbers for become 0; scaled up with the loss they do not. The factor is found as the
run goes, as `torch.amp.GradScaler` does: halved if a gradient overflows, doubled after so many
steps in which none did.

Departure from `GradScaler`, which skips a step that overflows: the step is computed again with half
the factor, so its mini-batch is not lost, and it is counted once.
"""

from __future__ import annotations

FIRST = 2.0**16
"""A factor to begin with. Powers of two change no bit of a gradient but its exponent."""
LARGEST = 2.0**24
GROWTH_INTERVAL = 2000
"""Steps in a row without overflow after which the factor is doubled."""


class LossScale:
    """The factor of one process of replicas, whose steps may overlap."""

    def __init__(self) -> None:
        """Begin with `FIRST`."""
        self.value = FIRST
        self._good = 0
        """Steps in a row without overflow."""

    def succeeded(self) -> None:
        """A step's gradient was finite."""
        self._good += 1
        if self._good >= GROWTH_INTERVAL:
            self._good = 0
            self.value = min(2 * self.value, LARGEST)

    def overflowed(self, used: float) -> bool:
        """A step with the factor `used` had a finite loss, and a gradient that is not.

        Returns:
            Whether to compute it again, with `value`, which is smaller than `used`. If not, the
            factor was not to blame.
        """
        self._good = 0
        if self.value >= used:  # else a step before it has halved it already
            if used <= 1:
                return False
            self.value = used / 2
        return True

    def was_not_to_blame(self, began: float) -> None:
        """A step that began with this factor overflows with any."""
        self.value = began
