"""Judged records as a table for people: a row for each connection, drop and accept."""

from collections import OrderedDict
from datetime import UTC, datetime
from typing import IO

from exporters.stacked import rows_on
from exporters.terminal import Screen, printable
from exporters.word import word_texts
from tracer.judge.cause import Cause
from tracer.judge.verdict import (
    Judged,
    JudgedConnection,
    JudgedDrop,
    Opinion,
    SeenAccept,
    SeenHop,
    Summary,
)
from tracer.model import FiveTuple, IPAddress, protocol_name
from tracer.proxy_headers import DeclaredClient
from tracer.ruleset.rule import Owner, Rule

# Most addresses are IPv4: "255.255.255.255:65535".
ENDPOINT = 21
_COLUMNS = {
    "TIME": 12,
    "NODE": 5,
    "VERDICT": 9,
    "PROTO": 5,
    "CLIENT": ENDPOINT,
    "SENT TO": ENDPOINT,
    "BACKEND SEES": ENDPOINT,
    "BACKEND": ENDPOINT,
    "SERVICE": 24,
    "CAUSE": 5,
}
# An accept follows its connection at once.
_REMEMBERED = 8192
VERDICT_COLOURS = {
    "preserved": "green",
    "replaced": "yellow",
    "replaced-upstream": "yellow",
    "proxied": "yellow",
    "dropped": "red",
    "unknown": "cyan",
    "accepted": "dim",
}


class TextWriter:
    """
    Prints judged records as rows. Times are UTC, as in the JSON.

    ``is_explaining`` adds evidence and advice under each row. On a ``screen`` narrower than a row,
    a row takes a few short lines.
    """

    def __init__(
        self, stream: IO[str], *, is_explaining: bool = False, screen: Screen | None = None
    ) -> None:
        self._nodes: OrderedDict[FiveTuple, str] = OrderedDict()
        self._is_explaining = is_explaining
        self._table = rows_on(stream, _COLUMNS, VERDICT_COLOURS, screen)

    def write(self, judged: Judged) -> None:
        """Print one row."""
        match judged:
            case JudgedConnection():
                self._remember(judged)
                self._table.row(_connection_cells(judged))
            case JudgedDrop():
                self._table.row(_drop_cells(judged))
            case SeenAccept():
                node = self._nodes.get(judged.accept.peer, "-")
                self._table.row(_accept_cells(judged, node))
            case SeenHop():
                pass  # hops are shown as paths, not as rows
        if self._is_explaining and not isinstance(judged, SeenAccept | SeenHop):
            for line in explanation(judged.opinion):
                self._table.note(f"    {line}")

    def _remember(self, judged: JudgedConnection) -> None:
        """Remember the last node that sent a connection on to its socket: accepts name no node."""
        peer = judged.connection.reply.inverted
        self._nodes[peer] = judged.node
        self._nodes.move_to_end(peer)
        if len(self._nodes) > _REMEMBERED:
            self._nodes.popitem(last=False)


def explanation(opinion: Opinion) -> list[str]:
    """Return evidence and advice as lines that are safe for a terminal."""
    lines = [f"because  {line}" for line in opinion.evidence]
    label = "to fix  " if opinion.is_unanswered else "to keep "
    lines += [f"{label} {line}" for line in opinion.advice]
    return [printable(line) for line in lines]


def summary_text(summary: Summary) -> list[str]:
    """Return the summary of a run as lines."""
    lost = ", ".join(f"{count} {name}" for name, count in summary.lost.items() if count)
    lines = [
        f"{_plural(summary.connections, 'connection')}, {_plural(summary.drops, 'drop')}; "
        f"lost: {lost or 'nothing'}"
    ]
    lines += [f"not seen: {line}" for line in summary.not_seen]
    lines += summary.notes
    # The names of losses may come from a recording, which is not trusted.
    return [printable(line) for line in lines]


def endpoint(address: IPAddress, port: int | None) -> str:
    """Return an address and a port as people write them, IPv6 in brackets."""
    if port is None:
        return str(address)
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def ends(flow: FiveTuple) -> tuple[str, str]:
    """Return a tuple's source and destination as text; ICMP has no ports."""
    if flow.is_icmp:
        return str(flow.src), str(flow.dst)
    return endpoint(flow.src, flow.sport), endpoint(flow.dst, flow.dport)


def cause_text(judged: JudgedConnection | JudgedDrop) -> str:
    """Return a cause with what narrows it down: a rule's owner, a drop's hook."""
    opinion = judged.opinion
    words = [str(opinion.cause)] if opinion.cause is not None else []
    if opinion.cause in (Cause.POD_EGRESS, Cause.OTHER_RULE, Cause.NETFILTER_DROP):
        words.append(f"({_owner(opinion.rule)})")
    if isinstance(judged, JudgedConnection) and judged.word is not None:
        words += word_texts(judged.word)
    if isinstance(judged, JudgedDrop):
        if opinion.cause is None or opinion.cause is Cause.NETFILTER_DROP:
            words.append(judged.reason)
        if judged.hook is not None:
            words.append(f"at {judged.hook.label}")
        if judged.drop.is_reply:
            words.append("(a reply)")
    return " ".join(words) or "-"


def client_text(judged: JudgedConnection) -> str:
    """Return the client; if a trusted proxy declares one, that client and the proxy."""
    client, _ = ends(judged.connection.orig)
    word = judged.word
    if word is None or not word.is_proxied or word.client is None:
        return client
    return f"{declared_text(word.client)} via {client}"


def declared_text(client: DeclaredClient) -> str:
    """Return a client as a header names it: an address, or a name in place of one."""
    return str(client) if client.address is None else endpoint(client.address, client.port)


def _owner(rule: Rule | None) -> str:
    if rule is None:
        return "by an unknown rule"
    return f"by table {rule.table}" if rule.owner is Owner.UNKNOWN else f"by {rule.owner}"


def _connection_cells(judged: JudgedConnection) -> list[str]:
    orig, reply = judged.connection.orig, judged.connection.reply
    _, sent_to = ends(orig)
    backend, seen = ends(reply)
    if judged.backend_pod is not None:
        name = f"{judged.backend_pod.namespace}/{judged.backend_pod.name}"
        backend = name if reply.is_icmp else f"{name}:{reply.sport}"
    return [
        clock_text(judged.time_ns),
        judged.node,
        judged.verdict,
        protocol_name(orig.proto),
        client_text(judged),
        sent_to,
        seen,
        backend,
        service_text(judged.opinion),
        cause_text(judged),
    ]


def _drop_cells(judged: JudgedDrop) -> list[str]:
    client, sent_to = ends(judged.flow) if judged.flow else ("?", "?")
    return [
        clock_text(judged.time_ns),
        judged.node,
        judged.verdict,
        protocol_name(judged.flow.proto) if judged.flow else "?",
        client,
        sent_to,
        "-",
        "-",
        service_text(judged.opinion),
        cause_text(judged),
    ]


def _accept_cells(judged: SeenAccept, node: str) -> list[str]:
    seen, backend = ends(judged.accept.peer)
    cells = [clock_text(judged.time_ns), node, "accepted", protocol_name(judged.accept.peer.proto)]
    return [*cells, "", "", seen, backend, "", "confirmed by the backend's socket"]


def service_text(opinion: Opinion) -> str:
    """Return the Service that a verdict is about, and which of its addresses was used."""
    if opinion.service is None:
        return "-"
    return f"{opinion.service} ({opinion.service.via})"


def clock_text(time_ns: int) -> str:
    """Return the time of day of a Unix time, in UTC, to the millisecond."""
    moment = datetime.fromtimestamp(time_ns // 1_000_000_000, UTC)
    return f"{moment:%H:%M:%S}.{time_ns // 1_000_000 % 1000:03}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
