"""
The rung below BPF netfilter links: probes on the functions of conntrack and NAT.

Where they are, and why: docs/decisions/0080-probes-in-conntrack.md.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from tracer.errors import ConntrackError, LoadError
from tracer.kernel import conntrack, kprobe
from tracer.kernel.attach import Links
from tracer.kernel.kallsyms import Kallsyms
from tracer.kernel.netns import Netns
from tracer.kernel.programs import PROBED_CONNECTIONS, Program

RUNG = "probes in conntrack"
NOT_SEEN = (
    "packets that conntrack was told not to track",
    "how many connections a probe missed while another one ran on its CPU",
)
NO_HOPS = "hops: they take BPF netfilter links (Linux 6.4)"

_CONFIRM = "__nf_conntrack_confirm"
# Asked once per connection and chain: of nftables, and of legacy iptables before 5.16.
_NAT_CHAINS = ("nft_nat_do_chain", "iptable_nat_do_chain", "ip6table_nat_do_chain")
# Legacy iptables has no function of its own for NAT since 5.16 (netfilter: iptables: allow use of
# ipt_do_table as hookfn). Where it is in use, what calls it is asked, for each packet.
_LEGACY_NAT = {
    "iptable_nat_table_init": "nf_nat_ipv4_out",
    "ip6table_nat_table_init": "nf_nat_ipv6_out",
}
_DELIVERY = ("ip_local_deliver", "ip6_input", "ip6_mc_input")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """Which functions of the running kernel to probe, and the program for it."""

    program: Program
    nat: Sequence[str]

    def attach(self, links: Links, functions: Mapping[str, int]) -> None:
        """
        Attach for the whole machine.

        Raises:
            LoadError: If the kernel refuses.
        """
        # The mark comes before the connection: no connection is seen whose mark was not.
        for name in self.nat:
            links.attach_probe(name, functions["srcip_nat"])
        links.attach_probe(_CONFIRM, functions["srcip_confirm"])


def find(namespaces: Sequence[Netns]) -> Probes:
    """
    Look up what there is to probe. Has conntrack loaded where it is a module.

    Raises:
        LoadError: If connections cannot be probed here, and why.
        NetnsError: If a namespace is gone or may not be entered.
    """
    kprobe.require()
    _load_conntrack(namespaces)
    symbols = _addresses()
    if _CONFIRM not in symbols:
        raise LoadError(f"this kernel ({os.uname().release}) has no function {_CONFIRM}")
    deliveries = {name: symbols.get(name, 0) for name in _DELIVERY}
    if not any(deliveries.values()):
        raise LoadError("addresses of kernel functions are hidden (sysctl kernel.kptr_restrict)")
    defines = {f"SRCIP_{name.upper()}": address for name, address in deliveries.items()}
    program = replace(PROBED_CONNECTIONS, defines={**PROBED_CONNECTIONS.defines, **defines})
    legacy = [
        called
        for table, called in _LEGACY_NAT.items()
        if table in symbols and "iptable_nat_do_chain" not in symbols
    ]
    return Probes(
        program=program, nat=(*(name for name in _NAT_CHAINS if name in symbols), *legacy)
    )


def _load_conntrack(namespaces: Sequence[Netns]) -> None:
    """Ask conntrack for its table: the kernel loads the module before it answers."""
    for netns in namespaces:
        with suppress(ConntrackError):
            next(conntrack.dump(netns), None)


def _addresses() -> Mapping[str, int]:
    symbols = Kallsyms()
    try:
        return symbols.addresses({_CONFIRM, *_NAT_CHAINS, *_LEGACY_NAT, *_DELIVERY})
    finally:
        symbols.close()
