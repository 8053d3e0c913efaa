"""The command line: what it says and how it ends, run without root."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import pytest

from lab.services import OBJECTS
from tests.unit import samples
from tests.unit.fake_source import FakeSource
from tests.unit.samples import flow
from tracer import cli
from tracer.commands import serve
from tracer.errors import NetnsError
from tracer.judge.verdict import Verdict
from tracer.kernel import ladder, netns, privileges
from tracer.recording import Recorder

ROOT = Path(__file__).parents[2]
COMMANDS = ("trace", "flows", "doctor", "replay", "demo")

REPLACED = samples.connection_bytes(samples.connection(*samples.REPLACED))
PRESERVED = samples.connection_bytes(samples.connection(*samples.PRESERVED))
DROPPED = samples.drop_bytes(samples.drop(packet=flow("192.0.2.1", 1, "192.0.2.2", 2), orig=None))
GUARDED = ("--authorize", "kubernetes", "--tls-cert", "x", "--tls-key", "y")
ACCEPTED = samples.accept_bytes(samples.accept(samples.REPLACED[1].inverted))


@pytest.fixture
def recording(tmp_path):
    """Make a recording of some records."""

    def make(*records, **fake):
        path = tmp_path / "night.srcip"
        recorder = Recorder(path, FakeSource([], samples.INFO, **fake))
        recorder.write(records)
        recorder.close()
        return path

    return make


def command(*arguments):
    """Write out a command line for another process."""
    return [sys.executable, "-m", "tracer.cli", *map(str, arguments)]


def options_of(name):
    context = click.Context(cli.cli)
    parameters = cli.cli.get_command(context, name).params
    return [option for each in parameters for option in each.opts if option.startswith("--")]


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], []])
def test_help(srcip, arguments):
    """The help names every command; without a command there is help, not silence."""
    code, out, err = srcip(*arguments)
    assert code == (0 if arguments else 2)
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\S", out + err, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_command(srcip, name):
    """A command's help begins with what it does and names each of its options."""
    code, out, err = srcip(name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: srcip {name}")
    assert set(options_of(name)) <= set(re.findall(r"--[a-z-]+", out))


def test_options_are_the_contract_s():
    """The options that other programs build on are where they were promised."""
    filters = {f"--filter-{what}" for what in ("client", "backend", "port", "proto", "verdict")}
    where = {"--netns", "--node-name"}
    out = {"--output", "--expect", "--count"}
    live = {"--record", "--ready-file", "--timeout"}
    assert filters | where | out | live <= set(options_of("trace"))
    assert filters | where | out | {"--record"} <= set(options_of("flows"))
    assert filters | out <= set(options_of("replay"))
    assert where | {"--output"} <= set(options_of("doctor"))
    assert {"--scenario", "--mode", "--family", "--proto", "--output"} <= set(options_of("demo"))


def test_version(srcip):
    """The version is that of the distribution."""
    assert re.fullmatch(r"srcip, version \d+\.\d+\.\d+\S*\n", srcip("--version")[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["trace", "--filter-client", "10.0.0.1/8"],
            "has host bits set: use 10.0.0.0/8, or 10.0.0.1",
        ),
        (["replay", "x", "--filter-client", "nonsense"], "'nonsense' is neither an address"),
        (["trace", "--filter-client", "fe80::1%eth0"], "'fe80::1%eth0' is neither an address"),
        (["flows", "--filter-backend", "10.0.0.0/33"], "10.0.0.0/33"),
        (["trace", "--filter-port", "0"], "'0' is not a whole number from 1 to 65535"),
        (["trace", "--filter-port", "http"], "'http' is not a whole number from 1 to 65535"),
        (["flows", "--filter-service", "web"], "'web' is not NAMESPACE/NAME, such as default/web"),
        (["trace", "--filter-proto", "gre"], "'gre' is not one of 'tcp'"),
        (["trace", "--filter-verdict", "lost"], "'lost' is not one of"),
        (["replay", "x", "--expect", "lost"], "'lost' is not one of"),
        (["replay", "x", "--count", "0"], "'0' is not a whole number of 1 or more"),
        (["trace", "--timeout", "0"], "'0' is not a number of seconds, more than 0"),
        (["trace", "--timeout", "nan"], "'nan' is not a number of seconds, more"),
        (["trace", "--timeout", "inf"], "'inf' is not a number of seconds, more"),
        (["stitch", "x", "--window", "nan"], "seconds, more than 0 and at most 3600"),
        (
            ["explain", "a/b", "--probe-timeout", "1e300"],
            "'1e300' is not a number of seconds, more",
        ),
        (["serve", "--drain-interval", "0.5"], "seconds, at least 1 and at most 30"),
        (["replay", "x", "-o", "xml"], "'xml' is not one of 'table', 'json'"),
        (["replay"], "FILE is missing"),
        (["explain"], "srcip: a Service is missing: name NAMESPACE/SERVICE, or use --causes"),
        (["report", "x"], "-o / --output is missing"),
        (["trace", "--netns"], "option '--netns' requires an argument; see 'srcip trace --help'"),
        (["trace", "--trusted-proxy", "::1"], "--trusted-proxy needs --read-proxy-headers"),
        (["trace", "--agent", "--record", "x"], "--record cannot be combined with --agent: the"),
        (["trace", "--agent", "/x", "--netns", "y"], "--netns cannot be combined with"),
        (["trace", "--agent", "-o", "diagram"], "-o diagram cannot be combined with --agent"),
        (["trace", "--agent", "http://h:1"], "offers its stream over https only, because tokens"),
        (["trace", "--agent", "http://127.0.0.1:1"], "over https only"),
        (["trace", "--agent", "ftp://h:1"], "over https only"),
        (["trace", "--agent", "https://h"], "names no port; an agent's default is 9464"),
        (["trace", "--agent", "https://:9464"], "names no port"),
        (["trace", "--agent", "https://h:x"], "Port could not be cast"),
        (["trace", "--agent", "https://h:70000"], "Port out of range"),
        (["trace", "--agent", "https://[h:1"], "Invalid IPv6 URL"),
        (["trace", "--agent", "https://h:1\x1b[2J"], "'https://h:1\\x1b[2J' is not a URL"),
        (["trace", "--agent", "https://a:b@h:1"], "must not have a user, query or fragment"),
        (
            ["trace", "--agent", "https://h:1/metrics"],
            "leave out the path; the stream is at /stream",
        ),
        (["trace", "--agent", "https://h:1"], "needs a token: give --token-file FILE, or"),
        (["trace", "--agent", "https://h:1", "--netns", "y"], "--netns cannot be combined with"),
        (
            ["trace", "--agent", "https://h:1", "--token-file", "x", "--kubeconfig", "y"],
            "--kubeconfig cannot be combined with --token-file: only one token is sent",
        ),
        (["trace", "--agent", "/x", "--kubeconfig", "y"], "--kubeconfig cannot be combined with"),
        (["trace", "--agent", "--ca-file", "x"], "--ca-file needs --agent https://HOST:PORT"),
        (["trace", "--token-file", "x"], "--token-file needs --agent https://HOST:PORT"),
        (["trace", "--tls-server-name", "x"], "--tls-server-name needs --agent https://"),
        (["serve", "--stream-https"], "--stream-https needs --tls-cert and --authorize kubernetes"),
        (
            ["serve", "--stream-https", "--tls-cert", "x", "--tls-key", "y"],
            "--stream-https needs --tls-cert and --authorize kubernetes",
        ),
        (
            ["serve", "--stream-https", "--authorize", "kubernetes"],
            "--stream-https needs --tls-cert and --authorize kubernetes",
        ),
        (
            ["serve", "--stream-https", "--no-stream", *GUARDED],
            "--stream-https and --no-stream are mutually exclusive",
        ),
        (["serve", "--tls-cert", "x"], "--tls-cert and --tls-key must be given together"),
        (["serve", "--tls-key", "x"], "--tls-cert and --tls-key must be given together"),
        (["serve", "--bind", "192.0.2.1", "--authorize", "kubernetes"], "needs --tls-cert: tokens"),
        (["serve", "--bind", "node1", "--authorize", "kubernetes"], "needs --tls-cert: tokens"),
        (["serve", "--stream-group", "no-such-group"], "no such group: 'no-such-group'"),
        (["serve", "--stream-group", "4294967295"], "no such group: '4294967295'"),
        (["demo", "--scenario", "S99"], "'S99' is not one of"),
        (["demo", "--keep", "--scenario", "s3"], "it takes one --mode and nothing else"),
        (["demo", "--keep", "--mode", "iptables", "--mode", "nftables"], "takes one --mode"),
        (["replace"], "no such command 'replace'; see 'srcip --help'"),
        (["trace", "--node-nam"], "no such option: --node-nam; did you mean --node-name?"),
        (["trace", "--no-such-option"], "no such option: --no-such-option"),
        (["trace", "evil\x1b[2J\n"], "got unexpected extra argument"),
    ],
)
def test_wrong_usage(srcip, arguments, message):
    """Wrong usage exits with 2, and one line names the value and where to read on."""
    code, out, err = srcip(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert re.fullmatch(r"srcip: [^\n\x1b]+; see 'srcip( \w+)? --help'\n", err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--bind", "nope.invalid"],
            r"cannot listen on nope\.invalid port 9464: .+; choose another with --bind and --port",
        ),
        (
            ["--tls-cert", "{}/none", "--tls-key", "{}/there"],
            r"cannot use the certificate \S+ with the key \S+: \S+/none: No such file or directory",
        ),
        (
            ["--tls-cert", "{}/there", "--tls-key", "{}/none"],
            r"cannot use the certificate \S+ with the key \S+: \S+/none: No such file or directory",
        ),
        (
            ["--tls-cert", "{}/there", "--tls-key", "{}/there"],
            r"cannot use the certificate \S+ with the key \S+: .+",
        ),
    ],
    ids=["bind", "no certificate", "no key", "neither of them is one"],
)
def test_what_serve_cannot_use(srcip, tmp_path, monkeypatch, options, message):
    """One line and exit 1, before a socket is made, an object is asked for or a program loaded."""
    (tmp_path / "there").write_text("nothing\n")
    monkeypatch.setattr(privileges, "require_for_tracing", lambda: None)
    monkeypatch.setattr(ladder, "require_programs", lambda _asked: None)
    begun = []
    for where, name in ((serve, "live_views"), (serve, "StreamServer"), (ladder, "open_programs")):
        monkeypatch.setattr(where, name, lambda *_, name=name, **__: begun.append(name))
    code, out, err = srcip("serve", *(each.format(tmp_path) for each in options))
    assert (code, out, begun) == (1, "", [])
    assert re.fullmatch(rf"srcip: {message}\n", err), err


@pytest.mark.parametrize("path", ["/no/such/agent.sock", "unix:/no/such/agent.sock"])
def test_no_agent(srcip, path):
    """Without an agent, one line says where it was expected."""
    assert srcip("trace", "--agent", path) == (
        1,
        "",
        "srcip: cannot reach the agent at /no/such/agent.sock: No such file or directory; is 'srcip"
        " serve' running on this node?\n",
    )


def test_no_agent_at_a_port(srcip, tmp_path):
    """The same with a port; and a token file without a token is refused before connecting."""
    token = tmp_path / "token"
    where = ("--agent", "https://127.0.0.1:1", "--token-file", token)
    assert srcip("trace", *where) == (
        1,
        "",
        f"srcip: cannot read token file {token}: No such file or directory\n",
    )
    for said, why in (
        ("", "no valid"),
        ("a\nb", "no valid bearer token"),
        ("a b", "several words"),
    ):
        token.write_text(said)
        code, _, err = srcip("trace", *where)
        assert (code, err.count("\n")) == (1, 1)
        assert why in err
    token.write_text("secret\n")
    assert srcip("trace", *where) == (
        1,
        "",
        "srcip: cannot reach the agent at https://127.0.0.1:1: Connection refused; does 'srcip"
        " serve --stream-https' listen there (--bind)?\n",
    )


def test_what_the_environment_says_is_the_agent_s(srcip, monkeypatch):
    """Trace options that the agent pod's environment sets do not conflict with --agent."""
    monkeypatch.setenv("SRCIP_TRACE_NODE_NAME", "node1")
    assert srcip("trace", "--agent", "/no/such/agent.sock")[0] == 1


@pytest.mark.parametrize("name", ["trace", "flows", "doctor"])
@pytest.mark.parametrize(
    ("spec", "hint"),
    [("no-such-netns", "; see 'ip netns list'"), ("999999999", ""), ("/no/such/path", "")],
)
def test_unknown_namespace(srcip, name, spec, hint):
    """A namespace that does not exist is one line with its name, before anything else is tried."""
    code, out, err = srcip(name, "--netns", spec)
    assert (code, out) == (1, "")
    assert re.fullmatch(rf"srcip: no network namespace '{spec}': [^;]*{hint}\n", err)


@pytest.mark.parametrize("spec", ["", "=node1"])
def test_nameless_namespace(srcip, spec):
    """An empty name, as from a shell variable that is not set, is not the directory of all."""
    message = "srcip: no network namespace '': a name, a process ID or a path is missing\n"
    assert srcip("flows", "--netns", spec) == (1, "", message)


@pytest.mark.parametrize("path", ["/etc/passwd", "/proc/self/ns/mnt", "/run"])
def test_no_namespace(path):
    """Another file is refused as such, with or without root."""
    with (
        pytest.raises(
            NetnsError, match=f"namespace {path}: Invalid argument; that file is not a network"
        ),
        netns.inside(Path(path)),
    ):
        pass


def no_recording(path):
    path.write_text("#!/bin/sh\n")


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-20])


def garbage(path):
    path.write_bytes(path.read_bytes() + b"\0" * 100)
    path.write_bytes(path.read_bytes().replace(b'{"ring_full":1}', b'{"ring_full":"}'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, r"cannot read recording \S+: No such file or directory"),
        (no_recording, r"\S+ is not a srcip recording"),
    ],
)
def test_no_recording(srcip, recording, damage, message):
    """A file that is not a recording is one line on standard error and exit 1."""
    path = recording(REPLACED, lost={"ring_full": 1})
    damage(path)
    code, out, err = srcip("replay", path)
    assert (code, out) == (1, "")
    assert re.fullmatch(f"srcip: {message}\n", err)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_off, r"recording \S+ is cut off after 1 records \(byte \d+\): it has no end mark"),
        (garbage, r"recording \S+ is damaged after 1 records \(byte \d+\): a frame is not JSON"),
    ],
)
@pytest.mark.parametrize("arguments", [[], ["-o", "json"], ["-o", "json", "--paths"]])
def test_bad_recording(srcip, recording, damage, message, arguments):
    """
    What is good of a recording is shown, paths that wait for more, too; then come the summary and
    one line that says where it ends, and exit 1.
    """
    path = recording(REPLACED, lost={"ring_full": 1})
    damage(path)
    code, out, err = srcip("replay", path, *arguments)
    assert code == 1
    summary, _, rest = err.rpartition("srcip: ")
    assert re.fullmatch(f"{message}\n", rest)
    if arguments:
        shown, told = map(json.loads, out.splitlines())
        assert (shown["seen_source"], told["kind"]) == (samples.NODE, "summary")
        assert (told["connections"], summary) == (1, "")
    else:
        assert samples.NODE in out
        assert summary.startswith("1 connection, 0 drops; lost: nothing\n")


@pytest.mark.parametrize("name", ["replay", "stitch"])
def test_closed_recording(srcip, tmp_path, monkeypatch, name):
    """A recording that may not be read is no usage error: opening it says what is wrong."""
    path = tmp_path / "closed"
    path.touch()
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    code, _, err = srcip(name, path)
    assert (code, err) == (1, f"srcip: {path} is not a srcip recording\n")


@pytest.mark.parametrize("output", ["table", "json", "diagram"])
def test_full_disk(recording, output):
    """If there is no room for the output, there is one line on standard error and exit 1."""
    done = _into_full_disk("replay", recording(REPLACED), "-o", output)
    assert (done.returncode, done.stderr) == (1, NO_ROOM)


@pytest.mark.parametrize("arguments", [["--help"], ["explain", "--causes"]])
def test_full_disk_for_help(arguments):
    """The same for help, which click prints."""
    done = _into_full_disk(*arguments)
    assert (done.returncode, done.stderr) == (1, NO_ROOM)


def test_closed_output(recording):
    """If standard output is closed, nothing is printed; the exit code is still right."""
    line = " ".join(command("replay", recording(REPLACED), "--expect", "replaced"))
    done = subprocess.run(
        ["sh", "-c", f"{line} >&-"], stderr=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "1 connection, 0 drops" in done.stderr


NO_ROOM = "srcip: cannot write standard output: No space left on device\n"


def _into_full_disk(*arguments):
    with Path("/dev/full").open("w") as full:
        return subprocess.run(
            command(*arguments), stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )


def test_records_before_the_damage(srcip, recording):
    """Everything recorded before the damage is still shown."""
    path = recording(REPLACED, PRESERVED)
    cut_off(path)
    code, out, _ = srcip("replay", path, "-o", "json")
    assert code == 1
    *shown, summary = map(json.loads, out.splitlines())
    assert [line["verdict"] for line in shown] == ["replaced"]
    assert summary["kind"] == "summary"


def test_file_names_are_harmless(srcip, tmp_path):
    """A file's name in a message cannot move the cursor."""
    code, _, err = srcip("replay", tmp_path / "evil\x1b[2J\nname")
    assert code == 1
    assert err.removesuffix("\n").isprintable()


def test_replay_as_table(srcip, recording):
    """A replay prints a row for each connection and drop, the summary on standard error."""
    path = recording(REPLACED, ACCEPTED, PRESERVED, DROPPED, lost={"ring_full": 2})
    code, out, err = srcip("replay", path)
    assert code == 0
    heading, *rows = out.splitlines()
    assert heading.split()[:3] == ["TIME", "NODE", "VERDICT"]
    verdicts = [re.split("  +", row)[2] for row in rows]
    assert verdicts == ["replaced", "accepted", "preserved", "dropped"]
    assert all(row.startswith("00:00:00.123") for row in rows)
    assert err == (
        "2 connections, 1 drop; lost: 2 ring_full\nnot seen: what the test leaves out\n"
    )  # fmt: skip


def test_replay_as_json(srcip, recording):
    """With JSON, standard output has only objects, the summary last; standard error is silent."""
    path = recording(REPLACED, ACCEPTED, DROPPED)
    code, out, err = srcip("replay", path, "-o", "json")
    assert (code, err) == (0, "")
    assert [json.loads(line)["kind"] for line in out.splitlines()] == [
        "connection", "accept", "drop", "summary",
    ]  # fmt: skip


def test_replay_is_repeatable(srcip, recording):
    """The same recording gives the same output: no clock and no machine is in it."""
    path = recording(REPLACED, DROPPED)
    assert srcip("replay", path, "-o", "json") == srcip("replay", path, "-o", "json")


def test_undecodable_records(srcip, recording):
    """Undecodable records are counted in the summary, and do not end the replay."""
    path = recording(REPLACED, b"short", PRESERVED)
    code, out, _ = srcip("replay", path, "-o", "json")
    summary = json.loads(out.splitlines()[-1])
    assert code == 0
    assert (summary["connections"], summary["lost"]) == (2, {"undecodable": 1})


@pytest.mark.parametrize(
    ("filters", "verdicts"),
    [
        ([], ["replaced", "preserved", "dropped"]),
        (["--filter-verdict", "replaced"], ["replaced"]),
        (["--filter-verdict", "replaced", "--filter-verdict", "dropped"], ["replaced", "dropped"]),
        (["--filter-client", "198.51.100.10"], ["replaced", "preserved"]),
        (["--filter-client", "192.0.2.0/24"], ["dropped"]),
        (["--filter-backend", "10.244.0.0/16"], ["replaced", "preserved"]),
        (["--filter-port", "8080"], ["replaced", "preserved"]),
        (["--filter-proto", "udp"], []),
    ],
)
def test_filters(srcip, recording, filters, verdicts):
    """Filters narrow what is shown and counted."""
    path = recording(REPLACED, PRESERVED, DROPPED)
    _, out, _ = srcip("replay", path, "-o", "json", *filters)
    *lines, summary = map(json.loads, out.splitlines())
    assert [line["verdict"] for line in lines] == verdicts
    assert summary["connections"] + summary["drops"] == len(verdicts)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_count(srcip, recording, count):
    """--count ends after so many connections and drops; accepts do not count."""
    path = recording(ACCEPTED, REPLACED, ACCEPTED, PRESERVED, DROPPED)
    _, out, _ = srcip("replay", path, "-o", "json", "--count", count)
    *lines, summary = map(json.loads, out.splitlines())
    assert len([line for line in lines if line["kind"] != "accept"]) == min(count, 3)
    assert summary["connections"] + summary["drops"] == min(count, 3)


@pytest.mark.parametrize(
    ("records", "expect", "code", "message"),
    [
        ([REPLACED], "replaced", 0, ""),
        ([REPLACED, ACCEPTED], "replaced", 0, ""),
        ([REPLACED, PRESERVED], "replaced", 3, "expected replaced: 1 of 2 had another verdict"),
        ([DROPPED], "preserved", 3, "expected preserved: 1 of 1 had another verdict"),
        ([DROPPED], "dropped", 0, ""),
        ([], "preserved", 4, "expected preserved: nothing was seen"),
        ([ACCEPTED], "preserved", 4, "expected preserved: nothing was seen"),
    ],
)
def test_expect(srcip, recording, records, expect, code, message):
    """--expect ends with 3 if something had another verdict, with 4 if there was nothing."""
    got, _, err = srcip("replay", recording(*records), "--expect", expect, "-o", "json")
    assert got == code
    assert err == (message and f"{message}\n")


def test_expect_with_filter(srcip, recording):
    """The expectation applies to what the filters and --count leave."""
    path = recording(REPLACED, PRESERVED)
    assert srcip("replay", path, "--expect", "preserved", "--filter-verdict", "preserved")[0] == 0
    assert srcip("replay", path, "--expect", "replaced", "--count", 1)[0] == 0


@pytest.mark.parametrize("name", ["replay", "stitch"])
@pytest.mark.parametrize(
    ("cluster", "service", "message"),
    [
        ([], "default/nodeport", "--filter-service matches nothing without cluster objects"),
        (
            ["--cluster", OBJECTS],
            "default/nodport",
            "no Service default/nodport in the cluster; did you mean default/nodeport",
        ),
        (["--cluster", OBJECTS], "default/nodeport", None),
    ],
)
def test_filter_that_matches_nothing(srcip, recording, name, cluster, service, message):
    """A Service that nothing can match is reported at once: silence would look like an answer."""
    _, _, err = srcip(name, recording(REPLACED), *cluster, "--filter-service", service)
    assert err.startswith(f"srcip: {message}") == (message is not None)


@pytest.mark.parametrize("verdict", Verdict)
def test_verdicts_are_choices(srcip, recording, verdict):
    """Every verdict there is can be filtered by and expected."""
    path = recording()
    assert srcip("replay", path, "--filter-verdict", verdict, "--expect", verdict)[0] == 4


def test_option_by_environment(srcip, recording, monkeypatch):
    """Every option can be set by an environment variable."""
    monkeypatch.setenv("SRCIP_REPLAY_OUTPUT", "json")
    assert json.loads(srcip("replay", recording())[1])["kind"] == "summary"


def test_python_m(recording):
    """The module runs as a program: a process of its own, with its own exit code."""
    done = subprocess.run(
        command("replay", recording(REPLACED), "--expect", "preserved"),
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3
    assert "198.51.100.10:46356" in done.stdout


@pytest.mark.parametrize("form", ["table", "json"])
def test_closed_pipe(recording, form):
    """A reader that has seen enough, such as head, ends the replay without a word."""
    path = recording(*[REPLACED] * 5000)
    with subprocess.Popen(
        command("replay", path, "-o", form),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_recording_from_a_pipe(recording):
    """A recording is read from standard input, such as one that is being unpacked."""
    done = subprocess.run(
        command("replay", "/dev/stdin", "-o", "json"),
        cwd=ROOT, input=recording(REPLACED).read_bytes(), capture_output=True, check=True,
    )  # fmt: skip
    assert [json.loads(line)["kind"] for line in done.stdout.splitlines()] == [
        "connection", "summary",
    ]  # fmt: skip


# How root is dropped: to nobody or, if nobody cannot read this Python, to no capabilities.
LESS = (
    ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all"],
    ["setpriv", "--inh-caps=-all", "--bounding-set=-all"],
)


def run_after(prefix, *arguments):
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [*prefix, *command(*arguments)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def unprivileged():
    """Run a command without privileges."""
    if os.geteuid():
        return lambda *arguments: run_after([], *arguments)
    for prefix in LESS if shutil.which("setpriv") else ():
        if run_after(prefix, "--version").returncode == 0:
            return lambda *arguments: run_after(prefix, *arguments)
    pytest.skip("root, and no way to be less: setpriv is missing or may not run this Python")


@pytest.mark.parametrize("name", ["trace", "demo"])
def test_tracing_without_root(unprivileged, name):
    """Without root tracing ends with one line that says what is missing and what to do."""
    done = unprivileged(name)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "srcip: tracing needs root: CAP_NET_ADMIN, CAP_SYSLOG, CAP_BPF, CAP_PERFMON missing; "
        "try with sudo\n"
    )


def test_flows_without_root(unprivileged):
    """Without root conntrack cannot be read: one line."""
    done = unprivileged("flows", "--no-cluster")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"srcip: cannot read conntrack of \S+: .*root.*\n", done.stderr)


def test_doctor_without_root(unprivileged):
    """The doctor reports what is missing, and that nothing can be traced."""
    done = unprivileged("doctor")
    assert (done.returncode, done.stderr) == (1, "")
    assert re.search(r"^FAIL privileges +missing CAP_NET_ADMIN", done.stdout, re.MULTILINE)
    assert "in use:   nothing: this node cannot be traced" in done.stdout


def test_doctor_without_root_as_json(unprivileged):
    """As JSON the report is one object; what is not known is absent."""
    done = unprivileged("doctor", "-o", "json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["kind"], report["version"]) == (1, "doctor", 1)
    assert "rung" not in report
    assert {check["name"]: check["ok"] for check in report["checks"]}["privileges"] is False


def test_replay_without_root(unprivileged, recording):
    """A replay needs no root."""
    with tempfile.TemporaryDirectory(prefix="srcip-test-") as directory:
        Path(directory).chmod(0o755)
        path = shutil.copy(recording(REPLACED), directory)
        Path(path).chmod(0o644)
        assert unprivileged("replay", path).returncode == 0
