"""What goes down to the kernel, checked by imitating the programs."""

import ctypes
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tests.unit import samples
from tracer.encode import encode_config, encode_prefix, encode_tuple, mapped
from tracer.filter import Filter
from tracer.wire import WireConfig, WirePrefix

ANY = Filter()
V4_ANY, V6_ANY = ip_network("0.0.0.0/0"), ip_network("::/0")


def config(**changes):
    values = {
        "wanted": ANY,
        "reasons": (),
        "wakeup_records": 1,
        "masquerade_mark": 0x4000,
        "is_streaming": True,
        "is_counting": False,
    }
    return WireConfig.from_buffer_copy(encode_config(**values | changes))


def is_in(address, prefix, mask):
    """Do what srcip_address_in() of kernel.h does."""
    return all(a & m == p for a, p, m in zip(mapped(address), prefix, mask, strict=True))


def networks(addresses, bits):
    return st.builds(
        lambda address, length: ip_network((address, length), strict=False),
        addresses,
        st.integers(0, bits),
    )


any_network = networks(samples.ipv4, 32) | networks(samples.ipv6, 128)
any_address = samples.ipv4 | samples.ipv6


@pytest.mark.parametrize(
    ("address", "octets"),
    [
        ("198.51.100.10", "00000000000000000000ffffc633640a"),
        ("127.0.0.1", "00000000000000000000ffff7f000001"),
        ("2001:db8::1", "20010db8000000000000000000000001"),
        ("::1", "00000000000000000000000000000001"),
    ],
)
def test_mapped(address, octets):
    """An address is 16 bytes in network order, IPv4 in its mapped form."""
    assert mapped(ip_address(address)).hex() == octets


@given(samples.ipv4)
def test_mapped_is_what_ipaddress_calls_mapped(address):
    """The mapped form is the one that the standard library knows."""
    assert ip_address(mapped(address)).ipv4_mapped == address


@pytest.mark.parametrize(
    ("network", "prefix", "mask"),
    [
        (
            "10.0.0.0/8",
            "00000000000000000000ffff0a000000",
            "ffffffffffffffffffffffffff000000",
        ),
        (
            "198.51.100.10/32",
            "00000000000000000000ffffc633640a",
            "ffffffffffffffffffffffffffffffff",
        ),
        (
            "0.0.0.0/0",
            "00000000000000000000ffff00000000",
            "ffffffffffffffffffffffff00000000",
        ),
        (
            "2001:db8::/33",
            "20010db8000000000000000000000000",
            "ffffffff800000000000000000000000",
        ),
        ("::/0", "00000000000000000000000000000000", "00000000000000000000000000000000"),
    ],
)
def test_filter_masks(network, prefix, mask):
    """A CIDR becomes prefix and mask of the mapped form, for the client and for the backend."""
    wanted = config(wanted=Filter(client=ip_network(network))).filter
    assert (bytes(wanted.client).hex(), bytes(wanted.client_mask).hex()) == (prefix, mask)
    assert bytes(wanted.backend_mask) == bytes(16)
    wanted = config(wanted=Filter(backend=ip_network(network))).filter
    assert (bytes(wanted.backend).hex(), bytes(wanted.backend_mask).hex()) == (prefix, mask)
    assert bytes(wanted.client_mask) == bytes(16)


def kernel_wants(wanted, connection):
    """Do what is_wanted() of connections.c does."""
    encoded = config(wanted=wanted).filter
    orig, reply = connection.orig, connection.reply
    return (
        encoded.proto in (0, orig.proto)
        and encoded.family in (0, samples.FAMILIES[orig.src.version])
        and encoded.port in (0, orig.dport, reply.sport)
        and is_in(orig.src, encoded.client, encoded.client_mask)
        and is_in(reply.src, encoded.backend, encoded.backend_mask)
    )


@given(any_network, samples.connections)
@example(V4_ANY, samples.connection())
@example(V4_ANY, samples.connection(*samples.REPLACED6))
@example(V6_ANY, samples.connection())
@example(V6_ANY, samples.connection(*samples.REPLACED6))
@example(ip_network("::/80"), samples.connection())
def test_kernel_filters_as_python_does(network, connection):
    """The kernel's compare of prefix and mask says what ipaddress says, and /0 is one family's."""
    for wanted in (Filter(client=network), Filter(backend=network)):
        assert kernel_wants(wanted, connection) == wanted.matches(connection)


@given(networks(samples.ipv4, 32), st.integers(0))
def test_kernel_finds_addresses_inside(network, number):
    """Any address of a network passes its mask: random ones above almost never lie inside."""
    address = network[number % network.num_addresses]
    wanted = config(wanted=Filter(backend=network)).filter
    assert is_in(address, wanted.backend, wanted.backend_mask)


@given(
    st.builds(
        Filter,
        client=st.none() | any_network,
        backend=st.none() | any_network,
        port=st.none() | st.integers(1, 65535),
        proto=st.none() | st.sampled_from([6, 17]),
    ),
    samples.connections,
)
def test_kernel_leaves_out_nothing_wanted(wanted, connection):
    """Whatever the filter of user space would show passes the kernel's."""
    if wanted.matches(connection):
        assert kernel_wants(wanted, connection)


def test_port_and_protocol():
    """Port and protocol are host order; zero stands for any."""
    wanted = config(wanted=Filter(port=30080, proto=17)).filter
    assert (wanted.port, wanted.proto) == (30080, 17)
    wanted = config().filter
    assert (wanted.port, wanted.proto) == (0, 0)


@pytest.mark.parametrize(
    ("wanted", "is_filtered"),
    [
        (ANY, 0),
        (Filter(client=V4_ANY), 1),
        (Filter(backend=V4_ANY), 1),
        (Filter(port=1), 1),
        (Filter(proto=6), 1),
    ],
)
def test_is_filtered(wanted, is_filtered):
    """The programs skip the compares only if there is nothing to compare."""
    assert config(wanted=wanted).is_filtered == is_filtered


@given(st.sets(st.integers(0, 255)))
def test_drop_reasons(reasons):
    """Exactly the bits of the wanted reasons are set, as drops.c looks them up."""
    words = config(reasons=reasons).reasons
    assert {n for n in range(256) if words[n >> 6] >> (n & 63) & 1} == reasons


@pytest.mark.parametrize("reason", [-1, 256, 0x10001, 2**32 - 1])
def test_drop_reasons_beyond_the_bits(reason):
    """Reasons of kernel subsystems, from 0x10000, have no bit and set none."""
    assert list(config(reasons=[reason]).reasons) == [0, 0, 0, 0]


@pytest.mark.parametrize("is_streaming", [True, False])
@pytest.mark.parametrize("is_counting", [True, False])
def test_settings(is_streaming, is_counting):
    """The other settings arrive as they were given."""
    encoded = config(
        is_streaming=is_streaming,
        is_counting=is_counting,
        wakeup_records=77,
        masquerade_mark=0x8000_0000,
    )
    assert (encoded.is_streaming, encoded.is_counting) == (is_streaming, is_counting)
    assert (encoded.wakeup_records, encoded.masquerade_mark) == (77, 0x8000_0000)


@pytest.mark.parametrize(
    ("network", "length", "octets"),
    [
        ("10.0.0.0/8", 104, "00000000000000000000ffff0a000000"),
        ("0.0.0.0/0", 96, "00000000000000000000ffff00000000"),
        ("192.0.2.1/32", 128, "00000000000000000000ffffc0000201"),
        ("fd00::/8", 8, "fd000000000000000000000000000000"),
        ("::/0", 0, "00000000000000000000000000000000"),
    ],
)
def test_prefix(network, length, octets):
    """A prefix of IPv4 is 96 bits longer, because it is one of the mapped form."""
    prefix = WirePrefix.from_buffer_copy(encode_prefix(7, ip_network(network)))
    assert (prefix.netns, prefix.length - 32) == (7, length)
    assert bytes(prefix.address).hex() == octets


@given(any_network, any_address)
def test_prefix_covers_as_ipaddress_says(network, address):
    """The longest-prefix map finds an address under a network if ipaddress does."""
    assume(network.version in (address.version, 4))
    prefix = WirePrefix.from_buffer_copy(encode_prefix(7, network))
    shift = 128 + 32 - prefix.length
    covered = int.from_bytes(prefix.address) >> shift == int.from_bytes(mapped(address)) >> shift
    assert covered == (address in network)


@given(samples.tuples)
def test_tuple(five_tuple):
    """A tuple is written as the kernel writes it."""
    assert bytes(encode_tuple(five_tuple)) == samples.tuple_bytes(five_tuple)


def test_config_size():
    """The value of the config map has the size that the programs were compiled with."""
    assert ctypes.sizeof(config()) == 128
