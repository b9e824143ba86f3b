"""What a primary and its follower say to each other, when one of them dies or is cut off."""

import socket

import pytest

from downpour.paramserver.errors import ConnectionLost
from downpour.paramserver.transport.shared import replication


def test_a_primary_that_is_killed_with_something_unread_leaves_all_it_had_sent() -> None:
    """The kernel tells of anything unread once, by ECONNRESET, ahead of what is in the buffer."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.send(replication.pushes(1, 7, b"abc"))
    theirs.send(replication.gone(1))
    ours.send(b"unread")
    theirs.close()
    assert replication.receive(ours) == replication.Pushes(1, 7, b"abc")
    assert replication.receive(ours) == replication.Closed(1)
    with pytest.raises(ConnectionLost):
        replication.receive(ours)
    ours.close()


def test_what_was_sent_before_a_take_over_is_read_and_nothing_can_be_sent_after() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.send(replication.gone(1))
    ours.shutdown(socket.SHUT_RD)
    with pytest.raises(BrokenPipeError):
        theirs.send(replication.gone(2))
    assert replication.receive(ours) == replication.Closed(1)
    with pytest.raises(ConnectionLost):
        replication.receive(ours)
    ours.close()
    theirs.close()
