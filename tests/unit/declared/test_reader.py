"""From segments to one record per connection, and nothing else of what was sent."""

import sys
from dataclasses import replace
from ipaddress import ip_address

from hypothesis import given
from hypothesis import strategies as st

from tests.unit import samples
from tests.unit.declared.test_opening import HTTP, TLS, V1
from tests.unit.samples import KTIME_NS, connection_bytes, segment_bytes
from tracer.declared.reader import _STREAMS, PATIENCE_NS, DeclaredReader
from tracer.decode import decode
from tracer.model import FiveTuple
from tracer.proxy_headers import Declared, Opening

FLOW = samples.SENT
CONNECTION = connection_bytes(samples.connection())
END, CUT = 1, 2


def forget(key):
    pass


def declared(records):
    return [each for each in map(decode, records) if isinstance(each, Declared)]


def read(reader, *records, now_ns=KTIME_NS):
    return declared(reader.read(records, now_ns))


def test_one_record_a_connection():
    """A header in three segments, out of order, is one record, at the time of the deciding one."""
    reader = DeclaredReader(forget)
    data = V1 + HTTP
    assert read(reader, CONNECTION, segment_bytes(FLOW, 60, data[60:])) == []
    assert read(reader, segment_bytes(FLOW, 0, data[:9])) == []
    (found,) = read(reader, segment_bytes(FLOW, 9, data[9:60], ktime_ns=KTIME_NS + 7))
    assert (found.flow, found.opening, found.ktime_ns) == (FLOW, Opening.HTTP, KTIME_NS + 7)
    assert [str(each) for each in found.clients] == ["192.0.2.1", "192.0.2.2", "198.51.100.7"]
    assert read(reader, segment_bytes(FLOW, 0, data), segment_bytes(FLOW, len(data), HTTP)) == []


def test_kernel_is_told():
    """Once a connection is decided, the kernel is told by the key of its own map."""
    told = []
    reader = DeclaredReader(told.append)
    read(reader, CONNECTION, segment_bytes(FLOW, 0, V1[:9]))
    assert told == []
    read(reader, segment_bytes(FLOW, 9, V1[9:] + TLS))
    key = samples.tuple_bytes(FLOW) + samples.NETNS.to_bytes(4, sys.byteorder) + bytes(4)
    assert told == [key]


def test_nothing_else_passes():
    """The output holds no byte of a path, a cookie or a body; other records pass unchanged."""
    reader = DeclaredReader(forget)
    drop = samples.drop_bytes(samples.drop())
    body = b"POST /secret-path HTTP/1.1\r\nCookie: secret\r\nX-Forwarded-For: secret\r\n\r\nsecret"
    passed = reader.read([CONNECTION, drop, segment_bytes(FLOW, 0, body)], KTIME_NS)
    assert passed[:2] == [CONNECTION, drop]
    assert len(passed) == 3
    assert b"secret" not in b"".join(passed)


def test_only_connections_that_are_told():
    """Segments of connections that were filtered out, or not seen, are not read."""
    reader = DeclaredReader(forget)
    assert read(reader, segment_bytes(FLOW, 0, HTTP)) == []
    other = replace(FLOW, sport=1)
    assert read(reader, CONNECTION, segment_bytes(other, 0, HTTP)) == []
    assert len(read(reader, segment_bytes(FLOW, 0, HTTP))) == 1


def test_ports_that_are_used_again():
    """The same ports again are a new connection, with a header of its own."""
    reader = DeclaredReader(forget)
    assert read(reader, CONNECTION, segment_bytes(FLOW, 0, V1[:9])) == []
    (found,) = read(reader, CONNECTION, segment_bytes(FLOW, 0, HTTP))
    assert found.opening is Opening.HTTP
    (found,) = read(reader, CONNECTION, segment_bytes(FLOW, 0, TLS))
    assert (found.opening, found.clients) == (Opening.OTHER, ())


def test_end_of_the_stream():
    """A peer that closes in the middle of a header is reported as cut."""
    reader = DeclaredReader(forget)
    (found,) = read(reader, CONNECTION, segment_bytes(FLOW, 0, V1[:9], flags=END))
    assert (found.opening, found.clients) == (Opening.CUT, ())


def test_kernel_stops():
    """If the kernel sends no more, the bytes that are there decide: one byte recognises TLS."""
    reader = DeclaredReader(forget)
    (found,) = read(reader, CONNECTION, segment_bytes(FLOW, 0, b"\x16", flags=CUT))
    assert found.opening is Opening.OTHER


def test_server_speaks_first():
    """A PROXY header with nothing after it is reported after a while: the server speaks first."""
    reader = DeclaredReader(forget)
    assert read(reader, CONNECTION, segment_bytes(FLOW, 0, V1)) == []
    assert read(reader, now_ns=KTIME_NS + PATIENCE_NS - 1) == []
    (found,) = read(reader, now_ns=KTIME_NS + PATIENCE_NS)
    assert (found.opening, found.ktime_ns) == (Opening.CUT, KTIME_NS + PATIENCE_NS)
    assert [each.address for each in found.clients] == [ip_address("198.51.100.7")]
    assert read(reader, now_ns=KTIME_NS + 9 * PATIENCE_NS) == []


def test_many_half_headers():
    """When too many peers send half a header and wait, the oldest is evicted and counted."""
    reader = DeclaredReader(forget)
    for n in range(_STREAMS + 3):
        flow = replace(FLOW, sport=n)
        record = connection_bytes(samples.connection(orig=flow))
        read(reader, record, segment_bytes(flow, 0, V1[:9]))
    assert reader.lost()["streams_evicted"] == 3
    assert len(reader._streams) == _STREAMS


def test_segments_without_sense():
    """A segment that cannot be read is counted."""
    reader = DeclaredReader(forget)
    broken = segment_bytes(FLOW, 0, V1)[:-1]
    assert read(reader, CONNECTION, broken) == []
    assert reader.lost()["undecodable"] == 1


@given(
    st.lists(
        st.tuples(
            st.integers(0, 1), st.integers(0, 9000), st.binary(max_size=50), st.integers(0, 3)
        )
    )
)
def test_any_segments(segments):
    """Whatever segments come, a connection has at most one record, and nothing raises."""
    reader = DeclaredReader(forget)
    flows = [FLOW, FiveTuple(src=FLOW.dst, dst=FLOW.src, sport=1, dport=2, proto=6)]
    records = [connection_bytes(samples.connection(orig=flow)) for flow in flows]
    records += [
        segment_bytes(flows[which], offset, payload, flags=flags)
        for which, offset, payload, flags in segments
    ]
    found = read(reader, *records)
    assert len(found) == len({each.flow for each in found})
