"""srcip explain as its users run it, from a file of objects and without root."""

import json

import pytest

from lab.services import OBJECTS
from tracer.judge.cause import MEANINGS

CLUSTER = ("--cluster", OBJECTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["default/clusterip", "--set", "externalTrafficPolicy=Local"],
            "Service default/clusterip has no externalTrafficPolicy: it is of type ClusterIP "
            "without externalIPs",
        ),
        (
            ["default/nodeport", "--set", "externalTrafficPolicy=Local", "--from-recording", "/x"],
            "cannot read recording /x: No such file or directory",
        ),
        (
            ["default/nodeport", "--probe-health"],
            "Service default/nodeport has no healthCheckNodePort: only type LoadBalancer with "
            "externalTrafficPolicy Local has one",
        ),
    ],
)
def test_what_cannot_be_told(srcip, arguments, message):
    """If the forecast fails, there is one line, and no half answer before it."""
    assert srcip("explain", *CLUSTER, *arguments) == (1, "", f"srcip: {message}\n")


def file_without(tmp_path, *kinds):
    items = [item for item in json.loads(OBJECTS.read_text())["items"] if item["kind"] not in kinds]
    path = tmp_path / "objects.json"
    path.write_text(json.dumps({"kind": "List", "items": items}))
    return path


def test_objects_without_nodes(srcip, tmp_path):
    """A forecast is made for each node: without Nodes there is none, and no empty table."""
    path = file_without(tmp_path, "Node")
    code, out, err = srcip("explain", "--cluster", path, "default/nodeport")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("srcip: the objects hold no Nodes: ")


def test_objects_that_lack_a_kind(srcip, tmp_path):
    """A file without a kind of objects is told so: the answers alone would not show it."""
    path = file_without(tmp_path, "EndpointSlice", "Pod")
    code, _, err = srcip("explain", "--cluster", path, "default/nodeport")
    assert code == 0
    assert err.startswith(f"srcip: {path} holds no EndpointSlices, no Pods: ")
    assert err.count("\n") == 1


def test_causes_as_json(srcip):
    """Each cause is a line, with what the text says of it."""
    code, out, _ = srcip("explain", "--causes", "-o", "json")
    told = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert {each["cause"]: each["meaning"] for each in told} == MEANINGS


def test_external_ip_with_a_policy(srcip):
    """A Service of type ClusterIP that has external addresses has the policy, too."""
    code, out, _ = srcip(
        *("explain", *CLUSTER, "default/external-ip", "--set", "externalTrafficPolicy=Local")
    )
    assert code == 0
    assert "With externalTrafficPolicy: Local:" in out


def test_a_preview_says_that_it_is_one(srcip):
    """The first line distinguishes what is from what would be."""
    as_it_is = srcip("explain", *CLUSTER, "default/nodeport", "--proxy-mode", "iptables")[1]
    assert as_it_is.startswith(
        "default/nodeport: NodePort, externalTrafficPolicy Cluster, internalTrafficPolicy Cluster; "
        "kube-proxy in iptables mode\n"
    )
    local = ("--set", "externalTrafficPolicy=Local")
    assert srcip("explain", *CLUSTER, "default/nodeport", *local)[1].startswith(
        "default/nodeport after the change: NodePort, externalTrafficPolicy Local, "
        "internalTrafficPolicy Cluster; kube-proxy in unknown mode\n"
    )


def test_health_of_nodes_without_addresses(srcip, tmp_path):
    """A node that has just joined has none yet: its line says so, and nobody is asked."""
    items = json.loads(OBJECTS.read_text())["items"]
    for item in items:
        if item["kind"] == "Node":
            item["status"]["addresses"] = []
    path = tmp_path / "objects.json"
    path.write_text(json.dumps({"kind": "List", "items": items}))
    asked = ("explain", "--cluster", path, "default/loadbalancer-local", "--probe-health")
    code, out, _ = srcip(*asked)
    assert code == 0
    assert out.splitlines()[-1].startswith("  node2: its Node object has no address; the objects")
    _, out, _ = srcip(*asked, "-o", "json")
    assert json.loads(out.splitlines()[-1])["error"] == "its Node object has no address"
