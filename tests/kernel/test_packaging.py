"""The wheel holds everything that the checkout runs on."""

import subprocess
import sys
import zipfile

import pytest

from tests.kernel.box import package_root

pytestmark = pytest.mark.usefixtures("kernel")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """A wheel, built from the checkout without the network, and unpacked."""
    directory = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"),
            *("--no-build-isolation", "--wheel-dir", str(directory), str(package_root())),
        ],
        check=True,
        capture_output=True,
    )
    (wheel,) = directory.glob("srcip-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory / "site")
    return directory / "site"


def tracked(pattern):
    """The files of the checkout that git tracks."""
    printed = subprocess.run(
        ["git", "ls-files", *pattern],
        cwd=package_root(),
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return printed.split()


def test_every_module_is_in_the_wheel(unpacked):
    """No package and no C source was forgotten in pyproject.toml."""
    missing = [
        name
        for name in tracked(["tracer/*.py", "exporters/*", "lab/*.py", "lab/data/*"])
        if not (unpacked / name).exists()
    ]
    missing += [
        name
        for name in tracked(["bpf/*.c", "bpf/*.h"])
        if not (unpacked / "tracer" / name).exists()
    ]
    assert not missing


def test_the_wheel_attaches(unpacked, tmp_path):
    """From the wheel alone, programs are found, compiled, loaded and attached."""
    # The environment's own copy of srcip must not help: -S would hide its dependencies, too.
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); "
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; "
        "from tracer.cli import main; import tracer; "
        "assert tracer.__file__.startswith(sys.path[0]), tracer.__file__; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(unpacked), "doctor", "--no-cluster"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in use:   BPF netfilter links" in done.stdout
