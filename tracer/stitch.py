"""Several recordings read as one: what their nodes tell, put together to whole paths."""

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from tracer.errors import RecordingError
from tracer.judge.assemble import QUIET_NS, Assembler
from tracer.judge.join import WINDOW_NS, Joiner
from tracer.judge.path import Path
from tracer.judge.verdict import Judged, SeenAccept, Summary
from tracer.pipeline import Pipeline, Wanted
from tracer.proxies import Proxies
from tracer.recording import RecordingSource
from tracer.views import FixedViews

# Records of several rings come in the order in which the rings were read, not that of time.
_DISORDER_NS = 1_000_000_000


class Stitcher:
    """
    Makes paths of recordings, which it reads side by side, by time.

    It holds what lies within the window and a batch of each recording, however long they are. One
    that is cut off or damaged is read up to there: `errors` says so.
    """

    def __init__(
        self,
        sources: Sequence[RecordingSource],
        wanted: Wanted,
        views: FixedViews,
        *,
        window_ns: int = WINDOW_NS,
        proxies: Proxies | None = None,
    ) -> None:
        """
        Args:
            sources: The recordings, their clocks corrected. The caller closes them.
            wanted: Which paths to show: what holds for one of their nodes holds for them.
            views: The cluster's objects; the places are each recording's own.
            window_ns: How far the times of two nodes may lie apart.
            proxies: Which proxies are trusted, and what is known of them.
        """
        proxies = proxies or Proxies()
        self.errors: list[RecordingError] = []
        self._wanted = wanted
        self._streams = [
            _Stream(source, views, proxies, number)
            for number, source in enumerate(sources, start=1)
        ]
        self._joiner = Joiner(window_ns, cluster=lambda: views.cluster)

    def paths(self) -> Iterator[list[Path]]:
        """Yield the wanted paths as they become whole, in lists; some are empty."""
        # The one that is furthest behind is read next.
        behind = [(0, stream.number, stream) for stream in self._streams]
        while behind:
            _, _, stream = heapq.heappop(behind)
            try:
                is_over = not stream.read(self._joiner)
            except RecordingError as error:
                self.errors.append(error)
                is_over = True
            if is_over:
                stream.end(self._joiner)
            else:
                heapq.heappush(behind, (stream.latest_ns, stream.number, stream))
            known_ns = min((each.known_ns for _, _, each in behind), default=None)
            found = self._joiner.take(known_ns)
            yield [path for path in found if self._wanted.has_path(path)]

    def summary(self) -> Summary:
        """Add up what was lost and could not be seen; what was shown the caller knows."""
        summaries = [stream.pipeline.summary() for stream in self._streams]
        lost: Counter[str] = Counter()
        for each in summaries:
            lost.update(each.lost)
        for told in (self._joiner.lost(), *(stream.lost() for stream in self._streams)):
            lost.update({name: count for name, count in told.items() if count})
        not_seen = [str(error) for error in self.errors]
        not_seen += [line for each in summaries for line in each.not_seen]
        return Summary(
            connections=0,
            drops=0,
            lost=lost,
            not_seen=tuple(dict.fromkeys(not_seen)),
        )

    @property
    def told_twice(self) -> int:
        """How many connections of a node stood in two recordings."""
        return self._joiner.told_twice


class _Stream:
    """One recording on its way to the joiner."""

    def __init__(
        self, source: RecordingSource, views: FixedViews, proxies: Proxies, number: int
    ) -> None:
        self.number = number
        # What a connection is on the next node no filter knows: paths are filtered when whole.
        self.pipeline = Pipeline(
            source,
            Wanted(are_stray_accepts=True),
            replace(views, places=source.places),
            proxies=proxies,
        )
        self.latest_ns = 0
        self._source = source
        self._assembler = Assembler()

    @property
    def known_ns(self) -> int:
        """Up to when all its legs are with the joiner."""
        quiet_ns = self.latest_ns - QUIET_NS - _DISORDER_NS - self.pipeline.delay_ns
        return min(quiet_ns, self._assembler.open_since_ns or quiet_ns)

    def lost(self) -> dict[str, int]:
        """Count what was left out or told too early, by reason."""
        return self._assembler.lost()

    def read(self, joiner: Joiner) -> bool:
        """
        Hand over the next batch; return whether there is more.

        Raises:
            RecordingError: If the recording is cut off or damaged here.
        """
        records = self._source.read(0)
        if records is None:
            return False
        self._add(self.pipeline.judge(records), joiner)
        for leg in self._assembler.take(self.latest_ns - self.pipeline.delay_ns):
            joiner.add(leg, teller=self.number)
        return True

    def end(self, joiner: Joiner) -> None:
        """Hand over what is left."""
        self._add(self.pipeline.rest(), joiner)
        for leg in self._assembler.take():
            joiner.add(leg, teller=self.number)

    def _add(self, found: Iterable[Judged], joiner: Joiner) -> None:
        for judged in found:
            # Not the latest of all: one record with a wrong time is not to hold up this recording.
            self.latest_ns = judged.time_ns
            if isinstance(judged, SeenAccept):
                joiner.add_accept(judged)
            else:
                self._assembler.add(judged)
