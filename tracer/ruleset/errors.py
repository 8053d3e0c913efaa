"""Errors in reading rules."""

from tracer.errors import TracerError


class RulesetError(TracerError):
    """The output of a rule tool is not in the expected format."""
