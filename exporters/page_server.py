"""The server that hands out a page over HTTP or HTTPS, to whom the gate lets in."""

import errno
import logging
import threading
import time
from collections.abc import Callable
from http.client import HTTPException, LineTooLong
from http.server import BaseHTTPRequestHandler
from socket import AF_INET6, socket
from socketserver import TCPServer
from typing import Any, Protocol, cast

from exporters.certificate import Certificate
from exporters.prometheus import GUARDED, Page
from exporters.slots import Slots
from tracer.channel import Channel, ClearChannel, TlsChannel, send_all
from tracer.errors import TracerError

_log = logging.getLogger(__name__)

# How long a request may take, from the connection to the last byte of its answer.
_PATIENCE_S = 10.0
# Bytes of a request at the most, with a token of 16 KiB; and of what is received at once.
_MAX_HEAD, _CHUNK = 32 << 10, 4 << 10
# How long to accept nobody when there are no descriptors left: asking again at once is a loop.
_REST_S = 1.0
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_PLAIN = "text/plain; charset=utf-8"

# Takes the Authorization header and the path; returns None to let in, else status and reason.
Gate = Callable[[str, str], tuple[int, str] | None]


class Streams(Protocol):
    """
    Who takes over the connections of the live stream, from any thread.

    ``url_path`` is where to ask for it, ``upgrade`` what a connection is asked to become (RFC 9110,
    7.8).
    """

    url_path: str
    upgrade: str

    def has_room(self) -> bool:
        """Whether one more would be served."""

    def take_over(self, channel: Channel, said: bytes) -> None:
        """Go on with a connection; ``said`` has come already."""


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
            gate: Who may have the metrics and the stream; None for all. Health is told to everyone.
        """
        try:
            self._server = _Server((address, port), page, certificate, gate)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise TracerError(
                f"cannot listen on {address} port {port}: {why}; choose another with --bind and "
                "--port"
            ) from error
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def start(self, streams: Streams | None = None) -> None:
        """
        Begin to answer.

        Args:
            streams: Takes over who may have the live stream, over TLS and past a gate alone: it
                shows the addresses of clients.
        """
        if self._server.is_guarded:
            self._server.streams = streams
        self._thread.start()

    def close(self) -> None:
        """Stop, and let go of the port."""
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()


class _Server(TCPServer):
    # Not an HTTPServer: that one looks up the name of its address, which can take long.
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(
        self,
        where: tuple[str, int],
        page: Page,
        certificate: Certificate | None,
        gate: Gate | None,
    ) -> None:
        if ":" in where[0]:
            self.address_family = AF_INET6
        self.page = page
        self.gate = gate
        self.streams: Streams | None = None
        self._certificate = certificate
        # The kubelet's probes come from the node itself: no stranger shall keep them out.
        self._from_here, self._from_elsewhere = Slots(self._begin), Slots(self._begin)
        super().__init__(where, _Handler)

    @property
    def is_guarded(self) -> bool:
        """Whether nobody listens on the way, nor without leave."""
        return self._certificate is not None and self.gate is not None

    def get_request(self) -> tuple[socket, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in _NO_ROOM:
                time.sleep(_REST_S)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        is_from_here = client_address[0] == request.getsockname()[0]
        (self._from_here if is_from_here else self._from_elsewhere).come(request)

    def service_actions(self) -> None:
        """Called twice a second, and after each connection that came."""
        self._from_here.look()
        self._from_elsewhere.look()

    def server_close(self) -> None:
        super().server_close()
        self._from_here.close()
        self._from_elsewhere.close()

    def _begin(self, request: socket) -> bool:
        try:
            threading.Thread(target=self._answer, args=(request,), daemon=True).start()
        except RuntimeError as error:
            _log.warning("a request to the page finds no thread: %s", error)
            request.close()
            return False
        return True

    def _leave(self, request: socket) -> None:
        self._from_here.leave(request)
        self._from_elsewhere.leave(request)

    def _answer(self, request: socket) -> None:
        """Shake hands in the client's own thread: who dawdles holds up nobody else."""
        channel = None
        try:
            channel = self._channel(request)
            handler = _Handler(cast("socket", channel), None, self)
            if handler.has_left and self.streams is not None:
                self._leave(request)
                self.streams.take_over(channel, handler.unread)
                channel = None
        except (OSError, HTTPException):
            """A client that went away, or speaks no HTTP, is not worth a word."""
        except Exception:
            _log.exception("a request to the page was not answered")
        finally:
            self._leave(request)
            if channel is not None:
                channel.close()

    def _channel(self, request: socket) -> Channel:
        deadline_s = time.monotonic() + _PATIENCE_S
        if self._certificate is None:
            clear = ClearChannel(request, chunk=_CHUNK)
            clear.deadline_s = deadline_s
            return clear
        try:
            secured = TlsChannel(request, self._certificate.context(), chunk=_CHUNK, is_server=True)
            secured.deadline_s = deadline_s
            secured.shake_hands()
        except OSError:
            request.close()
            raise
        return secured


class _Head:
    """What a client says, line by line, up to a bound for all of it."""

    closed = False

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._taken = 0
        self.unread = b""

    def readline(self, _limit: int) -> bytes:
        """Return the next line; less at the end."""
        while b"\n" not in self.unread:
            if self._taken + len(self.unread) > _MAX_HEAD:
                raise LineTooLong("request")
            try:
                chunk = self._channel.receive()
            except BlockingIOError:
                # It was of the TLS layer alone.
                continue
            if not chunk:
                break
            self.unread += chunk
        line, end, self.unread = self.unread.partition(b"\n")
        self._taken += len(line + end)
        return line + end

    def close(self) -> None:
        """The connection may go on."""


class _Outlet:
    """What a client is told."""

    closed = False

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def write(self, data: bytes) -> None:
        """Send all of it."""
        send_all(self._channel, data)

    def flush(self) -> None:
        """The socket has it already."""

    def close(self) -> None:
        """The connection may go on."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "srcip"
    sys_version = ""
    has_left = False

    def setup(self) -> None:
        """Take a channel for a socket."""
        self._channel = cast("Channel", self.request)
        self._head = _Head(self._channel)
        self.rfile, self.wfile = cast("Any", self._head), cast("Any", _Outlet(self._channel))

    @property
    def unread(self) -> bytes:
        """What the client has said after its request."""
        return self._head.unread

    def do_GET(self) -> None:
        path, streams = self.path.partition("?")[0], self.server.streams
        is_stream = streams is not None and path == streams.url_path
        gate = self.server.gate
        if gate is not None and (is_stream or path in GUARDED):
            told = self.headers.get_all("Authorization") or [""]
            # Of two, who stands between might have looked at the other.
            refusal = gate(told[0], path) if len(told) == 1 else (400, "one Authorization header")
            # What the API server took for it is not the client's fault.
            self._channel.deadline_s = time.monotonic() + _PATIENCE_S
            if refusal is not None:
                self._refuse(*refusal)
                return
        if streams is not None and is_stream:
            self._leave(streams)
        else:
            self._answer(*self.server.page.answer(self.path, self.headers.get("Accept", "")))

    def _leave(self, streams: Streams) -> None:
        """Let the connection become a stream."""
        told = ",".join(self.headers.get_all("Connection") or ())
        wishes = {each.strip().lower() for each in told.split(",")}
        has_body = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        if "upgrade" not in wishes or self.headers.get("Upgrade", "").strip() != streams.upgrade:
            self._refuse(426, f"this takes 'Connection: Upgrade' and 'Upgrade: {streams.upgrade}'")
        elif self.request_version != "HTTP/1.1" or has_body:
            self._refuse(400, "an upgrade takes HTTP/1.1, and no body")
        elif not streams.has_room():
            self._refuse(503, "as many clients as there may be are connected already")
        else:
            lines = ("HTTP/1.1 101 Switching Protocols", "Connection: Upgrade")
            head = "\r\n".join((*lines, f"Upgrade: {streams.upgrade}", "", ""))
            self.wfile.write(head.encode())
            self.has_left = True

    def _refuse(self, status: int, reason: str) -> None:
        self._answer(status, _PLAIN, f"{reason}\n".encode())

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        if status == 426 and self.server.streams is not None:
            self.send_header("Upgrade", self.server.streams.upgrade)
            self.send_header("Connection", "Upgrade")
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        """Scrapes are no news."""
