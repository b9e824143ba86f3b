"""Transports between replicas and partitions: shared memory, and the network between machines.

Here is what both have in common: where a partition is reached, what a client needs of a connection,
how a thread waits. `shared` is the one transport, `network` the other. Which one a process takes is
`paramserver.access`' choice.
"""
