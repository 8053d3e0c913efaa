"""A run that shows whole paths: what the pipeline judges, put together over packets and nodes."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from tracer.judge.assemble import Assembler
from tracer.judge.join import Joiner
from tracer.judge.path import Path
from tracer.judge.verdict import SeenAccept, Summary, Verdict
from tracer.pipeline import Pipeline, Wanted
from tracer.source import Source
from tracer.views import Views


class PathPipeline:
    """Makes paths of what one source delivers. Used as a `Pipeline` is."""

    def __init__(
        self,
        source: Source,
        wanted: Wanted | None = None,
        views: Views | None = None,
        *,
        clock_ns: Callable[[], int] | None = None,
    ) -> None:
        """
        Args:
            source: Where records come from.
            wanted: Which paths to show: what holds for one of their nodes holds for them.
            views: What surrounds the connections.
            clock_ns: Unix time, by which a path is whole; without one the records' own.
        """
        self._wanted = wanted or Wanted()
        # What a connection is on the next node no filter knows: paths are filtered when whole.
        self._pipeline = Pipeline(source, Wanted(are_stray_accepts=True), views)
        self._assembler = Assembler()
        self._joiner = Joiner()
        self._clock_ns = clock_ns
        self._latest_ns = 0
        self._connections = self._drops = 0

    def judge(self, records: Iterable[bytes]) -> Iterator[Path]:
        """Yield the wanted paths that are whole once these records are taken in."""
        for judged in self._pipeline.judge(records):
            self._latest_ns = max(self._latest_ns, judged.time_ns)
            if isinstance(judged, SeenAccept):
                self._joiner.add_accept(judged)
            else:
                self._assembler.add(judged)
        yield from self._take(self._clock_ns() if self._clock_ns else self._latest_ns)

    def finish(self) -> Iterator[Path]:
        """Yield the rest, whole or not."""
        yield from self._take(None)

    def summary(self) -> Summary:
        """Add up the run so far: paths that arrived, and paths that ended in a drop."""
        return replace(self._pipeline.summary(), connections=self._connections, drops=self._drops)

    def _take(self, now_ns: int | None) -> Iterator[Path]:
        for leg in self._assembler.take(now_ns):
            self._joiner.add(leg)
        for path in self._joiner.take(now_ns):
            if not self._has(path):
                continue
            if path.verdict is Verdict.DROPPED:
                self._drops += 1
            else:
                self._connections += 1
            yield path

    def _has(self, path: Path) -> bool:
        wanted, opinion = self._wanted, path.deciding.opinion
        is_judged = wanted.verdicts or wanted.causes or wanted.services
        if is_judged and (opinion is None or not wanted.has_opinion(opinion)):
            return False
        flows = wanted.flows
        return flows.is_empty or any(
            flows.matches_tuples(leg.orig, leg.reply)
            if leg.reply is not None
            else flows.matches_packet(leg.orig)
            for leg in path.legs
        )
