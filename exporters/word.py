"""What proxies declare about their clients, as JSON and as text for the table."""

from typing import Any

from tracer.judge.proxy_word import ProxyWord
from tracer.proxy_headers import DeclaredClient, ProxyHeader


def word_object(word: ProxyWord) -> dict[str, Any]:
    """Return as an object what a connection's first bytes declare about its client."""
    found: dict[str, Any] = {
        "peer": str(word.peer),
        "trusted": word.is_trusted,
        "declared": [_declared(client) for client in word.clients],
    }
    if word.declared is not None:
        found["opening"] = word.declared.opening.name.lower()
    if word.client is not None:
        found["client"] = {**_declared(word.client), "by": str(word.by)}
    if word.is_ambiguous:
        found["contradictory"] = True
    if word.missing:
        found["missing"] = [_header(header) for header in word.missing]
    return found


def word_texts(word: ProxyWord) -> list[str]:
    """Return what the table shows about proxy headers beside a cause."""
    texts = []
    headers = " and ".join(header.label for header in word.headers)
    if word.is_ambiguous:
        texts.append(f"({headers} contradict each other)")
    elif word.is_proxied:
        texts.append(f"({headers})")
    elif word.clients and not word.is_trusted:
        named = ", ".join(map(str, word.clients))
        texts.append(f"({headers} {named}: declared, not trusted (forged?))")
    if word.missing:
        texts.append(f"(no {' and '.join(each.label for each in word.missing)}, unlike others)")
    return texts


def _declared(client: DeclaredClient) -> dict[str, Any]:
    found: dict[str, Any] = {"header": _header(client.header), "form": client.form.name.lower()}
    if client.address is not None:
        found["address"] = str(client.address)
    if client.token is not None:
        found["token"] = client.token
    if client.port is not None:
        found["port"] = client.port
    return found


def _header(header: ProxyHeader) -> str:
    return header.name.lower().replace("_", "-")
