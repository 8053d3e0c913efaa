"""Forecasts and previews as a table for people and as JSON."""

import json
import textwrap
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from exporters.jsonl import VERSION, service_object
from exporters.terminal import printable
from tracer.judge.cause import MEANINGS
from tracer.judge.forecast import CLIENT, Forecast
from tracer.judge.preview import Preview
from tracer.judge.verdict import Verdict
from tracer.model import protocol_name

_HEADINGS = ("WAY", "CLIENT", "TO", "THROUGH", "BACKEND ON", "BACKEND SEES", "VERDICT", "CAUSE")
_SHOWN_NODES = 4


def forecast_to_line(forecast: Forecast) -> str:
    """Return a forecast as a line of JSON."""
    way = forecast.way
    line: dict[str, Any] = {"kind": "forecast", "version": VERSION}
    if forecast.service is not None:
        line["service"] = service_object(forecast.service)
    line |= {
        "client_class": way.client_class.name.lower(),
        "node": way.node,
        "family": way.family,
        "proto": protocol_name(way.match.port.proto),
        "to": str(way.to),
        "port": way.port,
        "verdict": str(forecast.verdict),
    }
    known = {
        "backend_node": forecast.backend_node,
        "seen_source": None if forecast.seen_source is None else str(forecast.seen_source),
        "seen_name": forecast.seen_name,
        "cause": None if forecast.cause is None else str(forecast.cause),
        "note": forecast.note,
    }
    line |= {key: value for key, value in known.items() if value is not None}
    return json.dumps(line | {"advice": list(forecast.advice)})


def forecast_table(forecasts: Iterable[Forecast]) -> list[str]:
    """
    Return forecasts as aligned rows, with advice below.

    Nodes and ports with the same answer share a row. Rows of a way, client and family stand
    together.
    """
    rows: dict[tuple[str, ...], _Row] = {}
    advice: dict[str, None] = {}
    for forecast in forecasts:
        row = rows.setdefault(_answer(forecast), _Row())
        row.nodes[forecast.way.node] = None
        row.to[_to(forecast)] = None
        advice |= dict.fromkeys(forecast.advice)
        if forecast.note:
            advice[forecast.note] = None
    cells = [_HEADINGS, *(_cells(answer, rows[answer]) for answer in _grouped(rows))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    if advice:
        lines += ["", "To keep the source, or to arrive:", *(f"  {line}" for line in advice)]
    return [printable(line) for line in lines]


def preview_lines(preview: Preview, clients: Sequence[tuple[str, int]] | None) -> list[str]:
    """
    Return a preview as lines of text.

    Args:
        preview: What would change.
        clients: Client addresses that would become visible with their connections, most first;
            None if nobody looked.
    """
    nodes = _names(preview.without_endpoint)
    lines = [
        f"nodes that would drop what comes from outside: {nodes}",
        f"nodes that would answer: {_names(preview.with_endpoint)}",
    ]
    if preview.has_health_check:
        port = preview.health_check_node_port
        where = f"port {port}" if port else "a port that the API server chooses"
        lines.append(f"health checks that would say 503 ({where}, /healthz): {nodes}")
    if clients is not None:
        seen = ", ".join(f"{address} ({count})" for address, count in clients) or "none was seen"
        lines.append(f"client addresses that would become visible (connections): {seen}")
    return [printable(line) for line in lines]


def preview_to_line(
    preview: Preview,
    settings: dict[str, str],
    clients: Sequence[tuple[str, int]] | None,
) -> str:
    """Return a preview as a line of JSON."""
    line: dict[str, Any] = {
        "kind": "preview",
        "version": VERSION,
        "set": settings,
        "nodes_without_endpoint": list(preview.without_endpoint),
        "nodes_with_endpoint": list(preview.with_endpoint),
        "health_check_503": list(preview.without_endpoint) if preview.has_health_check else [],
    }
    if preview.health_check_node_port is not None:
        line["health_check_node_port"] = preview.health_check_node_port
    if clients is not None:
        line["clients_made_visible"] = [
            {"address": address, "connections": count} for address, count in clients
        ]
    return json.dumps(line)


def cause_legend(width: int = 78) -> list[str]:
    """Return every cause and what it means."""
    lines = []
    for cause, meaning in MEANINGS.items():
        lines.append(str(cause))
        lines += textwrap.wrap(
            meaning, width, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
        )
    return lines


class _Row:
    """Nodes and destinations that share an answer, in the order they came."""

    def __init__(self) -> None:
        self.nodes: dict[str, None] = {}
        self.to: dict[str, None] = {}


def _answer(forecast: Forecast) -> tuple[str, ...]:
    way = forecast.way
    via = "loopback" if way.to.is_loopback else str(way.match.via)
    return (
        via,
        way.client_class.name.lower(),
        way.family,
        forecast.backend_node or "-",
        _seen(forecast),
        str(forecast.verdict),
        str(forecast.cause or "-"),
    )


def _grouped(answers: Collection[tuple[str, ...]]) -> list[tuple[str, ...]]:
    # By family, way and client, each in the order in which it came first.
    if not answers:
        return []
    via, client, family, *_ = (list(dict.fromkeys(column)) for column in zip(*answers, strict=True))
    return sorted(
        answers, key=lambda each: (family.index(each[2]), via.index(each[0]), client.index(each[1]))
    )


def _seen(forecast: Forecast) -> str:
    if forecast.seen_source == CLIENT:
        return "the client"
    if forecast.seen_source is None:
        unknown = "not known" if forecast.verdict is Verdict.UNKNOWN else "nothing"
        return forecast.seen_name or unknown
    name = f" ({forecast.seen_name})" if forecast.seen_name else ""
    return f"{forecast.seen_source}{name}"


def _to(forecast: Forecast) -> str:
    way = forecast.way
    return f"{way.port}/{protocol_name(way.match.port.proto)}"


def _cells(answer: tuple[str, ...], row: _Row) -> tuple[str, ...]:
    via, client, family, *rest = answer
    return (via, client, f"{family} {' '.join(row.to)}", _names(tuple(row.nodes)), *rest)


def _names(nodes: Sequence[str]) -> str:
    if len(nodes) <= _SHOWN_NODES:
        return ", ".join(nodes) or "none"
    return f"{', '.join(nodes[: _SHOWN_NODES - 1])} and {len(nodes) - _SHOWN_NODES + 1} more"
