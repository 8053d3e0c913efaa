"""Judged records as JSON, one object per line: the contract of docs/json.md."""

import json
from datetime import UTC, datetime
from typing import Any

from exporters.word import word_object
from tracer.judge.path import Direction, Leg, Path, PathHop, Translation
from tracer.judge.verdict import (
    Judged,
    JudgedConnection,
    JudgedDrop,
    Opinion,
    SeenAccept,
    SeenHop,
    ServiceRef,
    Summary,
)
from tracer.model import (
    FiveTuple,
    Hook,
    Hop,
    IPAddress,
    protocol_name,
)
from tracer.ruleset.rule import Rule

VERSION = 1


def to_line(judged: Judged) -> str:
    """Return one judged record as a line of JSON, without the newline."""
    match judged:
        case JudgedConnection():
            return _line(connection_object(judged))
        case JudgedDrop():
            return _line(_drop(judged))
        case SeenAccept():
            return _line(_accept(judged))
        case SeenHop():
            return _line(_hop(judged))


def path_to_lines(path: Path) -> list[str]:
    """Return a path as lines of JSON: one for each watched packet."""
    told = [(way, n + 1) for way in Direction for n in range(path.packets(way))]
    # Without hops there is still one line, by the nodes' conntrack entries.
    return [_line(path_object(path, *each)) for each in told or [(Direction.ORIGINAL, 1)]]


def path_object(path: Path, direction: Direction, number: int = 1) -> dict[str, Any]:
    """Return a path and the hops of one packet of a direction as an object."""
    deciding = path.deciding
    opinion = deciding.opinion
    nodes = [_leg(leg, direction, number) for leg in path.legs]
    found: dict[str, Any] = {
        "kind": "path",
        "version": VERSION,
        "time": timestamp(path.time_ns),
        "direction": str(direction),
        "packet": number,
        "family": path.orig.family,
        "proto": protocol_name(path.orig.proto),
        "orig": nodes[0]["orig"],
    }
    last = path.legs[-1]
    if last.reply is not None:
        found["reply"] = nodes[-1]["reply"]
    if opinion is not None:
        found["client"] = _client(path.orig.src, opinion)
    if path.seen_source is not None:
        found["seen_source"] = str(path.seen_source)
    if last.judged is not None and path.drop is None:
        found["backend"] = _backend(last.judged)
    if opinion is not None:
        found |= _service(opinion)
    if deciding.judged is not None and deciding.judged.word is not None:
        found["proxy"] = word_object(deciding.judged.word)
    found["at"] = {"node": deciding.node}
    found["nodes"] = nodes
    found["hops"] = [_path_hop(leg, hop) for leg, hop in path.hops(direction, number)]
    if path.accept is not None:
        peer = path.accept.accept.peer
        found["accepted"] = {"address": str(peer.src), "port": peer.sport}
    if path.missing:
        found["missing"] = list(path.missing)
    return found | (_opinion(opinion) if opinion else {"verdict": str(path.verdict)})


def _leg(leg: Leg, direction: Direction, number: int) -> dict[str, Any]:
    found: dict[str, Any] = {"node": leg.node, "netns": leg.netns, "orig": tuple_object(leg.orig)}
    if leg.zone:
        found["zone"] = leg.zone
    if leg.reply is not None:
        found["reply"] = tuple_object(leg.reply)
    found["verdict"] = str(leg.verdict)
    if leg.opinion is not None and leg.opinion.cause is not None:
        found["cause"] = str(leg.opinion.cause)
    passage = leg.passage(direction, number)
    if passage is not None:
        found["ending"] = str(passage.ending)
    return found


def _path_hop(leg: Leg, path_hop: PathHop) -> dict[str, Any]:
    device = path_hop.device
    found = {"node": leg.node, **_place(path_hop.hop)}
    if device is not None:
        found["device"] = device.name
        if device.kind is not None:
            found["device_kind"] = device.kind
        if device.pod is not None:
            found["pod"] = f"{device.pod.namespace}/{device.pod.name}"
    found |= {"time": timestamp(path_hop.time_ns), **_packet(path_hop.hop)}
    if path_hop.translations:
        found["translations"] = [_translation(each) for each in path_hop.translations]
    return found


def _hop(seen: SeenHop) -> dict[str, Any]:
    found = {
        "kind": "hop",
        "version": VERSION,
        "time": timestamp(seen.time_ns),
        "node": seen.node,
        "netns": seen.hop.netns,
        **_place(seen.hop),
    }
    if seen.device is not None:
        found["device"] = seen.device
    if seen.device_kind is not None:
        found["device_kind"] = seen.device_kind
    return found | _packet(seen.hop)


def _place(hop: Hop) -> dict[str, Any]:
    if hop.is_after_nat is None or hop.hook is Hook.NF_FORWARD:
        return {"hook": hop.hook.label}
    return {"hook": hop.hook.label, "stage": "after-nat" if hop.is_after_nat else "before-nat"}


def _packet(hop: Hop) -> dict[str, Any]:
    packet = tuple_object(hop.packet)
    if hop.is_fragment:
        packet = {"src": packet["src"], "dst": packet["dst"], "fragment": True}
    zone = {"zone": hop.zone} if hop.zone else {}
    return {**packet, "mark": hop.mark, **zone, "length": hop.length}


def _translation(translation: Translation) -> dict[str, Any]:
    return {
        "by": str(translation.by),
        "of": "src" if translation.is_source else "dst",
        "before": _end(*translation.before),
        "after": _end(*translation.after),
    }


def _end(address: IPAddress, port: int | None) -> dict[str, Any]:
    return {"address": str(address)} | ({} if port is None else {"port": port})


def summary_to_line(summary: Summary) -> str:
    """Return the end of a run as a line of JSON."""
    found: dict[str, Any] = {
        "kind": "summary",
        "version": VERSION,
        "connections": summary.connections,
        "drops": summary.drops,
        "lost": dict(summary.lost),
        "not_seen": list(summary.not_seen),
    }
    if summary.notes:
        found["notes"] = list(summary.notes)
    if summary.clock_offsets_ns:
        offsets = summary.clock_offsets_ns.items()
        found["clock_offsets"] = {node: offset_ns / 1e9 for node, offset_ns in offsets}
    return _line(found)


def connection_object(judged: JudgedConnection) -> dict[str, Any]:
    """Return a judged connection as the object that its line holds."""
    connection = judged.connection
    # What is not known is left out, never empty.
    mark = {} if connection.mark is None else {"mark": connection.mark}
    return {
        "kind": "connection",
        "version": VERSION,
        "time": timestamp(judged.time_ns),
        "node": judged.node,
        "netns": connection.netns,
        "family": connection.orig.family,
        "proto": protocol_name(connection.orig.proto),
        "orig": tuple_object(connection.orig),
        "reply": tuple_object(connection.reply),
        "client": _client(connection.orig.src, judged.opinion),
        "seen_source": str(judged.seen_source),
        "backend": _backend(judged),
        **_service(judged.opinion),
        "zone": connection.zone,
        "status": int(connection.status),
        **mark,
        **({"proxy": word_object(judged.word)} if judged.word is not None else {}),
        "at": {"node": judged.node, "hook": connection.hook.label},
        **_opinion(judged.opinion),
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
            "client": _client(judged.flow.src, judged.opinion),
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
        **_service(judged.opinion),
        **_opinion(judged.opinion),
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


def _client(address: IPAddress, opinion: Opinion) -> dict[str, Any]:
    client = {"address": str(address)}
    if opinion.client_class is not None:
        client["class"] = opinion.client_class.name.lower()
    return client


def _backend(judged: JudgedConnection) -> dict[str, Any]:
    reply = judged.connection.reply
    backend: dict[str, Any] = {"address": str(reply.src)}
    if not reply.is_icmp:
        backend["port"] = reply.sport
    if judged.backend_pod is not None:
        backend["pod"] = f"{judged.backend_pod.namespace}/{judged.backend_pod.name}"
        if judged.backend_pod.node:
            backend["node"] = judged.backend_pod.node
    return backend


def _service(opinion: Opinion) -> dict[str, Any]:
    return {"service": service_object(opinion.service)} if opinion.service else {}


def service_object(service: ServiceRef) -> dict[str, Any]:
    """Return a Service as an object, without an unnamed port or a policy that does not apply."""
    found = {"namespace": service.namespace, "name": service.name, "via": str(service.via)}
    if service.port is not None:
        found["port"] = service.port
    if service.policy is not None:
        found["policy"] = str(service.policy)
    return found


def rule_object(rule: Rule) -> dict[str, Any]:
    """Return a rule and its owner as an object."""
    return {
        "owner": str(rule.owner),
        "table": rule.table,
        "chain": rule.chain,
        "text": rule.text,
    }


def _opinion(opinion: Opinion) -> dict[str, Any]:
    found: dict[str, Any] = {"verdict": str(opinion.verdict)}
    if opinion.cause is not None:
        found["cause"] = str(opinion.cause)
    if opinion.rule is not None:
        found["rule"] = rule_object(opinion.rule)
    return found | {"evidence": list(opinion.evidence), "advice": list(opinion.advice)}


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=True)
