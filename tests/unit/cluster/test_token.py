"""The token that is shown to an agent: from a file, a kubeconfig, its plugin, a pod's account."""

import json
import sys

import pytest
import yaml

from tests.unit.cluster.test_access import config
from tracer.cluster import access
from tracer.cluster.errors import ClusterError
from tracer.cluster.token import token_in, token_of


@pytest.fixture
def kubeconfig(tmp_path):
    """Write a kubeconfig whose user is this one."""

    def write(user):
        path = tmp_path / "config"
        path.write_text(yaml.safe_dump(config(users=[{"name": "u", "user": user}])))
        return path

    return write


def plugin(said):
    return {
        "exec": {
            "apiVersion": "client.authentication.k8s.io/v1",
            "command": sys.executable,
            "args": ["-c", f"print({said!r})"],
            "interactiveMode": "Never",
        }
    }


def test_of_a_kubeconfig(kubeconfig, tmp_path):
    """As it stands there, in a file beside it, or as its plugin gives it."""
    (tmp_path / "token").write_text("from a file\n".replace(" ", "-"))
    answer = json.dumps({"kind": "ExecCredential", "status": {"token": "plugged"}})
    users = {
        "t": {"token": "t"},
        "from-a-file": {"tokenFile": "token"},
        "plugged": plugin(answer),
    }
    assert [token_of(kubeconfig(user), None) for user in users.values()] == list(users)
    assert token_of(kubeconfig({"token": "t"}), "one") == "t"


def test_of_a_pod(tmp_path, monkeypatch):
    """The service account's, read when it is asked for."""
    for name in ("token", "namespace", "ca.crt"):
        (tmp_path / name).write_text(f"the-{name}\n")
    monkeypatch.setattr(access, "SERVICE_ACCOUNT", tmp_path)
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "192.0.2.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    assert token_of(None, None) == "the-token"


@pytest.mark.parametrize(
    ("user", "why"),
    [
        ({"username": "u", "password": "p"}, "its user has no token, and an agent accepts nothing"),
        ({"token": "a b"}, "context 'one' holds no token but several words"),
        ({"token": "a\r\nb: c"}, "context 'one' holds no valid bearer token"),
        ({"tokenFile": "none"}, "cannot read token file .*none: No such file"),
        (plugin("nonsense"), "credential plugin .*: its output has no status.token"),
    ],
)
def test_users_without_one(kubeconfig, user, why):
    """One line names the token's source, and what to do."""
    with pytest.raises(ClusterError, match=why):
        token_of(kubeconfig(user), None)


@pytest.mark.parametrize(
    "said", [b"", b"\n", b"x" * 20_000, b"\xff", b"a\0b", b"a\nb", "ä".encode()]
)
def test_files_without_one(tmp_path, said):
    """Text that cannot be in a header is no token, and is not shown."""
    path = tmp_path / "token"
    path.write_bytes(said)
    with pytest.raises(ClusterError, match=f"token file {path} holds no valid bearer token"):
        token_in(path)
