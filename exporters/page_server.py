"""The HTTP or HTTPS server of the page, for clients that the gate admits."""

import errno
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
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
# The most bytes of a request, with a token of 16 KiB; and of one receive.
_MAX_HEAD, _CHUNK = 32 << 10, 4 << 10
# How long not to accept when there are no descriptors left: retrying at once would spin.
_REST_S = 1.0
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_PLAIN = "text/plain; charset=utf-8"

# Takes the Authorization header and the path; returns None to admit, else status and reason.
Gate = Callable[[str, str], tuple[int, str] | None]
# The same question again, about a client that was admitted.
AskAgain = Callable[[], tuple[int, str] | None]


class Streams(Protocol):
    """
    Takes over the connections of the live stream, from any thread.

    ``url_path`` is the path of the stream, ``upgrade`` the protocol that a connection upgrades to
    (RFC 9110, section 7.8).
    """

    url_path: str
    upgrade: str

    def has_room(self) -> bool:
        """Whether one more client would be served."""

    def take_over(self, channel: Channel, said: bytes, ask_again: AskAgain) -> None:
        """Continue a connection; ``said`` was received already, ``ask_again`` may take seconds."""


class PageServer:
    """
    Serves a page, in threads of its own.

    The port is bound at once, while the process is still root; `start` begins to serve.

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
            page: The page to serve.
            address: The address to listen on.
            port: The port to listen on; 0 for any.
            certificate: For HTTPS; None for HTTP.
            gate: Decides who may have the metrics and the stream; None to admit everyone. Health
                is for everyone.
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
        Begin to serve.

        Args:
            streams: Takes over the connections of the live stream. Without TLS and a gate there is
                no stream: it shows the addresses of clients.
        """
        if self._server.is_guarded:
            self._server.streams = streams
        self._thread.start()

    def close(self) -> None:
        """Stop, and release the port."""
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
        # The kubelet's probes come from the node itself: remote clients must not starve them.
        self._from_here, self._from_elsewhere = Slots(self._begin), Slots(self._begin)
        super().__init__(where, _Handler)

    @property
    def is_guarded(self) -> bool:
        """Whether traffic is encrypted and clients are authorised."""
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
        """Called twice a second, and after each new connection."""
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
            _log.warning("cannot start a thread for a request to the page: %s", error)
            request.close()
            return False
        return True

    def _leave(self, request: socket) -> None:
        self._from_here.leave(request)
        self._from_elsewhere.leave(request)

    def _answer(self, request: socket) -> None:
        """Serve a client, handshake included, in its own thread: a slow one delays no other."""
        channel = None
        try:
            channel = self._channel(request)
            handler = _Handler(cast("socket", channel), None, self)
            if handler.ask_again is not None and self.streams is not None:
                self._leave(request)
                self.streams.take_over(channel, handler.unread, handler.ask_again)
                channel = None
        except (OSError, HTTPException):
            """A client that has gone, or speaks no HTTP, is not worth logging."""
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
    """A client's request head, line by line, up to a total size."""

    closed = False

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._taken = 0
        self.unread = b""

    def readline(self, _limit: int) -> bytes:
        """Return the next line; at the end of the stream, what is left."""
        while b"\n" not in self.unread:
            if self._taken + len(self.unread) > _MAX_HEAD:
                raise LineTooLong("request")
            try:
                chunk = self._channel.receive()
            except BlockingIOError:
                # It was a record of the TLS layer, without data.
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
    """Sends the answer to a client."""

    closed = False

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def write(self, data: bytes) -> None:
        """Send all of it."""
        send_all(self._channel, data)

    def flush(self) -> None:
        """Do nothing: the socket already has it."""

    def close(self) -> None:
        """The connection may go on."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "srcip"
    sys_version = ""
    # Set if the connection continues as a stream.
    ask_again: AskAgain | None = None

    def setup(self) -> None:
        """Use a channel in place of the socket."""
        self._channel = cast("Channel", self.request)
        self._head = _Head(self._channel)
        self.rfile, self.wfile = cast("Any", self._head), cast("Any", _Outlet(self._channel))

    @property
    def unread(self) -> bytes:
        """What the client has sent after its request."""
        return self._head.unread

    def do_GET(self) -> None:
        path, streams = self.path.partition("?")[0], self.server.streams
        is_stream = streams is not None and path == streams.url_path
        gate = self.server.gate
        if gate is not None and (is_stream or path in GUARDED):
            told = self.headers.get_all("Authorization") or [""]
            # With two headers, a proxy in between might have checked the other one.
            refusal = (
                gate(told[0], path)
                if len(told) == 1
                else (400, "send exactly one Authorization header")
            )
            # The client is not to blame for the time that the API server took.
            self._channel.deadline_s = time.monotonic() + _PATIENCE_S
            if refusal is not None:
                self._refuse(*refusal)
                return
        if streams is not None and gate is not None and is_stream:
            self._leave(streams, partial(gate, self.headers["Authorization"], path))
        else:
            self._answer(*self.server.page.answer(self.path, self.headers.get("Accept", "")))

    def _leave(self, streams: Streams, ask_again: AskAgain) -> None:
        """Let the connection become a stream."""
        told = ",".join(self.headers.get_all("Connection") or ())
        wishes = {each.strip().lower() for each in told.split(",")}
        has_body = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        if "upgrade" not in wishes or self.headers.get("Upgrade", "").strip() != streams.upgrade:
            self._refuse(426, f"send 'Connection: Upgrade' and 'Upgrade: {streams.upgrade}'")
        elif self.request_version != "HTTP/1.1" or has_body:
            self._refuse(400, "an upgrade needs HTTP/1.1 and no body")
        elif not streams.has_room():
            self._refuse(503, "the maximum number of clients is connected")
        else:
            lines = ("HTTP/1.1 101 Switching Protocols", "Connection: Upgrade")
            head = "\r\n".join((*lines, f"Upgrade: {streams.upgrade}", "", ""))
            self.wfile.write(head.encode())
            self.ask_again = ask_again

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
        """Do not log requests: scrapes are routine."""
