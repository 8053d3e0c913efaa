"""What was judged as JSON, one object a line: the contract of docs/json.md."""

import json
from datetime import UTC, datetime
from typing import Any

from tracer.judge.verdict import Judged, JudgedConnection, JudgedDrop, SeenAccept, Summary
from tracer.model import FiveTuple, protocol_name

VERSION = 1


def to_line(judged: Judged) -> str:
    """Return one judged thing as a line of JSON, without the line's end."""
    match judged:
        case JudgedConnection():
            return _line(connection_object(judged))
        case JudgedDrop():
            return _line(_drop(judged))
        case SeenAccept():
            return _line(_accept(judged))


def summary_to_line(summary: Summary) -> str:
    """Return the end of a run as a line of JSON."""
    return _line(
        {
            "kind": "summary",
            "version": VERSION,
            "connections": summary.connections,
            "drops": summary.drops,
            "lost": dict(summary.lost),
            "not_seen": list(summary.not_seen),
        }
    )


def connection_object(judged: JudgedConnection) -> dict[str, Any]:
    """Return a judged connection as the object that its line holds."""
    connection = judged.connection
    reply = connection.reply
    # What nobody knows is left out, never an empty value.
    known: dict[str, Any] = {}
    if connection.mark is not None:
        known["mark"] = connection.mark
    return {
        "kind": "connection",
        "version": VERSION,
        "time": timestamp(judged.time_ns),
        "node": judged.node,
        "netns": connection.netns,
        "family": connection.orig.family,
        "proto": protocol_name(connection.orig.proto),
        "orig": tuple_object(connection.orig),
        "reply": tuple_object(reply),
        "client": {"address": str(connection.orig.src)},
        "seen_source": str(judged.seen_source),
        "backend": _end(reply),
        "zone": connection.zone,
        "status": int(connection.status),
        **known,
        "verdict": str(judged.verdict),
        "at": {"node": judged.node, "hook": connection.hook.label},
        "evidence": list(judged.evidence),
    }


def tuple_object(flow: FiveTuple) -> dict[str, Any]:
    """Return a tuple as an object; ICMP has id, type and code in place of ports."""
    if flow.is_icmp:
        return {
            "src": str(flow.src),
            "dst": str(flow.dst),
            "id": flow.sport,
            "type": flow.dport >> 8,
            "code": flow.dport & 0xFF,
        }
    return {
        "src": str(flow.src),
        "sport": flow.sport,
        "dst": str(flow.dst),
        "dport": flow.dport,
    }


def timestamp(time_ns: int) -> str:
    """Return a Unix time as RFC 3339 with nanoseconds, in UTC."""
    seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{nanoseconds:09}Z"


def _drop(judged: JudgedDrop) -> dict[str, Any]:
    at = {"node": judged.node}
    if judged.hook is not None:
        at["hook"] = judged.hook.label
    if judged.place is not None:
        at["function"] = judged.place
    known: dict[str, Any] = {}
    if judged.flow is not None:
        known = {
            "family": judged.flow.family,
            "proto": protocol_name(judged.flow.proto),
            "orig": tuple_object(judged.flow),
        }
    if judged.drop.packet is not None:
        known["packet"] = tuple_object(judged.drop.packet)
    return {
        "kind": "drop",
        "version": VERSION,
        "time": timestamp(judged.time_ns),
        "node": judged.node,
        "netns": judged.drop.netns,
        **known,
        "direction": "reply" if judged.drop.is_reply else "original",
        "reason": judged.reason,
        "at": at,
        "verdict": str(judged.verdict),
        "evidence": list(judged.evidence),
    }


def _accept(judged: SeenAccept) -> dict[str, Any]:
    peer = judged.accept.peer
    return {
        "kind": "accept",
        "version": VERSION,
        "time": timestamp(judged.time_ns),
        "family": peer.family,
        "proto": protocol_name(peer.proto),
        "netns": judged.accept.netns,
        "peer": {"address": str(peer.src), "port": peer.sport},
        "local": {"address": str(peer.dst), "port": peer.dport},
    }


def _end(reply: FiveTuple) -> dict[str, Any]:
    if reply.is_icmp:
        return {"address": str(reply.src)}
    return {"address": str(reply.src), "port": reply.sport}


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=True)
