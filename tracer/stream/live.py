"""Streaming by an agent: the kernel writes records only while, and only what, clients want."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from tracer.budget import Budget
from tracer.filter import Filter
from tracer.judge.verdict import Judged
from tracer.source import Source
from tracer.stream.server import Origin, StreamServer

# How much of a core the stream may use on average, and how many seconds of it in one burst. Records
# beyond that are lost to the clients, and counted.
SHARE, AT_ONCE_S = 1 / 3, 1.0


class StreamingKernel(Source, Protocol):
    """What streaming needs of `tracer.kernel.source.KernelSource`."""

    def stream(self, wanted: Filter | None) -> None:
        """Write records of what is wanted from now on; None for no records."""

    def lost_by_program(self) -> Mapping[str, Mapping[str, int]]:
        """Return what each program could not report, by reason."""

    def wake_on(self, fd: int) -> None:
        """Make ``read`` also return early when a descriptor becomes readable."""


class LiveStream:
    """Connects the kernel with the clients of an agent. Without a server it does nothing."""

    def __init__(
        self,
        kernel: StreamingKernel,
        server: StreamServer | None,
        *,
        version: str,
        notes: Callable[[], Sequence[str]],
        losses: Callable[[], Mapping[str, int]],
        clock_s: Callable[[], float] = time.monotonic,
        cpu_s: Callable[[], float] = time.thread_time,
    ) -> None:
        """
        Args:
            kernel: The source of the records.
            server: The clients.
            version: The agent's version.
            notes: What the agent cannot see, a line each.
            losses: What it lost of the records that it read, by reason.
            clock_s: The clock by which the budget refills.
            cpu_s: The CPU time by which it is spent: waiting for a CPU costs nothing.
        """
        self._kernel = kernel
        self._server = server
        self._losses = losses
        self._notes = notes
        self._clock_s = clock_s
        self._cpu_s = cpu_s
        self._flows: Filter | None = None
        self._budget = Budget.full(SHARE, AT_ONCE_S, clock_s())
        self._rate_limited = 0
        self._version = version
        if server is not None:
            kernel.wake_on(server.fileno())

    @property
    def is_on(self) -> bool:
        """Whether clients are waiting for records."""
        return self._flows is not None or (self._server is not None and self._server.is_ending)

    @property
    def clients(self) -> int | None:
        """The number of clients; None without a server."""
        return self._server.clients if self._server else None

    def lost(self) -> dict[str, int]:
        """Return what clients did not get, by reason; nothing without a server."""
        if self._server is None:
            return {}
        by_program = self._kernel.lost_by_program()
        # A lost drop is missing from the totals, too, and counted there.
        streamed = [lost for program, lost in by_program.items() if program != "drops"]
        return {
            "ring_full": sum(lost.get("ring_full", 0) for lost in streamed),
            "rate_limited": self._rate_limited,
            "queue_full": self._server.lost,
        }

    def affordable(self, records: Iterable[bytes]) -> Iterator[bytes]:
        """
        Yield records while the budget lasts.

        A record's cost is the CPU time that the caller spends before it asks for the next.
        """
        for raw in records:
            if not self._budget.has_left(self._clock_s()):
                self._rate_limited += self.is_on
                continue
            start_s = self._cpu_s()
            yield raw
            self._budget.spend(self._cpu_s() - start_s)

    def offer(self, judged: Judged) -> None:
        """Send a judged thing to the clients that want it."""
        if self._server is not None:
            self._server.offer(judged)

    def serve(self) -> None:
        """Serve the clients without blocking, and adapt the kernel's filter to theirs."""
        if self._server is None:
            return
        start_s = self._cpu_s()
        origin = self._origin()
        self._server.flush()
        # A client that hung up before the last read has been sent all that happened until then.
        self._server.end(origin)
        self._server.poll()
        if (flows := self._server.flows) != self._flows:
            self._kernel.stream(flows)
            self._flows = flows
        # The kernel first, so that everything after the hello is streamed.
        self._server.attach(origin)
        self._budget.spend(self._cpu_s() - start_s)

    def close(self) -> None:
        """Send every client its summary, and close."""
        if self._server is not None:
            self._server.close(self._origin())

    def _origin(self) -> Origin:
        return Origin(
            version=self._version,
            nodes=list(self._kernel.info.nodes.values()),
            losses=self._all_losses,
            not_seen=self._notes,
        )

    def _all_losses(self) -> dict[str, int]:
        lost = dict(self._kernel.lost())
        # A connection that found no room in the map of paths is streamed all the same.
        lost.pop("paths_full", None)
        for reason, count in self._losses().items():
            lost[reason] = lost.get(reason, 0) + count
        lost["rate_limited"] = lost.get("rate_limited", 0) + self._rate_limited
        return lost
