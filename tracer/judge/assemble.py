"""Assembles what one node reported of a connection into its leg of the path."""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from tracer.judge.path import (
    Device,
    Direction,
    Ending,
    Leg,
    Passage,
    PathHop,
    Translated,
    Translation,
)
from tracer.judge.verdict import JudgedConnection, JudgedDrop, SeenHop
from tracer.model import ICMPV6, FiveTuple, Hook, Hop, IPAddress

# A flow that keeps retransmitting is reported after this time.
LONGEST_NS = 5_000_000_000
# A first packet and its reply take milliseconds. An unanswered SYN is sent again only after a
# second (RFC 6298), and the retransmission tells nothing new.
QUIET_NS = 1_000_000_000
# From conntrack's last hook to a socket of the same host.
_TO_SOCKET_NS = 10_000_000
_OPEN, _DONE, _STRAYS = 16_384, 16_384, 16_384
# A packet crosses a node in about ten hops, and --packets bounds the packets of a direction. A
# recording may hold anything. Of a flood of drops the first few are enough.
_HOPS, _PACKETS, _DROPS = 256, 4096, 64

# A network namespace, a conntrack zone, and `FiveTuple.numbers`.
_Key = tuple[int, ...]
_K = TypeVar("_K")
_V = TypeVar("_V")


@dataclass(slots=True)
class _Open:
    """A leg that is not complete yet."""

    key: _Key
    node: str
    netns: int
    zone: int
    orig: FiveTuple
    last_ns: int
    first_ns: int
    judged: JudgedConnection | None = None
    # By packet, in order of arrival.
    packets: dict[int, list[SeenHop]] = field(default_factory=dict)
    drops: list[JudgedDrop] = field(default_factory=list)


class Assembler:
    """
    Assembles hops, connections and drops into legs.

    Feed it what the pipeline yields, in order of time. A leg is complete once it got nothing for
    `QUIET_NS`, or after `LONGEST_NS`. Later hops and drops are ignored: they are of packets sent
    again. Only a new conntrack entry with the same tuple begins another leg.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[_Key, _Open] = OrderedDict()
        self._done: OrderedDict[_Key, None] = OrderedDict()
        # Hops of packets whose connection is not known yet, and the connection of the others.
        self._strays: OrderedDict[int, list[SeenHop]] = OrderedDict()
        self._owners: OrderedDict[int, tuple[int, FiveTuple]] = OrderedDict()
        # The zone in which a tuple was last seen, if it is not 0.
        self._zones: OrderedDict[_Key, int] = OrderedDict()
        # A first packet on a finished tuple: a new leg if a new conntrack entry follows.
        self._again: OrderedDict[_Key, _Open] = OrderedDict()
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
        if hops and _is_on_its_way(hops):
            del former.packets[latest]
            first_ns, last_ns = hops[0].time_ns, hops[-1].time_ns
            about = former.node, former.netns, former.zone, former.orig
            new = _Open(key, *about, last_ns, first_ns)
            new.packets[latest] = hops
            self._open[key] = new
        self._pushed_out.append(_leg(former))

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
    ) -> _Open | None:
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
            leg = _Open(key, told.node, netns, zone, orig, told.time_ns, told.time_ns)
            table[key] = leg
        else:
            table.move_to_end(key)
            leg.last_ns = max(leg.last_ns, told.time_ns)
        return leg

    def _make_room(self, table: OrderedDict[_Key, _Open]) -> None:
        _, oldest = table.popitem(last=False)
        if table is self._open:
            self._pushed_out.append(self._close(oldest))
        self._cut_short += 1

    def _close(self, leg: _Open) -> Leg:
        _put(self._done, leg.key, None, _DONE)
        return _leg(leg)


def _key(netns: int, zone: int, flow: FiveTuple) -> _Key:
    return netns, zone, *flow.numbers


def _pop_whole(legs: OrderedDict[_Key, _Open], now_ns: int | None) -> list[_Open]:
    """Remove and return the legs that are complete at a time; all if it is None."""
    whole = [leg for leg in legs.values() if now_ns is None or _is_whole(leg, now_ns)]
    for leg in whole:
        del legs[leg.key]
    return whole


def _is_whole(leg: _Open, now_ns: int) -> bool:
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


def _leg(leg: _Open) -> Leg:
    if leg.judged is not None and not leg.packets and not leg.drops:
        return Leg(
            node=leg.node,
            netns=leg.netns,
            time_ns=leg.first_ns,
            orig=leg.orig,
            reply=leg.judged.connection.reply,
            judged=leg.judged,
            zone=leg.zone,
        )
    packets = _without_errors(_whole(leg.packets.values()), leg.orig)
    passages, left = [], list(leg.drops)
    numbers = dict.fromkeys(Direction, 0)
    for hops in packets:
        direction = _direction(hops)
        numbers[direction] += 1
        drop = next((each for each in left if _ends_in(hops, direction, each)), None)
        if drop is not None:
            left.remove(drop)
        passages.append(_passage(hops, direction, numbers[direction], drop))
    return Leg(
        node=leg.node,
        netns=leg.netns,
        time_ns=leg.first_ns,
        orig=leg.orig,
        reply=_reply(leg, packets),
        judged=leg.judged,
        passages=tuple(passages),
        drop=_drop(leg, passages),
        zone=leg.zone,
    )


def _whole(packets: Iterable[list[SeenHop]]) -> list[list[SeenHop]]:
    """
    Join the parts of a packet.

    A packet that waited for neighbour resolution leaves later, perhaps on another CPU, under a new
    packet id: its hop at tc egress continues the packet that ended before it. A fragmented packet
    leaves as its fragments.
    """
    whole: list[list[SeenHop]] = []
    fragments: list[list[SeenHop]] = []
    for hops in sorted(packets, key=lambda hops: hops[0].time_ns):
        first = hops[0].hop
        if all(seen.hop.is_fragment for seen in hops):
            fragments.append(hops)
            continue
        if first.hook is Hook.TC_EGRESS and first.orig is not None:
            before = next((each for each in reversed(whole) if _waits(each, hops[0])), None)
            if before is not None:
                before += hops
                continue
        whole.append(list(hops))
    for hops in fragments:
        packet = next((each for each in reversed(whole) if _is_cut_from(hops, each)), None)
        if packet is None:
            whole.append(hops)
        else:
            packet += hops
            packet.sort(key=lambda seen: seen.time_ns)
    return sorted(whole, key=lambda hops: hops[0].time_ns)


def _is_cut_from(fragment: list[SeenHop], hops: list[SeenHop]) -> bool:
    """Whether a fragment left as part of a packet; it may reuse the memory of one that came in."""
    sent = fragment[-1].hop
    return sent.hook is Hook.TC_EGRESS and any(
        seen.hop.hook is Hook.TC_EGRESS
        and not seen.hop.is_fragment
        and seen.time_ns <= fragment[-1].time_ns
        and (seen.hop.packet.src, seen.hop.packet.dst) == (sent.packet.src, sent.packet.dst)
        and seen.hop.is_reply == sent.is_reply
        for seen in hops
    )


def _without_errors(packets: list[list[SeenHop]], orig: FiveTuple) -> list[list[SeenHop]]:
    """
    Leave out ICMP errors about a connection, unless they are the only reply it got.

    A redirect comes beside the real reply; port unreachable, from a REJECT, is the reply.
    """
    own = [hops for hops in packets if hops[0].hop.packet.proto == orig.proto]
    has_answer = any(_direction(hops) is Direction.REPLY for hops in own)
    return own if has_answer or not own else packets


def _waits(hops: list[SeenHop], seen: SeenHop) -> bool:
    last = hops[-1].hop
    return (
        last.hook is Hook.NF_POSTROUTING
        and last.packet == seen.hop.packet
        and last.is_reply == seen.hop.is_reply
    )


def _direction(hops: list[SeenHop]) -> Direction:
    is_reply = any(seen.hop.is_reply for seen in hops)
    return Direction.REPLY if is_reply else Direction.ORIGINAL


def _ends_in(hops: list[SeenHop], direction: Direction, drop: JudgedDrop) -> bool:
    last = hops[-1]
    return (
        (direction is Direction.REPLY) == drop.drop.is_reply
        and last.hop.hook is not Hook.TC_EGRESS
        and last.time_ns <= drop.time_ns
        and drop.drop.packet in (None, last.hop.packet)
    )


def _passage(
    hops: list[SeenHop], direction: Direction, number: int, drop: JudgedDrop | None
) -> Passage:
    found = []
    before: SeenHop | None = None
    for seen in hops:
        found.append(
            PathHop(
                hop=seen.hop,
                time_ns=seen.time_ns,
                device=Device(name=seen.device, kind=seen.device_kind, pod=seen.pod)
                if seen.device
                else None,
                translations=_translations(before, seen, direction),
            )
        )
        before = seen
    return Passage(
        direction=direction,
        number=number,
        hops=tuple(found),
        ending=Ending.DROPPED if drop else _ending(hops),
        drop=drop,
    )


def _is_on_its_way(hops: list[SeenHop]) -> bool:
    last = hops[-1].hop
    return last.is_new and not last.is_reply and _ending(hops) is Ending.UNKNOWN


def _ending(hops: list[SeenHop]) -> Ending:
    last = hops[-1].hop
    if last.hook is Hook.TC_EGRESS:
        return Ending.SENT
    if last.hook is Hook.NF_INPUT and last.is_after_nat:
        return Ending.DELIVERED
    return Ending.UNKNOWN


def _translations(
    before: SeenHop | None, seen: SeenHop, direction: Direction
) -> tuple[Translation, ...]:
    if before is None:
        return ()
    was, now = before.hop.packet, seen.hop.packet
    # NAT acts between the two places of a hook; nothing else in netfilter changes a tuple.
    is_netfilter = bool(seen.hop.is_after_nat) and seen.hop.orig is not None
    is_netfilter = is_netfilter and seen.hop.hook is not Hook.NF_FORWARD
    has_ports = not (before.hop.is_fragment or seen.hop.is_fragment)
    found = []
    for is_source in (False, True):
        one = _end(was, is_source=is_source, has_ports=has_ports)
        other = _end(now, is_source=is_source, has_ports=has_ports)
        if one != other:
            is_nat = is_netfilter or _is_by_entry(seen.hop, was, is_source=is_source)
            by = _BY[direction is Direction.REPLY, is_source] if is_nat else Translated.OTHER
            found.append(Translation(by=by, is_source=is_source, before=one, after=other))
    return tuple(found)


def _is_by_entry(hop: Hop, was: FiveTuple, *, is_source: bool) -> bool:
    """Whether a conntrack entry explains a packet's change: a hop in between may be lost."""
    if hop.orig is None or hop.reply is None:
        return False
    told = (hop.orig, hop.reply.inverted)
    if hop.is_reply:
        told = (hop.reply, hop.orig.inverted)
    ends = [_end(flow, is_source=is_source, has_ports=True) for flow in (was, hop.packet)]
    return ends == [_end(flow, is_source=is_source, has_ports=True) for flow in told]


_BY = {
    (False, False): Translated.DNAT,
    (False, True): Translated.SNAT,
    (True, False): Translated.UNDO_SNAT,
    (True, True): Translated.UNDO_DNAT,
}


def _end(flow: FiveTuple, *, is_source: bool, has_ports: bool) -> tuple[IPAddress, int | None]:
    address, port = (flow.src, flow.sport) if is_source else (flow.dst, flow.dport)
    return address, port if has_ports and not flow.is_icmp else None


def _reply(leg: _Open, packets: list[list[SeenHop]]) -> FiveTuple | None:
    if leg.judged is not None:
        return leg.judged.connection.reply
    told = [seen.hop for hops in packets for seen in hops if seen.hop.reply is not None]
    if told and not leg.drops:
        return told[-1].reply
    if told or leg.drops:
        return None
    # It was not tracked: what was seen last is what was sent on.
    return packets[0][-1].hop.packet.inverted if packets else None


def _drop(leg: _Open, passages: list[Passage]) -> JudgedDrop | None:
    first = next((each for each in passages if each.direction is Direction.ORIGINAL), None)
    if first is not None:
        return first.drop
    lost = (each for each in leg.drops if not each.drop.is_reply)
    return next((each for each in lost if _is_of_first(each, leg.judged)), None)


def _is_of_first(drop: JudgedDrop, judged: JudgedConnection | None) -> bool:
    """
    Tell without hops whether a connection's first packet was dropped, or a later one.

    At the socket lookup the packet no longer has its entry, which would tell.
    """
    if judged is None or drop.drop.is_new:
        return True
    return drop.drop.orig is None and 0 <= drop.time_ns - judged.time_ns <= _TO_SOCKET_NS
