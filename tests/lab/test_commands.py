"""The commands on a whole cluster: what they print is what the backends saw."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path

import pytest

from lab import kube_proxy, probe
from lab.agreement import Traced
from lab.scenarios import cases
from lab.services import OBJECTS
from tests.lab.commands import (
    OPTIONS,
    PATIENCE_S,
    SRCIP,
    lines,
    namespaces,
    netns_options,
    srcip,
    tracing,
    wait_until,
)
from tracer.kernel import netns

pytestmark = pytest.mark.usefixtures("kernel")

OBSERVED = (kube_proxy.DATA / "observed.jsonl").read_text()


@pytest.fixture
def public_directory():
    """A directory that everybody may read."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def test_demo_agrees_with_every_backend_and_the_record():
    """
    'srcip demo' exits with 0; every scenario agrees; and every backend saw what the backends of
    the real cluster saw.
    """
    done = srcip("demo", "-o", "json")

    assert done.returncode == 0, done.stderr
    found = [line for line in lines(done.stdout) if line["kind"] == "scenario"]
    assert all(line["agrees"] for line in found)
    saw = {
        (line["mode"], line["scenario"], line["family"], line["proto"]): line["client_address"]
        for line in found
    }
    for seen in lines(OBSERVED):
        key = (seen["mode"], seen["scenario"], seen["family"], seen["proto"])
        told = seen["client_address"]
        assert saw.pop(key) == (None if told in ("TIMEOUT", "REFUSED") else told), key
    # The others are not in the record: the lab's own proxy, and pod egress.
    assert {key[1] for key in saw} == {"S9a", "S9b", "S9c", "S13"}
    behind = [line["proxy"] for line in found if line["scenario"].startswith("S9")]
    assert {told["client"]["address"] for told in behind} == {"198.51.100.10", "2001:db8:c::10"}
    assert {told["client"]["header"] for told in behind} == {
        "proxy-v1",
        "proxy-v2",
        "x-forwarded-for",
    }


def test_demo_leaves_nothing():
    """After a demo, also one that is interrupted, its namespaces are gone."""
    before = namespaces()
    assert srcip("demo", "--scenario", "S1", "--mode", "iptables").returncode == 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process = subprocess.Popen(
            [*SRCIP, "demo"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_until(lambda: namespaces() - before)
        process.send_signal(number)
        assert process.wait(PATIENCE_S) != 0
        assert namespaces() <= before


def test_demo_keeps_its_cluster():
    """What --keep prints works as it stands in another shell; Ctrl-C removes the cluster."""
    before = namespaces()
    keeping = [*SRCIP, "demo", "--keep"]
    with subprocess.Popen(keeping, stdout=subprocess.PIPE, text=True) as process:
        text = [process.stdout.readline() for _ in range(11)]
        connect = [line for line in text if line.startswith("client 10.")]
        script = "".join(text[3:6]) + f'srcip() {{ {shlex.join(SRCIP)} "$@"; }}\n'
        script += "".join(connect)
        script += "srcip flows --netns $n1 --netns $n2 --cluster $objects\n"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
        process.send_signal(signal.SIGINT)
    assert process.returncode == 0
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    # The third finds no endpoint.
    assert [json.loads(line)["client_address"] for line in answers] == [
        "10.240.0.5",
        "198.51.100.10",
    ]
    assert "external-traffic-policy-cluster" in done.stdout
    assert namespaces() <= before


def test_trace_follows_each_connection(lab, tmp_path):
    """Live rows as JSON: the tuples lead from the client's socket to what the backend saw."""
    kube_proxy.load(lab, "iptables")
    chosen = cases(modes=["iptables"], scenarios=["S1", "S3", "S4", "S5", "S12"])
    with tracing(lab, tmp_path, "-o", "json") as (process, output):
        answers = probe.run(lab, chosen)
        wait_until(lambda: output.read_text().count('"connection"') >= len(chosen))
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0

    told = lines(output.read_text())
    by_client = {
        (line["orig"]["src"], line["orig"]["sport"], line["proto"]): line
        for line in told
        if line["kind"] == "connection"
    }
    for case, answer in answers.items():
        line = by_client[str(answer.local[0]), answer.local[1], case.proto]
        assert line["orig"]["dst"] == str(case.destination)
        assert line["seen_source"] == str(answer.client_address)
        assert line["reply"]["dport"] == answer.client_port
        assert (line["verdict"], line.get("cause")) == (case.verdict, case.cause)
        assert line["service"]["name"] == case.scenario.service
        assert line["service"]["via"] == case.scenario.via
        assert line["backend"]["pod"] == f"default/{answer.pod}"
    accepted = {
        (line["peer"]["address"], line["peer"]["port"]) for line in told if line["kind"] == "accept"
    }
    for case, answer in answers.items():
        if case.proto == "tcp":
            assert (str(answer.client_address), answer.client_port) in accepted
    summary = told[-1]
    assert summary["kind"] == "summary"
    assert not any(summary["lost"].values())


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize("mode", kube_proxy.MODES)
def test_record_and_replay(lab, tmp_path, public_directory, mode):
    """A recording judged again, by nobody, says line by line what the trace said."""
    kube_proxy.load(lab, mode)
    chosen = cases(modes=[mode], scenarios=["S2", "S3", "S6", "S15b"])
    recording = public_directory / "recording"
    with tracing(lab, tmp_path, "-o", "json", "--record", str(recording)) as (process, output):
        probe.run(lab, chosen)
        wait_until(lambda: output.read_text().count('"drop"') >= 8)
        process.terminate()
        assert process.wait(PATIENCE_S) == 0

    # Nobody may not read the checkout either.
    objects = shutil.copy(OBJECTS, public_directory)
    replayed = srcip(
        *("replay", str(recording), "--cluster", objects, "-o", "json"), user=65534, group=65534
    )
    assert replayed.returncode == 0, replayed.stderr
    told = lines(replayed.stdout)
    assert list(map(untimed, told)) == list(map(untimed, lines(output.read_text())))
    assert {line["rule"]["owner"] for line in told if "rule" in line} == {"kube-proxy"}


def untimed(line):
    """A line without its time: a trace reads the clock repeatedly, a recording once."""
    return {key: value for key, value in line.items() if key != "time"}


def test_table(lab, tmp_path):
    """Below one heading rows are aligned, wider from the first IPv6 on, and plain when piped."""
    kube_proxy.load(lab, "iptables")
    with tracing(lab, tmp_path, "--count", "8") as (process, output):
        probe.run(lab, cases(modes=["iptables"], scenarios=["S4", "S5"]))
        assert process.wait(PATIENCE_S) == 0

    printed = output.read_text()
    assert "\x1b" not in printed
    heading, *rows = printed.splitlines()
    assert heading.startswith("TIME")
    starts = [
        [cell.start() for cell in re.finditer(r"\S+(?: \S+)*", line)]
        for line in (heading, *rows)
        if "accepted" not in line
    ]
    assert len(starts) == 9
    for before, after in pairwise(starts):
        assert len(before) == len(after) == 10
        assert all(a <= b for a, b in zip(before, after, strict=True))


def test_filters(lab, tmp_path):
    """Filters hold for what is shown."""
    kube_proxy.load(lab, "iptables")
    chosen = cases(modes=["iptables"], scenarios=["S3", "S5"], families=["ipv4"])
    arguments = ["--filter-port", "30081", "--filter-proto", "tcp", "-o", "json", "--count", "1"]
    with tracing(lab, tmp_path, *arguments) as (process, output):
        probe.run(lab, chosen)
        assert process.wait(PATIENCE_S) == 0

    (line,) = (line for line in lines(output.read_text()) if line["kind"] == "connection")
    assert line["orig"]["dport"] == 30081


@pytest.mark.parametrize(
    ("expect", "scenario", "code"),
    [("preserved", "S5", 0), ("preserved", "S4", 3), ("dropped", "S6", 0), ("preserved", None, 4)],
)
def test_expect(lab, tmp_path, expect, scenario, code):
    """--expect makes the exit code a test's answer."""
    kube_proxy.load(lab, "iptables")
    arguments = ["--expect", expect, "--filter-client", "198.51.100.10", "--timeout", "3"]
    with tracing(lab, tmp_path, *arguments, *(["--count", "1"] if scenario else [])) as (
        process,
        _,
    ):
        if scenario:
            probe.run(lab, cases(modes=["iptables"], scenarios=[scenario], families=["ipv4"]))
        assert process.wait(PATIENCE_S) == code


def test_privileges_are_dropped(lab, tmp_path):
    """Once attached, the tracer is nobody, without a capability, and still sees."""
    kube_proxy.load(lab, "iptables")
    with tracing(lab, tmp_path, "-o", "json", "--count", "1") as (process, output):
        status = Path(f"/proc/{process.pid}/status")

        def fields():
            return dict(line.split(":", 1) for line in status.read_text().splitlines())

        wait_until(lambda: int(fields()["CapPrm"], 16) == 0)
        assert set(fields()["Uid"].split()) == {"65534"}
        assert {int(fields()[key], 16) for key in ("CapEff", "CapInh", "CapBnd", "CapAmb")} == {0}
        assert fields()["NoNewPrivs"].strip() == "1"
        probe.run(lab, cases(modes=["iptables"], scenarios=["S1"], protos=["udp"]))
        assert process.wait(PATIENCE_S) == 0
    assert lines(output.read_text())[-1]["lost"]["ring_full"] == 0


def test_flows_are_those_of_conntrack(lab):
    """'srcip flows' shows each entry that 'conntrack -L' lists, and its verdict."""
    kube_proxy.load(lab, "iptables")
    answers = probe.run(lab, cases(modes=["iptables"], scenarios=["S3", "S5"]))

    told = lines(srcip("flows", *OPTIONS, *netns_options(lab), "-o", "json").stdout)
    listed = Counter()
    for node in ("node1", "node2"):
        for family in ("ipv4", "ipv6"):
            printed = lab.run(node, "conntrack", "-L", "-f", family)
            listed[node] += sum("src=" in line for line in printed.splitlines())
    shown = Counter(line["node"] for line in told if line["kind"] == "connection")
    assert shown == listed
    for case, answer in answers.items():
        assert any(
            (line["verdict"], line.get("cause")) == (case.verdict, case.cause)
            and line["seen_source"] == str(answer.client_address)
            for line in told
            if line["kind"] == "connection"
            and (line["orig"]["src"], line["orig"]["sport"])
            == (str(answer.local[0]), answer.local[1])
        )


def test_doctor(lab):
    """doctor names the way of looking in use, and leaves nothing attached."""
    done = srcip("doctor", *netns_options(lab), "-o", "json")

    assert done.returncode == 0, done.stdout
    (report,) = lines(done.stdout)
    assert report["rung"] == "BPF netfilter links"
    assert all(check["ok"] for check in report["checks"] if check["needed"])
    assert report["not_seen"]


def test_doctor_counts_other_tracers(lab, tmp_path):
    """A running tracer is seen by doctor."""

    def links():
        (report,) = lines(srcip("doctor", *netns_options(lab), "-o", "json").stdout)
        (check,) = (each for each in report["checks"] if each["name"] == "other tracers")
        first = check["detail"].split()[0]
        return int(first) if first.isdecimal() else 0

    with tracing(lab, tmp_path):
        # Three functions, two families, two namespaces; and others' may come and go.
        assert links() >= 12


def test_a_stray_drop_is_no_answer():
    """The demo's comparison needs evidence: without records nothing agrees."""
    (case,) = cases(modes=["iptables"], scenarios=["S6"], families=["ipv4"], protos=["tcp"])
    answer = probe.Answer(outcome="timeout", local=(case.destination, 1))
    assert not Traced().find(case, answer).agrees


def test_explain_without_a_cluster():
    """A Service that does not exist, and a file that is invalid, are one line each."""
    done = srcip("explain", "default/no-such", *OPTIONS)
    assert (done.returncode, done.stderr) == (
        1,
        "srcip: no Service default/no-such in the cluster\n",
    )
    done = srcip("explain", "default/nodeport", "--cluster", __file__)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1


def test_explain_says_what_happens(lab):
    """
    Each forecast for an outsider's way to a Service, made on the nodes, is what the backend then
    sees.
    """
    kube_proxy.load(lab, "iptables")
    chosen = [
        case
        for case in cases(
            modes=["iptables"], scenarios=["S3", "S4", "S5", "S6", "S7a", "S7b", "S18"]
        )
        if case.scenario.client == "client"
    ]
    answers = probe.run(lab, chosen)
    told = {}
    for service in {case.scenario.service for case in chosen}:
        done = srcip("explain", f"default/{service}", *OPTIONS, *netns_options(lab), "-o", "json")
        assert done.returncode == 0, done.stderr
        for line in lines(done.stdout):
            if line["client_class"] == "external":
                key = (line["to"], line["port"], line["proto"], line["node"])
                told[key] = line
    for case, answer in answers.items():
        node = case.scenario.through or case.scenario.target
        line = told[str(case.destination), case.port, case.proto, node]
        seen = line.get("seen_source")
        expected = str(answer.client_address) if answer.client_address else None
        assert (str(answer.local[0]) if seen == "client" else seen) == expected
        assert (line["verdict"], line.get("cause")) == (case.verdict, case.cause)


def test_preview_names_hidden_clients(lab):
    """--set shows which nodes would drop, and which clients would become visible."""
    kube_proxy.load(lab, "iptables")
    probe.run(lab, cases(modes=["iptables"], scenarios=["S3", "S4"], families=["ipv4"]))
    done = srcip(
        *("explain", "default/nodeport", "--set", "externalTrafficPolicy=Local"),
        *("--from-conntrack", *OPTIONS, *netns_options(lab), "-o", "json"),
    )
    assert done.returncode == 0, done.stderr
    preview = lines(done.stdout)[-1]
    assert preview["nodes_without_endpoint"] == ["node2"]
    clients = {each["address"]: each["connections"] for each in preview["clients_made_visible"]}
    assert clients["198.51.100.10"] >= 4


def test_health_checks_are_compared_with_the_objects(lab):
    """--probe-health says where a node's answer contradicts the objects."""
    with health_server(lab, "node1", 200, 1), health_server(lab, "node2", 200, 1):
        done = srcip(
            *("explain", "default/loadbalancer-local", "--probe-health"),
            *(*OPTIONS, *netns_options(lab), "-o", "json"),
        )
    assert done.returncode == 0, done.stderr
    found = {line["node"]: line for line in lines(done.stdout) if line["kind"] == "health"}
    assert found["node1"]["agrees"]
    assert (found["node1"]["status"], found["node1"]["local_endpoints"]) == (200, 1)
    # The objects know of no endpoint there.
    assert not found["node2"]["agrees"]
    assert found["node2"]["expected"] == 503


def test_kube_proxys_own_word_on_its_mode(lab):
    """The mode that kube-proxy reports takes precedence over its rules."""
    kube_proxy.load(lab, "nftables")
    with answering(lab, "node1", ("127.0.0.1", 10249), 200, b"iptables"):
        done = srcip("explain", "default/nodeport", *OPTIONS, *netns_options(lab))
    assert "kube-proxy in iptables" in done.stdout
    done = srcip("explain", "default/nodeport", *OPTIONS, *netns_options(lab))
    assert "kube-proxy in nftables" in done.stdout


def health_server(lab, node, status, count):
    body = json.dumps({"service": {}, "localEndpoints": count}).encode()
    address = {"node1": "10.240.0.3", "node2": "10.240.0.5"}[node]
    return answering(lab, node, (address, 32122), status, body)


@contextmanager
def answering(lab, node, address, status, body):
    """An HTTP server inside a node that always answers the same."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with netns.inside(lab.netns(node)):
        server = HTTPServer(address, Handler)
    with server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def test_demo_in_ipvs_mode_without_ipvs():
    """Where kernel or tools are missing, one line says so."""
    if Path("/proc/net/ip_vs").exists():
        pytest.skip("this kernel has IPVS: tests/vm/test_ipvs.py runs it")
    done = srcip("demo", "--mode", "ipvs", "--scenario", "S1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("srcip: kube-proxy's IPVS mode needs ")
    assert done.stderr.count("\n") == 1
