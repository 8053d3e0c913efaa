"""The hook at which netfilter dropped a packet, derived from the packet's state."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit import samples
from tracer.judge.place import possible_hooks
from tracer.model import Hook

LO, ETH0, ETH1 = 1, 2, 3
NETFILTER = {"prerouting", "input", "forward", "output", "postrouting"}
OUT, LOOPED = [Hook.NF_FORWARD, Hook.NF_POSTROUTING], [Hook.NF_PREROUTING, Hook.NF_INPUT]
ROUTED = 0xFFFF_FFFF_8200_0000


@pytest.mark.parametrize(
    ("iif", "ifindex", "dst_ifindex", "dst_input", "hooks"),
    [
        pytest.param(0, 0, ETH0, "dst_discard", [Hook.NF_OUTPUT], id="made-here"),
        pytest.param(0, ETH0, ETH0, "dst_discard", [Hook.NF_POSTROUTING], id="made-here-going-out"),
        pytest.param(ETH0, ETH0, 0, None, [Hook.NF_PREROUTING], id="not-routed"),
        pytest.param(ETH0, ETH0, LO, "ip_local_deliver", [Hook.NF_INPUT], id="for-us"),
        pytest.param(ETH0, ETH0, LO, "ip6_input", [Hook.NF_INPUT], id="for-us-6"),
        pytest.param(ETH0, ETH0, ETH1, "ip_forward", [Hook.NF_FORWARD], id="forwarded"),
        pytest.param(ETH0, ETH0, ETH1, "ip6_forward", [Hook.NF_FORWARD], id="forwarded-6"),
        pytest.param(ETH0, ETH1, ETH1, "ip_forward", [Hook.NF_POSTROUTING], id="forwarded-out"),
        # Out by the interface it came in by: the device does not tell FORWARD from POSTROUTING.
        pytest.param(ETH0, ETH0, ETH0, "ip_forward", OUT, id="hairpin"),
        # Looped packets keep the route they were sent with.
        pytest.param(LO, LO, LO, "ip_local_deliver", LOOPED, id="loopback"),
        pytest.param(LO, LO, 0, None, LOOPED, id="loopback-not-routed"),
        pytest.param(ETH0, ETH0, ETH1, "dst_discard", [], id="other-input"),
        pytest.param(ETH0, ETH0, ETH1, None, [], id="route-without-a-name"),
    ],
)
def test_hooks(iif, ifindex, dst_ifindex, dst_input, hooks):
    """Route and interface show the hook, or those that it can be, or nothing."""
    is_routed = dst_input is not None or dst_ifindex
    drop = samples.drop(
        iif=iif,
        ifindex=ifindex,
        dst_ifindex=dst_ifindex,
        dst_input=ROUTED if is_routed else None,
    )
    assert list(possible_hooks(drop, dst_input)) == hooks


@given(
    samples.drops,
    st.sampled_from([None, "ip_local_deliver", "ip6_input", "ip_forward", "ip6_forward", "x"]),
)
def test_never_conntrack(drop, dst_input):
    """The answer is of netfilter's five hooks."""
    assert {hook.label for hook in possible_hooks(drop, dst_input)} <= NETFILTER
