"""Three-valued logic, to match rules against flows that are only partly known."""

from dataclasses import dataclass
from enum import IntEnum

ALL_BITS = 0xFFFFFFFF


class Truth(IntEnum):
    """Whether something holds. The minimum of two is "and", the maximum "or"."""

    NO = 0
    MAYBE = 1
    YES = 2

    @property
    def negated(self) -> "Truth":
        """The opposite; MAYBE stays MAYBE."""
        return Truth(2 - self)

    @classmethod
    def of(cls, value: bool | None) -> "Truth":
        """Return YES, NO, or MAYBE for None."""
        if value is None:
            return cls.MAYBE
        return cls.YES if value else cls.NO


@dataclass(frozen=True, slots=True)
class Bits:
    """A 32-bit mark, perhaps known only in part; unknown bits are 0 in ``value``."""

    value: int
    known: int

    @classmethod
    def of(cls, value: int | None) -> "Bits":
        """Return a mark that is known in full, or not at all."""
        return cls(0, 0) if value is None else cls(value & ALL_BITS, ALL_BITS)

    def changed(self, keep: int, flip: int, unknown: int = 0) -> "Bits":
        """Return ``(mark & keep) ^ flip``, with the bits of ``unknown`` no longer known."""
        known = (self.known | ~keep) & ~unknown & ALL_BITS
        return Bits(((self.value & keep) ^ flip) & known, known)

    def joined(self, other: "Bits") -> "Bits":
        """Return what is known if the mark is either this one or the other."""
        known = self.known & other.known & ~(self.value ^ other.value)
        return Bits(self.value & known, known)

    def has(self, value: int, mask: int) -> Truth:
        """Whether ``mark & mask == value``."""
        if value & ~mask or (self.value ^ value) & mask & self.known:
            return Truth.NO
        return Truth.MAYBE if mask & ~self.known & ALL_BITS else Truth.YES
