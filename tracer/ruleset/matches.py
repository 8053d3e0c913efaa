"""The conditions of rules, each of which holds, does not hold, or cannot be told."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from ipaddress import IPv4Network, IPv6Network
from typing import Generic, Literal, Protocol, TypeVar, runtime_checkable

from tracer.model import SCTP, TCP, UDP, IPAddress
from tracer.ruleset.flow import CtState, Flow
from tracer.ruleset.truth import Bits, Truth

T = TypeVar("T")
Value = int | str
Interval = tuple[Value, Value]

_DCCP, _UDPLITE = 33, 136
_WITH_PORTS = (TCP, UDP, SCTP, _DCCP, _UDPLITE)
_LOOPBACK = (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"))


class Field(StrEnum):
    """A field of a packet, or of what the kernel knows of it."""

    SRC = "src"
    DST = "dst"
    ORIG_SRC = "orig_src"
    ORIG_DST = "orig_dst"
    SPORT = "sport"
    DPORT = "dport"
    ORIG_SPORT = "orig_sport"
    ORIG_DPORT = "orig_dport"
    PROTO = "proto"
    FAMILY = "family"
    IIF = "iif"
    OIF = "oif"


class Absent(Enum):
    """What a field has in place of a value."""

    UNKNOWN = "not known"
    MISSING = "the packet has no such field"


@dataclass(frozen=True, slots=True)
class Key:
    """A field, and what a packet must be to have it: an IP version, a protocol."""

    field: Field
    version: int | None = None
    proto: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """
    A flow as the rules of one base chain see it.

    ``is_before_dnat`` and ``is_after_snat`` say which of its addresses the packet bears there.
    """

    flow: Flow
    mark: Bits
    ct_mark: Bits
    is_before_dnat: bool = False
    is_after_snat: bool = False

    def value(self, key: Key) -> Value | Absent:
        """Return the value of a field."""
        flow = self.flow
        if key.version not in (None, flow.src.version) or key.proto not in (None, flow.proto):
            return Absent.MISSING
        value = self._value(key.field)
        return Absent.UNKNOWN if value is None else value

    def address(self, which: Field) -> IPAddress | None:
        """Return the source or destination that the packet bears, None if it is not known."""
        flow = self.flow
        if which is Field.SRC:
            return flow.seen_source if self.is_after_snat else flow.src
        return flow.orig_dst if self.is_before_dnat else flow.dst

    @property
    def is_dnat(self) -> bool | None:
        """Whether the destination has been translated, None if that is not known."""
        flow = self.flow
        if self.is_before_dnat:
            return False
        if flow.orig_dst is None or flow.orig_dport is None:
            return None
        return (flow.orig_dst, flow.orig_dport) != (flow.dst, flow.dport)

    def _value(self, which: Field) -> Value | None:
        flow = self.flow
        match which:
            case Field.SRC | Field.DST:
                return _number(self.address(which))
            case Field.ORIG_SRC:
                return None if flow.is_reply else int(flow.src)
            case Field.ORIG_DST:
                return _number(flow.orig_dst)
            case Field.IIF | Field.OIF:
                return flow.iif if which is Field.IIF else flow.oif
            case Field.PROTO | Field.FAMILY:
                return flow.proto if which is Field.PROTO else flow.src.version
        # Where there are no ports, rules on the transport header look at something else.
        return self._port(which) if flow.proto in _WITH_PORTS else None

    def _port(self, which: Field) -> int | None:
        flow = self.flow
        match which:
            case Field.SPORT:
                # SNAT may replace the port too, and the new one is not kept.
                return None if self.is_after_snat else flow.sport
            case Field.DPORT:
                return flow.orig_dport if self.is_before_dnat else flow.dport
            case Field.ORIG_SPORT:
                return None if flow.is_reply else flow.sport
            case _:
                return flow.orig_dport


@runtime_checkable
class Match(Protocol):
    """A condition of a rule."""

    @property
    def is_understood(self) -> bool:
        """Whether it is known what it asks."""

    def truth(self, view: View) -> Truth:
        """Whether it holds for a packet."""


class Elements(Generic[T]):
    """The elements of a set or map: tuples of values, or of ranges of values."""

    def __init__(self, elements: Iterable[tuple[tuple[Interval, ...], T]]) -> None:
        self._exact: dict[tuple[Value, ...], T] = {}
        self._ranges: list[tuple[tuple[Interval, ...], T]] = []
        for intervals, data in elements:
            if all(first == last for first, last in intervals):
                self._exact[tuple(first for first, _ in intervals)] = data
            else:
                self._ranges.append((intervals, data))

    def __iter__(self) -> Iterator[T]:
        yield from self._exact.values()
        yield from (data for _, data in self._ranges)

    def find(self, values: tuple[Value | Absent, ...]) -> tuple[list[T], bool]:
        """
        Return what these values may stand for, and whether that is sure.

        If it is sure there is one, or none. Otherwise there are those that the known values fit.
        """
        known = tuple(value for value in values if not isinstance(value, Absent))
        if len(known) == len(values):
            if known in self._exact:
                return [self._exact[known]], True
            hits = [data for intervals, data in self._ranges if _fits(values, intervals)]
            return hits, True
        hits = [
            data
            for exact, data in self._exact.items()
            if _fits(values, tuple((value, value) for value in exact))
        ]
        hits += [data for intervals, data in self._ranges if _fits(values, intervals)]
        return hits, not hits


def _fits(values: tuple[Value | Absent, ...], intervals: tuple[Interval, ...]) -> bool:
    return len(values) == len(intervals) and all(
        value is Absent.UNKNOWN or _is_between(value, interval)
        for value, interval in zip(values, intervals, strict=True)
    )


def _is_between(value: Value | Absent, interval: Interval) -> bool:
    first, last = interval
    if isinstance(value, int) and isinstance(first, int) and isinstance(last, int):
        return first <= value <= last
    return value == first == last


@dataclass(frozen=True, slots=True, kw_only=True)
class Within:
    """Whether fields of the packet are, or are not, among these elements."""

    keys: tuple[Key, ...]
    elements: Elements[None] = field(compare=False)
    is_negated: bool = False
    is_understood: bool = True

    def truth(self, view: View) -> Truth:
        """Whether it holds. A packet without the field never matches, negated or not."""
        values = tuple(view.value(key) for key in self.keys)
        if Absent.MISSING in values:
            return Truth.NO
        hits, is_sure = self.elements.find(values)
        truth = Truth.of(bool(hits)) if is_sure else Truth.MAYBE
        return truth.negated if self.is_negated else truth


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """
    Whether an interface has this name, or one that begins so.

    ``is_absent_sure`` says what a negated match means where there is no interface: iptables
    matches, nftables depends on the kernel (nft_meta.c took an absent one for no match until
    5.x, for an empty name since).
    """

    side: Literal[Field.IIF, Field.OIF]
    name: str
    is_prefix: bool = False
    is_negated: bool = False
    is_absent_sure: bool = True
    is_understood: bool = True

    def truth(self, view: View) -> Truth:
        """Whether it holds."""
        name = view.flow.iif if self.side is Field.IIF else view.flow.oif
        if name is None or (not name and self.is_negated and not self.is_absent_sure):
            return Truth.MAYBE
        is_same = name.startswith(self.name) if self.is_prefix else name == self.name
        return Truth.of((is_same and name != "") != self.is_negated)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Whether ``mark & mask`` is, or is not, one of these values."""

    values: tuple[int, ...]
    mask: int
    is_negated: bool = False
    is_of_connection: bool = False
    is_understood: bool = True

    def truth(self, view: View) -> Truth:
        """Whether it holds."""
        mark = view.ct_mark if self.is_of_connection else view.mark
        truth = max((mark.has(value, self.mask) for value in self.values), default=Truth.NO)
        return truth.negated if self.is_negated else truth


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Whether conntrack has the packet in one of these states, or its entry has a NAT bit set."""

    states: frozenset[CtState]
    has_dnat: bool = False
    has_snat: bool = False
    is_negated: bool = False
    is_understood: bool = True

    def truth(self, view: View) -> Truth:
        """Whether it holds."""
        possible = view.flow.states
        truth = Truth.MAYBE if possible & self.states else Truth.NO
        if possible <= self.states:
            truth = Truth.YES
        if self.has_dnat:
            truth = max(truth, Truth.of(view.is_dnat))
        if self.has_snat:
            truth = max(truth, _is_snat(view))
        return truth.negated if self.is_negated else truth


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Whether one of these bits of the conntrack entry is set, as ``ct status`` names them."""

    bits: frozenset[str]
    is_negated: bool = False
    is_understood: bool = True

    def truth(self, view: View) -> Truth:
        """Whether it holds."""
        truth = max((_bit(name, view) for name in self.bits), default=Truth.NO)
        return truth.negated if self.is_negated else truth


@dataclass(frozen=True, slots=True, kw_only=True)
class Direction:
    """Whether the packet goes in the direction of the answers, or not."""

    is_reply: bool
    is_understood: bool = True

    def truth(self, view: View) -> Truth:
        """Whether it holds."""
        return Truth.of(view.flow.is_reply == self.is_reply)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalAddress:
    """Whether the source or destination is one of the node's own addresses."""

    side: Literal[Field.SRC, Field.DST]
    is_negated: bool = False
    is_understood: bool = True

    def truth(self, view: View) -> Truth:
        """Whether it holds."""
        truth = _is_local(view.address(self.side), view.flow.local_addresses)
        return truth.negated if self.is_negated else truth


@dataclass(frozen=True, slots=True, kw_only=True)
class NotUnderstood:
    """A condition that the reader does not understand, or that nobody can foretell."""

    text: str
    is_understood: bool = False

    def truth(self, view: View) -> Truth:  # noqa: ARG002 - every match is asked the same way
        """It cannot be told."""
        return Truth.MAYBE


def _number(address: IPAddress | None) -> int | None:
    return None if address is None else int(address)


def _is_local(address: IPAddress | None, own: frozenset[IPAddress] | None) -> Truth:
    if address is None:
        return Truth.MAYBE
    if any(address in network for network in _LOOPBACK if network.version == address.version):
        return Truth.YES
    return Truth.of(None if own is None else address in own)


def _is_snat(view: View) -> Truth:
    if not view.is_after_snat and not view.flow.is_reply and view.flow.states <= {"new"}:
        return Truth.NO
    return Truth.MAYBE


def _bit(name: str, view: View) -> Truth:
    if name == "dnat":
        return Truth.of(view.is_dnat)
    if name == "snat":
        return _is_snat(view)
    if name in {"seen-reply", "assured"} and view.flow.states <= {"new"}:
        # A connection is new until its first answer.
        return Truth.NO
    return Truth.MAYBE
