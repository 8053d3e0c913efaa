"""The whole path of a connection: its nodes, the packets that crossed each, and their hops."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from tracer.cluster.match import PodRef
from tracer.judge.cause import Cause
from tracer.judge.verdict import JudgedConnection, JudgedDrop, Opinion, SeenAccept, Verdict
from tracer.model import FiveTuple, Hop, IPAddress


class Direction(StrEnum):
    """Which way a packet goes, in conntrack's terms."""

    ORIGINAL = "original"
    REPLY = "reply"


class Ending(StrEnum):
    """What became of a packet on one node."""

    SENT = "sent"  # it left by an interface
    DELIVERED = "delivered"  # it went to a socket of this network namespace
    DROPPED = "dropped"
    UNKNOWN = "unknown"  # it was not seen


class Translated(StrEnum):
    """What replaced an address between two hops of a packet."""

    DNAT = "dnat"
    SNAT = "snat"
    UNDO_DNAT = "un-dnat"  # a reply's source becomes what the client addressed again
    UNDO_SNAT = "un-snat"  # a reply's destination becomes the client again
    OTHER = "changed"  # not netfilter: an eBPF datapath, IPVS in direct mode, OVS


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """
    An interface of a node.

    ``kind`` is the kernel's name for its type (``veth``, ``bridge``, ``vxlan``), None for hardware
    and where it is not known; ``pod`` is the pod at its other end.
    """

    name: str
    kind: str | None = None
    pod: PodRef | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """
    An address and port that were replaced since the previous hop. ICMP has no port: None.

    ``DNAT`` and ``UNDO_SNAT`` change the packet's destination, ``SNAT`` and ``UNDO_DNAT`` its
    source; ``OTHER`` changes either, as ``is_source`` tells.
    """

    by: Translated
    is_source: bool
    before: tuple[IPAddress, int | None]
    after: tuple[IPAddress, int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PathHop:
    """One hop of a packet at a Unix time, and what happened to its addresses before it."""

    hop: Hop
    time_ns: int
    device: Device | None = None
    translations: tuple[Translation, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A packet's way through one node. ``number`` counts the packets of a direction, from 1."""

    direction: Direction
    number: int
    hops: tuple[PathHop, ...]
    ending: Ending
    drop: JudgedDrop | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """
    What one node (one network namespace) knows of a connection.

    ``orig`` is what it received, ``reply`` the reply that it expects, None if the packet never got
    that far. ``judged`` is its conntrack entry, None if the packet was dropped earlier or no entry
    was reported, ``zone`` the entry's. ``passages`` are the watched packets in order of time, empty
    if only the entry is known. ``drop`` is where the connection's first packet was dropped, if that
    was here.
    """

    node: str
    netns: int
    time_ns: int
    orig: FiveTuple
    reply: FiveTuple | None
    judged: JudgedConnection | None = None
    passages: tuple[Passage, ...] = ()
    drop: JudgedDrop | None = None
    zone: int = 0

    @property
    def opinion(self) -> Opinion | None:
        """This node's opinion on the source; that on the drop, if the packet was dropped here."""
        told = self.drop or self.judged
        return None if told is None else told.opinion

    @property
    def verdict(self) -> Verdict:
        """This node's verdict on the source."""
        opinion = self.opinion
        return Verdict.UNKNOWN if opinion is None else opinion.verdict

    def passage(self, direction: Direction, number: int = 1) -> Passage | None:
        """Return a packet of a direction as it was seen here, by default the first."""
        for each in self.passages:
            if each.direction is direction and each.number == number:
                return each
        return None


# The leg that decides for the whole path. A node that only saw another node's address knows less
# than the node that replaced it.
_DECIDING = (Verdict.DROPPED, Verdict.REPLACED, Verdict.PROXIED, Verdict.UNKNOWN)
_RANKS = {verdict: rank for rank, verdict in enumerate(_DECIDING)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """
    A connection from its client to where it ends, over all nodes that reported it.

    ``legs`` are in the order of the original direction, at least one. ``accept`` is what the
    backend's socket accepted, where that was seen. ``missing`` says what is not known of the path,
    one string per line.
    """

    legs: tuple[Leg, ...]
    accept: SeenAccept | None = None
    missing: tuple[str, ...] = ()

    @property
    def orig(self) -> FiveTuple:
        """What the client sent, as the first known node received it."""
        return self.legs[0].orig

    @property
    def time_ns(self) -> int:
        """When the first known node saw it, in Unix time."""
        return self.legs[0].time_ns

    @property
    def drop(self) -> JudgedDrop | None:
        """The drop that ended it, None if it arrived."""
        return self.legs[-1].drop

    @property
    def seen_source(self) -> IPAddress | None:
        """The address that the backend sees; None if nothing arrives."""
        reply = self.legs[-1].reply
        return None if self.drop is not None or reply is None else reply.dst

    @property
    def backend(self) -> FiveTuple | None:
        """What arrives at the backend; None if nothing does."""
        reply = self.legs[-1].reply
        return None if self.drop is not None or reply is None else reply.inverted

    @property
    def deciding(self) -> Leg:
        """The leg whose verdict counts for the whole path."""
        return min(self.legs, key=lambda leg: _RANKS.get(leg.verdict, len(_RANKS)))

    @property
    def verdict(self) -> Verdict:
        """The verdict over the whole path: replaced if one node replaced the source."""
        return self.deciding.verdict

    @property
    def cause(self) -> Cause | None:
        """The cause, by the leg that decides."""
        opinion = self.deciding.opinion
        return opinion.cause if opinion else None

    def packets(self, direction: Direction) -> int:
        """Return how many packets of a direction were watched on the node that saw the most."""
        numbers = (
            each.number for leg in self.legs for each in leg.passages if each.direction is direction
        )
        return max(numbers, default=0)

    def hops(self, direction: Direction, number: int = 1) -> Iterator[tuple[Leg, PathHop]]:
        """Yield the hops of a packet of a direction, node by node as it crosses them."""
        legs = self.legs if direction is Direction.ORIGINAL else self.legs[::-1]
        for leg in legs:
            passage = leg.passage(direction, number)
            for hop in passage.hops if passage else ():
                yield leg, hop
