"""The table of scenarios against what was recorded from a real kube-proxy, and the docs."""

import json
from pathlib import Path

import pytest

from lab import echo, hosts, scenarios, services
from lab.kube_proxy import DATA, MODES
from lab.scenarios import SCENARIOS, cases
from tracer.errors import LabError

ROOT = Path(__file__).parents[2]

# S10 is S8a with its own load balancer, S11 is no connection.
IDS = """
    S1 S2 S3 S4 S5 S6 S7a S7b S8a S8b S9a S9b S9c S12 S13 S14a S14b S14c S14d S14e S14f
    S15a S15b S16a S16b S17a S17b S18 S19a S19b
"""


def observed():
    return [json.loads(line) for line in (DATA / "observed.jsonl").read_text().splitlines()]


def as_observed(case):
    """Write a case as ``observed.jsonl`` writes it."""
    scenario = case.scenario
    return {
        "mode": case.mode,
        "scenario": scenario.id,
        "what": scenario.title,
        "from": scenario.client,
        "from_address": str(scenarios.address(scenario.client, case.family)),
        "to": str(case.destination),
        "port": case.port,
        "via": scenario.through,
        "family": case.family,
        "proto": case.proto,
        "client_address": str(case.expected_client_address or case.expected_outcome.upper()),
        "pod": "p11" if case.expected_outcome == "answered" else None,
    }


def test_cases_are_what_was_observed():
    """The 204 connections are those that were recorded, one to one and in their order."""
    computed = [as_observed(case) for case in cases() if case.scenario.observed]
    assert len(computed) == 204
    assert computed == observed()


def test_every_scenario_is_there_once():
    """The table has each scenario of the plan, and each only once."""
    assert [scenario.id for scenario in SCENARIOS] == IDS.split()


def test_what_was_not_observed():
    """S9 has no record: the proxy is the lab's. Nor has S13: kube-proxy is not involved."""
    unobserved = [scenario.id for scenario in SCENARIOS if not scenario.observed]
    assert unobserved == ["S9a", "S9b", "S9c", "S13"]


def test_proxied_connections_must_be_asked_for():
    """Those through a proxy need a running one, whose headers are read: TCP, to the proxy."""
    assert [case for case in cases() if case.scenario.relay is not None] == []
    behind = cases(modes=["iptables"], has_relay=True, scenarios=["S9a", "S9b", "S9c"])
    assert {case.proto for case in behind} == {"tcp"}
    assert {str(case.destination) for case in behind} == {"198.51.100.1", "2001:db8:c::1"}
    assert len({case.port for case in behind}) == 3
    assert len(cases(has_relay=True)) == len(cases()) + 12


@pytest.mark.parametrize("mode", MODES)
def test_pod_egress_shows_the_node(mode):
    """A pod that leaves the cluster is seen with the address of its node."""
    seen = {str(case.expected_client_address) for case in cases(modes=[mode], scenarios=["S13"])}
    assert seen == {"10.240.0.3", "2001:db8:240::11"}


def test_cases_can_be_narrowed():
    """Each argument keeps only what it names."""
    (case,) = cases(modes=["nftables"], families=["ipv6"], protos=["udp"], scenarios=["S3"])
    assert str(case) == "S3 nftables ipv6 udp"
    assert (str(case.destination), case.port) == ("2001:db8:240::12", 30053)


def test_excluded_client_binds_its_own_address():
    """S16b comes from the client host's second address, in IPv4 only."""
    excluded = cases(scenarios=["S16b"])
    assert {(case.host, case.source) for case in excluded} == {("client", hosts.CLIENT2)}
    assert {case.family for case in excluded} == {"ipv4"}


def test_verdict_agrees_with_what_is_seen():
    """Preserved means that the backend sees the client, dropped that it sees nothing."""
    for case in cases():
        client = scenarios.address(case.scenario.client, case.family)
        assert (case.verdict == "dropped") == (case.expected_client_address is None), case
        assert (case.cause is None) == (case.verdict == "preserved"), case
        if case.verdict == "preserved":
            assert case.expected_client_address == client, case


@pytest.mark.parametrize(
    ("mode", "family", "verdict", "cause"),
    [
        ("iptables", "ipv4", "replaced", "localhost-nodeport"),
        ("iptables", "ipv6", "dropped", "no-listener"),
        ("nftables", "ipv4", "dropped", "no-listener"),
        ("nftables", "ipv6", "dropped", "no-listener"),
    ],
)
def test_nodeport_on_loopback_depends_on_mode_and_family(mode, family, verdict, cause):
    """Only kube-proxy's iptables mode serves a NodePort on loopback, and only in IPv4."""
    for case in cases(modes=[mode], families=[family], scenarios=["S14e"]):
        assert (case.verdict, case.cause) == (verdict, cause)


def test_a_race_may_end_either_way():
    """Over IPv6 TCP a REJECT may be noticed or not; a backend must not be reached."""
    (case,) = cases(modes=["iptables"], families=["ipv6"], protos=["tcp"], scenarios=["S15a"])
    assert case.is_met("timeout", None)
    assert case.is_met("refused", None)
    assert not case.is_met("answered", hosts.PODS["p12"].address.ipv6)


def test_pods_of_the_lab_are_those_of_the_objects():
    """The lab's pods and nodes have the addresses that the recorded objects give them."""
    items = json.loads(services.OBJECTS.read_text())["items"]
    recorded = {
        item["metadata"]["name"]: (item["spec"]["nodeName"], item["status"]["podIPs"])
        for item in items
        if item["kind"] == "Pod"
    }
    assert recorded == {
        pod.name: (
            pod.node.name,
            [{"ip": str(pod.address.ipv4)}, {"ip": str(pod.address.ipv6)}],
        )
        for pod in hosts.PODS.values()
    }


def test_documentation_is_in_step():
    """docs/scenarios.md is what ``python -m lab.scenarios`` prints."""
    assert (ROOT / "docs" / "scenarios.md").read_text() == scenarios.markdown()


def test_service_without_node_port_is_refused():
    """A way that the Service does not offer is a mistake in the table, and named as one."""
    scenario = scenarios.Scenario(
        id="X",
        title="",
        client="client",
        service="clusterip",
        via="nodeport",
        target="node1",
        expect=SCENARIOS[0].expect,
    )
    with pytest.raises(ValueError, match="clusterip cannot be reached via nodeport"):
        scenarios.destination(scenario, "ipv4", "tcp")


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"hello", b'{"pod": "p11"}', b"\xff"])
def test_foreign_answer_is_an_error(body):
    """An answer that no echo server of the lab can have sent is refused in one line."""
    with pytest.raises(LabError, match="is not from an echo server"):
        echo.decode(body)


def test_answer_survives_the_wire():
    """An answer is decoded as it was encoded."""
    answer = echo.Answer(pod="p11", client_address=hosts.CLIENT.ipv6, client_port=40000)
    assert echo.decode(answer.encode()) == answer
