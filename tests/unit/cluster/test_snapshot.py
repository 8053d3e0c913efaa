"""A cluster from a file: everything kubectl prints, and one line for everything else."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.cluster import kube
from tracer.cluster import snapshot
from tracer.cluster.errors import ClusterError
from tracer.cluster.snapshot import load

RECORDED = Path(__file__).parents[3] / "lab" / "data" / "objects.json"


@pytest.fixture
def file(tmp_path):
    return tmp_path / "objects"


def listed(*items, kind="List"):
    return {"kind": kind, "apiVersion": "v1", "items": list(items)}


def test_yaml_is_json(file):
    """YAML and JSON of the same objects are the same cluster."""
    file.write_text(yaml.safe_dump(json.loads(RECORDED.read_text())))
    assert load(file) == load(RECORDED)
    assert load(file, updated_ns=7).updated_ns == 7


SERVICES = listed(
    {key: value for key, value in kube.service().items() if key not in ("kind", "apiVersion")},
    kind="ServiceList",
)


@pytest.mark.parametrize(
    ("document", "services"),
    [
        (listed(), 0),
        ({"kind": "List"}, 0),
        (listed(listed(kube.service("a")), listed(listed(kube.service("b")))), 2),
        (kube.service(), 1),
        (SERVICES, 1),
        (listed({"kind": "ConfigMap", "metadata": {}}, kube.service()), 1),
    ],
)
def test_shapes(file, document, services):
    """Lists, Lists in Lists, typed lists and single objects are read; other kinds are not used."""
    file.write_text(json.dumps(document))
    assert load(file).counts.services == services


def test_several_documents(file):
    """YAML documents, as separate kubectl calls print them, add up."""
    documents = [listed(kube.service("a")), None, kube.service("b"), listed(kube.node())]
    file.write_text(yaml.safe_dump_all(documents))
    assert (load(file).counts.services, load(file).counts.nodes) == (2, 1)


DEEP = '{"kind": "List", "items": [' * 20 + "]}" * 20
BAD = [
    (b"", "is empty; did kubectl fail?"),
    (b" \n", "is empty; did kubectl fail?"),
    (b"{", "is not JSON: Expecting property name enclosed in double quotes at line 1, column 2"),
    (b'{"a": 1} x', "is not JSON: Extra data at line 1, column 10"),
    (b"a: b: c", "is neither JSON nor YAML: mapping values are not allowed in this context"
     " at line 1, column 5"),
    (b"a: !!python/object:os.system x", "is neither JSON nor YAML: could not determine a"
     " constructor for the tag 'tag:yaml.org,2002:python/object:os.system' at line 1, column 4"),
    (b"a: 2026-99-99", "is neither JSON nor YAML: 'month must be in 1..12'"),
    (b"hello", "does not contain Kubernetes objects: found 'hello' without a kind"),
    (b"[]", "does not contain Kubernetes objects: found a list without a kind"),
    (b"{}", "does not contain Kubernetes objects: found an object without a kind"),
    (b'{"kind": "List", "items": 5}', "'List': items is 5, expected a list"),
    (b'{"kind": "List", "items": [5]}',
     "does not contain Kubernetes objects: found 5 without a kind"),
    (b"\xff\xfe", "is not UTF-8 text: byte 0 is 0xff"),
    (b"[" * 100_000, "nested too deeply for Kubernetes objects"),
    (DEEP.encode(), "contains Lists nested more than 8 deep"),
    (b"a: &a [*a]", "does not contain Kubernetes objects: found an object without a kind"),
    (b"&a {kind: List, items: [*a]}", "contains Lists nested more than 8 deep"),
    (b"--- &a\nkind: List\nitems: [*a]", "contains Lists nested more than 8 deep"),
    (json.dumps(kube.service(ports=7)).encode(),
     "Service default/web: spec.ports is 7, expected a list"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "message"), BAD, ids=range(len(BAD)))
def test_malformed(file, data, message):
    """A file that is not a snapshot is refused in one line with its name."""
    file.write_bytes(data)
    with pytest.raises(ClusterError) as caught:
        load(file)
    assert str(caught.value) == f"{file}: {message}"


def test_unreadable(tmp_path):
    """A file that cannot be opened says why."""
    with pytest.raises(ClusterError, match=r"cannot read .*none: No such file or directory"):
        load(tmp_path / "none")
    with pytest.raises(ClusterError, match=r"cannot read .*: Is a directory"):
        load(tmp_path)


def test_size(file, monkeypatch):
    """A file of any size costs no more than the limit."""
    monkeypatch.setattr(snapshot, "MAX_BYTES", 1 << 20)
    with pytest.raises(ClusterError, match="/dev/zero: is larger than 1 MiB"):
        load(Path("/dev/zero"))


def test_aliases(file, monkeypatch):
    """YAML aliases that multiply are stopped by count."""
    monkeypatch.setattr(snapshot, "_MAX_OBJECTS", 1000)
    lines = ["a0: &a0 {kind: List, items: []}"]
    for level in range(1, 7):
        many = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} {{kind: List, items: [{many}]}}")
    file.write_text("\n".join([*lines, "kind: List", "items: [*a6]"]))
    with pytest.raises(ClusterError, match="contains more than 1000 objects"):
        load(file)


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes(tmp_path_factory, data):
    """Any file is read or refused, in one line."""
    file = tmp_path_factory.getbasetemp() / "any"
    file.write_bytes(data)
    try:
        load(file)
    except ClusterError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message
