"""The command line: the group of commands, and errors as one line."""

import errno
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

import click

from exporters.terminal import printable
from tracer.errors import LoadError, TracerError

# In the order in which a newcomer needs them.
_COMMANDS = ("trace", "flows", "explain", "doctor", "serve", "replay", "stitch", "report", "demo")

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class _WrongUsage(click.UsageError):
    """Wrong usage, told in one line like every other error."""

    def show(self, file: IO[str] | None = None) -> None:  # noqa: ARG002 - click's
        # What is wrong while a command's options are split is told of the group alone.
        words = (
            ("srcip",) if self.ctx is None else (self.ctx.command_path, self.ctx.invoked_subcommand)
        )
        command = " ".join(filter(None, words))
        click.echo(f"srcip: {printable(self.message)}; see '{command} --help'", err=True)


@contextmanager
def _told_in_one_line(ctx: click.Context | None = None) -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        raise _WrongUsage(_usage_text(error), error.ctx or ctx) from error


def _usage_text(error: click.UsageError) -> str:
    match error:
        case click.NoSuchOption():
            near = " or ".join(sorted(error.possibilities or ()))
            return f"there is no {error.option_name}" + (f", but {near}" if near else "")
        case click.MissingParameter():
            return f"{_hint(error)} is missing"
        case click.BadParameter():
            return f"{_hint(error)}: {error.message}".removesuffix(".")
        case _:
            return f"{error.message[:1].lower()}{error.message[1:]}".removesuffix(".")


def _hint(error: click.BadParameter) -> str:
    hint = error.param.get_error_hint(error.ctx) if error.param and error.ctx else None
    return (hint or "a value").replace("'", "")


class _LazyGroup(click.Group):
    """
    A group that imports a command when it is asked for.

    A tracer on a busy node need not hold the demo's cluster in memory.
    """

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with _told_in_one_line():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _told_in_one_line(ctx):
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's
        return list(_COMMANDS)

    def get_command(
        self,
        ctx: click.Context,  # noqa: ARG002 - click's
        cmd_name: str,
    ) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"tracer.commands.{cmd_name}"), cmd_name)
        return command


@click.group(
    cls=_LazyGroup,
    context_settings={"auto_envvar_prefix": "SRCIP", "help_option_names": ["-h", "--help"]},
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
      srcip explain    what a Service's backends will see, before any packet flows
      srcip demo       the same on a cluster in a box, removed afterwards

    Every option can also be set by an environment variable, such as SRCIP_TRACE_NODE_NAME.
    """
    context.obj = verbose
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="srcip: %(message)s",
        stream=sys.stderr,
    )


def main() -> None:
    """Run srcip. A TracerError or a full disk is one line and exit 1; a bug keeps its traceback."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, _terminate)
    if sys.stdout is None:
        # It was closed by who started us. Else the next file that is opened would take its place.
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - open to the end
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
    except OSError as error:
        if error.errno not in _NO_ROOM or _takes_output():
            raise
        click.echo(f"srcip: cannot write standard output: {error.strerror}", err=True)
        # Python would try once more with what is left, and complain of that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)


def _takes_output() -> bool:
    # The error names no file where there is no room for what is printed.
    try:
        print(flush=True)
    except OSError:
        return False
    return True


def _terminate(number: int, _frame: FrameType | None) -> NoReturn:
    """End as for an exception, so that a lab is removed and links are closed."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
