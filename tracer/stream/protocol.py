"""
The protocol between an agent and its clients: one JSON object per line, see docs/stream.md.

A client sends a request. The agent answers with a hello and then the lines of docs/json.md, the
last of which is the summary; or with a single error. To end the stream, a client sends an end line,
or shuts down its side of the socket where TLS does not prevent that. All input is checked: it may
come from anyone who may open the socket.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from ipaddress import ip_network
from typing import Any, TypeVar

from tracer.filter import Filter
from tracer.judge.cause import Cause
from tracer.judge.verdict import Verdict
from tracer.model import PROTOCOLS, IPNetwork, protocol_name
from tracer.pipeline import Wanted
from tracer.stream.errors import StreamError

VERSION = 1
DEFAULT_SOCKET = "/run/srcip/agent.sock"
# The stream's path on the agent's port, and the protocol that a connection there is upgraded to.
URL_PATH, UPGRADE = "/stream", "srcip-stream/1"
# In bytes. A request holds a few filters, a line from the agent one connection with its evidence.
MAX_REQUEST, MAX_LINE = 16 << 10, 1 << 20
_MAX_VALUES = 256
_SHOWN = 60

_Word = TypeVar("_Word", bound=StrEnum)


def request_line(wanted: Wanted) -> bytes:
    """Return the request for what is wanted."""
    flows = wanted.flows
    values: dict[str, Any] = {
        "client": str(flows.client) if flows.client else None,
        "backend": str(flows.backend) if flows.backend else None,
        "port": flows.port,
        "proto": protocol_name(flows.proto) if flows.proto else None,
        "verdicts": sorted(wanted.verdicts),
        "causes": sorted(wanted.causes),
        "services": sorted(map("/".join, wanted.services)),
        "stray_accepts": wanted.are_stray_accepts,
    }
    given = {key: value for key, value in values.items() if value not in (None, [])}
    return to_line({"kind": "request", "version": VERSION, "filter": given})


def parse_request(line: bytes) -> Wanted:
    """
    Parse a request.

    Raises:
        StreamError: If it is malformed, or asks for what this agent does not know.
    """
    request = parse_object(line)
    if request.get("kind") != "request":
        raise StreamError(f"expected a request, not kind {_shown(request.get('kind'))}")
    if request.get("version") != VERSION:
        raise StreamError(
            f"this agent speaks version {VERSION} of the stream, not"
            f" {_shown(request.get('version'))}"
        )
    filters = request.get("filter", {})
    if not isinstance(filters, dict):
        raise StreamError("filter is not an object")
    unknown = filters.keys() - _KEYS
    if unknown:
        # Ignoring a filter would send what the client did not ask for.
        raise StreamError(f"this agent has no filter {_shown(min(unknown))}")
    return Wanted(
        flows=Filter(
            client=_network(filters, "client"),
            backend=_network(filters, "backend"),
            port=_port(filters),
            proto=_proto(filters),
        ),
        verdicts=_words(filters, "verdicts", Verdict),
        causes=_words(filters, "causes", Cause),
        services=frozenset(map(_service, _texts(filters, "services"))),
        are_stray_accepts=filters.get("stray_accepts") is True,
    )


def end_line() -> bytes:
    """Return the line by which a client ends the stream."""
    return to_line({"kind": "end", "version": VERSION})


def parse_end(line: bytes) -> None:
    """
    Parse what a client sends after its request.

    Raises:
        StreamError: If it is anything but an end line.
    """
    kind = None
    with suppress(StreamError):
        kind = parse_object(line).get("kind")
    if kind != "end":
        raise StreamError("after its request a client may send only an end line")


def hello_line(version: str, nodes: Sequence[str]) -> bytes:
    """Return the agent's first line: from now on it sends everything that is wanted."""
    return to_line({"kind": "hello", "version": VERSION, "agent": version, "nodes": list(nodes)})


def error_line(message: str, status: int | None = None) -> bytes:
    """Return the agent's last line to a client that it refuses, with an HTTP status if any."""
    error = {"kind": "error", "version": VERSION, "message": message}
    return to_line(error if status is None else error | {"status": status})


def parse_object(line: bytes) -> Mapping[str, Any]:
    """
    Parse a line.

    Raises:
        StreamError: If it is not a JSON object.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise StreamError("a line is not JSON") from None
    if not isinstance(value, dict):
        raise StreamError("a line is not a JSON object")
    return value


def to_line(value: Mapping[str, Any]) -> bytes:
    """Return an object as a line."""
    return json.dumps(value).encode() + b"\n"


_KEYS = {
    "client", "backend", "port", "proto", "verdicts", "causes", "services", "stray_accepts",
}  # fmt: skip


def _network(filters: Mapping[str, Any], key: str) -> IPNetwork | None:
    value = filters.get(key)
    if value is None:
        return None
    try:
        # ip_network() would also accept a number.
        return ip_network(value if isinstance(value, str) else "")
    except ValueError:
        raise StreamError(f"{key} {_shown(value)} is neither an address nor a prefix") from None


def _port(filters: Mapping[str, Any]) -> int | None:
    value = filters.get("port")
    if value is None:
        return None
    if type(value) is not int or not 0 < value < 1 << 16:
        raise StreamError(f"port {_shown(value)} is not a number from 1 to 65535")
    return value


def _proto(filters: Mapping[str, Any]) -> int | None:
    value = filters.get("proto")
    if value is None:
        return None
    if not isinstance(value, str) or value not in PROTOCOLS:
        raise StreamError(f"proto {_shown(value)} is not one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[value]


def _words(filters: Mapping[str, Any], key: str, words: type[_Word]) -> frozenset[_Word]:
    found = set()
    for text in _texts(filters, key):
        try:
            found.add(words(text))
        except ValueError:
            raise StreamError(f"{key}: this agent does not know {_shown(text)}") from None
    return frozenset(found)


def _texts(filters: Mapping[str, Any], key: str) -> list[str]:
    value = filters.get(key, [])
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise StreamError(f"{key} is not a list of strings")
    if len(value) > _MAX_VALUES:
        raise StreamError(f"{key} has {len(value)} values; at most {_MAX_VALUES} are allowed")
    return value


def _service(text: str) -> tuple[str, str]:
    namespace, slash, name = text.partition("/")
    if not (namespace and slash and name):
        raise StreamError(f"services: {_shown(text)} is not NAMESPACE/NAME")
    return namespace, name


def _shown(value: object) -> str:
    text = ascii(value) if isinstance(value, str | int | float | None) else type(value).__name__
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
