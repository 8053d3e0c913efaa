"""The matches of nftables, as ``nft -j`` prints them (libnftables-json(5))."""

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any, Literal, cast, get_args

from tracer.ruleset import nft_text
from tracer.ruleset.flow import CtState
from tracer.ruleset.matches import (
    Direction,
    Interface,
    LocalAddress,
    Mark,
    Match,
    NotUnderstood,
    State,
    Status,
    Within,
)
from tracer.ruleset.protocols import protocol
from tracer.ruleset.truth import ALL_BITS
from tracer.ruleset.view import Elements, Field, Interval, Key

Json = Any

_VERSIONS = {"ip": 4, "ip6": 6, "ipv4": 4, "ipv6": 6}
_PAYLOADS = {
    "saddr": Field.SRC,
    "daddr": Field.DST,
    "protocol": Field.PROTO,
    "nexthdr": Field.PROTO,
    "sport": Field.SPORT,
    "dport": Field.DPORT,
}
_METAS = {
    "l4proto": Field.PROTO,
    "nfproto": Field.FAMILY,
    "protocol": Field.FAMILY,
    "iifname": Field.IIF,
    "oifname": Field.OIF,
    "iif": Field.IIF,
    "oif": Field.OIF,
}
_ORIGINALS = {
    "saddr": Field.ORIG_SRC,
    "daddr": Field.ORIG_DST,
    "proto-src": Field.ORIG_SPORT,
    "proto-dst": Field.ORIG_DPORT,
}
_INTERFACES = (Field.IIF, Field.OIF)
_ADDRESSES = (Field.SRC, Field.DST, Field.ORIG_SRC, Field.ORIG_DST)
_STATES = frozenset(get_args(CtState))
# What unexpected JSON may raise.
_FAILURES = (ValueError, TypeError, KeyError, AttributeError, IndexError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sets:
    """The named sets and maps of one table, as JSON."""

    by_name: Mapping[str, Mapping[str, Json]]

    def items(self, reference: Json) -> tuple[list[Json], bool]:
        """
        Return the elements of a set or map, and whether they are complete and constant.

        Raises:
            ValueError: If there is no such set.
        """
        if isinstance(reference, dict) and isinstance(reference.get("set"), list):
            return reference["set"], True
        if isinstance(reference, str) and reference.startswith("@"):
            named = self.by_name.get(reference[1:])
            if named is not None:
                # Packets add elements to such sets, and timeouts remove them.
                return named.get("elem", []), not {"timeout", "dynamic"} & flags(named)
        raise ValueError(f"no set {reference!r}")


def flags(body: Mapping[str, Json]) -> set[str]:
    """Return the flags of a table, set or map: newer nft prints a single one without a list."""
    found = body.get("flags", [])
    return {found} if isinstance(found, str) else set(found)


def parse_match(match: Mapping[str, Json], sets: Sets) -> tuple[Match, ...]:
    """Return the conditions of a match statement, which must all hold."""
    try:
        return _parse(match["op"], match["left"], match["right"], sets)
    except _FAILURES:
        return (*_needed(match.get("left")), NotUnderstood(text=nft_text.match(match)))


def _needed(left: Json) -> tuple[Match, ...]:
    """Return what the kernel checks before it reads a field that is not understood."""
    match left:
        case {"&": [masked, _]}:
            return _needed(masked)
        case {"payload": {"protocol": str(name)}}:
            return has_header(name)
    return ()


def has_header(name: str | None) -> tuple[Match, ...]:
    """Return the match that a packet has a header of this protocol; none for other names."""
    if name in _VERSIONS:
        key, number = Key(Field.FAMILY), _VERSIONS[name]
    else:
        try:
            key, number = Key(Field.PROTO), protocol(name or "")
        except ValueError:
            return ()
    return (Within(keys=(key,), elements=Elements([(((number, number),), None)])),)


def parse_keys(left: Json) -> tuple[Key, ...]:
    """
    Return the fields that an expression names.

    Raises:
        ValueError: If it names anything else.
    """
    if not isinstance(left, dict) or len(left) != 1:
        raise ValueError("not an expression")
    ((kind, value),) = left.items()
    if kind == "concat":
        return tuple(key for part in value for key in parse_keys(part))
    if kind == "meta":
        return (Key(_METAS[value["key"]]),)
    if kind == "payload":
        return (_payload(value),)
    if value == {"key": "state"}:
        return (Key(Field.STATE),)
    if kind == "ct" and value.get("dir") == "original":
        family, _, name = value["key"].rpartition(" ")
        return (Key(_ORIGINALS[name], _VERSIONS.get(value.get("family") or family)),)
    raise ValueError(f"no field: {kind}")


def parse_item(item: Json, keys: tuple[Key, ...]) -> tuple[Interval, ...]:
    """
    Return an element of a set as a range for each field.

    Raises:
        ValueError: If it is not an element for these fields.
    """
    item = unwrapped(item)
    parts = item["concat"] if isinstance(item, dict) and "concat" in item else [item]
    return tuple(_interval(part, key) for part, key in zip(parts, keys, strict=True))


def unwrapped(item: Json) -> Json:
    """Return the value of an element, without its comment or timeout."""
    if isinstance(item, dict) and "elem" in item:
        return item["elem"]["val"]
    return item


def _payload(value: Mapping[str, Json]) -> Key:
    base, which = value["protocol"], _PAYLOADS[value["field"]]
    if base in _VERSIONS:
        return Key(which, _VERSIONS[base])
    return Key(which, None, None if base == "th" else protocol(base))


def _parse(op: str, left: Json, right: Json, sets: Sets) -> tuple[Match, ...]:
    if (mark := _mark(op, left, right)) is not None:
        return (mark,)
    if "ct" in left and (found := _conntrack(op, left["ct"], right)):
        return (found,)
    if "fib" in left:
        return (_fib(op, left["fib"], right),)
    keys = parse_keys(left)
    if len(keys) == 1 and keys[0].field in _INTERFACES:
        return _interfaces(op, keys[0].field, right, sets)
    return (_within(op, keys, right, sets),)


def _within(op: str, keys: tuple[Key, ...], right: Json, sets: Sets) -> Match:
    if op in {"<", ">", "<=", ">="}:
        return Within(keys=keys, elements=Elements([((_half(op, right),), None)]))
    items, is_sure = _items(right, sets)
    if not is_sure or op not in {"==", "!=", "in"}:
        raise ValueError("elements come and go")
    elements = Elements((parse_item(item, keys), None) for item in items)
    return Within(keys=keys, elements=elements, is_negated=op == "!=")


def _items(right: Json, sets: Sets) -> tuple[list[Json], bool]:
    is_set = (isinstance(right, dict) and "set" in right) or (
        isinstance(right, str) and right.startswith("@")
    )
    return sets.items(right) if is_set else ([right], True)


def _half(op: str, right: Json) -> Interval:
    if not isinstance(right, int):
        raise ValueError("not a number")
    if op.startswith("<"):
        return 0, right - (op == "<")
    return right + (op == ">"), 2**128


def _interval(part: Json, key: Key) -> Interval:
    part = unwrapped(part)
    if isinstance(part, dict) and "range" in part:
        first, last = part["range"]
        return _value(first, key), _value(last, key)
    if isinstance(part, dict):
        prefix = part["prefix"]
        network = ip_network(f"{prefix['addr']}/{prefix['len']}", strict=False)
        _check_version(network.version, key)
        return int(network.network_address), int(network.broadcast_address)
    value = _value(part, key)
    return value, value


def _value(value: Json, key: Key) -> int | str:
    if key.field in _ADDRESSES and isinstance(value, str):
        address = ip_address(value)
        _check_version(address.version, key)
        return int(address)
    if key.field is Field.PROTO:
        return protocol(value)
    if key.field is Field.FAMILY:
        return _VERSIONS[value]
    if key.field is Field.STATE and value in _STATES:
        return str(value)
    if key.field in _INTERFACES and isinstance(value, str) and not value.endswith("*"):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and key.field not in _INTERFACES:
        return value
    raise ValueError(f"no value of {key.field}: {value!r}")


def _check_version(version: int, key: Key) -> None:
    if key.field not in _ADDRESSES or key.version not in (None, version):
        raise ValueError("an address of another family")


def _interfaces(op: str, side: Field, right: Json, sets: Sets) -> tuple[Match, ...]:
    items, is_sure = _items(right, sets)
    is_negated = op == "!="
    if not is_sure or op not in {"==", "!=", "in"}:
        raise ValueError("elements come and go")
    names = [unwrapped(item) for item in items]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("an interface that is gone shows as its number")
    if len(names) != 1 and not is_negated:
        return (_within(op, (Key(side),), right, sets),)
    return tuple(_interface(name, side, is_negated=is_negated) for name in names)


def _interface(name: str, side: Field, *, is_negated: bool) -> Match:
    # A trailing star is a wildcard unless it is escaped (nft(8), "Interface name").
    is_prefix = name.endswith("*") and not name.endswith("\\*")
    return Interface(
        side=cast("Literal[Field.IIF, Field.OIF]", side),
        name=name.removesuffix("*") if is_prefix else name.replace("\\*", "*"),
        is_prefix=is_prefix,
        is_negated=is_negated,
        is_absent_sure=False,
    )


def _mark(op: str, left: Json, right: Json) -> Match | None:
    mask = ALL_BITS
    if isinstance(left.get("&"), list):
        left, mask = left["&"]
    is_mark = left == {"meta": {"key": "mark"}}
    if not is_mark and left != {"ct": {"key": "mark"}}:
        return None
    values = right["set"] if isinstance(right, dict) else [right]
    if op not in {"==", "!="} or not all(type(number) is int for number in (mask, *values)):
        raise ValueError("a mark compared in another way")
    return Mark(
        values=tuple(values), mask=mask, is_negated=op == "!=", is_of_connection=not is_mark
    )


def _conntrack(op: str, ct: Mapping[str, Json], right: Json) -> Match | None:
    key = ct["key"]
    if key not in {"state", "status", "direction"}:
        return None
    if op not in {"==", "!=", "in"}:
        raise ValueError("compared in another way")
    names = frozenset(_names(right))
    if isinstance(right, list) and op != "in":
        # Compared with all of these bits at once, of which a packet's state has one.
        raise ValueError("compared as a whole")
    if key == "direction":
        (name,) = names
        is_reply = {"original": False, "reply": True}[name]
        return Direction(is_reply=is_reply != (op == "!="))
    if key == "state":
        if not names <= _STATES:
            raise ValueError("no such state")
        states = cast("frozenset[CtState]", names)
        return State(states=states, is_negated=op == "!=")
    if op != "in":
        # Compared as a whole, and the other bits are not known.
        raise ValueError("a status compared as a whole")
    return Status(bits=names)


def _names(right: Json) -> list[str]:
    names = right["set"] if isinstance(right, dict) else right
    names = [names] if isinstance(names, str) else names
    if not all(isinstance(name, str) for name in names):
        raise ValueError("no names")
    return list(names)


def _fib(op: str, fib: Mapping[str, Json], right: Json) -> Match:
    flags = fib["flags"] if isinstance(fib["flags"], list) else [fib["flags"]]
    if fib["result"] != "type" or right != "local" or op not in {"==", "!="}:
        raise ValueError("a route looked up for something else")
    (flag,) = flags
    return LocalAddress(side=_FIB_SIDES[flag], is_negated=op == "!=")


_FIB_SIDES: Mapping[str, Literal[Field.SRC, Field.DST]] = {"saddr": Field.SRC, "daddr": Field.DST}
