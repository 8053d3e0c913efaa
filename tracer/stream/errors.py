"""What can go wrong between an agent and those who listen to it."""

from tracer.errors import TracerError


class StreamError(TracerError):
    """The agent cannot be reached, refuses, or says what is not understood."""
