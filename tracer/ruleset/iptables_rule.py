"""One line of ``iptables-save``: its matches and its target."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

from tracer.ruleset import owners
from tracer.ruleset.iptables_options import MODULES, Option, number, parse
from tracer.ruleset.matches import Match, NotUnderstood
from tracer.ruleset.program import (
    Finish,
    Jump,
    Op,
    Perhaps,
    SetConnectionMark,
    SetMark,
    Step,
    Verdict,
)
from tracer.ruleset.rule import Action, Owner, Range, Rule, RuleFamily, Tool
from tracer.ruleset.truth import ALL_BITS

# libxtables quotes with these escapes: xtables_save_string().
_TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"|(\S+)')
_ESCAPE = re.compile(r"\\(.)")

# Targets that continue with the next rule, and change nothing that a match here looks at.
_PASSING = frozenset(
    {
        "AUDIT", "CHECKSUM", "CLASSIFY", "CONNSECMARK", "CT", "DSCP", "ECN", "HL", "HMARK",
        "IDLETIMER", "LED", "LOG", "NFLOG", "NOTRACK", "RATEEST", "SECMARK", "SET", "TCPMSS",
        "TCPOPTSTRIP", "TEE", "TOS", "TRACE", "TTL", "ULOG",
    }
)  # fmt: skip
_ACTIONS = {
    "MASQUERADE": Action.MASQUERADE,
    "SNAT": Action.SNAT,
    "NETMAP": Action.SNAT,
    "DROP": Action.DROP,
    "REJECT": Action.REJECT,
}
_VERDICTS = {"ACCEPT": Verdict.ACCEPT, "RETURN": Verdict.RETURN}
_MARK_CHANGES: dict[str, Callable[[int, int], SetMark]] = {
    "--set-xmark": lambda value, mask: SetMark(~mask & ALL_BITS, value),
    "--set-mark": lambda value, mask: SetMark(~(value | mask) & ALL_BITS, value),
    "--and-mark": lambda value, _: SetMark(value, 0),
    "--or-mark": lambda value, _: SetMark(~value & ALL_BITS, value),
    "--xor-mark": lambda value, _: SetMark(ALL_BITS, value),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """
    Where a rule is.

    ``chains`` are the names that a target can jump to, ``klipper`` the rules of klipper-lb.
    """

    family: RuleFamily
    tool: Tool
    table: str
    chain: str
    chains: frozenset[str]
    klipper: frozenset[str] = frozenset()


@dataclass(slots=True)
class _Line:
    """The parts of a rule."""

    matches: list[Match] = field(default_factory=list)
    comment: str | None = None
    target: str | None = None
    is_goto: bool = False
    options: dict[str, str] = field(default_factory=dict)
    bridge: str = ""


@dataclass(frozen=True, slots=True)
class _Token:
    text: str
    is_quoted: bool

    @property
    def is_option(self) -> bool:
        return not self.is_quoted and self.text.startswith("-") and not self.text[1:].isdecimal()


def parse_rule(text: str, place: Place) -> Step:
    """
    Return what a rule does.

    Args:
        text: The line without counters, ``-A CHAIN ...``.
        place: Where the rule is.
    """
    tokens = [
        _Token(found[2], False)
        if found[2] is not None
        else _Token(_ESCAPE.sub(r"\1", found[1]), True)
        for found in _TOKEN.finditer(text)
    ]
    line = _read(tokens[2:], 4 if place.family == "ipv4" else 6)
    return (*line.matches, *_target(line, place, _rule(text, line, place)))


def _read(tokens: list[_Token], version: int) -> _Line:
    line = _Line()
    module, position = "", 0
    while position < len(tokens):
        is_negated = tokens[position] == _Token("!", False)
        position += is_negated
        if position == len(tokens):
            break
        name = tokens[position].text
        args = _arguments(tokens, position + 1)
        position += 1 + len(args)
        if line.target is not None:
            line.options[name] = " ".join(args)
        elif name in {"-j", "-g"}:
            line.target, line.is_goto = " ".join(args), name == "-g"
        elif name == "-m":
            module = " ".join(args)
            if module not in MODULES:
                line.matches.append(NotUnderstood(text=f"-m {module}"))
        else:
            option = Option(
                name=name, args=args, module=module, version=version, is_negated=is_negated
            )
            _add(line, option)
    return line


def _arguments(tokens: list[_Token], start: int) -> tuple[str, ...]:
    # A comment may begin with a dash and is not always quoted.
    end = start + 1 if tokens[start - 1].text == "--comment" else start
    while end < len(tokens) and not (tokens[end].is_option or tokens[end] == _Token("!", False)):
        end += 1
    return tuple(token.text for token in tokens[start:end])


def _add(line: _Line, option: Option) -> None:
    if option.module == "comment" and option.name == "--comment":
        line.comment = " ".join(option.args)
        return
    if option.name == "-o" and option.is_negated:
        line.bridge = " ".join(option.args)
    match = parse(option)
    if match is not None:
        line.matches.append(match)


def _rule(text: str, line: _Line, place: Place) -> Rule:
    action = _ACTIONS.get(line.target or "", Action.UNKNOWN)
    known = owners.first(owners.of_chain(place.chain), owners.of_comment(line.comment))
    if action is Action.MASQUERADE and place.chain == "POSTROUTING":
        mine = Owner.KLIPPER_LB if text in place.klipper else Owner.UNKNOWN
        known = owners.first(known, owners.of_bridge(line.bridge), mine)
    return Rule(
        family=place.family,
        table=place.table,
        chain=place.chain,
        action=action,
        to_addresses=_to_addresses(line),
        comment=line.comment,
        text=text,
        owner=known,
        tool=place.tool,
        matches=tuple(line.matches),
        is_understood=action is not Action.UNKNOWN
        and all(match.is_understood for match in line.matches),
    )


def _to_addresses(line: _Line) -> tuple[Range, ...]:
    try:
        if line.target == "SNAT":
            return (_range(line.options["--to-source"]),)
        if line.target == "NETMAP":
            network = ip_network(line.options["--to"])
            return (Range(first=network.network_address, last=network.broadcast_address),)
    except (KeyError, ValueError):
        pass
    return ()


def _range(text: str) -> Range:
    # ADDRESS or ADDRESS-ADDRESS, perhaps with :PORT; IPv6 is then in brackets.
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    first, _, last = text.partition("-")
    return Range(first=ip_address(first), last=ip_address(last or first))


def _target(line: _Line, place: Place, rule: Rule) -> tuple[Op, ...]:
    target = line.target
    if target is None or target in _PASSING:
        return (Verdict.CONTINUE,)
    if target in place.chains:
        return (Jump(target, line.is_goto),)
    if target in _VERDICTS:
        return (_VERDICTS[target],)
    if target in _ACTIONS:
        return (Finish(rule),)
    if target == "CONNMARK":
        return (*_connection_mark(line.options), Verdict.CONTINUE)
    change = _set_mark(line.options) if target == "MARK" else None
    return (change or Perhaps(rule), Verdict.CONTINUE)


def _set_mark(options: dict[str, str]) -> SetMark | None:
    for name, argument in options.items():
        value, _, mask = argument.partition("/")
        try:
            change = _MARK_CHANGES[name](number(value), number(mask) if mask else ALL_BITS)
        except (KeyError, ValueError):
            continue
        return change
    return None


def _connection_mark(options: dict[str, str]) -> tuple[Op, ...]:
    if "--restore-mark" in options:
        # The entry's mark is not tracked.
        return (SetMark(ALL_BITS, 0, ALL_BITS),)
    return (SetConnectionMark(),)


def klipper_lines(lines: Collection[str]) -> frozenset[str]:
    """
    Return the rules that k3s' klipper-lb made, in the network namespace of its pod.

    Its rules have no telling names. But for each Service its script ``entry`` makes rules that
    belong together: a DNAT, a masquerade to the same address, and a drop of what would reach that
    address on the backend's port from elsewhere.
    """
    found = set()
    for line in lines:
        shape = re.fullmatch(r"-A POSTROUTING -d (\S+)/\d+ -p (\w+) -j MASQUERADE", line)
        if not shape:
            continue
        to, proto = re.escape(shape[1]), shape[2]
        dnat = rf"-A PREROUTING .*-p {proto} .*-j DNAT --to-destination \[?{to}\]?:\d+"
        drop = rf"-A FORWARD -d {to}/\d+ -p {proto} -m {proto} --dport \d+ -j DROP"
        if all(any(re.fullmatch(one, other) for other in lines) for one in (dnat, drop)):
            found.add(line)
    return frozenset(found)
