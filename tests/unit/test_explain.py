"""srcip explain as its users run it, from a file of objects and without root."""

import pytest

from lab.services import OBJECTS

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
