"""How far the clocks of recorded nodes differ, measured by connections that crossed two nodes."""

import statistics
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tracer.judge.join import TWICE_NS
from tracer.model import ICMP, ICMPV6, Hook
from tracer.source import SourceInfo
from tracer.wire import Kind, WireConnection, WireHeader, WireTuple

# Ignore smaller differences: they may be transit time, or scheduling before a record is written.
_NOTICED_NS = 10_000_000
# Trust a difference only if so many pairs show it and most agree within so much: otherwise it may
# come from tuples that were used again later.
_PAIRS, _AGREE_NS = 3, 1_000_000_000
# How many tuples to remember: about 16 MiB.
_ROOM = 32_768
_SEEN = 8

Records = Callable[[], Iterable[list[bytes]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Clocks:
    """What to add to each node's times, in nanoseconds, and notes on how it was measured."""

    offsets_ns: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def of(self, info: SourceInfo) -> int:
        """Return the offset to add to a recording's times, in nanoseconds."""
        return next((self.offsets_ns[n] for n in info.nodes.values() if n in self.offsets_ns), 0)


def compare(
    recordings: Sequence[tuple[SourceInfo, Records]], known_ns: Mapping[str, int]
) -> Clocks:
    """
    Compare the clocks of recordings.

    A connection whose tuple was sent once by one node and received once by another shows how their
    clocks differ; the median of many is right even if some tuples were used again later. To bound
    memory, only a sample of the tuples is compared, the same sample in each recording.

    Args:
        recordings: Each recording's info, and a function that yields its records in batches. It is
            called once.
        known_ns: Offsets that the user gave, by node. They are kept, and the others adapt to them.
    """
    clocks = _groups(info for info, _ in recordings)
    sample = _Sample()
    for info, records in recordings:
        names = {netns: (clocks[node], node) for netns, node in info.nodes.items()}
        own_ns = next((known_ns[n] for n in info.nodes.values() if n in known_ns), 0)
        for batch in records():
            for record in batch:
                sample.add(record, names, info.clock_offset_ns + own_ns)
    return _spread(clocks, sample.differences(), known_ns)


def _groups(infos: Iterable[SourceInfo]) -> dict[str, str]:
    """Return the name of each node's clock: nodes of one recording share a clock."""
    clocks: dict[str, str] = {}
    for info in infos:
        nodes = sorted(info.nodes.values())
        shared = {clocks[node] for node in nodes if node in clocks} | set(nodes[:1])
        for node in [*nodes, *(n for n, clock in clocks.items() if clock in shared)]:
            clocks[node] = min(shared)
    return clocks


_Place = tuple[str, str, int]  # clock, node, namespace


class _Sample:
    """A sample of all recordings' tuples, and which node sent and received each when."""

    def __init__(self) -> None:
        self._mask = 0
        # None for tuples that were seen too often to be useful.
        self._seen: dict[bytes, list[tuple[bool, _Place, int]] | None] = {}

    def add(self, record: bytes, names: Mapping[int, tuple[str, str]], offset_ns: int) -> None:
        """Add a record; skip those that are not connections, or are damaged."""
        if len(record) != _SIZE or record[_KIND] != Kind.CONNECTION or record[_HOOK] in _TIMELESS:
            return
        if record[_PROTO] in (ICMP, ICMPV6):
            return  # not worth inverting its types here
        header = WireHeader.from_buffer_copy(record)
        name = names.get(header.netns)
        if name is None:
            return
        place, time_ns = (*name, header.netns), header.ktime_ns + offset_ns
        reply = record[_REPLY]
        inverted = reply[16:32] + reply[:16] + reply[34:36] + reply[32:34] + reply[36:]
        for is_received, key in ((True, record[_ORIG]), (False, inverted)):
            if not zlib.crc32(key) & self._mask:
                self._see(key, (is_received, place, time_ns))

    def differences(self) -> dict[tuple[str, str], list[int]]:
        """Return for each pair of clocks the differences that its connections show, in ns."""
        found: dict[tuple[str, str], list[int]] = {}
        for seen in self._seen.values():
            received = [each for each in seen or () if each[0]]
            if len(received) != 1:
                continue
            ((_, there, received_ns),) = received
            sent = [each for each in seen or () if not each[0] and each[1] != there]
            if len(sent) != 1:
                continue
            ((_, here, sent_ns),) = sent
            if here[0] != there[0]:
                found.setdefault((here[0], there[0]), []).append(received_ns - sent_ns)
                found.setdefault((there[0], here[0]), []).append(sent_ns - received_ns)
        return found

    def _see(self, key: bytes, sighting: tuple[bool, _Place, int]) -> None:
        seen = self._seen.setdefault(key, [])
        if seen is None:
            return
        for is_received, place, time_ns in seen:
            if (is_received, place) == sighting[:2]:
                if abs(time_ns - sighting[2]) > TWICE_NS:
                    self._seen[key] = None
                return
        seen.append(sighting)
        if len(seen) > _SEEN:
            self._seen[key] = None
        while len(self._seen) > _ROOM:
            self._mask = self._mask << 1 | 1
            self._seen = {k: v for k, v in self._seen.items() if not zlib.crc32(k) & self._mask}


def _spread(
    clocks: Mapping[str, str],
    differences: Mapping[tuple[str, str], list[int]],
    known_ns: Mapping[str, int],
) -> Clocks:
    """Set each clock by one already set, first those that share the most connections with it."""
    ahead = {pair: _median(found) for pair, found in differences.items() if _is_reliable(found)}
    known = {clocks[node]: known_ns[node] for node in known_ns if node in clocks}
    moved, notes = dict.fromkeys(known, 0), []
    for root in (None, *sorted(set(clocks.values()))):
        if root is not None:
            moved.setdefault(root, 0)
        while pairs := [pair for pair in ahead if pair[0] in moved and pair[1] not in moved]:
            here, there = pair = min(pairs, key=lambda each: (-len(differences[each]), each))
            by_ns = ahead[pair] if abs(ahead[pair]) >= _NOTICED_NS else 0
            moved[there] = moved[here] - by_ns
            if by_ns:
                notes.append(_note(here, there, by_ns, len(differences[pair])))
    shifts = {clock: known.get(clock, 0) + by_ns for clock, by_ns in moved.items()}
    return Clocks(
        offsets_ns={node: shifts[clock] for node, clock in clocks.items() if shifts[clock]},
        notes=tuple(notes),
    )


def _is_reliable(found: Sequence[int]) -> bool:
    middle = _median(found)
    agree = sum(abs(each - middle) <= _AGREE_NS for each in found)
    return len(found) >= _PAIRS and 2 * agree > len(found)


def _median(found: Sequence[int]) -> int:
    return statistics.median_low(found)


def _note(here: str, there: str, ahead_ns: int, connections: int) -> str:
    how = "ahead of" if ahead_ns > 0 else "behind"
    return (
        f"the clock of {there} was {abs(ahead_ns) / 1e9:.3f} s {how} that of {here} (measured by "
        f"{connections} connections); its times were corrected"
    )


# Offsets of the parts of a record.
_SIZE = WireConnection.pad.offset + WireConnection.pad.size
_KIND = WireHeader.kind.offset
_HOOK = WireConnection.hook.offset
_ORIG = slice(WireConnection.orig.offset, WireConnection.orig.offset + WireConnection.orig.size)
_REPLY = slice(WireConnection.reply.offset, WireConnection.reply.offset + WireConnection.reply.size)
_PROTO = WireConnection.orig.offset + WireTuple.proto.offset
# Connections read from conntrack's table have the time of reading, not of the packet.
_TIMELESS = (Hook.CONNTRACK,)
