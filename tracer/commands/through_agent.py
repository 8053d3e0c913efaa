"""srcip trace --agent: what a running agent judges, without privileges of one's own."""

import sys
import time
from pathlib import Path
from typing import NoReturn

import click
from click.core import ParameterSource

from exporters.terminal import printable
from tracer.commands import options
from tracer.commands.output import Expectation, Writer
from tracer.commands.run import run, stop_on_signals
from tracer.pipeline import Wanted
from tracer.stream.client import AgentStream

# What the agent was told when it was started, and what it does not hand out.
_AGENT_S_OWN = (
    "netns", "node_name", "cluster", "kubeconfig", "context", "no_cluster", "proxy_mode",
    "masquerade_mark", "record", "packets", "diagram_file", "otlp", "read_proxy_headers",
    "trusted_proxy",
)  # fmt: skip
# An agent answers at once, or when it has begun to count: after half a minute at the latest.
_HELLO_S = 45.0


def through_agent(
    agent: str,
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
    _refuse_what_is_the_agent_s()
    end_s = time.monotonic() + timeout_s if timeout_s else None
    with AgentStream(Path(agent.removeprefix("unix:")), wanted) as stream:
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


def _refuse_what_is_the_agent_s() -> None:
    """
    Refuse options that only a tracer of its own can follow.

    What the environment says is left alone: in an agent's pod it speaks to the agent.
    """
    context = click.get_current_context()
    for name in _AGENT_S_OWN:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{option} is the agent's own: it does not go with --agent")
