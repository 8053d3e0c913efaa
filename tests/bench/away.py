"""An API server that can go away: a node of the lab, an agent, and the link between them."""

import json
import re
import secrets
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import contextmanager

from lab import kube_proxy, probe
from lab.scenarios import cases
from lab.services import OBJECTS
from tests.bench.served import Served
from tests.lab.kube_proxy_port import said
from tests.unit.apiserver import ApiServer
from tracer.kernel import netns

API_PORT = 6443
NODE = "node1"
# A bookmark, as a real server sends them.
BOOKMARK_S = 30.0
# The agent and the API server run here, so that traffic between them can be counted and cut.
GATE = f"""
table ip gate {{
  counter asked {{ }}
  chain cut {{ }}
  chain in {{ type filter hook input priority 0
    tcp dport {API_PORT} tcp flags & (syn | ack) == syn counter name asked
    jump cut }}
}}"""
CUT = f"add rule ip gate cut tcp dport {API_PORT} drop"
MEND = "flush chain ip gate cut"
# In the first history and not in the others; and what the others have in its place.
GONE, CHANGED, ADDED = "nodeport-local", "nodeport", "added"


class Guest(Served):
    """An agent whose port is in another namespace."""

    def __init__(self, pid, port, path):
        super().__init__(pid, port)
        self._path = path

    def page(self):
        return self._get("/metrics")[1]

    def status(self, path):
        return self._get(path)[0]

    def _get(self, path):
        with netns.inside(self._path):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}") as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read().decode()


class Gate:
    """The namespace of agent and API server, and the way between them."""

    def __init__(self, name):
        self.name = name
        self.path = netns.NETNS_DIR / name

    def nft(self, *lines):
        self._run("nft", "-f", "-", stdin="\n".join(lines).replace("}", "\n}\n"))

    def attempts(self):
        """How many connections were attempted so far; a retransmission counts again."""
        printed = self._run("nft", "list", "counter", "ip", "gate", "asked")
        return int(re.search(r"packets (\d+)", printed)[1])

    def _run(self, *command, stdin=None):
        with netns.inside(self.path):
            return subprocess.run(
                command, input=stdin, capture_output=True, text=True, check=True
            ).stdout


@contextmanager
def gate():
    name = f"srcip-outage-{secrets.token_hex(3)}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        made = Gate(name)
        made.nft(GATE)
        yield made
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


class Cluster:
    """An API server that can be away and come back as another."""

    def __init__(self, gate):
        self._gate = gate
        self.api = ApiServer()
        self._authority = self.api.authority
        self._stop = threading.Event()
        for item in json.loads(OBJECTS.read_text())["items"]:
            self.api.put(item)
        # As one that has run for a while.
        self.api.version = self.api.oldest = 1_000_000
        self._start()

    def leave(self):
        self.api.stop()

    def come_back(self):
        """Become another server: versions begin anew, and the objects are different."""
        self.api = ApiServer()
        self.api.authority = self._authority
        for item in json.loads(OBJECTS.read_text())["items"]:
            name = item["metadata"].get("labels", {}).get("kubernetes.io/service-name")
            if GONE in (name, item["metadata"]["name"]):
                continue
            if item["kind"] == "Service" and item["metadata"]["name"] == CHANGED:
                item["spec"]["externalTrafficPolicy"] = "Local"
            self.api.put(item)
        self.api.put(service(ADDED))
        self._start()

    def bookmarks(self):
        """Send bookmarks until closed."""
        while not self._stop.wait(BOOKMARK_S):
            self.api.bookmark()

    def close(self):
        self._stop.set()
        self.api.stop()

    def _start(self):
        with netns.inside(self._gate.path):
            self.api.start(API_PORT)


def service(name):
    return {
        "kind": "Service",
        "apiVersion": "v1",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"type": "ClusterIP", "clusterIP": "10.0.99.99", "ports": [{"port": 80}]},
    }


@contextmanager
def agent(lab, gate, directory, cluster):
    """Run 'srcip serve' beside the API server."""
    kubeconfig = cluster.api.kubeconfig(directory / "config")
    command = [sys.executable, "-m", "tracer.cli", "serve", "--port", "0", "--no-stream"]
    command += ["--drain-interval", "1", "--kubeconfig", str(kubeconfig)]
    command += ["--netns", f"{lab.netns(NODE)}={NODE}"]
    with (directory / "log").open("w") as log, netns.inside(gate.path):
        process = subprocess.Popen(command, stderr=log)
    try:
        served = Guest(process.pid, wait_for(lambda: port_of(directory / "log")), gate.path)
        wait_for(lambda: served.status("/readyz") == 200)
        yield served
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait()


def port_of(log):
    found = re.search(r"serving on http://127.0.0.1:(\d+)/", log.read_text())
    return found and int(found[1])


@contextmanager
def conntrack_events(lab, directory):
    """What conntrack itself reports of the node's new entries, by protocol."""
    command = ["conntrack", "-E", "-e", "NEW", "--buffer-size", "33554432"]
    output, errors = directory / "events", directory / "complaints"
    with output.open("w") as stdout, errors.open("w") as stderr:
        with netns.inside(lab.netns(NODE)):
            process = subprocess.Popen(["stdbuf", "-oL", *command], stdout=stdout, stderr=stderr)
        try:
            # The entry exists when conntrack reports a connection.
            wait_for(lambda: knock(lab) or output.stat().st_size)
            yield lambda: Counter(re.findall(r"\[NEW\] (\w+)", output.read_text()))
        finally:
            process.terminate()
            process.wait()
    # What conntrack prints when it could not keep up.
    assert "WARNING" not in errors.read_text(), errors.read_text()


def knock(lab):
    probe.run(lab, cases(modes=["iptables"], scenarios=["S4"], families=["ipv4"], protos=["udp"]))


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


class Traffic:
    """All scenarios, again and again, with the rules of one mode of kube-proxy."""

    def __init__(self, lab, proxy):
        self._lab, self._proxy = lab, proxy
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.rounds = 0
        self.change("iptables")
        self._thread = threading.Thread(target=self._run)

    def change(self, mode):
        """Restart kube-proxy in another mode."""
        with self._lock:
            self._proxy.stop()
            kube_proxy.load(self._lab, mode)
            self._mode = mode
            self._proxy.start(said(mode))

    def _run(self):
        while not self._stop.wait(0.2):
            with self._lock:
                probe.run(self._lab, cases(modes=[self._mode]))
            self.rounds += 1

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
