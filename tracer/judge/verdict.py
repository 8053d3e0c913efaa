"""
The verdict on the source of a connection, as far as its tuples alone can tell.

What a Service, its policy and the rules add to that is not judged yet; every judgement says so in
its evidence.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from tracer.judge.place import drop_hook
from tracer.model import Accept, Connection, Drop, FiveTuple, Hook, IPAddress, Status


class Verdict(StrEnum):
    """What became of the client's address."""

    PRESERVED = "preserved"
    REPLACED = "replaced"
    DROPPED = "dropped"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedConnection:
    """A connection and what became of its source on this node. ``time_ns`` is Unix time."""

    connection: Connection
    time_ns: int
    node: str
    verdict: Verdict
    evidence: tuple[str, ...]

    @property
    def seen_source(self) -> IPAddress:
        """The source address that the next host sees."""
        return self.connection.seen_source


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedDrop:
    """
    A discarded packet.

    ``reason`` is the kernel's name for why, ``place`` the function that gave the packet up,
    ``hook`` the netfilter hook it was at; the latter are None where they cannot be told.
    """

    drop: Drop
    time_ns: int
    node: str
    reason: str
    place: str | None
    hook: Hook | None
    evidence: tuple[str, ...]
    verdict: Verdict = Verdict.DROPPED

    @property
    def flow(self) -> FiveTuple | None:
        """What the client sent: the conntrack entry's original tuple, else the packet's own."""
        return self.drop.orig or self.drop.packet


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenAccept:
    """A connection that a listening socket accepted, at a Unix time."""

    accept: Accept
    time_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a run saw, and what it could not."""

    connections: int
    drops: int
    lost: Mapping[str, int]
    not_seen: tuple[str, ...]

    @property
    def is_complete(self) -> bool:
        """Whether nothing was lost on the way."""
        return not any(self.lost.values())


Judged = JudgedConnection | JudgedDrop | SeenAccept

_TUPLES_ALONE = "judged from this node's tuples alone: Services and other nodes are not considered"


def judge_connection(connection: Connection, *, time_ns: int, node: str) -> JudgedConnection:
    """
    Judge one conntrack entry by comparing its two tuples.

    Args:
        connection: The entry.
        time_ns: When it was made, in Unix time.
        node: The node whose conntrack holds it.
    """
    verdict = Verdict.REPLACED if connection.is_snat else Verdict.PRESERVED
    if _contradicts_status(connection):
        verdict = Verdict.UNKNOWN
    return JudgedConnection(
        connection=connection,
        time_ns=time_ns,
        node=node,
        verdict=verdict,
        evidence=_evidence(connection),
    )


def judge_drop(
    drop: Drop,
    *,
    time_ns: int,
    node: str,
    reason: str,
    place: str | None,
    dst_input: str | None,
) -> JudgedDrop:
    """
    Judge one discarded packet.

    Args:
        drop: The packet.
        time_ns: When it was discarded, in Unix time.
        node: The node that discarded it.
        reason: The kernel's name for ``drop.reason``, without ``SKB_DROP_REASON_``.
        place: The function at ``drop.location``.
        dst_input: The function at ``drop.dst_input``.
    """
    hook = drop_hook(drop, dst_input) if reason == "NETFILTER_DROP" else None
    evidence = [f"the kernel discarded the packet: {reason}" + (f" in {place}" if place else "")]
    if hook is not None:
        evidence.append(f"its route and interface say it was at netfilter's {hook.label} hook")
    if drop.orig is None:
        evidence.append("the packet had no conntrack entry")
    return JudgedDrop(
        drop=drop,
        time_ns=time_ns,
        node=node,
        reason=reason,
        place=place,
        hook=hook,
        evidence=(*evidence, _TUPLES_ALONE),
    )


def _contradicts_status(connection: Connection) -> bool:
    """Whether conntrack says that it did SNAT, or did none, against its own tuples."""
    # SRC_NAT is also set where only the source port was changed, so its presence proves nothing.
    return connection.is_snat and not connection.status & Status.SRC_NAT


def _evidence(connection: Connection) -> tuple[str, ...]:
    orig, reply = connection.orig, connection.reply
    lines = []
    if connection.is_snat:
        lines.append(f"the backend answers to {reply.dst}, not to the client {orig.src}: SNAT")
    else:
        lines.append(f"the backend answers to the client's own address {orig.src}: no SNAT")
    if connection.is_dnat:
        lines.append(f"addressed to {orig.dst}, answered by {reply.src}: DNAT")
    if _contradicts_status(connection):
        lines.append(f"conntrack's status {connection.status:#x} says it did no SNAT")
    if connection.mark:
        lines.append(f"the packet carried mark {connection.mark:#x} before SNAT")
    if connection.hook is Hook.CONNTRACK:
        lines.append("read from conntrack: nobody saw the packet, so its mark is not known")
    elif connection.mark is None:
        lines.append("the packet's mark before SNAT was not caught")
    return (*lines, _TUPLES_ALONE)
