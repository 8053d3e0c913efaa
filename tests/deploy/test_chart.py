"""The Helm chart, rendered by Helm itself: sound, of least privilege, and as documented."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import click
import pytest
import yaml

from tests.deploy.conftest import library
from tracer import cli
from tracer.cluster.resource import resources
from tracer.cluster.review import ACCESS, TOKENS
from tracer.commands.serve import MAX_DRAIN_INTERVAL_S

helm = library("helm_python")
jsonschema = library("jsonschema")
validator = library("kubernetes_validate")

from deploy import render  # noqa: E402
from tests.deploy.chart import EVERYTHING, daemonset, objects  # noqa: E402

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/srcip"
SERVICE_MONITOR = EVERYTHING | {"monitor": {"enabled": True, "kind": "ServiceMonitor"}}
# Chart.yaml asks for the first of them.
VERSIONS = [f"1.{minor}" for minor in range(25, 38)]


@pytest.mark.parametrize("values", [{}, EVERYTHING, SERVICE_MONITOR], ids=["no", "all", "other"])
def test_lint(values):
    """Helm lints it without findings, except that there is no icon."""
    messages = helm.lint(str(CHART), values, namespace="srcip", strict=True)["messages"]
    assert [each["error"] for each in messages] == ["icon is recommended"]


def test_version():
    """The chart is of the project's version, and so is the image that it asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == project["version"]
    assert daemonset()[1]["image"] == f"srcip:{project['version']}"


def test_manifests_are_in_step():
    """The plain manifests and the chart's copies are what 'make manifests' makes."""
    for name, text in render.manifests().items():
        path = ROOT / "deploy/manifests" / name
        assert path.read_text() == text, f"run 'make manifests': {name}"
    for copy, source in render.COPIES.items():
        assert copy.read_bytes() == source.read_bytes(), f"run 'make manifests': {copy.name}"


@pytest.mark.parametrize("version", VERSIONS)
def test_api_schemas(version):
    """Every object is one of the Kubernetes API, without a field that it does not know."""
    plain = [
        each
        for path in (ROOT / "deploy/manifests").glob("*.yaml")
        for each in yaml.safe_load_all(path.read_text())
    ]
    every = [*objects().values(), *objects(EVERYTHING).values(), *objects(SERVICE_MONITOR).values()]
    checked = [each for each in plain + every if not is_operators(each)]
    assert len(checked) > 20
    for each in checked:
        validator.validate(each, version, strict=True)


def is_operators(each):
    return each["apiVersion"].startswith("monitoring.coreos.com/")


def test_the_validator_finds_a_wrong_field():
    """The check above can fail."""
    wrong = objects()["DaemonSet"]
    wrong["spec"]["template"]["spec"]["containers"][0]["securityContext"]["capability"] = {}
    with pytest.raises(validator.ValidationError):
        validator.validate(wrong, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("values", [EVERYTHING, SERVICE_MONITOR], ids=["pods", "services"])
def test_operator_schemas(values):
    """Monitor and rules are objects of Prometheus' operator, without an unknown field."""
    checked = [each for each in objects(values).values() if is_operators(each)]
    assert len(checked) == 2
    for each in checked:
        schema = ROOT / "tests/data/prometheus-operator" / f"{each['kind']}.json"
        jsonschema.validate(each, json.loads(schema.read_text()))


def test_rules_of_the_operator(promtool, tmp_path):
    """They are the rules of deploy/prometheus, with the runbooks where the values say."""
    rules = objects(EVERYTHING)["PrometheusRule"]["spec"]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(rules))
    subprocess.run([promtool, "check", "rules", str(path)], check=True, capture_output=True)
    original = yaml.safe_load((ROOT / "deploy/prometheus/srcip.rules.yaml").read_text())
    expected = json.dumps(original).replace(
        '"runbook_url": "', '"runbook_url": "https://docs.example/'
    )
    assert json.dumps(rules) == expected


def test_the_pod_may_no_more_than_it_needs():
    """Host network and named capabilities, but nothing else of the host."""
    spec, container = daemonset()
    context = container["securityContext"]
    assert spec["hostNetwork"] is True
    assert not {"hostPID", "hostIPC", "shareProcessNamespace", "initContainers"} & set(spec)
    assert all(set(volume) == {"name", "emptyDir"} for volume in spec["volumes"])
    assert context["capabilities"]["drop"] == ["ALL"]
    assert "SYS_ADMIN" not in context["capabilities"]["add"]
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is context["privileged"] is False
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    # Otherwise the kubelet would give the renewed token to that user only.
    assert "runAsUser" not in context
    assert "securityContext" not in spec


WATCHED = {
    (each.group, each.plural, verb) for each in resources("node1") for verb in ("list", "watch")
}
REVIEWED = {(each.group, each.plural, "create") for each in (TOKENS, ACCESS)}


@pytest.mark.parametrize(
    ("values", "used"),
    [({}, WATCHED), (EVERYTHING, WATCHED | REVIEWED)],
    ids=["default", "authorize"],
)
def test_cluster_role(values, used):
    """It may list and watch what the agent watches, review tokens if configured, and no more."""
    allowed = {
        (group, resource, verb)
        for rule in objects(values)["ClusterRole"]["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert allowed == used


def test_role_of_those_who_scrape():
    """If tokens are required there is a role that may scrape; otherwise there is none."""
    reader = objects(EVERYTHING)["MetricsReader"]
    assert reader["rules"] == [{"nonResourceURLs": ["/metrics"], "verbs": ["get"]}]
    assert "MetricsReader" not in objects()


def test_role_of_those_who_listen():
    """It exists if the port serves the stream, grants only that, and is bound to no account."""
    everything = objects(EVERYTHING)
    assert everything["StreamReader"]["rules"] == [
        {"nonResourceURLs": ["/stream"], "verbs": ["get"]}
    ]
    assert everything["ClusterRoleBinding"]["roleRef"]["name"] == "srcip"
    assert "--stream-https" in daemonset(EVERYTHING)[1]["args"]
    assert "StreamReader" not in objects()
    assert "--stream-https" not in daemonset()[1]["args"]
    secured = {"tls": {"secretName": "x"}, "agent": {"authorize": "kubernetes"}}
    assert "StreamReader" not in objects(secured)
    policy = everything["NetworkPolicy"]["spec"]["ingress"]
    assert [each["ports"] for each in policy] == [[{"port": 9464, "protocol": "TCP"}]]


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({}, r"stream\.https needs tls\.secretName and agent\.authorize kubernetes"),
        ({"tls": {"secretName": "x"}}, r"stream\.https needs tls\.secretName and agent\.authorize"),
        (
            {"tls": {"secretName": "x"}, "agent": {"authorize": "kubernetes"}}
            | {"stream": {"https": True, "enabled": False}},
            r"stream\.https needs stream\.enabled",
        ),
    ],
)
def test_a_stream_that_would_be_open(values, why):
    """Rendering refuses it, as the agent would."""
    with pytest.raises(helm.HelmError, match=why):
        render.render({"stream": {"https": True}} | values)


def test_https():
    """With a certificate, agent, probes and scrape speak HTTPS; tokens are refused without."""
    spec, container = daemonset(EVERYTHING)
    (mount,) = (each for each in container["volumeMounts"] if each["name"] == "tls")
    assert f"--tls-cert={mount['mountPath']}/tls.crt" in container["args"]
    for probe in PROBES:
        assert container[probe]["httpGet"]["scheme"] == "HTTPS"
    # Otherwise it is not read again when it is renewed.
    (volume,) = (each for each in spec["volumes"] if each["name"] == "tls")
    assert volume["secret"] == {"secretName": "srcip-tls", "defaultMode": 0o444}
    (endpoint,) = objects(EVERYTHING)["PodMonitor"]["spec"]["podMetricsEndpoints"]
    assert endpoint["scheme"] == "https"
    with pytest.raises(helm.HelmError, match=r"needs tls\.secretName"):
        render.render({"agent": {"authorize": "kubernetes"}})


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["default", "everything"])
def test_arguments(values):
    """The command line understands what the agent is started with."""
    _, container = daemonset(values)
    given = {"NODE_NAME": "node1", "HOST_IP": "10.240.0.3"}
    assert {each["name"] for each in container["env"]} == set(given)
    arguments = [
        re.sub(r"\$\((\w+)\)", lambda found: given[found[1]], each) for each in container["args"]
    ]
    parent = click.Context(cli.cli)
    command = cli.cli.get_command(parent, arguments[0])
    context = command.make_context(arguments[0], arguments[1:], parent=parent)
    assert context.params["bind"] == "10.240.0.3"
    assert context.params["node_name"] == "node1"


PROBES = {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}


def test_probes():
    """They ask the agent's own paths, at its port; a start on a busy node may take two minutes."""
    _, container = daemonset()
    (port,) = container["ports"]
    assert port["name"] == "metrics"
    for probe, path in PROBES.items():
        assert container[probe]["httpGet"] == {"path": path, "port": "metrics"}
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 120


@pytest.mark.parametrize(
    ("bind", "host"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("$(HOST_IP)", None)]
)
def test_probes_of_one_that_listens_on_loopback(bind, host):
    """The kubelet asks there, too, and not at the pod's address, where nothing listens."""
    _, container = daemonset({"agent": {"bind": bind}})
    assert {container[probe]["httpGet"].get("host") for probe in PROBES} == {host}


def test_stream():
    """The socket is in the pod, or on the node if it is named; its group needs CAP_CHOWN."""
    spec, container = daemonset()
    assert "--stream-socket=/run/srcip/agent.sock" in container["args"]
    assert "emptyDir" in next(each for each in spec["volumes"] if each["name"] == "run")
    spec, container = daemonset(EVERYTHING)
    volume = next(each for each in spec["volumes"] if each["name"] == "run")
    assert volume["hostPath"] == {"path": "/run/srcip", "type": "DirectoryOrCreate"}
    assert "--stream-group=4242" in container["args"]
    assert "CHOWN" in container["securityContext"]["capabilities"]["add"]
    spec, container = daemonset({"stream": {"enabled": False, "group": 4242}})
    assert "--no-stream" in container["args"]
    assert not [each for each in spec["volumes"] if each["name"] == "run"]
    assert "CHOWN" not in container["securityContext"]["capabilities"]["add"]
    with pytest.raises(helm.HelmError, match="/stream/hostPath"):
        render.render({"stream": {"hostPath": "run/srcip"}})


def test_names():
    """Two releases can coexist: cluster-wide objects have the release's name."""
    found = objects(EVERYTHING, name="other", namespace="monitoring")
    for kind in ("ClusterRole", "ClusterRoleBinding", "PriorityClass", "DaemonSet"):
        assert found[kind]["metadata"]["name"] == "other"
    assert found["ClusterRoleBinding"]["subjects"][0]["namespace"] == "monitoring"
    assert found["Namespace"]["metadata"]["name"] == "monitoring"
    spec = found["DaemonSet"]["spec"]["template"]["spec"]
    assert spec["priorityClassName"] == spec["serviceAccountName"] == "other"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"agent": {"port": "http"}}, "/agent/port"),
        ({"agent": {"port": 70000}}, "/agent/port"),
        ({"agent": {"port": 443}}, "/agent/port"),
        ({"agent": {"prot": 1}}, "prot"),
        ({"agent": {"drainInterval": MAX_DRAIN_INTERVAL_S + 1}}, "/agent/drainInterval"),
        ({"agents": {}}, "agents"),
        ({"monitor": {"kind": "Monitor"}}, "/monitor/kind"),
        ({"securityContext": {"capabilities": ["ALL"]}}, "/securityContext/capabilities"),
        ({"securityContext": {"capabilities": ["CAP_BPF"]}}, "/securityContext/capabilities"),
        ({"maxUnavailable": "0%"}, "/maxUnavailable"),
        ({"tolerations": {}}, "/tolerations"),
    ],
    ids=str,
)
def test_wrong_values(values, named):
    """A wrong value is refused by name."""
    with pytest.raises(helm.HelmError, match=re.escape(named)):
        render.render(values)


def test_values_are_documented():
    """Every value has a comment before it, and a place in the schema."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    lines = (CHART / "values.yaml").read_text().splitlines()
    places = [schema]
    for at, line in enumerate(lines):
        found = re.match(r"(  )?([a-zA-Z]+):( .*)?$", line)
        if not found:
            continue
        depth = 1 if found[1] else 0
        del places[depth + 1 :]
        place = places[depth]
        assert place is None or found[2] in place["properties"], line
        is_section = depth == 0 and not found[3] and "properties" in place["properties"][found[2]]
        places.append(place["properties"][found[2]] if is_section else None)
        if not is_section and place is not None:
            assert lines[at - 1].strip().startswith("#"), f"{line} has no comment"
