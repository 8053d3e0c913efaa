"""The server that hands out a page over HTTP or HTTPS, to whom the gate lets in."""

import logging
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import AF_INET6, socket
from typing import Any

from exporters.prometheus import GUARDED, Page
from tracer.errors import TracerError

_log = logging.getLogger(__name__)

# A client that neither asks nor reads holds a thread for so long; so many may.
_PATIENCE_S = 10
_CLIENTS = 32

# Takes the Authorization header; returns None to let in, else status and reason.
Gate = Callable[[str], tuple[int, str] | None]


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


class PageServer:
    """
    Hands out a page, in threads of its own.

    The port is taken at once, while we are still root; `start` answers.

    Raises:
        TracerError: If the address cannot be used.
    """

    def __init__(
        self,
        page: Page,
        address: str,
        port: int,
        *,
        certificate: Certificate | None = None,
        gate: Gate | None = None,
    ) -> None:
        """
        Args:
            page: What is handed out.
            address: Where to listen.
            port: Where to listen; 0 for any.
            certificate: For HTTPS.
            gate: Who may have the metrics; None for all. Health is told to everyone.
        """
        try:
            self._server = _Server((address, port), _handler(page, gate), certificate)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise TracerError(
                f"cannot listen on {address} port {port}: {why}; choose another with --bind and "
                "--port"
            ) from error
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Stop, and let go of the port."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Closing waits for nobody.
    block_on_close = False

    def __init__(
        self,
        where: tuple[str, int],
        handler: type[BaseHTTPRequestHandler],
        certificate: Certificate | None,
    ) -> None:
        if ":" in where[0]:
            self.address_family = AF_INET6
        self._certificate = certificate
        self._free = threading.BoundedSemaphore(_CLIENTS)
        super().__init__(where, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            if self._certificate is not None:
                request = self._secured(request)
            if request is not None:
                super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def _secured(self, request: socket) -> ssl.SSLSocket | None:
        """Shake hands in the client's own thread: who dawdles holds up nobody else."""
        assert self._certificate is not None  # noqa: S101 - the caller has looked
        try:
            request.settimeout(_PATIENCE_S)
            return self._certificate.context().wrap_socket(request, server_side=True)
        except (OSError, ValueError):
            self.shutdown_request(request)
            return None

    def handle_error(self, request: socket | tuple[bytes, socket], client_address: Any) -> None:
        """A client that went away is not worth a word."""


def _handler(page: Page, gate: Gate | None) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _PATIENCE_S
        server_version = "srcip"
        sys_version = ""

        def do_GET(self) -> None:
            if gate is not None and self.path.partition("?")[0] in GUARDED:
                refusal = gate(self.headers.get("Authorization", ""))
                if refusal is not None:
                    self._refuse(*refusal)
                    return
            self._answer(*page.answer(self.path, self.headers.get("Accept", "")))

        def _refuse(self, status: int, reason: str) -> None:
            self._answer(status, "text/plain; charset=utf-8", f"{reason}\n".encode())

        def _answer(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            if status == 401:
                self.send_header("WWW-Authenticate", "Bearer")
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
            """Scrapes are no news."""

    return Handler
