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
    view,
)
from tracer.cluster.index import Cluster
from tracer.cluster.parse import parse
from tracer.judge.cause import MEANINGS, Cause
from tracer.judge.connection import judge_connection
from tracer.judge.verdict import Verdict
from tracer.judge.view import View
from tracer.model import ICMP, SCTP, Hook, Status
from tracer.ruleset.model import Owner

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
