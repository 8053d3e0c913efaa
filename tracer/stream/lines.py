"""Parse the lines of docs/json.md: the inverse of `exporters.jsonl`, for what lines hold."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any

from tracer.cluster.match import PodRef, Via
from tracer.cluster.objects import Policy
from tracer.judge.cause import Cause
from tracer.judge.verdict import (
    Judged,
    JudgedConnection,
    JudgedDrop,
    Opinion,
    SeenAccept,
    ServiceRef,
    Verdict,
)
from tracer.model import (
    PROTOCOLS,
    TCP,
    Accept,
    ClientClass,
    Connection,
    Drop,
    FiveTuple,
    Hook,
    Status,
)
from tracer.ruleset.rule import Action, Owner, Rule
from tracer.stream.errors import StreamError

_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.(\d{9})Z", re.ASCII)
_HOOKS = {hook.label: hook for hook in Hook}
# What the readers below raise for a malformed line.
_WRONG = (AttributeError, KeyError, OverflowError, TypeError, ValueError)

Json = Mapping[str, Any]


def judged_of(line: Json) -> Judged:
    """
    Return what a line holds.

    What lines leave out is 0: the entry's mark, interfaces, the kernel's own numbers.

    Raises:
        StreamError: If it is not a line of a connection, drop or accept.
    """
    try:
        match line["kind"]:
            case "connection":
                return _connection(line)
            case "drop":
                return _drop(line)
            case "accept":
                return _accept(line)
    except _WRONG as error:
        raise StreamError(f"the agent sent a malformed line: {error!r:.80}") from None
    raise StreamError(f"the agent sent a line of unknown kind {line['kind']!r:.30}")


def _connection(line: Json) -> JudgedConnection:
    proto = _proto(line["proto"])
    mark = line.get("mark")
    return JudgedConnection(
        connection=Connection(
            ktime_ns=0,
            netns=int(line["netns"]),
            hook=_HOOKS[line["at"]["hook"]],
            orig=_tuple(line["orig"], proto),
            reply=_tuple(line["reply"], proto),
            status=Status(int(line["status"])),
            zone=int(line["zone"]),
            mark=None if mark is None else int(mark),
            ct_mark=0,
            iif=0,
            oif=0,
            is_related=False,
        ),
        time_ns=_time_ns(line["time"]),
        node=_text(line["node"]),
        opinion=_opinion(line),
        backend_pod=_pod(line["backend"]),
    )


def _drop(line: Json) -> JudgedDrop:
    at = line["at"]
    return JudgedDrop(
        drop=Drop(
            ktime_ns=0,
            netns=int(line["netns"]),
            # A line has one protocol: for an ICMP error the packet's own, without the flow that it
            # is about.
            packet=_tuple(line["packet"], _proto(line["proto"])) if "packet" in line else None,
            orig=_tuple(line["orig"], _proto(line["proto"])) if "orig" in line else None,
            is_reply={"original": False, "reply": True}[line["direction"]],
            is_new=False,
            reason=0,
            location=0,
            dst_input=None,
            mark=0,
            ifindex=0,
            iif=0,
            dst_ifindex=0,
        ),
        time_ns=_time_ns(line["time"]),
        node=_text(line["node"]),
        reason=_text(line["reason"]),
        place=_text(at["function"]) if "function" in at else None,
        hook=_HOOKS[at["hook"]] if "hook" in at else None,
        opinion=_opinion(line),
    )


def _accept(line: Json) -> SeenAccept:
    peer, local = line["peer"], line["local"]
    return SeenAccept(
        accept=Accept(
            ktime_ns=0,
            netns=int(line["netns"]),
            peer=FiveTuple(
                src=ip_address(_text(peer["address"])),
                sport=int(peer["port"]),
                dst=ip_address(_text(local["address"])),
                dport=int(local["port"]),
                proto=TCP,
            ),
        ),
        time_ns=_time_ns(line["time"]),
    )


def _opinion(line: Json) -> Opinion:
    client_class = line.get("client", {}).get("class")
    return Opinion(
        verdict=Verdict(line["verdict"]),
        cause=Cause(line["cause"]) if "cause" in line else None,
        service=_service(line["service"]) if "service" in line else None,
        client_class=ClientClass[client_class.upper()] if client_class else None,
        rule=_rule(line["rule"]) if "rule" in line else None,
        evidence=tuple(map(_text, line["evidence"])),
        advice=tuple(map(_text, line["advice"])),
    )


def _service(value: Json) -> ServiceRef:
    return ServiceRef(
        namespace=_text(value["namespace"]),
        name=_text(value["name"]),
        port=_text(value["port"]) if "port" in value else None,
        via=Via(value["via"]),
        policy=Policy(value["policy"]) if "policy" in value else None,
    )


def _rule(value: Json) -> Rule:
    # Lines say neither which tool read a rule nor what the rule does.
    return Rule(
        family="both",
        table=_text(value["table"]),
        chain=_text(value["chain"]),
        text=_text(value["text"]),
        owner=Owner(value["owner"]),
        action=Action.UNKNOWN,
        tool="nftables",
    )


def _pod(backend: Json) -> PodRef | None:
    if "pod" not in backend:
        return None
    namespace, _, name = _text(backend["pod"]).partition("/")
    return PodRef(namespace, name, _text(backend["node"]) if "node" in backend else None)


def _tuple(value: Json, proto: int) -> FiveTuple:
    ends = {"src": ip_address(_text(value["src"])), "dst": ip_address(_text(value["dst"]))}
    if "id" in value:
        sport, dport = int(value["id"]), int(value["type"]) << 8 | int(value["code"])
    else:
        sport, dport = int(value["sport"]), int(value["dport"])
    return FiveTuple(**ends, sport=sport, dport=dport, proto=proto)


def _proto(name: object) -> int:
    text = _text(name)
    return PROTOCOLS[text] if text in PROTOCOLS else int(text)


def _time_ns(value: object) -> int:
    found = _TIME.fullmatch(_text(value))
    if found is None:
        raise ValueError(f"time {value!r:.40}")
    moment = datetime.fromisoformat(found[1]).replace(tzinfo=UTC)
    return int(moment.timestamp()) * 1_000_000_000 + int(found[2])


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is not a string")
    return value
