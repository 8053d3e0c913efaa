"""Hops of unusual packets: fragments, tags, non-linear headers, reused memory."""

import mmap
import re
import socket
import struct
from collections import Counter
from contextlib import ExitStack, closing, contextmanager
from ipaddress import ip_address, ip_network

import pytest

from tests.kernel.box import (
    CLIENT,
    NODE,
    NODE_INSIDE,
    SERVER,
    echo_request,
    ipv4_packet,
    udp_datagram,
)
from tests.kernel.test_connections import load_nat
from tests.kernel.test_hops import FORWARDED, PORT, exchange, packets_of, places
from tests.kernel.test_segments import TRACK
from tests.unit.fake_source import FakeSource
from tracer.decode import decode
from tracer.filter import Filter
from tracer.judge.path import Direction, Ending, Translated
from tracer.kernel import attachment, netns
from tracer.kernel.source import KernelSource, Settings
from tracer.model import ICMP, UDP, Hook, Hop
from tracer.paths import PathPipeline
from tracer.source import SourceInfo

SPORT = 4711
INFO = SourceInfo(clock_offset_ns=0, nodes={}, rung="test")
ETHERTYPES = {4: b"\x08\x00", 6: b"\x86\xdd"}
# 802.1ad and 802.1Q with VLAN 0, which hosts take off and go on.
TAGS = b"\x88\xa8\0\0" + b"\x81\x00\0\0"
# linux/if_packet.h
SOL_PACKET, PACKET_TX_RING = 263, 13
FRAME_AT, SEND_REQUEST = 32, 1


@pytest.fixture(autouse=True)
def neighbours(box):
    """Have all neighbours known."""
    for version in (4, 6):
        exchange(box, version, socket.SOCK_DGRAM, SERVER[version])


def paths(tracer):
    """What a reader of paths gets for all that was seen so far."""
    records = tracer.source.read(0)
    pipeline = PathPipeline(FakeSource([records], INFO))
    return [*pipeline.judge(records), *pipeline.rest()]


def mac(box, host, device):
    printed = box.run(host, "ip", "link", "show", device)
    return bytes.fromhex(re.search(r"link/ether (\S+)", printed)[1].replace(":", ""))


def ip_packet(version, src, dst):
    """A UDP datagram from SPORT to PORT, with its IP header."""
    src, dst = ip_address(src).packed, ip_address(dst).packed
    if version == 4:
        udp = udp_datagram(SPORT, PORT)
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, UDP, 0) + src + dst
        return head[:10] + checksum(head) + head[12:] + udp
    bare = udp_datagram(SPORT, PORT, b"xy")
    pseudo = src + dst + struct.pack("!II", len(bare), UDP)
    udp = bare[:6] + checksum(pseudo + bare) + bare[8:]
    return struct.pack("!IHBB", 6 << 28, len(udp), UDP, 64) + src + dst + udp


def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF)


def send_frame(box, host, device, frame):
    with packet_socket(box, host, device) as sock:
        sock.send(frame)


def send_in_pages(box, host, device, frame):
    """Send a frame of which nothing but the link's header is in the packet's linear part."""
    with packet_socket(box, host, device) as sock:
        sock.setsockopt(SOL_PACKET, PACKET_TX_RING, struct.pack("4I", 4096, 1, 2048, 2))
        with mmap.mmap(sock.fileno(), 4096) as ring:
            ring[FRAME_AT : FRAME_AT + len(frame)] = frame
            ring[:12] = struct.pack("=QI", SEND_REQUEST, len(frame))
            assert sock.send(b"") == len(frame)


@contextmanager
def packet_socket(box, host, device):
    with netns.inside(box.path(host)):
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    with sock:
        sock.bind((device, 0))
        yield sock


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(
    ("send", "tags"), [(send_in_pages, b""), (send_frame, TAGS)], ids=["in pages", "tagged"]
)
def test_wherever_its_bytes_lie(box, trace, version, send, tags):
    """Headers are read outside the linear part, and behind VLAN tags."""
    load_nat(box, "neither")
    tracer = trace(packets=1, wanted=Filter(client=ip_network(CLIENT[version]), proto=UDP))
    link = mac(box, "node", "n0") + mac(box, "client", "c0") + tags + ETHERTYPES[version]
    with box.socket("server", version, socket.SOCK_DGRAM) as server:
        server.bind(("", PORT))
        send(box, "client", "c0", link + ip_packet(version, CLIENT[version], SERVER[version]))
        server.recv(9)
    tracer.flush()
    assert [places(packet) for packet in packets_of(tracer.hops)] == [FORWARDED]
    assert {(hop.packet.sport, hop.packet.dport) for hop in tracer.hops} == {(SPORT, PORT)}


def test_ports_used_again(box, trace):
    """A connection with the ports of one that conntrack has forgotten is watched from its first."""
    load_nat(box, "both")
    tracer = trace(packets=1, wanted=Filter(proto=UDP))
    with box.socket("server", 4, socket.SOCK_DGRAM) as server:
        server.bind(("", PORT))
        for _ in range(2):
            with box.socket("client", 4, socket.SOCK_DGRAM) as client:
                client.bind(("", SPORT))
                for _ in range(2):
                    client.sendto(b"x", (NODE[4], PORT))
                    server.recv(1)
            box.run("node", "conntrack", "-D", "-p", "udp")
    tracer.flush()
    assert [places(packet) for packet in packets_of(tracer.hops)] == [FORWARDED, FORWARDED]
    assert tracer.lost()["over_limit"] == 2


def test_dropped_again_and_again(box, trace):
    """A packet that is dropped before conntrack keeps it is no new connection each time."""
    box.rules(f"table ip d {{ chain c {{ type filter hook forward priority 0; udp dport {PORT}"
              " ct state new drop; } }")  # fmt: skip
    tracer = trace(packets=2, wanted=Filter(proto=UDP))
    with box.socket("client", 4, socket.SOCK_DGRAM) as client:
        for _ in range(5):
            client.sendto(b"x", (SERVER[4], PORT))
        tracer.wait_for(lambda t: len(t.drops) == 5)
    assert [packet[0].number for packet in packets_of(tracer.hops)] == [1, 2]


@pytest.mark.parametrize("version", [4, 6])
def test_fragments(box, trace, version):
    """
    A datagram in fragments is one packet: it comes and leaves in parts of which only the first has
    ports, and NAT alone changes it.
    """
    address = load_nat(box, "both")[version]
    tracer = trace(packets=1, wanted=Filter(proto=UDP))
    with ExitStack() as stack:
        server = stack.enter_context(box.socket("server", version, socket.SOCK_DGRAM))
        server.bind(("", PORT))
        client = stack.enter_context(box.socket("client", version, socket.SOCK_DGRAM))
        client.sendto(b"x" * 4000, (address, PORT))
        _, seen = server.recvfrom(4000)
    (path,) = paths(tracer)
    (passage,) = path.legs[0].passages
    hops = [each.hop for each in passage.hops]
    assert [hop.hook for hop in hops if not hop.is_fragment] == [
        place for place, _ in FORWARDED[1:]
    ]
    left = [hop for hop in hops if hop.hook is Hook.TC_EGRESS]
    assert [hop.is_fragment for hop in left] == [False, True, True]
    assert {str(hop.packet.src) for hop in left} == {seen[0]}
    assert left[0].packet.sport == seen[1]
    assert passage.ending is Ending.SENT
    done = [(each.by, hop.hop.hook) for hop in passage.hops for each in hop.translations]
    assert done == [
        (Translated.DNAT, Hook.NF_PREROUTING),
        (Translated.SNAT, Hook.NF_POSTROUTING),
    ]


def test_fragments_in_used_memory(box, trace):
    """Fragments that are made in the memory of unwatched packets are seen as they leave."""
    box.rules(TRACK)
    tracer = trace(packets=1, wanted=Filter(proto=UDP))
    datagram = udp_datagram(SPORT, PORT, b"x" * 2000)
    with ExitStack() as stack:
        server = stack.enter_context(box.socket("server", 4, socket.SOCK_DGRAM))
        server.bind((SERVER[4], PORT))
        sent = stack.enter_context(box.socket("client", 4, socket.SOCK_RAW, socket.IPPROTO_RAW))
        # Answers of ARP are not watched.
        for host in ("client", "node"):
            box.run(host, "ip", "neigh", "flush", "all")
        for offset, part in ((0x2000, datagram[:1000]), (125, datagram[1000:])):
            packet = ipv4_packet(CLIENT[4], SERVER[4], part)
            packet = packet[:4] + struct.pack("!HH", SPORT, offset) + packet[8:]
            sent.sendto(packet, (SERVER[4], 0))
        server.recv(4000)
    tracer.flush()
    left = [hop.is_fragment for hop in tracer.hops if hop.hook is Hook.TC_EGRESS]
    assert left == [False, True]


def test_without_programs_at_tc(box, trace, monkeypatch):
    """If no interface can be attached to, reused packet memory is still recognised as new."""
    monkeypatch.setattr(attachment, "has_tcx_links", lambda: False)
    load_nat(box, "neither")
    tracer = trace(packets=1, wanted=Filter(port=PORT, proto=UDP))
    with ExitStack() as stack:
        servers = [
            stack.enter_context(box.socket("server", 4, socket.SOCK_DGRAM)) for _ in range(2)
        ]
        for port, server in enumerate(servers, PORT):
            server.bind(("", port))
        for _ in range(10):
            with box.socket("client", 4, socket.SOCK_DGRAM) as client:
                for port, server in enumerate(servers, PORT):
                    client.sendto(b"x", (SERVER[4], port))
                    server.recv(1)
    tracer.flush()
    assert [places(packet) for packet in packets_of(tracer.hops)] == [FORWARDED[1:-1]] * 10


def test_udp_lite(box, trace):
    """Its ports are known wherever the packet is seen, as conntrack knows them."""
    box.rules(TRACK)
    # The sender leaves the checksum of UDP-Lite to nobody, but conntrack would verify it.
    box.set("node", "netfilter/nf_conntrack_checksum", 0)
    tracer = trace(packets=1, wanted=Filter(port=PORT))
    try:
        server = box.socket("server", 4, socket.SOCK_DGRAM, socket.IPPROTO_UDPLITE)
    except OSError as error:
        pytest.skip(f"UDP-Lite: {error}")
    with server, box.socket("client", 4, socket.SOCK_DGRAM, socket.IPPROTO_UDPLITE) as sent:
        server.bind((SERVER[4], PORT))
        sent.sendto(b"x", (SERVER[4], PORT))
        server.recv(1)
    tracer.flush()
    (connection,) = tracer.connections
    assert {hop.packet for hop in tracer.hops} == {connection.orig}


def test_taken_by_a_rule(box, trace):
    """The next packet of a client whose packet a rule kept for itself is a packet of its own."""
    box.rules(
        "table ip s { chain r { type filter hook prerouting priority raw; "
        f"tcp dport {PORT} tcp flags syn notrack; }} "
        "chain f { type filter hook forward priority filter; "
        "ct state invalid,untracked synproxy mss 1460 wscale 7 timestamp sack-perm; } }"
    )
    box.set("node", "netfilter/nf_conntrack_tcp_loose", 0)
    tracer = trace(packets=20, wanted=Filter(port=PORT))
    with box.socket("server", 4, socket.SOCK_STREAM) as server:
        server.bind((SERVER[4], PORT))
        server.listen()
        for _ in range(10):
            with box.socket("client", 4, socket.SOCK_STREAM) as client:
                client.connect((SERVER[4], PORT))
                taken, _ = server.accept()
                with taken:
                    for _ in range(5):
                        client.sendall(b"x")
                        taken.recv(1)
    tracer.flush()
    came = Counter(hop.packet_id for hop in tracer.hops if hop.hook is Hook.TC_INGRESS)
    assert set(came.values()) == {1}


def test_past_netfilter(box, trace):
    """Packets that a packet socket sends are counted as others are, and limited."""
    load_nat(box, "neither")
    tracer = trace(packets=2, wanted=Filter(port=PORT, proto=UDP))
    link = mac(box, "server", "s0") + mac(box, "node", "n1") + ETHERTYPES[4]
    with box.socket("server", 4, socket.SOCK_DGRAM) as server:
        server.bind(("", PORT))
        for _ in range(9):
            send_frame(box, "node", "n1", link + ip_packet(4, NODE_INSIDE[4], SERVER[4]))
            server.recv(1)
    tracer.flush()
    assert [places(packet) for packet in packets_of(tracer.hops)] == [[(Hook.TC_EGRESS, None)]] * 2
    assert tracer.lost()["over_limit"] == 7


def test_ping_over_two_nodes(box):
    """A ping is followed to the next node, where a filter by client would not know it again."""
    load_nat(box, "snat")
    rules = "table ip t { chain c { type filter hook input priority 0; ct state new; } }"
    box.rules(rules, host="server")
    nodes = [box.target(), box.target("server")]
    wanted = Filter(client=ip_network(CLIENT[4]))
    with closing(KernelSource(nodes, Settings(packets=1, wanted=wanted))) as source:
        with box.socket("client", 4, socket.SOCK_RAW, ICMP) as client:
            client.sendto(echo_request(4, 77), (SERVER[4], 0))
            client.recv(100)
        records = source.read(0)
    hops = [record for record in map(decode, records) if isinstance(record, Hop)]
    assert {hop.netns for hop in hops} == {node.inode for node in nodes}
    pipeline = PathPipeline(FakeSource([records], INFO))
    (path,) = [*pipeline.judge(records), *pipeline.rest()]
    assert [leg.netns for leg in path.legs] == [node.inode for node in nodes]
    assert all(leg.passage(way) for leg in path.legs for way in Direction)
