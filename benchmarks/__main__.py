"""`python -m benchmarks [NAME] [OPTIONS]` is `downpour bench`; without a name it runs all."""

import sys

from cluster.cli import main

if __name__ == "__main__":
    words = sys.argv[1:]
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        words = ["all", *words]
    sys.argv[1:] = ["bench", *words]
    main()
