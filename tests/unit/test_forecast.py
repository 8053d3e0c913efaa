"""What kube-proxy will do, against what a real one did."""

import json
import re
from dataclasses import replace
from ipaddress import ip_address
from itertools import groupby

import pytest

from exporters.forecast import preview_lines
from exporters.forecast_table import forecast_table
from exporters.terminal import Screen
from lab import hosts
from lab.kube_proxy import DATA
from lab.scenarios import cases
from tracer.cluster import snapshot
from tracer.cluster.match import Via
from tracer.cluster.objects import Policy
from tracer.judge.cause import Cause
from tracer.judge.forecast import Forecaster, Proxy, Way, facts_of
from tracer.judge.preview import change, preview
from tracer.model import PROTOCOLS, ClientClass

CLUSTER = snapshot.load(DATA / "objects.json")
OBSERVED = [json.loads(line) for line in (DATA / "observed.jsonl").read_text().splitlines()]
VERDICTS = {
    (case.mode, case.scenario.id, case.family, case.proto): (case.verdict, case.cause)
    for case in cases()
}
# What the nodes' own interfaces carry.
OWN = {
    name: [address for pair in (node.address, node.gateway) for address in (pair.ipv4, pair.ipv6)]
    for name, node in hosts.NODES.items()
}


def forecaster(mode, own=OWN):
    return Forecaster(CLUSTER, facts_of(CLUSTER, own), Proxy(mode=mode))


def client_class(seen):
    if seen["from"] in hosts.NODES:
        return ClientClass.NODE
    return ClientClass.POD if seen["from"] in hosts.PODS else ClientClass.EXTERNAL


def handling_node(seen, to):
    """The node whose kube-proxy meets the connection first."""
    if seen["from"] in hosts.NODES:
        return seen["from"]
    if seen["from"] in hosts.PODS:
        return CLUSTER.node_of_pod_address(ip_address(seen["from_address"]))
    return seen["via"] or CLUSTER.node_of(to)


def way(seen):
    to = ip_address(seen["to"])
    match = CLUSTER.service_at(to, seen["port"], PROTOCOLS[seen["proto"]])
    return Way(
        match=match,
        client_class=client_class(seen),
        node=handling_node(seen, to),
        family=seen["family"],
        to=to,
        port=seen["port"],
        client=ip_address(seen["from_address"]),
    )


@pytest.mark.parametrize(
    "seen",
    OBSERVED,
    ids=[f"{o['scenario']}-{o['mode']}-{o['family']}-{o['proto']}" for o in OBSERVED],
)
def test_observed(seen):
    """Each of the 204 observations is forecast: the address that the backend printed, and why."""
    (forecast,) = forecaster(seen["mode"]).forecast(way(seen))

    told = seen["client_address"]
    expected = None if told in ("TIMEOUT", "REFUSED") else ip_address(told)
    assert forecast.seen_source == expected
    key = (seen["mode"], seen["scenario"], seen["family"], seen["proto"])
    assert (forecast.verdict, forecast.cause) == VERDICTS[key]


def test_gateway_is_not_guessed():
    """If a node's interfaces were not read, its pod gateway is named without an address."""
    seen = next(o for o in OBSERVED if o["scenario"] == "S4")
    (forecast,) = forecaster("iptables", own={}).forecast(way(seen))

    assert forecast.seen_source is None
    assert forecast.seen_name == "the pod gateway of node1"


def test_all_ways():
    """Every address of a Service is a way: for pods, the node and outsiders, through each node."""
    service = CLUSTER.service("default", "loadbalancer")
    ways = list(forecaster("iptables").ways(service))

    assert {w.match.via for w in ways} == {Via.CLUSTER_IP, Via.NODE_PORT, Via.LOAD_BALANCER}
    assert {w.node for w in ways} == {"node1", "node2"}
    assert {(w.family, w.match.port.name) for w in ways} == {
        (family, port) for family in ("ipv4", "ipv6") for port in ("http", "dns")
    }
    # Three addresses for three clients, and loopback for the node itself.
    assert len(ways) == (3 * 3 + 1) * 2 * 2 * 2


def test_several_backends():
    """A Service with endpoints on both nodes has a forecast for each of them."""
    service = CLUSTER.service("default", "nodeport-spread")
    outsiders = [
        w
        for w in forecaster("iptables").ways(service)
        if w.client_class is ClientClass.EXTERNAL
        and w.match.via is Via.NODE_PORT
        and (w.node, w.family, w.match.port.name) == ("node2", "ipv4", "http")
    ]
    (only,) = outsiders
    found = {f.backend_node: str(f.seen_source) for f in forecaster("iptables").forecast(only)}
    assert found == {"node1": "10.240.0.5", "node2": "10.244.2.1"}


@pytest.mark.parametrize("mode", ["iptables", "nftables", "ipvs", None])
def test_loopback_in_unknown_modes(mode):
    """Loopback is never guessed: it is unknown if the mode is."""
    service = CLUSTER.service("default", "nodeport")
    looped = [w for w in forecaster(mode).ways(service) if w.to.is_loopback]
    verdicts = {(w.family, f.verdict) for w in looped for f in forecaster(mode).forecast(w)}
    expected = {
        "iptables": {("ipv4", "replaced"), ("ipv6", "dropped")},
        "nftables": {("ipv4", "dropped"), ("ipv6", "dropped")},
        "ipvs": {("ipv4", "dropped"), ("ipv6", "dropped")},
        None: {("ipv4", "unknown"), ("ipv6", "unknown")},
    }
    assert verdicts == expected[mode]


def test_masquerade_all():
    """With masqueradeAll even a pod is replaced."""
    seen = next(o for o in OBSERVED if o["scenario"] == "S2" and o["family"] == "ipv4")
    everything = Forecaster(
        CLUSTER, facts_of(CLUSTER, OWN), Proxy(mode="iptables", is_masquerading_all=True)
    )
    (forecast,) = everything.forecast(way(seen))
    assert (forecast.verdict, forecast.cause) == ("replaced", "masquerade-all")
    assert str(forecast.seen_source) == "10.240.0.5"


def table(service, mode="iptables", **changes):
    """The table of a Service's forecasts, split into rows and the text below them."""
    each = forecaster(mode)
    changed = change(CLUSTER.service("default", service), changes)
    forecasts = [f for w in each.ways(changed) for f in each.forecast(w)]
    lines = forecast_table(forecasts)
    rows, below = lines[1 : lines.index("")], lines[lines.index("") + 1 :]
    return [re.split("  +", row) for row in rows], below


def test_rows():
    """Ports, nodes and families with one outcome share a row; external clients come first."""
    rows, _ = table("nodeport")
    outside = [row for row in rows if row[1] == "external"]
    assert rows[: len(outside)] == outside
    both = "30080/tcp 30053/udp"
    node1 = "10.244.1.1, 2001:db8:44:1::1 (the pod gateway of node1)"
    node2 = "10.240.0.5, 2001:db8:240::12 (the node node2)"
    cause = ["replaced", "external-traffic-policy-cluster"]
    assert outside[:2] == [
        ["nodeport", "external", both, "node1", "node1", node1, *cause],
        ["nodeport", "external", both, "node2", "node1", node2, *cause],
    ]
    ways = [client for client, _ in groupby((row[1], row[0]) for row in rows)]
    assert len(ways) == len(set(ways))


def test_families_with_different_answers():
    """Where the families differ, each has its row, and says which it is."""
    rows, _ = table("nodeport")
    looped = {(row[2].split()[0], row[-2]) for row in rows if row[0] == "loopback"}
    assert looped == {("ipv4", "replaced"), ("ipv6", "dropped")}


def test_advice_by_cause():
    """What keeps the source stands beside its cause, once for both families."""
    _, below = table("nodeport")
    assert below == [
        "To keep the source:",
        "  external-traffic-policy-cluster  kubectl --namespace default patch service nodeport -p "
        """'{"spec":{"externalTrafficPolicy":"Local"}}'""",
        "                                   cost: nodes without a ready endpoint drop the traffic, "
        "and load may be uneven",
        "  off-cluster-source               connect from inside the cluster, or to the pods' own "
        "addresses; cost: those need a route to the pods",
        "  node-local-source                connect from a pod to the ClusterIP 10.0.170.94 or "
        "2001:db8:96::5e: kube-proxy masquerades whatever a node's own processes send to a Service",
        "  localhost-nodeport               connect to an address of the node instead of loopback",
        "",
        "To get a reply:",
        "  no-listener                      connect to another address of the node: kube-proxy "
        "does not serve the NodePort at this one",
    ]


def test_advice_in_ipvs_mode():
    """Under the one cause of IPVS mode there is the advice for each cause of the other modes."""
    _, below = table("nodeport", "ipvs")
    assert below[: below.index("")] == [
        "To keep the source:",
        "  ipvs-masquerade  kubectl --namespace default patch service nodeport -p "
        """'{"spec":{"externalTrafficPolicy":"Local"}}'""",
        "                   cost: nodes without a ready endpoint drop the traffic, and load may be "
        "uneven",
        "  ipvs-masquerade  connect from inside the cluster, or to the pods' own addresses; cost: "
        "those need a route to the pods",
    ]


def test_conditions_are_no_advice():
    """A condition of a forecast has a section of its own."""
    _, below = table("loadbalancer-ranges")
    at = below.index("Conditions:")
    assert below[at - 1] == ""
    assert below[at + 1 :] == [
        "  only clients in loadBalancerSourceRanges (198.51.100.10/32); others are dropped",
        "  only clients in loadBalancerSourceRanges (2001:db8:c::10/128); others are dropped",
    ]


def test_source_ranges_of_one_family():
    """Ranges of one family are no condition for clients of the other."""
    service = CLUSTER.service("default", "loadbalancer-ranges")
    (network,) = [each for each in service.source_ranges if each.version == 4]
    each = forecaster("iptables")
    notes = {
        (w.family, f.note)
        for w in each.ways(replace(service, source_ranges=(network,)))
        if w.match.via is Via.LOAD_BALANCER
        for f in each.forecast(w)
    }
    only = "only clients in loadBalancerSourceRanges (198.51.100.10/32); others are dropped"
    assert notes == {("ipv4", only), ("ipv6", None)}


def test_many_nodes_share_their_advice():
    """On a cluster of many nodes the advice for those without endpoint stays one line."""
    each = forecaster("iptables")
    ways = each.ways(CLUSTER.service("default", "nodeport-local"))
    (dropped,) = {
        f
        for w in ways
        for f in each.forecast(w)
        if f.cause is Cause.NO_LOCAL_ENDPOINT and (w.family, w.port) == ("ipv4", 30081)
    }
    many = [replace(dropped, way=replace(dropped.way, node=f"node{i}")) for i in range(2, 102)]
    table = forecast_table(many)
    on = "node2, node3, node4 and 97 more"
    assert f"  no-local-endpoint  run an endpoint of default/nodeport-local on {on}" in table
    assert len(table) < 10


def test_narrow_terminal():
    """Where rows would break, each is three short lines."""
    each = forecaster("iptables")
    service = CLUSTER.service("default", "nodeport-local")
    forecasts = [f for w in each.ways(service) for f in each.forecast(w)]
    lines = forecast_table(forecasts, Screen(width=80, height=24))
    assert lines[:6] == [
        "external -> nodeport 30081/tcp 30054/udp, through node1",
        "    the backend on node1 sees the client",
        "    preserved",
        "external -> nodeport 30081/tcp 30054/udp, through node2",
        "    the backend sees nothing",
        "    dropped  no-local-endpoint",
    ]
    assert forecast_table(forecasts, Screen(width=300, height=24)) == forecast_table(forecasts)


def test_nothing_to_forecast():
    """A Service without any way has a heading, and no advice."""
    assert forecast_table([]) == [
        "WAY  CLIENT  TO  THROUGH  BACKEND ON  BACKEND SEES  VERDICT  CAUSE"
    ]


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        (
            {"externalTrafficPolicy": Policy.LOCAL},
            [
                "nodes that would not serve external traffic: node2",
                "nodes that would serve it: node1",
            ],
        ),
        (
            {"externalTrafficPolicy": Policy.CLUSTER},
            ["every node serves external traffic, and hides the client's address"],
        ),
        (
            {"internalTrafficPolicy": Policy.LOCAL},
            [
                "nodes whose pods could not reach its ClusterIP: node2",
                "nodes whose pods could: node1",
            ],
        ),
        (
            {"internalTrafficPolicy": Policy.CLUSTER},
            ["pods on every node can reach its ClusterIP"],
        ),
    ],
)
def test_preview(settings, lines):
    """A preview covers only the policies that would be set."""
    service = change(CLUSTER.service("default", "nodeport"), settings)
    assert preview_lines(preview(CLUSTER, service), settings, None) == lines


def endpoint_slice(name, address, ports, **conditions):
    """One more slice of default/loadbalancer-local, with an endpoint on node2."""
    return {
        "kind": "EndpointSlice",
        "apiVersion": "discovery.k8s.io/v1",
        "metadata": {
            "name": name,
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": "loadbalancer-local"},
        },
        "addressType": f"IPv{ip_address(address).version}",
        "endpoints": [{"addresses": [address], "nodeName": "node2", "conditions": conditions}],
        "ports": [{"name": name, "port": port, "protocol": proto} for name, port, proto in ports],
    }


@pytest.mark.parametrize(
    ("conditions", "unhealthy"),
    [
        ({"ready": True}, "none"),
        ({"ready": False, "serving": True, "terminating": True}, "node2"),
    ],
)
def test_preview_of_a_node_that_serves_partly(tmp_path, conditions, unhealthy):
    """
    kube-proxy drops by port and family, and its health check counts ready endpoints of any port.

    A terminating endpoint still serves, while load balancers are told to turn away.
    """
    objects = json.loads((DATA / "objects.json").read_text())
    ports = [("http", 8080, "TCP")]
    objects["items"].append(endpoint_slice("one-more", "10.244.2.21", ports, **conditions))
    path = tmp_path / "objects.json"
    path.write_text(json.dumps(objects))
    cluster = snapshot.load(path)
    settings = {"externalTrafficPolicy": Policy.LOCAL}
    service = cluster.service("default", "loadbalancer-local")
    assert preview_lines(preview(cluster, service), settings, None) == [
        "nodes that would not serve external traffic: none",
        "nodes that would serve it: node1, node2",
        "    but node2 not on 80/tcp (ipv6), 53/udp (ipv4), 53/udp (ipv6)",
        f"health checks that would answer 503 (port 32122, /healthz): {unhealthy}",
    ]
