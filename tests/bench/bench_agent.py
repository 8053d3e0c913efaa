"""What 'srcip serve' costs: CPU by rate of new connections, memory, scrapes."""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from contextlib import ExitStack, closing, contextmanager
from itertools import product
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from exporters.page_server import PageServer
from exporters.prometheus import ConnectionLabels, Page, Snapshot
from tests.bench import node as nodes
from tests.kernel.box import NODE, SERVER, package_root, udp_datagram, wait_until

SECONDS, RATES = 15, (0, 1_000, 20_000)
SERVICES, FIRST_PORT, PATHS_RATE = 1_000, 31_000, 5_000
SERIES = 5_000
RULES = f"""
table ip bench {{
  chain pre {{ type nat hook prerouting priority -100
    udp dport {FIRST_PORT}-{FIRST_PORT + SERVICES - 1} meta mark set 0x4000 dnat to {SERVER[4]} }}
  chain post {{ type nat hook postrouting priority 100
    meta mark & 0x4000 == 0x4000 meta mark set 0 masquerade }}
}}"""


def main():
    """Run everything and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seconds", type=int, default=SECONDS)
    seconds = arguments.parse_args().seconds
    print(f"Linux {os.uname().release}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}\n")
    scrape()
    with tempfile.TemporaryDirectory() as directory, nodes.built(directory) as node:
        objects = Path(directory) / "objects.json"
        objects.write_text(json.dumps({"kind": "List", "items": list(services())}))
        print(f"`srcip serve`, {SERVICES} Services in the cluster, UDP through a NodePort:\n")
        print("| new connections/s | paths | CPU, % of a core | resident, MiB | counted - made |")
        print("|---:|---:|---:|---:|---:|")
        with agent(node, objects) as served:
            for rate in RATES:
                row(served, 1, lambda rate=rate: one_path(node, rate, seconds), seconds)
        node.box.rules(RULES)
        with agent(node, objects) as served:
            row(served, SERVICES, lambda: many_paths(node, seconds), seconds)
        restart(node, objects)


def row(served, paths, traffic, seconds):
    """Print what one kind of traffic costs."""
    made_before, cpu_before, start = served.total(), served.cpu_s(), time.monotonic()
    made = traffic()
    time.sleep(max(0.0, start + seconds - time.monotonic()))
    took_s, cpu_s = time.monotonic() - start, served.cpu_s() - cpu_before
    served.drained()
    print(
        f"| {made / took_s:,.0f} | {paths if made else 0} | {100 * cpu_s / took_s:.2f} "
        f"| {served.resident_mib():.1f} | {served.total() - made_before - made} |",
        flush=True,
    )


def restart(node, objects):
    """How long a node is without an agent that was killed: from kill -9 until the next is ready."""
    took = []
    with ExitStack() as stack:
        served = stack.enter_context(agent(node, objects))
        for _ in range(5):
            start = time.monotonic()
            os.kill(served.pid, signal.SIGKILL)
            served = stack.enter_context(agent(node, objects, port=served.port))
            took.append(time.monotonic() - start)
    print(
        f"\nFrom kill -9 to ready again, same port: {statistics.median(took):.2f} s, the median of"
    )
    print(f"{len(took)}; the longest took {max(took):.2f} s.")


def one_path(node, rate, seconds):
    """Send so many new flows each second."""
    end, made = time.monotonic() + seconds, 0
    while rate and time.monotonic() < end:
        start = time.monotonic()
        node.new_ns(rate)
        made += rate
        time.sleep(max(0.0, start + 1 - time.monotonic()))
    return made


def many_paths(node, seconds):
    """Send new flows to each Service in turn."""
    end, made = time.monotonic() + seconds, 0
    with node.box.socket("client", 4, 3, 17) as sent:
        while time.monotonic() < end:
            start = time.monotonic()
            node.box.run("node", "conntrack", "-F")
            for i in range(PATHS_RATE):
                port = FIRST_PORT + i % SERVICES
                sent.sendto(udp_datagram(1024 + i, port), (NODE[4], 0))
            made += PATHS_RATE
            time.sleep(max(0.0, start + 1 - time.monotonic()))
    return made


class Served:
    """A running agent."""

    def __init__(self, pid, port):
        self.pid = pid
        self.port = port

    def values(self, name):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as answer:
            text = answer.read().decode()
        families = text_string_to_metric_families(text)
        return [s.value for family in families for s in family.samples if s.name == name]

    def total(self):
        return int(sum(self.values("srcip_connections_total")))

    def drained(self):
        now_s = time.time()
        wait_until(lambda: self.values("srcip_drain_timestamp_seconds")[0] > now_s)

    def cpu_s(self):
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    def resident_mib(self):
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024


@contextmanager
def agent(node, objects, port=0):
    """Run 'srcip serve' with its own drain interval."""
    where = ["--netns", f"{node.box.names['node']}=node1", "--cluster", str(objects)]
    command = [sys.executable, "-m", "tracer.cli", "serve", *where, "--port", str(port)]
    command.append("--no-stream")
    process = subprocess.Popen(command, cwd=package_root(), stderr=subprocess.PIPE, text=True)
    try:
        port = int(process.stderr.readline().split("127.0.0.1:")[1].split("/")[0])
        threading.Thread(target=process.stderr.read, daemon=True).start()
        served = Served(process.pid, port)
        wait_until(lambda: served.values("srcip_ready") == [1.0])
        yield served
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def services():
    """Yield a node and Services with a NodePort each."""
    yield {
        "kind": "Node",
        "apiVersion": "v1",
        "metadata": {"name": "node1"},
        "spec": {"podCIDR": "10.9.0.0/24", "podCIDRs": ["10.9.0.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": NODE[4]}]},
    }
    for i in range(SERVICES):
        yield {
            "kind": "Service",
            "apiVersion": "v1",
            "metadata": {"name": f"service-{i}", "namespace": "default"},
            "spec": {
                "type": "NodePort",
                "externalTrafficPolicy": "Cluster",
                "clusterIP": f"10.96.{i // 250}.{i % 250 + 1}",
                "clusterIPs": [f"10.96.{i // 250}.{i % 250 + 1}"],
                "ipFamilies": ["IPv4"],
                "ports": [{"port": 80, "protocol": "UDP", "nodePort": FIRST_PORT + i}],
            },
        }
        yield {
            "kind": "EndpointSlice",
            "apiVersion": "discovery.k8s.io/v1",
            "addressType": "IPv4",
            "metadata": {
                "name": f"service-{i}",
                "namespace": "default",
                "labels": {"kubernetes.io/service-name": f"service-{i}"},
            },
            "endpoints": [{"addresses": [SERVER[4]], "conditions": {"ready": True}}],
            "ports": [{"name": "", "port": 80, "protocol": "UDP"}],
        }


def scrape():
    """Scrapes of many series, the first of a snapshot and those after it."""
    labels = product(range(SERIES // 5), ("tcp", "udp", "sctp", "icmp", "icmpv6"))
    connections = Counter(
        {
            ConnectionLabels(
                *("default", f"service-{i}", "nodeport", "Cluster", "replaced"),
                *("external-traffic-policy-cluster", "external", "ipv4", proto),
            ): i
            for i, proto in labels
        }
    )
    page = Page("bench")
    server = PageServer(page, "127.0.0.1", 0)
    server.start()
    first, later = [], []
    with closing(server):
        for _ in range(10):
            page.snapshot = Snapshot(version="bench", connections=connections)
            for samples in (first, later):
                start = time.perf_counter()
                with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
                    size = len(answer.read())
                samples.append(time.perf_counter() - start)
    print(f"A scrape of {SERIES} series ({size / 1e6:.1f} MB):\n\n| | ms |\n|---|---:|")
    print(f"| the first of a snapshot | {1e3 * statistics.median(first):.1f} |")
    print(f"| another of the same | {1e3 * statistics.median(later):.1f} |\n")


if __name__ == "__main__":
    main()
