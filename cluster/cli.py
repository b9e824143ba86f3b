"""The command `downpour`. Options come from the configuration; what they do lives elsewhere.

Nothing heavy is imported before the start-up check has seen that the root packages are ours.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("models", "paramserver", "shuffler", "workers")


def foreign_package() -> str | None:
    """A line about the first of our root packages that would be imported from elsewhere."""
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None:
            return f"the package {name} is missing beside {ROOT / 'cluster'}: install downpour anew"
        found = Path(spec.origin).resolve().parent if spec.origin else None
        if found != ROOT / name:
            where = found or ", ".join(spec.submodule_search_locations or ["nowhere"])
            return (
                f"the package {name} is not Downpour's but {where}: take that folder off "
                "PYTHONPATH, or run from another one"
            )
    return None


def main() -> None:
    """Entry point of the command."""
    # A script run from elsewhere must find our root first, as `python -m cluster` does.
    problem = foreign_package()
    if problem is not None:
        sys.stderr.write(f"downpour: error: {problem}\n")
        raise SystemExit(2)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from cluster.commands import downpour
    from cluster.errors import run_cli

    raise SystemExit(run_cli(downpour))


if __name__ == "__main__":
    main()
