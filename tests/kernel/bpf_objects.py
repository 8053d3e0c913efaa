"""What a process holds in the kernel, and whether it is there still: programs, maps and links."""

import json
import subprocess
from pathlib import Path

_KINDS = ("prog", "map", "link")


def held_by(pid):
    """The kind and id of each BPF object that a process has a descriptor of."""
    held = set()
    for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            lines = entry.read_text().splitlines()
        except FileNotFoundError:
            continue
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        # A link says which program is its own, too.
        kind = next((kind for kind in reversed(_KINDS) if f"{kind}_id" in fields), None)
        if kind:
            held.add((kind, int(fields[f"{kind}_id"])))
    return held


def left(objects):
    """Those that bpftool lists. Ids are not used again, and other tracers have their own."""
    listed = set()
    for kind in _KINDS:
        printed = subprocess.run(
            ["bpftool", "--json", kind, "list"], capture_output=True, text=True, check=True
        ).stdout
        listed |= {(kind, item["id"]) for item in json.loads(printed)}
    return objects & listed
