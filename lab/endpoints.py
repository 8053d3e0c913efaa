"""The lab's Services as kube-proxy sees them: each of their ports, with its endpoints."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any

from lab.hosts import Address, Family, Network
from lab.services import OBJECTS, Proto


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A ready endpoint, and its node, None if not known."""

    address: Address
    node: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServicePort:
    """
    A port of a Service in one family, with all that kube-proxy takes from the objects for it.

    ``affinity_s`` is how long a client stays with its endpoint, None without affinity.
    """

    service: str
    proto: Proto
    port: int
    target_port: int
    node_port: int | None
    cluster_ip: Address
    external_ips: tuple[Address, ...]
    load_balancer_ips: tuple[Address, ...]
    source_ranges: tuple[Network, ...]
    is_internal_local: bool
    is_external_local: bool
    health_check_node_port: int | None
    affinity_s: int | None
    endpoints: tuple[Endpoint, ...]


def service_ports(family: Family) -> Iterator[ServicePort]:
    """Yield every port of the recorded cluster's Services that have addresses of a family."""
    items = json.loads(OBJECTS.read_text())["items"]
    version = 4 if family == "ipv4" else 6
    slices: dict[str, dict[str, Any]] = {
        item["metadata"]["labels"]["kubernetes.io/service-name"]: item
        for item in items
        if item["kind"] == "EndpointSlice" and item["addressType"] == f"IPv{version}"
    }
    for item in items:
        name = item["metadata"]["name"]
        if item["kind"] == "Service" and _of(item["spec"]["clusterIPs"], version):
            for port in item["spec"]["ports"]:
                yield _port(item, port, slices.get(name, {}), version)


def _port(
    item: dict[str, Any], port: dict[str, Any], of_slice: dict[str, Any], version: int
) -> ServicePort:
    spec = item["spec"]
    ingress = item["status"]["loadBalancer"].get("ingress", [])
    ranges = map(ip_network, spec.get("loadBalancerSourceRanges", []))
    affinity = spec.get("sessionAffinityConfig", {}).get("clientIP", {})
    return ServicePort(
        service=item["metadata"]["name"],
        proto=port["protocol"].lower(),
        port=port["port"],
        target_port=port["targetPort"],
        node_port=port.get("nodePort"),
        cluster_ip=_of(spec["clusterIPs"], version)[0],
        external_ips=_of(spec.get("externalIPs", []), version),
        load_balancer_ips=_of(
            [entry["ip"] for entry in ingress if entry.get("ipMode", "VIP") == "VIP"], version
        ),
        source_ranges=tuple(each for each in ranges if each.version == version),
        is_internal_local=spec.get("internalTrafficPolicy") == "Local",
        is_external_local=spec.get("externalTrafficPolicy") == "Local",
        health_check_node_port=spec.get("healthCheckNodePort"),
        affinity_s=affinity.get("timeoutSeconds"),
        endpoints=tuple(
            Endpoint(address=ip_address(address), node=each.get("nodeName"))
            for each in of_slice.get("endpoints") or ()
            if each["conditions"]["ready"]
            for address in each["addresses"]
        ),
    )


def _of(texts: list[str], version: int) -> tuple[Address, ...]:
    addresses = map(ip_address, texts)
    return tuple(address for address in addresses if address.version == version)
