"""Lines of text that are made when somebody reads them."""

from collections.abc import Callable, Iterator, Sequence
from typing import overload


class Lines(Sequence[str]):
    """
    A sequence of lines that is written out at the first look.

    Most opinions are counted or filtered by their verdict, and nobody reads their reasons: writing
    them out would be most of the work of judging.
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
