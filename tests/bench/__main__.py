"""make bench: what the tracer costs. Prints the tables of docs/performance.md."""

import argparse
import ctypes
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from tests.bench import node as nodes
from tests.kernel.box import package_root, wait_until
from tests.kernel.trace import open_source
from tracer.kernel import attach, bpf_syscall, probes
from tracer.kernel.btf import libbpf
from tracer.kernel.netns import inside
from tracer.kernel.source import Settings

# Masquerading to one address leaves ports for 64,512 flows.
PACKETS, FLOWS, ROUNDS = 640_000, 50_000, 7


def main():
    """Run everything and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = arguments.parse_args().rounds
    print(f"Linux {os.uname().release}, {platform.machine()}, {os.cpu_count()} CPUs\n")
    with tempfile.TemporaryDirectory() as directory, nodes.built(directory) as node:
        established(node, rounds)
        new_connections(node, Path(directory), rounds)
        cost_per_run(node)
        weight(node, Path(directory))


def established(node, rounds):
    """Packets of an established flow, with and without."""
    setups = {
        "no tracer": no_tracer,
        "srcip, counting": lambda: kernel_source(node, is_streaming=False, is_counting=True),
        "srcip, streaming": lambda: kernel_source(node),
    }
    print("Packets of an established UDP flow through a node:\n")
    compare(setups, lambda: node.established_ns(PACKETS), rounds, "packets/s")


def new_connections(node, directory, rounds):
    """New connections, with and without, and beside conntrack -E."""
    setups = {
        "no tracer": no_tracer,
        "srcip, counting": lambda: kernel_source(node, is_streaming=False, is_counting=True),
        "srcip trace, streaming": lambda: srcip_trace(node, directory),
        "conntrack -E": lambda: conntrack_events(node),
    }
    print("New UDP connections through a NodePort, DNAT and masquerade:\n")
    compare(setups, lambda: node.new_ns(FLOWS), rounds, "connections/s")


def compare(setups, measure, rounds, unit):
    """Measure each setup in turn, several times, and print medians and ratios to the first."""
    samples = {name: [] for name in setups}
    names = deque(setups)
    for _ in range(rounds):
        for name in names:
            with setups[name]():
                samples[name].append(measure())
        # The first one, one after a pause, or one after the heaviest is slower for that alone.
        names.rotate()
    medians = {name: statistics.median(values) for name, values in samples.items()}
    base = next(iter(medians.values()))
    print(f"| | ns each | {unit} | ratio |\n|---|---:|---:|---:|")
    for name, ns in medians.items():
        print(f"| {name} | {ns:.0f} | {1e9 / ns:,.0f} | {base / ns:.2f} |")
    print()


@contextmanager
def no_tracer():
    """Nothing beside the traffic."""
    yield


def kernel_source(node, **settings):
    """The programs, attached by this process; nothing reads while traffic runs."""
    return closing(open_source([node.box.target()], Settings(**settings)))


@contextmanager
def srcip_trace(node, directory):
    """The whole program, printing every connection to nowhere."""
    ready = directory / "ready"
    ready.unlink(missing_ok=True)
    command = ["--netns", node.box.names["node"], "-o", "json", "--ready-file", str(ready)]
    with beside([sys.executable, "-m", "tracer.cli", "trace", *command]) as process:
        wait_until(ready.exists)
        yield process


@contextmanager
def conntrack_events(node):
    """The usual way to follow connections."""
    name = node.box.names["node"]
    with beside(["ip", "netns", "exec", name, "conntrack", "-E", "-b", "4194304"]) as process:
        # It does not say when it is ready; its socket shows that.
        wait_until(lambda: "conntrack" in Path(f"/proc/{process.pid}/comm").read_text())
        time.sleep(0.2)
        yield process


@contextmanager
def beside(command):
    """Run a command while the block runs."""
    with subprocess.Popen(
        command, cwd=package_root(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def cost_per_run(node):
    """Each program's own time, beside an empty program at the same hooks."""
    libbpf().bpf_enable_stats.restype = ctypes.c_int
    with ExitStack() as stack:
        statistics_fd = libbpf().bpf_enable_stats(0)
        stack.callback(os.close, statistics_fd)
        source = stack.enter_context(kernel_source(node, is_streaming=False, is_counting=True))
        empty = stack.enter_context(empty_program(node))
        established = per_run(source, empty, lambda: node.established_ns(PACKETS))
        new = per_run(source, empty, lambda: node.new_ns(FLOWS))
        streaming = stack.enter_context(kernel_source(node))
        streamed = per_run(streaming, empty, lambda: node.new_ns(20_000))
    print("One run of a program, by the kernel's own statistics (which cost most of it):\n")
    print("| | established, ns | ratio | new, counting, ns | new, streaming, ns |")
    print("|---|---:|---:|---:|---:|")
    for name in ("empty program", "srcip_mark", "srcip_postrouting"):
        ratio = established[name] / established["empty program"]
        print(
            f"| {name} | {established[name]:.0f} | {ratio:.2f} | {new[name]:.0f} "
            f"| {streamed[name]:.0f} |"
        )
    both = new["srcip_mark"] + new["srcip_postrouting"]
    print(f"\nA new connection in counting mode costs {both:.0f} ns of kernel time in all.\n")


@contextmanager
def empty_program(node, priorities=(98,)):
    """A netfilter program that only accepts, at places of POST_ROUTING for IPv4."""
    program = probes.load_trivial(probes.NETFILTER, probes.ATTACH_NETFILTER)
    with ExitStack() as stack:
        stack.callback(os.close, program)
        for priority in priorities:
            with inside(node.box.path("node")):
                link = bpf_syscall.create_netfilter_link(program, attach.FAMILIES[0], 4, priority)
            stack.callback(os.close, link)
        yield program


def per_run(source, empty, traffic):
    """Nanoseconds of a run of each program under some traffic."""
    before = {**source.run_statistics(), "empty program": bpf_syscall.program_runs(empty)}
    traffic()
    after = {**source.run_statistics(), "empty program": bpf_syscall.program_runs(empty)}
    return {
        name: (after[name][0] - before[name][0]) / max(1, after[name][1] - before[name][1])
        for name in after
    }


def weight(node, directory):
    """Memory and start."""
    samples = []
    for _ in range(5):
        start = time.monotonic()
        with srcip_trace(node, directory) as process:
            samples.append(time.monotonic() - start)
            node.new_ns(20_000)
            wait_until(lambda process=process: cpu_is_idle(process.pid))
            status = Path(f"/proc/{process.pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    resident_mib, peak_mib = (int(fields[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))
    print("| `srcip trace` | |\n|---|---:|")
    print(f"| from start to attached, s | {statistics.median(samples):.2f} |")
    print(f"| resident after 20,000 connections, MiB | {resident_mib:.1f} |")
    print(f"| its peak, MiB | {peak_mib:.1f} |")


def cpu_is_idle(pid):
    """Whether a process used no CPU for a moment."""

    def ticks():
        return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))

    before = ticks()
    time.sleep(0.3)
    return ticks() == before


if __name__ == "__main__":
    main()
