"""The live cluster against an API server over HTTPS, and all the ways in which that can fail."""

import gc
import threading
import time
import tracemalloc
from base64 import b64encode
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest

from tests.unit.apiserver import ApiServer, running
from tests.unit.cluster import kube
from tracer.cluster import access
from tracer.cluster.errors import ClusterError
from tracer.cluster.feed import Timing, _delay, _is_before
from tracer.cluster.objects import ServicePort
from tracer.cluster.watch import Watch
from tracer.model import TCP

NEWER = "newer"
FAST = Timing(watch_s=60, silence_s=60, answer_s=60, backoff_s=0.01, max_backoff_s=0.05)
SLICE = kube.slice_of("web", kube.endpoint(ready=True))
UNREADY = kube.slice_of("web", kube.endpoint(ready=False))
# Enough for a slow machine; nothing waits so long where all is well.
SOON_S = 60


@pytest.fixture
def api():
    with running() as server:
        server.put(kube.node())
        server.put(kube.service("web", type="NodePort", externalTrafficPolicy="Local"))
        server.put(SLICE)
        server.put(kube.pod("p1"))
        server.put(kube.pod("p2", ["10.244.2.5"], "node2"))
        yield server


@pytest.fixture
def config(api, tmp_path):
    return api.kubeconfig(tmp_path / "config")


@pytest.fixture
def watch(api, config):
    with Watch(kubeconfig=config, node="node1", timing=FAST) as watch:
        watch.start()
        api.wait_for(lambda: api.open_watches == 4)
        yield watch


HTTP = ServicePort(name="http", proto=TCP, port=80, node_port=None, target_port=None)


def is_ready(cluster):
    return [item.is_ready for item in cluster.endpoints(("default", "web"), HTTP, "ipv4")]


def settled(watch, is_met):
    assert watch.wait_for(is_met, SOON_S), watch.status


def test_everything_is_listed(watch, api):
    """After the start the snapshot holds the cluster, but of the Pods only this node's."""
    counts = watch.cluster.counts
    assert (counts.nodes, counts.services, counts.endpoint_slices, counts.pods) == (1, 1, 1, 1)
    assert watch.cluster.pod_at(ip_address("10.244.1.11")).name == "p1"
    (pods,), (services,) = api.asked("list", "pods"), api.asked("list", "services")
    assert pods["fieldSelector"] == "spec.nodeName=node1"
    # From the cache, where the selector has an index.
    assert pods["resourceVersion"] == "0"
    assert "resourceVersion" not in services
    assert watch.status.is_synced
    assert watch.status.error is None


def test_pages(api, config):
    """A list that comes in pages is one list."""
    for index in range(7):
        api.put(kube.service(f"more{index}", clusterIPs=[f"10.0.1.{index}"]))
    api.page = 3
    with Watch(kubeconfig=config, timing=FAST) as watch:
        watch.start()
        assert watch.cluster.counts.services == 8
        assert watch.cluster.counts.pods == 0
    assert len(api.asked("list", "services")) == 3


def test_unready_within_a_second(watch, api):
    """An endpoint that turns unready is so in the next snapshot, within a second."""
    before, took_s = watch.cluster, []
    for obj, expected in ((UNREADY, [False]), (SLICE, [True])) * 3:
        began_s = time.monotonic()
        api.put(obj)
        settled(watch, lambda expected=expected: is_ready(watch.cluster) == expected)
        took_s.append(time.monotonic() - began_s)
    # A busy machine is late now and then, but not always.
    assert min(took_s) < 1
    assert is_ready(before) == [True]
    assert is_ready(watch.history.at(before.updated_ns)) == [True]


def test_added_and_removed(watch, api):
    """Objects come and go with their events."""
    other = kube.service("other", clusterIPs=["10.0.0.99"])
    api.put(other)
    settled(watch, lambda: watch.cluster.service("default", "other"))
    assert watch.cluster.service_at(ip_address("10.0.0.99"), 80, TCP)
    api.delete(other)
    settled(watch, lambda: not watch.cluster.service("default", "other"))
    gone = watch.history.service_at(ip_address("10.0.0.99"), 80, TCP, at_ns=time.time_ns())
    assert not gone.is_current


def test_resumes(watch, api):
    """An interrupted watch continues from its resource version: nothing is listed again."""
    api.put(UNREADY)
    settled(watch, lambda: is_ready(watch.cluster) == [False])
    api.disconnect()
    api.put(SLICE)
    settled(watch, lambda: is_ready(watch.cluster) == [True])
    # It was only asked for its current version.
    assert api.asked("list", "endpointslices") == [{"limit": "100"}, {"limit": "1"}]


def test_bookmarks(watch, api):
    """A bookmark moves the version to continue from, and confirms the snapshot."""
    versions = []
    # Before the first a watch's beginning may not be heard yet, which confirms the snapshot, too.
    for _ in range(2):
        asked_ns = time.monotonic_ns()
        api.bookmark()
        versions.append(str(api.version))
        # Of each resource: heard_ns is that of the one that was silent the longest.
        settled(watch, lambda asked_ns=asked_ns: watch.status.heard_ns >= asked_ns)
    api.disconnect()

    def resumed():
        return [query["resourceVersion"] for query in api.asked("watch", "nodes")][-1] in versions

    api.wait_for(resumed)
    assert watch.status.events == 0


def test_gone_at_the_start_of_a_watch(watch, api):
    """410 Gone leads to a new list, and objects that vanished meanwhile are gone."""
    with api.changed:
        del api.objects["services"]["default", "web"]
        api.put(UNREADY)
        api.forget()
    settled(watch, lambda: watch.cluster.counts.services == 0)
    settled(watch, lambda: is_ready(watch.cluster) == [False])
    assert watch.wait_for(lambda: watch.status.error is None, SOON_S)


def test_gone_within_a_watch(watch, api):
    """410 Gone may also come as an event."""
    gone = {"kind": "Status", "code": 410, "message": "too old resource version"}
    api.send_raw("nodes", {"type": "ERROR", "object": gone})
    api.wait_for(lambda: len(api.asked("list", "nodes")) == 2)
    settled(watch, lambda: watch.status.lists == 5)


def test_an_error_within_a_watch(watch, api):
    """Any other error ends the watch, which is then resumed."""
    failed = {"kind": "Status", "code": 500, "message": "etcd is away"}
    api.send_raw("nodes", {"type": "ERROR", "object": failed})
    settled(watch, lambda: watch.status.failures == 1)
    settled(watch, lambda: watch.status.error is None)
    api.put(kube.node("node2", ["10.240.0.5"], []))
    settled(watch, lambda: watch.cluster.node("node2"))


def test_the_server_goes_away(watch, api):
    """The last snapshot stays while the server is away, with its age and the reason."""
    port = api.port
    api.stop()
    settled(watch, lambda: watch.status.error)
    assert is_ready(watch.cluster) == [True]
    status = watch.status
    assert status.is_synced
    assert not status.is_refused
    assert status.age_s(status.heard_ns + 5 * 10**9) == 5
    assert api.url in status.error
    api.put(UNREADY)
    api.start(port)
    settled(watch, lambda: is_ready(watch.cluster) == [False])
    settled(watch, lambda: watch.status.error is None)
    # A watch that failed has looked up the current version: nothing is listed again.
    for plural in ("nodes", "services", "endpointslices", "pods"):
        assert all(query == {"limit": "1"} for query in api.asked("list", plural)[1:])


def test_a_history_that_begins_anew(watch, api):
    """
    A server that comes back with lower versions, as after a restored etcd, would take a watch from
    a higher one and be silent: everything is listed anew.
    """
    port = api.port
    api.stop()
    settled(watch, lambda: watch.status.error)
    with api.changed:
        api.version = 1
        api.events.clear()
        api.objects["services"].clear()
        api.put(kube.service("other", clusterIPs=["10.0.0.99"]))
    api.start(port)
    settled(watch, lambda: watch.cluster.service("default", "other"))
    assert not watch.cluster.service("default", "web")
    settled(watch, lambda: watch.status.error is None)
    api.wait_for(lambda: api.open_watches == 4)
    assert int(api.asked("watch", "services")[-1]["resourceVersion"]) <= api.version


@pytest.mark.parametrize("silence_s", [0.3, 20], ids=["silent", "cut off"])
def test_a_new_history_behind_the_same_address(api, config, silence_s):
    """A watch that goes silent, or is cut, is resumed only after looking up the version."""
    with Watch(kubeconfig=config, timing=replace(FAST, silence_s=silence_s)) as watch:
        watch.start()
        api.wait_for(lambda: api.open_watches == 3)
        with api.changed:
            api.version = 1
            api.events.clear()
            api.objects["services"].clear()
        if silence_s > 1:
            api.disconnect()
        settled(watch, lambda: watch.cluster.counts.services == 0)


@pytest.mark.parametrize(
    ("version", "other", "is_before"),
    [
        ("9", "10", True),
        ("10", "9", False),
        ("9", "9", False),
        (None, "9", False),
        ("a", "b", False),
    ],
)
def test_versions_are_numbers(version, other, is_before):
    """Those that are not cannot be compared."""
    assert _is_before(version, other) is is_before


def test_a_hung_connection(api, config):
    """A server that accepts and sends nothing is given up and asked again."""
    timing = replace(FAST, answer_s=0.1, silence_s=0.1)
    with Watch(kubeconfig=config, timing=timing) as watch:
        watch.start()
        settled(watch, lambda: watch.status.failures > 3)
        api.is_silent = True
        settled(watch, lambda: "in time" in (watch.status.error or ""))
        assert is_ready(watch.cluster) == [True]
        with api.changed:
            api.put(UNREADY)
            api.is_silent = False
        settled(watch, lambda: is_ready(watch.cluster) == [False])


def test_no_answer_at_the_start(api, config):
    """A start does not wait for ever; on a busy machine not even the handshake is in time."""
    api.is_silent = True
    with (
        Watch(kubeconfig=config, timing=replace(FAST, answer_s=0.1)) as watch,
        pytest.raises(ClusterError, match=r"at https://127.*: no (answer|connection) in time"),
    ):
        watch.start(wait_s=0.5)
    api.is_silent = False


def test_a_slow_start_is_told(api, config):
    """If the wait is long, a message says for what, and the wait goes on."""
    told = []

    def on_slow(why):
        told.append(why)
        api.is_broken = False

    api.is_broken = True
    with Watch(kubeconfig=config, timing=FAST) as watch:
        watch.start(SOON_S, on_slow)
        assert watch.status.is_synced
    (why,) = told
    assert "answered 500 etcdserver: no leader" in why


def test_a_list_that_trickles(api, config):
    """A list that trickles in a byte at a time is given up, although no byte is late."""
    api.is_trickling = True
    timing = replace(FAST, answer_s=0.1)
    with Watch(kubeconfig=config, timing=timing) as watch:
        watch.start(wait_s=0)
        settled(watch, lambda: "did not finish in time" in (watch.status.error or ""))
        api.is_trickling = False
        settled(watch, lambda: watch.status.is_synced)


def test_start_without_waiting(api, config):
    """An agent may start before the API server does."""
    api.is_broken = True
    with Watch(kubeconfig=config, timing=FAST) as watch:
        watch.start(wait_s=0)
        assert watch.status.age_s(0) is None
        settled(watch, lambda: "answered 500 etcdserver: no leader" in (watch.status.error or ""))
        assert watch.cluster.counts.services == 0
        api.is_broken = False
        settled(watch, lambda: watch.status.is_synced)


@pytest.mark.parametrize(
    ("failures", "longest"), [(1, 0.2), (2, 0.4), (5, 3.2), (8, 25.6), (9, 30), (10_000, 30)]
)
def test_backs_off(failures, longest):
    """Pauses double up to a limit, and half of each is random."""
    found = [_delay(failures, Timing()) for _ in range(50)]
    assert longest / 2 <= min(found) < max(found) <= longest


def test_bad_certificate(config, api, tmp_path):
    """A server with a certificate of another authority is refused, in one line."""
    stranger = ApiServer()
    stranger.port = api.port
    path = stranger.kubeconfig(tmp_path / "other")
    with (
        Watch(kubeconfig=path, timing=FAST) as watch,
        pytest.raises(
            ClusterError, match=r"certificate not accepted: unable to get local issuer"
        ) as caught,
    ):
        watch.start()
    assert "\n" not in str(caught.value)
    assert api.requests == []


@pytest.mark.parametrize(("days", "reason"), [(-2, "has expired"), (1, "is not yet valid")])
def test_a_certificate_of_another_day(api, config, days, reason):
    """A certificate that has expired, or is not yet valid by a wrong clock, is named as such."""
    api.stop()
    begin = datetime.now(UTC) + timedelta(days=days)
    api.validity = {"not_before": begin, "not_after": begin + timedelta(days=1)}
    api.start(api.port)
    with (
        Watch(kubeconfig=config, timing=FAST) as watch,
        pytest.raises(ClusterError, match=f"certificate {reason}; renew it, or correct this"),
    ):
        watch.start()


@pytest.fixture
def strict(api):
    """An API server that knows its clients by certificate."""
    port = api.port
    api.stop()
    api.token = None
    api.start(port)
    return api


@pytest.mark.parametrize("is_inline", [True, False])
def test_client_certificate(strict, tmp_path, is_inline):
    """Certificates and keys may stand in the configuration, or in files beside it."""
    issued = strict.authority.issue_cert("client")
    parts = {
        "client-certificate": issued.cert_chain_pems[0].bytes(),
        "client-key": issued.private_key_pem.bytes(),
    }
    for name, data in parts.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "ca.crt").write_bytes(strict.authority.cert_pem.bytes())
    user = {f"{name}-data": b64encode(data).decode() for name, data in parts.items()}
    cluster = {}
    if not is_inline:
        user = {name: name for name in parts}
        cluster = {"certificate-authority": "ca.crt", "certificate-authority-data": None}
    path = strict.kubeconfig(tmp_path / "config", user=user, cluster=cluster)
    with Watch(kubeconfig=path, timing=FAST) as watch:
        watch.start()
        assert watch.cluster.counts.services == 1


def test_no_client_certificate(strict, config):
    """A server that requires a certificate and gets none is not retried for ever."""
    with Watch(kubeconfig=config, timing=FAST) as watch, pytest.raises(ClusterError) as caught:
        watch.start(wait_s=3)
    assert "certificate" in str(caught.value)


def test_expired_token_at_the_start(api, config):
    """A token that is not accepted is said to be so."""
    api.token = NEWER
    with (
        Watch(kubeconfig=config, timing=FAST) as watch,
        pytest.raises(ClusterError, match=r"401 Unauthorized\); has the token expired"),
    ):
        watch.start()


def test_token_expires_later(watch, api):
    """A token that expires leaves the snapshot and says why it ages."""
    api.token = NEWER
    api.disconnect()
    settled(watch, lambda: watch.status.is_refused)
    assert "401" in watch.status.error
    assert is_ready(watch.cluster) == [True]


def test_rotated_token(api, tmp_path):
    """A token from a file is read again when it is no longer accepted."""
    token = tmp_path / "token"
    token.write_text("secret")
    path = api.kubeconfig(tmp_path / "config", user={"tokenFile": str(token)})
    with Watch(kubeconfig=path, timing=FAST) as watch:
        watch.start()
        token.write_text("newer\n")
        with api.changed:
            api.token = NEWER
            api.put(UNREADY)
            api.disconnect()
        settled(watch, lambda: is_ready(watch.cluster) == [False])
        assert watch.status.failures == 0


def test_token_file_away(api, tmp_path):
    """A token's file that is missing for a while does not end the watch."""
    token = tmp_path / "token"
    token.write_text("secret")
    path = api.kubeconfig(tmp_path / "config", user={"tokenFile": str(token)})
    with Watch(kubeconfig=path, timing=FAST) as watch:
        watch.start()
        token.unlink()
        with api.changed:
            api.token = NEWER
            api.put(UNREADY)
            api.disconnect()
        settled(watch, lambda: watch.status.is_refused)
        assert watch.status.error.endswith(f": Token file {token} not found")
        # It is there before its text is.
        token.touch()
        settled(watch, lambda: watch.status.error.endswith(f": Token file {token} holds no token"))
        token.write_text("newer")
        settled(watch, lambda: is_ready(watch.cluster) == [False])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"Token file .*/token not found"),
        (b"\xff", "the file of the bearer token is not text"),
    ],
)
def test_token_file_without_a_token(api, tmp_path, content, message):
    """A token's file that cannot be read is refused at the start, in one line."""
    token = tmp_path / "token"
    if content is not None:
        token.write_bytes(content)
    path = api.kubeconfig(tmp_path / "config", user={"tokenFile": str(token)})
    with Watch(kubeconfig=path, timing=FAST) as watch:
        with pytest.raises(ClusterError, match=message) as caught:
            watch.start()
        assert "\n" not in str(caught.value)


def test_service_account(api, tmp_path, monkeypatch):
    """In a pod, the service account is used without any configuration."""
    for name, text in (
        ("token", "secret"),
        ("namespace", "srcip"),
        ("ca.crt", api.authority.cert_pem.bytes().decode()),
    ):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(access, "SERVICE_ACCOUNT", tmp_path)
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(api.port))
    with Watch(timing=FAST) as watch:
        watch.start()
        assert watch.cluster.counts.services == 1


@pytest.mark.parametrize("verb", ["list", "watch"])
@pytest.mark.parametrize(
    ("plural", "rule"),
    [
        ("services", '{apiGroups: [""], resources: ["services"], verbs: ["list", "watch"]}'),
        (
            "endpointslices",
            '{apiGroups: ["discovery.k8s.io"], resources: ["endpointslices"],'
            ' verbs: ["list", "watch"]}',
        ),
        ("pods", '{apiGroups: [""], resources: ["pods"], verbs: ["list", "watch"]}'),
    ],
)
def test_forbidden(api, config, verb, plural, rule):
    """A missing permission is named: the verb, the resource, and the ClusterRole rule."""
    api.forbidden = {(verb, plural)}
    with Watch(kubeconfig=config, node="node1", timing=FAST) as watch:
        if verb == "list":
            with pytest.raises(ClusterError) as caught:
                watch.start()
            message = str(caught.value)
        else:
            watch.start(wait_s=0)
            settled(watch, lambda: watch.status.is_refused)
            message = watch.status.error
    assert message.startswith(f"{verb} {plural}: not permitted")
    assert message.endswith(f"add to the ClusterRole: {rule}")


def test_permission_granted_later(api, config):
    """Refused requests are retried: permissions can be granted while the agent runs."""
    api.forbidden = {("list", "nodes")}
    with Watch(kubeconfig=config, timing=FAST) as watch:
        watch.start(wait_s=0)
        settled(watch, lambda: watch.status.is_refused)
        api.forbidden = set()
        settled(watch, lambda: watch.status.is_synced and watch.status.error is None)


PLUGIN = """#!/bin/sh
cat {directory}/answer
"""


@pytest.mark.parametrize("version", ["v1", "v1beta1"])
def test_credential_plugin(api, tmp_path, version):
    """A credential plugin is asked for a token, and again when that is not accepted any more."""
    answer, script = tmp_path / "answer", tmp_path / "plugin"
    answer.write_text('{"kind": "ExecCredential", "status": {"token": "secret"}}')
    script.write_text(PLUGIN.format(directory=tmp_path))
    script.chmod(0o755)
    plugin = {"apiVersion": f"client.authentication.k8s.io/{version}", "command": str(script)}
    path = api.kubeconfig(tmp_path / "config", user={"exec": plugin})
    with Watch(kubeconfig=path, timing=FAST) as watch:
        watch.start()
        answer.write_text('{"status": {"token": "newer"}}')
        with api.changed:
            api.token = NEWER
            api.put(UNREADY)
            api.disconnect()
        settled(watch, lambda: is_ready(watch.cluster) == [False])


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("/nonexistent/plugin", [], "'/nonexistent/plugin': No such file or directory"),
        ("sh", ["-c", "echo no login >&2; exit 3"], "'sh': exit code 3: no login"),
        ("sh", ["-c", "exit 3"], "'sh': exit code 3: no message"),
        ("sh", ["-c", "echo []"], "'sh': its output has no status.token"),
        ("sh", ["-c", "echo {"], "'sh': its output has no status.token"),
    ],
)
def test_failing_plugin(api, tmp_path, command, arguments, message):
    """A credential plugin that fails is named."""
    plugin = {"apiVersion": "client.authentication.k8s.io/v1", "command": command}
    path = api.kubeconfig(tmp_path / "config", user={"exec": plugin | {"args": arguments}})
    with Watch(kubeconfig=path, timing=FAST) as watch, pytest.raises(ClusterError, match=message):
        watch.start(wait_s=2)


def test_hanging_plugin(api, tmp_path, monkeypatch):
    """A credential plugin that hangs is ended."""
    monkeypatch.setattr(access, "_EXEC_S", 0.1)
    plugin = {"apiVersion": "client.authentication.k8s.io/v1", "command": "sleep", "args": ["60"]}
    path = api.kubeconfig(tmp_path / "config", user={"exec": plugin})
    with (
        Watch(kubeconfig=path, timing=FAST) as watch,
        pytest.raises(ClusterError, match=r"'sleep': no answer within 0.1 s"),
    ):
        watch.start()


def test_malformed_objects(watch, api, caplog):
    """An object that cannot be read is counted and reported once; the others are not affected."""
    bad = kube.service("bad", ports=[{"port": "many"}])
    api.put(bad)
    api.put(bad)
    api.put(UNREADY)
    api.send_raw("services", {"type": "ADDED", "object": kube.pod("p9")})
    settled(watch, lambda: watch.status.undecodable == 3)
    settled(watch, lambda: is_ready(watch.cluster) == [False])
    assert caplog.text.count("Service default/bad: spec.ports[0].port is 'many'") == 1
    assert watch.status.error is None


@pytest.mark.parametrize("event", [[], {"type": "ADDED"}, {"type": "ADDED", "object": 3}])
def test_malformed_events(watch, api, event):
    """A malformed event ends the watch, which continues from where it was."""
    api.send_raw("services", event)
    settled(watch, lambda: watch.status.failures >= 1)
    api.forget()
    api.put(UNREADY)
    settled(watch, lambda: is_ready(watch.cluster) == [False])
    settled(watch, lambda: watch.status.error is None)


def test_close(api, config):
    """Closing ends all watches and the thread; the snapshot stays readable."""
    watch = Watch(kubeconfig=config, node="node1", timing=FAST)
    watch.start()
    api.wait_for(lambda: api.open_watches == 4)
    watch.close()
    watch.close()
    assert "cluster-watch" not in {thread.name for thread in threading.enumerate()}
    api.disconnect()
    api.wait_for(lambda: api.open_watches == 0)
    assert is_ready(watch.cluster) == [True]


def test_close_without_start(config):
    """A watch that was never started can be closed."""
    Watch(kubeconfig=config).close()


def instances():
    """Return how many objects of the package's classes there are."""
    gc.collect()
    modules = [str(type(obj).__module__) for obj in gc.get_objects()]
    return sum(module.startswith("tracer.cluster") for module in modules)


def test_nothing_leaks(api, config):
    """10,000 updates leave as many objects, and as much memory, as 1,000 did."""
    ticks = iter(range(10**9, 10**18, 10**9 // 2))
    with Watch(kubeconfig=config, timing=FAST, clock_ns=lambda: next(ticks)) as watch:
        watch.start()

        def update(count):
            wanted = watch.status.events + count
            for index in range(count):
                api.put(UNREADY if index % 2 else SLICE)
            assert watch.wait_for(lambda: watch.status.events >= wanted, 60)

        tracemalloc.start()
        try:
            # The history is full by then: half a second passes at each look at the clock.
            update(1_000)
            objects, memory = instances(), traced()
            update(10_000)
            assert watch.status.events == 11_000
            assert instances() < objects * 1.2
            assert traced() < memory * 1.2
        finally:
            tracemalloc.stop()


def traced():
    mine = tracemalloc.Filter(inclusive=True, filename_pattern="*/tracer/cluster/*")
    snapshot = tracemalloc.take_snapshot().filter_traces([mine])
    return sum(item.size for item in snapshot.statistics("filename"))
