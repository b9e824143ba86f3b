"""`downpour`, whose controller asks for reports, and writes metrics, ten times a second.

A main module.
"""

import sys

from downpour.cluster.cli.main import main
from downpour.cluster.controller.members import partitions

REPORT_EVERY_S = 0.1

if __name__ == "__main__":
    vars(partitions)["REPORT_EVERY_S"] = REPORT_EVERY_S
    sys.exit(main())
