"""Parses the output of ``nft -j list ruleset``."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tracer.ruleset import kube_proxy, owners
from tracer.ruleset.errors import RulesetError
from tracer.ruleset.nft_match import Sets, flags
from tracer.ruleset.nft_native import is_native
from tracer.ruleset.nft_rule import Place, parse_rule
from tracer.ruleset.program import (
    BaseChain,
    Chains,
    Effects,
    Jump,
    KubeProxyFacts,
    Lookup,
    Op,
    Part,
    Step,
    reachable,
    telling_rules,
)
from tracer.ruleset.rule import HOOKS, Action, Owner, Rule, RuleFamily

Json = Any

_FAMILIES: dict[str, RuleFamily] = {"ip": "ipv4", "ip6": "ipv6", "inet": "both"}
# Tables that iptables makes on nf_tables, with its chain names.
_IPTABLES = frozenset({"filter", "nat", "mangle", "raw", "security"})


@dataclass(slots=True)
class _Table:
    """A table as printed."""

    family: str
    name: str
    chains: dict[str, Mapping[str, Json]] = field(default_factory=dict)
    rules: dict[str, list[Mapping[str, Json]]] = field(default_factory=dict)
    sets: dict[str, Mapping[str, Json]] = field(default_factory=dict)
    is_dormant: bool = False


def parse_ruleset(text: str) -> Part:
    """
    Parse the output of ``nft -j list ruleset``.

    Raises:
        RulesetError: If it is not such an output.
    """
    try:
        return _part(json.loads(text))
    except RecursionError as error:
        raise RulesetError("the output of nft -j list ruleset is nested too deeply") from error
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise RulesetError(
            f"the output of nft -j list ruleset cannot be parsed: {type(error).__name__}: {error}"
        ) from error


def _part(document: Json) -> Part:
    tables = _tables(document["nftables"])
    chains = [chain for table in tables for chain in _Reader(table).base_chains()]
    rules = telling_rules(chains)
    return Part(
        tool="nftables",
        base_chains=tuple(chains),
        rules=rules,
        tables=frozenset((table.family, table.name) for table in tables),
        owners=frozenset(_owner(table) for table in tables) | {rule.owner for rule in rules},
        kube_proxy=_kube_proxy(tables),
    )


def _owner(table: _Table) -> Owner:
    return owners.of_table(table.name)


def _kube_proxy(tables: Iterable[_Table]) -> KubeProxyFacts:
    mine = [table for table in tables if table.name == "kube-proxy"]
    if not mine:
        return KubeProxyFacts()
    return kube_proxy.of_nftables(
        rule for table in mine for rules in table.rules.values() for rule in rules
    )


def _tables(objects: Json) -> list[_Table]:
    tables: dict[tuple[str, str], _Table] = {}
    for one in objects:
        ((kind, body),) = one.items()
        if kind not in {"table", "chain", "rule", "set", "map"} or body["family"] not in _FAMILIES:
            continue
        name = body["name"] if kind == "table" else body["table"]
        table = tables.setdefault((body["family"], name), _Table(body["family"], name))
        if kind == "table":
            # The kernel does not attach its base chains to their hooks.
            table.is_dormant = "dormant" in flags(body)
        elif kind == "chain":
            table.chains[body["name"]] = body
        elif kind == "rule":
            table.rules.setdefault(body["chain"], []).append(body)
        elif kind in {"set", "map"}:
            table.sets[body["name"]] = body
    return [table for table in tables.values() if not table.is_dormant]


@dataclass(slots=True)
class _Reader:
    """Builds the chains of one table."""

    table: _Table
    steps: dict[str, tuple[Step, ...]] = field(default_factory=dict)

    def base_chains(self) -> Iterator[BaseChain]:
        starts = [body for body in self.table.chains.values() if body.get("hook") in HOOKS]
        self._read([body["name"] for body in starts])
        targets = {name: set(_targets(steps)) for name, steps in self.steps.items()}
        for body in starts:
            name = body["name"]
            policy = self._policy(body)
            if self.steps[name] or policy:
                used = {one: self.steps[one] for one in reachable(name, targets) if one in targets}
                yield self._base_chain(body, policy, used)

    def _read(self, names: list[str]) -> None:
        """Parse the chains with these names, and all that they lead to."""
        while names:
            name = names.pop()
            if name not in self.steps and name in self.table.chains:
                place = self._place(name)
                self.steps[name] = tuple(
                    parse_rule(body, place) for body in self.table.rules.get(name, ())
                )
                names += _targets(self.steps[name])

    def _place(self, chain: str) -> Place:
        table = self.table
        owner = owners.of_table(table.name)
        if table.name in _IPTABLES:
            owner = owners.of_chain(chain)
        return Place(
            family=_FAMILIES[table.family],
            table=table.name,
            chain=chain,
            owner=owner,
            sets=Sets(by_name=table.sets),
        )

    def _base_chain(
        self, body: Mapping[str, Json], policy: Rule | None, chains: Chains
    ) -> BaseChain:
        return BaseChain(
            family=_FAMILIES[self.table.family],
            table=self.table.name,
            name=body["name"],
            kind=str(body["type"]),
            hook=body["hook"],
            priority=int(body["prio"]),
            policy=policy,
            tool="nftables",
            chains=chains,
            effects=Effects.of(chains),
            has_native=any(
                is_native(rule) for name in chains for rule in self.table.rules.get(name, ())
            ),
        )

    def _policy(self, body: Mapping[str, Json]) -> Rule | None:
        if body.get("policy") != "drop":
            return None
        return Rule(
            family=_FAMILIES[self.table.family],
            table=self.table.name,
            chain=body["name"],
            action=Action.DROP,
            text=f"type {body['type']} hook {body['hook']} priority {body['prio']}; policy drop;",
            owner=owners.of_table(self.table.name),
            tool="nftables",
        )


def _targets(steps: Iterable[Step]) -> Iterator[str]:
    for step in steps:
        for op in step:
            yield from _jumps(op)


def _jumps(op: Op) -> Iterator[str]:
    if isinstance(op, Jump):
        yield op.chain
    elif isinstance(op, Lookup):
        yield from (entry.op.chain for entry in op.entries if isinstance(entry.op, Jump))
