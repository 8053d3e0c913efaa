"""The command line: the command group, and errors printed as one line."""

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

# In the order in which --help lists them.
_COMMANDS = ("trace", "flows", "explain", "doctor", "serve", "replay", "stitch", "report", "demo")

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class _WrongUsage(click.UsageError):
    """Wrong usage, printed in one line like every other error."""

    def show(self, file: IO[str] | None = None) -> None:  # noqa: ARG002 - click's
        # While click still splits a subcommand's options, the error carries only the group's
        # context.
        words = (
            ("srcip",) if self.ctx is None else (self.ctx.command_path, self.ctx.invoked_subcommand)
        )
        command = " ".join(filter(None, words))
        click.echo(f"srcip: {printable(self.message)}; see '{command} --help'", err=True)


@contextmanager
def _usage_in_one_line(ctx: click.Context | None = None) -> Iterator[None]:
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
            return f"no such option: {error.option_name}" + (
                f"; did you mean {near}?" if near else ""
            )
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
    A group that imports a command only when it runs.

    A tracer on a busy node should not hold the demo's modules in memory.
    """

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with _usage_in_one_line():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with _usage_in_one_line(ctx):
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
@click.option(
    "-v",
    "--verbose",
    is_flag=True,
    help="Log progress, and print the compiler's or the verifier's output when loading fails.",
)
@click.version_option(package_name="srcip", prog_name="srcip")
@click.pass_context
def cli(context: click.Context, verbose: bool) -> None:
    """
    Show which source IP a backend sees, and where on a Kubernetes node the client's was replaced.

    \b
    Start with:
      srcip doctor     what this node can see
      srcip trace      every new connection as it happens
      srcip explain    what a Service's backends will see, before any packet flows
      srcip demo       known scenarios on a cluster in a box, removed afterwards

    Every option can also be set by an environment variable, such as SRCIP_TRACE_NODE_NAME.
    Exit codes: 0 success, 1 failure, 2 wrong usage; with --expect, 3 if another verdict was seen
    and 4 if nothing was.
    """
    context.obj = verbose
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="srcip: %(message)s",
        stream=sys.stderr,
    )


def main() -> None:
    """Run srcip. A TracerError or a full disk prints one line and exits 1; a bug, a traceback."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, _terminate)
    if sys.stdout is None:
        # The parent closed it. The next file opened would get descriptor 1.
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - open to the end
    try:
        cli(prog_name="srcip")
    except TracerError as error:
        click.echo(f"srcip: {printable(str(error))}", err=True)
        if isinstance(error, LoadError) and error.details:
            if "-v" in sys.argv or "--verbose" in sys.argv:
                click.echo(error.details, err=True)
            else:
                click.echo("srcip: 'srcip -v' prints the output of compiler and kernel", err=True)
        sys.exit(1)
    except OSError as error:
        if error.errno not in _NO_ROOM or _takes_output():
            raise
        click.echo(f"srcip: cannot write standard output: {error.strerror}", err=True)
        # At exit Python flushes what is still buffered, and would fail with a second message.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)


def _takes_output() -> bool:
    # The error does not say which file was full: find out whether it was standard output.
    try:
        print(flush=True)
    except OSError:
        return False
    return True


def _terminate(number: int, _frame: FrameType | None) -> NoReturn:
    """Exit by an exception, so that the lab is removed and links are closed."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
