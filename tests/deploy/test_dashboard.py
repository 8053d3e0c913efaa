"""Grafana's dashboard: as Grafana's own schema has it, complete, and without overlap."""

import json
import re
from itertools import combinations
from pathlib import Path

from tests.deploy.conftest import library

models = library("grafana_foundation_sdk.models.dashboard")

from grafana_foundation_sdk.cog.encoder import JSONEncoder  # noqa: E402
from grafana_foundation_sdk.cog.plugins import register_default_plugins  # noqa: E402

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "deploy/grafana/srcip.dashboard.json").read_text())
PANELS = DASHBOARD["panels"]


def test_schema():
    """Grafana's own library reads and writes it without loss: it knows every field."""
    register_default_plugins()
    read = models.Dashboard.from_json(DASHBOARD)
    written = json.loads(JSONEncoder().encode(read))
    assert part_of(DASHBOARD, written) == written


def part_of(given, written):
    """Return what was given, completed by the defaults of what was written."""
    if isinstance(given, dict) and isinstance(written, dict):
        return written | {key: part_of(each, written.get(key)) for key, each in given.items()}
    if isinstance(given, list) and isinstance(written, list) and len(given) == len(written):
        return [part_of(*pair) for pair in zip(given, written, strict=True)]
    return given


def test_panels():
    """Panels have numbers of their own, stand beside each other, and say what they show."""
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    cells = [cells_of(**panel["gridPos"]) for panel in PANELS]
    assert not any(one & other for one, other in combinations(cells, 2))
    for panel in PANELS:
        assert panel["title"]
        if panel["type"] != "row":
            assert panel["targets"]
            assert panel["datasource"]["uid"] == "${datasource}"


def cells_of(x, y, w, h):
    assert x + w <= 24
    return {(column, line) for column in range(x, x + w) for line in range(y, y + h)}


def test_metrics_are_documented():
    """Every metric that is asked for stands in docs/metrics.md, or is Prometheus' own."""
    documented = (ROOT / "docs/metrics.md").read_text()
    for panel in PANELS:
        for target in panel.get("targets", []):
            for name in re.findall(r"\b(?:srcip|process)_\w+", target["expr"]):
                assert f"`{name}`" in documented, name


def test_legends_name_labels_that_are_there():
    """The labels in legends and table columns are those that the query keeps."""
    for panel in PANELS:
        for target in panel.get("targets", []):
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            for transformation in panel.get("transformations", []):
                named |= set(transformation["options"]["renameByName"]) - {"Value"}
            kept = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", target["expr"]))))
            # Without an aggregation all labels stay.
            assert named <= (kept or {"instance"}), panel["title"]
