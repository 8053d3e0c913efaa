"""
The netfilter hook that a dropped packet was at.

The kernel's drop location often says only ``nf_hook_slow``, but a packet's route and interface
change from hook to hook.
"""

from tracer.model import Drop, Hook

_LOOPBACK_IFINDEX = 1  # include/net/net_namespace.h
_DELIVER = {"ip_local_deliver", "ip6_input"}
_FORWARD = {"ip_forward", "ip6_forward"}


def possible_hooks(drop: Drop, dst_input: str | None) -> tuple[Hook, ...]:
    """
    Return the hooks that a packet in this state can be at; none if that is not known.

    A packet gets a route after PRE_ROUTING (``ip_rcv_finish``). The route's input function is
    where it goes next. Its device turns from the incoming to the outgoing one before POST_ROUTING
    (``ip_output``), which is also where a packet made here gets a device at all.

    Args:
        drop: The packet.
        dst_input: The function that ``drop.dst_input`` points to.
    """
    if drop.iif == 0:
        return (Hook.NF_OUTPUT if drop.ifindex == 0 else Hook.NF_POSTROUTING,)
    if drop.iif == _LOOPBACK_IFINDEX:
        # It still has the route that it left with, so a route proves nothing.
        return (Hook.NF_PREROUTING, Hook.NF_INPUT)
    if drop.dst_input is None:
        return (Hook.NF_PREROUTING,)
    if dst_input in _DELIVER:
        return (Hook.NF_INPUT,)
    if dst_input not in _FORWARD:
        return ()
    if drop.iif == drop.dst_ifindex:
        return (Hook.NF_FORWARD, Hook.NF_POSTROUTING)
    return (Hook.NF_FORWARD if drop.ifindex == drop.iif else Hook.NF_POSTROUTING,)
