"""The recorded rules of a real kube-proxy, and the lab's own masquerade beside them."""

from dataclasses import replace
from functools import cache
from ipaddress import ip_network
from pathlib import Path

import pytest

from lab import hosts, scenarios
from lab.kube_proxy import DATA
from lab.scenarios import cases
from tests.unit.rules import names_port
from tracer.model import TCP, UDP
from tracer.ruleset.iptables import parse_save
from tracer.ruleset.model import Action, Flow, Owner, Ruleset
from tracer.ruleset.nftables import parse_ruleset

FILES = Path(__file__).parents[1] / "data" / "rulesets"
MARK = 0x4000
BACKEND = hosts.PODS["p11"]
BACKEND_PORTS = {"tcp": 8080, "udp": 8053}
NUMBERS = {"tcp": TCP, "udp": UDP}
NODES = ("node1", "node2")
MODES = ("iptables", "nftables")


@cache
def ruleset(mode, node):
    """Read what was recorded of a node, as its tools print it."""
    if mode == "nftables":
        return Ruleset.of([parse_ruleset((FILES / f"kube-proxy-{node}.json").read_text())])
    saves = DATA / "iptables"
    return Ruleset.of(
        [
            parse_save((saves / f"{node}.iptables").read_text(), "ipv4"),
            parse_save((saves / f"{node}.ip6tables").read_text(), "ipv6"),
            parse_ruleset((FILES / f"masquerade-{node}.json").read_text()),
        ]
    )


def node_of(case):
    """The node at which the client's packet is translated or dropped."""
    scenario = case.scenario
    if scenario.client in hosts.PODS:
        return hosts.PODS[scenario.client].node.name
    if scenario.client in hosts.NODES:
        return scenario.client
    return scenario.target or scenario.through


def local_addresses(node):
    here = hosts.NODES[node]
    return frozenset(
        address.of(family) for address in (here.address, here.gateway) for family in hosts.FAMILIES
    )


def postrouting(case):
    """The case's packet where SNAT is decided, after DNAT to the backend."""
    scenario, node = case.scenario, node_of(case)
    client = scenarios.address(scenario.client, case.family)
    is_egress = scenario.service is None
    # In nftables mode a hairpin is recognised by its addresses, in iptables mode by the mark.
    is_marked = not is_egress and (scenario.id, case.mode) != ("S12", "nftables")
    is_here = BACKEND.node.name == node and not is_egress
    return Flow(
        src=client,
        dst=case.destination if is_egress else BACKEND.address.of(case.family),
        sport=40000,
        dport=case.port if is_egress else BACKEND_PORTS[case.proto],
        proto=NUMBERS[case.proto],
        orig_dst=case.destination,
        orig_dport=case.port,
        mark=MARK if is_marked else 0,
        oif="veth-p11" if is_here else "eth0",
        seen_source=case.expected_client_address,
        local_addresses=local_addresses(node),
    )


REPLACED = [case for case in cases() if case.verdict == "replaced"]
PRESERVED = [case for case in cases() if case.verdict == "preserved"]
# No rule drops it: no socket listens there.
DROPPED = [
    case for case in cases() if case.verdict == "dropped" and case.scenario.id not in {"S14e"}
]


@pytest.mark.parametrize("case", REPLACED, ids=str)
def test_replaced_source_has_its_certain_rule(case):
    """kube-proxy owns what it masquerades; the rest has no known owner."""
    candidates = ruleset(case.mode, node_of(case)).snat_candidates(postrouting(case))
    rule = candidates.certain
    assert rule is not None, candidates.reason
    assert candidates.possible == (rule,)
    assert rule.action is Action.MASQUERADE
    assert rule.hook == "postrouting"
    if case.scenario.service is None:
        assert (rule.table, rule.owner, rule.tool) == ("lab-masq", Owner.UNKNOWN, "nftables")
        assert rule.text.startswith('oifname "eth0" ip')
    else:
        assert rule.owner is Owner.KUBE_PROXY
        assert rule.tool == case.mode
        assert rule.chain in {"KUBE-POSTROUTING", "masquerading"}


@pytest.mark.parametrize("case", PRESERVED, ids=str)
def test_preserved_source_meets_no_rule(case):
    """Where the backend sees the client, no rule can have matched: the mark is not set."""
    flow = replace(postrouting(case), mark=0, seen_source=None)
    candidates = ruleset(case.mode, node_of(case)).snat_candidates(flow)
    assert (candidates.certain, candidates.possible) == (None, ())
    assert candidates.reason == "no rule replaces the source"


@pytest.mark.parametrize("case", REPLACED, ids=str)
def test_unknown_mark_leaves_candidates(case):
    """If nobody saw the mark, the rule is among the candidates, and none is certain if it hangs
    on the mark."""
    flow = replace(postrouting(case), mark=None, seen_source=None)
    candidates = ruleset(case.mode, node_of(case)).snat_candidates(flow)
    right = ruleset(case.mode, node_of(case)).snat_candidates(postrouting(case)).certain
    assert right in candidates.possible
    if "mark" in right.text or right.chain == "KUBE-POSTROUTING":
        assert candidates.certain is None


def at_hook(case):
    """The case's packet where kube-proxy drops it, and that hook's name."""
    scenario, node = case.scenario, node_of(case)
    is_local = scenario.via == "nodeport"
    hook = "input" if is_local else "forward"
    if scenario.id == "S16b" and case.mode == "nftables":
        hook = "prerouting"
    source = case.source or scenarios.address(scenario.client, case.family)
    flow = Flow(
        src=source,
        dst=case.destination,
        sport=40000,
        dport=case.port,
        proto=NUMBERS[case.proto],
        orig_dst=case.destination,
        orig_dport=case.port,
        mark=0,
        iif="eth0",
        local_addresses=local_addresses(node),
    )
    return flow, hook


@pytest.mark.parametrize("case", DROPPED, ids=str)
def test_dropped_packet_has_its_certain_rule(case):
    """Each drop is kube-proxy's own rule, and it names the Service's port."""
    flow, hook = at_hook(case)
    candidates = ruleset(case.mode, node_of(case)).drop_candidates(flow, hook)
    rule = candidates.certain
    assert rule is not None, candidates.reason
    assert rule.owner is Owner.KUBE_PROXY
    assert rule.hook == hook
    assert names_port(rule, case)
    is_refused = case.scenario.id in {"S15a", "S15b"}
    assert rule.action is (Action.REJECT if is_refused else Action.DROP)


@pytest.mark.parametrize("case", DROPPED, ids=str)
def test_dropped_packet_that_may_be_of_any_state_has_one_candidate(case):
    """If a packet need not be its connection's first, the rule is still the only candidate."""
    flow, hook = at_hook(case)
    rules = ruleset(case.mode, node_of(case))
    unsure = replace(flow, states=frozenset({"new", "established", "related"}))
    candidates = rules.drop_candidates(unsure, hook)
    assert candidates.certain is None
    assert candidates.only == rules.drop_candidates(flow, hook).certain


def test_destination_is_local_only_if_the_addresses_are_known():
    """``--dst-type LOCAL`` is unknown without the node's addresses."""
    (case,) = cases(modes=["iptables"], families=["ipv4"], protos=["tcp"], scenarios=["S6"])
    flow, hook = at_hook(case)
    candidates = ruleset("iptables", "node2").drop_candidates(
        replace(flow, local_addresses=None), hook
    )
    assert candidates.certain is None
    assert candidates.only.comment == "default/nodeport-local:http has no local endpoints"
    assert candidates.may_pass


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("mode", MODES)
def test_rules_betray_how_kube_proxy_runs(mode, node):
    """Mode, mark, cluster ranges and the lack of masqueradeAll are read from the rules."""
    rules = ruleset(mode, node)
    assert rules.proxy_mode == mode
    assert rules.masquerade_mark == MARK
    assert rules.has_masquerade_all is False
    assert set(rules.cluster_cidrs) == {
        ip_network("10.244.0.0/16"),
        ip_network("2001:db8:44::/48"),
    }
    assert rules.owners == {Owner.KUBE_PROXY}
    assert rules.unread == ()


def save(*lines):
    chains = sorted({line.split()[1] for line in lines} | {"KUBE-MARK-MASQ", "KUBE-POSTROUTING"})
    heads = [f":{chain} - [0:0]" for chain in chains]
    return "\n".join(["*nat", ":POSTROUTING ACCEPT [0:0]", *heads, *lines, "COMMIT", ""])


SERVICE = '-A KUBE-SERVICES -d 10.0.0.1/32 -m comment --comment "a/b cluster IP" -j KUBE-SVC-A'
CLUSTER_IP = '-d 10.0.0.1/32 -p tcp -m comment --comment "a/b cluster IP" -m tcp --dport 80'
IPVS_COMMENT = "Kubernetes service cluster ip + port for masquerade purpose"
IPVS = f'-A KUBE-SERVICES -m comment --comment "{IPVS_COMMENT}"'


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            [SERVICE, f"-A KUBE-SVC-A {CLUSTER_IP} -j KUBE-MARK-MASQ"],
            ("iptables", True, (), ()),
        ),
        (
            [SERVICE, f"-A KUBE-SVC-A ! -i cbr0 {CLUSTER_IP} -j KUBE-MARK-MASQ"],
            ("iptables", False, (), ("cbr0",)),
        ),
        (
            [f"{IPVS} -m set --match-set KUBE-CLUSTER-IP dst,dst -j KUBE-MARK-MASQ"],
            ("ipvs", True, (), ()),
        ),
        (
            [
                f"{IPVS} -m set --match-set KUBE-CLUSTER-IP src,dst -j KUBE-MARK-MASQ",
            ],
            ("ipvs", False, (), ()),
        ),
        (
            [
                "-A KUBE-SERVICES ! -s 10.1.0.0/16 -m comment --comment "
                f'"{IPVS_COMMENT}" -m set --match-set KUBE-CLUSTER-IP dst,dst -j KUBE-MARK-MASQ',
            ],
            ("ipvs", False, (ip_network("10.1.0.0/16"),), ()),
        ),
        # What the kubelet leaves behind on a node without kube-proxy.
        (["-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000"], (None, None, (), ())),
    ],
)
def test_other_ways_to_run_kube_proxy(lines, expected):
    """masqueradeAll, pods recognised by their bridge, IPVS mode, and no kube-proxy at all."""
    rules = Ruleset.of([parse_save(save(*lines), "ipv4")])
    assert expected == (
        rules.proxy_mode,
        rules.has_masquerade_all,
        rules.cluster_cidrs,
        rules.local_interfaces,
    )


def test_two_modes_at_once_are_none():
    """Rules of two modes, as a change of mode may leave them, do not say which is the right one."""
    both = Ruleset.of(
        [
            parse_save((DATA / "iptables" / "node1.iptables").read_text(), "ipv4"),
            parse_ruleset((FILES / "kube-proxy-node1.json").read_text()),
        ]
    )
    assert both.proxy_mode is None
    assert both.masquerade_mark == MARK


@pytest.mark.parametrize(
    ("mode", "file"), [("nftables", "flannel.json"), ("iptables", "flannel.json")]
)
def test_flannel_at_the_priority_of_kube_proxy(mode, file):
    """Which of the two comes first does not matter: flannel leaves alone what is marked."""
    parts = [parse_ruleset((FILES / file).read_text())]
    if mode == "nftables":
        parts.append(parse_ruleset((FILES / "kube-proxy-node2.json").read_text()))
    else:
        parts.append(parse_save((DATA / "iptables" / "node2.iptables").read_text(), "ipv4"))
    rules = Ruleset.of(parts)
    (case,) = cases(modes=[mode], families=["ipv4"], protos=["tcp"], scenarios=["S3"])
    marked = postrouting(case)
    assert rules.snat_candidates(marked).certain.owner is Owner.KUBE_PROXY
    egress = replace(marked, src=BACKEND.address.ipv4, dst=hosts.CLIENT.ipv4, mark=0)
    assert rules.snat_candidates(replace(egress, seen_source=None)).certain.owner is Owner.FLANNEL
    assert rules.owners == {Owner.KUBE_PROXY, Owner.FLANNEL}
