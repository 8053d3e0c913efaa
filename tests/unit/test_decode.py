"""Records written out byte by byte, so that a change of layout cannot hide."""

import sys
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit import samples
from tracer.decode import decode, decode_path_key, decode_segment
from tracer.encode import encode_connection, encode_declared
from tracer.errors import DecodeError
from tracer.model import (
    Accept,
    AddressFlag,
    ClientClass,
    Connection,
    Drop,
    FiveTuple,
    Hook,
    Hop,
    PathKey,
    Status,
)
from tracer.proxy_headers import ClientForm, Declared, DeclaredClient, Opening, ProxyHeader, Segment


def host(value, size):
    return value.to_bytes(size, sys.byteorder)


def record_header(size, kind, version=1):
    return (
        host(3_600_123_456_789, 8)  # u64 ktime_ns
        + host(4026532001, 4)  # u32 netns
        + host(size, 2)  # u16 size
        + bytes([version, kind])  # u8 version, kind
    )


SENT = (
    bytes.fromhex("00000000000000000000ffffc633640a")  # u8 src[16]
    + bytes.fromhex("00000000000000000000ffff0af00005")  # u8 dst[16]
    + host(46356, 2)  # u16 sport
    + host(30080, 2)  # u16 dport
    + b"\x06\x02\0\0"  # u8 proto, family, pad[2]
)
ANSWERED = (
    bytes.fromhex("00000000000000000000ffff0af4010b")
    + bytes.fromhex("00000000000000000000ffff0af00005")
    + host(8080, 2)
    + host(65241, 2)
    + b"\x06\x02\0\0"
)
ANSWERED6 = (
    bytes.fromhex("fd000244000100000000000000000011")
    + bytes.fromhex("fd000240000000000000000000000005")
    + host(8080, 2)
    + host(65241, 2)
    + b"\x06\x0a\0\0"
)
CONNECTION = (
    record_header(128, 1)
    + SENT
    + ANSWERED6
    + host(0x1BE, 4)  # u32 status
    + host(0x4000, 4)  # u32 mark
    + host(42, 4)  # u32 ct_mark
    + host(2, 4)  # u32 iif
    + host(3, 4)  # u32 oif
    + host(7, 2)  # u16 zone
    + b"\x03"  # u8 zone_dir
    + b"\x05"  # u8 hook
    + b"\x01"  # u8 flags
    + bytes(7)
)
DROP = (
    record_header(136, 2)
    + SENT
    + bytes(40)
    + host(0xFFFFFFFF81000000, 8)  # u64 location
    + host(0xFFFFFFFF82000000, 8)  # u64 dst_input
    + host(8, 4)  # u32 reason
    + host(0x8000, 4)  # u32 mark
    + host(4, 4)  # u32 ifindex
    + host(5, 4)  # u32 iif
    + host(6, 4)  # u32 dst_ifindex
    + b"\x15"  # u8 flags: HAS_TUPLE, HAS_DST, IS_NEW
    + b"\x03"  # u8 zone_dir
    + host(7, 2)  # u16 zone
)
ACCEPT = record_header(56, 3) + ANSWERED6
PATH_KEY = (
    bytes.fromhex("00000000000000000000ffff0af00005")  # u8 dst[16]
    + bytes.fromhex("00000000000000000000ffff0af4010b")  # u8 backend[16]
    + bytes.fromhex("00000000000000000000ffff0af00006")  # u8 seen[16]
    + host(4026532001, 4)  # u32 netns
    + host(30080, 2)  # u16 dport
    + host(8080, 2)  # u16 backend_port
    + host(7, 2)  # u16 zone
    + b"\x06\x02"  # u8 proto, family
    + b"\x00\x02"  # u8 client_class, dst_class
    + b"\x57"  # u8 flags: SNAT, DNAT, MARKED, HAS_MARK, SRC_NAT
    + b"\x02"  # u8 client_flags: CLUSTER
)
HOP = (
    record_header(168, 4)
    + SENT
    + SENT
    + ANSWERED
    + host(0xFFFF_8881_0000_1200, 8)  # u64 packet_id
    + host(0x4000, 4)  # u32 mark
    + host(2, 4)  # u32 iif
    + host(3, 4)  # u32 oif
    + host(60, 4)  # u32 length
    + host(1, 2)  # u16 number
    + bytes([5, 13, 2, 3])  # u8 hook, flags, tcp_flags, zone_dir
    + host(7, 2)  # u16 zone
)
DECLARED = (
    record_header(64 + 2 * 36, 6)
    + SENT
    + b"\x01\x01\x02"  # u8 opening, flags: HAS_MORE, clients
    + bytes(5)
    + b"\x04\x02"  # u8 header, form: a token
    + bytes(2)
    + b"_hidden".ljust(32, b"\0")
    + b"\x02\x01"  # u8 header, form: an address
    + host(4711, 2)  # u16 port
    + bytes.fromhex("00000000000000000000ffffc6336407")  # u8 value[32]
    + bytes(16)
)
SEGMENT = (
    record_header(64 + 3, 5)
    + SENT
    + host(70_000, 4)  # u32 offset
    + host(3, 2)  # u16 length
    + b"\x01\0"  # u8 flags: IS_END, pad
    + b"abc"
)
RECORDS = {
    "connection": CONNECTION,
    "drop": DROP,
    "accept": ACCEPT,
    "hop": HOP,
    "declared": DECLARED,
}

sent = FiveTuple(
    src=ip_address("198.51.100.10"),
    dst=ip_address("10.240.0.5"),
    sport=46356,
    dport=30080,
    proto=6,
)
answered6 = FiveTuple(
    src=ip_address("fd00:244:1::11"),
    dst=ip_address("fd00:240::5"),
    sport=8080,
    dport=65241,
    proto=6,
)


def changed(record, at, octet):
    return record[:at] + bytes([octet]) + record[at + 1 :]


def test_connection():
    """IPv4 comes out of its mapped form, IPv6 stays as it is, and numbers are host order."""
    assert decode(CONNECTION) == Connection(
        ktime_ns=3_600_123_456_789,
        netns=4026532001,
        hook=Hook.NF_POSTROUTING,
        orig=sent,
        reply=answered6,
        status=Status(0x1BE),
        zone=7,
        mark=0x4000,
        ct_mark=42,
        iif=2,
        oif=3,
        is_related=False,
    )


def test_drop():
    """A tuple that the kernel did not have is None, not a row of zeros."""
    assert decode(DROP) == Drop(
        ktime_ns=3_600_123_456_789,
        netns=4026532001,
        packet=sent,
        orig=None,
        is_reply=False,
        is_new=True,
        reason=8,
        location=0xFFFFFFFF81000000,
        dst_input=0xFFFFFFFF82000000,
        mark=0x8000,
        ifindex=4,
        iif=5,
        dst_ifindex=6,
        zone=7,
    )


def test_hop():
    """A hop is read with its place, its packet and the tuples of its conntrack entry."""
    sent, answered = samples.REPLACED
    assert decode(HOP) == Hop(
        ktime_ns=3_600_123_456_789,
        netns=4026532001,
        hook=Hook.NF_POSTROUTING,
        packet=sent,
        orig=sent,
        reply=answered,
        is_reply=False,
        is_new=True,
        is_after_nat=True,
        packet_id=0xFFFF_8881_0000_1200,
        number=1,
        mark=0x4000,
        iif=2,
        oif=3,
        length=60,
        tcp_flags=2,
        zone=7,
    )


@pytest.mark.parametrize(
    ("record", "at"),
    [(CONNECTION, 118), (DROP, 133), (HOP, 165)],
    ids=["connection", "drop", "hop"],
)
def test_zone_of_one_direction(record, at):
    """A zone of the reply direction alone is not the connection's."""
    assert record[at] == 3
    assert [decode(changed(record, at, direction)).zone for direction in (1, 2)] == [7, 0]


def test_accept():
    """The peer is the source, the socket's own address the destination."""
    assert decode(ACCEPT) == Accept(ktime_ns=3_600_123_456_789, netns=4026532001, peer=answered6)


HIDDEN = "_hidden"


def test_declared():
    """What a connection declares is read with each client by address or name, in order."""
    assert decode(DECLARED) == Declared(
        ktime_ns=3_600_123_456_789,
        netns=4026532001,
        flow=sent,
        opening=Opening.HTTP,
        clients=(
            DeclaredClient(header=ProxyHeader.FORWARDED, form=ClientForm.TOKEN, token=HIDDEN),
            DeclaredClient(
                header=ProxyHeader.PROXY_V2,
                form=ClientForm.ADDRESS,
                address=ip_address("198.51.100.7"),
                port=4711,
            ),
        ),
        has_more=True,
    )


def test_segment():
    """A segment is read with its bytes, by its reader alone."""
    assert decode_segment(SEGMENT) == Segment(
        ktime_ns=3_600_123_456_789,
        netns=4026532001,
        flow=sent,
        offset=70_000,
        payload=b"abc",
        is_end=True,
        is_cut=False,
    )
    with pytest.raises(DecodeError, match="outside of its own ring"):
        decode(SEGMENT[:64].replace(host(67, 2), host(64, 2)))
    for record in (CONNECTION, SEGMENT + b"d", SEGMENT[:-1], SEGMENT[:40]):
        with pytest.raises(DecodeError):
            decode_segment(record)


@pytest.mark.parametrize(
    ("flags", "mark", "is_related"),
    [(0, None, False), (1, 0x4000, False), (2, None, True), (3, 0x4000, True)],
)
def test_connection_flags(flags, mark, is_related):
    """A mark that was not seen is None, whatever its bytes hold."""
    connection = decode(changed(CONNECTION, 120, flags))
    assert (connection.mark, connection.is_related) == (mark, is_related)


@pytest.mark.parametrize(
    ("flags", "known"),
    [
        (0, (False, False, False, False, False)),
        (1, (True, False, False, False, False)),
        (2, (False, True, False, False, False)),
        (4, (False, False, True, False, False)),
        (8, (False, False, False, True, False)),
        (16, (False, False, False, False, True)),
        (31, (True, True, True, True, True)),
    ],
)
def test_drop_flags(flags, known):
    """Each flag says whether one field is known, or is a fact by itself."""
    drop = decode(record_header(136, 2) + SENT + SENT + DROP[96:132] + bytes([flags, 0, 0, 0]))
    assert known == (
        drop.packet is not None,
        drop.orig is not None,
        drop.dst_input is not None,
        drop.is_reply,
        drop.is_new,
    )


def test_icmp():
    """ICMP keeps its id, type and code in place of ports; the model carries them as they are."""
    ping = samples.connection(samples.PING, samples.PING.inverted)
    decoded = decode(samples.connection_bytes(ping))
    assert (decoded.orig.sport, decoded.orig.dport, decoded.reply.dport) == (4660, 0x800, 0)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        pytest.param(b"", "record has 0 bytes, fewer than its header's 16", id="empty"),
        pytest.param(
            changed(CONNECTION, 14, 7), "record has wire version 7, expected 1", id="version"
        ),
        pytest.param(changed(CONNECTION, 15, 9), "record has unknown kind 9", id="kind"),
        pytest.param(
            CONNECTION + b"\0",
            "connection record has 129 bytes and states 128, expected 128",
            id="too-long",
        ),
        pytest.param(
            changed(DROP, 12, 135),
            "drop record has 136 bytes and states 135, expected 136",
            id="says-another-size",
        ),
        pytest.param(changed(DECLARED, 56, 9), "9 is not a valid Opening", id="opening"),
        pytest.param(changed(DECLARED, 65, 9), "9 is not a valid ClientForm", id="form"),
        pytest.param(changed(DECLARED, 64, 9), "9 is not a valid ProxyHeader", id="proxy-header"),
        pytest.param(changed(DECLARED, 70, 0x1B), "has an invalid client name", id="token"),
        pytest.param(
            changed(CONNECTION, 119, 77), "connection record has unknown hook 77", id="hook"
        ),
        pytest.param(
            changed(ACCEPT, 16 + 37, 3), "record has unknown address family 3", id="family"
        ),
        pytest.param(
            changed(CONNECTION, 16, 1),
            "IPv4 address is not in mapped form: 01000000000000000000ffffc633640a",
            id="not-mapped",
        ),
    ],
)
@pytest.mark.skipif(sys.byteorder != "little", reason="changes the low byte of a size")
def test_refused(record, message):
    """What the wire format does not know is refused with the value, not misread."""
    with pytest.raises(DecodeError) as caught:
        decode(record)
    assert str(caught.value).endswith(message)


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_truncated(record):
    """A record that was cut off anywhere is refused."""
    for length in range(len(record)):
        with pytest.raises(DecodeError):
            decode(record[:length])


@given(st.binary(max_size=200))
def test_any_bytes(data):
    """Whatever a ring buffer could deliver either decodes or is refused."""
    try:
        decode(data)
    except DecodeError:
        return


@given(st.sampled_from(sorted(RECORDS)), st.lists(st.tuples(st.integers(0), st.integers(0, 255))))
def test_any_damage(name, damage):
    """A record with any of its bytes changed either decodes or is refused."""
    record = bytearray(RECORDS[name])
    for at, octet in damage:
        record[at % len(record)] = octet
    try:
        decode(bytes(record))
    except DecodeError:
        return


@given(samples.connections)
def test_connection_round_trip(connection):
    """encode_connection() writes what the kernel would, and decode() is its inverse."""
    record = encode_connection(connection)
    assert record == samples.connection_bytes(connection)
    assert decode(record) == connection


@given(samples.drops)
def test_drop_round_trip(drop):
    """Any drop that the kernel can write is read as it was."""
    assert decode(samples.drop_bytes(drop)) == drop


@given(samples.hops())
def test_hop_round_trip(hop):
    """Any hop that the kernel can write is read as it was."""
    assert decode(samples.hop_bytes(hop)) == hop


@given(samples.accepts)
def test_accept_round_trip(accept):
    """Any accept that the kernel can write is read as it was."""
    assert decode(samples.accept_bytes(accept)) == accept


@given(samples.declared)
def test_declared_round_trip(declared):
    """Whatever headers can declare is written and read as it was."""
    record = encode_declared(declared)
    assert record == samples.declared_bytes(declared)
    assert decode(record) == declared


def test_path_key():
    """A path has the address that was sent to, the backend, and the source that it sees."""
    assert decode_path_key(PATH_KEY) == PathKey(
        netns=4026532001,
        zone=7,
        family="ipv4",
        proto=6,
        client_class=ClientClass.EXTERNAL,
        dst=ip_address("10.240.0.5"),
        dst_class=ClientClass.NODE,
        dport=30080,
        backend=ip_address("10.244.1.11"),
        backend_port=8080,
        seen_source=ip_address("10.240.0.6"),
        is_marked=True,
        is_input=False,
        has_snat_status=True,
        client_flags=AddressFlag.CLUSTER,
    )


def test_path_key_to_anywhere():
    """Without destination, DNAT or SNAT the addresses are None, not zeros."""
    key = decode_path_key(bytes(48) + PATH_KEY[48:52] + bytes(6) + b"\x06\x0a\x01\x00\x28\0")
    assert (key.dst, key.backend, key.seen_source, key.family) == (None, None, None, "ipv6")
    assert (key.client_class, key.is_input, key.is_marked) == (ClientClass.POD, True, None)
    assert key.is_hairpin


@pytest.mark.parametrize(
    ("at", "octet", "message"),
    [
        (59, 3, "address family 3"),
        (60, 99, "client class 99"),
        (61, 99, "client class 99"),
        (0, 1, "not in mapped form"),
    ],
)
def test_path_key_refused(at, octet, message):
    """A path key of another version is refused with the value."""
    with pytest.raises(DecodeError, match=message):
        decode_path_key(changed(PATH_KEY, at, octet))


@given(st.binary(min_size=64, max_size=64))
def test_any_path_key(data):
    """Whatever the map could hold either decodes or is refused."""
    try:
        decode_path_key(data)
    except DecodeError:
        return
