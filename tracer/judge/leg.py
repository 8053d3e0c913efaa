"""Builds a leg of a path from what one node reported of a connection."""

from collections.abc import Iterable
from dataclasses import dataclass, field

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
from tracer.model import FiveTuple, Hook, Hop, IPAddress

# From conntrack's last hook to a socket of the same host.
_TO_SOCKET_NS = 10_000_000


@dataclass(slots=True)
class Pieces:
    """What one node has reported of a connection so far; ``key`` is for the assembler."""

    key: tuple[int, ...]
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


def leg_of(pieces: Pieces) -> Leg:
    """Assemble a leg."""
    if pieces.judged is not None and not pieces.packets and not pieces.drops:
        return Leg(
            node=pieces.node,
            netns=pieces.netns,
            time_ns=pieces.first_ns,
            orig=pieces.orig,
            reply=pieces.judged.connection.reply,
            judged=pieces.judged,
            zone=pieces.zone,
        )
    packets = _without_errors(_whole(pieces.packets.values()), pieces.orig)
    passages, left = [], list(pieces.drops)
    numbers = dict.fromkeys(Direction, 0)
    for hops in packets:
        direction = _direction(hops)
        numbers[direction] += 1
        drop = next((each for each in left if _ends_in(hops, direction, each)), None)
        if drop is not None:
            left.remove(drop)
        passages.append(_passage(hops, direction, numbers[direction], drop))
    return Leg(
        node=pieces.node,
        netns=pieces.netns,
        time_ns=pieces.first_ns,
        orig=pieces.orig,
        reply=_reply(pieces, packets),
        judged=pieces.judged,
        passages=tuple(passages),
        drop=_drop(pieces, passages),
        zone=pieces.zone,
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


def is_on_its_way(hops: list[SeenHop]) -> bool:
    """Whether a first packet was seen that has neither arrived nor left yet."""
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


def _reply(pieces: Pieces, packets: list[list[SeenHop]]) -> FiveTuple | None:
    if pieces.judged is not None:
        return pieces.judged.connection.reply
    told = [seen.hop for hops in packets for seen in hops if seen.hop.reply is not None]
    if told and not pieces.drops:
        return told[-1].reply
    if told or pieces.drops:
        return None
    # It was not tracked: what was seen last is what was sent on.
    return packets[0][-1].hop.packet.inverted if packets else None


def _drop(pieces: Pieces, passages: list[Passage]) -> JudgedDrop | None:
    first = next((each for each in passages if each.direction is Direction.ORIGINAL), None)
    if first is not None:
        return first.drop
    lost = (each for each in pieces.drops if not each.drop.is_reply)
    return next((each for each in lost if _is_of_first(each, pieces.judged)), None)


def _is_of_first(drop: JudgedDrop, judged: JudgedConnection | None) -> bool:
    """
    Tell without hops whether a connection's first packet was dropped, or a later one.

    At the socket lookup the packet no longer has its entry, which would tell.
    """
    if judged is None or drop.drop.is_new:
        return True
    return drop.drop.orig is None and 0 <= drop.time_ns - judged.time_ns <= _TO_SOCKET_NS
