"""Faults around a long-running agent: none of them ends the agent or goes uncounted."""

import copy
import json
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from lab import kube_proxy, probe
from lab.scenarios import cases
from lab.services import OBJECTS
from tests.kernel import bpf_objects
from tests.kernel.trace import open_source
from tests.lab.commands import wait_until
from tests.lab.kube_proxy_port import kube_proxy_of, said
from tests.lab.test_serve import serving
from tests.unit.apiserver import running
from tracer.kernel import netns, source
from tracer.kernel.source import Settings
from tracer.pipeline import Pipeline

pytestmark = pytest.mark.usefixtures("kernel")

ITEMS = json.loads(OBJECTS.read_text())["items"]
S4 = {"scenarios": ["S4"], "families": ["ipv4"], "protos": ["udp"]}


def mode_of(served):
    (sample,) = served.samples()["srcip_kube_proxy_info"]
    return sample.labels["mode"]


def test_kube_proxy_restarts_in_another_mode(lab):
    """The agent asks at the start and when the rules change mode, and judges by the answer."""
    kube_proxy.load(lab, "iptables")
    with kube_proxy_of(lab, "node1") as proxy:
        # Its answer counts before its rules are read.
        proxy.start(said("ipvs"))
        with serving(lab, nodes=["node1"]) as served:
            wait_until(lambda: mode_of(served) == "ipvs")
            probe.run(lab, cases(modes=["iptables"], **S4))
            served.drained()
            assert cause(served) == {"ipvs-masquerade": 1}
            proxy.stop()
            proxy.start(said("nftables"))
            kube_proxy.load(lab, "nftables")
            wait_until(lambda: mode_of(served) == "nftables")
            probe.run(lab, cases(modes=["nftables"], **S4))
            served.drained()
            assert cause(served) == {"ipvs-masquerade": 1, "external-traffic-policy-cluster": 1}
            assert served.is_ready()


def test_kube_proxy_is_away(lab):
    """When it no longer answers, its rules decide."""
    kube_proxy.load(lab, "iptables")
    with kube_proxy_of(lab, "node1") as proxy:
        proxy.start(said("ipvs"))
        with serving(lab, nodes=["node1"]) as served:
            wait_until(lambda: mode_of(served) == "ipvs")
            proxy.stop()
            kube_proxy.load(lab, "nftables")
            wait_until(lambda: mode_of(served) == "nftables")


@pytest.mark.parametrize(
    "answer",
    [b"x" * 100_000, b"HTTP/1.0 500\r\n\r\nipvs"],
    ids=["too much", "an error"],
)
def test_something_else_on_its_port(lab, answer):
    """Whatever else answers there, the rules decide."""
    kube_proxy.load(lab, "iptables")
    with kube_proxy_of(lab, "node1") as proxy:
        proxy.start(answer)
        with serving(lab, nodes=["node1"]) as served:
            wait_until(lambda: mode_of(served) == "iptables")
            assert proxy.asked
            kube_proxy.load(lab, "nftables")
            wait_until(lambda: mode_of(served) == "nftables")


def cause(served):
    found = Counter()
    for labels, total in served.connections.items():
        if labels.service == "nodeport":
            found[labels.cause] += total
    return found


def test_the_api_server_comes_back_with_a_new_history(lab, tmp_path):
    """
    While it is away the agent counts with what it knows; when it is back, and knows nothing of
    what was before, the agent has its objects anew.
    """
    kube_proxy.load(lab, "iptables")
    chosen = cases(modes=["iptables"], **S4)
    with running() as api:
        for item in ITEMS:
            api.put(item)
        cluster = ["--kubeconfig", api.kubeconfig(tmp_path / "config")]
        with serving(lab, nodes=["node1"], cluster=cluster) as served:
            api.stop()
            probe.run(lab, chosen)
            served.drained()
            assert policies(served) == {"Cluster": 1}
            assert served.is_ready()
            changed = copy.deepcopy(service("nodeport"))
            changed["spec"]["externalTrafficPolicy"] = "Local"
            api.put(changed)
            api.forget()
            api.start(api.port)
            api.wait_for(lambda: api.open_watches >= 3)

            def is_known():
                probe.run(lab, chosen)
                return policies(served)["Local"]

            wait_until(is_known)
            assert served.is_ready()
            assert served.samples()["srcip_cluster_age_seconds"][0].value < 60


def service(name):
    (found,) = (
        item for item in ITEMS if item["kind"] == "Service" and item["metadata"]["name"] == name
    )
    return found


def policies(served):
    found = Counter()
    for labels, total in served.connections.items():
        if labels.service == "nodeport":
            found[labels.policy] += total
    return found


def test_the_clock_is_set(lab, monkeypatch):
    """What is seen after a step of the clock has the new time."""
    kube_proxy.load(lab, "iptables")
    namespaces = [netns.find(f"{lab.netns('node1')}=node1", "node1")]
    chosen = cases(modes=["iptables"], **S4)
    with closing(open_source(namespaces, Settings())) as kernel:
        pipeline = Pipeline(kernel)

        def next_time():
            probe.run(lab, chosen)
            connection, *_ = pipeline.judge(kernel.read(0))
            return connection.time_ns

        before = next_time()
        hour = 3_600_000_000_000
        real = source.clock_offset_ns()
        monkeypatch.setattr(source, "clock_offset_ns", lambda: real - hour)
        assert -hour < next_time() - before < -hour + 60_000_000_000


def test_the_port_of_a_dead_agent(lab):
    """
    After kill -9 nothing is left: neither its child nor a program, map or link in the kernel; and
    another takes its port and counts.
    """
    kube_proxy.load(lab, "iptables")
    with serving(lab) as served:
        pid = served.process.pid
        tasks = Path(f"/proc/{pid}/task").iterdir()
        children = [int(c) for task in tasks for c in (task / "children").read_text().split()]
        assert len(children) == 1
        held = bpf_objects.held_by(pid)
        assert {kind for kind, _ in held} == {"prog", "map", "link"}
        assert bpf_objects.left(held) == held
        served.process.kill()
        served.process.wait()
        wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
        wait_until(lambda: not bpf_objects.left(held))
        with serving(lab, "--port", str(served.port)) as again:
            probe.run(lab, cases(modes=["iptables"], scenarios=["S4"], families=["ipv4"]))
            assert again.connections_by_now() == 2
