"""Join several recordings, of different nodes, into whole paths."""

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from tracer.decode import ktime_of
from tracer.errors import RecordingError
from tracer.judge.assemble import QUIET_NS, Assembler
from tracer.judge.join import WINDOW_NS, Joiner
from tracer.judge.path import Path
from tracer.judge.verdict import Judged, SeenAccept, Summary
from tracer.pipeline import Pipeline, Wanted
from tracer.proxies import Proxies
from tracer.recording import RecordingSource
from tracer.views import FixedViews

# Records of different rings are stored in the order of reading, not of time.
_DISORDER_NS = 1_000_000_000


class Stitcher:
    """
    Joins recordings into paths, reading them side by side in order of time.

    Memory holds what is within the window and one batch of each recording, however long they are. A
    truncated or damaged recording is read up to that point, and `errors` says so.
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
            sources: The recordings, with corrected clocks. The caller closes them.
            wanted: Which paths to show; a path matches if one of its nodes does.
            views: The cluster's objects; the places are each recording's own.
            window_ns: How far apart the times of two nodes may be.
            proxies: Which proxies are trusted, and what is known about them.
        """
        proxies = proxies or Proxies()
        self.errors: list[RecordingError] = []
        self._wanted = wanted
        self._streams = [
            _Stream(source, views, proxies, number)
            for number, source in enumerate(sources, start=1)
        ]
        self._joiner = Joiner(window_ns, cluster=lambda: views.cluster)
        # Proxies learn on one node what the next needs, so records must be read in order of time.
        self._is_in_step = any(source.info.has_proxy_headers for source in sources)

    def paths(self) -> Iterator[list[Path]]:
        """Yield the wanted paths as they become complete, in lists; some are empty."""
        # Always read the recording that is furthest behind.
        behind = [(0, stream.number, stream) for stream in self._streams]
        while behind:
            _, _, stream = heapq.heappop(behind)
            until_ns = behind[0][0] if behind and self._is_in_step else None
            try:
                is_over = not stream.read(self._joiner, until_ns)
            except RecordingError as error:
                self.errors.append(error)
                is_over = True
            if is_over:
                stream.end(self._joiner)
            else:
                heapq.heappush(behind, (stream.next_ns, stream.number, stream))
            if stream.has_more_at_hand:
                continue
            known_ns = min((each.known_ns for _, _, each in behind), default=None)
            found = self._joiner.take(known_ns)
            yield [path for path in found if self._wanted.has_path(path)]

    def summary(self) -> Summary:
        """Sum up what was lost and not seen; the caller counts what it showed."""
        summaries = [stream.pipeline.summary() for stream in self._streams]
        lost: Counter[str] = Counter()
        for each in summaries:
            lost.update(each.lost)
        for counts in (self._joiner.lost(), *(stream.lost() for stream in self._streams)):
            lost.update({name: count for name, count in counts.items() if count})
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
        """How many connections were in two recordings of one node."""
        return self._joiner.told_twice


class _Stream:
    """One recording on its way to the joiner."""

    def __init__(
        self, source: RecordingSource, views: FixedViews, proxies: Proxies, number: int
    ) -> None:
        self.number = number
        # Paths are filtered when complete: on the next node the filter may not match a connection.
        self.pipeline = Pipeline(
            source,
            Wanted(are_stray_accepts=True),
            replace(views, places=source.places),
            proxies=proxies,
        )
        self.latest_ns = 0
        self._source = source
        self._at_hand: list[bytes] = []
        self._assembler = Assembler()

    @property
    def known_ns(self) -> int:
        """The time up to which the joiner has all its legs."""
        quiet_ns = self.latest_ns - QUIET_NS - _DISORDER_NS - self.pipeline.delay_ns
        return min(quiet_ns, self._assembler.open_since_ns or quiet_ns)

    @property
    def has_more_at_hand(self) -> bool:
        """Whether part of its last batch is still to be read."""
        return bool(self._at_hand)

    @property
    def next_ns(self) -> int:
        """The time of its next record if that is known, else of its latest."""
        return self._time_ns(self._at_hand[0]) if self._at_hand else self.latest_ns

    def lost(self) -> dict[str, int]:
        """Return what the assembler left out or ended too early, by reason."""
        return self._assembler.lost()

    def read(self, joiner: Joiner, until_ns: int | None) -> bool:
        """
        Pass on the next batch, or the part of it up to a time, but at least one record.

        Returns:
            Whether there is more.

        Raises:
            RecordingError: If the recording is truncated or damaged here.
        """
        records = self._at_hand or self._source.read(0)
        if records is None:
            return False
        count = len(records) if until_ns is None else self._count(records, until_ns)
        self._at_hand = records[count:]
        self._add(self.pipeline.judge(records[:count]), joiner)
        if self._at_hand:
            return True
        for leg in self._assembler.take(self.latest_ns - self.pipeline.delay_ns):
            joiner.add(leg, teller=self.number)
        return True

    def end(self, joiner: Joiner) -> None:
        """Pass on what is left."""
        self._add(self.pipeline.rest(), joiner)
        for leg in self._assembler.take():
            joiner.add(leg, teller=self.number)

    def _count(self, records: list[bytes], until_ns: int) -> int:
        """Return how many records are not later than a time, but at least 1."""
        later = (i for i, raw in enumerate(records) if i and self._time_ns(raw) > until_ns)
        return next(later, len(records))

    def _time_ns(self, record: bytes) -> int:
        return ktime_of(record) + self._source.info.clock_offset_ns

    def _add(self, found: Iterable[Judged], joiner: Joiner) -> None:
        for judged in found:
            # Not the maximum: one record with a wrong time must not hold up this recording.
            self.latest_ns = judged.time_ns
            if isinstance(judged, SeenAccept):
                joiner.add_accept(judged)
            else:
                self._assembler.add(judged)
