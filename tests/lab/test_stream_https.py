"""The live stream over TLS from a real agent, to a real client with a token."""

import json
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lab import kube_proxy, probe
from lab.scenarios import cases
from lab.services import OBJECTS
from tests.lab.commands import PATIENCE_S, SRCIP, lines, tracing, wait_until
from tests.lab.test_serve import Served, serving
from tests.lab.test_stream import end, of_kind
from tests.unit.apiserver import running
from tests.unit.test_page_server import Issued
from tests.unit.test_page_server import get as https_get
from tracer.pipeline import Wanted
from tracer.stream.client import AgentStream
from tracer.stream.protocol import UPGRADE, request_line
from tracer.stream.upgrade import HttpsAgent

pytestmark = pytest.mark.usefixtures("kernel")

# The agent's own program, which checks tokens again after half a second in place of three minutes.
OFTEN = """
from tracer import cli
from tracer.cluster import review
from tracer.stream import recheck
review.ALLOWED_S = review.REFUSED_S = recheck.EVERY_S = recheck.LONG_PAUSE_S = 0.5
cli.main()
"""
SOMEBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]


class Secure:
    """An agent that streams over TLS, an API server that knows its clients, and their files."""

    def __init__(self, served, api, issued, directory):
        self.served, self.api, self.issued = served, api, issued
        self.ca_file = directory / "ca.crt"
        self.path = directory / "agent.sock"
        self._directory = directory
        self.trust()

    def trust(self):
        self.ca_file.write_bytes(self.issued.authority.cert_pem.bytes())

    def get(self, path):
        return https_get(self.served, path, self.issued.authority, Authorization="Bearer scraper")

    def token(self, name):
        path = self._directory / name
        path.write_text(f"{name}\n")
        return path

    @property
    def url(self):
        return f"https://127.0.0.1:{self.served.port}"

    def agent(self):
        port = self.served.port
        return HttpsAgent(host="127.0.0.1", port=port, token="viewer", ca_file=self.ca_file)

    def command(self, *arguments, token="viewer"):
        account = ["--token-file", self.token(token), "--ca-file", self.ca_file]
        return [*SOMEBODY, *SRCIP, "trace", "--agent", self.url, *account, *map(str, arguments)]

    def refused(self, *arguments, **token):
        """The line that a client ends with."""
        done = subprocess.run(
            self.command(*arguments, **token),
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        return done.stderr

    @contextmanager
    def listening(self, *arguments, **token):
        """A client beside the block, that has been greeted."""
        command = self.command(*arguments, **token)
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            line = process.stderr.readline()
            assert "through its agent" in line, line + process.stderr.read()
            yield process
        finally:
            process.kill()
            process.communicate()

    def secured(self):
        """A TLS connection on which nothing has been sent."""
        context = ssl.create_default_context(cafile=self.ca_file)
        sock = socket.create_connection(("127.0.0.1", self.served.port), timeout=PATIENCE_S)
        return context.wrap_socket(sock, server_hostname="127.0.0.1")

    def upgraded(self):
        """One that has become a stream, without a request."""
        sock = self.secured()
        head = ("GET /stream HTTP/1.1", "Host: x", "Authorization: Bearer viewer")
        wish = ("Connection: Upgrade", f"Upgrade: {UPGRADE}", "", "")
        sock.sendall("\r\n".join((*head, *wish)).encode())
        assert sock.recv(4096).startswith(b"HTTP/1.1 101 ")
        return sock


@pytest.fixture(scope="module")
def secure(lab):
    with secured(lab) as secure:
        yield secure


@contextmanager
def secured(lab, **how):
    kube_proxy.load(lab, "iptables")
    with running() as api, tempfile.TemporaryDirectory(prefix="srcip-test-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        for item in json.loads(OBJECTS.read_text())["items"]:
            api.put(item)
        api.users |= {user: {"username": user} for user in ("scraper", "viewer")}
        api.allowed |= {("scraper", "get", "/metrics"), ("viewer", "get", "/stream")}
        issued = Issued(directory)
        options = ["--tls-cert", issued.cert, "--tls-key", issued.key, "--authorize", "kubernetes"]
        options += ["--stream-https", "--stream-socket", directory / "agent.sock"]
        cluster = ["--kubeconfig", api.kubeconfig(directory / "config"), "--proxy-mode", "iptables"]
        with serving(lab, *options, cluster=cluster, is_ready=False, **how) as served:
            secure = Secure(SecurelyServed(served, issued), api, issued, directory)
            wait_until(lambda: secure.get("/readyz")[0] == 200)
            yield secure


class SecurelyServed(Served):
    """A running agent that answers scrapes over TLS."""

    def __init__(self, served, issued):
        super().__init__(served.process, served.port)
        self._issued = issued

    def samples(self):
        status, _, text = https_get(
            self, "/metrics", self._issued.authority, Authorization="Bearer scraper"
        )
        assert status == 200
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, []).append(sample)
        return found

    def clients(self):
        return self.samples()["srcip_stream_clients"][0].value


def taken(client):
    """Everything until the summary."""
    found = []
    while (some := client.read(0.1)) is not None:
        found += client.judge(some)
    return found


@pytest.mark.parametrize("options", [[], ["--filter-port", "30080"]], ids=str)
def test_it_shows_what_a_trace_of_ones_own_shows(lab, tmp_path, secure, options):
    """
    All scenarios: the same lines as over the Unix socket and as a trace with root beside it, to
    a nobody; and as many as there were connections, by the agent's own totals.
    """
    with ExitStack() as stack:
        own, output = stack.enter_context(tracing(lab, tmp_path, "-o", "json", *options))
        # It has asked both nodes' kube-proxy for the mode: these connections were counted, too.
        before = secure.served.connections_by_now()
        client = stack.enter_context(secure.listening("-o", "json", *options))
        table = stack.enter_context(secure.listening(*options))
        local = stack.enter_context(AgentStream(secure.path, Wanted()))
        local.wait(PATIENCE_S)
        probe.run(lab, cases(modes=["iptables"]))
        secure.served.drained()
        code, printed, err = end(client)
        assert (code, err) == (0, "")
        local.hang_up()
        taken(local)
        own.send_signal(signal.SIGINT)
        assert own.wait(PATIENCE_S) == 0
        code, _, summary = end(table)
        assert code == 0
        made = secure.served.connections.total() - before
    seen, expected = lines(printed), lines(output.read_text())
    assert not any(seen[-1]["lost"].values())
    for kind in ("connection", "accept") if options else ("connection", "drop", "accept"):
        assert of_kind(kind, seen) == of_kind(kind, expected)
    connections = sum(line["kind"] == "connection" for line in seen)
    assert connections > 5
    assert summary.startswith(f"{connections} connections, ")
    assert local.summary().connections == made
    assert options or connections == made


def test_who_may(secure):
    """Permission to scrape is none to listen; each refusal is one line that says what to do."""
    assert "may not get /stream (403); bind that account" in secure.refused(token="scraper")
    assert "does not accept this token (401)" in secure.refused(token="nobody")
    assert secure.get("/stream")[0] == 403
    secure.api.allowed.add(("scraper", "get", "/stream"))
    secure.api.is_broken = True
    assert "cannot ask the API server about this token (503)" in secure.refused(token="new")
    secure.api.is_broken = False
    secure.api.allowed.remove(("scraper", "get", "/stream"))
    assert "Hostname mismatch" in secure.refused("--tls-server-name", "agent.example")
    assert secure.served.clients() == 0


def test_who_may_no_longer(lab):
    """
    A running stream ends when the API server withdraws the token, and when it takes the role away:
    one line says which. It goes on while the API server gives no answer, and so do all others.
    """
    chosen = cases(modes=["iptables"], scenarios=["S4"], families=["ipv4"], protos=["tcp"])
    with secured(lab, srcip=[sys.executable, "-c", OFTEN]) as secure, ExitStack() as stack:
        local = stack.enter_context(closing(AgentStream(secure.path, Wanted())))
        local.wait(PATIENCE_S)
        api = secure.api
        # Another account for each: the agent remembers for a while whom it has refused.
        api.users["guest"] = {"username": "guest"}
        api.allowed.add(("guest", "get", "/stream"))

        def is_asked(count):
            asked = len(api.asked("create", "tokenreviews")) + count
            wait_until(lambda: len(api.asked("create", "tokenreviews")) >= asked)

        for token, withdraw, why in (
            ("guest", lambda: api.users.pop("guest"), "the API server does not accept this token"),
            (
                "viewer",
                lambda: api.allowed.remove(("viewer", "get", "/stream")),
                "'viewer' may not get",
            ),
        ):
            with secure.listening("-o", "json", token=token) as client:
                is_asked(2)
                api.is_broken = True
                is_asked(2)
                probe.run(lab, chosen)
                row = json.loads(client.stdout.readline())
                assert row["kind"] in ("connection", "accept")
                withdraw()
                api.is_broken = False
                _, err = client.communicate(timeout=PATIENCE_S)
                assert (client.returncode, err.count("\n")) == (1, 1)
                assert f"ends the stream: {why}" in err
        local.hang_up()
        taken(local)
        assert local.summary().connections == 2 * len(chosen)


def test_the_token_of_a_kubeconfig(lab, secure, tmp_path):
    """Of its user: such as kubectl shows the API server."""
    kubeconfig = secure.api.kubeconfig(secure.path.parent / "mine", user={"token": "viewer"})
    where = ["--agent", secure.url, "--ca-file", secure.ca_file, "--kubeconfig", kubeconfig]
    chosen = cases(modes=["iptables"], scenarios=["S4"], families=["ipv4"], protos=["tcp"])
    command = [*SOMEBODY, *SRCIP, "trace", *where, "--count", "1", "--expect", "replaced"]
    process = subprocess.Popen(
        [*command, "--timeout", "30"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert "through its agent" in process.stderr.readline()
    probe.run(lab, chosen)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, err.partition(",")[0]) == (0, "1 connection"), out + err


def test_two_hundred_clients(lab, secure):
    """Beside fifty of the Unix socket: all get every connection; memory and totals are as ever."""
    chosen = cases(modes=["iptables"], scenarios=["S4"], families=["ipv4"])
    with ExitStack() as stack:
        clients = [
            stack.enter_context(AgentStream(where, Wanted()))
            for where in [secure.agent()] * 200 + [secure.path] * 50
        ]
        for client in clients:
            client.wait(PATIENCE_S)
        before = secure.served.connections_by_now()
        for _ in range(3):
            probe.run(lab, chosen)
        assert secure.served.connections_by_now() - before == 3 * len(chosen)
        samples = secure.served.samples()
        assert samples["srcip_stream_clients"][0].value == 250
        assert samples["process_resident_memory_bytes"][0].value < 80 << 20
        for client in clients:
            client.hang_up()
        for client in clients:
            taken(client)
            assert client.summary().connections == 3 * len(chosen)
            assert client.summary().lost["queue_full"] == 0
    wait_until(lambda: secure.served.clients() == 0)


def test_who_cannot_hold_it_up(lab, secure):
    """
    Handshakes that never end, garbage after the upgrade, clients that never read or are killed:
    totals are exact, probes are answered, and a reader misses nothing.
    """
    chosen = cases(modes=["iptables"], scenarios=["S1", "S3", "S4", "S5"])
    with ExitStack() as stack:
        for i in range(40):
            idle = socket.create_connection(("127.0.0.1", secure.served.port))
            stack.enter_context(closing(idle)).sendall(b"\x16\x03\x01"[: i % 4])
        for said in (b"\0" * 50_000, b"[" * 9000 + b"\n", request_line(Wanted()) * 2):
            garbage = stack.enter_context(secure.upgraded())
            garbage.sendall(said)
        for _ in range(50):
            stuck = stack.enter_context(closing(AgentStream(secure.agent(), Wanted())))
            stuck.wait(PATIENCE_S)
        reader = stack.enter_context(secure.listening("-o", "json"))
        before = secure.served.connections_by_now()
        for _ in range(5):
            killed = stack.enter_context(secure.listening("-o", "json"))
            probe.run(lab, chosen)
            killed.kill()
            reset = secure.upgraded()
            reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            reset.sendall(request_line(Wanted()))
            reset.close()
        made = secure.served.connections_by_now() - before
        assert secure.get("/readyz")[0] == 200
        code, printed, _ = end(reader)
        assert code == 0
        told = lines(printed)
        assert sum(line["kind"] == "connection" for line in told) == made > 0
        assert not any(told[-1]["lost"].values())


def test_a_renewed_certificate(lab, secure):
    """After root was dropped: streams that run go on, new ones have the new certificate."""
    chosen = cases(modes=["iptables"], scenarios=["S4"], families=["ipv4"], protos=["tcp"])
    with ExitStack() as stack:
        before = stack.enter_context(secure.listening("-o", "json"))
        secure.issued.issue()
        assert "its certificate is not accepted" in secure.refused()
        secure.trust()
        after = stack.enter_context(secure.listening("-o", "json"))
        probe.run(lab, chosen)
        secure.served.drained()
        for client in (before, after):
            code, printed, _ = end(client)
            assert code == 0
            assert Counter(line["kind"] for line in lines(printed))["connection"] == 1


def test_the_end_of_the_agent(lab):
    """In order: every client gets a summary; afterwards one line says that no agent is there."""
    with secured(lab) as secure, secure.listening("-o", "json") as client:
        secure.served.process.send_signal(signal.SIGTERM)
        out, err = client.communicate(timeout=PATIENCE_S)
        assert (client.returncode, err) == (0, "")
        assert lines(out)[-1]["kind"] == "summary"
        # Until it is gone its port takes connections that nobody answers.
        assert secure.served.process.wait(PATIENCE_S) == 0
        assert "Connection refused; does" in secure.refused()
