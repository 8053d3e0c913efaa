"""make soak: a million connections while Services change and clients watch. None is lost."""

import argparse
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from tests.bench import node as nodes
from tests.bench.served import (
    FIRST_PORT,
    RULES,
    SERVICES,
    SILENCE,
    agent,
    endpoint_slice,
    objects,
    service,
)
from tests.kernel.box import NODE, package_root, wait_until
from tests.unit.apiserver import running

CONNECTIONS, SECONDS = 1_000_000, 150
# Conntrack's table is emptied between two rounds.
ROUND, TCP_SHARE = 40_000, 100
CHANGE_S, SCRAPE_S = 0.02, 1.0
# Sees each new UDP flow once: the backends do not answer, and nobody sends again.
COUNTER = """
table ip oracle {
  counter new_udp { }
  chain post { type filter hook postrouting priority 300
    meta l4proto udp ct state new counter name new_udp }
}"""


@dataclass(slots=True, kw_only=True)
class Seen:
    """What the kernel has seen, what the agent has counted, and what went on meanwhile."""

    udp_made: int = 0
    tcp_made: int = 0
    udp_counted: int = 0
    tcp_counted: int = 0
    other_counted: int = 0
    lost: int = 0
    rounds: int = 0
    seconds: float = 0.0
    changes: int = 0
    scrapes: int = 0
    backwards: list[str] = field(default_factory=list)
    streams: list[dict] = field(default_factory=list)

    @property
    def made(self):
        return self.udp_made + self.tcp_made

    @property
    def missing(self):
        counted = self.udp_counted + self.tcp_counted + self.other_counted
        return self.made - counted - self.lost


def soak(node, directory, connections, seconds):
    """Make so many connections within about so many seconds; return what was seen."""
    seen = Seen()
    node.box.rules(RULES + COUNTER)
    node.box.rules(SILENCE, "server")
    with ExitStack() as stack:
        api = stack.enter_context(running())
        for item in objects():
            api.put(item)
        kubeconfig = api.kubeconfig(directory / "config")
        path = directory / "agent.sock"
        options = ("--kubeconfig", kubeconfig, "--stream-socket", path, "--drain-interval", 1)
        served = stack.enter_context(agent(node, *options))
        with streams(path, seen), beside(change, api, seen), beside(scrape, served, seen):
            traffic(node, connections, seconds, seen)
        # Two: a path without a sample yet waits for the second.
        for _ in range(2):
            served.drained()
        account(node, served, seen)
    return seen


def traffic(node, connections, seconds, seen):
    """Make the connections, in rounds that conntrack's table has room for."""
    began_s = time.monotonic()
    rounds = -(-connections // ROUND)
    share = -(-connections // rounds)
    with node.box.socket("server", 4, socket.SOCK_STREAM) as listener:
        listener.bind(("", FIRST_PORT))
        listener.listen(1024)
        threading.Thread(target=accept, args=(listener, seen), daemon=True).start()
        tcp_share = share // TCP_SHARE
        for number in range(1, rounds + 1):
            # Nothing is in flight: a packet after its entry has gone would be new again.
            node.flush()
            tcp = threading.Thread(target=connect, args=(node, tcp_share))
            tcp.start()
            node.send_new(share - tcp_share, FIRST_PORT, SERVICES)
            tcp.join()
            wait_until(lambda made=number * tcp_share: seen.tcp_made == made)
            node.settled_entries()
            time.sleep(max(0.0, began_s + seconds * number / rounds - time.monotonic()))
    seen.rounds, seen.seconds = rounds, time.monotonic() - began_s


def connect(node, connections):
    """Make TCP connections, and end each with a reset, which leaves nothing under way."""
    for _ in range(connections):
        with node.box.socket("client", 4, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.connect((NODE[4], FIRST_PORT))


def accept(listener, seen):
    """Take connections until the socket is closed, and count them."""
    while True:
        try:
            listener.accept()[0].close()
            seen.tcp_made += 1
        except TimeoutError:
            continue
        except OSError:
            return


@contextmanager
def beside(work, *arguments):
    """Do something again and again while the block runs."""
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(*arguments, stop))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def change(api, seen, stop):
    """Let Services come, go and change their policy."""
    for number in count():
        i = number * 7 % SERVICES
        match number % 3:
            case 0:
                api.put(service(i, "Local" if number % 2 else "Cluster"))
            case 1:
                api.delete(endpoint_slice(i))
                api.delete(service(i))
            case 2:
                for each in (number - 1) * 7 % SERVICES, i:
                    api.put(service(each))
                    api.put(endpoint_slice(each))
        seen.changes += 1
        if stop.wait(CHANGE_S):
            return


def scrape(served, seen, stop):
    """Be Prometheus, and note what goes backwards."""
    before = {}
    while not stop.wait(SCRAPE_S):
        told = served.samples("srcip_connections_total")
        seen.backwards += [series for series in before if told.get(series, 0) < before[series]]
        before = told
        seen.scrapes += 1


@contextmanager
def streams(path, seen):
    """Two clients of the live stream: one for everything, one for TCP."""
    with ExitStack() as stack:
        listeners = [
            stack.enter_context(listening(path, *options))
            for options in ((), ("--filter-proto", "tcp"))
        ]
        yield
        for process, output in listeners:
            process.send_signal(signal.SIGINT)
            process.wait()
            output.seek(0)
            seen.streams.append(json.loads(output.readlines()[-1]))


@contextmanager
def listening(path, *options):
    command = [sys.executable, "-m", "tracer.cli", "trace", "--agent", str(path), "-o", "json"]
    with (
        tempfile.TemporaryFile("w+") as output,
        subprocess.Popen(
            [*command, *options],
            cwd=package_root(), stdout=output, stderr=subprocess.PIPE, text=True,
        ) as process,
    ):  # fmt: skip
        try:
            line = process.stderr.readline()
            assert "through its agent" in line, line
            yield process, output
        finally:
            process.kill()


def account(node, served, seen):
    """Ask both sides."""
    printed = node.box.run("node", "nft", "list", "counter", "ip", "oracle", "new_udp")
    seen.udp_made = int(re.search(r"packets (\d+)", printed)[1])
    counted = Counter()
    for series, number in served.samples("srcip_connections_total").items():
        counted[re.search(r'proto="(\w+)"', series)[1]] += int(number)
    seen.udp_counted, seen.tcp_counted = counted["udp"], counted["tcp"]
    seen.other_counted = counted.total() - seen.udp_counted - seen.tcp_counted
    # What does not fit into the map counts twice: here, and as 'other' among the connections.
    lost = served.samples("srcip_lost_records_total")
    seen.lost = int(lost['srcip_lost_records_total{reason="unreadable",stage="connections"}'])


def main():
    """Run it and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--connections", type=int, default=CONNECTIONS)
    arguments.add_argument("--seconds", type=int, default=SECONDS)
    chosen = arguments.parse_args()
    print(f"Linux {os.uname().release}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}\n")
    with tempfile.TemporaryDirectory() as directory, nodes.built(directory) as node:
        # The user that the agent becomes must reach its socket.
        Path(directory).chmod(0o755)
        seen = soak(node, Path(directory), chosen.connections, chosen.seconds)
    rows = {
        "made: UDP, by an nftables counter at `ct state new`": seen.udp_made,
        "made: TCP, accepted by the backend's socket": seen.tcp_made,
        "made": seen.made,
        "counted by `srcip serve`: UDP": seen.udp_counted,
        "counted: TCP": seen.tcp_counted,
        "counted: `other`": seen.other_counted,
        "counted as lost": seen.lost,
        "made - counted - counted as lost": seen.missing,
        "series that went backwards": len(seen.backwards),
    }
    print("| | |\n|---|---:|")
    for what, number in rows.items():
        print(f"| {what} | {number:,} |")
    print(
        f"\nIn {seen.seconds:.0f} s, {seen.rounds} rounds; meanwhile {seen.changes:,} changes of "
    )
    print(f"{SERVICES:,} Services, {seen.scrapes} scrapes, and two who listened to the stream:")
    for told in seen.streams:
        print(f"{told['connections']:,} connections shown, lost: {told['lost']}.")
    sys.exit(seen.missing != 0 or bool(seen.backwards))


if __name__ == "__main__":
    main()
