"""Evidence and advice about proxy headers, as lines for people."""

from collections.abc import Iterator

from tracer.judge.proxy_word import ProxyWord
from tracer.model import Connection
from tracer.proxy_headers import ClientForm, DeclaredClient, Opening, ProxyHeader

_FORMS = {
    ClientForm.UNKNOWN: "an unknown client",
    ClientForm.LOCAL: "itself (LOCAL, as for a health check)",
    ClientForm.INVALID: "something that is not an address",
}


def evidence(word: ProxyWord, connection: Connection) -> tuple[str, ...]:
    """Return what the first bytes declare and whether it can be trusted, one string per line."""
    return (*_declared(word), *_weighed(word), *_missing(word, connection))


def advice(word: ProxyWord, connection: Connection) -> tuple[str, ...]:
    """Return what to do about a proxy header, or a missing one, one string per line."""
    return tuple(_advice(word, connection))


def client_text(client: DeclaredClient) -> str:
    """Return the client that a header names, in words."""
    if client.form in _FORMS:
        return _FORMS[client.form]
    return f"{client}" + (f" port {client.port}" if client.port else "")


def _declared(word: ProxyWord) -> Iterator[str]:
    if word.declared is None:
        yield (
            "the connection's first bytes were not read: none came in time, or tc did not see the "
            "connection"
        )
        return
    for header in word.headers:
        chain = [each for each in word.clients if each.header is header]
        yield f"{header.label} from {word.peer} names {', '.join(map(client_text, chain))}"
    if word.declared.has_more:
        yield "the header names more clients before these"
    if not word.clients:
        yield _NOTHING[word.declared.opening]
    elif word.declared.opening is Opening.CUT:
        yield "the first bytes ended, or exceeded the limit, before all headers were read"


_NOTHING = {
    Opening.HTTP: "the connection begins with an HTTP request that has no proxy header",
    Opening.OTHER: "the connection begins with neither a PROXY header nor a readable HTTP request",
    Opening.CUT: "the first bytes ended, or exceeded the limit, before a header could be read",
    Opening.MALFORMED: "the connection begins with a malformed PROXY header",
}


def _weighed(word: ProxyWord) -> Iterator[str]:
    if not word.clients:
        return
    if not word.is_trusted:
        yield f"declared, not trusted (forged?): {word.peer} is not in --trusted-proxy"
    elif word.is_ambiguous:
        yield (
            "X-Forwarded-For and Forwarded contradict each other, and a proxy that writes one "
            "passes the other on unchecked: the client is not known"
        )
    elif word.client is not None:
        source = "" if word.by == word.peer else f", according to {word.by}"
        yield f"{word.peer} is a trusted proxy: it speaks for {client_text(word.client)}{source}"


def _missing(word: ProxyWord, connection: Connection) -> Iterator[str]:
    if word.missing:
        reply = connection.reply
        origin = (
            "it comes from the proxy itself or from another address in --trusted-proxy"
            if word.is_trusted
            else "it bypasses the proxy"
        )
        yield (
            f"other connections to {reply.src} port {reply.sport} carry {_names(word.missing)} "
            f"from a trusted proxy, this one does not: {origin}, and the backend may refuse it"
        )


def _names(headers: tuple[ProxyHeader, ...]) -> str:
    return " and ".join(header.label for header in headers)


def _advice(word: ProxyWord, connection: Connection) -> Iterator[str]:
    if word.is_proxied:
        names = _names(word.headers)
        yield f"let the backend read the client's address from {names}"
        yield (
            f"the backend must trust {names} only from {connection.seen_source}: from any other "
            "peer it may be forged"
        )
        if connection.is_snat:
            yield (
                f"the proxy's own address {connection.orig.src} was replaced, too: with "
                "externalTrafficPolicy: Local the backend can tell the proxy from other peers"
            )
    elif word.clients and not word.is_trusted:
        yield f"if {word.peer} is one of your proxies, add --trusted-proxy {word.peer}"
    if word.missing:
        yield (
            "connect through the proxy, or give the backend another port that does not expect "
            f"{_names(word.missing)}"
        )
