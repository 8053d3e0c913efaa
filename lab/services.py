"""The lab's Services and their addresses, from the Kubernetes objects."""

import json
from dataclasses import dataclass
from functools import cache
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal, get_args

from lab.hosts import Address, Family

OBJECTS = Path(__file__).with_name("data") / "objects.json"

Proto = Literal["tcp", "udp"]
PROTOS: tuple[Proto, ...] = get_args(Proto)


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """A port of a Service; ``node_port`` is None where the Service has none."""

    port: int
    node_port: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A Service with one port for each protocol, and its addresses in both families."""

    name: str
    cluster_ips: tuple[Address, ...]
    external_ips: tuple[Address, ...]
    load_balancer_ips: tuple[Address, ...]
    ports: dict[Proto, Port]


def pick(addresses: tuple[Address, ...], family: Family) -> Address:
    """Return the only address of this family."""
    (address,) = (ip for ip in addresses if ip.version == (4 if family == "ipv4" else 6))
    return address


@cache
def services() -> dict[str, Service]:
    """Return the Services of the recorded cluster, by name."""
    items = json.loads(OBJECTS.read_text())["items"]
    found = [_service(item) for item in items if item["kind"] == "Service"]
    return {service.name: service for service in found}


def _service(item: dict[str, Any]) -> Service:
    spec = item["spec"]
    ingress = item["status"]["loadBalancer"].get("ingress", [])
    return Service(
        name=item["metadata"]["name"],
        cluster_ips=_addresses(spec["clusterIPs"]),
        external_ips=_addresses(spec.get("externalIPs", [])),
        load_balancer_ips=_addresses([entry["ip"] for entry in ingress]),
        ports={
            port["protocol"].lower(): Port(port=port["port"], node_port=port.get("nodePort"))
            for port in spec["ports"]
        },
    )


def _addresses(texts: list[str]) -> tuple[Address, ...]:
    return tuple(ip_address(text) for text in texts)
