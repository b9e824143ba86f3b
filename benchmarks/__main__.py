"""`python -m downpour.benchmarks [NAME] [OPTIONS]` is `downpour bench`; all without a name."""

import sys

from downpour.cluster.cli.main import main

if __name__ == "__main__":
    words = sys.argv[1:]
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        words = ["all", *words]
    sys.argv[1:] = ["bench", *words]
    main()
