"""List and watch one resource of the Kubernetes API."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import httpx2 as httpx

from tracer.cluster.errors import ClusterError
from tracer.cluster.refusal import ExpiredError, FinalError, check, translated
from tracer.cluster.resource import Resource

# The largest watch event to accept; an object is at most 1.5 MiB in etcd.
_MAX_EVENT = 8 << 20
# Objects per page, to bound memory: EndpointSlices have up to 40 KiB, Nodes with images more.
_PAGE = "100"
# How long a whole page may take, as a multiple of the limit for one read.
_PAGE_PATIENCE = 4
_HANDSHAKE_S = 2.0

Json = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """
    The time limits of a watch, in seconds.

    The server is asked to end a watch after ``watch_s``, and sends a bookmark about every minute; a
    connection that is silent for ``silence_s`` is closed.
    """

    watch_s: float = 300
    silence_s: float = 120
    answer_s: float = 30
    backoff_s: float = 0.2
    max_backoff_s: float = 30


class Sink(Protocol):
    """Receives what the feed learns. Calls come from the event loop, one at a time."""

    def listed(
        self, resource: Resource, items: list[Json], *, is_first: bool, is_last: bool
    ) -> None:
        """Take a page of a list; after the last page, objects not in the list are gone."""

    def changed(self, resource: Resource, item: Json, *, is_gone: bool) -> None:
        """Take one object that was added, changed or removed."""

    def heard(self, resource: Resource) -> None:
        """Note that the server confirmed the state, with or without a change."""

    def failed(self, resource: Resource, error: ClusterError, *, is_final: bool) -> None:
        """Note a failure; a final one lasts until somebody acts, but is retried all the same."""


async def follow(client: httpx.AsyncClient, resource: Resource, sink: Sink, timing: Timing) -> None:
    """Keep a sink up to date with a resource until cancelled."""
    feed = _Feed(client, resource, sink, timing)
    failures = 0
    while True:
        began = time.monotonic()
        try:
            with translated(f"watch {resource.plural} at {client.base_url}"):
                await feed.run_once()
            failures += 1
        except ExpiredError:
            feed.version = None
            failures += 1
        except ClusterError as error:
            sink.failed(resource, error, is_final=isinstance(error, FinalError))
            feed.is_doubted = True
            failures += 1
        # Only a watch that worked for a while resets the backoff: one that ends at once must not be
        # retried in a tight loop.
        if feed.has_events or time.monotonic() - began > timing.max_backoff_s:
            failures = 1
        await asyncio.sleep(_delay(failures, timing))


def _delay(failures: int, timing: Timing) -> float:
    # Half fixed, half random, so that the agents of all nodes do not retry at the same time.
    longest = min(timing.max_backoff_s, timing.backoff_s * (1 << min(failures - 1, 16)))
    return longest * random.uniform(0.5, 1)  # noqa: S311 - not a secret


class _Feed:
    def __init__(
        self, client: httpx.AsyncClient, resource: Resource, sink: Sink, timing: Timing
    ) -> None:
        self.version: str | None = None
        self.has_events = False
        # Set after a failure or a broken watch: the server that answers next may have another
        # history, such as a restored etcd.
        self.is_doubted = False
        self._client = client
        self._resource = resource
        self._sink = sink
        self._timing = timing

    async def run_once(self) -> None:
        """List if needed, then watch until the server ends it."""
        self.has_events = False
        if self.version is not None and self.is_doubted and not await self._is_ahead():
            self.version = None
        if self.version is None:
            self.version = await self._list()
        self.is_doubted = False
        await self._watch()

    async def _is_ahead(self) -> bool:
        """
        Whether the server's resourceVersion has reached ours.

        After etcd was restored from a backup it has not: the server would accept our watch, and
        send nothing until it has.
        """
        # Without the field selector: to find one node's Pods, etcd would read those of all nodes.
        async with self._opened({"limit": "1"}, httpx.Timeout(self._timing.answer_s)) as response:
            body = await response.aread()
        check(response.status_code, body, "list", self._resource)
        metadata = _json(body, self._resource).get("metadata")
        now = _text(metadata.get("resourceVersion")) if isinstance(metadata, dict) else None
        return not _is_before(now, self.version)

    async def _list(self) -> str | None:
        token: str | None = None
        is_first = True
        while True:
            body = await self._page(token)
            metadata, items = body.get("metadata"), body.get("items")
            if not isinstance(metadata, dict) or not isinstance(items, list | None):
                raise ClusterError(f"list {self._resource.plural}: the answer is not a list")
            token = _text(metadata.get("continue"))
            objects = [self._typed(item) for item in items or () if isinstance(item, dict)]
            self._sink.listed(self._resource, objects, is_first=is_first, is_last=token is None)
            is_first = False
            if token is None:
                return _text(metadata.get("resourceVersion"))

    async def _page(self, token: str | None) -> Json:
        params = self._params(limit=_PAGE, **({"continue": token} if token else {}))
        if token is None and self._resource.field_selector is not None:
            # From the server's cache, which indexes Pods by node, as kubelets do; etcd would read
            # those of all nodes. What the cache lacks comes with the watch.
            params["resourceVersion"] = "0"
        timeout = httpx.Timeout(self._timing.answer_s)
        # The client's limit is per read: a page that trickles in would never exceed it.
        async with asyncio.timeout(self._timing.answer_s * _PAGE_PATIENCE):
            async with self._opened(params, timeout) as response:
                body = await response.aread()
        check(response.status_code, body, "list", self._resource)
        return _json(body, self._resource)

    async def _watch(self) -> None:
        params = self._params(
            watch="true",
            allowWatchBookmarks="true",
            resourceVersion=self.version or "",
            # Randomized, so that the watches of many nodes do not end together.
            timeoutSeconds=str(int(self._timing.watch_s * random.uniform(0.75, 1))),  # noqa: S311
        )
        timeout = httpx.Timeout(self._timing.answer_s, read=self._timing.silence_s)
        # A server that ignores timeoutSeconds must not hold the watch for ever.
        async with asyncio.timeout(self._timing.watch_s + self._timing.silence_s):
            async with self._opened(params, timeout) as response:
                if response.status_code != 200:
                    check(response.status_code, await response.aread(), "watch", self._resource)
                self._sink.heard(self._resource)
                # A connection that breaks, for example at a load balancer, is not a failure: the
                # watch is resumed. If the server is gone, connecting again reports that.
                try:
                    async for line in _lines(response, self._resource):
                        self._event(line)
                except (httpx.NetworkError, httpx.RemoteProtocolError):
                    self.is_doubted = True

    @asynccontextmanager
    async def _opened(
        self, params: dict[str, str], timeout: httpx.Timeout
    ) -> AsyncIterator[httpx.Response]:
        request = self._client.build_request(
            "GET", self._resource.path, params=params, timeout=timeout
        )
        sending = asyncio.ensure_future(self._client.send(request, stream=True))
        try:
            response = await asyncio.shield(sending)
        except asyncio.CancelledError:
            await _finish(sending)
            raise
        try:
            yield response
        finally:
            await response.aclose()

    def _event(self, line: bytes) -> None:
        event = _json(line, self._resource)
        kind, item = event.get("type"), event.get("object")
        if not isinstance(item, dict):
            raise ClusterError(f"watch {self._resource.plural}: an event holds no object")
        if kind == "ERROR":
            code = item.get("code")
            code = code if isinstance(code, int) and code >= 400 else 500
            check(code, line, "watch", self._resource)
        if kind in ("ADDED", "MODIFIED", "DELETED"):
            self._sink.changed(self._resource, self._typed(item), is_gone=kind == "DELETED")
        self._sink.heard(self._resource)
        self.has_events = True
        metadata = item.get("metadata")
        if isinstance(metadata, dict):
            self.version = _text(metadata.get("resourceVersion")) or self.version

    def _params(self, **params: str) -> dict[str, str]:
        if self._resource.field_selector is not None:
            params["fieldSelector"] = self._resource.field_selector
        return params

    def _typed(self, item: Json) -> Json:
        # Items of a list carry neither kind nor apiVersion.
        item.setdefault("kind", self._resource.kind)
        item.setdefault("apiVersion", self._resource.api_version)
        return item


async def _finish(sending: asyncio.Future[httpx.Response]) -> None:
    # The client leaks the socket if it is cancelled during a TLS handshake.
    await asyncio.wait([sending], timeout=_HANDSHAKE_S)
    if not sending.done():
        sending.cancel()
        await asyncio.wait([sending])
    elif sending.exception() is None:
        await sending.result().aclose()


async def _lines(response: httpx.Response, resource: Resource) -> AsyncIterator[bytes]:
    rest = b""
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > _MAX_EVENT:
            raise ClusterError(
                f"watch {resource.plural}: an event is larger than {_MAX_EVENT >> 20} MiB"
            )
        for line in lines:
            if line:
                yield line


def _json(data: bytes, resource: Resource) -> Json:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ClusterError(f"{resource.plural}: the API server's answer is not a JSON object")
    return value


def _is_before(version: str | None, other: str | None) -> bool:
    # Kubernetes guarantees since 1.35 that resourceVersions are numbers; they were before, too.
    if version is None or other is None or not (version.isdecimal() and other.isdecimal()):
        return False
    return (len(version), version) < (len(other), other)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
