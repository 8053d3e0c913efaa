"""Parses the output of ``iptables-save`` and ``ip6tables-save``, legacy or on nf_tables."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from tracer.ruleset import kube_proxy, owners
from tracer.ruleset.errors import RulesetError
from tracer.ruleset.iptables_rule import Place, klipper_lines, parse_rule
from tracer.ruleset.program import (
    DSTNAT,
    FILTER,
    MANGLE,
    RAW,
    SECURITY,
    SRCNAT,
    BaseChain,
    Chains,
    Effects,
    KubeProxyFacts,
    Part,
    Step,
    reachable,
    telling_rules,
)
from tracer.ruleset.rule import HOOKS, Action, HookName, Rule, Tool

_CHAIN = re.compile(r":(\S+) (\S+)(?: \[\d+:\d+\])?\s*")
_RULE = re.compile(r"(?:\[\d+:\d+\] )?(-A (\S+).*)")
# iptables-nft-save leaves out base chains that iptables does not make.
_INCOMPLETE = re.compile(r"^# Table `(\S+)' contains incompatible base-chains", re.M)
_TARGET = re.compile(r" -[jg] (\S+)")
_PRIORITIES = {
    "raw": RAW,
    "mangle": MANGLE,
    "filter": FILTER,
    "security": SECURITY,
}
_NAT_PRIORITIES = {"PREROUTING": DSTNAT, "OUTPUT": DSTNAT, "INPUT": SRCNAT, "POSTROUTING": SRCNAT}
_HOOKS: dict[str, HookName] = {hook.upper(): hook for hook in HOOKS}


@dataclass(slots=True)
class _Table:
    """A table as printed: the policies of its chains (None for user chains), and their rules."""

    name: str
    policies: dict[str, str | None] = field(default_factory=dict)
    lines: dict[str, list[str]] = field(default_factory=dict)


def parse_save(text: str, family: Literal["ipv4", "ipv6"], tool: Tool = "iptables") -> Part:
    """
    Parse the output of ``iptables-save`` or ``ip6tables-save``, with or without counters.

    Args:
        text: The output.
        family: ``ipv4`` for iptables-save, ``ipv6`` for ip6tables-save.
        tool: ``iptables`` for the variant on nf_tables, else ``iptables-legacy``.

    Raises:
        RulesetError: If it is not such an output, or is truncated.
    """
    tables = list(_tables(text))
    klipper = _klipper(tables)
    chains = [
        chain for table in tables for chain in _Reader(table, family, tool, klipper).base_chains()
    ]
    rules = telling_rules(chains)
    nat = next((table for table in tables if table.name == "nat"), None)
    version = "ip" if family == "ipv4" else "ip6"
    return Part(
        tool=tool,
        base_chains=tuple(chains),
        rules=rules,
        tables=frozenset((version, table.name) for table in tables),
        incomplete=frozenset((version, name) for name in _INCOMPLETE.findall(text)),
        owners=frozenset(owners.of_chain(name) for table in tables for name in table.policies)
        | {rule.owner for rule in rules},
        kube_proxy=kube_proxy.of_iptables(nat.lines) if nat else KubeProxyFacts(),
    )


def is_builtin(chain: BaseChain) -> bool:
    """Whether a base chain of nft is one that iptables makes, or would make in its place."""
    return (
        _HOOKS.get(chain.name) == chain.hook
        and _priority(chain.table, chain.name) == chain.priority
    )


def _priority(table: str, chain: str) -> int | None:
    return _NAT_PRIORITIES.get(chain) if table == "nat" else _PRIORITIES.get(table)


def _tables(text: str) -> Iterator[_Table]:
    table: _Table | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("*") and table is None:
            table = _Table(line[1:].strip())
        elif table is None:
            raise RulesetError(f"iptables-save line {number} is outside any table: {line[:80]}")
        elif line.strip() == "COMMIT":
            yield table
            table = None
        elif found := _CHAIN.fullmatch(line):
            table.policies[found[1]] = None if found[2] == "-" else found[2]
            table.lines.setdefault(found[1], [])
        elif found := _RULE.fullmatch(line):
            table.lines.setdefault(found[2], []).append(found[1])
        else:
            raise RulesetError(
                f"iptables-save line {number} is neither a rule nor a chain: {line[:80]}"
            )
    if table is not None:
        raise RulesetError(f"iptables-save ends within table {table.name}: it is truncated")


def _klipper(tables: list[_Table]) -> frozenset[str]:
    # Only these chains: klipper-lb's pod has no others, and a node has too many rules to search.
    chains = ("PREROUTING", "POSTROUTING", "FORWARD")
    return klipper_lines(
        [line for table in tables for name in chains for line in table.lines.get(name, ())]
    )


@dataclass(frozen=True, slots=True)
class _Reader:
    """Builds the chains of one table."""

    table: _Table
    family: Literal["ipv4", "ipv6"]
    tool: Tool
    klipper: frozenset[str]

    def base_chains(self) -> Iterator[BaseChain]:
        table = self.table
        # Rules in nat's PREROUTING and OUTPUT can neither translate sources nor drop: iptables
        # refuses DROP in that table. With 10,000 Services nearly all rules are there.
        hooks = ("INPUT", "POSTROUTING") if table.name == "nat" else tuple(_HOOKS)
        starts = [name for name in hooks if table.policies.get(name)]
        targets = {
            name: {target for line in lines for target in _TARGET.findall(line)}
            & table.lines.keys()
            for name, lines in table.lines.items()
        }
        used = {name for start in starts for name in reachable(start, targets)}
        chains = {name: self._steps(name) for name in used}
        for name in starts:
            policy = self._policy(name)
            if chains[name] or policy:
                mine = {one: chains[one] for one in reachable(name, targets)}
                yield self._base_chain(name, policy, mine)

    def _base_chain(self, name: str, policy: Rule | None, chains: Chains) -> BaseChain:
        is_nat = self.table.name == "nat"
        return BaseChain(
            family=self.family,
            table=self.table.name,
            name=name,
            kind="nat" if is_nat else "filter",
            hook=_HOOKS[name],
            priority=_priority(self.table.name, name) or FILTER,
            policy=policy,
            tool=self.tool,
            chains=chains,
            effects=Effects.of(chains),
        )

    def _steps(self, name: str) -> tuple[Step, ...]:
        place = Place(
            family=self.family,
            tool=self.tool,
            table=self.table.name,
            chain=name,
            chains=frozenset(self.table.lines),
            klipper=self.klipper,
        )
        return tuple(parse_rule(line, place) for line in self.table.lines[name])

    def _policy(self, name: str) -> Rule | None:
        if self.table.policies[name] != "DROP":
            return None
        return Rule(
            family=self.family,
            table=self.table.name,
            chain=name,
            action=Action.DROP,
            text=f"-P {name} DROP",
            tool=self.tool,
        )
