"""
What kube-proxy in IPVS mode sets up on a node, built from the recorded objects.

Unlike the rules of the other modes this is not recorded. It follows kube-proxy's source and README
(pkg/proxy/ipvs: proxier.go, ipset.go, netlink_linux.go), with its defaults, a cluster CIDR, and the
scheduler rr. Names and types of sets, the rules and their order are those of the source.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from lab.endpoints import Endpoint, ServicePort, service_ports
from lab.hosts import FAMILIES, NODES, Address, Family, Node
from lab.ipvs_rules import rule_lines, set_name

DEVICE = "kube-ipvs0"
# Under /proc/sys/net. From Linux 5.9 on, kube-proxy leaves conn_reuse_mode as it is.
SYSCTLS = {
    "ipv4/vs/conntrack": "1",
    "ipv4/vs/expire_nodest_conn": "1",
    "ipv4/vs/expire_quiescent_template": "1",
}
_TYPES = {
    "KUBE-LOOP-BACK": "hash:ip,port,ip",
    "KUBE-CLUSTER-IP": "hash:ip,port",
    "KUBE-EXTERNAL-IP": "hash:ip,port",
    "KUBE-EXTERNAL-IP-LOCAL": "hash:ip,port",
    "KUBE-LOAD-BALANCER": "hash:ip,port",
    "KUBE-LOAD-BALANCER-FW": "hash:ip,port",
    "KUBE-LOAD-BALANCER-LOCAL": "hash:ip,port",
    "KUBE-LOAD-BALANCER-SOURCE-IP": "hash:ip,port,ip",
    "KUBE-LOAD-BALANCER-SOURCE-CIDR": "hash:ip,port,net",
    "KUBE-NODE-PORT-TCP": "bitmap:port",
    "KUBE-NODE-PORT-LOCAL-TCP": "bitmap:port",
    "KUBE-NODE-PORT-UDP": "bitmap:port",
    "KUBE-NODE-PORT-LOCAL-UDP": "bitmap:port",
    "KUBE-NODE-PORT-SCTP-HASH": "hash:ip,port",
    "KUBE-NODE-PORT-LOCAL-SCTP-HASH": "hash:ip,port",
    "KUBE-HEALTH-CHECK-NODE-PORT": "bitmap:port",
    "KUBE-IPVS-IPS": "hash:ip",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """
    What makes one node forward in IPVS mode.

    Args:
        addresses: The addresses of the device ``kube-ipvs0``.
        sets: Lines for ``ipset restore``.
        servers: Lines for ``ipvsadm --restore``.
        rules: For each family the input of ``iptables-restore``.
    """

    addresses: tuple[Address, ...]
    sets: str
    servers: str
    rules: dict[Family, str]


def setup(name: str) -> Setup:
    """Return what kube-proxy sets up on a node of the lab."""
    proxiers = {family: _Proxier(NODES[name], family) for family in FAMILIES}
    return Setup(
        addresses=tuple(ip for one in proxiers.values() for ip in one.bound),
        sets=_lines(line for one in proxiers.values() for line in one.set_lines()),
        servers=_lines(line for one in proxiers.values() for line in one.servers),
        rules={
            family: _lines(rule_lines(family, one.entries, one.closed_to_node))
            for family, one in proxiers.items()
        },
    )


def _lines(lines: Iterator[str] | list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


class _Proxier:
    """kube-proxy's part for one family on one node."""

    def __init__(self, node: Node, family: Family) -> None:
        self.node, self.family = node, family
        self.entries: dict[str, dict[str, None]] = {name: {} for name in _TYPES}
        self.servers: list[str] = []
        self.bound: dict[Address, None] = {}
        # Load-balancer addresses whose source ranges exclude the node itself.
        self.closed_to_node: list[tuple[Address, ServicePort]] = []
        for port in service_ports(family):
            self._add(port)
        self.entries["KUBE-IPVS-IPS"] = {str(ip): None for ip in self.bound}

    def _add(self, port: ServicePort) -> None:
        for endpoint in port.endpoints:
            if endpoint.node == self.node.name:
                where = f"{endpoint.address},{port.proto}:{port.target_port}"
                self._enter("KUBE-LOOP-BACK", f"{where},{endpoint.address}")
        self._add_portal(port, port.cluster_ip, "KUBE-CLUSTER-IP", is_local=port.is_internal_local)
        for ip in port.external_ips:
            local = "-LOCAL" if port.is_external_local else ""
            self._add_portal(port, ip, f"KUBE-EXTERNAL-IP{local}", is_local=port.is_external_local)
        for ip in port.load_balancer_ips:
            self._add_portal(port, ip, "KUBE-LOAD-BALANCER", is_local=port.is_external_local)
            if port.is_external_local:
                self._enter("KUBE-LOAD-BALANCER-LOCAL", f"{ip},{port.proto}:{port.port}")
            self._add_source_ranges(port, ip)
        if port.node_port is not None:
            self._add_node_port(port, port.node_port)
        if port.health_check_node_port is not None:
            self._enter("KUBE-HEALTH-CHECK-NODE-PORT", str(port.health_check_node_port))

    def _add_portal(self, port: ServicePort, ip: Address, where: str, *, is_local: bool) -> None:
        self._enter(where, f"{ip},{port.proto}:{port.port}")
        self.bound[ip] = None
        self._serve(port, ip, port.port, is_local=is_local)

    def _add_source_ranges(self, port: ServicePort, ip: Address) -> None:
        if not port.source_ranges:
            return
        where = f"{ip},{port.proto}:{port.port}"
        self._enter("KUBE-LOAD-BALANCER-FW", where)
        for network in port.source_ranges:
            self._enter("KUBE-LOAD-BALANCER-SOURCE-CIDR", f"{where},{network}")
        if any(self.node.address.of(self.family) in network for network in port.source_ranges):
            self._enter("KUBE-LOAD-BALANCER-SOURCE-IP", f"{where},{ip}")
        else:
            self.closed_to_node.append((ip, port))

    def _add_node_port(self, port: ServicePort, number: int) -> None:
        self._enter(f"KUBE-NODE-PORT-{port.proto.upper()}", str(number))
        if port.is_external_local:
            self._enter(f"KUBE-NODE-PORT-LOCAL-{port.proto.upper()}", str(number))
        # All addresses except those on loopback and on the device.
        for ip in (self.node.address.of(self.family), self.node.gateway.of(self.family)):
            self._serve(port, ip, number, is_local=port.is_external_local)

    def _enter(self, name: str, entry: str) -> None:
        self.entries[name][entry] = None

    def _serve(self, port: ServicePort, ip: Address, number: int, *, is_local: bool) -> None:
        """Add a virtual server with its real servers."""
        flag = {"tcp": "-t", "udp": "-u"}[port.proto]
        at = f"{flag} {_at(ip, number)}"
        sticky = f" -p {port.affinity_s}" if port.affinity_s is not None else ""
        self.servers.append(f"-A {at} -s rr{sticky}")
        for endpoint in self._chosen(port, is_local=is_local):
            to = _at(endpoint.address, port.target_port)
            self.servers.append(f"-a {at} -r {to} -m -w 1")

    def _chosen(self, port: ServicePort, *, is_local: bool) -> tuple[Endpoint, ...]:
        # If policy Local finds no endpoint on the node, all are used, for the node's own pods.
        # External traffic is forwarded, too, and its replies do not return through this node.
        here = tuple(each for each in port.endpoints if each.node == self.node.name)
        return here if is_local and here else port.endpoints

    def set_lines(self) -> Iterator[str]:
        family = "inet" if self.family == "ipv4" else "inet6"
        for name, kind in _TYPES.items():
            options = "range 0-65535" if kind == "bitmap:port" else f"family {family}"
            yield f"create {set_name(name, self.family)} {kind} {options}"
            for entry in self.entries[name]:
                yield f"add {set_name(name, self.family)} {entry}"


def _at(ip: Address, port: int) -> str:
    return f"{ip}:{port}" if ip.version == 4 else f"[{ip}]:{port}"
