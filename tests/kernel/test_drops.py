"""Packets that the kernel discards: each one reported, with reason, tuple and hook."""

import re
import socket
from contextlib import ExitStack, suppress

import pytest

from tests.kernel.box import CLIENT, NODE, SERVER, udp_datagram, wait_until
from tracer.filter import Filter
from tracer.judge.place import possible_hooks
from tracer.kernel.programs import Sizes
from tracer.model import UDP, Hook

PORT = 8080


def drop_rule(hook, match="udp dport 8080"):
    return (
        f"table inet t {{ chain c {{ type filter hook {hook} priority 0\n"
        f"ct state new\n {match} counter drop }} }}"
    )


def dropped_by_rule(box):
    """How many packets the rule's own counter saw."""
    printed = box.run("node", "nft", "list", "table", "inet", "t")
    return int(re.search(r"counter packets (\d+)", printed)[1])


def hooks_of(tracer, drop):
    dst_input = tracer.source.symbol(drop.dst_input) if drop.dst_input else None
    return possible_hooks(drop, dst_input)


def reason_of(tracer, drop):
    return tracer.source.info.drop_reasons[drop.reason]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(
    ("hook", "sender", "address", "expected"),
    [
        ("prerouting", "client", SERVER, Hook.NF_PREROUTING),
        ("input", "client", NODE, Hook.NF_INPUT),
        ("forward", "client", SERVER, Hook.NF_FORWARD),
        ("postrouting", "client", SERVER, Hook.NF_POSTROUTING),
        ("output", "node", SERVER, Hook.NF_OUTPUT),
        ("postrouting", "node", SERVER, Hook.NF_POSTROUTING),
    ],
)
def test_dropped_by_a_rule(box, trace, version, hook, sender, address, expected):
    """
    As many drops as the rule counted, at the rule's hook, with the packet's tuple and that of
    its conntrack entry.
    """
    box.rules(drop_rule(hook))
    tracer = trace()
    with box.socket(sender, version, socket.SOCK_DGRAM) as sent:
        sent.bind(("", 40000))
        for _ in range(3):
            # This is how a local sender is recognised.
            with suppress(PermissionError):
                sent.sendto(b"x", (address[version], PORT))
    wait_until(lambda: dropped_by_rule(box) == 3)
    tracer.wait_for(lambda t: len(t.drops) >= 3)
    tracer.flush()

    assert len(tracer.drops) == 3
    for drop in tracer.drops:
        assert reason_of(tracer, drop) == "NETFILTER_DROP"
        assert hooks_of(tracer, drop) == (expected,)
        assert drop.packet == drop.orig
        assert (drop.packet.sport, drop.packet.dport, drop.packet.proto) == (40000, PORT, UDP)
        assert str(drop.packet.dst) == address[version]
        assert drop.netns == box.path("node").stat().st_ino
    assert not tracer.connections


def test_original_tuple_behind_dnat(box, trace):
    """A packet dropped after DNAT still shows what its client addressed."""
    box.rules(
        drop_rule("forward") + f"table ip n {{ chain c {{ type nat hook prerouting priority -100\n"
        f"udp dport 80 dnat to {SERVER[4]}:{PORT} }} }}"
    )
    tracer = trace()
    with box.socket("client", 4, socket.SOCK_DGRAM) as sent:
        sent.sendto(b"x", (NODE[4], 80))
    tracer.wait_for(lambda t: t.drops)

    (drop,) = tracer.drops
    assert (str(drop.orig.dst), drop.orig.dport) == (NODE[4], 80)
    assert (str(drop.packet.dst), drop.packet.dport) == (SERVER[4], PORT)
    assert not drop.is_reply


def test_dropped_reply(box, trace):
    """A dropped reply is distinguished from a dropped request."""
    box.rules(drop_rule("forward", "udp sport 8080"))
    tracer = trace()
    with ExitStack() as stack:
        server = stack.enter_context(box.socket("server", 4, socket.SOCK_DGRAM))
        server.bind(("", PORT))
        client = stack.enter_context(box.socket("client", 4, socket.SOCK_DGRAM))
        client.sendto(b"x", (SERVER[4], PORT))
        server.sendto(b"y", server.recvfrom(1)[1])
        tracer.wait_for(lambda t: t.drops)

    (drop,) = tracer.drops
    assert drop.is_reply
    assert drop.packet == drop.orig.inverted


@pytest.mark.parametrize("wanted", [Filter(), Filter(port=PORT)])
def test_before_conntrack(box, trace, wanted):
    """A rule that sets a zone leaves a template on the packet, which is not its entry."""
    box.rules(
        "table ip r { chain c { type filter hook prerouting priority raw; "
        f"udp dport {PORT} ct zone set 5; udp dport {PORT} drop; }} }}"
    )
    tracer = trace(wanted=wanted)
    with box.socket("client", 4, socket.SOCK_DGRAM) as sent:
        sent.sendto(b"x", (SERVER[4], PORT))
    tracer.wait_for(lambda t: t.drops)

    (drop,) = tracer.drops
    assert reason_of(tracer, drop) == "NETFILTER_DROP"
    assert (str(drop.packet.dst), drop.packet.dport) == (SERVER[4], PORT)
    assert (drop.orig, drop.zone) == (None, 0)


def test_nobody_listens(box, trace):
    """A closed port is a drop with its own reason; its place has a name."""
    box.rules(drop_rule("forward"))
    tracer = trace()
    with (
        box.socket("client", 4, socket.SOCK_STREAM) as client,
        pytest.raises(ConnectionRefusedError),
    ):
        client.connect((NODE[4], 9))
    tracer.wait_for(lambda t: t.drops)

    (drop,) = tracer.drops
    assert reason_of(tracer, drop) == "NO_SOCKET"
    assert "rcv" in tracer.source.symbol(drop.location)


def test_reverse_path_filter(box, trace):
    """A source that should come in elsewhere is dropped before conntrack: no original tuple."""
    for name in ("all", "n0"):
        box.set("node", f"ipv4/conf/{name}/rp_filter", 1)
    tracer = trace()
    box.run("client", "ip", "addr", "add", "10.9.0.99/32", "dev", "lo")
    # The node would not even answer ARP requests from there.
    mac = box.run("node", "cat", "/sys/class/net/n0/address").strip()
    box.run("client", "ip", "neigh", "add", NODE[4], "lladdr", mac, "dev", "c0")
    with box.socket("client", 4, socket.SOCK_DGRAM) as sent:
        sent.bind(("10.9.0.99", 0))
        sent.sendto(b"x", (NODE[4], PORT))
    tracer.wait_for(lambda t: t.drops)

    (drop,) = tracer.drops
    assert reason_of(tracer, drop) == "IP_RPFILTER"
    assert str(drop.packet.src) == "10.9.0.99"


def test_other_namespaces_are_left_out(box, trace):
    """A drop in a namespace that is not traced is not reported, and not counted as lost."""
    tracer = trace()
    with box.socket("client", 4, socket.SOCK_DGRAM) as sent:
        # The server drops this one, the node the next.
        sent.connect((SERVER[4], 9))
        sent.send(b"x")
        with pytest.raises(ConnectionRefusedError):
            sent.recv(1)
    with box.socket("client", 4, socket.SOCK_DGRAM) as sent:
        sent.sendto(b"x", (NODE[4], 9))
    tracer.wait_for(lambda t: t.drops)

    assert [str(drop.packet.dst) for drop in tracer.drops] == [NODE[4]]
    assert not any(tracer.lost().values())


def test_every_reason_of_a_watched_flow(box, trace):
    """Of a flow that was asked for, drops are reported for reasons that are otherwise left out."""
    usual = trace()
    watching = trace(wanted=Filter(port=PORT))
    with (
        box.socket("node", 4, socket.SOCK_DGRAM) as bound,
        box.socket("node", 4, socket.SOCK_DGRAM) as another,
        box.socket("client", 4, socket.SOCK_RAW, socket.IPPROTO_UDP) as sent,
    ):
        bound.bind(("", PORT))
        another.bind(("", PORT + 1))
        for port in (PORT + 1, PORT):
            sent.sendto(udp_datagram(40000, port, checksum=1), (NODE[4], 0))
        # A wrong checksum is found when the socket is read.
        bound.setblocking(False)
        with pytest.raises(BlockingIOError):
            bound.recv(1)
        watching.wait_for(lambda t: t.drops)
        usual.flush()

    (drop,) = watching.drops
    assert reason_of(watching, drop) == "UDP_CSUM"
    assert (str(drop.packet.src), drop.packet.dport) == (CLIENT[4], PORT)
    assert not usual.drops


def test_ports_behind_ipv6_extension_headers(box, trace):
    """Ports are found behind hop-by-hop and destination options; a fragment has none."""
    box.rules(drop_rule("prerouting", "meta protocol ip6 ip6 daddr 2001:db8:c::1"))
    tracer = trace()
    with box.socket("client", 6, socket.SOCK_DGRAM) as sent:
        padding = bytes([0, 0, 1, 4, 0, 0, 0, 0])
        sent.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS, padding)
        sent.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_HOPOPTS, padding)
        sent.bind(("", 40001))
        sent.sendto(b"x", (NODE[6], PORT))
    tracer.wait_for(lambda t: t.drops)

    drop = tracer.drops[0]
    assert (drop.packet.proto, drop.packet.sport, drop.packet.dport) == (UDP, 40001, PORT)


def test_no_symbol_is_guessed(box, trace):
    """An address below the kernel's text has no name."""
    assert trace().source.symbol(1) is None


def test_flood_is_counted(box, trace):
    """Of 20,000 dropped packets each is a record or is counted as lost."""
    box.rules(drop_rule("input"))
    tracer = trace(sizes=Sizes(drop_ring_pages=16))
    packets = 20_000
    with box.socket("client", 4, socket.SOCK_RAW, socket.IPPROTO_UDP) as sent:
        for i in range(packets):
            sent.sendto(udp_datagram(1024 + i, PORT), (NODE[4], 0))
    wait_until(lambda: dropped_by_rule(box) == packets)
    tracer.wait_for(lambda t: len(t.drops) + t.lost()["ring_full"] >= packets)
    tracer.flush()

    assert len(tracer.drops) + tracer.lost()["ring_full"] == packets
    assert tracer.lost()["ring_full"]
