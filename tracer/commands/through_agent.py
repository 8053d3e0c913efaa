"""srcip trace --agent: show what a running agent judges, without privileges."""

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

# Options that are fixed when the agent starts, or that its stream does not offer.
_AGENT_S_OWN = (
    "netns", "node_name", "cluster", "no_cluster", "proxy_mode", "masquerade_mark", "record",
    "packets", "diagram_file", "otlp", "read_proxy_headers", "trusted_proxy",
)  # fmt: skip
# Where a token may come from, which only an agent at a URL asks for; and its other options.
_ACCOUNT = ("kubeconfig", "context")
_URL_S_OWN = ("token_file", "ca_file", "tls_server_name")
# An agent that is starting answers when it begins to count: after half a minute at most.
_HELLO_S = 45.0


agent_options = options.together(
    click.option(
        "--token-file",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="With --agent https://...: send the bearer token in FILE. Default: that of the user in"
        " --kubeconfig or --context.",
    ),
    click.option(
        "--ca-file",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="With --agent https://...: trust the certificate authorities in FILE (PEM). Default:"
        " the system's.",
    ),
    click.option(
        "--tls-server-name",
        metavar="NAME",
        help="With --agent https://...: the name in the agent's certificate. Default: the host of"
        " the URL.",
    ),
)


def agent_at(where: str, parameters: Mapping[str, Any]) -> Path | HttpsAgent:
    """
    Return the agent that ``--agent`` names.

    Args:
        where: Its value: a path, or a URL.
        parameters: The other options.

    Raises:
        click.UsageError: If it is not valid, or another option does not go with it.
        ClusterError: If there is no token to send.
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
    Refuse options that need an agent.

    Raises:
        click.UsageError: If one was given.
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
    Show what an agent judges, and exit.

    Raises:
        StreamError: If there is no agent, or it refuses or closes the stream.
    """
    end_s = time.monotonic() + timeout_s if timeout_s else float("inf")
    with AgentStream(agent, wanted, patience_s=timeout_s) as stream:
        stream.wait(min(_HELLO_S, _left_s(end_s)))
        with stop_on_signals() as stop:
            if ready_file:
                options.make_ready_file(ready_file)
            nodes = ", ".join(map(printable, stream.nodes))
            click.echo(f"tracing {nodes} through its agent; Ctrl-C ends", err=True)
            left_s = _left_s(end_s) if timeout_s else None
            run(stream, stream, writer, expectation, count=count, timeout_s=left_s, stop=stop)
            stream.hang_up()
            if stream.shown != count:
                # Show what happened before the stop and is still on its way.
                run(stream, stream, writer, expectation)
            stream.take_summary()
        writer.end(stream.summary())
    sys.exit(expectation.exit_code())


_IS_THE_AGENT_S = "cannot be combined with --agent: the agent decides that itself"
_IS_THE_URL_S = "needs --agent https://HOST:PORT"


def _left_s(end_s: float) -> float:
    return max(0.0, end_s - time.monotonic())


def _refuse(names: Iterable[str], why: str) -> None:
    """
    Refuse options given on the command line that would have no effect.

    Environment variables are ignored: in an agent's pod they configure the agent.
    """
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} {why}")


def _host_and_port(url: str) -> tuple[str, int]:
    if not url.isascii() or not url.isprintable():
        raise click.UsageError(f"--agent {url!a} is not a URL")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise click.UsageError(f"--agent {url}: {error}") from None
    if parts.scheme != "https":
        raise click.UsageError(
            f"--agent {url}: an agent offers its stream over https only, because tokens and client"
            " addresses must not cross a network in clear text"
        )
    if not host or port is None:
        raise click.UsageError(f"--agent {url} names no port; an agent's default is 9464")
    if parts.username is not None or parts.query or parts.fragment:
        raise click.UsageError(
            f"--agent https://{host}:{port} must not have a user, query or fragment"
        )
    if parts.path.rstrip("/") not in ("", URL_PATH):
        raise click.UsageError(f"--agent {url}: leave out the path; the stream is at {URL_PATH}")
    return host, port


def _token(parameters: Mapping[str, Any]) -> str:
    # Imported late: only a token needs it.
    from tracer.cluster.token import token_in, token_of  # noqa: PLC0415

    token_file, kubeconfig, context = (
        parameters[name] for name in ("token_file", "kubeconfig", "context")
    )
    if token_file is not None:
        _refuse(_ACCOUNT, "cannot be combined with --token-file: only one token is sent")
        return token_in(token_file)
    if kubeconfig is None and context is None:
        raise click.UsageError(
            "--agent https://... needs a token: give --token-file FILE, or --kubeconfig or"
            " --context for that user's token"
        )
    return token_of(kubeconfig, context)
