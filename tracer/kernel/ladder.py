"""The ladder: ways of looking at the kernel, from the one that shows the most."""

import os
from collections.abc import Sequence
from enum import StrEnum

from tracer.errors import LoadError
from tracer.kernel import kprobe, probing
from tracer.kernel.netns import Netns
from tracer.kernel.probes import has_netfilter_links
from tracer.kernel.source import KernelSource, Settings


class Rung(StrEnum):
    """A way of looking, by its name on the command line."""

    LINKS = "links"
    PROBES = "probes"
    EVENTS = "events"


NO_LINKS = "no BPF netfilter links (Linux 6.4)"


def require_programs(asked: Rung | None) -> None:
    """
    Refuse early where the kernel runs no programs for connections.

    Raises:
        LoadError: If it does not, or not as asked for.
    """
    if asked is not Rung.PROBES and has_netfilter_links():
        return
    if asked is Rung.LINKS:
        raise LoadError(f"kernel {os.uname().release} has {NO_LINKS}")
    try:
        kprobe.require()
    except LoadError as error:
        if asked is Rung.PROBES:
            raise
        raise LoadError(f"kernel {os.uname().release} has {NO_LINKS}, and {error}") from error


def open_programs(
    namespaces: Sequence[Netns], settings: Settings, asked: Rung | None = None
) -> KernelSource:
    """
    Look by programs in the kernel: netfilter links where there are some, else probes.

    Args:
        namespaces: Where to look.
        settings: What the programs shall do.
        asked: The one way to take, if the user named one.

    Raises:
        LoadError: If the kernel offers neither, or refuses the programs.
        NetnsError: If a namespace cannot be entered.
    """
    require_programs(asked)
    if asked is not Rung.PROBES and has_netfilter_links():
        return KernelSource(namespaces, settings)
    return KernelSource(namespaces, settings, probing.find(namespaces))
