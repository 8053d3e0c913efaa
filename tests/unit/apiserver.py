"""An API server for tests: HTTPS on loopback, lists, watches, and every way to fail."""

import base64
import json
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import trustme
import yaml

TOKEN = "secret"  # noqa: S105 - it opens nothing
KINDS = {
    "nodes": ("v1", "Node"),
    "services": ("v1", "Service"),
    "endpointslices": ("discovery.k8s.io/v1", "EndpointSlice"),
    "pods": ("v1", "Pod"),
}


def plural_of(obj):
    return f"{obj['kind'].lower()}s"


def key_of(obj):
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


def status(code, message):
    return {"kind": "Status", "apiVersion": "v1", "code": code, "message": message}


class ApiServer:
    """
    Objects with resource versions, and the events since then.

    Faults are switched on by attribute: ``token`` is the one accepted (None asks for a
    client certificate, from `start` on), ``forbidden`` holds
    ``(verb, resource)``, ``is_silent`` answers nothing, ``is_broken`` answers 500, ``is_trickling``
    answers a byte at a time.

    Reviews: ``users`` are user objects by their token, ``allowed`` holds (user name, verb, path).
    """

    def __init__(self):
        self.changed = threading.Condition()
        self.objects = {plural: {} for plural in KINDS}
        self.events = []
        self.version = 1
        self.oldest = 0
        self.token = TOKEN
        self.forbidden = set()
        self.is_silent = self.is_broken = self.is_trickling = self.is_closed = False
        self.users = {}
        self.allowed = set()
        self.generation = 0
        self.page = None
        self.requests = []
        self.authority = trustme.CA()
        # From when to when its certificate is good, as trustme names it.
        self.validity = {}
        self.open_watches = 0
        self._server = None
        self.port = 0

    # What tests do to it

    def put(self, obj):
        with self.changed:
            table = self.objects[plural_of(obj)]
            kind = "MODIFIED" if key_of(obj) in table else "ADDED"
            table[key_of(obj)] = self._stamped(obj)
            self._event(kind, table[key_of(obj)])

    def delete(self, obj):
        with self.changed:
            gone = self.objects[plural_of(obj)].pop(key_of(obj))
            self._event("DELETED", self._stamped(gone))

    def bookmark(self):
        """Send a bookmark with the current version to all watches, as a real server does."""
        with self.changed:
            self.version += 1
            for plural, (api_version, kind) in KINDS.items():
                metadata = {"resourceVersion": str(self.version)}
                item = {"kind": kind, "apiVersion": api_version, "metadata": metadata}
                self.events.append((self.version, plural, "BOOKMARK", item))
            self.changed.notify_all()

    def send_raw(self, plural, event):
        """Send one watch event as it is."""
        with self.changed:
            self.version += 1
            self.events.append((self.version, plural, None, event))
            self.changed.notify_all()

    def forget(self):
        """Forget all events, so that older versions are 410 Gone, and end the watches."""
        with self.changed:
            self.version += 1
            self.events.clear()
            self.oldest = self.version
            self.generation += 1
            self.changed.notify_all()

    def disconnect(self):
        """End all watches without an event."""
        with self.changed:
            self.generation += 1
            self.changed.notify_all()

    def wait_for(self, is_met, timeout_s=60):
        with self.changed:
            assert self.changed.wait_for(is_met, timeout_s)

    def asked(self, verb, plural):
        return [query for v, p, query in self.requests if (v, p) == (verb, plural)]

    # The server

    def start(self, port=0):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert("127.0.0.1", **self.validity).configure_cert(context)
        if self.token is None:
            context.verify_mode = ssl.CERT_REQUIRED
            self.authority.configure_trust(context)
        self.is_closed = False
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.api = self
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def stop(self):
        with self.changed:
            self.is_closed = True
            self.generation += 1
            self.changed.notify_all()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self):
        return f"https://127.0.0.1:{self.port}"

    def kubeconfig(self, path: Path, *, user=None, cluster=None):
        ca = base64.b64encode(self.authority.cert_pem.bytes()).decode()
        about = {"server": self.url, "certificate-authority-data": ca} | (cluster or {})
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": about}],
            "users": [{"name": "u", "user": user or {"token": TOKEN}}],
        }
        path.write_text(yaml.safe_dump(config))
        return path

    def _stamped(self, obj):
        self.version += 1
        return obj | {"metadata": obj["metadata"] | {"resourceVersion": str(self.version)}}

    def _event(self, kind, obj):
        self.events.append((self.version, plural_of(obj), kind, obj))
        self.changed.notify_all()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = True
    api: ApiServer

    def handle_error(self, request, client_address):
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Of a handshake, too, on a busy machine.
    timeout = 60

    def log_message(self, *args):
        pass

    def do_GET(self):
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        plural = url.path.rpartition("/")[2]
        verb = "watch" if query.get("watch") == "true" else "list"
        api = self.server.api
        with api.changed:
            api.requests.append((verb, plural, query))
            api.changed.notify_all()
            if api.is_silent:
                api.changed.wait_for(lambda: api.is_closed or not api.is_silent)
        refusal = self._refusal(verb, plural)
        if refusal is not None:
            self._answer(refusal["code"], refusal)
        elif verb == "list":
            self._list(plural, query)
        else:
            self._watch(plural, query)

    def do_POST(self):
        plural = self.path.rpartition("/")[2]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        api = self.server.api
        with api.changed:
            api.requests.append(("create", plural, body["spec"]))
            api.changed.notify_all()
        refusal = self._refusal("create", plural)
        if refusal is not None:
            self._answer(refusal["code"], refusal)
        else:
            self._answer(201, body | {"status": self._review(plural, body["spec"])})

    def _review(self, plural, spec):
        api = self.server.api
        if plural == "tokenreviews":
            user = api.users.get(spec["token"])
            return {"authenticated": True, "user": user} if user else {"user": {}}
        asked = spec["nonResourceAttributes"]
        return {"allowed": (spec["user"], asked["verb"], asked["path"]) in api.allowed}

    def _refusal(self, verb, plural):
        api = self.server.api
        if api.is_broken:
            return status(500, "etcdserver: no leader")
        wants_token = api.token is not None
        if wants_token and self.headers.get("Authorization") != f"Bearer {api.token}":
            return status(401, "Unauthorized")
        if (verb, plural) in api.forbidden:
            return status(403, f'{plural} is forbidden: User "u" cannot {verb} resource "{plural}"')
        return None

    def _answer(self, code, body):
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.server.api.is_trickling:
            for index in range(len(data)):
                self.wfile.write(data[index : index + 1])
                time.sleep(0.02)
        else:
            self.wfile.write(data)

    def _list(self, plural, query):
        api = self.server.api
        with api.changed:
            items = [obj for obj in api.objects[plural].values() if self._is_wanted(obj, query)]
            version = api.version
        if query.get("continue") == "expired":
            return self._answer(410, status(410, "The provided continue parameter is too old"))
        start = int(query.get("continue", 0))
        limit = min(int(query["limit"]), api.page or 1 << 30)
        metadata = {"resourceVersion": str(version)}
        if start + limit < len(items):
            metadata["continue"] = str(start + limit)
        api_version, kind = KINDS[plural]
        # As the real one: items do not say what they are.
        bare = [
            {key: value for key, value in obj.items() if key not in ("kind", "apiVersion")}
            for obj in items[start : start + limit]
        ]
        body = {"kind": f"{kind}List", "apiVersion": api_version, "metadata": metadata}
        return self._answer(200, body | {"items": bare})

    def _is_wanted(self, obj, query):
        name, _, value = query.get("fieldSelector", "").partition("=")
        return not name or obj["spec"].get("nodeName") == value

    def _watch(self, plural, query):
        api = self.server.api
        since = int(query["resourceVersion"])
        if since < api.oldest:
            return self._answer(410, status(410, "too old resource version"))
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with api.changed:
            generation, begin = api.generation, len(api.events)
            api.open_watches += 1
            api.changed.notify_all()
        try:
            for kind, obj in self._events(plural, query, since, generation, begin):
                event = obj if kind is None else {"type": kind, "object": obj}
                data = json.dumps(event).encode() + b"\n"
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
                self.wfile.flush()
        finally:
            with api.changed:
                api.open_watches -= 1
                api.changed.notify_all()
        return None

    def _events(self, plural, query, since, generation, begin):
        api = self.server.api
        position = 0
        while True:
            with api.changed:
                while api.generation == generation and len(api.events) <= position:
                    api.changed.wait()
                if api.generation != generation:
                    return
                found = list(enumerate(api.events))[position:]
                position = len(api.events)
            for index, (version, name, kind, obj) in found:
                if name != plural or version <= since:
                    continue
                # What was sent raw is never told again.
                is_wanted = kind == "BOOKMARK" or (kind is None and index >= begin)
                if is_wanted or (kind is not None and self._is_wanted(obj, query)):
                    yield kind, obj


@contextmanager
def running() -> Iterator[ApiServer]:
    """Yield a running server."""
    server = ApiServer()
    server.start()
    try:
        yield server
    finally:
        server.stop()
