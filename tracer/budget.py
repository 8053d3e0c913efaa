"""Bounds on what may be spent: so much at once, and so much a second."""

from dataclasses import dataclass


@dataclass(slots=True)
class Budget:
    """
    What is left to spend, of records or of seconds.

    ``per_s`` comes in every second, up to ``at_once``. ``at_s`` is the time of the last look.
    """

    per_s: float
    at_once: float
    left: float
    at_s: float

    @classmethod
    def full(cls, per_s: float, at_once: float, now_s: float) -> "Budget":
        """Return one from which nothing was spent yet."""
        return cls(per_s, at_once, at_once, now_s)

    def has_left(self, now_s: float) -> bool:
        """Whether anything may be spent at a time."""
        self.left = min(self.at_once, self.left + max(0.0, now_s - self.at_s) * self.per_s)
        self.at_s = now_s
        return self.left > 0

    def take(self, wanted: int, now_s: float) -> int:
        """Spend up to ``wanted`` whole ones; return how many there were."""
        taken = min(wanted, int(self.left)) if self.has_left(now_s) else 0
        self.left -= taken
        return taken

    def spend(self, amount: float) -> None:
        """Spend what was spent already, even if it was not there."""
        self.left -= amount
