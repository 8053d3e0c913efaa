"""The documentation against the code: options, examples, JSON keys, verdicts, causes, links."""

import json
import re
import shlex
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from exporters.demo import scenario_to_line
from exporters.jsonl import path_to_lines, summary_to_line, to_line
from lab.agreement import Finding
from lab.probe import Answer
from lab.scenarios import cases
from tests.unit import paths, samples
from tracer import cli
from tracer.commands import doctor, explain
from tracer.judge.cause import MEANINGS
from tracer.judge.verdict import SeenAccept, SeenHop, Summary, Verdict
from tracer.kernel.features import Check, Report
from tracer.kernel.health import Health
from tracer.model import Hook
from tracer.proxy_headers import ClientForm, ProxyHeader
from tracer.source import SourceInfo
from tracer.wire import Lost

ROOT = Path(__file__).parents[2]
DOCS = sorted(path for path in (ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
OBJECTS = ROOT / "lab/data/objects.json"
CONTEXT = click.Context(cli.cli, info_name="srcip")
COMMANDS = {
    "srcip": cli.cli,
    **{
        f"srcip {name}": cli.cli.get_command(CONTEXT, name)
        for name in cli.cli.list_commands(CONTEXT)
    },
}
OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")


def page(name):
    return (ROOT / "docs" / name).read_text()


def sections(text):
    """Return what stands under each heading of the second level."""
    found = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        found[heading.strip()] = body
    return found


def rows(text):
    """Return the rows of the tables in a text, without headings, as lists of cells."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    split = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    rules = {at for at, cells in enumerate(split) if all(set(cell) <= set("-:") for cell in cells)}
    return [cells for at, cells in enumerate(split) if not {at, at + 1} & rules]


def options_of(command):
    options = [each for each in command.params if isinstance(each, click.Option)]
    return {name for each in options for name in each.opts} | {"-h", "--help"}


# Commands


def test_every_command_has_its_section():
    """docs/commands.md describes every command and no other."""
    assert set(sections(page("commands.md"))) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_options(name):
    """The table of a command holds its options, all and no others."""
    told = {
        option
        for cells in rows(sections(page("commands.md"))[name])
        for option in OPTION.findall(cells[0])
        if cells[0].startswith("`-")
    }
    assert told == options_of(COMMANDS[name])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_options(name):
    """The table of a command says of each option what ``--help`` says, with its default."""
    documented = {
        max(OPTION.findall(cells[0]), key=len): cells[1]
        for cells in rows(sections(page("commands.md"))[name])
        if cells[0].startswith("`-")
    }
    for each in COMMANDS[name].params:
        if isinstance(each, click.Option):
            shown = f" Default: `{each.default}`." if each.show_default else ""
            text = f"{' '.join(each.help.split())}{shown}".replace("|", "\\|")
            assert documented[max(each.opts, key=len)] == text


def test_environment_variables():
    """Every variable is named as its option."""
    differing = set()
    for command in COMMANDS.values():
        for each in command.params:
            if isinstance(each, click.Option) and each.name is not None:
                longest = max(each.opts, key=len).lstrip("-")
                if each.name != longest.replace("-", "_") and longest != "version":
                    differing.add((f"--{longest}", each.name.upper()))
    assert not differing


def examples():
    """Yield every line of a code block that runs srcip, and where it stands."""
    for path in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                found = re.match(r"(?:[$#] )?(?:sudo )?(?:\S*/)?srcip (?!show)(\S.*)", line)
                if found and not line.startswith(("srcip: ", "# srcip")):
                    yield pytest.param(found[1], id=f"{path.relative_to(ROOT)}: {found[1][:60]}")


@pytest.mark.parametrize("line", list(examples()))
def test_example(line):
    """Every example is understood by the command line."""
    words = []
    for word in shlex.split(line, comments=True):
        if word in {"|", "&", ">", "2>"}:
            break
        words.append(word)
    if words and words[0].startswith("-"):
        words = [word for word in words if word not in {"-v", "--verbose"}]
    if not words or words[0] in {"--version", "--help", "COMMAND"}:
        return
    command = COMMANDS[f"srcip {words[0]}"]
    if "--help" in words:
        return
    command.make_context(words[0], words[1:], parent=CONTEXT)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_options_in_prose_exist(path):
    """Every option that prose names in code style is an option of some command."""
    known = set().union(*map(options_of, COMMANDS.values()))
    for line in path.read_text().splitlines():
        for option in re.findall(r"`(--(?:filter|probe|from|masquerade|proxy)-[a-z-]+)", line):
            assert option in known, line


# JSON


def lines_of_explain(*arguments, name="default/loadbalancer-ranges"):
    fixed = [name, "--cluster", str(OBJECTS), "-o", "json"]
    run = CliRunner().invoke(explain.explain, [*fixed, *arguments])
    assert run.exit_code == 0, run.output
    return [json.loads(line) for line in run.output.splitlines()]


def findings():
    case = cases(families=["ipv4"], protos=["tcp"], scenarios=["S3"])[0]
    local = (ip_address(samples.CLIENT), 46356)
    answer = Answer(outcome="answered", client_address=ip_address(samples.NODE), local=local)
    return [
        Finding(case=case, answer=answer, hops=(samples.explained(),), drop=None),
        Finding(case=case, answer=answer, hops=(samples.proxied(),), drop=None),
        Finding(case=case, answer=Answer(outcome="timeout", local=local), hops=(), drop=None),
    ]


def real_lines(tmp_path):
    """Return lines of every kind, with everything that they can hold."""
    ping = samples.judged(samples.PING, samples.PING.inverted)
    lines = [
        to_line(samples.explained()),
        to_line(ping),
        to_line(samples.proxied(contradiction())),
        to_line(samples.explained_drop(rule=samples.RULE)),
        to_line(SeenAccept(accept=samples.accept(), time_ns=samples.KTIME_NS)),
        *path_lines(),
        summary_to_line(
            Summary(
                connections=1,
                drops=0,
                lost={"ring_full": 0},
                not_seen=("x",),
                notes=("y",),
                clock_offsets_ns={"node1": 1},
            )
        ),
        *map(scenario_to_line, findings()),
        *(
            explain._health_line(health, is_expected=True, is_json=True)
            for health in (
                Health(node="node1", status=200, local_endpoints=1),
                Health(node="node2", error="timed out"),
            )
        ),
        json.dumps(
            doctor._to_object(
                Report(checks=[Check(name="x", is_ok=True, detail="y")], rung="z", not_seen=["n"])
            )
        ),
    ]
    found = [json.loads(line) for line in lines]
    set_local = ["--set", "externalTrafficPolicy=Local"]
    found += lines_of_explain(*set_local, *recorded(tmp_path))
    found += lines_of_explain(*set_local, name="default/loadbalancer-local")
    found += lines_of_explain("--causes")
    return found


def with_rule(path):
    first, *others = path.legs
    opinion = replace(first.opinion, rule=samples.RULE)
    first = replace(first, judged=replace(first.judged, opinion=opinion))
    return replace(path, legs=(first, *others))


def with_word(path):
    first, *others = path.legs
    judged = replace(first.judged, word=samples.word())
    return replace(path, legs=(replace(first, judged=judged), *others))


def path_lines():
    told = (
        with_word(with_rule(paths.s3())),
        paths.s6(),
        paths.ping(),
        paths.changed(),
        paths.in_fragments(),
        paths.in_zone(),
        paths.s3_first_half(),
    )
    found = [line for path in told for line in path_to_lines(path)]
    hop = SeenHop(
        hop=paths.hop(0, Hook.NF_PREROUTING, samples.SENT, after=True).hop,
        time_ns=0,
        node="node2",
        device="eth0",
        device_kind="veth",
    )
    ping = replace(hop, hop=replace(hop.hop, packet=samples.PING))
    fragment = replace(hop, hop=replace(hop.hop, is_fragment=True))
    zoned = replace(hop, hop=replace(hop.hop, zone=7))
    return [*found, *map(to_line, (hop, ping, fragment, zoned))]


def contradiction():
    """All that can be said of proxies' headers, even what never occurs together."""
    token = samples.named(ProxyHeader.FORWARDED, address=None, form=ClientForm.TOKEN, token=HIDDEN)
    missing = (ProxyHeader.PROXY_V1,)
    return samples.word(
        token,
        samples.named(),
        is_ambiguous=True,
        missing=missing,
        client=(replace(token, address=ip_address("192.0.2.1"))),
    )


HIDDEN = "_hidden"


def recorded(tmp_path):
    from tests.unit.fake_source import FakeSource  # noqa: PLC0415
    from tracer.recording import Recorder  # noqa: PLC0415

    info = SourceInfo(clock_offset_ns=0, nodes={samples.NETNS: "node2"}, rung="x")
    recorder = Recorder(tmp_path / "night.srcip", FakeSource([], info))
    sent = samples.flow(samples.CLIENT, 4000, "203.0.113.52", 80)
    reply = samples.flow(samples.BACKEND, 8080, samples.NODE, 4000)
    recorder.write([samples.connection_bytes(samples.connection(sent, reply, mark=0x4000))])
    recorder.close()
    return ["--from-recording", str(tmp_path / "night.srcip")]


# Their own keys are values: what was lost, what was set, which node.
MAPS = {"lost", "set", "clock_offsets"}


def keys_of(value, prefix=""):
    """Yield the path of every key in an object, lists looked through."""
    if isinstance(value, list):
        for each in value:
            yield from keys_of(each, prefix)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield prefix + key
            if key not in MAPS:
                yield from keys_of(inner, f"{prefix}{key}.")


def documented_keys():
    """Return the paths of the keys that docs/json.md names for each kind."""
    text = sections(page("json.md"))
    tables = {
        name: {
            key: re.findall(r"\]\(#([a-z]+)\)", " ".join(meaning))
            for cell, *meaning in rows(body)
            for key in re.findall(r"`([a-z_0-9]+)`", cell)
        }
        for name, body in text.items()
    }

    def paths(name, prefix=""):
        for key, shared in tables[name].items():
            yield prefix + key
            for other in shared:
                yield from paths(other, f"{prefix}{key}.")

    return {name: set(paths(name)) for name in tables}


def test_json_keys(tmp_path):
    """docs/json.md names every key of every kind of line, and no other."""
    told = documented_keys()
    real = {}
    for line in real_lines(tmp_path):
        real.setdefault(line["kind"], set()).update(keys_of(line))
    assert set(real) <= set(told)
    for kind, keys in real.items():
        assert keys <= told[kind], kind
        assert top(keys) == top(told[kind]), kind
    # Objects that several kinds share are not whole in every kind: a scenario is no ping.
    assert inner(told[kind] for kind in real) == inner(real.values())


def top(paths):
    return {path for path in paths if "." not in path}


def inner(kinds):
    return {path.partition(".")[2] for paths in kinds for path in paths} - {""}


def test_json_examples():
    """Every example in docs/json.md is JSON, of a kind and with keys that are documented."""
    told = documented_keys()
    examples = re.findall(r"^```json\n(.*?)^```", page("json.md"), re.DOTALL | re.MULTILINE)
    lines = [json.loads(example) for example in examples]
    assert {line["kind"] for line in lines} >= {"connection", "drop", "accept", "summary"}
    for line in lines:
        assert set(keys_of(line)) <= told[line["kind"]]


def test_losses():
    """Every slot in which the kernel side counts a loss is explained."""
    told = {key for cell, *_ in rows(page("json.md")) for key in re.findall(r"`(\w+)`", cell)}
    assert {slot.name.lower() for slot in Lost} - {"untracked", "over_limit"} <= told


# Verdicts and causes


def test_verdicts_and_causes():
    """docs/verdicts.md has a row for every verdict and every cause, and no others."""
    text = sections(page("verdicts.md"))
    named = {
        part: {re.match(r"`([a-z-]+)`", cells[0])[1] for cells in rows(body)}
        for part, body in text.items()
        if part in {"Verdicts", "Causes of a replaced source", "Causes of a drop"}
    }
    assert named["Verdicts"] == set(Verdict)
    assert named["Causes of a replaced source"] | named["Causes of a drop"] == set(MEANINGS)


# The pages themselves


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(path):
    """A link to a file of the project leads to an existing file."""
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_index():
    """docs/index.md leads to every page of docs/, and to the decisions in their order."""
    linked = set(re.findall(r"\]\(([^)#]+)\)", page("index.md")))
    here = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert here <= linked
    decisions = [
        each for each in re.findall(r"\]\(([^)#]+)\)", page("index.md")) if "decisions/" in each
    ]
    assert decisions == sorted(
        f"decisions/{path.name}" for path in (ROOT / "docs" / "decisions").glob("*.md")
    )
