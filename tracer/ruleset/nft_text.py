"""Formats rules of ``nft -j`` in one line, as ``nft list ruleset`` prints them."""

import json
from collections.abc import Callable, Mapping
from typing import Any

Json = Any

_PLAIN = {
    "accept", "continue", "drop", "log", "masquerade", "notrack", "redirect", "reject",
    "return",
}  # fmt: skip
_INTERFACES = ("iif", "oif", "iifname", "oifname")
_BINARY = ("&", "|", "^", "<<", ">>")


def rule(body: Mapping[str, Json]) -> str:
    """Return a rule in one line, without counters."""
    words = [statement(one) for one in body.get("expr", ())]
    if body.get("comment"):
        words.append(f'comment "{body["comment"]}"')
    return " ".join(word for word in words if word)


def match(body: Mapping[str, Json]) -> str:
    """Return a match."""
    op = body.get("op")
    middle = "" if op in {"==", "in"} else f"{op} "
    left = expression(body.get("left"))
    return f"{left} {middle}{_right(left, body.get('right'))}"


def statement(body: Json) -> str:
    """Return a statement; an unknown one as JSON."""
    if not isinstance(body, dict) or len(body) != 1:
        return _raw(body)
    ((kind, value),) = body.items()
    match_ = {
        "match": _match,
        "mangle": _mangle,
        "vmap": _vmap,
        "jump": lambda one: f"jump {_target(one)}",
        "goto": lambda one: f"goto {_target(one)}",
        "snat": lambda one: _nat("snat", one),
        "dnat": lambda one: _nat("dnat", one),
        "reject": _reject,
        "masquerade": lambda one: _flagged("masquerade", one),
        "xt": _xt,
    }.get(kind)
    try:
        if match_ is not None:
            return match_(value)
    except (KeyError, TypeError, AttributeError, ValueError):
        return _raw(body)
    if kind == "counter":
        # Counters change all the time, and say nothing about what a rule does.
        return ""
    return kind if kind in _PLAIN else _raw(body)


def expression(body: Json) -> str:
    """Return an expression."""
    try:
        return _expression(body)
    except (KeyError, TypeError, AttributeError, ValueError):
        return _raw(body)


def _expression(body: Json) -> str:
    if not isinstance(body, dict) or len(body) != 1:
        return _value(body)
    ((kind, value),) = body.items()
    if kind in _BINARY:
        return f" {kind} ".join(_operand(one) for one in value)
    writer = _EXPRESSIONS.get(kind)
    return writer(value) if writer else _value(body)


def _meta(value: Mapping[str, Json]) -> str:
    key = str(value["key"])
    return key if key in _INTERFACES else f"meta {key}"


def _fib(value: Mapping[str, Json]) -> str:
    flags = value["flags"] if isinstance(value["flags"], list) else [value["flags"]]
    return f"fib {' . '.join(flags)} {value['result']}"


_EXPRESSIONS: dict[str, Callable[[Json], str]] = {
    "concat": lambda value: " . ".join(expression(one) for one in value),
    "meta": _meta,
    "payload": lambda value: f"{value['protocol']} {value['field']}",
    "ct": lambda value: " ".join(("ct", *filter(None, (value.get("dir"), value["key"])))),
    "fib": _fib,
    "numgen": lambda value: f"numgen {value['mode']} mod {value['mod']}",
}


def _operand(body: Json) -> str:
    return f"0x{body:08x}" if type(body) is int else expression(body)


def _value(body: Json) -> str:
    text = str(body) if isinstance(body, str | int) else _raw(body)
    match body:
        case list():
            text = ",".join(_value(one) for one in body)
        case {"prefix": {"addr": address, "len": length}}:
            text = f"{address}/{length}"
        case {"range": [first, last]}:
            text = f"{_value(first)}-{_value(last)}"
        case {"set": list(items)}:
            text = f"{{ {', '.join(_item(one) for one in items)} }}"
        case {"concat": list(parts)}:
            text = " . ".join(_value(part) for part in parts)
        case {"elem": {"val": value}}:
            text = _value(value)
    return text


def _item(body: Json) -> str:
    match body:
        case [key, verdict]:
            return f"{_value(key)} : {statement(verdict)}"
    return _value(body)


def _right(left: str, body: Json) -> str:
    if left in _INTERFACES and isinstance(body, str) and not body.startswith("@"):
        return f'"{body}"'
    return _operand(body) if "mark" in left else _value(body)


def _match(body: Mapping[str, Json]) -> str:
    return match(body)


def _mangle(body: Mapping[str, Json]) -> str:
    value = body["value"]
    return f"{expression(body['key'])} set {_operand(value)}"


def _vmap(body: Mapping[str, Json]) -> str:
    return f"{expression(body['key'])} vmap {_value(body['data'])}"


def _target(body: Mapping[str, Json]) -> str:
    return str(body["target"])


def _nat(kind: str, body: Mapping[str, Json]) -> str:
    family = body.get("family")
    to = expression(body["addr"]) if "addr" in body else ""
    port = f":{_value(body['port'])}" if "port" in body else ""
    return " ".join(filter(None, (kind, family, f"to {to}{port}")))


def _reject(body: Mapping[str, Json] | None) -> str:
    if not body or body.get("expr") == "port-unreachable":
        return "reject"
    if body["type"] == "tcp reset":
        return "reject with tcp reset"
    return f"reject with {body['type']} {body['expr']}"


def _flagged(kind: str, body: Mapping[str, Json] | None) -> str:
    flags = (body or {}).get("flags", [])
    return " ".join((kind, *([flags] if isinstance(flags, str) else flags)))


def _xt(body: Mapping[str, Json] | None) -> str:
    # nft, too, shows only the name.
    return f"xt {body['type']} {body['name']}" if body else "xt"


def _raw(body: Json) -> str:
    return json.dumps(body, separators=(",", ":"))
