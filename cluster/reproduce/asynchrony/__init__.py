"""BN statistics and shuffling under asynchronous training."""
