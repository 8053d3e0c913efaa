"""What the index says about addresses: Kubernetes' rules as tables, and laws for any cluster."""

import json
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.cluster import kube
from tracer.cluster.claims import Kind, Owner, number, owner_of, prefix
from tracer.cluster.index import Cluster
from tracer.cluster.match import HostPortMatch, PodRef
from tracer.cluster.objects import Policy, ServicePort
from tracer.cluster.parse import parse
from tracer.cluster.snapshot import load
from tracer.model import TCP, UDP, ClientClass

RECORDED = Path(__file__).parents[3] / "lab" / "data" / "objects.json"


def cluster_of(*objects):
    return Cluster.build(parse(obj) for obj in objects)


@pytest.fixture(scope="module")
def recorded():
    return load(RECORDED)


# Address and port a client sends to, and the Service, port name and way that it reaches.
WAYS = [
    ("10.0.170.95", 80, TCP, "nodeport-local", "http", "clusterip"),
    ("10.0.170.95", 53, UDP, "nodeport-local", "dns", "clusterip"),
    ("2001:db8:96::5f", 80, TCP, "nodeport-local", "http", "clusterip"),
    ("10.240.0.3", 30081, TCP, "nodeport-local", "http", "nodeport"),
    ("10.240.0.5", 30054, UDP, "nodeport-local", "dns", "nodeport"),
    ("2001:db8:240::12", 30081, TCP, "nodeport-local", "http", "nodeport"),
    ("127.0.0.1", 30081, TCP, "nodeport-local", "http", "nodeport"),
    ("127.1.2.3", 30081, TCP, "nodeport-local", "http", "nodeport"),
    ("::1", 30081, TCP, "nodeport-local", "http", "nodeport"),
    ("10.244.1.1", 30081, TCP, "nodeport-local", "http", "nodeport"),
    ("203.0.113.50", 80, TCP, "loadbalancer", "http", "loadbalancer"),
    ("2001:db8:1b::50", 80, TCP, "loadbalancer", "http", "loadbalancer"),
    ("203.0.113.60", 80, TCP, "external-ip", "http", "externalip"),
    ("10.0.0.1", 443, TCP, "kubernetes", "https", "clusterip"),
]
NOWHERE = [
    ("10.0.170.95", 81, TCP),  # no such port
    ("10.0.170.95", 80, UDP),  # other protocol
    ("10.240.0.3", 80, TCP),  # a Service's port is not its NodePort
    ("10.240.0.4", 30081, TCP),  # no node
    ("10.244.2.1", 30081, TCP),  # not told to be an address of the node
    ("10.244.1.11", 8080, TCP),  # a pod
    ("::ffff:0:0", 0, 0),
]


@pytest.mark.parametrize(("address", "port", "proto", "name", "port_name", "via"), WAYS)
def test_ways_to_a_service(recorded, address, port, proto, name, port_name, via):
    """The destination address tells through which way a Service was reached."""
    match = recorded.service_at(
        ip_address(address), port, proto, node_addresses={ip_address("10.244.1.1")}
    )
    assert (match.service.name, match.port.name, match.via) == (name, port_name, via)


@pytest.mark.parametrize(("address", "port", "proto"), NOWHERE)
def test_no_service(recorded, address, port, proto):
    """Nothing else is a Service."""
    assert recorded.service_at(ip_address(address), port, proto) is None


CLASSES = [
    ("10.240.0.3", ClientClass.NODE),
    ("2001:db8:240::12", ClientClass.NODE),
    ("10.244.1.11", ClientClass.POD),
    ("10.244.2.200", ClientClass.POD),
    ("10.244.3.1", ClientClass.EXTERNAL),
    ("2001:db8:44:1::1", ClientClass.POD),
    ("203.0.113.50", ClientClass.LOADBALANCER),
    ("203.0.113.60", ClientClass.EXTERNAL),
    ("127.8.8.8", ClientClass.LOOPBACK),
    ("::1", ClientClass.LOOPBACK),
    ("::ffff:127.0.0.1", ClientClass.LOOPBACK),
    ("::ffff:10.240.0.3", ClientClass.NODE),
    ("198.51.100.10", ClientClass.EXTERNAL),
]


@pytest.mark.parametrize(("address", "expected"), CLASSES)
def test_classes(recorded, address, expected):
    """What an address is in the cluster."""
    assert recorded.classify(ip_address(address)) is expected


def named(name, proto=TCP):
    """A Service's port by what is compared of it."""
    return ServicePort(name=name, proto=proto, port=80, node_port=None, target_port=None)


def test_endpoints_of_the_protocol():
    """Ports of two protocols may have one name: each has its own endpoints."""
    ports = [{"name": "dns", "port": 53, "protocol": "UDP"}]
    slice_ = kube.slice_of("web", kube.endpoint(), ports=ports)
    cluster = Cluster.build(map(parse, (kube.service("web"), slice_)))
    assert len(cluster.endpoints(("default", "web"), named("dns", UDP), "ipv4")) == 1
    assert cluster.endpoints(("default", "web"), named("dns", TCP), "ipv4") == ()


def test_recorded_endpoints(recorded):
    """Backends carry node, pod and state; a pod may serve many Services."""
    (found,) = recorded.endpoints(("default", "nodeport-local"), named("http"), "ipv6")
    assert (str(found.address), found.port, found.node) == ("2001:db8:44:1::11", 8080, "node1")
    assert found.pod == ("default", "p11")
    assert found.is_ready
    names = [item.name for item in recorded.services_of_endpoint(found.address, 8080, TCP)]
    assert {"nodeport", "nodeport-local", "clusterip"} <= set(names)
    assert recorded.services_of_endpoint(found.address, 8081, TCP) == ()
    assert recorded.service("default", "nodeport-local").external_policy is Policy.LOCAL


def test_nodes_of_pods(recorded):
    """A pod's node is known from the pod, or from the node's pod range."""
    assert recorded.pod_at(ip_address("10.244.1.11")) == PodRef("default", "p11", "node1")
    assert recorded.node_of_pod_address(ip_address("10.244.2.99")) == "node2"
    assert recorded.node_of_pod_address(ip_address("198.51.100.10")) is None
    assert recorded.node_of(ip_address("10.240.0.5")) == "node2"
    assert (ip_network("10.244.1.0/24"), "node1") in recorded.pod_cidrs()
    assert [node.name for node in recorded.nodes()] == ["node1", "node2"]
    assert len(recorded.services()) == recorded.counts.services == 13


def test_pod_ranges_by_longest_prefix():
    """A node with a range inside another's has the pods in it."""
    cluster = cluster_of(
        kube.node("wide", ["10.1.0.1"], ["10.244.0.0/16"]),
        kube.node("narrow", ["10.1.0.2"], ["10.244.7.0/24"]),
    )
    assert cluster.node_of_pod_address(ip_address("10.244.7.7")) == "narrow"
    assert cluster.node_of_pod_address(ip_address("10.244.8.7")) == "wide"


def test_host_network():
    """The address of a hostNetwork pod is its node's, whichever object names it."""
    cluster = cluster_of(
        kube.node("node1", ["10.240.0.3"]),
        kube.pod("agent", ["10.240.0.3"], hostNetwork=True),
        kube.slice_of("web", kube.endpoint("10.240.0.3", pod="agent")),
        kube.service("web"),
    )
    address = ip_address("10.240.0.3")
    assert cluster.pod_at(address) is None
    assert cluster.classify(address) is ClientClass.NODE
    assert [item.name for item in cluster.services_of_endpoint(address, 8080, TCP)] == ["web"]


def test_pods_from_slices():
    """Pods of other nodes are known by the EndpointSlices that point to them."""
    cluster = cluster_of(kube.slice_of("web", kube.endpoint("192.168.9.9", node="n9", pod="p9")))
    assert cluster.pod_at(ip_address("192.168.9.9")) == PodRef("default", "p9", "n9")
    assert cluster.classify(ip_address("192.168.9.9")) is ClientClass.POD
    assert (ip_network("192.168.9.9/32"), ClientClass.POD) in list(cluster.prefixes())


def test_endpoints_that_are_no_pods():
    """An endpoint without a pod, such as a database outside, is external."""
    cluster = cluster_of(kube.slice_of("db", kube.endpoint("192.0.2.7", node=None, pod=None)))
    assert cluster.pod_at(ip_address("192.0.2.7")) is None
    assert cluster.classify(ip_address("192.0.2.7")) is ClientClass.EXTERNAL


def test_ended_pod():
    """A pod that has ended keeps its name, but its address may belong to another pod by now."""
    cluster = cluster_of(
        kube.pod("job", ["10.9.9.9"], phase="Succeeded"), kube.pod("new", ["10.9.9.9"])
    )
    assert cluster.pod_at(ip_address("10.9.9.9")).name == "new"


def test_headless_without_ports():
    """A headless Service that names no port has its backends whatever the port."""
    cluster = cluster_of(
        kube.service("db", clusterIPs=["None"], ports=[]),
        kube.slice_of("db", kube.endpoint("10.244.1.11"), ports=[]),
    )
    (found,) = cluster.services_of_endpoint(ip_address("10.244.1.11"), 5432, TCP)
    assert found.is_headless
    assert cluster.service_at(ip_address("10.244.1.11"), 5432, TCP) is None


def test_slices_are_merged():
    """A Service's slices are one list; of an endpoint in two of them, the ready one counts."""
    cluster = cluster_of(
        kube.service("web"),
        kube.slice_of("web", kube.endpoint("10.244.1.11", ready=False), name="a"),
        kube.slice_of("web", kube.endpoint("10.244.1.11", ready=True), name="b"),
        kube.slice_of("web", kube.endpoint("10.244.2.12", "node2", serving=False), name="c"),
        kube.slice_of("web", kube.endpoint("2001:db8::1"), name="d", family="IPv6"),
    )
    found = cluster.endpoints(("default", "web"), named("http"), "ipv4")
    assert [(str(e.address), e.is_ready, e.is_serving) for e in found] == [
        ("10.244.1.11", True, True),
        ("10.244.2.12", True, False),
    ]
    assert len(cluster.endpoints(("default", "web"), named("http"), "ipv6")) == 1
    assert cluster.endpoints(("default", "web"), named(None), "ipv4") == ()


def test_load_balancer_modes():
    """ipMode Proxy is recognised; an ingress with only a hostname has no address."""
    status = {
        "loadBalancer": {
            "ingress": [
                {"ip": "203.0.113.1"},
                {"ip": "203.0.113.2", "ipMode": "Proxy"},
                {"hostname": "lb.example"},
            ]
        }
    }
    service = parse(kube.service("web", type="LoadBalancer", status=status))
    found = [(str(item.address), item.is_proxy) for item in service.load_balancer]
    assert found == [("203.0.113.1", False), ("203.0.113.2", True)]


HOST_PORT = {"containerPort": 8080, "hostPort": 8000, "protocol": "TCP"}


@pytest.mark.parametrize(
    ("port", "address", "node", "found"),
    [
        (HOST_PORT, "10.240.0.3", None, True),
        (HOST_PORT, "10.240.0.5", None, False),  # another node
        (HOST_PORT, "127.0.0.1", "node1", True),
        (HOST_PORT, "127.0.0.1", None, False),  # whose loopback?
        (HOST_PORT, "10.244.1.1", "node1", True),
        (HOST_PORT, "10.244.1.1", "node2", False),
        (HOST_PORT | {"hostIP": "::"}, "10.240.0.3", None, True),
        (HOST_PORT | {"hostIP": "127.0.0.1"}, "10.240.0.3", None, False),
        (HOST_PORT | {"hostIP": "127.0.0.1"}, "127.0.0.1", "node1", True),
        (HOST_PORT | {"protocol": "UDP"}, "10.240.0.3", None, False),
    ],
)
def test_host_ports(port, address, node, found):
    """A host port is served on its own node, at the address that it names or at all of them."""
    cluster = cluster_of(
        kube.node("node1", ["10.240.0.3"]),
        kube.node("node2", ["10.240.0.5"], ["10.244.2.0/24"]),
        kube.pod("web", ports=[port]),
        kube.pod("host", ["10.240.0.3"], hostNetwork=True, ports=[HOST_PORT]),
    )
    others = {ip_address("10.244.1.1")}
    match = cluster.service_at(ip_address(address), 8000, TCP, node_addresses=others, node=node)
    assert isinstance(match, HostPortMatch) is found
    if match is not None:
        assert match.pod == PodRef("default", "web", "node1")


def test_one_address_claimed_twice():
    """If two Services claim an address, a ClusterIP comes first, then names decide."""
    cluster = cluster_of(
        kube.service("a", clusterIPs=["10.0.0.1"], externalIPs=["10.0.0.2", "10.0.0.9"]),
        kube.service("c", clusterIPs=["10.0.0.3"], externalIPs=["10.0.0.9"]),
        kube.service("b", clusterIPs=["10.0.0.2"]),
    )
    assert cluster.service_at(ip_address("10.0.0.2"), 80, TCP).service.name == "b"
    assert cluster.service_at(ip_address("10.0.0.9"), 80, TCP).service.name == "a"
    without = cluster.changed(remove=[Owner(Kind.SERVICE, "default", "a")])
    assert without.service_at(ip_address("10.0.0.9"), 80, TCP).service.name == "c"
    assert cluster.service_at(ip_address("10.0.0.9"), 80, TCP).service.name == "a"


def test_snapshots_share():
    """A change that changes nothing is the same snapshot."""
    before = cluster_of(kube.service("web"))
    assert before.changed(put=[parse(kube.service("web"))]) is before
    assert before.changed(remove=[Owner(Kind.POD, "default", "none")]) is before


# Few values, so that objects meet each other.
ADDRESSES = st.sampled_from(
    ["10.0.0.1", "10.0.0.2", "10.0.1.1", "127.0.0.1", "2001:db8::1", "2001:db8:0:1::1", "::1"]
)
CIDRS = st.sampled_from(
    ["10.0.0.0/24", "10.0.0.0/30", "10.0.0.0/8", "127.0.0.0/8", "127.0.0.0/16", "2001:db8::/64",
     "2001:db8::/32", "0.0.0.0/0", "::/0", "::1/128", "10.0.0.2/32"]
)  # fmt: skip
NAMES = st.sampled_from(["a", "b"])
SOME = {"max_size": 3, "unique": True}
SERVICES = st.builds(
    lambda name, ips, external, balancers, ports: kube.service(
        name,
        type="LoadBalancer",
        clusterIPs=ips,
        externalIPs=external,
        status=kube.balanced(*balancers),
        ports=[{"port": port, "nodePort": port + 1} for port in ports],
    ),
    NAMES,
    st.lists(ADDRESSES, **SOME),
    st.lists(ADDRESSES, **SOME),
    st.lists(ADDRESSES, **SOME),
    st.lists(st.integers(80, 82), **SOME),
)
NODES = st.builds(kube.node, NAMES, st.lists(ADDRESSES, **SOME), st.lists(CIDRS, **SOME))
PODS = st.builds(
    lambda name, ips, node, is_host: kube.pod(
        name, ips, node, hostNetwork=is_host, ports=[HOST_PORT]
    ),
    NAMES,
    st.lists(ADDRESSES, **SOME),
    NAMES,
    st.booleans(),
)
SLICES = st.builds(
    lambda name, service, endpoints: kube.slice_of(
        service, *(kube.endpoint(*item) for item in endpoints), name=name
    ),
    NAMES,
    NAMES,
    st.lists(
        st.tuples(ADDRESSES.filter(lambda text: "." in text), NAMES, st.none() | NAMES), max_size=4
    ),
)
OBJECTS = st.one_of(SERVICES, NODES, PODS, SLICES).map(parse)


@given(st.lists(st.tuples(OBJECTS, st.booleans()), max_size=12))
def test_changes_equal_a_rebuild(changes):
    """However a cluster came about, it is the cluster of the objects that are there."""
    cluster, there = Cluster(), {}
    for obj, is_gone in changes:
        owner = owner_of(obj)
        if is_gone:
            cluster = cluster.changed(remove=[owner])
            there.pop(owner, None)
        else:
            cluster = cluster.changed(put=[obj])
            there[owner] = obj
    assert cluster == Cluster.build(there.values())
    assert Cluster.build([]) == cluster.changed(remove=there)


@given(st.lists(OBJECTS, max_size=8), st.lists(ADDRESSES | st.just("198.51.100.1"), min_size=1))
def test_prefixes_say_what_classify_does(objects, addresses):
    """An address has the class of its longest prefix; each prefix is returned once."""
    cluster = Cluster.build(objects)
    prefixes = list(cluster.prefixes())
    assert len({network for network, _ in prefixes}) == len(prefixes)
    for address in map(ip_address, addresses):
        # The kernel's trie holds 128-bit addresses, IPv4 as IPv6 maps it.
        around = [
            (length, kind)
            for (length, bits), kind in ((prefix(network), kind) for network, kind in prefixes)
            if number(address) >> (128 - length) == bits
        ]
        expected = max(around)[1] if around else ClientClass.EXTERNAL
        assert cluster.classify(address) is expected


@given(st.lists(OBJECTS, max_size=8), ADDRESSES, st.integers(79, 84), st.sampled_from([TCP, UDP]))
@settings(max_examples=50)
def test_any_question_has_an_answer(objects, address, port, proto):
    """No cluster and no address makes a question fail."""
    cluster, address = Cluster.build(objects), ip_address(address)
    match = cluster.service_at(address, port, proto, node_addresses=(address,), node="a")
    assert match is None or match.via
    for service in cluster.services():
        cluster.endpoints(service.key, named(None), "ipv4")
    cluster.services_of_endpoint(address, port, proto)
    cluster.node_of_pod_address(address)
    assert json.dumps(cluster.pod_at(address)) is not None
