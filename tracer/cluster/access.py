"""
How to reach an API server, by kubeconfig or service account, with lightkube.

lightkube reads the configuration, handles certificates and re-reads a rotated token; this module
adds what it lacks. docs/decisions/0010-kubernetes-client.md explains the choice.
"""

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import httpx2 as httpx
import msgspec
import yaml
from lightkube.config import kubeconfig as lightkube
from lightkube.config.client_adapter import (
    AsyncClient,
    BearerTokenFileAuth,
    Client,
    ConnectionParams,
)
from lightkube.config.models import User, UserExec
from lightkube.core.exceptions import ConfigError

from tracer.cluster.errors import ClusterError
from tracer.cluster.fields import shown
from tracer.cluster.refusal import FinalError

# Where the kubelet puts a pod's token and certificate.
SERVICE_ACCOUNT = Path(lightkube.SERVICE_ACCOUNT)
_CONNECT_S = 10
_EXEC_S = 60
_Client = TypeVar("_Client", httpx.AsyncClient, httpx.Client)
# What lightkube raises for a malformed kubeconfig.
_MALFORMED = (
    yaml.YAMLError,
    msgspec.MsgspecError,
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    RecursionError,
)


def find_config(
    kubeconfig: Path | None = None,
    context: str | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
) -> lightkube.SingleConfig:
    """
    Return the cluster and account to use.

    Args:
        kubeconfig: The file to read. Default: the first existing file that ``KUBECONFIG`` names,
            else the pod's service account, else ``~/.kube/config``.
        context: The context in it; None for its current one.
        environ: Environment variables.

    Raises:
        ClusterError: There is no configuration, or it cannot be read or has no such context.
    """
    named = [Path(item) for item in environ.get("KUBECONFIG", "").split(os.pathsep) if item]
    if kubeconfig is None and named:
        kubeconfig = next((path for path in named if _is_there(path)), named[0])
    in_pod = "KUBERNETES_SERVICE_HOST" in environ and (SERVICE_ACCOUNT / "token").exists()
    if kubeconfig is None and context is None and in_pod:
        return _from_service_account(SERVICE_ACCOUNT)
    path = kubeconfig or Path(lightkube.DEFAULT_KUBECONFIG).expanduser()
    if kubeconfig is None and not _is_there(path):
        raise ClusterError(
            f"no cluster configured: {path} does not exist, KUBECONFIG is not set, and this is not"
            " a pod with a service account; name a file with --kubeconfig or --cluster"
        )
    return _from_file(path, context)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        # The directory is not accessible: reading the file reports that.
        return True


def connect(config: lightkube.SingleConfig) -> httpx.AsyncClient:
    """
    Return a client for the cluster, for the caller to close. It connects when first used.

    Raises:
        ClusterError: Certificates, key or account of the configuration cannot be used.
    """
    return _connect(config, AsyncClient, httpx.Timeout(30, connect=_CONNECT_S))


def connect_blocking(config: lightkube.SingleConfig, timeout_s: float) -> httpx.Client:
    """
    Return a blocking client that any thread may use; see `connect`.

    Raises:
        ClusterError: Certificates, key or account of the configuration cannot be used.
    """
    return _connect(config, Client, httpx.Timeout(timeout_s))


def plugin_token(plugin: UserExec) -> str:
    """
    Return a token from a kubeconfig's credential plugin.

    Raises:
        ClusterError: The plugin returns none.
    """
    return asyncio.run(_ExecAuth(plugin).fetch(None))


def _connect(
    config: lightkube.SingleConfig,
    make: Callable[[lightkube.SingleConfig, ConnectionParams], _Client],
    timeout: httpx.Timeout,
) -> _Client:
    user = config.user or User()
    auth = _ExecAuth(user.exec) if user.exec and not (user.token or user.token_file) else None
    config = config._replace(user=msgspec.structs.replace(user, exec=None))
    _check_server(config)
    _check_files(config, user)
    try:
        client = make(config, ConnectionParams(timeout=timeout, trust_env=False))
    except (ConfigError, OSError, ValueError, TypeError, httpx.InvalidURL) as error:
        reason = _reason(error)
    else:
        if auth is not None:
            client.auth = auth
        elif user.token_file is not None:
            client.auth = _TokenFileAuth(user.token_file)
        return client
    # Outside the except clause, whose traceback would keep lightkube's temporary key files alive.
    raise ClusterError(f"cannot use context {shown(config.context_name)}: {reason}")


def _check_server(config: lightkube.SingleConfig) -> None:
    # The HTTP client notices a bad port only when it connects.
    server = config.cluster.server
    try:
        parts = urlsplit(server)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url:
        raise ClusterError(
            f"cannot use context {shown(config.context_name)}: its server {shown(server)} is not a"
            " URL such as https://192.0.2.1:6443"
        )


def _check_files(config: lightkube.SingleConfig, user: User) -> None:
    # OpenSSL's error about a missing file does not name it.
    files = (config.cluster.certificate_auth, user.client_cert, user.client_key)
    for file in files:
        if file is not None and not Path(config.abs_file(file)).is_file():
            raise ClusterError(
                f"cannot use context {shown(config.context_name)}: {file} does not exist"
            )
    has_cert, has_key = (
        any(item is not None for item in items)
        for items in (
            (user.client_cert, user.client_cert_data),
            (user.client_key, user.client_key_data),
        )
    )
    if has_cert != has_key:
        missing = "client-key" if has_cert else "client-certificate"
        raise ClusterError(f"cannot use context {shown(config.context_name)}: it has no {missing}")


def _from_service_account(directory: Path) -> lightkube.SingleConfig:
    try:
        config = lightkube.KubeConfig.from_service_account(directory).get()
    except (ConfigError, KeyError, OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"cannot use the service account in {directory}: {error}") from None
    assert config is not None  # noqa: S101 - from_service_account sets the current context
    return config


def _from_file(path: Path, context: str | None) -> lightkube.SingleConfig:
    try:
        content = yaml.safe_load(path.read_bytes())
        # kubectl writes null for each into an empty file.
        if not isinstance(content, dict) or None in map(content.get, ("contexts", "clusters")):
            raise ValueError("it holds no contexts and clusters")
        config = lightkube.KubeConfig.from_dict(content, fname=path)
    except OSError as error:
        raise ClusterError(f"kubeconfig {path} cannot be read: {error.strerror}") from None
    except _MALFORMED as error:
        raise ClusterError(f"kubeconfig {path} is malformed: {_reason(error)}") from None
    name = context or config.current_context
    if name is None:
        raise ClusterError(f"kubeconfig {path} has no current context; name one with --context")
    if name not in config.contexts:
        known = ", ".join(shown(item) for item in sorted(map(str, config.contexts))) or "none"
        raise ClusterError(f"kubeconfig {path} has no context {shown(name)}; it has {known}")
    try:
        found = config.get(name)
    except _MALFORMED as error:
        raise ClusterError(
            f"kubeconfig {path}: context {shown(name)} names {_reason(error)}, which does not exist"
        ) from None
    assert found is not None  # noqa: S101 - the name was looked up above
    return found


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyError):
        return shown(error.args[0])
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{error.problem} at line {mark.line + 1}, column {mark.column + 1}"
    return " ".join(str(error).split()) or type(error).__name__


class _TokenFileAuth(BearerTokenFileAuth):
    """
    A bearer token from a file, which is read again when the token is refused.

    lightkube would keep what a file holds that is just being written. No request can be sent with
    it, so none is refused, and the file would never be read again.
    """

    def _read_token(self) -> str:
        bearer: str = super()._read_token()
        if bearer == bearer.rstrip() and bearer.isascii() and bearer.isprintable():
            return bearer
        raise ConfigError(f"Token file {self._token_file} holds no token")


class _ExecAuth(httpx.Auth):
    """
    Bearer tokens from a credential plugin, which is asked again when a token is refused.

    lightkube 1.0 supports only the beta versions of client.authentication.k8s.io, while today's
    cloud plugins use v1.
    """

    def __init__(self, plugin: UserExec) -> None:
        self._plugin = plugin
        self._token: str | None = None
        # For the tasks of one event loop. The blocking client runs a loop per call, one at a time.
        self._lock = asyncio.Lock()

    async def async_auth_flow(
        self, request: httpx.Request
    ) -> AsyncGenerator[httpx.Request, httpx.Response]:
        used = self._token or await self.fetch(None)
        request.headers["Authorization"] = f"Bearer {used}"
        response = yield request
        if response.status_code == 401:
            request.headers["Authorization"] = f"Bearer {await self.fetch(used)}"
            yield request

    def sync_auth_flow(
        self, request: httpx.Request
    ) -> Generator[httpx.Request, httpx.Response, None]:
        used = self._token or asyncio.run(self.fetch(None))
        request.headers["Authorization"] = f"Bearer {used}"
        response = yield request
        if response.status_code == 401:
            request.headers["Authorization"] = f"Bearer {asyncio.run(self.fetch(used))}"
            yield request

    async def fetch(self, refused: str | None) -> str:
        """Return a token other than the refused one."""
        async with self._lock:
            # Another watch may have asked while this one waited.
            if self._token is None or self._token == refused:
                self._token = await self._ask()
            return self._token

    async def _ask(self) -> str:
        try:
            process = await asyncio.create_subprocess_exec(
                self._plugin.command,
                *(self._plugin.args or ()),
                env=self._environ(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
        except OSError as error:
            raise self._error(str(error.strerror)) from None
        try:
            output, complaint = await asyncio.wait_for(process.communicate(), _EXEC_S)
        except TimeoutError:
            raise self._error(f"no answer within {_EXEC_S} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            last = complaint.decode(errors="replace").strip().rpartition("\n")[2] or "no message"
            raise self._error(f"exit code {process.returncode}: {ascii(last)[1:-1]}")
        return self._token_in(output)

    def _environ(self) -> dict[str, str]:
        info = {
            "apiVersion": self._plugin.apiVersion,
            "kind": "ExecCredential",
            "spec": {"interactive": False},
        }
        added = {item.name: item.value for item in self._plugin.env or ()}
        return {**os.environ, **added, "KUBERNETES_EXEC_INFO": json.dumps(info)}

    def _token_in(self, output: bytes) -> str:
        try:
            token = json.loads(output)["status"]["token"]
        except (ValueError, LookupError, TypeError, RecursionError):
            token = None
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise self._error("its output has no status.token")
        return token

    def _error(self, reason: str) -> FinalError:
        return FinalError(f"credential plugin {shown(self._plugin.command)}: {reason}")
