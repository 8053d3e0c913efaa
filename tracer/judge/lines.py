"""Evidence as lines of text, written only when somebody reads them."""

from collections.abc import Callable, Iterator, Sequence
from typing import overload

from tracer.ruleset.model import Owner, Rule


def owned(rule: Rule) -> str:
    """Return the words that say whose rule it is."""
    return "a rule of unknown owner" if rule.owner is Owner.UNKNOWN else f"{rule.owner}'s rule"


class Lines(Sequence[str]):
    """
    A sequence of lines that is written out on first access.

    Most opinions are only counted or filtered by verdict; formatting evidence that nobody reads
    would be most of the work of judging.
    """

    __slots__ = ("_lines", "_make")

    def __init__(self, make: Callable[[], Sequence[str]]) -> None:
        self._make: Callable[[], Sequence[str]] | None = make
        self._lines: tuple[str, ...] = ()

    def _read(self) -> tuple[str, ...]:
        if self._make is not None:
            self._lines = tuple(self._make())
            self._make = None
        return self._lines

    def __len__(self) -> int:
        return len(self._read())

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        return self._read()[index]

    def __add__(self, other: Sequence[str]) -> tuple[str, ...]:
        return (*self._read(), *other)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._read() == tuple(other)

    def __hash__(self) -> int:
        return hash(self._read())

    def __repr__(self) -> str:
        return repr(self._read())
