"""Behind real proxies: srcip names the client that a real backend reads from the headers."""

import json
import os
import signal
import subprocess

import pytest

from tests.kernel import box as boxes
from tests.kernel.box import CLIENT, SERVER
from tests.lab import proxies
from tests.lab.commands import PATIENCE_S, SRCIP, lines, srcip, wait_until
from tests.lab.proxies import (
    CHAIN,
    EXPECTS_PROXY,
    EXPECTS_XFF,
    HAPROXY,
    HTTP_FORWARDED,
    HTTP_XFF,
    NGINX,
    NGINX_XFF,
    TCP_V1,
    TCP_V2,
    TRUSTED,
    ask,
)

GET = b"GET /secret-path HTTP/1.1\r\nHost: x\r\nCookie: secret\r\nConnection: close\r\n\r\n"
TRACK = "table inet t { chain c { type filter hook prerouting priority 0; ct state new; } }"
FORGED = b"PROXY TCP4 6.6.6.6 7.7.7.7 1 2\r\n"


@pytest.fixture(scope="module")
def site(kernel, tmp_path_factory):
    """A box with haproxy, nginx and a backend."""
    if absent := proxies.missing():
        if os.environ.get("SRCIP_KERNEL_TESTS") == "1":
            pytest.fail(f"not installed: {absent}")
        pytest.skip(f"not installed: {absent}")
    with boxes.built() as box:
        box.rules(TRACK)
        with proxies.running(box, tmp_path_factory.mktemp("site")):
            yield box


class Tracing:
    """A 'srcip trace --read-proxy-headers' on the box's node."""

    def __init__(self, box, directory, *options):
        self.ready, self.output = directory / "ready", directory / "output"
        self.recording = directory / "night.srcip"
        command = [*SRCIP, "trace", "--no-cluster", "--read-proxy-headers", "-o", "json"]
        command += [f"--netns={box.path('node')}=node", "--ready-file", str(self.ready)]
        command += ["--record", str(self.recording), *options]
        with self.output.open("w") as stdout:
            self.process = subprocess.Popen(
                command, stdout=stdout, stderr=subprocess.PIPE, text=True
            )

    def __enter__(self):
        wait_until(lambda: self.ready.exists() or self.process.poll() is not None)
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def connections(self):
        whole = self.output.read_text().rpartition("\n")[0]
        return [line for line in lines(whole) if line["kind"] == "connection"]

    def end(self):
        self.process.send_signal(signal.SIGINT)
        _, complaint = self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode == 0, complaint
        return lines(self.output.read_text())


def is_check(line):
    """Whether a line is one of haproxy's health checks."""
    return "local" in {client["form"] for client in line["proxy"]["declared"]}


def next_line(tracing, port, count):
    """Wait for the connection to a backend's port that comes after so many."""

    def found():
        told = [
            line
            for line in tracing.connections()
            if line["orig"]["dport"] == port and not is_check(line)
        ]
        return told[count:]

    return wait_until(found)[0]


@pytest.fixture
def tracing(site, tmp_path):
    with Tracing(site, tmp_path, *TRUSTED) as running:
        yield running


# By which proxy, to which of its ports, and what the backend's port and the peer are.
WAYS = {
    "haproxy PROXY v1": (HAPROXY, TCP_V1, EXPECTS_PROXY, HAPROXY, ["proxy-v1"]),
    "haproxy PROXY v2": (HAPROXY, TCP_V2, EXPECTS_PROXY, HAPROXY, ["proxy-v2"]),
    "haproxy X-Forwarded-For": (HAPROXY, HTTP_XFF, EXPECTS_XFF, HAPROXY, ["x-forwarded-for"]),
    "nginx X-Forwarded-For": (NGINX, NGINX_XFF, EXPECTS_XFF, NGINX, ["x-forwarded-for"]),
    "haproxy, then nginx": (HAPROXY, CHAIN, EXPECTS_XFF, NGINX, ["x-forwarded-for"] * 2),
}


def test_proxies_name_the_client(site, tracing):
    """
    Whatever proxy and header, one or two of them: the client is whom the backend takes for it, the
    peer is the proxy's socket, and the connection is proxied.
    """
    counts = {EXPECTS_PROXY: 0, EXPECTS_XFF: 0}
    for way, (proxy, port, backend, peer, headers) in WAYS.items():
        for version in (4, 6):
            answer, local = ask(site, proxy[version], port, GET)
            line = next_line(tracing, backend, counts[backend])
            counts[backend] += 1
            assert local[0] == CLIENT[version] == answer["client"], way
            told = line["proxy"]
            assert told["client"]["address"] == answer["client"], way
            assert told["peer"] == answer["peer"] == peer[version] == line["orig"]["src"], way
            assert told["client"]["by"] == proxy[version], way
            assert [each["header"] for each in told["declared"]] == headers, way
            if "PROXY" in way:
                assert told["client"]["port"] == local[1]
            assert told["trusted"]
            assert (line["verdict"], line["cause"]) == ("proxied", "load-balancer-proxy")
            assert line["seen_source"] == peer[version]
    (summary,) = [line for line in tracing.end() if line["kind"] == "summary"]
    assert not any(summary["lost"].values())


def test_forwarded(site, tracing):
    """The standard header, in both families, from haproxy."""
    for number, version in enumerate((4, 6)):
        ask(site, HAPROXY[version], HTTP_FORWARDED, GET)
        line = next_line(tracing, EXPECTS_XFF, number)
        assert line["proxy"]["declared"] == [
            {"header": "forwarded", "form": "address", "address": CLIENT[version]}
        ]
        assert line["proxy"]["client"]["address"] == CLIENT[version]


def test_health_checks(site, tracing):
    """haproxy's own checks say LOCAL: the proxy is the client, and nothing is hidden."""
    checks = wait_until(lambda: [line for line in tracing.connections() if is_check(line)])
    assert {line["verdict"] for line in checks} == {"preserved"}
    assert {line["proxy"]["declared"][0]["header"] for line in checks} == {"proxy-v2"}
    assert {line["orig"]["src"] for line in checks} <= set(HAPROXY.values())


def test_forged_headers(site, tracing):
    """
    A client that writes headers itself is not believed, as the backend does not believe it; through
    a proxy, what it wrote stands before what the proxy wrote, and does not count.
    """
    forged = GET.replace(b"Cookie", b"X-Forwarded-For: 6.6.6.6\r\nCookie")
    for port, request in ((EXPECTS_XFF, forged), (EXPECTS_PROXY, FORGED + GET)):
        answer, _ = ask(site, SERVER[4], port, request)
        line = next_line(tracing, port, 0)
        assert answer["client"] == line["orig"]["src"] == CLIENT[4]
        assert line["proxy"]["declared"][0]["address"] == "6.6.6.6"
        assert (line["proxy"]["trusted"], "client" in line["proxy"]) == (False, False)
        assert (line["verdict"], "cause" in line) == ("preserved", False)
        assert any("not trusted (forged?)" in each for each in line["evidence"])

    answer, _ = ask(site, NGINX[4], NGINX_XFF, forged)
    line = next_line(tracing, EXPECTS_XFF, 1)
    assert [each["address"] for each in line["proxy"]["declared"]] == ["6.6.6.6", CLIENT[4]]
    assert line["proxy"]["client"]["address"] == answer["client"] == CLIENT[4]


def test_around_the_proxy(site, tracing):
    """A client that reaches the backend without the header that others carry is named."""
    ask(site, HAPROXY[4], TCP_V1, GET)
    next_line(tracing, EXPECTS_PROXY, 0)
    answer, _ = ask(site, SERVER[4], EXPECTS_PROXY, GET)
    line = next_line(tracing, EXPECTS_PROXY, 1)
    assert answer is None or "client" not in answer  # nginx refuses such a connection
    assert line["verdict"] == "preserved"
    assert line["proxy"]["missing"][0].startswith("proxy-v")
    assert any("bypasses the proxy" in each for each in line["evidence"])


def test_header_split_over_segments(site, tracing):
    """A header that arrives in pieces is read as the backend reads it."""
    request = GET.replace(b"Cookie", b"X-Forwarded-For: 192.0.2.1, 192.0.2.2\r\nCookie")
    pieces = [request[at : at + 9] for at in range(0, len(request), 9)]
    answer, _ = ask(site, SERVER[4], EXPECTS_XFF, *pieces, source=HAPROXY[4])
    line = next_line(tracing, EXPECTS_XFF, 0)
    assert line["proxy"]["client"]["address"] == answer["client"] == "192.0.2.2"


def test_recording_holds_the_clients_alone(site, tracing, tmp_path):
    """
    A replay says the same as the trace, of its own list of proxies; and nothing else of what was
    sent is in the file.
    """
    for proxy, port, backend in ((HAPROXY, TCP_V2, EXPECTS_PROXY), (NGINX, NGINX_XFF, EXPECTS_XFF)):
        ask(site, proxy[4], port, GET)
        next_line(tracing, backend, 0)
    told = [line for line in tracing.end() if line["kind"] == "connection"]

    raw = tracing.recording.read_bytes()
    for secret in (b"secret", b"GET ", b"Cookie", b"X-Forwarded", b"PROXY ", b"QUIT"):
        assert secret not in raw
    again = srcip("replay", str(tracing.recording), "-o", "json", *TRUSTED)
    replayed = [line for line in lines(again.stdout) if line["kind"] == "connection"]
    key = json.dumps
    assert [line["proxy"] for line in sorted(replayed, key=key)] == [
        line["proxy"] for line in sorted(told, key=key)
    ]
    assert [line["verdict"] for line in replayed] == [line["verdict"] for line in told]
    joined = srcip("stitch", str(tracing.recording), "-o", "json", *TRUSTED)
    proxied = [line for line in lines(joined.stdout) if line.get("verdict") == "proxied"]
    assert [line["kind"] for line in proxied] == ["path", "path"]
    assert {line["proxy"]["client"]["address"] for line in proxied} == {CLIENT[4]}
    untrusting = srcip("replay", str(tracing.recording), "--expect", "preserved")
    assert untrusting.returncode == 0
    assert "declared, not trusted (forged?)" in untrusting.stdout


def test_path_behind_a_proxy(site, tmp_path):
    """Hop by hop, too, a connection is proxied, and its path has the client that is named."""
    port = ["--filter-port", str(EXPECTS_PROXY), "--packets", "1"]
    with Tracing(site, tmp_path, *TRUSTED, *port) as tracing:
        _, local = ask(site, HAPROXY[6], TCP_V1, GET)

        def paths():
            whole = lines(tracing.output.read_text().rpartition("\n")[0])
            return [line for line in whole if line.get("verdict") == "proxied"]

        first, *_ = wait_until(paths)
        assert (first["kind"], first["cause"]) == ("path", "load-balancer-proxy")
        assert first["proxy"]["client"]["address"] == local[0]
        assert first["proxy"]["client"]["port"] == local[1]
        assert [hop["hook"] for hop in first["hops"]][:1] == ["tc_ingress"]
        tracing.end()


def test_rows_for_people(site, tmp_path):
    """The table shows the client beside the proxy that names it."""
    with Tracing(site, tmp_path, *TRUSTED) as tracing:
        _, local = ask(site, HAPROXY[4], TCP_V1, GET)
        next_line(tracing, EXPECTS_PROXY, 0)
        tracing.end()
        shown = srcip("replay", str(tracing.recording), *TRUSTED, "--filter-verdict", "proxied")
    (row,) = [line for line in shown.stdout.splitlines() if " proxied " in line]
    assert f"{CLIENT[4]}:{local[1]} via {HAPROXY[4]}:" in row
    assert "load-balancer-proxy (PROXY v1)" in row


def test_diagram(site, tmp_path):
    """A path that a proxy opened is drawn from the client that it names."""

    def text():
        # Long lines are broken where the terminal ends.
        return " ".join(running.output.read_text().split())

    with Tracing(site, tmp_path, *TRUSTED, "-o", "diagram") as running:
        _, local = ask(site, HAPROXY[4], TCP_V1, GET)
        client = f"{local[0]}:{local[1]}"
        wait_until(lambda: f"the client is {client}, according to the proxy" in text())
        assert "client --> proxy --> node --> endpoint proxied: " in text()
        assert f"declared {client}, in PROXY v1; {HAPROXY[4]} is trusted" in text()
