"""
The judge on discarded packets: tables of what Kubernetes and the kernel drop, and why.

The cluster is the recorded one, as for connections; what it lacks is built in the test.
"""

from dataclasses import replace

import pytest

from tests.unit import samples
from tests.unit.cluster import kube
from tests.unit.samples import flow
from tests.unit.world import (
    CLIENT,
    CLUSTER_IP,
    INTERNAL_LOCAL,
    LOAD_BALANCER_LOCAL,
    LOAD_BALANCER_RANGES,
    NO_ENDPOINTS,
    NODE1,
    NODE2,
    NODE_PORT,
    NODE_PORT_LOCAL,
    NODE_PORT_NO_ENDPOINTS,
    P11,
    P12,
    P21,
    cluster_of,
    discard,
    recorded,
    rules_of,
    sent,
    view,
)
from tracer.judge.cause import Cause
from tracer.judge.drop import judge_drop
from tracer.judge.verdict import Verdict
from tracer.judge.view import View
from tracer.model import ICMP, Hook
from tracer.ruleset.iptables import parse_save
from tracer.ruleset.model import Owner, Ruleset

EXCLUDED = "198.51.100.11"

# fmt: off
# name: node, client, to, port, where (iptables, nftables); cause, Service, way in, policy
SERVICES = {
    "no-endpoints-cluster-ip": (
        "node1", P12, NO_ENDPOINTS, 80, "forward", "forward",
        "no-endpoints", "no-endpoints", "clusterip", "Cluster"),
    "no-endpoints-nodeport": (
        "node1", CLIENT, NODE1, NODE_PORT_NO_ENDPOINTS, "input", "input",
        "no-endpoints", "no-endpoints", "nodeport", "Cluster"),
    "no-endpoints-from-the-node": (
        "node1", NODE1, NO_ENDPOINTS, 80, "output", "output",
        "no-endpoints", "no-endpoints", "clusterip", "Cluster"),
    "nodeport-local": (
        "node2", CLIENT, NODE2, NODE_PORT_LOCAL, "input", "input",
        "no-local-endpoint", "nodeport-local", "nodeport", "Local"),
    # Routed back to where it came from: no host there knows the address.
    "load-balancer-local": (
        "node2", CLIENT, LOAD_BALANCER_LOCAL, 80, "out-again", "out-again",
        "no-local-endpoint", "loadbalancer-local", "loadbalancer", "Local"),
    "internal-local": (
        "node2", P21, INTERNAL_LOCAL, 80, "forward", "forward",
        "no-local-endpoint", "internal-local", "clusterip", "Local"),
    "source-ranges": (
        "node1", EXCLUDED, LOAD_BALANCER_RANGES, 80, "out-again", "prerouting",
        "source-ranges", "loadbalancer-ranges", "loadbalancer", "Cluster"),
}
# fmt: on


def service_case(name, mode):
    node, client, to, port, at, at_nftables, *expected = SERVICES[name]
    return node, sent(client, to, port), at if mode == "iptables" else at_nftables, expected


def told(judged):
    opinion = judged.opinion
    service = opinion.service
    return [opinion.cause, service.name, service.via, service.policy]


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
@pytest.mark.parametrize("name", SERVICES)
def test_services(name, mode):
    """Where kube-proxy drops for a Service, its state is the cause, and its rule is named."""
    node, packet, at, expected = service_case(name, mode)
    judged = discard(packet, view(node, mode), at=at)
    assert judged.verdict is Verdict.DROPPED
    assert told(judged) == expected
    rule = judged.opinion.rule
    assert (rule.owner, rule.tool) == (Owner.KUBE_PROXY, mode)
    assert f"dropped by kube-proxy's rule: {rule}" in judged.opinion.evidence
    assert judged.opinion.advice


@pytest.mark.parametrize("name", SERVICES)
def test_services_without_rules(name):
    """The Service's state tells the cause even if no rules were read."""
    node, packet, at, expected = service_case(name, "iptables")
    judged = discard(packet, view(node, rules=None), at=at)
    assert told(judged) == expected
    assert judged.opinion.rule is None


@pytest.mark.parametrize("name", SERVICES)
def test_services_without_cluster(name):
    """Without objects the rule is named, and that netfilter dropped it; no Service is made up."""
    node, packet, at, _ = service_case(name, "iptables")
    opinion = discard(packet, view(node, cluster=None), at=at).opinion
    assert (opinion.cause, opinion.service) == (Cause.NETFILTER_DROP, None)
    assert opinion.rule.owner is Owner.KUBE_PROXY
    assert opinion.evidence[-1].startswith("no cluster objects were read")


def test_nothing_is_known():
    """Without objects and rules it is known that netfilter discarded it."""
    opinion = discard(sent(CLIENT, NODE1, NODE_PORT), View(node="node1")).opinion
    assert (opinion.cause, opinion.service, opinion.rule) == (Cause.NETFILTER_DROP, None, None)
    assert (opinion.client_class, opinion.advice) == (None, ())


# Which endpoints count

HTTP = {"name": "http", "port": 80, "nodePort": 30080, "protocol": "TCP"}
NODES = (kube.node(), kube.node("node2", [NODE2], ["10.244.2.0/24"]))
READY = {"ready": True, "serving": True, "terminating": False}
ENDING = {"ready": False, "serving": True, "terminating": True}
ENDED = {"ready": False, "serving": False, "terminating": True}
UNREADY = {"ready": False, "serving": False, "terminating": False}
# Serving, but neither ready nor terminating: kube-proxy leaves it out.
NOT_READY_YET = {"ready": False, "serving": True, "terminating": False}


def served(*endpoints, **spec):
    """Return a cluster with one NodePort Service of these endpoints: node and conditions."""
    spec = {"type": "NodePort", "externalTrafficPolicy": "Cluster", "ports": [HTTP]} | spec
    addresses = {"node1": P11, "node2": P21}
    found = [kube.endpoint(addresses[node], node, **how) for node, how in endpoints]
    return cluster_of(*NODES, kube.service("web", **spec), kube.slice_of("web", *found))


LOCAL = {"externalTrafficPolicy": "Local"}


@pytest.mark.parametrize(
    ("endpoints", "spec", "cause"),
    [
        ([], {}, Cause.NO_ENDPOINTS),
        ([("node1", UNREADY)], {}, Cause.NO_ENDPOINTS),
        ([("node1", ENDED)], {}, Cause.NO_ENDPOINTS),
        ([("node1", NOT_READY_YET)], {}, Cause.NO_ENDPOINTS),
        # Another rule must have dropped it: kube-proxy has an endpoint to send to.
        ([("node2", READY)], {}, Cause.NETFILTER_DROP),
        ([("node2", ENDING)], {}, Cause.NETFILTER_DROP),
        ([], LOCAL, Cause.NO_ENDPOINTS),
        ([("node2", READY)], LOCAL, Cause.NO_LOCAL_ENDPOINT),
        ([("node2", ENDING)], LOCAL, Cause.NO_LOCAL_ENDPOINT),
        ([("node1", UNREADY), ("node2", READY)], LOCAL, Cause.NO_LOCAL_ENDPOINT),
        ([("node1", ENDED), ("node2", READY)], LOCAL, Cause.NO_LOCAL_ENDPOINT),
        # Ready ones elsewhere do not count: a terminating one on this node is used.
        ([("node1", ENDING), ("node2", READY)], LOCAL, Cause.NETFILTER_DROP),
        ([("node1", READY)], LOCAL, Cause.NETFILTER_DROP),
        # The internal policy is not the external one.
        ([("node2", READY)], {"internalTrafficPolicy": "Local"}, Cause.NETFILTER_DROP),
    ],
)
def test_endpoints_that_count(endpoints, spec, cause):
    """Ready endpoints count; if there is none, those that are terminating but still serving."""
    cluster = served(*endpoints, **spec)
    judged = discard(sent(CLIENT, NODE1, 30080), view(cluster=cluster, rules=None), at="input")
    assert judged.opinion.cause is cause


@pytest.mark.parametrize(
    ("policy", "which", "to", "port", "text"),
    [
        ("internalTrafficPolicy", "clusterip", "10.0.0.10", 80, "internalTrafficPolicy"),
        ("externalTrafficPolicy", "nodeport", NODE1, 30080, "externalTrafficPolicy"),
    ],
)
def test_which_policy(policy, which, to, port, text):
    """Each way has its own policy, named in evidence and advice."""
    cluster = served(("node2", READY), **{policy: "Local"})
    opinion = discard(sent(P12, to, port), view(cluster=cluster, rules=None)).opinion
    assert (opinion.cause, opinion.service.via) == (Cause.NO_LOCAL_ENDPOINT, which)
    assert f"Service default/web has {text} Local and no ready endpoint on node1" in (
        opinion.evidence
    )


def test_endpoints_of_the_family():
    """An IPv6 client has no use for IPv4 endpoints."""
    six = "2001:db8:96::10"
    cluster = cluster_of(
        *NODES,
        kube.service("web", clusterIPs=["10.0.0.10", six]),
        kube.slice_of("web", kube.endpoint(P11)),
    )
    node_view = view(cluster=cluster, rules=None)
    assert discard(sent("2001:db8::1", six, 80), node_view).opinion.cause is Cause.NO_ENDPOINTS
    assert discard(sent(P12, "10.0.0.10", 80), node_view).opinion.cause is Cause.NETFILTER_DROP


# Who may come in


def balanced(*ranges, policy="Cluster"):
    return cluster_of(
        *NODES,
        kube.service(
            "web", type="LoadBalancer", ports=[HTTP], externalTrafficPolicy=policy,
            clusterIPs=["10.0.0.10", "2001:db8:96::10"], loadBalancerSourceRanges=list(ranges),
            status=kube.balanced("203.0.113.9", "2001:db8:1b::9"),
        ),
        kube.slice_of("web", kube.endpoint(P11)),
        kube.slice_of(
            "web", kube.endpoint("2001:db8:44:1::11"), name="web-6", family="IPv6"
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("client", "to", "port", "ranges", "cause"),
    [
        (CLIENT, "203.0.113.9", 80, ["192.0.2.0/24"], Cause.SOURCE_RANGES),
        (CLIENT, "203.0.113.9", 80, ["192.0.2.0/24", "198.51.100.0/24"], Cause.NETFILTER_DROP),
        (CLIENT, "203.0.113.9", 80, [], Cause.NETFILTER_DROP),
        # The ranges are the load balancer's: other ways to the Service are open.
        (CLIENT, NODE1, 30080, ["192.0.2.0/24"], Cause.NETFILTER_DROP),
        (CLIENT, "10.0.0.10", 80, ["192.0.2.0/24"], Cause.NETFILTER_DROP),
        # kube-proxy separates the families: ranges of one say nothing about the other.
        ("2001:db8::1", "2001:db8:1b::9", 80, ["192.0.2.0/24"], Cause.NETFILTER_DROP),
        ("2001:db8::1", "2001:db8:1b::9", 80, ["2001:db8:9::/48"], Cause.SOURCE_RANGES),
    ],
)
def test_source_ranges(client, to, port, ranges, cause):
    """A client outside loadBalancerSourceRanges may not use the load balancer's address."""
    opinion = discard(sent(client, to, port), view(cluster=balanced(*ranges), rules=None)).opinion
    assert opinion.cause is cause
    if cause is Cause.SOURCE_RANGES:
        assert opinion.evidence[-1] == (
            f"{client} is not in loadBalancerSourceRanges of Service default/web: {ranges[0]}"
        )
        assert opinion.advice == (f"add the client to loadBalancerSourceRanges (now: {ranges[0]})",)


def test_ranges_of_the_other_family_do_not_hide_the_policy():
    """With ranges of the other family alone it is the policy that drops."""
    node_view = view("node2", cluster=balanced("192.0.2.0/24", policy="Local"), rules=None)
    opinion = discard(sent("2001:db8::1", "2001:db8:1b::9", 80), node_view).opinion
    assert opinion.cause is Cause.NO_LOCAL_ENDPOINT


# What the kernel says itself


@pytest.mark.parametrize(
    ("reason", "cause", "advice"),
    [
        ("NO_SOCKET", Cause.NO_LISTENER, "start the server"),
        ("IP_RPFILTER", Cause.RP_FILTER, "net.ipv4.conf.all.rp_filter"),
        ("TCP_INVALID_SYN", None, None),
        ("reason 77", None, None),
    ],
)
def test_reasons(reason, cause, advice):
    """Some of the kernel's reasons are a cause; for the others none is made up."""
    judged = discard(sent(CLIENT, NODE1, 9), view(), at="input", reason=reason)
    assert (judged.opinion.cause, judged.hook, judged.opinion.rule) == (cause, None, None)
    assert judged.opinion.evidence[0] == (
        f"the kernel dropped the packet: {reason} in nf_hook_slow"
    )
    assert (advice is None and not judged.opinion.advice) or advice in judged.opinion.advice[0]


def test_nobody_listens_on_loopback():
    """kube-proxy's nftables mode serves no NodePort on loopback, but the port is a Service's."""
    packet = sent("127.0.0.1", "127.0.0.1", NODE_PORT)
    opinion = discard(packet, view(mode="nftables"), at="loopback", reason="NO_SOCKET").opinion
    assert (opinion.cause, opinion.service.name) == (Cause.NO_LISTENER, "nodeport")
    assert "connect to another address of the node" in opinion.advice[0]


def test_answer_without_a_socket():
    """A client that has gone is not a server that does not listen."""
    opinion = discard(
        sent(P11, CLIENT, 40000), view(), at="input", reason="NO_SOCKET", is_reply=True,
        orig=sent(CLIENT, NODE1, NODE_PORT),
    ).opinion  # fmt: skip
    assert (opinion.cause, opinion.advice) == (None, ())


def test_answer_that_came_another_way():
    """rp_filter applies to either direction."""
    opinion = discard(
        sent(P11, CLIENT, 40000), view(), at="prerouting", reason="IP_RPFILTER", is_reply=True
    ).opinion
    assert opinion.cause is Cause.RP_FILTER


# Rules

POLICY_CHAIN = '-A cali-tw-12345 -m comment --comment "cali:0123456789abcdef" -j DROP'
TO_POLICY = "-A FORWARD -j cali-tw-12345"
TRANSLATED = {"orig": sent(P12, CLUSTER_IP, 80)}


@pytest.mark.parametrize(
    ("orig", "service"),
    [
        (sent(P12, CLUSTER_IP, 80), "clusterip"),
        (sent(P12, INTERNAL_LOCAL, 80), "internal-local"),
        (sent(P12, P11, 8080), None),
    ],
)
def test_network_policy(orig, service):
    """A network policy's rule is the cause, whatever state the Service is in."""
    rules = rules_of(POLICY_CHAIN, TO_POLICY, table="filter")
    packet = flow(P12, 40000, P11, 8080)
    for node in ("node1", "node2"):
        opinion = discard(packet, view(node, rules=rules), orig=orig).opinion
        assert (opinion.cause, opinion.rule.owner) == (Cause.NETFILTER_DROP, Owner.CALICO)
        assert (opinion.service.name if opinion.service else None) == service
        assert f"dropped by calico's rule: {opinion.rule}" in opinion.evidence


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["-A FORWARD -m mystery --of life -j DROP"], "not understood"),
        (
            ["-A FORWARD -m mystery --of life -j ACCEPT", "-A FORWARD -j DROP"],
            "it is not known whether the rule matches",
        ),
        (["-A FORWARD -m mystery --of life -j DROP", "-A FORWARD -j DROP"], "2 rules may match"),
        (["-A INPUT -j DROP"], "no rule drops the packet"),
    ],
)
def test_uncertain_rule(lines, text):
    """A rule that is not certain is not named as the one."""
    packet = flow(P12, 40000, P11, 8080)
    opinion = discard(packet, view(rules=rules_of(*lines, table="filter")), **TRANSLATED).opinion
    assert (opinion.cause, opinion.rule) == (Cause.NETFILTER_DROP, None)
    assert text in " ".join(opinion.evidence)
    assert not any(line.startswith("dropped by ") for line in opinion.evidence)


def test_uncertain_rule_and_a_service_without_endpoints():
    """If no foreign rule is certain, the Service's state explains the drop."""
    rules = rules_of("-A FORWARD -m mystery --of life -j DROP", table="filter")
    opinion = discard(sent(P12, NO_ENDPOINTS, 80), view(rules=rules)).opinion
    assert (opinion.cause, opinion.rule) == (Cause.NO_ENDPOINTS, None)
    assert any(
        line.startswith("possibly dropped by a rule of unknown owner") for line in opinion.evidence
    )


def test_policy_of_a_chain():
    """A chain's policy is a rule like others."""
    text = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD DROP [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n"
    rules = Ruleset.of([parse_save(text, "ipv4")])
    opinion = discard(flow(P12, 40000, P11, 8080), view(rules=rules), **TRANSLATED).opinion
    assert opinion.cause is Cause.NETFILTER_DROP
    assert opinion.rule.chain == "FORWARD"


INVALID = "-A FORWARD -m conntrack --ctstate INVALID -j DROP"
NO_ENTRY = {"orig": None, "is_new": False}


@pytest.mark.parametrize("to", [P11, CLUSTER_IP, NO_ENDPOINTS])
@pytest.mark.parametrize(
    "rules",
    [
        rules_of(INVALID, table="filter"),
        rules_of(
            "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            INVALID,
            "-A FORWARD -m conntrack --ctstate NEW -j DROP",
            table="filter",
        ),
        recorded("iptables", "node1"),
    ],
    ids=["alone", "between-others", "kube-proxy"],
)
def test_conntrack_invalid(to, rules):
    """Without an entry, and with only a rule on INVALID, that rule did it, whatever the Service."""
    opinion = discard(sent(P12, to, 80), view(rules=rules), **NO_ENTRY).opinion
    assert opinion.cause is Cause.CONNTRACK_INVALID
    assert "the packet had no conntrack entry" in opinion.evidence
    assert any("possibly dropped by" in line and "INVALID" in line for line in opinion.evidence)
    assert "nf_conntrack_tcp_be_liberal" in opinion.advice[0]


@pytest.mark.parametrize(
    ("rules", "packet"),
    [
        # It has an entry, so conntrack understood it.
        (rules_of(INVALID, table="filter"), {}),
        (None, NO_ENTRY),
        (replace(rules_of(INVALID, table="filter"), unread=("nft: not there",)), NO_ENTRY),
        (rules_of(INVALID, "-A FORWARD -j DROP", table="filter"), NO_ENTRY),
        (rules_of(INVALID.replace("-j", "-m mystery --of life -j"), table="filter"), NO_ENTRY),
        (rules_of(INVALID.replace("--ctstate", "! --ctstate"), table="filter"), NO_ENTRY),
        (rules_of(INVALID.replace("INVALID", "INVALID,UNTRACKED"), table="filter"), NO_ENTRY),
        (rules_of(INVALID.replace("FORWARD", "INPUT"), table="filter"), NO_ENTRY),
    ],
)
def test_not_surely_invalid(rules, packet):
    """If another rule may have done it, or none was read, only netfilter is known."""
    opinion = discard(sent(P12, P11, 80), view(rules=rules), **packet).opinion
    assert opinion.cause is Cause.NETFILTER_DROP


def test_rules_of_kube_proxy_without_a_service():
    """kube-proxy also drops what has no Service: external traffic to loopback."""
    opinion = discard(sent(CLIENT, "127.0.0.2", 80), view(), at="input").opinion
    assert (opinion.cause, opinion.service) == (Cause.NETFILTER_DROP, None)
    assert (opinion.rule.chain, opinion.rule.owner) == ("KUBE-FIREWALL", Owner.KUBE_PROXY)


def test_dropped_answer():
    """A reply is not dropped because of its Service's state."""
    orig = sent(CLIENT, NODE2, NODE_PORT_LOCAL)
    answer = flow(P11, 8080, CLIENT, 40000)
    judged = discard(answer, view("node2", rules=None), orig=orig, is_reply=True)
    assert (judged.opinion.cause, judged.flow) == (Cause.NETFILTER_DROP, orig)
    # It is identified by the connection it belongs to.
    assert judged.opinion.service.name == "nodeport-local"
    rules = rules_of("-A FORWARD -s 10.244.1.11/32 -j DROP", table="filter")
    opinion = discard(answer, view("node2", rules=rules), orig=orig, is_reply=True).opinion
    assert opinion.rule.text == "-A FORWARD -s 10.244.1.11/32 -j DROP"


# What the packet was, and where


def test_without_tuples():
    """A packet that could not be parsed has no client, no Service and no rule."""
    judged = discard(None, view(), at="input", orig=None)
    opinion = judged.opinion
    assert (judged.flow, opinion.cause) == (None, Cause.NETFILTER_DROP)
    assert (opinion.service, opinion.client_class, opinion.rule) == (None, None, None)
    assert "the packet had no conntrack entry" in opinion.evidence


@pytest.mark.parametrize(
    ("packet", "orig", "expected"),
    [
        (samples.PRESERVED[1], samples.SENT, samples.SENT),
        (samples.SENT6, None, samples.SENT6),
        (None, samples.SENT, samples.SENT),
        (None, None, None),
    ],
)
def test_flow(packet, orig, expected):
    """A drop is identified by what the client sent, otherwise by the packet itself."""
    assert discard(packet, view(), orig=orig).flow == expected


@pytest.mark.parametrize(
    ("at", "hook"),
    [
        ("prerouting", Hook.NF_PREROUTING),
        ("input", Hook.NF_INPUT),
        ("forward", Hook.NF_FORWARD),
        ("output", Hook.NF_OUTPUT),
        ("out-again", None),
        ("loopback", None),
    ],
)
def test_hook_by_the_packet(at, hook):
    """Route and interface show the hook, if only one fits them."""
    judged = discard(sent(CLIENT, NODE1, 9), view(rules=None), at=at)
    assert judged.hook is hook
    label = hook.label if hook else None
    line = f"its route and interface show that it was at netfilter's {label} hook"
    assert (line in judged.opinion.evidence) == (hook is not None)


@pytest.mark.parametrize(
    ("lines", "hook", "rule"),
    [
        (["-A FORWARD -j DROP"], Hook.NF_FORWARD, True),
        (["-A FORWARD -m mystery --of life -j DROP"], Hook.NF_FORWARD, False),
        (["-A INPUT -j DROP"], None, False),
        (["-A FORWARD -d 192.0.2.0/24 -j DROP"], None, False),
    ],
)
def test_hook_by_the_rules(lines, hook, rule):
    """If two hooks fit, the rules show the only one that could drop the packet."""
    rules = rules_of(*lines, table="filter")
    judged = discard(sent(CLIENT, LOAD_BALANCER_LOCAL, 80), view(rules=rules), at="out-again")
    assert (judged.hook, judged.opinion.rule is not None) == (hook, rule)
    if hook:
        assert "the rules show that it was at netfilter's forward hook" in judged.opinion.evidence


def test_two_hooks_with_rules():
    """If rules at both could have dropped it, neither is named."""
    forward = rules_of("-A FORWARD -j DROP", table="filter")
    both = replace(
        forward,
        base_chains=forward.base_chains
        + rules_of("-A POSTROUTING -j DROP", table="mangle").base_chains,
    )
    packet = sent(CLIENT, LOAD_BALANCER_LOCAL, 80)
    judged = discard(packet, view(rules=both), at="out-again")
    assert (judged.hook, judged.opinion.rule) == (None, None)
    # The Service's state explains it all the same.
    judged = discard(packet, view("node2", rules=both), at="out-again")
    assert judged.opinion.cause is Cause.NO_LOCAL_ENDPOINT


def test_place_without_a_name():
    """A function without a name is left out."""
    judged = judge_drop(
        samples.drop(), View(node="n"), time_ns=7, reason="NO_SOCKET", place=None, dst_input=None
    )
    assert judged.opinion.evidence[0] == "the kernel dropped the packet: NO_SOCKET"
    assert (judged.node, judged.time_ns, judged.place) == ("n", 7, None)


def test_ping():
    """A ping to a Service's address belongs to no Service, and is dropped for none."""
    ping = flow(CLIENT, 4660, NO_ENDPOINTS, 80, proto=ICMP)
    opinion = discard(ping, view(rules=None)).opinion
    assert (opinion.cause, opinion.service) == (Cause.NETFILTER_DROP, None)


# Advice


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "no-endpoints-cluster-ip",
            [
                "find out why no endpoint is ready: kubectl --namespace default get endpointslices "
                "-l kubernetes.io/service-name=no-endpoints",
            ],
        ),
        (
            "nodeport-local",
            [
                "run an endpoint of default/nodeport-local on node2",
                "or send clients to nodes that have an endpoint, not to node2",
            ],
        ),
        (
            "load-balancer-local",
            [
                "run an endpoint of default/loadbalancer-local on node2",
                "or have the load balancer stop sending to node2: its health check, /healthz on "
                "port 32122, answers 503",
            ],
        ),
        (
            "internal-local",
            [
                "run an endpoint of default/internal-local on node2 (a DaemonSet runs one on every "
                "node), or set internalTrafficPolicy: Cluster",
            ],
        ),
        (
            "source-ranges",
            ["add the client to loadBalancerSourceRanges (now: 198.51.100.10/32, "
             "2001:db8:c::10/128)"],
        ),
    ],
)  # fmt: skip
def test_advice(name, lines):
    """Each cause has its advice."""
    node, packet, at, _ = service_case(name, "iptables")
    assert list(discard(packet, view(node), at=at).opinion.advice) == lines
