"""Evidence and advice about proxies' headers, as lines for people."""

from collections.abc import Iterator

from tracer.judge.proxy_word import ProxyWord
from tracer.model import ClientForm, Connection, DeclaredClient, Opening, ProxyHeader

_FORMS = {
    ClientForm.UNKNOWN: "an unknown client",
    ClientForm.LOCAL: "itself (LOCAL, as for a health check)",
    ClientForm.INVALID: "something that is no address",
}


def evidence(word: ProxyWord, connection: Connection) -> tuple[str, ...]:
    """Return what first bytes say and what it is worth, a line each."""
    return (*_declared(word), *_weighed(word), *_missing(word, connection))


def advice(word: ProxyWord, connection: Connection) -> tuple[str, ...]:
    """Return what to do about a proxy's header, or about one that is missing, a line each."""
    return tuple(_advice(word, connection))


def client_text(client: DeclaredClient) -> str:
    """Return whom a header names in words."""
    if client.form in _FORMS:
        return _FORMS[client.form]
    return f"{client}" + (f" port {client.port}" if client.port else "")


def _declared(word: ProxyWord) -> Iterator[str]:
    if word.declared is None:
        yield "no first bytes were read: none came in time, or the connection was not seen at tc"
        return
    for header in word.headers:
        chain = [each for each in word.clients if each.header is header]
        yield f"{header.label} of {word.peer} names {', '.join(map(client_text, chain))}"
    if word.declared.has_more:
        yield "more clients were named before these"
    if not word.clients:
        yield _NOTHING[word.declared.opening]
    elif word.declared.opening is Opening.CUT:
        yield "its first bytes ended, or were too many, before all headers were read"


_NOTHING = {
    Opening.HTTP: "it begins with an HTTP request, without a proxy's header",
    Opening.OTHER: "it begins with neither a PROXY header nor a readable HTTP request",
    Opening.CUT: "its first bytes ended, or were too many, before a header could be read",
    Opening.MALFORMED: "it begins as a PROXY header and breaks that header's format",
}


def _weighed(word: ProxyWord) -> Iterator[str]:
    if not word.clients:
        return
    if not word.is_trusted:
        yield f"declared, not trusted (forged?): {word.peer} is not in --trusted-proxy"
    elif word.is_ambiguous:
        yield (
            "X-Forwarded-For and Forwarded contradict each other, and a proxy that writes one "
            "hands on the other whoever wrote it: which client counts is not known"
        )
    elif word.client is not None:
        whose = "" if word.by == word.peer else f", by the word of {word.by}"
        yield f"{word.peer} is a trusted proxy: it speaks for {client_text(word.client)}{whose}"


def _missing(word: ProxyWord, connection: Connection) -> Iterator[str]:
    if word.missing:
        reply = connection.reply
        whose = (
            "it is of the proxy itself, or of somebody else in --trusted-proxy"
            if word.is_trusted
            else "it bypasses the proxy"
        )
        yield (
            f"other connections to {reply.src} port {reply.sport} carry {_names(word.missing)} "
            f"of a trusted proxy, this one does not: {whose}, and the backend may refuse it"
        )


def _names(headers: tuple[ProxyHeader, ...]) -> str:
    return " and ".join(header.label for header in headers)


def _advice(word: ProxyWord, connection: Connection) -> Iterator[str]:
    if word.is_proxied:
        names = _names(word.headers)
        yield f"the client's address is in {names}: let the backend read it from there"
        yield (
            f"the backend must believe it from {connection.seen_source} alone: from anybody else "
            "it may be forged"
        )
        if connection.is_snat:
            yield (
                f"that is not the proxy's address {connection.orig.src}, which was replaced, too: "
                "externalTrafficPolicy: Local keeps it apart from others'"
            )
    elif word.clients and not word.is_trusted:
        yield f"if {word.peer} is a proxy of yours: --trusted-proxy {word.peer}"
    if word.missing:
        yield (
            "let it connect through the proxy, or give the backend another port that expects no "
            f"{_names(word.missing)}"
        )
