"""
The cluster's recent past: a connection is judged by the state at its time, not at reading time.

Snapshots share what did not change, so keeping old ones costs little.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from tracer.cluster.index import Cluster
from tracer.cluster.match import HostPortMatch, ServiceMatch
from tracer.model import IPAddress

KEEP_NS = 60 * 10**9
# Records are read a second or two after the event; for this long every state is kept.
EXACT_NS = 5 * 10**9
# Of older states one per second is kept, enough to find objects that are gone.
SPACING_NS = 10**9
# Bounds memory when very many objects change.
MAX_EXACT = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """An answer from the past, and whether the newest snapshot gives the same."""

    match: ServiceMatch | HostPortMatch
    is_current: bool


@dataclass(frozen=True, slots=True)
class History:
    """
    Snapshots with the time from which each was valid, oldest first; never empty.

    Times are nanoseconds of a clock that the caller chooses. A history is immutable.
    """

    _entries: tuple[tuple[int, Cluster], ...] = ((0, Cluster()),)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def now(self) -> Cluster:
        """The newest snapshot."""
        return self._entries[-1][1]

    def add(self, cluster: Cluster, at_ns: int) -> "History":
        """Return a history with a snapshot added at a time, and old ones removed."""
        entries = self._entries
        at_ns = max(at_ns, entries[-1][0])
        # The oldest one kept began before the time to keep, but was still valid within it.
        first = max(0, bisect_right(entries, at_ns - KEEP_NS, key=_start) - 1)
        exact = max(first, bisect_right(entries, at_ns - EXACT_NS, key=_start))
        spaced = {entry[0] // SPACING_NS: entry for entry in entries[first:exact]}
        return History((*spaced.values(), *entries[exact:][-MAX_EXACT:], (at_ns, cluster)))

    def at(self, at_ns: int) -> Cluster:
        """Return the snapshot that was valid at a time; the oldest for times before it."""
        return self._entries[max(0, bisect_right(self._entries, at_ns, key=_start) - 1)][1]

    def service_at(
        self,
        address: IPAddress,
        port: int,
        proto: int,
        *,
        at_ns: int,
        node_addresses: frozenset[IPAddress] = frozenset(),
        node: str | None = None,
    ) -> Past | None:
        """
        Return what a client reached at a time, or last before it, or first after it.

        Connections outlive Services, and the watch may report a Service after its first client.
        """
        for cluster in self._outward(at_ns):
            match = cluster.service_at(
                address, port, proto, node_addresses=node_addresses, node=node
            )
            if match is not None:
                known = self.now.service_at(
                    address, port, proto, node_addresses=node_addresses, node=node
                )
                return Past(match=match, is_current=known == match)
        return None

    def _outward(self, at_ns: int) -> Iterator[Cluster]:
        at = max(0, bisect_right(self._entries, at_ns, key=_start) - 1)
        for _, cluster in (*reversed(self._entries[: at + 1]), *self._entries[at + 1 :]):
            yield cluster


def _start(entry: tuple[int, Cluster]) -> int:
    return entry[0]
