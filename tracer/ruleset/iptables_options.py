"""The matches of iptables, option by option, as ``iptables-save`` prints them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Literal

from tracer.ruleset.flow import CtState
from tracer.ruleset.matches import (
    Direction,
    Hairpin,
    Interface,
    LocalAddress,
    Mark,
    Match,
    NotUnderstood,
    State,
    Within,
)
from tracer.ruleset.protocols import protocol
from tracer.ruleset.truth import ALL_BITS
from tracer.ruleset.view import Elements, Field, Interval, Key

# Modules whose options are all known here, or that always match. Any other module may be a match
# by itself, without options, such as "-m socket".
MODULES = frozenset(
    {
        "addrtype", "comment", "connmark", "conntrack", "dccp", "iprange", "mark", "multiport",
        "nfacct", "sctp", "state", "tcp", "udp", "udplite",
    }
)  # fmt: skip

_CT_STATES: dict[str, CtState] = {
    "NEW": "new",
    "ESTABLISHED": "established",
    "RELATED": "related",
    "INVALID": "invalid",
    "UNTRACKED": "untracked",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """An option with its arguments, its module, and the IP version of the packets."""

    name: str
    args: tuple[str, ...]
    module: str
    version: int
    is_negated: bool

    @property
    def value(self) -> str:
        """The only argument."""
        (value,) = self.args
        return value

    @property
    def text(self) -> str:
        """The option as it is printed."""
        return " ".join((*(("!",) if self.is_negated else ()), self.name, *self.args))


def parse(option: Option) -> Match | None:
    """Return the match that an option makes, None if it makes none."""
    handler = _HANDLERS.get((option.module, option.name)) or _HANDLERS.get(("", option.name))
    if handler is None:
        return NotUnderstood(text=option.text)
    try:
        return handler(option)
    except (ValueError, KeyError):
        return NotUnderstood(text=option.text)


def within(keys: tuple[Key, ...], items: Iterable[Interval], *, is_negated: bool = False) -> Within:
    """Return the match that a field is in one of these ranges."""
    elements = Elements(((item,), None) for item in items)
    return Within(keys=keys, elements=elements, is_negated=is_negated)


def number(text: str) -> int:
    """Parse a number as iptables prints it: decimal, or hexadecimal with 0x."""
    return int(text, 0)


def _addresses(which: Field) -> Callable[[Option], Match]:
    def handler(option: Option) -> Match:
        networks = [ip_network(text, strict=False) for text in option.value.split(",")]
        if any(network.version != option.version for network in networks):
            raise ValueError
        items = [
            (int(network.network_address), int(network.broadcast_address)) for network in networks
        ]
        return within((Key(which, option.version),), items, is_negated=option.is_negated)

    return handler


def _address_range(which: Field) -> Callable[[Option], Match]:
    def handler(option: Option) -> Match:
        first, _, last = option.value.partition("-")
        item = (int(ip_address(first)), int(ip_address(last or first)))
        return within((Key(which, option.version),), [item], is_negated=option.is_negated)

    return handler


def _interface(side: Literal[Field.IIF, Field.OIF]) -> Callable[[Option], Match]:
    def handler(option: Option) -> Match:
        name = option.value
        is_prefix = name.endswith("+")
        return Interface(
            side=side,
            name=name.removesuffix("+"),
            is_prefix=is_prefix,
            is_negated=option.is_negated,
        )

    return handler


def _protocol(option: Option) -> Match:
    numbers = [protocol(option.value)]
    return within((Key(Field.PROTO),), [(n, n) for n in numbers], is_negated=option.is_negated)


def _ports(which: Field) -> Callable[[Option], Match]:
    def handler(option: Option) -> Match:
        items = [_port_range(text) for text in option.value.split(",")]
        return within((Key(which),), items, is_negated=option.is_negated)

    return handler


def _port_range(text: str) -> Interval:
    first, colon, last = text.partition(":")
    low = int(first) if first else 0
    high = (int(last) if last else 65535) if colon else low
    return low, high


def _mark(*, is_of_connection: bool) -> Callable[[Option], Match]:
    def handler(option: Option) -> Match:
        value, _, mask = option.value.partition("/")
        return Mark(
            values=(number(value),),
            mask=number(mask) if mask else ALL_BITS,
            is_negated=option.is_negated,
            is_of_connection=is_of_connection,
        )

    return handler


def _state(option: Option) -> Match:
    names = set(option.value.split(","))
    return State(
        states=frozenset(_CT_STATES[name] for name in names - {"DNAT", "SNAT"}),
        has_dnat="DNAT" in names,
        has_snat="SNAT" in names,
        is_negated=option.is_negated,
    )


def _direction(option: Option) -> Match:
    is_reply = {"ORIGINAL": False, "REPLY": True}[option.value]
    return Direction(is_reply=is_reply != option.is_negated)


def _address_type(side: Literal[Field.SRC, Field.DST]) -> Callable[[Option], Match]:
    def handler(option: Option) -> Match:
        if option.value != "LOCAL":
            raise ValueError
        return LocalAddress(side=side, is_negated=option.is_negated)

    return handler


def _set(option: Option) -> Match:
    name, fields = option.args
    if name in {"KUBE-LOOP-BACK", "KUBE-6-LOOP-BACK"} and fields == "dst,dst,src":
        return Hairpin(text=option.text, is_negated=option.is_negated)
    raise ValueError


def _nothing(option: Option) -> None:  # noqa: ARG001 - a handler like the others
    return None


_HANDLERS: dict[tuple[str, str], Callable[[Option], Match | None]] = {
    ("", "-s"): _addresses(Field.SRC),
    ("", "-d"): _addresses(Field.DST),
    ("", "-i"): _interface(Field.IIF),
    ("", "-o"): _interface(Field.OIF),
    ("", "-p"): _protocol,
    ("comment", "--comment"): _nothing,
    # True unless the accounting object has a quota (xt_nfacct.c), and kube-proxy's have none.
    ("nfacct", "--nfacct-name"): _nothing,
    ("set", "--match-set"): _set,
    ("mark", "--mark"): _mark(is_of_connection=False),
    ("connmark", "--mark"): _mark(is_of_connection=True),
    ("state", "--state"): _state,
    ("conntrack", "--ctstate"): _state,
    ("conntrack", "--ctdir"): _direction,
    ("conntrack", "--ctproto"): _protocol,
    ("conntrack", "--ctorigsrc"): _addresses(Field.ORIG_SRC),
    ("conntrack", "--ctorigdst"): _addresses(Field.ORIG_DST),
    ("conntrack", "--ctorigsrcport"): _ports(Field.ORIG_SPORT),
    ("conntrack", "--ctorigdstport"): _ports(Field.ORIG_DPORT),
    ("addrtype", "--src-type"): _address_type(Field.SRC),
    ("addrtype", "--dst-type"): _address_type(Field.DST),
    ("iprange", "--src-range"): _address_range(Field.SRC),
    ("iprange", "--dst-range"): _address_range(Field.DST),
    ("multiport", "--sports"): _ports(Field.SPORT),
    ("multiport", "--dports"): _ports(Field.DPORT),
    **{
        (module, name): _ports(which)
        for module in ("tcp", "udp", "sctp", "dccp", "udplite")
        for name, which in (("--sport", Field.SPORT), ("--dport", Field.DPORT))
    },
}
