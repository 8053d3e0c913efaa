"""The surroundings of a connection: the cluster at its time, and the node that tracked it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tracer.cluster.index import Cluster
from tracer.cluster.match import HostPortMatch, PodRef, ServiceMatch, Via
from tracer.cluster.objects import Policy, Service
from tracer.judge.verdict import ServiceRef
from tracer.model import ClientClass, FiveTuple, IPAddress
from tracer.ruleset.model import IPVS_DEVICE, ProxyMode, Ruleset

# --iptables-masquerade-bit 14, kube-proxy's default
DEFAULT_MARK = 0x4000
EXTERNAL_WAYS = frozenset({Via.NODE_PORT, Via.LOAD_BALANCER, Via.EXTERNAL_IP})


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """
    The surroundings of one node's connections. What is not known is None or empty.

    Args:
        node: The node's name in Kubernetes.
        cluster: The objects as they were at the connection's time.
        rules: The node's rules.
        addresses: All addresses of the node's interfaces; Kubernetes knows only a few of them.
        service_addresses: Those of them that kube-proxy in IPVS mode has bound for Services.
        interfaces: The names of the node's interfaces by index.
        device_kinds: The types of virtual interfaces by index: veth, bridge, vxlan.
        proxy_mode: kube-proxy's mode as it reports it; if it does not, its rules tell the mode.
        masquerade_mark: The bit by which kube-proxy marks what it will masquerade.
    """

    node: str
    cluster: Cluster | None = None
    rules: Ruleset | None = None
    addresses: frozenset[IPAddress] = frozenset()
    service_addresses: frozenset[IPAddress] = frozenset()
    interfaces: Mapping[int, str] = field(default_factory=dict)
    device_kinds: Mapping[int, str] = field(default_factory=dict)
    proxy_mode: ProxyMode | None = None
    masquerade_mark: int = DEFAULT_MARK

    @property
    def mode(self) -> ProxyMode | None:
        """kube-proxy's mode: as it reports it, else by its rules, else by its IPVS device."""
        by_rules = self.rules.proxy_mode if self.rules is not None else None
        told = self.proxy_mode or by_rules
        return "ipvs" if told is None and IPVS_DEVICE in self.interfaces.values() else told

    def is_here(self, address: IPAddress) -> bool:
        """Whether an address is one of this node's own."""
        if address.is_loopback or address in self.addresses:
            return True
        # The interfaces have all addresses; the API knows only some of them.
        if self.addresses:
            return False
        return self.cluster is not None and self.cluster.node_of(address) == self.node

    def classify(self, address: IPAddress) -> ClientClass | None:
        """Return what an address is in the cluster; None without a cluster."""
        if address.is_loopback:
            return ClientClass.LOOPBACK
        if address in self.addresses:
            # A pod gateway lies in a pod range, but belongs to the node.
            return ClientClass.NODE
        return self.cluster.classify(address) if self.cluster else None

    def match(self, flow: FiveTuple) -> ServiceMatch | HostPortMatch | None:
        """Return what a client addressed: a Service's port or a host port."""
        if self.cluster is None or flow.is_icmp:
            return None
        found = self.cluster.service_at(
            flow.dst, flow.dport, flow.proto, node_addresses=self.addresses, node=self.node
        )
        # NodePorts are not served at Services' addresses, although the node has them.
        is_elsewhere = found is not None and found.via is Via.NODE_PORT
        return None if is_elsewhere and flow.dst in self.service_addresses else found

    def behind(self, address: IPAddress, port: int, proto: int) -> tuple[Service, ...]:
        """Return the Services that have this endpoint."""
        if self.cluster is None:
            return ()
        return self.cluster.services_of_endpoint(address, port, proto)

    def pod_at(self, address: IPAddress) -> PodRef | None:
        """Return the pod at an address."""
        return self.cluster.pod_at(address) if self.cluster else None

    def node_at(self, address: IPAddress) -> str | None:
        """Return the node that has an address, or runs the pod that has it."""
        if self.cluster is None:
            return None
        return self.cluster.node_of(address) or self.cluster.node_of_pod_address(address)

    def is_cluster_source(self, address: IPAddress) -> bool | None:
        """
        Whether kube-proxy takes an address for a pod's, so that it does not masquerade.

        By the ranges in its rules (``clusterCIDR``); else by the class of the address, as its other
        detectors do (``detectLocalMode`` in pkg/proxy/util/localdetector.go).
        """
        if self.rules is not None and self.rules.cluster_cidrs:
            same_family = [
                cidr for cidr in self.rules.cluster_cidrs if cidr.version == address.version
            ]
            if same_family:
                return any(address in cidr for cidr in same_family)
        found = self.classify(address)
        return None if found is None else found is ClientClass.POD


def policy_of(match: ServiceMatch) -> Policy | None:
    """Return the traffic policy that applies to a way into a Service."""
    if match.via in EXTERNAL_WAYS:
        return match.service.external_policy
    return match.service.internal_policy


def reference(match: ServiceMatch | HostPortMatch | None) -> ServiceRef | None:
    """Return a short reference to a matched Service."""
    if not isinstance(match, ServiceMatch):
        return None
    return ServiceRef(
        namespace=match.service.namespace,
        name=match.service.name,
        port=match.port.name,
        via=match.via,
        policy=policy_of(match),
    )
