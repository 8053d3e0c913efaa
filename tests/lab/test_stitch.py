"""Each node recorded by a process of its own, and the recordings joined: every scenario."""

import itertools
import shutil
import signal
from contextlib import ExitStack

import pytest

from lab import kube_proxy, probe, relay
from lab.scenarios import cases
from tests.lab.commands import OPTIONS, PATIENCE_S, lines, srcip, tracing, wait_until
from tests.lab.flows import HEADERS, TRUSTED, key_of, keys, relayed

pytestmark = pytest.mark.usefixtures("kernel")

NODES = ("node1", "node2")


def recorded(lab, directory, chosen, *arguments):
    """Make connections while each node is recorded by itself; return answers and recordings."""
    files = {node: directory / f"{node}.srcip" for node in NODES}
    with ExitStack() as stack:
        runs = []
        for node in NODES:
            (directory / node).mkdir()
            options = ["-o", "json", "--record", str(files[node]), *arguments]
            tracer = tracing(lab, directory / node, *options, nodes=(node,))
            runs.append(stack.enter_context(tracer))
        stack.enter_context(relay.serving(lab, relayed(chosen)))
        answers = probe.run(lab, chosen)
        outputs = [output for _, output in runs]
        wait_until(lambda: have_told(outputs, answers))
        for process, _ in runs:
            process.send_signal(signal.SIGINT)
        assert [process.wait(PATIENCE_S) for process, _ in runs] == [0, 0]
    return answers, files


def have_told(outputs, answers):
    """Whether the nodes have printed where each connection came from and what arrived."""
    printed = [line for output in outputs for line in output.read_text().splitlines(True)]
    told = lines("".join(each for each in printed if each.endswith("\n")))
    sent = {key for line in told for key in keys(line)}
    arrived = {
        (line["proto"], each["reply"]["dst"], each["reply"]["dport"])
        for line in told
        if line.get("backend", {}).get("node")
        for each in line.get("nodes", [line])
        if each["node"] == line["backend"]["node"]
    }
    return all(
        key_of(case, answer) in sent
        and (
            answer.client_address is None
            or case.scenario.service is None
            or (case.proto, str(answer.client_address), answer.client_port) in arrived
        )
        for case, answer in answers.items()
    )


def stitched(*arguments):
    done = srcip("stitch", *map(str, arguments), *OPTIONS, *TRUSTED, "-o", "json")
    assert done.returncode == 0, done.stderr
    *paths, summary = lines(done.stdout)
    return paths, summary


def by_case(paths, answers):
    found = {}
    for path in paths:
        for key in keys(path) if path["direction"] == "original" else ():
            found.setdefault(key, []).append(path)
    return {case: found.get(key_of(case, answer), []) for case, answer in answers.items()}


def nodes(path):
    return [each["node"] for each in path["nodes"]]


@pytest.fixture(scope="module", params=kube_proxy.MODES)
def run(request, lab, tmp_path_factory):
    """All scenarios of a mode: what the clients got, and the nodes' recordings."""
    kube_proxy.load(lab, request.param)
    chosen = cases(modes=[request.param], has_relay=True)
    return recorded(lab, tmp_path_factory.mktemp("stitch"), chosen, *HEADERS, *TRUSTED)


def test_every_scenario(run):
    """Joined from separate recordings, each connection is one path with the table's verdict."""
    answers, files = run
    paths, summary = stitched(*files.values())
    assert not any(summary["lost"].values())
    for case, found in by_case(paths, answers).items():
        answer = answers[case]
        (path,) = found
        seen = path.get("seen_source")
        assert (path["verdict"], path.get("cause")) == (case.verdict, case.cause), case
        assert seen == (str(answer.client_address) if answer.client_address else None), case
        assert "missing" not in path, case
        if case.proto == "tcp" and answer.client_address and "pod" in path["backend"]:
            accepted = {"address": seen, "port": answer.client_port}
            assert path["accepted"] == accepted, case


def test_over_both_nodes(run):
    """S3 and S7b cross both nodes, and node2 proves node1's guess."""
    answers, files = run
    paths, _ = stitched(*files.values())
    for case, (path,) in by_case(paths, answers).items():
        if case.scenario.id in ("S3", "S7b"):
            assert nodes(path) == ["node2", "node1"], case
            assert path["at"] == {"node": "node2"}
            verdicts = [each["verdict"] for each in path["nodes"]]
            assert verdicts == ["replaced", "replaced-upstream"]
            assert any(line.startswith("proof: node1 received") for line in path["evidence"])
            # node2's recording holds its rules.
            assert path["rule"]["owner"] == "kube-proxy"


def test_behind_a_proxy(run):
    """What a proxy opens is joined over the nodes, with the client that it names."""
    answers, files = run
    paths, _ = stitched(*files.values())
    crossed = {"S9a": ["node1"], "S9b": ["node2", "node1"], "S9c": ["node1"]}
    told = set()
    for case, (path,) in by_case(paths, answers).items():
        if case.scenario.relay is not None:
            told.add(case.scenario.id)
            assert nodes(path) == crossed[case.scenario.id], case
            assert path["proxy"]["client"]["address"] == str(answers[case].local[0]), case
            assert path["at"] == {"node": crossed[case.scenario.id][0]}, case
    assert told == crossed.keys()


def test_order_and_copies(run, tmp_path):
    """Recordings in any order, and one of them given twice, make the same paths."""
    _, files = run
    paths, summary = stitched(*files.values())
    assert stitched(*reversed(files.values())) == (paths, summary)
    copy = shutil.copy(files["node1"], tmp_path / "copy")
    again, told = stitched(copy, *files.values())
    assert again == paths
    assert "were in two recordings" in told["notes"][0]


@pytest.mark.parametrize("node", NODES)
def test_a_half_missing(run, node):
    """Alone, a node's recording shows what it knows, and says what it lacks."""
    answers, files = run
    paths, _ = stitched(files[node])
    other = next(each for each in NODES if each != node)
    for case, found in by_case(paths, answers).items():
        if case.scenario.id in ("S3", "S7b") and node == "node2":
            (path,) = found
            assert path["verdict"] == "replaced"
            (line,) = path["missing"]
            assert line.startswith(f"what happened on {other}, where the backend default/p11 runs")
    if node == "node1":
        upstream = [path for path in paths if path["verdict"] == "replaced-upstream"]
        assert upstream
        assert all(
            "belongs to node2, which was not traced" in path["missing"][0] for path in upstream
        )


def test_as_diagram(lab, tmp_path):
    """With hops recorded on both nodes, the picture shows both, hop by hop."""
    kube_proxy.load(lab, "iptables")
    chosen = cases(modes=["iptables"], scenarios=["S3"], families=["ipv4"], protos=["tcp"])
    answers, files = recorded(lab, tmp_path, chosen, "--packets", "1")
    drawn = srcip("stitch", *map(str, files.values()), *OPTIONS, "-o", "diagram")
    assert drawn.returncode == 0, drawn.stderr
    assert "client --> node2 --> node1 --> default/p11" in drawn.stdout
    assert "SNAT at node2" in drawn.stdout
    paths, _ = stitched(*files.values())
    original = next(path for path in paths if path["direction"] == "original")
    crossed = [node for node, _ in itertools.groupby(hop["node"] for hop in original["hops"])]
    assert crossed == ["node2", "node1"]
    assert len(answers) == 1
