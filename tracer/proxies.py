"""What is known about proxies during a run: the user's list, and which backends they serve."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeVar

from tracer.judge.proxy_word import ProxyWord, weigh
from tracer.model import Connection, FiveTuple, IPAddress, IPNetwork
from tracer.proxy_headers import Declared, ProxyHeader

# How many backends to remember, and how many connections on their way to the next node.
_BACKENDS = 8192
_FORWARDED = 8192
# How far apart two nodes, whose clocks may differ, may see a connection. After that, the same ports
# belong to another.
_WINDOW_NS = 5_000_000_000

Key = TypeVar("Key")
Value = TypeVar("Value")


class Proxies:
    """
    Assesses the clients that connections declare.

    A backend is expected to get the headers that trusted proxies have sent to it before; what
    others send creates no expectation.
    """

    def __init__(self, trusted: Sequence[IPNetwork] = ()) -> None:
        self._trusted = tuple(trusted)
        self._expected: OrderedDict[tuple[IPAddress, int], frozenset[ProxyHeader]] = OrderedDict()
        # The original peer of connections that a traced node forwarded with SNAT, and when.
        self._forwarded: OrderedDict[FiveTuple, tuple[IPAddress, int]] = OrderedDict()

    def word(self, connection: Connection, declared: Declared | None, time_ns: int) -> ProxyWord:
        """
        Assess what a connection's first bytes declare, and learn from it.

        Args:
            connection: The connection.
            declared: What its first bytes declare; None if they did not arrive in time.
            time_ns: When the connection began, in Unix time.
        """
        peer, sent_ns = self._forwarded.get(connection.orig, (connection.orig.src, time_ns))
        if abs(time_ns - sent_ns) > _WINDOW_NS:
            peer = connection.orig.src
        backend = connection.reply.src, connection.reply.sport
        expected = self._expected.get(backend, frozenset())
        word = weigh(declared, peer, self._trusted, expected)
        if word.is_trusted and word.headers:
            self._expected[backend] = expected.union(word.headers)
            _bound(self._expected, backend, _BACKENDS)
        if word.is_trusted and connection.is_snat:
            sent_on = connection.reply.inverted
            self._forwarded[sent_on] = peer, time_ns
            _bound(self._forwarded, sent_on, _FORWARDED)
        return word


def _bound(kept: OrderedDict[Key, Value], newest: Key, most: int) -> None:
    kept.move_to_end(newest)
    if len(kept) > most:
        kept.popitem(last=False)
