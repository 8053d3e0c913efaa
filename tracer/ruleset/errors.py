"""What can go wrong while rules are read."""

from tracer.errors import TracerError


class RulesetError(TracerError):
    """The output of a rule tool cannot be read as what it should be."""
