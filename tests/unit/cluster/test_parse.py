"""Kubernetes objects from JSON: what is read, and how what cannot be is refused."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.cluster import kube
from tracer.cluster.errors import ClusterError
from tracer.cluster.objects import Policy, SessionAffinity
from tracer.cluster.parse import parse

RECORDED = json.loads((Path(__file__).parents[3] / "lab" / "data" / "objects.json").read_text())[
    "items"
]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"type": "ClusterIP"}, None),
        ({"type": "NodePort"}, Policy.CLUSTER),
        ({"type": "LoadBalancer", "externalTrafficPolicy": "Local"}, Policy.LOCAL),
        ({"type": "ClusterIP", "externalIPs": ["192.0.2.1"]}, Policy.CLUSTER),
        ({}, None),
    ],
)
def test_external_policy(spec, expected):
    """A Service that can be reached from outside has an external policy, by default Cluster."""
    assert parse(kube.service("web", **spec)).external_policy is expected


def test_service_fields():
    """All fields that affect source addresses are read."""
    service = parse(
        kube.service(
            "web",
            type="LoadBalancer",
            internalTrafficPolicy="Local",
            sessionAffinity="ClientIP",
            loadBalancerSourceRanges=["192.0.2.0/24 ", "2001:db8::/32"],
            healthCheckNodePort=32000,
            ports=[{"name": "", "port": 80, "nodePort": 30080, "targetPort": "web"}],
        )
    )
    assert service.internal_policy is Policy.LOCAL
    assert service.session_affinity is SessionAffinity.CLIENT_IP
    assert [str(item) for item in service.source_ranges] == ["192.0.2.0/24", "2001:db8::/32"]
    assert service.health_check_node_port == 32000
    (port,) = service.ports
    assert (port.name, port.node_port, port.target_port) == (None, 30080, "web")
    assert str(service.key) == "default/web"


def test_external_name():
    """An ExternalName Service has a name and no addresses."""
    service = parse(
        kube.service("db", type="ExternalName", externalName="db.example", clusterIPs=None)
    )
    assert (service.external_name, service.cluster_ips, service.is_headless) == (
        "db.example", (), False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({}, (True, True, False)),
        ({"ready": None}, (True, True, False)),
        ({"ready": False}, (False, False, False)),
        ({"ready": False, "serving": True, "terminating": True}, (False, True, True)),
    ],
)
def test_conditions(conditions, expected):
    """Conditions left out count as the API reference says."""
    (found,) = parse(kube.slice_of("web", kube.endpoint(**conditions))).endpoints
    assert (found.is_ready, found.is_serving, found.is_terminating) == expected


@pytest.mark.parametrize(
    "obj",
    [
        {"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "x"}},
        {"kind": "Service", "apiVersion": "serving.knative.dev/v1", "metadata": {}},
        kube.slice_of("web", family="FQDN"),
    ],
)
def test_not_used(obj):
    """Other kinds, and other groups' kinds of the same name, are left alone."""
    assert parse(obj) is None


BAD = [
    ({}, "not a Kubernetes object: it has no kind"),
    ({"kind": "Pod"}, "Pod: metadata.name is missing, expected a Kubernetes name"),
    (kube.service("\x1b[31m"), r"Service default/'\x1b[31m': metadata.name is '\x1b[31m',"
     " expected a Kubernetes name"),
    (kube.service(ports=[{"port": "many"}]),
     "Service default/web: spec.ports[0].port is 'many', expected a number from 1 to 65535"),
    (kube.service(ports=[{"port": 80, "protocol": "ICMP"}]),
     "Service default/web: spec.ports[0].protocol is 'ICMP', expected TCP, UDP or SCTP"),
    (kube.service(ports={"a": 1}), "Service default/web: spec.ports is an object, expected a list"),
    (kube.service(clusterIPs=["10.0.0"]),
     "Service default/web: spec.clusterIPs holds '10.0.0', expected an IP address"),
    (kube.service(type="Magic"), "Service default/web: spec.type is 'Magic',"
     " expected ClusterIP or NodePort or LoadBalancer or ExternalName"),
    (kube.service(type="NodePort", externalTrafficPolicy="local"),
     "Service default/web: spec.externalTrafficPolicy is 'local', expected Cluster or Local"),
    (kube.slice_of("web", kube.endpoint("2001:db8::1")),
     "EndpointSlice default/web-1: endpoints[0].addresses is a list, expected ipv4 addresses"),
    (kube.slice_of("web", kube.endpoint(ready="yes")),
     "EndpointSlice default/web-1: endpoints[0].conditions.ready is 'yes', expected true or false"),
    (kube.slice_of("web", family="IPv5"),
     "EndpointSlice default/web-1: addressType is 'IPv5', expected IPv4, IPv6 or FQDN"),
    (kube.node(cidrs=["10.0.0.0/99"]),
     "Node node1: spec.podCIDRs holds '10.0.0.0/99', expected a CIDR"),
    (kube.pod(hostNetwork="no"),
     "Pod default/p1: spec.hostNetwork is 'no', expected true or false"),
]  # fmt: skip


@pytest.mark.parametrize(("obj", "message"), BAD)
def test_malformed(obj, message):
    """A malformed object is refused in one line that names kind, object and field."""
    with pytest.raises(ClusterError) as caught:
        parse(obj)
    assert str(caught.value) == message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


def refusal(obj):
    """Return the reason for which an object is refused, None if it is not."""
    try:
        parse(obj)
    except ClusterError as error:
        return str(error)
    return None


def paths(value, path=()):
    """Yield the path of everything in a JSON value."""
    yield path
    keys = value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    for key in keys:
        yield from paths(value[key], (*path, key))


PLACES = [(obj, path) for obj in RECORDED for path in paths(obj) if path]


@given(st.sampled_from(PLACES), JSON)
def test_any_field_may_be_anything(place, value):
    """Whatever an object contains, it is read, or refused in one printable line."""
    obj, (*path, last) = copy.deepcopy(place[0]), place[1]
    at = obj
    for key in path:
        at = at[key]
    at[last] = value
    assert (refusal(obj) or "read").isprintable()


@given(JSON)
def test_any_json(value):
    """What is no object at all is refused as well."""
    assert refusal(value) or parse(value) is None


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("192.000.2.09", "192.0.2.9"),
        ("010.0.0.1", "10.0.0.1"),
        ("0192.00.2.0", "192.0.2.0"),
        ("::ffff:192.0.2.9", "192.0.2.9"),
        ("2001:db8::9", "2001:db8::9"),
    ],
)
def test_addresses_as_kubernetes_reads_them(text, read):
    """Leading zeros, as older API servers kept them, are decimal; a mapped address is IPv4."""
    assert [str(item) for item in parse(kube.service(externalIPs=[text])).external_ips] == [read]


@pytest.mark.parametrize("text", ["192.0.2", "0x10.0.0.1", "192.0.2.0256", "192.00.2.x", "00", ""])
def test_what_is_no_address(text):
    """Nothing else is guessed at."""
    with pytest.raises(ClusterError, match="expected an IP address"):
        parse(kube.service(externalIPs=[text]))


def test_networks_as_kubernetes_reads_them():
    """Leading zeros as in addresses; bits of the host do not count."""
    service = kube.service(loadBalancerSourceRanges=["010.0.1.0/16", " 2001:db8::1/32 "])
    assert list(map(str, parse(service).source_ranges)) == ["10.0.0.0/16", "2001:db8::/32"]


def test_an_endpoints_pod_is_in_the_slices_namespace():
    """Also where the reference does not say so."""
    endpoint = {"addresses": ["10.244.1.11"], "targetRef": {"kind": "Pod", "name": "p1"}}
    slice_ = parse(kube.slice_of("web", endpoint, namespace="shop"))
    assert slice_.endpoints[0].pod == ("shop", "p1")


def test_a_nodes_internal_addresses_come_first():
    """In whatever order the API has them: kube-proxy prefers them."""
    node = kube.node("node1")
    node["status"]["addresses"] = [
        {"type": kind, "address": address}
        for kind, address in (
            ("ExternalIP", "198.51.100.1"),
            ("Hostname", "node1"),
            ("InternalIP", "10.240.0.3"),
            ("InternalIP", "2001:db8:240::11"),
        )
    ]
    found = [str(address) for address in parse(node).addresses]
    assert found == ["10.240.0.3", "2001:db8:240::11", "198.51.100.1"]
