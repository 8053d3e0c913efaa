"""What 'srcip serve' costs: scrapes, start, CPU by rate of new connections, memory, traffic."""

import argparse
import json
import os
import signal
import statistics
import tempfile
import time
import urllib.request
from collections import Counter
from contextlib import ExitStack, closing
from itertools import product
from pathlib import Path

from exporters.page_server import PageServer
from exporters.prometheus import ConnectionLabels, Page, Snapshot
from tests.bench import node as nodes
from tests.bench.__main__ import empty_program, no_tracer
from tests.bench.served import FIRST_PORT, RULES, SERVICES, SILENCE, agent, objects

SECONDS, TURNS, ROUNDS = 20, 10, 10
RATES, PATHS, MANY_PATHS_RATE = (0, 1_000, 10_000, 50_000), 10, 10_000
SCRAPE_MS, START_S = 50, 2
SERIES, STARTS, FLOWS, CONNECTIONS = 5_000, 5, 5_000, 2_000
# Where the agent's programs are called for what is forwarded: before SNAT, and last.
PLACES = (98, 2**31 - 8)
KINDS = {
    "UDP, one datagram each": lambda node: node.new_cpu_ns(FLOWS),
    "TCP, connected and reset": lambda node: node.connect_cpu_ns(CONNECTIONS),
}


def main():
    """Run everything and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seconds", type=int, default=SECONDS, help="of each kind of traffic")
    arguments.add_argument(
        "--turns", type=int, default=TURNS, help="with and without the agent, twice"
    )
    chosen = arguments.parse_args()
    print(f"Linux {os.uname().release}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}\n")
    scrape()
    with (
        tempfile.TemporaryDirectory() as directory,
        nodes.built(directory) as node,
        nodes.built(directory) as other,
    ):
        cluster = Path(directory) / "objects.json"
        cluster.write_text(json.dumps({"kind": "List", "items": list(objects())}))
        options = ("--cluster", cluster, "--no-stream")
        node.box.rules(RULES)
        node.box.rules(SILENCE, "server")
        start(node, options)
        cost(node, options, chosen.seconds)
        traffic(node, other, options, chosen.turns)


def start(node, options):
    """How long a node is without an agent that was killed: from kill -9 until the next is ready."""
    samples = []
    with ExitStack() as stack:
        served = stack.enter_context(agent(node, *options))
        for _ in range(STARTS):
            began_s = time.monotonic()
            os.kill(served.pid, signal.SIGKILL)
            served = stack.enter_context(agent(node, *options, "--port", served.port))
            samples.append(time.monotonic() - began_s)
    print(f"| `srcip serve`, {SERVICES:,} Services, {STARTS} starts | s | target |\n|---|---:|---|")
    rows = {
        "from kill -9 to ready again, on the same port": median(samples),
        "the slowest of them": max(samples),
    }
    for what, took_s in rows.items():
        print(f"| {what} | {took_s:.2f} | {at_most(START_S, took_s)} |")
    print()


def cost(node, options, seconds):
    """CPU and memory under traffic of several kinds."""
    print(f"`srcip serve`, {SERVICES:,} Services in the cluster, UDP through NodePorts:\n")
    print(
        "| new connections/s | paths | CPU, % of a core | resident, MiB | with its child | lost |"
    )
    print("|---:|---:|---:|---:|---:|---:|")
    with agent(node, *options) as served:
        for rate in RATES:
            row(served, node, rate, PATHS, seconds)
        row(served, node, MANY_PATHS_RATE, SERVICES, seconds, note=", the first time")
        row(served, node, MANY_PATHS_RATE, SERVICES, seconds)
    print()


def row(served, node, rate, paths, seconds, note=""):
    """Print what one kind of traffic costs."""
    # A drain before and one after: in between are as many as fit into that time.
    served.drained()
    made_before, cpu_before, began_s = served.total(), served.cpu_s(), time.monotonic()
    made = flows(node, rate, paths, seconds)
    took_s, cpu_s = time.monotonic() - began_s, served.cpu_s() - cpu_before
    served.drained()
    print(
        f"| {made / took_s:,.0f} | {paths if made else 0:,}{note} | {100 * cpu_s / took_s:.2f} "
        f"| {served.resident_mib():.1f} | {served.proportional_mib():.1f} "
        f"| {made_before + made - served.total()} |",
        flush=True,
    )


def flows(node, rate, paths, seconds):
    """Make so many new flows each second; return how many conntrack has seen."""
    end, made = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        began_s = time.monotonic()
        if rate:
            node.new_ns(rate, FIRST_PORT, paths)
            made += node.settled_entries()
        time.sleep(max(0.0, began_s + 1 - time.monotonic()))
    return made


def traffic(node, other, options, turns):
    """
    New connections through a node with the agent and through one without, in turn.

    The measurements are short, so that other work on the machine hits both alike; the two nodes
    change places, since no two are alike, and the agent starts anew for each turn, since no two
    starts are. The same without any agent says how far to trust it, and with programs that only
    return how much of it is their being called.
    """
    for each in (node, other):
        # A backend that takes what comes, as far as its buffer goes.
        each.box.rules("", "server")
        each.box.rules(nodes.RULES)
    setups = {
        "`srcip serve`": lambda watched: agent(watched, *options),
        "two programs that only return": lambda watched: empty_program(watched, PLACES),
        "nothing": lambda _: no_tracer(),
    }
    samples = {beside: {kind: [] for kind in KINDS} for beside in setups}
    places = ((node, other), (other, node)) * turns
    for (one, two), (beside, setup) in product(places, setups.items()):
        with setup(two):
            pairs(one, two, samples[beside])
    print(
        "| new connections through a NodePort | beside | without, ns of CPU each | with | ratio "
        "| half of the pairs |\n|---|---|---:|---:|---:|---:|"
    )
    for kind, (beside, found) in product(KINDS, samples.items()):
        without, along = map(median, zip(*found[kind], strict=True))
        ratios = [one / two for one, two in found[kind]]
        quarter, ratio, last = statistics.quantiles(ratios, n=4)
        print(
            f"| {kind} | {beside} | {without:.0f} | {along:.0f} | {ratio:.3f} "
            f"| {quarter:.3f} to {last:.3f} |"
        )
    print(f"\nThe ratio is the median of {len(places) * ROUNDS} pairs. Target: at least 0.97.\n")


def pairs(one, two, samples):
    """Measure two nodes in turn, and now the one, now the other first."""
    for measure, each in product(KINDS.values(), (one, two)):
        measure(each)
    for i, (kind, measure) in product(range(ROUNDS), KINDS.items()):
        if i % 2:
            second, first = measure(two), measure(one)
        else:
            first, second = measure(one), measure(two)
        samples[kind].append((first, second))


def scrape():
    """Scrapes of many series: of all new ones, of a new snapshot, and another of the same."""
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
    samples = {"all series new": [], "the first of a snapshot": [], "another of the same": []}
    for _ in range(5):
        page = Page("bench")
        server = PageServer(page, "127.0.0.1", 0)
        server.start()
        with closing(server):
            for kind, found in samples.items():
                if not kind.startswith("another"):
                    page.snapshot = Snapshot(version="bench", connections=connections)
                began_s = time.perf_counter()
                with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
                    size = len(answer.read())
                found.append(time.perf_counter() - began_s)
    print(f"| a scrape of {SERIES:,} series, {size / 1e6:.1f} MB | ms | target |\n|---|---:|---|")
    for kind, found in samples.items():
        took_ms = 1e3 * median(found)
        print(f"| {kind} | {took_ms:.1f} | {at_most(SCRAPE_MS, took_ms)} |")
    print()


def at_most(target, measured):
    """A target, and whether it was reached."""
    return f"{target}: {'reached' if measured <= target else 'missed'}"


def median(values):
    return statistics.median(values)


if __name__ == "__main__":
    main()
