"""
Finds what the tracer said about a lab's connection, and compares it with what the backend saw.

It joins nodes without `tracer.judge.join`, because the demo must not check that code by itself.
Here one connection is looked up, whose client is known, on nodes that share a clock: it needs
neither windows nor bounds.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from lab.probe import Answer
from lab.scenarios import Case
from tracer.judge.cause import Cause
from tracer.judge.verdict import Judged, JudgedConnection, JudgedDrop, Opinion, Verdict
from tracer.model import PROTOCOLS, FiveTuple, IPAddress


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """
    What the tracer said about one connection, over all nodes of the lab.

    ``hops`` are its conntrack entries in the order of the path, one for each node that it crossed;
    ``drop`` is where it was dropped, if it did not arrive.
    """

    case: Case
    answer: Answer
    hops: tuple[JudgedConnection, ...]
    drop: JudgedDrop | None

    @property
    def seen_source(self) -> IPAddress | None:
        """The address that reaches the backend; None if nothing does, or nothing was traced."""
        if self.drop is not None or not self.hops:
            return None
        return self.hops[-1].seen_source

    @property
    def verdict(self) -> Verdict:
        """The verdict over the whole path: replaced if one node replaced the source."""
        if self.drop is not None:
            return Verdict.DROPPED
        if not self.hops:
            return Verdict.UNKNOWN
        return self._deciding.verdict

    @property
    def cause(self) -> Cause | None:
        """The cause, according to the node that replaced the source or dropped the packet."""
        if self.drop is not None:
            return self.drop.opinion.cause
        return self._deciding.opinion.cause if self.hops else None

    @property
    def opinion(self) -> Opinion | None:
        """The opinion of the deciding node; None if nothing was traced."""
        if self.drop is not None:
            return self.drop.opinion
        return self._deciding.opinion if self.hops else None

    @property
    def _deciding(self) -> JudgedConnection:
        """The hop that decides for the whole path: one that replaced the source, else the first."""
        for verdict in (Verdict.REPLACED, Verdict.PROXIED, Verdict.UNKNOWN):
            for hop in self.hops:
                if hop.verdict is verdict:
                    return hop
        # A node that saw only another node's address knows less than the node before it.
        return self.hops[0]

    @property
    def agrees(self) -> bool:
        """
        Whether the tracer reports what the backend saw, and why.

        That is the same address, or that nothing arrived, and the verdict and cause in the table
        of scenarios.
        """
        return self._is_address_right and (str(self.verdict), self.cause) == (
            self.case.verdict,
            self.case.cause,
        )

    @property
    def _is_address_right(self) -> bool:
        answer = self.answer
        if answer.client_address is not None:
            return self.seen_source == answer.client_address
        # The backend's answer did not arrive. If only the way back fails, it saw the client.
        is_stray = (self.verdict, self.cause) == (Verdict.PRESERVED, Cause.NO_LOCAL_ENDPOINT)
        return self.drop is not None or (is_stray and self.seen_source == answer.local[0])


class Traced:
    """What a tracer saw of one lab, looked up by connection."""

    def __init__(self) -> None:
        self._connections: dict[FiveTuple, list[JudgedConnection]] = {}
        self._drops: dict[FiveTuple, JudgedDrop] = {}
        # Connections that a proxy opened, by the client that it names.
        self._proxied: dict[tuple[IPAddress, int], FiveTuple] = {}

    def add(self, judged: Iterable[Judged]) -> None:
        """Add judged records."""
        for each in judged:
            if isinstance(each, JudgedConnection):
                self._connections.setdefault(each.connection.orig, []).append(each)
                client = each.word.client if each.word is not None else None
                if client is not None and client.address and client.port:
                    self._proxied.setdefault((client.address, client.port), each.connection.orig)
            elif isinstance(each, JudgedDrop) and each.flow and not each.drop.is_reply:
                self._drops.setdefault(each.flow, each)

    def find(self, case: Case, answer: Answer) -> Finding:
        """Follow one connection from its client to where it ends."""
        source, port = answer.local
        flow = FiveTuple(
            src=source,
            dst=case.destination,
            sport=port,
            dport=case.port,
            proto=PROTOCOLS[case.proto],
        )
        flow = self._proxied.get((source, port), flow)
        hops: list[JudgedConnection] = []
        drop = self._drops.get(flow)
        while drop is None and (hop := self._next(flow, hops)):
            hops.append(hop)
            flow = hop.connection.reply.inverted
            drop = self._drops.get(flow)
        return Finding(case=case, answer=answer, hops=tuple(hops), drop=drop)

    def _next(self, flow: FiveTuple, hops: list[JudgedConnection]) -> JudgedConnection | None:
        """Return the entry for a flow on a node that it has not crossed yet."""
        crossed = {hop.node for hop in hops}
        for candidate in self._connections.get(flow, ()):
            if candidate.node not in crossed:
                return candidate
        return None
