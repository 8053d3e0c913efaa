"""Counting by path: exact totals that no client can inflate."""

import socket
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import ip_address, ip_network

from tests.kernel.box import (
    CLIENT,
    NODE,
    NODE_INSIDE,
    SERVER,
    echo_request,
    ipv4_packet,
    udp_datagram,
)
from tracer.decode import decode, decode_path_key
from tracer.kernel.counters import AddressClass
from tracer.kernel.programs import Sizes
from tracer.model import UDP, AddressFlag, ClientClass

PORT = 8080
SERVICE = f"""
table ip t {{
  chain pre {{ type nat hook prerouting priority -100
    udp dport 80-89 meta mark set 0x4000
    udp dport 80 dnat to {SERVER[4]}:{PORT}
    udp dport 81 dnat to {SERVER[4]}:{PORT + 1} }}
  chain post {{ type nat hook postrouting priority 100
    meta mark & 0x4000 == 0x4000 meta mark set 0 masquerade }}
}}"""
COUNTING = {"is_counting": True, "is_streaming": False}


def paths(tracer):
    return {decode_path_key(key): total for key, total in tracer.source.counters.read()}


def classify(box, tracer, classes):
    """Have these prefixes mean these classes."""
    prefixes = {ip_network(prefix): AddressClass(told) for prefix, told in classes.items()}
    assert tracer.source.counters.replace_classes({box.target().inode: prefixes}) == 0


def send_flows(box, count, dport, address=NODE[4], first=1024):
    with box.socket("client", 4, socket.SOCK_RAW, socket.IPPROTO_UDP) as sent:
        for i in range(count):
            sent.sendto(udp_datagram(first + i, dport), (address, 0))


def test_counts_by_path(box, trace):
    """However many clients' ports, a Service's path is one key with an exact total."""
    box.rules(SERVICE)
    tracer = trace(**COUNTING)
    classify(box, tracer, {"198.51.100.0/24": ClientClass.POD})
    send_flows(box, 3000, 80)
    send_flows(box, 500, 81, first=10000)

    counted = paths(tracer)
    assert sorted(counted.values()) == [500, 3000]
    key = max(counted, key=counted.get)
    assert (str(key.dst), key.dport) == (NODE[4], 80)
    assert (str(key.backend), key.backend_port) == (SERVER[4], PORT)
    assert str(key.seen_source) == NODE_INSIDE[4]
    assert (key.proto, key.family, key.client_class) == (UDP, "ipv4", ClientClass.POD)
    assert key.is_marked
    assert not key.is_input
    entries = int(box.run("node", "cat", "/proc/sys/net/netfilter/nf_conntrack_count"))
    assert sum(counted.values()) == entries


def test_streaming_off_writes_no_records(box, trace):
    """Counting alone wakes no reader and fills no ring."""
    box.rules(SERVICE)
    tracer = trace(**COUNTING)
    send_flows(box, 10, 80)
    tracer.flush()

    assert not tracer.records
    assert sum(paths(tracer).values()) == 10


def test_outsiders_cannot_fill_the_map(box, trace):
    """Neither external addresses nor the node's ports make new keys."""
    box.rules(SERVICE)
    tracer = trace(**COUNTING)
    for i in range(1, 200):
        send_flows(box, 1, 1000 + i, address=f"10.9.0.{10 + i % 200}")
        send_flows(box, 1, 2000 + i)

    counted = paths(tracer)
    assert len(counted) == 2
    assert sum(counted.values()) == 398
    assert {key.dst for key in counted} == {None}


def test_pings_make_one_path(box, trace):
    """The id of a ping is the sender's choice: it makes no path of its own, nor a translation."""
    box.rules(SERVICE)
    tracer = trace(**COUNTING)
    with box.socket("client", 4, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sent:
        for identifier in range(1000, 1020):
            sent.sendto(echo_request(4, identifier), (SERVER[4], 0))

    ((key, total),) = paths(tracer).items()
    assert (key.backend, key.dport, key.backend_port) == (None, 0, 0)
    assert total == 20


def test_longest_prefix_decides(box, trace):
    """The class of a client is that of the longest prefix; without one it is external."""
    box.rules(SERVICE)
    tracer = trace(**COUNTING)
    classes = {}
    send_flows(box, 1, 80, first=1)
    for first, prefix, client_class in (
        (2, "198.51.0.0/16", ClientClass.POD),
        (3, CLIENT[4], ClientClass.NODE),
        (4, "2001:db8::/32", ClientClass.LOADBALANCER),
    ):
        classes[prefix] = client_class
        classify(box, tracer, classes)
        send_flows(box, 1, 80, first=first)

    assert {key.client_class: total for key, total in paths(tracer).items()} == {
        ClientClass.EXTERNAL: 1,
        ClientClass.POD: 1,
        ClientClass.NODE: 2,
    }


def test_full_map_is_counted(box, trace):
    """What does not fit is counted as such: the sum stays exact."""
    box.rules(SERVICE.replace("80 dnat", "82-89 dnat"))
    tracer = trace(**COUNTING, sizes=Sizes(paths=4))
    for port in range(82, 90):
        send_flows(box, 50, port, first=port * 100)

    total = sum(paths(tracer).values())
    assert 0 < total < 400
    assert total + tracer.lost()["paths_full"] == 400


def test_drains_lose_nothing_while_maps_take_turns(box, trace):
    """Over many drains the sum is what was sent, although the maps were emptied between them."""
    box.rules(SERVICE.replace("80 dnat", "82-89 dnat"))
    tracer = trace(**COUNTING, sizes=Sizes(paths=6))
    counters = tracer.source.counters
    drained = Counter()
    for turn in range(6):
        for port in (82 + turn, 83 + turn):
            send_flows(box, 50, port, first=1024 + turn * 1000 + port)
        for _ in range(2):
            drained.update(counters.drain())

    assert len(drained) > 6
    assert tracer.lost()["paths_full"] == 0
    assert drained.total() == 600
    for key, total in drained.items():
        dport = decode_path_key(key).dport
        assert total == (50 if dport in (82, 88) else 100)
    assert counters.entries <= 3


def test_a_sample_for_each_path(box, trace):
    """Each path has the record of its first connection, and of a later one once forgotten."""
    box.rules(SERVICE)
    tracer = trace(**COUNTING)
    counters = tracer.source.counters
    send_flows(box, 1, 80, first=5000)
    ((key, _),) = counters.read()
    assert decode(counters.sample(key)).orig.sport == 5000
    send_flows(box, 1, 80, first=6000)
    assert decode(counters.sample(key)).orig.sport == 5000
    counters.forget_sample(key)
    send_flows(box, 1, 80, first=7000)
    assert decode(counters.sample(key)).orig.sport == 7000


def test_rounds_of_samples_begin_again(box, trace):
    """After the last round comes the first, never 0, in which a new path would seem to have one."""
    box.rules(SERVICE)
    tracer = trace(**COUNTING)
    counters = tracer.source.counters
    counters._turn = replace(counters._turn, sample_round=2**16 - 2)
    for turn in range(3):
        send_flows(box, 2, 80, first=5000 + 10 * turn)
        ((key, total),) = counters.read()
        assert total == 2 * turn + 2
        assert decode(counters.sample(key)).orig.sport == 5000 + 10 * turn
        counters.forget_sample(key)
    assert counters._turn.sample_round == 2


def test_prefixes_are_replaced(box, trace):
    """Prefixes that are not named any more are gone; flags reach the key."""
    box.rules(SERVICE)
    tracer = trace(**COUNTING)
    counters = tracer.source.counters
    netns = box.target().inode
    network = ip_network(CLIENT[4])
    here = AddressClass(ClientClass.NODE, AddressFlag.HERE)
    counters.replace_classes({netns: {network: here}})
    send_flows(box, 1, 80, first=1)
    counters.replace_classes({netns: {ip_network("198.51.0.0/16"): AddressClass(ClientClass.POD)}})
    send_flows(box, 1, 80, first=2)
    counters.replace_classes({netns + 1: {network: here}})
    send_flows(box, 1, 80, first=3)

    told = {(key.client_class, key.client_flags) for key in paths(tracer)}
    assert told == {
        (ClientClass.NODE, AddressFlag.HERE),
        (ClientClass.POD, AddressFlag(0)),
        (ClientClass.EXTERNAL, AddressFlag(0)),
    }


def test_classes_of_more_clients_than_are_remembered(box, trace):
    """Each of many clients has its own class, also when it takes another's place in memory."""
    box.rules(SERVICE)
    box.run("node", "ip", "route", "add", "10.77.0.0/16", "via", CLIENT[4])
    tracer = trace(**COUNTING)
    counters, netns = tracer.source.counters, box.target().inode
    pods = ip_network("10.77.0.0/21")
    clients = [ip_address("10.77.0.0") + n for n in range(pods.num_addresses + 1000)]

    def send_from_all(sport):
        with box.socket("client", 4, socket.SOCK_RAW, socket.IPPROTO_RAW) as sent:
            for client in clients:
                packet = ipv4_packet(str(client), NODE[4], udp_datagram(sport, 80))
                sent.sendto(packet, (NODE[4], 0))

    counters.replace_classes({netns: {pods: AddressClass(ClientClass.POD, AddressFlag.CLUSTER)}})
    for sport in (1024, 1025):
        send_from_all(sport)
    counters.replace_classes({netns: {}})
    send_from_all(1026)

    told = Counter()
    for key, total in paths(tracer).items():
        told[key.client_class, key.client_flags] += total
    assert told == {
        (ClientClass.POD, AddressFlag.CLUSTER): 2 * pods.num_addresses,
        (ClientClass.EXTERNAL, AddressFlag(0)): 2 * 1000 + len(clients),
    }


def test_counting_and_streaming_agree(box, trace):
    """With both on, the totals are the records."""
    box.rules(SERVICE)
    tracer = trace(is_counting=True)
    with ExitStack() as stack:
        for version in (4, 6):
            sent = stack.enter_context(box.socket("client", version, socket.SOCK_DGRAM))
            sent.sendto(b"x", (SERVER[version], PORT))
    send_flows(box, 100, 80)
    tracer.flush()

    counted = paths(tracer)
    assert sum(counted.values()) == len(tracer.connections)
    assert {key.seen_source for key in counted} == {
        c.seen_source if c.is_snat else None for c in tracer.connections
    }
    assert ip_address(NODE_INSIDE[4]) in {key.seen_source for key in counted}
