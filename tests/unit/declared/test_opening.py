"""The first bytes of connections: put together from segments, read as far as they go."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.declared.test_proxy_protocol import INET, TLV, v2
from tests.unit.declared.test_request import get
from tracer.declared.opening import LIMIT, read_opening
from tracer.declared.stream import Stream
from tracer.proxy_headers import ClientForm, Opening

V1 = b"PROXY TCP4 198.51.100.7 203.0.113.50 56324 443\r\n"
HTTP = get("X-Forwarded-For: 192.0.2.1, 192.0.2.2", "Cookie: secret")
TLS = b"\x16\x03\x01\x02\x00\x01"


def opening(data, *, is_all=False):
    found = read_opening(data, is_all=is_all)
    return found and (found.opening, [str(each) for each in found.clients])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (V1 + TLS, (Opening.OTHER, ["198.51.100.7"])),
        (v2(body=INET + TLV) + TLS, (Opening.OTHER, ["198.51.100.7"])),
        (V1 + HTTP, (Opening.HTTP, ["192.0.2.1", "192.0.2.2", "198.51.100.7"])),
        (HTTP + b"body", (Opening.HTTP, ["192.0.2.1", "192.0.2.2"])),
        (get() + HTTP, (Opening.HTTP, [])),
        (v2(command=0) + HTTP, (Opening.HTTP, ["192.0.2.1", "192.0.2.2", "local"])),
        (TLS, (Opening.OTHER, [])),
        (V1 + V1, (Opening.OTHER, ["198.51.100.7"])),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (Opening.OTHER, [])),
        (b"PROXY TCP4 nonsense\r\n" + HTTP, (Opening.MALFORMED, [])),
        (get("Forwarded: for=_hidden"), (Opening.HTTP, ["_hidden"])),
    ],
)
def test_openings(data, expected):
    """The peer's own statement comes last: the PROXY header, which precedes everything else."""
    assert opening(data) == expected


@pytest.mark.parametrize("data", [b"", V1, V1[:-1], v2(body=INET)[:20], V1 + HTTP[:-1], HTTP[:9]])
def test_more_bytes_are_needed(data):
    """Bytes that may still become something else are not decided early."""
    assert opening(data) is None


@pytest.mark.parametrize(
    ("data", "clients"),
    [
        (b"", []),
        (V1, ["198.51.100.7"]),
        (V1[:-1], []),
        (v2(body=INET, length=9000) + bytes(100), ["198.51.100.7"]),
        (V1 + HTTP[:-1], ["192.0.2.1", "192.0.2.2", "198.51.100.7"]),
        (HTTP[:9], []),
    ],
)
def test_what_is_cut(data, clients):
    """If no more bytes come, what is there is reported, and that it is cut."""
    assert opening(data, is_all=True) == (Opening.CUT, clients)


def test_clients_without_address():
    """LOCAL is kept: it means that the proxy speaks for itself."""
    (client,) = read_opening(v2(command=0) + TLS, is_all=False).clients
    assert (client.form, client.address) == (ClientForm.LOCAL, None)


def segments_of(data, cuts):
    places = sorted({0, *(cut % (len(data) or 1) for cut in cuts)})
    return [
        (begin, data[begin:end])
        for begin, end in zip(places, [*places[1:], len(data)], strict=True)
    ]


@given(
    st.sampled_from([V1 + HTTP, v2(body=INET + TLV) + HTTP, HTTP, V1 + TLS]),
    st.lists(st.integers(0, 500), max_size=12),
    st.randoms(use_true_random=False),
)
def test_any_segments_in_any_order(data, cuts, chance):
    """However it is split, reordered or repeated, the stream is the same."""
    segments = segments_of(data, cuts)
    segments += chance.sample(segments, len(segments) // 2)
    chance.shuffle(segments)
    stream = Stream()
    for offset, payload in segments:
        stream.add(offset, payload)
    assert stream.data == data
    assert opening(stream.data) == opening(data)


def test_retransmission():
    """Bytes that came already are not added twice; a longer copy adds its new bytes."""
    stream = Stream()
    assert not stream.add(4, b"ef")
    assert not stream.add(4, b"efgh")
    assert stream.add(0, b"abcd")
    assert not stream.add(2, b"XX")
    assert stream.add(6, b"XYij")
    assert stream.data == b"abcdefghij"


def test_end():
    """The end of the stream counts once all bytes before it are there."""
    stream = Stream()
    stream.add(4, b"", is_end=True)
    assert not stream.is_all
    stream.add(0, b"abcd")
    assert stream.is_all


def test_bounds():
    """No peer makes us keep more than the limit, and the same amount of waiting segments."""
    stream, chance = Stream(), random.Random(1)
    for _ in range(5000):
        stream.add(chance.randrange(1, 2 * LIMIT), bytes(chance.randrange(3000)))
    assert sum(map(len, stream._waiting.values())) <= LIMIT
    stream.add(0, bytes(2 * LIMIT))
    assert len(stream.data) == LIMIT
    assert stream.is_all


def test_gap_is_filled_when_nothing_more_can_wait():
    """A missing segment is accepted, however many segments wait for it."""
    stream = Stream()
    for offset in range(10, 200, 10):
        stream.add(offset, bytes(10))
    assert stream.add(0, bytes(10))
    assert len(stream.data) == 170
