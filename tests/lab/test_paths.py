"""Every scenario as a path, beside what tcpdump captures on the nodes' interfaces."""

import re
import signal
import subprocess
import threading
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

import pytest

from lab import kube_proxy, probe, relay
from lab.hosts import NODES, PODS
from lab.scenarios import cases
from tests.lab.commands import OPTIONS, PATIENCE_S, lines, srcip, tracing, wait_until
from tests.lab.flows import HEADERS, TRUSTED, key_of, keys, relayed
from tracer.model import PROTOCOLS

pytestmark = pytest.mark.usefixtures("kernel")

CAPTURED = re.compile(r"(\S+) +(In|Out) +IP6? (\S+)\.(\d+) > (\S+)\.(\d+): ")
# IPVS, which the build machine's kernel does not have: tests/vm/test_ipvs.py.
HAS_IPVS = Path("/proc/net/ip_vs").exists()
MODES = kube_proxy.ALL_MODES if HAS_IPVS else kube_proxy.MODES
# An emulated machine is too slow for all at once: answers come after the clients' timeout.
IPVS_SCENARIOS = ["S2", "S3", "S4", "S6", "S7b", "S12", "S14b", "S14d", "S15b", "S16b", "S17b"]
NAT_PLACES = {
    "dnat": {("prerouting", "after-nat"), ("output", "after-nat")},
    "snat": {("postrouting", "after-nat"), ("input", "after-nat")},
}
UNDO_PLACES = {
    "un-snat": {("prerouting", "after-nat"), ("output", "after-nat")},
    "un-dnat": {("postrouting", "after-nat"), ("input", "after-nat")},
}
# It translates between two hooks: what comes to LOCAL_OUT goes to the backend already, and an
# answer is turned back on its way through FORWARD.
IPVS_PLACES = {
    "dnat": {("output", "before-nat")},
    "snat": {("postrouting", "after-nat")},
    "un-snat": {("prerouting", "after-nat")},
    "un-dnat": {("forward", None), ("forward", "after-nat"), ("input", "after-nat")},
}


class Capture:
    """tcpdump on all interfaces of a node."""

    def __init__(self, lab, node):
        command = ["tcpdump", "-i", "any", "-nn", "-l", "-s", "96", "-B", "8192", "tcp or udp"]
        self._process = subprocess.Popen(
            ["ip", "netns", "exec", lab.netns(node).name, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert any("listening on" in line for line in self._process.stderr)
        self.crossed = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self):
        for line in self._process.stdout:
            if match := CAPTURED.search(line):
                device, way, src, sport, dst, dport = match.groups()
                packet = (ip_address(src), int(sport), ip_address(dst), int(dport))
                self.crossed.append((device, way, packet))

    def close(self):
        self._process.terminate()
        self._process.wait()
        self._thread.join()
        self._process.stdout.close()
        self._process.stderr.close()


@contextmanager
def captured(lab):
    """tcpdump on both nodes."""
    with ExitStack() as stack:
        captures = {}
        for node in NODES:
            captures[node] = Capture(lab, node)
            stack.callback(captures[node].close)
        yield captures


@pytest.fixture(scope="module", params=MODES)
def run(request, lab, tmp_path_factory):
    """All scenarios of a mode: the clients' answers, the paths as JSON, and the captures."""
    kube_proxy.load(lab, request.param)
    scenarios = IPVS_SCENARIOS if request.param == "ipvs" else ()
    chosen = cases(modes=[request.param], scenarios=scenarios, has_relay=True)
    arguments = ["-o", "json", "--packets", "1", *HEADERS, *TRUSTED]
    directory = tmp_path_factory.mktemp("paths")
    recording = directory / "recording"
    arguments += ["--record", str(recording)]
    with (
        relay.serving(lab, relayed(chosen)),
        tracing(lab, directory, *arguments) as (process, output),
        captured(lab) as captures,
    ):
        answers = probe.run(lab, chosen)
        wait_until(lambda: found(output.read_text(), answers).keys() == answers.keys())
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0
    told = lines(output.read_text())
    assert not any(told[-1]["lost"].values())
    return Run(answers, found(output.read_text(), answers), captures, recording)


class Run(NamedTuple):
    """What came of all scenarios of a mode."""

    answers: dict
    paths: dict
    captures: dict
    recording: Path


def found(printed, answers):
    """Return the lines of each case's path, by direction."""
    by_flow = paths_of(printed)
    return {case: by_flow[key_of(case, answer)] for case, answer in answers.items()
            if key_of(case, answer) in by_flow}  # fmt: skip


def paths_of(printed):
    """Return the lines of each path, by all that identifies it and by direction."""
    by_flow = {}
    for line in lines("".join(each for each in printed.splitlines(True) if each.endswith("\n"))):
        for key in keys(line) if line["kind"] == "path" else ():
            by_flow.setdefault(key, {})[line["direction"]] = line
    return by_flow


def packet_of(hop):
    return (ip_address(hop["src"]), hop["sport"], ip_address(hop["dst"]), hop["dport"])


def has_ports(line):
    """Whether the packet is the connection's own, not an ICMP error about it."""
    return all("sport" in hop for hop in line["hops"])


def tc_hops(line, node):
    """What crossed a node's interfaces, in tcpdump's terms."""
    way = {"tc_ingress": "In", "tc_egress": "Out"}
    return [
        (hop["device"], way[hop["hook"]], packet_of(hop))
        for hop in line["hops"]
        if hop["node"] == node and hop["hook"] in way
    ]


def translations(line):
    return [
        (hop["node"], hop["hook"], hop.get("stage"), done)
        for hop in line["hops"]
        for done in hop.get("translations", ())
    ]


def places(case, usual):
    return IPVS_PLACES if case.mode == "ipvs" else usual


def differs(translation):
    return translation["before"]["address"] != translation["after"]["address"]


def test_every_scenario_is_a_path(run):
    """Each connection is one path, with the verdict and the cause of the table of scenarios."""
    answers, paths, *_ = run
    for case, answer in answers.items():
        path = paths[case]["original"]
        assert (path["verdict"], path.get("cause")) == (case.verdict, case.cause), case
        # In IPVS mode a backend may be reached whose replies do not arrive.
        is_stray = (case.verdict, answer.client_address) == ("preserved", None)
        seen = answer.local[0] if is_stray else answer.client_address
        assert path.get("seen_source") == (str(seen) if seen else None), case


def test_hops_are_what_tcpdump_captured(run):
    """
    On each node the first packet of each direction crosses the interfaces that tcpdump says, with
    the same addresses and ports, in the same order.
    """
    answers, paths, captures, _ = run
    compared = 0
    for case in answers:
        for line in filter(has_ports, paths[case].values()):
            for node in {hop["node"] for hop in line["hops"]}:
                there = tc_hops(line, node)
                # Of loopback tcpdump captures one side.
                there = [each for each in there if each[:2] != ("lo", "Out")]
                packets = {packet for *_, packet in there}
                crossed = [each for each in captures[node].crossed if each[-1] in packets]
                assert crossed[: len(there)] == there, (case, line["direction"], node)
                compared += len(there)
    assert compared > 4 * len(answers)


def test_times_and_places_are_in_order(run):
    """No hop is before the one that it follows, and each begins where the packet came in."""
    answers, paths, *_ = run
    for case in answers:
        for line in paths[case].values():
            times = [hop["time"] for hop in line["hops"]]
            assert times == sorted(times), case
            first = line["hops"][0]
            is_local = first["hook"] == "output"
            assert is_local or first["hook"] == "tc_ingress", case


def test_nat_is_told_where_it_was_done(run):
    """
    DNAT where the packet is routed, SNAT where it leaves, on the node that the verdict names; the
    backend's socket has the source that is told; nothing else changes a packet.
    """
    answers, paths, *_ = run
    for case, answer in answers.items():
        path = paths[case]["original"]
        done = translations(path)
        for node, hook, stage, each in done:
            assert (hook, stage) in places(case, NAT_PLACES)[each["by"]], case
            assert node in NODES
        snat = [(node, each) for node, _, _, each in done if each["by"] == "snat"]
        replaced = [
            each for _, each in snat if each["before"]["address"] != each["after"]["address"]
        ]
        if answer.client_address is None:
            continue
        backend = path["hops"][-1]
        assert packet_of(backend)[:2] == (answer.client_address, answer.client_port), case
        if case.verdict == "replaced" and replaced:
            assert replaced[-1]["after"]["address"] == str(answer.client_address), case
            assert snat[0][0] == path["at"]["node"], case
        elif case.verdict == "preserved":
            assert not replaced, case


def test_answers_are_undone(run):
    """The reply leaves the first node as the client expects it, translated back there."""
    answers, paths, *_ = run
    for case, answer in answers.items():
        if answer.client_address is None:
            continue
        assert "reply" in paths[case], case
        line = paths[case]["reply"]
        for _, hook, stage, each in translations(line):
            assert (hook, stage) in places(case, UNDO_PLACES)[each["by"]], case
        sent = line["orig"]
        src, sport, dst, dport = packet_of(sent)
        assert packet_of(line["hops"][-1]) == (dst, dport, src, sport), case


def test_drops_end_where_the_rule_is(run):
    """What is dropped comes in and does not go out: tcpdump sees it on no other interface."""
    answers, paths, captures, _ = run
    ended = 0
    for case, answer in answers.items():
        if case.verdict != "dropped":
            continue
        path = paths[case]["original"]
        assert path["nodes"][-1]["ending"] == "dropped", case
        node = path["at"]["node"]
        sent = packet_of(path["hops"][0])
        crossed = captures[node].crossed
        ways = [way for dev, way, packet in crossed if packet == sent and dev != "lo"]
        is_local = path["hops"][0]["hook"] == "output"
        assert set(ways) == (set() if is_local else {"In"}), case
        assert path["hops"][-1]["hook"] not in ("tc_egress", "postrouting"), case
        assert answer.client_address is None
        ended += 1
    assert ended


@pytest.mark.parametrize("scenario", ["S3", "S7b"])
def test_over_two_nodes(run, scenario):
    """A connection that node2 sends on to node1 is one path over both, proof included."""
    answers, paths, *_ = run
    for case in answers:
        if case.scenario.id == scenario:
            path = paths[case]["original"]
            assert [node["node"] for node in path["nodes"]] == ["node2", "node1"]
            first, second = path["nodes"]
            assert (first["verdict"], second["verdict"]) == ("replaced", "replaced-upstream")
            assert (first["reply"]["dst"], first["reply"]["dport"]) == (
                second["orig"]["src"],
                second["orig"]["sport"],
            )
            assert path["at"]["node"] == "node2"
            assert {hop["node"] for hop in path["hops"]} == {"node2", "node1"}


def test_behind_a_proxy(run):
    """
    What a proxy opens is a path from the proxy on, whose client is whom the proxy names: he, at
    the port that he has, and the verdict is proxied though a node may replace the source, too.
    """
    answers, paths, *_ = run
    crossed = {"S9a": ["node1"], "S9b": ["node2", "node1"], "S9c": ["node1"]}
    told = {}
    for case, answer in answers.items():
        if case.scenario.relay is None:
            continue
        told.setdefault(case.scenario.id, set()).add(case.family)
        path = paths[case]["original"]
        assert [node["node"] for node in path["nodes"]] == crossed[case.scenario.id], case
        word = path["proxy"]
        assert word["trusted"]
        assert [each["header"] for each in word["declared"]] == [case.scenario.relay.header], case
        assert (word["client"]["address"], word["client"]["port"]) == (
            str(answer.local[0]),
            answer.local[1],
        )
        assert path["orig"]["src"] == word["peer"] == word["client"]["by"], case
    if not told:
        pytest.skip("in this mode not all scenarios are run")
    assert told == {each: {"ipv4", "ipv6"} for each in crossed}


def test_pods_are_named(run):
    """The last interface of a path is the backend's, and named for its pod."""
    answers, paths, *_ = run
    for case, answer in answers.items():
        last = paths[case]["original"]["hops"][-1]
        if answer.pod in PODS:
            assert last["pod"] == f"default/{answer.pod}", case
            assert last["device_kind"] == "veth"


def test_protocols(run):
    """TCP and UDP over IPv4 and IPv6 are all there."""
    answers, paths, *_ = run
    told = {(each["original"]["family"], each["original"]["proto"]) for each in paths.values()}
    assert told == {(f, p) for f in ("ipv4", "ipv6") for p in ("tcp", "udp")}
    assert {p for _, p in told} <= set(PROTOCOLS)
    assert len(paths) == len(answers)


def test_replay(run):
    """A recording has the same paths, except for what the live trace knew of rules."""
    replayed = srcip("replay", str(run.recording), *OPTIONS, *TRUSTED, "-o", "json", "--paths")
    assert replayed.returncode == 0, replayed.stderr
    again = found(replayed.stdout, run.answers)
    assert again.keys() == run.paths.keys()
    for case, path in run.paths.items():
        for direction, line in path.items():
            told = again[case][direction]
            assert told["hops"] == line["hops"], case
            assert told["nodes"] == line["nodes"], case
            assert told["verdict"] == line["verdict"], case


@pytest.mark.parametrize("mode", MODES)
def test_filter_by_client_follows_him(lab, tmp_path, mode):
    """
    Of a client who is asked for, the path has all nodes, also those that see another address; and
    of others there is nothing.
    """
    kube_proxy.load(lab, mode)
    chosen = cases(modes=[mode], scenarios=["S1", "S3", "S5", "S6", "S7b"], families=["ipv4"])
    arguments = ["-o", "json", "--packets", "1", "--filter-client", "198.51.100.10"]
    with tracing(lab, tmp_path, *arguments) as (process, output):
        answers = probe.run(lab, chosen)
        wanted = {case for case in chosen if case.scenario.id != "S1"}
        wait_until(lambda: found(output.read_text(), answers).keys() == wanted)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0
    told = lines(output.read_text())
    assert {line["orig"]["src"] for line in told if line["kind"] == "path"} == {"198.51.100.10"}
    for case, path in found(output.read_text(), answers).items():
        assert path["original"]["verdict"] == case.verdict
        nodes = [node["node"] for node in path["original"]["nodes"]]
        assert nodes == {"S3": ["node2", "node1"], "S7b": ["node2", "node1"], "S5": ["node1"],
                         "S6": ["node2", "node1"] if mode == "ipvs" else ["node2"],
                         }[case.scenario.id]  # fmt: skip
        assert {hop["node"] for hop in path["original"]["hops"]} == set(nodes)


def test_both_sides_of_a_proxy(lab, tmp_path):
    """If the proxy's host is traced, too, the client's own connection to it is another path."""
    kube_proxy.load(lab, "iptables")
    chosen = cases(modes=["iptables"], scenarios=["S9a"], families=["ipv4"])
    arguments = ["-o", "json", "--packets", "1", *HEADERS, *TRUSTED]
    with (
        relay.serving(lab, relayed(chosen)),
        tracing(lab, tmp_path, *arguments, nodes=("node1", "node2", "router")) as (process, output),
    ):
        answers = probe.run(lab, chosen)
        ((case, answer),) = answers.items()
        address, port = answer.local
        sent = ("tcp", str(address), port, str(case.destination), case.port)
        wait_until(lambda: {sent, key_of(case, answer)} <= {*paths_of(output.read_text())})
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0
    told = paths_of(output.read_text())
    before, after = told[sent]["original"], told[key_of(case, answer)]["original"]
    assert [(node["node"], node["ending"]) for node in before["nodes"]] == [("router", "delivered")]
    assert before["accepted"] == {"address": str(address), "port": port}
    # No rule makes conntrack track on the router.
    assert before["verdict"] == "unknown"
    assert [node["node"] for node in after["nodes"]] == ["router", "node1"]
    assert (after["hops"][0]["node"], after["hops"][0]["hook"]) == ("router", "output")
    assert (after["verdict"], after["at"]["node"]) == ("proxied", "node1")
    assert after["proxy"]["client"]["address"] == before["orig"]["src"]
    assert after["accepted"]["address"] == str(answer.client_address)
