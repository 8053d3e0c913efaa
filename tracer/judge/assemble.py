"""Collects what one node reports of connections, and completes their legs."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import TypeVar

from tracer.judge.leg import Pieces, is_on_its_way, leg_of
from tracer.judge.path import Leg
from tracer.judge.verdict import JudgedConnection, JudgedDrop, SeenHop
from tracer.model import ICMPV6, FiveTuple

# A flow that keeps retransmitting is reported after this time.
LONGEST_NS = 5_000_000_000
# A first packet and its reply take milliseconds. An unanswered SYN is sent again only after a
# second (RFC 6298), and the retransmission tells nothing new.
QUIET_NS = 1_000_000_000
_OPEN, _DONE, _STRAYS = 16_384, 16_384, 16_384
# A packet crosses a node in about ten hops, and --packets bounds the packets of a direction. A
# recording may hold anything. Of a flood of drops the first few are enough.
_HOPS, _PACKETS, _DROPS = 256, 4096, 64

# A network namespace, a conntrack zone, and `FiveTuple.numbers`.
_Key = tuple[int, ...]
_K = TypeVar("_K")
_V = TypeVar("_V")


class Assembler:
    """
    Assembles hops, connections and drops into legs.

    Feed it what the pipeline yields, in order of time. A leg is complete once it got nothing for
    `QUIET_NS`, or after `LONGEST_NS`. Later hops and drops are ignored: they are of packets sent
    again. Only a new conntrack entry with the same tuple begins another leg.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[_Key, Pieces] = OrderedDict()
        self._done: OrderedDict[_Key, None] = OrderedDict()
        # Hops of packets whose connection is not known yet, and the connection of the others.
        self._strays: OrderedDict[int, list[SeenHop]] = OrderedDict()
        self._owners: OrderedDict[int, tuple[int, FiveTuple]] = OrderedDict()
        # The zone in which a tuple was last seen, if it is not 0.
        self._zones: OrderedDict[_Key, int] = OrderedDict()
        # A first packet on a finished tuple: a new leg if a new conntrack entry follows.
        self._again: OrderedDict[_Key, Pieces] = OrderedDict()
        self._pushed_out: list[Leg] = []
        self._cut_short = self._left_out = 0

    def add(self, judged: object) -> None:
        """Add one judged record; accepts belong to no node and are ignored."""
        match judged:
            case SeenHop():
                self._add_hop(judged)
            case JudgedConnection():
                connection = judged.connection
                self._begin_anew(_key(connection.netns, connection.zone, connection.orig))
                leg = self._leg(connection.netns, connection.zone, connection.orig, judged)
                if leg is not None:
                    leg.judged = judged
            case JudgedDrop() if judged.flow is not None:
                zone = judged.drop.zone if judged.flow == judged.drop.orig else None
                leg = self._leg(judged.drop.netns, zone, judged.flow, judged)
                if leg is not None and len(leg.drops) < _DROPS:
                    leg.drops.append(judged)

    def take(self, now_ns: int | None = None) -> list[Leg]:
        """Return the legs that are complete at a Unix time; all legs if it is None."""
        # First, so that packets dropped before they had an entry join the leg of their drop.
        self._adopt_strays(
            [
                packet_id
                for packet_id, hops in self._strays.items()
                if now_ns is None or now_ns - hops[-1].time_ns >= QUIET_NS
            ]
        )
        taken, self._pushed_out = self._pushed_out, []
        taken += map(self._close, _pop_whole(self._open, now_ns))
        # No entry came for these: they were no new connections.
        _pop_whole(self._again, now_ns)
        return taken

    def lost(self) -> dict[str, int]:
        """Count legs that were ended early for lack of room, and hops beyond the limits."""
        return {"legs_cut_short": self._cut_short, "hops_left_out": self._left_out}

    @property
    def open_since_ns(self) -> int | None:
        """When the oldest incomplete leg began, in Unix time; None if there is none."""
        return min((leg.first_ns for leg in self._open.values()), default=None)

    def _begin_anew(self, key: _Key) -> None:
        """Begin the leg of a new entry, with the hops that were set aside for it."""
        self._done.pop(key, None)
        self._end_former(key)
        again = self._again.pop(key, None)
        if again is not None:
            self._open.setdefault(key, again)

    def _end_former(self, key: _Key) -> None:
        """
        Close the leg of an older entry with the same tuple: its ports are reused.

        The packet that is crossing the node now created the new entry, and goes to the new leg.
        """
        former = self._open.get(key)
        if former is None or former.judged is None:
            return
        del self._open[key]
        latest = max(former.packets, key=lambda each: former.packets[each][-1].time_ns, default=0)
        hops = former.packets.get(latest, [])
        if hops and is_on_its_way(hops):
            del former.packets[latest]
            first_ns, last_ns = hops[0].time_ns, hops[-1].time_ns
            about = former.node, former.netns, former.zone, former.orig
            new = Pieces(key, *about, last_ns, first_ns)
            new.packets[latest] = hops
            self._open[key] = new
        self._pushed_out.append(leg_of(former))

    def _add_hop(self, seen: SeenHop) -> None:
        hop = seen.hop
        owner = self._owners.get(hop.packet_id)
        if owner is None and hop.orig is not None:
            owner = hop.zone, hop.orig
            _put(self._owners, hop.packet_id, owner, _STRAYS)
        if owner is None:
            # The packet has no entry yet, or never gets one.
            if hop.packet_id not in self._strays and len(self._strays) >= _STRAYS:
                self._adopt_strays([next(iter(self._strays))])
                self._cut_short += 1
            self._append(self._strays.setdefault(hop.packet_id, []), seen)
            return
        before = self._strays.pop(hop.packet_id, [])
        leg = self._leg(hop.netns, *owner, seen, is_first=hop.is_new and not hop.is_reply)
        if leg is None:
            return
        if hop.packet_id not in leg.packets and len(leg.packets) >= _PACKETS:
            self._left_out += 1
            return
        hops = leg.packets.setdefault(hop.packet_id, before)
        self._append(hops, seen)
        leg.first_ns = min(leg.first_ns, hops[0].time_ns)

    def _append(self, hops: list[SeenHop], seen: SeenHop) -> None:
        if len(hops) < _HOPS:
            hops.append(seen)
        else:
            self._left_out += 1

    def _adopt_strays(self, packet_ids: Iterable[int]) -> None:
        """Make legs of packets that never had a conntrack entry, by their own tuple."""
        for packet_id in packet_ids:
            hops = self._strays.pop(packet_id)
            first = hops[0]
            if _is_housekeeping(first.hop.packet):
                continue
            leg = self._leg(first.hop.netns, None, first.hop.packet, first)
            if leg is not None:
                leg.packets[packet_id] = hops
                leg.last_ns = max(leg.last_ns, hops[-1].time_ns)

    def _leg(
        self,
        netns: int,
        zone: int | None,
        orig: FiveTuple,
        told: JudgedConnection | JudgedDrop | SeenHop,
        *,
        is_first: bool = False,
    ) -> Pieces | None:
        """
        Return the leg of a tuple, None if it is finished.

        On a finished tuple a first packet may be of a new connection with the same ports: it is
        set aside. A packet without an entry is taken for one of the zone last seen.
        """
        if zone is None:
            zone = self._zones.get(_key(netns, 0, orig), 0)
        elif zone:
            _put(self._zones, _key(netns, 0, orig), zone, _OPEN)
        key = _key(netns, zone, orig)
        table = self._open
        if key in self._done:
            if not is_first and key not in self._again:
                return None
            table = self._again
        leg = table.get(key)
        if leg is None:
            if len(table) >= _OPEN:
                self._make_room(table)
            leg = Pieces(key, told.node, netns, zone, orig, told.time_ns, told.time_ns)
            table[key] = leg
        else:
            table.move_to_end(key)
            leg.last_ns = max(leg.last_ns, told.time_ns)
        return leg

    def _make_room(self, table: OrderedDict[_Key, Pieces]) -> None:
        _, oldest = table.popitem(last=False)
        if table is self._open:
            self._pushed_out.append(self._close(oldest))
        self._cut_short += 1

    def _close(self, leg: Pieces) -> Leg:
        _put(self._done, leg.key, None, _DONE)
        return leg_of(leg)


def _key(netns: int, zone: int, flow: FiveTuple) -> _Key:
    return netns, zone, *flow.numbers


def _pop_whole(legs: OrderedDict[_Key, Pieces], now_ns: int | None) -> list[Pieces]:
    """Remove and return the legs that are complete at a time; all if it is None."""
    whole = [leg for leg in legs.values() if now_ns is None or _is_whole(leg, now_ns)]
    for leg in whole:
        del legs[leg.key]
    return whole


def _is_whole(leg: Pieces, now_ns: int) -> bool:
    return now_ns - leg.last_ns >= QUIET_NS or now_ns - leg.first_ns >= LONGEST_NS


def _put(kept: OrderedDict[_K, _V], key: _K, value: _V, room: int) -> None:
    kept[key] = value
    if len(kept) > room:
        kept.popitem(last=False)


# Router and neighbour discovery, redirects (RFC 4861), and multicast listener reports (RFC 3810).
_NEIGHBOURS = {*range(133, 138), 143}


def _is_housekeeping(packet: FiveTuple) -> bool:
    """Whether conntrack skips the packet, and it is no connection in the usual sense."""
    is_neighbour = packet.proto == ICMPV6 and packet.dport >> 8 in _NEIGHBOURS
    return is_neighbour or packet.dst.is_multicast
