"""Prometheus' rules: they are sound, every alert fires when it should, and has its page."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from exporters.prometheus import ConnectionLabels, DropLabels

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus/srcip.rules.yaml"
CASES = Path(__file__).with_name("rules.test.yaml")
RUNBOOKS = ROOT / "docs/runbooks"

GROUPS = yaml.safe_load(RULES.read_text())["groups"]
ALERTS = {rule["alert"]: rule for group in GROUPS for rule in group["rules"] if "alert" in rule}
RECORDS = {rule["record"] for group in GROUPS for rule in group["rules"] if "record" in rule}
EXPRESSIONS = [rule["expr"] for group in GROUPS for rule in group["rules"]]


def check(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_are_sound(promtool):
    """Promtool parses every rule, and finds none twice."""
    check(promtool, "check", "rules", "--lint=all", "--lint-fatal", str(RULES))


def test_cases(promtool):
    """Every case of the file gives the alerts and values that it names."""
    check(promtool, "test", "rules", str(CASES))


def test_every_alert_has_its_cases():
    """Each alert has a case in which it fires and one in which it does not."""
    fires, is_quiet = set(), set()
    for case in yaml.safe_load(CASES.read_text())["tests"]:
        for each in case["alert_rule_test"]:
            (fires if each["exp_alerts"] else is_quiet).add(each["alertname"])
    assert fires == is_quiet == set(ALERTS)


@pytest.mark.parametrize("name", ALERTS)
def test_runbook(name):
    """Each alert names its page: what it means, what to check and do, when it is harmless."""
    annotations = ALERTS[name]["annotations"]
    assert annotations["runbook_url"] == f"docs/runbooks/{name}.md"
    text = (RUNBOOKS / f"{name}.md").read_text()
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    assert headings == [name, "What to check", "What to do", "When it is harmless"]
    # Its meaning comes first, in one sentence.
    meaning = re.match(r"# \w+\n\n([A-Z][^#]+?)\n\n", text)
    assert meaning, text
    assert re.fullmatch(r"[^.]*(?:\.\w[^.]*)*\.", meaning[1]), meaning[1]
    listed = re.search(rf"^\| \[{name}\]\({name}\.md\) \| (\w+) \|", runbooks(), re.MULTILINE)
    assert listed, "not in docs/runbooks/README.md"
    assert listed[1] == ALERTS[name]["labels"]["severity"]


def runbooks():
    return (RUNBOOKS / "README.md").read_text()


def queries():
    """Yield every line to paste that is not a command, of every page."""
    for path in sorted(RUNBOOKS.glob("*.md")):
        for block in re.findall(r"^ *```\n(.*?)^ *```", path.read_text(), re.DOTALL | re.MULTILINE):
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                if line.split()[0] not in {"curl", "kubectl", "srcip"}:
                    yield line


QUERIES = list(queries())


def test_queries_of_runbooks(promtool, tmp_path):
    """Promtool parses each query of a page, and its metrics are documented."""
    rules = [{"record": f"q{i}", "expr": each} for i, each in enumerate(QUERIES)]
    assert rules
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "runbooks", "rules": rules}]}))
    check(promtool, "check", "rules", str(path))
    documented = (ROOT / "docs/metrics.md").read_text()
    for query in QUERIES:
        for name in re.findall(r"\b(?:srcip|process)_\w+", query):
            assert f"`{name}`" in documented, query


def test_no_page_without_alert():
    """There is no page of an alert that is gone."""
    assert {path.stem for path in RUNBOOKS.glob("*.md")} - {"README"} == set(ALERTS)


def test_metrics_exist():
    """Each metric of a rule is recorded by another, or documented."""
    documented = (ROOT / "docs/metrics.md").read_text()
    for expression in EXPRESSIONS:
        for name in re.findall(r"(?<![\w:])(?:\w+:)?(?:srcip|process)_\w+(?::\w+)?", expression):
            assert name in RECORDS or f"`{name}`" in documented, name


def test_labels_exist():
    """Each label by which the two large metrics are told apart is one of theirs."""
    # Those of the target, and those that every sample of a scrape has.
    known = {"job", "instance", *ConnectionLabels._fields, *DropLabels._fields}
    for expression in EXPRESSIONS:
        inside = re.findall(r"srcip_(?:connections|dropped\w+):?[\w:]*\s*\{([^}]*)\}", expression)
        used = re.findall(r"(\w+)\s*(?:=~|!=|!~|=)\s*\"", " ".join(inside))
        used += re.findall(r"\w+", " ".join(re.findall(r"(?:by|on) \(([^)]*)\)", expression)))
        assert set(used) <= known | {"stage", "reason"}, expression


SCRAPE = ROOT / "deploy/prometheus/scrape.yaml"
TARGET = {
    "__meta_kubernetes_pod_label_app_kubernetes_io_name": "srcip",
    "__meta_kubernetes_pod_container_port_name": "metrics",
    "__meta_kubernetes_pod_node_name": "node1",
}


def targets(promtool, tmp_path, job, labels):
    """
    What Prometheus makes of a target with these labels of discovery.

    Debian builds it without Kubernetes: what that would discover is given by hand.
    """
    config = yaml.safe_load(SCRAPE.read_text())
    (chosen,) = (each for each in config["scrape_configs"] if each["job_name"] == job)
    if chosen.pop("kubernetes_sd_configs", None):
        chosen["static_configs"] = [{"targets": ["10.240.0.3:9464"], "labels": labels}]
    path = tmp_path / "prometheus.yaml"
    path.write_text(yaml.safe_dump(config | {"scrape_configs": [chosen]}))
    check(promtool, "check", "config", str(path))
    done = subprocess.run(
        [promtool, "check", "service-discovery", "--timeout=1s", str(path), job],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found = json.loads(done.stdout[done.stdout.index("[") :])
    return [each["labels"] for each in found if each.get("labels")]


def test_scraping_in_the_cluster(promtool, tmp_path):
    """An agent's pod is a target of the job that the rules name, by its node's name."""
    (labels,) = targets(promtool, tmp_path, "srcip", TARGET)
    assert (labels["job"], labels["instance"]) == ("srcip", "node1")
    other = {**TARGET, "__meta_kubernetes_pod_label_app_kubernetes_io_name": "other"}
    assert targets(promtool, tmp_path, "srcip", other) == []
    other = {**TARGET, "__meta_kubernetes_pod_container_port_name": "http"}
    assert targets(promtool, tmp_path, "srcip", other) == []


def test_scraping_without_a_cluster(promtool, tmp_path):
    """So is an agent that systemd runs."""
    found = targets(promtool, tmp_path, "srcip-systemd", {})
    assert {(each["job"], each["instance"]) for each in found} == {
        ("srcip", "node1.example"),
        ("srcip", "node2.example"),
    }
