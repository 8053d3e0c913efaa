"""The connected clients of the stream: their sockets are watched, written to and timed out here."""

import selectors
import socket
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from tracer.channel import Channel, keep_alive
from tracer.stream.listener import Listener

# How many bytes may be queued for a client, and for all together. Many clients share the latter
# equally.
QUEUE_BYTES, QUEUES_BYTES = 256 << 10, 8 << 20
# The kernel doubles it; it is memory of the node's, though not of this process.
_SEND_BUFFER = 64 << 10
# How long a client may take to send its request, to read its last lines, and to read nothing while
# lines are queued.
_ASK_S, _LINGER_S, _STUCK_S = 10.0, 10.0, 60.0
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Readable(Protocol):
    """Anything else that wakes the loop."""

    def fileno(self) -> int:
        """Return the descriptor to watch."""


class Clients:
    """
    A set of clients, each with a socket that wakes the loop, a queue and a deadline.

    A client whose connection fails, or whose time is up, is removed.
    """

    def __init__(
        self, removed: Callable[[Listener], None], clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Args:
            removed: Called with each client that was removed.
            clock_s: The clock of all deadlines.
        """
        self._removed = removed
        self._clock_s = clock_s
        self._clients: set[Listener] = set()
        self._selector = selectors.EpollSelector()
        self._lost_before = 0

    def __iter__(self) -> Iterator[Listener]:
        return iter(self._clients)

    def __len__(self) -> int:
        return len(self._clients)

    def __contains__(self, client: object) -> bool:
        return client in self._clients

    def fileno(self) -> int:
        """Return a descriptor that is readable when `ready` has something to return."""
        return self._selector.fileno()

    @property
    def lost(self) -> int:
        """How many lines did not fit into their client's queue, since the start."""
        return self._lost_before + sum(client.lost for client in self._clients)

    def wake_on(self, other: Readable) -> None:
        """Also wake the loop when something else is readable."""
        self._selector.register(other, READ)

    def sleep_on(self, other: Readable) -> None:
        """Stop waking the loop for it."""
        self._selector.unregister(other)

    def ready(self) -> list[tuple[Listener | None, object, int]]:
        """Return what is ready, with its events: a client, or None and the other object."""
        return [(key.data, key.fileobj, events) for key, events in self._selector.select(0)]

    def add(self, channel: Channel) -> Listener | None:
        """Add a connection, which must send its request in time; None if the client is gone."""
        channel.deadline_s = None
        try:
            channel.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            if channel.socket.family != socket.AF_UNIX:
                keep_alive(channel.socket)
        except OSError:
            channel.close()
            return None
        client = Listener(channel, self._clock_s() + _ASK_S, READ)
        self._clients.add(client)
        self._selector.register(channel, READ, client)
        return client

    def offer(self, client: Listener, line: bytes) -> bool:
        """Queue a line if there is room, else count it as lost."""
        room = min(QUEUE_BYTES, QUEUES_BYTES // len(self._clients))
        if client.queued + len(line) > room and not client.events & WRITE:
            self.flush(client)
        if client.queued + len(line) > room:
            client.lost += 1
            return False
        self.put(client, line)
        return True

    def put(self, client: Listener, line: bytes) -> None:
        """Queue a line."""
        if not client.has_unsent and not client.is_ending:
            client.deadline_s = self._clock_s() + _STUCK_S
        client.put(line)

    def flush(self, client: Listener) -> None:
        """Write what the client's socket accepts."""
        sent = client.channel.sent
        try:
            client.write()
        except BlockingIOError:
            if client.channel.sent > sent and not client.is_ending:
                client.deadline_s = self._clock_s() + _STUCK_S
            self._watch(client, client.events | WRITE)
        except OSError:
            self.remove(client)
        else:
            self._watch(client, client.events & ~WRITE)
            if client.is_over:
                self.remove(client)
            elif not client.is_ending:
                client.deadline_s = float("inf")

    def flush_all(self) -> None:
        """Write what the clients' sockets accept."""
        for client in list(self._clients):
            if client.has_unsent and not client.events & WRITE:
                self.flush(client)

    def flush_ready(self) -> None:
        """Write to sockets that are writable again: a batch may be larger than a queue."""
        for client, _, events in self.ready():
            if client is not None and events & WRITE and client in self._clients:
                self.flush(client)

    def stop_reading(self, client: Listener) -> None:
        """Ignore what a client sends from now on."""
        self._watch(client, client.events & ~READ)

    def let_go(self, client: Listener) -> None:
        """Send a client no more results, and give it some time to read its last lines."""
        client.is_ending = True
        client.deadline_s = self._clock_s() + _LINGER_S

    def expire(self) -> None:
        """Remove clients whose time is up."""
        now_s = self._clock_s()
        for client in [each for each in self._clients if each.deadline_s <= now_s]:
            self.remove(client)

    def remove(self, client: Listener) -> None:
        """Close a client's connection, if it is still there."""
        if client not in self._clients:
            return
        self._clients.discard(client)
        self._lost_before += client.lost
        self._watch(client, 0)
        client.channel.close()
        self._removed(client)

    def close(self) -> None:
        """Close all connections."""
        for client in list(self._clients):
            self.remove(client)
        self._selector.close()

    def _watch(self, client: Listener, events: int) -> None:
        """Change the events for which a client's socket wakes the loop."""
        if events == client.events:
            return
        if not events:
            self._selector.unregister(client.channel)
        elif client.events:
            self._selector.modify(client.channel, events, client)
        else:
            self._selector.register(client.channel, events, client)
        client.events = events
