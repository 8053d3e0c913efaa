"""Grafana's dashboard: as Grafana's own schema has it, complete, and without overlap."""

import json
import re
import subprocess
from itertools import combinations
from pathlib import Path

import pytest
import yaml

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


FROM_OUTSIDE = (
    'srcip_connections_total{job="srcip",instance="node1",service_namespace="default",'
    'service="SERVICE",client_class="external",verdict="VERDICT"}'
)
DROPPED = (
    'srcip_dropped_packets_total{job="srcip",instance="node1",service_namespace="default",'
    'service="web",cause="no-endpoints"}'
)
TABLE = "Services that lose their clients' addresses, and why"
SHARES = "Share of addresses lost, by Service"


def connections(service, verdict, values):
    series = FROM_OUTSIDE.replace("SERVICE", service).replace("VERDICT", verdict)
    return {"series": series, "values": values}


def row(service, value):
    labels = f'{{service_namespace="default", service="{service}"}}'
    return {"labels": labels, "value": value}


NEW = connections("new", "replaced", "_x18 5x2")
KEPT = connections("kept", "preserved", "0+60x20")
CASES = {
    "a series that began within the range, with all that it counts": (
        TABLE, [NEW, connections("old", "replaced", "7x20")], [row("new", 5)]
    ),
    "and such a Service is among those that lose addresses": (
        "Services that lose addresses", [NEW, KEPT], [{"labels": "{}", "value": 1}]
    ),
    "one that was there before, with its increase": (
        TABLE, [connections("old", "replaced", "7+60x20")], [row("old", 600)]
    ),
    "drops alike": (
        "Dropped packets, by node and Service",
        [{"series": DROPPED, "values": "_x18 3x2"}],
        [{**row("web", 3), "labels": DROPPED.partition("total")[2].replace('job="srcip",', "")}],
    ),
    "a share of none, where all are kept": (
        "Share of addresses lost", [KEPT], [{"labels": "{}", "value": 0}]
    ),
    "and so for the Service": (SHARES, [KEPT], [row("kept", 0)]),
    "no share of nothing": (SHARES, [connections("idle", "preserved", "7x20")], []),
    "agents that are all down": (
        "Not ready",
        [{"series": f'up{{job="srcip",instance="{each}"}}', "values": "0x20"} for each in "ab"],
        [{"labels": "{}", "value": 2}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_a_panel_shows(promtool, tmp_path, case):
    """Also where a series is new, or is not there."""
    title, series, expected = CASES[case]
    (query,) = (each["targets"][0]["expr"] for each in PANELS if each["title"] == title)
    filled = {"$__rate_interval": "4m", "$__range": "10m", "$instance": ".*", "$namespace": ".*"}
    for name, value in filled.items():
        query = query.replace(name, value)
    asked = {"expr": query, "eval_time": "20m", "exp_samples": expected}
    tests = [{"interval": "1m", "input_series": series, "promql_expr_test": [asked]}]
    path = tmp_path / "panel.yaml"
    path.write_text(yaml.safe_dump({"tests": tests}))
    done = subprocess.run(
        [promtool, "test", "rules", str(path)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
