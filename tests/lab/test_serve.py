"""The node agent on a whole cluster: its totals are the connections that were made."""

import json
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from exporters.prometheus import ConnectionLabels, DropLabels
from lab import kube_proxy, probe
from lab.scenarios import cases
from lab.services import OBJECTS
from tests.kernel.trace import open_source
from tests.lab.commands import OPTIONS, PATIENCE_S, SRCIP, lines, tracing, wait_until
from tests.unit.apiserver import running
from tests.unit.test_page_server import Issued
from tests.unit.test_page_server import get as https_get
from tracer.agent import Agent
from tracer.decode import decode
from tracer.kernel import netns
from tracer.kernel.programs import Sizes
from tracer.kernel.source import Settings
from tracer.model import Connection
from tracer.surroundings import LiveViews

pytestmark = pytest.mark.usefixtures("kernel")

NODES = ("node1", "node2")
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


class Served:
    """A running 'srcip serve'."""

    def __init__(self, process, port):
        self.process = process
        self.port = port

    def get(self, path, accept=""):
        """Status, content type and body of a page; None if nobody answers."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", headers={"Accept": accept}
        )
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:  # noqa: S310
                return answer.status, answer.headers["Content-Type"], answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers["Content-Type"], error.read().decode()
        except OSError:
            return None

    def is_ready(self):
        answer = self.get("/readyz")
        return answer is not None and answer[0] == 200

    def samples(self):
        """All samples, as lists by name."""
        _, _, text = self.get("/metrics")
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, []).append(sample)
        return found

    def totals(self, name, labels):
        """A counter's totals by labels."""
        return Counter(
            {
                labels(*(sample.labels[each] for each in labels._fields)): int(sample.value)
                for sample in self.samples().get(name, [])
            }
        )

    @property
    def connections(self):
        return self.totals("srcip_connections_total", ConnectionLabels)

    def connections_by_now(self):
        """How many connections there were before now."""
        self.drained()
        return self.connections.total()

    @property
    def drops(self):
        return self.totals("srcip_dropped_packets_total", DropLabels)

    def last_drain(self):
        """When the last drain began and ended."""
        samples = self.samples()
        (ended,) = samples["srcip_drain_timestamp_seconds"]
        (took,) = samples["srcip_drain_duration_seconds"]
        return ended.value - took.value, ended.value

    def drained(self):
        """
        Wait until everything before now is in the totals; return when it was.

        One drain that begins later takes in connections; drops are read after it, and are in the
        next one.
        """
        now_s = time.time()
        first_s = wait_until(lambda: (drain := self.last_drain())[0] > now_s and drain[1])
        return wait_until(lambda: (drain := self.last_drain())[0] > first_s and drain[1])


@contextmanager
def serving(lab, *arguments, nodes=NODES, cluster=OPTIONS, is_ready=True, cwd=None, srcip=SRCIP):
    """A 'srcip serve' beside the block."""
    where = [f"--netns={lab.netns(node)}={node}" for node in nodes]
    command = [*srcip, "serve", *cluster, *where, "--port", "0", "--drain-interval", "1"]
    if "--stream-socket" not in arguments:
        command.append("--no-stream")
    command += map(str, arguments)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=cwd)
    try:
        port = None
        while port is None:
            line = process.stderr.readline()
            assert line, f"serve ended with {process.wait()}"
            if line.startswith("serving on "):
                port = int(line.split("127.0.0.1:")[1].split("/")[0])
        served = Served(process, port)
        if is_ready:
            wait_until(served.is_ready)
        yield served
    finally:
        process.kill()
        process.communicate()


def by_trace(line):
    """The labels of a connection that 'srcip trace' showed."""
    service = line.get("service", {})
    return (
        *(service.get("namespace", ""), service.get("name", ""), service.get("policy", "")),
        *(line["verdict"], line.get("cause", ""), line["client"].get("class", "unknown")),
        *(line["family"], line["proto"]),
    )


def dropped_by_trace(line):
    """The labels of a drop that 'srcip trace' showed."""
    service = line.get("service", {})
    return DropLabels(
        *(service.get("namespace", ""), service.get("name", ""), service.get("via", "none")),
        *(line.get("cause", ""), line["reason"], line["family"], line["proto"]),
    )


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_totals_are_the_connections_made(lab, tmp_path, mode):
    """
    All scenarios, twice: on each node the totals by Service, verdict, cause, class, family and
    protocol are those of a trace beside it, connection by connection; and over both nodes they are
    the table's.
    """
    kube_proxy.load(lab, mode)
    chosen = cases(modes=[mode])
    with ExitStack() as stack:
        # Who asks kube-proxy for its mode makes a connection: the trace does so before it counts.
        trace, output = stack.enter_context(tracing(lab, tmp_path, "-o", "json"))
        for node in NODES:
            lab.run(node, "conntrack", "-F")
        told = ("--proxy-mode", mode)
        agents = {node: stack.enter_context(serving(lab, *told, nodes=[node])) for node in NODES}
        for _ in range(2):
            probe.run(lab, chosen)
        for agent in agents.values():
            agent.drained()
        trace.send_signal(signal.SIGINT)
        assert trace.wait(PATIENCE_S) == 0
        connections = {node: agent.connections for node, agent in agents.items()}
        drops = {node: agent.drops for node, agent in agents.items()}

    told = lines(output.read_text())
    for node in NODES:
        seen = [line for line in told if line.get("node") == node]
        traced = Counter(by_trace(line) for line in seen if line["kind"] == "connection")
        counted = Counter()
        for labels, total in connections[node].items():
            counted[(*labels[:2], *labels[3:])] += total
        assert counted == traced
        dropped = Counter(dropped_by_trace(line) for line in seen if line["kind"] == "drop")
        assert of_services(drops[node]) == of_services(dropped)

    assert as_in_the_table(connections["node1"] + connections["node2"]) == expected(chosen)
    packets, made = dropped_as_in_the_table(drops), expected_drops(chosen)
    assert packets.keys() == made.keys()
    # On a busy machine a SYN may be sent again before the client gives up.
    assert all(n == made[key] if "udp" in key else n >= made[key] for key, n in packets.items())


def expected(chosen):
    """What the table's connections, made twice, are on the node that looks at the Service."""
    made = Counter()
    for case in chosen:
        key = (case.scenario.service, case.scenario.via, case.family, case.proto)
        if case.verdict != "dropped":
            made[(*key, case.verdict, case.cause or "")] += 2
        elif case.cause == "no-listener":
            # It is a connection, to the node itself, before nobody is found to listen.
            made[(*key, "preserved", "")] += 2
    return made


def as_in_the_table(connections):
    counted = Counter()
    for labels, total in connections.items():
        if labels.service or labels.cause == "pod-egress":
            key = (labels.service or None, labels.via, labels.family, labels.proto)
            counted[(*key, labels.verdict, labels.cause)] += total
    return counted


def expected_drops(chosen):
    made = Counter()
    for case in chosen:
        if case.verdict == "dropped":
            key = (case.scenario.service, case.scenario.via, case.family, case.proto)
            made[(*key, case.cause)] += 2
    return made


def of_services(drops):
    """The drops on the way to a Service, as the table's are; a node drops stray packets, too."""
    return Counter({labels: total for labels, total in drops.items() if labels.service})


def dropped_as_in_the_table(drops):
    counted = Counter()
    for labels, total in of_services(drops["node1"] + drops["node2"]).items():
        key = (labels.service, labels.via, labels.family, labels.proto, labels.cause)
        counted[key] += total
    return counted


def test_formats(lab):
    """Plain text by default, OpenMetrics on request; both say the same, without addresses."""
    kube_proxy.load(lab, "iptables")
    with serving(lab) as served:
        probe.run(lab, cases(modes=["iptables"], scenarios=["S3", "S6"]))
        served.drained()
        status, content_type, text = served.get("/metrics")
        assert (status, content_type.split(";")[0]) == (200, "text/plain")
        status, content_type, openmetrics = served.get("/metrics", OPENMETRICS)
        assert (status, content_type.split(";")[0]) == (200, "application/openmetrics-text")
        assert served.get("/healthz")[0] == 200
        assert served.get("/nothing")[0] == 404
    plain = {family.name: family for family in text_string_to_metric_families(text)}
    other = {family.name: family for family in parse_openmetrics(openmetrics)}
    assert plain.keys() == other.keys()
    assert len(plain["srcip_connections"].samples) == len(other["srcip_connections"].samples) > 3
    values = [
        value for family in other.values() for s in family.samples for value in s.labels.values()
    ]
    assert not [value for value in values if value.count(".") == 3 or "::" in value]
    documented = Path(__file__).parents[2].joinpath("docs/metrics.md").read_text()
    assert not [name for name in plain if name not in documented]


def test_not_ready_before_the_cluster(lab, tmp_path):
    """/readyz is 503 with a reason until the objects are read; later connections are counted."""
    kube_proxy.load(lab, "iptables")
    with running() as api:
        for item in json.loads(OBJECTS.read_text())["items"]:
            api.put(item)
        api.is_broken = True
        cluster = ["--kubeconfig", api.kubeconfig(tmp_path / "config")]
        with serving(lab, cluster=cluster, is_ready=False) as served:
            wait_until(lambda: "objects are not in" in (served.get("/readyz") or ("",) * 3)[2])
            assert served.get("/readyz")[0] == 503
            assert served.get("/healthz")[0] == 200
            assert "srcip_ready 0.0" in served.get("/metrics")[2]
            api.is_broken = False
            wait_until(served.is_ready)
            chosen = cases(modes=["iptables"], scenarios=["S4"], families=["ipv4"])
            probe.run(lab, chosen)
            served.drained()
            totals = Counter({labels.service: n for labels, n in served.connections.items()})
            assert totals["nodeport"] == 1
            assert served.samples()["srcip_cluster_age_seconds"][0].value < 60
            # The server goes away; the agent goes on with what it knows.
            api.stop()
            probe.run(lab, chosen)
            served.drained()
            assert served.is_ready()
            assert sum(n for labels, n in served.connections.items() if labels.service) == 4


def test_it_is_nobody(lab):
    """Once attached it has no capability, and its process metrics are there all the same."""
    with serving(lab) as served:
        status = Path(f"/proc/{served.process.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        assert set(fields["Uid"].split()) == {"65534"}
        assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 0
        samples = served.samples()
        assert samples["process_cpu_seconds_total"][0].value > 0
        assert samples["process_resident_memory_bytes"][0].value < 70 << 20
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(PATIENCE_S) == 0


def test_port_taken(lab):
    """One line, and exit 1."""
    with serving(lab) as served:
        where = [f"--netns={lab.netns('node1')}=node1", "--port", str(served.port)]
        done = subprocess.run(
            [*SRCIP, "serve", "--no-cluster", *where],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 1
    assert done.stderr == (
        f"srcip: cannot listen on 127.0.0.1 port {served.port}: Address already in use; choose "
        "another with --bind and --port\n"
    )


def test_scrapers_that_never_read(lab):
    """Clients that connect and do nothing delay others only briefly."""
    with serving(lab) as served, ExitStack() as stack:
        address = ("127.0.0.1", served.port)
        for _ in range(20):
            idle = stack.enter_context(closing(socket.create_connection(address)))
            idle.sendall(b"GET /metrics HTTP/1.0\r\n")
        assert served.is_ready()
        for _ in range(60):
            stack.enter_context(closing(socket.create_connection(address)))
        wait_until(served.is_ready)
        assert served.process.poll() is None


def test_a_full_map_loses_nothing(lab):
    """With room for four paths, what is counted and what is 'other' are the connections made."""
    kube_proxy.load(lab, "iptables")
    namespaces = [netns.find(f"{lab.netns(node)}={node}", node) for node in NODES]
    snapshots = []
    with ExitStack() as stack:
        views = stack.enter_context(closing(LiveViews(namespaces, proxy_modes=[None, None])))
        settings = Settings(is_streaming=False, has_drops=True, sizes=Sizes(paths=4))
        kernel = stack.enter_context(closing(open_source(namespaces, settings)))
        agent = Agent(kernel, views, snapshots.append, version="test")
        agent.step(0)
        streamed = stack.enter_context(closing(open_source(namespaces)))
        probe.run(lab, cases(modes=["iptables"], families=["ipv4"]))
        agent.drain()
        agent.drain()
        made = sum(isinstance(decode(record), Connection) for record in streamed.read(0))
    told = snapshots[-1]
    full = told.lost["connections", "paths_full"]
    assert 0 < full < made
    assert sum(told.connections.values()) == made
    assert sum(n for labels, n in told.connections.items() if labels.service == "other") == full


def test_https_for_who_may(lab, tmp_path):
    """
    Metrics go over HTTPS to bearer tokens that the API server lets get them, probes to everyone;
    a certificate that is renewed after root was dropped is taken into use.
    """
    kube_proxy.load(lab, "iptables")
    with running() as api, tempfile.TemporaryDirectory(prefix="srcip-test-") as directory:
        for item in json.loads(OBJECTS.read_text())["items"]:
            api.put(item)
        api.users["prometheus"] = {"username": "prometheus"}
        api.users["somebody"] = {"username": "somebody"}
        api.allowed.add(("prometheus", "get", "/metrics"))
        Path(directory).chmod(0o755)
        issued = Issued(Path(directory))
        options = ["--tls-cert", issued.cert, "--tls-key", issued.key, "--authorize", "kubernetes"]
        cluster = ["--kubeconfig", api.kubeconfig(tmp_path / "config")]
        with serving(lab, *options, cluster=cluster, is_ready=False) as served:

            def get(path, token=None):
                headers = {"Authorization": f"Bearer {token}"} if token else {}
                return https_get(served, path, issued.authority, **headers)

            wait_until(lambda: get("/readyz")[0] == 200)
            assert get("/healthz")[0] == 200
            tokens = {None: 401, "unknown": 401, "somebody": 403, "prometheus": 200}
            assert {token: get("/metrics", token)[0] for token in tokens} == tokens
            assert "srcip_build_info" in get("/metrics", "prometheus")[2]
            before = issued.authority
            issued.issue()
            assert get("/readyz")[0] == 200
            with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
                https_get(served, "/readyz", before)
            api.is_broken = True
            assert get("/metrics", "prometheus")[0] == 200
            assert get("/metrics", "new")[0] == 503
            assert get("/healthz")[0] == 200
