"""What a run would do, on a virtual clock: staleness and throughput before there is a cluster.

The partitions' decisions are those of `paramserver` itself, the leases those of `shuffler`; the
rotation of slots, doorbells and mailboxes is modelled after `workers.replica.replicas`.
"""
