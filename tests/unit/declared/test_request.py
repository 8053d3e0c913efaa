"""X-Forwarded-For and Forwarded (RFC 7239) in the head of a request."""

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.declared.identifier import identifier
from tracer.declared.request import KEPT, request
from tracer.proxy_headers import CLIENT_TOKEN, ClientForm, ProxyHeader

XFF, FORWARDED = ProxyHeader.X_FORWARDED_FOR, ProxyHeader.FORWARDED


def get(*fields, end="\r\n\r\n"):
    return "\r\n".join(["GET /path?q=1 HTTP/1.1", "Host: example.com", *fields]).encode() + (
        end.encode()
    )


def told(client):
    """A client as text: its address or name, and its port."""
    return f"{client}" + (f" {client.port}" if client.port else "")


def named(*fields, header=None):
    found = request(get(*fields))
    assert found.is_whole
    return [told(each) for each in found.clients if header in (None, each.header)]


@pytest.mark.parametrize(
    ("value", "clients"),
    [
        ("198.51.100.7", ["198.51.100.7"]),
        ("198.51.100.7, 10.0.0.1", ["198.51.100.7", "10.0.0.1"]),
        ("198.51.100.7,10.0.0.1", ["198.51.100.7", "10.0.0.1"]),
        ("  198.51.100.7\t , 2001:db8::1  ", ["198.51.100.7", "2001:db8::1"]),
        ("198.51.100.7:4711", ["198.51.100.7 4711"]),
        ("[2001:db8::1]:4711, [2001:db8::2]", ["2001:db8::1 4711", "2001:db8::2"]),
        ("::ffff:198.51.100.7", ["198.51.100.7"]),
        ("unknown, 10.0.0.1", ["unknown", "10.0.0.1"]),
        (", ,198.51.100.7,", ["198.51.100.7"]),
        ("", []),
        ("client.example.com", ["invalid"]),
        ("198.51.100.7;10.0.0.1", ["invalid"]),
        ("198.51.100.7:99999", ["invalid"]),
        ("198.51.100.7:", ["invalid"]),
        ("198.51.100.07", ["invalid"]),
        ("[198.51.100.7]", ["invalid"]),
        ("[2001:db8::1", ["invalid"]),
        ("[2001:db8::1]x", ["invalid"]),
        ("fe80::1%eth0", ["invalid"]),
        ("\x1b[31mred\x1b[0m, 10.0.0.1", ["invalid", "10.0.0.1"]),
        ("<script>alert(1)</script>", ["invalid"]),
        ("١٢٧.0.0.1", ["invalid"]),
        ("1" * 5000, ["invalid"]),
    ],
)
def test_x_forwarded_for(value, clients):
    """Addresses with and without ports, in order; invalid text is not kept."""
    assert named(f"X-Forwarded-For: {value}") == clients


@pytest.mark.parametrize(
    ("value", "clients"),
    [
        # The examples of RFC 7239, sections 4 and 7.1.
        ('for="_gazonk"', ["_gazonk"]),
        ('For="[2001:db8:cafe::17]:4711"', ["2001:db8:cafe::17 4711"]),
        ("for=192.0.2.60;proto=http;by=203.0.113.43", ["192.0.2.60"]),
        ("for=192.0.2.43, for=198.51.100.17", ["192.0.2.43", "198.51.100.17"]),
        (
            'for=192.0.2.43,for="[2001:db8:cafe::17]",for=unknown',
            ["192.0.2.43", "2001:db8:cafe::17", "unknown"],
        ),
        ("for=_hidden, for=_SEVKISEK", ["_hidden", "_SEVKISEK"]),
        ('for="192.0.2.43:47011"', ["192.0.2.43 47011"]),
        ('for="192.0.2.43:_port"', ["192.0.2.43"]),
        ('for="_gazonk:800"', ["_gazonk"]),
        (' proto=https ; for = "x"', ["invalid"]),
        ("proto=https;for=192.0.2.43;;host=a,", ["192.0.2.43"]),
        ('for="1\\92.0.2.43"', ["192.0.2.43"]),
        ('host="a,for=6.6.6.6,b";for=192.0.2.43', ["192.0.2.43"]),
        # A proxy that does not name its client hides everything before it.
        ("for=6.6.6.6, proto=https", ["6.6.6.6", "unknown"]),
        ("for=6.6.6.6;for=192.0.2.43", ["invalid"]),
        ('for="6.6.6.6, for=192.0.2.43', ["invalid"]),
        ("for=192.0.2.43, <b>, for=6.6.6.6", ["192.0.2.43", "invalid"]),
        ("for=_" + "a" * 32, ["invalid"]),
        ('for="_\x1b]0;"', ["invalid"]),
        ("", []),
        (";,;,", []),
    ],
)
def test_forwarded(value, clients):
    """The for= of each element; a name that hides the address is kept if it is a short token."""
    assert named(f"Forwarded: {value}") == clients


def test_fields_of_one_name_are_one_list():
    """Fields of the same name follow each other, as RFC 9110 has it, whatever their case."""
    assert named("x-forwarded-for: 1.1.1.1, 2.2.2.2", "X-FORWARDED-FOR:3.3.3.3") == [
        "1.1.1.1",
        "2.2.2.2",
        "3.3.3.3",
    ]


def test_folded_field():
    """A folded field is one field."""
    assert named("X-Forwarded-For: 1.1.1.1,", "\t2.2.2.2", " ,3.3.3.3") == [
        "1.1.1.1",
        "2.2.2.2",
        "3.3.3.3",
    ]


def test_both_headers():
    """Both headers are read, each by its name."""
    fields = ("Forwarded: for=2.2.2.2", "X-Forwarded-For: 1.1.1.1")
    assert named(*fields, header=XFF) == ["1.1.1.1"]
    assert named(*fields, header=FORWARDED) == ["2.2.2.2"]


def test_other_fields():
    """Nothing but those two fields is looked at, and nothing after the head."""
    data = get(
        "Cookie: X-Forwarded-For: 6.6.6.6", "X-Forwarded-For : 6.6.6.6", "X-Real-IP: 6.6.6.6"
    )
    found = request(data + b"X-Forwarded-For: 6.6.6.6\r\n\r\n")
    assert found.is_whole
    assert found.clients == ()


def test_the_nearest_are_kept():
    """The last entries of a long list are kept, and it is noted that there were more."""
    addresses = [f"192.0.2.{n}" for n in range(100)]
    found = request(get(f"X-Forwarded-For: {', '.join(addresses)}"))
    assert [str(each) for each in found.clients] == addresses[-KEPT:]
    assert found.has_more
    assert not request(get(f"X-Forwarded-For: {', '.join(addresses[:KEPT])}")).has_more


@pytest.mark.parametrize("end", ["\r\n\r\n", "\n\n", "\n\r\n"])
def test_line_ends(end):
    """Lines may end without a carriage return."""
    data = get("X-Forwarded-For: 1.1.1.1", end=end).replace(b"\r\nX-", b"\nX-")
    assert [str(each) for each in request(data).clients] == ["1.1.1.1"]


def test_more_bytes_are_needed():
    """An incomplete head gives what its complete lines say, and that there may be more."""
    data = get("X-Forwarded-For: 1.1.1.1", "Accept: */*")
    for length in range(len(data)):
        found = request(data[:length])
        assert found is not None
        assert not found.is_whole
        assert len(found.clients) == (length >= data.index(b"Accept"))
    assert request(data).is_whole


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\0\x01",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        b"get / HTTP/1.1\r\n",
        b"GET /\r\n",
        b"GET / HTTP/3\r\n",
        b"GET  / HTTP/1.1\r\n",
        b"GET / \x1b HTTP/1.1\r\n",
        b"EHLO example.com\r\n",
        b"A" * 40,
        b"\0",
    ],
)
def test_no_request(data):
    """Other protocols are recognised by their first bytes."""
    assert request(data) is None


_FIELD = st.sampled_from([b"X-Forwarded-For:", b"Forwarded:", b"forwarded: for=", b"\t"])
_PIECES = st.lists(
    st.one_of(
        _FIELD,
        st.sampled_from([b"\r\n", b"\n", b",", b";", b'"', b"\\", b"=", b"for=", b"[", b"]", b":"]),
        st.sampled_from([b"1.2.3.4", b"::1", b"_x", b"unknown", b"\x1b[31m", b"<b>", b"%eth0"]),
        st.binary(max_size=4),
    ),
    max_size=30,
).map(b"".join)


@given(_PIECES)
def test_any_fields(data):
    """Whatever the fields contain, only addresses and short tokens are returned."""
    found = request(b"GET / HTTP/1.1\r\n" + data + b"\r\n\r\n")
    for each in found.clients:
        assert (each.address is not None) == (each.form is ClientForm.ADDRESS)
        assert each.token is None or CLIENT_TOKEN.fullmatch(each.token)
        assert str(each).isascii()
        assert str(each).isprintable()


@given(st.binary(max_size=80), st.sampled_from([XFF, FORWARDED]))
def test_any_identifier(data, header):
    """No bytes make an identifier raise."""
    assert identifier(data, header).header is header


@given(st.integers(0, 2**32 - 1) | st.integers(0, 2**128 - 1), st.integers(1, 65535))
def test_any_address(number, port):
    """Any address is read with and without its port."""
    address = ip_address(number)
    plain = getattr(address, "ipv4_mapped", None) or address
    with_port = f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
    for text, expected in ((str(address), None), (with_port, port)):
        found = identifier(text.encode(), XFF)
        assert (found.address, found.port) == (plain, expected)
