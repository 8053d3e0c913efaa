"""Connections that wait for their first bytes, so that they are judged with what these declare."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from tracer.model import TCP, Accept, Connection, FiveTuple
from tracer.proxy_headers import Declared

# What a client sends first follows the handshake; a server that speaks first keeps it waiting.
PATIENCE_NS = 2_000_000_000
# A flood's worth. Beyond it the oldest are judged without waiting.
_WAITING = 16384


@dataclass(slots=True, kw_only=True)
class Ready:
    """
    A connection that has waited, with what it declares, None if that did not come in time.

    ``accepts`` are those that came while it waited: they follow it.
    """

    connection: Connection
    declared: Declared | None = None
    accepts: list[Accept] = field(default_factory=list)


class Waiting:
    """Holds connections back until they are declared or their time is over."""

    def __init__(self) -> None:
        self._late = 0
        self._held: OrderedDict[tuple[int, FiveTuple], Ready] = OrderedDict()
        # The socket's peer may be another than the sender: it is what the last node sends on.
        self._by_peer: dict[FiveTuple, Ready] = {}

    def hold(self, connection: Connection) -> Iterator[Ready]:
        """Take a TCP connection; yield those that make room for it."""
        key = connection.netns, connection.orig
        if key in self._held:
            # The same ports again: the older one has said all it will.
            yield self._release(key)
        self._held[key] = ready = Ready(connection=connection)
        self._by_peer[connection.reply.inverted] = ready
        if len(self._held) > _WAITING:
            yield self._release(next(iter(self._held)))

    def take_accept(self, accept: Accept) -> bool:
        """Keep an accept behind its connection, if that waits."""
        ready = self._by_peer.get(accept.peer)
        if ready is not None:
            ready.accepts.append(accept)
        return ready is not None

    def declare(self, declared: Declared) -> Iterator[Ready]:
        """Yield the connection that declares something, unless it does not wait any more."""
        key = declared.netns, declared.flow
        if key not in self._held:
            self._late += 1
            return
        ready = self._release(key)
        ready.declared = declared
        yield ready

    def over(self, now_ns: int) -> Iterator[Ready]:
        """Yield those whose time is over, by the clock of the records."""
        while self._held:
            key, ready = next(iter(self._held.items()))
            if now_ns - ready.connection.ktime_ns <= PATIENCE_NS:
                return
            yield self._release(key)

    def rest(self) -> Iterator[Ready]:
        """Yield all that still wait."""
        while self._held:
            yield self._release(next(iter(self._held)))

    def notes(self) -> tuple[str, ...]:
        """Say what came too late, if anything did."""
        if not self._late:
            return ()
        seconds = PATIENCE_NS // 1_000_000_000
        return (
            f"{self._late} headers of proxies that came more than {seconds} s after their "
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
