"""The agent from its image, under what the DaemonSet grants it and nothing else."""

import json
import subprocess
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lab import kube_proxy, probe
from lab.hosts import NODES
from lab.scenarios import cases
from lab.services import OBJECTS
from tests.deploy.conftest import library
from tests.lab.commands import wait_until
from tests.lab.container import IMAGE, PROFILE, Pod, build, engine, seccomp_profile
from tests.unit.apiserver import TOKEN, ApiServer
from tracer.kernel import netns

pytestmark = pytest.mark.usefixtures("kernel")

library("helm_python")

from tests.deploy.chart import daemonset  # noqa: E402
from tests.deploy.test_dockerfile import canonical, pins  # noqa: E402

NODE = "node2"
RENEWED = TOKEN + "-renewed"
HOST_IP = str(NODES[NODE].address.of("ipv4"))


@pytest.fixture(scope="module")
def podman(kernel):
    """An engine that has the image."""
    with engine() as found:
        build(found)
        yield found


@pytest.fixture(scope="module")
def api(lab):
    """An API server on the node, with the lab's objects."""
    server = ApiServer()
    for item in json.loads(OBJECTS.read_text())["items"]:
        server.put(item)
    with netns.inside(lab.netns(NODE)):
        server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def pod(lab, api, tmp_path_factory):
    """The DaemonSet's pod on the node."""
    kube_proxy.load(lab, "iptables")
    directory = tmp_path_factory.mktemp("pod")
    account = directory / "account"
    account.mkdir()
    # As the kubelet makes it for a pod without runAsUser.
    (account / "ca.crt").write_bytes(api.authority.cert_pem.bytes())
    (account / "namespace").write_text("srcip")
    write_token(account, TOKEN)
    spec, _ = daemonset()
    return Pod(
        spec=spec,
        netns=lab.netns(NODE),
        fields={"spec.nodeName": NODE, "status.hostIP": HOST_IP},
        seccomp=seccomp_profile(directory),
        account=account,
        variables={"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": api.port},
    )


def write_token(account, token):
    path = account / "token"
    path.write_text(token)
    path.chmod(0o644)


class Agent:
    """The running container."""

    def __init__(self, podman, pod):
        self._podman = podman
        self._pod = pod
        (container,) = pod.spec["containers"]
        self._port = container["ports"][0]["containerPort"]
        self._probes = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in PROBES}

    def get(self, path):
        """Status and body, as the kubelet and Prometheus ask for it; None without an answer."""
        with netns.inside(self._pod.netns):
            connection = HTTPConnection(HOST_IP, self._port, timeout=5)
            try:
                connection.request("GET", path)
                answer = connection.getresponse()
                return answer.status, answer.read().decode()
            except OSError:
                return None
            finally:
                connection.close()

    def passes(self, kind):
        answer = self.get(self._probes[kind])
        return answer is not None and answer[0] == 200

    def samples(self):
        _, text = self.get("/metrics")
        return [each for family in text_string_to_metric_families(text) for each in family.samples]

    def by_service(self):
        """Connections by Service, verdict and cause."""
        found = Counter()
        for each in self.samples():
            if each.name == "srcip_connections_total" and each.labels["service"]:
                labels = (each.labels[name] for name in ("service", "verdict", "cause"))
                found[tuple(labels)] += int(each.value)
        return found

    def services(self):
        """How many Services it knows."""
        wanted = ("srcip_cluster_objects", {"kind": "service"})
        (found,) = (each for each in self.samples() if (each.name, each.labels) == wanted)
        return found.value

    def execute(self, *arguments):
        return self._podman.run("exec", "srcip", *arguments, is_checked=False)


PROBES = ("readiness", "liveness")


@contextmanager
def started(podman, pod):
    options, arguments = pod.options()
    podman.run("run", "--detach", "--name=srcip", "--pull=never", *options, IMAGE, *arguments)
    try:
        yield Agent(podman, pod)
    finally:
        podman.run("rm", "--force", "--time=0", "srcip")


@pytest.fixture(scope="module")
def agent(podman, pod):
    """The agent, ready."""
    with started(podman, pod) as agent:
        try:
            wait_until(lambda: all(agent.passes(kind) for kind in PROBES))
        except AssertionError:
            pytest.fail(podman.run("logs", "srcip").stderr)
        yield agent


def test_it_counts(lab, agent):
    """Connections of the node are counted by Service and cause."""
    chosen = cases(modes=["iptables"], scenarios=["S3"])
    before = agent.by_service()
    probe.run(lab, chosen)
    key = ("nodeport", "replaced", "external-traffic-policy-cluster")
    wait_until(lambda: agent.by_service()[key] == before[key] + len(chosen))


def test_it_reads_the_rules(agent):
    """It found kube-proxy's mode in the rules of the node."""
    modes = {
        each.labels["mode"] for each in agent.samples() if each.name == "srcip_kube_proxy_info"
    }
    assert modes == {"iptables"}


def test_it_is_nobody(agent):
    """Attached, it has no capability, cannot get one, and is confined by seccomp."""
    status = agent.execute("cat", "/proc/1/status").stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert set(fields["Uid"].split()) == set(fields["Gid"].split()) == {"65534"}
    assert {fields[f"Cap{each}"] for each in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert fields["NoNewPrivs"] == "1"
    assert fields["Seccomp"] == "2"


def test_the_root_is_read_only(agent):
    """Nothing can be written but /tmp, and nothing is left there."""
    for path in ("/x", "/var/x", "/run/x", "/opt/srcip/x"):
        done = agent.execute("touch", path)
        assert "Read-only file system" in done.stderr
    assert agent.execute("ls", "-A", "/tmp").stdout == ""


def test_a_renewed_token_is_read(api, pod, agent):
    """The kubelet renews the token: the agent reads the new one, as nobody, and goes on."""
    known = agent.services()
    write_token(pod.account, RENEWED)
    api.token = RENEWED
    api.disconnect()
    api.put({"kind": "Service", "apiVersion": "v1", "metadata": {"name": "a", "namespace": "b"}})
    wait_until(lambda: agent.services() == known + 1)


def test_commands_in_the_pod(agent):
    """What 'kubectl exec' runs there has the pod's capabilities, and works."""
    done = agent.execute("srcip", "doctor")
    assert done.returncode == 0, done.stdout
    assert "in use:   BPF netfilter links" in done.stdout
    assert "FAIL" not in done.stdout
    assert agent.execute("srcip", "flows", "--no-cluster").returncode == 0


def test_tracing_through_the_agent(lab, podman, agent):
    """What 'kubectl srcip NODE trace' runs in the pod shows connections that the agent judged."""
    arguments = ["trace", "--agent", "-o", "json", "--count=1", "--filter-service=default/nodeport"]
    process = subprocess.Popen(
        podman.command("exec", "srcip", "srcip", *arguments), stdout=subprocess.PIPE, text=True
    )

    def listens():
        clients = (each for each in agent.samples() if each.name == "srcip_stream_clients")
        return next(clients).value

    wait_until(listens)
    probe.run(lab, cases(modes=["iptables"], scenarios=["S3"], families=["ipv4"], protos=["tcp"]))
    line = json.loads(process.communicate(timeout=60)[0].splitlines()[0])
    assert process.returncode == 0
    assert (line["verdict"], line["node"]) == ("replaced", NODE)


def test_no_kernel_headers_and_no_pip(agent):
    """The image holds what the Dockerfile says: no header package, no compiler, no pip."""
    packages = agent.execute("dpkg-query", "--show", "--showformat=${Package}\n").stdout.split()
    assert {"python3-bpfcc", "linux-libc-dev", "iptables", "nftables"} <= set(packages)
    unwanted = ("linux-headers", "gcc", "cpp", "clang", "make", "libc6-dev", "python3-pip")
    # gcc-12-base is an empty package that every Debian has.
    found = {each for each in packages if each.startswith(unwanted)} - {"gcc-12-base"}
    assert not found
    assert agent.execute("python3", "-m", "pip").returncode != 0
    assert agent.execute("/opt/srcip/bin/python3", "-m", "pip").returncode != 0


def test_what_is_installed_is_pinned(agent):
    """From PyPI there are the versions of constraints.txt, and nothing else."""
    script = "from importlib.metadata import *; [print(d.name, d.version) for d in distributions()]"
    told = agent.execute("/opt/srcip/bin/python3", "-I", "-c", script).stdout.split("\n")
    installed = {canonical(name): version for name, version in map(str.split, filter(None, told))}
    del installed["srcip"]
    assert installed == pins()


NEEDED = ("BPF", "PERFMON", "NET_ADMIN", "SYSLOG")


@pytest.mark.parametrize("capability", NEEDED)
def test_without_a_capability(podman, pod, capability):
    """Without a required capability it exits, with a line that names it."""
    options, arguments = pod.options(without=[capability])
    done = podman.run(
        "run", "--rm", "--pull=never", *options, IMAGE, *arguments, is_checked=False, timeout=60
    )
    assert done.returncode == 1
    assert (
        done.stderr.strip() == f"srcip: tracing needs root: CAP_{capability} missing; try with sudo"
    )


def test_an_older_seccomp_profile(podman, pod):
    """If bpf() needs CAP_SYS_ADMIN it exits, and says that no capability of its own is missing."""
    theirs = replace(pod, seccomp=PROFILE)
    options, arguments = theirs.options()
    done = podman.run(
        "run", "--rm", "--pull=never", *options, IMAGE, *arguments, is_checked=False, timeout=60
    )
    assert done.returncode == 1
    assert "though no capability is missing: a seccomp profile" in done.stderr


def test_it_ends_when_asked(podman, pod, agent):
    """On SIGTERM it ends in order, within the time that the pod grants."""
    podman.run("stop", f"--time={pod.spec['terminationGracePeriodSeconds']}", "srcip")
    state = json.loads(podman.run("inspect", "srcip").stdout)[0]["State"]
    assert (state["Status"], state["ExitCode"]) == ("exited", 0)
