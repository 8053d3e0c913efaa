"""The hosts of the lab and their addresses: a client, a router, two nodes, four pods."""

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Literal

Family = Literal["ipv4", "ipv6"]
Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

FAMILIES: tuple[Family, ...] = ("ipv4", "ipv6")

HTTP_PORT = 8080
UDP_PORT = 8053


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """One address in each family."""

    ipv4: IPv4Address
    ipv6: IPv6Address

    def of(self, family: Family) -> Address:
        """Return the address of one family."""
        return self.ipv4 if family == "ipv4" else self.ipv6


@dataclass(frozen=True, slots=True, kw_only=True)
class Networks:
    """One range in each family."""

    ipv4: IPv4Network
    ipv6: IPv6Network

    def of(self, family: Family) -> Network:
        """Return the range of one family."""
        return self.ipv4 if family == "ipv4" else self.ipv6


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """
    A node of the cluster.

    ``gateway`` is the address on the node's end of every pod's link. A backend on this node sees
    it when kube-proxy masquerades, not the node's own address.
    """

    name: str
    address: Addresses
    gateway: Addresses
    pods: Networks


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A pod, and the node that it runs on."""

    name: str
    node: Node
    address: Addresses


def _addresses(ipv4: str, ipv6: str) -> Addresses:
    return Addresses(ipv4=IPv4Address(ipv4), ipv6=IPv6Address(ipv6))


def _networks(ipv4: str, ipv6: str) -> Networks:
    return Networks(ipv4=IPv4Network(ipv4), ipv6=IPv6Network(ipv6))


NODE1 = Node(
    name="node1",
    address=_addresses("10.240.0.3", "2001:db8:240::11"),
    gateway=_addresses("10.244.1.1", "2001:db8:44:1::1"),
    pods=_networks("10.244.1.0/24", "2001:db8:44:1::/64"),
)
NODE2 = Node(
    name="node2",
    address=_addresses("10.240.0.5", "2001:db8:240::12"),
    gateway=_addresses("10.244.2.1", "2001:db8:44:2::1"),
    pods=_networks("10.244.2.0/24", "2001:db8:44:2::/64"),
)
NODES = {node.name: node for node in (NODE1, NODE2)}

PODS = {
    pod.name: pod
    for pod in (
        Pod(name="p11", node=NODE1, address=_addresses("10.244.1.11", "2001:db8:44:1::11")),
        Pod(name="p12", node=NODE1, address=_addresses("10.244.1.12", "2001:db8:44:1::12")),
        Pod(name="p21", node=NODE2, address=_addresses("10.244.2.21", "2001:db8:44:2::21")),
        Pod(name="p22", node=NODE2, address=_addresses("10.244.2.22", "2001:db8:44:2::22")),
    )
}

CLIENT = _addresses("198.51.100.10", "2001:db8:c::10")
# The client host's second address, which loadBalancerSourceRanges excludes. IPv4 only.
CLIENT2 = IPv4Address("198.51.100.11")

ROUTER_TO_CLIENT = _addresses("198.51.100.1", "2001:db8:c::1")
ROUTER_TO_NODES = _addresses("10.240.0.1", "2001:db8:240::1")
LOOPBACK = _addresses("127.0.0.1", "::1")
LOOPBACK_RANGES = _networks("127.0.0.0/8", "::1/128")
# Contains the pod ranges of all nodes: kube-proxy's cluster CIDR.
CLUSTER = _networks("10.244.0.0/16", "2001:db8:44::/48")

# Addresses that no host has: the router sends them to one of the nodes.
SERVICES = _networks("10.0.0.0/16", "2001:db8:96::/112")
LOAD_BALANCER = _networks("203.0.113.0/24", "2001:db8:1b::/64")

HOSTS = ("client", "router", *NODES, *PODS)
# Hosts with an echo server. The client's serves connections that leave the cluster.
ECHOES = ("client", *PODS)
