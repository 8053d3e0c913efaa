"""What a change of a Service's traffic policies would do."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tracer.cluster.index import Cluster
from tracer.cluster.match import EndpointAddress
from tracer.cluster.objects import Policy, Service, ServiceType
from tracer.judge.cause import Cause
from tracer.judge.endpoints import usable
from tracer.judge.forecast import FAMILIES
from tracer.judge.verdict import JudgedConnection
from tracer.judge.view import EXTERNAL_WAYS
from tracer.model import IPAddress, protocol_name

# The fields that decide about the source, by their names in the API.
SETTINGS = {
    "externalTrafficPolicy": "external_policy",
    "internalTrafficPolicy": "internal_policy",
}

_BY_POLICY = {Cause.EXTERNAL_TRAFFIC_POLICY_CLUSTER, Cause.IPVS_MASQUERADE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """
    What would be different.

    Args:
        service: The Service after the change.
        without_endpoint: Nodes without an endpoint: under a Local policy they stop serving.
        with_endpoint: The other nodes.
        gaps: Of these, nodes that lack an endpoint for some ports that have one elsewhere, and
            which: under a Local policy they drop what is sent to those.
        unhealthy: Nodes whose health check answers 503: those without a *ready* endpoint. Endpoints
            that are terminating still serve (KEP-1669), while load balancers learn to stop sending
            (EndpointsMap.LocalReadyEndpoints in pkg/proxy).
        health_check_node_port: The port of the health check; None if there is none, or if the API
            server has not chosen it yet.
        has_health_check: Whether there would be a health check.
    """

    service: Service
    without_endpoint: tuple[str, ...]
    with_endpoint: tuple[str, ...]
    gaps: Mapping[str, tuple[str, ...]]
    unhealthy: tuple[str, ...]
    health_check_node_port: int | None
    has_health_check: bool


def change(service: Service, settings: Mapping[str, Policy]) -> Service:
    """
    Return a Service with other policies.

    Args:
        service: The Service.
        settings: New values by field name in the API, as in `SETTINGS`.
    """
    changes: dict[str, Any] = {SETTINGS[name]: value for name, value in settings.items()}
    return replace(service, **changes)


def preview(cluster: Cluster, service: Service) -> Preview:
    """
    Return what a Service's policies mean for each node.

    Args:
        cluster: The cluster.
        service: The Service after the change.
    """
    names = sorted(node.name for node in cluster.nodes())
    ports = _ports(cluster, service)
    gaps = {
        name: tuple(port for port, found in ports.items() if not usable(found, name))
        for name in names
    }
    able = [name for name in names if len(gaps[name]) < len(ports)]
    ready = {each.node for found in ports.values() for each in found if each.is_ready}
    # core/v1: healthCheckNodePort is for type LoadBalancer with externalTrafficPolicy Local.
    has_health_check = (
        service.type is ServiceType.LOAD_BALANCER and service.external_policy is Policy.LOCAL
    )
    return Preview(
        service=service,
        without_endpoint=tuple(name for name in names if name not in able),
        with_endpoint=tuple(able),
        gaps={name: gaps[name] for name in able if gaps[name]},
        unhealthy=tuple(name for name in names if name not in ready),
        health_check_node_port=service.health_check_node_port if has_health_check else None,
        has_health_check=has_health_check,
    )


def hidden_clients(judged: Iterable[JudgedConnection], service: Service) -> Counter[IPAddress]:
    """
    Count a Service's connections by client, for clients whose address the external policy hides.

    ``externalTrafficPolicy: Local`` would make these addresses visible.
    """
    clients: Counter[IPAddress] = Counter()
    for each in judged:
        reference = each.opinion.service
        if (
            reference is not None
            and (reference.namespace, reference.name) == service.key
            and reference.via in EXTERNAL_WAYS
            and each.opinion.cause in _BY_POLICY
            and each.connection.is_snat
        ):
            clients[each.connection.orig.src] += 1
    return clients


def _ports(cluster: Cluster, service: Service) -> dict[str, tuple[EndpointAddress, ...]]:
    """Return the endpoints of each port and family that has any which kube-proxy would use."""
    return {
        f"{port.port}/{protocol_name(port.proto)} ({family})": found
        for port in service.ports
        for family in FAMILIES
        if usable(found := tuple(cluster.endpoints(service.key, port, family)))
    }
