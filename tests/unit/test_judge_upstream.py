"""What other nodes and load balancers did to a connection before it came here."""

import pytest

from tests.unit.cluster import kube
from tests.unit.world import (
    CLIENT,
    GATEWAY1,
    MARK,
    NODE1,
    NODE2,
    NODE_PORT,
    P11,
    P21,
    cluster_of,
    entry,
    judge,
    view,
)
from tracer.judge.cause import Cause
from tracer.judge.verdict import Verdict
from tracer.model import ClientClass

NODES = (kube.node(), kube.node("node2", [NODE2], ["10.244.2.0/24"]))


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
        *NODES,
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
