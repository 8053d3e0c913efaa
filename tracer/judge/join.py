"""Joins the legs of a connection, one from each node, into its path."""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TypeVar

from tracer.cluster.index import Cluster
from tracer.judge.gaps import gaps
from tracer.judge.path import Leg, Path
from tracer.judge.proof import proved
from tracer.judge.verdict import SeenAccept

# A packet crosses a cluster in less than a millisecond; larger differences come from the nodes'
# clocks, which NTP keeps within a second. A tuple is reused when its conntrack entry is gone: after
# at least 10 s for closed TCP (nf_ct_tcp_timeout_close), 30 s for UDP.
WINDOW_NS = 3_000_000_000
# The most legs held: half a GiB with their contents.
ROOM = 65_536
# Legs with one tuple in one window, and legs that may belong together: more than any real traffic.
_SAME_TUPLE, _TOGETHER = 64, 256
# More nodes than a cluster has: a recording may name any number.
_NODES = 16_384
# Two tracers on one node see a connection some microseconds apart, and read their clocks apart.
TWICE_NS = 10_000_000

_V = TypeVar("_V")
# `FiveTuple.numbers`: each leg is looked up a dozen times.
_Key = tuple[int, int, int, int, int, int]


@dataclass(slots=True, eq=False)
class _Held:
    """A leg that waits for those before and after it; ``onward`` is what it sent on, if any."""

    leg: Leg
    teller: int
    number: int
    received: _Key
    onward: _Key | None
    after: "_Held | None" = None
    before: "_Held | None" = None
    is_done: bool = False
    # The network namespace: its inode alone may exist on another machine, too.
    place: tuple[str, int] = field(init=False)
    # Orders legs of one tuple by content, so that the order of arrival does not matter.
    order: tuple[bool, int, str, int] = field(init=False)

    def __post_init__(self) -> None:
        leg = self.leg
        pod = leg.judged.backend_pod if leg.judged else None
        is_backends = pod is not None and pod.node == leg.node
        self.place = leg.node, leg.netns
        self.order = (is_backends, leg.time_ns, leg.node, leg.netns)


class Joiner:
    """
    Joins legs into paths: what one node sent on is what the next one received.

    Legs may come in any order. Of several that fit, those nearest in time belong together; none is
    used twice, and no path crosses a namespace twice. A path is returned once no leg within the
    window of one of its own can still come. Memory is bounded: if there are too many legs, the
    oldest are joined with what is there, and counted in `lost`.
    """

    def __init__(
        self,
        window_ns: int = WINDOW_NS,
        *,
        cluster: Callable[[], Cluster | None] = lambda: None,
        room: int = ROOM,
    ) -> None:
        """
        Args:
            window_ns: How far the times of two nodes may differ, clocks included.
            cluster: Returns the objects that tell which nodes are missing.
            room: The most legs, and the most accepts, to hold.
        """
        self._window_ns = window_ns
        self._cluster = cluster
        self._room = room
        self._numbers = count()
        self._received: dict[_Key, list[_Held]] = {}
        self._sent: dict[_Key, list[_Held]] = {}
        self._queue: list[tuple[int, int, _Held]] = []
        self._held = 0
        self._accepts = _Accepts(window_ns, room)
        self._ready: list[Path] = []
        self._nodes: set[str] = set()
        self._told_twice = self._pushed_out = 0

    def add(self, leg: Leg, *, teller: int = 0) -> None:
        """
        Add a leg.

        Args:
            leg: What a node knows of a connection.
            teller: Which tracer reports it. A node's connection reported by two tracers is one.
        """
        if len(self._nodes) < _NODES:
            self._nodes.add(leg.node)
        received = leg.orig.numbers
        same = self._received.get(received, [])
        twin = next((each for each in same if _is_twin(each, leg, teller)), None)
        if twin is not None:
            self._told_twice += 1
            # Another tracer may have watched the packets.
            if len(leg.passages) > len(twin.leg.passages):
                twin.leg = leg
            return
        if len(same) >= _SAME_TUPLE:
            self._push_out(min(same, key=lambda each: each.order))
        while self._held >= self._room:
            self._push_out(self._oldest())
        onward = _onward(leg)
        held = _Held(leg, teller, next(self._numbers), received, onward)
        self._received.setdefault(received, []).append(held)
        if onward is not None:
            self._sent.setdefault(onward, []).append(held)
        self._held += 1
        self._wait(held, leg.time_ns + self._window_ns)

    def add_accept(self, accept: SeenAccept) -> None:
        """Add what a socket accepted: the end of the path that arrived there."""
        self._accepts.add(accept)

    def take(self, before_ns: int | None = None) -> list[Path]:
        """
        Return the paths that can get no more legs, in order of time.

        Args:
            before_ns: All legs before this Unix time were added; None to return all paths.
        """
        while self._queue and (before_ns is None or self._queue[0][0] < before_ns):
            _, _, held = heapq.heappop(self._queue)
            if held.is_done:
                continue
            together = self._together(held)
            due_ns = max(each.leg.time_ns for each in together) + self._window_ns
            if len(together) >= _TOGETHER:
                self._pushed_out += len(together)
            elif before_ns is not None and due_ns >= before_ns:
                self._wait(held, due_ns)
                continue
            self._join(together)
        if before_ns is None:
            self._accepts.clear()
        else:
            self._accepts.forget(before_ns, self._sent)
        ready, self._ready = self._ready, []
        return sorted(ready, key=lambda path: path.time_ns)

    @property
    def told_twice(self) -> int:
        """How many legs were reported by more than one tracer, and counted once."""
        return self._told_twice

    def lost(self) -> dict[str, int]:
        """Count what was joined or discarded before its window was over, for lack of room."""
        return {"legs_pushed_out": self._pushed_out, "accepts_pushed_out": self._accepts.pushed_out}

    def _wait(self, held: _Held, due_ns: int) -> None:
        if len(self._queue) > 2 * self._room:
            # Legs that were pushed out are still queued, with all that they hold.
            self._queue = [each for each in self._queue if not each[2].is_done]
            heapq.heapify(self._queue)
        heapq.heappush(self._queue, (due_ns, held.number, held))

    def _oldest(self) -> _Held:
        while self._queue[0][2].is_done:
            heapq.heappop(self._queue)
        return self._queue[0][2]

    def _push_out(self, held: _Held) -> None:
        together = self._together(held)
        self._pushed_out += len(together)
        self._join(together)

    def _together(self, held: _Held) -> list[_Held]:
        """Return all legs that a leg can belong with, directly or through others, up to a bound."""
        found = {held: None}
        left = [held]
        while left and len(found) < _TOGETHER:
            each = left.pop()
            near = [*(two for _, two in self._onward(each)), *(one for one, _ in self._back(each))]
            new = [other for other in near if other not in found]
            found |= dict.fromkeys(new)
            left += new
        return list(found)

    def _onward(self, held: _Held) -> Iterator[tuple[_Held, _Held]]:
        if held.onward is not None:
            for each in self._received.get(held.onward, ()):
                if self._may_follow(held, each):
                    yield held, each

    def _back(self, held: _Held) -> Iterator[tuple[_Held, _Held]]:
        for each in self._sent.get(held.received, ()):
            if self._may_follow(each, held):
                yield each, held

    def _may_follow(self, one: _Held, two: _Held) -> bool:
        if one.place == two.place or _apart(one, two) > self._window_ns:
            return False
        # Without NAT either could be first: the backend's node is last, otherwise time decides.
        return two.onward != one.received or one.order < two.order

    def _join(self, together: list[_Held]) -> None:
        those = set(together)
        pairs = [pair for held in together for pair in self._onward(held) if pair[1] in those]
        pairs.sort(key=lambda pair: (_apart(*pair), pair[0].order, pair[1].order))
        for one, two in pairs:
            if one.after is None and two.before is None and not _would_return(one, two):
                one.after, two.before = two, one
        for held in together:
            self._forget(held)
        firsts = [held for held in together if held.before is None]
        paths = [[each.leg for each in _chain(first)] for first in firsts]
        accepts = self._accepts.take([legs[-1] for legs in paths])
        for legs, accept in zip(paths, accepts, strict=True):
            if accept is not None and legs[-1].drop is not None:
                # It arrived: the drop was of another packet.
                legs[-1] = replace(legs[-1], drop=None)
        for held in together:
            held.after = held.before = None  # leaves no cycles to the garbage collector
        cluster = self._cluster()
        for legs, accept in zip(paths, accepts, strict=True):
            missing = gaps(legs[0], legs[-1], cluster, self._nodes)
            self._ready.append(Path(legs=proved(legs, accept), accept=accept, missing=missing))

    def _forget(self, held: _Held) -> None:
        held.is_done = True
        self._held -= 1
        _remove(self._received, held.received, held)
        if held.onward is not None:
            _remove(self._sent, held.onward, held)


class _Accepts:
    """What sockets accepted, held until the path that arrived there is complete."""

    def __init__(self, window_ns: int, room: int) -> None:
        self.pushed_out = 0
        self._window_ns = window_ns
        self._room = room
        self._numbers = count()
        self._held: dict[_Key, list[SeenAccept]] = {}
        self._queue: list[tuple[int, int, SeenAccept]] = []

    def add(self, seen: SeenAccept) -> None:
        peer = seen.accept.peer.numbers
        held = self._held.setdefault(peer, [])
        # Each tracer on a machine sees every socket there.
        if any(_is_same_accept(seen, other) for other in held):
            return
        if len(self._queue) >= self._room:
            self.pushed_out += self._drop(heapq.heappop(self._queue)[2])
            held = self._held.setdefault(peer, [])
        held.append(seen)
        self._wait(seen, seen.time_ns + 2 * self._window_ns)

    def take(self, ends: list[Leg]) -> list[SeenAccept | None]:
        """Return for each path's last leg what its backend accepted; each accept is used once."""
        pairs = []
        for i, leg in enumerate(ends):
            peer = leg.reply.inverted.numbers if leg.reply is not None else None
            for seen in self._held.get(peer, ()) if peer is not None else ():
                apart_ns = abs(seen.time_ns - leg.time_ns)
                if apart_ns <= self._window_ns:
                    pairs.append((apart_ns, seen.time_ns, i, seen))
        found: list[SeenAccept | None] = [None] * len(ends)
        for _, _, i, seen in sorted(pairs, key=lambda pair: pair[:3]):
            if found[i] is None and self._drop(seen):
                found[i] = seen
        return found

    def forget(self, before_ns: int, sent: dict[_Key, list[_Held]]) -> None:
        """Forget accepts that no path can need any more; ``sent`` holds the legs that wait."""
        while self._queue and self._queue[0][0] < before_ns:
            due_ns, _, seen = heapq.heappop(self._queue)
            peer = seen.accept.peer.numbers
            if peer in sent and seen in self._held.get(peer, ()):
                self._wait(seen, max(due_ns, before_ns) + self._window_ns)
            else:
                self._drop(seen)

    def clear(self) -> None:
        """Forget all accepts."""
        self._held.clear()
        self._queue.clear()

    def _wait(self, seen: SeenAccept, due_ns: int) -> None:
        heapq.heappush(self._queue, (due_ns, next(self._numbers), seen))

    def _drop(self, seen: SeenAccept) -> bool:
        """Remove an accept; return whether it was still there."""
        peer = seen.accept.peer.numbers
        if seen not in self._held.get(peer, ()):
            return False
        _remove(self._held, peer, seen)
        return True


def _onward(leg: Leg) -> _Key | None:
    """Return the tuple that a leg sent on; None if none is known."""
    return leg.reply.inverted.numbers if leg.reply is not None and leg.drop is None else None


def _is_twin(held: _Held, leg: Leg, teller: int) -> bool:
    known = held.leg
    return (
        held.teller != teller
        and held.place == (leg.node, leg.netns)
        and known.zone == leg.zone
        and abs(known.time_ns - leg.time_ns) <= TWICE_NS
        and known.reply == leg.reply
        and (known.drop is None) == (leg.drop is None)
    )


def _is_same_accept(one: SeenAccept, two: SeenAccept) -> bool:
    return one.accept.netns == two.accept.netns and abs(one.time_ns - two.time_ns) <= TWICE_NS


def _apart(one: _Held, two: _Held) -> int:
    return abs(two.leg.time_ns - one.leg.time_ns)


def _would_return(one: _Held, two: _Held) -> bool:
    """Whether a path would cross a namespace twice if these two were joined."""
    crossed = set()
    first: _Held | None = one
    while first is not None:
        crossed.add(first.place)
        first = first.before
    return any(each.place in crossed for each in _chain(two))


def _chain(first: _Held) -> Iterator[_Held]:
    each: _Held | None = first
    while each is not None:
        yield each
        each = each.after


def _remove(table: dict[_Key, list[_V]], key: _Key, value: _V) -> None:
    held = table[key]
    held.remove(value)
    if not held:
        del table[key]
