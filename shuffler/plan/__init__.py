"""Which rows each mini-batch of each epoch holds."""
