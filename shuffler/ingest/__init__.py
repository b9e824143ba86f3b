"""Making a dataset of what there is, shuffled once."""
