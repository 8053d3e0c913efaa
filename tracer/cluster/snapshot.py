"""Read a cluster from a file that ``kubectl get nodes,pods,services,endpointslices -A`` wrote."""

import json
from collections.abc import Iterator
from pathlib import Path

from tracer.cluster.errors import ClusterError
from tracer.cluster.fields import shown
from tracer.cluster.index import Cluster
from tracer.cluster.objects import Object
from tracer.cluster.parse import parse

# 5,000 nodes, 10,000 Services and 150,000 endpoints with all their fields print as about 200 MiB.
MAX_BYTES = 1 << 30
# YAML aliases can expand a few bytes to any number of objects.
_MAX_OBJECTS = 5_000_000
_MAX_DEPTH = 8


def load(path: Path, *, updated_ns: int = 0) -> Cluster:
    """
    Read a snapshot of the cluster from JSON or YAML.

    Args:
        path: A List, a single object, or several YAML documents of them.
        updated_ns: When the snapshot was taken, for `Cluster.updated_ns`.

    Raises:
        ClusterError: The file cannot be read, or does not contain Kubernetes objects.
    """
    text = _read(path)
    try:
        return Cluster.build(_objects(_documents(text), _Budget()), updated_ns=updated_ns)
    except RecursionError:
        raise ClusterError(f"{path}: nested too deeply for Kubernetes objects") from None
    except ClusterError as error:
        raise ClusterError(f"{path}: {error}") from None


class _Budget:
    """How many more objects to accept."""

    def __init__(self) -> None:
        self.left = _MAX_OBJECTS


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ClusterError(f"cannot read {path}: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise ClusterError(f"{path}: is larger than {MAX_BYTES >> 20} MiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ClusterError(
            f"{path}: is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}"
        ) from None


def _documents(text: str) -> list[object]:
    if not text.strip():
        raise ClusterError("is empty; did kubectl fail?")
    if text.lstrip()[:1] not in ("{", "["):
        return _yaml_documents(text)
    try:
        return [json.loads(text)]
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ClusterError(f"is not JSON: {error.msg} at {place}") from None
    except ValueError as error:
        raise ClusterError(f"is JSON that cannot be read: {error}") from None


def _yaml_documents(text: str) -> list[object]:
    # Imported late: most runs do not need it.
    import yaml  # noqa: PLC0415

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return [item for item in yaml.load_all(text, Loader=loader) if item is not None]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ClusterError(f"is neither JSON nor YAML: {error.problem}{place}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ClusterError(f"is neither JSON nor YAML: {shown(str(error))}") from None


def _objects(items: list[object], budget: _Budget, depth: int = 0) -> Iterator[Object]:
    if depth > _MAX_DEPTH:
        raise ClusterError(f"contains Lists nested more than {_MAX_DEPTH} deep")
    for item in items:
        budget.left -= 1
        if budget.left < 0:
            raise ClusterError(f"contains more than {_MAX_OBJECTS} objects")
        if not isinstance(item, dict) or not isinstance(item.get("kind"), str):
            raise ClusterError(
                f"does not contain Kubernetes objects: found {shown(item)} without a kind"
            )
        if item["kind"].endswith("List"):
            yield from _objects(_items(item), budget, depth + 1)
        else:
            parsed = parse(item)
            if parsed is not None:
                yield parsed


def _items(item: dict[str, object]) -> list[object]:
    items = item.get("items")
    if items is None:
        return []
    if not isinstance(items, list):
        raise ClusterError(f"{shown(item['kind'])}: items is {shown(items)}, expected a list")
    # The items of a ServiceList have no kind: the list's kind implies it.
    kind = str(item["kind"]).removesuffix("List")
    if kind:
        version = item.get("apiVersion")
        for entry in items:
            if isinstance(entry, dict):
                entry.setdefault("kind", kind)
                entry.setdefault("apiVersion", version)
    return items
