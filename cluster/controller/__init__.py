"""Who looks after a run: leases, partitions, replica processes, failures."""
