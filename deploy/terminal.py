"""
Make man pages and shell completions from the commands.

``make man`` writes them to build/man and build/completions. docs/install.md shows where they go.
"""

import re
import sys
from importlib.metadata import version
from inspect import cleandoc
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from tracer.cli import cli

SHELLS = {"bash": "srcip", "zsh": "_srcip", "fish": "srcip.fish"}
# As in docs/commands.md.
EXIT_CODES = {
    "0": "success",
    "1": "failure: one line on standard error says why",
    "2": "wrong usage",
    "3": "--expect did not hold for a connection or drop",
    "4": "--expect was given, but nothing was seen",
}


def commands():
    """Yield the name of each command, srcip itself first, and its context."""
    top = click.Context(cli, info_name="srcip", **cli.context_settings)
    yield "srcip", top
    for name in cli.list_commands(top):
        command = cli.get_command(top, name)
        yield f"srcip-{name}", click.Context(command, info_name=name, parent=top)


def man_page(name, context):
    """Return a man page as troff."""
    command = context.command
    summary = command.get_short_help_str(limit=200) if context.parent else _paragraphs(command)[0]
    lines = [
        f'.TH "{name.upper()}" "1" "" "srcip {version("srcip")}" "srcip"',
        ".SH NAME",
        f"{_escaped(name)} \\- {_escaped(summary.strip().rstrip('.'))}",
        ".SH SYNOPSIS",
        _escaped(" ".join([context.command_path, *command.collect_usage_pieces(context)])),
        ".SH DESCRIPTION",
        *_joined(_paragraph(each) for each in _paragraphs(command)),
        ".SH OPTIONS",
        *(line for record in _options(command, context) for line in _item(*record)),
    ]
    if isinstance(command, click.Group):
        lines.append(".SH COMMANDS")
        for each, inner in list(commands())[1:]:
            lines += _item(f"{each}(1)", inner.command.get_short_help_str(limit=200))
    lines.append(".SH EXIT STATUS")
    lines += [line for code in EXIT_CODES.items() for line in _item(*code)]
    others = [each for each, _ in commands() if each != name]
    lines += [".SH SEE ALSO", ", ".join(f"{_escaped(each)}(1)" for each in others)]
    return "\n".join(lines) + "\n"


def _paragraphs(command):
    return re.split(r"\n\s*\n", cleandoc(command.help or ""))


def _paragraph(text):
    """Return a paragraph of a help; click keeps the lines of one that begins with a backspace."""
    if text.startswith("\b"):
        kept = text.removeprefix("\b").strip("\n").splitlines()
        return [".nf", *map(_escaped, kept), ".fi"]
    return [_escaped(" ".join(text.split()))]


def _joined(paragraphs):
    lines = [line for paragraph in paragraphs for line in (".PP", *paragraph)]
    return lines[1:]


def _options(command, context):
    records = (each.get_help_record(context) for each in command.get_params(context))
    return [record for record in records if record and record[1]]


def _item(term, text):
    return [".TP", f"\\fB{_escaped(term)}\\fR", _escaped(" ".join(text.split()))]


def _escaped(text):
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text


def completion(shell):
    """Return the script by which a shell completes srcip."""
    return get_completion_class(shell)(cli, {}, "srcip", "_SRCIP_COMPLETE").source()


def main(directory):
    """Write all of them to a directory."""
    man = directory / "man"
    man.mkdir(parents=True, exist_ok=True)
    for name, context in commands():
        (man / f"{name}.1").write_text(man_page(name, context))
    for shell, name in SHELLS.items():
        place = directory / "completions" / shell
        place.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(completion(shell))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
