"""What the judge says: verdicts on connections and drops, with what they rest on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from tracer.cluster.match import PodRef, Via
from tracer.cluster.objects import Policy
from tracer.judge.cause import Cause
from tracer.judge.proxy_word import ProxyWord
from tracer.model import Accept, ClientClass, Connection, Drop, FiveTuple, Hook, Hop, IPAddress
from tracer.ruleset.rule import Rule


class Verdict(StrEnum):
    """What became of the client's address, as the backend sees it."""

    PRESERVED = "preserved"
    REPLACED = "replaced"
    REPLACED_UPSTREAM = "replaced-upstream"
    PROXIED = "proxied"
    DROPPED = "dropped"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceRef:
    """
    The Service that a connection belongs to.

    ``policy`` is the traffic policy that holds for this way in: the external one for what comes
    from outside, the internal one for a ClusterIP.
    """

    namespace: str
    name: str
    port: str | None
    via: Via
    policy: Policy | None

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" + (f":{self.port}" if self.port else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Opinion:
    """
    The judge's answer.

    ``evidence`` are the facts it rests on, ``advice`` what would keep the source, with its price.
    ``rule`` is the rule that did it, where that is certain.
    """

    verdict: Verdict
    cause: Cause | None = None
    service: ServiceRef | None = None
    client_class: ClientClass | None = None
    rule: Rule | None = None
    evidence: Sequence[str] = ()
    advice: Sequence[str] = ()

    @property
    def is_unanswered(self) -> bool:
        """Whether the client gets no answer: nothing arrives, or nothing comes back."""
        return self.verdict is Verdict.DROPPED or self.cause is Cause.NO_LOCAL_ENDPOINT


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedConnection:
    """
    A connection and what became of its source on this node. ``time_ns`` is Unix time.

    ``word`` is what its first bytes say of clients behind its peer, None where nobody reads them.
    """

    connection: Connection
    time_ns: int
    node: str
    opinion: Opinion
    backend_pod: PodRef | None = None
    word: ProxyWord | None = None

    @property
    def verdict(self) -> Verdict:
        """The verdict on the source."""
        return self.opinion.verdict

    @property
    def seen_source(self) -> IPAddress:
        """The source address that the next host sees."""
        return self.connection.seen_source


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedDrop:
    """
    A discarded packet.

    ``reason`` is the kernel's name for why, ``place`` the function that gave the packet up,
    ``hook`` the netfilter hook it was at; the latter are None where they cannot be told.
    """

    drop: Drop
    time_ns: int
    node: str
    reason: str
    place: str | None
    hook: Hook | None
    opinion: Opinion

    @property
    def verdict(self) -> Verdict:
        """The verdict on the source: nothing arrives."""
        return self.opinion.verdict

    @property
    def flow(self) -> FiveTuple | None:
        """What the client sent: the conntrack entry's original tuple, else the packet's own."""
        return self.drop.flow


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenAccept:
    """A connection that a listening socket accepted, at a Unix time."""

    accept: Accept
    time_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenHop:
    """
    A watched packet at one place of a node, at a Unix time.

    ``device`` is the interface's name and ``device_kind`` what the kernel says it is; None where
    they are not known. ``pod`` is the one at the other end of it.
    """

    hop: Hop
    time_ns: int
    node: str
    device: str | None = None
    device_kind: str | None = None
    pod: PodRef | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """
    What a run saw, and what it could not. ``notes`` are what else there is to know of it.

    ``clock_offsets_ns`` are what was added to nodes' times, where recordings were put together.
    """

    connections: int
    drops: int
    lost: Mapping[str, int] = field(default_factory=dict)
    not_seen: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    clock_offsets_ns: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether nothing was lost on the way."""
        return not any(self.lost.values())


Judged = JudgedConnection | JudgedDrop | SeenAccept | SeenHop
