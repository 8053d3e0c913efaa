# make setup: everything the project needs on a Debian machine, as root; safe to run again.
# make demo:  set up, then the main job. make test: set up, then all tests.
VENV := .venv
STAMP := $(VENV)/.ready
# Debian's packages. BCC comes from here, never from PyPI, where the name is another program's.
DEBIAN := python3-bpfcc python3-venv linux-libc-dev libc6-dev gcc iproute2 iptables nftables \
	conntrack nfacct clang-format bpftool git tcpdump
# What the tests of deploy/ need beside them, and the stamp that says it is there.
DEBIAN_DEPLOY := prometheus podman crun mmdebstrap shellcheck zsh fish mandoc systemd
DEPLOY_STAMP := $(VENV)/.ready-deploy
# What the tests behind proxies need.
DEBIAN_PROXIES := haproxy nginx-light
# What the tests of pages need: a browser, its driver, a font.
DEBIAN_BROWSER := chromium chromium-driver fonts-dejavu-core
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

.PHONY: setup print-debian setup-deploy setup-browser setup-proxies manifests constraints man demo test vm lint format fuzz bench soak outage pictures clean
.DELETE_ON_ERROR:

setup: $(STAMP)

print-debian:
	@echo $(DEBIAN)

# The distribution's own Python, so that the virtual environment does not depend on another's.
$(STAMP): pyproject.toml Makefile
	./setup-packages $(DEBIAN)
	test -x $(VENV)/bin/python || /usr/bin/python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	touch $@

setup-deploy: $(DEPLOY_STAMP)

$(DEPLOY_STAMP): $(STAMP)
	./setup-packages $(DEBIAN_DEPLOY)
	$(VENV)/bin/pip install --quiet --editable '.[deploy]'
	touch $@

# The plain manifests from the chart.
manifests: setup-deploy
	$(VENV)/bin/python deploy/render.py

# What the image installs from PyPI: the newest that pyproject.toml allows.
constraints: setup
	rm -rf build/constraints
	/usr/bin/python3 -m venv build/constraints
	build/constraints/bin/pip install --quiet .
	{ head -1 deploy/constraints.txt; build/constraints/bin/pip freeze --exclude srcip; } > build/constraints.txt
	mv build/constraints.txt deploy/constraints.txt

# Man pages and shell completions, into build/.
man: setup
	PYTHONPATH=. $(VENV)/bin/python deploy/terminal.py build

demo: setup
	$(VENV)/bin/srcip demo

setup-browser: setup
	./setup-packages $(DEBIAN_BROWSER)

setup-proxies: setup
	./setup-packages $(DEBIAN_PROXIES)

test: setup-deploy setup-browser setup-proxies
	$(VENV)/bin/python -m pytest

# Under other kernels, in virtual machines: docs/kernels.md. Downloads them; takes about an hour.
vm: setup
	./setup-packages qemu-system-x86 qemu-system-arm seabios busybox-static cpio kmod xz-utils zstd \
		ipvsadm ipset mmdebstrap
	SRCIP_VM_TESTS=1 $(VENV)/bin/python -m pytest -v tests/vm

lint: setup
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	clang-format --dry-run --Werror bpf/*.c bpf/*.h tests/bench/*.c

format: setup
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format
	clang-format -i bpf/*.c bpf/*.h tests/bench/*.c

# A million damaged headers of proxies; takes about a minute.
fuzz: setup
	$(VENV)/bin/python -m tests.fuzz

bench: setup
	$(VENV)/bin/python -m tests.bench
	$(VENV)/bin/python -m tests.bench.bench_judge
	$(VENV)/bin/python -m tests.bench.bench_cluster
	$(VENV)/bin/python -m tests.bench.bench_agent
	$(VENV)/bin/python -m tests.bench.bench_stream
	$(VENV)/bin/python -m tests.bench.bench_stitch
	$(VENV)/bin/python -m tests.bench.bench_headers
	$(VENV)/bin/python -m tests.bench.bench_paths

# A million connections while the cluster changes: what is counted is what was made. Three minutes.
soak: setup
	$(VENV)/bin/python -m tests.bench.soak

# The API server is away for minutes, twice, and comes back as another. Fifteen minutes.
outage: setup
	$(VENV)/bin/python -m tests.bench.outage

# The pictures in docs, as the program draws them.
pictures: setup
	$(VENV)/bin/python -m tests.unit.pictures

clean:
	rm -rf $(VENV) build dist *.egg-info
