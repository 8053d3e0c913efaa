"""
The scenarios that the tracer must explain, and their connections.

The table itself is in ``lab.table``. ``python -m lab.scenarios`` prints it for the documentation.
"""

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import product

from lab import hosts
from lab.hosts import FAMILIES, HTTP_PORT, NODES, PODS, UDP_PORT, Address, Family
from lab.kube_proxy import ALL_MODES, MODES, Mode
from lab.model import Except, Expectation, Outcome, Scenario
from lab.services import PROTOS, Proto, pick, services
from lab.table import SCENARIOS

__all__ = ["SCENARIOS", "Case", "Scenario", "address", "cases", "destination", "markdown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """
    One connection of a scenario, with its addresses.

    ``source`` is the address to bind, None to leave the choice to the kernel.
    ``expected_client_address`` is what the backend prints, None if no backend is reached.
    """

    scenario: Scenario
    mode: Mode
    family: Family
    proto: Proto
    source: Address | None
    destination: Address
    port: int
    expected_client_address: Address | None
    expected_outcome: Outcome
    expected_or_outcome: Outcome | None
    verdict: str
    cause: str | None

    @property
    def host(self) -> str:
        """The host of the lab that connects."""
        return "client" if self.scenario.client == "client2" else self.scenario.client

    def is_met(self, outcome: Outcome, client_address: Address | None) -> bool:
        """Whether this is an expected outcome of the connection."""
        return (
            outcome in (self.expected_outcome, self.expected_or_outcome)
            and client_address == self.expected_client_address
        )

    def __str__(self) -> str:
        return f"{self.scenario.id} {self.mode} {self.family} {self.proto}"


def cases(
    modes: Collection[str] = MODES,
    families: Collection[str] = FAMILIES,
    protos: Collection[str] = PROTOS,
    scenarios: Collection[str] = (),
    *,
    has_relay: bool = False,
) -> list[Case]:
    """
    Return the connections of the table, grouped by mode.

    Those through a proxy are left out unless they are asked for: they need a running proxy, and
    its headers must be read.

    Args:
        modes: Only these modes of kube-proxy; IPVS, which needs a kernel with it, must be named.
        families: Only these address families.
        protos: Only these protocols.
        scenarios: Only the scenarios with these ids; all if empty.
        has_relay: Whether "all" includes those through a proxy.
    """
    return [
        _case(scenario, mode, family, proto)
        for mode, scenario in product(ALL_MODES, SCENARIOS)
        if mode in modes
        and (scenario.id in scenarios if scenarios else has_relay or scenario.relay is None)
        for family, proto in product(scenario.families, scenario.protos)
        if family in families and proto in protos
    ]


def _case(scenario: Scenario, mode: Mode, family: Family, proto: Proto) -> Case:
    expect = scenario.expected(mode, family, proto)
    to, port = destination(scenario, family, proto)
    return Case(
        scenario=scenario,
        mode=mode,
        family=family,
        proto=proto,
        source=hosts.CLIENT2 if scenario.client == "client2" else None,
        destination=to,
        port=port,
        expected_client_address=_seen(expect.seen, scenario.client, family),
        expected_outcome=expect.outcome,
        expected_or_outcome=expect.or_outcome,
        verdict=expect.verdict,
        cause=expect.cause,
    )


def destination(scenario: Scenario, family: Family, proto: Proto) -> tuple[Address, int]:
    """Return the address and the port that the client of a scenario connects to."""
    if scenario.relay is not None:
        return hosts.ROUTER_TO_CLIENT.of(family), scenario.relay.port
    if scenario.service is None:
        return address(scenario.target or "", family), HTTP_PORT if proto == "tcp" else UDP_PORT
    service = services()[scenario.service]
    port = service.ports[proto]
    match scenario.via:
        case "nodeport" if port.node_port is not None:
            return address(scenario.target or "", family), port.node_port
        case "loadbalancer":
            return pick(service.load_balancer_ips, family), port.port
        case "externalip":
            return pick(service.external_ips, family), port.port
        case "clusterip":
            return pick(service.cluster_ips, family), port.port
    raise ValueError(f"Service {service.name} cannot be reached via {scenario.via}")


def _seen(who: str | None, client: str, family: Family) -> Address | None:
    if who is None:
        return None
    return address(client if who == "client" else who, family)


def address(who: str, family: Family) -> Address:
    """Return the address of a host, of the ``gateway of`` a node, or of ``loopback``."""
    kind, _, node = who.rpartition(" of ")
    if kind == "gateway":
        return NODES[node].gateway.of(family)
    if who == "client2" and family == "ipv4":
        return hosts.CLIENT2
    if who in NODES:
        return NODES[who].address.of(family)
    if who in PODS:
        return PODS[who].address.of(family)
    others = {
        "client": hosts.CLIENT,
        "router": hosts.ROUTER_TO_NODES,
        "loopback": hosts.LOOPBACK,
    }
    return others[who].of(family)


def markdown() -> str:
    """Return the table as the documentation shows it."""
    return "\n".join((_INTRODUCTION, *map(_row, SCENARIOS))) + "\n"


_INTRODUCTION = """\
# Scenarios

Each row is a scenario of `srcip demo` and a test of the lab, in IPv4 and IPv6, over TCP and UDP,
with kube-proxy in iptables and in nftables mode. The backend's echo server prints what it sees, and
srcip's verdict must agree. S9 is TCP only: a proxy on the router connects to the Service and names
the client in its header.

IPVS mode needs a kernel with IPVS: `srcip demo --mode ipvs` ([kernels.md](kernels.md#ipvs)). Each
row shows where IPVS mode differs. In this mode three of kube-proxy's causes are all called
`ipvs-masquerade`: `external-traffic-policy-cluster`, `off-cluster-source` and `node-local-source`.
With policy Local and no endpoint on the node, IPVS mode sends traffic from outside to another
node's endpoint. The endpoint sees the client, but its replies do not reach the client.

| # | scenario | the backend sees (IPv4) | verdict | cause |
|---|---|---|---|---|"""


def _row(scenario: Scenario) -> str:
    columns = (
        scenario.id,
        scenario.title if scenario.observed else f"{scenario.title} (not in `observed.jsonl`)",
        _column(scenario, lambda expect: _told(scenario, expect)),
        _column(scenario, lambda expect: expect.verdict),
        _column(scenario, lambda expect: expect.cause or "-"),
    )
    return f"| {' | '.join(columns)} |"


def _column(scenario: Scenario, text: Callable[[Expectation], str]) -> str:
    usual = text(scenario.expect)
    others: dict[str, list[str]] = {}
    for other in scenario.exceptions:
        others.setdefault(text(other.expect), []).append(_where(other))
    others.pop(usual, None)
    return "; ".join((usual, *(f"{', '.join(where)}: {told}" for told, where in others.items())))


def _told(scenario: Scenario, expect: Expectation) -> str:
    seen = _seen(expect.seen, scenario.client, "ipv4")
    if seen is None:
        return f"nothing ({expect.outcome})"
    return f"{seen} ({'the client' if expect.seen == 'client' else expect.seen})"


def _where(other: Except) -> str:
    words = {"ipv4": "IPv4", "ipv6": "IPv6", "tcp": "TCP", "udp": "UDP"}
    chosen = ((other.modes, ALL_MODES), (other.families, FAMILIES), (other.protos, PROTOS))
    return " ".join(
        "/".join(words.get(one, one) for one in some) for some, every in chosen if some != every
    )


if __name__ == "__main__":
    sys.stdout.write(markdown())
