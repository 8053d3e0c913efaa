"""What the live stream costs the agent: by rate and clients, over the Unix socket and over TLS."""

import argparse
import json
import os
import ssl
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.bench import node as nodes
from tests.bench.bench_agent import flows
from tests.bench.served import RULES, SILENCE, agent, objects
from tests.unit.apiserver import running
from tests.unit.test_page_server import Issued
from tracer.filter import Filter
from tracer.model import UDP
from tracer.pipeline import Wanted
from tracer.stream.client import AgentStream
from tracer.stream.upgrade import HttpsAgent

SECONDS, PATHS = 20, 10
# Connections a second, and clients.
LOADS = ((1_000, 1), (1_000, 10), (200, 100))
# Accepts are of the whole machine.
WANTED = Wanted(flows=Filter(proto=UDP))
TOKEN = "anybody"  # noqa: S105 - it opens nothing


def main():
    """Run everything and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seconds", type=int, default=SECONDS, help="of each load")
    seconds = arguments.parse_args().seconds
    print(f"Linux {os.uname().release}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}\n")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # The agent reads the certificate as nobody (65534), too.
        directory.chmod(0o755)
        node = stack.enter_context(nodes.built(directory))
        node.box.rules(RULES)
        node.box.rules(SILENCE, "server")
        with streaming(node, directory) as (served, ways):
            print(
                "| new connections/s | clients | way | CPU, % of a core | us for each line |",
                end="",
            )
            print(" resident, MiB | lines | lost |\n|---:|---:|---|---:|---:|---:|---:|---:|")
            for rate, clients in LOADS:
                row(served, node, rate, 0, "nobody listens", None, seconds)
                for name, where in ways.items():
                    row(served, node, rate, clients, name, where, seconds)


@contextmanager
def streaming(node, directory):
    """An agent on both ways, and where they are."""
    issued = Issued(directory)
    ca_file = directory / "ca.crt"
    ca_file.write_bytes(issued.authority.cert_pem.bytes())
    cluster, path = directory / "objects.json", directory / "agent.sock"
    cluster.write_text(json.dumps({"kind": "List", "items": list(objects())}))
    with running() as api:
        api.users[TOKEN] = {"username": TOKEN}
        api.allowed |= {(TOKEN, "get", "/metrics"), (TOKEN, "get", "/stream")}
        options = ("--cluster", cluster, "--tls-cert", issued.cert, "--tls-key", issued.key)
        options += ("--authorize", "kubernetes", "--stream-https", "--stream-socket", path)
        environ = {"KUBECONFIG": str(api.kubeconfig(directory / "kubeconfig"))}
        context = ssl.create_default_context(cafile=ca_file)
        with agent(node, *options, environ=environ, context=context, token=TOKEN) as served:
            https = HttpsAgent(host="127.0.0.1", port=served.port, token=TOKEN, ca_file=ca_file)
            yield served, {"Unix": path, "TLS": https}


def row(served, node, rate, count, name, where, seconds):
    """Print what one load costs."""
    with ExitStack() as stack:
        clients = [stack.enter_context(AgentStream(where, WANTED)) for _ in range(count)]
        for client in clients:
            client.wait(30)
        taken = [[] for _ in clients]
        threads = [
            threading.Thread(target=take, args=each) for each in zip(clients, taken, strict=True)
        ]
        for thread in threads:
            thread.start()
        cpu_before, began_s = served.cpu_s(), time.monotonic()
        made = flows(node, rate, PATHS, seconds)
        took_s, cpu_s = time.monotonic() - began_s, served.cpu_s() - cpu_before
        resident_mib = served.resident_mib()
        for client in clients:
            client.hang_up()
        for thread in threads:
            thread.join()
    lines = sum(map(sum, taken))
    why = Counter()
    for client in clients:
        why.update(client.summary().lost)
    each_us = f"{1e6 * cpu_s / lines:.0f}" if lines else ""
    print(
        f"| {made / took_s:,.0f} | {count} | {name} | {100 * cpu_s / took_s:.1f} | {each_us} "
        f"| {resident_mib:.1f} | {lines:,} | {_told(+why)} |",
        flush=True,
    )


def _told(lost):
    return ", ".join(f"{n:,} {reason}" for reason, n in lost.items()) or "0"


def take(client, taken):
    """Read all lines, and only count them: what a client does with them is not the agent's."""
    while (lines := client.read(1)) is not None:
        taken.append(len(lines))


if __name__ == "__main__":
    main()
