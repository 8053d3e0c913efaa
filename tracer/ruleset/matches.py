"""The conditions of rules, each of which holds, does not hold, or is unknown."""

from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from typing import Literal, Protocol, runtime_checkable

from tracer.model import IPAddress
from tracer.ruleset.flow import CtState
from tracer.ruleset.truth import Truth
from tracer.ruleset.view import Absent, Elements, Field, Key, View

_LOOPBACK = (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"))


@runtime_checkable
class Match(Protocol):
    """A condition of a rule."""

    @property
    def is_understood(self) -> bool:
        """Whether srcip knows what it checks."""

    def truth(self, view: View) -> Truth:
        """Whether it holds for a packet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Within:
    """Whether fields of the packet are among these elements, or are not."""

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
    Whether an interface has this name, or a name with this prefix.

    ``is_absent_sure`` is whether it is known what a negated match means if there is no interface:
    for iptables it holds, for nftables it depends on the kernel (nft_meta.c ends the rule there, or
    compares an empty name). At postrouting, Linux knows the incoming interface since 5.7
    (28f8bfd1ac94); the tracer's programs need a later kernel.
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
    """Whether ``mark & mask`` is one of these values, or is not."""

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
    """Whether the packet goes in the reply direction, or in the original one."""

    is_reply: bool
    is_understood: bool = True

    def truth(self, view: View) -> Truth:
        """Whether it holds. Without a conntrack entry, nftables and iptables differ."""
        if not view.has_entry:
            return Truth.MAYBE
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
class Hairpin:
    """
    Whether the packet goes from an endpoint in kube-proxy's set to that same endpoint.

    The elements of the set are not known, only that each has one address twice: as source and as
    destination of the packet (syncProxyRules in pkg/proxy/ipvs/proxier.go).
    """

    text: str
    is_negated: bool = False
    is_understood: bool = False

    def truth(self, view: View) -> Truth:
        """NO between two different addresses, otherwise MAYBE."""
        ends = view.address(Field.SRC), view.address(Field.DST)
        truth = Truth.MAYBE if None in ends or ends[0] == ends[1] else Truth.NO
        return truth.negated if self.is_negated else truth


@dataclass(frozen=True, slots=True, kw_only=True)
class NotUnderstood:
    """A condition that the parser does not understand, or that cannot be predicted."""

    text: str
    is_understood: bool = False

    def truth(self, view: View) -> Truth:  # noqa: ARG002 - every match is asked the same way
        """Always MAYBE."""
        return Truth.MAYBE


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
        # A connection is new until its first reply.
        return Truth.NO
    return Truth.MAYBE
