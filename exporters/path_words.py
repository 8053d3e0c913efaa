"""A path in words, shared by all its forms."""

from collections.abc import Iterator

from exporters.jsonl import timestamp
from exporters.text import cause_text, client_text, declared_text, endpoint, ends
from tracer.judge.path import Path
from tracer.judge.proxy_word import ProxyWord
from tracer.judge.verdict import JudgedDrop, Opinion, Verdict
from tracer.model import FiveTuple, Hop, IPAddress, protocol_name


def packet_text(flow: FiveTuple, arrow: str = "->") -> str:
    """Return a packet's tuple as people write it; ICMP with its type, code and id."""
    src, dst = ends(flow)
    text = f"{src} {arrow} {dst}"
    if flow.is_icmp:
        text += f" type {flow.dport >> 8} code {flow.dport & 0xFF} id {flow.sport}"
    return text


def hop_text(hop: Hop) -> str:
    """Return a packet at a hop as people write it; only the first fragment has ports."""
    if hop.is_fragment:
        return f"{hop.packet.src} -> {hop.packet.dst} (fragment)"
    return packet_text(hop.packet)


def drop_text(drop: JudgedDrop) -> str:
    """Return why and where a packet was dropped."""
    hook = f" at {drop.hook.label}" if drop.hook else ""
    place = f" in {drop.place}" if drop.place else ""
    return f"{drop.reason}{hook}{place}"


def client_of(path: Path) -> str:
    """Return the client; if a trusted proxy declares one, that client and the proxy."""
    judged = path.legs[0].judged
    return client_text(judged) if judged else ends(path.orig)[0]


def declared_word(path: Path) -> ProxyWord | None:
    """Return what the first bytes declare about the client, as the first node read them."""
    words = (leg.judged.word for leg in path.legs if leg.judged is not None)
    return next((word for word in words if word is not None), None)


def headline(path: Path) -> str:
    """Return the verdict and its meaning in one line."""
    client, node = path.orig.src, path.deciding.node
    seen = path.seen_source or "an unknown address"
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
        f"the client is {declared_text(client)}, according to the proxy"
        if client
        else "the client is behind it"
    )
    if seen == path.orig.src:
        return f"the backend sees the proxy {seen}; {who}"
    return f"the backend sees {seen} in place of the proxy {path.orig.src}; {who}"


def facts(path: Path) -> Iterator[tuple[str, str]]:
    """Yield what is known about a path: a label and a text each."""
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
        yield "service", f"{service} via {service.via}{policy}"
    yield "time", f"{timestamp(path.time_ns)}, {protocol_name(path.orig.proto)}"
    if path.accept is not None:
        yield "socket", _accepted(path.accept.accept.peer, path.seen_source)


def _declared(word: ProxyWord) -> str:
    named = " then ".join(map(declared_text, word.clients))
    headers = " and ".join(header.label for header in word.headers)
    trust = "is trusted" if word.is_trusted else "is not trusted (--trusted-proxy)"
    return f"{named}, in {headers}; {word.peer} {trust}"


def rule(opinion: Opinion | None) -> str | None:
    """Return the rule of an opinion, with its owner."""
    if opinion is None or opinion.rule is None:
        return None
    return f"{opinion.rule.owner}: {opinion.rule}"


def reasons(opinion: Opinion | None) -> Iterator[tuple[str, str]]:
    """Yield evidence and advice of an opinion: a label and a text each."""
    if opinion is None:
        return
    for line in opinion.evidence:
        yield "because", line
    for line in opinion.advice:
        yield "to fix" if opinion.is_unanswered else "to keep", line


def _accepted(peer: FiveTuple, seen: IPAddress | None) -> str:
    text = f"the backend's socket accepted {endpoint(peer.src, peer.sport)}"
    return text if peer.src == seen else f"{text}: its node reported a different source"
