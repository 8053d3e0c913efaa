"""The client's end of the live stream over TLS: connect to the agent's port and upgrade."""

import re
import ssl
import time
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from socket import create_connection, gaierror

from tracer.channel import Channel, TlsChannel, keep_alive, send_all
from tracer.stream.errors import StreamError
from tracer.stream.protocol import UPGRADE, URL_PATH

# How long an agent may take to answer; to check a token it asks the API server twice.
PATIENCE_S = 20.0
_MAX_HEAD, _SHOWN = 16 << 10, 200
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})[ \r]")
# A header by which to recognize an agent's answer.
_AGENT_S = re.compile(rb"\r\nserver: *srcip *\r\n", re.IGNORECASE)
# What to do about a refusal, by HTTP status.
_HINTS = {
    401: "; name a file with a valid token by --token-file",
    403: "; bind that account to a role that may get the nonResourceURL /stream",
    404: "; it offers no stream: start 'srcip serve' with --stream-https",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpsAgent:
    """
    An agent that listens with TLS.

    ``ca_file`` holds the trusted certificate authorities, None for the system's. ``server_name`` is
    the name in the certificate, None for the host.
    """

    host: str
    port: int
    token: str = field(repr=False)
    ca_file: Path | None = None
    server_name: str | None = None

    def __str__(self) -> str:
        return f"https://{self.authority}"

    @property
    def authority(self) -> str:
        """Host and port, as in a URL."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def connect(agent: HttpsAgent, *, chunk: int, patience_s: float) -> tuple[Channel, bytes]:
    """
    Return a connection upgraded to the stream, and what was already received on it.

    Args:
        agent: The address and token.
        chunk: Bytes to receive at once at most.
        patience_s: How long all of it may take, apart from resolving the host.

    Raises:
        StreamError: If there is no agent, or it refuses.
    """
    context = _context(agent)
    deadline_s = time.monotonic() + patience_s
    try:
        sock = create_connection((agent.host, agent.port), timeout=patience_s)
    except (OSError, ValueError) as error:
        raise _unreachable(agent, error, patience_s) from None
    try:
        keep_alive(sock)
        name = agent.server_name or agent.host
        channel = TlsChannel(sock, context, chunk=chunk, server_name=name)
        channel.deadline_s = deadline_s
        channel.shake_hands()
        return channel, _upgraded(agent, channel)
    except StreamError:
        sock.close()
        raise
    except (OSError, ValueError) as error:
        sock.close()
        raise _unreachable(agent, error, patience_s) from None


def _context(agent: HttpsAgent) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=agent.ca_file)
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise StreamError(
            f"cannot use the certificate authorities in {agent.ca_file}: {why}"
        ) from None


def _upgraded(agent: HttpsAgent, channel: Channel) -> bytes:
    lines = (
        f"GET {URL_PATH} HTTP/1.1",
        f"Host: {agent.authority}",
        "Connection: Upgrade",
        f"Upgrade: {UPGRADE}",
        f"Authorization: Bearer {agent.token}",
        f"User-Agent: srcip/{version('srcip')}",
    )
    send_all(channel, "".join(f"{line}\r\n" for line in (*lines, "")).encode())
    head, rest = _head(agent, channel)
    found = _STATUS.match(head)
    if found is None:
        raise _not_an_agent(agent, f"{head[:40]!r}")
    status = int(found[1])
    if status == 101 and f"\r\nupgrade: {UPGRADE}\r\n".encode() in head.lower():
        return rest
    if not _AGENT_S.search(head):
        raise _not_an_agent(agent, f"HTTP status {status}")
    why = _first_line(channel, rest)
    raise StreamError(f"the agent at {agent} refuses: {why}{what_to_do(status)}")


def what_to_do(status: object) -> str:
    """Return what follows the reason of a refusal: its HTTP status and a hint, if there are any."""
    return f" ({status}){_HINTS.get(status, '')}" if isinstance(status, int) else ""


def _head(agent: HttpsAgent, channel: Channel) -> tuple[bytes, bytes]:
    """Return the head of the answer, and what was received after it."""
    said = b""
    while b"\r\n\r\n" not in said:
        if len(said) > _MAX_HEAD:
            raise _not_an_agent(agent, "the head of its answer does not end")
        chunk = _received(channel)
        if not chunk:
            raise _not_an_agent(agent, f"{said[:40]!r}" if said else "it closed the connection")
        said += chunk
    head, _, rest = said.partition(b"\r\n\r\n")
    return head + b"\r\n", rest


def _first_line(channel: Channel, said: bytes) -> str:
    """Return the first line of a refusal's body, as far as it arrives."""
    with suppress(OSError):
        while b"\n" not in said and len(said) < _SHOWN and (chunk := _received(channel)):
            said += chunk
    return said.partition(b"\n")[0][:_SHOWN].decode(errors="replace") or "it does not say why"


def _received(channel: Channel) -> bytes:
    while True:
        with suppress(BlockingIOError):
            return channel.receive()


def _not_an_agent(agent: HttpsAgent, said: str) -> StreamError:
    return StreamError(f"what answers at {agent} is not a srcip agent ({said})")


def _unreachable(agent: HttpsAgent, error: Exception, patience_s: float) -> StreamError:
    match error:
        case ssl.SSLCertVerificationError():
            why = (
                f"its certificate is not accepted: {error.verify_message}; name the authorities to"
                " trust with --ca-file, or the certificate's name with --tls-server-name"
            )
        case ssl.SSLError():
            reason = (error.reason or str(error)).replace("_", " ").lower()
            why = f"TLS failed, perhaps something else listens there: {reason}"
        case TimeoutError():
            why = f"no answer within {patience_s:g} s"
        case gaierror():
            why = f"no such host: {error.strerror}"
        case ConnectionRefusedError():
            why = "Connection refused; does 'srcip serve --stream-https' listen there (--bind)?"
        case OSError():
            why = error.strerror or str(error)
        case _:
            why = str(error)
    return StreamError(f"cannot reach the agent at {agent}: {why}")
