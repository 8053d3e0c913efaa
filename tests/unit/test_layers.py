"""The import rules of docs/architecture.md, enforced by reading every import of every module."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the top: a module imports from its own layer's package and from the layers below it.
# A name stands for the module or the package and all in it; of several names the longest counts.
LAYERS = (
    {"tracer.cli"},
    {"tracer.commands"},
    {"tracer.agent"},
    {"tracer.stream"},
    {"tracer.paths", "tracer.stitch"},
    {"tracer.clocks", "tracer.pipeline", "tracer.surroundings"},
    {"tracer.proxies", "tracer.waiting"},
    # A recording keeps of a node what its connections cannot be judged without.
    {"tracer.path_totals"},
    {"tracer.tally", "tracer.address_classes", "tracer.budget", "tracer.undecodable"},
    {"tracer.recording"},
    {"tracer.place"},
    {"tracer.views"},
    {"exporters"},
    {"lab"},
    {"tracer.judge"},
    # The doctor's report takes in the node's rules.
    {"tracer.kernel.features"},
    {"tracer.kernel.bypasses"},
    # What fetches rules stands above what they are, and enters namespaces as the kernel side does.
    {"tracer.ruleset.keeper"},
    {"tracer.ruleset.reader"},
    {"tracer.ruleset.nfnetlink", "tracer.ruleset.tool"},
    {"tracer.kernel"},
    {"tracer.cluster", "tracer.declared", "tracer.ruleset"},
    {"tracer.source", "tracer.decode", "tracer.encode"},
    {"tracer.wire"},
    {"tracer.filter", "tracer.proxy_headers"},
    {"tracer.model"},
    {"tracer.channel"},
    {"tracer.errors"},
)
# These, and all that they import, are pure: what fetches stands beside them and is not imported.
PURE = {
    "tracer.cluster.history",
    "tracer.cluster.index",
    "tracer.cluster.objects",
    "tracer.cluster.parse",
    "tracer.declared",
    "tracer.decode",
    "tracer.encode",
    "tracer.errors",
    "tracer.filter",
    "tracer.judge",
    "tracer.model",
    "tracer.place",
    "tracer.proxies",
    "tracer.proxy_headers",
    "tracer.ruleset.iptables",
    "tracer.ruleset.model",
    "tracer.ruleset.nftables",
    "tracer.ruleset.owners",
    "tracer.ruleset.walk",
    "tracer.source",
    "tracer.views",
    "tracer.waiting",
    "tracer.wire",
}
# What reads files, sockets, processes or namespaces, and so must never be reached from those.
FETCHES = {
    "tracer.cluster.access",
    "tracer.cluster.feed",
    "tracer.cluster.snapshot",
    "tracer.cluster.watch",
    "tracer.kernel",
    "tracer.recording",
    "tracer.ruleset.keeper",
    "tracer.ruleset.nfnetlink",
    "tracer.ruleset.reader",
    "tracer.ruleset.tool",
    "tracer.surroundings",
}
# What of the standard library computes values and touches nothing outside the process.
VALUES = {
    "__future__", "abc", "base64", "binascii", "bisect", "collections", "contextlib", "ctypes",
    "dataclasses", "datetime", "enum", "fnmatch", "functools", "graphlib", "hashlib", "heapq",
    "ipaddress", "itertools", "json", "math", "operator", "re", "shlex", "string", "struct",
    "sys", "textwrap", "types", "typing", "zlib",
}  # fmt: skip
# Memory by layout, not by value: for the wire, and for talking to the kernel (the keeper's child
# asks it to end with its parent).
CTYPES = {
    "tracer.wire", "tracer.decode", "tracer.encode", "tracer.recording", "tracer.kernel",
    "tracer.ruleset.keeper",
}  # fmt: skip

# The distribution's name for what is imported, where they differ.
DISTRIBUTIONS = {
    "yaml": "pyyaml", "prometheus_client": "prometheus-client",
    "opentelemetry": "opentelemetry-sdk",
}  # fmt: skip


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    name_of(path): path
    for package in ("tracer", "exporters", "lab")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imports_of(name):
    """Return the full names of the modules that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            for alias in node.names:
                # "from lab import echo" imports the module lab.echo.
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in FILES else node.module)
    return found


IMPORTS = {name: imports_of(name) for name in FILES}
CASES = [pytest.param(name, IMPORTS[name], id=name) for name in FILES]
PACKAGES = {"tracer", "exporters", "lab", "tracer.bpf"}


def is_ours(name):
    return name.split(".")[0] in {"tracer", "exporters", "lab"}


def is_under(name, packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def layer_of(name):
    """Return where a module stands, 0 at the top, and its package there."""
    places = [
        (len(package), number, package)
        for number, packages in enumerate(LAYERS)
        for package in packages
        if is_under(name, {package})
    ]
    assert places, f"{name} has no place in LAYERS"
    _, number, package = max(places)
    return number, package


def reachable(name):
    """Return all modules that importing one module brings in, its packages included."""
    found, left = set(), {name}
    while left:
        each = left.pop()
        found.add(each)
        parents = {each.rsplit(".", n)[0] for n in range(1, each.count(".") + 1)}
        left |= (IMPORTS.get(each, set()) | parents) - found
    return found


@pytest.mark.parametrize(("name", "imports"), CASES)
def test_downward(name, imports):
    """A module imports from its own package and from lower layers only."""
    if name in PACKAGES:
        assert not imports, "what everything imports must import nothing"
        return
    layer, package = layer_of(name)
    for other in filter(is_ours, imports - PACKAGES):
        other_layer, other_package = layer_of(other)
        assert other_package == package or other_layer > layer, f"{name} imports {other}"


PURE_MODULES = {
    each
    for name in FILES
    if is_under(name, PURE)
    for each in reachable(name)
    if each in FILES and each not in PACKAGES
}


@pytest.mark.parametrize("name", sorted(PURE_MODULES))
def test_pure(name):
    """Pure modules, and those they rest on, compute: they import values and touch nothing else."""
    for other in IMPORTS[name] - PACKAGES:
        assert is_ours(other) or other.split(".")[0] in VALUES, f"{name} imports {other}"
    assert not is_under(name, FETCHES)


@pytest.mark.parametrize(("name", "imports"), CASES)
def test_bcc(name, imports):
    """Only the child that compiles imports bcc, so that no other Python needs to have it."""
    assert "bcc" not in {each.split(".")[0] for each in imports} or name == "tracer.kernel.compile"


def test_the_compiling_child():
    """The child runs under the system's Python: it needs the standard library and bcc, no more."""
    outside = {each for each in reachable("tracer.kernel.compile") if not is_ours(each)}
    roots = {each.split(".")[0] for each in outside}
    assert roots - sys.stdlib_module_names == {"bcc"}


@pytest.mark.parametrize(("name", "imports"), CASES)
def test_exporters(name, imports):
    """Exporters write what they are given: they start no run and touch no kernel."""
    if is_under(name, {"exporters"}):
        upward = {"tracer.cli", "tracer.commands", "tracer.agent", "tracer.pipeline"}
        assert not [each for each in imports if is_under(each, upward | {"tracer.kernel"})]


@pytest.mark.parametrize(("name", "imports"), CASES)
def test_lab(name, imports):
    """The lab belongs to the demo: only modules of that name, and it itself, import it."""
    if any(is_under(each, {"lab"}) for each in imports):
        assert is_under(name, {"lab"}) or name.split(".")[-1] == "demo"


@pytest.mark.parametrize(("name", "imports"), CASES)
def test_click(name, imports):
    """The command line's library stays at the command line."""
    assert "click" not in imports or is_under(name, {"tracer.cli", "tracer.commands"})


@pytest.mark.parametrize(("name", "imports"), CASES)
def test_opentelemetry(name, imports):
    """Only the exporter of traces needs OpenTelemetry, which is an extra."""
    roots = {each.split(".")[0] for each in imports}
    assert "opentelemetry" not in roots or name == "exporters.otlp"


@pytest.mark.parametrize(("name", "imports"), CASES)
def test_ctypes(name, imports):
    """The tracer's ctypes stay at the wire and in the kernel package; elsewhere are objects."""
    assert "ctypes" not in imports or is_under(name, CTYPES | {"lab"})


def test_dependencies():
    """What is imported and not of the standard library is declared."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project.get("optional-dependencies", {})
    declared = {
        requirement.split(">")[0].split("=")[0].split("<")[0].strip().lower()
        for requirements in (project["dependencies"], *optional.values())
        for requirement in requirements
    }
    outside = {each.split(".")[0] for imports in IMPORTS.values() for each in imports}
    foreign = {each for each in outside if not is_ours(each)} - sys.stdlib_module_names - {"bcc"}
    assert {DISTRIBUTIONS.get(each, each) for each in foreign} <= declared


def test_every_layer_name_is_told_once():
    """No module stands in two layers."""
    names = [name for packages in LAYERS for name in packages]
    assert len(names) == len(set(names))
