"""A running 'srcip serve' beside a benchmark, and the cluster that it is told of."""

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.kernel.box import NODE, SERVER, package_root, wait_until

SERVICES, FIRST_PORT = 1_000, 31_000
PROTOCOLS = ("UDP", "TCP")
# As nodes.RULES, with a NodePort for each Service. The port stays: so many more flows find one to
# be masqueraded to.
RULES = f"""
table ip bench {{
  chain pre {{ type nat hook prerouting priority -100
    meta l4proto {{ tcp, udp }} th dport {FIRST_PORT}-{FIRST_PORT + SERVICES - 1} \
meta mark set 0x4000 dnat to {SERVER[4]} }}
  chain post {{ type nat hook postrouting priority 100
    meta mark & 0x4000 == 0x4000 meta mark set 0 masquerade }}
}}"""
# The backends receive and say nothing.
SILENCE = """
table ip silence {
  chain pre { type filter hook prerouting priority -300
    meta l4proto udp drop }
}"""


class Served:
    """A running agent."""

    def __init__(self, pid, port, context=None, token=None):
        self.pid = pid
        self.port = port
        self._context = context
        self._url = f"http{'s' if context else ''}://127.0.0.1:{port}/metrics"
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def page(self):
        """The text of a scrape."""
        page = urllib.request.Request(self._url, headers=self._headers)  # noqa: S310 - ours
        with urllib.request.urlopen(page, context=self._context) as answer:  # noqa: S310
            return answer.read().decode()

    def samples(self, *names):
        """The series of some metrics and their numbers, from one scrape."""
        return samples(self.page(), *names)

    def value(self, name):
        """The number of a metric that has one series."""
        return self.samples(name)[name]

    def total(self):
        return int(sum(self.samples("srcip_connections_total").values()))

    def drained(self):
        """Wait for a drain that began after now: it takes in all connections before."""
        now_s = time.time()
        wait_until(lambda: self._drain_began_s() > now_s)

    def _drain_began_s(self):
        """When the last drain began."""
        ended, took = "srcip_drain_timestamp_seconds", "srcip_drain_duration_seconds"
        told = self.samples(ended, took)
        return told[ended] - told[took]

    def cpu_s(self):
        """CPU time of the process and of the child that reads the node's rules."""
        # clock_getcpuclockid(3); to the nanosecond, where /proc counts ticks.
        return sum(time.clock_gettime(~pid << 3 | 2) for pid in self._pids())

    def resident_mib(self):
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def proportional_mib(self):
        """Memory of the process and of its child, where shared pages count once."""
        rollups = (Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in self._pids())
        return sum(int(text.split("Pss:")[1].split()[0]) for text in rollups) / 1024

    def _pids(self):
        found = [self.pid]
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            # Threads that answer a scrape come and go.
            with suppress(OSError):
                found += map(int, (task / "children").read_text().split())
        return found


def samples(text, *names):
    """The series of some metrics and their numbers, the series as they are written."""
    starts = tuple(f"{name}{end}" for name in names for end in " {")
    found = (line.rpartition(" ") for line in text.splitlines() if line.startswith(starts))
    return {series: float(number) for series, _, number in found}


@contextmanager
def agent(node, *arguments, environ=None, context=None, token=None):
    """Run 'srcip serve' until it is ready, with its own drain interval; a context is for HTTPS."""
    command = [sys.executable, "-m", "tracer.cli", "serve", "--port", "0"]
    # Told the mode, it asks no kube-proxy: that would be a connection of its own.
    command += ["--proxy-mode", "nftables", "--netns", f"{node.box.names['node']}=node1"]
    command += map(str, arguments)
    process = subprocess.Popen(
        command,
        cwd=package_root(),
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environ or {})},
    )
    # Later output must not fill the pipe.
    reader = threading.Thread(target=process.stderr.read)
    try:
        for line in process.stderr:
            if line.startswith("serving on "):
                break
        reader.start()
        port = int(line.split("127.0.0.1:")[1].split("/")[0])
        served = Served(process.pid, port, context, token)
        wait_until(lambda: served.value("srcip_ready") == 1)
        yield served
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
        reader.join()
        process.stderr.close()


def objects():
    """Yield a node, and Services with a NodePort and an endpoint each."""
    yield {
        "kind": "Node",
        "apiVersion": "v1",
        "metadata": {"name": "node1"},
        "spec": {"podCIDR": "10.9.0.0/24", "podCIDRs": ["10.9.0.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": NODE[4]}]},
    }
    for i in range(SERVICES):
        yield service(i)
        yield endpoint_slice(i)


def service(i, policy="Cluster"):
    """One of the Services, with UDP and TCP at the same NodePort."""
    return {
        "kind": "Service",
        "apiVersion": "v1",
        "metadata": {"name": f"service-{i}", "namespace": "default"},
        "spec": {
            "type": "NodePort",
            "externalTrafficPolicy": policy,
            "clusterIP": f"10.96.{i // 250}.{i % 250 + 1}",
            "clusterIPs": [f"10.96.{i // 250}.{i % 250 + 1}"],
            "ipFamilies": ["IPv4"],
            "ports": [
                {"name": each, "port": 80, "protocol": each, "nodePort": FIRST_PORT + i}
                for each in PROTOCOLS
            ],
        },
    }


def endpoint_slice(i):
    """Where a Service leads to."""
    return {
        "kind": "EndpointSlice",
        "apiVersion": "discovery.k8s.io/v1",
        "addressType": "IPv4",
        "metadata": {
            "name": f"service-{i}",
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": f"service-{i}"},
        },
        "endpoints": [{"addresses": [SERVER[4]], "conditions": {"ready": True}}],
        "ports": [{"name": each, "port": FIRST_PORT + i, "protocol": each} for each in PROTOCOLS],
    }
