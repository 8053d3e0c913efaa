"""The iptables rules of kube-proxy in IPVS mode, around its sets: see ``lab.ipvs``."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from lab.endpoints import ServicePort
from lab.hosts import CLUSTER, LOOPBACK_RANGES, Address, Family

# IPSET_MAXNAMELEN, without the terminating NUL
_MAX_NAME = 31
_MARK = "0x4000"
Entries = Mapping[str, Collection[str]]

# Sets with a rule of their own, in the order of the rules: set, table, chain, protocol, fields,
# target, comment. An empty set has no rule.
_RULES = (
    ("KUBE-LOOP-BACK", "nat", "KUBE-POSTROUTING", "", "dst,dst,src", "MASQUERADE",
     "Kubernetes endpoints dst ip:port, source ip for solving hairpin purpose"),
    ("KUBE-LOAD-BALANCER", "nat", "KUBE-SERVICES", "", "dst,dst", "KUBE-LOAD-BALANCER",
     "Kubernetes service lb portal"),
    ("KUBE-LOAD-BALANCER-LOCAL", "nat", "KUBE-LOAD-BALANCER", "", "dst,dst", "RETURN",
     "Kubernetes service load balancer ip + port with externalTrafficPolicy=local"),
    ("KUBE-NODE-PORT-LOCAL-TCP", "nat", "KUBE-NODE-PORT", "tcp", "dst", "RETURN",
     "Kubernetes nodeport TCP port with externalTrafficPolicy=local"),
    ("KUBE-NODE-PORT-TCP", "nat", "KUBE-NODE-PORT", "tcp", "dst", "KUBE-MARK-MASQ",
     "Kubernetes nodeport TCP port for masquerade purpose"),
    ("KUBE-NODE-PORT-LOCAL-UDP", "nat", "KUBE-NODE-PORT", "udp", "dst", "RETURN",
     "Kubernetes nodeport UDP port with externalTrafficPolicy=local"),
    ("KUBE-NODE-PORT-UDP", "nat", "KUBE-NODE-PORT", "udp", "dst", "KUBE-MARK-MASQ",
     "Kubernetes nodeport UDP port for masquerade purpose"),
    ("KUBE-LOAD-BALANCER-FW", "filter", "KUBE-PROXY-FIREWALL", "", "dst,dst",
     "KUBE-SOURCE-RANGES-FIREWALL",
     "Kubernetes service load balancer ip + port for load balancer with sourceRange"),
    ("KUBE-LOAD-BALANCER-SOURCE-CIDR", "filter", "KUBE-SOURCE-RANGES-FIREWALL", "", "dst,dst,src",
     "RETURN",
     "Kubernetes service load balancer ip + port + source cidr for packet filter purpose"),
    ("KUBE-LOAD-BALANCER-SOURCE-IP", "filter", "KUBE-SOURCE-RANGES-FIREWALL", "", "dst,dst,src",
     "RETURN",
     "Kubernetes service load balancer ip + port + source IP for packet filter purpose"),
)  # fmt: skip
_CHAINS = {
    "nat": (
        "KUBE-SERVICES", "KUBE-POSTROUTING", "KUBE-NODE-PORT", "KUBE-LOAD-BALANCER",
        "KUBE-MARK-MASQ",
    ),
    "filter": (
        "KUBE-FORWARD", "KUBE-NODE-PORT", "KUBE-PROXY-FIREWALL", "KUBE-SOURCE-RANGES-FIREWALL",
        "KUBE-IPVS-FILTER", "KUBE-IPVS-OUT-FILTER",
    ),
}  # fmt: skip
# Each jump is inserted before the existing ones: the last comes first.
_JUMPS = {
    "nat": (
        ("OUTPUT", "kubernetes service portals", "KUBE-SERVICES"),
        ("PREROUTING", "kubernetes service portals", "KUBE-SERVICES"),
        ("POSTROUTING", "kubernetes postrouting rules", "KUBE-POSTROUTING"),
    ),
    "filter": (
        ("FORWARD", "kubernetes forwarding rules", "KUBE-FORWARD"),
        ("INPUT", "kubernetes health check rules", "KUBE-NODE-PORT"),
        ("INPUT", "kube-proxy firewall rules", "KUBE-PROXY-FIREWALL"),
        ("FORWARD", "kube-proxy firewall rules", "KUBE-PROXY-FIREWALL"),
        ("INPUT", "kubernetes ipvs access filter", "KUBE-IPVS-FILTER"),
        ("OUTPUT", "kubernetes ipvs access filter", "KUBE-IPVS-OUT-FILTER"),
    ),
}


def set_name(name: str, family: Family) -> str:
    """Return the name of a set in a family: IPv6 has its own sets."""
    if family == "ipv4":
        return name
    return name.replace("KUBE-", "KUBE-6-", 1)[:_MAX_NAME]


def rule_lines(
    family: Family, entries: Entries, closed_to_node: Collection[tuple[Address, ServicePort]]
) -> Iterator[str]:
    """
    Yield lines for ``iptables-restore``.

    Args:
        family: The family.
        entries: Each set with its entries.
        closed_to_node: Load-balancer addresses that the node itself may not reach.
    """
    rules = _Rules(family, entries, closed_to_node)
    for table, lines in (("nat", rules.nat), ("filter", rules.filter)):
        yield f"*{table}"
        for chain in _CHAINS[table]:
            yield f":{chain} - [0:0]"
        for chain, comment, target in _JUMPS[table]:
            yield f'-I {chain} -m comment --comment "{comment}" -j {target}'
        yield from lines()
        yield "COMMIT"


@dataclass(frozen=True, slots=True)
class _Rules:
    family: Family
    entries: Entries
    closed_to_node: Collection[tuple[Address, ServicePort]]

    def _set_rules(self, wanted: str) -> Iterator[str]:
        for name, table, chain, proto, fields, target, comment in _RULES:
            if table == wanted and self.entries[name]:
                match = f"-p {proto} " if proto else ""
                yield (
                    f'-A {chain} {match}-m comment --comment "{comment}" '
                    f"{self._in(name, fields)} -j {target}"
                )

    def _in(self, name: str, fields: str = "dst,dst") -> str:
        return f"-m set --match-set {set_name(name, self.family)} {fields}"

    def nat(self) -> Iterator[str]:
        yield f"-A KUBE-SERVICES -s {LOOPBACK_RANGES.of(self.family)} -j RETURN"
        yield from self._set_rules("nat")
        yield (
            '-A KUBE-SERVICES -m comment --comment "Kubernetes service cluster ip + port for '
            f'masquerade purpose" {self._in("KUBE-CLUSTER-IP")} '
            f"! -s {CLUSTER.of(self.family)} -j KUBE-MARK-MASQ"
        )
        yield from self._external_rules(
            "KUBE-EXTERNAL-IP",
            "Kubernetes service external ip + port for masquerade and filter purpose",
            "KUBE-MARK-MASQ",
        )
        yield from self._external_rules(
            "KUBE-EXTERNAL-IP-LOCAL",
            "Kubernetes service external ip + port with externalTrafficPolicy=local",
        )
        yield "-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODE-PORT"
        yield "-A KUBE-LOAD-BALANCER -j KUBE-MARK-MASQ"
        for name in ("KUBE-CLUSTER-IP", "KUBE-LOAD-BALANCER"):
            if self.entries[name]:
                yield f"-A KUBE-SERVICES {self._in(name)} -j ACCEPT"
        yield f"-A KUBE-POSTROUTING -m mark ! --mark {_MARK}/{_MARK} -j RETURN"
        yield f"-A KUBE-POSTROUTING -j MARK --xor-mark {_MARK}"
        yield (
            '-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" '
            "-j MASQUERADE --random-fully"
        )
        yield f"-A KUBE-MARK-MASQ -j MARK --or-mark {_MARK}"

    def _external_rules(self, name: str, comment: str, *targets: str) -> Iterator[str]:
        if not self.entries[name]:
            return
        match = f'-A KUBE-SERVICES -m comment --comment "{comment}" {self._in(name)}'
        for target in targets:
            yield f"{match} -j {target}"
        yield f"{match} -m physdev ! --physdev-is-in -m addrtype ! --src-type LOCAL -j ACCEPT"
        yield f"{match} -m addrtype --dst-type LOCAL -j ACCEPT"

    def filter(self) -> Iterator[str]:
        yield from self._set_rules("filter")
        yield "-A KUBE-SOURCE-RANGES-FIREWALL -j DROP"
        for ip, port in self.closed_to_node:
            yield (
                f"-A KUBE-IPVS-OUT-FILTER -s {ip} -m ipvs --vaddr {ip} --vproto {port.proto} "
                f"--vport {port.port} -j DROP"
            )
        yield (
            '-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" '
            f"-m mark --mark {_MARK}/{_MARK} -j ACCEPT"
        )
        yield (
            '-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule" '
            "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
        )
        yield (
            '-A KUBE-NODE-PORT -m comment --comment "Kubernetes health check node port" '
            f"{self._in('KUBE-HEALTH-CHECK-NODE-PORT', 'dst')} -j ACCEPT"
        )
        for name in (
            "KUBE-LOAD-BALANCER",
            "KUBE-CLUSTER-IP",
            "KUBE-EXTERNAL-IP",
            "KUBE-EXTERNAL-IP-LOCAL",
        ):
            yield f"-A KUBE-IPVS-FILTER {self._in(name)} -j RETURN"
        yield f"-A KUBE-IPVS-FILTER {self._in('KUBE-HEALTH-CHECK-NODE-PORT', 'dst')} -j RETURN"
        yield (
            "-A KUBE-IPVS-FILTER -m conntrack --ctstate NEW "
            f"{self._in('KUBE-IPVS-IPS', 'dst')} -j REJECT"
        )
