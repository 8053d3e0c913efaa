"""Forecasts for people: the ways to a Service as rows, then what would keep the source."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from exporters.terminal import Screen, printable
from tracer.judge import advice
from tracer.judge.cause import Cause
from tracer.judge.forecast import CLIENT, Forecast
from tracer.judge.verdict import Verdict
from tracer.model import protocol_name

_HEADINGS = ("WAY", "CLIENT", "TO", "THROUGH", "BACKEND ON", "BACKEND SEES", "VERDICT", "CAUSE")
# Most questions are about external clients and the ways meant for them.
_CLIENTS = ("external", "pod", "node")
_WAYS = ("loadbalancer", "externalip", "nodeport", "clusterip", "loopback")
_SHOWN_NODES = 4


def forecast_table(forecasts: Iterable[Forecast], screen: Screen | None = None) -> list[str]:
    """
    Return forecasts as rows, followed by advice for each cause.

    Ports, nodes and families with the same outcome share a row. External clients come first. On a
    screen narrower than the rows, a row takes a few short lines.
    """
    forecasts = sorted(forecasts, key=_place)
    rows = _merged(_rows(forecasts))
    every_family = {each.way.family for each in forecasts}
    cells = [_HEADINGS, *(_cells(row, every_family) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if screen is not None and sum(widths) + 2 * (len(widths) - 1) > screen.width:
        lines = [line for row in cells[1:] for line in _stacked(row)]
    else:
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
    return [printable(line) for line in (*lines, *_advice(forecasts), *_notes(forecasts))]


def names(nodes: Sequence[str]) -> str:
    """Return the names of nodes; of many, only the first ones and the number of the rest."""
    if len(nodes) <= _SHOWN_NODES:
        return ", ".join(nodes) or "none"
    return f"{', '.join(nodes[: _SHOWN_NODES - 1])} and {len(nodes) - _SHOWN_NODES + 1} more"


@dataclass(slots=True, kw_only=True)
class _Row:
    """Forecasts with one outcome. Nodes, ports and the rest are in order of appearance."""

    answer: tuple[str, ...]
    families: dict[str, None] = field(default_factory=dict)
    nodes: dict[str, None] = field(default_factory=dict)
    to: dict[str, None] = field(default_factory=dict)
    addresses: dict[str, None] = field(default_factory=dict)


def _rows(forecasts: Iterable[Forecast]) -> list[_Row]:
    """Merge nodes and ports whose outcomes are the same, including the address."""
    rows: dict[tuple[str, ...], _Row] = {}
    for each in forecasts:
        address = "" if each.seen_source in (None, CLIENT) else str(each.seen_source)
        answer = _answer(each)
        row = rows.setdefault((*answer, each.way.family, address), _Row(answer=answer))
        row.families[each.way.family] = None
        row.nodes[each.way.node] = None
        row.to[f"{each.way.port}/{protocol_name(each.way.match.port.proto)}"] = None
        if address:
            row.addresses[address] = None
    return list(rows.values())


def _merged(rows: Iterable[_Row]) -> list[_Row]:
    """Merge families that differ in nothing but the address."""
    merged: dict[tuple[tuple[str, ...], ...], _Row] = {}
    for row in rows:
        same = merged.setdefault((row.answer, tuple(row.nodes), tuple(row.to)), row)
        same.families |= row.families
        same.addresses |= row.addresses
    return list(merged.values())


def _place(forecast: Forecast) -> tuple[int, int]:
    return _CLIENTS.index(_client(forecast)), _WAYS.index(_via(forecast))


def _client(forecast: Forecast) -> str:
    return forecast.way.client_class.name.lower()


def _via(forecast: Forecast) -> str:
    return "loopback" if forecast.way.to.is_loopback else str(forecast.way.match.via)


def _answer(forecast: Forecast) -> tuple[str, ...]:
    return (
        _via(forecast),
        _client(forecast),
        forecast.backend_node or "-",
        _seen(forecast),
        str(forecast.verdict),
        str(forecast.cause or "-"),
    )


def _seen(forecast: Forecast) -> str:
    """Return what the backend sees, in words."""
    if forecast.seen_source == CLIENT:
        return "the client"
    if forecast.seen_name is not None:
        return forecast.seen_name
    if forecast.seen_source is None:
        return "not known" if forecast.verdict is Verdict.UNKNOWN else "nothing"
    return ""


def _cells(row: _Row, every_family: Collection[str]) -> tuple[str, ...]:
    via, client, backend_node, name, *rest = row.answer
    to = " ".join(row.to)
    if set(row.families) != set(every_family):
        to = f"{' '.join(row.families)} {to}"
    seen = ", ".join(row.addresses)
    if name:
        seen = f"{seen} ({name})" if seen else name
    return (via, client, to, names(tuple(row.nodes)), backend_node, seen, *rest)


def _stacked(cells: Sequence[str]) -> list[str]:
    via, client, to, through, backend_node, seen, verdict, cause = cells
    backend = "the backend" if backend_node == "-" else f"the backend on {backend_node}"
    return [
        f"{client} -> {via} {to}, through {through}",
        f"    {backend} sees {seen}",
        f"    {verdict}" + (f"  {cause}" if cause != "-" else ""),
    ]


def _advice(forecasts: Sequence[Forecast]) -> list[str]:
    """Return advice by cause: what keeps the source, and what makes a connection arrive."""
    by_cause: dict[tuple[bool, Cause, Cause], list[Forecast]] = {}
    for each in forecasts:
        if each.cause is not None:
            is_about_source = each.verdict is Verdict.REPLACED
            key = is_about_source, each.cause, each.advised or each.cause
            by_cause.setdefault(key, []).append(each)
    lines = []
    width = max((len(cause) for _, cause, _ in by_cause), default=0)
    for is_about_source, heading in ((True, "To keep the source:"), (False, "To get a reply:")):
        told = [
            f"  {label:<{width}}  {line}"
            for (about_source, cause, _), same in by_cause.items()
            if about_source is is_about_source
            for label, line in _labelled(cause, _advice_for(same))
        ]
        if told:
            lines += ["", heading, *told]
    return lines


def _labelled(cause: Cause, lines: Iterable[str]) -> Iterable[tuple[str, str]]:
    """Yield each line with its label: the cause beside the first, none beside the others."""
    return ((str(cause) if i == 0 else "", line) for i, line in enumerate(lines))


def _advice_for(same: Sequence[Forecast]) -> tuple[str, ...]:
    """Return advice for forecasts of one cause, for all their nodes and families at once."""
    one = same[0]
    nodes = names(tuple(dict.fromkeys(each.way.node for each in same)))
    if one.verdict is Verdict.DROPPED:
        return advice.for_drop(one.cause, one.way.match, nodes)
    return advice.for_source(
        one.advised or one.cause,
        one.way.match,
        backend="its endpoint",
        version=None,
        node=nodes,
        is_local_possible=one.is_local_possible,
    )


def _notes(forecasts: Iterable[Forecast]) -> list[str]:
    notes = dict.fromkeys(each.note for each in forecasts if each.note)
    return ["", "Conditions:", *(f"  {note}" for note in notes)] if notes else []
