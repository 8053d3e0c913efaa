"""
kube-proxy's IPVS mode: what the lab makes of the objects, and what a kernel with IPVS did with it.

``tests/data/ipvs`` is what ``tests.vm.record_ipvs`` recorded under Linux 6.12.
"""

import re
from collections import Counter
from dataclasses import replace
from ipaddress import ip_address

import pytest

from exporters.text import explanation
from lab import hosts, ipvs
from lab.agreement import Traced
from lab.probe import Answer
from lab.scenarios import cases
from tests.unit import samples, world
from tests.unit import test_forecast as observations
from tests.unit.samples import flow
from tracer.judge.connection import judge_connection
from tracer.judge.drop import judge_drop
from tracer.judge.preview import hidden_clients
from tracer.judge.view import View
from tracer.model import Hook, Status
from tracer.place import from_json, to_json
from tracer.ruleset.model import Owner
from tracer.views import Place

OBSERVED = world.ipvs_lines("observed.jsonl")
RECORDS = world.ipvs_lines("records.jsonl")
(ADDRESSES,) = world.ipvs_lines("addresses.json")
CASES = {(c.scenario.id, c.family, c.proto): c for c in cases(modes=["ipvs"])}
WAYS = {
    "loadbalancer": "loadbalancer",
    "loadbalancer-local": "loadbalancer",
    "external-ip": "externalip",
    "nodeport": "nodeport",
    "nodeport-local": "nodeport",
    "internal-local": "clusterip",
}
FORECASTER = observations.forecaster("ipvs")
# Where the kernel's addresses of functions are not recorded, but their names.
SOMEWHERE = 1


def recorded(node, suffix):
    return (world.IPVS / f"{node}.{suffix}").read_text()


def servers(node):
    """The virtual servers of a node, each with its real servers."""
    found = {}
    for line in ipvs.setup(node).servers.splitlines():
        verb, flag, at, *more = line.split()
        key = ({"-t": "tcp", "-u": "udp"}[flag], at)
        found.setdefault(key, set())
        if verb == "-a":
            found[key].add(more[1])
    return found


def entries(node, name):
    lines = ipvs.setup(node).sets.splitlines()
    return {line.split()[2] for line in lines if line.startswith(f"add {name} ")}


@pytest.mark.parametrize("node", hosts.NODES)
def test_kernel_has_what_was_made(node):
    """Sets, their entries and the servers are read back from the kernel as they were written."""
    setup = ipvs.setup(node)
    sets = recorded(node, "ipset").splitlines()
    made = setup.sets.splitlines()
    # A network of one address is printed without its length.
    assert {line for line in sets if line.startswith("add ")} == {
        re.sub(r"/(32|128)$", "", line) for line in made if line.startswith("add ")
    }
    named = [line.split()[1:3] for line in sets if line.startswith("create ")]
    assert sorted(named) == sorted(line.split()[1:3] for line in made if line.startswith("create "))
    assert len(named) == 2 * 17
    assert sorted(recorded(node, "ipvs").splitlines()) == sorted(setup.servers.splitlines())


@pytest.mark.parametrize("node", hosts.NODES)
@pytest.mark.parametrize(("family", "suffix"), [("ipv4", "iptables"), ("ipv6", "ip6tables")])
def test_kernel_has_the_rules_that_were_made(node, family, suffix):
    """Each chain has as many rules, and in the order of their targets, as were written."""
    made = ipvs.setup(node).rules[family].splitlines()
    printed = recorded(node, suffix).splitlines()
    for chain in {line.split()[1] for line in printed if line.startswith("-A KUBE-")}:
        here = [
            [line.split(" -j ")[1].split()[0] for line in lines if line.startswith(f"-A {chain} ")]
            for lines in (made, printed)
        ]
        assert sorted(here[0]) == sorted(here[1]), chain
    jumps = [line for line in printed if re.match(r"-A (INPUT|FORWARD|OUTPUT|P\w+ROUTING) ", line)]
    assert len(jumps) == 9


@pytest.mark.parametrize(
    ("node", "server", "real"),
    [
        # policy Cluster, on either node, by each of its addresses
        ("node1", "10.0.170.94:80", {"10.244.1.11:8080"}),
        ("node2", "10.240.0.5:30080", {"10.244.1.11:8080"}),
        ("node2", "10.244.2.1:30080", {"10.244.1.11:8080"}),
        ("node2", "203.0.113.60:80", {"10.244.1.11:8080"}),
        ("node2", "[2001:db8:240::12]:30080", {"[2001:db8:44:1::11]:8080"}),
        # no endpoint anywhere: a server all the same
        ("node1", "10.0.170.102:80", set()),
        # policy Local without an endpoint here: those of the cluster
        ("node1", "10.240.0.3:30081", {"10.244.1.11:8080"}),
        ("node2", "10.240.0.5:30081", {"10.244.1.11:8080"}),
        ("node2", "10.0.170.100:80", {"10.244.1.11:8080"}),
    ],
)
def test_real_servers(node, server, real):
    """Each virtual server has the endpoints that its policy allows."""
    assert servers(node)["tcp", server] == real


def test_policy_local_takes_what_is_here():
    """With endpoints on both nodes, policy Local keeps to those of its own."""
    proxier = ipvs._Proxier(hosts.NODES["node2"], "ipv4")
    spread = next(p for p in ipvs.service_ports("ipv4") if p.service == "nodeport-spread")
    chosen = proxier._chosen(spread, is_local=True)
    assert {str(each.address) for each in chosen} == {"10.244.2.21", "10.244.2.22"}
    assert len(proxier._chosen(spread, is_local=False)) == 4


def test_sets():
    """Sets exist in both families, under names that the kernel accepts, with the right entries."""
    assert entries("node1", "KUBE-LOOP-BACK") >= {"10.244.1.11,tcp:8080,10.244.1.11"}
    assert not any("10.244.1." in each for each in entries("node2", "KUBE-LOOP-BACK"))
    assert entries("node1", "KUBE-NODE-PORT-LOCAL-TCP") == {"30081", "30083"}
    assert entries("node1", "KUBE-NODE-PORT-TCP") > {"30080", "30081"}
    assert entries("node1", "KUBE-6-LOAD-BALANCER-SOURCE-CID") == {
        "2001:db8:1b::52,tcp:80,2001:db8:c::10/128",
        "2001:db8:1b::52,udp:53,2001:db8:c::10/128",
    }
    names = [line.split()[1] for line in ipvs.setup("node1").sets.splitlines()]
    assert max(map(len, names)) == 31
    bound = {str(ip) for ip in ipvs.setup("node1").addresses}
    assert entries("node1", "KUBE-IPVS-IPS") == {ip for ip in bound if "." in ip}
    assert set(ADDRESSES["node1"]) >= bound


def test_every_case_was_observed():
    """What the kernel did is what the table has for IPVS mode: 104 connections and S13."""
    assert len(OBSERVED) == len(CASES) == 106
    for seen in OBSERVED:
        case = CASES[seen["scenario"], seen["family"], seen["proto"]]
        said = seen["client_address"]
        outcomes = {case.expected_outcome, case.expected_or_outcome}
        if case.expected_client_address is None:
            assert said.lower() in outcomes, case
        else:
            assert said == str(case.expected_client_address), case


@pytest.mark.parametrize("node", hosts.NODES)
def test_rules_betray_how_kube_proxy_runs(node):
    """Mode, mark and cluster ranges are read from the rules as a kernel prints them."""
    rules = world.recorded("ipvs", node)
    assert (rules.proxy_mode, rules.masquerade_mark) == ("ipvs", 0x4000)
    assert rules.has_masquerade_all is False
    assert set(rules.cluster_cidrs) == {hosts.CLUSTER.ipv4, hosts.CLUSTER.ipv6}
    assert rules.unread == ()


def view(node):
    return View(
        node=node,
        cluster=world.CLUSTER,
        rules=world.recorded("ipvs", node),
        addresses=frozenset(map(ip_address, ADDRESSES[node])),
        service_addresses=frozenset(ipvs.setup(node).addresses),
        interfaces=world.INTERFACES[node],
    )


def judged(record):
    """Judge the recorded kernel data."""
    node = record["node"]
    index = {name: number for number, name in world.INTERFACES[node].items()} | {"": 0}
    devices = {
        key: index[record[key]] for key in ("iif", "oif", "ifindex", "dst_ifindex") if key in record
    }
    if record["kind"] == "connection":
        connection = samples.connection(
            _flow(record["orig"]), _flow(record["reply"]),
            status=Status(record["status"]), mark=record["mark"], hook=Hook(record["hook"]),
            **devices,
        )  # fmt: skip
        return judge_connection(connection, view(node), time_ns=0)
    drop = samples.drop(
        packet=_flow(record["packet"]), orig=_flow(record["orig"]), mark=record["mark"],
        is_new=record["is_new"], is_reply=record["is_reply"],
        dst_input=SOMEWHERE if record["dst_input"] else None, **devices,
    )  # fmt: skip
    return judge_drop(
        drop,
        view(node),
        time_ns=0,
        reason=record["reason"],
        place=record["place"],
        dst_input=record["dst_input"],
    )


def _flow(told):
    return told and flow(told["src"], told["sport"], told["dst"], told["dport"], told["proto"])


@pytest.fixture(scope="module")
def findings():
    """Each case with the tracer's finding, from the kernel data of all nodes."""
    traced = Traced()
    traced.add(map(judged, RECORDS))
    found = {}
    for seen in OBSERVED:
        case = CASES[seen["scenario"], seen["family"], seen["proto"]]
        said = seen["client_address"]
        has_answer = said not in ("TIMEOUT", "REFUSED")
        source, port = seen["from_socket"]
        answer = Answer(
            outcome="answered" if has_answer else said.lower(),
            client_address=ip_address(said) if has_answer else None,
            pod=seen["pod"],
            local=(ip_address(source), port),
        )
        found[str(case)] = traced.find(case, answer)
    return found


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_verdicts_on_what_the_kernel_did(findings, case):
    """Verdict and cause are the table's, and the address is the one that the backend saw."""
    finding = findings[str(case)]
    assert (finding.verdict, finding.cause) == (case.verdict, case.cause)
    assert finding.agrees


def test_rules(findings):
    """The rule that masquerades is certain, except for hairpins: their set is not read."""
    for case in CASES.values():
        opinion = findings[str(case)].opinion
        if case.verdict == "replaced":
            is_kube_proxy = case.cause == "ipvs-masquerade"
            owners = {"hairpin": None, "pod-egress": Owner.UNKNOWN}
            expected = Owner.KUBE_PROXY if is_kube_proxy else owners[case.cause]
            assert (opinion.rule.owner if opinion.rule else None) is expected, case
    (perhaps,) = [
        line
        for line in findings["S12 ipvs ipv4 tcp"].opinion.evidence
        if line.startswith("possibly SNAT by kube-proxy's rule: ")
    ]
    assert "-m set --match-set KUBE-LOOP-BACK dst,dst,src -j MASQUERADE" in perhaps
    refused = findings["S15a ipvs ipv4 tcp"].opinion
    assert refused.evidence[-1] == (
        "in IPVS mode, a virtual server without endpoints refuses by itself, without a rule"
    )


def test_node_port_on_a_services_address():
    """A NodePort is not served at a Service's address, although the node has that address."""
    packet = flow(world.CLIENT, 40000, world.LOAD_BALANCER, world.NODE_PORT)
    opinion = world.discard(packet, view("node1"), at="input").opinion
    assert (opinion.cause, opinion.service) == ("netfilter-drop", None)
    packet = flow(world.CLIENT, 40000, world.GATEWAY1, world.NODE_PORT)
    assert world.discard(packet, view("node1"), at="input").opinion.service.name == "nodeport"


def test_source_ranges_of_a_node_s_own_process():
    """A process connects from the Service's address: the node's own must be in the ranges."""
    address = world.LOAD_BALANCER_RANGES
    packet = flow(address, 40000, address, 80)
    opinion = world.discard(packet, view("node1"), at="output").opinion
    assert opinion.cause == "source-ranges"
    assert opinion.evidence[-1] == (
        "10.240.0.3 is not in loadBalancerSourceRanges of Service default/loadbalancer-ranges: "
        "198.51.100.10/32"
    )
    assert opinion.advice[0].startswith("add node1's own address to loadBalancerSourceRanges (now:")


def test_mode_by_device():
    """Without rules, the device that kube-proxy makes for IPVS tells the mode."""
    known = view("node1")
    assert replace(known, rules=None).mode is None
    interfaces = world.INTERFACES["node1"] | {9: "kube-ipvs0"}
    assert replace(known, rules=None, interfaces=interfaces).mode == "ipvs"
    nftables = replace(known, rules=world.recorded("nftables", "node1"), interfaces=interfaces)
    assert nftables.mode == "nftables"


def test_recorded_place():
    """A recording keeps which addresses are Services'; an older recording may lack them."""
    place = Place(
        addresses=view("node1").addresses, service_addresses=view("node1").service_addresses
    )
    told = to_json(place)
    assert from_json(told) == place
    del told["service_addresses"]
    assert from_json(told) == replace(place, service_addresses=frozenset())


def test_clients_that_policy_local_would_show(findings):
    """A preview counts the clients that the policy hides, also by IPVS mode's own cause."""
    judged = [hop for name in findings for hop in findings[name].hops]
    clients = hidden_clients(judged, world.CLUSTER.service("default", "nodeport"))
    assert clients == {hosts.CLIENT.ipv4: 4, hosts.CLIENT.ipv6: 4}


def test_stray(findings):
    """Policy Local without an endpoint here: the way back fails, and the advice says what helps."""
    opinion = findings["S6 ipvs ipv4 tcp"].opinion
    assert list(opinion.evidence[-2:]) == [
        "Service default/nodeport-local has externalTrafficPolicy Local, but the endpoint is on "
        "node1: kube-proxy in IPVS mode uses other nodes' endpoints if node2 has no ready one",
        "replies do not return through node2: they carry the pod's address as source, and the "
        "client ignores them",
    ]
    assert opinion.advice[0] == "run an endpoint of default/nodeport-local on node2"
    assert "to fix   run an endpoint of default/nodeport-local on node2" in explanation(opinion)
    # A pod of the node gets its replies.
    opinion = findings["S17b ipvs ipv4 tcp"].opinion
    assert (opinion.cause, list(opinion.advice)) == (None, [])
    assert "uses other nodes' endpoints if node2 has no ready one" in opinion.evidence[-1]


@pytest.mark.parametrize(
    "seen", OBSERVED, ids=[f"{o['scenario']}-{o['family']}-{o['proto']}" for o in OBSERVED]
)
def test_forecast(seen):
    """What was seen of a Service is forecast: the address that the backend printed, and why."""
    case = CASES[seen["scenario"], seen["family"], seen["proto"]]
    if case.scenario.service is None:
        return
    (forecast,) = FORECASTER.forecast(observations.way(seen))
    assert (forecast.verdict, forecast.cause) == (case.verdict, case.cause)
    said = seen["client_address"]
    if said not in ("TIMEOUT", "REFUSED"):
        assert forecast.seen_source == ip_address(said)
    elif forecast.verdict == "preserved":
        assert forecast.seen_source == ip_address(seen["from_socket"][0])
    else:
        assert forecast.seen_source is None


@pytest.mark.parametrize(
    ("service", "node", "client", "expected"),
    [
        # A process on the node connects from the Service's own address; the policy decides.
        ("loadbalancer", "node1", "NODE", ("replaced", "10.244.1.1", True)),
        ("loadbalancer", "node2", "NODE", ("replaced", "10.240.0.5", True)),
        ("loadbalancer-local", "node1", "NODE", ("preserved", "203.0.113.51", None)),
        ("external-ip", "node2", "NODE", ("replaced", "10.240.0.5", True)),
        ("nodeport", "node2", "NODE", ("replaced", "10.240.0.5", True)),
        ("nodeport-local", "node2", "NODE", ("preserved", "client", None)),
        ("internal-local", "node2", "NODE", ("replaced", "10.240.0.5", False)),
        # Its replies end on the endpoint's node, which has that address, too.
        ("loadbalancer-local", "node2", "NODE", ("preserved", "203.0.113.51", False)),
        ("loadbalancer-local", "node2", "EXTERNAL", ("preserved", "client", False)),
        ("loadbalancer-local", "node2", "POD", ("preserved", "client", None)),
        ("internal-local", "node2", "POD", ("preserved", "client", None)),
    ],
)  # fmt: skip
def test_forecast_of_other_ways(service, node, client, expected):
    """Forecasts equal what backends saw under Linux 6.12; advice is policy Local where it helps."""
    ways = [
        each
        for each in FORECASTER.ways(world.CLUSTER.service("default", service))
        if (each.node, each.family, each.client_class.name) == (node, "ipv4", client)
        and (each.match.via, each.match.port.name) == (WAYS[service], "http")
        and not each.to.is_loopback
    ]
    (only,) = ways
    (forecast,) = FORECASTER.forecast(only)
    advice = " ".join(forecast.advice)
    is_policy = "patch" in advice if advice else None
    assert (forecast.verdict, str(forecast.seen_source), is_policy) == expected


def test_causes():
    """What the table's 106 connections come to."""
    causes = Counter((str(c.verdict), c.cause) for c in CASES.values())
    assert causes == {
        ("preserved", None): 40,
        ("preserved", "no-local-endpoint"): 8,
        ("replaced", "ipvs-masquerade"): 36,
        ("replaced", "hairpin"): 4,
        ("replaced", "pod-egress"): 4,
        ("dropped", "no-listener"): 4,
        ("dropped", "no-endpoints"): 8,
        ("dropped", "source-ranges"): 2,
    }
