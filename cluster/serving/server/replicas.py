"""How a batch of requests reaches a replica from Serve's proxy."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from downpour.cluster.serving.server.batches import Answer, Asked, Send, refusal

APPLICATION: Final = "downpour"
"""Serve's name for what is deployed."""
RETRY_S: Final = 1
GONE = "the process that answers has ended, and another takes its place: send this again in {} s"


def send_to_replicas() -> Send:
    """Return what has a replica of the deployment answer a batch; for Serve's proxy."""
    handle: Any = None

    async def send(batch: Sequence[Asked]) -> Sequence[Answer]:
        nonlocal handle
        from ray.exceptions import RayActorError
        from ray.serve import get_app_handle
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

        if handle is None:
            handle = await asyncio.to_thread(get_app_handle, APPLICATION)
        try:
            answers: list[Answer] = await handle.answer_all.remote(batch)
        except (RayActorError, BackPressureError, DeploymentUnavailableError):
            gone = refusal(503, GONE.format(RETRY_S), {"retry-after": str(RETRY_S)})
            return [gone] * len(batch)
        return answers

    return send
