"""Errors that srcip raises on purpose; everything else is a bug."""


class TracerError(Exception):
    """Base of all errors that a caller can act on. Its text is one line for the user."""


class DecodeError(TracerError):
    """A record does not follow the wire format."""


class LoadError(TracerError):
    """
    The eBPF programs could not be compiled, loaded or attached.

    ``details`` is what the compiler or the kernel's verifier printed: many lines, for a bug report.
    """

    def __init__(self, message: str, *, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class NetnsError(TracerError):
    """A network namespace does not exist or cannot be entered."""


class RecordingError(TracerError):
    """A recording cannot be opened, read or written."""


class ConntrackError(TracerError):
    """Conntrack netlink refused a request."""


class LabError(TracerError):
    """The lab could not be built."""
