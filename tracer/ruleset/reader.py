"""Reads the rules of a network namespace with the node's own tools, without changing anything."""

import time
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Self

from tracer.kernel.netns import inside
from tracer.ruleset import printed
from tracer.ruleset.errors import RulesetError
from tracer.ruleset.model import Ruleset
from tracer.ruleset.nfnetlink import Nftables, has_nf_tables
from tracer.ruleset.printed import Family, Printed
from tracer.ruleset.rule import Tool
from tracer.ruleset.tool import Limits, Output, run

LIMITS = Limits()
LEGACY_INTERVAL_S = 30.0

_PROGRAMS: dict[Family, str] = {"ipv4": "iptables", "ipv6": "ip6tables"}
# These list the tables of legacy iptables that exist. If a list is empty or missing, the tool is
# not run: it could load modules and create tables.
_LEGACY_TABLES: dict[Family, str] = {"ipv4": "ip_tables_names", "ipv6": "ip6_tables_names"}
_OWN_NET = Path("/proc/thread-self/net")


def read(
    netns_path: Path | None = None, *, limits: Limits = LIMITS, is_kept: bool = False
) -> Ruleset:
    """
    Read the rules of a network namespace.

    What cannot be read (no tool, no permission, too much, too slow) is noted in ``unread``.

    Args:
        netns_path: The namespace, None for that of the calling thread.
        limits: The limits of each tool.
        is_kept: Whether to keep what was printed along with the rules.

    Raises:
        NetnsError: If the namespace has gone or may not be entered.
    """
    with _within(netns_path):
        reading = _Reading(limits)
        reading.legacy()
        if has_nf_tables():
            reading.iptables()
            reading.nftables()
    found = Printed(outputs=tuple(reading.outputs), unread=tuple(reading.unread))
    ruleset = found.ruleset
    return replace(ruleset, packed=printed.pack(found)) if is_kept else ruleset


class Watcher:
    """
    Keeps the rules of a namespace, and reads them again when they have changed.

    The kernel counts the changes of nf_tables, and of iptables on it; reading the count takes
    microseconds. Legacy iptables has no count: if it has tables, they are read at intervals.
    """

    def __init__(
        self,
        netns_path: Path | None = None,
        *,
        legacy_interval_s: float = LEGACY_INTERVAL_S,
        limits: Limits = LIMITS,
        is_kept: bool = False,
    ) -> None:
        """
        Enter the namespace once and keep a socket in it.

        Args:
            netns_path: The namespace, None for that of the calling thread.
            legacy_interval_s: How often to read rules whose changes are not counted.
            limits: The limits of each tool.
            is_kept: Whether to keep what was printed along with the rules.

        Raises:
            NetnsError: If the namespace has gone or may not be entered.
        """
        self._path = netns_path
        self._limits = limits
        self._is_kept = is_kept
        self._interval_s = legacy_interval_s
        self._netlink: Nftables | None = None
        self._generation: int | None = None
        self._ruleset: Ruleset | None = None
        self._looked_at_s = 0.0
        self._has_legacy = False
        self._is_open = True
        self._connect()

    def ruleset(self) -> Ruleset:
        """
        Return the current rules, read again only if they have changed.

        Raises:
            NetnsError: If the namespace has gone or may not be entered.
        """
        if self._ruleset is None or self.has_changed():
            # Asked first, so that a change during the reading is not missed.
            self._generation = self._ask()
            self._ruleset = read(self._path, limits=self._limits, is_kept=self._is_kept)
            self._looked_at_s = time.monotonic()
            self._has_legacy = self._look_for_legacy()
        return self._ruleset

    def has_changed(self) -> bool:
        """Whether the rules may have changed since ``ruleset`` last returned them."""
        if self._ruleset is None:
            return True
        generation = self._ask()
        if generation != self._generation:
            return True
        if time.monotonic() - self._looked_at_s < self._interval_s:
            return False
        # Without a count (legacy tables, no permission) they are read at intervals.
        is_blind = generation is None and self._netlink is not None
        if is_blind or self._has_legacy or self._look_for_legacy():
            return True
        self._looked_at_s = time.monotonic()
        return False

    def close(self) -> None:
        """Close the socket."""
        self._is_open = False
        if self._netlink is not None:
            self._netlink.close()
            self._netlink = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _look_for_legacy(self) -> bool:
        with _within(self._path):
            return bool(_legacy_tables("ipv4") or _legacy_tables("ipv6"))

    def _connect(self) -> None:
        if self._is_open and self._netlink is None and has_nf_tables():
            with _within(self._path), suppress(OSError):
                self._netlink = Nftables()

    def _ask(self) -> int | None:
        self._connect()
        if self._netlink is None:
            return None
        try:
            return self._netlink.generation()
        except OSError:
            return None


class _Reading:
    """One reading, inside the namespace: what was printed, and what could not be read."""

    def __init__(self, limits: Limits) -> None:
        self.outputs: list[printed.Output] = []
        self.unread: list[str] = []
        self._limits = limits
        self._left_to_nft: list[str] = []

    def legacy(self) -> None:
        for family, program in _PROGRAMS.items():
            tables = _legacy_tables(family)
            if not tables:
                continue
            name = f"{program}-legacy-save"
            output = run((name,), self._limits)
            if output.is_missing and not _is_nft_variant(f"{program}-save", self._limits):
                output = run((f"{program}-save",), self._limits)
            where = f"legacy tables {', '.join(tables)} ({family})"
            self._add(output, where, "iptables-legacy", family)

    def iptables(self) -> None:
        for family, program in _PROGRAMS.items():
            output = run((f"{program}-nft-save",), self._limits)
            if output.is_missing and _is_nft_variant(f"{program}-save", self._limits):
                output = run((f"{program}-save",), self._limits)
            # If it is missing, or fails as it does on some of nft's own rules, nft still prints
            # these tables, though not all of their matches.
            where = f"tables of {program}"
            if output.problem is None:
                self._add(output, where, "iptables", family)
            elif not output.is_missing:
                self._left_to_nft.append(f"{where}: {output.problem}")

    def nftables(self) -> None:
        output = run(("nft", "-j", "list", "ruleset"), self._limits)
        if output.problem is not None:
            self.unread += self._left_to_nft
        if not output.is_missing:
            self._add(output, "nftables", "nftables", None)
            return
        left = self._tables_left()
        if left is None:
            self.unread.append(f"nftables: {output.problem}")
        elif left:
            self.unread.append(f"{', '.join(f'table {one}' for one in left)}: {output.problem}")

    def _tables_left(self) -> list[str] | None:
        """Return the tables that iptables-save has not printed, None if not known."""
        shown: set[tuple[str, str]] = set()
        for output in self.outputs:
            if output.tool == "iptables":
                with suppress(RulesetError):
                    part = output.parse()
                    shown |= part.tables - part.incomplete
        try:
            with Nftables() as netlink:
                there = netlink.tables()
        except OSError:
            return None
        return sorted(f"{family} {name}" for family, name in there - shown)

    def _add(self, output: Output, where: str, tool: Tool, family: Family | None) -> None:
        if output.problem is not None:
            self.unread.append(f"{where}: {output.problem}")
            return
        self.outputs.append(printed.Output(tool=tool, family=family, where=where, text=output.text))


def _within(netns_path: Path | None) -> AbstractContextManager[None]:
    return nullcontext() if netns_path is None else inside(netns_path)


def _legacy_tables(family: Family) -> list[str]:
    try:
        return (_OWN_NET / _LEGACY_TABLES[family]).read_text().split()
    except OSError:
        return []


def _is_nft_variant(program: str, limits: Limits) -> bool:
    # "iptables-save v1.8.9 (nf_tables)"; programs before 1.8 know neither -V nor nf_tables.
    return "nf_tables" in run((program, "-V"), limits).text
