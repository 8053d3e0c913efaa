"""The answers of the index."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple

from tracer.cluster.objects import Endpoint, HostPort, Service, ServicePort
from tracer.model import IPAddress

Family = Literal["ipv4", "ipv6"]


class Via(StrEnum):
    """By which kind of address a Service or pod was reached."""

    CLUSTER_IP = "clusterip"
    NODE_PORT = "nodeport"
    LOAD_BALANCER = "loadbalancer"
    EXTERNAL_IP = "externalip"
    HOST_PORT = "hostport"
    POD = "pod"
    NONE = "none"


class PodRef(NamedTuple):
    """A pod and the node it runs on, if known."""

    namespace: str
    name: str
    node: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceMatch:
    """A Service port that a client addressed."""

    service: Service
    port: ServicePort
    via: Via


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPortMatch:
    """A pod's host port that a client addressed; no Service is involved."""

    pod: PodRef
    port: HostPort
    via: Literal[Via.HOST_PORT] = Via.HOST_PORT


class EndpointAddress(NamedTuple):
    """A backend of a Service port."""

    address: IPAddress
    port: int
    node: str | None
    pod: tuple[str, str] | None
    is_ready: bool
    is_serving: bool
    is_terminating: bool

    @classmethod
    def of(cls, endpoint: Endpoint, port: int) -> "EndpointAddress":
        """Return an endpoint as kube-proxy uses it: by its first address."""
        return cls(
            endpoint.addresses[0],
            port,
            endpoint.node,
            endpoint.pod,
            endpoint.is_ready,
            endpoint.is_serving,
            endpoint.is_terminating,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How many objects of each kind a snapshot holds."""

    services: int
    endpoint_slices: int
    nodes: int
    pods: int
