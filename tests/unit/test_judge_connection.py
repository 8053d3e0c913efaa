"""
The judge on connections: tables of what Kubernetes does to a client's address.

The cluster is the recorded one: two nodes, a backend p11 on node1, kube-proxy's own rules.
"""

import shlex
from dataclasses import replace

import pytest

from tests.unit import samples, world
from tests.unit.cluster import kube
from tests.unit.samples import flow
from tests.unit.world import (
    CLIENT,
    CLUSTER_IP,
    ETH0,
    EXTERNAL_IP,
    GATEWAY1,
    LOAD_BALANCER,
    LOAD_BALANCER_LOCAL,
    LOAD_BALANCER_RANGES,
    MARK,
    NODE1,
    NODE2,
    NODE_PORT,
    NODE_PORT_LOCAL,
    P11,
    P12,
    P21,
    cluster_of,
    dumped,
    entry,
    judge,
    plugin,
    rules_of,
    view,
)
from tracer.cluster.index import Cluster
from tracer.cluster.parse import parse
from tracer.judge.advice import for_source
from tracer.judge.cause import MEANINGS, Cause
from tracer.judge.connection import judge_connection
from tracer.judge.verdict import Verdict
from tracer.judge.view import View
from tracer.model import ICMP, SCTP, ClientClass, Hook, Status
from tracer.ruleset.model import Owner, Ruleset

POLICY = "external-traffic-policy-cluster"

# fmt: off
# name: node, client, to, port, backend, what it sees, marked; verdict, cause, class, way in, policy
WAYS = {
    # From outside.
    "nodeport-cluster": (
        "node1", CLIENT, NODE1, NODE_PORT, P11, GATEWAY1, True,
        "replaced", POLICY, "external", "nodeport", "Cluster"),
    "nodeport-cluster-other-node": (
        "node2", CLIENT, NODE2, NODE_PORT, P11, NODE2, True,
        "replaced", POLICY, "external", "nodeport", "Cluster"),
    "nodeport-local": (
        "node1", CLIENT, NODE1, NODE_PORT_LOCAL, P11, CLIENT, False,
        "preserved", None, "external", "nodeport", "Local"),
    "load-balancer-cluster": (
        "node1", CLIENT, LOAD_BALANCER, 80, P11, GATEWAY1, True,
        "replaced", POLICY, "external", "loadbalancer", "Cluster"),
    "load-balancer-local": (
        "node1", CLIENT, LOAD_BALANCER_LOCAL, 80, P11, CLIENT, False,
        "preserved", None, "external", "loadbalancer", "Local"),
    "load-balancer-ranges": (
        "node1", CLIENT, LOAD_BALANCER_RANGES, 80, P11, GATEWAY1, True,
        "replaced", POLICY, "external", "loadbalancer", "Cluster"),
    "external-ip-cluster": (
        "node2", CLIENT, EXTERNAL_IP, 80, P11, NODE2, True,
        "replaced", POLICY, "external", "externalip", "Cluster"),
    "cluster-ip-from-outside": (
        "node2", CLIENT, CLUSTER_IP, 80, P11, NODE2, True,
        "replaced", "off-cluster-source", "external", "clusterip", "Cluster"),
    # From pods. A policy-Cluster NodePort masquerades them as it does anyone.
    "cluster-ip": (
        "node1", P12, CLUSTER_IP, 80, P11, P12, False,
        "preserved", None, "pod", "clusterip", "Cluster"),
    "cluster-ip-other-node": (
        "node2", P21, CLUSTER_IP, 80, P11, P21, False,
        "preserved", None, "pod", "clusterip", "Cluster"),
    "hairpin": (
        "node1", P11, CLUSTER_IP, 80, P11, GATEWAY1, True,
        "replaced", "hairpin", "pod", "clusterip", "Cluster"),
    "hairpin-by-nodeport": (
        "node1", P11, NODE1, NODE_PORT, P11, GATEWAY1, True,
        "replaced", "hairpin", "pod", "nodeport", "Cluster"),
    "pod-to-nodeport-cluster": (
        "node2", P21, NODE2, NODE_PORT, P11, NODE2, True,
        "replaced", POLICY, "pod", "nodeport", "Cluster"),
    "pod-to-nodeport-local": (
        "node2", P21, NODE2, NODE_PORT_LOCAL, P11, P21, False,
        "preserved", None, "pod", "nodeport", "Local"),
    "pod-to-load-balancer-local": (
        "node2", P21, LOAD_BALANCER_LOCAL, 80, P11, P21, False,
        "preserved", None, "pod", "loadbalancer", "Local"),
    # From processes of the node.
    "node-to-cluster-ip": (
        "node1", NODE1, CLUSTER_IP, 80, P11, GATEWAY1, True,
        "replaced", "off-cluster-source", "node", "clusterip", "Cluster"),
    "node-to-nodeport-local": (
        "node1", NODE1, NODE1, NODE_PORT_LOCAL, P11, GATEWAY1, True,
        "replaced", "node-local-source", "node", "nodeport", "Local"),
    "gateway-to-nodeport-local": (
        "node1", GATEWAY1, NODE1, NODE_PORT_LOCAL, P11, NODE1, True,
        "replaced", "node-local-source", "node", "nodeport", "Local"),
    # Policy Local would not help it: the node's own connections are masqueraded even then.
    "node-to-nodeport-cluster": (
        "node1", NODE1, NODE1, NODE_PORT, P11, GATEWAY1, True,
        "replaced", "node-local-source", "node", "nodeport", "Cluster"),
    "node-to-load-balancer-local": (
        "node2", NODE2, LOAD_BALANCER_LOCAL, 80, P11, "10.244.2.1", True,
        "replaced", "node-local-source", "node", "loadbalancer", "Local"),
    "loopback-nodeport": (
        "node1", "127.0.0.1", "127.0.0.1", NODE_PORT, P11, GATEWAY1, True,
        "replaced", "localhost-nodeport", "loopback", "nodeport", "Cluster"),
    # Another node's process is a client from outside.
    "other-node-to-nodeport-cluster": (
        "node1", NODE2, NODE1, NODE_PORT, P11, GATEWAY1, True,
        "replaced", POLICY, "node", "nodeport", "Cluster"),
    "other-node-to-nodeport-local": (
        "node1", NODE2, NODE1, NODE_PORT_LOCAL, P11, NODE2, False,
        "preserved", None, "node", "nodeport", "Local"),
}
# fmt: on


def way(name):
    """Return a way's node, its conntrack entry, and what is expected of it."""
    node, client, to, port, backend, seen, is_marked, *expected = WAYS[name]
    oif = world.POD_A if backend == P11 and node == "node1" else ETH0
    return node, entry(client, to, port, backend, seen, mark=MARK * is_marked, oif=oif), expected


def told(opinion):
    service = opinion.service
    return [
        opinion.verdict,
        opinion.cause,
        opinion.client_class.name.lower(),
        service.via if service else None,
        service.policy if service else None,
    ]


@pytest.mark.parametrize("name", WAYS)
def test_ways(name):
    """Every way to a Service has its verdict and cause, and where replaced kube-proxy's rule."""
    node, connection, expected = way(name)
    opinion = judge(connection, view(node))
    assert told(opinion) == expected
    assert (opinion.rule is not None) == (opinion.verdict is Verdict.REPLACED)
    if opinion.rule:
        assert (opinion.rule.owner, opinion.rule.chain) == (Owner.KUBE_PROXY, "KUBE-POSTROUTING")


@pytest.mark.parametrize("name", WAYS)
def test_ways_found_in_conntrack(name):
    """An entry read later has no mark: the Service tells the cause, but no rule is certain."""
    node, connection, expected = way(name)
    opinion = judge(dumped(connection), view(node))
    assert told(opinion) == expected
    assert opinion.rule is None
    if opinion.verdict is Verdict.REPLACED and opinion.cause is not Cause.HAIRPIN:
        assert "the packet's mark is not known: it was not seen before SNAT" in opinion.evidence


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("see", [lambda each: each, dumped], ids=["seen", "dumped"])
def test_ways_without_rules(name, see):
    """Without the rules the mark and the objects still tell the cause."""
    node, connection, expected = way(name)
    opinion = judge(see(connection), view(node, rules=None))
    assert told(opinion) == expected
    if opinion.verdict is Verdict.REPLACED:
        assert "the node's rules were not read" in opinion.evidence


@pytest.mark.parametrize("name", WAYS)
def test_ways_by_nftables(name):
    """The same in kube-proxy's nftables mode, whose hairpin carries no mark."""
    node, connection, expected = way(name)
    if name.startswith("hairpin"):
        connection = replace(connection, mark=0)
    opinion = judge(connection, view(node, "nftables"))
    assert told(opinion) == expected
    if opinion.rule:
        assert (opinion.rule.owner, opinion.rule.tool) == (Owner.KUBE_PROXY, "nftables")


@pytest.mark.parametrize("name", [name for name in WAYS if WAYS[name][7] == "replaced"])
def test_ways_without_cluster(name):
    """Without objects it is known that the source was replaced, and by which rule, but not why."""
    node, connection, _ = way(name)
    opinion = judge(connection, view(node, cluster=None))
    assert (opinion.verdict, opinion.cause, opinion.service) == (Verdict.REPLACED, None, None)
    assert opinion.rule.owner is Owner.KUBE_PROXY
    assert opinion.evidence[-1].startswith("no cluster objects were read")
    late = judge(dumped(connection), view(node, cluster=None))
    # kube-proxy may have done it: the cause is not "a rule that is not kube-proxy's".
    assert (late.verdict, late.cause, late.rule) == (Verdict.REPLACED, None, None)


def test_nothing_is_known():
    """Tuples alone tell whether the source was replaced; nothing more is claimed."""
    alone = View(node="node1")
    for name in WAYS:
        _, connection, (verdict, *_) = way(name)
        opinion = judge(connection, alone)
        assert opinion.verdict == verdict
        assert (opinion.cause, opinion.service, opinion.rule) == (None, None, None)
        assert opinion.advice == ()


# What kube-proxy does beside the policies


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("cluster-ip", Cause.MASQUERADE_ALL),
        ("node-to-cluster-ip", Cause.MASQUERADE_ALL),
        ("cluster-ip-from-outside", Cause.MASQUERADE_ALL),
        ("nodeport-cluster", Cause.EXTERNAL_TRAFFIC_POLICY_CLUSTER),
        ("node-to-nodeport-local", Cause.NODE_LOCAL_SOURCE),
        # It affects ClusterIPs only (-d CLUSTER-IP): this must have another reason.
        ("nodeport-local", None),
    ],
)
def test_masquerade_all(name, cause):
    """With masqueradeAll every connection to a ClusterIP is masqueraded, and nothing else."""
    node, connection, _ = way(name)
    reply = replace(connection.reply, dst=world.address("10.240.0.9"))
    marked = replace(connection, mark=MARK, reply=reply, status=Status.SRC_NAT | Status.DST_NAT)
    rules = replace(world.recorded("iptables", node), has_masquerade_all=True)
    opinion = judge(marked, view(node, rules=rules))
    assert (opinion.verdict, opinion.cause) == (Verdict.REPLACED, cause)
    if cause is Cause.MASQUERADE_ALL:
        assert "masqueradeAll" in " ".join(opinion.evidence)
        assert "iptables.masqueradeAll" in opinion.advice[0]


def test_cluster_range_decides():
    """clusterCIDR says who is a pod to kube-proxy; without one, the address's class does."""
    connection = entry(P12, CLUSTER_IP, 80, P11, NODE1, mark=MARK)
    rules = world.recorded("iptables", "node1")
    other = replace(rules, cluster_cidrs=(world.hosts.NODE2.pods.ipv4,))
    assert judge(connection, view(rules=other)).cause is Cause.OFF_CLUSTER_SOURCE
    for each in (rules, None):
        assert judge(connection, view(rules=each)).cause is None
    # A range of the other family says nothing.
    six = replace(rules, cluster_cidrs=(world.hosts.NODE1.pods.ipv6,))
    outside = entry(CLIENT, CLUSTER_IP, 80, P11, NODE1, mark=MARK)
    assert judge(connection, view(rules=six)).cause is None
    assert judge(outside, view(rules=six)).cause is Cause.OFF_CLUSTER_SOURCE


def test_policy_does_not_explain_it():
    """A marked connection that its policy keeps from being marked has no known cause."""
    opinion = judge(entry(CLIENT, NODE1, NODE_PORT_LOCAL, P11, GATEWAY1, mark=MARK), view())
    assert (opinion.verdict, opinion.cause, opinion.advice) == (Verdict.REPLACED, None, ())
    assert opinion.evidence[-1].startswith("the cause is not known")


def test_marked_but_no_service():
    """A Service that has gone, or is not known yet, is not invented."""
    opinion = judge(entry(CLIENT, NODE1, 31999, P11, GATEWAY1, mark=MARK), view())
    assert (opinion.verdict, opinion.cause) == (Verdict.REPLACED, None)
    assert "kube-proxy marked the packet, but no Service is known at 10.240.0.3 port 31999" in (
        opinion.evidence
    )


@pytest.mark.parametrize(
    ("mark", "bit", "is_marked"),
    [
        (0x4000, 0x4000, True),
        (0x4001, 0x4000, True),
        (0x8000, 0x4000, False),
        (0x8000, 0x8000, True),
        (0, 0x4000, False),
    ],
)
def test_mark(mark, bit, is_marked):
    """The mark is one bit, which kube-proxy can be configured to place elsewhere."""
    connection = entry(CLIENT, NODE1, NODE_PORT, P11, GATEWAY1, mark=mark)
    opinion = judge(connection, view(rules=None, masquerade_mark=bit))
    assert (opinion.cause is Cause.EXTERNAL_TRAFFIC_POLICY_CLUSTER) == is_marked
    assert (
        f"the packet carried kube-proxy's masquerade mark {bit:#x} before SNAT" in opinion.evidence
    ) == (is_marked)


@pytest.mark.parametrize(
    ("mark", "hook", "status", "verdict"),
    [
        (MARK, Hook.NF_POSTROUTING, 0, Verdict.REPLACED),
        # Only the port had to be changed: that sets the bit, too.
        (None, Hook.CONNTRACK, Status.SRC_NAT, Verdict.REPLACED),
        (None, Hook.CONNTRACK, 0, Verdict.PRESERVED),
        (0, Hook.NF_POSTROUTING, 0, Verdict.PRESERVED),
    ],
)
def test_masqueraded_with_the_address_it_had(mark, hook, status, verdict):
    """A node's process keeps its address if the backend is on another node: by chance."""
    connection = entry(
        NODE2, CLUSTER_IP, 80, P11, NODE2,
        mark=mark, hook=hook, status=Status.DST_NAT | status, iif=0, oif=ETH0,
    )  # fmt: skip
    opinion = judge(connection, view("node2"))
    assert opinion.verdict is verdict
    if verdict is Verdict.REPLACED:
        assert opinion.cause is Cause.OFF_CLUSTER_SOURCE
        assert "masquerading picked the address that the packet already had" in opinion.evidence


@pytest.mark.parametrize(
    ("client", "mark", "hook"),
    [(CLIENT, 0, Hook.NF_POSTROUTING), (CLIENT, None, Hook.CONNTRACK), (P12, MARK, Hook.NF_INPUT)],
)
def test_port_alone_does_not_hide_the_client(client, mark, hook):
    """A port that was taken is replaced; the client's address stays, and so does the verdict."""
    connection = entry(
        client, NODE1, NODE_PORT_LOCAL, P11, client,
        mark=mark, hook=hook, status=Status.SRC_NAT | Status.DST_NAT,
    )  # fmt: skip
    assert judge(connection, view()).verdict is Verdict.PRESERVED


@pytest.mark.parametrize("status", [0, Status.DST_NAT, Status.CONFIRMED | Status.SRC_NAT_DONE])
def test_contradiction(status):
    """An entry whose tuples show SNAT and whose status does not is not explained away."""
    connection = entry(CLIENT, NODE1, NODE_PORT, P11, GATEWAY1, mark=MARK, status=Status(status))
    opinion = judge(connection, view())
    assert (opinion.verdict, opinion.cause, opinion.rule) == (Verdict.UNKNOWN, None, None)
    assert (
        f"conntrack's status {int(status):#x} lacks IPS_SRC_NAT, although its tuples show SNAT"
        in (opinion.evidence)
    )


@pytest.mark.parametrize(
    ("name", "cause", "advice"),
    [
        ("nodeport-cluster", Cause.IPVS_MASQUERADE, "externalTrafficPolicy"),
        # A ClusterIP Service has no external policy to set.
        ("cluster-ip-from-outside", Cause.IPVS_MASQUERADE, "from inside the cluster"),
        ("node-to-nodeport-local", Cause.IPVS_MASQUERADE, "ClusterIP"),
        ("hairpin", Cause.HAIRPIN, "pod itself"),
    ],
)
def test_ipvs(name, cause, advice):
    """In IPVS mode the cause says so; the advice is that of the other modes."""
    node, connection, (_, usual, *_) = way(name)
    by_itself = judge(connection, view(node, proxy_mode="ipvs"))
    rules = replace(world.recorded("iptables", node), proxy_mode="ipvs")
    by_rules = judge(connection, view(node, rules=rules))
    assert by_itself == by_rules
    assert (by_itself.verdict, by_itself.cause) == (Verdict.REPLACED, cause)
    assert advice in by_itself.advice[0]
    if cause is Cause.IPVS_MASQUERADE:
        assert by_itself.evidence[-1] == (
            f"kube-proxy runs in IPVS mode; in other modes the cause would be {usual}"
        )


def test_proxy_s_own_word_counts():
    """The mode that kube-proxy reports takes precedence over its rules."""
    _, connection, _ = way("nodeport-cluster")
    rules = replace(world.recorded("iptables", "node1"), proxy_mode="ipvs")
    opinion = judge(connection, view(rules=rules, proxy_mode="iptables"))
    assert opinion.cause is Cause.EXTERNAL_TRAFFIC_POLICY_CLUSTER


# Other rules than kube-proxy's

EGRESS = entry(P12, CLIENT, 443, CLIENT, NODE1, target=443, iif=world.POD_B, oif=ETH0)
MASQUERADE = "-A POSTROUTING -s 10.244.1.0/24 -j MASQUERADE"
MYSTERY = "-A POSTROUTING -m mystery --of life -j SNAT --to-source 10.240.0.3"


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_pod_egress(mode):
    """A pod leaves the cluster: the rule is named, with an unknown owner."""
    opinion = judge(EGRESS, view(mode=mode))
    assert (opinion.verdict, opinion.cause) == (Verdict.REPLACED, Cause.POD_EGRESS)
    assert (opinion.rule.table, opinion.rule.owner) == ("lab-masq", Owner.UNKNOWN)
    assert opinion.service is None
    assert "SNAT by a rule of unknown owner: " in " ".join(opinion.evidence)
    (advice,) = opinion.advice
    assert "from the rule (owner unknown) in table lab-masq" in advice


@pytest.mark.parametrize(
    ("lines", "owner", "advice"),
    [
        (["-A FLANNEL-POSTRTG -s 10.244.0.0/16 -j MASQUERADE"], Owner.FLANNEL, "--ip-masq"),
        (["-A cali-nat-outgoing -s 10.244.0.0/16 -j MASQUERADE"], Owner.CALICO, "natOutgoing"),
        (
            ["-A IP-MASQ-AGENT -s 10.244.0.0/16 -j MASQUERADE"],
            Owner.IP_MASQ_AGENT, "nonMasqueradeCIDRs",
        ),
        (
            ["-A CILIUM_POST_nat -s 10.244.0.0/16 -j MASQUERADE"],
            Owner.CILIUM, "enable-ipv4-masquerade",
        ),
        # The owner is known, but not its setting: the owner is still named.
        (["-A WEAVE -s 10.244.0.0/16 -j MASQUERADE"], Owner.WEAVE, "from weave's rule"),
    ],
)  # fmt: skip
def test_owners_of_pod_egress(lines, owner, advice):
    """The owner of the rule is known by its names, and so is its setting."""
    chain = lines[0].split()[1]
    rules = rules_of(*lines, f"-A POSTROUTING -j {chain}")
    opinion = judge(EGRESS, view(rules=rules))
    assert (opinion.cause, opinion.rule.owner) == (Cause.POD_EGRESS, owner)
    assert f"SNAT by {owner}'s rule: {opinion.rule}" in opinion.evidence
    assert advice in opinion.advice[0]


@pytest.mark.parametrize("owner", [Owner.KLIPPER_LB, Owner.PORTMAP])
def test_owners_of_inbound_rules(owner):
    """Without a rule that translates traffic to pods, no other route is needed."""
    rule = replace(judge(EGRESS, view()).rule, owner=owner)
    (line,) = for_source(
        Cause.OTHER_RULE, None, backend="its endpoint", version=4, node="node1", rule=rule
    )
    assert line.startswith(f"{owner}: ")
    assert "route" not in line


@pytest.mark.parametrize(
    ("rules", "evidence"),
    [
        (None, "the node's rules were not read"),
        (Ruleset(), "no rule is certain: no rule replaces the source"),
        (Ruleset(unread=("nft: not there",)), "not all rules were read: nft: not there"),
        (rules_of(MYSTERY, MASQUERADE), "no rule is certain: 2 rules may match"),
        (rules_of(MYSTERY), "the rule has a match or action that is not understood"),
        (
            rules_of("-A POSTROUTING -m mystery --of life -j RETURN", MASQUERADE),
            "it is not known whether the rule matches",
        ),
        (rules_of("-A POSTROUTING -m mystery --of life -j ACCEPT", MASQUERADE), "no rule is"),
        (
            rules_of("-A POSTROUTING -j SNAT --to-source 192.0.2.1"),
            "would give a source other than the one seen",
        ),
    ],
)
def test_pod_egress_without_certain_rule(rules, evidence):
    """The cause is known by the addresses; a rule that is not certain is not named as one."""
    opinion = judge(EGRESS, view(rules=rules))
    assert (opinion.verdict, opinion.cause) == (Verdict.REPLACED, Cause.POD_EGRESS)
    assert opinion.rule is None
    assert evidence in " ".join(opinion.evidence)
    assert not any(line.startswith("SNAT by ") for line in opinion.evidence)


def test_candidates_are_listed():
    """Rules that may have done it are named in their order, the first three."""
    lines = [f"-A POSTROUTING -m mystery --of {n} -j MASQUERADE" for n in range(5)]
    evidence = judge(EGRESS, view(rules=rules_of(*lines))).evidence
    perhaps = [line for line in evidence if line.startswith("possibly SNAT by")]
    assert [line.split("--of ")[1][0] for line in perhaps] == ["0", "1", "2"]
    assert "no rule is certain: 5 rules may match" in evidence


def test_pod_egress_of_a_dump():
    """An entry read later does not have the interface that the rule asks for."""
    opinion = judge(dumped(EGRESS), view())
    assert (opinion.cause, opinion.rule) == (Cause.POD_EGRESS, None)
    assert "no rule is certain" in " ".join(opinion.evidence)


def test_ping_out_of_the_cluster():
    """A ping has no ports, and no advice that mentions one."""
    ping = flow(P12, 4660, CLIENT, 8 << 8, proto=ICMP)
    answer = flow(CLIENT, 4660, NODE1, 0, proto=ICMP)
    opinion = judge(
        samples.connection(ping, answer, status=Status.SRC_NAT, iif=world.POD_B, oif=ETH0), view()
    )
    assert (opinion.verdict, opinion.cause) == (Verdict.REPLACED, Cause.POD_EGRESS)
    assert "4660" not in " ".join(opinion.advice)


@pytest.mark.parametrize(
    ("client", "to", "why"),
    [
        (P12, NODE2, "a node is no stranger to pods"),
        (CLIENT, "192.0.2.1", "whoever it is, it is no pod"),
        (P12, P21, "pods reach each other as they are"),
    ],
)
def test_other_rule(client, to, why):
    """What is neither a Service's nor a pod's egress is named by the rule that did it."""
    connection = entry(client, to, 443, to, NODE1, target=443, oif=ETH0)
    rules = rules_of("-A POSTROUTING -o eth0 -j MASQUERADE")
    opinion = judge(connection, view(rules=rules))
    assert (opinion.cause, opinion.rule.owner) == (Cause.OTHER_RULE, Owner.UNKNOWN), why
    assert judge(connection, view(rules=None)).cause is None
    assert judge(connection, view(rules=Ruleset())).cause is None


def test_other_rule_before_kube_proxy_s():
    """A NodePort connection without the mark was masqueraded by another program."""
    connection = entry(CLIENT, NODE1, NODE_PORT_LOCAL, P11, GATEWAY1)
    rules = rules_of("-A POSTROUTING -d 10.244.0.0/16 -j MASQUERADE")
    opinion = judge(connection, view(rules=rules))
    assert (opinion.cause, opinion.rule.owner) == (Cause.OTHER_RULE, Owner.UNKNOWN)
    assert opinion.service.name == "nodeport-local"
    assert "the packet did not carry kube-proxy's masquerade mark" in opinion.evidence


def test_unmarked_and_only_kube_proxy_s_rule():
    """A rule of kube-proxy is never called one that is not kube-proxy's."""
    connection = entry(CLIENT, "192.0.2.1", 443, "192.0.2.1", NODE1, target=443, oif=ETH0)
    rules = rules_of("-A KUBE-POSTROUTING -j MASQUERADE", "-A POSTROUTING -j KUBE-POSTROUTING")
    for each in (connection, dumped(connection)):
        opinion = judge(each, view(rules=rules))
        assert (opinion.cause, opinion.rule.owner) == (None, Owner.KUBE_PROXY)


def test_docker():
    """What leaves a bridge of Docker is masqueraded by Docker's rule."""
    connection = entry(
        "172.17.0.2", "192.0.2.1", 443, "192.0.2.1", NODE1, target=443, iif=9, oif=ETH0
    )
    interfaces = world.INTERFACES["node1"] | {9: "docker0"}
    opinion = judge(connection, view(rules=plugin("docker"), interfaces=interfaces))
    assert (opinion.cause, opinion.rule.owner) == (Cause.OTHER_RULE, Owner.DOCKER)
    assert "enable_ip_masquerade" in opinion.advice[0]


# Host ports, headless Services, hostNetwork, other protocols

HOST_PORT_POD = kube.pod(
    "edge", ["10.88.0.5"], ports=[{"hostPort": 8080, "containerPort": 80, "protocol": "TCP"}]
)
NODES = (kube.node(cidrs=["10.244.1.0/24", "10.88.0.0/16"]), kube.node("node2", [NODE2], []))


def test_host_port():
    """A host port keeps the client; no Service is involved."""
    cluster = cluster_of(*NODES, HOST_PORT_POD)
    connection = entry(CLIENT, NODE1, 8080, "10.88.0.5", CLIENT, target=80)
    judged = judge_connection(connection, view(cluster=cluster), time_ns=0)
    assert (judged.verdict, judged.opinion.service) == (Verdict.PRESERVED, None)
    assert judged.backend_pod == ("default", "edge", "node1")


@pytest.mark.parametrize("client", ["10.88.0.9", "127.0.0.1"])
def test_host_port_masqueraded_by_portmap(client):
    """portmap masquerades what comes from its own range and from loopback, by its own mark."""
    cluster = cluster_of(*NODES, HOST_PORT_POD)
    connection = entry(
        client, NODE1, 8080, "10.88.0.5", "10.88.0.1", target=80, mark=0x2000, oif=world.POD_A
    )
    opinion = judge(connection, view(cluster=cluster, rules=plugin("portmap")))
    assert (opinion.verdict, opinion.cause) == (Verdict.REPLACED, Cause.OTHER_RULE)
    assert opinion.rule.owner is Owner.PORTMAP
    assert "snat: false in its configuration" in opinion.advice[0]


def test_host_port_hairpin():
    """A pod that reaches itself through its host port is a hairpin as well."""
    cluster = cluster_of(*NODES, HOST_PORT_POD)
    connection = entry("10.88.0.5", NODE1, 8080, "10.88.0.5", "10.88.0.1", target=80, mark=0x2000)
    opinion = judge(connection, view(cluster=cluster, rules=plugin("portmap")))
    assert opinion.cause is Cause.HAIRPIN


HEADLESS = (
    kube.service("db", clusterIPs=["None"], clusterIP="None"),
    kube.slice_of("db", kube.endpoint(P11)),
)


@pytest.mark.parametrize(("client", "node"), [(P12, "node1"), (NODE2, "node1"), (CLIENT, "node1")])
def test_headless(client, node):
    """A headless Service leads to the pod itself: nothing is translated or needs explaining."""
    cluster = cluster_of(*NODES, *HEADLESS)
    connection = entry(client, P11, 8080, P11, client)
    judged = judge_connection(connection, view(node, cluster=cluster), time_ns=0)
    assert (judged.verdict, judged.opinion.cause) == (Verdict.PRESERVED, None)
    assert judged.backend_pod == ("default", "p1", "node1")


def test_host_network():
    """A hostNetwork backend has its node's address: which pod it is is not known."""
    objects = (
        *NODES,
        kube.service("web", type="NodePort", externalTrafficPolicy="Local",
                     ports=[{"name": "http", "port": 80, "nodePort": 30080, "protocol": "TCP"}]),
        kube.slice_of("web", kube.endpoint(NODE1)),
        kube.pod("host", [NODE1], hostNetwork=True),
    )  # fmt: skip
    connection = entry(CLIENT, NODE1, 30080, NODE1, CLIENT, hook=Hook.NF_INPUT, oif=0)
    judged = judge_connection(connection, view(cluster=cluster_of(*objects)), time_ns=0)
    assert (judged.verdict, judged.backend_pod) == (Verdict.PRESERVED, None)
    assert judged.opinion.service.name == "web"


@pytest.mark.parametrize("seen", [P12, NODE1])
def test_host_network_client(seen):
    """A connection to the node itself that no Service has a port for is no Service's."""
    connection = entry(P12, NODE1, 9100, NODE1, seen, target=9100, hook=Hook.NF_INPUT, oif=0)
    opinion = judge(connection, view())
    assert opinion.service is None
    assert opinion.cause is None
    assert opinion.verdict is (Verdict.PRESERVED if seen == P12 else Verdict.REPLACED)


def test_icmp():
    """A ping to a node keeps its source, and has no Service though its numbers look like one."""
    ping = flow(CLIENT, 4660, NODE1, NODE_PORT, proto=ICMP)
    opinion = judge(samples.connection(ping, ping.inverted, status=Status(0)), view())
    assert (opinion.verdict, opinion.cause, opinion.service) == (Verdict.PRESERVED, None, None)


def test_sctp():
    """SCTP Services are judged as any; a TCP Service of that port is not taken for one."""
    connection = entry(CLIENT, NODE1, 30080, P11, GATEWAY1, mark=MARK, proto=SCTP)
    assert judge(connection, view()).service is None
    port = {"name": "sig", "port": 80, "nodePort": 30080, "protocol": "SCTP"}
    cluster = cluster_of(
        *NODES,
        kube.service("sctp", type="NodePort", externalTrafficPolicy="Cluster", ports=[port]),
    )
    opinion = judge(connection, view(cluster=cluster))
    assert (opinion.cause, opinion.service.name) == (Cause.EXTERNAL_TRAFFIC_POLICY_CLUSTER, "sctp")


def test_related_connection():
    """A helper translates what it expects like its master: no rule is certain."""
    related = replace(EGRESS, is_related=True)
    opinion = judge(related, view())
    assert (opinion.cause, opinion.rule) == (Cause.POD_EGRESS, None)
    assert "related" in " ".join(opinion.evidence)


# What other nodes and load balancers did before


def arrived(client, backend=P11, port=8080, **changes):
    """Return a connection that comes to a pod as it was sent."""
    return entry(client, backend, port, backend, client, target=port, **changes)


def external(name, policy="Cluster", port=30001):
    """Return a NodePort Service, and its slice with p11."""
    ports = [{"name": "http", "port": 80, "nodePort": port, "protocol": "TCP"}]
    service = kube.service(
        name, type="NodePort", externalTrafficPolicy=policy, ports=ports, clusterIPs=[]
    )
    return service, kube.slice_of(name, kube.endpoint(P11))


def others(count, policy="Cluster"):
    pairs = [external(f"web-{n}", policy, 30001 + n) for n in range(count)]
    return cluster_of(
        *(kube.node(), kube.node("node2", [NODE2], ["10.244.2.0/24"])),
        *(each for pair in pairs for each in pair),
    )


def test_replaced_upstream_by_one_service():
    """The client of a policy-Cluster Service's pod is a node: that node may have masqueraded."""
    opinion = judge(arrived(NODE2), view(cluster=others(1)))
    assert (opinion.verdict, opinion.cause) == (
        Verdict.REPLACED_UPSTREAM, Cause.EXTERNAL_TRAFFIC_POLICY_CLUSTER,
    )  # fmt: skip
    assert (opinion.service.name, opinion.service.via, opinion.service.port) == (
        "web-0", "none", None,
    )  # fmt: skip
    evidence = " ".join(opinion.evidence)
    assert "the source 10.240.0.5 is node2, and this node" in evidence
    assert "run 'srcip trace' on node2 and look for 10.240.0.5 port 40000" in evidence
    assert any("externalTrafficPolicy" in line for line in opinion.advice)


@pytest.mark.parametrize("tunnel", ["10.244.2.0", "10.244.2.1"])
def test_replaced_upstream_over_an_overlay(tunnel):
    """A node masquerades into a tunnel with the first addresses of its pods' range."""
    opinion = judge(arrived(tunnel), view(cluster=others(1)))
    assert opinion.verdict is Verdict.REPLACED_UPSTREAM
    assert f"the source {tunnel} is node2, and" in " ".join(opinion.evidence)


def test_a_pod_reached_by_its_own_address():
    """A connection to a pod itself belongs to its Service, if it has just one."""
    service = judge(arrived(CLIENT), view(cluster=others(1))).service
    assert (service.name, service.via, service.policy) == ("web-0", "pod", None)
    assert judge(arrived(CLIENT), view(cluster=others(2))).service is None


@pytest.mark.parametrize(("count", "text"), [(2, "web-0, default/web-1,"), (5, "and 2 more")])
def test_replaced_upstream_by_one_of_several(count, text):
    """Which of several Services it was is not known: none is named as the one."""
    opinion = judge(arrived(NODE2), view(cluster=others(count)))
    assert (opinion.verdict, opinion.service) == (Verdict.REPLACED_UPSTREAM, None)
    assert text in " ".join(opinion.evidence)


@pytest.mark.parametrize(
    ("connection", "cluster", "why"),
    [
        (arrived(NODE2), others(0), "no Service has the pod"),
        (arrived(NODE2), others(2, "Local"), "policy Local masquerades nobody from outside"),
        (arrived(NODE2, port=9090), others(1), "the Service has another port"),
        (arrived(NODE1), others(1), "a process of this node, such as a probe"),
        (arrived(GATEWAY1), others(1), "likewise, by its pod gateway"),
        (arrived(P21), others(1), "a pod"),
        (arrived(CLIENT), others(1), "a client outside"),
        (arrived(NODE2), None, "no objects are known"),
        (
            entry(NODE2, NODE1, 30001, P11, NODE2), others(1, "Local"),
            "this node translated it: nobody else had to",
        ),
        (entry(NODE2, NODE1, 30001, P11, NODE2), others(1), "likewise"),
    ],
)  # fmt: skip
def test_not_replaced_upstream(connection, cluster, why):
    """Nothing says that another node replaced it."""
    assert judge(connection, view(cluster=cluster)).verdict is Verdict.PRESERVED, why


def test_replaced_here_and_upstream():
    """What this node replaced comes first: its own rules are known."""
    connection = entry(NODE2, NODE1, NODE_PORT, P11, GATEWAY1, mark=MARK)
    assert judge(connection, view()).verdict is Verdict.REPLACED


@pytest.mark.parametrize("mode", ["VIP", "Proxy"])
def test_proxied(mode):
    """The peer is a load balancer's address: it terminated the client's connection."""
    balancer = kube.service(
        "web", type="LoadBalancer", externalTrafficPolicy="Local",
        ports=[{"name": "http", "port": 80, "nodePort": 30080, "protocol": "TCP"}],
        status=kube.balanced("203.0.113.9", mode=mode),
    )  # fmt: skip
    cluster = cluster_of(*NODES, balancer, kube.slice_of("web", kube.endpoint(P11)))
    opinion = judge(entry("203.0.113.9", NODE1, 30080, P11, "203.0.113.9"), view(cluster=cluster))
    assert (opinion.verdict, opinion.cause) == (Verdict.PROXIED, Cause.LOAD_BALANCER_PROXY)
    assert opinion.client_class is ClientClass.LOADBALANCER
    assert "the peer 203.0.113.9 is the address of a load balancer" in opinion.evidence
    assert "PROXY protocol" in opinion.advice[0]
    # Masqueraded here, too: the backend does not even see the load balancer.
    snat = entry("203.0.113.9", NODE1, 30080, P11, GATEWAY1, mark=MARK)
    assert judge(snat, view(cluster=cluster)).verdict is Verdict.REPLACED


# Evidence and advice


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "nodeport-cluster",
            [
                "conntrack expects replies to 10.244.1.1, not to the client 198.51.100.10: SNAT",
                "conntrack expects replies from 10.244.1.11, not from 10.240.0.3: DNAT",
                "the packet carried kube-proxy's masquerade mark 0x4000 before SNAT",
                "Service default/nodeport was reached through its NodePort; its "
                "externalTrafficPolicy is Cluster",
            ],
        ),
        (
            "nodeport-local",
            [
                "conntrack expects replies to the original source 198.51.100.10",
                "Service default/nodeport-local was reached through its NodePort; its "
                "externalTrafficPolicy is Local",
            ],
        ),
        (
            "cluster-ip",
            ["Service default/clusterip was reached through its ClusterIP"],
        ),
        ("hairpin", ["client and backend are both 10.244.1.11"]),
        ("node-to-nodeport-local", ["the client 10.240.0.3 is node1 itself"]),
        ("loopback-nodeport", ["the client's address 127.0.0.1 is a loopback address"]),
        (
            "cluster-ip-from-outside",
            ["the client 198.51.100.10 is outside the ranges that kube-proxy takes for pods"],
        ),
    ],
)
def test_evidence(name, lines):
    """The evidence names the values that the verdict rests on."""
    node, connection, _ = way(name)
    evidence = judge(connection, view(node)).evidence
    assert [line for line in lines if line not in evidence] == []


PATCH = (
    "kubectl --namespace default patch service nodeport -p "
    """'{"spec":{"externalTrafficPolicy":"Local"}}'"""
)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("nodeport-cluster", [PATCH, "cost: nodes without a ready endpoint drop"]),
        ("cluster-ip-from-outside", ["from inside the cluster, or to the pods' own"]),
        ("hairpin", ["connect to the pod itself, 10.244.1.11 port 8080, or to localhost"]),
        ("node-to-nodeport-local", ["connect from a pod to the ClusterIP 10.0.170.95"]),
        ("loopback-nodeport", ["connect to an address of the node instead of loopback"]),
        ("nodeport-local", []),
        ("cluster-ip", []),
    ],
)
def test_advice(name, advice):
    """Each cause has its advice, with command and cost where there is one."""
    node, connection, _ = way(name)
    lines = judge(connection, view(node)).advice
    assert len(lines) == len(advice)
    assert all(text in line for text, line in zip(advice, lines, strict=True))


def test_cluster_ip_of_the_family():
    """An IPv6 client is told the IPv6 ClusterIP."""
    node6 = str(world.hosts.NODE1.address.ipv6)
    backend6, gateway6 = "2001:db8:44:1::11", "2001:db8:44:1::1"
    connection = entry(node6, node6, NODE_PORT_LOCAL, backend6, gateway6, mark=MARK)
    opinion = judge(connection, view())
    assert (opinion.cause, opinion.rule.family) == (Cause.NODE_LOCAL_SOURCE, "ipv6")
    (line,) = opinion.advice
    assert line.startswith("connect from a pod to the ClusterIP 2001:db8:96::5f: ")


@pytest.mark.parametrize("name", ["; reboot", "$(reboot)", "a b", "-x", "`id`", "x'y", "ü\n#"])
def test_commands_are_quoted(name):
    """Names come from the cluster: a pasted command is still one command with these words."""
    ports = [{"name": "http", "port": 80, "nodePort": 30080, "protocol": "TCP"}]
    service = parse(
        kube.service("web", type="NodePort", externalTrafficPolicy="Cluster", ports=ports)
    )
    cluster = Cluster.build([*map(parse, NODES), replace(service, namespace=f"n{name}", name=name)])
    connection = entry(CLIENT, NODE1, 30080, P11, GATEWAY1, mark=MARK)
    opinion = judge(connection, view(cluster=cluster))
    words = shlex.split(opinion.advice[0])
    assert words == [
        "kubectl", "--namespace", f"n{name}", "patch", "service", name, "-p",
        '{"spec":{"externalTrafficPolicy":"Local"}}',
    ]  # fmt: skip


def test_every_cause_has_a_meaning():
    """The legend of causes is whole."""
    assert set(MEANINGS) == set(Cause)
    assert all(MEANINGS.values())
