"""What Ray alone takes to start: `ray.init()`, and so many actors at once that import torch."""

from __future__ import annotations

import logging
import time
from typing import Any

from downpour.benchmarks.baselines.common import Setup, child_main


class Importer:
    """An actor that imports torch."""

    def __init__(self) -> None:
        import torch

        self.version = torch.__version__

    def ready(self) -> str:
        """Answers once the actor is up."""
        return str(self.version)


def measure(setup: Setup) -> dict[str, Any]:
    """Seconds from before `ray.init()` to the last actor's answer; the import of Ray apart."""
    began_s = time.monotonic()
    import ray

    imported_s = time.monotonic()
    ray.init(include_dashboard=setup.dashboard, log_to_driver=False, logging_level=logging.ERROR)
    initialized_s = time.monotonic()
    try:
        remote: Any = ray.remote
        actors = [remote(Importer).options(num_cpus=0).remote() for _ in range(setup.workers)]
        ray.get([actor.ready.remote() for actor in actors])
        ready_s = time.monotonic()
    finally:
        ray.shutdown()
    return {
        "import_s": imported_s - began_s,
        "init_s": initialized_s - imported_s,
        "actors_s": ready_s - initialized_s,
        "init_and_actors_s": ready_s - imported_s,
    }


if __name__ == "__main__":
    child_main(measure)
