"""Whole messages over a socket between a grader process and its parent, sent and received before a deadline.

Not a `multiprocessing.Connection`: that waits for ever for the rest of a message that was begun, and unpickles what a
user's process sends.
"""

from __future__ import annotations

import socket
import struct
import time

_HEADER = struct.Struct("!Q")
_PIECE = 2**16
_MOST_BYTES = 2**24
"""Longest message that is taken: a verdict has some hundred bytes, a final answer is part of a completion."""


class ChannelBroken(Exception):
    """The other end is gone or talks nonsense; the message says which."""


class Channel:
    """One end of a connected socket. Times are those of `time.monotonic`; None waits as long as the other end lives."""

    def __init__(self, end: socket.socket) -> None:
        """Take over a connected stream socket."""
        self._socket = end

    def send(self, message: bytes, until: float | None = None) -> None:
        """Send a message of any length.

        Raises:
            TimeoutError: the other end had not taken all of it by `until`.
            ChannelBroken: it is gone.
        """
        try:
            self._set_timeout(until)
            self._socket.sendall(_HEADER.pack(len(message)) + message)
        except TimeoutError:
            raise
        except OSError as error:
            raise ChannelBroken(str(error)) from error

    def receive(self, until: float | None = None, most: int = _MOST_BYTES) -> bytes:
        """The next message, of at most so many bytes.

        Raises:
            TimeoutError: it was not all there by `until`.
            ChannelBroken: the other end is gone, or what it sent begins no such message.
        """
        (size,) = _HEADER.unpack(self._exactly(_HEADER.size, until))
        if size > most:
            raise ChannelBroken(f"a message of {size} bytes, or none of ours")
        return self._exactly(size, until)

    def is_silent(self) -> bool:
        """Whether the other end is there and has sent nothing that is still to be read."""
        self._socket.settimeout(0)
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        """Give up this end. A copy of it in another process stays open."""
        self._socket.close()

    def _exactly(self, size: int, until: float | None) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                self._set_timeout(until)
                piece = self._socket.recv(min(size - len(data), _PIECE))
            except TimeoutError:
                raise
            except OSError as error:
                raise ChannelBroken(str(error)) from error
            if not piece:
                raise ChannelBroken("the other end has closed it")
            data += piece
        return bytes(data)

    def _set_timeout(self, until: float | None) -> None:
        remaining = None if until is None else until - time.monotonic()
        if remaining is not None and remaining <= 0:
            raise TimeoutError
        self._socket.settimeout(remaining)
