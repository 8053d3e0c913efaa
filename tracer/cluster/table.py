"""An immutable mapping whose changed copies share what did not change."""

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

# A change copies one shard and the tuple of shards; at 150,000 entries this many make both about
# equally large. It is prime so that keys with regular low bits, such as network addresses, spread.
_SHARDS = 1021

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Table(Generic[K, V]):
    """
    An immutable mapping with O(1) look-up and cheap changed copies.

    Readers in other threads need no lock: nothing reachable from a table ever changes.
    """

    __slots__ = ("_count", "_shards")

    def __init__(self, shards: tuple[dict[K, V], ...] | None = None, count: int = 0) -> None:
        self._shards: tuple[dict[K, V], ...] = ({},) * _SHARDS if shards is None else shards
        self._count = count

    def get(self, key: K) -> V | None:
        """Return the value at a key, or None."""
        return self._shards[hash(key) % _SHARDS].get(key)

    def values(self) -> Iterator[V]:
        """Yield all values, in no particular order."""
        for shard in self._shards:
            yield from shard.values()

    def items(self) -> Iterator[tuple[K, V]]:
        """Yield all keys with their values, in no particular order."""
        for shard in self._shards:
            yield from shard.items()

    def __len__(self) -> int:
        return self._count

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table) and self._shards == other._shards

    __hash__ = None  # type: ignore[assignment]  # as a dict

    def edit(self) -> "TableEditor[K, V]":
        """Return an editor that starts from this table, which stays unchanged."""
        return TableEditor(self, self._shards, self._count)


class TableEditor(Generic[K, V]):
    """Changes to a table, copying each shard at most once."""

    __slots__ = ("_base", "_count", "_owned", "_shards")

    def __init__(self, base: Table[K, V], shards: tuple[dict[K, V], ...], count: int) -> None:
        self._base = base
        self._shards = list(shards)
        self._count = count
        self._owned: set[int] = set()

    def get(self, key: K) -> V | None:
        """Return the value at a key, with changes so far, or None."""
        return self._shards[hash(key) % _SHARDS].get(key)

    def set(self, key: K, value: V | None) -> None:
        """Set the value at a key, or remove the key if the value is None."""
        shard = self._own(hash(key) % _SHARDS)
        before = len(shard)
        if value is None:
            shard.pop(key, None)
        else:
            shard[key] = value
        self._count += len(shard) - before

    def finish(self) -> Table[K, V]:
        """Return the changed table. Do not use the editor afterwards."""
        if not self._owned:
            return self._base
        return Table(tuple(self._shards), self._count)

    def _own(self, index: int) -> dict[K, V]:
        if index not in self._owned:
            self._shards[index] = self._shards[index].copy()
            self._owned.add(index)
        return self._shards[index]
