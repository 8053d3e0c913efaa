"""The kernel's count of connections by path, read in batches."""

import ctypes
from collections.abc import Iterable

from tracer.encode import encode_prefix
from tracer.kernel.bpf_syscall import Map, sum_cpus
from tracer.kernel.programs import CONNECTIONS, Loaded
from tracer.model import ClientClass, IPNetwork
from tracer.wire import WirePathKey, WirePrefix


class PathCounters:
    """
    Counts of new connections by path, and the classes of address that the paths are told by.

    Totals only grow: nothing is ever deleted, because a program may hold a pointer to it.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._paths = Map(
            loaded.map(CONNECTIONS, "paths"), ctypes.sizeof(WirePathKey), 8, is_per_cpu=True
        )
        self._classes = Map(loaded.map(CONNECTIONS, "classes"), ctypes.sizeof(WirePrefix), 4)

    def read(self) -> list[tuple[bytes, int]]:
        """Return each path's wire key and its total since the start."""
        return [(key, sum_cpus(value)) for key, value in self._paths.items()]

    def set_classes(self, prefixes: Iterable[tuple[IPNetwork, ClientClass]]) -> None:
        """
        Say which addresses are pods, nodes, load balancers or loopback; the rest is external.

        Raises:
            OSError: ENOSPC if there are more prefixes than ``Sizes.prefixes``.
        """
        for network, client_class in prefixes:
            self._classes.update(encode_prefix(network), client_class.to_bytes(4, "little"))
