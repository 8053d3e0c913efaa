"""The judge's results: verdicts on connections and drops, with their evidence."""

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

    ``policy`` is the traffic policy that applies: the external one for external traffic, the
    internal one for a ClusterIP.
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

    ``evidence`` holds the facts it rests on, ``advice`` what would keep the source and what that
    costs. ``rule`` is the rule that did it, if that is certain.
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
        """Whether the client gets no reply: nothing arrives, or nothing comes back."""
        return self.verdict is Verdict.DROPPED or self.cause is Cause.NO_LOCAL_ENDPOINT


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedConnection:
    """
    A connection and what became of its source on this node. ``time_ns`` is Unix time.

    ``word`` is what its first bytes declare about clients behind its peer, None if not read.
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
    A dropped packet.

    ``reason`` is the kernel's drop reason, ``place`` the function that dropped the packet, ``hook``
    the netfilter hook it was at; the latter two are None if not known.
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
    A watched packet at one hook of a node, at a Unix time.

    ``device`` is the interface's name and ``device_kind`` the kernel's name for its type, None if
    not known. ``pod`` is the pod at its other end.
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
    What a run saw, and what it could not see. ``notes`` holds anything else worth knowing.

    ``clock_offsets_ns`` is what was added to each node's times when recordings were joined.
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
