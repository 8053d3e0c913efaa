"""The source for live tracing: the highest rung of the ladder that the kernel supports."""

import logging
import os
from collections.abc import Sequence

from tracer.errors import LoadError
from tracer.filter import Filter
from tracer.kernel import ladder, privileges
from tracer.kernel.attachment import NO_TCX
from tracer.kernel.conntrack import ConntrackSource
from tracer.kernel.ladder import NO_LINKS, Rung
from tracer.kernel.netns import Netns
from tracer.kernel.probes import has_netfilter_links, has_tcx_links
from tracer.kernel.probing import NO_HOPS
from tracer.kernel.programs import Sizes
from tracer.kernel.source import Settings, clock_offset_ns
from tracer.source import Source

_log = logging.getLogger(__name__)


def live(
    namespaces: Sequence[Netns],
    wanted: Filter,
    *,
    packets: int = 0,
    has_proxy_headers: bool = False,
    asked: Rung | None = None,
) -> Source:
    """
    Open the best live source that the kernel supports.

    Args:
        namespaces: What to trace.
        wanted: What to report.
        packets: Number of packets of each direction whose hops to report.
        has_proxy_headers: Whether to read what the first bytes of TCP connections declare.
        asked: The only rung to use, if the user named one.

    Raises:
        LoadError: If privileges are missing, the kernel rejects the programs, or it does not
            support what is asked for.
        ConntrackError: If the kernel does not even have conntrack netlink.
    """
    privileges.require_for_tracing()
    if has_proxy_headers and (asked is Rung.EVENTS or not has_tcx_links()):
        where = "from conntrack's events" if asked is Rung.EVENTS else f"at {NO_TCX}"
        raise LoadError(f"cannot read proxies' headers {where}; trace without --read-proxy-headers")
    # Counting is off: make its maps as small as possible.
    settings = Settings(
        wanted=wanted,
        packets=packets,
        has_proxy_headers=has_proxy_headers,
        sizes=Sizes(paths=1, prefixes=1),
    )
    source = None if asked is Rung.EVENTS else _by_programs(namespaces, settings, asked)
    if source is None:
        source = ConntrackSource(namespaces, clock_offset_ns())
        if asked is None:
            _log.warning("following conntrack's events instead, without %s", _missing(source))
        if packets:
            _log.warning("without %s", NO_HOPS)
    return source


def _by_programs(
    namespaces: Sequence[Netns], settings: Settings, asked: Rung | None
) -> Source | None:
    """Load programs; return None, with a warning, if the kernel has neither links nor probes."""
    try:
        source = ladder.open_programs(namespaces, settings, asked)
    except LoadError as error:
        if asked is not None or has_netfilter_links():
            raise
        _log.warning("%s", error)
        return None
    if asked is None and not has_netfilter_links():
        _log.warning(
            "kernel %s has %s: probing conntrack's functions instead, without %s",
            os.uname().release,
            NO_LINKS,
            _missing(source),
        )
    return source


def _missing(source: Source) -> str:
    return "; ".join(source.info.not_seen)
