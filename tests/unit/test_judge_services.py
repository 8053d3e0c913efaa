"""Services as kube-proxy takes them: families, fallbacks, endpoints on the host, others' ports."""

from ipaddress import ip_address

import pytest

from tests.unit.cluster import kube
from tests.unit.world import (
    CLIENT,
    ETH0,
    MARK,
    NODE1,
    NODE2,
    P11,
    P21,
    POD_A,
    cluster_of,
    discard,
    dumped,
    entry,
    flow,
    judge,
    rules_of,
    sent,
    view,
)
from tracer.cluster.match import Via
from tracer.judge.cause import Cause
from tracer.judge.forecast import CLIENT as KEPT
from tracer.judge.forecast import Forecaster, Proxy, facts_of
from tracer.judge.verdict import Verdict
from tracer.model import TCP, ClientClass, Hook

SIX = "2001:db8:240::11"
NODES = (
    kube.node("node1", [NODE1, SIX], ["10.244.1.0/24", "2001:db8:44:1::/64"]),
    kube.node("node2", [NODE2, "2001:db8:240::12"], ["10.244.2.0/24"]),
)
HTTP = {"name": "http", "port": 80, "nodePort": 30080, "protocol": "TCP"}
BALANCER = "203.0.113.9"
# It may have dropped any packet: what else is known decides.
PERHAPS = rules_of("-A FORWARD -m set --match-set denied src -j DROP", table="filter")


def served(*endpoints, **spec):
    """A cluster with one Service, by default of type NodePort with an endpoint on node1."""
    spec = {"type": "NodePort", "ports": [HTTP], **spec}
    slice_ = kube.slice_of("web", *(endpoints or [kube.endpoint(P11)]))
    return cluster_of(*NODES, kube.service("web", **spec), slice_)


def forecasts(cluster, mode="iptables", **wanted):
    """The forecasts of the ways with these attributes."""
    forecaster = Forecaster(cluster, facts_of(cluster, {}), Proxy(mode=mode))
    ways = forecaster.ways(cluster.service("default", "web"))
    chosen = [way for way in ways if all(getattr(way, k) == v for k, v in wanted.items())]
    return [forecast for way in chosen for forecast in forecaster.forecast(way)]


# Families


def test_a_family_without_a_cluster_ip_is_not_served():
    """It has no ways in a forecast, and a drop there is not the Service's doing."""
    cluster = served()
    assert forecasts(cluster, family="ipv4")
    assert not forecasts(cluster, family="ipv6")
    assert cluster.service_at(ip_address(NODE1), 30080, TCP)
    assert cluster.service_at(ip_address(SIX), 30080, TCP) is None
    dropped = discard(
        sent("2001:db8::1", SIX, 30080), view(cluster=cluster, rules=None), at="input"
    )
    assert (dropped.opinion.cause, dropped.opinion.service) == (Cause.NETFILTER_DROP, None)


@pytest.mark.parametrize(
    ("spec", "address", "is_served"),
    [
        ({"externalIPs": ["192.0.2.9"]}, "192.0.2.9", True),
        ({"externalIPs": ["2001:db8::9"]}, "2001:db8::9", False),
        ({"externalIPs": ["192.0.2.9"], "clusterIPs": ["None"]}, "192.0.2.9", False),
        ({"status": kube.balanced(BALANCER)}, BALANCER, True),
        ({"status": kube.balanced(BALANCER, mode="Proxy")}, BALANCER, False),
    ],
)
def test_external_addresses(spec, address, is_served):
    """Those of a family with a ClusterIP, but not of a load balancer that proxies."""
    cluster = served(**{"type": "LoadBalancer", **spec})
    assert bool(cluster.service_at(ip_address(address), 80, TCP)) is is_served
    assert cluster.classify(ip_address(BALANCER)) is (
        ClientClass.LOADBALANCER if "status" in spec else ClientClass.EXTERNAL
    )


# Endpoints


def test_an_endpoint_that_is_terminating_serves_its_node():
    """With policy Local also while other nodes have ready ones: KEP-1669 looks at each node."""
    ending = kube.endpoint(P21, "node2", "p2", ready=False, serving=True, terminating=True)
    cluster = served(kube.endpoint(P11), ending, externalTrafficPolicy="Local")
    wanted = {"family": "ipv4", "client_class": ClientClass.EXTERNAL, "to": ip_address(NODE2)}
    (forecast,) = forecasts(cluster, **wanted)
    assert (forecast.verdict, forecast.backend_node) == (Verdict.PRESERVED, "node2")


@pytest.mark.parametrize("mode", ["iptables", "nftables", "ipvs"])
@pytest.mark.parametrize("client", [ClientClass.EXTERNAL, ClientClass.POD])
def test_an_endpoint_on_the_host_sees_the_client(mode, client):
    """What comes to the node's own address is delivered before anybody masquerades."""
    cluster = served(kube.endpoint(NODE1))
    wanted = {"client_class": client, "to": ip_address(NODE1)}
    (forecast,) = forecasts(cluster, mode, **wanted)
    assert (forecast.verdict, forecast.seen_source) == (Verdict.PRESERVED, KEPT)
    assert forecast.cause is None
    wanted["to"] = ip_address(NODE2)
    (forecast,) = forecasts(cluster, mode, **wanted)
    assert (forecast.verdict, forecast.seen_source) == (Verdict.REPLACED, ip_address(NODE2))


def test_an_endpoint_on_the_host_for_the_host():
    """The node's own processes are masqueraded to the node's address, not to the pod gateway."""
    wanted = {"client_class": ClientClass.NODE, "to": ip_address(NODE1)}
    (forecast,) = forecasts(served(kube.endpoint(NODE1)), **wanted)
    assert (forecast.cause, forecast.seen_source) == (Cause.NODE_LOCAL_SOURCE, ip_address(NODE1))


def test_one_endpoint_on_the_host_and_one_in_a_pod():
    """Of one node, with different outcomes: both are forecast."""
    cluster = served(kube.endpoint(P11), kube.endpoint(NODE1, pod="p2"))
    wanted = {"client_class": ClientClass.EXTERNAL, "to": ip_address(NODE1)}
    assert {each.verdict for each in forecasts(cluster, **wanted)} == {
        Verdict.REPLACED,
        Verdict.PRESERVED,
    }


def test_marked_and_delivered_here():
    """The evidence says why the mark came to nothing."""
    connection = entry(CLIENT, NODE1, 30080, NODE1, CLIENT, mark=MARK, hook=Hook.NF_INPUT)
    opinion = judge(connection, view(cluster=served(kube.endpoint(NODE1))))
    assert opinion.verdict is Verdict.PRESERVED
    assert "what is delivered there does not pass POST_ROUTING" in opinion.evidence[-1]


def test_endpoints_that_are_on_no_node():
    """Policy Local would drop everywhere: no command leads there."""
    cluster = served(kube.endpoint("192.0.2.50", None, None))
    connection = entry(CLIENT, NODE1, 30080, "192.0.2.50", NODE1, mark=MARK, oif=ETH0)
    opinion = judge(connection, view(cluster=cluster))
    (forecast,) = forecasts(cluster, client_class=ClientClass.EXTERNAL, to=ip_address(NODE1))
    for advice in (opinion.advice, forecast.advice):
        assert [line.partition(":")[0] for line in advice] == ["no command"]
    assert opinion.cause is forecast.cause is Cause.EXTERNAL_TRAFFIC_POLICY_CLUSTER


# What kube-proxy has done already, and what is not its business


def test_behind_dnat_no_endpoint_is_missing():
    """A packet that has an endpoint's address was not dropped for the lack of one."""
    cluster = served(
        type="LoadBalancer", externalTrafficPolicy="Local", status=kube.balanced(BALANCER)
    )
    node_view = view("node2", cluster=cluster, rules=PERHAPS, proxy_mode="iptables")
    behind = discard(flow(CLIENT, 40000, P11, 8080), node_view, orig=sent(CLIENT, BALANCER, 80))
    assert behind.opinion.cause is Cause.NETFILTER_DROP
    assert discard(sent(CLIENT, BALANCER, 80), node_view).opinion.cause is Cause.NO_LOCAL_ENDPOINT
    # kube-proxy lets a pod use the endpoints of all nodes.
    assert discard(sent(P21, BALANCER, 80), node_view).opinion.cause is Cause.NETFILTER_DROP


def test_another_nodes_node_port():
    """Whether that node has an endpoint says nothing about a drop on the way there."""
    cluster = served(kube.endpoint(P21, "node2"), externalTrafficPolicy="Local")
    node_view = view(cluster=cluster, rules=PERHAPS)
    assert discard(sent(P11, NODE2, 30080), node_view).opinion.cause is Cause.NETFILTER_DROP
    assert discard(sent(CLIENT, NODE1, 30080), node_view).opinion.cause is Cause.NO_LOCAL_ENDPOINT


def test_nobody_listens_behind_dnat():
    """It is the backend that is not there: kube-proxy did serve the NodePort."""
    packet, orig = flow(CLIENT, 40000, NODE1, 8080), sent(CLIENT, NODE1, 30080)
    node_view = view(cluster=served(kube.endpoint(NODE1)))
    behind = discard(packet, node_view, at="input", reason="NO_SOCKET", orig=orig)
    assert behind.opinion.advice == ("start the server, or check the address and port",)
    before = discard(orig, node_view, at="input", reason="NO_SOCKET")
    assert before.opinion.advice[0].startswith("connect to another address of the node")


def test_without_dnat_kube_proxy_did_not_masquerade():
    """A pod's way to another node's NodePort, masqueraded by another program."""
    connection = entry(P11, NODE2, 30080, NODE2, NODE1, target=30080, iif=POD_A, oif=ETH0)
    opinion = judge(dumped(connection), view(cluster=served(), rules=None))
    assert (opinion.verdict, opinion.cause, opinion.advice) == (Verdict.REPLACED, None, ())
    assert opinion.service.via is Via.NODE_PORT


def test_a_proxying_load_balancer_is_outside():
    """What pods send there leaves the cluster."""
    cluster = served(type="LoadBalancer", status=kube.balanced(BALANCER, mode="Proxy"))
    connection = entry(P11, BALANCER, 80, BALANCER, NODE1, target=80, iif=POD_A, oif=ETH0)
    for seen in (connection, dumped(connection)):
        opinion = judge(seen, view(cluster=cluster, rules=None))
        assert (opinion.cause, opinion.service) == (Cause.POD_EGRESS, None)
