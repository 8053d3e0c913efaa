"""Claims: what each object says about addresses and ports. They are the entries of the index."""

from collections.abc import Hashable, Iterator
from enum import IntEnum
from ipaddress import IPv4Network, IPv6Network
from typing import NamedTuple

from tracer.cluster.objects import (
    Endpoint,
    EndpointSlice,
    HostPort,
    Node,
    Object,
    Pod,
    Service,
    ServicePort,
)
from tracer.model import IPAddress, IPNetwork

_MAPPED = 0xFFFF << 32
_LOOPBACK = (0xFFFF << 32 | 127 << 24) >> 24


class Topic(IntEnum):
    """What a claim is about, which determines the type of its key."""

    SOCKET = 0  # socket(): cluster, external and load-balancer addresses, distinguished by rank
    NODE_PORT = 1  # (port, proto)
    SLICES = 2  # (namespace, name) of the Service
    ENDPOINT = 3  # address
    NODE = 4  # address
    POD = 5  # address
    POD_CIDR = 6  # (prefix length, leading bits)
    HOST_PORT = 7  # (node name, port, proto)
    LOAD_BALANCER = 8  # address


class Kind(IntEnum):
    """The kinds of objects in the index."""

    SERVICE = 0
    ENDPOINT_SLICE = 1
    NODE = 2
    POD = 3


class Owner(NamedTuple):
    """The identity of the object that makes a claim. A Node's namespace is empty."""

    kind: Kind
    namespace: str
    name: str


class Claim(NamedTuple):
    """One object's claim. Of several claims on one key, the lowest rank, then owner, is first."""

    rank: int
    owner: Owner
    what: ServicePort | Endpoint | tuple[HostPort, ...] | None = None


CLUSTER_IP_RANK, EXTERNAL_IP_RANK, LOAD_BALANCER_RANK = range(3)

Subject = tuple[Topic, Hashable]


def number(address: IPAddress) -> int:
    """Return an address as a number; IPv4 as ``::ffff:a.b.c.d``, so that the families differ."""
    return int(address) | _MAPPED if address.version == 4 else int(address)


def socket(address: IPAddress, port: int, proto: int) -> int:
    """Return a key for an address, port and protocol: an int, which hashes faster."""
    return number(address) | port << 128 | proto << 144


def prefix(network: IPNetwork) -> tuple[int, int]:
    """Return a network's prefix length, out of 128 bits, and its leading bits."""
    length = network.prefixlen + (96 if network.version == 4 else 0)
    return length, number(network.network_address) >> (128 - length)


def network_of(length: int, bits: int) -> IPNetwork:
    """Return the network for what `prefix` returned."""
    address = bits << (128 - length)
    if length >= 96 and address >> 32 == _MAPPED >> 32:
        return IPv4Network((address & 0xFFFFFFFF, length - 96))
    return IPv6Network((address, length))


def is_loopback(address: int) -> bool:
    """Whether an address, as a number, is in 127.0.0.0/8 or is ::1."""
    return address >> 24 == _LOOPBACK or address == 1


def owner_of(obj: Object) -> Owner:
    """Return an object's identity."""
    match obj:
        case Service():
            return Owner(Kind.SERVICE, obj.namespace, obj.name)
        case EndpointSlice():
            return Owner(Kind.ENDPOINT_SLICE, obj.namespace, obj.name)
        case Node():
            return Owner(Kind.NODE, "", obj.name)
        case Pod():
            return Owner(Kind.POD, obj.namespace, obj.name)


def claims_of(obj: Object, owner: Owner) -> dict[Subject, Claim]:
    """Return an object's claims; of several on one subject, the first."""
    claims: dict[Subject, Claim] = {}
    for subject, claim in _claims(obj, owner):
        claims.setdefault(subject, claim)
    return claims


def _claims(obj: Object, owner: Owner) -> Iterator[tuple[Subject, Claim]]:
    match obj:
        case Service():
            return _service_claims(obj, owner)
        case EndpointSlice():
            return _slice_claims(obj, owner)
        case Node():
            return _node_claims(obj, owner)
        case Pod():
            return _pod_claims(obj, owner)


def _service_claims(service: Service, owner: Owner) -> Iterator[tuple[Subject, Claim]]:
    # kube-proxy ignores the address of a load balancer that proxies (ipMode: Proxy).
    ranked = (
        (CLUSTER_IP_RANK, service.cluster_ips),
        (EXTERNAL_IP_RANK, service.external_ips),
        (LOAD_BALANCER_RANK, [lb.address for lb in service.load_balancer if not lb.is_proxy]),
    )
    for port in service.ports:
        for rank, addresses in ranked:
            for address in addresses:
                if not service.has_family(address.version):
                    continue
                key = socket(address, port.port, port.proto)
                yield (Topic.SOCKET, key), Claim(rank, owner, port)
        if port.node_port is not None:
            yield (Topic.NODE_PORT, (port.node_port, port.proto)), Claim(0, owner, port)
    for balancer in service.load_balancer:
        yield (Topic.LOAD_BALANCER, number(balancer.address)), Claim(0, owner)


def _slice_claims(slice_: EndpointSlice, owner: Owner) -> Iterator[tuple[Subject, Claim]]:
    if slice_.service is not None:
        yield (Topic.SLICES, (slice_.namespace, slice_.service)), Claim(0, owner)
    for endpoint in slice_.endpoints:
        claim = Claim(0, owner, endpoint)
        for address in endpoint.addresses:
            yield (Topic.ENDPOINT, number(address)), claim


def _node_claims(node: Node, owner: Owner) -> Iterator[tuple[Subject, Claim]]:
    for address in node.addresses:
        yield (Topic.NODE, number(address)), Claim(0, owner)
    for network in node.pod_cidrs:
        yield (Topic.POD_CIDR, prefix(network)), Claim(0, owner)


def _pod_claims(pod: Pod, owner: Owner) -> Iterator[tuple[Subject, Claim]]:
    # A hostNetwork pod has its node's addresses, and its host ports are not mapped.
    if pod.is_host_network:
        return
    for address in pod.ips:
        yield (Topic.POD, number(address)), Claim(0, owner)
    mapped: dict[tuple[int, int], list[HostPort]] = {}
    for host_port in pod.host_ports:
        mapped.setdefault((host_port.port, host_port.proto), []).append(host_port)
    if pod.node is not None:
        for (port, proto), ports in mapped.items():
            yield (Topic.HOST_PORT, (pod.node, port, proto)), Claim(0, owner, tuple(ports))
