"""The PROXY protocol, by the examples and the limits of HAProxy's specification."""

import struct
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit import samples
from tracer.declared.proxy_protocol import (
    MALFORMED,
    MORE,
    OTHER,
    V2_SIGNATURE,
    Header,
    proxy_header,
)
from tracer.proxy_headers import ClientForm, DeclaredClient, ProxyHeader


def v2(command=1, family=1, protocol=1, body=b"", length=None):
    length = len(body) if length is None else length
    return (
        V2_SIGNATURE + struct.pack("!BBH", 2 << 4 | command, family << 4 | protocol, length) + body
    )


def ends(src, dst, sport, dport):
    return ip_address(src).packed + ip_address(dst).packed + struct.pack("!HH", sport, dport)


INET = ends("198.51.100.7", "203.0.113.50", 56324, 443)
INET6 = ends("2001:db8::7", "2001:db8::50", 56324, 443)
# A TLV of 3 bytes and its head: PP2_TYPE_ALPN "h2c".
TLV = b"\x01\x00\x03h2c"
LONGEST = b"PROXY TCP6 ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n".replace(
    b"ffff:f...f:ffff", b"ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
)


def client(header, text, port):
    return DeclaredClient(
        header=header, form=ClientForm.ADDRESS, address=ip_address(text), port=port
    )


@pytest.mark.parametrize(
    ("line", "address", "port"),
    [
        (b"PROXY TCP4 198.51.100.7 203.0.113.50 56324 443\r\n", "198.51.100.7", 56324),
        (b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n", "255.255.255.255", 65535),
        (b"PROXY TCP6 2001:db8::7 2001:db8::50 56324 443\r\n", "2001:db8::7", 56324),
        (b"PROXY TCP6 ::ffff:198.51.100.7 ::1 1 2\r\n", "198.51.100.7", 1),
        (LONGEST, "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 65535),
        (b"PROXY TCP4 198.51.100.7 203.0.113.50 0 0\r\n", "198.51.100.7", None),
    ],
)
def test_version_1(line, address, port):
    """Version 1 names the client's address and port in a line of at most 107 characters."""
    found = proxy_header(line + b"GET / HTTP/1.1\r\n")
    assert found == Header(client=client(ProxyHeader.PROXY_V1, address, port), length=len(line))


@pytest.mark.parametrize("rest", [b"", b" ffff::1 ffff::2 65535 65535", b" what ever \xff"])
def test_version_1_unknown(rest):
    """After UNKNOWN the rest of the line is ignored: the proxy knows no client."""
    line = b"PROXY UNKNOWN" + rest + b"\r\n"
    unknown = DeclaredClient(header=ProxyHeader.PROXY_V1, form=ClientForm.UNKNOWN)
    assert proxy_header(line) == Header(client=unknown, length=len(line))


@pytest.mark.parametrize(
    "line",
    [
        b"PROXY \r\n",
        b"PROXY TCP4\r\n",
        b"PROXY TCP4 198.51.100.7 203.0.113.50 56324\r\n",
        b"PROXY TCP4 198.51.100.7 203.0.113.50 56324 443 1\r\n",
        b"PROXY TCP4  198.51.100.7 203.0.113.50 56324 443\r\n",
        b"PROXY TCP4 198.51.100.7 203.0.113.50 56324 65536\r\n",
        b"PROXY TCP4 198.51.100.7 203.0.113.50 056324 443\r\n",
        b"PROXY TCP4 198.51.100.7 203.0.113.50 -1 443\r\n",
        b"PROXY TCP4 198.51.100.07 203.0.113.50 56324 443\r\n",
        b"PROXY TCP4 2001:db8::7 2001:db8::50 56324 443\r\n",
        b"PROXY TCP4 ::ffff:198.51.100.7 203.0.113.50 56324 443\r\n",
        b"PROXY TCP6 198.51.100.7 203.0.113.50 56324 443\r\n",
        b"PROXY TCP6 fe80::1%eth0 ::1 56324 443\r\n",
        b"PROXY UDP4 198.51.100.7 203.0.113.50 56324 443\r\n",
        b"PROXY tcp4 198.51.100.7 203.0.113.50 56324 443\r\n",
        b"PROXY TCP4 \x1b[31m 203.0.113.50 56324 443\r\n",
        b"PROXY TCP4 <script> 203.0.113.50 56324 443\r\n",
        b"PROXY TCP4 198.51.100.7 203.0.113.50 56324 443\n" + bytes(107),
        b"PROXY TCP4 " + b"1" * 200,
    ],
)
def test_version_1_malformed(line):
    """A line that begins as a header but is malformed is reported, and none of it is kept."""
    assert proxy_header(line) == MALFORMED


@pytest.mark.parametrize("tlvs", [b"", TLV, TLV * 20])
@pytest.mark.parametrize(
    ("family", "addresses", "address"), [(1, INET, "198.51.100.7"), (2, INET6, "2001:db8::7")]
)
def test_version_2(family, addresses, address, tlvs):
    """Version 2 names the client in binary; TLVs after the addresses are skipped."""
    data = v2(family=family, body=addresses + tlvs)
    found = proxy_header(data + b"GET / HTTP/1.1\r\n")
    assert found == Header(client=client(ProxyHeader.PROXY_V2, address, 56324), length=len(data))


def test_version_2_mapped():
    """An IPv4-mapped IPv6 address becomes an IPv4 address."""
    found = proxy_header(v2(family=2, body=ends("::ffff:198.51.100.7", "::1", 1, 2)))
    assert found.client == client(ProxyHeader.PROXY_V2, "198.51.100.7", 1)


@pytest.mark.parametrize(
    ("data", "form"),
    [
        (v2(command=0, family=0, protocol=0), ClientForm.LOCAL),
        (v2(command=0, body=INET), ClientForm.LOCAL),
        (v2(command=0, family=9, protocol=9, body=TLV), ClientForm.LOCAL),
        (v2(family=0, protocol=0), ClientForm.UNKNOWN),
        (v2(family=0, protocol=0, body=TLV), ClientForm.UNKNOWN),
        (v2(family=3, body=bytes(216)), ClientForm.UNKNOWN),
    ],
)
def test_version_2_without_address(data, form):
    """LOCAL is the proxy's own connection; an unspecified family and a UNIX socket name nobody."""
    named = DeclaredClient(header=ProxyHeader.PROXY_V2, form=form)
    assert proxy_header(data) == Header(client=named, length=len(data))


@pytest.mark.parametrize(
    "data",
    [
        V2_SIGNATURE + b"\x11\x11\0\x0c" + INET,
        V2_SIGNATURE + b"\x31\x11\0\x0c" + INET,
        v2(command=2, body=INET),
        v2(family=4, body=INET),
        v2(family=15, body=INET),
        v2(family=1, body=INET[:-1]),
        v2(family=2, body=INET),
        v2(family=1, body=b""),
    ],
)
def test_version_2_malformed(data):
    """Another version, command or family, or truncated addresses, are reported as malformed."""
    assert proxy_header(data) == MALFORMED


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\n", b"\x16\x03\x01", b"PROXZ", b"\r\n\r\n\0\r\nQUIX", b"proxy ", b"\0"],
)
def test_other(data):
    """Other protocols are recognised by their first bytes."""
    assert proxy_header(data) == OTHER


WHOLE = [
    b"PROXY TCP4 198.51.100.7 203.0.113.50 56324 443\r\n",
    b"PROXY UNKNOWN\r\n",
    v2(body=INET),
    v2(family=2, body=INET6),
    v2(family=3, body=bytes(216))[:16],
]


@pytest.mark.parametrize("data", WHOLE)
def test_more_bytes_are_needed(data):
    """Any beginning of a header may become one: it is neither refused nor guessed."""
    for length in range(len(data)):
        assert proxy_header(data[:length]) == MORE
    assert isinstance(proxy_header(data), Header)


def test_tlvs_need_not_be_there():
    """The client is known once its address is there; the length tells what is still to come."""
    data = v2(body=INET, length=5000)
    assert proxy_header(data).length == 5016


@given(samples.ipv4 | samples.ipv6, st.integers(0, 65535), st.binary(max_size=30))
def test_any_client(address, port, rest):
    """Any address and port that both versions can carry is returned."""
    version = address.version
    zero = type(address)(0)
    packed = address.packed + zero.packed + struct.pack("!HH", port, 0)
    found = proxy_header(v2(family={4: 1, 6: 2}[version], body=packed + rest))
    plain = getattr(address, "ipv4_mapped", None) or address
    assert (found.client.address, found.client.port) == (plain, port or None)
    line = f"PROXY TCP{version} {address} {zero} {port} 0\r\n".encode()
    found = proxy_header(line + rest)
    assert (found.client.address, found.client.port) == (plain, port or None)


@given(st.sampled_from([b"", b"PROXY ", b"PROXY TCP4 ", V2_SIGNATURE, v2(body=INET)]), st.binary())
def test_any_bytes(begin, data):
    """No bytes make it raise."""
    proxy_header(begin + data)
