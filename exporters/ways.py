"""The hops of a path as rows: each direction, node by node, with times, tuples and endings."""

from collections.abc import Iterator
from dataclasses import dataclass

from exporters.path_words import drop_text, hop_text, packet_text
from exporters.sketch import place_text
from exporters.text import endpoint
from tracer.judge.path import (
    Device,
    Direction,
    Ending,
    Leg,
    Passage,
    Path,
    PathHop,
    Translated,
    Translation,
)
from tracer.model import Hook, Hop

_TC = (Hook.TC_INGRESS, Hook.TC_EGRESS)
# A packet crosses a node in about ten hops; only a crafted recording has many more.
_MOST_ROWS = 100
# Readable names for some of the kernel's: rtnl_link_ops.kind.
_KINDS = {"vxlan": "VXLAN tunnel", "geneve": "Geneve tunnel", "ipip": "IPIP tunnel"}
# How a reply reaches the client: over the wire, or as a process on the node itself.
_ARRIVES = {Ending.SENT: "left", Ending.DELIVERED: "was delivered"}
_TITLES = {
    Direction.ORIGINAL: "the client's first packet",
    Direction.REPLY: "the first reply packet",
}
_NAMES = {
    Translated.DNAT: "DNAT",
    Translated.SNAT: "SNAT",
    Translated.UNDO_DNAT: "DNAT undone",
    Translated.UNDO_SNAT: "SNAT undone",
    Translated.OTHER: "changed, not by netfilter",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HopRow:
    """
    One hop in words. ``at`` is the time since the first hop, ``changes`` what was translated
    before it, ``mark`` the packet's mark and its conntrack zone if they are not 0.
    """

    at: str
    place: str
    packet: str
    mark: str
    changes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """A packet's way through one node. ``ending`` says what became of it; ``notes`` adds to it."""

    node: str
    rows: tuple[HopRow, ...]
    ending: str
    is_dropped: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One direction: the nodes in the order in which its packets cross them, and the outcome."""

    direction: Direction
    crossings: tuple[Crossing, ...]
    outcome: str = ""

    @property
    def title(self) -> str:
        """Which packet it shows."""
        return _TITLES[self.direction]


def ways(path: Path) -> tuple[Way, ...]:
    """Return both directions; none if no packet was watched, and no reply to a dropped packet."""
    seen = {way for way in Direction if any(leg.passage(way) for leg in path.legs)}
    if not seen:
        return ()
    told = Direction if path.drop is None or Direction.REPLY in seen else (Direction.ORIGINAL,)
    return tuple(
        Way(
            direction=direction,
            crossings=tuple(_crossings(path, direction)) if direction in seen else (),
            outcome=_outcome(path, direction) if direction in seen else "no packet was seen",
        )
        for direction in told
    )


def _crossings(path: Path, direction: Direction) -> Iterator[Crossing]:
    legs = path.legs if direction is Direction.ORIGINAL else path.legs[::-1]
    start_ns, latest_ns = None, 0
    for leg in legs:
        passage = leg.passage(direction)
        if passage is None:
            yield Crossing(
                node=leg.node, rows=(), ending="no packet was seen here", is_dropped=False
            )
            continue
        notes: list[str] = []
        if passage.hops:
            first_ns = passage.hops[0].time_ns
            if start_ns is None:
                start_ns = first_ns
            elif first_ns < latest_ns:
                notes.append("its clock is behind: times here count from its own first hop")
                start_ns = first_ns
            latest_ns = max([latest_ns, *(hop.time_ns for hop in passage.hops)])
        if len(passage.hops) > _MOST_ROWS:
            notes.append(f"the first {_MOST_ROWS} of {len(passage.hops)} hops are shown")
        yield Crossing(
            node=leg.node,
            rows=tuple(_rows(passage, start_ns or 0)),
            ending=_ending(passage),
            is_dropped=passage.ending is Ending.DROPPED,
            notes=(*notes, *_later(leg, direction)),
        )


def _rows(passage: Passage, start_ns: int) -> Iterator[HopRow]:
    has_tc = any(hop.hop.hook in _TC for hop in passage.hops)
    for hop in passage.hops[:_MOST_ROWS]:
        yield HopRow(
            at=_since(hop.time_ns - start_ns),
            place=_place(hop, has_tc=has_tc),
            packet=hop_text(hop.hop),
            mark=_mark(hop.hop),
            changes=tuple(map(_change, hop.translations)),
        )


def _mark(hop: Hop) -> str:
    mark = f"mark {hop.mark:#x}" if hop.mark else ""
    return f"{mark}  zone {hop.zone}".strip() if hop.zone else mark


def _since(time_ns: int) -> str:
    """Return a time since the first hop, in the unit that gives few digits."""
    if time_ns < 10_000_000:
        return f"{time_ns / 1_000:+.1f} us"
    return f"{time_ns / 1_000_000:+.1f} ms"


def _place(hop: PathHop, *, has_tc: bool) -> str:
    place = place_text(hop)
    if hop.device is None:
        return place
    if hop.hop.hook in _TC:
        return f"{place}{_kind(hop.device)}"
    # If tc shows the interfaces, the hooks need not.
    return place if has_tc else f"{place} {hop.device.name}{_kind(hop.device)}"


def _kind(device: Device) -> str:
    words = []
    if device.kind is not None:
        words.append(_KINDS.get(device.kind, device.kind))
    if device.pod is not None:
        words.append(f"pod {device.pod.namespace}/{device.pod.name}")
    return f" ({', '.join(words)})" if words else ""


def _change(change: Translation) -> str:
    name = _NAMES[change.by]
    if change.by is Translated.OTHER:
        name = f"{'source' if change.is_source else 'destination'} {name}"
    return f"{name}: {endpoint(*change.before)} -> {endpoint(*change.after)}"


def _ending(passage: Passage) -> str:
    match passage.ending:
        case Ending.SENT:
            last = passage.hops[-1] if passage.hops else None
            is_told = last is not None and last.device is not None and last.hop.hook in _TC
            return (
                f"sent through {last.device.name}" if last and last.device and is_told else "sent"
            )
        case Ending.DELIVERED:
            return "delivered to a socket on this node"
        case Ending.DROPPED:
            return f"dropped: {drop_text(passage.drop)}" if passage.drop else "dropped"
    return "not known: it was not seen leaving"


def _later(leg: Leg, direction: Direction) -> Iterator[str]:
    """Yield what became of later packets, if they were dropped."""
    later = [each for each in leg.passages if each.direction is direction][1:]
    for each in later:
        if each.ending is Ending.DROPPED:
            yield f"packet {each.number} {_ending(each)}"


def _outcome(path: Path, direction: Direction) -> str:
    """Return whether the reply leaves the first node as the client expects it."""
    if direction is Direction.ORIGINAL:
        return ""
    first = path.legs[0].passage(Direction.REPLY)
    if first is None or not first.hops or first.ending not in _ARRIVES:
        return "it was not seen whether it reached the client"
    # Only the first fragment has ports.
    whole = [hop.hop.packet for hop in first.hops if not hop.hop.is_fragment]
    packet, typed = (whole or [first.hops[-1].hop.packet])[-1], path.orig.inverted
    it = f"it {_ARRIVES[first.ending]} as {packet_text(packet)}"
    if packet.is_icmp and not typed.is_icmp:
        return f"{it}: an ICMP error about the client's packet"
    if (packet.src, packet.dst) != (typed.src, typed.dst):
        return f"{it}: the client expects {packet_text(typed)}, and will ignore it"
    if not packet.is_icmp and (packet.sport, packet.dport) != (typed.sport, typed.dport):
        return f"{it}: its ports are not those that the client used"
    is_translated = any(
        leg.reply is not None and leg.reply != leg.orig.inverted for leg in path.legs
    )
    return f"{it}: {'translated back' if is_translated else 'not translated'}"
