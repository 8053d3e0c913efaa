"""Hold back connections until their first bytes are read, to judge them by what these declare."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from tracer.model import TCP, Accept, Connection, FiveTuple
from tracer.proxy_headers import Declared

# How long to wait. A client usually sends right after the handshake, but waits if its protocol
# lets the server speak first.
PATIENCE_NS = 2_000_000_000
# How many connections may wait, even in a flood. Beyond that the oldest are judged at once.
_WAITING = 16384


@dataclass(slots=True, kw_only=True)
class Ready:
    """
    A connection that has waited, with what it declares; None if that did not arrive in time.

    ``accepts`` are those that arrived while it waited: they follow it.
    """

    connection: Connection
    declared: Declared | None = None
    accepts: list[Accept] = field(default_factory=list)


class Waiting:
    """Holds connections back until their declaration arrives or their time is over."""

    def __init__(self) -> None:
        self._late = 0
        self._held: OrderedDict[tuple[int, FiveTuple], Ready] = OrderedDict()
        # By the peer that the backend's socket sees, which after SNAT is not the client.
        self._by_peer: dict[FiveTuple, Ready] = {}

    def hold(self, connection: Connection) -> Iterator[Ready]:
        """Take a TCP connection; yield those released to make room for it."""
        key = connection.netns, connection.orig
        if key in self._held:
            # The same tuple is used again: the older connection is over.
            yield self._release(key)
        self._held[key] = ready = Ready(connection=connection)
        self._by_peer[connection.reply.inverted] = ready
        if len(self._held) > _WAITING:
            yield self._release(next(iter(self._held)))

    def take_accept(self, accept: Accept) -> bool:
        """Keep an accept with its connection, if that waits; return whether it does."""
        ready = self._by_peer.get(accept.peer)
        if ready is not None:
            ready.accepts.append(accept)
        return ready is not None

    def declare(self, declared: Declared) -> Iterator[Ready]:
        """Yield the connection that a declaration belongs to, if it still waits."""
        key = declared.netns, declared.flow
        if key not in self._held:
            self._late += 1
            return
        ready = self._release(key)
        ready.declared = declared
        yield ready

    def over(self, now_ns: int) -> Iterator[Ready]:
        """Yield those whose time is over, by the records' clock."""
        while self._held:
            key, ready = next(iter(self._held.items()))
            if now_ns - ready.connection.ktime_ns <= PATIENCE_NS:
                return
            yield self._release(key)

    def rest(self) -> Iterator[Ready]:
        """Yield all that are still waiting."""
        while self._held:
            yield self._release(next(iter(self._held)))

    def notes(self) -> tuple[str, ...]:
        """Return a line on what arrived too late, if anything did."""
        if not self._late:
            return ()
        seconds = PATIENCE_NS // 1_000_000_000
        return (
            f"{self._late} proxies' headers that arrived more than {seconds} s after their "
            "connection began",
        )

    def _release(self, key: tuple[int, FiveTuple]) -> Ready:
        ready = self._held.pop(key)
        peer = ready.connection.reply.inverted
        if self._by_peer.get(peer) is ready:
            del self._by_peer[peer]
        return ready


def must_wait(connection: Connection) -> bool:
    """Whether a connection has first bytes that can be read."""
    return connection.orig.proto == TCP
