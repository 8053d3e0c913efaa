"""A token bucket: so much per second, and so much in one burst."""

from dataclasses import dataclass


@dataclass(slots=True)
class Budget:
    """
    What is left to spend, in records or seconds.

    It refills by ``per_s`` every second, up to ``at_once``. ``at_s`` is when it was last refilled.
    """

    per_s: float
    at_once: float
    left: float
    at_s: float

    @classmethod
    def full(cls, per_s: float, at_once: float, now_s: float) -> "Budget":
        """Return a full budget."""
        return cls(per_s, at_once, at_once, now_s)

    def has_left(self, now_s: float) -> bool:
        """Refill up to a time; return whether anything is left."""
        self.left = min(self.at_once, self.left + max(0.0, now_s - self.at_s) * self.per_s)
        self.at_s = now_s
        return self.left > 0

    def take(self, wanted: int, now_s: float) -> int:
        """Spend up to ``wanted`` whole units; return how many were left to spend."""
        taken = min(wanted, int(self.left)) if self.has_left(now_s) else 0
        self.left -= taken
        return taken

    def spend(self, amount: float) -> None:
        """Deduct an amount already spent; the budget may become negative."""
        self.left -= amount
