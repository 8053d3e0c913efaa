"""Receivers of OTLP on loopback, which decode what arrives with OpenTelemetry's own messages."""

import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

from tests.unit.patience import PATIENCE_S


class Received:
    """The spans that arrived, each with the attributes of its resource."""

    def __init__(self):
        self._spans = []
        self._changed = threading.Condition()

    def take(self, request):
        with self._changed:
            for group in request.resource_spans:
                resource = attributes(group.resource.attributes)
                for scope in group.scope_spans:
                    self._spans += [(resource, span) for span in scope.spans]
            self._changed.notify_all()

    def wait_for(self, count):
        """Return the spans, once so many have arrived."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._spans) >= count, PATIENCE_S)
            return list(self._spans)


def value(any_value):
    kind = any_value.WhichOneof("value")
    if kind == "array_value":
        return [value(each) for each in any_value.array_value.values]
    return getattr(any_value, kind)


def attributes(pairs):
    return {pair.key: value(pair.value) for pair in pairs}


class HttpReceiver:
    """OTLP over HTTP. ``status`` is what it answers; while ``gate`` is closed it does not."""

    def __init__(self, port=0):
        self.received = Received()
        self.status = 200
        self._requests = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                receiver._requests.release()
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.gate.wait(PATIENCE_S)
                assert self.path == "/v1/traces"
                if receiver.status == 200:
                    receiver.received.take(ExportTraceServiceRequest.FromString(body))
                self.send_response(receiver.status)
                self.end_headers()
                self.wfile.write(ExportTraceServiceResponse().SerializeToString())

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def wait_for_request(self):
        assert self._requests.acquire(timeout=PATIENCE_S)

    def close(self):
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class GrpcReceiver:
    """OTLP over gRPC."""

    def __init__(self):
        self.received = Received()
        receiver = self

        class Servicer(TraceServiceServicer):
            def Export(self, request, context):  # noqa: N802 - gRPC's name
                receiver.received.take(request)
                return ExportTraceServiceResponse()

        self._server = grpc.server(ThreadPoolExecutor(2))
        add_TraceServiceServicer_to_server(Servicer(), self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.url = f"http://127.0.0.1:{port}"
        self._server.start()

    def close(self):
        self._server.stop(None).wait()
