"""What judging costs: one connection, in a small cluster and in a large one."""

import statistics
import time
from ipaddress import ip_address

from lab import hosts
from lab.kube_proxy import DATA
from tests.bench import bench_cluster
from tracer.cluster import snapshot
from tracer.cluster.parse import parse
from tracer.judge.connection import judge_connection
from tracer.judge.view import View
from tracer.model import TCP, Connection, FiveTuple, Hook, Status
from tracer.ruleset.iptables import parse_save
from tracer.ruleset.model import Ruleset

ROUNDS, EACH = 7, 5000
CLIENT, NODE, POD = map(ip_address, ("198.51.100.10", "10.240.0.5", "10.244.1.11"))


def connection(seen):
    """A connection to a NodePort, answered to one address or the other."""
    is_snat = seen != CLIENT
    return Connection(
        ktime_ns=1,
        netns=1,
        hook=Hook.NF_POSTROUTING,
        orig=FiveTuple(src=CLIENT, dst=NODE, sport=40000, dport=30080, proto=TCP),
        reply=FiveTuple(src=POD, dst=seen, sport=8080, dport=40000, proto=TCP),
        status=Status.DST_NAT | (Status.SRC_NAT if is_snat else 0),
        zone=0,
        mark=0x4000 if is_snat else 0,
        ct_mark=0,
        iif=2,
        oif=2,
        is_related=False,
    )


def views():
    """The lab's cluster, and one of 5,000 nodes; both with the recorded rules of a node."""
    text = (DATA / "iptables" / "node2.iptables").read_text()
    rules = Ruleset.of([parse_save(text, "ipv4")])
    node = hosts.NODES["node2"]
    addresses = frozenset({node.address.ipv4, node.gateway.ipv4})
    common = {"node": "node2", "rules": rules, "addresses": addresses, "interfaces": {2: "eth0"}}
    small = snapshot.load(DATA / "objects.json")
    yield "2 nodes, 13 Services", View(cluster=small, **common)
    large = small.changed(put=filter(None, map(parse, bench_cluster.everything())))
    yield (
        f"{large.counts.nodes:,} nodes, {large.counts.services:,} Services",
        View(cluster=large, **common),
    )


def main():
    """Print a table."""
    print("One connection judged, with evidence and advice:\n")
    print("| cluster | preserved, us | replaced, us |\n|---|---:|---:|")
    for name, view in views():
        cells = [f"{microseconds(connection(seen), view):.1f}" for seen in (CLIENT, NODE)]
        print(f"| {name} | {' | '.join(cells)} |")
    print()


def microseconds(judged, view):
    """The median time of one judgement."""
    samples = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(EACH):
            judge_connection(judged, view, time_ns=0)
        samples.append((time.perf_counter() - start) / EACH * 1e6)
    return statistics.median(samples)


if __name__ == "__main__":
    main()
