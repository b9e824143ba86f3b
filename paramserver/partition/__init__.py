"""One partition's state: what it has applied, its version, its snapshots and its record."""
