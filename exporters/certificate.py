"""The TLS certificate of a long-running server, reloaded when its files change."""

import logging
import ssl
import threading
from pathlib import Path

from tracer.errors import TracerError

_log = logging.getLogger(__name__)


class Certificate:
    """
    A certificate and its key, read again when the files have changed.

    If the new ones cannot be read, that is a warning and the old ones stay in use: a renewal writes
    one file after the other.

    Raises:
        TracerError: If they cannot be used at the start.
    """

    def __init__(self, cert: Path, key: Path) -> None:
        self._files = (cert, key)
        self._lock = threading.Lock()
        self._stamp = self._stamps()
        try:
            self._context = self._load()
        except (OSError, ValueError) as error:
            raise TracerError(self._trouble(error)) from None

    def context(self) -> ssl.SSLContext:
        """Return the TLS context for the next connection."""
        with self._lock:
            stamp = self._stamps()
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._context = self._load()
                except (OSError, ValueError) as error:
                    _log.warning("%s; the old one stays in use", self._trouble(error))
            return self._context

    def _load(self) -> ssl.SSLContext:
        # OpenSSL's error about an unreadable file does not name it.
        for file in self._files:
            file.open("rb").close()
        # Always a new context: a load that fails half way leaves a certificate without its key.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # Handshakes are what costs: one for each connection.
        context.options |= ssl.OP_NO_RENEGOTIATION
        # Otherwise OpenSSL would ask for a password on the terminal.
        context.load_cert_chain(*self._files, password=lambda: b"")
        return context

    def _stamps(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(map(_stamp, self._files))

    def _trouble(self, error: OSError | ValueError) -> str:
        cert, key = self._files
        why = error.reason if isinstance(error, ssl.SSLError) else getattr(error, "strerror", None)
        file = getattr(error, "filename", None)
        where = f"{file}: " if file else ""
        return f"cannot use the certificate {cert} with the key {key}: {where}{why or error}"


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    # A mounted Secret changes by its symbolic link, which leads to another inode.
    return found.st_ino, found.st_mtime_ns, found.st_size
