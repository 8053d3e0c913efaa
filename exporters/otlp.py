"""
Paths as traces for an OpenTelemetry receiver: a connection is a trace, each node's part a span.

The only module that imports OpenTelemetry, which is an extra: ``srcip[otlp]``.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from importlib import import_module, metadata
from urllib.parse import urlsplit

from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    set_span_in_context,
)

from exporters.otlp_ids import link_ids, parent_id, span_id, trace_id
from exporters.otlp_spans import NodeSpan, node_span
from tracer.errors import TracerError
from tracer.judge.path import Path

_log = logging.getLogger(__name__)

# The exporter itself retries for OTEL_EXPORTER_OTLP_TIMEOUT (10 s). So a batch is given up after
# about half a minute, or sooner if the receiver rejects it.
_ATTEMPTS = 5
_PAUSE_S = 1.0
# How long the end of a run waits for unsent paths.
_CLOSE_S = 5.0
# The providers to keep, one for each node.
_NODES = 64
_NOBODY = SpanContext(0, 0, is_remote=True)


class OtlpSink:
    """
    Sends paths to an OTLP receiver, from a thread of its own.

    ``write`` never blocks: what does not fit into the queue is counted as lost. Limits, headers,
    certificates and the like come from OpenTelemetry's environment variables (``OTEL_*``).
    """

    def __init__(self, exporter: SpanExporter, *, close_s: float = _CLOSE_S) -> None:
        """
        Args:
            exporter: Sends spans, and retries for a while by itself.
            close_s: How long `close` waits for unsent paths.
        """
        self._exporter = exporter
        self._close_s = close_s
        self._limit = _environment("OTEL_BSP_MAX_QUEUE_SIZE", 2048)
        self._most = min(_environment("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512), self._limit)
        self._delay_s = _environment("OTEL_BSP_SCHEDULE_DELAY", 5000) / 1000
        self._spans = _Spans()
        self._queue: deque[Path] = deque()
        self._wake = threading.Condition()
        self._is_closing = False
        self._has_complained = False
        self._queue_full = 0
        self._failed = 0
        self.sent = 0
        self._thread = threading.Thread(target=self._work, name="otlp", daemon=True)

    def start(self) -> None:
        """Start sending. Drop privileges first: a thread keeps those it starts with."""
        self._thread.start()

    def write(self, path: Path) -> None:
        """Queue a path, or count it as lost if the queue is full."""
        with self._wake:
            if len(self._queue) >= self._limit:
                self._queue_full += 1
                return
            self._queue.append(path)
            if len(self._queue) >= self._most:
                self._wake.notify()

    def close(self) -> Mapping[str, int]:
        """Send what is queued, within the time limit, and return what was lost, by place."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(self._close_s)
        # Interrupts a pause between attempts; what the thread still holds is lost.
        self._exporter.shutdown()
        if self._thread.is_alive():
            self._thread.join(_PAUSE_S)
        with self._wake:
            self._failed += len(self._queue)
            self._queue.clear()
            return {"otlp_queue_full": self._queue_full, "otlp_failed": self._failed}

    def _work(self) -> None:
        while batch := self._next():
            # Counted as lost until it has arrived: `close` may not wait for that.
            with self._wake:
                self._failed += len(batch)
            if self._has_sent(self._spans.of(batch)):
                with self._wake:
                    self._failed -= len(batch)
                    self.sent += len(batch)

    def _next(self) -> list[Path]:
        """Wait until a batch is full, or due; return none at the end."""
        with self._wake:
            due_s = time.monotonic() + self._delay_s
            while not self._is_closing and len(self._queue) < self._most:
                left_s = due_s - time.monotonic()
                if left_s <= 0 and self._queue:
                    break
                self._wake.wait(left_s if left_s > 0 else self._delay_s)
            return [self._queue.popleft() for _ in range(min(self._most, len(self._queue)))]

    def _has_sent(self, spans: list[ReadableSpan]) -> bool:
        for _ in range(_ATTEMPTS):
            if not spans or self._has_exported(spans):
                return True
            if not self._has_complained:
                self._has_complained = True
                _log.warning("the OTLP receiver took no spans; losses are counted (-v shows why)")
            with self._wake:
                if not self._is_closing:
                    self._wake.wait_for(lambda: self._is_closing, _PAUSE_S)
                if self._is_closing:
                    return False
        return False

    def _has_exported(self, spans: list[ReadableSpan]) -> bool:
        try:
            return self._exporter.export(spans) is SpanExportResult.SUCCESS
        except Exception:
            # The thread must go on: the summary says what was lost.
            _log.exception("the OTLP exporter failed")
            return False


class _Ids(IdGenerator):
    """Gives the next span its computed ids."""

    trace = span = 0

    def generate_trace_id(self) -> int:
        return self.trace

    def generate_span_id(self) -> int:
        return self.span


class _Collector(SpanProcessor):
    """Keeps the spans that ended; a sampler may have left some out."""

    def __init__(self) -> None:
        self.ended: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self.ended.append(span)


class _Spans:
    """Makes the SDK's spans of paths."""

    def __init__(self) -> None:
        self._ids = _Ids()
        self._collector = _Collector()
        self._providers: dict[str, TracerProvider] = {}
        self._version = metadata.version("srcip")
        # A name from the environment takes precedence over ours.
        is_named = OTELResourceDetector().detect().attributes.get("service.name")
        self._service = {} if is_named else {"service.name": "srcip"}

    def of(self, paths: list[Path]) -> list[ReadableSpan]:
        """Return the spans of some paths: one for each node of each."""
        self._collector.ended = []
        for path in paths:
            for index, leg in enumerate(path.legs):
                self._make(path, index, node_span(path, leg))
        return self._collector.ended

    def _make(self, path: Path, index: int, wanted: NodeSpan) -> None:
        self._ids.trace, self._ids.span = trace_id(path), span_id(path.legs[index])
        parent = parent_id(path, index)
        context = set_span_in_context(
            NonRecordingSpan(_context(self._ids.trace, parent) if parent else _NOBODY)
        )
        link = link_ids(path) if index == 0 else None
        span = self._tracer(wanted.node).start_span(
            wanted.name,
            context=context,
            attributes=wanted.attributes,
            links=[Link(_context(*link))] if link else [],
            start_time=wanted.start_ns,
        )
        for event in wanted.events:
            span.add_event(event.name, event.attributes, event.time_ns)
        if wanted.error is not None:
            span.set_status(Status(StatusCode.ERROR, wanted.error))
        span.end(wanted.end_ns)

    def _tracer(self, node: str) -> Tracer:
        if node not in self._providers:
            if len(self._providers) >= _NODES:
                self._providers.clear()
            named = {"service.version": self._version, "k8s.node.name": node}
            provider = TracerProvider(
                resource=Resource.create(self._service | named),
                id_generator=self._ids,
                shutdown_on_exit=False,
            )
            provider.add_span_processor(self._collector)
            self._providers[node] = provider
        return self._providers[node].get_tracer("srcip", self._version)


def _context(trace: int, span: int) -> SpanContext:
    return SpanContext(trace, span, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))


def span_exporter(target: str) -> SpanExporter:
    """
    Return an exporter that sends spans to a receiver.

    Args:
        target: A URL; empty to use the environment (``OTEL_EXPORTER_OTLP_ENDPOINT``). For OTLP
            over HTTP the path is added if there is none.

    Raises:
        TracerError: If the URL is invalid, or the protocol's package is not installed.
    """
    # Losses are reported in the summary; OpenTelemetry's own log lines are shown with -v.
    quiet = logging.INFO if logging.getLogger().isEnabledFor(logging.INFO) else logging.CRITICAL
    logging.getLogger("opentelemetry").setLevel(quiet)
    protocol = _protocol()
    if protocol == "http/protobuf":
        _check_environment()
    options = {"endpoint": _endpoint("--otlp", target, protocol)} if target else {}
    package = "http" if protocol == "http/protobuf" else "grpc"
    try:
        module = import_module(f"opentelemetry.exporter.otlp.proto.{package}.trace_exporter")
        exporter: SpanExporter = module.OTLPSpanExporter(**options)
    except ImportError as error:
        extra = "otlp" if package == "http" else "otlp-grpc"
        raise TracerError(
            f"OTLP over {package} needs a package that is not installed ({error.name}): "
            f"pip install 'srcip[{extra}]'"
        ) from error
    except Exception as error:
        # Nothing was sent yet: a variable is wrong, for which each package has its own errors.
        raise TracerError(f"cannot send to an OTLP receiver: {error}") from error
    return exporter


def _protocol() -> str:
    name = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
    default = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    protocol = os.environ.get(name) or default
    if protocol not in ("grpc", "http/protobuf"):
        raise TracerError(f"OTLP protocol {protocol!r} is not supported: use http/protobuf or grpc")
    return protocol


def _check_environment() -> None:
    """Refuse an invalid endpoint in the environment; gRPC also takes host and port."""
    for name in ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        if target := os.environ.get(name):
            _endpoint(name, target, "http/protobuf")


def _endpoint(name: str, target: str, protocol: str) -> str:
    try:
        url = urlsplit(target)
        is_url = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        is_url = False
    if not is_url:
        raise TracerError(f"{name} {target}: not a URL such as http://collector:4318")
    if protocol == "grpc" or url.path.strip("/"):
        return target
    return f"{target.rstrip('/')}/v1/traces"


def _environment(name: str, default: int) -> int:
    try:
        value = int(os.environ.get(name) or default)
    except ValueError:
        value = 0
    if value <= 0:
        raise TracerError(f"{name} is {os.environ[name]!r}: it must be a number above 0")
    return value
