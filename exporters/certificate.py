"""The certificate of a server that runs for months."""

import logging
import ssl
import threading
from pathlib import Path

from tracer.errors import TracerError

_log = logging.getLogger(__name__)


class Certificate:
    """
    A certificate and its key, read anew when the files have changed.

    New ones that cannot be read are a warning, and the former stay in use: who renews writes one
    file after the other.

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
        """Return what the next connection shall use."""
        with self._lock:
            stamp = self._stamps()
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._context = self._load()
                except (OSError, ValueError) as error:
                    _log.warning("%s; the former one stays in use", self._trouble(error))
            return self._context

    def _load(self) -> ssl.SSLContext:
        # A new one each time: one that failed half way holds a certificate without its key.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # A handshake is what costs: each connection has one.
        context.options |= ssl.OP_NO_RENEGOTIATION
        # No password is asked for on a terminal.
        context.load_cert_chain(*self._files, password=lambda: b"")
        return context

    def _stamps(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(map(_stamp, self._files))

    def _trouble(self, error: OSError | ValueError) -> str:
        cert, key = self._files
        why = error.reason if isinstance(error, ssl.SSLError) else getattr(error, "strerror", None)
        return f"cannot use the certificate {cert} with the key {key}: {why or error}"


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    # A mounted Secret changes by its symbolic link: another inode.
    return found.st_ino, found.st_mtime_ns, found.st_size
