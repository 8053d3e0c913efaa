"""What path mode costs the packets of a node that nobody watches."""

import argparse
import os
import tempfile
from contextlib import ExitStack
from ipaddress import ip_network

from tests.bench import node as nodes
from tests.bench.__main__ import compare, kernel_source, no_tracer
from tracer.model import Filter

PACKETS, ROUNDS = 640_000, 9
# One connection of another client: every packet of the benchmark has to be told from it.
WATCHED = Filter(client=ip_network("198.51.100.77/32"), port=443)


def main():
    """Print one table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = arguments.parse_args().rounds
    setups = {
        "no tracer": no_tracer,
        "trace, without paths": lambda: kernel_source_of(0),
        "trace, paths of one connection": lambda: kernel_source_of(10),
    }
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        node = stack.enter_context(nodes.built(directory))

        def kernel_source_of(packets):
            return kernel_source(node, wanted=WATCHED, packets=packets)

        print(f"Unwatched packets through a node, {os.cpu_count()} CPUs:\n")
        compare(setups, lambda: node.established_ns(PACKETS), rounds, "packets/s")


if __name__ == "__main__":
    main()
