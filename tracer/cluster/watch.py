"""
The live cluster: one background thread lists and watches, and publishes snapshots.

Readers get the current snapshot by one attribute access and never block. While the API server is
unreachable they keep the last one, and `WatchStatus` says how old it is and why.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

import httpx2 as httpx

from tracer.cluster.access import connect, find_config
from tracer.cluster.errors import ClusterError
from tracer.cluster.feed import Timing, follow
from tracer.cluster.history import History
from tracer.cluster.index import Cluster
from tracer.cluster.resource import resources
from tracer.cluster.store import Store, WatchStatus

_LOG = logging.getLogger(__name__)
_CLOSE_S = 10

# After how long a start tells the user that it is waiting.
_MOMENT_S = 1.0


class Watch:
    """A cluster that is kept up to date. Start it once, then close it."""

    def __init__(
        self,
        *,
        kubeconfig: Path | None = None,
        context: str | None = None,
        node: str | None = None,
        timing: Timing | None = None,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        prepare_thread: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Read the configuration; nothing is connected before `start`.

        Args:
            kubeconfig: File to read; None to look where kubectl and pods do.
            context: Context in it; None for its current one.
            node: The node whose Pods to watch; None for no Pods.
            timing: Time limits; the defaults suit a real cluster.
            clock_ns: The clock of snapshots, history and status; use that of the records.
            prepare_thread: Called first in the watch's thread.

        Raises:
            ClusterError: The configuration cannot be used.
        """
        self._config = find_config(kubeconfig, context)
        self._timing = timing or Timing()
        self._resources = resources(node)
        self._store = Store(self._resources, clock_ns)
        self._prepare_thread = prepare_thread
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread: threading.Thread | None = None

    @property
    def cluster(self) -> Cluster:
        """The current snapshot."""
        return self._store.history.now

    @property
    def history(self) -> History:
        """The current snapshot and those of the last minute."""
        return self._store.history

    @property
    def status(self) -> WatchStatus:
        """How current the snapshot is."""
        return self._store.status()

    def start(self, wait_s: float = 30, on_slow: Callable[[str], None] = lambda _why: None) -> None:
        """
        Start, and wait until everything was listed once.

        Args:
            wait_s: How long to wait. 0 for not at all: the watch keeps trying, whatever fails.
            on_slow: Called with the last error or the server's URL, if it takes more than a moment.

        Raises:
            ClusterError: The server refuses the request, or did not list everything in time; or the
                configuration's certificates cannot be used.
        """
        try:
            client = connect(self._config)
        except ClusterError:
            self.close()
            raise
        self._thread = threading.Thread(
            target=self._run, args=(client,), name="cluster-watch", daemon=True
        )
        self._thread.start()
        if wait_s <= 0:
            return
        server = self._config.cluster.server
        if not self._wait_for_all(min(wait_s, _MOMENT_S)) and wait_s > _MOMENT_S:
            on_slow(self.status.error or server)
            self._wait_for_all(wait_s - _MOMENT_S)
        status = self.status
        if not status.is_synced:
            self.close()
            raise ClusterError(
                status.error or f"{server} did not list all objects within {wait_s:g} s"
            )

    def _wait_for_all(self, timeout_s: float) -> bool:
        return self.wait_for(lambda: self.status.is_synced or self.status.is_refused, timeout_s)

    def wait_for(self, is_met: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until a condition on this watch holds; return whether it does."""
        return self._store.wait_for(is_met, timeout_s)

    def close(self) -> None:
        """Stop the watch; its last snapshot stays readable."""
        if self._thread is None:
            self._loop.close()
            return
        # RuntimeError: the thread has ended already, and the loop is closed.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_CLOSE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, client: httpx.AsyncClient) -> None:
        try:
            self._prepare_thread()
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._main(client))
        except Exception as error:
            _LOG.exception("the cluster watch ended")
            self._store.failed(
                None, ClusterError(f"the cluster watch ended: {error!r}"), is_final=True
            )

    async def _main(self, client: httpx.AsyncClient) -> None:
        async with client, asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(follow(client, resource, self._store, self._timing))
                for resource in self._resources
            ]
            await self._stop.wait()
            for task in tasks:
                task.cancel()
