"""The lab against what the real cluster did, and against its own promise to leave nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from lab import claim, hosts, kube_proxy, probe, topology, wiring
from lab.scenarios import cases
from tests.lab.commands import wait_until
from tracer.errors import LabError
from tracer.kernel.netns import NETNS_DIR

pytestmark = pytest.mark.usefixtures("kernel")

ROOT = Path(__file__).parents[2]

# A lab in a process of its own: says its name when it is built, and stays until it is killed.
VICTIM = """
import sys
from pathlib import Path
from lab import claim, topology
claim.LOCK_DIR = Path(sys.argv[1])
with topology.build() as lab:
    print(lab.id, flush=True)
    sys.stdin.read()
"""


def observed(mode):
    lines = (kube_proxy.DATA / "observed.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {
        (row["scenario"], row["family"], row["proto"]): (row["client_address"], row["pod"])
        for row in rows
        if row["mode"] == mode
    }


def printed(answer):
    """What ``observed.jsonl`` says for such an answer."""
    return str(answer.client_address or answer.outcome.upper()), answer.pod


def namespaces():
    return {path.name for path in NETNS_DIR.glob(f"{claim.PREFIX}*")}


def locks():
    return {path.stem for path in claim.LOCK_DIR.glob("*.lock")}


def commands_with(text):
    """Return the ids of the processes whose command line has this text."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in path.read_bytes():
                found.add(path.parent.name)
        except OSError:
            continue  # it has just ended
    return found


@contextmanager
def victim():
    with subprocess.Popen(
        [sys.executable, "-c", VICTIM, claim.LOCK_DIR],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.fixture
def own_locks(tmp_path, monkeypatch):
    """Keep the locks apart, so that no lab elsewhere on the machine cleans up before the test."""
    monkeypatch.setattr(claim, "LOCK_DIR", tmp_path)


@pytest.mark.parametrize("mode", kube_proxy.MODES)
def test_backends_see_what_the_real_cluster_saw(lab, mode):
    """Every connection ends as it did with the real kube-proxy, and prints the same address."""
    kube_proxy.load(lab, mode)
    answers = probe.run(lab, cases(modes=[mode]))
    assert [str(case) for case, answer in answers.items() if not met(case, answer)] == []
    # Over IPv6 TCP a REJECT is a race (see lab/table.py). All else is exactly as recorded.
    sure = {
        (case.scenario.id, case.family, case.proto): printed(answer)
        for case, answer in answers.items()
        if case.scenario.observed and not case.expected_or_outcome
    }
    recorded = observed(mode)
    assert sure == {key: recorded[key] for key in sure}
    assert len(sure) == 100
    assert len(recorded) == 102


def met(case, answer):
    return case.is_met(answer.outcome, answer.client_address)


def test_preserved_connections_show_the_socket_of_the_client(lab):
    """Where nothing is translated, the backend prints the name that the client's socket has."""
    kube_proxy.load(lab, "nftables")
    answers = probe.run(lab, cases(modes=["nftables"], scenarios=["S1", "S2", "S5", "S8a", "S17b"]))
    for case, answer in answers.items():
        assert answer.local == (answer.client_address, answer.client_port), case


def test_client_knows_its_socket_whatever_comes_of_it(lab):
    """Address and port of the client's own socket are known on refusal and time-out too."""
    kube_proxy.load(lab, "nftables")
    answers = probe.run(lab, cases(modes=["nftables"], scenarios=["S6", "S14e", "S15b", "S16b"]))
    assert {answer.outcome for answer in answers.values()} == {"refused", "timeout"}
    for case, answer in answers.items():
        source, port = answer.local
        if case.scenario.id == "S14e":
            assert source.is_loopback
        else:
            assert source in {hosts.CLIENT.of(case.family), case.source}
        assert port > 0


def test_conntrack_agrees_with_both_ends(lab):
    """Node2's conntrack entry has the client's socket and the address that the backend printed."""
    if not shutil.which("conntrack"):
        pytest.skip("the conntrack tool is not installed")
    kube_proxy.load(lab, "iptables")
    for case, answer in probe.run(lab, cases(modes=["iptables"], scenarios=["S3"])).items():
        source, port = answer.local
        arguments = ("-L", "-f", case.family, "-p", case.proto, "-s", str(source))
        entries = lab.run("node2", "conntrack", *arguments, "--sport", str(port))
        reply = f"src={hosts.PODS['p11'].address.of(case.family)} dst={answer.client_address} "
        assert reply in entries
        assert f"dport={answer.client_port}" in entries


def test_answers_are_told_as_they_come(lab):
    """The callback gets each answer once, a refusal before a time-out."""
    kube_proxy.load(lab, "nftables")
    told = []
    answers = probe.run(
        lab, cases(modes=["nftables"], scenarios=["S6", "S5"]), lambda *one: told.append(one)
    )
    assert dict(told) == answers
    assert [answer.outcome for _, answer in told] == ["answered"] * 4 + ["timeout"] * 4


def test_slow_callback_costs_no_answer(lab):
    """Answers that came in time are read even if the callback takes longer than the time-out."""
    kube_proxy.load(lab, "nftables")
    pauses = iter([probe.TIMEOUT_S])
    answers = probe.run(
        lab,
        cases(modes=["nftables"], protos=["udp"], scenarios=["S1", "S2", "S5"]),
        lambda *one: time.sleep(next(pauses, 0)),
    )
    assert {answer.outcome for answer in answers.values()} == {"answered"}


def test_error_of_the_callback_comes_through(lab):
    """An error of the caller's own, such as a closed output, is not taken for one of the lab."""
    kube_proxy.load(lab, "nftables")
    with pytest.raises(BrokenPipeError):
        probe.run(lab, cases(modes=["nftables"], scenarios=["S1"]), broken_pipe)


def broken_pipe(case, answer):
    raise BrokenPipeError


def test_cases_of_two_modes_cannot_run_together(lab):
    """A node has the rules of one mode, so a mixture is a mistake of the caller."""
    with pytest.raises(ValueError, match="several modes"):
        probe.run(lab, cases(scenarios=["S1"]))


def test_nodeports_on_loopback_are_counted(lab):
    """The rules keep kube-proxy's accounting: it counts the two IPv4 connections of S14e."""
    if not shutil.which("nfacct"):
        pytest.skip("the nfacct tool is not installed")
    kube_proxy.load(lab, "iptables")
    before = accounted(lab)
    probe.run(lab, cases(modes=["iptables"], scenarios=["S14e"]))
    assert accounted(lab) == before + 2


def accounted(lab):
    (line,) = (
        line
        for line in lab.run("node1", "nfacct", "list").splitlines()
        if "localhost_nps_accepted_pkts" in line
    )
    return int(line.split("pkts = ")[1].split(",")[0])


def test_rules_load_without_accounting(lab, monkeypatch):
    """Where nfacct is missing, the rules are loaded without that match and forward the same."""
    run = topology.Lab.run

    def without_nfacct(self, host, *argv, stdin=""):
        if argv[0] == "nfacct":
            raise LabError("cannot run nfacct: it is not installed")
        return run(self, host, *argv, stdin=stdin)

    kube_proxy.load(lab, "nftables")
    monkeypatch.setattr(topology.Lab, "run", without_nfacct)
    kube_proxy.load(lab, "iptables")
    assert "nfacct" not in lab.run("node1", "iptables-nft-save")
    answers = probe.run(lab, cases(modes=["iptables"], scenarios=["S14e"]))
    assert all(met(case, answer) for case, answer in answers.items())


def test_loading_replaces_the_rules_of_the_other_mode(lab):
    """Of two modes loaded in turn only the last one's rules are there."""
    kube_proxy.load(lab, "iptables")
    kube_proxy.load(lab, "nftables")
    tables = lab.run("node2", "nft", "list", "tables").splitlines()
    assert sorted(tables) == [
        "table inet lab-masq",
        "table ip kube-proxy",
        "table ip6 kube-proxy",
    ]


def test_backends_listen_in_the_pods(lab):
    """``ss`` shows both servers of a pod in both families."""
    listening = lab.run("p21", "ss", "-Hlntu")
    for name in ("0.0.0.0:8080", "[::]:8080", "0.0.0.0:8053", "[::]:8053"):
        assert name in listening


@pytest.mark.parametrize("node", hosts.NODES)
def test_router_sends_to_the_chosen_node(lab, node):
    """Load-balancer and Service addresses go to the node that was named last, in both families."""
    lab.route_via(node)
    for address in ("203.0.113.50", "10.0.170.92", "2001:db8:1b::50", "2001:db8:96::5c"):
        family = "ipv6" if ":" in address else "ipv4"
        route = lab.run("router", "ip", "route", "get", address)
        assert f"via {hosts.NODES[node].address.of(family)} " in route


def test_failing_command_is_one_line(lab):
    """A command that fails in the lab is one line: where, what, and its output."""
    with pytest.raises(LabError, match=r"^ip route get nonsense failed on p11 \(1\): .+$") as error:
        lab.run("p11", "ip", "route", "get", "nonsense")
    assert "\n" not in str(error.value)


def test_missing_tool_is_one_line(lab):
    """A tool that is not installed is named."""
    with pytest.raises(LabError, match="cannot run no-such-tool: it is not installed"):
        lab.run("p11", "no-such-tool")


def test_unknown_host_is_a_mistake_of_the_caller(lab):
    """A host that the lab does not have is refused with those that it has."""
    with pytest.raises(ValueError, match="no host 'p99' in the lab; there are client, router"):
        lab.netns("p99")


@pytest.mark.parametrize(
    ("scenario", "node", "comment"),
    [
        ("S6", "node2", "default/nodeport-local:http has no local endpoints"),
        ("S8b", "node2", "default/loadbalancer-local:http has no local endpoints"),
        ("S15b", "node1", "default/no-endpoints:http has no endpoints"),
        ("S19b", "node2", "default/internal-local:http has no local endpoints"),
    ],
)
def test_dropped_connection_is_one_packet_at_its_rule(lab, scenario, node, comment):
    """kube-proxy's own rule takes the connection, and takes it once: no SYN is sent again."""
    kube_proxy.load(lab, "iptables")
    before = {family: kube_proxy.drops(lab, node, family) for family in hosts.FAMILIES}
    probe.run(lab, cases(modes=["iptables"], protos=["tcp"], scenarios=[scenario]))
    for family in hosts.FAMILIES:
        assert kube_proxy.drops(lab, node, family)[comment] == before[family][comment] + 1


def test_two_labs_work_side_by_side(lab):
    """A second lab gets names of its own and forwards by its own rules, while the first goes on."""
    with topology.build() as other:
        assert other.id != lab.id
        kube_proxy.load(lab, "iptables")
        kube_proxy.load(other, "nftables")
        for one, mode in ((lab, "iptables"), (other, "nftables")):
            answers = probe.run(one, cases(modes=[mode], scenarios=["S2", "S3", "S14e"]))
            assert all(met(case, answer) for case, answer in answers.items())


def test_caller_namespace_is_left_alone(kernel):
    """While a lab lives, the caller's own namespace has the devices and settings it had before."""
    before = own_network()
    with topology.build():
        assert own_network() == before
    assert own_network() == before


def own_network():
    settings = ("ipv4/ip_forward", "ipv4/conf/all/rp_filter", "ipv6/conf/all/accept_dad")
    shown = ("link", "address", "rule")
    return (
        [subprocess.check_output(["ip", "-br", what]) for what in shown],
        [Path("/proc/sys/net", setting).read_text() for setting in settings],
    )


def test_nothing_is_left_after_the_end(kernel):
    """The end of a lab takes its namespaces, its lock and its servers."""
    with topology.build() as lab:
        assert {lab.netns(host).name for host in hosts.HOSTS} <= namespaces()
        assert commands_with(lab.id)
    assert not left_of(lab.id)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_after_an_exception(kernel, error):
    """An exception in the block, Ctrl-C too, comes through and the lab is removed."""
    with pytest.raises(error), topology.build() as lab:
        raise error
    assert not left_of(lab.id)


def test_nothing_is_left_of_a_lab_that_cannot_be_built(kernel, monkeypatch):
    """If building fails half-way, what was built is removed, and the reason is one line."""
    unique = f"{os.getpid():06x}"[-6:]
    monkeypatch.setattr(claim, "secrets", SimpleNamespace(token_hex=lambda count: unique))
    monkeypatch.setattr(wiring, "routes_via", lambda node: ["route add nonsense"])
    with pytest.raises(LabError, match="failed on router"), topology.build():
        pytest.fail("built with a wrong route")
    assert not left_of(f"{claim.PREFIX}{unique}")


def test_interrupted_removal_is_done_by_the_next(kernel, own_locks, monkeypatch):
    """If the end of a lab is interrupted, its lock stays and the next start removes the rest."""
    with (
        monkeypatch.context() as patch,
        pytest.raises(KeyboardInterrupt),
        topology.build() as lab,
    ):
        patch.setattr(topology, "_remove_namespaces", interrupted)
    assert left_of(lab.id)
    assert topology.remove_leftovers() == [lab.id]
    assert not left_of(lab.id)


def interrupted(name):
    raise KeyboardInterrupt


def test_killed_lab_is_removed_by_the_next(lab, own_locks):
    """A lab killed with SIGKILL is removed at the next start, and a living one is not touched."""
    with victim() as (living, living_name), victim() as (killed, name):
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        wait_until(lambda: not commands_with(name))  # its servers die with it
        assert len([one for one in namespaces() if one.startswith(name)]) == len(hosts.HOSTS)
        with topology.build() as third:
            assert not left_of(name)
            assert len([one for one in namespaces() if one.startswith(living_name)]) == len(
                hosts.HOSTS
            )
            assert commands_with(living_name)
            assert topology.remove_leftovers() == []
        living.kill()
        living.wait()
        assert topology.remove_leftovers() == [living_name]
    assert not left_of(living_name) | left_of(third.id)


def test_lab_without_rights_is_one_line(kernel):
    """A user who may not build a lab gets one line."""
    os.seteuid(65534)
    try:
        with (
            pytest.raises(LabError, match=r"^cannot use .*; the lab needs root$"),
            topology.build(),
        ):
            pytest.fail("built without rights")
    finally:
        os.seteuid(0)


def test_foreign_namespaces_are_never_removed(kernel):
    """A namespace without a lock of ours stays, even if its name looks like ours."""
    name = f"{claim.PREFIX}{os.getpid():06x}-mine"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        topology.remove_leftovers()
        assert name in namespaces()
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def left_of(name):
    """Return everything that is there of a lab."""
    return (
        {one for one in namespaces() if one.startswith(f"{name}-")}
        | {one for one in locks() if one == name}
        | commands_with(name)
    )
