"""Which cluster is asked, and one line for each configuration that cannot be used."""

import pytest
import yaml

from tracer.cluster.access import connect, find_config
from tracer.cluster.errors import ClusterError


def config(**changes):
    return {
        "current-context": "one",
        "contexts": [
            {"name": "one", "context": {"cluster": "c", "user": "u"}},
            {"name": "two", "context": {"cluster": "c2"}},
        ],
        "clusters": [
            {"name": "c", "cluster": {"server": "https://192.0.2.1:6443"}},
            {"name": "c2", "cluster": {"server": "https://192.0.2.2:6443"}},
        ],
        "users": [{"name": "u", "user": {"token": "t"}}],
    } | changes


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump(config()))
    return path


def test_contexts(file):
    """The current context is used unless another is named."""
    assert find_config(file).cluster.server == "https://192.0.2.1:6443"
    assert find_config(file, "two").cluster.server == "https://192.0.2.2:6443"


def test_environment(file, tmp_path):
    """KUBECONFIG may name several files; the first that exists is used."""
    environ = {"KUBECONFIG": f"{tmp_path}/none:{file}"}
    assert find_config(environ=environ).context_name == "one"


def test_nothing_to_ask(tmp_path, monkeypatch):
    """Outside a pod and without any configuration, the error lists the ways to name one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ClusterError, match=r"no cluster configured: .*--kubeconfig"):
        find_config(environ={})


BAD = [
    (None, None, "kubeconfig FILE cannot be read: No such file or directory"),
    ("{", None, "kubeconfig FILE is malformed: *"),
    ("", None, "kubeconfig FILE is malformed: it holds no contexts and clusters"),
    ("[]", None, "kubeconfig FILE is malformed: it holds no contexts and clusters"),
    ("\x00", None, "kubeconfig FILE is malformed: *"),
    (config(**{"current-context": None}), None,
     "kubeconfig FILE has no current context; name one with --context"),
    (config(), "three", "kubeconfig FILE has no context 'three'; it has 'one', 'two'"),
    (config(users=[]), None,
     "kubeconfig FILE: context 'one' names 'u', which does not exist"),
    (config(clusters=[]), None,
     "kubeconfig FILE: context 'one' names 'c', which does not exist"),
    (config(clusters=[{"name": "c", "cluster": {"server": 7}}]), None,
     "kubeconfig FILE is malformed: Expected `str`, got `int` - at `$.server`"),
    (config(contexts=[{"context": {}}]), None, "kubeconfig FILE is malformed: *"),
    (config(contexts=3), None, "kubeconfig FILE is malformed: *"),
    (config(contexts=None), None,
     "kubeconfig FILE is malformed: it holds no contexts and clusters"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "context", "message"), BAD, ids=range(len(BAD)))
def test_bad_config(tmp_path, content, context, message):
    """A configuration that cannot be used is refused in one line that names it."""
    file = tmp_path / "config"
    if content is not None:
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(ClusterError) as caught:
        find_config(file, context)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(message.replace("FILE", str(file)).rstrip("*"))


BAD_FILES = [
    ({}, {"certificate-authority": "/nonexistent/ca.crt"}),
    ({}, {"certificate-authority-data": "bm8gY2VydGlmaWNhdGU="}),
    ({}, {"certificate-authority-data": "%%%"}),
    ({}, {"server": "nonsense://\x00"}),
    ({}, {"server": "192.0.2.1:6443"}),
    ({}, {"server": "https://192.0.2.1:99999"}),
    ({}, {"server": "https://"}),
    ({"client-certificate": "/nonexistent/crt", "client-key": "/nonexistent/key"}, {}),
    ({"client-certificate-data": "bm8=", "client-key-data": "bm8="}, {}),
    ({"client-certificate-data": "bm8="}, {}),
    ({"auth-provider": {"name": "gcp"}}, {}),
]


@pytest.mark.parametrize(("user", "cluster"), BAD_FILES)
def test_bad_credentials(tmp_path, user, cluster):
    """Certificates, keys and accounts that cannot be used are refused before connecting."""
    cluster = {"server": "https://192.0.2.1:6443"} | cluster
    changes = {
        "users": [{"name": "u", "user": user}],
        "clusters": [{"name": "c", "cluster": cluster}],
    }
    file = tmp_path / "config"
    file.write_text(yaml.safe_dump(config(**changes)))
    with pytest.raises(ClusterError, match=r"^cannot use context 'one': ") as caught:
        connect(find_config(file))
    assert "\n" not in str(caught.value)
