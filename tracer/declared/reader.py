"""Turns segments of connections into what they declare. Nothing else of their bytes is kept."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping

from tracer.declared.opening import read_opening
from tracer.declared.stream import Stream
from tracer.decode import decode_segment
from tracer.encode import encode_declared
from tracer.errors import DecodeError
from tracer.model import TCP
from tracer.proxy_headers import Declared, Segment
from tracer.wire import (
    Kind,
    WireConnection,
    WireHeader,
    WireSegment,
    WireStreamKey,
    WireTuple,
)

# After this time what has come is parsed as it is: a peer may send half a header, or nothing after
# its PROXY header because the server speaks first.
PATIENCE_NS = 1_000_000_000
# Connections that wait for their first bytes, and those with some bytes: 8 KiB each, 16 at worst.
_EXPECTED = 16384
_STREAMS = 1024
_KIND = WireHeader.kind.offset
_NETNS = slice(WireHeader.netns.offset, WireHeader.netns.offset + WireHeader.netns.size)
_ORIG = slice(WireConnection.orig.offset, WireConnection.orig.offset + WireConnection.orig.size)
_FLOW = slice(WireSegment.flow.offset, WireSegment.flow.offset + WireSegment.flow.size)
_KEY_PAD = bytes(WireStreamKey.pad.size)
_PROTO = WireConnection.orig.offset + WireTuple.proto.offset


class DeclaredReader:
    """
    Replaces the segments among a source's records by what they declare, one record per connection.

    Only connections that the source also delivers are read, so its filter applies to both.
    """

    def __init__(self, forget: Callable[[bytes], None]) -> None:
        """
        Args:
            forget: Called with ``struct srcip_stream_key`` of each finished connection: the kernel
                can stop sending its segments.
        """
        self._forget = forget
        self._expected: OrderedDict[bytes, None] = OrderedDict()
        self._streams: OrderedDict[bytes, tuple[Stream, Segment]] = OrderedDict()
        self._evicted = self._undecodable = 0

    def read(self, records: Iterable[bytes], now_ns: int) -> list[bytes]:
        """
        Read a batch, in order of time.

        Args:
            records: The batch, segments included.
            now_ns: The current time on the records' clock, to give up on late bytes.
        """
        return [*self._replace(records), *self._give_up(now_ns)]

    def lost(self) -> Mapping[str, int]:
        """Count connections whose first bytes could not be kept, and undecodable segments."""
        return {"streams_evicted": self._evicted, "undecodable": self._undecodable}

    def _replace(self, records: Iterable[bytes]) -> Iterator[bytes]:
        for record in records:
            kind = record[_KIND]
            if kind == Kind.SEGMENT:
                yield from self._segment(record)
                continue
            if kind == Kind.CONNECTION and record[_PROTO] == TCP:
                self._expect(record[_ORIG] + record[_NETNS] + _KEY_PAD)
            yield record

    def _expect(self, key: bytes) -> None:
        # The same ports again mean a new connection.
        self._streams.pop(key, None)
        self._expected[key] = None
        self._expected.move_to_end(key)
        if len(self._expected) > _EXPECTED:
            oldest, _ = self._expected.popitem(last=False)
            self._evicted += self._streams.pop(oldest, None) is not None

    def _segment(self, record: bytes) -> Iterator[bytes]:
        key = record[_FLOW] + record[_NETNS] + _KEY_PAD
        if key not in self._expected:
            return
        try:
            segment = decode_segment(record)
        except DecodeError:
            self._undecodable += 1
            return
        stream, _ = self._streams.setdefault(key, (Stream(), segment))
        has_more = stream.add(segment.offset, segment.payload, is_end=segment.is_end)
        is_all = stream.is_all or segment.is_cut
        if has_more or is_all:
            yield from self._conclude(key, stream, segment, segment.ktime_ns, is_all=is_all)
        if len(self._streams) > _STREAMS:
            oldest, _ = self._streams.popitem(last=False)
            del self._expected[oldest]
            self._evicted += 1

    def _give_up(self, now_ns: int) -> Iterator[bytes]:
        for key, (stream, first) in list(self._streams.items()):
            if now_ns - first.ktime_ns < PATIENCE_NS:
                return
            yield from self._conclude(key, stream, first, now_ns, is_all=True)

    def _conclude(
        self, key: bytes, stream: Stream, segment: Segment, ktime_ns: int, *, is_all: bool
    ) -> Iterator[bytes]:
        found = read_opening(stream.data, is_all=is_all)
        if found is None:
            return
        del self._streams[key], self._expected[key]
        self._forget(key)
        yield encode_declared(
            Declared(
                ktime_ns=ktime_ns,
                netns=segment.netns,
                flow=segment.flow,
                opening=found.opening,
                clients=found.clients,
                has_more=found.has_more,
            )
        )
