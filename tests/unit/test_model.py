"""NAT is read off the difference between original and reply tuple."""

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit import samples
from tests.unit.samples import BACKEND, CLIENT, NODE, flow
from tracer.filter import Filter
from tracer.model import ICMP, ICMPV6, PROTOCOLS, Hook, protocol_name


@pytest.mark.parametrize(
    ("reply", "is_dnat", "is_snat", "seen"),
    [
        pytest.param(samples.UNTOUCHED[1], False, False, CLIENT, id="no-nat"),
        pytest.param(samples.PRESERVED[1], True, False, CLIENT, id="policy-local"),
        pytest.param(samples.REPLACED[1], True, True, NODE, id="policy-cluster"),
        pytest.param(flow(NODE, 30080, "10.240.0.6", 1), False, True, "10.240.0.6", id="egress"),
        pytest.param(flow(NODE, 30080, CLIENT, 1024), False, False, CLIENT, id="source-port"),
        pytest.param(flow(NODE, 8080, CLIENT, 46356), False, False, CLIENT, id="redirect"),
    ],
)
def test_nat(reply, is_dnat, is_snat, seen):
    """A changed address is a translation; a changed port alone hides no client."""
    connection = samples.connection(samples.SENT, reply)
    assert (connection.is_dnat, connection.is_snat) == (is_dnat, is_snat)
    assert connection.seen_source == ip_address(seen)


def test_inverted():
    """The reply of a TCP tuple has its ends swapped."""
    assert samples.SENT.inverted == flow(NODE, 30080, CLIENT, 46356)


@pytest.mark.parametrize(
    ("proto", "sent", "answered"),
    [
        pytest.param(ICMP, 8, 0, id="echo"),
        pytest.param(ICMP, 13, 14, id="timestamp"),
        pytest.param(ICMP, 15, 16, id="information"),
        pytest.param(ICMP, 17, 18, id="address-mask"),
        pytest.param(ICMPV6, 128, 129, id="echo6"),
        pytest.param(ICMPV6, 139, 140, id="node-information"),
    ],
)
@pytest.mark.parametrize("is_back", [False, True])
def test_inverted_icmp(proto, sent, answered, is_back):
    """The reply of an ICMP query has the reply's type, the same id and the same code."""
    if is_back:
        sent, answered = answered, sent
    query = flow(CLIENT, 4660, NODE, sent << 8 | 3, proto=proto)
    assert query.inverted == flow(NODE, 4660, CLIENT, answered << 8 | 3, proto=proto)


def test_inverted_icmp_error():
    """A type that is no query keeps its type, as conntrack knows no reply to it."""
    assert flow(CLIENT, 1, NODE, 3 << 8 | 1, proto=1).inverted.dport == 3 << 8 | 1


@given(samples.tuples)
def test_inverted_twice(five_tuple):
    """The reply of the reply is the tuple itself."""
    assert five_tuple.inverted.inverted == five_tuple


@given(samples.connections)
def test_no_nat_is_inversion(connection):
    """An entry whose reply is the inverted original has no translation."""
    plain = replace(connection, reply=connection.orig.inverted)
    assert not plain.is_snat
    assert not plain.is_dnat


@pytest.mark.parametrize(("name", "number"), PROTOCOLS.items())
def test_protocol_name(name, number):
    """Protocols are named as conntrack -L names them."""
    assert protocol_name(number) == name


def test_unknown_protocol_name():
    """A protocol without a name is its number."""
    assert protocol_name(253) == "253"


def test_hook_labels():
    """Hooks are spelled as iptables spells its chains."""
    assert [hook.label for hook in Hook] == [
        "prerouting", "input", "forward", "output", "postrouting", "conntrack",
        "tc_ingress", "tc_egress",
    ]  # fmt: skip


NET = ip_network


@pytest.mark.parametrize(
    ("wanted", "matches"),
    [
        pytest.param(Filter(), True, id="empty"),
        pytest.param(Filter(client=NET("198.51.100.0/24")), True, id="client"),
        pytest.param(Filter(client=NET("10.240.0.5/32")), False, id="not-the-seen-source"),
        pytest.param(Filter(client=NET("0.0.0.0/0")), True, id="any-ipv4"),
        pytest.param(Filter(client=NET("::/0")), False, id="any-ipv6"),
        pytest.param(Filter(backend=NET("10.244.1.0/24")), True, id="backend"),
        pytest.param(Filter(backend=NET("10.240.0.5/32")), False, id="not-the-service-address"),
        pytest.param(Filter(port=30080), True, id="port-sent-to"),
        pytest.param(Filter(port=8080), True, id="port-that-answers"),
        pytest.param(Filter(port=46356), False, id="not-the-client-port"),
        pytest.param(Filter(port=65241), False, id="not-the-snat-port"),
        pytest.param(Filter(proto=6), True, id="proto"),
        pytest.param(Filter(proto=17), False, id="other-proto"),
        pytest.param(Filter(proto=6, port=8080, client=NET("198.51.100.10/32")), True, id="all"),
        pytest.param(Filter(proto=6, port=53, client=NET("198.51.100.10/32")), False, id="not-all"),
    ],
)
def test_filter_matches(wanted, matches):
    """The client is who sent, the backend is who replies, the port is either side's."""
    assert wanted.matches(samples.connection(*samples.REPLACED)) is matches


@pytest.mark.parametrize(
    ("wanted", "matches"),
    [
        (Filter(), True),
        (Filter(client=NET("198.51.100.0/24")), True),
        (Filter(client=NET("192.0.2.0/24")), False),
        (Filter(backend=NET("10.244.1.11/32")), True),
        (Filter(client=NET("198.51.100.0/24"), backend=NET("10.244.1.11/32")), True),
        (Filter(client=NET("198.51.100.0/24"), backend=NET("10.244.1.12/32")), False),
        (Filter(port=8080), True),
        (Filter(port=46356), True),
        (Filter(port=80), False),
        (Filter(proto=17), False),
    ],
)
def test_filter_matches_packet(wanted, matches):
    """A dropped packet belongs to a flow in either direction."""
    packet = flow(CLIENT, 46356, BACKEND, 8080)
    assert wanted.matches_packet(packet) is matches
    assert wanted.matches_packet(packet.inverted) is matches


filters = st.builds(
    Filter,
    client=st.none() | samples.ipv4.map(lambda address: NET((address, 4), strict=False)),
    backend=st.none() | samples.ipv4.map(lambda address: NET((address, 4), strict=False)),
    port=st.none() | st.integers(1, 65535),
    proto=st.none() | st.sampled_from([6, 17]),
)


@given(filters, samples.tuples.filter(lambda five_tuple: not five_tuple.is_icmp))
def test_matches_packet_is_symmetrical(wanted, packet):
    """A packet and its reply are both wanted, or neither is."""
    assert wanted.matches_packet(packet) == wanted.matches_packet(packet.inverted)


@given(filters, samples.tuples.filter(lambda five_tuple: not five_tuple.is_icmp))
def test_dropped_packets_of_wanted_connections(wanted, sent):
    """If an untranslated connection is wanted, so are its dropped packets of both directions."""
    connection = samples.connection(sent, sent.inverted)
    if wanted.matches(connection):
        assert wanted.matches_packet(connection.orig)
        assert wanted.matches_packet(connection.reply)


@given(samples.connections, samples.tuples)
def test_empty_filter_wants_all(connection, packet):
    """An empty filter wants every connection and every packet."""
    assert Filter().is_empty
    assert Filter().matches(connection)
    assert Filter().matches_packet(packet)


@given(filters, filters, samples.connections)
def test_filters_narrow(one, other, connection):
    """Each criterion only narrows: what both together want, each alone wants too."""
    both = replace(
        one,
        client=one.client or other.client,
        backend=one.backend or other.backend,
        port=one.port or other.port,
        proto=one.proto or other.proto,
    )
    if both.matches(connection):
        assert one.matches(connection)
