"""
Tells nft's own rules from those that iptables makes, in the tables that both write to.

``iptables-nft-save`` prints a rule with a set, a map or a range of addresses without it, or with a
part of it, as if it matched other packets (seen with 1.8.9).
"""

from collections.abc import Mapping
from typing import Any

Json = Any

# What iptables writes itself: -s, -d, -p, -f, --sport, --dport, --tcp-flags, --icmp-type.
_FIELDS = frozenset(
    {
        "code", "daddr", "dport", "flags", "frag-off", "nexthdr", "protocol", "saddr", "sport",
        "type",
    }
)  # fmt: skip
_STATEMENTS = frozenset(
    {
        "accept", "counter", "drop", "goto", "jump", "limit", "log", "masquerade", "match",
        "reject", "return", "xt",
    }
)  # fmt: skip


def is_native(rule: Mapping[str, Json]) -> bool:
    """Whether a rule holds what iptables never writes."""
    return any(_is_native(statement) for statement in rule.get("expr", ()))


def _is_native(statement: Json) -> bool:
    if not isinstance(statement, dict) or not statement.keys() <= _STATEMENTS:
        return True
    match = statement.get("match")
    return isinstance(match, dict) and not (
        match.get("op") in {"==", "!=", "in"} and _is_plain(match.get("left"), match.get("right"))
    )


def _is_plain(left: Json, right: Json) -> bool:
    if isinstance(left, dict) and isinstance(left.get("&"), list):
        left = left["&"][0]
    field = None
    match left:
        case {"payload": {"field": field}} if field in _FIELDS:
            pass
        case {"meta": _}:
            pass
        case _:
            return False
    match right:
        case {"range": _}:
            return field in {"sport", "dport"}
        case {"set": _}:
            return False
        case str():
            return not right.startswith("@")
    return True
