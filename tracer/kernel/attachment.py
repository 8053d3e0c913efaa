"""Where the loaded programs are attached: the whole machine, and the traced namespaces."""

import logging
from collections.abc import Mapping, Sequence

from tracer.errors import LoadError
from tracer.kernel.attach import CONNECTION_PLACES, HOP_PLACES, Links
from tracer.kernel.bpf_syscall import TCX_EGRESS, TCX_INGRESS, Map
from tracer.kernel.netns import Netns
from tracer.kernel.probes import has_tcx_links
from tracer.kernel.probing import Probes
from tracer.kernel.programs import ACCEPTS, CONNECTIONS, DROPS, HOPS, SEGMENTS, Loaded, Program
from tracer.kernel.tc import TcLinks

_log = logging.getLogger(__name__)

NO_TCX = "tc ingress and egress: this kernel has no TCX links (Linux 6.6)"
NO_ACCEPTS = "what backends' sockets accepted"
_NO_HEADERS = "proxies' headers in TLS and HTTP/2, and in later requests of a connection"


class Attachment:
    """
    Attaches programs, and detaches them from namespaces that are removed.

    ``by_namespace`` has the netfilter links of each traced namespace.
    """

    def __init__(
        self, namespaces: Mapping[int, Netns], programs: Sequence[Program], probes: Probes | None
    ) -> None:
        """
        Args:
            namespaces: What to trace, by inode.
            programs: What is loaded.
            probes: Which kernel functions to probe, instead of using netfilter links.
        """
        self._namespaces = namespaces
        self._programs = programs
        self._probes = probes
        self._loaded = Loaded()
        self._links = Links()
        self._accept_links = Links()
        self._is_refused_accepts = False
        self._tc_links: dict[int, list[TcLinks]] = {inode: [] for inode in namespaces}
        self._not_seen: list[str] = []

    @property
    def by_namespace(self) -> Mapping[int, Sequence[int]]:
        """Descriptors of netfilter links, by the inode of a namespace that is still there."""
        return self._links.by_namespace

    @property
    def devices(self) -> int:
        """How many interfaces have tc programs attached."""
        return sum(links.devices for each in self._tc_links.values() for links in each)

    @property
    def not_seen(self) -> list[str]:
        """What is not seen, a line each: it grows with interfaces that refuse the programs."""
        links = (links for each in self._tc_links.values() for links in each)
        accepts = (NO_ACCEPTS,) if self._is_refused_accepts else ()
        return [*self._not_seen, *accepts, *(line for tc in links for line in tc.refused)]

    def attach(self, loaded: Loaded, *, has_accepts: bool) -> None:
        """
        Attach what was loaded; the program for accepts only if wanted.

        Raises:
            LoadError: If the kernel refuses a program.
            NetnsError: If a namespace cannot be entered.
        """
        self._loaded = loaded
        # Drops and accepts first, so that none is missed of a connection that is seen.
        self._links.attach_tracepoint("kfree_skb", loaded.function(DROPS, "srcip_drop"))
        if has_accepts:
            self._attach_accepts()
        functions = self._functions(
            CONNECTIONS if self._probes is None else self._probes.connections
        )
        for netns in self._namespaces.values():
            if self._probes is None and HOPS not in self._programs:
                self._links.attach_netfilter(netns, functions, CONNECTION_PLACES)
            self._links.by_namespace.setdefault(netns.inode, [])
            for traced in self._traced():
                traced.update(netns.inode.to_bytes(4, "little"), b"\1")
        if self._probes is not None:
            self._probes.attach(self._links, functions)
        if HOPS in self._programs:
            self._attach_hops()
        if SEGMENTS in self._programs:
            self._attach_segments()

    def report_accepts(self, are_wanted: bool) -> None:
        """
        Attach or detach the program for accepts, which runs whenever a TCP socket of the machine
        changes its state. This takes no privilege: the program is loaded.

        If the kernel refuses, `not_seen` says so until it no longer does.
        """
        if not are_wanted:
            self._accept_links.close()
        elif not self._accept_links.tracepoints:
            try:
                self._attach_accepts()
            except LoadError as error:
                _log.warning("%s", error)
                self._is_refused_accepts = True
            else:
                self._is_refused_accepts = False

    def release_gone_namespaces(self) -> None:
        """Detach from namespaces that were removed: our links would keep them alive."""
        for inode in list(self._links.by_namespace):
            netns = self._namespaces[inode]
            if not netns.is_present():
                self._links.detach_namespace(inode)
                self._detach_tc(inode)
                # The kernel may reuse the inode number.
                for traced in self._traced():
                    traced.delete(inode.to_bytes(4, "little"))
                _log.warning("the namespace of %s is gone (%s)", netns.node, netns.path)

    def close(self) -> None:
        """Detach everything. May be called twice."""
        for inode in self._tc_links:
            self._detach_tc(inode)
        self._accept_links.close()
        self._links.close()

    def _attach_accepts(self) -> None:
        self._accept_links.attach_tracepoint(
            "inet_sock_set_state", self._loaded.function(ACCEPTS, "srcip_accept")
        )

    def _attach_hops(self) -> None:
        functions = self._functions(HOPS)
        # They take the places of the programs for connections, and call them.
        called = Map(self._loaded.map(HOPS, "connections"), 4, 4)
        for place, program in enumerate(self._functions(CONNECTIONS).values()):
            called.update(place.to_bytes(4, "little"), program.to_bytes(4, "little"))
        self._links.attach_tracepoint("kfree_skb", functions["srcip_hop_end"])
        for netns in self._namespaces.values():
            self._links.attach_netfilter(netns, functions, HOP_PLACES)
        if not has_tcx_links():
            self._not_seen.append(NO_TCX)
            return
        self._attach_tc(functions["srcip_tc_ingress"], functions["srcip_tc_egress"])

    def _attach_segments(self) -> None:
        if not has_tcx_links():
            raise LoadError(f"cannot read proxies' headers at {NO_TCX}")
        self._not_seen.append(_NO_HEADERS)
        functions = self._functions(SEGMENTS)
        self._attach_tc(functions["srcip_segment_ingress"], functions["srcip_segment_egress"])

    def _attach_tc(self, ingress: int, egress: int) -> None:
        for netns in self._namespaces.values():
            links = TcLinks(netns, {TCX_INGRESS: ingress, TCX_EGRESS: egress})
            self._tc_links[netns.inode].append(links)

    def _detach_tc(self, inode: int) -> None:
        while self._tc_links[inode]:
            links = self._tc_links[inode].pop()
            self._not_seen += links.refused
            links.close()

    def _traced(self) -> list[Map]:
        """Return the maps of traced namespaces, of those programs that run in every namespace."""
        programs = (program for program in self._programs if "traced" in program.maps)
        return [Map(self._loaded.map(program, "traced"), 4, 1) for program in programs]

    def _functions(self, program: Program) -> dict[str, int]:
        return {name: self._loaded.function(program, name) for name, _, _ in program.functions}
