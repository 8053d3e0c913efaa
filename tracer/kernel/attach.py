"""Attaching: netfilter links per traced namespace; raw tracepoints and probes machine-wide."""

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from tracer.errors import LoadError
from tracer.kernel import bpf_syscall, kprobe
from tracer.kernel.netns import Netns, inside

# NFPROTO_IPV4, NFPROTO_IPV6: include/uapi/linux/netfilter.h
FAMILIES = (2, 10)
# enum nf_inet_hooks
_PRE_ROUTING, _LOCAL_IN, _FORWARD, _LOCAL_OUT, _POST_ROUTING = range(5)
# Conntrack confirms at INT_MAX; DNAT happens at NF_IP_PRI_NAT_DST, -100, and SNAT at
# NF_IP_PRI_NAT_SRC, 100.
_LAST = 2**31 - 2
_BEFORE_DNAT = -101
_BEFORE_SNAT = 99
# IPVS translates earlier at LOCAL_IN, at 98 and 99 (ip_vs_ops4 in ip_vs_core.c).
_BEFORE_IPVS = 97
# How many priorities to try, since another tracer may hold one: so many tracers can coexist.
_PLACES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class NetfilterPlace:
    """Where to attach a netfilter function: the hook, and the highest priority number to try."""

    function: str
    hook: int
    priority: int


CONNECTION_PLACES = (
    NetfilterPlace(function="srcip_mark", hook=_POST_ROUTING, priority=_BEFORE_SNAT),
    NetfilterPlace(function="srcip_postrouting", hook=_POST_ROUTING, priority=_LAST),
    NetfilterPlace(function="srcip_input", hook=_LOCAL_IN, priority=_LAST),
)

HOP_PLACES = (
    NetfilterPlace(function="srcip_before_nat", hook=_PRE_ROUTING, priority=_BEFORE_DNAT),
    NetfilterPlace(function="srcip_after_nat", hook=_PRE_ROUTING, priority=_LAST),
    NetfilterPlace(function="srcip_before_nat", hook=_LOCAL_IN, priority=_BEFORE_IPVS),
    NetfilterPlace(function="srcip_after_nat", hook=_LOCAL_IN, priority=_LAST),
    # No NAT happens at FORWARD.
    NetfilterPlace(function="srcip_after_nat", hook=_FORWARD, priority=_LAST),
    NetfilterPlace(function="srcip_before_nat", hook=_LOCAL_OUT, priority=_BEFORE_DNAT),
    NetfilterPlace(function="srcip_after_nat", hook=_LOCAL_OUT, priority=_LAST),
    NetfilterPlace(function="srcip_before_nat", hook=_POST_ROUTING, priority=_BEFORE_SNAT),
    NetfilterPlace(function="srcip_after_nat", hook=_POST_ROUTING, priority=_LAST),
)


@dataclass(slots=True, kw_only=True)
class Links:
    """
    Descriptors that keep programs attached. Closing them detaches.

    They also detach when the process ends, however it ends. A netfilter link keeps its namespace
    alive, so close those of a namespace that was removed.
    """

    by_namespace: dict[int, list[int]] = field(default_factory=dict)
    tracepoints: list[int] = field(default_factory=list)

    def attach_netfilter(
        self, netns: Netns, functions: Mapping[str, int], places: Iterable[NetfilterPlace]
    ) -> None:
        """
        Attach programs in one namespace, for IPv4 and IPv6.

        Args:
            netns: The namespace.
            functions: Program descriptors by function name.
            places: Where to attach.

        Raises:
            LoadError: If the kernel has no netfilter links, or every priority is taken.
            NetnsError: If the namespace is gone or cannot be entered.
        """
        fds = self.by_namespace.setdefault(netns.inode, [])
        with inside(netns.path):
            for place in places:
                for family in FAMILIES:
                    fds.append(_attach(functions[place.function], family, place, netns))

    def attach_tracepoint(self, name: str, program: int) -> None:
        """
        Attach a raw tracepoint program.

        Raises:
            LoadError: If the kernel has no such tracepoint.
        """
        try:
            self.tracepoints.append(bpf_syscall.open_raw_tracepoint(name, program))
        except OSError as error:
            raise LoadError(str(error.strerror)) from error

    def attach_probe(self, function: str, program: int) -> None:
        """
        Attach a program to a kernel function, machine-wide.

        Raises:
            LoadError: If there is no such function, or it cannot be probed.
        """
        try:
            self.tracepoints.append(kprobe.attach(function, program))
        except OSError as error:
            raise LoadError(str(error.strerror)) from error

    def detach_namespace(self, inode: int) -> None:
        """Detach from one namespace."""
        for fd in self.by_namespace.pop(inode, ()):
            os.close(fd)

    def close(self) -> None:
        """Detach everything."""
        for inode in list(self.by_namespace):
            self.detach_namespace(inode)
        while self.tracepoints:
            os.close(self.tracepoints.pop())


def _attach(program: int, family: int, place: NetfilterPlace, netns: Netns) -> int:
    """Attach at the wanted priority, or at the nearest free one below it, which runs earlier."""
    for priority in _priorities(place.priority):
        try:
            return bpf_syscall.create_netfilter_link(program, family, place.hook, priority)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise LoadError(
                    f"cannot attach {place.function} in the namespace of {netns.node}: "
                    f"{os.strerror(error.errno or 0)}"
                ) from error
    raise LoadError(
        f"cannot attach {place.function} in the namespace of {netns.node}: other programs hold all "
        f"{_PLACES} priorities that it may use; stop other tracers (see 'bpftool link')"
    )


def _priorities(highest: int) -> Iterator[int]:
    return iter(range(highest, highest - _PLACES, -1))
