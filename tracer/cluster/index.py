"""
The cluster index: look up what an address and port are, in an immutable snapshot.

A change creates a new snapshot that shares everything but the change with the old one.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network

from tracer.cluster.claims import (
    CLUSTER_IP_RANK,
    EXTERNAL_IP_RANK,
    LOAD_BALANCER_RANK,
    Claim,
    Kind,
    Owner,
    Topic,
    is_loopback,
    network_of,
    number,
    socket,
)
from tracer.cluster.match import (
    Counts,
    EndpointAddress,
    Family,
    HostPortMatch,
    PodRef,
    ServiceMatch,
    Via,
)
from tracer.cluster.objects import (
    Endpoint,
    EndpointSlice,
    HostPort,
    Node,
    Object,
    Pod,
    Service,
    ServiceKey,
    ServicePort,
)
from tracer.cluster.state import State
from tracer.model import ClientClass, IPAddress, IPNetwork

_VIAS = {
    CLUSTER_IP_RANK: Via.CLUSTER_IP,
    EXTERNAL_IP_RANK: Via.EXTERNAL_IP,
    LOAD_BALANCER_RANK: Via.LOAD_BALANCER,
}
_LOOPBACKS = (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """
    A snapshot of the cluster. Without arguments it is empty; see `build`.

    ``updated_ns`` is a time that the caller sets, on a clock of its choice.
    """

    updated_ns: int = field(default=0, compare=False)
    _state: State = field(default_factory=State)

    @classmethod
    def build(cls, objects: Iterable[Object], *, updated_ns: int = 0) -> "Cluster":
        """Index objects; of several with the same identity the last wins."""
        return cls().changed(put=objects, updated_ns=updated_ns)

    def changed(
        self, *, put: Iterable[Object] = (), remove: Iterable[Owner] = (), updated_ns: int = 0
    ) -> "Cluster":
        """
        Return a snapshot with many changes applied, removals first.

        Returns this snapshot itself if nothing changes.
        """
        state = self._state.changed(put, remove)
        return self if state is self._state else Cluster(_state=state, updated_ns=updated_ns)

    @property
    def counts(self) -> Counts:
        """How many objects there are."""
        services, slices, nodes, pods = (len(table) for table in self._state.objects)
        return Counts(services=services, endpoint_slices=slices, nodes=nodes, pods=pods)

    # Objects

    def service(self, namespace: str, name: str) -> Service | None:
        """Return a Service by name."""
        found = self._state.get(Owner(Kind.SERVICE, namespace, name))
        return found if isinstance(found, Service) else None

    def services(self) -> list[Service]:
        """Return all Services by namespace and name."""
        return [found for found in self._sorted(Kind.SERVICE) if isinstance(found, Service)]

    def node(self, name: str) -> Node | None:
        """Return a Node by name."""
        found = self._state.get(Owner(Kind.NODE, "", name))
        return found if isinstance(found, Node) else None

    def nodes(self) -> list[Node]:
        """Return all Nodes by name."""
        return [found for found in self._sorted(Kind.NODE) if isinstance(found, Node)]

    def pod(self, namespace: str, name: str) -> Pod | None:
        """Return a Pod by name; a watch has only those of its own node."""
        found = self._state.get(Owner(Kind.POD, namespace, name))
        return found if isinstance(found, Pod) else None

    def pods(self) -> list[Pod]:
        """Return all known Pods by namespace and name."""
        return [found for found in self._sorted(Kind.POD) if isinstance(found, Pod)]

    def owners(self, kind: Kind) -> Iterator[Owner]:
        """Yield the identities of all objects of a kind, in no particular order."""
        return (owner for owner, _ in self._state.objects[kind].items())

    # Services

    def service_at(
        self,
        address: IPAddress,
        port: int,
        proto: int,
        *,
        node_addresses: Collection[IPAddress] = (),
        node: str | None = None,
    ) -> ServiceMatch | HostPortMatch | None:
        """
        Return what a client reaches at an address and port, before any NAT.

        A pod's own address is not a Service's: see `services_of_endpoint`.

        Args:
            address: The destination address.
            port: The destination port.
            proto: IP protocol number.
            node_addresses: Addresses of the traced node that no object holds, such as the pod
                gateway. NodePorts and host ports answer there too, and on loopback.
            node: The traced node's name, to tell its host ports from other nodes'.
        """
        claims = self._state.at(Topic.SOCKET, socket(address, port, proto))
        if claims:
            return self._match(claims[0], _VIAS[claims[0].rank])
        owner = self.node_of(address)
        if owner is None and not is_loopback(number(address)) and address not in node_addresses:
            return None
        for claim in self._state.at(Topic.NODE_PORT, (port, proto)):
            match = self._match(claim, Via.NODE_PORT)
            if match is not None and match.service.has_family(address.version):
                return match
        owner = owner or node or self._only_node(node_addresses)
        return self._host_port_at(owner, address, port, proto) if owner else None

    def services_of_endpoint(
        self, address: IPAddress, port: int, proto: int
    ) -> tuple[Service, ...]:
        """Return the Services with this backend, including headless ones, whatever its state."""
        found: dict[ServiceKey, Service] = {}
        for claim in self._state.at(Topic.ENDPOINT, number(address)):
            slice_ = self._state.get(claim.owner)
            if not isinstance(slice_, EndpointSlice) or slice_.service is None:
                continue
            # A headless Service may have no ports.
            if slice_.ports and not any(p.port == port and p.proto == proto for p in slice_.ports):
                continue
            service = self.service(slice_.namespace, slice_.service)
            if service is not None:
                found[service.key] = service
        return tuple([found[key] for key in sorted(found)])

    def endpoints(
        self, service: tuple[str, str], port: ServicePort, family: Family
    ) -> tuple[EndpointAddress, ...]:
        """
        Return the backends of a Service port, merged over its EndpointSlices.

        An endpoint that moves may be in two slices for a while; then the ready one counts.

        Args:
            service: The Service's key.
            port: Its port. One of another protocol may have the same name.
            family: Address family.
        """
        found: dict[tuple[IPAddress, int], EndpointAddress] = {}
        for slice_ in self.endpoint_slices(service):
            for name, proto, number_ in slice_.ports if slice_.family == family else ():
                is_same = (name, proto) == (port.name, port.proto)
                for endpoint in slice_.endpoints if is_same else ():
                    backend = EndpointAddress.of(endpoint, number_)
                    known = found.setdefault((backend.address, number_), backend)
                    if backend.is_ready and not known.is_ready:
                        found[backend.address, number_] = backend
        return tuple(found.values())

    def endpoint_slices(self, service: tuple[str, str]) -> list[EndpointSlice]:
        """Return a Service's EndpointSlices of both families, in order of name."""
        claims = self._state.at(Topic.SLICES, (service[0], service[1]))
        slices = (self._state.get(claim.owner) for claim in claims)
        return [slice_ for slice_ in slices if isinstance(slice_, EndpointSlice)]

    # Addresses

    def node_of(self, address: IPAddress) -> str | None:
        """Return the Node that has this address."""
        claims = self._state.at(Topic.NODE, number(address))
        return claims[0].owner.name if claims else None

    def pod_at(self, address: IPAddress) -> PodRef | None:
        """Return the pod that has this address, from Pods, else from EndpointSlices."""
        return self._pod_at(number(address))

    def node_of_pod_address(self, address: IPAddress) -> str | None:
        """Return the node of the pod at an address, else the node whose pod CIDR contains it."""
        pod = self.pod_at(address)
        if pod is not None and pod.node is not None:
            return pod.node
        claims = self._state.covering(number(address))
        return claims[0].owner.name if claims else None

    def pod_cidrs(self) -> list[tuple[IPNetwork, str]]:
        """Return the Nodes' pod CIDRs, each with its node."""
        found = sorted(self._state.cidrs())
        return [(network_of(length, bits), node) for length, bits, node in found]

    def classify(self, address: IPAddress) -> ClientClass:
        """Return what an address is in the cluster."""
        return self._classify(number(address))

    def prefixes(self) -> Iterator[tuple[IPNetwork, ClientClass]]:
        """
        Yield prefixes whose longest match gives the class of `classify`; no match means external.

        Addresses that a Node's pod CIDR covers are not listed one by one.
        """
        yield from ((network, ClientClass.LOOPBACK) for network in _LOOPBACKS)
        for length, bits, _ in self._state.cidrs():
            # A pod CIDR inside loopback, or equal to a node's address, would win over it.
            is_inside = length >= 104 and is_loopback(bits << (128 - length))
            is_node = length == 128 and self._state.at(Topic.NODE, bits)
            if not is_inside and not is_node:
                yield network_of(length, bits), ClientClass.POD
        seen: set[int] = set()
        for topic in (Topic.NODE, Topic.POD, Topic.ENDPOINT, Topic.LOAD_BALANCER):
            for key in self._state.addresses(topic):
                if key in seen or (topic is not Topic.NODE and self._state.covering(key)):
                    continue
                seen.add(key)
                found = self._classify(key)
                if found not in (ClientClass.EXTERNAL, ClientClass.LOOPBACK):
                    yield network_of(128, key), found

    def _sorted(self, kind: Kind) -> list[Object]:
        return [obj for _, obj in sorted(self._state.objects[kind].items(), key=lambda kv: kv[0])]

    def _match(self, claim: Claim, via: Via) -> ServiceMatch | None:
        service = self.service(claim.owner.namespace, claim.owner.name)
        if service is None or not isinstance(claim.what, ServicePort):
            return None
        return ServiceMatch(service=service, port=claim.what, via=via)

    def _only_node(self, addresses: Collection[IPAddress]) -> str | None:
        names = {name for name in map(self.node_of, addresses) if name is not None}
        return names.pop() if len(names) == 1 else None

    def _host_port_at(
        self, node: str, address: IPAddress, port: int, proto: int
    ) -> HostPortMatch | None:
        for claim in self._state.at(Topic.HOST_PORT, (node, port, proto)):
            for host_port in claim.what if isinstance(claim.what, tuple) else ():
                if isinstance(host_port, HostPort) and host_port.address in (None, address):
                    pod = PodRef(claim.owner.namespace, claim.owner.name, node)
                    return HostPortMatch(pod=pod, port=host_port)
        return None

    def _pod_at(self, key: int) -> PodRef | None:
        if self._state.at(Topic.NODE, key):
            return None  # hostNetwork pods share a node's address
        for claim in self._state.at(Topic.POD, key):
            pod = self._state.get(claim.owner)
            node = pod.node if isinstance(pod, Pod) else None
            return PodRef(claim.owner.namespace, claim.owner.name, node)
        for claim in self._state.at(Topic.ENDPOINT, key):
            if isinstance(claim.what, Endpoint) and claim.what.pod is not None:
                return PodRef(*claim.what.pod, claim.what.node)
        return None

    def _classify(self, key: int) -> ClientClass:
        if is_loopback(key):
            return ClientClass.LOOPBACK
        if self._state.at(Topic.NODE, key):
            return ClientClass.NODE
        if self._state.covering(key) or self._pod_at(key) is not None:
            return ClientClass.POD
        if self._state.at(Topic.LOAD_BALANCER, key):
            return ClientClass.LOADBALANCER
        return ClientClass.EXTERNAL
