"""
The ids of a connection's trace and of each node's span: computed, not random.

So nodes that know nothing of each other put their spans into one trace
(docs/decisions/0050-trace-ids-from-what-leaves-a-node.md).
"""

import hashlib
import struct
from ipaddress import IPv4Address

from tracer.judge.path import Leg, Path
from tracer.judge.verdict import Verdict
from tracer.model import ClientClass, FiveTuple, IPAddress

_TUPLE = struct.Struct("!16sH16sHB")


def trace_id(path: Path) -> int:
    """Return the trace id of a path: computed from what leaves its last known node."""
    return trace_id_of(_outgoing(path.legs[-1]))


def trace_id_of(outgoing: FiveTuple) -> int:
    """Return the trace id of all nodes that send a connection on as this tuple."""
    return int.from_bytes(_digest(b"srcip trace", outgoing)[:16]) or 1


def span_id(leg: Leg) -> int:
    """Return a node's span id. If the node translates, it follows from what it sends."""
    outgoing = _outgoing(leg)
    if outgoing != leg.orig:
        return _translator_span(outgoing)
    own = f"{leg.node}\0{leg.netns}".encode(errors="backslashreplace")
    return int.from_bytes(_digest(b"srcip node", outgoing, own)[:8]) or 1


def parent_id(path: Path, index: int) -> int | None:
    """Return the parent id of the span of the leg at an index, None if it is the trace's first."""
    if index:
        return span_id(path.legs[index - 1])
    first = path.legs[0]
    is_after_another = first.verdict is Verdict.REPLACED_UPSTREAM
    if is_after_another and _outgoing(first) == first.orig:
        return _translator_span(first.orig)
    return None


def link_ids(path: Path) -> tuple[int, int] | None:
    """
    Return trace and span id of the node before the first, if that node is in another trace.

    A node that translates what another node has already translated cannot know both: its trace is
    that of what it sends. The link leads to the trace of what it received.
    """
    first = path.legs[0]
    outgoing = _outgoing(first)
    opinion = first.opinion
    is_from_node = opinion is not None and opinion.client_class is ClientClass.NODE
    if outgoing == first.orig or not (is_from_node or first.verdict is Verdict.REPLACED_UPSTREAM):
        return None
    return trace_id_of(first.orig), _translator_span(first.orig)


def _outgoing(leg: Leg) -> FiveTuple:
    """Return what leaves a node; if nothing did, what it received."""
    return leg.orig if leg.reply is None else leg.reply.inverted


def _translator_span(outgoing: FiveTuple) -> int:
    return int.from_bytes(_digest(b"srcip translator", outgoing)[:8]) or 1


def _digest(use: bytes, flow: FiveTuple, own: bytes = b"") -> bytes:
    packed = _TUPLE.pack(_octets(flow.src), flow.sport, _octets(flow.dst), flow.dport, flow.proto)
    return hashlib.sha256(use + b"\0" + packed + own).digest()


def _octets(address: IPAddress) -> bytes:
    if isinstance(address, IPv4Address):
        return bytes(10) + b"\xff\xff" + address.packed
    return address.packed
