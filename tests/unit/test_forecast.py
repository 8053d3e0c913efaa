"""What kube-proxy will do, against what a real one did."""

import json
from ipaddress import ip_address
from itertools import groupby

import pytest

from exporters.forecast import forecast_table
from lab import hosts
from lab.kube_proxy import DATA
from lab.scenarios import cases
from tracer.cluster import snapshot
from tracer.cluster.match import Via
from tracer.judge.forecast import Forecaster, Proxy, Way, facts_of
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
    """Where a node's interfaces were not read, its pod gateway is named and has no address."""
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
    """Loopback is never guessed: it is unknown where the mode does not decide."""
    service = CLUSTER.service("default", "nodeport")
    looped = [w for w in forecaster(mode).ways(service) if w.to.is_loopback]
    verdicts = {(w.family, f.verdict) for w in looped for f in forecaster(mode).forecast(w)}
    expected = {
        "iptables": {("ipv4", "replaced"), ("ipv6", "dropped")},
        "nftables": {("ipv4", "dropped"), ("ipv6", "dropped")},
        "ipvs": {("ipv4", "unknown"), ("ipv6", "dropped")},
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


def test_rows_of_a_way_stand_together():
    """The table has a family's ways one after the other, and within each way its clients."""
    each = forecaster("iptables")
    forecasts = [
        f for w in each.ways(CLUSTER.service("default", "nodeport")) for f in each.forecast(w)
    ]
    table = forecast_table(forecasts)
    rows = [line.split()[:3] for line in table[1 : table.index("")]]
    groups = [(family, way, client) for way, client, family in rows]
    assert len(groups) > len(set(groups))
    for depth in (1, 2, 3):
        changes = [group for group, _ in groupby(group[:depth] for group in groups)]
        assert len(changes) == len(set(changes))
