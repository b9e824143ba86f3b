"""What people and tools see of a run."""
