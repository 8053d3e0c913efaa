"""A real Prometheus that scrapes running agents while scenarios run, and what its users ask it."""

import json
import re
import subprocess
import tempfile
import urllib.parse
import urllib.request
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import yaml

from exporters.prometheus import ConnectionLabels, DropLabels
from lab import kube_proxy, probe
from lab.scenarios import cases
from lab.services import OBJECTS
from tests.deploy.conftest import tool
from tests.lab import test_serve as serve
from tests.lab.commands import PATIENCE_S, wait_until
from tests.unit.apiserver import running

pytestmark = pytest.mark.usefixtures("kernel")

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "deploy/grafana/srcip.dashboard.json").read_text())
RULES = ROOT / "deploy/prometheus/srcip.rules.yaml"
# What Grafana would put there: everything, and intervals that fit a scrape every second.
VARIABLES = {"$__rate_interval": "30s", "$__range": "2m", "$instance": ".*", "$namespace": ".*"}
CHOSEN = cases(modes=["iptables"])


class Prometheus:
    """A running Prometheus."""

    def __init__(self, port):
        self._url = f"http://127.0.0.1:{port}"

    def get(self, path, **query):
        url = f"{self._url}{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:  # noqa: S310 - ours
                return answer.read().decode()
        except OSError:
            return None

    def ask(self, expression):
        """Return the samples of an instant query, as pairs of labels and value."""
        answer = json.loads(self.get("/api/v1/query", query=expression) or "{}")
        assert answer.get("status") == "success", expression
        result = answer["data"]["result"]
        return [(each["metric"], float(each["value"][1])) for each in result]

    def totals(self, metric, labels):
        """Return a counter's totals over all agents."""
        return Counter(
            {
                labels(*(each.get(name, "") for name in labels._fields)): int(value)
                for each, value in self.ask(f"sum by ({','.join(labels._fields)}) ({metric})")
            }
        )

    def has_scraped(self, drains):
        """Whether it has what each agent exported at a drain, or later."""
        found = self.ask("srcip_drain_timestamp_seconds")
        told = {labels["instance"]: value for labels, value in found}
        return all(told.get(node, 0) >= drain_s for node, drain_s in drains.items())


@contextmanager
def scraping(agents, directory, *, rules=RULES, **how):
    """A Prometheus with the project's rules, which scrapes these agents each second."""
    program = tool("prometheus")
    targets = [
        {"targets": [f"127.0.0.1:{agent.port}"], "labels": {"instance": node}}
        for node, agent in agents.items()
    ]
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": [{"job_name": "srcip", "static_configs": targets, **how}],
    }
    (directory / "prometheus.yaml").write_text(yaml.safe_dump(config))
    log = directory / "prometheus.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={directory / 'prometheus.yaml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                "--web.listen-address=127.0.0.1:0",
            ],
            stderr=stderr,
        )

    def port():
        assert process.poll() is None, log.read_text()
        return re.search(r'"Listening on" address=127\.0\.0\.1:(\d+)', log.read_text())

    try:
        prometheus = Prometheus(int(wait_until(port)[1]))
        wait_until(lambda: prometheus.get("/-/ready") is not None)
        yield prometheus
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def scraped(lab, tmp_path_factory):
    """Prometheus after all scenarios were run twice, and the agents that it scrapes."""
    directory = tmp_path_factory.mktemp("prometheus")
    kube_proxy.load(lab, "iptables")
    with ExitStack() as stack:
        api = stack.enter_context(running())
        for item in json.loads(OBJECTS.read_text())["items"]:
            api.put(item)
        cluster = ["--kubeconfig", api.kubeconfig(directory / "config")]
        for node in serve.NODES:
            lab.run(node, "conntrack", "-F")
        agents = {
            # Asking kube-proxy for its mode would be a connection.
            node: stack.enter_context(
                serve.serving(lab, "--proxy-mode", "iptables", nodes=[node], cluster=cluster)
            )
            for node in serve.NODES
        }
        prometheus = stack.enter_context(scraping(agents, directory))
        for _ in range(2):
            probe.run(lab, CHOSEN)
            drains = {node: agent.drained() for node, agent in agents.items()}
            wait_until(lambda drains=drains: prometheus.has_scraped(drains))
        yield prometheus, agents


def test_totals_are_the_connections_made(scraped):
    """By Service, way, verdict and cause Prometheus holds the connections made, exactly."""
    prometheus, agents = scraped
    found = prometheus.totals("srcip_connections_total", ConnectionLabels)
    assert found == sum((agent.connections for agent in agents.values()), Counter())
    assert serve.as_in_the_table(found) == serve.expected(CHOSEN)
    dropped = prometheus.totals("srcip_dropped_packets_total", DropLabels)
    assert dropped == sum((agent.drops for agent in agents.values()), Counter())
    packets = serve.dropped_as_in_the_table({"node1": dropped, "node2": Counter()})
    made = serve.expected_drops(CHOSEN)
    assert packets.keys() == made.keys()
    # On a busy machine a SYN may be sent again before the client gives up.
    assert all(n == made[key] if "udp" in key else n >= made[key] for key, n in packets.items())


def test_nothing_was_lost(scraped):
    """The agents lost nothing, and Prometheus can say so."""
    prometheus, _ = scraped
    losses = prometheus.ask("srcip_lost_records_total")
    assert losses
    assert {value for _, value in losses} == {0}


def queries():
    """Yield every query of the dashboard, with the panel that asks it."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")


def filled_in(expression):
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    return expression


@pytest.mark.parametrize("expression", list(queries()))
def test_query_of_the_dashboard(scraped, expression):
    """It returns data, and numbers."""
    prometheus, _ = scraped
    samples = prometheus.ask(filled_in(expression))
    assert samples
    assert all(value == value for _, value in samples)  # noqa: PLR0124 - not NaN


def panel(title):
    (found,) = (each for each in DASHBOARD["panels"] if each["title"] == title)
    return filled_in(found["targets"][0]["expr"])


def test_the_tables_say_who_and_why(scraped):
    """The Services, ways and causes in the table are those of the scenarios, and no others."""
    prometheus, _ = scraped
    expected = {
        (case.scenario.service, case.scenario.via, case.cause)
        for case in CHOSEN
        if case.verdict == "replaced" and case.scenario.client.startswith("client")
    }
    rows = prometheus.ask(panel("Services that lose their clients' addresses, and why"))
    found = {(each["service"], each["via"], each["cause"]) for each, _ in rows}
    assert found == {each for each in expected if each[0]}
    (lost,) = prometheus.ask(panel("Services that lose addresses"))
    assert lost[1] == len({service for service, _, _ in found})
    dropped = {(case.scenario.service, case.cause) for case in CHOSEN if case.verdict == "dropped"}
    rows = prometheus.ask(panel("Dropped packets, by node and Service"))
    assert {(each["service"], each["cause"]) for each, _ in rows if "service" in each} == dropped


def test_variables_of_the_dashboard(scraped):
    """Each variable has values to choose from."""
    prometheus, _ = scraped
    values = {}
    for each in DASHBOARD["templating"]["list"]:
        if each["type"] == "query":
            metric, label = re.fullmatch(
                r"label_values\((\w+), (\w+)\)", each["query"]["query"]
            ).groups()
            answer = prometheus.get(f"/api/v1/label/{label}/values", **{"match[]": metric})
            values[each["name"]] = set(json.loads(answer)["data"])
    assert values == {"instance": {"node1", "node2"}, "namespace": {"default"}}


def test_rules_hold_data(scraped):
    """Every recording rule has samples, and the alerts for the scenarios are on their way."""
    prometheus, _ = scraped
    groups = yaml.safe_load(RULES.read_text())["groups"]
    records = {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}
    wait_until(lambda: all(prometheus.ask(record) for record in records))
    wanted = {"SrcipConnectionsBlackHoled", "SrcipServiceWithoutEndpoints"}

    def alerts():
        return {each["alertname"] for each, _ in prometheus.ask("ALERTS")}

    wait_until(lambda: wanted <= alerts())
    # Nothing is wrong with policy Local or with the agents.
    assert alerts() == wanted


@pytest.mark.parametrize(("token", "is_up"), [("prometheus", 1), ("somebody", 0)])
def test_https_and_token(lab, tmp_path, token, is_up):
    """Prometheus can scrape over HTTPS only if its token may get /metrics."""
    kube_proxy.load(lab, "iptables")
    with ExitStack() as stack:
        api = stack.enter_context(running())
        api.users = {name: {"username": name} for name in ("prometheus", "somebody")}
        api.allowed = {("prometheus", "get", "/metrics")}
        files = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="srcip-test-")))
        # The agent reads its certificate again as nobody.
        files.chmod(0o755)
        issued = serve.Issued(files)
        issued.authority.cert_pem.write_to_path(files / "ca.crt")
        cluster = ["--kubeconfig", api.kubeconfig(tmp_path / "config")]
        options = ["--tls-cert", issued.cert, "--tls-key", issued.key, "--authorize", "kubernetes"]
        agent = stack.enter_context(serve.serving(lab, *options, cluster=cluster, is_ready=False))
        how = {
            "scheme": "https",
            "tls_config": {"ca_file": str(files / "ca.crt")},
            "authorization": {"credentials": token},
        }
        prometheus = stack.enter_context(scraping({"node1": agent}, tmp_path, **how))
        wait_until(lambda: prometheus.ask("up"))
        assert [value for _, value in prometheus.ask("up")] == [is_up]
        assert bool(prometheus.ask("srcip_build_info")) is bool(is_up)


def test_metrics_are_well_formed(scraped):
    """Promtool finds nothing to complain of in a scrape."""
    _, agents = scraped
    _, _, text = agents["node2"].get("/metrics")
    done = subprocess.run(
        [tool("promtool"), "check", "metrics"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
