"""What was judged as a table for people, one row for each connection, drop and accept."""

from datetime import UTC, datetime
from typing import IO

from exporters.table import StreamingTable
from exporters.terminal import printable
from tracer.judge.verdict import Judged, JudgedConnection, JudgedDrop, SeenAccept, Summary
from tracer.model import FiveTuple, IPAddress, protocol_name

# Most addresses are IPv4: "255.255.255.255:65535".
_ENDPOINT = 21
_COLUMNS = {
    "TIME": 12,
    "NODE": 5,
    "VERDICT": 9,
    "PROTO": 5,
    "CLIENT": _ENDPOINT,
    "SENT TO": _ENDPOINT,
    "BACKEND": _ENDPOINT,
    "BACKEND SEES": _ENDPOINT,
    "NOTE": 4,
}
VERDICT_COLOURS = {
    "preserved": "green",
    "replaced": "yellow",
    "dropped": "red",
    "unknown": "cyan",
    "accepted": "dim",
}


class TextWriter:
    """Prints judged things as rows. Times are UTC, as in the JSON."""

    def __init__(self, stream: IO[str]) -> None:
        self._table = StreamingTable(stream, _COLUMNS, VERDICT_COLOURS)

    def write(self, judged: Judged) -> None:
        """Print one row."""
        match judged:
            case JudgedConnection():
                self._table.row(_connection_cells(judged))
            case JudgedDrop():
                self._table.row(_drop_cells(judged))
            case SeenAccept():
                self._table.row(_accept_cells(judged))


def summary_text(summary: Summary) -> list[str]:
    """Return the end of a run as lines."""
    lost = ", ".join(f"{count} {name}" for name, count in summary.lost.items() if count)
    lines = [
        f"{_plural(summary.connections, 'connection')}, {_plural(summary.drops, 'drop')}; "
        f"lost: {lost or 'nothing'}"
    ]
    lines += [f"not seen: {line}" for line in summary.not_seen]
    # A recording brings its own names for what was lost and not seen.
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


def _connection_cells(judged: JudgedConnection) -> list[str]:
    orig, reply = judged.connection.orig, judged.connection.reply
    client, sent_to = ends(orig)
    backend, seen = ends(reply)
    return [
        _clock(judged.time_ns),
        judged.node,
        judged.verdict,
        protocol_name(orig.proto),
        client,
        sent_to,
        backend,
        seen,
        _connection_note(judged),
    ]


def _connection_note(judged: JudgedConnection) -> str:
    connection = judged.connection
    notes = [
        name
        for name, is_so in (
            ("DNAT", connection.is_dnat),
            ("SNAT", connection.is_snat),
            ("related", connection.is_related),
        )
        if is_so
    ]
    if connection.orig.is_icmp:
        notes.append(f"type {connection.orig.dport >> 8}")
    if connection.mark:
        notes.append(f"mark {connection.mark:#x}")
    if connection.zone:
        notes.append(f"zone {connection.zone}")
    return " ".join(notes)


def _drop_cells(judged: JudgedDrop) -> list[str]:
    client, sent_to = ends(judged.flow) if judged.flow else ("?", "?")
    where = f" at {judged.hook.label}" if judged.hook is not None else ""
    place = f" ({judged.place})" if judged.place else ""
    direction = " (a reply)" if judged.drop.is_reply else ""
    return [
        _clock(judged.time_ns),
        judged.node,
        judged.verdict,
        protocol_name(judged.flow.proto) if judged.flow else "?",
        client,
        sent_to,
        "-",
        "-",
        f"{judged.reason}{where}{place}{direction}",
    ]


def _accept_cells(judged: SeenAccept) -> list[str]:
    seen, backend = ends(judged.accept.peer)
    cells = [_clock(judged.time_ns), "", "accepted", protocol_name(judged.accept.peer.proto)]
    return [*cells, "", "", backend, seen, "by the backend's socket"]


def _clock(time_ns: int) -> str:
    moment = datetime.fromtimestamp(time_ns // 1_000_000_000, UTC)
    return f"{moment:%H:%M:%S}.{time_ns // 1_000_000 % 1000:03}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
