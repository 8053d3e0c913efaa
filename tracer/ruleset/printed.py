"""The rules as the node's tools printed them: packed for a recording, and parsed again."""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from tracer.ruleset.errors import RulesetError
from tracer.ruleset.iptables import parse_save
from tracer.ruleset.model import Ruleset
from tracer.ruleset.nftables import parse_ruleset
from tracer.ruleset.program import Part
from tracer.ruleset.rule import Tool

Family = Literal["ipv4", "ipv6"]

# Packed, this is about a twentieth. 5,000 Services in iptables mode are 10 MiB.
MAX_PRINTED = 32 << 20
# JSON takes more: it escapes quotation marks.
_MAX_JSON = 4 * MAX_PRINTED


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What one tool printed; ``where`` says about what. ``family`` is None for nftables."""

    tool: Tool
    family: Family | None
    where: str
    text: str

    def parse(self) -> Part:
        """
        Parse it.

        Raises:
            RulesetError: If it is not such an output.
        """
        if self.tool == "nftables" or self.family is None:
            return parse_ruleset(self.text)
        return parse_save(self.text, self.family, self.tool)


@dataclass(frozen=True, slots=True, kw_only=True)
class Printed:
    """The printed rules of a namespace. ``unread`` is what could not be read, a line each."""

    outputs: tuple[Output, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def ruleset(self) -> Ruleset:
        """The parsed rules. Each access parses them again."""
        parts: list[Part] = []
        unread = list(self.unread)
        for output in self.outputs:
            try:
                parts.append(output.parse())
            except RulesetError as error:
                unread.append(f"{output.where}: {error}")
        return Ruleset.of(parts, unread)


def pack(printed: Printed) -> bytes:
    """Compress it. Output that is too long is left out, and noted in ``unread``."""
    length = sum(len(output.text) for output in printed.outputs)
    if length > MAX_PRINTED:
        why = f"{length >> 20} MiB of rules are too many to record"
        printed = Printed(unread=(*printed.unread, why))
    found = {
        "outputs": [[one.tool, one.family, one.where, one.text] for one in printed.outputs],
        "unread": list(printed.unread),
    }
    return zlib.compress(json.dumps(found).encode())


def unpack(packed: bytes) -> Printed:
    """
    Read what `pack` returned. The data is not trusted.

    Raises:
        ValueError: If it is not such data, or too long.
    """
    inflate = zlib.decompressobj()
    try:
        data = inflate.decompress(packed, _MAX_JSON)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not inflate.eof:
        raise ValueError("they are truncated, or too long")
    try:
        found = json.loads(data)
    except RecursionError as error:
        raise ValueError("they are nested too deeply") from error
    match found:
        case {"outputs": list(outputs), "unread": list(unread)}:
            return Printed(outputs=tuple(_outputs(outputs)), unread=tuple(map(str, unread)))
    raise ValueError("the outputs or the unread lines are missing")


def _outputs(told: list[object]) -> Iterator[Output]:
    for one in told:
        match one:
            case [tool, family, str(where), str(text)]:
                yield Output(tool=_tool(tool), family=_family(family), where=where, text=text)
            case _:
                raise ValueError("an output is malformed")


def _tool(told: object) -> Tool:
    found = next((tool for tool in get_args(Tool) if tool == told), None)
    if found is None:
        raise ValueError(f"tool {told!r:.20}")
    tool: Tool = found
    return tool


def _family(told: object) -> Family | None:
    if told is None:
        return None
    found = next((family for family in get_args(Family) if family == told), None)
    if found is None:
        raise ValueError(f"family {told!r:.20}")
    family: Family = found
    return family
