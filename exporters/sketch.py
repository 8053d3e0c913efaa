"""A path as a picture shows it: stations from the client to the endpoint, and what lies between."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from exporters.jsonl import timestamp
from exporters.text import cause_text, declared_text, endpoint, ends
from tracer.judge.path import Direction, Ending, Leg, Path, PathHop, Translated
from tracer.judge.proxy_word import ProxyWord
from tracer.judge.verdict import JudgedDrop, Opinion, Verdict
from tracer.model import ClientClass, FiveTuple, Hook, IPAddress, protocol_name


class Role(StrEnum):
    """What a station is."""

    CLIENT = "client"
    NODE = "node"
    DECLARED = "declared"  # a trusted proxy says that it is there
    UNSEEN = "unseen"  # it must be there, but nobody told of it
    ENDPOINT = "endpoint"


class Mark(StrEnum):
    """What happened at a station, as far as a picture marks it."""

    SNAT = "snat"
    DNAT = "dnat"
    CHANGED = "changed"
    KEPT = "kept"
    DROPPED = "dropped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What a station did: ``text`` with the station's name, ``there`` to be set beside it."""

    mark: Mark
    text: str
    there: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Station:
    """A box of the picture. ``detail`` is an address, or what is known in place of one."""

    role: Role
    name: str
    detail: str = ""
    notes: tuple[Note, ...] = ()

    @property
    def drop(self) -> Note | None:
        """Why nothing goes on from here."""
        return next((note for note in self.notes if note.mark is Mark.DROPPED), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sketch:
    """
    The picture of a path, in words that nobody made safe yet: names are as their owners wrote them.

    ``wires`` are the packets between each two stations, None where nobody saw them. ``facts`` are
    pairs of a label and a text, and so are ``reasons``: what the verdict rests on, and what would
    keep the source. ``rule`` is that of the deciding node; the reasons name it, too. ``headline``
    begins with the verdict.
    """

    verdict: Verdict
    headline: str
    stations: tuple[Station, ...]
    wires: tuple[FiveTuple | None, ...]
    facts: tuple[tuple[str, str], ...]
    rule: str | None
    reasons: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]


def sketch(path: Path) -> Sketch:
    """Draw up the picture of a path."""
    before = _before(path)
    after = _after(path)
    nodes = tuple(
        Station(role=Role.NODE, name=leg.node, notes=tuple(_notes(path, leg))) for leg in path.legs
    )
    wires: list[FiveTuple | None] = [None] * (len(before) - 1)
    wires += [leg.orig for leg in path.legs]
    wires += [path.backend] * len(after)
    return Sketch(
        verdict=path.verdict,
        headline=_headline(path),
        stations=(*before, *nodes, *after),
        wires=tuple(wires),
        facts=tuple(_facts(path)),
        rule=_rule(path.deciding.opinion),
        reasons=tuple(_reasons(path.deciding.opinion)),
        missing=path.missing,
    )


def packet_text(flow: FiveTuple, arrow: str = "->") -> str:
    """Return a packet's tuple as people write it; ICMP with its type, code and id."""
    src, dst = ends(flow)
    text = f"{src} {arrow} {dst}"
    if flow.is_icmp:
        text += f" type {flow.dport >> 8} code {flow.dport & 0xFF} id {flow.sport}"
    return text


def drop_text(drop: JudgedDrop) -> str:
    """Return why and where a packet was discarded."""
    hook = f" at {drop.hook.label}" if drop.hook else ""
    place = f" in {drop.place}" if drop.place else ""
    return f"{drop.reason}{hook}{place}"


def _before(path: Path) -> tuple[Station, ...]:
    """Return the client, and what stands between it and the first traced node."""
    first = path.legs[0]
    source = ends(path.orig)[0]
    word = declared_word(path)
    if word is not None and word.is_proxied and word.client is not None:
        client = declared_text(word.client)
        stations = [Station(role=Role.DECLARED, name="client", detail=client)]
        if word.by not in (None, word.peer):
            stations.append(Station(role=Role.DECLARED, name="proxy", detail=str(word.by)))
        return *stations, Station(role=Role.CLIENT, name="proxy", detail=source)
    nobody = Station(role=Role.UNSEEN, name="client", detail="not known")
    match first.verdict:
        case Verdict.REPLACED_UPSTREAM:
            text = "SNAT before the first traced node"
            note = Note(mark=Mark.SNAT, text=text, there=text)
            return nobody, Station(role=Role.UNSEEN, name="node", detail=source, notes=(note,))
        case Verdict.PROXIED:
            return nobody, Station(role=Role.CLIENT, name="proxy", detail=source)
    name = _client_name(first, first.opinion)
    return (Station(role=Role.CLIENT, name=name, detail=source),)


def declared_word(path: Path) -> ProxyWord | None:
    """Return what the first bytes say of clients behind the peer, as the first node read them."""
    words = (leg.judged.word for leg in path.legs if leg.judged is not None)
    return next((word for word in words if word is not None), None)


def _client_name(first: Leg, opinion: Opinion | None) -> str:
    passage = first.passage(Direction.ORIGINAL)
    hop = passage.hops[0] if passage and passage.hops else None
    if hop is not None and hop.hop.hook is Hook.TC_INGRESS and hop.device and hop.device.pod:
        return f"{hop.device.pod.namespace}/{hop.device.pod.name}"
    if hop is not None and hop.hop.hook is Hook.NF_OUTPUT:
        return "process"
    match opinion.client_class if opinion else None:
        case ClientClass.POD:
            return "pod"
        case ClientClass.NODE:
            return "node"
        case ClientClass.LOADBALANCER:
            return "load balancer"
        case ClientClass.LOOPBACK:
            return "process"
    return "client"


def _after(path: Path) -> tuple[Station, ...]:
    """Return the endpoint, and the endpoint's node if that is known but was not traced."""
    last = path.legs[-1]
    if path.drop is not None:
        return ()
    passage = last.passage(Direction.ORIGINAL)
    detail = ends(path.backend)[1] if path.backend else "not known"
    if passage is not None and passage.ending is Ending.DELIVERED:
        return (Station(role=Role.ENDPOINT, name="process", detail=detail),)
    pod = last.judged.backend_pod if last.judged else None
    if pod is None:
        return (Station(role=Role.ENDPOINT, name="endpoint", detail=detail),)
    end = Station(role=Role.ENDPOINT, name=f"{pod.namespace}/{pod.name}", detail=detail)
    if pod.node in (None, last.node):
        return (end,)
    return Station(role=Role.UNSEEN, name=pod.node or "", detail="not seen"), end


def _notes(path: Path, leg: Leg) -> Iterator[Note]:
    """Yield what a node did to the first packet."""
    passage = leg.passage(Direction.ORIGINAL)
    hops = passage.hops if passage else ()
    if (to := _translated(hops, Translated.DNAT)) or _is_dnat(leg):
        to = to or (ends(leg.reply)[0] if leg.reply else "")
        yield Note(mark=Mark.DNAT, text=f"DNAT at {leg.node}", there=f"DNAT to {to}")
    if (to := _translated(hops, Translated.SNAT)) or _is_snat(leg):
        to = to or (ends(leg.reply)[1] if leg.reply else "")
        yield Note(mark=Mark.SNAT, text=f"SNAT at {leg.node}", there=f"SNAT to {to}")
    for text in _changes(hops):
        yield Note(mark=Mark.CHANGED, text=text, there=text)
    if leg.drop is not None:
        text = f"dropped, {leg.drop.opinion.cause or leg.drop.reason}"
        yield Note(mark=Mark.DROPPED, text=text, there=text)
    if leg is path.legs[-1] and path.verdict is Verdict.PRESERVED:
        yield Note(mark=Mark.KEPT, text="source kept", there="source kept")


def _is_dnat(leg: Leg) -> bool:
    return leg.reply is not None and leg.reply.src != leg.orig.dst


def _is_snat(leg: Leg) -> bool:
    return leg.reply is not None and leg.reply.dst != leg.orig.src


def _translated(hops: Sequence[PathHop], by: Translated) -> str:
    """Return what a packet's address was translated to, as hops saw it; else nothing."""
    found = [change.after for hop in hops for change in hop.translations if change.by is by]
    return endpoint(*found[-1]) if found else ""


def _changes(hops: Sequence[PathHop]) -> Iterator[str]:
    for earlier, later in pairwise(hops):
        if any(change.by is Translated.OTHER for change in later.translations):
            yield (
                f"changed between {place_text(earlier)} and {place_text(later)}, not by netfilter"
            )


def place_text(path_hop: PathHop) -> str:
    """Return a hop's hook, with its side of NAT or its interface."""
    hop, device = path_hop.hop, path_hop.device
    if hop.hook in (Hook.TC_INGRESS, Hook.TC_EGRESS):
        return f"{hop.hook.label} {device.name if device else 'of an interface not told'}"
    # Nothing is translated at forward, so it has no sides.
    if hop.is_after_nat is None or hop.hook is Hook.NF_FORWARD:
        return hop.hook.label
    return f"{hop.hook.label} {'after' if hop.is_after_nat else 'before'} NAT"


def _headline(path: Path) -> str:
    client, node = path.orig.src, path.deciding.node
    seen = path.seen_source or "an address that is not told"
    match path.verdict:
        case Verdict.PRESERVED:
            return f"preserved: the backend sees the client, {client}"
        case Verdict.REPLACED:
            where = [leg.node for leg in path.legs if leg.verdict is Verdict.REPLACED]
            instead = (
                "again, the client's own address" if seen == client else f"in place of {client}"
            )
            return f"replaced at {' and '.join(where)}: the backend sees {seen} {instead}"
        case Verdict.REPLACED_UPSTREAM:
            return f"replaced-upstream of {node}: the backend sees {seen}, which is not the client"
        case Verdict.PROXIED:
            return f"proxied: {_seen_of_a_proxy(path, seen)}"
        case Verdict.DROPPED:
            why = f", {drop_text(path.drop)}" if path.drop else ""
            return f"dropped at {node}{why}: nothing arrives"
    return f"unknown: the backend sees {seen}"


def _seen_of_a_proxy(path: Path, seen: object) -> str:
    word = declared_word(path)
    client = word.client if word is not None and word.is_proxied else None
    who = (
        f"the client is {declared_text(client)}, as it says"
        if client
        else "the client is behind it"
    )
    if seen == path.orig.src:
        return f"the backend sees the proxy {seen}; {who}"
    return f"the backend sees {seen} in place of the proxy {path.orig.src}; {who}"


def _facts(path: Path) -> Iterator[tuple[str, str]]:
    opinion = path.deciding.opinion
    judged = path.deciding.drop or path.deciding.judged
    if judged is not None and (cause := cause_text(judged)) != "-":
        yield "cause", cause
    word = declared_word(path)
    if word is not None and word.clients:
        yield "declared", _declared(word)
    if opinion is not None and opinion.service is not None:
        service = opinion.service
        policy = f", policy {service.policy}" if service.policy else ""
        yield "service", f"{service} by {service.via}{policy}"
    yield "time", f"{timestamp(path.time_ns)}, {protocol_name(path.orig.proto)}"
    if path.accept is not None:
        yield "socket", _accepted(path.accept.accept.peer, path.seen_source)


def _declared(word: ProxyWord) -> str:
    named = " then ".join(map(declared_text, word.clients))
    headers = " and ".join(header.label for header in word.headers)
    trust = "is trusted" if word.is_trusted else "is not trusted (--trusted-proxy)"
    return f"{named}, in {headers}; {word.peer} {trust}"


def _rule(opinion: Opinion | None) -> str | None:
    if opinion is None or opinion.rule is None:
        return None
    return f"{opinion.rule.owner}: {opinion.rule}"


def _reasons(opinion: Opinion | None) -> Iterator[tuple[str, str]]:
    if opinion is None:
        return
    for line in opinion.evidence:
        yield "because", line
    for line in opinion.advice:
        yield "to mend" if opinion.verdict is Verdict.DROPPED else "to keep", line


def _accepted(peer: FiveTuple, seen: IPAddress | None) -> str:
    text = f"the backend's socket accepted {endpoint(peer.src, peer.sport)}"
    return text if peer.src == seen else f"{text}: not what its node said"
