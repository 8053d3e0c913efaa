"""The command line: the group of commands, and errors as one line."""

import logging
import sys

import click

from exporters.terminal import printable
from tracer.commands.demo import demo
from tracer.commands.doctor import doctor
from tracer.commands.flows import flows
from tracer.commands.replay import replay
from tracer.commands.trace import trace
from tracer.errors import LoadError, TracerError


@click.group(
    context_settings={"auto_envvar_prefix": "SRCIP", "help_option_names": ["-h", "--help"]}
)
@click.option("-v", "--verbose", is_flag=True, help="Show what went on, and compilers' own words.")
@click.version_option(package_name="srcip", prog_name="srcip")
@click.pass_context
def cli(context: click.Context, verbose: bool) -> None:
    """
    Show whose IP address a backend sees, and where on a Kubernetes node the client's was replaced.

    \b
    Start with:
      srcip doctor     what this node can see
      srcip trace      every new connection as it happens
      srcip demo       the same on a cluster in a box, removed afterwards

    Every option can also be set by an environment variable, such as SRCIP_TRACE_NODE_NAME.
    """
    context.obj = verbose
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="srcip: %(message)s",
        stream=sys.stderr,
    )


for command in (trace, flows, doctor, replay, demo):
    cli.add_command(command)


def main() -> None:
    """Run srcip. A TracerError is one line and exit 1; a bug keeps its traceback."""
    try:
        cli(prog_name="srcip")
    except TracerError as error:
        click.echo(f"srcip: {printable(str(error))}", err=True)
        if isinstance(error, LoadError) and error.details:
            if "-v" in sys.argv or "--verbose" in sys.argv:
                click.echo(error.details, err=True)
            else:
                click.echo("srcip: 'srcip -v' shows what the compiler or kernel said", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
