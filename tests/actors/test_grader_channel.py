"""Messages over a socket: whole, in time, or not at all."""

import socket
import threading
import time

import pytest

from actors.grader_channel import Channel, ChannelBroken


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    yield Channel(ours), theirs
    ours.close()
    theirs.close()


def soon() -> float:
    return time.monotonic() + 0.2


def test_a_message_larger_than_the_sockets_buffer_arrives_whole(ends):
    ours, theirs = ends
    message = bytes(range(256)) * 8192
    sender = threading.Thread(target=ours.send, args=(message, time.monotonic() + 10))
    sender.start()
    assert Channel(theirs).receive(time.monotonic() + 10) == message
    sender.join(10)


@pytest.mark.parametrize("begun", [b"", b"\0\0\0", (5).to_bytes(8, "big") + b"abc"])
def test_a_message_that_does_not_come_whole_ends_the_wait_at_the_deadline(ends, begun):
    ours, theirs = ends
    theirs.sendall(begun)
    with pytest.raises(TimeoutError):
        ours.receive(soon())


def test_a_message_that_nobody_takes_ends_the_wait_at_the_deadline(ends):
    with pytest.raises(TimeoutError):
        ends[0].send(bytes(2**24), soon())


@pytest.mark.parametrize("begun", [b"", b"\0\0\0", (5).to_bytes(8, "big") + b"abc"])
def test_an_end_that_closes_amid_a_message_is_broken(ends, begun):
    ours, theirs = ends
    theirs.sendall(begun)
    theirs.close()
    with pytest.raises(ChannelBroken):
        ours.receive(soon())


def test_what_begins_no_message_is_broken_and_not_waited_for(ends):
    ours, theirs = ends
    theirs.sendall(b"some text that a grader wrote into every file it found")
    with pytest.raises(ChannelBroken, match="or none of ours"):
        ours.receive(time.monotonic() + 60)


def test_an_idle_channel_is_silent_until_something_is_said_or_its_end_is_gone(ends):
    ours, theirs = ends
    assert ours.is_silent()
    theirs.sendall(b"x")
    assert not ours.is_silent()
    theirs.close()
    assert not ours.is_silent()
