"""
Every connection of the lab's table, judged without a kernel.

The conntrack entries are written down as the two nodes would hold them; what must come of them
is the scenario table's word.
"""

from dataclasses import replace

import pytest

from lab import hosts, scenarios
from lab.agreement import Traced
from lab.probe import Answer
from lab.scenarios import cases
from tests.unit import samples, world
from tests.unit.rules import names_port
from tests.unit.samples import FiveTuple
from tests.unit.world import ETH0, MARK, POD_A, POD_B, dumped, view
from tracer.judge.cause import Cause
from tracer.judge.connection import judge_connection
from tracer.judge.drop import judge_drop
from tracer.judge.verdict import Verdict
from tracer.model import PROTOCOLS, Status
from tracer.ruleset.model import Owner

BACKEND = hosts.PODS["p11"]
PORTS = {"tcp": 8080, "udp": 8053}
SPORT = 40000


def first_node(case):
    """The node that translates or drops what the client sends."""
    scenario = case.scenario
    if scenario.client in hosts.PODS:
        return hosts.PODS[scenario.client].node.name
    if scenario.client in hosts.NODES:
        return scenario.client
    return scenario.through or scenario.target


def sent_by(case):
    source = case.source or scenarios.address(case.scenario.client, case.family)
    if case.scenario.target == "loopback":
        source = hosts.LOOPBACK.of(case.family)
    return FiveTuple(
        src=source, dst=case.destination, sport=SPORT, dport=case.port, proto=PROTOCOLS[case.proto]
    )


def way_in(case, node):
    """The interface that the packet comes in by, 0 if it was made on the node."""
    if case.scenario.client in hosts.NODES:
        return 0
    if case.scenario.client not in hosts.PODS or node != first_node(case):
        return ETH0
    return {"p11": POD_A, "p12": POD_B, "p21": POD_A}[case.scenario.client]


def entries(case):
    """The conntrack entries, as pairs of a node and its connection, along the path."""
    node, orig = first_node(case), sent_by(case)
    is_egress = case.scenario.service is None
    backend, port = (
        (case.destination, case.port)
        if is_egress
        else (BACKEND.address.of(case.family), PORTS[case.proto])
    )
    reply = replace(orig.inverted, src=backend, sport=port, dst=case.expected_client_address)
    status = Status.CONFIRMED | (Status(0) if is_egress else Status.DST_NAT)
    status |= Status.SRC_NAT if reply.dst != orig.src else Status(0)
    # In nftables mode a hairpin is recognised by its addresses, and not marked.
    has_mark = (
        case.verdict == "replaced"
        and not is_egress
        and (case.scenario.id, case.mode) != ("S12", "nftables")
    )
    is_there = not is_egress and node == BACKEND.node.name
    path = [
        (
            node,
            samples.connection(
                orig, reply, status=status, mark=MARK if has_mark else 0,
                iif=way_in(case, node), oif=POD_A if is_there else ETH0,
            ),
        )
    ]  # fmt: skip
    if not is_there and not is_egress:
        onward = reply.inverted
        path.append(
            (
                BACKEND.node.name,
                samples.connection(
                    onward, onward.inverted, status=Status.CONFIRMED, iif=ETH0, oif=POD_A
                ),
            )
        )
    return path


def judged_along(case, see=lambda connection: connection, **known):
    return [
        judge_connection(see(connection), view(node, case.mode, **known), time_ns=0)
        for node, connection in entries(case)
    ]


def judged_drop(case, **known):
    """Where the case's first packet is discarded, judged."""
    node, packet = first_node(case), sent_by(case)
    is_nobody = case.cause == "no-listener"
    iif = 1 if is_nobody else way_in(case, node)
    is_six = case.family == "ipv6"
    values = {"iif": iif, "ifindex": iif, "dst_ifindex": ETH0, "dst_input": 1}
    dst_input = "ip6_forward" if is_six else "ip_forward"
    if case.scenario.via == "nodeport":
        values["dst_ifindex"] = 1
        dst_input = "ip6_input" if is_six else "ip_local_deliver"
    if (case.scenario.id, case.mode) == ("S16b", "nftables"):
        # Its firewall comes before the routing decision.
        values |= {"dst_input": None, "dst_ifindex": 0}
        dst_input = None
    return judge_drop(
        samples.drop(packet=packet, orig=packet, **values),
        view(node, case.mode, **known),
        time_ns=0,
        reason="NO_SOCKET" if is_nobody else "NETFILTER_DROP",
        place="nf_hook_slow",
        dst_input=dst_input,
    )


def found(case, judged):
    traced = Traced()
    traced.add(judged)
    answer = Answer(
        outcome=case.expected_outcome,
        client_address=case.expected_client_address,
        local=(sent_by(case).src, SPORT),
    )
    return traced.find(case, answer)


ARRIVED = [case for case in cases() if case.verdict != "dropped"]
FROM_PODS = [case for case in ARRIVED if case.scenario.id in ("S17a", "S17b")]
DROPPED = [case for case in cases() if case.verdict == "dropped"]


@pytest.mark.parametrize("case", FROM_PODS, ids=str)
def test_policy_local_does_not_bind_pods(case):
    """A pod reaches another node's endpoint in spite of policy Local; that is not IPVS mode's."""
    first, _ = judged_along(case)
    last = first.opinion.evidence[-1]
    why = "on node1: kube-proxy applies it to external clients, not to pods"
    assert last.endswith(why)
    first, _ = judged_along(case, rules=None)
    assert f"{why}; or kube-proxy in IPVS mode uses" in first.opinion.evidence[-1]


@pytest.mark.parametrize("case", ARRIVED, ids=str)
def test_arrived(case):
    """Verdict, cause and address are the table's, over the whole path."""
    judged = judged_along(case)
    finding = found(case, judged)
    assert finding.hops == tuple(judged)
    assert (finding.verdict, finding.cause) == (case.verdict, case.cause)
    assert finding.seen_source == case.expected_client_address
    assert finding.agrees
    service = judged[0].opinion.service
    assert (service.name if service else None) == case.scenario.service
    assert (service.via if service else "none") == case.scenario.via
    if case.verdict == "replaced":
        assert judged[0].opinion.rule.owner is (
            Owner.UNKNOWN if case.scenario.service is None else Owner.KUBE_PROXY
        )
        assert judged[0].opinion.advice


@pytest.mark.parametrize("case", ARRIVED, ids=str)
def test_arrived_and_found_in_conntrack(case):
    """The same without marks and interfaces, where the tuples show the SNAT."""
    finding = found(case, judged_along(case, dumped))
    if case.expected_client_address == sent_by(case).src and case.verdict == "replaced":
        # Masquerading picked the address that it had: conntrack does not show it.
        assert finding.verdict in (Verdict.PRESERVED, Verdict.REPLACED_UPSTREAM)
        return
    assert finding.agrees


@pytest.mark.parametrize("case", ARRIVED, ids=str)
def test_second_node_alone(case):
    """The backend's node alone sees another node as the client, and names who may have done it."""
    judged = judged_along(case)
    if len(judged) == 1:
        return
    seen, opinion = case.expected_client_address, judged[1].opinion
    is_node = seen == hosts.NODE2.address.of(case.family)
    # The pod is behind several policy-Cluster Services: which one it was is not known.
    assert (opinion.verdict, opinion.cause, opinion.service) == (
        (Verdict.REPLACED_UPSTREAM, Cause.EXTERNAL_TRAFFIC_POLICY_CLUSTER, None)
        if is_node
        else (Verdict.PRESERVED, None, None)
    )


@pytest.mark.parametrize("case", DROPPED, ids=str)
def test_dropped(case):
    """The cause is the table's; the Service is named, and the rule if one did it."""
    judged = judged_drop(case)
    finding = found(case, [judged])
    assert (finding.drop, finding.seen_source) == (judged, None)
    assert (finding.verdict, finding.cause) == (case.verdict, case.cause)
    assert finding.agrees
    opinion = judged.opinion
    assert (opinion.service.name, opinion.service.via) == (case.scenario.service, case.scenario.via)
    assert (opinion.rule is None) == (case.cause == "no-listener")
    if opinion.rule is not None:
        assert opinion.rule.owner is Owner.KUBE_PROXY
        assert names_port(opinion.rule, case)
    assert opinion.advice


@pytest.mark.parametrize("case", DROPPED, ids=str)
def test_dropped_without_rules(case):
    """The Services' state is enough to tell the cause."""
    assert found(case, [judged_drop(case, rules=None)]).agrees


def test_cases_are_all_there():
    """Both modes, both families and protocols, and every scenario but those behind a proxy."""
    assert len(ARRIVED) + len(DROPPED) == 212
    assert {case.scenario.id for case in (*ARRIVED, *DROPPED)} == {
        scenario.id for scenario in scenarios.SCENARIOS if scenario.relay is None
    }
    assert world.CLUSTER.counts.nodes == len(hosts.NODES)
