"""A snapshot of a node's rules, and which of them a connection may have met."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_network
from typing import Literal, TypeVar, cast

from tracer.model import IPNetwork
from tracer.ruleset.flow import Flow
from tracer.ruleset.iptables import is_builtin
from tracer.ruleset.program import SRCNAT, BaseChain, KubeProxyFacts, Part, telling_rules
from tracer.ruleset.rule import Action, HookName, Owner, Range, Rule, Tool
from tracer.ruleset.walk import Walked, walk

__all__ = [
    "IPVS_DEVICE",
    "Action",
    "Candidates",
    "Flow",
    "HookName",
    "Owner",
    "ProxyMode",
    "Range",
    "Rule",
    "Ruleset",
    "Tool",
]

T = TypeVar("T")
_REMEMBERED = 16384
_NFT = {"ipv4": "ip", "ipv6": "ip6", "both": "inet"}
ProxyMode = Literal["iptables", "nftables", "ipvs"]
# The device to which kube-proxy in IPVS mode binds Service addresses (defaultDummyDevice).
IPVS_DEVICE = "kube-ipvs0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """
    The rules that may have translated or dropped a packet.

    Args:
        certain: The rule that did, if that is beyond doubt; then it is the only possible one.
        possible: All rules that may have, in the order in which the kernel evaluates them.
        may_pass: Whether it is possible that none of them matched.
        reason: Why no rule is certain, or why one is: one line.
    """

    certain: Rule | None
    possible: tuple[Rule, ...]
    may_pass: bool
    reason: str

    @property
    def only(self) -> Rule | None:
        """
        The only rule that can have done it, None if there are none or several.

        Weaker than ``certain``: it presumes that one of the rules did it.
        """
        return self.possible[0] if len(self.possible) == 1 else None

    @property
    def owners(self) -> frozenset[Owner]:
        """The owners of the rules that may have done it."""
        return frozenset(rule.owner for rule in self.possible)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruleset:
    """
    A node's rules at one time.

    Args:
        rules: The rules that translate the source or drop, including policies of base chains.
        proxy_mode: kube-proxy's mode as its rules show it, None if they do not.
        masquerade_mark: The bit that kube-proxy sets on what it will masquerade.
        has_masquerade_all: Whether kube-proxy runs with masqueradeAll, None if not known.
        cluster_cidrs: The ranges that kube-proxy takes for the cluster's pods.
        local_interfaces: The interfaces by which it recognises pods, if it does so by interface.
        owners: The owners of rules and chains that are present.
        unread: What could not be read, one string per line.
        base_chains: The base chains, for the walk.
        packed: What the tools printed (`tracer.ruleset.printed`), if it was kept.
    """

    rules: tuple[Rule, ...] = ()
    proxy_mode: ProxyMode | None = None
    masquerade_mark: int | None = None
    has_masquerade_all: bool | None = None
    cluster_cidrs: tuple[IPNetwork, ...] = ()
    local_interfaces: tuple[str, ...] = ()
    owners: frozenset[Owner] = frozenset()
    unread: tuple[str, ...] = ()
    base_chains: tuple[BaseChain, ...] = field(default=(), compare=False, repr=False)
    packed: bytes | None = field(default=None, compare=False, repr=False)
    _answers: dict[tuple[object, ...], Candidates] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    @classmethod
    def of(cls, parts: Iterable[Part], unread: Iterable[str] = ()) -> "Ruleset":
        """Combine what several tools print. A base chain that two of them print counts once."""
        parts = _once(parts)
        facts = [part.kube_proxy for part in parts]
        return cls(
            rules=tuple(rule for part in parts for rule in part.rules),
            proxy_mode=_proxy_mode(facts),
            masquerade_mark=_agreed([fact.masquerade_mark for fact in facts]),
            has_masquerade_all=_agreed([fact.has_masquerade_all for fact in facts]),
            cluster_cidrs=_networks(facts),
            local_interfaces=tuple(
                dict.fromkeys(name for fact in facts for name in fact.local_interfaces)
            ),
            owners=frozenset(owner for part in parts for owner in part.owners) - {Owner.UNKNOWN},
            unread=(*unread, *(line for part in parts for line in part.unread)),
            base_chains=tuple(chain for part in parts for chain in part.base_chains),
        )

    def snat_candidates(self, flow: Flow, hook: HookName = "postrouting") -> Candidates:
        """
        Return the rules that may have replaced the source of a connection's first packet.

        The result for a client and a backend is cached, unless a rule looks at the source port.
        """
        key = _identity(flow, hook)
        known = self._answers.get(key)
        if known is not None:
            return known
        chains = [
            chain
            for chain in self.base_chains
            if chain.kind == "nat" and chain.hook == hook and _sees(chain, flow)
        ]
        if any(_marks_later(chain, hook, flow) for chain in self.base_chains):
            flow = replace(flow, ct_mark=None)
        answer = self._snat_candidates(chains, flow)
        if not any(chain.effects.asks_source_port for chain in chains):
            if len(self._answers) >= _REMEMBERED:
                self._answers.clear()
            self._answers[key] = answer
        return answer

    def _snat_candidates(self, chains: list[BaseChain], flow: Flow) -> Candidates:
        walked = walk(chains, flow, wants_drops=False)
        return self._candidates(walked, "replaces the source", flow)

    def drop_candidates(self, flow: Flow, hook: HookName) -> Candidates:
        """Return the rules that may have dropped a packet at a hook."""
        may_be_first = bool(flow.states & {"new", "related"})
        chains = [
            chain
            for chain in self.base_chains
            if chain.hook == hook and _sees(chain, flow) and (chain.kind != "nat" or may_be_first)
        ]
        walked = _walk(chains, flow, wants_drops=True)
        return self._candidates(walked, "drops the packet", None)

    def _candidates(self, walked: Walked, what: str, flow: Flow | None) -> Candidates:
        possible = walked.rules
        if flow is not None:
            possible = tuple(rule for rule in possible if _can_lead_to(rule, flow))
        is_related = flow is not None and "related" in flow.states
        doubt = self._doubt(walked, possible, what, is_related=is_related)
        return Candidates(
            certain=possible[0] if not doubt else None,
            possible=possible,
            may_pass=walked.may_pass,
            reason=doubt or f"it certainly matches, and no rule before it {what}",
        )

    def _doubt(
        self, walked: Walked, possible: tuple[Rule, ...], what: str, *, is_related: bool
    ) -> str:
        """Return why no rule is certain; empty if one is."""
        doubts = (
            (not walked.is_complete, "the rules branch too much to be followed"),
            (bool(self.unread), f"not all rules were read: {'; '.join(self.unread)}"),
            (not walked.rules, f"no rule {what}"),
            (
                len(possible) < len(walked.rules),
                "a rule that may match would give a source other than the one seen",
            ),
            (len(possible) > 1, f"{len(possible)} rules may match"),
            (
                any(not rule.is_understood for rule in possible),
                "the rule has a match or action that is not understood",
            ),
            (walked.may_pass, "it is not known whether the rule matches"),
            # nf_nat's helpers translate an expected connection before it meets any rule
            # (nf_nat_follow_master).
            (is_related, "a related connection may be translated like the one it belongs to"),
        )
        return next((reason for holds, reason in doubts if holds), "")


def _once(parts: Iterable[Part]) -> tuple[Part, ...]:
    """
    Keep one reading of the base chains that iptables-save and nft both print.

    It is that of iptables-save, which knows all matches of iptables, unless the chain has rules
    that only nft prints as they are. Other base chains in iptables' tables only nft prints.
    """
    parts = tuple(parts)
    shown = {table for part in parts if part.tool == "iptables" for table in part.tables}
    both = {
        _place(chain): chain.has_native
        for part in parts
        if part.tool == "nftables"
        for chain in part.base_chains
        if (_NFT[chain.family], chain.table) in shown and is_builtin(chain)
    }
    return tuple(_of_chains(part, both) for part in parts)


def _of_chains(part: Part, both: Mapping[tuple[object, ...], bool]) -> Part:
    if part.tool == "iptables-legacy":
        return part
    chains = tuple(
        chain
        for chain in part.base_chains
        if both.get(_place(chain), part.tool == "nftables") == (part.tool == "nftables")
    )
    return replace(part, base_chains=chains, rules=telling_rules(chains))


def _place(chain: BaseChain) -> tuple[object, ...]:
    return _NFT[chain.family], chain.table, chain.name, chain.hook, chain.priority


def _walk(chains: list[BaseChain], flow: Flow, *, wants_drops: bool) -> Walked:
    """Walk once for each state that the packet may be in: it has the same state at all rules."""
    walks = [
        walk(chains, replace(flow, states=frozenset({state})), wants_drops=wants_drops)
        for state in sorted(flow.states)
    ]
    if len(walks) == 1:
        return walks[0]
    return Walked(
        rules=tuple(dict.fromkeys(rule for one in walks for rule in one.rules)),
        may_pass=any(one.may_pass for one in walks),
        is_complete=all(one.is_complete for one in walks),
    )


def _identity(flow: Flow, hook: HookName) -> tuple[object, ...]:
    """Return a flow without its source port, as numbers: hashing addresses is slow."""
    return (
        hook,
        flow.src.version,
        int(flow.src),
        int(flow.dst),
        flow.dport,
        flow.proto,
        None if flow.orig_dst is None else int(flow.orig_dst),
        flow.orig_dport,
        flow.mark,
        flow.ct_mark,
        flow.iif,
        flow.oif,
        flow.states,
        flow.is_reply,
        None if flow.seen_source is None else int(flow.seen_source),
        flow.local_addresses,
    )


def _sees(chain: BaseChain, flow: Flow) -> bool:
    return chain.family in ("both", flow.family)


def _marks_later(chain: BaseChain, hook: HookName, flow: Flow) -> bool:
    """Whether a chain may change the entry's mark after SNAT: it is read at the hook's end."""
    return (
        chain.hook == hook
        and chain.effects.has_connection_mark
        and chain.priority >= SRCNAT
        and _sees(chain, flow)
    )


def _can_lead_to(rule: Rule, flow: Flow) -> bool:
    seen = flow.seen_source
    if seen is None or not rule.to_addresses:
        return True
    return any(seen in addresses for addresses in rule.to_addresses)


def _agreed(values: list[T | None]) -> T | None:
    known = {value for value in values if value is not None}
    return known.pop() if len(known) == 1 else None


def _proxy_mode(facts: list[KubeProxyFacts]) -> ProxyMode | None:
    return cast("ProxyMode | None", _agreed([fact.mode for fact in facts]))


def _networks(facts: list[KubeProxyFacts]) -> tuple[IPNetwork, ...]:
    texts = dict.fromkeys(text for fact in facts for text in fact.cluster_cidrs)
    return tuple(ip_network(text) for text in texts)
