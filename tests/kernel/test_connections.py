"""One record for each new connection, equal to what conntrack itself says."""

import socket
import struct
from collections import Counter
from contextlib import ExitStack
from ipaddress import ip_network

import pytest

from tests.kernel.box import (
    CLIENT,
    NODE,
    NODE_INSIDE,
    SERVER,
    echo_request,
    flat,
    sctp_init,
    udp_datagram,
    wait_until,
)
from tracer.filter import Filter
from tracer.kernel.programs import Sizes
from tracer.model import PROTOCOLS, Hook, Status

COUNT = 23
PORT = 8080
DNAT = f"""
table inet test-dnat {{ chain pre {{ type nat hook prerouting priority -100
  ip daddr {NODE[4]} dnat ip to {SERVER[4]}
  ip6 daddr {NODE[6]} dnat ip6 to {SERVER[6]}
}} }}
"""
SNAT = "table inet test-snat { chain post { type nat hook postrouting priority 100; masquerade; } }"
TRACK = "table inet test-track { chain f { type filter hook forward priority 0; ct state new; } }"
NATS = {
    "neither": TRACK,
    "dnat": DNAT,
    "snat": SNAT,
    "both": DNAT + SNAT,
}


def load_nat(box, nat):
    box.rules(NATS[nat])
    return NODE if "dnat" in NATS[nat] else SERVER


def connect_tcp(box, version, address, stack):
    listener = stack.enter_context(box.socket("server", version, socket.SOCK_STREAM))
    listener.bind(("", PORT))
    listener.listen(COUNT)
    peers = []
    for _ in range(COUNT):
        client = stack.enter_context(box.socket("client", version, socket.SOCK_STREAM))
        client.connect((address, PORT))
        accepted, peer = listener.accept()
        stack.enter_context(accepted)
        peers.append(peer[:2])
    return peers


def send_udp(box, version, address, stack):
    server = stack.enter_context(box.socket("server", version, socket.SOCK_DGRAM))
    server.bind(("", PORT))
    peers = []
    for _ in range(COUNT):
        client = stack.enter_context(box.socket("client", version, socket.SOCK_DGRAM))
        client.sendto(b"x", (address, PORT))
        peers.append(server.recvfrom(16)[1][:2])
    return peers


def send_icmp(box, version, address, stack):
    proto = {4: socket.IPPROTO_ICMP, 6: socket.IPPROTO_ICMPV6}[version]
    client = stack.enter_context(box.socket("client", version, socket.SOCK_RAW, proto))
    reply = {4: 0, 6: 129}[version]
    for identifier in range(1000, 1000 + COUNT):
        client.sendto(echo_request(version, identifier), (address, 0))
        while (answer := client.recv(256)[20 if version == 4 else 0 :])[0] != reply:
            pass
        assert struct.unpack_from("!H", answer, 4)[0] == identifier
    return []


SENDERS = {"tcp": connect_tcp, "udp": send_udp, "icmp": send_icmp}


@pytest.mark.parametrize("nat", NATS)
@pytest.mark.parametrize("proto", SENDERS)
@pytest.mark.parametrize("version", [4, 6])
def test_23_connections(box, trace, version, proto, nat):
    """
    23 connections give 23 records, with the tuples, mark and NAT status of conntrack's entries,
    and the peers that the server's own sockets saw.
    """
    address = load_nat(box, nat)[version]
    tracer = trace()

    with ExitStack() as stack:
        peers = SENDERS[proto](box, version, address, stack)
        tracer.flush()
        entries = box.conntrack("-p", "icmpv6" if (proto, version) == ("icmp", 6) else proto)
        src_nated = {entry["orig"] for entry in box.conntrack("--src-nat")}
        dst_nated = {entry["orig"] for entry in box.conntrack("--dst-nat")}

    records = tracer.connections
    assert len(records) == COUNT
    assert {(flat(c.orig), flat(c.reply), c.ct_mark, c.zone) for c in records} == {
        (e["orig"], e["reply"], e.get("mark", 0), e.get("zone", 0)) for e in entries
    }
    if proto != "icmp":  # the tool takes an ICMP id and type for ports that were translated
        assert {flat(c.orig) for c in records if c.status & Status.SRC_NAT} == src_nated
        assert {flat(c.orig) for c in records if c.status & Status.DST_NAT} == dst_nated
    assert all(c.hook is Hook.NF_POSTROUTING for c in records)
    if peers:
        assert {(str(c.seen_source), c.reply.dport) for c in records} == set(peers)
    assert not any(tracer.lost().values())


@pytest.mark.parametrize("nat", NATS)
@pytest.mark.parametrize("version", [4, 6])
def test_accepts_are_the_servers_peers(box, trace, version, nat):
    """The peers of accept records are those that accept(2) returned; what is missing is counted."""
    address = load_nat(box, nat)[version]
    tracer = trace()

    with ExitStack() as stack:
        peers = connect_tcp(box, version, address, stack)
        tracer.flush()

    # Accepts of every socket on the machine are seen: others are not the test's.
    server_netns = box.path("server").stat().st_ino
    accepts = [a for a in tracer.accepts if a.netns == server_netns]
    told = Counter((str(a.peer.src), a.peer.sport) for a in accepts)
    assert told <= Counter(peers)
    # If others' have filled the ring, ours may be among the lost.
    assert told.total() + tracer.lost_accepts() >= len(peers)
    expected = {c.reply.inverted for c in tracer.connections}
    assert {a.peer for a in accepts} == expected or tracer.lost_accepts()


def test_interfaces_and_namespace(box, trace):
    """A record names the namespace, and the packet's incoming and outgoing interface."""
    box.rules(TRACK)
    tracer = trace()
    sent = box.socket("client", 4, socket.SOCK_DGRAM)
    with sent:
        sent.sendto(b"x", (SERVER[4], PORT))
    tracer.wait_for(lambda t: t.connections)

    (connection,) = tracer.connections
    index = {
        name: int(box.run("node", "cat", f"/sys/class/net/{name}/ifindex")) for name in ("n0", "n1")
    }
    assert (connection.iif, connection.oif) == (index["n0"], index["n1"])
    assert connection.netns == box.path("node").stat().st_ino


def test_delivered_here(box, trace):
    """A connection to the node itself is seen at the input hook, once."""
    box.rules(TRACK.replace("forward", "input"))
    tracer = trace()
    with box.socket("client", 4, socket.SOCK_DGRAM) as sent:
        for _ in range(3):
            sent.sendto(b"x", (NODE[4], 9))
    tracer.wait_for(lambda t: t.connections)
    tracer.flush()

    (connection,) = tracer.connections
    assert connection.hook is Hook.NF_INPUT
    assert connection.oif == 0


def test_a_connection_over_loopback_is_one(box, trace):
    """A local connection leaves and enters the node with one entry: one record."""
    box.rules(TRACK.replace("forward", "output"))
    tracer = trace()
    with ExitStack() as stack:
        listener = stack.enter_context(box.socket("node", 4, socket.SOCK_STREAM))
        listener.bind(("127.0.0.1", PORT))
        listener.listen()
        client = stack.enter_context(box.socket("node", 4, socket.SOCK_STREAM))
        client.connect(("127.0.0.1", PORT))
        tracer.wait_for(lambda t: t.connections)
        tracer.flush()
        entries = box.conntrack("-p", "tcp")

    assert [flat(c.orig) for c in tracer.connections] == [e["orig"] for e in entries]


def test_unanswered_udp_flow(box, trace):
    """1,000 unanswered packets of one flow are one connection."""
    box.rules("table inet t { chain f { type filter hook forward priority 0; counter; } }" + TRACK)
    tracer = trace()
    with box.socket("client", 4, socket.SOCK_DGRAM) as sent:
        for _ in range(1000):
            sent.sendto(b"x", ("10.9.0.77", PORT))
    tracer.wait_for(lambda t: t.connections)
    wait_until(lambda: "packets 1000" in box.run("node", "nft", "list", "table", "inet", "t"))
    tracer.flush()

    assert len(tracer.connections) == 1


def test_an_icmp_error_is_no_connection(box, trace):
    """The ICMP error that answers a datagram is part of its flow."""
    box.rules(TRACK)
    tracer = trace()
    with box.socket("client", 4, socket.SOCK_DGRAM) as sent:
        sent.connect((SERVER[4], 9))
        sent.send(b"x")
        with pytest.raises(ConnectionRefusedError):
            sent.recv(1)
    tracer.flush()

    assert len(tracer.connections) == 1


def test_sctp(box, trace):
    """An SCTP association is a connection like others."""
    box.rules(SNAT)
    tracer = trace()
    with box.socket("client", 4, socket.SOCK_RAW, PROTOCOLS["sctp"]) as sent:
        sent.sendto(sctp_init(40000, 36412), (SERVER[4], 0))
    tracer.wait_for(lambda t: t.connections)

    (connection,) = tracer.connections
    (entry,) = box.conntrack("-p", "sctp")
    assert connection.orig.proto == PROTOCOLS["sctp"]
    assert (flat(connection.orig), flat(connection.reply)) == (entry["orig"], entry["reply"])


def test_conntrack_zone(box, trace):
    """A flow in a zone other than 0 carries its zone, as 'conntrack -L' shows it."""
    box.rules(
        "table inet t { chain pre { type filter hook prerouting priority -300; ct zone set 7; } }"
        + SNAT
    )
    tracer = trace()
    with box.socket("client", 4, socket.SOCK_DGRAM) as sent:
        sent.sendto(b"x", (SERVER[4], PORT))
    tracer.wait_for(lambda t: t.connections)

    (connection,) = tracer.connections
    (entry,) = box.conntrack("-w", "7", "-p", "udp")
    assert connection.zone == entry["zone"] == 7
    assert (flat(connection.orig), flat(connection.reply)) == (entry["orig"], entry["reply"])


def test_mark_before_snat(box, trace):
    """
    The packet's mark is the one before SNAT, although the rule that masquerades clears it as
    kube-proxy does; the entry's mark is another thing.
    """
    box.rules("""
table inet t {
  chain pre { type filter hook prerouting priority -150
    meta l4proto udp meta mark set 0x4000 ct mark set 0x77 counter }
  chain post { type nat hook postrouting priority 100
    meta mark & 0x4000 == 0x4000 meta mark set 0 counter masquerade }
  chain after { type filter hook postrouting priority 300
    meta l4proto udp meta mark 0 counter }
}""")
    tracer = trace()
    with box.socket("client", 4, socket.SOCK_DGRAM) as sent:
        sent.sendto(b"x", ("10.9.0.77", PORT))
    tracer.wait_for(lambda t: t.connections)

    (connection,) = tracer.connections
    (entry,) = box.conntrack("-p", "udp")
    assert (connection.mark, connection.ct_mark) == (0x4000, 0x77)
    assert entry["mark"] == connection.ct_mark
    assert str(connection.seen_source) == NODE_INSIDE[4]
    # All three rules say that they saw the packet: the mark was set, used, and cleared.
    printed = box.run("node", "nft", "list", "table", "inet", "t")
    assert printed.count("packets 1 ") == 3


def test_untracked_packets_are_counted(box, trace):
    """Untracked packets are no connection, and are counted."""
    box.rules(
        "table inet t { chain pre { type filter hook prerouting priority -300; notrack; } }" + TRACK
    )
    tracer = trace()
    with box.socket("client", 4, socket.SOCK_DGRAM) as sent:
        for _ in range(5):
            sent.sendto(b"x", (SERVER[4], PORT))
    # The server's ICMP errors may be skipped, too.
    tracer.wait_for(lambda t: t.lost()["untracked"] >= 5)

    assert not tracer.connections


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        pytest.param({"client": "198.51.100.8/29"}, 3, id="client in prefix"),
        pytest.param({"client": "198.51.100.11"}, 0, id="another client"),
        pytest.param({"client": "::/0"}, 0, id="IPv6 clients"),
        pytest.param({"client": "0.0.0.0/0"}, 3, id="IPv4 clients"),
        pytest.param({"backend": "10.9.0.2"}, 3, id="backend behind DNAT"),
        pytest.param({"backend": "198.51.100.1"}, 0, id="the address before DNAT"),
        pytest.param({"port": 80}, 1, id="port as addressed"),
        pytest.param({"port": 8080}, 1, id="port as answered"),
        pytest.param({"port": 9}, 0, id="another port"),
        pytest.param({"proto": "udp"}, 3, id="protocol"),
        pytest.param({"proto": "tcp"}, 0, id="another protocol"),
        pytest.param({"client": "198.51.100.10", "port": 81}, 1, id="both must hold"),
    ],
)
def test_filter_in_the_kernel(box, trace, wanted, expected):
    """Records that are not wanted are not written, by the filter's own definition."""
    box.rules(
        "table ip t { chain pre { type nat hook prerouting priority -100\n"
        "udp dport 80 dnat to 10.9.0.2:8080\n udp dport 81-82 dnat to 10.9.0.2 } }"
    )
    flows = Filter(
        **{key: ip_network(wanted[key]) for key in ("client", "backend") if key in wanted},
        port=wanted.get("port"),
        proto=PROTOCOLS.get(wanted.get("proto")),
    )
    everything, filtered = trace(), trace(wanted=flows)
    with box.socket("client", 4, socket.SOCK_DGRAM) as sent:
        for port in (80, 81, 82):
            sent.sendto(b"x", (NODE[4], port))
    everything.wait_for(lambda t: len(t.connections) == 3)
    filtered.flush()

    assert len(filtered.connections) == expected
    assert {c.orig for c in filtered.connections} == {
        c.orig for c in everything.connections if flows.matches(c)
    }


@pytest.mark.parametrize("ring_pages", [1, 1024], ids=["ring that is too small", "usual ring"])
def test_burst(box, trace, ring_pages):
    """Of 20,000 new flows in a burst, each one is a record or is counted as lost."""
    box.rules(TRACK)
    flows = 20_000
    tracer = trace(sizes=Sizes(connection_ring_pages=ring_pages))
    with box.socket("client", 4, socket.SOCK_RAW, socket.IPPROTO_UDP) as sent:
        for i in range(flows):
            sent.sendto(udp_datagram(1024 + i, PORT), ("10.9.0.77", 0))
    entries = int(box.run("node", "cat", "/proc/sys/net/netfilter/nf_conntrack_count"))
    assert entries == flows
    tracer.wait_for(lambda t: len(t.connections) + t.lost()["ring_full"] >= flows)
    tracer.flush()

    lost = tracer.lost().pop("ring_full")
    assert len(tracer.connections) + lost == flows
    assert len({c.orig for c in tracer.connections}) == len(tracer.connections)
    assert (lost > 0) == (ring_pages == 1)
    assert CLIENT[4] in {str(c.orig.src) for c in tracer.connections}
