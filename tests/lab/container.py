"""
The image built from its Dockerfile, and run as the DaemonSet says: podman in the kubelet's place.

The base image is Debian's minimal system, made here; everything else is what users run.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.deploy.conftest import tool

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy/Dockerfile"
BASE, IMAGE = "localhost/debian:12-slim", "localhost/srcip"
# Podman's default, which takes CAP_SYS_ADMIN for bpf() in Debian 12.
PROFILE = Path("/usr/share/containers/seccomp.json")
# Where the kubelet puts a pod's token and certificate.
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
# crun refuses cgroups that are half of the first and half of the second version, even where it
# shall make none. It sees only the second.
_ONLY_CGROUP2 = (
    'test ! -d /sys/fs/cgroup/unified || mount -t cgroup2 none /sys/fs/cgroup; exec podman "$@"'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Podman, with storage of its own."""

    storage: Path

    def command(self, *arguments):
        where = [f"--root={self.storage}/root", f"--runroot={self.storage}/run"]
        fixed = ["--cgroup-manager=cgroupfs", "--events-backend=none"]
        return [
            *("unshare", "--mount", "sh", "-ec", _ONLY_CGROUP2, "sh"),
            *(*where, *fixed, *arguments),
        ]

    def run(self, *arguments, is_checked=True, timeout=600):
        done = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, check=False, timeout=timeout
        )
        assert not is_checked or done.returncode == 0, done.stdout + done.stderr
        return done


@contextmanager
def engine():
    """An engine that is empty, and removed afterwards."""
    tool("podman")
    # Podman takes no long path there.
    with tempfile.TemporaryDirectory(prefix="srcip-", dir=_place()) as directory:
        found = Engine(storage=Path(directory))
        try:
            yield found
        finally:
            found.run("rm", "--all", "--force", "--time=0", is_checked=False)
            found.run("rmi", "--all", "--force", is_checked=False)


def _place():
    """Return where there is room for two gigabytes: in memory, where a build is twice as fast."""
    memory = Path("/dev/shm")
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > 4 << 30
    return memory if has_room else None


def build(podman):
    """Make the base image, and the agent's by its Dockerfile."""
    base = podman.storage / "base.tar"
    # Debian's own slim image is made likewise.
    without = [f"--dpkgopt=path-exclude=/usr/share/{each}/*" for each in ("doc", "locale", "man")]
    options = ["--quiet", "--variant=minbase", "--dpkgopt=force-unsafe-io", *without]
    # What it leaves when it is interrupted goes, too.
    with tempfile.TemporaryDirectory(prefix="srcip-") as directory:
        subprocess.run(
            [tool("mmdebstrap"), *options, "bookworm", str(base)],
            env={**os.environ, "TMPDIR": directory},
            check=True,
            capture_output=True,
            timeout=600,
        )
    podman.run("import", "--quiet", str(base), BASE)
    base.unlink()
    options = [f"--build-arg=BASE={BASE}", f"--file={DOCKERFILE}", f"--tag={IMAGE}", "--pull=never"]
    options += ["--jobs=2", "--network=host", "--isolation=chroot"]
    podman.run("build", *options, *_as_here(), str(ROOT))


def _as_here():
    """Return options by which pip reaches the packages in the build as it does here."""
    certificates, settings = Path("/etc/ssl/certs/ca-certificates.crt"), Path("/etc/pip.conf")
    variables = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    options = []
    if certificates.exists():
        # Not in the same place: Debian's package writes it there.
        variables["PIP_CERT"] = "/certificates.crt"
        options.append(f"--volume={certificates}:{variables['PIP_CERT']}:ro")
    if settings.exists():
        options.append(f"--volume={settings}:{settings}:ro")
    return options + [f"--env={name}={value}" for name, value in variables.items()]


def seccomp_profile(directory):
    """
    Return a file with the default profile of containerd since 1.6.9 and Docker since 23.

    It is podman's, which Debian 12 has, with what they added: bpf() for CAP_BPF and
    perf_event_open() for CAP_PERFMON, without CAP_SYS_ADMIN.
    """
    profile = json.loads(PROFILE.read_text())
    added = {"CAP_BPF": "bpf", "CAP_PERFMON": "perf_event_open"}
    for rule in profile["syscalls"]:
        rule["names"] = [name for name in rule["names"] if name not in added.values()]
    for capability, name in added.items():
        rule = {"names": [name], "action": "SCMP_ACT_ALLOW", "args": []}
        profile["syscalls"].append(rule | {"includes": {"caps": [capability]}})
    path = directory / "seccomp.json"
    path.write_text(json.dumps(profile))
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """What the kubelet knows of a pod: where it runs, and what its fields say."""

    spec: dict
    netns: Path
    fields: dict
    seccomp: Path
    # Files of the service account, and further variables.
    account: Path
    variables: dict = field(default_factory=dict)

    def options(self, *, without=()):
        """Return podman's options, and the arguments, for its only container."""
        (container,) = self.spec["containers"]
        context = container["securityContext"]
        assert self.spec["hostNetwork"]
        values = {
            each["name"]: self.fields[each["valueFrom"]["fieldRef"]["fieldPath"]]
            for each in container["env"]
        }
        capabilities = context["capabilities"]
        options = [
            *(f"--cap-drop={each.lower()}" for each in capabilities["drop"]),
            *(f"--cap-add={each}" for each in capabilities["add"] if each not in without),
            *(f"--env={name}={value}" for name, value in (values | self.variables).items()),
            *(self._volume(mount) for mount in container["volumeMounts"]),
            f"--volume={self.account}:{ACCOUNT}:ro",
            f"--network=ns:{self.netns}",
        ]
        if context["readOnlyRootFilesystem"]:
            options += ["--read-only", "--read-only-tmpfs=false"]
        if not context["allowPrivilegeEscalation"]:
            options.append("--security-opt=no-new-privileges")
        if context["seccompProfile"]["type"] == "RuntimeDefault":
            options.append(f"--security-opt=seccomp={self.seccomp}")
        arguments = [
            re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], each)
            for each in container["args"]
        ]
        return [*options, *_no_more_than_here()], arguments

    def _volume(self, mount):
        (volume,) = (each for each in self.spec["volumes"] if each["name"] == mount["name"])
        size = volume["emptyDir"]["sizeLimit"].removesuffix("i").lower()
        return f"--tmpfs={mount['mountPath']}:rw,size={size},mode=1777"


def _no_more_than_here():
    """Return options against what podman would do beyond what these tests may."""
    return ["--cgroups=disabled", "--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096"]
