"""
Every alert, provoked: real agents in trouble, a real Prometheus, and what the runbook says to ask.

The rules are the project's own, but in seconds where they have minutes.
"""

import ctypes
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from lab import kube_proxy, probe
from lab.hosts import NODES
from lab.scenarios import cases, destination
from lab.services import OBJECTS
from tests.lab.commands import PATIENCE_S, SRCIP, wait_until
from tests.lab.test_prometheus import RULES, scraping
from tests.lab.test_serve import serving
from tests.unit.apiserver import running
from tracer.kernel import netns

pytestmark = pytest.mark.usefixtures("kernel")

ROOT = Path(__file__).parents[2]
SHORTER = {"5m": "15s", "10m": "20s", "15m": "20s", "1h": "2m", "1d": "5m"}
# Policy Cluster; policy Local on a node with an endpoint and on one without; no endpoint anywhere.
CHOSEN = cases(modes=["iptables"], families=["ipv4"], scenarios=["S4", "S5", "S6", "S15a"])
# A rule of another program, which replaces what policy Local keeps.
SOMEBODYS = """
table ip somebodys {
  chain post { type nat hook postrouting priority 90
    ip daddr 10.244.0.0/16 masquerade
  }
}
"""
KEPT = 'service:srcip_connections:rate5m{service="nodeport-local",verdict="preserved"} > 0'
# More packets than an agent judges at once.
FLOOD = 8000
ALERTS = {
    rule["alert"]
    for group in yaml.safe_load(RULES.read_text())["groups"]
    for rule in group["rules"]
    if "alert" in rule
}
# The agent, the Service and the losses that each must fire for.
AGENTS = {
    "SrcipAgentDown": "restarted",
    "SrcipAgentNotReady": "unready",
    "SrcipAgentRestarts": "restarted",
    "SrcipConnectionsBlackHoled": "node2",
    "SrcipCountsOld": "node2",
    "SrcipMapNearlyFull": "copy",
    "SrcipRecordsUndecodable": "copy",
    "SrcipSeriesOverflow": "unready",
    "SrcipSnapshotStale": "node2",
}
SERVICES = {
    "SrcipClientsNoLongerKept": "nodeport-local",
    "SrcipConnectionsBlackHoled": "nodeport-local",
    "SrcipPolicyLocalLosesClients": "nodeport-local",
    "SrcipServiceWithoutEndpoints": "no-endpoints",
}
LOSSES = (
    {"instance": "node2", "stage": "agent", "reason": "rate_limited"},
    {"instance": "copy", "stage": "connections", "reason": "paths_full"},
)
EXPECTED = {
    **{name: [{"instance": agent}] for name, agent in AGENTS.items()},
    "SrcipRecordsLost": LOSSES,
}
for _name, _service in SERVICES.items():
    EXPECTED.setdefault(_name, []).append({"service": _service})
# All of it takes half a minute on a quiet machine.
LONG_S = 3 * PATIENCE_S
_PTRACE_SEIZE, _PTRACE_INTERRUPT, _PTRACE_DETACH = 0x4206, 0x4207, 17
_WALL = 0x40000000


def in_seconds(directory):
    """The rules, with shorter times."""
    rules = yaml.safe_load(RULES.read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            for name in {"for", "keep_firing_for"} & rule.keys():
                rule[name] = "1s"
            rule["expr"] = re.sub(r"\[(\w+)\]", lambda m: f"[{SHORTER[m[1]]}]", rule["expr"])
            # Ages: of the snapshot, of the counts.
            rule["expr"] = re.sub(r"> (300|60)\b", "> 5", rule["expr"])
    path = directory / "rules.yaml"
    path.write_text(yaml.safe_dump(rules))
    return path


@dataclass(slots=True, kw_only=True)
class Trouble:
    """What went wrong, as an operator sees it."""

    # As each fired last, and the labels with which it ever did.
    alerts: dict = field(default_factory=dict)
    labels: dict = field(default_factory=dict)
    # What agents have written.
    logs: dict = field(default_factory=dict)
    # What a trace through the agent shows.
    traces: dict = field(default_factory=dict)
    # What /healthz and /readyz answer.
    health: dict = field(default_factory=dict)

    def look(self, prometheus):
        """Take in the alerts that fire."""
        now = fired(prometheus)
        self.alerts.update(now)
        for name, alerts in now.items():
            self.labels.setdefault(name, []).extend(alert["labels"] for alert in alerts)

    def has(self, name):
        """Whether an alert has fired for all that it must fire for."""
        found = self.labels.get(name, [])
        return bool(found) and all(
            any(labels.items() >= expected.items() for labels in found)
            for expected in EXPECTED.get(name, ())
        )


def fired(prometheus):
    """The alerts that fire, by name: labels and annotations of each."""
    answer = json.loads(prometheus.get("/api/v1/alerts") or '{"data": {"alerts": []}}')
    found = {}
    for each in answer["data"]["alerts"]:
        if each["state"] == "firing":
            found.setdefault(each["labels"]["alertname"], []).append(each)
    return found


@contextmanager
def api_server(directory, name):
    """One with the lab's objects, and the option that leads to it."""
    with running() as api:
        for item in json.loads(OBJECTS.read_text())["items"]:
            api.put(item)
        yield api, ["--kubeconfig", api.kubeconfig(directory / name)]


def of_another_version(directory):
    """A copy of srcip whose programs speak another wire version, with little room for paths."""
    copy = directory / "copy"
    ignored = shutil.ignore_patterns("__pycache__")
    for package in ("tracer", "exporters", "lab"):
        shutil.copytree(ROOT / package, copy / package, ignore=ignored)
    shutil.copytree(ROOT / "bpf", copy / "tracer/bpf", ignore=ignored)
    for path, pattern, new in (
        (copy / "tracer/bpf/wire.h", r"(#define SRCIP_WIRE_VERSION) \d+", r"\1 99"),
        (copy / "tracer/kernel/programs.py", r"paths: int = \d+", "paths: int = 2"),
    ):
        text, found = re.subn(pattern, new, path.read_text())
        assert found == 1
        path.write_text(text)
    return copy


@contextmanager
def standing_still(pid):
    """Stop the first thread of a process, as if it waited for ever."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    for request in (_PTRACE_SEIZE, _PTRACE_INTERRUPT):
        assert libc.ptrace(request, pid, None, None) == 0, os.strerror(ctypes.get_errno())
    os.waitpid(pid, _WALL)
    try:
        yield
    finally:
        libc.ptrace(_PTRACE_DETACH, pid, None, None)


@contextmanager
def repeatedly(do, pause_s=0):
    """Do something again and again beside the block."""
    stop = threading.Event()

    def run():
        while not stop.wait(pause_s):
            do()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def flood(lab):
    """Send datagrams that node2 drops, since it has no endpoint."""
    case = next(case for case in CHOSEN if case.scenario.id == "S6" and case.proto == "udp")
    to, port = destination(case.scenario, case.family, case.proto)
    assert to == NODES["node2"].address.ipv4
    with netns.inside(lab.netns("client")):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sock:
        for _ in range(FLOOD):
            sock.sendto(b"x", (str(to), port))


def said(served):
    """What an agent has written to its log since the last look."""
    descriptor = served.process.stderr.fileno()
    os.set_blocking(descriptor, False)
    try:
        return os.read(descriptor, 1 << 16).decode()
    except BlockingIOError:
        return ""
    finally:
        os.set_blocking(descriptor, True)


def look(path, *options):
    """What the runbook says to type, through the agent; one row."""
    done = subprocess.run(
        [*SRCIP, "trace", "--agent", path, *options, "--count", "1", "--explain"],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def agents_in_trouble(lab, directory, sockets):
    """Yield agents by name, and the API server that is about to go away."""
    agents = {}
    with ExitStack() as stack:
        well, cluster = stack.enter_context(api_server(directory, "config"))
        stack.enter_context(repeatedly(well.bookmark, pause_s=1))
        going, near = stack.enter_context(api_server(directory, "going"))
        broken, far = stack.enter_context(api_server(directory, "broken"))
        broken.is_broken = True

        def start(name, *options, node="node1", **how):
            options = ("--proxy-mode", "iptables", *options)
            agents[name] = stack.enter_context(serving(lab, *options, nodes=[node], **how))

        start("node1", "--stream-socket", sockets / "node1", cluster=cluster)
        start("node2", "--stream-socket", sockets / "node2", cluster=near, node="node2")
        start("unready", "--max-series", "1", cluster=far, is_ready=False)
        start("copy", cluster=cluster, cwd=of_another_version(directory))
        start("restarted", cluster=cluster)
        yield agents, going


def restart(lab, served, prometheus):
    """Kill it four times, and start it again but for the last."""
    # It is stale between two of them.
    started = 'last_over_time(process_start_time_seconds{instance="restarted"}[1m])'
    for _ in range(4):
        before = prometheus.ask(started)
        served.process.kill()
        served.process.wait()
        with serving(lab, "--port", str(served.port), nodes=["node1"]):
            wait_until(lambda before=before: prometheus.ask(started)[0][1] > before[0][1])


@pytest.fixture(scope="module")
def trouble(lab, tmp_path_factory):
    """All of it at once; ends when every alert has fired."""
    directory, found = tmp_path_factory.mktemp("alerts"), Trouble()
    kube_proxy.load(lab, "iptables")
    with ExitStack() as stack:
        sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="srcip-test-")))
        sockets.chmod(0o755)
        rules = in_seconds(directory)
        agents, going = stack.enter_context(agents_in_trouble(lab, directory, sockets))
        prometheus = stack.enter_context(scraping(agents, directory, rules=rules))

        def fires(names):
            found.look(prometheus)
            return all(map(found.has, names))

        with repeatedly(lambda: probe.run(lab, CHOSEN)):
            wait_until(lambda: prometheus.ask(KEPT))
            going.stop()
            lab.run("node1", "nft", "-f", "-", stdin=SOMEBODYS)
            restart(lab, agents["restarted"], prometheus)
            flood(lab)
            for node, verdict in (("node1", "replaced"), ("node2", "dropped")):
                found.traces[verdict] = look(
                    *(sockets / node, "--filter-service", "default/nodeport-local"),
                    *("--filter-verdict", verdict),
                )
            wait_until(lambda: fires(ALERTS - {"SrcipCountsOld", "SrcipAgentsAbsent"}), LONG_S)
        with standing_still(agents["node2"].process.pid):
            wait_until(lambda: fires(["SrcipCountsOld"]), LONG_S)
            found.health["node2"] = agents["node2"].get("/healthz")
        (directory / "nobody").mkdir()
        with scraping({}, directory / "nobody", rules=rules) as other:

            def is_absent():
                found.look(other)
                return found.has("SrcipAgentsAbsent")

            wait_until(is_absent)
        found.health["unready"] = agents["unready"].get("/readyz")
        found.logs = {name: said(agents[name]) for name in ("node2", "copy")}
        going.start(going.port)
    return found


def test_every_alert_fires(trouble):
    """Each of them fires, and names its subject, without a gap in its text."""
    assert trouble.alerts.keys() == ALERTS
    for alerts in trouble.alerts.values():
        for alert in alerts:
            for name in ("summary", "description"):
                text = alert["annotations"][name]
                assert "<no value>" not in text
                assert not re.search(r"\(\s*\)|  |/ |\bof\s+on\b", text), text


@pytest.mark.parametrize("name", AGENTS)
def test_it_names_the_agent(trouble, name):
    """The agent in trouble is among those that the alert fires for."""
    assert AGENTS[name] in {labels["instance"] for labels in trouble.labels[name]}
    assert "node1" not in {alert["labels"]["instance"] for alert in trouble.alerts[name]}


def test_losses_by_reason(trouble):
    """A flood, and a full map: the labels tell where records were lost, and why."""
    for loss in LOSSES:
        assert any(labels.items() >= loss.items() for labels in trouble.labels["SrcipRecordsLost"])


@pytest.mark.parametrize("name", SERVICES)
def test_it_names_the_service(trouble, name):
    """By namespace and name, and no other Service."""
    found = {
        (alert["labels"]["service_namespace"], alert["labels"]["service"])
        for alert in trouble.alerts[name]
    }
    assert found == {("default", SERVICES[name])}


def test_policy_local_loses_clients(trouble):
    """The runbook's trace names the rule, and that it is not kube-proxy's."""
    (cause,) = {a["labels"]["cause"] for a in trouble.alerts["SrcipPolicyLocalLosesClients"]}
    assert cause == "other-rule"
    assert "because  SNAT by a rule of unknown owner" in trouble.traces["replaced"]
    assert "somebodys" in trouble.traces["replaced"]


def test_connections_black_holed(trouble):
    """The runbook's trace says where packets are dropped, and how to fix it."""
    assert "no-local-endpoint" in trouble.traces["dropped"]
    assert (
        "to fix   run an endpoint of default/nodeport-local on node2" in trouble.traces["dropped"]
    )


def test_an_agent_that_is_not_ready(trouble):
    """/readyz says what is missing, and why."""
    status, _, text = trouble.health["unready"]
    assert status == 503
    assert text.startswith("not ready: the cluster's objects are not in yet: ")
    assert "500 etcdserver: no leader" in text


def test_counts_that_are_old(trouble):
    """/healthz says for how long nothing was drained, when it is a minute."""
    status, _, text = trouble.health["node2"]
    assert (status, text) == (200, "ok\n") or text.startswith("no drain for ")


def test_the_log_says_why(trouble):
    """What the API server did, and what could not be read."""
    assert re.search(
        r"watch \w+ at https://\S+: All connection attempts failed", trouble.logs["node2"]
    )
    assert "undecodable path: " in trouble.logs["copy"]
    assert "wire version 99, expected 1" in trouble.logs["copy"]
