"""Pushes in, versions out: a partition's state, and the memory where readers find its weights."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from downpour.paramserver.messages import Answer, Outcome, WireDtype
from downpour.paramserver.partition.ranges import Partition
from downpour.paramserver.partition.state import PartitionState
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.partition.vectors import Arrival, Version
from downpour.paramserver.rules.update import updates_in_place
from downpour.paramserver.server.connections import Sides
from downpour.paramserver.transport.network.compress import Decoder
from downpour.paramserver.transport.network.frames import as_bytes
from downpour.paramserver.transport.network.server_side import NetworkSide
from downpour.paramserver.transport.shared.published import PublishedWeights, check_room


class Versions:
    """All versions of one partition, one after the other."""

    def __init__(
        self,
        partition: Partition,
        config: UpdateConfig,
        sides: Sides,
        weights: Tensor | None,
        statistics: npt.NDArray[np.float64] | None = None,
    ) -> None:
        """Make the memory and version 0, which nobody sees before `open`.

        Args:
            partition: Of the model.
            config: How pushes change it.
            sides: The connections whose other ends may be reading.
            weights: float32 [n] of version 0; zeros if None.
            statistics: The BN statistics of version 0, see `PartitionStart`.

        Raises:
            BadConfiguration: There is not memory for the versions to keep, or the weights are of
                another length.
        """
        kept = config.policy.versions_kept
        check_room(partition.num_parameters, kept)
        self.published = PublishedWeights(
            partition.num_parameters, partition.num_features, kept=kept
        )
        current = self.published.versions[0]
        current.statistics[1:].fill_(1.0)  # as torch's: mean 0, variance 1 before the first push
        if weights is not None:
            current.weights.copy_(weights)
        self.state = PartitionState(partition, config, current)
        if statistics is not None:
            self.state.vectors.begin(statistics)
        self._ledger = self.state.ledger
        self.in_place = updates_in_place(partition.num_parameters)
        """Whether each version is published before the next push is applied."""
        self.first_update_s: float | None = None
        """When the first update since `open` was, by the monotonic clock; of a follower, since its
        primary's."""
        self.last_update_s: float | None = None
        """When the latest update since `open` was."""
        self._sides = sides
        self._buffers = [
            (as_bytes(v.weights), as_bytes(v.statistics)) for v in self.published.versions
        ]
        self._private: list[Tensor] = []
        """Copies of gradients that another process reads, too."""
        self._decoder = Decoder(partition.num_trained)

    def open(self) -> None:
        """Let readers see the version that there is."""
        self.published.publish(self.state.weights_version)

    def apply_all(self, arrivals: Sequence[Arrival], *, shared: bool) -> list[Answer]:
        """Apply pushes, and publish the new version.

        Args:
            arrivals: As for `PartitionState.apply_all`, but with gradients as they came. One that
                came in fewer bits than float32 comes alone.
            shared: Whether another process reads the same gradients.

        Returns:
            What became of each push.
        """
        state, ledger, answers = self.state, self._ledger, []
        if arrivals[0][0].wire is not WireDtype.FLOAT32:
            ((push, came, moments),) = arrivals
            arrivals = [(push, self._decoder.gradient(came, push.wire), moments)]
        elif shared and state.config.spoils_gradients:
            arrivals = self._copied(arrivals)
        version, before = ledger.version, ledger.weights_version
        outcomes = state.apply_all(arrivals, self._room)
        for (push, _, _), outcome in zip(arrivals, outcomes, strict=True):
            version += outcome is Outcome.APPLIED
            answers.append(Answer(mailbox=push.mailbox, outcome=outcome, version=version))
        if ledger.weights_version > before:
            self.published.commit(ledger.weights_version)
            self.last_update_s = time.monotonic()
            if self.first_update_s is None:
                self.first_update_s = self.last_update_s
        return answers

    def apply_shared(self, arrivals: Sequence[Arrival]) -> list[Answer]:
        """As `apply_all`, of gradients that another process reads, too."""
        return self.apply_all(arrivals, shared=True)

    def _copied(self, arrivals: Sequence[Arrival]) -> list[Arrival]:
        """Return them with copies of their gradients, which an update may overwrite."""
        while len(self._private) < len(arrivals):
            self._private.append(torch.empty(self.state.partition.num_trained))
        return [
            (push, private.copy_(gradient), moments)
            for (push, gradient, moments), private in zip(arrivals, self._private, strict=False)
        ]

    def _room(self) -> Version:
        """Return where the next version goes: over the latest, unless somebody is reading it."""
        buffer = self.published.begin([side.pinned for side in self._sides.values()])
        for side in self._sides.values():
            if isinstance(side, NetworkSide):
                side.detach(buffer)  # nothing to do, unless all buffers are pinned
        return self.published.versions[buffer]

    def send(self, side: NetworkSide) -> None:
        """Begin to send the latest weights over the network."""
        buffer = self.published.current_buffer
        latest, views = self.published.versions[buffer], self._buffers[buffer]
        side.send_weights(buffer, self._ledger.weights_version, latest, views)

    def close(self) -> None:
        """Give up the memory."""
        self.published.close()
