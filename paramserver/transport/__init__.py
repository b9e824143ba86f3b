"""Transports between replicas and partitions: shared memory, and the network between machines.

`access` chooses. `local` and `memory` are the one; of the other, `security` says who may talk,
`greeting` how two sides find out, `channel` how bytes travel, `frames` what they mean, and
`network` and `network_client` are its two sides.
"""
