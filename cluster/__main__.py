"""`python -m cluster` is `downpour`: how a submitted job starts, where no script is installed."""

from cluster.cli import main

if __name__ == "__main__":
    main()
