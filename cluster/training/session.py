"""The Ray cluster that a command runs on."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from downpour.cluster.errors import UserError

SHARED_MEMORY = "/dev/shm"


def store_line(free_bytes: int | None, store_bytes: float) -> str | None:
    """Return what to tell people of where Ray keeps objects; None if it keeps them in memory.

    Args:
        free_bytes: free in `/dev/shm`; None if there is none.
        store_bytes: that Ray's object store may take. It lies elsewhere if it may not fit.
    """
    if free_bytes is None or free_bytes >= store_bytes:
        return None
    return (
        f"{SHARED_MEMORY} has {free_bytes / 1e6:,.0f} MB free, and Ray's object store may take "
        f"{store_bytes / 1e6:,.0f} MB: it is in files under /tmp instead, which may be slower; "
        "give more (in a container: --shm-size)"
    )


def _free_bytes(folder: str) -> int | None:
    try:
        about = os.statvfs(folder)
    except OSError:
        return None
    return about.f_frsize * about.f_bavail


def ray_address(given: str | None) -> str:
    """The Ray cluster to run on; `local` is one of our own on this machine."""
    return given or os.environ.get("RAY_ADDRESS") or "local"


def before_ray(address: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what Ray reads when it is imported, unless somebody has set it.

    Args:
        address: of the cluster, see `ray_address`.
        environment: where it is set.
    """
    if address == "local":
        environment.setdefault("RAY_AUTH_MODE", "token")
        # As Ray does on a Mac: it then listens on loopback only.
        environment.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    environment.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@contextlib.contextmanager
def on_ray(
    *,
    address: str | None,
    dashboard: bool,
    environment: Mapping[str, str] | None = None,
    meanwhile: Callable[[], object] = lambda: None,
    say: Callable[[str], object] = lambda _: None,
) -> Iterator[str]:
    """Connect to a Ray cluster; gives the dashboard's address, or an empty text.

    If this process is connected already, it stays connected, and nothing is closed at the end. A
    cluster of our own listens on loopback only.

    Args:
        address: of the cluster; None takes RAY_ADDRESS, or starts a cluster here.
        dashboard: start Ray's dashboard with a cluster of our own.
        environment: variables for the processes that are started there.
        meanwhile: called once Ray is imported, before it starts.
        say: is told what people should know of a cluster of our own.

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
    free_bytes = _free_bytes(SHARED_MEMORY)
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
    if address == "local":
        cluster: Any = ray  # this has no types
        store_bytes = cluster.cluster_resources().get("object_store_memory", 0.0)
        if (line := store_line(free_bytes, store_bytes)) is not None:
            say(line)
    try:
        yield context.dashboard_url or ""
    finally:
        ray.shutdown()
