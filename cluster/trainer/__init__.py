"""Training from Python in the manner of Ray Train: `Trainer(...).fit() -> Result`."""
