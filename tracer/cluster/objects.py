"""
The Kubernetes objects that decide which source address a backend sees, reduced to what matters.

Fields mean what the Kubernetes API reference says (core/v1, discovery.k8s.io/v1).
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from tracer.model import IPAddress, IPNetwork


class ServiceKey(NamedTuple):
    """A Service's identity."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Policy(StrEnum):
    """``externalTrafficPolicy`` and ``internalTrafficPolicy``."""

    CLUSTER = "Cluster"
    LOCAL = "Local"


class ServiceType(StrEnum):
    """``Service.spec.type``."""

    CLUSTER_IP = "ClusterIP"
    NODE_PORT = "NodePort"
    LOAD_BALANCER = "LoadBalancer"
    EXTERNAL_NAME = "ExternalName"


class SessionAffinity(StrEnum):
    """``Service.spec.sessionAffinity``."""

    NONE = "None"
    CLIENT_IP = "ClientIP"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServicePort:
    """A port of a Service. ``proto`` is the IP protocol number; an unnamed port's name is None."""

    name: str | None
    proto: int
    port: int
    node_port: int | None
    target_port: int | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadBalancerAddress:
    """
    An address of ``status.loadBalancer.ingress``.

    ``is_proxy`` is ``ipMode: Proxy``: kube-proxy makes no rules for such an address, and the load
    balancer forwards connections with a source and destination of its own choice (KEP-1860).
    """

    address: IPAddress
    is_proxy: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """
    A Service.

    ``external_policy`` is None if the Service cannot be reached from outside. Load balancers that
    have only a host name are left out.
    """

    namespace: str
    name: str
    type: ServiceType
    cluster_ips: tuple[IPAddress, ...]
    external_ips: tuple[IPAddress, ...]
    load_balancer: tuple[LoadBalancerAddress, ...]
    ports: tuple[ServicePort, ...]
    external_policy: Policy | None
    internal_policy: Policy
    session_affinity: SessionAffinity
    source_ranges: tuple[IPNetwork, ...]
    health_check_node_port: int | None
    is_headless: bool
    external_name: str | None

    @property
    def key(self) -> ServiceKey:
        """The Service's identity."""
        return ServiceKey(self.namespace, self.name)

    def has_family(self, version: int) -> bool:
        """
        Whether kube-proxy serves it in a family, 4 or 6: where it has a ClusterIP.

        Source: serviceToServiceMap in pkg/proxy/servicechangetracker.go.
        """
        return any(address.version == version for address in self.cluster_ips)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """
    An endpoint of a slice; ``pod`` is (namespace, name) if its targetRef is a Pod.

    Absent conditions have the API's defaults: ready true, serving equal to ready, terminating
    false (discovery.k8s.io/v1 EndpointConditions).
    """

    addresses: tuple[IPAddress, ...]
    node: str | None
    pod: tuple[str, str] | None
    is_ready: bool
    is_serving: bool
    is_terminating: bool


class SlicePort(NamedTuple):
    """A port that every endpoint of a slice has."""

    name: str | None
    proto: int
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointSlice:
    """
    Some of a Service's endpoints, of one address family (``ipv4`` or ``ipv6``).

    ``service`` is None if the slice has no service-name label.
    """

    namespace: str
    name: str
    service: str | None
    family: str
    ports: tuple[SlicePort, ...]
    endpoints: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A Node: its internal and external addresses, and its pod CIDRs."""

    name: str
    addresses: tuple[IPAddress, ...]
    pod_cidrs: tuple[IPNetwork, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPort:
    """A container's host port; ``address`` is None for every address of the node."""

    address: IPAddress | None
    port: int
    proto: int
    container_port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A Pod. One that has ended has no addresses or host ports: others may use them by now."""

    namespace: str
    name: str
    ips: tuple[IPAddress, ...]
    node: str | None
    is_host_network: bool
    host_ports: tuple[HostPort, ...]


Object = Service | EndpointSlice | Node | Pod
