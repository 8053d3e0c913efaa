"""How good the cluster's objects are, as those see it who judge by them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """
    How good the cluster's objects are.

    ``missing`` says what is waited for, None if nothing is. ``age_s`` is None where nothing is
    watched.
    """

    missing: str | None = None
    age_s: float | None = None
    is_stale: bool = False
