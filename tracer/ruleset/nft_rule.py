"""One rule of ``nft -j``: its statements, in the order in which they act."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any

from tracer.ruleset import nft_text, owners
from tracer.ruleset.matches import Match, NotUnderstood
from tracer.ruleset.nft_match import Sets, has_header, parse_item, parse_keys, parse_match
from tracer.ruleset.program import (
    Entry,
    Finish,
    Jump,
    Lookup,
    Op,
    Perhaps,
    SetConnectionMark,
    SetMark,
    Step,
    Verdict,
)
from tracer.ruleset.rule import Action, Owner, Range, Rule, RuleFamily
from tracer.ruleset.truth import ALL_BITS
from tracer.ruleset.view import Elements

Json = Any

_ACTIONS = {
    "masquerade": Action.MASQUERADE,
    "snat": Action.SNAT,
    "drop": Action.DROP,
    "reject": Action.REJECT,
}
_VERDICTS = {
    "accept": Verdict.ACCEPT,
    "return": Verdict.RETURN,
    "continue": Verdict.CONTINUE,
    # A translated packet continues as if accepted (nft_nat.c returns NF_ACCEPT).
    "dnat": Verdict.ACCEPT,
    "redirect": Verdict.ACCEPT,
}
# Statements that neither end a rule nor change anything that a match here looks at.
_PASSING = frozenset(
    {"counter", "ct helper", "ct timeout", "dup", "last", "log", "notrack", "secmark"}
)
# Statements at which a rule may end: a limit is reached, a set is full, no socket is found.
_CONDITIONAL = frozenset(
    {"ct count", "ct expectation", "flow", "limit", "map", "quota", "set", "tproxy"}
)
# The packets that these kinds of reject are for.
_REJECTED = {"tcp reset": "tcp", "icmp": "ip", "icmpv6": "ip6"}
_FAILURES = (ValueError, TypeError, KeyError, AttributeError, IndexError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rule is, and who owns the rules there."""

    family: RuleFamily
    table: str
    chain: str
    owner: Owner
    sets: Sets


def parse_rule(body: Mapping[str, Json], place: Place) -> Step:
    """Return what a rule does."""
    ops: list[Op] = []
    reader = _Reader(body, place, ops)
    for statement in body.get("expr", ()):
        ops.extend(reader.statement(statement))
    return (*ops, Verdict.CONTINUE)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Parses one rule; ``ops`` are the operations of its statements so far."""

    body: Mapping[str, Json]
    place: Place
    ops: list[Op]

    def statement(self, statement: Json) -> Iterator[Op]:
        if not isinstance(statement, dict) or len(statement) != 1:
            yield Perhaps(self._rule(Action.UNKNOWN))
            return
        ((kind, value),) = statement.items()
        if kind == "match":
            yield from parse_match(value, self.place.sets)
            return
        if kind == "vmap":
            yield self._lookup(value)
            return
        yield from _implied(kind, value)
        if kind in _CONDITIONAL or _has_map(value):
            # If the map has no element for the packet, the rule ends here, too.
            yield NotUnderstood(text=nft_text.statement(statement))
        if kind == "mangle":
            yield from _mangle(value)
        elif kind not in _PASSING | _CONDITIONAL:
            yield from self._verdict(kind, value)

    def _verdict(self, kind: str, value: Json) -> Iterator[Op]:
        if kind in _ACTIONS:
            yield Finish(self._rule(_ACTIONS[kind], value))
        elif kind in _VERDICTS:
            yield _VERDICTS[kind]
        elif kind in {"jump", "goto"}:
            yield Jump(str(value["target"]), kind == "goto")
        elif kind == "xt" and isinstance(value, dict) and value.get("type") == "match":
            yield NotUnderstood(text=nft_text.statement({kind: value}))
        else:
            yield Perhaps(self._rule(Action.UNKNOWN))

    def _rule(
        self, action: Action, value: Json = None, element: tuple[str, str | None] | None = None
    ) -> Rule:
        place, text = self.place, nft_text.rule(self.body)
        comment = self.body.get("comment")
        if element:
            text, comment = f"{text} # {element[0]}", element[1] or comment
        matches = tuple(op for op in self.ops if isinstance(op, Match))
        return Rule(
            family=place.family,
            table=place.table,
            chain=place.chain,
            action=action,
            to_addresses=_to_addresses(value) if action is Action.SNAT else (),
            comment=comment,
            text=text,
            owner=owners.first(place.owner, owners.of_comment(comment)),
            tool="nftables",
            matches=matches,
            is_understood=action is not Action.UNKNOWN
            and all(match.is_understood for match in matches),
        )

    def _lookup(self, value: Mapping[str, Json]) -> Lookup:
        items, is_sure = self.place.sets.items(value["data"])
        try:
            keys = parse_keys(value["key"])
            found = [(parse_item(key, keys), self._entry(key, verdict)) for key, verdict in items]
        except _FAILURES:
            # Any element may match: they are kept under numbers that no packet looks up.
            keys, is_sure = (), False
            found = [
                (((number, number),), self._entry(key, verdict))
                for number, (key, verdict) in enumerate(items)
            ]
        return Lookup(keys=keys, entries=Elements(found), is_sure=is_sure)

    def _entry(self, key: Json, verdict: Mapping[str, Json]) -> Entry:
        ((kind, value),) = verdict.items()
        comment = key["elem"].get("comment") if isinstance(key, dict) and "elem" in key else None
        text = f"{nft_text.expression(key)} : {nft_text.statement(verdict)}"
        return Entry(op=self._entry_op(kind, value, (text, comment)), comment=comment, text=text)

    def _entry_op(
        self, kind: str, value: Json, element: tuple[str, str | None]
    ) -> Jump | Verdict | Finish | Perhaps:
        if kind in {"jump", "goto"}:
            return Jump(str(value["target"]), kind == "goto")
        if kind in _VERDICTS:
            return _VERDICTS[kind]
        if kind in _ACTIONS:
            return Finish(self._rule(_ACTIONS[kind], None, element))
        return Perhaps(self._rule(Action.UNKNOWN, None, element))


def _implied(kind: str, value: Json) -> tuple[Match, ...]:
    """Return what the kernel checks before a statement, although nft does not print it."""
    if not isinstance(value, dict):
        return ()
    if kind in {"snat", "dnat"}:
        # A packet of the other family continues with the next rule (nft_nat_inet_eval).
        return has_header(value.get("family"))
    if kind == "reject":
        return has_header(_REJECTED.get(value.get("type", "")))
    key = value["key"] if kind == "mangle" else {}
    return has_header("tcp" if "tcp option" in key else key.get("payload", {}).get("protocol"))


def _has_map(value: Json) -> bool:
    if isinstance(value, dict):
        return "map" in value or any(_has_map(one) for one in value.values())
    return isinstance(value, list) and any(_has_map(one) for one in value)


def _mangle(value: Mapping[str, Json]) -> Iterator[Op]:
    key = value["key"]
    if key == {"meta": {"key": "mark"}}:
        yield _mark_change(value["value"])
    elif key == {"ct": {"key": "mark"}}:
        yield SetConnectionMark()


def _mark_change(value: Json) -> SetMark:
    try:
        return _linear(value)
    except _FAILURES:
        return SetMark(ALL_BITS, 0, ALL_BITS)


def _linear(value: Json) -> SetMark:
    """Parse an expression as ``(mark & keep) ^ flip``, which covers all that nft can write."""
    if type(value) is int:
        return SetMark(0, value & ALL_BITS)
    if value == {"meta": {"key": "mark"}}:
        return SetMark(ALL_BITS, 0)
    ((op, (inner, operand)),) = value.items()
    if type(operand) is not int:
        raise ValueError("the mark is changed by something else")
    before = _linear(inner)
    match op:
        case "&":
            return SetMark(before.keep & operand, before.flip & operand)
        case "|":
            return SetMark(before.keep & ~operand, before.flip & ~operand | operand)
        case "^":
            return SetMark(before.keep, before.flip ^ operand)
    raise ValueError("the mark is changed in another way")


def _to_addresses(value: Json) -> tuple[Range, ...]:
    try:
        match value["addr"]:
            case str(address):
                return (Range(first=ip_address(address), last=ip_address(address)),)
            case {"range": [first, last]}:
                return (Range(first=ip_address(first), last=ip_address(last)),)
            case {"prefix": {"addr": address, "len": length}}:
                network = ip_network(f"{address}/{length}", strict=False)
                return (Range(first=network.network_address, last=network.broadcast_address),)
    except _FAILURES:
        pass
    return ()
