"""What a synchronous round has taken so far on one partition: the gradients' sum, and the moments.

The sum is weighted by examples, so that its mean is the gradient of one mini-batch of all of them
(with a mini-batch's own statistics where there is batch normalization). It lies among the rule's
state, and the moments beside it, so both are in a snapshot and a restored partition goes on in the
middle of a round. Who may take part is `rounds`'s; when it ends and what is done then, `state`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

SUM = "round_sum"
"""Name of the gradients' sum among the rule's state."""
MOMENTS = "round.moments"
"""Name of the moments in a snapshot, float32 [mini-batches, 3, num_features]."""


@dataclass(kw_only=True)
class Round:
    """The present round."""

    pushes: int
    """How many there are in a full one."""
    count: int = 0
    """How many it has taken."""
    examples: int = 0
    """Examples of those."""
    _moments: list[Tensor] = field(default_factory=list)

    def init(self, num_parameters: int) -> dict[str, Tensor]:
        """State beside the rule's: the sum, 0."""
        return {SUM: torch.zeros(num_parameters)}

    def add(
        self, gradient: Tensor, moments: Tensor, examples: int, state: Mapping[str, Tensor]
    ) -> None:
        """Take in a push of a mini-batch: its mean gradient [n], and its moments [1, 3, F]."""
        if self.count:
            state[SUM].add_(gradient, alpha=examples)
        else:
            torch.mul(gradient, examples, out=state[SUM])
        self._moments.extend(moments.clone())  # the mailbox is free again before the round ends
        self.count += 1
        self.examples += examples

    def close(self, state: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """End it: the mean gradient, where the sum was, and the moments in their order."""
        moments, total = self._moments, state[SUM].div_(self.examples)
        self.count = self.examples = 0
        self._moments = []
        return total, moments

    def stacked(self, num_features: int) -> Tensor:
        """The moments, [count, 3, num_features]."""
        return torch.stack(self._moments) if self._moments else torch.empty(0, 3, num_features)

    def restore(self, examples: int, moments: Tensor) -> None:
        """Go on with a round of which these have been taken."""
        self.count, self.examples = len(moments), examples
        self._moments = list(moments.clone())
