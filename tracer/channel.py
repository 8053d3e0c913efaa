"""
A conversation over a socket, in clear or by TLS, of which no call does more than a bounded part.

TLS is done in memory: what a call takes from the socket is what it deciphers, and nothing is left
inside the library that a selector would not show. OpenSSL's own loop would go on for as long as
the other side sends what carries no data.
"""

import ssl
import time
from contextlib import suppress
from socket import (
    IPPROTO_TCP,
    SO_KEEPALIVE,
    SOL_SOCKET,
    TCP_KEEPCNT,
    TCP_KEEPIDLE,
    TCP_KEEPINTVL,
    TCP_NODELAY,
    socket,
)
from typing import Protocol

# What is enciphered before the socket has taken what came before: one record of TLS.
_RECORD = 16 << 10
# What may come in a row without a word in it. An honest client renews its keys now and then.
_EMPTY = 64 << 10
_TCP = {TCP_KEEPIDLE: 60, TCP_KEEPINTVL: 10, TCP_KEEPCNT: 3, TCP_NODELAY: 1}


class Channel(Protocol):
    """
    One end of a conversation.

    Nothing waits: what cannot be done now raises ``BlockingIOError``. With a ``deadline_s``, of the
    monotonic clock, everything waits until then, and raises ``TimeoutError`` after it. Whatever
    else goes wrong is an ``OSError``.
    """

    socket: socket
    deadline_s: float | None
    sent: int

    def fileno(self) -> int:
        """Return the socket's descriptor."""

    def receive(self) -> bytes:
        """Return what has come, nothing at the end."""

    def send(self, data: bytes | memoryview) -> int:
        """Take some of it, and return how much."""

    def flush(self) -> None:
        """Have the socket take what was taken so far."""

    @property
    def has_unsent(self) -> bool:
        """Whether something was taken that the socket has not."""

    def close(self) -> None:
        """End it."""


class ClearChannel:
    """A conversation in clear."""

    has_unsent = False

    def __init__(self, sock: socket, *, chunk: int) -> None:
        """
        Args:
            sock: It is ours from now on.
            chunk: Bytes to receive at once at the most.
        """
        self.socket = sock
        self.deadline_s: float | None = None
        self.sent = 0
        self._chunk = chunk

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self.socket.fileno()

    def receive(self) -> bytes:
        """Return what has come, nothing at the end."""
        _limit(self.socket, self.deadline_s)
        return self.socket.recv(self._chunk)

    def send(self, data: bytes | memoryview) -> int:
        """Take some of it, and return how much."""
        _limit(self.socket, self.deadline_s)
        sent = self.socket.send(data)
        self.sent += sent
        return sent

    def flush(self) -> None:
        """The socket has it already."""

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


class TlsChannel:
    """A conversation by TLS."""

    def __init__(
        self,
        sock: socket,
        context: ssl.SSLContext,
        *,
        chunk: int,
        is_server: bool = False,
        server_name: str | None = None,
    ) -> None:
        """
        Args:
            sock: It is ours from now on.
            context: With the certificate of a server, or what a client trusts.
            chunk: Bytes to receive at once at the most.
            is_server: Which side we are.
            server_name: What a client expects the certificate to be of.
        """
        self.socket = sock
        self.deadline_s: float | None = None
        self.sent = 0
        self._chunk = chunk
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._unsent = b""
        self._empty = 0
        self._is_over = False
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=is_server, server_hostname=server_name
        )

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self.socket.fileno()

    def shake_hands(self) -> None:
        """
        Agree on keys, until the deadline.

        Raises:
            OSError: As everywhere; an ``ssl.SSLError`` says what was not agreed on.
        """
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self.flush()
                self._take_in()
            except ssl.SSLError:
                # The other side is told why.
                with suppress(OSError):
                    self.flush()
                raise
            else:
                self.flush()
                return

    def receive(self) -> bytes:
        """Return what has come, nothing at the end."""
        found = self._deciphered()
        if not found and not self._is_over:
            self._empty += self._take_in()
            found = self._deciphered()
        # Keys may have been asked for: nothing of ours would bring the answer to the other side.
        with suppress(BlockingIOError):
            self.flush()
        if found or self._is_over:
            self._empty = 0
            return found
        if self._empty > _EMPTY:
            raise ConnectionAbortedError("the other side speaks, and says nothing")
        raise BlockingIOError

    def send(self, data: bytes | memoryview) -> int:
        """Take some of it, and return how much."""
        self.flush()
        taken = self._tls.write(data[:_RECORD])
        with suppress(BlockingIOError):
            self.flush()
        return taken

    def flush(self) -> None:
        """Have the socket take what was taken so far."""
        while self._unsent or self._outgoing.pending:
            self._unsent = self._unsent or self._outgoing.read()
            _limit(self.socket, self.deadline_s)
            sent = self.socket.send(self._unsent)
            self.sent += sent
            self._unsent = self._unsent[sent:]

    @property
    def has_unsent(self) -> bool:
        """Whether something was taken that the socket has not."""
        return bool(self._unsent or self._outgoing.pending)

    def close(self) -> None:
        """Say goodbye, if that can be said at once, and close the socket."""
        self.deadline_s = None
        # Before the end of a handshake there is nothing to end.
        with suppress(ssl.SSLError):
            self._tls.unwrap()
        with suppress(OSError):
            self.flush()
        self.socket.close()

    def _take_in(self) -> int:
        _limit(self.socket, self.deadline_s)
        chunk = self.socket.recv(self._chunk)
        if chunk:
            self._incoming.write(chunk)
        else:
            self._incoming.write_eof()
        return len(chunk)

    def _deciphered(self) -> bytes:
        parts = []
        try:
            while part := self._tls.read(_RECORD):
                parts.append(part)
            self._is_over = True
        except ssl.SSLWantReadError:
            pass
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            self._is_over = True
        return b"".join(parts)


def keep_alive(sock: socket) -> None:
    """Have TCP find out in a minute and a half that the other machine is gone; send at once."""
    sock.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
    for option, value in _TCP.items():
        sock.setsockopt(IPPROTO_TCP, option, value)


def send_all(channel: Channel, data: bytes) -> None:
    """
    Send all of it, until the deadline.

    Raises:
        OSError: As of the channel.
    """
    left = memoryview(data)
    while left:
        left = left[channel.send(left) :]
    channel.flush()


def _limit(sock: socket, deadline_s: float | None) -> None:
    if deadline_s is None:
        # To set it is a system call, to ask is none.
        if sock.gettimeout() != 0:
            sock.setblocking(False)
        return
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("timed out")
    sock.settimeout(left_s)
