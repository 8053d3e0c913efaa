"""The systemd unit: sound, closed, and run by a real systemd in namespaces of its own."""

import re
import subprocess
import sys
import sysconfig
import zipfile
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import click
import pytest
import yaml

from tests.deploy.conftest import tool
from tests.kernel.box import package_root
from tests.lab.commands import wait_until
from tracer import cli
from tracer.errors import NetnsError
from tracer.kernel import netns

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy/systemd/srcip.service"
# A machine of its own: this one's files under a layer that takes what is written, with only our
# unit. What stands in {braces} is filled in.
MACHINE = """\
mount --make-rprivate /
mount -t tmpfs none {directory}
mkdir {directory}/upper {directory}/work {directory}/root
layers=lowerdir=/,upperdir={directory}/upper,workdir={directory}/work
mount -t overlay overlay -o $layers {directory}/root
cd {directory}/root
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 none sys/fs/cgroup
mount --rbind /dev dev
mount -t tmpfs tmpfs run
ip link set lo up
rm -rf opt/srcip etc/systemd/system
mkdir -p run/lock etc/default etc/systemd/system opt/srcip/bin opt/srcip/ours opt/srcip/others
for unit in systemd-udevd systemd-resolved systemd-networkd systemd-timesyncd; do
    ln -s /dev/null etc/systemd/system/$unit.service
done
cp {unit} etc/systemd/system
cp {files}/default etc/default/srcip
cp {files}/srcip opt/srcip/bin
mount --bind {files}/site opt/srcip/ours
mount --bind {others} opt/srcip/others
exec chroot . env -i container=srcip PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --system --unit=srcip.service --log-level=warning
"""
START = """\
#!/usr/bin/python3
import sys
sys.path[:0] = ["/opt/srcip/ours", "/opt/srcip/others"]
from tracer.cli import main
main()
"""
PORT = 19464
OPTIONS = f"SRCIP_SERVE_PORT={PORT}\nSRCIP_SERVE_NO_CLUSTER=1\nSRCIP_SERVE_NODE_NAME=node7\n"


def settings():
    return dict(re.findall(r"^(\w+)=(.*)", UNIT.read_text(), re.MULTILINE))


def test_verify(tmp_path):
    """Systemd knows every setting."""
    # The program need not be installed where this is tested.
    unit = tmp_path / UNIT.name
    unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(), flags=re.M))
    command = [tool("systemd-analyze"), "verify", "--man=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_exposure():
    """By systemd's own measure its exposure is below medium, and what the docs say."""
    command = [tool("systemd-analyze"), "security", "--offline=true", "--threshold=40", str(UNIT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout[-500:]
    measured = re.search(r"Overall exposure level for srcip\.service: (\d\.\d) ", done.stdout)[1]
    assert f"rates it {measured} of 10" in (ROOT / "docs/install.md").read_text()


def test_capabilities():
    """They are those of the chart, and CAP_CHOWN for a group that may be named."""
    values = yaml.safe_load((ROOT / "deploy/helm/srcip/values.yaml").read_text())
    chart = {f"CAP_{each}" for each in values["securityContext"]["capabilities"]}
    assert set(settings()["CapabilityBoundingSet"].split()) == chart | {"CAP_CHOWN"}
    documented = (ROOT / "docs/install.md").read_text()
    assert all(each in documented for each in chart)


def test_what_is_run_is_understood():
    """The command line takes what the unit runs; options come from the environment."""
    command = settings()["ExecStart"].split()
    assert command[:2] == ["/opt/srcip/bin/srcip", "serve"]
    parent = click.Context(cli.cli)
    cli.cli.get_command(parent, "serve").make_context("serve", command[2:], parent=parent)


@pytest.fixture(scope="module")
def files(kernel, tmp_path_factory):
    """The wheel, unpacked, and what else the machine needs."""
    directory = tmp_path_factory.mktemp("systemd")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"),
            *("--no-build-isolation", "--wheel-dir", str(directory), str(package_root())),
        ],
        check=True,
        capture_output=True,
    )
    (wheel,) = directory.glob("srcip-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory / "site")
    (directory / "default").write_text(OPTIONS)
    (directory / "srcip").write_text(START)
    (directory / "srcip").chmod(0o755)
    (directory / "machine").mkdir()
    return directory


class Machine:
    def __init__(self, init):
        self._init = init
        self._root = Path(f"/proc/{init}/root")

    def run(self, *command):
        entered = ["nsenter", f"--target={self._init}", "--all", "--root", "--wd", *command]
        done = subprocess.run(entered, capture_output=True, text=True, check=False, timeout=30)
        return done.stdout.strip()

    def state(self):
        return self.run("systemctl", "show", "--property=SubState", "--value", "srcip.service")

    def agent(self):
        """Fields of the agent's status."""
        pid = self.run("systemctl", "show", "--property=MainPID", "--value", "srcip.service")
        lines = (self._root / f"proc/{pid}/status").read_text().splitlines()
        return dict(line.split(":\t", 1) for line in lines if ":\t" in line)

    def get(self, path):
        with netns.inside(Path(f"/proc/{self._init}/ns/net")):
            connection = HTTPConnection("127.0.0.1", PORT, timeout=5)
            try:
                connection.request("GET", path)
                answer = connection.getresponse()
                return answer.status, answer.read().decode()
            except OSError:
                return None, ""
            finally:
                connection.close()

    def has_socket(self):
        return (self._root / "run/srcip/agent.sock").is_socket()

    def log(self):
        return self.run("journalctl", "--unit=srcip.service", "--no-pager", "--output=cat")


@contextmanager
def booted(files):
    script = MACHINE.format(
        directory=files / "machine", unit=UNIT, files=files, others=sysconfig.get_path("purelib")
    )
    spaces = ["--mount", "--pid", "--uts", "--ipc", "--cgroup", "--net", "--kill-child", "--fork"]
    process = subprocess.Popen(
        ["unshare", *spaces, "sh", "-ec", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        wait_until(lambda: children.read_text().split() or process.poll() is not None)
        assert process.poll() is None, process.stderr.read()
        yield Machine(children.read_text().split()[0])
    finally:
        process.kill()
        print(process.communicate()[1])


def test_under_systemd(files, own_mounts):
    """The unit starts, attaches, runs as nobody, and stops on request, despite its restrictions."""
    tool("systemctl")
    with booted(files) as machine:
        try:
            wait_until(lambda: machine.get("/readyz")[0] == 200)
        except (AssertionError, NetnsError):
            pytest.fail(machine.log() or "the machine is gone")
        assert machine.state() == "running"
        agent = machine.agent()
        assert set(agent["Uid"].split()) == {"65534"}
        assert {agent[f"Cap{each}"] for each in ("Prm", "Eff", "Bnd")} == {"0" * 16}
        assert (agent["NoNewPrivs"], agent["Seccomp"]) == ("1", "2")
        assert 'node="node7"' in machine.get("/metrics")[1]
        assert machine.has_socket()
        machine.run("systemctl", "stop", "srcip.service")
        assert machine.state() == "dead"
        assert "Main process exited" not in machine.log()
