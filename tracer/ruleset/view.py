"""What rules can see of a packet, and the sets of values that they compare with."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Generic, TypeVar

from tracer.model import SCTP, TCP, UDP, IPAddress
from tracer.ruleset.flow import NO_ENTRY, Flow
from tracer.ruleset.truth import Bits

T = TypeVar("T")
Value = int | str
Interval = tuple[Value, Value]

_DCCP, _UDPLITE = 33, 136
_WITH_PORTS = (TCP, UDP, SCTP, _DCCP, _UDPLITE)


class Field(StrEnum):
    """A field of a packet, or of what the kernel knows about it."""

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
    STATE = "state"


class Absent(Enum):
    """What a field has in place of a value."""

    UNKNOWN = "not known"
    MISSING = "the packet has no such field"


_OF_ENTRY = (Field.ORIG_SRC, Field.ORIG_DST, Field.ORIG_SPORT, Field.ORIG_DPORT)


@dataclass(frozen=True, slots=True)
class Key:
    """A field, and the IP version and protocol that a packet needs to have it."""

    field: Field
    version: int | None = None
    proto: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """
    A flow as the rules of one base chain see it.

    ``is_before_dnat`` and ``is_after_snat`` say which of its addresses the packet has there.
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
        """Return the source or destination that the packet has there, None if not known."""
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

    @property
    def has_entry(self) -> bool:
        """Whether the packet may have a conntrack entry."""
        return not self.flow.states <= NO_ENTRY

    def _value(self, which: Field) -> Value | None:
        flow = self.flow
        if which in _OF_ENTRY and not self.has_entry:
            return None
        match which:
            case Field.SRC | Field.DST:
                return _number(self.address(which))
            case Field.ORIG_SRC:
                return None if flow.is_reply else int(flow.src)
            case Field.ORIG_DST:
                return _number(flow.orig_dst)
            case Field.IIF | Field.OIF:
                return flow.iif if which is Field.IIF else flow.oif
            case Field.STATE:
                return next(iter(flow.states)) if len(flow.states) == 1 else None
            case Field.PROTO | Field.FAMILY:
                return flow.proto if which is Field.PROTO else flow.src.version
        # Without ports, rules on the transport header look at something else.
        return self._port(which) if flow.proto in _WITH_PORTS else None

    def _port(self, which: Field) -> int | None:
        flow = self.flow
        match which:
            case Field.SPORT:
                # SNAT may replace the port, too, and the new one is not kept.
                return None if self.is_after_snat else flow.sport
            case Field.DPORT:
                return flow.orig_dport if self.is_before_dnat else flow.dport
            case Field.ORIG_SPORT:
                return None if flow.is_reply else flow.sport
            case _:
                return flow.orig_dport


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
        Return the data of the elements that these values may match, and whether that is certain.

        If it is certain, at most one is returned, otherwise all that fit the known values.
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


def _number(address: IPAddress | None) -> int | None:
    return None if address is None else int(address)
