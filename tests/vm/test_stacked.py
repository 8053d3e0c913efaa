"""
Interfaces that lie on each other, for kernels that have them: a bond, VLANs in a VLAN, a bridge.

'tests/vm/test_kernels.py' runs it in a virtual machine.
"""

import socket
import subprocess

import pytest

from tests.kernel.box import CLIENT, NODE, SERVER, wait_until
from tests.kernel.conftest import box, trace  # noqa: F401 - fixtures
from tests.kernel.test_connections import load_nat
from tests.kernel.test_hops import FORWARDED, exchange, names_of, packets_of, places
from tracer.filter import Filter
from tracer.kernel.netns import inside
from tracer.model import UDP, Hook

pytestmark = pytest.mark.usefixtures("kernel")

_CLIENT = f"""\
addr flush dev c0
link add link c0 name c200 type vlan id 200
link add link c200 name c100 type vlan id 100
addr add {CLIENT[4]}/24 dev c100
link set c0 up
link set c200 up
link set c100 up
route add default via {NODE[4]}
"""
_NODE = f"""\
addr flush dev n0
link set n0 down
link add bond0 type bond mode active-backup
link set n0 master bond0
link add link bond0 name v200 type vlan id 200
link add link v200 name v100 type vlan id 100
link add br0 type bridge stp_state 0 forward_delay 0
link set v100 master br0
addr add {NODE[4]}/24 dev br0
link set bond0 up
link set v200 up
link set v100 up
link set br0 up
"""
STACK = ["n0", "bond0", "v200", "v100", "br0"]


def has_kinds(box):  # noqa: F811 - the fixture
    """Whether the kernel makes what the stack is of."""
    with inside(box.path("server")):
        made = [
            subprocess.run(["ip", "link", "add", *words], capture_output=True, check=False)
            for words in (
                ["bond9", "type", "bond"],
                ["link", "s0", "name", "v9", "type", "vlan", "id", "9"],
            )
        ]
    return not any(each.returncode for each in made)


@pytest.mark.parametrize("nat", ["neither", "both"])
def test_a_bridge_on_a_vlan_on_a_bond(box, trace, nat):  # noqa: F811 - the fixtures
    """
    A packet is seen at each interface of a stack as it comes in, and as it leaves, with the tags
    that it has there, before anybody knows whether it is watched.
    """
    if not has_kinds(box):
        pytest.skip("this kernel has no bonds or VLANs")
    for host, lines in (("client", _CLIENT), ("node", _NODE)):
        box.run(host, "ip", "-batch", "-", stdin=lines)
    address = load_nat(box, nat)[4]
    wait_until(lambda: "state UP" in box.run("node", "ip", "link", "show", "br0"))
    # A packet that waits for a neighbour goes on without its slot.
    exchange(box, 4, socket.SOCK_DGRAM, SERVER[4])
    tracer = trace(packets=1, wanted=Filter(proto=UDP))
    exchange(box, 4, socket.SOCK_DGRAM, address)
    tracer.flush()
    names = names_of(box)
    first, answer = packets_of(tracer.hops)
    came = [names[hop.ifindex] for hop in first if hop.hook is Hook.TC_INGRESS]
    went = [names[hop.ifindex] for hop in answer if hop.hook is Hook.TC_EGRESS]
    assert (came, went) == (STACK, STACK[::-1])
    # Where br_netfilter is on, the bridge calls PRE_ROUTING before the packet is its own.
    assert sorted(places(first), key=str) == sorted([FORWARDED[0]] * 4 + FORWARDED, key=str)
    assert {(hop.packet.src, hop.packet.sport) for hop in first[:5]} == {
        (first[0].packet.src, first[0].packet.sport)
    }
    assert str(first[-1].packet.dst) == SERVER[4]
    assert not tracer.lost()["hop_overtaken"]


@pytest.mark.parametrize("nat", ["neither", "both"])
def test_ports_of_a_vrf(box, trace, nat):  # noqa: F811 - the fixtures
    """A packet that passes PRE_ROUTING for its port and again for the VRF is one packet."""
    for words in ("add red type vrf table 10", "set red up", "set n0 vrf red", "set n1 vrf red"):
        done = subprocess.run(
            ["ip", "-n", box.names["node"], "link", *words.split()],
            capture_output=True,
            check=False,
        )
        if done.returncode:
            pytest.skip("this kernel has no VRFs")
    address = load_nat(box, nat)[4]
    exchange(box, 4, socket.SOCK_DGRAM, SERVER[4])
    tracer = trace(packets=1, wanted=Filter(proto=UDP))
    exchange(box, 4, socket.SOCK_DGRAM, address)
    tracer.flush()
    for packet in packets_of(tracer.hops):
        assert places(packet) == [*FORWARDED[:3], *FORWARDED[1:]]
        assert {hop.number for hop in packet} == {1}
        assert len({hop.packet_id for hop in packet}) == 1
