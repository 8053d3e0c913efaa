"""How the cluster index scales: 5,000 nodes, 10,000 Services, 150,000 endpoints."""

import argparse
import gc
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Address

from tracer.cluster.index import Cluster
from tracer.cluster.objects import EndpointSlice
from tracer.cluster.parse import parse
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
        cluster = cluster.apply(turned)
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


def main() -> None:
    """Print a Markdown table of what was measured, and what it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20_000, help="look-ups of each kind")
    rounds = parser.parse_args().rounds
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


if __name__ == "__main__":
    main()
