"""Forecasts and previews as JSON, previews and causes as lines of text."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from exporters.forecast_table import names
from exporters.jsonl import VERSION, service_object
from exporters.terminal import printable
from tracer.cluster.objects import Policy
from tracer.judge.cause import MEANINGS
from tracer.judge.forecast import Forecast
from tracer.judge.preview import Preview
from tracer.model import protocol_name


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


def preview_lines(
    preview: Preview, settings: Mapping[str, Policy], clients: Sequence[tuple[str, int]] | None
) -> list[str]:
    """
    Return a preview as lines of text.

    Args:
        preview: What would change.
        settings: The policies that would be set, by their names in the API.
        clients: Client addresses that would become visible, with their connections, most first;
            None if none were looked for.
    """
    without, able = names(preview.without_endpoint), names(preview.with_endpoint)
    lines = []
    external = settings.get("externalTrafficPolicy")
    if external is Policy.CLUSTER:
        lines.append("every node serves external traffic, and hides the client's address")
    elif external is Policy.LOCAL:
        lines += [
            f"nodes that would not serve external traffic: {without}",
            f"nodes that would serve it: {able}",
            *_gap_lines(preview),
        ]
        if preview.has_health_check:
            port = preview.health_check_node_port
            where = f"port {port}" if port else "a port that the API server chooses"
            sick = names(preview.unhealthy)
            lines.append(f"health checks that would answer 503 ({where}, /healthz): {sick}")
        if clients is not None:
            seen = ", ".join(f"{client} ({count})" for client, count in clients) or "none seen"
            lines.append(f"client addresses that would become visible (connections): {seen}")
    internal = settings.get("internalTrafficPolicy")
    if internal is Policy.CLUSTER:
        lines.append("pods on every node can reach its ClusterIP")
    elif internal is Policy.LOCAL:
        lines += [
            f"nodes whose pods could not reach its ClusterIP: {without}",
            f"nodes whose pods could: {able}",
            *_gap_lines(preview),
        ]
    return [printable(line) for line in lines]


def _gap_lines(preview: Preview) -> list[str]:
    return [f"    but {node} not on {', '.join(ports)}" for node, ports in preview.gaps.items()]


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
        "nodes_partly": {node: list(ports) for node, ports in preview.gaps.items()},
        "health_check_503": list(preview.unhealthy) if preview.has_health_check else [],
    }
    if preview.health_check_node_port is not None:
        line["health_check_node_port"] = preview.health_check_node_port
    if clients is not None:
        line["clients_made_visible"] = [
            {"address": address, "connections": count} for address, count in clients
        ]
    return json.dumps(line)


def cause_lines() -> list[str]:
    """Return every cause and what it means, as lines of JSON."""
    return [
        json.dumps({"kind": "cause", "version": VERSION, "cause": cause, "meaning": meaning})
        for cause, meaning in MEANINGS.items()
    ]


def cause_legend(width: int = 78) -> list[str]:
    """Return every cause and what it means."""
    lines = []
    for cause, meaning in MEANINGS.items():
        lines.append(str(cause))
        lines += textwrap.wrap(
            meaning, width, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
        )
    return lines
