"""How the cluster index scales: 5,000 nodes, 10,000 Services, 150,000 endpoints."""

import argparse
import gc
import random
import resource
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from ipaddress import IPv4Address

from tracer.cluster.claims import socket
from tracer.cluster.index import Cluster
from tracer.cluster.objects import EndpointSlice
from tracer.cluster.parse import parse
from tracer.cluster.table import Table, TableEditor
from tracer.model import TCP

NODES, SERVICES, ENDPOINTS = 5_000, 10_000, 150_000
PER_SLICE = 100
NODE_BASE, POD_BASE = int(IPv4Address("10.128.0.0")), int(IPv4Address("11.0.0.0"))
CLUSTER_BASE = int(IPv4Address("172.16.0.0"))

Json = dict[str, object]


def node(index: int) -> Json:
    """Return a Node with a /24 for its pods."""
    cidr = f"{IPv4Address(POD_BASE + index * 256)}/24"
    address = str(IPv4Address(NODE_BASE + index))
    return {
        "kind": "Node",
        "apiVersion": "v1",
        "metadata": {"name": f"node-{index}"},
        "spec": {"podCIDR": cidr, "podCIDRs": [cidr]},
        "status": {"addresses": [{"type": "InternalIP", "address": address}]},
    }


def service(index: int) -> Json:
    """Return a NodePort Service for a quarter of them, else a ClusterIP one."""
    port: Json = {"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}
    is_node_port = index % 4 == 0
    if is_node_port:
        port["nodePort"] = 20000 + index
    address = str(IPv4Address(CLUSTER_BASE + index))
    return {
        "kind": "Service",
        "apiVersion": "v1",
        "metadata": {"namespace": f"ns-{index % 100}", "name": f"service-{index}"},
        "spec": {
            "type": "NodePort" if is_node_port else "ClusterIP",
            "clusterIP": address,
            "clusterIPs": [address],
            "ports": [port],
        },
    }


def endpoint(number: int) -> Json:
    """Return a ready endpoint on one of the nodes."""
    on, host = number % NODES, 2 + number // NODES
    return {
        "addresses": [str(IPv4Address(POD_BASE + on * 256 + host))],
        "conditions": {"ready": True, "serving": True, "terminating": False},
        "nodeName": f"node-{on}",
        "targetRef": {"kind": "Pod", "namespace": f"ns-{number % 100}", "name": f"pod-{number}"},
    }


def slices() -> Iterator[Json]:
    """Yield EndpointSlices: a tenth of the Services has slices of 100, the others the rest."""
    big = SERVICES // 10
    sizes = [100] * big + [(ENDPOINTS - 100 * big) // (SERVICES - big)] * (SERVICES - big)
    sizes[-1] += ENDPOINTS - sum(sizes)
    number = 0
    for index, size in enumerate(sizes):
        for part, start in enumerate(range(0, size, PER_SLICE)):
            count = min(PER_SLICE, size - start)
            yield {
                "kind": "EndpointSlice",
                "apiVersion": "discovery.k8s.io/v1",
                "metadata": {
                    "namespace": f"ns-{index % 100}",
                    "name": f"service-{index}-{part}",
                    "labels": {"kubernetes.io/service-name": f"service-{index}"},
                },
                "addressType": "IPv4",
                "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
                "endpoints": [endpoint(number + item) for item in range(count)],
            }
            number += count


def everything() -> Iterator[Json]:
    """Yield all objects, made one by one so that only the index costs memory."""
    yield from map(node, range(NODES))
    yield from map(service, range(SERVICES))
    yield from slices()


def peak_mib() -> float:
    """Return the most memory this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def build() -> tuple[Cluster, float, float]:
    """Return the index, the seconds for parsing and indexing, and the peak's growth in MiB."""
    before = peak_mib()
    spent = 0.0

    def parsed() -> Iterator[object]:
        nonlocal spent
        for obj in everything():
            began = time.perf_counter()
            found = parse(obj)
            spent += time.perf_counter() - began
            yield found

    gc.collect()
    objects = [found for found in parsed() if found is not None]
    began = time.perf_counter()
    cluster = Cluster.build(objects)  # type: ignore[arg-type]
    return cluster, spent + time.perf_counter() - began, peak_mib() - before


def updates(cluster: Cluster, rounds: int) -> list[float]:
    """Return milliseconds for turning one endpoint of a slice of 100 unready."""
    times = []
    for index in range(rounds):
        found = cluster.endpoint_slices((f"ns-{index % 100}", f"service-{index % 1000}"))[0]
        first, *others = found.endpoints
        turned: EndpointSlice = replace(
            found, endpoints=(replace(first, is_ready=not first.is_ready), *others)
        )
        began = time.perf_counter()
        cluster = cluster.changed(put=[turned])
        times.append((time.perf_counter() - began) * 1e3)
    return times


def each_us(ask: Callable[[int], object], rounds: int) -> float:
    """Return the microseconds of one look-up, with addresses that change."""
    began = time.perf_counter()
    for index in range(rounds):
        if ask(index) is None:
            raise SystemExit("a look-up found nothing")
    return (time.perf_counter() - began) / rounds * 1e6


def lookups(cluster: Cluster, rounds: int) -> dict[str, float]:
    """Return the microseconds of each kind of look-up."""
    rng = random.Random(1)
    pick = [rng.randrange(SERVICES // 4) * 4 for _ in range(rounds)]
    vips = [IPv4Address(CLUSTER_BASE + index) for index in pick]
    nodes = [IPv4Address(NODE_BASE + index % NODES) for index in pick]
    pods = [IPv4Address(POD_BASE + index % NODES * 256 + 2) for index in pick]
    return {
        "service_at, ClusterIP": each_us(lambda i: cluster.service_at(vips[i], 80, TCP), rounds),
        "service_at, NodePort": each_us(
            lambda i: cluster.service_at(nodes[i], 20000 + pick[i], TCP), rounds
        ),
        "services_of_endpoint": each_us(
            lambda i: cluster.services_of_endpoint(pods[i], 8080, TCP), rounds
        ),
        "pod_at": each_us(lambda i: cluster.pod_at(pods[i]), rounds),
        "classify, pod": each_us(lambda i: cluster.classify(pods[i]), rounds),
    }


def bench_index(rounds: int) -> None:
    """Print what the index costs, and what it may."""
    cluster, seconds, mib = build()
    times = updates(cluster, 2_000)
    print(f"{cluster.counts}\n\n| what | measured | target |\n|---|---|---|")
    print(f"| parse and index everything | {seconds:.1f} s | < 8 s |")
    print(f"| memory of it, at most | {mib:.0f} MiB | < 400 MiB |")
    print(f"| one EndpointSlice update, median | {statistics.median(times):.2f} ms | < 2 ms |")
    print(f"| one EndpointSlice update, 99 % | {sorted(times)[-20]:.2f} ms | < 2 ms |")
    for what, microseconds in lookups(cluster, rounds).items():
        print(f"| {what} | {microseconds:.1f} us | |")
    began = time.perf_counter()
    count = sum(1 for _ in cluster.prefixes())
    print(f"| all {count} prefixes | {(time.perf_counter() - began) * 1e3:.0f} ms | |")


# What a program that lists and watches imports and makes before the first request.
CANDIDATES = {
    "kubernetes": "from kubernetes import client, config, watch\n"
    "api = client.ApiClient(); client.CoreV1Api(api); client.DiscoveryV1Api(api)",
    "kubernetes_asyncio": "from kubernetes_asyncio import client, config, watch",
    "kr8s": "import kr8s.asyncio",
    "lightkube": "import lightkube.config.kubeconfig, lightkube.config.client_adapter",
    "httpx": "import httpx",
    "urllib3": "import urllib3",
    "ssl and json alone": "import asyncio, json, ssl\nssl.create_default_context()",
}
MEASURE = """
import resource, sys, time
def rss(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, began = rss(), time.perf_counter()
{code}
print(f"{{time.perf_counter() - began:.2f}} | {{rss() - before:.0f}} | {{len(sys.modules)}}")
"""


def bench_clients() -> None:
    """Print what each client library that is installed costs, in a Python of its own."""
    print("| library | import s | MiB more | modules |\n|---|---|---|---|")
    for name, code in CANDIDATES.items():
        run = subprocess.run(
            [sys.executable, "-c", MEASURE.format(code=code)],
            capture_output=True,
            text=True,
            check=False,
        )
        print(f"| {name} | {run.stdout.strip() if run.returncode == 0 else 'not installed | |'} |")


def bench_tables() -> None:
    """Print what immutable mappings of 150,000 entries cost."""
    keys = [socket(IPv4Address(POD_BASE + index), 0, 0) for index in range(ENDPOINTS)]
    editor: TableEditor[int, int] = Table[int, int]().edit()
    for key in keys:
        editor.set(key, 0)
    table, plain = editor.finish(), dict.fromkeys(keys, 0)
    makers: dict[str, tuple[Callable[[int], object], Callable[[int], object]]] = {
        "Table": (table.get, lambda key: _changed(table, key)),
        "dict, copied": (plain.get, lambda key: {**plain, key: 1}),
    }
    with suppress(ImportError):
        hamt = import_module("immutables").Map(plain)
        makers["immutables.Map"] = (hamt.get, lambda key: hamt.set(key, 1))
    print("| mapping | get us | change us | KiB of a kept change |\n|---|---|---|---|")
    for name, (get, change) in makers.items():
        got, changed = _each(get, keys[:20_000]), _each(change, keys[:20])
        tracemalloc.start()
        kept = [change(key) for key in keys[:20]]
        kib = tracemalloc.get_traced_memory()[0] / 1024 / len(kept)
        tracemalloc.stop()
        print(f"| {name} | {got:.2f} | {changed:.1f} | {kib:.1f} |")


def _changed(table: Table[int, int], key: int) -> object:
    editor = table.edit()
    editor.set(key, 1)
    return editor.finish()


def _each(act: Callable[[int], object], keys: list[int]) -> float:
    began = time.perf_counter()
    for key in keys:
        act(key)
    return (time.perf_counter() - began) / len(keys) * 1e6


def main() -> None:
    """Print Markdown tables of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20_000, help="look-ups of each kind")
    parser.add_argument("--clients", action="store_true", help="client libraries instead")
    parser.add_argument("--tables", action="store_true", help="immutable mappings instead")
    options = parser.parse_args()
    if options.clients:
        bench_clients()
    elif options.tables:
        bench_tables()
    else:
        bench_index(options.rounds)


if __name__ == "__main__":
    main()
