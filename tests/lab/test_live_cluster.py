"""A trace that watches a cluster: the next connection is judged by what the cluster is by then."""

import copy
import json
import signal
import subprocess
import time

import pytest

from lab import kube_proxy, probe
from lab.scenarios import cases
from lab.services import OBJECTS
from tests.lab.commands import PATIENCE_S, SRCIP, lines, netns_options, tracing, wait_until
from tests.unit.apiserver import running

pytestmark = pytest.mark.usefixtures("kernel")

ITEMS = json.loads(OBJECTS.read_text())["items"]


@pytest.fixture
def api():
    """An API server that holds the lab's objects."""
    with running() as server:
        for item in ITEMS:
            server.put(item)
        yield server


def endpoint_slice(name):
    (found,) = (
        item
        for item in ITEMS
        if item["kind"] == "EndpointSlice" and item["metadata"]["name"] == name
    )
    return copy.deepcopy(found)


def test_an_unready_endpoint_changes_the_next_verdict(api, lab, tmp_path):
    """
    A drop is for want of a local endpoint while there is one elsewhere, and for want of any a
    second after the last one turned unready.
    """
    kube_proxy.load(lab, "iptables")
    (case,) = cases(modes=["iptables"], scenarios=["S6"], families=["ipv4"], protos=["udp"])
    config = api.kubeconfig(tmp_path / "config")
    with tracing(lab, tmp_path, "-o", "json", cluster=["--kubeconfig", config]) as (trace, output):

        def drops():
            # Accepts are those of all namespaces, other labs' too.
            return [line for line in lines(output.read_text()) if line["kind"] == "drop"]

        def next_cause():
            before = len(drops())
            probe.run(lab, [case])
            wait_until(lambda: len(drops()) > before)
            return drops()[-1]["cause"]

        ready, unready = (endpoint_slice("nodeport-local-ipv4") for _ in range(2))
        for endpoint in unready["endpoints"]:
            endpoint["conditions"] = {"ready": False, "serving": False, "terminating": False}

        def until(cause):
            """How long after the first connection the first began that was judged so."""
            began_s = first_s = time.monotonic()
            while next_cause() != cause:
                began_s = time.monotonic()
                assert began_s - first_s < PATIENCE_S
            return began_s - first_s

        def is_known_in_a_second():
            api.put(ready)
            until("no-local-endpoint")
            api.put(unready)
            return until("no-endpoints") < 1

        assert next_cause() == "no-local-endpoint"
        # A busy machine is late now and then, but not always.
        assert any(is_known_in_a_second() for _ in range(3))
        trace.send_signal(signal.SIGINT)
        assert trace.wait(PATIENCE_S) == 0


def test_the_api_server_goes_away(api, lab, tmp_path):
    """Without the server a trace goes on with the last snapshot."""
    kube_proxy.load(lab, "iptables")
    chosen = cases(modes=["iptables"], scenarios=["S4"], families=["ipv4"], protos=["udp"])
    config = api.kubeconfig(tmp_path / "config")
    arguments = ["-o", "json", "--count", "1"]
    with tracing(lab, tmp_path, *arguments, cluster=["--kubeconfig", config]) as (trace, output):
        api.stop()
        probe.run(lab, chosen)
        assert trace.wait(PATIENCE_S) == 0
    (line,) = (line for line in lines(output.read_text()) if line["kind"] == "connection")
    assert line["service"]["name"] == "nodeport"
    assert line["cause"] == "external-traffic-policy-cluster"


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda path: path.write_text("{"), "is malformed"),
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_text(path.read_text().replace("token:", "toke:")), "401"),
    ],
    ids=["malformed", "missing", "no token"],
)
def test_bad_kubeconfig(api, lab, tmp_path, break_it, expected):
    """A kubeconfig that was named and is bad is one line, and exit 1."""
    config = api.kubeconfig(tmp_path / "config")
    break_it(config)
    done = subprocess.run(
        [*SRCIP, "trace", *netns_options(lab), "--kubeconfig", str(config), "--timeout", "1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
