"""First bytes of TCP connections, from the kernel to what they declare."""

import socket
import struct
from contextlib import closing
from ctypes import sizeof
from ipaddress import ip_address, ip_network
from itertools import product

import pytest

from tests.kernel.box import NODE, NODE_INSIDE, PATIENCE_S, SERVER, wait_until
from tests.unit.declared.test_proxy_protocol import INET, TLV, v2
from tests.unit.declared.test_request import get
from tracer.filter import Filter
from tracer.kernel.bpf_syscall import Map
from tracer.kernel.programs import SEGMENTS
from tracer.kernel.source import KernelSource, Settings
from tracer.proxy_headers import Opening
from tracer.wire import Kind, WireStreamKey

pytestmark = pytest.mark.usefixtures("kernel")

PORT = 8080
V1 = b"PROXY TCP4 198.51.100.7 203.0.113.50 56324 443\r\n"
HTTP = get("X-Forwarded-For: 192.0.2.1, 192.0.2.2")
# Conntrack is on, as wherever kube-proxy runs: each connection has its record.
TRACK = "table inet t { chain c { type filter hook prerouting priority 0; ct state new; } }"
DNAT = "table inet t {{ chain c {{ type nat hook prerouting priority -100; {rule} }} }}"
# Where a connection is made and to where: it is read as it enters the node, or as it leaves.
WAYS = {
    "through": ("client", "server", SERVER),
    "to the node": ("client", "node", NODE),
    "from the node": ("node", "server", SERVER),
    "within the node": ("node", "node", NODE_INSIDE),
}


@pytest.fixture
def reading(box, trace):
    """A tracer that reads headers."""
    box.rules(TRACK)
    return trace(has_proxy_headers=True)


class Server:
    """Takes connections one by one and reads what they send."""

    def __init__(self, box, host, address):
        self.sock = box.socket(host, ip_address(address).version, socket.SOCK_STREAM)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.sock.bind((address, PORT))
        self.sock.listen()

    def received(self, size):
        """Return the first bytes of the next connection, and who sent them."""
        connection, peer = self.sock.accept()
        with closing(connection):
            connection.settimeout(PATIENCE_S)
            data = b""
            while len(data) < size and (more := connection.recv(65536)):
                data += more
        return data, peer[:2]


def send(box, host, to, *pieces):
    """Connect and send pieces as segments of their own; return the socket."""
    sock = box.socket(host, ip_address(to).version, socket.SOCK_STREAM)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.connect((to, PORT))
    for piece in pieces:
        sock.sendall(piece)
        wait_until(lambda: not unacknowledged(sock))
    return sock


def unacknowledged(sock):
    """What the kernel has sent and the peer has not confirmed (tcp_info.tcpi_unacked)."""
    return struct.unpack_from("I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 24)[0]


def told(trace, count=1):
    trace.wait_for(lambda trace: len(trace.declared) >= count)
    return [(each.opening, [str(one) for one in each.clients]) for each in trace.declared]


def test_every_way_is_read_once(box, reading):
    """
    Wherever a connection passes the node, its header is read, once, with the tuple of its record.
    """
    for number, (way, version) in enumerate(product(WAYS, (4, 6)), start=1):
        host, to, addresses = WAYS[way]
        with closing(Server(box, to, addresses[version]).sock):
            sock = send(box, host, addresses[version], v2(body=INET + TLV), HTTP)
            found = told(reading, number)[-1]
        assert found == (Opening.HTTP, ["192.0.2.1", "192.0.2.2", "198.51.100.7"]), way
        reading.flush()
        assert len(reading.declared) == number
        flow = reading.declared[-1].flow
        assert flow in [each.orig for each in reading.connections]
        assert (str(flow.src), flow.sport) == sock.getsockname()[:2]
        sock.close()
    assert not any(reading.lost().values())


def test_header_split_over_segments(box, reading):
    """A header that comes in segments of a few bytes is put together, within a bound."""
    data = V1 + get("X-Forwarded-For: 192.0.2.1")
    whole = (Opening.HTTP, ["192.0.2.1", "198.51.100.7"])
    # The kernel hands up 64 segments of a connection: they hold the PROXY header and some more.
    cut = (Opening.CUT, ["198.51.100.7"])
    server = Server(box, "server", SERVER[4])
    with closing(server.sock):
        for number, (size, expected) in enumerate(((20, whole), (7, whole), (1, cut)), start=1):
            pieces = [data[at : at + size] for at in range(0, len(data), size)]
            with closing(send(box, "client", SERVER[4], *pieces)):
                assert told(reading, number)[-1] == expected
    assert reading.lost()["segment_limit"] == 1


def test_the_server_got_the_same(box, reading):
    """A big segment, whose bytes lie in pages of their own, is read as the server reads it."""
    cookie = "c" * 6000
    data = get(f"Cookie: {cookie}", "X-Forwarded-For: 192.0.2.1") + bytes(50_000)
    server = Server(box, "server", SERVER[4])
    with closing(server.sock):
        sock = send(box, "client", SERVER[4])
        sock.sendall(data)
        received, peer = server.received(len(data))
        sock.close()
    assert received == data
    assert told(reading) == [(Opening.HTTP, ["192.0.2.1"])]
    assert (str(reading.declared[0].flow.src), reading.declared[0].flow.sport) == peer


def test_behind_dnat(box, trace):
    """The tuple is what the client sent, not the DNAT target; a filter on the backend works."""
    box.rules(DNAT.format(rule=f"ip daddr {NODE[4]} tcp dport {PORT} dnat to {SERVER[4]}"))
    wanted = Filter(backend=ip_network(SERVER[4]))
    reading = trace(has_proxy_headers=True, wanted=wanted)
    server = Server(box, "server", SERVER[4])
    with closing(server.sock), closing(send(box, "client", NODE[4], V1, b"\x16\x03\x01")):
        assert told(reading) == [(Opening.OTHER, ["198.51.100.7"])]
    assert str(reading.declared[0].flow.dst) == NODE[4]


def test_filters(box, trace):
    """Nothing is reported of connections that the filter leaves out, wherever it is applied."""
    box.rules(TRACK)
    server = Server(box, "server", SERVER[4])
    elsewhere = ip_network("192.0.2.0/24")
    unwanted = [
        trace(has_proxy_headers=True, wanted=wanted)
        for wanted in (
            Filter(client=elsewhere),
            Filter(backend=elsewhere),
            Filter(port=1),
            Filter(proto=17),
        )
    ]
    everything = trace(has_proxy_headers=True)
    with closing(server.sock):
        send(box, "client", SERVER[4], V1 + HTTP).close()
        assert len(told(everything)) == 1
    for reading in unwanted:
        reading.flush()
        assert reading.connections + reading.declared == []


def test_ciphertext_stays_in_the_kernel(box):
    """Of what begins neither as a header nor as a request one byte is handed up, and no more."""
    box.rules(TRACK)
    settings = Settings(has_proxy_headers=True)
    server = Server(box, "server", SERVER[4])
    with closing(KernelSource([box.target()], settings)) as source, closing(server.sock):
        source._declared = passing = Passing()
        for number, first in enumerate((b"\x16\x03\x01\x02", b"\0", b"ssh", b"\xff"), start=1):
            with closing(send(box, "client", SERVER[4], first * 100, b"secret" * 100)):
                wait_until(lambda n=number: passing.read_from(source) == n)
            assert passing.read_from(source) == number
            assert passing.segments[-1][64:] == first[:1]


class Passing:
    """Keeps what the kernel wrote."""

    def __init__(self):
        self.segments = []

    def read(self, records, now_ns):
        self.segments += [record for record in records if record[15] == Kind.SEGMENT]
        return records

    def read_from(self, source):
        """Read a source, and return how many segments there were so far."""
        source.read(0.05)
        return len(self.segments)


def test_understood_is_forgotten(box, reading):
    """Once a connection is understood, the kernel stops sending: no body leaves it."""
    server = Server(box, "server", SERVER[4])
    streams = Map(reading.source._loaded.map(SEGMENTS, "streams"), sizeof(WireStreamKey), 16)
    with closing(server.sock), closing(send(box, "client", SERVER[4])) as sock:
        wait_until(lambda: len(list(streams.items())) == 1)
        sock.sendall(HTTP)
        told(reading)
        assert list(streams.items()) == []


def test_client_that_ends(box, reading):
    """A client that goes away in the middle of a header leaves a connection that is cut."""
    server = Server(box, "server", SERVER[4])
    with closing(server.sock):
        send(box, "client", SERVER[4], V1[:20]).close()
        assert told(reading) == [(Opening.CUT, [])]


def test_answers_are_not_read(box, reading):
    """Data from the server is not taken for the client's."""
    server = Server(box, "server", SERVER[4])
    with closing(server.sock), closing(send(box, "client", SERVER[4])) as sock:
        connection, _ = server.sock.accept()
        with closing(connection):
            connection.sendall(V1 + HTTP)
            assert sock.recv(10)
            sock.sendall(b"HELO\r\n")
            assert told(reading) == [(Opening.OTHER, [])]


def test_a_bridge_shows_it_once(box, trace):
    """A packet that passes tc twice, at a bridge's port and at the bridge, counts once."""
    box.run("node", "ip", "link", "add", "br0", "type", "bridge")
    box.run("node", "ip", "addr", "flush", "dev", "n0")
    box.run("node", "ip", "link", "set", "n0", "master", "br0")
    box.run("node", "ip", "addr", "add", f"{NODE[4]}/24", "dev", "br0")
    box.run("node", "ip", "link", "set", "br0", "up")
    box.rules(TRACK)
    reading = trace(has_proxy_headers=True)
    pieces = [bytes([each]) for each in V1]
    server = Server(box, "server", SERVER[4])
    with closing(server.sock), closing(send(box, "client", SERVER[4], *pieces, b"\x16")):
        assert told(reading) == [(Opening.OTHER, ["198.51.100.7"])]
    assert reading.lost()["segment_limit"] == 0


def test_nothing_is_loaded_unasked(box, trace):
    """Without the option no program for it is loaded and nothing is attached at tc."""
    reading = trace()
    assert not [name for name in reading.source.run_statistics() if "segment" in name]
    assert reading.source.devices == 0
