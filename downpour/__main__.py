"""`python -m downpour` is `downpour`: how a submitted job starts, where no script is installed."""

from downpour.cluster.cli.main import main

if __name__ == "__main__":
    main()
