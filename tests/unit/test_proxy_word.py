"""What proxies' headers are worth: trust, chains, and clients that bypass the proxy."""

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit import samples, world
from tests.unit.declared.test_opening import TLS, V1
from tests.unit.declared.test_proxy_protocol import INET, v2
from tests.unit.declared.test_request import get
from tests.unit.samples import flow
from tracer.declared.opening import read_opening
from tracer.judge.cause import Cause
from tracer.judge.connection import judge_connection
from tracer.judge.proxy_word import weigh
from tracer.judge.verdict import Verdict
from tracer.model import Status
from tracer.proxies import Proxies
from tracer.proxy_headers import ClientForm, Declared, ProxyHeader

CLIENT, PROXY, FAR_PROXY, STRANGER = "198.51.100.7", "10.0.0.9", "10.0.0.8", "192.0.2.66"
TRUSTED = (ip_network("10.0.0.8/31"), ip_network("2001:db8:10::/64"))
XFF, FORWARDED = ProxyHeader.X_FORWARDED_FOR, ProxyHeader.FORWARDED


def declared(data, sent=samples.SENT, is_all=True):
    found = read_opening(data, is_all=is_all)
    return Declared(
        ktime_ns=samples.KTIME_NS,
        netns=samples.NETNS,
        flow=sent,
        opening=found.opening,
        clients=found.clients,
        has_more=found.has_more,
    )


def v1(address, to="203.0.113.50"):
    kind = "TCP6" if ":" in address else "TCP4"
    return f"PROXY {kind} {address} {to if kind == 'TCP4' else '::1'} 56324 443\r\n".encode()


def word(data, peer=PROXY, expected=()):
    return weigh(declared(data), ip_address(peer), TRUSTED, expected)


@pytest.mark.parametrize(
    ("data", "client", "by"),
    [
        (v1(CLIENT) + TLS, CLIENT, PROXY),
        (v2(body=INET) + TLS, CLIENT, PROXY),
        (get(f"X-Forwarded-For: {CLIENT}"), CLIENT, PROXY),
        (get(f"Forwarded: for={CLIENT}"), CLIENT, PROXY),
        # Two proxies in a row: the nearer one names the farther.
        (get(f"X-Forwarded-For: {CLIENT}, {FAR_PROXY}"), CLIENT, FAR_PROXY),
        (v1(FAR_PROXY) + get(f"X-Forwarded-For: {CLIENT}"), CLIENT, FAR_PROXY),
        (
            v1("2001:db8:10::1") + get("X-Forwarded-For: 2001:db8::7"),
            "2001:db8::7",
            "2001:db8:10::1",
        ),
        # What the client itself wrote precedes what the proxies wrote.
        (get(f"X-Forwarded-For: 6.6.6.6, {CLIENT}"), CLIENT, PROXY),
        (get(f"X-Forwarded-For: 6.6.6.6, {CLIENT}, {FAR_PROXY}"), CLIENT, FAR_PROXY),
        (get("X-Forwarded-For: 6.6.6.6", f"X-Forwarded-For: {CLIENT}"), CLIENT, PROXY),
        (v1(CLIENT) + get("X-Forwarded-For: 6.6.6.6"), CLIENT, PROXY),
        (v1(CLIENT) + get("X-Forwarded-For: 6.6.6.6", "Forwarded: for=7.7.7.7"), CLIENT, PROXY),
        # Who is behind a name or an unknown client is not known.
        (get("Forwarded: for=6.6.6.6, for=_hidden"), "_hidden", PROXY),
        (get("Forwarded: for=6.6.6.6, proto=https"), "unknown", PROXY),
        (get("X-Forwarded-For: 6.6.6.6, <b>"), "invalid", PROXY),
        (b"PROXY UNKNOWN\r\n" + get("X-Forwarded-For: 6.6.6.6"), "unknown", PROXY),
        # All are proxies: the first is as far back as the headers go.
        (get(f"X-Forwarded-For: {FAR_PROXY}"), FAR_PROXY, PROXY),
        (get(f"X-Forwarded-For: {PROXY}, {FAR_PROXY}"), PROXY, FAR_PROXY),
        (get(f"Forwarded: for={CLIENT}", f"X-Forwarded-For: {CLIENT}"), CLIENT, PROXY),
    ],
)
def test_the_last_that_is_no_proxy(data, client, by):
    """From the peer back towards the client, the first address that is not trusted counts."""
    found = word(data)
    assert (str(found.client), str(found.by)) == (client, by)
    assert found.is_trusted
    assert found.is_proxied


def test_headers_that_contradict_each_other():
    """A proxy that writes one header passes the other on: if they differ, neither is believed."""
    found = word(get("Forwarded: for=6.6.6.6", f"X-Forwarded-For: {CLIENT}"))
    assert (found.client, found.is_ambiguous, found.is_proxied) == (None, True, True)


@pytest.mark.parametrize("data", [v1(CLIENT) + TLS, get(f"X-Forwarded-For: {CLIENT}")])
def test_forged(data):
    """Only proxies in the list are believed, whatever others write."""
    found = word(data, peer=STRANGER)
    assert (found.client, found.is_trusted, found.is_proxied) == (None, False, False)
    assert str(found.clients[0]) == CLIENT


@pytest.mark.parametrize("data", [TLS, get(), b"PROXY nonsense\r\n", V1[:9]])
def test_nothing_is_said(data):
    """A trusted proxy's connection without a header is the proxy's own."""
    found = word(data)
    assert (found.client, found.is_trusted, found.is_proxied) == (None, True, False)


def test_health_check():
    """With LOCAL the proxy speaks for itself: it is the client."""
    found = word(v2(command=0) + get())
    assert (found.client.form, found.is_proxied) == (ClientForm.LOCAL, False)


V1_HEADER, V2_HEADER = ProxyHeader.PROXY_V1, ProxyHeader.PROXY_V2


@pytest.mark.parametrize(
    ("data", "expected", "missing"),
    [
        (TLS, {V2_HEADER}, [V2_HEADER]),
        (get(), {V2_HEADER, XFF}, [V2_HEADER, XFF]),
        (get("X-Forwarded-For: 1.1.1.1"), {V2_HEADER, XFF}, [V2_HEADER]),
        (get("X-Forwarded-For: 1.1.1.1"), {FORWARDED}, [FORWARDED]),
        # Servers that expect the PROXY protocol accept both versions.
        (v1(CLIENT) + TLS, {V2_HEADER}, []),
        # The part that was not read may hold it.
        (v1(CLIENT) + TLS, {V1_HEADER, XFF}, []),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {XFF}, []),
        (V1[:9], {V1_HEADER}, []),
        (get()[:-2], {XFF}, []),
        (b"PROXY nonsense\r\n", {V1_HEADER}, []),
        (get(), set(), []),
    ],
)
def test_around_the_proxy(data, expected, missing):
    """A header is missing where it is expected and would have been read."""
    assert list(word(data, STRANGER, expected).missing) == missing
    assert weigh(None, ip_address(STRANGER), TRUSTED, expected).missing == ()


def pair(client, *, backend=samples.BACKEND, to=None, seen=None, sport=40000):
    """A connection to a backend, with DNAT if it addressed another, and SNAT if it is seen so."""
    sent = flow(client, sport, to or backend, 8080)
    reply = flow(backend, 8080, seen or client, sport)
    status = Status.SRC_NAT if seen else Status(0)
    return samples.connection(sent, reply, status=status)


def judged(connection, data, proxies=None, view=None, time_ns=0):
    proxies = proxies or Proxies(TRUSTED)
    found = proxies.word(connection, declared(data, connection.orig) if data else None, time_ns)
    return judge_connection(connection, view or world.view(), time_ns=0, word=found)


def test_backends_expect_what_trusted_proxies_send():
    """Once a backend had a trusted proxy's header, a connection without it bypasses the proxy."""
    proxies = Proxies(TRUSTED)
    assert judged(pair(STRANGER), TLS, proxies).word.missing == ()
    judged(pair(PROXY), v1(CLIENT) + TLS, proxies)
    assert judged(pair(STRANGER), TLS, proxies).word.missing == (V1_HEADER,)
    assert judged(pair(STRANGER, backend="10.244.1.12"), TLS, proxies).word.missing == ()


def test_strangers_make_no_expectation():
    """A header that may be forged does not make other connections look as if they lacked it."""
    proxies = Proxies(TRUSTED)
    judged(pair(STRANGER), v1(CLIENT) + TLS, proxies)
    assert judged(pair(PROXY), TLS, proxies).word.missing == ()


def test_verdict_of_a_proxied_connection():
    """A trusted header proves the proxy: proxied, with the client and the peer to trust."""
    found = judged(pair(PROXY), v1(CLIENT) + TLS)
    assert (found.verdict, found.opinion.cause) == (Verdict.PROXIED, Cause.LOAD_BALANCER_PROXY)
    assert f"PROXY v1 from {PROXY} names {CLIENT} port 56324" in found.opinion.evidence
    assert (
        f"{PROXY} is a trusted proxy: it speaks for {CLIENT} port 56324" in found.opinion.evidence
    )
    assert "let the backend read the client's address from PROXY v1" in found.opinion.advice


def test_verdict_whatever_the_policy():
    """Even if the node replaced the proxy's address, too, the verdict is proxied."""
    node = pair(PROXY, to="10.240.0.3", seen="10.244.1.1")
    found = judged(node, v2(body=INET) + TLS)
    assert (found.verdict, found.opinion.cause) == (Verdict.PROXIED, Cause.LOAD_BALANCER_PROXY)
    assert any("trust PROXY v2 only from 10.244.1.1:" in line for line in found.opinion.advice)
    assert any(f"the proxy's own address {PROXY} was" in line for line in found.opinion.advice)


def test_verdict_on_the_next_node():
    """The next node of a proxied connection knows which proxy declared the client."""
    proxies = Proxies(TRUSTED)
    first = pair(PROXY, to="10.240.0.5", seen="10.240.0.5")
    assert judged(first, v2(body=INET) + TLS, proxies).verdict is Verdict.PROXIED
    second = samples.connection(first.reply.inverted, first.reply, status=Status(0))
    found = judged(second, v2(body=INET) + TLS, proxies)
    assert (found.verdict, str(found.word.peer)) == (Verdict.PROXIED, PROXY)
    # Much later, the same ports are the node's own connection.
    later = judged(second, v2(body=INET) + TLS, proxies, time_ns=60_000_000_000)
    assert (later.verdict is Verdict.PROXIED, str(later.word.peer)) == (False, "10.240.0.5")


def test_verdict_of_a_forged_header():
    """An untrusted header changes no verdict; it is shown, and that it may be forged."""
    found = judged(pair(STRANGER), v1(CLIENT) + TLS)
    assert (found.verdict, found.opinion.cause) == (Verdict.PRESERVED, None)
    assert (
        f"declared, not trusted (forged?): {STRANGER} is not in --trusted-proxy"
        in found.opinion.evidence
    )
    assert f"if {STRANGER} is one of your proxies, add --trusted-proxy {STRANGER}" in (
        found.opinion.advice
    )


def test_verdict_around_the_proxy():
    """A pod that bypasses the proxy keeps its address, and is named."""
    proxies = Proxies(TRUSTED)
    judged(pair(PROXY), v1(CLIENT) + TLS, proxies)
    found = judged(pair("10.244.1.12"), get(), proxies)
    assert found.verdict is Verdict.PRESERVED
    assert any("it bypasses the proxy" in line for line in found.opinion.evidence)
    assert any("connect through the proxy" in line for line in found.opinion.advice)


def test_verdict_of_a_proxy_without_header():
    """A trusted address that sends no header, though others do, is not said to bypass itself."""
    proxies = Proxies(TRUSTED)
    judged(pair(PROXY), v1(CLIENT) + TLS, proxies)
    found = judged(pair(PROXY), TLS, proxies)
    (line,) = [each for each in found.opinion.evidence if "other connections" in each]
    assert "bypasses" not in line
    assert "from the proxy itself or from another address in --trusted-proxy" in line


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (None, "first bytes were not read"),
        (get(), "begins with an HTTP request that has no proxy header"),
        (TLS, "neither a PROXY header nor a readable HTTP request"),
        (V1[:9], "ended, or exceeded the limit, before a header could be read"),
        (v1(CLIENT), "ended, or exceeded the limit, before all headers were read"),
        (b"PROXY nonsense\r\n", "begins with a malformed PROXY header"),
        (get("X-Forwarded-For: " + ",".join(["1.1.1.1"] * 20)), "names more clients before"),
        (get("Forwarded: for=6.6.6.6", f"X-Forwarded-For: {CLIENT}"), "contradict each other"),
        (v2(command=0) + TLS, "itself (LOCAL, as for a health check)"),
        (get("Forwarded: for=_hidden"), "Forwarded from 10.0.0.9 names _hidden"),
    ],
)
def test_evidence(data, line):
    """The evidence says what was read, or why nothing was."""
    assert any(line in each for each in judged(pair(PROXY), data).opinion.evidence)


@given(samples.declared, samples.ipv4 | samples.ipv6, st.sets(st.sampled_from(ProxyHeader)))
def test_any_declaration(found, peer, expected):
    """Any declaration is weighed; a client counts only if a trusted proxy names it."""
    result = weigh(found, peer, (*TRUSTED, ip_network("0.0.0.0/1")), expected)
    assert result.client is None or result.is_trusted
    assert (result.client is None) == (result.by is None)
    line = "".join(
        judge_connection(
            samples.connection(), samples.ALONE, time_ns=0, word=result
        ).opinion.evidence
    )
    assert line.isprintable()
