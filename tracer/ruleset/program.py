"""Rules as programs: chains of steps, each a list of operations, as netfilter runs them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from tracer.ruleset.matches import Match, Within
from tracer.ruleset.rule import HookName, Owner, Rule, RuleFamily, Tool
from tracer.ruleset.truth import ALL_BITS
from tracer.ruleset.view import Elements, Field, Key

_SOURCE_PORTS = (Field.SPORT, Field.ORIG_SPORT)

# Priorities of netfilter_ipv4.h, the same in netfilter_ipv6.h.
RAW, MANGLE, DSTNAT, FILTER, SECURITY, SRCNAT = -300, -150, -100, 0, 50, 100


class Verdict(Enum):
    """How a packet continues, if not in another chain."""

    CONTINUE = auto()
    RETURN = auto()
    ACCEPT = auto()


@dataclass(frozen=True, slots=True)
class Jump:
    """Continue in a chain, then return here, or with goto to this chain's caller."""

    chain: str
    is_goto: bool = False


@dataclass(frozen=True, slots=True)
class SetMark:
    """``mark = (mark & keep) ^ flip``, after which the bits in ``unknown`` are not known."""

    keep: int
    flip: int
    unknown: int = 0

    @property
    def touched(self) -> int:
        """The bits that may change."""
        return (~self.keep | self.flip | self.unknown) & ALL_BITS


@dataclass(frozen=True, slots=True)
class SetConnectionMark:
    """Change the conntrack entry's mark to an unknown value."""


@dataclass(frozen=True, slots=True)
class Finish:
    """Translate or drop: the packet meets no further rule of this kind."""

    rule: Rule


@dataclass(frozen=True, slots=True)
class Perhaps:
    """A statement that is not understood: it may end the walk, accept, or do nothing."""

    rule: Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An element of a verdict map."""

    op: "Jump | Verdict | Finish | Perhaps"
    comment: str | None = None
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """A verdict by a map. ``is_sure`` is whether the map's elements are all known."""

    keys: tuple[Key, ...]
    entries: Elements[Entry] = field(compare=False)
    is_sure: bool = True


Op = Match | Jump | SetMark | SetConnectionMark | Finish | Perhaps | Lookup | Verdict
Step = tuple[Op, ...]
Chains = Mapping[str, tuple[Step, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effects:
    """
    What chains may change on a packet: bits of its mark, and the mark of its conntrack entry.

    ``asks_source_port`` is whether they look at the source port, which differs between the
    connections of a client.
    """

    mark_bits: int = 0
    has_connection_mark: bool = False
    asks_source_port: bool = False

    @classmethod
    def of(cls, chains: Chains) -> "Effects":
        """Return what these chains may change."""
        bits, has_connection_mark, asks_source_port = 0, False, False
        for op in (op for steps in chains.values() for step in steps for op in step):
            if isinstance(op, SetMark):
                bits |= op.touched
            elif isinstance(op, Perhaps):
                bits, has_connection_mark = ALL_BITS, True
            elif isinstance(op, SetConnectionMark):
                has_connection_mark = True
            elif isinstance(op, Within | Lookup):
                asks_source_port |= any(key.field in _SOURCE_PORTS for key in op.keys)
        return cls(
            mark_bits=bits,
            has_connection_mark=has_connection_mark,
            asks_source_port=asks_source_port,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseChain:
    """
    A base chain, which is attached to a hook, with the chains that it leads to.

    Args:
        family: The family of the packets that it sees.
        table: Its table.
        name: Its name.
        kind: ``nat`` (only for the first packet of a connection), ``filter`` or ``route``.
        hook: Its hook.
        priority: Its priority at the hook; lower runs first.
        policy: The rule that drops what reaches its end, None if that is accepted.
        tool: The tool that printed it.
        chains: The chain itself, and those that it leads to.
        effects: What these chains may change.
        has_native: Whether one of them has a rule that only nft prints as it is.
    """

    family: RuleFamily
    table: str
    name: str
    kind: str
    hook: HookName
    priority: int
    policy: Rule | None
    tool: Tool
    chains: Chains = field(compare=False, repr=False)
    effects: Effects
    has_native: bool = False

    def placed(self, rule: Rule) -> Rule:
        """Return a rule as one that this chain leads to."""
        return replace(rule, base_chain=self.name, hook=self.hook, priority=self.priority)


@dataclass(frozen=True, slots=True, kw_only=True)
class KubeProxyFacts:
    """
    How kube-proxy runs, as far as its rules show; None if they do not.

    ``local_interfaces`` are the interfaces by which it recognises pods, if it does so by interface.
    """

    mode: str | None = None
    masquerade_mark: int | None = None
    has_masquerade_all: bool | None = None
    cluster_cidrs: tuple[str, ...] = ()
    local_interfaces: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """
    The rules of one or more families that one tool printed.

    ``tables`` are the tables that it covers, by nftables' family and name; ``incomplete`` are those
    of which it prints only some base chains.
    """

    tool: Tool
    base_chains: tuple[BaseChain, ...] = ()
    rules: tuple[Rule, ...] = ()
    tables: frozenset[tuple[str, str]] = frozenset()
    incomplete: frozenset[tuple[str, str]] = frozenset()
    owners: frozenset[Owner] = frozenset()
    kube_proxy: KubeProxyFacts = KubeProxyFacts()
    unread: tuple[str, ...] = ()


def reachable(start: str, targets: Mapping[str, set[str]]) -> Iterator[str]:
    """Yield a chain and all chains that it leads to, given the jump targets of each."""
    seen, waiting = {start}, [start]
    while waiting:
        chain = waiting.pop()
        yield chain
        waiting += (found := targets.get(chain, set()) - seen)
        seen |= found


def telling_rules(base_chains: Iterable[BaseChain]) -> tuple[Rule, ...]:
    """Return the rules that translate or drop, each with the first base chain that leads to it."""
    found: dict[Rule, Rule] = {}
    for base in base_chains:
        for steps in base.chains.values():
            for rule in _finishing(op for step in steps for op in step):
                found.setdefault(rule, base.placed(rule))
        if base.policy:
            found[base.policy] = base.placed(base.policy)
    return tuple(found.values())


def _finishing(ops: Iterable[Op]) -> Iterator[Rule]:
    for op in ops:
        if isinstance(op, Finish):
            yield op.rule
        elif isinstance(op, Lookup):
            yield from (entry.op.rule for entry in op.entries if isinstance(entry.op, Finish))
