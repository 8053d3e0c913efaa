"""What the judge must never say, whatever the tuples, the cluster, the rules and the packet."""

from hypothesis import given
from hypothesis import strategies as st

from tests.unit import samples, world
from tests.unit.cluster import kube
from tests.unit.world import (
    AT,
    CLIENT,
    CLUSTER_IP,
    ETH0,
    EXTERNAL_IP,
    GATEWAY1,
    LOAD_BALANCER,
    LOAD_BALANCER_LOCAL,
    MARK,
    NODE1,
    NODE2,
    NODE_PORT,
    NODE_PORT_LOCAL,
    P11,
    P12,
    P21,
    cluster_of,
    entry,
    judge,
    plugin,
    rules_of,
    sent,
    view,
)
from tracer.judge.cause import Cause
from tracer.judge.connection import judge_connection
from tracer.judge.drop import judge_drop
from tracer.judge.verdict import Verdict
from tracer.judge.view import View
from tracer.model import ICMP, SCTP, Hook, Status
from tracer.ruleset.model import Owner, Ruleset

ADDRESSES = st.sampled_from(
    [CLIENT, NODE1, NODE2, GATEWAY1, P11, P12, P21, CLUSTER_IP, LOAD_BALANCER, EXTERNAL_IP,
     LOAD_BALANCER_LOCAL, "127.0.0.1", "203.0.113.9", "10.88.0.5", "192.0.2.1"]
).map(world.address)  # fmt: skip
PORTS = st.sampled_from([80, 443, 8080, NODE_PORT, NODE_PORT_LOCAL, 30001, 40000, 0])
PROTOS = st.sampled_from([6, 17, ICMP, SCTP, 0, 255])
near = st.builds(
    samples.FiveTuple, src=ADDRESSES, dst=ADDRESSES, sport=PORTS, dport=PORTS, proto=PROTOS
)
connections = samples.connections | st.builds(
    samples.connection,
    near,
    near,
    hook=st.sampled_from(Hook),
    status=st.integers(0, 0xFFFF).map(Status),
    mark=st.none() | st.sampled_from([0, MARK, 0x2000, 0xFFFFFFFF]),
    iif=st.integers(0, 5),
    oif=st.integers(0, 5),
    is_related=st.booleans(),
)
# Lines of which none, one or several may match; the mystery match is unknown.
LINES = st.sampled_from(
    [
        "-A POSTROUTING -s 10.244.1.0/24 -j MASQUERADE",
        "-A POSTROUTING -m mystery --of life -j SNAT --to-source 10.240.0.3",
        "-A POSTROUTING -m mystery --of life -j RETURN",
        "-A POSTROUTING -m mystery --of life -j ACCEPT",
        "-A POSTROUTING -j UNHEARD-OF",
        "-A POSTROUTING -s 10.244.0.0/16 ! -d 10.244.0.0/16 -j MASQUERADE",
        "-A POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE",
        "-A POSTROUTING -o eth0 -j SNAT --to-source 10.240.0.3",
        "-A POSTROUTING -d 10.244.0.0/16 -j RETURN",
        "-A INPUT -j SNAT --to-source 10.244.1.1",
    ]
)
HTTP = {"name": "http", "port": 80, "protocol": "TCP"}
SOURCES = [
    kube.node(),
    kube.node("node2", [NODE2], ["10.244.2.0/24"]),
    kube.service("web", type="NodePort", externalTrafficPolicy="Cluster",
                 ports=[HTTP | {"nodePort": NODE_PORT}]),
    kube.slice_of("web", kube.endpoint(P11)),
    kube.service("local", type="NodePort", externalTrafficPolicy="Local",
                 ports=[HTTP | {"nodePort": NODE_PORT_LOCAL}], clusterIPs=["10.0.0.11"]),
    kube.slice_of("local", kube.endpoint(P11, ready=False, serving=True, terminating=True)),
    kube.service("lb", type="LoadBalancer", externalTrafficPolicy="Local",
                 status=kube.balanced("203.0.113.9"), clusterIPs=[CLUSTER_IP],
                 loadBalancerSourceRanges=["192.0.2.0/24"],
                 ports=[HTTP | {"nodePort": 30001}]),
    kube.service("db", clusterIPs=["None"], clusterIP="None"),
    kube.slice_of("db", kube.endpoint(P11)),
    kube.pod("p12", [P12]),
    kube.pod("p21", [P21], "node2"),
    kube.pod("edge", ["10.88.0.5"],
             ports=[{"hostPort": 8080, "containerPort": 80, "protocol": "TCP"}]),
]  # fmt: skip


@st.composite
def views(draw):
    """A node with any part of its surroundings known."""
    lines = draw(st.lists(LINES, max_size=4, unique=True))
    rules = draw(
        st.sampled_from(
            [None, Ruleset(), world.recorded("iptables", "node1"), plugin("portmap"),
             world.recorded("nftables", "node2"), Ruleset(unread=("x",)), rules_of(*lines)]
        )
    )  # fmt: skip
    cluster = draw(
        st.none()
        | st.just(world.CLUSTER)
        | st.lists(st.sampled_from(SOURCES)).map(lambda found: cluster_of(*found))
    )
    return View(
        node=draw(st.sampled_from(["node1", "node2", "elsewhere"])),
        cluster=cluster,
        rules=rules,
        addresses=draw(st.frozensets(ADDRESSES)),
        interfaces=draw(st.sampled_from([{}, world.INTERFACES["node1"]])),
        proxy_mode=draw(st.sampled_from([None, "iptables", "nftables", "ipvs"])),
        masquerade_mark=draw(st.sampled_from([MARK, 0x8000])),
    )


@given(connections, views())
def test_any_connection(connection, node_view):
    """Nothing raises; what is replaced is never called preserved, nor the other way round."""
    opinion = judge(connection, node_view)
    is_kept = connection.reply.dst == connection.orig.src
    if opinion.verdict in (Verdict.PRESERVED, Verdict.PROXIED, Verdict.REPLACED_UPSTREAM):
        assert is_kept
    if not connection.status & Status.SRC_NAT and not is_kept:
        assert opinion.verdict is Verdict.UNKNOWN
    assert opinion.verdict is not Verdict.DROPPED
    has_cause = {Verdict.PROXIED: True, Verdict.REPLACED_UPSTREAM: True, Verdict.REPLACED: None}
    must = has_cause.get(opinion.verdict, False)
    assert must is None or (opinion.cause is not None) == must
    assert opinion.evidence
    assert all([*opinion.evidence, *opinion.advice])
    if opinion.rule is not None:
        assert opinion.verdict is Verdict.REPLACED
        assert opinion.rule.is_understood
    if opinion.rule is not None and opinion.rule.owner is Owner.KUBE_PROXY:
        assert opinion.cause not in (Cause.OTHER_RULE, Cause.POD_EGRESS)


@given(
    st.sampled_from(
        [
            "-m mystery --of life -j MASQUERADE",
            "-m mystery --of life -j SNAT --to-source 10.240.0.3",
            "-m mystery --of life -j RETURN",
            "-m mystery --of life -j ACCEPT",
            "-j UNHEARD-OF",
        ]
    ),
    st.sampled_from(["MASQUERADE", "SNAT --to-source 10.240.0.3"]),
    st.sampled_from(["FLANNEL-POSTRTG", "cali-nat-outgoing", "KUBE-POSTROUTING", "DOCKER"]),
    st.none() | st.sampled_from([0, MARK]),
    st.sampled_from([P12, CLIENT, NODE1, P11]),
    st.sampled_from([(CLIENT, 443), (NODE1, NODE_PORT), (CLUSTER_IP, 80), (P21, 80)]),
)
def test_no_owner_behind_a_mystery(mystery, target, chain, mark, client, to):
    """A rule before it that is not understood may have done it: no owner is named."""
    rules = rules_of(
        f"-A POSTROUTING {mystery}", f"-A POSTROUTING -j {chain}", f"-A {chain} -j {target}"
    )
    connection = entry(client, *to, P11, "10.240.0.3", mark=mark, oif=ETH0)
    opinion = judge(connection, view(rules=rules))
    assert opinion.rule is None
    assert not any(line.startswith("SNAT by ") for line in opinion.evidence)
    # Without the mystery in front, it is certain.
    clear = rules_of(f"-A POSTROUTING -j {chain}", f"-A {chain} -j {target}")
    if opinion.verdict is Verdict.REPLACED:
        assert judge(connection, view(rules=clear)).rule is not None


@given(samples.connections)
def test_any_connection_alone(connection):
    """With nothing known a verdict is what the tuples and the status say, no more."""
    judged = judge_connection(connection, View(node="node"), time_ns=5)
    assert (judged.node, judged.time_ns, judged.backend_pod) == ("node", 5, None)
    assert judged.seen_source == connection.reply.dst
    if judged.verdict is Verdict.PRESERVED:
        assert judged.seen_source == connection.orig.src
    assert judged.opinion.service is None
    assert judged.opinion.evidence[-1].startswith("no cluster objects were read")


@given(
    samples.drops | st.builds(
        samples.drop,
        packet=st.none() | st.sampled_from([sent(P12, P11, 80), sent(CLIENT, NODE1, NODE_PORT)]),
        orig=st.none() | st.sampled_from([sent(P12, CLUSTER_IP, 80), samples.SENT6]),
        is_reply=st.booleans(),
        iif=st.integers(0, 3),
        ifindex=st.integers(0, 3),
        dst_ifindex=st.integers(0, 3),
        dst_input=st.none() | st.just(1),
    ),
    views(),
    st.sampled_from(["NETFILTER_DROP", "NO_SOCKET", "IP_RPFILTER", "", "x"]),
    st.none() | st.text(),
    st.sampled_from([None, *(where["dst_input"] for where in AT.values())]),
)  # fmt: skip
def test_any_drop(drop, node_view, reason, place, dst_input):
    """Nothing raises; a rule is named only where it is certain, understood, and one that drops."""
    judged = judge_drop(drop, node_view, time_ns=0, reason=reason, place=place, dst_input=dst_input)
    opinion = judged.opinion
    assert judged.verdict is Verdict.DROPPED
    assert opinion.evidence
    assert all(opinion.advice)
    if reason == "NETFILTER_DROP":
        assert opinion.cause is not None
    else:
        assert (judged.hook, opinion.rule) == (None, None)
    if opinion.rule is not None:
        assert opinion.rule.is_drop
        assert opinion.rule.is_understood
        assert opinion.rule.hook == judged.hook.label
    if drop.is_reply:
        assert opinion.cause not in (
            Cause.NO_ENDPOINTS, Cause.NO_LOCAL_ENDPOINT, Cause.SOURCE_RANGES, Cause.NO_LISTENER,
        )  # fmt: skip
