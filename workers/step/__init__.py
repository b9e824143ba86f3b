"""One training step on a mini-batch: eager, recorded, or on a device."""
