"""Which way to look at the running kernel: the highest rung of the ladder that it offers."""

import logging
import os
from collections.abc import Sequence

from tracer.errors import LoadError
from tracer.kernel import privileges
from tracer.kernel.conntrack import ConntrackSource
from tracer.kernel.netns import Netns
from tracer.kernel.probes import has_netfilter_links
from tracer.kernel.programs import Sizes
from tracer.kernel.source import KernelSource, Settings, clock_offset_ns
from tracer.model import Filter
from tracer.source import Source

_log = logging.getLogger(__name__)


def live(
    namespaces: Sequence[Netns],
    wanted: Filter,
    *,
    packets: int = 0,
    has_proxy_headers: bool = False,
) -> Source:
    """
    Open the best live source there is for some namespaces.

    Args:
        namespaces: Where to look.
        wanted: What to report.
        packets: Of how many packets of each direction to report the hops.
        has_proxy_headers: Whether to read what the first bytes of TCP connections declare.

    Raises:
        LoadError: If privileges are missing, the kernel refuses the programs, or it cannot do what
            is asked for.
        ConntrackError: If the kernel has not even conntrack netlink.
    """
    privileges.require_for_tracing()
    if has_netfilter_links():
        # Nobody counts here: the maps of paths need no room.
        settings = Settings(
            wanted=wanted,
            packets=packets,
            has_proxy_headers=has_proxy_headers,
            sizes=Sizes(paths=1, prefixes=1),
        )
        return KernelSource(namespaces, settings)
    if has_proxy_headers:
        raise LoadError(
            f"cannot read proxies' headers: kernel {os.uname().release} has no BPF netfilter links "
            "(Linux 6.4); trace without --read-proxy-headers"
        )
    source = ConntrackSource(namespaces, clock_offset_ns())
    _log.warning(
        "kernel %s has no BPF netfilter links: following conntrack's events instead, without %s",
        os.uname().release,
        "; ".join(source.NOT_SEEN),
    )
    return source
