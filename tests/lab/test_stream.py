"""The live stream of an agent on a whole cluster: what a trace of one's own shows, without root."""

import json
import re
import signal
import socket
import subprocess
import tempfile
from collections import Counter
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest

from lab import kube_proxy, probe
from lab.scenarios import cases
from tests.lab.commands import PATIENCE_S, SRCIP, lines, netns_options, tracing, wait_until
from tests.lab.test_serve import serving
from tracer.pipeline import Wanted
from tracer.stream.protocol import request_line

pytestmark = pytest.mark.usefixtures("kernel")

GROUP = 54321
# A user without privileges except the stream's group.
SOMEBODY = ["setpriv", "--reuid=65534", f"--regid={GROUP}", "--clear-groups", "--inh-caps=-all"]


@pytest.fixture
def path():
    """Where the agent's socket is; its directory may be entered by everyone."""
    with tempfile.TemporaryDirectory(prefix="srcip-test-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory) / "agent.sock"


def agent(lab, path, *arguments):
    return serving(
        lab, "--stream-socket", path, "--stream-group", GROUP, "--proxy-mode", "iptables",
        *arguments,
    )  # fmt: skip


@contextmanager
def listening(path, *arguments):
    """A client beside the block, that has been greeted."""
    command = [*SOMEBODY, *SRCIP, "trace", "--agent", path, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        assert "through its agent" in line, line + process.stderr.read()
        yield process
    finally:
        process.kill()
        process.communicate()


def end(process):
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


def told(line):
    """A line without what differs from one observer to the next."""
    return {
        key: value
        for key, value in line.items()
        if key not in {"time", "status", "zone", "mark", "evidence"}
    }


def of_kind(kind, lines):
    """Lines of a kind, in any order; of accepts those of our connections, not of other labs'."""
    replies = [line["reply"] for line in lines if line["kind"] == "connection"]
    peers = {(reply["dst"], reply.get("dport")) for reply in replies}
    return Counter(
        json.dumps(told(line), sort_keys=True)
        for line in lines
        if line["kind"] == kind
        and (kind != "accept" or (line["peer"]["address"], line["peer"]["port"]) in peers)
    )


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize(
    "options", [[], ["--filter-service", "default/nodeport"], ["--filter-port", "30080"]], ids=str
)
def test_it_shows_what_a_trace_of_ones_own_shows(lab, tmp_path, path, options):
    """All scenarios: the same lines as a trace with root beside it, in all forms, to a nobody."""
    kube_proxy.load(lab, "iptables")
    with ExitStack() as stack:
        stack.enter_context(agent(lab, path))
        own, output = stack.enter_context(tracing(lab, tmp_path, "-o", "json", *options))
        client = stack.enter_context(listening(path, "-o", "json", *options))
        table = stack.enter_context(listening(path, *options))
        probe.run(lab, cases(modes=["iptables"]))
        code, printed, err = end(client)
        assert (code, err) == (0, "")
        seen = lines(printed)
        kinds = {"connection", "drop", "accept"}
        if "--filter-port" in options:
            # A filtered trace of one's own gets drops for all reasons.
            kinds -= {"drop"}

        def are_same():
            expected = lines(output.read_text())
            return all(of_kind(kind, seen) == of_kind(kind, expected) for kind in kinds)

        # The trace may have read less so far; if it has other lines, the assertion below says so.
        with suppress(AssertionError):
            wait_until(are_same)
        own.send_signal(signal.SIGINT)
        assert own.wait(PATIENCE_S) == 0
        code, rows, summary = end(table)
        assert code == 0
    expected = lines(output.read_text())
    assert seen[-1]["kind"] == "summary"
    assert not any(seen[-1]["lost"].values())
    for kind in kinds:
        assert of_kind(kind, seen) == of_kind(kind, expected)
    connections = sum(line["kind"] == "connection" for line in seen)
    assert connections > 5
    assert len(re.findall(r" (?:preserved|replaced)\S* ", rows)) == connections
    assert summary.startswith(f"{connections} connections, ")


@pytest.mark.usefixtures("others")
def test_expect_and_count(lab, path):
    """Exit codes as of a trace of one's own."""
    kube_proxy.load(lab, "iptables")
    chosen = cases(modes=["iptables"], scenarios=["S4"], families=["ipv4"], protos=["tcp"])
    with agent(lab, path), ExitStack() as stack:
        good, bad = (
            stack.enter_context(
                listening(path, "--expect", verdict, "--count", "1", "--timeout", "30")
            )
            for verdict in ("replaced", "preserved")
        )
        nothing = stack.enter_context(
            listening(path, "--filter-port", "9", "--expect", "replaced", "--timeout", "1")
        )
        probe.run(lab, chosen)
        assert good.wait(PATIENCE_S) == 0
        assert bad.wait(PATIENCE_S) == 3
        assert nothing.wait(PATIENCE_S) == 4


def test_two_hundred_clients(lab, path):
    """All get every connection; the agent counts on, within its memory, and streams no more."""
    kube_proxy.load(lab, "iptables")
    chosen = cases(modes=["iptables"], scenarios=["S4"], families=["ipv4"])
    with agent(lab, path) as served, ExitStack() as stack:
        clients = []
        for _ in range(200):
            client = stack.enter_context(closing(socket.socket(socket.AF_UNIX)))
            client.settimeout(PATIENCE_S)
            client.connect(str(path))
            client.sendall(request_line(Wanted()))
            clients.append((client, client.makefile("rb")))
        for _, reader in clients:
            assert json.loads(reader.readline())["kind"] == "hello"
        for _ in range(3):
            probe.run(lab, chosen)
        assert served.connections_by_now() == 3 * len(chosen)
        samples = served.samples()
        assert samples["srcip_stream_clients"][0].value == 200
        assert samples["process_resident_memory_bytes"][0].value < 70 << 20
        for client, _ in clients:
            client.shutdown(socket.SHUT_WR)
        for _, reader in clients:
            got = [json.loads(line) for line in reader]
            assert sum(line["kind"] == "connection" for line in got) == 3 * len(chosen)
            assert got[-1]["connections"] == 3 * len(chosen)
        wait_until(lambda: served.samples()["srcip_stream_clients"][0].value == 0)


@pytest.mark.usefixtures("others")
def test_clients_that_never_read(lab, path):
    """A hundred of them: totals are exact, probes are answered, and a reader misses nothing."""
    kube_proxy.load(lab, "iptables")
    chosen = cases(modes=["iptables"], scenarios=["S1", "S3", "S4", "S5"])
    with agent(lab, path) as served, ExitStack() as stack:
        for _ in range(100):
            client = stack.enter_context(closing(socket.socket(socket.AF_UNIX)))
            client.connect(str(path))
            client.sendall(request_line(Wanted()))
        reader = stack.enter_context(listening(path, "-o", "json"))
        for _ in range(5):
            probe.run(lab, chosen)
        total = served.connections_by_now()
        assert served.is_ready()
        code, printed, _ = end(reader)
        assert code == 0
        told = lines(printed)
        assert sum(line["kind"] == "connection" for line in told) == total
        assert not any(told[-1]["lost"].values())


@pytest.mark.usefixtures("others")
def test_who_may_not(lab, path):
    """A user of another group gets one line; so does one that finds no agent."""
    stranger = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]
    with agent(lab, path):
        command = [*stranger, *SRCIP, "trace", "--agent", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            f"srcip: cannot reach the agent at {path}: Permission denied; only the group of "
            "'srcip serve --stream-group' may connect\n"
        )


@pytest.mark.usefixtures("others")
def test_killed_while_somebody_listens(lab, path):
    """The client says so in one line; the next agent takes the socket's place."""
    with agent(lab, path) as served, listening(path, "-o", "json") as client:
        served.process.kill()
        _, err = client.communicate(timeout=PATIENCE_S)
        assert client.returncode == 1
        assert "closed the stream" in err
        assert err.count("\n") == 1
        assert path.exists()
        with agent(lab, path), listening(path) as again:
            assert end(again)[0] == 0


def test_a_second_agent(lab, path):
    """It runs without the stream if no socket was named, and exits if the named one is taken."""
    where = netns_options(lab)
    with agent(lab, path):
        done = subprocess.run(
            [*SRCIP, "serve", "--no-cluster", *where, "--port", "0", "--stream-socket", path],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 1
        assert done.stderr == (
            f"srcip: another agent listens on {path}; choose another with --stream-socket, or "
            "--no-stream\n"
        )
