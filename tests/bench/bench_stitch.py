"""What stitching costs: a million recorded connections of ten nodes, in seconds and memory."""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from ipaddress import IPv4Address
from pathlib import Path

from tests.kernel.box import package_root
from tests.unit.fake_source import FakeSource
from tracer.decode import decode
from tracer.encode import encode_connection
from tracer.model import TCP, Connection, FiveTuple, Hook, Status
from tracer.recording import Recorder, RecordingSource
from tracer.source import SourceInfo

RECORDS, NODES, RATE = 1_000_000, 10, 2000
# node-3's clock is behind, which stitching must find out.
CLOCKS_NS = {3: -7_500_000_000}
START_NS = 1_767_225_600_000_000_000
POD = int(IPv4Address("10.244.0.0"))


def main():
    """Make the recordings, stitch them, print a table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--records", type=int, default=RECORDS)
    records = arguments.parse_args().records
    with tempfile.TemporaryDirectory() as directory:
        files = write(Path(directory), records)
        size = sum(file.stat().st_size for file in files)
        print(f"{records:,} recorded connections of {NODES} nodes, {size >> 20} MiB:\n")
        decode_s = decoding_s(files)
        seconds, cpu_s, peak_mib = stitch(files)
        print(f"Load {os.getloadavg()[0]:.1f}.\n")
        print("| `srcip stitch -o json` | |\n|---|---:|")
        print(f"| seconds | {seconds:.0f} |")
        print(f"| seconds of CPU | {cpu_s:.0f} |")
        print(f"| connections a second of CPU | {records / cpu_s:,.0f} |")
        print(f"| ratio to reading and decoding them alone | {cpu_s / decode_s:.1f} |")
        print(f"| peak memory, MiB | {peak_mib:.0f} |")
    print()


def write(directory, records):
    """Write a recording of each node; every connection crosses two."""
    with ExitStack() as stack:
        recorders = []
        for node in range(NODES):
            info = SourceInfo(
                clock_offset_ns=START_NS + CLOCKS_NS.get(node, 0),
                nodes={4026531840 + node: f"node-{node}"},
                rung="bench",
            )
            recorder = Recorder(directory / f"node-{node}.srcip", FakeSource([], info))
            recorders.append(stack.enter_context(closing(recorder)))
        batches = [[] for _ in range(NODES)]
        for number in range(records // 2):
            first, second = number % NODES, (number + 1 + number // NODES % 9) % NODES
            for node, record in zip((first, second), pair(number, first, second), strict=True):
                batches[node].append(record)
                if len(batches[node]) == 1000:
                    recorders[node].write(batches[node])
                    batches[node] = []
        for recorder, batch in zip(recorders, batches, strict=True):
            recorder.write(batch)
    return sorted(directory.glob("*.srcip"))


def pair(number, first, second):
    """Return a connection as its two nodes recorded it."""
    client = IPv4Address(int(IPv4Address("100.64.0.0")) + number % 4_000_000)
    port, snat_port = 32768 + number % 28000, 1024 + number % 64000
    here = IPv4Address(int(IPv4Address("10.240.0.1")) + first)
    pod = IPv4Address(POD + second * 256 + number % 100 + 2)
    sent = FiveTuple(src=client, dst=here, sport=port, dport=30080, proto=TCP)
    inside = FiveTuple(src=here, dst=pod, sport=snat_port, dport=8080, proto=TCP)
    ktime_ns = number * (1_000_000_000 // RATE) * 2
    nat = Status.SRC_NAT | Status.DST_NAT
    yield entry(ktime_ns, first, sent, inside.inverted, nat)
    yield entry(ktime_ns + 90_000, second, inside, inside.inverted, Status(0))


def entry(ktime_ns, node, orig, reply, status):
    """Return a record."""
    return encode_connection(
        Connection(
            ktime_ns=ktime_ns,
            netns=4026531840 + node,
            hook=Hook.NF_POSTROUTING,
            orig=orig,
            reply=reply,
            status=status,
            zone=0,
            mark=0x4000 if status else 0,
            ct_mark=0,
            iif=2,
            oif=3,
            is_related=False,
        )
    )


def decoding_s(files):
    """Return the seconds of CPU that it takes to read and decode all records, and no more."""
    start_s = time.process_time()
    for file in files:
        with closing(RecordingSource(file)) as source:
            while (records := source.read(0)) is not None:
                for record in records:
                    decode(record)
    return time.process_time() - start_s


def stitch(files):
    """Run the command; return its seconds, those of CPU, and its memory at most in MiB."""
    command = [sys.executable, "-m", "tracer.cli", "stitch", *map(str, files), "-o", "json"]
    start = time.monotonic()
    with subprocess.Popen(
        [*command, "--no-cluster"], cwd=package_root(), stdout=subprocess.DEVNULL
    ) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    cpu_s = usage.ru_utime + usage.ru_stime
    return time.monotonic() - start, cpu_s, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
