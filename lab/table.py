"""
The table of scenarios: every way to reach a Service that matters for the source address.

The Services are those of ``data/objects.json``. All have their endpoint on node1, in p11; node2
has none.
"""

from lab.model import Except, Expectation, Outcome, Relay, Scenario

POLICY_CLUSTER = "external-traffic-policy-cluster"

PRESERVED = Expectation(outcome="answered", seen="client", verdict="preserved")


def _replaced(seen: str, cause: str) -> Expectation:
    return Expectation(outcome="answered", seen=seen, verdict="replaced", cause=cause)


def _proxied(seen: str) -> Expectation:
    return Expectation(
        outcome="answered", seen=seen, verdict="proxied", cause="load-balancer-proxy"
    )


def _dropped(outcome: Outcome, cause: str) -> Expectation:
    return Expectation(outcome=outcome, verdict="dropped", cause=cause)


NO_LISTENER = _dropped("refused", "no-listener")
NO_ENDPOINTS = _dropped("refused", "no-endpoints")
# Between namespaces, the ICMPv6 error arrives while connect() still holds the socket. The kernel
# drops it then (TcpExtLockDroppedIcmps), so the client learns nothing before it sends its SYN
# again, 1 s later. On a busy machine the error may come after connect(), and is noticed.
NO_ENDPOINTS_TCP6 = Except(
    families=("ipv6",),
    protos=("tcp",),
    expect=Expectation(
        outcome="timeout", or_outcome="refused", verdict="dropped", cause="no-endpoints"
    ),
)

# In IPVS mode policy Local does not confine traffic: without an endpoint on the node, kube-proxy
# uses those of other nodes (syncEndpoint in pkg/proxy/ipvs/proxier.go). It does not masquerade, so
# replies bypass the node and carry the pod's address: an external client ignores them.
IPVS_STRAY = Except(
    modes=("ipvs",),
    expect=Expectation(outcome="timeout", verdict="preserved", cause="no-local-endpoint"),
)
# The node's pods and its own processes are served this way.
IPVS_PRESERVED = Except(modes=("ipvs",), expect=PRESERVED)

SCENARIOS = (
    Scenario(
        id="S1",
        title="pod to ClusterIP, endpoint on the same node",
        client="p12",
        service="clusterip",
        via="clusterip",
        expect=PRESERVED,
    ),
    Scenario(
        id="S2",
        title="pod to ClusterIP, endpoint on another node",
        client="p21",
        service="clusterip",
        via="clusterip",
        expect=PRESERVED,
    ),
    Scenario(
        id="S3",
        title="NodePort, policy Cluster, node without endpoint",
        client="client",
        service="nodeport",
        via="nodeport",
        target="node2",
        expect=_replaced("node2", POLICY_CLUSTER),
    ),
    Scenario(
        id="S4",
        title="NodePort, policy Cluster, node with the endpoint",
        client="client",
        service="nodeport",
        via="nodeport",
        target="node1",
        expect=_replaced("gateway of node1", POLICY_CLUSTER),
    ),
    Scenario(
        id="S5",
        title="NodePort, policy Local, node with the endpoint",
        client="client",
        service="nodeport-local",
        via="nodeport",
        target="node1",
        expect=PRESERVED,
    ),
    Scenario(
        id="S6",
        title="NodePort, policy Local, node without endpoint",
        client="client",
        service="nodeport-local",
        via="nodeport",
        target="node2",
        expect=_dropped("timeout", "no-local-endpoint"),
        exceptions=(IPVS_STRAY,),
    ),
    Scenario(
        id="S7a",
        title="load balancer, policy Cluster, through the node with the endpoint",
        client="client",
        service="loadbalancer",
        via="loadbalancer",
        through="node1",
        expect=_replaced("gateway of node1", POLICY_CLUSTER),
    ),
    Scenario(
        id="S7b",
        title="load balancer, policy Cluster, through the other node",
        client="client",
        service="loadbalancer",
        via="loadbalancer",
        through="node2",
        expect=_replaced("node2", POLICY_CLUSTER),
    ),
    Scenario(
        id="S8a",
        title="load balancer, policy Local, through the healthy node",
        client="client",
        service="loadbalancer-local",
        via="loadbalancer",
        through="node1",
        expect=PRESERVED,
    ),
    Scenario(
        id="S8b",
        title="load balancer, policy Local, through the unhealthy node",
        client="client",
        service="loadbalancer-local",
        via="loadbalancer",
        through="node2",
        expect=_dropped("timeout", "no-local-endpoint"),
        exceptions=(IPVS_STRAY,),
    ),
    Scenario(
        id="S9a",
        title="proxying load balancer, PROXY v1, policy Local (TCP)",
        client="client",
        service="nodeport-local",
        via="nodeport",
        target="node1",
        expect=_proxied("router"),
        protos=("tcp",),
        relay=Relay(header="proxy-v1", port=8101),
        observed=False,
    ),
    Scenario(
        id="S9b",
        title="proxying load balancer, PROXY v2, policy Cluster, node without endpoint (TCP)",
        client="client",
        service="nodeport",
        via="nodeport",
        target="node2",
        expect=_proxied("node2"),
        protos=("tcp",),
        relay=Relay(header="proxy-v2", port=8102),
        observed=False,
    ),
    Scenario(
        id="S9c",
        title="proxying load balancer, X-Forwarded-For, policy Local (TCP)",
        client="client",
        service="nodeport-local",
        via="nodeport",
        target="node1",
        expect=_proxied("router"),
        protos=("tcp",),
        relay=Relay(header="x-forwarded-for", port=8103),
        observed=False,
    ),
    Scenario(
        id="S12",
        title="pod to its own Service (hairpin)",
        client="p11",
        service="clusterip",
        via="clusterip",
        expect=_replaced("gateway of node1", "hairpin"),
    ),
    Scenario(
        id="S13",
        title="pod to an address outside the cluster",
        client="p12",
        service=None,
        via="none",
        target="client",
        expect=_replaced("node1", "pod-egress"),
        observed=False,
    ),
    Scenario(
        id="S14a",
        title="node process to ClusterIP, endpoint local",
        client="node1",
        service="clusterip",
        via="clusterip",
        expect=_replaced("gateway of node1", "off-cluster-source"),
    ),
    Scenario(
        id="S14b",
        title="node process to ClusterIP, endpoint on another node",
        client="node2",
        service="clusterip",
        via="clusterip",
        expect=_replaced("node2", "off-cluster-source"),
    ),
    Scenario(
        id="S14c",
        title="node process to its own NodePort, policy Local, endpoint local",
        client="node1",
        service="nodeport-local",
        via="nodeport",
        target="node1",
        expect=_replaced("gateway of node1", "node-local-source"),
        exceptions=(IPVS_PRESERVED,),
    ),
    Scenario(
        id="S14d",
        title="node process to its own NodePort, policy Local, no local endpoint",
        client="node2",
        service="nodeport-local",
        via="nodeport",
        target="node2",
        expect=_replaced("node2", "node-local-source"),
        exceptions=(IPVS_PRESERVED,),
    ),
    Scenario(
        id="S14e",
        title="node process to the NodePort on loopback",
        client="node1",
        service="nodeport",
        via="nodeport",
        target="loopback",
        expect=_replaced("gateway of node1", "localhost-nodeport"),
        exceptions=(
            Except(modes=("nftables", "ipvs"), expect=NO_LISTENER),
            Except(families=("ipv6",), expect=NO_LISTENER),
        ),
    ),
    Scenario(
        id="S14f",
        title="outside client to ClusterIP, routed through node2",
        client="client",
        service="clusterip",
        via="clusterip",
        through="node2",
        expect=_replaced("node2", "off-cluster-source"),
    ),
    Scenario(
        id="S15a",
        title="ClusterIP of a Service without endpoints",
        client="p12",
        service="no-endpoints",
        via="clusterip",
        expect=NO_ENDPOINTS,
        exceptions=(NO_ENDPOINTS_TCP6,),
    ),
    Scenario(
        id="S15b",
        title="NodePort of a Service without endpoints",
        client="client",
        service="no-endpoints",
        via="nodeport",
        target="node1",
        expect=NO_ENDPOINTS,
        exceptions=(NO_ENDPOINTS_TCP6,),
    ),
    Scenario(
        id="S16a",
        title="loadBalancerSourceRanges, allowed client",
        client="client",
        service="loadbalancer-ranges",
        via="loadbalancer",
        through="node1",
        expect=_replaced("gateway of node1", POLICY_CLUSTER),
    ),
    Scenario(
        id="S16b",
        title="loadBalancerSourceRanges, excluded client",
        client="client2",
        service="loadbalancer-ranges",
        via="loadbalancer",
        through="node1",
        expect=_dropped("timeout", "source-ranges"),
        families=("ipv4",),
    ),
    Scenario(
        id="S17a",
        title="pod to load balancer address, policy Local, own node without endpoint",
        client="p21",
        service="loadbalancer-local",
        via="loadbalancer",
        expect=PRESERVED,
    ),
    Scenario(
        id="S17b",
        title="pod to its node's NodePort, policy Local, no local endpoint",
        client="p21",
        service="nodeport-local",
        via="nodeport",
        target="node2",
        expect=PRESERVED,
    ),
    Scenario(
        id="S18",
        title="external IP, policy Cluster",
        client="client",
        service="external-ip",
        via="externalip",
        through="node2",
        expect=_replaced("node2", POLICY_CLUSTER),
    ),
    Scenario(
        id="S19a",
        title="internalTrafficPolicy Local, own node has the endpoint",
        client="p12",
        service="internal-local",
        via="clusterip",
        expect=PRESERVED,
    ),
    Scenario(
        id="S19b",
        title="internalTrafficPolicy Local, own node has none",
        client="p21",
        service="internal-local",
        via="clusterip",
        expect=_dropped("timeout", "no-local-endpoint"),
        exceptions=(IPVS_PRESERVED,),
    ),
)
