"""What the image is built from."""

import re
import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "deploy/constraints.txt"


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins():
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    return {canonical(name): version for name, version in (line.split("==") for line in lines)}


def needed(requirement, found):
    """Collect the names of all that a requirement brings."""
    name = canonical(requirement.name)
    if (name, *requirement.extras) in found:
        return
    found.add((name, *requirement.extras))
    for text in distribution(name).requires or ():
        each = Requirement(text)
        environments = [{"extra": extra} for extra in ("", *requirement.extras)]
        if each.marker is None or any(each.marker.evaluate(env) for env in environments):
            needed(each, found)


def test_all_that_is_installed_is_pinned():
    """Each dependency, and each of theirs, has its one version; and there is no other."""
    found = set()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"]:
        needed(Requirement(text), found)
    assert {name for name, *_ in found} == pins().keys()


def test_the_pins_are_what_the_project_takes():
    """None is older than pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"]:
        requirement = Requirement(text)
        assert pins()[canonical(requirement.name)] in requirement.specifier


def test_the_image_says_what_it_is():
    """Its labels are the project's version and license."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]+)"', dockerfile))
    assert labels["version"] == project["version"]
    assert labels["licenses"] == project["license"]
