"""A run that shows whole paths: judged connections joined over packets and nodes."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from tracer.cluster.index import Cluster
from tracer.judge.assemble import QUIET_NS, Assembler
from tracer.judge.join import WINDOW_NS, Joiner
from tracer.judge.path import Path
from tracer.judge.verdict import Judged, SeenAccept, Summary, Verdict
from tracer.pipeline import Pipeline, Wanted
from tracer.proxies import Proxies
from tracer.source import Source
from tracer.surroundings import LiveViews
from tracer.views import Views

# For namespaces of one machine, which share a clock: a packet crosses them in less, even if it
# waits for neighbour discovery.
LIVE_WINDOW_NS = 500_000_000
# After a larger step all open paths end: else, if the clock is set back, they would wait for it.
_STEP_NS = 100_000_000


class PathPipeline:
    """Joins the records of one source into paths. Has the interface of `Pipeline`."""

    def __init__(
        self,
        source: Source,
        wanted: Wanted | None = None,
        views: Views | None = None,
        *,
        proxies: Proxies | None = None,
        clock_ns: Callable[[], int] | None = None,
        window_ns: int = WINDOW_NS,
        cluster: Callable[[], Cluster | None] = lambda: None,
    ) -> None:
        """
        Args:
            source: Where records come from.
            wanted: Which paths to show; a path matches if one of its nodes does.
            views: The views of the traced namespaces.
            proxies: Which proxies are trusted, and what is known about them.
            clock_ns: Unix time, by which paths become complete; without one, the records' times.
            window_ns: How far apart the times of two nodes may be.
            cluster: Returns the objects that show which nodes are missing.
        """
        self._wanted = wanted or Wanted()
        # Paths are filtered when complete: on the next node the filter may not match a connection.
        self._source = source
        self._offset_ns = source.info.clock_offset_ns
        self._pipeline = Pipeline(
            source,
            Wanted(are_stray_accepts=True),
            views,
            proxies=proxies,
            # When live, the records' clock is this machine's.
            clock=time.monotonic_ns if clock_ns else None,
        )
        self._assembler = Assembler()
        self._joiner = Joiner(window_ns, cluster=cluster)
        self._clock_ns = clock_ns
        self._latest_ns = self._now_ns = 0
        self._connections = self._drops = 0

    def judge(self, records: Iterable[bytes]) -> Iterator[Path]:
        """Take records; yield the wanted paths that are now complete."""
        before_ns, self._offset_ns = self._offset_ns, self._source.info.clock_offset_ns
        if abs(self._offset_ns - before_ns) >= _STEP_NS:
            yield from self._take(None)
            self._now_ns = 0
        # Everything before the previous call's time has been read by now.
        read_ns, self._now_ns = self._now_ns, self._clock_ns() if self._clock_ns else 0
        self._add(self._pipeline.judge(records))
        now_ns = read_ns if self._clock_ns else self._latest_ns
        yield from self._take(now_ns - self._pipeline.delay_ns)

    def rest(self) -> Iterator[Path]:
        """Yield the rest, complete or not."""
        self._add(self._pipeline.rest())
        yield from self._take(None)

    def summary(self) -> Summary:
        """Sum up the run so far: paths that arrived, and paths that ended in a drop."""
        summary = self._pipeline.summary()
        lost = {**self._assembler.lost(), **self._joiner.lost()}
        return replace(
            summary,
            connections=self._connections,
            drops=self._drops,
            lost={**summary.lost, **{name: count for name, count in lost.items() if count}},
        )

    def _add(self, found: Iterable[Judged]) -> None:
        for judged in found:
            # Not the maximum: one record with a wrong time must not end all legs.
            self._latest_ns = judged.time_ns
            if isinstance(judged, SeenAccept):
                self._joiner.add_accept(judged)
            else:
                self._assembler.add(judged)

    def _take(self, now_ns: int | None) -> Iterator[Path]:
        for leg in self._assembler.take(now_ns):
            self._joiner.add(leg)
        for path in self._joiner.take(self._complete_until(now_ns)):
            if not self._wanted.has_path(path):
                continue
            if path.verdict is Verdict.DROPPED:
                self._drops += 1
            else:
                self._connections += 1
            yield path

    def _complete_until(self, now_ns: int | None) -> int | None:
        """Return the time before which the joiner has every leg."""
        if now_ns is None:
            return None
        return min(now_ns - QUIET_NS, self._assembler.open_since_ns or now_ns)


def live_paths(source: Source, wanted: Wanted, views: LiveViews, proxies: Proxies) -> PathPipeline:
    """Return a pipeline for live paths on one machine."""

    def cluster() -> Cluster | None:
        history = views.history()
        return history.now if history else None

    return PathPipeline(
        source,
        wanted,
        views,
        proxies=proxies,
        clock_ns=time.time_ns,
        window_ns=LIVE_WINDOW_NS,
        cluster=cluster,
    )
