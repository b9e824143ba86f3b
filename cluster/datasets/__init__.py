"""Looking at datasets."""
