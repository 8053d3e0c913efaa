"""
The head of an HTTP/1 request: only the fields in which proxies name their clients.

``X-Forwarded-For`` has no standard; ``Forwarded`` is RFC 7239.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tracer.declared.identifier import identifier
from tracer.proxy_headers import ClientForm, DeclaredClient, ProxyHeader

# RFC 9110 allows any token as method; those in use have only capitals and hyphens.
_REQUEST_LINE = re.compile(rb"[A-Z][A-Z-]{0,23} [^\x00-\x20\x7f]+ HTTP/1\.[0-9]\r?")
# Any beginning of a request line.
_REQUEST_START = re.compile(
    rb"(?:[A-Z][A-Z-]{0,23}(?: [^\x00-\x20\x7f]*(?: [HTP/.0-9]{0,8}\r?)?)?)?"
)
_FIELDS = {
    b"x-forwarded-for": ProxyHeader.X_FORWARDED_FOR,
    b"forwarded": ProxyHeader.FORWARDED,
}
# One parameter of a forwarded-element: its value is a token or a quoted string.
_PARAMETER = re.compile(
    rb"[ \t]*([!#$%&'*+.^_`|~0-9A-Za-z-]+)=(?:\"((?:[^\"\\]|\\.)*)\"|([^\",;= \t]+))[ \t]*",
    re.DOTALL,
)
_BLANK = re.compile(rb"[ \t]*")
# Only the last entries of a field are kept, which the nearest proxies wrote.
KEPT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """
    What a request's head declares, as far as it has come.

    ``clients`` are in the order of the fields, the nearest proxy's statement last. ``is_whole``
    means that the head was read to its end, ``has_more`` that there were more entries than are
    kept.
    """

    clients: tuple[DeclaredClient, ...] = ()
    is_whole: bool = False
    has_more: bool = False


def request(data: bytes) -> Request | None:
    """Parse a request at the beginning of a connection's bytes; None if it is not HTTP/1."""
    line, end, rest = data.partition(b"\n")
    if not end:
        return Request() if _REQUEST_START.fullmatch(line) else None
    if not _REQUEST_LINE.fullmatch(line):
        return None
    lines, is_whole = _fields(rest)
    found: dict[ProxyHeader, list[DeclaredClient]] = {}
    for name, value in lines:
        header = _FIELDS.get(name.lower())
        if header is not None:
            found.setdefault(header, []).extend(_entries(header, value))
    return Request(
        clients=tuple(client for header in _ORDER for client in found.get(header, ())[-KEPT:]),
        is_whole=is_whole,
        has_more=any(len(clients) > KEPT for clients in found.values()),
    )


_ORDER = (ProxyHeader.FORWARDED, ProxyHeader.X_FORWARDED_FOR)


def _fields(rest: bytes) -> tuple[list[tuple[bytes, bytes]], bool]:
    """Return names and values of complete field lines, and whether the head is complete."""
    fields: list[tuple[bytes, list[bytes]]] = []
    is_whole = False
    *lines, _ = rest.split(b"\n")
    for line in lines:
        text = line.removesuffix(b"\r")
        if not text:
            is_whole = True
            break
        if text[:1] in (b" ", b"\t"):
            # An obsolete continuation of the previous field (obs-fold of RFC 9112).
            if fields:
                fields[-1][1].append(text)
            continue
        name, _, value = text.partition(b":")
        fields.append((name, [value]))
    return [(name, b" ".join(values)) for name, values in fields], is_whole


def _entries(header: ProxyHeader, value: bytes) -> Iterator[DeclaredClient]:
    if header is ProxyHeader.FORWARDED:
        yield from _forwarded(value)
        return
    for entry in value.split(b","):
        # RFC 9110 allows empty elements in lists.
        if entry.strip(b" \t"):
            yield identifier(entry, header)


def _forwarded(value: bytes) -> Iterator[DeclaredClient]:
    """Parse the ``for`` of each element, up to the first that cannot be parsed."""
    element = list[DeclaredClient]()
    has_words = False
    at = 0
    while at < len(value):
        found = _PARAMETER.match(value, at)
        if found is not None:
            has_words = True
            if found[1].lower() == b"for":
                element.append(identifier(_unquoted(found), ProxyHeader.FORWARDED))
        else:
            found = _BLANK.match(value, at)
        at = found.end() if found else at
        separator = value[at : at + 1]
        if separator not in (b"", b",", b";"):
            yield _nameless(ClientForm.INVALID)
            return
        if separator == b"," and has_words:
            yield _client_of(element)
            element, has_words = [], False
        at += 1
    if has_words:
        yield _client_of(element)


def _client_of(element: list[DeclaredClient]) -> DeclaredClient:
    """Return the client that an element names. Without ``for`` the client is unknown."""
    if len(element) > 1:
        return _nameless(ClientForm.INVALID)
    return element[0] if element else _nameless(ClientForm.UNKNOWN)


def _nameless(form: ClientForm) -> DeclaredClient:
    return DeclaredClient(header=ProxyHeader.FORWARDED, form=form)


def _unquoted(found: re.Match[bytes]) -> bytes:
    quoted: bytes | None = found[2]
    if quoted is None:
        return found[3]
    return re.sub(rb"\\(.)", rb"\1", quoted, flags=re.DOTALL)
