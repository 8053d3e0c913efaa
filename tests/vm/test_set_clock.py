"""The clock is set by a day and back; test_kernels.py runs this in a virtual machine."""

import json
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.bench.served import FIRST_PORT, RULES, endpoint_slice, service
from tests.kernel import box as boxes
from tests.kernel.box import NODE
from tests.unit.apiserver import running
from tests.unit.test_page_server import Issued, get

SRCIP = [sys.executable, "-m", "tracer.cli"]
# What vmrun.sh leaves there.
MARK = Path("/run/vmrun/stage2")
DAY_S, HOUR = 86_400, timedelta(hours=1)
COUNT = 10
# Both watch Nodes, Services, EndpointSlices and the node's Pods.
WATCHES = 8
# In a virtual machine the compiler takes its time.
PATIENCE_S = 180


@pytest.fixture
def box():
    """A client, a node with a NodePort, and a server."""
    if not MARK.exists():
        pytest.skip("it sets the clock: only in a virtual machine, by 'make vm'")
    with boxes.built() as built:
        built.rules(RULES)
        yield built


def wait_until(condition):
    end = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


def step_clock(by_s):
    """Set the clock; how long ago the machine was started does not change by it."""
    before_s = time.monotonic()
    time.clock_settime(time.CLOCK_REALTIME, time.time() + by_s)
    assert time.monotonic() - before_s < DAY_S / 2


class Agents:
    """A running 'srcip serve', and a 'srcip trace' beside it."""

    def __init__(self, stack, box, api, directory):
        self._directory = directory
        self.api = api
        self.certificate = Issued(directory)
        config = api.kubeconfig(directory / "config")
        where = ["--kubeconfig", str(config), "--proxy-mode", "nftables"]
        where += ["--netns", f"{box.names['node']}=node1"]
        options = ["--tls-cert", self.certificate.cert, "--tls-key", self.certificate.key]
        options += ["--authorize", "kubernetes", "--port", "0", "--drain-interval", "1"]
        self._serve = self._run(stack, "serve", *where, *options, "--no-stream")
        self.port = wait_until(self._listening)
        wait_until(lambda: self.get("/readyz")[0] == 200)
        self._trace = self._run(stack, "trace", *where, "-o", "json")
        wait_until(lambda: "tracing" in self.log("trace"))

    def _run(self, stack, command, *arguments):
        output = stack.enter_context((self._directory / f"{command}.out").open("w"))
        errors = stack.enter_context((self._directory / f"{command}.log").open("w"))
        process = subprocess.Popen(
            [*SRCIP, command, *map(str, arguments)], stdout=output, stderr=errors
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        return process

    def _listening(self):
        assert self._serve.poll() is None, self.log("serve")
        _, found, rest = self.log("serve").partition("https://127.0.0.1:")
        return found and int(rest.split("/")[0])

    def log(self, command):
        return (self._directory / f"{command}.log").read_text()

    def get(self, path):
        """Status and text; the certificate is good for longer than the clock is wrong."""
        status, _, text = get(
            self, path, self.certificate.authority, Authorization="Bearer prometheus"
        )
        return status, text

    def samples(self, name):
        status, text = self.get("/metrics")
        assert status == 200, text
        lines = [line.rpartition(" ") for line in text.splitlines() if line.startswith(name)]
        return {series: float(number) for series, _, number in lines}

    def total(self):
        """What was counted for the Service."""
        counted = self.samples("srcip_connections_total{")
        return sum(number for series, number in counted.items() if 'service="service-0"' in series)

    def traced(self):
        """The times of the connections shown."""
        printed = (self._directory / "trace.out").read_text()
        lines = [json.loads(line) for line in printed.splitlines() if line.endswith("}")]
        return [
            datetime.fromisoformat(line["time"]).timestamp()
            for line in lines
            if line["kind"] == "connection" and line.get("service")
        ]

    def cpu_s(self):
        """CPU time of both."""
        pids = (self._serve.pid, self._trace.pid)
        # clock_getcpuclockid(3)
        return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)

    def are_alive(self):
        return self._serve.poll() is None and self._trace.poll() is None


@pytest.fixture
def agents(box, tmp_path_factory):
    directory = tmp_path_factory.mktemp("clock")
    for each in (directory, *directory.parents[:2]):
        each.chmod(0o755)
    with ExitStack() as stack:
        api = stack.enter_context(running())
        now = datetime.now(UTC)
        api.stop()
        api.validity = {"not_before": now - HOUR, "not_after": now + HOUR}
        api.start(api.port)
        api.put(
            {
                "kind": "Node",
                "apiVersion": "v1",
                "metadata": {"name": "node1"},
                "spec": {"podCIDRs": ["10.9.0.0/24"]},
                "status": {"addresses": [{"type": "InternalIP", "address": NODE[4]}]},
            }
        )
        api.put(service(0))
        api.put(endpoint_slice(0))
        api.users["prometheus"] = {"username": "prometheus"}
        api.allowed.add(("prometheus", "get", "/metrics"))
        yield Agents(stack, box, api, directory)


def talk(box):
    """Make TCP connections and UDP flows through the node; return how many arrived."""
    arrived = 0
    with ExitStack() as stack:
        listener = stack.enter_context(box.socket("server", 4, socket.SOCK_STREAM))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", FIRST_PORT))
        listener.listen(COUNT)
        server = stack.enter_context(box.socket("server", 4, socket.SOCK_DGRAM))
        server.bind(("", FIRST_PORT))
        for _ in range(COUNT):
            client = stack.enter_context(box.socket("client", 4, socket.SOCK_STREAM))
            client.connect((NODE[4], FIRST_PORT))
            stack.enter_context(listener.accept()[0])
            client = stack.enter_context(box.socket("client", 4, socket.SOCK_DGRAM))
            client.sendto(b"x", (NODE[4], FIRST_PORT))
            server.recvfrom(16)
            arrived += 2
    return arrived


class Rounds:
    """Connections made and counted, round by round."""

    def __init__(self, box, agents):
        self._box, self._agents = box, agents
        self._made = 0

    def go(self):
        """Connections are counted exactly, and shown by the current clock."""
        agents, began_s = self._agents, time.time()
        known = len(agents.traced())
        self._made += talk(self._box)
        wait_until(lambda: agents.total() >= self._made)
        assert agents.total() == self._made
        wait_until(lambda: len(agents.traced()) >= self._made)
        times = agents.traced()[known:]
        assert len(times) == 2 * COUNT
        # The trace may have read a record before it took note of the clock's new offset.
        assert began_s - 1 <= min(times) <= max(times) <= time.time() + 1
        (drained_s,) = agents.samples("srcip_drain_timestamp_seconds").values()
        assert abs(time.time() - drained_s) < PATIENCE_S
        (age_s,) = agents.samples("srcip_cluster_age_seconds").values()
        assert age_s < PATIENCE_S
        assert agents.get("/healthz")[0] == agents.get("/readyz")[0] == 200
        assert agents.are_alive()


def is_idle(agents):
    """Neither takes more CPU time than its usual work; one that spins would take all."""
    before_s, cpu_s = time.monotonic(), agents.cpu_s()
    time.sleep(5)
    return agents.cpu_s() - cpu_s < 0.5 * (time.monotonic() - before_s)


def test_the_clock_is_set_by_a_day_and_back(box, agents):
    """
    Nothing is lost, expires or spins, and times are told by the new clock. While the API server's
    certificate is not good by that clock the agent goes on with what it knows, and says why.
    """
    api, rounds = agents.api, Rounds(box, agents)
    rounds.go()
    reviews, reviewed_s = len(api.asked("create", "tokenreviews")), time.monotonic()
    for sign, complaint in ((1, "certificate has expired"), (-1, "certificate is not yet valid")):
        step_clock(sign * DAY_S)
        # A token is known for a minute, whatever the clock says.
        assert agents.get("/metrics")[0] == 200
        is_known = time.monotonic() - reviewed_s < 60
        assert not is_known or len(api.asked("create", "tokenreviews")) == reviews
        rounds.go()
        wait_until(lambda: is_idle(agents))
        api.disconnect()
        wait_until(
            lambda line=complaint: f"certificate not accepted: {line}" in agents.log("serve")
        )
        assert agents.get("/readyz")[0] == 200
        wait_until(lambda: is_idle(agents))
        step_clock(-sign * DAY_S)
        api.wait_for(lambda: api.open_watches == WATCHES, PATIENCE_S)
        rounds.go()
        reviews, reviewed_s = len(api.asked("create", "tokenreviews")), time.monotonic()
    for command in ("serve", "trace"):
        assert "Traceback" not in agents.log(command)
