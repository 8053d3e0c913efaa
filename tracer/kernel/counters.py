"""The kernel's count of connections by path, read in batches."""

import ctypes
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from tracer.encode import encode_prefix
from tracer.kernel.bpf_syscall import Map
from tracer.kernel.programs import CONNECTIONS, Loaded, Sizes
from tracer.model import NO_FLAGS, AddressFlag, ClientClass, IPNetwork
from tracer.wire import CLASS_BITS, COUNT_BITS, WireConnection, WirePathKey, WirePrefix

_COUNT_MASK = (1 << COUNT_BITS) - 1
_SAMPLE_ROUNDS = (1 << 64 - COUNT_BITS) - 1
_CLASSES_ROUNDS = (1 << 24) - 1


@dataclass(frozen=True, slots=True)
class AddressClass:
    """The class and flags of a prefix's addresses."""

    client_class: ClientClass
    flags: AddressFlag = NO_FLAGS

    @property
    def wire(self) -> bytes:
        """The value in the map ``classes``."""
        return (self.client_class | self.flags << CLASS_BITS).to_bytes(4, "little")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """
    The part of the programs' configuration that concerns counting.

    ``active_paths`` is the index of the map that counts. A new ``sample_round`` makes the programs
    look up each path's sample again, a new ``classes_round`` each address's class.
    """

    active_paths: int = 0
    sample_round: int = 1
    classes_round: int = 1


@dataclass(slots=True)
class _Half:
    """One of the two maps that take turns, with its totals as last read."""

    paths: Map
    totals: dict[bytes, int] = field(default_factory=dict)


class PathCounters:
    """
    Counts of new connections by path, and the address classes that are part of a path.

    Two maps take turns. Nothing is deleted from the active one, because a program may hold a
    pointer to an element; the idle one is emptied once no program can.
    """

    def __init__(
        self,
        loaded: Loaded,
        sizes: Sizes,
        configure: Callable[[Turn], None],
    ) -> None:
        key_size = ctypes.sizeof(WirePathKey)
        self._halves = [
            _Half(Map(loaded.map(CONNECTIONS, name), key_size, 8, is_per_cpu=True))
            for name in ("paths_0", "paths_1")
        ]
        self._samples = Map(
            loaded.map(CONNECTIONS, "samples"), key_size, ctypes.sizeof(WireConnection)
        )
        self._classes = Map(loaded.map(CONNECTIONS, "classes"), ctypes.sizeof(WirePrefix), 4)
        self._known: dict[bytes, bytes] = {}
        self._configure = configure
        self._turn = Turn()
        self._is_idle_full = False
        # Paths in the active map at the last drain.
        self.entries = 0
        self.sizes = sizes

    def read(self) -> list[tuple[bytes, int]]:
        """Return each path's wire key and total; valid only until a map is first emptied."""
        totals: dict[bytes, int] = {}
        for half in self._halves:
            for key, value in half.paths.items():
                totals[key] = totals.get(key, 0) + _connections(value)
        return list(totals.items())

    def drain(self) -> dict[bytes, int]:
        """
        Return what was added to each path since the last drain.

        Drains must be seconds apart: programs that were running when a drain swapped the maps must
        have ended by the next one.
        """
        added: dict[bytes, int] = {}
        for half in self._halves:
            for key, value in half.paths.items():
                total = _connections(value)
                more = total - half.totals.get(key, 0)
                if more:
                    half.totals[key] = total
                    added[key] = added.get(key, 0) + more
        # Before the swap: a map that filled up between two drains must show as full.
        self.entries = len(self._halves[self._turn.active_paths].totals)
        self._take_turns()
        return added

    @property
    def class_entries(self) -> int:
        """The number of prefixes in the map."""
        return len(self._known)

    def sample(self, key: bytes) -> bytes | None:
        """Return the record of one connection of a path, if there is one."""
        return self._samples.lookup(key)

    def forget_sample(self, key: bytes) -> None:
        """Delete a path's sample: its next connection becomes the new one."""
        self._samples.delete(key)
        self._look_for_samples()

    def replace_classes(self, classes: Mapping[int, Mapping[IPNetwork, AddressClass]]) -> int:
        """
        Replace all prefixes by these, given per namespace.

        Returns:
            How many did not fit; the shortest prefixes are written first.
        """
        wanted = {
            encode_prefix(netns, network): found.wire
            for netns, prefixes in classes.items()
            for network, found in sorted(prefixes.items(), key=lambda item: item[0].prefixlen)
        }
        if wanted == self._known:
            return 0
        for prefix in self._known.keys() - wanted.keys():
            self._classes.delete(prefix)
            del self._known[prefix]
        refused = 0
        for prefix, value in wanted.items():
            if self._known.get(prefix) == value:
                continue
            try:
                self._put(prefix, value)
            except OSError:
                refused += 1
        self._look_for_classes()
        return refused

    def _put(self, prefix: bytes, value: bytes) -> None:
        self._classes.update(prefix, value)
        self._known[prefix] = value

    def _take_turns(self) -> None:
        idle_paths = 1 - self._turn.active_paths
        idle = self._halves[idle_paths]
        if self._is_idle_full:
            self._empty(idle)
        elif self.entries * 2 > self.sizes.paths and not idle.totals:
            self._tell(replace(self._turn, active_paths=idle_paths))
            self._is_idle_full = True

    def _empty(self, idle: _Half) -> None:
        """Empty the idle map; no program uses it any more, and its counts were read."""
        used = self._halves[self._turn.active_paths].totals
        for key in idle.totals:
            idle.paths.delete(key)
            if key not in used:
                with suppress(OSError):
                    self._samples.delete(key)
        idle.totals.clear()
        self._is_idle_full = False
        self._look_for_samples()

    def _look_for_samples(self) -> None:
        """Make the programs look up each path's sample again. A new path's round is 0."""
        sample_round = self._turn.sample_round % _SAMPLE_ROUNDS + 1
        self._tell(replace(self._turn, sample_round=sample_round))

    def _look_for_classes(self) -> None:
        """Make the programs forget which class an address had."""
        classes_round = self._turn.classes_round % _CLASSES_ROUNDS + 1
        self._tell(replace(self._turn, classes_round=classes_round))

    def _tell(self, turn: Turn) -> None:
        self._turn = turn
        self._configure(turn)


def _connections(value: bytes) -> int:
    """Sum up a path's connections over all CPUs."""
    return sum(count & _COUNT_MASK for count in struct.unpack(f"={len(value) // 8}Q", value))
