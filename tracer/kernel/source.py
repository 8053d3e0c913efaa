"""The running kernel as a source of records: loads, attaches and reads the programs."""

import logging
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tracer.declared.reader import DeclaredReader
from tracer.encode import encode_config
from tracer.errors import LoadError
from tracer.filter import Filter
from tracer.kernel import probing, programs
from tracer.kernel.attachment import Attachment
from tracer.kernel.bpf_syscall import (
    Map,
    possible_cpus,
    program_misses,
    program_runs,
    sum_cpus,
)
from tracer.kernel.counters import PathCounters, Turn
from tracer.kernel.kallsyms import Kallsyms
from tracer.kernel.netns import Netns
from tracer.kernel.probing import Probes
from tracer.kernel.programs import (
    ACCEPTS,
    CONNECTIONS,
    DROPS,
    HOPS,
    SEGMENTS,
    Loaded,
    Program,
    Sizes,
)
from tracer.kernel.ring import RingReader
from tracer.source import SourceInfo
from tracer.wire import Lost

_log = logging.getLogger(__name__)

RUNG = "BPF netfilter links"
# Drops that are reported for every flow: by netfilter, by routing, and for lack of a listener. They
# are looked up by name in the running kernel's enum, because the numbers change between versions.
REASONS = frozenset(
    {
        "NETFILTER_DROP",
        "NO_SOCKET",
        "IP_RPFILTER",
        "IP_NOPROTO",
        "IP_INNOROUTES",
        "IP_OUTNOROUTES",
        "IP_INADDRERRORS",
        "IP_LOCAL_SOURCE",
        "IP_INVALID_SOURCE",
        "IP_LOCALNET",
        "IP_INVALID_DEST",
        "NEIGH_FAILED",
    }
)
# Rings in draining order. An accept or segment follows its connection: draining connections last
# puts both into one batch, which is then sorted by time.
_RINGS = (
    (HOPS, "hops"),
    (SEGMENTS, "segments"),
    (ACCEPTS, "accepts"),
    (DROPS, "drops"),
    (CONNECTIONS, "connections"),
)
_RECORD_BYTES = 128 + 8
# Connections whose probe did not run because another ran on its CPU, where the kernel counts them.
_MISSED = "probe_missed"
_CHECK_INTERVAL_NS = 500_000_000
_STEP_NS = 1_000_000
_ZERO = bytes(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """
    What the kernel side is to do.

    ``wanted`` is applied before a record is written. ``is_counting`` updates
    ``KernelSource.counters``; ``is_streaming`` writes records; ``has_drops`` writes records of all
    drops, whatever else is streamed or wanted. ``packets`` is the number of packets per direction
    whose hops are reported; with 0 those programs are not loaded. ``has_proxy_headers`` reads what
    the first bytes of TCP connections declare; without it those programs are not loaded.
    ``is_restarted`` says that a supervisor restarts the process: it then fails rather than see less
    than a new start would.
    """

    wanted: Filter = field(default_factory=Filter)
    is_streaming: bool = True
    is_counting: bool = False
    has_drops: bool = False
    packets: int = 0
    has_proxy_headers: bool = False
    is_restarted: bool = False
    masquerade_mark: int = 0x4000
    sizes: Sizes = field(default_factory=Sizes)


class KernelSource:
    """
    A source that reads the running kernel. Needs root.

    ``close`` detaches everything, and so does the end of the process, however it ends.

    Args:
        namespaces: What to trace.
        settings: What the kernel side is to do.
        probes: Which kernel functions to probe, instead of using netfilter links.

    Raises:
        LoadError: If the programs cannot be compiled, loaded or attached.
        NetnsError: If a namespace cannot be entered.
    """

    def __init__(
        self,
        namespaces: Sequence[Netns],
        settings: Settings | None = None,
        probes: Probes | None = None,
    ) -> None:
        self._settings = settings or Settings()
        self._turn = Turn()
        self._probes = probes
        self._not_seen: list[str] = []
        self._unseen_marks: tuple[str, ...] = ()
        if probes is not None:
            self._not_seen += probing.NOT_SEEN
            if self._settings.packets:
                self._not_seen.append(probing.NO_HOPS)
                self._settings = replace(self._settings, packets=0)
        self._namespaces = {netns.inode: netns for netns in namespaces}
        self._kallsyms = Kallsyms()
        self._connections = CONNECTIONS if probes is None else probes.connections
        self._programs = (
            *(self._connections, ACCEPTS, DROPS if probes is None else probes.drops),
            *((HOPS,) if self._settings.packets else ()),
            *((SEGMENTS,) if self._settings.has_proxy_headers else ()),
        )
        self._attachment = Attachment(self._namespaces, self._programs, probes)
        self._declared = DeclaredReader(self._forget_stream)
        self._loaded = Loaded()
        self._reader: RingReader | None = None
        self._next_check_ns = 0
        try:
            self._loaded = programs.load(self._programs, self._settings.sizes)
            if self._loaded.drop_reasons == programs.NO_REASONS:
                self._not_seen.append(probing.NO_REASONS)
            self._configure()
            self.counters = PathCounters(self._loaded, self._settings.sizes, self._set_turn)
            self._begin()
        except BaseException:
            self.close()
            raise
        self.info = SourceInfo(
            clock_offset_ns=clock_offset_ns(),
            nodes={netns.inode: netns.node for netns in namespaces},
            drop_reasons=self._loaded.drop_reasons,
            rung=RUNG if probes is None else probing.RUNG,
            not_seen=self._what_is_not_seen(),
            has_proxy_headers=self._settings.has_proxy_headers,
        )

    def count(self, *, masquerade_mark: int) -> None:
        """Start to count by path, or continue with another mark."""
        if not self._settings.is_counting or self._settings.masquerade_mark != masquerade_mark:
            self._settings = replace(
                self._settings, is_counting=True, masquerade_mark=masquerade_mark
            )
            self._configure()

    def stream(self, wanted: Filter | None) -> None:
        """Write records of what is wanted from now on; None for no records."""
        is_streaming = wanted is not None
        if is_streaming:
            self._attachment.report_accepts(True)
        self._settings = replace(
            self._settings, is_streaming=is_streaming, wanted=wanted or Filter()
        )
        self._configure()
        if not is_streaming:
            self._attachment.report_accepts(False)

    def wake_on(self, fd: int) -> None:
        """Make `read` also return early when a descriptor becomes readable."""
        if self._reader is not None:
            self._reader.wake_on(fd)

    def read(self, timeout_s: float) -> list[bytes] | None:
        """Return the next records; None when every traced namespace is gone."""
        if self._reader is None:
            raise LoadError("this source is closed")
        batch = self._reader.read(timeout_s)
        # The clock may have been set: these records get their time from what it says now.
        offset_ns = clock_offset_ns()
        # Reading two clocks one after the other varies a little: that is not a step.
        if abs(offset_ns - self.info.clock_offset_ns) >= _STEP_NS:
            self.info = replace(self.info, clock_offset_ns=offset_ns)
        not_seen = self._what_is_not_seen()
        if not_seen != self.info.not_seen:
            self.info = replace(self.info, not_seen=not_seen)
        if SEGMENTS in self._programs:
            batch = self._declared.read(batch, time.monotonic_ns())
        self._check_surroundings()
        if not batch and not self._attachment.by_namespace:
            return None
        return batch

    def lost(self) -> Mapping[str, int]:
        """Return what the programs could not report, by reason."""
        totals = Counter[str]()
        for lost in self.lost_by_program().values():
            totals.update(lost)
        if SEGMENTS in self._programs:
            totals.update(self._declared.lost())
        return totals

    def lost_by_program(self) -> dict[str, dict[str, int]]:
        """Return what each program file could not report, by reason."""
        return {program.file.removesuffix(".c"): self._lost(program) for program in self._programs}

    @property
    def devices(self) -> int:
        """How many interfaces have tc programs attached."""
        return self._attachment.devices

    def symbol(self, address: int) -> str | None:
        """Return the name of the kernel function that contains an address."""
        return self._kallsyms.function(address)

    def run_statistics(self) -> dict[str, tuple[int, int]]:
        """Return run time in ns and run count by function; 0 unless kernel.bpf_stats_enabled."""
        return {name: program_runs(fd) for (_, name), fd in self._loaded.functions.items()}

    def map_usage(self) -> dict[str, tuple[int, int]]:
        """Return used elements and capacity of the maps that grow."""
        sizes, counters = self._settings.sizes, self.counters
        return {
            "paths": (counters.entries, sizes.paths),
            "classes": (counters.class_entries, sizes.prefixes),
        }

    def close(self) -> None:
        """Detach and unload. May be called twice."""
        self._attachment.close()
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        self._loaded.close()
        self._kallsyms.close()

    def _lost(self, program: Program) -> dict[str, int]:
        counters = Map(self._loaded.map(program, "lost"), 4, 8, is_per_cpu=True)
        values = {slot: counters.lookup(slot.to_bytes(4, "little")) for slot in Lost}
        lost = {slot.name.lower(): sum_cpus(value or b"") for slot, value in values.items()}
        if self._probes is not None and program is self._connections:
            lost[_MISSED] = program_misses(self._loaded.function(program, "srcip_confirm"))
        return lost

    def _set_turn(self, turn: Turn) -> None:
        self._turn = turn
        self._configure()

    def _configure(self) -> None:
        for program in self._programs:
            config = self._config(program)
            Map(self._loaded.map(program, "config"), 4, len(config)).update(_ZERO, config)

    def _config(self, program: Program) -> bytes:
        settings = self._settings
        ring_records = (
            settings.sizes.connection_ring_pages * os.sysconf("SC_PAGE_SIZE") // _RECORD_BYTES
        )
        has_all = settings.has_drops and program.file == DROPS.file
        return encode_config(
            wanted=Filter() if has_all else settings.wanted,
            reasons=[n for n, name in self._loaded.drop_reasons.items() if name in REASONS],
            # All CPUs together may fill at most a quarter of the ring before a wake-up.
            wakeup_records=max(1, ring_records // 4 // possible_cpus()),
            masquerade_mark=settings.masquerade_mark,
            is_streaming=settings.is_streaming or has_all,
            is_counting=settings.is_counting,
            active_paths=self._turn.active_paths,
            sample_round=self._turn.sample_round,
            # A remembered class does not say for which namespace it holds.
            classes_round=self._turn.classes_round if len(self._namespaces) == 1 else 0,
            packets=settings.packets,
            is_broad=settings.packets > 0 and len(self._namespaces) > 1,
        )

    def _begin(self) -> None:
        rings = [(program, name) for program, name in _RINGS if self._has(program)]
        self._reader = RingReader([self._loaded.map(program, name) for program, name in rings])
        self._attachment.attach(self._loaded, has_accepts=self._settings.is_streaming)

    def _has(self, program: Program) -> bool:
        return program.file in {each.file for each in self._programs}

    def _what_is_not_seen(self) -> tuple[str, ...]:
        """Return what is not seen, a line each; it may grow, as modules and interfaces appear."""
        lines = (*self._not_seen, *self._unseen_marks, *self._attachment.not_seen)
        # Programs for hops and for first bytes may be refused for the same reason: list it once.
        return tuple(dict.fromkeys(lines))

    def _forget_stream(self, key: bytes) -> None:
        """Stop reporting segments of a connection whose first bytes are understood."""
        Map(self._loaded.map(SEGMENTS, "streams"), len(key), 0).delete(key)

    def _check_surroundings(self) -> None:
        now_ns = time.monotonic_ns()
        if now_ns < self._next_check_ns:
            return
        self._next_check_ns = now_ns + _CHECK_INTERVAL_NS
        self._attachment.release_gone_namespaces()
        unseen = self._probes.unseen() if self._probes is not None else None
        if unseen is not None and unseen not in self._unseen_marks:
            if self._settings.is_restarted:
                raise LoadError(f"not seen: {unseen}")
            _log.warning("not seen: %s", unseen)
            self._unseen_marks = (unseen,)
            self.info = replace(self.info, not_seen=self._what_is_not_seen())


def clock_offset_ns() -> int:
    """Return what to add to CLOCK_MONOTONIC, the clock of records, to get Unix time."""
    return time.clock_gettime_ns(time.CLOCK_REALTIME) - time.clock_gettime_ns(time.CLOCK_MONOTONIC)
