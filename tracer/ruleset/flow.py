"""What is known of a packet when it meets a rule."""

from dataclasses import dataclass
from typing import Literal

from tracer.model import Connection, Drop, Hook, IPAddress

CtState = Literal["new", "established", "related", "invalid", "untracked"]

_NEW: frozenset[CtState] = frozenset({"new"})
_RELATED: frozenset[CtState] = frozenset({"related"})
_ONGOING: frozenset[CtState] = frozenset({"new", "established", "related"})
_ANSWER: frozenset[CtState] = frozenset({"established", "related"})
NO_ENTRY: frozenset[CtState] = frozenset({"invalid", "untracked"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """
    A packet as the rules see it. None means "not known", an interface "" means "none".

    Args:
        src: The source before SNAT.
        dst: The destination after DNAT.
        sport: The source port before SNAT.
        dport: The destination port after DNAT.
        proto: The protocol number.
        orig_dst: The destination before DNAT.
        orig_dport: The destination port before DNAT.
        mark: The packet's mark before SNAT.
        ct_mark: The mark of its conntrack entry.
        iif: The incoming interface.
        oif: The outgoing interface.
        states: The conntrack states that it may be in.
        is_reply: Whether it goes in the reply direction.
        seen_source: The source after SNAT, if it is known.
        local_addresses: All addresses of the node; loopback addresses may be left out.
    """

    src: IPAddress
    dst: IPAddress
    sport: int
    dport: int
    proto: int
    orig_dst: IPAddress | None = None
    orig_dport: int | None = None
    mark: int | None = None
    ct_mark: int | None = None
    iif: str | None = None
    oif: str | None = None
    states: frozenset[CtState] = _NEW
    is_reply: bool = False
    seen_source: IPAddress | None = None
    local_addresses: frozenset[IPAddress] | None = None

    @classmethod
    def of(
        cls,
        connection: Connection,
        *,
        iif: str | None = None,
        oif: str | None = None,
        local_addresses: frozenset[IPAddress] | None = None,
    ) -> "Flow":
        """
        Return the first packet of a connection, as it was when SNAT was decided.

        Args:
            connection: The connection.
            iif: The name of the incoming interface, None if not known.
            oif: The name of the outgoing interface, None if not known.
            local_addresses: All addresses of the node, None if not known.
        """
        orig, reply = connection.orig, connection.reply
        was_seen = connection.hook is not Hook.CONNTRACK
        return cls(
            src=orig.src,
            dst=reply.src,
            sport=orig.sport,
            dport=reply.inverted.dport if reply.is_icmp else reply.sport,
            proto=orig.proto,
            orig_dst=orig.dst,
            orig_dport=orig.dport,
            mark=connection.mark,
            ct_mark=connection.ct_mark if was_seen else None,
            iif=_interface(iif, connection.iif, was_seen),
            oif=_interface(oif, connection.oif, was_seen),
            states=_RELATED if connection.is_related else _NEW,
            seen_source=connection.seen_source,
            local_addresses=local_addresses,
        )

    @classmethod
    def of_drop(
        cls,
        drop: Drop,
        *,
        is_new: bool | None = None,
        iif: str | None = None,
        oif: str | None = None,
        local_addresses: frozenset[IPAddress] | None = None,
    ) -> "Flow | None":
        """
        Return the packet of a drop, None if its addresses are not known.

        Args:
            drop: The drop.
            is_new: Whether the packet was the first of its connection, None if not known.
            iif: The name of the incoming interface, None if not known.
            oif: The name of the outgoing interface, None if not known.
            local_addresses: All addresses of the node, None if not known.
        """
        packet = drop.packet
        if packet is None:
            return None
        # Without a conntrack entry nothing was translated.
        orig = drop.orig or packet
        is_first_way = not drop.is_reply
        return cls(
            src=orig.src if is_first_way else packet.src,
            dst=packet.dst,
            sport=orig.sport if is_first_way else packet.sport,
            dport=packet.dport,
            proto=packet.proto,
            orig_dst=orig.dst if is_first_way else None,
            orig_dport=orig.dport if is_first_way else None,
            mark=drop.mark,
            iif=iif,
            oif=oif,
            states=_states(drop, is_new),
            is_reply=drop.is_reply,
            seen_source=packet.src,
            local_addresses=local_addresses,
        )

    @property
    def family(self) -> str:
        """``ipv4`` or ``ipv6``."""
        return f"ipv{self.src.version}"


def _interface(name: str | None, index: int, was_seen: bool) -> str | None:
    return "" if was_seen and index == 0 else name


def _states(drop: Drop, is_new: bool | None) -> frozenset[CtState]:
    if drop.is_reply:
        return _ANSWER
    if is_new:
        return _NEW
    if drop.orig is None:
        # At prerouting, before conntrack has seen it, rules on states cannot match either.
        return NO_ENTRY
    return _ONGOING if is_new is None else _ONGOING - _NEW
