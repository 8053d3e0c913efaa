"""
What an agent and its clients say to each other: one JSON object a line, as docs/stream.md has it.

A client sends a request. The agent answers with a hello and then with the lines of docs/json.md,
the last of which is the summary; or with an error alone. A client that has heard enough says so, or
closes its half where that can be done. Whatever comes in is checked: it may come from anyone who
may open the socket.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from ipaddress import ip_network
from typing import Any, TypeVar

from tracer.judge.cause import Cause
from tracer.judge.verdict import Verdict
from tracer.model import PROTOCOLS, Filter, IPNetwork, protocol_name
from tracer.pipeline import Wanted
from tracer.stream.errors import StreamError

VERSION = 1
DEFAULT_SOCKET = "/run/srcip/agent.sock"
# Where the stream is on the agent's port, and what a connection there is asked to become.
URL_PATH, UPGRADE = "/stream", "srcip-stream/1"
# A request names a handful of filters, a line from the agent one connection with its evidence.
MAX_REQUEST, MAX_LINE = 16 << 10, 1 << 20
_MAX_VALUES = 256
_SHOWN = 60

_Word = TypeVar("_Word", bound=StrEnum)


def request_line(wanted: Wanted) -> bytes:
    """Return the request for what is wanted."""
    flows = wanted.flows
    told: dict[str, Any] = {
        "client": str(flows.client) if flows.client else None,
        "backend": str(flows.backend) if flows.backend else None,
        "port": flows.port,
        "proto": protocol_name(flows.proto) if flows.proto else None,
        "verdicts": sorted(wanted.verdicts),
        "causes": sorted(wanted.causes),
        "services": sorted(map("/".join, wanted.services)),
        "stray_accepts": wanted.are_stray_accepts,
    }
    known = {key: value for key, value in told.items() if value not in (None, [])}
    return to_line({"kind": "request", "version": VERSION, "filter": known})


def parse_request(line: bytes) -> Wanted:
    """
    Read a request.

    Raises:
        StreamError: If it is none, or asks for what this agent does not know.
    """
    request = parse_object(line)
    if request.get("kind") != "request":
        raise StreamError(f"expected a request, not kind {_shown(request.get('kind'))}")
    if request.get("version") != VERSION:
        raise StreamError(
            f"this agent speaks version {VERSION} of the stream, not"
            f" {_shown(request.get('version'))}"
        )
    told = request.get("filter", {})
    if not isinstance(told, dict):
        raise StreamError("filter is no object")
    unknown = told.keys() - _KEYS
    if unknown:
        # Better no answer than one that leaves a filter out.
        raise StreamError(f"this agent has no filter {_shown(min(unknown))}")
    return Wanted(
        flows=Filter(
            client=_network(told, "client"),
            backend=_network(told, "backend"),
            port=_port(told),
            proto=_proto(told),
        ),
        verdicts=_words(told, "verdicts", Verdict),
        causes=_words(told, "causes", Cause),
        services=frozenset(map(_service, _texts(told, "services"))),
        are_stray_accepts=told.get("stray_accepts") is True,
    )


def end_line() -> bytes:
    """Return what a client says that has heard enough."""
    return to_line({"kind": "end", "version": VERSION})


def parse_end(line: bytes) -> None:
    """
    Read what a client says after its request.

    Raises:
        StreamError: If it is anything but that it has heard enough.
    """
    told = None
    with suppress(StreamError):
        told = parse_object(line).get("kind")
    if told != "end":
        raise StreamError("a client asks once, and says no more than that it has heard enough")


def hello_line(version: str, nodes: Sequence[str]) -> bytes:
    """Return the agent's first line: all that is wanted comes from now on."""
    return to_line({"kind": "hello", "version": VERSION, "agent": version, "nodes": list(nodes)})


def error_line(message: str) -> bytes:
    """Return the agent's only line to whom it has nothing else to say."""
    return to_line({"kind": "error", "version": VERSION, "message": message})


def parse_object(line: bytes) -> Mapping[str, Any]:
    """
    Read a line.

    Raises:
        StreamError: If it is no JSON object.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise StreamError("a line is not JSON") from None
    if not isinstance(value, dict):
        raise StreamError("a line is no JSON object")
    return value


def to_line(value: Mapping[str, Any]) -> bytes:
    """Return an object as a line."""
    return json.dumps(value).encode() + b"\n"


_KEYS = {
    "client", "backend", "port", "proto", "verdicts", "causes", "services", "stray_accepts",
}  # fmt: skip


def _network(told: Mapping[str, Any], key: str) -> IPNetwork | None:
    value = told.get(key)
    if value is None:
        return None
    try:
        # A number would be taken for an address, too.
        return ip_network(value if isinstance(value, str) else "")
    except ValueError:
        raise StreamError(f"{key} {_shown(value)} is no address or prefix") from None


def _port(told: Mapping[str, Any]) -> int | None:
    value = told.get("port")
    if value is None:
        return None
    if type(value) is not int or not 0 < value < 1 << 16:
        raise StreamError(f"port {_shown(value)} is none")
    return value


def _proto(told: Mapping[str, Any]) -> int | None:
    value = told.get("proto")
    if value is None:
        return None
    if not isinstance(value, str) or value not in PROTOCOLS:
        raise StreamError(f"proto {_shown(value)} is not one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[value]


def _words(told: Mapping[str, Any], key: str, words: type[_Word]) -> frozenset[_Word]:
    found = set()
    for text in _texts(told, key):
        try:
            found.add(words(text))
        except ValueError:
            raise StreamError(f"{key}: this agent has no {_shown(text)}") from None
    return frozenset(found)


def _texts(told: Mapping[str, Any], key: str) -> list[str]:
    value = told.get(key, [])
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise StreamError(f"{key} is no list of texts")
    if len(value) > _MAX_VALUES:
        raise StreamError(f"{key} holds {len(value)} values; {_MAX_VALUES} at the most")
    return value


def _service(text: str) -> tuple[str, str]:
    namespace, slash, name = text.partition("/")
    if not (namespace and slash and name):
        raise StreamError(f"services: {_shown(text)} is no NAMESPACE/NAME")
    return namespace, name


def _shown(value: object) -> str:
    text = ascii(value) if isinstance(value, str | int | float | None) else type(value).__name__
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
