"""The pipeline of a run: decodes, judges, filters and counts a source's records."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from tracer.decode import Record, decode
from tracer.errors import DecodeError
from tracer.filter import Filter
from tracer.judge.cause import Cause
from tracer.judge.connection import judge_connection
from tracer.judge.drop import judge_drop
from tracer.judge.hop import see_hop
from tracer.judge.path import Path
from tracer.judge.verdict import (
    Judged,
    JudgedConnection,
    JudgedDrop,
    Opinion,
    SeenAccept,
    SeenHop,
    ServiceRef,
    Summary,
    Verdict,
)
from tracer.judge.view import View
from tracer.model import Accept, Connection, Drop, FiveTuple, Hop
from tracer.proxies import Proxies
from tracer.proxy_headers import Declared
from tracer.source import Source
from tracer.undecodable import Undecodable
from tracer.views import FixedViews, Views
from tracer.waiting import PATIENCE_NS, Ready, Waiting, must_wait

# How many connections to remember, to recognize their accepts, which follow within a round trip.
_REMEMBERED = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """
    What a run shows. Empty fields match everything. The kernel also applies ``flows``;
    ``services`` are pairs of namespace and name.

    ``are_stray_accepts`` keeps accepts that belong to no shown connection: those of other
    namespaces, and of connections that the filter excludes.
    """

    flows: Filter = field(default_factory=Filter)
    verdicts: frozenset[Verdict] = frozenset()
    causes: frozenset[Cause] = frozenset()
    services: frozenset[tuple[str, str]] = frozenset()
    are_stray_accepts: bool = False

    @property
    def has_connections(self) -> bool:
        """Whether any connection can be wanted, not only drops."""
        return self.verdicts != {Verdict.DROPPED} or self.are_stray_accepts

    def has(self, judged: JudgedConnection | JudgedDrop) -> bool:
        """Whether a judged connection or drop is wanted."""
        return self.has_opinion(judged.opinion)

    def has_opinion(self, opinion: Opinion) -> bool:
        """Whether an opinion's verdict, cause and Service are wanted."""
        return (
            (not self.verdicts or opinion.verdict in self.verdicts)
            and (not self.causes or opinion.cause in self.causes)
            and (not self.services or _key(opinion.service) in self.services)
        )

    def has_path(self, path: Path) -> bool:
        """Whether a path is wanted, by its verdict, and by the tuples on one of its nodes."""
        # A deciding node without an opinion leaves only the path's verdict.
        opinion = path.deciding.opinion or Opinion(verdict=path.verdict)
        if not self.has_opinion(opinion):
            return False
        flows = self.flows
        return flows.is_empty or any(
            flows.matches_tuples(leg.orig, leg.reply)
            if leg.reply is not None
            else flows.matches_packet(leg.orig)
            for leg in path.legs
        )


def _key(service: ServiceRef | None) -> tuple[str, str] | None:
    return (service.namespace, service.name) if service else None


class Selection:
    """
    Selects what is wanted from judged things, given in order.

    ``remembered`` is how many of the latest connections to remember, to recognize their accepts.
    """

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.remembered = _REMEMBERED
        self._shown: OrderedDict[FiveTuple, None] = OrderedDict()

    def takes(self, judged: Judged) -> bool:
        """Whether a judged thing is wanted; an accept is if its connection was."""
        flows = self.wanted.flows
        match judged:
            case JudgedConnection():
                is_wanted = flows.matches(judged.connection) and self.wanted.has(judged)
                if is_wanted and not self.wanted.are_stray_accepts:
                    self._remember(judged.connection.reply.inverted)
                return is_wanted
            case JudgedDrop():
                if not self.wanted.has(judged):
                    return False
                tuples = (judged.drop.packet, judged.drop.orig)
                return flows.is_empty or any(flow and flows.matches_packet(flow) for flow in tuples)
            case SeenAccept():
                return self.wanted.are_stray_accepts or judged.accept.peer in self._shown
            case SeenHop():
                # Which connection it belongs to is known only when paths are assembled.
                return True

    def _remember(self, peer: FiveTuple) -> None:
        self._shown[peer] = None
        self._shown.move_to_end(peer)
        while len(self._shown) > self.remembered:
            self._shown.popitem(last=False)


def losses_and_notes(lost: Mapping[str, int]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Separate losses from what was not to be seen in the first place, the latter as lines."""
    losses = dict(lost)
    untracked = losses.pop("untracked", 0)
    over_limit = losses.pop("over_limit", 0)
    lines = []
    if untracked:
        lines.append(f"{untracked} packets that conntrack was told not to track (NOTRACK)")
    if over_limit:
        lines.append(f"{over_limit} packets past the first of their direction (--packets)")
    return losses, tuple(lines)


class Pipeline:
    """
    Judges what one source delivers.

    If the source reads proxies' headers, a TCP connection is judged once its first bytes have been
    read, or after a time-out.
    """

    def __init__(
        self,
        source: Source,
        wanted: Wanted | None = None,
        views: Views | None = None,
        *,
        proxies: Proxies | None = None,
        clock: Callable[[], int] | None = None,
    ) -> None:
        """
        Args:
            source: Where records come from.
            wanted: What to show; by default everything.
            views: The views of the traced namespaces.
            proxies: Which proxies are trusted, and what is known about them.
            clock: The current time in ns, on the records' clock; None for a recording, where the
                records' own times serve as the clock.
        """
        self._source = source
        self._views = views or FixedViews()
        self._selection = Selection(wanted or Wanted())
        self._undecodable = Undecodable("record")
        self._counts: Counter[type[Judged]] = Counter()
        self._proxies = proxies or Proxies()
        self._clock = clock
        self._waiting = Waiting() if source.info.has_proxy_headers else None

    def judge(self, records: Iterable[bytes]) -> Iterator[Judged]:
        """Judge records, and yield what is wanted. Counts what cannot be decoded."""
        self._views.refresh()
        for raw in records:
            try:
                record = decode(raw)
            except DecodeError as error:
                self._undecodable.add(str(error))
                continue
            yield from self._count(self._next(record))
        if self._waiting is not None and self._clock is not None:
            yield from self._count(self._all_ready(self._waiting.over(self._clock())))

    def rest(self) -> Iterator[Judged]:
        """Yield what was held back: connections whose first bytes did not arrive."""
        if self._waiting is not None:
            yield from self._count(self._all_ready(self._waiting.rest()))

    @property
    def delay_ns(self) -> int:
        """How much later than its record a judged thing may be yielded, in ns."""
        return 0 if self._waiting is None else PATIENCE_NS

    def summary(self) -> Summary:
        """Sum up the run so far."""
        lost, untracked = losses_and_notes(self._source.lost())
        lost["undecodable"] = lost.get("undecodable", 0) + self.undecodable
        late = self._waiting.notes() if self._waiting is not None else ()
        return Summary(
            connections=self._counts[JudgedConnection],
            drops=self._counts[JudgedDrop],
            lost=lost,
            not_seen=(*self._source.info.not_seen, *self._views.notes(), *untracked, *late),
        )

    @property
    def undecodable(self) -> int:
        """How many records could not be decoded."""
        return self._undecodable.total

    def _count(self, found: Iterator[Judged]) -> Iterator[Judged]:
        for judged in found:
            if self._selection.takes(judged):
                self._counts[type(judged)] += 1
                yield judged

    def _next(self, record: Record) -> Iterator[Judged]:
        """Judge a record, or hold it back; also judge what has waited long enough."""
        waiting = self._waiting
        if waiting is None:
            yield from self._judge(record)
            return
        yield from self._all_ready(waiting.over(record.ktime_ns))
        match record:
            case Connection() if must_wait(record):
                yield from self._all_ready(waiting.hold(record))
            case Declared():
                yield from self._all_ready(waiting.declare(record))
            case Accept() if waiting.take_accept(record):
                pass
            case _:
                yield from self._judge(record)

    def _all_ready(self, found: Iterator[Ready]) -> Iterator[Judged]:
        for ready in found:
            yield from self._judge(ready.connection, ready.declared)
            for accept in ready.accepts:
                yield from self._judge(accept)

    def _judge(self, record: Record, declared: Declared | None = None) -> Iterator[Judged]:
        info = self._source.info
        time_ns = record.ktime_ns + info.clock_offset_ns
        node = info.nodes.get(record.netns, f"netns {record.netns}")

        def view() -> View:
            return self._views.at(record.netns, node, record.ktime_ns)

        match record:
            case Connection():
                word = self._proxies.word(record, declared, time_ns) if self._waiting else None
                yield judge_connection(record, view(), time_ns=time_ns, word=word)
            case Drop():
                yield judge_drop(
                    record,
                    view(),
                    time_ns=time_ns,
                    reason=info.drop_reasons.get(record.reason, f"reason {record.reason}"),
                    place=self._symbol(record.location),
                    dst_input=self._symbol(record.dst_input),
                )
            case Accept():
                yield SeenAccept(accept=record, time_ns=time_ns)
            case Declared():
                pass  # shown with its connection, if at all
            case Hop():
                yield see_hop(record, view(), time_ns=time_ns)

    def _symbol(self, address: int | None) -> str | None:
        return self._source.symbol(address) if address else None
