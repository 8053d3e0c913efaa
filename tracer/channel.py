"""
A connection over a socket, in clear text or TLS, where each call does a bounded amount of work.

TLS works on memory buffers: a call decrypts exactly what it read from the socket, and nothing is
left inside the library that a selector would not report. OpenSSL's own loop would continue for as
long as the peer sends records without data.
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

# How much to encrypt before the socket has accepted what came before: one TLS record.
_RECORD = 16 << 10
# How many bytes may arrive in a row without data. A well-behaved client sends key updates rarely.
_EMPTY = 64 << 10
_TCP = {TCP_KEEPIDLE: 60, TCP_KEEPINTVL: 10, TCP_KEEPCNT: 3, TCP_NODELAY: 1}


class Channel(Protocol):
    """
    One end of a connection.

    By default nothing blocks: what cannot be done now raises ``BlockingIOError``. With a
    ``deadline_s``, on the monotonic clock, calls block until then, and then raise ``TimeoutError``.
    All other failures are an ``OSError``. ``sent`` counts the bytes that the socket accepted.
    """

    socket: socket
    deadline_s: float | None
    sent: int

    def fileno(self) -> int:
        """Return the socket's descriptor."""

    def receive(self) -> bytes:
        """Return received data, or ``b""`` at the end."""

    def send(self, data: bytes | memoryview) -> int:
        """Accept some of the data, and return how much."""

    def flush(self) -> None:
        """Write everything accepted so far to the socket."""

    @property
    def has_unsent(self) -> bool:
        """Whether accepted data has not been written to the socket yet."""

    def close(self) -> None:
        """Close the connection."""


class ClearChannel:
    """A connection in clear text."""

    has_unsent = False

    def __init__(self, sock: socket, *, chunk: int) -> None:
        """
        Args:
            sock: The connected socket, which this object now owns.
            chunk: Bytes to receive at once at most.
        """
        self.socket = sock
        self.deadline_s: float | None = None
        self.sent = 0
        self._chunk = chunk

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self.socket.fileno()

    def receive(self) -> bytes:
        """Return received data, or ``b""`` at the end."""
        _limit(self.socket, self.deadline_s)
        return self.socket.recv(self._chunk)

    def send(self, data: bytes | memoryview) -> int:
        """Accept some of the data, and return how much."""
        _limit(self.socket, self.deadline_s)
        sent = self.socket.send(data)
        self.sent += sent
        return sent

    def flush(self) -> None:
        """Do nothing: `send` writes to the socket."""

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


class TlsChannel:
    """A connection over TLS."""

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
            sock: The connected socket, which this object now owns.
            context: Holds a server's certificate, or the authorities that a client trusts.
            chunk: Bytes to receive at once at most.
            is_server: Whether this is the server's end.
            server_name: The name that a client expects in the certificate.
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
        Do the TLS handshake, until the deadline.

        Raises:
            OSError: As everywhere; an ``ssl.SSLError`` if the handshake fails.
        """
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self.flush()
                self._feed()
            except ssl.SSLError:
                # Send the alert that tells the peer why.
                with suppress(OSError):
                    self.flush()
                raise
            else:
                self.flush()
                return

    def receive(self) -> bytes:
        """Return received data, or ``b""`` at the end."""
        found = self._decrypted()
        if not found and not self._is_over:
            self._empty += self._feed()
            found = self._decrypted()
        # Reading may produce an answer, such as a key update, that nothing else would flush.
        with suppress(BlockingIOError):
            self.flush()
        if found or self._is_over:
            self._empty = 0
            return found
        if self._empty > _EMPTY:
            raise ConnectionAbortedError("the peer sends TLS records without data")
        raise BlockingIOError

    def send(self, data: bytes | memoryview) -> int:
        """Accept some of the data, and return how much."""
        self.flush()
        taken = self._tls.write(data[:_RECORD])
        with suppress(BlockingIOError):
            self.flush()
        return taken

    def flush(self) -> None:
        """Write everything accepted so far to the socket."""
        while self._unsent or self._outgoing.pending:
            self._unsent = self._unsent or self._outgoing.read()
            _limit(self.socket, self.deadline_s)
            sent = self.socket.send(self._unsent)
            self.sent += sent
            self._unsent = self._unsent[sent:]

    @property
    def has_unsent(self) -> bool:
        """Whether accepted data has not been written to the socket yet."""
        return bool(self._unsent or self._outgoing.pending)

    def close(self) -> None:
        """Send a close_notify, if the socket accepts it at once, and close the socket."""
        self.deadline_s = None
        # SSLError: the handshake has not finished.
        with suppress(ssl.SSLError):
            self._tls.unwrap()
        with suppress(OSError):
            self.flush()
        self.socket.close()

    def _feed(self) -> int:
        _limit(self.socket, self.deadline_s)
        chunk = self.socket.recv(self._chunk)
        if chunk:
            self._incoming.write(chunk)
        else:
            self._incoming.write_eof()
        return len(chunk)

    def _decrypted(self) -> bytes:
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
    """Make TCP detect within 90 s that the peer's machine is gone, and send without delay."""
    sock.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
    for option, value in _TCP.items():
        sock.setsockopt(IPPROTO_TCP, option, value)


def send_all(channel: Channel, data: bytes) -> None:
    """
    Send all data, until the deadline.

    Raises:
        OSError: As the channel does.
    """
    left = memoryview(data)
    while left:
        left = left[channel.send(left) :]
    channel.flush()


def _limit(sock: socket, deadline_s: float | None) -> None:
    if deadline_s is None:
        # Setting it is a system call, reading it is not.
        if sock.gettimeout() != 0:
            sock.setblocking(False)
        return
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("timed out")
    sock.settimeout(left_s)
