"""
The rung below BPF netfilter links: probes on functions of conntrack and NAT.

docs/decisions/0080-probes-in-conntrack.md explains the choice of functions.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tracer.errors import ConntrackError, LoadError
from tracer.kernel import conntrack, kprobe
from tracer.kernel.attach import Links
from tracer.kernel.kallsyms import Kallsyms
from tracer.kernel.netns import Netns
from tracer.kernel.programs import DROPS, PROBED_CONNECTIONS, Program

RUNG = "probes in conntrack"
NOT_SEEN = (
    "packets that conntrack was told not to track",
    "connections whose packet interrupted another probe on its CPU",
)
NO_REASONS = "drops other than netfilter's: this kernel reports no drop reasons (Linux 5.17)"
NO_HOPS = "hops: they need BPF netfilter links (Linux 6.4)"

_CONFIRM = "__nf_conntrack_confirm"
# Called once per connection and chain: by nftables, and by legacy iptables before 5.16.
_NAT_CHAINS = ("nft_nat_do_chain", "iptable_nat_do_chain", "ip6table_nat_do_chain")
# Since 5.16 legacy iptables has no NAT function of its own (netfilter: iptables: allow use of
# ipt_do_table as hookfn). Where it is in use, probe its caller, which runs for each packet.
_LEGACY_NAT = {
    "iptable_nat_table_init": "nf_nat_ipv4_out",
    "ip6table_nat_table_init": "nf_nat_ipv6_out",
}
_CONNTRACK = "nf_conntrack"
_NAT_MODULES = ("nft_chain_nat", "iptable_nat", "ip6table_nat")
_MODULES = Path("/sys/module")
_GIVES_UP = "nf_hook_slow"
_DELIVERY = ("ip_local_deliver", "ip6_input", "ip6_mc_input")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """
    Which functions of the running kernel to probe, and the programs as configured for it.

    ``drops`` recognizes a drop by its location where the kernel reports no reasons. ``modules``
    identifies the modules that matter, as loaded now.
    """

    connections: Program
    drops: Program
    nat: Sequence[str]
    modules: Mapping[str, int | None]

    def attach(self, links: Links, functions: Mapping[str, int]) -> None:
        """
        Attach machine-wide.

        Raises:
            LoadError: If the kernel refuses.
        """
        # The mark's probe first, so that no connection is seen whose mark was missed.
        for name in self.nat:
            links.attach_probe(name, functions["srcip_nat"])
        links.attach_probe(_CONFIRM, functions["srcip_confirm"])

    def unseen(self) -> str | None:
        """
        Return what is no longer seen because a module was loaded since; None if nothing.

        A probe goes away with its function's module.

        Raises:
            LoadError: If conntrack itself was unloaded, so that no connection is seen any more.
        """
        if _module(_CONNTRACK) != self.modules[_CONNTRACK]:
            raise LoadError(
                f"the module {_CONNTRACK} was unloaded, and the probes with it; restart srcip"
            )
        new = [name for name, was in self.modules.items() if _module(name) not in (None, was)]
        if not new:
            return None
        return (
            f"marks where {', '.join(new)} replaces sources: loaded after srcip, which must be"
            " restarted"
        )


def find(namespaces: Sequence[Netns]) -> Probes:
    """
    Look up which functions to probe. Makes the kernel load conntrack where it is a module.

    Raises:
        LoadError: If connections cannot be probed here; it says why.
        NetnsError: If a namespace is gone or cannot be entered.
    """
    kprobe.require()
    _load_conntrack(namespaces)
    symbols = Kallsyms()
    try:
        functions = symbols.addresses({_CONFIRM, *_NAT_CHAINS, *_LEGACY_NAT, *_DELIVERY})
        start, end = symbols.span(_GIVES_UP)
    finally:
        symbols.close()
    if _CONFIRM not in functions:
        raise LoadError(f"this kernel ({os.uname().release}) has no function {_CONFIRM}")
    if not any(functions.get(name) for name in _DELIVERY):
        raise LoadError("addresses of kernel functions are hidden (sysctl kernel.kptr_restrict)")
    delivery = {name: functions.get(name, 0) for name in _DELIVERY}
    return Probes(
        connections=_with_addresses(PROBED_CONNECTIONS, delivery),
        drops=_with_addresses(DROPS, {_GIVES_UP: start, f"{_GIVES_UP}_end": end}),
        nat=[*_nat_functions(functions)],
        modules={name: _module(name) for name in (_CONNTRACK, *_NAT_MODULES)},
    )


def _module(name: str) -> int | None:
    """Return an ID that changes when the module is loaded again; None if it is not loaded."""
    # A built-in module has a directory only if it has parameters; that one never changes.
    try:
        return (_MODULES / name).stat().st_ino
    except OSError:
        return None


def _with_addresses(program: Program, addresses: Mapping[str, int]) -> Program:
    macros = {f"SRCIP_{name.upper()}": address for name, address in addresses.items()}
    return replace(program, defines={**program.defines, **macros})


def _nat_functions(functions: Mapping[str, int]) -> Iterator[str]:
    yield from (name for name in _NAT_CHAINS if name in functions)
    if not {"iptable_nat_do_chain", "ip6table_nat_do_chain"} & functions.keys():
        yield from (called for table, called in _LEGACY_NAT.items() if table in functions)


def _load_conntrack(namespaces: Sequence[Netns]) -> None:
    """Request conntrack's table: the kernel loads the module before it answers."""
    for netns in namespaces:
        with suppress(ConntrackError):
            next(conntrack.dump(netns), None)
