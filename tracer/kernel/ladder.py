"""The ladder of kernel mechanisms to trace with, from the one that shows the most."""

import os
from collections.abc import Sequence
from enum import StrEnum

from tracer.errors import LoadError
from tracer.kernel import kprobe, probing
from tracer.kernel.netns import Netns
from tracer.kernel.probes import has_netfilter_links
from tracer.kernel.source import KernelSource, Settings


class Rung(StrEnum):
    """A kernel mechanism, by its name on the command line."""

    LINKS = "links"
    PROBES = "probes"
    EVENTS = "events"


NO_LINKS = "no BPF netfilter links (Linux 6.4)"


def require_programs(asked: Rung | None) -> None:
    """
    Fail early if the kernel supports neither netfilter links nor probes.

    Raises:
        LoadError: If it supports neither, or not the one asked for.
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
    Trace by BPF programs: by netfilter links if the kernel has them, else by probes.

    Args:
        namespaces: What to trace.
        settings: What the programs are to do.
        asked: The only rung to use, if the user named one.

    Raises:
        LoadError: If the kernel supports neither, or rejects the programs.
        NetnsError: If a namespace cannot be entered.
    """
    require_programs(asked)
    if asked is not Rung.PROBES and has_netfilter_links():
        return KernelSource(namespaces, settings)
    return KernelSource(namespaces, settings, probing.find(namespaces))
