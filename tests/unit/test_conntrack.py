"""
Messages of conntrack netlink, as a kernel wrote them.

Captured on Linux 6.18 from a namespace with nftables rules for NAT, mark and zones, each with the
line that ``conntrack -L`` (1.4.7) printed for the same entry at the same moment.
"""

import re
import struct
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.kernel.conntrack import parse
from tracer.kernel.netlink import messages
from tracer.model import PROTOCOLS, Connection, FiveTuple, Hook, Status

# fmt: off
CAPTURED = {
    "udp-zone": (
        "udp 17 29 src=198.51.100.10 dst=10.244.1.11 sport=39517 dport=5353 [UNREPLIED] "
        "src=10.244.1.11 dst=198.51.100.10 sport=5353 dport=39517 mark=0 zone=7 use=1",
        "02000000340001801400018008000100c633640a080002000af4010b1c00028005000100110000000600"
        "02009a5d00000600030014e900003400028014000180080001000af4010b08000200c633640a1c000280"
        "05000100110000000600020014e90000060003009a5d0000060012000007000008000300000001880800"
        "08000000000008000c002ee456b708000b0000000001080007000000001d",
    ),
    "without-ports": (
        "unknown 253 599 src=198.51.100.10 dst=10.244.1.11 [UNREPLIED] src=10.244.1.11 "
        "dst=198.51.100.10 mark=0 use=1",
        "02000000240001801400018008000100c633640a080002000af4010b0c00028005000100fd0000002400"
        "028014000180080001000af4010b08000200c633640a0c00028005000100fd0000000800030000000188"
        "080008000000000008000c00e180a73108000b00000000010800070000000257",
    ),
    "udp-zone-of-one-direction": (
        "udp 17 29 src=198.51.100.10 dst=10.244.1.11 sport=58511 dport=5354 zone-orig=9 "
        "[UNREPLIED] src=10.244.1.11 dst=198.51.100.10 sport=5354 dport=58511 mark=0 use=1",
        "020000003c0001801400018008000100c633640a080002000af4010b1c00028005000100110000000600"
        "0200e48f00000600030014ea000006000300000900003400028014000180080001000af4010b08000200"
        "c633640a1c00028005000100110000000600020014ea000006000300e48f000008000300000001880800"
        "08000000000008000c007616233808000b0000000001080007000000001d",
    ),
    "tcp-nat-mark": (
        "tcp 6 431999 ESTABLISHED src=198.51.100.10 dst=10.240.0.5 sport=48815 dport=30080 "
        "src=10.244.1.11 dst=10.240.0.5 sport=8080 dport=48815 [ASSURED] mark=42 use=1",
        "02000000340001801400018008000100c633640a080002000af000051c00028005000100060000000600"
        "0200beaf000006000300758000003400028014000180080001000af4010b080002000af000051c000280"
        "0500010006000000060002001f90000006000300beaf000008000300000001be080008000000002a0800"
        "0c00b3c5b0ee08000b0000000001080007000006977f300004802c000180050001000300000005000200"
        "0a000000050003000a00000006000400230000000600050023000000",
    ),
    "icmp": (
        "icmp 1 29 src=198.51.100.10 dst=10.244.1.11 type=8 code=0 id=4660 src=10.244.1.11 "
        "dst=198.51.100.10 type=0 code=0 id=4660 mark=0 use=1",
        "020000003c0001801400018008000100c633640a080002000af4010b2400028005000100010000000600"
        "040012340000050005000800000005000600000000003c00028014000180080001000af4010b08000200"
        "c633640a2400028005000100010000000600040012340000050005000000000005000600000000000800"
        "03000000018a080008000000000008000c00eaa809ea08000b0000000001080007000000001d",
    ),
    "icmpv6": (
        "icmpv6 58 29 src=2001:db8:1::10 dst=fd00:244:1::11 type=128 code=0 id=4661 "
        "src=fd00:244:1::11 dst=2001:db8:1::10 type=129 code=0 id=4661 mark=0 use=1",
        "0a000000540001802c0001801400030020010db800010000000000000000001014000400fd0002440001"
        "0000000000000000001124000280050001003a0000000600070012350000050008008000000005000900"
        "00000000540002802c00018014000300fd0002440001000000000000000000111400040020010db80001"
        "0000000000000000001024000280050001003a0000000600070012350000050008008100000005000900"
        "00000000080003000000018a080008000000000008000c00cb17b6c308000b0000000001080007000000"
        "001d",
    ),
    "udp6-dnat": (
        "udp 17 29 src=2001:db8:1::10 dst=fd00:240::5 sport=54277 dport=30053 [UNREPLIED] "
        "src=fd00:244:1::11 dst=2001:db8:1::10 sport=53 dport=54277 mark=0 use=1",
        "0a0000004c0001802c0001801400030020010db800010000000000000000001014000400fd0002400000"
        "000000000000000000051c000280050001001100000006000200d405000006000300756500004c000280"
        "2c00018014000300fd0002440001000000000000000000111400040020010db800010000000000000000"
        "00101c0002800500010011000000060002000035000006000300d405000008000300000001a808000800"
        "0000000008000c007db5d5ac08000b0000000001080007000000001d",
    ),
    "tcp6-nat": (
        "tcp 6 431999 ESTABLISHED src=2001:db8:1::10 dst=fd00:240::5 sport=45425 dport=30080 "
        "src=fd00:244:1::11 dst=fd00:240::5 sport=8080 dport=45425 [ASSURED] mark=0 use=1",
        "0a0000004c0001802c0001801400030020010db800010000000000000000001014000400fd0002400000"
        "000000000000000000051c000280050001000600000006000200b171000006000300758000004c000280"
        "2c00018014000300fd00024400010000000000000000001114000400fd00024000000000000000000000"
        "00051c0002800500010006000000060002001f90000006000300b171000008000300000001be08000800"
        "0000000008000c008d01347608000b0000000001080007000006977f300004802c000180050001000300"
        "0000050002000a000000050003000a00000006000400230000000600050023000000",
    ),
}
# fmt: on
MESSAGES = {name: bytes.fromhex(message) for name, (_, message) in CAPTURED.items()}

_TUPLE = re.compile(
    r"src=(?P<src>\S+) dst=(?P<dst>\S+)"
    r"(?: sport=(?P<sport>\d+) dport=(?P<dport>\d+))?"
    r"(?: type=(?P<type>\d+) code=(?P<code>\d+) id=(?P<id>\d+))?"
)


_NUMBERS = {"sport", "dport", "type", "code", "id"}


def tuples_of(line):
    """Read the two tuples of a line of conntrack -L."""
    name, number = line.split()[:2]
    assert PROTOCOLS.get(name, int(number)) == int(number)
    for match in _TUPLE.finditer(line):
        found = {
            key: int(value) for key, value in match.groupdict("0").items() if value.isdecimal()
        }
        yield FiveTuple(
            src=ip_address(match["src"]),
            dst=ip_address(match["dst"]),
            sport=found["id"] or found["sport"],
            dport=found["type"] << 8 | found["code"] if match["type"] else found["dport"],
            proto=int(number),
        )


def number_of(line, name):
    """Read a number such as a mark from a line of conntrack -L; 0 if it is not there."""
    match = re.search(rf" {name}=(\d+)", line)
    return int(match[1]) if match else 0


@pytest.fixture(params=CAPTURED.values(), ids=CAPTURED)
def captured(request):
    """A line of conntrack -L and what parse() makes of its message."""
    line, message = request.param
    return line, parse(bytes.fromhex(message), 4026532001, 77)


def test_tuples(captured):
    """Addresses, ports, and id, type and code of ICMP are those that conntrack -L prints."""
    line, connection = captured
    assert [connection.orig, connection.reply] == list(tuples_of(line))


def test_mark_and_zone(captured):
    """The entry's mark and its zone are those that conntrack -L prints."""
    line, connection = captured
    assert connection.ct_mark == number_of(line, "mark")
    assert connection.zone == (number_of(line, "zone") or number_of(line, "zone-orig"))


def test_status(captured):
    """The status has the bits for what conntrack -L says in brackets, and for NAT."""
    line, connection = captured
    status = connection.status
    assert bool(status & Status.ASSURED) == ("[ASSURED]" in line)
    assert bool(status & Status.SEEN_REPLY) == ("[UNREPLIED]" not in line)
    assert status & Status.CONFIRMED
    assert bool(status & Status.SRC_NAT) == connection.is_snat
    assert bool(status & Status.DST_NAT) == connection.is_dnat


def test_what_conntrack_does_not_tell(captured):
    """The packet was not seen, so its mark is unknown, not zero; the caller sets time and netns."""
    _, connection = captured
    assert connection.mark is None
    assert (connection.hook, connection.iif, connection.oif) == (Hook.CONNTRACK, 0, 0)
    assert (connection.netns, connection.ktime_ns) == (4026532001, 77)


def test_captured_nat():
    """The captured connection is the tutorial's: the backend sees the node."""
    connection = parse(MESSAGES["tcp-nat-mark"], 0, 0)
    assert connection.seen_source == ip_address("10.240.0.5")
    assert (connection.is_snat, connection.is_dnat, connection.ct_mark) == (True, True, 42)


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
def test_truncated(message):
    """A message cut off anywhere is no connection, or one whose tuples are whole."""
    whole = parse(message, 0, 0)
    for length in range(len(message)):
        connection = parse(message[:length], 0, 0)
        assert connection is None or (connection.orig, connection.reply) == (
            whole.orig,
            whole.reply,
        )


@given(st.binary(max_size=400))
def test_any_bytes(data):
    """No message stops a run."""
    assert isinstance(parse(data, 0, 0), Connection | None)


@given(
    st.sampled_from(sorted(MESSAGES)),
    st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_any_damage(name, damage):
    """A message with any of its bytes changed is a connection or none."""
    message = bytearray(MESSAGES[name])
    for at, octet in damage:
        message[at % len(message)] = octet
    assert isinstance(parse(bytes(message), 0, 0), Connection | None)


def test_empty_protocol():
    """An attribute without the byte that it should have makes no connection."""
    message = MESSAGES["without-ports"].replace(b"\5\0\1\0\xfd\0\0\0", b"\4\0\1\0\4\0\x63\0")
    assert parse(message, 0, 0) is None


def attribute(kind, payload):
    return struct.pack("=HH", len(payload) + 4, kind) + payload + bytes(-len(payload) % 4)


nested = st.recursive(
    st.binary(max_size=20),
    lambda inner: st.lists(
        st.tuples(st.integers(0, 20), inner).map(lambda pair: attribute(*pair)), max_size=6
    ).map(b"".join),
)


@given(nested)
def test_any_attributes(attributes):
    """Well-formed attributes of any kind, order, depth and length do not stop a run."""
    tuples = attribute(1, attribute(1, attributes) + attribute(2, attribute(1, b"\6")))
    tuples += attribute(2, attribute(2, attributes) + attribute(1, attribute(1, bytes(4))))
    for message in (attributes, tuples, attribute(1, attributes) + attribute(2, attributes)):
        assert isinstance(parse(bytes(4) + message, 0, 0), Connection | None)


def netlink(kind, payload):
    return struct.pack("=IHHII", 16 + len(payload), kind, 2, 1, 0) + payload


def test_messages():
    """A datagram holds several messages, each aligned to four bytes."""
    first, second = b"12345", b"1234"
    data = netlink(0x100, first) + bytes(3) + netlink(3, second)
    assert list(messages(data)) == [(0x100, first), (3, second)]


@pytest.mark.parametrize("length", range(38))
def test_messages_cut_off(length):
    """A message that did not arrive whole is left out."""
    data = (netlink(0x100, b"abc") + b"\0" + netlink(3, b"de"))[:length]
    assert len(list(messages(data))) == (length >= 19) + (length >= 38)


@given(st.binary(max_size=200))
def test_any_datagram(data):
    """Splitting a datagram ends, whatever lengths it claims."""
    assert sum(16 + len(payload) for _, payload in messages(data)) <= len(data)
