"""srcip trace --agent: what a running agent judges, without privileges of one's own."""

import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import click
from click.core import ParameterSource

from exporters.terminal import printable
from tracer.commands import options
from tracer.commands.output import Expectation, Writer
from tracer.commands.run import run, stop_on_signals
from tracer.pipeline import Wanted
from tracer.stream.client import AgentStream
from tracer.stream.protocol import URL_PATH
from tracer.stream.upgrade import HttpsAgent

# What the agent was told when it was started, and what it does not hand out.
_AGENT_S_OWN = (
    "netns", "node_name", "cluster", "no_cluster", "proxy_mode", "masquerade_mark", "record",
    "packets", "diagram_file", "otlp", "read_proxy_headers", "trusted_proxy",
)  # fmt: skip
# Where a token may come from, which only an agent at a URL asks for; and what else it takes.
_ACCOUNT = ("kubeconfig", "context")
_URL_S_OWN = ("token_file", "ca_file", "tls_server_name")
# An agent answers at once, or when it has begun to count: after half a minute at the latest.
_HELLO_S = 45.0


agent_options = options.together(
    click.option(
        "--token-file",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="With --agent https://...: show the agent the bearer token in FILE. Or else that of"
        " --kubeconfig or --context.",
    ),
    click.option(
        "--ca-file",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="With --agent https://...: trust the authorities in FILE (PEM). Default: those of the"
        " system.",
    ),
    click.option(
        "--tls-server-name",
        metavar="NAME",
        help="With --agent https://...: what the agent's certificate is of. Default: the host.",
    ),
)


def agent_at(where: str, parameters: Mapping[str, Any]) -> Path | HttpsAgent:
    """
    Return the agent that ``--agent`` names.

    Args:
        where: Its value: a path, or a URL.
        parameters: The other options.

    Raises:
        click.UsageError: If it names none, or another option does not go with it.
        ClusterError: If there is no token for it.
    """
    is_url = "://" in where and not where.startswith("unix:")
    _refuse(_AGENT_S_OWN if is_url else (*_AGENT_S_OWN, *_ACCOUNT), _IS_THE_AGENT_S)
    if not is_url:
        _refuse(_URL_S_OWN, _IS_THE_URL_S)
        return Path(where.removeprefix("unix:"))
    host, port = _host_and_port(where)
    return HttpsAgent(
        host=host,
        port=port,
        token=_token(parameters),
        ca_file=parameters["ca_file"],
        server_name=parameters["tls_server_name"],
    )


def refuse_what_is_for_an_agent() -> None:
    """
    Refuse options that say nothing without an agent.

    Raises:
        click.UsageError: If there is one.
    """
    _refuse(_URL_S_OWN, _IS_THE_URL_S)


def through_agent(
    agent: Path | HttpsAgent,
    wanted: Wanted,
    writer: Writer,
    expectation: Expectation,
    *,
    ready_file: Path | None,
    count: int | None,
    timeout_s: float | None,
) -> NoReturn:
    """
    Show what an agent judges, and end the program with the exit code.

    Raises:
        StreamError: If there is no agent, or it refuses or goes away.
    """
    end_s = time.monotonic() + timeout_s if timeout_s else None
    with AgentStream(agent, wanted, patience_s=timeout_s) as stream:
        stream.wait(min(_HELLO_S, timeout_s or _HELLO_S))
        with stop_on_signals() as stop:
            if ready_file:
                options.make_ready_file(ready_file)
            nodes = ", ".join(map(printable, stream.nodes))
            click.echo(f"tracing {nodes} through its agent; Ctrl-C ends", err=True)
            left_s = max(0.0, end_s - time.monotonic()) if end_s else None
            run(stream, stream, writer, expectation, count=count, timeout_s=left_s, stop=stop)
            stream.hang_up()
            if stream.shown != count:
                # What happened before the end is not lost on its way.
                run(stream, stream, writer, expectation)
            stream.take_summary()
        writer.end(stream.summary())
    sys.exit(expectation.exit_code())


_IS_THE_AGENT_S = "is the agent's own: it does not go with --agent"
_IS_THE_URL_S = "goes with --agent https://HOST:PORT alone"


def _refuse(names: Iterable[str], why: str) -> None:
    """
    Refuse options that cannot be followed.

    What the environment says is left alone: in an agent's pod it speaks to the agent.
    """
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} {why}")


def _host_and_port(url: str) -> tuple[str, int]:
    if not url.isascii() or not url.isprintable():
        raise click.UsageError(f"--agent {url!a} is no URL")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise click.UsageError(f"--agent {url}: {error}") from None
    if parts.scheme != "https":
        raise click.UsageError(
            f"--agent {url}: an agent hands out its stream over https alone; tokens and the"
            " addresses of clients must not cross a network in clear"
        )
    if not host or port is None:
        raise click.UsageError(f"--agent {url} names no port; 9464 is an agent's")
    if parts.username is not None or parts.query or parts.fragment:
        raise click.UsageError(f"--agent https://{host}:{port} takes no user, query or fragment")
    if parts.path.rstrip("/") not in ("", URL_PATH):
        raise click.UsageError(f"--agent {url}: the stream is at {URL_PATH}, and needs no path")
    return host, port


def _token(parameters: Mapping[str, Any]) -> str:
    # Only who shows a token shall carry what reads them.
    from tracer.cluster.token import token_in, token_of  # noqa: PLC0415

    token_file, kubeconfig, context = (
        parameters[name] for name in ("token_file", "kubeconfig", "context")
    )
    if token_file is not None:
        _refuse(_ACCOUNT, "does not go with --token-file: there is one token")
        return token_in(token_file)
    if kubeconfig is None and context is None:
        raise click.UsageError(
            "--agent https://... takes a token: --token-file FILE, or --kubeconfig or --context to"
            " show that of its user"
        )
    return token_of(kubeconfig, context)
