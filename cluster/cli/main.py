"""Entry point of the command `downpour`."""

from __future__ import annotations

import os


def main() -> None:
    """Run the command; ends the process with its exit status."""
    # Before PyTorch is imported: replicas share processors by processes, not by threads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from downpour.cluster.cli.commands import downpour
    from downpour.cluster.config.secrets import check_no_secrets
    from downpour.cluster.errors import run_cli

    raise SystemExit(run_cli(downpour, check=check_no_secrets))


if __name__ == "__main__":
    main()
