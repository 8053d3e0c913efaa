"""Man pages and shell completions, made from the commands: read by the programs they are for."""

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from deploy import terminal
from tests.deploy.conftest import tool

COMMANDS = dict(terminal.commands())
# Where 'srcip' of this environment is.
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("terminal")
    terminal.main(directory)
    return directory


def run(*command):
    done = subprocess.run(
        command,
        env={**os.environ, "PATH": PATH, "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout


def test_a_page_for_each_command(made):
    """There is a page for each command, and srcip's own names them all."""
    assert {path.stem for path in (made / "man").iterdir()} == set(COMMANDS)
    text = (made / "man/srcip.1").read_text().replace("\\-", "-")
    assert all(f"{name}(1)" in text for name in COMMANDS if name != "srcip")


@pytest.mark.parametrize("name", COMMANDS)
def test_man_page(made, name):
    """The page is sound, and shows every option and every example as they are."""
    page = made / "man" / f"{name}.1"
    found = run(tool("mandoc"), "-Tlint", "-Wwarning", str(page)).splitlines()
    # A date would be that of the build.
    assert [line for line in found if "missing date" not in line] == []
    shown = re.sub(r".\x08", "", run(tool("mandoc"), "-Tutf8", "-Owidth=500", str(page)))
    command = COMMANDS[name].command
    for each in command.params:
        if isinstance(each, click.Option):
            assert all(option in shown for option in each.opts), each.name
    for line in (command.help or "").splitlines():
        if line.strip().startswith(("srcip ", "curl ")):
            assert line.strip() in shown


def test_bash(made):
    """Bash completes commands, options and values."""
    script = made / "completions/bash/srcip"
    ask = (
        f'. {script}; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _srcip_completion srcip;'
        ' printf "%s\\n" "${COMPREPLY[@]}"; complete -p srcip >/dev/null'
    )

    def completed(*words):
        return set(run(tool("bash"), "--norc", "-c", ask, "bash", *words).split())

    assert completed("srcip", "tr") == {"trace"}
    assert completed("srcip", "trace", "--filter-v") == {"--filter-verdict"}
    assert completed("srcip", "serve", "--authorize", "k") == {"kubernetes"}


def test_zsh(made):
    """Zsh finds the completion by its name, and it offers commands with what they do."""
    script = made / "completions/zsh"
    # What it offers goes to _describe; outside of its line editor that is ours to define.
    ask = (
        f"fpath=({script} $fpath); autoload -Uz compinit; compinit -u -D; print $_comps[srcip];"
        "_describe() { print -l ${(P)3} }; words=(srcip tr) CURRENT=2; _srcip"
    )
    printed = run(tool("zsh"), "-f", "-c", ask).splitlines()
    assert printed[0] == "_srcip"
    assert any(line.startswith("trace:Show new connections") for line in printed[1:])


def test_fish(made):
    """Fish completes commands with what they do, and values."""
    script = made / "completions/fish/srcip.fish"

    def completed(line):
        return run(tool("fish"), "--no-config", "-c", f"source {script}; complete -C '{line}'")

    assert completed("srcip tr").startswith("trace\tShow new connections")
    assert set(completed("srcip trace --filter-verdict repl").split()) == {
        "replaced",
        "replaced-upstream",
    }
