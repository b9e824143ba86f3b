"""The Ray cluster that a command runs on."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from downpour.cluster.errors import UserError


def ray_address(given: str | None) -> str:
    """The Ray cluster to run on; `local` is one of our own on this machine."""
    return given or os.environ.get("RAY_ADDRESS") or "local"


def before_ray(address: str) -> None:
    """Set what Ray reads when it is imported, unless somebody has set it.

    Args:
        address: of the cluster, see `ray_address`.
    """
    if address == "local":
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        # As Ray does on a Mac: it then listens on loopback only.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@contextlib.contextmanager
def on_ray(
    *,
    address: str | None,
    dashboard: bool,
    environment: Mapping[str, str] | None = None,
    meanwhile: Callable[[], object] = lambda: None,
) -> Iterator[str]:
    """Connect to a Ray cluster; gives the dashboard's address, or an empty text.

    If this process is connected already, it stays connected, and nothing is closed at the end. A
    cluster of our own listens on loopback only.

    Args:
        address: of the cluster; None takes RAY_ADDRESS, or starts a cluster here.
        dashboard: start Ray's dashboard with a cluster of our own.
        environment: variables for the processes that are started there.
        meanwhile: called once Ray is imported, before it starts.

    Raises:
        UserError: the cluster cannot be reached, or does not start.
    """
    address = ray_address(address)
    before_ray(address)
    import ray

    meanwhile()
    if ray.is_initialized():
        yield ""
        return
    options: dict[str, Any] = {"include_dashboard": dashboard} if address == "local" else {}
    if environment:
        options["runtime_env"] = {"env_vars": dict(environment)}
    try:
        context = ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace="downpour",
            **options,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"Ray at {address!r} cannot be reached: {error}") from None
    except Exception as error:
        if type(error) is not Exception:  # Ray raises this if its own processes come up too late
            raise
        raise UserError(f"Ray did not start: {error} Try again on a machine less busy") from None
    try:
        yield context.dashboard_url or ""
    finally:
        ray.shutdown()
