"""srcip explain: what a backend will see on each way to a Service, before any packet flows."""

import json
import socket
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import click

from exporters import forecast as export
from exporters.forecast_table import forecast_table
from exporters.jsonl import VERSION
from exporters.terminal import printable, screen_of
from tracer.cluster.index import Cluster
from tracer.cluster.objects import Policy, Service, ServiceType
from tracer.commands import options
from tracer.commands.cluster import ClusterChoice, cluster_options, load_cluster
from tracer.commands.services import find_service
from tracer.commands.values import Seconds, ServiceName
from tracer.errors import TracerError
from tracer.judge.forecast import Forecaster, Proxy, facts_of
from tracer.judge.preview import SETTINGS, change, hidden_clients, preview
from tracer.judge.verdict import Judged, JudgedConnection
from tracer.kernel import health, netns, proxy_mode
from tracer.kernel.conntrack import DumpSource
from tracer.kernel.interfaces import InterfaceWatcher
from tracer.kernel.netns import Netns
from tracer.kernel.source import clock_offset_ns
from tracer.model import IPAddress
from tracer.pipeline import Pipeline
from tracer.recording import RecordingSource
from tracer.ruleset import reader
from tracer.source import Source
from tracer.views import FixedViews

_MOST_CLIENTS = 50


class Setting(click.ParamType[tuple[str, Policy]]):
    """A traffic policy as NAME=VALUE."""

    name = "setting"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Policy]:
        """Accept the policies that decide about the source address."""
        name, _, text = str(value).partition("=")
        if name not in SETTINGS or text not in list(Policy):
            self.fail(
                f"{value!r} is not {' or '.join(SETTINGS)} with =Cluster or =Local", param, ctx
            )
        return name, Policy(text)


@click.command(short_help="Forecast what a Service's backends will see.")
@click.argument("service", type=ServiceName(), required=False, metavar="[NAMESPACE/SERVICE]")
@options.where_options
@cluster_options
@click.option(
    "--set",
    type=Setting(),
    multiple=True,
    metavar="POLICY=VALUE",
    help="Preview a change: externalTrafficPolicy or internalTrafficPolicy, to Cluster or Local."
    " May be given several times.",
)
@click.option(
    "--from-recording",
    type=click.Path(readable=False, path_type=Path),
    metavar="FILE",
    help="With --set: list the clients that would become visible, as seen in the recording FILE.",
)
@click.option(
    "--from-conntrack",
    is_flag=True,
    help="With --set: list the clients that would become visible, as seen in conntrack now.",
)
@click.option(
    "--probe-health",
    is_flag=True,
    help="Ask the healthCheckNodePort of each node, and show where it contradicts the objects.",
)
@click.option(
    "--probe-timeout",
    type=Seconds(most=3600),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="With --probe-health: how long to wait for each node.",
)
@click.option("--causes", is_flag=True, help="List every cause with its meaning, and exit.")
@options.output_option
def explain(
    service: tuple[str, str] | None,
    from_recording: Path | None,
    from_conntrack: bool,
    probe_health: bool,
    probe_timeout: float,
    causes: bool,
    output: str,
    **parameters: Any,
) -> None:
    """
    Forecast which source IP a Service's backends will see: by each way to it, through each node.

    Reads the cluster's objects and sends no packet, except with --probe-health. Some addresses of
    a node, such as the pod gateway, are in no object: srcip reads them from the namespaces named by
    --netns, or from this machine if it is a node of the cluster.

    \b
    Examples:
      srcip explain default/web
      srcip explain default/web --set externalTrafficPolicy=Local --from-conntrack
      srcip explain default/web --cluster objects.json -o json
      srcip explain --causes
    """
    choice = ClusterChoice.of(parameters)
    settings: tuple[tuple[str, Policy], ...] = parameters.pop("set")
    is_json = output == "json"
    if causes:
        click.echo("\n".join(export.cause_lines() if is_json else export.cause_legend()))
        return
    if service is None:
        raise click.UsageError("a Service is missing: name NAMESPACE/SERVICE, or use --causes")
    if (from_recording or from_conntrack) and not settings:
        raise click.UsageError("--from-recording and --from-conntrack need --set")
    cluster = load_cluster(choice)
    if not cluster.counts.nodes:
        raise TracerError("the objects hold no Nodes: a forecast is made for each node")
    namespaces = _namespaces(parameters, cluster)
    forecaster = _forecaster(cluster, namespaces, choice)
    found = _find(cluster, service)
    changed = _changed(found, dict(settings))
    # Whatever can fail runs before the first line of the answer is printed.
    port = _health_port(changed) if probe_health else None
    clients = _clients(cluster, found, namespaces, from_recording, from_conntrack=from_conntrack)
    _show_forecasts(forecaster, changed, is_preview=bool(settings), is_json=is_json)
    if settings:
        _show_preview(cluster, changed, dict(settings), clients, is_json=is_json)
    if port is not None:
        _show_health(cluster, changed, port, namespaces, probe_timeout, is_json=is_json)


def _find(cluster: Cluster, name: tuple[str, str]) -> Service:
    service = find_service(cluster, name)
    if service.external_name is not None:
        raise TracerError(
            f"Service {service.key} is of type ExternalName: clients connect to "
            f"{service.external_name} directly, past the nodes' Service rules"
        )
    if service.is_headless:
        raise TracerError(
            f"Service {service.key} is headless: clients connect to its pods directly, which see "
            "the client's address unless the network plugin replaces it"
        )
    return service


def _changed(service: Service, settings: dict[str, Policy]) -> Service:
    # needsExternalTrafficPolicy of pkg/apis/core/validation; ClusterIP with externalIPs takes one.
    is_inside = service.type is ServiceType.CLUSTER_IP and not service.external_ips
    if "externalTrafficPolicy" in settings and is_inside:
        raise TracerError(
            f"Service {service.key} has no externalTrafficPolicy: it is of type ClusterIP without "
            "externalIPs"
        )
    return change(service, settings)


def _namespaces(parameters: dict[str, Any], cluster: Cluster) -> list[Netns]:
    """Return the nodes' namespaces that can be entered; none if this machine is not a node."""
    if parameters["netns"]:
        return options.namespaces(parameters)
    here = parameters["node_name"] or socket.gethostname()
    return [netns.current(here)] if cluster.node(here) is not None else []


def _forecaster(cluster: Cluster, namespaces: Sequence[Netns], choice: ClusterChoice) -> Forecaster:
    own: dict[str, frozenset[IPAddress]] = {}
    mode, is_masquerading_all = choice.mode, False
    for each in namespaces:
        with closing(InterfaceWatcher(each)) as watcher:
            own[each.node] = watcher.snapshot().addresses
        rules = reader.read(each.path)
        mode = mode or proxy_mode.ask(each) or rules.proxy_mode
        is_masquerading_all = is_masquerading_all or bool(rules.has_masquerade_all)
    proxy = Proxy(mode=mode, is_masquerading_all=is_masquerading_all)
    return Forecaster(cluster, facts_of(cluster, own), proxy)


def _show_forecasts(
    forecaster: Forecaster, service: Service, *, is_preview: bool, is_json: bool
) -> None:
    forecasts = chain.from_iterable(map(forecaster.forecast, forecaster.ways(service)))
    if is_json:
        for forecast in forecasts:
            click.echo(export.forecast_to_line(forecast))
        return
    policy = f"externalTrafficPolicy {service.external_policy}, " if service.external_policy else ""
    mode = f"{forecaster.proxy.mode} mode" if forecaster.proxy.mode else "unknown mode"
    name = f"{printable(str(service.key))}{' after the change' if is_preview else ''}"
    click.echo(
        f"{name}: {service.type}, {policy}internalTrafficPolicy {service.internal_policy}; "
        f"kube-proxy in {mode}"
    )
    for line in forecast_table(forecasts, screen_of(sys.stdout)):
        click.echo(line)


def _clients(
    cluster: Cluster,
    service: Service,
    namespaces: Sequence[Netns],
    recording: Path | None,
    *,
    from_conntrack: bool,
) -> list[tuple[str, int]] | None:
    """Count the clients that the Service's policy hides now; None if not asked for."""
    if recording is None and not from_conntrack:
        return None
    counted: Counter[IPAddress] = Counter()
    sources: list[Source] = []
    if recording is not None:
        sources.append(RecordingSource(recording))
    if from_conntrack:
        sources.append(DumpSource(namespaces, clock_offset_ns()))
    for source in sources:
        with closing(source):
            counted += hidden_clients(_connections(source, cluster), service)
    return [(str(address), count) for address, count in counted.most_common(_MOST_CLIENTS)]


def _connections(source: Source, cluster: Cluster) -> list[JudgedConnection]:
    pipeline = Pipeline(source, views=FixedViews(cluster=cluster))
    found: list[Judged] = []
    while (records := source.read(0)) is not None:
        found += pipeline.judge(records)
    found += pipeline.rest()
    return [each for each in found if isinstance(each, JudgedConnection)]


def _show_preview(
    cluster: Cluster,
    changed: Service,
    settings: dict[str, Policy],
    clients: list[tuple[str, int]] | None,
    *,
    is_json: bool,
) -> None:
    shown = preview(cluster, changed)
    names = {name: str(value) for name, value in settings.items()}
    if is_json:
        click.echo(export.preview_to_line(shown, names, clients))
        return
    click.echo(f"\nWith {', '.join(f'{name}: {value}' for name, value in names.items())}:")
    for line in export.preview_lines(shown, settings, clients):
        click.echo(f"  {line}")


def _health_port(service: Service) -> int:
    port = service.health_check_node_port
    if port is None:
        raise TracerError(
            f"Service {service.key} has no healthCheckNodePort: only type LoadBalancer with "
            "externalTrafficPolicy Local has one"
        )
    return port


def _show_health(
    cluster: Cluster,
    service: Service,
    port: int,
    namespaces: Sequence[Netns],
    timeout_s: float,
    *,
    is_json: bool,
) -> None:
    unhealthy = preview(cluster, service).unhealthy
    if not is_json:
        click.echo(f"\nHealth checks at port {port}:")
    places = {each.node: each for each in namespaces}
    for node in cluster.nodes():
        netns = places.get(node.name) or next(iter(namespaces), None)
        # A node that has just joined has no address yet.
        answer = (
            health.probe(node.name, node.addresses[0], port, timeout_s=timeout_s, netns=netns)
            if node.addresses
            else health.Health(node=node.name, error="its Node object has no address")
        )
        click.echo(_health_line(answer, is_expected=node.name not in unhealthy, is_json=is_json))


def _health_line(answer: health.Health, *, is_expected: bool, is_json: bool) -> str:
    expected = 200 if is_expected else 503
    agrees = answer.status == expected
    if is_json:
        line: dict[str, object] = {"kind": "health", "version": VERSION, "node": answer.node}
        known = {
            "status": answer.status,
            "local_endpoints": answer.local_endpoints,
            "error": answer.error,
        }
        line |= {key: value for key, value in known.items() if value is not None}
        return json.dumps(line | {"expected": expected, "agrees": agrees})
    text = str(answer.error if answer.status is None else answer.status)
    if answer.status not in (None, 200, 503):
        # pkg/proxy/healthcheck/service_health.go answers with these two only.
        text += " is not an answer of kube-proxy: something else listens there"
    verdict = "as the objects say" if agrees else f"the objects say {expected}"
    return printable(f"  {answer.node}: {text}; {verdict}")
