"""Copies of the weights are of one version, whole; readers in other threads and processes."""

import contextlib
import mmap
import os
import threading
import time
from collections import Counter

import numpy as np
import torch

from downpour.paramserver.client import ParameterClient
from downpour.paramserver.messages import KEY_BYTES
from downpour.paramserver.partition.ranges import split
from downpour.paramserver.partition.update_config import UpdateConfig
from downpour.paramserver.rules.schedule import Schedule
from downpour.paramserver.rules.update import SGD
from downpour.paramserver.server.server import PartitionServer
from tests.helpers.weights_readers import (
    BUFFERS,
    ENOUGH,
    NUM_FEATURES,
    NUM_PARAMETERS,
    READERS_DEADLINE_S,
    Writer,
    start_reader,
    told_by,
)

torch.set_num_threads(1)


def test_readers_with_pins_in_other_processes() -> None:
    pins = os.memfd_create("pins")
    os.ftruncate(pins, mmap.PAGESIZE)
    words = np.frombuffer(mmap.mmap(pins, mmap.PAGESIZE), np.int64)
    writer = Writer(
        NUM_PARAMETERS, NUM_FEATURES, BUFFERS, lambda: [int(words[0]) - 1, int(words[8]) - 1]
    )
    found, slots = Counter[int](), writer.published
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, pins)
        readers = [start_reader(stack, slots.fd, pins, number) for number in range(2)]
        give_up_s = time.monotonic() + READERS_DEADLINE_S + 30
        while any(reader.poll() is None for reader in readers):
            assert time.monotonic() < give_up_s
            for _ in range(50):
                before = slots.current_buffer
                writer.write()
                found[slots.current_buffer == before] += 1
        for reader in readers:
            told = told_by(reader)
            assert told["mixed"] == told["backwards"] == 0, told
            assert all(told[what] >= ENOUGH[what] for what in ("reads", "versions")), told
    assert set(found) == {True, False}, "both ways were gone"


def test_a_reader_in_another_process() -> None:
    # Two slots are the fewest that work: the next version but one overwrites what is being read.
    writer = Writer(NUM_PARAMETERS, NUM_FEATURES, 2)
    with contextlib.ExitStack() as stack:
        reader = start_reader(stack, writer.published.fd)  # without pins, readers are alone
        give_up_s = time.monotonic() + READERS_DEADLINE_S + 30
        while reader.poll() is None:
            assert time.monotonic() < give_up_s
            for _ in range(50):
                writer.write()
        found = told_by(reader)
        assert found["mixed"] == 0, found
        assert found["backwards"] == 0, found
        assert all(found[what] >= least for what, least in ENOUGH.items()), found


def test_pulls_from_a_server_that_is_being_pushed_to() -> None:
    # Every push takes 1 off every weight, so that a version v is -v everywhere.
    num_parameters, num_partitions, key = 1 << 17, 2, b"k" * KEY_BYTES
    config = UpdateConfig(
        rule=SGD(), schedule=Schedule(learning_rate=1.0), batches_per_epoch=400, epoch_examples=400
    )
    parts = split(
        num_parameters=num_parameters,
        num_features=0,
        num_decayed=0,
        num_partitions=num_partitions,
    )
    with contextlib.ExitStack() as stack:
        servers = [
            PartitionServer(
                partition=part,
                config=config,
                key=key,
                weights=torch.zeros(part.num_parameters),
            ).start()
            for part in parts
        ]
        for server in servers:
            stack.callback(server.stop)
        endpoints = [server.endpoint for server in servers]
        pushing = ParameterClient(endpoints, key=key, num_mailboxes=1)
        pulling = [ParameterClient(endpoints, key=key) for _ in range(2)]
        for client in (pushing, *pulling):
            stack.callback(client.close)
        wrong: list[list[int]] = []
        pulls = [0, 0]

        def pull(me: int) -> None:
            weights, versions = np.empty(num_parameters, np.float32), [0, 0]
            while min(versions) < config.batches_per_epoch and not wrong:
                pulling[me].pull(weights, versions)
                pulls[me] += 1
                for part, version in zip(parts, versions, strict=True):
                    if not (weights[part.start : part.stop] == -version).all():
                        wrong.append([me, *versions])

        threads = [threading.Thread(target=pull, args=(me,), daemon=True) for me in range(2)]
        for thread in threads:
            thread.start()
        for batch in range(config.batches_per_epoch):
            pushing.mailboxes.gradients[0].fill_(1.0)
            pushing.push(
                mailbox=0,
                replica=0,
                epoch=0,
                batches=(batch,),
                examples=1,
                versions=[batch] * num_partitions,
                loss=1.0,
                gradient_norm=float(pushing.mailboxes.gradients[0].norm()),
            )
            while pushing.in_flight(0):
                pushing.wait()
        for thread in threads:
            thread.join(READERS_DEADLINE_S)
            assert not thread.is_alive()
        assert wrong == []
        assert min(pulls) > 1
