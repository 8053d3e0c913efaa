"""What 'srcip serve' and 'srcip trace' take to start, and that nothing of it is left afterwards."""

import json
import signal
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kernel.box import PATIENCE_S, SERVER, package_root, wait_until
from tests.lab.commands import SRCIP
from tests.unit.apiserver import running

pytestmark = pytest.mark.usefixtures("kernel")

# What docs/security.md lists: to trace, and to become nobody for good.
TO_TRACE = ("bpf", "perfmon", "net_admin", "syslog")
TO_DROP = ("setuid", "setgid", "setpcap")
NOBODY = "65534"


@pytest.fixture(autouse=True)
def rules(box):
    """A rule that asks for conntrack: without one there are no connections."""
    box.rules("table ip x { chain post { type nat hook postrouting priority 100; masquerade; } }")


def with_only(*capabilities):
    """Root as a container with these capabilities has it."""
    kept = ",".join(f"+{each}" for each in capabilities)
    return ["setpriv", f"--bounding-set=-all,{kept}", "--inh-caps=-all", "--ambient-caps=-all"]


def inside(box):
    """In the node's network namespace, and no other: it needs not be entered."""
    return ["nsenter", f"--net=/run/netns/{box.names['node']}"]


def ended(command):
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


class Served:
    """A running agent in the box."""

    def __init__(self, box, process, port, messages):
        self.box = box
        self.process = process
        self.port = port
        self.messages = messages

    def samples(self, name):
        printed = self.get("/metrics")
        return [line for line in printed.splitlines() if line.startswith(name)]

    def get(self, path):
        script = f"import urllib.request as u; print(u.urlopen('{self.url(path)}').read().decode())"
        return ended([*inside(self.box), "python3", "-c", script]).stdout

    def url(self, path):
        return f"http://127.0.0.1:{self.port}{path}"

    def family(self):
        """The processes: the agent, and its children."""
        pid = self.process.pid
        tasks = Path(f"/proc/{pid}/task").iterdir()
        children = [c for task in tasks for c in (task / "children").read_text().split()]
        return pid, [int(child) for child in children]


@contextmanager
def serving(box, *arguments, prefix=(), cluster=("--no-cluster",)):
    command = [
        *inside(box), *prefix, *SRCIP, "serve", "--port", "0", *cluster, "--drain-interval", "1",
        *arguments,
    ]  # fmt: skip
    if "--stream-socket" not in arguments:
        command.append("--no-stream")
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    try:
        messages, port = [], None
        while port is None:
            line = process.stderr.readline()
            assert line, (process.wait(), messages)
            messages.append(line)
            if line.startswith("serving on "):
                port = int(line.split("127.0.0.1:")[1].split("/")[0])
        yield Served(box, process, port, messages)
    finally:
        process.kill()
        process.communicate()


def statuses(pid):
    """What /proc shows of each thread of a process."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        lines = (task / "status").read_text().splitlines()
        yield dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def names_in(mask):
    """The capabilities in a mask, as setpriv names them."""
    done = ended(["capsh", f"--decode={mask}"])
    found = done.stdout.strip().partition("=")[2]
    return {name.removeprefix("cap_") for name in found.split(",") if name}


def assert_powerless(pid, *, uid=NOBODY):
    threads = list(statuses(pid))
    for status in threads:
        assert set(status["Uid"].split()) == {uid}
        assert status["NoNewPrivs"] == "1"
        for kind in ("CapEff", "CapPrm", "CapInh", "CapAmb", "CapBnd"):
            assert int(status[kind], 16) == 0, (status["Name"], kind)
    return len(threads)


def test_with_only_what_is_listed(box):
    """It starts, counts, and keeps no capability; its child keeps those for reading rules."""
    with serving(box, prefix=with_only(*TO_TRACE, *TO_DROP)) as served:
        assert len(served.messages) == 1
        wait_until(lambda: "srcip_ready 1.0" in served.get("/metrics"))
        send(box)
        wait_until(lambda: served.samples("srcip_connections_total"))
        pid, (keeper,) = served.family()
        assert_powerless(pid)
        (status,) = statuses(keeper)
        expected = {"net_admin", "setuid", "setgid"}
        assert names_in(status["CapPrm"]) == names_in(status["CapBnd"]) == expected
        assert status["NoNewPrivs"] == "1"


@pytest.mark.parametrize("command", ["serve", "trace"])
@pytest.mark.parametrize("missing", TO_TRACE)
def test_without_one_of_them(box, command, missing):
    """One line that names it, and exit 1."""
    kept = [each for each in (*TO_TRACE, *TO_DROP) if each != missing]
    done = ended([*inside(box), *with_only(*kept), *SRCIP, command, "--no-cluster"])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"srcip: tracing needs root: CAP_{missing.upper()} missing; try with sudo\n"
    )


@pytest.mark.parametrize("missing", TO_DROP)
def test_without_what_dropping_takes(box, missing):
    """It still runs, has no capability in any thread, and a line names what remains."""
    kept = [each for each in (*TO_TRACE, *TO_DROP) if each != missing]
    with running() as api, tempfile.TemporaryDirectory() as directory:
        cluster = ["--kubeconfig", api.kubeconfig(Path(directory) / "config")]
        with serving(box, prefix=with_only(*kept), cluster=cluster) as served:
            assert len(served.messages) == 2
            assert served.messages[0].startswith(f"srcip: CAP_{missing.upper()} missing: ")
            threads = list(statuses(served.process.pid))
            assert len(threads) > 2
            for status in threads:
                assert {int(status[kind], 16) for kind in ("CapEff", "CapPrm")} == {0}
                assert status["NoNewPrivs"] == "1"
                uid = NOBODY if missing == "setpcap" else "0"
                assert set(status["Uid"].split()) == {uid}


def test_another_namespace_takes_sys_admin(box):
    """To enter one takes it; without, one line says so."""
    where = [f"--netns={box.names['node']}"]
    done = ended([*with_only(*TO_TRACE, *TO_DROP), *SRCIP, "serve", "--no-cluster", *where])
    assert done.returncode == 1
    assert "CAP_SYS_ADMIN" in done.stderr
    assert done.stderr.count("\n") == 1


def test_every_thread(box, tmp_path):
    """The watch's thread starts while we are root; it has nothing left either."""
    with running() as api:
        # The server is on the host: the box's own loopback is another one.
        config = api.kubeconfig(tmp_path / "config")
        with serving(box, cluster=["--kubeconfig", config]) as served:
            pid, _ = served.family()
            wait_until(lambda: "objects are not in" in not_ready(served))
            assert assert_powerless(pid) >= 3


def not_ready(served):
    script = (
        "import urllib.request as u, urllib.error as e\n"
        f"try: u.urlopen('{served.url('/readyz')}')\n"
        "except e.HTTPError as error: print(error.read().decode())"
    )
    return ended([*inside(served.box), "python3", "-c", script]).stdout


def as_a_user(*capabilities):
    """Another user, with capabilities as systemd gives them."""
    given = ",".join(f"+{each}" for each in capabilities)
    return [
        "setpriv", "--reuid=12345", "--regid=12345", "--clear-groups",
        f"--inh-caps=-all,{given}", f"--ambient-caps=-all,{given}", "--no-new-privs",
    ]  # fmt: skip


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize("command", ["serve", "trace"])
def test_another_user(box, command):
    """The capabilities are not enough to compile: one line says so."""
    done = ended([*inside(box), *as_a_user(*TO_TRACE), *SRCIP, command, "--no-cluster"])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "srcip: tracing needs the user root besides these capabilities, because BCC compiles for "
        "no other; try with sudo\n"
    )


@pytest.mark.usefixtures("others")
def test_flows_as_another_user(box):
    """Reading conntrack and rules takes CAP_NET_ADMIN alone, of whatever user."""
    send(box)
    command = [*inside(box), *as_a_user("net_admin"), *SRCIP, "flows", "--no-cluster", "-o", "json"]
    done = ended(command)
    assert done.returncode == 0, done.stderr
    (line,) = (
        line for line in map(json.loads, done.stdout.splitlines()) if line.get("proto") == "udp"
    )
    # The rule was read, by a program that the child ran.
    assert line["rule"]["table"] == "x"


def send(box, host="client"):
    with box.socket(host, 4, 2) as sock:
        sock.sendto(b"?", (SERVER[4], 8080))


@pytest.mark.parametrize("has_tmp", [True, False], ids=["with /tmp", "without"])
def test_a_read_only_root(box, has_tmp):
    """With no_new_privs and a root file system that cannot be written to, as containers have it."""
    script = ["mount --make-rprivate /"]
    # Each mount of its own: /tmp may be one, and so may /dev/shm.
    script += ["mount -o remount,bind,ro /"]
    checkout = package_root()
    for directory in ("/tmp", "/var/tmp", "/run", "/root", "/home", checkout):
        if Path(directory).is_dir():
            script.append(f"mount --bind {directory} {directory}")
            script.append(f"mount -o remount,bind,ro {directory}")
    if has_tmp:
        script += [f"cd {checkout}", "mount -t tmpfs tmpfs /tmp"]
        if checkout.is_relative_to("/tmp"):
            script += [f"mkdir -p {checkout}", f"mount --bind . {checkout}"]
    script += ["mount -t tmpfs tmpfs /dev/shm"]
    script += ["if touch /x 2>/dev/null; then exit 9; fi", 'exec "$@"']
    prefix = [
        "unshare", "-m", "sh", "-ec", "; ".join(script), "sh",
        *with_only(*TO_TRACE, *TO_DROP), "--no-new-privs", "env", "PYTHONDONTWRITEBYTECODE=1",
    ]  # fmt: skip
    with serving(box, prefix=prefix) as served:
        wait_until(lambda: "srcip_ready 1.0" in served.get("/metrics"))
        send(box)
        wait_until(lambda: served.samples("srcip_connections_total"))
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(PATIENCE_S) == 0


def test_what_comes_after_the_drop(box):
    """A later interface and address are known: a client there counts as the node's."""
    with serving(box, prefix=with_only(*TO_TRACE, *TO_DROP)) as served:
        wait_until(lambda: "srcip_ready 1.0" in served.get("/metrics"))
        box.run("node", "ip", "link", "add", "late0", "type", "veth")
        box.run("node", "ip", "addr", "add", "203.0.113.77/32", "dev", "late0")
        box.run("node", "ip", "link", "set", "late0", "up")

        def is_node_s():
            with box.socket("node", 4, 2) as sock:
                sock.bind(("203.0.113.77", 0))
                sock.sendto(b"?", (SERVER[4], 8080))
            told = served.samples("srcip_connections_total")
            return any('client_class="node"' in each and 'proto="udp"' in each for each in told)

        wait_until(is_node_s)
