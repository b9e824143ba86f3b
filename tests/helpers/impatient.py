"""`downpour`, whose controller takes a process for hung within seconds. A main module."""

import sys
from typing import cast

from downpour.cluster.cli.main import main
from downpour.cluster.controller.hangs.patience import LIMITS, Limit, Wait

LIFE_S = 3.0

if __name__ == "__main__":
    cast(dict[Wait, Limit], LIMITS)["life"] = Limit(first_s=60.0, least_s=LIFE_S, times=1.0)
    sys.exit(main())
