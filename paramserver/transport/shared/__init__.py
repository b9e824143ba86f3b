"""Shared memory between a partition and the processes on its machine."""
