"""A path in the terms of OpenTelemetry: names, attributes and events of its spans."""

from collections.abc import Iterator
from dataclasses import dataclass

from exporters.path_words import declared_word, drop_text
from exporters.terminal import printable
from exporters.text import declared_text, endpoint
from tracer.judge.path import Leg, Passage, Path, PathHop
from tracer.judge.verdict import Opinion, ServiceRef, Verdict
from tracer.model import FiveTuple, Hook, protocol_name

Value = str | int | bool | list[str]
Attributes = dict[str, Value]

# A rule's text is as long as its author likes.
_LONGEST = 2048
# The SDK's own limit (OTEL_SPAN_EVENT_COUNT_LIMIT); events beyond it are counted.
_MOST_EVENTS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanEvent:
    """A hop, or a drop, at a Unix time."""

    name: str
    time_ns: int
    attributes: Attributes


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpan:
    """The contents of a node's span. Times are Unix time; ``error`` says why nothing arrived."""

    node: str
    name: str
    start_ns: int
    end_ns: int
    attributes: Attributes
    events: tuple[SpanEvent, ...]
    error: str | None


def node_span(path: Path, leg: Leg) -> NodeSpan:
    """Return the contents of the span of one leg of a path."""
    events = sorted(_events(leg), key=lambda event: event.time_ns)
    left_out = max(0, len(events) - _MOST_EVENTS)
    attributes = _attributes(path, leg)
    if left_out:
        attributes["srcip.hops_left_out"] = left_out
    times = [_moment(leg.time_ns), *(event.time_ns for event in events)]
    return NodeSpan(
        node=_text(leg.node),
        name=_name(leg),
        start_ns=min(times),
        end_ns=max(times),
        attributes=attributes,
        events=tuple(events[:_MOST_EVENTS]),
        error=_text(drop_text(leg.drop)) if leg.drop else None,
    )


def _name(leg: Leg) -> str:
    """Name the span by its kind: back ends group spans by name, so there must be few."""
    service = leg.opinion.service if leg.opinion else None
    what = f"{service.namespace}/{service.name}" if service else protocol_name(leg.orig.proto)
    return _text(f"{leg.verdict} {what}")


def _attributes(path: Path, leg: Leg) -> Attributes:
    found: Attributes = {
        **_packet(leg.orig),
        "network.transport": protocol_name(leg.orig.proto),
        "network.type": leg.orig.family,
        "srcip.netns": leg.netns,
        "srcip.verdict": str(leg.verdict),
        "srcip.path.verdict": str(path.verdict),
    }
    found |= _client(path)
    if path.cause is not None:
        found["srcip.path.cause"] = str(path.cause)
    if leg.reply is not None:
        out = leg.reply.inverted
        found |= {f"srcip.out.{key}": value for key, value in _packet(out).items()}
    if path.seen_source is not None:
        found["srcip.seen_source"] = str(path.seen_source)
    if leg.opinion is not None:
        found |= _opinion(leg.opinion)
    if leg.judged is not None and leg.judged.backend_pod is not None and leg.drop is None:
        pod = leg.judged.backend_pod
        found["srcip.backend.pod"] = _text(f"{pod.namespace}/{pod.name}")
        if pod.node:
            found["srcip.backend.node"] = _text(pod.node)
    if path.accept is not None:
        peer = path.accept.accept.peer
        found["srcip.accepted"] = endpoint(peer.src, peer.sport)
    if path.missing:
        found["srcip.missing"] = [_text(line) for line in path.missing]
    return found


def _client(path: Path) -> Attributes:
    word = declared_word(path)
    found: Attributes = {}
    if word is not None and word.clients:
        found["srcip.declared"] = [_text(declared_text(client)) for client in word.clients]
        found["srcip.declared.headers"] = [header.label for header in word.headers]
        found["srcip.declared.trusted"] = word.is_trusted
    named = word.client if word is not None and word.is_proxied else None
    if named is not None and named.address is not None:
        return found | _end(str(named.address), named.port)
    # Behind another node or a proxy the client is a different address.
    if path.verdict in (Verdict.REPLACED_UPSTREAM, Verdict.PROXIED):
        return found
    return found | _end(str(path.orig.src), None if path.orig.is_icmp else path.orig.sport)


def _end(address: str, port: int | None) -> Attributes:
    found: Attributes = {"client.address": address}
    if port is not None:
        found["client.port"] = port
    return found


def _opinion(opinion: Opinion) -> Attributes:
    found: Attributes = {}
    if opinion.cause is not None:
        found["srcip.cause"] = str(opinion.cause)
    if opinion.client_class is not None:
        found["srcip.client.class"] = opinion.client_class.name.lower()
    if opinion.service is not None:
        found |= _service(opinion.service)
    if opinion.rule is not None:
        found["srcip.rule"] = _text(str(opinion.rule))
        found["srcip.rule.owner"] = str(opinion.rule.owner)
    if opinion.evidence:
        found["srcip.evidence"] = [_text(line) for line in opinion.evidence]
    if opinion.advice:
        found["srcip.advice"] = [_text(line) for line in opinion.advice]
    return found


def _service(service: ServiceRef) -> Attributes:
    found: Attributes = {
        "srcip.service.namespace": _text(service.namespace),
        "srcip.service.name": _text(service.name),
        "srcip.service.via": str(service.via),
    }
    if service.port is not None:
        found["srcip.service.port"] = _text(service.port)
    if service.policy is not None:
        found["srcip.service.policy"] = str(service.policy)
    return found


def _events(leg: Leg) -> Iterator[SpanEvent]:
    for passage in leg.passages:
        for hop in passage.hops:
            yield SpanEvent(
                name=hop.hop.hook.label, time_ns=_moment(hop.time_ns), attributes=_hop(passage, hop)
            )
        if passage.drop is not None:
            yield SpanEvent(
                name="dropped",
                time_ns=_moment(passage.drop.time_ns),
                attributes={
                    **_of(passage),
                    "srcip.reason": _text(passage.drop.reason),
                    "srcip.at": _text(drop_text(passage.drop)),
                },
            )


def _hop(passage: Passage, path_hop: PathHop) -> Attributes:
    hop, device = path_hop.hop, path_hop.device
    found: Attributes = {**_of(passage), **_packet(hop.packet), "srcip.mark": hop.mark}
    if hop.is_fragment:
        found = {key: value for key, value in found.items() if not key.endswith(".port")}
        found["srcip.fragment"] = True
    if hop.is_after_nat is not None and hop.hook is not Hook.NF_FORWARD:
        found["srcip.stage"] = "after-nat" if hop.is_after_nat else "before-nat"
    if device is not None:
        found["srcip.device"] = _text(device.name)
        if device.kind is not None:
            found["srcip.device.kind"] = _text(device.kind)
        if device.pod is not None:
            found["srcip.device.pod"] = _text(f"{device.pod.namespace}/{device.pod.name}")
    if path_hop.translations:
        found["srcip.translations"] = [
            f"{each.by} {endpoint(*each.before)} -> {endpoint(*each.after)}"
            for each in path_hop.translations
        ]
    return found


def _of(passage: Passage) -> Attributes:
    return {"srcip.direction": str(passage.direction), "srcip.packet": passage.number}


def _packet(flow: FiveTuple) -> Attributes:
    found: Attributes = {
        "source.address": str(flow.src),
        "destination.address": str(flow.dst),
    }
    if not flow.is_icmp:
        found |= {"source.port": flow.sport, "destination.port": flow.dport}
    return found


def _moment(time_ns: int) -> int:
    """Clamp a time to what can be sent; a damaged record may hold any."""
    return min(max(0, time_ns), 2**64 - 1)


def _text(text: str) -> str:
    """Make a text fit to send: valid UTF-8, of bounded length, and safe to display."""
    return printable(text[:_LONGEST])
