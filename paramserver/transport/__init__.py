"""Transports between model replicas and partitions: shared memory on one machine."""
