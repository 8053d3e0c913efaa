"""
A forecast of what backends will see, before any packet flows: kube-proxy's rules, simulated.

Source: pkg/proxy/{iptables,nftables,ipvs}/proxier.go of Kubernetes, checked against what backends
saw behind a real kube-proxy (lab/data/observed.jsonl) and, in IPVS mode, in the lab
(tests/data/ipvs).
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address
from typing import Literal

from tracer.cluster.index import Cluster
from tracer.cluster.match import EndpointAddress, Family, ServiceMatch, Via
from tracer.cluster.objects import Policy, Service, ServicePort
from tracer.judge import advice
from tracer.judge.cause import OF_KUBE_PROXY, Cause
from tracer.judge.endpoints import usable
from tracer.judge.verdict import ServiceRef, Verdict
from tracer.judge.view import EXTERNAL_WAYS, policy_of, reference
from tracer.model import ClientClass, IPAddress, IPNetwork
from tracer.ruleset.model import ProxyMode

FAMILIES: tuple[Family, ...] = ("ipv4", "ipv6")
CLIENT: Literal["client"] = "client"
_LOOPBACKS: dict[Family, IPAddress] = {
    "ipv4": IPv4Address("127.0.0.1"),
    "ipv6": IPv6Address("::1"),
}
SeenSource = IPAddress | Literal["client"]
_STRAY_NOTE = (
    "kube-proxy in IPVS mode sends traffic for policy Local to other nodes if the node has no "
    "endpoint: the backend sees the client, but its replies do not reach the client"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """
    A node: its addresses in the API, and those of its interfaces where they could be read.

    ``own_addresses`` are those of all its interfaces, empty if they were not read.
    """

    name: str
    addresses: tuple[IPAddress, ...]
    pod_cidrs: tuple[IPNetwork, ...] = ()
    own_addresses: frozenset[IPAddress] = frozenset()

    def address(self, family: Family) -> IPAddress | None:
        """The address of a family that the API lists."""
        return next(filter(_of(family), self.addresses), None)

    def gateway(self, family: Family) -> IPAddress | None:
        """
        The node's own address in its pod range, which it uses to reach its pods.

        No Kubernetes object holds it: None if the node's interfaces were not read.
        """
        mine = sorted(filter(_of(family), self.own_addresses), key=int)
        return next((a for a in mine if any(a in cidr for cidr in self.pod_cidrs)), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proxy:
    """How kube-proxy runs. ``mode`` is None if it is not known."""

    mode: ProxyMode | None = None
    is_masquerading_all: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """
    A way to a Service port: who connects, to what, and the node whose kube-proxy handles it.

    ``client`` is the client's address, None for any client of its class.
    """

    match: ServiceMatch
    client_class: ClientClass
    node: str
    family: Family
    to: IPAddress
    port: int
    client: IPAddress | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """
    The outcome of a way, one for each node that may serve it.

    ``seen_source`` is an address, ``"client"`` where the client's own is kept, or None: nothing
    arrives, or the address is in no object and ``seen_name`` describes it. ``advised`` is the
    cause to give advice on, if it is a different one. ``is_local_possible`` says whether a node
    has an endpoint, so that policy Local could serve.
    """

    way: Way
    verdict: Verdict
    cause: Cause | None = None
    backend_node: str | None = None
    seen_source: SeenSource | None = None
    seen_name: str | None = None
    note: str | None = None
    advised: Cause | None = None
    is_local_possible: bool = True

    @property
    def service(self) -> ServiceRef | None:
        """A reference to the Service."""
        return reference(self.way.match)

    @property
    def advice(self) -> tuple[str, ...]:
        """What would keep the source, or make the connection arrive."""
        if self.verdict is Verdict.DROPPED:
            return advice.for_drop(self.cause, self.way.match, self.way.node)
        version = self.way.to.version
        return advice.for_source(
            self.advised or self.cause,
            self.way.match,
            backend="its endpoint",
            version=version,
            node=self.way.node,
            is_local_possible=self.is_local_possible,
        )


@dataclass(frozen=True, slots=True)
class Forecaster:
    """Simulates kube-proxy for one cluster."""

    cluster: Cluster
    nodes: Mapping[str, NodeFacts]
    proxy: Proxy = field(default_factory=Proxy)

    def ways(self, service: Service) -> Iterator[Way]:
        """Yield every way to a Service: each port, address, client class and node."""
        for port in service.ports:
            for family in FAMILIES:
                for node in sorted(self.nodes):
                    yield from self._ways_through(service, port, family, node)

    def forecast(self, way: Way) -> tuple[Forecast, ...]:
        """Return the outcome of a way; several if nodes with different outcomes may serve it."""
        match = way.match
        endpoints = self.cluster.endpoints(match.service.key, match.port, way.family)
        everywhere = usable(endpoints)
        if way.to.is_loopback:
            unable = self._loopback(way)
            if unable is not None:
                return (unable,)
        if not everywhere:
            return (Forecast(way=way, verdict=Verdict.DROPPED, cause=Cause.NO_ENDPOINTS),)
        excluded = _source_ranges(way)
        if excluded is not None and excluded.verdict is Verdict.DROPPED:
            return (excluded,)
        chosen = everywhere
        if self._is_local_only(way):
            # Ones that are terminating serve where the node has no other.
            chosen = usable(endpoints, way.node)
            if not chosen and not self._is_ipvs:
                return (Forecast(way=way, verdict=Verdict.DROPPED, cause=Cause.NO_LOCAL_ENDPOINT),)
            # IPVS mode takes the cluster's where the node has none (syncEndpoint).
            chosen = chosen or everywhere
        found = [self._arrive(way, endpoint) for endpoint in self._different(chosen, way)]
        is_local_possible = any(endpoint.node for endpoint in everywhere)
        found = [replace(each, is_local_possible=is_local_possible) for each in found]
        if excluded is not None:
            found = [replace(each, note=excluded.note) for each in found]
        return tuple(found)

    def _is_local_only(self, way: Way) -> bool:
        """Whether policy Local restricts this way to endpoints on its node."""
        service = way.match.service
        if way.match.via not in EXTERNAL_WAYS or self._is_ipvs:
            return policy_of(way.match) is Policy.LOCAL
        # kube-proxy lets pods and the node's own processes use all of the cluster's endpoints
        # ("pod traffic for ... external destinations", "route LOCAL traffic for ...").
        return service.external_policy is Policy.LOCAL and way.client_class is ClientClass.EXTERNAL

    def _loopback(self, way: Way) -> Forecast | None:
        """Return the forecast if loopback may not be served: only iptables mode does, on IPv4."""
        if self.proxy.mode == "iptables" and way.family == "ipv4":
            return None
        if self.proxy.mode is not None:
            return Forecast(way=way, verdict=Verdict.DROPPED, cause=Cause.NO_LISTENER)
        return Forecast(
            way=way,
            verdict=Verdict.UNKNOWN,
            note="whether loopback is served depends on kube-proxy's mode, which is not known",
        )

    def _different(self, endpoints: Collection[EndpointAddress], way: Way) -> list[EndpointAddress]:
        """Keep one endpoint of each node, and of each kind of which the outcome may differ."""
        chosen: dict[tuple[str | None, bool, bool], EndpointAddress] = {}
        for endpoint in endpoints:
            is_on_host = self._is_on_host(endpoint, way.node)
            kind = (endpoint.node, endpoint.address == way.client, is_on_host)
            chosen.setdefault(kind, endpoint)
        return list(chosen.values())

    def _arrive(self, way: Way, endpoint: EndpointAddress) -> Forecast:
        cause = self._cause(way, endpoint)
        is_own = way.client_class is ClientClass.NODE
        if cause is None or (self._is_on_host(endpoint, way.node) and not is_own):
            return self._keep(way, endpoint)
        address, name = self._masqueraded(way, endpoint)
        advised = None
        if self._is_ipvs and cause in OF_KUBE_PROXY:
            advised = advice.cause_in_ipvs_mode(cause, way.match)
            cause = Cause.IPVS_MASQUERADE
        return Forecast(
            way=way,
            verdict=Verdict.REPLACED,
            cause=cause,
            backend_node=endpoint.node,
            seen_source=address,
            seen_name=name,
            advised=advised,
        )

    def _is_on_host(self, endpoint: EndpointAddress, node: str) -> bool:
        """
        Whether an endpoint has an address of the node itself (hostNetwork).

        What others send it is delivered at LOCAL_IN, and does not pass POST_ROUTING, where
        kube-proxy masquerades.
        """
        facts = self.nodes.get(node)
        if facts is None:
            return False
        return endpoint.address in facts.addresses or endpoint.address in facts.own_addresses

    def _keep(self, way: Way, endpoint: EndpointAddress) -> Forecast:
        """Return the outcome without masquerade; in IPVS mode replies may not come back."""
        is_own = way.client_class is ClientClass.NODE and way.match.via is not Via.NODE_PORT
        seen = way.client or CLIENT
        if self._is_ipvs and is_own:
            # The node has all Service addresses: the kernel picks the destination as source.
            seen = way.to
        is_away = way.match.via in EXTERNAL_WAYS and endpoint.node != way.node
        is_stray = is_away and (is_own or way.client_class is ClientClass.EXTERNAL)
        return Forecast(
            way=way,
            verdict=Verdict.PRESERVED,
            cause=Cause.NO_LOCAL_ENDPOINT if is_stray else None,
            backend_node=endpoint.node,
            seen_source=seen,
            note=_STRAY_NOTE if is_stray else None,
        )

    @property
    def _is_ipvs(self) -> bool:
        return self.proxy.mode == "ipvs"

    def _cause(self, way: Way, endpoint: EndpointAddress) -> Cause | None:
        """Return why kube-proxy masquerades; None if it does not."""
        if way.client == endpoint.address:
            return Cause.HAIRPIN
        if way.to.is_loopback:
            return Cause.LOCALHOST_NODEPORT
        if way.match.via in EXTERNAL_WAYS:
            is_cluster = way.match.service.external_policy is Policy.CLUSTER
            if way.client_class is ClientClass.NODE and (is_cluster or not self._is_ipvs):
                return Cause.NODE_LOCAL_SOURCE
            return Cause.EXTERNAL_TRAFFIC_POLICY_CLUSTER if is_cluster else None
        # masqueradeAll affects ClusterIPs only.
        if self.proxy.is_masquerading_all:
            return Cause.MASQUERADE_ALL
        return None if way.client_class is ClientClass.POD else Cause.OFF_CLUSTER_SOURCE

    def _masqueraded(self, way: Way, endpoint: EndpointAddress) -> tuple[IPAddress | None, str]:
        """Return the address of the interface that leads to the endpoint, and what it is."""
        node = self.nodes.get(way.node)
        if endpoint.node == way.node and not self._is_on_host(endpoint, way.node):
            gateway = node.gateway(way.family) if node else None
            return gateway, f"the pod gateway of {way.node}"
        return (node.address(way.family) if node else None), f"the node {way.node}"

    def _ways_through(
        self, service: Service, port: ServicePort, family: Family, node: str
    ) -> Iterator[Way]:
        pod, own, outside = ClientClass.POD, ClientClass.NODE, ClientClass.EXTERNAL
        for via, to, number in self._addresses(service, port, family, node):
            match = ServiceMatch(service=service, port=port, via=via)
            clients = (own,) if to.is_loopback else (pod, own, outside)
            for client_class in clients:
                yield Way(
                    match=match,
                    client_class=client_class,
                    node=node,
                    family=family,
                    to=to,
                    port=number,
                )

    def _addresses(
        self, service: Service, port: ServicePort, family: Family, node: str
    ) -> Iterator[tuple[Via, IPAddress, int]]:
        """Yield the addresses and ports by which a Service is reached through a node."""
        if not service.has_family(_version(family)):
            return
        wanted = _of(family)
        for to in filter(wanted, service.cluster_ips):
            yield Via.CLUSTER_IP, to, port.port
        for to in filter(wanted, service.external_ips):
            yield Via.EXTERNAL_IP, to, port.port
        for balancer in service.load_balancer:
            # kube-proxy ignores the address of a load balancer that proxies (ipMode: Proxy).
            if wanted(balancer.address) and not balancer.is_proxy:
                yield Via.LOAD_BALANCER, balancer.address, port.port
        if port.node_port is not None:
            address = self.nodes[node].address(family)
            if address is not None:
                yield Via.NODE_PORT, address, port.node_port
                yield Via.NODE_PORT, _LOOPBACKS[family], port.node_port


def facts_of(
    cluster: Cluster, own_addresses: Mapping[str, Collection[IPAddress]]
) -> dict[str, NodeFacts]:
    """
    Return the nodes of a cluster.

    Args:
        cluster: The cluster.
        own_addresses: By node, the addresses of all its interfaces where they could be read.
    """
    return {
        node.name: NodeFacts(
            name=node.name,
            addresses=node.addresses,
            pod_cidrs=node.pod_cidrs,
            own_addresses=frozenset(own_addresses.get(node.name, ())),
        )
        for node in cluster.nodes()
    }


def _of(family: Family) -> Callable[[IPAddress | IPNetwork], bool]:
    return lambda each: each.version == _version(family)


def _version(family: Family) -> int:
    return 4 if family == "ipv4" else 6


def _source_ranges(way: Way) -> Forecast | None:
    """Apply loadBalancerSourceRanges: a drop, or a note where the client is not known."""
    # kube-proxy treats each family on its own (newBaseServiceInfo in pkg/proxy/serviceport.go).
    ranges = tuple(filter(_of(way.family), way.match.service.source_ranges))
    if way.match.via is not Via.LOAD_BALANCER or not ranges:
        return None
    listed = ", ".join(map(str, ranges))
    if way.client is None:
        note = f"only clients in loadBalancerSourceRanges ({listed}); others are dropped"
        return Forecast(way=way, verdict=Verdict.UNKNOWN, note=note)
    if any(way.client in one for one in ranges):
        return None
    return Forecast(way=way, verdict=Verdict.DROPPED, cause=Cause.SOURCE_RANGES)
