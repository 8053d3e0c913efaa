"""Stream servers as an agent runs them, in this process, and clients that misbehave."""

import ctypes
import ctypes.util
import select
import socket
import ssl
import threading
import time
from contextlib import ExitStack, suppress

from exporters.certificate import Certificate
from exporters.page_server import PageServer
from exporters.prometheus import Page
from tests.unit.patience import PATIENCE_S
from tests.unit.test_page_server import Issued
from tracer.pipeline import Wanted
from tracer.stream.client import AgentStream
from tracer.stream.protocol import UPGRADE, URL_PATH
from tracer.stream.server import Origin, StreamServer
from tracer.stream.upgrade import HttpsAgent

TOKENS = {"good": None, "other": (403, "'somebody' may not get /stream")}


class Stream:
    """A server, with the agent's part played by a test."""

    def __init__(self, path):
        self.path = path
        self.now_s = 0.0
        self.losses = {"ring_full": 5, "untracked": 2}
        self.server = StreamServer(path, clock_s=lambda: self.now_s)
        self.origin = Origin(
            version="1.2",
            nodes=("node1",),
            losses=lambda: dict(self.losses),
            not_seen=lambda: ("the moon",),
        )

    def step(self):
        self.server.flush()
        self.server.end(self.origin)
        self.server.poll()
        self.server.attach(self.origin)

    def listen(self, wanted=None):
        with ExitStack() as stack:
            client = stack.enter_context(AgentStream(self.path, wanted or Wanted()))
            self.step()
            self.step()
            client.wait(PATIENCE_S)
            stack.pop_all()
        return client

    def raw(self, *lines):
        """A client that says something by itself."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE_S)
        sock.connect(str(self.path))
        self.step()
        for line in lines:
            sock.sendall(line)
            self.step()
        return sock

    def close(self):
        self.server.close(self.origin)


def gate(authorization, path):
    """Who may: as tracer.cluster.review answers."""
    if path != URL_PATH:
        return None
    return TOKENS.get(authorization.removeprefix("Bearer "), (401, "a bearer token is required"))


class Streaming:
    """An agent's stream, on a Unix socket and on a port, in a loop of its own."""

    def __init__(self, directory, gate=gate):
        self.issued = Issued(directory)
        self.ca_file = directory / "ca.crt"
        self.trust(self.issued)
        self.path = directory / "agent.sock"
        self.server = StreamServer(self.path)
        self.origin = Origin(
            version="1.2", nodes=("node1",), losses=dict, not_seen=lambda: ("the moon",)
        )
        self.pages = PageServer(
            Page("1.2"),
            "127.0.0.1",
            0,
            certificate=Certificate(self.issued.cert, self.issued.key),
            gate=gate,
        )
        # Closing it waits for the next look.
        self.pages._thread = threading.Thread(
            target=self.pages._server.serve_forever, kwargs={"poll_interval": 0.01}
        )
        self.pages.start(self.server)
        self.lock = threading.Lock()
        self.steps = 0
        self._is_over = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def trust(self, issued):
        """Make the next clients trust the issuer of the latest certificate."""
        self.ca_file.write_bytes(issued.authority.cert_pem.bytes())

    def _run(self):
        while not self._is_over:
            select.select([self.server.fileno()], [], [], 0.02)
            with self.lock:
                self.server.flush()
                self.server.end(self.origin)
                self.server.poll()
                self.server.attach(self.origin)
                self.steps += 1

    def offer(self, *judged):
        with self.lock:
            for each in judged:
                self.server.offer(each)

    def agent(self, **changes):
        known = {"host": "127.0.0.1", "port": self.pages.port, "token": "good"}
        return HttpsAgent(**{**known, "ca_file": self.ca_file, **changes})

    def listen(self, agent, wanted):
        """A client that has been greeted."""
        client = AgentStream(agent, wanted)
        client.wait(PATIENCE_S)
        return client

    def secured(self):
        """A TLS connection to the port on which nothing has been sent."""
        context = ssl.create_default_context(cafile=self.ca_file)
        sock = socket.create_connection(("127.0.0.1", self.pages.port), timeout=PATIENCE_S)
        return context.wrap_socket(sock, server_hostname="127.0.0.1")

    def asked(self, *headers, version="1.1", path=URL_PATH, behind=b""):
        """A connection on which a client has sent a request of its own."""
        sock = self.secured()
        lines = (f"GET {path} HTTP/{version}", "Host: x", *headers, "", "")
        sock.sendall("\r\n".join(lines).encode() + behind)
        return sock

    def raw(self, behind=b""):
        """A connection that has become a stream, and what came on it so far."""
        sock = self.asked(*ASKING, behind=behind)
        said = b""
        while b"\r\n\r\n" not in said:
            said += sock.recv(4096)
        head, _, rest = said.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head
        return sock, rest

    def wait(self, condition):
        end_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end_s, "waited in vain"
            time.sleep(0.005)

    def close(self):
        self._is_over = True
        self._thread.join()
        self.pages.close()
        self.server.close(self.origin)


ASKING = ("Connection: Upgrade", f"Upgrade: {UPGRADE}", "Authorization: Bearer good")


def to_the_end(sock, said=b""):
    """All that still comes."""
    with suppress(ConnectionError, ssl.SSLError):
        while chunk := sock.recv(1 << 16):
            said += chunk
    return said


class KeyUpdates:
    """A client of TLS 1.3 that renews its keys as often as it likes: Python's cannot."""

    def __init__(self, port):
        self._ssl = ctypes.CDLL(ctypes.util.find_library("ssl"))
        for name in ("TLS_client_method", "SSL_CTX_new", "SSL_new"):
            getattr(self._ssl, name).restype = ctypes.c_void_p
        context = self._ssl.SSL_CTX_new(ctypes.c_void_p(self._ssl.TLS_client_method()))
        self._tls = ctypes.c_void_p(self._ssl.SSL_new(ctypes.c_void_p(context)))
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.settimeout(None)
        assert self._ssl.SSL_set_fd(self._tls, self.sock.fileno()) == 1
        assert self._ssl.SSL_connect(self._tls) == 1

    def say(self, data):
        assert self._ssl.SSL_write(self._tls, data, len(data)) == len(data)

    def hear(self):
        buffer = ctypes.create_string_buffer(4096)
        size = -1
        while size < 0:
            # What an error before left there would be told for that of this call.
            self._ssl.ERR_clear_error()
            size = self._ssl.SSL_read(self._tls, buffer, 4096)
            assert size > 0 or self._ssl.SSL_get_error(self._tls, size) == ssl.SSL_ERROR_WANT_READ
        return buffer.raw[:size]

    def renew(self):
        """Whether the peer still reads; it is not asked for a new key."""
        self._ssl.SSL_key_update(self._tls, 0)
        return self._ssl.SSL_do_handshake(self._tls) == 1

    def close(self):
        self._ssl.SSL_free(self._tls)
        self.sock.close()
