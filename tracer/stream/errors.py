"""Errors between an agent and the clients of its stream."""

from tracer.errors import TracerError


class StreamError(TracerError):
    """The agent cannot be reached, refuses, or sends something malformed; or a client does."""
