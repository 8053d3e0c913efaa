"""What path mode costs packets that are not watched: small ones, and TCP in bulk."""

import argparse
import os
import socket
import tempfile
import threading
from contextlib import ExitStack, closing
from ipaddress import ip_network

from tests.bench import node as nodes
from tests.bench.__main__ import compare, kernel_source, no_tracer
from tests.bench.bench_headers import PORT, TRACK, long_ns, serve
from tests.kernel.box import SERVER
from tracer.filter import Filter

PACKETS, ROUNDS = 320_000, 15
# A connection of another client: every packet of the benchmark must be compared with it.
WATCHED = Filter(client=ip_network("198.51.100.77/32"), port=443)


def main():
    """Print two tables."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = arguments.parse_args().rounds
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        node = stack.enter_context(nodes.built(directory))
        setups = {
            "no tracer": no_tracer,
            "trace, without paths": lambda: kernel_source(node, wanted=WATCHED),
            "trace, paths of one connection": lambda: kernel_source(
                node, wanted=WATCHED, packets=10
            ),
        }
        print(f"Load {os.getloadavg()[0]:.1f}. Unwatched small packets, nanoseconds of CPU time:\n")
        compare(setups, lambda: node.established_cpu_ns(PACKETS), rounds, "packets/s")
        listener = stack.enter_context(closing(node.box.socket("server", 4, socket.SOCK_STREAM)))
        listener.bind((SERVER[4], PORT))
        listener.listen(1024)
        listener.settimeout(None)
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        node.box.rules(TRACK)
        print("One long unwatched TCP connection, for each MiB:\n")
        compare(setups, lambda: long_ns(node.box), rounds, "MiB/s")


if __name__ == "__main__":
    main()
